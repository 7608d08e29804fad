# SPDX-License-Identifier: Apache-2.0
"""`hfship fetch docker://...`: images, by the same steps as models."""

from __future__ import annotations

import argparse
import contextlib
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

from hfship.base.errors import Exit, UsageError
from hfship.base.manifest import make_manifest
from hfship.base.settings import home_path
from hfship.base.text import counted, human_bytes
from hfship.base.values import dataclass
from hfship.commands.fetching import (
    bring,
    finish_model,
    show_fetch_plans,
    transfer_settings,
)
from hfship.commands.record import recorder_of
from hfship.commands.registries import registry_client, this_platform
from hfship.commands.results import each_of

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest
    from hfship.base.report import Result
    from hfship.commands.context import Context
    from hfship.hub.fetch import FetchPlan
    from hfship.hub.image import ImagePlan, ImageRequest
    from hfship.hub.registry_protocol import ImageReference

# Flags of fetch that mean nothing for an image.
FOR_MODELS = ("revision", "include", "exclude", "all_files", "token_file", "endpoint")


@dataclass(frozen=True)
class FetchedImage:
    """An image that is complete and proven."""

    plan: ImagePlan
    manifest: Manifest
    fetched_files: int
    moved: str  # the digest that the tag meant before; "" if it is the same
    hashed: bool = False  # every layer was read by this call

    def text(self) -> str:
        """`FOLDER: vllm/vllm-openai:v1 for linux/amd64, 30 layers, 9.1 GB, sha256:0123...`"""
        image = self.plan.image
        facts = image.facts
        layers = counted(len(image.layers), "layer")
        what = f"{facts.name} for {facts.platform}, {layers}, {human_bytes(self.manifest.size)}"
        proof = "verified earlier, nothing to fetch"
        if self.fetched_files or self.hashed:
            proof = "every layer verified"
        text = f"{self.plan.files.folder}: {what}, {facts.digest[:19]}; {proof}"
        if self.moved:
            text += f"; the tag moved: {self.moved[:19]} -> {facts.digest[:19]}"
        return text

    def json(self) -> Dict[str, Any]:
        """hfship-fetch/1 of docs/json.md, of an image."""
        facts = self.plan.image.facts
        return {
            "name": self.manifest.name,
            "kind": "image",
            "repo": facts.reference,
            "commit": facts.digest[7:],
            "folder": str(self.plan.files.folder),
            "files": len(self.manifest.files),
            "bytes": self.manifest.size,
            "fetched_files": self.fetched_files,
            "left_out": [],
            "partial": [],
            "license": "",
            "code_files": [],
            "image": facts.json(),
        }


def is_image(word: str) -> bool:
    """Whether a word of the command line means an image in a registry."""
    return word.startswith("docker://")


def fetch_images(context: Context) -> Exit:
    """Fetch images, one after another; goes on after one that does not come."""
    from hfship.hub.registry_protocol import parse_reference

    args = context.args
    _require_no_more(context)
    references = [parse_reference(text) for text in args.repos]
    names = [args.name or reference.folder_name for reference in references]
    if len(set(names)) < len(names):
        step = "fetch them one by one with --name"
        raise UsageError("two images would go into the same folder", ", ".join(names), step)
    for name in names:
        make_manifest(name, ())  # refuses what cannot be a folder name

    if args.dry_run:
        plans = [planned_image(reference, context) for reference in references]
        show_fetch_plans(plans, context)
        return Exit.OK
    works = []
    for reference in references:
        works.append((reference.name, partial(fetch_image, reference, context)))
    return each_of(context, works)


def _require_no_more(context: Context) -> None:
    """Refuse what can be asked for of models only. Raises UsageError."""
    for option in FOR_MODELS:
        if context.asked.get(option):
            flag = "--" + option.replace("_", "-")
            raise UsageError(f"{flag} is for models, not for images", "", f"leave {flag} out")
    if context.args.engine != "own":
        raise UsageError("aria2 fetches no images", "", "leave --engine out")


def image_root(context: Context) -> Path:
    """The folder in which image folders appear: that of the models."""
    if context.args.output:
        return home_path(context.args.output)
    return context.settings.models_dir


def image_request(reference: ImageReference, args: argparse.Namespace) -> ImageRequest:
    """What was asked for."""
    from hfship.hub.image import ImageRequest

    return ImageRequest(
        reference=reference,
        platform=args.platform or this_platform(),
        name=args.name or reference.folder_name,
        rehash=args.verify or args.repair,
    )


def planned_image(reference: ImageReference, context: Context) -> FetchPlan:
    """What --dry-run says of an image, or of a model in a registry."""
    from hfship.commands.fetch_layers import layers_plan
    from hfship.hub.image import ImagePlan, LayeredModel, plan_image

    stop = threading.Event()
    client = registry_client(reference, context, stop, 1)
    request = image_request(reference, context.args)
    folder = image_root(context) / request.name
    with contextlib.ExitStack() as locks:
        plan = plan_image(client, request, folder, locks, stop, dry_run=True)
    if isinstance(plan, ImagePlan):
        return plan.files
    if isinstance(plan, LayeredModel):
        return layers_plan(plan, folder)
    return plan


def fetch_image(reference: ImageReference, context: Context) -> Result:
    """Plan an image, or a model that lies in a registry, check the room, and bring its layers
    through the pool of connections."""
    from hfship.hub.image import ImagePlan, LayeredModel, finish_image, plan_image, write_known

    args = context.args
    stop = threading.Event()
    settings = transfer_settings(args)
    client = registry_client(reference, context, stop, settings.most_connections)
    root = image_root(context)
    request = image_request(reference, args)
    with contextlib.ExitStack() as locks:
        plan = plan_image(client, request, root / request.name, locks, stop, dry_run=False)
        if isinstance(plan, LayeredModel):
            from hfship.commands.fetch_layers import fetch_layers

            locks.close()  # it is restored beside NAME
            return fetch_layers(client, plan, root / request.name, stop, context)
        if not isinstance(plan, ImagePlan):
            bring(client, plan, root, stop, context)
            context.reporter.then("pack", plan.folder)
            return finish_model(plan, context)
        moved = plan.moved
        count = len(plan.files.transfers)
        if not args.verify:
            plan = write_known(plan)
        bring(client, plan.files, root, stop, context)
        manifest = finish_image(plan)
        if count:
            note_image(plan, manifest, context)

    context.reporter.then("pack", plan.files.folder)
    return FetchedImage(plan, manifest, count, moved, hashed=args.verify)


def note_image(plan: ImagePlan, manifest: Manifest, context: Context) -> None:
    """Note in the image's log of custody where it came from."""
    facts = plan.image.facts
    details = {
        "endpoint": plan.files.snapshot.source.endpoint,
        "reference": facts.reference,
        "digest": facts.digest,
        "files": len(manifest.files),
        "proof": "SHA-256 that the registry names blobs by, of what was written",
    }
    recorder_of(context).note_in_folder(plan.files.folder, "fetched", manifest, details)
