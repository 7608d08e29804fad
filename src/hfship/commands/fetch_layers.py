# SPDX-License-Identifier: Apache-2.0
"""`hfship fetch docker://...` of a model whose layers are archives, as KitOps packs them.

The layers are fetched as blobs into NAME~incomplete-layers, proven and resumed as all else, and
unpacked from there; their folder goes when the model is in its place.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

from hfship.base.errors import UsageError, command_line
from hfship.commands.admission import admit, site_policy
from hfship.commands.fetching import FetchedModel, bring
from hfship.commands.record import recorder_of

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from hfship.base.manifest import Manifest
    from hfship.commands.context import Context
    from hfship.hub.fetch import FetchPlan
    from hfship.hub.image import LayeredModel
    from hfship.hub.registry import RegistryClient

_STAGE = "~incomplete"  # of NAME.layers: `clean` knows it


def stage_of(folder: Path) -> Path:
    """The folder in which the layers of a model wait to be unpacked."""
    return folder.with_name(f"{folder.name}.layers{_STAGE}")


def layers_plan(model: LayeredModel, folder: Path) -> FetchPlan:
    """What --dry-run says: the layers, of which none is looked for."""
    from hfship.hub.fetch import FetchPlan
    from hfship.hub.protocol import Snapshot
    from hfship.hub.verified import VerifiedLog

    wanted = tuple(layer.remote for layer in model.layers)
    return FetchPlan(
        name=folder.name,
        folder=folder,
        snapshot=Snapshot(model.source, wanted),
        wanted=wanted,
        present={},
        log=VerifiedLog(stage_of(folder)),
        hub_notes=False,
    )


def fetch_layers(
    client: RegistryClient,
    model: LayeredModel,
    folder: Path,
    stop: threading.Event,
    context: Context,
) -> FetchedModel:
    """Fetch the layers, unpack them, and put the model in its place. What is here of the same
    digest stays."""
    from hfship.archive.layer_tars import Layer, restore_layers
    from hfship.archive.work_folder import put_mark
    from hfship.base.manifest import read_manifest
    from hfship.ops.stock import SERVABLE, stocked_model

    held = None
    if folder.exists():
        held = read_manifest(folder)
    same = held and held.source and held.source.commit == model.source.commit
    if held and same and not context.args.repair and stocked_model(folder).state in SERVABLE:
        return _fetched(model, folder, held, 0)
    _require_replaceable(folder, held, model)
    stage = stage_of(folder)
    with contextlib.ExitStack() as locks:
        from hfship.hub.image import plan_layers

        plan = plan_layers(client, model, stage, locks)
        put_mark(stage)
        bring(client, plan, folder.parent, stop, context)
        layers = []
        for layer, file in zip(model.layers, model.files):
            layers.append(Layer(stage / layer.remote.path, file))
        policy, reporter = site_policy(context), context.reporter

        def accept(work: Path, manifest: Manifest) -> Manifest:
            return admit(work, manifest, policy, reporter)

        manifest = restore_layers(layers, folder, model.source, accept)
        details = {
            "endpoint": model.source.endpoint,
            "repo": model.source.repo,
            "commit": model.source.commit,
            "files": len(manifest.files),
            "proof": "SHA-256 that the registry names layers by, of what was unpacked",
        }
        recorder_of(context).note_in_folder(folder, "fetched", manifest, details)
    shutil.rmtree(stage, ignore_errors=True)
    context.reporter.then("pack", folder)
    return _fetched(model, folder, manifest, len(manifest.files))


def _require_replaceable(folder: Path, held: object, model: LayeredModel) -> None:
    """Refuse a folder with files that no manifest lists, or of another model. Raises UsageError."""
    from hfship.archive.folder_check import unlisted_files
    from hfship.base.manifest import Manifest

    if not folder.exists():
        return
    manifest = held if isinstance(held, Manifest) else None
    unlisted = unlisted_files(folder, manifest)
    source = manifest.source if manifest else None
    is_other = manifest is not None and (source is None or source.repo != model.source.repo)
    if unlisted or is_other:
        what = f"{folder} holds something else"
        url = model.reference.url
        step = command_line("hfship", "fetch", url, "--name", "ANOTHER_NAME")
        raise UsageError(what, "", step)


def _fetched(model: LayeredModel, folder: Path, manifest: Manifest, count: int) -> FetchedModel:
    proof = "verified earlier, nothing to fetch"
    if count:
        proof = "every layer verified, and unpacked"
    return FetchedModel(
        name=folder.name,
        repo=model.source.repo,
        commit=model.source.commit,
        folder=folder,
        files=len(manifest.files),
        size=manifest.size,
        fetched_files=count,
        proof=proof,
        manifest=manifest,
    )
