# SPDX-License-Identifier: Apache-2.0
"""One connection and the limits of a server, on a clock of our own; test_http.py has clients."""

from __future__ import annotations

import errno
import io
import os
import resource
import socket
import threading
import time as clock
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from hfship import __version__
from hfship.base.errors import HostError
from hfship.base.report import Reporter
from hfship.ops import http_server as room
from hfship.ops.http_request import BadRequest
from hfship.ops.http_server import (
    BODY_S,
    CROWDED_IDLE_S,
    HEAD_S,
    IDLE_S,
    LINGER_S,
    MOST_CONNECTIONS,
    SLOWEST_BPS,
    STALL_S,
    Allowance,
    Connection,
    HttpServer,
    client_of,
    head_of_answer,
    most_connections,
    short_answer,
)

SMALL = room._SMALL


class Echo(Connection):
    """Answers with what the request was."""

    def answer(self) -> None:
        """The path, and the body where there is one."""
        body = f"{self.request.path} ".encode() + self.read_body()
        self.send_head(200, len(body), {"X-A": "b"})
        self.send_body(body)

    def refuse(self, error: BadRequest) -> None:
        """Its status alone."""
        self.send_head(error.status, 0, {})


class Clock:
    """Stands for the module time: it goes on when somebody sleeps or waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: List[float] = []
        self.strftime, self.gmtime = clock.strftime, lambda: clock.gmtime(0)

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Go on."""
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(room, "time", made)
    return made


def server_of(**fields: Any) -> Any:
    values: Dict[str, Any] = {
        "closing": False,
        "connections": Allowance(4),
        "memory": Allowance(4 * SMALL),
        "answering": set(),
    }
    return SimpleNamespace(**{**values, **fields})


@pytest.fixture
def wire(now: Clock) -> Iterator[Tuple[socket.socket, Echo]]:
    """A client, and its connection."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        theirs.settimeout(30)
        yield theirs, Echo(ours, ("10.0.0.7", 1), server_of())


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


# -- allowances


def test_half_is_for_one_client_and_all_of_it_for_all() -> None:
    rooms = Allowance(4)
    assert [rooms.take("a"), rooms.take("a"), rooms.take("a")] == [True, True, False]
    assert not rooms.is_scarce
    assert [rooms.take("b"), rooms.is_scarce, rooms.take("c"), rooms.take("d")] == [
        *(True, True),
        *(True, False),
    ]
    rooms.give_back("a")
    assert [rooms.take("d"), rooms.take("a")] == [True, False]


def test_who_has_nothing_may_take_more_than_half() -> None:
    rooms = Allowance(10)
    assert rooms.take("a", 9) and not rooms.take("b", 2) and rooms.take("b", 1)
    rooms.give_back("a", 9)
    rooms.give_back("b", 1)
    assert rooms.take("a", 99) and not rooms.take("b", 1)


def test_one_of_one_is_for_whoever_comes_first() -> None:
    rooms = Allowance(1)
    assert [rooms.take("a"), rooms.take("a"), rooms.take("b")] == [True, False, False]
    rooms.give_back("a")
    assert rooms.take("b") and rooms._taken == {"b": 1}


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3::7", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("-", "-"),
    ],
)
def test_who_counts_as_one_client(address: str, client: str) -> None:
    assert client_of(address) == client


@pytest.mark.parametrize(
    ("descriptors", "most"),
    [
        (1032, 500),
        (4128, MOST_CONNECTIONS),
        (9999, MOST_CONNECTIONS),
        (resource.RLIM_INFINITY, MOST_CONNECTIONS),
        (10, 2),
    ],
)
def test_connections_are_as_many_as_descriptors_allow(
    descriptors: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.resource, "getrlimit", lambda _: (descriptors, 0))
    assert most_connections() == most


# -- heads


def test_a_head_is_plain_text() -> None:
    assert (
        head_of_answer(404, {"A": "b\r\nC: ü"}) == b"HTTP/1.1 404 Not Found\r\nA: b??C: ?\r\n\r\n"
    )
    assert head_of_answer(299, {}) == b"HTTP/1.1 299 \r\n\r\n"


@pytest.mark.parametrize(("seconds", "line"), [(5, b"Retry-After: 5\r\n"), (0, b"")])
def test_a_short_answer_says_all_there_is(seconds: int, line: bytes) -> None:
    assert short_answer(503, "too many", retry_after_s=seconds) == (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
        b"Content-Length: 21\r\nX-Error-Message: too many\r\nConnection: close\r\n"
        + line
        + b'\r\n{"error": "too many"}'
    )


# -- the requests of a connection


def test_requests_are_answered_one_after_the_other(wire: Any) -> None:
    client, connection = wire
    over: List[int] = []
    connection.over = lambda: over.append(connection.sent)
    client.sendall(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\nHEAD /b HTTP/1.1\r\nHost: h\r\n\r\n")
    client.sendall(b"POST /c HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody")
    client.shutdown(socket.SHUT_WR)
    connection.serve()
    head = (
        f"HTTP/1.1 200 OK\r\nServer: hfship/{__version__}\r\n"
        "Date: Thu, 01 Jan 1970 00:00:00 GMT\r\nX-A: b\r\nContent-Length: "
    ).encode()
    said = client.recv(1 << 16)
    assert said == b"".join([head, b"3\r\n\r\n/a ", head, b"3\r\n\r\n", head, b"7\r\n\r\n/c body"])
    assert over == [3, 0, 7] and not connection.server.answering


LAST = {
    "it says so": (b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", {}),
    "of HTTP/1.0": (b"GET /a HTTP/1.0\r\n\r\n", {}),
    "the server stops": (b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n", {"closing": True}),
    "no request": (b"nonsense\r\n\r\n", {}),
}


@pytest.mark.parametrize("name", LAST)
def test_an_answer_says_that_it_is_the_last(name: str, wire: Any) -> None:
    sent, fields = LAST[name]
    client, connection = wire
    client.sendall(sent)
    vars(connection.server).update(fields)
    connection._serve_one()
    assert connection.close_connection and b"\r\nConnection: close\r\n" in client.recv(1 << 16)
    assert (connection.status == 200) == (name != "no request")


def test_a_body_that_nobody_read_ends_the_connection(wire: Any) -> None:
    client, connection = wire
    connection.answer = lambda: connection.send_head(403, 0, {})
    client.sendall(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody")
    connection._serve_one()
    assert connection.close_connection and connection.status == 403


@pytest.mark.parametrize(
    ("minor", "expect", "told"),
    [
        (1, "100-continue", True),
        (1, "100-Continue", True),
        (0, "100-continue", False),
        (1, "", False),
    ],
)
def test_who_waits_to_be_told_to_go_on_is_told(
    minor: int, expect: str, told: bool, wire: Any
) -> None:
    client, connection = wire
    line = f"Expect: {expect}\r\n" if expect else ""
    head = f"POST /a HTTP/1.{minor}\r\nHost: h\r\n{line}Content-Length: 1\r\n\r\nx"
    client.sendall(head.encode())
    connection._serve_one()
    said = client.recv(1 << 16)
    assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200") == told


def test_a_second_fault_of_an_answer_that_was_begun_is_not_told(wire: Any) -> None:
    client, connection = wire

    def answer() -> None:
        connection.send_head(200, 5, {})
        raise BadRequest(500, "later")

    connection.answer = answer
    client.sendall(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
    connection._serve_one()
    assert connection.close_connection and connection.status == 200


def test_a_client_that_goes_without_a_word_is_not_counted(wire: Any) -> None:
    client, connection = wire
    connection.over = pytest.fail
    client.shutdown(socket.SHUT_WR)
    connection._serve_one()
    assert connection.close_connection


def test_a_client_that_is_gone_ends_the_connection(wire: Any) -> None:
    client, connection = wire
    over: List[int] = []

    def answer() -> None:
        raise ConnectionResetError

    connection.answer, connection.over = answer, lambda: over.append(1)
    client.sendall(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
    connection._serve_one()
    assert connection.close_connection and over == [1]


@pytest.mark.parametrize(
    ("scarce", "closing", "waited_s"),
    [(False, False, IDLE_S), (True, False, 0.1), (False, True, -1)],
)
def test_for_the_next_request_is_waited_longer_where_there_is_room(
    scarce: bool, closing: bool, waited_s: float, wire: Any, now: Clock, monkeypatch: Any
) -> None:
    _, connection = wire
    polled: List[float] = []

    def poll(milliseconds: float) -> List[Any]:
        polled.append(milliseconds)
        assert len(polled) < 99, "it waits for ever"
        now.now += milliseconds / 1000
        return []

    waiting = SimpleNamespace(register=lambda *_: None, poll=poll)
    monkeypatch.setattr(room, "select", SimpleNamespace(poll=lambda: waiting, POLLIN=1))
    vars(connection.server).update(closing=closing, connections=SimpleNamespace(is_scarce=scarce))
    assert not connection._request_comes() and connection.close_connection
    assert set(polled) <= {CROWDED_IDLE_S * 1000}
    assert waited_s < sum(polled) / 1000 + 0.1 <= waited_s + CROWDED_IDLE_S + 0.2


def test_a_request_that_waits_is_taken_at_once(wire: Any, now: Clock) -> None:
    client, connection = wire
    client.sendall(b"G")
    assert connection._request_comes() and not connection.close_connection


def test_what_is_read_has_to_be_here_in_time(wire: Any, now: Clock) -> None:
    client, connection = wire
    client.sendall(b"x")
    connection._deadline = now.now
    with pytest.raises(BadRequest) as late:
        connection._receive(1)
    assert late.value.status == 408
    connection._deadline = now.now + 0.001
    assert connection._receive(9) == b"x"
    assert connection.connection.gettimeout() == pytest.approx(0.001)
    with pytest.raises(BadRequest):
        connection._receive(1)


def test_a_head_and_a_body_have_each_their_time(wire: Any, now: Clock) -> None:
    client, connection = wire
    client.sendall(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx")
    began = now.now
    deadlines: List[float] = []
    read = connection.read_body

    def read_body() -> bytes:
        deadlines.append(connection._deadline)
        now.now += 5
        return read()

    connection.read_body = read_body
    connection._serve_one()
    assert deadlines == [began + HEAD_S] and connection._deadline == began + 5 + BODY_S


# -- memory


def test_small_answers_need_no_room_and_large_ones_give_it_back(wire: Any) -> None:
    _, connection = wire
    memory = connection.server.memory
    with connection.memory_for(SMALL):
        assert not memory._total
    with connection.memory_for(SMALL + 1):
        assert memory._taken == {"10.0.0.7": SMALL + 1}
        with pytest.raises(BadRequest) as refused, connection.memory_for(SMALL + 1):
            pytest.fail("it was let in")
    assert refused.value.status == 503 and not memory._total


# -- answers


def test_large_answers_go_whole_and_are_counted(wire: Any) -> None:
    client, connection = wire
    body = os.urandom(3 << 20)
    found: List[bytes] = []
    reading = threading.Thread(target=lambda: found.append(read_all(client)))
    reading.start()
    connection._start_clock()
    connection.send_body(body)
    connection.connection.shutdown(socket.SHUT_WR)
    reading.join()
    assert found == [body] and connection.sent == connection._written == len(body)
    assert connection.connection.gettimeout() == STALL_S


@pytest.mark.parametrize("error", [None, errno.EINVAL, errno.EIO])
def test_a_file_goes_by_sendfile_or_through_memory(
    error: Any, wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, connection = wire
    content = os.urandom(200_000)
    (tmp_path / "f").write_bytes(content)
    if error:

        def sendfile(*_: Any) -> int:
            raise OSError(error, "no")

        monkeypatch.setattr(room.os, "sendfile", sendfile)
    found: List[bytes] = []
    reading = threading.Thread(target=lambda: found.append(read_all(client)))
    reading.start()
    connection._start_clock()
    with (tmp_path / "f").open("rb") as file:
        if error == errno.EIO:
            with pytest.raises(OSError):
                connection.send_file(file.fileno(), 100, 199_990)
        else:
            connection.send_file(file.fileno(), 100, 199_990)
    connection.connection.shutdown(socket.SHUT_WR)
    reading.join()
    sent = b"" if error == errno.EIO else content[100:199_990]
    assert found == [sent] and connection.sent == connection._written == len(sent)
    assert not connection.close_connection


def test_a_head_waits_for_its_body_to_go_in_one_packet(wire: Any) -> None:
    _, connection = wire
    flags: List[int] = []

    class Watched:
        def settimeout(self, _: float) -> None:
            pass

        def send(self, data: Any, how: int) -> int:
            flags.append(how)
            return len(data)

    connection.connection = Watched()
    connection._start_clock()
    connection.write(b"head", body_follows=True)
    connection.write(b"body")
    assert flags == [socket.MSG_MORE, 0]


def test_a_file_that_became_shorter_ends_the_connection(wire: Any, tmp_path: Path) -> None:
    _, connection = wire
    (tmp_path / "f").write_bytes(b"0123456789")
    connection._start_clock()
    with (tmp_path / "f").open("rb") as file:
        connection.send_file(file.fileno(), 4, 12)
    assert connection.close_connection and connection.sent == 6


def test_a_client_that_takes_no_byte_of_a_file_is_let_go(
    wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, connection = wire
    asked: List[float] = []
    polled = SimpleNamespace(register=lambda *_: None, poll=lambda ms: asked.append(ms))
    monkeypatch.setattr(room, "select", SimpleNamespace(poll=lambda: polled, POLLOUT=4))

    def full(*_: Any) -> int:
        raise BlockingIOError

    monkeypatch.setattr(room.os, "sendfile", full)
    with pytest.raises(TimeoutError, match="takes nothing"):
        connection.send_file(0, 0, 10)
    assert asked == [STALL_S * 1000]


@pytest.mark.parametrize(
    ("elapsed_s", "count", "slow"),
    [
        (STALL_S, 0, False),
        (STALL_S + 1, int((STALL_S + 1) * SLOWEST_BPS), False),
        (STALL_S + 1, int((STALL_S + 1) * SLOWEST_BPS) - 1, True),
    ],
)
def test_a_client_that_takes_too_little_is_let_go(
    elapsed_s: float, count: int, slow: bool, wire: Any, now: Clock
) -> None:
    _, connection = wire
    connection._written = 99
    connection._start_clock()
    now.now += elapsed_s
    if slow:
        with pytest.raises(TimeoutError, match="too little"):
            connection._count(count)
    else:
        connection._count(count)
    assert connection._written == count


def test_the_last_answer_can_be_read_before_the_connection_closes(wire: Any, now: Clock) -> None:
    client, connection = wire
    client.sendall(b"x" * 10)
    taken: List[int] = []
    receive = connection.connection.recv

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(connection_, name)

        def recv(self, most: int) -> bytes:
            taken.append(most)
            now.now += LINGER_S / 2
            return receive(1)

    connection_ = connection.connection
    connection.connection = Slow()
    connection._linger()
    assert len(taken) == 2 and connection_.gettimeout() == LINGER_S
    assert client.recv(1) == b""


# -- the server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpServer]:
    made = HttpServer(("127.0.0.1", 0), Echo, Reporter("none", 1, err=io.StringIO()))
    yield made
    made.server_close()


def said_by(server: HttpServer) -> str:
    err = server.reporter.err
    assert isinstance(err, io.StringIO)
    return err.getvalue()


def test_where_a_server_listens(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_address[1]
    assert server.url == f"http://127.0.0.1:{port}"
    server.tls = object()
    assert server.url == f"https://127.0.0.1:{port}"
    monkeypatch.setattr(server, "server_address", ("::1", 80, 0, 0))
    assert server.url == "https://[::1]:80"
    server.tls = None


def test_a_port_that_is_taken_is_told(server: HttpServer) -> None:
    port = server.server_address[1]
    with pytest.raises(HostError) as told:
        HttpServer(("127.0.0.1", port), Echo, server.reporter)
    assert told.value.what == f"cannot listen on 127.0.0.1:{port}"
    assert told.value.why == "Address already in use" and "--port" in told.value.next_step


def test_a_server_may_listen_at_a_path(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    made = HttpServer(path, Echo, Reporter("none", -1))
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            connection, address = made.get_request()
            with connection:
                assert address == ("-", 0)
    finally:
        made.server_close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ECONNABORTED])
def test_without_descriptors_the_spare_answers(
    code: int, server: HttpServer, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> Any:
        raise OSError(code, "no")

    spare = server._spare
    assert spare is not None
    monkeypatch.setattr(room.TCPServer, "get_request", fails)
    with socket.create_connection(server.server_address[:2]) as client:
        client.settimeout(30)
        client.sendall(b"GET")
        for _ in range(1):
            with pytest.raises(OSError):
                server.get_request()
        if code == errno.EMFILE:
            assert client.recv(1 << 16) == short_answer(
                503, "too many connections", retry_after_s=5
            )
            assert client.recv(1) == b"" and now.slept == [room.BACK_OFF_S]
        else:
            assert not now.slept
    assert server._spare is not None, "there is one again"


def test_a_spare_that_is_lost_is_looked_for_again(server: HttpServer) -> None:
    assert server._spare is not None
    os.close(server._spare)
    server._spare = None
    server._answer_with_the_spare()
    assert server._spare is not None and os.fstat(server._spare)


def test_who_comes_too_many_is_turned_away_and_closed_later(
    server: HttpServer, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.connections = Allowance(1)
    assert server.connections.take("another")
    theirs, ours = socket.socketpair()
    with theirs:
        theirs.settimeout(30)
        server.process_request(ours, ("10.0.0.7", 1))
        assert b"503 Service Unavailable" in read_all(theirs)
        server.service_actions()
        now.now += LINGER_S
        server.service_actions()
        assert ours.fileno() >= 0
        now.now += 0.1
        server.service_actions()
        assert ours.fileno() == -1 and not server._leaving


def test_only_so_many_that_were_turned_away_are_waited_for(server: HttpServer, now: Clock) -> None:
    pairs = [socket.socketpair() for _ in range(room._MOST_LEAVING + 1)]
    for number, (_, ours) in enumerate(pairs):
        assert pairs[0][1].fileno() >= 0, number
        server._turn_away(ours)
    assert [ours.fileno() == -1 for _, ours in pairs] == [True, *[False] * room._MOST_LEAVING]
    server.server_close()
    assert all(ours.fileno() == -1 for _, ours in pairs) and server._spare is None
    for theirs, _ in pairs:
        theirs.close()


def test_who_waits_for_a_handshake_is_told_nothing(server: HttpServer) -> None:
    server.tls = object()
    theirs, ours = socket.socketpair()
    with theirs, ours:
        theirs.settimeout(30)
        server._say_busy(ours)
        assert read_all(theirs) == b"" and not ours.getblocking()
    server.tls = None


def test_a_thread_that_cannot_be_started_gives_its_place_back(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(room.ThreadingMixIn, "process_request", fails)
    theirs, ours = socket.socketpair()
    with theirs, ours:
        theirs.settimeout(30)
        server.process_request(ours, ("10.0.0.7", 1))
        assert b"503" in read_all(theirs) and not server.connections._total


def test_a_connection_that_is_over_gives_its_place_back(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.connections.take("10.0.0.7")
    theirs, ours = socket.socketpair()
    with theirs:
        theirs.sendall(b"GET /a HTTP/1.0\r\n\r\n")
        theirs.shutdown(socket.SHUT_WR)
        server.process_request_thread(ours, ("10.0.0.7", 1))
        assert read_all(theirs).endswith(b"/a ") and ours.fileno() == -1
    assert not server.connections._total


def test_a_client_of_http_on_a_port_of_https_is_told(server: HttpServer) -> None:
    wrapped: List[Any] = []

    def wrap(request: socket.socket, server_side: bool) -> socket.socket:
        wrapped.append(server_side)
        assert request.gettimeout() == HEAD_S
        return request

    server.tls = SimpleNamespace(wrap_socket=wrap)
    for first, said in ((b"GET", b"this port speaks https"), (b"\x16", b"")):
        theirs, ours = socket.socketpair()
        with theirs:
            theirs.settimeout(30)
            theirs.sendall(first)
            theirs.shutdown(socket.SHUT_WR)
            server.finish_request(ours, ("10.0.0.7", 1))
            ours.close()
            assert said in read_all(theirs)
    assert wrapped == [True]
    server.tls = None


@pytest.mark.parametrize(
    ("exc", "words"),
    [
        (ConnectionResetError("gone"), "10.0.0.7: ConnectionResetError: gone"),
        (KeyError("x"), "warning: 10.0.0.7: KeyError: 'x'"),
    ],
)
def test_a_fault_of_a_connection_is_told(exc: Exception, words: str, server: HttpServer) -> None:
    try:
        raise exc
    except Exception:  # noqa: BLE001
        server.handle_error(None, ("10.0.0.7", 1))
    assert words in said_by(server)
    assert ("warning" in said_by(server)) == ("warning" in words)


@pytest.mark.parametrize(("finishes", "slept_s"), [(True, 0.1), (False, 1.0)])
def test_answers_on_their_way_are_waited_for_but_not_for_ever(
    finishes: bool, slept_s: float, server: HttpServer, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "shutdown", lambda: None)
    answering: Any = server.answering
    answering.update({"one", "two"})
    sleep = now.sleep

    def finish(seconds: float) -> None:
        sleep(seconds)
        if finishes:
            answering.pop()

    monkeypatch.setattr(now, "sleep", finish)
    server.drain(1.0)
    assert server.closing and sum(now.slept) == pytest.approx(slept_s, abs=0.06)
    assert "stopping when 2 answers are sent" in said_by(server)


def test_a_server_that_answers_nobody_stops_at_once(
    server: HttpServer, now: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "shutdown", lambda: None)
    server.drain(1.0)
    assert not now.slept and not said_by(server)
    with pytest.raises(OSError):
        socket.create_connection(server.server_address[:2])
