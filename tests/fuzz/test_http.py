"""What clients may send to the mirror: never two readings of one request, never a byte that is not listed."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple, Union

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.conftest import fuzzed
from hfship.ops.http_request import (
    HEAD_SIZE,
    MOST_FIELDS,
    BadRequest,
    Request,
    RequestReader,
    parse_byte_range,
)
from hfship.ops.hub_api import asked_paths, asked_span, parse_question
from hfship.ops.mirror import MirrorServer
from test_http import FORMS, HALF, HIDDEN, RawClient, nginx_before, port_of, serving
from test_mirror import TINY, publish

BODY = 1 << 12

# -- requests, right and nearly right

METHODS = st.sampled_from(
    [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"get", b"BREW", b"G T", b""]
)
TARGETS = st.sampled_from(
    [
        b"/",
        b"/health",
        b"/a?b=c",
        b"//a",
        b"http://h/x",
        b"https://h",
        b"*",
        b"h:1",
        b"/a#b",
        b"/\xff",
        b"",
        b"a",
    ]
) | st.binary(max_size=12)
VERSIONS = st.sampled_from(
    [b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/1.9", b"HTTP/2.0", b"http/1.1", b"HTTP/1.1.1", b""]
)
ENDS = st.sampled_from([b"\r\n"] * 30 + [b"\n", b"\r", b"\r\r\n", b"\n\r", b""])
COLONS = st.sampled_from([b": "] * 12 + [b":", b" :", b"\t:", b" ", b":\t ", b": \x0b"])
NAMES = st.sampled_from(
    [
        *(
            b"Host",
            b"Content-Length",
            b"Transfer-Encoding",
            b"content-length",
            b"TRANSFER-ENCODING",
        ),
        *(
            b"Connection",
            b"Expect",
            b"Range",
            b"X",
            b"Content_Length",
            b"Content-Length\xa0",
            b" Content-Length",
            b"",
        ),
    ]
)
VALUES = (
    st.sampled_from(
        [
            *(b"h", b"h:80", b"[::1]", b"h h", b"h/", b"u@h", b"", b"0", b"1", b"5", b"05", b"+5", b"-1", b"5 5", b"5,5", b"0x5"),
            *(b"5;", b"9" * 30, b"chunked", b"Chunked", b"gzip", b"gzip, chunked", b"chunked, gzip", b"identity", b"x\rchunked"),
            *(b"close", b"keep-alive", b"100-continue", b"bytes=0-1", b"chunked\x00", b'"chunked"', b"chunked;q=1"),
        ]
    )
    | st.binary(max_size=10)
)  # fmt: skip
FIELDS = st.builds(lambda *parts: b"".join(parts), NAMES, COLONS, VALUES, ENDS)
HOSTS = st.sampled_from([b"Host: h\r\n"] * 8 + [b"", b"Host: h\r\nHost: h\r\n", b"Host: a b\r\n"])
CHUNK_SIZES = st.sampled_from(
    [b"0", b"1", b"5", b"A", b"00", b"5;a=b", b"5 ", b" 5", b"-5", b"0x5", b"", b"FFFFFFFFFFFFFFFF"]
)
CHUNKS = st.builds(
    lambda *parts: b"".join(parts),
    CHUNK_SIZES,
    ENDS,
    st.sampled_from([b"", b"x", b"xxxxx", b"0123456789"]),
    ENDS,
)
BODIES = st.sampled_from([b"", b"x", b"xxxxx", HIDDEN, HALF]) | st.lists(CHUNKS, max_size=3).map(
    b"".join
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """The bytes of what may be a request, with its body, sometimes with a byte more, less or other."""
    blank = draw(st.sampled_from([b" "] * 20 + [b"  ", b"\t"]))
    line = draw(METHODS) + blank + draw(TARGETS) + blank + draw(VERSIONS) + draw(ENDS)
    fields = draw(st.lists(FIELDS, max_size=4))
    text = line + draw(HOSTS) + b"".join(fields) + draw(ENDS) + draw(BODIES)
    if draw(st.booleans()) or not text:
        return text
    at = draw(st.integers(0, len(text) - 1))
    kind = draw(st.sampled_from(["insert", "drop", "replace"]))
    byte = (
        b""
        if kind == "drop"
        else draw(st.sampled_from([b"\r", b"\n", b" ", b"\t", b":", b"\x00", b"5", b"\xff"]))
    )
    return text[:at] + byte + text[at + (kind != "insert") :]


STREAMS = st.lists(requests(), min_size=1, max_size=3).map(b"".join)
Outcome = Union[Tuple[Request, bytes], int]


class Stream:
    """A client that sends its bytes in pieces of given sizes, the last of which is repeated."""

    def __init__(self, content: bytes, sizes: Sequence[int]) -> None:
        self.left, self.sizes = content, list(sizes)

    def receive(self, most: int) -> bytes:
        assert 0 < most <= HEAD_SIZE, "a reader with a bound"
        size = min(most, self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0])
        piece, self.left = self.left[:size], self.left[size:]
        return piece


def outcomes(content: bytes, sizes: Sequence[int]) -> List[Outcome]:
    """What a server makes of a stream: requests with their bodies, up to its end or to an error's status."""
    reader = RequestReader(Stream(content, sizes).receive)
    found: List[Outcome] = []
    try:
        while True:
            request = reader.head()
            if request is None:
                return found
            found.append((request, reader.body(request, BODY)))
    except BadRequest as exc:
        found.append(exc.status)
    return found


def seen(found: Sequence[Outcome]) -> List[object]:
    """Outcomes that can be compared: Fields are equal to themselves alone."""
    return [
        one if isinstance(one, int) else (one[0].line, one[0].host, one[0].fields.as_sent(), one[1])
        for one in found
    ]


@given(STREAMS | st.binary(max_size=200))
@fuzzed(examples=400)
@example(b"\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nHost: h\r\nA: " + b"x" * HEAD_SIZE)
@example(b"GET / HTTP/1.1\r\nHost: h\r\n" + b"A: b\r\n" * 200 + b"\r\n")
def test_a_reader_is_never_surprised(content: bytes) -> None:
    for outcome in outcomes(content, [1 << 20]):
        if isinstance(outcome, int):
            assert outcome in (400, 413, 414, 431, 501, 505)
        else:
            assert outcome[0].method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


@given(STREAMS, st.lists(st.integers(1, 40), min_size=1, max_size=30))
@fuzzed(examples=400)
def test_pieces_change_nothing(content: bytes, sizes: List[int]) -> None:
    assert seen(outcomes(content, sizes)) == seen(outcomes(content, [1 << 20]))


def canonical(request: Request, body: bytes) -> bytes:
    """A request as a careful client would write it."""
    lines = [request.line.encode("latin-1")]
    if request.host or "Host" in request.fields:  # that of an absolute address counts
        lines.append(f"Host: {request.host}".encode("latin-1"))
    for name, value in request.fields.as_sent().items():
        if name.lower() not in ("host", "content-length", "transfer-encoding"):
            lines.append(f"{name}: {value}".encode("latin-1"))
    if body:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


@given(STREAMS)
@fuzzed(examples=400)
@example(b"".join(sent for sent, status in FORMS.values() if status == 200))
@example(b"GET http://h/x HTTP/1.0\r\n\r\n")
def test_what_is_taken_is_what_every_reader_takes(content: bytes) -> None:
    """Of the bytes of a request that is taken none can be read differently: no line of its head ends otherwise, no field
    is folded, one length at most, none beside chunks, no body where none belongs; and written anew it is the same."""
    for outcome in outcomes(content, [1 << 20]):
        if isinstance(outcome, int):
            continue
        request, body = outcome
        names = [name.lower() for name in request.fields.as_sent()]
        assert len(names) == len(set(names)) <= MOST_FIELDS and all(
            re.fullmatch(r"[!#-'*+.^-z|~0-9A-Z-]+", name) for name in names
        )
        assert not ({"content-length", "transfer-encoding"} <= set(names))
        assert request.minor == 0 or "host" in names
        assert request.method not in ("GET", "HEAD") or body == b""
        assert not re.search(
            r"[\r\n\x00]", str(request.fields.as_sent().values()).replace("\\", "")
        )
        again = outcomes(canonical(request, body), [1 << 20])
        assert len(again) == 1 and not isinstance(again[0], int)
        assert (again[0][0].line, again[0][0].host, again[0][1]) == (
            request.line,
            request.host,
            body,
        )


# -- what lies behind a request


@given(
    st.text(max_size=40) | st.from_regex(r"bytes=[0-9]{0,25}-[0-9]{0,25}", fullmatch=True),
    st.integers(0, 10**13),
)
@fuzzed(examples=200)
def test_a_range_is_inside_the_file(header: str, size: int) -> None:
    try:
        span = parse_byte_range(header, size)
    except ValueError as exc:
        assert str(exc) == "range not satisfiable"
        return
    assert span is None or 0 <= span[0] < span[1] <= size


@given(st.binary(max_size=300) | st.recursive(st.text() | st.integers(), st.lists).map(lambda v: f'{{"paths": {v}}}'.encode()),
       st.sampled_from(["application/json", "application/x-www-form-urlencoded", ""]))  # fmt: skip
@fuzzed(examples=60)
@example(b"[" * 100_000, "application/json")
@example(b'{"paths": ' + b"9" * 100_000 + b"}", "application/json")
@example(b"&paths=x" * 100_000, "")
def test_paths_of_a_post_are_names_or_none(body: bytes, kind: str) -> None:
    assert all(isinstance(path, str) for path in asked_paths(body, kind))


@given(
    st.dictionaries(
        st.sampled_from(["limit", "cursor"]), st.text(max_size=30) | st.integers().map(str)
    )
)
@fuzzed(examples=100)
def test_a_page_has_an_end(query: dict) -> None:  # type: ignore[type-arg]
    span = asked_span(query, 1000)
    assert 0 <= span.start <= span.stop <= span.start + 1000


@given(
    st.lists(
        st.text(max_size=8) | st.sampled_from(["tree", "revision", "paths-info"]),
        min_size=1,
        max_size=8,
    )
)
@fuzzed(examples=100)
def test_any_path_asks_something(parts: List[str]) -> None:
    parse_question(parts)


# -- a mirror


@pytest.fixture(scope="module")
def server(made_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MirrorServer]:
    """A mirror of org/tiny, with secrets beside, below and above it."""
    root = tmp_path_factory.mktemp("fuzzed") / "site"
    folder = publish(root, "org/tiny", made_model, TINY)
    for secret in (".env", ".git/config", "notes.txt", "../../secret", ".hfship/lock"):
        (folder / secret).parent.mkdir(exist_ok=True)
        (folder / secret).write_text("SECRET")
    (folder / "link").symlink_to(root / "secret")
    with serving(root) as server:
        yield server


STEPS = st.sampled_from(
    [
        *("..", ".", "", "%2e%2e", "%2E.", "..%2f", "%2f", "..%5c", "..\\", "%00", "%252e%252e", "..;", "\u2025", "%c0%ae%c0%ae"),
        *("org", "tiny", "resolve", "main", "a" * 40, "datasets", "spaces", "api", "models", "tree", "paths-info", "raw", "blob"),
        *("config.json", ".env", ".git", "config", "notes.txt", "secret", ".hfship", "manifest.json", "link", "etc", "passwd"),
    ]
)  # fmt: skip
PATHS = st.lists(STEPS | st.text(max_size=5), max_size=8).map(lambda steps: "/" + "/".join(steps))
FILES = st.lists(STEPS, min_size=1, max_size=5).map(
    lambda steps: "/org/tiny/resolve/main/" + "/".join(steps)
)


@given(path=PATHS | FILES)
@fuzzed(examples=350)
@example(path="/org/tiny/resolve/main/.env")
@example(path="/org/tiny/resolve/main/link")
@example(path="/org/tiny/resolve/main/..%2f..%2fsecret")
@example(path="//etc/passwd")
def test_no_path_leads_to_what_is_not_listed(path: str, server: MirrorServer) -> None:
    target = path.encode("utf-8", "surrogatepass")
    target = b"".join(
        b"%%%02X" % byte if byte <= 0x20 or byte > 0x7E or byte == 0x23 else bytes([byte])
        for byte in target
    )
    client = RawClient(port_of(server))
    client.send(b"GET " + target + b" HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n\r\n")
    answer = client.rest()
    status = int(answer.split()[1])
    assert status in (200, 404) and b"SECRET" not in answer and b"root:" not in answer
    if status == 200 and b"ETag: " in answer:
        assert b"config.json" in target or b".safetensors" in target


@pytest.fixture(scope="module")
def front(server: MirrorServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an nginx with one connection to the mirror."""
    with nginx_before(port_of(server), tmp_path_factory.mktemp("fuzzed") / "nginx", "off") as port:
        yield port


@given(content=requests())
@fuzzed(examples=40)
def test_behind_nginx_the_next_client_gets_its_own_answer(
    content: bytes, server: MirrorServer, front: int
) -> None:
    smuggler = RawClient(front)
    smuggler.send(content + HIDDEN)
    smuggler.heard(0.02)
    honest = RawClient(front)
    honest.send(b"GET /org/tiny/resolve/main/config.json HTTP/1.1\r\nHost: next\r\n\r\n")
    try:
        status, body = honest.answer()
    except socket.timeout:
        pytest.fail("the next client waits for ever")
    finally:
        honest.socket.close()
    assert status == 200 and b"architectures" in body
