"""A site on one screen: what a view says of what was read, and `status --site` of a real gateway."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List, Optional, Tuple

import pytest

from conftest import free_port, program
from hfship.serve.engine import Heartbeat
from hfship.serve.terms import Plan
from hfship.site.admin import GatewayDownError, KeyUse, ServerState
from hfship.site.overview import read_site, site_view
from hfship.site.readings import firing
from hfship.site.store import gateway_text
from hfship.site.terms import Gateway, GatewayModel, Replica
from support.engine import start_engine
from support.gateways import key_named, make_gateway

MODEL = GatewayModel("m", ("m",), (Replica("m", "a:1"), Replica("m.2", "b:1", True)))
GATEWAY = Gateway((MODEL,), (3, 4))
PLANS = {"m": Plan(name="m", gpus=("GPU-1", "GPU-2"))}


def state(name: str, word: str) -> ServerState:
    return ServerState("be_m", name, word, name == "m.2", 0, 0)


CASES: List[Tuple[Optional[List[str]], List[bool], str, str]] = [
    (["UP", "UP"], [True, False], "", "up"),
    (["DOWN", "UP"], [False, True], "m: only the standby answers", "up"),
    (
        ["MAINT", "DOWN"],
        [False, False],
        "m: no replica answers; its clients get 503"
        "m: set aside, by hand or since it hangs; hfship status",
        "up",
    ),
    (None, [False, False], "", "down"),
]


@pytest.mark.parametrize("words, serve, trouble, gateway", CASES)
def test_who_serves(
    words: Optional[List[str]], serve: List[bool], trouble: str, gateway: str
) -> None:
    states = None
    if words is not None:
        states = [state(name, word) for name, word in zip(("m", "m.2"), words)]
    view = site_view(GATEWAY, PLANS, states, {}, 1.0, [])
    assert [row.serves for row in view.replicas] == serve
    assert "".join(view.troubles) == trouble and view.gateway == gateway
    assert [row.gpus for row in view.replicas] == [2, 0]


def test_a_model_on_demand_that_sleeps_is_no_trouble() -> None:
    asleep = replace(GATEWAY, models=(replace(MODEL, mode="on-demand"),))
    states = [state("m", "DOWN"), state("m.2", "DOWN")]
    view = site_view(asleep, PLANS, states, {}, 1.0, [])
    assert view.troubles == () and [row.state for row in view.replicas] == ["ASLEEP", "ASLEEP"]
    assert view.headline == "gateway up; 0 of 0 replicas serve"
    awake = site_view(asleep, PLANS, [state("m", "UP"), state("m.2", "DOWN")], {}, 1.0, [])
    assert [row.state for row in awake.replicas] == ["UP", "DOWN"]
    assert awake.headline == "gateway up; 1 of 2 replicas serve"


def test_figures_are_of_the_time_in_between() -> None:
    loads: Dict[str, Tuple[Optional[Heartbeat], Optional[Heartbeat]]] = {
        "m": (Heartbeat(1, 0, made=100), Heartbeat(2, 0, running=3, waiting=1, kv=0.25, made=160)),
        "m.2": (None, Heartbeat(1, 0, made=7)),
    }
    uses = [KeyUse("alice", 2, 9, 40), KeyUse("idle", 0, 0, 5), KeyUse("long", 1, 0, 5)]
    view = site_view(GATEWAY, PLANS, [state("m", "UP"), state("m.2", "UP")], loads, 2.0, uses)
    first, second = view.replicas
    assert (first.running, first.waiting, first.tokens_per_second, first.kv) == (3, 1, 30.0, 0.25)
    assert second.tokens_per_second is None and second.running == 0
    assert [use.name for use in view.keys] == ["alice", "long"]
    assert {first.cells()[name] for name in ("running", "waiting", "tok/s", "kv")} == {
        *"31",
        "30",
        "25%",
    }
    unknown = replace(second, running=None, waiting=None, tokens_per_second=None, kv=None)
    assert [unknown.cells()[name] for name in ("running", "waiting", "tok/s", "kv", "gpus")] == [
        "-"
    ] * 5
    for width in (200, 80):
        text = view.text(width)
        assert max(map(len, text.splitlines())) <= width and "25%" in text
        assert "alice (2 now, 9/min)" in text


# a replica as the gateway has it, the mode of its model -> its state, and what is said
SLEEPS = [
    ("DOWN", "on-demand", "ASLEEP", ""),
    ("MAINT", "on-demand", "MAINT", "m.2: set aside"),
    ("DOWN", "always", "DOWN", "m: no replica answers"),
]


@pytest.mark.parametrize(("word", "mode", "shown", "said"), SLEEPS)
def test_only_a_model_on_demand_that_is_down_sleeps(
    word: str, mode: str, shown: str, said: str
) -> None:
    model = replace(MODEL, replicas=MODEL.replicas[1:], mode=mode)
    view = site_view(Gateway((model,), (3, 4)), {}, [state("m.2", word)], {}, 1.0, [])
    [row] = view.replicas
    assert (row.state, row.role) == (shown, "standby")
    assert [said in trouble for trouble in view.troubles] == ([True] if said else [])


def test_a_model_on_demand_with_its_standby_alone_is_told() -> None:
    gateway = replace(GATEWAY, models=(replace(MODEL, mode="on-demand"),))
    view = site_view(gateway, {}, [state("m", "DOWN"), state("m.2", "UP")], {}, 1.0, [])
    assert view.troubles == ("m: only the standby answers",)
    assert [(row.state, row.role) for row in view.replicas] == [
        ("DOWN", "active"),
        ("UP", "standby"),
    ]


# heartbeat before and after, seconds in between -> tokens a second, and what is said
A, B = Heartbeat(1, 0, made=10), Heartbeat(2, 0, running=3.0, waiting=20, kv=0.9494, made=13)
FIGURES: List[Tuple[Optional[Heartbeat], Optional[Heartbeat], float, Optional[float], str]] = [
    (A, B, 2.0, 1.5, ""),
    (A, B, 0.5, 6.0, ""),
    (A, B, 7.0, 0.4, ""),
    (A, B, 0.0, None, ""),
    (None, B, 2.0, None, ""),
    (B, A, 2.0, 0.0, ""),  # it was restarted
    (A, replace(B, kv=0.95), 2.0, 1.5, "its KV cache is full"),
    (A, replace(B, waiting=21), 2.0, 1.5, "21 requests wait"),
]


@pytest.mark.parametrize(("before", "after", "seconds", "tokens", "said"), FIGURES)
def test_what_a_replica_does_and_who_should_look(
    before: Optional[Heartbeat],
    after: Heartbeat,
    seconds: float,
    tokens: Optional[float],
    said: str,
) -> None:
    states = [state("m", "UP"), state("m.2", "UP")]
    hearts: Dict[str, Tuple[Optional[Heartbeat], Optional[Heartbeat]]] = {"m": (before, after)}
    view = site_view(GATEWAY, PLANS, states, hearts, seconds, [])
    row, other = view.replicas
    assert row.tokens_per_second == tokens and row.running == after.running
    assert row.waiting == after.waiting and row.kv == round(after.kv, 3)
    assert (other.running, other.waiting, other.kv) == (None, None, None)
    assert [said in trouble for trouble in view.troubles] == ([True] if said else [])


def test_status_of_a_site() -> None:
    home = Path(tempfile.mkdtemp(prefix="hfship-"))  # short, for the path of a socket
    hfship = program("source", home)
    assert "there is no gateway" in hfship("status", "--site", code=5).stderr
    folder = home / "deploy/_gateway"
    engine = start_engine(free_port(), "m")
    model = replace(MODEL, replicas=(Replica("m", f"127.0.0.1:{engine.port}"),))
    gateway = make_gateway("haproxy-2.6", folder, [model], [key_named("bob")], free_port())
    gateway.write()
    (folder / "gateway.json").write_text(gateway_text(gateway.gateway))
    try:
        assert "gateway down" in hfship("status", "--site", code=9).stdout
        gateway.start()
        gateway.chat("m")
        view = json.loads(hfship("status", "--site", "--json").stdout)
        assert view["gateway"] == "up" and view["replicas"][0]["serves"]
        assert view["keys"] == [{"name": "bob", "running": 0, "last_minute": 1, "accepted": 1}]
    finally:
        gateway.end()
        engine.kill()
        shutil.rmtree(home)


ALERT = {"state": "firing", "labels": {"alertname": "Down", "severity": "critical"}}
PENDING = {"state": "pending", "labels": {"alertname": "Slow"}}


@pytest.mark.parametrize(
    ("alerts", "lines"),
    [
        ([], []),
        ([PENDING], []),
        ([PENDING, ALERT, PENDING], ["Down (critical): "]),
        ([ALERT, {**ALERT, "annotations": {"summary": "m"}}], ["Down (critical): ", "Down (critical): m"]),
        ([{"state": "firing", "labels": {"alertname": "B"}}, ALERT, ALERT], ["B (-): ", "Down (critical): "]),
    ],
)  # fmt: skip
def test_alerts_that_fire_are_told_once_whatever_stands_between(
    alerts: List[Dict[str, object]], lines: List[str]
) -> None:
    assert firing({"data": {"alerts": alerts}}) == lines


def test_a_site_is_read_twice_with_a_second_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPUs and alerts are asked meanwhile; a gateway that is down leaves its keys unknown."""
    clock = SimpleNamespace(now=100.0)
    beats = [Heartbeat(1, 0, made=100), Heartbeat(2, 0, made=130)]

    def sleep(seconds: float) -> None:
        clock.now += seconds

    def read_gpus() -> Tuple[str, ...]:
        clock.now += 0.25
        return ("gpu",)

    def read_heartbeats(plans: Dict[str, Plan], _: float) -> Dict[str, Heartbeat]:
        assert {name: plan.bind for name, plan in plans.items()} == {"m": "reached"}
        return {"m": beats.pop(0)}

    def down(_: Path) -> List[ServerState]:
        raise GatewayDownError("down", "", "")

    patched: Dict[str, object] = {
        "read_gateway": {tmp_path / "_gateway": GATEWAY}.get,
        "server_states": down,
        "direct": lambda plan: Plan(name=plan.name, bind="reached"),
        "read_heartbeats": read_heartbeats,
        "read_gpus": read_gpus,
        "read_alerts": lambda folder: [f"alert of {folder.name}"],
        "certificate_days": lambda _: 3.0,
        "time": SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep),
    }
    for name, fake in patched.items():
        monkeypatch.setattr(f"hfship.site.overview.{name}", fake)
    view = read_site(tmp_path, {**PLANS, "other": Plan(name="other")}, over_s=1.5)
    assert clock.now == 101.5 and view.replicas[0].tokens_per_second == 20.0
    assert (view.gateway, view.gpus, view.alerts) == ("down", ("gpu",), ("alert of _monitoring",))
    assert view.keys == () and "the certificate ends in 3 days" in view.troubles[-1]
