# SPDX-License-Identifier: Apache-2.0
"""Which range is asked for next, over how many connections, and from where. Pure.

Owns the decisions of a download and the figures that tune it: RangeScheduler hands out ranges,
ConnectionCount finds how many connections are worth having, EndpointChoice picks a mirror or the
Hub, and check_range_answer tells whether an answer is what was asked for.
Promises: every byte is handed out until it has arrived, and no byte to two readers at a time.
Never: touches a socket, a disk, a clock or a lock. Values come in, decisions go out; the owner of
an object holds a lock around every call.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Deque, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from hfship.base.values import dataclass
from hfship.hub.retry import RetryableError

# -- ranges

ACTIVE_FILES = 4  # large files under way at once: few, so that writes are near-sequential
SMALL_FILE = 1 << 20  # bytes; a file up to this size is one request
SMALL_FILE_TURN = 4  # every fourth range is of a small file, as long as there are large ones
FIRST_REQUEST = 8 << 20  # bytes that a connection is asked for while nobody knows its speed
MIN_REQUEST = 1 << 20  # bytes; what one request asks for at least ...
MAX_REQUEST = 64 << 20  # ... and at most
REQUEST_SECONDS = 3.0  # in between, what a connection brings in this time, but no more than ...
# ... one part in so many of what each still has to bring: so little is taken over at the end, of
# which the server may have sent much already.
REQUEST_SHARE = 2
MIN_SHARE = 2 << 20  # bytes; for less, a second connection costs more than it brings ...
MIN_STEAL = 128 << 10  # ... but where the first is known to take long
OVERDUE_S = 0.25  # a range that is late by so much may take long; by less, a busy machine is late
SOON_S = 1.0  # a range that is there so soon is left to its connection: closing that costs more
BLOCK_SIZE = 8 << 20  # bytes between the marks by which a damaged file is repaired in part

# -- readers: forked processes that write what comes

MOST_READERS = 8  # processes of 8 MB each, one per core; further connections are threads of theirs
READ_SIZE = 1 << 20  # bytes; the most that one call takes from a connection
MIN_WINDOW = 16 << 10  # bytes that a reader writes before it reports; a kill loses so much ...
MAX_WINDOW = 8 << 20  # ... up to so much
WINDOW_S = 0.05  # in between, what its connection brings until the next journal
REPORT_S = 0.2  # a reader whose window takes longer reports in between
# Bytes of a connection that came and wait for its reader: from so many on, the reader is what is
# slow, on a machine that has too much to do. Dialling again would lose them, and help nobody.
BEHIND = 64 << 10
HASH_STEP = 64 << 20  # bytes that a hash thread takes from one file before it looks for another

# -- sources that hardly send anything

TRICKLE_BPS = 512  # bytes per second; less than a modem brings ...
TRICKLE_S = 15.0  # ... over so long is a source to leave, for another or for a while
MIN_PROGRESS = 16 << 10  # bytes; an attempt that breaks after fewer did not get on

# -- journals

PUBLISH_INTERVAL_S = 0.05  # at most, between two journals that say what has arrived ...
PUBLISH_SHARE = 0.005  # ... or this share of all bytes, which a kill loses, if that is sooner ...
MIN_PUBLISH_INTERVAL_S = 0.01  # ... but not as soon as this
SYNC_INTERVAL_S = 2.0  # a power cut loses what came in so long ...
SYNC_BYTES = 256 << 20  # ... or so many bytes, whichever is less

# -- connections

MAX_CONNECTIONS = 32
START_CONNECTIONS = 8  # as huggingface_hub; of fewer, all may be slow with none to compare them to
TICK_S = 0.5  # between two looks at the goodput
FIRST_TICKS = 2  # that tell nothing: connections gather speed
WORTH_IT = 1.05  # times the goodput before: so much must more connections bring
# Of what they would bring if each ran as fast as those before: with less, the line is full.
ROOM_SHARE = 0.5
COLLAPSE = 0.3  # of the best goodput seen: a server that punishes many streams ...
COLLAPSE_TICKS = 8  # ... does so for longer than a hiccup lasts (huggingface_hub#4893)
HOLD_TICKS = 20  # without a further trial after a step back
# CDN edges are bimodal, 8.7 and 68 MB/s (xet-core#821): a connection that runs at less than this
# share of the fastest one's speed is dialled again, once it has had this long to gather speed.
SLOW_SHARE = 0.3
SLOW_AFTER_S = 1.0
EVICTIONS_PER_MINUTE = 200  # with 70 % slow edges each of 32 connections is dialled 3.3 times

# -- endpoints

FAULTS_PER_STEP = 3  # in a row: so many put an endpoint behind those with fewer


class Intervals:
    """A set of integers as disjoint sorted half-open intervals: which bytes of a file are there.

    >>> have = Intervals([(0, 4), (8, 12)])
    >>> have.add(4, 6)
    >>> have.spans, have.missing(16), have.total, have.prefix
    ([(0, 6), (8, 12)], [(6, 8), (12, 16)], 10, 6)
    """

    def __init__(self, spans: Iterable[Tuple[int, int]] = ()) -> None:
        self.spans: List[Tuple[int, int]] = []
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Insert [start, stop), merging what it touches."""
        if start >= stop:
            return

        spans = self.spans
        first = 0
        while first < len(spans) and spans[first][1] < start:
            first += 1

        after = first  # the first interval behind those that the new one touches
        while after < len(spans) and spans[after][0] <= stop:
            start = min(start, spans[after][0])
            stop = max(stop, spans[after][1])
            after += 1

        spans[first:after] = [(start, stop)]

    @property
    def total(self) -> int:
        """How many integers there are."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def prefix(self) -> int:
        """Length of the unbroken run from 0."""
        if not self.spans:
            return 0
        start, stop = self.spans[0]
        return stop if start == 0 else 0

    def missing(self, size: int) -> List[Tuple[int, int]]:
        """The gaps in [0, size)."""
        gaps = []
        position = 0
        for start, stop in [*self.spans, (size, size)]:
            if position < start:
                gaps.append((position, start))
            position = stop
        return gaps


class Flight:
    """A range on its way: [position, stop) of file number `file` is still to come.

    `stop` shrinks when an idle worker takes over the rear, but not below `granted`: up to there its
    reader may be writing already. `due_at` is when all of it should be there, in monotonic seconds;
    before all times while nobody knows.
    """

    __slots__ = ("due_at", "file", "granted", "position", "start", "stop")

    def __init__(self, file: int, start: int, stop: int) -> None:
        self.file = file
        self.start = start
        self.position = start
        self.granted = start
        self.stop = stop
        self.due_at = float("-inf")

    def expect(self, bytes_per_second: float, now: float) -> None:
        """It goes on at this speed."""
        if bytes_per_second > 0:
            self.due_at = now + self.left / bytes_per_second

    def is_soon_there(self, now: float) -> bool:
        """Is all of it there in SOON_S? One that is late already may not come at all."""
        return now <= self.due_at <= now + SOON_S

    def least_share(self, now: float) -> int:
        """Bytes that another worker must get of it to be worth a request."""
        takes_long = self.due_at > now + SOON_S
        is_overdue = float("-inf") < self.due_at < now - OVERDUE_S
        if takes_long or is_overdue:
            return MIN_STEAL
        return MIN_SHARE

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return self.stop - self.position

    @property
    def free(self) -> int:
        """Bytes at its rear that another worker may take over."""
        return self.stop - self.granted


@dataclass
class _FileState:
    """What the scheduler knows of one file."""

    size: int  # bytes
    gaps: List[Tuple[int, int]]  # have not arrived and are not on their way; ascending
    ranged: bool = True  # does the server send ranges of it?
    flights: int = 0  # on their way

    @property
    def is_small(self) -> bool:
        """Is it fetched by one request?"""
        return self.size <= SMALL_FILE


class RangeScheduler:
    """Decides which range of which file comes next.

    A few large files at once, each in ascending order (near-sequential writes, and the hash can
    follow); small files in between; at the end idle workers split the largest range on its way, so
    that nobody waits for a last connection. Files are numbers, in the order of `sizes` (bytes).
    """

    def __init__(self, sizes: Sequence[int], have: Sequence[Intervals]) -> None:
        self.have = list(have)
        self._files: List[_FileState] = []
        for size, found in zip(sizes, have):
            self._files.append(_FileState(size, found.missing(size)))

        self._flights: List[Flight] = []
        self._turn = 0
        self._small: Deque[int] = deque()
        self._large: Deque[int] = deque()
        for number, file in enumerate(self._files):
            if file.gaps:
                self._queue_of(number).append(number)

        self._sort_large()

    def _sort_large(self) -> None:
        """The largest file first: it would end last."""
        numbers = sorted(self._large, key=lambda number: -self._files[number].size)
        self._large = deque(numbers)

    def _queue_of(self, number: int) -> Deque[int]:
        """Where a file waits until all of it is handed out."""
        if self._files[number].is_small:
            return self._small
        return self._large

    def next_flight(self, request_size: int, now: float = 0.0) -> Optional[Flight]:
        """The next range for an idle worker, at most `request_size` bytes, at monotonic time `now`.

        None when nothing is left to hand out.
        """
        self._turn += 1
        queues = [self._large, self._small]
        if self._turn % SMALL_FILE_TURN == 0:
            queues.reverse()
        for queue in queues:
            number = self._least_busy(queue)
            if number is not None:
                return self._take_from(number, request_size)

        return self._steal(now)

    def grant(self, flight: Flight, window: int) -> int:
        """Allow the flight's reader to write `window` bytes, or what is left.

        Returns the position up to which it may write.
        """
        flight.granted = min(flight.stop, flight.position + window)
        return flight.granted

    def advance(self, flight: Flight, count: int) -> int:
        """`count` bytes at flight.position are written.

        Returns how many of them were not there before.
        """
        have = self.have[flight.file]
        before = have.total
        count = min(count, flight.left)  # nothing counts of a file that was given up meanwhile
        have.add(flight.position, flight.position + count)
        flight.position += count
        after = have.total
        size = self._files[flight.file].size
        if after == size:
            # Others may be on their way, where one server ignores Range: they bring nothing new.
            self.give_up(flight.file)

        return after - before

    def land(self, flight: Flight) -> None:
        """The worker is done with the flight; what did not arrive is handed out again."""
        self._flights.remove(flight)
        self._files[flight.file].flights -= 1
        if flight.left > 0:
            self._reopen(flight.file, (flight.position, flight.stop))

    def without_ranges(self, flight: Flight) -> None:
        """The server ignores Range: one flight gets all of the file, and no other joins. It is this
        one, if it begins the file; else the next, when this one has landed."""
        file = self._files[flight.file]
        file.ranged = False
        if flight.start == 0:
            file.gaps = []
            flight.stop = file.size

    def give_up(self, number: int) -> None:
        """Nothing more is wanted of a file: its flights end where they are, and none begins."""
        self._files[number].gaps = []
        for flight in self._flights:
            if flight.file == number:
                flight.stop = flight.position

    def restart(self, number: int) -> int:
        """Fetch all of a file again that was given up and is quiet.

        Returns how many bytes of it were there.
        """
        lost = self.have[number].total
        self.have[number] = Intervals()
        whole = (0, self._files[number].size)
        self._reopen(number, whole)
        return lost

    def quiet(self, number: int) -> bool:
        """Is no flight of this file left? Before that it may be neither finished nor restarted."""
        return self._files[number].flights == 0

    def _least_busy(self, queue: Deque[int]) -> Optional[int]:
        """Of the first ACTIVE_FILES files of a queue, the one with the fewest flights.

        Files with nothing to hand out do not count; None when all are such.
        """
        while queue and not self._files[queue[0]].gaps:
            queue.popleft()

        best = None
        fewest = len(self._flights) + 1
        for number in islice(queue, ACTIVE_FILES):
            file = self._files[number]
            if not file.gaps:
                continue
            if file.flights and not file.ranged:
                continue  # its one flight brings all of it
            if file.flights < fewest:
                best = number
                fewest = file.flights

        return best

    def _take_from(self, number: int, request_size: int) -> Flight:
        """A flight for the first gap of a file, or for `request_size` bytes of it."""
        file = self._files[number]
        if not file.ranged:
            file.gaps = []
            return self._begin(number, 0, file.size)

        start, stop = file.gaps.pop(0)
        middle = start + request_size
        if stop - middle > MIN_REQUEST:  # a shorter rest is not worth a request of its own
            file.gaps.insert(0, (middle, stop))
            stop = middle

        return self._begin(number, start, stop)

    def _steal(self, now: float) -> Optional[Flight]:
        """The rear half of the flight with most left, taken from its worker. What is soon there
        stays with it: the server has sent much of that already, and would send it twice."""
        most = 0
        victim = None
        for flight in self._flights:
            file = self._files[flight.file]
            if flight.is_soon_there(now) or flight.free < 2 * flight.least_share(now):
                continue
            if file.ranged and flight.free > most:
                victim = flight
                most = flight.free

        if victim is None:
            return None

        stop = victim.stop
        victim.stop -= victim.free // 2
        return self._begin(victim.file, victim.stop, stop)

    def _begin(self, number: int, start: int, stop: int) -> Flight:
        flight = Flight(number, start, stop)
        self._flights.append(flight)
        self._files[number].flights += 1
        return flight

    def _reopen(self, number: int, gap: Tuple[int, int]) -> None:
        """Have a range handed out again."""
        file = self._files[number]
        file.gaps.append(gap)
        file.gaps.sort()
        queue = self._queue_of(number)
        if number not in queue:
            queue.appendleft(number)


class ConnectionCount:
    """How many connections are worth having, found by trying.

    Goes up while the sum of all grows; when it does not, steps back and holds for a while; halves
    when it collapses, and does not go there again. `limit` is the number now, `most` its maximum.
    `has_room` says that the last step up showed a line that takes more than the connections bring;
    before the first one nobody knows.
    """

    def __init__(self, most: int) -> None:
        self.limit = min(START_CONNECTIONS, most)
        self.most = most
        self._previous_limit = self.limit
        # Goodput (bytes/s) before the last step up; None once that is settled.
        self._before: Optional[float] = None
        self._best = 0.0  # goodput seen
        self._bad_ticks = 0  # in a row
        self._hold_ticks = 0  # still to come
        self._settle_ticks = FIRST_TICKS  # still to come: new connections are being set up
        self.has_room = False

    def tick(self, goodput: float) -> int:
        """The number of connections from now on, given the bytes per second since the last tick."""
        if self._settle_ticks:  # this tick tells nothing
            self._settle_ticks -= 1
            return self.limit

        self._best = max(self._best, goodput)
        if goodput < COLLAPSE * self._best:
            self._bad_ticks += 1
        else:
            self._bad_ticks = 0

        if self._bad_ticks >= COLLAPSE_TICKS and self.limit > 1:
            self._halve()
        elif self._before is not None and goodput < WORTH_IT * self._before:
            self._step_back()
        elif self._hold_ticks:
            self._hold_ticks -= 1
        elif self.limit < self.most:
            self._step_up(goodput)
        else:
            self._before = None

        return self.limit

    def _halve(self) -> None:
        """After a collapse: half of the connections from now on, and never more."""
        half = self.limit // 2
        self.most = max(1, half)
        self._change(self.most)
        self._best = 0.0
        self._bad_ticks = 0
        self._hold_ticks = HOLD_TICKS
        self.has_room = False

    def _step_back(self) -> None:
        """The last step up did not bring enough."""
        self._change(self._previous_limit)
        self._hold_ticks = HOLD_TICKS
        self.has_room = False

    def _step_up(self, goodput: float) -> None:
        """Try half as many more, two at least."""
        if self._before is not None:
            grown = self.limit / self._previous_limit - 1
            self.has_room = goodput > self._before * (1 + ROOM_SHARE * grown)
        more = max(2, self.limit // 2)
        self._change(min(self.most, self.limit + more))
        self._before = goodput

    def _change(self, limit: int) -> None:
        self._previous_limit = self.limit
        self.limit = limit
        self._before = None
        self._settle_ticks = 1


class Trickle:
    """Whether a connection hardly brings anything, though it is never still for long.

    >>> trickle = Trickle()
    >>> [trickle.is_all_that_comes(1, seconds=5.0) for _ in range(3)]
    [False, False, True]
    """

    def __init__(self) -> None:
        self._came = 0
        self._seconds = 0.0

    def is_all_that_comes(self, count: int, seconds: float) -> bool:
        """`count` more bytes came, in so many seconds of waiting for them."""
        self._came += count
        self._seconds += seconds
        if self._seconds < TRICKLE_S:
            return False

        too_few = self._came < TRICKLE_BPS * self._seconds
        self._came = 0
        self._seconds = 0.0
        return too_few


class EndpointChoice:
    """Which of several endpoints serves the next range: one that fails steps back.

    Endpoints are numbers in the order in which they are preferred; the last one is the Hub itself,
    which also made the listing. Files are numbers too.
    """

    def __init__(self, count: int) -> None:
        self.hub = count - 1
        self._faults = [0] * count  # in a row
        self._banned: Set[int] = set()
        self._refused: Set[Tuple[int, int]] = set()  # (file, endpoint)
        self._used: Dict[int, Set[int]] = {}  # file -> endpoints that its bytes came from

    def choose(self, file: int) -> int:
        """The endpoint to ask for a range of `file`: the first of those with the fewest faults."""
        best = self.hub
        fewest = None
        for place, faults in enumerate(self._faults):
            if place in self._banned or (file, place) in self._refused:
                continue
            steps = faults // FAULTS_PER_STEP
            if fewest is None or steps < fewest:
                best = place
                fewest = steps

        return best

    def fault(self, place: int, faltered: bool = False) -> None:
        """A request to it failed in a way that may pass. One that `faltered` steps back at once."""
        self._faults[place] += 1
        if faltered:
            self._faults[place] += FAULTS_PER_STEP - 1

    def refuse(self, file: int, place: int) -> None:
        """It does not have this file."""
        self._refused.add((file, place))

    def success(self, file: int, place: int) -> None:
        """Bytes of the file came from it."""
        self._faults[place] = 0
        self._used.setdefault(file, set()).add(place)

    def bytes_were_wrong(self, file: int) -> Set[int]:
        """The file's hash does not match. Returns the endpoints banned now.

        An endpoint that alone sent the file is banned. Of several none is convicted: for this file
        all but the Hub are out of the question from now on.
        """
        used = self._used.pop(file, set())
        mirrors = used - {self.hub}
        for place in mirrors:
            self._refused.add((file, place))

        if len(used) > 1:
            return set()

        self._banned |= mirrors
        return mirrors


def request_size(bytes_per_second: float, left: float) -> int:
    """Bytes of the next request of a connection that runs at this speed, where each connection has
    `left` bytes still to bring."""
    share = left / REQUEST_SHARE
    if not bytes_per_second:
        return min(FIRST_REQUEST, max(MIN_SHARE, int(share)))
    size = min(bytes_per_second * REQUEST_SECONDS, share)
    return min(MAX_REQUEST, max(MIN_REQUEST, int(size)))


def window_size(bytes_per_second: float) -> int:
    """Bytes that a reader at this speed writes before it reports."""
    size = int(bytes_per_second * WINDOW_S)
    return min(MAX_WINDOW, max(MIN_WINDOW, size))


def publish_interval(bytes_per_second: float, total: int) -> float:
    """Seconds until the next journal of a download of `total` bytes that runs at this speed.

    >>> publish_interval(10e6, 1_000_000_000), publish_interval(200e6, 1_000_000_000)
    (0.05, 0.025)
    """
    seconds = total * PUBLISH_SHARE / max(bytes_per_second, 1.0)
    return min(PUBLISH_INTERVAL_S, max(MIN_PUBLISH_INTERVAL_S, seconds))


def check_range_answer(
    status: int, headers: Mapping[str, str], start: int, stop: int, size: int
) -> bool:
    """Is this the answer to a request for [start, stop) of a file of `size` bytes?

    True: exactly that range follows; False: the server ignored Range and the whole file follows.
    Raises RetryableError for anything else.

    >>> check_range_answer(206, {"Content-Range": "bytes 4-7/10"}, 4, 8, 10)
    True
    >>> check_range_answer(200, {"Content-Length": "10"}, 4, 8, 10)
    False
    """
    encoding = headers.get("Content-Encoding", "identity")
    if encoding not in ("identity", ""):
        # CloudFront answers 200 with gzip to a Range that accepts gzip: huggingface_hub#3778.
        raise RetryableError(f"it compressed the body ({encoding[:20]!r})")
    if status == 206:
        sent = headers.get("Content-Range") or ""
        if _is_content_range(sent, start, stop, size):
            return True
        raise RetryableError(f"asked for bytes {start}-{stop - 1}/{size}, got {sent[:60]!r}")

    length = headers.get("Content-Length") or str(size)
    if status == 200 and length == str(size):
        return (start, stop) == (0, size)

    kind = headers.get("Content-Type") or "no type"
    raise RetryableError(f"it answers {status} with {length[:20]} bytes of {kind[:60]!r}")


def _is_content_range(value: str, start: int, stop: int, size: int) -> bool:
    """Does a Content-Range (RFC 9110 §14.4) say [start, stop) of `size` bytes, or of some file?"""
    total = value.rpartition("/")[2]
    return total in ("*", str(size)) and value == f"bytes {start}-{stop - 1}/{total}"
