# SPDX-License-Identifier: Apache-2.0
"""What a registry has, and the plan for it, with answers that are written here; test_registry.py has
servers."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from pathlib import Path
from typing import Any, Dict, List, Tuple, Type

import pytest

from hfship.base.errors import HfshipError, HostError, IntegrityError, NetworkError, UsageError
from hfship.base.imagefacts import KIND, ImageFacts
from hfship.base.manifest import (
    MANIFEST_PATH,
    FileEntry,
    Source,
    make_manifest,
    read_manifest,
)
from hfship.base.values import replace
from hfship.hub import image as room
from hfship.hub.image import (
    ImageRequest,
    LayeredModel,
    RemoteImage,
    RemoteModel,
    described_of,
    finish_image,
    look_up,
    plan_image,
    plan_layers,
    write_known,
)
from hfship.hub.modelpack import FILE_PATH, model_artifact
from hfship.hub.registry import FetchedManifest
from hfship.hub.registry_protocol import OCI_INDEX, OCI_MANIFEST, blob_path, parse_reference
from support.registry import MANIFEST, Image, digest, dumps, make_image, make_index, small_image
from support.scripted import Scripted, ScriptedRegistry

IMAGE, ARM = small_image(2000), small_image(2000, seed=1, architecture="arm64")
INDEX = make_index({"amd64": IMAGE, "arm64": ARM})
AMD64 = "linux/amd64"


def said(body: bytes, kind: str = "") -> Scripted:
    return (200, {"Content-Type": kind} if kind else {}, body)


def head_of(body: bytes) -> Scripted:
    return (200, {"Docker-Content-Digest": digest(body)}, b"")


def answers_for(image: Image = IMAGE) -> List[Scripted]:
    """Of an index, the manifest and the configuration."""
    return [said(INDEX), said(image.manifest), said(image.blobs[image.config])]


def asked_by(asked: ScriptedRegistry) -> List[Tuple[str, str]]:
    """Method and what it was for."""
    return [(method, url.partition("/org/app/")[2]) for method, url, _ in asked.sent]


# -- what the registry has


def test_an_image_is_looked_up_by_one_get_for_each_text(tmp_path: Path) -> None:
    asked = ScriptedRegistry(*answers_for())
    image = look_up(asked.client, AMD64, tmp_path)
    assert isinstance(image, RemoteImage)
    assert asked_by(asked) == [
        ("GET", "manifests/1"),
        ("GET", f"manifests/{IMAGE.digest}"),
        ("GET", f"blobs/{IMAGE.config}"),
    ]
    assert image.facts == ImageFacts(
        reference="r.example/org/app:1",
        digest=digest(INDEX),
        manifest_digest=IMAGE.digest,
        config_digest=IMAGE.config,
        diff_ids=tuple(IMAGE.diff_ids),
        platform=AMD64,
    )
    assert image.top.media_type == OCI_INDEX and image.top.size == len(INDEX)
    blobs = {blob_path(digest(INDEX)): INDEX, blob_path(IMAGE.digest): IMAGE.manifest}
    blobs[blob_path(IMAGE.config)] = IMAGE.blobs[IMAGE.config]
    layout = {"oci-layout", "index.json", "manifest.json"}
    assert set(image.texts) == {*blobs, *layout}
    assert {path: image.texts[path] for path in blobs} == blobs
    files = {file.path: (file.size, file.sha256) for file in image.files}
    for path, content in image.texts.items():
        assert files[path] == (len(content), digest(content)[7:])
    for layer in IMAGE.layers:
        assert files[blob_path(layer)] == (len(IMAGE.blobs[layer]), layer[7:])
    assert len(files) == len(image.files) == len(image.texts) + len(IMAGE.layers)


def test_a_tag_may_mean_a_manifest_itself(tmp_path: Path) -> None:
    asked = ScriptedRegistry(said(IMAGE.manifest), said(IMAGE.blobs[IMAGE.config]))
    image = look_up(asked.client, AMD64, tmp_path)
    assert isinstance(image, RemoteImage)
    assert image.top.digest == image.manifest_digest == IMAGE.digest
    assert image.top.media_type == OCI_MANIFEST


def test_an_empty_layer_is_one_file_though_it_stands_there_twice(tmp_path: Path) -> None:
    image = make_image([b"a", b"b", b"a"])
    asked = ScriptedRegistry(said(image.manifest), said(image.blobs[image.config]))
    found = look_up(asked.client, AMD64, tmp_path)
    assert isinstance(found, RemoteImage)
    assert [layer.digest for layer in found.layers] == image.layers[:2]
    assert len(found.facts.diff_ids) == 3


def put(folder: Path, *contents: bytes) -> None:
    """Blobs of an earlier fetch."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    for content in contents:
        (blobs / digest(content)[7:]).write_bytes(content)


def test_what_is_here_and_still_what_the_tag_means_is_not_asked_for(tmp_path: Path) -> None:
    put(tmp_path, INDEX, IMAGE.manifest, IMAGE.blobs[IMAGE.config])
    asked = ScriptedRegistry(head_of(INDEX))
    image = look_up(asked.client, AMD64, tmp_path)
    assert isinstance(image, RemoteImage) and image.facts.digest == digest(INDEX)
    assert asked_by(asked) == [("HEAD", "manifests/1")]


HERE: Dict[str, Any] = {
    "the tag moved": ([b"old"], [head_of(INDEX), *answers_for()]),
    "it does not say": ([INDEX], [(200, {}, b""), *answers_for()]),
    "only the index": ([INDEX], [head_of(INDEX), *answers_for()[1:]]),
    "only the manifest": ([IMAGE.manifest], [head_of(INDEX), said(INDEX), answers_for()[2]]),
}


@pytest.mark.parametrize("name", HERE)
def test_only_what_is_not_here_is_asked_for(name: str, tmp_path: Path) -> None:
    contents, answers = HERE[name]
    put(tmp_path, *contents)
    asked = ScriptedRegistry(*answers)
    assert isinstance(look_up(asked.client, AMD64, tmp_path), RemoteImage)
    assert not asked.session.answers


def test_a_text_here_that_was_changed_is_asked_for(tmp_path: Path) -> None:
    put(tmp_path, INDEX, IMAGE.manifest, IMAGE.blobs[IMAGE.config])
    for content in (IMAGE.manifest, IMAGE.blobs[IMAGE.config]):
        (tmp_path / "blobs/sha256" / digest(content)[7:]).write_bytes(b"{}")
    asked = ScriptedRegistry(head_of(INDEX), *answers_for()[1:])
    assert isinstance(look_up(asked.client, AMD64, tmp_path), RemoteImage)
    assert not asked.session.answers


def test_a_digest_needs_no_tag(tmp_path: Path) -> None:
    put(tmp_path, IMAGE.manifest, IMAGE.blobs[IMAGE.config])
    asked = ScriptedRegistry()
    asked.client.reference = parse_reference(f"docker://r.example/org/app@{IMAGE.digest}")
    image = look_up(asked.client, AMD64, tmp_path)
    assert isinstance(image, RemoteImage) and image.facts.digest == IMAGE.digest and not asked.sent


NO_LAYERS = dumps({**json.loads(IMAGE.manifest), "layers": []})
NO_CONFIG = make_image([b"a"], config=b"no json")
# answers -> the error
NO_IMAGES: Dict[str, Tuple[List[Scripted], Type[HfshipError], str]] = {
    "schema 1": ([said(b'{"schemaVersion": 1}')], IntegrityError, "a manifest of schema 1"),
    "another kind": ([said(b'{"mediaType": "a/b"}')], IntegrityError, "it is a/b"),
    "of the header": ([said(b"{}", "c/d")], IntegrityError, "it is c/d"),
    "nothing known": ([said(b"{}")], IntegrityError, "it is nothing that is known"),
    "a list": ([said(b"[]")], IntegrityError, "it is nothing that is known"),
    "no json": ([said(b"<html>")], IntegrityError, ""),
    "no layers": (
        [said(NO_LAYERS), said(IMAGE.blobs[IMAGE.config])],
        IntegrityError,
        "it has 0 layers, its configuration 2",
    ),
    "a configuration that is none": (
        [said(NO_CONFIG.manifest), said(NO_CONFIG.blobs[NO_CONFIG.config])],
        IntegrityError,
        "",
    ),
    "no platform": ([said(make_index({"arm64": ARM}))], HostError, "it is there for: linux/arm64"),
    "for another machine": (
        [said(ARM.manifest), said(ARM.blobs[ARM.config])],
        HostError,
        "the registry has it for that platform only",
    ),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_told(name: str, tmp_path: Path) -> None:
    answers, error, why = NO_IMAGES[name]
    with pytest.raises(error) as told:
        look_up(ScriptedRegistry(*answers).client, AMD64, tmp_path)
    assert why in told.value.why
    if error is IntegrityError:
        what = "what r.example has as r.example/org/app:1 cannot be used as an image"
        assert told.value.what == what


@pytest.mark.parametrize(
    ("artifact_type", "config_type", "shown"),
    [
        ("a/t", "application/vnd.oci.image.config.v1+json", "a/t"),
        ("", "a/c", "a/c"),
        ("a/t\x1b", "a/c", "a/t?"),
    ],
)
def test_an_artifact_is_no_image(
    artifact_type: str, config_type: str, shown: str, tmp_path: Path
) -> None:
    value = json.loads(IMAGE.manifest)
    value["artifactType"] = artifact_type
    value["config"]["mediaType"] = config_type
    with pytest.raises(UsageError) as told:
        look_up(ScriptedRegistry(said(dumps(value))).client, AMD64, tmp_path)
    assert told.value.what == "r.example/org/app:1 is no container image"
    assert told.value.why == f"it is an artifact of the type {shown}"


def test_a_configuration_is_not_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LARGEST_CONFIG", 10)
    with pytest.raises(HfshipError, match="has a configuration of"):
        look_up(ScriptedRegistry(*answers_for()).client, AMD64, tmp_path)


def test_a_text_as_another_one_would_name_it() -> None:
    found = described_of(FetchedManifest(IMAGE.manifest, IMAGE.digest, ""))
    assert (found.media_type, found.digest) == (MANIFEST, IMAGE.digest)
    assert (found.size, found.annotations) == (len(IMAGE.manifest), {})


# -- models

CONTENT = {"config.json": b"{}", "model.safetensors": b"weights"}
HUB = Source("https://hub", "org/m", "main", "org/m", "a" * 40, license="mit")


def model_of(listed: Any = CONTENT, source: Any = HUB, ours: bool = True) -> Any:
    """The manifest of a model in a registry, and our manifest among its layers."""
    entries = [FileEntry(path, len(one), digest(one)[7:]) for path, one in listed.items()]
    manifest = make_manifest("m", entries, source)
    text = manifest.to_json().encode()
    pushed = [FileEntry(path, len(one), digest(one)[7:]) for path, one in CONTENT.items()]
    if ours:
        pushed.append(FileEntry(MANIFEST_PATH, len(text), digest(text)[7:]))
    return model_artifact(manifest, pushed).manifest, text


OF_REGISTRY = Source(
    endpoint=ScriptedRegistry.url,
    repo="r.example/org/app",
    revision="1",
    resolved_repo="r.example/org/app",
    commit="",
    repo_type=KIND,
)


@pytest.mark.parametrize(("source", "ours"), [(HUB, True), (None, True), (HUB, False)])
def test_a_model_is_the_hubs_where_our_manifest_says_so(
    source: Any, ours: bool, tmp_path: Path
) -> None:
    body, text = model_of(source=source, ours=ours)
    asked = ScriptedRegistry(said(body), *([said(text)] if ours else []))
    model = look_up(asked.client, AMD64, tmp_path)
    assert isinstance(model, RemoteModel)
    of_registry = replace(OF_REGISTRY, commit=digest(body)[7:])
    assert model.source == (source if source and ours else of_registry)
    assert {file.path: file.sha256 for file in model.files} == {
        path: digest(content)[7:] for path, content in CONTENT.items()
    }
    assert asked.client.digests["config.json"] == digest(b"{}")
    assert model.top.digest == digest(body) and model.reference is asked.client.reference


def test_a_model_has_what_its_manifest_lists(tmp_path: Path) -> None:
    body, text = model_of({**CONTENT, "config.json": b"[]"})
    with pytest.raises(IntegrityError) as told:
        look_up(ScriptedRegistry(said(body), said(text)).client, AMD64, tmp_path)
    assert told.value.what == "r.example/org/app:1 does not hold what its manifest lists"
    assert told.value.why == "config.json" and told.value.next_step == "push it again"


def test_a_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    body, _ = model_of(ours=False)
    asked = ScriptedRegistry(said(body.replace(b"config.json", b"../../x")))
    with pytest.raises(IntegrityError, match="cannot be used as an image") as told:
        look_up(asked.client, AMD64, tmp_path)
    assert "../../x" in told.value.why


def test_a_model_may_have_layers_that_are_archives(tmp_path: Path) -> None:
    body, _ = model_of()
    value = json.loads(body)
    kinds = [
        "application/vnd.kitops.modelkit.model.v1.tar+gzip",
        "application/vnd.kitops.modelkit.config.v1+json",
        "application/vnd.kitops.modelkit.model.v1.tar+gzip",
    ]
    sums = [f"sha256:{digit * 64}" for digit in "010"]
    for kind, one in zip(kinds, sums):
        value["layers"].append({"mediaType": kind, "digest": one, "size": 3})
    model = look_up(ScriptedRegistry(said(dumps(value))).client, AMD64, tmp_path)
    assert isinstance(model, LayeredModel)
    files = {layer.digest: path for layer, path in zip(model.layers, model.files)}
    assert files.pop(sums[0]) == "" and sums[1] not in files
    assert files == {
        layer["digest"]: layer["annotations"][FILE_PATH] for layer in value["layers"][:3]
    }
    assert model.source == replace(OF_REGISTRY, commit=digest(dumps(value))[7:])


# -- plans


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of an image in which something is: an empty one would go with its lock."""
    made = tmp_path / "app_1"
    (made / ".hfship").mkdir(parents=True)
    (made / "note.txt").write_text("not ours")
    return made


def planned(folder: Path, *answers: Scripted, dry_run: bool = False, rehash: bool = False) -> Any:
    asked = ScriptedRegistry(*answers)
    request = ImageRequest(asked.client.reference, AMD64, "app_1", rehash)
    with contextlib.ExitStack() as locks:
        plan = plan_image(asked.client, request, folder, locks, threading.Event(), dry_run)
    return plan, asked


def fetched(folder: Path, image: Image = IMAGE) -> Any:
    """Fetch an image, as if its layers were known beforehand, too."""
    head = [head_of(image.manifest)] if (folder / "blobs").exists() else []
    plan, _ = planned(folder, *head, said(image.manifest), said(image.blobs[image.config]))
    layers = {blob_path(layer): image.blobs[layer] for layer in image.layers}
    texts = {**plan.image.texts, **layers}
    return finish_image(write_known(replace(plan, image=replace(plan.image, texts=texts))))


def test_a_plan_of_an_image(folder: Path, tmp_path: Path) -> None:
    plan, _ = planned(folder, *answers_for())
    files = plan.files
    assert (files.name, files.folder, files.present) == ("app_1", folder, {})
    assert files.snapshot.source == replace(OF_REGISTRY, commit=digest(INDEX)[7:])
    assert files.wanted == files.snapshot.files == plan.image.files
    assert not files.outdates and plan.moved == ""
    planned(tmp_path / "other", *answers_for(), dry_run=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_folder_is_locked_while_it_is_planned(
    dry_run: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: List[Path] = []
    monkeypatch.setattr(room, "lock_folder", lambda where, *_: locked.append(where))
    planned(folder, *answers_for(), dry_run=dry_run)
    assert locked == ([] if dry_run else [folder])


def test_what_is_known_is_written_and_proven(folder: Path) -> None:
    before, _ = planned(folder, *answers_for())
    plan = write_known(before)
    assert before.files.present == {}, "a plan is a value"
    assert set(plan.files.present) == set(plan.image.texts)
    for path, content in plan.image.texts.items():
        assert (folder / path).read_bytes() == content
        assert plan.files.present[path] == digest(content)[7:]
    left = [transfer.remote.path for transfer in plan.files.transfers]
    assert sorted(left) == sorted(blob_path(layer) for layer in IMAGE.layers)
    again, _ = planned(folder, head_of(INDEX))
    assert set(again.files.present) == set(plan.image.texts), "they are recorded"


def test_a_folder_holds_one_image_and_tells_when_the_tag_moved(folder: Path) -> None:
    manifest = fetched(folder)
    assert manifest.image and manifest.image.digest == IMAGE.digest
    assert read_manifest(folder) == manifest
    same, asked = planned(folder, head_of(IMAGE.manifest))
    assert same.moved == "" and not same.files.outdates and not same.files.transfers
    newer = small_image(2000, seed=7)
    moved = [head_of(newer.manifest), said(newer.manifest), said(newer.blobs[newer.config])]
    plan, _ = planned(folder, *moved)
    assert plan.moved == IMAGE.digest and plan.files.outdates
    (folder / ".hfship/partial").mkdir()
    fetched(folder, newer)
    blobs = {path.name for path in (folder / "blobs/sha256").iterdir()}
    assert blobs == {one[7:] for one in (*newer.blobs, newer.digest)}
    assert (folder / "note.txt").exists() and not (folder / ".hfship/partial").exists()


def test_records_are_believed_unless_all_is_to_be_hashed(folder: Path) -> None:
    fetched(folder)
    hashed: List[Any] = []
    for rehash in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "present_files", lambda *words: hashed.append(words[4]) or {})
            planned(folder, head_of(IMAGE.manifest), rehash=rehash)
    assert hashed == [False, True]


def test_a_folder_of_another_image_stays(folder: Path) -> None:
    fetched(folder)
    text = (folder / MANIFEST_PATH).read_text()
    (folder / MANIFEST_PATH).write_text(text.replace("r.example/org/app", "r.example/org/other"))
    with pytest.raises(UsageError) as told:
        planned(folder, *answers_for())
    assert told.value.what == f"{folder} holds something else, r.example/org/other"
    step = "hfship fetch docker://r.example/org/app:1 --name ANOTHER_NAME"
    assert told.value.next_step == step
    manifest = read_manifest(folder)
    assert manifest
    (folder / MANIFEST_PATH).write_text(replace(manifest, source=None).to_json())
    with pytest.raises(UsageError, match="holds something else, app_1"):
        planned(folder, *answers_for())


def test_a_plan_of_a_model(folder: Path) -> None:
    body, text = model_of()
    plan, _ = planned(folder, said(body), said(text))
    assert plan.snapshot.source == HUB and {file.path for file in plan.wanted} == set(CONTENT)
    assert plan.wanted == plan.snapshot.files and plan.name == "app_1" and not plan.hub_notes
    assert plan.outdates, "nothing is here"
    for source, outdates in ((HUB, False), (replace(HUB, commit="b" * 40), True)):
        here = make_manifest("m", [FileEntry("config.json", 2, digest(b"{}")[7:])], source)
        (folder / MANIFEST_PATH).write_text(here.to_json())
        assert planned(folder, said(body), said(text))[0].outdates == outdates
    other = make_manifest("m", [], replace(HUB, resolved_repo="org/other"))
    (folder / MANIFEST_PATH).write_text(other.to_json())
    with pytest.raises(UsageError) as told:
        planned(folder, said(body), said(text))
    assert told.value.what == f"{folder} holds another model, org/other"
    assert told.value.next_step.endswith("--name ANOTHER_NAME")


def test_a_plan_of_layers(tmp_path: Path) -> None:
    body, _ = model_of()
    value = json.loads(body)
    kind = "application/vnd.cncf.model.weight.v1.tar"
    value["layers"].append({"mediaType": kind, "digest": f"sha256:{'0' * 64}", "size": 3})
    model, asked = planned(tmp_path / "m", said(dumps(value)))
    assert isinstance(model, LayeredModel)
    with contextlib.ExitStack() as locks:
        plan = plan_layers(asked.client, model, tmp_path / "layers", locks)
        with contextlib.ExitStack() as others, pytest.raises(HfshipError):
            plan_layers(asked.client, model, tmp_path / "layers", others)
    wanted = [layer.remote for layer in model.layers]
    assert list(plan.wanted) == list(plan.snapshot.files) == wanted and not plan.hub_notes
    assert (plan.name, plan.folder) == ("layers", tmp_path / "layers")
    assert plan.snapshot.source == model.source and plan.present == {}


@pytest.mark.parametrize("urls", [[], ["https://elsewhere/x"]])
def test_layers_that_may_not_be_passed_on_are_told(urls: List[str], tmp_path: Path) -> None:
    value = json.loads(IMAGE.manifest)
    value["layers"][0]["urls"] = urls
    answers = [said(dumps(value)), said(IMAGE.blobs[IMAGE.config])]
    _, asked = planned(tmp_path / "app_1", *answers)
    assert isinstance(asked.err, io.StringIO)
    words = "1 layer may not be passed on, says who made it (https://elsewhere/x)"
    assert (words in asked.err.getvalue()) == bool(urls)


def test_a_fault_of_the_registry_is_no_image_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(NetworkError):
        look_up(ScriptedRegistry((418, {}, b"")).client, AMD64, tmp_path)
