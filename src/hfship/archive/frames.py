# SPDX-License-Identifier: Apache-2.0
"""Frames: the archive format.

Owns the pieces an archive is made of: a tar stream, cut into zstd frames that stand alone, and the
tables that find and check them. docs/formats.md says the same in full; all integers are
little-endian.

  archive = unit* check seek-table                 unit = pzstd header + zstd frame

  pzstd header   0  4  0x184D2A50, a skippable frame     (lets `pzstd -d` decode in parallel)
                 4  4  4, its length
                 8  4  bytes of the zstd frame that follows
  zstd frame     RFC 8878, one frame, with content size and content checksum; usually 2 MiB of
                 the tar stream
  check          0  4  0x184D2A55, a skippable frame of ours
                 4  4  its length: 48 + 8 P + 4 U
                 8  8  "hfship/1"
                16  4  U, the number of units
                20  4  P, the number of parts (1 for a whole file)
                24  8P bytes of each part, the tables counted into the last
                 .  4U CRC-32 of each unit, header and frame
                 .  32 SHA-256 of the check frame up to here followed by the whole seek table
  seek table     0  4  0x184D2A5E, Zstandard Seekable Format 0.1.0 without checksums
                 4  4  its length: 8 N + 9
                 8  8N entries (bytes in the archive, bytes of the tar stream); for each unit two,
                       (12, 0) for its header and one for its frame; then (bytes of the check
                       frame, 0). So N = 2 U + 1
                 .  9  N, one byte 0, 0x8F92EAB1

The zstd checksum covers the content only: some bits of a frame can flip and it still decodes to the
same bytes. The CRC-32 covers what lies on the medium, so a flipped bit is found wherever it is.
Parts are the archive cut between units, never inside a table: each is a valid zstd file, and their
concatenation is the archive.

Promises: any byte of the stream is one frame away; damage stays in its frame and is found wherever
it is; equal manifests, options and zstd versions give equal bytes. Never: touches a disk.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from typing import (
    IO,
    Callable,
    Iterable,
    Iterator,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
    overload,
)

from hfship.archive.zstd import declared_size

# Bytes of content that a reader accepts in a frame, and bytes of the tables: bounds its memory
# against hostile ones. These are the tables of 3 million frames.
LARGEST_FRAME = 64 << 20
MOST_PARTS = 100_000

PZSTD_MAGIC = 0x184D2A50
CHECK_MAGIC = 0x184D2A55
CHECK_LABEL = b"hfship/1"
TABLE_MAGIC = 0x184D2A5E
TABLE_END = 0x8F92EAB1

PZSTD_HEADER = struct.Struct("<III")  # magic, 4, bytes of the zstd frame
SKIPPABLE_HEADER = struct.Struct("<II")  # magic, bytes that follow
CHECK_HEADER = struct.Struct("<8sII")  # label, units, parts
TABLE_ENTRY = struct.Struct("<II")  # bytes in the archive, bytes of the tar stream
TABLE_FOOTER = struct.Struct("<IBI")  # entries, 0, TABLE_END
_SHA256_SIZE = 32

# Of a unit, all that tells its size: pzstd header, and the longest header of a zstd frame.
UNIT_HEAD_SIZE = PZSTD_HEADER.size + 18
# Of an archive, all that tells the size of its tables: the last entry and the footer.
TAIL_END_SIZE = TABLE_ENTRY.size + TABLE_FOOTER.size

Buffer = Union[bytes, bytearray, memoryview]
Compress = Callable[[Union[bytes, memoryview]], bytes]
Decompress = Callable[[Union[bytes, memoryview], int], bytes]


class Frame(NamedTuple):
    """Where one unit lies: `offset` and `size` in the archive, `start` and `length` in the tar
    stream, all in bytes; `crc` is the CRC-32 of the unit, if known."""

    offset: int
    size: int
    start: int
    length: int
    crc: Optional[int] = None

    @property
    def stop(self) -> int:
        """The first byte of the stream behind it."""
        return self.start + self.length


class Frames(Sequence[Frame]):
    """Frames that lie one after the other, at 24 bytes each: a model of a terabyte has a quarter of
    a million. `edges` are where in the stream they begin, and where the last one ends."""

    def __init__(self, rows: Iterable[Tuple[int, int, Optional[int]]] = ()) -> None:
        """`rows` are the arguments of `append`."""
        self._offsets = array("Q", [0])
        self.edges = array("Q", [0])
        self._crcs = array("q")
        for size, length, crc in rows:
            self.append(size, length, crc)

    def append(self, size: int, length: int, crc: Optional[int] = None) -> None:
        """The next frame: `length` bytes of the stream in a unit of `size`.

        Raises ValueError for sizes that no frame of ours can have.
        """
        if not 0 < length <= LARGEST_FRAME or size > largest_unit(length):
            raise ValueError(f"a frame of {length} bytes in {size} is out of bounds")

        offset = self._offsets[-1] + size
        self._offsets.append(offset)
        edge = self.edges[-1] + length
        self.edges.append(edge)
        self._crcs.append(-1 if crc is None else crc)

    @property
    def size(self) -> int:
        """Bytes of all units."""
        return self._offsets[-1] - self._offsets[0]

    def __len__(self) -> int:
        return len(self._crcs)

    @overload
    def __getitem__(self, key: int) -> Frame: ...
    @overload
    def __getitem__(self, key: slice) -> Frames: ...
    def __getitem__(self, key: Union[int, slice]) -> Union[Frame, Frames]:
        """A frame; or those from one to another, which keep their places in the archive."""
        if isinstance(key, slice):
            first, last, step = key.indices(len(self))
            assert step == 1 and first <= last, "they lie one after the other"
            return self._between(first, last)

        number = range(len(self))[key]
        offset = self._offsets[number]
        start = self.edges[number]
        crc = self._crcs[number]
        return Frame(
            offset,
            self._offsets[number + 1] - offset,
            start,
            self.edges[number + 1] - start,
            None if crc < 0 else crc,
        )

    def _between(self, first: int, last: int) -> Frames:
        frames = Frames()
        frames._offsets = self._offsets[first : last + 1]
        frames.edges = self.edges[first : last + 1]
        frames._crcs = self._crcs[first:last]
        return frames

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Frames):
            return NotImplemented
        return vars(self) == vars(other)


# -- units


def unit_header(frame_size: int) -> bytes:
    """The pzstd header of a zstd frame."""
    return PZSTD_HEADER.pack(PZSTD_MAGIC, 4, frame_size)


def encode_unit(content: Union[bytes, memoryview], compress: Compress) -> bytes:
    """One unit: pzstd header and frame."""
    frame = compress(content)
    return unit_header(len(frame)) + frame


def frame_in(unit: bytes) -> memoryview:
    """The zstd frame in a unit."""
    return memoryview(unit)[PZSTD_HEADER.size :]


def largest_unit(length: int) -> int:
    """An upper bound for the unit of `length` bytes of content (ZSTD_compressBound and more)."""
    growth = (length >> 8) + 128
    return PZSTD_HEADER.size + length + growth


def unit_at(head: bytes) -> Tuple[int, int]:
    """(bytes of the unit, bytes of its content) from the first UNIT_HEAD_SIZE bytes of a unit:
    finds frames when the table is lost.

    Raises ValueError when no unit of ours begins there.

    >>> unit_at(unit_header(99) + bytes.fromhex("28b52ffd 24 05"))
    (111, 5)
    """
    if len(head) < PZSTD_HEADER.size:
        raise ValueError("the archive ends here")

    magic, four, frame_size = PZSTD_HEADER.unpack_from(head)
    frame = head[PZSTD_HEADER.size :]
    length = declared_size(frame)
    if magic != PZSTD_MAGIC or four != 4 or length is None:
        raise ValueError("no frame begins here")

    return PZSTD_HEADER.size + frame_size, length


def read_units(stream: IO[bytes]) -> Iterator[Tuple[bytes, int]]:
    """The units of an archive that comes as a stream, each with the bytes of its content; last what
    follows them, with -1: the tables, which are smaller than LARGEST_FRAME.

    Raises ValueError for a unit that is cut or out of bounds.
    """
    magic = unit_header(0)[:4]
    while True:
        head = stream.read(PZSTD_HEADER.size)
        if len(head) < PZSTD_HEADER.size or not head.startswith(magic):
            yield head + stream.read(LARGEST_FRAME), -1
            return

        _, _, frame_size = PZSTD_HEADER.unpack(head)
        frame_size = min(frame_size, largest_unit(LARGEST_FRAME))  # a larger one is refused below
        unit = head + stream.read(frame_size)
        size, length = unit_at(unit[:UNIT_HEAD_SIZE])
        if len(unit) != size or not 0 < length <= LARGEST_FRAME:
            raise ValueError(f"a frame of {length} bytes in {size} is cut or out of bounds")
        yield unit, length


# -- the tables


class Index(NamedTuple):
    """What check frame and seek table say: all frames in order, and the bytes of each part."""

    frames: Frames
    part_sizes: Tuple[int, ...]


def _check_size(units: int, parts: int) -> int:
    headers = SKIPPABLE_HEADER.size + CHECK_HEADER.size
    part_sizes = 8 * parts
    crcs = 4 * units
    return headers + part_sizes + crcs + _SHA256_SIZE


def _table_size(entries: int) -> int:
    fixed = SKIPPABLE_HEADER.size + TABLE_FOOTER.size
    return fixed + TABLE_ENTRY.size * entries


def tail_size(units: int, parts: int) -> int:
    """Bytes of check frame and seek table."""
    entries = 2 * units + 1
    return _check_size(units, parts) + _table_size(entries)


def announced_tail_size(beginning: bytes) -> Optional[int]:
    """Bytes of check frame and seek table, from the first bytes of the check frame; None when these
    are no check frame, or too few.

    >>> announced_tail_size(encode_tail(Frames([(30, 10, 7)]), [30])[:24]) == tail_size(1, 1)
    True
    """
    if len(beginning) < SKIPPABLE_HEADER.size + CHECK_HEADER.size:
        return None

    label, units, parts = CHECK_HEADER.unpack_from(beginning, SKIPPABLE_HEADER.size)
    if label != CHECK_LABEL:
        return None
    return tail_size(units, parts)


def encode_tail(frames: Sequence[Frame], part_sizes: Sequence[int]) -> bytes:
    """Check frame and seek table. `part_sizes` do not yet count them."""
    units = len(frames)
    size = tail_size(units, len(part_sizes))
    sizes = [*part_sizes[:-1], part_sizes[-1] + size]
    check = _encode_check(frames, sizes)

    check_size = len(check) + _SHA256_SIZE
    table = bytearray(_skippable_header(TABLE_MAGIC, size - check_size))
    header_entry = TABLE_ENTRY.pack(PZSTD_HEADER.size, 0)
    for frame in frames:
        table += header_entry
        table += TABLE_ENTRY.pack(frame.size - PZSTD_HEADER.size, frame.length)

    table += TABLE_ENTRY.pack(check_size, 0)
    table += _table_footer(units)

    digest = hashlib.sha256(check + table).digest()
    return check + digest + table


def _encode_check(frames: Sequence[Frame], part_sizes: Sequence[int]) -> bytes:
    """The check frame without its SHA-256."""
    units, parts = len(frames), len(part_sizes)
    crcs = [frame.crc or 0 for frame in frames]
    return (
        _skippable_header(CHECK_MAGIC, _check_size(units, parts))
        + CHECK_HEADER.pack(CHECK_LABEL, units, parts)
        + struct.pack(f"<{parts}Q", *part_sizes)
        + struct.pack(f"<{units}I", *crcs)
    )


def _skippable_header(magic: int, size: int) -> bytes:
    """The header of a skippable frame of `size` bytes, the header counted."""
    length = size - SKIPPABLE_HEADER.size
    return SKIPPABLE_HEADER.pack(magic, length)


def _table_footer(units: int) -> bytes:
    entries = 2 * units + 1
    return TABLE_FOOTER.pack(entries, 0, TABLE_END)


def tail_extent(end: bytes) -> Tuple[int, int]:
    """(bytes of check frame and seek table, bytes of the seek table alone) from the last
    TAIL_END_SIZE bytes of an archive.

    Raises ValueError when they do not end a seek table that we could have written.
    """
    if len(end) < TAIL_END_SIZE:
        raise ValueError("too short")

    last_entry = end[-TAIL_END_SIZE : -TABLE_FOOTER.size]
    footer = end[-TABLE_FOOTER.size :]
    check_size, zero = TABLE_ENTRY.unpack(last_entry)
    entries, descriptor, magic = TABLE_FOOTER.unpack(footer)
    if magic != TABLE_END or descriptor or zero or not entries % 2:
        raise ValueError("no seek table at the end")

    table_size = _table_size(entries)
    return check_size + table_size, table_size


def decode_tail(tail: bytes) -> Index:
    """The index in check frame and seek table.

    Raises ValueError, or struct.error, for anything that `encode_tail` does not write.
    """
    check, table = _proven_tables(tail)
    label, units, parts = CHECK_HEADER.unpack_from(check, SKIPPABLE_HEADER.size)
    if label != CHECK_LABEL or len(tail) != tail_size(units, parts):
        raise ValueError(f"tables of an unknown kind {label!r}")
    if parts > MOST_PARTS:
        raise ValueError(f"{parts} parts")

    _require_headers(check, table, units)

    at = SKIPPABLE_HEADER.size + CHECK_HEADER.size
    part_sizes = struct.unpack_from(f"<{parts}Q", check, at)
    at += 8 * parts
    crcs = struct.unpack_from(f"<{units}I", check, at)

    frames = Frames()
    rows = table[SKIPPABLE_HEADER.size : -TABLE_FOOTER.size]
    entries = TABLE_ENTRY.iter_unpack(rows)
    # Two entries for each unit; the one of the check frame is left over.
    for header, (frame_size, length), crc in zip(entries, entries, crcs):
        if header != (PZSTD_HEADER.size, 0):
            raise ValueError("an entry of the seek table is wrong")
        frames.append(PZSTD_HEADER.size + frame_size, length, crc)

    if sum(part_sizes) != frames.size + len(tail):
        raise ValueError("the parts do not add up to the archive")

    return Index(frames, part_sizes)


def _proven_tables(tail: bytes) -> Tuple[bytes, bytes]:
    """(check frame, seek table), whose SHA-256 is right. Raises ValueError."""
    size, table_size = tail_extent(tail[-TAIL_END_SIZE:])
    check = tail[:-table_size]
    table = tail[-table_size:]
    proven = check[:-_SHA256_SIZE] + table
    digest = check[-_SHA256_SIZE:]
    if len(tail) != size or hashlib.sha256(proven).digest() != digest:
        raise ValueError("the SHA-256 of the tables is wrong")

    return check, table


def _require_headers(check: bytes, table: bytes, units: int) -> None:
    """Refuse tables whose headers and end are not right: other programs find and skip them by
    these. Raises ValueError."""
    if not check.startswith(_skippable_header(CHECK_MAGIC, len(check))):
        raise ValueError("the header of the check frame is wrong")
    if not table.startswith(_skippable_header(TABLE_MAGIC, len(table))):
        raise ValueError("the header of the seek table is wrong")
    last_entry = TABLE_ENTRY.pack(len(check), 0)
    if not table.endswith(last_entry + _table_footer(units)):
        raise ValueError("the end of the seek table is wrong")
