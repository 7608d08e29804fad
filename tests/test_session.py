# SPDX-License-Identifier: Apache-2.0
"""Heads of answers that do not come, of which test_hostile_hub.py has servers, and how much may
wait in the kernel."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Iterator, Tuple

import pytest

from hfship.hub import session
from hfship.hub.session import HubSession, PromptResponse, bound_window, limit_reads

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"


@pytest.fixture
def wire() -> Iterator[Tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = [100.0]
    monkeypatch.setattr("hfship.hub.session.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("late_s", "comes"), [(0.0, True), (1.0, False)])
def test_a_head_has_to_come_in_time(late_s: float, comes: bool, wire: Any, clock: Any) -> None:
    ours, theirs = wire
    theirs.sendall(HEAD)
    answer = PromptResponse(ours)
    clock[0] += session.HEAD_S + late_s
    if comes:
        answer.begin()
        assert answer.status == 200
    else:
        with pytest.raises(TimeoutError, match="takes too long"):
            answer.begin()


def test_a_body_may_take_longer(wire: Any, clock: Any) -> None:
    ours, theirs = wire
    theirs.sendall(HEAD)
    answer = PromptResponse(ours)
    answer.begin()
    clock[0] += 10 * session.HEAD_S
    theirs.sendall(b"body")
    assert answer.read() == b"body"


def test_a_limit_is_lifted_and_an_answer_without_a_body_has_none(wire: Any, clock: Any) -> None:
    ours, theirs = wire
    theirs.sendall(HEAD)
    answer = PromptResponse(ours)
    limit_reads(answer, clock[0] - 1)
    with pytest.raises(TimeoutError):
        answer.fp.read(1)
    limit_reads(answer, None)
    assert answer.fp.read(1) == b"H"
    answer.close()
    limit_reads(answer, clock[0])


# -- how much may wait in the kernel


class Flood(BaseHTTPRequestHandler):
    """Sends more than anybody reads."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 20))


@pytest.fixture
def flood() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Flood) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        thread.join()


def test_over_a_short_line_little_waits_for_a_slow_reader(flood: str) -> None:
    """Left alone, the kernel takes megabytes, which a kill loses."""
    opened = HubSession(lambda request: request, 1, {})
    with opened.request("GET", flood, {}) as answer:
        wire = answer.raw._fp.fp.raw._sock
        for _ in range(64):  # as a reader takes more, the kernel makes more room
            assert answer.raw.read(1 << 20)
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * session.SHORT_LINE_WINDOW


@pytest.mark.parametrize(
    ("microseconds", "bounded"), [(0, False), (30, True), (500, True), (501, False)]
)
def test_over_a_long_line_the_kernel_takes_what_it_can(
    microseconds: int, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.hub.session.round_trip_us", lambda _: microseconds)
    with socket.socket() as wire:
        before = wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        bound_window(wire)
        after = wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert (after != before) == bounded
