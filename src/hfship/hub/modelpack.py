# SPDX-License-Identifier: Apache-2.0
"""Models as artifacts of a registry: the CNCF's ModelPack. Pure.

Owns what such an artifact is called and how its layers name files (modelpack/model-spec, v0.0.7):
one file for each layer, not compressed, with its path in `org.cncf.model.filepath`. So the digest
of a layer is the SHA-256 that the Hub gives for the file.
Promises: a path that a stranger wrote is refused as one of the Hub would be. Never: reads a file.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from hfship.base.content import check_distinct_paths, check_relative_path
from hfship.base.manifest import MANIFEST_PATH
from hfship.base.text import shorten
from hfship.base.values import dataclass
from hfship.hub.protocol import RemoteFile
from hfship.hub.registry_protocol import OCI_MANIFEST, digest_of

if TYPE_CHECKING:
    from hfship.base.manifest import FileEntry, Manifest
    from hfship.hub.registry_protocol import Descriptor, ImageManifest

COMPACT = (",", ":")  # separators of JSON without blanks
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
CODE = "application/vnd.cncf.model.code.v1.raw"
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # what oras names a file by
# What a configuration is called that is of an image which an engine can run.
IMAGE_CONFIGS = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
KITOPS = "application/vnd.kitops.modelkit.config.v1+json"

FOLDER = "application/vnd.oci.image.layer.v1.tar+gzip"  # of oras' Python SDK
UNPACK = "io.deis.oras.content.unpack"  # "true" for a folder, which oras packs as a tar
# Of an archive. What oras calls so may be any file.
_TAR = re.compile(r"application/vnd\.(kitops\.modelkit|cncf\.model)\..*\.tar(\+gzip|\+zstd)?$")

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")
_CODE = (".py", ".sh", ".ipynb", ".cu", ".cpp")
_DOCS = (".md", ".txt", ".pdf", ".png", ".jpg")
_DOC_NAMES = ("LICENSE", "NOTICE", "README")


def layer_type(path: str) -> str:
    """What a file of a model is to ModelPack.

    >>> [layer_type(path)[27:] for path in ("a.safetensors", "LICENSE", "x.py", "config.json")]
    ['weight.v1.raw', 'doc.v1.raw', 'code.v1.raw', 'weight.config.v1.raw']
    """
    name = path.rpartition("/")[2]
    if name.endswith(_WEIGHTS):
        return WEIGHT
    if name.endswith(_CODE):
        return CODE
    if name.startswith(_DOC_NAMES) or name.endswith(_DOCS):
        return DOC
    return WEIGHT_CONFIG


# -- written


@dataclass(frozen=True)
class Artifact:
    """The texts of what is pushed: a configuration and a manifest."""

    config: bytes
    manifest: bytes


def _text(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=COMPACT)
    return text.encode()


def layer_of(entry: FileEntry) -> Dict[str, Any]:
    """The descriptor of a file."""
    return {
        "mediaType": layer_type(entry.path),
        "digest": f"sha256:{entry.sha256}",
        "size": entry.size,
        "annotations": {FILE_PATH: entry.path, TITLE: entry.path},
    }


def model_artifact(manifest: Manifest, entries: Sequence[FileEntry]) -> Artifact:
    """The artifact of a model; `entries` are its files, our manifest among them."""
    descriptor: Dict[str, Any] = {"name": manifest.name}
    source = manifest.source
    if source:
        descriptor["sourceURL"] = f"{source.endpoint}/{source.resolved_repo}"
        descriptor["revision"] = source.commit
        if source.license:
            descriptor["licenses"] = [source.license]
    layers = [layer_of(entry) for entry in entries]
    digests = [layer["digest"] for layer in layers]
    config = _text(
        {
            "descriptor": descriptor,
            "config": {},
            "modelfs": {"type": "layers", "diffIds": digests},
        }
    )
    described = {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)}
    value = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": ARTIFACT,
        "config": described,
        "layers": layers,
    }
    return Artifact(config, _text(value))


# -- read


def is_model(manifest: ImageManifest) -> bool:
    """Whether a manifest is that of a model, of whatever tool: ModelPack, KitOps, or files that
    oras pushed, each with its name."""
    config = manifest.config.media_type
    if manifest.artifact_type == ARTIFACT or config in (CONFIG, KITOPS):
        return True
    if config in IMAGE_CONFIGS or not manifest.layers:
        return False
    return all(TITLE in layer.annotations for layer in manifest.layers)


def is_archive(layer: Descriptor) -> bool:
    """Whether a layer is a tar, which holds files of the model, and not a file itself.

    >>> from hfship.hub.registry_protocol import Descriptor
    >>> [is_archive(Descriptor(kind, "", 0, {})) for kind in (
    ...     "application/vnd.kitops.modelkit.model.v1.tar+gzip",
    ...     "application/vnd.cncf.model.weight.v1.tar", WEIGHT)]
    [True, True, False]
    """
    if layer.media_type == FOLDER or layer.annotations.get(UNPACK) == "true":
        return True
    return bool(_TAR.match(layer.media_type))


def model_layers(manifest: ImageManifest) -> Dict[str, Descriptor]:
    """path -> layer of the files of a model that are a layer each; our own manifest has its path,
    too.

    Raises ValueError for paths that cannot be files.
    """
    found: Dict[str, Descriptor] = {}
    for layer in manifest.layers:
        if is_archive(layer) or layer.media_type == KITOPS:  # or a Kitfile among the layers
            continue
        path = layer.annotations.get(FILE_PATH) or layer.annotations.get(TITLE) or ""
        if path != MANIFEST_PATH:
            check_relative_path(path)
        if path in found:
            raise ValueError(f"{path!r} is there twice")
        found[path] = layer
    check_distinct_paths(found)
    return found


def model_files(layers: Mapping[str, Descriptor]) -> Tuple[RemoteFile, ...]:
    """The files of a model as a listing has them, our manifest aside."""
    files = []
    for path, layer in layers.items():
        if path != MANIFEST_PATH:
            sha256 = layer.digest[7:]
            file = RemoteFile(path, layer.size, "", sha256)
            files.append(file)
    return tuple(files)


def disagreement(layers: Mapping[str, Descriptor], listed: Iterable[FileEntry]) -> Optional[str]:
    """Where the layers are not what the manifest among them lists; None for nowhere."""
    wanted: Dict[str, str] = {}
    for entry in listed:
        wanted[entry.path] = f"sha256:{entry.sha256}"
    found: Dict[str, str] = {}
    for path, layer in layers.items():
        if path != MANIFEST_PATH:
            found[path] = layer.digest
    different: List[str] = []
    for path in {*wanted, *found}:
        if wanted.get(path) != found.get(path):
            different.append(path)
    if not different:
        return None
    return shorten(sorted(different))
