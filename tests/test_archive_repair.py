# SPDX-License-Identifier: Apache-2.0
"""A damaged archive that is repaired from another copy, part by part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Dict

import pytest

from hfship.archive.files import ArchiveFiles
from hfship.archive.opening import open_archive
from hfship.archive.repair import repair_archive, write_at
from hfship.base.errors import IntegrityError
from support import archives as a

CONTENT = {"a": a.noise(9000), "c": a.noise(9000, 1)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model whole and in parts, and another one in parts."""
    root = tmp_path_factory.mktemp("packed")
    a.make_model(root / "m", CONTENT)
    a.pack(root / "m", root / "whole", frame_size=1000)
    a.pack(root / "m", root / "parts", frame_size=1000, split=5000)
    a.make_model(root / "other/m", {**CONTENT, "c": a.noise(9000, 2)})
    a.pack(root / "other/m", root / "others", frame_size=1000, split=5000)
    return root


def copy(packed: Path, kind: str, tmp_path: Path) -> ArchiveFiles:
    shutil.copytree(packed / kind, tmp_path / kind)
    return a.files_in(tmp_path / kind)


def paths_of(files: ArchiveFiles) -> Any:
    return [files.numbers[number] for number in sorted(files.numbers)] or [files.path]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: Dict[str, Any] = {
    "nothing": lambda _: None,
    "a frame": lambda paths: flip(paths[0], 1500),
    "two frames": lambda paths: (flip(paths[0], 1500), flip(paths[-1], 30)),
    "the tables": lambda paths: flip(paths[-1], paths[-1].stat().st_size - 20),
    "the end is gone": lambda paths: os.truncate(paths[-1], paths[-1].stat().st_size - 10),
    "something follows": lambda paths: paths[0].write_bytes(paths[0].read_bytes() + b"more"),
}


@pytest.mark.parametrize("name", [*DAMAGES, "a part is gone"])
@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_what_is_damaged_is_replaced(name: str, kind: str, packed: Path, tmp_path: Path) -> None:
    if name == "a part is gone" and kind == "whole":
        return
    other = copy(packed, kind, tmp_path / "copy")
    files = copy(packed, kind, tmp_path)
    paths = paths_of(files)
    before = [path.read_bytes() for path in paths]
    if name == "a part is gone":
        paths[1].unlink()
    else:
        DAMAGES[name](paths)
    files = a.files_in(tmp_path / kind)
    repaired, replaced = repair_archive(files, other, 2, a.QUIET)
    assert [path.read_bytes() for path in paths] == before and paths_of(repaired) == paths
    assert a.verify(repaired) == []
    frames = open_archive(repaired).frames
    if name == "nothing" or (name == "something follows" and kind == "parts"):
        assert replaced == 0
    elif name == "a frame":
        at = next(frame for frame in frames if frame.offset <= 1500 < frame.offset + frame.size)
        assert replaced == at.size
    elif name == "the tables":
        total = sum(map(len, before))
        assert replaced == total - (frames[-1].offset + frames[-1].size)
    elif name == "a part is gone":
        assert replaced == len(before[1])


@pytest.mark.parametrize(
    ("kind", "other", "why"),
    [
        ("parts", "others", "it is another archive, or was packed or cut in another way"),
        ("parts", "whole", "it is another archive, or was packed or cut in another way"),
    ],
)
def test_only_a_copy_of_the_same_archive_helps(
    kind: str, other: str, why: str, packed: Path, tmp_path: Path
) -> None:
    files, source = copy(packed, kind, tmp_path), copy(packed, other, tmp_path / "copy")
    with pytest.raises(IntegrityError) as told:
        repair_archive(files, source, 2, a.QUIET)
    assert told.value.what == f"{files.path} cannot be repaired from {source.path}"
    assert told.value.why == why and told.value.next_step == "use another copy"


def test_a_copy_without_tables_does_not_help(packed: Path, tmp_path: Path) -> None:
    files, source = copy(packed, "parts", tmp_path), copy(packed, "parts", tmp_path / "copy")
    DAMAGES["the tables"](paths_of(source))
    with pytest.raises(IntegrityError) as told:
        repair_archive(files, source, 2, a.QUIET)
    assert told.value.why == "its tables are damaged"


def test_a_copy_that_is_damaged_in_the_same_place_is_told(packed: Path, tmp_path: Path) -> None:
    files, source = copy(packed, "parts", tmp_path), copy(packed, "parts", tmp_path / "copy")
    for one in (files, source):
        flip(paths_of(one)[0], 1500)
    with pytest.raises(IntegrityError) as told:
        repair_archive(files, source, 2, a.QUIET)
    where = f"{source.path} is damaged where {files.path} is: frame at byte "
    assert told.value.what.startswith(where)
    assert told.value.next_step == "use another copy"


def test_bytes_are_put_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        sync(fd)

    monkeypatch.setattr("hfship.archive.repair.os.fsync", fsync)
    write_at(tmp_path / "f", b"abc", 2)
    write_at(tmp_path / "f", b"x", 0)
    assert (tmp_path / "f").read_bytes() == b"x\0abc" and synced == [5, 5]
