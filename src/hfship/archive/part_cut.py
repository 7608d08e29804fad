# SPDX-License-Identifier: Apache-2.0
"""Which frames go into which part, decided before any of them is made. Pure.

Parts are made side by side, so where each begins cannot wait for the sizes of all units before it.
Samples of some frames are compressed first; a part is planned to hold the frames that fit by
these, with a little to spare. One that turns out too large goes on in a part of its own behind.

Promises: equal samples give an equal cut, whatever the number of workers. Never: reads a file.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import Deque, Dict, List, NamedTuple, Sequence

from hfship.archive.frames import largest_unit

CUT_VERSION = 2  # of the rules here; 1 filled each part up before the next was begun
SAMPLE_EVERY = 32  # frames for which one sample stands in all but small archives
SAMPLE_SIZE = 512 << 10  # bytes of a sample: its ratio is that of a frame to 0.1 %
_ZSTD_BLOCK = 128 << 10  # each has a header of 3 bytes (RFC 8878)
_SPARE = 64  # of an estimate, one in so many bytes is added


class Sample(NamedTuple):
    """Bytes of content that were compressed, and of the unit they became."""

    length: int
    size: int

    def estimate(self, length: int) -> int:
        """Bytes, hardly ever too few, of a unit of `length` bytes of content like this.

        >>> sample = Sample(1000, 500)
        >>> sample.estimate(2000), sample.estimate(1000), Sample(1000, 1020).estimate(2000)
        (1016, 500, 2020)
        """
        if length == self.length:
            return self.size
        if self.size >= self.length:
            blocks = -(-length // _ZSTD_BLOCK) - -(-self.length // _ZSTD_BLOCK)
            return length + self.size - self.length + 3 * blocks

        size = -(-self.size * length // self.length)
        return size + -(-size // _SPARE)


class Group(NamedTuple):
    """Frames that are planned to be part `number`: those from `first` to `last` - 1, and the bytes,
    by estimate, of their units."""

    number: int
    first: int
    last: int
    size: int


def sampled_frames(count: int) -> range:
    """Which of `count` frames are sampled: one in the middle of those that it stands for; all, if
    they are few.

    >>> list(sampled_frames(100)), list(sampled_frames(3))
    ([16, 48, 80], [0, 1, 2])
    """
    every = _frames_of_a_sample(count)
    return range(every // 2, count, every)


def sample_size(count: int, length: int) -> int:
    """Bytes of a frame of `length` bytes that its sample has, if it is one of `count`."""
    if _frames_of_a_sample(count) == 1:
        return length
    return min(length, SAMPLE_SIZE)


def _frames_of_a_sample(count: int) -> int:
    if count > 2 * SAMPLE_EVERY:
        return SAMPLE_EVERY
    return 1


def estimates(edges: Sequence[int], samples: Sequence[Sample]) -> Sequence[int]:
    """Bytes of each unit, by estimate: frame N holds bytes [edges[N], edges[N + 1])."""
    sizes = array("Q")
    count = len(edges) - 1
    every = _frames_of_a_sample(count)
    for number in range(count):
        length = edges[number + 1] - edges[number]
        at = min(number // every, len(samples) - 1)
        size = min(samples[at].estimate(length), largest_unit(length))
        sizes.append(size)
    return sizes


def cut_parts(sizes: Sequence[int], limit: int) -> List[Group]:
    """As few groups as units of `sizes` bytes make, in their order, of at most `limit` bytes.

    >>> [(group.first, group.last) for group in cut_parts([3, 3, 3, 9, 1], 7)]
    [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    starts = [0]
    size = 0
    for number, unit in enumerate(sizes):
        if size and size + unit > limit:
            starts.append(number)
            size = 0
        size += unit

    ends = [*starts[1:], len(sizes)]
    until = [0, *accumulate(sizes)]
    groups = []
    for number, (first, last) in enumerate(zip(starts, ends), 1):
        group = Group(
            number,
            first,
            last,
            until[last] - until[first],
        )
        groups.append(group)
    return groups


def beginning_order(groups: Sequence[Group], cuts: Sequence[int], files: int) -> List[Group]:
    """Groups in the order in which they are best begun: those of so many `files` in turns, then the
    others. So files are proven side by side: one is proven no faster than one worker hashes. `cuts`
    are the frames that files begin with.

    >>> groups = [Group(number, number, number + 1, 1) for number in range(6)]
    >>> [group.number for group in beginning_order(groups, [0, 3, 5, 6], 2)]
    [0, 1, 3, 2, 4, 5]
    """
    of_files: Dict[int, Deque[Group]] = {}
    for group in groups:
        file = bisect_right(cuts, group.last - 1)  # that goes on behind it
        of_files.setdefault(file, deque()).append(group)

    order: List[Group] = []
    waiting = deque(of_files.values())
    begun: List[Deque[Group]] = []
    while waiting or begun:
        while waiting and len(begun) < files:
            begun.append(waiting.popleft())
        longest = max(begun, key=len)
        order.append(longest.popleft())
        if not longest:
            begun.remove(longest)
    return order
