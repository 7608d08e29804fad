# SPDX-License-Identifier: Apache-2.0
"""One pass over an archive: decode, prove, hand files to a sink, collect damage.

An archive is checked and restored by the same code. Its frames fall into lanes, stretches that
begin and end with a frame and a file at once: a weight is a lane, the small files between two
weights are another. Lanes run side by side; within a lane, frames are read, decoded and written by
any worker and hashed in order by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from itertools import chain, islice
from types import MappingProxyType
from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Any,
    Callable,
    Deque,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from hfship.archive.damage import Damage, FileRange, merge_adjacent
from hfship.archive.flush import FLUSH_SIZE, SerialExecutor
from hfship.archive.frames import Frame
from hfship.archive.lanes import make_lanes
from hfship.archive.layout import segments_between
from hfship.archive.schedule import LaneWork, Schedule, workers_for
from hfship.archive.stream_check import RecordingSink, Sink, StreamCheck
from hfship.archive.zstd import FRAME_SIZE, ZstdError, load_zstd
from hfship.base.workers import FORK_SIZE, Workers

if TYPE_CHECKING:
    from concurrent.futures import Future

    from hfship.archive.frames import Buffer
    from hfship.archive.lanes import Lane
    from hfship.archive.layout import Segment
    from hfship.archive.pipe import Streamed
    from hfship.archive.reader import Archive
    from hfship.archive.schedule import Step
    from hfship.archive.stream_check import FileOutcome
    from hfship.base.progress import Stage


class StepResult(NamedTuple):
    """What a worker has to say of a step."""

    size: Optional[int]  # bytes of content, None if it is lost or was not decoded
    damages: Sequence[Damage]
    outcomes: Sequence[FileOutcome]


class ArchiveCheck:
    """One pass over an archive: decodes, proves, hands files to a sink and collects damage.

    `skip` are files that are not asked for: their weights are not read, and with `sparse` nothing
    that holds none of the others. `resume` says how many bytes of a weight the sink has from an
    earlier run. With `quick`, only what lies on the medium is proven, not what it decodes to.
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
        self.archive = archive
        self._sink = sink
        self._resume = resume
        self._quick = quick
        self._lanes = _wanted_lanes(archive, skip, sparse)
        self._damages = list(archive.damages)
        if sparse:
            self._damages = self._damages_in_the_way()
        self._lost: Set[int] = set()  # lanes with a frame that is lost

        largest = max((frame.length for frame in archive.frames), default=FRAME_SIZE)
        self._count = workers_for(jobs, self.size, largest)
        # Each worker has up to two frames under way; some more wait to be taken.
        self._lane_work = LaneWork(2 * self._count + self._count // 4, largest)
        # Of the step at hand, in the worker that does it:
        self._recorded = RecordingSink(sink)
        self._found: List[Damage] = []
        self._decompress = load_zstd().decompressor()

    @property
    def size(self) -> int:
        """Bytes of the tar stream to go through."""
        size = 0
        for lane in self._lanes:
            edges = lane.frames.edges
            size += edges[-1] - edges[0]
        return size

    def run(self, stage: Stage, after: Optional[Callable[[int], None]] = None) -> List[Damage]:
        """All damage, in the order of the archive.

        With `after`, lanes run one after the other, and it is called with the position in the
        stream up to which all is safe in the sink, unless there is damage before.
        """
        stage.expect(sum(len(lane.files) for lane in self._lanes))
        lengths = [len(lane.frames) for lane in self._lanes]
        one_by_one = after is not None or self.archive.media is not None
        schedule = Schedule(lengths, self._lane_work.slots, one_by_one)
        schedule.limit = 0
        frames = sum(lengths)
        with Workers(self._count, self._work) as workers, SerialExecutor() as flusher:

            def next_step(worker: int, idle: bool) -> Optional[Tuple[Step]]:
                if schedule.all_taken and schedule.limit < frames and not workers.busy:
                    schedule.limit = self._readable(schedule.limit)
                step = schedule.next(worker, idle)
                if step is None:
                    return None
                if step.make and step.at == 0:
                    self._begin(self._lanes[step.lane])
                return (step,)

            for done in workers.run(next_step):
                (step,) = done.task
                result = StepResult(*done.result)
                schedule.done(step, result.size)
                self._damages += result.damages
                if step.take:
                    self._follow(step, result, flusher, after)
                    self._count_in(stage, step, result)
            flusher.drain()

        return merge_adjacent(self._damages)

    def _damages_in_the_way(self) -> List[Damage]:
        """What is known to be damaged and lies where a frame is needed, or nobody knows where."""
        ranges = []
        for lane in self._lanes:
            for frame in self._needed(lane):
                ranges.append((frame.offset, frame.offset + frame.size))
        return [damage for damage in self._damages if overlaps(damage, ranges)]

    def _needed(self, lane: Lane) -> List[Frame]:
        """Frames of a lane that the sink does not have yet."""
        done = 0
        if lane.file:
            done = self._resume.get(lane.file.path, 0)
        if not done:
            return list(lane.frames)

        needed = []
        for frame in lane.frames:
            _, last = lane.segments[0].file_range(frame.start, frame.stop)
            if last > done:
                needed.append(frame)

        return needed

    def _readable(self, done: int) -> int:
        """How many frames are on the media that are there, once there are more than are `done`."""
        media = self.archive.media
        count = sum(len(lane.frames) for lane in self._lanes)
        if not media:
            return count

        frames = chain.from_iterable(lane.frames for lane in self._lanes)
        to_come = (self.archive.part_of(frame).path for frame in islice(frames, done, None))
        media.wait_for(next(to_come))

        for number, path in enumerate(to_come, done + 1):
            if not media.look_for(path):
                return number

        return count

    def _begin(self, lane: Lane) -> None:
        if lane.file:
            self._sink.begin(lane.file)

    def _count_in(self, stage: Stage, step: Step, result: StepResult) -> None:
        """Count a frame that was taken, and the files that are proven."""
        lane = self._lanes[step.lane]
        stage.add(lane.frames[step.at].length)
        if not self._quick:
            stage.finish(sum(outcome.proven for outcome in result.outcomes))
        elif step.at == len(lane.frames) - 1:
            stage.finish(len(lane.files))

    def _follow(
        self,
        step: Step,
        result: StepResult,
        flusher: SerialExecutor,
        after: Optional[Callable[[int], None]],
    ) -> None:
        """A frame was taken: what lies before it is in the sink, and files that end with it are
        finished."""
        lane = self._lanes[step.lane]
        frame = lane.frames[step.at]
        if result.size is None and not self._quick:
            self._lost.add(step.lane)
        if lane.file and step.lane not in self._lost:
            first, last = lane.segments[0].file_range(frame.start, frame.stop)
            if first // FLUSH_SIZE != last // FLUSH_SIZE:
                flusher.submit(self._sink.checkpoint, lane.file, first)
                flusher.submit(self._report_safe, after, frame.start)

        if self._sink.keeps:
            for outcome in result.outcomes:
                flusher.submit(outcome.pass_on, self._sink)

        if after:
            if step.at == len(lane.frames) - 1:
                flusher.submit(self._report_safe, after, frame.stop)
            # What may go is gone before more is written: there is room for one part only.
            flusher.drain()

    def _report_safe(self, after: Optional[Callable[[int], None]], position: int) -> None:
        """Call `after`, unless a damage before `position` needs what would go."""
        if after is None:
            return

        for damage in self._damages:
            if not damage.frames:
                return
            first, _ = damage.frames
            if self.archive.frames[first - 1].start < position:
                return

        after(position)

    # -- what workers do

    def _work(self, _: Callable[[int], None], step: Step) -> StepResult:
        """Make a frame, take it, or both."""
        lane = self._lanes[step.lane]
        number = lane.first + step.at
        frame = lane.frames[step.at]
        self._found = []
        self._recorded.outcomes = []

        def make() -> Optional[Buffer]:
            return self._make(number, frame, lane)

        def check() -> StreamCheck:
            segments = [] if self._quick else lane.segments
            written_here = lane.file is None  # _make writes those of large files
            return StreamCheck(segments, self._recorded, self._report, write=written_here)

        size = self._lane_work.do(step, make, check, frame.length)
        return StepResult(size, self._found, self._recorded.outcomes)

    def _make(self, number: int, frame: Frame, lane: Lane) -> Optional[Buffer]:
        """The content of a frame, which also goes to the sink if it is of one file; None if it is
        lost."""
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
            damage = self.archive.damage(str(exc), number)
            self._found.append(damage)
            return None

    def _report(self, segment: Segment, what: str) -> None:
        damage = contradiction(segment, what)
        self._found.append(damage)


def _wanted_lanes(archive: Archive, skip: AbstractSet[str], sparse: bool) -> List[Lane]:
    """The lanes to go through: those with a file that is asked for, and without `sparse` those
    of small files."""
    wanted = []
    for lane in make_lanes(archive.frames, archive.segments):
        asked_for = any(entry.path not in skip for entry in lane.files)
        of_small_files = not lane.file
        if asked_for or (of_small_files and not sparse):
            wanted.append(lane)
    return wanted


def contradiction(segment: Segment, what: str) -> Damage:
    """Frames are intact, but what they hold is not what the manifest says: the archive was made
    so."""
    files: Tuple[FileRange, ...] = ()
    if segment.entry:
        files = (FileRange(segment.entry.path, 0, segment.entry.size - 1),)
    where = f"bytes {segment.start}-{segment.stop - 1} of the tar stream"
    return Damage(f"{segment.what} {what} ({where})", files=files)


class StreamedCheck:
    """The same pass over an archive that comes as a stream: once, in its own order.

    What ArchiveCheck can do besides needs an archive that can be read twice, and is ignored.
    """

    def __init__(
        self,
        archive: Streamed,
        sink: Sink,
        jobs: int,
        skip: AbstractSet[str] = frozenset(),
        *_: Any,
        **__: Any,
    ) -> None:
        self._archive = archive
        self._skip = skip
        self._zstd = load_zstd()
        self._jobs = workers_for(jobs, FORK_SIZE, FRAME_SIZE)
        self._damages: List[Damage] = []
        self._check = StreamCheck(archive.segments, sink, self._report)

    @property
    def size(self) -> int:
        """Bytes of the tar stream to go through."""
        return self._archive.segments[-1].stop

    def run(self, stage: Stage, _: Optional[Callable[[int], None]] = None) -> List[Damage]:
        """All damage. Raises IncompleteError when the stream ends too early."""
        from concurrent.futures import ThreadPoolExecutor  # few archives come through a pipe

        tail: List[bytes] = []
        decoding: Deque[Tuple[int, Future[Optional[Buffer]]]] = deque()
        with ThreadPoolExecutor(self._jobs) as pool:
            frames = self._archive.frames_to_come(tail)
            while True:
                room = self._jobs + 1 - len(decoding)
                for number, frame in islice(frames, room):
                    content = pool.submit(self._decode, number, frame)
                    decoding.append((frame.length, content))
                if not decoding:
                    break
                length, content = decoding.popleft()
                self._check.feed(content.result(), length)
                stage.add(length)

        return self._damages + self._archive.check_tables(tail)

    def _report(self, segment: Segment, what: str) -> None:
        damage = contradiction(segment, what)
        self._damages.append(damage)

    def _decode(self, number: int, frame: Frame) -> Optional[Buffer]:
        segments = segments_between(self._archive.segments, frame.start, frame.stop)
        if all(self._is_skipped(segment) for segment in segments):
            self._archive.unit(frame)
            return None

        try:
            return self._archive.restored(frame, self._zstd.decompressor())
        except ZstdError as exc:
            damage = self._archive.damage(str(exc), number)
            self._damages.append(damage)
            return None

    def _is_skipped(self, segment: Segment) -> bool:
        """Whether the sink has the file of a segment already."""
        return segment.entry is not None and segment.entry.path in self._skip


def checker_of(archive: Archive) -> Callable[..., Union[ArchiveCheck, StreamedCheck]]:
    """How to go through an archive."""
    if archive.is_stream:
        return StreamedCheck
    return ArchiveCheck


def overlaps(damage: Damage, ranges: Sequence[Tuple[int, int]]) -> bool:
    """True unless a damage lies where none of the sorted `ranges` [start, stop) of the archive
    does.

    >>> [overlaps(Damage("bad", at, 5), [(10, 20)]) for at in (5, 6, 19, 20)]
    [False, True, True, False]
    >>> overlaps(Damage("bad"), [])
    True
    """
    if damage.offset is None or not damage.size:
        return True

    stop_of_damage = damage.offset + damage.size
    following = bisect_left(ranges, (stop_of_damage,))
    if following == 0:
        return False
    _, stop = ranges[following - 1]
    return stop > damage.offset
