# SPDX-License-Identifier: Apache-2.0
"""Archives of other programs as streams: the content of zstd and gzip, the members of a tar stream.

Owns the care that such archives need: they carry no sums, come from anywhere, and may be made to do
harm. Promises: memory stays bounded; what is neither a file nor a folder is refused. Never: writes.
"""

from __future__ import annotations

import re
import zlib
from typing import IO, TYPE_CHECKING, Callable, Dict, Iterator, List, NamedTuple, Optional

from hfship.archive.layout import TAR_BLOCK
from hfship.archive.streams import read_exactly, read_pieces
from hfship.archive.zstd import ZSTD_MAGIC, load_zstd, parse_descriptor
from hfship.base.content import LONGEST_PATH
from hfship.base.files import CHUNK

if TYPE_CHECKING:
    import tarfile

# Content may have so many times the bytes that came, beyond an allowance that harms nobody.
BOMB_RATIO = 100
BOMB_ALLOWANCE = 1 << 30

LARGEST_HEADER = 1 << 20  # bytes of a name or PAX header
MOST_HEADERS = 8  # in front of one member
MOST_RECORDS = 1000  # in a PAX header
MOST_MEMBERS = 200_000  # of a tar stream
LARGEST_SIZE = 1 << 63  # bytes of a member
LARGEST_SKIPPED = 64 << 20  # bytes of a skippable frame, or of zeros that fill up an archive
BLOCKS_AT_ONCE = 32  # of zstd, at most 128 KiB of content each

# Kinds of tar members (POSIX ustar, GNU tar), and what is said of those that are refused.
_FILE = b"0"
_OLD_FILE = b"\0"
_FOLDER = b"5"
_SPARSE_FILE = b"S"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    _SPARSE_FILE: "a sparse file",
}
_SPARSE = "GNU.sparse"  # beginning of keys in PAX headers
_PAX_LENGTH = re.compile(rb"([0-9]{1,7}) ")
# Headers that tell more of the member behind them: PAX, and GNU's long names.
_EXTENDED_HEADERS = (b"x", b"g", b"L", b"K")


# -- zstd


class ZstdContent:
    """The content of zstd frames that any program made (RFC 8878), one after the other, in pieces.

    The frames are taken apart into their blocks of at most 128 KiB here: so no library is trusted
    with a cut, and none can be made to give more than a few MiB at a time. `unchecked` counts
    frames without checksum.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._zstd = load_zstd()
        self._came = 0  # bytes of frames
        self._grown = 0  # bytes of their content
        self.unchecked = 0

    def __iter__(self) -> Iterator[bytes]:
        """Raises EOFError for what is cut, ValueError for what is damaged or grows without end."""
        while True:
            magic = self._stream.read(4)
            if not magic:
                return
            if len(magic) < 4:
                raise EOFError("it ends too early")

            if _is_skippable(magic):
                size = int.from_bytes(self._take(4), "little")
                if size > LARGEST_SKIPPED:
                    raise ValueError(f"a skippable frame has {size} bytes")
                for _ in read_pieces(self._stream, size):
                    pass
            elif magic == ZSTD_MAGIC:
                yield from self._frame()
            else:
                raise ValueError(f"no zstd frame begins with {magic.hex()}")

    def _take(self, size: int) -> bytes:
        self._came += size
        return read_exactly(self._stream, size)

    def _frame(self) -> Iterator[bytes]:
        """The content of one frame, of which the magic number is read."""
        first = self._take(1)
        descriptor = parse_descriptor(first[0])
        if not descriptor.checksum:
            self.unchecked += 1
        decode = self._zstd.piecewise()

        pieces = [ZSTD_MAGIC, first, self._take(descriptor.fields)]
        blocks = 0
        last = False
        while not last:
            header = self._take(3)
            last = bool(header[0] & 1)
            pieces += [header, self._take(_block_size(header))]
            blocks += 1
            if last:
                pieces.append(self._take(descriptor.checksum))
            if last or blocks == BLOCKS_AT_ONCE:
                yield self._decoded(decode, pieces)
                pieces = []
                blocks = 0

    def _decoded(self, decode: Callable[[bytes], bytes], pieces: List[bytes]) -> bytes:
        try:
            content = decode(b"".join(pieces))
        except self._zstd.errors as exc:
            raise ValueError(f"a zstd frame is damaged: {exc}") from exc

        self._grown += len(content)
        _require_no_bomb(self._came, self._grown)
        return content


def _require_no_bomb(came: int, grown: int) -> None:
    """Raise ValueError for more content than `came` bytes can honestly have."""
    if grown > BOMB_ALLOWANCE + BOMB_RATIO * came:
        raise ValueError(f"it grows more than {BOMB_RATIO} times: a bomb")


def _is_skippable(magic: bytes) -> bool:
    """Whether a skippable frame begins so: 0x184D2A50 to 0x184D2A5F (RFC 8878 §3.1.2)."""
    number = int.from_bytes(magic, "little")
    return 0x184D2A50 <= number <= 0x184D2A5F


def _block_size(header: bytes) -> int:
    """Bytes of a block behind its header of 3 bytes (RFC 8878 §3.1.1.2): a bit for the last one,
    two for its kind, the rest for its size.

    >>> _block_size(bytes([0b101, 2, 0])), _block_size(bytes([0b11, 2, 0]))
    (64, 1)
    """
    kind = header[0] >> 1 & 3
    if kind == 1:  # one byte that is repeated
        return 1
    return int.from_bytes(header, "little") >> 3


# -- gzip


def gzip_content(stream: IO[bytes]) -> Iterator[bytes]:
    """The content of the members of a gzip file (RFC 1952), one after the other, in pieces.

    Raises EOFError for what is cut, zlib.error for what is damaged, ValueError for what grows
    without end.
    """
    came = grown = 0
    left = stream.read(CHUNK)
    while left:
        decode = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        while not decode.eof:
            left = left or read_exactly(stream, 1) + stream.read(CHUNK)
            piece = decode.decompress(left, CHUNK)
            came += len(left) - len(decode.unconsumed_tail)
            grown += len(piece)
            _require_no_bomb(came, grown)
            yield piece
            left = decode.unconsumed_tail
        left = _behind_zeros(stream, decode.unused_data)


def _behind_zeros(stream: IO[bytes], left: bytes) -> bytes:
    """What follows the zeros that fill up a file behind a gzip member; `left` is read already."""
    skipped = 0
    while skipped <= LARGEST_SKIPPED:
        skipped += len(left)
        left = left.lstrip(b"\0")
        if left:
            return left
        left = stream.read(CHUNK)
        if not left:
            return b""
    raise ValueError("it has no end: only zeros follow")


# -- tar


class TarMember(NamedTuple):
    """A file, or a `folder`, in a tar stream; `size` in bytes."""

    path: str
    size: int
    folder: bool


def tar_members(stream: IO[bytes]) -> Iterator[TarMember]:
    """The members of a tar stream: ustar, PAX or GNU. The caller reads the content of one from the
    stream before it asks for the next.

    Raises EOFError for what is cut, ValueError for what is damaged, and for what is neither a
    regular file nor a folder.
    """
    for _ in range(MOST_MEMBERS):
        member = _next_member(stream)
        if member is None:
            return
        yield member
        read_exactly(stream, -member.size % TAR_BLOCK)

    raise ValueError(f"it has more than {MOST_MEMBERS} files and folders")


def _next_member(stream: IO[bytes]) -> Optional[TarMember]:
    """The member that begins here, of which the headers are read; None at the end of the stream."""
    fields: Dict[str, str] = {}  # told of the member by headers before its own
    for _ in range(MOST_HEADERS):
        block = read_exactly(stream, TAR_BLOCK)
        if not any(block):
            return None
        header = _parsed_header(block)
        if header.type not in _EXTENDED_HEADERS:
            return _member_of(header, fields)
        fields.update(_extended_fields(stream, header))
        read_exactly(stream, -header.size % TAR_BLOCK)

    raise ValueError(f"more than {MOST_HEADERS} headers in a row tell of one file")


def _parsed_header(block: bytes) -> tarfile.TarInfo:
    """The header in a tar block. Raises ValueError."""
    import tarfile  # not with the others: most commands need none

    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, UnicodeDecodeError) as exc:
        raise ValueError(f"a tar header is damaged, or its name not UTF-8: {exc}") from exc


def _extended_fields(stream: IO[bytes], header: tarfile.TarInfo) -> Dict[str, str]:
    """What an extended header tells of the next member. Raises ValueError."""
    if not 0 <= header.size <= LARGEST_HEADER:
        raise ValueError(f"a tar header has {header.size} bytes")

    text = read_exactly(stream, header.size)
    if header.type in (b"x", b"g"):
        return _pax_records(text)
    if header.type == b"L":
        return {"path": _utf8(text.rstrip(b"\0"))}

    return {}  # where a link leads to, which is refused later


def _member_of(header: tarfile.TarInfo, fields: Dict[str, str]) -> TarMember:
    """The member of a header and of the extended ones before it. Raises ValueError for what is
    refused."""
    path = fields.get("path", header.name)
    if len(path) > LONGEST_PATH:
        raise ValueError(f"a path has {len(path)} characters")

    kind = header.type
    if _SPARSE in fields:
        kind = _SPARSE_FILE
    if kind not in (_FILE, _OLD_FILE, _FOLDER):
        what = _REFUSED.get(kind, "of an unknown kind")
        raise ValueError(f"{path!r} is {what}")

    size = header.size
    if "size" in fields:
        size = _size_of(fields["size"])
    if not 0 <= size < LARGEST_SIZE:
        raise ValueError(f"{path!r} has a size that no file can have")

    folder = kind == _FOLDER or path.endswith("/")
    return TarMember(path, size, folder)


def _utf8(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ValueError(f"the name {name!r} is not UTF-8") from exc


def _size_of(digits: str) -> int:
    """The size in a PAX record, decimal; -1 for what is none."""
    if re.match(r"[0-9]{1,20}\Z", digits, re.ASCII):
        return int(digits)
    return -1


def _pax_records(text: bytes) -> Dict[str, str]:
    """What a PAX header says: lines of their own length, a blank, KEY=VALUE. Of these only `path`
    and `size` matter, and whether it is of a sparse file. Raises ValueError.

    >>> _pax_records(b"14 path=a/b/c\\n12 mtime=17\\n")
    {'path': 'a/b/c'}
    """
    records: Dict[str, str] = {}
    at = 0
    for _ in range(MOST_RECORDS):
        if at == len(text):
            return records
        prefix = _PAX_LENGTH.match(text, at)
        if prefix is None:
            raise ValueError("a PAX header is damaged")
        end = at + int(prefix[1])
        key, equals, value = text[prefix.end() : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(text):
            raise ValueError("a PAX header is damaged")

        if key in (b"path", b"size"):
            records[_utf8(key)] = _utf8(value[:-1])
        elif key.startswith(b"GNU.sparse"):
            records[_SPARSE] = ""
        at = end

    raise ValueError(f"a PAX header has more than {MOST_RECORDS} records")
