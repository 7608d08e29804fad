# SPDX-License-Identifier: Apache-2.0
"""The names of what is here, which the completion offers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.manifest import FileEntry, Source, make_manifest, write_manifest
from hfship.base.settings import ListedModel, ModelsFile
from hfship.commands import known_names
from hfship.commands.known_names import listed_names, names_of

FILES = {
    "models": ["m/x", ".hidden/x", "_work/x", "file", "b/x"],
    "site": ["m/x", "c/x"],
    "packages": ["a.tar.zst", "b.tar.zst.0001", "b.tar.zst.0002", "c.tar.zst.sha256", ".d.tar.zst"],
    "transfer": ["e.f.tar.zst.1", "a.tar.zst", "g.tar.gz"],
    "deploy": ["d/plan.json", "e/other", "_site/plan.json"],
    "logs": ["j.json", "j.log", "k.json", "l.json.tmp"],
}
NAMES: Dict[str, List[str]] = {
    "models": ["b", "c", "m"],
    "archives": ["a", "b", "e.f"],
    "deployments": ["d"],
    "jobs": ["j", "k"],
    "repos": [],
}


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    for folder, paths in FILES.items():
        for path in paths:
            (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / path).touch()
    words = ("models", "site_models", "package", "transfer", "deploy", "log")
    folders = dict(zip(words, ("models", "site", "packages", "transfer", "deploy", "logs")))
    return SimpleNamespace(**{f"{word}_dir": tmp_path / name for word, name in folders.items()})


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_what_is_here(kind: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_of(kind, settings) == NAMES[kind]
    monkeypatch.setattr(known_names, "MOST_NAMES", 1)
    assert names_of(kind, settings) == NAMES[kind][:1]


def test_where_nothing_is_there_are_no_names(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    words = ("models", "site_models", "package", "transfer", "deploy", "log")
    settings: Any = SimpleNamespace(**dict.fromkeys((f"{word}_dir" for word in words), folder))
    assert [names_of(kind, settings) for kind in NAMES] == [[]] * len(NAMES)


def test_repositories_are_those_of_small_manifests(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one that is damaged, one that is large, one without a source, and one without any."""
    folder = settings.models_dir
    for name in ("a_damaged", "b_large", "c_local", "org_m"):
        repo = f"org/{name}"
        source = Source("http://hub", repo, "main", repo, "0" * 40)
        manifest = make_manifest(name, [FileEntry("x", 1, "0" * 64)], source)
        if name == "c_local":
            manifest = make_manifest(name, [FileEntry("x", 1, "0" * 64)])
        write_manifest(folder / name, manifest)
    (folder / "a_damaged/.hfship/manifest.json").write_text("{")
    path = folder / "b_large/.hfship/manifest.json"
    monkeypatch.setattr(known_names, "LARGE_MANIFEST", path.stat().st_size)
    assert names_of("repos", settings) == ["org/b_large", "org/org_m"]
    path.write_text(path.read_text() + "\n")
    assert names_of("repos", settings) == ["org/org_m"]
    monkeypatch.setattr(known_names, "MOST_MANIFESTS", 4)
    assert names_of("repos", settings) == []


def test_models_of_a_file_are_called_as_a_command_knows_them() -> None:
    models = (ListedModel("m", "org/m"), ListedModel("n"), ListedModel("", "org/o"))
    file = ModelsFile(Path("/m.toml"), {}, models, models[0])
    assert listed_names("fetch", file) == ["org/m", "m", "n", "org/o"]
    assert listed_names("serve", file) == ["m", "n"]


PATHS = ["b.zst", "a.zst", "a.txt", "sub/c.zst", "a-sub/x", ".hidden.zst", "_own.zst"]


@pytest.mark.parametrize(
    ("start", "found"),
    [
        ("", ["a-sub/", "a.zst", "b.zst", "sub/"]),
        ("a", ["a-sub/", "a.zst"]),
        ("b", ["b.zst"]),
        ("sub/", ["sub/c.zst"]),
        ("./a.", ["./a.zst"]),
        ("~/b", ["~/b.zst"]),
        ("none/", []),
    ],
)
def test_files_and_folders_that_begin_as_it_was_typed(
    start: str, found: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in PATHS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert known_names.paths_that_end(start, [".zst", ".x"]) == found
    absolute = [f"{tmp_path}/{name}" for name in found if start in ("", "a", "b")]
    if absolute:
        assert known_names.paths_that_end(f"{tmp_path}/{start}", [".zst"]) == absolute
