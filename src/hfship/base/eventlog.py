# SPDX-License-Identifier: Apache-2.0
"""Logs: one line per event, as text or as JSON.

An event is a mapping with the keys time (UTC), level, job, stage and message, and those of its
kind: progress (done, total, unit, rate), error (what, why, next, exit_code), summary (its rows).
As text it is

    2026-01-31T04:05:06Z WARNING fetch-Qwen3-8B fetching: warning: the Hub answers 503: waiting 2 s

with the line breaks of the message as " | ", and with a line for each of its rows. As JSON it is
the object itself. docs/formats.md has it in full.

Promises: a log that cannot be written never stops the work. That is reported once, and the log
counts the lines that it lost.
Never: redacts; what is written has no secrets any more. Nor appends to what another user put there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
from collections import deque
from pathlib import Path
from typing import Any, Deque, Dict, List, Mapping

from hfship.base.below import Refused, owner_in
from hfship.base.text import harmless_json, printable

LOG_SIZE = 8 << 20  # bytes; a log that would grow larger becomes NAME.1, and a new one begins
LOG_KEEP = 4  # NAME.1 is the youngest
EARLY_EVENTS = 1000  # that a log gets which is opened after them


def event_line(event: Mapping[str, Any]) -> str:
    """An event as text; several lines where it has rows.

    >>> event = {"time": "2026-01-31T04:05:06Z", "level": "info", "job": "", "stage": "packing"}
    >>> print(event_line({**event, "message": "began"}), end="")
    2026-01-31T04:05:06Z INFO    - packing: began
    """
    job = event["job"] or "-"
    stage = event["stage"] or "-"
    level = event["level"].upper()
    message = event["message"]
    head = f"{event['time']} {level:<7} {job} {stage}:"
    rows = event.get("rows")
    if not rows:
        text = printable(message)
        return f"{head} {text}\n"

    lines = ""
    for label, row in rows.items():
        text = printable(row)
        lines += f"{head} {message}: {label} {text}\n"

    return lines


def open_log(path: Path) -> int:
    """Open a log for lines at its end, or begin one. Raises OSError, Refused for what another user
    put there."""
    # A pipe that nobody reads is not waited for.
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK
    with contextlib.suppress(FileExistsError):
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)

    there = os.lstat(path)
    ours = there.st_uid in (0, os.geteuid()) or there.st_uid == owner_in(path.parent).uid
    if not ours:
        raise Refused(errno.EPERM, "it belongs to another user", path)
    if not stat.S_ISLNK(there.st_mode):  # as /dev/stderr is
        flags |= os.O_NOFOLLOW
    return os.open(path, flags)


class LogFile:
    """A log to which lines are appended, each in one write. Not for two threads at a time."""

    def __init__(self, path: Path, form: str = "text") -> None:
        """Open or make the log at `path`; `form` is "text" or "json". Raises OSError."""
        self.path = path
        self._is_json = form == "json"
        self._lost = 0  # events since the last one that could be written
        self._fd = open_log(self.path)

    def write(self, event: Mapping[str, Any]) -> str:
        """Append an event. Returns why that failed; "" if it did not, or if the last one failed."""
        try:
            if self._lost:
                message = f"{self._lost} lines before this one could not be written"
                self._append({**event, "level": "warning", "message": message})
            self._append(event)
        except OSError as exc:
            self._lost += 1
            if self._lost == 1:
                return exc.strerror or str(exc)
            return ""

        self._lost = 0
        return ""

    def _append(self, event: Mapping[str, Any]) -> None:
        data = self._encoded(event)
        status = os.fstat(self._fd)
        size = status.st_size
        is_file = stat.S_ISREG(status.st_mode)
        is_full = size + len(data) > LOG_SIZE
        if is_file and size and is_full:
            self._rotate()
        written = os.write(self._fd, data)
        if written < len(data):  # the disk became full in the middle of the line
            os.write(self._fd, data[written:])

    def _encoded(self, event: Mapping[str, Any]) -> bytes:
        if self._is_json:
            line = harmless_json(json.dumps(event, ensure_ascii=False))
            lines = f"{line}\n"
        else:
            lines = event_line(event)
        return lines.encode("utf-8", "backslashreplace")

    def _rotate(self) -> None:
        """NAME.3 becomes NAME.4, ..., NAME becomes NAME.1; the oldest is gone."""
        for number in range(LOG_KEEP, 0, -1):
            older = f"{self.path}.{number}"
            younger = f"{self.path}.{number - 1}"
            if number == 1:
                younger = str(self.path)
            with contextlib.suppress(FileNotFoundError):
                os.replace(younger, older)

        begun = open_log(self.path)
        os.close(self._fd)
        self._fd = begun


class EventLog:
    """All logs of this process. Each gets every event, also those from before it was opened."""

    def __init__(self) -> None:
        self._files: List[LogFile] = []
        self._early: Deque[Dict[str, Any]] = deque(maxlen=EARLY_EVENTS)
        self._lock = threading.Lock()

    def open(self, path: Path, form: str, job: str) -> None:
        """Write a log from now on. What was before belongs to `job`. Raises OSError."""
        file = LogFile(path, form)
        with self._lock:
            for event in self._early:
                file.write({**event, "job": job})
            self._files.append(file)

    def write(self, event: Dict[str, Any]) -> Dict[Path, str]:
        """Append an event to all logs. Returns, by path, why a log cannot be written any more."""
        troubles: Dict[Path, str] = {}
        with self._lock:
            self._early.append(event)
            for file in self._files:
                trouble = file.write(event)
                if trouble:
                    troubles[file.path] = trouble

        return troubles
