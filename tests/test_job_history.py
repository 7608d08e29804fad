"""Jobs after a year: what watch shows of many, which run a log shows, which job a resumed run is, what is removed."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Program
from hfship.base.eventlog import event_line
from hfship.commands.options import past_time
from hfship.ops.joblog import last_run, lines_since
from hfship.ops.jobs import (
    Job,
    JobRecord,
    free_name,
    new_record,
    our_ended_jobs,
    read_job,
    remove_job,
    write_job,
)
from hfship.ops.watch import FEW_JOBS, by_need, few_of, watch_lines

DAY_S = 86400.0


def a_job(name: str, state: str, age_s: float = 0.0, code: Optional[int] = None) -> Job:
    record = JobRecord(name=name, updated_at=1000 * DAY_S - age_s, exit_code=code)
    return Job(record, Path("/x"), os.geteuid(), state)


def a_record(name: str, words: str = "fetch org/x --background", **fields: Any) -> JobRecord:
    return replace(new_record(name, words.split(), True, {}), **fields)


# ---- what watch shows


STATES = st.sampled_from(["running", "failed", "interrupted", "done", "stopped"])


@given(st.lists(STATES, max_size=40))
def test_nothing_that_needs_a_look_is_left_out(states: List[str]) -> None:
    jobs = by_need([a_job(f"j{n}", state, n) for n, state in enumerate(states)])
    shown = few_of(jobs)
    needs = [job for job in jobs if job.state in ("running", "failed", "interrupted")]
    assert shown[: len(needs)] == needs and jobs[: len(shown)] == shown
    assert len(shown) == len(needs) + min(FEW_JOBS, len(jobs) - len(needs))


def test_running_and_failed_jobs_come_first_then_the_last_few() -> None:
    old = [a_job(f"old{n}", "done", n) for n in range(20)]
    jobs = by_need([*old, a_job("bad", "failed", 99, 7), a_job("busy", "running")])
    lines = watch_lines(jobs, 1000 * DAY_S, 80, 50, with_older=False)
    names = [line.split()[0] for line in lines[3:10]]
    assert names == ["busy", "bad", "old0", "old1", "old2", "old3", "old4"], lines
    assert lines[10].startswith("and 15 older: ") and lines[10].endswith("watch --all")
    every = watch_lines(jobs, 1000 * DAY_S, 80, 50)
    assert sum("old" in line.split()[0] for line in every if line) == 20
    assert not [line for line in every if "older" in line]


def test_what_failed_is_told_to_its_end() -> None:
    what = "cannot unpack m: /data/models/huggingface has 12.4 GB free, 229.5 GB needed"
    job = a_job("unpack-m", "failed", 9, 7)
    job = job._replace(record=replace(job.record, error={"what": what}))
    lines = watch_lines([job], 1000 * DAY_S, 60, 24)
    assert lines[-2:] == [
        "unpack-m: cannot unpack m: /data/models/huggingface has 12.4",
        "  GB free, 229.5 GB needed",
    ]


def test_older_jobs_come_on_all_and_always_as_json(hfship: Program) -> None:
    folder = hfship.home / "logs/hfship"
    folder.mkdir(parents=True)
    now = time.time()
    for number in range(9):
        write_job(folder, a_record(f"fetch-{number}", state="done", updated_at=now - number))
    write_job(folder, a_record("fetch-bad", state="failed", exit_code=6, updated_at=now - 1e6))
    few = hfship("watch", "--once").stdout
    assert re.findall(r"(?m)^fetch-(\w+)  ", few) == ["bad", "0", "1", "2", "3", "4"]
    assert "and 4 older: " in few
    assert len(re.findall(r"(?m)^fetch-", hfship("watch", "--once", "--all").stdout)) == 10 + 1
    assert len(json.loads(hfship("watch", "--json").stdout)) == 10
    in_a_pipe = hfship("watch").stdout.splitlines()
    assert [line.split()[1] for line in in_a_pipe][0] == "fetch-bad:" and len(in_a_pipe) == 6
    assert len(hfship("watch", "--all").stdout.splitlines()) == 10


# ---- which job a resumed run is


# (name, words, state, exit code) of the records that are there -> the name of a run of `fetch org/x`
HISTORIES: Dict[str, Any] = {
    "nothing": ([], "fetch-x"),
    "itself": ([("fetch-x", "fetch org/x", "interrupted", None)], "fetch-x"),
    # It was the second of the name when it was killed, and the first has ended since.
    "the second": (
        [("fetch-x", "fetch b/x", "done", 0), ("fetch-x-2", "fetch org/x", "interrupted", None)],
        "fetch-x-2",
    ),
    "in the background": (
        [
            ("fetch-x", "fetch b/x", "stopped", 130),
            ("fetch-x-2", "fetch org/x --background", "failed", 8),
        ],
        "fetch-x-2",
    ),
    "the second ended": (
        [("fetch-x", "fetch b/x", "done", 0), ("fetch-x-2", "fetch org/x", "done", 0)],
        "fetch-x",
    ),
    "of other words": (
        [("fetch-x", "fetch b/x", "done", 0), ("fetch-x-2", "fetch c/x", "interrupted", None)],
        "fetch-x",
    ),
    "of another model": ([("fetch-xy-2", "fetch org/x", "interrupted", None)], "fetch-x"),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_a_resumed_run_is_the_same_job(history: str, tmp_path: Path) -> None:
    there, name = HISTORIES[history]
    for old, words, state, code in there:
        write_job(tmp_path, a_record(old, words, state=state, exit_code=code))
    assert free_name(tmp_path, a_record("fetch-x", "fetch org/x")) == name


# ---- what --resume-all says


def test_resume_all_says_what_it_left_and_why(hfship: Program) -> None:
    folder = hfship.home / "logs/hfship"
    folder.mkdir(parents=True)
    assert "nothing to resume" in hfship("watch", "--resume-all").stderr
    for name, fields in {
        "a-failed": {"state": "failed", "exit_code": 6},
        "b-elsewhere": {"state": "interrupted", "host": "gpu7"},
        "c-foreground": {"state": "interrupted", "background": False},
        "d-done": {"state": "done"},
        "e-runs": {},
    }.items():
        write_job(folder, a_record(name, **fields))
    done = hfship("watch", "--resume-all")
    said = sorted(done.stderr.splitlines())
    assert done.stdout == "" and len(said) == 5, said
    assert said[0].startswith("a-failed failed with 6, and is left to you: ")
    assert said[1] == "b-elsewhere is resumed on gpu7, where it ran"
    assert said[2].startswith("c-foreground ran in the foreground, and is left to you: ")
    assert said[3:] == ["e-runs runs", "nothing to resume"]


# ---- which lines a log shows


def log_lines(*events: str) -> List[bytes]:
    """Lines of a log: each event is `SECONDS MESSAGE`, or rows of a summary."""
    lines = []
    for text in events:
        second, _, message = text.partition(" ")
        event = {"time": f"2026-01-31T04:05:{second}Z", "level": "info", "job": "pack-a"}
        event.update(stage="", message=message)
        if message == "summary":
            event.update(rows={"exit": "0 (done)", "log": "x"})  # type: ignore[dict-item]
        lines += event_line(event).encode().splitlines()
    return lines


BASE_S = 1769832300.0  # 2026-01-31T04:05:00Z

# events of the log, when the last run began (seconds behind BASE_S) -> the first event of that run
LOGS: Dict[str, Any] = {
    "one run": (["01 began: hfship pack a", "02 x", "03 summary"], 1.2, 0),
    "two": (["01 began: a", "02 summary", "07 began: b", "09 summary"], 7.9, 2),
    "said before it began": (["01 began: a", "02 summary", "07 hi", "08 began: b"], 7.0, 2),
    "in the same second": (["01 began: a", "07 summary", "07 hi", "07 began: b"], 7.5, 2),
    "killed before": (["01 began: a", "02 x", "07 began: b"], 7.5, 2),
    "began in a message": (["01 began: a", "02 it began: c", "03 summary"], 1.0, 0),
    "no such time": (["01 began: a", "02 summary"], 50.0, 0),
    "nothing": ([], 1.0, 0),
}


@pytest.mark.parametrize("log", LOGS)
def test_the_last_run_of_a_log(log: str) -> None:
    events, began_s, first = LOGS[log]
    assert last_run(log_lines(*events), BASE_S + began_s) == log_lines(*events[first:])


def test_the_last_run_of_a_log_in_json() -> None:
    lines = [
        json.dumps({"time": f"2026-01-31T04:05:0{n}Z", "level": "info", "message": message})
        for n, message in enumerate(["began: a", "summary", "hi", "began: b", "x"])
    ]
    encoded = [line.encode() for line in lines]
    assert last_run(encoded, BASE_S + 2) == encoded[2:]
    assert lines_since(encoded, BASE_S + 4) == encoded[4:]


@given(st.lists(st.binary(max_size=60), max_size=20), st.floats(0, 4e9))
def test_any_log_is_cut_somewhere(lines: List[bytes], began_at: float) -> None:
    assert last_run(lines, began_at) == lines[len(lines) - len(last_run(lines, began_at)) :]


# what is typed -> seconds ago, or since the epoch
TIMES = {
    "2h": (7200, None),
    "7d": (7 * DAY_S, None),
    "0s": (0, None),
    "2026-01-31": (None, 1769817600),
    "2026-01-31T04:05": (None, 1769832300),
    "2026-01-31 04:05": (None, 1769832300),
    "2026-01-31T04:05:06Z": (None, 1769832306),
}


@pytest.mark.parametrize("typed", TIMES)
def test_times_are_read(typed: str) -> None:
    age_s, at = TIMES[typed]
    assert past_time(typed) == pytest.approx(time.time() - age_s if at is None else at, abs=2)


@pytest.mark.parametrize("typed", ["", "2", "yesterday", "-2h", "2026-13-01", "2026-01-31T04", "h"])
def test_what_is_no_time_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        past_time(typed)


def test_logs_show_the_last_run_and_more_when_asked(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        hfship("pack", model, "-o", tmp_path)
    log = (hfship.home / "logs/hfship/pack-tiny.log").read_text()
    assert log.count("began: ") == 2
    shown = hfship("logs", "pack-tiny").stdout
    assert shown.count("began: ") == 1 and log.endswith(shown) and "already" in shown
    assert hfship("logs", "pack-tiny", "-n", 2).stdout == "".join(
        log.splitlines(keepends=True)[-2:]
    )
    assert hfship("logs", "pack-tiny", "--since", "1h").stdout == log
    assert hfship("logs", "pack-tiny", "--since", "2090-01-01").stdout == ""
    assert "is not a time" in hfship("logs", "pack-tiny", "--since", "soon", code=2).stderr


# ---- clean --jobs


def test_clean_removes_jobs_that_have_ended_and_no_others(hfship: Program) -> None:
    folder = hfship.home / "logs/hfship"
    folder.mkdir(parents=True)
    now = time.time()
    for name, fields in {
        "done": {"state": "done", "updated_at": now - 9 * DAY_S},
        "failed": {"state": "failed", "exit_code": 6, "updated_at": now - 2 * DAY_S},
        "waits": {"state": "interrupted", "updated_at": now - 9 * DAY_S},
        "runs": {},
    }.items():
        write_job(folder, a_record(name, **fields))
        (folder / f"{name}.log").write_text("x" * 1000)
        (folder / f"{name}.log.1").write_text("x" * 1000)
    (folder / "not-ours.log").write_text("x")
    shown = hfship("clean", "--jobs", "--dry-run")
    assert "6 " in shown.stdout and "would free" in shown.stdout and "waits" in shown.stderr
    assert "no terminal" in hfship("clean", "--jobs", code=2).stderr
    row = json.loads(hfship("clean", "--jobs", "--older-than", "7d", "--yes", "--json").stdout)
    assert row["removed"] == 1 and row["freed"] == row["bytes"] > 2000
    left = sorted(path.name for path in folder.iterdir())
    assert "done.json" not in left and "failed.json" in left
    assert "removed 1 job, freed" in hfship("clean", "--jobs", "-y").stdout
    names = [f"{name}{end}" for name in ("runs", "waits") for end in (".json", ".log", ".log.1")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "not-ours.log"])
    assert hfship("clean", "--jobs", "-y").stdout == "nothing to clean\n"
    assert "records and logs alone" in hfship("clean", "--jobs", "/x", code=2).stderr


def test_a_name_that_a_new_run_has_taken_is_not_removed(tmp_path: Path) -> None:
    write_job(tmp_path, a_record("fetch-x", state="done"))
    (tmp_path / "fetch-x.log").write_text("x")
    (seen,) = our_ended_jobs(tmp_path)
    write_job(tmp_path, a_record("fetch-x", state="done", done=1))
    assert not remove_job(seen) and (tmp_path / "fetch-x.log").exists()
    assert remove_job(read_job(tmp_path / "fetch-x.json")) and not list(tmp_path.iterdir())
