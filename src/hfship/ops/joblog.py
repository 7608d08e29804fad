# SPDX-License-Identifier: Apache-2.0
"""The log of a job: which lines are of its last run, and how it is followed.

A log has the lines of all runs of a job, one after the other; when it grows too large its older
part is NAME.log.1, and so on (base/eventlog). Never: reads more of a log than hfship writes, or one
that another user put beside a record.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from typing import IO, TYPE_CHECKING, List, Optional, Sequence

from hfship.base.below import Refused, folder_below, open_in, stat_below
from hfship.base.errors import NotFoundError
from hfship.base.eventlog import LOG_SIZE
from hfship.base.text import printable, utc
from hfship.ops.jobs import RECORD_INTERVAL_S, log_files, read_jobs

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.base.report import Reporter
    from hfship.ops.jobs import Job

_LARGEST_LOG = 2 * LOG_SIZE  # bytes that are read of a log, which may be anybody's
# The time of a line, text or JSON (base/eventlog), and the lines that begin and end a run.
_TIMED = re.compile(rb'(?:\{"time": ")?(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)')
_BEGAN = re.compile(rb'^[^ {]\S+ INFO +\S+ [^:]*: began: |"message": "began: ')
_SUMMARY = re.compile(rb'^[^ {]\S+ INFO +\S+ [^:]*: summary: |"message": "summary"')


def lines_since(lines: Sequence[bytes], since: float) -> List[bytes]:
    """The lines of a log from a time on.

    >>> log = [b"2026-01-31T04:05:06Z INFO a", b"and more", b"2026-01-31T04:05:07Z INFO b"]
    >>> lines_since(log, 1769832307.5)
    [b'2026-01-31T04:05:07Z INFO b']
    """
    wanted = utc(since).encode()
    for number, line in enumerate(lines):
        timed = _TIMED.match(line)
        if timed and timed[1] >= wanted:
            rest = lines[number:]
            return list(rest)

    return []


def last_run(lines: Sequence[bytes], began_at: float) -> List[bytes]:
    """The lines of the run that began at a time (seconds since the epoch).

    What it said before its log was opened stands there too, before the line that says that it
    began; the run before it may have ended in the same second. All lines, where none is of it.

    >>> messages = b"summary: exit 0 (done)", b"hello", b"began: hfship pack a"
    >>> log = [b"2026-01-31T04:05:06Z INFO    pack-a -: " + message for message in messages]
    >>> last_run(log, 1769832306.5) == log[1:]
    True
    """
    of_run = lines_since(lines, began_at)
    begin, end_before = -1, -1
    for number, line in enumerate(of_run):
        if _BEGAN.search(line):
            begin = number
    if begin < 0:
        return of_run or list(lines)

    before = of_run[:begin]
    for number, line in enumerate(before):
        if _SUMMARY.search(line):
            end_before = number

    start = end_before + 1
    return of_run[start:]


def follow_log(
    job: Job, follow: bool, tail: str, since: Optional[float], reporter: Reporter
) -> None:
    """Show the last `tail` lines ("all", or a number) of what the last run of a job logged, or of
    what any run did `since` a time (seconds since the epoch).

    With `follow` go on until the job or the operator ends it. Raises NotFoundError.
    """
    try:
        stream = _open_log(job, job.log.name)
    except OSError as exc:
        why = f"{job.log} is not there"
        if not isinstance(exc, FileNotFoundError):
            why = f"{job.log}: {exc.strerror}"
        step = "hfship watch --json tells more"
        raise NotFoundError(f"there is no log of {job.label}", why, step) from exc

    lines = _lines_of(job, stream, since)
    if tail != "all":
        lines = lines[max(len(lines) - int(tail), 0) :]
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            _show_lines(lines, reporter)
            # In this order: what it writes before it ends is read.
            is_running = _runs(job)
            was_rotated = _was_rotated(stream, job.log)
            lines = _next_lines(stream)
            if was_rotated:
                with contextlib.suppress(OSError):
                    stream = _open_log(job, job.log.name)
                    lines += _next_lines(stream)
            if not follow or not (is_running or lines):
                return
            time.sleep(RECORD_INTERVAL_S)


def _open_log(job: Job, name: str) -> IO[bytes]:
    """A log of a job, or an older part of it, which lies beside its record and is of the same
    user. Raises OSError."""
    with folder_below(job.folder) as folder:
        fd = open_in(folder, name)
    stream = os.fdopen(fd, "rb")
    if os.fstat(fd).st_uid == job.uid:
        return stream
    stream.close()
    why = "it is of another user than the record"
    raise Refused(errno.EPERM, why, name)


def _lines_of(job: Job, stream: IO[bytes], since: Optional[float]) -> List[bytes]:
    """The lines of the last run, or of all runs since a time."""
    lines = [*_older_lines(job), *_last_lines(stream)]
    if since is None:
        return last_run(lines, job.record.began_at)
    return lines_since(lines, since)


def _older_lines(job: Job) -> List[bytes]:
    lines: List[bytes] = []
    *older, _ = log_files(job) or [job.log]
    for path in older:
        with contextlib.suppress(OSError), _open_log(job, path.name) as stream:
            of_part = _last_lines(stream)
            lines += of_part

    return lines


def _last_lines(stream: IO[bytes]) -> List[bytes]:
    """All lines of a log; the last of one that is larger than hfship makes them."""
    status = os.fstat(stream.fileno())
    start = max(status.st_size - _LARGEST_LOG, 0)
    stream.seek(start)
    content = stream.read(_LARGEST_LOG)
    return content.splitlines()


def _next_lines(stream: IO[bytes]) -> List[bytes]:
    return stream.read(_LARGEST_LOG).splitlines()


def _show_lines(lines: Sequence[bytes], reporter: Reporter) -> None:
    for line in lines:
        text = line.decode("utf-8", "replace")
        shown = printable(text)
        reporter.show(f"{shown}\n")


def _runs(job: Job) -> bool:
    """Does a job of this name run now?"""
    name = job.record.name
    for one in read_jobs([job.folder]):
        if one.record.name == name:
            return one.state == "running"
    return False


def _was_rotated(stream: IO[bytes], log: Path) -> bool:
    """Is the open log another file than the one at its path?"""
    try:
        there = stat_below(log.parent, log.name)
    except OSError:
        return True
    return not os.path.samestat(os.fstat(stream.fileno()), there)
