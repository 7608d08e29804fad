# SPDX-License-Identifier: Apache-2.0
"""The log of custody: who did what with a model, in which order.

Format of NAME.tar.zst.custody.jsonl beside an archive, and of .hfship/custody.jsonl in a model
folder: UTF-8, a JSON object on each line, keys sorted, no blanks, LF at the end:

  {"at": UTC, "details": {...}, "event": "packed", "host": H, "key": fingerprint or "",
   "manifest": SHA-256 of manifest.json, "model": NAME, "n": 1, 2, ..., "previous": SHA-256 of the
   line before with its LF (64 zeros for the first), "user": U}

A line that was added behind a break has "broken" with what was found wrong. The log is no part of
an archive's bytes.

Promises: lines are only added; a break in the chain is told for good, and never mended. Never:
proves that somebody told the truth: it is evidence of order, and who holds the file alone can write
a whole new one. What binds it to a person is a signature: `sign` signs the last line's SHA-256.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Tuple

from hfship.base.below import opened_below
from hfship.base.files import WORK_DIR, write_all, write_below
from hfship.base.locks import host_name
from hfship.base.reading import parse_json, read_below, read_whole
from hfship.base.text import harmless, utc_exact
from hfship.base.values import dataclass, field

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.manifest import Manifest

CUSTODY = ".custody.jsonl"  # suffix of the log beside an archive
CUSTODY_PATH = f"{WORK_DIR}/custody.jsonl"  # in a model folder
FIRST = "0" * 64  # "previous" of the first line
LARGEST_LOG = 32 << 20  # bytes
_TEXTS = ("at", "event", "host", "key", "manifest", "model", "previous", "user")


@dataclass(frozen=True)
class Event:
    """What is to be noted: what was done with the model whose manifest has that SHA-256, with
    which key ("": none), and details that are texts, numbers or truths."""

    event: str
    model: str
    manifest: str
    key: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A line of a log as it was read; `problem` says what is wrong with it, "" where nothing is."""

    number: int
    fields: Mapping[str, Any]
    sha256: str
    problem: str = ""


@dataclass(frozen=True)
class Chain:
    """A log that was read: its lines, and all that is wrong with it."""

    lines: Tuple[Line, ...] = ()
    cut: bool = False  # the last line has no end

    @property
    def problems(self) -> List[str]:
        """What is wrong, in the order of the lines; also what was noted when it was found."""
        found: List[str] = []
        for line in self.lines:
            if line.problem:
                found.append(f"line {line.number}: {line.problem}")

            told = line.fields.get("broken")
            if told:
                found.append(f"line {line.number} tells: {told}")
        if self.cut:
            found.append("the last line is cut")
        return found

    @property
    def head(self) -> str:
        """SHA-256 of the last line; FIRST without one."""
        if not self.lines:
            return FIRST
        return self.lines[-1].sha256


def event_of(
    event: str, manifest: Manifest, key: str = "", details: Mapping[str, Any] = MappingProxyType({})
) -> Event:
    """An event of the model that a manifest lists."""
    text = manifest.to_json()
    digest = hashlib.sha256(text.encode())
    sha256 = digest.hexdigest()
    return Event(
        event,
        manifest.name,
        sha256,
        key,
        details,
    )


# -- the chain


def read_chain(content: bytes) -> Chain:
    """The lines of a log, and what is wrong with them.

    >>> event = Event("packed", "m", "0" * 64)
    >>> whole = next_line(b"", event, "2026-01-01T00:00:00Z", "kim", "host")
    >>> read_chain(whole).problems, read_chain(whole[:-3]).problems
    ([], ['line 1: it is no entry', 'the last line is cut'])
    """
    if not content:
        return Chain()
    rows = content.split(b"\n")
    cut = rows.pop() != b""
    if cut:
        rows = content.split(b"\n")

    lines: List[Line] = []
    previous = FIRST
    for number, row in enumerate(rows, 1):
        whole = row + b"\n"
        sha256 = hashlib.sha256(whole).hexdigest()
        fields = _fields_of(row)
        problem = _problem_of(fields, number, previous)
        lines.append(Line(number, fields, sha256, problem))
        previous = sha256
    return Chain(tuple(lines), cut)


def _fields_of(row: bytes) -> Dict[str, Any]:
    """The fields of a line; {} for one that is no entry."""
    try:
        value = parse_json(row)
    except ValueError:
        return {}
    if not isinstance(value, dict) or type(value.get("n")) is not int:
        return {}
    for name in _TEXTS:
        if not isinstance(value.get(name), str):
            return {}
    return value


def _problem_of(fields: Mapping[str, Any], number: int, previous: str) -> str:
    """What is wrong with a line that is the `number`th, behind one with that SHA-256."""
    if not fields:
        return "it is no entry"
    if fields["n"] != number:
        return f"it says that it is line {fields['n']}"
    if fields["previous"] != previous:
        if number == 1:
            return "it is not the first one: what was before it is missing"
        return f"it was not written behind line {number - 1}"
    return ""


def next_line(content: bytes, event: Event, at: str, user: str, host: str) -> bytes:
    """The line that notes an event behind a log, with its LF, and with one in front where the last
    line was cut."""
    chain = read_chain(content)
    fields = {
        "n": len(chain.lines) + 1,
        "previous": chain.head,
        "at": at,
        "event": event.event,
        "model": event.model,
        "manifest": event.manifest,
        "user": user,
        "host": host,
        "key": event.key,
        "details": dict(event.details),
    }
    problems = [f"line {line.number}: {line.problem}" for line in chain.lines if line.problem]
    if chain.cut:
        problems.append("the last line was cut")
    if problems:
        fields["broken"] = "; ".join(problems[:3])
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    line = text.encode() + b"\n"
    if chain.cut:
        return b"\n" + line
    return line


def who() -> Tuple[str, str]:
    """(user, host) that are noted."""
    number = os.getuid()
    user = str(number)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(number).pw_name

    host = host_name()
    return harmless(user), harmless(host)


# -- files


def add_line(folder: Path, path: str, event: Event) -> bytes:
    """Note an event at the end of a log below a folder, which may not be there yet. Returns the
    whole log. Raises OSError."""
    user, host = who()
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    with opened_below(folder, path, flags) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        content = read_whole(fd, LARGEST_LOG, folder / path)
        line = next_line(content, event, utc_exact(), user, host)
        write_all(fd, line)
        os.fsync(fd)
    return content + line


def log_in(folder: Path) -> bytes:
    """The log of a model folder; b"" where there is none. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        return read_below(folder, CUSTODY_PATH, LARGEST_LOG)
    return b""


def log_beside(files: ArchiveFiles) -> bytes:
    """The log beside an archive; b"" where there is none. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        name = files.name + CUSTODY
        return read_below(files.folder, name, LARGEST_LOG)
    return b""


def take_along(folder: Path, brought: bytes) -> None:
    """Put the log that came with an archive into the model folder that was made of it.

    One that lies there and goes on from it stays. Raises OSError.
    """
    present = log_in(folder)
    if not present.startswith(brought):
        write_below(folder, CUSTODY_PATH, brought)
