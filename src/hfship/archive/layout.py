# SPDX-License-Identifier: Apache-2.0
"""The tar stream of a model, known to the byte before its first file is read. Pure.

Owns what is in the stream and where; docs/formats.md says the same in full.

  tar stream = for each member: header, content, zeros up to a multiple of 512; then 1024 zeros

Members: NAME/.hfship/manifest.json; NAME/.hfship/restore.py if there are planes;
NAME/.hfship/delta.json if files are left out; then the files of the manifest in its order, those
below 1 MiB first. All are regular, mode 0644, owner 0, time 0. The header is one ustar block; a
path over 100 bytes or not ASCII, or a size of 8 GiB or more, is in a PAX header before it, its
ustar field then being a placeholder or 0. Thus the leading members imply every byte of the stream
but the files' own.

Delta: delta.json is {"format": "hfship-delta/2", "base": ID, "absent": [PATH, ...]}, the paths
sorted, on one line: files of the manifest that are no members, because the far side has them, and
the version that it was packed since (versions.py). "hfship-delta/1" is the same without base.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from hfship.archive.frames import LARGEST_FRAME
from hfship.archive.restore_script import RESTORE_PYS
from hfship.archive.zstd import ZstdError
from hfship.base.files import WORK_DIR
from hfship.base.manifest import MANIFEST_PATH, parse_manifest
from hfship.base.reading import parse_json

if TYPE_CHECKING:
    from hfship.base.manifest import FileEntry, Manifest

TAR_BLOCK = 512  # bytes; headers and contents fill whole blocks (POSIX ustar)
WEIGHT_SIZE = 1 << 20  # bytes; files from here on have frames of their own
PLANES = ".planes"  # suffix of a weight whose bytes are in planes
RESTORE_PATH = f"{WORK_DIR}/restore.py"
DELTA_PATH = f"{WORK_DIR}/delta.json"
DELTA_FORMAT = "hfship-delta/2"
DELTA_WITHOUT_BASE = "hfship-delta/1"  # as older versions wrote it

# A commit of git, or a SHA-256: versions.py.
_VERSION_ID = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?\Z")
_USTAR_PATH_SIZE = 100  # bytes of a path in a ustar block
_USTAR_SIZES = 8**11  # a size is 11 octal digits
_SIZE_FIELD = re.compile(rb"[0-7]{11}\x00")


# -- segments: the stream from one end to the other


class Segment(NamedTuple):
    """A stretch of the tar stream, `size` bytes from `start` on: bytes `known` beforehand, or the
    whole content of the file `entry`. `planes` bytes of it make a block of planes, 0 for none;
    `what` names it."""

    start: int
    size: int
    what: str
    known: bytes = b""
    entry: Optional[FileEntry] = None
    planes: int = 0

    @property
    def stop(self) -> int:
        """The first byte of the stream behind it."""
        return self.start + self.size

    def file_range(self, start: int, stop: int) -> Tuple[int, int]:
        """First byte and the one behind the last, in the file, of what stream [start, stop) holds.

        >>> weight = Segment(100, (6 << 20) + 3, "w", planes=2 << 20)
        >>> weight.file_range(102 + (4 << 20), 103 + (6 << 20)) == (4 << 20, 6 << 20)
        True
        """
        first = max(start, self.start) - self.start
        last = min(stop, self.stop) - self.start
        if self.planes:
            first = self._without_widths(first)
            last = self._without_widths(last)
        return first, last

    def _without_widths(self, offset: int) -> int:
        """Bytes of a file in the first `offset` bytes of its planes: each block has one more, the
        width of its elements, at its end."""
        blocks, rest = divmod(offset, self.planes + 1)
        in_last_block = max(rest - 1, 0)
        return blocks * self.planes + in_last_block


def index_at(items: Sequence[Any], start: int) -> int:
    """Index of the first of the tuples, sorted by their first field, from `start` on.

    >>> index_at([(0, "a"), (4, "b"), (4, "c"), (9, "d")], 4)
    1
    """
    return bisect_left(items, (start,))


def segments_between(segments: Sequence[Segment], start: int, stop: int) -> Sequence[Segment]:
    """Segments with bytes in stream [start, stop)."""
    # One begins before `start` and may reach into it, unless it is empty or ends there.
    following = index_at(segments, start + 1)
    first = max(following - 1, 0)
    last = index_at(segments, stop)
    return [segment for segment in segments[first:last] if segment.stop > start]


class _StreamBuilder:
    """Puts segments one behind the other."""

    def __init__(self) -> None:
        self.segments: List[Segment] = []
        self._stop = 0

    def add_known(self, what: str, content: bytes) -> None:
        """Bytes that the manifest implies; nothing if there are none."""
        if not content:
            return
        segment = Segment(self._stop, len(content), what, content)
        self._add(segment)

    def add_member(self, path: str, content: bytes) -> None:
        """A member of known content."""
        size = len(content)
        header = tar_header(path, size)
        self.add_known(f"tar header of {path}", header)
        self.add_known(path, content)
        self.add_known(f"padding after {path}", padding(size))

    def add_file(self, path: str, entry: FileEntry, planes: int) -> None:
        """A file of the manifest as a member; a weight in blocks of `planes` bytes."""
        size = entry.size
        if size < WEIGHT_SIZE:
            planes = 0
        if planes:
            path += PLANES
            blocks = -(-size // planes)
            size += blocks  # each has one byte more: the width of its elements

        self.add_known(f"tar header of {path}", tar_header(path, size))
        segment = Segment(self._stop, size, path, entry=entry, planes=planes)
        self._add(segment)
        self.add_known(f"padding after {path}", padding(size))

    def _add(self, segment: Segment) -> None:
        self.segments.append(segment)
        self._stop = segment.stop


def stream_layout(
    manifest: Manifest, text: bytes, restore: bytes = b"", delta: bytes = b""
) -> Tuple[Segment, ...]:
    """The tar stream of a manifest, whose exact bytes are `text`: sorted, gapless.

    `restore` is the text of restore.py, one of RESTORE_PYS, if there are planes; `delta` that of
    delta.json, if files are left out. Raises ValueError for a delta that is none.

    >>> from hfship.base.manifest import FileEntry, make_manifest
    >>> files = [FileEntry("w.bin", 2 << 20, "0" * 64), FileEntry("z", 3, "0" * 64)]
    >>> for s in stream_layout(make_manifest("m", files), b"{}"): print(s.start, s.size, s.what)
    0 512 tar header of m/.hfship/manifest.json
    512 2 m/.hfship/manifest.json
    514 510 padding after m/.hfship/manifest.json
    1024 512 tar header of m/z
    1536 3 m/z
    1539 509 padding after m/z
    2048 512 tar header of m/w.bin
    2560 2097152 m/w.bin
    2099712 1024 end of the tar stream
    """
    builder = _StreamBuilder()
    root = manifest.name
    builder.add_member(f"{root}/{MANIFEST_PATH}", text)
    planes = RESTORE_PYS.get(restore, 0)
    if restore:
        builder.add_member(f"{root}/{RESTORE_PATH}", restore)
    absent: FrozenSet[str] = frozenset()
    if delta:
        absent = parse_delta(delta, manifest).absent
        builder.add_member(f"{root}/{DELTA_PATH}", delta)

    small: List[FileEntry] = []
    weights: List[FileEntry] = []
    for entry in manifest.files:
        if entry.path in absent:
            continue
        if entry.size < WEIGHT_SIZE:
            small.append(entry)
        else:
            weights.append(entry)

    for entry in [*small, *weights]:
        builder.add_file(f"{root}/{entry.path}", entry, planes)

    builder.add_known("end of the tar stream", bytes(2 * TAR_BLOCK))
    return tuple(builder.segments)


# -- tar headers


def tar_header(path: str, size: int) -> bytes:
    """The header of a regular file in a PAX archive.

    >>> long, large = "m/" + "a" * 99, 8 << 30
    >>> [len(tar_header(p, n)) for p, n in (("m/a", 5), (long, 5), ("m/é", 5), ("m/a", large))]
    [512, 1536, 1536, 1536]
    """
    name = path.encode("ascii", "replace")[:_USTAR_PATH_SIZE]
    records = b""
    too_long = len(path.encode("utf-8")) > _USTAR_PATH_SIZE
    if too_long or not path.isascii():
        records += _pax_record("path", path)
    if size >= _USTAR_SIZES:
        records += _pax_record("size", str(size))
        size = 0

    header = _ustar(name, size, b"0")
    if records:
        extended = _ustar(b"././@PaxHeader", len(records), b"x")
        padded = records + padding(len(records))
        header = extended + padded + header

    return header


def _pax_record(key: str, value: str) -> bytes:
    """A PAX record, which starts with its own length in decimal.

    >>> _pax_record("path", "x" * 89)[:7]
    b'98 path'
    >>> len(_pax_record("path", "x" * 89)), len(_pax_record("path", "x" * 90))
    (98, 99)
    """
    body = f" {key}={value}\n".encode()
    length = len(body)
    while True:
        record = str(length).encode() + body
        if len(record) == length:
            return record
        length = len(record)


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    """A ustar block: `kind` is 0 for a regular file, x for a PAX header (POSIX pax, ustar)."""
    fields = (
        (0, name),
        (100, b"0000644"),  # mode
        (108, b"0000000"),  # user
        (116, b"0000000"),  # group
        (124, b"%011o" % size),
        (136, b"%011o" % 0),  # time
        (148, b" " * 8),  # the checksum counts itself as blanks
        (156, kind),
        (257, b"ustar\x0000"),
        (329, b"0000000"),  # device
        (337, b"0000000"),
    )
    block = bytearray(TAR_BLOCK)
    for offset, value in fields:
        block[offset : offset + len(value)] = value

    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """The zeros that fill `size` bytes up to whole tar blocks."""
    return bytes(-size % TAR_BLOCK)


# -- the delta


class Delta(NamedTuple):
    """The files that a delta leaves out, and the id of the version that it was packed since; empty
    where it does not say."""

    absent: FrozenSet[str] = frozenset()
    base: str = ""


def delta_json(absent: Iterable[str], base: str = "") -> bytes:
    """The text of delta.json."""
    fields: Dict[str, Any] = {"format": DELTA_WITHOUT_BASE}
    if base:
        fields = {"format": DELTA_FORMAT, "base": base}
    fields["absent"] = sorted(absent)
    text = json.dumps(fields, ensure_ascii=False)
    return f"{text}\n".encode()


def parse_delta(text: bytes, manifest: Manifest) -> Delta:
    """What a delta leaves out. Raises ValueError unless `text` is what `delta_json` writes for
    files of the manifest."""
    try:
        fields = parse_json(text)
        absent = frozenset(map(str, fields["absent"]))
        base = str(fields.get("base", ""))
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"{DELTA_PATH} is of an unknown kind") from exc

    files = {entry.path for entry in manifest.files}
    if delta_json(absent, base) != text or not absent <= files:
        raise ValueError(f"{DELTA_PATH} is not a list of files of the manifest")
    if base and not _VERSION_ID.match(base):
        raise ValueError(f"{DELTA_PATH} names a version that is none")

    return Delta(absent, base)


# -- the leading members


class Leading(NamedTuple):
    """The members that imply the rest of the stream: the manifest and its exact `text`, the texts
    of restore.py and of delta.json, both empty for none."""

    manifest: Manifest
    text: bytes
    restore: bytes
    delta: bytes

    def parsed_delta(self) -> Delta:
        """What a delta leaves out. Raises ValueError."""
        if not self.delta:
            return Delta()
        return parse_delta(self.delta, self.manifest)


class _Member(NamedTuple):
    """A member of a tar stream; the next one begins at `end`."""

    header: bytes
    content: bytes
    end: int


class _Beginning:
    """The beginning of a stream that comes in pieces, which are taken as they are needed."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._content = bytearray()

    def read(self, size: int) -> bytes:
        """The first `size` bytes; all if there are fewer, or more than LARGEST_FRAME."""
        while len(self._content) < size and len(self._content) <= LARGEST_FRAME:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._content += piece
        return bytes(self._content)


def read_leading(pieces: Iterator[bytes], where: str) -> Leading:
    """The leading members of a stream that comes in pieces; no more of these are taken than needed.

    Raises ValueError, or IntegrityError for a manifest that is not valid; `where` names it. Raises
    what `pieces` raises before the manifest is read.
    """
    stream = _Beginning(pieces)
    first = _member_at(stream, 0)
    manifest = parse_manifest(first.content, where)
    end = first.end

    restore = b""
    member = _read_member(stream, end, f"{manifest.name}/{RESTORE_PATH}")
    if member:
        restore = member.content
        end = member.end
        if restore not in RESTORE_PYS:
            raise ValueError(f"{RESTORE_PATH} is not the one of this format")

    delta = b""
    member = _read_member(stream, end, f"{manifest.name}/{DELTA_PATH}")
    if member:
        delta = member.content

    return Leading(manifest, first.content, restore, delta)


def _read_member(stream: _Beginning, at: int, name: str) -> Optional[_Member]:
    """The member at `at` of the stream, if it is called `name`, else None: also when the stream is
    damaged there, which is found when all of it is checked."""
    try:
        member = _member_at(stream, at)
    except (ValueError, ZstdError):
        return None
    if member.header != tar_header(name, len(member.content)):
        return None
    return member


def _member_at(stream: _Beginning, at: int) -> _Member:
    """The member at `at` of the stream. Raises ValueError if there is none, or too large a one."""
    # A PAX header, its records and a ustar block are four blocks, unless the records are long.
    # No more of the stream than needed is read, as each frame has to be decoded.
    end = at + TAR_BLOCK
    block = stream.read(end)[at:]
    if block[156:157] == b"x":
        end += 3 * TAR_BLOCK
    start, stop = member_extent(stream.read(end), at)
    if stop > LARGEST_FRAME:
        raise ValueError("it has no end")

    beginning = stream.read(stop)
    if len(beginning) < stop:
        raise ValueError("it has no end")

    return _Member(
        header=beginning[at:start],
        content=beginning[start:stop],
        end=stop + len(padding(stop)),
    )


def member_extent(stream: bytes, at: int = 0) -> Tuple[int, int]:
    """Where the content of the member at `at` lies in the stream: first byte, and the one behind
    the last. Raises ValueError if no header of a regular file is there.

    >>> member_extent(tar_header("m/" + "x" * 120, 77))
    (1536, 1613)
    """
    while True:
        block = stream[at : at + TAR_BLOCK]
        kind = block[156:157]
        magic = block[257:262]
        if len(block) < TAR_BLOCK or magic != b"ustar" or kind not in (b"0", b"x"):
            raise ValueError("no tar header of a regular file")

        if not _SIZE_FIELD.match(block, 124):
            raise ValueError("no size in a tar header")
        size = int(block[124:135], 8)
        at += TAR_BLOCK
        if kind == b"0":
            return at, at + size
        at += size + len(padding(size))  # past the records of a PAX header
