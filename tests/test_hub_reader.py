"""Where the bytes of a file are, and that ranges of two objects are never mixed. No network."""

from __future__ import annotations

import socket
from http.client import HTTPResponse
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import pytest

from hfship.base.manifest import Source
from hfship.base.values import replace
from hfship.hub.protocol import MAX_CHANGES, RemoteFile
from hfship.hub.reader import Address, FileAddress, SharedAddress, direct_body
from hfship.hub.retry import ObjectChanged, RetryableError

CDN = "https://cdn/w.bin?signature=1"
SOURCE = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
REMOTE = RemoteFile("w.bin", 100, "", "a" * 64)


class Cdn:
    """A client whose Hub redirects to a CDN; `answers` are what that says, one after the other."""

    endpoint = SOURCE.endpoint
    token = None

    def __init__(self, *answers: Tuple[int, str]) -> None:
        self.answers = list(answers)
        self.asked: List[Tuple[str, Mapping[str, str]]] = []
        self.reporter = SimpleNamespace(detail=lambda _: None)

    def file_url(self, source: Source, path: str) -> str:
        return f"{source.endpoint}/{path}"

    def get(self, url: str, headers: Mapping[str, str]) -> Any:
        self.asked.append((url, headers))
        if url.startswith(SOURCE.endpoint):
            return self._answer(302, {"Location": CDN})
        status, etag = self.answers.pop(0)
        return self._answer(status, {"ETag": etag} if etag else {})

    def retry_status(self, response: Any, url: str, holds: bool) -> None:
        pass

    def _answer(self, status: int, headers: Dict[str, str]) -> Any:
        return SimpleNamespace(
            status_code=status, headers=headers, close=lambda: None, pass_over=lambda: None
        )


def address(client: Cdn) -> FileAddress:
    transfer: Any = SimpleNamespace(remote=REMOTE, source=SOURCE)
    return FileAddress(client, transfer, SOURCE.endpoint)  # type: ignore[arg-type]


def test_another_program_gets_the_signed_address() -> None:
    assert address(Cdn((206, '"a"'))).locate() == CDN


def test_the_hub_is_asked_once_for_all_ranges() -> None:
    client = Cdn((206, '"a"'), (206, '"a"'))
    file = address(client)
    for start, stop in ((0, 10), (10, 20)):
        file.open(start, stop)
    hub, first, second = client.asked
    assert hub[0].startswith(SOURCE.endpoint) and first[0] == second[0] == CDN
    assert "If-Range" not in first[1] and second[1]["If-Range"] == '"a"'
    assert second[1]["Range"] == "bytes=10-19"


@pytest.mark.parametrize("etag", ["", 'W/"a"'])
def test_an_etag_that_names_no_bytes_is_not_asked_for(etag: str) -> None:
    client = Cdn((206, etag), (206, etag))
    file = address(client)
    for start, stop in ((0, 10), (10, 20)):
        file.open(start, stop)
    assert "If-Range" not in client.asked[-1][1]


@pytest.mark.parametrize(
    "second, error", [((206, '"b"'), ObjectChanged), ((200, '"a"'), RetryableError)]
)
def test_another_object_or_all_of_it_is_no_answer_to_a_range(
    second: Tuple[int, str], error: type
) -> None:
    file = address(Cdn((206, '"a"'), second))
    file.open(0, 10)
    with pytest.raises(error):
        file.open(10, 20)


def test_others_need_not_wait_until_a_signed_address_has_answered() -> None:
    client = Cdn((206, '"a"'))
    file = address(client)
    assert file.ask(0, 10, follow=False) is None
    assert file.known.url == CDN and file.known.is_for_all and not file.known.serves
    assert file.ask(0, 10, follow=False).status_code == 206 and file.known.serves
    assert len(client.asked) == 2


@pytest.mark.parametrize(
    "known, is_for_all",
    [
        (Address(CDN), True),
        (Address(), False),
        (Address(CDN, renew_at=0.0), False),
        (Address("https://hub/api/x"), False),  # the Hub counts who asks
        (Address(CDN, refusals=1), False),  # one is refused, and not all of them
    ],
)
def test_where_all_may_ask_at_once(known: Address, is_for_all: bool) -> None:
    assert known.is_for_all == is_for_all


def test_a_new_address_that_refuses_is_a_refusal_whoever_asked_the_hub() -> None:
    file = address(Cdn((403, "")))
    file.known = Address(CDN)
    with pytest.raises(RetryableError):
        file.open(0, 10)
    assert file.known.refusals == 1 and not file.known.usable
    file = address(Cdn((403, "")))
    file.known = Address(CDN, serves=True)
    with pytest.raises(RetryableError):
        file.open(0, 10)
    assert file.known.refusals == 0 and not file.known.usable


NEW = Address(CDN)
SERVES = Address(CDN, etag='"a"', etag_of="https://cdn/w.bin", serves=True)
OTHER = replace(SERVES, etag='"b"')
ELSEWHERE = replace(OTHER, etag_of="https://other/w.bin")
REFUSED = Address(refusals=1)

# name -> (known by now, given to the reader, found by it, known then; None where it is of another
# object)
LEARNED: Dict[str, Any] = {
    "the first to know": (Address(), Address(), NEW, NEW),
    "it serves": (NEW, NEW, SERVES, SERVES),
    "nothing new": (SERVES, NEW, NEW, SERVES),
    "it serves others": (SERVES, NEW, REFUSED, SERVES),
    "it is refused": (NEW, NEW, REFUSED, REFUSED),
    "others found the same": (SERVES, NEW, SERVES, SERVES),
    "others found another object": (SERVES, NEW, OTHER, None),
    "it was asked for, and found out": (SERVES, SERVES, OTHER, OTHER),
    "ETags differ anyhow": (replace(SERVES, changes=MAX_CHANGES), NEW, OTHER, OTHER),
    "at another address": (SERVES, NEW, ELSEWHERE, ELSEWHERE),
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_readers_learn_at_the_same_time(name: str) -> None:
    known, given, found, then = LEARNED[name]
    shared = SharedAddress()
    shared.known = known
    if then:
        shared.learn(given, found)
        assert shared.known == then
        return
    with pytest.raises(ObjectChanged):
        shared.learn(given, found)
    assert shared.known.changes == 1 and not shared.known.usable


BODY = bytes(range(256)) * 64


@pytest.fixture
def line() -> Iterator[Tuple[socket.socket, socket.socket]]:
    """Our end of a connection, and the server's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def answer_with(line: Tuple[socket.socket, socket.socket], head: str, body: bytes) -> HTTPResponse:
    """The answer of a server that sends the beginning of its body with the head."""
    ours, theirs = line
    theirs.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body)
    response = HTTPResponse(ours)
    response.begin()
    return response


def body_of(response: HTTPResponse) -> Any:
    return direct_body(SimpleNamespace(raw=SimpleNamespace(_fp=response)))


def test_a_body_is_read_past_its_buffer(line: Tuple[socket.socket, socket.socket]) -> None:
    response = answer_with(line, f"Content-Length: {len(BODY)}", BODY[:100])
    body = body_of(response)
    line[1].sendall(BODY[100:])
    found = bytearray(len(BODY) + 10)
    assert response.readinto(found) == len(BODY) and found[: len(BODY)] == BODY
    assert response.isclosed() and body.waiting == 0  # and the connection can be used again
    line[1].sendall(b"x")
    assert line[0].recv(1) == b"x"


def test_a_body_that_hardly_comes_is_not_waited_for(
    line: Tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.hub.reader.REPORT_S", -1.0)
    response = answer_with(line, f"Content-Length: {len(BODY)}", b"")
    body = body_of(response)
    line[1].sendall(BODY[:7])
    assert body.waiting == 7
    assert response.readinto(bytearray(100)) == 7
    response.close()  # before all of it was read


def test_a_body_that_ends_early_ends(line: Tuple[socket.socket, socket.socket]) -> None:
    response = answer_with(line, f"Content-Length: {len(BODY)}", BODY[:7])
    assert body_of(response)
    line[1].close()
    found = bytearray(100)
    assert (response.readinto(found), response.readinto(found)) == (7, 0)


def test_chunks_are_not_read_directly(line: Tuple[socket.socket, socket.socket]) -> None:
    assert body_of(answer_with(line, "Transfer-Encoding: chunked", b"1\r\nx")) is None
