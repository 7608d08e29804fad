# SPDX-License-Identifier: Apache-2.0
"""How the tar stream is cut: into frames, and these into lanes. Pure.

A writer starts a frame where the content of a weight (a file of WEIGHT_SIZE or more) starts and
another where it ends, so the frames of a weight depend on that weight alone. A reader relies on no
frame size, but for planes, where each block is a frame.

A lane is a stretch of the stream that begins and ends with a frame and a segment at once: a weight
is a lane, the small files between two weights are another. Lanes are made or taken side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, List, NamedTuple, Optional, Sequence

from hfship.archive.frames import Frames
from hfship.archive.layout import WEIGHT_SIZE, index_at
from hfship.archive.zstd import FRAME_SIZE

if TYPE_CHECKING:
    from hfship.archive.layout import Segment
    from hfship.base.manifest import FileEntry


def cut_frames(segments: Sequence[Segment], frame_size: int = FRAME_SIZE) -> Iterator[int]:
    """Where in the stream the frames begin, and the last one ends: at most `frame_size` bytes each;
    weights have their own.

    >>> from hfship.archive.layout import Segment
    >>> from hfship.base.manifest import FileEntry
    >>> weight = Segment(10, 2 << 20, "w", entry=FileEntry("w", 2 << 20, ""))
    >>> list(cut_frames([Segment(0, 10, "a"), weight, Segment(2097162, 5, "b")], 1500000))
    [0, 10, 1500010, 2097162, 2097167]
    """
    start = 0
    for segment in segments:
        if segment.entry is None or segment.size < WEIGHT_SIZE:
            continue
        yield from range(start, segment.start, frame_size)

        step = frame_size
        if segment.planes:
            step = (
                segment.planes + 1
            )  # a block of planes has one byte more than its bytes of the file
        yield from range(segment.start, segment.stop, step)
        start = segment.stop

    end = segments[-1].stop
    yield from range(start, end, frame_size)
    yield end


def cut_lanes(edges: Sequence[int], segments: Sequence[Segment]) -> List[int]:
    """Which of the frames between `edges` begin a lane, counted from 0: the first, and those that
    begin with a segment; last the number of frames.

    >>> from hfship.archive.layout import Segment
    >>> cut_lanes([0, 10, 15, 20], [Segment(0, 10, "a"), Segment(10, 10, "b")])
    [0, 1, 3]
    """
    starts = {segment.start for segment in segments}
    count = len(edges) - 1
    cuts = []
    for number in range(count):
        edge = edges[number]
        if number == 0 or edge in starts:
            cuts.append(number)

    cuts.append(count)
    return cuts


class Lane(NamedTuple):
    """Frames, numbered from `first` on, which counts from 1; and the segments they hold, none of
    which reaches into another lane."""

    first: int
    frames: Frames
    segments: Sequence[Segment]

    @property
    def file(self) -> Optional[FileEntry]:
        """The file, if the lane is one file and nothing else."""
        if len(self.segments) != 1:
            return None
        return self.segments[0].entry

    @property
    def files(self) -> List[FileEntry]:
        """All files in the lane."""
        return [segment.entry for segment in self.segments if segment.entry]


def make_lanes(frames: Frames, segments: Sequence[Segment]) -> List[Lane]:
    """The lanes of an archive; without segments (manifest unreadable), one lane of all frames.

    >>> from hfship.archive.layout import Segment
    >>> frames = Frames([(9, 10, None), (9, 5, None), (9, 5, None), (9, 1, None)])
    >>> small = [Segment(0, 6, "a"), Segment(6, 4, "b")]
    >>> lanes = make_lanes(frames, [*small, Segment(10, 10, "c"), Segment(20, 1, "d")])
    >>> [(lane.first, len(lane.frames), [s.what for s in lane.segments]) for lane in lanes]
    [(1, 1, ['a', 'b']), (2, 2, ['c']), (4, 1, ['d'])]
    """
    lanes = []
    cuts = cut_lanes(frames.edges, segments)
    for first, last in zip(cuts, cuts[1:]):
        start = index_at(segments, frames.edges[first])
        stop = index_at(segments, frames.edges[last])
        lane = Lane(
            first=first + 1,
            frames=frames[first:last],
            segments=segments[start:stop],
        )
        lanes.append(lane)

    return lanes
