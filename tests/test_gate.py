# SPDX-License-Identifier: Apache-2.0
"""What holds a run back, on a clock that is set by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, List

import pytest

from hfship.hub.gate import Gate, HoldMessage, LineMessage, ParentProxy, RateLimit


class Clock:
    """A clock, the event that a run is stopped by, and a reporter, in one."""

    def __init__(self) -> None:
        self.now = 100.0
        self.stopped = False
        self.waits: List[float] = []
        self.said: List[str] = []
        self.threads: List[Any] = []

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(round(seconds, 3))
        self.now += seconds
        return self.stopped

    def is_set(self) -> bool:
        return self.stopped

    def info(self, text: str) -> None:
        self.said.append(text)

    def countdown(self, left_s: float) -> None:
        self.said.append(f"{left_s:g} s left")

    def thread(self, target: Any, daemon: bool) -> Any:
        assert daemon
        return SimpleNamespace(start=lambda: self.threads.append(target))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Clock()
    monkeypatch.setattr("hfship.hub.gate.time", made)
    monkeypatch.setattr("hfship.hub.gate.threading.Thread", made.thread)
    return made


def test_a_rate_holds_all_together(clock: Any) -> None:
    limit = RateLimit(100.0, clock)
    for count in (50, 100):
        limit.wait(count)
    assert clock.waits == [0.5, 1.0]
    clock.now += 10  # nothing is saved up meanwhile
    limit.wait(100)
    assert clock.waits[-1] == 1.0
    RateLimit(None, clock).wait(10**9)
    assert len(clock.waits) == 3


def test_workers_that_ask_at_once_wait_one_after_the_other(clock: Any) -> None:
    limit = RateLimit(100.0, SimpleNamespace(wait=clock.waits.append))  # type: ignore[arg-type]
    for _ in range(3):
        limit.wait(100)
    assert clock.waits == [1.0, 2.0, 3.0]


def test_an_open_gate_holds_nobody(clock: Any) -> None:
    Gate(clock, clock).wait()
    assert clock.waits == [] and clock.said == []


@pytest.mark.parametrize(("seconds", "waits"), [(0.5, [0.5]), (1.0, [1.0]), (2.5, [1.0, 1.0, 0.5])])
def test_a_closed_gate_is_waited_for(seconds: float, waits: List[float], clock: Any) -> None:
    gate = Gate(clock, clock)
    gate.hold(seconds, "busy")
    gate.wait()
    assert clock.waits == waits and clock.now == 100 + seconds


def test_a_run_that_is_stopped_waits_no_longer(clock: Any) -> None:
    gate = Gate(clock, clock)
    gate.hold(9, "busy")
    clock.stopped = True
    with pytest.raises(KeyboardInterrupt):
        gate.wait()


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        ([1.0], []),
        ([1.5], ["busy: waiting 2 s"]),
        ([5, 5.5], ["busy: waiting 5 s"]),  # hardly longer
        ([5, 3], ["busy: waiting 5 s"]),
        ([5, 7], ["busy: waiting 5 s", "busy: waiting 7 s"]),
    ],
)
def test_a_wait_is_told_when_it_is_longer(holds: List[float], said: List[str], clock: Any) -> None:
    gate = Gate(clock, clock)
    for seconds in holds:
        gate.hold(seconds, "busy")
    assert clock.said == said
    assert len(clock.threads) == 1  # one counts down for all
    clock.said.clear()
    clock.threads[0]()
    assert clock.now == 100 + max(holds) and clock.said[-1] == "0 s left"
    gate.hold(2, "busy")
    assert len(clock.threads) == 2


def test_the_countdown_goes_by_seconds_and_ends_with_the_run(clock: Any) -> None:
    gate = Gate(clock, clock)
    gate.hold(2.5, "busy")
    clock.threads[0]()
    assert clock.said[1:] == ["2.5 s left", "1.5 s left", "0.5 s left", "0 s left"]
    gate.hold(5, "busy")
    clock.stopped = True
    clock.said.clear()
    clock.threads[1]()
    assert clock.said == ["0 s left"]


def test_a_forked_process_has_its_parent_do_it() -> None:
    sent: List[Any] = []
    proxy = ParentProxy(sent.append)
    proxy.info("a")
    proxy.detail("b")
    proxy.hold(3, "busy")
    proxy.wait()
    assert sent == [LineMessage("a", False), LineMessage("b", True), HoldMessage(3, "busy")]
    ParentProxy(sent.append, with_details=False).detail("c")
    assert len(sent) == 3
