# SPDX-License-Identifier: Apache-2.0
"""Files in which pickles lie: what torch, joblib and numpy write.

Owns how pickles are found in a file, by its first bytes:

  zip      torch since 1.6 (NAME/data.pkl beside NAME/data/N, which are bare storages), numpy's
           .npz, TorchScript and torch.package, which bring code; zips in zips, to a depth of 3
  tar      torch before 0.1.10: `sys_info`, `pickle`, and `storages` and `tensors`, in which
           pickles and bare numbers take turns
  pickle   five of them, then bare storages, for torch before 1.6; else one after the other
  .npy     a pickle behind its header if the array holds objects
  packed   gzip, zlib, bzip2, xz, lzma, zstd, lz4: cannot be read

Promises: bounded memory and time, as base/pickles.py; two readers of a zip that would see two
different files is a reason not to read it. Never: loads, or unpacks to the disk.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Sequence, cast

from hfship.base.pickles import TORCH_PICKLES, Budget, Found, PickleWalk, Unreadable, found_of
from hfship.base.values import dataclass, field

DEEPEST = 3  # zips in each other
MOST_ENTRIES = 200_000  # of a zip
LARGEST_DIRECTORY = 64 << 20  # bytes of the central directory of a zip
_HEAD = 512  # bytes that tell what a file is; a block of tar
_BLOCK = 512  # bytes of a block of tar
_BUFFER = 1 << 16

_SUFFIXES = """
    .bin .pt .pth .pkl .pickle .pckl .ckpt .joblib .dill .p .th .npy .npz .pdparams .pdopt
    .mar .ptl .jit .torchscript
"""
PICKLE_SUFFIXES = frozenset(_SUFFIXES.split())
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x78\x01": "zlib",
    b"\x78\x5e": "zlib",
    b"\x78\x9c": "zlib",
    b"\x78\xda": "zlib",
}
# What is called .bin or .pt elsewhere.
_NO_PICKLES = (b"GGUF", b"ggml", b"lmgg", b"ggjt", b"tjgg", b"fmgg", b"\x89HDF\r\n", b"ONNX")
ZIP = b"PK\x03\x04"
_NUMPY = b"\x93NUMPY"
_STORAGE = re.compile(r"(?:[^/]+/)?(?:data|constants)/\d+\Z")
_OF_TORCH = re.compile(r"(?:[^/]+/)?(?:data|constants)\.pkl\Z")
_OBJECTS = re.compile(rb"""['"][|<>=]?O\d*['"]""")
# Bytes of an element, by the kind in the name of a storage.
_SIZES = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool"), 1),
    "ComplexDouble": 16,
}


@dataclass
class _Look:
    """What is found of a file so far, and what is left to spend on it."""

    budget: Budget = field(default_factory=Budget)
    imports: Dict[str, None] = field(default_factory=dict)
    problem: str = ""
    pickles: int = 0

    def add(self, found: Found) -> None:
        """Take in what was found of a pickle."""
        self.pickles += 1
        for name in found.imports:
            self.imports[name] = None
        if not self.problem:
            self.problem = found.problem


def is_pickle_head(head: bytes) -> bool:
    """Whether a file that begins so is taken for a pickle, whatever it is called: protocols 2 to 5.

    >>> is_pickle_head(b"\\x80\\x04\\x95"), is_pickle_head(b"\\x80abc")
    (True, False)
    """
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def look_for_pickles(stream: BinaryIO, size: int, suffix: str) -> Optional[Found]:
    """What the pickles in a file of `size` bytes import; None where there are none.

    `suffix` is that of its name (".bin"): without one of PICKLE_SUFFIXES only what begins like a
    pickle or a zip is looked at. Raises OSError.
    """
    look = _Look()
    problem = _problem_of(look, stream, size, suffix)
    look.problem = look.problem or problem
    nothing = not look.pickles and not look.imports
    if nothing and (not problem or (suffix == ".bin" and _is_bare(stream))):
        return None
    return Found(tuple(look.imports), look.problem)


def _problem_of(look: _Look, stream: BinaryIO, size: int, suffix: str) -> str:
    """Look at a file; what keeps it from being read, "" where nothing does. Raises OSError."""
    try:
        _look(look, stream, size, suffix, 0)
    except Unreadable as exc:
        return str(exc)
    except RuntimeError:  # of zipfile
        return "an entry of the zip is encrypted, or packed in a way that is not known here"
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as exc:
        return f"{type(exc).__name__}: {exc}"[:200]
    return ""


def _is_bare(stream: BinaryIO) -> bool:
    """Whether a .bin is bare numbers, as runtimes have them: nothing says that it is a pickle.

    One that breaks off before an import has run nothing until then, whoever loads it.
    """
    stream.seek(0)
    head = stream.read(8)
    if is_pickle_head(head):
        return False
    known = (ZIP, *_PACKED)
    return not head.startswith(known)


def _look(look: _Look, stream: BinaryIO, size: int, suffix: str, depth: int) -> None:
    """Look at a file, or at an entry of a zip. Raises Unreadable, and as zipfile."""
    stream.seek(0)
    head = stream.read(_HEAD)
    stream.seek(0)
    named = suffix in PICKLE_SUFFIXES
    if head.startswith(ZIP):
        _look_at_zip(look, stream, size, depth)
    elif head.startswith(_NUMPY):
        _look_at_array(look, stream, size)
    elif is_pickle_head(head):
        _look_at_stream(look, stream, size)
    elif named:
        _look_at_named(look, stream, size, head)


def _look_at_named(look: _Look, stream: BinaryIO, size: int, head: bytes) -> None:
    """Look at what is called as pickles are, and does not begin as they do today."""
    for magic, program in _PACKED.items():
        if head.startswith(magic):
            raise Unreadable(f"it is compressed ({program})")
    if head.startswith(_NO_PICKLES) or not size:
        return
    if head[257:262] == b"ustar":
        _look_at_tar(look, stream, size)
    else:
        _look_at_stream(look, stream, size)


# -- bare pickles


def _look_at_stream(look: _Look, stream: BinaryIO, size: int) -> None:
    """Look at pickles that follow each other to the end, or to the storages of torch."""
    walk = PickleWalk(stream, size, look.budget)
    count = 0
    try:
        while not walk.at_end() and not (walk.is_torch and count == TORCH_PICKLES):
            walk.one()
            count += 1
    except Unreadable as exc:
        problem = str(exc)
        if count:
            problem = f"behind its first {count}: {problem}"

        look.imports.update(dict.fromkeys(found_of(walk).imports))
        raise Unreadable(problem) from exc
    look.add(found_of(walk))


def _look_at_array(look: _Look, stream: BinaryIO, size: int) -> None:
    """Look at a .npy: its header is the text of a dict (numpy/lib/format.py), and an array of
    objects is a pickle behind it."""
    start = stream.read(8)
    version = start[6:7]
    width = 4
    if version == b"\x01":
        width = 2
    length = int.from_bytes(stream.read(width), "little")
    header = stream.read(min(length, _BUFFER))
    if len(header) < length:
        raise Unreadable("the header of the array is cut")
    if not _OBJECTS.search(header):
        return
    walk = PickleWalk(stream, size, look.budget)
    try:
        walk.one()
    finally:
        look.imports.update(dict.fromkeys(found_of(walk).imports))
    look.add(found_of(walk))


# -- zip


class _Directory(NamedTuple):
    """What the end of a zip says of its central directory."""

    entries: int
    size: int


def _directory_of(stream: BinaryIO, size: int) -> _Directory:
    """The central directory of a zip, before zipfile reads it whole (APPNOTE.TXT, 4.3.16 and
    4.3.14). Raises Unreadable."""
    tail_size = min(size, 22 + 0xFFFF + 20)
    stream.seek(size - tail_size)
    tail = stream.read(tail_size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise Unreadable("it is a zip without its end")
    end = tail[at : at + 22]
    found = _Directory(int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little"))
    locator = tail[max(0, at - 20) : at]
    if locator[:4] != b"PK\x06\x07":
        return found
    record_at = int.from_bytes(locator[8:16], "little")
    stream.seek(min(record_at, size))
    record = stream.read(56)
    if record[:4] != b"PK\x06\x06":
        raise Unreadable("it is a zip whose end is not where it says")
    return _Directory(
        int.from_bytes(record[32:40], "little"), int.from_bytes(record[40:48], "little")
    )


def _look_at_zip(look: _Look, stream: BinaryIO, size: int, depth: int) -> None:
    if depth >= DEEPEST:
        raise Unreadable(f"it has more than {DEEPEST} zips in each other")
    directory = _directory_of(stream, size)
    if directory.entries > MOST_ENTRIES or directory.size > LARGEST_DIRECTORY:
        raise Unreadable(f"it is a zip of {directory.entries:,} entries")
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        _require_distinct(entries)
        of_torch = any(_OF_TORCH.match(entry.filename) for entry in entries)
        for entry in entries:
            is_storage = of_torch and _STORAGE.match(entry.filename)
            if not is_storage and not entry.is_dir():
                _look_at_entry(look, stream, archive, entry, depth)


def _require_distinct(entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse a zip of which readers could take different entries for the same. Raises
    Unreadable."""
    names = {entry.filename.lower() for entry in entries}
    distinct = len(names)
    if distinct < len(entries):
        raise Unreadable("two entries of the zip have one name")


def _look_at_entry(
    look: _Look, stream: BinaryIO, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, depth: int
) -> None:
    name = entry.filename
    suffix = name[name.rfind(".") :].lower()
    if suffix == ".py":
        shown = name.encode("unicode_escape").decode()[:100]
        look.imports[f"code in {shown}"] = None
        return

    with archive.open(entry) as content:  # which refuses one that has another name at its place
        if entry.compress_type == zipfile.ZIP_STORED:
            window = _window_of(stream, entry)
            _look(look, io.BufferedReader(window, _BUFFER), window.size, suffix, depth + 1)
            return
        look.budget.unpacked -= entry.file_size
        if look.budget.unpacked < 0:
            raise Unreadable("it unpacks to more than 2 GiB")
        if content.read(4) == ZIP:
            raise Unreadable("a zip is compressed in a zip")
        content.seek(0)
        unpacked = io.BufferedReader(cast(io.RawIOBase, content), _BUFFER)
        _look(look, unpacked, entry.file_size, suffix, depth + 1)


class _Window(io.RawIOBase):
    """The bytes of an entry that is stored as it is, as a file."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._stream = stream
        self._start = start
        self._at = 0
        self.size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        origins = (0, self._at, self.size)
        wanted = origins[whence] + offset
        self._at = wanted
        if wanted < 0:
            self._at = 0
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._start + self._at)
        left = max(0, self.size - self._at)
        piece = self._stream.read(min(left, len(buffer)))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _window_of(stream: BinaryIO, entry: zipfile.ZipInfo) -> _Window:
    """Where a stored entry lies: behind its local header (APPNOTE.TXT, 4.3.7). Raises
    Unreadable."""
    if entry.compress_size != entry.file_size:
        raise Unreadable("an entry of the zip has two sizes")
    stream.seek(entry.header_offset)
    header = stream.read(30)
    name_size = int.from_bytes(header[26:28], "little")
    extra_size = int.from_bytes(header[28:30], "little")
    start = entry.header_offset + len(header) + name_size + extra_size
    return _Window(stream, start, entry.file_size)


# -- tar


class _Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    start: int
    size: int


def _look_at_tar(look: _Look, stream: BinaryIO, size: int) -> None:
    members = {member.name: member for member in _members(stream, size)}
    known = ("sys_info", "pickle", "storages", "tensors")
    if "pickle" not in members:
        raise Unreadable("it is a tar, and no checkpoint of torch")
    for name in known:
        member = members.get(name)
        if member is None:
            continue

        stream.seek(member.start)
        walk = PickleWalk(stream, member.start + member.size, look.budget)
        try:
            _walk_member(walk, name)
        finally:
            look.imports.update(dict.fromkeys(found_of(walk).imports))
        look.add(found_of(walk))


def _walk_member(walk: PickleWalk, name: str) -> None:
    """Walk over the pickles of a member, and pass over the numbers between them
    (torch/serialization.py, legacy_load). Raises Unreadable."""
    walk.one()  # how many follow, or the whole
    while name == "tensors" and not walk.at_end():
        walk.one()
        dimensions = int.from_bytes(walk.take(8)[:4], "little")
        walk.skip(16 * dimensions + 8)
    while name == "storages" and not walk.at_end():
        walk.one()
        width = _element_size(walk)
        if not width:  # the views of the storages, behind all of them
            return
        elements = int.from_bytes(walk.take(8), "little")
        walk.skip(elements * width)


def _element_size(walk: PickleWalk) -> int:
    """Bytes of an element of the storage that a pickle names; 0 where it names none."""
    for module, name in walk.latest:
        if not module.startswith("torch"):
            continue
        kind, suffix, _ = name.partition("Storage")
        size = _SIZES.get(kind)
        if size and suffix:
            return size
    return 0


def _members(stream: BinaryIO, size: int) -> Sequence[_Member]:
    """The files of a tar, without any of its extensions. Raises Unreadable."""
    found: List[_Member] = []
    at = 0
    while at + _BLOCK <= size and len(found) < 100:
        stream.seek(at)
        header = stream.read(_BLOCK)
        if not header.strip(b"\0"):
            return found
        member = _member_of(header, at + _BLOCK)
        stop = member.start + member.size
        if stop > size:
            raise Unreadable("it is a tar that is cut")
        found.append(member)
        filling = -stop % _BLOCK
        at = stop + filling
    raise Unreadable("it is a tar that is cut")


def _member_of(header: bytes, start: int) -> _Member:
    kind = header[156:157]
    if kind not in (b"0", b"\0"):
        raise Unreadable("it is a tar with more than plain files")
    try:
        size = int(header[124:136].strip(b" \0") or b"0", 8)
    except ValueError as exc:
        raise Unreadable("it is a tar with a size that is no number") from exc
    named = header[:100].rstrip(b"\0")
    name = named.decode("latin-1")
    return _Member(name, start, size)
