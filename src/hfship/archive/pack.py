# SPDX-License-Identifier: Apache-2.0
"""From a model folder to an archive.

Owns the way from a model folder to NAME.tar.zst, whole or in parts, with what travels beside it:
NAME.tar.zst.sha256 (GNU format), hfship.pyz and READ-ME-FIRST.txt.

  plan (pack_plan) -> frames (pack_run) -> parts (part_writer) -> names (here)
                                             `-> pack_journal, for a run after a kill

Promises: a final name holds a complete file, and the sums are there before the first of them.
Never: overwrites an archive of something else without --force.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence, Tuple

from hfship.archive.files import PART_NAME, part_name
from hfship.archive.pack_before import packed_before
from hfship.archive.pack_journal import DonePart, PackJournal, WrittenPart, claim
from hfship.archive.pack_plan import SPLITS
from hfship.archive.pack_run import PackRun
from hfship.archive.sidecars import SIDECARS_SIZE, write_sidecars
from hfship.base.files import (
    INCOMPLETE,
    atomic_write,
    disk_errors,
    filesystem_of,
    free_bytes,
    make_dir,
    rename_durably,
    require_room,
)
from hfship.base.text import counted
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.pack_plan import PackPlan
    from hfship.archive.versions import Version
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter


@dataclass(frozen=True)
class Packed:
    """What pack leaves: the parts of the archive, and its manifest; `fresh` is False when they were
    there before, `replaced` the version of an archive that they replace."""

    manifest: Manifest
    parts: Tuple[WrittenPart, ...]
    seconds: float
    fresh: bool
    replaced: Optional[Version] = None

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return sum(part.size for part in self.parts)


def pack_model(
    plan: PackPlan, folder: Path, reporter: Reporter, media: Sequence[Path] = ()
) -> Packed:
    """Pack a model into `folder`, and its parts also onto further `media`, side by side.

    An archive of the same files and form that is there already is left as it is, one of an older
    commit is replaced. Raises UsageError for another one, InUseError, IntegrityError for a folder
    that is not what its manifest says, DiskError, HostError.
    """
    started = time.monotonic()
    options = plan.options
    folders = [make_dir(path) for path in (folder, *media)]
    lock = folder / (plan.archive + INCOMPLETE)
    before = None
    if not options.force:
        before = packed_before(plan, folders)
    if before and before.parts:
        _remove_journal(lock)
        # Also what a run that was killed here did not get to.
        for place in folders:
            write_sidecars(place, reporter)
        seconds = time.monotonic() - started
        return Packed(before.manifest, before.parts, seconds, fresh=False)
    replaced = None
    if before:
        replaced = before.version

    in_parts = bool(options.split)
    with claim(lock, in_parts) as fd:
        journal = PackJournal(fd, lock, plan)
        parts = _write_parts(plan, folders, journal, reporter)

    for place in folders:
        write_sidecars(place, reporter)

    seconds = time.monotonic() - started
    return Packed(plan.manifest, parts, seconds, fresh=True, replaced=replaced)


def _write_parts(
    plan: PackPlan, folders: Sequence[Path], journal: PackJournal, reporter: Reporter
) -> Tuple[WrittenPart, ...]:
    """Write what an earlier run did not complete, and give all parts their names."""
    resumed = journal.resumable(reporter)
    if resumed.parts:
        complete = counted(len(resumed.parts), "complete part")
        reporter.info(f"{plan.archive}: going on with {complete}")

    _make_room(plan, folders, resumed.parts)
    journal.begin(resumed)

    stream_size = plan.segments[-1].stop
    with reporter.stage("pack", stream_size) as stage:
        run = PackRun(plan, resumed)
        done = run.write(folders, journal, stage)

    parts = _publish(plan, folders, done)
    journal.clear()
    return parts


def _remove_journal(path: Path) -> None:
    """Remove the journal of a run that was killed when all was done but this."""
    if path.exists():
        with claim(path):
            pass


# -- room


def holes_in(path: Path, grain: int) -> int:
    """Bytes of a sparse file that are in holes, less `grain` at both ends of each: these take no
    room in an archive.

    A filesystem that knows no holes tells one at the end of the file.
    """
    found = 0
    # ENXIO: no data from here on.
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as stream:
        fd = stream.fileno()
        size = os.fstat(fd).st_size
        at = 0
        while at < size:
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            at = size
            with contextlib.suppress(OSError):
                at = os.lseek(fd, hole, os.SEEK_DATA)
            found += max(at - hole - 2 * grain, 0)

    return found


def _make_room(plan: PackPlan, folders: Sequence[Path], done: Sequence[DonePart]) -> None:
    """Remove what a killed run left of parts that are not `done`. Refuse an archive, or a file of
    it, for which there is no room in all folders together. Raises DiskError."""
    what = f"pack {plan.manifest.name}"
    needed = plan.size_at_most - _bytes_in_holes(plan)
    largest = min(needed, plan.options.split or needed)
    for folder in folders:
        require_large_files(folder, largest, what)
        _remove_stale_parts(folder, plan.archive, done)

    rooms = [free_bytes(folder) - SIDECARS_SIZE for folder in folders[1:]]
    elsewhere = sum(room for room in rooms if room > 0)
    written = sum(part.size for part in done)
    here = needed - elsewhere - written
    step = "free space, or choose another folder with -o or --to"
    require_room(folders[0], here, largest, what, step)


def _bytes_in_holes(plan: PackPlan) -> int:
    """Bytes of the model that take no room in the archive."""
    holes = 0
    for segment in plan.segments:
        if segment.entry:
            path = plan.folder / segment.entry.path
            holes += holes_in(path, plan.options.frame_size)
    return holes


def _remove_stale_parts(folder: Path, archive: str, done: Sequence[DonePart]) -> None:
    """Remove unfinished parts that are about to be written again."""
    kept = {part.path for part in done}
    for path in folder.glob(f"{archive}.*{INCOMPLETE}"):
        if path not in kept:
            path.unlink()


def require_large_files(folder: Path, size: int, what: str) -> None:
    """Refuse a filesystem that does not take files of `size` bytes, with the --split that helps."""
    limit = filesystem_of(folder).max_file_size
    if limit is None or size <= limit:
        return
    split = str(limit)
    if limit == SPLITS["fat32"]:
        split = "fat32"
    step = f"give --split {split}"
    require_room(folder, 0, size, what, step)


# -- names


def _publish(
    plan: PackPlan, folders: Sequence[Path], done: Sequence[DonePart]
) -> Tuple[WrittenPart, ...]:
    """Give the files their names, in place of those of an archive that they replace. The sums go
    first: with files of theirs missing they mark an unfinished set."""
    archive = plan.archive
    parts = []
    for number, part in enumerate(done, 1):
        name = archive
        if plan.options.split:
            name = part_name(archive, number, plan.parts_at_most)
        parts.append(WrittenPart(part.path.with_name(name), part.size, part.sha256))

    sums = "".join(f"{part.sha256}  {part.path.name}\n" for part in parts)
    for folder in folders:
        with disk_errors("write", folder):
            for path in list(folder.iterdir()):
                if is_file_of(path, archive):
                    path.unlink()
            atomic_write(folder / f"{archive}.sha256", sums)
            for unnamed, named in zip(done, parts):
                if named.path.parent == folder:
                    rename_durably(unnamed.path, named.path)
    return tuple(parts)


def is_file_of(path: Path, archive: str) -> bool:
    """Whether a file has the name of an archive, or of a part of it."""
    match = PART_NAME.match(path.name)
    if match:
        return match["archive"] == archive
    return path.name == archive
