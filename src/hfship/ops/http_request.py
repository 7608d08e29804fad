# SPDX-License-Identifier: Apache-2.0
"""What a client of the mirror asks: requests of HTTP/1.1, read by the letter.

Owns what RFC 9112 says of a request: its head, where its body ends, and what comes next on the
same connection; of RFC 9110 the ranges. A proxy in front of the mirror may send the requests of
many clients over one connection: whatever the two could read differently (two lengths, a length
and chunks, a bare line feed, a folded field, a space before a colon, a body where none belongs)
would let one client put words into the mouth of the next. So all of it is refused.

Promises: BadRequest for everything that is not a request, and for nothing that is one; no more
memory than HEAD_SIZE and the body that was allowed. Never: touches a socket or a disk.
"""

from __future__ import annotations

import re
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from hfship.base.values import dataclass, replace

HEAD_SIZE = 16 << 10  # bytes of a request line and its fields; nginx takes 8 KiB of each
TARGET_SIZE = 8 << 10  # bytes of the address in it
MOST_FIELDS = 100
_CHUNK_LINE = 256  # bytes of the line before a chunk, with its extensions
_MOST_CHUNKS = 4096  # of a body; of chunks of a byte each a megabyte would take seconds
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_WITHOUT_BODY = ("GET", "HEAD")
# Said once or not at all: of two nobody knows which one a proxy went by.
_ONCE = (
    "host",
    "content-length",
    "transfer-encoding",
    "authorization",
    "content-type",
    "range",
    "if-range",
    "expect",
)

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rf"({_TOKEN}):[ \t]*(.*?)[ \t]*", re.DOTALL)
# A line ends with CR LF, and neither stands alone (RFC 9112, section 2.2); other control characters
# may be in values (RFC 9110, section 5.5).
_NOT_IN_A_HEAD = re.compile(rb"\x00|\r[^\n]|(?<!\r)\n")
_ABSOLUTE_FORM = re.compile(r"https?://([^/?#]*)([/?].*)?", re.IGNORECASE)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(:[0-9]{0,5})?", re.ASCII)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")


class BadRequest(Exception):
    """A request that is answered with an error, after which its connection is closed."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


class Fields:
    """The header fields of a request, found whatever the case of their names."""

    def __init__(self, lines: Mapping[str, Tuple[str, str]]) -> None:
        self._lines = lines  # by name in lower case: the name as it was sent, and its value

    def get(self, name: str, otherwise: str = "") -> str:
        """The value of a field; of a repeated one all, with commas, as RFC 9110 joins them."""
        _, value = self._lines.get(name.lower(), ("", otherwise))
        return value

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._lines

    def __getitem__(self, name: str) -> str:
        _, value = self._lines[name.lower()]
        return value

    def without(self, name: str) -> Fields:
        """The same fields but one."""
        rest = {key: line for key, line in self._lines.items() if key != name.lower()}
        return Fields(rest)

    def as_sent(self) -> Dict[str, str]:
        """The values by the names that were sent."""
        return dict(self._lines.values())


@dataclass(frozen=True)
class Request:
    """The head of a request. `host` is the one that it is for, "" where it does not say."""

    method: str
    path: str  # still quoted
    query: str
    minor: int  # of its version, HTTP/1.minor
    host: str
    fields: Fields

    @property
    def line(self) -> str:
        """As it is written in a log."""
        target = self.path
        if self.query:
            target += f"?{self.query}"
        return f"{self.method} {target} HTTP/1.{self.minor}"

    @property
    def body_length(self) -> int:
        """Bytes of the body, if it is not in chunks."""
        return int(self.fields.get("Content-Length", "0"))

    @property
    def is_chunked(self) -> bool:
        """Does the body come in chunks, each with its length?"""
        return "Transfer-Encoding" in self.fields

    @property
    def has_body(self) -> bool:
        """Does something follow that is not the next request?"""
        return self.is_chunked or self.body_length > 0

    @property
    def is_last(self) -> bool:
        """Does the client want no more answers on this connection?"""
        options = self.fields.get("Connection").lower().split(",")
        return self.minor == 0 or "close" in [option.strip() for option in options]

    def without_field(self, name: str) -> Request:
        """The same request without one of its fields."""
        return replace(self, fields=self.fields.without(name))


def parse_head(head: bytes) -> Request:
    r"""The head of a request, as `head_end` found it: all up to the empty line. Raises BadRequest.

    >>> request = parse_head(b"GET /a%20b?x=1 HTTP/1.1\r\nHost: mirror:8090\r\n\r\n")
    >>> request.method, request.path, request.query, request.host
    ('GET', '/a%20b', 'x=1', 'mirror:8090')
    """
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, minor = _parse_request_line(first)
    fields = _parse_fields(lines)
    if minor and "Host" not in fields:
        raise BadRequest(400, "the Host is missing")

    host = fields.get("Host")
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute:  # RFC 9112, section 3.2.2: then that counts
        host = absolute[1]
        target = _origin_form(absolute[2] or "")
    if not _HOST.fullmatch(host) or not _HOST.fullmatch(fields.get("Host")):
        raise BadRequest(400, "the Host is none")
    if not target.startswith("/") or "#" in target:
        raise BadRequest(400, "the address is none")

    path, _, query = target.partition("?")
    _require_clear_end(method, minor, fields)
    return Request(method, path, query, minor, host, fields)


def _parse_request_line(line: str) -> Tuple[str, str, int]:
    """Method, target, and minor version."""
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadRequest(400, "this is no request of HTTP/1.1")

    method, target, major, minor = match.groups()
    if major != "1":
        raise BadRequest(505, "this server speaks HTTP/1.1")
    if method not in _METHODS:
        raise BadRequest(501, f"there is no {method[:20]} here")
    if len(target) > TARGET_SIZE:
        raise BadRequest(414, "the address is too long")

    return method, target, int(minor)


def _origin_form(rest: str) -> str:
    """The target of a request in absolute form, without its host."""
    if rest.startswith("/"):
        return rest
    return f"/{rest}"


def _parse_fields(lines: List[str]) -> Fields:
    if len(lines) > MOST_FIELDS:
        raise BadRequest(431, f"there are more than {MOST_FIELDS} fields")

    found: Dict[str, Tuple[str, str]] = {}
    for line in lines:
        match = _FIELD.fullmatch(line)
        if not match:  # a folded line, too, which begins with a blank
            raise BadRequest(400, "a field is none")

        name, value = match.groups()
        key = name.lower()
        if key in found:
            if key in _ONCE:
                raise BadRequest(400, f"there are two fields {name[:40]}")
            _, before = found[key]
            value = f"{before}, {value}"
        found[key] = (name, value)

    return Fields(found)


def _require_clear_end(method: str, minor: int, fields: Fields) -> None:
    """Raise BadRequest unless it is clear where a request ends: RFC 9112, section 6.3."""
    length = fields.get("Content-Length", "0")
    if "Transfer-Encoding" in fields:
        _require_chunks(minor, fields)
    if not re.fullmatch("[0-9]+", length):
        raise BadRequest(400, "the Content-Length is none")
    if len(length) > 15:
        raise BadRequest(413, "the body is too large")

    has_body = "Transfer-Encoding" in fields or int(length) > 0
    if has_body and method in _WITHOUT_BODY:
        raise BadRequest(400, f"a {method} has no body here")


def _require_chunks(minor: int, fields: Fields) -> None:
    coding = fields["Transfer-Encoding"].lower()
    if "Content-Length" in fields:
        raise BadRequest(400, "there are a Content-Length and a Transfer-Encoding")
    if minor == 0:
        raise BadRequest(400, "HTTP/1.0 has no Transfer-Encoding")
    if coding == "chunked":
        return
    if re.search(r",[ \t]*chunked$", coding):
        raise BadRequest(501, "of the transfer codings there is chunked alone here")
    raise BadRequest(400, "the last transfer coding is not chunked")


def head_end(received: bytes, seen: int) -> int:
    r"""Where the head ends that `received` begins with, -1 while more must come.

    The first `seen` bytes were looked at before. Raises BadRequest for what is in no head, as soon
    as it is there: who speaks TLS or ssh, or ends lines with a line feed, would wait for an answer
    that waits for more.

    >>> head_end(b"GET / HTTP/1.1\r\n\r\nnext", 0), head_end(b"GET / HTTP/1.1\r", 0)
    (18, -1)
    """
    end = received.find(b"\r\n\r\n", max(0, seen - 3))
    stop = len(received)
    if end >= 0:
        end += 4
        stop = end

    line_end = received.find(b"\r\n", max(0, seen - 1), stop)
    if line_end >= 0 and b"\r\n" not in received[:seen]:
        _parse_request_line(received[:line_end].decode("latin-1"))
    if _NOT_IN_A_HEAD.search(received, max(0, seen - 1), stop):
        raise BadRequest(400, "this is no request of HTTP/1.1")
    if stop <= HEAD_SIZE and (end >= 0 or stop < HEAD_SIZE):
        return end
    if received.find(b"\r\n", 0, TARGET_SIZE) < 0:
        raise BadRequest(414, "the address is too long")
    raise BadRequest(431, f"the fields are more than {HEAD_SIZE} bytes")


def chunk_size(line: bytes) -> int:
    """Bytes of the chunk that a line is before. Raises BadRequest.

    >>> chunk_size(b"1f"), chunk_size(b"0;name=value")
    (31, 0)
    """
    match = _CHUNK_SIZE.fullmatch(line)
    if not match:
        raise BadRequest(400, "a chunk is none")
    return int(match[1], 16)


class RequestReader:
    """Requests from a stream of bytes, one after the other.

    `receive` gives the next bytes of the stream, at most so many, b"" at its end; what it raises
    passes through.
    """

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self._receive = receive
        self._buffer = b""

    @property
    def has_more(self) -> bool:
        """Has something of the next request come already?"""
        return bool(self._buffer)

    def head(self) -> Optional[Request]:
        """The next request; None when no more comes. Its body must be read before the next one.

        Raises BadRequest.
        """
        seen = 0
        while True:
            while self._buffer.startswith(b"\r\n"):  # RFC 9112, section 2.2
                self._buffer = self._buffer[2:]
                seen = 0
            end = head_end(self._buffer, seen)
            if end >= 0:
                head = self._buffer[:end]
                self._buffer = self._buffer[end:]
                return parse_head(head)
            seen = len(self._buffer)
            if not self._fill(HEAD_SIZE - seen):
                break

        if self._buffer:
            raise BadRequest(400, "the request ends in its middle")
        return None

    def body(self, request: Request, most: int) -> bytes:
        """The body of a request, of at most `most` bytes. Raises BadRequest."""
        if request.is_chunked:
            return b"".join(self._chunks(most))
        if request.body_length > most:
            raise BadRequest(413, f"the body has more than {most} bytes")
        return self._exactly(request.body_length)

    def _chunks(self, most: int) -> Iterator[bytes]:
        left = most
        for _ in range(_MOST_CHUNKS):
            size = chunk_size(self._line(_CHUNK_LINE))
            if size == 0:
                self._read_trailers()
                return
            left -= size
            if left < 0:
                break
            yield self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise BadRequest(400, "a chunk does not end where it says")

        raise BadRequest(413, f"the body has more than {most} bytes, or {_MOST_CHUNKS} chunks")

    def _read_trailers(self) -> None:
        """Read the fields behind the last chunk, which say nothing here."""
        trailers: List[str] = []
        for _ in range(MOST_FIELDS):
            line = self._line(HEAD_SIZE)
            if not line:
                _parse_fields(trailers)
                return
            trailers.append(line.decode("latin-1"))
        raise BadRequest(431, "there are too many trailers")

    def _line(self, most: int) -> bytes:
        """The next line of at most `most` bytes, without its end."""
        while b"\n" not in self._buffer[:most]:
            if len(self._buffer) >= most:
                raise BadRequest(400, "a line is too long")
            self._fill_or_fail(most - len(self._buffer))

        line, _, self._buffer = self._buffer.partition(b"\n")
        if line[-1:] != b"\r" or _NOT_IN_A_HEAD.search(line[:-1] + b"\r\n"):
            raise BadRequest(400, "a line does not end with CR LF")
        return line[:-1]

    def _exactly(self, size: int) -> bytes:
        pieces = [self._buffer[:size]]
        self._buffer = self._buffer[size:]
        left = size - len(pieces[0])
        while left:
            self._fill_or_fail(left)
            pieces.append(self._buffer)
            left -= len(self._buffer)
            self._buffer = b""
        return b"".join(pieces)

    def _fill_or_fail(self, most: int) -> None:
        if not self._fill(most):
            raise BadRequest(400, "the request ends in its middle")

    def _fill(self, most: int) -> bool:
        """Append what comes next; whether something came."""
        received = self._receive(min(most, HEAD_SIZE))
        self._buffer += received
        return bool(received)


def parse_byte_range(header: Optional[str], size: int) -> Optional[Tuple[int, int]]:
    """[start, stop) of a Range header (RFC 9110, section 14.2) for a file of `size` bytes.

    None when the whole file is to be sent: no header, another unit, several ranges. Raises
    ValueError when nothing of the range exists, which is a 416.

    >>> parse_byte_range("bytes=2-4", 10), parse_byte_range("bytes=5-", 10)
    ((2, 5), (5, 10))
    >>> parse_byte_range("bytes=-3", 10), parse_byte_range("bytes=0-1,4-5", 10)
    ((7, 10), None)
    """
    match = re.fullmatch("bytes=([0-9]*)-([0-9]*)", (header or "").replace(" ", ""))
    if not match:
        return None

    first, last = match.groups()
    if not first and not last:
        return None

    stop = size
    if first:
        start = _position(first)
        if last:
            stop = min(size, _position(last) + 1)
    else:
        start = max(0, size - _position(last))  # the last so many bytes

    if start >= stop:
        raise ValueError("range not satisfiable")

    return start, stop


def _position(digits: str) -> int:
    """A position in a file; of more digits than files have bytes, one behind the end of all."""
    if len(digits) > 18:
        return 10**18
    return int(digits)


def asked_number(text: Optional[str], otherwise: int) -> int:
    """The whole number in a query; `otherwise` when it is none.

    >>> [asked_number(text, 7) for text in ("3", None, "\xb2", "-1")]
    [3, 7, 7, 7]
    """
    if text and re.fullmatch("[0-9]{1,15}", text):
        return int(text)
    return otherwise
