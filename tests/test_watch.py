"""The full screen on which jobs are watched: keys, frames, and the terminal as it was."""

from __future__ import annotations

import contextlib
import json
import os
import pty
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from hfship.ops import watch as room
from hfship.ops.jobs import Job, JobRecord
from hfship.ops.watch import frame_text, full_screen


class Shown:
    """A reporter that keeps what it writes to the terminal."""

    def __init__(self) -> None:
        self.texts: List[str] = []

    def show(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def terminal() -> Iterator[Tuple[int, int]]:
    """(what a person types into, what hfship reads): in the place of its stdin."""
    person, ours = pty.openpty()
    before = os.dup(0)
    os.dup2(ours, 0)
    yield person, ours
    os.dup2(before, 0)
    for fd in (before, person, ours):
        os.close(fd)


def test_keys_come_one_by_one_and_the_terminal_is_as_it_was(terminal: Tuple[int, int]) -> None:
    person, ours = terminal
    before = room.termios.tcgetattr(ours)
    shown: Any = Shown()
    with full_screen(shown) as key:
        assert room.termios.tcgetattr(ours) != before, "no key waits for Enter"
        assert key(0.0) == ""
        os.write(person, b"q")
        assert key(60.0) == "q"
        assert shown.texts == ["\x1b[?1049h\x1b[?25l"]
    assert room.termios.tcgetattr(ours) == before
    assert shown.texts[1:] == ["\x1b[?25h\x1b[?1049l"]


def test_after_a_failure_the_terminal_is_as_it_was(terminal: Tuple[int, int]) -> None:
    _, ours = terminal
    before = room.termios.tcgetattr(ours)
    shown: Any = Shown()
    with pytest.raises(KeyboardInterrupt), full_screen(shown):
        raise KeyboardInterrupt
    assert room.termios.tcgetattr(ours) == before and len(shown.texts) == 2


def test_without_a_terminal_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: List[float] = []
    monkeypatch.setattr(room.os, "isatty", lambda _: False)
    monkeypatch.setattr(room.time, "sleep", slept.append)
    with full_screen(Shown()) as key:  # type: ignore[arg-type]
        assert key(2.5) == "" and slept == [2.5]


@pytest.mark.parametrize(
    "lines, height, rows",
    [
        (["one", "a line that is long"], 4, ["one", "a line tha", "", "q quits"]),
        (["one", "two", "three"], 3, ["one", "two", "q quits"]),
        ([], 1, ["q quits"]),
    ],
)
def test_a_frame_fills_the_screen(lines: List[str], height: int, rows: List[str]) -> None:
    text = frame_text(lines, "q quits", 10, height)
    assert text.startswith("\x1b[H") and text.endswith("\x1b[J")
    body = text[len("\x1b[H") : -len("\x1b[J")]
    assert body.split("\n") == [f"{row}\x1b[K" for row in rows]


@pytest.mark.parametrize("height, has_jobs", [(3, False), (4, True)])
def test_a_small_screen_has_the_keys_alone(
    height: int, has_jobs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(jobs: Any, now: float, width: int, room_for: int, with_older: bool) -> List[str]:
        assert (jobs, width, room_for, with_older) == ((), 80, height - 2, True) and now > 0
        return ["a job"]

    monkeypatch.setattr(room, "watch_lines", lines)
    frame = room._frame((), 80, height, True)
    assert ("a job" in frame) == has_jobs and "q quits" in frame
    assert frame.count("\n") == height - 1


def test_a_shows_all_and_q_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["", "a", "x", "aq"]
    waited: List[float] = []

    def key(seconds: float) -> str:
        waited.append(seconds)
        return keys.pop(0)

    @contextlib.contextmanager
    def screen(_: Any) -> Iterator[Any]:
        yield key

    shown: Any = Shown()
    shown.out = SimpleNamespace(fileno=lambda: 7)
    size = {7: os.terminal_size((0, 0))}  # as some consoles say
    monkeypatch.setattr(room, "full_screen", screen)
    monkeypatch.setattr(room.os, "get_terminal_size", lambda fd: size[fd])
    monkeypatch.setattr(room, "_frame", lambda *given: str(given[1:]))
    room.watch_on_screen(lambda: (), 2.0, False, shown)
    assert shown.texts == [f"(80, 80, {older})" for older in (False, False, True, True)]
    assert waited == [2.0] * 4 and not keys


def test_a_row_for_programs_has_the_state_as_it_is_now() -> None:
    job = Job(JobRecord("pack-m", state="running"), Path("/logs"), os.geteuid(), "interrupted")
    row = room.job_row(job)
    assert (row["name"], row["state"], row["user"]) == ("pack-m", "interrupted", job.user)
    assert (row["log"], row["seconds_left"]) == ("/logs/pack-m.log", None)


# -- the table


NOW = 10_000.0


def a_job(name: str, state: str = "running", uid: int = os.geteuid(), **fields: Any) -> Job:
    return Job(JobRecord(name, updated_at=NOW - 90, **fields), Path("/logs"), uid, state)


FETCH: Dict[str, Any] = {"stage": "fetch", "total": 1000, "done": 300, "files": 9, "finished": 3}


@pytest.mark.parametrize(
    ("job", "cells"),
    [
        (a_job("x", **FETCH, rate=100.0), "fetch|3/9|   300 B| 30 %|   100 B/s|7s left"),
        (a_job("x", **FETCH), "fetch|3/9|   300 B| 30 %||"),
        (
            a_job("x", **{**FETCH, "files": 0}, unit="files", rate=2.0),
            "fetch||     300| 30 %||5m50s left",
        ),
        (a_job("x", **{**FETCH, "done": 2000}, rate=9.0), "fetch|3/9|  2.0 kB|100 %|     9 B/s|"),
        (a_job("x", stage="waiting"), "waiting|||||"),
        (a_job("x", stage="\x1b[31m"), "?[31m|||||"),
        (a_job("x", "failed", exit_code=8), "failed 8|||||1m30s ago"),
        (a_job("x", "stopped", exit_code=8), "stopped|||||1m30s ago"),
    ],
)
def test_the_cells_of_a_job(job: Job, cells: str) -> None:
    found = [cell.rstrip() if cell.strip() else "" for cell in room.job_cells(job, NOW)]
    assert len(found) == len(room._WATCH_HEADER)
    assert "|".join(found) == cells


def test_cells_are_as_wide_as_ever() -> None:
    empty = room.job_cells(a_job("x"), NOW)
    full = room.job_cells(a_job("x", **FETCH, rate=100.0), NOW)
    assert [len(cell) for cell in empty[2:5]] == [8, 0, 10]
    assert [len(cell) for cell in full[2:5]] == [8, 5, 10]
    early = room.job_cells(a_job("x", "done"), NOW - 1000)
    assert early[5] == "0s ago", "by a clock that was set back"


MIXED = [
    a_job("busy", stage="fetch", rate=2000.0),
    a_job("count", stage="hash", unit="files", rate=9.0),
    a_job("bad", "failed", exit_code=8, error={"what": "no \x1bnetwork"}, background=True),
    a_job("cut", "interrupted"),
    *(a_job(f"old{number}", "done") for number in range(7)),
]


@pytest.mark.parametrize(
    ("jobs", "with_older", "height", "names", "ends"),
    [
        (MIXED[:2], True, 24, "busy count", []),
        (MIXED, True, 24, "busy count bad cut old0 old1 old2 old3 old4 old5 old6", ["failed"]),
        (
            MIXED,
            False,
            24,
            "busy count bad cut old0 old1 old2 old3 old4",
            ["and 2 older: hfship watch --all", "failed"],
        ),
        (MIXED, True, 12, "busy count bad cut old0 old1", ["and 5 more", "failed"]),
        (
            MIXED,
            False,
            12,
            "busy count bad cut old0 old1",
            ["and 3 more", "and 2 older: hfship watch --all"],
        ),
        (MIXED, True, 3, "", []),
        (MIXED[3:4], True, 7, "cut", []),
    ],
)
def test_the_table_of_jobs(
    jobs: Any, with_older: bool, height: int, names: str, ends: List[str]
) -> None:
    lines = room.watch_lines(jobs, NOW, 100, height, with_older)
    running = min(2, len(jobs)) if jobs[0].state == "running" else 0
    speed = ", 2.0 kB/s together" if running else ""
    assert lines[0] == f"{running} running{speed}; {len(jobs) - running} ended"
    assert lines[1] == "" and lines[2].startswith("job") and lines[2].endswith("time")
    table = lines[3 : 3 + len(names.split())]
    assert [line.split()[0] for line in table] == names.split()
    rest = lines[3 + len(table) :]
    more = [line for line in rest if line.startswith("and ")]
    assert more == [end for end in ends if end.startswith("and ")]
    if "failed" in ends:
        assert "bad: no " in rest[len(more) + 1] and rest[len(more)] == ""
        assert height < 24 or "--resume-all goes on with what was interrupted" in rest[-1]
    else:
        assert rest[len(more) :] in ([], [""])
    assert not any("\x1b" in line for line in lines)


def test_names_give_way_where_the_rest_needs_the_room() -> None:
    name = "fetch-a-model-with-a-name-that-is-very-long"
    jobs = [a_job(name, **FETCH, rate=100.0), a_job("b", **FETCH)]
    wide = room.watch_lines(jobs, NOW, 200, 24)
    assert wide[3].startswith(f"{name}  fetch ") and wide[4].startswith("b" + " " * len(name))
    columns = len(wide[3]) - len(name)
    exact = room.watch_lines(jobs, NOW, columns + len(name), 24)
    assert exact == wide
    narrow = room.watch_lines(jobs, NOW, columns + 20, 24)
    assert narrow[3].startswith(f"{name[:19]}~  fetch ")
    assert narrow[3].endswith(" left") and len(narrow[3]) == columns + 20
    assert narrow[4].startswith("b" + " " * 21 + "fetch ")
    least = room.watch_lines(jobs, NOW, 20, 24)
    assert least[3] == f"{name[:7]}~  fetch    3/9"[:20]


@pytest.mark.parametrize(
    ("state", "code", "background", "goes_on"),
    [
        ("interrupted", None, True, True),
        ("interrupted", None, False, False),
        ("failed", 8, True, True),
        ("failed", 7, True, False),
        ("done", 0, True, False),
    ],
)
def test_what_can_go_on_is_said(state: str, code: Any, background: bool, goes_on: bool) -> None:
    job = a_job("x", state, exit_code=code, background=background, error={})
    notes = room._notes([job])
    assert [note for note in notes if "--resume-all" in note] == notes[len(notes) - goes_on :]
    assert ("x: " in notes) == (state == "failed")


# -- lines


@pytest.mark.parametrize(
    ("rounds", "with_older", "expected"),
    [
        ([MIXED[2:]], False, ["bad cut old0 old1 old2 old3 old4"]),
        ([MIXED[2:]], True, ["bad cut old0 old1 old2 old3 old4 old5 old6"]),
        ([[]], True, [""]),
        (
            [MIXED, MIXED[:1], [a_job("busy", "done"), *MIXED[2:]]],
            False,
            ["busy count", "busy", "busy"],
        ),
    ],
)
def test_lines_are_written_until_no_job_runs(
    rounds: Any, with_older: bool, expected: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: List[float] = []
    shown: Any = Shown()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        shown.texts.append("slept")

    clock = SimpleNamespace(time=lambda: NOW, sleep=sleep)
    monkeypatch.setattr(room, "time", clock)
    monkeypatch.setattr(room, "utc", lambda: "NOW")
    given = iter(rounds)
    room.watch_in_lines(lambda: next(given), 2.5, with_older, False, shown)
    parts: List[List[str]] = [[]]
    for text in shown.texts:
        if text == "slept":
            parts.append([])
        else:
            parts[-1].append(text.split()[1].rstrip(":"))
    assert [" ".join(part) for part in parts] == expected
    assert slept == [2.5] * (len(rounds) - 1)


def test_a_line_has_the_cells_that_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "time", SimpleNamespace(time=lambda: NOW))
    monkeypatch.setattr(room, "utc", lambda: "NOW")
    shown: Any = Shown()
    jobs = [a_job("x", **FETCH, rate=100.0), a_job("y", "failed", exit_code=8)]
    room._print_lines(jobs, set(), shown)
    assert shown.texts == [
        "NOW x: fetch  3/9  300 B  30 %  100 B/s  7s left\n",
        "NOW y: failed 8  1m30s ago\n",
    ]


def test_all_jobs_are_an_array_on_a_line_for_programs() -> None:
    shown: Any = Shown()
    shown.with_schema = lambda rows: {"rows": rows}
    jobs = [a_job("ü", "done", rate=3.0), a_job("y", "failed", exit_code=8)]
    room.watch_in_lines(lambda: jobs, 2.5, False, True, shown)
    (text,) = shown.texts
    assert text.endswith("}\n") and text.count("\n") == 1 and "ü" in text
    rows = json.loads(text)["rows"]
    assert [row["name"] for row in rows] == ["ü", "y"]
    assert rows[0]["state"] == "done" and rows[0]["seconds_left"] is None


def test_ctrl_c_ends_the_lines_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    shown: Any = Shown()
    room.watch_in_lines(interrupt, 2.5, False, False, shown)
    assert shown.texts == []


def test_a_row_for_programs_says_how_long_it_takes_still() -> None:
    row = room.job_row(a_job("x", **FETCH, rate=100.0))
    assert (row["seconds_left"], row["done"], row["rate"]) == (7, 300, 100.0)
