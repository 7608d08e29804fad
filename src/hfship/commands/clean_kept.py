# SPDX-License-Identifier: Apache-2.0
"""`hfship clean --kept`: earlier versions of models, which a site keeps for a rollback.

Promises: the version in place stays, and so does one with which a container still runs.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence, Tuple

from hfship.archive.kept import drop, kept_beyond
from hfship.archive.work_folder import locked_tree, work_folder_of
from hfship.base.content import kept_of
from hfship.base.errors import Exit
from hfship.base.files import disk_errors
from hfship.commands.names import readable_deployments
from hfship.commands.results import leftover_row, remove_rows

if TYPE_CHECKING:
    from hfship.archive.kept import KeptVersion
    from hfship.commands.context import Context
    from hfship.serve.terms import Plan

Inode = Tuple[int, int]  # a device, and its number there


def clean_kept(context: Context) -> Exit:
    """Show which go, ask, remove. Raises UsageError, DiskError, InUseError."""
    root = context.settings.site_models_dir
    plans = [one.plan for one in readable_deployments(context, context.reporter.warn)]
    gone: List[KeptVersion] = []
    for target in _models_with_kept(root):
        for one in kept_beyond(target, context.args.kept):
            by = _served_by(target, one, plans)
            if by:
                context.reporter.info(f"kept: {one.folder}: the deployment {by} runs with it")
            else:
                gone.append(one)
    return remove_rows(_rows(gone), "version", _remove, context)


def _models_with_kept(root: Path) -> List[Path]:
    """The models that have kept versions beside them. Raises DiskError."""
    if not root.is_dir():
        return []
    with disk_errors("list", root):
        names = [path.name for path in root.iterdir()]
    models = {kept_of(name) for name in names}
    return [root / name for name in sorted(models - {""})]


def _served_by(target: Path, kept: KeptVersion, plans: Sequence[Plan]) -> str:
    """The deployment whose container was made when this version was NAME, and goes on with its
    files; "": none."""
    for plan in plans:
        same_model = Path(plan.model_dir) == target
        if same_model and plan.model_version and kept.version.id.startswith(plan.model_version):
            return plan.name
    return ""


def _rows(gone: Sequence[KeptVersion]) -> List[Dict[str, Any]]:
    """What goes, with the bytes that become free: files that versions have in common are hard
    links, and free with the last of them."""
    left: Dict[Inode, int] = {}
    rows = []
    for one in gone:
        files, size = 0, 0
        for path in one.folder.rglob("*"):
            info = path.lstat()
            if not stat.S_ISREG(info.st_mode):
                continue
            files += 1
            inode = (info.st_dev, info.st_ino)
            left[inode] = left.get(inode, info.st_nlink) - 1
            if left[inode] == 0:
                size += info.st_size
        what = f"{one.version.label}, in place until {one.until[:10]}"
        rows.append(leftover_row(str(one.folder), what, files, size, [str(one.folder)]))
    return rows


def _remove(row: Mapping[str, Any]) -> None:
    """Remove a version, unless a command is at work on its model. Raises InUseError, DiskError."""
    folder = Path(row["where"])
    target = folder.with_name(kept_of(folder.name))
    with locked_tree(work_folder_of(target)):
        drop(folder)
