# SPDX-License-Identifier: Apache-2.0
"""NAME.tar.zst.incomplete: the lock of a run that packs, and what a killed one left for the next.

Owns the list of parts that are complete, whose format is docs/formats.md, "Pack under way": a line
that names the plan, then a line of JSON for each part, in the order in which they were completed.
Promises: a part is gone on with only if every byte of it is still as it was written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from hfship.archive.files import part_name
from hfship.archive.frames import read_units
from hfship.archive.schedule import workers_for
from hfship.base.below import folder_below, open_in, owner_in
from hfship.base.files import (
    INCOMPLETE,
    disk_errors,
    pread_exactly,
    rename_durably,
    sha256_file,
    write_all,
)
from hfship.base.locks import InUseError
from hfship.base.processes import signals_held
from hfship.base.reading import parse_json
from hfship.base.values import dataclass
from hfship.base.workers import Workers

if TYPE_CHECKING:
    from hfship.archive.pack_plan import PackPlan
    from hfship.archive.part_cut import Group
    from hfship.base.report import Reporter

_LARGEST_JOURNAL = 1 << 26  # bytes that are read of it


@dataclass(frozen=True)
class WrittenPart:
    """A complete file of an archive: its final path, bytes and hex SHA-256."""

    path: Path
    size: int
    sha256: str

    @property
    def unfinished(self) -> Path:
        """Where it lies until all of the archive is complete."""
        return self.path.with_name(self.path.name + INCOMPLETE)


@dataclass(frozen=True)
class DonePart:
    """A complete part of an archive, as long as others are not: it lies at `path`, and has the
    units of `count` frames from number `first` on, and the tables if it is the last."""

    first: int
    count: int
    path: Path
    size: int
    sha256: str

    @property
    def last(self) -> int:
        """The first frame behind those in it."""
        return self.first + self.count


class FoundPart(NamedTuple):
    """A complete part that an earlier run left: (bytes, CRC-32) of the units in it, and whether
    the tables follow."""

    part: DonePart
    units: Sequence[Tuple[int, int]]
    tables: bool


@dataclass(frozen=True)
class Resumed:
    """What a killed run left: complete parts, in the order of the archive."""

    found: Tuple[FoundPart, ...] = ()

    @property
    def parts(self) -> List[DonePart]:
        """The parts."""
        return [found.part for found in self.found]

    def whole(self, groups: Sequence[Group]) -> Resumed:
        """The parts that this run goes on with: those that hold all frames of a group. The part
        with the tables is of use only if nothing else is missing."""
        by_first = {found.part.first: found for found in self.found}
        whole: List[FoundPart] = []
        for group in groups:
            whole += _parts_of(group, by_first)

        tables = by_first.get(groups[-1].last)
        if tables and tables.tables:
            whole.append(tables)
        frames = sum(found.part.count for found in whole)
        if not any(found.tables for found in whole) or frames == groups[-1].last:
            return Resumed(tuple(whole))
        return Resumed(tuple(found for found in whole if not found.tables)).whole(groups)

    @property
    def complete(self) -> bool:
        """Whether the tables are there: then all is."""
        return bool(self.found) and self.found[-1].tables


def _parts_of(group: Group, by_first: Mapping[int, FoundPart]) -> List[FoundPart]:
    """The parts that hold the frames of a group; none unless they hold all."""
    parts: List[FoundPart] = []
    at = group.first
    while at < group.last:
        found = by_first.get(at)
        if found is None or not found.part.count or found.part.last > group.last:
            return []
        parts.append(found)
        at = found.part.last
    return parts


@contextlib.contextmanager
def claim(path: Path, journal: bool = False) -> Iterator[int]:
    """The descriptor of NAME.tar.zst.incomplete, held so that no second hfship packs the same
    archive into the same folder. With `journal` it stays for the next run while it is not empty.

    Raises InUseError, DiskError when the file cannot be made.
    """
    with contextlib.ExitStack() as undo:
        # A Ctrl-C between the making of the file and the promise to remove it would leave it there.
        with signals_held():
            fd = _open_claim(path, journal)
            undo.callback(os.close, fd)
            _lock(fd, path)
            undo.callback(_remove_unless_needed, path, fd, journal)
        if not journal:
            os.ftruncate(fd, 0)
        yield fd


def _open_claim(path: Path, journal: bool) -> int:
    """NAME.tar.zst.incomplete, open; one that others could change is made anew. Raises DiskError,
    InUseError."""
    flags = os.O_RDWR | os.O_CREAT
    if journal:
        flags |= os.O_APPEND
    with disk_errors("create", path), folder_below(path.parent) as folder:
        fd = open_in(folder, path.name, flags, 0o644)
        if not owner_in(path.parent).is_foreign(os.fstat(fd)):
            return fd
        try:
            _lock(fd, path)  # nobody is at it
            os.unlink(path.name, dir_fd=folder)
        finally:
            os.close(fd)
        return open_in(folder, path.name, flags | os.O_EXCL, 0o644)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        what = f"another hfship writes {path}"
        raise InUseError(what, "it would write the same files", "wait for it, or stop it") from exc


def _remove_unless_needed(path: Path, fd: int, journal: bool) -> None:
    """Remove the file, if it is still there, unless it lists parts for the next run."""
    with contextlib.suppress(FileNotFoundError):
        status = os.fstat(fd)
        lists_parts = journal and status.st_size > 0
        if os.path.samestat(path.stat(), status) and not lists_parts:
            path.unlink()


class PackJournal:
    """The list of complete parts in a file that is claimed, the one at `path`.

    Of an archive in one file there is no list, and nothing is done: that file is the archive.
    Raises DiskError where it cannot be written.
    """

    def __init__(self, fd: int, path: Path, plan: PackPlan) -> None:
        self._fd = fd
        self._path = path
        self._plan = plan
        self._whole_lines = 0  # bytes of the list that was found
        self._in_parts = bool(plan.options.split)

    def begin(self, resumed: Resumed) -> None:
        """Name the plan, unless the list is gone on with."""
        if not self._in_parts:
            return
        if resumed.parts:
            os.ftruncate(self._fd, self._whole_lines)  # a kill may have cut the last one
            return
        self.clear()
        with disk_errors("write", self._path):
            write_all(self._fd, f"{self._plan.key}\n".encode())

    def add(self, part: DonePart) -> None:
        """List another part, durably."""
        if not self._in_parts:
            return
        with disk_errors("write", self._path):
            write_all(self._fd, _row_of(part).encode())
            os.fdatasync(self._fd)

    def clear(self) -> None:
        """Leave nothing for the next run."""
        if self._in_parts:
            os.ftruncate(self._fd, 0)

    def resumable(self, reporter: Reporter) -> Resumed:
        """The parts that an earlier run of this plan completed and that still are as it wrote
        them: read again, side by side. Raises HostError."""
        content = pread_exactly(self._fd, _LARGEST_JOURNAL, 0)
        self._whole_lines = content.rfind(b"\n") + 1
        lines = content[: self._whole_lines].decode("utf-8", "replace").splitlines()
        if not self._in_parts or lines[:1] != [self._plan.key]:
            return Resumed()

        by_first: Dict[int, DonePart] = {}
        for part in map(_part_of, lines[1:]):
            if part and 0 <= part.first <= part.last <= self._plan.count:
                by_first[part.first] = part
        parts = [by_first[first] for first in sorted(by_first)]
        self._take_names_back(parts)
        found = self._prove(parts, reporter)
        return Resumed(tuple(part for part in found if part))

    def _prove(self, parts: Sequence[DonePart], reporter: Reporter) -> List[Optional[FoundPart]]:
        """What is in each part, None for one that is not as it was written."""
        edges = self._plan.edges

        def prove(count: Callable[[int], None], part: DonePart) -> Optional[FoundPart]:
            return _found(part, edges, count)

        size = sum(part.size for part in parts)
        workers = workers_for(self._plan.options.jobs, size)
        with reporter.stage("prove", size) as stage, Workers(workers, prove, stage.add) as run:
            return run.map(parts)

    def _take_names_back(self, parts: Sequence[DonePart]) -> None:
        """Undo what a run did that was killed while it gave all parts their names. A file of
        another archive has another SHA-256, or is removed when this one is complete."""
        for number, part in enumerate(parts, 1):
            name = part_name(self._plan.archive, number, self._plan.parts_at_most)
            final = part.path.with_name(name)
            if part.path.exists() or not final.exists():
                continue
            with contextlib.suppress(OSError):
                if sha256_file(final) == part.sha256:
                    rename_durably(final, part.path)


def _row_of(part: DonePart) -> str:
    fields = [
        part.first,
        part.count,
        str(part.path),
        part.size,
        part.sha256,
    ]
    return f"{json.dumps(fields)}\n"


def _part_of(row: str) -> Optional[DonePart]:
    """The part in a line; None if it is none."""
    try:
        first, count, path, size, sha256 = parse_json(row)
        return DonePart(
            int(first),
            int(count),
            Path(path),
            int(size),
            str(sha256),
        )
    except (ValueError, TypeError):
        return None


def _found(
    part: DonePart, edges: Sequence[int], count: Callable[[int], None]
) -> Optional[FoundPart]:
    """A part with what is in it; None if it is not as it was written, or of other frames. `count`
    is called with the bytes of each unit that was read."""
    digest = hashlib.sha256()
    units: List[Tuple[int, int]] = []
    lengths: List[int] = []
    tables = False
    try:
        with part.path.open("rb") as stream:
            for unit, length in read_units(stream):
                digest.update(unit)
                count(len(unit))
                if length > 0:
                    units.append((len(unit), zlib.crc32(unit)))
                    lengths.append(length)
                else:
                    tables = bool(unit)
    except (ValueError, OSError):
        return None

    starts = edges[part.first : part.last]
    stops = edges[part.first + 1 : part.last + 1]
    planned = [stop - start for start, stop in zip(starts, stops)]
    if digest.hexdigest() != part.sha256 or lengths != planned:
        return None
    return FoundPart(part, units, tables)
