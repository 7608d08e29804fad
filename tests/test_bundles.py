# SPDX-License-Identifier: Apache-2.0
"""Deliveries in what is chosen and refused; test_bundle.py packs and serves real ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest

from hfship.archive.bundle import Bundle, BundleItem, write_bundle
from hfship.base.errors import IntegrityError, NotFoundError
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import FileEntry, make_manifest, write_manifest
from hfship.base.values import replace
from hfship.commands import bundles
from hfship.commands.context import Context

DIGESTS = ["sha256:" + letter * 64 for letter in "abcd"]


def fetched(root: Path, name: str, reference: Optional[str]) -> Path:
    """The folder of an image, or of something else that has its layout."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "oci-layout").touch()
    image = None
    if reference:
        image = ImageFacts(reference, *DIGESTS[:3], (DIGESTS[3],), "linux/amd64")
    manifest = make_manifest(name, [FileEntry("x", 1, "0" * 64)])
    write_manifest(folder, replace(manifest, image=image))
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    root = tmp_path / "models"
    fetched(root, "a_model", None)
    (root / "b_unfinished").mkdir()
    (root / "b_unfinished/oci-layout").touch()
    fetched(root, "app_1", "docker.io/library/app:1")
    for version in ("0.9.0", "0.32.0"):
        reference = f"docker.io/vllm/vllm-openai:v{version}"
        fetched(root, f"vllm-openai_v{version}", reference)
    return SimpleNamespace(models_dir=root)


# -- which image


def test_the_image_that_is_wanted_is_found_by_any_of_its_names(
    settings: Any, tmp_path: Path
) -> None:
    app = settings.models_dir / "app_1"
    words = ["app:1", "docker.io/library/app:1", "docker://app:1", "app_1", str(app)]
    assert {bundles.image_folder(word, tmp_path, settings) for word in words} == {app}
    other = fetched(tmp_path / "elsewhere", "other_2", "quay.io/other:2")
    assert bundles.image_folder(str(other), tmp_path, settings) == other


@pytest.mark.parametrize("word", ["app:2", "docker://app:2", "model", "nothing"])
def test_an_image_that_is_not_here_is_told_with_those_that_are(
    word: str, settings: Any, tmp_path: Path
) -> None:
    wanted = str(settings.models_dir / "a_model") if word == "model" else word
    with pytest.raises(NotFoundError) as caught:
        bundles.image_folder(wanted, tmp_path, settings)
    name = wanted.replace("docker://", "")
    assert caught.value.what == f"the image {name} is not here"
    images = "app:1, vllm/vllm-openai:v0.32.0, vllm/vllm-openai:v0.9.0"
    assert caught.value.why == f"here are: {images}"
    assert caught.value.next_step == f"hfship fetch docker://{name}"


def test_the_newest_of_vllm_is_packed_where_none_is_named(settings: Any, tmp_path: Path) -> None:
    newest = settings.models_dir / "vllm-openai_v0.32.0"
    assert bundles.image_folder("", tmp_path, settings) == newest
    empty: Any = SimpleNamespace(models_dir=tmp_path / "none")
    with pytest.raises(NotFoundError, match="no image of vLLM is here to pack") as caught:
        bundles.image_folder("", tmp_path, empty)
    assert caught.value.why == "no image was fetched"


def test_one_for_cpus_is_packed_where_there_is_no_other(tmp_path: Path) -> None:
    settings: Any = SimpleNamespace(models_dir=tmp_path)
    folder = fetched(tmp_path, "cpu", "docker.io/vllm/vllm-openai-cpu:v0.32.0")
    assert bundles.image_folder("", tmp_path, settings) == folder
    newest = fetched(tmp_path, "gpu", "docker.io/vllm/vllm-openai:v0.31.0")
    assert bundles.image_folder("", tmp_path, settings) == newest


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"architectures": ["Qwen3ForCausalLM", "B"]}', "Qwen3ForCausalLM"),
        ('{"architectures": []}', ""),
        ('{"architectures": 7}', ""),
        ("{}", ""),
        ("[]", ""),
        ("{", ""),
        (None, ""),
    ],
)
def test_the_class_of_a_model(text: Optional[str], name: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert bundles._architecture(tmp_path) == name


def test_an_image_is_packed_where_its_archive_or_a_delivery_lies(
    settings: Any, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "m.tar.zst").touch()
    assert not bundles.has_image([tmp_path / "none", target], settings)
    (target / "app_1.tar.zst.0001").touch()
    assert bundles.has_image([tmp_path / "none", target], settings)
    other = tmp_path / "other"
    other.mkdir()
    write_bundle(other, delivery())
    assert bundles.has_image([other], settings)


# -- serve


def delivery() -> Bundle:
    items = (
        BundleItem("image", "app_1", "app_1.tar.zst", "i" * 40, "app:1"),
        BundleItem("model", "m", "m.tar.zst", "v" * 40, "org/m"),
        BundleItem("model", "n", "n.tar.zst", "w" * 40, "org/n"),
    )
    return Bundle("m", items)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a delivery, and what its archives hold."""
    folder = tmp_path / "usb"
    folder.mkdir()
    path = write_bundle(folder, delivery())
    holds = {item.archive: item.version for item in delivery().items}
    for name in holds:
        (folder / name).touch()

    def open_archive(files: Any) -> Any:
        version = holds[files.name]
        return SimpleNamespace(manifest=SimpleNamespace(version=version) if version else None)

    def version_of(manifest: Any) -> Any:
        return SimpleNamespace(id=manifest.version, short=manifest.version[:7])

    monkeypatch.setattr("hfship.archive.opening.open_archive", open_archive)
    monkeypatch.setattr("hfship.archive.versions.version_of", version_of)
    return SimpleNamespace(folder=folder, path=path, holds=holds)


def context_of(**asked: Any) -> Context:
    nothing: Any = None
    args = argparse.Namespace(image=asked.get("image", ""), port=7)
    return Context(args, nothing, nothing, asked=asked)


@pytest.mark.parametrize("asked", [{}, {"image": "mine:1"}])
def test_images_are_loaded_then_models_unpacked_and_served_with_them(
    asked: Dict[str, Any], place: Any
) -> None:
    log: List[Any] = []

    def unpack(archive: Path) -> Path:
        log.append(f"unpack {archive.name}")
        return Path("/site", archive.name[0])

    def load(archive: Path) -> None:
        log.append(f"load {archive.name}")

    context = context_of(**asked)
    place.holds["n.tar.zst"] = ""  # nobody knows: unpacking tells
    for word in (str(place.path), str(place.folder)):
        log.clear()
        found = bundles.unpacked_bundle(context, word, load, unpack)
        assert log == ["load app_1.tar.zst", "unpack m.tar.zst", "unpack n.tar.zst"]
        assert [folder for _, folder in found] == ["/site/m", "/site/n"]
        for run, _ in found:
            wanted = asked.get("image", "app:1")
            assert (run.args.image, run.args.port, run.asked) == (wanted, 7, {"image": wanted})
    assert context.args.image == asked.get("image", "")


def test_a_delivery_of_models_alone_names_no_image(place: Any) -> None:
    value = json.loads(place.path.read_text())
    value["items"] = value["items"][1:]
    place.path.write_text(json.dumps(value))
    context = context_of()
    found = bundles.unpacked_bundle(context, str(place.path), _never, lambda _: Path("/site/m"))
    assert [run for run, _ in found] == [context, context]


def test_a_delivery_that_is_not_whole_brings_nothing(place: Any) -> None:
    context = context_of()
    (place.folder / "n.tar.zst").unlink()
    (place.folder / "app_1.tar.zst").unlink()
    with pytest.raises(NotFoundError, match="is not complete") as missing:
        bundles.unpacked_bundle(context, str(place.path), _never, _never)
    assert missing.value.why == "missing: app_1.tar.zst, n.tar.zst"


def test_an_archive_that_was_replaced_is_told(place: Any) -> None:
    place.holds["m.tar.zst"] = "x" * 40
    with pytest.raises(
        IntegrityError, match="m.tar.zst is another version than m.bundle.json"
    ) as no:
        bundles.unpacked_bundle(context_of(), str(place.path), _never, _never)
    assert no.value.why == "it holds xxxxxxx, the delivery has vvvvvvv"
    assert no.value.next_step == "hfship unpack m.tar.zst, then hfship serve m"


def test_a_delivery_without_a_model_serves_nothing(tmp_path: Path, place: Any) -> None:
    value = json.loads(place.path.read_text())
    value["items"] = value["items"][:1]
    place.path.write_text(json.dumps(value))
    with pytest.raises(NotFoundError, match="holds no model to serve"):
        bundles.unpacked_bundle(context_of(), str(place.path), lambda _: None, _never)


def _never(_: Path) -> Any:
    raise AssertionError("nothing is brought")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("m.bundle.json", True),
        ("nowhere/m.bundle.json", True),
        ("./usb", True),
        ("usb/", True),
        (".", False),
        ("usb", False),
        ("./model", False),
        ("./empty", False),
        ("org/m", False),
    ],
)
def test_what_means_a_delivery(
    word: str, meant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name alone means a model; a folder that holds one, too."""
    for name in ("usb", "model", "empty"):
        (tmp_path / name).mkdir()
    for name in ("usb", "model"):
        write_bundle(tmp_path / name, delivery())
    (tmp_path / "model/config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert bundles.is_bundle(word) == meant
    if word == ".":
        monkeypatch.chdir(tmp_path / "usb")
        assert bundles.is_bundle(".")


@pytest.mark.parametrize("plan", [True, False])
def test_a_delivery_cannot_be_planned(plan: bool) -> None:
    error = bundles.require_no_plan(argparse.Namespace(plan=plan), "b")
    assert (error is not None) == plan
    if error:
        assert error.next_step == "hfship serve b --write-only, or unpack it first"


# -- pack


@pytest.mark.parametrize("file", ["", "m.toml", "m.json"])
def test_what_makes_a_delivery_is_written_into_every_target(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models file of the run, where it is TOML; else one is made."""
    targets = [tmp_path / "a", tmp_path / "b"]
    for target in targets:
        target.mkdir()
    context: Any = SimpleNamespace(file=None)
    if file:
        (tmp_path / file).write_text("# mine\n")
        context.file = SimpleNamespace(path=tmp_path / file)

    def packed(name: str, archive: str) -> Any:
        part = SimpleNamespace(path=Path("/out", archive))
        manifest = make_manifest(name, [FileEntry("x", 1, "0" * 64)])
        return SimpleNamespace(manifest=manifest, parts=[part], size=9)

    pairs: Any = [(packed("m", "m.tar.zst"), packed("app_1", "app_1.tar.zst.0001"))]
    assert bundles.finish_bundles([], targets, context) == []
    assert bundles.finish_bundles(pairs, targets, context) == [targets[0] / "m.bundle.json"]
    for target in targets:
        items = json.loads((target / "m.bundle.json").read_text())["items"]
        assert [item["archive"] for item in items] == ["app_1.tar.zst", "m.tar.zst"]
        text = (target / "models.toml").read_text()
        assert (text == "# mine\n") == (file == "m.toml") and text
        assert "hfship" in (target / "READ-ME-FIRST.txt").read_text()
