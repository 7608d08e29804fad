# SPDX-License-Identifier: Apache-2.0
"""What a far side has, as its own `hfship list --json` says, and so what has to travel there.

Pure. A version that is there does not travel. Where an earlier one is there, what is new since
travels (a delta), if they have files in common; else all of it. What cannot be told counts as not
there: an archive too much costs time, one too few the delivery.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, FrozenSet, Mapping, Optional, Sequence, Tuple

from hfship.archive.versions import version_of
from hfship.base.manifest import make_manifest
from hfship.base.reading import parse_json
from hfship.base.values import dataclass, field
from hfship.ops.stock import SERVABLE
from hfship.serve.engines import longest_start

if TYPE_CHECKING:
    from hfship.archive.versions import Version
    from hfship.base.manifest import Manifest

THERE = "there"
DELTA = "delta"
WHOLE = "whole"


@dataclass(frozen=True)
class FarStock:
    """What is there: by name the folders of models that can be built upon, the digests by which
    docker there knows its images, and their layers (diff IDs) that it needs no second time."""

    models: Mapping[str, str] = field(default_factory=dict)
    images: FrozenSet[str] = frozenset()
    layers: Tuple[Tuple[str, ...], ...] = ()


def parse_stock(said: str) -> FarStock:
    """What `list --json` printed there. Raises ValueError for what is no such list.

    >>> parse_stock('{"models": [{"name": "m", "state": "whole", "path": "/d/m"}], "images": []}')
    FarStock(models={'m': '/d/m'}, images=frozenset(), layers=())
    """
    value = parse_json(said)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    try:
        models = {}
        for row in value["models"]:
            if row["state"] in SERVABLE and str(row["path"]).startswith("/"):
                models[str(row["name"])] = str(row["path"])
        images = {str(row.get("id", "")) for row in value["images"]}
        layers = []
        for row in value.get("docker_images", ()):
            images.update(map(str, row["digests"]))
            layers.append(tuple(map(str, row["layers"])))
    except (TypeError, KeyError, AttributeError) as exc:
        raise ValueError(f"it is no list of hfship: {exc!r}") from exc
    return FarStock(models, frozenset(images - {""}), tuple(layers))


@dataclass(frozen=True)
class SyncStep:
    """What travels of a model or an image: `before` is the version that is there."""

    name: str
    action: str
    version: Version
    before: Optional[Version] = None
    since: Optional[Manifest] = None  # of a delta: what it leaves out

    def text(self) -> str:
        """`m: commit 0000000 -> 1111111, what is new since`"""
        if self.action == THERE:
            return f"{self.name}: {self.version.label} is there"
        if self.before is None and self.since:
            return f"{self.name}: {self.version.label}, the layers that docker there lacks"
        if self.before is None:
            return f"{self.name}: {self.version.label}, all of it"
        how = "all of it"
        if self.action == DELTA:
            how = "what is new since"
        return f"{self.name}: {self.before.label} -> {self.version.short}, {how}"

    def json(self) -> Mapping[str, Any]:
        """docs/json.md, "sync"."""
        return {
            "name": self.name,
            "action": self.action,
            "version": self.version.id,
            "version_there": self.before.id if self.before else None,
        }


def plan_image(manifest: Manifest, layers: Sequence[str], far: FarStock) -> SyncStep:
    """What travels of an image, whose layers are these files in their order: without the first
    ones, where docker there has them of another image."""
    name, version, image = manifest.name, version_of(manifest), manifest.image
    assert image is not None
    if not far.images.isdisjoint(image.digests):
        return SyncStep(name, THERE, version)
    count = 0
    if len(layers) == len(image.diff_ids):
        count = longest_start(far.layers, image.diff_ids)
    first = set(layers[:count]) - set(layers[count:])
    shared = [entry for entry in manifest.files if entry.path in first]
    if not shared:
        return SyncStep(name, WHOLE, version)
    return SyncStep(name, DELTA, version, since=make_manifest(name, shared))


def plan_step(manifest: Manifest, there: Optional[Manifest]) -> SyncStep:
    """What travels of a model, of which a manifest is `there`."""
    name, version = manifest.name, version_of(manifest)
    if there is None:
        return SyncStep(name, WHOLE, version)
    before = version_of(there)
    if before.id == version.id and version.sums <= before.sums:
        return SyncStep(name, THERE, version, before)
    if version.sums & before.sums:
        return SyncStep(name, DELTA, version, before, there)
    return SyncStep(name, WHOLE, version, before)
