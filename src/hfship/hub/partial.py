# SPDX-License-Identifier: Apache-2.0
"""A file under way on disk: the ranges that arrived, and the journals that say which.

While a file is under way its work file has its final size and holds the ranges that arrived, in
place. Beside it are two journals (docs/formats.md, "Fetch under way"). All three are called by the
SHA-1 of PATH:
  `.hfship/partial/SHA1.part`   the work file
  `.hfship/partial/SHA1.json`   durable, written after the bytes in its `synced` are on the disk
  `.hfship/partial/SHA1.now`    written far more often, never synced: a power cut may empty it
each of them one JSON object:
  {"format": "hfship-partial/1", "path", "size", "etag", "boot_id",
   "synced":  [[start, stop], ...]   on the disk: true after a power cut
   "written": [[start, stop], ...]}  in the page cache: true while the machine has this boot_id

Promises: a file gets its name after its content is on the disk; a journal never says more than what
is in the file. The bytes of an earlier run are hashed like any others before they count.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterable, List, NamedTuple, Optional, Tuple

from hfship.base.below import (
    Owner,
    folder_below,
    open_in,
    owner_in,
    publish_below,
    remove_below,
    stat_below,
)
from hfship.base.content import PARTIAL_DIR, work_path
from hfship.base.errors import IntegrityError
from hfship.base.files import (
    CHUNK,
    disk_errors_below,
    pread_exactly,
    preallocate,
    write_below,
)
from hfship.base.locks import boot_id
from hfship.base.manifest import MANIFEST_PATH
from hfship.base.reading import LIST_SIZE, parse_json, read_below
from hfship.base.values import dataclass
from hfship.hub.ranges import SMALL_FILE, Intervals
from hfship.hub.verified import FileHasher, write_hub_metadata

if TYPE_CHECKING:
    from hfship.base.files import Filesystem
    from hfship.base.manifest import Source
    from hfship.hub.protocol import RemoteFile
    from hfship.hub.verified import VerifiedFile, VerifiedLog

PARTIAL_FORMAT = "hfship-partial/1"
NO_JOURNAL = (ValueError, KeyError, TypeError, OverflowError)  # the last for 1e999 as an end
Spans = List[Tuple[int, int]]  # [start, stop) of bytes in a file


def is_ours(folder: Path, remote: RemoteFile) -> bool:
    """Whether a file of the right size lies in a folder, to which no link leads and which nobody
    else can change."""
    try:
        status = stat_below(folder, remote.path)
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_size != remote.size:
        return False
    return not owner_in(folder).is_foreign(status)


@dataclass(frozen=True)
class Transfer:
    """One file to fetch: what the Hub says of it, whose it is, and the folder it goes to."""

    remote: RemoteFile
    source: Source
    folder: Path
    log: VerifiedLog
    outdates: bool = False  # the manifest that lies there, which is of another commit
    hub_notes: bool = (
        True  # whether huggingface_hub's notes may lie there: no content has their names
    )

    @property
    def target(self) -> Path:
        return self.folder / self.remote.path

    @property
    def work_path(self) -> str:
        """Of the work file, below the folder."""
        return work_path(self.remote.path)

    @property
    def work_file(self) -> Path:
        return self.folder / self.work_path

    def journal_path(self, suffix: str) -> str:
        """Of a journal, "json" or "now", below the folder."""
        stem, _, _ = self.work_path.rpartition(".")
        return f"{stem}.{suffix}"

    @property
    def allocated(self) -> int:
        """Bytes that have blocks on the disk already, in the work file."""
        try:
            blocks = stat_below(self.folder, self.work_path).st_blocks
        except OSError:
            return 0
        return min(blocks * 512, self.remote.size)

    @property
    def owner(self) -> Owner:
        """Whose the files are that we make in the folder."""
        return owner_in(self.folder)

    def is_ours(self) -> bool:
        """Whether the file is in its place already, right or wrong; see `is_ours`."""
        return is_ours(self.folder, self.remote)

    def open_work_file(self, flags: int) -> int:
        """The descriptor of the work file. What is in its place and no file, or a file that
        somebody else can change, goes first. Raises OSError."""
        with folder_below(self.folder, PARTIAL_DIR, make=True) as partial:
            _, _, name = self.work_path.rpartition("/")
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=partial, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode) or self.owner.is_foreign(status):
                    os.unlink(name, dir_fd=partial)
            return open_in(partial, name, flags)

    def publish(self, journaled: bool = False) -> None:
        """Give the content, which is proven and durable, its name, durably; `journaled` as for
        publish_below. Raises OSError.

        Before that goes the manifest that it makes untrue: a folder of two commits must not pass
        for a model if we are killed now.
        """
        if self.outdates:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.folder}/{MANIFEST_PATH}")
        publish_below(self.folder, self.work_path, self.remote.path, journaled)

    def record(self, status: os.stat_result, hasher: FileHasher) -> None:
        """Remember that the file, which has its name, was proven by `hasher`."""
        self.log.add(self.remote, status, hasher)
        self.note()

    def note(self) -> None:
        """Tell huggingface_hub of the file, which has its name."""
        if self.hub_notes:
            write_hub_metadata(self.folder, self.remote, self.source.commit)


@dataclass(frozen=True)
class Journal:
    """What a journal says."""

    path: str
    size: int
    etag: str
    boot_id: str
    synced: Spans
    written: Spans

    def belongs_to(self, remote: RemoteFile) -> bool:
        """Is it about this content?"""
        if self.path != remote.path:
            return False
        if self.size != remote.size:
            return False
        return self.etag == remote.etag

    @property
    def current(self) -> bool:
        """Was it written since the machine started? "" is the boot_id where none is known."""
        return self.boot_id == boot_id() != ""

    @property
    def arrived(self) -> Spans:
        """The ranges that are in the file for sure."""
        if self.current:
            return self.written
        return self.synced

    def text(self) -> str:
        """As it is written."""
        row = {"format": PARTIAL_FORMAT, **vars(self)}
        return json.dumps(row)


def read_journal(text: bytes) -> Journal:
    """The journal of a text. Raises one of NO_JOURNAL for a text that is none."""
    row = parse_json(text)
    if row["format"] != PARTIAL_FORMAT:
        raise ValueError(f"not {PARTIAL_FORMAT}")

    return Journal(
        path=row["path"],
        size=row["size"],
        etag=row["etag"],
        boot_id=row["boot_id"],
        synced=_read_spans(row["synced"]),
        written=_read_spans(row["written"]),
    )


def _read_spans(pairs: Iterable[Tuple[Any, Any]]) -> Spans:
    spans = []
    for start, stop in pairs:
        spans.append((int(start), int(stop)))
    return spans


class PartialFile:
    """A file under way: its work file, the journals of what is in it, and a hash of its
    unbroken beginning.

    Opened at the first use, so that a repository of 100,000 files needs few descriptors.
    """

    def __init__(self, transfer: Transfer, filesystem: Filesystem) -> None:
        self.transfer = transfer
        self.hasher = FileHasher(transfer.remote)
        self._filesystem = filesystem
        # Who publishes serves all files: never held while the disk syncs, which takes seconds.
        self._lock = threading.Lock()
        self._durable = threading.Lock()  # of the durable journal; taken before the other
        self._fd = -1
        self._attempt = 0  # grows when all that arrived is forgotten
        self._synced: Spans = []  # on the disk
        self._published: Spans = []  # in the journal
        self.may_have_journals = True  # on disk, whatever they are about; `found` looks

    def found(self) -> Intervals:
        """What an earlier run left. A journal that cannot be read, or is of other content, counts
        as none: that only costs bandwidth."""
        self.may_have_journals = False
        now = self._readable("now")
        if now and now.current:
            return self._resume(now)
        journal = self._readable("json")
        if journal:
            return self._resume(journal)
        return Intervals()

    def _readable(self, suffix: str) -> Optional[Journal]:
        """A journal, if it is about our content and the work file is there."""
        transfer = self.transfer
        remote = transfer.remote
        with contextlib.suppress(OSError, *NO_JOURNAL):
            path = transfer.journal_path(suffix)
            text = read_below(transfer.folder, path, LIST_SIZE)
            self.may_have_journals = True
            journal = read_journal(text)
            if not journal.belongs_to(remote):
                return None
            status = stat_below(transfer.folder, transfer.work_path)
            if status.st_size == remote.size and not transfer.owner.is_foreign(status):
                return journal

        return None

    def _resume(self, journal: Journal) -> Intervals:
        """Go on from what a journal says."""
        self._synced = journal.synced
        size = self.transfer.remote.size
        arrived = Intervals()
        for start, stop in journal.arrived:
            first = max(0, start)
            end = min(stop, size)
            arrived.add(first, end)

        return arrived

    def create(self) -> int:
        """Have the file there, at its final size. Returns a descriptor of it; raises DiskError."""
        if self._fd >= 0:
            return self._fd

        transfer = self.transfer
        with self._lock, disk_errors_below("create", transfer.folder, transfer.work_path):
            if self._fd < 0:
                self._fd = transfer.open_work_file(os.O_RDWR | os.O_CREAT)
                if transfer.remote.size > SMALL_FILE:  # else one request brings it
                    preallocate(self._fd, transfer.remote.size, self._filesystem)
            return self._fd

    def publish(self, spans: Spans) -> None:
        """Write the journal that says: `spans` are in the file. Small files have none: they come in
        one request."""
        with self._lock:
            if spans == self._published or not self._has_journals():
                return
            self._published = spans
            self._write_journal("now", self._journal())

    def sync(self, spans: Spans) -> None:
        """Have `spans` on the disk, and then the durable journal say so. What arrives meanwhile is
        published by others: a kill must not lose what came during a sync."""
        self.publish(spans)
        with self._lock:
            if spans == self._synced or not self._has_journals():
                return
            attempt = self._attempt
            fd = os.dup(self._fd)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)
        with self._durable:
            with self._lock:
                if attempt != self._attempt or not self._has_journals():
                    return
                self._synced = spans
                journal = self._journal()
                self._write_journal("now", journal)
            self._write_journal("json", journal)

    def _has_journals(self) -> bool:
        """Is it a file with journals, and under way?"""
        return self._fd >= 0 and self.transfer.remote.size > SMALL_FILE

    def _journal(self) -> Journal:
        remote = self.transfer.remote
        return Journal(
            path=remote.path,
            size=remote.size,
            etag=remote.etag,
            boot_id=boot_id(),
            synced=self._synced,
            written=self._published,
        )

    def _write_journal(self, suffix: str, journal: Journal) -> None:
        path = self.transfer.journal_path(suffix)
        self.may_have_journals = True
        write_below(self.transfer.folder, path, journal.text(), durable=suffix == "json")

    def hash_up_to(self, stop: int) -> None:
        """Let the hash follow to byte `stop`, from the page cache. Raises IntegrityError when the
        file is shorter."""
        hasher = self.hasher
        while hasher.position < stop:
            size = min(CHUNK, stop - hasher.position)
            piece = pread_exactly(self.create(), size, hasher.position)
            if not piece:
                raise IntegrityError(
                    f"{self.transfer.work_file} became shorter",
                    "",
                    "leave the folder alone while it is fetched",
                )
            hasher.update(piece)

    def start_over(self) -> None:
        """Forget everything that arrived. No reader may be on the file."""
        self.hasher = FileHasher(self.transfer.remote)
        with self._durable, self._lock:
            self._attempt += 1
            self._synced, self._published = [], []
            if self._has_journals():
                self._write_journal("now", self._journal())

    def commit(self) -> os.stat_result:
        """Give the file, which is proven and which no reader is on, its name, durably.

        Returns its status; raises DiskError.
        """
        transfer = self.transfer
        fd = self.create()
        path = transfer.remote.path
        with disk_errors_below("finish", transfer.folder, path):
            _sync_whole(fd, transfer.remote.size)
        with self._durable, disk_errors_below("finish", transfer.folder, path):
            with self._lock:  # nothing is published from here on
                status = os.fstat(fd)
                os.close(fd)
                self._fd = -1
            transfer.publish(self._filesystem.journaled)
            if self.may_have_journals:
                for suffix in ("now", "json"):
                    remove_below(transfer.folder, transfer.journal_path(suffix))
            return status


def _sync_whole(fd: int, size: int) -> None:
    """Have a file, whose `size` bytes are proven, on the disk, and nothing behind them: a run of
    another commit, where it was larger, may have been killed before its first journal. Raises
    OSError."""
    if os.fstat(fd).st_size > size:
        os.ftruncate(fd, size)
    os.fsync(fd)


class Finished(NamedTuple):
    """A small file that a reader proved, and gave its name: its SHA-256, and what there is to
    remember; None where another file lies there by now."""

    sha256: str
    proof: Optional[VerifiedFile]


def finish_small(transfer: Transfer, fd: int, journaled: bool) -> Optional[Finished]:
    """Hash a small file that has come, from the work file `fd`, and give it its name, durably; None
    where it is not what the Hub lists, and has to be looked at by who reports. `journaled` as for
    publish_below. Raises DiskError.

    In the process that brought it: one process that names thousands of files has a core at the
    most, and its threads wait for each other.
    """
    remote = transfer.remote
    hasher = FileHasher(remote)
    with disk_errors_below("finish", transfer.folder, remote.path):
        hasher.update(os.pread(fd, remote.size, 0))
        if not hasher.matches():
            return None
        _sync_whole(fd, remote.size)
        status = os.fstat(fd)
        transfer.publish(journaled)
    proof = transfer.log.proof(remote, status, hasher)
    transfer.note()
    return Finished(hasher.sha256, proof)


def accept_file(partial: PartialFile) -> None:
    """Give a file whose hash matches its name, and remember that. Raises DiskError."""
    status = partial.commit()
    partial.transfer.record(status, partial.hasher)
