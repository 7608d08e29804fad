# SPDX-License-Identifier: Apache-2.0
"""The rows of `list`, each by itself; test_listing.py has the command."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, NamedTuple, Sequence

import pytest

from hfship.archive.damage import MISSING, Damage
from hfship.archive.layout import Delta
from hfship.archive.reader import ForeignArchive
from hfship.base.errors import HostError
from hfship.base.manifest import FileEntry, Source, make_manifest, write_manifest
from hfship.base.settings import ListedModel, ModelsFile
from hfship.base.values import replace
from hfship.ops.stock import (
    KINDS,
    Stock,
    StockedImage,
    StockedModel,
    StockedPackage,
    WantedModel,
    image_folders,
    images_to_build_upon,
    package_caption,
    stocked_deployments,
    stocked_images,
    stocked_model,
    stocked_package,
    stocked_packages,
    wanted_models,
)
from hfship.serve.engines import HeldImage


def deployment(name: str) -> Any:
    return SimpleNamespace(plan=SimpleNamespace(name=name, url=f"http://{name}"))


def status(one: Any) -> Any:
    if one.plan.name == "silent":
        raise HostError("it does not answer", "", "")
    return SimpleNamespace(state="healthy", note="up")


@pytest.mark.parametrize(
    ("found", "docker", "rows"),
    [
        ([], "", [("odd", "unknown", "", "odd is broken")]),
        (
            ["z", "a"],
            "",
            [
                ("a", "healthy", "http://a", "up"),
                ("odd", "unknown", "", "odd is broken"),
                ("z", "healthy", "http://z", "up"),
            ],
        ),
        (
            ["silent"],
            "",
            [
                ("odd", "unknown", "", "odd is broken"),
                ("silent", "unknown", "http://silent", "it does not answer"),
            ],
        ),
        (
            ["a"],
            "docker is down",
            [
                ("a", "unknown", "http://a", "docker is down"),
                ("odd", "unknown", "", "odd is broken"),
            ],
        ),
    ],
)
def test_all_deployments_are_listed_with_their_states(
    found: List[str], docker: str, rows: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def require() -> None:
        asked.append("docker")
        if docker:
            raise HostError(docker, "", "")

    asked: List[str] = []
    wrong = {"odd": HostError("odd is broken", "", "")}
    listed = ([deployment(name) for name in found], wrong)
    monkeypatch.setattr("hfship.serve.deployments.list_deployments", lambda *_: listed)
    monkeypatch.setattr("hfship.serve.docker.require_docker", require)
    monkeypatch.setattr("hfship.serve.status.deployment_status", status)
    reporter: Any = None
    made = stocked_deployments(Path("/d"), reporter)
    assert [(one.name, one.state, one.url, one.note) for one in made] == rows
    assert asked == (["docker"] if found else [])


# -- models


COMMIT, OTHER = "a" * 40, "b" * 40
SOURCE = Source("https://hub", "o/m", "main", "o/m", COMMIT, "mit", fetched_at="2026-01-31")


def model_at(folder: Path, **fields: Any) -> Path:
    """A model folder with a manifest of two files, and the fields of it that are told."""
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub/w.bin").write_text("weights")
    entries = [FileEntry("config.json", 2, "0" * 64), FileEntry("sub/w.bin", 7, "1" * 64)]
    write_manifest(folder, replace(make_manifest("m", entries, SOURCE), **fields))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "state", "note"),
    [
        ("m", {}, "whole", ""),
        ("m", {"left_out": 2}, "partial", "partial by choice: 2 other files"),
        ("m", {"partial": ("x.bin",)}, "partial", "partial: 1 file"),
        ("m", {"unproven": True}, "unproven", "unproven: "),
        ("m", {"source": None}, "unproven", "packed from a folder that the Hub does not vouch for"),
        ("m~0123456789ab", {}, "kept", "hfship serve m --rollback"),
    ],
)
def test_the_whole_row_of_a_model(
    name: str, fields: Dict[str, Any], state: str, note: str, tmp_path: Path
) -> None:
    folder = model_at(tmp_path / name, **fields)
    found = stocked_model(folder, "o/m")
    assert (found.name, found.path, found.state) == ("o/m", str(folder), state)
    assert (found.bytes, found.files, found.image) == (9, 2, "")
    assert (note in found.note) if note else not found.note, found.note
    assert not found.note.startswith(("; ", " "))
    known = ("o/m", COMMIT, "2026-01-31", "mit") if "source" not in fields else ("", "", "", "")
    assert (found.repo, found.commit, found.fetched_at) == known[:3]
    if "source" not in fields:
        assert found.licence == "mit"
    assert stocked_model(folder).name == name


def test_what_differs_from_the_manifest_of_a_model_is_told(tmp_path: Path) -> None:
    folder = model_at(tmp_path / "m~0123456789ab")
    (folder / "sub/w.bin").write_text("weight")
    found = stocked_model(folder)
    assert (found.state, found.note) == ("changed", "sub/w.bin has 6 bytes instead of 7")
    assert found.commit == COMMIT
    shutil.rmtree(folder / "sub")
    (folder / "sub").write_text("a file")
    assert stocked_model(folder).note == "sub/w.bin is missing"


def test_a_model_without_a_manifest_has_the_size_of_its_files(tmp_path: Path) -> None:
    folder = model_at(tmp_path / "m")
    (folder / ".hfship/manifest.json").unlink()
    expected = StockedModel("m", str(folder), "unproven", bytes=9, files=2, note="no manifest")
    assert stocked_model(folder) == expected
    (folder / ".hfship/partial").mkdir()
    step = "run the same fetch or unpack again"
    assert stocked_model(folder) == StockedModel("m", str(folder), "unfinished", note=step)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError("odd"), "odd"),
        (HostError("the manifest is no manifest", "why", ""), "the manifest is no manifest"),
    ],
)
def test_a_model_that_cannot_be_looked_at_says_why(
    error: Exception, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise error

    monkeypatch.setattr("hfship.ops.stock.read_manifest", refuse)
    expected = StockedModel("m", "/models/m", "unreadable", note=note)
    assert stocked_model(Path("/models/m")) == expected


# -- packages


class Part(NamedTuple):
    """A part of an archive, of which only the size is asked."""

    name: str
    size: int

    def stat(self) -> Any:
        """As a path has it."""
        return SimpleNamespace(st_size=self.size)


def archive_files(numbers: Sequence[int] = (), listed: str = "", name: str = "m.tar.zst") -> Any:
    """Two files of an archive, or one, and what its sums name."""
    names = [f"{name}.{number:04d}" for number in numbers] or [name]
    return SimpleNamespace(
        name=name,
        place=Path("/t") / name,
        paths=[Part(one, 10) for one in names],
        numbers=dict.fromkeys(numbers),
        listed=lambda: dict.fromkeys(listed.split()),
    )


PLAIN = StockedPackage("m", "/t/m.tar.zst", "foreign", bytes=10)
TWO = replace(PLAIN, bytes=20, parts=2)
MANIFEST = make_manifest("Model", [], SOURCE)
NO_DELTA = Delta()
NOTHING: Any = SimpleNamespace(path="/t/m.tar.zst")
FOREIGN = ForeignArchive(NOTHING, NOTHING)


def opened(
    damages: Sequence[Damage] = (), delta: Delta = NO_DELTA, manifest: Any = MANIFEST
) -> Any:
    parts = ["1", "2", "3"]
    return SimpleNamespace(damages=damages, delta=delta, manifest=manifest, parts=parts)


@pytest.mark.parametrize(
    ("files", "archive", "row"),
    [
        (archive_files(), FOREIGN, PLAIN),
        (
            archive_files(),
            opened(),
            replace(PLAIN, name="Model", state="whole", commit=COMMIT, licence="mit"),
        ),
        (archive_files(), opened(manifest=None), replace(PLAIN, state="whole")),
        (
            archive_files(),
            opened(manifest=replace(MANIFEST, source=None)),
            replace(PLAIN, name="Model", state="whole"),
        ),
        (
            archive_files([1, 2]),
            opened(
                [Damage(MISSING, parts=("m.3",)), Damage("odd"), Damage(MISSING, parts=("m.4",))]
            ),
            replace(
                TWO,
                name="Model",
                state="incomplete",
                parts=3,
                missing=("m.3", "m.4"),
                commit=COMMIT,
                licence="mit",
            ),
        ),
        (
            archive_files(),
            opened([Damage("is odd"), Damage("more")], manifest=None),
            replace(PLAIN, state="unreadable", note="is odd"),
        ),
        (
            archive_files(),
            opened(delta=Delta(frozenset(["x"]), "abc"), manifest=None),
            replace(PLAIN, state="whole", delta_of="abc"),
        ),
        (
            archive_files(),
            opened(delta=Delta(frozenset(["x"])), manifest=None),
            replace(PLAIN, state="whole", delta_of="?"),
        ),
        (
            archive_files(),
            HostError("it cannot be read", "", ""),
            replace(PLAIN, state="unreadable", note="it cannot be read"),
        ),
        (
            archive_files([1, 2], "m.tar.zst.0001 m.tar.zst.0004 m.tar.zst.0003"),
            OSError(5, "input/output error"),
            replace(
                TWO,
                state="incomplete",
                parts=4,
                missing=("m.tar.zst.0003", "m.tar.zst.0004"),
            ),
        ),
        (
            archive_files([1, 2], "m.tar.zst.0001"),
            OSError(5, "input/output error"),
            replace(TWO, state="unreadable", note="input/output error"),
        ),
    ],
)
def test_the_whole_row_of_an_archive(
    files: Any, archive: Any, row: StockedPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_it(_: Any) -> Any:
        if isinstance(archive, Exception):
            raise archive
        return archive

    monkeypatch.setattr("hfship.archive.opening.open_archive", open_it)
    assert stocked_package(files) == row


def test_a_delta_is_one_by_its_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.archive.opening.open_archive", lambda _: opened(manifest=None))
    found = stocked_package(archive_files(name="m.delta.tar.zst"))
    assert (found.name, found.delta_of) == ("m", "?")


def test_folders_are_looked_through_once_and_those_that_cannot_be_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def archives_in(folder: Path) -> List[str]:
        asked.append(str(folder))
        if folder.name == "closed":
            raise PermissionError(13, "no")
        return [f"{folder}/1", f"{folder}/2"]

    asked: List[str] = []
    monkeypatch.setattr("hfship.archive.files.archives_in", archives_in)
    monkeypatch.setattr("hfship.ops.stock.stocked_package", lambda files: files)
    folders = [Path(name) for name in ("a", "closed", "a", "b")]
    assert stocked_packages(folders) == ["a/1", "a/2", "b/1", "b/2"]
    assert asked == ["a", "closed", "b"]


@pytest.mark.parametrize(
    ("package", "caption"),
    [
        (TWO, "2 parts"),
        (replace(TWO, parts=1), "1 part"),
        (PLAIN, ""),
        (replace(PLAIN, delta_of="?"), "a delta"),
        (replace(PLAIN, delta_of="0123456789"), "a delta of 0123456"),
        (replace(TWO, missing=("a", "b"), note="odd"), "2 parts, missing: a, b, odd"),
        (replace(TWO, missing=tuple("abcde")), "2 parts, missing: a, b, c, and 2 more"),
    ],
)
def test_what_is_said_of_an_archive(package: StockedPackage, caption: str) -> None:
    assert package_caption(package) == caption


# -- images


@pytest.mark.parametrize("keeps_whole", [True, False])
def test_docker_builds_upon_the_layers_that_it_has_unless_it_keeps_images_whole(
    keeps_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [HeldImage("sha256:1", ("d1", "d2"), ("r@1",)), HeldImage("sha256:2", ("d3",))]
    asked: List[str] = []

    def engine_state(name: str) -> Any:
        asked.append(name)
        return SimpleNamespace(keeps_whole=keeps_whole)

    monkeypatch.setattr("hfship.serve.engines.images_of_docker", lambda: tuple(held))
    monkeypatch.setattr("hfship.serve.engines.engine_state", engine_state)
    bare = [HeldImage("sha256:1", (), ("r@1",)), HeldImage("sha256:2", ())]
    assert images_to_build_upon() == (bare if keeps_whole else held)
    assert asked == ["docker"]


def test_images_have_the_version_that_their_tags_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [
        SimpleNamespace(reference="a:v1", version=(0, 27, 1), cpu=False, id="sha256:1"),
        SimpleNamespace(reference="b", version=None, cpu=True, id="sha256:2"),
    ]
    asked: List[str] = []
    monkeypatch.setattr("hfship.serve.docker.list_images", lambda of: asked.append(of) or loaded)
    assert stocked_images() == [
        StockedImage("a:v1", "docker", "0.27.1", "gpu", "sha256:1"),
        StockedImage("b", "docker", "", "cpu", "sha256:2"),
    ]
    assert asked == [""]
    folders = [
        StockedModel("v", "/m/v", "whole", image="docker.io/vllm/vllm-openai:v0.27.1"),
        StockedModel("m", "/m/m", "whole"),
        StockedModel("o", "/m/o", "whole", image="docker.io/other/image:v0.27.1"),
    ]
    assert image_folders(folders) == [
        StockedImage("docker.io/vllm/vllm-openai:v0.27.1", "/m/v", "0.27.1"),
        StockedImage("docker.io/other/image:v0.27.1", "/m/o", ""),
    ]


# -- what the models file wants


def here(
    state: str, commit: str = COMMIT, name: str = "m", path: str = "/models/m"
) -> StockedModel:
    return StockedModel(name, path, state, "o/m", commit)


def packed(state: str, delta_of: str = "", path: str = "/t/m.tar.zst") -> StockedPackage:
    return StockedPackage("m", path, state, delta_of=delta_of)


LISTED = ListedModel("m", "o/m")
BY_COMMIT = ListedModel("m", "o/m", {"revision": OTHER})
NO_REPO = ListedModel("m")
INCOMPLETE = "has an archive that is not complete"
PACKED = "is packed, and not unpacked here"


@pytest.mark.parametrize(
    ("model", "models", "packages", "lacks", "step"),
    [
        (LISTED, [], [], "is not here", "fetch o/m"),
        (NO_REPO, [], [], "is not here", ""),
        (LISTED, [here("whole", name="x", path="/models/x")], [], "is not here", "fetch o/m"),
        (LISTED, [here("whole")], [], "", ""),
        (LISTED, [here("whole", name="o/m")], [], "", ""),  # its folder has the name
        (LISTED, [here("whole", path="/models/o/else")], [], "", ""),  # or it is called so
        (LISTED, [here("partial")], [], "", ""),
        (LISTED, [here("unproven")], [], "", ""),
        (LISTED, [here("changed")], [packed("whole")], "is changed", "verify /models/m"),
        (LISTED, [here("unfinished")], [], "is unfinished", "fetch o/m"),
        (NO_REPO, [here("unfinished")], [], "is unfinished", "verify /models/m"),
        (LISTED, [here("kept"), here("whole")], [], "", ""),
        (
            BY_COMMIT,
            [here("whole")],
            [],
            "is here at commit aaaaaaaaaaaa, wanted is bbbbbbbbbbbb",
            f"fetch o/m@{OTHER}",
        ),
        (
            BY_COMMIT,
            [here("whole", "")],
            [],
            "is here at commit unknown, wanted is bbbbbbbbbbbb",
            f"fetch o/m@{OTHER}",
        ),
        (BY_COMMIT, [here("whole"), here("whole", OTHER)], [], "", ""),
        (ListedModel("m", "o/m", {"revision": "v1"}), [here("whole")], [], "", ""),
        (LISTED, [], [packed("whole")], PACKED, "unpack /t/m.tar.zst"),
        (LISTED, [], [packed("incomplete")], INCOMPLETE, "verify /t/m.tar.zst"),
        (LISTED, [], [packed("whole", "?")], INCOMPLETE, "verify /t/m.tar.zst"),
        (LISTED, [], [packed("incomplete"), packed("whole", path="/2")], PACKED, "unpack /2"),
    ],
)
def test_what_the_models_file_wants(
    model: ListedModel, models: List[Any], packages: List[Any], lacks: str, step: str
) -> None:
    another = replace(LISTED, name="another")
    file = ModelsFile(Path("models.toml"), {}, (model, another), another)
    found = wanted_models(file, models, packages)
    expected = [WantedModel("m", model.repo, lacks, tuple(step.split()))] if lacks else []
    assert found == [*expected, WantedModel("another", "o/m", "is not here", ("fetch", "o/m"))]
    assert wanted_models(None, models, packages) == []


def test_what_is_here_as_json() -> None:
    image = HeldImage("sha256:1", ("d1", "d2"), ("r@1",))
    stock = Stock(
        models=(here("whole"),),
        packages=(replace(TWO, missing=("x",)),),
        wanted=(WantedModel("m", "o/m", "is not here", ("fetch", "o/m")),),
        docker_images=(image,),
        problems={"images": "no docker"},
    )
    said = stock.json()
    assert list(said) == [*KINDS, "docker_images", "problems"]
    assert "image" not in said["models"][0] and said["models"][0]["commit"] == COMMIT
    assert said["packages"][0]["missing"] == ["x"]
    assert said["wanted"][0]["next_command"] == ["fetch", "o/m"]
    assert said["docker_images"] == [{"digests": ["sha256:1", "r@1"], "layers": ["d1", "d2"]}]
    assert said["problems"] == {"images": "no docker"}
