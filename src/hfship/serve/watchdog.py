# SPDX-License-Identifier: Apache-2.0
"""Keeping deployments up: what `status --repair` does about one that is dead or proven hung.

Docker restarts what ends; it does not restart what hangs, nor what lost its GPU. A watchdog that
goes by /health alone restarts engines that work (gonka#1421: eight times a day); this one goes by
what serve/status proved.

A repair is refused within `grace_s` of a start, until `back_off_s` doubled with each repair has
passed since the last, and after `most` repairs in `window_s`: then somebody must look.

Owns DEPLOY_DIR/NAME/repairs.log (docs/formats.md, "Deployment"): a line `TIME ACTION WHY` for each
repair, the newest last, which are both the record for people and what the next run goes by.
Promises: what was stopped on purpose, loads, or works is left alone. Why is written down before
anything is done.
"""

from __future__ import annotations

import calendar
import contextlib
import time
from typing import TYPE_CHECKING, List, Optional, Sequence

from hfship.base.files import write_below
from hfship.base.text import counted, human_seconds, utc
from hfship.base.values import dataclass
from hfship.serve.deployments import read_own
from hfship.serve.docker import COMPOSE_TIMEOUT_S, compose, docker
from hfship.serve.files import container_name
from hfship.serve.start import start
from hfship.serve.status import DEAD, DOWN, HUNG, LATE, LOST_GPU
from hfship.serve.stop import keep_log

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.base.report import Reporter
    from hfship.serve.deployments import Deployment
    from hfship.serve.status import DeploymentStatus

REPAIRS_FILE = "repairs.log"
KEPT_REPAIRS = 200
# A process that stands still does not hear that it should end, and has nothing left to do.
KILL_AFTER_S, KILL_HUNG_AFTER_S = 10, 1
_TIME = "%Y-%m-%dT%H:%M:%SZ"  # as base/text.py's utc() writes it

START, RESTART, RECREATE = "start", "restart", "recreate"
# What is wrong (DeploymentStatus.fault) -> what mends it.
_CURES = {DOWN: START, DEAD: RESTART, HUNG: RESTART, LATE: RESTART, LOST_GPU: RECREATE}


@dataclass(frozen=True)
class Policy:
    """How patient the watchdog is; all in seconds but `most`, repairs in the window."""

    grace_s: float = 120.0
    back_off_s: float = 60.0
    most: int = 5
    window_s: float = 86_400.0


@dataclass(frozen=True)
class Repair:
    """One repair: when (seconds since the epoch), what was done, and why."""

    at: float
    action: str
    why: str

    def line(self) -> str:
        """The repair as a line of the log."""
        moment = utc(self.at)
        why = " ".join(self.why.split())
        return f"{moment} {self.action} {why}\n"


@dataclass(frozen=True)
class Decision:
    """What to do about a deployment: an action, or "" and why nothing is done ("": no need).

    `given_up`: nothing more will be done until somebody has looked.
    """

    action: str = ""
    why: str = ""
    given_up: bool = False


def parse_repairs(text: str) -> List[Repair]:
    r"""The repairs in a log; lines that are none are passed over.

    >>> parse_repairs("1970-01-01T00:00:09Z restart hung: no answer\nnonsense\n")
    [Repair(at=9, action='restart', why='hung: no answer')]
    """
    found = []
    for line in text.splitlines():
        moment, _, rest = line.partition(" ")
        action, _, why = rest.partition(" ")
        with contextlib.suppress(ValueError):
            at = calendar.timegm(time.strptime(moment, _TIME))
            found.append(Repair(at, action, why))
    return found


def decide(
    status: DeploymentStatus, repairs: Sequence[Repair], now: float, policy: Policy
) -> Decision:
    """What to do about a deployment, from what is wrong with it and what was done before."""
    action = _CURES.get(status.fault)
    if action is None:
        return Decision()

    recent = [repair for repair in repairs if now - policy.window_s < repair.at <= now]
    if len(recent) >= policy.most:
        window = human_seconds(policy.window_s)
        why = f"repaired {len(recent)} times within {window}: somebody must look at it"
        return Decision("", why, given_up=True)

    age_s = status.uptime
    if status.fault in (HUNG, DEAD, LOST_GPU) and age_s is not None and age_s < policy.grace_s:
        return Decision("", f"started {age_s} s ago: left alone for {policy.grace_s:.0f} s")

    wait_s = wait_before(recent, policy)
    if recent and now < recent[-1].at + wait_s:
        left = human_seconds(recent[-1].at + wait_s - now)
        return Decision("", f"repaired a while ago: the next attempt in {left}")

    return Decision(action, f"{status.state}: {status.note}")


def wait_before(recent: Sequence[Repair], policy: Policy) -> float:
    """Seconds from the last repair to the next, doubled with each.

    >>> [wait_before([Repair(0, RESTART, "")] * count, Policy()) for count in (1, 2, 3)]
    [60.0, 120.0, 240.0]
    """
    doublings = max(len(recent) - 1, 0)
    return policy.back_off_s * 2.0**doublings


def read_repairs(folder: Path) -> List[Repair]:
    """What was repaired in a deployment so far. Raises HostError."""
    content = read_own(folder, REPAIRS_FILE, of_others=True) or b""
    text = content.decode("utf-8", "replace")
    return parse_repairs(text)


def write_repairs(folder: Path, repairs: Sequence[Repair]) -> None:
    """Keep the record of repairs, its last lines. Raises DiskError."""
    lines = [repair.line() for repair in repairs[-KEPT_REPAIRS:]]
    text = "".join(lines)
    write_below(folder.parent, f"{folder.name}/{REPAIRS_FILE}", text, 0o644)


def repair(
    deployment: Deployment, status: DeploymentStatus, policy: Policy, reporter: Reporter
) -> Decision:
    """Do what is to be done about a deployment, and write down why. Raises HostError, DiskError."""
    folder, name = deployment.folder, deployment.plan.name
    now = time.time()
    repairs = read_repairs(folder)
    decision = decide(status, repairs, now, policy)
    if decision.given_up:
        reporter.warn(f"{name} is {status.state} and was {decision.why}")
    elif not decision.action and decision.why:
        reporter.info(f"{name} is {status.state}, and was {decision.why}")
    if not decision.action:
        return decision

    done = Repair(now, decision.action, decision.why)
    write_repairs(folder, [*repairs, done])
    reporter.warn(f"{name}: {decision.action}, since it is {decision.why}")
    with reporter.clock(f"{name}: {decision.action}", COMPOSE_TIMEOUT_S):
        _act(deployment, decision.action, status.fault)
    return decision


def _act(deployment: Deployment, action: str, fault: str) -> None:
    name = deployment.plan.name
    doing = f"{action} {name}"
    if action == START:
        start(deployment)
        return
    if action == RECREATE:
        keep_log(deployment)
        again = compose(deployment, "up", "-d", "--force-recreate")
        docker(again, doing, COMPOSE_TIMEOUT_S, name)
        return
    patience_s = KILL_AFTER_S
    if fault == HUNG:
        patience_s = KILL_HUNG_AFTER_S
    again = ["restart", "-t", str(patience_s), container_name(name)]
    docker(again, doing, COMPOSE_TIMEOUT_S, name)


def repairs_note(repairs: Sequence[Repair], now: float, policy: Optional[Policy] = None) -> str:
    """What was repaired lately, for people; "" where nothing was."""
    window_s = (policy or Policy()).window_s
    recent = [repair for repair in repairs if now - window_s < repair.at]
    if not recent:
        return ""
    last = recent[-1]
    moment = utc(last.at)
    return f"{counted(len(recent), 'repair')} in a day, last {moment} ({last.action}, {last.why})"
