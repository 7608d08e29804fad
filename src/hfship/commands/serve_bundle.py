# SPDX-License-Identifier: Apache-2.0
"""What `hfship serve BUNDLE` does first: the image goes into docker, the model into its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, List, Tuple

from hfship.base.errors import IntegrityError
from hfship.commands.admission import site_policy
from hfship.commands.bundles import require_no_plan, unpacked_bundle
from hfship.commands.restore import Restore, models_named, open_model, restore_opened
from hfship.commands.unpack_image import image_in, load_image

if TYPE_CHECKING:
    from hfship.commands.context import Context


def bring_bundle(context: Context, word: str) -> List[Tuple[Context, str]]:
    """The models of a delivery, unpacked, and how each is served. What is there already is proven
    and not brought again. Raises as unpack does."""
    refused = require_no_plan(context.args, word)
    if refused:
        raise refused
    key = None
    if context.args.key:
        key = Path(context.args.key)
    policy = site_policy(context)
    how = Restore(context.settings.site_models_dir, key=key, policy=policy)
    reporter = context.reporter

    def load(archive: Path) -> None:
        word = str(archive)
        (named,) = models_named([word], [])
        opened = open_model(named, how, reporter)
        image = image_in(opened)
        if image is None:
            what = f"{archive} holds no image"
            raise IntegrityError(what, "", "copy the delivery again")
        loaded = load_image(image, how, "docker", reporter)
        reporter.info(loaded.text())

    def unpack(archive: Path) -> Path:
        word = str(archive)
        (named,) = models_named([word], [])
        opened = open_model(named, how, reporter)
        restored = restore_opened(named, opened, how, reporter)
        return restored.done.folder

    return unpacked_bundle(context, word, load, unpack)
