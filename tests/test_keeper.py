# SPDX-License-Identifier: Apache-2.0
"""What the record of a job says while it runs and at its end; test_jobs.py has jobs."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import DiskError, NetworkError
from hfship.base.values import replace
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
    assert amounts(job._now(stage("hashing", 4, unit="files")))[:2] == ["files", 4]
    assert amounts(job._now(None)) == ["B", 1200, 2000, 18, 6, 0]  # as far as the last one came


def test_the_rate_is_that_of_late(job: Any) -> None:
    running = stage("fetching", 0, skipped=100)
    rates = []
    for seconds, done in ((0, 100), (1, 150), (2, 300), (4, 500), (5, 400)):
        job.now, running.done = 100.0 + seconds, done
        rates.append(job._rate(running))
    assert rates == [7, 7, 100, 100, 60]
    running.skipped, running.done = 1100, 1400  # what is there already is no work
    assert job._rate(running) == 60
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


def test_a_record_is_kept_while_the_work_goes_on(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written when something changed, and else as often as shows that it lives; the log has the
    progress now and then, while there is a stage."""
    running = stage("fetching", 0)
    # Seconds on the clock, bytes, and whether a stage is under way.
    looks = [
        (1, 0, True),
        (2, 100, True),
        (3, 100, True),
        (12, 100, True),  # LEASE_BEAT_S are 10
        (14, 100, True),
        (31, 100, True),
        (32, 100, False),
        (33, 100, False),
        (61, 100, True),
        (62, 200, True),
    ]
    written: List[float] = []
    logged: List[Any] = []
    rounds = iter(looks)
    waits: List[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        look = next(rounds, None)
        if look is None:
            return True
        job.now = 100.0 + look[0]
        running.done = look[1]
        job._run.stages = ["an outer one", running] if look[2] else []
        return False

    def write(_: Path, record: Any) -> None:
        written.append(job.now - 100.0)

    job._run.past = []
    job._run.working.set()
    job._over = SimpleNamespace(wait=wait, is_set=lambda: False)
    job._begin = lambda: written.append(-1.0)
    job._rate = lambda _: 5
    job._reporter.log_progress = lambda one: logged.append((job.now - 100.0, one))
    monkeypatch.setattr("hfship.ops.keeper.write_job", write)
    job._record = replace(job._record, updated_at=1100.0)
    job._keep()
    assert set(waits) == {keeper.RECORD_INTERVAL_S} and len(waits) == len(looks) + 1
    assert logged == [(31, running), (62, running)]
    assert written == [-1.0, 1, 2, 14, 31, 32, 61, 62]


def test_a_run_that_is_over_before_it_began_keeps_nothing(job: Any) -> None:
    waited: List[float] = []
    begun: List[int] = []
    job._run.working = SimpleNamespace(wait=waited.append)
    job._begin = lambda: begun.append(1)
    job._over.set()
    job._keep()
    assert waited == [keeper.START_WAIT_S] and not begun


# -- how it begins


@pytest.fixture
def beginning(job: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job that has not begun; what was done on the way, in order."""
    done: List[Any] = []
    job.done, job._has_begun, job._form = done, False, "json"
    job._reporter.name_job = lambda name: done.append(("named", name))
    job._reporter.open_log = lambda path, form: done.append(("log", path, form))
    monkeypatch.setattr(keeper, "expire_jobs", lambda folder: done.append(("expired", folder)))
    monkeypatch.setattr(keeper, "_lock_for_a_while", lambda fd: done.append(("locked", fd > 2)))
    monkeypatch.setattr(keeper, "free_name", lambda _, record: f"{record.name}.2")
    system = SimpleNamespace(dup2=lambda *fds: done.append(("dup2", *fds)), fdopen=os.fdopen)
    monkeypatch.setattr(keeper, "os", system)
    return job


def test_a_job_takes_a_name_and_opens_its_log(beginning: Any, tmp_path: Path) -> None:
    beginning._folder = tmp_path / "logs/hfship"
    beginning._begin()
    folder = beginning._folder
    assert beginning.done == [
        ("locked", True),
        ("named", "fetch-m.2"),
        ("expired", folder),
        ("log", folder / "fetch-m.2.log", "json"),
    ]
    (record,) = beginning.written
    assert (record.name, record.stage, record.updated_at) == ("fetch-m.2", "fetching", 1100.0)
    assert beginning._has_begun and folder.is_dir()
    assert beginning.said == [("log", ("info", "began: hfship fetch o/m"), {})]


def test_a_detached_job_tells_its_name_and_lets_go_of_the_terminal(beginning: Any) -> None:
    ours, beginning._pipe = os.pipe()
    beginning._begin()
    assert beginning.done[-1] == ("dup2", 1, 2)
    with os.fdopen(ours) as stream:
        assert stream.read() == "fetch-m.2", "and the pipe is closed"


def test_nobody_may_wait_for_the_name(beginning: Any) -> None:
    ours, beginning._pipe = os.pipe()
    os.close(ours)
    beginning._begin()
    assert beginning._has_begun


@pytest.mark.parametrize(
    ("where", "error", "what"),
    [
        ("expire_jobs", DiskError("the disk is full", "", ""), "the disk is full"),
        ("free_name", PermissionError(13, "Permission denied"), "cannot write the log in"),
    ],
)
def test_without_a_log_the_work_goes_on(
    where: str, error: Exception, what: str, beginning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(keeper, where, refuse)
    ours, beginning._pipe = os.pipe()
    beginning._begin()
    warned = [text for kind, text, *_ in beginning.said if kind == "warn"]
    assert len(warned) == 1 and warned[0].startswith(what)
    assert warned[0].endswith("; the work goes on, but `hfship watch` does not see it")
    with os.fdopen(ours) as stream:
        assert stream.read().startswith("fetch-m"), "who waits goes on, too"


@pytest.mark.parametrize(
    ("code", "failure", "told"),
    [
        (8, NetworkError("no network", "why", "again"), True),
        (8, None, False),
        (0, NetworkError("no network", "why", "again"), False),
    ],
)
def test_who_waits_for_a_job_is_told_why_there_is_none(
    code: int, failure: Any, told: bool, beginning: Any
) -> None:
    ours, beginning._pipe = os.pipe()
    beginning._run.failure = failure
    beginning.end(code, "failed")
    if code and not told:
        os.close(beginning._pipe)  # nobody said anything
    with os.fdopen(ours) as stream:
        said = stream.read()
    if told:
        row = json.loads(said)
        assert row["error"]["what"] == "no network" and row["exit_code"] == 8
        assert not beginning.written
    else:
        assert said == ("" if code else "fetch-m.2")


# -- the block at its end


ROWS = ("command", "result", "speed", "moved", "took", "exit", "why", "next", "log")


@pytest.mark.parametrize(
    ("code", "command", "took", "verbosity", "shown"),
    [
        (0, "pack", 60, 0, "moved took next log"),
        (0, "fetch", 60, 0, "took next log"),
        (0, "push", 60, 0, "took next log"),
        (0, "pack", keeper.PLAIN_INTERVAL_S, 0, "moved took next log"),
        (0, "pack", keeper.PLAIN_INTERVAL_S - 1, 0, "next log"),
        (6, "pack", 60, 0, "moved took log"),
        (0, "fetch", 1, 1, "command result moved took exit next log"),
        (6, "pack", 1, 1, "command result moved took exit log"),
    ],
)
def test_a_terminal_does_without_what_was_said_there(
    code: int, command: str, took: float, verbosity: int, shown: str
) -> None:
    left_out = keeper._left_out(code, command, took, verbosity)
    assert [row for row in ROWS if row not in {*left_out, "speed"}] == shown.split()


def test_the_whole_block(job: Any) -> None:
    """In the log all rows, for programs, too; on a terminal the speed comes first."""
    job._run.past = [stage("packing", 4_000_000, skipped=2_000_000)]
    job._record = replace(job._record, command="pack", began_at=1000.0, words=("pack", "m"))
    job._summarize(0)
    (_, words, logged), (_, event, fields), (_, text) = job.said
    rows = {
        "command": "hfship pack m",
        "result": "one; two",
        "moved": "packing 2.0 MB in 2.0 s (1.0 MB/s)",
        "took": "1 min 40 s",
        "exit": "0 (running)",
        "next": "hfship verify x",
        "log": f"{job._folder}/fetch-m.log",
    }
    assert (words, logged) == (("info", "summary"), {"rows": rows})
    assert (event, fields) == (("summary",), rows)
    labels = [line.split()[0] for line in text.splitlines()]
    assert labels == ["speed", "took", "next", "log"]
    assert text.splitlines()[0] == "  speed packing 2.0 MB in 2.0 s (1.0 MB/s)"


def test_secrets_are_in_no_row_of_the_block(job: Any) -> None:
    job._reporter.redacted = lambda rows: dict.fromkeys(rows, "***")
    job._summarize(0)
    (_, _, logged), (_, _, fields), (_, text) = job.said
    assert set(logged["rows"].values()) == set(fields.values()) == {"***"} and "***" in text


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([], []),
        ([stage("a", 100, unit="files"), stage("a", 50, skipped=50)], []),
        (
            [stage("a", 3000, seconds=1.0), stage("b", 10), stage("a", 2000, skipped=1000)],
            ["a 4.0 kB in 3.0 s (1.3 kB/s)", "b 10 B in 2.0 s (5 B/s)"],
        ),
        ([stage("a", 1000, seconds=0.0)], ["a 1.0 kB in less than 0.1 s (1.0 MB/s)"]),
    ],
)
def test_what_was_moved_is_said_by_the_name_of_the_stage(
    stages: List[Any], said: List[str]
) -> None:
    assert keeper.speeds_of(stages) == said


def test_a_keeper_begins_by_itself_and_ends_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: List[Any] = []
    monkeypatch.setattr(JobKeeper, "_keep", lambda _: kept.append(threading.current_thread()))
    reporter: Any = SimpleNamespace(run=SimpleNamespace())
    made = JobKeeper(reporter, tmp_path, new_record("x", ["fetch"], False, {}), "text")
    made._thread.join(60)
    assert kept == [made._thread] and made._thread.daemon and made._thread.name == "job"
    assert (made._pipe, made._has_begun, made._is_broken) == (-1, False, False)
    assert made._looks.maxlen == RATE_LOOKS
