"""What --repair does: to whom, how often, and what it writes down."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any, List, Tuple

import pytest

from hfship.base.report import Reporter
from hfship.base.text import utc
from hfship.commands.repairing import units_of
from hfship.serve import watchdog
from hfship.serve.deployments import Deployment
from hfship.serve.messages import Answer
from hfship.serve.status import (
    DEAD,
    DOWN,
    HUNG,
    LATE,
    LOST_GPU,
    DeploymentStatus,
    Vitals,
    fault_of,
)
from hfship.serve.terms import Plan
from hfship.serve.watchdog import (
    Policy,
    Repair,
    decide,
    parse_repairs,
    read_repairs,
    repair,
    repairs_note,
)

NOW = 1_000_000.0
STATUS = DeploymentStatus("m", "hung", "vllm_m", "i", "u", 1, (), uptime=9999, note="no answer")


def repairs(*ages_s: float) -> List[Repair]:
    return [Repair(NOW - age, "restart", "hung") for age in ages_s]


# Fault, age of the container, how long ago repairs were: what is done, a word of why not.
DECISIONS: List[Tuple[str, Any, Tuple[float, ...], str, str]] = [
    ("", 9999, (), "", ""),
    (HUNG, 9999, (), "restart", "hung: no answer"),
    (DEAD, 9999, (), "restart", ""),
    (LATE, 9999, (), "restart", ""),
    (DOWN, None, (), "start", ""),
    (LOST_GPU, 9999, (), "recreate", ""),
    (HUNG, 119, (), "", "started 119 s ago: left alone for 120 s"),  # grace
    (HUNG, 120, (), "restart", ""),
    (LOST_GPU, 60, (), "", "left alone"),
    (LATE, 60, (), "restart", ""),  # that it is late says how long it takes
    (HUNG, 9999, (0,), "", "next attempt in 1 min 00 s"),
    (HUNG, 9999, (60,), "restart", ""),
    (HUNG, 9999, (86_400, 70_000, 60_000, 50_000, 40_000), "restart", ""),
    (DEAD, 60, (), "", "left alone"),
    (DOWN, None, (30,), "", "next attempt in 30.0 s"),
    (DOWN, None, (61,), "start", ""),
    (HUNG, 9999, (300, 100), "", "next attempt in 20.0 s"),  # the second wait is of 120 s
    (HUNG, 9999, (300, 121), "restart", ""),
    (HUNG, 9999, (90_000,), "restart", ""),  # yesterday's do not count
    (HUNG, 9999, (80_000, 70_000, 60_000, 50_000), "restart", ""),
    (HUNG, 9999, (80_000, 70_000, 60_000, 50_000, 40_000), "", "somebody must look"),
    (HUNG, 9999, (-50,), "restart", ""),  # the clock was set back
]


@pytest.mark.parametrize("fault, uptime, ages, action, why", DECISIONS)
def test_what_is_done(fault: str, uptime: Any, ages: Any, action: str, why: str) -> None:
    status = replace(STATUS, fault=fault, uptime=uptime)
    decision = decide(status, repairs(*ages), NOW, Policy())
    assert decision.action == action and why in decision.why
    assert decision.given_up == ("somebody" in why)


MUTE = Answer(0, "", silent=True)
# State, /health, lost GPU, uptime: the fault.
FAULTS = [
    ("healthy", Answer(200, ""), True, 10, ""),
    ("degraded", Answer(200, ""), True, 10, LOST_GPU),
    ("degraded", Answer(503, ""), False, 10, DEAD),
    ("degraded", Answer(200, ""), False, 10, ""),
    ("degraded", Answer(500, ""), False, 9999, ""),
    ("loading", Answer(0, ""), False, 9999, ""),
    ("stalled", Answer(0, ""), False, None, ""),
    ("stalled", Answer(0, ""), False, 3600, ""),
    ("hung", MUTE, False, 10, HUNG),
    ("down", Answer(0, ""), False, None, DOWN),
    ("loading", Answer(0, ""), False, 9999, ""),
    ("stalled", Answer(0, ""), False, 3599, ""),
    ("stalled", Answer(0, ""), False, 3601, LATE),
    ("stopped", Answer(0, ""), False, None, ""),
]


@pytest.mark.parametrize("state, health, lost, uptime, fault", FAULTS)
def test_what_can_be_mended(
    state: str, health: Answer, lost: bool, uptime: Any, fault: str
) -> None:
    vitals = Vitals(health, health, lost_gpu=lost)
    assert fault_of(Plan(ready_timeout_s=3600), state, vitals, uptime) == fault


def test_why_is_written_down_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    folder.mkdir(mode=0o750)
    deployment = Deployment(folder, Plan(name="m"), "sk-1")
    seen: List[str] = []
    monkeypatch.setattr(
        watchdog, "docker", lambda *_: seen.append((folder / "repairs.log").read_text())
    )
    status = replace(STATUS, fault=HUNG, note="no answer\nand no step")
    done = repair(deployment, status, Policy(), Reporter("none", -1))
    assert done.action == "restart" and seen[0].endswith(" restart hung: no answer and no step\n")
    again = repair(deployment, status, Policy(), Reporter("none", -1))
    assert not again.action and len(seen) == 1
    found = read_repairs(folder)
    assert len(found) == 1 and "1 repair in a day" in repairs_note(found, found[0].at)


@pytest.mark.parametrize("fault, seconds", [(HUNG, "1"), (DEAD, "10")])
def test_what_hangs_is_not_waited_for(
    fault: str, seconds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients wait for an error until it has ended."""
    folder = tmp_path / "m"
    folder.mkdir(mode=0o750)
    did: List[List[str]] = []
    monkeypatch.setattr(watchdog, "docker", lambda words, *_: did.append(list(words)))
    status = replace(STATUS, fault=fault, uptime=9999)
    repair(Deployment(folder, Plan(name="m"), "sk-1"), status, Policy(), Reporter("none", -1))
    assert did == [["restart", "-t", seconds, "vllm_m"]]


def test_a_log_that_somebody_wrote_in_is_read_as_far_as_it_goes() -> None:
    lines = "x\n\n2026-13-01T00:00:00Z restart y\n2026-11-29T00:00:00Z restart hung: a b\n\x00\n"
    assert [repair.why for repair in parse_repairs(lines)] == ["hung: a b"]
    line = Repair(5.0, "start", "down").line()
    assert parse_repairs(line)[0].at == 5


def test_units_escape_what_systemd_would_read() -> None:
    units = units_of(["/a b/50%/hfship", "status", "--repair"])
    assert "ExecStart='/a b/50%%/hfship' status --repair" in units["hfship-repair.service"]
    assert "OnUnitInactiveSec=1min" in units["hfship-repair.timer"]


@pytest.mark.parametrize(
    ("fault", "did"),
    [
        (DOWN, [("start", "m")]),
        (
            LOST_GPU,
            [("log", "m"), ("compose up -d --force-recreate", "recreate m", 300.0, "m")],
        ),
        (LATE, [("restart -t 10 vllm_m", "restart m", 300.0, "m")]),
        (HUNG, [("restart -t 1 vllm_m", "restart m", 300.0, "m")]),
    ],
)
def test_each_fault_has_its_cure(
    fault: str, did: List[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir(mode=0o750)
    done: List[Any] = []

    def docker(words: Any, *more: Any) -> None:
        done.append((" ".join(words), *more))

    monkeypatch.setattr(watchdog, "COMPOSE_TIMEOUT_S", 300.0)
    monkeypatch.setattr(watchdog, "docker", docker)
    monkeypatch.setattr(watchdog, "compose", lambda _, *words: ["compose", *words])
    monkeypatch.setattr(watchdog, "start", lambda one: done.append(("start", one.plan.name)))
    monkeypatch.setattr(watchdog, "keep_log", lambda one: done.append(("log", one.plan.name)))
    deployment = Deployment(tmp_path / "m", Plan(name="m"), "sk-1")
    repair(deployment, replace(STATUS, fault=fault), Policy(), Reporter("none", -1))
    assert done == did


class Told:
    """What a reporter was told."""

    def __init__(self) -> None:
        self.said: List[Tuple[str, str]] = []

    def warn(self, text: str) -> None:
        self.said.append(("warn", text))

    def info(self, text: str) -> None:
        self.said.append(("info", text))

    @contextlib.contextmanager
    def clock(self, text: str, limit_s: float) -> Any:
        self.said.append((f"clock {limit_s:.0f}", text))
        yield


@pytest.mark.parametrize(
    ("fault", "ages", "said"),
    [
        ("", (), []),
        (
            HUNG,
            (),
            [
                ("warn", "m: restart, since it is hung: no answer"),
                (f"clock {watchdog.COMPOSE_TIMEOUT_S:.0f}", "m: restart"),
            ],
        ),
        (
            HUNG,
            (5,),
            [("info", "m is hung, and was repaired a while ago: the next attempt in 55.0 s")],
        ),
        (
            HUNG,
            (5, 4, 3, 2, 1),
            [
                (
                    "warn",
                    "m is hung and was repaired 5 times within 24 h 00 min: somebody must look at it",
                )
            ],
        ),
    ],
)
def test_what_is_said_of_a_repair(
    fault: str, ages: Any, said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir(mode=0o750)
    monkeypatch.setattr(watchdog.time, "time", lambda: NOW)
    monkeypatch.setattr(watchdog, "docker", lambda *_: None)
    watchdog.write_repairs(tmp_path / "m", repairs(*ages))
    told: Any = Told()
    deployment = Deployment(tmp_path / "m", Plan(name="m"), "sk-1")
    repair(deployment, replace(STATUS, fault=fault), Policy(), told)
    assert told.said == said
    added = [] if len(ages) or not fault else [Repair(NOW, "restart", "hung: no answer")]
    assert read_repairs(tmp_path / "m") == [*repairs(*ages), *added]


def test_only_so_many_repairs_are_kept(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir(mode=0o750)
    assert read_repairs(tmp_path / "m") == []
    many = repairs(*range(300, 0, -1))
    watchdog.write_repairs(tmp_path / "m", many)
    assert read_repairs(tmp_path / "m") == many[-watchdog.KEPT_REPAIRS :]
    assert (tmp_path / "m/repairs.log").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("ages", "policy", "count"),
    [
        ((), None, ""),
        ((86_400,), None, ""),
        ((86_399,), None, "1 repair"),
        ((90_000, 50, 30), None, "2 repairs"),
        ((50, 30), Policy(window_s=40), "1 repair"),
    ],
)
def test_what_was_repaired_lately(ages: Any, policy: Any, count: str) -> None:
    said = repairs_note(repairs(*ages), NOW, policy)
    if not count:
        assert said == ""
        return
    last = utc(NOW - ages[-1])
    assert said == f"{count} in a day, last {last} (restart, hung)"


def test_repairs_that_somebody_of_our_group_made_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []

    def read_own(*given: Any, **more: Any) -> bytes:
        asked.append((given, more))
        return b"1970-01-01T00:00:09Z restart hung\xff\n"

    monkeypatch.setattr(watchdog, "read_own", read_own)
    assert [one.at for one in read_repairs(tmp_path)] == [9]
    assert asked == [((tmp_path, "repairs.log"), {"of_others": True})]
