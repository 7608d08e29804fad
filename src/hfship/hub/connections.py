# SPDX-License-Identifier: Apache-2.0
"""Which connections a download has, how fast they are, and which is not worth keeping. Pure.

Some edges of a CDN serve a tenth of what others do, and a connection stays with its edge: one that
is much slower than the fastest is dialled again, and may come to a better one. How many there are
is tried by ConnectionCount, unless the operator gave a number.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, Dict, List, NamedTuple, Optional, Set

from hfship.hub.ranges import EVICTIONS_PER_MINUTE, SLOW_SHARE, ConnectionCount


class SlowConnection(NamedTuple):
    """Bytes per second of a connection that is to be dialled again, and of the fastest one."""

    speed: float
    fastest: float


class Connections:
    """The connections of a download by number, from 0. Those from `limit` on are too many: they
    close by themselves.

    Values in, decisions out; its owner holds a lock around every call but `measured` and `speed`.

    >>> connections = Connections(most=2, fixed=True)
    >>> connections.open_missing(), connections.open_missing()
    ([0, 1], [])
    >>> connections.measured(0, 9e6); connections.measured(1, 1e6)
    >>> connections.drop_slow(0, now=1.0), connections.drop_slow(1, now=1.0)
    (None, SlowConnection(speed=1000000.0, fastest=9000000.0))
    """

    def __init__(self, most: int, fixed: bool) -> None:
        self.fixed = fixed
        self._count = ConnectionCount(most)
        self.limit = most
        if not fixed:
            self.limit = self._count.limit
        self._open: Set[int] = set()
        self._speeds: Dict[int, float] = {}  # bytes per second
        self._behind: Set[int] = set()  # whose readers are what is slow
        self._dropped_at: Deque[float] = deque(maxlen=EVICTIONS_PER_MINUTE)

    def open_missing(self) -> List[int]:
        """The numbers below the limit that are not open. From now on they count as open."""
        wanted = set(range(self.limit))
        missing = wanted - self._open
        self._open |= missing
        return sorted(missing)

    def closed(self, number: int) -> None:
        """This connection has ended."""
        self._open.discard(number)
        self._speeds.pop(number, None)

    def adapt(self, goodput: float) -> None:
        """Set the limit by the bytes per second that all of them brought since the last call."""
        self.limit = self._count.tick(goodput)

    def is_crowding(self, number: int) -> bool:
        """Is this connection one of those that made a server crawl? That does so for as long as
        they stay. Any other that is too many may bring its range first."""
        return number >= self._count.most

    def measured(self, number: int, speed: float, behind: bool = False) -> None:
        """A connection ran at `speed` bytes per second; more came than its reader took if that is
        `behind`. No lock: a number has one thread."""
        self._speeds[number] = speed
        if behind:
            self._behind.add(number)
        else:
            self._behind.discard(number)

    def speed(self, number: int) -> float:
        """Its bytes per second as last measured; 0.0 before that."""
        return self._speeds.get(number, 0.0)

    def drop_slow(self, number: int, now: float) -> Optional[SlowConnection]:
        """Is this connection so much slower than the fastest that dialling again is worth it?

        If so its speed is forgotten, and that counts against EVICTIONS_PER_MINUTE. `now` is
        monotonic time in seconds.
        """
        if number in self._behind:
            return None
        if not self.fixed and not self._count.has_room:
            return None  # they share a full line, and another would have no more of it
        speed = self.speed(number)
        fastest = max(self._speeds.values(), default=0.0)
        if speed >= SLOW_SHARE * fastest:
            return None
        if self._dropped_enough(now):
            return None

        self._dropped_at.append(now)
        self._speeds.pop(number, None)
        return SlowConnection(speed, fastest)

    def _dropped_enough(self, now: float) -> bool:
        """As many in the last minute as may be?"""
        dropped_at = self._dropped_at
        if len(dropped_at) < EVICTIONS_PER_MINUTE:
            return False
        return dropped_at[0] > now - 60
