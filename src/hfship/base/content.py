# SPDX-License-Identifier: Apache-2.0
"""What is content of a model folder, which names can travel, and where work on a file lies.

One rule for every verb:
  content       what the Hub lists and a selection wants, whatever its name looks like: .DS_Store,
                .gitattributes, .cache/x and w.incomplete, too
  never content, from no source: what lies in .git, .hg, .svn or .ssh, which hold programs and
                keys, and in .hfship, which is ours
  notes         our own .hfship at the top, and what huggingface_hub writes beside a model; unless
                a manifest lists it
A file in a model folder that its manifest does not list, and that is no note, is extra.

Work on a file PATH lies in `.hfship/partial/`, under a name made of the SHA-1 of PATH: no content
can have it, and it fits where PATH does. A folder is restored in NAME~incomplete, and the one that
it replaces is NAME~replaced for a moment, or NAME~VERSION as long as it is kept: no model can have
these names.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import AbstractSet, Iterable, Iterator, List, NoReturn, Set, Tuple

from hfship.base.errors import IntegrityError
from hfship.base.files import WORK_DIR, disk_error
from hfship.base.values import dataclass

PARTIAL_DIR = f"{WORK_DIR}/partial"
MARK_PATH = f"{WORK_DIR}/work-folder"  # empty; in a folder that unpack works in, or has replaced
UNFINISHED = "~incomplete"  # suffix of a folder that is restored
REPLACED = "~replaced"  # suffix of one that a restored one replaces
_KEPT = re.compile(r".~[0-9a-f]{12}$")  # end of the name of one that stays beside it

# The last is what NTFS calls .git, too (CVE-2014-9390).
_NEVER_CONTENT = frozenset([WORK_DIR, ".git", ".hg", ".svn", ".ssh", "git~1"])
# What huggingface_hub (`_local_folder.py`) has beside a model.
_HUB_NOTE = re.compile(
    r"\.cache/huggingface/(CACHEDIR\.TAG|\.gitignore|download/.+\.(metadata|lock|incomplete))$"
)
# Backslashes, drives of Windows ("C:"), and control characters.
_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f]|^[A-Za-z]:")
NAME_MAX = 255  # bytes of a name: NAME_MAX of limits.h
LONGEST_PATH = 4000  # characters: below PATH_MAX of limits.h with a folder in front
DEEPEST_PATH = 100  # folders: those of a path are compared with all others


def never_content(path: str) -> bool:
    """Whether something at a path is never part of a model, as FAT and NTFS would read its names,
    too.

    >>> [never_content(path) for path in (".git/config", "a/.GIT", ".ssh./id", ".hfship")]
    [True, True, True, True]
    >>> [never_content(path) for path in (".gitattributes", ".github/x", ".DS_Store", ".cache")]
    [False, False, False, False]
    """
    return any(name.casefold().rstrip(". ") in _NEVER_CONTENT for name in path.split("/"))


def is_note(path: str) -> bool:
    """Whether a file in a model folder is a note of ours or of huggingface_hub about the model.

    >>> [is_note(path) for path in (".hfship/lock", ".cache/huggingface/download/a.metadata")]
    [True, True]
    >>> [is_note(path) for path in ("a/.hfship/lock", ".cache/huggingface/download/run.sh")]
    [False, False]
    """
    return path.startswith(f"{WORK_DIR}/") or bool(_HUB_NOTE.match(path))


def work_path(path: str) -> str:
    """Where, below the model folder, the bytes of the file at `path` lie until they are proven.

    >>> work_path("model.safetensors")
    '.hfship/partial/c25a81432b4ff186e2d872a265ecc599ef076ea5.part'
    """
    digest = hashlib.sha1(path.encode("utf-8"))
    return f"{PARTIAL_DIR}/{digest.hexdigest()}.part"


def kept_name(name: str, version: str) -> str:
    """What the folder of a model is called when another version of it is NAME; `version` is its
    id of at least 12 hex digits.

    >>> kept_name("m", "0123456789abcdef")
    'm~0123456789ab'
    """
    return f"{name}~{version[:12]}"


def is_kept(name: str) -> bool:
    """Whether a folder of this name is an earlier version of a model."""
    return bool(_KEPT.search(name))


def kept_of(name: str) -> str:
    """The model of which a folder of this name is an earlier version; "" where it is none.

    >>> kept_of("m~0123456789ab"), kept_of("m")
    ('m', '')
    """
    if not is_kept(name):
        return ""
    return name.rpartition("~")[0]


def is_work_folder(name: str) -> bool:
    """Whether a folder of this name is one that unpack works in or has put aside, and no model."""
    return name.endswith((UNFINISHED, REPLACED)) or is_kept(name)


def check_relative_path(path: str) -> None:
    """Raise ValueError unless `path` stays inside its folder on every system, now and after a copy
    to FAT or NTFS, and may be content.

    Refused: too long or deep, empty, absolute, drive and UNC names, '.' and '..' segments,
    backslashes, control characters, names that are not UTF-8 or have more than 255 bytes, and what
    is never content. A name that the Hub gives is data, not an order.
    """
    if len(path) > LONGEST_PATH or path.count("/") >= DEEPEST_PATH:
        raise ValueError(f"path {path[:100]!r}... is too long")
    if _UNSAFE.search(path):
        raise ValueError(f"unsafe path {path!r}")

    segments = path.split("/")
    for segment in segments:
        if segment in ("", ".", ".."):
            raise ValueError(f"unsafe path {path!r}")

    try:
        longest = max(len(segment.encode()) for segment in segments)
    except UnicodeEncodeError as exc:  # bytes of a name that is not UTF-8, as surrogates
        raise ValueError(f"path {path!r} cannot be stored") from exc

    if longest > NAME_MAX:
        raise ValueError(f"path {path!r} cannot be stored")
    if segments[0].lower() == WORK_DIR:
        raise ValueError(f"path {path!r} is reserved for hfship")
    if never_content(path):
        raise ValueError(f"path {path!r} is never part of a model")


def check_distinct_paths(paths: Iterable[str]) -> None:
    """Raise ValueError when two paths are equal, or one is a folder of the other."""
    seen: Set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"duplicate path {path!r}")
        seen.add(path)

    for path in seen:
        for parent in folders_of(path):
            if parent in seen:
                raise ValueError(f"{parent!r} is both a file and a folder")


def folders_of(path: str) -> Iterator[str]:
    """The folders in which a path lies, the innermost first.

    >>> list(folders_of("a/b/c"))
    ['a/b', 'a']
    """
    parent = path.rpartition("/")[0]
    while parent:
        yield parent
        parent = parent.rpartition("/")[0]


def all_folders_of(paths: Iterable[str]) -> List[str]:
    """The folders in which any of the paths lies, sorted."""
    folders = {folder for path in paths for folder in folders_of(path)}
    return sorted(folders)


@dataclass(frozen=True)
class FolderContent:
    """What a model folder holds: (path, size) of its files, which may be content, in the order of a
    manifest; and the paths of what never is, outermost: `.git`, `sub/.ssh`."""

    files: Tuple[Tuple[str, int], ...]
    never: Tuple[str, ...]


def content_files(
    folder: Path, listed: AbstractSet[str] = frozenset()
) -> Tuple[Tuple[str, int], ...]:
    """The files of `folder_content`."""
    return folder_content(folder, listed).files


def folder_content(folder: Path, listed: AbstractSet[str] = frozenset()) -> FolderContent:
    """Look through a model folder, without its notes but for those among `listed`. A symbolic link
    counts as what it points to.

    Raises IntegrityError for a dangling link, a link to a folder or a special file, and for names
    that are not safe; DiskError for a folder that cannot be read.
    """
    files: List[Tuple[str, int]] = []
    never: List[str] = []
    for path in _paths_in(folder):
        if path in listed or not is_note(path):
            if never_content(path):
                never.append(path)
            else:
                files.append((path, _regular_size(folder, path)))

    def manifest_order(item: Tuple[str, int]) -> bytes:
        path, _ = item
        return path.encode("utf-8", "surrogateescape")

    in_order = sorted(files, key=manifest_order)
    never.sort()
    return FolderContent(tuple(in_order), tuple(never))


def _paths_in(folder: Path) -> Iterator[str]:
    """Paths of all in a folder that is no folder, and of folders that are never content."""

    def refuse(exc: OSError) -> NoReturn:  # os.walk would leave the folder out and say nothing
        raise disk_error(exc, "read", Path(exc.filename)) from exc

    for root, folders, names in os.walk(folder, onerror=refuse):
        relative = os.path.relpath(root, folder)
        prefix = "" if relative == "." else relative + "/"
        deeper = []
        for name in sorted(folders):
            if os.path.islink(os.path.join(root, name)):
                names.append(name)
            elif not never_content(name):
                deeper.append(name)
            elif prefix + name != WORK_DIR:
                yield prefix + name
        folders[:] = deeper  # os.walk goes into these
        for name in names:
            yield prefix + name


def _regular_size(folder: Path, path: str) -> int:
    """Bytes of a file of a model, which must be fit to travel. Raises IntegrityError."""
    try:
        check_relative_path(path)
    except ValueError as exc:
        what = f"{folder} has a file that cannot travel"
        raise IntegrityError(what, str(exc), "rename or remove it") from exc

    file = folder / path
    if not file.is_file():
        what = f"{folder} has something that is not a file"
        why = f"{path} is a dangling link, a link to a folder or a special file"
        raise IntegrityError(what, why, "remove it, or fetch the model again")

    return file.stat().st_size
