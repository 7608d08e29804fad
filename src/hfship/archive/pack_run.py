# SPDX-License-Identifier: Apache-2.0
"""The workers that pack: they read, prove, compress, write and hash.

As the plan says where every frame lies, any of them can be made by itself, and parts are made side
by side. Workers read and compress frames; one hashes a file against the manifest, at about the same
time: out of the page cache, so each byte is read from disk once. Another one, or two where there
are many, writes and hashes a part, as soon as its next frames lie in memory that all share.

Promises: what is packed is what the manifest says, or the run fails; bytes do not depend on the
number of workers. Never: gives a file its final name.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from hfship.archive.flush import FLUSH_SIZE, SerialExecutor
from hfship.archive.frames import PZSTD_HEADER, Frames, largest_unit, unit_header
from hfship.archive.lanes import cut_lanes
from hfship.archive.layout import index_at, segments_between
from hfship.archive.pack_manifest import mismatch_error
from hfship.archive.pack_schedule import WORKERS_PER_LANE, PackSchedule, PackStep
from hfship.archive.part_cut import (
    Group,
    Sample,
    beginning_order,
    cut_parts,
    estimates,
    sample_size,
    sampled_frames,
)
from hfship.archive.part_places import Places
from hfship.archive.part_writer import HashUnits, PartWriter, SealPart, Unit, WriteUnits
from hfship.archive.planes import FrameEncoder
from hfship.archive.schedule import workers_for
from hfship.archive.stream_check import Sink, StreamCheck
from hfship.archive.zstd import FRAME_SIZE, load_zstd
from hfship.base.errors import (
    DiskError,
    IncompleteError,
    IntegrityError,
    NoRoomError,
)
from hfship.base.files import disk_errors, opened, pread_exactly, pwrite_all, sha256_file
from hfship.base.workers import Workers

if TYPE_CHECKING:
    from hfship.archive.layout import Segment
    from hfship.archive.pack_journal import DonePart, PackJournal, Resumed
    from hfship.archive.pack_plan import PackPlan
    from hfship.archive.part_writer import PartTask
    from hfship.base.manifest import FileEntry
    from hfship.base.progress import Stage

# One of them writes and hashes a part, which takes half its time; else both make frames.
WORKERS_PER_PART = 2


# -- reading


def read_stream(plan: PackPlan, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the tar stream, planes not yet split.

    Raises IntegrityError when a file became shorter or vanished, DiskError.
    """
    pieces = []
    for segment in segments_between(plan.segments, start, stop):
        first, last = segment.file_range(start, stop)
        if segment.entry:
            pieces.append(read_range(plan, segment.entry, first, last - first))
        else:
            pieces.append(segment.known[first:last])

    if len(pieces) == 1:
        return pieces[0]

    return b"".join(pieces)


def read_range(plan: PackPlan, entry: FileEntry, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file. Raises as `read_stream`."""
    path = plan.folder / entry.path
    with disk_errors("read", path):
        try:
            with opened(path) as fd:
                content = pread_exactly(fd, size, offset)
        except FileNotFoundError as exc:
            wrong = f"{entry.path} vanished while it was packed"
            raise mismatch_error(plan.folder, plan.manifest, [wrong]) from exc

    if len(content) != size:
        wrong = f"{entry.path} became shorter while it was packed"
        raise mismatch_error(plan.folder, plan.manifest, [wrong])

    return content


# -- units in memory


class MadeFrame(NamedTuple):
    """What a worker made of a frame: bytes and CRC-32 of its unit, 0 when it was proven only."""

    size: int
    crc: int


class UnitSlots:
    """Slots of memory, shared with workers that are forked later, for units on their way from who
    makes them to who writes and who hashes them."""

    def __init__(self, slots: int, slot_size: int) -> None:
        self.count = slots
        self._slot_size = slot_size
        size = slots * slot_size
        memory = mmap.mmap(-1, size)
        self._memory = memoryview(memory)

    def put(self, slot: int, frame: bytes) -> MadeFrame:
        """Put the unit of a zstd frame into a slot: joined there, the frame is copied once."""
        start = slot * self._slot_size
        middle = start + PZSTD_HEADER.size
        stop = middle + len(frame)
        self._memory[start:middle] = unit_header(len(frame))
        self._memory[middle:stop] = frame
        crc = zlib.crc32(self._memory[start:stop])
        return MadeFrame(stop - start, crc)

    def get(self, unit: Unit) -> memoryview:
        """Where a unit lies."""
        start = unit.slot * self._slot_size
        return self._memory[start : start + unit.size]


class _UnitTable:
    """Bytes and CRC-32 of each unit of an archive, at 8 bytes each."""

    def __init__(self, count: int) -> None:
        self._sizes = array("I", bytes(4 * count))
        self._crcs = array("I", bytes(4 * count))
        self.missing = count

    def add(self, number: int, size: int, crc: int) -> None:
        """A unit was made."""
        self._sizes[number] = size
        self._crcs[number] = crc
        self.missing -= 1

    def frames(self, edges: Sequence[int]) -> Frames:
        """All of them, where frame N holds bytes [edges[N], edges[N + 1]) of the stream."""
        frames = Frames()
        for number, (size, crc) in enumerate(zip(self._sizes, self._crcs)):
            frames.append(size, edges[number + 1] - edges[number], crc)
        return frames


class _GroupOrder:
    """Brings the units of a group, which workers make in any order, into theirs."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._next = group.first
        self._made: Dict[int, Unit] = {}  # those that wait for one before them

        self._uses_left: Dict[int, int] = {}  # unit -> 2 while it is to be written and hashed

    @property
    def complete(self) -> bool:
        """Whether all units came."""
        return self._next == self.group.last

    def add(self, unit: Unit) -> Iterator[Unit]:
        """The units whose turn it is, now that another is made."""
        self._made[unit.number] = unit
        while self._next in self._made:
            self._uses_left[self._next] = 2
            unit = self._made.pop(self._next)
            self._next += 1
            yield unit

    def used(self, units: Sequence[Unit]) -> Iterator[int]:
        """Units were written, or were hashed: the slots of those that now are both."""
        for unit in units:
            self._uses_left[unit.number] -= 1
            if not self._uses_left[unit.number]:
                del self._uses_left[unit.number]
                yield unit.slot


# -- the run


class PackRun:
    """One run that reads, proves and compresses the frames of a plan, and writes those that
    `resumed` does not have yet. What is packed already is read and proven once more."""

    def __init__(self, plan: PackPlan, resumed: Resumed) -> None:
        options = plan.options
        largest = plan.largest_frame
        held = 5  # frames in the memory of a worker at once
        if options.profile == "smallest":
            held = 7  # its planes too, and three compressors

        stream_size = plan.segments[-1].stop
        self._plan = plan
        self._resumed = resumed
        self._count = workers_for(options.jobs, stream_size, largest, held)
        slots = UnitSlots(2 * self._count + 4, largest_unit(largest))
        self._slots = slots
        self._work = PackWork(plan, slots)

    def write(
        self, folders: Sequence[Path], journal: PackJournal, stage: Stage
    ) -> Tuple[DonePart, ...]:
        """Write the archive under its .incomplete names; its parts in their order.

        Complete parts stay for the next run, unless the disk is full or the folder is not what its
        manifest says. Raises IntegrityError for the latter, DiskError, HostError, IncompleteError.
        """
        plan = self._plan
        with Workers(self._count, self._work.do) as workers:
            writer = PartWriter(plan, self._count, journal.add, self._resumed.parts)
            try:
                groups = _planned_groups(plan, workers)
                resumed = self._resumed.whole(groups)
                kept = {found.part.first for found in resumed.found}
                left = [group for group in groups if group.first not in kept]
                width = max(len(folders), -(-self._count // WORKERS_PER_PART))
                files = min(width, max(self._count // WORKERS_PER_LANE, 1))
                left = beginning_order(left, self._work.cuts, files)
                writer.go_on(resumed, Places(folders, left, width))

                schedule = PackSchedule(self._work.cuts, self._slots.count, self._count)
                for group in groups:
                    if group.first in kept:
                        schedule.packed_before(group)
                lead = _Lead(plan, schedule, writer, stage)
                lead.go_on(resumed)
                lead.run(workers, width, roomy=self._count > WORKERS_PER_PART or len(folders) > 1)
                if not (writer.complete and schedule.all_taken):
                    raise _ended_early(plan)
                return tuple(sorted(writer.parts, key=lambda part: part.first))
            except BaseException as exc:
                # Complete parts would keep the disk full, or are of something else.
                useless = isinstance(exc, (NoRoomError, IntegrityError))
                writer.discard(complete=useless)
                if useless:
                    journal.clear()
                raise


def _ended_early(plan: PackPlan) -> IncompleteError:
    """What keeps an archive without all of its parts from its name, should a run ever end so."""
    what = f"{plan.archive} was not written to its end"
    why = "the workers had nothing more to do before all parts were complete and proven"
    return IncompleteError(what, why, "run the same command again: complete parts stay")


def _planned_groups(plan: PackPlan, workers: Workers) -> List[Group]:
    """Where the parts begin."""
    split = plan.options.split
    if split is None:
        return [Group(1, 0, plan.count, 0)]
    samples = workers.map([SampleFrame(number) for number in sampled_frames(plan.count)])
    return cut_parts(estimates(plan.edges, samples), split)


class _Lead:
    """Has all frames made, proven, and written in their order."""

    def __init__(
        self, plan: PackPlan, schedule: PackSchedule, writer: PartWriter, stage: Stage
    ) -> None:
        self._plan = plan
        self._schedule = schedule
        self._writer = writer
        self._stage = stage
        self._table = _UnitTable(plan.count)
        self._orders: Dict[int, _GroupOrder] = {}  # of groups, by their first frame
        self._file_ends = [segment.stop for segment in plan.segments if segment.entry]
        stage.expect(len(self._file_ends))

    def go_on(self, resumed: Resumed) -> None:
        """Parts of an earlier run are used."""
        edges = self._plan.edges
        for part, units, _ in resumed.found:
            for number, (size, crc) in enumerate(units, part.first):
                self._table.add(number, size, crc)
            self._stage.skip(edges[part.last] - edges[part.first])

    def run(self, workers: Workers, width: int, roomy: bool) -> None:
        """Lead the workers until all is done; `width` groups are made side by side. With `roomy`
        there are so many that who writes or hashes a part has no other work waiting: a part goes
        on as fast as one of them, and a slow medium keeps nobody else."""
        schedule = self._schedule
        writer = self._writer

        def next_task(worker: int, idle: bool) -> Optional[Tuple[Union[PartTask, PackStep]]]:
            part_task = writer.next_task(worker)
            if part_task:
                return (part_task,)
            reserved = roomy and writer.has_role(worker)
            if reserved and not idle:
                return None
            step = schedule.next(worker, idle, owns=not reserved)
            return (step,) if step else None

        self._begin_groups(width)
        for done in workers.run(next_task):
            (task,) = done.task
            if isinstance(task, PackStep):
                self._follow(task, done.result)
            elif isinstance(task, SealPart):
                writer.sealed(task.path, done.result)
            else:
                if isinstance(task, WriteUnits):
                    writer.written(task)
                for slot in self._orders[task.group].used(task.units):
                    schedule.release(task.group, slot)
            if not self._table.missing and not writer.finished:
                frames = self._table.frames(self._plan.edges)
                writer.finish(frames)
            self._begin_groups(width)

    def _begin_groups(self, width: int) -> None:
        """Begin groups until so many are made side by side, or no folder takes another."""
        while self._schedule.making < width:
            if self._schedule.making and self._schedule.far_behind:
                return
            group = self._writer.begin(self._schedule.owners)
            if group is None:
                return
            self._schedule.begin(group)
            self._orders[group.first] = _GroupOrder(group)

    def _follow(self, step: PackStep, made: MadeFrame) -> None:
        """A frame was made, or taken."""
        edges = self._plan.edges
        start, stop = edges[step.frame], edges[step.frame + 1]
        if step.make:
            self._table.add(step.frame, made.size, made.crc)
            order = self._orders[step.group]
            for unit in order.add(Unit(step.frame, made.size, step.slot)):
                self._writer.place(order.group, unit)
            if order.complete:
                self._writer.end(order.group)
            self._stage.add(stop - start)
        if step.take:
            ended = bisect_right(self._file_ends, stop) - bisect_right(self._file_ends, start)
            self._stage.finish(ended)


# -- what workers do


class SampleFrame(NamedTuple):
    """A task: compress the beginning of a frame, for its ratio."""

    number: int


class PackWork:
    """The work of a worker on a plan; `cuts` are the frames that lanes begin with."""

    def __init__(self, plan: PackPlan, slots: UnitSlots) -> None:
        self._plan = plan
        self._slots = slots
        self.cuts = cut_lanes(plan.edges, plan.segments)
        self._encoder = FrameEncoder(load_zstd(), plan.options.profile, plan.options.level)
        self._sums: Dict[Path, Any] = {}  # of parts that this worker hashes
        self._flusher = SerialExecutor()
        self._lane = -1  # that this worker takes
        self._check: Optional[StreamCheck] = None  # of that lane

    def do(self, _: Callable[[int], None], task: Union[PartTask, PackStep, SampleFrame]) -> Any:
        """Carry out a task."""
        if isinstance(task, PackStep):
            return self._step(task)
        if isinstance(task, WriteUnits):
            return self._write(task)
        if isinstance(task, HashUnits):
            return self._hash(task)
        if isinstance(task, SampleFrame):
            return self._sample(task)
        return self._seal(task)

    def _sample(self, task: SampleFrame) -> Sample:
        start, stop = self._plan.edges[task.number : task.number + 2]
        size = sample_size(self._plan.count, stop - start)
        content = read_stream(self._plan, start, start + size)
        frame = self._encode(content, start)
        return Sample(size, PZSTD_HEADER.size + len(frame))

    def _encode(self, content: bytes, start: int) -> bytes:
        segments = self._plan.segments
        segment = segments[index_at(segments, start + 1) - 1]
        return self._encoder.encode(content, bool(segment.planes))

    def _step(self, step: PackStep) -> MadeFrame:
        """Read a frame and make its unit, prove it, or both."""
        start = self._plan.edges[step.frame]
        stop = self._plan.edges[step.frame + 1]
        content = read_stream(self._plan, start, stop)
        made = MadeFrame(0, 0)
        if step.make:
            frame = self._encode(content, start)
            made = self._slots.put(step.slot, frame)
        if step.take:
            self._check_of(step.lane).feed(content, stop - start)
        return made

    def _check_of(self, lane: int) -> StreamCheck:
        if lane != self._lane or self._check is None:
            segments = self._plan.segments
            first, last = (self._plan.edges[cut] for cut in self.cuts[lane : lane + 2])
            of_lane = segments[index_at(segments, first) : index_at(segments, last)]
            self._lane = lane
            self._check = StreamCheck(of_lane, Sink(), self._refuse)
        return self._check

    def _write(self, task: WriteUnits) -> None:
        offset = task.offset
        path = task.path
        with disk_errors("write", path), opened(path, os.O_WRONLY) as fd:
            for unit in task.units:
                pwrite_all(fd, self._slots.get(unit), offset)
                offset += unit.size
        if offset // FLUSH_SIZE != task.offset // FLUSH_SIZE:
            self._flusher.submit(_flush, path)

    def _hash(self, task: HashUnits) -> None:
        digest = self._sums.setdefault(task.path, hashlib.sha256())
        for unit in task.units:
            digest.update(self._slots.get(unit))

    def _seal(self, task: SealPart) -> str:
        """Make a part durable. Returns its SHA-256."""
        path = task.path
        digest = self._sums.pop(path, None) or hashlib.sha256()
        with disk_errors("write", path), opened(path, os.O_RDWR) as fd:
            offset = task.hashed
            while True:
                tables = pread_exactly(fd, FRAME_SIZE, offset)
                if not tables:
                    break
                digest.update(tables)
                offset += len(tables)
            os.fsync(fd)
            sha256: str = digest.hexdigest()
            if self._plan.options.read_back:
                require_read_back(path, fd, sha256)

        return sha256

    def _refuse(self, segment: Segment, what: str) -> NoReturn:
        """A file is not what its manifest says."""
        plan = self._plan
        path = segment.what
        if segment.entry:
            path = segment.entry.path
        difference = f"{path} {what}"
        raise mismatch_error(plan.folder, plan.manifest, [difference])


def _flush(path: Path) -> None:
    with disk_errors("write", path), opened(path, os.O_WRONLY) as fd:
        os.fsync(fd)


def require_read_back(path: Path, fd: int, sha256: str) -> None:
    """Refuse a medium that gives back other bytes than were written to it. Raises DiskError,
    OSError."""
    # Out of the page cache first: what counts is what the medium gives back.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256_file(path) == sha256:
        return

    what = f"{path.parent} gives back other bytes than were written to it"
    why = f"found on reading {path.name} again"
    raise DiskError(what, why, "use another medium")
