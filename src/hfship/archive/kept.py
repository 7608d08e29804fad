# SPDX-License-Identifier: Apache-2.0
"""Earlier versions of a model, kept beside the one that replaced them.

NAME~VERSION, of the first 12 hex digits of its id (archive/versions.py), is a model folder that was
NAME until another version came. It has the mark of a work folder, and
  .hfship/kept         the UTC time at which it was NAME last
NAME itself has, where an operator went back to it,
  .hfship/rolled-back  the id of the version that it was rolled back from
Files that two versions have in common are hard links, so a version costs what differs.

Promises: a version is put aside and into its place by a rename each; a run that was killed between
the two is gone on with by the next. Never: removes what has no mark.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence

from hfship.archive.versions import version_of
from hfship.archive.work_folder import (
    has_mark,
    locked_tree,
    put_mark,
    remove_work_folder,
    work_folder_of,
)
from hfship.base.below import remove_below
from hfship.base.content import MARK_PATH, REPLACED, is_kept, kept_name
from hfship.base.errors import IntegrityError, NotFoundError, command_line
from hfship.base.files import WORK_DIR, disk_errors, rename_durably, write_below
from hfship.base.manifest import MANIFEST_PATH, read_manifest
from hfship.base.reading import read_below
from hfship.base.text import utc_exact
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.versions import Version

KEPT_PATH = f"{WORK_DIR}/kept"
ROLLED_BACK_PATH = f"{WORK_DIR}/rolled-back"
NEWEST = "newest"  # stands for the version that was in place last


@dataclass(frozen=True)
class KeptVersion:
    """A version beside NAME: its folder, and the UTC time at which it was NAME last. `chosen` is
    the id of the version from which a rollback went, or was about to go, to this one."""

    folder: Path
    version: Version
    until: str = ""
    chosen: str = ""


# -- which ones


def to_drop(kept: Sequence[KeptVersion], present: str, keep: int) -> List[KeptVersion]:
    """The kept versions, oldest first, that go when `keep` of them stay beside the version with the
    id `present`."""
    others: List[KeptVersion] = []
    same: List[KeptVersion] = []
    for one in kept:
        if one.version.id == present:
            same.append(one)
        else:
            others.append(one)
    gone = len(others) - keep
    if gone > 0:
        same += others[:gone]
    return same


def version_to_place(
    kept: Sequence[KeptVersion], present: Optional[Version], rolled_back: str, wanted: str
) -> Optional[KeptVersion]:
    """The kept version that shall be NAME; None where that is NAME already.

    `wanted` is "" for the one that was NAME before the `present` one, NEWEST for the way back from
    that, or digits with which an id begins. `kept` is oldest first; `rolled_back` is the id of what
    NAME was rolled back from. Without a `present` one a run was killed between its two renames: it
    is gone on with. Raises NotFoundError.
    """
    wanted = _id_of(wanted, kept, present, rolled_back)
    if present and wanted and present.id.startswith(wanted):
        return None
    found = [one for one in kept if one.version.id.startswith(wanted)]
    if not found or not wanted:
        raise _nothing_kept(kept, wanted)
    return found[-1]


def _id_of(
    wanted: str, kept: Sequence[KeptVersion], present: Optional[Version], rolled_back: str
) -> str:
    """The id, or digits of it, that is meant; "" where nothing is kept."""
    if wanted not in ("", NEWEST):
        return wanted
    if present is None:
        return _id_after_kill(wanted, kept)
    if wanted == NEWEST:
        return rolled_back or present.id
    if rolled_back:
        return present.id
    others = [one.version.id for one in kept if one.version.id != present.id]
    return others[-1] if others else ""


def _id_after_kill(wanted: str, kept: Sequence[KeptVersion]) -> str:
    """What a run was about to put into the place of the version that it put aside last."""
    if not kept:
        return ""
    last = kept[-1]
    newest = last.version.id
    begun = [one for one in kept if one.chosen == newest]
    if wanted == "" and begun:
        return begun[-1].version.id
    if wanted == NEWEST and last.chosen:
        return last.chosen
    return newest


def _nothing_kept(kept: Sequence[KeptVersion], wanted: str) -> NotFoundError:
    step = "hfship unpack --allow-older ARCHIVE, of the version that is wanted"
    if not wanted:
        why = "unpack --all keeps the version that it replaces, unpack with --keep 1"
        return NotFoundError("no earlier version is kept", why, step)
    names = ", ".join(one.version.short for one in kept)
    return NotFoundError(f"no version {wanted[:12]} is kept", f"kept are: {names}", step)


# -- on disk


def kept_versions(target: Path) -> List[KeptVersion]:
    """The versions that are kept beside NAME, the one that was NAME last at the end. What was half
    removed, and what hfship has not made, is none of them."""
    found = []
    for folder in sorted(target.parent.glob(f"{target.name}~*")):
        if not is_kept(folder.name) or folder.is_symlink():
            continue
        if not has_mark(folder):
            continue
        with contextlib.suppress(IntegrityError):
            manifest = read_manifest(folder)
            if manifest is None:
                continue
            version = version_of(manifest)
            until = _note(folder, KEPT_PATH)
            chosen = _note(folder, ROLLED_BACK_PATH)
            kept = KeptVersion(folder, version, until, chosen)
            found.append(kept)
    return sorted(found, key=lambda one: one.until)


def rolled_back_from(target: Path) -> str:
    """The id of the version that NAME was rolled back from; "" where it was not."""
    return _note(target, ROLLED_BACK_PATH)


def _note(folder: Path, path: str) -> str:
    try:
        return read_below(folder, path).decode("ascii", "replace").strip()
    except OSError:
        return ""


def put_aside(target: Path, version: Version) -> None:
    """NAME becomes NAME~VERSION; an earlier copy of that version is removed before. Raises
    IntegrityError for something else of that name, DiskError."""
    name = kept_name(target.name, version.id)
    folder = target.with_name(name)
    if folder.exists():
        drop(folder)
    put_mark(target)
    replaced_at = utc_exact()
    write_below(target, KEPT_PATH, replaced_at + "\n")
    with disk_errors("rename to", folder):
        rename_durably(target, folder)


def put_in_place(folder: Path, target: Path, rolled_back: bool) -> None:
    """NAME~VERSION becomes NAME, which is not there. Raises DiskError."""
    notes = [KEPT_PATH, MARK_PATH]
    if not rolled_back:
        notes.append(ROLLED_BACK_PATH)
    with disk_errors("rename to", target):
        rename_durably(folder, target)
        for path in notes:
            remove_below(target, path)


def drop(folder: Path) -> None:
    """Remove a version that was kept, its manifest first: what a kill leaves of it is no model, and
    `clean` may remove it. Raises IntegrityError for what hfship has not made."""
    if not has_mark(folder) or folder.is_symlink():
        what = f"{folder} is in the way"
        why = "hfship did not put it there"
        step = f"look at what it is, then move or remove {folder}"
        raise IntegrityError(what, why, step)
    with disk_errors("remove", folder):
        remove_below(folder, MANIFEST_PATH)
        remove_work_folder(folder)


def kept_beyond(target: Path, keep: int) -> List[KeptVersion]:
    """All versions beside NAME but the `keep` that were NAME last."""
    manifest = read_manifest(target)
    present = ""
    if manifest:
        present = version_of(manifest).id
    return to_drop(kept_versions(target), present, keep)


def drop_beyond(target: Path, keep: int) -> List[Path]:
    """Remove all but the `keep` versions that were NAME last; the folders that went."""
    gone = kept_beyond(target, keep)
    for one in gone:
        drop(one.folder)
    return [one.folder for one in gone]


def mend_place(target: Path) -> Optional[Path]:
    """Where a run was killed while NAME was put aside, it becomes NAME again: what was aside, or
    None where nothing is amiss. Raises DiskError, InUseError."""
    if target.exists():
        return None
    replaced = target.with_name(target.name + REPLACED)
    kept = kept_versions(target)
    if not has_mark(replaced) and not kept:
        return None
    with locked_tree(work_folder_of(target)):
        if target.exists():
            return None
        if has_mark(replaced):
            put_in_place(replaced, target, rolled_back=False)
            return replaced
        put_in_place(kept[-1].folder, target, rolled_back=False)
    return kept[-1].folder


# -- going back


@dataclass(frozen=True)
class WentBack:
    """What a rollback did: the version that was NAME, None after a kill, and the one that is it
    now; the same two where nothing was to be done."""

    before: Optional[Version]
    now: Version


def go_back(target: Path, wanted: str) -> WentBack:
    """Put a version that was kept into the place of NAME, which is kept in its turn.

    `wanted` as in `version_to_place`: of a model that is rolled back already nothing is changed, so
    the same command can run again. Raises NotFoundError, InUseError, IntegrityError, DiskError.
    """
    if target.is_symlink():
        what = f"{target} is a symbolic link"
        why = "its versions lie where it leads to"
        raise IntegrityError(what, why, f"ls -l {target}")
    with locked_tree(work_folder_of(target)):
        present = _present(target)
        kept = kept_versions(target)
        chosen = version_to_place(kept, present, rolled_back_from(target), wanted)
        if chosen is None:
            assert present is not None
            return WentBack(present, present)
        is_rollback = wanted == ""
        if present:
            if is_rollback:
                write_below(chosen.folder, ROLLED_BACK_PATH, present.id + "\n")
            put_aside(target, present)
        put_in_place(chosen.folder, target, is_rollback)
        return WentBack(present, chosen.version)


def _present(target: Path) -> Optional[Version]:
    """The version that is NAME; None without a folder. Raises IntegrityError where it has no
    manifest."""
    if not target.exists():
        return None
    manifest = read_manifest(target)
    if manifest is None:
        step = command_line("hfship", "verify", target)
        raise IntegrityError(f"{target} has no manifest, so it cannot be kept", "", step)
    return version_of(manifest)
