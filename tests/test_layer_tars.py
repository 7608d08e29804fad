# SPDX-License-Identifier: Apache-2.0
"""A model of layers, some of them tars: what is restored, and what is refused; test_model_layers.py has
registries."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.archive.layer_tars import Layer, _HashedFile, restore_layers
from hfship.base.errors import HfshipError, IntegrityError
from hfship.base.manifest import Manifest, Source, read_manifest
from hfship.base.values import replace
from support import archives as a

SOURCE = Source("https://hub", "org/m", "1", "org/m", "a" * 40)
WEIGHTS = a.noise(3 << 20)


def layer(folder: Path, content: bytes, file: str = "") -> Layer:
    """A blob that was fetched."""
    folder.mkdir(exist_ok=True)
    blob = folder / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    return Layer(blob, file)


def accepted(_: Path, manifest: Manifest) -> Manifest:
    return replace(manifest, left_out=7)


def test_a_model_is_restored_of_its_layers(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    layers = [
        layer(blobs, a.tar_of([("b.txt", b"b"), ("sub/c.bin", WEIGHTS)])),
        layer(blobs, WEIGHTS[:-1], "w.safetensors"),
        layer(blobs, b"", "empty"),
        layer(blobs, a.tar_of([("a.txt", b"a" * 700)])),
    ]
    target = tmp_path / "m"
    seen: List[Any] = []

    def accept(work: Path, manifest: Manifest) -> Manifest:
        seen.append((work.name, (work / "b.txt").read_bytes(), manifest.source))
        return accepted(work, manifest)

    manifest = restore_layers(layers, target, SOURCE, accept)
    wanted = {
        "a.txt": b"a" * 700,
        "b.txt": b"b",
        "empty": b"",
        "sub/c.bin": WEIGHTS,
        "w.safetensors": WEIGHTS[:-1],
    }
    assert a.tree(target) == wanted
    assert [entry.path for entry in manifest.files] == list(wanted)
    for entry in manifest.files:
        assert entry.sha256 == hashlib.sha256(wanted[entry.path]).hexdigest()
        assert entry.size == len(wanted[entry.path])
    assert manifest.name == "m" and manifest.source == SOURCE and manifest.left_out == 7
    assert read_manifest(target) == manifest and seen == [("m~incomplete", b"b", SOURCE)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "m"]


NO_MODELS: Dict[str, Any] = {
    "a path that leads out": [("../x", b"x")],
    "what is never content": [(".git/config", b"x")],
    "a path from the root": [("/etc/x", b"x")],
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_file_of_a_model_is_refused(name: str, tmp_path: Path) -> None:
    blob = layer(tmp_path / "blobs", a.tar_of(NO_MODELS[name]))
    with pytest.raises((HfshipError, ValueError)):
        restore_layers([blob], tmp_path / "m", SOURCE, accepted)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("file", ["w", ""])
def test_a_layer_that_changed_after_it_was_fetched_is_refused(file: str, tmp_path: Path) -> None:
    content = WEIGHTS if file else a.tar_of([("w", b"x")])
    blob = layer(tmp_path / "blobs", content, file)
    blob.blob.write_bytes(content + b"\0")
    with pytest.raises(IntegrityError) as told:
        restore_layers([blob], tmp_path / "m", SOURCE, accepted)
    if file:
        assert told.value.what == f"{blob.blob} is not what its digest says"
        assert told.value.why == "it changed after it was fetched"
    assert not (tmp_path / "m").exists()


def test_what_nobody_read_is_hashed_too(tmp_path: Path) -> None:
    one = layer(tmp_path / "blobs", WEIGHTS)
    hashed = _HashedFile(io.BytesIO(WEIGHTS))
    assert hashed.read(3) == WEIGHTS[:3]
    hashed.require(one)
    with pytest.raises(IntegrityError):
        _HashedFile(io.BytesIO(WEIGHTS[1:])).require(one)
    assert one.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
