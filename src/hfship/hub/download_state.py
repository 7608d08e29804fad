# SPDX-License-Identifier: Apache-2.0
"""What the threads of a download share.

Owns the state of every file under way and the one condition variable that guards it. The decisions
are made by pure parts (RangeScheduler, EndpointChoice, Connections) whose lock is held here. Each
public method is one whole step; a thread that depends on a step of another one waits here for it.
Never sends, writes or reports.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Set, Tuple

from hfship.base.files import CHUNK, filesystem_of
from hfship.base.text import human_bytes
from hfship.base.values import dataclass, field
from hfship.hub.connections import Connections, SlowConnection
from hfship.hub.partial import Finished, PartialFile
from hfship.hub.ranges import (
    MAX_CONNECTIONS,
    MIN_SHARE,
    SMALL_FILE,
    EndpointChoice,
    RangeScheduler,
    request_size,
)
from hfship.hub.reader import SharedAddress
from hfship.hub.retry import RetryableError

if TYPE_CHECKING:
    from hfship.base.progress import Stage
    from hfship.hub.partial import Transfer
    from hfship.hub.ranges import Flight, Intervals

COMPLAINT_INTERVAL_S = 5.0  # between two failures that the operator is shown
HASH_FROM = 4 * CHUNK  # bytes that a hash thread must find, or the end of the file

Spans = List[Tuple[int, int]]


@dataclass(frozen=True)
class TransferSettings:
    """How to download: connections (None = as many as are worth it), bytes per second (None = all
    that come), and mirrors of the Hub that are asked first."""

    connections: Optional[int] = None
    limit_bps: Optional[float] = None
    mirrors: Tuple[str, ...] = ()

    @property
    def most_connections(self) -> int:
        return self.connections or MAX_CONNECTIONS


@dataclass
class FileState:
    """One file of a download. Only the thread that made it `busy` touches `partial.hasher`."""

    transfer: Transfer
    partial: PartialFile
    busy: bool = False  # a thread hashes it, or throws away what came of it
    rejections: int = 0  # how often all of it was there, and wrong
    finished: Optional[Finished] = None  # by the reader that brought it
    addresses: Dict[int, SharedAddress] = field(default_factory=dict)  # endpoint -> where it is

    @property
    def size(self) -> int:
        return self.transfer.remote.size


class ModelsUnderWay:
    """Which of several models are still being fetched, given the model of each file."""

    def __init__(self, models: Sequence[str]) -> None:
        self._left = Counter(models)  # files to come, in the order of the models
        self._count = len(self._left)

    def finish(self, model: str) -> None:
        """A file of a model is complete."""
        self._left[model] -= 1
        if not self._left[model]:
            del self._left[model]

    @property
    def label(self) -> str:
        """The first that is not complete, and how many are; "" where there is but one.

        >>> models = ModelsUnderWay(["a", "b", "b", "c"])
        >>> models.finish("b")
        >>> models.label
        '1/3 a'
        >>> models.finish("a")
        >>> models.label
        '2/3 b'
        """
        if self._count < 2 or not self._left:
            return ""
        number = self._count - len(self._left) + 1
        return f"{number}/{self._count} {next(iter(self._left))}"


class DownloadState:
    """The files of a download by number, their ranges, the connections and how it ended.

    Endpoints are numbers too: the mirrors in their order, then the Hub.
    """

    def __init__(
        self,
        transfers: Sequence[Transfer],
        settings: TransferSettings,
        stage: Stage,
        stop: threading.Event,
    ) -> None:
        filesystem = filesystem_of(transfers[0].folder)
        self.files = [
            FileState(transfer, PartialFile(transfer, filesystem)) for transfer in transfers
        ]
        have = [file.partial.found() for file in self.files]
        self.scheduler = RangeScheduler([file.size for file in self.files], have)
        self.sources = EndpointChoice(len(settings.mirrors) + 1)
        self.most_connections = min(settings.most_connections, self._pieces(have))
        self.connections = Connections(self.most_connections, bool(settings.connections))
        self._is_limited = settings.limit_bps is not None
        self.stop = stop  # set when the run ends, by whom ever
        self.failure: Optional[BaseException] = None  # the first that ended the run
        # One lock, and a condition for each kind of thread that waits: a download of thousands of
        # small files would wake all of them twice for each.
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # a flight landed, a file is not busy any more
        self._hashable = threading.Condition(lock)  # a hash thread has something to do
        self._ended = threading.Condition(lock)  # the run is over
        self._stage = stage
        self._finished = 0
        self._complained_at = 0.0
        # Files with something to hash or to publish. An empty file has nothing to fetch: its hash
        # finishes it.
        self._unfinished: Set[int] = {
            number for number, file in enumerate(self.files) if have[number].spans or file.size == 0
        }
        self._models = ModelsUnderWay([transfer.folder.name for transfer in transfers])
        stage.model = self._models.label or stage.model
        stage.skip(sum(intervals.total for intervals in have))
        stage.expect(len(transfers))

    def _pieces(self, have: Sequence[Intervals]) -> int:
        """How many connections could have something to do at once."""
        missing = [file.size - had.total for file, had in zip(self.files, have)]
        return sum(1 + size // MIN_SHARE for size in missing)

    # -- the run

    @property
    def complete(self) -> bool:
        return self._finished == len(self.files)

    @property
    def over(self) -> bool:
        return self.complete or self.stop.is_set()

    @property
    def arrived(self) -> str:
        """How much is there, in words: "1.2 GB of 3.4 GB"."""
        return f"{human_bytes(self._stage.done)} of {human_bytes(self._stage.total)}"

    def wait_until_over(self) -> None:
        """Return when every file is finished, a thread failed, or the run is being stopped."""
        with self._changed:
            while self.failure is None and not self.over:
                self._ended.wait(0.2)

    def end(self) -> None:
        """Send every thread home."""
        self.stop.set()
        with self._changed:
            for waiting in (self._changed, self._hashable, self._ended):
                waiting.notify_all()

    def fail(self, failure: BaseException) -> None:
        """A thread ended badly: so does the run. The first failure is the one that is raised."""
        with self._changed:
            if self.failure is None:
                self.failure = failure
            self._ended.notify_all()

    def may_complain(self, now: float) -> bool:
        """Was the operator shown no failure for COMPLAINT_INTERVAL_S? Then this one is shown."""
        if now - self._complained_at <= COMPLAINT_INTERVAL_S:
            return False
        self._complained_at = now
        return True

    # -- connections

    def open_connections(self) -> List[int]:
        """The numbers of the connections that are to be opened now."""
        with self._changed:
            return self.connections.open_missing()

    def adapt_connections(self, goodput: float) -> None:
        """Decide how many connections there are from now on, by the bytes per second that came."""
        with self._changed:
            self.connections.adapt(goodput)

    def drop_slow(self, number: int, now: float) -> Optional[SlowConnection]:
        """Its speed if connection `number` is to be dialled again."""
        with self._changed:
            return self.connections.drop_slow(number, now)

    def wants(self, number: int, flight: Optional[Flight] = None) -> bool:
        """May connection `number` go on? One too many still brings its flight; one that crowds the
        server only if it is soon there."""
        if self.stop.is_set():
            return False
        if number < self.connections.limit:
            return True
        if flight is None:
            return False
        if self.connections.is_crowding(number):
            return flight.is_soon_there(time.monotonic())
        return True

    # -- ranges

    def next_flight(self, number: int) -> Optional[Flight]:
        """Wait for a range for connection `number`.

        None when every file is finished, the run ends, or the connection is one too many; then it
        counts as closed.
        """
        with self._changed:
            while self.wants(number) and not self.complete:
                left = (self._stage.total - self._stage.done) / self.connections.limit
                speed = self.connections.speed(number)
                now = time.monotonic()
                flight = self.scheduler.next_flight(request_size(speed, left), now)
                if flight:
                    flight.expect(speed, now)
                    self._unfinished.add(flight.file)
                    return flight
                self._changed.wait(0.5)
            self.connections.closed(number)

        return None

    def grant(self, flight: Flight, window: int) -> int:
        """Let the reader of a flight write `window` bytes, or what is left; up to where that is."""
        with self._changed:
            return self.scheduler.grant(flight, window)

    def grant_small(self, flight: Flight) -> bool:
        """Let the reader of a flight write all of its file, if that is a small one and the rate is
        not limited."""
        size = self.files[flight.file].size
        if flight.start > 0 or flight.stop < size or size > SMALL_FILE or self._is_limited:
            return False
        self.grant(flight, size)
        return True

    def advance(self, flight: Flight, count: int) -> None:
        """`count` more bytes of a flight are written."""
        with self._changed:
            new = self.scheduler.advance(flight, count)
        self._stage.add(new)

    def take_whole(self, flight: Flight) -> None:
        """The server ignores Range: the flight gets the whole file. Raises RetryableError for one
        that does not begin the file."""
        with self._changed:
            self.scheduler.without_ranges(flight)
        if flight.start > 0:
            raise RetryableError("the server ignores Range: the file must come in one piece")

    def land(self, flight: Flight) -> bool:
        """Give a flight back. True when it completed a small file: the file is then `busy`, and the
        caller has to hash it.

        Handed to the hash threads, thousands of small files would wait with open descriptors.
        """
        file = self.files[flight.file]
        with self._changed:
            self.scheduler.land(flight)
            whole = (
                file.size <= SMALL_FILE
                and not file.busy
                and flight.file in self._unfinished
                and self.scheduler.have[flight.file].total == file.size
            )
            if whole:
                file.busy = True
            elif flight.file in self._unfinished and self._worth_hashing(flight.file):
                self._hashable.notify()
            self._changed.notify_all()

        return whole

    # -- where the bytes come from

    def choose_endpoint(self, number: int) -> int:
        """The endpoint to ask for a range of this file."""
        with self._changed:
            return self.sources.choose(number)

    def endpoint_failed(self, endpoint: int, faltered: bool) -> None:
        """A request failed in a way that may pass; see SourceFaltered."""
        with self._changed:
            self.sources.fault(endpoint, faltered)

    def endpoint_refused(self, number: int, endpoint: int) -> None:
        """This endpoint does not have this file."""
        with self._changed:
            self.sources.refuse(number, endpoint)

    def endpoint_served(self, number: int, endpoint: int) -> None:
        """Bytes of the file came from there."""
        with self._changed:
            self.sources.success(number, endpoint)

    def address(self, number: int, endpoint: int) -> SharedAddress:
        """What is known of where the file is at this endpoint."""
        with self._changed:
            return self.files[number].addresses.setdefault(endpoint, SharedAddress())

    def bytes_were_wrong(self, number: int) -> Set[int]:
        """The hash of a complete file does not match. Returns the endpoints that are not asked
        again; the one that is asked next is asked anew for the address of the file."""
        file = self.files[number]
        with self._changed:
            file.rejections += 1
            banned = self.sources.bytes_were_wrong(number)
            file.addresses.pop(self.sources.choose(number), None)
        return banned

    # -- files

    def next_to_hash(self) -> Optional[int]:
        """Wait for a file whose unbroken beginning has grown beyond its hash; it is then `busy`.
        None when the run is over."""
        with self._changed:
            while not self.over:
                for number in self._unfinished:
                    if self._worth_hashing(number):
                        self.files[number].busy = True
                        return number
                self._hashable.wait(0.1)

        return None

    def _worth_hashing(self, number: int) -> bool:
        file = self.files[number]
        if file.busy:
            return False

        prefix = self.scheduler.have[number].prefix
        if prefix == file.size:
            return True

        unhashed = prefix - file.partial.hasher.position
        return unhashed >= HASH_FROM

    def prefix(self, number: int) -> int:
        """Bytes in the unbroken beginning of a file."""
        with self._changed:
            return self.scheduler.have[number].prefix

    def claim(self, number: int) -> bool:
        """Wait until nobody is busy with a file, and be it. False when it is finished already."""
        file = self.files[number]
        with self._changed:
            self._changed.wait_for(lambda: not file.busy or self.stop.is_set())
            if number not in self._unfinished:
                return False
            file.busy = True
        return True

    def release(self, number: int) -> None:
        """Not busy with this file any more."""
        with self._changed:
            self.files[number].busy = False
            if number in self._unfinished and self._worth_hashing(number):
                self._hashable.notify()
            self._changed.notify_all()

    def wait_until_quiet(self, number: int) -> None:
        """Return when no reader can be writing to a file any more. Raises KeyboardInterrupt when
        the run ends."""
        with self._changed:
            self._changed.wait_for(lambda: self.scheduler.quiet(number) or self.stop.is_set())
            if self.stop.is_set():
                raise KeyboardInterrupt

    def fetch_again(self, number: int) -> None:
        """Hand out all of a file again, as soon as it is quiet. Raises KeyboardInterrupt when the
        run ends."""
        with self._changed:
            self.scheduler.give_up(number)
            self.wait_until_quiet(number)
            lost = self.scheduler.restart(number)
        self._stage.add(-lost)

    def finished(self, number: int) -> None:
        """A file has its name."""
        with self._changed:
            self._unfinished.discard(number)
            self._finished += 1
            self._models.finish(self.files[number].transfer.folder.name)
            self._stage.model = self._models.label or self._stage.model
            if self.complete:
                self._ended.notify_all()
        self._stage.finish(1)

    def spans(self) -> Dict[int, Spans]:
        """Number -> the ranges that arrived, of each file under way."""
        with self._changed:
            return {number: list(self.scheduler.have[number].spans) for number in self._unfinished}
