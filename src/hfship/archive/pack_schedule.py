# SPDX-License-Identifier: Apache-2.0
"""Which worker makes which frame of a pack, and which one proves it.

To *make* a frame is to read and to compress it; to *take* it is to hash it against the manifest, in
the order of its lane (a file, see archive/lanes.py). Groups of frames, which become the parts, are
made side by side, each in its order. Files do not end where parts do: a lane goes on in the next
group.

Promises: every frame is made once, a group in its order; every lane is taken in its order by one
worker, close behind or together with making, so that a byte comes from the disk once. Never:
touches a disk; it decides from values only, the workers act.
"""

from __future__ import annotations

from collections import deque
from typing import AbstractSet, Deque, Dict, NamedTuple, Optional, Sequence

from hfship.archive.part_cut import Group
from hfship.base.values import dataclass

# Frames that are packed but not proven yet, beside those of the groups at hand: a group is not
# begun before they are fewer, since what is to be proven should still be in the page cache.
PROVE_BEHIND = 1024


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
    units may be in memory, which groups share, `width` of them at a time.
    """

    def __init__(self, cuts: Sequence[int], slots: int, width: int) -> None:
        self._cuts = cuts
        self._lane_at = {first: lane for lane, first in enumerate(cuts[:-1])}
        self._given = bytearray(cuts[-1])  # 1 for a frame that is made, or being made
        self._next_take = list(cuts[:-1])  # of each lane
        self._free = list(range(slots))
        self._share = max(slots // width, 1)
        self._opened: Dict[int, _Opened] = {}  # groups that were begun, by their first frame
        self._owned: Dict[int, int] = {}  # worker -> lane
        self._ready: Deque[int] = deque()  # lanes that can be taken, of which nobody does
        self._unproven = 0  # frames given out and not taken

    def packed_before(self, group: Group) -> None:
        """All frames of a group are made already: they are only taken."""
        for frame in range(group.first, group.last):
            self._give(frame)
            if frame in self._lane_at:
                self._ready.append(self._lane_at[frame])

    def begin(self, group: Group) -> None:
        """Frames of a group may be made now."""
        self._opened[group.first] = _Opened(group, group.first)

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
        return self._unproven > PROVE_BEHIND + frames

    def next(self, worker: int, idle: bool, owns: bool = True) -> Optional[PackStep]:
        """The next step of a worker; None while there is none. One that takes a lane makes frames
        of others only if it is `idle`; one with other work to do `owns` none that it had not."""
        lane = self._owned.get(worker)
        if lane is None and owns and self._ready:
            lane = self._ready.popleft()
            self._owned[worker] = lane
        if lane is None:
            return self._make(worker, owns)

        step = self._take(worker, lane)
        if step is None and idle:
            step = self._make(worker, owns=False)
        return step

    def release(self, first: int, slot: int) -> None:
        """A unit of the group that begins with frame `first` is written and hashed."""
        opened = self._opened[first]
        opened.held -= 1
        self._free.append(slot)
        if not opened.held and opened.next == opened.group.last:
            del self._opened[first]

    def _take(self, worker: int, lane: int) -> Optional[PackStep]:
        """Take the next frame of a lane, and make it, if it is the next of its group."""
        frame = self._next_take[lane]
        step = PackStep(frame, lane, make=False, take=True)
        if not self._given[frame]:
            opened = self._group_at(frame)
            if opened is None or not self._has_room(opened):
                return None
            made = self._hold(opened)
            step = made._replace(lane=lane, take=True)

        self._count_taken(worker, lane)
        return step

    def _make(self, worker: int, owns: bool) -> Optional[PackStep]:
        """Make the next frame of the group with the fewest units in memory."""
        with_room = [opened for opened in self._opened.values() if self._has_room(opened)]
        if not with_room:
            return None

        step = self._hold(min(with_room, key=lambda opened: opened.held))
        lane = self._lane_at.get(step.frame)
        if lane is None:
            return step
        if not owns:
            self._ready.append(lane)
            return step
        self._owned[worker] = lane
        self._count_taken(worker, lane)
        return step._replace(lane=lane, take=True)

    def _group_at(self, frame: int) -> Optional[_Opened]:
        """The group whose next frame is this one."""
        for opened in self._opened.values():
            if opened.next == frame and frame < opened.group.last:
                return opened
        return None

    def _has_room(self, opened: _Opened) -> bool:
        if opened.next == opened.group.last:
            return False
        if not self._free:
            return False
        return opened.held < self._share

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
        self._unproven += 1

    def _count_taken(self, worker: int, lane: int) -> None:
        self._unproven -= 1
        self._next_take[lane] += 1
        if self._next_take[lane] == self._cuts[lane + 1]:
            self._owned.pop(worker, None)
