"""Who is suspected to hang, and what the watchdog does about it, second by second."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.report import Reporter
from hfship.commands import guard
from hfship.serve.deployments import Deployment
from hfship.serve.engine import Heartbeat
from hfship.serve.status import DeploymentStatus
from hfship.serve.terms import Plan
from hfship.site.admin import GatewayDownError, ServerState
from hfship.site.silence import Look, Silences, has_other, look_of, read_looks
from hfship.site.terms import Gateway, GatewayModel, Replica

MODEL = GatewayModel("m", ("m",), (Replica("m", "a:1"), Replica("m.2", "b:1", True)))
ALONE = GatewayModel("n", ("n",), (Replica("n", "c:1"),))
GATEWAY = Gateway((ALONE, MODEL), (3, 4))

# What is seen of an engine each second: (steps, busy); the last is silent for so many seconds.
LOOKS: List[Tuple[str, List[Look], float]] = [
    ("it does steps", [Look(1, True), Look(2, True), Look(3, True)], 0),
    ("it has nothing to do", [Look(1, False)] * 5, 0),
    ("busy without a step", [Look(1, True)] * 4, 3),
    ("no word, and clients wait", [Look(1, True), Look(None, True), Look(None, True)], 2),
    ("no word, and no clients", [Look(1, False), Look(None, False)], 0),
    ("it moved again", [Look(1, True), Look(1, True), Look(2, True)], 0),
    ("it was restarted", [Look(9, True), Look(9, True), Look(0, True)], 0),
]


@pytest.mark.parametrize("what, looks, seconds", LOOKS)
def test_silent_is_what_is_busy_without_a_step(
    what: str, looks: List[Look], seconds: float
) -> None:
    silences = Silences()
    found = [silences.silent_s("m", look, float(now)) for now, look in enumerate(looks)]
    assert found[-1] == seconds, what


def test_what_the_gateway_has_there_counts_as_work() -> None:
    assert look_of(None, 0) == Look(None, False) and look_of(None, 1) == Look(None, True)
    assert look_of(Heartbeat(5, 0), 0) == Look(5, False)
    busy = Look(5, True)
    assert look_of(Heartbeat(5, 0), 1) == look_of(Heartbeat(5, 0, waiting=1), 0) == busy
    assert look_of(Heartbeat(5, 0, running=1), 0) == busy


def test_a_look_is_what_the_engine_and_the_gateway_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway may not know a replica, and a replica may say nothing."""
    states = [
        ServerState("be_m", "m", "UP", False, 2, 9),
        ServerState("be_n", "n", "UP", False, 0, 9),
    ]
    hearts = {"m": None, "n": Heartbeat(5, 0), "o": Heartbeat(7, 0)}
    plans = {name: Plan(name=name) for name in hearts}

    def read_heartbeats(asked: Dict[str, Plan], timeout_s: float) -> Dict[str, Any]:
        assert (asked, timeout_s) == (plans, 1.5)
        return hearts

    monkeypatch.setattr("hfship.site.silence.read_heartbeats", read_heartbeats)
    monkeypatch.setattr("hfship.site.silence.server_states", {tmp_path: states}.get)
    looks = {"m": Look(None, True), "n": Look(5, False), "o": Look(7, False)}
    assert read_looks(tmp_path, plans, 1.5) == (looks, states)


def test_without_a_gateway_nobody_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def server_states(_: Path) -> List[ServerState]:
        raise GatewayDownError("the gateway does not answer", "", "")

    monkeypatch.setattr("hfship.site.silence.server_states", server_states)
    assert read_looks(tmp_path, {"m": Plan(name="m")}, 1.0) == ({}, [])


@pytest.mark.parametrize(
    "name, word, other",
    [
        ("m", "UP", True),
        ("m", "DOWN", False),
        ("m", "MAINT", False),
        ("m.2", "DOWN", True),
        ("n", "UP", False),
        ("unknown", "UP", False),
    ],
)
def test_clients_can_go_to_another_replica_that_answers(name: str, word: str, other: bool) -> None:
    states = [
        ServerState("be_m", "m", "UP", False, 0, 0),
        ServerState("be_m", "m.2", word, True, 0, 0),
        ServerState("be_n", "n", "UP", False, 0, 0),
    ]
    assert has_other(GATEWAY, states, name) == other


@pytest.mark.parametrize("silent, done", [(True, ["take out m", "repair m"]), (False, [])])
def test_clients_leave_before_it_is_proven(
    silent: bool, done: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspicion alone takes nothing out; what is silent loses its clients, then is proven."""
    did: List[str] = []
    looks: Dict[str, Look] = {"m": Look(1, True)}
    states = [ServerState("be_m", name, "UP", name != "m", 1, 1) for name in ("m", "m.2")]
    deployment = Deployment(tmp_path, Plan(name="m", network="hfship"), "sk-1")
    status = DeploymentStatus("m", "hung", "c", "i", "u", 1, (), fault="hung")
    fakes: Dict[str, Any] = {
        "list_deployments": lambda *_: ([deployment], {}),
        "read_gateway": lambda _: GATEWAY,
        "direct": lambda plan: plan,
        "read_looks": lambda *_: (looks, states),
        "_is_silent": lambda _: silent,
        "take_out": lambda _, name: bool(did.append(f"take out {name}") or True),
        "deployment_status": lambda *_: status,
        "repaired": lambda _, one, __: did.append(f"repair {one.plan.name}"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(guard, name, fake)
    args = SimpleNamespace(names=[], hang_after=60)
    settings = SimpleNamespace(deploy_dir=tmp_path)
    context: Any = SimpleNamespace(args=args, settings=settings, reporter=Reporter("none", -1))
    watchdog = guard.Guard(context)
    for now in (100.0, 101.0, 102.5):
        did.clear()  # all are proven at the start, and a minute later again
        watchdog.look(now)
        for _ in range(2):
            for thread in list(watchdog._threads.values()):
                while thread.ident is None:  # another thread is about to start it
                    time.sleep(0.001)
                thread.join(5)
    assert did == done
