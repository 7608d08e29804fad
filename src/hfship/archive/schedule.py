# SPDX-License-Identifier: Apache-2.0
"""Which worker makes or takes which frame.

Owns the order of work in pack, verify and unpack. To *make* a frame is to produce its content: read
and compressed, or decoded. To *take* it is to follow the content in the order of its lane, which is
what hashing needs. Lanes (see archive/lanes.py) are independent of each other.

Promises: every frame is made once, and every lane is taken in its order by one worker. Never:
touches a disk; the schedule decides from values only, the workers act.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from hfship.base.values import dataclass
from hfship.base.workers import FORK_SIZE

if TYPE_CHECKING:
    from hfship.archive.frames import Buffer
    from hfship.archive.stream_check import StreamCheck

WORKERS_MEMORY = 240 << 20  # bytes, of all workers: with us, what hfship needs stays below 300 MB
WORKER_MEMORY = 5 << 20  # bytes, of a worker that holds no frame

_NO_SLOT = -1
_LOST = -1


class Step(NamedTuple):
    """What a worker has to do with frame `at` of a lane: make its content, take it, or both.

    Between making and taking by two workers the content lies in a slot, `size` bytes of it; -1 as
    `size` if it is lost.
    """

    lane: int
    at: int
    make: bool
    take: bool
    slot: int = _NO_SLOT
    size: int = _LOST


class _Held(NamedTuple):
    """Content that was made and waits to be taken."""

    slot: int
    size: int


@dataclass
class _LaneState:
    """How far a lane is: frames given out to be made, given out to be taken, and done with."""

    first: int  # the number of its first frame, counted over all lanes
    length: int  # frames
    made: int = 0
    taken: int = 0
    done: int = 0


class Schedule:
    """Who makes and who takes the frames of lanes; `lengths` has the number of frames of each.

    A worker that begins a lane owns it, and takes all its frames. It makes them, too, unless
    another was faster: a worker with nothing to take makes frames of other lanes ahead, into one
    of `slots`. Frames from number `limit` on, counted over all lanes, wait; with `serial`, a lane
    begins only when those before it are done.
    """

    def __init__(self, lengths: Sequence[int], slots: int, serial: bool = False) -> None:
        self._serial = serial
        self._lanes: List[_LaneState] = []
        first = 0
        for length in lengths:
            self._lanes.append(_LaneState(first, length))
            first += length

        self.limit = first

        self._owned: Dict[int, int] = {}  # worker -> lane
        self._next_lane = 0  # the first that nobody has begun
        self._to_make: List[int] = []  # lanes that were begun, with frames to make
        self._undone = 0  # lanes that were begun and are not done
        self._taken = 0  # frames of all lanes, given out to be taken
        self._free = list(range(slots))
        self._held: Dict[Tuple[int, int], _Held] = {}  # (lane, at) -> content
        self._waiting: Set[int] = set()  # idle workers that have no lane, and nothing to make

    @property
    def all_taken(self) -> bool:
        """Whether only the limit keeps workers waiting."""
        return self._taken == self.limit

    def next(self, worker: int, idle: bool) -> Optional[Step]:
        """The next step of a worker; None while there is none.

        A worker that owns a lane makes frames for others only if it is `idle`, that is, has no
        step left to do, and no worker without a lane waits for such frames.
        """
        self._waiting.discard(worker)
        lane = self._owned.get(worker)
        if lane is None and self._may_begin_lane():
            lane = self._begin_lane(worker)

        if lane is None:
            step = self._make_ahead()
            if step is None and idle:
                self._waiting.add(worker)
            return step

        step = self._take_held(worker, lane)
        if step is None:
            step = self._make_and_take(worker, lane)
        if step is None and idle and not self._waiting:
            step = self._make_ahead()
        return step

    def done(self, step: Step, size: Optional[int]) -> None:
        """A step is done; it made `size` bytes of content, None if they are lost."""
        if step.take:
            lane = self._lanes[step.lane]
            lane.done += 1
            if lane.done == lane.length:
                self._undone -= 1
        elif size is not None:
            self._held[step.lane, step.at] = _Held(step.slot, size)
            return  # the slot is in use until the frame is taken
        else:
            self._held[step.lane, step.at] = _Held(_NO_SLOT, _LOST)

        if step.slot != _NO_SLOT:
            self._free.append(step.slot)

    # -- lanes

    def _may_begin_lane(self) -> bool:
        if self._next_lane == len(self._lanes):
            return False
        if self._serial and self._undone:
            return False
        return self._lanes[self._next_lane].first < self.limit

    def _begin_lane(self, worker: int) -> int:
        lane = self._next_lane
        self._next_lane += 1
        self._undone += 1
        self._to_make.append(lane)
        self._owned[worker] = lane
        return lane

    # -- the cases of `next`

    def _take_held(self, worker: int, lane: int) -> Optional[Step]:
        """Take the next frame of the worker's lane, which another has made."""
        at = self._lanes[lane].taken
        held = self._held.pop((lane, at), None)
        if held is None:
            return None

        self._count_taken(worker, lane)
        return Step(
            lane,
            at,
            make=False,
            take=True,
            slot=held.slot,
            size=held.size,
        )

    def _make_and_take(self, worker: int, lane: int) -> Optional[Step]:
        """Make and take the next frame of the worker's lane."""
        state = self._lanes[lane]
        at = state.taken
        if at != state.made or not self._may_make(lane):
            return None  # another worker is making it, or it has to wait

        self._count_made(lane)
        self._count_taken(worker, lane)
        return Step(lane, at, make=True, take=True)

    def _make_ahead(self) -> Optional[Step]:
        """Make a frame for the owner of another lane, into a free slot."""
        if not self._free:
            return None

        lanes = [lane for lane in self._to_make if self._may_make(lane)]
        if not lanes:
            return None

        # The lane with the fewest frames made and not taken: its owner will wait first.
        lane = min(lanes, key=self._frames_ahead)
        at = self._lanes[lane].made
        slot = self._free.pop()
        self._count_made(lane)
        return Step(lane, at, make=True, take=False, slot=slot)

    def _may_make(self, lane: int) -> bool:
        """Whether a lane has a frame left to make, below the limit."""
        state = self._lanes[lane]
        if state.made == state.length:
            return False
        return state.first + state.made < self.limit

    def _frames_ahead(self, lane: int) -> int:
        """Frames of a lane that are made, or being made, and not taken."""
        state = self._lanes[lane]
        return state.made - state.taken

    def _count_made(self, lane: int) -> None:
        state = self._lanes[lane]
        state.made += 1
        if state.made == state.length:
            self._to_make.remove(lane)

    def _count_taken(self, worker: int, lane: int) -> None:
        state = self._lanes[lane]
        state.taken += 1
        self._taken += 1
        if state.taken == state.length:
            del self._owned[worker]


class LaneWork:
    """What the workers of a schedule share: `slots` of memory, each of `slot_size` bytes, for
    content that one makes and another takes. In each worker it also has the check of the lane
    that the worker takes.

    With a `slot_size` of 0, what another made is made again.
    """

    def __init__(self, slots: int, slot_size: int) -> None:
        self.slots = slots
        self._slot_size = slot_size
        # Anonymous memory is shared with the workers that are forked after this.
        memory = mmap.mmap(-1, max(slots * slot_size, 1))
        self._memory = memoryview(memory)
        self._lane = -1
        self._check: Optional[StreamCheck] = None  # of that lane

    def do(
        self,
        step: Step,
        make: Callable[[], Optional[Buffer]],
        check: Callable[[], StreamCheck],
        length: int,
    ) -> Optional[int]:
        """Carry out a step on `length` bytes of the stream: `make` brings the content, None if it
        is lost; `check` begins the check of a lane. Returns the bytes of content, or None."""
        content: Optional[Buffer]
        if step.make or not self._slot_size:
            content = make()
        elif step.size == _LOST:
            content = None
        else:
            content = self._slot(step, step.size)

        if step.take:
            if step.lane != self._lane or self._check is None:
                self._lane = step.lane
                self._check = check()
            self._check.feed(content, length)
        elif content is not None and self._slot_size:
            self._slot(step, len(content))[:] = content

        if content is None:
            return None

        return len(content)

    def _slot(self, step: Step, size: int) -> memoryview:
        first = step.slot * self._slot_size
        return self._memory[first : first + size]


def workers_for(jobs: int, size: int, frame: int = 0, held: int = 5) -> int:
    """How many workers to fork for `size` bytes of work, `jobs` at most; 0 for none. Each holds
    up to `held` frames of `frame` bytes at once."""
    if size < FORK_SIZE:
        return 0
    affordable = WORKERS_MEMORY // (WORKER_MEMORY + held * frame)
    return min(jobs, max(affordable, 1))
