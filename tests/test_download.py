# SPDX-License-Identifier: Apache-2.0
"""The threads of a download, each by itself: what a connection asks its reader, what a failure
means, and what is done with a file that is there. Whole downloads are in test_fetch.py."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Sequence

import pytest

from hfship.base.errors import (
    AuthError,
    HostError,
    IncompleteError,
    IntegrityError,
    NetworkError,
    NotFoundError,
)
from hfship.base.manifest import Source
from hfship.base.progress import Stage
from hfship.base.proxies import ProxyLoginError
from hfship.base.report import Reporter
from hfship.hub import download as room
from hfship.hub.download import Connection, Download, Verifier
from hfship.hub.download_state import DownloadState, TransferSettings
from hfship.hub.partial import Transfer, finish_small
from hfship.hub.protocol import RemoteFile
from hfship.hub.ranges import BEHIND, MIN_PROGRESS, SLOW_AFTER_S, SMALL_FILE, TRICKLE_S
from hfship.hub.reader import Address, Fetched, Opened, OpenRange, Written
from hfship.hub.retry import WORKER_RETRY, ObjectChanged, Retry, RetryableError, SourceFaltered
from hfship.hub.verified import VerifiedLog
from support.scripted import NoWait

SOURCE = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
SMALL = b"small content"
LARGE = bytes(range(256)) * (SMALL_FILE // 128)
THERE = Address(url="https://cdn/x")
ENDPOINTS = ("https://mirror", "https://hub")


class Run:
    """The state of a download of one file, with a mirror, and a connection of it whose reader
    answers what a test says."""

    def __init__(
        self, folder: Path, content: bytes = LARGE, wrong: bool = False, **settings: Any
    ) -> None:
        self.content = content
        sha256 = hashlib.sha256(content + b"x" if wrong else content).hexdigest()
        remote = RemoteFile("w.bin", len(content), "", sha256)
        transfers = [Transfer(remote, SOURCE, folder, VerifiedLog(folder), hub_notes=False)]
        self.transfer = transfers[0]
        self.stage = Stage("fetching", len(content))
        self.stop = NoWait()
        self.state = DownloadState(
            transfers, TransferSettings(mirrors=ENDPOINTS[:1], **settings), self.stage, self.stop
        )
        self.err = io.StringIO()
        self.gated = 0
        self.client: Any = SimpleNamespace(
            reporter=Reporter("plain", 1, err=self.err),
            gate=SimpleNamespace(wait=self._pass_gate),
            endpoint=ENDPOINTS[1],
        )
        self.asked: List[Any] = []
        self.answers: List[Any] = []
        self.rates: List[int] = []
        self.verifier = Verifier(self.client, self.state, ENDPOINTS)
        self.connection = Connection(
            0,
            self.client,
            self.state,
            self,  # type: ignore[arg-type]
            self.verifier,
            SimpleNamespace(wait=self.rates.append),  # type: ignore[arg-type]
        )

    def _pass_gate(self) -> None:
        self.gated += 1

    @property
    def said(self) -> List[str]:
        """The lines that the operator saw, without their times."""
        return [line[10:] for line in self.err.getvalue().splitlines()]

    @property
    def partial(self) -> Any:
        return self.state.files[0].partial

    def arrive(self, content: Optional[bytes] = None) -> None:
        """All of the file came, right or not."""
        flight = self.state.next_flight(0)
        assert flight
        self.state.take_whole(flight)
        self.write(content or self.content)
        self.state.advance(flight, len(self.content))
        self.state.land(flight)
        self.state.files[0].busy = True

    def write(self, content: bytes) -> None:
        os.pwrite(self.partial.create(), content, 0)

    # as Readers

    def _answer(self, *asked: Any) -> Any:
        self.asked.append(asked)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def open(self, number: int, request: OpenRange) -> Any:
        return self._answer("open", number, request)

    def fetch_small(self, number: int, request: OpenRange, finish: bool) -> Any:
        return self._answer("small", number, request, finish)

    def read(self, number: int, stop: int) -> Any:
        self.asked.append(("read", number, stop))
        if self.answers:
            answer = self.answers.pop(0)
            return answer(stop) if callable(answer) else answer
        return Written(stop)

    def close(self, number: int, keep: bool) -> None:
        self.asked.append(("close", number, keep))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> List[float]:
    """What time it is."""
    now = [1000.0]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(room, "time", fake)
    monkeypatch.setattr("hfship.hub.download_state.time", fake)
    return now


# -- what is done with a file that came


def test_a_file_that_is_right_gets_its_name(folder: Path) -> None:
    run = Run(folder)
    run.arrive()
    run.verifier.follow(0)
    assert (folder / "w.bin").read_bytes() == LARGE and run.state.complete
    sha256 = hashlib.sha256(LARGE).hexdigest()
    assert run.said == [f"w.bin: verified, SHA-256 {sha256}"]
    assert run.transfer.log.sha256_of(run.transfer.remote) == sha256
    assert not run.state.files[0].busy and run.stage.finished == 1


def test_a_large_file_is_hashed_in_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "HASH_STEP", 1 << 20)
    run = Run(folder)
    run.arrive()
    run.verifier.follow(0)
    assert run.partial.hasher.position == 1 << 20 and not run.state.files[0].busy
    run.verifier.run()
    assert run.state.complete


def test_a_file_that_is_wrong_is_fetched_again_until_all_sent_it_wrong(folder: Path) -> None:
    run = Run(folder, wrong=True)
    for banned, endpoint in ((["https://mirror"], 0), ([], 1)):
        run.state.endpoint_served(0, endpoint)
        run.arrive()
        run.verifier.follow(0)
        warned = [f"warning: {one} sends wrong bytes and is not asked again" for one in banned]
        assert run.said == [*warned, "warning: w.bin arrived damaged; fetching it again"]
        run.err.truncate(0)
        run.err.seek(0)
        assert run.stage.done == 0 and run.state.prefix(0) == 0 and run.partial.hasher.position == 0
    run.arrive()
    with pytest.raises(IntegrityError, match="w.bin arrives damaged") as caught:
        run.verifier.follow(0)
    assert caught.value.why.startswith(f"its hash is not {run.transfer.remote.etag}, again")
    assert "--mirror URL" in caught.value.next_step and not (folder / "w.bin").exists()


def test_what_came_of_another_object_is_thrown_away_unless_it_was_right(folder: Path) -> None:
    run = Run(folder)
    flight = run.state.next_flight(0)
    assert flight
    run.state.advance(flight, 100)
    run.state.land(flight)
    run.partial.create()
    run.verifier.start_over(0)
    assert run.stage.done == 0 and not run.state.files[0].busy
    run.arrive()
    run.verifier.follow(0)
    run.verifier.start_over(0)
    assert run.state.complete and run.stage.done == len(LARGE)


# -- one range


def test_a_range_is_asked_for_and_read_in_windows(folder: Path) -> None:
    run = Run(folder)
    flight = run.state.next_flight(0)
    assert flight
    run.answers = [Opened(THERE)]
    end = flight.stop
    assert run.connection._try(flight) is None
    request = OpenRange(file=0, endpoint=0, known=Address(), start=0, stop=end, follow=False)
    assert run.asked[0] == ("open", 0, request)
    reads = [stop for kind, _, stop in run.asked if kind == "read"]
    assert reads == sorted(set(reads)) and reads[-1] == end == flight.position
    assert run.asked[-1] == ("close", 0, True) and run.gated == 1
    assert sum(run.rates) == end and run.stage.done == end
    assert run.state.address(0, 0).known == THERE
    assert run.state.sources._used == {0: {0}}
    assert run.state.scheduler.quiet(0) and run.transfer.work_file.exists()


def test_who_is_sent_elsewhere_asks_there(folder: Path) -> None:
    run = Run(folder)
    flight = run.state.next_flight(0)
    assert flight
    further = Address(url="https://cdn/x", etag="e")
    run.answers = [Opened(THERE, moved=True), Opened(further)]
    assert run.connection._try(flight) is None
    first, second = (request for kind, _, request in run.asked[:2] if kind == "open")
    assert second == first._replace(known=THERE, follow=True) and not first.follow
    assert run.state.address(0, 0).known == further and run.gated == 1


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_small_file_is_one_message(all_of_it: bool, folder: Path) -> None:
    run = Run(folder, SMALL)
    flight = run.state.next_flight(0)
    assert flight and flight.stop == len(SMALL)
    run.write(SMALL)
    came = len(SMALL) if all_of_it else 5
    run.answers = [Fetched(Opened(THERE), Written(came))]
    assert run.connection._try(flight) is None
    kind, _, request, finish = run.asked[0]
    assert kind == "small" and request.follow and finish
    rest = [("read", 0, len(SMALL)), ("close", 0, True)]
    assert run.asked[1:] == ([] if all_of_it else rest)  # the reader closed it itself
    assert (folder / "w.bin").read_bytes() == SMALL and run.state.complete


def test_a_small_file_that_its_reader_finished_is_remembered(folder: Path) -> None:
    """Nothing is made of it once more, and a hash thread that is faster does the same."""
    run = Run(folder, SMALL)
    flight = run.state.next_flight(0)
    assert flight
    transfer = run.state.files[0].transfer
    fd = transfer.open_work_file(os.O_RDWR | os.O_CREAT)
    os.write(fd, SMALL)
    finished = finish_small(transfer, fd, journaled=True)
    os.close(fd)
    run.answers = [Fetched(Opened(THERE), Written(len(SMALL)), finished)]
    assert run.connection._try(flight) is None and len(run.asked) == 1
    assert run.state.complete and not run.state.files[0].busy
    assert transfer.log.sha256_of(transfer.remote) == hashlib.sha256(SMALL).hexdigest()
    assert (folder / "w.bin").read_bytes() == SMALL
    assert not list(folder.glob(".hfship/partial/*"))


def test_what_has_old_journals_is_finished_by_who_removes_them(folder: Path) -> None:
    run = Run(folder, SMALL)
    flight = run.state.next_flight(0)
    assert flight
    run.partial.may_have_journals = True
    run.write(SMALL)
    run.answers = [Fetched(Opened(THERE), Written(len(SMALL)))]
    assert run.connection._try(flight) is None
    assert run.asked[0][3] is False and run.state.complete


def test_a_server_without_ranges_sends_all(folder: Path) -> None:
    run = Run(folder)
    flight = run.state.next_flight(0)
    assert flight
    flight.stop = 1 << 20
    run.answers = [Opened(THERE, ranged=False)]
    assert run.connection._try(flight) is None
    assert flight.position == len(LARGE) and run.asked[-1] == ("close", 0, True)
    assert run.asked[0][2].stop == 1 << 20


FAULTS: Dict[str, Any] = {
    # what the reader answers -> whether it may pass, and what the endpoint is charged with
    "refused for now": (Opened(THERE, error=RetryableError("503")), True, "failed False"),
    "hardly anything": (Opened(THERE, error=SourceFaltered("slow")), True, "failed True"),
    "raised": (RetryableError("reset"), True, "failed False"),
    "not there": (Opened(THERE, error=NotFoundError("no")), False, "refused"),
    "no access": (AuthError("no"), False, "refused"),
}


@pytest.mark.parametrize("endpoint", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_what_a_failure_means_for_its_endpoint(
    name: str, endpoint: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, may_pass, charge = FAULTS[name]
    run = Run(folder)
    charged: List[str] = []
    sources = run.state.sources
    monkeypatch.setattr(sources, "choose", lambda _: endpoint)
    monkeypatch.setattr(sources, "fault", lambda _, faltered: charged.append(f"failed {faltered}"))
    monkeypatch.setattr(sources, "refuse", lambda *_: charged.append("refused"))
    flight = run.state.next_flight(0)
    assert flight
    run.answers = [answer]
    if not may_pass and endpoint == 1:
        with pytest.raises((NotFoundError, AuthError)):
            run.connection._try(flight)
        assert charged == []
    else:
        failure = run.connection._try(flight)
        assert (failure is not None) == may_pass and charged == [charge]
    assert run.asked[-1] == ("close", 0, False) and run.state.scheduler.quiet(0)
    known = run.state.address(0, endpoint).known
    is_learnt = isinstance(answer, Opened)
    assert known.usable == (is_learnt and not may_pass) or known == THERE.forgotten()


def test_a_proxy_that_wants_a_login_is_in_the_way_of_all(folder: Path) -> None:
    """Also of a mirror: it would be shown the same login again."""
    run = Run(folder)
    flight = run.state.next_flight(0)
    assert flight
    run.answers = [Opened(THERE, error=ProxyLoginError("proxy wants a login", "", ""))]
    with pytest.raises(ProxyLoginError):
        run.connection._try(flight)


def test_what_broke_the_connection_is_raised_after_its_bytes_count(folder: Path) -> None:
    run = Run(folder)
    flight = run.state.next_flight(0)
    assert flight
    broken = RetryableError("broken")
    run.answers = [Opened(THERE), Written(1000, broken)]
    assert run.connection._try(flight) is broken
    assert flight.position == 1000 == run.stage.done and run.rates == []
    again = run.state.next_flight(0)
    assert again and again.start == 1000


def test_an_end_that_another_took_over_closes_the_connection(folder: Path) -> None:
    """The rest of the answer is still to come."""
    run = Run(folder)
    flight = run.state.next_flight(0)
    assert flight

    def read(stop: int) -> Written:
        flight.stop = stop
        return Written(stop)

    run.answers = [Opened(THERE), read]
    assert run.connection._try(flight) is None
    assert run.asked[-1] == ("close", 0, False)


# -- how fast it comes


def streamed(
    run: Run, clock: List[float], seconds: float, *answers: Any, drop: Sequence[Any] = ()
) -> Any:
    """A stream whose reads take so long each; the speeds that were measured."""
    flight = run.state.next_flight(0)
    assert flight
    measured: List[Any] = []
    drops = list(drop)
    connections: Any = run.state.connections
    connections.measured = lambda *words: measured.append(words)
    run.state.drop_slow = lambda *_: drops.pop(0) if drops else None  # type: ignore[method-assign]

    def timed(answer: Any) -> Callable[[int], Any]:
        def read(stop: int) -> Any:
            clock[0] += seconds
            return answer(stop) if callable(answer) else answer

        return read

    run.answers = [timed(answer) for answer in answers]
    run.connection._stream(flight, run.state.address(0, 0))
    return flight, measured


def test_a_speed_is_measured_when_it_is_one(folder: Path, clock: List[float]) -> None:
    """After a second, and at the end of the range; of bytes that wait the reader is to blame."""
    run = Run(folder)
    waiting = Written(2000, waiting=BEHIND)
    little, rest = Written(1000, waiting=BEHIND - 1), Written(1 << 30)
    flight, measured = streamed(run, clock, SLOW_AFTER_S / 2, little, waiting, waiting, rest)
    assert flight.position == flight.stop and flight.left == 0
    assert measured == [(0, 2000 / 1.5, True), (0, flight.stop / 2, True)]
    flight, measured = streamed(Run(folder), clock, SLOW_AFTER_S / 2, little, rest)
    assert measured == [(0, flight.stop / 1.0, False)]


def test_a_connection_that_is_slow_is_left(folder: Path, clock: List[float]) -> None:
    from hfship.hub.connections import SlowConnection

    run = Run(folder)
    slow = SlowConnection(1e6, 9e6)
    flight, measured = streamed(run, clock, 2.0, *[Written(1000)] * 3, drop=[None, slow])
    assert flight.position == 1000 and len(measured) == 2
    assert run.said == ["connection 0 is slow, 1.0 MB/s beside 9.0 MB/s: dialling again"]


def test_a_connection_of_which_hardly_anything_comes_is_left(
    folder: Path, clock: List[float]
) -> None:
    run = Run(folder)
    for url, host in ((None, "the Hub"), ("https://cdn/x", "cdn")):
        run.state.address(0, 0).known = Address(url=url)
        with pytest.raises(SourceFaltered, match=f"hardly anything comes from {host}"):
            streamed(run, clock, TRICKLE_S / 2, Written(1), Written(2))
    run = Run(folder)
    flight, _ = streamed(run, clock, TRICKLE_S, Written(1 << 20), Written(1 << 30))
    assert flight.left == 0


# -- one connection after the other


class Tries:
    """What each try of a connection brings, with a budget that is as given."""

    def __init__(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, *results: Any, retry: Retry = WORKER_RETRY
    ) -> None:
        self.left = list(results)
        self.run = run
        monkeypatch.setattr(run.connection, "_try", self._try)
        monkeypatch.setattr(run.connection, "_retry", retry)

    def _try(self, flight: Any) -> Any:
        came, failure = self.left.pop(0)
        self.run.state.advance(flight, came)
        self.run.state.land(flight)
        if not self.left and failure is None:
            self.run.stop.set()
        return failure


def test_failures_are_told_and_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clock: List[float]
) -> None:
    run = Run(folder)
    failures = [RetryableError(said, 7.0) for said in ("503", "504", "505")]
    Tries(run, monkeypatch, *((0, failure) for failure in failures), (10, None))
    run.client.reporter = Reporter("plain", 0, err=run.err)
    run.connection.run()
    # The first is a detail, and so is one within seconds of one that was shown.
    assert run.said == ["w.bin: 504; trying again"]
    assert run.stop.waits == [7.0] * 3 and run.connection._retry == WORKER_RETRY


@pytest.mark.parametrize("came, tries", [(MIN_PROGRESS - 1, 2), (MIN_PROGRESS, 4)])
def test_a_connection_that_does_not_get_on_ends_the_run(
    came: int, tries: int, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: List[float]
) -> None:
    run = Run(folder)
    failure = RetryableError("reset", 0.1)
    left = [(came, failure)] * 2 + [(0, failure)] * 2
    steps = Tries(run, monkeypatch, *left[4 - tries :], retry=Retry(attempts=2))
    if came < MIN_PROGRESS:
        steps.left = left[:2]
    else:
        steps.left = [left[0], left[0], left[2]]
    with pytest.raises(NetworkError) as caught:
        run.connection.run()
    assert not steps.left
    assert caught.value.what == "w.bin does not get on: reset"
    assert caught.value.why == f"{run.state.arrived} arrived and are kept"
    assert caught.value.next_step == "check the network, then run the same command again"


def test_another_object_is_begun_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clock: List[float]
) -> None:
    run = Run(folder)
    begun: List[int] = []
    monkeypatch.setattr(run.verifier, "start_over", begun.append)
    passing, changed = RetryableError("x", 0.1), ObjectChanged("y", 0.1)
    failures = (0, passing), (0, passing), (0, changed), (1, None)
    Tries(run, monkeypatch, *failures)
    run.connection.run()
    assert begun == [0]


# -- the whole


class Whole:
    """A download whose threads a test runs itself."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.roles: List[str] = []
        self.forks = 0
        client = run.client
        client.prepare_forks = self._prepare
        made: List[Any] = []
        monkeypatch.setattr(room, "Readers", lambda *words: made.append(words) or self)
        settings = TransferSettings(connections=2, mirrors=ENDPOINTS[:1])
        self.download = Download(client, [run.transfer], run.stage, run.stop, settings)
        ((_, _, endpoints, count, _),) = made
        assert endpoints == ENDPOINTS and count == self.download._state.most_connections
        monkeypatch.setattr(self.download, "_start", self._start)

    def _prepare(self) -> None:
        self.forks += 1

    def _start(self, role: Callable[[], None]) -> None:
        self.roles.append(getattr(role, "__qualname__", ""))

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.roles.append("readers end")


@pytest.mark.parametrize(
    "failure, kind",
    [
        (None, IncompleteError),
        (NetworkError("x", "", "step"), NetworkError),
        (AuthError("x", "", "step"), AuthError),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_how_a_download_ends(
    failure: Any, kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder)
    whole = Whole(run, monkeypatch)
    published: List[bool] = []
    download = whole.download
    monkeypatch.setattr(download, "_publish", lambda: published.append(run.stop.is_set()))
    monkeypatch.setattr(room, "default_jobs", lambda: 3)

    def wait() -> None:
        if failure:
            download._guard(lambda: (_ for _ in ()).throw(failure))

    monkeypatch.setattr(download._state, "wait_until_over", wait)
    with pytest.raises(kind) as caught:
        download.run()
    assert published == [True] and whole.forks == 1
    assert whole.roles == [
        *["Verifier.run"] * 3,
        "Download._keep_house",
        "Download._keep_durable",
        *["Connection.run"] * 2,
        "readers end",
    ]
    if kind is AuthError:
        assert caught.value.next_step.startswith("step\nthen run the same command again")
    if kind is NetworkError:
        assert caught.value.next_step == "step"
    if kind is IncompleteError:
        assert "another hfship took over" in caught.value.what


def test_who_leaves_because_the_run_ends_is_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(Run(folder), monkeypatch)

    def leave() -> None:
        raise KeyboardInterrupt

    whole.download._guard(leave)
    assert whole.download._state.failure is None
    whole.download._state._finished = 1
    monkeypatch.setattr(whole.download, "_publish", lambda: None)
    whole.download.run()


def test_a_thread_that_cannot_be_started_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(Run(folder), monkeypatch)
    started: List[Any] = []

    class Thread:
        def __init__(self, **options: Any) -> None:
            started.append(options)

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(room, "threading", SimpleNamespace(Thread=Thread))
    with pytest.raises(HostError, match="cannot start a thread") as caught:
        Download._start(whole.download, print)
    assert caught.value.why == "can't start new thread" and started[0]["daemon"] is True
    assert started[0]["args"] == (print,)


def ticking(run: Run, clock: List[float], steps: Sequence[Any]) -> List[float]:
    """The end of a run comes after some waits, at each of which so much time passes and so many
    bytes came. What was waited for."""
    left, waits = list(steps), []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if not left:
            return True
        passed, came = left.pop(0)
        clock[0] += passed
        run.stage.add(came)
        return False

    run.stop.wait = wait  # type: ignore[method-assign,assignment]
    return waits


def test_journals_are_published_and_connections_adapted_now_and_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clock: List[float]
) -> None:
    run = Run(folder)
    whole = Whole(run, monkeypatch)
    events: List[Any] = []
    download = whole.download
    monkeypatch.setattr(download, "_publish", lambda: events.append("publish"))
    monkeypatch.setattr(download, "_adapt", lambda goodput: events.append(goodput))
    monkeypatch.setattr(
        room, "publish_interval", lambda speed, total: events.append((speed, total)) or 9.0
    )
    size = len(LARGE)
    for fixed in (True, False):
        download._state.connections.fixed = fixed
        waits = ticking(run, clock, [(0.25, 1000), (0.25, 1000), (0.25, 4000), (0.25, 0)])
        download._keep_house()
        adapted = [] if fixed else [8000.0]
        assert events == [
            *["publish", (4000.0, size)],
            *["publish", (4000.0, size)],
            *["publish", (16000.0, size), *adapted],
            *["publish", (0.0, size)],
        ]
        assert waits == [room.MIN_PUBLISH_INTERVAL_S, 9.0, 9.0, 9.0, 9.0]
        events.clear()


def test_what_arrived_is_made_durable_by_time_and_by_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clock: List[float]
) -> None:
    run = Run(folder)
    whole = Whole(run, monkeypatch)
    synced: List[float] = []
    monkeypatch.setattr(whole.download, "_sync", lambda: synced.append(clock[0]))
    most = room.SYNC_BYTES
    steps = [(2.0, 0), (0.5, 0), (1.5, most), (0.25, 1), (0.25, most), (0.25, 1)]
    waits = ticking(run, clock, steps)
    whole.download._keep_durable()
    assert synced == [1002.5, 1004.25, 1004.75] and set(waits) == {room.PUBLISH_INTERVAL_S}


def test_more_connections_are_opened_and_that_is_a_detail(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder)
    whole = Whole(run, monkeypatch)
    state, download = whole.download._state, whole.download
    asked: List[float] = []

    def adapt(goodput: float) -> None:
        asked.append(goodput)
        state.connections.limit = 5 if len(asked) > 1 else 1

    state.connections.limit = 1
    monkeypatch.setattr(state, "adapt_connections", adapt)
    download._adapt(3e6)
    assert run.said == [] and whole.roles == ["Connection.run"]
    download._adapt(4e6)
    assert asked == [3e6, 4e6] and len(whole.roles) == 5
    assert run.said == ["4.0 MB/s over 1 connection, now trying 5"]


def test_what_is_under_way_is_published_and_synced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(Run(folder), monkeypatch)
    state, done = whole.download._state, []
    partial: Any = SimpleNamespace(
        publish=lambda spans: done.append(("publish", spans)),
        sync=lambda spans: done.append(("sync", spans)),
    )
    state.files[0].partial = partial
    monkeypatch.setattr(state, "spans", lambda: {0: [(0, 5)]})
    whole.download._publish()
    whole.download._sync()
    assert done == [("publish", [(0, 5)]), ("sync", [(0, 5)])]
