# SPDX-License-Identifier: Apache-2.0
"""Files.

Owns every promise about the disk: a file appears under its final name complete or not at all; room
and file-size limits are known before the first byte; an I/O error becomes a DiskError that names
the path and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Callable, Iterator, Optional, Union

from hfship.base.below import Refused, folder_below, is_foreign, open_in, place_of, sync_folder
from hfship.base.errors import (
    DiskError,
    NoRoomError,
)
from hfship.base.text import human_bytes
from hfship.base.values import dataclass

# Bytes per read when hashing or copying: large enough that Python's cost disappears.
CHUNK = 1 << 20

# Filesystems whose largest file is limited. FAT: 32-bit size field (Microsoft FAT specification).
FILE_SIZE_LIMITS = {"vfat": 2**32 - 1, "msdos": 2**32 - 1}

MOUNT_TABLE = Path("/proc/self/mountinfo")  # proc_pid_mountinfo(5)

# Where posix_fallocate reserves blocks; elsewhere glibc emulates it by writing every block.
FALLOCATE_FILESYSTEMS = frozenset({"ext4", "xfs", "btrfs", "overlay", "f2fs"})
# Where both folders of a rename are in one transaction, which a sync of either makes durable.
JOURNALED_FILESYSTEMS = frozenset({"ext4", "xfs", "btrfs"})

SPARE_INODES = 16  # for our own files and the folders of a model
WORK_DIR = ".hfship"  # our folder inside a model folder
INCOMPLETE = ".incomplete"  # suffix of a file whose bytes are not all there or not yet verified
# What the system says of a file of ours that somebody removed or replaced.
CHANGED_UNDERNEATH = (errno.ENOENT, errno.ELOOP)


@dataclass(frozen=True)
class Filesystem:
    """The filesystem below a path: its type ("vfat"; "" when unknown), and the size of the largest
    file that it takes in bytes (None: no limit known)."""

    kind: str
    max_file_size: Optional[int]

    @property
    def journaled(self) -> bool:
        """Is a rename durable, as one step, when its folder is?"""
        return self.kind in JOURNALED_FILESYSTEMS


def existing_ancestor(path: Path) -> Path:
    """The path itself or its nearest ancestor that exists."""
    path = path.absolute()
    while not os.path.exists(path):  # and to be seen: its parent may be somebody else's
        path = path.parent
    return path


def filesystem_of(path: Path) -> Filesystem:
    """Type and file-size limit at `path`, which need not exist yet. RLIMIT_FSIZE is a limit too.

    The type is "" where the mount table cannot be read, as in a chroot without /proc.
    """
    target = str(existing_ancestor(path).resolve())
    try:
        mounts = MOUNT_TABLE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        mounts = ""

    kind = _mount_type(target, mounts)
    limits = []
    if kind in FILE_SIZE_LIMITS:
        limits.append(FILE_SIZE_LIMITS[kind])
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return Filesystem(kind, min(limits, default=None))


def _mount_type(target: str, mountinfo: str) -> str:
    """Filesystem type of the deepest mount point above `target`; "" when there is none.

    `mountinfo` is the text of MOUNT_TABLE: the mount point is the fifth field, the type the first
    one after " - ".

    >>> table = ["1 0 8:1 / / rw - ext4 /dev/a rw", "2 1 8:2 / /mnt/a\\\\040b rw - vfat /dev/b rw"]
    >>> _mount_type("/mnt/a b/x", "\\n".join(table)), _mount_type("/mnt/x", "\\n".join(table))
    ('vfat', 'ext4')
    """
    deepest = ""
    kind = ""
    for line in mountinfo.splitlines():
        mount, _, filesystem = line.partition(" - ")
        mount_fields = mount.split(" ")
        point = _unescaped(mount_fields[4])
        below = point.rstrip("/") + "/"
        if target != point and not target.startswith(below):
            continue
        # Of two on the same point the later one hides the earlier.
        if len(point) >= len(deepest):
            deepest = point
            kind, _, _ = filesystem.partition(" ")

    return kind


def _unescaped(text: str) -> str:
    r"""The path in a field of the mount table, where \\040 is a space."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write at `path`, which need not exist yet.

    sys.maxsize on the FUSE filesystems that do not tell.
    """
    stat = os.statvfs(existing_ancestor(path))
    if not stat.f_blocks:
        return sys.maxsize
    return stat.f_bavail * stat.f_frsize


def require_room(folder: Path, total: int, largest: int, what: str, next_step: str) -> None:
    """Refuse before the first byte when `total` bytes, or a file of `largest` bytes, do not fit.

    `folder` need not exist yet; `what` is what cannot be done then. Raises DiskError.
    """
    limit = filesystem_of(folder).max_file_size
    if limit is not None and largest > limit:
        most = human_bytes(limit)
        size = human_bytes(largest)
        raise DiskError(
            f"cannot {what}: a file is too large for the target",
            f"the filesystem at {folder} takes files up to {most}, the largest has {size}",
            next_step,
        )

    free = free_bytes(folder)
    if total > free:
        room = human_bytes(free)
        needed = human_bytes(total)
        missing = human_bytes(total - free)
        raise DiskError(
            f"cannot {what}: {folder} has {room} free, {needed} needed",
            f"{missing} are missing",
            next_step,
        )


def free_inodes(folder: Path) -> int:
    """Files that may still be made at `folder`, which need not exist yet; sys.maxsize where the
    filesystem makes room for them as it needs it."""
    status = os.statvfs(existing_ancestor(folder))
    if not status.f_files:
        return sys.maxsize
    return status.f_favail


def require_inodes(folder: Path, needed: int, what: str, next_step: str) -> None:
    """Refuse when the filesystem at `folder` has too few inodes for what cannot be done then.
    Raises DiskError."""
    free = free_inodes(folder)
    if free < needed:
        why = f"{folder} has {free} inodes free, {needed} needed: one for each file"
        raise DiskError(f"cannot {what}: too few inodes", why, next_step)


_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large for this filesystem",
    errno.EROFS: "the filesystem is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an input/output error",
}
# This place cannot hold it, by rights or by name: another folder may.
_WRONG_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EINVAL,  # a name that this filesystem cannot hold
    errno.ENAMETOOLONG,
)
_DISK_FAILS = (errno.EIO, errno.ENODEV, errno.ENXIO)
# What is done to a path that is given: no other folder can be chosen for it.
_GIVEN_PATHS = ("read", "remove", "use")


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_error(exc: OSError, doing: str, path: Path, next_step: str = "") -> DiskError:
    """An OSError of the file system as an operator's error: `cannot {doing} {path}: ...`.

    Without `next_step` the next step follows from the errno.
    """
    number = exc.errno or 0
    said = exc.strerror or str(exc)
    reason = _DISK_REASONS.get(number, said)
    if isinstance(exc, Refused):
        reason = said
    if number == errno.ENOSPC:
        free = free_bytes(path)
        reason += f" ({human_bytes(free)} free)"
        if not free_inodes(path):
            reason = "the disk takes no more files (no inodes are free)"
    if not next_step:
        next_step = _step_after(exc, doing)
    kind = DiskError
    if number in _NO_ROOM:
        kind = NoRoomError
    return kind(
        f"cannot {doing} {path}: {reason}",
        "",
        next_step,
    )


def _step_after(exc: OSError, doing: str) -> str:
    if isinstance(exc, Refused):
        return "remove what is there, if nobody needs it, then run the same command again"
    if exc.errno in _WRONG_PLACE:
        if doing in _GIVEN_PATHS:
            return "change that, or run it as its owner"
        return "choose another folder (-o DIR), or fix this one"

    first = "free space"
    if exc.errno in CHANGED_UNDERNEATH:
        first = "leave the folder alone meanwhile"
    elif exc.errno in _DISK_FAILS:
        first = "look after the disk and its cable"

    return f"{first}, then run the same command again"


@contextlib.contextmanager
def disk_errors(doing: str, path: Path, next_step: str = "") -> Iterator[None]:
    """Raises the OSError of what is done inside as a DiskError: `cannot {doing} {path}: ...`.

    For a step, not for each chunk of a loop: it costs about a microsecond.

    >>> with disk_errors("read", Path("/nowhere")):
    ...     Path("/nowhere").read_bytes()
    Traceback (most recent call last):
    hfship.base.errors.DiskError: cannot read /nowhere: No such file or directory
    """
    try:
        yield
    except OSError as exc:
        raise disk_error(exc, doing, path, next_step) from exc


@contextlib.contextmanager
def disk_errors_below(doing: str, root: Path, path: str) -> Iterator[None]:
    """disk_errors for a path below a folder, put together only when it is to be shown: of small
    files there are thousands, with several steps each."""
    try:
        yield
    except OSError as exc:
        raise disk_error(exc, doing, root / path) from exc


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The descriptor of a file, closed at the end. A new file gets mode 0644; a link is followed
    for reading only. Raises OSError."""
    if flags & os.O_ACCMODE != os.O_RDONLY:
        flags |= os.O_NOFOLLOW
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def fsync_dir(folder: Path) -> None:
    """Make new names inside `folder` durable. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    with opened(folder, flags) as fd:
        os.fsync(fd)


def rename_durably(source: Path, target: Path) -> None:
    """Give a file or a folder, whose content is durable, its name, durably. Raises OSError."""
    os.replace(source, target)
    with opened(target) as fd:  # first, and again: on FAT the new entry leads to nothing until then
        os.fsync(fd)
    fsync_dir(target.parent)


def atomic_write(
    path: Path, content: Union[str, bytes], mode: Optional[int] = None, durable: bool = True
) -> None:
    """Write a small file so that it is there complete or not at all; with `durable` also across a
    power cut. Without `mode` the umask decides who may read it. Raises DiskError."""
    with disk_errors("write", path), folder_below(path.parent) as folder:
        _replace_in(folder, path.name, content, mode, durable)


def write_below(
    root: Path,
    path: str,
    content: Union[str, bytes],
    mode: Optional[int] = None,
    durable: bool = True,
) -> None:
    """Write a small file below a folder as `atomic_write` does: no link below `root` is followed,
    and folders that are missing there are made. Raises DiskError."""
    with disk_errors_below("write", root, path):
        inside, name = place_of(path)
        with folder_below(root, inside, make=True) as folder:
            _replace_in(folder, name, content, mode, durable)


def _replace_in(
    folder: int, name: str, content: Union[str, bytes], mode: Optional[int], durable: bool
) -> None:
    """Put a file into an open folder, in the place of what has the name there. Raises OSError."""
    temporary = f".{name}.{os.getpid()}.tmp"
    data = content.encode() if isinstance(content, str) else content
    if durable:
        _remove_temporaries(folder, name)

    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(temporary, flags, mode or 0o666, dir_fd=folder)
    except FileExistsError:  # of a killed run, or somebody's trap
        os.unlink(temporary, dir_fd=folder)
        fd = os.open(temporary, flags, mode or 0o666, dir_fd=folder)
    with contextlib.suppress(OSError):  # a filesystem without locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        _fill(fd, data, mode, durable)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        if durable:
            os.fsync(fd)  # again: on FAT the new entry leads to nothing until then
            sync_folder(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    finally:
        os.close(fd)


def _remove_temporaries(folder: int, name: str) -> None:
    """Remove what killed runs left of a file while they wrote it."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9]{{1,10}}\.tmp")
    with contextlib.suppress(OSError):
        readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        try:
            names = os.listdir(readable)
        finally:
            os.close(readable)
        for temporary in filter(pattern.fullmatch, names):
            _remove_unless_held(folder, temporary)


def _remove_unless_held(folder: int, temporary: str) -> None:
    """Remove a temporary file that nobody writes. Raises OSError."""
    fd = open_in(folder, temporary)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(temporary, dir_fd=folder)
    finally:
        os.close(fd)


def _fill(fd: int, data: bytes, mode: Optional[int], durable: bool) -> None:
    if mode:
        # Whatever the umask. Where a filesystem knows no modes, open() set what there is.
        with contextlib.suppress(OSError):
            os.fchmod(fd, mode)
    write_all(fd, data)
    if durable:
        os.fsync(fd)


def write_all(fd: int, data: Union[bytes, memoryview]) -> None:
    """os.write until everything is written (one stops at 2 GiB or at a signal). Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view)
        view = view[written:]


def pwrite_all(fd: int, data: Union[bytes, memoryview], offset: int) -> None:
    """os.pwrite until everything is written. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def pread_exactly(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file. Raises OSError."""
    pieces = []
    while size:
        piece = os.pread(fd, size, offset)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)

    if len(pieces) == 1:
        return pieces[0]

    return b"".join(pieces)


def preallocate(fd: int, size: int, filesystem: Filesystem) -> None:
    """Give an open file its final size in bytes; where the filesystem can, reserve its blocks, so
    that it cannot run full meanwhile. Raises OSError."""
    if size and filesystem.kind in FALLOCATE_FILESYSTEMS:
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    # FUSE filesystems that grow files by writing only refuse.
    with contextlib.suppress(PermissionError):
        os.ftruncate(fd, size)


_FICLONE = 0x40049409  # ioctl: share the blocks of another file (linux/fs.h)


def clone_file(source: Path, target: Path) -> None:
    """Copy a file as cheaply as the filesystem allows: shared blocks, a hard link, or the bytes.
    What others could change later is not linked.

    Raises FileExistsError when `target` is there, OSError.
    """
    with source.open("rb") as reader, target.open("xb") as writer, contextlib.suppress(OSError):
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        return

    target.unlink()
    if is_foreign(source.stat()):
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def make_dir(path: Path) -> Path:
    """Create a folder and its parents, durably. Returns it. Raises DiskError."""
    with disk_errors("create the folder", path):
        missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
        path.mkdir(parents=True, exist_ok=True)
        # The innermost first: FAT, which has no journal, must not lead to a folder that was never
        # written. The last one, which was there before, has a new entry.
        touched = [*missing, missing[-1].parent] if missing else []
        for folder in touched:
            with contextlib.suppress(PermissionError):  # a folder that may be written, but not read
                fsync_dir(folder)

    return path


def sha256_file(path: Path, count: Callable[[int], None] = lambda _: None) -> str:
    """Hex SHA-256 of a file; `count` gets the number of bytes of each chunk. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as stream:
        while True:
            size = stream.readinto(buffer)
            if not size:
                return digest.hexdigest()
            digest.update(buffer[:size])
            count(size)


def remove_if_empty(folder: Path, itself: bool = True) -> None:
    """Remove a folder that holds nothing but WORK_DIR with empty files, as locks are. Without
    `itself` only its WORK_DIR goes."""
    work = folder / WORK_DIR
    with contextlib.suppress(OSError):
        if os.listdir(folder) != [WORK_DIR] or work.is_symlink():
            return
        for path in work.iterdir():
            if path.stat().st_size:
                return
        if itself:
            shutil.rmtree(folder)
        else:
            shutil.rmtree(work)
