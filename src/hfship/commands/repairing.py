# SPDX-License-Identifier: Apache-2.0
"""`hfship status --repair`, and what calls it each minute: a systemd timer, or a line for cron."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List

from hfship.base.errors import Exit, HfshipError, HostError, UsageError, command_line
from hfship.base.files import atomic_write, disk_errors
from hfship.base.locks import lock_within
from hfship.base.pyz import own_file
from hfship.base.settings import home_path
from hfship.base.values import replace
from hfship.ops.service import enable_unit, systemd_answers
from hfship.site.rolling import bring_back, end_requests, send_elsewhere
from hfship.site.store import gateway_folder, read_gateway

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.serve.deployments import Deployment
    from hfship.serve.status import DeploymentStatus

PATIENCE_S = 20.0  # for another hfship that is at work on the deployments
UNIT = "hfship-repair"
GROUP_NOTE = "its group starts again as one, from the control host: status --hosts --repair"
SYSTEM_UNITS = Path("/etc/systemd/system")


def repaired(
    context: Context, deployment: Deployment, status: DeploymentStatus
) -> DeploymentStatus:
    """The status of a deployment after what could be done about it: its note says what was.

    What cannot be repaired is reported, and blocks no other.
    """
    from hfship.serve.status import HUNG

    if deployment.owner:
        return status
    if deployment.plan.network:
        tell_gateway(context, deployment, status)
    if not status.fault:
        return status
    if deployment.plan.nodes:  # what is left of a group hangs: none starts alone
        note = "; ".join(filter(None, [status.note, GROUP_NOTE]))
        return replace(status, note=note)
    with contextlib.ExitStack() as stack:
        if deployment.plan.network and status.fault == HUNG:
            # Last: an engine that is ended breaks off what waits for it, and clients are told so.
            folder = gateway_folder(context.settings.deploy_dir)
            stack.callback(end_requests, folder, deployment.plan.name)
        return _repaired(context, deployment, status)


def _repaired(
    context: Context, deployment: Deployment, status: DeploymentStatus
) -> DeploymentStatus:
    from hfship.serve.status import DOWN, deployment_status
    from hfship.serve.watchdog import Policy, repair

    try:
        # `serve` or another watchdog may be making a container anew: then it is judged again.
        with lock_within(context.settings.deploy_dir, PATIENCE_S) as has_waited:
            if has_waited or status.fault == DOWN:
                status = deployment_status(deployment, context.args.hang_after)
            policy = Policy(grace_s=context.args.grace)
            decision = repair(deployment, status, policy, context.reporter)
    except HfshipError as exc:
        context.reporter.error(exc)
        return replace(status, note=f"{status.note}; not repaired: {exc.what}")

    if not decision.action:
        return status
    if deployment.plan.network:
        bring_back(gateway_folder(context.settings.deploy_dir), deployment.plan.name)
    return replace(
        status,
        state="loading",
        repair=decision.action,
        note=f"{decision.action}: it was {decision.why}",
    )


def tell_gateway(context: Context, deployment: Deployment, status: DeploymentStatus) -> None:
    """Have the gateway leave a replica that is proven to hang, and take back one that works again.

    One that is dead it leaves by itself. What cannot be told is reported.
    """
    from hfship.serve.status import HUNG, LATE, LOST_GPU

    name = deployment.plan.name
    folder = gateway_folder(context.settings.deploy_dir)
    try:
        if status.fault in (HUNG, LATE, LOST_GPU):
            if send_elsewhere(folder, name):
                context.reporter.warn(f"{name}: the gateway sends its clients elsewhere")
        elif not status.fault:
            bring_back(folder, name)
    except HfshipError as exc:
        context.reporter.error(exc)


def units_of(
    argv: List[str], stays: bool = False, target: str = "multi-user.target"
) -> Dict[str, str]:
    """The text of the timer and of what it starts, by file name; of what `stays` there is no timer,
    and `target` starts it.

    systemd.timer(5): the next run begins a minute after the last one ended.
    """
    command = command_line(*argv).replace("%", "%%").replace("$", "$$")
    service = [
        "[Unit]",
        "Description=Restart hfship deployments that are dead or hang",
        "[Service]",
        f"ExecStart={command}",
    ]
    if stays:
        service += ["Restart=always", "RestartSec=5", "[Install]", f"WantedBy={target}"]
        return {f"{UNIT}.service": _unit_text(service)}

    # The exit code says how deployments are, not that the watchdog failed.
    service += ["Type=oneshot", "SuccessExitStatus=3 9"]
    timer = [
        "[Unit]",
        "Description=Look after hfship deployments each minute",
        "[Timer]",
        "OnBootSec=2min",
        "OnUnitInactiveSec=1min",
        "[Install]",
        "WantedBy=timers.target",
    ]
    return {f"{UNIT}.service": _unit_text(service), f"{UNIT}.timer": _unit_text(timer)}


def _unit_text(lines: List[str]) -> str:
    return "\n".join(lines) + "\n"


def install_repair(context: Context) -> Exit:
    """Print the unit and the line for cron, or install the unit where --yes says so: a timer, or
    where a gateway can send clients elsewhere a service that looks each second.

    Raises UsageError, DiskError, HostError.
    """
    args, reporter = context.args, context.reporter
    if not args.repair:
        what = "--install needs --repair"
        raise UsageError(what, "", "hfship status --repair --install")

    stays = read_gateway(gateway_folder(context.settings.deploy_dir)) is not None
    words = ["--every", "1"] if stays else ["--quiet"]
    argv = [sys.executable, str(own_file()), "status", "--repair", *words, *args.names]
    environment = f"HFSHIP_DEPLOY_DIR={context.settings.deploy_dir}"
    argv = ["/usr/bin/env", environment, *argv]
    folder, scope = SYSTEM_UNITS, []
    if os.geteuid():
        folder, scope = home_path("~/.config/systemd/user"), ["--user"]
    target = "default.target" if scope else "multi-user.target"  # users have no other
    units = units_of(argv, stays, target)
    *_, enabled = units
    if not args.yes:
        reporter.show(install_text(units, folder, scope, argv))
        return Exit.OK
    if not systemd_answers(scope):
        whose = "for this user" if scope else "of the system"
        step = "hfship status --repair --install     # prints the units and a line for cron"
        raise HostError(f"systemd runs no units {whose} here", "systemctl does not answer", step)

    for name, text in units.items():
        path = folder / name
        with disk_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, text)
    enable_unit(enabled, folder / enabled, True, scope)
    reporter.result(f"installed and enabled {folder / enabled}")
    return Exit.OK


def install_text(units: Dict[str, str], folder: Path, scope: List[str], argv: List[str]) -> str:
    """How to install the units by hand, and a line for cron."""
    *_, enabled = units
    enable = command_line("systemctl", *scope, "enable", "--now", enabled)
    lines = ["# With systemd: save this, then run", f"#   {enable}"]
    for name, text in units.items():
        lines += [f"# {folder / name}", text]
    command = command_line(*argv).replace("%", "\\%")
    when = "@reboot"
    if enabled.endswith(".timer"):
        when = "* * * * *"
    lines += ["# Without systemd: add this line with crontab -e", f"{when} {command}"]
    return "\n".join(lines) + "\n"
