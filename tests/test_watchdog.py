"""What --repair does: to whom, how often, and what it writes down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, List, Tuple

import pytest

from hfship.base.report import Reporter
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
    (HUNG, 119, (), "", "left alone"),  # grace
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
