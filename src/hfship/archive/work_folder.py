# SPDX-License-Identifier: Apache-2.0
"""NAME~incomplete, in which a model is restored until all of it is proven.

Owns the lock of that folder, what may stay in it from an earlier run, and the moment at which it
becomes NAME. Its format is docs/formats.md, "Unpack under way".

Promises: what was NAME before is there until the new folder has its place; a folder is taken over
or removed only if it has the mark that we put there, and if nobody else owns it or may write to it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Tuple

from hfship.archive.layout import WEIGHT_SIZE
from hfship.archive.tree import JOURNAL_PATH, Tree
from hfship.base.below import folder_below, open_in, owner_in, sync_folder
from hfship.base.content import (
    MARK_PATH,
    REPLACED,
    UNFINISHED,
    work_path,
)
from hfship.base.errors import IntegrityError
from hfship.base.files import (
    WORK_DIR,
    disk_errors,
    make_dir,
    remove_if_empty,
    rename_durably,
)
from hfship.base.locks import FolderLock

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest


def work_folder_of(target: Path) -> Path:
    """NAME~incomplete beside NAME."""
    return target.with_name(target.name + UNFINISHED)


@contextlib.contextmanager
def locked_tree(folder: Path, mark: bool = True) -> Iterator[Tuple[Tree, FolderLock]]:
    """A folder to restore into, made if need be, and its lock; removed if nothing came into it.

    With `mark` it is one to work in, which must be ours. Raises InUseError, IntegrityError for a
    symbolic link, or for a folder that we did not make; DiskError.
    """
    if mark:
        _require_ours(folder)
    with Tree(folder) as tree:
        with tree.folder(WORK_DIR):
            pass  # it is no link, so what is written by path below is written here
        try:
            with FolderLock(folder) as lock:
                if mark:
                    put_mark(folder)
                yield tree, lock
        finally:
            remove_if_empty(folder)


def _require_ours(folder: Path) -> None:
    """Refuse to work in, or to remove, a folder that hfship has not made for that. Raises
    IntegrityError, DiskError."""
    with disk_errors("use", folder):
        if not os.path.lexists(folder):
            return
        owner = owner_in(folder.parent)
        foreign = owner.is_foreign(folder.lstat())
        if not foreign and (has_mark(folder) or _is_empty(folder)):
            return

    raise IntegrityError(
        f"{folder} is in the way",
        "hfship would work in a folder of this name, but did not make this one",
        f"look at what it is, then move or remove {folder}",
    )


def _is_empty(folder: Path) -> bool:
    """Whether a folder has nothing but what a run had made when it was killed at its very start."""
    left = [path for path in _files_and_links(folder) if path.parent != folder / WORK_DIR]
    return not left


def has_mark(folder: Path) -> bool:
    """Whether hfship made a folder to work in, or put it aside, and so may remove it."""
    try:
        status = os.lstat(folder / MARK_PATH)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode)


def put_mark(folder: Path) -> None:
    """Say in a folder, durably, that hfship may remove it. Raises DiskError."""
    make_dir(folder / WORK_DIR)
    with disk_errors("write", folder / MARK_PATH), folder_below(folder, WORK_DIR) as work:
        os.close(open_in(work, os.path.basename(MARK_PATH), os.O_WRONLY | os.O_CREAT))
        sync_folder(work)


def remove_leftovers(work: Path, manifest: Manifest) -> None:
    """Remove what an earlier run, maybe of another model, left and this one has no use for.

    Files of the manifest stay, which are proven later, and weights that are on their way.
    """
    usable = {
        JOURNAL_PATH,
        MARK_PATH,
        f"{WORK_DIR}/lock",
        f"{WORK_DIR}/lease",
    }
    for entry in manifest.files:
        usable.add(entry.path)
        if entry.size >= WEIGHT_SIZE:
            usable.add(work_path(entry.path))

    for path in _files_and_links(work):
        inside = path.relative_to(work)
        if path.is_symlink() or inside.as_posix() not in usable:
            path.unlink()


def _files_and_links(work: Path) -> Iterator[Path]:
    """All below a folder that is no folder itself; links to folders are not followed."""
    for root, folders, names in os.walk(work):
        for name in names:
            yield Path(root, name)
        for name in folders:
            path = Path(root, name)
            if path.is_symlink():
                yield path


def publish_folder(work: Path, target: Path) -> None:
    """NAME~incomplete becomes NAME, durably; what was NAME before is removed after that.

    Raises IntegrityError if something else is called NAME~replaced; DiskError.
    """
    replaced = target.with_name(target.name + REPLACED)
    _require_ours(replaced)
    with disk_errors("rename to", target):
        if target.exists():
            remove_work_folder(replaced)
            put_mark(target)
            os.rename(target, replaced)
        rename_durably(work, target)
        with contextlib.suppress(FileNotFoundError):
            (target / MARK_PATH).unlink()

    remove_work_folder(replaced)


def remove_work_folder(folder: Path) -> None:
    """Remove a folder that is ours, its mark last: what a kill leaves of it can still be removed.
    What cannot be removed stays."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(folder):
            if name == WORK_DIR:
                continue
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
