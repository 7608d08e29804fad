# SPDX-License-Identifier: Apache-2.0
"""What `watch` shows of jobs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import termios
import textwrap
import time
import tty
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Sequence, Set, Tuple

from hfship.base.errors import as_typed
from hfship.base.text import harmless_json, human_bytes, printable, short_seconds, table, utc
from hfship.base.values import asdict

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.ops.jobs import Job

FEW_JOBS = 5  # that ended well, or were stopped, and are shown unasked
_WATCH_HEADER = ("doing", "files", "   bytes", " done", "     speed", "time")


def by_need(jobs: Sequence[Job]) -> List[Job]:
    """Jobs in the order in which somebody should look at them: running, then failed and
    interrupted, then the others."""
    return sorted(jobs, key=_need)  # stable: the youngest of each kind stay first


def _need(job: Job) -> int:
    if job.state == "running":
        return 0
    if job.state in ("failed", "interrupted"):
        return 1
    return 2


def few_of(jobs: Sequence[Job]) -> List[Job]:
    """Of jobs in the order of `by_need`: all that somebody should look at, and the last few."""
    most = FEW_JOBS
    for job in jobs:
        if _need(job) < 2:
            most += 1
    few = jobs[:most]
    return list(few)


def job_cells(job: Job, now: float) -> Tuple[str, ...]:
    """What watch shows of a job beside its name; the cells of _WATCH_HEADER."""
    record = job.record
    done, percent, speed, files = "", "", "", ""
    if record.files:
        files = f"{record.finished}/{record.files}"
    if record.total > 0:
        percent = f"{min(100 * record.done // record.total, 100)} %"
    if record.total:
        done = str(record.done)
        if record.unit == "B":
            done = human_bytes(record.done)

    if record.unit == "B" and record.rate > 0:
        speed = f"{human_bytes(record.rate)}/s"
    # As wide as ever, so that columns keep their place.
    share = percent and f"{percent:>5}"
    return (_doing(job), files, f"{done:>8}", share, f"{speed:>10}", _time(job, now))


def _doing(job: Job) -> str:
    """The stage of a running job, the state of another one."""
    if job.state == "running":
        return printable(job.record.stage)
    if job.state == "failed":
        return f"failed {job.record.exit_code}"
    return job.state


def _time(job: Job, now: float) -> str:
    """How long it takes still, or how long ago it ended."""
    if job.left_s is not None:
        return f"{short_seconds(job.left_s)} left"
    if job.state == "running":
        return ""
    return f"{short_seconds(max(now - job.record.updated_at, 0))} ago"


def watch_lines(
    jobs: Sequence[Job], now: float, width: int, height: int, with_older: bool = True
) -> List[str]:
    """The jobs, in the order of `by_need`, as a table that fits: at most `height` lines of `width`
    columns.

    Names give way, then the oldest; those are left out, but for a few, unless `with_older` is set.
    """
    if not jobs:
        return ["no jobs yet"[:width]]

    listed = jobs
    if not with_older:
        listed = few_of(jobs)
    shown = listed[: max(height - 6, 1)]
    lines = [_title(jobs), "", *_job_table(shown, now, width)]
    if len(listed) > len(shown):
        lines.append(f"and {len(listed) - len(shown)} more")
    if len(jobs) > len(listed):
        lines.append(as_typed(f"and {len(jobs) - len(listed)} older: hfship watch --all"))
    notes = _notes(shown)
    if notes:
        lines.append("")
    for note in notes:
        lines += textwrap.wrap(note, max(width, 10), subsequent_indent="  ")
    return [line[:width].rstrip() for line in lines[:height]]


def _title(jobs: Sequence[Job]) -> str:
    """How many jobs there are, and how fast they are together."""
    running = [job.record for job in jobs if job.state == "running"]
    speed = sum(record.rate for record in running if record.unit == "B")
    title = f"{len(running)} running"
    if speed:
        title += f", {human_bytes(speed)}/s together"
    return f"{title}; {len(jobs) - len(running)} ended"


def _job_table(jobs: Sequence[Job], now: float, width: int) -> List[str]:
    """A header, and a row for each job; names are cut where the rest needs the room."""
    # Not splitlines(): of a job that has just begun nothing is known, and its row is empty.
    cells = table([job_cells(job, now) for job in jobs], _WATCH_HEADER).split("\n")
    room = max(width - max(map(len, cells)) - 2, 8)
    names = ["job"]
    for job in jobs:
        name = job.label
        if len(name) > room:
            name = name[: room - 1] + "~"
        names.append(name)

    longest = max(map(len, names))
    return [f"{name:<{longest}}  {row}" for name, row in zip(names, cells)]


def _notes(jobs: Sequence[Job]) -> List[str]:
    """What failed, and how to go on with what was interrupted."""
    notes = []
    for job in jobs:
        if job.state == "failed":
            what = printable(job.record.error.get("what", ""))
            notes.append(f"{job.label}: {what}")

    if any(job.resumable and job.record.background for job in jobs):
        notes.append(as_typed("hfship watch --resume-all") + " goes on with what was interrupted")
    return notes


def job_row(job: Job) -> Dict[str, Any]:
    """A job for JSON."""
    left = None if job.left_s is None else round(job.left_s)
    extra = {
        "state": job.state,
        "user": job.user,
        "log": str(job.log),
        "seconds_left": left,
    }
    return {**asdict(job.record), **extra}


@contextlib.contextmanager
def full_screen(reporter: Reporter) -> Iterator[Callable[[float], str]]:
    """The terminal's second screen; what was there before comes back at the end.

    Gives a function that waits up to so many seconds for a key, and returns it, or "".
    """
    before = termios.tcgetattr(0) if os.isatty(0) else None

    def key(seconds: float) -> str:
        if before is None:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            return os.read(0, 16).decode("latin-1")
        return ""

    try:
        if before:
            tty.setcbreak(0, termios.TCSADRAIN)
        reporter.show("\x1b[?1049h\x1b[?25l")
        yield key
    finally:
        reporter.show("\x1b[?25h\x1b[?1049l")
        if before:
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def watch_on_screen(
    jobs: Callable[[], Sequence[Job]], interval_s: float, with_older: bool, reporter: Reporter
) -> None:
    """Show the jobs until q or Ctrl-C; a shows the older ones, or leaves them out again.

    Every frame is one write over the one before, so nothing flickers.
    """
    with contextlib.suppress(KeyboardInterrupt), full_screen(reporter) as key:
        while True:
            size = os.get_terminal_size(reporter.out.fileno())
            width, height = size.columns or 80, size.lines or 80
            reporter.show(_frame(jobs(), width, height, with_older))
            pressed = key(interval_s)
            if "q" in pressed:
                return
            if "a" in pressed:
                with_older = not with_older


def _frame(jobs: Sequence[Job], width: int, height: int, with_older: bool) -> str:
    """A whole screen: the jobs, and the keys on its last line."""
    lines: List[str] = []
    if height > 3:
        lines = watch_lines(jobs, time.time(), width, height - 2, with_older)
    keys = 'q quits, a shows all; "logs -f JOB" follows one, "stop JOB" ends it'
    return frame_text(lines, keys, width, height)


def frame_text(lines: Sequence[str], last: str, width: int, height: int) -> str:
    """A whole screen: lines, as far as there is room, and one at its end."""
    rows = list(lines[: height - 1])
    rows += [""] * (height - 1 - len(rows))
    to_end_of_line, to_end_of_screen = "\x1b[K", "\x1b[J"
    text = "\n".join(row[:width] + to_end_of_line for row in [*rows, last])
    return f"\x1b[H{text}{to_end_of_screen}"


def watch_in_lines(
    jobs: Callable[[], Sequence[Job]],
    interval_s: float,
    with_older: bool,
    as_json: bool,
    reporter: Reporter,
) -> None:
    """Lines for files and pipes, each interval until no job runs.

    A line per running job, and one for each that has just ended; if none ever ran, for those that
    somebody should look at and the last few, or for all `with_older`. With `as_json` all jobs as an
    array on one line.
    """
    seen: Set[str] = set()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            now = jobs()
            running = {job.label for job in now if job.state == "running"}
            if as_json:
                rows = reporter.with_schema([job_row(job) for job in now])
                reporter.show(harmless_json(json.dumps(rows, ensure_ascii=False)) + "\n")
            else:
                shown = now if with_older or running | seen else few_of(now)
                _print_lines(shown, running | seen, reporter)
            seen = running
            if not running:
                return
            time.sleep(interval_s)


def _print_lines(jobs: Sequence[Job], labels: Set[str], reporter: Reporter) -> None:
    """A line for each job with one of the labels; for all without any."""
    for job in jobs:
        if labels and job.label not in labels:
            continue
        cells = [cell.strip() for cell in job_cells(job, time.time())]
        text = "  ".join(cell for cell in cells if cell)
        reporter.show(f"{utc()} {job.label}: {text}\n")
