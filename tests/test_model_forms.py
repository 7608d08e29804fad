# SPDX-License-Identifier: Apache-2.0
"""What is pushed of a folder, to the byte; test_registry_push.py has real registries."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.base.errors import UsageError
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import MANIFEST_PATH, FileEntry, Manifest, make_manifest
from hfship.base.values import replace
from hfship.ops import model_forms
from hfship.ops.model_forms import as_artifact, as_image, forms_of, image_as_it_came, layer_groups

CONTENT = {"a.json": b"{}", "w1.safetensors": b"1" * 40, "w2.safetensors": b"2" * 50}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A model in tmp_path; 40 bytes are large here."""
    monkeypatch.setattr("hfship.ops.model_forms.SMALL", 40)
    for name, content in CONTENT.items():
        (tmp_path / name).write_bytes(content)
    entries = [FileEntry(name, len(one), sha256(one)) for name, one in CONTENT.items()]
    return make_manifest("m", entries, None)


def content_of(pushable: Any, folder: Path) -> Dict[str, bytes]:
    """The blobs by digest, proven."""
    found = {blob.digest: blob.read(folder, 0, blob.size) for blob in pushable.blobs}
    assert all(digest == f"sha256:{sha256(content)}" for digest, content in found.items())
    assert pushable.size == sum(map(len, found.values()))
    assert pushable.digest == f"sha256:{sha256(pushable.manifest)}"
    return found


def test_an_image_has_a_tar_for_the_small_files_and_one_for_each_weight(
    model: Manifest, tmp_path: Path
) -> None:
    read: List[int] = []
    image = as_image(tmp_path, model, read.append)
    blobs = content_of(image, tmp_path)
    value = json.loads(image.manifest)
    layers = value.pop("layers")
    config = value.pop("config")
    assert value == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "annotations": {"org.opencontainers.image.title": "m"},
    }
    assert config == {
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": config["digest"],
        "size": len(blobs[config["digest"]]),
    }
    assert json.loads(blobs[config["digest"]]) == {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        "history": [{"created_by": "hfship push"}] * 3,
    }
    held = []
    for layer in layers:
        assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
        assert layer["size"] == len(blobs[layer["digest"]]) and layer["size"] % 512 == 0
        with tarfile.open(fileobj=io.BytesIO(blobs[layer["digest"]])) as tar:
            held.append({one.name: tar.extractfile(one).read() for one in tar})  # type: ignore[union-attr]
    manifest = model.to_json().encode()
    assert held == [
        {MANIFEST_PATH: manifest, "a.json": b"{}"},
        {"w1.safetensors": CONTENT["w1.safetensors"]},
        {"w2.safetensors": CONTENT["w2.safetensors"]},
    ]
    assert sum(read) == sum(layer["size"] for layer in layers)
    assert (image.form, image.media_type) == ("image", value["mediaType"])


def test_equal_models_are_equal_images(model: Manifest, tmp_path: Path) -> None:
    first, second = (as_image(tmp_path, model, lambda _: None) for _ in range(2))
    assert first.manifest == second.manifest


def test_an_artifact_has_every_file_as_it_is(model: Manifest, tmp_path: Path) -> None:
    artifact = as_artifact(model)
    blobs = content_of(artifact, tmp_path)
    value = json.loads(artifact.manifest)
    layers = [blobs[layer["digest"]] for layer in value["layers"]]
    assert layers == [model.to_json().encode(), *CONTENT.values()]
    assert value["config"]["digest"] in blobs and len(blobs) == 5
    assert (artifact.form, artifact.media_type) == ("artifact", value["mediaType"])


@pytest.mark.parametrize(
    ("sizes", "most", "groups"),
    [
        ([], 4, [[]]),
        ([1, 2], 4, [[1, 2]]),
        ([1, 50, 2, 60], 4, [[1, 2], [50], [60]]),
        ([50, 60, 70], 4, [[], [50], [60], [70]]),
        ([50, 60, 70, 80], 4, [[], [50, 60], [70, 80]]),
        ([40, 39], 4, [[39], [40]]),
    ],
)
def test_of_many_weights_several_share_a_layer(
    sizes: List[int], most: int, groups: List[List[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.ops.model_forms.SMALL", 40)
    monkeypatch.setattr("hfship.ops.model_forms.MOST_LAYERS", most)
    files = [FileEntry(str(size), size, "") for size in sizes]
    assert [[file.size for file in group] for group in layer_groups(files)] == groups


@pytest.mark.parametrize(
    ("form", "forms"),
    [("both", ["artifact", "image"]), ("artifact", ["artifact"]), ("image", ["image"])],
)
def test_a_model_is_pushed_in_the_forms_that_are_asked_for(
    form: str, forms: List[str], model: Manifest, tmp_path: Path
) -> None:
    assert [one.form for one in forms_of(tmp_path, model, form, lambda _: None)] == forms


def test_an_image_is_pushed_as_it_came(model: Manifest, tmp_path: Path) -> None:
    blobs = {sha256(text): text for text in (b"config", b"layer", b"last")}
    rows = [{"digest": f"sha256:{name}", "size": len(text)} for name, text in blobs.items()]
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    layers = [rows[1], rows[2], rows[1]]
    value = {"mediaType": kind, "config": rows[0], "layers": layers}
    text = json.dumps(value).encode()
    (tmp_path / "blobs/sha256").mkdir(parents=True)
    for name, content in {**blobs, sha256(text): text}.items():
        (tmp_path / "blobs/sha256" / name).write_bytes(content)
    facts = ImageFacts("a:1", "", f"sha256:{sha256(text)}", "", (), "linux/amd64")
    image = replace(model, image=facts)
    (pushable,) = forms_of(tmp_path, image, "both", lambda _: None)
    assert pushable == image_as_it_came(tmp_path, image)
    assert content_of(pushable, tmp_path) == {f"sha256:{name}": one for name, one in blobs.items()}
    assert (pushable.manifest, pushable.form, pushable.media_type) == (text, "image", kind)
    with pytest.raises(UsageError, match="is an image"):
        forms_of(tmp_path, image, "artifact", lambda _: None)
    assert model_forms.FORMS == ("artifact", "image")
