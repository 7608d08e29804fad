# SPDX-License-Identifier: Apache-2.0
"""`hfship clean --images`: images that were fetched, and those of docker that nothing uses."""

from __future__ import annotations

import contextlib
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, List, Mapping

from hfship.base.errors import Exit
from hfship.base.files import disk_errors
from hfship.base.locks import FolderLock
from hfship.base.manifest import read_manifest
from hfship.commands.results import leftover_row, remove_rows

if TYPE_CHECKING:
    from hfship.commands.context import Context

FOLDERS, DOCKER = "folders", "docker"  # values of --images


def clean_images(context: Context) -> Exit:
    """Show which go, ask, remove. Raises DiskError, HostError."""
    rows = _folder_rows(context.settings.models_dir)
    if context.args.images == DOCKER:
        rows += _docker_rows(_deployed(context))
    return remove_rows(rows, "image", _remove, context)


def _folder_rows(root: Path) -> List[Dict[str, Any]]:
    """The images that were fetched."""
    rows = []
    for path in sorted(root.glob("*/oci-layout")):
        folder = path.parent
        manifest = read_manifest(folder)
        if manifest is None or manifest.image is None:
            continue
        what = f"image {manifest.image.name}, fetched"
        row = leftover_row(str(folder), what, len(manifest.files), manifest.size, [str(folder)])
        rows.append(row)
    return rows


def _deployed(context: Context) -> FrozenSet[str]:
    """The images of our deployments, also of those that are stopped."""
    from hfship.commands.names import readable_deployments

    deployments = readable_deployments(context, context.reporter.warn)
    return frozenset(deployment.plan.image_id for deployment in deployments)


def _docker_rows(deployed: FrozenSet[str]) -> List[Dict[str, Any]]:
    """docker's images that no container and no deployment uses. Raises HostError."""
    from hfship.serve.engines import unused_images

    rows = []
    for image in unused_images():
        if image.id in deployed:
            continue
        rows.append(leftover_row(DOCKER, f"image {image.name}, unused", 1, image.size, [image.id]))
    return rows


def _remove(row: Mapping[str, Any]) -> None:
    """Remove an image. Raises InUseError, DiskError, HostError."""
    from hfship.serve.engines import remove_image

    (path,) = row["paths"]
    if row["where"] == DOCKER:
        remove_image(path)
    else:
        _remove_folder(Path(path))


def _remove_folder(folder: Path) -> None:
    """Its manifest first, so that what a kill leaves counts as unfinished. Raises InUseError."""
    taken_away = threading.Event()
    with FolderLock(folder, taken_away.set), disk_errors("remove", folder):
        with contextlib.suppress(FileNotFoundError):
            (folder / ".hfship/manifest.json").unlink()
        shutil.rmtree(folder)
