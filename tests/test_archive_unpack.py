# SPDX-License-Identifier: Apache-2.0
"""What goes of an archive while it is unpacked, and how much room that makes; whole runs, and kills,
are in test_media.py and test_unpack.py."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence

import pytest

from hfship.archive import unpack as room
from hfship.archive.damage import Damage, FileRange
from hfship.archive.files import ArchiveFiles
from hfship.archive.opening import open_archive
from hfship.archive.unpack import PartsToFree, free_file, remove_archive
from hfship.base.errors import DiskError, IntegrityError, NotFoundError, UsageError
from hfship.base.manifest import FileEntry, Source, make_manifest, write_manifest
from hfship.base.values import replace
from support import archives as a
from support.stages import KeptStages


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


# -- which folder, and what is there


HERE = Source("https://hub", "o/m", "main", "o/m", "1" * 40)
THERE = replace(HERE, resolved_repo="o/other")


def model_at(folder: Path, *, source: Any = HERE, files: Sequence[str] = ("w",)) -> Any:
    """A model folder whose files hold their own names, and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        entries.append(FileEntry(name, len(name), sha256))
    manifest = make_manifest("m", entries, source)
    write_manifest(folder, manifest)
    return manifest


def wanted_of(manifest: Any) -> Any:
    return room._Wanted(manifest, manifest.to_json().encode())


@pytest.mark.parametrize(
    ("present", "force", "found"),
    [
        ("nothing", False, False),
        ("nothing", True, False),
        ("the same", False, True),
        ("the same", True, True),
        ("another version", False, False),
        ("another model", False, "is another model"),
        ("another model", True, False),
        ("of nobody", False, False),
        ("with notes", False, "is there already"),
        ("with notes", True, False),
        ("a link", False, "cannot unpack into"),
        ("a link", True, "cannot unpack into"),
        ("a file", True, "cannot unpack into"),
        ("a broken link", False, "cannot unpack into"),
    ],
)
def test_what_a_folder_holds_already(present: str, force: bool, found: Any, tmp_path: Path) -> None:
    target = tmp_path / "m"
    wanted = wanted_of(model_at(tmp_path / "wanted"))
    if present == "the same":
        model_at(target)
    elif present == "another version":
        model_at(target, files=["w", "v"])
    elif present == "another model":
        model_at(target, source=THERE, files=["v"])
    elif present == "of nobody":
        model_at(target, source=None, files=["v"])
    elif present == "with notes":
        model_at(target, files=["v"])
        (target / "notes").write_text("mine")
    elif present == "a link":
        target.symlink_to(tmp_path / "wanted")
    elif present == "a broken link":
        target.symlink_to(tmp_path / "nowhere")
    elif present == "a file":
        target.write_text("x")
    if isinstance(found, bool):
        assert room._is_there(target, wanted, force) is found
        return
    with pytest.raises((IntegrityError, UsageError)) as told:
        room._is_there(target, wanted, force)
    assert found in told.value.what and str(target) in told.value.what
    assert "--name" in told.value.next_step
    if present == "another model":
        assert told.value.why == "it holds o/other, the archive holds o/m"
    if present == "with notes":
        assert told.value.why.endswith("in no manifest: notes")


@pytest.mark.parametrize(
    ("path", "foreign"),
    [
        (".", True),
        (".hfship/manifest.json", True),
        (".hfship/partial", True),
        ("sub", True),
        ("sub/w", True),
        ("notes", False),
    ],
)
def test_a_model_that_others_can_change_is_made_anew(
    path: str, foreign: bool, tmp_path: Path
) -> None:
    target = tmp_path / "m"
    manifest = model_at(target, files=["sub/w", "v"])
    (target / "notes").touch()
    (target / ".hfship/partial").mkdir()
    assert not room._is_foreign(target, manifest) and room._is_there(
        target, wanted_of(manifest), True
    )
    (target / path).chmod(0o777)
    assert room._is_foreign(target, manifest) is foreign
    (target / "v").unlink()
    assert room._is_foreign(target, manifest) is foreign, "what is not there is nobody's"
    if foreign:
        assert not room._is_there(target, wanted_of(manifest), True)


def test_the_folder_that_is_made(tmp_path: Path) -> None:
    assert room.target_folder(tmp_path / "a/b", "m") == tmp_path / "a/b/m"
    assert (tmp_path / "a/b").is_dir() and not (tmp_path / "a/b/m").exists()
    with pytest.raises(UsageError):
        room.target_folder(tmp_path, "../m")


@pytest.mark.parametrize(
    ("globs", "files", "left_out", "partial"),
    [
        (["*"], "config.json sub/w w-1-of-2.safetensors w-2-of-2.safetensors", 5, "old"),
        (["*.json"], "config.json", 8, "old"),
        (["sub*", "config.?son"], "config.json sub/w", 7, "old"),
        (["none"], "", 9, "old"),
    ],
)
def test_files_that_match_and_how_many_do_not(
    globs: List[str], files: str, left_out: int, partial: str
) -> None:
    names = ["config.json", "sub/w", "w-1-of-2.safetensors", "w-2-of-2.safetensors"]
    entries = [FileEntry(name, 1, "0" * 64) for name in names]
    manifest = replace(make_manifest("m", entries, HERE), left_out=5, partial=("old",))
    found = room.matching_files(manifest, globs)
    assert [entry.path for entry in found.files] == files.split()
    assert found.left_out == left_out and found.partial == (partial,)


def test_weights_without_which_others_are_of_no_use_are_named() -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    manifest = make_manifest("m", [FileEntry(name, 1, "0" * 64) for name in names], HERE)
    assert room.matching_files(manifest, ["*1-of*"]).partial == (names[1],)


# -- what is there already


def test_files_are_taken_from_bases_by_their_content(tmp_path: Path) -> None:
    """From what was NAME, and from what is kept of it; the rest comes from the archive."""
    manifest = model_at(tmp_path / "wanted", files=["w", "v", "gone", "there"])
    model_at(tmp_path / "base", files=["w", "gone", "there"])
    (tmp_path / "base/gone").unlink()
    kept = tmp_path / f"m~{'0' * 12}"
    model_at(kept, files=["v"])
    (kept / ".hfship/work-folder").touch()
    damaged = tmp_path / f"m~{'1' * 12}"
    model_at(damaged)
    (damaged / ".hfship/work-folder").touch()
    (damaged / ".hfship/manifest.json").write_text("{")
    with room.locked_tree(tmp_path / "m~incomplete", mark=True) as (tree, _):
        (tree.root / "there").write_text("mine")
        room._take_from_bases(tree, manifest, tmp_path / "base", tmp_path / "m")
        made = {path.name for path in tree.root.iterdir() if path.is_file()}
        assert made == {"w", "v", "there"}
        assert (tree.root / "w").samefile(tmp_path / "base/w")
        assert (tree.root / "v").samefile(kept / "v")
        assert (tree.root / "there").read_text() == "mine"
        room._take_from_base(tree, manifest, tmp_path / "none")
        room._take_from_base(tree, manifest, damaged)


def test_what_is_there_is_proven_and_the_rest_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = model_at(tmp_path / "m", files=["good", "bad!", "gone"])
    (tmp_path / "m/bad!").write_text("BAD!")
    (tmp_path / "m/gone").unlink()
    reporter: Any = KeptStages()
    archive: Any = SimpleNamespace(
        delta=SimpleNamespace(absent={"good"}), files=SimpleNamespace(name="m.delta.tar.zst")
    )
    with room.locked_tree(tmp_path / "m", mark=False) as (tree, _):
        missing = room._missing_files(archive, tree, manifest, 1, reporter)
        assert [entry.path for entry in missing] == ["bad!", "gone"]
        assert reporter.shown == [("prove", 8, 8)]
        assert reporter.said == [f"{tmp_path}/m: proving the 2 of 3 files that are there"]
        archive.delta.absent = {"gone", "bad!"}
        with pytest.raises(NotFoundError) as told:
            room._missing_files(archive, tree, manifest, 1, reporter)
    assert told.value.what.startswith("m.delta.tar.zst is a delta: 2 files must come from")
    assert told.value.why == "not found, or not intact: bad!, gone"
    with room.locked_tree(tmp_path / "empty", mark=True) as (tree, _):
        del reporter.shown[:]
        assert room._proven_files(tree, manifest, 1, reporter) == frozenset() and not reporter.shown


# -- the pass


def test_a_checkpoint_that_may_be_wrong_is_tried_without(
    files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; and the journal stays for a run that has to go on."""
    wrong = Damage("has another SHA-256", files=(FileRange("w", 0, 9),))
    placed = Damage("is odd", 5, 9, files=(FileRange("w", 0, 9),))
    runs: List[Dict[str, int]] = []
    closed: List[bool] = []
    outcomes: List[List[Damage]] = []

    class Played:
        is_complete = True

        def __init__(self, *_: Any) -> None:
            pass

        def run(self, resume: Dict[str, int]) -> List[Damage]:
            runs.append(dict(resume))
            return outcomes.pop(0)

    class Noted:
        def __init__(self, _: Any) -> None:
            pass

        def read(self, _: Any) -> Dict[str, int]:
            return dict(read)

        def close(self, remove: bool) -> None:
            closed.append(remove)

    monkeypatch.setattr(room, "_Restoring", Played)
    monkeypatch.setattr(room, "Journal", Noted)
    asked: List[int] = []
    monkeypatch.setattr(room, "_require_room_for_files", lambda *given: asked.append(given[3]))
    archive = open_archive(files)
    tree: Any = SimpleNamespace(root=tmp_path / "m~incomplete")
    options = room.UnpackOptions(jobs=1)
    read: Dict[str, int] = {"w": 5, "v": 2}
    for first, *later in ([[]], [[wrong], []], [[placed]], [[wrong], [wrong]]):
        outcomes[:] = [first, *later]
        del runs[:], closed[:], asked[:]
        fails = bool(([first, *later])[-1])
        if fails:
            with pytest.raises(IntegrityError):
                room._restore(archive, tree, [], options, a.QUIET)
        else:
            room._restore(archive, tree, [], options, a.QUIET)
        assert runs == [read, {}][: 1 + len(later)] and closed == [not fails] and asked == [7]
        assert not outcomes
    read.clear()
    outcomes[:] = [[wrong]]
    del runs[:]
    with pytest.raises(IntegrityError):
        room._restore(archive, tree, [], options, a.QUIET)
    assert runs == [{}], "there was no checkpoint"
    monkeypatch.setattr(
        room, "archive_error", lambda _, damages, again: IntegrityError(again, damages[0].what, "")
    )
    outcomes[:] = [[placed]]
    with pytest.raises(IntegrityError) as told:
        room._restore(archive, tree, [], options, a.QUIET)
    step = f"hfship unpack -o {tmp_path} {files.place}"
    assert (told.value.what, told.value.why) == (step, "is odd")


def test_a_journal_stays_where_not_all_is_there(
    files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: List[bool] = []
    monkeypatch.setattr(room.Journal, "close", lambda _, remove: closed.append(remove))
    monkeypatch.setattr(room._Restoring, "run", lambda *_: [])
    archive = open_archive(files)
    entry = next(one for one in archive.manifest.files if one.path == "w")  # type: ignore[union-attr]
    options = room.UnpackOptions(jobs=1)
    with room.locked_tree(tmp_path / "m~incomplete", mark=True) as (tree, _):
        room._restore(archive, tree, [entry], options, a.QUIET)
        room._restore(archive, tree, [], options, a.QUIET)
    assert closed == [False, True]


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [("none", ""), ("shorter", "w"), ("gone", "w"), ("a link", "w")],
)
def test_all_files_are_looked_at_once_more(harm: str, wrong: str, tmp_path: Path) -> None:
    manifest = model_at(tmp_path / "m", files=["w", "v"])
    path = tmp_path / "m/w"
    if harm != "none":
        path.unlink()
    if harm == "shorter":
        path.touch()
    elif harm == "a link":
        path.symlink_to("v")
    with room.locked_tree(tmp_path / "m", mark=False) as (tree, _):
        if not wrong:
            room._require_all(tree, manifest)
            return
        with pytest.raises(IntegrityError, match="was changed while it was unpacked") as told:
            room._require_all(tree, manifest)
    assert told.value.why == f"missing, or not of their size: {wrong}"


# -- the end


@pytest.mark.parametrize(
    ("keep", "present", "kept"),
    [
        (0, "another", 0),
        (1, "another", 1),
        (1, "the same", 0),
        (1, "nothing", 0),
        (1, "no manifest", 0),
    ],
)
def test_what_was_in_place_is_kept_if_that_is_asked(
    keep: int, present: str, kept: int, tmp_path: Path
) -> None:
    target, work = tmp_path / "m", tmp_path / "m~incomplete"
    coming = model_at(work)
    (work / ".hfship/work-folder").touch()
    if present != "nothing":
        other = {"source": replace(HERE, commit="2" * 40), "files": ["v"]}
        model_at(target, **(other if present == "another" else {}))
    if present == "no manifest":
        (target / ".hfship/manifest.json").unlink()
    room._publish(work, target, coming, keep)
    assert (target / "w").read_text() == "w" and not (target / "v").exists()
    assert len(room.kept_versions(target)) == kept
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "m"
    assert len(list(tmp_path.iterdir())) == 1 + kept


def test_a_run_asks_whether_the_model_is_to_be_had_before_it_has_its_name(
    files: ArchiveFiles, tmp_path: Path
) -> None:
    seen: List[Any] = []

    def accept(folder: Path, manifest: Any) -> None:
        there = [path for path in folder.rglob("*") if path.is_file()]
        seen.append((folder.name, manifest.name, len(there) > 90))
        if len(seen) == 1:
            raise UsageError("not here", "", "")

    options = room.UnpackOptions(name="n", jobs=1, accept=accept)
    with pytest.raises(UsageError, match="not here"):
        room.unpack_archive(open_archive(files), tmp_path, options, a.QUIET)
    assert not (tmp_path / "n").exists()
    done = room.unpack_archive(open_archive(files), tmp_path, options, a.QUIET)
    assert (done.folder, done.written) == (tmp_path / "n", 0), "all was there from the first run"
    again = room.unpack_archive(open_archive(files), tmp_path, options, a.QUIET)
    assert (again.written, again.manifest.name) == (0, "m") and again.seconds > 0
    work = "n~incomplete"
    assert [name for name, *_ in seen] == [work, work, "n"] and all(whole for *_, whole in seen)
    (tmp_path / "n/w").write_bytes(b"damaged")
    mended = room.unpack_archive(open_archive(files), tmp_path, options, a.QUIET)
    assert mended.written == 1 and (tmp_path / "n/w").stat().st_size == 9000
    left = {path.name for path in (tmp_path / "n/.hfship").iterdir()}
    assert "partial" not in left and "journal" not in left
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("n")] == ["n"]


def test_what_is_consumed_is_noted_before_the_model_has_its_name(
    files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: List[Any] = []
    monkeypatch.setattr(
        room, "note_consumed", lambda *given: noted.append((*given, given[1].exists()))
    )
    monkeypatch.setattr(room, "PartsToFree", lambda *_: SimpleNamespace(free_before=None))
    work, target = tmp_path / "m~incomplete", tmp_path / "m"
    for consume in (False, True):
        options = room.UnpackOptions(jobs=1, consume=consume)
        room.unpack_archive(open_archive(files), tmp_path, options, a.QUIET)
        assert len(noted) == consume
        if not consume:
            shutil.rmtree(target)
    ((where, place, archive, was_there),) = noted
    assert (where, place, was_there) == (work, target, False)
    assert archive.path == files.path


def test_names_that_the_disk_does_not_take_are_told_first(
    files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: Path, paths: List[str], doing: str) -> None:
        assert work == tmp_path / "m~incomplete" and "w" in paths
        raise DiskError(doing, "", "")

    monkeypatch.setattr(room, "require_names", refuse)
    with pytest.raises(DiskError, match=f"unpack into {tmp_path}"):
        room.unpack_archive(open_archive(files), tmp_path, room.UnpackOptions(), a.QUIET)


def test_files_are_closed_when_a_pass_fails(
    files: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: List[int] = []

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(room.FolderSink, "close", lambda _: closed.append(1))
    monkeypatch.setattr(room, "checker_of", lambda _: fail)
    with pytest.raises(KeyboardInterrupt):
        room.unpack_archive(open_archive(files), tmp_path, room.UnpackOptions(jobs=1), a.QUIET)
    assert closed == [1]
