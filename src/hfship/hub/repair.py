# SPDX-License-Identifier: Apache-2.0
"""Files that need not be downloaded whole.

Owns the repair of damaged files, block by block, and the reuse of equal files of this machine: in
other models and in huggingface_hub's cache. Promises: a file gets its name, or counts as repaired,
only when its hash matches.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Mapping, Sequence

from hfship.base.below import (
    Refused,
    open_regular,
    opened_below,
)
from hfship.base.errors import DiskError, IntegrityError, NetworkError, UsageError
from hfship.base.files import clone_file, opened, pread_exactly, pwrite_all
from hfship.base.manifest import MANIFEST_PATH, read_manifest
from hfship.base.settings import hub_path
from hfship.base.text import human_bytes
from hfship.hub.ranges import BLOCK_SIZE, SMALL_FILE
from hfship.hub.reader import FileAddress, is_range, read_body
from hfship.hub.retry import BLOCK_RETRY, RetryableError
from hfship.hub.verified import FileHasher, hash_file

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.hub.partial import Transfer
    from hfship.hub.protocol import RemoteFile
    from hfship.hub.transport import Transport


def mend_locally(
    client: Transport, transfers: Sequence[Transfer], root: Path, repair_only: bool
) -> Dict[str, str]:
    """Repair damaged files and take equal ones of this machine. Returns path -> SHA-256 of those
    that need not be downloaded any more.

    Large files alone, and those that no download has begun: for others it is not worth it. With
    `repair_only` nothing is taken from elsewhere. `root` is the folder with other models.
    """
    worth_it = [transfer for transfer in transfers if _is_worth_mending(transfer)]
    copies: Dict[str, List[Path]] = {}
    if worth_it and not repair_only:
        copies = copies_in(root)
    mended = {}
    unreadable: Dict[Path, str] = {}
    for transfer in worth_it:
        remote = transfer.remote
        sha256 = remote.etag
        done = repair_damaged(client, transfer)
        if not done and not repair_only:
            donors = [
                transfer.target,
                *hub_cache_blobs(transfer, os.environ),
                *copies.get(sha256, ()),
            ]
            readable = [donor for donor in donors if _is_readable(donor, unreadable)]
            done = reuse_local(transfer, readable, client.reporter)
        if done:
            mended[remote.path] = sha256

    _warn_of_unreadable(unreadable, client.reporter)
    return mended


def _is_readable(donor: Path, unreadable: Dict[Path, str]) -> bool:
    """Whether a file that may be there can be read; if not, why is noted in `unreadable`."""
    try:
        os.close(open_regular(donor))
    except (FileNotFoundError, NotADirectoryError, Refused):
        return False
    except OSError as exc:
        unreadable[donor] = exc.strerror or str(exc)
        return False
    return True


def _warn_of_unreadable(unreadable: Mapping[Path, str], reporter: Reporter) -> None:
    """Warn once, of the first."""
    if not unreadable:
        return
    first = next(iter(unreadable))
    more = ""
    if len(unreadable) > 1:
        more = f" ({len(unreadable) - 1} more like it)"
    reporter.warn(f"cannot take {first}: {unreadable[first]}; it is fetched{more}")


def _is_worth_mending(transfer: Transfer) -> bool:
    remote = transfer.remote
    if remote.sha256 is None or remote.size <= SMALL_FILE:
        return False
    return not transfer.work_file.exists()


# -- damaged files


def repair_damaged(client: Transport, transfer: Transfer) -> bool:
    """Repair the file if it lies there damaged and was right once. Is it right now?"""
    remote = transfer.remote
    if not transfer.is_ours():
        return False

    marks = transfer.log.marks_of(remote)
    if not marks:
        return False

    return repair_file(client, transfer, marks)


def repair_file(client: Transport, transfer: Transfer, marks: Sequence[str]) -> bool:
    """Mend a damaged file in place: fetch each block after which its hash leaves the marks. False
    when that does not make it right, or when so much is bad that fetching it anew is better.

    The hash up to a block's end covers everything before it, so blocks are mended in order: keep
    the state before a block, and where the mark is missed replace the block and hash it again from
    there. Raises NetworkError.
    """
    remote = transfer.remote
    address = FileAddress(client, transfer, client.endpoint)
    size = remote.size
    most = max(BLOCK_SIZE, size // 2)  # bytes that are worth fetching
    fetched = 0
    hasher = FileHasher(remote)
    target = opened_below(transfer.folder, remote.path, os.O_RDWR)
    with target as fd, client.reporter.stage("repairing", size) as stage:
        while hasher.position < size:
            start = hasher.position
            stop = min(start + BLOCK_SIZE, size)
            before = hasher.copy()
            hasher.update(pread_exactly(fd, stop - start, start))
            if not _is_right(hasher, stop, remote, marks):
                fetched += stop - start
                if fetched > most:
                    return False
                block = fetch_bytes(address, start, stop, size)
                pwrite_all(fd, block, start)
                hasher = before
                hasher.update(block)
            stage.add(stop - start)
        os.fsync(fd)
        if not hasher.matches():
            return False
        amount = f"{human_bytes(fetched)} of {human_bytes(size)}"
        client.reporter.info(f"{remote.path}: repaired, {amount} fetched")
        transfer.log.add(remote, os.fstat(fd), hasher)

    return True


def _is_right(hasher: FileHasher, stop: int, remote: RemoteFile, marks: Sequence[str]) -> bool:
    """Is everything right up to the end of the block that ends at `stop`?"""
    if hasher.position != stop:  # the file became shorter
        return False
    if stop == remote.size:
        return hasher.matches()
    block = stop // BLOCK_SIZE - 1
    return hasher.marks[block] == marks[block]


def fetch_bytes(address: FileAddress, start: int, stop: int, size: int) -> bytes:
    """[start, stop) of a file of `size` bytes, in memory. Raises NetworkError when it does not come
    after several tries."""
    retry = BLOCK_RETRY
    while True:
        try:
            return _fetch_once(address, start, stop, size)
        except (RetryableError, OSError) as exc:
            address.forget()
            retry = retry.after_failure()
            if retry.exhausted:
                step = "run the same command again"
                what = f"a block of {address.path} cannot be fetched"
                raise NetworkError(what, str(exc), step) from exc
            time.sleep(retry.wait_s())


def _fetch_once(address: FileAddress, start: int, stop: int, size: int) -> bytes:
    with address.open(start, stop) as response:
        is_range(response, start, stop, size)
        return read_body(response, stop - start)


# -- equal files elsewhere


def reuse_local(transfer: Transfer, donors: Sequence[Path], reporter: Reporter) -> bool:
    """Take a file from another place on this machine instead of the network. False when none of
    the donors has its content: that is hashed before it counts."""
    for donor in donors:
        if not _may_donate(donor, transfer):
            continue
        if _take_copy(donor, transfer, reporter):
            reporter.info(f"{transfer.remote.path}: taken from {donor}")
            return True
    return False


def _may_donate(donor: Path, transfer: Transfer) -> bool:
    """Has it the right size, and is it not the very file that is to be replaced?"""
    if not donor.is_file():
        return False
    status = donor.stat()
    if status.st_size != transfer.remote.size:
        return False
    # What lies in the place itself is copied only if somebody else could change it later.
    return transfer.owner.is_foreign(status) or donor.resolve() != transfer.target.resolve()


def _take_copy(donor: Path, transfer: Transfer, reporter: Reporter) -> bool:
    """Copy a file as cheaply as the filesystem can. A copy whose hash matches gets its name, any
    other is removed."""
    copy = transfer.work_file
    os.close(transfer.open_work_file(os.O_WRONLY | os.O_CREAT))  # no link leads to its folder
    copy.unlink()
    clone_file(donor.resolve(), copy)
    hasher = FileHasher(transfer.remote)
    with reporter.stage("reusing", transfer.remote.size) as stage:
        status = hash_file(copy, hasher, stage.add)

    if not hasher.matches():
        copy.unlink()
        return False

    with opened(copy) as fd:
        os.fsync(fd)

    transfer.publish()
    transfer.record(status, hasher)
    return True


def copies_in(root: Path) -> Dict[str, List[Path]]:
    """SHA-256 -> files with that content, by the manifests of the models in `root`."""
    copies: Dict[str, List[Path]] = {}
    manifest_paths = root.glob(f"*/{MANIFEST_PATH}")
    for manifest_path in sorted(manifest_paths):
        folder = manifest_path.parent.parent
        with contextlib.suppress(IntegrityError, DiskError):
            manifest = read_manifest(folder)
            if manifest is None:
                continue
            for entry in manifest.files:
                path = folder / entry.path
                equal = copies.setdefault(entry.sha256, [])
                equal.append(path)

    return copies


def hub_cache_blobs(transfer: Transfer, env: Mapping[str, str]) -> List[Path]:
    """Where huggingface_hub's cache keeps the content of a transfer, if it has it; [] for a user
    without a home, and so without a cache."""
    try:
        cache = hub_path(env, "hub", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    except UsageError:
        return []
    source = transfer.source
    repo = source.resolved_repo.replace("/", "--")
    return [cache / f"{source.repo_type}s--{repo}" / "blobs" / transfer.remote.etag]
