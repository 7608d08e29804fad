#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""hfship: carry Hugging Face models across an air gap and put them into service, as one file.

    connected side                      medium, or push          offline side
    Hub - fetch -> model dir - pack -> NAME.tar.zst (parts) -> verify - unpack -> model dir - serve  -> vLLM
                   + manifest          + .sha256 + hfship.pyz                     + manifest  - mirror -> hf, vLLM, ...

The promise: what the GPU reads is bit for bit what the Hub published, proven at every hop by the SHA-256 that the
Hub itself gives, and every step can be killed at any instant and run again.

Contents, in the order in which data flows; each section uses only those above it:

     1  errors and exit codes      what, why, next step
     2  reporting                  the one Reporter: logs, progress, JSON, redaction
     3  settings                   flags > environment > models file > defaults; reading a models file
     4  files and processes        atomic write, lock, room on the target, hashing, running other programs
     5  manifest                   the contract that travels with a model
     6  hub                        Hub API client
     7  download                   ranges, workers, resume journal, verification
     8  frames                     zstd backends, independent frames, seek table, parts, byte planes
     9  pack                       tar stream -> frames -> parts, sidecars, deltas
    10  unpack                     verify, locate damage, repair, parallel restore, resume; archives of other programs
    11  signatures                 who vouches for a model: OpenSSF model signing, through openssl
    12  images                     (reserved)
    13  model facts                config.json + safetensors headers -> what serving needs to know
    14  plan                       facts + host -> image, GPUs, tensor parallel size, context length
    15  deployment files           plan -> text of .env and docker-compose.yml
    16  docker                     compose up and down, readiness, status
    17  mirror                     read-only Hub API over a models folder
    18  jobs                       records of runs, background, watch, resume; push, clean, doctor
    19  command line               COMMANDS, their arguments, thin cmd_* functions, main()
"""

from __future__ import annotations

import argparse
import base64
import calendar
import contextlib
import copy
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib
import importlib.machinery
import io
import json
import mmap
import os
import platform
import pwd
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import tty
import types
import warnings
import weakref
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from enum import IntEnum
from fnmatch import fnmatchcase
from functools import lru_cache, partial, reduce
from glob import glob
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, chain, islice, repeat, tee
from operator import getitem
from pathlib import Path
from socketserver import TCPServer
from ssl import SSLError
from types import MappingProxyType
from typing import (
    IO,
    AbstractSet,
    Any,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
    overload,
)
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlencode, urljoin, urlsplit, urlunsplit

__version__ = "0.1.0"


# ======================================================================================
# §1 Errors and exit codes
#
# Promises: every failure an operator can meet is an HfshipError that says what happened, why, and the exact next
# command; its class decides the exit code that runbooks act on.
# ======================================================================================


class Exit(IntEnum):
    """Exit codes; a contract with runbooks, never renumbered."""

    OK = 0
    USAGE = 2
    INCOMPLETE = 3  # state is saved, the same command goes on
    AUTH = 4
    NOT_FOUND = 5
    INTEGRITY = 6
    DISK = 7
    NETWORK = 8
    HOST = 9  # docker, GPU, image or memory of this machine
    INTERRUPTED = 130


class HfshipError(Exception):
    """A failure told as a sentence for an operator at 3 a.m.: what happened, why, and what to do next."""

    code = Exit.INCOMPLETE

    def __init__(self, what: str, why: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def text(self) -> str:
        """The error as it is printed, with commands as they are typed here.

        >>> print(UsageError("no such model: x", "~/models has no folder x", "hfship fetch ORG/x").text())
        hfship: no such model: x
          why   ~/models has no folder x
          next  hfship fetch ORG/x
        """
        lines = [f"hfship: {self.what}"]
        for label, text in (("why", self.why), ("next", as_typed(self.next_step))):
            if text:
                lines.append(f"  {label:<5} " + text.replace("\n", "\n        "))
        return "\n".join(lines)


# The names of COMMANDS, of which this end of the file knows no more.
VERBS = "fetch|pack|push|verify|unpack|serve|status|stop|logs|watch|models|mirror|clean|doctor|completion|version"


def program_name() -> str:
    """How this program was called: `hfship`, or `python3 hfship.pyz` for one who has only the file."""
    called = sys.argv[0]
    return f"python3 {shlex.quote(called)}" if called.endswith(".pyz") else "hfship"


def as_typed(text: str) -> str:
    """`text` with its hfship commands written as they must be typed here."""
    return re.sub(rf"\bhfship (?=({VERBS}|--help)\b)", lambda _: program_name() + " ", text)


def closest(word: str, known: Iterable[str]) -> str:
    """The word that was probably meant; "" when none is near."""
    import difflib  # costs every start some milliseconds, and is for mistakes only

    return "".join(difflib.get_close_matches(word, list(known), 1))


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the word that was probably meant, for the end of a sentence; "" when none is near.

    >>> nearest("fetsh", ["fetch", "pack"]), nearest("x", ["fetch"])
    ('; did you mean fetch?', '')
    """
    found = closest(word, known)
    return f"; did you mean {found}?" if found else ""


def error_fields(error: HfshipError) -> Dict[str, str]:
    """An error for JSON."""
    return {"what": error.what, "why": error.why, "next": as_typed(error.next_step)}


def command_line(*words: object) -> str:
    """A command that can be pasted into a shell, whatever its words hold.

    >>> command_line("hfship", "verify", Path("/mnt/my disk/m.tar.zst"))
    "hfship verify '/mnt/my disk/m.tar.zst'"
    """
    return " ".join(shlex.quote(str(word)) for word in words)


def error_row(error: HfshipError) -> Dict[str, Any]:
    """An error among the results of --json."""
    return {"schema": "hfship-error/1", "error": error_fields(error), "exit_code": int(error.code)}


class UsageError(HfshipError):
    """The command line or a settings file is wrong."""

    code = Exit.USAGE


class IncompleteError(HfshipError):
    """Stopped before the end with the state saved: the same command goes on."""


class AuthError(HfshipError):
    """Token missing, wrong or without access (gated, private)."""

    code = Exit.AUTH


class NotFoundError(HfshipError):
    """A repository, revision, file, archive or deployment does not exist."""

    code = Exit.NOT_FOUND


class IntegrityError(HfshipError):
    """Bytes are not what the manifest or the Hub says they are."""

    code = Exit.INTEGRITY


class DiskError(HfshipError):
    """Not enough room, a file-size limit, or a disk that refuses."""

    code = Exit.DISK


class NetworkError(HfshipError):
    """The network failed for longer than the retry budget."""

    code = Exit.NETWORK


class HostError(HfshipError):
    """This machine cannot do it: docker, GPU, image, memory, port, Python."""

    code = Exit.HOST


class Interrupted(HfshipError):
    """Ctrl-C or SIGTERM, with the state saved."""

    code = Exit.INTERRUPTED


# ======================================================================================
# §2 Reporting
#
# Owns every byte that reaches a terminal, a log file or an event stream. Results go to stdout, all else to stderr.
# Promises: secrets that were registered, and whatever looks like one, never pass. Nothing else in this file prints.
# A log that cannot be written never stops the work: it is said once, and what was lost is counted in the log.
#
# A log has one line per event: UTC time, level, job, stage, message. As text
#     2026-01-31T04:05:06Z WARNING fetch-Qwen3-8B fetching: warning: the Hub answers 503: waiting 2 s
# with the line breaks of a message as " | "; as JSON an object with the keys time, level, job, stage, message, and
# those of its kind: progress (done, total, unit, rate), error (what, why, next, exit_code), summary (its rows).
# ======================================================================================

PLAIN_INTERVAL_S = 10.0  # one progress line per interval where there is no terminal
BAR_INTERVAL_S = 0.25
PROGRESS_INTERVALS_S = {"bar": BAR_INTERVAL_S, "json": 1.0}
LOG_SIZE = 8 << 20  # bytes; a log that would grow larger becomes NAME.1, and a new one begins
LOG_KEEP = 4  # NAME.1 is the youngest

_SECRET_PATTERNS = (
    # As long as tokens and keys are: names of folders may begin like them.
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"), "hf_***"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"), "sk-***"),
    (re.compile(r"(?i)(bearer\s+)[^\s\"']+"), r"\1***"),
    (re.compile(r"(?i)\b(://[^/\s:@]*:)[^/\s@]+@"), r"\1***@"),
    # Signed URLs carry their credential in the query: keep host and path only.
    (re.compile(r"(https?://[^\s?\"'<>]+)\?[^\s\"'<>]*"), r"\1?***"),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without the given secrets, tokens, bearer headers, URL passwords and URL queries.

    >>> redact("GET https://cdn/x?Signature=abc with Bearer hf_abcdefghij")
    'GET https://cdn/x?*** with Bearer ***'
    """
    for secret in sorted(secrets, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(secret, "***")
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_all(value: Any, secrets: Iterable[str] = ()) -> Any:
    """`value` with every text in it redacted: before it becomes JSON, whose escapes would hide a secret."""
    if isinstance(value, str):
        return redact(value, secrets)
    if isinstance(value, Mapping):
        return {redact(str(k), secrets): redact_all(v, secrets) for k, v in value.items()}
    return [redact_all(v, secrets) for v in value] if isinstance(value, (list, tuple)) else value


def harmless(text: str) -> str:
    """`text` without what would steer a terminal: control characters other than tab and line feed.

    >>> harmless("a\\tb\\n\\x1b[2J")
    'a\\tb\\n?[2J'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def printable(text: str) -> str:
    """`text` on one line, and without characters that steer a terminal.

    >>> printable("a\\n  b \\x1b[2J\\udcff")
    'a | b ?[2J?'
    """
    return "".join(c if c.isprintable() else "?" for c in re.sub(r"\s*[\r\n]+\s*", " | ", text.strip()))


def utc() -> str:
    """The time as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def human_bytes(count: float) -> str:
    """Bytes for people, in the decimal units that disks and networks are sold in.

    >>> [human_bytes(n) for n in (0, 999, 1000, 29_540_000_000)]
    ['0 B', '999 B', '1.0 kB', '29.5 GB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "B" and count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(0, "file"), counted(1, "file"), counted(12, "missing part")
    ('0 files', '1 file', '12 missing parts')
    """
    return f"{number} {noun}" + "s" * (number != 1)


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> [human_seconds(s) for s in (0.02, 0.21, 59.7, 61, 3700)]
    ['less than 0.1 s', '0.2 s', '59.7 s', '1 min 01 s', '1 h 01 min']
    """
    if seconds < 0.1:
        return "less than 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Columns padded to their widest cell; those of numbers (cells that start with a digit, or "-") are aligned right.

    >>> print(table([["a", "1 B"], ["long", "10 B"]], ["name", "size"]))
    name  size
    a      1 B
    long  10 B
    """
    cells = [list(header)] * bool(header) + [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    numbers = [all(cell[:1].isdigit() or cell in ("", "-") for cell in column) for column in zip(*rows)]
    lines = []
    for row in cells:
        columns = zip(row, widths, numbers or widths)
        padded = [c.rjust(w) if c[:1].isdigit() and n else c.ljust(w) for c, w, n in columns]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def narrow_table(rows: Sequence[Mapping[str, str]], columns: Sequence[str], optional: Sequence[str], width: int) -> str:
    """A table that leaves out `optional` columns, one after the other, until it is at most `width` characters wide."""
    text = table([[row[column] for column in columns] for row in rows], columns)
    if optional and max(map(len, text.splitlines())) > width:
        return narrow_table(rows, [c for c in columns if c != optional[0]], optional[1:], width)
    return text


def labelled(**rows: str) -> str:
    """Lines with a label each.

    >>> print(labelled(runs_on="CPU"))
      runs on  CPU
    """
    return "\n".join(f"  {label.replace('_', ' '):<8} {text}" for label, text in rows.items() if text)


class LogFile:
    """A log to which lines are appended, each in one write. `write` is called under the Reporter's lock."""

    def __init__(self, path: Path, form: str = "text") -> None:
        self.path, self._json = path, form == "json"
        self._lost = 0
        self._fd = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, 0o666)

    def write(self, event: Mapping[str, Any]) -> str:
        """Append an event. Returns why that is impossible when it is the first time in a row, else ""."""
        lost = {**event, "level": "warning", "message": f"{self._lost} lines before this one could not be written"}
        try:
            if self._lost:
                self._append(lost)
            self._append(event)
            self._lost = 0
        except OSError as exc:
            self._lost += 1
            return (exc.strerror or str(exc)) if self._lost == 1 else ""
        return ""

    def _append(self, event: Mapping[str, Any]) -> None:
        if self._json:
            text = json.dumps(event, ensure_ascii=False) + "\n"
        else:
            head = f"{event['time']} {event['level'].upper():<7} {event['job'] or '-'} {event['stage'] or '-'}: "
            rows = [f"{event['message']}: {label} {printable(row)}" for label, row in event.get("rows", {}).items()]
            text = "".join(head + line + "\n" for line in rows or [printable(event["message"])])
        data = text.encode("utf-8", "backslashreplace")
        status = os.fstat(self._fd)
        if stat.S_ISREG(status.st_mode) and status.st_size and status.st_size + len(data) > LOG_SIZE:
            self._turn_over()
        written = os.write(self._fd, data)
        if written < len(data):  # the disk became full in the middle of the line
            os.write(self._fd, data[written:])

    def _turn_over(self) -> None:
        for number in range(LOG_KEEP, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}.{number - 1}" if number > 1 else self.path, f"{self.path}.{number}")
        os.close(self._fd)
        self._fd = self._open()


class Stage:
    """Progress of one step (fetching, packing, ...). `add` may be called from any thread."""

    def __init__(self, reporter: Reporter, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.started, self._ended = time.monotonic(), 0.0
        self.skipped = 0
        self.files = self.finished = 0  # how many it is about, and how many of them are done, where that is known
        self.bar: Any = None  # of tqdm, where one is shown
        self._reporter = reporter
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def add(self, count: int) -> None:
        """Count `count` more units (bytes unless the stage says otherwise) as done; negative takes back."""
        with self._lock:
            self.done += count

    def skip(self, count: int) -> None:
        """Count units that were already there: they are progress, but no speed."""
        with self._lock:
            self.done += count
            self.skipped += count

    def finish(self, files: int) -> None:
        """Count files as done."""
        with self._lock:
            self.finished += files

    def each(self, results: Iterable[Any], files: int) -> Iterator[Any]:
        """The results of work on as many files, counted as they come."""
        self.files = files
        for result in results:
            self.finish(1)
            yield result

    @property
    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self.started

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return (self.done - self.skipped) / max(self.seconds, 1e-6)

    @property
    def counts(self) -> Dict[str, Any]:
        """How far it is, for JSON."""
        return {"done": self.done, "total": self.total, "unit": self.unit, "rate": round(self.rate)}

    def __enter__(self) -> Stage:
        if self.total:  # else there is nothing to do, and nothing to tell
            self._reporter.stages.append(self)
            self._reporter.working.set()
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ticker.join()
        self._ended = time.monotonic()
        if self.total:
            self._reporter.log_progress(self)
            self._reporter.past.append(self)
            self._reporter.stages.remove(self)

    def _tick(self) -> None:
        if self._reporter.progress == "bar":
            self._reporter.show_progress(self, final=False)
        while not self._stop.wait(PROGRESS_INTERVALS_S.get(self._reporter.progress, PLAIN_INTERVAL_S)):
            self._reporter.show_progress(self, final=False)
        self._reporter.show_progress(self, final=True)

    def line(self) -> str:
        """The progress as one plain line."""
        share = f"{100 * self.done / self.total:3.0f} %" if self.total else "100 %"
        if self.unit != "B":
            return f"{self.name}: {share}  {self.done}/{self.total} {self.unit}"
        left = (self.total - self.done) / self.rate if self.rate > 0 else 0
        eta = f", {human_seconds(left)} left" if 0 < self.done < self.total else ""
        amounts = f"{human_bytes(self.done)} of {human_bytes(self.total)}"
        return f"{self.name}: {share}  {amounts}  {human_bytes(self.rate)}/s{eta}"


def silence(fd: int) -> None:
    """Drop what is buffered for an output that takes no more: Python would end with an error of its own over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


class Reporter:
    """Everything hfship says: results to `out`, the rest to `err`, all of it redacted.

    progress: "auto" (bar on a terminal, plain lines elsewhere), "bar", "plain", "json" or "none".
    verbosity: -1 errors and warnings only, 0 normal, 1 details.
    """

    def __init__(
        self, progress: str = "auto", verbosity: int = 0, out: Optional[IO[str]] = None, err: Optional[IO[str]] = None
    ) -> None:
        closed = io.StringIO()  # what is said into a stream that the caller closed
        self.out = out or sys.stdout or closed
        self.err = err or sys.stderr or closed
        for stream in (self.out, self.err):  # a name that the terminal cannot show must not end the work
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        self.adjust(progress, verbosity)
        self.lock = threading.RLock()
        self.schema = ""  # of the JSON results: docs/json.md
        self.bar: Any = None
        self.gathered: Optional[List[Any]] = None  # JSON results of the runs of a list, which are said as one
        self.job = ""  # its name, once it has one
        self.working = threading.Event()  # the first stage or phase has begun: arguments and locks are fine
        self.phase = ""  # what is done outside stages
        self.stages: List[Stage] = []  # under way
        self.past: List[Stage] = []
        self.results: Deque[str] = deque(maxlen=5)  # the first line of each
        self.failure: Optional[HfshipError] = None  # the last
        self.next_words: Tuple[str, ...] = ()  # the command that comes after a success
        self._logs: List[LogFile] = []
        self._early: Deque[Dict[str, Any]] = deque(maxlen=1000)  # events from before the job's log was opened
        self._counting = False  # a countdown stands on the terminal's last line
        self._secrets: Set[str] = set()

    def adjust(self, progress: str, verbosity: int, as_json: bool = False) -> None:
        """Talk as the command line asks."""
        self.verbosity, self.as_json = verbosity, as_json
        self.progress = ("bar" if self.err.isatty() else "plain") if progress == "auto" else progress

    @property
    def width(self) -> int:
        """Characters that a line of results may have."""
        return shutil.get_terminal_size().columns if self.out.isatty() else 1000

    def hide(self, secret: str) -> None:
        """Register a secret: it is replaced by *** in everything said from now on, also as it looks in a URL."""
        if secret:
            self._secrets |= {secret, quote(secret), quote(secret, safe="")}

    def redacted(self, value: Any) -> Any:
        """A value as it may be shown: see `redact_all`."""
        return redact_all(value, self._secrets)

    def bug(self, kind: Type[BaseException], exc: BaseException, trace: Any) -> None:
        """Tell of an exception that nobody foresaw as Python does, but without secrets: a `sys.excepthook`."""
        self.err.write(self.redacted("".join(traceback.format_exception(kind, exc, trace))))

    def open_log(self, path: Path, form: str) -> None:
        """Write a log from now on, what was said so far included. Raises OSError."""
        log = LogFile(path, form)
        with self.lock:
            for event in self._early:
                log.write({**event, "job": self.job})
            self._logs.append(log)

    @property
    def doing(self) -> str:
        """The name of the stage or phase."""
        return self.stages[-1].name if self.stages else self.phase

    def log(self, level: str, message: str, **details: Any) -> None:
        """An event for the logs alone. `details` are for JSON, but for `rows`, each of which is a line of its own."""
        event = {"time": utc(), "level": level, "job": self.job, "stage": self.doing, "message": message, **details}
        event = self.redacted(event)
        with self.lock:
            self._early.append(event)
            for log in self._logs:
                trouble = log.write(event)
                if trouble:
                    self.say(f"warning: cannot write the log {log.path}: {trouble}; the work goes on without it")

    def log_progress(self, stage: Stage) -> None:
        """How far a stage is, for the logs."""
        self.log("info", stage.line()[len(stage.name) + 2 :], **stage.counts)  # every line has the name of its stage

    def result(self, text: str) -> None:
        """A result of the command, to stdout."""
        self.results.append(text.partition("\n")[0])
        self.log("result", text)
        self._tell(harmless(text))

    def _tell(self, text: str) -> None:
        """A reader that has gone ends no work: what it finds decides the exit code."""
        try:
            self.show(text + "\n")
        except BrokenPipeError:
            silence(1)

    def show(self, text: str) -> None:
        """A part of the result that is not worth a log, to stdout."""
        try:
            with self.lock:
                self.out.write(redact(text, self._secrets))
                self.out.flush()
        except BrokenPipeError:
            raise
        except OSError as exc:
            silence(1)
            step = "the work is done; run the same command again to see its result"
            raise DiskError(f"cannot write the result: {exc.strerror}", "", step) from exc

    def result_of(self, text: str, value: object) -> None:
        """A result that has both forms; --json chooses."""
        self.result_json(value) if self.as_json else self.result(text)

    def result_json(self, value: object) -> None:
        """A machine-readable result, to stdout: an object or a list of them, each with the name of its schema."""
        rows: List[Any] = value if isinstance(value, list) else [value]
        marked = [{"schema": self.schema, **self.redacted(row)} for row in rows]
        if self.gathered is not None and isinstance(value, list):
            self.gathered += marked
            return
        result = marked if isinstance(value, list) else marked[0]
        self.log("result", json.dumps(result, ensure_ascii=False))
        utf8 = (getattr(self.out, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
        text = json.dumps(result, indent=2, ensure_ascii=not utf8)
        self._tell(re.sub(r"[\x7f-\x9f]", lambda c: f"\\u{ord(c[0]):04x}", text))
        self.as_json = False  # it has its result

    def detail(self, text: str) -> None:
        if self.verbosity > 0:
            self._say("info", text)

    def info(self, text: str) -> None:
        if self.verbosity >= 0:
            self._say("info", text)

    def warn(self, text: str) -> None:
        self._say("warning", "warning: " + text)

    def error(self, error: HfshipError) -> None:
        """Print an error; with JSON events also as an event that carries its exit code."""
        self.failure = error
        fields = {**error_fields(error), "exit_code": int(error.code)}
        self.log("error", error.text(), **fields)
        if self.progress == "json":
            self.event("error", **fields)
        else:
            self.say(error.text())

    def failed(self, error: HfshipError) -> None:
        """Say the error that ends the command, with --json also as its result if there is none."""
        self.error(error)
        if self.as_json:
            self.result_json(error_row(error))

    def then(self, command: str, subject: Path) -> None:
        """What comes after a success: a command, for all subjects that it is said of."""
        self.next_words = (*(self.next_words or ("hfship", command)), str(subject))

    def enter_phase(self, name: str, phase: str) -> None:
        """What `name` does now, where no amount is known."""
        self.phase = phase
        self.working.set()
        self.info(f"{name}: {phase}")
        self.event("phase", name=name, phase=phase)

    def event(self, kind: str, **fields: object) -> None:
        """One JSON line to stderr, where --progress json asked for events."""
        if self.progress == "json":
            self._write(json.dumps({"event": kind, **self.redacted(fields)}, ensure_ascii=False))

    def countdown(self, seconds: float) -> None:
        """Show how long is still to be waited; called once a second, and with 0 at the end."""
        left = round(seconds)
        if self.progress == "json":
            self.event("waiting", seconds=left)
        elif self.progress == "plain" and left and left % PLAIN_INTERVAL_S == 0:
            self.info(f"still waiting, {left} s left")
        elif self.progress == "bar" and self.verbosity >= 0:
            text = f"waiting {left} s" if left else ""
            with self._terminal():
                if self.bar is not None:
                    self.bar.set_postfix_str(text)
                else:
                    self._counting = bool(text)
                    self.err.write(f"\r\033[K{text}")
                    self.err.flush()

    def stage(self, name: str, total: int, unit: str = "B") -> Stage:
        """A step with progress; use as a context manager."""
        return Stage(self, name, total, unit)

    def show_progress(self, stage: Stage, final: bool) -> None:
        """How far a stage is, as a bar, an event or a line. One that ends before its first line has none."""
        if self.verbosity < 0 or self.progress == "none" or not stage.total:
            return
        if self.progress == "json":
            self.event("progress", final=final, stage=stage.name, **stage.counts)
        elif self.progress == "bar":
            self._draw(stage, final)
        elif not final or stage.seconds > PLAIN_INTERVAL_S:
            self.say(stage.line())

    def _draw(self, stage: Stage, final: bool) -> None:
        try:
            from tqdm import tqdm
        except ImportError:  # hfship.py alone
            self.progress = "plain"
            return
        options: Dict[str, Any] = {"unit": " " + stage.unit}
        if stage.unit == "B":
            options = {"unit": "B", "unit_scale": True, "unit_divisor": 1000}
        with self._terminal():
            if stage.bar is None:
                tqdm.monitor_interval = 0  # no thread that looks after the bars: we update them often enough
                options.update(file=self.err, dynamic_ncols=True, mininterval=0)
                self.bar = stage.bar = tqdm(total=stage.total, desc=stage.name, **options)
                return
            stage.bar.total, stage.bar.initial = stage.total, stage.skipped
            stage.bar.update(stage.done - stage.bar.n)
            if final:
                stage.bar.close()
                self.bar = None

    def _say(self, level: str, text: str) -> None:
        self.log(level, text)
        self.say(text, level)

    def say(self, text: str, level: str = "info") -> None:
        """Something for people, that no log needs."""
        if self.progress == "json":
            self.event("log", level=level, text=text)
        else:
            self._write(harmless(redact(text, self._secrets)))

    @contextlib.contextmanager
    def _terminal(self) -> Iterator[None]:
        """One at a time writes to stderr."""
        with self.lock:
            try:
                yield
            except OSError:  # the terminal is closed, or the reader of a pipe has gone: the work goes on
                silence(2)

    def _write(self, line: str) -> None:
        with self._terminal():
            if self.bar is not None:
                self.bar.clear()
            elif self._counting:
                self.err.write("\r\033[K")
            self.err.write(line + "\n")
            self.err.flush()
            if self.bar is not None:
                self.bar.refresh()


# ======================================================================================
# §3 Settings
#
# Owns where things are, who we are, and which models a site has: flags > HFSHIP_*/HF_* environment > models file >
# defaults. Pure, but for reading the token and the models file.
#
# Format of a models file, in TOML or (named *.json) in JSON: a table `defaults` and a list of tables `model`. What may
# stand in them is a tree of Key, made from the options of the commands (§19), so that a file can ask for what a command
# line can.
# ======================================================================================

DEFAULT_ENDPOINT = "https://huggingface.co"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")

# name -> (environment variable, default)
FOLDERS: Mapping[str, Tuple[str, str]] = {
    "models_dir": ("HFSHIP_MODELS_DIR", "~/models"),
    "package_dir": ("HFSHIP_PACKAGE_DIR", "~/transfer_package"),
    "log_dir": ("HFSHIP_LOG_DIR", "~/logs/hfship"),
    "transfer_dir": ("HFSHIP_TRANSFER_DIR", "/data/transfer"),
    "site_models_dir": ("HFSHIP_SITE_MODELS_DIR", "/data/models/huggingface"),
    "deploy_dir": ("HFSHIP_DEPLOY_DIR", "/data/deploy"),
}


@dataclass(frozen=True)
class Token:
    """A Hub token and where it came from. `value` is never shown, not even by repr."""

    value: str = field(repr=False)
    source: str


@dataclass(frozen=True)
class Settings:
    """Resolved paths and endpoint of one run."""

    endpoint: str
    models_dir: Path
    package_dir: Path
    log_dir: Path
    transfer_dir: Path
    site_models_dir: Path
    deploy_dir: Path


@dataclass(frozen=True)
class ListedModel:
    """A [[model]] of a models file, over its [defaults]: what is asked of it, and of serving it, by key."""

    name: str
    repo: str = ""
    wishes: Mapping[str, Any] = field(default_factory=dict)
    serve: Mapping[str, Any] = field(default_factory=dict)

    @property
    def deployment(self) -> str:
        return self.serve.get("name") or self.name


@dataclass(frozen=True)
class ModelsFile:
    """A models file. `others`: what its [defaults] ask of models that it does not list."""

    path: Path
    defaults: Mapping[str, Any]
    models: Tuple[ListedModel, ...]
    others: ListedModel

    @property
    def known(self) -> Dict[str, ListedModel]:
        """The models by the words that mean them: repositories, deployments, names."""
        return {word: m for m in self.models for word in (m.repo.partition("@")[0], m.deployment, m.name) if word}


def load_settings(
    env: Mapping[str, str], endpoint: Optional[str] = None, file: Optional[ModelsFile] = None
) -> Settings:
    """Settings from flags (given), environment, models file and defaults. `~` and `$VAR` in paths are expanded; a
    relative path in the models file starts at its folder."""
    said: Mapping[str, Any] = file.defaults if file else {}
    folders = {}
    for name, (variable, default) in FOLDERS.items():
        path = Path(os.path.expanduser(os.path.expandvars(env.get(variable) or said.get(name) or default)))
        folders[name] = file.path.parent.absolute() / path if file and not env.get(variable) else path
    url = (endpoint or env.get("HF_ENDPOINT") or said.get("endpoint") or DEFAULT_ENDPOINT).rstrip("/")
    return Settings(endpoint=checked_endpoint(url), **folders)


def checked_endpoint(url: str) -> str:
    """The address of a Hub. Raises UsageError for what is none, and for one with a password: manifests keep it."""
    step = "give --endpoint https://HOST or set HF_ENDPOINT"
    try:
        parts = urlsplit(url)
        labels = (parts.hostname or "").rstrip(".").split(".")
        usable = parts.scheme in ("http", "https") and parts.port != 0 and all(labels)
    except ValueError:
        usable = False
    if not usable or not url.isprintable():
        raise UsageError(f"endpoint {url!r} is not an http(s) URL", "", step)
    if parts.username is not None:
        raise UsageError("the endpoint has a user name in it", "it would travel with the model", step)
    return url


def truthy(value: Optional[str]) -> bool:
    """The Hub's reading of a boolean environment variable.

    >>> [truthy(v) for v in (None, "", "0", "1", "on", "Yes", "TRUE")]
    [False, False, False, True, True, True, True]
    """
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}


def find_token(env: Mapping[str, str]) -> Optional[Token]:
    """The Hub token, from the places and in the order of huggingface_hub: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, the
    file HF_TOKEN_PATH ($HF_HOME/token). None when HF_HUB_DISABLE_IMPLICIT_TOKEN is set or nothing is found."""
    if truthy(env.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return None
    for variable in TOKEN_VARIABLES:
        value = env.get(variable, "").strip()
        if value:
            return checked_token(value, f"environment variable {variable}")
    path = hub_path(env, "token", "HF_TOKEN_PATH")
    return read_token_file(path) if path.is_file() else None


def hub_path(env: Mapping[str, str], name: str, *variables: str) -> Path:
    """A path of huggingface_hub: the first of `variables` that is set, else `name` in its home folder."""
    home = env.get("HF_HOME") or (env.get("XDG_CACHE_HOME") or "~/.cache") + "/huggingface"
    chosen = next((env[variable] for variable in variables if env.get(variable)), f"{home}/{name}")
    return Path(os.path.expanduser(os.path.expandvars(chosen)))


def read_token_file(path: Path) -> Token:
    """The token in a file. Raises AuthError for a file that cannot be read or holds no token."""
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        step = "name a file that holds the token and nothing else, or set HF_TOKEN"
        raise AuthError(f"cannot read the token file {path}", getattr(exc, "strerror", None) or str(exc), step) from exc
    return checked_token(value, f"file {path}")


def checked_token(value: str, source: str) -> Token:
    """A token that can be sent. Raises AuthError, which does not show it."""
    if not re.fullmatch(r"[!-~]+", value):
        why = "it is empty, or has spaces, line breaks or letters that no token has"
        raise AuthError(f"the token from {source} is not a token", why, "copy it again from your Hub's settings page")
    return Token(value, source)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "4300M", "4.7G" (decimal) or "4GiB" (binary).

    >>> [parse_size(t) for t in ("512", "4.7G", "1GiB", "100MB")]
    [512, 4700000000, 1073741824, 100000000]
    """
    match = _SIZE.match(text.strip())
    if not match:
        raise UsageError(f"{text!r} is not a size", "", "write it like 4300M, 4.7G or 4GiB")
    number, unit, binary = match.groups()
    step = 1024 if binary else 1000
    return int(float(number) * step ** " KMGT".index(unit.upper() or " "))


# ---- the models file -----------------------------------------------------------------

KeyPath = Tuple[Union[str, int], ...]  # names of tables and indexes of lists, down to a key

# Kinds of values -> (the types they are parsed to, how a person is told what is expected).
KINDS: Mapping[str, Tuple[Tuple[type, ...], str]] = {
    "boolean": ((bool,), "true or false"),
    "integer": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "string": ((str,), "a text in quotes"),
    "array": ((list,), 'a list, like ["a", "b"]'),
    "object": ((dict,), "a table"),
    "tables": ((list,), "a list of tables"),
}
LATER_KEYS = ("gateway", "host", "hosts", "monitoring", "node", "nodes", "replicas")  # kept free for versions to come


@dataclass(frozen=True)
class Key:
    """What may stand under a key. `read` makes the option's value of it, or raises ValueError or UsageError; `inside`
    are the keys of a table, or of each table of a list."""

    kind: str
    about: str = ""
    read: Callable[[Any], Any] = lambda value: value
    choices: Tuple[Any, ...] = ()
    inside: Mapping[str, Key] = field(default_factory=dict)


def mistakes_in(key: Key, value: Any, path: KeyPath = ()) -> Iterator[Tuple[KeyPath, str]]:
    """(where, what is wrong there) for all that is wrong below `path`."""
    kinds, expected = KINDS[key.kind]
    if not any(isinstance(value, kind) for kind in kinds) or isinstance(value, bool) != (key.kind == "boolean"):
        yield path, f"expects {expected}, not {json.dumps(value, default=str, ensure_ascii=False)[:40]}"
    elif key.choices and value not in key.choices:
        yield path, f"{value!r} is not one of: {', '.join(map(str, key.choices))}"
    elif key.kind == "tables":
        for index, item in enumerate(value):
            yield from mistakes_in(replace(key, kind="object"), item, (*path, index))
    elif key.inside:
        for name, item in value.items():
            if name in key.inside:
                yield from mistakes_in(key.inside[name], item, (*path, name))
            else:
                later = "is not yet known to this version" if name in LATER_KEYS else "is not a key"
                yield (*path, name), later + nearest(name, key.inside) * (name not in LATER_KEYS)
    else:
        try:
            key.read(value)
        except UsageError as exc:
            yield path, f"{exc.what}; {exc.why}" if exc.why else exc.what
        except (ValueError, argparse.ArgumentTypeError) as exc:
            yield path, str(exc)


def mistakes_among(models: Sequence[ListedModel]) -> Iterator[Tuple[KeyPath, str]]:
    """(where, what is wrong) for models that lack a name, or that a name would confuse with another."""
    for index, model in enumerate(models):
        taken = {name for other in models if other is not model for name in (other.name, other.deployment)}
        if not model.name:
            yield ("model", index), "has neither repo nor name"
        elif model.name in taken:
            yield ("model", index), f"another model or its deployment is called {model.name} too"
        elif model.deployment in taken:
            yield ("model", index, "serve"), f"another model or its deployment is called {model.deployment} too"


def read_models_file(path: Path, schema: Key) -> ModelsFile:
    """The models file at `path`. Raises UsageError that names file, line and key of all that is wrong with it."""
    load = json_tables if path.suffix == ".json" else toml_parser()
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor of Windows may have put a mark before it
        value = load(text)
    except OSError as exc:
        step = "hfship models --example > models.toml, and edit that"
        raise NotFoundError(f"cannot read the models file {path}: {exc.strerror}", "", step) from exc
    except (ValueError, RecursionError) as exc:
        line = re.search(r"line (\d+)", str(exc))
        what = f"{path}{f':{line[1]}' if line else ''}: this is not {'JSON' if path.suffix == '.json' else 'TOML'}"
        raise UsageError(what, str(exc), "mend it there; hfship models --example shows a whole file") from exc
    found = list(mistakes_in(schema, value))
    file = None if found else models_file_of(path, value)
    found += mistakes_among(file.models) if file else ()
    if not file or found:
        line_of = json_line if path.suffix == ".json" else toml_line
        lines = sorted((line_of(text, where), dotted(where) or "the file", what) for where, what in found)
        mistakes = [f"{path}:{line}: {key}: {what}" for line, key, what in lines]
        what, why = (mistakes[0], "") if len(mistakes) == 1 else (f"{path} has mistakes", "\n".join(mistakes))
        raise UsageError(what, why, "hfship models --schema lists every key")
    return file


def models_file_of(path: Path, value: Mapping[str, Any]) -> ModelsFile:
    """The models in the tables of a models file that has no unknown keys."""
    defaults = value.get("defaults", {})
    image = {"image": defaults["image"]} if "image" in defaults else {}
    tables = [{"name": ""}, *value.get("model", ())]
    others, *models = [
        ListedModel(
            name=own.get("name") or own.get("repo", "").partition("@")[0].rpartition("/")[2],
            repo=own.get("repo", ""),
            wishes={k: v for k, v in {**defaults, **own}.items() if k not in (*FOLDERS, "endpoint", "serve")},
            serve={**image, **defaults.get("serve", {}), **own.get("serve", {})},
        )
        for own in tables
    ]
    return ModelsFile(path, defaults, tuple(models), others)


def chosen_models(file: ModelsFile, names: Sequence[str]) -> Tuple[ListedModel, ...]:
    """The models that `names` (names, deployments or repositories) mean; all, without names. Raises NotFoundError."""
    known = file.known
    if not known:
        raise NotFoundError(f"{file.path} lists no model", "it has no [[model]]", "hfship models --example")
    for name in names:
        if name not in known:
            here = ", ".join(model.name for model in file.models) or "none"
            what = f"{file.path} has no model {name}{nearest(name, known)}"
            raise NotFoundError(what, f"in it are: {here}", f"hfship models {file.path}")
    return tuple({known[name].name: known[name] for name in names}.values()) if names else file.models


def toml_parser() -> Callable[[str], Any]:
    """`loads` of tomllib, or of tomli that hfship.pyz carries for Pythons below 3.11."""
    for name in ("tomllib", "tomli"):
        with contextlib.suppress(ImportError):
            loads: Callable[[str], Any] = importlib.import_module(name).loads
            return loads
    raise HostError("this Python reads no TOML", "tomllib came with 3.11", "use hfship.pyz, or write the file in JSON")


def json_tables(text: str) -> Any:
    """Parsed JSON. Raises ValueError also for a key that is there twice, of which JSON would keep the last."""

    def once(pairs: Sequence[Tuple[str, Any]]) -> Dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"a table has one of its keys twice: {', '.join(names)}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def toml_line(text: str, path: KeyPath) -> int:
    """The line of valid TOML on which the statement begins that brings `path`.

    The parser itself finds it: lines are one statement when they parse alone, and the statement is the last one of the
    shortest beginning of the file that has the path.
    """
    loads, lines = toml_parser(), text.split("\n")
    ends = [0]
    for end in range(1, len(lines) + 1):
        with contextlib.suppress(ValueError):
            loads("\n".join(lines[ends[-1] : end]))
            ends.append(end)
    low, high = 1, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        try:
            reduce(getitem, path, loads("\n".join(lines[: ends[middle]])))
            high = middle
        except (KeyError, IndexError):
            low = middle + 1
    return ends[low - 1] + 1


def json_line(text: str, path: KeyPath) -> int:
    """The line of valid JSON on which the last key of `path` stands.

    The parser itself finds it, in a text whose every key was given its line.

    >>> json_line('{"model": [\\n {"a": "{"},\\n {"a":\\n 1}]}', ("model", 1, "a"))
    3
    """

    def numbered(token: re.Match[str]) -> str:
        return f'"{token[1]}\\n{text.count(chr(10), 0, token.start()) + 1}":' if token[2] else token[0]

    here, line = json.loads(re.sub(r'"((?:[^"\\]|\\.)*)"(\s*:)?', numbered, text)), 1
    for step in path:
        if isinstance(step, int):
            here = here[step]
        else:
            line, here = next((int(k.rpartition("\n")[2]), v) for k, v in here.items() if k.rpartition("\n")[0] == step)
    return line


def dotted(path: KeyPath) -> str:
    """A path for people, who count from 1.

    >>> dotted(("model", 0, "serve", "port"))
    'model 1: serve.port'
    """
    return re.sub(r"\.(\d+)(\.|$)", lambda m: f" {int(m[1]) + 1}" + ": " * bool(m[2]), ".".join(map(str, path)))


def json_schema(key: Key) -> Dict[str, Any]:
    """What `hfship models --schema` prints: the keys as a JSON Schema (draft 2020-12), for editors."""
    tables = key.kind == "tables"
    schema: Dict[str, Any] = {"type": "object" if tables else key.kind, "description": key.about}
    if key.choices:
        schema["enum"] = list(key.choices)
    if key.inside:
        schema["properties"] = {name: json_schema(item) for name, item in key.inside.items()}
        schema["additionalProperties"] = False
    return {"type": "array", "items": schema} if tables else schema


# ======================================================================================
# §4 Files and processes
#
# Owns every promise about the disk: a file appears under its final name complete or not at all; room and file-size
# limits are known before the first byte; an I/O error becomes an HfshipError that names the folder. And the one way
# to run another program.
# ======================================================================================

CHUNK = 1 << 20  # bytes per read when hashing or copying: large enough that Python's cost disappears

# Filesystems whose largest file is limited. FAT: 32-bit size field (Microsoft FAT specification).
FILE_SIZE_LIMITS = {"vfat": 2**32 - 1, "msdos": 2**32 - 1}

# Filesystems on which posix_fallocate reserves blocks; elsewhere glibc emulates it by writing every block.
FALLOCATE_FILESYSTEMS = frozenset({"ext4", "xfs", "btrfs", "overlay", "f2fs"})

WORK_DIR = ".hfship"  # our folder inside a model folder
CHANGED_UNDERNEATH = (errno.ENOENT, errno.ELOOP)  # of a file of ours: somebody removed or replaced it
LEASE_BEAT_S = 10.0
LEASE_EXPIRY_S = 60.0
INCOMPLETE = ".incomplete"  # suffix of a file whose bytes are not all there or not yet verified


@dataclass(frozen=True)
class Filesystem:
    """The filesystem below a path: its type and the size of the largest file it takes (bytes, None = no limit)."""

    kind: str
    max_file_size: Optional[int]


def existing_ancestor(path: Path) -> Path:
    """The path itself or its nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def filesystem_of(path: Path) -> Filesystem:
    """Type and file-size limit at `path`, which need not exist yet; RLIMIT_FSIZE counts as a limit too."""
    target = str(existing_ancestor(path).resolve())
    kind = _mount_type(target, Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace"))
    limits = [FILE_SIZE_LIMITS[kind]] if kind in FILE_SIZE_LIMITS else []
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return Filesystem(kind, min(limits) if limits else None)


def _mount_type(target: str, mountinfo: str) -> str:
    """Filesystem type of the deepest mount point above `target` (format: proc_pid_mountinfo(5)).

    >>> _mount_type("/mnt/usb/x", "1 0 8:1 / / rw - ext4 /dev/a rw\\n2 1 8:2 / /mnt/usb rw - vfat /dev/b rw")
    'vfat'
    """
    best, kind = "", ""
    for line in mountinfo.splitlines():
        fields, _, tail = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), fields.split(" ")[4])
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, tail.split(" ")[0]
    return kind


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write at `path`, which need not exist yet. Some FUSE filesystems do not tell."""
    stat = os.statvfs(existing_ancestor(path))
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else sys.maxsize


def require_room(folder: Path, total: int, largest: int, what: str, next_step: str) -> None:
    """Refuse before the first byte when `total` bytes, or a file of `largest` bytes, do not fit at `folder`.

    Raises DiskError.
    """
    limit = filesystem_of(folder).max_file_size
    if limit is not None and largest > limit:
        most, has = human_bytes(limit), human_bytes(largest)
        why = f"the filesystem at {folder} takes files up to {most}, the largest has {has}"
        raise DiskError(f"cannot {what}: a file is too large for the target", why, next_step)
    free = free_bytes(folder)
    if total > free:
        what = f"cannot {what}: {folder} has {human_bytes(free)} free, {human_bytes(total)} needed"
        raise DiskError(what, f"{human_bytes(total - free)} are missing", next_step)


_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large for this filesystem",
    errno.EROFS: "the filesystem is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an input/output error",
}


def disk_error(exc: OSError, doing: str, path: Path, next_step: str = "") -> DiskError:
    """An OSError of the file system as an operator's error."""
    reason = _DISK_REASONS.get(exc.errno or 0, exc.strerror or str(exc))
    if exc.errno == errno.ENOSPC:
        reason += f" ({human_bytes(free_bytes(path))} free)"
    access = exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
    access |= exc.errno in (errno.EINVAL, errno.ENAMETOOLONG)  # a name that this filesystem cannot hold
    first = "leave the folder alone meanwhile" if exc.errno in CHANGED_UNDERNEATH else "free space"
    first = "look after the disk and its cable" if exc.errno in (errno.EIO, errno.ENODEV, errno.ENXIO) else first
    step = f"{first}, then run the same command again"
    if access:
        ours = doing not in ("read", "remove", "use")
        step = "choose another folder (-o DIR), or fix this one" if ours else "change that, or run it as its owner"
    return DiskError(f"cannot {doing} {path}: {reason}", "", next_step or step)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The descriptor of a file, for a while; a new file gets mode 0644, a link is not followed when writing."""
    fd = os.open(path, flags | os.O_CLOEXEC | (os.O_NOFOLLOW if flags & os.O_ACCMODE else 0), 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def rename_durably(source: Path, target: Path) -> None:
    """Give a file or a folder, whose content is durable, its name, durably. Raises OSError."""
    os.replace(source, target)
    with opened(target) as fd:  # first, and again: on FAT the new entry leads to nothing until then
        os.fsync(fd)
    fsync_dir(target.parent)


def atomic_write(path: Path, content: Union[str, bytes], mode: Optional[int] = None, durable: bool = True) -> None:
    """Write a small file so that it is there complete or not at all; with `durable` also across a power cut. Without
    `mode` the umask decides who may read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode or 0o666)
        try:
            with contextlib.suppress(OSError):  # some file systems know no modes; it has no more rights than asked for
                os.fchmod(fd, mode) if mode else None
            write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        (rename_durably if durable else os.replace)(temporary, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(exc, "write", path) from exc


def write_all(fd: int, data: Union[bytes, memoryview]) -> None:
    """os.write until everything is written (a single write may stop at 2 GiB or at a signal)."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pwrite_all(fd: int, data: Union[bytes, memoryview], offset: int) -> None:
    """os.pwrite until everything is written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def pread_exactly(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file."""
    pieces = []
    while size:
        piece = os.pread(fd, size, offset)
        if not piece:
            break
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def preallocate(fd: int, size: int, filesystem: Filesystem) -> None:
    """Give an open file its final size; where the filesystem can, reserve the blocks so that it cannot run full."""
    if size and filesystem.kind in FALLOCATE_FILESYSTEMS:
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    with contextlib.suppress(PermissionError):  # the answer of FUSE filesystems that grow files by writing only
        os.ftruncate(fd, size)


_FICLONE = 0x40049409  # ioctl: share the blocks of another file (linux/fs.h)


def clone_file(source: Path, target: Path) -> None:
    """A copy of a file that costs as little as the filesystem allows: shared blocks, a hard link, or the bytes."""
    with source.open("rb") as reader, target.open("xb") as writer, contextlib.suppress(OSError):
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        return
    target.unlink()
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def make_dir(path: Path) -> Path:
    """Create a folder and its parents, durably; a refusal becomes a DiskError."""
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
        path.mkdir(parents=True, exist_ok=True)
        # The innermost first: FAT, which has no journal, must not lead to a folder that was never written.
        for folder in dict.fromkeys(f for made in missing for f in (made, made.parent)):
            with contextlib.suppress(PermissionError):  # a folder that may be written, but not read
                fsync_dir(folder)
    except OSError as exc:
        raise disk_error(exc, "create the folder", path) from exc
    return path


def sha256_file(path: Path, count: Callable[[int], None] = lambda _: None) -> str:
    """Hex SHA-256 of a file; `count` is told the bytes of each chunk."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as stream:
        while True:
            size = stream.readinto(buffer)
            if not size:
                return digest.hexdigest()
            digest.update(buffer[:size])
            count(size)


@lru_cache(maxsize=None)
def boot_id() -> str:
    """Names the time since the last boot: the page cache and the process ids of then are still those of now."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process of this machine started (clock ticks since boot); "" when there is none (proc_pid_stat(5)), or
    only what is left of one until its parent has seen it end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def still_runs(pid: int, start: str, boot: str) -> bool:
    """Is the process that was written down as these three still there, and no other that has its number now?"""
    return boot == boot_id() and bool(start) and process_start(pid) == start


class InUseError(IncompleteError):
    """Another hfship holds the folder or the archive; `pid` is its process, 0 when that is not known."""

    def __init__(self, what: str, why: str, next_step: str, pid: int = 0) -> None:
        super().__init__(what, why, next_step)
        self.pid = pid


def own_file() -> Path:
    """The file that runs: hfship.pyz, or hfship.py."""
    source = Path(__file__).absolute()
    return source.parent if source.parent.is_file() else source  # /x/hfship.pyz/hfship.py


class FolderLock:
    """One hfship at a time per folder: an flock on `.hfship/lock`, and for network filesystems where flock does
    nothing a lease `.hfship/lease` that tells its owner and is touched every LEASE_BEAT_S.

    A lease is over when its owner is provably dead, or silent for LEASE_EXPIRY_S: then `doubtful` is True and the
    new owner must not go on in files that the old one may still have open. `on_loss` is called when somebody else
    took our lease. So a wrong judgement costs bandwidth, never bytes.
    """

    def __init__(self, folder: Path, on_loss: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.doubtful = False
        self._on_loss = on_loss
        self._path, self._lease = folder / WORK_DIR / "lock", folder / WORK_DIR / "lease"
        pid = os.getpid()
        owner = {"host": socket.gethostname(), "pid": pid, "start": process_start(pid), "boot_id": boot_id()}
        self._owner = json.dumps(owner)
        self._fd = -1
        self._released = threading.Event()

    def __enter__(self) -> FolderLock:
        make_dir(self._path.parent)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._take_lease()
            except BaseException:
                os.close(self._fd)
                raise
        except BlockingIOError as exc:
            raise self._in_use(self._read_lease()) from exc
        except OSError as exc:
            raise disk_error(exc, "lock", self._path) from exc
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        if self._read_lease() == json.loads(self._owner):
            self._lease.unlink()
        os.close(self._fd)

    def vanish(self) -> None:
        """Remove both files: the folder is finished and about to get its final name."""
        self._released.set()
        self._lease.unlink()
        self._path.unlink()
        fsync_dir(self._path.parent)

    def _read_lease(self) -> Dict[str, Any]:
        """The owner that the lease tells; {} when it is not there, or torn."""
        try:
            value = json.loads(self._lease.read_bytes())
            return value if isinstance(value, dict) and type(value.get("pid")) is int else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def _take_lease(self) -> None:
        """Write our lease, over one that is over. Raises InUseError, OSError."""
        with contextlib.suppress(FileExistsError):
            fd = os.open(self._lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                with os.fdopen(fd, "w") as stream:
                    stream.write(self._owner)
                    stream.flush()
                    os.fsync(fd)  # emptied by a power cut it would be a stranger's, until LEASE_EXPIRY_S
            except OSError:
                self._lease.unlink()
                raise
            return
        owner = self._read_lease()
        # Whoever ran on this kernel, in whatever container, is dead: we hold the flock. Or the host was started anew.
        boot = owner.get("boot_id", "")
        if boot and boot == boot_id() or owner.get("host") == socket.gethostname():
            if still_runs(owner["pid"], owner.get("start", ""), boot):  # a filesystem without flock
                raise self._in_use(owner)
        else:
            os.utime(self._path)  # the file server's clock, not ours, wrote the time of the lease
            if self._path.stat().st_mtime - self._lease.stat().st_mtime < LEASE_EXPIRY_S:
                raise self._in_use(owner)
            self.doubtful = bool(owner)  # an owner that lives does not leave a torn lease for longer than a beat
        atomic_write(self._lease, self._owner)

    def _in_use(self, owner: Mapping[str, Any]) -> InUseError:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} holds {self._path}"
        step = f"wait for it, or stop it; a host that is gone is forgotten after {LEASE_EXPIRY_S:.0f} s"
        pid = owner["pid"] if owner.get("host") == socket.gethostname() else 0
        return InUseError(f"{self.folder} is in use by another hfship", who, step, pid)

    def _beat(self) -> None:
        while not self._released.wait(LEASE_BEAT_S):
            if self._read_lease() != json.loads(self._owner):
                self._on_loss()
                return
            with contextlib.suppress(OSError):
                os.utime(self._lease)


def remove_if_empty(folder: Path, itself: bool = True) -> None:
    """Take back a folder into which nothing came but what locks it, or what locks it alone."""
    with contextlib.suppress(OSError):
        work = folder / WORK_DIR
        if os.listdir(folder) == [WORK_DIR] and not any(path.stat().st_size for path in work.iterdir()):
            shutil.rmtree(folder if itself else work)


BUILD_TABLE = "hfship-build.json"  # {"version", "entries": {name: SHA-256}}: what build_zipapp.py put into this file


def own_entry(name: str) -> bytes:
    """One entry of the hfship.pyz that runs. Raises OSError when there is none (from source: no such file)."""
    try:
        content: bytes = globals()["__loader__"].get_data(os.path.join(os.path.dirname(__file__), name))
        return content
    except (ImportError, EOFError, zlib.error) as exc:
        raise _damaged(name, f"{type(exc).__name__}: {exc}") from exc


def own_build() -> Mapping[str, Any]:
    """The build table of the hfship.pyz that runs; {} when hfship.py runs from source."""
    try:
        table = json.loads(own_entry(BUILD_TABLE))
        return {"version": str(table["version"]), "entries": dict(table["entries"])}
    except OSError:
        return {}
    except (ValueError, KeyError, TypeError) as exc:
        raise _damaged(BUILD_TABLE, str(exc)) from exc


def _damaged(entry: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{os.path.dirname(os.path.abspath(__file__))} is damaged",
        f"{entry}: {why}",
        "copy it again, and compare its SHA-256 with the published one",
    )


@dataclass(frozen=True)
class Completed:
    """What another program left: exit status and output."""

    code: int
    out: str
    err: str


def without_tokens(more: Optional[Mapping[str, str]]) -> Dict[str, str]:
    """The environment of another program: ours, less the tokens, and `more`."""
    return {**{k: v for k, v in os.environ.items() if k not in TOKEN_VARIABLES}, **(more or {})}


def run_program(
    argv: Sequence[str],
    stdin: Union[str, bytes, None] = None,
    env: Optional[Mapping[str, str]] = None,
    cwd: Optional[Path] = None,
    timeout_s: Optional[float] = None,
) -> Completed:
    """Run another program to its end and keep its output. The only uses of subprocess but for docker's log
    stream are this and `follow_program`.

    `env` is added to our own environment, which is passed on without tokens. Raises HostError when the program is
    missing or takes longer than `timeout_s`; a non-zero exit status is the caller's to judge.
    """
    data = stdin.encode() if isinstance(stdin, str) else stdin
    try:
        with _start_errors(argv[0]):
            done = subprocess.run(
                list(argv),
                input=data if data is not None else b"",
                capture_output=True,
                env=without_tokens(env),
                cwd=cwd,
                timeout=timeout_s,
                check=False,
            )
    except subprocess.TimeoutExpired as exc:
        why = f"no end within {timeout_s:.0f} s"
        raise HostError(f"{argv[0]} did not answer", why, f"run {argv[0]} by hand") from exc
    return Completed(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


@contextlib.contextmanager
def _start_errors(program: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as exc:
        why = f"{program} was not found on PATH"
        raise HostError(f"{program} is not installed", why, f"install {program}") from exc
    except PermissionError as exc:
        raise HostError(f"{program} cannot be run", str(exc), f"check the permissions of {program}") from exc


def follow_program(
    argv: Sequence[str], stop: threading.Event, stdin: str = "", tell: Callable[[str], bool] = lambda _: False
) -> Completed:
    """Run another program for as long as `stop` is not set. Each line that it prints, ended by LF or CR, is told as it
    comes; those that `tell` has no use for are kept in `out`, errors among them. `stdin` must fit into a pipe."""
    environ, kept, rest = without_tokens({"LC_ALL": "C"}), [], b""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with _start_errors(argv[0]), subprocess.Popen(list(argv), env=environ, **pipes) as process:  # type: ignore[call-overload]
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(stdin.encode())
        while True:
            if stop.is_set():
                process.terminate()
            if not select.select([process.stdout], [], [], 0.2)[0]:
                continue
            piece = os.read(process.stdout.fileno(), 1 << 16)
            *lines, rest = re.split(rb"[\r\n]+", rest + piece)
            kept += [text for text in (line.decode("utf-8", "replace") for line in lines) if not tell(text)]
            if not piece:
                break
    return Completed(process.returncode, "\n".join([*kept, rest.decode("utf-8", "replace")]).strip(), "")


def default_jobs() -> int:
    """One worker per core that this process may use."""
    return len(os.sched_getaffinity(0))


FORK_SIZE = 8 << 20  # bytes from which on workers are forked
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Outcome(NamedTuple):
    """How a worker's task ended: what it raised and the cause of that, or its result."""

    error: Optional[BaseException] = None
    cause: Optional[BaseException] = None
    result: Any = None


class Workers:
    """Processes that each run `work(count, *task)` for the tasks they are sent, one after the other.

    They are forked, so they know all that we know; tasks and results are small, data goes through files and slots.
    They die with us, and an error of theirs is raised here. What a task tells its `count`, `progress` hears. With 0 of
    them the tasks run in this process: forking is not worth it. More than `most` are threads of that many processes.
    """

    def __init__(
        self,
        count: int,
        work: Callable[..., Any],
        progress: Callable[[Any], None] = lambda _: None,
        most: int = 1 << 10,
    ) -> None:
        self.count, self._work, self._progress, self._processes = count, work, progress, min(count, most)
        self._tasks: List[Deque[Tuple[Any, ...]]] = [deque() for _ in range(max(count, 1))]
        self._links: List[Any] = []
        self._pids: List[int] = []
        self._ready: Deque[Any] = deque()  # links that have a result; without workers the results

    def __enter__(self) -> Workers:
        if not self.count:
            return self
        from multiprocessing.connection import Pipe  # few commands need it

        with contextlib.suppress(AttributeError):  # else a frame's memory goes back to the kernel, which zeroes it anew
            _libc().mallopt(_M_MMAP_THRESHOLD, FORK_SIZE)
            _libc().mallopt(_M_TRIM_THRESHOLD, 8 * FORK_SIZE)
        caught: List[int] = []  # Python forgets an exception that comes while it forks
        ending = [number for number in _ENDING if callable(signal.getsignal(number))]
        handlers: Dict[int, Any] = {n: signal.signal(n, lambda got, _: caught.append(got)) for n in ending}
        gc.freeze()  # else the first collection of a worker would copy all that it shares with us
        theirs: List[Any] = []
        try:
            for _ in range(self.count):
                ours, far = Pipe()
                self._links.append(ours)
                theirs.append(far)
            for number in range(self._processes):
                self._fork(theirs[number :: self._processes], theirs)
        except OSError as exc:
            self.__exit__()
            raise _short_of_memory("cannot start a worker", str(exc)) from exc
        finally:
            gc.unfreeze()
            for link in theirs:
                link.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if caught:
            self.__exit__()
            handlers[caught[0]](caught[0], None)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):  # who ignores SIGCHLD has no child to bury
                os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._links = []  # each is closed when nobody waits at it any more
        self._ready.clear()

    def _fork(self, own: Sequence[Any], theirs: Sequence[Any]) -> None:
        """One process with a worker at each of its `own` links."""
        libc, parent = _libc(), os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns if there are threads. Ours, progress and a lock's heartbeat, share no lock with workers.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            try:
                for name in _ENDING:  # these are for the parent, which then ends us
                    signal.signal(name, signal.SIG_IGN)
                if libc:
                    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                for link in [*self._links, *(link for link in theirs if link not in own)]:
                    link.close()  # else nobody would see the end of the other processes
                if os.getppid() == parent:
                    for link in own[1:]:
                        threading.Thread(target=self._serve, args=(link,), daemon=True).start()
                    self._serve(own[0])
            finally:
                os._exit(0)
        self._pids.append(pid)

    def _serve(self, link: Any) -> None:
        """What a worker does until its parent is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                task = link.recv()
                try:
                    outcome = Outcome(result=self._work(link.send, *task))
                except BaseException as exc:  # noqa: BLE001 - the parent raises it
                    cause = exc.__cause__ if isinstance(exc, HfshipError) else RuntimeError(traceback.format_exc())
                    outcome = Outcome(exc, cause if isinstance(cause, (OSError, RuntimeError)) else None)
                try:
                    link.send(outcome)
                except (AttributeError, TypeError, ValueError) as exc:  # what cannot be pickled must not be waited for
                    link.send(Outcome(RuntimeError(f"{type(outcome.error).__name__}: {exc}"), outcome.cause))

    def send(self, worker: int, *task: Any) -> None:
        """Give a worker another task."""
        self._tasks[worker].append(task)
        if not self.count:
            self._ready.append(self._work(self._progress, *task))
            return
        with contextlib.suppress(ConnectionError, IndexError):  # it is gone, as `_hear` will tell
            self._links[worker].send(task)

    @property
    def busy(self) -> bool:
        return any(self._tasks)

    def receive(self) -> Tuple[int, Tuple[Any, ...], Any]:
        """(worker, task, result) of the next task that is done. Raises what it raised."""
        if not self.count:
            return 0, self._tasks[0].popleft(), self._ready.popleft()
        from multiprocessing.connection import wait

        while True:
            if not self._ready:
                self._ready.extend(wait(self._links))
            worker = self._links.index(self._ready.popleft())
            outcome = self._hear(worker)
            if outcome:
                return worker, self._tasks[worker].popleft(), outcome.result

    def call(self, worker: int, *task: Any) -> Any:
        """Run a task on a worker that nobody else uses meanwhile, and wait for its result: for a thread per worker."""
        self.send(worker, *task)
        outcome = None
        while outcome is None:
            outcome = self._hear(worker)
        self._tasks[worker].popleft()
        return outcome.result

    def _hear(self, worker: int) -> Optional[Outcome]:
        """The next message of a worker: None if it was progress. Raises what its task raised."""
        try:
            message = self._links[worker].recv()
        except (EOFError, ConnectionError, IndexError) as exc:
            raise self._died(worker) from exc
        if not isinstance(message, Outcome):
            self._progress(message)
            return None
        if isinstance(message.error, MemoryError):
            raise _short_of_memory("a worker got no more memory", "") from message.error
        if message.error:
            raise message.error from message.cause
        return message

    def _died(self, worker: int) -> HostError:
        how = "us"
        with contextlib.suppress(ChildProcessError):
            end = os.waitid(
                os.P_PID, self._pids[worker % self._processes], os.WEXITED | os.WNOWAIT
            )  # `__exit__` buries it
            if end:
                how = f"status {end.si_status}" if end.si_code == os.CLD_EXITED else signal.Signals(end.si_status).name
        return _short_of_memory(f"a worker was ended by {how}", "where memory is short, the kernel does so")

    def run(self, next_task: Callable[[int, bool], Optional[Tuple[Any, ...]]]) -> Iterator[Tuple[Any, ...]]:
        """Keep every worker at up to two tasks that `next_task(worker, idle)` has for it; yield (worker, task, result)
        as they are done, until there are no more."""
        while True:
            for worker, waiting in enumerate(self._tasks):
                while len(waiting) < 2:
                    task = next_task(worker, not waiting)
                    if task is None:
                        break
                    self.send(worker, *task)
            if not self.busy:
                return
            yield self.receive()

    def map(self, items: Sequence[Any]) -> List[Any]:
        """The results of `work(count, item)` for all items, in their order."""
        left, results = iter(items), {}
        for _, (item,), result in self.run(lambda _, idle: next(((item,) for item in left), None) if idle else None):
            results[item] = result
        return [results[item] for item in items]


_PR_SET_PDEATHSIG, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = 1, -3, -1  # linux/prctl.h, malloc.h


@lru_cache(maxsize=None)
def _libc() -> Any:
    """The C library; None for a Python without ctypes."""
    with contextlib.suppress(ImportError, OSError):
        return importlib.import_module("ctypes").CDLL(None)
    return None


def _short_of_memory(what: str, why: str) -> HostError:
    return HostError(what, why, "run the same command again, it goes on where it stopped; -j 1 needs least memory")


# ======================================================================================
# §5 Manifest
#
# Owns the contract that travels: which files a model has, their sizes and SHA-256, and where they came from. It lies
# at NAME/.hfship/manifest.json, goes first into the archive and stays beside the model.
#
# Format hfship-manifest/1, UTF-8 JSON, keys sorted, one space of indentation, newline at the end:
#   {"format": "hfship-manifest/1", "name": NAME,
#    "source": null | {"endpoint", "repo", "revision", "resolved_repo", "commit", "license", "gated", "fetched_at",
#                      "repo_type"},
#    "files": [{"path", "sha256", "size"}, ...]  sorted by the UTF-8 bytes of path,
#    "totals": {"files": N, "bytes": N}}
# `source` is null when the folder did not come through `fetch`: then nobody but the packer vouches for the bytes. With
# "unproven": true nobody does: the model came in an archive of another program, without sums. "left_out": N says that
# these are not all files of the model: somebody chose to restore them without N others.
# ======================================================================================

MANIFEST_FORMAT = "hfship-manifest/1"
MANIFEST_PATH = f"{WORK_DIR}/manifest.json"
UNPROVEN = "unproven: no sums came with it"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_REPO_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z", re.ASCII)
REPO_TYPES = ("model", "dataset", "space")
# Never part of a model: our own state, huggingface_hub's, version control, unfinished files.
_NOT_CONTENT = re.compile(r"(^|/)(\.hfship|\.git|\.cache/huggingface)(/|$)|\.incomplete$|(^|/)\.DS_Store$")
_NOT_ON_FAT = re.compile(r'[<>:"|?*]|[. ](/|$)')  # of the names that check_relative_path lets pass


@dataclass(frozen=True)
class FileEntry:
    """One file of a model: path relative to the model folder with '/', size in bytes, hex SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where a model came from, as the Hub told it."""

    endpoint: str
    repo: str
    revision: str
    resolved_repo: str
    commit: str
    license: Optional[str] = None
    gated: Union[bool, str] = False
    fetched_at: str = ""
    repo_type: str = "model"


@dataclass(frozen=True)
class Manifest:
    """The files of one model and where they came from. `files` is sorted by the UTF-8 bytes of the path."""

    name: str
    files: Tuple[FileEntry, ...]
    source: Optional[Source] = None
    unproven: bool = False
    left_out: int = 0

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def caveats(self) -> str:
        """What to say of files that are all as listed here, and yet are not all that was published, or by nobody."""
        left_out = f"; partial by choice: {counted(self.left_out, 'other file')} of the model left out"
        return f"; {UNPROVEN}" * self.unproven + left_out * bool(self.left_out)

    def to_json(self) -> str:
        """The canonical text: equal manifests have equal bytes."""
        value = {
            "format": MANIFEST_FORMAT,
            "name": self.name,
            "source": vars(self.source) if self.source else None,
            "files": [vars(entry) for entry in self.files],
            "totals": {"files": len(self.files), "bytes": self.size},
            **({"unproven": True} if self.unproven else {}),
            **({"left_out": self.left_out} if self.left_out else {}),
        }
        return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n"


def make_manifest(name: str, files: Iterable[FileEntry], source: Optional[Source] = None) -> Manifest:
    """A manifest with its files in canonical order. Raises UsageError for a name that cannot be a folder."""
    if not _NAME.match(name):
        raise UsageError(
            f"{name!r} cannot be the name of a model",
            "names have letters, digits, '.', '_' and '-', and start with a letter or digit",
            "choose one with --name",
        )
    return Manifest(name, tuple(sorted(files, key=lambda entry: entry.path.encode("utf-8"))), source)


def parse_manifest(text: Union[str, bytes], where: str) -> Manifest:
    """Read and check a manifest; `where` names it in errors.

    Everything a later step relies on is checked here: path safety, no duplicates, hash form, sizes. Raises
    IntegrityError.
    """
    try:
        return _manifest_from_value(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError, UsageError) as exc:
        why = f"{type(exc).__name__}: {exc}"
        raise IntegrityError(f"{where} is not a valid manifest", why, "fetch or copy the model again") from exc


def _manifest_from_value(value: Any) -> Manifest:
    if value["format"] != MANIFEST_FORMAT:
        raise ValueError(f"format is {value['format']!r}, this hfship reads {MANIFEST_FORMAT}")
    files = [FileEntry(str(f["path"]), f["size"], str(f["sha256"])) for f in value["files"]]
    for entry in files:
        check_relative_path(entry.path)
        if type(entry.size) is not int or entry.size < 0:
            raise ValueError(f"size of {entry.path!r} is {entry.size!r}")
        if not _SHA256.match(entry.sha256):
            raise ValueError(f"sha256 of {entry.path!r} is {entry.sha256!r}")
    check_distinct_paths(entry.path for entry in files)
    source = Source(**value["source"]) if value.get("source") else None
    if source:
        check_source(source)
    unproven, left_out = value.get("unproven") is True, value.get("left_out", 0)
    if type(left_out) is not int or left_out < 0:
        raise ValueError(f"left_out is {left_out!r}")
    return replace(make_manifest(str(value["name"]), files, source), unproven=unproven, left_out=left_out)


def check_source(source: Source) -> None:
    """Raise ValueError unless a source can be shown, sent in a header, and be a word of vLLM's command line."""
    for key, value in vars(source).items():
        other: type = {"license": type(None), "gated": bool}.get(key, str)
        if not isinstance(value, (str, other)) or not str(value).isprintable():
            raise ValueError(f"{key} of the source is {value!r}")
    named = _REPO_ID.match(source.repo) and _REPO_ID.match(source.resolved_repo) and source.repo_type in REPO_TYPES
    if not named or not _COMMIT.match(source.commit):
        raise ValueError(f"the source is {source.repo_type} {source.repo}, {source.resolved_repo} at {source.commit}")


def check_relative_path(path: str) -> None:
    """Raise ValueError unless `path` stays inside its folder on every system, now and after a copy to FAT or NTFS.

    Refused: empty, absolute, drive and UNC names, '.' and '..' segments, backslashes, control characters, and our own
    work folder. The Hub's names are data, not orders.
    """
    segments = path.split("/")
    if not path or any(segment in ("", ".", "..") for segment in segments):
        raise ValueError(f"unsafe path {path!r}")
    if "\\" in path or re.match(r"[A-Za-z]:", path) or any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise ValueError(f"unsafe path {path!r}")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in path) or any(len(s.encode("utf-8")) > 255 for s in segments):
        raise ValueError(f"path {path!r} cannot be stored")
    if segments[0].lower() == WORK_DIR:
        raise ValueError(f"path {path!r} is reserved for hfship")


def check_distinct_paths(paths: Iterable[str]) -> None:
    """Raise ValueError when two paths are equal, or one is a folder of the other."""
    seen: Set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"duplicate path {path!r}")
        seen.add(path)
    for path in seen:
        parent = path.rpartition("/")[0]
        while parent:
            if parent in seen:
                raise ValueError(f"{parent!r} is both a file and a folder")
            parent = parent.rpartition("/")[0]


def read_manifest(folder: Path) -> Optional[Manifest]:
    """The manifest of a model folder; None when it has none."""
    path = folder / MANIFEST_PATH
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest beside its model, atomically."""
    make_dir(folder / WORK_DIR)
    atomic_write(folder / MANIFEST_PATH, manifest.to_json())


def content_files(folder: Path) -> List[Tuple[str, int]]:
    """(path, size) of every file that belongs to a model folder, sorted. Symbolic links count as what they point to.

    Raises IntegrityError for a dangling link, a link to a folder or a special file, and for names that are not safe.
    """
    found = []

    def refuse(exc: OSError) -> NoReturn:  # os.walk would leave the folder out and say nothing
        raise disk_error(exc, "read", Path(exc.filename)) from exc

    for root, folders, names in os.walk(folder, onerror=refuse):
        relative = os.path.relpath(root, folder)
        prefix = "" if relative == "." else relative + "/"
        folders[:] = sorted(d for d in folders if not _NOT_CONTENT.search(prefix + d))
        for name in folders + names:
            path = prefix + name
            full = Path(root) / name
            if _NOT_CONTENT.search(path) or (full.is_dir() and not full.is_symlink()):
                continue
            found.append((path, _regular_size(folder, full, path)))
    return sorted(found, key=lambda item: item[0].encode("utf-8", "surrogateescape"))


def require_names(folder: Path, paths: Sequence[str], what: str) -> None:
    """Refuse names that the filesystem of a folder, which has our work folder, cannot hold, or holds for the same: FAT,
    exFAT, NTFS, SMB. Raises DiskError."""
    step = "choose another folder with -o DIR"
    first: Dict[str, str] = {}
    twins = [path for path in paths if first.setdefault(path.casefold(), path) != path]
    if twins and ignores_case(folder):
        why = f"it would hold these for the same: {', '.join(twins[:10])}"
        raise DiskError(f"cannot {what}: its filesystem ignores case", why, step)
    strange = [path for path in paths if _NOT_ON_FAT.search(path)]
    kind = filesystem_of(folder).kind
    if strange and kind in ("vfat", "exfat"):
        raise DiskError(f"cannot {what}: {kind} cannot hold all names", f"these: {', '.join(strange[:10])}", step)


def ignores_case(work: Path) -> bool:
    """Whether the filesystem of a folder, which has our work folder, takes A and a for the same name."""
    return (work / WORK_DIR.upper()).exists()


def require_finished(folder: Path) -> None:
    """Refuse a folder without manifest into which a fetch or unpack is still under way. Raises IncompleteError."""
    traces = [folder / WORK_DIR / name for name in ("partial", "verified.jsonl", "lease")]
    unfinished = [path for path in traces if path.exists()] + list(islice(folder.rglob("*" + INCOMPLETE), 1))
    if unfinished and not (folder / MANIFEST_PATH).exists():
        step = "run the fetch or unpack again until it ends with exit code 0"
        raise IncompleteError(f"{folder} is not complete yet", f"there is {unfinished[0]}", step)


def _regular_size(folder: Path, full: Path, path: str) -> int:
    try:
        check_relative_path(path)
    except ValueError as exc:
        raise IntegrityError(f"{folder} has a file that cannot travel", str(exc), "rename or remove it") from exc
    if not full.is_file():
        why = f"{path} is a dangling link, a link to a folder or a special file"
        raise IntegrityError(f"{folder} has something that is not a file", why, "remove it, or fetch the model again")
    return full.stat().st_size


# ======================================================================================
# §6 Hub
#
# Owns the Hub's HTTP protocol: revision -> commit, the file tree with its paging, where the bytes of a file are, who
# may see the token, what an error answer means, and when to wait. Knows nothing of disks.
# Promises: `Authorization` goes to the Hub's own origin and nowhere else; signed URLs are never shown.
# Sources: huggingface_hub 2.4 and hub-docs; the Hub's OpenAPI leaves most of this out.
# ======================================================================================

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 15.0  # no byte for this long is a stall
MAX_REDIRECTS = 20
MAX_CHANGES = 2  # of an object under one address, then its ETags are not believed: some differ from server to server
MAX_API_BYTES = 64 << 20  # one page of a tree has about 300 bytes per file and at most 1000 files
REDIRECTS = frozenset({301, 302, 303, 307, 308})
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
RETRIES = 6  # attempts without any progress before giving up
RETRY_AFTER_S = 120.0  # what a server may ask us to wait before each of them
URL_RENEWAL_S = 120.0  # a signed URL is renewed when it has less than this left

# A page of the Hub: .../ORG/NAME, .../datasets/ORG/NAME, .../ORG/NAME/tree/REVISION/FOLDER, .../blob/REVISION/FILE
_PAGE = re.compile(
    r"/(?:models/)?(?P<type>datasets/|spaces/)?(?P<repo>[^/@]+(?:/(?!(?:tree|blob|resolve|raw)/)[^/@]+)?)"
    r"(?:/(?P<kind>tree|blob|resolve|raw)/(?P<revision>refs/[^/]+/[^/]+|[^/]+)(?:/(?P<path>.+?))?)?/?$"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it. LFS and Xet files have a `sha256`; for the others `git_sha1` is the blob id."""

    path: str
    size: int
    git_sha1: str
    sha256: Optional[str] = None

    @property
    def etag(self) -> str:
        """What huggingface_hub records for this file: the SHA-256, or the git blob id of small files."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    source: Source
    files: Tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def parse_repo(text: str, endpoint: str = DEFAULT_ENDPOINT) -> Tuple[str, Optional[str]]:
    """(repository, revision) of "ORG/NAME[@REV]" or of an address copied from a browser.

    >>> parse_repo("Qwen/Qwen3-8B@refs/pr/1")
    ('Qwen/Qwen3-8B', 'refs/pr/1')
    >>> parse_repo("https://huggingface.co/Qwen/Qwen3-8B/tree/main")
    ('Qwen/Qwen3-8B', 'main')
    """
    if text.startswith(("http://", "https://")):
        return _parse_page(text, endpoint)
    repo, _, revision = re.sub(r"^hf://(models/)?", "", text).partition("@")
    repo = repo.rstrip("/")
    if not _REPO_ID.match(repo):
        step = "give it as ORG/NAME or ORG/NAME@REVISION, for example Qwen/Qwen3-8B"
        raise UsageError(f"{text!r} is not a repository", "", step)
    return repo, revision or None


def _parse_page(url: str, endpoint: str) -> Tuple[str, Optional[str]]:
    """(repository, revision) of a page of the Hub. Raises UsageError, with the command to type, for a page that says
    more than that: another Hub, a dataset, one file."""
    page = _PAGE.match(unquote(urlsplit(url).path))
    if not page or not _REPO_ID.match(page["repo"]):
        raise UsageError(f"{redact(url)} is not the page of a repository", "", "give the repository as ORG/NAME")
    known = {origin(endpoint)[1], "huggingface.co", "hf.co"}
    host = urlsplit(url).netloc.rpartition("@")[2]
    more = [] if origin(url)[1] in known else ["--endpoint", f"{origin(url)[0]}://{host}"]
    more += ["--repo-type", page["type"][:-2]] if page["type"] else []
    more += ["--include", page["path"] + ("/" if page["kind"] == "tree" else "")] if page["path"] else []
    if more:
        words = page["repo"] + (f"@{page['revision']}" if page["revision"] else "")
        what = f"{redact(url)} is more than the name of a repository"
        raise UsageError(what, "", command_line("hfship", "fetch", words, *more))
    return page["repo"], page["revision"]


def api_url(endpoint: str, repo_type: str, repo: str, *parts: str) -> str:
    """A URL below the Hub's API; every part is quoted, '/' included (so `refs/pr/1` stays one segment).

    >>> api_url("https://hub", "dataset", "a/b", "tree", "refs/pr/1")
    'https://hub/api/datasets/a/b/tree/refs%2Fpr%2F1'
    """
    return "/".join([f"{endpoint}/api/{repo_type}s/{repo}", *(quote(part, safe="") for part in parts)])


def resolve_url(source: Source, path: str) -> str:
    """Where the bytes of a file are asked for."""
    prefix = "" if source.repo_type == "model" else source.repo_type + "s/"
    return f"{source.endpoint}/{prefix}{source.resolved_repo}/resolve/{source.commit}/{quote(path)}"


def fetch_command(source: Source, revision: str, folder: Path, *flags: str) -> str:
    """The command that brings a repository at a revision into `folder`."""
    words = [*flags, source.repo if revision == "main" else f"{source.repo}@{revision}", "-o", str(folder.parent)]
    words += ["--name", folder.name] if folder.name != source.repo.rpartition("/")[2] else []
    words += ["--repo-type", source.repo_type] if source.repo_type != "model" else []
    words += ["--endpoint", source.endpoint] if source.endpoint != DEFAULT_ENDPOINT else []
    return command_line("hfship", "fetch", *words)


def origin(url: str) -> Tuple[str, str, int]:
    """(scheme, host, port) of a URL.

    >>> origin("https://Hub.example/x")
    ('https', 'hub.example', 443)
    """
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)


def redirect_target(url: str, location: str) -> str:
    """The absolute URL that a redirect leads to. Raises NetworkError when it is none, or would leave https."""
    step = "check HF_ENDPOINT and the proxy"
    try:
        target = urljoin(url, location)
        if origin(target)[0] not in ("http", "https"):
            raise ValueError(f"{origin(target)[0]}: is neither http nor https")
    except ValueError as exc:
        raise NetworkError("the Hub redirects to what is no address", str(exc), step) from exc
    if url.startswith("https://") and not target.startswith("https://"):
        what = "the Hub redirects from https to an unencrypted address"
        raise NetworkError(what, f"{origin(url)[1]} -> {origin(target)[1]}", step)
    return target


def url_expiry(url: str, now: float) -> Optional[float]:
    """Unix time at which a signed URL stops working; None when it does not say.

    CloudFront writes `Expires`, S3 `X-Amz-Date` and `X-Amz-Expires`; a lone `X-Amz-Expires` counts from now.

    >>> url_expiry("https://cdn/x?Expires=1700000000&Signature=y", 0.0)
    1700000000.0
    >>> url_expiry("https://s3/x?X-Amz-Date=20231114T221320Z&X-Amz-Expires=60", 0.0)
    1700000060.0
    """
    query = {key.lower(): values[-1] for key, values in parse_qs(urlsplit(url).query).items()}
    try:
        if "expires" in query:
            return float(query["expires"])
        if "x-amz-expires" in query:
            stamp = query.get("x-amz-date")
            start = calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ")) if stamp else now
            return start + float(query["x-amz-expires"])
    except ValueError:
        pass  # a form we do not know: the answer 403 will tell
    return None


def next_page(link_header: str) -> Optional[str]:
    """The rel="next" URL of a Link header (RFC 8288); other relations may share the header.

    >>> next_page('<https://h/auth>; rel="xet-auth", <https://h/t?cursor=A>; rel="next"')
    'https://h/t?cursor=A'
    """
    for target, parameters in re.findall(r"<([^>]*)>([^<]*)", link_header):
        if re.search(r'rel="?([^";,]* )?next\b', parameters):
            return str(target)
    return None


def rate_limit_wait(headers: Mapping[str, str]) -> Optional[float]:
    """Seconds that a 429 or 503 asks us to wait: `RateLimit` when its quota is used up, else `Retry-After`.

    >>> rate_limit_wait({"RateLimit": '"resolvers";r=0;t=55'}), rate_limit_wait({"Retry-After": "7"})
    (56.0, 7.0)
    """
    match = re.search(r'"\w+"\s*;\s*r=(\d+)\s*;\s*t=(\d+)', headers.get("RateLimit", ""))
    if match and int(match.group(1)) == 0:
        return float(match.group(2)) + 1
    retry_after = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    with contextlib.suppress(TypeError, ValueError, IndexError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None


def backoff(attempt: int) -> float:
    """Seconds to wait before attempt `attempt` (1, 2, ...): full jitter below 0.5, 1, 2, ... 30 s."""
    return random.uniform(0.05, min(30.0, 0.5 * 2 ** (attempt - 1)))


def repo_file(item: Mapping[str, Any]) -> RemoteFile:
    """One entry of a tree answer. In a tree the SHA-256 is `lfs.oid` (in `siblings` it is `lfs.sha256`), and the
    entry's own `oid` is then only the hash of the LFS pointer."""
    lfs = item.get("lfs") or {}
    sha256 = lfs.get("oid") or lfs.get("sha256")
    size = lfs.get("size", item["size"])
    path, oid = item["path"], item["oid"]
    check_relative_path(path)
    if type(size) is not int or size < 0 or not _COMMIT.match(oid) or (sha256 and not _SHA256.match(sha256)):
        raise ValueError(f"unusable entry for {path!r}")
    return RemoteFile(path, size, oid, sha256)


def git_blob_sha1(size: int) -> Any:
    """A hash object that gives the git blob id once fed with the `size` bytes of the file."""
    return hashlib.sha1(b"blob %d\0" % size)


def hub_error(
    status: int, headers: Mapping[str, str], body: str, source: Source, token: Optional[Token]
) -> HfshipError:
    """What an error answer of the Hub means for the operator. `source` may lack the commit."""
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "") or _body_message(body)
    repo, page = source.repo, f"{source.endpoint}/{source.repo}"
    request = headers.get("X-Request-Id") or headers.get("X-Amz-Cf-Id") or ""
    why = f"HTTP {status} {code} {message}".strip() + (f" (request {request})" if request else "")
    if code == "GatedRepo" or "restricted" in message.lower() and status in (401, 403):
        who = f"the token ({token.source}) has no access" if token else "no token was given"
        step = f"accept the terms at {page}, then set HF_TOKEN to a token that may read gated repositories"
        return AuthError(f"{repo} is gated", f"{who}; {why}", step)
    if status == 401 and "credentials" in message.lower():
        what = f"the Hub refuses the token from {token.source if token else 'the request'}"
        return AuthError(what, why, "put a valid token there, or remove it for public repositories")
    if "disabled" in message.lower() and status == 403:
        return AuthError(f"{repo} is disabled by the Hub", why, f"see {page}")
    if code == "RevisionNotFound" or status == 404 and "rev" in message.lower():
        what, step = f"{repo} has no revision {source.revision!r}", f"see the branches and tags at {page}/tree/main"
        return NotFoundError(what, why, step)
    if code == "EntryNotFound" and not source.commit:
        return NotFoundError(f"no Hub answers at {source.endpoint}", why, "check --endpoint and HF_ENDPOINT")
    if code == "EntryNotFound":
        step = "run the same command again: the listing is made anew"
        return NotFoundError(f"a file is missing in {repo}", why, step)
    if status in (401, 404):
        hint = "check the spelling" + ("" if token else "; if it is private, set HF_TOKEN")
        return NotFoundError(f"{repo} was not found on {source.endpoint}", why, hint)
    if status == 403:
        return AuthError(f"access to {repo} is forbidden", why, "check what the token may read")
    return NetworkError(f"the Hub answered with an error for {repo}", why, "run the same command again later")


def not_a_hub(endpoint: str, why: str) -> NetworkError:
    """What answers is something else."""
    step = "check HF_ENDPOINT; a proxy or login page may stand in between"
    return NetworkError(f"{endpoint} does not answer like a Hub", why, step)


def _body_message(body: str) -> str:
    """The message of a JSON error body in any of the Hub's forms; nothing of an HTML page."""
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(value, dict):
        return ""
    message = value.get("error_description") or value.get("error") or value.get("errors") or ""
    if isinstance(message, list) and message:
        message = message[0].get("message", "") if isinstance(message[0], dict) else message[0]
    return str(message)[:300]


def tls_error(url: str, exc: Exception, env: Mapping[str, str]) -> NetworkError:
    """A failed TLS handshake, with the variable that decides which certificates are believed."""
    host, reason = origin(url)[1], _root_cause(exc)
    if "WRONG_VERSION_NUMBER" in reason:
        return NetworkError(f"{host} does not speak https", reason, "write http:// in the address, or correct its port")
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    used = next((name for name in names if env.get(name)), None)
    add = f"{used} is in use: add your site's CA to {env[used]}" if used else ""
    step = add or "set SSL_CERT_FILE to your site's CA bundle"
    return NetworkError(f"TLS to {host} failed", reason, f"{step}; check the clock")


class RetryableError(Exception):
    """A fault that may pass: the same bytes are asked for again. `wait_s` is how long the server wants us to wait."""

    def __init__(self, reason: str, wait_s: Optional[float] = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class ObjectChanged(RetryableError):
    """The server has another object at this address than a moment ago: what came of the old one is worthless."""


class Gate:
    """Holds back every request of this process while the Hub wants us to wait (429)."""

    def __init__(self, reporter: Reporter, stop: threading.Event) -> None:
        self._reporter, self._stop = reporter, stop
        self._lock = threading.Lock()
        self._open_at = 0.0
        self._counting = False

    def hold(self, seconds: float, reason: str) -> None:
        """Close the gate for `seconds` from now on, and let the operator see how long that still is."""
        with self._lock:
            until = time.monotonic() + seconds
            if until > self._open_at + 1 and seconds > 1:
                self._reporter.info(f"{reason}: waiting {seconds:.0f} s")
            self._open_at = max(self._open_at, until)
            if not self._counting:
                self._counting = True
                threading.Thread(target=self._count_down, daemon=True).start()

    def _count_down(self) -> None:
        while self._counting:
            with self._lock:
                left = max(0.0, self._open_at - time.monotonic())
                self._counting = left > 0 and not self._stop.is_set()
            self._reporter.countdown(left if self._counting else 0)
            self._stop.wait(min(1.0, left))

    def wait(self) -> None:
        """Return when the gate is open. Raises KeyboardInterrupt when the run is being stopped."""
        while True:
            left = self._open_at - time.monotonic()
            if self._stop.wait(max(0.0, min(left, 1.0))):
                raise KeyboardInterrupt
            if left <= 0:
                return


class Voice:
    """What a forked process has for a Reporter and a Gate: its parent's, which hears (name, arguments...)."""

    def __init__(self, tell: Callable[[Tuple[Any, ...]], None]) -> None:
        self._tell = tell

    def info(self, text: str) -> None:
        self._tell(("info", text))

    def detail(self, text: str) -> None:
        self._tell(("detail", text))

    def hold(self, seconds: float, reason: str) -> None:
        self._tell(("hold", seconds, reason))

    def wait(self) -> None:
        """The parent waits, before it sends us a task."""


def with_newer_python() -> str:
    """This command line for the newest Python here."""
    newer = next((name for name in (f"python3.{minor}" for minor in range(20, 9, -1)) if shutil.which(name)), "")
    return command_line(newer, *sys.argv) if newer else "run it with a newer python3; none is on PATH"


def import_requests() -> Any:
    """requests, imported only where the network is used. Raises HostError on a Python that is too old for it."""
    if sys.version_info < (3, 10):
        have = ".".join(map(str, sys.version_info[:2]))
        raise HostError("fetch needs Python 3.10 or newer", f"this is Python {have}", with_newer_python())
    _carry_certificates()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # requests warns that charset_normalizer is absent; JSON is UTF-8
            import requests
    except ImportError as exc:
        raise HostError("requests is not importable", str(exc), "run the built hfship.pyz, which carries it") from exc
    return requests


def _carry_certificates() -> None:
    """Inside the pyz, give certifi's bundle to requests from memory: certifi itself would write it to a temporary file,
    which a kill leaves behind."""
    try:
        bundle = own_entry("vendor/certifi/cacert.pem")
    except OSError:
        return  # from source, certifi is installed with a file of its own
    if "certifi" not in sys.modules and hasattr(os, "memfd_create"):
        fd = os.memfd_create("cacert.pem", os.MFD_CLOEXEC)
        write_all(fd, bundle)
        certifi = types.ModuleType("certifi")
        vars(certifi)["where"] = lambda: f"/proc/self/fd/{fd}"
        sys.modules["certifi"] = certifi


def tls_adapter(requests: Any) -> Any:
    """requests' HTTPAdapter, but all its connections share one TLS context. Left alone, each parses the CA bundle anew:
    15 ms of CPU and 2 MB."""
    import ssl  # not every Python on an offline machine has it

    make_context = lru_cache(maxsize=None)(ssl.create_default_context)

    class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[misc]
        def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
            where, options = super().build_connection_pool_key_attributes(request, verify, cert)
            file, folder = options.pop("ca_certs", None), options.pop("ca_cert_dir", None)
            if where["scheme"] == "https":
                bundle = file or (None if folder else requests.adapters.DEFAULT_CA_BUNDLE_PATH)
                options["ssl_context"] = make_context(cafile=bundle, capath=folder)
            return where, options

        def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
            """Would give each connection the bundle again; the context has it."""

    return Adapter


def open_session(token: Optional[Token], endpoint: str, connections: int, env: Mapping[str, str]) -> Any:
    """A requests session with `connections` kept-alive connections that shows the token to the Hub's origin only.

    The token is set by an auth callable: a plain header would be replaced by a ~/.netrc entry for the host
    (psf/requests#3929), and trust_env must stay on for proxies.
    """
    requests = import_requests()
    session = requests.Session()
    adapter = tls_adapter(requests)(pool_connections=8, pool_maxsize=connections + 2, max_retries=0)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    session.headers.update({"User-Agent": f"hfship/{__version__}", "Accept-Encoding": "identity"})

    def authorize(request: Any) -> Any:
        request.headers.pop("Authorization", None)
        if token and origin(request.url) == origin(endpoint):
            request.headers["Authorization"] = f"Bearer {token.value}"
        return request

    session.auth = authorize
    bundle = env.get("SSL_CERT_FILE")  # requests itself reads only REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE
    if bundle and not (env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE")):
        session.verify = bundle
    return session


@dataclass(frozen=True)
class ApiAnswer:
    """A whole answer of the Hub's API."""

    status: int
    headers: Mapping[str, str]
    body: str


class HubClient:
    """Talks to one Hub. Safe to share between threads."""

    def __init__(
        self,
        settings: Settings,
        token: Optional[Token],
        reporter: Reporter,
        stop: threading.Event,
        connections: int = 8,
    ) -> None:
        self.endpoint = settings.endpoint
        self.token = token
        self.reporter = reporter
        self.gate = Gate(reporter, stop)
        self._stop = stop
        self._session = open_session(token, self.endpoint, connections, os.environ)
        self._requests = import_requests()
        if token:
            reporter.hide(token.value)

    def snapshot(self, repo: str, revision: Optional[str], repo_type: str = "model") -> Snapshot:
        """The repository at `revision` (branch, tag, short or full commit; None = default branch), with every file.

        Raises NotFoundError, AuthError, NetworkError, IntegrityError (a listing with unsafe names).
        """
        asked = Source(self.endpoint, repo, revision or "main", repo, "", repo_type=repo_type)
        info = self._json(api_url(self.endpoint, repo_type, repo, "revision", asked.revision), asked)[0]
        source = _source_from_info(asked, info)
        if source.gated:
            self._check_access(source)
        if source.resolved_repo != repo:
            self.reporter.info(f"{repo} is now {source.resolved_repo}")
        return Snapshot(source, tuple(self._tree(source)))

    def forked(self, voice: Voice) -> HubClient:
        """The same client in a forked process, with its parent's reporter and gate."""
        twin = copy.copy(self)
        vars(twin).update(reporter=voice, gate=voice)
        return twin

    def prepare_forks(self) -> None:
        """Close our idle connections, which nobody may share, and parse the CA bundle once for all processes."""
        self._session.close()
        url = "https://cdn"
        verify = self._session.merge_environment_settings(url, {}, True, None, None)["verify"]
        request = self._requests.Request("GET", url).prepare()
        with contextlib.suppress(OSError):  # a bundle that is not there: who needs it will say so
            self._session.get_adapter(url).get_connection_with_tls_context(request, verify)

    def get(self, url: str, headers: Mapping[str, str]) -> Any:
        """One GET without redirects, body not yet read. Raises RetryableError for faults of the network."""
        self.gate.wait()
        timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        errors = self._requests.exceptions
        try:
            return self._session.get(url, headers=dict(headers), stream=True, allow_redirects=False, timeout=timeout)
        except errors.SSLError as exc:
            raise tls_error(url, exc, os.environ) from exc
        except errors.ProxyError as exc:
            raise RetryableError(f"the proxy for {origin(url)[1]} does not answer: {_root_cause(exc)}") from exc
        except (errors.RequestException, ValueError) as exc:  # requests reads Location even when told to stay
            raise RetryableError(f"{origin(url)[1]}: {_root_cause(exc)}") from exc
        except OSError as exc:  # requests says so when a CA bundle is not there
            step = "correct REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE or SSL_CERT_FILE, whichever is set"
            raise NetworkError("the CA bundle cannot be read", redact(str(exc)), step) from exc

    def retry_status(self, response: Any, url: str) -> None:
        """Raise RetryableError when the status says that the same request may succeed later."""
        status = response.status_code
        if status not in RETRY_STATUS:
            return
        wait = rate_limit_wait(response.headers) if status in (429, 503) else None
        response.close()
        reason = f"{origin(url)[1]} answered {status}"
        if status == 429:
            self.gate.hold(wait if wait is not None else backoff(5), f"{reason} (too many requests)")
        raise RetryableError(reason, wait)

    def exchange(self, url: str) -> ApiAnswer:
        """One API request with its whole body. Raises RetryableError for faults that may pass."""
        response = self.get(url, {})
        try:
            with response:
                self.retry_status(response, url)
                return ApiAnswer(response.status_code, response.headers, _limited_body(response))
        except self._requests.exceptions.RequestException as exc:
            raise RetryableError(f"{origin(url)[1]}: {_root_cause(exc)}") from exc

    def _ask(self, url: str) -> ApiAnswer:
        """GET an API URL through redirects (renamed repositories) and passing faults."""
        failures = 0
        for _ in range(MAX_REDIRECTS + RETRIES):
            try:
                answer = self.exchange(url)
            except RetryableError as exc:
                failures += 1
                if failures >= RETRIES:
                    step = "check the network, the proxy and HF_ENDPOINT, then run the same command again"
                    raise NetworkError(f"{self.endpoint} cannot be reached", str(exc), step) from exc
                wait_s = backoff(failures) if exc.wait_s is None else min(exc.wait_s, RETRY_AFTER_S)
                say = self.reporter.info if failures > 1 or wait_s > 1 else self.reporter.detail
                say(f"{exc}; trying again in {human_seconds(wait_s)} ({failures} of {RETRIES - 1})")
                self._stop.wait(wait_s)
                continue
            if answer.status not in REDIRECTS:
                return answer
            url = redirect_target(url, answer.headers.get("Location", ""))
        raise NetworkError(f"{self.endpoint} redirects in a circle", "", "check HF_ENDPOINT")

    def _json(self, url: str, asked: Source) -> Tuple[Any, Mapping[str, str]]:
        """The JSON answer of an API URL and its headers; an error answer becomes its HfshipError."""
        answer = self._ask(url)
        if answer.status != 200:
            raise hub_error(answer.status, answer.headers, answer.body, asked, self.token)
        try:
            return json.loads(answer.body), answer.headers
        except (ValueError, RecursionError) as exc:
            why = f"{urlsplit(url).path} answered {answer.headers.get('Content-Type', 'nothing')}, not JSON"
            raise not_a_hub(self.endpoint, why) from exc

    def _check_access(self, source: Source) -> None:
        """Fail in a second, not after the plan, when a gated repository may not be read. Mirrors without the probe
        answer 404 for a repository that they just listed: then the download itself will tell."""
        answer = self._ask(api_url(self.endpoint, source.repo_type, source.resolved_repo, "auth-check"))
        if answer.status in (401, 403):
            headers = {**answer.headers, "X-Error-Code": "GatedRepo"}
            raise hub_error(answer.status, headers, answer.body, source, self.token)

    def _tree(self, source: Source) -> List[RemoteFile]:
        """Every file of the commit, page by page, safe and distinct."""
        url: Optional[str] = api_url(self.endpoint, source.repo_type, source.resolved_repo, "tree", source.commit)
        url = f"{url}?recursive=true&expand=false"
        files: List[RemoteFile] = []
        seen: Set[str] = set()
        try:
            while url and url not in seen:
                seen.add(url)
                page, headers = self._json(url, source)
                files += [repo_file(item) for item in page if item["type"] == "file"]
                url = _on_endpoint(next_page(headers.get("Link", "")), self.endpoint)
            check_distinct_paths(file.path for file in files)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            what = f"the listing of {source.repo} cannot be used"
            raise IntegrityError(what, str(exc), f"tell the owner of {source.repo}") from exc
        return files


def _source_from_info(asked: Source, info: Any) -> Source:
    """The pinned source from the answer of /revision. Raises NetworkError for an answer that is not one."""
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str) or not _COMMIT.match(commit):
        raise not_a_hub(asked.endpoint, "no commit in its answer")
    card, tags = info.get("cardData"), info.get("tags")
    words = list(map(str, tags)) if isinstance(tags, list) else []
    licenses = [card.get("license") if isinstance(card, dict) else None]
    licenses += [word[len("license:") :] for word in words if word.startswith("license:")]
    gated = info.get("gated")
    source = replace(
        asked,
        resolved_repo=str(info.get("id") or asked.repo),
        commit=commit,
        license=next((printable(str(name)) for name in licenses if name), None),
        gated=printable(gated) if isinstance(gated, str) else bool(gated),
    )
    try:
        check_source(source)
    except ValueError as exc:
        raise not_a_hub(asked.endpoint, str(exc)) from exc
    return source


def _on_endpoint(url: Optional[str], endpoint: str) -> Optional[str]:
    """Mirrors copy the Hub's absolute `Link` addresses: keep the path, stay with the endpoint we were given.

    >>> _on_endpoint("https://huggingface.co/api/models/a/b/tree/x?cursor=1", "http://mirror:8090")
    'http://mirror:8090/api/models/a/b/tree/x?cursor=1'
    >>> _on_endpoint("https://huggingface.co/api/models/a/b/tree/x?cursor=1", "http://host/hub")
    'http://host/hub/api/models/a/b/tree/x?cursor=1'
    """
    if url is None:
        return None
    parts = urlsplit(urljoin(endpoint + "/", url))
    base = urlsplit(endpoint)
    prefix = "" if parts.path.startswith(base.path + "/") else base.path
    return urlunsplit((base.scheme, base.netloc, prefix + parts.path, parts.query, ""))


def _limited_body(response: Any) -> str:
    """The text of an API answer. Raises NetworkError beyond MAX_API_BYTES."""
    pieces, size = [], 0
    for piece in response.iter_content(CHUNK):
        size += len(piece)
        if size > MAX_API_BYTES:
            raise NetworkError("the Hub's answer is too large to be one", human_bytes(size), "check HF_ENDPOINT")
        pieces.append(piece)
    return b"".join(pieces).decode("utf-8", "replace")


def _root_cause(exc: BaseException) -> str:
    """The innermost reason of a chain of wrapped network errors, without URLs."""
    reason: Any = exc
    while True:
        inner = getattr(reason, "reason", None) or (reason.args[0] if getattr(reason, "args", None) else None)
        if not isinstance(inner, BaseException):
            return redact(re.sub(r"^<[^>]*>: ", "", str(reason))) or type(reason).__name__
        reason = inner


# ======================================================================================
# §7 Download
#
# Owns the way of bytes from the Hub into a model folder: which range is asked for next, who asks, what is on disk, and
# the proof that it is right.
# Promises: a file gets its final name only when every byte of it was hashed and matched the Hub's hash; after kill -9
# or a power cut the next run asks only for what is missing.
#
# While a file is under way `PATH.incomplete` has its final size and holds the ranges that arrived, in place; beside it
# `.hfship/partial/<sha1 of PATH>.json` tells which ones:
#   {"format": "hfship-partial/1", "path", "size", "etag", "boot_id",
#    "synced":  [[start, stop], ...]   on the disk: true after a power cut
#    "written": [[start, stop], ...]}  in the page cache: true while the machine has the same boot_id
# It is always durable. `<sha1>.now` is the same, written far more often and never synced: a power cut may empty it.
# Finished files are remembered in `.hfship/verified.jsonl`, one {"path", "size", "mtime_ns", "etag", "sha256", "marks"}
# a line, so that a rerun on a complete folder reads no content, and a repair fetches only what is bad. Both are local
# state and do not travel.
# ======================================================================================

ACTIVE_FILES = 4  # large files in flight at once: near-sequential writes, and the hasher keeps up
SMALL_FILE = 1 << 20  # bytes; smaller files are one request and run between the large ones
MIN_REQUEST = 8 << 20
MAX_REQUEST = 64 << 20
REQUEST_SECONDS = 3.0  # a request is sized to keep one connection busy for about this long
BLOCK_SIZE = 8 << 20  # of the marks by which a damaged file is repaired in part
MIN_STEAL = 2 << 20  # below this a second connection costs more than it brings
READ_SIZE = 1 << 20
PUBLISH_INTERVAL_S = 0.05
SYNC_INTERVAL_S = 2.0
SYNC_BYTES = 256 << 20
MOST_READERS = 8  # processes at most, one per core, of 8 MB each; further connections are threads of theirs
MIN_WINDOW = 16 << 10  # a reader reports when it has written a window: this much is lost by a kill
MAX_WINDOW = 8 << 20
WINDOW_S = 0.02  # worth of the connection's speed
REPORT_S = 0.2  # a reader whose window takes longer reports in between
HASH_STEP = 64 << 20  # bytes a hash thread takes from one file before it looks for another
WORKER_FAILURES = 8  # in a row and without a byte of progress anywhere, per worker

MAX_CONNECTIONS = 32
START_CONNECTIONS = 8  # as many as huggingface_hub opens; fewer may all be slow ones, with none to compare them to
TICK_S = 0.5  # between two looks at the goodput
WORTH_IT = 1.05  # more connections must bring at least this much more
COLLAPSE = 0.3  # of the best goodput seen ...
COLLAPSE_TICKS = 8  # ... for this long: the server punishes many streams (huggingface_hub#4893)
HOLD_TICKS = 20
SLOW_SHARE = 0.3  # of the fastest connection's speed: CDN edges are bimodal, 8.7 and 68 MB/s (xet-core#821)
SLOW_AFTER_S = 1.0
EVICTIONS_PER_MINUTE = 200  # 70 % slow edges: each of 32 connections is dialled 3.3 times

PARTIAL_FORMAT = "hfship-partial/1"


class Intervals:
    """A set of integers kept as disjoint sorted half-open intervals: which bytes of a file are there.

    >>> have = Intervals([(0, 4), (8, 12)])
    >>> have.add(4, 6); have.spans, have.missing(16), have.total
    ([(0, 6), (8, 12)], [(6, 8), (12, 16)], 10)
    """

    def __init__(self, spans: Iterable[Tuple[int, int]] = ()) -> None:
        self.spans: List[Tuple[int, int]] = []
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Insert [start, stop), merging what it touches."""
        if start >= stop:
            return
        first = next((i for i, span in enumerate(self.spans) if span[1] >= start), len(self.spans))
        last = first
        while last < len(self.spans) and self.spans[last][0] <= stop:
            start, stop = min(start, self.spans[last][0]), max(stop, self.spans[last][1])
            last += 1
        self.spans[first:last] = [(start, stop)]

    @property
    def total(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def prefix(self) -> int:
        """Length of the unbroken run from 0."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0

    def missing(self, size: int) -> List[Tuple[int, int]]:
        """The gaps in [0, size)."""
        edges = [0, *(edge for span in self.spans for edge in span), size]
        return [(start, stop) for start, stop in zip(edges[::2], edges[1::2]) if start < stop]


class Flight:
    """A range on its way: [position, stop) of file number `file` is still to come. `stop` shrinks when an idle
    worker takes over the rear, but not below `granted`: up to there its reader may be writing already."""

    __slots__ = ("file", "granted", "position", "start", "stop")

    def __init__(self, file: int, start: int, stop: int) -> None:
        self.file, self.start, self.position, self.stop, self.granted = file, start, start, stop, start

    @property
    def left(self) -> int:
        return self.stop - self.position

    @property
    def free(self) -> int:
        """Bytes at its rear that another worker may take over."""
        return self.stop - self.granted


class Scheduler:
    """Decides which range comes next. Pure: values in, decisions out; its owner holds a lock around every call.

    A few large files at once, each in ascending order (near-sequential writes, and the hasher can follow); small files
    in between; at the end idle workers split the largest range in flight, so that nobody waits for a last connection.
    """

    def __init__(self, sizes: Sequence[int], have: Sequence[Intervals]) -> None:
        self.have = list(have)
        self._sizes = list(sizes)
        self._gaps = [intervals.missing(size) for intervals, size in zip(have, sizes)]  # nobody is on them yet
        self._ranged = [True] * len(self._sizes)
        self._flights: List[Flight] = []
        waiting = [i for i, gaps in enumerate(self._gaps) if gaps]
        self._small = deque(i for i in waiting if sizes[i] <= SMALL_FILE)
        self._large = deque(sorted((i for i in waiting if sizes[i] > SMALL_FILE), key=lambda i: -sizes[i]))
        self._turn = 0

    def take(self, request_size: int) -> Optional[Flight]:
        """The next range for an idle worker, at most `request_size` bytes; None when nothing is left to hand out."""
        self._turn += 1
        queues = (self._small, self._large) if self._turn % 4 == 0 else (self._large, self._small)
        for queue in queues:
            file = self._least_busy(queue)
            if file is not None:
                return self._depart(file, request_size)
        return self._steal()

    def grant(self, flight: Flight, window: int) -> int:
        """Allow the flight's reader to write `window` bytes, or what is left; returns up to where that is."""
        flight.granted = min(flight.stop, flight.position + window)
        return flight.granted

    def advance(self, flight: Flight, count: int) -> int:
        """`count` bytes at flight.position are written; returns how many of them were not there before."""
        have = self.have[flight.file]
        before, count = have.total, min(count, flight.left)  # nothing counts of a file that was given up meanwhile
        have.add(flight.position, flight.position + count)
        flight.position += count
        new = have.total - before
        if have.total == self._sizes[flight.file]:
            self.give_up(flight.file)  # who is still on the way, as where one server ignores Range, brings nothing new
        return new

    def land(self, flight: Flight) -> None:
        """The worker is done with the flight; what did not arrive is handed out again."""
        self._flights.remove(flight)
        if flight.left > 0:
            self._reopen(flight.file, (flight.position, flight.stop))

    def without_ranges(self, flight: Flight) -> None:
        """The server ignores Range for this file: this flight gets all of it, and no other joins."""
        self._ranged[flight.file] = False
        self._gaps[flight.file] = []
        flight.stop = self._sizes[flight.file]

    def give_up(self, file: int) -> None:
        """The bytes of this file are wrong: flights on their way bring nothing any more, and none departs."""
        self._gaps[file] = []
        for flight in self._flights:
            if flight.file == file:
                flight.stop = flight.position

    def restart(self, file: int) -> int:
        """Fetch all of a file again that was given up and is quiet. Returns how many bytes of it were there."""
        lost, self.have[file] = self.have[file].total, Intervals()
        self._reopen(file, (0, self._sizes[file]))
        return lost

    def quiet(self, file: int) -> bool:
        """Is nobody on the way with bytes of this file? Only then it may be finished, or begun anew."""
        return all(flight.file != file for flight in self._flights)

    def _least_busy(self, queue: Deque[int]) -> Optional[int]:
        """Of the first ACTIVE_FILES files of a queue, the one with something to hand out and the fewest flights."""
        while queue and not self._gaps[queue[0]]:
            queue.popleft()
        window = [file for file in islice(queue, ACTIVE_FILES) if self._gaps[file]]
        busy = {file: sum(flight.file == file for flight in self._flights) for file in window}
        free = [file for file in window if self._ranged[file] or not busy[file]]
        return min(free, key=lambda file: busy[file]) if free else None

    def _depart(self, file: int, request_size: int) -> Flight:
        start, stop = self._gaps[file].pop(0)
        if not self._ranged[file]:
            start, stop, self._gaps[file] = 0, self._sizes[file], []
        elif stop - start > request_size + MIN_STEAL:
            self._gaps[file].insert(0, (start + request_size, stop))
            stop = start + request_size
        flight = Flight(file, start, stop)
        self._flights.append(flight)
        return flight

    def _steal(self) -> Optional[Flight]:
        """The rear half of the flight with most left, taken from its worker."""
        splittable = [f for f in self._flights if f.free >= 2 * MIN_STEAL and self._ranged[f.file]]
        if not splittable:
            return None
        victim = max(splittable, key=lambda f: f.free)
        middle = victim.stop - victim.free // 2
        flight = Flight(victim.file, middle, victim.stop)
        victim.stop = middle
        self._flights.append(flight)
        return flight

    def _reopen(self, file: int, gap: Tuple[int, int]) -> None:
        self._gaps[file] = sorted([*self._gaps[file], gap])
        queue = self._small if self._sizes[file] <= SMALL_FILE else self._large
        if file not in queue:
            queue.appendleft(file)


class ConnectionCount:
    """How many connections are worth having, found by trying. Pure: it is told the goodput of each tick.

    Goes up while the sum grows; when it does not, steps back and holds for a while; halves when it collapses, and
    does not go there again.
    """

    def __init__(self, most: int) -> None:
        self.limit = min(START_CONNECTIONS, most)
        self._most = most
        self._before: Optional[float] = None  # goodput before the last step up; None when that is settled
        self._previous_limit = self.limit
        self._best = 0.0
        self._bad_ticks = self._hold = 0
        self._settling = True

    def tick(self, goodput: float) -> int:
        """The number of connections from now on, given the bytes per second since the last tick."""
        if self._settling:  # new connections are still being set up: this tick tells nothing
            self._settling = False
            return self.limit
        self._best = max(self._best, goodput)
        self._bad_ticks = self._bad_ticks + 1 if goodput < COLLAPSE * self._best else 0
        if self._bad_ticks >= COLLAPSE_TICKS and self.limit > 1:
            self._most = max(1, self.limit // 2)
            self._change(self._most)
            self._best, self._bad_ticks, self._hold = 0.0, 0, HOLD_TICKS
        elif self._before is not None and goodput < WORTH_IT * self._before:
            self._change(self._previous_limit)
            self._hold = HOLD_TICKS
        elif self._hold:
            self._hold -= 1
        elif self.limit < self._most:
            self._change(min(self._most, self.limit + max(2, self.limit // 2)), before=goodput)
        else:
            self._before = None
        return self.limit

    def _change(self, limit: int, before: Optional[float] = None) -> None:
        self._previous_limit, self.limit, self._before = self.limit, limit, before
        self._settling = True


class Sources:
    """Which of several places serves the next range: in the order given, a place that fails steps back. Pure.

    Places are numbers; the last one is the Hub itself, which also made the listing.
    """

    def __init__(self, count: int) -> None:
        self.hub = count - 1
        self._faults = [0] * count
        self._banned: Set[int] = set()
        self._refused: Set[Tuple[int, int]] = set()  # (file, place)
        self._used: Dict[int, Set[int]] = {}  # places that the bytes of a file came from

    def choose(self, file: int) -> int:
        """The place to ask for a range of `file`: the first of those with the fewest faults in a row."""
        able = [p for p in range(self.hub + 1) if p not in self._banned and (file, p) not in self._refused]
        return min(able or [self.hub], key=lambda place: self._faults[place] // 3)

    def fault(self, place: int) -> None:
        """A request failed in a way that may pass."""
        self._faults[place] += 1

    def refuse(self, file: int, place: int) -> None:
        """This place does not have this file."""
        self._refused.add((file, place))

    def success(self, file: int, place: int) -> None:
        """Bytes of the file came from there."""
        self._faults[place] = 0
        self._used.setdefault(file, set()).add(place)

    def bytes_were_wrong(self, file: int) -> Set[int]:
        """The file's hash does not match. Whoever alone sent it is banned; of several, the Hub alone is asked next
        and the others are suspects. Returns those banned now."""
        used = self._used.pop(file, set())
        self._refused |= {(file, place) for place in used if place != self.hub}
        banned = used - {self.hub} if len(used) == 1 else set()
        self._banned |= banned
        return banned


class RateLimit:
    """Holds all workers together to a number of bytes per second; None does not hold."""

    def __init__(self, bytes_per_second: Optional[float], stop: threading.Event) -> None:
        self.bytes_per_second = bytes_per_second
        self._stop = stop
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, count: int) -> None:
        """Return when `count` more bytes are within the limit."""
        if self.bytes_per_second:
            with self._lock:
                now = time.monotonic()
                self._free_at = max(now, self._free_at) + count / self.bytes_per_second
            self._stop.wait(self._free_at - now)


def request_size(bytes_per_second: float) -> int:
    """Size of the next request of a connection that runs at this speed."""
    return int(min(MAX_REQUEST, max(MIN_REQUEST, bytes_per_second * REQUEST_SECONDS)))


def window_size(bytes_per_second: float) -> int:
    """How much a reader at this speed writes before it reports."""
    return int(min(MAX_WINDOW, max(MIN_WINDOW, bytes_per_second * WINDOW_S)))


def check_range_answer(status: int, headers: Mapping[str, str], start: int, stop: int, size: int) -> bool:
    """Is this the answer to a request for [start, stop) of a file of `size` bytes? True: exactly that range follows;
    False: the server ignored Range and the whole file follows. Raises RetryableError for anything else.

    >>> check_range_answer(206, {"Content-Range": "bytes 4-7/10"}, 4, 8, 10)
    True
    """
    if headers.get("Content-Encoding", "identity") not in ("identity", ""):
        # CloudFront answers 200 with gzip to a Range request that accepts gzip: huggingface_hub#3778.
        raise RetryableError(f"the server compressed the body ({headers.get('Content-Encoding')})")
    if status == 206:
        match = re.match(r"bytes (\d+)-(\d+)/(\d+|\*)$", headers.get("Content-Range", ""))
        if match and (int(match[1]), int(match[2]) + 1) == (start, stop) and match[3] in (str(size), "*"):
            return True
        raise RetryableError(f"asked for bytes {start}-{stop - 1}/{size}, got {headers.get('Content-Range')!r}")
    if status == 200 and headers.get("Content-Length", str(size)) == str(size):
        return start == 0 and stop == size
    raise RetryableError(f"unexpected answer {status} with {headers.get('Content-Length')} bytes to a range request")


@dataclass(frozen=True)
class FileJob:
    """One file to bring: what the Hub says of it, whose it is, and the model folder it goes into."""

    remote: RemoteFile
    source: Source
    folder: Path
    log: VerifiedLog
    outdates: bool = False  # the manifest that lies there, which is of another commit

    @property
    def target(self) -> Path:
        return self.folder / self.remote.path

    @property
    def incomplete(self) -> Path:
        return self.folder / (self.remote.path + INCOMPLETE)

    @property
    def journal(self) -> Path:
        name = hashlib.sha1(self.remote.path.encode("utf-8")).hexdigest()
        return self.folder / WORK_DIR / "partial" / f"{name}.json"

    @property
    def journal_now(self) -> Path:
        return self.journal.with_suffix(".now")

    def publish(self) -> None:
        """Give the content, which is proven and durable, its name, durably. Before that goes the manifest that it makes
        untrue: a folder of two commits must not pass for a model if we are killed now. Raises OSError."""
        if self.outdates:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / MANIFEST_PATH).unlink()
        rename_durably(self.incomplete, self.target)


@dataclass(frozen=True)
class Address:
    """Where the bytes of a file are, as far as is known: the (signed) URL that the Hub redirects to, until when it can
    be used (Unix time), and the ETag of the object there."""

    url: Optional[str] = field(default=None, repr=False)
    renew_at: float = float("inf")
    etag: str = ""
    etag_of: str = ""  # the URL without its signature
    changes: int = 0

    @property
    def usable(self) -> bool:
        return self.url is not None and time.time() < self.renew_at


class FileAddress:
    """Where the bytes of one file are: the Hub's resolve address first, then the (signed) address it redirects to,
    which all ranges share until it expires or is refused. The Hub's quota counts resolves, not ranges. `endpoint` is
    the Hub or a mirror of it; a mirror that has not got the file is no reason to give up."""

    def __init__(self, client: HubClient, job: FileJob, endpoint: str, known: Address = Address()) -> None:
        self._client, self._job, self.known = client, job, known
        self._source = replace(job.source, endpoint=endpoint)

    def open(self, start: int, stop: int) -> Any:
        """The response to a request for [start, stop), body unread. Raises RetryableError or HfshipError."""
        if self.known.url is None or not self.known.usable:
            return self._resolve(start, stop)
        response = self._get(self.known.url, start, stop)
        if response.status_code not in (200, 206):
            self._refused(response, self.known.url)
        return response

    def forget(self) -> None:
        """Resolve again before the next request."""
        self.known = replace(self.known, url=None)

    def locate(self) -> str:
        """The address that another program can fetch the file from, for as long as it is signed."""
        self.open(0, 1).close()
        return self.known.url or ""

    def _get(self, url: str, start: int, stop: int) -> Any:
        same = self.known.etag_of == url.partition("?")[0] and self.known.changes < MAX_CHANGES
        known = self.known.etag if same else ""
        # RFC 9110 §13.1.5: send all of another object rather than a part of it
        condition = {"If-Range": known} if known else {}
        response = self._client.get(url, {"Range": f"bytes={start}-{stop - 1}", **condition})
        self._client.retry_status(response, url)
        if response.status_code in (200, 206):
            self._check_same_object(response, url, known)
        return response

    def _check_same_object(self, response: Any, url: str, known: str) -> None:
        """Ranges of two objects must not be mixed. The hash of the file would tell, but only at its end."""
        etag = response.headers.get("ETag", "")
        if not etag or etag.startswith("W/"):
            return
        self.known = replace(self.known, etag=etag, etag_of=url.partition("?")[0])
        if known and etag != known:
            self.known = replace(self.known, url=None, changes=self.known.changes + 1)
            response.close()
            raise ObjectChanged(f"{origin(url)[1]} has another file there than before")
        if known and response.status_code == 200:
            # ask without, and not for the whole file: others are on their way with ranges
            self.known = replace(self.known, changes=MAX_CHANGES)
            response.close()
            raise RetryableError(f"{origin(url)[1]} does not understand If-Range")

    def _resolve(self, start: int, stop: int) -> Any:
        url = resolve_url(self._source, self._job.remote.path)
        for _ in range(MAX_REDIRECTS):
            response = self._get(url, start, stop)
            if response.status_code in (200, 206):
                self._remember(url)
                return response
            if response.status_code not in REDIRECTS:
                self._refused(response, url)
            self._check_unchanged(response.headers)
            url = redirect_target(url, response.headers.get("Location", ""))
            response.close()
        raise NetworkError(f"{self._job.remote.path} is redirected in a circle", "", "check HF_ENDPOINT")

    def _remember(self, url: str) -> None:
        now = time.time()
        expires = url_expiry(url, now)
        renew_at = float("inf") if expires is None else expires - min(URL_RENEWAL_S, (expires - now) / 10)
        self.known = replace(self.known, url=url, renew_at=renew_at)
        life = f", for {human_seconds(expires - now)}" if expires else ""
        self._client.reporter.detail(f"{self._job.remote.path}: comes from {urlsplit(url).netloc}{life}")

    def _refused(self, response: Any, url: str) -> NoReturn:
        """A final answer of the Hub ends the run; a refusal of a signed address asks for a new one."""
        self.forget()
        headers, status = response.headers, response.status_code
        at_source = origin(url) == origin(self._source.endpoint)
        try:
            body = _limited_body(response) if at_source else ""
        except OSError as exc:  # of requests
            raise RetryableError(f"{origin(url)[1]} answered {status}: {_root_cause(exc)}") from exc
        finally:
            response.close()
        if at_source and status in (401, 403, 404):
            raise hub_error(status, headers, body, self._source, self._client.token)
        raise RetryableError(f"{origin(url)[1]} answered {status}")

    def _check_unchanged(self, headers: Mapping[str, str]) -> None:
        """The redirect tells size, hash and commit of what it leads to: they must be those of the listing."""
        remote = self._job.remote
        said = {
            "X-Linked-Size": str(remote.size),
            "X-Linked-Etag": remote.etag,
            "X-Repo-Commit": self._job.source.commit,
        }
        for name, expected in said.items():
            value = headers.get(name, expected).replace("W/", "").strip('"')
            if value != expected:
                what = f"{remote.path} at {self._source.endpoint} is not what {self._client.endpoint} listed"
                why = f"{name} is {value}, the listing of commit {self._job.source.commit[:12]} says {expected}"
                raise IntegrityError(what, why, "run the same command again; if it stays so, the mirror is out of date")


class SharedAddress:
    """What all readers know of where a file is. While nobody does, one of them asks and the others wait for it."""

    def __init__(self) -> None:
        self.known = Address()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Address]:
        """What a reader is to open the file with; what it found out meanwhile goes to `learn`."""
        if not self.known.usable:
            with self._lock:
                if not self.known.usable:
                    yield self.known
                    return
        yield self.known

    def learn(self, given: Address, found: Address) -> None:
        """A reader was given one and came back with the other."""
        if found != given:
            self.known = found

    def forget(self) -> None:
        """Resolve again before the next request."""
        self.known = replace(self.known, url=None)


def _read_directly(response: Any) -> None:
    """Have the buffered reader of an answer call the C function of its connection. Three functions of Python are in
    between, for each TLS record: 180,000 calls in a GB."""
    raw: Any = getattr(response.raw._fp.fp, "raw", None)  # None: the answer had no body, and is closed
    connection = getattr(raw, "_sock", None)
    if connection is not None:
        tls = getattr(connection, "_sslobj", None)
        raw.readinto = functools.partial(tls.read, READ_SIZE) if tls else connection.recv_into


class RangeReader(threading.local):  # each worker has state of its own
    """What a forked process does for one worker: ask for a range, and write what comes into `.incomplete`.

    Forked, because only one thread of a Python at a time can take a TLS record: on 16 cores eight threads of one
    process brought less than half of what eight processes bring. Whoever sends the tasks decides everything.
    """

    def __init__(self, client: HubClient, jobs: Sequence[FileJob], endpoints: Sequence[str]) -> None:
        self._client, self._jobs, self._endpoints = client, jobs, endpoints
        self._buffer: Optional[memoryview] = None
        self._response: Any = None
        self._fd = -1
        self._position = self._asked = 0

    def do(self, tell: Callable[[Any], None], step: str, *args: Any) -> Any:
        """The task of Workers: one of the steps below."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(READ_SIZE))
            self._client = self._client.forked(Voice(tell))
        return getattr(self, step)(*args)

    def open(
        self, file: int, place: int, known: Address, start: int, stop: int
    ) -> Tuple[Union[bool, HfshipError, RetryableError], Address]:
        """Ask for [start, stop) of a file. (Does exactly that follow, or the whole file, or what went wrong; where the
        file is, as far as is known now.)"""
        self._job = self._jobs[file]
        address = FileAddress(self._client, self._job, self._endpoints[place], known)
        try:
            self._response = address.open(start, stop)
            answer = self._response.status_code, self._response.headers
            ranged = check_range_answer(*answer, start, stop, self._job.remote.size)
        except (RetryableError, HfshipError) as exc:
            return exc, address.known
        self._position, self._asked = start, stop if ranged else self._job.remote.size
        _read_directly(self._response)
        return ranged, address.known

    def read(self, stop: int) -> Tuple[int, Optional[RetryableError]]:
        """Go on to byte `stop`, or for REPORT_S. (Everything before this byte is written, what broke the connection.)

        The inner http.client response reads straight into our buffer, several times faster than urllib3's stream();
        it reports a connection closed early as a plain end, so the count decides.
        """
        assert self._buffer
        until = time.monotonic() + REPORT_S
        while self._position < stop and time.monotonic() < until:
            try:
                count = self._response.raw._fp.readinto(self._buffer[: stop - self._position])
            except (OSError, HTTPException, ValueError, AttributeError) as exc:
                return self._position, RetryableError(f"the connection broke: {_root_cause(exc)}")
            if not count:
                left = self._asked - self._position
                return self._position, RetryableError(f"the connection ended {left} bytes early")
            self._write(self._buffer[:count])
        return self._position, None

    def _write(self, data: memoryview) -> None:
        try:
            if self._fd < 0:
                self._fd = os.open(self._job.incomplete, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            pwrite_all(self._fd, data, self._position)
        except OSError as exc:
            step = "free space, then run the same command again: what arrived is kept"
            step = "" if exc.errno in CHANGED_UNDERNEATH else step
            raise disk_error(exc, "write", self._job.incomplete, step) from exc
        self._position += len(data)

    def close(self, keep: bool) -> None:
        """Done with the range; `keep` the connection, whose answer is read to its end."""
        if self._fd >= 0:
            os.close(self._fd)
        if self._response is not None:
            self._response.raw.release_conn() if keep else self._response.close()
        self._fd, self._response = -1, None


class PartialFile:
    """A file under way: its `.incomplete`, the journal of what is in it, and a hash of its unbroken beginning.

    Opened at the first use, so that a repository of 100,000 files needs few descriptors.
    """

    def __init__(self, job: FileJob, filesystem: Filesystem) -> None:
        self.job = job
        self.hasher = FileHasher(job.remote)
        self._filesystem = filesystem
        self._lock = threading.Lock()  # opening, publishing and committing exclude each other
        self._fd = -1
        self._synced: List[Tuple[int, int]] = []
        self._published: List[Tuple[int, int]] = []

    def found(self) -> Intervals:
        """What an earlier run left. An unreadable or foreign journal counts as none: it only costs bandwidth."""
        remote = self.job.remote
        wanted = [PARTIAL_FORMAT, remote.path, remote.size, remote.etag]
        for journal, durable in ((self.job.journal_now, False), (self.job.journal, True)):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                state = json.loads(journal.read_bytes())
                current = state["boot_id"] == boot_id() != ""
                fits = [state["format"], state["path"], state["size"], state["etag"]] == wanted
                if fits and (durable or current) and self.job.incomplete.lstat().st_size == remote.size:
                    spans = [(int(start), int(stop)) for start, stop in state["written" if current else "synced"]]
                    self._synced = [(int(start), int(stop)) for start, stop in state["synced"]]
                    return Intervals((max(0, start), min(stop, remote.size)) for start, stop in spans)
        return Intervals()

    def create(self) -> int:
        """Have the file there, at its final size. Returns a descriptor of it; raises DiskError."""
        if self._fd >= 0:  # workers must not wait for the lock: it is held while the disk syncs
            return self._fd
        with self._lock:
            if self._fd < 0:
                try:
                    make_dir(self.job.incomplete.parent)
                    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    self._fd = os.open(self.job.incomplete, flags, 0o666)
                    preallocate(self._fd, self.job.remote.size, self._filesystem)
                except OSError as exc:
                    raise disk_error(exc, "create", self.job.incomplete) from exc
            return self._fd

    def publish(self, spans: List[Tuple[int, int]], sync: bool) -> None:
        """Write the journal: `spans` are in the file; with `sync` they are on the disk before the journal says so."""
        remote = self.job.remote
        with self._lock:
            unchanged = spans == (self._synced if sync else self._published)
            if unchanged or self._fd < 0 or remote.size <= SMALL_FILE:
                return
            if sync:
                os.fdatasync(self._fd)
                self._synced = spans
            state = {"format": PARTIAL_FORMAT, "path": remote.path, "size": remote.size, "etag": remote.etag}
            state.update({"boot_id": boot_id(), "synced": self._synced, "written": spans})
            make_dir(self.job.journal.parent)
            atomic_write(self.job.journal_now, json.dumps(state), durable=False)
            if sync:
                atomic_write(self.job.journal, json.dumps(state))
            self._published = spans

    def hash_up_to(self, stop: int) -> None:
        """Let the hash follow to byte `stop`, from the page cache."""
        while self.hasher.position < stop:
            size = min(CHUNK, stop - self.hasher.position)
            piece = pread_exactly(self.create(), size, self.hasher.position)
            if not piece:
                raise IntegrityError(
                    f"{self.job.incomplete} became shorter", "", "leave the folder alone while it is fetched"
                )
            self.hasher.update(piece)

    def start_over(self) -> None:
        """Forget everything that arrived. No reader may be on the file."""
        self.hasher = FileHasher(self.job.remote)
        self._synced = []
        self.publish([], sync=False)

    def commit(self) -> os.stat_result:
        """The content is proven and no reader is on the file: give it its name, durably. Returns its stat."""
        fd = self.create()
        with self._lock:
            try:
                os.fsync(fd)
                stat = os.fstat(fd)
                os.close(fd)
                self._fd = -1
                self.job.publish()
                for journal in (self.job.journal_now, self.job.journal):
                    with contextlib.suppress(FileNotFoundError):
                        journal.unlink()
            except OSError as exc:
                raise disk_error(exc, "finish", self.job.target) from exc
            return stat


class FileHasher:
    """Hashes a file from its beginning: SHA-256 for the manifest, and the git blob id where the Hub gives only that.

    `marks` are the first 16 hex digits of the SHA-256 of everything up to each whole block. They cost nothing, and
    later they tell which block of a damaged file is the first bad one.
    """

    def __init__(self, remote: RemoteFile) -> None:
        self.position = 0
        self.marks: List[str] = []
        self._remote = remote
        self._sha256 = hashlib.sha256()
        self._git = None if remote.sha256 else git_blob_sha1(remote.size)

    def update(self, piece: Union[bytes, memoryview]) -> None:
        """The next bytes of the file."""
        rest = memoryview(piece)
        while rest:
            part = rest[: BLOCK_SIZE - self.position % BLOCK_SIZE]
            self._sha256.update(part)
            if self._git:
                self._git.update(part)
            self.position, rest = self.position + len(part), rest[len(part) :]
            if self.position % BLOCK_SIZE == 0:
                self.marks.append(self.sha256[:16])

    def copy(self) -> FileHasher:
        """The same state, to go on from twice."""
        twin = FileHasher(self._remote)
        twin.position, twin.marks, twin._sha256 = self.position, list(self.marks), self._sha256.copy()
        twin._git = self._git.copy() if self._git else None
        return twin

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def matches(self) -> bool:
        """Is the content, now fed completely, what the Hub listed?"""
        if self.position != self._remote.size:
            return False
        if self._git:
            return bool(self._git.hexdigest() == self._remote.git_sha1)
        return self.sha256 == self._remote.sha256


class VerifiedLog:
    """Which files of a folder were proven, so that a rerun reads no content: `.hfship/verified.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / WORK_DIR / "verified.jsonl"
        self._lock = threading.Lock()
        self._known: Dict[str, Dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut by a power cut
                    record = json.loads(line)
                    self._known[record["path"]] = record

    def sha256_of(self, remote: RemoteFile) -> Optional[str]:
        """SHA-256 of the file on disk if it was proven to be `remote` and was not touched since."""
        record = self._known.get(remote.path)
        try:
            stat = os.lstat(self._folder / remote.path)
        except OSError:
            return None
        now = [stat.st_size, stat.st_mtime_ns, remote.etag]
        if record and [record.get("size"), record.get("mtime_ns"), record.get("etag")] == now:
            return str(record["sha256"])
        return None

    def marks_of(self, remote: RemoteFile) -> List[str]:
        """The block marks of the file as it was when it was right; [] when nobody took them."""
        record = self._known.get(remote.path, {})
        return list(record.get("marks", ())) if record.get("etag") == remote.etag else []

    def add(self, remote: RemoteFile, stat: os.stat_result, hasher: FileHasher) -> None:
        """Remember a file whose hash matches."""
        record = {"path": remote.path, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        record.update({"etag": remote.etag, "sha256": hasher.sha256, "marks": hasher.marks})
        with self._lock:
            self._known[remote.path] = record
            make_dir(self._path.parent)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")


def write_hub_metadata(folder: Path, remote: RemoteFile, commit: str) -> None:
    """What huggingface_hub writes for a file of a local folder, so that `hf download --local-dir` finds nothing to do.

    Three lines: commit, etag, time; believed while the file is not younger than the time.
    """
    base = folder / ".cache" / "huggingface"
    path = base / "download" / (remote.path + ".metadata")
    make_dir(path.parent)
    if not (base / "CACHEDIR.TAG").exists():
        (base / ".gitignore").write_text("*", encoding="utf-8")
        tag = "Signature: 8a477f597d28d172789f06886806bc55\n# Cache directory of huggingface_hub, written by hfship.\n"
        (base / "CACHEDIR.TAG").write_text(tag, encoding="utf-8")
    atomic_write(path, f"{commit}\n{remote.etag}\n{time.time()}\n", durable=False)


def accept_file(partial: PartialFile) -> None:
    """A file whose hash matches gets its name, and is remembered."""
    job = partial.job
    job.log.add(job.remote, partial.commit(), partial.hasher)
    write_hub_metadata(job.folder, job.remote, job.source.commit)


@dataclass(frozen=True)
class Transfer:
    """How to download: connections (None = as many as are worth it), bytes per second (None = all that come), and
    mirrors of the Hub that are asked first."""

    connections: Optional[int] = None
    limit_bps: Optional[float] = None
    mirrors: Tuple[str, ...] = ()

    @property
    def workers(self) -> int:
        return self.connections or MAX_CONNECTIONS


class Download:
    """Brings a list of files through a pool of workers. Use once: `run()`.

    Threads: each worker has a forked reader at a connection, which it sends for one range after the other; hash threads
    follow the unbroken beginning of each file and finish it; one thread publishes journals and sets the number of
    workers that may work; the caller waits. All shared state is behind one condition variable.
    """

    def __init__(
        self, client: HubClient, jobs: Sequence[FileJob], stage: Stage, stop: threading.Event, transfer: Transfer
    ) -> None:
        self._client, self._stage, self._stop, self._transfer = client, stage, stop, transfer
        self._jobs = list(jobs)
        filesystem = filesystem_of(jobs[0].folder)
        self._partials = [PartialFile(job, filesystem) for job in jobs]
        self._endpoints = (*transfer.mirrors, client.endpoint)
        self._sources = Sources(len(self._endpoints))
        self._addresses: Dict[Tuple[int, int], SharedAddress] = {}
        have = [partial.found() for partial in self._partials]
        self._scheduler = Scheduler([job.remote.size for job in jobs], have)
        self._changed = threading.Condition()
        # Files with something to hash or to publish; an empty file has nothing to fetch and is finished by its hash.
        self._open = {i for i, job in enumerate(jobs) if have[i].spans or job.remote.size == 0}
        self._hashing: Set[int] = set()
        self._finished = 0
        self._rejected: Dict[int, int] = {}
        self._failure: Optional[BaseException] = None
        pieces = sum(1 + (job.remote.size - had.total) // MIN_STEAL for job, had in zip(jobs, have))
        reader = RangeReader(client, self._jobs, self._endpoints)
        processes = min(MOST_READERS, default_jobs())
        self._readers = Workers(min(transfer.workers, pieces), reader.do, self._heard, processes)
        self._count = ConnectionCount(self._readers.count)
        self._limit = self._readers.count if transfer.connections else self._count.limit
        self._working: Set[int] = set()
        self._complained = 0.0
        self._rate = RateLimit(transfer.limit_bps, stop)
        self._speeds: Dict[int, float] = {}  # worker -> bytes per second of its connection
        self._evictions: Deque[float] = deque(maxlen=EVICTIONS_PER_MINUTE)
        stage.skip(sum(intervals.total for intervals in have))
        stage.files = len(jobs)

    def run(self) -> None:
        """Fetch, verify and finish every file. Raises the first HfshipError of any thread, or KeyboardInterrupt;
        either way what arrived is kept for the next run."""
        self._client.prepare_forks()
        with self._readers:
            try:
                for role in [self._hash] * min(ACTIVE_FILES, default_jobs()) + [self._keep_house]:
                    self._start(role)
                with self._changed:
                    self._hire()
                    while self._failure is None and not self._complete() and not self._stop.is_set():
                        self._changed.wait(0.2)
            finally:
                self._stop.set()
                with self._changed:
                    self._changed.notify_all()
                self._publish(sync=False)
        if isinstance(self._failure, AuthError):
            self._failure.next_step += "\nthen run the same command again: what arrived is kept"
        if self._failure is not None:
            raise self._failure
        if not self._complete():
            why = "it judged this one dead, because its lease was not renewed in time"
            raise IncompleteError("another hfship took over the folder", why, "wait for it, then run the command again")

    def _complete(self) -> bool:
        return self._finished == len(self._jobs)

    def _hire(self) -> None:
        """As many workers as connections are wanted; they leave by themselves when fewer are."""
        for number in set(range(self._limit)) - self._working:
            self._working.add(number)
            self._start(self._work, number)

    def _start(self, role: Callable[..., None], *args: int) -> None:
        try:
            threading.Thread(target=self._guard, args=(role, *args), daemon=True).start()
        except RuntimeError as exc:  # ulimit -u, or the cgroup's pids.max
            raise _short_of_memory("cannot start a thread", str(exc)) from exc

    def _guard(self, role: Callable[..., None], *args: int) -> None:
        """Run a thread's role; whatever ends it badly ends the run."""
        try:
            role(*args)
        except KeyboardInterrupt:
            pass  # the gate's way to say that the run is being stopped
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits in run()
            with self._changed:
                self._failure = self._failure or exc
                self._changed.notify_all()

    # -- workers

    def _work(self, number: int) -> None:
        failures = 0
        while True:
            flight = self._next_flight(number)
            if flight is None:
                return
            with self._changed:
                place = self._sources.choose(flight.file)
            failure: Optional[RetryableError] = None
            try:
                self._fetch(flight, place, number)
            except RetryableError as exc:
                failure = exc
            except HfshipError:
                if place == self._sources.hub:
                    raise
                with self._changed:
                    self._sources.refuse(flight.file, place)
            finally:
                self._land(flight)
            failures = 0 if failure is None else 1 if flight.position > flight.start else failures + 1
            if failure:
                with self._changed:
                    self._sources.fault(place)
                self._after_failure(flight, failures, failure)

    def _heard(self, remark: Tuple[Any, ...]) -> None:
        """A reader has something for the reporter, or for the gate."""
        name, *args = remark
        getattr(self._client.gate if name == "hold" else self._client.reporter, name)(*args)

    def _reader(self, number: int, step: str, *args: Any) -> Any:
        """Let a reader take a step. Raises KeyboardInterrupt when it is gone because the run is being stopped."""
        try:
            return self._readers.call(number, step, *args)
        except HostError as exc:
            if self._stop.is_set():
                raise KeyboardInterrupt from exc
            raise

    def _next_flight(self, number: int) -> Optional[Flight]:
        """Wait for something to fetch; None when everything is finished, the run ends, or worker `number` is one too
        many."""
        with self._changed:
            while not self._stop.is_set() and not self._complete() and number < self._limit:
                flight = self._scheduler.take(request_size(self._speeds.get(number, 0.0)))
                if flight:
                    self._open.add(flight.file)
                    return flight
                self._changed.wait(0.5)
            self._speeds.pop(number, None)
            self._working.discard(number)
        return None

    def _land(self, flight: Flight) -> None:
        """Give the flight back. A small file that is complete is finished here and now: handed to the hash threads,
        thousands of them would wait with their descriptors open."""
        file, size = flight.file, self._jobs[flight.file].remote.size
        with self._changed:
            self._scheduler.land(flight)
            unhashed = file in self._open and file not in self._hashing
            whole = unhashed and size <= SMALL_FILE and self._scheduler.have[file].total == size
            if whole:
                self._hashing.add(file)
            self._changed.notify_all()
        if whole:
            self._hash_file(file)

    def _after_failure(self, flight: Flight, failures: int, exc: RetryableError) -> None:
        if isinstance(exc, ObjectChanged):
            self._fetch_anew(flight.file)
        now = time.monotonic()
        loud = failures > 1 and now - self._complained > 5
        say = self._client.reporter.info if loud else self._client.reporter.detail
        self._complained = now if loud else self._complained
        say(f"{self._jobs[flight.file].remote.path}: {exc}; trying again")
        if failures >= WORKER_FAILURES:
            kept = f"{human_bytes(self._stage.done)} of {human_bytes(self._stage.total)} arrived and are kept"
            step = "check the network, then run the same command again"
            raise NetworkError(f"the download does not get on: {exc}", kept, step) from exc
        self._stop.wait(backoff(failures) if exc.wait_s is None else exc.wait_s)

    def _fetch(self, flight: Flight, place: int, number: int) -> None:
        """Send reader `number` for one flight, or as much of it as comes. Raises RetryableError."""
        with self._changed:
            address = self._addresses.setdefault((flight.file, place), SharedAddress())
        asked, keep = flight.stop, False
        try:
            with address.turn() as known:
                self._client.gate.wait()
                answer, found = self._reader(number, "open", flight.file, place, known, flight.start, asked)
                address.learn(known, found)
            if isinstance(answer, Exception):
                raise answer
            if not answer:
                self._take_whole(flight)
                asked = flight.stop
            self._partials[flight.file].create()
            self._stream(flight, number)
            with self._changed:
                self._sources.success(flight.file, place)
            keep = flight.position == asked and not self._too_slow(number)
        except RetryableError:
            address.forget()
            raise
        finally:
            self._reader(number, "close", keep)

    def _too_slow(self, number: int) -> bool:
        """Is this worker's connection so much slower than the fastest one that dialling again is worth it?"""
        with self._changed:
            mine, best = self._speeds.get(number, 0.0), max(self._speeds.values(), default=0.0)
            now = time.monotonic()
            spent = len(self._evictions) == EVICTIONS_PER_MINUTE and self._evictions[0] > now - 60
            if spent or mine >= SLOW_SHARE * best:
                return False
            self._evictions.append(now)
            self._speeds.pop(number, None)
        speeds = f"{human_bytes(mine)}/s beside {human_bytes(best)}/s"
        self._client.reporter.detail(f"connection {number} is slow, {speeds}: dialling again")
        return True

    def _take_whole(self, flight: Flight) -> None:
        with self._changed:
            if flight.start > 0:
                raise RetryableError("the server ignores Range: the file must come in one piece")
            self._scheduler.without_ranges(flight)

    def _stream(self, flight: Flight, number: int) -> None:
        """Have the body written up to the flight's (moving) end, or until the connection proves slow or one too many: a
        server that punishes crowds does so for as long as they stay."""
        began, speed = time.monotonic(), self._speeds.get(number, 0.0)
        while flight.left > 0 and number < self._limit and not self._stop.is_set():
            with self._changed:
                stop = self._scheduler.grant(flight, window_size(speed))
            position, broken = self._reader(number, "read", stop)
            count = position - flight.position
            with self._changed:
                new = self._scheduler.advance(flight, count)
            self._stage.add(new)
            if broken:
                raise broken
            self._rate.wait(count)
            seconds = max(time.monotonic() - began, 1e-3)
            speed = (flight.position - flight.start) / seconds
            if seconds > SLOW_AFTER_S or flight.left == 0:
                self._speeds[number] = speed
                if flight.left > MIN_STEAL and self._too_slow(number):
                    return

    # -- hashing and finishing

    def _hash(self) -> None:
        while True:
            file = self._next_to_hash()
            if file is None:
                return
            self._hash_file(file)

    def _hash_file(self, file: int) -> None:
        """Let the hash of a file, which nobody else hashes now, follow its beginning; finish it at its end."""
        partial = self._partials[file]
        with self._changed:
            prefix = self._scheduler.have[file].prefix
        partial.hash_up_to(min(prefix, partial.hasher.position + HASH_STEP))
        if partial.hasher.position == self._jobs[file].remote.size:
            self._finish(file)
        with self._changed:
            self._hashing.discard(file)
            self._changed.notify_all()

    def _next_to_hash(self) -> Optional[int]:
        """A file whose unbroken beginning has grown beyond its hash; waits for one."""
        with self._changed:
            while not self._stop.is_set() and not self._complete():
                for file in self._open - self._hashing:
                    prefix, size = self._scheduler.have[file].prefix, self._jobs[file].remote.size
                    if prefix == size or prefix - self._partials[file].hasher.position >= 4 * CHUNK:
                        self._hashing.add(file)
                        return file
                self._changed.wait(0.1)
        return None

    def _finish(self, file: int) -> None:
        """All bytes are there and hashed: accept the file, or fetch it once more."""
        partial = self._partials[file]
        if not partial.hasher.matches():
            self._reject(file)
            return
        with self._changed:
            self._await_quiet(file)
        accept_file(partial)
        self._client.reporter.detail(f"{partial.job.remote.path}: verified, SHA-256 {partial.hasher.sha256}")
        with self._changed:
            self._open.discard(file)
            self._finished += 1
        self._stage.finish(1)

    def _await_quiet(self, file: int) -> None:
        """Return when no reader can be writing to a file any more. Raises KeyboardInterrupt when the run ends."""
        self._changed.wait_for(lambda: self._scheduler.quiet(file) or self._stop.is_set())
        if self._stop.is_set():
            raise KeyboardInterrupt

    def _fetch_anew(self, file: int) -> None:
        """What came of this file is of another object than what comes now."""
        with self._changed:
            self._changed.wait_for(lambda: file not in self._hashing or self._stop.is_set())
            if file not in self._open:  # what came meanwhile was right: it has its name
                return
            self._hashing.add(file)
        self._throw_away(file)
        with self._changed:
            self._hashing.discard(file)
            self._changed.notify_all()

    def _throw_away(self, file: int) -> None:
        """Forget what came of a file, which nobody else hashes now, and hand all of it out again."""
        with self._changed:
            self._scheduler.give_up(file)
            self._await_quiet(file)
            self._stage.add(-self._scheduler.restart(file))
        self._partials[file].start_over()

    def _reject(self, file: int) -> None:
        """The bytes are not what the Hub listed: fetch them again, from elsewhere if there is an elsewhere."""
        job = self._jobs[file]
        self._rejected[file] = self._rejected.get(file, 0) + 1
        with self._changed:
            banned = self._sources.bytes_were_wrong(file)
            self._addresses.pop((file, self._sources.choose(file)), None)
        for place in banned:
            self._client.reporter.warn(f"{self._endpoints[place]} sends wrong bytes and is not asked again")
        self._throw_away(file)
        if self._rejected[file] > 1 + len(self._transfer.mirrors):
            why = f"its hash is not {job.remote.etag}, again; the bytes were thrown away"
            step = "try another network or mirror (--mirror URL); something between the Hub and here changes bytes"
            raise IntegrityError(f"{job.remote.path} arrives damaged", why, step)
        self._client.reporter.warn(f"{job.remote.path} arrived damaged; fetching it again")

    # -- journals and the number of connections

    def _keep_house(self) -> None:
        synced_at = ticked_at = time.monotonic()
        synced_bytes = ticked_bytes = self._stage.done
        while not self._stop.wait(PUBLISH_INTERVAL_S):
            now, done = time.monotonic(), self._stage.done
            due = now - synced_at > SYNC_INTERVAL_S or done - synced_bytes > SYNC_BYTES
            self._publish(sync=due)
            if due:
                synced_at, synced_bytes = now, done
            if now - ticked_at > TICK_S and not self._transfer.connections:
                goodput, before = (done - ticked_bytes) / (now - ticked_at), self._limit
                with self._changed:
                    self._limit = self._count.tick(goodput)
                    self._hire()
                if self._limit != before:
                    what = f"{human_bytes(goodput)}/s over {counted(before, 'connection')}"
                    self._client.reporter.detail(f"{what}, now trying {self._limit}")
                ticked_at, ticked_bytes = now, done

    def _publish(self, sync: bool) -> None:
        with self._changed:
            spans = {file: list(self._scheduler.have[file].spans) for file in self._open}
        for file, have in spans.items():
            self._partials[file].publish(have, sync)


ARIA2_ROUNDS = 5  # a signed address lives about an hour; each round signs anew and goes on
ARIA2 = (
    "aria2c --continue=true --auto-file-renaming=false --allow-overwrite=true --file-allocation=none"
    " --min-split-size=1M --max-tries=5 --retry-wait=2 --connect-timeout=10 --timeout=15 --summary-interval=0"
    f" --console-log-level=error --download-result=hide --user-agent=hfship/{__version__}"
).split()


def aria2_input(jobs: Sequence[FileJob], urls: Sequence[str], endpoint: str, token: Optional[Token]) -> str:
    """aria2's orders. They hold signed addresses and, for the Hub's own origin only, the token: aria2 would send
    a header on to the CDN that it is redirected to (aria2/aria2#1176)."""
    lines = []
    for job, url in zip(jobs, urls):
        lines += [url, f"  dir={job.incomplete.parent.absolute()}", f"  out={job.incomplete.name}"]
        if token and origin(url) == origin(endpoint):
            lines.append(f"  header=Authorization: Bearer {token.value}")
    return "\n".join(lines) + "\n"


def run_aria2(client: HubClient, jobs: Sequence[FileJob], transfer: Transfer) -> Completed:
    """One round of aria2c over the given files. It reads its orders from a pipe: they hold the token."""
    urls = [FileAddress(client, job, client.endpoint).locate() for job in jobs]
    connections = min(16, transfer.connections or 16)
    argv = [*ARIA2, "--input-file=-", f"--split={connections}", f"--max-connection-per-server={connections}"]
    argv += ["--max-concurrent-downloads=2", f"--stop-with-process={os.getpid()}"]
    argv += [f"--max-overall-download-limit={int(transfer.limit_bps)}"] if transfer.limit_bps else []
    return run_program(argv, aria2_input(jobs, urls, client.endpoint, client.token))


def fetch_with_aria2(client: HubClient, jobs: Sequence[FileJob], stage: Stage, transfer: Transfer) -> None:
    """Let an installed aria2c bring the files; what it brought is hashed by us before it counts."""
    filesystem = filesystem_of(jobs[0].folder)

    def control(job: FileJob) -> Path:
        return job.incomplete.with_name(job.incomplete.name + ".aria2")

    for job in jobs:
        make_dir(job.incomplete.parent)
        if job.incomplete.exists() and not control(job).exists():
            job.incomplete.unlink()  # begun by ourselves: aria2 would take it for complete
    pending = list(jobs)
    done = Completed(0, "", "")
    with _watch_growth(jobs, stage):
        for _ in range(ARIA2_ROUNDS):
            done = run_aria2(client, pending, transfer)
            pending = [job for job in pending if control(job).exists() or not job.incomplete.exists()]
            if not pending:
                break
    if pending:
        why = redact((done.err or done.out).strip()[-500:])
        what = f"aria2c did not finish {counted(len(pending), 'file')}"
        raise NetworkError(what, why, "run the same command again: it goes on")
    for job in jobs:
        partial = PartialFile(job, filesystem)
        partial.hash_up_to(min(job.remote.size, job.incomplete.stat().st_size))
        if not partial.hasher.matches():
            job.incomplete.unlink()
            step = "run the same command again, without --engine aria2"
            raise IntegrityError(f"{job.remote.path} arrives damaged through aria2c", "", step)
        accept_file(partial)


@contextlib.contextmanager
def _watch_growth(jobs: Sequence[FileJob], stage: Stage) -> Iterator[None]:
    """Count the blocks that another program writes as progress."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(BAR_INTERVAL_S):
            held = 0
            for job in jobs:
                with contextlib.suppress(OSError):
                    held += min(job.incomplete.stat().st_blocks * 512, job.remote.size)
            stage.add(held - stage.done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@dataclass(frozen=True)
class FetchRequest:
    """What the operator asked for: one repository and the files of it."""

    repo: str
    revision: Optional[str]
    name: str
    repo_type: str = "model"
    include: Tuple[str, ...] = ()
    exclude: Tuple[str, ...] = ()
    all_files: bool = False
    rehash: bool = False


@dataclass(frozen=True)
class FetchPlan:
    """What one repository needs: the files wanted, and those that are there already, proven (path -> SHA-256)."""

    name: str
    folder: Path
    snapshot: Snapshot
    wanted: Tuple[RemoteFile, ...]
    present: Mapping[str, str]
    log: VerifiedLog
    outdates: bool = False  # a manifest of another commit lies there

    @property
    def jobs(self) -> List[FileJob]:
        missing = [file for file in self.wanted if file.path not in self.present]
        return [FileJob(file, self.snapshot.source, self.folder, self.log, self.outdates) for file in missing]


def select_files(files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str]) -> List[RemoteFile]:
    """The files that match one of `include` (all when empty) and none of `exclude`.

    Patterns are fnmatch on the whole path, as in `hf download`: `*` also crosses '/', and `dir/` means `dir/*`.

    >>> files = [RemoteFile(p, 1, "") for p in ("a.json", "onnx/a.onnx")]
    >>> [f.path for f in select_files(files, [], ["onnx/"])]
    ['a.json']
    """

    def matches(path: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(path, p + "*" if p.endswith("/") else p) for p in patterns)

    return [f for f in files if (not include or matches(f.path, include)) and not matches(f.path, exclude)]


# What vLLM and Transformers never read when safetensors are there (weight_utils.filter_duplicate_safetensors_files).
DUPLICATE_WEIGHTS = (
    *("pytorch_model*.bin", "*/pytorch_model*.bin", "pytorch_model.bin.index.json", "tf_model*.h5", "rust_model.ot"),
    *("flax_model*.msgpack", "*.onnx", "*.onnx_data", "onnx/*", "openvino/*", "coreml/*", "*.tflite", "original/*"),
    "consolidated*",
)


def without_duplicates(files: Sequence[RemoteFile]) -> List[RemoteFile]:
    """The files less weights in formats that are never read beside `model*.safetensors`.

    >>> names = ["model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "training_args.bin"]
    >>> [f.path for f in without_duplicates([RemoteFile(n, 1, "") for n in names])]
    ['model.safetensors', 'training_args.bin']
    """
    if not any(fnmatchcase(file.path, "model*.safetensors") for file in files):
        return list(files)
    return select_files(files, [], DUPLICATE_WEIGHTS)


def hash_file(path: Path, hasher: FileHasher, count: Callable[[int], None]) -> os.stat_result:
    """Feed a whole file to the hasher; the stat of what was read."""
    with path.open("rb", buffering=0) as stream:
        for piece in iter(lambda: stream.read(CHUNK), b""):
            hasher.update(piece)
            count(len(piece))
        return os.fstat(stream.fileno())


def present_files(
    folder: Path, wanted: Sequence[RemoteFile], log: VerifiedLog, reporter: Reporter, rehash: bool = False
) -> Dict[str, str]:
    """path -> SHA-256 of the wanted files that lie in the folder already. Files that this hfship did not prove, or
    all with `rehash`, are hashed now and adopted when they are right (`hf download` never checks a hash)."""
    present, unproven = {}, []
    for remote in wanted:
        path = folder / remote.path
        sha256 = None if rehash else log.sha256_of(remote)
        if sha256:
            present[remote.path] = sha256
        elif path.is_file() and not path.is_symlink() and path.stat().st_size == remote.size:
            unproven.append(remote)
    with reporter.stage("checking", sum(remote.size for remote in unproven)) as stage:
        for remote in unproven:
            hasher = FileHasher(remote)
            stat = hash_file(folder / remote.path, hasher, stage.add)
            if hasher.matches():
                log.add(remote, stat, hasher)
                present[remote.path] = hasher.sha256
    return present


def repair_file(client: HubClient, job: FileJob, marks: Sequence[str], reporter: Reporter) -> bool:
    """Mend a damaged file in place: fetch each block after which its hash leaves the marks. False when that does not
    make it right, or when so much is bad that fetching it anew is better.

    The hash up to a block's end covers everything before it, so blocks are mended in order: keep the state before a
    block, and where the mark is missed replace the block and hash it again from there.
    """
    remote, hasher, fetched = job.remote, FileHasher(job.remote), 0
    address = FileAddress(client, job, client.endpoint)
    with job.target.open("r+b", buffering=0) as stream, reporter.stage("repairing", remote.size) as stage:
        while hasher.position < remote.size:
            start, before = hasher.position, hasher.copy()
            stop = min(start + BLOCK_SIZE, remote.size)
            hasher.update(pread_exactly(stream.fileno(), stop - start, start))
            last = stop == remote.size
            right = hasher.matches() if last else hasher.marks[-1:] == [marks[start // BLOCK_SIZE]]
            if not right:
                fetched += stop - start
                if fetched > max(BLOCK_SIZE, remote.size // 2):
                    return False
                content = fetch_bytes(address, start, stop, remote.size)
                pwrite_all(stream.fileno(), content, start)
                hasher = before
                hasher.update(content)
            stage.add(stop - start)
        os.fsync(stream.fileno())
        if hasher.matches():
            reporter.info(f"{remote.path}: repaired, {human_bytes(fetched)} of {human_bytes(remote.size)} fetched")
            job.log.add(remote, os.fstat(stream.fileno()), hasher)
    return hasher.matches()


def fetch_bytes(address: FileAddress, start: int, stop: int, size: int) -> bytes:
    """One range into memory. Raises NetworkError when it does not come after several tries."""
    for attempt in range(1, RETRIES + 1):
        try:
            response = address.open(start, stop)
            with response:
                check_range_answer(response.status_code, response.headers, start, stop, size)
                content = b"".join(response.iter_content(CHUNK))
            if len(content) == stop - start:
                return content
            raise RetryableError("the connection ended early")
        except (RetryableError, OSError) as exc:
            address.forget()
            if attempt == RETRIES:
                raise NetworkError("a block cannot be fetched", str(exc), "run the same command again") from exc
            time.sleep(backoff(attempt))
    raise AssertionError("unreachable")


def reuse_local(job: FileJob, donors: Sequence[Path], reporter: Reporter) -> bool:
    """Take a file from another place on this machine instead of the network: its content is hashed before it counts."""
    for donor in donors:
        if donor.is_file() and donor.stat().st_size == job.remote.size and donor.resolve() != job.target.resolve():
            make_dir(job.target.parent)
            with contextlib.suppress(FileNotFoundError):
                job.incomplete.unlink()
            clone_file(donor.resolve(), job.incomplete)
            hasher = FileHasher(job.remote)
            with reporter.stage("reusing", job.remote.size) as stage:
                stat = hash_file(job.incomplete, hasher, stage.add)
            if hasher.matches():
                with opened(job.incomplete) as fd:
                    os.fsync(fd)
                job.publish()
                job.log.add(job.remote, stat, hasher)
                write_hub_metadata(job.folder, job.remote, job.source.commit)
                reporter.info(f"{job.remote.path}: taken from {donor}")
                return True
            job.incomplete.unlink()
    return False


def copies_in(root: Path) -> Dict[str, List[Path]]:
    """SHA-256 -> files with that content, as the manifests of the models in `root` tell."""
    copies: Dict[str, List[Path]] = {}
    for manifest_path in sorted(root.glob(f"*/{MANIFEST_PATH}")):
        with contextlib.suppress(IntegrityError, DiskError):
            folder = manifest_path.parent.parent
            manifest = read_manifest(folder)
            for entry in manifest.files if manifest else ():
                copies.setdefault(entry.sha256, []).append(folder / entry.path)
    return copies


def hub_cache_blob(job: FileJob, env: Mapping[str, str]) -> Path:
    """Where huggingface_hub's cache keeps the content of a job, if it has it."""
    cache = hub_path(env, "hub", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    repo = f"{job.source.repo_type}s--" + job.source.resolved_repo.replace("/", "--")
    return cache / repo / "blobs" / job.remote.etag


def plan_fetch(client: HubClient, request: FetchRequest, folder: Path, reporter: Reporter) -> FetchPlan:
    """Ask the Hub what the repository has and look at what is here. Writes nothing but the record of proven files."""
    snapshot = client.snapshot(request.repo, request.revision, request.repo_type)
    held = None
    with contextlib.suppress(IntegrityError):
        held = read_manifest(folder)
        if held and held.source and held.source.resolved_repo != snapshot.source.resolved_repo:
            what = f"{folder} holds another model, {held.source.resolved_repo}"
            raise UsageError(what, "", f"hfship fetch {request.repo} --name ANOTHER_NAME")
    wanted = select_files(snapshot.files, request.include, request.exclude)
    if request.repo_type == "model" and not request.all_files and not request.include:
        everything, wanted = wanted, without_duplicates(wanted)
        left = sum(file.size for file in everything) - sum(file.size for file in wanted)
        if left:
            what = f"{counted(len(everything) - len(wanted), 'file')} ({human_bytes(left)})"
            reporter.info(
                f"{request.repo}: leaving out {what} in formats that vLLM does not read; --all-files brings them"
            )
    if not wanted:
        why = f"{counted(len(snapshot.files), 'file')} in the repository, none selected"
        raise NotFoundError(f"nothing to fetch from {request.repo}", why, "check --include and --exclude")
    require_names(folder, [file.path for file in wanted], f"fetch into {folder}")
    log = VerifiedLog(folder)
    present = present_files(folder, wanted, log, reporter, request.rehash)
    outdates = not (held and held.source and held.source.commit == snapshot.source.commit)
    what = f"{counted(len(wanted), 'file')} wanted, {len(present)} of them here and proven"
    reporter.detail(f"{snapshot.source.resolved_repo}: {snapshot.source.revision} is {snapshot.source.commit}; {what}")
    return FetchPlan(request.name, folder, snapshot, tuple(wanted), present, log, outdates)


def bytes_to_write(plan: FetchPlan) -> int:
    """Room that the plan still needs: missing bytes less the blocks that unfinished files hold already."""
    needed = 0
    for job in plan.jobs:
        with contextlib.suppress(OSError):
            needed -= min(job.remote.size, job.incomplete.stat().st_blocks * 512)
        needed += job.remote.size
    return needed


def finish_fetch(plan: FetchPlan) -> Manifest:
    """All files are proven: write the manifest. An unchanged manifest keeps its bytes, so that packing it again gives
    the same archive."""
    entries = [FileEntry(f.path, f.size, plan.log.sha256_of(f) or "") for f in plan.wanted]
    changed = [entry.path for entry in entries if not entry.sha256]
    if changed:
        raise IntegrityError(f"{changed[0]} changed while it was fetched", "", "run the same command again")
    stamp = utc()
    manifest = make_manifest(plan.name, entries, replace(plan.snapshot.source, fetched_at=stamp))
    partial = plan.folder / WORK_DIR / "partial"
    with contextlib.suppress(OSError):
        for left in partial.glob(".*.tmp"):  # by a kill between the two steps of an atomic write
            left.unlink()
        partial.rmdir()  # kept while it holds journals of other files
    with contextlib.suppress(IntegrityError):
        old = read_manifest(plan.folder)
        if old and old.source and replace(old, source=replace(old.source, fetched_at=stamp)) == manifest:
            return old
    write_manifest(plan.folder, manifest)
    return manifest


# ======================================================================================
# §8 Frames
#
# Owns the archive format: a tar stream, known to the byte before the first file is read, cut into zstd frames that
# stand alone, and the tables that find and check them. All integers are little-endian.
#
#   archive = unit* check seek-table                      `unit` = pzstd header + zstd frame
#
#   pzstd header   0  4  0x184D2A50, a skippable frame     (lets `pzstd -d` decode in parallel)
#                  4  4  4, its length
#                  8  4  bytes of the zstd frame that follows
#   zstd frame     RFC 8878, one frame, with content size and content checksum; usually 2 MiB of the tar stream
#   check          0  4  0x184D2A55, a skippable frame of ours
#                  4  4  its length: 48 + 8 P + 4 U
#                  8  8  "hfship/1"
#                 16  4  U, the number of units
#                 20  4  P, the number of parts (1 for a whole file)
#                 24  8P bytes of each part, the tables counted into the last
#                  .  4U CRC-32 of each unit, header and frame
#                  .  32 SHA-256 of the check frame up to here followed by the whole seek table
#   seek table     0  4  0x184D2A5E, Zstandard Seekable Format 0.1.0 without checksums
#                  4  4  its length: 8 N + 9
#                  8  8N entries (bytes in the archive, bytes of the tar stream); for each unit two, (12, 0) for its
#                        header and one for its frame; then (bytes of the check frame, 0). So N = 2 U + 1
#                  .  9  N, one byte 0, 0x8F92EAB1
#
# The zstd checksum covers the content only: some bits of a frame can flip and it still decodes to the same bytes. The
# CRC-32 covers what lies on the medium, so a flipped bit is found wherever it is. Parts are the archive cut between
# units, never inside a table: each is a valid zstd file, and their concatenation is the archive.
#
#   tar stream = for each member: header, content, zeros up to a multiple of 512; then 1024 zeros
#
# Members: NAME/.hfship/manifest.json; NAME/.hfship/restore.py if there are planes; NAME/.hfship/delta.json if files are
# left out; then the files of the manifest in its order, those below 1 MiB first. All are regular, mode 0644, owner 0,
# time 0. The header is one ustar block; a path over 100 bytes or not ASCII, or a size of 8 GiB or more, is in a PAX
# header before it, its ustar field then being a placeholder or 0. Thus these first members imply every byte of the
# stream but the files' own. The writer starts a frame where the content of a weight, a file of 1 MiB or more, starts
# and another where it ends, so the frames of a weight depend on that weight alone. They have 2 MiB; those of a model of
# 512 GiB or more have more, as its tables would take too much memory. A reader relies on no frame size, but for planes.
#
# Planes: if restore.py, one of RESTORE_PYS to the byte, is the second member, then every weight PATH is a member
# PATH.planes. It has a block for every 2 MiB of PATH (4 MiB by hfship 0.1.0, as restore.py tells), the last maybe
# shorter, and each block is a frame of its own:
#   width planes   the last bytes of all elements of `width` bytes, then all bytes before those, and so on
#   rest           the bytes that do not fill an element
#   width          one byte: 1, 2 or 4
# The exponents of floats come to lie side by side and compress; their mantissas, which do not, are stored by zstd.
#
# Delta: delta.json is {"format": "hfship-delta/1", "absent": [PATH, ...]}, sorted by path, on one line: files of the
# manifest that are no members, because the far side has them.
#
# Promises: any byte of the stream is one frame away; damage stays in its frame and is found wherever it is; equal
# manifests, options and zstd versions give equal bytes. Never: holds more than a frame per worker; touches a disk.
# ======================================================================================

FRAME_SIZE = 2 << 20  # bytes of content; larger gains < 0.01 % on weights, smaller costs seek table
WORKERS_SIZE, WORKER_SIZE = 240 << 20, 5 << 20  # memory of all workers, and of one that holds no frame
LARGEST_FRAME = 64 << 20  # content that a reader accepts in a frame: bounds its memory against a hostile table
WEIGHT_SIZE = 1 << 20  # files from here on have frames of their own
PLANES_BLOCK = 2 << 20  # bytes of a file in one block of planes
FLUSH_SIZE = 64 << 20  # bytes between flushes: Ctrl-C must not wait until gigabytes reached a slow medium

PZSTD_MAGIC, CHECK_MAGIC, TABLE_MAGIC, TABLE_END = 0x184D2A50, 0x184D2A55, 0x184D2A5E, 0x8F92EAB1
CHECK_LABEL = b"hfship/1"
PLANES = ".planes"  # suffix of a weight whose bytes are in planes
RESTORE_PATH, DELTA_PATH, DELTA_FORMAT = f"{WORK_DIR}/restore.py", f"{WORK_DIR}/delta.json", "hfship-delta/1"
SPLITS = {"fat32": 2**32 - 1, "dvd": 4_700_000_000, "bd25": 25_025_314_816, "bd50": 50_050_629_632}

PROFILES = ("standard", "smallest", "store")
STORE_LEVEL = -131072  # libzstd's lowest: it looks for no match and codes no literal, but still checksums
PLANE_WIDTHS = (1, 2, 4)  # int8 and fp8, bf16 and f16, f32
TRIAL_SAMPLES, TRIAL_SIZE = 4, 8 << 10  # of a block, to find its width: costs some 2 % of the time
# zstd as a mere Huffman coder. Exponents have no strings worth finding, level 1 and 3 lose by looking for them. A plane
# that does not compress is recognised by its first bytes, and stored.
ENTROPY_ONLY = {
    "strategy": 1,
    "window_log": 17,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
}
# With a code for every 8 KiB instead of every 128: smaller where the rows of a tensor differ in scale, but slower.
ENTROPY_FINE = {**ENTROPY_ONLY, "window_log": 13}
TABLE_TRIAL_SIZE, TABLE_TRIAL_GAIN = 64 << 10, 0.999  # of the exponents of a block, to choose between the two

# The second member of an archive with planes, for a far side without hfship. Part of the format: never changed.
RESTORE_PY = b'''\
"""Makes PATH of every PATH.planes, and proves all files: python3 NAME/.hfship/restore.py (needs Python 3, no more).

PATH.planes is a row of blocks, one for 2 MiB of PATH. A block is: for elements of 1, 2 or 4 bytes the last bytes of
all elements, then the bytes before those, and so on; the bytes that fill no element; one byte, the element's size.
"""
import hashlib
import json
import os
import sys

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def blocks(path, size):
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(size), b""):
            yield block


def join(planes):
    width = planes[-1]
    count = (len(planes) - 1) // width
    block = bytearray(planes[:-1])
    for number in range(width):
        block[width - 1 - number : count * width : width] = planes[number * count : (number + 1) * count]
    return block


def restore(path):
    with open(path + ".incomplete", "wb") as target:
        for block in blocks(path + ".planes", (2 << 20) + 1):
            target.write(join(block))
    os.rename(path + ".incomplete", path)
    os.remove(path + ".planes")


wrong = []
with open(os.path.join(FOLDER, ".hfship", "manifest.json"), "rb") as stream:
    files = json.loads(stream.read().decode("utf-8"))["files"]
for entry in files:
    path = os.path.join(FOLDER, entry["path"])
    if os.path.exists(path + ".planes"):
        restore(path)
    digest = hashlib.sha256()
    for block in blocks(path, 1 << 20) if os.path.exists(path) else ():
        digest.update(block)
    if digest.hexdigest() != entry["sha256"]:
        wrong.append(entry["path"])
print("%d files, %d wrong or missing %s" % (len(files), len(wrong), " ".join(wrong)))
sys.exit(1 if wrong else 0)
'''
RESTORE_PYS = {PLANES_BLOCK: RESTORE_PY, 4 << 20: RESTORE_PY.replace(b"2 MiB", b"4 MiB").replace(b"(2 <<", b"(4 <<")}

_PZSTD = struct.Struct("<III")
_SKIPPABLE = struct.Struct("<II")
_CHECK = struct.Struct("<8sII")
_ENTRY = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
_BLOCK = 512

# ---- zstd backends -------------------------------------------------------------------
#
# libzstd comes from the first of these that works; HFSHIP_ZSTD=NAME allows only that one:
#
#   memfd      zstandard's C backend, carried in hfship.pyz, loaded from sealed memory: nothing is written anywhere
#   cache      the same from a private folder, where the host refuses to run code from memory (SELinux, no /proc)
#   installed  the host's zstandard; only when hfship.py runs from source, in place of the carried one
#   stdlib     compression.zstd of Python 3.14
#   system     the distribution's libzstd.so.1, through ctypes
#
# All make and take the same frames (RFC 8878), with content size and checksum.

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

# linux/fcntl.h; Python below 3.9 has no names for them. No write, no growing, no shrinking, no further seal.
_F_ADD_SEALS, _ALL_SEALS = 1033, 0xF

# ZSTD_cParameter and the level that libzstd calls 100, under the names that zstandard and compression.zstd use (zstd.h)
_ZSTD_PARAMETERS = {
    "compression_level": 100,
    "window_log": 101,
    "hash_log": 102,
    "chain_log": 103,
    "search_log": 104,
    "min_match": 105,
    "target_length": 106,
    "strategy": 107,
    "content_size_flag": 200,
    "checksum_flag": 201,
}


class ZstdError(Exception):
    """A frame that does not decode to exactly what was asked for."""


def declared_size(frame: Union[bytes, memoryview]) -> Optional[int]:
    """The content size in a frame's header (RFC 8878 §3.1.1.1); None when it is no zstd frame or does not say.

    >>> declared_size(bytes.fromhex("28b52ffd 24 03 190000 616263 9fe87352"))
    3
    """
    if len(frame) < 6 or bytes(frame[:4]) != ZSTD_MAGIC:
        return None
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    field_bytes = bytes(frame[start : start + width])
    if not width or len(field_bytes) < width:
        return None
    return int.from_bytes(field_bytes, "little") + (256 if width == 2 else 0)


class Zstd:
    """One way to reach libzstd. `name` says which library, `origin` where it was loaded from.

    The callables it makes hold library state: never shared by threads.
    """

    errors: Tuple[Type[Exception], ...] = (ZstdError,)

    def __init__(self, name: str, origin: str) -> None:
        self.name, self.origin = name, origin

    def compressor(self, level: int, **parameters: int) -> Callable[[Union[bytes, memoryview]], bytes]:
        """content -> one independent frame with content size and checksum.

        `parameters` are libzstd's own (window_log, hash_log, chain_log, search_log, min_match, target_length,
        strategy); 0 leaves one to the level.
        """
        raise NotImplementedError

    def decompressor(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        """(frame, content size) -> content. Raises ZstdError unless it is exactly one whole frame of that size."""
        decode = self._decoder()

        def decompress(frame: Union[bytes, memoryview], size: int) -> bytes:
            # Before the library sees it: a damaged header must not make it allocate what the header claims.
            declared = declared_size(frame)
            if declared != size:
                raise ZstdError(f"the frame declares {declared} bytes instead of {size}")
            content = decode(frame, size)
            if len(content) != size:
                raise ZstdError(f"the frame holds {len(content)} bytes instead of {size}")
            return content

        return decompress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        """The library's part of `decompressor`, for frames whose header declares the right size."""
        raise NotImplementedError

    def piecewise(self) -> Callable[[bytes], bytes]:
        """Decodes one frame of any program: the next bytes of the frame, cut between blocks -> their content. Raises
        one of `errors`."""
        raise NotImplementedError


class _Zstandard(Zstd):
    """The zstandard package, or its C backend alone."""

    def __init__(self, module: Any, origin: str) -> None:
        library = ".".join(map(str, module.ZSTD_VERSION))
        super().__init__(f"zstandard {module.__version__} (libzstd {library})", origin)
        self._module, self.errors = module, (module.ZstdError,)

    def compressor(self, level: int, **parameters: int) -> Callable[[Union[bytes, memoryview]], bytes]:
        options = self._module.ZstdCompressionParameters(
            compression_level=level, write_checksum=1, write_content_size=1, **parameters
        )
        compress: Callable[[Union[bytes, memoryview]], bytes]
        compress = self._module.ZstdCompressor(compression_params=options).compress
        return compress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        decoder = self._module.ZstdDecompressor()

        def decode(frame: Union[bytes, memoryview], size: int) -> bytes:
            try:
                if size:
                    content: bytes = decoder.decompress(frame, max_output_size=size, allow_extra_data=False)
                    return content
                # decompress() believes a header that says 0 without reading on.
                stream = decoder.decompressobj()
                content = stream.decompress(frame)
                whole = stream.eof and not stream.unused_data
            except self._module.ZstdError as exc:
                raise ZstdError(str(exc)) from exc
            if not whole:
                raise ZstdError("not exactly one whole frame")
            return content

        return decode

    def piecewise(self) -> Callable[[bytes], bytes]:
        decode: Callable[[bytes], bytes] = self._module.ZstdDecompressor().decompressobj().decompress
        return decode


class _StdlibZstd(Zstd):
    """compression.zstd of Python 3.14."""

    def __init__(self, module: Any) -> None:
        super().__init__(f"compression.zstd (libzstd {module.zstd_version})", "Python's standard library")
        self._module, self.errors = module, (module.ZstdError, EOFError)

    def compressor(self, level: int, **parameters: int) -> Callable[[Union[bytes, memoryview]], bytes]:
        wanted = {"compression_level": level, "checksum_flag": 1, "content_size_flag": 1, **parameters}
        names = self._module.CompressionParameter
        stream = self._module.ZstdCompressor(options={names[name]: value for name, value in wanted.items()})

        def compress(content: Union[bytes, memoryview]) -> bytes:
            frame: bytes = stream.compress(content, stream.FLUSH_FRAME)
            return frame

        return compress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        def decode(frame: Union[bytes, memoryview], size: int) -> bytes:
            stream = self._module.ZstdDecompressor()  # one per frame: it cannot start anew
            try:
                content: bytes = stream.decompress(frame, max_length=size + 1)
            except (self._module.ZstdError, EOFError) as exc:
                raise ZstdError(str(exc)) from exc
            if not stream.eof or stream.unused_data:
                raise ZstdError("not exactly one whole frame")
            return content

        return decode

    def piecewise(self) -> Callable[[bytes], bytes]:
        decode: Callable[[bytes], bytes] = self._module.ZstdDecompressor().decompress
        return decode


class _SystemZstd(Zstd):
    """libzstd.so.1 through ctypes, which lets other threads run meanwhile. Its API is stable since 1.4.0 (zstd.h)."""

    def __init__(self, ctypes: Any) -> None:
        self._ctypes, self._library = ctypes, ctypes.CDLL("libzstd.so.1")
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for name, result, arguments in (
            ("ZSTD_versionString", ctypes.c_char_p, []),
            ("ZSTD_isError", ctypes.c_uint, [size]),
            ("ZSTD_getErrorName", ctypes.c_char_p, [size]),
            ("ZSTD_createCCtx", pointer, []),
            ("ZSTD_freeCCtx", size, [pointer]),
            ("ZSTD_CCtx_setParameter", size, [pointer, integer, integer]),
            ("ZSTD_compressBound", size, [size]),
            ("ZSTD_compress2", size, [pointer, pointer, size, ctypes.c_char_p, size]),
            ("ZSTD_createDCtx", pointer, []),
            ("ZSTD_freeDCtx", size, [pointer]),
            ("ZSTD_findFrameCompressedSize", size, [ctypes.c_char_p, size]),
            ("ZSTD_decompressDCtx", size, [pointer, pointer, size, ctypes.c_char_p, size]),
            ("ZSTD_decompressStream", size, [pointer, pointer, pointer]),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        super().__init__(f"libzstd {self._library.ZSTD_versionString().decode()}", "libzstd.so.1 of this system")

    def _checked(self, result: int) -> int:
        if self._library.ZSTD_isError(result):
            raise ZstdError(self._library.ZSTD_getErrorName(result).decode())
        return result

    def compressor(self, level: int, **parameters: int) -> Callable[[Union[bytes, memoryview]], bytes]:
        library, context = self._library, self._library.ZSTD_createCCtx()
        wanted = {"compression_level": level, "checksum_flag": 1, "content_size_flag": 1, **parameters}
        for name, value in wanted.items():
            self._checked(library.ZSTD_CCtx_setParameter(context, _ZSTD_PARAMETERS[name], value))

        def compress(content: Union[bytes, memoryview]) -> bytes:
            source = bytes(content)  # ctypes cannot point into a read-only memoryview
            target = self._ctypes.create_string_buffer(library.ZSTD_compressBound(len(source)))
            size = self._checked(library.ZSTD_compress2(context, target, len(target), source, len(source)))
            frame: bytes = self._ctypes.string_at(target, size)
            return frame

        weakref.finalize(compress, library.ZSTD_freeCCtx, context)
        return compress

    def _decoder(self) -> Callable[[Union[bytes, memoryview], int], bytes]:
        library, context = self._library, self._library.ZSTD_createDCtx()

        def decode(frame: Union[bytes, memoryview], size: int) -> bytes:
            source = bytes(frame)
            # ZSTD_decompressDCtx goes on into further and skippable frames.
            if self._checked(library.ZSTD_findFrameCompressedSize(source, len(source))) != len(source):
                raise ZstdError("not exactly one whole frame")
            target = self._ctypes.create_string_buffer(max(size, 1))
            found = self._checked(library.ZSTD_decompressDCtx(context, target, size, source, len(source)))
            content: bytes = self._ctypes.string_at(target, found)
            return content

        weakref.finalize(decode, library.ZSTD_freeDCtx, context)
        return decode

    def piecewise(self) -> Callable[[bytes], bytes]:
        library, context, ctypes = self._library, self._library.ZSTD_createDCtx(), self._ctypes
        target = ctypes.create_string_buffer(FRAME_SIZE)

        def decode(pieces: bytes) -> bytes:
            source = ctypes.create_string_buffer(pieces, len(pieces))
            given = (ctypes.c_size_t * 3)(ctypes.addressof(source), len(pieces), 0)
            content = bytearray()
            while True:  # ZSTD_inBuffer and ZSTD_outBuffer: address, size, position
                taken = (ctypes.c_size_t * 3)(ctypes.addressof(target), len(target), 0)
                self._checked(library.ZSTD_decompressStream(context, taken, given))
                content += memoryview(target)[: taken[2]]
                if given[2] == given[1] and taken[2] < taken[1]:
                    return bytes(content)

        weakref.finalize(decode, library.ZSTD_freeDCtx, context)
        return decode


def _carried_backend() -> Tuple[bytes, str]:
    """(zstandard's C backend for this Python and machine, its SHA-256), checked. Raises ImportError if not carried."""
    entries = own_build().get("entries")
    if entries is None:
        raise ImportError("hfship runs from source")
    # As in ".cpython-311-x86_64-linux-gnu.so": version, free threading, machine and C library in one name.
    abi = importlib.machinery.EXTENSION_SUFFIXES[0][1:-3]
    name = f"native/{abi}/backend_c.so"
    if name not in entries:
        raise ImportError(f"hfship carries no zstandard for {abi}")
    image = own_entry(name)
    if hashlib.sha256(image).hexdigest() != entries[name]:
        raise _damaged(name, "its SHA-256 is not the one it was built with")
    return image, entries[name]


def _load_extension(path: str) -> Any:
    """The C backend at `path`, under a name of our own: a zstandard that the host imports is neither used nor hurt."""
    loader = importlib.machinery.ExtensionFileLoader("hfship.backend_c", path)
    module = loader.create_module(importlib.machinery.ModuleSpec("hfship.backend_c", loader, origin=path))
    loader.exec_module(module)
    return module


def _zstd_from_memfd() -> Zstd:
    image, _ = _carried_backend()
    if not hasattr(os, "memfd_create"):
        raise ImportError("this Python was built without memfd_create")
    fd = os.memfd_create("hfship-zstd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write_all(fd, image)
        fcntl.fcntl(fd, _F_ADD_SEALS, _ALL_SEALS)
        return _Zstandard(_load_extension(f"/proc/self/fd/{fd}"), "hfship.pyz, in memory")
    finally:
        os.close(fd)  # the mapping stays


def _zstd_from_cache() -> Zstd:
    image, digest = _carried_backend()
    refused = []
    for folder in _cache_folders():
        path = folder / f"backend_c-{digest}.so"
        try:
            _require_private(folder)
            if not path.is_file() or sha256_file(path) != digest:
                atomic_write(path, image, 0o600)
            return _Zstandard(_load_extension(str(path)), f"hfship.pyz, by way of {path}")
        except (OSError, ImportError, DiskError) as exc:
            refused.append(f"{folder}: {exc}")
    raise ImportError("; ".join(refused))


def _cache_folders() -> List[Path]:
    """Where compiled code may lie, best first."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    beside = Path(__file__).absolute().parent.with_name(".hfship-cache")
    own = os.environ.get("HFSHIP_CACHE")
    return ([Path(own)] if own else []) + [Path(user_cache) / "hfship", beside]


def _require_private(folder: Path) -> None:
    """Create `folder` for ourselves alone, or raise PermissionError when others could put code there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(errno.EPERM, "not a folder but a link", str(folder))
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others can write there (chmod go-w, or set HFSHIP_CACHE)", str(folder))


def _zstd_installed() -> Zstd:
    if own_build():
        raise ImportError("only used when hfship.py runs from source")
    module = importlib.import_module("zstandard")
    return _Zstandard(module, os.path.dirname(module.__file__ or ""))


def _zstd_from_stdlib() -> Zstd:
    return _StdlibZstd(importlib.import_module("compression.zstd"))


def _zstd_from_system() -> Zstd:
    return _SystemZstd(importlib.import_module("ctypes"))


ZSTD_BACKENDS: Mapping[str, Callable[[], Zstd]] = {
    "memfd": _zstd_from_memfd,
    "cache": _zstd_from_cache,
    "installed": _zstd_installed,
    "stdlib": _zstd_from_stdlib,
    "system": _zstd_from_system,
}


def load_zstd() -> Zstd:
    """The first zstd backend that works. Raises HostError that names what was tried."""
    forced = os.environ.get("HFSHIP_ZSTD", "")
    if forced and forced not in ZSTD_BACKENDS:
        raise UsageError(f"HFSHIP_ZSTD={forced} is no zstd backend", "", f"use one of {', '.join(ZSTD_BACKENDS)}")
    tried = []
    for name in [forced] if forced else ZSTD_BACKENDS:
        try:
            return ZSTD_BACKENDS[name]()
        except (ImportError, OSError, AttributeError) as exc:  # AttributeError: a libzstd before 1.4
            tried.append(f"{name:<9}  {exc}")
    next_step = "unset HFSHIP_ZSTD" if forced else "install the system's zstd library (libzstd1, libzstd or zstd)"
    raise HostError("no zstd library can be used", "\n".join(tried), f"{next_step}, or use Python 3.14 or newer")


# ---- frames, seek table, parts -------------------------------------------------------


class Segment(NamedTuple):
    """A stretch of the tar stream: bytes known beforehand, or one whole file; `planes` bytes of it make a block of
    planes, 0 for none. `what` names it."""

    start: int
    size: int
    what: str
    known: bytes = b""
    entry: Optional[FileEntry] = None
    planes: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.size

    def file_range(self, start: int, stop: int) -> Tuple[int, int]:
        """First byte and the one behind the last, in the file, of what stream [start, stop) holds of it.

        >>> weight = Segment(100, (6 << 20) + 3, "w", planes=2 << 20)
        >>> weight.file_range(102 + (4 << 20), 103 + (6 << 20)) == (4 << 20, 6 << 20)
        True
        """
        first, last = max(start, self.start) - self.start, min(stop, self.stop) - self.start
        return (self._without_widths(first), self._without_widths(last)) if self.planes else (first, last)

    def _without_widths(self, offset: int) -> int:
        """Bytes of a file in the first `offset` bytes of its planes: each block has one more, its width, at its end."""
        blocks, rest = divmod(offset, self.planes + 1)
        return blocks * self.planes + max(rest - 1, 0)


class Frame(NamedTuple):
    """Where one unit lies: `offset`/`size` in the archive, `start`/`length` in the tar stream; `crc` if known."""

    offset: int
    size: int
    start: int
    length: int
    crc: Optional[int] = None

    @property
    def stop(self) -> int:
        return self.start + self.length


class Frames(Sequence[Frame]):
    """Frames that lie one after the other, at 24 bytes each: a model of a terabyte has a quarter of a million."""

    def __init__(self, rows: Iterable[Tuple[int, int, Optional[int]]] = ()) -> None:
        self._offsets, self.edges, self._crcs = array("Q", [0]), array("Q", [0]), array("q")
        for size, length, crc in rows:
            self.append(size, length, crc)

    def append(self, size: int, length: int, crc: Optional[int] = None) -> None:
        """The next frame, of `length` bytes of the stream in a unit of `size`. Raises ValueError if that cannot be."""
        if not 0 < length <= LARGEST_FRAME or size > largest_unit(length):
            raise ValueError(f"a frame of {length} bytes in {size} is out of bounds")
        self._offsets.append(self._offsets[-1] + size)
        self.edges.append(self.edges[-1] + length)
        self._crcs.append(-1 if crc is None else crc)

    @property
    def size(self) -> int:
        """Bytes of all units."""
        return self._offsets[-1] - self._offsets[0]

    def __len__(self) -> int:
        return len(self._crcs)

    @overload
    def __getitem__(self, key: int) -> Frame: ...
    @overload
    def __getitem__(self, key: slice) -> Frames: ...
    def __getitem__(self, key: Union[int, slice]) -> Union[Frame, Frames]:
        if isinstance(key, slice):
            first, last, step = key.indices(len(self))
            assert step == 1 and first <= last, "they lie one after the other"
            some = Frames()
            some._offsets, some.edges = self._offsets[first : last + 1], self.edges[first : last + 1]
            some._crcs = self._crcs[first:last]
            return some
        at = range(len(self))[key]
        offset, start, crc = self._offsets[at], self.edges[at], self._crcs[at]
        size, length = self._offsets[at + 1] - offset, self.edges[at + 1] - start
        return Frame(offset, size, start, length, None if crc < 0 else crc)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frames) and vars(self) == vars(other)


class Index(NamedTuple):
    """What the check frame and the seek table tell: all frames in order, and the bytes of each part."""

    frames: Frames
    part_sizes: Tuple[int, ...]


def tar_header(path: str, size: int) -> bytes:
    """The header of a regular file in a PAX archive.

    >>> [len(tar_header(p, n)) for p, n in (("m/a", 5), ("m/" + "a" * 99, 5), ("m/é", 5), ("m/a", 8 << 30))]
    [512, 1536, 1536, 1536]
    """
    name = path.encode("utf-8")
    records = b""
    if len(name) > 100 or not path.isascii():
        records += _pax_record("path", path)
    if size >= 8**11:
        records, size = records + _pax_record("size", str(size)), 0
    extended = _ustar(b"././@PaxHeader", len(records), b"x") + records + padding(len(records)) if records else b""
    return extended + _ustar(path.encode("ascii", "replace")[:100], size, b"0")


def _pax_record(key: str, value: str) -> bytes:
    """A PAX record, which starts with its own length in decimal.

    >>> _pax_record("path", "x" * 89)[:7], len(_pax_record("path", "x" * 89)), len(_pax_record("path", "x" * 90))
    (b'98 path', 98, 99)
    """
    body = f" {key}={value}\n".encode()
    length = len(body)
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    block = bytearray(_BLOCK)
    fields = (0, name), (100, b"0000644"), (108, b"0000000"), (116, b"0000000"), (124, b"%011o" % size)
    rest = (
        (136, b"%011o" % 0),
        (148, b" " * 8),
        (156, kind),
        (257, b"ustar\x0000"),
        (329, b"0000000"),
        (337, b"0000000"),
    )
    for offset, value in fields + rest:
        block[offset : offset + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """The zeros that fill `size` bytes up to whole tar blocks."""
    return bytes(-size % _BLOCK)


def delta_json(absent: Iterable[str]) -> bytes:
    """The text of delta.json."""
    return (json.dumps({"format": DELTA_FORMAT, "absent": sorted(absent)}, ensure_ascii=False) + "\n").encode()


def parse_delta(text: bytes, manifest: Manifest) -> FrozenSet[str]:
    """The files that a delta leaves out. Raises ValueError unless `text` is what `delta_json` writes."""
    try:
        absent = frozenset(map(str, json.loads(text)["absent"]))
    except (KeyError, TypeError) as exc:
        raise ValueError(f"{DELTA_PATH} is of an unknown kind") from exc
    if delta_json(absent) != text or not absent <= {entry.path for entry in manifest.files}:
        raise ValueError(f"{DELTA_PATH} is not a list of files of the manifest")
    return absent


def stream_layout(manifest: Manifest, text: bytes, planes: int = 0, delta: bytes = b"") -> Tuple[Segment, ...]:
    """The tar stream of a manifest, whose exact bytes are `text`: sorted, gapless.

    >>> files = [FileEntry("w.bin", 2 << 20, "0" * 64), FileEntry("z", 3, "0" * 64)]
    >>> for s in stream_layout(make_manifest("m", files), b"{}"): print(s.start, s.size, s.what)
    0 512 tar header of m/.hfship/manifest.json
    512 2 m/.hfship/manifest.json
    514 510 padding after m/.hfship/manifest.json
    1024 512 tar header of m/z
    1536 3 m/z
    1539 509 padding after m/z
    2048 512 tar header of m/w.bin
    2560 2097152 m/w.bin
    2099712 1024 end of the tar stream
    """
    segments: List[Segment] = []

    def add(size: int, what: str, known: bytes = b"", entry: Optional[FileEntry] = None, planes: int = 0) -> None:
        if size or entry:
            segments.append(Segment(segments[-1].stop if segments else 0, size, what, known, entry, planes))

    def add_member(path: str, size: int, known: bytes = b"", entry: Optional[FileEntry] = None) -> None:
        in_planes = planes if entry and size >= WEIGHT_SIZE else 0
        path, size = (path + PLANES, size + -(-size // in_planes)) if in_planes else (path, size)
        header = tar_header(path, size)
        add(len(header), f"tar header of {path}", header)
        add(size, path, known, entry, in_planes)
        add(-size % _BLOCK, f"padding after {path}", padding(size))

    for path, known in ((MANIFEST_PATH, text), (RESTORE_PATH, RESTORE_PYS.get(planes, b"")), (DELTA_PATH, delta)):
        if known:
            add_member(f"{manifest.name}/{path}", len(known), known)
    absent = parse_delta(delta, manifest) if delta else frozenset()
    for entry in sorted(manifest.files, key=lambda entry: entry.size >= WEIGHT_SIZE):
        if entry.path not in absent:
            add_member(f"{manifest.name}/{entry.path}", entry.size, entry=entry)
    add(2 * _BLOCK, "end of the tar stream", bytes(2 * _BLOCK))
    return tuple(segments)


def manifest_extent(stream: bytes, at: int = 0) -> Tuple[int, int]:
    """Where the content of the member at `at` lies in the stream; ValueError if no header of a regular file is there.

    >>> manifest_extent(tar_header("m/" + "x" * 120, 77))
    (1536, 1613)
    """
    while True:
        block = stream[at : at + _BLOCK]
        if len(block) < _BLOCK or block[257:262] != b"ustar" or block[156:157] not in (b"0", b"x"):
            raise ValueError("no tar header of a regular file")
        size = int(block[124:135], 8)
        at += _BLOCK
        if block[156:157] == b"0":
            return at, at + size
        at += size + -size % _BLOCK


class Leading(NamedTuple):
    """The members that tell what the rest of the stream is."""

    manifest: Manifest
    text: bytes
    planes: int
    delta: bytes


def read_leading(pull: Callable[[int], bytes], where: str) -> Leading:
    """The leading members of a stream; pull(n) is its beginning, n bytes or all if there are fewer.

    Raises ValueError, or IntegrityError for a manifest that is not valid; `where` names it.
    """
    at = 0
    manifest: Optional[Manifest] = None
    texts: List[bytes] = []
    for path in (MANIFEST_PATH, RESTORE_PATH, DELTA_PATH):
        text = b""
        with contextlib.suppress(ValueError, ZstdError) if texts else contextlib.nullcontext():
            extended = pull(at + _BLOCK)[at + 156 : at + 157] == b"x"  # else no frame more than needed is read
            start, stop = manifest_extent(pull(at + (4 if extended else 1) * _BLOCK), at)
            if stop > LARGEST_FRAME or len(pull(stop)) < stop:
                raise ValueError("it has no end")
            manifest = manifest or parse_manifest(pull(stop)[start:stop], where)
            if not texts or pull(stop)[at:start] == tar_header(f"{manifest.name}/{path}", stop - start):
                text, at = pull(stop)[start:stop], stop + -stop % _BLOCK
        texts.append(text)
    text, restore, delta = texts
    if manifest is None:
        raise ValueError("no manifest")
    planes = next((block for block, known in RESTORE_PYS.items() if known == restore), 0)
    if restore and not planes:
        raise ValueError(f"{RESTORE_PATH} is not the one of this format")
    return Leading(manifest, text, planes, delta)


def index_at(items: Sequence[Any], start: int) -> int:
    """Index of the first of the tuples, sorted by their first field, that does not begin before `start`.

    >>> index_at([(0, "a"), (4, "b"), (4, "c"), (9, "d")], 4)
    1
    """
    return bisect_left(items, (start,))


def segments_between(segments: Sequence[Segment], start: int, stop: int) -> Sequence[Segment]:
    """Segments with bytes in stream [start, stop)."""
    first = max(index_at(segments, start + 1) - 1, 0)
    return [s for s in segments[first : index_at(segments, stop)] if s.stop > start]


def cut_frames(segments: Sequence[Segment], frame_size: int = FRAME_SIZE) -> Iterator[int]:
    """Where in the stream the frames begin, and the last one ends: at most `frame_size`; weights have their own.

    >>> weight = Segment(10, 2 << 20, "w", entry=FileEntry("w", 2 << 20, ""))
    >>> list(cut_frames([Segment(0, 10, "a"), weight, Segment(2097162, 5, "b")], 1500000))
    [0, 10, 1500010, 2097162, 2097167]
    """
    start = 0
    edges = [(edge, s.planes) for s in segments if s.entry and s.size >= WEIGHT_SIZE for edge in (s.start, s.stop)]
    for number, (edge, planes) in enumerate([*edges, (segments[-1].stop, 0)]):
        step = planes + 1 if planes and number % 2 else frame_size
        while start < edge:
            yield start
            start = min(start + step, edge)
    yield start


Buffer = Union[bytes, bytearray, memoryview]
Compress = Callable[[Union[bytes, memoryview]], bytes]
Decompress = Callable[[Union[bytes, memoryview], int], bytes]


def encode_unit(content: Union[bytes, memoryview], compress: Compress) -> bytes:
    """One unit: pzstd header and frame."""
    frame = compress(content)
    return _PZSTD.pack(PZSTD_MAGIC, 4, len(frame)) + frame


def split_planes(block: bytes, width: int) -> memoryview:
    """A block of a weight in planes.

    >>> bytes(split_planes(b"a1b2c", 2))
    b'12abc\\x02'
    """
    count = len(block) // width
    planes = bytearray(len(block) + 1)
    for number in range(width):
        planes[number * count : (number + 1) * count] = block[width - 1 - number : count * width : width]
    planes[count * width :] = block[count * width :] + bytes([width])
    return memoryview(planes)


def join_planes(planes: bytes) -> Union[bytes, bytearray]:
    """The block of a weight that is in planes. Raises ZstdError.

    >>> bytes(join_planes(split_planes(b"a1b2c", 2)))
    b'a1b2c'
    """
    size, width = len(planes) - 1, planes[-1]
    if width not in PLANE_WIDTHS:
        raise ZstdError(f"elements of {width} bytes")
    if width == 1:
        return planes[:-1]
    count = size // width
    block = bytearray(size)
    for number in range(width):
        block[width - 1 - number : count * width : width] = planes[number * count : (number + 1) * count]
    block[count * width :] = planes[count * width : -1]
    return block


def best_width(block: bytes, compress: Compress) -> int:
    """The width of elements whose planes compress best, by trial on samples from all over a block."""
    step = max(len(block) // TRIAL_SAMPLES & -4, 4)
    sample = b"".join(block[at : at + TRIAL_SIZE] for at in range(0, len(block), step))

    def size(width: int) -> int:
        return sum(len(compress(sample[first::width])) for first in range(width))

    return min(PLANE_WIDTHS, key=size)


def make_encoder(zstd: Zstd, profile: str, level: int) -> Callable[[bytes, bool], bytes]:
    """(content, whether to put it in planes) -> unit."""
    usual = zstd.compressor(STORE_LEVEL if profile == "store" else level)
    dense, coarse, fine = (zstd.compressor(1, **options) for options in ({}, ENTROPY_ONLY, ENTROPY_FINE))

    def encode(content: bytes, planes: bool) -> bytes:
        if planes:
            width = best_width(content, coarse)
            block = split_planes(content, width)
            sample = block[len(block) // width // 2 :][:TABLE_TRIAL_SIZE]
            finer = len(fine(sample)) < TABLE_TRIAL_GAIN * len(coarse(sample))
            return encode_unit(block, usual if width == 1 else fine if finer else coarse)
        # Storing would also store the holes of a sparse file.
        hole = profile == "store" and not any(content[:_BLOCK]) and content == bytes(len(content))
        return encode_unit(content, dense if hole else usual)

    return encode


def largest_unit(length: int) -> int:
    """An upper bound for the unit of `length` bytes of content (ZSTD_compressBound, and then some)."""
    return _PZSTD.size + length + (length >> 8) + 128


def tail_size(units: int, parts: int) -> int:
    """Bytes of check frame and seek table."""
    return (_SKIPPABLE.size + _CHECK.size + 8 * parts + 4 * units + 32) + _table_size(2 * units + 1)


def _table_size(entries: int) -> int:
    return _SKIPPABLE.size + _ENTRY.size * entries + _FOOTER.size


def encode_tail(frames: Sequence[Frame], part_sizes: Sequence[int]) -> bytes:
    """Check frame and seek table. `part_sizes` do not yet count them."""
    size = tail_size(len(frames), len(part_sizes))
    sizes = [*part_sizes[:-1], part_sizes[-1] + size]
    entries = 2 * len(frames) + 1
    check_size = size - _table_size(entries)
    check = (
        _SKIPPABLE.pack(CHECK_MAGIC, check_size - _SKIPPABLE.size)
        + _CHECK.pack(CHECK_LABEL, len(frames), len(sizes))
        + struct.pack(f"<{len(sizes)}Q", *sizes)
        + struct.pack(f"<{len(frames)}I", *(frame.crc or 0 for frame in frames))
    )
    rows = (_ENTRY.pack(_PZSTD.size, 0) + _ENTRY.pack(f.size - _PZSTD.size, f.length) for f in frames)
    table = (
        _SKIPPABLE.pack(TABLE_MAGIC, _table_size(entries) - _SKIPPABLE.size)
        + b"".join(rows)
        + _ENTRY.pack(check_size, 0)
        + _FOOTER.pack(entries, 0, TABLE_END)
    )
    return check + hashlib.sha256(check + table).digest() + table


def tail_extent(end: bytes) -> Tuple[int, int]:
    """(bytes of check frame and seek table, of the seek table alone) from the last 17 bytes of an archive.

    Raises ValueError when they do not end a seek table that we could have written.
    """
    if len(end) < _ENTRY.size + _FOOTER.size:
        raise ValueError("too short")
    entries, descriptor, magic = _FOOTER.unpack(end[-_FOOTER.size :])
    check_size, zero = _ENTRY.unpack(end[-_FOOTER.size - _ENTRY.size : -_FOOTER.size])
    if magic != TABLE_END or descriptor or zero or not entries % 2:
        raise ValueError("no seek table at the end")
    return check_size + _table_size(entries), _table_size(entries)


def decode_tail(tail: bytes) -> Index:
    """The index in check frame and seek table. Raises ValueError for anything that `encode_tail` does not write."""
    size, table_size = tail_extent(tail[-_ENTRY.size - _FOOTER.size :])
    check, table = tail[:-table_size], tail[-table_size:]
    if len(tail) != size or hashlib.sha256(check[:-32] + table).digest() != check[-32:]:
        raise ValueError("the SHA-256 of the tables is wrong")
    label, units, parts = _CHECK.unpack_from(check, _SKIPPABLE.size)
    if label != CHECK_LABEL or size != tail_size(units, parts):
        raise ValueError(f"tables of an unknown kind {label!r}")
    at = _SKIPPABLE.size + _CHECK.size
    part_sizes = struct.unpack_from(f"<{parts}Q", check, at)
    crcs = struct.unpack_from(f"<{units}I", check, at + 8 * parts)
    entries = _ENTRY.iter_unpack(table[_SKIPPABLE.size : -_FOOTER.size])
    frames = Frames()
    for header, (frame_size, length), crc in zip(entries, entries, crcs):
        if header != (_PZSTD.size, 0):
            raise ValueError("an entry of the seek table is wrong")
        frames.append(frame_size + _PZSTD.size, length, crc)
    if sum(part_sizes) != frames.size + size:
        raise ValueError("the parts do not add up to the archive")
    return Index(frames, part_sizes)


def unit_at(head: bytes) -> Tuple[int, int]:
    """(bytes of the unit, of its content) from the first 30 bytes of a unit: finds frames when the table is lost.

    Raises ValueError when no unit of ours begins there.

    >>> unit_at(_PZSTD.pack(PZSTD_MAGIC, 4, 99) + bytes.fromhex("28b52ffd 24 05"))
    (111, 5)
    """
    if len(head) < _PZSTD.size:
        raise ValueError("the archive ends here")
    magic, four, size = _PZSTD.unpack_from(head)
    length = declared_size(head[_PZSTD.size :])
    if (magic, four) != (PZSTD_MAGIC, 4) or length is None:
        raise ValueError("no frame begins here")
    return size + _PZSTD.size, length


def read_units(stream: IO[bytes]) -> Iterator[Tuple[bytes, int]]:
    """The units of an archive that comes as a stream, with the bytes of their content; then what is left, with -1:
    the tables, which are smaller than LARGEST_FRAME.

    Raises ValueError for a unit that is cut or out of bounds.
    """
    while True:
        head = stream.read(_PZSTD.size)
        if head[:4] != _PZSTD.pack(PZSTD_MAGIC, 4, 0)[:4] or len(head) < _PZSTD.size:
            yield head + stream.read(LARGEST_FRAME), -1
            return
        frame = stream.read(min(_PZSTD.unpack(head)[2], largest_unit(LARGEST_FRAME)))
        size, length = unit_at(head + frame[:18])
        if len(head) + len(frame) != size or not 0 < length <= LARGEST_FRAME:
            raise ValueError(f"a frame of {length} bytes in {size} is cut or out of bounds")
        yield head + frame, length


def part_name(archive: str, number: int, parts_at_most: int) -> str:
    """The name of a part; as wide as the largest number that can occur, so that `cat NAME.tar.zst.*` sorts right.

    >>> part_name("m.tar.zst", 7, 30), part_name("m.tar.zst", 7, 12345)
    ('m.tar.zst.0007', 'm.tar.zst.00007')
    """
    return f"{archive}.{number:0{max(4, len(str(parts_at_most)))}d}"


def cut_lanes(edges: Sequence[int], segments: Sequence[Segment]) -> List[int]:
    """Which of the frames between `edges` begin a lane: those that begin with a segment; and their number."""
    starts, count = {segment.start for segment in segments}, len(edges) - 1
    return [number for number in range(count) if edges[number] in starts or not number] + [count]


class Lane(NamedTuple):
    """Frames, numbered from `first` on, and the segments they hold, none of which reaches into another lane."""

    first: int
    frames: Frames
    segments: Sequence[Segment]

    @property
    def file(self) -> Optional[FileEntry]:
        """The file, if the lane is just one."""
        return self.segments[0].entry if len(self.segments) == 1 else None

    @property
    def files(self) -> List[FileEntry]:
        return [segment.entry for segment in self.segments if segment.entry]


def make_lanes(frames: Frames, segments: Sequence[Segment]) -> List[Lane]:
    """The lanes of an archive; without segments (manifest unreadable), one lane of all frames.

    >>> frames = Frames([(9, 10, None), (9, 5, None), (9, 5, None), (9, 1, None)])
    >>> segments = [Segment(0, 6, "a"), Segment(6, 4, "b"), Segment(10, 10, "c"), Segment(20, 1, "d")]
    >>> [(lane.first, len(lane.frames), [s.what for s in lane.segments]) for lane in make_lanes(frames, segments)]
    [(1, 1, ['a', 'b']), (2, 2, ['c']), (4, 1, ['d'])]
    """
    lanes = []
    cuts = cut_lanes(frames.edges, segments)
    for first, last in zip(cuts, cuts[1:]):
        inside = segments[index_at(segments, frames.edges[first]) : index_at(segments, frames.edges[last])]
        lanes.append(Lane(first + 1, frames[first:last], inside))
    return lanes


# ---- streams of other programs -------------------------------------------------------

BOMB_RATIO, BOMB_ALLOWANCE = 100, 1 << 30  # content may be so many times what came, beyond what harms nobody
LARGEST_HEADER = 1 << 20  # bytes of a name or PAX header


class _Pieces(io.RawIOBase):
    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._left = iter(pieces), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def stream_of(pieces: Iterable[bytes]) -> io.BufferedReader:
    """Pieces of bytes as one stream, which reads fewer bytes than asked for only at its end.

    >>> stream_of([b"ab", b"", b"cde"]).read(4)
    b'abcd'
    """
    return io.BufferedReader(_Pieces(pieces), CHUNK)


def take(stream: IO[bytes], size: int) -> bytes:
    """The next `size` bytes. Raises EOFError when the stream ends before."""
    found = stream.read(size)
    if len(found) < size:
        raise EOFError("it ends too early")
    return found


class ZstdContent:
    """The content of zstd frames that any program made (RFC 8878), one after the other, in pieces.

    The frames are taken apart into their blocks of at most 128 KiB here: so no library is trusted with a cut, and none
    can be made to give more than a few MiB at a time. `unchecked` counts frames without checksum.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._zstd = stream, load_zstd()
        self._came = self._grown = self.unchecked = 0

    def __iter__(self) -> Iterator[bytes]:
        """Raises EOFError for what is cut, ValueError for what is damaged or grows without end."""
        magic = self._stream.read(4)
        while magic:
            if len(magic) < 4:
                raise EOFError("it ends too early")
            if magic[0] >> 4 == 5 and magic[1:] == b"\x2a\x4d\x18":  # a skippable frame
                for _ in copy_range(self._stream, int.from_bytes(self._take(4), "little")):
                    pass
            elif magic == ZSTD_MAGIC:
                yield from self._frame()
            else:
                raise ValueError(f"no zstd frame begins with {magic.hex()}")
            magic = self._stream.read(4)

    def _take(self, size: int) -> bytes:
        self._came += size
        return take(self._stream, size)

    def _frame(self) -> Iterator[bytes]:
        decode, descriptor = self._zstd.piecewise(), self._take(1)
        single, checksum = descriptor[0] >> 5 & 1, descriptor[0] >> 2 & 1
        self.unchecked += 1 - checksum
        size = 1 - single + (0, 1, 2, 4)[descriptor[0] & 3] + (single, 2, 4, 8)[descriptor[0] >> 6]
        pieces, last = [ZSTD_MAGIC, descriptor, self._take(size)], 0
        while not last:
            head = self._take(3)
            last, kind, size = head[0] & 1, head[0] >> 1 & 3, int.from_bytes(head, "little") >> 3
            pieces += [head, self._take(1 if kind == 1 else size), self._take(4 * checksum * last)]
            if last or len(pieces) > 96:  # 32 blocks
                try:
                    content, pieces = decode(b"".join(pieces)), []
                except self._zstd.errors as exc:
                    raise ValueError(f"a zstd frame is damaged: {exc}") from exc
                self._grown += len(content)
                if self._grown > BOMB_ALLOWANCE + BOMB_RATIO * self._came:
                    raise ValueError(f"it grows more than {BOMB_RATIO} times: a bomb")
                yield content


def copy_range(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes of a stream in pieces. Raises EOFError."""
    while size:
        piece = take(stream, min(size, CHUNK))
        size -= len(piece)
        yield piece


# What tells the tar members apart that are refused (POSIX ustar, GNU tar)
_TAR_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}


def tar_members(stream: IO[bytes]) -> Iterator[Tuple[str, int, bool]]:
    """(path, size, whether it is a folder) of the members of a tar stream: ustar, PAX or GNU. Whoever asks reads the
    content of one before the next. Raises ValueError for what is neither a regular file nor a folder, or damaged."""
    import tarfile  # not with the others: most commands need none

    more: Dict[str, str] = {}
    block = take(stream, _BLOCK)
    while any(block):
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, UnicodeDecodeError) as exc:
            raise ValueError(f"a tar header is damaged, or its name not UTF-8: {exc}") from exc
        if member.type in (b"x", b"g", b"L", b"K"):
            if not 0 <= member.size <= LARGEST_HEADER:
                raise ValueError(f"a tar header has {member.size} bytes")
            text = take(stream, member.size)
            more.update(_pax_records(text) if member.type in b"xg" else {})
            more.update({"path": _utf8(text.rstrip(b"\0"))} if member.type == b"L" else {})
        else:
            path, size = more.get("path", member.name), int(more.get("size", member.size))
            kind = b"S" if any(key.startswith("GNU.sparse") for key in more) else member.type
            if kind not in (b"0", b"\0", b"5") or size < 0:
                raise ValueError(f"{path!r} is {_TAR_KINDS.get(kind, 'of an unknown kind')}")
            yield path, size, kind == b"5" or path.endswith("/")
            member.size, more = size, {}
        take(stream, -member.size % _BLOCK)
        block = take(stream, _BLOCK)


def _utf8(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ValueError(f"the name {name!r} is not UTF-8") from exc


def _pax_records(text: bytes) -> Dict[str, str]:
    """What a PAX header says: lines of their own length, a blank, KEY=VALUE."""
    records = {}
    while text:
        prefix = re.match(rb"([0-9]{1,7}) ", text)
        size = int(prefix[1]) if prefix else 0
        key, equals, value = text[prefix.end() if prefix else 0 : size].partition(b"=")
        if not equals or value[-1:] != b"\n" or size > len(text):
            raise ValueError("a PAX header is damaged")
        records[_utf8(key)] = _utf8(value[:-1]) if key in (b"path", b"size") else ""
        text = text[size:]
    return records


class Sink:
    """Where the files of a tar stream go. This one keeps nothing: it serves those who only check."""

    def begin(self, entry: FileEntry) -> None:
        """The content of a file starts."""

    def write(self, entry: FileEntry, offset: int, content: Union[bytes, bytearray, memoryview]) -> None:
        """Content of a file that has begun, at an offset in it. Any worker may do so."""

    def read(self, entry: FileEntry, offset: int, size: int) -> bytes:
        """Content of a file that an earlier run wrote."""
        raise NotImplementedError

    def checkpoint(self, entry: FileEntry, size: int) -> None:
        """All writes to the first `size` bytes of a file are done: a killed run may go on from there."""

    def finish(self, entry: FileEntry) -> None:
        """The file is complete, and proven."""

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        """Bytes of the file are lost, or it is not what the manifest says."""

    def release(self, entry: FileEntry) -> None:
        """This process has no more to do with the file."""


class ToldSink(Sink):
    """Passes on to a sink what a worker does; how files end is `told` to the parent, which acts on it."""

    def __init__(self, sink: Sink) -> None:
        self.begin, self.write, self.release = sink.begin, sink.write, sink.release  # type: ignore[method-assign]
        self.told: List[Tuple[Any, ...]] = []

    def finish(self, entry: FileEntry) -> None:
        self.release(entry)
        self.told.append(("finish", entry))

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        self.release(entry)
        self.told.append(("abandon", entry, lost))


class StreamCheck:
    """Follows consecutive segments of the tar stream and proves them: files by SHA-256, all else byte by byte.

    `report` is told the segments that are wrong. Without `write` somebody else has begun and writes the files.
    """

    def __init__(
        self, segments: Iterable[Segment], sink: Sink, report: Callable[[Segment, str], None], write: bool = True
    ) -> None:
        self._left = deque(segments)
        self._sink, self._report, self._write = sink, report, write
        self._at = 0
        self._good = True
        self._digest = hashlib.sha256()

    def feed(self, content: Optional[Buffer], length: int) -> None:
        """The next `length` bytes of the stream; None when they are lost (and reported by whoever lost them). Planes
        come joined, one block at a time."""
        at = 0
        while self._left:
            segment = self._left[0]
            size = min(segment.size - self._at, length - at)
            if segment.size and not size:
                return
            if not self._at:
                self._begin(segment)
            if content is None:
                self._good = False
            else:
                self._take(segment, memoryview(content)[at : at + size])
            at, self._at = at + size, self._at + size
            if self._at == segment.size:
                self._end(segment, lost=content is None)

    def _begin(self, segment: Segment) -> None:
        self._good, self._digest = True, hashlib.sha256()
        if segment.entry and self._write:
            self._sink.begin(segment.entry)

    def _take(self, segment: Segment, view: memoryview) -> None:
        if segment.entry is None:
            if segment.known[self._at : self._at + len(view)] != view:
                self._good = False
                self._report(segment, "differs from what the manifest implies")
            return
        self._digest.update(view)
        if self._write:
            self._sink.write(segment.entry, segment.file_range(segment.start + self._at, segment.stop)[0], view)

    def _end(self, segment: Segment, lost: bool) -> None:
        self._left.popleft()
        self._at = 0
        if segment.entry is None:
            return
        found = self._digest.hexdigest()
        if lost or not self._good:
            self._sink.abandon(segment.entry, lost=True)
        elif found == segment.entry.sha256:
            self._sink.finish(segment.entry)
        else:
            self._report(segment, f"has SHA-256 {found}, the manifest says {segment.entry.sha256}")
            self._sink.abandon(segment.entry, lost=False)


class Step(NamedTuple):
    """What a worker has to do with frame `at` of a lane: make its content, take it, or both. In between the content
    lies in a slot, `size` bytes of it, -1 if it is lost."""

    lane: int
    at: int
    make: bool
    take: bool
    slot: int = -1
    size: int = -1


class Schedule:
    """Who makes and who takes the frames of lanes; `lengths` tells how many each has. Decides from values only.

    One worker takes all frames of a lane, in their order: it hashes them. It makes them, too, unless another was
    faster: one with nothing to take makes the next frame, into a slot. Frames from the `limit`-th of all lanes on wait;
    with `serial`, so do all lanes but the first that is not done.
    """

    def __init__(self, lengths: Sequence[int], slots: int, serial: bool = False) -> None:
        self._lengths, self._free, self._serial = lengths, list(range(slots)), serial
        self._first = [0, *accumulate(lengths)]
        self._made, self._taken, self._left = [0] * len(lengths), [0] * len(lengths), list(lengths)
        self._ready: Dict[Tuple[int, int], Tuple[int, int]] = {}
        self._owned: Dict[int, int] = {}  # worker -> lane
        self._open: List[int] = []  # lanes with frames to make
        self._waiting: Set[int] = set()  # workers that have no lane, and nothing to make
        self._next = 0
        self.limit = sum(lengths)

    @property
    def all_taken(self) -> bool:
        """Whether only the limit keeps workers waiting."""
        return sum(self._taken) == self.limit

    def next(self, worker: int, idle: bool) -> Optional[Step]:
        """The next step of a worker; None while there is none. One with a lane makes frames for others only if it is
        `idle` and they are not what another waits for."""
        lane = self._owned.get(worker, -1)
        self._waiting.discard(worker)
        if lane < 0 and self._may_open():
            lane = self._owned[worker] = self._next
            self._open.append(lane)
            self._next += 1
        if lane >= 0:
            at = self._taken[lane]
            found = self._ready.pop((lane, at), None)
            if found or self._may_make(lane, at):
                self._taken[lane] += 1
                if self._taken[lane] == self._lengths[lane]:
                    del self._owned[worker]
                return Step(lane, at, False, True, *found) if found else self._make(lane, at, True)
        helps = self._free and (lane < 0 or (idle and not self._waiting))
        lanes = [x for x in self._open if self._may_make(x, self._made[x])] if helps else []
        if not lanes:
            self._waiting |= {worker} if lane < 0 and idle else set()
            return None
        lane = min(lanes, key=lambda x: self._made[x] - self._taken[x])  # that whose owner will wait first
        return self._make(lane, self._made[lane], False, self._free.pop())

    def done(self, step: Step, size: Optional[int]) -> None:
        """A step is done; it made `size` bytes of content, None if they are lost."""
        if step.take:
            self._left[step.lane] -= 1
        elif size is not None:
            self._ready[step.lane, step.at] = step.slot, size
            return
        else:
            self._ready[step.lane, step.at] = -1, -1
        if step.slot >= 0:
            self._free.append(step.slot)

    def _make(self, lane: int, at: int, take: bool, slot: int = -1) -> Step:
        self._made[lane] += 1
        if self._made[lane] == self._lengths[lane]:
            self._open.remove(lane)
        return Step(lane, at, True, take, slot)

    def _may_make(self, lane: int, at: int) -> bool:
        return at == self._made[lane] < self._lengths[lane] and self._first[lane] + at < self.limit

    def _may_open(self) -> bool:
        if self._next == len(self._lengths) or (self._serial and any(self._left[: self._next])):
            return False
        return self._first[self._next] < self.limit


class LaneWork:
    """What workers do of a schedule: frames they make, maybe into `slots` of memory that all share, and the lane each
    takes. With slots of no size, what another made is made again."""

    def __init__(self, slots: int, size: int) -> None:
        self.slots, self._size = slots, size
        self._memory = memoryview(mmap.mmap(-1, max(slots * size, 1)))
        self._checks: Dict[int, StreamCheck] = {}

    def do(
        self, step: Step, make: Callable[[], Optional[Buffer]], check: Callable[[], StreamCheck], length: int
    ) -> Optional[int]:
        """Carry out a step, on `length` bytes of the stream: the bytes of content, None if it is lost."""
        first = step.slot * self._size
        if step.make or not self._size:
            content = make()
        else:
            content = self._memory[first : first + step.size] if step.size >= 0 else None
        if step.take:
            self._checks = {step.lane: self._checks.get(step.lane) or check()}
            self._checks[step.lane].feed(content, length)
        elif self._size and content is not None:
            self._memory[first : first + len(content)] = content
        return None if content is None else len(content)


class Serial:
    """One thread that makes calls in their order, while the caller goes on; at most two wait."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)  # it starts with the first call
        self._pending: Deque[Future[Any]] = deque()

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.cancel()
        self._pool.shutdown()

    def call(self, work: Callable[..., Any], *args: Any) -> None:
        """Queue a call. Raises what an earlier one raised."""
        self._pending.append(self._pool.submit(work, *args))
        self.drain(2)

    def drain(self, left: int = 0) -> None:
        """Wait until at most `left` calls are queued."""
        while len(self._pending) > left:
            self._pending.popleft().result()


def shorten(items: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """A list for people that does not fill the screen.

    >>> shorten(["a", "b", "c"]), shorten(["a", "b", "c"], 2)
    ('a, b, c', 'a, b, and 1 more')
    """
    more = [f"and {len(items) - limit} more"] * (len(items) > limit)
    return separator.join([*items[:limit], *more])


def workers_for(jobs: int, size: int, frame: int = 0, held: int = 5) -> int:
    """How many workers to fork for `size` bytes; 0 for none. Each holds up to `held` frames of `frame` bytes."""
    return min(jobs, max(WORKERS_SIZE // (WORKER_SIZE + held * frame), 1)) if size >= FORK_SIZE else 0


# ---- archives on disk ----------------------------------------------------------------

MEDIA_POLL_S = 0.5
NOT_OURS = "is not part of this archive"
STDIN = "-"  # an archive that comes through a pipe
_PART = re.compile(r"(?P<archive>.+\.tar\.zst)\.(?P<number>[0-9]{4,})$")
_SUM_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>[^/\n]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Damage:
    """Something wrong: `what`, where in the archive it lies (`offset`, `size`, the first and last of the `frames`,
    numbered from 1), on which `parts`, and which bytes of which `files` it hits (path, first, last)."""

    what: str
    offset: Optional[int] = None
    size: int = 0
    frames: Tuple[int, ...] = ()
    parts: Tuple[str, ...] = ()
    files: Tuple[Tuple[str, int, int], ...] = ()

    def text(self) -> str:
        """One line for a person.

        >>> print(Damage("CRC-32 differs", 12, 30, (1, 1), ("m.tar.zst.0002",), (("m/a", 0, 9), ("m/b", 0, 3))).text())
        m.tar.zst.0002, frame 1, bytes 12-41 of the archive: CRC-32 differs; hits m/a bytes 0-9, m/b bytes 0-3
        """
        where = [", ".join(self.parts)] * bool(self.parts)
        if self.frames:
            first, last = self.frames
            where.append(f"frame {first}" if first == last else f"frames {first}-{last}")
        if self.offset is not None and self.size:
            where.append(f"bytes {self.offset}-{self.offset + self.size - 1} of the archive")
        hits = [f"{path} bytes {first}-{last}" if last >= first else path for path, first, last in self.files]
        text = (", ".join(where) + ": " if where else "") + self.what
        return text + ("; hits " + shorten(hits) if hits else "")

    def joined(self, other: Damage) -> Optional[Damage]:
        """This and the next damage as one, if they adjoin and are alike: a bad part is one place, not 1,000 frames."""
        if not (self.frames and other.frames and self.frames[1] + 1 == other.frames[0] and self.what == other.what):
            return None
        files = list(self.files)
        for path, first, last in other.files:
            if files and files[-1][0] == path and files[-1][2] + 1 == first:
                path, first, _ = files.pop()
            files.append((path, first, last))
        parts = self.parts + tuple(name for name in other.parts if name not in self.parts)
        size = self.size + other.size
        return Damage(self.what, self.offset, size, (self.frames[0], other.frames[1]), parts, tuple(files))


class MediaChange:
    """Asks for the medium with a part that is missing, and waits until it is there, in a folder where others were."""

    def __init__(self, files: ArchiveFiles, reporter: Reporter) -> None:
        self._files, self._reporter = files, reporter
        self._folders = sorted({path.parent for path in files.paths})
        self._asked: Set[str] = set()

    def look_for(self, path: Path) -> Optional[Path]:
        """Where a part is now."""
        return next((folder / path.name for folder in self._folders if (folder / path.name).is_file()), None)

    def find(self, path: Path) -> Path:
        """The path at which a part is found."""
        while True:
            found = self.look_for(path)
            if found:
                self._asked.discard(path.name)
                return found
            if path.name not in self._asked:
                self._asked.add(path.name)
                self._reporter.warn(f"waiting for the medium with {path.name} in {shorten([*map(str, self._folders)])}")
            time.sleep(MEDIA_POLL_S)

    def with_tables(self) -> ArchiveFiles:
        """The archive with its last part, which has the tables and is told by the sums."""
        last = max(self._files.listed(), default="")
        match = _PART.match(last)
        if match is None or read_index(self._files):
            return self._files
        path = self.find(self._files.folder / last)
        return replace(self._files, numbers={**self._files.numbers, int(match["number"]): path})


class Part(NamedTuple):
    """One file of an archive: its bytes are [start, start + size) of the archive, if it is whole."""

    start: int
    size: int
    path: Path

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class ArchiveFiles:
    """What is on disk of one archive: `name` is NAME.tar.zst, `numbers` the parts found, maybe in several folders
    (empty: one file). Missing ones are expected in `folder`."""

    folder: Path
    name: str
    numbers: Mapping[int, Path]

    @property
    def path(self) -> Path:
        """How an operator names it."""
        return min(self.numbers.items())[1] if self.numbers else self.folder / self.name

    @property
    def paths(self) -> List[Path]:
        """All its files, in order."""
        return [path for _, path in sorted(self.numbers.items())] if self.numbers else [self.folder / self.name]

    def part(self, number: int) -> Path:
        """The file of a part, also if it is missing; of a whole archive that is its one file."""
        width = len(self.path.name) - len(self.name) - 1
        return self.numbers.get(number, self.folder / f"{self.name}.{number:0{width}d}") if self.numbers else self.path

    @property
    def sums(self) -> Path:
        return self.folder / f"{self.name}.sha256"

    def listed(self) -> Mapping[str, str]:
        """File name -> SHA-256 from NAME.tar.zst.sha256; empty when there is none."""
        try:
            text = self.sums.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return {}
        return {match["name"]: match["sha256"] for match in _SUM_LINE.finditer(text)}


def archives_in(folder: Path) -> List[ArchiveFiles]:
    """The archives in a folder, by name; where both are there, the whole file before the parts."""
    found: Dict[Tuple[str, bool], Dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _PART.match(path.name)
        if match:
            found.setdefault((match["archive"], True), {})[int(match["number"])] = path
        elif path.name.endswith(".tar.zst"):
            found[path.name, False] = {}
    return [ArchiveFiles(folder, name, numbers) for (name, _), numbers in sorted(found.items())]


def merged(found: Iterable[ArchiveFiles]) -> List[ArchiveFiles]:
    """Archives of which parts were found in several places, each as one."""
    known: Dict[Tuple[str, bool], ArchiveFiles] = {}
    for files in found:
        key = (files.name, True) if files.numbers else (str(files.path.absolute()), False)
        old = known.get(key, files)
        known[key] = replace(old, numbers={**files.numbers, **old.numbers})
    return list(known.values())


def find_archives(argument: str, folders: Sequence[Path]) -> List[ArchiveFiles]:
    """The archives that an argument means: a file, any part, a folder that holds archives, a NAME looked up in
    `folders`, or - for standard input. Empty when there are none."""
    path = Path(argument)
    if argument == STDIN:
        return [ArchiveFiles(Path(), STDIN, {})]
    if argument and path.is_dir():  # an unset variable of a script does not mean the current folder
        return archives_in(path)
    match = _PART.match(path.name)
    name = match["archive"] if match else re.sub(r"\.(sha256|sig)$", "", path.name)
    for folder in [path.parent] if "/" in argument or path.exists() else folders:
        named = [files for files in archives_in(folder) if files.name in (name, f"{name}.tar.zst")]
        found = [files for files in named if files.numbers or not match]
        if found:
            return found[:1]
    return [ArchiveFiles(path.parent, path.name, {})] if path.is_file() else []


@dataclass(frozen=True)
class Archive:
    """An archive opened for reading. `manifest` is None and `segments` empty when the manifest cannot be read or the
    stream is not what it implies; `damages` is what opening it brought up; `frames` all that could be found."""

    files: ArchiveFiles
    parts: Tuple[Part, ...]
    frames: Frames
    damages: Tuple[Damage, ...]
    manifest: Optional[Manifest] = None
    text: bytes = b""
    segments: Tuple[Segment, ...] = ()
    absent: FrozenSet[str] = frozenset()
    media: Optional[MediaChange] = None  # who is asked for parts that are missing

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def stream_size(self) -> int:
        return self.frames.edges[-1]

    def damage(self, what: str, number: int) -> Damage:
        """Damage of a frame, with the part it lies on and the files it holds."""
        frame = self.frames[number - 1]
        files = self.files_between(frame.start, frame.stop)
        return Damage(what, frame.offset, frame.size, (number, number), (self.part_of(frame).path.name,), files)

    def part_of(self, frame: Frame) -> Part:
        """The part that a frame lies on."""
        return self.parts[max(index_at(self.parts, frame.offset + 1) - 1, 0)]

    def files_between(self, start: int, stop: int) -> Tuple[Tuple[str, int, int], ...]:
        """(path, first byte, last byte) of what lies in a range of the tar stream."""
        hits = [(s.entry, s.file_range(start, stop)) for s in segments_between(self.segments, start, stop) if s.entry]
        return tuple((entry.path, first, last - 1) for entry, (first, last) in hits)

    def restored(self, frame: Frame, decompress: Decompress) -> Union[bytes, bytearray]:
        """The content of a frame, planes joined. Raises ZstdError."""
        content = self.decode(frame, decompress)
        at = index_at(self.segments, frame.start + 1) - 1
        if at < 0 or not self.segments[at].planes:
            return content
        segment = self.segments[at]
        rest = (frame.start - segment.start) % (segment.planes + 1)
        if rest or frame.stop != min(frame.start + segment.planes + 1, segment.stop):
            raise ZstdError("is not one block of planes")
        return join_planes(content)

    def unit(self, frame: Frame) -> bytes:
        """A unit as it lies on the medium, intact. Raises ZstdError that says what is wrong with it."""
        try:
            unit = read_parts(self.parts, frame.offset, frame.size, self.media)
        except OSError as exc:
            raise ZstdError(f"cannot be read: {exc.strerror}") from exc
        if len(unit) != frame.size:
            raise ZstdError("is missing")
        if frame.crc is not None and zlib.crc32(unit) != frame.crc:
            raise ZstdError("CRC-32 differs")
        if unit[: _PZSTD.size] != _PZSTD.pack(PZSTD_MAGIC, 4, frame.size - _PZSTD.size):
            raise ZstdError("does not begin with its header")
        return unit

    def decode(self, frame: Frame, decompress: Decompress) -> bytes:
        """The stream bytes in a frame. Raises ZstdError."""
        return decompress(memoryview(self.unit(frame))[_PZSTD.size :], frame.length)


def read_parts(parts: Sequence[Part], offset: int, size: int, media: Optional[MediaChange] = None) -> bytes:
    """Bytes of an archive that lie in one part; fewer when the part ends early or is missing."""
    part = parts[max(index_at(parts, offset + 1) - 1, 0)]
    path = media.find(part.path) if media and not part.path.exists() else part.path
    try:
        with opened(path) as fd:
            return pread_exactly(fd, size, offset - part.start)
    except FileNotFoundError:
        return b""


class ForeignArchive(IntegrityError):
    """Nothing tells that hfship made it: maybe an archive of another program, which is what `stream` brings."""

    def __init__(self, files: ArchiveFiles, stream: IO[bytes]) -> None:
        what = f"{files.path} was not made by hfship, or both its beginning and its end are damaged"
        why = "it has neither the tables of hfship at its end nor a manifest in its first frame"
        super().__init__(what, why, f"copy it again; if another program made it: hfship unpack {files.path}")
        self.files, self.stream = files, stream


@dataclass(frozen=True)
class Streamed(Archive):
    """An archive that comes as a stream: `units` (see read_units) brings its frames, which become known as they come;
    `held` are those that wait to be decoded, by their offset."""

    units: Iterator[Tuple[bytes, int]] = iter(())
    held: Dict[int, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.frames.size

    def frames_to_come(self, tail: List[bytes]) -> Iterator[Tuple[int, Frame]]:
        """All frames, numbered; then the tables are in `tail`, unless the stream ends early."""
        with contextlib.suppress(ValueError):
            for unit, length in self.units:
                if length < 0:
                    tail.append(unit)
                    return
                self.held[self.frames.size] = unit
                self.frames.append(len(unit), length, zlib.crc32(unit))
                yield len(self.frames), self.frames[-1]

    def unit(self, frame: Frame) -> bytes:
        return self.held.pop(frame.offset)

    def ends(self, tail: Sequence[bytes]) -> List[Damage]:
        """What is wrong with the tables, or is wrong by them. Raises IncompleteError when they did not come."""
        at, tables = self.size, b"".join(tail)
        label, units, parts = _CHECK.unpack_from(tables.ljust(_SKIPPABLE.size + _CHECK.size), _SKIPPABLE.size)
        size = tail_size(units, parts) if label == CHECK_LABEL else tail_size(len(self.frames), 1)
        if len(tables) < size:
            raise IncompleteError(
                f"the archive on standard input ended too early: no frame is whole from byte {at} on",
                "what sends it was stopped, or lost its connection",
                "send it again: files that are complete are kept",
            )
        try:
            told = decode_tail(tables[:size]).frames
        except (ValueError, struct.error):
            return [Damage("neither a frame nor intact tables", at, len(tables))]
        if tables[size:] and not _SUM_LINE.match(tables[size:].decode("ascii", "replace")):  # NAME.tar.zst.* has sums
            return [Damage("something else follows the archive", at + size, len(tables) - size)]
        pairs = enumerate(zip(self.frames, chain(told, repeat(None))), 1)
        wrong = [self.damage("CRC-32 differs", number) for number, (came, known) in pairs if came != known]
        return wrong or [Damage("frames are missing", at)] * (len(told) != len(self.frames))


def open_stream(files: ArchiveFiles, stream: IO[bytes]) -> Streamed:
    """The archive that comes as a stream. Raises ForeignArchive when it does not begin like one."""
    first, ours, again = tee(iter(lambda: stream.read(CHUNK), b""), 3)
    head, units = stream_of(first).read(8), read_units(stream_of(ours))
    taken: List[Tuple[bytes, int]] = []
    decompress, content = load_zstd().decompressor(), bytearray()

    def pull(size: int) -> bytes:
        while len(content) < size and len(content) <= LARGEST_FRAME and (not taken or taken[-1][1] >= 0):
            taken.append(next(units, (b"", -1)))
            unit, length = taken[-1]
            content.extend(decompress(memoryview(unit)[_PZSTD.size :], length) if length >= 0 else b"")
        return bytes(content)

    if not head:
        raise IncompleteError("nothing came through the pipe", "", "look at what the sending command said")
    try:
        if head != _PZSTD.pack(PZSTD_MAGIC, 4, 0)[:8]:
            raise ValueError("no unit of ours begins here")
        manifest, text, planes, delta = read_leading(pull, "the manifest in the stream")
        segments = stream_layout(manifest, text, planes, delta)
    except (ValueError, ZstdError) as exc:
        raise ForeignArchive(files, stream_of(again)) from exc
    absent = parse_delta(delta, manifest) if delta else frozenset()
    parts = (Part(0, sys.maxsize, files.path),)
    return Streamed(files, parts, Frames(), (), manifest, text, segments, absent, units=chain(taken, units))


def file_pieces(paths: Iterable[Path]) -> Iterator[bytes]:
    """The bytes of files, one after the other, in pieces."""
    for path in paths:
        try:
            with path.open("rb", buffering=0) as stream:
                yield from iter(lambda: stream.read(CHUNK), b"")  # noqa: B023 - it is used up before the next
        except OSError as exc:
            raise disk_error(exc, "read", path, "check the medium, then copy the archive again") from exc


def open_archive(files: ArchiveFiles, media: Optional[MediaChange] = None) -> Archive:
    """Find all frames and the manifest of an archive, by its tables or, if these are damaged, by walking it.

    Raises ForeignArchive when nothing tells that hfship made it, and IntegrityError when parts are missing that only
    the tables could have told about. All else that is wrong is in `damages`.
    """
    if files.name == STDIN:
        return open_stream(files, open(0, "rb", buffering=0, closefd=False))
    index = read_index(files)
    archive = indexed_archive(files, index) if index else _walked_archive(files)
    archive = replace(archive, media=media, damages=()) if index and media else archive
    archive = _with_manifest(archive)
    if not index and not archive.manifest:
        raise ForeignArchive(files, stream_of(file_pieces(files.paths)))
    return archive


def read_index(files: ArchiveFiles) -> Optional[Index]:
    """The tables at the end of an archive; None if they are not there or damaged. Where parts of another pack are in
    between, the last one has not ours: then those that fit the most parts."""
    sizes = {number: path.stat().st_size for number, path in files.numbers.items() if path.exists()}
    best, most = None, -1
    for path in reversed(files.paths):
        index = _tables_of(path)
        fitting = sum(sizes.get(n) == size for n, size in enumerate(index.part_sizes, 1)) if index else -1
        if fitting > most:
            best, most = index, fitting
        if not files.numbers or most == len(sizes):
            break
    return best


def _tables_of(path: Path) -> Optional[Index]:
    try:
        with opened(path) as fd:
            size = os.fstat(fd).st_size
            tail, _ = tail_extent(pread_exactly(fd, 17, max(size - 17, 0)))
            return decode_tail(pread_exactly(fd, tail, size - tail)) if tail <= size else None
    except (ValueError, struct.error):
        return None
    except OSError as exc:
        raise disk_error(exc, "read", path, "check the medium, then copy the archive again") from exc


def indexed_archive(files: ArchiveFiles, index: Index) -> Archive:
    """An archive whose tables are known."""
    sizes = index.part_sizes if files.numbers else (sum(index.part_sizes),)
    parts: List[Part] = []
    damages = []
    for number, size in enumerate(sizes, 1):
        path = files.part(number)
        parts.append(Part(parts[-1].stop if parts else 0, size, path))
        actual = path.stat().st_size if path.exists() else None
        if actual != size:
            what = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            damages.append(Damage(what, parts[-1].start, size, (), (path.name,)))
    extra = [path.name for number, path in sorted(files.numbers.items()) if number > len(sizes)]
    damages += [Damage(NOT_OURS, parts=(name,)) for name in extra]
    return Archive(files, tuple(parts), index.frames, tuple(damages))


def _walked_archive(files: ArchiveFiles) -> Archive:
    """An archive without its tables: every unit tells where the next one begins."""
    _require_all_parts(files)
    parts: List[Part] = []
    for path in files.paths:
        parts.append(Part(parts[-1].stop if parts else 0, path.stat().st_size, path))
    frames = Frames()
    with contextlib.suppress(ValueError, OSError):
        while frames.size < parts[-1].stop:
            size, length = unit_at(read_parts(parts, frames.size, 30))
            if frames.size + size > parts[-1].stop:
                break
            frames.append(size, length)
    names = tuple(part.path.name for part in parts if part.stop > frames.size) or (parts[-1].path.name,)
    damage = Damage("neither a frame nor intact tables", frames.size, parts[-1].stop - frames.size, (), names)
    return Archive(files, tuple(parts), frames, (damage,))


def _require_all_parts(files: ArchiveFiles) -> None:
    listed = set(files.listed()) - {path.name for path in files.paths}
    gaps = [n for n in range(1, max(files.numbers, default=0)) if n not in files.numbers]
    missing = sorted(listed) or [files.part(n).name for n in gaps]
    if missing:
        raise IntegrityError(
            f"{files.name} is not complete: {counted(len(missing), 'missing part')}",
            f"missing in {files.folder}: {shorten(missing, 20)}",
            "copy them again, then run the same command",
        )


def _with_manifest(archive: Archive) -> Archive:
    """The archive with its manifest, and the layout of the stream if it is what the manifest implies."""
    try:
        manifest, text, planes, delta = read_leading(_reader(archive), f"the manifest in {archive.files.name}")
        segments = stream_layout(manifest, text, planes, delta)
    except ZstdError:
        return archive  # the frame is reported when all frames are checked
    except ValueError as exc:
        return replace(archive, damages=(*archive.damages, Damage(f"does not begin with a manifest: {exc}")))
    except IntegrityError as exc:
        return replace(archive, damages=(*archive.damages, Damage(f"{exc.what}: {exc.why}")))
    absent = parse_delta(delta, manifest) if delta else frozenset()
    known = replace(archive, manifest=manifest, text=text, segments=segments, absent=absent)
    surplus = archive.stream_size - known.segments[-1].stop
    if surplus < 0 and archive.frames[0].crc is None:  # no tables, so it is the end that is lost
        lost = known.files_between(archive.stream_size, known.segments[-1].stop)
        what = f"the archive is cut: frames from number {len(archive.frames) + 1} on are missing"
        return replace(known, damages=(replace(archive.damages[-1], what=what, files=lost),))
    if surplus:
        what = f"the tar stream has {abs(surplus)} bytes {'more' if surplus > 0 else 'less'} than its manifest implies"
        return replace(known, segments=(), damages=(*archive.damages, Damage(what)))
    return known


def _reader(archive: Archive) -> Callable[[int], bytes]:
    """The beginning of the tar stream, decoded as far as asked for."""
    decompress, frames, stream = load_zstd().decompressor(), iter(archive.frames), bytearray()

    def pull(size: int) -> bytes:
        while len(stream) < size and len(stream) <= LARGEST_FRAME:
            frame = next(frames, None)
            if frame is None:
                break
            stream.extend(archive.decode(frame, decompress))
        return bytes(stream)

    return pull


# ======================================================================================
# §9 Pack
#
# Owns the way from a model folder to NAME.tar.zst, whole or in parts, with what travels beside it:
# NAME.tar.zst.sha256 (GNU format), hfship.pyz and READ-ME-FIRST.txt.
#
# The plan (layout of the stream and its cut into frames) is made before the first byte is read, so any frame can be
# produced by itself. Workers read and compress frames; one hashes a file against the manifest, close behind: out of the
# page cache, so each byte is read from disk once. Two others write and hash a part, as soon as its next frames lie in
# memory that all share.
#
# While parts are written, NAME.tar.zst.incomplete has a line of JSON for each that is complete, after one that names
# the plan: a killed run of the same plan goes on behind the last part that is still as it was written.
#
# Promises: what is packed is what the manifest says, or nothing is; bytes do not depend on the number of workers; a
# final name holds a complete archive. Never: overwrites an archive of something else without --force.
# ======================================================================================

READ_ME_FIRST = """\
These files carry Hugging Face models. NAME.tar.zst is a model; NAME.tar.zst.0001, .0002, ... are one cut in parts.

With hfship.pyz, which lies beside them and needs Python 3.8 or later, nothing to install and no network:

    python3 hfship.pyz verify NAME.tar.zst            proves every byte, names what to copy again
    python3 hfship.pyz unpack NAME.tar.zst -o DIR     restores and verifies DIR/NAME
    (any part may be named instead: NAME.tar.zst.0001)

Without it:

    sha256sum -c NAME.tar.zst.sha256                  checks what was copied (--ignore-missing: one medium of several)
    tar --zstd -xf NAME.tar.zst                       a whole file
    cat NAME.tar.zst.0* | tar --zstd -x               parts
    python3 NAME/.hfship/restore.py                   if that left *.planes files: makes the model's files of them
    NAME/.hfship/manifest.json                        then lists the SHA-256 of every file
    NAME/.hfship/delta.json                           if there, lists files to take from an older version on site
"""

UNITS_AT_ONCE = 4  # that a worker is told to write or to hash
HASH_BEHIND = 1024  # frames that are packed but not proven yet: still in the page cache, so read from disk once
SIDECARS_SIZE = 8 << 20  # room kept on each medium for hfship.pyz, the sums and READ-ME-FIRST.txt
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PackOptions:
    """How to pack: bytes per part (None: one file), zstd level, workers, whether to replace another archive, profile,
    the manifest of what the far side has (for a delta), and whether to read back from the medium what was written."""

    split: Optional[int] = None
    level: int = 1
    jobs: int = 1
    force: bool = False
    frame_size: int = 0  # by the size of the model
    profile: str = "standard"
    since: Optional[Manifest] = None
    read_back: bool = False


@dataclass(frozen=True)
class PackPlan:
    """All that decides the bytes of an archive: the layout of its stream, and where that is cut into frames."""

    folder: Path
    manifest: Manifest
    text: bytes
    segments: Tuple[Segment, ...]
    edges: Sequence[int]
    options: PackOptions

    @property
    def archive(self) -> str:
        return f"{self.manifest.name}{'.delta' if self.options.since else ''}.tar.zst"

    @property
    def key(self) -> str:
        """Equal for plans that give equal bytes."""
        form = (self.options.split, self.options.level, self.options.frame_size, self.options.profile)
        known = b"".join(segment.known for segment in self.segments)
        return hashlib.sha256(known + repr((form, load_zstd().name)).encode()).hexdigest()

    @property
    def units_at_most(self) -> int:
        """Bytes of all units if nothing compresses."""
        return sum(largest_unit(stop - start) for start, stop in zip(self.edges, self.edges[1:]))

    @property
    def count(self) -> int:
        """How many frames there are."""
        return len(self.edges) - 1

    @property
    def size_at_most(self) -> int:
        """Bytes of the archive if nothing compresses."""
        return self.units_at_most + tail_size(self.count, self.parts_at_most)

    @property
    def parts_at_most(self) -> int:
        """A bound for the number of parts: each but the last is full up to a unit, and any two exceed one limit."""
        split = self.options.split
        if split is None:
            return 1
        return self.units_at_most // max(split - largest_unit(self.options.frame_size), split // 2, 1) + 2


@dataclass(frozen=True)
class WrittenPart:
    """A file of a finished archive."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Packed:
    """What pack leaves: the parts of the archive; `fresh` is False when they were there before."""

    manifest: Manifest
    parts: Tuple[WrittenPart, ...]
    seconds: float
    fresh: bool

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def parse_split(text: str) -> int:
    """Bytes per part, from the name of a medium or a size.

    >>> [parse_split(t) for t in ("fat32", "DVD", "650M")]
    [4294967295, 4700000000, 650000000]
    """
    try:
        return SPLITS.get(text.lower()) or parse_size(text)
    except UsageError as exc:
        why = f"parts are as large as a medium ({', '.join(SPLITS)}) or a size; the least is about 2.2M"
        raise UsageError(exc.what, why, exc.next_step) from exc


def frame_size_for(size: int) -> int:
    """Bytes of content per frame of a model of `size` bytes: so many that its tables are no burden to the memory.

    >>> [frame_size_for(size) >> 20 for size in (0, 10**11, 10**12, 2 * 10**12)]
    [2, 2, 4, 8]
    """
    return FRAME_SIZE << (size >> 39).bit_length()


def plan_pack(folder: Path, manifest: Manifest, options: PackOptions) -> PackPlan:
    """The plan of an archive. Raises UsageError when a part cannot hold a frame or the tables."""
    options = replace(options, frame_size=options.frame_size or frame_size_for(manifest.size))
    text, planes = manifest.to_json().encode("utf-8"), PLANES_BLOCK * (options.profile == "smallest")
    there = {entry.sha256 for entry in options.since.files} if options.since else set()
    absent = {entry.path for entry in manifest.files if entry.sha256 in there}
    segments = stream_layout(manifest, text, planes, delta_json(absent) if options.since else b"")
    edges = array("Q", cut_frames(segments, options.frame_size))
    plan = PackPlan(folder, manifest, text, segments, edges, options)
    taken = [e.path for e in manifest.files if e.path.endswith(PLANES)] if planes else []
    if taken:
        why = f"{shorten(taken)}: names that end in {PLANES} are taken by the profile"
        raise UsageError(f"{manifest.name} cannot be packed with --profile smallest", why, "use another profile")
    least = max(largest_unit(options.frame_size), tail_size(plan.count, plan.parts_at_most))
    if options.split is not None and options.split < least:
        why = f"a part must hold a frame and the tables of this archive: {least} bytes"
        raise UsageError(f"parts of {options.split} bytes are too small", why, f"give --split {least}, or more")
    return plan


def manifest_to_pack(folder: Path, name: Optional[str], jobs: int, reporter: Reporter, keep: bool = True) -> Manifest:
    """The manifest of a folder, made and (with `keep`) written if it has none, after a look at sizes and names."""
    found = content_files(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        require_finished(folder)
        manifest = _made_manifest(folder, found, name, jobs, reporter)
        try:
            if keep:
                write_manifest(folder, manifest)
        except DiskError as exc:
            reporter.warn(f"{exc.what}: the manifest travels in the archive only")
    sizes = dict(found)
    wrong = [
        f"{e.path} " + (f"has {sizes[e.path]} bytes instead of {e.size}" if e.path in sizes else "is missing")
        for e in manifest.files
        if sizes.get(e.path) != e.size
    ]
    if wrong:
        raise _mismatch(folder, manifest, wrong)
    extra = sorted(set(sizes) - {entry.path for entry in manifest.files})
    if extra:
        reporter.warn(f"{folder}: not in the manifest, so not packed: {shorten(extra)}")
    return replace(manifest, name=make_manifest(name, ()).name) if name else manifest


def _made_manifest(
    folder: Path, found: Sequence[Tuple[str, int]], name: Optional[str], jobs: int, reporter: Reporter
) -> Manifest:
    if not found:
        raise UsageError(f"{folder} holds no files", "", "name the folder of a model")
    make_manifest(name or folder.resolve().name, ())  # a name that cannot be: say so before hashing
    reporter.info(f"{folder} has no manifest: hashing its files to make one")

    def entry(count: Callable[[int], None], item: Tuple[str, int]) -> FileEntry:
        try:
            return FileEntry(item[0], item[1], sha256_file(folder / item[0], count))
        except OSError as exc:
            raise disk_error(exc, "read", folder / item[0]) from exc

    total = sum(size for _, size in found)
    with reporter.stage("hash", total) as stage, Workers(workers_for(jobs, total), entry, stage.add) as workers:
        files = workers.map(found)
    return make_manifest(name or folder.resolve().name, files)


def _mismatch(folder: Path, manifest: Manifest, wrong: Sequence[str]) -> IntegrityError:
    remedy = f"restore the file, or remove {folder / MANIFEST_PATH} if the change is meant"
    if manifest.source:
        remedy = fetch_command(manifest.source, manifest.source.commit, folder)
    what = f"{folder} is not what its manifest says"
    return IntegrityError(what, shorten(wrong, 20, "\n"), f"{remedy}, then pack again")


def read_stream(plan: PackPlan, start: int, stop: int) -> bytes:
    """Bytes of the tar stream, planes not yet split. Raises IntegrityError when a file became shorter or vanished."""
    pieces = []
    for s in segments_between(plan.segments, start, stop):
        first, last = s.file_range(start, stop)
        pieces.append(_read_range(plan, s.entry, first, last - first) if s.entry else s.known[first:last])
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_range(plan: PackPlan, entry: FileEntry, offset: int, size: int) -> bytes:
    path = plan.folder / entry.path
    try:
        with opened(path) as fd:
            content = pread_exactly(fd, size, offset)
    except FileNotFoundError as exc:
        raise _mismatch(plan.folder, plan.manifest, [f"{entry.path} vanished while it was packed"]) from exc
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    if len(content) != size:
        raise _mismatch(plan.folder, plan.manifest, [f"{entry.path} became shorter while it was packed"])
    return content


@dataclass
class _OpenPart:
    """A file of an archive that is being written: bytes given out, told to be written or hashed, and written; the units
    (number, bytes) that are still to be written, and those to be hashed."""

    path: Path
    fd: int
    workers: Tuple[int, int]
    given: int = 0
    told: List[int] = field(default_factory=lambda: [0, 0])
    written: int = 0
    units: Tuple[List[Tuple[int, int]], ...] = field(default_factory=lambda: ([], []))
    full: bool = False
    sealing: bool = False
    sha256: str = ""


class PartWriter:
    """Gives units their place in NAME.tar.zst.incomplete, or in parts of at most `split` bytes, the first folder with
    room for each; `journal` is told of those that are complete, which come before this run as `done`. One worker writes
    a part, as a file takes one write at a time, and one hashes it; the next part has other ones."""

    def __init__(
        self,
        folders: Sequence[Path],
        plan: PackPlan,
        workers: int,
        flusher: Serial,
        journal: Callable[[WrittenPart], None],
        done: Sequence[WrittenPart] = (),
    ) -> None:
        self._folders, self._plan, self._workers, self._flusher = folders, plan, max(workers, 1), flusher
        self._journal, self.parts = journal, list(done)
        self._open: List[_OpenPart] = []  # in their order; only the last is not full

    def place(self, number: int, size: int) -> None:
        """Give the next unit its place."""
        split = self._plan.options.split
        if not self._open or self._open[-1].full or (split is not None and self._open[-1].given + size > split):
            self._open_next()
        part = self._open[-1]
        part.given += size
        for units in part.units:
            units.append((number, size))

    def placed(self, path: Path, size: int) -> None:
        """Units are where `place` told."""
        part = next(part for part in self._open if part.path == path)
        part.written += size
        if (part.written - size) // FLUSH_SIZE != part.written // FLUSH_SIZE:
            self._flusher.call(self._flush, part)

    def next(self, worker: int) -> Optional[Tuple[Any, ...]]:
        """What a worker has to do for the parts it writes or hashes."""
        for part in self._open:
            for role, step in enumerate(("write", "sum")):
                units = tuple(part.units[role][:UNITS_AT_ONCE])
                if part.workers[role] == worker and units:
                    del part.units[role][:UNITS_AT_ONCE]
                    offset = part.told[role]
                    part.told[role] += sum(size for _, size in units)
                    return step, part.path, units, offset
            if part.workers[1] == worker and part.full and part.written == part.given and not part.sealing:
                part.sealing = True
                return "seal", part.path, part.told[1]
        return None

    def sealed(self, path: Path, sha256: str) -> None:
        """A part is complete, and durable."""
        next(part for part in self._open if part.path == path).sha256 = sha256
        while self._open and self._open[0].sha256:
            part = self._open.pop(0)
            self._flusher.drain()
            os.close(part.fd)
            final = part.path.with_name(part.path.name[: -len(INCOMPLETE)])
            self.parts.append(WrittenPart(final, part.given, part.sha256))
            self._journal(self.parts[-1])

    @staticmethod
    def _flush(part: _OpenPart) -> None:
        try:
            os.fsync(part.fd)
        except OSError as exc:
            raise disk_error(exc, "write", part.path) from exc

    def finish(self, frames: Sequence[Frame]) -> None:
        """Write the tables: all frames have their place."""
        split, count = self._plan.options.split, len(self.parts) + len(self._open)
        last = self._open[-1] if self._open else None
        if not last or last.full or (split is not None and last.given + tail_size(len(frames), count) > split):
            last = self._open_next()
        sizes = [part.size for part in self.parts] + [part.given for part in self._open]
        tail = encode_tail(frames, sizes)
        try:
            pwrite_all(last.fd, tail, last.given)
        except OSError as exc:
            raise disk_error(exc, "write", last.path) from exc
        last.full, last.given = True, last.given + len(tail)
        self.placed(last.path, len(tail))

    def discard(self, complete: bool) -> None:
        """Remove what was not published: the unfinished parts, or also the `complete` ones."""
        paths = [_unfinished(part.path) for part in self.parts] if complete else []
        for path in [*paths, *(part.path for part in self._open)]:
            with contextlib.suppress(OSError):
                path.unlink()
        for part in self._open:
            os.close(part.fd)

    def _open_next(self) -> _OpenPart:
        for part in self._open[-1:]:
            part.full = True
        name, folder, number = self._plan.archive, self._folders[0], len(self.parts) + len(self._open) + 1
        if self._plan.options.split is not None:
            name = part_name(name, number, self._plan.parts_at_most)
            needed = self._plan.options.split + SIDECARS_SIZE
            coming = {f: sum(p.given - p.written for p in self._open if p.path.parent == f) for f in self._folders}
            roomy = [f for f in self._folders if free_bytes(f) - coming[f] > needed]
            folder = next(iter(roomy), self._folders[-1])
        path = folder / (name + INCOMPLETE)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise disk_error(exc, "create", path) from exc
        self._open.append(_OpenPart(path, fd, ((-number - 1) % self._workers, -number % self._workers)))
        return self._open[-1]


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + INCOMPLETE)


class Resumed(NamedTuple):
    """What a killed run left: complete parts, and the frames on them."""

    parts: Tuple[WrittenPart, ...] = ()
    frames: Frames = Frames()


def resumable(plan: PackPlan, lock: int) -> Resumed:
    """The parts that an earlier run of this plan completed and that still are as it wrote them."""
    key, *lines = pread_exactly(lock, 1 << 26, 0).decode("utf-8", "replace").splitlines() or [""]
    if key != plan.key or not plan.options.split:
        return Resumed()
    parts: List[WrittenPart] = []
    frames = Frames()
    with contextlib.suppress(ValueError, TypeError, OSError):
        for line in lines:
            path, size, sha256 = json.loads(line)
            digest, found = hashlib.sha256(), []
            with _unfinished(Path(path)).open("rb") as stream:
                for unit, length in read_units(stream):
                    if length < 0 and unit:
                        raise ValueError("it has the tables: the next run writes it again")
                    digest.update(unit)
                    found += [(len(unit), length, zlib.crc32(unit))] if unit else []
            if digest.hexdigest() != sha256:
                break
            parts.append(WrittenPart(Path(path), size, sha256))
            for row in found:
                frames.append(*row)
    return Resumed(tuple(parts), frames)


class PackRun:
    """One run that reads, proves and compresses the frames of a plan, and writes those `resumed` does not have yet.

    Units lie in slots of memory that all workers share, in a ring: a unit is made when the one before it in its slot is
    written and hashed. What is packed already is read and proven once more."""

    def __init__(self, plan: PackPlan, resumed: Resumed) -> None:
        self._plan, self._resumed = plan, resumed
        self._cuts = cut_lanes(plan.edges, plan.segments)  # lanes begin with these frames
        edges = [index_at(plan.segments, plan.edges[cut]) for cut in self._cuts]
        self._lanes = [plan.segments[first:last] for first, last in zip(edges, edges[1:])]
        largest = max(stop - start for start, stop in zip(plan.edges, plan.edges[1:]))
        held = 7 if plan.options.profile == "smallest" else 5  # its planes too, and three compressors
        self._count = workers_for(plan.options.jobs, plan.segments[-1].stop, largest, held)
        self._lane_work = LaneWork(HASH_BEHIND, 0)
        self._slots = 2 * self._count + 4
        self._slot_size = largest_unit(largest)
        self._units = memoryview(mmap.mmap(-1, self._slots * self._slot_size))
        self._sums: Dict[Path, Any] = {}
        self._encode = make_encoder(load_zstd(), plan.options.profile, plan.options.level)

    def write(self, folders: Sequence[Path], lock: int, stage: Stage) -> Tuple[WrittenPart, ...]:
        """Write the archive under its .incomplete names. Complete parts stay for the next run, unless the disk is full
        or the folder is not what its manifest says."""

        def note(part: WrittenPart) -> None:
            if self._plan.options.split:
                write_all(lock, (json.dumps([str(part.path), part.size, part.sha256]) + "\n").encode())
                os.fdatasync(lock)

        with Workers(self._count, self._work) as workers, Serial() as flusher:
            writer = PartWriter(folders, self._plan, self._count, flusher, note, self._resumed.parts)
            try:
                self._lead(workers, writer, stage)
                return tuple(writer.parts)
            except BaseException as exc:
                full = isinstance(exc.__cause__, OSError) and exc.__cause__.errno in _NO_ROOM
                complete = full or isinstance(exc, IntegrityError)
                writer.discard(complete)
                if complete:
                    os.ftruncate(lock, 0)
                raise

    def _lead(self, workers: Workers, writer: PartWriter, stage: Stage) -> None:
        """Have all frames made, in their order written, and proven."""
        frames, edges = self._resumed.frames[:], self._plan.edges
        made: Dict[int, Tuple[int, int]] = {}
        left: Dict[int, int] = {}  # steps to come of units that have a place: to write them, to hash them
        free, finished = len(frames), False  # the slots of all units before `free` are
        schedule = Schedule([b - a for a, b in zip(self._cuts, self._cuts[1:])], self._lane_work.slots)
        schedule.limit = free + self._slots
        ends = [segment.stop for segment in self._plan.segments if segment.entry]
        stage.files, stage.finished = len(ends), bisect_right(ends, frames.edges[-1])

        def next_task(worker: int, idle: bool) -> Optional[Tuple[Any, ...]]:
            task = writer.next(worker)
            step = None if task else schedule.next(worker, idle)
            return ("frame", step) if step else task

        for _, (kind, *task), result in workers.run(next_task):
            if kind == "seal":
                writer.sealed(task[0], result)
            elif kind == "frame":
                step, (content, unit, crc) = task[0], result
                schedule.done(step, content)
                if unit:
                    made[self._cuts[step.lane] + step.at] = unit, crc
            else:
                for number, _ in task[1]:
                    left[number] -= 1
                if kind == "write":
                    writer.placed(task[0], sum(size for _, size in task[1]))
                while left.get(free) == 0:
                    del left[free]
                    free += 1
                schedule.limit = free + self._slots
            while len(frames) in made:
                number = len(frames)
                size, crc = made.pop(number)
                length = edges[number + 1] - edges[number]
                frames.append(size, length, crc)
                writer.place(number, size)
                left[number] = 2
                stage.add(length)
                stage.finish(bisect_right(ends, edges[number + 1]) - stage.finished)
            if len(frames) == self._plan.count and not finished:
                finished = True
                writer.finish(frames)

    # -- what workers do

    def _work(self, _: Callable[[int], None], kind: str, *args: Any) -> Any:
        steps: Mapping[str, Callable[..., Any]]
        steps = {"frame": self._frame, "write": self._write, "sum": self._sum, "seal": self._seal}
        return steps[kind](*args)

    def _frame(self, step: Step) -> Tuple[int, int, int]:
        """Read and compress a frame, prove it, or both: (bytes of content, of the unit, CRC-32 of that)."""
        number, segments = self._cuts[step.lane] + step.at, self._lanes[step.lane]
        start, stop = self._plan.edges[number], self._plan.edges[number + 1]
        unit = b""

        def make() -> bytes:
            nonlocal unit
            content = read_stream(self._plan, start, stop)
            if step.make and number >= len(self._resumed.frames):
                unit = self._encode(content, bool(segments[0].planes))
                self._slot(number, len(unit))[:] = unit
            return content

        size = self._lane_work.do(step, make, lambda: StreamCheck(segments, Sink(), self._refuse), stop - start)
        return size or 0, len(unit), zlib.crc32(unit)

    def _slot(self, number: int, size: int) -> memoryview:
        """Where a unit lies until it is written and hashed."""
        first = number % self._slots * self._slot_size
        return self._units[first : first + size]

    def _write(self, path: Path, units: Sequence[Tuple[int, int]], offset: int) -> None:
        """Write the next units of a part."""
        try:
            with opened(path, os.O_WRONLY) as fd:
                for unit in units:
                    pwrite_all(fd, self._slot(*unit), offset)
                    offset += unit[1]
        except OSError as exc:
            raise disk_error(exc, "write", path) from exc

    def _sum(self, path: Path, units: Sequence[Tuple[int, int]], _: int) -> None:
        """Hash the next units of a part."""
        digest = self._sums.setdefault(path, hashlib.sha256())
        for unit in units:
            digest.update(self._slot(*unit))

    def _seal(self, path: Path, summed: int) -> str:
        """Make a part durable: its SHA-256, of which `summed` bytes are hashed."""
        digest = self._sums.pop(path, None) or hashlib.sha256()
        try:
            with opened(path, os.O_RDWR) as fd:
                while tables := pread_exactly(fd, FRAME_SIZE, summed):
                    digest.update(tables)
                    summed += len(tables)
                os.fsync(fd)
                found, bad = digest.hexdigest(), False
                if self._plan.options.read_back:
                    # Out of the page cache first: what counts is what the medium gives back.
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    bad = sha256_file(path) != found
        except OSError as exc:
            raise disk_error(exc, "write", path) from exc
        if bad:
            what = f"{path.parent} gives back other bytes than were written to it"
            raise DiskError(what, f"found on reading {path.name} again", "use another medium")
        return found

    def _refuse(self, segment: Segment, what: str) -> None:
        path = segment.entry.path if segment.entry else segment.what
        raise _mismatch(self._plan.folder, self._plan.manifest, [f"{path} {what}"])


def pack_model(plan: PackPlan, folder: Path, reporter: Reporter, media: Sequence[Path] = ()) -> Packed:
    """Pack a model into `folder`, and what finds no room there onto `media`, one after the other. An archive of the
    same manifest and form that is there already is left as it is."""
    started = time.monotonic()
    folders = [make_dir(f) for f in (folder, *media)]
    old = [x for x in merged(x for f in folders for x in archives_in(f)) if _is_named(x, plan.archive)]
    present = _already_packed(plan, old[0]) if old and not plan.options.force else None
    if present:
        if (folder / (plan.archive + INCOMPLETE)).exists():  # a run was killed when all was done but this
            with claim(folder / (plan.archive + INCOMPLETE)):
                pass
        return Packed(plan.manifest, present, time.monotonic() - started, fresh=False)
    if old and not plan.options.force:
        _require_unfinished(plan, old[0])
    with claim(folder / (plan.archive + INCOMPLETE), bool(plan.options.split)) as lock:
        resumed = resumable(plan, lock)
        if resumed.parts:
            reporter.info(f"{plan.archive}: going on behind {counted(len(resumed.parts), 'complete part')}")
        _require_room_for(plan, folders, resumed.parts)
        if plan.options.split:
            os.ftruncate(lock, 0)
            rows = [json.dumps([str(part.path), part.size, part.sha256]) for part in resumed.parts]
            write_all(lock, "".join(row + "\n" for row in [plan.key, *rows]).encode())
        with reporter.stage("pack", plan.segments[-1].stop) as stage:
            stage.skip(resumed.frames.edges[-1])
            parts = PackRun(plan, resumed).write(folders, lock, stage)
        _publish(plan, folders, parts)
        if plan.options.split:
            os.ftruncate(lock, 0)
    for place in folders:
        _write_sidecars(place, reporter)
    return Packed(plan.manifest, parts, time.monotonic() - started, fresh=True)


@contextlib.contextmanager
def claim(path: Path, journal: bool = False) -> Iterator[int]:
    """Hold NAME.tar.zst.incomplete, so that no second hfship packs the same archive into the same folder. With
    `journal` it stays for the next run while it is not empty."""
    try:
        fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if journal else 0), 0o644
        )
    except OSError as exc:
        raise disk_error(exc, "create", path) from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            why = "it would write the same files"
            raise InUseError(f"another hfship writes {path}", why, "wait for it, or stop it") from exc
        try:
            if not journal:
                os.ftruncate(fd, 0)
            yield fd
        finally:
            with contextlib.suppress(FileNotFoundError):
                status = os.fstat(fd)
                if os.path.samestat(path.stat(), status) and not (journal and status.st_size):
                    path.unlink()  # it held the lock only, or the run failed
    finally:
        os.close(fd)


def _already_packed(plan: PackPlan, files: ArchiveFiles) -> Optional[Tuple[WrittenPart, ...]]:
    """The parts of an archive that is complete, of the same manifest and cut as asked; None if it is not."""
    split, listed = plan.options.split, files.listed()
    if bool(split) != bool(files.numbers) or set(listed) != {path.name for path in files.paths}:
        return None
    with contextlib.suppress(HfshipError):
        archive = open_archive(files)
        if (
            tuple(s.known for s in archive.segments) == tuple(s.known for s in plan.segments)
            and not archive.damages
            and all(p.size <= (split or p.size) for p in archive.parts)
        ):
            return tuple(WrittenPart(p.path, p.size, listed[p.path.name]) for p in archive.parts)
    return None


def _require_unfinished(plan: PackPlan, files: ArchiveFiles) -> None:
    """Refuse to replace an archive, unless it is what a killed run of ours had named so far."""
    present, listed = {path.name for path in files.paths}, set(files.listed())
    if not present < listed:
        raise UsageError(
            f"{files.path} is there already",
            f"it is not a complete archive of this {plan.manifest.name} in the form asked for",
            "give --force to replace it, or another folder with -o DIR",
        )


def holes_in(path: Path, grain: int) -> int:
    """Bytes of a sparse file that are in holes, less `grain` at both ends of each; they take no room in an archive.

    A filesystem that knows no holes tells one at the end of the file.
    """
    found = at = 0
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as stream:  # ENXIO: no data from here on
        size = os.fstat(stream.fileno()).st_size
        while at < size:
            hole = os.lseek(stream.fileno(), at, os.SEEK_HOLE)
            at = size
            with contextlib.suppress(OSError):
                at = os.lseek(stream.fileno(), hole, os.SEEK_DATA)
            found += max(at - hole - 2 * grain, 0)
    return found


def _require_room_for(plan: PackPlan, folders: Sequence[Path], done: Sequence[WrittenPart]) -> None:
    holes = sum(holes_in(plan.folder / s.entry.path, plan.options.frame_size) for s in plan.segments if s.entry)
    needed, what = plan.size_at_most - holes, f"pack {plan.manifest.name}"
    largest, keep = min(needed, plan.options.split or needed), {_unfinished(part.path) for part in done}
    for folder in folders:
        limit = filesystem_of(folder).max_file_size
        if limit is not None and largest > limit:
            hint = "fat32" if limit == SPLITS["fat32"] else str(limit)
            require_room(folder, 0, largest, what, f"give --split {hint}")
        for path in folder.glob(f"{plan.archive}.*{INCOMPLETE}"):
            if path not in keep:  # left by a killed run, and about to be rewritten
                path.unlink()
    elsewhere = sum(max(free_bytes(folder) - SIDECARS_SIZE, 0) for folder in folders[1:])
    elsewhere += sum(part.size for part in done)
    require_room(folders[0], needed - elsewhere, largest, what, "free space, or choose another folder with -o or --to")


def _publish(plan: PackPlan, folders: Sequence[Path], parts: Sequence[WrittenPart]) -> None:
    """Give the files their names. The sums go first: with files of theirs missing they mark an unfinished set."""
    sums = "".join(f"{part.sha256}  {part.path.name}\n" for part in parts)
    for folder in folders:
        try:
            for path in [p for p in folder.iterdir() if p.name == plan.archive or _is_part_of(p.name, plan.archive)]:
                path.unlink()
            atomic_write(folder / f"{plan.archive}.sha256", sums)
            for part in parts:
                if part.path.parent == folder:
                    rename_durably(_unfinished(part.path), part.path)
        except OSError as exc:
            raise disk_error(exc, "write", folder) from exc


def _is_named(files: ArchiveFiles, archive: str) -> bool:
    """Whether new files of `archive` would replace these: on FAT also when they differ in case."""
    alike = files.path.with_name(archive + files.path.name[len(archive) :])
    return files.name == archive or (files.name.lower() == archive.lower() and alike.exists())


def _is_part_of(name: str, archive: str) -> bool:
    match = _PART.match(name)
    return bool(match) and match["archive"] == archive  # type: ignore[index]


def _write_sidecars(folder: Path, reporter: Reporter) -> None:
    """Put hfship itself and READ-ME-FIRST.txt beside the archives."""
    own = Path(getattr(globals().get("__loader__"), "archive", sys.argv[0]))
    sidecars = {folder / "READ-ME-FIRST.txt": READ_ME_FIRST.encode()}
    if own.suffix == ".pyz" and own.is_file():
        sidecars[folder / "hfship.pyz"] = own.read_bytes()
    else:
        reporter.detail("hfship runs from source: no hfship.pyz is put beside the archive")
    for path, content in sidecars.items():
        if not path.exists() or path.read_bytes() != content:
            atomic_write(path, content, 0o755 if path.suffix == ".pyz" else None)


# ======================================================================================
# §10 Unpack
#
# Owns the way back: prove an archive or a folder, name what is damaged and the shortest repair, restore a model.
#
# An archive is checked and restored by the same code. Its frames fall into lanes, stretches that begin and end with a
# frame and a file at once: a weight is a lane, the small files between two weights are another. Lanes run side by
# side; within a lane, frames are read, decoded and written by any worker and hashed in order by one.
#
# Promises: every bit of the archive is checked; damage is located and the rest goes on; a model appears under its
# name complete and proven or not at all; a killed run keeps the files it had proven. Never: follows a symbolic link
# below the target folder; writes a file that the manifest does not list; trusts a tar header.
# ======================================================================================

DAMAGES_SHOWN = 20
JOURNAL_PATH = f"{WORK_DIR}/journal"


class ArchiveCheck:
    """One pass over an archive: decodes, proves, hands files to a sink and collects damage.

    `skip` are files that are not asked for: their weights are not read, and with `sparse` nothing that holds none of
    the others. `resume` tells how many bytes of a weight the sink has from an earlier run. With `quick`, only what lies
    on the medium is proven, not what it decodes to.
    """

    def __init__(
        self,
        archive: Archive,
        sink: Sink,
        jobs: int,
        skip: AbstractSet[str] = frozenset(),
        resume: Mapping[str, int] = MappingProxyType({}),
        sparse: bool = False,
        quick: bool = False,
    ) -> None:
        self.archive, self._sink = archive, sink
        self._resume, self._quick = resume, quick
        lanes = make_lanes(archive.frames, archive.segments)
        self._lanes = [x for x in lanes if {e.path for e in x.files} - skip or not (x.file or sparse)]
        ranges = [(f.offset, f.offset + f.size) for lane in self._lanes for f in self._needed(lane)] if sparse else []
        self._damages = [d for d in archive.damages if not sparse or _overlaps(d, ranges)]
        self._lost: Set[int] = set()  # lanes
        largest = max((frame.length for frame in archive.frames), default=FRAME_SIZE)
        self._count = workers_for(jobs, self.size, largest)
        self._lane_work = LaneWork(2 * self._count, largest)
        self._told = ToldSink(sink)
        self._found: List[Damage] = []  # by the step at hand
        self._decompress = load_zstd().decompressor()

    @property
    def size(self) -> int:
        """Bytes of the tar stream to go through."""
        return sum(lane.frames.edges[-1] - lane.frames.edges[0] for lane in self._lanes)

    def run(self, stage: Stage, after: Optional[Callable[[int], None]] = None) -> List[Damage]:
        """All damage, in the order of the archive. With `after`, lanes run one after the other, and it is told up to
        where the stream is safe in the sink, unless there is damage."""
        stage.files = sum(len(lane.files) for lane in self._lanes)
        lengths, serial = [len(lane.frames) for lane in self._lanes], bool(after or self.archive.media)
        schedule = Schedule(lengths, self._lane_work.slots, serial)
        schedule.limit = 0
        with Workers(self._count, self._work) as workers, Serial() as flusher:

            def next_step(worker: int, idle: bool) -> Optional[Tuple[Step]]:
                if schedule.all_taken and schedule.limit < sum(lengths) and not workers.busy:
                    schedule.limit = self._readable(schedule.limit)
                step = schedule.next(worker, idle)
                if step and step.make and not step.at:
                    self._begin(self._lanes[step.lane])
                return (step,) if step else None

            for _, (step,), (size, damages, told) in workers.run(next_step):
                schedule.done(step, size)
                self._damages += damages
                if step.take:
                    self._follow(step, size is None, told, flusher, after)
                    lane = self._lanes[step.lane]
                    stage.add(lane.frames[step.at].length)
                    ended = len(lane.files) * (step.at == len(lane.frames) - 1)
                    stage.finish(ended if self._quick else sum(call == "finish" for call, *_ in told))
            flusher.drain()
        found: List[Damage] = []
        for damage in sorted(self._damages, key=lambda d: (d.offset is None, d.offset or 0, bool(d.frames))):
            joined = found[-1].joined(damage) if found else None
            found[-1 if joined else len(found) :] = [joined or damage]
        return found

    def _needed(self, lane: Lane) -> List[Frame]:
        """Frames of a lane that the sink does not have yet."""
        done = self._resume.get(lane.file.path, 0) if lane.file else 0
        return [f for f in lane.frames if not done or lane.segments[0].file_range(f.start, f.stop)[1] > done]

    def _readable(self, done: int) -> int:
        """How many frames are on the media that are there, once there are more than are `done`."""
        media, count = self.archive.media, sum(len(lane.frames) for lane in self._lanes)
        if not media:
            return count
        frames = chain.from_iterable(lane.frames for lane in self._lanes)
        paths = (self.archive.part_of(frame).path for frame in islice(frames, done, None))
        media.find(next(paths))
        return next((number for number, path in enumerate(paths, done + 1) if not media.look_for(path)), count)

    def _begin(self, lane: Lane) -> None:
        if lane.file:
            self._sink.begin(lane.file)

    def _follow(
        self,
        step: Step,
        lost: bool,
        told: Sequence[Tuple[Any, ...]],
        flusher: Serial,
        after: Optional[Callable[[int], None]],
    ) -> None:
        """A frame was taken: what lies before it is in the sink, and files that end with it are finished."""
        lane, frame = self._lanes[step.lane], self._lanes[step.lane].frames[step.at]
        if lost and not self._quick:
            self._lost.add(step.lane)
        if lane.file and step.lane not in self._lost:
            first, last = lane.segments[0].file_range(frame.start, frame.stop)
            if first // FLUSH_SIZE != last // FLUSH_SIZE:
                flusher.call(self._sink.checkpoint, lane.file, first)
                flusher.call(self._tell, after, frame.start)
        for call, *args in told:
            flusher.call(getattr(self._sink, call), *args)
        if step.at == len(lane.frames) - 1:
            flusher.call(self._tell, after, frame.stop)
        if after:  # what may go is gone before more is written: there is room for one part only
            flusher.drain()

    def _tell(self, after: Optional[Callable[[int], None]], position: int) -> None:
        starts = [self.archive.frames[d.frames[0] - 1].start if d.frames else -1 for d in self._damages]
        if after and position <= min(starts, default=position):
            after(position)

    # -- what workers do

    def _work(self, _: Callable[[int], None], step: Step) -> Tuple[Optional[int], List[Damage], List[Tuple[Any, ...]]]:
        """Make a frame, take it, or both: (bytes of its content or None, damage, what became of files)."""
        lane = self._lanes[step.lane]
        number, frame = lane.first + step.at, lane.frames[step.at]
        self._found, self._told.told = [], []

        def check() -> StreamCheck:
            known = () if self._quick else lane.segments
            return StreamCheck(known, self._told, self._report, write=lane.file is None)

        size = self._lane_work.do(step, lambda: self._make(number, frame, lane), check, frame.length)
        return size, self._found, self._told.told

    def _make(self, number: int, frame: Frame, lane: Lane) -> Union[bytes, bytearray, None]:
        """The content of a frame, which also goes to the sink if it is of one file; None if it is lost."""
        try:
            if self._quick and frame.crc is not None:
                self.archive.unit(frame)
                return None
            if not lane.file:
                return self.archive.restored(frame, self._decompress)
            first, last = lane.segments[0].file_range(frame.start, frame.stop)
            if last <= self._resume.get(lane.file.path, 0):
                return self._sink.read(lane.file, first, last - first)
            content = self.archive.restored(frame, self._decompress)
            self._sink.write(lane.file, first, content)
            return content
        except ZstdError as exc:
            self._found.append(self.archive.damage(str(exc), number))
            return None

    def _report(self, segment: Segment, what: str) -> None:
        self._found.append(contradiction(segment, what))


def contradiction(segment: Segment, what: str) -> Damage:
    """Frames are intact, but what they hold is not what the manifest says: the archive was made so."""
    files = ((segment.entry.path, 0, segment.entry.size - 1),) if segment.entry else ()
    what = f"{segment.what} {what} (bytes {segment.start}-{segment.stop - 1} of the tar stream)"
    return Damage(what, files=files)


class StreamedCheck:
    """The same pass over an archive that comes as a stream: once, in its own order."""

    def __init__(
        self, archive: Streamed, sink: Sink, jobs: int, skip: AbstractSet[str] = frozenset(), *_: Any, **__: Any
    ) -> None:
        self._archive, self._skip, self._zstd = archive, skip, load_zstd()
        self._jobs = workers_for(jobs, FORK_SIZE, FRAME_SIZE)
        self._damages: List[Damage] = []
        self._check = StreamCheck(archive.segments, sink, lambda *wrong: self._damages.append(contradiction(*wrong)))

    @property
    def size(self) -> int:
        """Bytes of the tar stream to go through."""
        return self._archive.segments[-1].stop

    def run(self, stage: Stage, _: Optional[Callable[[int], None]] = None) -> List[Damage]:
        """All damage. Raises IncompleteError when the stream ends too early."""
        tail: List[bytes] = []
        decoding: Deque[Tuple[int, Future[Union[bytes, bytearray, None]]]] = deque()
        with ThreadPoolExecutor(self._jobs) as pool:
            frames = self._archive.frames_to_come(tail)
            while True:
                coming = list(islice(frames, self._jobs + 1 - len(decoding)))
                decoding += [(frame.length, pool.submit(self._decode, number, frame)) for number, frame in coming]
                if not decoding:
                    break
                length, content = decoding.popleft()
                self._check.feed(content.result(), length)
                stage.add(length)
        return self._damages + self._archive.ends(tail)

    def _decode(self, number: int, frame: Frame) -> Union[bytes, bytearray, None]:
        held = segments_between(self._archive.segments, frame.start, frame.stop)
        if all(s.entry and s.entry.path in self._skip for s in held):  # only what is there already
            self._archive.unit(frame)
            return None
        try:
            return self._archive.restored(frame, self._zstd.decompressor())
        except ZstdError as exc:
            self._damages.append(self._archive.damage(str(exc), number))
            return None


def checker_of(archive: Archive) -> Callable[..., Union[ArchiveCheck, StreamedCheck]]:
    """How to go through an archive."""
    return StreamedCheck if isinstance(archive, Streamed) else ArchiveCheck


def _overlaps(damage: Damage, ranges: Sequence[Tuple[int, int]]) -> bool:
    """True unless the damage lies where none of the sorted `ranges` of the archive does."""
    if damage.offset is None or not damage.size:
        return True
    at = bisect_left(ranges, (damage.offset + damage.size,))
    return bool(at) and ranges[at - 1][1] > damage.offset


def verify_archive(archive: Archive, jobs: int, reporter: Reporter, quick: bool = False) -> List[Damage]:
    """Prove an archive: every frame, every file, and that nothing else is in it. Needs no space.

    With `quick` only the checksums of frames and tables, some five times as fast.
    """
    check = checker_of(archive)(archive, Sink(), jobs, quick=quick)
    with reporter.stage("verify", check.size) as stage:
        return check.run(stage)


class DamageError(IntegrityError):
    """Damage that was looked for, and located."""

    def __init__(self, what: str, damages: Sequence[Damage], next_step: str) -> None:
        super().__init__(what, shorten([damage.text() for damage in damages], DAMAGES_SHOWN, "\n"), next_step)
        self.damages = damages


def archive_error(archive: Archive, damages: Sequence[Damage], again: str) -> DamageError:
    """The damage of an archive; `again` is the command to run after the repair."""
    strange = sorted({name for damage in damages if damage.what == NOT_OURS for name in damage.parts})
    names = sorted({name for damage in damages for name in damage.parts} - {*strange})
    steps = [f"copy {shorten(names)} again into {archive.files.folder}"] * bool(names)
    steps += [f"remove {shorten(strange)} from {archive.files.folder}"] * bool(strange)
    repair = ", ".join([*steps, f"then: {again}"])
    if archive.files.name == STDIN:
        repair = f"send it again, from another copy if it stays damaged: cat NAME.tar.zst* | {again}"
    elif not steps:
        repair = "no bytes are damaged, the archive was made so: pack the model again where it came from"
    count = f"{len(damages)} places" if len(damages) != 1 else "1 place"
    return DamageError(f"{archive.files.path} is damaged in {count}", damages, repair)


def repair_archive(files: ArchiveFiles, other: ArchiveFiles, jobs: int, reporter: Reporter) -> Tuple[ArchiveFiles, int]:
    """Replace damaged frames, missing parts and damaged tables by those of another copy with the same parts.

    Returns the repaired archive and the bytes that were replaced. Raises IntegrityError where the copy cannot help.
    """
    index, theirs = read_index(files), read_index(other)
    if theirs is None or index not in (None, theirs):
        why = "it is another archive, or was packed or cut in another way" if theirs else "its tables are damaged"
        raise IntegrityError(f"{files.path} cannot be repaired from {other.path}", why, "use another copy")
    source, archive = indexed_archive(other, theirs), replace(indexed_archive(files, theirs), damages=())
    damages = verify_archive(archive, jobs, reporter, quick=True)
    end = archive.frames.size
    pieces = [frame for damage in damages for frame in archive.frames[damage.frames[0] - 1 : damage.frames[1]]]
    pieces += [Frame(end, archive.size - end, 0, 0)] if index is None else []
    for piece in pieces:
        try:
            content = source.unit(piece) if piece.length else read_parts(source.parts, piece.offset, piece.size)
        except ZstdError as exc:
            what = f"{other.path} is damaged where {files.path} is: frame at byte {piece.offset} {exc}"
            raise IntegrityError(what, "", "use another copy") from exc
        part = archive.parts[index_at(archive.parts, piece.offset + 1) - 1]
        write_at(part.path, content, piece.offset - part.start)
    for part in archive.parts:
        if part.path.stat().st_size > part.size:
            os.truncate(part.path, part.size)
    numbers = {number: part.path for number, part in enumerate(archive.parts, 1)} if files.numbers else {}
    return replace(files, numbers=numbers), sum(piece.size for piece in pieces)


def write_at(path: Path, content: bytes, offset: int) -> None:
    """Put bytes into a file, which is made if need be, durably."""
    try:
        with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
            pwrite_all(fd, content, offset)
            os.fsync(fd)
    except OSError as exc:
        raise disk_error(exc, "write", path) from exc


# ---- folders -------------------------------------------------------------------------


class Tree:
    """A folder below which no symbolic link is followed: every step starts from an open folder.

    The folder itself is made if need be; if it is a symbolic link, or anything below it on the way to a file is, that
    is an IntegrityError.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with opened(root.parent, os.O_RDONLY | os.O_DIRECTORY) as parent:
            self._folders = {"": self._enter(parent, root.name, root)}

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._folders.values():
            os.close(fd)

    def _enter(self, parent: int, name: str, path: Path) -> int:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            os.fsync(fd)  # before its parent is; see make_dir
            return fd
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                why = "a symbolic link or a file is where a folder of the model belongs; hfship does not follow it"
                raise IntegrityError(f"cannot unpack into {path}", why, f"remove {path}") from exc
            raise disk_error(exc, "create the folder", path) from exc

    def _place(self, path: str) -> Tuple[int, str]:
        """The open folder of a file, and its name in there."""
        folder, _, name = path.rpartition("/")
        return self.folder(folder), name

    def folder(self, path: str) -> int:
        """A folder of the tree, open; made if need be."""
        if path not in self._folders:
            parent, name = self._place(path)
            self._folders[path] = self._enter(parent, name, self.root / path)
        return self._folders[path]

    def create(self, path: str, size: int, filesystem: Optional[Filesystem]) -> int:
        """A new file PATH.incomplete of its final size, open for writing; with `filesystem`, room is reserved."""
        self.remove(path)
        fd = self.open(path + INCOMPLETE, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            preallocate(fd, size, filesystem or Filesystem("", None))
            return fd
        except OSError as exc:
            os.close(fd)
            raise disk_error(exc, "create", self.root / path) from exc

    def open(self, path: str, flags: int) -> int:
        """Open a file of the tree, which must not be a link."""
        folder, name = self._place(path)
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
        except OSError as exc:
            raise disk_error(exc, "create", self.root / path) from exc

    def take(self, source: Path, entry: FileEntry) -> None:
        """Make a file of the tree from one elsewhere: a hard link if it can be, else a copy."""
        folder, name = self._place(entry.path)
        try:
            os.link(source, name, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:
            fd = self.create(entry.path, entry.size, None)
            with source.open("rb") as stream, os.fdopen(fd, "wb") as target:
                shutil.copyfileobj(stream, target, CHUNK)
                target.flush()
                os.fsync(fd)
                self.publish(entry.path)
                os.fsync(fd)  # again: see rename_durably

    def publish(self, path: str) -> None:
        """PATH.incomplete becomes PATH."""
        folder, name = self._place(path)
        os.replace(name + INCOMPLETE, name, src_dir_fd=folder, dst_dir_fd=folder)

    def remove(self, path: str) -> None:
        """PATH.incomplete is given up."""
        folder, name = self._place(path)
        with contextlib.suppress(OSError):
            os.unlink(name + INCOMPLETE, dir_fd=folder)

    def sha256(self, entry: FileEntry, count: Callable[[int], None]) -> Optional[str]:
        """Hex SHA-256 of a file that is there with its right size; None for anything else."""
        folder, name = self._place(entry.path)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size:
                return None
            return sha256_file(Path(f"/proc/self/fd/{fd}"), count)
        except OSError:
            return None
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Make all names durable, also in folders that workers made."""
        for folder, _, _ in os.walk(self.root, topdown=False):
            fsync_dir(Path(folder))


class Journal:
    """How far the weights of a model are on disk: NAME/.hfship/journal, a line [path, sha256, bytes] for each
    checkpoint. It is a hint only: what it says is hashed again, and taken anew if it does not hold."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._fd = tree.open(JOURNAL_PATH, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def read(self, files: Iterable[FileEntry]) -> Dict[str, int]:
        """Bytes that are there of each of `files`, where the journal and PATH.incomplete agree."""
        wanted = {(entry.path, entry.sha256): entry for entry in files}
        found: Dict[str, int] = {}
        for line in pread_exactly(self._fd, 1 << 26, 0).splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, DiskError):
                path, sha256, size = json.loads(line)
                fd = self._tree.open(path + INCOMPLETE, os.O_RDONLY) if (path, sha256) in wanted else -1
                if fd >= 0:
                    status = os.fstat(fd)
                    os.close(fd)
                    if stat.S_ISREG(status.st_mode) and 0 < size <= status.st_size == wanted[path, sha256].size:
                        found[path] = size
        return found

    def note(self, entry: FileEntry, size: int) -> None:
        """Append a checkpoint, durably; what it tells of must be durable already."""
        write_all(self._fd, (json.dumps([entry.path, entry.sha256, size]) + "\n").encode())
        os.fdatasync(self._fd)

    def close(self, done: bool) -> None:
        os.close(self._fd)
        if done:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.basename(JOURNAL_PATH), dir_fd=self._tree.folder(WORK_DIR))


class FolderSink(Sink):
    """Restores files below a tree, except those in `kept`; goes on with those in `resume`. `finished` are done.

    Workers have copies of it, and may write files that another began."""

    def __init__(
        self, tree: Tree, kept: AbstractSet[str], journal: Journal, resume: Mapping[str, int], reserve: bool = True
    ) -> None:
        self._tree, self._kept, self._journal, self._resume = tree, kept, journal, resume
        self._filesystem = filesystem_of(tree.root) if reserve else None
        self.finished: Set[str] = set()
        self._held: Dict[str, int] = {}  # begun here and open, so that no error of the disk is forgotten
        self._lock = threading.Lock()  # folders are made on the way

    def begin(self, entry: FileEntry) -> None:
        if entry.path in self._kept:
            return
        with self._lock:
            if entry.path in self._resume:
                self._held[entry.path] = self._tree.open(entry.path + INCOMPLETE, os.O_RDWR)
            else:
                self._held[entry.path] = self._tree.create(entry.path, entry.size, self._filesystem)

    def read(self, entry: FileEntry, offset: int, size: int) -> bytes:
        with self._file(entry) as fd:
            return pread_exactly(fd, size, offset)

    def write(self, entry: FileEntry, offset: int, content: Union[bytes, bytearray, memoryview]) -> None:
        if entry.path not in self._kept:
            with self._file(entry) as fd:
                pwrite_all(fd, memoryview(content), offset)

    def checkpoint(self, entry: FileEntry, size: int) -> None:
        if entry.path not in self._kept and size > self._resume.get(entry.path, 0):
            with self._file(entry) as fd:
                os.fdatasync(fd)
                self._journal.note(entry, size)

    def finish(self, entry: FileEntry) -> None:
        if entry.path in self._kept:
            return
        with self._file(entry) as fd:
            os.fsync(fd)
            with self._lock:
                self._tree.publish(entry.path)
            os.fsync(fd)  # again: see rename_durably
        self.release(entry)
        self.finished.add(entry.path)

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        self.release(entry)
        if not lost and entry.path not in self._kept:  # else the journal tells what is good, for a run after the repair
            self._tree.remove(entry.path)

    def release(self, entry: FileEntry) -> None:
        fd = self._held.pop(entry.path, -1)
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close what a failure left open; PATH.incomplete stays until the next run."""
        for fd in self._held.values():
            os.close(fd)

    @contextlib.contextmanager
    def _file(self, entry: FileEntry) -> Iterator[int]:
        held = self._held.get(entry.path, -1)
        fd = held if held >= 0 else self._tree.open(entry.path + INCOMPLETE, os.O_RDWR)
        try:
            yield fd
        except OSError as exc:
            raise disk_error(exc, "write", self._tree.root / entry.path) from exc
        finally:
            if held < 0:
                os.close(fd)


def check_folder(folder: Path, manifest: Manifest, jobs: int, reporter: Reporter) -> List[Damage]:
    """Files of a model folder that are missing or not what the manifest says."""

    def check(count: Callable[[int], None], entry: FileEntry) -> Optional[Damage]:
        path = folder / entry.path
        try:
            size = path.stat().st_size
            if size != entry.size:
                return Damage(f"{entry.path} has {size} bytes instead of {entry.size}")
            found = sha256_file(path, count)
        except OSError as exc:
            return Damage(
                f"{entry.path} cannot be read: {exc.strerror}" if path.exists() else f"{entry.path} is missing"
            )
        what = f"{entry.path} has SHA-256 {found}, the manifest says {entry.sha256}"
        return None if found == entry.sha256 else Damage(what)

    count = workers_for(jobs, manifest.size)
    with reporter.stage("verify", manifest.size) as stage, Workers(count, check, stage.add) as workers:
        found = stage.each(workers.map(manifest.files), len(manifest.files))
        return [damage for damage in found if damage]


def folder_error(folder: Path, manifest: Manifest, damages: Sequence[Damage]) -> DamageError:
    """The damage of a model folder."""
    again = command_line("hfship", "unpack", manifest.name, "-o", folder.parent)
    repair = f"{again}\nor fetch it again: only damaged files are replaced"
    return DamageError(f"{folder} is not what its manifest says", damages, repair)


def strangers_in(folder: Path, manifest: Optional[Manifest]) -> List[str]:
    """Files of a folder that its manifest does not list."""
    listed = {entry.path for entry in manifest.files} if manifest else set()
    return [path for path, _ in content_files(folder) if path not in listed]


# ---- restore -------------------------------------------------------------------------


@dataclass(frozen=True)
class UnpackOptions:
    """What to unpack and how: files that match a glob of `only`; `base` is a folder on site to take files from, by
    their SHA-256; `consume` frees the parts on the way."""

    only: Tuple[str, ...] = ()
    base: Optional[Path] = None
    consume: bool = False


@dataclass(frozen=True)
class Unpacked:
    """What unpack leaves: the model folder; `written` counts the files that were not there before."""

    folder: Path
    manifest: Manifest
    written: int
    seconds: float


def unpack_archive(
    archive: Archive,
    out: Path,
    name: Optional[str],
    jobs: int,
    force: bool,
    reporter: Reporter,
    options: UnpackOptions = UnpackOptions(),
) -> Unpacked:
    """Restore a model to `out`/NAME, in NAME.incomplete until all of it is proven.

    A folder that already holds this version is proven, and repaired in place if need be. Raises IntegrityError for
    damage, after everything undamaged was restored.
    """
    started = time.monotonic()
    manifest, text = _wanted(archive, _require_layout(archive), options.only)
    target = make_dir(out) / make_manifest(name or manifest.name, ()).name
    here = _require_replaceable(target, text, force)
    work = target if here else target.with_name(target.name + INCOMPLETE)
    with Tree(work) as tree, contextlib.ExitStack() as stack:
        tree.folder(WORK_DIR)  # is no link, so what is written by path below is written here
        stack.callback(remove_if_empty, work)
        lock = stack.enter_context(FolderLock(work))
        require_names(work, [entry.path for entry in manifest.files], f"unpack into {work.parent}")
        if not here:
            _remove_strangers(work, manifest)
            _borrow(tree, manifest, options.base or target)
        kept = _proven_files(tree, manifest, jobs, reporter)
        _require_base(archive, manifest, kept)
        if len(kept) < len(manifest.files) or not here:
            _restore(archive, tree, manifest, kept, jobs, reporter, options)
            atomic_write(work / MANIFEST_PATH, text)
            tree.sync()
        if not here:
            lock.vanish()
            publish_folder(work, target)
    for path in [*archive.files.paths, archive.files.sums] if options.consume else []:
        free_file(path, 0)
    return Unpacked(target, manifest, len(manifest.files) - len(kept), time.monotonic() - started)


def _wanted(archive: Archive, manifest: Manifest, only: Sequence[str]) -> Tuple[Manifest, bytes]:
    """The manifest of what is to be restored, and its text."""
    if not only:
        return manifest, archive.text
    chosen = _chosen(manifest, only)
    if not chosen.files:
        what = f"no file of {archive.files.name} matches {', '.join(only)}"
        raise NotFoundError(what, shorten([entry.path for entry in manifest.files]), "give another --only GLOB")
    return chosen, chosen.to_json().encode("utf-8")


def _chosen(manifest: Manifest, only: Sequence[str]) -> Manifest:
    """The manifest of the files that match one of the globs."""
    files = tuple(entry for entry in manifest.files if any(fnmatchcase(entry.path, glob) for glob in only))
    return replace(manifest, files=files, left_out=manifest.left_out + len(manifest.files) - len(files))


def _require_layout(archive: Archive) -> Manifest:
    """The manifest of an archive that can be restored from. Raises IntegrityError."""
    if archive.manifest and archive.segments:
        return archive.manifest
    damages = list(archive.damages)
    if not damages:
        damages = verify_archive(archive, 1, Reporter("none"))
    raise archive_error(archive, damages, command_line("hfship", "unpack", archive.files.path))


def _borrow(tree: Tree, manifest: Manifest, base: Path) -> None:
    """Take files that another version on site has, by SHA-256: as a link if possible, else a copy; proven next."""
    known = {}
    with contextlib.suppress(IntegrityError):
        base_manifest = read_manifest(base)
        known = {entry.sha256: base / entry.path for entry in base_manifest.files} if base_manifest else {}
    for entry in manifest.files:
        source = known.get(entry.sha256)
        if source and source.is_file() and not (tree.root / entry.path).exists():
            tree.take(source.resolve(), entry)


def _require_base(archive: Archive, manifest: Manifest, kept: AbstractSet[str]) -> None:
    missing = [entry.path for entry in manifest.files if entry.path in archive.absent - kept]
    if missing:
        raise NotFoundError(
            f"{archive.files.name} is a delta: {counted(len(missing), 'file')} must come from an older version on site",
            f"not found, or not intact: {shorten(missing)}",
            "name the folder of that version with --base DIR, or bring the whole archive",
        )


def _require_replaceable(target: Path, text: bytes, force: bool) -> bool:
    """True when `target` holds the version in the archive. Refuses a folder with files that nobody else has."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        why = "it is a symbolic link or a file, not a folder; hfship does not follow it"
        raise IntegrityError(f"cannot unpack into {target}", why, f"remove {target}, or give --name")
    if not target.exists():
        return False
    manifest = read_manifest(target)
    if manifest and manifest.to_json().encode("utf-8") == text:
        return True
    packed = parse_manifest(text, "the manifest of the archive")
    repos = [m.source.resolved_repo for m in (manifest, packed) if m and m.source]
    if len(repos) == 2 and repos[0] != repos[1] and not force:
        why = f"it holds {repos[0]}, the archive holds {repos[1]}"
        raise UsageError(f"{target} is another model", why, "give --name, or replace it with --force")
    strangers = strangers_in(target, manifest)
    if strangers and not force:
        why = f"it would be replaced, and has files that are in no manifest: {shorten(strangers)}"
        raise UsageError(f"{target} is there already", why, "move them away, give --name, or replace all with --force")
    return False


def _remove_strangers(work: Path, manifest: Manifest) -> None:
    """Clear NAME.incomplete of all that is not a file of this manifest: leftovers of a killed run, or of another."""
    wanted = (
        {entry.path for entry in manifest.files} | {f"{WORK_DIR}/{name}" for name in ("lock", "lease")} | {JOURNAL_PATH}
    )
    wanted |= {entry.path + INCOMPLETE for entry in manifest.files if entry.size >= WEIGHT_SIZE}
    for root, folders, names in os.walk(work):
        for name in names + [folder for folder in folders if (Path(root) / folder).is_symlink()]:
            path = Path(root) / name
            if path.relative_to(work).as_posix() not in wanted or path.is_symlink():
                path.unlink()


def _proven_files(tree: Tree, manifest: Manifest, jobs: int, reporter: Reporter) -> Set[str]:
    """Files that are there already, with the right SHA-256."""
    present = [entry for entry in manifest.files if (tree.root / entry.path).is_file()]
    if not present:
        return set()
    reporter.info(f"{tree.root}: proving the {len(present)} of {counted(len(manifest.files), 'file')} that are there")

    def prove(count: Callable[[int], None], entry: FileEntry) -> bool:
        return tree.sha256(entry, count) == entry.sha256

    total = sum(entry.size for entry in present)
    with reporter.stage("prove", total) as stage, Workers(workers_for(jobs, total), prove, stage.add) as workers:
        return {entry.path for entry, good in zip(present, stage.each(workers.map(present), len(present))) if good}


def _restore(
    archive: Archive,
    tree: Tree,
    manifest: Manifest,
    kept: AbstractSet[str],
    jobs: int,
    reporter: Reporter,
    options: UnpackOptions,
) -> None:
    """Write all files of the manifest that are not kept; goes on where a killed run left its journal."""
    journal = Journal(tree)
    left = [entry for entry in manifest.files if entry.path not in kept]
    resume = {} if isinstance(archive, Streamed) else journal.read(left)
    freeing, consumable = archive if options.consume else None, not isinstance(archive, Streamed)
    _require_room_for_files(tree.root, left, sum(resume.values()), freeing, consumable)
    freed = _PartsToFree(archive, tree) if options.consume else None
    sparse = options.consume or bool(options.only)
    others = {s.entry.path for s in archive.segments if s.entry} - {entry.path for entry in left}
    damages: List[Damage] = []
    try:
        for start in (resume, {}) if resume else ({},):
            sink = FolderSink(tree, others, journal, start, reserve=not options.consume)
            try:
                check = checker_of(archive)(archive, sink, jobs, others, start, sparse)
                with reporter.stage("unpack", check.size) as stage:
                    damages = check.run(stage, freed)
            finally:
                sink.close()
            others |= sink.finished
            if not any(damage.files and damage.offset is None for damage in damages):
                break  # else a file has another SHA-256 than it should: what the journal told may be to blame
    finally:
        journal.close(not damages and others >= {entry.path for entry in left})
    if damages:
        raise archive_error(
            archive, damages, command_line("hfship", "unpack", "-o", tree.root.parent, archive.files.path)
        )


# ---- archives of other programs ------------------------------------------------------


class Foreign:
    """A model in a tar stream of another program, plain or compressed by zstd or gzip. `root` is the folder in it that
    is the model, "" if its files lie in none; `text` the manifest, if it brings one."""

    def __init__(self, files: ArchiveFiles, stream: IO[bytes]) -> None:
        self.archive, self.root, self.text, self._unread = files, "", b"", 0
        first, whole = tee(iter(lambda: stream.read(CHUNK), b""))
        magic = stream_of(first).read(4)
        self._zstd = ZstdContent(stream_of(whole))
        forms = {b"\x28\xb5": "zstd", b"\x50\x2a": "zstd", b"\x1f\x8b": "gzip"}
        self._form = forms.get(magic[:2], "tar")
        self._stream: IO[bytes] = stream_of(self._zstd if self._form == "zstd" else whole)
        if self._form == "gzip":
            self._stream = gzip.GzipFile(fileobj=self._stream)  # type: ignore[assignment]

    @property
    def checked(self) -> str:
        """By what checksums damage on the way would have shown."""
        if self._form == "zstd" and self._zstd.unchecked:
            return f"{self._zstd.unchecked} of its zstd frames have no checksum"
        return "it has no checksum" if self._form == "tar" else f"its {self._form} checksums hold"

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        where = "standard input" if self.archive.name == STDIN else self.archive.path
        what = f"{where} was not made by hfship, and cannot be unpacked"
        try:
            yield
        except EOFError as exc:
            kind = IncompleteError if self.archive.name == STDIN else IntegrityError
            raise kind(what, str(exc), "copy or send it again") from exc
        except (ValueError, OSError, zlib.error) as exc:
            links = "\nor pack it again, without links: tar -h --hard-dereference --zstd -cf NAME.tar.zst DIR"
            raise IntegrityError(what, str(exc), "copy it again" + links) from exc

    def files(self) -> Iterator[FileEntry]:
        """The files as they come, whose content is to be read before the next; without their SHA-256. Raises
        IntegrityError for what is damaged or refused, IncompleteError for a pipe that ends too early."""
        with self._errors():
            found = 0
            for number, (path, size, folder) in enumerate(tar_members(self._stream)):
                path, self._unread = re.sub(r"^(\./)+|^\.$", "", path.rstrip("/")), size
                if not number and ("/" in path or folder):
                    self.root = path.split("/")[0]
                inside = self._inside(path)
                if inside == MANIFEST_PATH and size <= LARGEST_FRAME:
                    self.text = b"".join(self.content())
                elif inside and not folder and not _NOT_CONTENT.search(inside):
                    check_relative_path(inside)
                    found += 1
                    yield FileEntry(inside, size, "")
                for _ in self.content():  # that nobody wanted
                    pass
            if not found:
                raise ValueError("it holds no files")
            if any(map(any, iter(lambda: self._stream.read(CHUNK), b""))):
                raise ValueError("something follows the end of the tar stream")

    def _inside(self, path: str) -> str:
        """Path in the folder of the model."""
        if re.match(r"([^/]+/)?models--", path):
            raise ValueError("it holds huggingface_hub's cache, not a model's folder: pack models--*/snapshots/COMMIT")
        if not _NOT_CONTENT.search(path):
            check_relative_path(path or "NAME")
        root, _, inside = path.partition("/") if self.root else ("", "", path)
        if path and root != self.root:
            raise ValueError(f"{path!r} lies beside {self.root!r}: it is not the folder of one model")
        return inside

    def content(self) -> Iterator[bytes]:
        """What is left of the file at hand, in pieces."""
        size, self._unread = self._unread, 0
        with self._errors():
            yield from copy_range(self._stream, size)


def unpack_foreign(foreign: Foreign, out: Path, name: Optional[str], force: bool, only: Sequence[str]) -> Unpacked:
    """Restore a model that another program packed, and make its manifest: unproven, unless it brings one."""
    started, files = time.monotonic(), foreign.files()
    first = next(files, None)
    name = name or foreign.root or foreign.archive.name.split(".tar")[0]
    target = make_dir(out) / make_manifest(name, ()).name
    if target.is_symlink() or (target.exists() and not force):
        raise UsageError(f"{target} is there already", "", "remove it, give --name, or replace a folder with --force")
    work = target.with_name(target.name + INCOMPLETE)
    with Tree(work) as tree, contextlib.ExitStack() as stack:
        tree.folder(WORK_DIR)
        stack.callback(remove_if_empty, work)
        lock = stack.enter_context(FolderLock(work))
        _remove_strangers(work, make_manifest(name, ()))
        entries = _restore_foreign(foreign, chain([first] if first else [], files), tree, only)
        manifest = _manifest_on_arrival(foreign, name, entries, only)
        atomic_write(work / MANIFEST_PATH, manifest.to_json())
        tree.sync()
        lock.vanish()
        publish_folder(work, target)
    return Unpacked(target, manifest, len(entries), time.monotonic() - started)


def _restore_foreign(foreign: Foreign, files: Iterable[FileEntry], tree: Tree, only: Sequence[str]) -> List[FileEntry]:
    """Write the files that are asked for, each after a look whether there is room for it."""
    hint = "free space, or choose another folder with -o DIR"
    fold = str.casefold if ignores_case(tree.root) else str
    journal = Journal(tree)
    sink = FolderSink(tree, frozenset(), journal, {}, reserve=False)

    def fitting() -> Iterator[FileEntry]:
        for entry in files:
            if not only or any(fnmatchcase(entry.path, glob) for glob in only):
                require_room(tree.root, entry.size, entry.size, f"unpack {entry.path}", hint)
                yield entry

    try:
        return list(_receive(foreign, fitting(), sink, fold))
    finally:
        sink.close()
        journal.close(True)


def _receive(
    foreign: Foreign, files: Iterable[FileEntry], sink: Sink, fold: Callable[[str], str] = str
) -> Iterator[FileEntry]:
    """Pass files that come on to a sink; tells them with their SHA-256."""
    seen: Set[str] = set()
    for entry in files:
        path = fold(entry.path)
        if path in seen or path + "/" in seen:
            what = f"{foreign.archive.path} has {entry.path} twice, or another that differs in case only"
            raise IntegrityError(what, "one would replace the other", "pack it again")
        seen |= {path, *(path[: at + 1] for at, letter in enumerate(path) if letter == "/")}
        digest, at = hashlib.sha256(), 0
        sink.begin(entry)
        for piece in foreign.content():
            digest.update(piece)
            sink.write(entry, at, piece)
            at += len(piece)
        sink.finish(entry)
        yield replace(entry, sha256=digest.hexdigest())


def verify_foreign(foreign: Foreign) -> str:
    """Read an archive of another program to its end, and say what that proves."""
    manifest = _manifest_on_arrival(foreign, "NAME", list(_receive(foreign, foreign.files(), Sink())), ())
    proof = f"{manifest.caveats}, only {foreign.checked}" if manifest.unproven else "; as the manifest in it says"
    return f"{counted(len(manifest.files), 'file')}, {human_bytes(manifest.size)}, not made by hfship{proof}"


def _manifest_on_arrival(foreign: Foreign, name: str, entries: Sequence[FileEntry], only: Sequence[str]) -> Manifest:
    """The manifest of what came: the one that came with it, if that is right, else an unproven one."""
    if not entries:
        raise NotFoundError(f"no file of {foreign.archive.path} matches {', '.join(only)}", "", "give another --only")
    made = replace(make_manifest(name, entries), unproven=True)
    if not foreign.text:
        return made
    brought = parse_manifest(foreign.text, f"the manifest in {foreign.archive.path}")
    listed = _chosen(brought, only or ["*"])
    wrong = sorted({e.path for e in {*listed.files} ^ {*made.files}})
    if wrong:
        raise IntegrityError(
            f"{foreign.archive.path} is not what the manifest in it says",
            f"wrong, missing or not listed: {shorten(wrong)}",
            "copy it again, or pack it again: hfship pack DIR",
        )
    return listed


def free_file(path: Path, keep: int) -> None:
    """Remove a file that may be gone already, but for its first `keep` bytes."""
    try:
        if not keep:
            path.unlink()
        elif path.stat().st_size > keep:
            os.truncate(path, keep)
    except FileNotFoundError:
        pass
    except OSError as exc:
        raise disk_error(exc, "remove", path, "leave out --consume, or make the folder writable") from exc


class _PartsToFree:
    """Removes the parts of an archive whose files are safe; the last, which has the tables, stays till the end."""

    def __init__(self, archive: Archive, tree: Tree) -> None:
        self._archive, self._tree, self._left = archive, tree, list(archive.parts[:-1])
        self._next = 0  # the first frame that is not safe
        # The manifest stays, for a run that has to go on after this one was killed.
        first = make_lanes(archive.frames, archive.segments)[0].frames[-1]
        self._keep = first.offset + first.size

    def __call__(self, position: int) -> None:
        frames = self._archive.frames
        while self._next < len(frames) and frames[self._next].start < position:
            self._next += 1
        offset = frames[self._next].offset if self._next < len(frames) else self._archive.size
        while self._left and self._left[0].stop <= offset:
            self._tree.sync()
            part = self._left.pop(0)
            free_file(part.path, max(self._keep - part.start, 0))


def _require_room_for_files(
    folder: Path, files: Sequence[FileEntry], there: int, freeing: Optional[Archive], consumable: bool
) -> None:
    """`there` bytes are written already; `freeing` is an archive whose parts go as their files come, `consumable` is
    whether one could be asked to."""
    tip = "give --consume, " if consumable and not freeing else ""
    what, hint = f"unpack into {folder}", f"free space, {tip}or choose another folder with -o DIR"
    largest = max((entry.size for entry in files), default=0)
    needed = sum(entry.size for entry in files) - there
    if freeing and os.stat(freeing.files.path).st_dev == os.stat(folder).st_dev:
        present = [part.size for part in freeing.parts if part.path.exists()]
        needed -= sum(present) - max(present)
    require_room(folder, needed, largest, what, hint)
    status = os.statvfs(folder)
    if status.f_files and status.f_favail < len(files) + 16:
        why = f"{folder} has {status.f_favail} inodes free, {len(files) + 16} needed"
        raise DiskError(f"cannot {what}: too few inodes", why, hint)


def publish_folder(work: Path, target: Path) -> None:
    """NAME.incomplete becomes NAME; what was NAME before is removed once the new one has its place."""
    old = target.with_name(f"{target.name}.replaced{INCOMPLETE}")
    try:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        rename_durably(work, target)
    except OSError as exc:
        raise disk_error(exc, "rename to", target) from exc
    shutil.rmtree(old, ignore_errors=True)


# ======================================================================================
# §11 Signatures
#
# Owns who vouches for a model: a bundle of OpenSSF model signing (OMS 1.0) with an ECDSA key, NAME.tar.zst.sig
# beside an archive and NAME/.hfship/model.sig in a model folder. openssl does the cryptography.
#
#   bundle    JSON: "mediaType"; "verificationMaterial": {"publicKey": {"hint": fingerprint}, "tlogEntries": []};
#             "dsseEnvelope": {"payload": base64, "payloadType", "signatures": [{"sig": base64 of DER, "keyid": ""}]}
#   signed    "DSSEv1 28 application/vnd.in-toto+json LENGTH PAYLOAD"
#   payload   in-toto statement: subject NAME with the SHA-256 of all digests, one after the other; predicate with
#             "serialization" (method "files") and "resources": name and SHA-256 of every file, sorted by name
#   fingerprint  SHA-256 of the public key's PEM text, in hex
#
# What OMS leaves out by default (.git, .gitattributes, .gitignore, .github at the top) is not signed, only listed.
#
# Promises: with a key, nothing of an archive is decompressed before its signature is proven, and what is restored is
# what was signed. Never: takes a trusted key from the archive or from beside it by itself.
# ======================================================================================

SIGNATURE, SIGNATURE_PATH = ".sig", f"{WORK_DIR}/model.sig"
OMS_PREDICATE, OMS_BUNDLE = "https://model_signing/signature/v1.0", "application/vnd.dev.sigstore.bundle.v0.3+json"
DSSE_TYPE = "application/vnd.in-toto+json"
OMS_IGNORED = (".git", ".gitattributes", ".github", ".gitignore", WORK_DIR, ".cache")

# Hash of a signature by the curve of its key, which the DER of a public key begins with (in base64)
CURVES = {
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE": "sha256",  # P-256
    "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAE": "sha384",  # P-384
    "MIGbMBAGByqGSM49AgEGBSuBBAAjA4GGAAQ": "sha512",  # P-521
}


@dataclass(frozen=True)
class Signed:
    """What a proven signature says: files that were signed (path -> SHA-256), paths it leaves out, and who signed."""

    files: Mapping[str, str]
    ignored: Tuple[str, ...]
    fingerprint: str


def public_key(key: Path, private: bool = False) -> Tuple[str, str]:
    """(the hash it signs, the fingerprint of the public key) of a key file. Raises UsageError for another curve."""
    done = run_program(["openssl", "pkey", "-in", str(key), "-pubout", *([] if private else ["-pubin"])])
    body = "".join(done.out.split("\n")[1:-2])
    hashes = [name for start, name in CURVES.items() if body.startswith(start)]
    if done.code or not hashes:
        why = done.err.strip() or "it is no ECDSA key on the curve P-256, P-384 or P-521"
        make = "openssl ecparam -name prime256v1 -genkey -noout -out KEY; openssl pkey -in KEY -pubout -out PUB"
        raise UsageError(f"{key} is no {'private' if private else 'public'} key that can be used", why, make)
    return hashes[0], hashlib.sha256(done.out.encode()).hexdigest()


def _signed_bytes(payload: bytes) -> bytes:
    return f"DSSEv1 {len(DSSE_TYPE)} {DSSE_TYPE} {len(payload)} ".encode() + payload


def sign_manifest(manifest: Manifest, key: Path) -> str:
    """The bundle for a manifest."""
    hashed, fingerprint = public_key(key, private=True)
    files = [entry for entry in manifest.files if entry.path.split("/")[0] not in OMS_IGNORED]
    digests = b"".join(bytes.fromhex(entry.sha256) for entry in files)
    options = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(OMS_IGNORED)}
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": manifest.name, "digest": {"sha256": hashlib.sha256(digests).hexdigest()}}],
        "predicateType": OMS_PREDICATE,
        "predicate": {
            "serialization": options,
            "resources": [{"name": e.path, "algorithm": "sha256", "digest": e.sha256} for e in files],
        },
    }
    payload = json.dumps(statement, ensure_ascii=False).encode()
    done = run_program(["openssl", "dgst", f"-{hashed}", "-hex", "-sign", str(key)], _signed_bytes(payload))
    if done.code:
        raise UsageError(f"cannot sign with {key}", done.err.strip(), "give another --sign KEY.pem")
    signature = base64.b64encode(bytes.fromhex(done.out.split()[-1])).decode()
    bundle = {
        "mediaType": OMS_BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": DSSE_TYPE,
            "signatures": [{"sig": signature, "keyid": ""}],
        },
    }
    return json.dumps(bundle) + "\n"


def prove_signature(path: Path, key: Path) -> Signed:
    """What the bundle at `path` says, proven with a public key. Raises IntegrityError."""
    hashed, fingerprint = public_key(key)
    next_step = "get the signature and the public key again from who packed the model"
    try:
        bundle = json.loads(path.read_bytes())
        if bundle["mediaType"] != OMS_BUNDLE or "publicKey" not in bundle.get("verificationMaterial", ()):
            raise ValueError("it is no bundle of a signature by a plain key")
        envelope = bundle["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        with tempfile.NamedTemporaryFile() as stream:
            stream.write(signature)
            stream.flush()
            argv = ["openssl", "dgst", f"-{hashed}", "-verify", str(key), "-signature", stream.name]
            if envelope["payloadType"] != DSSE_TYPE or run_program(argv, _signed_bytes(payload)).code:
                raise ValueError(f"it was not made with this key, whose fingerprint is {fingerprint}")
        return Signed(*_read_statement(json.loads(payload)), fingerprint)
    except FileNotFoundError as exc:
        why = "a signature is asked for by --key or HFSHIP_KEY"
        raise IntegrityError(f"{path} is missing", why, next_step) from exc
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as exc:
        raise IntegrityError(f"{path} is no valid signature", str(exc), next_step) from exc


def _read_statement(statement: Any) -> Tuple[Mapping[str, str], Tuple[str, ...]]:
    """Signed files and ignored paths of a statement that OMS 1.0 would accept."""
    predicate = statement["predicate"]
    form, resources = predicate["serialization"], predicate["resources"]
    if statement["predicateType"] != OMS_PREDICATE or form["method"] != "files":
        raise ValueError(f"it signs by {statement['predicateType']} {form['method']}, not {OMS_PREDICATE} files")
    if any(resource["algorithm"] != "sha256" for resource in resources):
        raise ValueError("a file was not hashed with SHA-256")
    digests = b"".join(bytes.fromhex(resource["digest"]) for resource in resources)
    if [subject["digest"]["sha256"] for subject in statement["subject"]] != [hashlib.sha256(digests).hexdigest()]:
        raise ValueError("the digest of all files is wrong")
    files = {resource["name"]: resource["digest"] for resource in resources}
    return files, (*OMS_IGNORED, *map(str, form.get("ignore_paths", ())))


def require_signed(manifest: Manifest, signed: Signed, where: Path) -> None:
    """Raise IntegrityError unless a manifest lists just what was signed."""
    listed = {entry.path: entry.sha256 for entry in manifest.files}
    left_out = [i + "/" for i in signed.ignored]
    ignored = [p for p in listed if any((p + "/").startswith(i) for i in left_out) and p not in signed.files]
    wrong = sorted(p for p in {*listed, *signed.files} - {*ignored} if listed.get(p) != signed.files.get(p))
    if wrong:
        why = f"other than signed, not signed, or missing: {shorten(wrong)}"
        raise IntegrityError(f"{where} is not what was signed", why, "get the archive and its signature again")


def open_trusted(
    files: ArchiveFiles, key: Optional[Path], media: Optional[MediaChange] = None
) -> Tuple[Union[Archive, Foreign], Optional[Signed]]:
    """Open an archive, of whatever program; with a key, or HFSHIP_KEY, only once its signature is proven, and only if
    it holds what was signed."""
    key = key or trusted_key()
    signed = prove_signature(files.folder / (files.name + SIGNATURE), key) if key else None
    try:
        archive = open_archive(files, media)
    except ForeignArchive as exc:  # left before its stream is read, since it holds on to what was
        if signed:
            raise IntegrityError(exc.what, "its signature can be proven only for archives of hfship") from exc
        stream = exc.stream
    else:
        if signed and archive.manifest:
            require_signed(archive.manifest, signed, files.path)
        return archive, signed
    return Foreign(files, stream), None


def trusted_key() -> Optional[Path]:
    """The public key that this site asks every archive to be signed with."""
    found = os.environ.get("HFSHIP_KEY")
    return Path(found) if found else None


# ======================================================================================
# §13 Model facts
#
# Owns what serving must know about a model: shape, precision, quantisation, context length, bytes of weights. All of
# it is read from the model folder: config.json, the headers of the safetensors files, the tokenizer's settings.
# Promises: names the file that is missing or cut short before a GPU is touched. A header is data from outside: every
# number in it is checked against the size of its file. Never: loads a tensor, runs a model's own code, asks a network.
# ======================================================================================

SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit (MAX_HEADER_SIZE in safetensors)
WEIGHTS_INDEX = "model.safetensors.index.json"
BRING_AGAIN = "fetch or unpack the model again"

_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?$")
_SHARD = re.compile(r"-\d{5}-of-0(\d{4})\.safetensors$")

# Folders that hold something else than a model that vLLM can serve: file -> what it is.
_NOT_SERVABLE = {
    "model_index.json": "is a diffusers pipeline",
    "adapter_config.json": "is a LoRA adapter, not a whole model",
}

# What a config leaves out when it equals its model type's default; vLLM fills it in from transformers' classes.
_TYPE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"head_dim": 256, "sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072, "sliding_window_pattern": 6,
    },
    "llama4_text": {"no_rope_layer_interval": 4},
}  # fmt: skip

# The keys under which vLLM looks for the context length (vllm/config: _get_and_verify_max_len), smallest wins.
_LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
    "max_sequence_length", "max_seq_length", "seq_len", "model_max_length",
)  # fmt: skip
_KV_HEAD_KEYS = (
    "n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups"
)  # fmt: skip
# Rope types whose max_position_embeddings is already the stretched length.
_ROPE_ALREADY_SCALED = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn"})
MOST_LENGTH = 2**31  # tokens; what a config says beyond that is no length


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised. `group`: input channels per scale (AWQ, GPTQ); `block`: rows x columns per scale."""

    method: str
    bits: int = 0
    group: int = 0
    block: Tuple[int, ...] = ()
    fp8_kv_cache: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What serving needs to know about a model. A number that the model does not tell is 0."""

    architecture: str
    model_type: str
    layers: int
    full_layers: int  # attention over the whole context
    window_layers: int  # attention over the last `window` tokens
    window: int
    heads: int
    kv_heads: int
    head_dim: int
    mla_dim: int  # latent KV values per token and layer (DeepSeek's MLA); 0: ordinary attention
    hidden: int
    intermediate: int
    moe_intermediate: int
    experts: int
    experts_per_token: int
    vocab: int
    dtype: str
    max_length: int
    weight_bytes: int
    quantization: Optional[Quantization] = None
    remote_code: Tuple[str, ...] = ()  # classes of auto_map
    chat_template: bool = True
    embeds: bool = False  # answers /v1/embeddings, not completions
    pickled: bool = False  # weights are pickles: loading them can run code
    tiktoken: bool = False  # brings the encodings that gpt-oss needs offline


# ---- safetensors headers -------------------------------------------------------------


def tensor_bytes(header: bytes, data_size: int) -> Mapping[str, int]:
    """Bytes per dtype that a safetensors header describes, for a file with `data_size` bytes after the header.

    The tensors must fill the file without gap or overlap, as the format demands. Raises ValueError.

    >>> tensor_bytes(b'{"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}', 4)
    {'BF16': 4}
    """
    try:
        tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
        spans = sorted((t["data_offsets"][0], t["data_offsets"][1], str(t["dtype"])) for t in tensors)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as exc:
        raise ValueError(f"the header is not a safetensors header ({type(exc).__name__})") from exc
    totals: Dict[str, int] = {}
    end = 0
    for start, stop, dtype in spans:
        if type(start) is not int or type(stop) is not int or start != end or stop < start:
            raise ValueError(f"the header has a gap or an overlap at byte {end}")
        totals[dtype] = totals.get(dtype, 0) + stop - start
        end = stop
    if end > data_size:
        raise ValueError(f"the file is cut: {human_bytes(end - data_size)} are missing")
    if end < data_size:
        raise ValueError(f"{human_bytes(data_size - end)} follow the last tensor")
    return totals


def read_tensor_bytes(path: Path) -> Mapping[str, int]:
    """Bytes per dtype of one safetensors file: 8 bytes with the header's length, the header as JSON, the tensors.

    Raises IntegrityError that names the file.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise ValueError(f"the file has {size} bytes, less than a safetensors header")
            length = int.from_bytes(stream.read(8), "little")
            if length > SAFETENSORS_HEADER_LIMIT:
                raise ValueError(f"the header claims {length} bytes: not a safetensors file")
            if length > size - 8:
                raise ValueError(f"the file is cut: its header has {length} bytes, the whole file {size}")
            return tensor_bytes(stream.read(length), size - 8 - length)
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    except ValueError as exc:
        raise IntegrityError(f"{path} is damaged", str(exc), BRING_AGAIN) from exc


# ---- config.json ---------------------------------------------------------------------


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of `keys` that holds a positive whole number, else 0.

    >>> _number({"a": None, "b": "8", "c": True, "d": 8}, "a", "b", "c", "d")
    8
    """
    for key in keys:
        value: Any = config.get(key)
        if type(value) in (int, float) and 0 < value < 1e18 and value == int(value):
            return int(value)
    return 0


def _table(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The first of `keys` that holds a table, else an empty one."""
    return next((config[key] for key in keys if isinstance(config.get(key), dict)), {})


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model, completed by its type's defaults."""
    part = _table(config, "text_config", "llm_config", "language_config", "thinker_config") or config
    part = _table(part, "text_config") or part
    defaults = _TYPE_DEFAULTS.get(str(part.get("model_type")), {})
    return {**defaults, **{key: value for key, value in part.items() if value is not None}}


def attention_layers(text: Mapping[str, Any], layers: int) -> Tuple[int, int]:
    """(layers with full attention, layers with windowed attention). The rest (Mamba, linear) keep a fixed state.

    >>> attention_layers({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128}, 2)
    (1, 1)
    >>> attention_layers({"full_attention_interval": 4}, 48)
    (12, 0)
    >>> attention_layers({"sliding_window_pattern": "LLLG", "sliding_window": 4096}, 32)
    (8, 24)
    """
    kinds, window = text.get("layer_types"), window_of(text)
    every = _number(text, "full_attention_interval", "attn_layer_period")
    if isinstance(kinds, list) and kinds:
        windowed = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds[:layers])
        full = sum(kind in ("full_attention", "attention") for kind in kinds[:layers])
        return (full, windowed) if window else (full + windowed, 0)
    if every:
        return layers // every, 0
    if isinstance(text.get("hybrid_override_pattern"), str):
        return text["hybrid_override_pattern"].count("*"), 0
    if not window:
        return layers, 0
    pattern, ropes = text.get("sliding_window_pattern"), text.get("no_rope_layers")
    interval = _number(text, "no_rope_layer_interval", "sliding_window_pattern")
    if isinstance(ropes, list) and ropes:  # Llama 4: 1 where a layer has a position encoding, and looks at a chunk
        full = sum(not rope for rope in ropes[:layers])
    elif isinstance(pattern, str) and pattern:  # EXAONE 4: L looks at a window, G at all
        full = sum(pattern[i % len(pattern)] == "G" for i in range(layers))
    elif interval:
        full = layers // interval
    else:
        # Qwen2 counts the full layers that come first; elsewhere a window is for every layer (Mistral 7B, Phi-3).
        full = min(layers, _number(text, "max_window_layers")) if text.get("use_sliding_window") else 0
    return full, layers - full


def window_of(text: Mapping[str, Any]) -> int:
    """Tokens that windowed layers look back; 0 when there is no window (Qwen2 ships one that is switched off)."""
    return 0 if text.get("use_sliding_window") is False else _number(text, "sliding_window", "attention_chunk_size")


def longest_context(text: Mapping[str, Any]) -> int:
    """The context length that vLLM derives, 0 when the config does not tell.

    >>> longest_context({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}})
    8192
    >>> longest_context({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    131072
    >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> longest_context({"max_position_embeddings": 32768, "rope_scaling": yarn})
    131072
    """
    lengths = [_number(text, key) for key in _LENGTH_KEYS if _number(text, key)]
    rope = _table(text, "rope_scaling", "rope_parameters")
    rope = _table(rope, "full_attention") or rope
    factor: Any = rope.get("factor")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    original = _number(rope, "original_max_position_embeddings") if kind == "yarn" else 0
    lengths = [original] if original else lengths  # whatever the other keys say
    scaled = kind in _ROPE_ALREADY_SCALED and not original
    usable = isinstance(factor, (int, float)) and 0 < factor < MOST_LENGTH
    if not usable or scaled or "gemma3" in str(text.get("model_type")):
        factor = 1
    return int(min(min(lengths) * factor, MOST_LENGTH)) if lengths else 0


def quantization_of(config: Mapping[str, Any]) -> Optional[Quantization]:
    """The quantisation that config.json declares: fp8, awq, gptq, compressed-tensors, modelopt, mxfp4, ..."""
    raw = _table(config, "quantization_config", "compression_config")
    raw = raw or _table(text_config(config), "quantization_config")
    raw = {**raw, **_table(raw, "quantization")}  # ModelOpt nests once more
    if not raw:
        return None
    groups = [group for group in _table(raw, "config_groups").values() if isinstance(group, dict)]
    weights = _table(groups[0], "weights") if groups else {}
    block = raw.get("weight_block_size") or weights.get("block_structure")
    return Quantization(
        method=str(raw.get("quant_method") or raw.get("quant_algo") or "unknown").lower(),
        bits=_number(raw, "bits", "w_bit", "num_bits") or _number(weights, "num_bits"),
        group=_number(raw, "group_size", "q_group_size") or _number(weights, "group_size"),
        block=tuple(n for n in block if type(n) is int and n > 0) if isinstance(block, list) else (),
        fp8_kv_cache=_number(_table(raw, "kv_cache_scheme"), "num_bits") == 8
        or raw.get("kv_cache_quant_algo") == "FP8",
    )


def facts_from_config(config: Mapping[str, Any], tensors: Mapping[str, int], **found: Any) -> ModelFacts:
    """Facts from config.json and the bytes per dtype of the weights; `found` are the facts of other files."""
    text = text_config(config)
    names = config.get("architectures") or text.get("architectures")
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    full, windowed = attention_layers(text, layers)
    latent = _number(text, "kv_lora_rank")
    dtypes = [part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype")]
    stored = max((name for name in tensors if name in _DTYPE_NAMES), key=lambda name: tensors[name], default="")
    dtypes.append(_DTYPE_NAMES.get(stored, ""))
    return ModelFacts(
        architecture=str(names[0]) if isinstance(names, list) and names else "",
        model_type=str(config.get("model_type") or ""),
        layers=layers,
        full_layers=full,
        window_layers=windowed,
        window=window_of(text) if windowed else 0,
        heads=heads,
        kv_heads=_number(text, *_KV_HEAD_KEYS) or heads,
        head_dim=_number(text, "head_dim") or (hidden // heads if heads else 0),
        # index_head_dim: DeepSeek V3.2 keeps the keys of its indexer beside the latent
        mla_dim=latent + _number(text, "qk_rope_head_dim") + _number(text, "index_head_dim") if latent else 0,
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden,
        moe_intermediate=_number(text, "moe_intermediate_size"),
        experts=_number(text, "num_local_experts", "num_experts", "n_routed_experts"),
        experts_per_token=_number(text, "num_experts_per_tok", "experts_per_token"),
        vocab=_number(text, "vocab_size"),
        dtype=next(d for d in dtypes if isinstance(d, str)).replace("torch.", ""),
        max_length=longest_context(text),
        weight_bytes=sum(tensors.values()),
        quantization=quantization_of(config),
        remote_code=tuple(sorted(v for v in _table(config, "auto_map").values() if isinstance(v, str))),
        **found,
    )


# ---- reading the folder --------------------------------------------------------------


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON table from a model's folder; {} when the file does not exist. Raises IntegrityError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(f"{path} is not JSON", str(exc), BRING_AGAIN) from exc
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} is not a JSON table", "", BRING_AGAIN)
    return value


def read_facts(folder: Path, allow_changed: Sequence[str] = ()) -> ModelFacts:
    """The facts of the model in `folder`, of which files named in `allow_changed` may differ from the manifest.

    Raises NotFoundError (no model), IntegrityError (a file is missing or damaged), HostError (nothing vLLM serves).
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}", "", BRING_AGAIN)
    for name, reason in _NOT_SERVABLE.items():
        if (folder / name).exists() and not (folder / "config.json").exists():
            raise HostError(f"{folder} cannot be served", f"it {reason}", "serve the base model it belongs to")
    require_complete(folder, allow_changed)
    weights = weight_files(folder)
    config = read_json(folder / "config.json")
    if not config:
        raise NotFoundError(f"{folder} is not a model", "it has no config.json", BRING_AGAIN)
    modelopt = read_json(folder / "hf_quant_config.json")
    if modelopt and not config.get("quantization_config"):
        config = {**config, "quantization_config": modelopt}
    pickled = weights[0].suffix != ".safetensors"
    tensors: Dict[str, int] = {}
    for path in weights:
        for dtype, size in ({"pickle": path.stat().st_size} if pickled else read_tensor_bytes(path)).items():
            tensors[dtype] = tensors.get(dtype, 0) + size
    names = {path.name for path in folder.iterdir()}
    templates = {"chat_template.jinja", "chat_template.json", "additional_chat_templates"} & names
    facts = facts_from_config(
        config,
        tensors,
        chat_template=bool(templates) or "chat_template" in read_json(folder / "tokenizer_config.json"),
        embeds="modules.json" in names and any("Pooling" in name for name in names),
        pickled=pickled,
        tiktoken="o200k_base.tiktoken" in names,
    )
    # What sentence-transformers cuts to is the limit for vLLM too (config.get_sentence_transformer_tokenizer_config).
    cut = _number(read_json(folder / "sentence_bert_config.json"), "max_seq_length")
    return replace(facts, max_length=min(cut, facts.max_length)) if cut else facts


def require_complete(folder: Path, allow_changed: Sequence[str] = ()) -> None:
    """Every file of the manifest must be there in its full size: cheap, and catches an unpack that was cut short.

    A site may change the files that it names, weights never. A link that leaves the folder is refused: it dangles
    inside the container, which sees this folder alone.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        require_finished(folder)
    for entry in manifest.files if manifest else ():
        path = folder / entry.path
        size = path.stat().st_size if path.exists() else -1
        changeable = size >= 0 and not _WEIGHTS.search(entry.path)
        if size != entry.size and not (changeable and entry.path in allow_changed):
            why = f"it has {size} bytes instead of {entry.size}" if size >= 0 else "the manifest lists it"
            what = f"{path} is {'changed' if changeable else 'damaged' if size >= 0 else 'missing'}"
            allow = command_line("hfship", "serve", folder, "--allow-changed", entry.path)
            edited = f"if you edited it: {allow}\nif not: "
            raise IntegrityError(what, why, edited * changeable + command_line("hfship", "verify", folder))
    for path in folder.iterdir():
        if path.is_symlink() and folder.resolve() not in path.resolve().parents:
            why = f"{path.name} is a link to {os.readlink(path)}, which the container cannot see"
            step = f"{command_line('cp', '-rL', folder)} NEW-FOLDER, then serve that"
            raise HostError(f"{folder} cannot be served", why, step)


def weight_files(folder: Path) -> Sequence[Path]:
    """The weight files that vLLM loads: safetensors, or pickles where there are none.

    With an index, only what it names: repositories also carry copies in other layouts (consolidated*.safetensors).
    """
    index = _table(read_json(folder / WEIGHTS_INDEX), "weight_map")
    here = [p.name for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated")]
    names = sorted(set(map(str, index.values())) or whole_series(here))
    for name in names:
        try:
            check_relative_path(name)
        except ValueError as exc:
            raise IntegrityError(f"{folder / WEIGHTS_INDEX} is not valid", str(exc), BRING_AGAIN) from exc
        if not (folder / name).is_file():
            why = "the index names it" if index else "the other shards of the series are there"
            raise IntegrityError(f"{folder / name} is missing", why, BRING_AGAIN)
    pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("*.pt"))
    if not names and not pickles and any(folder.glob("*.gguf")):
        next_step = "fetch the repository that has safetensors"
        raise HostError(f"{folder} cannot be served", "it has GGUF weights only", next_step)
    if not names and not pickles:
        raise NotFoundError(f"{folder} is not a model", "it has no *.safetensors", BRING_AGAIN)
    return [folder / name for name in names] or pickles


def whole_series(names: Iterable[str]) -> Set[str]:
    """All shards of the series that `names` belong to, whether they are there or not.

    >>> sorted(whole_series(["model-00002-of-00002.safetensors"]))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    whole = set(names)
    for name in list(whole):
        match = _SHARD.search(name)
        total = int(match[1]) if match else 0
        whole.update(_SHARD.sub(f"-{i:05d}-of-{total:05d}.safetensors", name) for i in range(1, total + 1))
    return whole


# ======================================================================================
# §14 Plan
#
# Owns the decision how a model is served: which image, which GPUs, split over how many, how much context. Facts, host
# and options in; a Plan out, or a HostError that says why not and which nearest plan works.
# Promises: pure, so that any machine can plan for any other; the same input gives the same plan. Estimates lean to the
# safe side by some 10 %; vLLM's own numbers are read from its log once it runs.
# Never: asks docker or a GPU anything.
# ======================================================================================

GIB = 1 << 30
USEFUL_LENGTH = 32768  # tokens; a smaller split is preferred once it holds this much context
LEAST_LENGTH = 2048  # tokens; below, a deployment is of no use
LENGTH_STEP = 1024
LOADING_S = 3600  # that a container may take to load; a shorter --timeout shortens our patience, not its
PORTS = range(8000, 9000)

CUDA_SEES = 0.995  # of nvidia-smi's memory.total; measured 0.9957 on an H200 (the driver reserves the rest)
CONTEXT_BYTES = int(0.7 * GIB)  # CUDA context per process
NCCL_BYTES = int(0.7 * GIB)  # buffers between GPUs, only with tensor parallelism
GRAPH_BYTES = GIB  # CUDA graphs: 0.5 to 2 GiB
UNEVEN_SPLIT = 1.03  # norms, latent projections and the like are replicated on every GPU
CPU_RUNTIME_BYTES = 3 * GIB  # measured: a container with a tiny model takes 2.4 GiB
CPU_IN_FLIGHT = 2048  # tokens per batch, vLLM's default on CPUs

FLOAT32 = ("float32", "float")  # as vLLM's --dtype spells it
DTYPES = ("auto", "bfloat16", "float16", "half", *FLOAT32)
KV_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla")

Version = Tuple[int, int, int]
Capability = Tuple[int, int]  # NVIDIA's compute capability
HYBRID_KV: Version = (0, 10, 0)  # from here on windowed layers keep their window only
NEWEST: Version = (99, 0, 0)  # stands for "unknown, taken for the newest"

# (quantisation method, vLLM before this version, least capability): get_min_capability in vLLM 0.12, 0.17, 0.27 and
# 0.32. A method that is not here runs wherever vLLM does.
_LEAST_CAPABILITY: Sequence[Tuple[str, Version, Capability]] = (
    ("fp8", (0, 17, 0), (8, 0)),
    ("fp8", (100, 0, 0), (7, 5)),
    ("modelopt", (100, 0, 0), (7, 5)),
    ("mxfp4", (100, 0, 0), (8, 0)),
    ("awq", (100, 0, 0), (7, 5)),
)
# Least driver (major) per CUDA (major) of the image: NVIDIA's CUDA compatibility table.
_LEAST_DRIVER = {12: 525, 13: 580}

# GPUs for advice and --assume-gpus: name, memory.total of nvidia-smi in MiB, compute capability; smallest first.
_KNOWN_GPUS: Sequence[Tuple[str, int, Capability]] = (
    ("T4 16 GB", 15360, (7, 5)),
    ("L4 24 GB", 23034, (8, 9)),
    ("L40S 48 GB", 46068, (8, 9)),
    ("H100 80 GB", 81559, (9, 0)),
    ("A100 80 GB", 81920, (8, 0)),
    ("H20 96 GB", 97871, (9, 0)),
    ("H200 141 GB", 143771, (9, 0)),
    ("B200 180 GB", 183359, (10, 0)),
)

# flag -> vLLM versions [since, until) that know it, and what to write instead outside of them. Found by bisecting
# vLLM's releases 0.8.3 to 0.33; a flag that is not here exists in all of them.
_ALWAYS, _NEVER = (0, 0, 0), (100, 0, 0)
FLAGS: Mapping[str, Tuple[Version, Version, str]] = {
    "--disable-log-requests": (_ALWAYS, (0, 17, 0), "nothing: requests are not logged by default"),
    "--enable-log-requests": ((0, 10, 2), _NEVER, ""),
    "--enable-reasoning": (_ALWAYS, (0, 10, 0), "--reasoning-parser NAME alone"),
    "--guided-decoding-backend": (_ALWAYS, (0, 12, 0), "--structured-outputs-config"),
    "--task": (_ALWAYS, (0, 13, 0), "--runner and --convert"),
    "--swap-space": (_ALWAYS, (0, 18, 0), "--cpu-offload-gb"),
    "--device": (_ALWAYS, (0, 10, 0), "nothing: the image decides"),
    "--num-scheduler-steps": (_ALWAYS, (0, 10, 2), "nothing: scheduling became asynchronous"),
    "--max-seq-len-to-capture": (_ALWAYS, (0, 11, 1), "--compilation-config"),
    "--rope-scaling": (_ALWAYS, (0, 11, 1), "--hf-overrides"),
    "--kv-cache-memory-bytes": ((0, 10, 2), _NEVER, "--gpu-memory-utilization"),
    "--runner": ((0, 10, 0), _NEVER, "--task"),
    "--nnodes": ((0, 11, 1), _NEVER, "an image from 0.11.1 on"),
    "--enable-offline-docs": ((0, 14, 0), _NEVER, ""),
    "--disable-access-log-for-endpoints": ((0, 16, 0), _NEVER, ""),
    "--shutdown-timeout": ((0, 18, 0), _NEVER, ""),
    "--max-num-queued-reqs": ((0, 30, 0), _NEVER, ""),
    "--sse-keep-alive-interval": ((0, 30, 0), _NEVER, ""),
}
# Flags of vLLM that hfship alone sets.
RESERVED_FLAGS = ("--api-key", "--host", "--port", "--model", "--served-model-name", "--tensor-parallel-size", "-tp")
KEY_VARIABLE = "VLLM_API_KEY"


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it; memory in bytes."""

    index: int
    uuid: str
    name: str
    total: int
    used: int = 0
    capability: Capability = (0, 0)  # (0, 0): unknown
    driver: str = ""
    mig: bool = False
    spoken_for: bool = False  # by a deployment that does not run now

    @property
    def label(self) -> str:
        return f"GPU {self.index} ({self.name}, {human_bytes(self.total)})"


@dataclass(frozen=True)
class Image:
    """A docker image with vLLM. `version` is vLLM's; None: unknown. `cuda` and `cpu` say what it was built for."""

    reference: str
    id: str = ""
    version: Optional[Version] = None
    cpu: bool = False
    cuda: str = ""


@dataclass(frozen=True)
class Host:
    """What this machine offers. `gpu_problem` says why `gpus` is empty."""

    gpus: Tuple[Gpu, ...] = ()
    images: Tuple[Image, ...] = ()
    memory: int = 0  # bytes of RAM that models may take
    taken_ports: FrozenSet[int] = frozenset()
    gpu_problem: str = "nvidia-smi shows no GPU"


@dataclass(frozen=True)
class ServeOptions:
    """What the operator asked for. Empty, 0 and "auto" mean: decide for me."""

    served_names: Tuple[str, ...] = ()
    image: str = ""
    device: str = "auto"
    gpus: Tuple[str, ...] = ()  # indexes or UUIDs
    tensor_parallel_size: int = 0
    gpu_memory_utilization: float = 0.90
    max_model_len: int = 0
    max_num_seqs: int = 0
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    trust_remote_code: bool = False
    bind: str = "127.0.0.1"
    port: int = 0
    shm_size: str = ""
    ready_timeout_s: int = 3600
    env: Mapping[str, str] = field(default_factory=dict)
    extra_args: Tuple[str, ...] = ()
    aliases: Tuple[str, ...] = ()  # served names beside the usual ones
    allow_changed: Tuple[str, ...] = ()  # files that may differ from the manifest
    wishes: Mapping[str, Any] = field(default_factory=dict)  # the options as they were given, for the next serve


@dataclass(frozen=True)
class Plan(ServeOptions):
    """How one model is served: the options with the choices made, and what they rest on. It holds nothing secret.

    A max_model_len or max_num_seqs of 0 is left to vLLM."""

    name: str = ""
    model_dir: str = ""
    image_id: str = ""
    version: Version = NEWEST
    embeds: bool = False
    gpu_names: Tuple[str, ...] = ()
    weight_bytes: int = 0
    kv_bytes: int = 0  # per GPU
    concurrency: float = 0.0  # requests of full length that the KV cache holds
    warnings: Tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where clients on this machine reach the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)
        return f"http://[{host}]:{self.port}/v1" if ":" in host else f"http://{host}:{self.port}/v1"


# ---- the host, from what programs print ----------------------------------------------

NVIDIA_SMI_FIELDS = "index,uuid,name,memory.total,memory.used,compute_cap,driver_version,mig.mode.current"


def parse_nvidia_smi(text: str) -> Tuple[Gpu, ...]:
    """The GPUs in `nvidia-smi --query-gpu=NVIDIA_SMI_FIELDS --format=csv,noheader,nounits`.

    Unknown values come as [N/A] and the like; a line that is not a GPU (a lost one, say) is passed over.
    """
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 8 or not cells[0].isdecimal() or not cells[1].startswith("GPU-"):
            continue
        index, uuid, name, *memory, capability, driver, mig = cells
        total, used = (int(c) << 20 if re.match(r"\d{1,9}$", c, re.ASCII) else 0 for c in memory)
        known = re.match(r"(\d{1,3})\.(\d{1,3})$", capability, re.ASCII)
        numbers = (int(known[1]), int(known[2])) if known else (0, 0)
        driver = driver if driver[:1].isdigit() else ""
        gpus.append(Gpu(int(index), uuid, name, total, used, numbers, driver, mig == "Enabled"))
    return tuple(gpus)


def assumed_gpus(text: str) -> Tuple[Gpu, ...]:
    """GPUs of a machine that is planned for from afar, like 2x80GB or 2xH100.

    >>> [gpu.label for gpu in assumed_gpus("2x80GB") + assumed_gpus("1xh100")]
    ['GPU 0 (assumed, 80.0 GB)', 'GPU 1 (assumed, 80.0 GB)', 'GPU 0 (H100 80 GB, 85.5 GB)']
    """
    match = re.match(r"([1-9]\d?)x(.+)$", text, re.ASCII)
    if not match:
        raise UsageError(f"{text!r} is not a set of GPUs", "", "write it like 2x80GB or 2xH100")
    known = {name.split()[0]: Gpu(0, "", name, mib << 20, 0, can) for name, mib, can in _KNOWN_GPUS}
    card = known.get(match[2].upper()) or Gpu(0, "", "assumed", parse_size(match[2]))
    return tuple(replace(card, index=i, uuid=f"GPU-assumed-{i}") for i in range(int(match[1])))


# ---- images --------------------------------------------------------------------------


def parse_version(text: str) -> Optional[Version]:
    """The version in an image tag or in what `vllm --version` prints.

    >>> parse_version("v0.8.3"), parse_version("0.32.0+cpu"), parse_version("v0.11.0rc2-cu129"), parse_version("latest")
    ((0, 8, 3), (0, 32, 0), (0, 11, 0), None)
    """
    match = re.search(r"(?:^|[^\d.])v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?!\d)", text, re.ASCII)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def version_text(version: Version) -> str:
    """The version for people."""
    return "unknown" if version == NEWEST else ".".join(map(str, version))


def parse_images(text: str) -> Tuple[Image, ...]:
    """The vLLM images in the lines of `docker image ls --no-trunc --format '{{json .}}'`; other devices are left out.

    >>> parse_images('{"Repository": "vllm/vllm-openai", "Tag": "v0.8.3", "ID": "sha256:1"}')
    (Image(reference='vllm/vllm-openai:v0.8.3', id='sha256:1', version=(0, 8, 3), cpu=False, cuda=''),)
    """
    images = []
    for row in (json.loads(line) for line in text.splitlines() if line.startswith("{")):
        repository, tag = row.get("Repository", ""), row.get("Tag", "")
        last = f"{repository.rpartition('/')[2]}:{tag}"
        if "vllm" in last.partition(":")[0] and not re.search("<none>|rocm|tpu|xpu|hpu|gaudi|neuron", last):
            images.append(image_called(f"{repository}:{tag}", row.get("ID", "")))
    return tuple(images)


def image_called(reference: str, image_id: str) -> Image:
    """What the name of an image tells of it."""
    last = reference.rpartition("/")[2]
    cpu = bool(re.search(r"(^|[-_:.])cpu([-_:.]|$)", last))
    return Image(reference, image_id, parse_version(last.partition(":")[2]), cpu)


def choose_device(options: ServeOptions, host: Host) -> str:
    """ "gpu" or "cpu". CPU only when asked for, or when there is no GPU and every vLLM image here is built for CPUs.

    Raises HostError where a GPU is wanted and none is there.
    """
    named = [image.cpu for image in host.images if image.reference == options.image]
    device = options.device
    if device == "auto" and options.image:
        device = "cpu" if any(named) else "gpu"
    elif device == "auto":
        device = "cpu" if not host.gpus and host.images and all(i.cpu for i in host.images) else "gpu"
    if device == "gpu" and not host.gpus:
        next_step = "install the NVIDIA driver and try nvidia-smi, or serve on the CPU with --device cpu"
        raise HostError("this machine has no GPU that can be used", host.gpu_problem, next_step)
    return device


def choose_image(images: Sequence[Image], wanted: Optional[str], device: str) -> Image:
    """The image asked for, or the newest one for the device; vLLM's own repository before look-alikes.

    Raises HostError that names what is there.
    """
    here = "here are: " + ", ".join(i.reference for i in images) if images else "docker has no vLLM image"
    if wanted:
        found = [i for i in images if wanted in (i.reference, i.id) or f"{wanted}:latest" == i.reference]
        what, bring = f"docker has no image {wanted}", wanted
    else:
        found = [i for i in images if i.cpu == (device == "cpu")]
        what = f"docker has no vLLM image for the {device.upper()}"
        bring = "vllm/vllm-openai-cpu:vX.Y.Z" if device == "cpu" else "vllm/vllm-openai:vX.Y.Z"
    if not found:
        there = f"where there is a network: docker pull {bring} && docker save -o image.tar {bring}"
        raise HostError(what, here, f"{there}\nhere: docker load -i image.tar, then the same command again")
    return max(found, key=lambda i: (i.version or (0, 0, 0), "vllm/vllm-openai" in i.reference, -len(i.reference)))


def least_capability(facts: ModelFacts, image: Image) -> Tuple[Capability, str]:
    """(compute capability that a GPU must have, what demands it)."""
    method, version = facts.quantization.method if facts.quantization else "", image.version or NEWEST
    needs = [((7, 0), "vLLM")] + [((7, 5), "CUDA 13")] * (cuda_of(image) >= (13, 0))
    needs += [(least, method) for wanted, before, least in _LEAST_CAPABILITY if wanted == method and version < before]
    return max(needs)


def require_capability(name: str, facts: ModelFacts, gpus: Sequence[Gpu], image: Image) -> None:
    """Refuse GPUs for which the image, or vLLM's kernels for the quantisation, were not built."""
    (least, who), cuda = least_capability(facts, image), cuda_of(image)
    for gpu in gpus:
        what = f"cannot serve {name} on {gpu.label}: compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        if (0, 0) < gpu.capability < least:
            next_step = "name newer GPUs with --gpus, or take a model with another quantisation"
            raise HostError(what, f"{who} needs compute capability {least[0]}.{least[1]}", next_step)
        if gpu.capability >= (10, 0) and (0, 0) < cuda < (12, 8):  # CUDA 12.8 is the first that knows Blackwell
            raise HostError(what, f"it needs CUDA 12.8, {image.reference} has {image.cuda}", "choose a newer --image")


def cuda_of(image: Image) -> Tuple[int, int]:
    """(major, minor) of the CUDA in an image, (0, 0) when unknown."""
    match = re.match(r"(\d+)\.(\d+)", image.cuda)
    return (int(match[1]), int(match[2])) if match else (0, 0)


# ---- will it split, will it fit ------------------------------------------------------


def as_loaded(facts: ModelFacts, version: Version, options: ServeOptions) -> ModelFacts:
    """The facts as this vLLM holds the model: before 0.10 windowed layers keep the whole context, and a 16-bit model
    that is to run in float32 takes twice the bytes."""
    if version < HYBRID_KV:
        facts = replace(facts, full_layers=facts.full_layers + facts.window_layers, window_layers=0)
    if options.dtype in FLOAT32 and facts.dtype in ("bfloat16", "float16") and not facts.quantization:
        facts = replace(facts, weight_bytes=2 * facts.weight_bytes)
    return facts


def split_problem(facts: ModelFacts, tp: int) -> str:
    """Why the model cannot be split over `tp` GPUs, "" when it can: vLLM's own divisibility rules."""
    if tp == 1:
        return ""
    if facts.heads % tp:
        return f"{facts.heads} attention heads are not divisible by {tp}"
    if not facts.mla_dim and facts.kv_heads and facts.kv_heads % tp and tp % facts.kv_heads:
        return f"{facts.kv_heads} KV heads cannot be spread over {tp} GPUs"
    if -(-facts.vocab // 64) * 64 % tp:  # vLLM pads the vocabulary to a multiple of 64
        return f"a vocabulary of {facts.vocab} does not divide by {tp}"
    quant = facts.quantization or Quantization("none")
    for size in filter(None, (facts.intermediate, facts.moe_intermediate)):
        if size % tp:
            return f"the MLP's {size} channels are not divisible by {tp}"
        if any(size // tp % block for block in quant.block):
            return f"the MLP's {size} channels over {tp} GPUs cut through the {max(quant.block)}-wide FP8 blocks"
        # MXFP4 is left out: its kernels pad
        if quant.group and quant.method != "mxfp4" and size // tp % quant.group:
            return f"the MLP's {size} channels over {tp} GPUs cut through {quant.method}'s groups of {quant.group}"
    rows = 0 if facts.mla_dim else max(1, facts.kv_heads // tp) * facts.head_dim  # of the K and V projections
    if any(rows % block for block in quant.block[:1]):
        return f"{rows} rows of KV heads per GPU cut through the {quant.block[0]}-wide FP8 blocks"
    return ""


def kv_bytes(facts: ModelFacts, tp: int, tokens: int, width: float, in_flight: int = 0) -> int:
    """Bytes of KV cache of one request with `tokens` tokens, on each of `tp` GPUs; `width` bytes per value.

    Windowed layers hold their window and the batch in flight, not the whole context. MLA keeps one latent per token,
    the same on every GPU. KV heads beyond the number of GPUs are divided, fewer are replicated.
    (vllm/v1/kv_cache_interface.py: FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec.)
    """
    per_layer = facts.mla_dim or 2 * max(1, facts.kv_heads // tp) * facts.head_dim
    held = min(facts.window + in_flight, tokens)
    return int(per_layer * width * (facts.full_layers * tokens + facts.window_layers * held))


def kv_width(facts: ModelFacts, options: ServeOptions) -> float:
    """Bytes per value of the KV cache: 1 for FP8, 2 for 16-bit, 4 for 32-bit models."""
    wanted = options.kv_cache_dtype
    if wanted.startswith("fp8") or (wanted == "auto" and facts.quantization and facts.quantization.fp8_kv_cache):
        return 1.0
    # vLLM casts 32-bit models to 16 bits unless told otherwise.
    return 4.0 if options.dtype in FLOAT32 else 2.0


def batch_limits(gpu_total: int) -> Tuple[int, int]:
    """(tokens in flight, sequences) that vLLM's defaults allow on a GPU of this size (vllm/engine/arg_utils.py)."""
    if gpu_total >= 160 * GIB:
        return 16384, 1024
    return (8192, 1024) if gpu_total >= 70 * GIB else (2048, 256)


@dataclass(frozen=True)
class Fit:
    """What one split gives: `length` tokens of context fit (0: none) into `kv` bytes of cache per GPU."""

    tp: int
    problem: str = ""
    kv: int = 0
    length: int = 0

    def __str__(self) -> str:
        return f"TP={self.tp}: " + (self.problem or f"holds {self.length} tokens")


def weights_per_gpu(facts: ModelFacts, tp: int) -> int:
    return int(facts.weight_bytes * (UNEVEN_SPLIT / tp if tp > 1 else 1))


def fit(facts: ModelFacts, tp: int, gpu_total: int, options: ServeOptions) -> Fit:
    """How the model fits on `tp` GPUs of `gpu_total` bytes each.

    Beside weights and cache a GPU holds: CUDA context, activations of the largest batch, the sampler's warm-up, CUDA
    graphs (what vLLM's profiling run measures: gpu_worker.determine_available_memory)."""
    problem = split_problem(facts, tp)
    if problem:
        return Fit(tp, problem)
    in_flight, sequences = batch_limits(gpu_total)
    width = max(facts.intermediate, facts.moe_intermediate * facts.experts_per_token)
    activations = in_flight * (4 * facts.hidden + 3 * width // tp) * 2
    sampler = (options.max_num_seqs or sequences) * facts.vocab * 8
    working = CONTEXT_BYTES + NCCL_BYTES * (tp > 1) + activations + sampler + GRAPH_BYTES
    usable, weights = int(gpu_total * CUDA_SEES * options.gpu_memory_utilization), weights_per_gpu(facts, tp)
    kv = usable - weights - working
    length = longest_fit(facts, tp, kv, options, in_flight)
    if not length:
        needed = f"{human_bytes(weights)} of weights and {human_bytes(working)} of working memory"
        problem = f"{needed} per GPU leave too little of {human_bytes(usable)} for a KV cache"
    return Fit(tp, problem, max(0, kv), length)


def longest_fit(facts: ModelFacts, tp: int, budget: int, options: ServeOptions, in_flight: int) -> int:
    """The longest request whose KV cache fits: vLLM demands that one of full length does. 0: not even a short one."""
    longest = min(max(facts.max_length or USEFUL_LENGTH, options.max_model_len), MOST_LENGTH)
    lengths = chain((longest,), range(longest // LENGTH_STEP * LENGTH_STEP, LEAST_LENGTH - 1, -LENGTH_STEP))
    width = kv_width(facts, options)
    return next((n for n in lengths if budget > 0 and kv_bytes(facts, tp, n, width, in_flight) <= budget), 0)


def fit_gpus(name: str, facts: ModelFacts, pool: Sequence[Gpu], options: ServeOptions) -> Fit:
    """The smallest split that holds what was asked for; without a wish a useful context, or else the longest.

    Raises HostError that names what would work.
    """
    fits = [fit(facts, tp, min(g.total for g in pool), options) for tp in range(1, len(pool) + 1)]
    works = [f for f in fits if f.length and options.tensor_parallel_size in (0, f.tp)]
    wanted = options.max_model_len or min(facts.max_length, USEFUL_LENGTH)
    enough = [f for f in works if f.length >= wanted]
    if not enough and (not works or options.max_model_len):
        raise refusal(name, facts, pool, fits, options)
    return enough[0] if enough else max(works, key=lambda f: (f.length, -f.tp))


def refusal(name: str, facts: ModelFacts, pool: Sequence[Gpu], fits: Sequence[Fit], options: ServeOptions) -> HostError:
    """The error for a model that does not fit as asked, with the nearest plans that do."""
    asked, total = options.tensor_parallel_size, min(g.total for g in pool)
    what = f"cannot serve {name} on {len(pool)} GPU{'s' * (len(pool) > 1)} of {human_bytes(total)}"
    what += f" with --tensor-parallel-size {asked}" if asked else ""
    what += f" with --max-model-len {options.max_model_len}" if options.max_model_len else ""
    shown = [f for f in fits if asked in (0, f.tp)]
    if not shown:
        shown = [Fit(asked, split_problem(facts, asked) or f"there are only {counted(len(pool), 'free GPU')}")]
    works = [f"--tensor-parallel-size {f.tp} --max-model-len {f.length}" for f in fits if f.length]
    # Beyond this machine: the smallest number of such GPUs that would do, or else other GPUs.
    wanted = options.max_model_len or min(facts.max_length, LEAST_LENGTH) or 1
    larger = (fit(facts, tp, total, options) for tp in range(len(pool) + 1, 17))
    more = next((f for f in larger if f.length >= wanted), None)
    others = (f"{tp} x {smallest_gpu(facts, tp, wanted, options)}" for tp in (1, 2, 4, 8))
    other = next((text for text in others if not text.endswith("-")), "no number of the GPUs that hfship knows")
    such = f"{counted(more.tp, 'such GPU')} (--tensor-parallel-size {more.tp}, {more.length} tokens)" if more else ""
    works.append(such or other)
    return HostError(what, "\n".join(map(str, shown)), "what works: " + "\n  or ".join(works))


def smallest_gpu(facts: ModelFacts, tp: int, length: int, options: ServeOptions) -> str:
    """The smallest of the known GPUs that run the model and `tp` of which hold `length` tokens; "-" when none does."""
    least = least_capability(facts, Image(""))[0]
    cards = ((name, mib << 20) for name, mib, capability in _KNOWN_GPUS if capability >= least)
    return next((name for name, total in cards if fit(facts, tp, total, options).length >= length), "-")


def sizing(facts: ModelFacts, options: ServeOptions) -> List[List[str]]:
    """Rows (split, weights per GPU, GPU for a short context, for the full one) for a machine still to be chosen."""
    full = options.max_model_len or facts.max_length or USEFUL_LENGTH
    rows = []
    for tp in (1, 2, 4, 8):
        weights = split_problem(facts, tp) or human_bytes(weights_per_gpu(facts, tp))
        rows.append([f"TP={tp}", weights, *(smallest_gpu(facts, tp, n, options) for n in (min(full, 8192), full))])
    return rows


def fit_cpu(name: str, facts: ModelFacts, memory: int, options: ServeOptions) -> Fit:
    """The fit in RAM: one process; a KV cache in whole GiB (so VLLM_CPU_KVCACHE_SPACE wants it) for a few requests of
    full length, as far as `memory` bytes go. Raises HostError."""
    full = options.max_model_len or facts.max_length or USEFUL_LENGTH
    wanted = kv_bytes(facts, 1, full, kv_width(facts, options), CPU_IN_FLIGHT)
    room = (memory - facts.weight_bytes - CPU_RUNTIME_BYTES) // GIB
    gib = min(max(1, -(-4 * wanted // GIB)), room)
    length = longest_fit(facts, 1, gib * GIB, options, CPU_IN_FLIGHT)
    if length < max(1, options.max_model_len):
        needed = human_bytes(facts.weight_bytes + CPU_RUNTIME_BYTES + GIB)
        why = f"it needs {needed} and more with its context; {length} tokens of context would fit"
        next_step = "free memory, or ask for less context with --max-model-len"
        raise HostError(f"cannot serve {name} on the CPU: {human_bytes(memory)} of RAM can be used", why, next_step)
    return Fit(1, "", gib * GIB, length)


# ---- GPUs ----------------------------------------------------------------------------


def gpu_pool(host: Host, options: ServeOptions, own: Sequence[str] = ()) -> Tuple[Tuple[Gpu, ...], Tuple[str, ...]]:
    """(the GPUs that may be used, warnings): those named, or all free ones of the most common kind.

    `own` are the UUIDs that this deployment already holds: their memory in use is its own, and they come first.
    Raises HostError when none is left. On the CPU there are none.
    """
    if options.device == "cpu":
        return (), ()
    gpus = [replace(g, total=g.total or host.memory, used=0 if g.uuid in own else g.used) for g in host.gpus]
    named = list(dict.fromkeys(_named_gpu(gpus, name) for name in options.gpus))
    problems = {gpu: _gpu_problem(gpu, options.gpu_memory_utilization) for gpu in named or gpus}
    pool = [gpu for gpu, problem in problems.items() if not problem]
    if not pool or (named and len(pool) < len(named)):
        raise _no_free_gpu(problems)
    if not named:
        kinds = [(g.name, g.total) for g in pool]
        kind = max(kinds, key=lambda k: (kinds.count(k), k[1]))
        problems.update({g: "differs from the others" for g in pool if (g.name, g.total) != kind})
        pool = [g for g in pool if not problems[g]]
    warnings = [f"{gpu.label} {problem} and is left out" for gpu, problem in problems.items() if problem]
    warnings += [f"{g.label} already has {human_bytes(g.used)} in use" for g in pool if g.used > GIB]
    if len({g.name for g in pool}) > 1:
        warnings.append("the GPUs differ; the smallest decides: " + ", ".join(g.label for g in pool))
    return tuple(sorted(pool, key=lambda g: (g.uuid not in own, g.spoken_for, g.index))), tuple(warnings)


def _gpu_problem(gpu: Gpu, utilization: float) -> str:
    """Why a GPU cannot be used now; "" when it can. vLLM refuses to start when less than its share is free."""
    if gpu.mig:
        return "has MIG enabled"
    busy = gpu.total * CUDA_SEES - gpu.used < gpu.total * CUDA_SEES * utilization
    return f"is in use ({human_bytes(gpu.used)})" if busy else ""


def _named_gpu(gpus: Sequence[Gpu], name: str) -> Gpu:
    found = [g for g in gpus if name == str(g.index) or (name.startswith("GPU-") and g.uuid.startswith(name))]
    if len(found) != 1:
        here = ", ".join(g.label for g in gpus)
        raise UsageError(f"--gpus {name} names no GPU of this machine", f"here are: {here}", "give indexes or UUIDs")
    return found[0]


def _no_free_gpu(problems: Mapping[Gpu, str]) -> HostError:
    what = "a GPU is not free" if "" in problems.values() else "no GPU is free"
    next_step = "stop what holds them (nvidia-smi names the processes; hfship status, the deployments)"
    busy = [g for g, problem in problems.items() if problem and g.total and not g.mig]
    room = max((1 - g.used / g.total for g in busy), default=0)
    if room > 0.15:
        next_step += f", or share: --gpu-memory-utilization {int(room * 100 - 3) / 100:.2f}"
    if all(g.mig for g in problems):
        next_step = "switch MIG off: nvidia-smi -mig 0 (as root, with the GPU idle)"
    return HostError(what, "\n".join(f"{g.label} {problem or 'is free'}" for g, problem in problems.items()), next_step)


def with_claims(gpus: Sequence[Gpu], running: Sequence[Plan]) -> Tuple[Gpu, ...]:
    """The GPUs with what running deployments will take of them: one that still loads shows little memory in use."""
    claimed = {g.uuid: sum(p.gpu_memory_utilization for p in running if g.uuid in p.gpus) for g in gpus}
    return tuple(replace(g, used=max(g.used, int(g.total * CUDA_SEES * claimed[g.uuid]))) for g in gpus)


# ---- the plan ------------------------------------------------------------------------


def make_plan(
    name: str,
    model_dir: str,
    facts: ModelFacts,
    host: Host,
    image: Image,
    options: ServeOptions,
    previous: Optional[Plan] = None,
) -> Plan:
    """The plan for a device and image that choose_device and choose_image settled. `previous` is the deployment's
    plan so far: its port and GPUs are kept where they can be. Raises HostError that names what would work."""
    version = image.version or NEWEST
    require_known_model(name, facts, options)
    require_known_flags(options.extra_args, version)
    facts = as_loaded(facts, version, options)
    pool, warnings = gpu_pool(host, options, previous.gpus if previous else ())
    require_capability(name, facts, pool, image)
    found = fit_gpus(name, facts, pool, options) if pool else fit_cpu(name, facts, host.memory, options)
    gpus = pool[: found.tp]
    length = options.max_model_len or (found.length if facts.max_length else 0)
    in_flight = batch_limits(min((g.total for g in pool), default=0))[0]
    request = kv_bytes(facts, found.tp, length or USEFUL_LENGTH, kv_width(facts, options), in_flight)
    no_bfloat16 = facts.dtype == "bfloat16" and any((0, 0) < g.capability < (8, 0) for g in gpus)
    return replace(
        Plan(**vars(options)),
        name=name,
        model_dir=model_dir,
        served_names=options.served_names or (name,),
        image=image.reference,
        image_id=image.id,
        version=version,
        embeds=facts.embeds,
        gpus=tuple(g.uuid for g in gpus),
        gpu_names=tuple(g.label for g in gpus),
        tensor_parallel_size=found.tp,
        max_model_len=length,
        dtype="float16" if options.dtype == "auto" and no_bfloat16 else options.dtype,
        port=choose_port(options.port, previous.port if previous else None, host.taken_ports),
        shm_size=options.shm_size or ("16gb" if found.tp > 1 else "4gb"),
        env=environment(name, facts, options, found.kv),
        weight_bytes=facts.weight_bytes,
        kv_bytes=found.kv,
        concurrency=round(found.kv / request, 0 if found.kv > 10 * request else 1) if request else 0.0,
        warnings=(*warnings, *plan_warnings(facts, gpus, image, options, length)),
    )


def choose_port(wanted: Optional[int], previous: Optional[int], taken: AbstractSet[int]) -> int:
    """The port asked for, the one the deployment has, or the first free one from 8000. Raises HostError."""
    first = wanted or previous or PORTS[0]
    free = next((port for port in (first, *PORTS) if port not in taken), 0)
    if not free:
        raise HostError(f"no port from {PORTS[0]} to {PORTS[-1]} is free", "", "give one with --port")
    if wanted and free != wanted:
        raise HostError(f"port {wanted} is taken", "another program or deployment has it", f"--port {free}")
    return free


def environment(name: str, facts: ModelFacts, options: ServeOptions, kv: int) -> Mapping[str, str]:
    """Variables of the container: nothing may look for a network, nothing phones home. The operator's come last."""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
    values = dict.fromkeys(offline, "1")
    # vLLM's own patience is 600 s, which slow disks outlast.
    values["VLLM_ENGINE_READY_TIMEOUT_S"] = str(max(LOADING_S, options.ready_timeout_s))
    if options.device == "cpu":
        # Binding threads to cores needs rights that the container does not have.
        values.update(VLLM_CPU_KVCACHE_SPACE=str(kv // GIB), VLLM_CPU_OMP_THREADS_BIND="nobind")
    if facts.tiktoken:
        values["TIKTOKEN_ENCODINGS_BASE"] = f"/models/{name}"
    return dict(sorted({**values, **options.env}.items()))


def plan_warnings(
    facts: ModelFacts, gpus: Sequence[Gpu], image: Image, options: ServeOptions, length: int
) -> List[str]:
    """What will work, but not as one may expect."""
    drivers = {g.driver for g in gpus if g.driver}
    old = [d for d in drivers if int(d.partition(".")[0]) < _LEAST_DRIVER.get(cuda_of(image)[0], 0)]
    foreign = ", ".join(c for c in facts.remote_code if "--" in c)
    trust, shortened = options.trust_remote_code, length < facts.max_length and not options.max_model_len
    lacks_tiktoken = not facts.tiktoken and "TIKTOKEN_ENCODINGS_BASE" not in options.env
    rules = (
        (image.id and image.version is None, f"the vLLM version of {image.reference} is unknown; taken for the newest"),
        (not facts.embeds and not facts.chat_template, "no chat template: /v1/chat/completions will answer 400"),
        (facts.pickled, "the weights are pickles: loading them can run code; prefer a repository with safetensors"),
        (facts.remote_code and not trust,
         f"the model brings own code; if vLLM does not know {facts.architecture}, it needs --trust-remote-code"),
        (foreign and trust, f"code of another repository is not in the folder: {foreign}"),
        (facts.model_type == "gpt_oss" and lacks_tiktoken,
         "gpt-oss needs o200k_base.tiktoken and cl100k_base.tiktoken offline: put them into the model folder"),
        (not facts.heads or not facts.layers, "config.json does not tell the model's shape: the KV cache is a guess"),
        (length and shortened, f"context shortened to {length} of {facts.max_length} tokens: that is what fits"),
        (old, f"the image has CUDA {image.cuda}, the driver {', '.join(old)} is older"),
    )  # fmt: skip
    return [text for applies, text in rules if applies]


def require_known_model(name: str, facts: ModelFacts, options: ServeOptions) -> None:
    """Refuse a model without an architecture, and a context beyond the model's own, as vLLM would after minutes."""
    if not facts.architecture:
        raise HostError(f"cannot serve {name}", "config.json names no architecture", BRING_AGAIN)
    if 0 < facts.max_length < options.max_model_len and not options.env.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        raise HostError(
            f"cannot serve {name} with {options.max_model_len} tokens of context",
            f"the model was made for {facts.max_length}",
            f"--max-model-len {facts.max_length}, or insist with --env VLLM_ALLOW_LONG_MAX_MODEL_LEN=1",
        )


def flags_in(arguments: Sequence[str]) -> List[str]:
    """The flags among arguments of vLLM, which takes --max_model_len for --max-model-len.

    >>> flags_in(["--max_model_len=5", "--dtype", "half", "-tp", "2"])
    ['--max-model-len', '--dtype', '-tp']
    """
    return [a.partition("=")[0].replace("_", "-") for a in arguments if re.match("--?[a-z]", a)]


def knows_flag(version: Version, flag: str) -> bool:
    """Whether this vLLM has the flag."""
    since, until, _ = FLAGS.get(flag, (_ALWAYS, _NEVER, ""))
    return since <= version < until


def require_known_flags(arguments: Sequence[str], version: Version) -> None:
    """Refuse extra arguments that this vLLM does not know (it would die with "unrecognized arguments"), and those that
    are hfship's to set: a key in a command line can be read by everybody, another name or port would not be found."""
    for flag in flags_in(arguments):
        if any(own.startswith(flag) for own in RESERVED_FLAGS):  # argparse takes abbreviations too
            next_step = f"give it to hfship serve before the --; the key is {KEY_VARIABLE} in the deployment's .env"
            raise UsageError(f"{flag} cannot be passed on to vLLM", "hfship sets it", next_step)
        if not knows_flag(version, flag):
            since, until, instead = FLAGS[flag]
            known = f"until {version_text(until)}" if version >= until else f"from {version_text(since)}"
            next_step = f"write {instead}" if instead else "leave it out, or choose another --image"
            raise HostError(f"vLLM {version_text(version)} does not know {flag}", f"versions {known} do", next_step)


# ======================================================================================
# §15 Deployment files
#
# Owns the text of what lies in DEPLOY_DIR/NAME: plan.json, .env, docker-compose.yml. Pure functions of the plan, and
# the key for .env; the same plan gives the same bytes.
# Promises: plain files that an operator can read, and run without hfship (`docker compose up -d` there). The key is
# in .env alone: not in the plan, not on a command line. Every string is quoted, so no name or path can change what a
# file means.
#
# Format hfship-plan/1 of plan.json: the fields of Plan, keys sorted; readers ignore fields they do not know.
# ======================================================================================

PLAN_FORMAT = "hfship-plan/1"
PLAN_FILE, ENV_FILE, COMPOSE_FILE = "plan.json", ".env", "docker-compose.yml"
CONTAINER_PORT = 8000

_HEALTH_CHECK = (
    "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open"
    f"('http://127.0.0.1:{CONTAINER_PORT}/health', timeout=8)"
)


def vllm_arguments(plan: Plan) -> List[str]:
    """The arguments of `vllm serve` for the plan's version of vLLM. The key is not among them: argv is public."""
    gpu, given = plan.device == "gpu", flags_in(plan.extra_args)
    settings: Mapping[str, object] = {  # True: a flag without a value
        "--tensor-parallel-size": gpu and plan.tensor_parallel_size,
        "--gpu-memory-utilization": gpu and f"{plan.gpu_memory_utilization:g}",
        "--max-model-len": plan.max_model_len,
        "--max-num-seqs": plan.max_num_seqs,
        "--dtype": plan.dtype != "auto" and plan.dtype,
        "--kv-cache-dtype": plan.kv_cache_dtype != "auto" and plan.kv_cache_dtype,
        "--trust-remote-code": plan.trust_remote_code,
        # Prompts do not belong into logs; later versions keep them out unless asked.
        "--disable-log-requests": plan.version < (0, 10, 2),
        # Without these a health check every 15 s fills the log, and a stop cuts answers in mid-sentence.
        "--disable-access-log-for-endpoints": "/health,/metrics,/ping",
        "--shutdown-timeout": 30,
    }
    arguments = [f"/models/{plan.name}", "--served-model-name", *plan.served_names]
    arguments += ["--host", "0.0.0.0", "--port", str(CONTAINER_PORT)]
    for flag, value in settings.items():
        if value and flag not in given and knows_flag(plan.version, flag):
            arguments += [flag] if value is True else [flag, str(value)]
    return arguments + list(plan.extra_args)


# ---- plan.json -----------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    """The text of plan.json."""
    return json.dumps({"format": PLAN_FORMAT, **asdict(plan)}, sort_keys=True, ensure_ascii=False, indent=1) + "\n"


def parse_plan(text: str, where: str) -> Plan:
    """The plan in the text of a plan.json. Raises IntegrityError."""
    try:
        value = json.loads(text)
        if value["format"] != PLAN_FORMAT or not value["name"]:
            raise ValueError(f"format is {value['format']!r}, this hfship reads {PLAN_FORMAT}")
        return Plan(**typed_fields(Plan(), value))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        why = f"{type(exc).__name__}: {exc}"
        raise IntegrityError(f"{where} is not a valid plan", why, "run hfship serve again") from exc


def known_fields(kind: Type[Any], values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values that the dataclass has fields for, with tuples for lists."""
    names = {f.name for f in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}


def typed_fields(default: Any, values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values for the fields of a dataclass, each of the type that it has in `default`. Raises ValueError."""
    known = known_fields(type(default), values)
    for key, found in known.items():
        usual = type(getattr(default, key))
        kinds = {float: (int, float), type(None): (int, type(None))}.get(usual, (usual,))
        endless = isinstance(found, (int, float)) and not abs(found) < 1e18  # also NaN
        if not isinstance(found, kinds) or endless:
            raise ValueError(f"{key} is not what it should be")
    return known


# ---- .env ----------------------------------------------------------------------------


def env_text(plan: Plan, key: str) -> str:
    """The text of .env: the API key first and unquoted, so that scripts can read it."""
    lines = [f"# Variables of {container_name(plan.name)}, and its API key: keep this file at mode 0600."]
    return "\n".join([*lines, f"{KEY_VARIABLE}={key}", *(f"{k}={env_quote(v)}" for k, v in plan.env.items())]) + "\n"


def env_quote(value: str) -> str:
    """A value as docker compose reads it back unchanged: bare where nothing can be misread, else in quotes.

    >>> env_quote("1"), env_quote("a $b"), env_quote("it's $5")
    ('1', "'a $b'", '"it\\'s \\\\$5"')
    """
    if re.match(r"[A-Za-z0-9_./:,@%+-]+\Z", value):
        return value
    if "'" not in value and "\\" not in value:
        return f"'{value}'"
    return '"' + re.sub(r'(["\\$])', r"\\\1", value) + '"'


def key_in_env(text: str) -> str:
    """The API key in the text of a .env, "" when there is none. Raises ValueError for one that compose, curl or an
    HTTP header would not carry unchanged.

    >>> key_in_env("# x\\nVLLM_API_KEY=sk-1\\nA=b\\n")
    'sk-1'
    """
    match = re.search(rf"^{KEY_VARIABLE}=(.*)$", text, re.MULTILINE)
    key = match[1].strip().strip("'\"") if match else ""
    if not re.match(r"[A-Za-z0-9_.~/:@%+-]*\Z", key):
        raise ValueError(f"{KEY_VARIABLE} may have letters, digits and _.~/:@%+- only")
    return key


def require_env(name: str, value: str) -> None:
    """Raise UsageError for a variable that .env cannot carry."""
    if not re.match(r"[A-Za-z_][A-Za-z0-9_]*\Z", name) or re.search(r"[\x00-\x1f\x7f]", value):
        raise UsageError(f"--env {name}: not a variable", "names have letters, digits and _, values one line", "")
    if name == KEY_VARIABLE:
        why = "command lines can be read by everybody"
        raise UsageError(f"--env {KEY_VARIABLE} is refused", why, "edit the deployment's .env")


# ---- docker-compose.yml --------------------------------------------------------------


def container_name(name: str) -> str:
    return f"vllm_{name}"


def project_name(name: str) -> str:
    """A compose project name (lower case letters, digits, - and _), different for different names.

    >>> project_name("qwen3-8b"), project_name("Qwen3.8B")
    ('hfship-qwen3-8b', 'hfship-qwen3-8b-50a0b8')
    """
    plain = re.sub(r"[^a-z0-9_-]", "-", name.lower())
    return f"hfship-{plain}" if plain == name else f"hfship-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def compose_value(plan: Plan) -> Mapping[str, Any]:
    """What docker-compose.yml says."""
    bind = f"[{plan.bind}]" if ":" in plan.bind else plan.bind
    model = {
        "type": "bind",
        "source": plan.model_dir,
        "target": f"/models/{plan.name}",
        "read_only": True,
        "bind": {"create_host_path": False},
    }
    service: Dict[str, Any] = {
        "container_name": container_name(plan.name),
        "image": plan.image,
        "pull_policy": "never",
        # vLLM up to 0.8 has another entry point in its image; this one exists in all versions.
        "entrypoint": ["vllm", "serve"],
        "command": vllm_arguments(plan),
        "env_file": [ENV_FILE],
        "ports": [f"{bind}:{plan.port}:{CONTAINER_PORT}"],
        "volumes": [model, {"type": "volume", "source": "vllm-cache", "target": "/root/.cache"}],
        "shm_size": plan.shm_size,
        "ipc": "private",
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": "60s",
        "security_opt": ["no-new-privileges:true"],
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}},
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _HEALTH_CHECK],
            "interval": "15s",
            "timeout": "10s",
            "retries": 4,
            "start_period": f"{max(LOADING_S, plan.ready_timeout_s)}s",
        },
        "labels": {"hfship.name": plan.name, "hfship.image-id": plan.image_id},
    }
    if plan.device == "gpu":
        gpus = {"driver": "nvidia", "device_ids": list(plan.gpus), "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    return {"name": project_name(plan.name), "services": {"vllm": service}, "volumes": {"vllm-cache": {}}}


def compose_text(plan: Plan) -> str:
    """The text of docker-compose.yml."""
    head = f"# Written by hfship from {PLAN_FILE}; `hfship serve {plan.name}` writes it again.\n"
    return head + "\n".join(yaml_lines(compose_value(plan))) + "\n"


def yaml_lines(value: Any) -> List[str]:
    """A value of tables, lists, strings, numbers and booleans as YAML that compose does not interpolate.

    >>> print("\\n".join(yaml_lines({"a": ["x: $y", 1], "b": {"c": True}, "d": {}})))
    a:
      - "x: $$y"
      - 1
    b:
      c: true
    d: {}
    """
    lines = []
    if isinstance(value, dict) and value:
        for key, item in value.items():
            nested = yaml_lines(item)
            many = isinstance(item, (dict, list)) and item
            lines += [f"{key}:", *("  " + line for line in nested)] if many else [f"{key}: {nested[0]}"]
    elif isinstance(value, list) and value:
        for item in value:
            lines += [("  " if i else "- ") + line for i, line in enumerate(yaml_lines(item))]
    else:
        lines = [yaml_string(value) if isinstance(value, str) else json.dumps(value)]
    return lines


def yaml_string(text: str) -> str:
    """A double-quoted YAML string; `$` doubled, because compose would interpolate it.

    >>> yaml_string('say "$x"')
    '"say \\\\"$$x\\\\""'
    """
    quoted = json.dumps(text.replace("$", "$$"), ensure_ascii=False)
    # JSON leaves some characters bare that YAML must have escaped.
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", quoted)


# ======================================================================================
# §16 Docker
#
# Owns every word exchanged with docker, and the proof that a deployment works: not /health, which answers 200 while
# the engine hangs, but one real request that comes back with a token.
# Promises: a container that dies or restarts ends the wait at once, with its last log lines, a cause and a next step
# where the message is known. A second `serve` with the same input changes nothing.
# Never: pulls an image; puts a key on a command line.
# ======================================================================================

DOCKER_TIMEOUT_S = 60.0
COMPOSE_TIMEOUT_S = 600.0
POLL_S = 1.0
REQUEST_TIMEOUT_S = 120.0  # the first request may compile kernels
STATUS_TIMEOUT_S = 10.0  # a deployment that takes longer for one token is not healthy
TAIL_LINES = 30
PROGRESS_LINES = 400  # of the log, looked at for the phase
DOCKER_ROOM = 2 * GIB  # where docker keeps its data: vLLM's compile cache, logs, the container's own layer

# Messages of docker and vLLM -> (cause, next step). The first row that matches wins; {name} and groups are filled in.
KNOWN_FAILURES: Sequence[Tuple[str, str, str]] = (
    (r"permission denied.*docker(?:\.sock| daemon| API)",
     "this user may not talk to docker", "sudo usermod -aG docker $USER and log in again, or run hfship as root"),
    (r"Cannot connect to the Docker daemon|Is the docker daemon running|failed to connect to the docker API",
     "the docker daemon is not running, or DOCKER_HOST points to the wrong place", "systemctl start docker"),
    (r"is not a docker command|unknown command: docker compose|unknown (?:shorthand )?flag: .*-?-s",
     "docker has no compose plugin", "install docker-compose-plugin, or docker-compose-v2 (Debian, Ubuntu)"),
    (r"client version (\S+) is too (old|new)", "docker's client is too {1}", "use client and engine of one release"),
    (r"could not select device driver|unknown or invalid runtime name: nvidia|[Uu]nknown runtime specified nvidia",
     "docker has no NVIDIA runtime", "install nvidia-container-toolkit, nvidia-ctk runtime configure, restart docker"),
    (r"docker-init", "docker has no docker-init", "install tini, and link it as docker-init beside dockerd"),
    (r"port is already allocated|[Aa]ddress already in use", "the port is taken", "hfship serve {name} --port ANOTHER"),
    (r'container name \"?/?(\S+?)\"? is already in use',
     "another container has the name {0}", "docker rm -f {0} if it is not needed, then hfship serve {name}"),
    (r"unsatisfied condition: cuda|CUDA driver version is insufficient|NVIDIA driver on your system is too old"
     r"|forward compatibility was attempted",
     "the NVIDIA driver is older than the image's CUDA",
     "update the driver, or use an image for it: --image vllm/vllm-openai:vX.Y.Z-cu129"),
    (r"Failed to initialize NVML|nvml error: driver not loaded|Failed to infer device type",
     "the container sees no GPU", "check nvidia-smi here and nvidia-container-toolkit, then hfship serve {name}"),
    (r"Free memory on device.*is less than desired GPU memory utilization",
     "another process holds memory of the GPU", "nvidia-smi names it; stop it, or lower --gpu-memory-utilization"),
    (r"estimated maximum model length is (\d+)",
     "the KV cache holds {0} tokens, less than one request of full length", "hfship serve {name} --max-model-len {0}"),
    (r"larger than the maximum number of tokens that can be stored in KV cache|No available memory for the cache"
     r"|KV cache is needed, which is larger than the available",
     "the KV cache does not hold one request of full length",
     "hfship serve {name} with a smaller --max-model-len, or a larger --tensor-parallel-size"),
    (r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory",
     "the GPU ran out of memory", "hfship serve {name} with a larger --tensor-parallel-size or less --max-num-seqs"),
    (r"unrecognized arguments: (.+)", "this version of vLLM does not know {0}", "leave it out, or change the --image"),
    (r"`trust_remote_code=True`", "the model runs its own code", "hfship serve {name} --trust-remote-code"),
    (r"does not recognize this architecture|Model architectures .* are not supported|has no vLLM implementation",
     "this vLLM is older than the model", "bring a newer vLLM image: docker load -i FILE, then hfship serve {name}"),
    (r"LocalEntryNotFoundError|outgoing traffic has been disabled|couldn't connect to 'https://huggingface\.co",
     "vLLM looked for a file that the model folder does not have",
     "compare the folder with the repository, fetch what is missing, carry it over"),
    (r"HarmonyError|error downloading or loading vocab file",
     "gpt-oss wants its tiktoken encodings from the network",
     "put o200k_base.tiktoken and cl100k_base.tiktoken into the model folder, then hfship serve {name}"),
    (r"No space left on device.*shm|unable to allocate shared memory|Bus error.*shared memory",
     "shared memory ran out", "hfship serve {name} --shm-size 32gb"),
    (r"Permission denied: '/models", "the container may not read the model folder",
     "chmod -R a+rX the folder; with SELinux: chcon -Rt container_file_t FOLDER"),
    (r"SIGILL|Illegal instruction|exit code -4\b",
     "the CPU lacks an instruction that this dtype uses", "hfship serve {name} --dtype float32 (or float16)"),
)  # fmt: skip

# What a line of vLLM's log says about how far it is; the last line that matches tells.
_PHASES = (
    (re.compile(r"checkpoint shards:\s+(\d+)%"), "loading weights, {0} %"),
    (re.compile(r"Starting to load model|Loading (?:safetensors|weights|model)"), "loading weights"),
    (re.compile(r"Dynamo bytecode|Compiling a graph|compiled graph|torch\.compile takes"), "compiling"),
    (re.compile(r"Available KV cache memory|KV cache size|# (?:GPU|CPU) blocks"), "sizing the KV cache"),
    (re.compile(r"Capturing (?:CUDA|cudagraph|the model)|Graph capturing", re.IGNORECASE), "capturing CUDA graphs"),
    (re.compile(r"Starting vLLM API server|Application startup complete|Uvicorn running"), "opening the API"),
)
_COMPOSE_PROGRESS = re.compile(r"^ *(?:Network|Volume|Container) \S+ +\w+\n?", re.MULTILINE)


@dataclass(frozen=True)
class Deployment:
    """A folder with a plan, and the API key of its .env (never shown)."""

    folder: Path
    plan: Plan
    key: str = field(repr=False)


@dataclass(frozen=True)
class Container:
    """The state of a container as docker tells it."""

    id: str
    status: str  # created, running, restarting, exited, ...
    exit_code: int = 0
    oom_killed: bool = False
    restarts: int = 0
    started_at: float = 0.0  # seconds since the epoch
    image_id: str = ""


@dataclass(frozen=True)
class Answer:
    """What the API answered: HTTP status (0: no connection), body, seconds."""

    status: int
    text: str
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """Whether a model has really produced something.

        >>> Answer(200, '{"choices": [{"text": "a"}]}').works, Answer(200, "{}").works
        (True, False)
        """
        with contextlib.suppress(ValueError, AttributeError):
            value = json.loads(self.text)
            return self.status == 200 and bool(value.get("choices") or value.get("data"))
        return False

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.text[:200]}" if self.status else self.text


# ---- reading what docker and vLLM print ----------------------------------------------


def explain(text: str, name: str) -> Tuple[str, str]:
    """(cause, next step) of the first known message in `text`; empty strings when none is known.

    >>> explain("vllm: error: unrecognized arguments: --foo", "m")[0]
    'this version of vLLM does not know --foo'
    """
    for pattern, cause, next_step in KNOWN_FAILURES:
        match = re.search(pattern, text)
        if match:
            return cause.format(*match.groups(), name=name), next_step.format(*match.groups(), name=name)
    return "", ""


def phase_of(log: str) -> str:
    """How far vLLM is, from its log.

    >>> phase_of("Loading safetensors checkpoint shards:  45% Completed | 13/29")
    'loading weights, 45 %'
    """
    for line in reversed(log.replace("\r", "\n").splitlines()):
        for pattern, phase in _PHASES:
            match = pattern.search(line)
            if match:
                return phase.format(*match.groups())
    return "starting"


def measured_kv_tokens(log: str) -> int:
    """The tokens that vLLM's KV cache really holds, 0 when its log does not tell.

    >>> measured_kv_tokens("GPU KV cache size: 1,234,567 tokens")
    1234567
    """
    match = re.search(r"KV cache size: ([\d,]+) tokens", log)
    return int(match[1].replace(",", "")) if match else 0


def container_trouble(container: Optional[Container], restarts_before: int) -> str:
    """Why a starting container will not become ready; "" while it may.

    >>> container_trouble(Container("1", "running", restarts=2), 0)
    'it restarted'
    """
    if container is None:
        return "it is gone"
    how = f"exit code {container.exit_code}"
    if container.oom_killed:
        how += ": the machine ran out of memory"
    elif container.exit_code == 137:
        how += ": killed, by hand or because the machine ran out of memory"
    if container.status in ("exited", "dead"):
        return f"it ended ({how})"
    if container.status == "restarting":
        return f"it restarted ({how})"
    return "it restarted" if container.restarts > restarts_before else ""


def deployment_state(container: Optional[Container], answer: Answer) -> str:
    """healthy, loading, degraded or down."""
    if container is None or container.status not in ("running", "restarting"):
        return "down"
    if answer.works:
        return "healthy"
    return "loading" if container.status == "running" and answer.status == 0 and container.restarts == 0 else "degraded"


# ---- docker --------------------------------------------------------------------------


def docker(arguments: Sequence[str], doing: str, timeout_s: float = DOCKER_TIMEOUT_S, name: str = "MODEL") -> str:
    """The output of a docker command. Raises HostError with the cause where the message is known."""
    done = run_program(["docker", *arguments], timeout_s=timeout_s)
    if done.code:
        message = _COMPOSE_PROGRESS.sub("", done.err.strip() or done.out.strip()).strip()[-1000:]
        cause, next_step = explain(done.err + done.out, name)
        shown = f"docker {' '.join(arguments[:3])} ..."
        why = f"docker says: {message}" if message else f"{shown} ended with {done.code}"
        raise HostError(f"cannot {doing}" + (f": {cause}" if cause else ""), why, next_step or f"run {shown} by hand")
    return done.out


def require_docker() -> None:
    """Raise HostError unless engine and compose plugin answer."""
    docker(["version", "--format", "{{.Server.Version}}"], "use docker")
    docker(["compose", "version", "--short"], "use docker compose")


def list_images(wanted: str) -> Tuple[Image, ...]:
    """The vLLM images that docker has, and the one that is wanted, whatever it is called."""
    images = parse_images(docker(["image", "ls", "--no-trunc", "--format", "{{json .}}"], "list images"))
    if wanted and all(wanted not in (image.reference, image.id) for image in images):
        with contextlib.suppress(HostError):  # it is not there
            found = json.loads(docker(["image", "inspect", wanted], f"look at the image {wanted}"))
            images += (image_called(wanted, str(found[0]["Id"])),)
    return images


def read_host(images: Tuple[Image, ...]) -> Host:
    """What this machine offers. Of RAM, a share of all there is: what is free now would change a plan that runs."""
    memory = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.85)
    query = [f"--query-gpu={NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = run_program(["nvidia-smi", *query], timeout_s=DOCKER_TIMEOUT_S)
    except HostError as exc:
        return Host((), images, memory, gpu_problem=exc.why)
    problem = f"nvidia-smi says: {(done.out + done.err).strip()[:500] or 'nothing'}"
    return Host(parse_nvidia_smi(done.out), images, memory, gpu_problem=problem)


def read_image(image: Image) -> Image:
    """The image with what docker knows of it; where the tag tells no version, the image itself is asked (some 8 s)."""
    value = json.loads(docker(["image", "inspect", image.reference], f"look at the image {image.reference}"))[0]
    variables = dict(item.partition("=")[::2] for item in (value.get("Config") or {}).get("Env") or [])
    version = image.version
    if version is None:
        ask = ["run", "--rm", "--network", "none", "--pull", "never", "--entrypoint", "vllm", image.reference]
        with contextlib.suppress(HostError):  # then the plan says that the version is unknown
            version = parse_version(docker([*ask, "--version"], "ask the image for its version", 120.0))
    return replace(image, id=str(value["Id"]), version=version, cuda=str(variables.get("CUDA_VERSION", "")))


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def port_is_free(bind: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(family_of(bind), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise HostError(f"cannot listen on {bind}", str(exc), "give an address of this machine as --host") from exc
    return True


def compose(deployment: Deployment, *arguments: str) -> List[str]:
    """The docker arguments of a compose command. The project is named twice because COMPOSE_PROJECT_NAME in the
    operator's environment would win over the file."""
    project, path = project_name(deployment.plan.name), deployment.folder / COMPOSE_FILE
    return ["compose", "-p", project, "-f", str(path), *arguments]


def log_arguments(deployment: Deployment, tail: str) -> List[str]:
    """The docker arguments for the last lines ("all" or a number) of a container's log."""
    return compose(deployment, "logs", "--no-color", "--no-log-prefix", "--tail", tail)


def log_tail(deployment: Deployment, lines: int) -> str:
    """The last lines of the container's log; "" when docker has none."""
    with contextlib.suppress(HostError):
        return docker(log_arguments(deployment, str(lines)), "read the log")
    return ""


def stream_logs(deployment: Deployment, follow: bool, tail: str, reporter: Reporter) -> Exit:
    """Copy the container's log to stdout, redacted, until it ends or the operator has seen enough."""
    argv = ["docker", *log_arguments(deployment, tail), *["--follow"] * follow]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            for line in process.stdout or ():
                reporter.result(line.decode("utf-8", "replace").rstrip("\n"))
        except KeyboardInterrupt:
            return Exit.OK  # the way out of --follow
        finally:
            process.terminate()
    return Exit.HOST if process.returncode > 0 else Exit.OK


def inspect_container(name: str) -> Optional[Container]:
    """The container of a deployment, None when there is none. Raises HostError."""
    try:
        value = json.loads(docker(["container", "inspect", container_name(name)], "inspect the container"))[0]
    except HostError as exc:
        if "no such container" in exc.why.lower():
            return None
        raise
    state = value["State"]
    started = time.strptime(state["StartedAt"][:19], "%Y-%m-%dT%H:%M:%S")  # UTC
    return Container(
        id=value["Id"],
        status=state["Status"],
        exit_code=state["ExitCode"],
        oom_killed=bool(state.get("OOMKilled")),
        restarts=value["RestartCount"],
        started_at=calendar.timegm(started),
        image_id=value["Image"],
    )


# ---- deployments on disk -------------------------------------------------------------


def read_deployment(folder: Path, reporter: Reporter) -> Optional[Deployment]:
    """The deployment in a folder, its key kept out of all that is said from now on; None when there is none."""
    try:
        plan = parse_plan((folder / PLAN_FILE).read_text(encoding="utf-8"), str(folder / PLAN_FILE))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        why = "the folder belongs to the user who ran serve" if isinstance(exc, PermissionError) else ""
        raise HostError(f"cannot read {folder / PLAN_FILE}: {exc}", why, "run as that user, or as root") from exc
    return Deployment(folder, plan, read_key(folder, reporter))


def read_key(folder: Path, reporter: Reporter) -> str:
    """The API key in a deployment's .env, "" when there is none yet."""
    path = folder / ENV_FILE
    try:
        key = key_in_env(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    except ValueError as exc:  # not repeated as the cause: it may hold the key
        raise UsageError(f"the key in {path} cannot be used", str(exc), f"edit {path}, then hfship serve") from None
    reporter.hide(key)
    return key


def list_deployments(deploy_dir: Path, reporter: Reporter) -> Tuple[List[Deployment], Dict[str, HfshipError]]:
    """All deployments, by name, and what is wrong with those that cannot be read. Folders that start with _ are ours
    for other purposes. Raises HostError."""
    found: List[Deployment] = []
    wrong: Dict[str, HfshipError] = {}
    try:
        folders = sorted(deploy_dir.iterdir()) if deploy_dir.is_dir() else []
    except OSError as exc:
        raise HostError(f"cannot read {deploy_dir}: {exc.strerror}", "", "run as its user, or as root") from exc
    for folder in (p for p in folders if p.is_dir() and not p.name.startswith(("_", "."))):
        try:
            found += filter(None, [read_deployment(folder, reporter)])
        except HfshipError as exc:
            wrong[folder.name] = exc
    return found, wrong


def write_deployment(folder: Path, plan: Plan, reporter: Reporter) -> Deployment:
    """Write the deployment's files where they differ. The key is made once and kept from then on."""
    make_dir(folder).chmod(0o700)
    key = read_key(folder, reporter) or "sk-" + secrets.token_urlsafe(32)
    reporter.hide(key)
    texts = {PLAN_FILE: plan_text(plan), ENV_FILE: env_text(plan, key), COMPOSE_FILE: compose_text(plan)}
    for name, text in texts.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
            atomic_write(path, text, 0o600 if name == ENV_FILE else 0o644)
            reporter.detail(f"wrote {path}")
    return Deployment(folder, plan, key)


# ---- up, and the proof that it works -------------------------------------------------


def ask_model(deployment: Deployment, timeout_s: float) -> Answer:
    """One real request for one token (or one embedding). Straight to the port: no proxy may come between."""
    plan = deployment.plan
    split = urlsplit(plan.url)
    path, wish = "/v1/completions", {"prompt": "Hello", "max_tokens": 1, "temperature": 0}
    if plan.embeds:
        path, wish = "/v1/embeddings", {"input": "Hello"}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {deployment.key}"}
    started = time.monotonic()
    connection = HTTPConnection(split.hostname or "", split.port, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps({"model": plan.served_names[0], **wish}), headers)
        response = connection.getresponse()
        text = response.read(1 << 20).decode("utf-8", "replace")
        return Answer(response.status, text, time.monotonic() - started)
    except (OSError, HTTPException) as exc:
        return Answer(0, f"{type(exc).__name__}: {exc}", time.monotonic() - started)
    finally:
        connection.close()


def start(deployment: Deployment) -> int:
    """`docker compose up -d`; the number of restarts that the container had before. Raises HostError, DiskError."""
    plan, doing = deployment.plan, f"start {deployment.plan.name}"
    root = Path(docker(["info", "--format", "{{.DockerRootDir}}"], "ask docker for its folder").strip())
    if root.is_dir():  # else the engine is on another machine
        require_room(root, DOCKER_ROOM, 0, doing, "free space there; docker system df says what takes it")
    before = inspect_container(plan.name)
    docker(compose(deployment, "up", "-d"), doing, COMPOSE_TIMEOUT_S, plan.name)
    after = inspect_container(plan.name)
    return before.restarts if before and after and before.id == after.id else 0


def wait_until_it_answers(deployment: Deployment, restarts_before: int, reporter: Reporter) -> Answer:
    """Wait until the model answers a real request, saying which phase it is in.

    Raises HostError when the container dies or the API refuses; IncompleteError when time is up.
    """
    name, timeout_s = deployment.plan.name, deployment.plan.ready_timeout_s
    deadline = time.monotonic() + timeout_s
    said, said_at = "", -PLAIN_INTERVAL_S
    while True:
        trouble = container_trouble(inspect_container(name), restarts_before)
        if trouble:
            raise startup_failure(deployment, trouble)
        answer = ask_model(deployment, REQUEST_TIMEOUT_S)
        if answer.works:
            return answer
        if 400 <= answer.status < 500:
            raise HostError(f"{name} refuses requests", answer.text[:500], f"hfship logs {name}")
        phase = phase_of(log_tail(deployment, PROGRESS_LINES))
        if phase != said and (phase[:8] != said[:8] or time.monotonic() - said_at > PLAIN_INTERVAL_S):
            said, said_at = phase, time.monotonic()
            reporter.enter_phase(name, phase)
        if time.monotonic() > deadline:
            what = f"{name} does not answer after {human_seconds(timeout_s)} ({phase})"
            why = f"last answer: {answer}; the end of its log:\n{log_tail(deployment, TAIL_LINES).rstrip()}"
            next_step = f"it goes on loading: hfship serve {name} waits again; hfship logs -f {name}"
            raise IncompleteError(what, why, next_step)
        time.sleep(POLL_S)


def startup_failure(deployment: Deployment, trouble: str) -> HostError:
    """The error for a container that died; it is stopped, lest it restart for ever."""
    name, log = deployment.plan.name, log_tail(deployment, PROGRESS_LINES)
    with contextlib.suppress(HostError):  # what killed it is the news, not that stopping failed
        docker(compose(deployment, "stop"), f"stop {name}", COMPOSE_TIMEOUT_S)
    cause, next_step = explain(log, name)
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    what = f"{name} did not start: {trouble}" + (f"; {cause}" if cause else "")
    return HostError(what, f"the end of its log:\n{tail}", next_step or f"hfship logs {name}")


# ======================================================================================
# §17 Mirror
#
# Owns the serving side of the Hub's API: read-only, over a folder of models, so that `HF_ENDPOINT=http://HOST:PORT hf
# download ORG/NAME`, transformers and vLLM work inside the site. The folder holds NAME/ or ORG/NAME/ with plain files,
# and the same below datasets/ and spaces/ where no manifest tells what they are; several folders of one repository are
# its revisions.
# Promises: what a manifest calls ORG/NAME at a commit is served under that name and commit, or not at all; nothing
# outside the listed files can be read, and nothing is ever written.
# ======================================================================================

TREE_PAGE = 1000  # entries, as on huggingface.co
LFS_THRESHOLD = 1 << 20  # bytes; larger files have a SHA-256 as their etag, smaller ones a git blob id, as on the Hub
_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".zip", ".tar", ".model")
RESCAN_S = 2.0
STOP_GRACE_S = 8.0  # answers on their way may finish; docker kills after 10 s


@dataclass(frozen=True, eq=False)  # one is like itself alone: so its tree can be remembered
class MirrorRepo:
    """One model folder as a repository at one commit; `files` as the Hub would list them."""

    source: Source
    folder: Path
    files: Mapping[str, RemoteFile]

    @property
    def repo(self) -> str:
        return self.source.resolved_repo

    @property
    def commit(self) -> str:
        return self.source.commit

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def rank(self) -> Tuple[object, ...]:
        """Of several folders of a repository, that of the highest rank is its `main`."""
        source = self.source
        return bool(source.endpoint), source.revision == "main", source.fetched_at, len(self.files)


Shelf = Mapping[Tuple[str, str], Sequence[MirrorRepo]]  # (repository type, id in lower case) -> revisions, main first


class Library:
    """The repositories of a models folder, found anew while it changes. Safe to share between threads.

    `left_out` tells of each folder that is not served why; `say` is told of every change.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.left_out: Mapping[str, str] = {}
        self._root, self._say = root, say
        self._lock = threading.Lock()
        self._scan: Optional[threading.Thread] = None
        self._scanned = 0.0
        self._shelf: Shelf = {}
        self._cache: Dict[Path, Tuple[object, Union[MirrorRepo, IntegrityError]]] = {}

    def shelf(self) -> Shelf:
        """What is served now. Only the first scan is waited for to its end: hashing a new model takes minutes."""
        with self._lock:
            scan = self._scan
            due = scan is None or not scan.is_alive() and time.monotonic() - self._scanned > RESCAN_S
            if due or not scan:
                self._scan = scan = threading.Thread(target=self._rescan, daemon=True)
                scan.start()
        if due or not self._scanned:
            scan.join(RESCAN_S if self._scanned else None)
        return self._shelf

    def repos(self) -> List[MirrorRepo]:
        """The `main` of every repository."""
        own_name = [held[0] for (_, key), held in self.shelf().items() if key == held[0].repo.lower()]
        return sorted(own_name, key=lambda repo: repo.repo)

    def find(self, repo_type: str, repo: str, revision: str = "main") -> Optional[MirrorRepo]:
        """The repository at a branch, tag, or commit of at least seven digits."""
        held = self.shelf().get((repo_type, repo.lower()), ())
        named = [r for r in held if revision in (r.commit, r.source.revision)]
        short = [r for r in held if len(revision) >= 7 and r.commit.startswith(revision)]
        return next(iter(named or short or (held if revision == "main" else ())), None)

    def _rescan(self) -> None:
        found: Dict[Tuple[str, str], List[MirrorRepo]] = {}
        left_out = {}
        try:
            for folder, repo_type, name in model_folders(self._root):
                try:
                    repo = self._repo(folder, repo_type, name)
                    for key in {repo.source.repo.lower(), repo.repo.lower()}:  # the Hub may have renamed it
                        found.setdefault((repo.source.repo_type, key), []).append(repo)
                except HfshipError as exc:
                    left_out[name] = f"{exc.what} ({exc.why})" if exc.why else exc.what
                except OSError as exc:
                    left_out[name] = f"{folder}: {exc.strerror}"
        except OSError as exc:
            left_out[str(self._root)] = f"{self._root} cannot be listed: {exc.strerror}"
        news = [f"not served: {why}" for name, why in left_out.items() if self.left_out.get(name) != why]
        news += [f"new: {held[0].repo}" for key, held in found.items() if self._scanned and key not in self._shelf]
        shelf = {key: sorted(held, key=lambda r: r.rank, reverse=True) for key, held in found.items()}
        self._shelf, self.left_out, self._scanned = shelf, left_out, time.monotonic()
        for line in news:
            self._say(line)

    def _repo(self, folder: Path, repo_type: str, name: str) -> MirrorRepo:
        listing = content_files(folder)
        written = [folder / path for path, _ in listing] + list((folder / WORK_DIR).glob("manifest.json"))
        state = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in written)
        if folder not in self._cache or self._cache[folder][0] != state:
            try:
                self._cache[folder] = (state, mirror_repo(folder, repo_type, name, dict(listing)))
            except IntegrityError as exc:  # it took hashing to find out: remember that, too
                self._cache[folder] = (state, exc)
        found = self._cache[folder][1]
        if isinstance(found, IntegrityError):
            raise found
        return found


def model_folders(root: Path) -> Iterator[Tuple[Path, str, str]]:
    """(folder, repository type, id) of every model below `root`: NAME/ and ORG/NAME/. A folder with files of its own,
    or into which a fetch has begun, is a model; datasets/ and spaces/ hold the same of their type."""
    for repo_type in REPO_TYPES:
        base = root if repo_type == "model" else root / f"{repo_type}s"
        for folder in _visible_folders(base) if base == root or base.is_dir() else ():
            if _is_model(folder):
                yield folder, repo_type, folder.name
            elif base != root or folder.name not in ("datasets", "spaces"):
                for inner in _visible_folders(folder):
                    yield inner, repo_type, f"{folder.name}/{inner.name}"


def _visible_folders(root: Path) -> List[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_model(folder: Path) -> bool:
    try:
        return (folder / WORK_DIR).is_dir() or any(entry.is_file() for entry in folder.iterdir())
    except OSError:
        return True  # one that cannot be read: the list says so


def require_whole(folder: Path, sizes: Mapping[str, int], manifest: Optional[Manifest]) -> None:
    """Refuse a folder that is not, or no longer, a whole model. Raises IncompleteError, IntegrityError.

    A file that is newer than the manifest is believed only after its hash: somebody may be fetching another revision.
    """
    if manifest is None:
        require_finished(folder)
    weights = {path for path in sizes if path.endswith(".safetensors")}
    wanted = {entry.path: entry for entry in manifest.files} if manifest else {}
    absent = sorted((wanted.keys() or whole_series(weights)) - sizes.keys())
    if absent or not sizes or folder.name.endswith(INCOMPLETE):
        why = f"{shorten(absent)} missing" if absent else "there is no file that can be read"
        raise IncompleteError(f"{folder} is not complete yet", why)
    written = (folder / MANIFEST_PATH).stat().st_mtime if manifest else 0.0
    for path, entry in wanted.items():
        newer = (folder / path).stat().st_mtime > written
        if entry.size != sizes[path] or newer and sha256_file(folder / path) != entry.sha256:
            raise IntegrityError(f"{folder} is not what its manifest says", f"{path} differs")


def mirror_repo(folder: Path, repo_type: str, name: str, sizes: Mapping[str, int]) -> MirrorRepo:
    """A model folder as a repository. Hashes come from the manifest where it has them; files beside it are hashed.

    Raises IncompleteError and IntegrityError for a folder that must not be served.
    """
    manifest = read_manifest(folder)
    require_whole(folder, sizes, manifest)
    source = manifest.source if manifest else None
    known = {entry.path: entry.sha256 for entry in manifest.files} if manifest else {}
    files = {path: _remote_view(folder / path, path, size, known.get(path)) for path, size in sizes.items()}
    digest = hashlib.sha1("".join(f"{path} {file.etag}\n" for path, file in sorted(files.items())).encode())
    source = source or Source("", name, "main", name, digest.hexdigest(), repo_type=repo_type)
    return MirrorRepo(source, folder, files)


def _remote_view(location: Path, path: str, size: int, sha256: Optional[str]) -> RemoteFile:
    """A file as the Hub lists it: large files and weights through LFS, the rest as git blobs."""
    if size <= LFS_THRESHOLD and not path.endswith(_LFS_SUFFIXES):
        blob = git_blob_sha1(size)
        blob.update(location.read_bytes())
        return RemoteFile(path, size, blob.hexdigest())
    sha256 = sha256 or sha256_file(location)
    # The text of the LFS pointer; its blob id is the `oid` of the entry (git-lfs specification).
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    blob = git_blob_sha1(len(pointer))
    blob.update(pointer)
    return RemoteFile(path, size, blob.hexdigest(), sha256)


def _lfs(file: RemoteFile, key: str) -> Dict[str, Any]:
    """What an answer tells of a file that the Hub keeps in LFS, with its SHA-256 under `key`."""
    return {"lfs": {key: file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {}


@lru_cache(maxsize=4)  # a client asks page after page
def tree_entries(repo: MirrorRepo, below: str, recursive: bool) -> Sequence[Mapping[str, Any]]:
    """The Hub's tree answer for a folder ("" = root), sorted by path, folders included."""
    prefix = below + "/" if below else ""
    folders: Set[str] = set()
    entries: List[Dict[str, Any]] = []
    for path, file in repo.files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        depth = len(parts) if recursive else min(len(parts), 2)
        folders.update(prefix + "/".join(parts[:i]) for i in range(1, depth))
        if recursive or len(parts) == 1:
            entries.append({"type": "file", "oid": file.git_sha1, "size": file.size, "path": path, **_lfs(file, "oid")})
    for path in folders:
        entries.append({"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path})
    return sorted(entries, key=lambda entry: str(entry["path"]))


def repo_info(repo: MirrorRepo) -> Dict[str, Any]:
    """The Hub's answer to /api/models/ID/revision/REV."""
    license, files = repo.source.license, sorted(repo.files.items())
    siblings = [{"rfilename": p, "size": f.size, "blobId": f.git_sha1, **_lfs(f, "sha256")} for p, f in files]
    return {
        "_id": repo.commit[:24],
        "id": repo.repo,
        "modelId": repo.repo,
        "author": repo.repo.rpartition("/")[0] or None,
        "sha": repo.commit,
        **dict.fromkeys(("private", "gated", "disabled"), False),
        **dict.fromkeys(("downloads", "likes"), 0),
        "tags": [f"license:{license}"] if license else [],
        "cardData": {"license": license} if license else {},
        "siblings": siblings,
        "usedStorage": repo.size,
    }


def parse_byte_range(header: Optional[str], size: int) -> Optional[Tuple[int, int]]:
    """[start, stop) of a Range header; None when the whole file is to be sent (no header, another unit, several
    ranges). Raises ValueError when nothing of the range exists (416).

    >>> [parse_byte_range(h, 10) for h in ("bytes=2-4", "bytes=5-", "bytes=-3", None, "bytes=0-1,4-5")]
    [(2, 5), (5, 10), (7, 10), None, None]
    """
    match = re.match(r"bytes=(\d*)-(\d*)$", (header or "").replace(" ", ""))
    if not match or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
    if start >= stop:
        raise ValueError("range not satisfiable")
    return start, stop


def asked_number(text: Optional[str], otherwise: int) -> int:
    """The whole number in a query or header; `otherwise` when it is none.

    >>> [asked_number(text, 7) for text in ("3", None, "\xb2", "-1")]
    [3, 7, 7, 7]
    """
    return int(text) if text and re.fullmatch("[0-9]{1,15}", text) else otherwise


class HubHandler(BaseHTTPRequestHandler):
    """One connection of a Hub client. Subclasses (the test Hub) override the small steps to misbehave."""

    protocol_version = "HTTP/1.1"
    server_version = f"hfship/{__version__}"
    timeout = 60
    disable_nagle_algorithm = True
    server: MirrorServer

    def do_GET(self) -> None:
        self.status = self.sent = 0
        self.server.answering.add(self)
        try:
            self.route(urlsplit(self.path))
        except (ConnectionError, TimeoutError, SSLError):
            self.close_connection = True
        except OSError as exc:  # a file that vanished or cannot be read must not end the mirror
            self.close_connection = True
            self.server.reporter.warn(f"{self.path}: {exc.strerror}")
            if not self.status:
                self.send_error_code(500, "InternalError", "the file cannot be read; the mirror's log says why")
        finally:
            self.server.answering.discard(self)
            self.server.log_access(self.access_line())
            self.close_connection |= self.server.closing

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """The questions that clients POST; whatever would write finds a 403 in route()."""
        length = self.headers.get("Content-Length", "0")
        size = asked_number(length, 0)
        body = self.rfile.read(size) if size <= CHUNK else b""
        self.close_connection |= not body  # what was not read would be taken for the next request
        text = body.decode("utf-8", "replace")
        self.paths: Sequence[str] = ()
        with contextlib.suppress(ValueError, TypeError, KeyError):
            is_json = "json" in self.headers.get("Content-Type", "")
            self.paths = list((json.loads(text) if is_json else parse_qs(text))["paths"])
        self.do_GET()

    do_PUT = do_PATCH = do_DELETE = do_POST

    def access_line(self) -> str:
        """The request in the combined format of web servers; no token is in it, and no byte that a terminal obeys."""
        said = [self.requestline, self.headers.get("Referer", "-"), self.headers.get("User-Agent", "-")]
        hidden = [self.server.token.value] if self.server.token else []
        line, referer, agent = (re.sub(r'[^ -~]|["\\]', "?", redact(text, hidden)) for text in said)
        now = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime())
        return f'{self.client_address[0]} - - [{now}] "{line}" {self.status} {self.sent} "{referer}" "{agent}"'

    def log_request(self, code: Union[int, str] = "-", size: Union[int, str] = "-") -> None:
        """Said by log_access when the answer is over."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        self.server.reporter.detail(f"{self.address_string()} {format % args}")

    def refused(self) -> bool:
        """Whether the token is missing or wrong: then 401 as the Hub says it, so that clients say their own words."""
        token, given = self.server.token, self.headers.get("Authorization", "")
        if token is None or secrets.compare_digest(given.encode("utf-8", "replace"), f"Bearer {token.value}".encode()):
            return False
        message = "Invalid credentials in Authorization header" if given else "Invalid username or password."
        self.send_error_code(401, "" if given else "RepoNotFound", message, {"WWW-Authenticate": "Bearer"})
        return True

    def route(self, url: SplitResult) -> None:
        """Find the handler of a path. Segments are unquoted one by one: a revision may hold an encoded '/'."""
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if url.path == "/health":
            self.send_json(200, {"hfship": __version__})
        elif self.refused():
            pass
        elif self.command not in ("GET", "HEAD") and "paths-info" not in parts:
            self.send_error_code(403, "ReadOnly", "This mirror is read-only: nothing can be uploaded or changed here")
        elif parts[0] == "api" and parts[1:2] and parts[1][:-1] in REPO_TYPES:
            self.route_api(parts[1][:-1], parts[2:], query)
        elif parts == ["api", "whoami-v2"]:
            access = {"type": "access_token", "accessToken": {"displayName": "mirror", "role": "read"}}
            self.send_json(200, {"type": "user", "name": "mirror", "fullname": "mirror", "orgs": [], "auth": access})
        elif "resolve" in parts[1:]:
            repo_type = parts.pop(0)[:-1] if parts[0] in ("datasets", "spaces") else "model"
            at = parts.index("resolve")
            self.send_file("/".join(parts[:at]), repo_type, parts[at + 1 :])
        elif url.path == "/":
            library = self.server.library
            repos = [repo.repo for repo in library.repos()]
            self.send_json(200, {"hfship": __version__, "repos": repos, "left_out": library.left_out})
        else:
            self.send_error_code(404, "EntryNotFound", "no such page")

    def route_api(self, repo_type: str, parts: List[str], query: Mapping[str, str]) -> None:
        """/api/models[/{ID}[/VERB[/REV[/PATH...]]]] where ID has one or two segments."""
        verbs = ("revision", "tree", "paths-info", "refs", "treesize", "auth-check")
        at = next((i for i, part in enumerate(parts[:3]) if i and part in verbs), len(parts))
        verb, rest = (parts[at], parts[at + 1 :]) if at < len(parts) else ("revision", [])
        repo = self.find("/".join(parts[:at]), repo_type, rest[0] if rest else "main") if parts else None
        if repo:
            self.answer_api(repo, verb, "/".join(rest[1:]), query)
        elif not parts:
            self.send_list(repo_type, query)

    def find(self, repo_id: str, repo_type: str, revision: str) -> Optional[MirrorRepo]:
        """The repository asked for; None when the answer 404 was sent, which says what is not there."""
        library = self.server.library
        repo = library.find(repo_type, repo_id, revision)
        if repo is None and library.find(repo_type, repo_id):
            self.send_error_code(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif repo is None:
            name = repo_id.lower().rpartition("/")[2]
            known = [why for left, why in library.left_out.items() if left.lower().rpartition("/")[2] == name]
            self.send_error_code(404, "RepoNotFound", "; ".join(["Repository not found", *known]))
        return repo

    def send_list(self, repo_type: str, query: Mapping[str, str]) -> None:
        """/api/models?search=WORDS&author=ORG&limit=N"""
        held = [repo for repo in self.server.library.repos() if repo.source.repo_type == repo_type]
        author, words = query.get("author", "").lower(), query.get("search", "").lower()
        limit = asked_number(query.get("limit"), len(held))
        found = [r for r in held if words in r.repo.lower() and r.repo.lower().startswith(author)]
        self.send_json(200, [{**repo_info(repo), "siblings": []} for repo in found[:limit]])

    def answer_api(self, repo: MirrorRepo, verb: str, path: str, query: Mapping[str, str]) -> None:
        if verb == "tree":
            self.send_tree(repo, path, query)
        elif verb == "paths-info":
            asked = {path for path in getattr(self, "paths", ()) if isinstance(path, str)}
            self.send_json(200, [entry for entry in tree_entries(repo, "", True) if entry["path"] in asked])
        elif verb == "refs":
            held = self.server.library.shelf().get((repo.source.repo_type, repo.repo.lower()), [repo])
            names = {r.source.revision: r.commit for r in reversed(held) if r.source.revision != r.commit}
            names["main"] = repo.commit
            heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": names[n]} for n in sorted(names)]
            self.send_json(200, {"branches": heads, "tags": [], "converts": []})
        elif verb == "treesize":
            self.send_json(200, {"path": "/", "size": repo.size})
        elif verb == "auth-check":
            self.send_json(200, {})
        else:
            self.send_json(200, repo_info(repo))

    def send_tree(self, repo: MirrorRepo, below: str, query: Mapping[str, str]) -> None:
        """One page of the tree; the cursor is the position of the next entry."""
        entries = tree_entries(repo, below, query.get("recursive", "").lower() in ("1", "true"))
        if below and not entries:
            self.send_error_code(404, "EntryNotFound", f"{below} does not exist on this revision")
            return
        limit = asked_number(query.get("limit"), 0) or self.server.tree_page  # pages of none would never end
        start = asked_number(query.get("cursor"), 0)
        headers = {}
        if start + limit < len(entries):
            again = urlencode({**query, "cursor": start + limit, "limit": limit})
            headers["Link"] = f'<{self.base_url()}{urlsplit(self.path).path}?{again}>; rel="next"'
        self.send_json(200, entries[start : start + limit], headers)

    def base_url(self) -> str:
        """This mirror as its client reaches it, maybe through a proxy that ends TLS."""
        host, scheme = self.headers.get("Host"), self.headers.get("X-Forwarded-Proto")
        if scheme not in ("http", "https"):
            scheme = urlsplit(self.server.url).scheme
        named = re.fullmatch(r"[\w.:\[\]-]+", host or "", re.ASCII)
        return f"{scheme}://{host}" if named else self.server.url

    def send_file(self, repo_id: str, repo_type: str, parts: List[str]) -> None:
        """/ID/resolve/REV/PATH"""
        repo = self.find(repo_id, repo_type, parts[0] if parts else "")
        file = repo.files.get("/".join(parts[1:])) if repo else None
        if repo and file:
            self.send_content(repo, file)
        elif repo:
            self.send_error_code(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})

    def send_content(self, repo: MirrorRepo, file: RemoteFile) -> None:
        """The bytes of a file, or the range asked for, by sendfile."""
        etag, size = f'"{file.etag}"', str(file.size)
        headers = {"X-Repo-Commit": repo.commit, "X-Linked-Size": size, "X-Linked-Etag": etag}
        self.send_bytes(repo, file, etag, headers)

    def send_bytes(self, repo: MirrorRepo, file: RemoteFile, etag: str, headers: Mapping[str, str]) -> None:
        """Answer GET or HEAD for a file, with ranges."""
        size, wanted = file.size, self.headers.get("Range")
        if self.headers.get("If-Range") not in (None, etag):
            wanted = None
        try:
            span = parse_byte_range(wanted, size)
        except ValueError:
            self.send_head(416, 0, {"Content-Range": f"bytes */{size}", **headers})
            return
        start, stop = span or (0, size)
        extra = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        if span:
            extra["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send_head(206 if span else 200, stop - start, extra)
        if self.command != "HEAD" and stop > start:
            with (repo.folder / file.path).open("rb") as stream:
                self.send_body(stream, start, stop)

    def send_body(self, stream: IO[bytes], start: int, stop: int) -> None:
        """Bytes [start, stop) of an open file: by sendfile, or through TLS in large pieces."""
        self.wfile.flush()
        if not self.server.tls:
            self.sent = self.connection.sendfile(stream, start, stop - start)
        stream.seek(start + self.sent)
        for piece in iter(lambda: stream.read(min(CHUNK, stop - start - self.sent)), b""):
            self.connection.sendall(piece)
            self.sent += len(piece)
        self.close_connection |= self.sent < stop - start  # the file became shorter: the client counts bytes

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.send_response(status)
        if self.server.closing:
            self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name, re.sub("[^ -~]", "?", value))  # it may quote what the client sent
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_json(self, status: int, value: object, headers: Optional[Mapping[str, str]] = None) -> None:
        body = json.dumps(value).encode()
        self.send_head(status, len(body), {"Content-Type": "application/json; charset=utf-8", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.sent = len(body)

    def send_error_code(
        self, status: int, code: str, message: str, headers: Optional[Mapping[str, str]] = None
    ) -> None:
        """An error in the Hub's form."""
        named = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.send_json(status, {"error": message}, named)


class MirrorServer(ThreadingHTTPServer):
    """The mirror: one thread per connection. `token`: what every client must send; `tls`: an ssl.SSLContext."""

    daemon_threads = True
    request_queue_size = 1024  # several hundred clients may connect in the same instant

    def __init__(
        self,
        address: Tuple[str, int],
        library: Library,
        reporter: Reporter,
        handler: Type[HubHandler] = HubHandler,
        tree_page: int = TREE_PAGE,
        token: Optional[Token] = None,
        tls: Any = None,
        access_log: Optional[Path] = None,
    ) -> None:
        self.library, self.reporter, self.tree_page = library, reporter, tree_page
        self.token, self.tls, self.closing, self._access_log = token, tls, False, access_log
        self.answering: Set[HubHandler] = set()
        self.address_family = family_of(address[0])
        try:
            super().__init__(address, handler)
        except (OSError, TypeError, UnicodeError) as exc:  # the last two for what cannot be the name of a host
            where = f"{address[0]}:{address[1]}"
            step = "choose another --port, or stop what listens there (ss -ltnp)"
            raise HostError(f"cannot listen on {where}", getattr(exc, "strerror", "") or str(exc), step) from exc

    def server_bind(self) -> None:
        """Without the base class's question to the DNS, which nobody answers behind an air gap."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: a client that is slow to shake hands holds up nobody else."""
        if self.tls:
            request.settimeout(HubHandler.timeout)
            request = self.tls.wrap_socket(request, server_side=True)
        with request:
            super().finish_request(request, client_address)

    def log_access(self, line: str) -> None:
        """To the file, which is opened for each line so that logrotate may take it away, or to the details."""
        path = self._access_log
        if path is None:
            self.reporter.detail(line)
            return
        try:
            with path.open("a", encoding="ascii") as log:
                log.write(line + "\n")
        except OSError as exc:  # no reason to fail a client
            self.reporter.warn(f"cannot write {path}: {exc.strerror}")

    def drain(self, limit_s: float) -> None:
        """Take no new connection, and let the answers on their way finish for at most `limit_s`."""
        self.closing = True
        self.shutdown()
        self.server_close()
        if self.answering:
            self.reporter.info(f"stopping when {len(self.answering)} answers are sent; Ctrl-C again stops at once")
        until = time.monotonic() + limit_s
        while self.answering and time.monotonic() < until:
            time.sleep(0.05)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A fault of one connection ends that connection only; a client that hangs up is no fault."""
        exc = sys.exc_info()[1]
        say = self.reporter.detail if isinstance(exc, OSError) else self.reporter.warn
        say(f"{client_address[0]}: {type(exc).__name__}: {exc}")

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = host if isinstance(host, str) else host.decode()
        return f"{'https' if self.tls else 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


def load_tls(certificate: Path, key: Optional[Path]) -> Any:
    """The TLS side of a server. Raises UsageError for files that do not fit."""
    import ssl  # costs 10 ms that other commands need not spend

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=lambda: b"")  # never ask at a terminal
    except (OSError, ValueError) as exc:
        step = "give --tls-cert the PEM file of the certificate and its chain, --tls-key that of its key, no password"
        raise UsageError(f"TLS cannot use {certificate}", str(exc), step) from exc
    return context


# ======================================================================================
# §18 Jobs
#
# Owns what a runbook does around the other verbs: look after runs, carry archives over a network (push), remove what
# killed runs left (clean), and say what a machine can do (doctor).
#
# What is known of runs while they run and after: each fetch, pack, verify, unpack, serve and push has a log
# JOB.log in the log folder and beside it a record JOB.json, and watch, stop, logs and --resume-all work with these.
#
# The record (`hfship-job/1`, JSON, replaced atomically up to four times a second) holds the fields of JobRecord.
# `state` is running, done, failed, stopped (by Ctrl-C or `stop`) or interrupted (killed, terminal closed, reboot),
# and whoever reads it takes "running" for interrupted when the process is gone. A run that is refused before it began
# (arguments, locks, nothing found) leaves no record.
#
# Promises: a record or a log that cannot be written never stops the work; no secret is in a record.
# Never: signals, resumes or believes a process because of what another user's record says.
# ======================================================================================

JOB_FORMAT = "hfship-job/1"
RECORD_INTERVAL_S = 0.25
LOG_PROGRESS_S = 30.0
START_WAIT_S = 5.0  # a run that neither works nor ended by then has begun: it waits for a network, a disk, docker
JOBS_KEPT, JOB_DAYS = 100, 14  # ended jobs beyond these go, with their logs
OTHER_LOGS = "/home/*/logs/hfship"  # where watch looks for the jobs of other users
STOP_STEPS = ((signal.SIGINT, 5.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))  # and how long each may take
SECRET_OPTIONS = ("--env", "--api-key", "--token", "--password")  # their values are in no record
# What a job that is resumed by cron or systemd must find again of the environment that it was started in.
_KEPT_VARIABLES = re.compile(
    r"HFSHIP_(\w+_DIR|KEY)|HF_(ENDPOINT|HOME|TOKEN_PATH|HUB_\w+)|XDG_CACHE_HOME|PATH|LANG|LC_ALL|TMPDIR|DOCKER_(HOST"
    r"|CONFIG)|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE|(?i:https?|all|no)_(?i:proxy)"
)


@dataclass(frozen=True)
class JobRecord:
    """One run: how it was started, the process, and how far it is. Times are seconds since the epoch."""

    name: str = ""
    command: str = ""
    words: Tuple[str, ...] = ()  # the command line after the program; *** where a secret was
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    needs: Tuple[str, ...] = ()  # environment variables with secrets that it had
    background: bool = False
    host: str = ""
    pid: int = 0
    start: str = ""  # process_start and boot_id: no other process that gets the number is taken for it
    boot_id: str = ""
    began_at: float = 0.0
    updated_at: float = 0.0
    state: str = "running"
    stage: str = ""
    unit: str = "B"
    done: int = 0
    total: int = 0
    files: int = 0
    finished: int = 0  # files
    rate: float = 0.0  # units per second, lately
    exit_code: Optional[int] = None
    error: Mapping[str, str] = field(default_factory=dict)  # what, why, next


class Job(NamedTuple):
    """A record, the folder in which it lies, whose it is, and its state as it is now."""

    record: JobRecord
    folder: Path
    uid: int
    state: str

    @property
    def log(self) -> Path:
        return self.folder / (self.record.name + ".log")

    @property
    def label(self) -> str:
        """The name, with that of its user when that is somebody else."""
        return self.record.name if self.uid == os.geteuid() else f"{self.user}:{self.record.name}"

    @property
    def user(self) -> str:
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def resumable(self) -> bool:
        """Did something else than its own work end it, or the network, which comes back?"""
        return self.state == "interrupted" or self.state == "failed" and self.record.exit_code == Exit.NETWORK

    @property
    def left_s(self) -> Optional[float]:
        """Seconds to the end of the stage at the present speed; None when that cannot be told."""
        r = self.record
        return (r.total - r.done) / r.rate if self.state == "running" and r.rate >= 1 and r.total >= r.done else None


def job_name(command: str, subjects: Sequence[str]) -> str:
    """The name for a run of `command` on these models or archives.

    >>> [job_name("fetch", w) for w in (["Qwen/Qwen3-8B@main"], ["/t/m.tar.zst.0001", "n"], [])]
    ['fetch-Qwen3-8B', 'fetch-m+1', 'fetch-all']
    """
    first = re.sub(r"@.*|\.tar\.zst.*", "", subjects[0].rstrip("/").rpartition("/")[2]) if subjects else ""
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", first).strip("-.")[:60] or "all"
    return f"{command}-{label}" + (f"+{len(subjects) - 1}" if len(subjects) > 1 else "")


def public_words(words: Sequence[str]) -> Tuple[str, ...]:
    """A command line as it may be written down.

    >>> public_words(["serve", "m", "--env", "A=b", "--token=c", "http://u:pass@h"])
    ('serve', 'm', '--env', '***', '--token=***', 'http://u:***@h')
    """
    clean: List[str] = []
    for before, word in zip(["", *words], words):
        option, has_value, _ = word.partition("=")
        secret = f"{option}=***" if option in SECRET_OPTIONS and has_value else ""
        clean.append("***" if before in SECRET_OPTIONS else secret or redact(word))
    return tuple(clean)


def current_folder() -> str:
    """Where we are; / when that was removed."""
    with contextlib.suppress(FileNotFoundError):
        return os.getcwd()
    return "/"


def new_record(name: str, words: Sequence[str], background: bool, env: Mapping[str, str]) -> JobRecord:
    """The record of this process."""
    pid, now = os.getpid(), time.time()
    kept = {k: v for k, v in env.items() if _KEPT_VARIABLES.fullmatch(k)}
    secret = [k for k, v in kept.items() if redact(v) != v] + [k for k in TOKEN_VARIABLES if env.get(k)]
    return JobRecord(
        name=name,
        command=words[0],
        words=public_words(words),
        cwd=current_folder(),
        env={k: v for k, v in kept.items() if k not in secret},
        needs=tuple(secret),
        background=background,
        host=socket.gethostname(),
        pid=pid,
        start=process_start(pid),
        boot_id=boot_id(),
        began_at=now,
        updated_at=now,
    )


def parse_job(content: bytes) -> JobRecord:
    """Read a record. Raises ValueError for what is none."""
    value = json.loads(content)
    if not isinstance(value, dict) or value.get("format") != JOB_FORMAT:
        raise ValueError(f"its format is not {JOB_FORMAT}")
    known = typed_fields(JobRecord(), value)
    for key, found in known.items():
        inner = [*found.values()] if isinstance(found, dict) else found if isinstance(found, tuple) else []
        if not all(isinstance(x, str) for x in inner):
            raise ValueError(f"{key} is not what it should be")
    return JobRecord(**known)


def state_of(record: JobRecord) -> str:
    """The state now. Of another machine's process its silence tells."""
    if record.host == socket.gethostname():
        alive = still_runs(record.pid, record.start, record.boot_id)
    else:
        alive = time.time() - record.updated_at < LEASE_EXPIRY_S
    return record.state if alive or record.state != "running" else "interrupted"


def read_job(path: Path) -> Job:
    """The job whose record lies at `path`. Raises OSError and ValueError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        record, uid = parse_job(stream.read(1 << 20)), os.fstat(stream.fileno()).st_uid
    if record.name != path.stem or not re.fullmatch(r"[A-Za-z0-9._+-]+", record.name):
        raise ValueError(f"it is of another job, {printable(record.name)}")
    return Job(record, path.parent, uid, state_of(record))


def read_jobs(folders: Iterable[Path], complain: Callable[[str], None] = lambda _: None) -> List[Job]:
    """All jobs of log folders: the running ones by name, then the others, the youngest first."""
    jobs = []
    for path in (path for folder in folders for path in folder.glob("*.json")):
        try:
            jobs.append(read_job(path))
        except FileNotFoundError:
            continue  # it has just expired
        except (OSError, ValueError) as exc:
            complain(f"{path} is not the record of a job ({exc}); remove it if it is not needed")
    running = sorted((job for job in jobs if job.state == "running"), key=lambda job: job.record.name)
    return running + sorted((j for j in jobs if j.state != "running"), key=lambda job: -job.record.updated_at)


def write_job(folder: Path, record: JobRecord) -> None:
    """Replace a record. Raises DiskError."""
    text = json.dumps({"format": JOB_FORMAT, **asdict(record)}, indent=1)
    atomic_write(folder / (record.name + ".json"), text, durable=False)


def expire_jobs(folder: Path) -> None:
    """Remove our ended jobs that are old or too many, with their logs."""
    ended = [job for job in read_jobs([folder]) if job.state != "running" and job.uid == os.geteuid()]
    for number, job in enumerate(ended):
        if number >= JOBS_KEPT or time.time() - job.record.updated_at > JOB_DAYS * 86400:
            for path in [folder / (job.record.name + ".json"), *log_files(job)]:
                with contextlib.suppress(OSError):  # another run expires it too
                    path.unlink()


def log_files(job: Job) -> List[Path]:
    """The log of a job, the oldest part first."""
    parts = [job.log.with_name(f"{job.log.name}.{number}") for number in range(LOG_KEEP, 0, -1)]
    return [path for path in [*parts, job.log] if path.is_file()]


def free_name(folder: Path, record: JobRecord) -> str:
    """The name of an earlier run of the same command, or one that no run needs any more."""
    for number in range(1, 1000):
        name = record.name + (f"-{number}" if number > 1 else "")
        try:
            old = read_job(folder / f"{name}.json")
        except (FileNotFoundError, ValueError):
            break
        asked = [[w for w in r.words if w != "--background"] + [r.cwd] for r in (record, old.record)]
        over = old.state != "running" and (not old.resumable or asked[0] == asked[1])
        if over and old.uid == os.geteuid():
            break
    return name


class JobKeeper:
    """Keeps the record and the log of this run up to date, from a thread of its own. A detached process tells its
    name through `pipe`, and lets go of the terminal, when it has begun."""

    def __init__(self, reporter: Reporter, folder: Path, record: JobRecord, form: str, pipe: int = -1) -> None:
        self._reporter, self._folder, self._form, self._pipe = reporter, folder, form, pipe
        self._record = record
        self._seen: Deque[Tuple[Stage, float, int]] = deque(maxlen=40)  # ten seconds of (stage, time, done)
        self._broken = self._running = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="job", daemon=True)
        self._thread.start()

    def end(self, code: int, state: str) -> None:
        """Write down how the run ended, unless it was refused before it began."""
        worked = self._reporter.working.is_set()
        self._over.set()
        self._reporter.working.set()
        self._thread.join()
        failure, stages = self._reporter.failure, self._reporter.past
        if code and not (worked or self._running):
            if self._pipe >= 0 and failure:
                self._answer(json.dumps(self._reporter.redacted(error_row(failure))))
            return
        if not self._running:
            self._begin()
        main = max(stages, key=lambda stage: (stage.unit == "B", stage.done), default=None)
        error = self._reporter.redacted(error_fields(failure)) if code and failure else {}
        rate = main.rate if main else 0.0
        self._write(replace(self._now(main), rate=rate, stage="", state=state, exit_code=code, error=error))
        self._summarize(stages, code)

    def _keep(self) -> None:
        self._reporter.working.wait(START_WAIT_S)
        if self._over.is_set():
            return
        self._begin()
        logged = time.monotonic()
        while not self._over.wait(RECORD_INTERVAL_S):
            stages = self._reporter.stages[-1:]
            new, old = self._now(*stages), self._record
            if replace(new, updated_at=old.updated_at) != old or new.updated_at - old.updated_at > LEASE_BEAT_S:
                self._write(new)
            if stages and time.monotonic() - logged > LOG_PROGRESS_S:
                logged = time.monotonic()
                self._reporter.log_progress(stages[0])

    def _begin(self) -> None:
        """Take a name, write the first record and open the log."""
        self._running = True
        try:
            with opened(make_dir(self._folder)) as fd:
                with contextlib.suppress(OSError):  # NFS does not lock folders
                    fcntl.flock(fd, fcntl.LOCK_EX)  # two runs that begin together get two names
                self._record = replace(self._record, name=free_name(self._folder, self._record))
                self._write(self._now(*self._reporter.stages[-1:]))
            self._reporter.job = self._record.name
            expire_jobs(self._folder)
            self._reporter.log("info", "began: " + command_line("hfship", *self._record.words))
            self._reporter.open_log(self._folder / (self._record.name + ".log"), self._form)
        except (OSError, DiskError) as exc:
            self._complain(exc if isinstance(exc, DiskError) else disk_error(exc, "write the log in", self._folder))
        if self._pipe >= 0:
            os.dup2(1, 2)
            self._answer(self._record.name)

    def _answer(self, text: str) -> None:
        """Tell the process that waits for us the name of the job, or as JSON why there is none."""
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._pipe, "w") as stream:
            stream.write(text)

    def _now(self, stage: Optional[Stage] = None) -> JobRecord:
        """The record as it is now."""
        record = replace(self._record, updated_at=time.time(), stage=self._reporter.doing)
        if stage is None:
            return record
        now, new = time.monotonic(), stage.done - stage.skipped
        if self._seen and self._seen[-1][0] is not stage:
            self._seen.clear()
        self._seen.append((stage, now, new))
        _, then, old = self._seen[0]
        rate = round(max(new - old, 0) / (now - then)) if now - then > 1 else round(stage.rate)
        alike = [s for s in self._reporter.past if s.name == stage.name and s is not stage] + [stage]  # one per model
        record = replace(record, files=sum(s.files for s in alike), finished=sum(s.finished for s in alike), rate=rate)
        return replace(record, done=sum(s.done for s in alike), total=sum(s.total for s in alike), unit=stage.unit)

    def _write(self, record: JobRecord) -> None:
        self._record = record
        try:
            write_job(self._folder, record)
            self._broken = False
        except DiskError as exc:
            self._complain(exc)

    def _complain(self, exc: DiskError) -> None:
        if not self._broken:
            self._broken = True
            self._reporter.warn(f"{exc.what}; the work goes on, but `hfship watch` does not see it")

    def _summarize(self, stages: Sequence[Stage], code: int) -> None:
        """The block at the end: in the log, and on stderr after a run long enough to be looked after."""
        record, reporter, took = self._record, self._reporter, time.time() - self._record.began_at
        moved: Dict[str, Tuple[int, float]] = {}
        for stage in (stage for stage in stages if stage.unit == "B" and stage.done > stage.skipped):
            size, seconds = moved.get(stage.name, (0, 0.0))
            moved[stage.name] = size + stage.done - stage.skipped, seconds + max(stage.seconds, 1e-3)
        speeds = [f"{k} {human_bytes(b)} in {human_seconds(t)} ({human_bytes(b / t)}/s)" for k, (b, t) in moved.items()]
        rows = {
            "command": command_line("hfship", *record.words),
            "result": "; ".join(reporter.results),
            "moved": "; ".join(speeds),
            "took": human_seconds(took),
            "exit": f"{code} ({record.state})",
            "why": record.error.get("what", ""),
            "next": record.error.get("next", "") if code else as_typed(command_line(*reporter.next_words)),
            "log": str(self._folder / (record.name + ".log")),
        }
        rows = reporter.redacted({label: text for label, text in rows.items() if text})
        reporter.log("info", "summary", rows=rows)
        reporter.event("summary", **rows)
        if reporter.progress != "json" and reporter.verbosity >= (took < PLAIN_INTERVAL_S):
            said = ("why", "next") if code else ()  # by the error itself
            reporter.say(labelled(**{label: text for label, text in rows.items() if label not in said}))


# ---- background ----------------------------------------------------------------------


def detach(folder: Path) -> Tuple[int, int]:
    """Fork a process of its own session, which no terminal's end ends. Returns its id (0 in it) and a pipe: for it to
    say its name, for us to hear it. What it says goes to our stderr until it has begun.

    Raises DiskError when the log folder cannot be used: nobody would know of the job.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(4096))
    except OSError as exc:
        step = "free space, or choose another folder with --log-dir"
        raise disk_error(exc, "keep the log of a background job in", folder, step) from exc
    listen, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        return pid, listen
    os.close(listen)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored, and `stop` sends it
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return 0, tell


def await_job(pid: int, listen: int) -> Tuple[str, int]:
    """Wait until a detached process has begun: its name and 0; or ended: why, as JSON, and its exit code."""
    with os.fdopen(listen) as stream:
        try:
            said = stream.read()
            if said and not said.startswith("{"):
                return said, 0
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGINT)
            said = stream.read()
    _, status = os.waitpid(pid, 0)
    return said, os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def stop_job(job: Job) -> str:
    """End a job as Ctrl-C does, and by force when it does not listen; what came of it. Raises HostError."""
    record = job.record
    ours = record.host == socket.gethostname() and os.geteuid() in (0, job.uid)
    if ours and job.state == "running":
        with contextlib.suppress(FileNotFoundError):
            ours = os.stat(f"/proc/{record.pid}").st_uid == job.uid  # else the record is a trap for root
    if not ours:
        why = f"it is a job of {job.user} on {record.host}"
        raise HostError(f"cannot stop {job.label}", why, f"stop it there as {job.user}: hfship stop {record.name}")
    if job.state != "running" and not job.resumable:
        return f"{record.name} has ended already ({job.state})"
    process = record.pid, record.start, record.boot_id
    for signum, patience_s in STOP_STEPS:
        deadline = time.monotonic() + patience_s
        with contextlib.suppress(ProcessLookupError):
            if still_runs(*process):
                os.kill(record.pid, signum)
        while time.monotonic() < deadline and still_runs(*process):
            time.sleep(0.05)
    if still_runs(*process):
        raise HostError(f"{record.name} does not end", f"process {record.pid} hangs in the kernel", "check its disk")
    with contextlib.suppress(OSError, ValueError):
        ended = read_job(job.folder / (record.name + ".json")).record
        if ended.state != "done" and job.uid == os.geteuid():  # where it could not say so itself
            write_job(job.folder, replace(ended, state="stopped", exit_code=int(Exit.INTERRUPTED)))
    return f"stopped {record.name}; the same command goes on: {again(record)}"


def again(record: JobRecord) -> str:
    """The command of a job, to be typed once more."""
    place = "" if record.cwd == current_folder() else f"cd {shlex.quote(record.cwd)} && "
    return place + as_typed(command_line("hfship", *record.words))


def with_job(exc: InUseError, jobs: Sequence[Job], asked: str) -> InUseError:
    """The error with the name of the job that is in the way of the one which would be called `asked`."""
    running = [job.record for job in jobs if job.state == "running"]
    name = next((r.name for r in running if (r.pid == exc.pid if exc.pid else r.name == asked)), "")
    step = f"hfship logs -f {name}   or: hfship stop {name}"
    return InUseError(exc.what, f"{exc.why}\nthat is the job {name}", step, exc.pid) if name else exc


def follow_log(job: Job, follow: bool, tail: str, reporter: Reporter) -> None:
    """Show a job's log; with `follow` go on until the job or the operator ends it. Raises NotFoundError."""
    files = log_files(job)
    if job.log not in files:
        why = f"{job.log} is not there"
        raise NotFoundError(f"there is no log of {job.label}", why, "hfship watch --json tells more")
    stream = job.log.open("rb")
    old = [line for path in files[:-1] for line in path.read_bytes().splitlines()]
    lines = [*old, *stream.readlines()]
    lines = lines if tail == "all" else lines[max(len(lines) - int(tail), 0) :]
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            for line in lines:
                reporter.show(printable(line.decode("utf-8", "replace")) + "\n")
            running = job.record.name in {j.record.name for j in read_jobs([job.folder]) if j.state == "running"}
            turned_over = not job.log.exists() or not os.path.samestat(os.fstat(stream.fileno()), job.log.stat())
            lines = stream.readlines()
            if turned_over and job.log.exists():
                stream = job.log.open("rb")
                lines += stream.readlines()
            if not (follow and (running or lines)):
                return
            time.sleep(RECORD_INTERVAL_S)


def resume_jobs(jobs: Sequence[Job], reporter: Reporter) -> Iterator[Dict[str, Any]]:
    """Start again what was interrupted in the background on this machine; rows that say what came of each."""
    for job in jobs:
        record = job.record
        if not job.resumable or job.uid != os.geteuid() or record.host != socket.gethostname():
            continue
        if not record.background:
            reporter.info(f"{record.name} ran in the foreground, and is left to you: {again(record)}")
            continue
        try:
            name = resume_job(record, reporter)
            yield {"name": name, "state": "resumed", "text": f"resumed {name}"}
        except HfshipError as exc:
            reporter.error(exc)
            yield {"name": record.name, **error_row(exc), "text": ""}


def resume_job(record: JobRecord, reporter: Reporter) -> str:
    """Run a job's command again, with its folder and environment; the job's name. Secrets come from where they always
    come from."""
    what, step = f"cannot resume {record.name}", again(record)
    if "***" in " ".join(record.words):
        raise UsageError(what, "its command line had a secret, and no secret is written down", step)
    if not Path(record.cwd).is_dir():
        raise NotFoundError(what, f"its folder {record.cwd} is not there", f"mount it, or: hfship stop {record.name}")
    missing = [name for name in record.needs if not os.environ.get(name)]
    if set(missing) - set(TOKEN_VARIABLES) or missing and find_token({**os.environ, **record.env}) is None:
        file = hub_path({**os.environ, **record.env}, "token", "HF_TOKEN_PATH")
        reporter.warn(f"{record.name} had {', '.join(missing)}, which is not set now; a token is also read from {file}")
    env = {**record.env, **{name: os.environ[name] for name in TOKEN_VARIABLES if name in os.environ}}
    done = run_program([sys.executable, str(own_file()), *record.words], env=env, cwd=Path(record.cwd))
    if done.code:
        raise IncompleteError(f"{what}: exit code {done.code}", done.err.strip(), step)
    return done.out.strip() or record.name


def install_text(argv: Sequence[str], home: Path) -> str:
    """How to resume jobs after a reboot: a systemd user unit, and a line for cron where there is no systemd. Neither
    can wait for the network, so they give it a minute; a job that finds none is resumable again."""
    command = command_line(*argv)
    unit = home / ".config/systemd/user/hfship-resume.service"
    return f"""\
# With systemd: save these lines as {unit}, then run
#   systemctl --user enable hfship-resume && loginctl enable-linger
[Unit]
Description=Resume interrupted hfship jobs
[Service]
Type=oneshot
RemainAfterExit=yes
SuccessExitStatus=3
ExecStartPre=/bin/sleep 60
ExecStart={command.replace("%", "%%").replace("$", "$$")}
[Install]
WantedBy=default.target

# Without systemd: add this line with crontab -e
@reboot sleep 60; {command.replace("%", chr(92) + "%")}
"""


# ---- watch ---------------------------------------------------------------------------

_WATCH_HEADER = ("doing", "files", "   bytes", " done", "     speed", "time")


def short_seconds(seconds: float) -> str:
    """A duration in at most seven characters.

    >>> [short_seconds(s) for s in (0.4, 59.9, 61, 3700, 200_000, 1e12)]
    ['0s', '59s', '1m01s', '1h01m', '2d07h', '>999d']
    """
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= 1000 * size == 86_400_000:
            return ">999d"
        if seconds >= size:
            return f"{int(seconds // size)}{unit}{int(seconds % size // part):02d}{part_unit}"
    return f"{int(seconds)}s"


def job_cells(job: Job, now: float) -> Tuple[str, ...]:
    """What watch shows of a job beside its name."""
    r, running = job.record, job.state == "running"
    amount = human_bytes(r.done) if r.unit == "B" else str(r.done)
    speed = f"{human_bytes(r.rate)}/s" if r.unit == "B" and r.rate > 0 else ""
    left = f"{short_seconds(job.left_s)} left" if job.left_s is not None else ""
    return (
        printable(r.stage) if running else f"{job.state} {r.exit_code}" if job.state == "failed" else job.state,
        f"{r.finished}/{r.files}" if r.files else "",
        f"{amount if r.total else '':>8}",  # as wide as ever, so that columns keep their place
        f"{min(100 * r.done // r.total, 100)} %".rjust(5) if r.total > 0 else "",
        f"{speed:>10}",
        left if running else f"{short_seconds(max(now - r.updated_at, 0))} ago",
    )


def watch_lines(jobs: Sequence[Job], now: float, width: int, height: int) -> List[str]:
    """The jobs as a table that fits: at most `height` lines of `width` columns. Names give way, then the oldest."""
    running = [job for job in jobs if job.state == "running"]
    speed = sum(job.record.rate for job in running if job.record.unit == "B")
    together = f", {human_bytes(speed)}/s together" if speed else ""
    title = f"{len(running)} running{together}; {len(jobs) - len(running)} ended"
    if not jobs:
        return ["no jobs yet"[:width]]
    shown = jobs[: max(height - 5, 1)]
    rest = table([job_cells(job, now) for job in shown], _WATCH_HEADER).splitlines()
    room = max(width - max(map(len, rest)) - 2, 8)
    names = ["job", *(n if len(n) <= room else n[: room - 1] + "~" for n in (job.label for job in shown))]
    lines = [title, "", *(f"{name:<{max(map(len, names))}}  {cells}" for name, cells in zip(names, rest))]
    lines += [f"and {len(jobs) - len(shown)} more"] * (len(jobs) > len(shown))
    failed = [f"{job.label}: {printable(job.record.error.get('what', ''))}" for job in shown if job.state == "failed"]
    if any(job.resumable and job.record.background for job in shown):
        failed.append(as_typed("hfship watch --resume-all") + " goes on with what was interrupted")
    return [line[:width].rstrip() for line in [*lines, *[""][: len(failed)], *failed][:height]]


def job_row(job: Job) -> Dict[str, Any]:
    """A job for JSON."""
    left = None if job.left_s is None else round(job.left_s)
    extra = {"state": job.state, "user": job.user, "log": str(job.log), "seconds_left": left}
    return {**asdict(job.record), **extra}


@contextlib.contextmanager
def full_screen(reporter: Reporter) -> Iterator[Callable[[float], str]]:
    """The terminal's second screen; gives a function that waits up to so many seconds for a key. What was there before
    comes back at the end."""
    before = termios.tcgetattr(0) if os.isatty(0) else None

    def key(seconds: float) -> str:
        if before and select.select([0], [], [], seconds)[0]:
            return os.read(0, 16).decode("latin-1")
        time.sleep(0 if before else seconds)
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


def watch_on_screen(jobs: Callable[[], Sequence[Job]], interval_s: float, reporter: Reporter) -> None:
    """Show the jobs until q or Ctrl-C; every frame is one write over the one before, so nothing flickers."""
    with contextlib.suppress(KeyboardInterrupt), full_screen(reporter) as key:
        while True:
            width, height = (size or 80 for size in os.get_terminal_size(reporter.out.fileno()))
            lines = watch_lines(jobs(), time.time(), width, height - 2) if height > 3 else []
            keys = 'q quits; "logs -f JOB" follows one, "stop JOB" ends it'
            lines += [""] * (height - 1 - len(lines)) + [keys[:width]]
            reporter.show("\x1b[H" + "\n".join(line + "\x1b[K" for line in lines) + "\x1b[J")
            if "q" in key(interval_s):
                return


def watch_in_lines(jobs: Callable[[], Sequence[Job]], interval_s: float, as_json: bool, reporter: Reporter) -> None:
    """A line per job and interval until no job runs (one each if none does), for files and pipes; with `as_json` an
    array of jobs per line."""
    seen: Set[str] = set()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            now = jobs()
            running = {job.label for job in now if job.state == "running"}
            told = [job for job in now if job.label in running | seen] if running | seen else now
            if as_json:
                rows = [{"schema": reporter.schema, **job_row(job)} for job in now]
                reporter.show(json.dumps(rows, ensure_ascii=False) + "\n")
            for job in [] if as_json else told:
                cells = filter(None, map(str.strip, job_cells(job, time.time())))
                reporter.show(f"{utc()} {job.label}: {'  '.join(cells)}\n")
            seen = running
            if not running:
                return
            time.sleep(interval_s)


# ---- push ----------------------------------------------------------------------------
#
# While a file is on its way it is NAME.incomplete on the far side, and it gets its name there when its SHA-256 was
# proven there. So a cut line, a killed rsync or a power cut leaves nothing that looks complete, and rsync goes on
# behind the bytes that arrived (--append-verify: 1.4 s for the last quarter of 2 GB; finding the same bytes by its
# delta algorithm, which --partial-dir would use, takes 7 s). What arrived wrong is sent again by that algorithm.

PUSH_JOBS = 4  # ssh lets 2 MiB be on their way per connection: at 50 ms that is 40 MB/s, whatever the line could do
STREAM_BPS = 40_000_000  # a smaller limit is for one rsync at a time, so that the last files have all of it
SSH_OPTIONS = ("-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
_HASH_IN_PYTHON = """\
import hashlib, sys
expected, name = sys.stdin.readline().rstrip("\\n").split("  ", 1)
digest = hashlib.sha256()
with open(name, "rb") as stream:
    for piece in iter(lambda: stream.read(1 << 20), b""): digest.update(piece)
sys.exit(digest.hexdigest() != expected and name + ": FAILED")
"""
# POSIX sh on the far side; it comes by stdin, so no shell that a user may have as login shell takes it apart.
_PROBE_SCRIPT = """\
command -v rsync >/dev/null || echo 'rsync: not found'
mkdir -p -- {folder} && cd -- {folder} && test -w . || {{ echo 'cannot write there'; exit 73; }}
echo "at $(pwd -P)"
df -Pk . | tail -n 1 | sed 's/^/room /'
stat -c 'has %s %b %n' -- {names} 2>/dev/null
true
"""
_PROVE_SCRIPT = """\
cd -- {folder} || exit 73
{{ command -v sha256sum || command -v python3; }} >/dev/null || {{ echo 'no sha256sum and no python3 there'; exit 74; }}
if command -v sha256sum >/dev/null; then set -- sha256sum -c; else set -- python3 -c {python}; fi
"$@" <<'SUMS' || {{ {refuse}; exit 1; }}
{sha256}  {found}
SUMS
{accept}
"""
# Messages of ssh, rsync and the far side's shell -> what an operator has to know; the first row that matches wins.
_PUSH_FAILURES: Sequence[Tuple[str, Type[HfshipError], str, str]] = (
    (r"No space left on device|[Qq]uota exceeded", DiskError, "{place} is full",
     "free space there, then run the same command again: what arrived is kept"),
    (r"File too large", DiskError, "{place} takes no file of this size", "hfship pack --split fat32, then push again"),
    (r"cannot write there|Read-only file system|Permission denied \(13\)", DiskError, "cannot write to {place}",
     "choose a folder that this user may make or write to, or fix that one"),
    (r"\(code 11\) at receiver", DiskError, "the disk of {place} takes no more",
     "see df and the disk there, then run the same command again: what arrived is kept"),
    (r"IDENTIFICATION HAS CHANGED", AuthError, "the host key of {host} is not the one that is known here",
     "ask the owner of {host}, not over this line, whether the key was changed; only then: {remove}"),
    (r"Host key verification failed", AuthError, "the host key of {host} is not known here",
     "{ssh} once in a terminal, compare the fingerprint, then run the same command again"),
    (r"Permission denied|Too many authentication failures", AuthError, "{host} does not let us in",
     "ssh-copy-id, or name the key with --identity, or run it in a terminal to be asked for the password"),
    (r"Could not resolve hostname", NetworkError, "no host {host} is known", "check the name, or give the address"),
    (r"Connection refused", NetworkError, "{host} refuses the connection", "check --port, and that sshd runs there"),
    (r"timed out|No route to host|unreachable", NetworkError, "{host} does not answer", "check the line and --port"),
    (r"rsync: (?:command )?not found", HostError, "rsync is not installed on {host}", "install rsync on {host}"),
    (r"no sha256sum and no python3", HostError, "nothing on {host} can hash", "install coreutils or python3 there"),
)  # fmt: skip


@dataclass(frozen=True)
class Destination:
    """Where a push goes: `folder` on `host`, or on a disk of this machine (host ""); `ssh` is the command line."""

    host: str
    folder: str
    ssh: Tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.host}:{self.folder}" if self.host else self.folder

    def command(self, *options: str) -> List[str]:
        """The command line of ssh up to the host; of an IPv6 address ssh wants no brackets."""
        return [*self.ssh, *options, "--", re.sub(r"[\[\]]", "", self.host)]

    def run(self, script: str, stop: threading.Event) -> Completed:
        """Run a shell script there."""
        return follow_program([*self.command(), "sh"] if self.host else ["sh"], stop, script)

    def error(self, done: Completed) -> HfshipError:
        """What a failure of ssh, rsync or the shell there means."""
        host = self.host or "this machine"
        lines = [line for line in done.out.splitlines() if line.strip() and not line.startswith("@")]
        why = "\n".join(lines[-8:]) or f"exit status {done.code}"
        remove = (re.findall(r"ssh-keygen .*-R .*", done.out) or [f"ssh-keygen -R {host.rpartition('@')[2]}"])[0]
        for pattern, kind, what, step in _PUSH_FAILURES:
            if re.search(pattern, done.out):
                ssh = re.sub(r" -o \S+| --(?= )", "", shlex.join(self.command()))
                names = {"host": host, "place": str(self), "remove": remove, "ssh": ssh}
                return kind(what.format(**names), why, step.format(**names))
        again = "run the same command again: what arrived is kept"
        if done.code in (10, 12, 30, 35, 255):  # of rsync, and of ssh
            return NetworkError(f"the connection to {host} broke", why, again)
        return HostError(f"a program on {host} ended with {done.code}", why, f"put that right, then {again}")


def parse_destination(text: str, ssh: Sequence[str] = ()) -> Destination:
    """[USER@]HOST:DIR, as rsync reads it: a ':' before the first '/' tells a host. Without DIR or "~": the home there.

    >>> [str(parse_destination(t)) for t in ("me@gpu1:/data", "gpu1:~/in", "[::1]:in")]
    ['me@gpu1:/data', 'gpu1:in', '[::1]:in']
    """
    match = re.match(r"((?:[^@:/]+@)?(?:\[[^\]/]+\]|[^:/\[]+)):(.*)$", text)
    if not text.isprintable() or not text:
        raise UsageError(f"{text!r} is no destination", "", "write [USER@]HOST:DIR, or the path of a folder")
    if not match:
        return Destination("", os.path.abspath(os.path.expanduser(text)))
    if match[1].startswith("-"):
        raise UsageError(f"{match[1]!r} is not a host", "", "write [USER@]HOST:DIR")
    return Destination(match[1], re.sub(r"^~(/|$)", "", match[2]) or ".", tuple(ssh))


class Parcel(NamedTuple):
    """A file to push, and its hex SHA-256."""

    path: Path
    size: int
    sha256: str


def parcels_of(archives: Sequence[ArchiveFiles], reporter: Reporter) -> List[Parcel]:
    """The files of archives, with those that travel beside them first. Raises NotFoundError without NAME.sha256."""
    found: Dict[str, Parcel] = {}
    for files in archives:
        listed = files.listed()
        unlisted = [path.name for path in files.paths if path.name not in listed]
        if unlisted:
            step = f"hfship pack --force {files.name[: -len('.tar.zst')]}, or copy {files.sums.name} beside it"
            raise NotFoundError(f"{files.sums} has no sum of {unlisted[0]}", "the far side could not be proven", step)
        absent = sorted(set(listed) - {path.name for path in files.paths})
        if absent:
            reporter.warn(f"{files.name}: not here, and not pushed: {shorten(absent)}")
        beside = [files.sums, files.sums.with_name(files.name + SIGNATURE)]
        beside += [files.folder / name for name in ("hfship.pyz", "READ-ME-FIRST.txt")]
        for path in [*filter(Path.is_file, beside), *files.paths]:
            parcel = Parcel(path.absolute(), path.stat().st_size, listed.get(path.name) or sha256_file(path))
            if found.setdefault(path.name, parcel).sha256 != parcel.sha256:
                raise UsageError(f"two different files are called {path.name}", "", "push them one by one")
    return list(found.values())


class Push:
    """One push: knows what is there, sends what is not, and proves each file there. Safe to share between threads."""

    def __init__(
        self, to: Destination, parcels: Sequence[Parcel], stage: Stage, stop: threading.Event, streams: int
    ) -> None:
        self._to, self._parcels, self._stage, self._stop = to, parcels, stage, stop
        self._line = threading.Semaphore(streams)
        self._there: Dict[str, Tuple[int, int]] = {}  # name -> bytes, bytes on disk

    def prepare(self) -> None:
        """Make the folder, see what is there, and refuse when the rest has no room. Raises HfshipError."""
        names = [parcel.path.name + suffix for parcel in self._parcels for suffix in ("", INCOMPLETE)]
        quoted = " ".join(map(shlex.quote, names))
        done = self._to.run(_PROBE_SCRIPT.format(folder=shlex.quote(self._to.folder), names=quoted), self._stop)
        folder = re.search(r"^at (/.*)$", done.out, re.MULTILINE)
        if done.code or not folder or "rsync: not found" in done.out:
            raise self._to.error(done)
        self._to = replace(self._to, folder=folder[1])
        if not self._to.host:
            largest, step = max(parcel.size for parcel in self._parcels), "hfship pack --split fat32, then push again"
            require_room(Path(folder[1]), 0, largest, "push", step)
        for size, blocks, name in re.findall(r"^has (\d+) (\d+) (.*)$", done.out, re.MULTILINE):
            self._there[name] = int(size), int(blocks) * 512
        room = re.search(r"^room .* (\d+) +\d+% ", done.out, re.MULTILINE)
        free, needed = int(room[1]) * 1024 if room else sys.maxsize, sum(map(self._needed, self._parcels))
        if needed > free:
            why = f"{human_bytes(needed - free)} are missing"
            what = f"cannot push: {self._to} has {human_bytes(free)} free, {human_bytes(needed)} needed"
            raise DiskError(what, why, "free space there, or choose another folder")

    def _needed(self, parcel: Parcel) -> int:
        whole = self._there.get(parcel.path.name, (0, 0))
        partial = self._there.get(parcel.path.name + INCOMPLETE, (0, 0))
        return max(0, parcel.size - max(min(whole) if whole[0] == parcel.size else 0, min(partial)))

    def bring(self, parcel: Parcel, options: Sequence[str]) -> int:
        """Have a file there, proven; the bytes that were sent. Raises IntegrityError when it arrives wrong twice."""
        name, (partial, _) = parcel.path.name, self._there.get(parcel.path.name + INCOMPLETE, (0, 0))
        again = ["--inplace", "--ignore-times", "--no-whole-file"]  # sends only what differs
        if self._there.get(name, (-1, 0))[0] == parcel.size and self._proven(parcel, name):
            self._stage.skip(parcel.size)
            return 0
        sent = 0
        rounds = [again] if partial >= parcel.size or name in self._there else [["--append-verify"], again]
        for how in rounds:
            sent += self._send(parcel, [*how, *options], 0 if how is again else partial)
            if self._proven(parcel, name + INCOMPLETE):
                return sent
            self._stage.add(-parcel.size)
        step = f"hfship verify {parcel.path}, then look at the disk there"
        raise IntegrityError(f"{name} arrives damaged at {self._to}", f"its SHA-256 is not {parcel.sha256}", step)

    def _proven(self, parcel: Parcel, found: str) -> bool:
        """Prove a file there. One that is as it should be gets its name, a wrong one loses it."""
        name, partial = shlex.quote(parcel.path.name), shlex.quote(parcel.path.name + INCOMPLETE)
        accept, refuse = f"sync -- {partial} 2>/dev/null; mv -f -- {partial} {name}", "true"
        if found == parcel.path.name:
            accept, refuse = "true", f"mv -f -- {name} {partial}"
        texts = {"folder": shlex.quote(self._to.folder), "python": shlex.quote(_HASH_IN_PYTHON)}
        texts.update(accept=accept, refuse=refuse, sha256=parcel.sha256, found=found)
        done = self._to.run(_PROVE_SCRIPT.format(**texts), self._stop)
        if done.code and ": FAILED" not in done.out:
            raise self._to.error(done)
        return done.code == 0

    def _send(self, parcel: Parcel, options: Sequence[str], there: int) -> int:
        """One rsync; the bytes that went over the line. `there` were sent by an earlier run."""
        target = f"{self._to.folder}/{parcel.path.name}{INCOMPLETE}"
        shell = ["-s", "-e", shlex.join(self._to.ssh)] if self._to.host else []
        place = f"{self._to.host}:{target}" if self._to.host else target
        argv = ["rsync", "--times", "--info=progress2,stats2", "--no-h", *options, *shell, str(parcel.path), place]
        counted, literal = there, 0
        self._stage.skip(there)

        def tell(line: str) -> bool:
            nonlocal counted, literal
            amount = re.match(r" *(\d+) +\d+% ", line)
            if amount:
                position = max(counted, int(amount[1]))  # rsync begins to count at 0, then behind what was there
                self._stage.add(position - counted)
                counted = position
            total = re.match(r"Literal data: (\d+)", line)
            literal = int(total[1]) if total else literal
            return bool(amount or re.match(r"[A-Z][\w ()]+: [\d.]|sent \d|total size", line))

        with self._line:
            done = follow_program(argv, self._stop, tell=tell)
        if done.code:
            raise self._to.error(done)
        self._stage.add(parcel.size - counted)
        return literal


@contextlib.contextmanager
def open_line(to: Destination, asks: bool, reporter: Reporter) -> Iterator[Destination]:
    """The destination, reached without a question; where ssh has one and `asks`, it is put once on the terminal, and
    one connection then serves for all (BatchMode keeps a job without terminal from waiting for ever)."""
    batch = replace(to, ssh=(*to.ssh, "-o", "BatchMode=yes"))
    done = run_program([*batch.command(), "true"]) if to.host else Completed(0, "", "")
    question = re.search(r"Permission denied|Host key verification failed", done.err) and "CHANGED" not in done.err
    if done.code == 0 or not (asks and question):
        if done.code:
            raise to.error(replace(done, out=done.err))
        yield batch
        return
    reporter.info(f"ssh asks for {to.host}:")
    with tempfile.TemporaryDirectory(prefix="hfship-") as private:
        control = ("-o", f"ControlPath={private}/ssh")
        done = run_program(to.command(*control, "-MNf"))  # it asks at /dev/tty
        if done.code:
            raise to.error(replace(done, out=done.err))
        try:
            yield replace(batch, ssh=(*batch.ssh, *control))
        finally:
            run_program(to.command(*control, "-O", "exit"))


def push(to: Destination, parcels: Sequence[Parcel], jobs: int, limit_bps: int, reporter: Reporter) -> Dict[str, Any]:
    """Bring all files to where they go, `jobs` at a time, each proven there; the row that tells of it. rsync cannot
    change its limit while it runs: each has a fixed share, and while a file is proven the next one is sent."""
    streams = min(jobs, max(1, limit_bps // STREAM_BPS)) if limit_bps else jobs
    options = [f"--bwlimit={max(1, limit_bps // 1024 // streams)}"] if limit_bps else []
    stop, started = threading.Event(), time.monotonic()
    with reporter.stage("push", sum(parcel.size for parcel in parcels)) as stage:
        run = Push(to, parcels, stage, stop, streams)
        run.prepare()
        stage.started = time.monotonic()
        with ThreadPoolExecutor(jobs) as threads:
            try:
                arrived = threads.map(lambda parcel: run.bring(parcel, options), parcels)
                sent = list(stage.each(arrived, len(parcels)))
            finally:
                stop.set()
    rows = [{"name": p.path.name, "size": p.size, "sha256": p.sha256, "sent": n} for p, n in zip(parcels, sent)]
    seconds, total = time.monotonic() - started, sum(parcel.size for parcel in parcels)
    speed = f", sent {human_bytes(sum(sent))} in {human_seconds(seconds)} ({human_bytes(sum(sent) / seconds)}/s)"
    there = f", {human_bytes(total - sum(sent))} were there already" if sum(sent) < total else ""
    text = f"pushed to {to}: {counted(len(rows), 'file')}, {human_bytes(total)}, every sum proven there"
    amounts = {"bytes": total, "bytes_sent": sum(sent), "seconds": round(seconds, 2)}
    return {"to": str(to), **amounts, "files": rows, "text": text + speed * bool(sum(sent)) + there}


# ---- clean ---------------------------------------------------------------------------
#
# Removes what killed runs of hfship and huggingface_hub left, and nothing else: a file goes only if its name and place
# say that it is unfinished or unused, if nobody works in its group (a model folder, an archive, a repository of the
# cache), and if it still is the file that was shown. Below the folder no symbolic link is followed.

YOUNG_S = 60.0  # what changed this lately may be in use by a host or user whose processes we cannot see
_SIDECAR = r"READ-ME-FIRST\.txt|hfship\.pyz|[^/]+\.tar\.zst(?:\.\d{4,}|\.sha256|\.sig)?"
_REPO_FOLDER = re.compile(r"(models|datasets|spaces)--.+$")
# Path below the folder -> what it is.
_LEFTOVERS = (
    (re.compile(r"(^|/)\.cache/huggingface/download/(.+/)?[^/]+\.incomplete$"), "unfinished download of hf"),
    (re.compile(r"(^|/)\.cache/huggingface/download/(.+/)?[^/]+\.lock$"), "lock of hf"),
    (re.compile(r"(^|/)\.hfship/partial/[0-9a-f]{40}\.json$"), "unfinished download"),
    (re.compile(rf"(^|/)(?:{_SIDECAR})\.incomplete$"), "unfinished archive"),
    (re.compile(rf"(^|/)\.(?:{_SIDECAR}|[^/]+\.(?:json|metadata)|lease)\.\d+\.tmp$"), "unfinished file"),
)
# One of these shows that a folder is ours to clean.
_CLEANABLE = (f"{WORK_DIR}/*", f"*/{WORK_DIR}", f"*/*/{WORK_DIR}", ".cache/huggingface", "*/.cache/huggingface") + (
    *("*.tar.zst*", "config.json", "*/config.json", "*.safetensors", "*/*.safetensors"),
    *("chunk[-_]cache", "*/chunk[-_]cache"),
)


class Leftover(NamedTuple):
    """A file, or a link in a cache, that may go: what it is, the group that it is of, and its lstat."""

    path: Path
    what: str
    group: Path
    status: os.stat_result


def files_below(folder: Path) -> Dict[Path, os.stat_result]:
    """All in a folder that is not a folder, links too, with its lstat. Raises DiskError where it cannot look."""

    def refuse(exc: OSError) -> None:
        if not isinstance(exc, FileNotFoundError):
            raise disk_error(exc, "look into", Path(exc.filename), "run it as the user who owns the folder")

    found = {}
    for root, folders, names in os.walk(folder, onerror=refuse) if not folder.is_symlink() else ():
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(root, name)))]:
            with contextlib.suppress(FileNotFoundError):  # a live download finished it meanwhile
                found[Path(root, name)] = os.lstat(os.path.join(root, name))
    return found


def folder_leftovers(folder: Path) -> List[Leftover]:
    """What killed runs left in a folder of models or archives, or in a model."""
    lease = (WORK_DIR, "lease")  # goes with the lock that we take
    paths = {path: status for path, status in files_below(folder).items() if path.parts[-2:] != lease}
    models = {parent.parent for path in paths for parent in path.parents if parent.name == WORK_DIR}
    listed = {model: _listed_paths(model) for model in models}
    found = []
    for path in paths:
        model = next((parent for parent in path.parents if parent in models), path.parent)
        inside, name = path.relative_to(model).as_posix(), path.relative_to(folder).as_posix()
        what = next((what for pattern, what in _LEFTOVERS if pattern.search(name)), "")
        if model in models and not what and re.search(r"\.incomplete(\.aria2)?$", name):
            what = "unfinished download"
        if inside in listed.get(model, ()):
            what = ""
        replaced = model.name.endswith(f".replaced{INCOMPLETE}")  # the only one there is, while NAME is missing
        if replaced and model.with_name(model.name[: -len(f".replaced{INCOMPLETE}")]).is_dir():
            what = "replaced model"
        elif model in models and model.name.endswith(INCOMPLETE) and not (model / MANIFEST_PATH).exists():
            what = "unfinished unpack"
        if what:
            archive = re.match(r"\.?(.+\.tar\.zst)", path.name)
            group = path.parent / archive[1] if archive and model not in models else model
            found.append(Leftover(path, what, group, paths[path]))
    going = {item.path for item in found}
    for model in [model for model in models if not (model / MANIFEST_PATH).exists()]:
        left = [path for path in paths if model in path.parents and path not in going]
        if all(re.match(r"\.(hfship|cache/huggingface)/", path.relative_to(model).as_posix()) for path in left):
            found += [Leftover(path, "empty model folder", model, paths[path]) for path in left]
            going.update(left)  # a model may lie in another one
    return found


def _listed_paths(model: Path) -> Set[str]:
    """Files that belong to a finished model, whatever their names look like."""
    with contextlib.suppress(HfshipError):
        manifest = read_manifest(model)
        return {entry.path for entry in manifest.files} if manifest else set()
    return set()


def cache_leftovers(cache: Path, old_revisions: bool) -> List[Leftover]:
    """What is unfinished or unused in a cache of huggingface_hub; with `old_revisions` also those without a ref."""
    found: List[Leftover] = []
    used: Set[Tuple[int, int]] = set()
    for repo in [path for path in sorted(cache.iterdir()) if _REPO_FOLDER.match(path.name)]:
        found += _repo_leftovers(repo, old_revisions)
        used |= {_first_step(path) for path in files_below(repo.resolve() / "blobs")}
    for path, status in files_below(cache / ".locks").items():
        found.append(Leftover(path, "lock of hf", cache / path.relative_to(cache / ".locks").parts[0], status))
    store = cache / "blobs"  # contents that several repositories share, each with a list of their names, HASH.refs
    contents = files_below(store) if (store / ".huggingface-shared-blobs").is_file() else {}
    for path, status in contents.items():
        content = path.with_name(path.name[:64])
        known = re.match(r"[0-9a-f]{64}(\.refs|\.lock)?$", path.name) and content in contents
        listed = known and content.with_name(content.name + ".refs") in contents
        if listed and _identity(contents[content]) not in used:
            found.append(Leftover(path, "unused content", content, status))
    return found


def _identity(status: os.stat_result) -> Tuple[int, int]:
    """What names a file whatever path leads to its folder."""
    return status.st_dev, status.st_ino


def _first_step(path: Path) -> Tuple[int, int]:
    """The identity of what a link leads to, which may be a link; (0, 0) for other files, and if nothing is there."""
    with contextlib.suppress(OSError):
        return _identity(os.lstat(os.path.join(path.parent, os.readlink(path))))
    return 0, 0


def _repo_leftovers(repo: Path, old_revisions: bool) -> List[Leftover]:
    """Unfinished and unreferenced blobs, links to nothing, and revisions that no ref leads to, of one repository."""
    if any(path.is_symlink() for path in (repo, repo / "refs", repo / "snapshots", repo / "blobs")):
        return []
    known = {path.read_text(errors="replace").strip() for path in files_below(repo / "refs")}
    found = []
    snapshots = files_below(repo / "snapshots")
    for path, status in snapshots.items():
        if old_revisions and path.relative_to(repo / "snapshots").parts[0] not in known:
            found.append(Leftover(path, "old revision", repo, status))
        elif path.is_symlink() and not path.exists():
            found.append(Leftover(path, "link to nothing", repo, status))
    used = {_first_step(path) for path in snapshots.keys() - {item.path for item in found}}
    for path, status in files_below(repo / "blobs").items():
        if _identity(status) not in used:
            what = "unfinished download of hf" if path.suffix == INCOMPLETE else "unused content"
            found.append(Leftover(path, what, repo, status))
    return found


def open_files(names: AbstractSet[str]) -> Dict[str, Dict[int, int]]:
    """name -> {inode: process} of files with these names that processes, as far as we may see them, hold or map."""
    found: Dict[str, Dict[int, int]] = {}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]:
        with contextlib.suppress(OSError):  # gone, or of another user
            for fd in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    name = os.path.basename(os.readlink(fd.path))
                    if name in names:
                        found.setdefault(name, {})[os.stat(fd.path).st_ino] = pid
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                *_, inode, path = line.split(None, 5)
                if os.path.basename(path) in names and inode.isdigit():
                    found.setdefault(os.path.basename(path), {})[int(inode)] = pid
    return found


def is_locked(path: Path) -> bool:
    """Whether a process holds an flock on a file, or the file is itself a lock (filelock's SoftFileLock)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pid, _, host = os.read(fd, 300).decode("utf-8", "replace").strip().partition("\n")
        alive = host not in ("", socket.gethostname()) or bool(process_start(int(pid) if pid.isdigit() else 0))
        return path.suffix == ".lock" and pid.isdigit() and alive
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def why_kept(
    group: Path, items: Sequence[Leftover], opened: Mapping[str, Mapping[int, int]], stack: contextlib.ExitStack
) -> str:
    """Why a group must stay as it is; "" when nobody works in it. Our own lock on it is then held by `stack`, which
    also takes a lock file away that was not there before."""
    now, claimed = time.time(), group.name + INCOMPLETE  # a pack holds this one, and parts maybe on another medium
    if group.suffix == ".zst" and opened.get(claimed):
        return f"process {min(opened[claimed].values())} has {claimed} open"
    for item in items:
        name, age = item.path.name, now - item.status.st_mtime
        if item.status.st_ino in opened.get(name, ()):
            return f"process {opened[name][item.status.st_ino]} has {name} open"
        if is_locked(item.path):
            return f"a process holds {name}"
        if age < YOUNG_S and item.path.parent.name != WORK_DIR:  # there the lock knows better
            return f"{name} changed {max(age, 0):.0f} s ago, which is too new: try again in a minute"
    if (group / WORK_DIR).is_dir() and not (group / WORK_DIR).is_symlink():
        lock = group / WORK_DIR / "lock"
        existed = lock.exists()
        try:
            stack.enter_context(FolderLock(group))
            if not existed:
                stack.callback(lock.unlink, missing_ok=True)  # while it is still ours
        except HfshipError as exc:
            return exc.what
    return ""


def remove_leftover(root: Path, item: Leftover) -> bool:
    """Remove a file if it still is the one that was seen; folders on the way are opened one by one, links refused."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in item.path.relative_to(root).parts[:-1]:
            outer, fd = fd, os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(outer)
        status, seen = os.stat(item.path.name, dir_fd=fd, follow_symlinks=False), item.status
        same = (status.st_ino, status.st_size, status.st_mtime_ns) == (seen.st_ino, seen.st_size, seen.st_mtime_ns)
        if same:
            os.unlink(item.path.name, dir_fd=fd)
        return same
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise disk_error(exc, "remove", item.path, "run it as the user who owns the folder") from exc
    finally:
        os.close(fd)


def freed_by(items: Sequence[Leftover]) -> int:
    """Bytes that the disk gets back: a file with several names counts once, and only when all of them go."""
    names = Counter(_identity(item.status) for item in items)
    once = {_identity(item.status): item.status for item in items}
    return sum(status.st_blocks * 512 for key, status in once.items() if status.st_nlink <= names[key])


def find_leftovers(folder: Path, cache: bool, old_revisions: bool, own: Sequence[Path]) -> List[Leftover]:
    """What may go from a folder of models or archives, a cache of huggingface_hub, or one of Xet's chunks.

    Raises UsageError for a folder that is none of these; `own` are those that the settings name.
    """
    home, step = Path(os.path.realpath(os.path.expanduser("~"))), "name a folder of models or archives"
    if folder == home or folder in home.parents:
        raise UsageError(f"{folder} is not cleaned as a whole", "all kinds of things live there", step)
    if os.path.ismount(folder) and folder not in own:
        raise UsageError(f"{folder} is a mount point", "it is not cleaned as a whole", "name the folders in it")
    is_cache = any(_REPO_FOLDER.match(path.name) for path in folder.iterdir())
    if is_cache and not cache:
        raise UsageError(f"{folder} is a cache of huggingface_hub", "", f"hfship clean --cache {folder}")
    if is_cache:
        return cache_leftovers(folder, old_revisions)
    if folder not in own and not any(True for glob in _CLEANABLE for _ in folder.glob(glob)):
        raise UsageError(f"{folder} looks like neither models nor archives nor a cache", "", step)
    chunks = [path for glob in ("chunk[-_]cache", "*/chunk[-_]cache") for path in folder.glob(glob)] if cache else []
    found = folder_leftovers(folder)
    for place in chunks:
        found += [Leftover(path, "cached chunks", place, status) for path, status in files_below(place).items()]
    return found


# ---- doctor --------------------------------------------------------------------------

PROBE_TIMEOUT_S = 5.0
PROBE_BYTES = 8 << 20
PROBE_REPO = "openai-community/gpt2"  # public, small, and on every mirror
DISK_PROBE_BYTES = 16 << 20
CLOCK_WARN_S, CLOCK_FAIL_S = 60, 900  # S3 takes no request that is off by more than 15 minutes
# program -> (arguments that make it tell its version; docker's daemon is meant; what needs it, what to install)
PROGRAMS: Mapping[str, Tuple[str, str, str]] = {
    "docker": ("version --format {{.Server.Version}}", "serve", "docker with its compose plugin"),
    "nvidia-smi": ("--query-gpu=driver_version --format=csv,noheader", "serve on GPUs", "the NVIDIA driver"),
    "rsync": ("--version", "push", "rsync"),
    "ssh": ("-V", "push", "an ssh client"),
    "aria2c": ("--version", "fetch --engine aria2", "aria2"),
    "zstd": ("--version", "reading archives without hfship", "zstd"),
    "openssl": ("version", "signatures", "openssl"),
}


@dataclass(frozen=True)
class Finding:
    """What one probe found: `state` is ok, warn or fail; a failure has the exit code of its kind."""

    check: str
    state: str
    text: str
    next: str = ""
    exit_code: Exit = Exit.OK


class Doubt(Exception):
    """Raised by a probe that found something which works, but not well: the text, and the next step."""


class Examination:
    """One probe under way, in a thread that nobody has to wait for. `work` returns what it found, or raises."""

    def __init__(self, check: str, work: Callable[[], str], limit_s: float = PROBE_TIMEOUT_S) -> None:
        self._check, self._work, self._limit_s = check, work, limit_s
        self._found: Optional[Finding] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = Finding(self._check, "ok", self._work())
        except Doubt as exc:
            self._found = Finding(self._check, "warn", *exc.args)
        except HfshipError as exc:
            text = exc.what + (f": {exc.why}" if exc.why else "")
            self._found = Finding(self._check, "fail", text, exc.next_step, exc.code)
        except (RetryableError, OSError, HTTPException, ValueError) as exc:
            step = "check the network, the proxy and HF_ENDPOINT"
            self._found = Finding(self._check, "fail", _root_cause(exc), step, Exit.NETWORK)

    def result(self) -> Finding:
        """What was found, at the latest when the time is over."""
        self._thread.join(self._limit_s)
        step = "check the network, the name server and the proxy"
        return self._found or Finding(self._check, "fail", f"no answer in {self._limit_s:.0f} s", step, Exit.NETWORK)


class HubDoctor:
    """Probes of one Hub, each built on those before it."""

    def __init__(self, settings: Settings, repo: Optional[str], mirrors: Sequence[str], reporter: Reporter) -> None:
        self._settings, self._mirrors, self._reporter = settings, mirrors, reporter
        self._asked, self._revision = parse_repo(repo) if repo else (PROBE_REPO, None)
        self._named = bool(repo)
        self._scheme, self._host, self._port = origin(settings.endpoint)
        self._via: Optional[str] = None
        self._token: Optional[Token] = None
        self._snapshot: Optional[Snapshot] = None

    def findings(self) -> Iterator[Finding]:
        """What the probes find; none after one without which the next make no sense."""
        steps = {"proxy": self._proxy, "dns": self._dns, "tls": self._tls, "hub": self._hub, "clock": self._clock}
        steps.update({"token": self._whoami, "repository": self._repository, "speed": self._speed})
        for check, work in steps.items():
            limit_s = 2 * PROBE_TIMEOUT_S if check in ("repository", "speed") else PROBE_TIMEOUT_S
            found = Examination(check, work, limit_s).result()
            yield found
            if found.state == "fail" and check in ("proxy", "dns", "tls", "hub"):
                break  # a mirror may still be reached
        for mirror in self._mirrors:
            yield Examination(f"mirror {mirror}", partial(self._mirror, mirror), 2 * PROBE_TIMEOUT_S).result()

    def _proxy(self) -> str:
        requests = import_requests()
        url = self._settings.endpoint
        self._via = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
        if not self._via:
            return "none"
        parts = urlsplit(self._via if "//" in self._via else f"//{self._via}")
        with socket.create_connection((parts.hostname or "", parts.port or 80), PROBE_TIMEOUT_S):
            return f"{parts.hostname}:{parts.port or 80} takes connections"

    def _dns(self) -> str:
        if self._via:
            return "left to the proxy"
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as exc:
            step = "without a network: that is so on the far side; hfship doctor --offline. Else check /etc/resolv.conf"
            raise NetworkError(f"{self._host} has no address", exc.strerror or str(exc), step) from exc
        addresses = sorted({str(address[0]) for *_, address in found})
        return f"{self._host} is {shorten(addresses, 2)}"

    def _peer(self, bundle: Optional[str]) -> Tuple[Mapping[str, Any], bytes]:
        """The certificate of the Hub, decoded if `bundle` vouches for it, and as DER. Raises ssl.SSLError."""
        import ssl

        capath = bundle if bundle and os.path.isdir(bundle) else None
        context = ssl.create_default_context(cafile=None if capath else bundle, capath=capath)
        if bundle is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        via = urlsplit(self._via) if self._via else None
        near = (via.hostname or "", via.port or 80) if via else (self._host, self._port)
        connection = HTTPSConnection(*near, timeout=PROBE_TIMEOUT_S, context=context)
        if via:
            login = base64.b64encode(unquote(f"{via.username}:{via.password}").encode()).decode()
            headers = {"Proxy-Authorization": f"Basic {login}"} if via.username else {}
            connection.set_tunnel(self._host, self._port, headers)
        with contextlib.closing(connection):
            connection.connect()
            return connection.sock.getpeercert() or {}, connection.sock.getpeercert(True) or b""

    def _tls(self) -> str:
        """Who vouches for the Hub: a public CA, or one that only this site's bundle has: then TLS ends on the way."""
        import ssl

        if self._scheme != "https":
            raise Doubt("not encrypted: a token can be read on the way", "use https, or no token")
        names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
        public = str(import_requests().certs.where())
        variable = next((name for name in names if os.environ.get(name)), "")
        bundle = os.environ[variable] if variable else public
        try:
            certificate, _ = self._peer(bundle)
        except ssl.SSLCertVerificationError as exc:
            text = f"{self._signer(self._peer(None)[1])}: {exc.verify_message}"
            step = tls_error(self._settings.endpoint, exc, os.environ).next_step
            raise NetworkError(text, "", step) from exc
        except FileNotFoundError as exc:
            raise NetworkError("the CA bundle cannot be read", bundle, f"correct {variable}") from exc
        issuer = {key: value for ((key, value),) in certificate["issuer"]}
        days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
        text = f"signed by {issuer.get('organizationName') or issuer.get('commonName')}, for {days:.0f} more days"
        if days < 14:
            raise Doubt(text, "the owner of the Hub must renew it")
        with contextlib.suppress(ssl.SSLCertVerificationError):
            self._peer(public)
            return text
        what = f"{text}; no public CA: an own Hub, or a proxy that opens TLS"
        raise Doubt(f"{what} ({variable})", "right if your site does so")

    @staticmethod
    def _signer(der: bytes) -> str:
        with contextlib.suppress(HostError):
            argv = ["openssl", "x509", "-inform", "der", "-noout", "-issuer", "-enddate"]
            return " ".join(run_program(argv, der, timeout_s=PROBE_TIMEOUT_S).out.split("\n")).strip()
        return "the certificate is not believed"

    def _hub(self) -> str:
        self._token = find_token(os.environ)
        self._client = HubClient(self._settings, self._token, self._reporter, threading.Event(), 2)
        began = time.monotonic()
        url = api_url(self._settings.endpoint, "model", self._asked, "revision", self._revision or "main")
        self._answer = self._client.exchange(url)
        if not self._answer.body.startswith("{") and "X-Error-Code" not in self._answer.headers:
            raise not_a_hub(self._settings.endpoint, f"it sends {self._answer.headers.get('Content-Type', 'nothing')}")
        return f"{self._settings.endpoint} answers in {1000 * (time.monotonic() - began):.0f} ms"

    def _clock(self) -> str:
        try:
            skew = time.time() - parsedate_to_datetime(self._answer.headers.get("Date", "")).timestamp()
        except (TypeError, ValueError, IndexError) as exc:
            raise Doubt("the Hub does not tell the time") from exc
        text, step = f"{abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}", "set the clock: timedatectl, chronyc"
        if abs(skew) > CLOCK_FAIL_S:
            raise HostError(f"the clock is {text}", "", step)
        if abs(skew) > CLOCK_WARN_S:
            raise Doubt(text, step)
        return text

    def _whoami(self) -> str:
        if not self._token:
            return "none: enough for public repositories"
        answer = self._client.exchange(f"{self._settings.endpoint}/api/whoami-v2")
        if answer.status in (401, 403):
            step = f"put a valid token into {self._token.source}, or remove it"
            raise AuthError("the Hub refuses the token", f"from {self._token.source}", step)
        if answer.status != 200:
            return f"from {self._token.source}; this Hub has no accounts"
        who = json.loads(answer.body)
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role", "")
        return f"of {who.get('name')}, from {self._token.source}" + (f", may {role}" if role else "")

    def _repository(self) -> str:
        try:
            self._snapshot = self._client.snapshot(self._asked, self._revision)
        except (NotFoundError, AuthError) as exc:
            if self._named:
                raise
            raise Doubt(f"no {PROBE_REPO} here to try", "hfship doctor ORG/NAME") from exc
        source = self._snapshot.source
        gate = "gated, access granted; " if source.gated else ""
        files = f"{counted(len(self._snapshot.files), 'file')}, {human_bytes(self._snapshot.size)}"
        return f"{source.resolved_repo}: {gate}{files}, commit {source.commit[:12]}"

    @staticmethod
    def _measure(client: HubClient, snapshot: Snapshot) -> Tuple[str, float]:
        """The host that sends the largest file of a repository, and its bytes per second."""
        file = max(snapshot.files, key=lambda file: file.size)
        address = FileAddress(client, FileJob(file, snapshot.source, Path(), VerifiedLog(Path())), client.endpoint)
        began, count = time.monotonic(), 0
        with address.open(0, min(file.size, PROBE_BYTES)) as response:
            for piece in response.iter_content(64 << 10):
                count += len(piece)
                if time.monotonic() - began > PROBE_TIMEOUT_S:
                    break
            return origin(response.url)[1], count / (time.monotonic() - began)

    def _speed(self) -> str:
        if not self._snapshot or not self._snapshot.files:
            raise Doubt("not measured", "hfship doctor ORG/NAME")
        host, speed = self._measure(self._client, self._snapshot)
        return f"{human_bytes(speed)}/s over one connection from {host}"

    def _mirror(self, url: str) -> str:
        client = HubClient(load_settings({}, url), self._token, self._reporter, threading.Event(), 2)
        began = time.monotonic()
        client.exchange(api_url(client.endpoint, "model", self._asked, "revision", self._revision or "main"))
        latency = f"{1000 * (time.monotonic() - began):.0f} ms"
        theirs = client.snapshot(self._asked, self._revision)
        source, ours = theirs.source, (self._snapshot or theirs).source.commit
        text = f"{latency}, {human_bytes(self._measure(client, theirs)[1])}/s"
        if source.commit != ours:
            what = f"{text}; commit {source.commit[:12]}, the Hub has {ours[:12]}"
            raise Doubt(what, "what it has is older: fetch asks the Hub for the rest")
        return f"{text}, commit {ours[:12]}"


def examine_disk(folder: Path) -> str:
    """Room, file-size limit and write speed of the disk that a folder is or will be on."""
    place, filesystem, free = existing_ancestor(folder), filesystem_of(folder), free_bytes(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            began = time.monotonic()
            write_all(stream.fileno(), bytes(min(DISK_PROBE_BYTES, free // 2)))
            os.fdatasync(stream.fileno())
            speed = os.fstat(stream.fileno()).st_size / (time.monotonic() - began)
    except OSError as exc:
        raise disk_error(exc, "write to", place) from exc
    text = f"{folder}: {human_bytes(free)} free on {filesystem.kind}, writes {human_bytes(speed)}/s"
    if filesystem.max_file_size:
        what = f"{text}, files up to {human_bytes(filesystem.max_file_size)}"
        raise Doubt(what, "hfship pack --split fat32")
    if free < 10 * GIB:
        raise Doubt(text, "most models need more: free space")
    return text


def examine_python(offline: bool) -> str:
    """This Python and the others on PATH. One that is too old for the network is a failure unless `offline`."""
    others = [f"3.{minor}" for minor in range(8, 20) if shutil.which(f"python3.{minor}")]
    text = f"{platform.python_version()} ({sys.executable}); on PATH: {', '.join(others) or 'no other'}"
    if sys.version_info < (3, 10) and offline:
        raise Doubt(f"{text}; fetch needs 3.10", with_newer_python())
    if sys.version_info < (3, 10):
        raise HostError(f"{text}; fetch and a look at the network need 3.10", "", with_newer_python())
    return text


def examine_program(name: str) -> str:
    """The version of a program, or what is missed without it."""
    arguments, needed_by, package = PROGRAMS[name]
    if not shutil.which(name):
        raise Doubt(f"not installed; {needed_by} needs it", f"install {package} for that")
    done = run_program([name, *arguments.split()], timeout_s=PROBE_TIMEOUT_S - 1)
    line = ((done.out + done.err).strip().splitlines() or [""])[0]
    version = re.search(r"\d+\.[\w.]+", line)
    if done.code or not version:
        cause, step = explain(done.out + done.err, "MODEL")
        raise Doubt(cause or line[:60] or f"ends with {done.code}", step or f"run {name} by hand")
    return f"version {version[0]}"


# ======================================================================================
# §19 Command line
#
# Owns the words an operator types. Each command is a row of COMMANDS: its arguments and one thin function that calls
# the sections above and returns the exit code. Nothing here knows how the work is done.
# ======================================================================================


@dataclass(frozen=True)
class Context:
    """What a command gets: its arguments, the settings and the one reporter. `asked` are the arguments that the command
    line or a models file gave, `listed` says that a models file has the model."""

    args: argparse.Namespace
    settings: Settings
    reporter: Reporter
    asked: Mapping[str, Any] = field(default_factory=dict)
    file: Optional[ModelsFile] = None
    listed: bool = False


@dataclass(frozen=True)
class Command:
    """One row of the command table. `models` is the dest of the words that mean models, for which a models file can
    stand; "" where there are none."""

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Context], Exit]
    models: str = ""
    job: bool = False  # has a record and a log, and runs in the background when asked to


# ---- values of options ---------------------------------------------------------------


def _checked(read: Callable[[str], Any], good: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """What argparse asks to read a value, and says about one that is not good: 'X' is not `expected`."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError, KeyError, OSError):
            value = read(text)
            if good(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")

    return convert


def _variable(text: str) -> str:
    """A variable, K=V, that a container can be given. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--env {name} has no value", "", f"--env {name}=VALUE")
    require_env(name, value)
    return text


_GPUS = re.compile(r"(all|((\d+|GPU-[\w-]+)(,(?!$)|$))*)$", re.ASCII)
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_positive = _checked(int, lambda number: number > 0, "a positive number")
_port = _checked(int, range(1, 1 << 16).__contains__, "a port")
_free_port = _checked(int, range(1 << 16).__contains__, "a port")
_connections = _checked(int, range(1, 2 * MAX_CONNECTIONS + 1).__contains__, f"from 1 to {2 * MAX_CONNECTIONS}")
_seconds = _checked(float, lambda seconds: 0 < seconds < 1e6, "a positive number of seconds")
_share = _checked(float, lambda share: 0 < share <= 1, "above 0 and at most 1")
_tail = _checked(str, lambda text: bool(re.fullmatch(r"all|\d+", text, re.ASCII)), "a number of lines")
_gpus = _checked(str, lambda text: bool(_GPUS.match(text)), "a list of GPUs, like 0,1")
_address = _checked(str, lambda text: bool(socket.inet_pton(family_of(text), text)), "an IP address (0.0.0.0: all)")
_age = _checked(lambda text: int(text[:-1]) * _AGES[text[-1:]], lambda age: age >= 0, "an age, like 90m, 12h or 7d")


# ---- fetch ---------------------------------------------------------------------------


def fetch_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("repos", nargs="*", metavar="REPO[@REV]", help="ORG/NAME, at a branch, tag or commit")
    add("-o", "--output", metavar="DIR", help="where NAME/ appears (default: HFSHIP_MODELS_DIR, ~/models)")
    add("--name", help="name of the model folder (default: the last part of REPO)")
    add("--revision", help="revision for REPOs that name none (default: the default branch)")
    add("--repo-type", choices=REPO_TYPES, default="model", help="kind of REPO (default: %(default)s)")
    add("--include", action="append", default=[], metavar="GLOB", help="fetch only these files; repeatable")
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave these files out; repeatable")
    add("--endpoint", metavar="URL", help="Hub or mirror (default: HF_ENDPOINT or huggingface.co)")
    add("--token-file", metavar="FILE", help="file with the Hub token (default: HF_TOKEN, ~/.cache)")
    add("-j", "--jobs", type=_connections, metavar="N", help="connections (default: as many as bring more)")
    add("--limit-rate", type=parse_size, metavar="SIZE", help="bytes per second, like 20M")
    add("--mirror", action="append", default=[], metavar="URL", help="ask it before the Hub; repeatable")
    add("--all-files", action="store_true", help="also weights in formats that vLLM does not read")
    add("--verify", action="store_true", help="hash what is there and fetch nothing")
    add("--repair", action="store_true", help="hash what is there and fetch only what is wrong")
    add("--engine", choices=("own", "aria2"), default="own", help="aria2: leave the transfer to aria2c")
    add("--dry-run", action="store_true", help="show what would be fetched")


def cmd_fetch(context: Context) -> Exit:
    """Plan every repository, check the room, then bring all their files through one pool of connections."""
    args, reporter = context.args, context.reporter
    requests = fetch_requests(args, context.settings.endpoint)
    token = read_token_file(Path(args.token_file)) if args.token_file else find_token(os.environ)
    stop = threading.Event()
    transfer = Transfer(args.jobs, args.limit_rate, tuple(load_settings({}, url).endpoint for url in args.mirror))
    client = HubClient(context.settings, token, reporter, stop, transfer.workers)
    root = Path(args.output).expanduser() if args.output else context.settings.models_dir
    with contextlib.ExitStack() as locks:
        plans, failures = plan_all(client, requests, root, locks, stop, context)
        began, came = time.monotonic(), 0
        if args.dry_run:
            show_fetch_plans(plans, context)
        elif args.verify:
            failures += [exc for plan in plans for exc in missing_or_wrong(plan)]
        else:
            plans = [mend_locally(client, plan, root, args.repair, reporter) for plan in plans]
            sizes = [job.remote.size for plan in plans for job in plan.jobs]
            needed, step = sum(map(bytes_to_write, plans)), "choose another disk with -o"
            require_room(root, needed, max(sizes, default=0), "fetch", step)
            came = fetch_files(client, plans, stop, transfer, args.engine)
        if not args.dry_run:
            complete = [plan for plan in plans if not args.verify or not plan.jobs]
            report_fetch(complete, failures, came, time.monotonic() - began, context)
    return summarize_failures(failures, len(requests), reporter)


def fetch_requests(args: argparse.Namespace, endpoint: str) -> List[FetchRequest]:
    """The repositories asked for, with the names of their folders. Raises UsageError when names collide."""
    requests = []
    for text in args.repos:
        repo, revision = parse_repo(text, endpoint)
        name = args.name or repo.rpartition("/")[2]
        make_manifest(name, ())  # refuses what cannot be a folder name
        revision = revision or args.revision
        if revision and not revision.isprintable():  # bytes that are no UTF-8, say
            raise UsageError(f"{revision!r} is not a revision", "", "give a branch, tag or commit")
        own = {"repo": repo, "revision": revision, "name": name, "rehash": args.verify or args.repair}
        requests.append(FetchRequest(**known_fields(FetchRequest, {**vars(args), **own})))
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        step = "fetch them one by one with --name"
        raise UsageError("two repositories would go into the same folder", ", ".join(names), step)
    return requests


def plan_all(
    client: HubClient,
    requests: Sequence[FetchRequest],
    root: Path,
    locks: contextlib.ExitStack,
    stop: threading.Event,
    context: Context,
) -> Tuple[List[FetchPlan], List[HfshipError]]:
    """The plans of all repositories, their folders locked, and what went wrong with others of a list."""
    plans: List[FetchPlan] = []
    failures: List[HfshipError] = []
    for request in requests:
        folder = root / request.name
        try:
            if not context.args.dry_run:
                locks.callback(remove_if_empty, folder)
                lock = locks.enter_context(FolderLock(make_dir(folder), stop.set))
                if lock.doubtful:  # whoever held it may still write: start over in files of our own
                    for path in folder.rglob("*" + INCOMPLETE):
                        path.unlink()
            plans.append(plan_fetch(client, request, folder, context.reporter))
        except HfshipError as exc:
            if len(requests) == 1:
                raise
            failures.append(exc)
    return plans, failures


def mend_locally(client: HubClient, plan: FetchPlan, root: Path, repair: bool, reporter: Reporter) -> FetchPlan:
    """What can be had without fetching it whole: equal files of this machine, and repairs of damaged ones."""
    present = dict(plan.present)
    worth_it = [job for job in plan.jobs if job.remote.sha256 and job.remote.size > SMALL_FILE]
    copies = copies_in(root) if worth_it and not repair else {}
    for job in worth_it:
        if job.incomplete.exists():
            continue
        damaged = job.target.is_file() and job.target.stat().st_size == job.remote.size
        marks = job.log.marks_of(job.remote) if damaged else []
        mended = bool(marks) and repair_file(client, job, marks, reporter)
        if not mended and not repair:
            mended = reuse_local(job, [hub_cache_blob(job, os.environ), *copies.get(job.remote.etag, ())], reporter)
        if mended:
            present[job.remote.path] = job.remote.etag
    return replace(plan, present=present)


def missing_or_wrong(plan: FetchPlan) -> List[HfshipError]:
    """What --verify found."""
    wrong = [job.remote.path for job in plan.jobs if job.target.exists()]
    missing = [job.remote.path for job in plan.jobs if not job.target.exists()]
    source = plan.snapshot.source
    step = fetch_command(source, source.revision, plan.folder, "--repair")
    kinds = ((IntegrityError, "wrong file", wrong), (IncompleteError, "missing file", missing))
    return [
        kind(f"{plan.folder}: {counted(len(paths), what)}", ", ".join(paths[:20]), step)
        for kind, what, paths in kinds
        if paths
    ]


def summarize_failures(failures: Sequence[HfshipError], count: int, reporter: Reporter) -> Exit:
    """Say what went wrong with some of a list; its own exit code when there is only one kind of failure."""
    for failure in failures:
        reporter.error(failure)
    if not failures:
        return Exit.OK
    if count > 1:
        reporter.info(f"{counted(len(failures), 'problem')} with {count} models; the rest is complete")
    codes = {failure.code for failure in failures}
    return codes.pop() if len(codes) == 1 and count == 1 else Exit.INCOMPLETE


def fetch_files(
    client: HubClient, plans: Sequence[FetchPlan], stop: threading.Event, transfer: Transfer, engine: str
) -> int:
    """Bring what is missing, all plans through one pool; the bytes that came. aria2 is given the large files only."""
    jobs = [job for plan in plans for job in plan.jobs]
    theirs = [job for job in jobs if engine == "aria2" and job.remote.size > SMALL_FILE]
    ours = [job for job in jobs if job not in theirs] if theirs else jobs
    came = 0
    if theirs:
        with client.reporter.stage("fetching (aria2)", sum(job.remote.size for job in theirs)) as stage:
            fetch_with_aria2(client, theirs, stage, transfer)
        came += stage.total - stage.skipped
    if ours:
        here = [file.size for plan in plans for file in plan.wanted if file.path in plan.present]
        with client.reporter.stage("fetching", sum(job.remote.size for job in ours) + sum(here)) as stage:
            download = Download(client, ours, stage, stop, transfer)
            stage.skip(sum(here))  # what an earlier run brought counts too
            stage.files += len(here)
            stage.finish(len(here))
            download.run()
        came += stage.total - stage.skipped
    return came


def report_fetch(
    plans: Sequence[FetchPlan], failures: Sequence[HfshipError], came: int, seconds: float, context: Context
) -> None:
    """Write the manifests and say what is there now; `came` is what all of them together had to fetch (bytes)."""

    def rows() -> Iterator[Dict[str, Any]]:
        for plan in plans:
            manifest, source = finish_fetch(plan), plan.snapshot.source
            fields = {"name": plan.name, "repo": source.repo, "commit": source.commit, "folder": str(plan.folder)}
            counts = {"files": len(manifest.files), "bytes": manifest.size, "fetched_files": len(plan.jobs)}
            proof = "every file verified" if plan.jobs or context.args.verify else "verified earlier, nothing to fetch"
            text = f"{counted(len(manifest.files), 'file')}, {human_bytes(manifest.size)}, commit {source.commit[:12]}"
            context.reporter.then("pack", plan.folder)
            yield {**fields, **counts, "text": f"{plan.folder}: {text}; {proof}"}
        yield from ({**error_row(failure), "text": ""} for failure in failures)

    _tell_rows(context, rows())
    if came:
        speed = f"{human_bytes(came / seconds)}/s"
        context.reporter.info(f"fetched {human_bytes(came)} in {human_seconds(seconds)} ({speed})")


def show_fetch_plans(plans: Sequence[FetchPlan], context: Context) -> None:
    """The --dry-run table."""
    if context.args.json:
        files = [(p, f, {"name": p.name, "path": f.path, "size": f.size}) for p in plans for f in p.wanted]
        context.reporter.result_json([{**row, "etag": f.etag, "present": f.path in p.present} for p, f, row in files])
        return
    for plan in plans:
        source = plan.snapshot.source
        rows = [[f.path, human_bytes(f.size), "here" if f.path in plan.present else "missing"] for f in plan.wanted]
        context.reporter.result(f"{source.resolved_repo} at {source.commit} -> {plan.folder}")
        context.reporter.result(table(rows, ["file", "size", "state"]))
        missing = sum(job.remote.size for job in plan.jobs)
        text = f"{len(plan.jobs)} of {counted(len(plan.wanted), 'file')} to fetch, {human_bytes(missing)}"
        context.reporter.result(f"{text}; {human_bytes(free_bytes(plan.folder))} free")


# ---- pack, verify, unpack ------------------------------------------------------------


def _jobs_argument(parser: argparse.ArgumentParser) -> None:
    what = "workers (default: %(default)s, one per core; 1 reads a slow disk in order)"
    parser.add_argument("-j", "--jobs", type=_positive, default=default_jobs(), metavar="N", help=what)


def _key_argument(parser: argparse.ArgumentParser) -> None:
    what = "require a signature by this key (default: HFSHIP_KEY, else none)"
    parser.add_argument("--key", type=Path, metavar="PUB.pem", help=what)


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="*", metavar="NAME|DIR", help="model in the models folder, or any folder")
    add("--all", action="store_true", help="every model in the models folder")
    where = "where NAME.tar.zst appears (default: HFSHIP_PACKAGE_DIR, ~/transfer_package)"
    add("-o", "--output", type=Path, metavar="DIR", help=where)
    split = "cut into parts: fat32, dvd, bd25, bd50, or e.g. 8G"
    add("--split", type=parse_split, metavar="MEDIUM|SIZE", help=split)
    media = "medium for parts; repeat for the next ones"
    add("--to", type=Path, action="append", default=[], metavar="DIR", help=media)
    profile = "smallest: floats as byte planes; store: no compression (default: %(default)s)"
    add("--profile", choices=PROFILES, default="standard", help=profile)
    add("--level", type=int, default=1, choices=range(1, 20), metavar="1-19", help="zstd level (default: 1)")
    add("--since", metavar="MANIFEST|ARCHIVE|DIR", help="leave out files that this version has: a delta")
    add("--sign", type=Path, metavar="KEY.pem", help="sign with this private key (ECDSA)")
    add("--name", help="name of the model in the archive (default: as in its manifest)")
    add("--force", action="store_true", help="replace an archive of the same name")
    add("--dry-run", action="store_true", help="say what would be written")
    _jobs_argument(parser)


def cmd_pack(context: Context) -> Exit:
    """Pack models, one after another."""
    args, settings, reporter = context.args, context.settings, context.reporter
    folders = _models_to_pack(args.models, args.all, settings)
    if args.name and len(folders) > 1:
        raise UsageError("--name is for one model", "", "pack them one by one")
    if args.to and (args.output or not args.split):
        step = "give --split, and --to for each medium instead of -o"
        raise UsageError("--to is for parts on several media", "", step)
    out, *media = args.to or [args.output or settings.package_dir]
    since = manifest_at(args.since, settings) if args.since else None
    options = PackOptions(**known_fields(PackOptions, {**vars(args), "since": since, "read_back": bool(args.to)}))

    def pack(folder: Path) -> Dict[str, Any]:
        manifest = manifest_to_pack(folder, args.name, args.jobs, reporter, keep=not args.dry_run)
        plan = plan_pack(folder, manifest, options)
        if args.dry_run:
            return _plan_row(plan, out)
        signature = sign_manifest(plan.manifest, args.sign) if args.sign else ""  # a wrong key is said before the work
        packed = pack_model(plan, out, reporter, media)
        reporter.then("verify", packed.parts[0].path)
        for place in [out, *media] if args.sign else []:
            atomic_write(place / (plan.archive + SIGNATURE), signature)
        return _packed_row(packed)

    failures: List[HfshipError] = []

    def packed_rows() -> Iterator[Dict[str, Any]]:
        for folder in folders:
            try:
                yield pack(folder)
            except HfshipError as exc:
                if len(folders) == 1:
                    raise
                failures.append(exc)
                yield {"name": folder.name, **error_row(exc), "text": ""}

    _tell_rows(context, packed_rows())
    return summarize_failures(failures, len(folders), reporter)


def manifest_at(place: str, settings: Settings) -> Manifest:
    """The manifest that is meant by its own path, by an archive, or by a model folder."""
    path = Path(place)
    if path.is_file() and path.suffix == ".json":
        return parse_manifest(path.read_bytes(), place)
    places, step = [settings.package_dir, settings.transfer_dir], "name a manifest.json, an archive or a model folder"
    found = find_archives(place, places)
    manifest = open_archive(found[0]).manifest if found else read_manifest(find_model(place, settings, places, step))
    if manifest is None:
        raise UsageError(f"{place} has no manifest", "", step)
    return manifest


def told(exc: Union[HfshipError, OSError, KeyboardInterrupt]) -> HfshipError:
    """What ended a command, as the error that is said of it."""
    if isinstance(exc, HfshipError):
        return exc
    if isinstance(exc, OSError):
        return disk_error(exc, "use", Path(os.fsdecode(exc.filename or ".")))
    return Interrupted("interrupted", "", "run the same command again: what is complete is kept")


def _tell_rows(context: Context, rows: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Say the `text` of each row when it comes, or with --json all that came, without their text, at the end."""
    done = []
    try:
        for row in rows:
            text = row.pop("text")
            done.append(row)
            if text and not context.args.json:
                context.reporter.result(text)
    except (HfshipError, OSError, KeyboardInterrupt) as exc:
        if context.reporter.gathered is None:  # else it is said for the whole list
            done.append(error_row(told(exc)))
        raise
    finally:
        if context.args.json:
            context.reporter.result_json(done)
    return done


def _models_to_pack(names: Sequence[str], every: bool, settings: Settings) -> List[Path]:
    if every and not names and settings.models_dir.is_dir():
        found = [path for path in sorted(settings.models_dir.iterdir()) if (path / MANIFEST_PATH).is_file()]
        names = [str(path) for path in found if not path.name.endswith(INCOMPLETE)]
    if not names:
        raise UsageError("nothing to pack", "", f"name a model in {settings.models_dir}, or a folder")
    return [find_model(name, settings) for name in names]


def find_folder(name: str, folders: Sequence[Path]) -> Optional[Path]:
    """The folder of a model: a path, or a NAME in the first of `folders` that has it, or in the current folder."""
    if not name:  # an unset variable of a script; it would mean the folder of all models
        raise UsageError("the name of a model is empty", "", "give a NAME or a path")
    places = [Path(name)] if "/" in name or name in (".", "..") else [*(f / name for f in folders), Path(name)]
    return next((Path(os.path.abspath(place)) for place in places if place.is_dir()), None)


def find_model(name: str, settings: Settings, also: Sequence[Path] = (), step: str = "hfship fetch ORG/NAME") -> Path:
    """The folder of a model to pack or to check. Raises NotFoundError, which tells that one looked in `also`, too."""
    folders = [settings.models_dir, settings.site_models_dir]
    found = find_folder(name, folders)
    if found is None:
        looked = "" if "/" in name else "looked in:\n" + "\n".join(map(str, [*also, *folders, Path.cwd()]))
        raise NotFoundError(f"{name} was not found", looked, f"give a path, or: {step}")
    return found


def _plan_row(plan: PackPlan, out: Path) -> Dict[str, Any]:
    name, size, archive = plan.manifest.name, plan.manifest.size, out / plan.archive
    text = f"would pack {name}: {counted(len(plan.manifest.files), 'file')}, {human_bytes(size)}, into {archive}"
    return {
        "name": name,
        "status": "planned",
        "archive": str(archive),
        "bytes_in": size,
        "bytes_out_at_most": plan.size_at_most,
        "parts_at_most": plan.parts_at_most,
        "text": f"{text}, at most {human_bytes(plan.size_at_most)}",
    }


def _packed_row(packed: Packed) -> Dict[str, Any]:
    ratio = packed.size / max(packed.manifest.size, 1)
    amounts = f"{human_bytes(packed.size)}, {100 * ratio:.1f} % of {human_bytes(packed.manifest.size)}"
    first = packed.parts[0].path
    where = str(first) if len(packed.parts) == 1 else f"{first} and {counted(len(packed.parts) - 1, 'more part')}"
    done = f" in {human_seconds(packed.seconds)}" if packed.fresh else ", was packed already (hfship verify proves it)"
    return {
        "name": packed.manifest.name,
        "status": "packed" if packed.fresh else "already packed",
        "parts": [{"path": str(p.path), "size": p.size, "sha256": p.sha256} for p in packed.parts],
        "bytes_in": packed.manifest.size,
        "bytes_out": packed.size,
        "ratio": round(ratio, 4),
        "seconds": round(packed.seconds, 2),
        "text": f"packed {packed.manifest.name}: {where} ({amounts}){done}",
    }


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("targets", nargs="*", metavar="ARCHIVE|PART|DIR|NAME|-", help="archive, part, model folder, or - for a pipe")
    add("--quick", action="store_true", help="archives: prove the medium by checksums, decode nothing")
    add("--repair-from", metavar="ARCHIVE", help="replace what is damaged by bytes of another copy")
    _key_argument(parser)
    _jobs_argument(parser)


def cmd_verify(context: Context) -> Exit:
    """Verify archives and model folders; goes on after a damaged one."""
    if context.args.repair_from and len(context.args.targets) > 1:
        raise UsageError("--repair-from is for one archive", "", "repair them one by one")
    rows = _tell_rows(context, _verify_targets(context.args.targets, context))
    return Exit.OK if all(row["ok"] for row in rows) else Exit.INTEGRITY


def _verify_targets(targets: Sequence[str], context: Context) -> Iterator[Dict[str, Any]]:
    archives: List[ArchiveFiles] = []
    folders, places = [], [context.settings.transfer_dir, context.settings.package_dir]
    for target in targets:
        found = find_archives(target, places)
        archives += found
        folders += [] if found else [find_model(target, context.settings, places)]
    for files in merged(archives):
        yield _verified(context, files.path, _verify_files, files)
    for folder in folders:
        yield _verified(context, folder, _verify_folder, folder)


def _verified(context: Context, path: Path, check: Callable[[Any, Context], str], subject: Any) -> Dict[str, Any]:
    """The row of one check, which returns what is fine or raises."""
    started, text, error = time.monotonic(), "", None
    try:
        text = check(subject, context)
    except IntegrityError as exc:
        error = exc
        context.reporter.error(exc)
    damages = error.damages[:1000] if isinstance(error, DamageError) else ()
    seconds = time.monotonic() - started
    return {
        "path": str(path),
        "ok": error is None,
        "error": error and error_fields(error),
        "damages": [asdict(damage) for damage in damages],
        "seconds": round(seconds, 2),
        "text": text and f"ok: {path}: {text}, {human_seconds(seconds)}",
    }


def _verify_files(files: ArchiveFiles, context: Context) -> str:
    args, repaired = context.args, ""
    if args.repair_from:
        other = find_archives(args.repair_from, [])
        if not other:
            raise NotFoundError(f"no archive {args.repair_from}", "", "name the other copy, or any part of it")
        files, replaced = repair_archive(files, other[0], args.jobs, context.reporter)
        repaired = f"{human_bytes(replaced)} replaced; "
    try:
        archive, signed = open_trusted(files, args.key)
        if isinstance(archive, Foreign):
            return verify_foreign(archive) + require_sums(files)
        damages = verify_archive(archive, args.jobs, context.reporter, args.quick)
    except IncompleteError as exc:  # a pipe that ended too early
        raise IntegrityError(exc.what, exc.why, exc.next_step) from exc
    if damages or not archive.manifest:
        raise archive_error(archive, damages, command_line("hfship", "verify", files.path))
    parts = f" in {counted(len(archive.parts), 'part')}" if files.numbers else ""
    name, text = archive.manifest.name, archive.manifest.caveats
    if files.name not in (f"{name}.tar.zst", f"{name}.delta.tar.zst", STDIN):
        context.reporter.warn(f"{files.path} was renamed: {name}.tar.zst.sha256 and .sig no longer fit, rename it back")
    count, size = counted(len(archive.manifest.files), "file"), human_bytes(archive.manifest.size)
    model = f"model {name}, {count}, {size}{text}"
    left_out = f"; a delta, {len(archive.absent)} of them come from an older version" if archive.absent else ""
    depth = "; only checksums were proven" if args.quick else ""
    by = f"; signed by {signed.fingerprint}" if signed else ""
    size = f"{human_bytes(archive.size)}{parts}, {counted(len(archive.frames), 'frame')}"
    return f"{repaired}{size}, {model}{left_out}{depth}{by}"


def require_sums(files: ArchiveFiles) -> str:
    """Prove files by NAME.tar.zst.sha256; "" when they are not in it. Raises IntegrityError."""
    listed = files.listed()
    known = [path for path in files.paths if path.name in listed]
    wrong = [path.name for path in known if sha256_file(path) != listed[path.name]]
    if wrong:
        step = f"copy {shorten(wrong)} again"
        raise IntegrityError(f"{files.path} is damaged", f"other than {files.sums} says: {shorten(wrong)}", step)
    return f"; as {files.sums.name} says" if known else ""


def _verify_folder(folder: Path, context: Context) -> str:
    manifest = read_manifest(folder)
    if manifest is None:
        require_finished(folder)
        why = f"it has neither archives nor {MANIFEST_PATH}"
        raise UsageError(f"{folder} cannot be verified", why, "name an archive, a part, or the folder of a model")
    strangers = strangers_in(folder, manifest)
    if strangers:
        context.reporter.warn(f"{folder}: not in the manifest: {shorten(strangers)}")
    key = context.args.key or trusted_key()
    signed = prove_signature(folder / SIGNATURE_PATH, key) if key else None
    if signed:
        require_signed(manifest, signed, folder)
    damages = check_folder(folder, manifest, context.args.jobs, context.reporter)
    if damages:
        raise folder_error(folder, manifest, damages)
    by = f"; signed by {signed.fingerprint}" if signed else ""
    return f"{counted(len(manifest.files), 'file')}, {human_bytes(manifest.size)}{manifest.caveats}{by}"


def unpack_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "archive, any part, their folder, NAME, or - for a pipe"
    add("archives", nargs="*", metavar="ARCHIVE|PART|NAME|-", help=what)
    where = "where NAME/ appears (default: HFSHIP_SITE_MODELS_DIR, /data/models/huggingface)"
    add("-o", "--output", type=Path, metavar="DIR", help=where)
    add("--name", help="name of the folder (default: as in the archive)")
    add("--only", action="append", default=[], metavar="GLOB", help="restore only these files; repeatable")
    add("--consume", action="store_true", help="remove parts as their files are safe, to save room")
    add("--wait", action="store_true", help="ask for media with missing parts, and wait for them")
    _key_argument(parser)
    add("--base", type=Path, metavar="DIR", help="an older version with files that a delta leaves out")
    add("--force", action="store_true", help="replace a folder that has files of its own")
    _jobs_argument(parser)


def cmd_unpack(context: Context) -> Exit:
    """Unpack archives, one after another."""
    args, settings, reporter = context.args, context.settings, context.reporter
    places, step = [settings.transfer_dir, settings.package_dir], "give the path of NAME.tar.zst or of any part"
    found = merged(files for argument in args.archives for files in named_archives(argument, places, step))
    if args.name and len(found) > 1:
        raise UsageError("--name is for one archive", "", "unpack them one by one")
    out = args.output or settings.site_models_dir

    def unpack(files: ArchiveFiles) -> Dict[str, Any]:
        media = MediaChange(files, reporter) if args.wait else None
        if args.consume and files.name == STDIN:
            raise UsageError("--consume is for files, not for a pipe", "", "leave it out")
        done = restore(files, out, args, reporter, media)
        if not args.only:
            reporter.then("serve", done.folder)
        return _unpacked_row(done)

    _tell_rows(context, map(unpack, found))
    return Exit.OK


def restore(
    files: ArchiveFiles, out: Path, args: argparse.Namespace, reporter: Reporter, media: Optional[MediaChange] = None
) -> Unpacked:
    """Restore an archive, of whatever program, as the arguments of `unpack` ask; its signature stays with the model."""
    archive, signed = open_trusted(media.with_tables() if media else files, args.key, media)
    if isinstance(archive, Foreign):
        require_sums(files)
        return unpack_foreign(archive, out, args.name, args.force, args.only)
    if signed:
        reporter.info(f"{files.name}: signed by {signed.fingerprint}")
    options = UnpackOptions(tuple(args.only), args.base, args.consume)
    done = unpack_archive(archive, out, args.name, args.jobs, args.force, reporter, options)
    with contextlib.suppress(FileNotFoundError):
        bundle = (files.folder / (files.name + SIGNATURE)).read_bytes()
        atomic_write(done.folder / SIGNATURE_PATH, bundle)
    return done


def named_archives(argument: str, places: Sequence[Path], step: str) -> List[ArchiveFiles]:
    """The archives that an argument means. Raises NotFoundError, with the next step, when there are none."""
    found = find_archives(argument, places)
    if not found:
        looked = "" if "/" in argument else "looked in " + " and ".join(map(str, places))
        raise NotFoundError(f"no archive {argument}", looked, step)
    return found


def _unpacked_row(done: Unpacked) -> Dict[str, Any]:
    count, size = len(done.manifest.files), done.manifest.size
    how = f"in {human_seconds(done.seconds)}" if done.written else "were there already and are intact"
    return {
        "name": done.manifest.name,
        "path": str(done.folder),
        "status": "unpacked" if done.written else "already there",
        "files": count,
        "written": done.written,
        "bytes": size,
        "seconds": round(done.seconds, 2),
        "unproven": done.manifest.unproven,
        "left_out": done.manifest.left_out,
        "text": f"unpacked {done.folder}: {counted(count, 'file')}, {human_bytes(size)} {how}{done.manifest.caveats}",
    }


# ---- push ----------------------------------------------------------------------------


def push_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("archives", nargs="*", metavar="ARCHIVE|NAME|DIR", help="archive, part, their folder, or NAME")
    add("to", metavar="[USER@]HOST:DIR", help="where to, by ssh; without HOST: a folder of this machine")
    port = "port of ssh (default: as in ~/.ssh/config)"
    add("-p", "--port", dest="ssh_port", type=_port, metavar="N", help=port)
    add("-i", "--identity", metavar="FILE", help="private key for ssh (default: those that ssh finds)")
    add("--bwlimit", metavar="RATE", help="bytes per second of all, like 20M; plain numbers are KiB")
    what = "files at once (default: %(default)s)"
    add("-j", "--jobs", type=_positive, default=PUSH_JOBS, metavar="N", help=what)


def cmd_push(context: Context) -> Exit:
    """Push archives with what travels beside them."""
    args, settings, reporter = context.args, context.settings, context.reporter
    ssh = ["ssh", *SSH_OPTIONS, *(["-p", str(args.ssh_port)] * bool(args.ssh_port))]
    ssh += ["-i", os.path.expanduser(args.identity)] if args.identity else []
    to = parse_destination(args.to, ssh)
    limit_bps = parse_size(args.bwlimit + "KiB" * args.bwlimit.isdigit()) if args.bwlimit else 0
    places = [settings.package_dir, settings.transfer_dir]
    found: List[ArchiveFiles] = []
    for name in args.archives:
        packable = find_folder(name, [settings.models_dir])
        step = command_line("hfship", "pack", name) if packable else "give a path, or pack it first"
        found += named_archives(name, places, step)
    parcels = parcels_of(merged(found), reporter)
    with open_line(to, os.isatty(0) and reporter.err.isatty(), reporter) as there:
        _tell_rows(context, [push(there, parcels, args.jobs, limit_bps, reporter)])
    return Exit.OK


# ---- serve, status, stop, logs -------------------------------------------------------


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Options whose `dest` is a field of ServeOptions become that field."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME|DIR", help="a model of the models folders, or its folder")
    add("--plan", action="store_true", help="say how it would be served, and do nothing")
    add("--write-only", action="store_true", help="write the deployment's files without starting it")
    add("--name", help="name of the deployment (default: the folder's name)")
    add("--reset", action="store_true", help="forget the options of earlier calls, which are kept otherwise")
    add = parser.add_argument_group("model").add_argument
    instead = "name in the API, instead of NAME and ORG/NAME; repeatable"
    add("--served-model-name", dest="served_names", action="append", default=[], metavar="NAME", help=instead)
    more = "one more name in the API; repeatable"
    add("--alias", dest="aliases", action="append", default=[], metavar="NAME", help=more)
    changed = "serve although this file is not as published (edited here); weights never"
    add("--allow-changed", action="append", default=[], metavar="FILE", help=changed)
    add("--max-model-len", type=_positive, default=0, metavar="TOKENS", help="context (default: the most that fits)")
    add("--max-num-seqs", type=_positive, default=0, metavar="N", help="requests at a time")
    dtype = "bfloat16, float16, ... (default: the model's)"
    add("--dtype", choices=DTYPES, default="auto", metavar="DTYPE", help=dtype)
    cache = "fp8 halves the KV cache (default: the model's)"
    add("--kv-cache-dtype", choices=KV_DTYPES, default="auto", metavar="DTYPE", help=cache)
    add("--trust-remote-code", action="store_true", help="run the Python code that the model brings")
    variable = "variable of the container; repeatable"
    add("--env", type=_variable, action="append", default=[], metavar="K=V", help=variable)
    passed_on = "passed on to vllm serve, as is everything after --"
    add("--extra-arg", dest="extra_args", action="append", default=[], metavar="ARG", help=passed_on)
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "gpu", "cpu"), default="auto", help="where it runs (default: %(default)s)")
    add("--gpus", type=_gpus, default="", metavar="0,1|UUID", help="GPUs that may be used (default: the free ones)")
    add("--tensor-parallel-size", "-tp", type=_positive, default=0, metavar="N", help="GPUs to split it over")
    add("--gpu-memory-utilization", type=_share, default=0.9, metavar="0.9", help="share of each GPU (default: 0.9)")
    add("--assume-gpus", metavar="2xH100|2x80GB", help="with --plan: plan for a machine with these")
    add("--image", default="", help="docker image (default: the newest vLLM image that is loaded)")
    bind = "to listen on (default: %(default)s)"
    add("--host", dest="bind", type=_address, default="127.0.0.1", metavar="IP", help=bind)
    add("--port", type=_port, default=0, help="port to listen on (default: the first free one from 8000)")
    add("--shm-size", default="", metavar="SIZE", help="shared memory of the container, like 16gb")
    wait = "to wait until it answers (default: %(default)s)"
    add("--timeout", dest="ready_timeout_s", type=_positive, default=3600, metavar="SECONDS", help=wait)


def serve_options(args: argparse.Namespace) -> ServeOptions:
    """What the operator asked for. Raises UsageError."""
    env = dict(item.partition("=")[::2] for item in args.env)
    if args.shm_size:
        parse_size(args.shm_size)
    if args.assume_gpus and not args.plan:
        raise UsageError("--assume-gpus is for planning", "it describes a machine that is not here", "add --plan")
    if len(args.names) > 1 and (args.port or args.name or args.served_names):
        raise UsageError("--port, --name and --served-model-name are for one model", "", "serve them one by one")
    gpus = [] if args.gpus == "all" else list(filter(None, args.gpus.split(",")))
    return ServeOptions(**known_fields(ServeOptions, {**vars(args), "env": env, "gpus": gpus}))


def cmd_serve(context: Context) -> Exit:
    """Serve models: plan, write the files, start, wait for a real answer."""
    serve_options(context.args)  # refuses what is wrong before anything is done
    _tell_rows(context, (serve_model(context, word) for word in context.args.names))
    return Exit.OK


def with_former_wishes(context: Context, name: str) -> ServeOptions:
    """What is asked for now, over what was asked for when NAME was served before; a models file says all anew."""
    kept: Mapping[str, Any] = {}
    before = next((d for d in readable_deployments(context) if d.plan.name == name), None)
    actions = file_options("serve")
    if before and not context.listed and not context.args.reset:
        usual = {k: type(v) for k, v in vars(context.args).items() if k in actions and k not in context.asked}
        kept = {k: v for k, v in before.plan.wishes.items() if isinstance(v, usual.get(k, ()))}
    if kept:
        words = " ".join(shlex.quote(word) for dest, value in kept.items() for word in typed(actions[dest], value))
        context.reporter.info(f"{name}: as asked for before: {words} (--reset forgets that)")
    wishes = {**kept, **{k: v for k, v in context.asked.items() if k in actions and k != "name"}}
    args = argparse.Namespace(**{**vars(context.args), **wishes})
    return replace(serve_options(args), wishes=json.loads(json.dumps(wishes)))


def typed(action: argparse.Action, value: Any) -> List[str]:
    """An option and its value as words of a command line."""
    option = next(option for option in action.option_strings if option.startswith("--"))
    if isinstance(value, bool):
        return [option] * value
    if action.metavar == "K=V":  # values may be secret
        value = [item.partition("=")[0] + "=..." for item in value]
    return [word for item in (value if isinstance(value, list) else [value]) for word in (option, str(item))]


def serve_model(context: Context, word: str) -> Dict[str, Any]:
    """Serve one model, NAME or DIR; the row that says what came of it."""
    args, reporter, deploy_dir = context.args, context.reporter, context.settings.deploy_dir
    folder = find_served_model(context, word)
    name = make_manifest(args.name or folder.name, ()).name  # refuses what cannot be a name
    options = with_former_wishes(context, name)
    manifest = read_manifest(folder)
    if manifest and manifest.unproven:
        reporter.warn(f"{folder}: {UNPROVEN}; what is served may not be what was published")
    facts = read_facts(folder, options.allow_changed)
    # Clients know the model by its name here or by its name on the Hub.
    usual = (name, manifest.source.repo) if manifest and manifest.source else (name,)
    options = replace(options, served_names=(*(options.served_names or usual), *options.aliases))
    if args.plan:
        return planned_row(context, name, folder, facts, options)
    if not args.write_only:
        require_docker()
    with contextlib.ExitStack() as stack:
        stack.callback(remove_if_empty, deploy_dir, not deploy_dir.exists())
        stack.enter_context(FolderLock(deploy_dir))  # two at a time would choose the same port and GPUs
        plan = decide(context, name, folder, facts, options, *look_around(context, name, options))
        deployment = write_deployment(deploy_dir / name, plan, reporter)
        for warning in plan.warnings:
            reporter.warn(f"{name}: {warning}")
        reporter.info(plan_summary(plan))
        if args.write_only:
            start_it = f"cd {shlex.quote(str(deployment.folder))} && docker compose up -d"
            text = f"wrote {deployment.folder}\n  start    {start_it}"
            return {"name": name, "state": "written", "folder": str(deployment.folder), "text": text}
        restarts = start(deployment)
    try:
        return served_row(deployment, facts, wait_until_it_answers(deployment, restarts, reporter))
    except KeyboardInterrupt as exc:
        step = f"hfship logs {name} -f    # how far it is\nhfship serve {name}     # waits again\nhfship stop {name}"
        what, why = f"interrupted: {name} goes on loading", "its container runs on without hfship"
        raise Interrupted(what, why, step) from exc


def find_served_model(context: Context, name: str) -> Path:
    """The folder of the model NAME, or DIR itself. Unpacked first when only the archive is there; --plan says so."""
    settings = context.settings
    folder = find_folder(name, [settings.site_models_dir, settings.models_dir])
    if folder:
        return folder
    archives = find_archives(name, [settings.transfer_dir, settings.package_dir])
    if not archives:
        looked = [settings.site_models_dir, settings.models_dir, settings.transfer_dir, settings.package_dir]
        why = f"looked for {name} and {name}.tar.zst in:\n" + "\n".join(map(str, looked))
        raise NotFoundError(f"no such model: {name}", why, f"put {name}.tar.zst into {settings.transfer_dir}")
    path = archives[0].path
    if context.args.plan:
        raise NotFoundError(f"{name} is not unpacked yet", f"there is {path}", command_line("hfship", "unpack", path))
    usual, _ = parse_words(["unpack", name])
    return restore(archives[0], settings.site_models_dir, usual, context.reporter).folder


def readable_deployments(context: Context, complain: Callable[[str], None] = lambda _: None) -> List[Deployment]:
    """All deployments but damaged ones, and for --plan those that this user may not read."""
    try:
        found, wrong = list_deployments(context.settings.deploy_dir, context.reporter)
    except HostError as exc:
        found, wrong = [], {"": exc}
    for problem in wrong.values():
        if isinstance(problem, HostError) and not context.args.plan:
            raise problem
        complain(problem.what)
    return found


def look_around(context: Context, name: str, options: ServeOptions) -> Tuple[Host, Optional[Plan]]:
    """This machine as it is now, less what running deployments hold, and the plan of NAME so far. --plan and
    --write-only do without docker."""
    args, working = context.args, True
    images: Tuple[Image, ...] = ()
    try:
        images = list_images(options.image)
    except HostError as exc:
        if not args.plan and not args.write_only:
            raise
        context.reporter.warn(f"{exc.what} ({exc.why})")
        working = False
    host = read_host(images)
    if args.assume_gpus:
        return replace(host, gpus=assumed_gpus(args.assume_gpus)), None
    plans = {d.plan.name: d.plan for d in readable_deployments(context, context.reporter.warn)}
    running = [n for n in plans if working and (inspect_container(n) or Container("", "")).status == "running"]
    previous = plans.pop(name, None)
    held = previous.port if previous and (name in running or not working) else None
    if previous and name not in running:
        previous = replace(previous, gpus=())
    ports = [options.port] if options.port else PORTS
    taken = {p for p in ports if p != held and not port_is_free(options.bind, p)} | {p.port for p in plans.values()}
    gpus = with_claims(host.gpus, [plan for other, plan in plans.items() if other in running])
    spoken_for = {uuid for other, plan in plans.items() if other not in running for uuid in plan.gpus}
    gpus = tuple(replace(gpu, spoken_for=gpu.uuid in spoken_for) for gpu in gpus)
    return replace(host, gpus=gpus, taken_ports=frozenset(taken)), previous


def decide(
    context: Context,
    name: str,
    folder: Path,
    facts: ModelFacts,
    options: ServeOptions,
    host: Host,
    previous: Optional[Plan],
) -> Plan:
    """The plan for this machine. Raises HostError."""
    args, device = context.args, choose_device(options, host)
    if device == "cpu" and options.device == "auto":
        context.reporter.info("no GPU here, and the image is built for CPUs: serving on the CPU")
    try:
        image = read_image(choose_image(host.images, options.image, device))
    except HostError as exc:
        if args.write_only and not options.image:
            raise HostError(exc.what, exc.why, f"{exc.next_step}\nor name one with --image") from exc
        if not args.plan and not args.write_only:
            raise
        if host.images:
            context.reporter.warn(f"{exc.what} ({exc.why})")
        image = Image(options.image or "vllm/vllm-openai", "", parse_version(options.image), device == "cpu")
    return make_plan(name, str(folder.resolve()), facts, host, image, replace(options, device=device), previous)


def planned_row(context: Context, name: str, folder: Path, facts: ModelFacts, options: ServeOptions) -> Dict[str, Any]:
    """--plan: works without docker and GPU, and then says what would be needed."""
    reporter, row = context.reporter, {"name": name, "facts": asdict(facts)}
    host, previous = look_around(context, name, options)
    try:
        choose_device(options, host)
    except HostError as exc:
        if options.device == "gpu":
            raise
        reporter.warn(f"{exc.what} ({exc.why}); --assume-gpus 2xH100 plans for another machine")
        rows = sizing(facts, options)
        header = ["split", "weights per GPU", "short context", "full context"]
        return {**row, "sizing": rows, "text": f"{facts_summary(name, facts)}\n{table(rows, header)}"}
    plan = decide(context, name, folder, facts, options, host, previous)
    for warning in plan.warnings:
        reporter.warn(f"{name}: {warning}")
    text = f"{facts_summary(name, facts)}\n{plan_summary(plan)}"
    return {**row, "plan": asdict(plan), "arguments": vllm_arguments(plan), "text": text}


def facts_summary(name: str, facts: ModelFacts) -> str:
    """One line about the model."""
    quant = f", {facts.quantization.method}" if facts.quantization else ""
    experts = f", {facts.experts} experts" if facts.experts else ""
    shape = f"{facts.architecture}, {counted(facts.layers, 'layer')}{experts}, {facts.dtype}{quant}"
    return f"{name}: {shape}, {human_bytes(facts.weight_bytes)} of weights, context up to {facts.max_length} tokens"


def plan_summary(plan: Plan) -> str:
    """The plan for people."""
    image = f"{plan.image} (vLLM {version_text(plan.version)})" if plan.image_id else f"{plan.image}, not loaded here"
    split = f", split over {len(plan.gpus)}" if len(plan.gpus) > 1 else ""
    cache = f"{human_bytes(plan.kv_bytes)} of KV cache{' per GPU' if plan.gpus else ''}"
    return labelled(
        image=image,
        runs_on=(", ".join(plan.gpu_names) or "CPU") + split,
        context=f"{plan.max_model_len} tokens" if plan.max_model_len else "as vLLM decides",
        cache=f"{cache}, for about {plan.concurrency:g} requests of full length",
        names=", ".join(plan.served_names),
        address=plan.url,
    )


def served_row(deployment: Deployment, facts: ModelFacts, answer: Answer) -> Dict[str, Any]:
    """Where the model answers and how to ask it, with no key in any command."""
    plan, env_file = deployment.plan, deployment.folder / ENV_FILE
    tokens = measured_kv_tokens(log_tail(deployment, 5000))
    lines = labelled(
        names=", ".join(plan.served_names),
        key=f"{KEY_VARIABLE} in {env_file}",
        cache=f"{tokens} tokens, as vLLM measured" if tokens else "",
        **{"try": curl_example(plan, env_file, facts.chat_template)},
    )
    row = {"state": "healthy", "url": plan.url, "env_file": str(env_file), "folder": str(deployment.folder)}
    measured = {"kv_cache_tokens": tokens or None, "latency_s": round(answer.seconds, 3)}
    text = f"{plan.name} answers at {plan.url} (first token after {answer.seconds:.2f} s)\n{lines}"
    return {**asdict(plan), **row, **measured, "text": text}


def curl_example(plan: Plan, env_file: Path, chat: bool) -> str:
    """A request by curl that reads the key from .env through a pipe: command lines can be read by everybody."""
    hello: Mapping[str, Any] = {"prompt": "Hello", "max_tokens": 16}
    path = "embeddings" if plan.embeds else "chat/completions" if chat else "completions"
    if path != "completions":
        hello = {"input": "Hello"} if plan.embeds else {"messages": [{"role": "user", "content": "Hello"}]}
    header = f"awk -F= '/^{KEY_VARIABLE}=/{{print \"Authorization: Bearer\",$2}}' {shlex.quote(str(env_file))}"
    body = shlex.quote(json.dumps({"model": plan.served_names[0], **hello}))
    return f"{header} | curl -s -H @- -H 'Content-Type: application/json' {plan.url}/{path} -d {body}"


def names_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="deployments (default: all)")


def stop_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="deployments, or jobs that watch shows")
    add("--remove", action="store_true", help="also remove container, compile cache, files and key")
    add("-y", "--yes", action="store_true", help="with --remove: do not ask")


def logs_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="deployment, or job")
    add("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    add("--tail", type=_tail, default="all", metavar="N", help="only the last N lines (default: all)")


def named_deployment(context: Context, name: str) -> Deployment:
    """The deployment called `name`. Raises NotFoundError."""
    folder = context.settings.deploy_dir / make_manifest(name, ()).name
    found = read_deployment(folder, context.reporter)
    if found is None:
        here = [d.plan.name for d in list_deployments(context.settings.deploy_dir, context.reporter)[0]]
        why = f"in {folder.parent} there are: {', '.join(here) or 'none'}"
        step = "\n".join(f"hfship {context.args.command} {other}" for other in here[:10]) or f"hfship serve {name}"
        raise NotFoundError(f"no such deployment: {name}{nearest(name, here)}", why, step)
    return found


_STATE_EXIT = {"healthy": Exit.OK, "loading": Exit.INCOMPLETE, "degraded": Exit.INCOMPLETE}  # down, unknown: HOST


def cmd_status(context: Context) -> Exit:
    """The state of deployments, each proven by a real request. Without docker it is unknown, and said so."""
    names, deploy_dir = context.args.names, context.settings.deploy_dir
    absent = [name for name in names if context.listed and not (deploy_dir / name / PLAN_FILE).exists()]
    found, wrong = ([], {}) if names else list_deployments(deploy_dir, context.reporter)
    found += [named_deployment(context, name) for name in names if name not in absent]
    problem = ""
    try:
        if found:
            require_docker()
    except HostError as exc:
        problem = exc.what
        context.reporter.error(exc)
    rows = [deployment_status(d, problem) for d in found]
    rows += [{**deployment_status(Deployment(deploy_dir / n, Plan(name=n), ""), "-"), **NOT_SERVED} for n in absent]
    rows += [deployment_status(Deployment(deploy_dir / n, Plan(name=n), ""), p.what) for n, p in wrong.items()]
    if rows or context.args.json:
        context.reporter.result_of(status_text(rows, context.reporter.width), rows)
    else:
        context.reporter.info(f"no deployments in {deploy_dir}")
    return max((_STATE_EXIT.get(str(row["state"]), Exit.HOST) for row in rows), default=Exit.OK)


# The row of a model that a models file lists, and that was not served yet.
NOT_SERVED: Mapping[str, object] = {"state": "down", "url": "", "port": 0, "note": "not served yet"}


def status_text(rows: Sequence[Mapping[str, object]], width: int) -> str:
    """The table of `status`, and below it what is to be said of single deployments."""
    columns = ("name", "state", "image", "url", "gpus", "uptime", "answer")
    told = [columns if row["image"] else ("name", "state") for row in rows]
    cells = [{c: status_cell(row[c] if c in known else None) for c in columns} for row, known in zip(rows, told)]
    notes = [f"{row['name']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join([narrow_table(cells, columns, ("image", "gpus", "answer", "uptime"), width), *notes])


def deployment_status(deployment: Deployment, problem: str) -> Mapping[str, object]:
    """One row of `status`; `problem` is why docker cannot be asked."""
    plan = deployment.plan
    container = None if problem else inspect_container(plan.name)
    up = container is not None and container.status == "running"
    answer = ask_model(deployment, STATUS_TIMEOUT_S) if up else Answer(0, "")
    state = "unknown" if problem else deployment_state(container, answer)
    notes = [problem or (container_trouble(container, 0) if container else "no container")]
    if state == "degraded" and not notes[0]:
        notes = [str(answer)]
    if container and plan.image_id and container.image_id != plan.image_id:
        notes.append("runs an image that is not the plan's")
    return {
        "name": plan.name,
        "state": state,
        "container": container_name(plan.name),
        "image": plan.image,
        "url": plan.url,
        "port": plan.port,
        "gpus": list(plan.gpus),
        "uptime": round(time.time() - container.started_at) if container and up else None,
        "answer": round(answer.seconds, 3) if answer.works else None,
        "restarts": container.restarts if container else None,
        "note": "; ".join(filter(None, notes)),
    }


def status_cell(value: object) -> str:
    """A value of `status` for people."""
    if isinstance(value, list):
        return ",".join(str(v)[:12] for v in value) or "CPU"
    if isinstance(value, float):
        return f"{value:.2f} s"
    return human_seconds(value) if isinstance(value, int) else str(value or "-")


def cmd_stop(context: Context) -> Exit:
    """Stop jobs and deployments; the files of both stay, but for those of deployments with --remove."""
    found = [job_or_deployment(context, name) for name in context.args.names]
    deployments = [each for each in found if isinstance(each, Deployment)]
    remove = context.args.remove
    if deployments:
        require_docker()
    if remove and not context.args.yes:
        folders = ", ".join(str(deployment.folder) for deployment in deployments)
        confirm(f"remove {folders or 'nothing'} with key and compile cache? The model stays.", context.reporter)

    def stop(deployment: Union[Job, Deployment]) -> Dict[str, Any]:
        if isinstance(deployment, Job):
            text = stop_job(deployment)
            return {"name": deployment.record.name, "state": "stopped", "text": text}
        name = deployment.plan.name
        docker(compose(deployment, "down", *["--volumes"] * remove), f"stop {name}", COMPOSE_TIMEOUT_S, name)
        if remove:
            try:
                shutil.rmtree(deployment.folder)
            except OSError as exc:
                raise disk_error(exc, "remove", deployment.folder) from exc
            remove_if_empty(context.settings.deploy_dir, False)
        state, text = ("removed", "is gone") if remove else ("down", "stays")
        said = f"{'removed' if remove else 'stopped'} {name}; {deployment.folder} {text}"
        return {"name": name, "state": state, "text": said}

    _tell_rows(context, map(stop, found))
    return Exit.OK


def confirm(question: str, reporter: Reporter) -> None:
    """Go on if the operator says yes. Raises UsageError for any other answer, and where there is nobody to ask."""
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError("nothing was removed", f"no terminal to ask on: {question}", "the same command with --yes")
    reporter.say(f"{question} [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed", "the answer was not yes", "")


def cmd_logs(context: Context) -> Exit:
    """The log of a job or of a deployment."""
    found = job_or_deployment(context, context.args.name)
    if isinstance(found, Job):
        follow_log(found, context.args.follow, context.args.tail, context.reporter)
        return Exit.OK
    require_docker()
    return stream_logs(found, context.args.follow, context.args.tail, context.reporter)


# ---- watch ---------------------------------------------------------------------------


def watch_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("jobs", nargs="*", metavar="JOB", help="only these jobs (default: all, also those of others in /home)")
    add("--also", action="append", default=[], metavar="DIR", help="also the jobs of this log folder; repeatable")
    add("--once", action="store_true", help="show them as they are now; --json alone does too")
    looks = "between two looks; with --json: a line each, while jobs run"
    add("--interval", type=_seconds, metavar="SECONDS", help=looks)
    add("--resume-all", action="store_true", help="go on with background jobs that a reboot or a kill interrupted")
    add("--install", action="store_true", help="print a systemd unit and a cron line that resume jobs after a reboot")


def log_folders(context: Context) -> List[Path]:
    """Our own log folder first, then those of others that we may read."""
    also = [Path(place).expanduser() for place in getattr(context.args, "also", ())]
    others = [path for path in map(Path, glob(OTHER_LOGS)) if os.access(path, os.R_OK | os.X_OK)]
    return list(dict.fromkeys(folder.resolve() for folder in [context.settings.log_dir, *also, *others]))


def job_or_deployment(context: Context, name: str) -> Union[Job, Deployment]:
    """What is called `name`. Raises NotFoundError."""
    jobs = {job.label: job for job in reversed(read_jobs(log_folders(context), context.reporter.warn))}
    folder = context.settings.deploy_dir / name
    found = jobs.get(name) or (read_deployment(folder, context.reporter) if _NAME.match(name) else None)
    if found:
        return found
    here = [d.plan.name for d in list_deployments(folder.parent, context.reporter)[0]]
    meant = closest(name, [*jobs, *here])
    step = "hfship watch --once     # the jobs\nhfship status     # the deployments"
    step = command_line("hfship", context.args.command, meant) if meant else step
    what = f"no such deployment or job: {name}{nearest(name, [*jobs, *here])}"
    why = f"in {folder.parent} there are: {', '.join(here) or 'none'}\njobs: {shorten(list(reversed(jobs))) or 'none'}"
    raise NotFoundError(what, why, step)


def cmd_watch(context: Context) -> Exit:
    """Show jobs, or resume them."""
    args, reporter = context.args, context.reporter
    if args.install:
        argv = [sys.executable, str(own_file()), "watch", "--resume-all", "--log-dir", str(context.settings.log_dir)]
        reporter.show(install_text(argv, Path.home()))
        return Exit.OK
    if args.resume_all:
        rows = _tell_rows(context, resume_jobs(read_jobs([context.settings.log_dir], reporter.warn), reporter))
        return Exit.INCOMPLETE if any("error" in row for row in rows) else Exit.OK
    known = [job.label for job in read_jobs(log_folders(context), reporter.warn)]
    for name in args.jobs:
        if name not in known:
            raise NotFoundError(f"no such job: {name}", f"jobs: {shorten(known) or 'none'}", "hfship watch --once")

    def jobs() -> List[Job]:
        return [job for job in read_jobs(log_folders(context)) if not args.jobs or job.label in args.jobs]

    if args.json and not args.interval:
        reporter.result_json([job_row(job) for job in jobs()])
    elif args.once:
        width = shutil.get_terminal_size((200, 24)).columns
        reporter.show("".join(line + "\n" for line in watch_lines(jobs(), time.time(), width, 1000)))
    elif reporter.out.isatty() and not args.json:
        watch_on_screen(jobs, args.interval or RECORD_INTERVAL_S, reporter)
    else:
        watch_in_lines(jobs, args.interval or PLAIN_INTERVAL_S, args.json, reporter)
    return Exit.OK


# ---- mirror --------------------------------------------------------------------------


def mirror_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", nargs="?", metavar="DIR", help="folder with NAME/ or ORG/NAME/ (default: the models folder)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_free_port, default=8090, help="port, 0 for any free one (default: %(default)s)")
    token = "clients must send the token in this file (default: HFSHIP_MIRROR_TOKEN, else none is asked for)"
    add("--token-file", type=Path, metavar="FILE", help=token)
    add("--tls-cert", type=Path, metavar="FILE", help="serve https with this certificate (PEM)")
    add("--tls-key", type=Path, metavar="FILE", help="its key (default: in the same file)")
    add("--access-log", type=Path, metavar="FILE", help="append a line per request, combined format")


def cmd_mirror(context: Context) -> Exit:
    """Serve until interrupted."""
    settings, args = context.settings, context.args
    default = settings.site_models_dir if settings.site_models_dir.is_dir() else settings.models_dir
    folder = Path(args.folder).expanduser() if args.folder else default
    if not folder.is_dir():
        step = "hfship mirror DIR, with DIR holding NAME/ or ORG/NAME/"
        raise NotFoundError(f"there is no folder {folder}", "", step)
    if not args.host:  # an unset variable of a script; to the system it means all addresses
        raise UsageError("--host is empty", "", "--host 127.0.0.1, or --host 0.0.0.0 for all addresses")
    if args.tls_key and not args.tls_cert:
        raise UsageError("--tls-key is nothing without --tls-cert", "", "give both, or one --tls-cert that holds both")
    if args.access_log:
        try:
            args.access_log.open("a").close()
        except OSError as exc:
            raise disk_error(exc, "write", args.access_log, "give --access-log another FILE") from exc
    library, reporter = Library(folder, context.reporter.info), context.reporter
    value = os.environ.get("HFSHIP_MIRROR_TOKEN", "").strip()
    token = checked_token(value, "environment variable HFSHIP_MIRROR_TOKEN") if value else None
    token = read_token_file(args.token_file) if args.token_file else token
    tls = load_tls(args.tls_cert, args.tls_key) if args.tls_cert else None
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # each client needs two: its connection and a file
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    address, log = (args.host, args.port), args.access_log
    with MirrorServer(address, library, reporter, token=token, tls=tls, access_log=log) as server:
        reporter.info(f"looking through {folder}; what no manifest vouches for is hashed, which takes a while")
        names = [repo.repo for repo in library.repos()]
        if not names:
            reporter.warn(f"{folder} holds no whole model yet; new ones are found while the mirror runs")
        row = {"url": server.url, "folder": str(folder), "repos": names, "left_out": library.left_out}
        reporter.result_of(f"serving {folder} at {server.url}: {', '.join(names) or 'nothing yet'}", row)
        reach = re.sub(r"//(0\.0\.0\.0|\[::\])", f"//{socket.gethostname()}", server.url)
        secret = "HF_TOKEN=... " if token else ""
        reporter.info(f"use it with: {secret}HF_ENDPOINT={reach} hf download {names[0] if names else 'ORG/NAME'}")
        # Not in this thread: an interrupt in the middle of an accept would cut the connection that it accepted.
        with contextlib.suppress(KeyboardInterrupt):
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
            while True:
                time.sleep(0.2)  # a signal that another thread received is seen at the next turn
        with contextlib.suppress(KeyboardInterrupt):
            server.drain(STOP_GRACE_S)
    return Exit.OK


# ---- models --------------------------------------------------------------------------

# Options that a models file may set: of each model (or, for all, in [defaults]), and in [defaults] alone. Of `serve`
# it may set all but those that are for one call.
MODEL_OPTIONS = {"fetch": ("revision", "repo_type", "include", "exclude", "all_files"),
                 "pack": ("profile", "split", "level")}  # fmt: skip
DEFAULT_OPTIONS = {"fetch": ("mirror", "limit_rate")}
CALL_OPTIONS = ("help", "plan", "write_only", "reset", "assume_gpus")
MODELS_EXAMPLE = """\
# The models of a site, for: hfship VERB --models models.toml [NAME...]
# Flags win over HFSHIP_* and HF_* variables, those over this file. Relative folders start where this file lies.

[defaults]
models_dir = "~/models"                          # connected side: fetch writes here,
package_dir = "~/transfer_package"               # and pack here
transfer_dir = "/data/transfer"                  # offline side: archives arrive here,
site_models_dir = "/data/models/huggingface"     # are unpacked to here,
deploy_dir = "/data/deploy"                      # and served from here
log_dir = "~/logs/hfship"
# endpoint = "https://hub.example.org"           # default: huggingface.co
# mirror = ["https://mirror.example.org"]        # asked before the endpoint
# profile = "smallest"                           # of archives; default: standard
# split = "fat32"                                # or dvd, bd25, bd50, 8G; default: one file
# image = "vllm/vllm-openai:v0.27.1"             # default: the newest that docker has

[defaults.serve]
gpu_memory_utilization = 0.9

[[model]]
repo = "Qwen/Qwen3-8B"                           # called Qwen3-8B unless `name` says otherwise
revision = "main"                                # branch, tag or commit
exclude = ["*.onnx"]

[model.serve]                                    # whatever `hfship serve` has as an option
port = 8001
max_model_len = 32768
aliases = ["chat"]                               # names in the API beside Qwen3-8B and Qwen/Qwen3-8B

[[model]]
repo = "meta-llama/Llama-3.1-70B-Instruct"
name = "llama-70b"
split = "bd25"

[model.serve]
gpus = [0, 1, 2, 3]
tensor_parallel_size = 4
port = 8002
env = { VLLM_LOGGING_LEVEL = "INFO" }
extra_args = ["--enable-auto-tool-choice", "--tool-call-parser", "llama3_json"]
"""


def file_options(command: str) -> Dict[str, argparse.Action]:
    """The options of a command that a models file may set, by dest."""
    parser = argparse.ArgumentParser()
    next(row for row in COMMANDS if row.name == command).arguments(parser)
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    wanted = MODEL_OPTIONS.get(command, ()) + DEFAULT_OPTIONS.get(command, ())
    return {dest: a for dest, a in actions.items() if (dest in wanted if wanted else dest not in CALL_OPTIONS)}


def key_name(action: argparse.Action) -> str:
    """The key of an option: its name, in the plural where its dest is (--alias, aliases)."""
    name = action.option_strings[0][2:].replace("-", "_")
    return action.dest if action.dest.startswith(name) else name


def option_key(action: argparse.Action) -> Key:
    """What a models file may say for an option; argparse's own conversion reads it."""
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    about = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    if action.nargs == 0:
        return Key("boolean", about)
    if action.dest == "name":
        return Key("string", about, lambda name: make_manifest(name, ()).name)
    if action.metavar == "K=V":
        return Key("object", about, lambda items: [convert(f"{k}={v}") for k, v in zip(items, texts(items.values()))])
    if isinstance(action.default, list):
        return Key("array", about, lambda items: [convert(word) for word in texts(items)])
    if convert is _gpus:
        return Key("array", about, lambda items: convert(",".join(texts(items))))
    kinds = {_positive: "integer", _port: "integer", int: "integer", _share: "number"}
    return Key(kinds.get(convert, "string"), about, lambda value: convert(str(value)), tuple(action.choices or ()))


def texts(items: Iterable[Any]) -> List[str]:
    """Texts and whole numbers as texts. Raises ValueError for anything else."""
    items = list(items)
    if not all(isinstance(item, (str, int)) for item in items):
        raise ValueError(f"expects texts or whole numbers, not {json.dumps(items, default=str)[:40]}")
    return list(map(str, items))


def models_schema() -> Key:
    """What may stand in a models file, made from the options of the commands."""

    def keys(options: Mapping[str, Sequence[str]]) -> Dict[str, Key]:
        found = {command: file_options(command) for command in options}
        return {key_name(a): option_key(a) for c, dests in options.items() for a in map(found[c].__getitem__, dests)}

    served = {key_name(action): option_key(action) for action in file_options("serve").values()}
    shared, single = keys(MODEL_OPTIONS), ("name", "port", "aliases", "served_model_name")
    named = {"repo": Key("string", "ORG/NAME on the Hub", parse_repo), "name": served["name"]}
    model = {**named, **shared, "serve": Key("object", "how it is served", inside=served)}
    all_serve = Key("object", "how models are served", inside={k: v for k, v in served.items() if k not in single})
    folders = {name: Key("string", f"folder; wins over it: {variable}") for name, (variable, _) in FOLDERS.items()}
    endpoint = Key("string", "Hub or mirror; wins over it: HF_ENDPOINT")
    defaults = {"endpoint": endpoint, **folders, **keys(DEFAULT_OPTIONS), **shared, "image": served["image"]}
    tables = {"defaults": Key("object", "for all models", inside={**defaults, "serve": all_serve})}
    return Key("object", "models file of hfship", inside={**tables, "model": Key("tables", "a model", inside=model)})


def models_file(args: argparse.Namespace) -> Optional[ModelsFile]:
    """The file of --models or HFSHIP_MODELS_FILE. Raises UsageError, NotFoundError."""
    path = getattr(args, "models_file", None) or os.environ.get("HFSHIP_MODELS_FILE")
    return read_models_file(Path(os.path.expanduser(path)), models_schema()) if path else None


def wishes_of(command: Command, model: ListedModel) -> Dict[str, Any]:
    """What a models file asks of a command for a model, as its arguments."""
    if command.name != "serve" and command.name not in MODEL_OPTIONS:
        return {}
    said = model.serve if command.name == "serve" else model.wishes
    actions = {key_name(action): action for action in file_options(command.name).values()}
    return {action.dest: option_key(action).read(said[key]) for key, action in actions.items() if key in said}


def runs_of(command: Command, context: Context, file: ModelsFile) -> Dict[str, Context]:
    """One run of the command for each model that the file lists, and one for the words it does not know, by name."""
    words, given = getattr(context.args, command.models), context.asked
    if context.args.models_file:
        chosen, others = chosen_models(file, words), []
    else:
        chosen = tuple(file.known[word] for word in words if word in file.known)
        others = [word for word in words if word not in file.known]
    runs: Dict[str, Context] = {}

    def add(label: str, model: ListedModel, words: Sequence[str], **more: Any) -> None:
        asked = {**more, **wishes_of(command, model), **given}
        args = argparse.Namespace(**{**vars(context.args), **asked, command.models: list(words)})
        listed = bool(model.name)  # what an earlier serve asked for beats what a file says of all models
        runs[label] = replace(context, args=args, asked=asked if listed else given, listed=listed)

    if command.name == "status" and chosen:
        add("status", chosen[0], [model.deployment for model in chosen])
    else:
        for model in chosen:
            word = model.deployment if command.name == "stop" else model.name
            more = {"name": model.name} if command.name == "fetch" else {}
            add(model.name, model, [model.repo if command.name == "fetch" else word], **more)
    if others or not chosen:
        add(", ".join(others), file.others, others)
    return runs


def run_models(command: Command, context: Context) -> Exit:
    """Run the command: once, or for each model of a models file. Raises UsageError where there is nothing to do."""
    file = context.file
    runs = runs_of(command, context, file) if file and command.models else {"": context}
    if len(runs) == 1:
        (only,) = runs.values()
        if command.models and not getattr(only.args, command.models) and command.name not in ("pack", "status"):
            what, why = f"nothing to {command.name}", "no name is given"
            raise UsageError(what, why, f"{examples_of(command.name)[0]}\nhfship {command.name} --help shows more")
        return command.run(only)
    single = {"--name": "name", "--port": "port", "--served-model-name": "served_names", "--alias": "aliases"}
    wrong = [option for option, dest in single.items() if dest in context.asked]
    if wrong:
        what = f"{wrong[0]} is for one model, not for {len(runs)}"
        raise UsageError(what, "", f"name one of: {', '.join(runs)}; or say it in {file.path if file else ''}")
    return run_list(command, runs, context.reporter)


def run_list(command: Command, runs: Mapping[str, Context], reporter: Reporter) -> Exit:
    """Run a command for each of a list, going on after failures; then one summary, and one JSON list of results."""
    codes: Dict[str, Exit] = {}
    reporter.gathered = gathered = []
    try:
        for name, context in runs.items():
            try:
                codes[name] = command.run(context)
            except (HfshipError, OSError, KeyboardInterrupt) as exc:
                error = told(exc)
                gathered.append({"name": name, **error_row(error)})
                if isinstance(error, Interrupted):
                    raise
                reporter.error(error)
                codes[name] = error.code
    finally:
        reporter.gathered = None
        if gathered and context.args.json:
            reporter.result_json(gathered)
    failed = sum(code != Exit.OK for code in codes.values())
    rows = [[f"  {name}", code.name.lower().replace("_", " ")] for name, code in codes.items()]
    said = f"{command.name}: {counted(len(runs), 'model')}, {len(runs) - failed} ok, {failed} failed"
    reporter.info(said + ("\n" + table(rows)) * bool(failed))
    return Exit.INCOMPLETE if failed else Exit.OK


def models_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models_file", nargs="?", metavar="FILE", help="models file (default: HFSHIP_MODELS_FILE)")
    add("--example", action="store_true", help="print a models file that shows every part, in TOML")
    add("--schema", action="store_true", help="print a JSON Schema of all keys, for editors")


def cmd_models(context: Context) -> Exit:
    """What a models file holds, after it was checked."""
    args, reporter = context.args, context.reporter
    if args.example or args.schema:
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **json_schema(models_schema())}
        reporter.result(MODELS_EXAMPLE.rstrip("\n") if args.example else json.dumps(schema, indent=2))
        return Exit.OK
    file = models_file(args)
    if not file:
        raise UsageError("no models file is named", "", "hfship models --example > models.toml")
    models = [{**asdict(model), "deployment": model.deployment} for model in file.models]
    header = ("name", "repo", "revision", "serve")
    served = [" ".join(f"{k}={json.dumps(v)}" for k, v in m.serve.items()) for m in file.models]
    rows = [[m.name, m.repo or "-", m.wishes.get("revision", "-"), how] for m, how in zip(file.models, served)]
    text = table(rows, header) if rows else f"{file.path} lists no model"
    value = {"path": str(file.path), "defaults": file.defaults, "models": models}
    reporter.result_of("\n".join(line[: reporter.width] for line in text.splitlines()), value)
    return Exit.OK


# ---- clean ---------------------------------------------------------------------------


def clean_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="*", metavar="DIR", help="folder of models or archives (default: both of ours)")
    add("--cache", action="store_true", help="also caches of hf: what is unfinished or unused, Xet chunks")
    add("--old-revisions", action="store_true", help="with --cache: also revisions without a ref")
    add("--older-than", type=_age, default=0, metavar="AGE", help="only what is older, like 12h or 7d")
    add("--dry-run", action="store_true", help="show what would go")
    add("-y", "--yes", action="store_true", help="do not ask")


def cmd_clean(context: Context) -> Exit:
    """Show what may go and why the rest stays, ask, remove."""
    args, reporter = context.args, context.reporter
    if args.old_revisions and not args.cache:
        raise UsageError("--old-revisions is for caches", "", "add --cache")
    if "" in args.folders:
        raise UsageError("the name of a folder is empty", "", "hfship clean DIR")
    own = [context.settings.models_dir, context.settings.package_dir]
    if args.cache:
        own += [hub_path(os.environ, "hub", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")]
        own += [hub_path(os.environ, "xet", "HF_XET_CACHE")]
    own, named = [Path(os.path.realpath(path)) for path in own], [Path(os.path.realpath(name)) for name in args.folders]
    folders = named or [path for path in own if path.is_dir()]
    removed: List[Leftover] = []
    with contextlib.ExitStack() as locks:
        rows, going = _leftovers_to_clean(folders, own, args, locks)
    shown, total = {item.path for item, _ in going}, freed_by([item for item, _ in going])
    failure: Dict[str, Any] = {}
    try:
        if not args.json:
            _show_leftovers(rows, total, context)
        if shown and not args.dry_run:
            if not args.yes:
                confirm(f"remove them and free {human_bytes(total)}?", reporter)
            with contextlib.ExitStack() as locks:  # looks again: somebody may have begun to work meanwhile
                going = [pair for pair in _leftovers_to_clean(folders, own, args, locks)[1] if pair[0].path in shown]
                for item, folder in going:
                    removed += [item] if remove_leftover(folder, item) else []
            remove_empty(going)
    except (HfshipError, KeyboardInterrupt) as exc:
        failure = error_row(told(exc))
        raise
    finally:
        if args.json:
            amounts = {"bytes": total, "removed": len(removed), "freed": freed_by(removed)}
            reporter.result_json({**failure, "schema": reporter.schema, "leftovers": rows, **amounts})
    if removed and not args.json:
        reporter.result(f"removed {counted(len(removed), 'file')}, freed {human_bytes(freed_by(removed))}")
    return Exit.OK


def remove_empty(gone: Sequence[Tuple[Leftover, Path]]) -> None:
    """Remove the folders below the one cleaned that are empty without these files."""
    for path, root in sorted({(path, root) for item, root in gone for path in item.path.parents}, reverse=True):
        with contextlib.suppress(OSError):  # not empty
            if root in path.parents:
                os.rmdir(path)
    for group in {item.group for item, root in gone if root in item.group.parents}:
        remove_if_empty(group)


def _leftovers_to_clean(
    folders: Sequence[Path], own: Sequence[Path], args: argparse.Namespace, locks: contextlib.ExitStack
) -> Tuple[List[Dict[str, Any]], List[Tuple[Leftover, Path]]]:
    """What was found, as rows of (group, what), and what of it may go, with its folder; its groups are locked."""
    groups: Dict[Tuple[Path, Path], List[Leftover]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise NotFoundError(f"there is no folder {folder}", "", "hfship clean DIR")
        for item in find_leftovers(folder, args.cache, args.old_revisions, own):
            if time.time() - item.status.st_mtime >= args.older_than:
                groups.setdefault((item.group, folder), []).append(item)
    names = {item.path.name for items in groups.values() for item in items}
    opened = open_files(names | {group.name + INCOMPLETE for group, _ in groups})
    rows: List[Dict[str, Any]] = []
    going: List[Tuple[Leftover, Path]] = []
    for (group, folder), items in sorted(groups.items()):
        kept = why_kept(group, items, opened, locks)
        going += [] if kept else [(item, folder) for item in items]
        for what in sorted({item.what for item in items}):
            some = [item for item in items if item.what == what]
            amounts = {"files": len(some), "bytes": sum(item.status.st_blocks * 512 for item in some)}
            paths = [str(item.path) for item in some]
            rows.append({"where": str(group), "what": what, **amounts, "kept": kept or None, "paths": paths})
    return rows, going


def _show_leftovers(rows: Sequence[Mapping[str, Any]], total: int, context: Context) -> None:
    lines = [[human_bytes(r["bytes"]), str(r["files"]), r["what"], r["where"]] for r in rows if not r["kept"]]
    for where, why in sorted({(r["where"], r["kept"]) for r in rows if r["kept"]}):
        context.reporter.info(f"kept: {where}: {why}")
    if lines:
        context.reporter.result(table(lines, ["size", "files", "what", "where"]))
    if context.args.dry_run or not lines:
        context.reporter.result(f"would free {human_bytes(total)}" if lines else "nothing to clean")


# ---- doctor --------------------------------------------------------------------------


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("repo", nargs="?", metavar="REPO[@REV]", help="prove access to it, and measure with its files")
    add("--endpoint", metavar="URL", help="Hub or mirror (default: HF_ENDPOINT or huggingface.co)")
    add("--mirror", action="append", default=[], metavar="URL", help="compare it with the Hub; repeatable")
    add("--offline", action="store_true", help="leave the network alone (also: HF_HUB_OFFLINE)")


def cmd_doctor(context: Context) -> Exit:
    """Probe the network in order, and at the same time this machine."""
    args, settings = context.args, context.settings
    offline = args.offline or truthy(os.environ.get("HF_HUB_OFFLINE"))
    here = [Examination("python", partial(examine_python, offline))]
    folders = dict.fromkeys([settings.models_dir, settings.package_dir])
    here += [Examination("disk", partial(examine_disk, folder)) for folder in folders]
    here += [Examination(name, partial(examine_program, name)) for name in PROGRAMS]
    hub = HubDoctor(settings, args.repo, args.mirror, Reporter("none", -1))
    found = [] if offline or sys.version_info < (3, 10) else list(hub.findings())
    found += [examination.result() for examination in here]
    steps = [f"next  {f.check}: {as_typed(f.next)}" for f in found if f.next]
    text = table([[f.state, f.check, f.text] for f in found])
    rows = [{**asdict(f), "next": as_typed(f.next)} for f in found]
    context.reporter.result_of("\n".join([text, *steps]), rows)
    return next((finding.exit_code for finding in found if finding.state == "fail"), Exit.OK)


# ---- version -------------------------------------------------------------------------

_SEAL = re.compile(rb"#!/usr/bin/env python3\n# sha256 of all bytes after this line: ([0-9a-f]{64})\n")


def entry_problems(path: Path) -> List[str]:
    """What differs between the entries of the hfship.pyz that runs and its build table; each is named.

    Every entry is read twice: by zipfile, which checks sizes and CRC, and by the loader that Python imports from, so
    that a file which shows one program to zip tools and another to Python does not pass.
    """
    import zipfile

    expected = {BUILD_TABLE: None, **own_build()["entries"]}
    problems = []
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        problems += [f"{name}: extra entry" for name in sorted(set(names) - set(expected))]
        problems += [f"{name}: there twice" for name in sorted(set(names)) if names.count(name) > 1]
        for name, digest in expected.items():
            if name not in names:
                problems.append(f"{name}: missing")
                continue
            try:
                contents = [archive.read(name), own_entry(name)]
            except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, IntegrityError) as exc:
                problems.append(f"{name}: {exc.why if isinstance(exc, IntegrityError) else exc}")
                continue
            if any(hashlib.sha256(content).hexdigest() != digest for content in contents) and digest:
                problems.append(f"{name}: changed")
    return problems


def verify_own_file(path: Path) -> str:
    """Prove that the hfship.pyz at `path`, the one that runs, is as it was built. Returns its SHA-256.

    The entries are proven by the build table, and every other byte (zip headers and directory, the table itself,
    anything put before or behind) by the seal in the second line. Whoever changes the file on purpose can change table
    and seal as well: against that only the published SHA-256 of the whole file helps.
    """
    import zipfile

    next_step = "copy it again, and compare its SHA-256 with the published one"
    content = path.read_bytes()
    try:
        problems = entry_problems(path)
    except (OSError, zipfile.BadZipFile, ValueError) as exc:
        problems = [f"zip directory: {exc}"]
    seal = _SEAL.match(content)
    if not problems and not (seal and hashlib.sha256(content[seal.end() :]).hexdigest() == seal[1].decode()):
        problems = ["zip headers, directory, or bytes before or behind the zip: changed"]
    if problems:
        raise IntegrityError(f"{path} is not as it was built", "\n".join(problems), next_step)
    return hashlib.sha256(content).hexdigest()


def version_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="prove that this file is as it was built")


def cmd_version(context: Context) -> Exit:
    """Version, Python, zstd backend, and with --verify the proof that this file is whole."""
    path = own_file()
    try:
        zstd = load_zstd()
        backend, origin = zstd.name, zstd.origin
    except HostError as exc:
        backend, origin = "none", f"{exc.what}: {exc.why}"
    facts = {
        "hfship": (__version__, str(path)),
        "python": (platform.python_version(), sys.executable),
        "zstd": (backend, origin),
    }
    if context.args.verify and path.name == Path(__file__).name:
        facts["verify"] = ("nothing to verify", "hfship.py runs from source")
    elif context.args.verify:
        facts["verify"] = ("as it was built", f"sha256 {verify_own_file(path)}")
    lines = [f"{name:<7} {what} ({where})".replace("\n", "; ") for name, (what, where) in facts.items()]
    value = {name: {"version": what, "origin": where} for name, (what, where) in facts.items()}
    context.reporter.result_of("\n".join(lines), value)
    return Exit.OK


# ---- completion ----------------------------------------------------------------------

SHELLS = ("bash", "zsh")


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="your shell")


def cmd_completion(context: Context) -> Exit:
    """Print what makes a shell complete hfship, as build_zipapp.py put it into hfship.pyz."""
    shell = context.args.shell
    try:
        script = own_entry(f"completion/{shell}").decode("utf-8")
    except OSError as exc:
        why = "they are made when hfship.pyz is built"
        raise HostError("hfship.py carries no completion scripts", why, "make build; dist/hfship.pyz has them") from exc
    context.reporter.result_of(script, {"shell": shell, "script": script})
    return Exit.OK


# ---- the table and main --------------------------------------------------------------

# In the order in which models go. Fields of a row: see Command.
COMMANDS: Tuple[Command, ...] = (
    Command("fetch", "download models from the Hub, resumable and verified", fetch_arguments, cmd_fetch, "repos", True),
    Command("pack", "pack models into NAME.tar.zst, whole or in parts", pack_arguments, cmd_pack, "models", True),
    Command("push", "copy archives to a host or medium, proven there", push_arguments, cmd_push, "archives", True),
    Command("verify", "prove archives and models; name what is damaged", verify_arguments, cmd_verify, "targets", True),
    Command("unpack", "restore models from archives, verified", unpack_arguments, cmd_unpack, "archives", True),
    Command("serve", "start vLLM in docker, and wait until it answers", serve_arguments, cmd_serve, "names", True),
    Command(
        "status", "ask deployments whether they answer; exits with 0, 3 or 9", names_arguments, cmd_status, "names"
    ),
    Command("stop", "stop deployments and jobs; their files stay", stop_arguments, cmd_stop, "names"),
    Command("logs", "show the log of a deployment or job", logs_arguments, cmd_logs),
    Command("watch", "show jobs live; resume them after a reboot", watch_arguments, cmd_watch),
    Command("models", "check and list a models file, or print an example", models_arguments, cmd_models),
    Command("mirror", "serve a folder of models as a private, read-only Hub", mirror_arguments, cmd_mirror),
    Command("clean", "remove what killed downloads, packs and pushes left", clean_arguments, cmd_clean),
    Command("doctor", "say what this machine and its network can do", doctor_arguments, cmd_doctor),
    Command("completion", "print what makes bash or zsh complete hfship", completion_arguments, cmd_completion),
    Command("version", "print the version; --verify proves this file", version_arguments, cmd_version),
)

# What --help says above a command, and below all of them.
GROUPS = {"fetch": "connected side", "verify": "offline side", "watch": "both sides"}
EXIT_CODES = """\
exit codes:
    0  ok
    2  the command line or a models file is wrong
    3  incomplete, or still loading: the same command goes on
    4  the token is missing, wrong, or has no access
    5  not found
    6  integrity: bytes are not what they must be
    7  the disk is full, or refuses
    8  the network failed for too long
    9  this machine cannot do it: docker, GPU, image, memory
  130  interrupted: the same command goes on
"""

# Each command shows its own lines.
EXAMPLES = """\
hfship fetch Qwen/Qwen3-8B
hfship fetch org/name@v1.0 --exclude 'onnx/' -o /mnt/disk
hfship fetch --models models.toml
hfship fetch Qwen/Qwen3-8B --background     # prints the name of the job: fetch-Qwen3-8B
hfship pack Qwen3-8B
hfship pack Qwen3-8B --split fat32 -o /media/usb
hfship pack Qwen3-8B --since /media/old/Qwen3-8B.tar.zst     # only what is new since then
hfship push Qwen3-8B ops@gpu1:/data/transfer
hfship push Qwen3-8B /media/usb
hfship push Qwen3-8B.tar.zst.0001 ops@gpu1:transfer --port 2222 --identity ~/.ssh/site --bwlimit 50M
hfship verify /media/usb/Qwen3-8B.tar.zst.0001
hfship verify /data/models/huggingface/Qwen3-8B
hfship unpack /data/transfer/Qwen3-8B.tar.zst
hfship unpack Qwen3-8B -o /data/models/huggingface
hfship unpack - < Qwen3-8B.tar.zst     # or: cat Qwen3-8B.tar.zst.0* | ssh HOST hfship unpack -
hfship serve Qwen3-8B
hfship serve Qwen3-8B --plan --assume-gpus 2xH100
hfship serve Llama-3.1-70B --gpus 0,1 --max-model-len 32768 -- --enable-auto-tool-choice
hfship serve --models models.toml
hfship status     # exit code: 0 all healthy, 3 one is loading or degraded, 9 one is down or unknown
hfship status Qwen3-8B --json
hfship stop Qwen3-8B
hfship stop Qwen3-8B --remove
hfship stop fetch-Qwen3-8B     # a job
hfship logs Qwen3-8B --tail 100
hfship logs -f fetch-Qwen3-8B
hfship watch
hfship watch --json --interval 5
hfship watch --resume-all
hfship watch --install
hfship models --example > models.toml
hfship models models.toml
hfship mirror /data/models/huggingface --host 0.0.0.0     # then: HF_ENDPOINT=http://HOST:8090 hf download ORG/NAME
hfship clean
hfship clean --cache --older-than 7d --dry-run
hfship clean --yes /data/models/huggingface
hfship doctor
hfship doctor meta-llama/Llama-3.1-8B --mirror https://hf-mirror.com
hfship completion bash > ~/.hfship-completion    # then in ~/.bashrc: source ~/.hfship-completion
hfship completion zsh > ~/.zfunc/_hfship         # with fpath+=(~/.zfunc) before compinit in ~/.zshrc
hfship version
hfship version --verify
"""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command takes."""
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="warnings and errors only")
    group.add_argument("-v", "--verbose", action="store_true", help="say more")
    group.add_argument("--json", action="store_true", help="results as JSON on stdout")
    choices, how = ("auto", "bar", "plain", "json", "none"), "how progress is shown (default: %(default)s)"
    group.add_argument("--progress", choices=choices, default="auto", help=how)
    logs = "records and logs of jobs (default: HFSHIP_LOG_DIR, ~/logs/hfship)"
    group.add_argument("--log-dir", metavar="DIR", help=logs)
    group.add_argument("--log-file", type=Path, metavar="FILE", help="also write a log there")
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="of logs (default: %(default)s)")


def examples_of(command: str) -> List[str]:
    """The lines of EXAMPLES for a command."""
    return [line for line in EXAMPLES.splitlines() if line.split()[1] == command]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are told like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "", f"{self.prog} --help")


class _CommandParser(_Parser):
    """Takes names and options in any order; argparse alone refuses `push NAME -p 22 HOST:DIR`."""

    _within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._within or "--" in (args or []):  # parse_known_intermixed_args calls us, and knows no "--"
            return super().parse_known_args(args, namespace)
        self._within = True
        return self.parse_known_intermixed_args(args, namespace)


class _AllParser(_Parser):
    """The parser of all commands, whose help argparse would print as one list."""

    def format_help(self) -> str:
        lines = [self.format_usage(), "Carry Hugging Face models across an air gap and put them into service."]
        for command in COMMANDS:
            lines += [f"\n{GROUPS[command.name]}:"] if command.name in GROUPS else []
            lines.append(f"  {command.name:<10}  {command.summary}")
        return "\n".join([*lines, f"\n{self.prog} COMMAND --help shows options and examples.\n", EXIT_CODES])


def build_parser(defaults: bool = True) -> argparse.ArgumentParser:
    """The argument parser, made from COMMANDS. Without defaults, its results hold what was given and no more."""
    parser = _AllParser(prog=program_name())
    parser.add_argument("--version", action="version", version=f"hfship {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser)
    for command in COMMANDS:
        examples = map(as_typed, examples_of(command.name))
        sub = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="\n  ".join(["examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
        if command.models:
            listed = "do it for all models of this file, or for those that are named"
            sub.add_argument("--models", dest="models_file", metavar="FILE", help=listed)
        if command.job:
            sub.add_argument("--background", action="store_true", help="go on without this terminal; watch shows it")
        add_common_arguments(sub)
        for action in [] if defaults else sub._actions:
            action.default = argparse.SUPPRESS
    return parser


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the end of the terminal: like Ctrl-C, but nobody wanted this job stopped."""


def _terminate(*_: object) -> NoReturn:
    """SIGTERM and SIGHUP end like Ctrl-C: state saved, exit code 130."""
    raise Terminated


def with_passed_on(words: Sequence[str]) -> Sequence[str]:
    """What follows `--` is for vLLM. argparse cannot tell it from our own, so it becomes --extra-arg.

    >>> with_passed_on(["serve", "M", "--", "--enforce-eager"])
    ['serve', 'M', '--extra-arg=--enforce-eager']
    """
    if "--" not in words or words[0] != "serve":
        return words
    at = list(words).index("--")
    return [*words[:at], *(f"--extra-arg={word}" for word in words[at + 1 :])]


def parse_words(words: Sequence[str]) -> Tuple[argparse.Namespace, Dict[str, Any]]:
    """The arguments, and those of them that were given. Raises UsageError where argparse would not help."""
    names = [command.name for command in COMMANDS]
    if not words or not words[0].startswith("-") and words[0] not in names:
        what = f"there is no command {words[0]}{nearest(words[0], names)}" if words else "no command given"
        known = textwrap.fill("the commands are: " + ", ".join(names), 70)
        raise UsageError(what, known, "hfship --help")
    words = with_passed_on(words)
    parser = build_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
        close = nearest(unknown[0], commands[args.command]._option_string_actions)
        raise UsageError(f"{args.command} does not know {unknown[0]}{close}", "", f"hfship {args.command} --help")
    return args, vars(build_parser(defaults=False).parse_args(words))


def guarded(reporter: Reporter, work: Callable[[], int]) -> Tuple[int, str]:
    """The exit code of `work`, and the state of a job that ends so; the only place where errors become exit codes."""
    try:
        code = int(work())
        return code, "failed" if code else "done"
    except BrokenPipeError:  # the reader (head, less) of what we only show went away
        silence(1)
        return int(Exit.OK), "done"
    except (HfshipError, OSError, KeyboardInterrupt) as exc:
        error = told(exc)
        reporter.failed(error)
        by_hand = "stopped" if isinstance(exc, KeyboardInterrupt) else "failed"
        return int(error.code), "interrupted" if isinstance(exc, Terminated) else by_hand


def run_job(command: Command, context: Context, words: Sequence[str]) -> int:
    """Run a command with a record and a log of its own; with --background in a process that outlives us."""
    args, reporter, folder = context.args, context.reporter, context.settings.log_dir
    pid, pipe = 0, -1
    if args.background:
        pid, pipe = detach(folder)
        if pid:
            return tell_job(context, pid, *await_job(pid, pipe))
        reporter.progress = "json" if reporter.progress == "json" else "none"
    name = job_name(command.name, [args.name] if getattr(args, "name", None) else getattr(args, command.models))
    record = new_record(name, words, args.background, os.environ)
    keeper = JobKeeper(reporter, folder, record, args.log_format, pipe)

    def work() -> int:
        try:
            return run_models(command, context)
        except InUseError as exc:
            raise with_job(exc, read_jobs([folder]), name) from exc

    code, state = 1, "failed"
    try:
        code, state = guarded(reporter, work)
    except BaseException as exc:
        reporter.log("error", f"bug: {type(exc).__name__}: {exc}")
        raise
    finally:
        keeper.end(code, state)
    return code


def tell_job(context: Context, pid: int, said: str, code: int) -> int:
    """Say the name of the job that goes on without us; what went wrong before, it has said itself, but as JSON."""
    if code:
        if context.args.json:
            row = json.loads(said) if said.startswith("{") else error_row(Interrupted("interrupted"))
            context.reporter.result_json({**row, "exit_code": code})
        return code
    log = context.settings.log_dir / f"{said}.log"
    if context.args.json:
        context.reporter.result_json({"schema": "hfship-background/1", "job": said, "pid": pid, "log": str(log)})
    else:
        context.reporter.info(as_typed(f"goes on in the background; hfship watch shows it, its log is {log}"))
        context.reporter.result(said)
    return code


def run_line(words: Sequence[str], reporter: Reporter) -> int:
    """Parse a command line, resolve the settings, open the log that was asked for, and run the command."""
    reporter.as_json = "--json" in words  # also for what is wrong with the words
    args, given = parse_words(words)
    reporter.adjust(args.progress, args.verbose - args.quiet, args.json)
    reporter.schema = f"hfship-{args.command}/1"
    command = next(row for row in COMMANDS if row.name == args.command)
    file = None if command.name in ("models", "version") else models_file(args)
    settings = load_settings(os.environ, getattr(args, "endpoint", None), file)
    if args.log_dir:
        settings = replace(settings, log_dir=Path(args.log_dir).expanduser().absolute())
    if args.log_file:
        try:
            reporter.open_log(args.log_file, args.log_format)
        except OSError as exc:
            raise disk_error(exc, "write the log", args.log_file, "give --log-file another FILE") from exc
    context = Context(args, settings, reporter, given, file)
    only_shows = getattr(args, "dry_run", False) or getattr(args, "plan", False)
    if not command.job or only_shows and not args.background:
        return run_models(command, context)
    if only_shows:
        raise UsageError("--background is for work", "nothing would be seen of what is shown", "leave it out")
    return run_job(command, context, words)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command."""
    words, reporter = list(sys.argv[1:] if argv is None else argv), Reporter()
    sys.excepthook = reporter.bug
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
            signal.signal(signum, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # so far there was nothing to save
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return guarded(reporter, lambda: run_line(words, reporter))[0]


if __name__ == "__main__":
    sys.exit(main())
