"""Requests by the letter of RFC 9112, directly and through nginx; and who gets in."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest

from conftest import Program, free_port, missing
from hfship.base.content import content_files
from hfship.base.report import Reporter
from hfship.base.settings import Token
from hfship.ops import http_server
from hfship.ops.catalogue import RepoCatalogue
from hfship.ops.http_request import (
    HEAD_SIZE,
    MOST_FIELDS,
    BadRequest,
    RequestReader,
    chunk_size,
    parse_head,
)
from hfship.ops.mirror import MirrorServer
from support import components
from test_mirror import (  # noqa: F401 - a fixture
    TINY,
    Mirror,
    certificate,
    publish,
    run_hf,
    wait_until,
)

HOST = b"Host: mirror\r\n"
GET = b"GET /health HTTP/1.1\r\n"
PATHS_INFO = b"POST /api/models/org/tiny/paths-info/main HTTP/1.1\r\n" + HOST
# What a smuggler hides: behind a proxy it would answer the next client's question.
HIDDEN = b"GET /org/tiny/resolve/main/hidden HTTP/1.1\r\nHost: mirror\r\n\r\n"
# And one that waits for the next client's, to take it for the value of a field.
HALF = b"GET /org/tiny/resolve/main/hidden HTTP/1.1\r\nHost: mirror\r\nX: "
LONG = b"x" * (HEAD_SIZE + 1)


def lines(*fields: bytes) -> bytes:
    return b"".join(field + b"\r\n" for field in fields)


# form -> (what a client sends, the status that it gets)
FORMS: Dict[str, Tuple[bytes, int]] = {
    # what is a request
    "plain": (GET + HOST + b"\r\n", 200),
    "no blank behind the colon": (GET + b"Host:mirror\r\n\r\n", 200),
    "blanks around a value": (GET + b"Host: \t mirror \t\r\n\r\n", 200),
    "a host of nothing": (GET + b"Host:\r\n\r\n", 200),
    "a host that is an address": (GET + b"Host: [::1]:8090\r\n\r\n", 200),
    "absolute form": (b"GET http://mirror/health HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    "absolute form, another host": (b"GET HTTPS://x:1/health HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    "absolute form without a path": (b"GET http://mirror HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    "HTTP/1.0 without a host": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "a later HTTP/1": (b"GET /health HTTP/1.9\r\n" + HOST + b"\r\n", 200),
    "an empty line before it": (b"\r\n" + GET + HOST + b"\r\n", 200),
    "a body of nothing": (GET + HOST + b"Content-Length: 0\r\n\r\n", 200),
    "bytes of Latin-1 in a value": (GET + HOST + b"X: \xe9\xff\r\n\r\n", 200),
    "a repeated field": (GET + HOST + lines(b"Accept: a", b"Accept: b", b""), 200),
    "as many fields as may be": (GET + HOST + b"A: b\r\n" * (MOST_FIELDS - 1) + b"\r\n", 200),
    "a body": (PATHS_INFO + b"Content-Length: 17\r\n\r\npaths=config.json", 200),
    "a body in chunks": (
        PATHS_INFO
        + b"Transfer-Encoding: chunked\r\n\r\n6\r\npaths=\r\nB\r\nconfig.json\r\n0\r\n\r\n",
        200,
    ),
    "chunks with extensions and trailers": (
        PATHS_INFO
        + b"Transfer-Encoding: Chunked\r\n\r\n6;a=b\r\npaths=\r\n00b ; c\r\nconfig.json\r\n0\r\nX: y\r\n\r\n",
        200,
    ),
    # where it ends is not clear
    "two lengths": (
        PATHS_INFO + lines(b"Content-Length: 1", b"Content-Length: 2", b"") + b"x",
        400,
    ),
    "the same length twice": (PATHS_INFO + b"Content-Length: 1\r\n" * 2 + b"\r\nx", 400),
    "two lengths in one field": (PATHS_INFO + b"Content-Length: 1, 1\r\n\r\nx", 400),
    "a length and chunks": (
        PATHS_INFO + lines(b"Content-Length: 4", b"Transfer-Encoding: chunked", b"") + b"0\r\n\r\n",
        400,
    ),
    "chunks and a length": (
        PATHS_INFO + lines(b"Transfer-Encoding: chunked", b"Content-Length: 5", b"") + b"0\r\n\r\n",
        400,
    ),
    "a length with a sign": (PATHS_INFO + b"Content-Length: +1\r\n\r\nx", 400),
    "a length below nothing": (PATHS_INFO + b"Content-Length: -1\r\n\r\n", 400),
    "a length in hex": (PATHS_INFO + b"Content-Length: 0x1\r\n\r\nx", 400),
    "a length with a line": (PATHS_INFO + b"Content-Length: 1_0\r\n\r\nx", 400),
    "a length with a blank": (PATHS_INFO + b"Content-Length: 1 0\r\n\r\nx", 400),
    "an empty length": (PATHS_INFO + b"Content-Length:\r\n\r\nx", 400),
    "a length of other digits": (PATHS_INFO + b"Content-Length: \xb2\r\n\r\nx", 400),
    "a length that no file has": (
        PATHS_INFO + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        413,
    ),
    "more than a body may have": (PATHS_INFO + b"Content-Length: 2000000\r\n\r\n", 413),
    "chunks that are not last": (PATHS_INFO + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 400),
    "chunks of something": (PATHS_INFO + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "no known coding": (PATHS_INFO + b"Transfer-Encoding: xchunked\r\n\r\n", 400),
    "identity": (PATHS_INFO + b"Transfer-Encoding: identity\r\n\r\n", 400),
    "a coding in quotes": (PATHS_INFO + b'Transfer-Encoding: "chunked"\r\n\r\n', 400),
    "a coding with a tab": (PATHS_INFO + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "an empty coding": (PATHS_INFO + b"Transfer-Encoding:\r\n\r\n", 400),
    "two codings": (PATHS_INFO + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400),
    "chunks in HTTP/1.0": (
        PATHS_INFO.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "a body of a GET": (GET + HOST + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, 400),
    "a body of a HEAD": (
        b"HEAD /health HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
        400,
    ),
    "a GET with half a request": (
        GET + HOST + b"Content-Length: %d\r\n\r\n" % len(HALF) + HALF,
        400,
    ),
    "a HEAD with half a request": (
        b"HEAD /health HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(HALF) + HALF,
        400,
    ),
    "chunks of half a request": (
        GET
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(HALF)
        + HALF
        + b"\r\n0\r\n\r\n",
        400,
    ),
    "a DELETE with half a request": (
        b"DELETE /x HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(HALF) + HALF,
        403,
    ),
    "chunks of a GET": (GET + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN, 400),
    "a chunk without a size": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n\r\n" + HIDDEN,
        400,
    ),
    "a size with a blank": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n1 \r\nx\r\n0\r\n\r\n",
        400,
    ),
    "a size with a sign": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
        400,
    ),
    "a size with 0x": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n",
        400,
    ),
    "a size that wraps around": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n10000000000000001\r\nx\r\n0\r\n\r\n",
        400,
    ),
    "a chunk that is longer": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxyz\r\n0\r\n\r\n",
        400,
    ),
    "line feeds among chunks": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n",
        400,
    ),
    "an extension with a line feed": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n1;\nx\r\nx\r\n0\r\n\r\n",
        400,
    ),
    "a trailer that is none": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n0\r\nno trailer\r\n\r\n",
        400,
    ),
    "a chunk that no body may have": (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n",
        413,
    ),
    "a body that ends early": (PATHS_INFO + b"Content-Length: 10\r\n\r\nx", 400),
    # what is no head
    "line feeds alone": (b"GET /health HTTP/1.1\nHost: mirror\n\n", 400),
    "a line feed in a head": (GET + HOST + b"A: b\nX: y\r\n\r\n", 400),
    "a return alone": (GET + HOST + b"A: b\rX: y\r\n\r\n", 400),
    "a zero": (GET + HOST + b"A: \x00\r\n\r\n", 400),
    "a folded field": (GET + HOST + b"A: b\r\n c\r\n\r\n", 400),
    "a folded field with a tab": (GET + HOST + b"Content-Length:\r\n\t5\r\n\r\n", 400),
    "a blank before the fields": (GET + b" X: y\r\n" + HOST + b"\r\n", 400),
    "a blank before a colon": (GET + HOST + b"Content-Length : 5\r\n\r\n", 400),
    "a tab before a colon": (GET + HOST + b"Transfer-Encoding\t: chunked\r\n\r\n", 400),
    "a field without a name": (GET + HOST + b": x\r\n\r\n", 400),
    "a field without a colon": (GET + HOST + b"x\r\n\r\n", 400),
    "a name that is no token": (GET + HOST + b"Content-Length\xa0: 5\r\n\r\n", 400),
    "too many fields": (GET + HOST + b"A: b\r\n" * MOST_FIELDS + b"\r\n", 431),
    "too long fields": (GET + HOST + b"A: " + LONG + b"\r\n\r\n", 431),
    "a field without an end": (GET + b"A: " + LONG, 431),
    "no host": (GET + b"\r\n", 400),
    "two hosts": (GET + HOST + HOST + b"\r\n", 400),
    "a host that is none": (GET + b"Host: a b\r\n\r\n", 400),
    "a host with a path": (GET + b"Host: a/b\r\n\r\n", 400),
    "a host with a user": (GET + b"Host: a@b\r\n\r\n", 400),
    "an absolute form with a user": (b"GET http://a@b/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two tokens": (GET + HOST + b"Authorization: Bearer a\r\n" * 2 + b"\r\n", 400),
    "two ranges": (GET + HOST + b"Range: bytes=0-1\r\n" * 2 + b"\r\n", 400),
    # what is no request line
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/3.0": (b"GET / HTTP/3.0\r\n\r\n", 505),
    "HTTP in small letters": (b"GET /health http/1.1\r\n" + HOST + b"\r\n", 400),
    "a version with a blank": (b"GET /health HTTP/1.1 \r\n" + HOST + b"\r\n", 400),
    "a version of three": (b"GET /health HTTP/1.1.1\r\n" + HOST + b"\r\n", 400),
    "two blanks": (b"GET  /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a tab": (b"GET\t/health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a blank first": (b" GET /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a blank in the address": (b"GET /hea lth HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no address": (b"GET HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a relative address": (b"GET health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "another scheme": (b"GET ftp://mirror/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an address with a fragment": (b"GET /health#x HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "an address of other bytes": (b"GET /\xe4 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a long address": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "a longer address": (b"GET /" + LONG + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "a method that is not here": (b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "TRACE": (b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "CONNECT": (b"CONNECT mirror:443 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "OPTIONS": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "a method that is none": (b"G{T / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "TLS": (bytes.fromhex("16030100a5010000a10303") + bytes(100), 400),
    "ssh": (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
    "nothing": (b"\r\n\r\n", 0),
}


class RawClient:
    """A connection on which any bytes are sent."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 20, (source, 0))
        self.received = b""

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # it was answered in the middle
            self.socket.sendall(data)

    def rest(self) -> bytes:
        """All that comes until the end, after which nothing more is sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while piece := self.socket.recv(1 << 16):
                self.received += piece
        self.socket.close()
        return self.received

    def heard(self, silence_s: float = 0.1) -> bytes:
        """All that comes until nothing does for a while; then the connection is closed.

        nginx takes a client that closes its side for one that has gone.
        """
        self.socket.settimeout(silence_s)
        with contextlib.suppress(socket.timeout, ConnectionError):
            while piece := self.socket.recv(1 << 16):
                self.received += piece
        self.socket.close()
        return self.received

    def answer(self) -> Tuple[int, bytes]:
        """Status and body of the next answer; (0, b"") at the end."""
        while b"\r\n\r\n" not in self.received:
            piece = self.socket.recv(1 << 16)
            if not piece:
                return 0, b""
            self.received += piece
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(self.received) < size:
            self.received += self.socket.recv(1 << 16)
        body, self.received = self.received[:size], self.received[size:]
        return int(head.split()[1]), body


def statuses(answers: bytes) -> List[int]:
    return [int(part.split()[0]) for part in answers.split(b"HTTP/1.1 ")[1:]]


@pytest.fixture(scope="module")
def server(made_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MirrorServer]:
    """A mirror of org/tiny, for all tests of this file that change nothing."""
    root = tmp_path_factory.mktemp("site")
    publish(root, "org/tiny", made_model, TINY)
    with serving(root) as server:
        yield server


@contextlib.contextmanager
def serving(root: Path, **options: object) -> Iterator[MirrorServer]:
    reporter = Reporter(progress="none", verbosity=-1)
    with MirrorServer(("127.0.0.1", 0), RepoCatalogue(root), reporter, **options) as server:  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def port_of(server: MirrorServer) -> int:
    return int(server.server_address[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gets_its_answer_and_nothing_behind_it_is_read(
    form: str, server: MirrorServer
) -> None:
    """What is refused ends its connection: no second request on it is answered."""
    sent, status = FORMS[form]
    client = RawClient(port_of(server))
    client.send(sent + HIDDEN)
    answers = client.rest()
    if status == 0:
        assert statuses(answers) == [404]
    elif status == 200:
        last = [404] if b"HTTP/1.0" not in sent else []
        assert statuses(answers) == [200, *last], answers
    elif form == "a body that ends early":  # its end came from the next request
        assert statuses(answers)[0] == 200
    else:
        assert statuses(answers) == [status], answers
        assert b"Connection: close\r\n" in answers and b'{"error": "' in answers


def test_a_request_that_is_cut_gets_an_answer(server: MirrorServer) -> None:
    for part in (b"GET", GET, GET + HOST, PATHS_INFO + b"Content-Length: 9\r\n\r\npat"):
        client = RawClient(port_of(server))
        client.send(part)
        assert statuses(client.rest()) == [400]


def test_requests_come_in_any_pieces(server: MirrorServer) -> None:
    """Three on one connection, byte by byte and all at once."""
    body, _ = FORMS["chunks with extensions and trailers"]
    requests = GET + HOST + b"\r\n" + body + GET + HOST + b"\r\n"
    for size in (1, 7, len(requests)):
        client = RawClient(port_of(server))
        for at in range(0, len(requests), size):
            client.send(requests[at : at + size])
        answers = [client.answer() for _ in range(3)]
        assert [status for status, _ in answers] == [200] * 3
        assert b'"config.json"' in answers[1][1]
        client.socket.close()


def test_who_expects_to_be_told_to_go_on_is_told(server: MirrorServer) -> None:
    client = RawClient(port_of(server))
    client.send(PATHS_INFO + b"Expect: 100-continue\r\nContent-Length: 17\r\n\r\n")
    assert client.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"paths=config.json")
    assert client.answer()[0] == 200
    client.socket.close()


def test_a_body_that_is_not_wanted_is_not_read(made_model: Path, tmp_path: Path) -> None:
    """Who has no token costs no memory: the answer comes before the body."""
    publish(tmp_path, "org/tiny", made_model)
    with serving(tmp_path, token=Token("secret", "test")) as server:
        client = RawClient(port_of(server))
        client.send(PATHS_INFO + b"Expect: 100-continue\r\nContent-Length: 900000\r\n\r\n")
        assert client.answer()[0] == 401 and client.rest() == b""


def test_the_host_of_an_absolute_address_counts() -> None:
    request = parse_head(b"GET http://there:1/a?b HTTP/1.1\r\nHost: here\r\n\r\n")
    assert (request.host, request.path, request.query) == ("there:1", "/a", "b")
    assert parse_head(b"GET http://there?b HTTP/1.1\r\nHost: h\r\n\r\n").line == "GET /?b HTTP/1.1"


@pytest.mark.parametrize(
    "line, size", [(b"0", 0), (b"fF", 255), (b"1;a", 1), (b"1 ;a", 1), (b"", None), (b"1 ", None)]
)
def test_chunk_sizes(line: bytes, size: object) -> None:
    if size is None:
        with pytest.raises(BadRequest):
            chunk_size(line)
    else:
        assert chunk_size(line) == size


def test_a_body_of_tiny_chunks_has_an_end() -> None:
    """A megabyte in chunks of a byte would take seconds of everybody's time."""
    stream = (
        PATHS_INFO + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n"
    )
    left = memoryview(stream)

    def receive(most: int) -> bytes:
        nonlocal left
        piece, left = left[:most], left[most:]
        return bytes(piece)

    reader = RequestReader(receive)
    request = reader.head()
    assert request
    with pytest.raises(BadRequest) as caught:
        reader.body(request, 1 << 20)
    assert caught.value.status == 413


# -- behind a proxy that shares its connections

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream mirror {{ server 127.0.0.1:{mirror}; keepalive 1; }}
  server {{
    listen 127.0.0.1:{port};
    location /hub/ {{
      proxy_pass http://mirror/; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Prefix /hub;
    }}
    location / {{
      proxy_pass http://mirror; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host $http_host; proxy_request_buffering {buffering}; {more}
    }}
  }}
}}
"""


@contextlib.contextmanager
def nginx_before(port: int, folder: Path, buffering: str = "on", more: str = "") -> Iterator[int]:
    """The port of an nginx that sends all clients' requests over one connection to the mirror."""
    if shutil.which("nginx") is None:
        missing("nginx")
    folder.mkdir(exist_ok=True)
    front = free_port()
    config = folder / "nginx.conf"
    text = NGINX.format(folder=folder, mirror=port, port=front, buffering=buffering, more=more)
    config.write_text(text)
    nginx = subprocess.Popen(["nginx", "-c", config], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", front)) == 0)
        yield front
    finally:
        nginx.terminate()
        nginx.wait(20)


def smuggled() -> Iterator[Tuple[str, bytes]]:
    """What is sent to nginx: each form alone, and with a request behind it."""
    for form, (sent, _) in FORMS.items():
        yield form, sent
        yield f"{form}, and more", sent + HIDDEN


@pytest.mark.parametrize("buffering", ["on", "off"])
def test_behind_nginx_no_form_changes_what_the_next_client_gets(
    buffering: str, server: MirrorServer, tmp_path: Path
) -> None:
    """Each form is sent by one client, with a hidden request in or behind it; the next client asks
    on the connection to the mirror that nginx used for it."""
    question = b"GET /org/tiny/resolve/main/config.json HTTP/1.1\r\nHost: next\r\n\r\n"
    with nginx_before(port_of(server), tmp_path / "nginx", buffering) as front:
        honest = RawClient(front)
        honest.send(question)
        right = honest.answer()
        assert right[0] == 200
        wrong = {}
        for form, sent in smuggled():
            smuggler = RawClient(front)
            smuggler.send(sent)
            smuggler.heard(0.03)
            honest.send(question)
            answer = honest.answer()
            if answer != right:
                wrong[form] = answer
        honest.socket.close()
    assert wrong == {}


def test_a_client_without_a_token_says_nothing_for_the_next_one(
    made_model: Path, tmp_path: Path
) -> None:
    """The proxy gives the token of the site to those whom it knows; the smuggler is not one."""
    publish(tmp_path / "site", "org/tiny", made_model)
    with_token = b"Authorization: Bearer secret\r\n"
    question = b"GET /api/whoami-v2 HTTP/1.1\r\nHost: next\r\n" + with_token + b"\r\n"
    with serving(tmp_path / "site", token=Token("secret", "test")) as server, nginx_before(
        port_of(server), tmp_path / "nginx"
    ) as front:
        honest = RawClient(front)
        for form, sent in smuggled():
            smuggler = RawClient(front)
            smuggler.send(sent)
            smuggler.heard(0.03)
            honest.send(question)
            status, body = honest.answer()
            assert (status, b'"mirror"' in body) == (200, True), form
        honest.socket.close()


def test_pages_lead_through_the_path_that_nginx_has_for_the_mirror(
    server: MirrorServer, tmp_path: Path
) -> None:
    with nginx_before(port_of(server), tmp_path / "nginx") as front:
        path = b"/hub/api/models/org/tiny/tree/main?limit=1"
        seen = []
        while path:
            client = RawClient(front)
            client.send(b"GET " + path + b" HTTP/1.0\r\nHost: site\r\n\r\n")
            answer = client.heard(5)
            assert statuses(answer) == [200]
            seen.append(answer.partition(b"\r\n\r\n")[2])
            link = answer.partition(b"Link: <http://site")[2].partition(b">")[0]
            assert not link or link.startswith(b"/hub/api/models/org/tiny/tree/main?")
            path = link
    assert len(seen) == len(set(seen)) > 3


@pytest.mark.real
def test_hf_downloads_through_a_path_of_nginx(
    server: MirrorServer, made_model: Path, tmp_path: Path
) -> None:
    hf = components.require("hf")
    out = tmp_path / "out"
    with nginx_before(port_of(server), tmp_path / "nginx") as front:
        url = f"http://127.0.0.1:{front}/hub"
        run_hf(hf, url, tmp_path, "download", "org/tiny", "--local-dir", out)
    for path, _ in content_files(made_model):
        assert (out / path).read_bytes() == (made_model / path).read_bytes()


# -- limits


def test_what_is_slow_is_let_go(
    made_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head, a body, a handshake, a pause between requests, a reader that takes nothing."""
    publish(tmp_path, "org/tiny", made_model)
    (tmp_path / "org/tiny/big.bin").write_bytes(bytes(64 << 20))
    limits = ("HEAD_S", "BODY_S", "IDLE_S", "CROWDED_IDLE_S", "STALL_S", "LINGER_S")
    for limit in limits:
        monkeypatch.setattr(http_server, limit, 0.5)
    others = threading.active_count()  # what tests before this one left
    with serving(tmp_path) as server:
        port = port_of(server)
        half = {
            "head": (GET, [408]),
            "body": (PATHS_INFO + b"Content-Length: 9\r\n\r\npat", [408]),
            "silent": (b"", []),
            "idle": (GET + HOST + b"\r\n", [200]),
        }
        for name, (sent, expected) in half.items():
            client = RawClient(port)
            client.send(sent)
            received = b""
            while piece := client.socket.recv(1 << 16):
                received += piece
            assert statuses(received) == expected, name

        reader = RawClient(port)
        reader.send(b"GET /org/tiny/resolve/main/big.bin HTTP/1.1\r\n" + HOST + b"\r\n")
        wait_until(lambda: server.answering)
        wait_until(lambda: not server.answering)
        assert len(reader.rest()) < 64 << 20
        wait_until(lambda: threading.active_count() < others + 12)


def test_a_client_that_drips_is_let_go(
    server: MirrorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then does not count as a request under way."""
    monkeypatch.setattr(http_server, "HEAD_S", 1.0)
    client = RawClient(port_of(server))
    began = time.monotonic()
    client.socket.settimeout(0.1)
    received = b""
    for byte in GET + b"X: " + b"y" * 300:
        client.send(bytes([byte]))
        with contextlib.suppress(socket.timeout):
            received = client.socket.recv(1 << 16)
            break
    assert statuses(received) == [408] and time.monotonic() - began < 15
    client.socket.close()


def connected(port: int, count: int, source: str = "127.0.0.1") -> List[RawClient]:
    return [RawClient(port, source) for _ in range(count)]


def gets_in(client: RawClient) -> bool:
    client.send(GET + HOST + b"\r\n")
    status, _ = client.answer()
    assert status in (200, 503)
    return status == 200


def test_one_client_leaves_room_for_others(
    made_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "org/tiny", made_model)
    monkeypatch.setattr(http_server, "MOST_CONNECTIONS", 20)
    with serving(tmp_path) as server:
        port = port_of(server)
        greedy = connected(port, 30)
        assert [gets_in(client) for client in greedy] == [True] * 10 + [False] * 20
        others = connected(port, 10, "127.0.0.2")
        assert all(gets_in(client) for client in others)
        assert not gets_in(RawClient(port, "127.0.0.3"))
        for client in [*greedy, *others]:
            client.socket.close()
        wait_until(lambda: gets_in(RawClient(port, "127.0.0.3")))


def test_answers_take_no_more_memory_than_there_is(
    made_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client that does not read its lists gets no more of them; another one does."""
    root = tmp_path / "site"
    (root / "many").mkdir(parents=True)
    for number in range(3000):
        (root / f"many/{'x' * 200}{number}").write_bytes(b"")
    monkeypatch.setattr(http_server, "MOST_MEMORY", 4 << 20)
    question = b"GET /api/models/many HTTP/1.1\r\n" + HOST + b"\r\n"
    with serving(root) as server:
        port = port_of(server)
        clients = connected(port, 4)
        for client in clients:  # more than the buffers of the kernel hold
            client.send(question * 12)
        wait_until(lambda: server.memory._total > 3 << 19)
        other = RawClient(port, "127.0.0.2")
        other.send(question)
        status, body = other.answer()
        assert status == 200 and len(body) > 600_000
        other.socket.close()
        answers = [statuses(client.heard(0.5)) for client in clients]
    assert all(set(one) <= {200, 503} for one in answers)
    assert any(503 in one for one in answers) and any(one.count(200) > 2 for one in answers)


def test_a_server_without_descriptors_says_so_and_waits(
    pyz: Program, made_model: Path, tmp_path: Path
) -> None:
    """It does not spin, answers 503, and serves again when there are some."""
    publish(tmp_path / "site", "org/tiny", made_model)
    pyz.argv[:0] = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"]
    with Mirror(pyz, tmp_path / "site") as mirror:
        port = int(mirror.url.rpartition(":")[2])
        clients = connected(port, 100)
        stat = Path(f"/proc/{mirror.process.pid}/stat")

        def cpu_s() -> float:
            fields = stat.read_text().rpartition(")")[2].split()
            return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

        before = cpu_s()
        time.sleep(2)
        assert cpu_s() - before < 1
        answers = [gets_in(client) for client in clients]
        assert 4 <= answers.count(True) < 64
        for client in clients:
            client.socket.close()
        wait_until(lambda: gets_in(RawClient(port)))


def test_accept_without_descriptors_is_answered_with_the_spare(
    made_model: Path, tmp_path: Path
) -> None:
    """The limit of the whole process is used up by others."""
    publish(tmp_path, "org/tiny", made_model)
    with serving(tmp_path) as server:
        client = socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        try:
            held = []
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            client.settimeout(20)
            client.connect(("127.0.0.1", port_of(server)))
            client.sendall(GET + HOST + b"\r\n")
            assert b"503" in client.recv(1 << 16)[:20]
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            client.close()
        wait_until(lambda: gets_in(RawClient(port_of(server))))


def test_heads_take_no_more_memory_than_their_limit(
    pyz: Program, made_model: Path, tmp_path: Path
) -> None:
    publish(tmp_path / "site", "org/tiny", made_model)
    with Mirror(pyz, tmp_path / "site") as mirror:
        port = int(mirror.url.rpartition(":")[2])
        status = Path(f"/proc/{mirror.process.pid}/status")

        def resident() -> int:
            return int(status.read_text().partition("VmRSS:")[2].split()[0]) << 10

        before = resident()
        clients = connected(port, 60)
        for client in clients:
            client.send(GET + b"A: " + b"x" * (HEAD_SIZE - 100))
        for client in clients[::2]:
            client.send(b"y" * 6_000_000)
        assert resident() - before < 32 << 20
        for client in clients:
            client.socket.close()


def test_a_client_of_http_on_the_port_of_https_is_told(
    hfship: Program,
    certificate: Tuple[Path, Path, Path],  # noqa: F811
    made_model: Path,
    tmp_path: Path,
) -> None:
    cert, key, _ = certificate
    publish(tmp_path / "site", "org/tiny", made_model)
    with Mirror(hfship, tmp_path / "site", "--tls-cert", cert, "--tls-key", key) as mirror:
        client = RawClient(int(mirror.url.rpartition(":")[2]))
        client.send(GET + HOST + b"\r\n")
        answer = client.rest()
        assert statuses(answer) == [400] and b"https" in answer


@pytest.mark.parametrize(
    "harm",
    [
        lambda: RuntimeError("can't start new thread"),
    ],
)
def test_a_server_without_threads_says_so(
    harm: Callable[[], Exception],
    made_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(tmp_path, "org/tiny", made_model)
    with serving(tmp_path) as server:
        real = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if thread.name.startswith("Thread") and "process_request" in thread.name:
                raise harm()
            real(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        assert not gets_in(RawClient(port_of(server)))
        monkeypatch.undo()
        assert gets_in(RawClient(port_of(server)))


@pytest.mark.parametrize("size, fits", [(0, True), (9, True), (10, True), (11, False)])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_be_as_long_as_is_allowed(size: int, fits: bool, chunked: bool) -> None:
    body = b"x" * size
    fields = b"Content-Length: %d" % size
    if chunked:
        fields = b"Transfer-Encoding: chunked"
        chunk = b"%x\r\n%s\r\n" % (size, body) if size else b""
        body = chunk + b"0\r\n\r\n"
    pieces = iter([b"POST /a HTTP/1.1\r\nHost: h\r\n%s\r\n\r\n%s" % (fields, body)])
    reader = RequestReader(lambda *_: next(pieces, b""))
    request = reader.head()
    assert request
    if fits:
        assert reader.body(request, 10) == b"x" * size
    else:
        with pytest.raises(BadRequest) as caught:
            reader.body(request, 10)
        assert caught.value.status == 413


def test_a_short_answer_is_whole() -> None:
    answer = http_server.short_answer(503, "too many", retry_after_s=5)
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 503 Service Unavailable"
    assert body == b'{"error": "too many"}'
    assert fields["Content-Length"] == str(len(body))
    assert fields["Content-Type"].startswith("application/json")
    assert (fields["X-Error-Message"], fields["Retry-After"]) == ("too many", "5")
    assert fields["Connection"] == "close"
