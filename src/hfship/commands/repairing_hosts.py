# SPDX-License-Identifier: Apache-2.0
"""`hfship status --hosts --repair`: what no host can mend alone.

Each host mends its own deployments (commands/repairing.py). Here is the rest: what ran on a host
that is gone, or whose docker is, is placed on others; a group over several hosts of which a member
died starts again as one (site/groups.py).

Owns DEPLOY_DIR/_site/groups/NAME/repairs.log, the record of a group as serve/watchdog.py has that
of a deployment. Promises: what a gateway still has answers from is left as it is, and what was
stopped on purpose, too; a group that dies again and again is left alone as a deployment is.
"""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Dict, FrozenSet, Iterator, List, Mapping, Optional, Sequence

from hfship.base.errors import Exit, HfshipError
from hfship.base.values import dataclass, replace
from hfship.commands.drain import required_file, serve_again
from hfship.commands.hosts import hosts_called
from hfship.commands.repairing import GROUP_NOTE
from hfship.ops.reach import FarHost
from hfship.serve.deployments import make_own_folder
from hfship.serve.files import container_name
from hfship.serve.status import DOWN as IS_DOWN
from hfship.serve.watchdog import Policy, Repair, decide, read_repairs, write_repairs
from hfship.site.admin import server_states
from hfship.site.groups import DOWN, STOP, UNKNOWN, group_steps, member_state
from hfship.site.record import SITE_FOLDER, read_record
from hfship.site.store import gateway_folder

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.commands.hosts import HostRows
    from hfship.serve.status import DeploymentStatus

GROUPS_FOLDER = f"{SITE_FOLDER}/groups"
STOP_S, STOP_LIMIT = "30", "50"  # seconds: until docker kills a member, until docker is left


@dataclass(frozen=True)
class Group:
    """A copy over several hosts: how each member is, and the status of the one that is worst."""

    name: str
    hosts: Sequence[str]
    states: Sequence[str]
    worst: Optional[DeploymentStatus] = None

    @property
    def is_hung(self) -> bool:
        """Whether it no longer answers, though all of it is up."""
        if self.worst is None:
            return False
        return self.worst.fault != IS_DOWN


def groups_of(
    places: Mapping[str, Sequence[str]], rows: HostRows, silent: Sequence[str]
) -> Iterator[Group]:
    """The groups among deployments, but for those that were stopped on purpose, or removed."""
    for name, hosts in places.items():
        if len(hosts) < 2:
            continue
        found = _told_of(name, rows)
        if found:
            yield _group_of(name, hosts, found, silent)


def _told_of(name: str, rows: HostRows) -> Dict[str, DeploymentStatus]:
    """What the hosts tell of a deployment; nothing of one that was stopped."""
    found = {}
    for host, status in rows:
        if status.name != name:
            continue
        if status.state == "stopped":
            return {}
        found[host] = status
    return found


def _group_of(
    name: str,
    hosts: Sequence[str],
    found: Mapping[str, DeploymentStatus],
    silent: Sequence[str],
) -> Group:
    states = []
    worst = None
    for host in hosts:
        status = found.get(host)
        state = _state_of(host, status, silent)
        states.append(state)
        if worst is not None or status is None:
            continue
        if status.fault:
            worst = status
    return Group(name, hosts, states, worst)


def _state_of(host: str, status: Optional[DeploymentStatus], silent: Sequence[str]) -> str:
    if host in silent:
        return UNKNOWN
    if status is None:
        return DOWN
    return member_state(status.state)


def without_docker(rows: HostRows) -> List[str]:
    """The hosts that can tell of none of their deployments."""
    mute = []
    telling = set()
    for host, status in rows:
        if status.state != "unknown":
            telling.add(host)
        elif host not in mute:
            mute.append(host)
    return [host for host in mute if host not in telling]


def repair_hosts(context: Context, rows: HostRows, silent: Sequence[str]) -> Exit:
    """Place what ran on hosts that are gone on others, if it does not answer at the gateway either;
    start groups again of which a member died."""
    record = read_record(context.settings.deploy_dir)
    places = record.places
    mute = [*silent, *without_docker(rows)]
    lost: List[str] = []
    code = Exit.OK
    if mute:
        answering = _answering(context, mute)
        if answering is None:
            code = Exit.HOST
        else:
            lost = lost_hosts(places, mute, answering)

    asked = {one.name for one in hosts_called(required_file(context), context.args.on)}
    whole = {}
    for name, hosts in places.items():
        if asked.issuperset(hosts):
            whole[name] = hosts
    again = False
    for group in groups_of(whole, rows, mute):
        if _restarts(context, group, lost):
            again = True
    if lost:
        gone = ", ".join(lost)
        context.reporter.info(f"placing again what ran on {gone}")
        again = True
    if again:
        served = serve_again(context, lost)
        code = max(code, served)
    return code


def lost_hosts(
    places: Mapping[str, Sequence[str]], mute: Sequence[str], answering: FrozenSet[str]
) -> List[str]:
    """The hosts of which nothing answers at the gateway any more.

    >>> places = {"m": ["gpu1"], "m.2": ["gpu2"]}
    >>> lost_hosts(places, ["gpu1", "gpu2", "gpu3"], frozenset(["m.2"]))
    ['gpu1']
    """
    lost = []
    for host in mute:
        there = set()
        for name, hosts in places.items():
            if host in hosts:
                there.add(name)
        if there and not answering & there:
            lost.append(host)
    return lost


def _answering(context: Context, mute: Sequence[str]) -> Optional[FrozenSet[str]]:
    """The deployments that the gateway has answers from; None where it cannot be asked."""
    gateway = gateway_folder(context.settings.deploy_dir)
    try:
        states = server_states(gateway)
    except HfshipError as exc:
        hosts = ", ".join(mute)
        context.reporter.warn(f"{exc.what}: nobody can tell whether {hosts} serves")
        return None
    names = []
    for one in states:
        if one.state == "UP":
            names.append(one.name)
    return frozenset(names)


def _restarts(context: Context, group: Group, lost: Sequence[str]) -> bool:
    """Stop what is left of a group that has to start again; whether it is to."""
    steps = group_steps(group.states, group.is_hung)
    if not steps:
        return False
    gone = set(lost).intersection(group.hosts)
    if UNKNOWN in group.states and not gone:
        return False
    if not _may_repair(context, group):
        return False
    hosts = ", ".join(group.hosts)
    context.reporter.warn(f"{group.name} starts again as one on {hosts}")
    for verb, rank in steps:
        if verb == STOP:
            _stop_member(context, group.hosts[rank], group.name)
    return True


def _may_repair(context: Context, group: Group) -> bool:
    """Whether a group may be repaired now; noted where it may."""
    worst = group.worst
    if worst is None:  # a host is gone, or its folder: there is nothing that could be counted
        return True
    folder = context.settings.deploy_dir / GROUPS_FOLDER / group.name
    repairs = read_repairs(folder)
    now = time.time()
    policy = Policy(grace_s=context.args.grace)
    note = worst.note.replace(f"; {GROUP_NOTE}", "")  # the host's own word for who is to do it
    decision = decide(replace(worst, note=note), repairs, now, policy)
    if decision.action:
        make_own_folder(folder)
        done = Repair(now, decision.action, decision.why)
        write_repairs(folder, [*repairs, done])
        return True
    if decision.why:
        context.reporter.warn(f"{group.name} is {worst.state}, and was {decision.why}")
    return False


def _stop_member(context: Context, name: str, deployment: str) -> None:
    """Stop a member without a mark that it was on purpose: whoever comes after us starts it."""
    file = required_file(context)
    [host] = hosts_called(file, [name])
    far = FarHost(host)
    container = container_name(deployment)
    words = ["timeout", STOP_LIMIT, "docker", "stop", "-t", STOP_S, container]
    command = shlex.join(words)
    try:
        done = far.sh(command)
        if done.code:
            raise far.at(host.data).error(done)
    except HfshipError as exc:
        context.reporter.error(exc)
