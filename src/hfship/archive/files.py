# SPDX-License-Identifier: Apache-2.0
"""The files of an archive on disk: NAME.tar.zst, or its parts NAME.tar.zst.0001 and so on, and
NAME.tar.zst.sha256 beside them.

Owns how they are named and found, and how the tables at their end are read.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterable, List, Mapping, Optional, Sequence

from hfship.archive.frames import LARGEST_FRAME, TAIL_END_SIZE, decode_tail, tail_extent
from hfship.base.below import open_regular
from hfship.base.files import disk_errors, pread_exactly
from hfship.base.reading import read_small
from hfship.base.values import dataclass, replace

if TYPE_CHECKING:
    from hfship.archive.frames import Index

STDIN = "-"  # an archive that comes through a pipe
SUFFIX = ".tar.zst"
BOM = ".cdx.json"  # suffix of the bill of materials beside an archive
_SUFFIXES = re.compile(r"(\.delta([ ._-]?[(]?[0-9]+[)]?)?)?\.tar\.zst$")
PART_NAME = re.compile(r"(?P<archive>.+\.tar\.zst)\.(?P<number>[0-9]{4,9})$")
SUMS_SIZE = 16 << 20  # bytes that are read of the sums: those of 100,000 parts
# A line of `sha256sum`; a star before the name means that the file was read as bytes.
SUM_LINE = re.compile(r"^(?P<sha256>[0-9a-f]{64}) [ *](?P<name>[^/\n]+)$", re.MULTILINE)


def part_name(archive: str, number: int, parts_at_most: int) -> str:
    """The name of a part; as wide as the largest number that can occur, so that
    `cat NAME.tar.zst.*` sorts right.

    >>> part_name("m.tar.zst", 7, 30), part_name("m.tar.zst", 7, 12345)
    ('m.tar.zst.0007', 'm.tar.zst.00007')
    """
    digits = len(str(parts_at_most))
    width = max(4, digits)
    return f"{archive}.{number:0{width}d}"


@dataclass(frozen=True)
class ArchiveFiles:
    """What is on disk of one archive: `name` is NAME.tar.zst, `numbers` the parts found, maybe in
    several folders; none for a whole file. Missing parts are expected in `folder`."""

    folder: Path
    name: str
    numbers: Mapping[int, Path]

    @property
    def path(self) -> Path:
        """How an operator names it: the whole file, or the first part found."""
        return self.paths[0]

    @property
    def paths(self) -> List[Path]:
        """All its files, in order."""
        if not self.numbers:
            return [self.folder / self.name]
        return [self.numbers[number] for number in sorted(self.numbers)]

    def part(self, number: int) -> Path:
        """The file of a part, also if it is missing; of a whole archive that is its one file."""
        if not self.numbers:
            return self.path
        if number in self.numbers:
            return self.numbers[number]

        prefix = f"{self.name}."
        width = len(self.path.name) - len(prefix)
        return self.folder / f"{prefix}{number:0{width}d}"

    def missing_parts(self, most: int) -> List[str]:
        """The names of the first parts that are missing below the last one found, `most` at most:
        any number can stand on a medium, as in NAME.tar.zst.999999999."""
        missing: List[str] = []
        for number in range(1, max(self.numbers, default=0)):
            if len(missing) == most:
                break
            if number not in self.numbers:
                missing.append(self.part(number).name)
        return missing

    @property
    def place(self) -> Path:
        """What means all of it to an operator: NAME.tar.zst, also of parts; these by their first
        one where a whole file lies beside them."""
        place = self.folder / self.name
        if self.numbers and place.exists():
            return self.path
        return place

    @property
    def is_complete(self) -> bool:
        """Whether all files that the sums list are there; False without sums."""
        listed = set(self.listed())
        present = {path.name for path in self.paths}
        return bool(listed) and listed <= present

    @property
    def sums(self) -> Path:
        """NAME.tar.zst.sha256, also if it is missing."""
        return self.folder / f"{self.name}.sha256"

    def listed(self) -> Mapping[str, str]:
        """File name -> SHA-256 from NAME.tar.zst.sha256; empty when there is none."""
        try:
            content = read_small(self.sums, SUMS_SIZE)
        except OSError:
            return {}
        text = content.decode("utf-8", "replace")
        return {match["name"]: match["sha256"] for match in SUM_LINE.finditer(text)}


# -- finding them


def archives_in(folder: Path) -> List[ArchiveFiles]:
    """The archives in a folder, by name; where both are there, the whole file before the parts.
    What has such a name and is no regular file is none."""
    if not os.path.isdir(folder):
        return []

    whole: List[str] = []
    parts: Dict[str, Dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = PART_NAME.match(path.name)
        named = match or path.name.endswith(SUFFIX)
        if not named or not path.is_file():
            continue
        if match:
            numbers = parts.setdefault(match["archive"], {})
            numbers[int(match["number"])] = path
        else:
            whole.append(path.name)

    found = [ArchiveFiles(folder, name, {}) for name in whole]
    found += [ArchiveFiles(folder, name, numbers) for name, numbers in parts.items()]
    return sorted(found, key=lambda files: (files.name, bool(files.numbers)))


def merged(found: Iterable[ArchiveFiles]) -> List[ArchiveFiles]:
    """Each archive once; one of which parts were found in several places as one, unless all its
    parts lie in one of them."""
    known: Dict[str, ArchiveFiles] = {}
    for files in found:
        key = os.path.realpath(files.path)
        if files.numbers and not files.is_complete:
            key = files.name
        earlier = known.get(key, files)
        numbers = {**files.numbers, **earlier.numbers}
        known[key] = replace(earlier, numbers=numbers)

    return list(known.values())


def find_archives(argument: str, folders: Sequence[Path]) -> List[ArchiveFiles]:
    """The archives that an argument means: a file, any part, a folder that holds archives, a NAME,
    or - for standard input. Empty when there are none.

    A NAME means all archives of that model, the deltas behind the others: those in the current
    folder, then those in `folders`.
    """
    path = Path(argument)
    if argument == STDIN:
        return [ArchiveFiles(Path(), STDIN, {})]

    is_path = "/" in argument or argument in ("", ".", "..")
    # An unset variable of a script does not mean the current folder.
    inside = archives_in(path) if argument else []
    if inside or (is_path and path.is_dir()):
        return inside
    if is_path or path.is_file():
        return _file_or_archives(path)

    found: List[ArchiveFiles] = []
    for place in (Path(), *folders):
        with contextlib.suppress(PermissionError):  # a folder of others, to which nobody pointed
            found += _archives_called(path.name, place)
    return merged(found)


def _file_or_archives(path: Path) -> List[ArchiveFiles]:
    """The archives that a path means; any other file may be one of another program."""
    found = _archives_called(path.name, path.parent)
    if not found and path.is_file():
        return [ArchiveFiles(path.parent, path.name, {})]
    return found


def _archives_called(name: str, folder: Path) -> List[ArchiveFiles]:
    """The archives in a folder that are meant by the name of their model, or by that of one of
    their files: then of a whole file and parts the whole file, unless a part is named."""
    found = archives_in(folder)
    of_model = [files for files in found if model_of(files.name) == name]
    if of_model:
        return sorted(of_model, key=lambda files: is_delta_name(files.name))

    part = PART_NAME.match(name)
    if part:
        name = part["archive"]
    name = re.sub(r"\.(sha256|sig)$", "", name)
    for files in found:
        if part and not files.numbers:
            continue  # a part is meant, not the whole file beside it
        if files.name in (name, name + SUFFIX):
            return [files]

    return []


def model_of(archive: str) -> str:
    """The model that an archive is called after. Deltas may be numbered, by people or browsers.

    >>> [model_of(f"m{end}.tar.zst") for end in ("", ".delta", ".delta.2", ".delta (1)", ".deltas")]
    ['m', 'm', 'm', 'm', 'm.deltas']
    """
    return _SUFFIXES.sub("", archive)


def is_archive_name(argument: str) -> bool:
    """Whether an operator means an archive, or a part of one, and no folder.

    >>> is_archive_name("a/m.tar.zst"), is_archive_name("m.tar.zst.0002"), is_archive_name("m")
    (True, True, False)
    """
    named = argument.endswith(SUFFIX) or PART_NAME.match(argument)
    return bool(named) and not Path(argument).is_dir()


def is_delta_name(archive: str) -> bool:
    """Whether an archive is called as a delta is."""
    return model_of(archive) + SUFFIX != archive


# -- the tables at their end


def read_index(files: ArchiveFiles) -> Optional[Index]:
    """The tables at the end of an archive; None if they are not there or damaged.

    Where parts of another pack lie among ours, the last one may have the tables of that other: so
    those are taken that fit the most parts. Raises DiskError.
    """
    sizes: Dict[int, int] = {}
    for number, path in files.numbers.items():
        if path.exists():
            sizes[number] = path.stat().st_size

    best: Optional[Index] = None
    most = -1
    for path in reversed(files.paths):
        index = _tables_of(path)
        if index:
            expected = enumerate(index.part_sizes, 1)
            fitting = sum(sizes.get(number) == size for number, size in expected)
            if fitting > most:
                best, most = index, fitting
        if not files.numbers or most == len(sizes):
            break

    return best


def _tables_of(path: Path) -> Optional[Index]:
    """The tables at the end of a file; None if they are not there or damaged."""
    advice = "check the medium, then copy the archive again"
    with disk_errors("read", path, advice):
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            end = pread_exactly(fd, TAIL_END_SIZE, max(size - TAIL_END_SIZE, 0))
            tail_size, _ = tail_extent(end)
            if tail_size > min(size, LARGEST_FRAME):
                return None
            return decode_tail(pread_exactly(fd, tail_size, size - tail_size))
        except (ValueError, struct.error):
            return None
        finally:
            os.close(fd)
