# SPDX-License-Identifier: Apache-2.0
"""The folder that a model is restored into, its journal, and the sink that writes there.

Owns how a file of a model gets to disk: as `work_path(PATH)`, which becomes PATH when its bytes are
proven and durable. And the journal NAME/.hfship/journal, from which a killed run resumes: a line of
JSON [path, sha256, bytes] for each checkpoint, appended (docs/formats.md, "Unpack under way").

Promises: no symbolic link below the folder is followed, whoever puts it there and whenever; what
somebody else owns or may write is not taken over; what the journal says was durable before. Never:
trusts the journal (what it counts is hashed again).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Callable,
    Dict,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Set,
    Tuple,
    Union,
)

from hfship.archive.stream_check import Sink
from hfship.base.below import open_in, owner_in
from hfship.base.content import PARTIAL_DIR, work_path
from hfship.base.errors import IntegrityError
from hfship.base.files import (
    CHUNK,
    WORK_DIR,
    Filesystem,
    disk_error,
    disk_errors,
    filesystem_of,
    fsync_dir,
    opened,
    pread_exactly,
    preallocate,
    pwrite_all,
    sha256_file,
    write_all,
)
from hfship.base.reading import parse_json
from hfship.base.values import replace

if TYPE_CHECKING:
    from hfship.base.manifest import FileEntry

JOURNAL_PATH = f"{WORK_DIR}/journal"
LARGEST_JOURNAL = 64 << 20  # bytes that are read of it: more than 100,000 checkpoints

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NOTHING_RESERVED = Filesystem("", None)  # files get their size, but no blocks


class Tree:
    """A folder below which no symbolic link is followed: every step starts from an open folder.

    The folder and those in it are made if need be. Raises IntegrityError where the folder itself,
    or anything on the way to a file, is a symbolic link or a file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with opened(root.parent, _FOLDER) as parent:
            self._fd = self._open_folder(parent, root.name, root)
        with disk_errors("write to", root):
            self._owner = owner_in(root)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _open_folder(self, parent: int, name: str, path: Path) -> int:
        made = False
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
                made = True
            fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
            if made:
                os.fsync(fd)  # before its parent is; see make_dir
            return fd
        except OSError as exc:
            if exc.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise disk_error(exc, "create the folder", path) from exc
            raise IntegrityError(
                f"cannot unpack into {path}",
                "a symbolic link or a file is where a folder of the model belongs; "
                "hfship does not follow it",
                f"remove {path}",
            ) from exc

    @contextlib.contextmanager
    def _place(self, path: str) -> Iterator[Tuple[int, str]]:
        """The open folder of a file, and its name in there."""
        folder, _, name = path.rpartition("/")
        with self.folder(folder) as fd:
            yield fd, name

    @contextlib.contextmanager
    def folder(self, path: str) -> Iterator[int]:
        """The descriptor of a folder of the tree, made if need be, and closed at the end: a model
        may have more folders than a process may have open files."""
        names = path.split("/") if path else []
        way = self.root
        fd = os.dup(self._fd)
        try:
            for name in names:
                way = way / name
                inner = self._open_folder(fd, name, way)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def create(self, path: str, size: int, filesystem: Filesystem = _NOTHING_RESERVED) -> int:
        """A new work file for PATH of `size` bytes, open for reading and writing.

        Blocks are reserved where `filesystem`, on which the tree lies, can do that. Raises
        DiskError.
        """
        self.discard(path)
        fd = self.open(work_path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with disk_errors("create", self.root / path):
            try:
                preallocate(fd, size, filesystem)
            except OSError:
                os.close(fd)
                raise

        return fd

    def open(self, path: str, flags: int) -> int:
        """Open a file of the tree, which must not be a link. Raises DiskError."""
        with self._place(path) as (folder, name), disk_errors("create", self.root / path):
            return open_in(folder, name, flags, 0o644)

    def link_or_copy(self, source: Path, entry: FileEntry) -> None:
        """Make a file of the tree from one elsewhere: a hard link if it can be, else a copy.

        A file that somebody else can change is copied.
        """
        foreign = self._owner.is_foreign(source.stat())
        if foreign or not self._link(source, entry):
            self._copy(source, entry)

    def _link(self, source: Path, entry: FileEntry) -> bool:
        with self._place(entry.path) as (folder, name):
            try:
                os.link(source, name, dst_dir_fd=folder, follow_symlinks=False)
            except OSError:
                return False
        return True

    def _copy(self, source: Path, entry: FileEntry) -> None:
        fd = self.create(entry.path, entry.size)
        # The descriptor is closed with `target`.
        with source.open("rb") as stream, os.fdopen(fd, "wb") as target:
            shutil.copyfileobj(stream, target, CHUNK)
            target.flush()
            os.fsync(fd)
            self.publish(entry.path)
            os.fsync(fd)  # again: see rename_durably

    def publish(self, path: str) -> None:
        """The work file for PATH becomes PATH."""
        source, target = self._place(work_path(path)), self._place(path)
        with source as (work_folder, work_name), target as (folder, name):
            os.replace(work_name, name, src_dir_fd=work_folder, dst_dir_fd=folder)
            os.fsync(work_folder)  # first, as in publish_below

    def discard(self, path: str) -> None:
        """Remove the work file for PATH, if it is there and can be."""
        with self._place(work_path(path)) as (folder, name), contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)

    def remove_work_files(self) -> None:
        """Remove what is left of the folder of work files."""
        parent_of, itself = self._place(PARTIAL_DIR), self.folder(PARTIAL_DIR)
        removing = disk_errors("remove", self.root / PARTIAL_DIR)
        with parent_of as (parent, name), itself as fd, removing:
            for left in os.listdir(fd):
                os.unlink(left, dir_fd=fd)
            os.rmdir(name, dir_fd=parent)

    def status(self, path: str) -> Optional[os.stat_result]:
        """The status of what is at a path of the tree; of a link itself. None where nothing is."""
        with self._place(path) as (folder, name):
            try:
                return os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError:
                return None

    def holds(self, entry: FileEntry) -> bool:
        """Whether a file of the right size is there, and nobody else can change it."""
        status = self.status(entry.path)
        return status is not None and self._is_ours(status, entry.size)

    def _is_ours(self, status: os.stat_result, size: int) -> bool:
        is_file = stat.S_ISREG(status.st_mode)
        return is_file and status.st_size == size and not self._owner.is_foreign(status)

    def sha256(self, entry: FileEntry, count: Callable[[int], None]) -> Optional[str]:
        """Hex SHA-256 of a file that is there in its right size, and that nobody else can change;
        None for anything else.

        `count` is called with the bytes of each chunk that was read.
        """
        with self._place(entry.path) as (folder, name):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
            except OSError:
                return None

        try:
            if not self._is_ours(os.fstat(fd), entry.size):
                return None
            return sha256_file(Path(f"/proc/self/fd/{fd}"), count)
        except OSError:
            return None
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Make all names durable, also in folders that workers made."""
        innermost_first = os.walk(self.root, topdown=False)
        for folder, _, _ in innermost_first:
            fsync_dir(Path(folder))


class Journal:
    """How far the weights of a model are on disk, for a run after this one was killed.

    It is a hint: what it counts as written is hashed again, and written anew if it is wrong.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._fd = tree.open(JOURNAL_PATH, flags)

    def read(self, files: Iterable[FileEntry]) -> Dict[str, int]:
        """Path -> bytes written, for those of `files` that have a checkpoint and a work file.

        Of several checkpoints of a file the last one counts.
        """
        known = {(entry.path, entry.sha256): entry for entry in files}
        written: Dict[str, int] = {}
        content = pread_exactly(self._fd, LARGEST_JOURNAL, 0)
        for line in content.splitlines():
            try:
                path, sha256, size = parse_json(line)
                entry = known[path, sha256]
            except (ValueError, TypeError, KeyError):  # torn by a power cut, or of another version
                continue
            if type(size) is not int or not 0 < size <= entry.size:
                continue
            work = replace(entry, path=work_path(path))  # of the final size, as FolderSink makes it
            if self._tree.holds(work):
                written[path] = size

        return written

    def note(self, entry: FileEntry, size: int) -> None:
        """Append a checkpoint, durably: the first `size` bytes of a file, which are durable."""
        checkpoint = [entry.path, entry.sha256, size]
        line = json.dumps(checkpoint) + "\n"
        write_all(self._fd, line.encode())
        os.fdatasync(self._fd)

    def close(self, remove: bool) -> None:
        """Close it, and remove it from the disk when no run will need it."""
        os.close(self._fd)
        if not remove:
            return
        name = os.path.basename(JOURNAL_PATH)
        with contextlib.suppress(FileNotFoundError), self._tree.folder(WORK_DIR) as folder:
            os.unlink(name, dir_fd=folder)


class FolderSink(Sink):
    """Restores files below a tree, except those of which the paths are in `kept`.

    `resume` has the bytes (path -> size) that an earlier run wrote of a file. Without `reserve` no
    blocks are reserved for new files. `finished` are the paths of files that are complete.

    Each worker has a copy of the sink, and writes to files that another worker began.
    """

    keeps = True

    def __init__(
        self,
        tree: Tree,
        kept: AbstractSet[str],
        journal: Journal,
        resume: Mapping[str, int],
        reserve: bool = True,
    ) -> None:
        self._tree = tree
        self._kept = kept
        self._journal = journal
        self._resume = resume
        self._filesystem = _NOTHING_RESERVED
        if reserve:
            self._filesystem = filesystem_of(tree.root)
        self.finished: Set[str] = set()
        # Files begun here, path -> descriptor. They stay open until they are finished: fsync(2)
        # reports a failed write only to descriptors that were open by then.
        self._held: Dict[str, int] = {}
        self._lock = threading.Lock()  # the tree makes folders when it opens files

    def begin(self, entry: FileEntry) -> None:
        """Create the work file for a file, or open what an earlier run left of it."""
        if entry.path in self._kept:
            return

        with self._lock:
            if entry.path in self._resume:
                fd = self._tree.open(work_path(entry.path), os.O_RDWR)
            else:
                fd = self._tree.create(entry.path, entry.size, self._filesystem)

        self._held[entry.path] = fd

    def read(self, entry: FileEntry, offset: int, size: int) -> bytes:
        """Content that an earlier run wrote."""
        with self._file(entry) as fd:
            return pread_exactly(fd, size, offset)

    def write(
        self, entry: FileEntry, offset: int, content: Union[bytes, bytearray, memoryview]
    ) -> None:
        """Write at an offset of the work file. Raises DiskError."""
        if entry.path in self._kept:
            return
        with self._file(entry) as fd:
            pwrite_all(fd, memoryview(content), offset)

    def checkpoint(self, entry: FileEntry, size: int) -> None:
        """Make the first `size` bytes durable, then note them in the journal."""
        if entry.path in self._kept:
            return

        resumed = self._resume.get(entry.path, 0)
        if size <= resumed:
            return

        with self._file(entry) as fd:
            os.fdatasync(fd)
            self._journal.note(entry, size)

    def finish(self, entry: FileEntry) -> None:
        """The work file for PATH, which is proven, becomes PATH, durably."""
        if entry.path in self._kept:
            return

        with self._file(entry) as fd:
            os.fsync(fd)
            with self._lock:
                self._tree.publish(entry.path)
            os.fsync(fd)  # again: see rename_durably

        self.release(entry)
        self.finished.add(entry.path)

    def abandon(self, entry: FileEntry, lost: bool) -> None:
        """Remove the work file if its content is wrong.

        Where bytes are only lost, it stays: after the repair a run resumes by the journal.
        """
        self.release(entry)
        if lost or entry.path in self._kept:
            return
        self._tree.discard(entry.path)

    def release(self, entry: FileEntry) -> None:
        """Close a file that was begun here."""
        fd = self._held.pop(entry.path, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close what a failure left open; work files stay until the next run."""
        for fd in self._held.values():
            os.close(fd)

    @contextlib.contextmanager
    def _file(self, entry: FileEntry) -> Iterator[int]:
        """The descriptor of the work file: the one held, or its own for a while."""
        held = self._held.get(entry.path)
        fd = held
        if fd is None:
            fd = self._tree.open(work_path(entry.path), os.O_RDWR)
        try:
            yield fd
        except OSError as exc:
            raise disk_error(exc, "write", self._tree.root / entry.path) from exc
        finally:
            if held is None:
                os.close(fd)
