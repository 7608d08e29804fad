# SPDX-License-Identifier: Apache-2.0
"""The download of many files: the threads that act.

Each connection has a thread, which sends its forked reader for one range after the other; hash
threads follow the unbroken beginning of each file and finish it; one thread publishes journals and
adapts the number of connections; the caller waits. What they share is DownloadState, which decides.

Promises: a file gets its final name only when every byte of it was hashed and matched the Hub's
hash; after kill -9 or a power cut the next run asks only for what is missing.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Sequence

from hfship.base.errors import AuthError, HfshipError, IncompleteError, IntegrityError, NetworkError
from hfship.base.proxies import ProxyLoginError
from hfship.base.text import counted, human_bytes
from hfship.base.workers import _short_of_memory, default_jobs
from hfship.hub.download_state import DownloadState, TransferSettings
from hfship.hub.gate import RateLimit
from hfship.hub.partial import accept_file
from hfship.hub.ranges import (
    ACTIVE_FILES,
    BEHIND,
    HASH_STEP,
    MIN_PROGRESS,
    MIN_PUBLISH_INTERVAL_S,
    PUBLISH_INTERVAL_S,
    SLOW_AFTER_S,
    SYNC_BYTES,
    SYNC_INTERVAL_S,
    TICK_S,
    Trickle,
    publish_interval,
    window_size,
)
from hfship.hub.reader import Fetched, OpenRange, Readers
from hfship.hub.retry import WORKER_RETRY, ObjectChanged, RetryableError, SourceFaltered

if TYPE_CHECKING:
    from hfship.base.progress import Stage
    from hfship.hub.partial import Finished, Transfer
    from hfship.hub.ranges import Flight
    from hfship.hub.reader import SharedAddress, Written
    from hfship.hub.transport import Transport


class Verifier:
    """Hashes files as they come. A file whose hash matches gets its name; any other is thrown away
    and fetched again, from another endpoint where there is one."""

    def __init__(self, client: Transport, state: DownloadState, endpoints: Sequence[str]) -> None:
        self._client = client
        self._state = state
        self._endpoints = endpoints

    def run(self) -> None:
        """A hash thread: whatever file has something to hash, until the run is over."""
        while True:
            number = self._state.next_to_hash()
            if number is None:
                return
            self.follow(number)

    def follow(self, number: int) -> None:
        """Hash what is new in the unbroken beginning of a file, at most HASH_STEP; at its end
        accept or reject it, unless its reader did so. The caller has made the file busy."""
        file = self._state.files[number]
        if file.finished:
            self.record(number, file.finished)
        else:
            self._hash_on(number)
        self._state.release(number)

    def _hash_on(self, number: int) -> None:
        file = self._state.files[number]
        hasher = file.partial.hasher
        prefix = self._state.prefix(number)
        stop = min(prefix, hasher.position + HASH_STEP)
        file.partial.hash_up_to(stop)
        if hasher.position == file.size:
            if hasher.matches():
                self.accept(number)
            else:
                self.reject(number)

    def accept(self, number: int) -> None:
        """Give a file, whose hash matches, its name."""
        state = self._state
        partial = state.files[number].partial
        state.wait_until_quiet(number)
        accept_file(partial)
        self._finished(number, partial.hasher.sha256)

    def record(self, number: int, finished: Finished) -> None:
        """Remember a file, to which its reader gave its name."""
        if finished.proof:
            self._state.files[number].transfer.log.put(finished.proof)
        self._finished(number, finished.sha256)

    def _finished(self, number: int, sha256: str) -> None:
        path = self._state.files[number].transfer.remote.path
        proof = f"{path}: verified, SHA-256 {sha256}"
        self._client.reporter.detail(proof)
        self._state.finished(number)

    def reject(self, number: int) -> None:
        """Throw away a file whose hash does not match, to be fetched again. Raises IntegrityError
        when that happened more often than there are endpoints."""
        file = self._state.files[number]
        remote = file.transfer.remote
        for endpoint in self._state.bytes_were_wrong(number):
            url = self._endpoints[endpoint]
            self._client.reporter.warn(f"{url} sends wrong bytes and is not asked again")

        self.throw_away(number)
        if file.rejections > len(self._endpoints):
            raise IntegrityError(
                f"{remote.path} arrives damaged",
                f"its hash is not {remote.etag}, again; the bytes were thrown away",
                "try another network or mirror (--mirror URL);"
                " something between the source and here changes bytes",
            )

        self._client.reporter.warn(f"{remote.path} arrived damaged; fetching it again")

    def throw_away(self, number: int) -> None:
        """Forget what came of a file and have all of it fetched. The caller has made it busy."""
        self._state.fetch_again(number)
        self._state.files[number].partial.start_over()

    def start_over(self, number: int) -> None:
        """Fetch all of a file again: what came is of another object than what comes now. A file
        that was verified meanwhile was right, and stays."""
        if self._state.claim(number):
            self.throw_away(number)
            self._state.release(number)


class Connection:
    """One connection: its thread runs `run`, its forked reader, which has the same number, sends
    the requests and writes what comes."""

    def __init__(
        self,
        number: int,
        client: Transport,
        state: DownloadState,
        readers: Readers,
        verifier: Verifier,
        rate: RateLimit,
    ) -> None:
        self._number = number
        self._client = client
        self._state = state
        self._readers = readers
        self._verifier = verifier
        self._rate = rate
        self._retry = WORKER_RETRY
        self._behind = False  # is the reader slower than what it reads?

    def run(self) -> None:
        """Fetch ranges until there are no more, the run ends, or this connection is one too many.

        Raises HfshipError where trying again does not help.
        """
        while True:
            flight = self._state.next_flight(self._number)
            if flight is None:
                return
            failure = self._try(flight)
            if failure is None:
                self._retry = self._retry.after_success()
                continue

            came = flight.position - flight.start
            made_progress = came >= MIN_PROGRESS
            self._retry = self._retry.after_failure(progress=made_progress)
            if isinstance(failure, ObjectChanged):
                self._verifier.start_over(flight.file)
            self._report(failure, flight)
            if self._retry.exhausted:
                raise self._gives_up(failure, flight) from failure
            self._state.stop.wait(self._retry.wait_s(failure.wait_s))

    def _try(self, flight: Flight) -> Optional[RetryableError]:
        """Fetch what comes of a range. Returns what went wrong if it may pass."""
        endpoint = self._state.choose_endpoint(flight.file)
        try:
            self._fetch(flight, endpoint)
        except RetryableError as exc:
            self._state.endpoint_failed(endpoint, isinstance(exc, SourceFaltered))
            return exc
        except ProxyLoginError:
            raise  # all go through it, and it would be shown the same login again
        except HfshipError:
            if endpoint == self._state.sources.hub:
                raise
            self._state.endpoint_refused(flight.file, endpoint)
        finally:
            if self._state.land(flight):
                self._verifier.follow(flight.file)

        return None

    def _fetch(self, flight: Flight, endpoint: int) -> None:
        """Send the reader for one range, or as much of it as comes. Raises RetryableError."""
        address = self._state.address(flight.file, endpoint)
        keep = False
        is_closed = False  # by the reader itself
        try:
            end = flight.stop  # of the request; another connection may take over its rear meanwhile
            opened, written, finished = self._request(flight, endpoint, address)
            if opened.error:
                raise opened.error
            if not opened.ranged:
                self._state.take_whole(flight)
                end = flight.stop
            file = self._state.files[flight.file]
            file.finished = finished  # before it counts, and a hash thread looks at it
            if written:
                is_closed = written.position == end
                self._count(written, flight)
            if not finished:
                file.partial.create()
            self._stream(flight, address)
            self._state.endpoint_served(flight.file, endpoint)
            keep = flight.position == end and not self._drop_if_slow()
        except RetryableError:
            address.forget()
            raise
        finally:
            if not is_closed:
                self._readers.close(self._number, keep)

    def _request(self, flight: Flight, endpoint: int, address: SharedAddress) -> Fetched:
        """Send the request for a range; that for all of a small file also brings it."""
        is_small = self._state.grant_small(flight)
        with address.turn() as known:
            self._client.gate.wait()
            request = OpenRange(
                file=flight.file,
                endpoint=endpoint,
                known=known,
                start=flight.start,
                stop=flight.stop,
                follow=is_small,
            )
            if is_small:
                finish = not self._state.files[flight.file].partial.may_have_journals
                fetched = self._readers.fetch_small(self._number, request, finish)
            else:
                fetched = Fetched(self._readers.open(self._number, request))
            address.learn(known, fetched.opened.known)

        if not fetched.opened.moved:
            return fetched
        # From here on the other readers of the file ask beside this one.
        known = fetched.opened.known
        there = request._replace(known=known, follow=True)
        opened = self._readers.open(self._number, there)
        address.learn(known, opened.known)
        return Fetched(opened)

    def _count(self, written: Written, flight: Flight) -> int:
        """Count what was written. Returns how many bytes, within the rate that is allowed; raises
        what broke the connection."""
        count = written.position - flight.position
        self._state.advance(flight, count)
        if written.broken:
            raise written.broken
        self._rate.wait(count)
        return count

    def _stream(self, flight: Flight, address: SharedAddress) -> None:
        """Have the body written up to the flight's (moving) end, or until the connection proves
        slow or one too many: a server that punishes crowds does so for as long as they stay."""
        number, state = self._number, self._state
        trickle = Trickle()
        began = time.monotonic()
        speed = state.connections.speed(number)
        while flight.left > 0 and state.wants(number, flight):
            window = window_size(speed)
            stop = state.grant(flight, window)
            asked = time.monotonic()
            written = self._readers.read(number, stop)
            waited = time.monotonic() - asked
            count = self._count(written, flight)
            if flight.left > 0:
                self._behind = written.waiting >= BEHIND
            if trickle.is_all_that_comes(count, waited):
                raise SourceFaltered(f"hardly anything comes from {address.host}")
            now = time.monotonic()
            seconds = max(now - began, 1e-3)
            came = flight.position - flight.start
            speed = came / seconds
            flight.expect(speed, now)
            if seconds > SLOW_AFTER_S or flight.left == 0:
                state.connections.measured(number, speed, self._behind)
                if not flight.is_soon_there(now) and self._drop_if_slow():
                    return

    def _drop_if_slow(self) -> bool:
        """Is this connection so slow that it is dialled again?"""
        number = self._number
        slow = self._state.drop_slow(number, time.monotonic())
        if slow is None:
            return False

        speed = human_bytes(slow.speed)
        fastest = human_bytes(slow.fastest)
        self._client.reporter.detail(
            f"connection {number} is slow, {speed}/s beside {fastest}/s: dialling again"
        )
        return True

    def _report(self, failure: RetryableError, flight: Flight) -> None:
        """Say that a range is tried again. The first failure in a row, and others within a few
        seconds of one that was shown, are details."""
        reporter = self._client.reporter
        file = self._state.files[flight.file]
        text = f"{file.transfer.remote.path}: {failure}; trying again"
        repeated = self._retry.failures > 1
        if repeated and self._state.may_complain(time.monotonic()):
            reporter.info(text)
        else:
            reporter.detail(text)

    def _gives_up(self, failure: RetryableError, flight: Flight) -> NetworkError:
        path = self._state.files[flight.file].transfer.remote.path
        return NetworkError(
            f"{path} does not get on: {failure}",
            f"{self._state.arrived} arrived and are kept",
            "check the network, then run the same command again",
        )


class Mark(NamedTuple):
    """How far the download was: at a monotonic time in seconds, bytes done."""

    time_s: float
    done: int


class Download:
    """Brings a list of files through a pool of connections. Use once: `run()`."""

    def __init__(
        self,
        client: Transport,
        transfers: Sequence[Transfer],
        stage: Stage,
        stop: threading.Event,
        settings: TransferSettings,
    ) -> None:
        self._client = client
        self._stage = stage
        self._state = DownloadState(transfers, settings, stage, stop)
        endpoints = (*settings.mirrors, client.endpoint)
        count = self._state.most_connections
        self._readers = Readers(client, transfers, endpoints, count, stop)
        self._verifier = Verifier(client, self._state, endpoints)
        self._rate = RateLimit(settings.limit_bps, stop)

    def run(self) -> None:
        """Fetch, verify and finish every file.

        Raises the first HfshipError of any thread, or KeyboardInterrupt; either way what arrived is
        kept for the next run.
        """
        self._client.prepare_forks()
        with self._readers:
            try:
                for _ in range(min(ACTIVE_FILES, default_jobs())):
                    self._start(self._verifier.run)
                self._start(self._keep_house)
                self._start(self._keep_durable)
                self._open_connections()
                self._state.wait_until_over()
            finally:
                self._state.end()
                self._publish()

        failure = self._state.failure
        if isinstance(failure, AuthError):
            failure.next_step += "\nthen run the same command again: what arrived is kept"
        if failure is not None:
            raise failure
        if not self._state.complete:
            raise IncompleteError(
                "another hfship took over the folder",
                "it judged this one dead, because its lease was not renewed in time",
                "wait for it, then run the command again",
            )

    def _open_connections(self) -> None:
        """As many as are wanted; they close by themselves when fewer are."""
        for number in self._state.open_connections():
            connection = Connection(
                number, self._client, self._state, self._readers, self._verifier, self._rate
            )
            self._start(connection.run)

    def _start(self, role: Callable[[], None]) -> None:
        """Run a role in a thread of its own."""
        thread = threading.Thread(target=self._guard, args=(role,), daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:  # ulimit -u, or the cgroup's pids.max
            raise _short_of_memory("cannot start a thread", str(exc)) from exc

    def _guard(self, role: Callable[[], None]) -> None:
        """What a thread does: whatever ends its role badly ends the run."""
        try:
            role()
        except KeyboardInterrupt:
            pass  # how the gate, and whoever waits in DownloadState, leaves when the run ends
        except BaseException as exc:  # noqa: BLE001 - raised by run()
            self._state.fail(exc)

    # -- journals and the number of connections

    def _keep_house(self) -> None:
        """Publish journals and adapt the number of connections until the run ends."""
        adapted = published = self._mark()
        wait_s = MIN_PUBLISH_INTERVAL_S
        while not self._state.stop.wait(wait_s):
            self._publish()
            now = self._mark()
            came = now.done - published.done
            speed = came / max(now.time_s - published.time_s, 1e-3)
            wait_s = publish_interval(speed, self._stage.total)
            published = now
            seconds = now.time_s - adapted.time_s
            if seconds > TICK_S and not self._state.connections.fixed:
                self._adapt((now.done - adapted.done) / seconds)
                adapted = now

    def _keep_durable(self) -> None:
        """Have what arrived on the disk, now and then, until the run ends. In a thread of its own,
        since a disk may take seconds for that."""
        synced = self._mark()
        while not self._state.stop.wait(PUBLISH_INTERVAL_S):
            now = self._mark()
            is_late = now.time_s - synced.time_s > SYNC_INTERVAL_S
            if is_late or now.done - synced.done > SYNC_BYTES:
                self._sync()
                synced = now

    def _mark(self) -> Mark:
        return Mark(time.monotonic(), self._stage.done)

    def _adapt(self, goodput: float) -> None:
        """Have as many connections as are worth it, given the bytes per second of late."""
        connections = self._state.connections
        before = connections.limit
        self._state.adapt_connections(goodput)
        self._open_connections()
        after = connections.limit
        if after == before:
            return

        speed = f"{human_bytes(goodput)}/s"
        count = counted(before, "connection")
        text = f"{speed} over {count}, now trying {after}"
        self._client.reporter.detail(text)

    def _sync(self) -> None:
        """Have what has arrived of all files under way on the disk."""
        for number, spans in self._state.spans().items():
            self._state.files[number].partial.sync(spans)

    def _publish(self) -> None:
        """Write what has arrived of all files under way into their journals."""
        for number, spans in self._state.spans().items():
            self._state.files[number].partial.publish(spans)
