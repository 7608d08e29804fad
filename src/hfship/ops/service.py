# SPDX-License-Identifier: Apache-2.0
"""What starts hfship without anybody at a terminal: systemd units, and lines for cron.

Owns the text of the units, and their installation for one user (`systemctl --user`), which needs no
root. Promises: nothing is installed but the unit that was shown. Sources: systemd.unit(5),
systemd.service(5), systemd.syntax(7), crontab(5).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Sequence, Tuple

from hfship.base.errors import HostError, command_line
from hfship.base.files import atomic_write, disk_errors
from hfship.base.processes import run_program
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.base.report import Reporter

USER_UNITS = ".config/systemd/user"  # below the home folder
SYSTEMCTL_TIMEOUT_S = 30.0
# 130: stopped by a signal, with the state saved; 3: some of the work waits for the same command.
_ENDS_WELL = "SuccessExitStatus=3 130"


@dataclass(frozen=True)
class Service:
    """A unit of systemd: what runs, whether once at boot or all the time, and for whom."""

    name: str
    about: str
    argv: Tuple[str, ...]
    stays: bool  # runs until it is stopped
    user: str = ""  # of a unit of the whole system; "": one for the user who installs it

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.service"

    def unit(self) -> str:
        """The lines of its file.

        What runs once waits a minute: neither systemd's users' units nor cron can wait for the
        network, and a job that finds none can be resumed again.
        """
        lines = ["[Unit]", f"Description={self.about}"]
        if self.user:
            lines += ["Wants=network-online.target", "After=network-online.target"]
        lines.append("[Service]")
        if self.stays:
            lines += ["Type=simple", "Restart=on-failure", "RestartSec=10"]
        else:
            lines += ["Type=oneshot", "RemainAfterExit=yes"]
        lines.append(_ENDS_WELL)
        if self.user:
            lines += [f"User={self.user}", "NoNewPrivileges=yes"]
        if not self.stays:
            lines.append("ExecStartPre=/bin/sleep 60")
        lines += [
            f"ExecStart={_in_unit(self.argv)}",
            "[Install]",
            f"WantedBy={self._target}",
        ]
        return "\n".join(lines) + "\n"

    @property
    def _target(self) -> str:
        if self.user:
            return "multi-user.target"
        return "default.target"

    def cron_line(self) -> str:
        """What starts it at boot where there is no systemd."""
        line = command_line(*self.argv)
        command = line.replace("%", "\\%")
        if self.stays:
            return f"@reboot {command}"
        return f"@reboot sleep 60; {command}"


def _in_unit(argv: Sequence[str]) -> str:
    """A command line as ExecStart= reads it: % begins a specifier, $ a variable.

    >>> _in_unit(["/bin/hfship", "/a b/50%/$x"])
    "/bin/hfship '/a b/50%%/$$x'"
    """
    line = command_line(*argv)
    line = line.replace("%", "%%")
    return line.replace("$", "$$")


def user_unit_path(service: Service, home: Path) -> Path:
    """Where the unit of a user lies."""
    units = home / USER_UNITS
    return units / service.file


def install_text(service: Service, home: Path) -> str:
    """How to install a service by hand: the unit with the commands that enable it, and a line for
    cron."""
    unit = user_unit_path(service, home)
    now = "--now " if service.stays else ""
    enable = f"systemctl --user enable {now}{service.name} && loginctl enable-linger"
    if service.user:
        unit = Path("/etc/systemd/system", service.file)
        enable = f"systemctl daemon-reload && systemctl enable {now}{service.name}"
    return f"""\
# With systemd: save these lines as {unit}, then run
#   {enable}
{service.unit()}
# Without systemd: add this line with crontab -e
{service.cron_line()}
"""


def current_user() -> str:
    """The name of who runs this, or the number where there is none."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


FOR_USER = ("--user",)  # the scope of systemctl; () is that of the whole system


def systemd_answers(scope: Sequence[str] = FOR_USER) -> bool:
    """Does systemd run units in a scope? Not in containers; for a user not after `su`."""
    if not shutil.which("systemctl"):
        return False
    try:
        return run_program(["systemctl", *scope, "show-environment"], timeout_s=5.0).code == 0
    except HostError:
        return False


def enable_unit(unit: str, path: Path, now: bool, scope: Sequence[str] = FOR_USER) -> None:
    """Enable a unit whose file lies at `path`; with `now` start it, too. Raises HostError."""
    enable = ["enable", "--now"] if now else ["enable"]
    for words in (["daemon-reload"], [*enable, unit]):
        argv = ["systemctl", *scope, *words]
        done = run_program(argv, timeout_s=SYSTEMCTL_TIMEOUT_S)
        if done.code:
            what = f"{command_line(*argv)} ended with {done.code}"
            raise HostError(what, done.err.strip(), f"{path} is there; run the command by hand")


def install_for_user(service: Service, home: Path, reporter: Reporter) -> Path:
    """Install and enable a unit of this user; returns its path. What runs all the time is started.

    Raises DiskError, HostError.
    """
    path = user_unit_path(service, home)
    with disk_errors("write", path, "hfship watch --install | less   prints what belongs there"):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, service.unit())

    enable_unit(service.name, path, service.stays)
    user = current_user()
    linger = ["loginctl", "enable-linger", user]
    try:
        failed = run_program(linger, timeout_s=SYSTEMCTL_TIMEOUT_S).code
    except HostError:
        failed = 1
    if failed:
        command = command_line(*linger)
        reporter.warn(
            f"units of {user} start at the first login, not at boot, until root runs: {command}"
        )

    return path
