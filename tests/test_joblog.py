"""The log of a job as it is shown: which lines, of which runs, until when."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List, Optional

import pytest

from hfship.base.errors import NotFoundError
from hfship.ops import joblog as room
from hfship.ops.joblog import follow_log
from hfship.ops.jobs import Job, JobRecord, write_job


def line(second: int, message: str) -> str:
    return f"1970-01-01T00:00:{second:02}Z INFO    pack-m -: {message}\n"


FIRST = line(1, "began: hfship pack m") + line(2, "one") + line(3, "summary: exit 4 (failed)")
LAST = line(10, "began: hfship pack m") + line(11, "two") + line(12, "three \x1b[31m")


class Said:
    """A reporter that keeps the message of each line that it shows."""

    def __init__(self) -> None:
        self.lines: List[str] = []

    def show(self, text: str) -> None:
        assert text.endswith("\n") and "\x1b" not in text
        self.lines.append(text.partition(" -: ")[2].rstrip("\n"))


@pytest.fixture
def said() -> Any:
    return Said()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "pack-m.log.1").write_text(FIRST)
    (tmp_path / "pack-m.log").write_text(LAST)
    record = JobRecord("pack-m", began_at=10.0, state="done")
    write_job(tmp_path, record)
    return Job(record, tmp_path, os.geteuid(), "done")


@pytest.mark.parametrize(
    "tail, since, count, first",
    [
        ("all", None, 3, "began: hfship pack m"),
        ("2", None, 2, "two"),
        ("0", None, 0, ""),
        ("99", None, 3, "began: hfship pack m"),
        ("all", 2.0, 5, "one"),
        ("all", 11.0, 2, "two"),
        ("all", 50.0, 0, ""),
    ],
)
def test_the_last_run_is_shown_or_what_was_done_since(
    tail: str, since: Optional[float], count: int, first: str, job: Job, said: Any
) -> None:
    follow_log(job, False, tail, since, said)
    assert len(said.lines) == count and (said.lines or [""])[0].startswith(first)


def test_a_log_that_is_not_there_is_told(job: Job, said: Any) -> None:
    job.log.unlink()
    with pytest.raises(NotFoundError, match="there is no log of pack-m") as caught:
        follow_log(job, False, "all", None, said)
    assert caught.value.why == f"{job.log} is not there"
    job.log.mkdir()
    with pytest.raises(NotFoundError) as caught:
        follow_log(job, False, "all", None, said)
    assert caught.value.why != f"{job.log} is not there"


def test_a_log_of_another_user_is_not_shown(job: Job, said: Any) -> None:
    """Nor are older parts of it."""
    theirs = job._replace(uid=job.uid + 1)
    with pytest.raises(NotFoundError) as caught:
        follow_log(theirs, False, "all", None, said)
    assert "of another user" in caught.value.why
    if os.geteuid() == 0:
        os.chown(job.folder / "pack-m.log.1", 4242, 4242)
        follow_log(job, False, "all", 0.0, said)
        assert len(said.lines) == 3


class Rounds:
    """What happens while a log is followed, at each pause."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.runs = True

    def sleep(self, _: float) -> None:
        self.steps.pop(0)()


def followed(job: Job, said: Any, monkeypatch: Any, rounds: Rounds) -> List[str]:
    monkeypatch.setattr(room, "_runs", lambda _: rounds.runs)
    monkeypatch.setattr(room.time, "sleep", rounds.sleep)
    follow_log(job, True, "1", None, said)
    assert not rounds.steps
    return said.lines[1:]


def test_a_log_is_followed_until_its_job_ends(job: Job, said: Any, monkeypatch: Any) -> None:
    def more(text: str, ends: bool = False) -> Any:
        def step() -> None:
            with job.log.open("a") as stream:
                stream.write(line(20, text))
            rounds.runs = not ends

        return step

    rounds = Rounds(more("four"), lambda: None, more("five", ends=True), lambda: None)
    assert followed(job, said, monkeypatch, rounds) == ["four", "five"]


def test_a_log_that_is_rotated_is_followed_into_the_new_one(
    job: Job, said: Any, monkeypatch: Any
) -> None:
    def rotate() -> None:
        with job.log.open("a") as stream:
            stream.write(line(20, "the last of the old"))
        job.log.rename(job.log.with_name("pack-m.log.1"))
        job.log.write_text(line(21, "the first of the new"))

    def end() -> None:
        rounds.runs = False

    rounds = Rounds(rotate, lambda: None, end)
    lines = followed(job, said, monkeypatch, rounds)
    assert lines == ["the last of the old", "the first of the new"]


def test_ctrl_c_is_the_way_out(job: Job, said: Any, monkeypatch: Any) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    assert followed(job, said, monkeypatch, Rounds(stop)) == []


@pytest.mark.parametrize("state, runs", [("running", True), ("done", False)])
def test_whether_a_job_of_that_name_runs_is_looked_up(
    state: str, runs: bool, job: Job, monkeypatch: Any
) -> None:
    other = Job(JobRecord("other"), job.folder, job.uid, "running")
    now = job._replace(state=state)
    monkeypatch.setattr(
        room, "read_jobs", lambda folders: [other, now] if folders == [job.folder] else []
    )
    assert room._runs(job) == runs
    monkeypatch.setattr(room, "read_jobs", lambda _: [other])
    assert room._runs(job) is False


def test_of_a_log_that_is_larger_than_ours_the_end_is_read(
    job: Job, said: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(room, "_LARGEST_LOG", len(LAST))
    job.log.write_text("x" * 1000 + "\n" + LAST)
    with job.log.open("rb") as stream:
        assert room._last_lines(stream) == LAST.encode().splitlines()


def test_who_does_not_follow_waits_for_nothing(job: Job, said: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(room, "_runs", lambda _: True)
    monkeypatch.setattr(room.time, "sleep", lambda _: pytest.fail("it waits"))
    follow_log(job, False, "1", None, said)
    assert said.lines == ["three ?[31m"], "nothing that a terminal would obey"


def test_what_is_no_text_is_shown_as_far_as_it_is_one(job: Job, said: Any) -> None:
    job.log.write_bytes(LAST.encode() + line(13, "a").encode()[:-1] + b"\xff\n")
    follow_log(job, False, "1", None, said)
    assert said.lines[0].startswith("a")


def test_a_log_that_is_gone_was_rotated(job: Job) -> None:
    with job.log.open("rb") as stream:
        assert not room._was_rotated(stream, job.log)
        job.log.unlink()
        assert room._was_rotated(stream, job.log)
