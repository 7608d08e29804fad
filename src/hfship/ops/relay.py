# SPDX-License-Identifier: Apache-2.0
"""Which file goes from where to which host next, when many hosts want the same files.

One machine that sends to all has one line: N hosts take N times as long as one. So a host that has
a file proven hands it on, and the more hosts have it, the more send it: with many parts almost all
lines are busy after the first few, and N hosts take little longer than one.

Pure: a schedule of values. Promises: a host gets each file once, from one place at a time; what few
have is sent first; a way that did not work is not gone again, and then all comes from here.
"""

from __future__ import annotations

from collections import Counter
from typing import Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from hfship.base.values import dataclass

HERE = ""  # the source that is this machine


@dataclass(frozen=True)
class Transfer:
    """One file on its way."""

    file: str
    source: str
    target: str


class Schedule:
    """What is where, and what is on its way.

    A host sends one file at a time, and takes one. So does this machine, unless it is the only one
    that sends: then `slots` at a time.

    >>> schedule = Schedule(["a", "b"], ["x", "y"], slots=4)
    >>> first = schedule.next()
    >>> first
    Transfer(file='a', source='', target='x')
    >>> schedule.next() is None  # the line of this machine is taken
    True
    >>> schedule.arrived(first)
    >>> second = schedule.next()
    >>> second
    Transfer(file='b', source='', target='y')
    >>> schedule.arrived(second)
    >>> schedule.next(), schedule.next()  # from here on hosts send to each other
    (Transfer(file='b', source='y', target='x'), Transfer(file='a', source='x', target='y'))
    """

    def __init__(
        self,
        files: Sequence[str],
        hosts: Sequence[str],
        slots: int,
        there: Optional[Mapping[str, Iterable[str]]] = None,
    ) -> None:
        self._files = list(files)
        self._hosts = list(hosts)
        self._has: Dict[str, Set[str]] = {host: set((there or {}).get(host, ())) for host in hosts}
        self._has[HERE] = set(files)
        self._copies = Counter(file for has in self._has.values() for file in has)
        self._slots = dict.fromkeys([*hosts, HERE], 1)
        self._most_slots = slots
        self._running: List[Transfer] = []
        self._mute: Set[Tuple[str, str]] = set()  # (source, target) that did not work

    def next(self) -> Optional[Transfer]:
        """The transfer that begins now; None where nothing can until another has ended."""
        sending = Counter(one.source for one in self._running)
        taking = {one.target for one in self._running}
        free = [one for one in [*self._hosts, HERE] if sending[one] < self._slots[one]]
        targets = [host for host in self._hosts if host not in taking]
        for target in sorted(targets, key=lambda host: len(self._has[host])):
            transfer = self._for_target(target, free)
            if transfer is not None:
                self._running.append(transfer)
                return transfer
        return None

    def _for_target(self, target: str, free: Sequence[str]) -> Optional[Transfer]:
        """What a host gets next: what few have comes first, since it is what they can hand on; from
        another host if one can, so that the line of this machine is left for what nobody has."""
        lacks = [file for file in self._files if file not in self._has[target]]
        for file in sorted(lacks, key=lambda name: self._copies[name]):
            for source in free:
                if file in self._has[source] and (source, target) not in self._mute:
                    return Transfer(file, source, target)
        return None

    def arrived(self, transfer: Transfer) -> None:
        """It is there, proven."""
        self._running.remove(transfer)
        self._has[transfer.target].add(transfer.file)
        self._copies[transfer.file] += 1

    def failed(self, transfer: Transfer) -> None:
        """It did not come: that way is not gone again. Where it came from here, the host is given
        up."""
        self._running.remove(transfer)
        way = (transfer.source, transfer.target)
        self._mute.add(way)
        if transfer.source == HERE:
            self._hosts.remove(transfer.target)
        else:
            self._slots[HERE] = self._most_slots

    def rounds(self) -> int:
        """How many rounds it takes where each transfer takes as long as every other: the schedule
        is run to its end."""
        count = 0
        while True:
            while self.next() is not None:
                pass
            if not self._running:
                return count
            for transfer in list(self._running):
                self.arrived(transfer)
            count += 1
