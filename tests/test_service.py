"""--install: a unit of systemd, shown, asked about, and installed for one user."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
from pathlib import Path
from typing import Dict, Tuple

import pytest

from conftest import Program, missing, without_times
from hfship import __version__
from hfship.commands.repairing import units_of
from hfship.ops.service import Service, install_text
from support import components

RESUME = Service("hfship-resume", "Resume", ("/bin/hfship", "watch", "--resume-all"), stays=False)
UNIT = ".config/systemd/user/hfship-resume.service"


@pytest.fixture
def systemd(tmp_path: Path) -> Dict[str, str]:
    """An environment with a systemctl and a loginctl that write down what they are asked."""
    for name in ("systemctl", "loginctl"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/asked\n'
            f'case "$*" in *"$REFUSE"*) [ -z "$REFUSE" ] || {{ echo no >&2; exit 1; }};; esac\n'
        )
        path.chmod(0o755)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def asked(tmp_path: Path) -> str:
    path = tmp_path / "asked"
    return path.read_text() if path.exists() else ""


def answer(program: Program, env: Dict[str, str], word: str) -> Tuple[int, str]:
    """The exit code, and what stands on the terminal, of `watch --install` that is answered."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(program.argv[0], [*program.argv, "watch", "--install"], program.env(env))
    os.write(terminal, f"{word}\n".encode())
    seen = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1]), seen.decode().replace("\r\n", "\n")


def test_a_pipe_gets_the_text(hfship: Program, systemd: Dict[str, str], tmp_path: Path) -> None:
    said = hfship("watch", "--install", env=systemd).stdout
    assert "ExecStart=" in said and "@reboot" in said
    assert not (hfship.home / UNIT).exists() and not asked(tmp_path)


def test_yes_installs(hfship: Program, systemd: Dict[str, str], tmp_path: Path) -> None:
    code, said = answer(hfship, systemd, "y")
    assert code == 0 and "[y/N]" in said and f"installed and enabled {hfship.home / UNIT}" in said
    unit = (hfship.home / UNIT).read_text()
    assert unit in said and "watch --resume-all" in unit, "it is shown before anybody is asked"
    assert asked(tmp_path).splitlines() == [
        "systemctl --user show-environment",
        "systemctl --user daemon-reload",
        "systemctl --user enable hfship-resume",
        "loginctl enable-linger root" if os.geteuid() == 0 else asked(tmp_path).splitlines()[-1],
    ]


def test_no_prints(hfship: Program, systemd: Dict[str, str], tmp_path: Path) -> None:
    code, said = answer(hfship, systemd, "n")
    assert code == 0 and "@reboot" in said and not (hfship.home / UNIT).exists()


@pytest.mark.parametrize(
    "refuse, code, words",
    [
        ("show-environment", 9, "systemd runs no units for this user here"),
        ("--user enable", 9, "systemctl --user enable hfship-resume ended with 1"),
        ("enable-linger", 0, "start at the first login, not at boot, until root runs: loginctl"),
        ("", 0, "installed and enabled"),
    ],
)
def test_what_systemd_refuses_is_said(
    refuse: str, code: int, words: str, hfship: Program, systemd: Dict[str, str]
) -> None:
    done = hfship("watch", "--install", "--yes", env={**systemd, "REFUSE": refuse}, code=code)
    assert words in done.stderr + done.stdout
    assert (hfship.home / UNIT).exists() == (refuse != "show-environment")


A_REAL_SYSTEMD = """
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/user/0
export XDG_RUNTIME_DIR=/run/user/0
ip link set lo up
"$SYSTEMD" --user --log-level=warning &
until systemctl --user show-environment > /dev/null 2>&1; do sleep 0.1; done
{ "$@" watch --install --yes && systemctl --user is-enabled hfship-resume
"$@" mirror "$SITE" --port 8123 --install --yes
until curl -sf http://127.0.0.1:8123/health; do sleep 0.2; done
echo; systemctl --user is-active hfship-mirror; systemctl --user stop hfship-mirror
systemctl --user show -p Result hfship-mirror
cp "$SITE"/hfship-repair.* ~/.config/systemd/user/ && systemctl --user daemon-reload
systemctl --user start hfship-repair; systemctl --user show -p Result hfship-repair
systemctl --user --quiet enable --now hfship-repair.timer; systemctl --user is-active hfship-repair.timer
systemctl --user show -p Result hfship-repair.timer
"$@" status --repair --install --yes; echo "without a system: $?"; } 2>&1
exit 0
"""


@pytest.mark.real
def test_a_real_systemd_runs_what_is_installed(pyz: Program, tmp_path: Path) -> None:
    """systemd's manager of a user's units, in a namespace of its own: it needs no init."""
    if os.geteuid() != 0:
        missing("root, for a namespace")
    root = components.require("systemd")
    libraries = f"{root}/usr/lib/x86_64-linux-gnu/systemd:{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"
    (tmp_path / "bin").mkdir()
    for name, path in (("systemctl", "bin/systemctl"), ("systemd", "lib/systemd/systemd")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {root}/{path} "$@"\n')
        program.chmod(0o755)
    site = tmp_path / "site of 50%"
    site.mkdir()
    for name, text in units_of([*pyz.argv, "status", "--repair", "--quiet"]).items():
        (site / name).write_text(text)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    env = pyz.env({"PATH": path, "SITE": str(site), "SYSTEMD": f"{tmp_path}/bin/systemd"})
    argv = ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c"]
    done = subprocess.run(
        [*argv, A_REAL_SYSTEMD, "sh", *pyz.argv],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=100,
        check=False,
    )
    for scope in ("init.scope", "app.slice"):  # control groups that it leaves
        for hierarchy in ("systemd", "unified", "."):
            with contextlib.suppress(OSError):
                os.rmdir(f"/sys/fs/cgroup/{hierarchy}/{scope}")
    said = [
        line for line in without_times(done.stdout).splitlines() if not line.startswith("warning")
    ]
    units = pyz.home / ".config/systemd/user"
    assert [line for line in said if not line.startswith("to remove it")][:9] == [
        f"installed and enabled {units}/hfship-resume.service",
        "enabled",
        f"installed and enabled {units}/hfship-mirror.service",
        f'{{"hfship": "{__version__}"}}',
        "active",
        "Result=success",
        "Result=success",
        "active",
        "Result=success",
    ], done.stdout
    assert "hfship: systemd runs no units of the system here" in said
    assert said[-1] == "without a system: 9"
    assert not Path("/etc/systemd/system/hfship-repair.timer").exists()


def test_no_systemd_prints_and_says_so_on_yes(hfship: Program) -> None:
    env = {"PATH": "/nowhere"}
    assert "@reboot" in hfship("watch", "--install", env=env).stdout
    assert "no units for this user" in hfship("watch", "--install", "-y", env=env, code=9).stderr


def test_a_unit_of_the_system_waits_for_the_network_and_has_a_user() -> None:
    argv = ("/bin/hfship", "mirror", "/data/50% of $x")
    service = Service("hfship-mirror", "Models", argv, stays=True, user="ops")
    unit = service.unit()
    assert "User=ops\n" in unit and "After=network-online.target\n" in unit
    assert "WantedBy=multi-user.target\n" in unit and "Restart=on-failure\n" in unit
    assert "ExecStart=/bin/hfship mirror '/data/50%% of $$x'\n" in unit
    text = install_text(service, Path("/home/ops"))
    assert "/etc/systemd/system/hfship-mirror.service" in text and "--user" not in text
    assert "@reboot /bin/hfship mirror '/data/50\\% of $x'\n" in text
    assert "sleep" not in text and "sleep 60" in install_text(RESUME, Path("/home/ops"))
