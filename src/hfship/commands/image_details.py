# SPDX-License-Identifier: Apache-2.0
"""`hfship list IMAGE`: what an image that was fetched says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional

from hfship.base.imagefacts import BLOBS, ImageFacts
from hfship.base.manifest import Manifest, read_manifest
from hfship.base.reading import parse_json, read_below
from hfship.base.text import counted, human_bytes, printable, table
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.commands.context import Context

_LARGEST = 16 << 20
# What buildx calls the entry of an index that holds SBOM and provenance of an image.
ATTESTED = "vnd.docker.reference.digest"


@dataclass(frozen=True)
class ImageDetails:
    """An image: its labels, and the digest under which its registry keeps SBOM and provenance ("":
    the index names none)."""

    folder: Path
    manifest: Manifest
    facts: ImageFacts
    labels: Mapping[str, str]
    attestation: str

    def text(self) -> str:
        """A line for each fact and label."""
        facts = self.facts
        layers = counted(len(facts.diff_ids), "layer")
        sbom = "none in its index"
        if self.attestation:
            repository = facts.reference.rpartition(":")[0]
            sbom = f"in the registry: docker://{repository}@{self.attestation}"
        rows: List[List[str]] = [
            ["image", facts.name],
            ["platform", facts.platform],
            ["digest", facts.digest],
            ["image ID", facts.config_digest],
            ["size", f"{human_bytes(self.manifest.size)}, {layers}"],
            ["folder", str(self.folder)],
            ["SBOM", sbom],
        ]
        for name, value in sorted(self.labels.items()):
            rows.append([f"label {name}", value])
        return table(rows)

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "list", of one image."""
        return {
            "folder": str(self.folder),
            "bytes": self.manifest.size,
            "image": self.facts.json(),
            "labels": dict(self.labels),
            "attestation": self.attestation or None,
        }


def image_shown(name: str, context: Context) -> Optional[ImageDetails]:
    """The image of a name, a reference or a folder; None for what is none."""
    settings = context.settings
    for root in (settings.models_dir, settings.site_models_dir):
        for path in sorted(root.glob("*/oci-layout")):
            folder = path.parent
            manifest = read_manifest(folder)
            if manifest is None or manifest.image is None:
                continue
            image = manifest.image
            names = (manifest.name, image.name, image.reference, str(folder))
            if name in names:
                return _details(folder, manifest, image)
    return None


def _details(folder: Path, manifest: Manifest, image: ImageFacts) -> ImageDetails:
    config = _blob(folder, image.config_digest)
    labels = (config.get("config") or {}).get("Labels") or {}
    shown: Dict[str, str] = {}
    for key, value in labels.items():
        shown[printable(str(key))] = printable(str(value))
    attestation = _attestation(_blob(folder, image.digest), image.manifest_digest)
    return ImageDetails(
        folder,
        manifest,
        image,
        shown,
        attestation,
    )


def _blob(folder: Path, digest: str) -> Dict[str, Any]:
    """A JSON object among the blobs; empty for what is none."""
    try:
        value = parse_json(read_below(folder, f"{BLOBS}{digest[7:]}", _LARGEST))
    except (OSError, ValueError):
        return {}
    if isinstance(value, dict):
        return value
    return {}


def _attestation(index: Mapping[str, Any], manifest_digest: str) -> str:
    """The digest of what an index attests of a manifest; "" for nothing."""
    for entry in index.get("manifests") or ():
        annotations = entry.get("annotations") or {}
        if annotations.get(ATTESTED) == manifest_digest:
            return printable(str(entry.get("digest", "")))
    return ""
