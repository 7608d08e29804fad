# SPDX-License-Identifier: Apache-2.0
"""Requests as values, and from a stream that comes in pieces; test_http.py has their forms."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import pytest

from hfship.ops.http_request import (
    _CHUNK_LINE,
    HEAD_SIZE,
    TARGET_SIZE,
    BadRequest,
    Fields,
    RequestReader,
    head_end,
    parse_byte_range,
    parse_head,
)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("bytes=0-", (0, 10)),
        ("bytes=0-0", (0, 1)),
        ("bytes=3-3", (3, 4)),
        ("bytes=2-5", (2, 6)),
        ("bytes=2-9", (2, 10)),
        ("bytes=2-10", (2, 10)),
        ("bytes=9-", (9, 10)),
        ("bytes= 2 - 5 ", (2, 6)),
        ("bytes=-1", (9, 10)),
        ("bytes=-10", (0, 10)),
        ("bytes=-99", (0, 10)),
        (f"bytes=-{'9' * 30}", (0, 10)),
        (f"bytes=1-{'9' * 30}", (1, 10)),
        ("bytes=-", None),
        ("bytes=1-2,4-5", None),
        ("items=1-2", None),
        ("bytes=x-2", None),
        ("bytes=10-", "none"),
        ("bytes=5-4", "none"),
        ("bytes=-0", "none"),
        (f"bytes={'9' * 30}-", "none"),
    ],
)
def test_the_range_of_a_file(header: Optional[str], expected: Any) -> None:
    if expected == "none":
        with pytest.raises(ValueError, match="not satisfiable"):
            parse_byte_range(header, 10)
    else:
        assert parse_byte_range(header, 10) == expected


def test_a_file_of_nothing_has_no_range() -> None:
    for header in ("bytes=0-", "bytes=-1"):
        with pytest.raises(ValueError, match="not satisfiable"):
            parse_byte_range(header, 0)


def test_fields_are_found_whatever_their_case_and_shown_as_they_were_sent() -> None:
    fields = Fields({"x-a": ("X-A", "1"), "accept": ("accept", "a, b")})
    assert fields.get("x-A") == fields["X-a"] == "1" and "ACCEPT" in fields
    assert fields.get("none") == "" and fields.get("none", "x") == "x" and "none" not in fields
    assert fields.as_sent() == {"X-A": "1", "accept": "a, b"}
    assert fields.without("X-a").as_sent() == {"accept": "a, b"}
    with pytest.raises(KeyError):
        fields["none"]


def request(line: str, *fields: str) -> Any:
    return parse_head("\r\n".join([line, "Host: h", *fields, "", ""]).encode("latin-1"))


@pytest.mark.parametrize(
    ("line", "fields", "length", "chunked", "last"),
    [
        ("GET /a HTTP/1.1", [], 0, False, False),
        ("GET /a HTTP/1.0", [], 0, False, True),
        ("GET /a?b=c?d HTTP/1.1", ["Connection: close"], 0, False, True),
        ("GET /a HTTP/1.1", ["Connection: keep-alive , CLOSE"], 0, False, True),
        ("GET /a HTTP/1.1", ["Connection: closed"], 0, False, False),
        ("POST /a HTTP/1.1", ["Content-Length: 12"], 12, False, False),
        ("POST /a HTTP/1.1", ["Content-Length: 0"], 0, False, False),
        ("POST /a HTTP/1.1", ["Transfer-Encoding: chunked"], 0, True, False),
    ],
)
def test_what_a_head_says(
    line: str, fields: List[str], length: int, chunked: bool, last: bool
) -> None:
    made = request(line, *fields)
    assert made.line == line
    assert (made.body_length, made.is_chunked, made.is_last) == (length, chunked, last)
    assert made.has_body == (chunked or length > 0)
    assert made.without_field("host").fields.as_sent() == {
        name: value for name, _, value in (field.partition(": ") for field in fields)
    }


@pytest.mark.parametrize(
    ("target", "path", "query", "host"),
    [
        ("/a?b=c?d", "/a", "b=c?d", "h"),
        ("http://other:1/a?b", "/a", "b", "other:1"),
        ("HTTPS://other", "/", "", "other"),
        ("http://other?x=1", "/", "x=1", "other"),
    ],
)
def test_for_whom_a_request_is(target: str, path: str, query: str, host: str) -> None:
    made = request(f"GET {target} HTTP/1.1")
    assert (made.path, made.query, made.host, made.minor) == (path, query, host, 1)


def test_fields_that_are_repeated_are_joined() -> None:
    assert request("GET / HTTP/1.1", "Accept: a", "ACCEPT: b").fields["accept"] == "a, b"


# -- where a head ends


@pytest.mark.parametrize(
    ("spare", "rest", "end"),
    [(0, b"", True), (0, b"next", True), (1, b"", False), (1, b"next", False)],
)
def test_a_head_has_so_many_bytes(spare: int, rest: bytes, end: bool) -> None:
    first = b"GET / HTTP/1.1\r\nA: "
    head = first + b"x" * (HEAD_SIZE + spare - len(first) - 4) + b"\r\n\r\n"
    if end:
        assert head_end(head + rest, 0) == HEAD_SIZE
        assert head_end(head[:-1], 0) == -1
    else:
        with pytest.raises(BadRequest) as refused:
            head_end(head + rest, 0)
        assert refused.value.status == 431


def test_an_address_without_an_end_is_too_long() -> None:
    line = b"GET /" + b"a" * HEAD_SIZE
    assert head_end(line[: TARGET_SIZE + 9], 0) == -1
    with pytest.raises(BadRequest) as refused:
        head_end(line, 0)
    assert refused.value.status == 414


# -- a stream


WHOLE = (
    b"\r\n\r\nPOST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n12345"
    b"POST /b HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;x=y\r\nabc\r\n0A\r\n0123456789\r\n0\r\nX: y\r\n\r\n"
    b"GET /c HTTP/1.1\r\nHost: h\r\n\r\n"
)


def reader_of(stream: bytes, at_once: int) -> Tuple[RequestReader, List[int]]:
    """A reader of a stream that comes in pieces, and how much was asked for."""
    asked: List[int] = []
    left = [stream]

    def receive(most: int) -> bytes:
        asked.append(most)
        assert most > 0
        piece, left[0] = left[0][: min(most, at_once)], left[0][min(most, at_once) :]
        return piece

    return RequestReader(receive), asked


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 60, 10**6])
def test_requests_are_read_whatever_pieces_they_come_in(at_once: int) -> None:
    reader, asked = reader_of(WHOLE, at_once)
    seen = []
    while True:
        made = reader.head()
        if made is None:
            break
        seen.append((made.path, reader.body(made, 13)))
    assert seen == [("/a", b"12345"), ("/b", b"abc0123456789"), ("/c", b"")]
    assert max(asked) <= HEAD_SIZE and not reader.has_more


@pytest.mark.parametrize("cut", range(4, len(WHOLE)))
def test_a_stream_that_ends_in_the_middle_of_a_request_is_none(cut: int) -> None:
    reader, _ = reader_of(WHOLE[:cut], 10**6)
    ends = [WHOLE.index(b"POST /b"), WHOLE.index(b"GET /c"), 4]
    try:
        while True:
            made = reader.head()
            if made is None:
                break
            reader.body(made, 100)
    except BadRequest as exc:
        assert exc.status == 400 and cut not in ends
    else:
        assert cut in ends


@pytest.mark.parametrize("most", [12, 4])
def test_a_body_has_so_many_bytes(most: int) -> None:
    reader, _ = reader_of(WHOLE, 10**6)
    first = reader.head()
    assert first
    if most < 5:
        with pytest.raises(BadRequest) as refused:
            reader.body(first, most)
        assert refused.value.status == 413
        return
    reader.body(first, most)
    second = reader.head()
    assert second and reader.has_more
    with pytest.raises(BadRequest) as refused:
        reader.body(second, most)
    assert refused.value.status == 413


def chunked(body: bytes, most: int = 100) -> bytes:
    reader, _ = reader_of(body, 10**6)
    return reader.body(request("POST /b HTTP/1.1", "Transfer-Encoding: chunked"), most)


def test_chunks_and_trailers_are_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.ops.http_request._MOST_CHUNKS", 3)
    monkeypatch.setattr("hfship.ops.http_request.MOST_FIELDS", 2)
    assert chunked(b"1\r\nx\r\n" * 2 + b"0\r\n\r\n") == b"xx"
    assert chunked(b"0\r\nA: b\r\n\r\n") == b""
    for body, status in (
        (b"1\r\nx\r\n" * 3 + b"0\r\n\r\n", 413),
        (b"0\r\nA: b\r\nC: d\r\n\r\n", 431),
        (b"0\r\nnone\r\n\r\n", 400),
        (b"1\r\nxy\r\n", 400),
    ):
        with pytest.raises(BadRequest) as refused:
            chunked(body)
        assert refused.value.status == status


def test_a_line_of_a_chunk_is_short() -> None:
    fits = b"1;" + b"x" * (_CHUNK_LINE - 4) + b"\r\n"
    assert len(fits) == _CHUNK_LINE and chunked(fits + b"y\r\n0\r\n\r\n") == b"y"
    with pytest.raises(BadRequest, match="too long"):
        chunked(b"1;" + b"x" * (_CHUNK_LINE - 3) + b"\r\ny\r\n0\r\n\r\n")
