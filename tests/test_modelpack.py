# SPDX-License-Identifier: Apache-2.0
"""ModelPack (modelpack/model-spec v0.0.7): what is written of a model, and which of the layers that
others write are its files."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Dict, Optional

import pytest

from hfship.base.manifest import FileEntry, Manifest, Source
from hfship.hub.modelpack import (
    ARTIFACT,
    CODE,
    CONFIG,
    DOC,
    FILE_PATH,
    FOLDER,
    IMAGE_CONFIGS,
    KITOPS,
    TITLE,
    UNPACK,
    WEIGHT,
    WEIGHT_CONFIG,
    disagreement,
    is_archive,
    is_model,
    layer_type,
    model_artifact,
    model_files,
    model_layers,
)
from hfship.hub.protocol import RemoteFile
from hfship.hub.registry_protocol import Descriptor, ImageManifest

KINDS = {
    WEIGHT: "a.safetensors b.bin c.gguf d.pt e.pth f.onnx g.h5 h.msgpack LICENSE.bin README.pt",
    CODE: "a.py b.sh c.ipynb d.cu e.cpp README.py",
    DOC: "a.md b.txt c.pdf d.png e.jpg LICENSE LICENSE-2 NOTICE README x/README.rst",
    WEIGHT_CONFIG: "config.json tokenizer.model a.safetensors.index.json MYLICENSE LICENSE/x py",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_of_a_model_is(kind: str) -> None:
    for name in KINDS[kind].split():
        assert layer_type(name) == layer_type(f"LICENSE/{name}") == kind, name


A = FileEntry("d/a.bin", 3, "a" * 64)
B = FileEntry("README.md", 5, "b" * 64)
SOURCE = Source("https://hub", "org/old", "v1", "org/m", "c" * 40, license="mit")


@pytest.mark.parametrize("license_", ["mit", None])
@pytest.mark.parametrize("has_source", [True, False])
def test_what_is_written_of_a_model(license_: Optional[str], has_source: bool) -> None:
    source = Source("https://hub", "org/old", "v1", "org/m", "c" * 40, license=license_)
    artifact = model_artifact(Manifest("m", (A,), source if has_source else None), [A, B])
    config, manifest = json.loads(artifact.config), json.loads(artifact.manifest)
    descriptor: Dict[str, Any] = {"name": "m"}
    if has_source:
        descriptor.update(sourceURL="https://hub/org/m", revision="c" * 40)
        if license_:
            descriptor["licenses"] = ["mit"]
    digests = [f"sha256:{entry.sha256}" for entry in (A, B)]
    assert config == {
        "descriptor": descriptor,
        "config": {},
        "modelfs": {"type": "layers", "diffIds": digests},
    }
    assert manifest == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.cncf.model.config.v1+json",
            "digest": "sha256:" + hashlib.sha256(artifact.config).hexdigest(),
            "size": len(artifact.config),
        },
        "layers": [
            {
                "mediaType": kind,
                "digest": f"sha256:{entry.sha256}",
                "size": entry.size,
                "annotations": {
                    "org.cncf.model.filepath": entry.path,
                    "org.opencontainers.image.title": entry.path,
                },
            }
            for entry, kind in (
                (A, "application/vnd.cncf.model.weight.v1.raw"),
                (B, "application/vnd.cncf.model.doc.v1.raw"),
            )
        ],
    }
    for text in (artifact.config, artifact.manifest):  # the same bytes each time
        assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode()


def layer(
    path: str = "", title: str = "", kind: str = WEIGHT, digest: str = "a" * 64, **more: str
) -> Descriptor:
    names = {FILE_PATH: path, TITLE: title}
    annotations = {key: name for key, name in names.items() if name}
    return Descriptor(kind, f"sha256:{digest}", 3, {**annotations, **more})


def manifest_of(*layers: Descriptor, config: str = "x/y", artifact: str = "") -> ImageManifest:
    return ImageManifest(layer(kind=config), layers, artifact, {}, "")


@pytest.mark.parametrize(
    "manifest, found",
    [
        (manifest_of(artifact=ARTIFACT), True),
        (manifest_of(config=CONFIG), True),
        (manifest_of(config=KITOPS), True),
        (manifest_of(artifact=ARTIFACT, config=IMAGE_CONFIGS[0]), True),
        (manifest_of(layer(title="a")), True),
        (manifest_of(layer(title="a"), layer(title="b")), True),
        (manifest_of(layer(title="a"), layer(path="b")), False),
        (manifest_of(), False),
        *[(manifest_of(layer(title="a"), config=config), False) for config in IMAGE_CONFIGS],
    ],
    ids=str,
)
def test_what_is_a_model(manifest: ImageManifest, found: bool) -> None:
    assert is_model(manifest) is found


@pytest.mark.parametrize(
    "kind, unpack, found",
    [
        (WEIGHT, "", False),
        (WEIGHT, "true", True),
        (WEIGHT, "false", False),
        (FOLDER, "", True),
        ("application/vnd.kitops.modelkit.model.v1.tar", "", True),
        ("application/vnd.kitops.modelkit.model.v1.tar+gzip", "", True),
        ("application/vnd.cncf.model.weight.v1.tar+zstd", "", True),
        ("application/vnd.cncf.model.weight.v1.tar+x", "", False),
        ("application/vnd.other.model.weight.v1.tar", "", False),
        ("application/vnd.oci.image.layer.v1.tar", "", False),
    ],
)
def test_what_is_an_archive(kind: str, unpack: str, found: bool) -> None:
    more = {UNPACK: unpack} if unpack else {}
    assert is_archive(layer("a", kind=kind, **more)) is found


MANIFEST = ".hfship/manifest.json"


def test_the_files_of_a_model_are_its_layers() -> None:
    ours, titled = layer("d/a", "other"), layer(title="b", digest="b" * 64)
    manifest = manifest_of(
        ours,
        titled,
        layer(MANIFEST, digest="c" * 64),
        layer("x.tar", kind=FOLDER),
        layer(kind=KITOPS),
        config=CONFIG,
    )
    layers = model_layers(manifest)
    assert list(layers) == ["d/a", "b", MANIFEST]
    assert model_files(layers) == (
        RemoteFile("d/a", 3, "", "a" * 64),
        RemoteFile("b", 3, "", "b" * 64),
    )


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", ".hfship/x", "a//b", "a/"])
def test_a_path_that_can_be_no_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError):
        model_layers(manifest_of(layer(path)))


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), (MANIFEST, MANIFEST)])
def test_two_files_have_two_places(paths: Any) -> None:
    with pytest.raises(ValueError):
        model_layers(manifest_of(*map(layer, paths)))


def test_layers_and_the_manifest_among_them_say_the_same() -> None:
    layers = {"d/a.bin": layer("d/a.bin"), MANIFEST: layer(MANIFEST, digest="0" * 64)}
    assert disagreement(layers, [A]) is None
    assert disagreement({**layers, "README.md": layer("README.md")}, [A]) == "README.md"
    assert disagreement(layers, [A, B]) == "README.md"
    assert disagreement({"d/a.bin": layer(digest="f" * 64)}, [A]) == "d/a.bin"
    assert disagreement({"z": layer()}, [B]) == "README.md, z"
