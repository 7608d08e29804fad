# SPDX-License-Identifier: Apache-2.0
"""The parts of an archive while they are written.

Owns where each unit lies, which worker writes and which one hashes a part, and when a part is
complete. A whole archive is one part without a limit. Decides and opens files; what is written is
written by workers, the tables excepted. Parts get their numbers when all are there: until then one
has that of the group that was planned to be it, and what did not fit has that and a `+`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from hfship.archive.files import part_name
from hfship.archive.frames import encode_tail, tail_size
from hfship.archive.pack_journal import DonePart
from hfship.archive.part_cut import Group
from hfship.archive.part_places import Places
from hfship.base.files import INCOMPLETE, disk_errors, fsync_dir, pwrite_all
from hfship.base.values import dataclass, field

if TYPE_CHECKING:
    from hfship.archive.frames import Frame
    from hfship.archive.pack_journal import Resumed
    from hfship.archive.pack_plan import PackPlan

UNITS_AT_ONCE = 4  # in a task to write or to hash
# With so many workers for each part at hand, one writes and another hashes it, so that a part alone
# is as fast as its SHA-256. With fewer, one does both.
WORKERS_FOR_TWO_ROLES = 4


class Unit(NamedTuple):
    """A unit that waits in memory: the number of its frame, its bytes, and the slot it lies in."""

    number: int
    size: int
    slot: int


class WriteUnits(NamedTuple):
    """A task: write units of a group one behind the other, from `offset` of a part on."""

    path: Path
    group: int
    units: Tuple[Unit, ...]
    offset: int


class HashUnits(NamedTuple):
    """A task: hash the next units of a part."""

    path: Path
    group: int
    units: Tuple[Unit, ...]


class SealPart(NamedTuple):
    """A task: make a part durable. Its first `hashed` bytes are hashed; what follows is not."""

    path: Path
    hashed: int


PartTask = Union[WriteUnits, HashUnits, SealPart]


@dataclass
class _OpenPart:
    """A file that is being written: the first of `workers` hashes it, the last writes it. It has
    `count` frames of a group, from number `first` on.

    `size` counts the bytes that have their place in it, `sent_to_write` and `sent_to_hash` those of
    tasks that were given out, `written` those of tasks that are done.
    """

    path: Path
    fd: int
    group: Group
    first: int
    workers: Sequence[int]  # one or two
    count: int = 0
    size: int = 0
    to_write: List[Unit] = field(default_factory=list)
    to_hash: List[Unit] = field(default_factory=list)
    sent_to_write: int = 0
    sent_to_hash: int = 0
    written: int = 0
    full: bool = False  # nothing more has its place in it
    sealing: bool = False

    def add(self, unit: Unit) -> None:
        """Put a unit behind the others."""
        self.count += 1
        self.size += unit.size
        self.to_write.append(unit)
        self.to_hash.append(unit)

    def next_write(self) -> WriteUnits:
        """The next units to write."""
        units = _take_units(self.to_write)
        offset = self.sent_to_write
        self.sent_to_write += sum(unit.size for unit in units)
        return WriteUnits(self.path, self.group.first, units, offset)

    def next_hash(self) -> HashUnits:
        """The next units to hash."""
        units = _take_units(self.to_hash)
        self.sent_to_hash += sum(unit.size for unit in units)
        return HashUnits(self.path, self.group.first, units)

    def may_be_sealed(self) -> bool:
        """Whether all of it is written, and nobody has been told to seal it."""
        if not self.full or self.sealing:
            return False
        return self.written == self.size


def _take_units(waiting: List[Unit]) -> Tuple[Unit, ...]:
    units = tuple(waiting[:UNITS_AT_ONCE])
    del waiting[:UNITS_AT_ONCE]
    return units


class PartWriter:
    """Gives units their place in NAME.tar.zst.incomplete, or in parts of at most `split` bytes, of
    which several are written at a time.

    `parts` are those that are complete: first those of an earlier run, `done`, then those of this
    one, each of which is passed to `journal`. Methods raise DiskError.
    """

    def __init__(
        self,
        plan: PackPlan,
        workers: int,
        journal: Callable[[DonePart], None],
        done: Sequence[DonePart] = (),
    ) -> None:
        self._plan = plan
        self._split = plan.options.split
        self._places = Places((), (), 0)
        self._roles = [0] * max(workers, 1)  # of each worker: parts that it writes or hashes
        self._journal = journal
        self.parts = list(done)
        self.finished = False  # the tables have their place
        self._open: List[_OpenPart] = []
        self._sizes: Dict[int, int] = {}  # of parts, by their first frame

    def go_on(self, resumed: Resumed, places: Places) -> None:
        """Go on with some of the parts of an earlier run; remove the others."""
        for part in self.parts:
            if part not in resumed.parts:
                with disk_errors("write", part.path):
                    part.path.unlink()
        self.parts = resumed.parts
        self.finished = resumed.complete
        self._sizes = {part.first: part.size for part in self.parts}
        self._places = places

    # -- giving places

    def begin(self, owners: AbstractSet[int]) -> Optional[Group]:
        """Begin the next group, if a folder takes another part; workers that are `owners` of a
        file to prove should not write or hash it."""
        given = self._places.next(self._coming())
        if given is None:
            return None
        group, folder = given
        self._open_part(group, group.first, folder, owners)
        return group

    def place(self, group: Group, unit: Unit) -> None:
        """Give the next unit of a group its place."""
        part = self._parts_of(group)[-1]
        if self._split is not None and part.size and part.size + unit.size > self._split:
            part.full = True
            folder = self._places.roomiest(self._coming())
            part = self._open_part(group, unit.number, folder)
        part.add(unit)

    def end(self, group: Group) -> None:
        """A group has all its units. The last one waits for the tables, and these for all other
        groups: so it holds none of them up."""
        if group.last == self._plan.count:
            self._places.done(group.first)
            return
        self._parts_of(group)[-1].full = True

    def finish(self, frames: Sequence[Frame]) -> None:
        """Write the tables: all frames have their place."""
        for part in self._open:
            self._sizes[part.first] = part.size
        last = self._part_for_tables(len(frames))
        self._sizes.setdefault(last.first, 0)
        sizes = [self._sizes[first] for first in sorted(self._sizes)]
        tail = encode_tail(frames, sizes)
        with disk_errors("write", last.path):
            pwrite_all(last.fd, tail, last.size)

        last.size += len(tail)
        last.written += len(tail)
        last.full = True
        self.finished = True

    def _part_for_tables(self, frames: int) -> _OpenPart:
        """The last part, if it is open and they go into it; else a new one."""
        room = tail_size(frames, len(self._sizes))
        group = Group(self._plan.parts_at_most, frames, frames, room)
        for part in self._open:
            if part.first + part.count < frames:
                continue
            if self._split is None or part.size + room <= self._split:
                return part
            part.full = True
            group = part.group
        folder = self._places.roomiest(self._coming())
        return self._open_part(group, frames, folder)

    def _open_part(
        self, group: Group, first: int, folder: Path, owners: AbstractSet[int] = frozenset()
    ) -> _OpenPart:
        name = self._plan.archive
        if self._split is not None:
            name = part_name(name, group.number, self._plan.parts_at_most)
            if first != group.first:
                name += f"+{first - group.first}"
        path = folder / (name + INCOMPLETE)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with disk_errors("create", path):
            fd = os.open(path, flags, 0o644)

        workers = [self._take_role(owners)]
        if len(self._roles) >= WORKERS_FOR_TWO_ROLES * self._places.at_once:
            workers.append(self._take_role(owners))
        part = _OpenPart(path, fd, group, first, workers)
        self._open.append(part)
        return part

    def _take_role(self, owners: AbstractSet[int]) -> int:
        """A worker for a part: of those with the fewest, the last that is no owner; the first ones
        are these."""
        workers = range(len(self._roles) - 1, -1, -1)
        chosen = min(workers, key=lambda worker: (self._roles[worker], worker in owners))
        self._roles[chosen] += 1
        return chosen

    def _parts_of(self, group: Group) -> List[_OpenPart]:
        """The parts of a group that are open, in their order."""
        return [part for part in self._open if part.group == group]

    def _coming(self) -> Dict[Path, int]:
        """Bytes that are still to be written to each folder."""
        coming: Dict[Path, int] = {}
        for part in self._open:
            planned = part.size
            if part.first == part.group.first:
                planned = max(planned, part.group.size)
            folder = part.path.parent
            coming[folder] = coming.get(folder, 0) + planned - part.written
        return coming

    # -- tasks

    def has_role(self, worker: int) -> bool:
        """Whether a worker writes or hashes a part."""
        return self._roles[worker] > 0

    def next_task(self, worker: int) -> Optional[PartTask]:
        """What a worker has to do for the parts that it writes or hashes; None for nothing."""
        if not self._roles[worker]:
            return None
        for part in self._open:
            if part.workers[-1] == worker and part.to_write:
                return part.next_write()
            if part.workers[0] != worker:
                continue
            if part.to_hash:
                return part.next_hash()
            if part.may_be_sealed():
                part.sealing = True
                return SealPart(part.path, part.sent_to_hash)

        return None

    def written(self, task: WriteUnits) -> None:
        """Units are written: such a task is done."""
        part = self._part_at(task.path)
        part.written += sum(unit.size for unit in task.units)

    def sealed(self, path: Path, sha256: str) -> None:
        """A part is durable, says the one who hashed it. A fault that a flush found meanwhile is
        told to us, who had the file open all the time."""
        part = self._part_at(path)
        with disk_errors("write", path):
            os.fsync(part.fd)
            fsync_dir(path.parent)  # FAT writes a name in pieces: it is not there with its file
        self._open.remove(part)
        for worker in part.workers:
            self._roles[worker] -= 1
        self._sizes[part.first] = part.size
        if not self._parts_of(part.group):
            self._places.done(part.group.first)
        os.close(part.fd)
        complete = DonePart(
            part.first,
            part.count,
            path,
            part.size,
            sha256,
        )
        self.parts.append(complete)
        self._journal(complete)

    @property
    def complete(self) -> bool:
        """Whether all of the archive is durable."""
        return self.finished and not self._open

    def discard(self, complete: bool) -> None:
        """Remove what was not published: the unfinished parts, and with `complete` the others."""
        paths = [part.path for part in self._open]
        if complete:
            paths += [part.path for part in self.parts]
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()

        for part in self._open:
            os.close(part.fd)

    def _part_at(self, path: Path) -> _OpenPart:
        by_path = {part.path: part for part in self._open}
        return by_path[path]
