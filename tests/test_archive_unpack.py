# SPDX-License-Identifier: Apache-2.0
"""What goes of an archive while it is unpacked, and how much room that makes; whole runs, and kills,
are in test_media.py and test_unpack.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.archive import unpack as room
from hfship.archive.files import ArchiveFiles
from hfship.archive.opening import open_archive
from hfship.archive.unpack import PartsToFree, free_file, remove_archive
from hfship.base.errors import DiskError, NotFoundError
from hfship.base.manifest import FileEntry
from support import archives as a


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six parts, of which the first ones hold a long manifest."""
    root = tmp_path_factory.mktemp("series")
    files = {f"dir/{number:03}-{'x' * 60}": b"" for number in range(90)}
    a.make_model(root / "m", {**files, "w": a.noise(9000)})
    a.pack(root / "m", root / "parts", frame_size=1000, split=3000)
    return root / "parts"


@pytest.fixture
def files(series: Path, tmp_path: Path) -> ArchiveFiles:
    shutil.copytree(series, tmp_path / "medium")
    return a.files_in(tmp_path / "medium")


def sizes_of(archive: Any) -> List[int]:
    """What is left of each part."""
    return [part.path.stat().st_size if part.path.exists() else 0 for part in archive.parts]


def test_parts_go_as_soon_as_their_files_are_safe(files: ArchiveFiles) -> None:
    archive = open_archive(files)
    whole = sizes_of(archive)
    synced: List[List[int]] = []
    tree: Any = SimpleNamespace(sync=lambda: synced.append(sizes_of(archive)))
    freeing = PartsToFree(archive, tree)
    for frame in archive.frames:
        freeing.free_before(frame.start)
        for part, size, left in zip(archive.parts, whole, sizes_of(archive)):
            if part.stop > frame.offset:
                assert left == size, "its files are not safe"
    freeing.free_before(10**9)
    left = sizes_of(archive)
    of_weights = next(one for one in archive.segments if one.size == 9000)
    for part, size in zip(archive.parts[:-1], left):
        frames = [one for one in archive.frames if part.start <= one.offset < part.stop]
        assert size == 0 or frames[0].start < of_weights.start
    assert left[-1] == whole[-1], "the last part has the tables"
    assert left[0] == whole[0] and 0 in left, "the manifest stays"
    assert len(synced) == len(whole) - 1, "names are durable before each"
    assert synced[0] == whole and synced[-1][-2] == whole[-2]
    again = open_archive(a.files_in(files.folder))
    assert again.manifest == archive.manifest, "a run after a kill goes on"


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, None), (1, b"0"), (9, b"012345678"), (10, b"0123456789"), (99, b"0123456789")],
)
def test_a_file_goes_but_for_its_first_bytes(keep: int, left: Any, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"0123456789")
    free_file(path, keep=keep)
    assert (path.read_bytes() if path.exists() else None) == left
    free_file(tmp_path / "gone", keep=keep)
    path.unlink(missing_ok=True)
    path.touch()
    free_file(path)
    assert not path.exists()


def test_what_cannot_be_removed_is_told(tmp_path: Path) -> None:
    (tmp_path / "folder/x").mkdir(parents=True)
    with pytest.raises(DiskError) as told:
        free_file(tmp_path / "folder")
    assert told.value.next_step == "leave out --consume, or make the folder writable"


def test_the_sums_of_an_archive_go_last(
    files: ArchiveFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: List[Path] = []
    monkeypatch.setattr(room, "free_file", gone.append)
    remove_archive(files)
    assert gone == [*files.paths, files.sums] and len(gone) > 3


# -- room


def archive_of(folder: Path, *sizes: int) -> Any:
    """Parts of these sizes, of which those of 0 bytes are gone."""
    parts = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}"
        if size:
            path.touch()
        parts.append(SimpleNamespace(path=path, size=size or 50))
    return SimpleNamespace(parts=parts, files=SimpleNamespace(path=folder / "0"))


def test_all_parts_but_the_largest_make_room_on_the_way(tmp_path: Path, monkeypatch: Any) -> None:
    archive = archive_of(tmp_path, 10, 30, 0, 20)
    assert room._freed_on_the_way(archive, tmp_path) == 30
    stat = os.stat

    def another(path: Any, **options: Any) -> Any:
        found = stat(path, **options)
        device = found.st_dev + (Path(path) == tmp_path)
        return SimpleNamespace(st_dev=device, st_mode=found.st_mode)

    monkeypatch.setattr(room.os, "stat", another)
    assert room._freed_on_the_way(archive, tmp_path) == 0


ENTRIES = [FileEntry("a", 100, "0" * 64), FileEntry("b", 40, "0" * 64)]


@pytest.mark.parametrize(
    ("consume", "kept", "needed", "step"),
    [
        (False, [], 133, "free space, give --consume, or choose another folder with -o DIR"),
        (True, [], 103, "free space, or choose another folder with -o DIR"),
        (
            False,
            ["m~1"],
            133,
            "free space, give --consume, or choose another folder with -o DIR"
            "\nor without the oldest version that is kept: rm -r 'm~1'",
        ),
    ],
)
def test_how_much_room_is_asked_for(
    consume: bool, kept: List[str], needed: int, step: str, tmp_path: Path, monkeypatch: Any
) -> None:
    asked: Dict[str, Any] = {}
    versions = [SimpleNamespace(folder=name) for name in kept]

    def kept_versions(target: Path) -> Any:
        assert target == tmp_path / "m"
        return versions

    monkeypatch.setattr(room, "kept_versions", kept_versions)
    monkeypatch.setattr(room, "require_room", lambda *words: asked.update(room=words))
    monkeypatch.setattr(room, "require_inodes", lambda *words: asked.update(inodes=words))
    monkeypatch.setattr(room, "_freed_on_the_way", lambda *_: 30)
    folder = tmp_path / "m~incomplete"
    archive = archive_of(tmp_path, 10, 30)
    room._require_room_for_files(archive, folder, ENTRIES, 7, consume)
    what = f"unpack into {folder}"
    assert asked["room"] == (folder, needed, 100, what, step)
    assert asked["inodes"] == (folder, 2 + room.SPARE_INODES, what, step)
    room._require_room_for_files(archive, folder, [], 0, False)
    assert asked["room"][1:3] == (0, 0)
    stream = room.Streamed.__new__(room.Streamed)
    room._require_room_for_files(stream, folder, ENTRIES, 0, False)
    assert "--consume" not in asked["room"][4]


def test_files_that_are_asked_for_are_there(files: ArchiveFiles) -> None:
    archive = open_archive(files)
    everything = room._wanted(archive, ())
    assert (everything.manifest, everything.text) == (archive.manifest, archive.text)
    some = room._wanted(archive, ("w",))
    assert [entry.path for entry in some.manifest.files] == ["w"]
    assert some.text == some.manifest.to_json().encode()
    with pytest.raises(NotFoundError) as told:
        room._wanted(archive, ("*.none", "x"))
    assert told.value.what == "no file of m.tar.zst matches *.none, x"
    assert told.value.next_step == "give another --only GLOB"
