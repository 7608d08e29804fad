# SPDX-License-Identifier: Apache-2.0
"""Which worker makes which frame of a pack, and which one proves it.

To *make* a frame is to read and to compress it; to *take* it is to hash it against the manifest, in
the order of its lane (a file, see archive/lanes.py). Groups of frames, which become the parts, are
made side by side, each in its order. Files do not end where parts do: a lane goes on in the next
group.

A lane is hashed by one worker, so one that is much of the model would end after all the rest. Such
a lane is taken as soon as its group is begun, also ahead of making; others are taken and made at
once where they can be, which reads them once.

Promises: every frame is made once, a group in its order; every lane is taken in its order by one
worker, close to making, so that a byte comes from the disk once and then from the page cache.
Never: touches a disk; it decides from values only, the workers act.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from typing import AbstractSet, Deque, Dict, NamedTuple, Optional, Sequence

from hfship.archive.part_cut import Group
from hfship.base.values import dataclass

# Frames between making and taking: what is read again should still be in the page cache. A group is
# not begun while more are made and not taken, beside those of the groups at hand; and no lane is
# taken farther ahead of its group.
READ_AGAIN_WITHIN = 1024

# All other work on a frame is some three times as much as to take it: so many workers pack a lane
# as fast as one of them can take it.
WORKERS_PER_LANE = 4


class PackStep(NamedTuple):
    """What a worker has to do with a frame: make its unit into a slot, take it, or both."""

    frame: int
    lane: int
    make: bool
    take: bool
    group: int = -1  # the first frame of the one that it is made for
    slot: int = -1


@dataclass
class _Opened:
    """A group that is being made: the next frame to be given out, and units that hold a slot."""

    group: Group
    next: int
    held: int = 0


class PackSchedule:
    """Who makes and who takes which frame.

    `cuts` are the frames that lanes begin with, and last the number of frames; `slots` is how many
    units may be in memory, which the groups that are being made share.
    """

    def __init__(self, cuts: Sequence[int], slots: int, workers: int) -> None:
        self._cuts = cuts
        self._workers = workers
        self._given = bytearray(cuts[-1])  # 1 for a frame that is made, or being made
        self._next_take = list(cuts[:-1])  # of each lane
        self._slots = slots
        self._free = list(range(slots))
        self._opened: Dict[int, _Opened] = {}  # groups that were begun, by their first frame
        self._owned: Dict[int, int] = {}  # worker -> lane
        self._ready: Deque[int] = deque()  # lanes that can be taken, of which nobody does
        self._untaken = cuts[-1]  # frames
        self._unproven = 0  # frames that are made, or being made, and not taken

    def packed_before(self, group: Group) -> None:
        """All frames of a group are made already: they are only taken."""
        for frame in range(group.first, group.last):
            self._give(frame)
        self._ready_lanes(group)

    def begin(self, group: Group) -> None:
        """Frames of a group may be made now."""
        self._opened[group.first] = _Opened(group, group.first)
        self._ready_lanes(group)

    def _ready_lanes(self, group: Group) -> None:
        """Lanes that begin in a group may be taken."""
        first = bisect_left(self._cuts, group.first)
        last = bisect_left(self._cuts, group.last)
        self._ready.extend(range(first, last))

    @property
    def all_taken(self) -> bool:
        """Whether every frame was made and taken."""
        return self._next_take == list(self._cuts[1:])

    @property
    def owners(self) -> AbstractSet[int]:
        """Workers that take a lane."""
        return self._owned.keys()

    @property
    def making(self) -> int:
        """How many groups have frames to be made."""
        return sum(1 for opened in self._opened.values() if opened.next < opened.group.last)

    @property
    def far_behind(self) -> bool:
        """Whether so much is made and not proven that no further group should begin."""
        frames = sum(opened.group.last - opened.group.first for opened in self._opened.values())
        return self._unproven > READ_AGAIN_WITHIN + frames

    def next(self, worker: int, idle: bool, owns: bool = True) -> Optional[PackStep]:
        """The next step of a worker; None while there is none. One that takes a lane makes frames
        of others only if it is `idle`; one with other work to do `owns` none that it had not."""
        lane = self._owned.get(worker)
        if lane is None and owns and self._ready:
            lane = self._ready.popleft()
            self._owned[worker] = lane
        if lane is None:
            return self._make()

        step = self._take(worker, lane)
        if step is None and idle:
            step = self._make()
        return step

    def release(self, first: int, slot: int) -> None:
        """A unit of the group that begins with frame `first` is written and hashed."""
        opened = self._opened[first]
        opened.held -= 1
        self._free.append(slot)
        if not opened.held and opened.next == opened.group.last:
            del self._opened[first]

    def _take(self, worker: int, lane: int) -> Optional[PackStep]:
        """Take the next frame of a lane: one that is made, one ahead of making in a lane that would
        end last, or one that is the next of its group, to be made at once."""
        frame = self._next_take[lane]
        step: Optional[PackStep]
        if self._given[frame]:
            step = PackStep(frame, lane, make=False, take=True)
        else:
            step = self._take_unmade(frame, lane)
        if step:
            self._count_taken(worker, lane)
        return step

    def _take_unmade(self, frame: int, lane: int) -> Optional[PackStep]:
        opened = self._group_at(frame)
        if opened is None:
            return None
        if self._ends_last(lane) and frame < opened.next + READ_AGAIN_WITHIN:
            return PackStep(frame, lane, make=False, take=True)
        if frame == opened.next and self._has_room(opened):
            return self._hold(opened)._replace(lane=lane, take=True)
        return None

    def _ends_last(self, lane: int) -> bool:
        """Whether what is left of a lane takes one worker longer than all that is left takes all
        workers."""
        left = self._cuts[lane + 1] - self._next_take[lane]
        return left * self._workers >= WORKERS_PER_LANE * self._untaken

    def _make(self) -> Optional[PackStep]:
        """Make the next frame of the group with the fewest units in memory."""
        with_room = [opened for opened in self._opened.values() if self._has_room(opened)]
        if not with_room:
            return None
        return self._hold(min(with_room, key=lambda opened: opened.held))

    def _group_at(self, frame: int) -> Optional[_Opened]:
        """The group at hand that holds a frame."""
        for opened in self._opened.values():
            if opened.group.first <= frame < opened.group.last:
                return opened
        return None

    def _has_room(self, opened: _Opened) -> bool:
        if opened.next == opened.group.last:
            return False
        if not self._free:
            return False
        return opened.held * self.making < self._slots

    def _hold(self, opened: _Opened) -> PackStep:
        """Give out the next frame of a group, to be made."""
        frame = opened.next
        self._give(frame)
        opened.next += 1
        opened.held += 1
        slot = self._free.pop()
        return PackStep(
            frame,
            -1,
            make=True,
            take=False,
            group=opened.group.first,
            slot=slot,
        )

    def _give(self, frame: int) -> None:
        self._given[frame] = 1
        if not self._is_taken(frame):
            self._unproven += 1

    def _is_taken(self, frame: int) -> bool:
        lane = bisect_right(self._cuts, frame) - 1
        return frame < self._next_take[lane]

    def _count_taken(self, worker: int, lane: int) -> None:
        self._untaken -= 1
        if self._given[self._next_take[lane]]:
            self._unproven -= 1
        self._next_take[lane] += 1
        if self._next_take[lane] == self._cuts[lane + 1]:
            self._owned.pop(worker, None)
