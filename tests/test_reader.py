# SPDX-License-Identifier: Apache-2.0
"""Readers of ranges, with answers that are written here: what each answer of a Hub, a mirror or a
CDN means for the address of a file, and what a forked reader does with a body."""

from __future__ import annotations

import errno
import os
import threading
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Optional

import pytest

from hfship.base.errors import (
    AuthError,
    DiskError,
    HostError,
    IntegrityError,
    NetworkError,
    NotFoundError,
)
from hfship.base.manifest import Source
from hfship.hub import reader as room
from hfship.hub.partial import Finished, Transfer
from hfship.hub.protocol import MAX_CHANGES, MAX_REDIRECTS, RemoteFile
from hfship.hub.ranges import MOST_READERS, TRICKLE_S
from hfship.hub.reader import (
    Address,
    CloseRange,
    Fetched,
    FetchSmall,
    FileAddress,
    OpenRange,
    RangeReader,
    Readers,
    ReadRange,
    Written,
    read_body,
)
from hfship.hub.retry import ObjectChanged, RetryableError, SourceFaltered
from hfship.hub.verified import VerifiedLog

HUB, MIRROR = "https://hub", "https://mirror"
SOURCE = Source(HUB, "org/m", "main", "org/m", "c" * 40)
ETAG = "a" * 64
CDN = "https://cdn/w?Signature=1"
NOW = 1_000_000.0


class Answer:
    """An answer, its body, and what became of it."""

    def __init__(self, status: int = 206, body: bytes = b"", **headers: str) -> None:
        self.status_code = status
        self.headers: Mapping[str, str] = {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        self.url = CDN
        self.body = body
        self.done: List[str] = []
        self.raw = SimpleNamespace(release_conn=lambda: self.done.append("released"), _fp=self)
        self.chunked = False
        self.fp = None

    def close(self) -> None:
        self.done.append("closed")

    def pass_over(self) -> None:
        self.done.append("passed over")


class Client:
    """A client of the Hub that gets these answers."""

    endpoint = HUB

    def __init__(self, *answers: Any, busy: Optional[Exception] = None) -> None:
        self.answers = list(answers)
        self.asked: List[Any] = []
        self.said: List[str] = []
        self.holds: List[bool] = []
        self.refused: List[Any] = []
        self.reporter = SimpleNamespace(detail=self.said.append, verbosity=1)
        self._busy = busy

    def file_url(self, source: Source, path: str) -> str:
        return f"{source.endpoint}/{path}"

    def get(self, url: str, headers: Mapping[str, str]) -> Any:
        self.asked.append((url, dict(headers)))
        return self.answers.pop(0)

    def retry_status(self, response: Any, url: str, holds: bool) -> None:
        self.holds.append(holds)
        if self._busy:
            raise self._busy

    def refusal(self, status: int, headers: Any, body: str, source: Source) -> Any:
        self.refused.append((status, body, source))
        return NotFoundError(f"refused {status}")

    def forked(self, proxy: Any) -> Any:
        self.proxy = proxy
        return self


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> List[float]:
    now = [NOW]
    fake = SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(room, "time", fake)
    monkeypatch.setattr(room, "limited_body", lambda response, _: response.body.decode())
    return now


def address(
    client: Client, path: str = "w.bin", size: int = 100, endpoint: str = HUB
) -> FileAddress:
    remote = RemoteFile(path, size, "", ETAG)
    transfer: Any = SimpleNamespace(remote=remote, source=SOURCE)
    return FileAddress(client, transfer, endpoint)  # type: ignore[arg-type]


def redirect(to: str = CDN, status: int = 302, **headers: str) -> Answer:
    return Answer(status, Location=to, **headers)


# -- where it is


@pytest.mark.parametrize(
    "query, renew_in, life",
    [
        ("Signature=1", float("inf"), ""),
        ("Signature=1&Expires=1003600", 3480.0, ", for 1 h 00 min"),
        ("Signature=1&Expires=1000100", 90.0, ", for 1 min 40 s"),
    ],
)
def test_a_signed_address_is_used_until_shortly_before_its_end(
    query: str, renew_in: float, life: str, clock: List[float]
) -> None:
    first, second = Answer(), Answer()
    client = Client(redirect(f"https://cdn:444/w?{query}"), first, second, redirect(), Answer())
    file = address(client)
    assert file.open(0, 10) is first and file.open(10, 20) is second
    assert client.said[0].startswith("w.bin: comes from cdn:444") and len(client.said) == 1
    assert life == "" or life in client.said[0]
    assert client.said[0].endswith("cdn:444") == (life == "")
    assert file.known.renew_at == NOW + renew_in and file.known.serves
    asked = [url for url, _ in client.asked]
    assert asked[0] == f"{HUB}/w.bin" and len(set(asked[1:])) == 1
    assert [headers["Range"] for _, headers in client.asked] == [
        "bytes=0-9",
        "bytes=0-9",
        "bytes=10-19",
    ]
    if life:
        clock[0] += renew_in
        file.open(20, 30)
        assert client.asked[3][0] == f"{HUB}/w.bin"


def test_a_hub_that_sends_the_bytes_itself_is_where_they_are() -> None:
    client = Client(Answer(), Answer())
    file = address(client)
    file.open(0, 10)
    assert file.known.url == f"{HUB}/w.bin" and client.said == ["w.bin: comes from hub"]
    file.open(10, 20)
    assert len(client.said) == 1
    answer = Answer()
    assert address(Client(redirect(), answer)).locate() == CDN and answer.done == ["closed"]


def test_a_redirect_is_passed_over_and_a_circle_ends() -> None:
    answers = [redirect(f"https://cdn/{number}") for number in range(MAX_REDIRECTS)]
    with pytest.raises(NetworkError, match="w.bin is redirected in a circle") as caught:
        address(Client(*answers)).open(0, 10)
    assert caught.value.next_step == "check HF_ENDPOINT"
    assert {tuple(answer.done) for answer in answers} == {("passed over",)}


@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize(
    "kind, path, size, length, is_file",
    [
        ("application/octet-stream", "w.bin", 100, "100", True),
        ("", "w.bin", 100, "100", True),
        ("Text/HTML; charset=utf-8", "w.bin", 100, "100", False),
        ("text/html", "page.HTML", 100, "100", True),
        ("text/html", "page.htm", 100, None, True),
        ("text/html", "page.html", 100, "99", False),
    ],
)
def test_a_page_is_no_file(
    kind: str, path: str, size: int, length: Optional[str], is_file: bool, status: int
) -> None:
    headers = {"Content_Type": kind, **({"Content_Length": length} if length else {})}
    answers = [Answer(status, **headers), Answer(status, **headers)]
    file = address(Client(*answers), path, size)
    if is_file or status == 206:
        assert file.open(0, 10) is answers[0] and answers[0].done == []
        return
    with pytest.raises(RetryableError, match=f"hub sends .* instead of {path}"):
        file.open(0, 10)
    assert file.known.refusals == 1 and answers[0].done == ["closed"]
    with pytest.raises(NetworkError, match="instead of"):
        file.open(0, 10)


@pytest.mark.parametrize("endpoint, kind", [(HUB, RetryableError), (MIRROR, SourceFaltered)])
@pytest.mark.parametrize("wait_s", [None, 5.0])
def test_who_wants_us_to_wait_is_waited_for_if_it_is_the_hub(
    endpoint: str, kind: type, wait_s: Optional[float]
) -> None:
    client = Client(Answer(429), busy=RetryableError("429", wait_s))
    with pytest.raises(RetryableError, match="429") as caught:
        address(client, endpoint=endpoint).open(0, 10)
    assert type(caught.value) is (kind if wait_s else RetryableError)
    assert client.holds == [endpoint == HUB]


# (what answers the Hub's own address, a signed one, another one) -> status -> error, at once or not
def opened(*answers: Answer, endpoint: str = HUB, known: Optional[Address] = None) -> Any:
    client = Client(*answers)
    file = address(client, endpoint=endpoint)
    if known:
        file.known = known
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one the caller looks at
        file.open(0, 10)
    return caught.value, file, client


@pytest.mark.parametrize("status, at_once", [(401, True), (403, True), (404, True), (500, False)])
@pytest.mark.parametrize("endpoint", [HUB, MIRROR])
def test_what_the_hub_says_of_a_file_is_final(status: int, at_once: bool, endpoint: str) -> None:
    answer = Answer(status, b"body")
    known = Address(f"{endpoint}/w.bin")
    error, file, client = opened(answer, endpoint=endpoint, known=known)
    assert answer.done == ["closed"] and not file.known.usable
    ((found, body, source),) = client.refused
    assert (found, body, source.endpoint) == (status, "body", endpoint)
    if at_once:
        assert error.what == f"refused {status}" and file.known.refusals == 0
    else:
        assert str(error) == f"{endpoint[8:]} answered {status}" and file.known.refusals == 1
        file._client.answers.append(Answer(status))  # type: ignore[attr-defined]
        with pytest.raises(NotFoundError):
            file.open(0, 10)


@pytest.mark.parametrize(
    "status, kind", [(401, AuthError), (403, AuthError), (404, NotFoundError), (500, NetworkError)]
)
def test_a_signature_that_is_refused_is_asked_for_once_more(status: int, kind: type) -> None:
    answer = Answer(status)
    error, file, client = opened(redirect(), answer)
    assert type(error) is RetryableError and str(error) == f"cdn answered {status}"
    assert answer.done == ["closed"] and client.refused == []
    client.answers += [redirect(), Answer(status)]
    with pytest.raises(kind):
        file.open(0, 10)


@pytest.mark.parametrize("status, at_once", [(401, True), (403, True), (404, True), (500, False)])
def test_another_host_without_a_signature_is_no_hub(status: int, at_once: bool) -> None:
    error, file, _ = opened(redirect("https://other/w"), Answer(status))
    if at_once:
        assert "sends on to other" in error.what
    else:
        assert str(error) == f"other answered {status}" and file.known.refusals == 1


def test_an_address_that_served_before_is_resolved_anew() -> None:
    known = Address(CDN, serves=True)
    for answer in (Answer(403), redirect()):
        error, file, _ = opened(answer, known=known)
        assert str(error) == f"cdn answered {answer.status_code}" and answer.done == ["closed"]
        assert file.known == known.forgotten() and file.known.refusals == 0


GOOD = {"X_Linked_Size": "100", "X_Linked_Etag": f'"{ETAG}"', "X_Repo_Commit": "c" * 40}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ""),
        ({"X_Linked_Etag": f'W/"{ETAG}"'}, ""),
        ({"X_Linked_Etag": '"md5-of-a-proxy"'}, ""),
        ({"X_Repo_Commit": "short"}, ""),
        ({"X_Linked_Size": "99"}, "X-Linked-Size is 99, the listing of commit"),
        ({"X_Linked_Size": "9" * 200}, "X-Linked-Size is " + "9" * 100 + ", the"),
        ({"X_Linked_Etag": "b" * 64}, "X-Linked-Etag is " + "b" * 64 + ", the listing"),
        ({"X_Repo_Commit": "d" * 40}, "X-Repo-Commit is " + "d" * 40),
    ],
    ids=str,
)
def test_a_redirect_leads_to_what_was_listed(changes: Dict[str, str], said: str) -> None:
    answers = redirect(**{**GOOD, **changes}), Answer()
    if not said:
        assert address(Client(*answers)).open(0, 10)
        return
    error, _, _ = opened(*answers, endpoint=MIRROR)
    assert type(error) is IntegrityError
    assert error.what == f"w.bin at {MIRROR} is not what {HUB} listed"
    assert error.why.startswith(said) and error.why.split("says ")[1] in (
        "100",
        ETAG,
        "c" * 40,
    )
    assert f"the listing of commit {'c' * 12} says" in error.why


@pytest.mark.parametrize(
    "known, asks",
    [
        (Address(CDN, etag='"e"', etag_of="https://cdn/w"), '"e"'),
        (Address(CDN, etag='"e"', etag_of="https://cdn/other"), None),
        (Address(CDN, etag='"e"', etag_of="https://cdn/w", changes=MAX_CHANGES), None),
        (Address(CDN, etag='"e"', etag_of="https://cdn/w", changes=MAX_CHANGES - 1), '"e"'),
        (Address(CDN), None),
    ],
)
def test_which_object_a_range_must_be_of(known: Address, asks: Optional[str]) -> None:
    client = Client(Answer(ETag='"e"'))
    file = address(client)
    file.known = known
    file.open(0, 10)
    assert client.asked[0][1].get("If-Range") == asks
    assert (file.known.etag, file.known.etag_of) == ('"e"', "https://cdn/w")
    for status, etag, kind in ((206, '"f"', ObjectChanged), (200, '"e"', RetryableError)):
        answer = Answer(status, ETag=etag)
        file = address(Client(answer))
        file.known = known
        if not asks:
            assert file.open(0, 10) is answer
            continue
        with pytest.raises(RetryableError) as caught:
            file.open(0, 10)
        assert type(caught.value) is kind and answer.done == ["closed"]
        changes = known.changes + 1 if status == 206 else MAX_CHANGES
        assert (file.known.changes, file.known.usable) == (changes, status == 200)
        assert str(caught.value).startswith("cdn ")


# -- a body in memory


def test_a_body_has_as_many_bytes_as_it_should(
    monkeypatch: pytest.MonkeyPatch, clock: List[float]
) -> None:
    came: List[bytes] = []
    monkeypatch.setattr(room, "pieces", lambda _: iter(came))
    response = SimpleNamespace(url=CDN)
    came[:] = [b"ab", b"c"]
    assert read_body(response, 3) == b"abc"
    for size in (2, 4):
        with pytest.raises(RetryableError, match=f"cdn sent 3 bytes of {size}"):
            read_body(response, size)

    def slowly() -> Any:
        for _ in range(9):
            clock[0] += TRICKLE_S / 3
            yield b"x"

    monkeypatch.setattr(room, "pieces", lambda _: slowly())
    with pytest.raises(SourceFaltered, match="cdn hardly sends anything"):
        read_body(response, 9)


# -- a forked reader


class Body(Answer):
    """An answer whose body comes in pieces; an error among them is raised."""

    def __init__(self, *steps: Any, **headers: str) -> None:
        super().__init__(206, **headers)
        self.steps = list(steps)

    def readinto(self, room_: memoryview) -> int:
        step = self.steps.pop(0) if self.steps else b""
        if isinstance(step, Exception):
            raise step
        step = step[: len(room_)]
        room_[: len(step)] = step
        return len(step)


class Asked:
    """A reader of one file of 100 bytes, whose answers are given."""

    def __init__(self, folder: Path, *answers: Any, size: int = 100) -> None:
        remote = RemoteFile("w.bin", size, "", ETAG)
        self.transfer = Transfer(remote, SOURCE, folder, VerifiedLog(folder))
        self.client = Client(*answers)
        self.sent: List[Any] = []
        client: Any = self.client
        self.reader = RangeReader(client, [self.transfer], (MIRROR, HUB), journaled=True)
        os.close(self.transfer.open_work_file(os.O_RDWR | os.O_CREAT))

    def ask(self, message: Any) -> Any:
        return self.reader.answer(self.sent.append, message)

    def open(self, start: int, stop: int, endpoint: int = 1, follow: bool = True) -> Any:
        return self.ask(OpenRange(0, endpoint, Address(CDN), start, stop, follow))

    @property
    def content(self) -> bytes:
        return self.transfer.work_file.read_bytes()


def ranged(start: int, stop: int, *steps: Any, size: int = 100) -> Body:
    return Body(*steps, Content_Range=f"bytes {start}-{stop - 1}/{size}")


def test_a_range_is_written_where_it_belongs(tmp_path: Path) -> None:
    answer = ranged(10, 20, b"01234", b"56789")
    asked = Asked(tmp_path, answer)
    found = asked.open(10, 20)
    assert (found.ranged, found.error, found.moved) == (True, None, False)
    assert found.known.url == CDN and found.known.serves
    assert asked.ask(ReadRange(13)) == Written(13)
    assert asked.ask(ReadRange(20)).position == 18  # of the piece no more was taken
    assert asked.content == bytes(10) + b"01256789"[:3] + b"56789"
    assert asked.ask(CloseRange(keep=True)) is None and answer.done == ["released"]
    assert asked.ask(CloseRange(keep=True)) is None and answer.done == ["released"]
    assert asked.reader._fd == -1


def test_a_reader_speaks_through_its_parent_and_is_forked_once(tmp_path: Path) -> None:
    asked = Asked(tmp_path, ranged(0, 5), ranged(0, 5))
    asked.client.reporter.verbosity = 0
    for _ in range(2):
        asked.open(0, 5)
    proxy = asked.client.proxy
    proxy.detail("a detail")
    assert asked.sent == []
    proxy.info("a line")
    assert len(asked.sent) == 1


@pytest.mark.parametrize(
    "answer, kind, words",
    [
        (Answer(206), RetryableError, "cdn: asked for bytes 0-9/100, got ''"),
        (ValueError("no address\x1b"), RetryableError, "no address?"),
        (RetryableError("reset"), RetryableError, "reset"),
        (NotFoundError("gone"), NotFoundError, "gone"),
    ],
    ids=["another range", "no address", "reset", "gone"],
)
def test_what_keeps_a_range_from_coming_is_told(
    answer: Any, kind: type, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(tmp_path, answer)
    if isinstance(answer, Exception):

        def fail(*_: Any) -> Any:
            raise answer

        monkeypatch.setattr(asked.client, "get", fail)
    found = asked.open(0, 10)
    assert type(found.error) is kind and words in str(found.error) + getattr(
        found.error, "what", ""
    )
    if isinstance(answer, Answer):
        asked.ask(CloseRange(keep=False))
        assert answer.done == ["closed"]


def test_who_is_not_to_follow_says_where_it_is(tmp_path: Path) -> None:
    asked = Asked(tmp_path, redirect())
    found = asked.ask(OpenRange(0, 0, Address(), 0, 10))
    assert found.moved and found.error is None and found.known.url == CDN
    assert asked.client.asked[0][0] == f"{MIRROR}/w.bin"


ENDS: Dict[str, Any] = {
    "nothing more": (
        TimeoutError("timed out"),
        SourceFaltered,
        "cdn sends nothing more: timed out",
    ),
    "reset": (ConnectionResetError("reset"), RetryableError, "the connection to cdn broke: reset"),
    "no chunk": (HTTPException("x"), RetryableError, "the connection to cdn broke: x"),
    "closed": (ValueError("closed"), RetryableError, "the connection to cdn broke: closed"),
    "gone": (AttributeError("gone"), RetryableError, "the connection to cdn broke: gone"),
    "early": (b"", RetryableError, "the connection to cdn ended 7 bytes early"),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_body_ends_before_its_end(name: str, tmp_path: Path) -> None:
    step, kind, words = ENDS[name]
    asked = Asked(tmp_path, ranged(0, 10, b"012", step))
    asked.open(0, 10)
    written = asked.ask(ReadRange(10))
    assert written.position == 3 and asked.content == b"012" and written.waiting == 0
    assert type(written.broken) is kind and str(written.broken) == words


def test_of_a_whole_file_all_is_to_come(tmp_path: Path) -> None:
    asked = Asked(tmp_path, Answer(200, Content_Length="100"))
    found = asked.open(0, 10)
    assert not found.ranged and asked.reader._end == 100
    asked.client.answers.append(ranged(0, 10))
    assert asked.open(0, 10).ranged and asked.reader._end == 10


def test_a_reader_reports_in_between(tmp_path: Path, clock: List[float]) -> None:
    asked = Asked(tmp_path, ranged(0, 10, *[bytes([48 + n]) for n in range(10)]))
    asked.open(0, 10)
    read = asked.reader._receive

    def slowly(place: memoryview) -> int:
        clock[0] += room.REPORT_S / 2
        return read(place)

    asked.reader._receive = slowly  # type: ignore[method-assign]
    assert asked.ask(ReadRange(10)) == Written(2)
    asked.reader._body = SimpleNamespace(waiting=77)  # type: ignore[assignment]
    assert asked.ask(ReadRange(10)) == Written(4, waiting=77)
    clock[0] -= 100
    asked.reader._receive = read  # type: ignore[method-assign]
    assert asked.ask(ReadRange(10)) == Written(10)  # the connection may be closed


@pytest.mark.parametrize("came", [b"0123456789", b"01234"])
def test_a_small_file_is_one_message(came: bytes, tmp_path: Path) -> None:
    answer = ranged(0, 10, came, TimeoutError(), size=10)
    asked = Asked(tmp_path, answer, size=10)
    asked.transfer.work_file.unlink()
    found = asked.ask(FetchSmall(OpenRange(0, 1, Address(CDN), 0, 10, True)))
    assert isinstance(found, Fetched) and found.written
    assert found.written.position == len(came) and asked.content == came and not found.finished
    is_all = len(came) == 10
    assert answer.done == (["released"] if is_all else [])
    assert (asked.reader._fd == -1) is is_all


@pytest.mark.parametrize("came, finish", [(10, True), (10, False), (5, True)])
def test_a_small_file_is_finished_when_all_of_it_came(
    came: int, finish: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: List[Any] = []

    def finish_small(transfer: Transfer, fd: int, journaled: bool) -> Finished:
        steps.append((transfer, os.pread(fd, 100, 0), journaled, list(answer.done)))
        return Finished("sum", None)

    monkeypatch.setattr(room, "finish_small", finish_small)
    answer = ranged(0, 10, b"0123456789"[:came], TimeoutError(), size=10)
    asked = Asked(tmp_path, answer, size=10)
    found = asked.ask(FetchSmall(OpenRange(0, 1, Address(CDN), 0, 10, True), finish))
    if came == 10 and finish:
        assert found.finished == Finished("sum", None)
        assert steps == [(asked.transfer, b"0123456789", True, [])]
    else:
        assert found.finished is None and steps == []


def test_a_small_file_that_does_not_come_has_no_work_file(tmp_path: Path) -> None:
    for answer in (Answer(206), Answer(200, Content_Length="10")):
        asked = Asked(tmp_path, answer, size=10)
        asked.transfer.work_file.unlink()
        stop = 10 if answer.status_code == 206 else 9
        found = asked.ask(FetchSmall(OpenRange(0, 1, Address(CDN), 0, stop, True)))
        assert found.written is None and not asked.transfer.work_file.exists()


@pytest.mark.parametrize(
    "number, step",
    [
        (errno.ENOSPC, "free space, then run the same command again: what arrived is kept"),
        (errno.EIO, "free space, then run the same command again: what arrived is kept"),
        (errno.ENOENT, "leave the folder alone meanwhile, then run the same command again"),
    ],
)
@pytest.mark.parametrize("where", ["open", "write"])
def test_a_disk_that_does_not_take_it_is_told(
    number: int, step: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    asked = Asked(tmp_path, ranged(0, 10, b"012"))
    asked.open(0, 10)
    if where == "open":
        monkeypatch.setattr(Transfer, "open_work_file", refuse)
    else:
        monkeypatch.setattr(room, "pwrite_all", refuse)
    with pytest.raises(DiskError) as caught:
        asked.ask(ReadRange(10))
    assert str(asked.transfer.work_file) in caught.value.what
    assert caught.value.next_step == step
    asked.ask(CloseRange(keep=False))


def test_chunks_come_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: List[Any] = []
    monkeypatch.setattr(room, "limit_reads", lambda _, until: limits.append(until))
    answer = ranged(0, 10)
    answer.chunked = True
    answer.read1 = lambda most: b"0123456789"[:most]  # type: ignore[attr-defined]
    asked = Asked(tmp_path, answer)
    asked.open(0, 10)
    assert asked.ask(ReadRange(10)) == Written(10)
    assert asked.content == b"0123456789" and limits == [NOW + 2 * room.READ_TIMEOUT_S]


# -- all readers


@pytest.mark.parametrize("cores, processes", [(2, 2), (64, MOST_READERS)])
def test_readers_are_few_processes(
    cores: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: List[Any] = []
    calls: List[Any] = []

    class Workers:
        def __init__(self, *arguments: Any) -> None:
            made.append(arguments)

        def __enter__(self) -> None:
            calls.append("enter")

        def __exit__(self, *_: Any) -> None:
            calls.append("exit")

        def call(self, number: int, message: Any) -> Any:
            calls.append((number, message))
            if number == 9:
                raise HostError("a worker was ended")
            return "answer"

    monkeypatch.setattr(room, "Workers", Workers)
    monkeypatch.setattr(room, "default_jobs", lambda: cores)
    stop = threading.Event()
    client: Any = SimpleNamespace(receive=print)
    transfers: Any = [SimpleNamespace(folder=Path("/"))]
    with Readers(client, transfers, (), 32, stop) as readers:
        request: Any = OpenRange(0, 0, Address(), 0, 1)
        assert readers.open(1, request) == readers.fetch_small(2, request, True) == "answer"
        assert readers.read(3, 7) == "answer"
        readers.close(4, True)
        with pytest.raises(HostError):
            readers.read(9, 1)
        stop.set()
        with pytest.raises(KeyboardInterrupt):
            readers.read(9, 1)
    ((count, _, progress, most),) = made
    assert (count, progress, most) == (32, print, processes)
    assert calls == [
        "enter",
        (1, request),
        (2, FetchSmall(request, True)),
        (3, ReadRange(7)),
        (4, CloseRange(True)),
        (9, ReadRange(1)),
        (9, ReadRange(1)),
        "exit",
    ]
