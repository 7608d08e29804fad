# SPDX-License-Identifier: Apache-2.0
"""One hfship at a time per folder, on local and on network filesystems.

Owns two files in the folder's .hfship: `lock`, empty, which carries an flock; and `lease`, for
filesystems whose flock does nothing: JSON {"host", "pid", "start", "boot_id"} of its owner, whose
time of modification says when the owner was last seen. No link is followed to either; a lease that
is none names no owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterator, Optional

from hfship.base.below import (
    folder_below,
    open_in,
    opened_below,
    remove_below,
    stat_below,
    sync_folder,
)
from hfship.base.errors import IncompleteError
from hfship.base.files import WORK_DIR, disk_errors, make_dir, write_all, write_below
from hfship.base.reading import parse_json, read_below
from hfship.base.settings import typed_fields
from hfship.base.text import printable
from hfship.base.values import asdict, dataclass

LEASE_BEAT_S = 10.0
LEASE_EXPIRY_S = 60.0
LOCK_POLL_S = 0.2  # of a lock that is waited for
_LOCK = f"{WORK_DIR}/lock"
_LEASE = f"{WORK_DIR}/lease"
_LARGEST_LEASE = 4096  # bytes


@lru_cache(maxsize=None)
def boot_id() -> str:
    """What differs after every boot; "" when the kernel does not say. While it is the same, process
    ids and what is in the page cache are the same too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def process_start(pid: int) -> str:
    """When a process of this machine started (clock ticks since boot, field 22 of
    proc_pid_stat(5)).

    "" when there is none, or only a zombie.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

    # The second field is the name in parentheses, which may have spaces and parentheses itself.
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in "ZX":
        return ""

    return fields[19]


def still_runs(pid: int, start: str, boot: str) -> bool:
    """Whether the process of which these three were written down is there, and not a later one that
    was given its number."""
    if not start or boot != boot_id():
        return False
    return process_start(pid) == start


def host_name() -> str:
    """The name of this host, as socket.gethostname() has it; that module takes longer to load."""
    return os.uname().nodename


class InUseError(IncompleteError):
    """Another hfship holds the folder or the archive. `pid` is its process on this host, else 0."""

    def __init__(self, what: str, why: str, next_step: str, pid: int = 0) -> None:
        super().__init__(what, why, next_step)
        self.pid = pid


@dataclass(frozen=True)
class Owner:
    """The process that a lease names."""

    host: str = ""
    pid: int = 0
    start: str = ""
    boot_id: str = ""

    @property
    def label(self) -> str:
        """For people: the process and where it runs. A lease may have been written by anybody."""
        host = printable(self.host)[:80]
        return f"process {self.pid or '?'} on {host or '?'}"

    @property
    def is_here(self) -> bool:
        """Was it started on this kernel, in whatever container, or on a host of this name?"""
        if self.boot_id and self.boot_id == boot_id():
            return True
        return self.host == host_name()


def read_owner(content: bytes) -> Owner:
    """The owner in a lease. Raises ValueError for what is none."""
    value = parse_json(content)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    fields = typed_fields(Owner(), value)
    owner = Owner(**fields)
    if owner.pid <= 0:
        raise ValueError(f"its process is {owner.pid}")
    return owner


class FolderLock:
    """One hfship at a time per folder: an flock on `.hfship/lock`, and a lease, `.hfship/lease`,
    that its owner touches every LEASE_BEAT_S. A context manager: entering raises InUseError and
    DiskError.

    A lease is over when its owner is provably dead, or silent for LEASE_EXPIRY_S: then `doubtful`
    is True, and the new owner must not go on in files that the old one may still have open.
    `on_loss` is called, in a thread, when somebody else took our lease. So a wrong judgement costs
    bandwidth, never bytes.
    """

    def __init__(self, folder: Path, on_loss: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.doubtful = False
        self._on_loss = on_loss
        pid = os.getpid()
        self._owner = Owner(host_name(), pid, process_start(pid), boot_id())
        self._fd = -1
        self._released = threading.Event()

    def __enter__(self) -> FolderLock:
        make_dir(self.folder)
        with disk_errors("lock", self.folder / _LOCK):
            with folder_below(self.folder, WORK_DIR, make=True) as work:
                self._fd = open_in(work, "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._take_lease()
            except BlockingIOError as exc:
                os.close(self._fd)
                raise self._in_use(self._read_lease()) from exc
            except BaseException:
                os.close(self._fd)
                raise

        keeper = threading.Thread(target=self._keep_lease, daemon=True)
        keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        if self._read_lease() == self._owner:
            remove_below(self.folder, _LEASE)
        os.close(self._fd)

    def remove(self) -> None:
        """Remove both files: the folder is finished and about to get its final name."""
        self._released.set()
        remove_below(self.folder, _LEASE)
        remove_below(self.folder, _LOCK)
        with folder_below(self.folder, WORK_DIR) as work:
            sync_folder(work)

    def _read_lease(self) -> Optional[Owner]:
        """The owner that the lease names; None when it is not there, torn, or no lease."""
        with contextlib.suppress(OSError, ValueError):
            return read_owner(read_below(self.folder, _LEASE, _LARGEST_LEASE))
        return None

    def _take_lease(self) -> None:
        """Write our lease, over one that is over. Raises InUseError, DiskError, OSError."""
        with contextlib.suppress(FileExistsError):
            self._create_lease()
            return

        owner = self._read_lease()
        if owner and owner.is_here:
            # We hold the flock: whoever ran on this kernel, in whatever container, is dead, and so
            # is who ran before this host was started anew. Unless the filesystem has no flock.
            if still_runs(owner.pid, owner.start, owner.boot_id):
                raise self._in_use(owner)
        else:
            # In the future lies none that is touched: the clock was set back, or somebody lies.
            if abs(self._lease_age_s()) < LEASE_EXPIRY_S:
                raise self._in_use(owner)
            # A torn lease names no owner: one that lives would have mended it within a beat.
            self.doubtful = owner is not None

        write_below(self.folder, _LEASE, self._text())

    def _create_lease(self) -> None:
        """Raises FileExistsError when there is a lease, OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with opened_below(self.folder, _LEASE, flags, 0o644) as fd:
            try:
                write_all(fd, self._text().encode())
                # Emptied by a power cut it would name no owner, and hold until LEASE_EXPIRY_S.
                os.fsync(fd)
            except OSError:
                remove_below(self.folder, _LEASE)
                raise

    def _text(self) -> str:
        return json.dumps(asdict(self._owner))

    def _lease_age_s(self) -> float:
        """Seconds since the owner was seen, by the clock of the file server, which may not be
        ours."""
        os.utime(self._fd)
        now = os.fstat(self._fd)
        seen = stat_below(self.folder, _LEASE)
        return now.st_mtime - seen.st_mtime

    def _in_use(self, owner: Optional[Owner]) -> InUseError:
        owner = owner or Owner()
        expiry = f"{LEASE_EXPIRY_S:.0f} s"
        pid = 0
        if owner.host == host_name():
            pid = owner.pid
        return InUseError(
            f"{self.folder} is in use by another hfship",
            f"{owner.label} holds {self.folder / _LOCK}",
            f"wait for it, or stop it; a host that is gone is forgotten after {expiry}",
            pid,
        )

    def _keep_lease(self) -> None:
        """Touch the lease until it is released, or lost."""
        while not self._released.wait(LEASE_BEAT_S):
            if self._read_lease() != self._owner:
                self._on_loss()
                return
            with contextlib.suppress(OSError), opened_below(self.folder, _LEASE) as fd:
                os.utime(fd)


@contextlib.contextmanager
def lock_within(folder: Path, patience_s: float) -> Iterator[bool]:
    """The FolderLock of a folder, waited for where another hfship has it: whether that was so.

    Raises InUseError when it is not free within `patience_s`, DiskError.
    """
    deadline = time.monotonic() + patience_s
    has_waited = False
    with contextlib.ExitStack() as stack:
        while not _is_locked(stack, folder, deadline):
            has_waited = True
            time.sleep(LOCK_POLL_S)
        yield has_waited


def _is_locked(stack: contextlib.ExitStack, folder: Path, deadline: float) -> bool:
    """Whether the lock could be taken, which the stack then releases."""
    lock = FolderLock(folder)
    try:
        stack.enter_context(lock)
    except InUseError:
        if time.monotonic() > deadline:
            raise
        return False
    return True
