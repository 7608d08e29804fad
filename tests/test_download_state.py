# SPDX-License-Identifier: Apache-2.0
"""The state of a download, without readers: who is woken, what counts, and how it ends."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.manifest import Source
from hfship.base.progress import Stage
from hfship.hub import download_state as room
from hfship.hub.download_state import (
    COMPLAINT_INTERVAL_S,
    HASH_FROM,
    DownloadState,
    ModelsUnderWay,
    TransferSettings,
)
from hfship.hub.partial import Transfer
from hfship.hub.protocol import RemoteFile
from hfship.hub.ranges import MAX_CONNECTIONS, MIN_SHARE, SMALL_FILE, Flight, Intervals
from hfship.hub.retry import RetryableError
from hfship.hub.verified import VerifiedLog

SOURCE = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
LARGE = SMALL_FILE + HASH_FROM


class Condition:
    """A condition that notes who was woken; who waits is let go by the end of the run."""

    def __init__(self, name: str, woken: List[str], lock: Any, stop: threading.Event) -> None:
        self._name, self._woken, self._lock, self._stop = name, woken, lock, stop

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def notify_all(self) -> None:
        """All of them."""
        self._woken.append(f"all {self._name}")

    def notify(self) -> None:
        """One of them."""
        self._woken.append(f"one {self._name}")

    def wait(self, _: float) -> None:
        """End the run instead."""
        self._woken.append(f"waits {self._name}")
        self._stop.set()

    def wait_for(self, is_so: Any) -> None:
        """End the run instead."""
        if not is_so():
            self.wait(0)
        assert is_so()


class Download:
    """The state of these files, and who was woken."""

    def __init__(self, folder: Path, *sizes: int, **settings: Any) -> None:
        transfers = []
        for number, size in enumerate(sizes):
            model = folder / f"m{number % 2}"
            model.mkdir(exist_ok=True)
            remote = RemoteFile(f"f{number}", size, "", f"{number}" * 64)
            transfers.append(Transfer(remote, SOURCE, model, VerifiedLog(model)))
        self.stage = Stage("fetching", sum(sizes))
        self.stop = threading.Event()
        self.state = DownloadState(transfers, TransferSettings(**settings), self.stage, self.stop)
        self.woken: List[str] = []
        lock = threading.RLock()
        for name in ("changed", "hashable", "ended"):
            made = Condition(name, self.woken, lock, self.stop)
            setattr(self.state, f"_{name}", made)

    def flight(self, number: int = 0) -> Flight:
        """The next range."""
        found = self.state.next_flight(number)
        assert found
        return found

    def arrive(self, flight: Flight, count: int) -> None:
        """Bytes of a range came."""
        self.state.grant(flight, count)
        self.state.advance(flight, count)

    def arrive_up_to(self, stop: int) -> Flight:
        """The beginning of the first file came; the range that brought the last of it."""
        while True:
            flight = self.flight()
            self.arrive(flight, min(stop, flight.stop) - flight.start)
            if self.state.prefix(0) == stop:
                self.news()
                return flight
            self.state.land(flight)

    def news(self) -> List[str]:
        """Who was woken since."""
        found = list(self.woken)
        self.woken.clear()
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_how_many_connections_have_something_to_do(folder: Path) -> None:
    assert TransferSettings().most_connections == MAX_CONNECTIONS
    assert TransferSettings(connections=3).most_connections == 3
    assert Download(folder, 1, 2 * MIN_SHARE).state.most_connections == 4
    assert Download(folder, 1, 2 * MIN_SHARE, connections=2).state.most_connections == 2
    assert Download(folder, 1000 * MIN_SHARE).state.most_connections == MAX_CONNECTIONS


def test_a_new_download_expects_its_files(folder: Path) -> None:
    download = Download(folder, 10, 0, 30)
    assert download.stage.files == 3 and download.stage.model == "1/2 m0"
    assert download.state.arrived == "0 B of 40 B"
    assert download.state.next_to_hash() == 1, "an empty file has nothing to fetch"
    assert download.state.files[1].busy and not download.state.files[0].busy


def test_the_last_file_ends_the_run(folder: Path) -> None:
    download = Download(folder, 10, 20)
    state = download.state
    state.finished(0)
    assert not state.complete and not state.over and download.news() == []
    assert download.stage.model == "2/2 m1"
    state.finished(1)
    assert state.complete and state.over and download.news() == ["all ended"]
    assert download.stage.finished == 2 and download.stage.model == "2/2 m1"
    state.wait_until_over()
    assert download.news() == [] and state.next_flight(0) is None


def test_the_first_failure_ends_the_run(folder: Path) -> None:
    download = Download(folder, 10)
    first, second = ValueError("a"), ValueError("b")
    download.state.fail(first)
    download.state.fail(second)
    assert download.state.failure is first and download.news() == ["all ended", "all ended"]
    download.state.wait_until_over()
    assert download.news() == []
    download.state.end()
    assert download.stop.is_set() and download.state.over
    assert download.news() == ["all changed", "all hashable", "all ended"]


def test_who_waits_for_the_end_waits(folder: Path) -> None:
    download = Download(folder, 10)
    download.state.wait_until_over()
    assert download.news() == ["waits ended"]


def test_complaints_have_pauses(folder: Path) -> None:
    state = Download(folder, 10).state
    told = [state.may_complain(now) for now in (100, 100 + COMPLAINT_INTERVAL_S, 106, 108, 112)]
    assert told == [True, False, True, False, True]


def test_connections_that_may_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = Download(folder, 1000 * MIN_SHARE, connections=2)
    state = download.state
    flight = download.flight()
    assert state.open_connections() == [0, 1]
    assert state.wants(1) and not state.wants(2)
    monkeypatch.setattr(state.connections, "is_crowding", lambda _: False)
    assert state.wants(2, flight), "it brings its flight"
    monkeypatch.setattr(state.connections, "is_crowding", lambda _: True)
    for soon in (True, False):
        crowding: Any = SimpleNamespace(is_soon_there=lambda _, soon=soon: soon)
        assert state.wants(2, crowding) == soon
    adapted: List[float] = []
    monkeypatch.setattr(state.connections, "adapt", adapted.append)
    state.adapt_connections(7.0)
    assert adapted == [7.0]
    download.stop.set()
    assert not state.wants(1) and state.next_flight(1) is None
    assert state.open_connections() == [1], "it was closed"


def test_a_small_file_is_hashed_by_who_brought_it(folder: Path) -> None:
    download = Download(folder, SMALL_FILE)
    flight = download.flight()
    assert download.state.grant_small(flight)
    download.state.advance(flight, SMALL_FILE)
    assert download.stage.done == SMALL_FILE and download.state.prefix(0) == SMALL_FILE
    assert download.state.spans() == {0: [(0, SMALL_FILE)]}
    assert download.state.land(flight) and download.state.files[0].busy
    assert download.news() == ["all changed"]
    download.state.finished(0)
    assert download.state.spans() == {} and not download.state.claim(0)


def test_a_small_part_is_not_granted_at_once(folder: Path) -> None:
    for download in (Download(folder, SMALL_FILE + 1), Download(folder, 9, limit_bps=1e9)):
        assert not download.state.grant_small(download.flight())


@pytest.mark.parametrize(("count", "told"), [(HASH_FROM, True), (HASH_FROM - 1, False)])
def test_of_a_large_file_a_hash_thread_is_told(count: int, told: bool, folder: Path) -> None:
    download = Download(folder, LARGE)
    assert not download.state.land(download.arrive_up_to(count))
    assert download.news() == (["one hashable"] if told else []) + ["all changed"]
    assert download.state.next_to_hash() == (0 if told else None)
    assert download.state.files[0].busy == told


def test_a_file_that_is_released_may_have_more_to_hash(folder: Path) -> None:
    download = Download(folder, LARGE)
    state = download.state
    first = download.flight()
    assert state.claim(0) and state.files[0].busy
    state.land(first)
    assert not state.land(download.arrive_up_to(HASH_FROM)) and download.news() == [
        "all changed"
    ], "somebody is busy"
    state.release(0)
    assert not state.files[0].busy and download.news() == ["one hashable", "all changed"]


def test_who_claims_a_busy_file_waits(folder: Path) -> None:
    download = Download(folder, LARGE)
    download.flight()
    assert download.state.claim(0)
    assert download.state.claim(0) and download.news() == ["waits changed"]


def test_a_server_that_ignores_ranges_sends_the_whole_file(folder: Path) -> None:
    download = Download(folder, 1000 * MIN_SHARE)
    first, second = download.flight(0), download.flight(1)
    assert first.start == 0 < second.start
    with pytest.raises(RetryableError, match="ignores Range"):
        download.state.take_whole(second)
    download.state.take_whole(first)
    assert first.stop == 1000 * MIN_SHARE


def test_a_file_that_was_wrong_is_fetched_again(folder: Path) -> None:
    download = Download(folder, LARGE)
    flight = download.flight()
    download.arrive(flight, 1000)
    with pytest.raises(KeyboardInterrupt):
        download.state.fetch_again(0)
    assert download.news() == ["waits changed"], "somebody writes to it"
    download = Download(folder, LARGE)
    flight = download.flight()
    download.arrive(flight, 1000)
    download.state.land(flight)
    download.state.fetch_again(0)
    assert download.stage.done == 0 and download.state.prefix(0) == 0


def test_wrong_bytes_ban_who_sent_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = Download(folder, LARGE, mirrors=("https://mirror",))
    state = download.state
    asked: List[Any] = []
    sources: Dict[str, Any] = {
        "bytes_were_wrong": lambda number: asked.append(("wrong", number)) or {0},
        "choose": lambda _: 1,
        "fault": lambda *words: asked.append(("fault", *words)),
        "refuse": lambda *words: asked.append(("refuse", *words)),
        "success": lambda *words: asked.append(("success", *words)),
    }
    mirror, hub = state.address(0, 0), state.address(0, 1)
    assert mirror is not hub and state.address(0, 0) is mirror
    monkeypatch.setattr(state, "sources", SimpleNamespace(**sources))
    assert state.bytes_were_wrong(0) == {0} and state.files[0].rejections == 1
    assert state.address(0, 0) is mirror and state.address(0, 1) is not hub
    state.endpoint_failed(1, faltered=True)
    state.endpoint_refused(0, 1)
    state.endpoint_served(0, 1)
    assert asked[1:] == [("fault", 1, True), ("refuse", 0, 1), ("success", 0, 1)]
    assert state.choose_endpoint(0) == 1


def test_which_models_are_under_way() -> None:
    assert ModelsUnderWay(["a", "a"]).label == ""
    models = ModelsUnderWay(["a", "b", "a"])
    models.finish("a")
    assert models.label == "1/2 a"
    models.finish("a")
    assert models.label == "2/2 b"
    models.finish("b")
    assert models.label == ""


def test_what_an_earlier_run_brought_is_there_and_no_speed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = {"f0": [(0, HASH_FROM), (HASH_FROM + 5, HASH_FROM + 9)], "f1": []}

    def found(partial: Any) -> Intervals:
        return Intervals(spans[partial.transfer.remote.path])

    monkeypatch.setattr("hfship.hub.partial.PartialFile.found", found)
    download = Download(folder, LARGE, 7)
    state, stage = download.state, download.stage
    assert (stage.done, stage.skipped) == (HASH_FROM + 4, HASH_FROM + 4)
    assert state.spans() == {0: spans["f0"]}
    assert state.next_to_hash() == 0
    assert state.most_connections == 2 + (LARGE - HASH_FROM - 4) // MIN_SHARE


def test_a_range_is_as_large_as_its_connection_is_fast(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is expected when that speed brings it."""
    download = Download(folder, 1000 * MIN_SHARE, connections=2)
    state = download.state
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: 50.0))
    state.connections.measured(1, 4e6)
    asked: List[Any] = []
    monkeypatch.setattr(
        room, "request_size", lambda speed, left: asked.append((speed, left)) or 8_000_000
    )
    first, second = download.flight(0), download.flight(1)
    assert asked == [(0.0, 500 * MIN_SHARE), (4e6, 500 * MIN_SHARE)]
    assert (first.due_at, second.due_at) == (float("-inf"), 52.0)
    download.arrive(first, 1_000_000)
    download.flight(1)
    assert asked[-1] == (4e6, 500 * MIN_SHARE - 500_000)


def test_a_file_of_which_nothing_more_can_be_hashed_wakes_nobody(folder: Path) -> None:
    download = Download(folder, LARGE)
    flight = download.arrive_up_to(HASH_FROM - 1)
    assert download.state.claim(0)
    download.state.release(0)
    assert download.news() == ["all changed"]
    download.state.land(flight)
    download.news()
    download.state.finished(0)
    download.news()
    download.state.release(0)
    assert download.news() == ["all changed"]


def test_a_file_is_given_up_before_it_is_waited_for(folder: Path) -> None:
    """Else those who bring it would go on until all of it is there."""
    download = Download(folder, LARGE)
    flight = download.flight()
    download.arrive(flight, 1000)
    with pytest.raises(KeyboardInterrupt):
        download.state.fetch_again(0)
    assert flight.left == 0


def test_a_run_that_ends_is_waited_for_by_nobody(folder: Path) -> None:
    download = Download(folder, LARGE)
    download.flight()
    assert download.state.claim(0)
    download.stop.set()
    with pytest.raises(KeyboardInterrupt):
        download.state.wait_until_quiet(0)
    assert download.state.next_to_hash() is None and download.news() == []


@pytest.mark.parametrize(
    "size, start, stop, limited, granted",
    [
        (SMALL_FILE, 0, SMALL_FILE, False, True),
        (SMALL_FILE, 0, SMALL_FILE, True, False),
        (SMALL_FILE, 1, SMALL_FILE, False, False),
        (SMALL_FILE, 0, SMALL_FILE - 1, False, False),
        (SMALL_FILE + 1, 0, SMALL_FILE + 1, False, False),
    ],
)
def test_a_whole_small_file_is_granted_at_once(
    size: int, start: int, stop: int, limited: bool, granted: bool, folder: Path
) -> None:
    download = Download(folder, size, limit_bps=1e6 if limited else None)
    flight = Flight(0, start, stop)
    assert download.state.grant_small(flight) is granted
    assert flight.granted == (stop if granted else start)
