# SPDX-License-Identifier: Apache-2.0
"""Which model a folder of huggingface_hub's cache means, and what the cache itself knows of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.base.errors import HfshipError, NotFoundError, UsageError
from hfship.base.files import CHUNK
from hfship.base.manifest import FileEntry, Source
from hfship.hub.cache import CachedModel, cached_model, damaged_blobs, not_downloaded

HUB = "https://hub"
A, B = "a" * 40, "b" * 40


def repository(
    folder: Path, commits: List[str], refs: Dict[str, str], name: str = "models--org--m"
) -> Path:
    """A repository of the cache, with these snapshots and references."""
    made = folder / name
    (made / "snapshots").mkdir(parents=True)
    for commit in commits:
        (made / "snapshots" / commit).mkdir()
    for ref, commit in refs.items():
        path = made / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return made


# (commits, references) -> (revision, commit), or the error
MEANT: Dict[str, Any] = {
    "main": ([A, B], {"main": B, "dev": A}, ("main", B)),
    "the one branch that is here": ([A, B], {"dev": A}, ("dev", A)),
    "the branch of which the commit is here": ([A], {"main": B, "dev": A}, ("dev", A)),
    "of two branches main": ([A], {"main": A, "dev": A}, ("main", A)),
    "a branch with a slash": ([A], {"refs/pr/1": f"{A}\n"}, ("refs/pr/1", A)),
    "the one commit": ([A], {}, (A, A)),
    "a reference that is none": ([A], {"main": "x"}, (A, A)),
    "what is no commit is passed over": ([A, "tmp"], {}, (A, A)),
    "two commits": ([A, B], {}, "holds 2 commits"),
    "two branches": ([A, B], {"x": A, "y": B}, "holds 2 commits"),
    "none": ([], {}, "holds no commit"),
}


@pytest.mark.parametrize("name", MEANT)
def test_which_commit_is_meant(name: str, tmp_path: Path) -> None:
    commits, refs, wanted = MEANT[name]
    folder = repository(tmp_path, commits, refs)
    if isinstance(wanted, str):
        with pytest.raises((NotFoundError, UsageError)) as told:
            cached_model(folder, HUB)
        error: HfshipError = told.value
        assert error.what == f"{folder} {wanted}"
        assert isinstance(error, NotFoundError) == (not commits)
        steps = [f"hfship pack {folder}/snapshots/{commit}" for commit in commits]
        assert error.next_step.splitlines() == (steps or ["hfship fetch ORG/NAME"])
        return
    revision, commit = wanted
    source = Source(HUB, "org/m", revision, "org/m", commit)
    assert cached_model(folder, HUB) == CachedModel(folder / "snapshots" / commit, source)


def test_only_ten_of_many_commits_are_shown(tmp_path: Path) -> None:
    folder = repository(tmp_path, [f"{number:040x}" for number in range(11)], {})
    with pytest.raises(UsageError) as told:
        cached_model(folder, HUB)
    assert len(told.value.next_step.splitlines()) == 10


def test_a_commit_may_be_named(tmp_path: Path) -> None:
    folder = repository(tmp_path, [A, B], {"main": A}, "datasets--org--d")
    source = Source(HUB, "org/d", B, "org/d", B, repo_type="dataset")
    place = folder / "snapshots" / B
    assert cached_model(place, HUB) == CachedModel(place, source)


@pytest.mark.parametrize(
    ("name", "kind", "model"),
    [
        ("models--org--m", "model", "m"),
        ("models--gpt2", "model", "gpt2"),
        ("datasets--org--d", "dataset", "d"),
        ("spaces--org--s", "space", "s"),
    ],
)
def test_kinds_of_repositories(name: str, kind: str, model: str, tmp_path: Path) -> None:
    found = cached_model(repository(tmp_path, [A], {}, name), HUB)
    assert found and found.source.repo_type == kind and found.name == model


@pytest.mark.parametrize(
    "name", ["others--org--m", "models--", "models--org--..", "m", "models--a--b--c--d"]
)
def test_folders_that_are_no_repository(name: str, tmp_path: Path) -> None:
    assert cached_model(repository(tmp_path, [A], {}, name), HUB) is None


def test_folders_that_only_look_like_one(tmp_path: Path) -> None:
    (tmp_path / "models--org--m").mkdir()
    assert cached_model(tmp_path / "models--org--m", HUB) is None
    (tmp_path / "other" / A).mkdir(parents=True)
    assert cached_model(tmp_path / "other" / A, HUB) is None


@pytest.fixture
def model(tmp_path: Path) -> CachedModel:
    found = cached_model(repository(tmp_path, [A], {}), HUB)
    assert found
    (tmp_path / "models--org--m/blobs").mkdir()
    (tmp_path / "models--org--m/trees").mkdir()
    return found


def test_what_is_still_to_come(model: CachedModel) -> None:
    blobs = model.folder.parent.parent / "blobs"
    for name in ("b.incomplete", "a.incomplete", "c"):
        (blobs / name).touch()
    assert model.coming == [blobs / "a.incomplete", blobs / "b.incomplete"]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ('{"files": {"b": 1, "a": 1, "here": 1, "c\\u001b": 1}}', ["a", "b"]),
        ('{"files": []}', []),
        ('{"files": 7}', []),
        ("{}", []),
        ("[]", []),
        ("torn", []),
        (None, []),
    ],
)
def test_what_was_not_downloaded(text: Any, missing: List[str], model: CachedModel) -> None:
    if text is not None:
        (model.folder.parent.parent / "trees" / f"{A}.json").write_text(text)
    assert not_downloaded(model, {"here"}) == missing


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


CONTENT = b"x" * (CHUNK + 1)


@pytest.mark.parametrize(
    ("blob", "damaged"),
    [
        (hashlib.sha256(CONTENT).hexdigest(), False),
        ("0" * 64, True),
        (git_id(CONTENT), False),
        ("0" * 40, True),
        ("another-etag", False),
    ],
)
def test_a_blob_is_what_it_is_called(blob: str, damaged: bool, model: CachedModel) -> None:
    blobs = model.folder.parent.parent / "blobs"
    (blobs / blob).write_bytes(CONTENT)
    (model.folder / "w").symlink_to(f"../../blobs/{blob}")
    (model.folder / "copy").write_bytes(b"of a filesystem without links")
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    entries = [FileEntry("copy", 1, "0" * 64), FileEntry("w", len(CONTENT), sha256)]
    wrong = [f"w is not what its blob says, {blob}"] if damaged else []
    assert damaged_blobs(model, entries) == wrong


def test_notes_are_read_as_text(model: CachedModel) -> None:
    tree = {"files": {"a": {}, "b": {}}}
    path = model.folder.parent.parent / "trees" / f"{A}.json"
    path.write_text(json.dumps(tree))
    assert not_downloaded(model, set()) == ["a", "b"]
