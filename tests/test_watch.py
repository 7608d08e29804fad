"""The full screen on which jobs are watched: keys, frames, and the terminal as it was."""

from __future__ import annotations

import contextlib
import os
import pty
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List, Tuple

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
