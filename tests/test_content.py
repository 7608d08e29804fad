"""One rule says what is content, from the Hub to the far side; work on it is in nobody's way."""

import os
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from conftest import Program
from hfship.archive import unpack
from hfship.archive.opening import open_archive
from hfship.archive.work_folder import work_folder_of
from hfship.base.content import MARK_PATH, REPLACED, content_files, work_path
from hfship.base.errors import IntegrityError, UsageError
from support import archives as a
from support.hub import FaultHub

WEIGHT = a.noise(2 << 20, 5)
OTHER = a.noise(2 << 20, 6)
CONFIG = {"config.json": b'{"model_type": "llama"}'}
ODD_NAMES: Dict[str, Dict[str, bytes]] = {
    "a twin that looks unfinished": {"w": b"1", "w.incomplete": b"22"},
    "a weight and its twin": {"m.safetensors": WEIGHT, "m.safetensors.incomplete": OTHER},
    "twins of twins": {"w": b"1", "w.incomplete": b"2", "w.incomplete.incomplete": b"3"},
    "names of our work files": {"w": WEIGHT, work_path("w").rpartition("/")[2]: b"1"},
    "files of systems": {".DS_Store": b"1", "sub/.DS_Store": b"2", "Thumbs.db": b"3"},
    "files of git hosts": {".gitattributes": b"1", ".gitignore": b"2", ".github/x.yml": b"3"},
    "notes of hf, published": {
        "x": b"1",
        ".cache/huggingface/download/x.metadata": b"as published",
        ".cache/huggingface/.gitignore": b"as published",
    },
    "the longest names": {"n" * 255: b"1", "d" * 255 + "/" + "é" * 127: WEIGHT},
    "names that planes add to": {"n" * 250: WEIGHT},
    "a folder that looks unfinished": {"w.incomplete/a": b"1", "w": b"2"},
}


@pytest.mark.parametrize("names", ODD_NAMES)
def test_what_the_hub_lists_arrives(
    names: str, hfship: Program, hub: FaultHub, tmp_path: Path
) -> None:
    """fetch, verify, pack, unpack and verify agree; what is complete is left alone."""
    files = {**CONFIG, **ODD_NAMES[names]}
    a.make_model(tmp_path / "hub/org/m", files)
    fetch = ("fetch", "org/m", "--all-files", "--endpoint", hub.url, "-o", tmp_path / "near")
    hfship(*fetch)
    near = tmp_path / "near/m"
    listed = frozenset(files)
    assert {path: (near / path).read_bytes() for path in files} == files
    assert {path for path, _ in content_files(near, listed)} == set(files)
    assert not (near / ".hfship/partial").exists()
    before = {path: (near / path).stat().st_ino for path in files}
    hfship(*fetch)
    assert {path: (near / path).stat().st_ino for path in files} == before
    assert "not in the manifest" not in hfship("verify", near).stderr
    hfship("pack", near, "-o", tmp_path / "out")
    hfship("verify", tmp_path / "out")
    hfship("unpack", tmp_path / "out", "-o", tmp_path / "far")
    far = tmp_path / "far/m"
    assert {path: (far / path).read_bytes() for path in files} == files
    assert "not in the manifest" not in hfship("verify", far).stderr
    assert sorted(path.name for path in far.parent.iterdir()) == ["m"]


def test_planes_are_not_made_of_names_that_they_take(tmp_path: Path) -> None:
    for files in (
        {"w": WEIGHT, "w.incomplete": b"1"},
        {"w": WEIGHT, "x.planes": b"1"},
        {"n" * 250: WEIGHT},
    ):
        a.make_model(tmp_path / "m", {**CONFIG, **files})
        with pytest.raises(UsageError, match="--profile smallest"):
            a.pack(tmp_path / "m", tmp_path / "out", profile="smallest")


NEVER = [
    ".git/config",
    "sub/.git/hooks/x",
    ".HG/hgrc",
    ".svn/x",
    ".ssh/id",
    "a/.hfship/x",
    "git~1/x",
]


@pytest.mark.parametrize("path", NEVER)
def test_what_is_never_content_does_not_arrive(
    path: str, hfship: Program, hub: FaultHub, tmp_path: Path
) -> None:
    """Refused with its name; the rest goes on when it is excluded."""
    folder = tmp_path / "hub/org/m"
    a.make_model(folder, {**CONFIG, "w.bin": b"w"})
    hub.faults.evil_path = path
    fetch = ["fetch", "org/m", "--all-files", "--endpoint", hub.url, "-o", tmp_path / "near"]
    said = hfship(*fetch, code=6).stderr
    assert path in said and "--exclude" in said
    assert not (tmp_path / "near/m/config.json").exists()
    hfship(*fetch, "--exclude", path)
    assert not (tmp_path / "near/m" / path).exists()


# -- folders that unpack works in


def test_finished_models_with_the_names_of_old_work_folders_stay(
    hfship: Program, tmp_path: Path
) -> None:
    for name in ("m", "m.incomplete", "m.replaced.incomplete"):
        a.make_model(tmp_path / name, {**CONFIG, "w": name.encode()})
        a.pack(tmp_path / name, tmp_path / "out" / name)
        hfship("unpack", tmp_path / "out" / name, "-o", tmp_path / "far")
    a.make_model(tmp_path / "m", {**CONFIG, "w": b"new"})
    hfship("pack", tmp_path / "m", "-o", tmp_path / "new")
    hfship("unpack", tmp_path / "new", "-o", tmp_path / "far", "--force")
    far = tmp_path / "far"
    found = {path.name: (path / "w").read_bytes() for path in far.iterdir()}
    assert found == {
        "m": b"new",
        "m.incomplete": b"m.incomplete",
        "m.replaced.incomplete": b"m.replaced.incomplete",
    }


@pytest.mark.parametrize("suffix", ["~incomplete", "~replaced"])
def test_a_folder_that_is_in_the_way_is_not_touched(
    suffix: str, hfship: Program, tmp_path: Path
) -> None:
    model = tmp_path / "m"
    a.make_model(model, CONFIG)
    a.pack(model, tmp_path / "out")
    mine = tmp_path / f"far/m{suffix}"
    mine.mkdir(parents=True)
    (mine / "precious").write_bytes(b"x")
    said = hfship("unpack", tmp_path / "out", "-o", tmp_path / "far", code=6).stderr
    assert f"m{suffix} is in the way" in said and "move or remove" in said
    assert [path.name for path in mine.iterdir()] == ["precious"]
    mine.rename(tmp_path / "moved")
    hfship("unpack", tmp_path / "out", "-o", tmp_path / "far")


def test_a_replaced_folder_whose_removal_was_killed_goes_with_the_next_run(tmp_path: Path) -> None:
    a.make_model(tmp_path / "m", {**CONFIG, "w": b"1"})
    files = a.pack(tmp_path / "m", tmp_path / "out")
    left = tmp_path / "far" / f"m{REPLACED}"
    for path in ("sub/w", MARK_PATH):
        (left / path).parent.mkdir(parents=True, exist_ok=True)
        (left / path).write_bytes(b"")
    a.unpack(files, tmp_path / "far")
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["m"]
    assert not (tmp_path / "far/m" / MARK_PATH).exists()


# -- what other users own or may write

STRANGER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER)


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


@needs_root
@pytest.mark.parametrize("opened", [give_away, open_to_all])
def test_a_model_that_others_can_change_is_made_anew(
    opened: Callable[[Path], None], hfship: Program, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "m", {**CONFIG, "w": WEIGHT})
    a.pack(tmp_path / "m", tmp_path / "out")
    again = ("unpack", tmp_path / "out", "-o", tmp_path / "far")
    hfship(*again)
    weight = tmp_path / "far/m/w"
    opened(weight)
    with weight.open("r+b") as held:
        hfship(*again)
        held.write(b"changed after it was proven")
    status = weight.stat()
    assert (status.st_uid, status.st_mode & 0o022) == (os.geteuid(), 0)
    assert weight.read_bytes() == WEIGHT


@needs_root
def test_a_work_folder_of_another_user_is_not_taken_over(hfship: Program, tmp_path: Path) -> None:
    a.make_model(tmp_path / "m", CONFIG)
    a.pack(tmp_path / "m", tmp_path / "out")
    work = work_folder_of(tmp_path / "far/m")
    (work / ".hfship").mkdir(parents=True)
    (work / MARK_PATH).touch()
    give_away(work)
    said = hfship("unpack", tmp_path / "out", "-o", tmp_path / "far", code=6).stderr
    assert "is in the way" in said and not (tmp_path / "far/m").exists()


@needs_root
@pytest.mark.parametrize("opened", [give_away, open_to_all])
def test_files_of_others_are_copied_not_linked(
    opened: Callable[[Path], None], tmp_path: Path
) -> None:
    files = {**CONFIG, "w": WEIGHT}
    a.make_model(tmp_path / "m", files)
    archive = open_archive(a.pack(tmp_path / "m", tmp_path / "out"))
    opened(tmp_path / "m/w")
    options = unpack.UnpackOptions(base=tmp_path / "m", jobs=2)
    unpack.unpack_archive(archive, tmp_path / "far", options, a.QUIET)
    assert (tmp_path / "far/m/w").stat().st_ino != (tmp_path / "m/w").stat().st_ino
    assert os.path.samefile(tmp_path / "far/m/config.json", tmp_path / "m/config.json")
    assert (tmp_path / "far/m/w").stat().st_uid == os.geteuid()


@needs_root
@pytest.mark.parametrize("opened", [give_away, open_to_all])
def test_fetch_copies_what_others_can_change(
    opened: Callable[[Path], None], hfship: Program, hub: FaultHub, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "hub/org/m", {**CONFIG, "w.safetensors": WEIGHT})
    fetch = ("fetch", "org/m", "--all-files", "--endpoint", hub.url, "-o", tmp_path / "near")
    hfship(*fetch)
    weight = tmp_path / "near/m/w.safetensors"
    opened(weight)
    with weight.open("r+b") as held:
        hfship(*fetch)
        held.write(b"changed after it was proven")
    assert weight.read_bytes() == WEIGHT and weight.stat().st_uid == os.geteuid()


@needs_root
def test_fetch_into_a_folder_of_another_user_is_refused(
    hfship: Program, hub: FaultHub, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "hub/org/m", CONFIG)
    (tmp_path / "near/m").mkdir(parents=True)
    give_away(tmp_path / "near/m")
    fetch = ("fetch", "org/m", "--endpoint", hub.url, "-o", tmp_path / "near")
    said = hfship(*fetch, code=7).stderr
    assert "belongs to" in said and "chown -R" in said
    assert list((tmp_path / "near/m").iterdir()) == []


def test_no_link_below_a_model_folder_is_followed_by_fetch(
    hfship: Program, hub: FaultHub, tmp_path: Path
) -> None:
    files = {**CONFIG, "sub/w.safetensors": WEIGHT}
    a.make_model(tmp_path / "hub/org/m", files)
    outside = tmp_path / "outside"
    outside.mkdir()
    near = tmp_path / "near/m"
    near.mkdir(parents=True)
    fetch = ("fetch", "org/m", "--all-files", "--endpoint", hub.url, "-o", tmp_path / "near")
    for place in (".hfship", ".hfship/partial", "sub"):
        (near / place).parent.mkdir(exist_ok=True)
        (near / place).symlink_to(outside)
        said = hfship(*fetch, code=7).stderr
        assert "symbolic link" in said, said
        (near / place).unlink()
    assert list(outside.iterdir()) == []
    hfship(*fetch)
    assert (near / "sub/w.safetensors").read_bytes() == WEIGHT


@pytest.mark.parametrize("done", ["removed", "cut", "replaced by a link"])
def test_every_file_is_looked_at_before_a_model_gets_its_name(
    done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.make_model(tmp_path / "m", {**CONFIG, "w": WEIGHT})
    archive = open_archive(a.pack(tmp_path / "m", tmp_path / "out"))
    config = work_folder_of(tmp_path / "far/m") / "config.json"
    restore = unpack._restore

    def restored_and_changed(*arguments: Any) -> None:
        restore(*arguments)
        config.unlink()
        if done == "cut":
            config.write_bytes(b"{}")
        if done == "replaced by a link":
            config.symlink_to(tmp_path / "m/config.json")

    monkeypatch.setattr(unpack, "_restore", restored_and_changed)
    with pytest.raises(IntegrityError, match="was changed while it was unpacked"):
        unpack.unpack_archive(archive, tmp_path / "far", unpack.UnpackOptions(jobs=1), a.QUIET)
    assert not (tmp_path / "far/m").exists()
