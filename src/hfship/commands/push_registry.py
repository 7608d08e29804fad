# SPDX-License-Identifier: Apache-2.0
"""`hfship push NAME docker://...`: models and images into a registry."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List

from hfship.base.errors import Exit, UsageError
from hfship.base.manifest import read_manifest
from hfship.base.text import counted, human_bytes, human_seconds
from hfship.base.values import dataclass, replace
from hfship.commands.names import find_model
from hfship.commands.registries import registry_client
from hfship.commands.results import print_results

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest
    from hfship.commands.context import Context
    from hfship.hub.registry_protocol import ImageReference
    from hfship.ops.model_forms import Pushable

IMAGE_SUFFIX = "-image"  # of the tag of a model's second form


@dataclass(frozen=True)
class RegistryPush:
    """What a registry holds now, in one form."""

    reference: ImageReference
    pushed: Pushable
    name: str
    sent: int
    seconds: float

    def text(self) -> str:
        """`REFERENCE@sha256:0123...: NAME as artifact, 5 layers, 1.2 GB; 30 MB sent in 1 s`"""
        pushed = self.pushed
        blobs = counted(len(pushed.blobs), "blob")
        size = human_bytes(pushed.size)
        how = "all was there already"
        if self.sent:
            amount = human_bytes(self.sent)
            took = human_seconds(self.seconds)
            how = f"{amount} sent in {took}"
        digest = pushed.digest[:19]
        where = f"{self.reference.name}@{digest}"
        what = f"{self.name} as {pushed.form}"
        return f"{where}: {what}, {blobs}, {size}; {how}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "push", into a registry."""
        return {
            "name": self.name,
            "to": self.reference.name,
            "form": self.pushed.form,
            "digest": self.pushed.digest,
            "blobs": len(self.pushed.blobs),
            "bytes": self.pushed.size,
            "bytes_sent": self.sent,
            "seconds": round(self.seconds, 2),
        }


def push_to_registry(context: Context) -> Exit:
    """Push one model, in both forms unless one is asked for, or one image."""
    from hfship.hub.registry_protocol import parse_reference

    args = context.args
    if len(args.archives) != 1:
        what = "a model or an image is pushed into a registry, one at a time"
        step = f"hfship push NAME {args.to}"
        raise UsageError(what, "", step)
    folder = find_model(args.archives[0], context.settings)
    manifest = read_manifest(folder)
    if manifest is None:
        what = f"{folder} has no manifest, so nothing proves it"
        raise UsageError(what, "", f"hfship fetch it, or hfship pack {folder} makes one")
    reference = parse_reference(args.to)
    print_results(context, _pushes(folder, manifest, reference, context))
    return Exit.OK


def _pushes(
    folder: Path, manifest: Manifest, reference: ImageReference, context: Context
) -> Iterator[RegistryPush]:
    from hfship.ops.model_forms import forms_of

    form = context.args.form
    with context.reporter.stage("hash layers", _hashed(manifest, form)) as stage:
        forms: List[Pushable] = forms_of(folder, manifest, form, stage.add)
    for pushable in forms:
        target = reference
        if len(forms) > 1 and pushable.form == "image":
            target = replace(reference, tag=f"{reference.tag}{IMAGE_SUFFIX}")
        yield _push(folder, manifest.name, pushable, target, context)


def _hashed(manifest: Manifest, form: str) -> int:
    """Bytes that are read for the sums of layers."""
    if manifest.image or form == "artifact":
        return 0
    return manifest.size


def _push(
    folder: Path, name: str, pushable: Pushable, reference: ImageReference, context: Context
) -> RegistryPush:
    from hfship.ops.registry_push import BlobPush, put_manifest

    began = time.monotonic()
    stop = threading.Event()
    client = registry_client(reference, context, stop, context.args.jobs)
    sent = 0
    with context.reporter.stage(f"push {pushable.form}", pushable.size) as stage:
        push = BlobPush(client, folder, stage, stop)
        for blob in pushable.blobs:
            sent += push.push(blob)
    put_manifest(client, pushable.manifest, pushable.media_type)
    return RegistryPush(reference, pushable, name, sent, time.monotonic() - began)
