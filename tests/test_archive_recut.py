# SPDX-License-Identifier: Apache-2.0
"""Each step of a cut by itself: what is there, what is in the way, how much room, and what a killed
run wrote; test_recut.py has whole runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence

import pytest

from hfship.archive import recut as room
from hfship.archive.damage import Damage
from hfship.archive.files import ArchiveFiles
from hfship.archive.opening import open_archive
from hfship.archive.pack_journal import WrittenPart
from hfship.archive.recut import RecutOptions, _Cut
from hfship.base.errors import DiskError, IntegrityError, UsageError
from hfship.base.progress import Stage
from support import archives as a

NAME = "m.tar.zst"
SPLIT = 2_200_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive whole, and in parts."""
    root = tmp_path_factory.mktemp("recut")
    a.make_model(root / "m", {"w": a.noise(5_000_000), "config.json": b"{}"})
    whole = a.pack(root / "m", root / "whole")
    room.recut(whole, [root / "parts"], RecutOptions(SPLIT, force=False), a.QUIET)
    return root


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> ArchiveFiles:
    shutil.copytree(made / "whole", tmp_path / "whole")
    return a.files_in(tmp_path / "whole")


def cuts_of(files: ArchiveFiles, split: Any = SPLIT) -> List[_Cut]:
    archive = open_archive(files)
    assert archive.manifest
    return room.plan_cuts(archive, archive.manifest, split)


def test_cuts_are_the_units_and_the_tables(whole: ArchiveFiles, made: Path) -> None:
    archive = open_archive(whole)
    (joined,) = cuts_of(whole, None)
    assert (joined.name, joined.first, joined.stop) == (NAME, 0, len(archive.frames))
    assert joined.size == whole.path.stat().st_size
    assert whole.path.read_bytes().endswith(joined.tail)
    cuts = cuts_of(whole)
    names = sorted(path.name for path in (made / "parts").glob(f"{NAME}.0*"))
    assert [cut.name for cut in cuts] == names and len(names) == 3
    assert [cut.size for cut in cuts] == [(made / "parts" / name).stat().st_size for name in names]
    assert [cut.first for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
    assert (cuts[0].first, cuts[-1].stop) == (0, len(archive.frames))
    assert [bool(cut.tail) for cut in cuts] == [False, False, True]
    with pytest.raises(UsageError):
        cuts_of(whole, 1_000_000)


# -- what is there


CUTS = [_Cut("x.1", 0, 1, 3), _Cut("x.2", 1, 2, 4)]


def put(folder: Path, **files: int) -> None:
    folder.mkdir(exist_ok=True)
    for name, size in files.items():
        (folder / name.replace("_", ".")).write_bytes(bytes(size))


def sums_in(folder: Path, *names: str) -> None:
    (folder / "x.sha256").write_text("".join(f"{'1' * 64}  {name}\n" for name in names))


@pytest.mark.parametrize(
    ("first", "second", "listed", "there"),
    [
        ({"x_1": 3, "x_2": 4}, {}, ["x.1", "x.2"], [0, 0]),
        ({"x_1": 3}, {"x_2": 4}, ["x.1", "x.2"], [0, 1]),
        ({"x_1": 3, "x_2": 4}, {"x_2": 4}, ["x.1", "x.2"], [0, 0]),
        ({"x_1": 3, "x_2": 5}, {}, ["x.1", "x.2"], None),
        ({"x_1": 3}, {}, ["x.1", "x.2"], None),
        ({"x_1": 3, "x_2": 4}, {}, ["x.1"], None),
        ({"x_1": 3, "x_2": 4}, {}, ["x.1", "x.2", "x.3"], None),
        ({"x_1": 3, "x_2": 4}, {}, [], None),
    ],
)
def test_what_is_wanted_may_be_there(
    first: Dict[str, int], second: Dict[str, int], listed: List[str], there: Any, tmp_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    put(folders[0], **first)
    put(folders[1], **second)
    if listed:
        sums_in(folders[0], *listed)
    files = ArchiveFiles(tmp_path / "elsewhere", "x", {})
    found = room._parts_there(files, CUTS, folders)
    if there is None:
        assert found is None
        return
    expected = [
        WrittenPart(folders[at] / cut.name, cut.size, "1" * 64) for at, cut in zip(there, CUTS)
    ]
    assert found == tuple(expected)


def archive_of(*paths: Path) -> Any:
    return SimpleNamespace(files=SimpleNamespace(name=NAME, paths=list(paths)))


PARTS = [_Cut(f"{NAME}.0001", 0, 1, 3), _Cut(f"{NAME}.0002", 1, 2, 4)]


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.0001"
    path.write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="would be written while it is read") as told:
            room._require_free_names(archive_of(path), PARTS, [folder], force=True)
        assert told.value.next_step == "give -o DIR"
    (tmp_path / "other").mkdir()
    room._require_free_names(archive_of(path), PARTS, [tmp_path / "other"], force=False)


@pytest.mark.parametrize(
    ("name", "size", "listed", "other"),
    [
        (f"{NAME}.0001", 3, True, False),  # that a killed run had named
        (f"{NAME}.0001", 3, False, True),
        (f"{NAME}.0001", 4, True, True),
        (f"{NAME}.0009", 3, True, True),
        (NAME, 3, False, True),
        ("notes.txt", 3, False, False),
        (f"{NAME}.sha256", 3, False, False),
    ],
)
def test_another_archive_is_in_the_way(
    name: str, size: int, listed: bool, other: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(bytes(size))
    if listed:
        (tmp_path / f"{NAME}.sha256").write_text(f"{'1' * 64}  {name}\n")
    read = archive_of(tmp_path / "elsewhere" / NAME)
    found = room._others_in(tmp_path, read, PARTS)
    assert found == ([str(tmp_path / name)] if other else [])
    assert room._others_in(tmp_path, archive_of(tmp_path / name), PARTS) == []
    if other:
        with pytest.raises(UsageError, match="is there already") as told:
            room._require_free_names(read, PARTS, [tmp_path], force=False)
        assert "--force" in told.value.next_step and name in told.value.why
        if name not in (PARTS[0].name, PARTS[1].name):
            room._require_free_names(read, PARTS, [tmp_path], force=True)


# -- room


@pytest.mark.parametrize(
    ("split", "begun", "needed"),
    [(9, {}, 7), (9, {"a": 2}, 5), (9, {"a": 99}, 4), (9, {"b": 2}, 5), (None, {}, 7)],
)
def test_how_much_room_is_asked_for(
    split: Any, begun: Dict[str, int], needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less what is written, and what further media take."""
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder in folders:
        folder.mkdir()
    for name, size in begun.items():
        (tmp_path / name / f"{PARTS[0].name}.incomplete").write_bytes(bytes(size))
    asked: List[Any] = []
    free = {folders[1]: room.SIDECARS_SIZE - 5, folders[2]: room.SIDECARS_SIZE}
    monkeypatch.setattr(room, "free_bytes", free.__getitem__)
    monkeypatch.setattr(room, "require_large_files", lambda *given: asked.append(given))
    monkeypatch.setattr(room, "require_room", lambda *given: asked.append(given))
    room._make_room(archive_of(), PARTS, folders, split)
    what = f"{'split' if split else 'join'} {NAME}"
    step = "free space, or choose another folder with -o or --to"
    assert asked == [
        *((folder, 4, what) for folder in folders),
        (folders[0], needed, 4, what, step),
    ]
    free[folders[2]] += 3
    room._make_room(archive_of(), PARTS, folders, split)
    assert asked[-1][1] == needed - 3


def test_a_part_goes_where_it_was_begun_or_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder in folders:
        folder.mkdir()
    free = dict.fromkeys(folders, 4 + room.SIDECARS_SIZE)
    monkeypatch.setattr(room, "free_bytes", free.__getitem__)
    cut = PARTS[1]
    assert room._folder_for(cut, folders) == folders[2], "the last, where there is no room"
    free[folders[1]] += 1
    assert room._folder_for(cut, folders) == folders[1]
    (folders[2] / cut.name).touch()
    assert room._folder_for(cut, folders) == folders[2]
    (folders[0] / f"{cut.name}.incomplete").touch()
    assert room._folder_for(cut, folders) == folders[0]


# -- bytes


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("nothing", 0),
        ("half a unit", 0),
        ("a unit", 1),
        ("a unit and garbage", 1),
        ("a wrong unit", 0),
        ("all", 2),
        ("all with a longer tail", 2),
        ("named already", 2),
    ],
)
def test_what_a_killed_run_wrote_right_is_kept(
    before: str, kept: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = open_archive(a.files_in(made / "whole"))
    frames = list(archive.frames)[:2]
    units = [archive.unit(frame) for frame in frames]
    whole = b"".join(units) + b"tables"
    content = {
        "nothing": None,
        "half a unit": units[0][:-1],
        "a unit": units[0],
        "a unit and garbage": units[0] + b"x" * 99,
        "a wrong unit": b"x" + units[0][1:] + units[1],
        "all": whole,
        "all with a longer tail": whole + b"more",
        "named already": whole,
    }[before]
    path = tmp_path / PARTS[0].name
    unfinished = tmp_path / f"{PARTS[0].name}.incomplete"
    if content is not None:
        (path if before == "named already" else unfinished).write_bytes(content)
    read: List[int] = []
    real = room._proven_unit
    monkeypatch.setattr(
        room, "_proven_unit", lambda of, frame: (read.append(frame.offset), real(of, frame))[1]
    )
    backs: List[Any] = []
    monkeypatch.setattr(room, "require_read_back", lambda *given: backs.append(given))
    cut = _Cut(path.name, 0, 2, len(whole), b"tables")
    stage = Stage("split", len(whole))
    fds = set(os.listdir("/proc/self/fd"))
    for read_back in (False, True):
        sha256 = room._write(archive, cut, path, read_back, stage)
        assert unfinished.read_bytes() == whole and not path.exists()
        assert sha256 == hashlib.sha256(whole).hexdigest() and len(backs) == read_back
    assert read == [frame.offset for frame in frames[kept:]]
    assert stage.done == 2 * len(whole)
    first = sum(map(len, units[:kept]))
    assert stage.skipped == first + len(units[0] + units[1])
    assert [given[0] for given in backs] == [unfinished] and backs[0][2] == sha256
    assert set(os.listdir("/proc/self/fd")) == fds


def test_no_link_is_written_through(tmp_path: Path) -> None:
    path = tmp_path / "x"
    (tmp_path / "x.incomplete").symlink_to(tmp_path / "target")
    with pytest.raises(DiskError, match="cannot create"), room._writable(
        tmp_path / "x.incomplete", path
    ):
        pass
    assert not (tmp_path / "target").exists()
    (tmp_path / "x.incomplete").unlink()
    (tmp_path / "target").write_text("mine")
    path.symlink_to(tmp_path / "target")
    with room._writable(tmp_path / "x.incomplete", path) as fd:
        os.write(fd, b"ours")
    assert (tmp_path / "target").read_text() == "mine" and path.is_symlink()


def test_a_damaged_unit_is_told_with_its_place(whole: ArchiveFiles) -> None:
    archive = open_archive(whole)
    frame = list(archive.frames)[1]
    with a.flipped(whole.path, frame.offset + 20), pytest.raises(IntegrityError) as told:
        room._proven_unit(archive, frame)
    assert told.value.what == f"{whole.path} is damaged"
    last = frame.offset + frame.size - 1
    assert told.value.why.startswith(f"bytes {frame.offset}-{last} of the archive: ")
    assert told.value.next_step == f"hfship verify {whole.path}     # finds all damage"


# -- names


def written(*paths: Path) -> List[WrittenPart]:
    parts = []
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        part = WrittenPart(path, 1, "1" * 64)
        part.unfinished.write_text("x")
        parts.append(part)
    return parts


def test_sums_come_before_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder, b_folder = tmp_path / "a", tmp_path / "b"
    parts = written(a_folder / f"{NAME}.0001", b_folder / f"{NAME}.0002")
    did: List[str] = []
    real = room.rename_durably

    def rename(source: Path, target: Path) -> None:
        assert (target.parent / f"{NAME}.sha256").exists()
        did.append(target.name)
        real(source, target)

    monkeypatch.setattr(room, "rename_durably", rename)
    room._publish(archive_of(), parts, [a_folder, b_folder])
    sums = "".join(f"{'1' * 64}  {part.path.name}\n" for part in parts)
    for folder, part in zip((a_folder, b_folder), parts):
        assert (folder / f"{NAME}.sha256").read_text() == sums
        assert {path.name for path in folder.iterdir()} == {f"{NAME}.sha256", part.path.name}
    assert did == [part.path.name for part in parts]


def test_the_old_form_goes_and_nothing_else(tmp_path: Path) -> None:
    kept = WrittenPart(tmp_path / f"{NAME}.0001", 1, "1" * 64)
    goes = [NAME, f"{NAME}.0009", f"{NAME}.0009.incomplete", f"{NAME}.0001.incomplete"]
    stays = [f"{NAME}.0001", f"{NAME}.sha256", f"{NAME}.sig", "notes.txt", "other.tar.zst"]
    for name in (*goes, *stays):
        (tmp_path / name).touch()
    room._remove_others(NAME, [kept], [tmp_path])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stays)


def test_a_signature_comes_along_if_there_is_one(tmp_path: Path) -> None:
    files = ArchiveFiles(tmp_path / "a", NAME, {})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    room._copy_signature(files, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
    (tmp_path / "a" / f"{NAME}.sig").write_text("signed")
    before = (tmp_path / "a" / f"{NAME}.sig").stat().st_ino
    room._copy_signature(files, tmp_path / "a")
    assert (tmp_path / "a" / f"{NAME}.sig").stat().st_ino == before, "it is there"
    room._copy_signature(files, tmp_path / "b")
    assert (tmp_path / "b" / f"{NAME}.sig").read_text() == "signed"


# -- a run that was killed while the old form went


def test_the_new_form_is_taken_where_the_old_one_is_going(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made / "parts", out)
    shutil.copy(made / "whole" / NAME, out / NAME)  # a join that is finished but for this
    (out / f"{NAME}.sha256").write_text(f"{'1' * 64}  {NAME}\n")
    (out / f"{NAME}.0001").unlink()
    (old,) = [one for one in room.archives_in(out) if one.numbers]
    join = RecutOptions(None, force=False)
    found = room._finished(old, [out], join)
    assert found and found.files.path == out / NAME
    archive, manifest = room._opened(old, [out], join)
    assert archive.files.path == out / NAME and manifest.name == "m"
    with pytest.raises(IntegrityError):
        room._opened(old, [out], RecutOptions(SPLIT, force=False))
    (out / f"{NAME}.0002").write_bytes(a.noise(1000))
    assert room._finished(old, [out], join), "what holds no unit is a piece of any"
    a.make_model(tmp_path / "n/m", {"w": a.noise(3000, 9)})
    other = a.pack(tmp_path / "n/m", tmp_path / "other")
    shutil.copy(other.path, out / f"{NAME}.0002")
    assert room._finished(old, [out], join) is None
    (out / f"{NAME}.sha256").write_text("")
    assert room._finished(old, [out], join) is None


@pytest.mark.parametrize("split", [None, SPLIT])
def test_a_run_in_its_order(
    split: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: List[Any] = []

    def note(name: str, value: Any = None) -> Any:
        def do(*given: Any, **_: Any) -> Any:
            did.append(name)
            return value

        return do

    @contextlib.contextmanager
    def claim(lock: Path, journal: bool) -> Any:
        did.append((lock.name, journal))
        lock.write_text("parts")
        fd = os.open(lock, os.O_RDWR)
        yield fd
        did.append(lock.stat().st_size)
        os.close(fd)

    parts: Sequence[WrittenPart] = (WrittenPart(tmp_path / "a" / NAME, 1, "1" * 64),)
    for name, value in {
        "_require_free_names": None,
        "_make_room": None,
        "_write_all": parts,
        "_publish": None,
        "_remove_others": None,
        "write_sidecars": None,
        "_copy_signature": None,
    }.items():
        monkeypatch.setattr(room, name, note(name, value))
    monkeypatch.setattr(room, "claim", claim)
    times = iter([5.0, 7.5, 10.0, 10.5])
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: next(times)))
    there: List[Any] = [None]
    monkeypatch.setattr(room, "_parts_there", lambda *_: there[0])
    files = a.files_in(made / "whole")
    folders = [tmp_path / "a", tmp_path / "b"]
    done = room.recut(files, folders, RecutOptions(split, force=False), a.QUIET)
    after = ["write_sidecars", "_copy_signature"] * 2
    assert did == [
        "_require_free_names",
        "_make_room",
        (f"{NAME}.incomplete", True),
        "_write_all",
        "_publish",
        0 if split else 5,
        "_remove_others",
        *after,
    ]
    assert done.fresh and done.parts == parts and done.manifest.name == "m" and done.seconds == 2.5
    del did[:]
    there[0] = parts
    again = room.recut(files, folders, RecutOptions(split, force=False), a.QUIET)
    assert not again.fresh and did == ["_remove_others", *after]


@pytest.mark.parametrize(
    ("damages", "manifest"), [([], None), ([Damage("odd")], "m"), ([Damage("odd")], None)]
)
def test_an_archive_with_damage_is_not_cut(
    damages: List[Damage], manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ArchiveFiles(tmp_path, NAME, {})
    archive = SimpleNamespace(damages=damages, manifest=manifest)
    told: List[Any] = []

    def archive_error(*given: Any) -> IntegrityError:
        told.append(given)
        return IntegrityError("damaged", "", "")

    monkeypatch.setattr(room, "open_archive", lambda _: archive)
    monkeypatch.setattr(room, "archive_error", archive_error)
    with pytest.raises(IntegrityError, match="damaged"):
        room._opened(files, [tmp_path], RecutOptions(None, force=False))
    assert told == [(archive, damages, f"hfship verify {files.path}")]
