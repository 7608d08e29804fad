# SPDX-License-Identifier: Apache-2.0
"""A folder as what a registry can hold: an image as it came, a model in two forms.

  artifact   ModelPack: a layer for each file, as it is; its digest is the SHA-256 of the manifest
  image      one that containerd and Kubernetes mount as a volume, because they mount images only:
             layers that are a tar with one file, not compressed. Files below 16 MiB share a layer,
             and of more than 100 weights several do, because engines take about 128 layers.

Our manifest travels in both, so that who takes the model back proves it by the Hub's sums.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Sequence, Tuple

from hfship.archive.layout import padding, tar_header
from hfship.base.errors import UsageError
from hfship.base.imagefacts import BLOBS
from hfship.base.manifest import MANIFEST_PATH, FileEntry
from hfship.base.reading import parse_json, read_below
from hfship.base.values import dataclass
from hfship.hub.modelpack import model_artifact
from hfship.hub.registry_protocol import OCI_MANIFEST, media_type_of
from hfship.ops.registry_push import Blob, Stretch, file_blob, hashed_blob, known_blob

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest

FORMS = ("artifact", "image")
SMALL = 16 << 20  # bytes; smaller files share a layer of a mountable image
MOST_LAYERS = 100
END_OF_TAR = bytes(1024)
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
TAR_LAYER = "application/vnd.oci.image.layer.v1.tar"
_LARGEST_TEXT = 8 << 20


@dataclass(frozen=True)
class Pushable:
    """What is pushed under one tag: its blobs, and the manifest, which comes last."""

    form: str
    blobs: Tuple[Blob, ...]
    manifest: bytes
    media_type: str

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        digest = hashlib.sha256(self.manifest)
        return f"sha256:{digest.hexdigest()}"

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        sizes = [blob.size for blob in self.blobs]
        return sum(sizes)


def image_as_it_came(folder: Path, manifest: Manifest) -> Pushable:
    """An image that was fetched: the manifest for its platform, with its blobs. The index of its
    tag names platforms that are not here, so it is not pushed."""
    image = manifest.image
    assert image is not None
    text = read_below(folder, f"{BLOBS}{image.manifest_digest[7:]}", _LARGEST_TEXT)
    value = parse_json(text)
    wanted = [value["config"], *value["layers"]]
    blobs: Dict[str, Blob] = {}
    for row in wanted:
        digest = str(row["digest"])
        path = f"{BLOBS}{digest[7:]}"
        blobs[digest] = file_blob(path, int(row["size"]), digest[7:])
    kind = media_type_of(value, "")
    return Pushable("image", tuple(blobs.values()), text, kind)


def with_our_manifest(manifest: Manifest) -> List[FileEntry]:
    """The files of a model and the manifest, which is first."""
    text = manifest.to_json()
    content = text.encode()
    size = len(content)
    sha256 = hashlib.sha256(content).hexdigest()
    ours = FileEntry(MANIFEST_PATH, size, sha256)
    return [ours, *manifest.files]


def as_artifact(manifest: Manifest) -> Pushable:
    """A model as ModelPack has it."""
    entries = with_our_manifest(manifest)
    artifact = model_artifact(manifest, entries)
    blobs = {}
    for entry in manifest.files:
        blobs[entry.sha256] = file_blob(entry.path, entry.size, entry.sha256)
    ours = known_blob(manifest.to_json().encode())
    config = known_blob(artifact.config)
    everything = (ours, config, *blobs.values())
    return Pushable("artifact", everything, artifact.manifest, OCI_MANIFEST)


def as_image(folder: Path, manifest: Manifest, count: Callable[[int], None]) -> Pushable:
    """A model as an image that is mounted. `count` is called with the bytes that are read: the
    layers have sums of their own. Raises DiskError."""
    text = manifest.to_json().encode()
    blobs: List[Blob] = []
    for group in layer_groups(manifest.files):
        stretches: List[Stretch] = []
        if not blobs:
            stretches += tar_member(MANIFEST_PATH, Stretch(len(text), text))
        for entry in group:
            stretches += tar_member(entry.path, Stretch(entry.size, path=entry.path))
        stretches.append(Stretch(len(END_OF_TAR), END_OF_TAR))
        blobs.append(hashed_blob(folder, stretches, count))

    config = known_blob(_image_config(blobs))
    rows: List[Dict[str, Any]] = []
    for blob in blobs:
        row = {
            "mediaType": TAR_LAYER,
            "digest": blob.digest,
            "size": blob.size,
        }
        rows.append(row)
    described = {
        "mediaType": IMAGE_CONFIG,
        "digest": config.digest,
        "size": config.size,
    }
    value = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described,
        "layers": rows,
        "annotations": {"org.opencontainers.image.title": manifest.name},
    }
    manifest_text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return Pushable("image", (config, *blobs), manifest_text.encode(), OCI_MANIFEST)


def _image_config(blobs: Sequence[Blob]) -> bytes:
    """No time in it: equal models are equal images. A volume has no platform, but every engine
    wants one."""
    diff_ids = [blob.digest for blob in blobs]
    history = [{"created_by": "hfship push"} for _ in blobs]
    value = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": history,
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def tar_member(path: str, content: Stretch) -> List[Stretch]:
    """The stretches of a file in a tar."""
    header = tar_header(path, content.size)
    before = Stretch(len(header), header)
    zeros = padding(content.size)
    after = Stretch(len(zeros), zeros)
    return [before, content, after]


def layer_groups(files: Sequence[FileEntry]) -> List[List[FileEntry]]:
    """The files of each layer: the small ones together, then the weights, each alone as far as
    there are layers enough."""
    small: List[FileEntry] = []
    large: List[FileEntry] = []
    for entry in files:
        if entry.size < SMALL:
            small.append(entry)
        else:
            large.append(entry)

    layers = MOST_LAYERS - 1
    in_each = 1 + (len(large) - 1) // layers
    groups = [small]
    for start in range(0, len(large), max(in_each, 1)):
        stop = start + in_each
        group = large[start:stop]
        groups.append(group)
    return groups


def forms_of(
    folder: Path, manifest: Manifest, form: str, count: Callable[[int], None]
) -> List[Pushable]:
    """What is pushed of a folder: an image, or a model in the forms that are asked for ("both").

    Raises UsageError, DiskError.
    """
    if manifest.image:
        if form == "artifact":
            raise UsageError(f"{folder} is an image", "", "leave --form out")
        return [image_as_it_came(folder, manifest)]
    found = []
    if form != "image":
        found.append(as_artifact(manifest))
    if form != "artifact":
        found.append(as_image(folder, manifest, count))
    return found
