# SPDX-License-Identifier: Apache-2.0
"""Files in folders where somebody else may have put something in the way.

A path is looked up anew each time that it is used, and a symbolic link in it leads anywhere: root,
who locks the model folder of a user, would make files for him. Hence the rule for all that lies
below a folder of models, deployments or logs: each folder is opened from the one before, no link
is followed, and what is opened is a regular file.

    with folder_below(model, ".hfship", make=True) as fd: ...        a folder, for dir_fd=
    with opened_below(model, ".hfship/lock", os.O_RDWR) as fd: ...   a file
    base/reading.py reads small files, base/files.write_below writes them

The folder at the top is the operator's word: it may be a link, or lie behind one.

Promises: nothing is waited for (a FIFO without a writer, a device), and what is refused is Refused,
an OSError whose strerror says what was found.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from functools import lru_cache
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple

from hfship.base.values import dataclass

# O_PATH: a folder on the way need not be readable. With O_DIRECTORY a link is ENOTDIR.
_ON_THE_WAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_TOP = os.O_PATH | os.O_DIRECTORY
_NEVER_WAIT = os.O_NONBLOCK | os.O_NOCTTY
_NOTHING_CAN_BE_MADE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFREG: "a file",
}


class Refused(OSError):
    """What is there is not opened, or not read, though the system would: `why` says what it is."""

    def __init__(self, number: int, why: str, path: object) -> None:
        super().__init__(number, why, str(path))


def kind_of(mode: int) -> str:
    """What a mode of stat(2) says that a thing is, for people.

    >>> kind_of(0o100644), kind_of(0o010600)
    ('a file', 'a named pipe')
    """
    return _KINDS.get(stat.S_IFMT(mode), "no file")


@dataclass(frozen=True)
class Owner:
    """Whose the files are that we make in a folder: user, group and mode that they get.

    On NFS, FAT and SMB these may be somebody else's, and open to all: there it means nothing.
    """

    uid: int
    gid: int
    mode: int

    def is_foreign(self, status: os.stat_result) -> bool:
        """Whether somebody else than us and root owns a file or folder, or may write to it.

        Our own group may: on most systems nobody else is in it.
        """
        if status.st_uid not in (self.uid, 0):
            return True
        open_to = status.st_mode & ~self.mode
        if open_to & stat.S_IWOTH:
            return True
        return bool(open_to & stat.S_IWGRP) and status.st_gid not in (self.gid, 0)


@lru_cache(maxsize=None)
def owner_in(folder: Path) -> Owner:
    """Whose the files are that we make in a folder, which is tried with one that nobody else may
    write and that has no name; where none can be made, our own user. Raises OSError."""
    import tempfile  # few commands need it, and it loads much

    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            status = os.fstat(stream.fileno())
    except OSError as exc:
        if exc.errno not in _NOTHING_CAN_BE_MADE:
            raise
        return Owner(os.geteuid(), os.getegid(), 0)
    return Owner(status.st_uid, status.st_gid, status.st_mode)


class FileIdentity(NamedTuple):
    """What tells that a file is still the one of which something was found out: it changes when
    somebody writes to it, puts another in its place, or brings it here from elsewhere.

    No program can set the time of change (ctime); a hard link and a rename set it, too.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    def is_same_content(self, other: FileIdentity) -> bool:
        """Are they the same, but for what a rename or a link changes?"""
        return self[:4] == other[:4]


def identity_of(status: os.stat_result) -> FileIdentity:
    """The identity of a file whose status this is."""
    return FileIdentity(
        device=status.st_dev,
        inode=status.st_ino,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
    )


def is_foreign(status: os.stat_result) -> bool:
    """Owner.is_foreign for a place that is known to keep owners and modes."""
    return Owner(os.geteuid(), os.getegid(), 0).is_foreign(status)


def owner_of(status: os.stat_result) -> str:
    """The name of a file's owner, or the number where there is no name."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(status.st_uid).pw_name
    return f"user {status.st_uid}"


@contextlib.contextmanager
def folder_below(root: Path, path: str = "", make: bool = False) -> Iterator[int]:
    """The descriptor (O_PATH) of a folder below `root`, closed at the end; "" is `root` itself.

    With `make` the folders below `root` are made where they are missing. Raises OSError.
    """
    fd = os.open(root, _TOP)
    try:
        for name in _names_of(path):
            inner = _step_into(fd, name, make)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def _names_of(path: str) -> List[str]:
    """The steps of a path below a folder. Raises Refused for one that may lead out of it."""
    names = path.split("/") if path else []
    if {"", ".", ".."} & set(names):
        raise Refused(errno.EINVAL, "its path leads elsewhere", path)
    return names


def place_of(path: str) -> Tuple[str, str]:
    """The folder of a file below a folder, and its name in there. Raises Refused."""
    *folders, name = _names_of(path)
    return "/".join(folders), name


def _step_into(parent: int, name: str, make: bool) -> int:
    made = False
    try:
        fd = os.open(name, _ON_THE_WAY, dir_fd=parent)
    except NotADirectoryError as exc:
        raise _refusal(parent, name) from exc
    except FileNotFoundError:
        if not make:
            raise
        made = _make_in(parent, name)
        fd = _step_into(parent, name, make=False)
    if made:
        sync_folder(fd)  # first: FAT must not lead to a folder that was never written
        sync_folder(parent)
    return fd


def _make_in(parent: int, name: str) -> bool:
    """Make a folder in an open one; False where somebody else was faster. Raises OSError."""
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        return False
    return True


def _refusal(parent: int, name: str) -> Refused:
    """Why something in a folder is not opened."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    return Refused(errno.ELOOP, f"{name} is {kind_of(status.st_mode)}", name)


def sync_folder(fd: int) -> None:
    """Make what happened in an open folder durable, where it may be read. Raises OSError."""
    with contextlib.suppress(PermissionError):
        readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        try:
            os.fsync(readable)
        finally:
            os.close(readable)


def open_in(folder: int, name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Open a regular file in an open folder; no link is followed. Raises OSError."""
    try:
        fd = os.open(name, flags | os.O_NOFOLLOW | _NEVER_WAIT, mode, dir_fd=folder)
    except OSError as exc:
        # A link; a pipe that nobody reads, or a socket; a folder that is to be written.
        if exc.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _refusal(folder, name) from exc
        raise
    return checked_file(fd, name)


def checked_file(fd: int, path: object) -> int:
    """The descriptor, if it is one of a regular file; else it is closed. Raises Refused."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise Refused(errno.EINVAL, f"it is {kind_of(mode)}", path)


def open_regular(path: Path, or_pipe: bool = False) -> int:
    """Open a regular file for reading, where links lead whither they may: a path that the operator
    gave. With `or_pipe` it may be a pipe, as `<(command)` of a shell is. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | _NEVER_WAIT)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            raise Refused(errno.ENXIO, "it is a socket", path) from exc
        raise
    if or_pipe and stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.set_blocking(fd, True)  # the end of one that nobody writes comes at once
        return fd
    return checked_file(fd, path)


@contextlib.contextmanager
def opened_below(
    root: Path, path: str, flags: int = os.O_RDONLY, mode: int = 0o666
) -> Iterator[int]:
    """The descriptor of a regular file below `root`, closed at the end. Raises OSError."""
    folder, name = place_of(path)
    with folder_below(root, folder) as parent:
        fd = open_in(parent, name, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def stat_below(root: Path, path: str) -> os.stat_result:
    """The status of what is at a path below `root`; of a link itself. Raises OSError."""
    folder, name = place_of(path)
    with folder_below(root, folder) as parent:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)


def remove_below(root: Path, path: str) -> None:
    """Remove a file, or a link itself, if it is there. Raises OSError."""
    folder, name = place_of(path)
    with contextlib.suppress(FileNotFoundError), folder_below(root, folder) as parent:
        os.unlink(name, dir_fd=parent)


def publish_below(root: Path, source: str, target: str, journaled: bool = False) -> None:
    """Give a file below `root`, whose content is durable, its name there, durably. Folders that are
    missing are made. `journaled`: the filesystem makes a rename durable as one step. Raises
    OSError."""
    folder, name = place_of(source)
    new_folder, new_name = place_of(target)
    with folder_below(root, folder) as old, folder_below(root, new_folder, make=True) as new:
        os.replace(name, new_name, src_dir_fd=old, dst_dir_fd=new)
        if not journaled:
            # After a power cut FAT may have lost an entry, but two must not lead to the same
            # blocks: the old one goes first.
            sync_folder(old)
            fd = open_in(new, new_name)
            try:
                os.fsync(fd)  # again: on FAT the new entry leads to nothing until then
            finally:
                os.close(fd)
        sync_folder(new)
