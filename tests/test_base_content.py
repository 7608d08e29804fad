# SPDX-License-Identifier: Apache-2.0
"""What is content of a model folder, by its name alone and by what is in the folder. The way of
such files through all verbs is in test_content.py."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import List

import pytest

from hfship.base.content import (
    DEEPEST_PATH,
    LONGEST_PATH,
    NAME_MAX,
    all_folders_of,
    check_distinct_paths,
    check_relative_path,
    content_files,
    folder_content,
    is_kept,
    is_note,
    is_work_folder,
    kept_name,
    kept_of,
    never_content,
    work_path,
)
from hfship.base.errors import DiskError, IntegrityError


@pytest.mark.parametrize("name", [".hfship", ".git", ".hg", ".svn", ".ssh", "git~1"])
def test_what_is_never_content(name: str) -> None:
    for path in (name, f"a/{name}", f"{name}/x", name.upper(), f"{name}. ", f"a/{name}./b"):
        assert never_content(path), path
    assert not never_content(f"x{name}") and not never_content(f"{name}x")


@pytest.mark.parametrize(
    "path, note",
    [
        (".hfship/x", True),
        (".hfship", False),
        ("a/.hfship/x", False),
        (".cache/huggingface/CACHEDIR.TAG", True),
        (".cache/huggingface/.gitignore", True),
        (".cache/huggingface/download/a/b.metadata", True),
        (".cache/huggingface/download/b.lock", True),
        (".cache/huggingface/download/b.incomplete", True),
        (".cache/huggingface/download/.metadata", False),
        (".cache/huggingface/download/b.metadata.x", False),
        (".cache/huggingface/CACHEDIRxTAG", False),
        ("a/.cache/huggingface/.gitignore", False),
    ],
)
def test_what_is_a_note(path: str, note: bool) -> None:
    assert is_note(path) is note


def test_folders_that_no_model_is_called_by() -> None:
    assert work_path("a/b") == f".hfship/partial/{hashlib.sha1(b'a/b').hexdigest()}.part"
    kept = kept_name("m", "0123456789abcdef")
    assert kept == "m~0123456789ab" and is_kept(kept) and kept_of(kept) == "m"
    assert kept_of(f"{kept}~0123456789ab") == kept
    for name in ("m~0123456789a", "m~0123456789abc", "m~0123456789aB", "~0123456789ab", "m"):
        assert not is_kept(name) and kept_of(name) == "" and not is_work_folder(name)
    assert all(map(is_work_folder, (kept, "m~incomplete", "m~replaced")))


SAFE = [
    "a",
    "a b",
    "\xe9",
    ".gitattributes",
    "a~1",
    "1:x",
    "x" * NAME_MAX,
    "/".join(["x" * 99] * 40),
    "a/" * (DEEPEST_PATH - 1) + "b",
]
UNSAFE = {
    "is too long": ["/".join(["x" * 99] * 40) + "x" * 99, "a/" * DEEPEST_PATH + "b"],
    "unsafe path": [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/..",
        "./a",
        "a\\b",
        "C:",
        "c:x",
        "a\x1f",
        "a\x7f",
    ],
    "cannot be stored": ["x" * (NAME_MAX + 1), "\xe9" * 128, "a\udcff"],
    "is reserved for hfship": [".hfship", ".HFship/x"],
    "is never part of a model": ["a/.hfship", ".git/x", "a/.ssh", "GIT~1"],
}


def test_paths_that_stay_where_they_should() -> None:
    assert len(SAFE[-2]) == LONGEST_PATH - 1
    for path in SAFE:
        check_relative_path(path)
    for why, paths in UNSAFE.items():
        for path in paths:
            with pytest.raises(ValueError, match=why):
                check_relative_path(path)


def test_two_files_have_two_places() -> None:
    check_distinct_paths(["a/b", "a/c", "b"])
    with pytest.raises(ValueError, match="duplicate path 'a'"):
        check_distinct_paths(["a", "b", "a"])
    for paths in (["a", "a/b/c"], ["a/b/c", "a"]):
        with pytest.raises(ValueError, match="'a' is both a file and a folder"):
            check_distinct_paths(paths)
    assert all_folders_of(["a/b/c", "d", "a/e"]) == ["a", "a/b"]


def made(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    return folder


def test_the_content_of_a_folder_is_in_the_order_of_a_manifest(tmp_path: Path) -> None:
    never = ["a/.ssh/id", ".git/config", "z/.git"]
    notes = [".hfship/lock", ".cache/huggingface/download/x.metadata"]
    folder = made(tmp_path, "b", "a/x", "a-x", "a/.hfship/y", *never, *notes)
    (folder / "link").symlink_to("b")
    content = folder_content(folder)
    assert content.files == (("a-x", 3), ("a/x", 3), ("b", 1), ("link", 1))
    assert content.never == (".git", "a/.hfship", "a/.ssh", "z/.git")
    assert content_files(folder) == content.files
    listed = content_files(folder, {notes[1]})
    assert [path for path, _ in listed] == [notes[1], "a-x", "a/x", "b", "link"]


@pytest.mark.parametrize("kind", ["dangling", "to a folder", "a pipe"])
def test_what_is_no_file_is_told(kind: str, tmp_path: Path) -> None:
    made(tmp_path, "d/x")
    path = tmp_path / "d" / "strange"
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("none" if kind == "dangling" else ".")
    with pytest.raises(IntegrityError) as caught:
        folder_content(tmp_path)
    assert caught.value.what == f"{tmp_path} has something that is not a file"
    assert caught.value.why.startswith("d/strange is a dangling link, a link to a folder")
    assert caught.value.next_step == "remove it, or fetch the model again"


def test_a_name_that_cannot_travel_is_told(tmp_path: Path) -> None:
    made(tmp_path, "a\\b")
    with pytest.raises(IntegrityError, match="has a file that cannot travel") as caught:
        folder_content(tmp_path)
    assert "unsafe path" in caught.value.why and caught.value.next_step == "rename or remove it"


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir
    made(tmp_path, "a/x", "b/y")

    def refuse(path: object) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DiskError, match=r"cannot read .*/b: permission denied"):
        folder_content(tmp_path)


def test_nothing_in_what_is_never_content_is_looked_at(tmp_path: Path) -> None:
    made(tmp_path, ".git/a\\b", ".hfship/a\\b")
    asked: List[str] = [path for path, _ in content_files(tmp_path)]
    assert asked == [] and folder_content(tmp_path).never == (".git",)
