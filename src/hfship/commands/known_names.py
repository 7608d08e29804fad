# SPDX-License-Identifier: Apache-2.0
"""Names of what is here, for a shell that completes them.

Promises: quick, since somebody has just pressed TAB: folders are listed, and no more than a few
small files are read; what cannot be read has no names. Never: asks docker, or the network.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Sequence

from hfship.base.errors import HfshipError
from hfship.base.manifest import MANIFEST_PATH, read_manifest

if TYPE_CHECKING:
    from hfship.base.settings import ModelsFile, Settings

MOST_NAMES = 1000
MOST_MANIFESTS = 40  # that are read for the names of their repositories
LARGE_MANIFEST = 1 << 20  # bytes: reading it would be felt
_ARCHIVE = re.compile(r"([^.].*)\.tar\.zst(\.0*1)?")  # whole, or its first part


def names_of(kind: str, settings: Settings) -> List[str]:
    """The names of one kind, in order: models, archives, deployments, jobs, repos."""
    names = _KINDS[kind]
    found = set(names(settings))
    in_order = sorted(found)
    return in_order[:MOST_NAMES]


def listed_names(command: str, file: ModelsFile) -> List[str]:
    """The words by which a command knows the models of a models file."""
    words = []
    for model in file.models:
        if command == "fetch":
            words.append(model.repo)
        words.append(model.name)
    return [word for word in words if word]


def _entries(folder: Path) -> List[str]:
    """What a folder holds, without what is hidden."""
    names: List[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    visible = [name for name in names if not name.startswith((".", "_"))]
    visible.sort()
    return visible


def _models(settings: Settings) -> Iterator[str]:
    for folder in (settings.models_dir, settings.site_models_dir):
        for name in _entries(folder):
            if os.path.isdir(folder / name):
                yield name


def _repos(settings: Settings) -> Iterator[str]:
    """The repositories that models here came from."""
    for name in _entries(settings.models_dir)[:MOST_MANIFESTS]:
        path = settings.models_dir / name
        with contextlib.suppress(HfshipError, OSError):
            if os.path.getsize(path / MANIFEST_PATH) > LARGE_MANIFEST:
                continue
            manifest = read_manifest(path)
            if manifest and manifest.source:
                yield manifest.source.repo


def _archives(settings: Settings) -> Iterator[str]:
    for folder in (settings.package_dir, settings.transfer_dir):
        for name in _entries(folder):
            archive = _ARCHIVE.fullmatch(name)
            if archive:
                yield archive[1]


def _deployments(settings: Settings) -> Iterator[str]:
    folder = settings.deploy_dir
    for name in _entries(folder):
        plan = folder / name / "plan.json"
        if os.path.exists(plan):
            yield name


def _jobs(settings: Settings) -> Iterator[str]:
    for name in _entries(settings.log_dir):
        stem, ending = os.path.splitext(name)
        if ending == ".json":
            yield stem


_KINDS: Dict[str, Callable[[Settings], Iterator[str]]] = {
    "models": _models,
    "archives": _archives,
    "deployments": _deployments,
    "jobs": _jobs,
    "repos": _repos,
}


def paths_that_end(start: str, endings: Sequence[str]) -> List[str]:
    """The files with one of these endings, and the folders, whose path begins with `start`; of
    folders with a slash behind them."""
    before, _, beginning = start.rpartition("/")
    prefix = f"{before}/" if "/" in start else ""
    folder = Path(os.path.expanduser(prefix or "."))
    found = []
    for name in _entries(folder):
        if not name.startswith(beginning):
            continue
        if os.path.isdir(folder / name):
            found.append(f"{prefix}{name}/")
        elif name.endswith(tuple(endings)):
            found.append(prefix + name)
    return found[:MOST_NAMES]
