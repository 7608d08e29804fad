"""What no host can mend alone: groups of which a member died, and hosts that tell of nothing."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple, cast

import pytest

from hfship.base.errors import Exit, HfshipError, HostError
from hfship.base.processes import Completed
from hfship.base.report import Reporter
from hfship.base.settings import ListedModel, ModelsFile, load_settings
from hfship.base.values import replace
from hfship.commands import repairing_hosts
from hfship.commands.repairing import repaired
from hfship.commands.repairing_hosts import groups_of, repair_hosts, without_docker
from hfship.ops.reach import FarHost
from hfship.serve.deployments import Deployment
from hfship.serve.status import DeploymentStatus
from hfship.serve.terms import Plan
from hfship.serve.watchdog import RESTART, START, Repair, read_repairs, write_repairs
from hfship.site.groups import DOWN, UNKNOWN, UP
from hfship.site.record import SiteRecord, write_record

if TYPE_CHECKING:
    from hfship.commands.context import Context


def row(host: str, state: str, fault: str = "") -> Tuple[str, DeploymentStatus]:
    return host, DeploymentStatus("m", state, "vllm_m", "i", "http://h0", 8000, (), fault=fault)


WELL, DEAD, HANGS = ("healthy", ""), ("down", "down"), ("hung", "hung")
# How its members are, which hosts are silent: the states of the group, and whether it hangs; none: it is left alone.
GROUPS: List[Tuple[List[Tuple[str, str]], List[str], Optional[Tuple[List[str], bool]]]] = [
    ([WELL, WELL], [], ([UP, UP], False)),
    ([HANGS, DEAD], [], ([UP, DOWN], True)),
    ([HANGS, HANGS], [], ([UP, UP], True)),
    ([HANGS], ["h1"], ([UP, UNKNOWN], True)),
    ([HANGS], [], ([UP, DOWN], True)),
    ([("unknown", ""), WELL], [], ([UNKNOWN, UP], False)),
    ([WELL, ("stopped", "")], [], None),
    ([], ["h0", "h1"], None),
]


@pytest.mark.parametrize("members, silent, found", GROUPS)
def test_what_hosts_tell_of_a_group(
    members: List[Tuple[str, str]], silent: List[str], found: Optional[Tuple[List[str], bool]]
) -> None:
    rows = [row(f"h{number}", *one) for number, one in enumerate(members)]
    places = {"m": ("h0", "h1"), "single": ("h0",)}
    groups = [(list(one.states), one.is_hung) for one in groups_of(places, rows, silent)]
    assert groups == ([found] if found else [])


def test_a_host_that_tells_of_nothing_has_no_docker() -> None:
    rows = [row("h0", "unknown"), row("h0", "unknown"), row("h1", "unknown"), row("h1", "healthy")]
    assert without_docker(rows) == ["h0"]


def test_a_member_is_not_repaired_alone(tmp_path: Path) -> None:
    plan = Plan(name="m", nodes=("10.0.0.1", "10.0.0.2"), node_rank=1)
    deployment = Deployment(tmp_path, plan, "sk-1")
    _, status = row("h1", "down", "down")
    told = repaired(cast("Context", None), deployment, status)
    assert told.state == "down" and not told.repair and "starts again as one" in told.note


def told_of(name: str, host: str, state: str, fault: str = "") -> Tuple[str, DeploymentStatus]:
    """What a host tells of a deployment."""
    return host, replace(row(host, state, fault)[1], name=name)


def test_every_group_is_found_by_its_own_rows() -> None:
    """Behind a model of one host, rows of others, and members that nobody tells of."""
    places = {"single": ("h0",), "m": ("h0", "h1", "h2"), "n": ("h1", "h2")}
    rows = [
        told_of("n", "h1", "healthy"),
        told_of("single", "h0", "down", "down"),
        told_of("m", "h1", "healthy"),
        told_of("m", "h2", "hung", "hung"),
        told_of("n", "h2", "down", "down"),
    ]
    first, second = groups_of(places, rows, [])
    assert (first.name, first.hosts, first.states) == ("m", ("h0", "h1", "h2"), [DOWN, UP, UP])
    assert first.is_hung and first.worst == rows[3][1]
    assert (second.name, second.states, second.is_hung) == ("n", [UP, DOWN], False)
    assert second.worst == rows[4][1]


# -- what is done about it, on hosts that note what they are told

PLACES = {"m": ("h0", "h1"), "s": ("h1",), "t": ("h2",)}


class Hosts:
    """The hosts h0 to h2 of a site: what the gateway says, what they were told, what was served."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.err = folder, io.StringIO()
        self.states: Any = {"m": "UP", "s": "UP", "t": "UP"}
        self.refuses = ""
        self.told: List[Tuple[str, str]] = []
        self.served: List[List[str]] = []
        self.code = Exit.OK
        monkeypatch.setattr(FarHost, "sh", lambda host, script: self.sh(host.name, script))
        monkeypatch.setattr(repairing_hosts, "server_states", self.server_states)
        monkeypatch.setattr(repairing_hosts, "serve_again", self.serve)
        write_record(folder, SiteRecord(places=PLACES))

    def sh(self, host: str, script: str) -> Completed:
        self.told.append((host, script))
        if host == self.refuses:
            return Completed(1, "", "no docker here")
        return Completed(0, "", "")

    def server_states(self, folder: Path) -> List[Any]:
        assert folder.parent == self.folder
        if isinstance(self.states, HfshipError):
            raise self.states
        return [SimpleNamespace(name=name, state=state) for name, state in self.states.items()]

    def serve(self, context: Any, gone: Sequence[str]) -> Exit:
        self.served.append(list(gone))
        return self.code

    def repair(self, rows: Any, silent: Sequence[str] = (), on: Sequence[str] = ()) -> Exit:
        hosts = [{"name": f"h{number}", "data": "/data"} for number in range(3)]
        file = ModelsFile(Path("/m.toml"), {}, (), ListedModel(""), tables={"host": hosts})
        settings = load_settings({"HFSHIP_DEPLOY_DIR": str(self.folder), "HOME": "/"})
        reporter = Reporter("none", 0, io.StringIO(), self.err)
        context: Any = SimpleNamespace(
            args=SimpleNamespace(on=on, grace=200), settings=settings, reporter=reporter, file=file
        )
        return repair_hosts(context, rows, silent)

    @property
    def stopped(self) -> List[str]:
        """The hosts on which the member of m was stopped."""
        for _, script in self.told:
            assert script == "timeout 50 docker stop -t 30 vllm_m"
        return [host for host, _ in self.told]

    @property
    def noted(self) -> Path:
        """Where the repairs of the group are."""
        return self.folder / "_site/groups/m"

    def said(self) -> str:
        return self.err.getvalue()


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    return Hosts(tmp_path, monkeypatch)


SINGLES = [told_of("s", "h1", "healthy"), told_of("t", "h2", "healthy")]
UP0, UP1 = told_of("m", "h0", "healthy"), told_of("m", "h1", "healthy")
DEAD1, HUNG0 = told_of("m", "h1", "down", "down"), told_of("m", "h0", "hung", "hung")
MUTE1 = [told_of("m", "h1", "unknown"), told_of("s", "h1", "unknown")]
NOW_DOWN = {"m": "DOWN", "s": "DOWN", "t": "UP"}
# Rows, hosts that are silent, what the gateway says (None: all is up): on which hosts the member of m
# is stopped, which hosts are given up (None: nothing is served again), and what is noted.
REPAIRS: List[Tuple[Any, Sequence[str], Any, List[str], Optional[List[str]], str]] = [
    ([UP0, UP1, *SINGLES], [], None, [], None, ""),
    ([UP0, DEAD1, *SINGLES], [], None, ["h0"], [], START),
    ([HUNG0, UP1, *SINGLES], [], None, ["h0", "h1"], [], RESTART),
    ([HUNG0, DEAD1, *SINGLES], [], None, ["h0"], [], RESTART),
    ([UP0, *SINGLES], [], None, ["h0"], [], ""),
    ([UP0, told_of("m", "h1", "stopped"), *SINGLES], [], None, [], None, ""),
    # A host is silent: it is given up where nothing of it answers at the gateway.
    ([UP0, SINGLES[1]], ["h1"], None, [], None, ""),
    ([UP0, SINGLES[1]], ["h1"], NOW_DOWN, ["h0"], ["h1"], ""),
    ([UP0, SINGLES[1]], ["h1"], {"s": "UP"}, [], None, ""),
    ([UP0, SINGLES[1], *MUTE1], [], NOW_DOWN, ["h0"], ["h1"], ""),
    ([SINGLES[1]], ["h0", "h1"], NOW_DOWN, [], ["h0", "h1"], ""),
    ([UP0, UP1, SINGLES[0]], ["h2"], {"m": "UP", "s": "UP", "t": "DOWN"}, [], ["h2"], ""),
    ([UP0, DEAD1, SINGLES[0]], ["h2"], {"m": "DOWN", "s": "UP"}, ["h0"], ["h2"], START),
]  # fmt: skip


@pytest.mark.parametrize("rows, silent, states, stopped, gone, noted", REPAIRS)
def test_what_is_done_for_the_hosts(
    rows: Any,
    silent: Sequence[str],
    states: Any,
    stopped: List[str],
    gone: Optional[List[str]],
    noted: str,
    hosts: Hosts,
) -> None:
    hosts.states = states or hosts.states
    assert hosts.repair(rows, silent) == Exit.OK
    assert hosts.stopped == stopped
    assert hosts.served == ([] if gone is None else [gone])
    assert [one.action for one in read_repairs(hosts.noted)] == ([noted] if noted else [])
    starts_m = bool(stopped)
    assert ("m starts again as one on h0, h1" in hosts.said()) == starts_m
    assert (f"placing again what ran on {', '.join(gone or ())}" in hosts.said()) == bool(gone)


def test_a_gateway_that_cannot_be_asked_gives_no_host_up(hosts: Hosts) -> None:
    hosts.states = HostError("the gateway does not run")
    assert hosts.repair([UP0, SINGLES[1]], ["h1"]) == Exit.HOST
    assert not hosts.served and not hosts.told
    assert "the gateway does not run: nobody can tell whether h1 serves" in hosts.said()
    # but a group whose hosts all tell is mended
    hosts.code = Exit.INCOMPLETE
    assert hosts.repair([UP0, DEAD1, SINGLES[0]], ["h2"]) == Exit.HOST
    assert hosts.served == [[]] and hosts.stopped == ["h0"]


def test_the_worst_is_the_exit_code(hosts: Hosts) -> None:
    hosts.code = Exit.NETWORK
    assert hosts.repair([UP0, DEAD1, *SINGLES]) == Exit.NETWORK


def test_the_gateway_is_not_asked_where_all_hosts_tell(hosts: Hosts) -> None:
    hosts.states = HostError("the gateway does not run")
    assert hosts.repair([UP0, UP1, *SINGLES]) == Exit.OK and not hosts.said()


@pytest.mark.parametrize(
    "on, stopped", [((), ["h0"]), (("h0,h1",), ["h0"]), (("h0",), []), (("h1", "h2"), [])]
)
def test_a_group_is_mended_where_all_of_it_is_asked_of(
    on: Sequence[str], stopped: List[str], hosts: Hosts
) -> None:
    assert hosts.repair([UP0, DEAD1], on=on) == Exit.OK
    assert hosts.stopped == stopped and len(hosts.served) == len(stopped)


# Seconds since the repairs before, the member that is wrong, and since when it runs: what is said
# where nothing is done.
WAITS: List[Tuple[List[int], str, Optional[int], str]] = [
    ([], "hung", 199, "m is hung, and was started 199 s ago: left alone for 200 s"),
    ([], "hung", 201, ""),
    ([30], "down", None, "m is down, and was repaired a while ago: the next attempt in"),
    ([90], "down", None, ""),
    ([600, 500, 400, 300, 9000], "down", None, "m is down, and was repaired 5 times within"),
]


@pytest.mark.parametrize("before, fault, uptime, said", WAITS)
def test_a_group_that_dies_again_and_again_is_left_alone(
    before: List[int], fault: str, uptime: Optional[int], said: str, hosts: Hosts
) -> None:
    now = time.time()
    hosts.noted.mkdir(parents=True)
    write_repairs(
        hosts.noted, [Repair(now - ago, START, "down: x") for ago in sorted(before)[::-1]]
    )
    name, status = told_of("m", "h1", fault, fault)
    assert hosts.repair([UP0, (name, replace(status, uptime=uptime)), *SINGLES]) == Exit.OK
    assert said in hosts.said() and bool(said) == (not hosts.told) == (not hosts.served)
    assert len(read_repairs(hosts.noted)) == len(before) + (not said)


def test_the_record_of_a_group_says_what_its_host_said(hosts: Hosts) -> None:
    note = f"Exited (137); {repairing_hosts.GROUP_NOTE}"
    dead = ("h1", replace(DEAD1[1], note=note))
    hosts.repair([UP0, dead, *SINGLES])
    [noted] = read_repairs(hosts.noted)
    assert noted.why == "down: Exited (137)" and abs(noted.at - time.time()) < 60
    assert (hosts.noted.stat().st_mode & 0o007) == 0


def test_a_member_that_does_not_stop_is_told_and_the_group_starts(hosts: Hosts) -> None:
    hosts.refuses = "h0"
    assert hosts.repair([UP0, DEAD1, *SINGLES]) == Exit.OK
    assert "no docker here" in hosts.said() and hosts.served == [[]]
