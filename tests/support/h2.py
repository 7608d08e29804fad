"""HTTP/2 without TLS, byte by byte: also what no client would send. Headers are literals, so nothing has to be encoded."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Iterator, List, NamedTuple, Sequence, Tuple, Union

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4
MOST = 16384  # bytes of a frame
Text = Union[str, bytes]


class Answer(NamedTuple):
    """What came back: the kinds of its frames, and all data."""

    frames: List[int]
    body: bytes

    @property
    def refused(self) -> bool:
        """Whether the request was no valid one."""
        return HEADERS not in self.frames


def literal(text: Text) -> bytes:
    """A text as HPACK has it, without Huffman (RFC 7541, 5.2)."""
    value = text if isinstance(text, bytes) else text.encode("latin-1")
    if len(value) < 127:
        return bytes([len(value)]) + value
    rest, size = len(value) - 127, b"\x7f"
    while rest >= 128:
        size += bytes([rest % 128 + 128])
        rest //= 128
    return size + bytes([rest]) + value


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame (RFC 9113, 4.1)."""
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )


def frames_of(content: bytes) -> Iterator[Tuple[int, bytes]]:
    """The kind and the payload of each whole frame."""
    while len(content) >= 9:
        size = int.from_bytes(content[:3], "big")
        yield content[3], content[9 : 9 + size]
        content = content[9 + size :]


def ask(
    port: int, headers: Sequence[Tuple[Text, Text]], body: bytes = b"", timeout: float = 5
) -> Answer:
    """Send one request, and read until its stream has ended, or the connection."""
    block = b"".join(b"\0" + literal(name) + literal(value) for name, value in headers)
    end = 0 if body else END_STREAM
    sent = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS | end, 1, block)
    for at in range(0, len(body), MOST):
        end = END_STREAM if at + MOST >= len(body) else 0
        sent += frame(DATA, end, 1, body[at : at + MOST])
    got = b""
    connection = socket.create_connection(("127.0.0.1", port), timeout)
    with connection, contextlib.suppress(OSError):
        connection.sendall(sent)
        while not _has_ended(got):
            piece = connection.recv(65536)
            if not piece:
                break
            got += piece
    found = list(frames_of(got))
    return Answer(
        [kind for kind, _ in found], b"".join(payload for kind, payload in found if kind == DATA)
    )


def _has_ended(content: bytes) -> bool:
    while len(content) >= 9:
        size = int.from_bytes(content[:3], "big")
        if len(content) < 9 + size:
            return False
        kind, flags = content[3], content[4]
        if kind in (RESET, GOAWAY) or (kind in (DATA, HEADERS) and flags & END_STREAM):
            return True
        content = content[9 + size :]
    return False
