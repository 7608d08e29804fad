"""Stages count, and are shown as what --progress asks for."""

from __future__ import annotations

import io
import json
import re
import threading
import time
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
