# SPDX-License-Identifier: Apache-2.0
"""What the record of a job says while it runs and at its end; test_jobs.py has jobs."""

from __future__ import annotations

import fcntl
import os
import threading
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import NetworkError
from hfship.ops import keeper
from hfship.ops.jobs import new_record
from hfship.ops.keeper import RATE_LOOKS, JobKeeper


def stage(name: str, done: int, **fields: Any) -> Any:
    values = {
        "unit": "B",
        "total": 1000,
        "files": 9,
        "finished": 3,
        "rate": 7.4,
        "skipped": 0,
        "seconds": 2.0,
    }
    return SimpleNamespace(**{"name": name, "done": done, **values, **fields})


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A keeper without its thread, on a clock; what was said and written."""
    made: Any = JobKeeper.__new__(JobKeeper)
    said: List[Any] = []
    written: List[Any] = []
    made._run = SimpleNamespace(
        doing="fetching",
        past=[],
        stages=[],
        failure=None,
        results=["one", "two"],
        next_words=["hfship", "verify", "x"],
        working=threading.Event(),
    )
    made._reporter = SimpleNamespace(
        redacted=lambda value: value,
        log=lambda *words, **more: said.append(("log", words, more)),
        event=lambda *words, **more: said.append(("event", words, more)),
        say=lambda text: said.append(("say", text)),
        warn=lambda text: said.append(("warn", text)),
        sends_events=False,
        verbosity=0,
    )
    made._folder = tmp_path
    made._record = new_record("fetch-m", ["fetch", "o/m"], False, {})
    made._looks = deque(maxlen=RATE_LOOKS)
    made._is_broken, made._has_begun, made._pipe = False, True, -1
    made._over = threading.Event()
    made._thread = SimpleNamespace(join=lambda: None)
    made.said, made.written, made.now = said, written, 100.0
    clock = SimpleNamespace(monotonic=lambda: made.now, time=lambda: 1000.0 + made.now)
    monkeypatch.setattr("hfship.ops.keeper.time", clock)
    monkeypatch.setattr("hfship.ops.keeper.write_job", lambda _, record: written.append(record))
    return made


def amounts(record: Any) -> List[Any]:
    return [record.unit, record.done, record.total, record.files, record.finished, record.rate]


def test_before_the_first_stage_nothing_is_counted(job: Any) -> None:
    found = job._now(None)
    assert (found.stage, found.rate, found.done, found.updated_at) == ("fetching", 0.0, 0, 1100.0)


def test_a_stage_that_there_is_once_per_model_counts_as_one(job: Any) -> None:
    job._run.past = [stage("fetching", 1000), stage("checking", 5)]
    running = stage("fetching", 200)
    assert amounts(job._now(running)) == ["B", 1200, 2000, 18, 6, 7]
    job._run.past.append(running)  # it has just ended: not twice
    assert amounts(job._now(running))[1] == 1200
    assert amounts(job._now(None)) == ["B", 1200, 2000, 18, 6, 0]  # as far as the last one came


def test_the_rate_is_that_of_late(job: Any) -> None:
    running = stage("fetching", 0, skipped=100)
    rates = []
    for seconds, done in ((0, 100), (1, 150), (2, 300), (4, 500), (5, 400)):
        job.now, running.done = 100.0 + seconds, done
        rates.append(job._rate(running))
    assert rates == [7, 7, 100, 100, 60]
    assert job._rate(stage("checking", 0)) == 7  # another stage begins anew
    assert len(job._looks) == 1


@pytest.mark.parametrize(
    ("code", "state", "failure", "error"),
    [
        (0, "done", None, {}),
        (8, "failed", NetworkError("no network", "why", "again"), "no network"),
        (6, "failed", None, {}),
        (0, "done", NetworkError("one of a list", "", ""), {}),
    ],
)
def test_how_a_job_ended_is_written_down(
    code: int, state: str, failure: Any, error: Any, job: Any
) -> None:
    job._run.failure = failure
    job._run.past = [stage("fetching", 900), stage("hashing", 5000, unit="files")]
    job._run.working.set()
    job.end(code, state)
    (record,) = job.written
    assert (record.state, record.exit_code, record.stage, record.rate) == (state, code, "", 7.4)
    assert record.done == 900  # that of the most bytes
    assert record.error == error or record.error["what"] == error
    (_, _, logged) = job.said[0]
    rows: Dict[str, str] = logged["rows"]
    assert rows["command"] == "hfship fetch o/m" and rows["result"] == "one; two"
    assert rows["exit"] == f"{code} ({state})" and rows["log"].endswith("/fetch-m.log")
    assert rows.get("why", "") == (error if isinstance(error, str) else "")
    expected = "hfship verify x" if not code else ("again" if failure else "")
    assert rows.get("next", "") == expected


@pytest.mark.parametrize(
    ("code", "worked", "begun", "written"),
    [(2, False, False, 0), (2, True, False, 1), (2, False, True, 1), (0, False, False, 1)],
)
def test_a_run_that_was_refused_before_it_began_has_no_record(
    code: int, worked: bool, begun: bool, written: int, job: Any
) -> None:
    begins: List[bool] = []
    job._begin = lambda: begins.append(True)
    job._has_begun = begun
    if worked:
        job._run.working.set()
    job.end(code, "failed")
    assert len(job.written) == written
    assert len(begins) == (written and not begun)
    assert job._over.is_set() and job._run.working.is_set()


@pytest.mark.parametrize(("events", "verbosity"), [(True, 0), (False, -1)])
def test_programs_and_the_quiet_get_no_block(events: bool, verbosity: int, job: Any) -> None:
    job._reporter.sends_events, job._reporter.verbosity = events, verbosity
    job.end(6, "failed")
    assert [kind for kind, *_ in job.said] == ["log", "event"]


def test_a_record_that_cannot_be_written_is_told_once(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfship.base.errors import DiskError

    def refuse(*_: Any) -> None:
        raise DiskError("the disk is full", "", "")

    wrote = keeper.write_job
    monkeypatch.setattr("hfship.ops.keeper.write_job", refuse)
    for _ in range(3):
        job._write(job._record)
    monkeypatch.setattr("hfship.ops.keeper.write_job", wrote)
    job._write(job._record)
    monkeypatch.setattr("hfship.ops.keeper.write_job", refuse)
    job._write(job._record)
    warned = [text for kind, text in job.said if kind == "warn"]
    assert len(warned) == 2 and warned[0].startswith("the disk is full; the work goes on")


@pytest.mark.parametrize("let_go_s", [0.0, 0.05, 1e9])
def test_a_folder_is_locked_if_that_comes_soon(
    let_go_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slept = [50.0], [0.0]
    theirs, ours, third = (os.open(tmp_path, os.O_RDONLY) for _ in range(3))
    if let_go_s:
        fcntl.flock(theirs, fcntl.LOCK_EX)

    def sleep(seconds: float) -> None:
        now[0] += seconds
        slept[0] += seconds
        if slept[0] >= let_go_s:
            fcntl.flock(theirs, fcntl.LOCK_UN)

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr("hfship.ops.keeper.time", clock)
    keeper._lock_for_a_while(ours)
    if let_go_s < 1e9:
        assert slept[0] < let_go_s + 0.03
    else:
        assert keeper.NAMING_S <= slept[0] < keeper.NAMING_S + 0.03, "it goes on without"
    with pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for fd in (theirs, ours):
        os.close(fd)
    fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(third)


def test_a_folder_that_cannot_be_locked_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: List[int] = []

    def refuse(fd: int, _: int) -> None:
        tried.append(fd)
        raise OSError(38, "not implemented")

    monkeypatch.setattr("hfship.ops.keeper.fcntl.flock", refuse)
    keeper._lock_for_a_while(7)
    assert tried == [7]
