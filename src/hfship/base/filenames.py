# SPDX-License-Identifier: Apache-2.0
"""Which names a filesystem takes.

FAT, exFAT, NTFS and SMB refuse names that are right elsewhere, or hold two of them for the same. It
depends on the driver and its options, and a type like "fuseblk" tells neither. So the filesystem is
asked: names that may be refused are tried with empty files in NAME/.hfship/names, which is gone
afterwards. Promises: what is told is told before the first byte of a model is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import unicodedata
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Sequence, Set, Tuple

from hfship.base.below import folder_below
from hfship.base.errors import DiskError
from hfship.base.files import WORK_DIR, disk_errors
from hfship.base.text import shorten

_TRIAL = f"{WORK_DIR}/names"
# Names that every filesystem takes as they are; the rest is tried. (Names of devices are those of
# Microsoft's "Naming Files, Paths, and Namespaces".)
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9])(\.|\Z)", re.IGNORECASE)
_PLAIN = re.compile(r"[\w!#$%&'()+,;=@\[\]^`{}~. -]{0,199}[\w!#$%&'()+,;=@\[\]^`{}~-]", re.ASCII)
# Why a file cannot be created, whatever its name is.
_NOT_THE_NAME = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

Pair = Tuple[str, str]


def require_names(folder: Path, paths: Sequence[str], what: str) -> None:
    """Refuse names that the filesystem of a folder cannot hold, or takes for the same. The folder,
    which is locked by us, must have our WORK_DIR. Raises DiskError."""
    doubtful = doubtful_names(paths)
    pairs = twins_among(paths)
    if not (doubtful or pairs):
        return

    with _trial_folder(folder) as fd:
        same = [" and ".join(pair) for pair in pairs if _is_same(fd, pair)]
        refused = {name for name in doubtful if not _takes(fd, name)}

    step = "choose another folder with -o DIR"
    if same:
        why = f"it would hold these for the same: {shorten(same)}"
        raise DiskError(f"cannot {what}: its filesystem ignores case", why, step)
    if refused:
        affected = [path for path in paths if not refused.isdisjoint(path.split("/"))]
        why = f"these: {shorten(affected)}"
        raise DiskError(f"cannot {what}: its filesystem cannot hold all names", why, step)


def doubtful_names(paths: Iterable[str]) -> Set[str]:
    """The names in paths that some filesystem may not take as they are.

    >>> sorted(doubtful_names(["a.bin", "sub/a?.bin", "tail./x", "a b", "aux.txt"]))
    ['a?.bin', 'aux.txt', 'tail.']
    """
    names = {name for path in paths for name in path.split("/")}
    return {name for name in names if _DEVICE.match(name) or not _PLAIN.fullmatch(name)}


def twins_among(paths: Iterable[str]) -> List[Pair]:
    """Files and folders that some filesystem may take for the same: (the earlier, the later).

    >>> twins_among(["A/x", "a/y", "b/C", "b/c"])
    [('A', 'a'), ('b/C', 'b/c')]
    """
    spellings: Dict[str, str] = {}
    pairs = []
    seen = set()
    for path in paths:
        names = path.split("/")
        for count in range(1, len(names) + 1):
            part = "/".join(names[:count])
            if part in seen:
                continue
            seen.add(part)
            earlier = spellings.setdefault(_folded(part), part)
            if earlier != part:
                pairs.append((earlier, part))
    return pairs


def _folded(path: str) -> str:
    """Equal for paths that differ in case, or in how Unicode composes their letters."""
    if path.isascii():
        return path.lower()
    composed = unicodedata.normalize("NFC", path)
    return unicodedata.normalize("NFC", composed.casefold())


def ignores_case(work: Path) -> bool:
    """Whether the filesystem of a folder that has our WORK_DIR takes A and a for the same name."""
    shouted = work / WORK_DIR.upper()
    return shouted.exists()


@contextlib.contextmanager
def _trial_folder(folder: Path) -> Iterator[int]:
    """The descriptor of a folder to try names in, empty at first and gone afterwards. Raises
    DiskError."""
    with disk_errors("try names in", folder / WORK_DIR):
        with folder_below(folder, _TRIAL, make=True) as place:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=place)
        try:
            _empty(fd)  # of what a killed run left
            yield fd
            _empty(fd)
        finally:
            os.close(fd)
        with folder_below(folder, WORK_DIR) as work:
            os.rmdir(os.path.basename(_TRIAL), dir_fd=work)


def _empty(fd: int) -> List[str]:
    """Remove all files of an open folder; returns their names."""
    names = os.listdir(fd)
    for name in names:
        os.unlink(name, dir_fd=fd)
    return names


def _create(fd: int, name: str) -> bool:
    """Create an empty file; False when it is the name that is refused. Raises OSError."""
    try:
        created = os.open(name, _CREATE, 0o600, dir_fd=fd)
    except OSError as exc:
        if exc.errno in _NOT_THE_NAME:
            raise
        return False
    os.close(created)
    return True


def _takes(fd: int, name: str) -> bool:
    """Whether a name is taken as it is: not refused, and not shortened, as FAT does with a dot at
    the end."""
    is_created = _create(fd, name)
    found = [unicodedata.normalize("NFC", one) for one in _empty(fd)]
    return is_created and found == [unicodedata.normalize("NFC", name)]


def _is_same(fd: int, pair: Pair) -> bool:
    """Whether two paths that differ in one name only would be one."""
    names, others = (path.split("/") for path in pair)
    name, other = next((one, two) for one, two in zip(names, others) if one != two)
    is_created = _create(fd, name)
    try:
        os.stat(other, dir_fd=fd, follow_symlinks=False)
    except OSError:
        return False
    finally:
        _empty(fd)
    return is_created
