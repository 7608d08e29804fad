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
     8  frames                     zstd backends, independent frames, seek table, parts
     9  pack                       tar stream -> frames -> parts, sidecars
    10  unpack                     verify, locate damage, parallel restore
    11  signatures                 (reserved)
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
import contextlib
import errno
import fcntl
import hashlib
import importlib
import importlib.machinery
import json
import os
import platform
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import weakref
import zlib
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import (
    IO,
    Any,
    Callable,
    Iterable,
    List,
    Mapping,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

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
        """The error as it is printed.

        >>> print(UsageError("no such model: x", "~/models has no folder x", "hfship fetch ORG/x").text())
        hfship: no such model: x
          why   ~/models has no folder x
          next  hfship fetch ORG/x
        """
        lines = [f"hfship: {self.what}"]
        for label, text in (("why", self.why), ("next", self.next_step)):
            if text:
                lines.append(f"  {label:<5} " + text.replace("\n", "\n        "))
        return "\n".join(lines)


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


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> [human_seconds(s) for s in (0.21, 59.7, 61, 3700)]
    ['0.2 s', '59.7 s', '1 min 01 s', '1 h 01 min']
    """
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
        self._skipped = 0
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
            self._skipped += count

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return (self.done - self._skipped) / max(self.seconds, 1e-6)

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
    """Renders nothing."""

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
            self._bar.total = self._stage.total
            self._bar.update(self._stage.done - self._bar.n)
            if final:
                self._bar.close()
                self._reporter.bar = None


_Progress = Union[_NoProgress, _PlainProgress, _JsonProgress, _BarProgress]


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
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.log = log
        self.verbosity = verbosity
        self.progress = ("bar" if self.err.isatty() else "plain") if progress == "auto" else progress
        self.lock = threading.RLock()
        self.bar: Any = None
        self._secrets: Set[str] = set()

    def hide(self, secret: str) -> None:
        """Register a secret: it is replaced by *** in everything said from now on."""
        if secret:
            self._secrets.add(secret)

    def result(self, text: str) -> None:
        """A result of the command, to stdout."""
        with self.lock:
            self.out.write(redact(text, self._secrets) + "\n")
            self.out.flush()

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
            fields = {"what": error.what, "why": error.why, "next": error.next_step, "exit_code": int(error.code)}
            self.event("error", **fields)
        else:
            self._say("error", error.text())

    def event(self, kind: str, **fields: object) -> None:
        """One JSON line to stderr, where --progress json asked for events."""
        if self.progress == "json":
            clean = {k: redact(v, self._secrets) if isinstance(v, str) else v for k, v in fields.items()}
            self._write(json.dumps({"event": kind, **clean}, ensure_ascii=False))

    def stage(self, name: str, total: int, unit: str = "B") -> Stage:
        """A step with progress; use as a context manager."""
        return Stage(self, name, total, unit)

    def progress_renderer(self, stage: Stage) -> _Progress:
        """How this reporter shows a stage."""
        if self.verbosity < 0 or self.progress == "none":
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
            return Token(value, f"environment variable {variable}")
    cache = env.get("XDG_CACHE_HOME") or "~/.cache"
    home = env.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.path.expanduser(os.path.expandvars(env.get("HF_TOKEN_PATH") or f"{home}/token")))
    return read_token_file(path) if path.is_file() else None


def read_token_file(path: Path) -> Optional[Token]:
    """The token in a file, stripped; None when the file is empty."""
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise AuthError(f"cannot read the token file {path}", str(exc), f"chmod u+r {path}, or set HF_TOKEN") from exc
    return Token("".join(value.split()), f"file {path}") if value else None


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
    return DiskError(
        f"cannot {doing} {path}: {reason}", "", next_step or "free space or fix access, then run the same command again"
    )


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, content: Union[str, bytes], mode: int = 0o644) -> None:
    """Write a small file so that it is there complete or not at all, also across a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        try:
            os.fchmod(fd, mode)
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
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


class FolderLock:
    """One hfship at a time per folder: an flock on `.hfship/lock` that tells who holds it.

    Correctness never rests on it (flock is a no-op on some network filesystems): files are verified before they get
    their final name, so a lost race costs bandwidth, never bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / WORK_DIR / "lock"
        self._fd = -1

    def __enter__(self) -> FolderLock:
        make_dir(self._path.parent)
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as exc:
            raise disk_error(exc, "open the lock", self._path) from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(self._fd)
            why = f"{holder} holds {self._path}"
            raise IncompleteError(f"{self.folder} is in use by another hfship", why, "wait for it, or stop it") from exc
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


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
# ======================================================================================


# ======================================================================================
# §7 Download
# ======================================================================================


# ======================================================================================
# §8 Frames
# ======================================================================================

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
BUILD_TABLE = "hfship-build.json"  # {"version", "entries": {name: SHA-256}}: what build_zipapp.py put into this file

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


# ======================================================================================
# §9 Pack
# ======================================================================================


# ======================================================================================
# §10 Unpack
# ======================================================================================


# ======================================================================================
# §13 Model facts
# ======================================================================================


# ======================================================================================
# §14 Plan
# ======================================================================================


# ======================================================================================
# §15 Deployment files
# ======================================================================================


# ======================================================================================
# §16 Docker
# ======================================================================================


# ======================================================================================
# §17 Mirror
# ======================================================================================


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
    examples: str = ""


# ---- fetch ---------------------------------------------------------------------------

# ---- pack, verify, unpack ------------------------------------------------------------

# ---- serve, status, stop, logs -------------------------------------------------------

# ---- mirror --------------------------------------------------------------------------

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
    Command(
        "version", "print version, Python and zstd backend; --verify checks this file", version_arguments, cmd_version
    ),
)


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
        prog="hfship",
        description="Carry Hugging Face models across an air gap and put them into service.",
        epilog="exit codes: 0 ok, 2 usage, 3 incomplete but resumable, 4 auth or gated, 5 not found, 6 integrity, "
        "7 disk, 8 network, 9 this machine cannot do it, 130 interrupted with state saved",
    )
    parser.add_argument("--version", action="version", version=f"hfship {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"examples:\n{command.examples}" if command.examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
        add_common_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _terminate(*_: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C: state saved, exit code 130."""
    raise KeyboardInterrupt


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command; the only place where errors become exit codes."""
    args = build_parser().parse_args(argv)
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return int(Exit.OK)


if __name__ == "__main__":
    sys.exit(main())
