#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""hfship: carry Hugging Face models across an air gap and put them into service, as one file.

    connected side                        medium                 offline side
    Hub - fetch -> model dir - pack -> NAME.tar.zst (parts) -> verify - unpack -> model dir - serve -> vLLM
                   + manifest          + .sha256 + hfship.pyz                     + manifest

The promise: what the GPU reads is bit for bit what the Hub published, proven at every hop by the SHA-256 that the
Hub itself gives, and every step can be killed at any instant and run again.

Contents, in the order in which data flows; each section uses only those above it:

     1  errors and exit codes      what, why, next step
     2  reporting                  the one Reporter: log, progress, JSON events, redaction
     3  settings                   flags > environment > defaults
     4  files and processes        atomic write, lock, room on the target, hashing, running other programs
     5  manifest                   the contract that travels with a model
     6  hub                        Hub API client
     7  download                   ranges, workers, resume journal, verification
     8  frames                     zstd backends, independent frames, seek table, parts, byte planes
     9  pack                       tar stream -> frames -> parts, sidecars, deltas
    10  unpack                     verify, locate damage, repair, parallel restore, resume
    11  signatures                 who vouches for a model: OpenSSF model signing, through openssl
    12  images                     (reserved)
    13  model facts                config.json + safetensors headers -> what serving needs to know
    14  plan                       facts + host -> image, GPUs, tensor parallel size, context length
    15  deployment files           plan -> text of .env and docker-compose.yml
    16  docker                     compose up and down, readiness, status
    17  mirror                     read-only Hub API over a models folder
    18  jobs                       (reserved)
    19  command line               argparse tables, thin cmd_* functions, main()
"""

from __future__ import annotations

import argparse
import base64
import calendar
import contextlib
import errno
import fcntl
import hashlib
import importlib
import importlib.machinery
import io
import json
import os
import platform
import random
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import weakref
import zlib
from bisect import bisect_left
from collections import deque
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from enum import IntEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
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


def program_name() -> str:
    """How this program was called: `hfship`, or `python3 hfship.pyz` for one who has only the file."""
    called = sys.argv[0]
    return f"python3 {shlex.quote(called)}" if called.endswith(".pyz") else "hfship"


def as_typed(text: str) -> str:
    """`text` with its hfship commands written as they must be typed here."""
    return re.sub(r"\bhfship (?=[a-z]+( |$))", lambda _: program_name() + " ", text)


def command_line(*words: object) -> str:
    """A command that can be pasted into a shell, whatever its words hold.

    >>> command_line("hfship", "verify", Path("/mnt/my disk/m.tar.zst"))
    "hfship verify '/mnt/my disk/m.tar.zst'"
    """
    return " ".join(shlex.quote(str(word)) for word in words)


class UsageError(HfshipError):
    """The command line or a settings file is wrong."""

    code = Exit.USAGE


class IncompleteError(HfshipError):
    """Stopped before the end with the state saved: the same command goes on."""

    code = Exit.INCOMPLETE


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
# ======================================================================================

PLAIN_INTERVAL_S = 10.0  # one progress line per interval where there is no terminal
BAR_INTERVAL_S = 0.25

_SECRET_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{6,}"), "hf_***"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"), "sk-***"),
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
    for secret in secrets:
        text = text.replace(secret, "***")
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


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
    """Columns padded to their widest cell; numbers (cells that start with a digit) are aligned right.

    >>> print(table([["a", "1 B"], ["long", "10 B"]], ["name", "size"]))
    name  size
    a      1 B
    long  10 B
    """
    cells = [list(header)] * bool(header) + [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    lines = []
    for row in cells:
        padded = [c.rjust(w) if c[:1].isdigit() else c.ljust(w) for c, w in zip(row, widths)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


class Stage:
    """Progress of one step (fetching, packing, ...). `add` may be called from any thread."""

    def __init__(self, reporter: Reporter, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.started = time.monotonic()
        self.skipped = 0
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

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return (self.done - self.skipped) / max(self.seconds, 1e-6)

    def __enter__(self) -> Stage:
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._ticker.join()

    def _tick(self) -> None:
        render = self._reporter.progress_renderer(self)
        while not self._stop.wait(render.interval_s):
            render.update(final=False)
        render.update(final=True)

    def line(self) -> str:
        """The progress as one plain line."""
        share = f"{100 * self.done / self.total:3.0f} %" if self.total else "100 %"
        if self.unit != "B":
            return f"{self.name}: {share}  {self.done}/{self.total} {self.unit}"
        left = (self.total - self.done) / self.rate if self.rate > 0 else 0
        eta = f", {human_seconds(left)} left" if 0 < self.done < self.total else ""
        amounts = f"{human_bytes(self.done)} of {human_bytes(self.total)}"
        return f"{self.name}: {share}  {amounts}  {human_bytes(self.rate)}/s{eta}"


class _NoProgress:
    """Renders nothing: progress is not wanted, or there is nothing to do."""

    interval_s = 60.0

    def update(self, final: bool) -> None:
        pass


class _PlainProgress:
    """One line per interval: readable in logs and pipes. Stages that end before the first line print none."""

    interval_s = PLAIN_INTERVAL_S

    def __init__(self, reporter: Reporter, stage: Stage) -> None:
        self._reporter, self._stage = reporter, stage

    def update(self, final: bool) -> None:
        if not final or self._stage.seconds > self.interval_s:
            self._reporter.info(self._stage.line())


class _JsonProgress:
    """One JSON event per second."""

    interval_s = 1.0

    def __init__(self, reporter: Reporter, stage: Stage) -> None:
        self._reporter, self._stage = reporter, stage

    def update(self, final: bool) -> None:
        s = self._stage
        fields = {"stage": s.name, "done": s.done, "total": s.total, "unit": s.unit, "rate": round(s.rate)}
        self._reporter.event("progress", final=final, **fields)


class _BarProgress:
    """A tqdm bar."""

    interval_s = BAR_INTERVAL_S

    def __init__(self, reporter: Reporter, stage: Stage, tqdm: Any) -> None:
        self._reporter, self._stage = reporter, stage
        bytes_bar = {"unit": "B", "unit_scale": True, "unit_divisor": 1000}
        options = bytes_bar if stage.unit == "B" else {"unit": " " + stage.unit}
        self._bar = tqdm(
            total=stage.total, desc=stage.name, file=reporter.err, dynamic_ncols=True, mininterval=0, **options
        )
        reporter.bar = self._bar

    def update(self, final: bool) -> None:
        with self._reporter.lock:
            self._bar.total, self._bar.initial = self._stage.total, self._stage.skipped
            self._bar.update(self._stage.done - self._bar.n)
            if final:
                self._bar.close()
                self._reporter.bar = None


_Progress = Union[_NoProgress, _PlainProgress, _JsonProgress, _BarProgress]


def silence_stdout() -> None:
    """Drop what is buffered for a stdout that takes no more: Python would end with an error of its own over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Reporter:
    """Everything hfship says: results to `out`, the rest to `err`, all of it redacted.

    progress: "auto" (bar on a terminal, plain lines elsewhere), "bar", "plain", "json" or "none".
    verbosity: -1 errors and warnings only, 0 normal, 1 details.
    """

    def __init__(
        self,
        progress: str = "auto",
        verbosity: int = 0,
        out: Optional[IO[str]] = None,
        err: Optional[IO[str]] = None,
        log: Optional[IO[str]] = None,
    ) -> None:
        closed = io.StringIO()  # what is said into a stream that the caller closed
        self.out = out or sys.stdout or closed
        self.err = err or sys.stderr or closed
        self.log = log
        self.verbosity = verbosity
        self.progress = ("bar" if self.err.isatty() else "plain") if progress == "auto" else progress
        self.lock = threading.RLock()
        self.bar: Any = None
        self._counting = False  # a countdown stands on the terminal's last line
        self._secrets: Set[str] = set()

    def hide(self, secret: str) -> None:
        """Register a secret: it is replaced by *** in everything said from now on."""
        if secret:
            self._secrets.add(secret)

    def result(self, text: str) -> None:
        """A result of the command, to stdout."""
        try:
            with self.lock:
                self.out.write(redact(text, self._secrets) + "\n")
                self.out.flush()
        except BrokenPipeError:
            raise
        except OSError as exc:
            silence_stdout()
            step = "the work is done; run the same command again to see its result"
            raise DiskError(f"cannot write the result: {exc.strerror}", "", step) from exc

    def result_json(self, value: object) -> None:
        """A machine-readable result, to stdout."""
        self.result(json.dumps(value, indent=2, ensure_ascii=False))

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
        if self.progress == "json":
            fields = {
                "what": error.what,
                "why": error.why,
                "next": as_typed(error.next_step),
                "exit_code": int(error.code),
            }
            self.event("error", **fields)
        else:
            self._say("error", error.text())

    def event(self, kind: str, **fields: object) -> None:
        """One JSON line to stderr, where --progress json asked for events."""
        if self.progress == "json":
            clean = {k: redact(v, self._secrets) if isinstance(v, str) else v for k, v in fields.items()}
            self._write(json.dumps({"event": kind, **clean}, ensure_ascii=False))

    def countdown(self, seconds: float) -> None:
        """Show how long is still to be waited; called once a second, and with 0 at the end."""
        left = round(seconds)
        if self.progress == "json":
            self.event("waiting", seconds=left)
        elif self.progress == "plain" and left and left % PLAIN_INTERVAL_S == 0:
            self.info(f"still waiting, {left} s left")
        elif self.progress == "bar" and self.verbosity >= 0:
            text = f"waiting {left} s" if left else ""
            with self.lock:
                if self.bar is not None:
                    self.bar.set_postfix_str(text)
                else:
                    self._counting = bool(text)
                    self.err.write(f"\r\033[K{text}")
                    self.err.flush()

    def stage(self, name: str, total: int, unit: str = "B") -> Stage:
        """A step with progress; use as a context manager."""
        return Stage(self, name, total, unit)

    def progress_renderer(self, stage: Stage) -> _Progress:
        """How this reporter shows a stage."""
        if self.verbosity < 0 or self.progress == "none" or not stage.total:
            return _NoProgress()
        if self.progress == "json":
            return _JsonProgress(self, stage)
        if self.progress == "bar":
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                return _BarProgress(self, stage, tqdm)
        return _PlainProgress(self, stage)

    def _say(self, level: str, text: str) -> None:
        clean = redact(text, self._secrets)
        if self.progress == "json":
            self._write(json.dumps({"event": "log", "level": level, "text": clean}, ensure_ascii=False))
        else:
            self._write(clean)
        if self.log:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.log.write(f"{stamp} {level.upper():<7} {clean}\n")
            self.log.flush()

    def _write(self, line: str) -> None:
        with self.lock:
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
# Owns where things are and who we are: flags > HFSHIP_*/HF_* environment > defaults. Pure, but for reading the token.
# ======================================================================================

DEFAULT_ENDPOINT = "https://huggingface.co"

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


def load_settings(env: Mapping[str, str], endpoint: Optional[str] = None) -> Settings:
    """Settings from flags (given), environment and defaults. `~` and `$VAR` in paths are expanded."""
    folders = {
        name: Path(os.path.expanduser(os.path.expandvars(env.get(variable) or default)))
        for name, (variable, default) in FOLDERS.items()
    }
    url = (endpoint or env.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    if not re.match(r"https?://[^/]+", url):
        raise UsageError(
            f"endpoint {url!r} is not an http(s) URL", "", "give --endpoint https://HOST or set HF_ENDPOINT"
        )
    return Settings(endpoint=url, **folders)


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
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
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
FALLOCATE_FILESYSTEMS = frozenset({"ext4", "xfs", "btrfs", "tmpfs", "overlay", "f2fs"})

WORK_DIR = ".hfship"  # our folder inside a model folder
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
    """Bytes that this user may still write at `path`, which need not exist yet."""
    stat = os.statvfs(existing_ancestor(path))
    return stat.f_bavail * stat.f_frsize


def require_room(folder: Path, total: int, largest: int, what: str, next_step: str) -> None:
    """Refuse before the first byte when `total` bytes, or a file of `largest` bytes, do not fit at `folder`.

    Raises DiskError.
    """
    limit = filesystem_of(folder).max_file_size
    if limit is not None and largest > limit:
        why = (
            f"the filesystem at {folder} takes files up to {human_bytes(limit)}, the largest has {human_bytes(largest)}"
        )
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
    step = (
        "choose another folder (-o DIR), or fix this one" if access else "free space, then run the same command again"
    )
    return DiskError(f"cannot {doing} {path}: {reason}", "", next_step or step)


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, content: Union[str, bytes], mode: int = 0o644, durable: bool = True) -> None:
    """Write a small file so that it is there complete or not at all; with `durable` also across a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        try:
            os.fchmod(fd, mode)
            write_all(fd, data)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        if durable:
            fsync_dir(path.parent)
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
    """Create a folder and its parents; a refusal becomes a DiskError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
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
    """When a process of this machine started (clock ticks since boot); "" when there is none (proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


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

    def _read_lease(self) -> Dict[str, Any]:
        try:
            value = json.loads(self._lease.read_bytes())
            return value if isinstance(value, dict) else {}
        except (OSError, ValueError):
            return {}

    def _take_lease(self) -> None:
        """Write our lease, over one that is over. Raises IncompleteError."""
        with contextlib.suppress(FileExistsError):
            fd = os.open(self._lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(fd, "w") as stream:
                stream.write(self._owner)
            return
        owner = self._read_lease()
        if owner.get("host") == socket.gethostname():
            same_boot = owner.get("boot_id") == boot_id()
            if same_boot and owner.get("start") and process_start(int(owner.get("pid", 0))) == owner["start"]:
                raise self._in_use(owner)
        else:
            os.utime(self._path)  # the file server's clock, not ours, wrote the time of the lease
            if self._path.stat().st_mtime - self._lease.stat().st_mtime < LEASE_EXPIRY_S:
                raise self._in_use(owner)
            self.doubtful = True
        atomic_write(self._lease, self._owner, durable=False)

    def _in_use(self, owner: Mapping[str, Any]) -> IncompleteError:
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} holds {self._path}"
        step = f"wait for it, or stop it; a host that is gone is forgotten after {LEASE_EXPIRY_S:.0f} s"
        return IncompleteError(f"{self.folder} is in use by another hfship", who, step)

    def _beat(self) -> None:
        while not self._released.wait(LEASE_BEAT_S):
            if self._read_lease() != json.loads(self._owner):
                self._on_loss()
                return
            with contextlib.suppress(OSError):
                os.utime(self._lease)


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


def run_program(
    argv: Sequence[str],
    stdin: Union[str, bytes, None] = None,
    env: Optional[Mapping[str, str]] = None,
    cwd: Optional[Path] = None,
    timeout_s: Optional[float] = None,
) -> Completed:
    """Run another program to its end and keep its output. The only use of subprocess outside docker's log stream.

    `env` is added to our own environment. Raises HostError when the program is missing or takes longer than
    `timeout_s`; a non-zero exit status is the caller's to judge.
    """
    data = stdin.encode() if isinstance(stdin, str) else stdin
    try:
        done = subprocess.run(
            list(argv),
            input=data if data is not None else b"",
            capture_output=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as exc:
        raise HostError(
            f"{argv[0]} is not installed", f"{argv[0]} was not found on PATH", f"install {argv[0]}"
        ) from exc
    except PermissionError as exc:
        raise HostError(f"{argv[0]} cannot be run", str(exc), f"check the permissions of {argv[0]}") from exc
    except subprocess.TimeoutExpired as exc:
        raise HostError(
            f"{argv[0]} did not answer", f"no end within {timeout_s:.0f} s", f"run {argv[0]} by hand"
        ) from exc
    return Completed(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


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
# `source` is null when the folder did not come through `fetch`: then nobody but the packer vouches for the bytes.
# ======================================================================================

MANIFEST_FORMAT = "hfship-manifest/1"
MANIFEST_PATH = f"{WORK_DIR}/manifest.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
_SHA256 = re.compile(r"[0-9a-f]{64}$")
# Never part of a model: our own state, huggingface_hub's, version control, unfinished files.
_NOT_CONTENT = re.compile(r"(^|/)(\.hfship|\.git|\.cache/huggingface)(/|$)|\.incomplete$|(^|/)\.DS_Store$")


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

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> str:
        """The canonical text: equal manifests have equal bytes."""
        value = {
            "format": MANIFEST_FORMAT,
            "name": self.name,
            "source": vars(self.source) if self.source else None,
            "files": [vars(entry) for entry in self.files],
            "totals": {"files": len(self.files), "bytes": self.size},
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
    except (ValueError, KeyError, TypeError, UsageError) as exc:
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
    return make_manifest(str(value["name"]), files, source)


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
    for root, folders, names in os.walk(folder):
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
URL_RENEWAL_S = 120.0  # a signed URL is renewed when it has less than this left

_COMMIT = re.compile(r"[0-9a-f]{40}$")
# A page of the Hub: .../ORG/NAME, .../datasets/ORG/NAME, .../ORG/NAME/tree/REVISION/FOLDER, .../blob/REVISION/FILE
_PAGE = re.compile(
    r"/(?:models/)?(?P<type>datasets/|spaces/)?(?P<repo>[^/@]+(?:/(?!(?:tree|blob|resolve|raw)/)[^/@]+)?)"
    r"(?:/(?P<kind>tree|blob|resolve|raw)/(?P<revision>refs/[^/]+/[^/]+|[^/]+)(?:/(?P<path>.+?))?)?/?$"
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", re.ASCII)
REPO_TYPES = ("model", "dataset", "space")


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
    if not _REPO_ID.match(repo) or ".." in repo:
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


def origin(url: str) -> Tuple[str, str, int]:
    """(scheme, host, port) of a URL.

    >>> origin("https://Hub.example/x")
    ('https', 'hub.example', 443)
    """
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)


def redirect_target(url: str, location: str) -> str:
    """The absolute URL that a redirect leads to. Raises NetworkError when it would leave https."""
    target = urljoin(url, location)
    if url.startswith("https://") and not target.startswith("https://"):
        what = "the Hub redirects from https to an unencrypted address"
        raise NetworkError(what, f"{origin(url)[1]} -> {origin(target)[1]}", "check HF_ENDPOINT and the proxy")
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
    if retry_after.isdigit():
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
        return NotFoundError(
            f"{repo} has no revision {source.revision!r}", why, f"see the branches and tags at {page}/tree/main"
        )
    if code == "EntryNotFound" and not source.commit:
        return NotFoundError(f"no Hub answers at {source.endpoint}", why, "check --endpoint and HF_ENDPOINT")
    if code == "EntryNotFound":
        return NotFoundError(
            f"a file is missing in {repo}", why, "run the same command again: the listing is made anew"
        )
    if status in (401, 404):
        hint = "check the spelling" + ("" if token else "; if it is private, set HF_TOKEN")
        return NotFoundError(f"{repo} was not found on {source.endpoint}", why, hint)
    if status == 403:
        return AuthError(f"access to {repo} is forbidden", why, "check what the token may read")
    return NetworkError(f"the Hub answered with an error for {repo}", why, "run the same command again later")


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
    step = (
        f"{used} is in use: add your site's CA to {env[used]}" if used else "set SSL_CERT_FILE to your site's CA bundle"
    )
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


def import_requests() -> Any:
    """requests, imported only where the network is used. Raises HostError on a Python that is too old for it."""
    if sys.version_info < (3, 10):
        have = ".".join(map(str, sys.version_info[:2]))
        names = [f"python3.{minor}" for minor in range(20, 9, -1)]
        newer = next((name for name in names if shutil.which(name)), "a newer python3")
        step = command_line(newer, *sys.argv) if newer in names else f"run it with {newer}; none is on PATH"
        raise HostError("fetch needs Python 3.10 or newer", f"this is Python {have}", step)
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
        except (errors.RequestException, UnicodeError) as exc:  # requests decodes Location even when told to stay
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

    def _exchange(self, url: str) -> ApiAnswer:
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
                answer = self._exchange(url)
            except RetryableError as exc:
                failures += 1
                if failures >= RETRIES:
                    step = "check the network, the proxy and HF_ENDPOINT, then run the same command again"
                    raise NetworkError(f"{self.endpoint} cannot be reached", str(exc), step) from exc
                say = self.reporter.info if failures > 1 else self.reporter.detail
                say(f"{exc}; trying again ({failures} of {RETRIES - 1})")
                self._stop.wait(backoff(failures) if exc.wait_s is None else 0)
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
        except ValueError as exc:
            why = f"{urlsplit(url).path} answered {answer.headers.get('Content-Type', 'nothing')}, not JSON"
            step = "check HF_ENDPOINT; a proxy or login page may stand in between"
            raise NetworkError(f"{self.endpoint} does not answer like a Hub", why, step) from exc

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
        except (ValueError, KeyError, TypeError) as exc:
            what = f"the listing of {source.repo} cannot be used"
            raise IntegrityError(what, str(exc), f"tell the owner of {source.repo}") from exc
        return files


def _source_from_info(asked: Source, info: Any) -> Source:
    """The pinned source from the answer of /revision. Raises NetworkError for an answer that is not one."""
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str) or not _COMMIT.match(commit):
        raise NetworkError(
            f"{asked.endpoint} does not answer like a Hub", "no commit in its answer", "check HF_ENDPOINT"
        )
    card = info.get("cardData") or {}
    licenses = [t[len("license:") :] for t in info.get("tags") or [] if str(t).startswith("license:")]
    license_name = card.get("license") or (licenses[0] if licenses else None)
    return replace(
        asked,
        resolved_repo=str(info.get("id") or asked.repo),
        commit=commit,
        license=str(license_name) if license_name else None,
        gated=info.get("gated") or False,
    )


def _on_endpoint(url: Optional[str], endpoint: str) -> Optional[str]:
    """Mirrors copy the Hub's absolute `Link` addresses: keep the path, stay with the endpoint we were given.

    >>> _on_endpoint("https://huggingface.co/api/models/a/b/tree/x?cursor=1", "http://mirror:8090")
    'http://mirror:8090/api/models/a/b/tree/x?cursor=1'
    """
    if url is None:
        return None
    parts = urlsplit(urljoin(endpoint + "/", url))
    base = urlsplit(endpoint)
    return urlunsplit((base.scheme, base.netloc, parts.path, parts.query, ""))


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
HASH_STEP = 64 << 20  # bytes a hash thread takes from one file before it looks for another
HASH_THREADS = 2
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
    worker takes over the rear."""

    __slots__ = ("file", "position", "start", "stop")

    def __init__(self, file: int, start: int, stop: int) -> None:
        self.file, self.start, self.position, self.stop = file, start, start, stop

    @property
    def left(self) -> int:
        return self.stop - self.position


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

    def advance(self, flight: Flight, count: int) -> int:
        """`count` bytes at flight.position are written; returns how many of them were not there before."""
        have = self.have[flight.file]
        before, count = have.total, min(count, flight.left)  # nothing counts that was given away meanwhile
        have.add(flight.position, flight.position + count)
        flight.position += count
        return have.total - before

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

    def restart(self, file: int) -> int:
        """The bytes of this file are wrong: fetch all of it again. Returns how many they were; flights on their way
        bring nothing any more."""
        lost, self.have[file], self._gaps[file] = self.have[file].total, Intervals(), []
        for flight in self._flights:
            if flight.file == file:
                flight.stop = flight.position
        self._reopen(file, (0, self._sizes[file]))
        return lost

    def ranged(self, file: int) -> bool:
        return self._ranged[file]

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
        splittable = [f for f in self._flights if f.left >= 2 * MIN_STEAL and self._ranged[f.file]]
        if not splittable:
            return None
        victim = max(splittable, key=lambda f: f.left)
        middle = victim.stop - victim.left // 2
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


class FileAddress:
    """Where the bytes of one file are: the Hub's resolve address first, then the (signed) address it redirects to,
    which all ranges share until it expires or is refused. The Hub's quota counts resolves, not ranges. `endpoint` is
    the Hub or a mirror of it; a mirror that has not got the file is no reason to give up."""

    def __init__(self, client: HubClient, job: FileJob, endpoint: str) -> None:
        self._client, self._job = client, job
        self._source = replace(job.source, endpoint=endpoint)
        self._lock = threading.Lock()
        self._url: Optional[str] = None
        self._renew_at = float("inf")
        self._validator = ("", "")  # (address without its signature, ETag of the object there)
        self._changes = 0

    def open(self, start: int, stop: int) -> Any:
        """The response to a request for [start, stop), body unread. Raises RetryableError or HfshipError."""
        url = self._known()
        if url is None:
            with self._lock:
                url = self._known()
                if url is None:
                    return self._resolve(start, stop)
        response = self._get(url, start, stop)
        if response.status_code not in (200, 206):
            self._refused(response, url)
        return response

    def forget(self) -> None:
        """Resolve again before the next request."""
        self._url = None

    def locate(self) -> str:
        """The address that another program can fetch the file from, for as long as it is signed."""
        self.open(0, 1).close()
        return self._url or ""

    def _known(self) -> Optional[str]:
        return self._url if time.time() < self._renew_at else None

    def _get(self, url: str, start: int, stop: int) -> Any:
        place, etag = self._validator
        known = etag if place == url.partition("?")[0] and self._changes < MAX_CHANGES else ""
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
        self._validator = (url.partition("?")[0], etag)
        if known and etag != known:
            self._changes += 1
            response.close()
            self.forget()
            raise ObjectChanged(f"{origin(url)[1]} has another file there than before")
        if known and response.status_code == 200:
            self._changes = MAX_CHANGES  # it does not understand If-Range: ask without

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
        self._renew_at = float("inf") if expires is None else expires - min(URL_RENEWAL_S, (expires - now) / 10)
        self._url = url
        life = f", for {human_seconds(expires - now)}" if expires else ""
        self._client.reporter.detail(f"{self._job.remote.path}: comes from {urlsplit(url).netloc}{life}")

    def _refused(self, response: Any, url: str) -> NoReturn:
        """A final answer of the Hub ends the run; a refusal of a signed address asks for a new one."""
        self.forget()
        headers, status = response.headers, response.status_code
        at_source = origin(url) == origin(self._source.endpoint)
        body = _limited_body(response) if at_source else ""
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
        self._committed = False
        self._synced: List[Tuple[int, int]] = []
        self._published: List[Tuple[int, int]] = []

    def found(self) -> Intervals:
        """What an earlier run left. An unreadable or foreign journal counts as none: it only costs bandwidth."""
        remote = self.job.remote
        try:
            state = json.loads(self.job.journal.read_bytes())
            same = [state["format"], state["path"], state["size"], state["etag"]]
            if same != [PARTIAL_FORMAT, remote.path, remote.size, remote.etag]:
                return Intervals()
            if self.job.incomplete.lstat().st_size != remote.size:
                return Intervals()
            trusted = "written" if state["boot_id"] == boot_id() != "" else "synced"
            self._synced = [(int(start), int(stop)) for start, stop in state["synced"]]
            spans = [(int(start), int(stop)) for start, stop in state[trusted]]
        except (OSError, ValueError, KeyError, TypeError):
            return Intervals()
        return Intervals((max(0, start), min(stop, remote.size)) for start, stop in spans)

    def _descriptor(self) -> int:
        if self._fd >= 0:  # writers must not wait for the lock: it is held while the disk syncs
            return self._fd
        with self._lock:
            if self._fd < 0:
                try:
                    self.job.incomplete.parent.mkdir(parents=True, exist_ok=True)
                    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    self._fd = os.open(self.job.incomplete, flags, 0o666)
                    preallocate(self._fd, self.job.remote.size, self._filesystem)
                except OSError as exc:
                    raise disk_error(exc, "create", self.job.incomplete) from exc
            return self._fd

    def write(self, data: memoryview, offset: int) -> None:
        """Raises DiskError."""
        try:
            pwrite_all(self._descriptor(), data, offset)
        except OSError as exc:
            step = "free space, then run the same command again: what arrived is kept"
            raise disk_error(exc, "write", self.job.incomplete, step) from exc

    def publish(self, spans: List[Tuple[int, int]], sync: bool) -> None:
        """Write the journal: `spans` are in the file; with `sync` they are on the disk before the journal says so."""
        remote = self.job.remote
        with self._lock:
            unchanged = spans == (self._synced if sync else self._published)
            if unchanged or self._committed or self._fd < 0 or remote.size <= SMALL_FILE:
                return
            if sync:
                os.fdatasync(self._fd)
                self._synced = spans
            state = {"format": PARTIAL_FORMAT, "path": remote.path, "size": remote.size, "etag": remote.etag}
            state.update({"boot_id": boot_id(), "synced": self._synced, "written": spans})
            make_dir(self.job.journal.parent)
            atomic_write(self.job.journal, json.dumps(state), durable=sync)
            self._published = spans

    def hash_up_to(self, stop: int) -> None:
        """Let the hash follow to byte `stop`, from the page cache."""
        while self.hasher.position < stop:
            size = min(CHUNK, stop - self.hasher.position)
            piece = pread_exactly(self._descriptor(), size, self.hasher.position)
            if not piece:
                raise IntegrityError(
                    f"{self.job.incomplete} became shorter", "", "leave the folder alone while it is fetched"
                )
            self.hasher.update(piece)

    def start_over(self) -> None:
        """Forget everything that arrived."""
        self.hasher = FileHasher(self.job.remote)
        self._synced = []
        self.publish([], sync=False)

    def commit(self) -> os.stat_result:
        """The content is proven: give the file its name, durably. Returns its stat."""
        fd = self._descriptor()
        with self._lock:
            self._committed = True
            try:
                os.fsync(fd)
                stat = os.fstat(fd)
                os.close(fd)
                os.replace(self.job.incomplete, self.job.target)
                fsync_dir(self.job.target.parent)
                with contextlib.suppress(FileNotFoundError):
                    self.job.journal.unlink()
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
            for line in self._path.read_text(encoding="utf-8").splitlines():
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

    Threads: the workers fetch and write; hash threads follow the unbroken beginning of each file and finish it; one
    thread publishes journals and sets the number of workers that may work; the caller waits. All shared state is
    behind one condition variable.
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
        self._addresses: Dict[Tuple[int, int], FileAddress] = {}
        have = [partial.found() for partial in self._partials]
        self._scheduler = Scheduler([job.remote.size for job in jobs], have)
        self._changed = threading.Condition()
        # Files with something to hash or to publish; an empty file has nothing to fetch and is finished by its hash.
        self._open = {i for i, job in enumerate(jobs) if have[i].spans or job.remote.size == 0}
        self._hashing: Set[int] = set()
        self._finished = 0
        self._rejected: Dict[int, int] = {}
        self._failure: Optional[BaseException] = None
        self._count = ConnectionCount(transfer.workers)
        self._limit = transfer.connections or self._count.limit
        self._working: Set[int] = set()
        self._complained = 0.0
        self._rate = RateLimit(transfer.limit_bps, stop)
        self._speeds: Dict[int, float] = {}  # worker -> bytes per second of its connection
        self._evictions: Deque[float] = deque(maxlen=EVICTIONS_PER_MINUTE)
        stage.skip(sum(intervals.total for intervals in have))

    def run(self) -> None:
        """Fetch, verify and finish every file. Raises the first HfshipError of any thread, or KeyboardInterrupt;
        either way what arrived is kept for the next run."""
        for role in [self._hash] * HASH_THREADS + [self._keep_house]:
            threading.Thread(target=self._guard, args=(role,), daemon=True).start()
        try:
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
            threading.Thread(target=self._guard, args=(self._work, number), daemon=True).start()

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
        buffer = memoryview(bytearray(READ_SIZE))
        failures = 0
        while True:
            flight = self._next_flight(number)
            if flight is None:
                return
            with self._changed:
                place = self._sources.choose(flight.file)
            try:
                self._fetch(flight, place, number, buffer)
                failures = 0
            except RetryableError as exc:
                with self._changed:
                    self._sources.fault(place)
                failures = 1 if flight.position > flight.start else failures + 1
                if isinstance(exc, ObjectChanged):
                    self._fetch_anew(flight.file)
                self._after_failure(flight, failures, exc)
            except HfshipError:
                if place == self._sources.hub:
                    raise
                with self._changed:
                    self._sources.refuse(flight.file, place)
            finally:
                self._land(flight)

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

    def _fetch(self, flight: Flight, place: int, number: int, buffer: memoryview) -> None:
        """Bring one flight, or as much of it as comes. Raises RetryableError."""
        size, asked = self._jobs[flight.file].remote.size, flight.stop
        address = self._address(flight.file, place)
        response = address.open(flight.start, asked)
        keep = False
        try:
            if not check_range_answer(response.status_code, response.headers, flight.start, asked, size):
                self._take_whole(flight)
                asked = size
            self._stream(flight, response.raw, number, buffer)
            with self._changed:
                self._sources.success(flight.file, place)
            keep = flight.position == asked and not self._too_slow(number)
        except RetryableError:
            address.forget()
            raise
        finally:
            if keep:
                response.raw.release_conn()  # the body is read to its end: the connection can be used again
            else:
                response.close()

    def _address(self, file: int, place: int) -> FileAddress:
        new = FileAddress(self._client, self._jobs[file], self._endpoints[place])
        with self._changed:
            return self._addresses.setdefault((file, place), new)

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

    def _stream(self, flight: Flight, raw: Any, number: int, buffer: memoryview) -> None:
        """Read the body into the file until the flight's (moving) end, or until the connection proves slow or one too
        many: a server that punishes crowds does so for as long as they stay.

        The inner http.client response reads straight into our buffer, several times faster than urllib3's stream();
        it reports a connection closed early as a plain end, so the count decides.
        """
        partial, began, step = self._partials[flight.file], time.monotonic(), 16 << 10
        while flight.left > 0 and number < self._limit and not self._stop.is_set():
            try:
                count = raw._fp.readinto(buffer[: min(step, flight.left)])
            except (OSError, HTTPException, ValueError, AttributeError) as exc:
                raise RetryableError(f"the connection broke: {_root_cause(exc)}") from exc
            if not count:
                raise RetryableError(f"the connection ended {flight.left} bytes early")
            partial.write(buffer[:count], flight.position)
            with self._changed:
                new = self._scheduler.advance(flight, count)
            self._stage.add(new)
            self._rate.wait(count)
            seconds = max(time.monotonic() - began, 1e-3)
            speed = (flight.position - flight.start) / seconds
            step = int(min(READ_SIZE, max(16 << 10, speed / 50)))  # 20 ms worth: little is lost by a kill
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
        accept_file(partial)
        self._client.reporter.detail(f"{partial.job.remote.path}: verified, SHA-256 {partial.hasher.sha256}")
        with self._changed:
            self._open.discard(file)
            self._finished += 1

    def _fetch_anew(self, file: int) -> None:
        """What came of this file is of another object than what comes now."""
        with self._changed:
            self._changed.wait_for(lambda: file not in self._hashing or self._stop.is_set())
            self._hashing.add(file)
        self._throw_away(file)
        with self._changed:
            self._hashing.discard(file)
            self._changed.notify_all()

    def _throw_away(self, file: int) -> None:
        """Forget what came of a file, which nobody else hashes now, and hand all of it out again."""
        with self._changed:
            self._stage.add(-self._scheduler.restart(file))
        self._partials[file].start_over()

    def _reject(self, file: int) -> None:
        """The bytes are not what the Hub listed: fetch them again, from elsewhere if there is an elsewhere."""
        job = self._jobs[file]
        self._rejected[file] = self._rejected.get(file, 0) + 1
        with self._changed:
            banned = self._sources.bytes_were_wrong(file)
        for place in banned:
            self._client.reporter.warn(f"{self._endpoints[place]} sends wrong bytes and is not asked again")
        self._address(file, self._sources.choose(file)).forget()
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

    @property
    def jobs(self) -> List[FileJob]:
        missing = [file for file in self.wanted if file.path not in self.present]
        return [FileJob(file, self.snapshot.source, self.folder, self.log) for file in missing]


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
                os.replace(job.incomplete, job.target)
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
    log = VerifiedLog(folder)
    present = present_files(folder, wanted, log, reporter, request.rehash)
    what = f"{counted(len(wanted), 'file')} wanted, {len(present)} of them here and proven"
    reporter.detail(f"{snapshot.source.resolved_repo}: {snapshot.source.revision} is {snapshot.source.commit}; {what}")
    return FetchPlan(request.name, folder, snapshot, tuple(wanted), present, log)


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
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
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
#   zstd frame     RFC 8878, one frame, with content size and content checksum; at most 4 MiB of the tar stream
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
# and another where it ends: the frames of a weight depend on that weight alone. A reader takes the cut from the seek
# table and relies on no frame size.
#
# Planes: if restore.py, which is RESTORE_PY to the byte, is the second member, then every weight PATH is a member
# PATH.planes. It has a block for every 4 MiB of PATH, the last maybe shorter, and each block is a frame of its own:
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

FRAME_SIZE = 4 << 20  # bytes of content; larger gains < 0.01 % on weights, smaller costs seek table
MOST_JOBS = 16  # threads hold frames: more would need more than 300 MB
LARGEST_FRAME = 64 << 20  # content that a reader accepts in a frame: bounds its memory against a hostile table
WEIGHT_SIZE = 1 << 20  # files from here on have frames of their own
PLANES_BLOCK = 4 << 20  # bytes of a file in one block of planes; part of the format
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

# The second member of an archive with planes, for a far side without hfship. Part of the format: never changed.
RESTORE_PY = b'''\
"""Makes PATH of every PATH.planes, and proves all files: python3 NAME/.hfship/restore.py (needs Python 3, no more).

PATH.planes is a row of blocks, one for 4 MiB of PATH. A block is: for elements of 1, 2 or 4 bytes the last bytes of
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
        for block in blocks(path + ".planes", (4 << 20) + 1):
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

    The callables it makes hold library state: one per thread, never shared.
    """

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


class _Zstandard(Zstd):
    """The zstandard package, or its C backend alone."""

    def __init__(self, module: Any, origin: str) -> None:
        library = ".".join(map(str, module.ZSTD_VERSION))
        super().__init__(f"zstandard {module.__version__} (libzstd {library})", origin)
        self._module = module

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


class _StdlibZstd(Zstd):
    """compression.zstd of Python 3.14."""

    def __init__(self, module: Any) -> None:
        super().__init__(f"compression.zstd (libzstd {module.zstd_version})", "Python's standard library")
        self._module = module

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
    """A stretch of the tar stream: bytes known beforehand, or one whole file, maybe in planes. `what` names it."""

    start: int
    size: int
    what: str
    known: bytes = b""
    entry: Optional[FileEntry] = None
    planes: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.size

    def file_range(self, start: int, stop: int) -> Tuple[int, int]:
        """First byte and the one behind the last, in the file, of what stream [start, stop) holds of it.

        >>> weight = Segment(100, (6 << 20) + 2, "w", planes=True)
        >>> weight.file_range(100 + (4 << 20) + 1, 102 + (6 << 20)) == (4 << 20, 6 << 20)
        True
        """
        first, last = max(start, self.start) - self.start, min(stop, self.stop) - self.start
        return (_without_widths(first), _without_widths(last)) if self.planes else (first, last)


def _without_widths(offset: int) -> int:
    """Bytes of a file in the first `offset` bytes of its planes: each block has one more, its width, at its end."""
    blocks, rest = divmod(offset, PLANES_BLOCK + 1)
    return blocks * PLANES_BLOCK + max(rest - 1, 0)


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


class Index(NamedTuple):
    """What the check frame and the seek table tell: all frames in order, and the bytes of each part."""

    frames: Tuple[Frame, ...]
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


def stream_layout(manifest: Manifest, text: bytes, planes: bool = False, delta: bytes = b"") -> Tuple[Segment, ...]:
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

    def add(size: int, what: str, known: bytes = b"", entry: Optional[FileEntry] = None, planes: bool = False) -> None:
        if size or entry:
            segments.append(Segment(segments[-1].stop if segments else 0, size, what, known, entry, planes))

    def add_member(path: str, size: int, known: bytes = b"", entry: Optional[FileEntry] = None) -> None:
        in_planes = planes and entry is not None and size >= WEIGHT_SIZE
        path, size = (path + PLANES, size + -(-size // PLANES_BLOCK)) if in_planes else (path, size)
        header = tar_header(path, size)
        add(len(header), f"tar header of {path}", header)
        add(size, path, known, entry, in_planes)
        add(-size % _BLOCK, f"padding after {path}", padding(size))

    for path, known in ((MANIFEST_PATH, text), (RESTORE_PATH, RESTORE_PY if planes else b""), (DELTA_PATH, delta)):
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
    planes: bool
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
    if restore and restore != RESTORE_PY:
        raise ValueError(f"{RESTORE_PATH} is not the one of this format")
    return Leading(manifest, text, bool(restore), delta)


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


def cut_frames(segments: Sequence[Segment], frame_size: int = FRAME_SIZE) -> Iterator[Tuple[int, int]]:
    """Stream ranges of the frames, in order: whole, gapless, at most `frame_size`; weights have their own.

    >>> weight = Segment(10, 2 << 20, "w", entry=FileEntry("w", 2 << 20, ""))
    >>> list(cut_frames([Segment(0, 10, "a"), weight, Segment(2097162, 5, "b")], 1500000))
    [(0, 10), (10, 1500010), (1500010, 2097162), (2097162, 2097167)]
    """
    start = 0
    edges = [(edge, s.planes) for s in segments if s.entry and s.size >= WEIGHT_SIZE for edge in (s.start, s.stop)]
    for number, (edge, planes) in enumerate([*edges, (segments[-1].stop, False)]):
        step = PLANES_BLOCK + 1 if planes and number % 2 else frame_size
        while start < edge:
            stop = min(start + step, edge)
            yield start, stop
            start = stop


Compress = Callable[[Union[bytes, memoryview]], bytes]
Decompress = Callable[[Union[bytes, memoryview], int], bytes]


def encode_unit(content: Union[bytes, memoryview], compress: Compress) -> bytes:
    """One unit: pzstd header and frame."""
    frame = compress(content)
    return _PZSTD.pack(PZSTD_MAGIC, 4, len(frame)) + frame


def split_planes(block: bytes, width: int) -> bytes:
    """A block of a weight in planes.

    >>> split_planes(b"a1b2c", 2)
    b'12abc\\x02'
    """
    whole = len(block) - len(block) % width
    return b"".join([*(block[first:whole:width] for first in reversed(range(width))), block[whole:], bytes([width])])


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
    """(content, whether to put it in planes) -> unit, for one thread."""
    usual = zstd.compressor(STORE_LEVEL if profile == "store" else level)
    dense, entropy = zstd.compressor(1), zstd.compressor(1, **ENTROPY_ONLY)
    zeros = bytes(FRAME_SIZE)

    def encode(content: bytes, planes: bool) -> bytes:
        if planes:
            width = best_width(content, entropy)
            return encode_unit(split_planes(content, width), entropy if width > 1 else usual)
        # Storing would also store the holes of a sparse file.
        return encode_unit(content, dense if profile == "store" and content == zeros[: len(content)] else usual)

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
    rows = list(_ENTRY.iter_unpack(table[_SKIPPABLE.size : -_FOOTER.size]))
    if any(row != (_PZSTD.size, 0) for row in rows[:-1:2]):
        raise ValueError("an entry of the seek table is wrong")
    frames = tuple(_place_frames((row[0] + _PZSTD.size, row[1], crc) for row, crc in zip(rows[1::2], crcs)))
    if sum(part_sizes) != (frames[-1].offset + frames[-1].size if frames else 0) + size:
        raise ValueError("the parts do not add up to the archive")
    return Index(frames, part_sizes)


def _place_frames(rows: Iterable[Tuple[int, int, Optional[int]]]) -> Iterator[Frame]:
    """Frames one after the other, from (bytes of the unit, bytes of its content, crc)."""
    offset = start = 0
    for size, length, crc in rows:
        if not 0 < length <= LARGEST_FRAME or size > largest_unit(length):
            raise ValueError(f"a frame of {length} bytes in {size} is out of bounds")
        yield Frame(offset, size, start, length, crc)
        offset, start = offset + size, start + length


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
    """The units of an archive that comes as a stream, with the bytes of their content; then what is left, with -1.

    Raises ValueError for a unit that is cut or out of bounds.
    """
    while True:
        head = stream.read(_PZSTD.size)
        if head[:4] != _PZSTD.pack(PZSTD_MAGIC, 4, 0)[:4] or len(head) < _PZSTD.size:
            yield head + stream.read(), -1
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


class Sink:
    """Where the files of a tar stream go. This one keeps nothing: it serves those who only check."""

    def begin(self, entry: FileEntry) -> None:
        """The content of a file starts."""

    def write(self, entry: FileEntry, offset: int, content: Union[bytes, bytearray, memoryview]) -> None:
        """Content of a file, at an offset in it. May be called from several threads."""

    def read(self, entry: FileEntry, offset: int, size: int) -> bytes:
        """Content of a file that an earlier run wrote."""
        raise NotImplementedError

    def checkpoint(self, entry: FileEntry, size: int) -> None:
        """All writes to the first `size` bytes of a file are done: a killed run may go on from there."""

    def finish(self, entry: FileEntry) -> None:
        """The file is complete, and proven."""

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        """Bytes of the file are lost, or it is not what the manifest says."""


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

    def feed(self, content: Union[bytes, bytearray, None], length: int) -> None:
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

    def close(self) -> None:
        """The stream ends here, maybe too early."""
        if self._at and self._left[0].entry:
            self._sink.abandon(self._left[0].entry, lost=True)

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


class Stopped(Exception):
    """Work was given up because somebody else failed or Ctrl-C came."""


class Workers:
    """A pool of threads that ends within the piece of work at hand once `stop` is set."""

    def __init__(self, count: int, stop: Optional[threading.Event] = None) -> None:
        self.count = count
        self._stop = stop or threading.Event()
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        return self._pool.submit(self._run, work, args)

    def _run(self, work: Callable[..., Any], args: Tuple[Any, ...]) -> Any:
        if self._stop.is_set():
            raise Stopped
        return work(*args)

    def in_order(self, work: Callable[[Any], Any], items: Iterable[Any], window: int) -> Iterator[Any]:
        """work(item) for all items, in their order, with at most `window` results under way or waiting."""
        pending: Deque[Future[Any]] = deque()
        for item in items:
            pending.append(self.submit(work, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class Serial:
    """One thread that makes calls in their order, while the caller goes on; at most two wait."""

    def __init__(self, stop: threading.Event) -> None:
        self._workers = Workers(1, stop)
        self._pending: Deque[Future[Any]] = deque()

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()

    def call(self, work: Callable[..., Any], *args: Any) -> None:
        """Queue a call. Raises what an earlier one raised."""
        self._pending.append(self._workers.submit(work, *args))
        self.drain(2)

    def drain(self, left: int = 0) -> None:
        """Wait until at most `left` calls are queued."""
        while len(self._pending) > left:
            self._pending.popleft().result()


def per_thread(make: Callable[[], Any]) -> Callable[[], Any]:
    """A function that returns an object of its own to each thread: zstd contexts must not be shared."""
    local = threading.local()

    def get() -> Any:
        if not hasattr(local, "value"):
            local.value = make()
        return local.value

    return get


def shorten(items: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """A list for people that does not fill the screen.

    >>> shorten(["a", "b", "c"]), shorten(["a", "b", "c"], 2)
    ('a, b, c', 'a, b, and 1 more')
    """
    more = [f"and {len(items) - limit} more"] * (len(items) > limit)
    return separator.join([*items[:limit], *more])


def default_jobs() -> int:
    """One thread per core that this process may use."""
    return len(os.sched_getaffinity(0))


# ---- archives on disk ----------------------------------------------------------------

MEDIA_POLL_S = 0.5
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
        self._closed = threading.Event()

    def find(self, path: Path) -> Optional[Path]:
        """The path at which a part is found; None if this is closed meanwhile."""
        while not self._closed.is_set():
            found = next((folder / path.name for folder in self._folders if (folder / path.name).is_file()), None)
            if found:
                self._asked.discard(path.name)
                return found
            if path.name not in self._asked:
                self._asked.add(path.name)
                self._reporter.warn(f"waiting for the medium with {path.name} in {shorten([*map(str, self._folders)])}")
            self._closed.wait(MEDIA_POLL_S)
        return None

    def with_tables(self) -> ArchiveFiles:
        """The archive with its last part, which has the tables and is told by the sums."""
        last = max(self._files.listed(), default="")
        match = _PART.match(last)
        if match is None or read_index(self._files):
            return self._files
        path = self.find(self._files.folder / last)
        return replace(self._files, numbers={**self._files.numbers, int(match["number"]): path or Path(last)})

    def close(self) -> None:
        self._closed.set()


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
    """The archives that an argument means: a file, any part, a folder that holds archives, or a NAME looked up in
    `folders`. Empty when there are none."""
    path = Path(argument)
    if path.is_dir():
        return archives_in(path)
    match = _PART.match(path.name)
    name = match["archive"] if match else re.sub(r"\.sha256$", "", path.name)
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
    frames: Tuple[Frame, ...]
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
        return self.frames[-1].stop if self.frames else 0

    def damage(self, what: str, number: int) -> Damage:
        """Damage of a frame, with the part it lies on and the files it holds."""
        frame = self.frames[number - 1]
        part = self.parts[max(index_at(self.parts, frame.offset + 1) - 1, 0)]
        files = self.files_between(frame.start, frame.stop)
        return Damage(what, frame.offset, frame.size, (number, number), (part.path.name,), files)

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
        blocks, rest = divmod(frame.start - self.segments[at].start, PLANES_BLOCK + 1)
        if rest or frame.stop != min(frame.start + PLANES_BLOCK + 1, self.segments[at].stop):
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
    try:
        fd = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        found = media.find(part.path) if media else None
        if found is None:
            return b""
        fd = os.open(found, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return pread_exactly(fd, size, offset - part.start)
    finally:
        os.close(fd)


def open_archive(files: ArchiveFiles, media: Optional[MediaChange] = None) -> Archive:
    """Find all frames and the manifest of an archive, by its tables or, if these are damaged, by walking it.

    Raises IntegrityError when nothing tells that hfship made it, and when parts are missing that only the tables
    could have told about. All else that is wrong is in `damages`.
    """
    index = read_index(files)
    archive = indexed_archive(files, index) if index else _walked_archive(files)
    archive = replace(archive, media=media, damages=()) if index and media else archive
    archive = _with_manifest(archive)
    if not index and not archive.manifest:
        raise _foreign(files)
    return archive


def read_index(files: ArchiveFiles) -> Optional[Index]:
    """The tables at the end of an archive; None if they are not there or damaged."""
    path = files.paths[-1]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            tail, _ = tail_extent(pread_exactly(fd, 17, max(size - 17, 0)))
            return decode_tail(pread_exactly(fd, tail, size - tail)) if tail <= size else None
        finally:
            os.close(fd)
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
    damages += [Damage("is not part of this archive", parts=(name,)) for name in extra]
    return Archive(files, tuple(parts), index.frames, tuple(damages))


def _walked_archive(files: ArchiveFiles) -> Archive:
    """An archive without its tables: every unit tells where the next one begins."""
    _require_all_parts(files)
    parts: List[Part] = []
    for path in files.paths:
        parts.append(Part(parts[-1].stop if parts else 0, path.stat().st_size, path))
    frames: List[Frame] = []
    offset = start = 0
    with contextlib.suppress(ValueError, OSError):
        while offset < parts[-1].stop:
            size, length = unit_at(read_parts(parts, offset, 30))
            if offset + size > parts[-1].stop or length > LARGEST_FRAME:
                break
            frames.append(Frame(offset, size, start, length))
            offset, start = offset + size, start + length
    names = tuple(part.path.name for part in parts if part.stop > offset) or (parts[-1].path.name,)
    damage = Damage("neither a frame nor intact tables", offset, parts[-1].stop - offset, (), names)
    return Archive(files, tuple(parts), tuple(frames), (damage,))


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


def _foreign(files: ArchiveFiles) -> IntegrityError:
    path = command_line(files.folder / files.name)
    cat = f"cat {path}.* | tar --zstd -x" if files.numbers else f"tar --zstd -xf {path}"
    return IntegrityError(
        f"{files.path} was not made by hfship, or both its beginning and its end are damaged",
        "it has neither the tables of hfship at its end nor a manifest in its first frame",
        f"copy it again; an archive of another program is unpacked by: {cat}",
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
# produced by itself. Threads read and compress frames; one thread hashes the files in stream order against the
# manifest, one writes in order, one hashes what was written: each byte is read once. From HASH_AHEAD_JOBS threads on,
# one hash would hold up all others: then several files are hashed at once, through the page cache.
#
# While parts are written, NAME.tar.zst.incomplete has a line of JSON for each that is complete, after one that names
# the plan: a killed run of the same plan goes on behind the last part that is still as it was written.
#
# Promises: what is packed is what the manifest says, or nothing is; bytes do not depend on the number of threads; a
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

HASH_AHEAD_JOBS = 4
SIDECARS_SIZE = 8 << 20  # room kept on each medium for hfship.pyz, the sums and READ-ME-FIRST.txt
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PackOptions:
    """How to pack: bytes per part (None: one file), zstd level, threads, whether to replace another archive, profile,
    the manifest of what the far side has (for a delta), and whether to read back from the medium what was written."""

    split: Optional[int] = None
    level: int = 1
    jobs: int = 1
    force: bool = False
    frame_size: int = FRAME_SIZE
    profile: str = "standard"
    since: Optional[Manifest] = None
    read_back: bool = False


@dataclass(frozen=True)
class PackPlan:
    """All that decides the bytes of an archive: the layout of its stream and the cut into frames."""

    folder: Path
    manifest: Manifest
    text: bytes
    segments: Tuple[Segment, ...]
    frames: Tuple[Tuple[int, int], ...]
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
        return sum(largest_unit(stop - start) for start, stop in self.frames)

    @property
    def size_at_most(self) -> int:
        """Bytes of the archive if nothing compresses."""
        return self.units_at_most + tail_size(len(self.frames), self.parts_at_most)

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
    return SPLITS.get(text.lower()) or parse_size(text)


def plan_pack(folder: Path, manifest: Manifest, options: PackOptions) -> PackPlan:
    """The plan of an archive. Raises UsageError when a part cannot hold a frame or the tables."""
    text, planes = manifest.to_json().encode("utf-8"), options.profile == "smallest"
    there = {entry.sha256 for entry in options.since.files} if options.since else set()
    absent = {entry.path for entry in manifest.files if entry.sha256 in there}
    segments = stream_layout(manifest, text, planes, delta_json(absent) if options.since else b"")
    frames = tuple(cut_frames(segments, options.frame_size))
    plan = PackPlan(folder, manifest, text, segments, frames, options)
    taken = [e.path for e in manifest.files if e.path.endswith(PLANES)] if planes else []
    if taken:
        why = f"{shorten(taken)}: names that end in {PLANES} are taken by the profile"
        raise UsageError(f"{manifest.name} cannot be packed with --profile smallest", why, "use another profile")
    least = max(largest_unit(options.frame_size), tail_size(len(frames), plan.parts_at_most))
    if options.split is not None and options.split < least:
        why = f"a part must hold a frame and the tables of this archive: {least} bytes"
        raise UsageError(f"parts of {options.split} bytes are too small", why, "give a larger --split")
    return plan


def manifest_to_pack(folder: Path, name: Optional[str], jobs: int, reporter: Reporter) -> Manifest:
    """The manifest of a folder, made and written if it has none, after a look at sizes and names."""
    found = content_files(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        require_finished(folder)
    manifest = manifest or _made_manifest(folder, found, name, jobs, reporter)
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
    return make_manifest(name, manifest.files, manifest.source) if name else manifest


def _made_manifest(
    folder: Path, found: Sequence[Tuple[str, int]], name: Optional[str], jobs: int, reporter: Reporter
) -> Manifest:
    if not found:
        raise UsageError(f"{folder} holds no files", "", "name the folder of a model")
    make_manifest(name or folder.resolve().name, ())  # a name that cannot be: say so before hashing
    reporter.info(f"{folder} has no manifest: hashing its files to make one")
    with reporter.stage("hash", sum(size for _, size in found)) as stage, Workers(jobs) as workers:

        def entry(item: Tuple[str, int]) -> FileEntry:
            try:
                return FileEntry(item[0], item[1], sha256_file(folder / item[0], stage.add))
            except OSError as exc:
                raise disk_error(exc, "read", folder / item[0]) from exc

        files = list(workers.in_order(entry, found, jobs))
    manifest = make_manifest(name or folder.resolve().name, files)
    try:
        write_manifest(folder, manifest)
    except DiskError as exc:
        reporter.warn(f"{exc.what}: the manifest travels in the archive only")
    return manifest


def _mismatch(folder: Path, manifest: Manifest, wrong: Sequence[str]) -> IntegrityError:
    remedy = f"restore the file, or remove {folder / MANIFEST_PATH} if the change is meant"
    if manifest.source:
        remedy = f"hfship fetch {manifest.source.repo}@{manifest.source.commit}"
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
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = pread_exactly(fd, size, offset)
        finally:
            os.close(fd)
    except FileNotFoundError as exc:
        raise _mismatch(plan.folder, plan.manifest, [f"{entry.path} vanished while it was packed"]) from exc
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    if len(content) != size:
        raise _mismatch(plan.folder, plan.manifest, [f"{entry.path} became shorter while it was packed"])
    return content


class PartWriter:
    """Writes units into NAME.tar.zst.incomplete, or into parts of at most `split` bytes, the first folder with room
    for each; `journal` is told of those that are complete, which come before this run as `done`."""

    def __init__(
        self,
        folders: Sequence[Path],
        plan: PackPlan,
        hasher: Serial,
        flusher: Serial,
        journal: Callable[[WrittenPart], None],
        done: Sequence[WrittenPart] = (),
    ) -> None:
        self._folders, self._plan, self._hasher, self._flusher = folders, plan, hasher, flusher
        self._journal, self._parts = journal, list(done)
        self._path: Optional[Path] = None
        self._size, self._digest, self._fd = 0, hashlib.sha256(), -1

    def write(self, unit: bytes) -> None:
        """Append a unit; starts a part when it does not fit the current one."""
        split = self._plan.options.split
        if self._path is None or (split is not None and self._size + len(unit) > split):
            self._open_next()
        self._append(unit)

    def _append(self, unit: bytes) -> None:
        assert self._path is not None
        try:
            write_all(self._fd, unit)
        except OSError as exc:
            raise disk_error(exc, "write", self._path) from exc
        before, self._size = self._size, self._size + len(unit)
        self._hasher.call(self._digest.update, unit)
        if before // FLUSH_SIZE != self._size // FLUSH_SIZE:
            self._flusher.call(self._flush, self._fd, self._path)

    @staticmethod
    def _flush(fd: int, path: Path) -> None:
        try:
            os.fsync(fd)
        except OSError as exc:
            raise disk_error(exc, "write", path) from exc

    def finish(self, frames: Sequence[Frame]) -> Tuple[WrittenPart, ...]:
        """Write the tables, then make everything durable."""
        split, sizes = self._plan.options.split, [part.size for part in self._parts]
        if self._path is None or (split is not None and self._size + tail_size(len(frames), len(sizes) + 1) > split):
            self._open_next()
            sizes = [part.size for part in self._parts]
        self._append(encode_tail(frames, [*sizes, self._size]))
        self._close()
        return tuple(self._parts)

    def discard(self, complete: bool) -> None:
        """Remove what was not published: the unfinished part, or also the `complete` ones."""
        paths = [_unfinished(part.path) for part in self._parts] if complete else []
        for path in [*paths, *([self._path] if self._path else [])]:
            with contextlib.suppress(OSError):
                path.unlink()

    def _open_next(self) -> None:
        self._close()
        name, folder = self._plan.archive, self._folders[0]
        if self._plan.options.split is not None:
            name = part_name(name, len(self._parts) + 1, self._plan.parts_at_most)
            roomy = [f for f in self._folders if free_bytes(f) > self._plan.options.split + SIDECARS_SIZE]
            folder = next(iter(roomy), self._folders[-1])
        path = folder / (name + INCOMPLETE)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise disk_error(exc, "create", path) from exc
        self._path, self._size, self._digest = path, 0, hashlib.sha256()

    def _close(self) -> None:
        if self._path is None:
            return
        self._flusher.call(self._flush, self._fd, self._path)
        self._flusher.drain()
        self._hasher.drain()
        part = WrittenPart(
            self._path.with_name(self._path.name[: -len(INCOMPLETE)]), self._size, self._digest.hexdigest()
        )
        if self._plan.options.read_back:
            # Out of the page cache first: what counts is what the medium gives back.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if sha256_file(self._path) != part.sha256:
                what = f"{self._path.parent} gives back other bytes than were written to it"
                raise DiskError(what, f"found on reading {self._path.name} again", "use another medium")
        os.close(self._fd)
        self._parts.append(part)
        self._path, self._fd = None, -1
        self._journal(part)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + INCOMPLETE)


class Resumed(NamedTuple):
    """What a killed run left: complete parts, and the frames on them."""

    parts: Tuple[WrittenPart, ...] = ()
    frames: Tuple[Frame, ...] = ()


def resumable(plan: PackPlan, lock: int) -> Resumed:
    """The parts that an earlier run of this plan completed and that still are as it wrote them."""
    key, *lines = pread_exactly(lock, 1 << 26, 0).decode("utf-8", "replace").splitlines() or [""]
    if key != plan.key or not plan.options.split:
        return Resumed()
    parts: List[WrittenPart] = []
    rows: List[Tuple[int, int, int]] = []
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
            rows += found
    # Small files are hashed with the frames, from the first on: a run goes on only behind them, between two members
    # or inside a weight.
    weights = [s for s in plan.segments if s.entry and s.size >= WEIGHT_SIZE]
    at = plan.frames[len(rows)][0] if len(rows) < len(plan.frames) else plan.segments[-1].stop
    around = next(iter(segments_between(plan.segments, at, at + 1)), None)
    if not weights or at < weights[0].start or not around or (around.start < at and around not in weights):
        return Resumed()
    return Resumed(tuple(parts), tuple(_place_frames(rows)))


class PackRun:
    """One run that reads, checks, compresses and writes the frames of a plan which `resumed` does not have yet."""

    def __init__(self, plan: PackPlan, resumed: Resumed) -> None:
        self._plan, self._resumed = plan, resumed
        self._jobs = min(plan.options.jobs, MOST_JOBS) + 1  # one more than cores: some wait for the hashing ones
        self._encoder = per_thread(lambda: make_encoder(load_zstd(), plan.options.profile, plan.options.level))
        self._weights = [s for s in plan.segments if s.entry and s.size >= WEIGHT_SIZE]
        self._ahead = plan.options.jobs >= HASH_AHEAD_JOBS or bool(resumed.parts)

    def write(self, folders: Sequence[Path], lock: int, stage: Stage) -> Tuple[WrittenPart, ...]:
        """Write the archive under its .incomplete names. Complete parts stay for the next run, unless the disk is full
        or the folder is not what its manifest says."""
        stop, count = threading.Event(), max(self._jobs // 4, 1)
        with Workers(self._jobs, stop) as workers, Workers(count, stop) as provers, Serial(stop) as checker, Serial(
            stop
        ) as hasher, Serial(stop) as flusher:

            def note(part: WrittenPart) -> None:
                checker.drain()
                if self._plan.options.split:
                    write_all(lock, (json.dumps([str(part.path), part.size, part.sha256]) + "\n").encode())

            writer = PartWriter(folders, self._plan, hasher, flusher, note, self._resumed.parts)
            try:
                return writer.finish(self._write_frames(writer, workers, provers, checker, stage))
            except BaseException as exc:
                full = isinstance(exc.__cause__, OSError) and exc.__cause__.errno in _NO_ROOM
                complete = full or isinstance(exc, IntegrityError)
                writer.discard(complete)
                if complete:
                    os.ftruncate(lock, 0)
                raise

    def _write_frames(
        self, writer: PartWriter, workers: Workers, provers: Workers, checker: Serial, stage: Stage
    ) -> List[Frame]:
        frames = list(self._resumed.frames)
        start = frames[-1].stop if frames else 0
        check = StreamCheck(
            [s for s in self._plan.segments if s.start >= start and not (self._ahead and s in self._weights)],
            Sink(),
            self._refuse,
        )
        proofs = [provers.submit(self._prove, weight) for weight in self._weights if self._ahead]
        extents = self._plan.frames[len(frames) :]
        for (start, stop), (content, unit) in zip(extents, workers.in_order(self._produce, extents, self._jobs + 2)):
            offset = frames[-1].offset + frames[-1].size if frames else 0
            frames.append(Frame(offset, len(unit), start, stop - start, zlib.crc32(unit)))
            if not (self._ahead and self._weight_at(start)):
                checker.call(check.feed, content, stop - start)
            writer.write(unit)
            stage.add(stop - start)
        checker.drain()
        for proof in proofs:
            proof.result()
        return frames

    def _weight_at(self, start: int) -> Optional[Segment]:
        """The weight that the frame at `start` is of."""
        at = index_at(self._weights, start + 1) - 1
        return self._weights[at] if at >= 0 and start < self._weights[at].stop else None

    def _produce(self, extent: Tuple[int, int]) -> Tuple[bytes, bytes]:
        content, weight = read_stream(self._plan, *extent), self._weight_at(extent[0])
        return content, self._encoder()(content, weight is not None and weight.planes)

    def _prove(self, weight: Segment) -> None:
        assert weight.entry
        found = sha256_file(self._plan.folder / weight.entry.path)
        if found != weight.entry.sha256:
            self._refuse(weight, f"has SHA-256 {found}, the manifest says {weight.entry.sha256}")

    def _refuse(self, segment: Segment, what: str) -> None:
        path = segment.entry.path if segment.entry else segment.what
        raise _mismatch(self._plan.folder, self._plan.manifest, [f"{path} {what}"])


def pack_model(plan: PackPlan, folder: Path, reporter: Reporter, media: Sequence[Path] = ()) -> Packed:
    """Pack a model into `folder`, and what finds no room there onto `media`, one after the other. An archive of the
    same manifest and form that is there already is left as it is."""
    started = time.monotonic()
    folders = [make_dir(f) for f in (folder, *media)]
    old = [files for files in merged(x for f in folders for x in archives_in(f)) if files.name == plan.archive]
    present = _already_packed(plan, old[0]) if old and not plan.options.force else None
    if present:
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
            stage.skip(resumed.frames[-1].stop if resumed.frames else 0)
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
            raise IncompleteError(f"another hfship writes {path}", why, "wait for it, or stop it") from exc
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


def _require_room_for(plan: PackPlan, folders: Sequence[Path], done: Sequence[WrittenPart]) -> None:
    needed, what = plan.size_at_most, f"pack {plan.manifest.name}"
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
                    os.rename(_unfinished(part.path), part.path)
            fsync_dir(folder)
        except OSError as exc:
            raise disk_error(exc, "write", folder) from exc


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
            atomic_write(path, content, 0o755 if path.suffix == ".pyz" else 0o644)


# ======================================================================================
# §10 Unpack
#
# Owns the way back: prove an archive or a folder, name what is damaged and the shortest repair, restore a model.
#
# An archive is checked and restored by the same code. Its frames fall into lanes, stretches that begin and end with a
# frame and a file at once: a weight is a lane, the small files between two weights are another. Lanes run side by
# side; within a lane, frames are read, decoded and written by any thread and hashed in order by one.
#
# Promises: every bit of the archive is checked; damage is located and the rest goes on; a model appears under its
# name complete and proven or not at all; a killed run keeps the files it had proven. Never: follows a symbolic link
# below the target folder; writes a file that the manifest does not list; trusts a tar header.
# ======================================================================================

DAMAGES_SHOWN = 20
JOURNAL_PATH = f"{WORK_DIR}/journal"


class Lane(NamedTuple):
    """Frames (numbered from 1) and the segments they hold, none of which reaches into another lane."""

    frames: Sequence[Tuple[int, Frame]]
    segments: Sequence[Segment]

    @property
    def file(self) -> Optional[FileEntry]:
        """The file, if the lane is just one."""
        return self.segments[0].entry if len(self.segments) == 1 else None

    @property
    def files(self) -> List[FileEntry]:
        return [segment.entry for segment in self.segments if segment.entry]


def make_lanes(frames: Sequence[Frame], segments: Sequence[Segment]) -> List[Lane]:
    """The lanes of an archive; without segments (manifest unreadable), one lane of all frames.

    >>> frames = [Frame(0, 9, 0, 10), Frame(9, 9, 10, 5), Frame(18, 9, 15, 5), Frame(27, 9, 20, 1)]
    >>> segments = [Segment(0, 6, "a"), Segment(6, 4, "b"), Segment(10, 10, "c"), Segment(20, 1, "d")]
    >>> [([n for n, _ in lane.frames], [s.what for s in lane.segments]) for lane in make_lanes(frames, segments)]
    [([1], ['a', 'b']), ([2, 3], ['c']), ([4], ['d'])]
    """
    numbered = list(enumerate(frames, 1))
    edges = {segment.start for segment in segments}
    cuts = [i for i, frame in enumerate(frames) if frame.start in edges or not i] + [len(frames)]
    lanes = []
    for first, last in zip(cuts, cuts[1:]):
        inside = segments[index_at(segments, frames[first].start) : index_at(segments, frames[last - 1].stop)]
        lanes.append(Lane(numbered[first:last], inside))
    return lanes


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
        self.archive, self._sink, self._jobs = archive, sink, min(jobs, MOST_JOBS)
        self._resume, self._quick = resume, quick
        lanes = make_lanes(archive.frames, archive.segments)
        self._lanes = [x for x in lanes if {e.path for e in x.files} - skip or not (x.file or sparse)]
        ranges = [(f.offset, f.offset + f.size) for lane in self._lanes for f in self._needed(lane)]
        self._damages = [d for d in archive.damages if not sparse or _overlaps(d, ranges)]
        self._decompressor = per_thread(load_zstd().decompressor)

    @property
    def size(self) -> int:
        """Bytes of the tar stream to go through."""
        return sum(frame.length for lane in self._lanes for _, frame in lane.frames)

    def run(self, stage: Stage, after: Optional[Callable[[int], None]] = None) -> List[Damage]:
        """All damage, in the order of the archive. With `after`, lanes run one after the other, and it is told up to
        where the stream is safe in the sink, unless there is damage."""
        stop = threading.Event()
        count = 1 if after or self.archive.media else max(1, min(self._jobs, len(self._lanes)))
        window = max(2, (self._jobs + 4) // count)
        with Workers(self._jobs, stop) as decoders, Workers(count, stop) as runners:
            futures = [runners.submit(self._run_lane, lane, decoders, window, stage, after) for lane in self._lanes]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            finally:
                if self.archive.media:
                    self.archive.media.close()  # lets go the threads that wait for a medium
        found: List[Damage] = []
        for damage in sorted(self._damages, key=lambda d: (d.offset is None, d.offset or 0, bool(d.frames))):
            joined = found[-1].joined(damage) if found else None
            found[-1 if joined else len(found) :] = [joined or damage]
        return found

    def _needed(self, lane: Lane) -> List[Frame]:
        """Frames of a lane that the sink does not have yet."""
        done = self._resume.get(lane.file.path, 0) if lane.file else 0
        return [f for _, f in lane.frames if not done or lane.segments[0].file_range(f.start, f.stop)[1] > done]

    def _run_lane(
        self, lane: Lane, decoders: Workers, window: int, stage: Stage, after: Optional[Callable[[int], None]]
    ) -> None:
        check = StreamCheck(lane.segments, self._sink, self._report, write=lane.file is None)
        if lane.file:
            self._sink.begin(lane.file)
        whole = True

        def decode(item: Tuple[int, Frame]) -> Union[bytes, bytearray, None]:
            return self._decode(*item, lane)

        for (_, frame), content in zip(lane.frames, decoders.in_order(decode, lane.frames, window)):
            whole = whole and (content is not None or self._quick)
            if lane.file and whole:
                first, last = lane.segments[0].file_range(frame.start, frame.stop)
                if first // FLUSH_SIZE != last // FLUSH_SIZE:
                    self._sink.checkpoint(lane.file, first)
                    self._tell(after, frame.start)
            if not self._quick:
                check.feed(content, frame.length)
            stage.add(frame.length)
        check.close()
        self._tell(after, lane.frames[-1][1].stop)

    def _tell(self, after: Optional[Callable[[int], None]], position: int) -> None:
        if after and not self._damages:
            after(position)

    def _decode(self, number: int, frame: Frame, lane: Lane) -> Union[bytes, bytearray, None]:
        try:
            if self._quick and frame.crc is not None:
                self.archive.unit(frame)
                return None
            if not lane.file:
                return self.archive.restored(frame, self._decompressor())
            first, last = lane.segments[0].file_range(frame.start, frame.stop)
            if last <= self._resume.get(lane.file.path, 0):
                return self._sink.read(lane.file, first, last - first)
            content = self.archive.restored(frame, self._decompressor())
            self._sink.write(lane.file, first, content)
            return content
        except ZstdError as exc:
            self._damages.append(self.archive.damage(str(exc), number))
            return None

    def _report(self, segment: Segment, what: str) -> None:
        """Frames are intact, but what they hold is not what the manifest says: the archive was made so."""
        files = ((segment.entry.path, 0, segment.entry.size - 1),) if segment.entry else ()
        what = f"{segment.what} {what} (bytes {segment.start}-{segment.stop - 1} of the tar stream)"
        self._damages.append(Damage(what, files=files))


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
    check = ArchiveCheck(archive, Sink(), jobs, quick=quick)
    with reporter.stage("verify", check.size) as stage:
        return check.run(stage)


class DamageError(IntegrityError):
    """Damage that was looked for, and located."""

    def __init__(self, what: str, damages: Sequence[Damage], next_step: str) -> None:
        super().__init__(what, shorten([damage.text() for damage in damages], DAMAGES_SHOWN, "\n"), next_step)
        self.damages = damages


def archive_error(archive: Archive, damages: Sequence[Damage], again: str) -> DamageError:
    """The damage of an archive; `again` is the command to run after the repair."""
    names = sorted({name for damage in damages for name in damage.parts})
    repair = f"copy {shorten(names)} again into {archive.files.folder}, then: {again}"
    if not names:
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
    end = archive.frames[-1].offset + archive.frames[-1].size
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
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            pwrite_all(fd, content, offset)
            os.fsync(fd)
        finally:
            os.close(fd)
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
        parent = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._folders = {"": self._enter(parent, root.name, root)}
        finally:
            os.close(parent)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._folders.values():
            os.close(fd)

    def _enter(self, parent: int, name: str, path: Path) -> int:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
            return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
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
            self.publish(entry.path)

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
        """Make all names durable."""
        for fd in self._folders.values():
            os.fsync(fd)


class Journal:
    """How far the weights of a model are on disk: NAME/.hfship/journal, a line [path, sha256, bytes] for each
    checkpoint. It is a hint only: what it says is hashed again, and taken anew if it does not hold."""

    def __init__(self, tree: Tree) -> None:
        self._tree, self._lock = tree, threading.Lock()
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
        """Append a checkpoint; what it tells of must be durable already."""
        write_all(self._fd, (json.dumps([entry.path, entry.sha256, size]) + "\n").encode())

    def close(self, done: bool) -> None:
        os.close(self._fd)
        if done:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.basename(JOURNAL_PATH), dir_fd=self._tree.folder(WORK_DIR))


class FolderSink(Sink):
    """Restores files below a tree, except those in `kept`; goes on with those in `resume`. `finished` are done."""

    def __init__(
        self, tree: Tree, kept: AbstractSet[str], journal: Journal, resume: Mapping[str, int], reserve: bool = True
    ) -> None:
        self._tree, self._kept, self._journal, self._resume = tree, kept, journal, resume
        self._filesystem = filesystem_of(tree.root) if reserve else None
        self.finished: Set[str] = set()
        self._open: Dict[str, int] = {}
        self._lock = threading.Lock()  # folders are made on the way, by several lanes

    def begin(self, entry: FileEntry) -> None:
        if entry.path in self._kept:
            return
        with self._lock:
            if entry.path in self._resume:
                self._open[entry.path] = self._tree.open(entry.path + INCOMPLETE, os.O_RDWR)
            else:
                self._open[entry.path] = self._tree.create(entry.path, entry.size, self._filesystem)

    def read(self, entry: FileEntry, offset: int, size: int) -> bytes:
        return pread_exactly(self._open[entry.path], size, offset)

    def write(self, entry: FileEntry, offset: int, content: Union[bytes, bytearray, memoryview]) -> None:
        if entry.path in self._open:
            with self._errors(entry):
                pwrite_all(self._open[entry.path], memoryview(content), offset)

    def checkpoint(self, entry: FileEntry, size: int) -> None:
        if entry.path in self._open and size > self._resume.get(entry.path, 0):
            with self._errors(entry):
                os.fdatasync(self._open[entry.path])
                self._journal.note(entry, size)

    def finish(self, entry: FileEntry) -> None:
        fd = self._open.pop(entry.path, -1)
        if fd < 0:
            return
        with self._errors(entry):
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            self._tree.publish(entry.path)
        self.finished.add(entry.path)

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        fd = self._open.pop(entry.path, -1)
        if fd >= 0:
            os.close(fd)
            if not lost:  # else the journal tells what is good, and a run after the repair goes on from there
                self._tree.remove(entry.path)

    def close(self) -> None:
        """Close what a failure left open; PATH.incomplete stays until the next run."""
        for fd in self._open.values():
            os.close(fd)

    @contextlib.contextmanager
    def _errors(self, entry: FileEntry) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise disk_error(exc, "write", self._tree.root / entry.path) from exc


def check_folder(folder: Path, manifest: Manifest, jobs: int, reporter: Reporter) -> List[Damage]:
    """Files of a model folder that are missing or not what the manifest says."""

    def check(entry: FileEntry) -> Optional[Damage]:
        path = folder / entry.path
        try:
            size = path.stat().st_size
            if size != entry.size:
                return Damage(f"{entry.path} has {size} bytes instead of {entry.size}")
            found = sha256_file(path, stage.add)
        except OSError as exc:
            return Damage(
                f"{entry.path} cannot be read: {exc.strerror}" if path.exists() else f"{entry.path} is missing"
            )
        what = f"{entry.path} has SHA-256 {found}, the manifest says {entry.sha256}"
        return None if found == entry.sha256 else Damage(what)

    with reporter.stage("verify", manifest.size) as stage, Workers(jobs) as workers:
        return [damage for damage in workers.in_order(check, manifest.files, jobs) if damage]


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
        lock = stack.enter_context(FolderLock(work))
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
    files = [entry for entry in manifest.files if any(fnmatchcase(entry.path, glob) for glob in only)]
    if not files:
        what = f"no file of {archive.files.name} matches {', '.join(only)}"
        raise NotFoundError(what, shorten([entry.path for entry in manifest.files]), "give another --only GLOB")
    chosen = make_manifest(manifest.name, files, manifest.source)
    return chosen, chosen.to_json().encode("utf-8")


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
    with reporter.stage("prove", sum(entry.size for entry in present)) as stage, Workers(jobs) as workers:
        sums = workers.in_order(lambda entry: tree.sha256(entry, stage.add), present, jobs)
        return {entry.path for entry, found in zip(present, sums) if found == entry.sha256}


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
    resume = journal.read(left)
    _require_room_for_files(tree.root, left, sum(resume.values()), archive if options.consume else None)
    freed = _PartsToFree(archive, tree) if options.consume else None
    sparse = options.consume or bool(options.only)
    others = {s.entry.path for s in archive.segments if s.entry} - {entry.path for entry in left}
    damages: List[Damage] = []
    try:
        for start in (resume, {}) if resume else ({},):
            sink = FolderSink(tree, others, journal, start, reserve=not options.consume)
            try:
                check = ArchiveCheck(archive, sink, jobs, others, start, sparse)
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
        first = make_lanes(archive.frames, archive.segments)[0].frames[-1][1]
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


def _require_room_for_files(folder: Path, files: Sequence[FileEntry], there: int, freeing: Optional[Archive]) -> None:
    """`there` bytes are written already; `freeing` is an archive whose parts go as their files come."""
    what, hint = f"unpack into {folder}", "free space, give --consume, or choose another folder with -o DIR"
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
        os.rename(work, target)
        fsync_dir(target.parent)
    except OSError as exc:
        raise disk_error(exc, "rename to", target) from exc
    shutil.rmtree(old, ignore_errors=True)


# ======================================================================================
# §11 Signatures
#
# Owns who vouches for a model: a bundle of OpenSSF model signing (OMS 1.0) with an ECDSA P-256 key, NAME.tar.zst.sig
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

_P256 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE"  # what the DER of each public key on P-256 begins with, in base64


@dataclass(frozen=True)
class Signed:
    """What a proven signature says: files that were signed (path -> SHA-256), paths it leaves out, and who signed."""

    files: Mapping[str, str]
    ignored: Tuple[str, ...]
    fingerprint: str


def public_key(key: Path, private: bool = False) -> Tuple[str, str]:
    """(PEM text of the public key, its fingerprint) of a key file. Raises UsageError unless it is on P-256."""
    done = run_program(["openssl", "pkey", "-in", str(key), "-pubout", *([] if private else ["-pubin"])])
    body = "".join(done.out.split("\n")[1:-2])
    if done.code or not body.startswith(_P256):
        why = done.err.strip() or "it is no ECDSA key on the curve P-256"
        make = "openssl ecparam -name prime256v1 -genkey -noout -out KEY; openssl pkey -in KEY -pubout -out PUB"
        raise UsageError(f"{key} is no {'private' if private else 'public'} key that can be used", why, make)
    return done.out, hashlib.sha256(done.out.encode()).hexdigest()


def _signed_bytes(payload: bytes) -> bytes:
    return f"DSSEv1 {len(DSSE_TYPE)} {DSSE_TYPE} {len(payload)} ".encode() + payload


def sign_manifest(manifest: Manifest, key: Path) -> str:
    """The bundle for a manifest."""
    _, fingerprint = public_key(key, private=True)
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
    done = run_program(["openssl", "dgst", "-sha256", "-hex", "-sign", str(key)], _signed_bytes(payload))
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
    pem, fingerprint = public_key(key)
    next_step = "get the signature and the public key again from who packed the model"
    try:
        envelope = json.loads(path.read_bytes())["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        with tempfile.NamedTemporaryFile() as stream:
            stream.write(signature)
            stream.flush()
            argv = ["openssl", "dgst", "-sha256", "-verify", str(key), "-signature", stream.name]
            if envelope["payloadType"] != DSSE_TYPE or run_program(argv, _signed_bytes(payload)).code:
                raise ValueError(f"it was not made with this key, whose fingerprint is {fingerprint}")
        return Signed(*_read_statement(json.loads(payload)), fingerprint)
    except FileNotFoundError as exc:
        raise IntegrityError(
            f"{path} is missing", "a signature is asked for by --key or HFSHIP_KEY", next_step
        ) from exc
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
    ignored = [
        p for p in listed if any(p == i or p.startswith(i + "/") for i in signed.ignored) and p not in signed.files
    ]
    wrong = sorted(p for p in {*listed, *signed.files} - {*ignored} if listed.get(p) != signed.files.get(p))
    if wrong:
        why = f"other than signed, not signed, or missing: {shorten(wrong)}"
        raise IntegrityError(f"{where} is not what was signed", why, "get the archive and its signature again")


def open_trusted(
    files: ArchiveFiles, key: Optional[Path], media: Optional[MediaChange] = None
) -> Tuple[Archive, Optional[Signed]]:
    """Open an archive; with a key, or HFSHIP_KEY, only once its signature is proven, and only if it holds what was
    signed."""
    key = key or trusted_key()
    signed = prove_signature(files.folder / (files.name + SIGNATURE), key) if key else None
    archive = open_archive(files, media)
    if signed and archive.manifest:
        require_signed(archive.manifest, signed, files.path)
    return archive, signed


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
    if _number(text, "sliding_window_pattern"):
        full = layers // _number(text, "sliding_window_pattern")
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
    """
    lengths = [_number(text, key) for key in _LENGTH_KEYS if _number(text, key)]
    rope = _table(text, "rope_scaling", "rope_parameters")
    rope = _table(rope, "full_attention") or rope
    factor = rope.get("factor")
    scaled = str(rope.get("rope_type") or rope.get("type") or "default") in _ROPE_ALREADY_SCALED
    if scaled or not isinstance(factor, (int, float)) or "gemma3" in str(text.get("model_type")):
        factor = 1
    return int(min(lengths) * factor) if lengths else 0


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


def read_facts(folder: Path) -> ModelFacts:
    """The facts of the model in `folder`.

    Raises NotFoundError (no model), IntegrityError (a file is missing or damaged), HostError (nothing vLLM serves).
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}", "", BRING_AGAIN)
    for name, reason in _NOT_SERVABLE.items():
        if (folder / name).exists() and not (folder / "config.json").exists():
            raise HostError(f"{folder} cannot be served", f"it {reason}", "serve the base model it belongs to")
    require_complete(folder)
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


def require_complete(folder: Path) -> None:
    """Every file of the manifest must be there in its full size: cheap, and catches an unpack that was cut short.

    A link that leaves the folder is refused: it dangles inside the container, which sees this folder alone.
    """
    manifest = read_manifest(folder)
    for entry in manifest.files if manifest else ():
        path = folder / entry.path
        size = path.stat().st_size if path.exists() else -1
        if size != entry.size:
            why = f"it has {size} bytes instead of {entry.size}" if size >= 0 else "the manifest lists it"
            what = f"{path} is {'damaged' if size >= 0 else 'missing'}"
            raise IntegrityError(what, why, command_line("hfship", "verify", folder))
    for path in folder.iterdir():
        if path.is_symlink() and folder.resolve() not in path.resolve().parents:
            why = f"{path.name} is a link to {os.readlink(path)}, which the container cannot see"
            raise HostError(
                f"{folder} cannot be served", why, f"{command_line('cp', '-rL', folder)} NEW-FOLDER, then serve that"
            )


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
            cpu = bool(re.search(r"(^|[-_:.])cpu([-_:.]|$)", last))
            images.append(Image(f"{repository}:{tag}", row.get("ID", ""), parse_version(tag), cpu))
    return tuple(images)


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
        raise HostError(what, here, f"bring {bring} (docker save), docker load -i FILE, then the same command again")
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
    longest = max(facts.max_length or USEFUL_LENGTH, options.max_model_len)
    lengths = (longest, *range(longest // LENGTH_STEP * LENGTH_STEP, LEAST_LENGTH - 1, -LENGTH_STEP))
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
    works.append(
        f"{counted(more.tp, 'such GPU')} (--tensor-parallel-size {more.tp}, {more.length} tokens)" if more else other
    )
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
    return tuple(sorted(pool, key=lambda g: (g.uuid not in own, g.index))), tuple(warnings)


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
        "--gpu-memory-utilization": gpu and f"{plan.gpu_memory_utilization:.2f}",
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
        return Plan(**known_fields(Plan, value))
    except (ValueError, KeyError, TypeError) as exc:
        raise IntegrityError(
            f"{where} is not a valid plan", f"{type(exc).__name__}: {exc}", "run hfship serve again"
        ) from exc


def known_fields(kind: Type[Any], values: Mapping[str, Any]) -> Dict[str, Any]:
    """The values that the dataclass has fields for, with tuples for lists."""
    names = {f.name for f in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}


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


def list_images() -> Tuple[Image, ...]:
    """The vLLM images that docker has."""
    return parse_images(docker(["image", "ls", "--no-trunc", "--format", "{{json .}}"], "list images"))


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


def port_is_free(bind: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
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


def list_deployments(deploy_dir: Path, reporter: Reporter) -> List[Deployment]:
    """All deployments, by name. Folders that start with _ are ours for other purposes."""
    folders = sorted(p for p in deploy_dir.glob("*") if p.is_dir() and not p.name.startswith(("_", ".")))
    return [d for d in (read_deployment(folder, reporter) for folder in folders) if d]


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
            reporter.info(f"{name}: {phase}")
            reporter.event("phase", name=name, phase=phase)
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
# download ORG/NAME`, transformers and vLLM work inside the site. The folder holds NAME/ or ORG/NAME/ with plain files.
# Promises: what a manifest calls ORG/NAME at a commit is served under that name and commit; nothing outside the listed
# files can be read, and nothing is ever written.
# ======================================================================================

TREE_PAGE = 1000  # entries, as on huggingface.co
LFS_THRESHOLD = 1 << 20  # bytes; larger files have a SHA-256 as their etag, smaller ones a git blob id, as on the Hub
_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".zip", ".tar", ".model")
RESCAN_S = 2.0


@dataclass(frozen=True)
class MirrorFile:
    """One file that the mirror offers: how the Hub would list it, and where its bytes are."""

    remote: RemoteFile
    location: Path


@dataclass(frozen=True)
class MirrorRepo:
    """One model folder as a repository at one commit. `revisions` are the names that lead to it."""

    repo: str
    repo_type: str
    commit: str
    revisions: FrozenSet[str]
    license: Optional[str]
    files: Mapping[str, MirrorFile]


class Library:
    """The repositories of a models folder, found anew when the folder changes. Safe to share between threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._scanned = -RESCAN_S
        self._repos: Dict[Tuple[str, str], MirrorRepo] = {}
        self._cache: Dict[Path, Tuple[object, MirrorRepo]] = {}

    def repos(self) -> Dict[Tuple[str, str], MirrorRepo]:
        """(repository type, id in lower case) -> repository."""
        with self._lock:
            if time.monotonic() - self._scanned > RESCAN_S:
                found = [self._repo(folder, name) for folder, name in model_folders(self._root)]
                self._repos = {(repo.repo_type, repo.repo.lower()): repo for repo in found}
                self._scanned = time.monotonic()
            return self._repos

    def find(self, repo_type: str, repo: str) -> Optional[MirrorRepo]:
        return self.repos().get((repo_type, repo.lower()))

    def _repo(self, folder: Path, name: str) -> MirrorRepo:
        listing = content_files(folder)
        state = tuple((path, size, (folder / path).stat().st_mtime_ns) for path, size in listing)
        known = self._cache.get(folder)
        if known is None or known[0] != state:
            known = (state, mirror_repo(folder, name, listing, read_manifest(folder)))
            self._cache[folder] = known
        return known[1]


def model_folders(root: Path) -> List[Tuple[Path, str]]:
    """(folder, id) of every model below `root`: NAME/ and ORG/NAME/. A folder with files of its own is a model."""
    found = []
    for folder in _visible_folders(root):
        if any(entry.is_file() for entry in folder.iterdir()):
            found.append((folder, folder.name))
        else:
            found += [(inner, f"{folder.name}/{inner.name}") for inner in _visible_folders(folder)]
    return found


def _visible_folders(root: Path) -> List[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def mirror_repo(
    folder: Path, name: str, listing: Sequence[Tuple[str, int]], manifest: Optional[Manifest]
) -> MirrorRepo:
    """A model folder as a repository. Hashes come from the manifest where it has them; files beside it are hashed."""
    source = manifest.source if manifest else None
    known = {entry.path: entry for entry in manifest.files} if manifest else {}
    files = {}
    for path, size in listing:
        entry = known.get(path)
        sha256 = entry.sha256 if entry and entry.size == size else None
        files[path] = MirrorFile(_remote_view(folder / path, path, size, sha256), folder / path)
    digest = hashlib.sha1("".join(f"{path} {file.remote.etag}\n" for path, file in sorted(files.items())).encode())
    commit = source.commit if source else digest.hexdigest()
    revisions = {"main", commit} | ({source.revision} if source else set())
    return MirrorRepo(
        source.resolved_repo if source else name,
        source.repo_type if source else "model",
        commit,
        frozenset(revisions),
        source.license if source else None,
        files,
    )


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


def tree_entries(repo: MirrorRepo, below: str, recursive: bool) -> List[Dict[str, Any]]:
    """The Hub's tree answer for a folder ("" = root), sorted by path, folders included."""
    prefix = below + "/" if below else ""
    folders: Set[str] = set()
    files = []
    for path, file in repo.files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        depth = len(parts) if recursive else min(len(parts), 2)
        folders.update(prefix + "/".join(parts[:i]) for i in range(1, depth))
        if recursive or len(parts) == 1:
            files.append(file_entry(file.remote))
    entries = [
        {"type": "directory", "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0, "path": f} for f in folders
    ]
    return sorted(entries + files, key=lambda entry: str(entry["path"]))


def file_entry(remote: RemoteFile) -> Dict[str, Any]:
    """One file of a tree answer."""
    entry: Dict[str, Any] = {"type": "file", "oid": remote.git_sha1, "size": remote.size, "path": remote.path}
    if remote.sha256:
        entry["lfs"] = {"oid": remote.sha256, "size": remote.size, "pointerSize": 134}
    return entry


def repo_info(repo: MirrorRepo) -> Dict[str, Any]:
    """The Hub's answer to /api/models/ID/revision/REV."""
    siblings = []
    for path, file in sorted(repo.files.items()):
        sibling: Dict[str, Any] = {"rfilename": path, "size": file.remote.size, "blobId": file.remote.git_sha1}
        if file.remote.sha256:
            sibling["lfs"] = {"sha256": file.remote.sha256, "size": file.remote.size, "pointerSize": 134}
        siblings.append(sibling)
    return {
        "_id": repo.commit[:24],
        "id": repo.repo,
        "modelId": repo.repo,
        "author": repo.repo.rpartition("/")[0] or None,
        "sha": repo.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [f"license:{repo.license}"] if repo.license else [],
        "cardData": {"license": repo.license} if repo.license else {},
        "siblings": siblings,
        "usedStorage": sum(file.remote.size for file in repo.files.values()),
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


class HubHandler(BaseHTTPRequestHandler):
    """One connection of a Hub client. Subclasses (the test Hub) override the small steps to misbehave."""

    protocol_version = "HTTP/1.1"
    server_version = f"hfship/{__version__}"
    timeout = 60
    disable_nagle_algorithm = True
    server: MirrorServer

    def do_GET(self) -> None:
        try:
            self.route(urlsplit(self.path))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except HfshipError as exc:  # a model folder that cannot be read must not end the mirror
            self.server.reporter.error(exc)
            self.send_error_code(500, "InternalError", exc.what)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > CHUNK:
            self.close_connection = True
            self.send_json(413, {"error": "body too large"})
            return
        self.form = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        self.server.reporter.detail(f"{self.address_string()} {format % args}")

    def route(self, url: SplitResult) -> None:
        """Find the handler of a path. Segments are unquoted one by one: a revision may hold an encoded '/'."""
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if parts[0] == "api" and len(parts) > 2 and parts[1].rstrip("s") in REPO_TYPES:
            self.route_api(parts[1][:-1], parts[2:], query)
        elif "resolve" in parts[1:]:
            repo_type = parts.pop(0)[:-1] if parts[0] in ("datasets", "spaces") else "model"
            at = parts.index("resolve")
            self.send_file("/".join(parts[:at]), repo_type, parts[at + 1 :])
        elif url.path in ("/", "/health"):
            self.send_json(
                200, {"hfship": __version__, "repos": sorted(r.repo for r in self.server.library.repos().values())}
            )
        else:
            self.send_error_code(404, "EntryNotFound", "no such page")

    def route_api(self, repo_type: str, parts: List[str], query: Mapping[str, str]) -> None:
        """/api/models/{ID}[/VERB[/REV[/PATH...]]] where ID has one or two segments."""
        verbs = ("revision", "tree", "paths-info", "refs", "treesize", "auth-check")
        at = next((i for i, part in enumerate(parts[:3]) if i and part in verbs), len(parts))
        repo = self.server.library.find(repo_type, "/".join(parts[:at]))
        verb, rest = (parts[at], parts[at + 1 :]) if at < len(parts) else ("revision", [])
        if repo is None:
            self.send_error_code(404, "RepoNotFound", "Repository not found")
        elif rest and rest[0] not in repo.revisions and not self.is_short_commit(rest[0], repo):
            self.send_error_code(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
        else:
            self.answer_api(repo, verb, "/".join(rest[1:]), query)

    @staticmethod
    def is_short_commit(revision: str, repo: MirrorRepo) -> bool:
        return len(revision) >= 7 and repo.commit.startswith(revision)

    def answer_api(self, repo: MirrorRepo, verb: str, path: str, query: Mapping[str, str]) -> None:
        if verb == "tree":
            self.send_tree(repo, path, query)
        elif verb == "paths-info":
            paths = getattr(self, "form", {}).get("paths", [])
            self.send_json(200, [file_entry(repo.files[p].remote) for p in paths if p in repo.files])
        elif verb == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commit}
            self.send_json(200, {"branches": [branch], "tags": [], "converts": []})
        elif verb == "treesize":
            self.send_json(200, {"path": "/", "size": sum(file.remote.size for file in repo.files.values())})
        elif verb == "auth-check":
            self.send_json(200, {})
        else:
            self.send_json(200, repo_info(repo))

    def send_tree(self, repo: MirrorRepo, below: str, query: Mapping[str, str]) -> None:
        """One page of the tree; the cursor is the position of the next entry."""
        entries = tree_entries(repo, below, query.get("recursive", "").lower() in ("1", "true"))
        limit = int(query["limit"]) if query.get("limit", "").isdigit() else self.server.tree_page
        start = int(query["cursor"]) if query.get("cursor", "").isdigit() else 0
        headers = {}
        if start + limit < len(entries):
            again = urlencode({**query, "cursor": start + limit, "limit": limit})
            headers["Link"] = f'<{self.base_url()}{urlsplit(self.path).path}?{again}>; rel="next"'
        self.send_json(200, entries[start : start + limit], headers)

    def base_url(self) -> str:
        host = self.headers.get("Host")
        return f"http://{host}" if host else self.server.url

    def send_file(self, repo_id: str, repo_type: str, parts: List[str]) -> None:
        """/ID/resolve/REV/PATH"""
        repo = self.server.library.find(repo_type, repo_id)
        if repo is None:
            self.send_error_code(404, "RepoNotFound", "Repository not found")
        elif not parts or parts[0] not in repo.revisions and not self.is_short_commit(parts[0], repo):
            self.send_error_code(404, "RevisionNotFound", f"Invalid rev id: {parts[0] if parts else ''}")
        else:
            file = repo.files.get("/".join(parts[1:]))
            if file is None:
                self.send_error_code(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})
            else:
                self.send_content(repo, file)

    def send_content(self, repo: MirrorRepo, file: MirrorFile) -> None:
        """The bytes of a file, or the range asked for, by sendfile."""
        size = file.remote.size
        headers = {
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(size),
            "X-Linked-Etag": f'"{file.remote.etag}"',
        }
        self.send_bytes(file, f'"{file.remote.etag}"', headers)

    def send_bytes(self, file: MirrorFile, etag: str, headers: Mapping[str, str]) -> None:
        """Answer GET or HEAD for a file, with ranges."""
        size, wanted = file.remote.size, self.headers.get("Range")
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
            with file.location.open("rb") as stream:
                self.send_body(stream, start, stop)

    def send_body(self, stream: IO[bytes], start: int, stop: int) -> None:
        """Bytes [start, stop) of an open file."""
        self.wfile.flush()
        if self.connection.sendfile(stream, start, stop - start) != stop - start:
            self.close_connection = True  # the file became shorter: cut the connection, the client counts bytes

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_json(self, status: int, value: object, headers: Optional[Mapping[str, str]] = None) -> None:
        body = json.dumps(value).encode()
        self.send_head(status, len(body), {"Content-Type": "application/json; charset=utf-8", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error_code(
        self, status: int, code: str, message: str, headers: Optional[Mapping[str, str]] = None
    ) -> None:
        """An error in the Hub's form."""
        named = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.send_json(status, {"error": message}, named)


class MirrorServer(ThreadingHTTPServer):
    """The mirror: one thread per connection."""

    daemon_threads = True
    request_queue_size = 1024  # several hundred clients may connect in the same instant

    def __init__(
        self,
        address: Tuple[str, int],
        library: Library,
        reporter: Reporter,
        handler: Type[HubHandler] = HubHandler,
        tree_page: int = TREE_PAGE,
    ) -> None:
        self.library, self.reporter, self.tree_page = library, reporter, tree_page
        try:
            super().__init__(address, handler)
        except OSError as exc:
            where = f"{address[0]}:{address[1]}"
            step = "choose another --port, or stop what listens there (ss -ltnp)"
            raise HostError(f"cannot listen on {where}", exc.strerror or str(exc), step) from exc

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A fault of one connection ends that connection only; a client that hangs up is no fault."""
        exc = sys.exc_info()[1]
        say = self.reporter.detail if isinstance(exc, (ConnectionError, TimeoutError)) else self.reporter.warn
        say(f"{client_address[0]}: {type(exc).__name__}: {exc}")

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}"


# ======================================================================================
# §19 Command line
#
# Owns the words an operator types. Each command is a row of COMMANDS: its arguments and one thin function that calls
# the sections above and returns the exit code. Nothing here knows how the work is done.
# ======================================================================================


@dataclass(frozen=True)
class Context:
    """What a command gets: its arguments, the settings and the one reporter."""

    args: argparse.Namespace
    settings: Settings
    reporter: Reporter


@dataclass(frozen=True)
class Command:
    """One row of the command table."""

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Context], Exit]


# ---- fetch ---------------------------------------------------------------------------


def fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repos", nargs="+", metavar="REPO[@REV]", help="ORG/NAME, at a branch, tag or commit")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder in which NAME/ appears (default: ~/models)")
    parser.add_argument("--name", help="name of the model folder (default: the last part of REPO)")
    parser.add_argument("--revision", help="revision for REPOs that name none (default: the default branch)")
    parser.add_argument("--repo-type", choices=REPO_TYPES, default="model")
    parser.add_argument("--include", action="append", default=[], metavar="GLOB", help="fetch only these files")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave these files out")
    parser.add_argument("--endpoint", metavar="URL", help="Hub or mirror (default: HF_ENDPOINT or huggingface.co)")
    parser.add_argument("--token-file", metavar="FILE", help="file with the Hub token (default: HF_TOKEN, ~/.cache)")
    parser.add_argument("-j", "--jobs", type=int, metavar="N", help="connections (default: as many as bring more)")
    parser.add_argument("--limit-rate", type=parse_size, metavar="SIZE", help="bytes per second, like 20M")
    parser.add_argument("--mirror", action="append", default=[], metavar="URL", help="ask this mirror of the Hub first")
    parser.add_argument("--all-files", action="store_true", help="also weights in formats that vLLM does not read")
    parser.add_argument("--verify", action="store_true", help="hash what is there and fetch nothing")
    parser.add_argument("--repair", action="store_true", help="hash what is there and fetch only what is wrong")
    parser.add_argument("--engine", choices=("own", "aria2"), default="own", help="aria2: leave the transfer to aria2c")
    parser.add_argument("--dry-run", action="store_true", help="show what would be fetched")


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
            report_fetch(complete, came, time.monotonic() - began, context)
    return summarize_failures(failures, len(requests), reporter)


def fetch_requests(args: argparse.Namespace, endpoint: str) -> List[FetchRequest]:
    """The repositories asked for, with the names of their folders. Raises UsageError when names collide."""
    requests = []
    rehash = args.verify or args.repair
    for text in args.repos:
        repo, revision = parse_repo(text, endpoint)
        name = args.name or repo.rpartition("/")[2]
        make_manifest(name, ())  # refuses what cannot be a folder name
        patterns = tuple(args.include), tuple(args.exclude)
        asked = revision or args.revision
        requests.append(FetchRequest(repo, asked, name, args.repo_type, *patterns, args.all_files, rehash))
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        step = "fetch them one by one with --name"
        raise UsageError("two repositories would go into the same folder", ", ".join(names), step)
    if args.jobs is not None and not 1 <= args.jobs <= 2 * MAX_CONNECTIONS:
        raise UsageError(f"--jobs must be from 1 to {2 * MAX_CONNECTIONS}", "", "leave it out for the default")
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


def remove_if_empty(folder: Path) -> None:
    """Take back a model folder into which nothing came but our lock."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [WORK_DIR] and os.listdir(folder / WORK_DIR) == ["lock"]:
            shutil.rmtree(folder)


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


def fetch_command(plan: FetchPlan, *flags: str) -> str:
    """The command that brings this plan's repository into its folder."""
    source = plan.snapshot.source
    words = [source.repo if source.revision == "main" else f"{source.repo}@{source.revision}", "-o", plan.folder.parent]
    words += ["--name", plan.name] if plan.name != source.repo.rpartition("/")[2] else []
    words += ["--repo-type", source.repo_type] if source.repo_type != "model" else []
    words += ["--endpoint", source.endpoint] if source.endpoint != DEFAULT_ENDPOINT else []
    return command_line("hfship", "fetch", *flags, *words)


def missing_or_wrong(plan: FetchPlan) -> List[HfshipError]:
    """What --verify found."""
    wrong = [job.remote.path for job in plan.jobs if job.target.exists()]
    missing = [job.remote.path for job in plan.jobs if not job.target.exists()]
    step = fetch_command(plan, "--repair")
    errors: List[HfshipError] = []
    if wrong:
        what = f"{plan.folder}: {counted(len(wrong), 'wrong file')}"
        errors.append(IntegrityError(what, ", ".join(wrong[:20]), step))
    if missing:
        what = f"{plan.folder}: {counted(len(missing), 'missing file')}"
        errors.append(IncompleteError(what, ", ".join(missing[:20]), step))
    return errors


def summarize_failures(failures: Sequence[HfshipError], count: int, reporter: Reporter) -> Exit:
    """Say what went wrong with some of a list; its own exit code when there is only one kind of failure."""
    for failure in failures:
        reporter.error(failure)
    if not failures:
        return Exit.OK
    if count > 1:
        reporter.info(f"{counted(len(failures), 'problem')} with {count} repositories; the rest is complete")
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
        with client.reporter.stage("fetching", sum(job.remote.size for job in ours)) as stage:
            Download(client, ours, stage, stop, transfer).run()
        came += stage.total - stage.skipped
    return came


def report_fetch(plans: Sequence[FetchPlan], came: int, seconds: float, context: Context) -> None:
    """Write the manifests and say what is there now; `came` is what all of them together had to fetch (bytes)."""
    rows = []
    for plan in plans:
        manifest, source = finish_fetch(plan), plan.snapshot.source
        fields = {"name": plan.name, "repo": source.repo, "commit": source.commit}
        counts = {"files": len(manifest.files), "bytes": manifest.size, "fetched_files": len(plan.jobs)}
        rows.append({**fields, "folder": str(plan.folder), **counts})
        proof = "every file verified" if plan.jobs or context.args.verify else "verified earlier, nothing to fetch"
        text = f"{counted(len(manifest.files), 'file')}, {human_bytes(manifest.size)}, commit {source.commit[:12]}"
        if not context.args.json:
            context.reporter.result(f"{plan.folder}: {text}; {proof}")
    if context.args.json:
        context.reporter.result_json(rows)
    if came:
        speed = f"{human_bytes(came / seconds)}/s"
        context.reporter.info(f"fetched {human_bytes(came)} in {human_seconds(seconds)} ({speed})")


def show_fetch_plans(plans: Sequence[FetchPlan], context: Context) -> None:
    """The --dry-run table."""
    if context.args.json:
        files = [
            {"name": p.name, "path": f.path, "size": f.size, "etag": f.etag, "present": f.path in p.present}
            for p in plans
            for f in p.wanted
        ]
        context.reporter.result_json(files)
        return
    for plan in plans:
        source = plan.snapshot.source
        rows = [[f.path, human_bytes(f.size), "here" if f.path in plan.present else "missing"] for f in plan.wanted]
        context.reporter.result(f"{source.resolved_repo} at {source.commit} -> {plan.folder}")
        context.reporter.result(table(rows, ["file", "size", "state"]))
        missing = sum(job.remote.size for job in plan.jobs)
        free = human_bytes(free_bytes(plan.folder))
        context.reporter.result(
            f"{len(plan.jobs)} of {counted(len(plan.wanted), 'file')} to fetch, {human_bytes(missing)}; {free} free"
        )


# ---- pack, verify, unpack ------------------------------------------------------------


def _jobs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-j",
        "--jobs",
        type=_positive,
        default=default_jobs(),
        metavar="N",
        help="threads (default: %(default)s, one per core; 1 reads a slow disc in order)",
    )


def _key_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key", type=Path, metavar="PUB.pem", help="require a signature by this key (default: HFSHIP_KEY, else none)"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="NAME|DIR", help="model in the models folder, or any folder")
    parser.add_argument("--all", action="store_true", help="every model in the models folder")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where NAME.tar.zst appears")
    parser.add_argument("--split", metavar="MEDIUM|SIZE", help="cut into parts: fat32, dvd, bd25, bd50, or e.g. 8G")
    parser.add_argument(
        "--to", type=Path, action="append", default=[], metavar="DIR", help="a medium for parts, filled before the next"
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default="standard", help="smallest: floats in byte planes; store: no compression"
    )
    parser.add_argument(
        "--level", type=int, default=1, choices=range(1, 20), metavar="1-19", help="zstd level (default: 1)"
    )
    parser.add_argument(
        "--since", metavar="MANIFEST|ARCHIVE|DIR", help="leave out files that this version has: a delta"
    )
    parser.add_argument("--sign", type=Path, metavar="KEY.pem", help="sign with this private key (ECDSA P-256)")
    parser.add_argument("--name", help="name of the model in the archive (default: as in its manifest)")
    parser.add_argument("--force", action="store_true", help="replace an archive of the same name")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    _jobs_argument(parser)


def cmd_pack(context: Context) -> Exit:
    """Pack models, one after another."""
    args, settings, reporter = context.args, context.settings, context.reporter
    folders = _models_to_pack(args.models, args.all, settings)
    if args.name and len(folders) > 1:
        raise UsageError("--name is for one model", "", "pack them one by one")
    if args.to and (args.output or not args.split):
        raise UsageError(
            "--to is for parts on several media", "", "give --split, and --to for each medium instead of -o"
        )
    out, *media = args.to or [args.output or settings.package_dir]
    options = PackOptions(
        split=parse_split(args.split) if args.split else None,
        level=args.level,
        jobs=args.jobs,
        force=args.force,
        profile=args.profile,
        since=manifest_at(args.since, settings) if args.since else None,
        read_back=bool(args.to),
    )

    def pack(folder: Path) -> Dict[str, Any]:
        plan = plan_pack(folder, manifest_to_pack(folder, args.name, args.jobs, reporter), options)
        if args.dry_run:
            return _plan_row(plan, out)
        packed = pack_model(plan, out, reporter, media)
        for place in [out, *media] if args.sign else []:
            atomic_write(place / (plan.archive + SIGNATURE), sign_manifest(plan.manifest, args.sign))
        return _packed_row(packed)

    _tell_rows(context, map(pack, folders))
    return Exit.OK


def manifest_at(place: str, settings: Settings) -> Manifest:
    """The manifest that is meant by its own path, by an archive, or by a model folder."""
    path = Path(place)
    if path.is_file() and path.suffix == ".json":
        return parse_manifest(path.read_bytes(), place)
    found = find_archives(place, [settings.package_dir, settings.transfer_dir])
    manifest = open_archive(found[0]).manifest if found else read_manifest(find_model(place, settings))
    if manifest is None:
        raise UsageError(f"{place} has no manifest", "", "name a manifest.json, an archive or a model folder")
    return manifest


def _tell_rows(context: Context, rows: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Say the `text` of each row when it comes, or with --json all that came, without their text, at the end."""
    done = []
    try:
        for row in rows:
            text = row.pop("text")
            done.append(row)
            if text and not context.args.json:
                context.reporter.result(text)
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
    places = [Path(name)] if "/" in name or name in (".", "..") else [*(f / name for f in folders), Path(name)]
    return next((Path(os.path.abspath(place)) for place in places if place.is_dir()), None)


def find_model(name: str, settings: Settings) -> Path:
    """The folder of a model to pack or to check. Raises NotFoundError."""
    folders = [settings.models_dir, settings.site_models_dir]
    found = find_folder(name, folders)
    if found is None:
        looked = "" if "/" in name else f"looked in {folders[0]}, {folders[1]} and here"
        raise NotFoundError(f"{name} was not found", looked, "give a path, or: hfship fetch ORG/NAME")
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
    parser.add_argument(
        "targets", nargs="+", metavar="ARCHIVE|PART|DIR|NAME", help="archive, any part, or model folder"
    )
    parser.add_argument("--quick", action="store_true", help="archives: prove the medium by checksums, decode nothing")
    parser.add_argument("--repair-from", metavar="ARCHIVE", help="replace what is damaged by bytes of another copy")
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
    folders = []
    for target in targets:
        found = find_archives(target, [context.settings.transfer_dir, context.settings.package_dir])
        archives += found
        folders += [] if found else [find_model(target, context.settings)]
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
        "error": error and {"what": error.what, "why": error.why, "next": error.next_step},
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
    archive, signed = open_trusted(files, args.key)
    damages = verify_archive(archive, args.jobs, context.reporter, args.quick)
    if damages or not archive.manifest:
        raise archive_error(archive, damages, command_line("hfship", "verify", files.path))
    parts = f" in {counted(len(archive.parts), 'part')}" if files.numbers else ""
    model = f"{counted(len(archive.manifest.files), 'file')}, {human_bytes(archive.manifest.size)}"
    left_out = f"; a delta, {len(archive.absent)} of them come from an older version" if archive.absent else ""
    depth = "; only checksums were proven" if args.quick else ""
    by = f"; signed by {signed.fingerprint}" if signed else ""
    size = f"{human_bytes(archive.size)}{parts}, {counted(len(archive.frames), 'frame')}"
    return f"{repaired}{size}, {model}{left_out}{depth}{by}"


def _verify_folder(folder: Path, context: Context) -> str:
    manifest = read_manifest(folder)
    if manifest is None:
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
    return f"{counted(len(manifest.files), 'file')}, {human_bytes(manifest.size)}{by}"


def unpack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "archives", nargs="+", metavar="ARCHIVE|PART|NAME", help="archive, any part, their folder, or NAME"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where the folder NAME appears")
    parser.add_argument("--name", help="name of the folder (default: as in the archive)")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="restore only these files")
    parser.add_argument("--consume", action="store_true", help="remove parts as their files are safe, to save room")
    parser.add_argument("--wait", action="store_true", help="ask for media with missing parts, and wait for them")
    _key_argument(parser)
    parser.add_argument("--base", type=Path, metavar="DIR", help="an older version with files that a delta leaves out")
    parser.add_argument("--force", action="store_true", help="replace a folder that has files of its own")
    _jobs_argument(parser)


def cmd_unpack(context: Context) -> Exit:
    """Unpack archives, one after another."""
    args, settings, reporter = context.args, context.settings, context.reporter
    found = merged(files for argument in args.archives for files in _archives_to_unpack(argument, settings))
    if args.name and len(found) > 1:
        raise UsageError("--name is for one archive", "", "unpack them one by one")
    out = args.output or settings.site_models_dir

    options = UnpackOptions(tuple(args.only), args.base, args.consume)

    def unpack(files: ArchiveFiles) -> Dict[str, Any]:
        media = MediaChange(files, reporter) if args.wait else None
        archive, signed = open_trusted(media.with_tables() if media else files, args.key, media)
        if signed:
            reporter.info(f"{files.name}: signed by {signed.fingerprint}")
        done = unpack_archive(archive, out, args.name, args.jobs, args.force, reporter, options)
        with contextlib.suppress(FileNotFoundError):
            bundle = (files.folder / (files.name + SIGNATURE)).read_bytes()
            atomic_write(done.folder / SIGNATURE_PATH, bundle)
        return _unpacked_row(done)

    _tell_rows(context, map(unpack, found))
    return Exit.OK


def _archives_to_unpack(argument: str, settings: Settings) -> List[ArchiveFiles]:
    found = find_archives(argument, [settings.transfer_dir, settings.package_dir])
    if not found:
        looked = "" if "/" in argument else f"looked in {settings.transfer_dir} and {settings.package_dir}"
        raise NotFoundError(f"no archive {argument}", looked, "give the path of NAME.tar.zst or of any part")
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
        "text": f"unpacked {done.folder}: {counted(count, 'file')}, {human_bytes(size)} {how}",
    }


# ---- serve, status, stop, logs -------------------------------------------------------


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Options whose `dest` is a field of ServeOptions become that field."""
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME|DIR", help="a model of the models folders, or its folder")
    add("--plan", action="store_true", help="say how it would be served, and do nothing")
    add("--write-only", action="store_true", help="write the deployment's files without starting it")
    add("--name", help="name of the deployment (default: the folder's name)")
    add = parser.add_argument_group("model").add_argument
    add("--served-model-name", dest="served_names", action="append", default=[], metavar="NAME", help="name in the API")
    add("--max-model-len", type=_positive, default=0, metavar="TOKENS", help="context (default: the most that fits)")
    add("--max-num-seqs", type=_positive, default=0, metavar="N", help="requests at a time")
    add("--dtype", default="auto", help="bfloat16, float16, float32 (default: the model's)")
    add("--kv-cache-dtype", default="auto", metavar="DTYPE", help="fp8 halves the KV cache (default: the model's)")
    add("--trust-remote-code", action="store_true", help="run the Python code that the model brings")
    add("--env", action="append", default=[], metavar="K=V", help="variable of the container; repeatable")
    passed_on = "passed on to vllm serve, as is everything after --"
    add("--extra-arg", dest="extra_args", action="append", default=[], metavar="ARG", help=passed_on)
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "gpu", "cpu"), default="auto", help="default: %(default)s")
    add("--gpus", default="", metavar="0,1|UUID", help="GPUs that may be used (default: the free ones)")
    add("--tensor-parallel-size", "-tp", type=_positive, default=0, metavar="N", help="GPUs to split it over")
    add("--gpu-memory-utilization", type=_share, default=0.9, metavar="0.9", help="share of each GPU that it takes")
    add("--assume-gpus", metavar="2xH100|2x80GB", help="with --plan: plan for a machine with these")
    add("--image", default="", help="docker image (default: the newest vLLM image that is loaded)")
    add("--host", dest="bind", type=_address, default="127.0.0.1", metavar="IP", help="to listen on (%(default)s)")
    add("--port", type=_port, default=0, help="port to listen on (default: the first free one from 8000)")
    add("--shm-size", default="", metavar="SIZE", help="shared memory of the container, like 16gb")
    wait = "to wait until it answers (default: %(default)s)"
    add("--timeout", dest="ready_timeout_s", type=_positive, default=3600, metavar="SECONDS", help=wait)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def _port(text: str) -> int:
    if _positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def serve_options(args: argparse.Namespace) -> ServeOptions:
    """What the operator asked for. Raises UsageError."""
    env = dict(item.partition("=")[::2] for item in args.env)
    for name, value in env.items():
        require_env(name, value)
    if args.shm_size:
        parse_size(args.shm_size)
    if args.assume_gpus and not args.plan:
        raise UsageError("--assume-gpus is for planning", "it describes a machine that is not here", "add --plan")
    if len(args.names) > 1 and (args.port or args.name or args.served_names):
        raise UsageError("--port, --name and --served-model-name are for one model", "", "serve them one by one")
    gpus = [] if args.gpus == "all" else list(filter(None, args.gpus.split(",")))
    extra = [*args.extra_args, *getattr(args, "passed_on", ())]
    return ServeOptions(**known_fields(ServeOptions, {**vars(args), "env": env, "gpus": gpus, "extra_args": extra}))


def _address(text: str) -> str:
    """docker publishes ports on addresses, not on names."""
    with contextlib.suppress(OSError):
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not an IP address (0.0.0.0 listens on all)")


def cmd_serve(context: Context) -> Exit:
    """Serve models: plan, write the files, start, wait for a real answer."""
    options = serve_options(context.args)
    _tell_rows(context, (serve_model(context, word, options) for word in context.args.names))
    return Exit.OK


def serve_model(context: Context, word: str, options: ServeOptions) -> Dict[str, Any]:
    """Serve one model, NAME or DIR; the row that says what came of it."""
    args, reporter = context.args, context.reporter
    folder = find_served_model(context, word)
    name = make_manifest(args.name or folder.name, ()).name  # refuses what cannot be a name
    facts = read_facts(folder)
    manifest = read_manifest(folder)
    # Clients know the model by its name here or by its name on the Hub.
    hub_names = (manifest.source.repo,) if manifest and manifest.source else ()
    options = replace(options, served_names=options.served_names or (name, *hub_names))
    if args.plan:
        return planned_row(context, name, folder, facts, options)
    require_docker()
    with FolderLock(context.settings.deploy_dir):  # two at a time would choose the same port and GPUs
        plan = decide(context, name, folder, facts, options)
        deployment = write_deployment(context.settings.deploy_dir / name, plan, reporter)
        for warning in plan.warnings:
            reporter.warn(f"{name}: {warning}")
        reporter.info(plan_summary(plan))
        if args.write_only:
            start_it = f"cd {shlex.quote(str(deployment.folder))} && docker compose up -d"
            text = f"wrote {deployment.folder}\n  start    {start_it}"
            return {"name": name, "state": "written", "folder": str(deployment.folder), "text": text}
        restarts = start(deployment)
    return served_row(deployment, facts, wait_until_it_answers(deployment, restarts, reporter))


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
    archive, _ = open_trusted(archives[0], None)
    return unpack_archive(archive, settings.site_models_dir, None, default_jobs(), False, context.reporter).folder


def decide(context: Context, name: str, folder: Path, facts: ModelFacts, options: ServeOptions) -> Plan:
    """The plan for this machine as it is now."""
    deployments = list_deployments(context.settings.deploy_dir, context.reporter)
    plans = {d.plan.name: d.plan for d in deployments}
    running = [n for n in plans if (inspect_container(n) or Container("", "")).status == "running"]
    host = read_host(list_images())
    device = choose_device(options, host)
    if device == "cpu" and options.device == "auto":
        context.reporter.info("no GPU here, and the image is built for CPUs: serving on the CPU")
    image = read_image(choose_image(host.images, options.image, device))
    previous = plans.pop(name, None)
    held = previous.port if previous and name in running else None
    if previous and name not in running:
        previous = replace(previous, gpus=())
    ports = [options.port] if options.port else PORTS
    taken = {p for p in ports if p != held and not port_is_free(options.bind, p)} | {p.port for p in plans.values()}
    gpus = with_claims(host.gpus, [plan for other, plan in plans.items() if other in running])
    host = replace(host, gpus=gpus, taken_ports=frozenset(taken))
    return make_plan(name, str(folder.resolve()), facts, host, image, replace(options, device=device), previous)


def planned_row(context: Context, name: str, folder: Path, facts: ModelFacts, options: ServeOptions) -> Dict[str, Any]:
    """--plan: works without docker and GPU, and then says what would be needed."""
    reporter, assumed = context.reporter, context.args.assume_gpus
    images: Tuple[Image, ...] = ()
    try:
        images = list_images()
    except HostError as exc:
        reporter.warn(f"{exc.what} ({exc.why})")
    host = read_host(images)
    host = replace(host, gpus=assumed_gpus(assumed)) if assumed else host
    row = {"name": name, "facts": asdict(facts)}
    try:
        device = choose_device(options, host)
    except HostError as exc:
        if options.device == "gpu":
            raise
        reporter.warn(f"{exc.what} ({exc.why}); --assume-gpus 2xH100 plans for another machine")
        rows = sizing(facts, options)
        header = ["split", "weights per GPU", "for a short context", "for the full context"]
        return {**row, "sizing": rows, "text": f"{facts_summary(name, facts)}\n{table(rows, header)}"}
    try:
        image = read_image(choose_image(images, options.image, device))
    except HostError as exc:
        if images:
            reporter.warn(f"{exc.what} ({exc.why})")
        image = Image(options.image or "vllm/vllm-openai", "", parse_version(options.image), device == "cpu")
    plan = make_plan(name, str(folder.resolve()), facts, host, image, replace(options, device=device))
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
        cache=f"{cache}, enough for about {plan.concurrency:g} requests of full length",
        names=", ".join(plan.served_names),
        address=plan.url,
    )


def labelled(**rows: str) -> str:
    """Lines with a label each.

    >>> print(labelled(runs_on="CPU"))
      runs on  CPU
    """
    return "\n".join(f"  {label.replace('_', ' '):<8} {text}" for label, text in rows.items() if text)


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
    parser.add_argument("names", nargs="+", metavar="NAME", help="deployments")


def logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="deployment")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    parser.add_argument("--tail", default="all", metavar="N", help="only the last N lines")


def named_deployment(context: Context, name: str) -> Deployment:
    """The deployment called `name`. Raises NotFoundError."""
    folder = context.settings.deploy_dir / make_manifest(name, ()).name
    found = read_deployment(folder, context.reporter)
    if found is None:
        here = [d.plan.name for d in list_deployments(context.settings.deploy_dir, context.reporter)]
        why = f"in {folder.parent} there are: {', '.join(here) or 'none'}"
        raise NotFoundError(f"no such deployment: {name}", why, f"hfship serve {name}")
    return found


_STATE_EXIT = {"healthy": Exit.OK, "loading": Exit.INCOMPLETE, "degraded": Exit.INCOMPLETE}  # down, unknown: HOST


def cmd_status(context: Context) -> Exit:
    """The state of deployments, each proven by a real request. Without docker it is unknown, and said so."""
    names, deploy_dir = context.args.names, context.settings.deploy_dir
    found = [named_deployment(context, n) for n in names] or list_deployments(deploy_dir, context.reporter)
    problem = ""
    try:
        if found:
            require_docker()
    except HostError as exc:
        problem = exc.what
        context.reporter.error(exc)
    rows = [deployment_status(d, problem) for d in found]
    if context.args.json:
        context.reporter.result_json(rows)
    elif rows:
        columns = ("name", "state", "image", "url", "gpus", "uptime", "answer", "note")
        context.reporter.result(table([[status_cell(row[c]) for c in columns] for row in rows], columns))
    else:
        context.reporter.info(f"no deployments in {deploy_dir}")
    return max((_STATE_EXIT.get(str(row["state"]), Exit.HOST) for row in rows), default=Exit.OK)


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
    return "-" if value is None else human_seconds(value) if isinstance(value, int) else str(value)


def cmd_stop(context: Context) -> Exit:
    """Stop deployments; their files, key and compile cache stay."""
    found = [named_deployment(context, name) for name in context.args.names]
    require_docker()

    def stop(deployment: Deployment) -> Dict[str, Any]:
        name = deployment.plan.name
        docker(compose(deployment, "down"), f"stop {name}", COMPOSE_TIMEOUT_S, name)
        return {"name": name, "state": "down", "text": f"stopped {name}; {deployment.folder} stays"}

    _tell_rows(context, map(stop, found))
    return Exit.OK


def cmd_logs(context: Context) -> Exit:
    """The log of a deployment."""
    if not re.match(r"(all|\d+)$", context.args.tail):
        raise UsageError(f"--tail {context.args.tail} is not a number", "", "hfship logs NAME --tail 100")
    deployment = named_deployment(context, context.args.name)
    require_docker()
    return stream_logs(deployment, context.args.follow, context.args.tail, context.reporter)


# ---- mirror --------------------------------------------------------------------------


def mirror_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", metavar="DIR", help="folder with NAME/ or ORG/NAME/ (default: the models folder)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8090, help="port, 0 for any free one (default: %(default)s)")


def cmd_mirror(context: Context) -> Exit:
    """Serve until interrupted."""
    settings, args = context.settings, context.args
    default = settings.site_models_dir if settings.site_models_dir.is_dir() else settings.models_dir
    folder = Path(args.folder).expanduser() if args.folder else default
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no folder {folder}", "", "hfship mirror DIR, with DIR holding NAME/ or ORG/NAME/"
        )
    library = Library(folder)
    with MirrorServer((args.host, args.port), library, context.reporter) as server:
        names = sorted(repo.repo for repo in library.repos().values())
        if not names:
            context.reporter.warn(f"{folder} holds no model yet; new ones are found while the mirror runs")
        context.reporter.result(f"serving {folder} at {server.url}: {', '.join(names) or 'nothing yet'}")
        context.reporter.info(f"use it with: HF_ENDPOINT={server.url} hf download {names[0] if names else 'ORG/NAME'}")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return Exit.OK


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
    source = Path(__file__).absolute()
    path = source.parent if source.parent.is_file() else source  # /x/hfship.pyz/hfship.py
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
    if context.args.verify and path == source:
        facts["verify"] = ("nothing to verify", "hfship.py runs from source")
    elif context.args.verify:
        facts["verify"] = ("as it was built", f"sha256 {verify_own_file(path)}")
    if context.args.json:
        context.reporter.result_json(
            {name: {"version": what, "origin": where} for name, (what, where) in facts.items()}
        )
    else:
        for name, (what, where) in facts.items():
            context.reporter.result(f"{name:<7} {what} ({where})".replace("\n", "; "))
    return Exit.OK


# ---- the table and main --------------------------------------------------------------

COMMANDS: Tuple[Command, ...] = (
    Command("fetch", "download models from the Hub, resumable and verified", fetch_arguments, cmd_fetch),
    Command("pack", "pack models into NAME.tar.zst, whole or in parts", pack_arguments, cmd_pack),
    Command(
        "verify",
        "prove archives or model folders offline; names what is damaged and the shortest repair",
        verify_arguments,
        cmd_verify,
    ),
    Command("unpack", "restore models from archives, verified", unpack_arguments, cmd_unpack),
    Command(
        "serve", "put models into service with vLLM in docker, and wait until they answer", serve_arguments, cmd_serve
    ),
    Command(
        "status",
        "show whether deployments answer; exit code 0 healthy, 3 loading or degraded, 9 down or unknown",
        names_arguments,
        cmd_status,
    ),
    Command("stop", "stop deployments; their files and key stay", stop_arguments, cmd_stop),
    Command("logs", "show the log of a deployment", logs_arguments, cmd_logs),
    Command("mirror", "serve a folder of models as a private, read-only Hub", mirror_arguments, cmd_mirror),
    Command(
        "version", "print version, Python and zstd backend; --verify checks this file", version_arguments, cmd_version
    ),
)

# Each command shows its own lines.
EXAMPLES = """\
hfship fetch Qwen/Qwen3-8B
hfship fetch org/name@v1.0 --exclude 'onnx/' -o /mnt/disk
hfship pack Qwen3-14B
hfship pack --split fat32 -o /media/usb Qwen3-14B
hfship verify /media/usb/Qwen3-14B.tar.zst.0001
hfship verify /data/models/huggingface/Qwen3-14B
hfship unpack /data/transfer/Qwen3-14B.tar.zst
hfship unpack Qwen3-14B -o /data/models/huggingface
hfship serve Qwen3-8B
hfship serve Qwen3-8B --plan --assume-gpus 2xH100
hfship serve Llama-3.1-70B --gpus 0,1 --max-model-len 32768 -- --enable-auto-tool-choice
hfship status
hfship status Qwen3-8B --json
hfship stop Qwen3-8B
hfship logs Qwen3-8B --tail 100
hfship logs Qwen3-8B -f
hfship mirror /data/models/huggingface --host 0.0.0.0     # then: HF_ENDPOINT=http://HOST:8090 hf download ORG/NAME
hfship version
hfship version --verify
"""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command takes."""
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="warnings and errors only")
    group.add_argument("-v", "--verbose", action="store_true", help="say more")
    group.add_argument("--json", action="store_true", help="results as JSON on stdout")
    choices = ("auto", "bar", "plain", "json", "none")
    group.add_argument(
        "--progress", choices=choices, default="auto", help="how progress is shown (default: %(default)s)"
    )


def build_parser() -> argparse.ArgumentParser:
    """The argument parser, made from COMMANDS."""
    parser = argparse.ArgumentParser(
        prog=program_name(),
        description="Carry Hugging Face models across an air gap and put them into service.",
        epilog="exit codes: 0 ok, 2 usage, 3 incomplete but resumable, 4 auth or gated, 5 not found, 6 integrity, "
        "7 disk, 8 network, 9 this machine cannot do it, 130 interrupted with state saved",
    )
    parser.add_argument("--version", action="version", version=f"hfship {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        examples = [as_typed(line) for line in EXAMPLES.splitlines() if line.split()[1] == command.name]
        sub = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="\n  ".join(["examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
        add_common_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _terminate(*_: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C: state saved, exit code 130."""
    raise KeyboardInterrupt


def split_passed_on(words: Sequence[str]) -> Tuple[Sequence[str], Sequence[str]]:
    """What is ours and, after `--`, what `serve` passes on to vLLM. argparse cannot tell them apart.

    >>> split_passed_on(["serve", "M", "--", "--enforce-eager"])
    (['serve', 'M'], ['--enforce-eager'])
    """
    if "--" not in words or words[0] != "serve":
        return words, []
    at = list(words).index("--")
    return words[:at], words[at + 1 :]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; the only place where errors become exit codes."""
    words, passed_on = split_passed_on(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.passed_on = passed_on
    reporter = Reporter(args.progress, args.verbose - args.quiet)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        settings = load_settings(os.environ, getattr(args, "endpoint", None))
        return int(args.run(Context(args, settings, reporter)))
    except HfshipError as exc:
        reporter.error(exc)
        return int(exc.code)
    except KeyboardInterrupt:
        reporter.error(Interrupted("interrupted", "", "run the same command again: it goes on where it stopped"))
        return int(Exit.INTERRUPTED)
    except BrokenPipeError:  # the reader of our stdout (head, less) went away
        silence_stdout()
        return int(Exit.OK)


if __name__ == "__main__":
    sys.exit(main())
