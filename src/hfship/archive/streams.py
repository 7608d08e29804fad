# SPDX-License-Identifier: Apache-2.0
"""Byte streams: made of pieces, and read to the byte."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, Iterable, Iterator

from hfship.base.files import CHUNK, disk_errors


class _Pieces(io.RawIOBase):
    """Pieces as an unbuffered stream."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._left = memoryview(b"")  # of the piece at hand

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)

        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size


def stream_of(pieces: Iterable[bytes]) -> io.BufferedReader:
    """Pieces of bytes as one stream, which reads fewer bytes than asked for only at its end.

    >>> stream_of([b"ab", b"", b"cde"]).read(4)
    b'abcd'
    """
    return io.BufferedReader(_Pieces(pieces), CHUNK)


def pieces_of(stream: IO[bytes]) -> Iterator[bytes]:
    """What is left of a stream, in pieces.

    >>> list(pieces_of(stream_of([b"ab", b"cde"])))
    [b'abcde']
    """
    while True:
        piece = stream.read(CHUNK)
        if not piece:
            return
        yield piece


def pieces_of_files(paths: Iterable[Path]) -> Iterator[bytes]:
    """The bytes of the files of an archive, one after the other, in pieces. Raises DiskError."""
    for path in paths:
        with disk_errors("read", path, "check the medium, then copy the archive again"), path.open(
            "rb", buffering=0
        ) as stream:
            yield from pieces_of(stream)


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """The next `size` bytes. Raises EOFError when the stream ends before."""
    found = stream.read(size)
    if len(found) < size:
        raise EOFError("it ends too early")
    return found


def read_pieces(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes in pieces. Raises EOFError when the stream ends before."""
    while size:
        piece = read_exactly(stream, min(size, CHUNK))
        size -= len(piece)
        yield piece
