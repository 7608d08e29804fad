# SPDX-License-Identifier: Apache-2.0
"""Folders to restore into: whose they are, what of an earlier run stays, and how they get their name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List

import pytest

from hfship.archive.work_folder import (
    WEIGHT_SIZE,
    has_mark,
    publish_folder,
    put_mark,
    remove_leftovers,
    remove_work_folder,
    work_folder_of,
)
from hfship.base.content import MARK_PATH, work_path
from hfship.base.errors import DiskError, IntegrityError
from hfship.base.manifest import FileEntry, make_manifest


def put(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def names(folder: Path) -> List[str]:
    found = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in found)


MANIFEST = make_manifest(
    "m",
    [
        FileEntry("a/small", WEIGHT_SIZE - 1, "0" * 64),
        FileEntry("large", WEIGHT_SIZE, "1" * 64),
        FileEntry("link", 1, "2" * 64),
    ],
)


def test_what_this_run_can_use_of_an_earlier_one_stays(tmp_path: Path) -> None:
    work = tmp_path / "m~incomplete"
    stays = ["a/small", "large", work_path("large"), ".hfship/lock", ".hfship/lease", MARK_PATH]
    goes = ["other", "a/other", work_path("a/small"), work_path("other"), ".hfship/manifest.json"]
    put(work, *stays, *goes)
    put(tmp_path / "elsewhere", "kept")
    (work / "link").symlink_to(tmp_path / "elsewhere/kept")
    (work / "folder").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(work, MANIFEST)
    assert names(work) == sorted(stays) and names(tmp_path / "elsewhere") == ["kept"]


def test_whose_a_folder_is_stands_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    assert not has_mark(folder)
    folder.mkdir()
    put_mark(folder)
    assert has_mark(folder) and (folder / MARK_PATH).read_bytes() == b""
    (folder / MARK_PATH).unlink()
    (folder / MARK_PATH).symlink_to(tmp_path)
    assert not has_mark(folder), "a link is no mark"


def test_a_mark_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: List[Any] = []
    monkeypatch.setattr("hfship.archive.work_folder.sync_folder", synced.append)
    put_mark(tmp_path)
    assert len(synced) == 1


def test_a_folder_gets_its_name_and_what_was_there_goes(tmp_path: Path) -> None:
    target = tmp_path / "m"
    work = work_folder_of(target)
    assert work == tmp_path / "m~incomplete"
    put(work, "first")
    put_mark(work)
    publish_folder(work, target)
    assert names(tmp_path) == ["m/first"]
    put(work, "second")
    put(tmp_path / "m~replaced", "of a killed run", MARK_PATH)
    publish_folder(work, target)
    assert names(tmp_path) == ["m/second"]


def test_what_was_replaced_is_there_until_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replaced = tmp_path / "m", tmp_path / "m~replaced"
    put(target, "old")
    work = work_folder_of(target)
    put(work, "new")

    def cut(*_: Any) -> None:
        raise OSError(5, "power is off")

    monkeypatch.setattr("hfship.archive.work_folder.rename_durably", cut)
    with pytest.raises(DiskError, match="cannot rename to"):
        publish_folder(work, target)
    assert names(replaced) == sorted(["old", MARK_PATH]) and names(work) == ["new"]


def test_a_folder_of_another_in_the_way_is_left(tmp_path: Path) -> None:
    target = tmp_path / "m"
    put(target, "old")
    put(tmp_path / "m~replaced", "of somebody")
    put(work_folder_of(target), "new")
    with pytest.raises(IntegrityError):
        publish_folder(work_folder_of(target), target)
    assert names(tmp_path) == ["m/old", "m~incomplete/new", "m~replaced/of somebody"]


def test_the_mark_of_a_folder_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m~replaced"
    put(folder, "a", "sub/b", MARK_PATH)
    put(tmp_path / "elsewhere", "kept")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    seen: List[bool] = []
    unlink = os.unlink

    def watched(path: Any, *words: Any, **options: Any) -> None:
        seen.append((folder / MARK_PATH).exists())
        unlink(path, *words, **options)

    monkeypatch.setattr(os, "unlink", watched)
    remove_work_folder(folder)
    assert not folder.exists() and names(tmp_path / "elsewhere") == ["kept"]
    assert seen and all(seen)
    remove_work_folder(folder)
    (tmp_path / "file").touch()
    remove_work_folder(tmp_path / "file")
