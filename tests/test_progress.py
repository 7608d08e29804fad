"""Stages count, and are shown as what --progress asks for."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base import progress
from hfship.base.progress import Clock, Stage
from hfship.base.report import Reporter


def test_what_was_there_is_progress_but_no_speed() -> None:
    stage = Stage("fetching", 100)
    stage.skip(60)
    stage.stop_clock()
    assert (stage.done, stage.rate) == (60, 0)
    stage.add(30)
    assert stage.done == 90 and stage.rate > 0
    stage.add(-10)
    assert stage.done == 80


def test_files_are_expected_and_finished() -> None:
    stage = Stage("verifying", 3, "files")
    stage.expect(1)
    assert list(stage.each(iter("ab"), 2)) == ["a", "b"]
    assert (stage.files, stage.finished) == (3, 2)


@pytest.mark.parametrize(
    "total, done, unit, line",
    [
        (4, 1, "files", "s:  25 %  1/4 files"),
        (0, 0, "files", "s: 100 %  0/0 files"),
        (2000, 0, "B", "s:   0 %  0 B of 2.0 kB  0 B/s"),
    ],
)
def test_the_plain_line(total: int, done: int, unit: str, line: str) -> None:
    stage = Stage("s", total, unit)
    stage.add(done)
    assert stage.line() == line


def run_stage(mode: str, verbosity: int, total: int) -> str:
    """What a stage of 50 ms says on stderr."""
    err = io.StringIO()
    with Reporter(mode, verbosity, io.StringIO(), err).stage("s", total, "files") as stage:
        stage.add(total)
    return err.getvalue()


@pytest.mark.parametrize(
    "mode, verbosity, total", [("json", -1, 1), ("json", 0, 0), ("none", 1, 1)]
)
def test_stages_that_are_not_shown(mode: str, verbosity: int, total: int) -> None:
    assert run_stage(mode, verbosity, total) == ""


def test_a_stage_that_ends_before_its_first_line_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_stage("plain", 0, 1) == ""
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    said = run_stage("plain", 0, 1)
    assert re.match(r"\d\d:\d\d:\d\dZ s: ", said) and "s: 100 %  1/1 files" in said


def test_the_last_event_of_a_stage_is_final() -> None:
    events: List[Dict[str, Any]] = [
        json.loads(line) for line in run_stage("json", 0, 2).splitlines()
    ]
    assert [event["final"] for event in events][-1:] == [True]
    assert (events[-1]["done"], events[-1]["total"]) == (2, 2)


def test_the_run_knows_its_stages() -> None:
    reporter = Reporter("none", 0, io.StringIO(), io.StringIO())
    assert not reporter.run.working.is_set()
    with reporter.stage("empty", 0):
        assert not reporter.run.working.is_set()
    with pytest.raises(ValueError), reporter.stage("a", 1):
        assert reporter.run.working.is_set() and reporter.run.doing == "a"
        raise ValueError
    assert [stage.name for stage in reporter.run.past] == ["a"] and reporter.run.stages == []


def test_a_bar_has_no_thread_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked while a bar is shown."""
    from tqdm import tqdm

    monkeypatch.setattr(tqdm, "monitor_interval", 10)
    assert "100%" in run_stage("bar", 0, 1)
    assert tqdm.monitor is None
    assert "TMonitor" not in [type(thread).__name__ for thread in threading.enumerate()]


def test_lists_of_results_are_gathered_into_one() -> None:
    out = io.StringIO()
    reporter = Reporter("none", 0, out, io.StringIO())
    reporter.adjust("none", 0, True, "x/1")
    with reporter.gather_results() as gathered:
        reporter.result_json([{"a": 1}])
        gathered.append({"schema": "y/1"})
        reporter.result_json([{"a": 2}])
        assert out.getvalue() == ""
    assert json.loads(out.getvalue()) == [
        {"schema": "x/1", "a": 1},
        {"schema": "y/1"},
        {"schema": "x/1", "a": 2},
    ]


# -- clocks


def wait_with_clock(mode: str, seconds: float, verbosity: int = 0, limit_s: float = 3600) -> str:
    """What a wait with a clock says on stderr."""
    err = io.StringIO()
    reporter = Reporter(mode, verbosity, io.StringIO(), err)
    with reporter.clock("starting m", limit_s) as clock:
        time.sleep(seconds / 2)
        clock.doing = "loading m"
        time.sleep(seconds / 2)
    return err.getvalue()


def test_a_wait_has_a_clock_and_its_limit_on_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CLOCK_INTERVAL_S", 0.02)
    said = wait_with_clock("bar", 0.3)
    assert "\r\x1b[Kstarting m 0:00 of at most 1:00:00" in said
    assert "\r\x1b[Kloading m 0:00 of at most 1:00:00" in said
    assert said.endswith("\r\x1b[K") and "\n" not in said
    assert "of at most" not in wait_with_clock("bar", 0.3, limit_s=0)
    assert wait_with_clock("bar", 0.3, verbosity=-1).strip("\r\x1b[K") == ""


@pytest.mark.parametrize("mode", ["bar", "plain", "json"])
def test_a_short_wait_shows_nothing(mode: str) -> None:
    assert wait_with_clock(mode, 0.02) == ""


def test_in_a_pipe_each_line_of_a_wait_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.02)
    for line in wait_with_clock("plain", 0.3).splitlines():
        assert re.fullmatch(r"\d\d:\d\d:\d\dZ (starting|loading) m 0:00 of at most 1:00:00", line)
    event = json.loads(wait_with_clock("json", 0.3).splitlines()[0])
    assert event == {"event": "clock", "doing": "starting m", "seconds": 0, "limit": 3600}


def test_what_is_said_during_a_wait_comes_before_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CLOCK_INTERVAL_S", 0.02)
    err = io.StringIO()
    reporter = Reporter("bar", 0, io.StringIO(), err)
    with reporter.clock("starting m"):
        time.sleep(0.1)
        reporter.info("a line")
        time.sleep(0.1)
    assert re.search(r"\r\x1b\[K\S+Z a line\n\r\x1b\[Kstarting m", err.getvalue())


def test_a_clock_goes_on_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock("waiting", 7200)
    began = time.monotonic()
    monkeypatch.setattr(progress.time, "monotonic", lambda: began + 3700.5)
    assert clock.text() == "waiting 1:01:40 of at most 2:00:00"


# -- bars


class Bar:
    """Stands for a bar of tqdm."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.n = 0
        self.total = options["total"]
        self.initial = 0
        self.calls: List[Any] = []

    def update(self, count: int) -> None:
        """So much more."""
        self.n += count
        self.calls.append(("update", count))

    def refresh(self) -> None:
        """Draw it anew."""
        self.calls.append("refresh")

    def close(self) -> None:
        """It stays as it is."""
        self.calls.append("close")

    def clear(self) -> None:
        """Take it away."""

    def set_description(self, text: str, refresh: bool) -> None:
        """What it is of."""
        self.calls.append((text, refresh))

    def set_postfix_str(self, text: str) -> None:
        """What stands behind it."""
        self.calls.append(("behind", text))


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> List[Bar]:
    """Those that were made."""
    made: List[Bar] = []

    def tqdm(**options: Any) -> Bar:
        made.append(Bar(**options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=tqdm))
    return made


def display_of(mode: str = "bar") -> Any:
    reporter = Reporter(mode, 0, io.StringIO(), io.StringIO())
    return reporter._progress


@pytest.mark.parametrize(
    ("unit", "options"),
    [
        ("B", {"unit": "B", "unit_scale": True, "unit_divisor": 1000}),
        ("files", {"unit": " files"}),
    ],
)
def test_a_bar_follows_its_stage(unit: str, options: Dict[str, Any], bars: List[Bar]) -> None:
    display = display_of()
    stage = Stage("pack", 100, unit, "1/2 m")
    display._show(stage, final=False)
    (bar,) = bars
    err = display._output.err
    same = {
        "desc": "pack 1/2 m",
        "total": 100,
        "file": err,
        "dynamic_ncols": True,
        "mininterval": 0,
    }
    assert bar.options == {**same, **options}
    assert stage.bar is bar and display._bar is bar and display._output.last_line is bar
    stage.skip(10)
    stage.add(20)
    stage.total = 120
    display._show(stage, final=False)
    assert (bar.n, bar.total, bar.initial) == (30, 120, 10)
    display._show(stage, final=False)
    display.countdown(7)
    display.countdown(0)
    display._show(stage, final=True)
    named = ("pack 1/2 m", False)
    moved = [named, ("update", 30), named, "refresh"]
    assert bar.calls == [
        *moved,
        ("behind", "waiting 7 s"),
        ("behind", ""),
        named,
        "refresh",
        "close",
    ]
    assert display._bar is None and display._output.last_line is None and len(bars) == 1


def test_without_tqdm_there_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    display = display_of()
    display._show(Stage("pack", 100), final=False)
    assert display.mode == "plain"


def test_a_wait_without_a_bar_stands_on_the_last_line() -> None:
    display = display_of()
    display.countdown(7)
    assert display._output.err.getvalue() == "\r\x1b[Kwaiting 7 s"
    assert display._output.last_line is not None
    display._output.last_line.clear()
    display.countdown(0)
    assert display._output.err.getvalue().endswith("\r\x1b[K") and display._output.last_line is None


@pytest.mark.parametrize(("mode", "left"), [("bar", "none"), ("plain", "none"), ("json", "json")])
def test_who_leaves_the_terminal_draws_nothing(mode: str, left: str) -> None:
    display = display_of(mode)
    display.leave_terminal()
    assert display.mode == left


@pytest.mark.parametrize(
    ("asked", "terminal", "mode", "times"),
    [
        ("auto", True, "bar", False),
        ("auto", False, "plain", True),
        ("bar", False, "bar", False),
        ("plain", True, "plain", True),
        ("json", True, "json", False),
    ],
)
def test_how_progress_is_shown(asked: str, terminal: bool, mode: str, times: bool) -> None:
    display = display_of("none")
    display._output.has_times = False
    display._output.err.isatty = lambda: terminal
    display.set_mode(asked)
    assert display.mode == mode and display._output.has_times == times


def test_the_speed_can_be_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stage = Stage("s", 4000)
    stage.add(1000)
    now[0] = 110.0
    assert (stage.seconds, stage.rate) == (10.0, 100.0)
    assert stage.line() == "s:  25 %  1.0 kB of 4.0 kB  100 B/s, 30.0 s left"
    assert stage.counts == {"done": 1000, "total": 4000, "unit": "B", "rate": 100}
    stage.restart_clock()
    now[0] = 112.0
    assert stage.rate == 500.0
    stage.stop_clock()
    now[0] = 200.0
    assert stage.seconds == 2.0
