"""`list`: what is here, on whichever side; and what a command without a name says there is for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Dict, List

import pytest

from conftest import Program
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import FileEntry, Source, make_manifest, write_manifest
from hfship.ops.stock import stocked_model, stocked_models, stocked_packages
from support.hub import FaultHub

COMMIT = "a" * 40
SOURCE = Source(
    "https://hub", "org/tiny", "main", "org/tiny", COMMIT, fetched_at="2026-01-31T04:05:06Z"
)


def listed(hfship: Program, *words: str) -> Dict[str, Any]:
    found: Dict[str, Any] = json.loads(hfship("list", "--json", *words).stdout)
    return found


def make(folder: Path, **fields: Any) -> Path:
    """A model folder with a manifest of one file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    entry = FileEntry("config.json", 2, "0" * 64)
    manifest = make_manifest(folder.name, [entry], SOURCE)
    write_manifest(folder, manifest.__class__(**{**vars(manifest), **fields}))
    return folder


STATES = [
    ({}, "", "whole"),
    ({"source": None}, "", "unproven"),
    ({"unproven": True, "source": None}, "", "unproven"),
    ({"left_out": 2}, "", "partial"),
    ({"partial": ("model-2.safetensors",)}, "", "partial"),
    ({}, "rm config.json", "changed"),
    ({}, "grow config.json", "changed"),
    ({}, "break manifest", "unreadable"),
    ({}, "no manifest", "unproven"),
    ({}, "fetch begun", "unfinished"),
]


@pytest.mark.parametrize("fields, harm, state", STATES)
def test_the_state_of_a_model_is_seen_without_reading_it(
    fields: Dict[str, Any], harm: str, state: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "tiny", **fields)
    manifest = folder / ".hfship/manifest.json"
    if harm == "rm config.json":
        (folder / "config.json").unlink()
    elif harm == "grow config.json":
        (folder / "config.json").write_text("{ }")
    elif harm == "break manifest":
        manifest.write_text("{")
    elif harm:
        manifest.unlink()
    if harm == "fetch begun":
        (folder / ".hfship/partial").mkdir()
    found = stocked_model(folder)
    assert found.state == state
    assert bool(found.note) == (state not in ("whole",))


def test_models_lie_in_folders_by_name_and_by_organisation(tmp_path: Path) -> None:
    make(tmp_path / "models/tiny")
    make(tmp_path / "models/org/other")
    found = stocked_models([tmp_path / "models", tmp_path / "nowhere", tmp_path / "models"])
    assert [model.name for model in found] == ["org/other", "tiny"]
    assert found[1].commit == COMMIT and found[1].fetched_at == SOURCE.fetched_at


def test_packages_tell_parts_and_what_is_missing(pyz: Program, model: Path, tmp_path: Path) -> None:
    pyz("pack", model, "-o", tmp_path / "a", "--split", "2200k")
    pyz("pack", model, "-o", tmp_path / "whole")
    parts = sorted((tmp_path / "a").glob("*.tar.zst.0*"))
    assert len(parts) > 1
    (found,) = stocked_packages([tmp_path / "a"])
    assert (found.state, found.parts, found.missing) == ("whole", len(parts), ())
    parts[0].unlink()
    (found,) = stocked_packages([tmp_path / "a"])
    assert (found.state, found.missing) == ("incomplete", (parts[0].name,))
    (tmp_path / "whole/other.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    states = {one.name: one.state for one in stocked_packages([tmp_path / "whole"])}
    assert states == {"tiny": "whole", "other": "foreign"}
    shutil.move(parts[-1], parts[0])  # the tables are gone, and the sums tell
    parts[0].write_bytes(b"x")
    (found,) = stocked_packages([tmp_path / "a"])
    assert (found.state, found.missing) == ("incomplete", (parts[-1].name,))


def test_both_sides_are_seen_and_what_the_models_file_wants(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": hub.url}
    (tmp_path / "models.toml").write_text(
        '[[model]]\nrepo = "org/tiny"\n[[model]]\nrepo = "org/more"\n'
        '[[model]]\nrepo = "org/tiny"\nname = "other"\nrevision = "' + "b" * 40 + '"\n'
    )
    file = ["--models", str(tmp_path / "models.toml")]
    wanted: List[Any] = listed(hfship, *file)["wanted"]
    assert [(one["name"], one["lacks"]) for one in wanted] == [
        ("tiny", "is not here"),
        ("more", "is not here"),
        ("other", "is not here"),
    ]
    assert wanted[0]["next_command"] == ["fetch", "org/tiny"]

    hfship("fetch", "org/tiny", env=env)
    shutil.copytree(hfship.home / "models/tiny", hfship.home / "models/other")
    stock = listed(hfship, *file)
    (tiny,) = [one for one in stock["models"] if one["name"] == "tiny"]
    assert tiny["state"] == "whole" and len(tiny["commit"]) == 40
    assert [one["name"] for one in stock["wanted"]] == ["more", "other"]
    assert "wanted is bbbbbbbbbbbb" in stock["wanted"][1]["lacks"]

    hfship("pack", "tiny")
    shutil.rmtree(hfship.home / "models/tiny")
    wanted = listed(hfship, *file)["wanted"]
    assert wanted[0]["lacks"] == "is packed, and not unpacked here"
    hfship(*wanted[0]["next_command"])
    assert [one["name"] for one in listed(hfship, *file)["wanted"]] == ["more", "other"]


def test_kinds_can_be_chosen_and_a_slip_is_told(hfship: Program) -> None:
    said = hfship("list", "models").stdout
    assert "models: none in" in said and "packages" not in said
    refused = hfship("list", "model", code=2).stderr
    assert "did you mean models?" in refused


@pytest.mark.parametrize("command", ["pack", "serve", "unpack", "verify", "push", "logs"])
def test_a_command_without_a_name_shows_what_it_could_take(
    command: str, pyz: Program, model: Path
) -> None:
    shutil.copytree(model, pyz.home / "models/tiny")
    pyz("pack", "tiny")
    words = [command, "host:dir"] if command == "push" else [command]
    said = pyz(*words, code=2).stderr
    assert "no name is given; there is:" in said
    assert "tiny" in said.partition("there is:")[2]
    typed = said.partition("  next  ")[2].splitlines()[0]
    name = "hfship.pyz" if pyz.argv[1].endswith(".pyz") else "hfship"
    assert f"{name} {command} " in typed and "tiny" in typed


def test_where_nothing_is_here_it_is_said_where_to_look(hfship: Program) -> None:
    said = hfship("serve", code=2).stderr
    assert "nothing is here for it" in said and "list" in said.partition("next")[2]


def test_folders_of_images_are_images_and_no_models(hfship: Program) -> None:
    digest = "sha256:" + "0" * 64
    facts = ImageFacts(
        "docker.io/vllm/vllm-openai:v0.27.1", digest, digest, digest, (digest,), "linux/amd64"
    )
    make(hfship.home / "models/vllm-openai_v0.27.1", image=facts)
    make(hfship.home / "models/tiny")
    stock = listed(hfship)
    assert [one["name"] for one in stock["models"]] == ["tiny"]
    assert "image" not in stock["models"][0]
    assert [(one["reference"], one["version"]) for one in stock["images"]][:1] == [
        ("vllm/vllm-openai:v0.27.1", "0.27.1")
    ]
    assert stock["images"][0]["place"].endswith("models/vllm-openai_v0.27.1")


def test_what_is_not_an_archive_of_ours_has_its_size(tmp_path: Path) -> None:
    (tmp_path / "other.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(50))
    found = stocked_packages([tmp_path / "missing", tmp_path])
    assert [(one.name, one.bytes) for one in found] == [("other", 54)]


def test_an_unproven_model_says_why_in_its_own_words(tmp_path: Path) -> None:
    folder = make(tmp_path / "tiny", source=None, faults=("w: cut short",))
    assert stocked_model(folder).note == "packed by force: w: cut short"
