# SPDX-License-Identifier: Apache-2.0
"""What the mirror answers of a repository, whole answers as values; test_mirror.py has servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple
from urllib.parse import parse_qsl

import pytest

from hfship.base.manifest import Source
from hfship.hub.protocol import RemoteFile
from hfship.ops import hub_api
from hfship.ops.http_request import BadRequest
from hfship.ops.mirror_repo import MirrorRepo

FILES = (
    RemoteFile("w.safetensors", 5000, "1" * 40, "2" * 64),
    RemoteFile("config.json", 30, "3" * 40),
    RemoteFile("sub/a.txt", 7, "4" * 40),
    RemoteFile("sub/deep/b.txt", 8, "5" * 40),
)


def repo_of(name: str, kind: str = "model", licence: Any = None, files: Any = FILES) -> MirrorRepo:
    source = Source("", "old/name", "main", name, "abcdef01" * 5, licence, repo_type=kind)
    return MirrorRepo(source, Path("/models/x"), {one.path: one for one in files}, {})


@pytest.mark.parametrize(
    ("name", "licence", "differs"),
    [
        (
            "org/m",
            "mit",
            {"author": "org", "tags": ["license:mit"], "cardData": {"license": "mit"}},
        ),
        ("m", None, {"author": None, "tags": [], "cardData": {}}),
    ],
)
def test_what_a_list_says_of_a_repository(name: str, licence: Any, differs: Dict[str, Any]) -> None:
    assert hub_api.repo_summary(repo_of(name, licence=licence)) == {
        "_id": "abcdef01abcdef01abcdef01",
        "id": name,
        "modelId": name,
        "sha": "abcdef01" * 5,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "siblings": [],
        "usedStorage": 5045,
        **differs,
    }


def test_information_has_the_files_and_a_sum_of_those_in_lfs() -> None:
    info = hub_api.repo_info(repo_of("org/m"))
    assert {**info, "siblings": []} == hub_api.repo_summary(repo_of("org/m"))
    lfs = {"sha256": "2" * 64, "size": 5000, "pointerSize": 134}
    assert info["siblings"] == [
        {"rfilename": "config.json", "size": 30, "blobId": "3" * 40},
        {"rfilename": "sub/a.txt", "size": 7, "blobId": "4" * 40},
        {"rfilename": "sub/deep/b.txt", "size": 8, "blobId": "5" * 40},
        {"rfilename": "w.safetensors", "size": 5000, "blobId": "1" * 40, "lfs": lfs},
    ]


def test_branches_are_sorted_and_have_their_commits() -> None:
    assert hub_api.repo_refs({"v1": "c" * 40, "main": "a" * 40}) == {
        "branches": [
            {"name": "main", "ref": "refs/heads/main", "targetCommit": "a" * 40},
            {"name": "v1", "ref": "refs/heads/v1", "targetCommit": "c" * 40},
        ],
        "tags": [],
        "converts": [],
    }


def test_what_the_list_at_the_root_says() -> None:
    assert hub_api.overview_row(repo_of("org/m", "dataset")) == {
        "repo": "org/m",
        "repo_type": "dataset",
        "commit": "abcdef01" * 5,
        "bytes": 5045,
        "files": 4,
    }


def test_the_mirror_says_who_asks() -> None:
    """What `hf auth whoami` prints comes from these."""
    who: Any = json.loads(json.dumps(hub_api.WHO_AM_I))
    assert (who["type"], who["name"], who["fullname"], who["orgs"]) == ("user", *["mirror"] * 2, [])
    token = {"displayName": "mirror", "role": "read"}
    assert who["auth"] == {"type": "access_token", "accessToken": token}


# -- trees


def folder_row(path: str, oid: str) -> Dict[str, Any]:
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def file_row(path: str, size: int, oid: str) -> Dict[str, Any]:
    return {"type": "file", "oid": oid * 40, "size": size, "path": path}


ROWS: Dict[str, Dict[str, Any]] = {
    "config.json": file_row("config.json", 30, "3"),
    "sub": folder_row("sub", "5d85613a56c124e3a3ff8ce6fc95d10cdcb5001e"),  # of its path
    "sub/a.txt": file_row("sub/a.txt", 7, "4"),
    "sub/deep": folder_row("sub/deep", "137bc7f0e5bd1e1ab5596184701d185eabe03ce2"),
    "sub/deep/b.txt": file_row("sub/deep/b.txt", 8, "5"),
    "w.safetensors": {
        **file_row("w.safetensors", 5000, "1"),
        "lfs": {"oid": "2" * 64, "size": 5000, "pointerSize": 134},
    },
}
EVERY = "config.json sub sub/a.txt sub/deep sub/deep/b.txt w.safetensors"


@pytest.mark.parametrize(
    ("below", "query", "most", "paths", "following"),
    [
        ("", "", 9, "config.json sub w.safetensors", ""),
        ("", "recursive=1", 9, EVERY, ""),
        ("", "recursive=True", 9, EVERY, ""),
        ("", "recursive=no", 9, "config.json sub w.safetensors", ""),
        ("sub", "", 9, "sub/a.txt sub/deep", ""),
        ("sub/deep", "recursive=1", 9, "sub/deep/b.txt", ""),
        ("", "recursive=1", 6, EVERY, ""),
        ("", "recursive=1", 5, EVERY[: EVERY.rindex(" ")], "recursive=1 cursor=5 limit=5"),
        ("", "recursive=1&cursor=5&limit=5", 5, "w.safetensors", ""),
        ("", "recursive=1&limit=2&cursor=1", 5, "sub sub/a.txt", "recursive=1 limit=2 cursor=3"),
        ("", "limit=9&x=y z", 2, "config.json sub", "limit=2 x=y+z cursor=2"),
        ("", "limit=0", 2, "config.json sub", "limit=2 cursor=2"),  # pages of none never end
        ("", "cursor=3", 2, "", ""),
        ("", "cursor=none", 2, "config.json sub", "cursor=2 limit=2"),
    ],
)
def test_pages_of_a_tree(below: str, query: str, most: int, paths: str, following: str) -> None:
    page = hub_api.tree_page(repo_of("org/m"), below, dict(parse_qsl(query)), most)
    assert page
    assert list(page.rows) == [ROWS[path] for path in paths.split()]
    assert page.next_query.split("&") == (following.split() or [""])


def test_a_folder_that_is_not_there_has_no_tree_and_an_empty_repository_one() -> None:
    assert hub_api.tree_page(repo_of("org/m"), "config.json", {}, 9) is None
    assert hub_api.tree_page(repo_of("org/m"), "su", {}, 9) is None
    assert hub_api.tree_page(repo_of("org/m", files=()), "", {}, 9) == hub_api.Page([], "")


def test_entries_of_paths_are_those_that_exist() -> None:
    asked = {"w.safetensors", "nothing", "sub/deep", "config.json", ""}
    expected = [ROWS[path] for path in ("config.json", "sub/deep", "w.safetensors")]
    assert hub_api.tree_entries(repo_of("org/m"), asked) == expected


# -- questions


@pytest.mark.parametrize(
    ("body", "kind", "paths"),
    [
        (b'{"paths": ["a", "b", "a", 3]}', "application/json; charset=utf-8", ["a", "b"]),
        (b"paths=a&paths=b%20c&expand=1", "application/x-www-form-urlencoded", ["a", "b c"]),
        (b"paths=a", "", ["a"]),
        (b"paths=a", "application/json", []),
        (b'{"paths": ["a"]}', "text/plain", []),
        (b'{"paths": 3}', "application/json", []),
        (b"expand=1", "", []),
        (b"[1]", "application/json", []),
    ],
)
def test_paths_that_a_client_asks_for(body: bytes, kind: str, paths: List[str]) -> None:
    assert sorted(hub_api.asked_paths(body, kind)) == paths


def test_too_many_paths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.ops.hub_api.MOST_PATHS", 2)
    assert hub_api.asked_paths(b'{"paths": ["a", "b"]}', "application/json") == {"a", "b"}
    with pytest.raises(BadRequest, match="more than 2 paths") as caught:
        hub_api.asked_paths(b'{"paths": ["a", "b", "c"]}', "application/json")
    assert caught.value.status == 413
    assert hub_api.asked_paths(b"paths=a&paths=b", "") == {"a", "b"}
    assert hub_api.asked_paths(b"paths=a&paths=b&paths=c", "") == set()


SHELF: Tuple[Tuple[str, str], ...] = (
    ("Org/Alpha", "model"),
    ("org/beta", "model"),
    ("other/alpha-2", "model"),
    ("org/sums", "dataset"),
)


@pytest.mark.parametrize(
    ("kind", "query", "names", "following"),
    [
        ("model", "", "Org/Alpha org/beta other/alpha-2", ""),
        ("dataset", "", "org/sums", ""),
        ("space", "", "", ""),
        ("model", "search=ALPHA", "Org/Alpha other/alpha-2", ""),
        ("model", "author=ORG", "Org/Alpha org/beta", ""),
        ("model", "author=org&search=alpha", "Org/Alpha", ""),
        ("model", "author=rg", "", ""),
        ("model", "limit=2", "Org/Alpha org/beta", "limit=2 cursor=2"),
        ("model", "limit=2&cursor=2", "other/alpha-2", ""),
        ("model", "limit=0", "", ""),
    ],
)
def test_pages_of_all_repositories(kind: str, query: str, names: str, following: str) -> None:
    shelf: List[MirrorRepo] = [repo_of(name, of_kind) for name, of_kind in SHELF]
    page = hub_api.repo_page(shelf, kind, dict(parse_qsl(query)))
    assert [row["id"] for row in page.rows] == names.split()
    assert all(set(row) == set(hub_api.repo_summary(shelf[0])) for row in page.rows)
    assert page.next_query.split("&") == (following.split() or [""])


def test_a_page_of_repositories_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.ops.hub_api.PAGE", 2)
    shelf = [repo_of(f"o/{number}") for number in range(5)]
    page = hub_api.repo_page(shelf, "model", {"limit": "4"})
    assert [row["id"] for row in page.rows] == ["o/0", "o/1"]
    assert page.next_query == "limit=2&cursor=2"
