# SPDX-License-Identifier: Apache-2.0
"""The watchdog that goes on: what it does when, with a played clock; test_silence.py has its suspicion."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest

from hfship.base.errors import HfshipError, HostError, UsageError
from hfship.base.locks import FolderLock
from hfship.base.values import replace
from hfship.commands import guard
from hfship.serve.deployments import Deployment
from hfship.serve.messages import Answer
from hfship.serve.terms import Plan
from hfship.site.admin import ServerState
from hfship.site.silence import Look
from hfship.site.terms import Gateway, GatewayModel, Replica

REPLICAS = (Replica("m", "a:1"), Replica("m.2", "b:1"), Replica("far", "c:1"))
GATEWAY = Gateway((GatewayModel("m", ("m",), REPLICAS),), (3, 4))


class PlayedThread:
    """Runs when it is started, or goes on for ever."""

    goes_on: List[str] = []

    def __init__(self, target: Callable[[str], None], args: Tuple[str], daemon: bool) -> None:
        assert daemon, "nobody waits for its end"
        self._work = lambda: target(*args)
        self._name = target.__name__

    def start(self) -> None:
        if self._name not in self.goes_on:
            self._work()

    def is_alive(self) -> bool:
        return self._name in self.goes_on


class Site:
    """Deployments m and m.2 behind a gateway, and what was done and said about them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.did: List[str] = []
        self.said: List[str] = []
        self.now = 0.0
        self.gateway: Optional[Gateway] = GATEWAY
        self.looks: Dict[str, Look] = {}
        self.up = ["m", "m.2"]
        self.silent = True
        self.taken = True
        self.error: Optional[HfshipError] = None
        self.names: List[str] = []
        self.file: Any = None
        self.untold: Dict[str, Any] = {}
        self.not_told: Dict[str, Any] = {}

    def deployments(self, *_: Any) -> Any:
        self.did.append("read")
        if self.error:
            raise self.error
        names = ("m", "m.2")
        return [Deployment(self.folder / name, Plan(name=name), "sk") for name in names], {}

    def read_looks(self, folder: Path, plans: Any, timeout_s: float) -> Any:
        assert (folder.name, timeout_s) == ("_gateway", guard.LOOK_TIMEOUT_S)
        assert [plan.bind for plan in plans.values()] == ["reached"] * len(plans)
        self.did.append(f"look at {' '.join(plans)}")
        states = [ServerState("be_m", name, "UP", False, 1, 1) for name in self.up]
        return self.looks, states

    def take_out(self, folder: Path, name: str) -> bool:
        self.did.append(f"take out {name}")
        if self.error:
            raise self.error
        return self.taken

    def status(self, deployment: Deployment, hang_after: float) -> Any:
        if self.error:
            raise self.error
        return f"{deployment.plan.name} {hang_after:g}"

    def context(self) -> Any:
        return SimpleNamespace(
            args=SimpleNamespace(names=self.names, hang_after=60, repair=True, every=2.0),
            settings=SimpleNamespace(deploy_dir=self.folder),
            reporter=SimpleNamespace(
                info=self.said.append,
                warn=lambda text: self.said.append(f"warning: {text}"),
                error=lambda error: self.said.append(f"error: {error.what}"),
            ),
            file=self.file,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    monkeypatch.setattr(PlayedThread, "goes_on", [])
    patched: Dict[str, Any] = {
        "time": SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep),
        "threading": SimpleNamespace(Thread=PlayedThread),
        "list_deployments": made.deployments,
        "direct": lambda plan: replace(plan, bind="reached"),
        "read_gateway": lambda folder: made.gateway if folder.name == "_gateway" else None,
        "read_looks": made.read_looks,
        "_is_silent": lambda deployment: made.silent and deployment.plan.bind == "reached",
        "take_out": made.take_out,
        "deployment_status": made.status,
        "repaired": lambda _, one, status: made.did.append(f"repair {one.plan.name} by {status}"),
        "keep_usage": lambda folder: made.did.append(f"count {folder.name}"),
        "read_untold": lambda folder: made.untold if folder == made.folder else {},
    }
    for name, fake in patched.items():
        monkeypatch.setattr(guard, name, fake)
    return made


def looked(site: Site, watchdog: guard.Guard, *moments: float) -> List[List[str]]:
    """What was done at each look."""
    done = []
    for moment in moments:
        site.did.clear()
        site.now = moment
        watchdog.look(moment)
        done.append(list(site.did))
    return done


PROVE = ["repair m by m 60", "repair m.2 by m.2 60"]
LOOK = "look at m m.2"


def test_what_is_done_how_often(site: Site) -> None:
    """Deployments are read each 10 s, each is proven once a minute, what keys did is kept each hour."""
    watchdog = guard.Guard(site.context())
    moments = (100.0, 101.0, 109.9, 110.0, 119.0, 120.0, 159.9, 160.0, 219.9, 220.0)
    assert looked(site, watchdog, *moments) == [
        ["read", LOOK, *PROVE],
        [LOOK],
        [LOOK],
        ["read", LOOK],
        [LOOK],
        ["read", LOOK],
        ["read", LOOK],
        [LOOK, *PROVE],
        ["read", LOOK],
        [LOOK, *PROVE],
    ]
    assert looked(site, watchdog, 3599.0, 3600.0, 3601.0, 7200.0) == [
        ["read", LOOK, *PROVE],
        [LOOK, "count _gateway"],
        [LOOK],
        ["read", LOOK, "count _gateway", *PROVE],
    ]


def test_right_after_a_boot_deployments_are_read_too(site: Site) -> None:
    watchdog = guard.Guard(site.context())
    assert looked(site, watchdog, 0.0) == [["read", LOOK, *PROVE]]


def test_without_a_gateway_deployments_are_proven_alone(site: Site) -> None:
    site.gateway = None
    watchdog = guard.Guard(site.context())
    assert looked(site, watchdog, 7200.0) == [["read", *PROVE]]


def test_those_that_are_named_are_looked_after(site: Site) -> None:
    site.names = ["m.2"]
    watchdog = guard.Guard(site.context())
    assert looked(site, watchdog, 100.0) == [["read", "look at m.2", PROVE[1]]]


# -- suspicion

BUSY, IDLE = Look(1, True), Look(1, False)


@pytest.mark.parametrize(
    ("up", "silent", "taken", "done", "said"),
    [
        (["m", "m.2"], True, True, ["take out m", PROVE[0]], True),
        (["m", "m.2"], True, False, ["take out m"], False),
        (["m", "m.2"], False, True, [], False),
        (["m"], True, True, [PROVE[0]], False),  # its clients can go nowhere else
    ],
)
def test_one_that_is_busy_without_a_step_is_suspected_after_two_seconds(
    up: List[str], silent: bool, taken: bool, done: List[str], said: bool, site: Site
) -> None:
    watchdog = guard.Guard(site.context())
    site.up, site.silent, site.taken = up, silent, taken
    looked(site, watchdog, 100.0)
    site.looks = {"m.2": IDLE, "m": BUSY}
    assert looked(site, watchdog, 101.0, 102.9, 103.0) == [[LOOK], [LOOK], [LOOK, *done]]
    line = "warning: m neither answers nor does a step: its clients are sent elsewhere"
    assert site.said == ([line] if said else [])
    if done and done[-1] == PROVE[0]:  # the next time is a minute after this one
        site.looks = {}
        assert PROVE[0] not in looked(site, watchdog, 162.9)[0]
        assert PROVE[0] in looked(site, watchdog, 163.0)[0]


def test_each_of_several_that_are_busy_is_suspected(site: Site) -> None:
    watchdog = guard.Guard(site.context())
    site.up = []
    looked(site, watchdog, 100.0)
    site.looks = {"m": BUSY, "m.2": BUSY}
    assert looked(site, watchdog, 101.0, 103.0) == [[LOOK], [LOOK, *PROVE]]


def test_what_goes_on_is_not_begun_again(site: Site) -> None:
    watchdog = guard.Guard(site.context())
    PlayedThread.goes_on.append("_repair")
    assert looked(site, watchdog, 100.0, 160.0) == [["read", LOOK], ["read", LOOK]]
    PlayedThread.goes_on.clear()
    assert looked(site, watchdog, 220.0) == [["read", LOOK, *PROVE]]


@pytest.mark.parametrize("at", ["repair", "take out"])
def test_an_error_of_one_is_told_and_the_others_are_looked_after(at: str, site: Site) -> None:
    watchdog = guard.Guard(site.context())
    if at == "take out":
        looked(site, watchdog, 100.0)
        site.looks = {"m": BUSY}
        looked(site, watchdog, 101.0)
        site.error = HostError("the gateway is odd", "", "")
        assert looked(site, watchdog, 103.0) == [[LOOK, "take out m"]]
        assert site.said == ["error: the gateway is odd"]
    else:
        watchdog._read()
        watchdog._read_at = 100.0
        site.error = HostError("docker is odd", "", "")
        assert looked(site, watchdog, 100.0) == [[LOOK]]
        assert site.said == ["error: docker is odd"] * 2


def test_usage_waits_for_another_hfship_that_changes_something(site: Site) -> None:
    watchdog = guard.Guard(site.context())
    with FolderLock(site.folder):
        assert looked(site, watchdog, 3600.0) == [["read", LOOK, *PROVE]]


# -- gateways of other hosts


def test_gateways_that_missed_a_key_are_told_each_five_seconds(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_keys(context: Any, untold: Dict[str, Any]) -> Dict[str, Any]:
        site.did.append(f"tell {' '.join(untold)}")
        if site.error:
            raise site.error
        return site.not_told

    monkeypatch.setattr("hfship.commands.gateway_hosts.send_keys", send_keys)
    site.untold = {"gw1": ("bob",), "gw2": ("bob",)}
    site.not_told = {"gw2": HostError("gw2", "", "")}
    site.now = 100.0
    watchdog = guard.Guard(site.context())
    assert "tell gw1 gw2" not in looked(site, watchdog, 100.0)[0], "no models file names hosts"
    site.file = "models.toml"
    site.now = 100.0
    watchdog = guard.Guard(site.context())
    site.now = 99.0
    found = looked(site, watchdog, 100.0, 104.9, 105.0)
    assert ["tell gw1 gw2" in done for done in found] == [True, False, True]
    assert site.said == ["gw1: its gateway knows the keys again"] * 2
    site.error = HostError("odd", "", "")
    watchdog._read_at = 1000.0
    assert "tell gw1 gw2" in looked(site, watchdog, 110.0)[0] and len(site.said) == 2
    site.untold = {}
    assert "tell" not in " ".join(looked(site, watchdog, 115.0)[0])


# -- whether one is silent


@pytest.mark.parametrize(
    ("health", "still_s", "silent"),
    [
        (Answer(200, "ok"), 4.0, True),
        (Answer(200, "ok"), 3.9, False),
        (Answer(0, "no answer", silent=True), 9.0, True),
        (Answer(0, "connection refused"), 9.0, False),  # it loads, or has ended
    ],
)
def test_one_that_listens_and_stands_still_is_silent(
    health: Answer, still_s: float, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_and_watch(deployment: Any, hang_after: float, known: Answer) -> Tuple[None, float]:
        assert (hang_after, known) == (guard.QUICK_S, health)
        return None, still_s

    monkeypatch.setattr(guard, "read_health", lambda *_: health)
    monkeypatch.setattr(guard, "ask_and_watch", ask_and_watch)
    deployment = Deployment(Path("/d"), Plan(name="m"), "sk")
    assert guard._is_silent(deployment) == silent


# -- until Ctrl-C


def test_it_goes_on_at_its_pace_whatever_a_look_meets(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that takes longer than the pace is followed by the next at once."""
    took: Sequence[float] = (0.5, 2.5, 0.0)
    looks: List[float] = []

    class Played:
        def __init__(self, _: Any) -> None:
            pass

        def look(self, now: float) -> None:
            if len(looks) == len(took):
                raise KeyboardInterrupt
            site.now += took[len(looks)]
            looks.append(now)
            if len(looks) == 1:
                raise HostError("docker is odd", "", "")

    monkeypatch.setattr(guard, "Guard", Played)
    with pytest.raises(KeyboardInterrupt):
        guard.keep_watch(site.context())
    assert looks == [0.0, 2.0, 4.6] and site.now == 6.6
    assert site.said == ["looking after deployments every 2 s until Ctrl-C", "error: docker is odd"]


def test_a_pace_without_repair_makes_no_sense(site: Site) -> None:
    context = site.context()
    context.args.repair = False
    with pytest.raises(UsageError, match="--every needs --repair"):
        guard.keep_watch(context)
