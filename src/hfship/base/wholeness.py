# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a model are whole, as far as they tell it themselves.

For folders of which no Hub vouches: another program brought the files, and may have left before it
was done. A file that is there in full size can still be a gap: programs reserve the room first.

  what other programs leave    x.safetensors.aria2, ._____temp/, x.part, .x.safetensors.Ab12Cd, ...
  weights that are not there   which an index, or the numbers of a series, name
  pointers                     a few lines in the place of a file, by git-lfs or git-xet
  weights that are cut         by the header of safetensors, the directory at the end of a zip
  weights of zeros             long ranges of nothing behind a valid header
  settings that are none       an index or config.json that is not JSON: a page of a proxy, say

What has a manifest was looked at when that was made, by whoever made it: then only what cannot be
meant is a fault, and not a file that is called .safetensors or config.json and is neither.

Promises: reads a few blocks of each file. Never: changes anything, says that a file is right.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import IncompleteError, IntegrityError
from hfship.base.files import WORK_DIR, disk_errors, opened, pread_exactly
from hfship.base.reading import LIST_SIZE, parse_json, read_small
from hfship.base.safetensors import HEADER_LIMIT, LENGTH_SIZE, read_tensor_bytes
from hfship.base.text import human_bytes, printable, shorten
from hfship.base.values import dataclass
from hfship.base.weights import INDEX, missing_shards, shards_named

CONFIG = "config.json"

_SUFFIXES = r"(safetensors|bin|gguf|pth?|onnx|h5|msgpack|model|json|jinja|txt|md|py|zst|tar)"
# What lies where a program has not finished, and the program: of the path below the folder.
_LEFTOVERS: Sequence[Tuple[str, str]] = (
    (r"\.aria2(__temp)?$", "aria2"),
    (r"(^|/)\._____temp/", "modelscope"),
    (r"\.incomplete$", "huggingface_hub or hfship"),
    (r"\.(part|partial|filepart)$", "another program"),
    (r"\.(crdownload|opdownload|download)$", "a browser"),
    (r"\.!(qB|ut|bt)$", "a torrent client"),
    (rf"(^|/)\.[^/]+\.{_SUFFIXES}\.[A-Za-z0-9]{{6}}$", "rsync"),
    (r"(^|/)\.(rsync-partial|~tmp~)/", "rsync"),
    (rf"\.{_SUFFIXES}\.[0-9a-fA-F]{{8}}$", "the AWS client"),
    (r"(^|/)\.azDownload-|_\.gstmp$", "a cloud's client"),
)
_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "is a pointer of git-lfs: git lfs pull brings it",
    b"# xet version ": "is a pointer of git-xet, not the file",
}
_POINTER_SIZE = 1024  # bytes at most, says the specification of git-lfs
_TORCH = re.compile(r"\.(bin|pth?)$")
_ZIP = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"  # 22 bytes before the end, or more if a comment follows it
_ZIP_END_AT_MOST = 22 + 0xFFFF

_SAMPLES = 256  # blocks of a file that are looked at, evenly spread
_SAMPLE_SIZE = 4096
_SHORTEST_GAP = 16 << 10  # bytes; whole tensors of zeros are that long at most, but for padding
_GAP_SHARE = 64  # a gap is at least this part of the file


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a file: its path below the folder, and what it is; `unfinished`
    if who brought it may still go on."""

    path: str
    why: str
    unfinished: bool = False
    is_missing: bool = False  # weights, which others name

    def text(self) -> str:
        """For people, and for the manifest of what is packed nevertheless."""
        return printable(f"{self.path} {self.why}")


def require_whole(
    folder: Path, sizes: Mapping[str, int], next_step: str, listed: bool = False
) -> None:
    """Refuse a model of files, path -> bytes, with faults; `listed` if a manifest has them. Raises
    IncompleteError, IntegrityError, DiskError."""
    faults = find_faults(folder, sizes, listed)
    if not faults:
        return

    why = shorten([fault.text() for fault in faults], 20, "\n")
    if any(fault.unfinished for fault in faults):
        raise IncompleteError(f"{folder} is not complete yet", why, next_step)
    raise IntegrityError(f"{folder} is damaged", why, next_step)


def find_faults(folder: Path, sizes: Mapping[str, int], listed: bool = False) -> List[Fault]:
    """What is wrong with a model of these files, path -> bytes, in a folder; `listed` if a manifest
    has them.

    Raises DiskError.
    """
    faults = list(_missing_files(folder, sizes))
    for fault in leftovers(folder):
        is_content = listed and fault.path in sizes  # a repository may hold what looks left over
        if not is_content:
            faults.append(fault)
    for path, size in sizes.items():
        why = _wrong_with(folder / path, path, size, listed)
        if why:
            faults.append(Fault(path, why))
    return faults


# -- what is not there


def leftovers(folder: Path) -> Iterator[Fault]:
    """What programs leave in a folder until they are done. Raises DiskError."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != WORK_DIR)
        for name in sorted(names):
            path = os.path.relpath(os.path.join(root, name), folder)
            program = _left_by(path)
            if program:
                yield Fault(path, f"tells that {program} has not finished", unfinished=True)


def _left_by(path: str) -> str:
    """The program that leaves a file of this path while it is not done; "" for none.

    >>> [_left_by(p) for p in ("a.bin.aria2", ".model.safetensors.aB3dE6", "model.safetensors")]
    ['aria2', 'rsync', '']
    """
    for pattern, program in _LEFTOVERS:
        if re.search(pattern, path):
            return program
    return ""


def _missing_files(folder: Path, sizes: Mapping[str, int]) -> Iterator[Fault]:
    for index in sorted(path for path in sizes if INDEX.search(path)):
        try:
            shards_named(folder, index)
        except IntegrityError as exc:
            yield Fault(index, f"is no index of weights: {exc.why}")
            return

    for path in missing_shards(folder, sizes.keys()):
        why = "is missing: an index or its series names it"
        yield Fault(path, why, unfinished=True, is_missing=True)


# -- what is there


def _wrong_with(path: Path, name: str, size: int, listed: bool) -> str:
    """What is wrong with a file, in words; "" for nothing that can be seen. Raises DiskError."""
    if size <= _POINTER_SIZE:
        pointer = _pointer_in(path)
        if pointer:
            return pointer
    if name.endswith(".safetensors"):
        if listed and not _has_header(path):
            return ""
        return _wrong_with_tensors(path)
    if _TORCH.search(name):
        return _wrong_with_zip(path, size)
    if name == CONFIG and not listed:
        return _wrong_with_json(path)
    return ""


def _pointer_in(path: Path) -> str:
    with disk_errors("read", path):
        content = read_small(path, _POINTER_SIZE)
    for beginning, what_it_is in _POINTERS.items():
        if content.startswith(beginning):
            return what_it_is
    return ""


def _has_header(path: Path) -> bool:
    """Whether a file begins as one of safetensors does."""
    with disk_errors("read", path), opened(path) as fd:
        beginning = pread_exactly(fd, LENGTH_SIZE + 1, 0)
    length = int.from_bytes(beginning[:LENGTH_SIZE], "little")
    return 0 < length <= HEADER_LIMIT and beginning[LENGTH_SIZE:].startswith(b"{")


def _wrong_with_tensors(path: Path) -> str:
    try:
        read_tensor_bytes(path)
    except IntegrityError as exc:
        return f"is damaged: {exc.why}"

    with disk_errors("read", path), opened(path) as fd:
        header = int.from_bytes(pread_exactly(fd, LENGTH_SIZE, 0), "little")
        start = LENGTH_SIZE + header
        gap = _gap_in(lambda at, size: pread_exactly(fd, size, at), start, os.fstat(fd).st_size)
    if gap is None:
        return ""
    first, stop = gap
    length = human_bytes(stop - first)
    return f"has nothing but zeros from byte {first} to {stop - 1} ({length}): it never arrived"


def _gap_in(read: Callable[[int, int], bytes], start: int, stop: int) -> Optional[Tuple[int, int]]:
    """The first long range of zeros, [first, stop), in bytes [start, stop) of a file; None without
    one. `read` gives bytes from an offset on.

    >>> data = b"x" * 20_000 + bytes(40_000) + b"x" * 20_000
    >>> _gap_in(lambda at, size: data[at : at + size], 0, len(data))
    (21084, 37831)
    """
    total = stop - start
    shortest = max(total // _GAP_SHARE, _SHORTEST_GAP)
    count = min(_SAMPLES, total // _SAMPLE_SIZE)
    last_start = total - _SAMPLE_SIZE
    steps = max(count - 1, 1)
    first: Optional[int] = None
    for number in range(count):
        at = start + last_start * number // steps
        if any(read(at, _SAMPLE_SIZE)):
            first = None
            continue
        if first is None:
            first = at
        end = at + _SAMPLE_SIZE
        if end - first >= min(shortest, total):
            return first, end
    return None


def _wrong_with_zip(path: Path, size: int) -> str:
    """What is wrong with a file of torch.save, which is a zip: its directory comes last."""
    with disk_errors("read", path), opened(path) as fd:
        beginning = pread_exactly(fd, len(_ZIP), 0)
        if beginning != _ZIP:
            return ""  # of an old version, of which nothing tells the end
        start = max(size - _ZIP_END_AT_MOST, 0)
        end = pread_exactly(fd, _ZIP_END_AT_MOST, start)
        if _ZIP_END in end:
            return ""
    return "is cut: the directory at the end of the file is missing"


def _wrong_with_json(path: Path) -> str:
    try:
        with disk_errors("read", path):
            content = read_small(path, LIST_SIZE)
        parse_json(content)
    except ValueError as exc:
        return f"is not JSON: {exc}"
    return ""
