# SPDX-License-Identifier: Apache-2.0
"""`hfship serve NAME --rollback`: a version that was kept becomes NAME again, and is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfship.archive.kept import NEWEST, go_back, kept_versions
from hfship.base.errors import command_line
from hfship.commands.names import find_folder, served_folder

if TYPE_CHECKING:
    from hfship.commands.context import Context


def roll_back(word: str, wanted: str, context: Context) -> None:
    """Put the version that is `wanted` into the place of a model; see `version_to_place`. Raises as
    go_back."""
    settings, reporter = context.settings, context.reporter
    folder = find_folder(word, [settings.site_models_dir, settings.models_dir])
    folder = folder or served_folder(word, settings) or _aside(word, context)
    went = go_back(folder, wanted)
    if went.before == went.now:
        reporter.info(f"{folder.name} is at {went.now.label}, as it was asked for")
        return
    before = "none"
    if went.before:
        before = went.before.label
    reporter.info(f"{folder.name}: {before} -> {went.now.short}, which was kept")
    if not wanted:
        forward = command_line("hfship", "serve", word, "--rollback", NEWEST)
        reporter.info(f"forward again: {forward}; the image stays, --image names another one")


def _aside(word: str, context: Context) -> Path:
    """The place of a model of which only versions are there that were put aside: a run was killed
    before another took it."""
    settings = context.settings
    for root in (settings.site_models_dir, settings.models_dir):
        if kept_versions(root / word):
            return root / word
    return settings.site_models_dir / word
