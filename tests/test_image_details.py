# SPDX-License-Identifier: Apache-2.0
"""`list IMAGE`: what an image that was fetched says of itself, and of its SBOM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.imagefacts import BLOBS, ImageFacts
from hfship.base.manifest import FileEntry, make_manifest, write_manifest
from hfship.base.values import replace
from hfship.commands.image_details import ATTESTED, ImageDetails, image_shown

INDEX, MANIFEST, CONFIG = ("sha256:" + letter * 64 for letter in "abc")
FACTS = ImageFacts(
    "docker.io/vllm/app:1",
    INDEX,
    MANIFEST,
    CONFIG,
    ("sha256:" + "1" * 64, "sha256:" + "2" * 64),
    "linux/amd64",
)
ENTRIES: List[Any] = [
    {"digest": "sha256:plain"},
    {"digest": "sha256:none", "annotations": None},
    {"digest": "sha256:other", "annotations": {ATTESTED: INDEX}},
    {"digest": "sha256:sbom\x1b", "annotations": {ATTESTED: MANIFEST}},
]
LABELS = {"version": "1", "odd\n": "\x1b[2J", "number": 7}


def fetched(root: Path, name: str, image: Any = FACTS, **blobs: Any) -> Path:
    """The folder of an image."""
    folder = root / name
    (folder / BLOBS).mkdir(parents=True)
    (folder / "oci-layout").touch()
    manifest = make_manifest(name, [FileEntry("x", 3_000_000_000, "0" * 64)])
    write_manifest(folder, replace(manifest, image=image))
    for digest, value in blobs.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{BLOBS}{digest * 64}").write_text(text)
    return folder


def shown(root: Path, name: str) -> Any:
    """What `list NAME` finds."""
    settings = SimpleNamespace(models_dir=root / "models", site_models_dir=root / "site")
    context: Any = SimpleNamespace(settings=settings)
    return image_shown(name, context)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The folder of an image, behind one that is damaged and a model."""
    root = tmp_path / "models"
    (root / "a_broken").mkdir(parents=True)
    (root / "a_broken/oci-layout").touch()
    fetched(root, "a_model", image=None)
    return fetched(
        root, "app_1", a={"manifests": ENTRIES}, c={"config": {"Labels": LABELS}, "os": "linux"}
    )


def test_an_image_is_known_by_its_name_reference_and_folder(app: Path, tmp_path: Path) -> None:
    for name in ("app_1", "vllm/app:1", FACTS.reference, str(app)):
        assert shown(tmp_path, name).folder == app, name
    for name in ("app", "a_model", "a_broken", "vllm/app", ""):
        assert shown(tmp_path, name) is None, name


def test_one_that_was_unpacked_is_known_too(tmp_path: Path) -> None:
    folder = fetched(tmp_path / "site", "app_1")
    found = shown(tmp_path, "app_1")
    assert (found.folder, found.labels, found.attestation) == (folder, {}, "")


def test_it_says_its_labels_and_where_its_sbom_is(app: Path, tmp_path: Path) -> None:
    found = shown(tmp_path, "app_1")
    assert set(found.labels.values()) >= {"1", "7"} and len(found.labels) == 3
    rows = [re.split("  +", line, maxsplit=1) for line in found.text().splitlines()]
    assert rows[:7] == [
        ["image", "vllm/app:1"],
        ["platform", "linux/amd64"],
        ["digest", INDEX],
        ["image ID", CONFIG],
        ["size", "3.0 GB, 2 layers"],
        ["folder", str(app)],
        ["SBOM", f"in the registry: docker://docker.io/vllm/app@{found.attestation}"],
    ]
    assert rows[7] == ["label number", "7"] and rows[9] == ["label version", "1"]
    assert found.attestation.startswith("sha256:sbom") and "\x1b" not in found.text()
    value = found.json()
    assert (value["folder"], value["bytes"]) == (str(app), 3_000_000_000)
    assert value["attestation"] == found.attestation and value["labels"] == found.labels
    assert value["image"]["digest"] == INDEX


# blobs of the index and of the configuration -> (labels, attestation)
POOR: List[Tuple[Dict[str, Any], Dict[str, str], str]] = [
    ({}, {}, ""),
    ({"a": "{", "c": "{"}, {}, ""),
    ({"a": [], "c": []}, {}, ""),
    ({"a": {"manifests": None}, "c": {"config": None}}, {}, ""),
    ({"a": {"manifests": ENTRIES[:3]}, "c": {"config": {"Labels": None}}}, {}, ""),
    ({"a": {}, "c": {"config": {}}}, {}, ""),
    ({"a": {"manifests": [{"annotations": {ATTESTED: MANIFEST}}]}}, {}, ""),
    ({"c": {"config": {"Labels": {"a": "b"}}}}, {"a": "b"}, ""),
]


@pytest.mark.parametrize(("blobs", "labels", "attestation"), POOR)
def test_an_image_that_says_little(
    blobs: Dict[str, Any], labels: Dict[str, str], attestation: str, tmp_path: Path
) -> None:
    fetched(tmp_path / "models", "app_1", **blobs)
    found: ImageDetails = shown(tmp_path, "app_1")
    assert (found.labels, found.attestation) == (labels, attestation)
    assert re.search("^SBOM +none in its index$", found.text(), re.MULTILINE)
    assert found.json()["attestation"] is None
