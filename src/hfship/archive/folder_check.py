# SPDX-License-Identifier: Apache-2.0
"""The proof of a model folder by its manifest.

Promises: every byte of every file that the manifest lists is read. Never: changes the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, List, Optional, Sequence

from hfship.archive.damage import Damage
from hfship.archive.schedule import workers_for
from hfship.archive.verify import DamageError
from hfship.base.content import folder_content
from hfship.base.errors import IntegrityError, command_line
from hfship.base.files import sha256_file
from hfship.base.manifest import listed_paths
from hfship.base.text import shorten
from hfship.base.wholeness import require_whole
from hfship.base.workers import Workers

if TYPE_CHECKING:
    from hfship.base.manifest import FileEntry, Manifest
    from hfship.base.report import Reporter


def check_folder(folder: Path, manifest: Manifest, jobs: int, reporter: Reporter) -> List[Damage]:
    """Files of a model folder that are missing or not what the manifest says.

    `jobs` is the number of worker processes at most.
    """

    def check(count: Callable[[int], None], entry: FileEntry) -> Optional[Damage]:
        path = folder / entry.path
        return check_file(path, entry, count)

    size = manifest.size
    count = workers_for(jobs, size)
    with reporter.stage("verify", size) as stage, Workers(count, check, stage.add) as workers:
        results = workers.map(manifest.files)
        found = list(stage.each(results, len(manifest.files)))

    return [damage for damage in found if damage]


def check_file(path: Path, entry: FileEntry, count: Callable[[int], None]) -> Optional[Damage]:
    """What is wrong with one file; None when it is as listed.

    `count` is called with the bytes of each chunk that was read.
    """
    try:
        status = path.stat()
        size = status.st_size
        if size != entry.size:
            return Damage(f"{entry.path} has {size} bytes instead of {entry.size}")
        sha256 = sha256_file(path, count)
    except OSError as exc:
        if path.exists():
            return Damage(f"{entry.path} cannot be read: {exc.strerror}")
        return Damage(f"{entry.path} is missing")

    if sha256 == entry.sha256:
        return None

    return Damage(f"{entry.path} has SHA-256 {sha256}, the manifest says {entry.sha256}")


def require_whole_folder(folder: Path, manifest: Manifest, next_step: str) -> None:
    """Refuse a folder that tells itself that it is not whole, where no Hub vouches for its files:
    the sums of whoever packed it prove a gap as well as a model.

    Raises IncompleteError, IntegrityError, DiskError.
    """
    insisted_on = manifest.faults or manifest.partial or manifest.left_out
    if manifest.source or insisted_on:
        return

    sizes = {entry.path: entry.size for entry in manifest.files}
    vouched = not manifest.unproven  # else the manifest lists what came, whatever that is
    require_whole(folder, sizes, next_step, listed=vouched)


def folder_error(folder: Path, manifest: Manifest, damages: Sequence[Damage]) -> DamageError:
    """The damage of a model folder as an error, with the command that repairs it."""
    what = f"{folder} is not what its manifest says"
    unpack = command_line("hfship", "unpack", manifest.name, "-o", folder.parent)
    repair = f"{unpack}\nor fetch it again: only damaged files are replaced"
    return DamageError(what, damages, repair)


def require_nothing_else(folder: Path, manifest: Manifest) -> None:
    """Refuse files that the manifest does not list, where a key is to vouch for the folder. Raises
    IntegrityError."""
    extra = unlisted_files(folder, manifest)
    if not extra:
        return
    raise IntegrityError(
        f"{folder} holds files that nobody signed",
        f"not in the manifest, which a key was asked to vouch for: {shorten(extra)}",
        "remove them, or move them elsewhere",
    )


def unlisted_files(folder: Path, manifest: Optional[Manifest]) -> List[str]:
    """What lies in a folder and its manifest does not list, notes aside; all without a manifest.

    Raises IntegrityError for links that lead nowhere and for special files.
    """
    listed = listed_paths(manifest)
    content = folder_content(folder, listed)
    extra = [path for path, _ in content.files if path not in listed]
    return [*extra, *content.never]
