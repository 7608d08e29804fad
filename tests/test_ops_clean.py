# SPDX-License-Identifier: Apache-2.0
"""Which files are leftovers, of which group, and why a group stays, each rule by itself; test_clean.py
has the command and live runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import pytest

from hfship.base.content import MARK_PATH
from hfship.base.errors import DiskError, HostError, NotFoundError, UsageError
from hfship.base.locks import FolderLock, InUseError, host_name
from hfship.base.manifest import FileEntry, make_manifest, write_manifest
from hfship.ops import clean
from hfship.ops.clean import CleanOptions, Leftover

SHA1 = "a" * 40
SHA256 = "c" * 64


def make(root: Path, *names: str) -> None:
    """Files below a folder; NAME/ is a folder, NAME>TARGET a link."""
    for name in names:
        path, _, target = name.partition(">")
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if target:
            place.symlink_to(target)
        elif path.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.write_text(path)


def manifest_in(folder: Path, *listed: str) -> None:
    """A manifest that lists files, which are made, too."""
    make(folder, *listed)
    entries = [FileEntry(name, len(name), "0" * 64) for name in listed]
    write_manifest(folder, make_manifest("m", entries, None))


def found_in(root: Path, found: List[Leftover]) -> Set[Tuple[str, str, str]]:
    """Each leftover as (path, what it is, its group), below the folder."""
    rows = [
        (one.path.relative_to(root).as_posix(), one.what, one.group.relative_to(root).as_posix())
        for one in found
    ]
    assert len(set(rows)) == len(rows), "none is named twice"
    assert all(one.status.st_ino == one.path.lstat().st_ino for one in found)
    return set(rows)


# -- folders of models and archives

HF = ".cache/huggingface/download"
# name -> what it is, and its group
SINGLE: Dict[str, Tuple[str, str]] = {
    f"m/{HF}/w.bin.incomplete": ("unfinished download of hf", "m"),
    f"m/{HF}/sub/w.bin.incomplete": ("unfinished download of hf", "m"),
    f"m/{HF}/w.bin.lock": ("lock of hf", "m"),
    f"m/{HF}/w.bin.metadata": ("", ""),
    "m/.cache/huggingface/w.incomplete": ("", ""),
    f"m/.hfship/partial/{SHA1}.part": ("unfinished download", "m"),
    f"m/.hfship/partial/{SHA1}.json": ("unfinished download", "m"),
    f"m/.hfship/partial/{SHA1}.now": ("unfinished download", "m"),
    f"m/.hfship/partial/{SHA1}.part.aria2": ("unfinished download", "m"),
    f"m/.hfship/partial/{SHA1}.txt": ("", ""),
    "m/.hfship/partial/x.part": ("", ""),
    "m/.manifest.json.77.tmp": ("unfinished file", "m"),
    "m/.hfship/.lease.77.tmp": ("unfinished file", "m"),
    "m/.x.metadata.7.tmp": ("unfinished file", "m"),
    "m/.x.txt.7.tmp": ("", ""),
    "m/config.json.7.tmp": ("", ""),
    "t.tar.zst.incomplete": ("unfinished archive", "t.tar.zst"),
    "t.tar.zst.0001.incomplete": ("unfinished archive", "t.tar.zst"),
    "t.tar.zst.sha256.incomplete": ("unfinished archive", "t.tar.zst"),
    "t.tar.zst.sig.incomplete": ("unfinished archive", "t.tar.zst"),
    ".t.tar.zst.sha256.9.tmp": ("unfinished file", "t.tar.zst"),
    "a/t.tar.zst.incomplete": ("unfinished archive", "a/t.tar.zst"),
    "a/hfship.pyz.incomplete": ("unfinished archive", "a"),
    "a/READ-ME-FIRST.txt.incomplete": ("unfinished archive", "a"),
    "t.tar.zst.001.incomplete": ("", ""),
    "t.tar.incomplete": ("", ""),
    "t.tar.zst.0001": ("", ""),
    "m/w.safetensors.incomplete": ("", ""),
}


@pytest.mark.parametrize("name", SINGLE)
def test_what_a_file_is_by_its_name_and_place(name: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    if name.startswith("m/"):
        make(tmp_path, "m/.hfship/lock", "m/config.json")
    what, group = SINGLE[name]
    expected = {(name, what, group)} if what else set()
    assert found_in(tmp_path, clean.folder_leftovers(tmp_path)) == expected


def test_parts_in_a_model_are_of_the_model(tmp_path: Path) -> None:
    make(tmp_path, "m/.hfship/lock", "m/t.tar.zst.incomplete", "m/x")
    expected = {("m/t.tar.zst.incomplete", "unfinished archive", "m")}
    assert found_in(tmp_path, clean.folder_leftovers(tmp_path)) == expected


def test_what_a_manifest_lists_is_no_leftover(tmp_path: Path) -> None:
    manifest_in(tmp_path / "m", f"{HF}/w.lock", "x.tar.zst.incomplete")
    make(tmp_path / "m", f"{HF}/v.lock")
    expected = {(f"m/{HF}/v.lock", "lock of hf", "m")}
    assert found_in(tmp_path, clean.folder_leftovers(tmp_path)) == expected
    (tmp_path / "m/.hfship/manifest.json").write_text("{")  # now nobody says so
    assert len(clean.folder_leftovers(tmp_path)) == 3


WORK = "m~incomplete"


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([f"{WORK}/{MARK_PATH}", f"{WORK}/a/x"], "unfinished unpack"),
        ([f"{WORK}/a/x"], ""),  # it has no mark of ours
        (["m~more/.hfship/work-folder", "m~more/x"], ""),  # nor this one its name
        ([f"m~replaced/{MARK_PATH}", "m~replaced/x", "m/x"], "replaced model"),
        ([f"m~replaced/{MARK_PATH}", "m~replaced/x"], ""),  # the only one there is
        ([f"m~replaced/{MARK_PATH}", "m~replaced/x", "m"], ""),
        (["m~replaced/x", "m/x"], ""),
    ],
)
def test_a_folder_may_go_as_a_whole(names: List[str], what: str, tmp_path: Path) -> None:
    make(tmp_path, *names)
    top = names[0].partition("/")[0]
    expected = {(name, what, top) for name in names if name.startswith(top) and what}
    assert found_in(tmp_path, clean.folder_leftovers(tmp_path)) == expected


def test_a_folder_that_was_unpacked_to_its_end_stays(tmp_path: Path) -> None:
    manifest_in(tmp_path / WORK, "x")
    make(tmp_path / WORK, MARK_PATH)
    assert not clean.folder_leftovers(tmp_path)


@pytest.mark.parametrize(
    ("names", "going"),
    [
        (["m/.hfship/lock", "m/.hfship/notes"], "m/.hfship/lock m/.hfship/notes"),
        (["m/.hfship/lock", "m/.cache/huggingface/x"], "m/.hfship/lock m/.cache/huggingface/x"),
        (["m/.hfship/lock", "m/config.json"], ""),
        (["m/.hfship/lock", "m/.cache/x"], ""),
        (["m/.hfship/lock", f"m/.hfship/partial/{SHA1}.part"], "m/.hfship/lock"),
        (["o/m/.hfship/lock", "o/.hfship/lock", "x/y"], "o/m/.hfship/lock o/.hfship/lock"),
        (["o/m/.hfship/lock", "o/m/x", "o/.hfship/lock"], ""),
    ],
)
def test_bookkeeping_of_a_model_without_any_file_goes(
    names: List[str], going: str, tmp_path: Path
) -> None:
    make(tmp_path, *names)
    found = found_in(tmp_path, clean.folder_leftovers(tmp_path))
    empty = {(name, group) for name, what, group in found if what == "empty model folder"}
    assert {name for name, _ in empty} == set(going.split())
    assert all(name.startswith(f"{group}/.") for name, group in empty)


def test_a_model_with_a_manifest_is_not_empty(tmp_path: Path) -> None:
    manifest_in(tmp_path / "m", "x")
    (tmp_path / "m/x").unlink()
    make(tmp_path, "m/.hfship/lock")
    assert not clean.folder_leftovers(tmp_path)


def test_leases_and_what_lies_behind_links_are_not_seen(tmp_path: Path) -> None:
    make(
        tmp_path,
        "m/.hfship/lease",
        "m/.hfship/lock",
        "m/config.json",
        "elsewhere/t.tar.zst.incomplete",
        "site/x>../elsewhere",
        "site/lease",
        "site/t.tar.zst.incomplete>nowhere",
    )
    files = clean._files_seen(tmp_path, lambda _: None)
    assert tmp_path / "m/.hfship/lease" not in files and tmp_path / "site/lease" in files
    assert tmp_path / "site/x" in files, "the link itself"
    found = found_in(tmp_path / "site", clean.folder_leftovers(tmp_path / "site"))
    assert found == {("t.tar.zst.incomplete", "unfinished archive", "t.tar.zst")}
    assert clean.files_below(tmp_path / "site/x") == {}
    assert clean.files_below(tmp_path / "none") == {}


def closing(monkeypatch: pytest.MonkeyPatch, *closed: Path, error: int = 13) -> None:
    """Folders that may not be looked into, also by root."""
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) in closed:
            raise OSError(error, os.strerror(error), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_model_of_which_not_all_may_be_seen_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("a", "b"):
        make(tmp_path, f"{model}/.hfship/partial/{SHA1}.part", f"{model}/s/x", f"{model}/t/x")
    closing(monkeypatch, tmp_path / "a/s", tmp_path / "a/t")
    said: List[str] = []
    found = found_in(tmp_path, clean.folder_leftovers(tmp_path, said.append))
    assert {group for _, _, group in found} == {"b"}
    assert said == [f"{tmp_path}/a is left alone: {tmp_path}/a/s may not be looked into"]
    del said[:]
    assert clean.folder_leftovers(tmp_path / "a", said.append) == []
    assert said == [f"{tmp_path}/a is left alone: {tmp_path}/a/s may not be looked into"]
    with pytest.raises(DiskError, match=f"cannot look into {tmp_path}/a/[st]") as caught:
        clean.files_below(tmp_path)
    assert caught.value.next_step == clean.AS_OWNER


@pytest.mark.parametrize(("place", "error"), [("", 13), ("s", 5)])
def test_a_folder_that_cannot_be_looked_into_at_all_is_an_error(
    place: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "s/x")
    closing(monkeypatch, tmp_path / place, error=error)
    with pytest.raises(DiskError):
        clean.files_below(tmp_path, set())


# -- caches


REPO = "models--o--m"


def cache_of(root: Path) -> None:
    """A repository with a revision that main leads to and an old one."""
    make(root, f"{REPO}/blobs/new", f"{REPO}/blobs/old", f"{REPO}/refs/main")
    make(root, f"{REPO}/snapshots/{SHA1}/x>../../blobs/new")
    make(root, f"{REPO}/snapshots/{'b' * 40}/x>../../blobs/old")
    (root / REPO / "refs/main").write_text(f"{SHA1}\n")


OLD_LINK = f"{REPO}/snapshots/{'b' * 40}/x"


@pytest.mark.parametrize(
    ("more", "old_revisions", "found"),
    [
        ([], False, []),
        ([], True, [(OLD_LINK, "old revision"), (f"{REPO}/blobs/old", "unused content")]),
        (["datasets--d/blobs/x"], False, [("datasets--d/blobs/x", "unused content")]),
        (["spaces--d/blobs/x"], False, [("spaces--d/blobs/x", "unused content")]),
        (["models--/blobs/x", "other/blobs/x"], False, []),
        (
            [f"{REPO}/blobs/x.incomplete", f"{REPO}/blobs/x"],
            False,
            [
                (f"{REPO}/blobs/x.incomplete", "unfinished download of hf"),
                (f"{REPO}/blobs/x", "unused content"),
            ],
        ),
        (
            [f"{REPO}/snapshots/{SHA1}/y>../../blobs/none"],
            False,
            [(f"{REPO}/snapshots/{SHA1}/y", "link to nothing")],
        ),
        ([f"{REPO}/snapshots/{SHA1}/own.txt"], False, []),
    ],
)
def test_what_is_unused_in_a_cache(
    more: List[str], old_revisions: bool, found: List[Tuple[str, str]], tmp_path: Path
) -> None:
    cache_of(tmp_path)
    make(tmp_path, *more)
    leftovers = clean.cache_leftovers(tmp_path, old_revisions)
    expected = {(name, what, name.partition("/")[0]) for name, what in found}
    assert found_in(tmp_path, leftovers) == expected


def test_locks_of_a_cache_are_of_their_repository(tmp_path: Path) -> None:
    cache_of(tmp_path)
    make(tmp_path, f".locks/{REPO}/sub/x.lock", ".locks/models--gone/y.lock")
    assert found_in(tmp_path, clean.cache_leftovers(tmp_path, False)) == {
        (f".locks/{REPO}/sub/x.lock", "lock of hf", REPO),
        (".locks/models--gone/y.lock", "lock of hf", "models--gone"),
    }


@pytest.mark.parametrize("part", ["", "refs", "snapshots", "blobs"])
def test_a_repository_with_a_link_for_a_folder_is_left_alone(part: str, tmp_path: Path) -> None:
    cache_of(tmp_path / "cache")
    place = tmp_path / "cache" / REPO / part
    make(tmp_path / "cache", f"{REPO}/blobs/unused")
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert clean.cache_leftovers(tmp_path / "cache", True) == []


def test_where_a_ref_cannot_be_read_no_revision_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_of(tmp_path)

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "no")

    assert len(clean.cache_leftovers(tmp_path, True)) == 2
    monkeypatch.setattr("hfship.ops.clean.read_small", refuse)
    assert clean.cache_leftovers(tmp_path, True) == []


OTHER = "d" * 64
SHARED = [f"blobs/{SHA256}", f"blobs/{SHA256}.refs", "blobs/.huggingface-shared-blobs"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (SHARED, [SHA256, f"{SHA256}.refs"]),
        ([*SHARED, f"blobs/{SHA256}.lock"], [SHA256, f"{SHA256}.refs", f"{SHA256}.lock"]),
        ([*SHARED, f"{REPO}/blobs/x>../../blobs/{SHA256}"], []),
        (SHARED[:2], []),  # not a store of shared contents
        ([SHARED[0], SHARED[2]], []),  # nobody knows who uses it
        (SHARED[1:], []),
        ([f"blobs/{OTHER}.lock", *SHARED[2:]], []),
        ([*SHARED, "blobs/notes", f"blobs/{OTHER}.old"], [SHA256, f"{SHA256}.refs"]),
    ],
)
def test_contents_that_no_repository_shares_any_more(
    names: List[str], found: List[str], tmp_path: Path
) -> None:
    cache_of(tmp_path)
    make(tmp_path, *names)
    leftovers = clean.cache_leftovers(tmp_path, False)
    rows = {row for row in found_in(tmp_path, leftovers) if row[0].startswith("blobs/")}
    assert rows == {(f"blobs/{name}", "unused content", f"blobs/{SHA256}") for name in found}


# -- who works there


def leftover(path: Path, group: Path, age_s: float = 3600) -> Leftover:
    then = time.time() - age_s
    os.utime(path, (then, then))
    return Leftover(path, "unfinished", group, path.lstat())


def why(group: Path, items: List[Leftover], opened: Any = None) -> str:
    with contextlib.ExitStack() as stack:
        return clean.why_kept(group, items, opened or {}, stack)


def test_what_a_process_has_open_stays(tmp_path: Path) -> None:
    make(tmp_path, "m/x.part", "t.tar.zst.0001.incomplete")
    one = leftover(tmp_path / "m/x.part", tmp_path / "m")
    inode = one.status.st_ino
    assert why(one.group, [one]) == ""
    assert why(one.group, [one], {"x.part": {inode: 77}}) == "process 77 has x.part open"
    assert why(one.group, [one], {"x.part": {inode + 1: 77}, "m.incomplete": {1: 7}}) == ""
    archive = tmp_path / "t.tar.zst"
    part = leftover(tmp_path / "t.tar.zst.0001.incomplete", archive)
    said = "process 5 has t.tar.zst.incomplete open"
    assert why(archive, [part], {"t.tar.zst.incomplete": {1: 9, 2: 5}}) == said


@pytest.mark.parametrize(
    ("age_s", "kept"),
    [(61, ""), (59, "59 s ago, which is too new"), (0, " 0 s ago,"), (-500, " 0 s ago,")],
)
def test_what_changed_a_moment_ago_stays(
    age_s: float, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "x.part")
    now = time.time()
    monkeypatch.setattr("hfship.ops.clean.time.time", lambda: now)
    one = leftover(tmp_path / "x.part", tmp_path, age_s)
    said = why(tmp_path, [one])
    assert kept in said and bool(said) == bool(kept)
    assert not said or said.endswith("try again in a minute")


def test_what_is_locked_stays(tmp_path: Path) -> None:
    make(tmp_path, "x.part")
    one = leftover(tmp_path / "x.part", tmp_path)
    with open(one.path) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert why(tmp_path, [one]) == "a process holds x.part"
    assert why(tmp_path, [one]) == ""


@pytest.mark.parametrize(
    ("name", "text", "locked"),
    [
        ("x.lock", "{pid}", True),
        ("x.lock", "{pid}\n{host}\n", True),
        ("x.lock", "999999999", False),
        ("x.lock", "999999999\n{host}", False),
        ("x.lock", "999999999\nelsewhere", True),  # nobody can look into another machine
        ("x.lock", "no number\nelsewhere", False),
        ("x.lock", "", False),
        ("x.part", "{pid}", False),
    ],
)
def test_a_file_that_names_its_process_is_a_lock(
    name: str, text: str, locked: bool, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text.format(pid=os.getpid(), host=host_name()))
    assert clean.is_locked(path) is locked


def test_what_cannot_be_opened_is_not_locked(tmp_path: Path) -> None:
    make(tmp_path, "x.lock>/proc/self/stat")
    assert clean.is_locked(tmp_path / "x.lock") is False
    assert clean.is_locked(tmp_path / "none") is False


def test_a_model_is_locked_while_it_is_cleaned_and_the_lock_is_taken_along(tmp_path: Path) -> None:
    make(tmp_path, "m/.hfship/notes", "link/x")
    (tmp_path / "link/.hfship").symlink_to(tmp_path / "m/.hfship")
    one = leftover(tmp_path / "m/.hfship/notes", tmp_path / "m", 0)
    lock = tmp_path / "m/.hfship/lock"
    with contextlib.ExitStack() as stack:
        assert clean.why_kept(tmp_path / "link", [], {}, stack) == "" and not lock.exists()
        assert clean.why_kept(tmp_path / "m", [one], {}, stack) == "", "the lock knows better"
        with pytest.raises(InUseError), FolderLock(tmp_path / "m"):
            pass
    assert not lock.exists()
    with FolderLock(tmp_path / "m"):
        assert "in use" in why(tmp_path / "m", [one])
    assert lock.exists()
    assert why(tmp_path / "m", [one]) == "" and lock.exists(), "it was there before"


def test_open_files_of_others_are_found_by_name_and_inode(tmp_path: Path) -> None:
    """Open or mapped, by whoever it is; not our own."""
    make(tmp_path, "open.part", "mapped.part", "none.part")
    text = (
        "import mmap, sys\n"
        "f = open('open.part'); g = open('mapped.part', 'r+b')\n"
        "m = mmap.mmap(g.fileno(), 0); g.close()\n"
        "print('there', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", text]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=tmp_path, stdin=pipe, stdout=pipe) as process:
        assert process.stdout and process.stdout.readline()
        with open(tmp_path / "none.part"):
            names = {"open.part", "mapped.part", "none.part"}
            found = clean.open_files(names)
        process.communicate(b"")
    inodes = {name: (tmp_path / name).stat().st_ino for name in names}
    assert {name: held[inodes[name]] for name, held in found.items() if inodes[name] in held} == {
        "open.part": process.pid,
        "mapped.part": process.pid,
    }


# -- removing


def test_a_file_goes_only_if_it_is_the_one_that_was_seen(tmp_path: Path) -> None:
    make(tmp_path, "a/b/x", "a/b/y", "elsewhere/z", "link>elsewhere")
    one = leftover(tmp_path / "a/b/x", tmp_path)
    assert clean.remove_leftover(tmp_path, one) is True and not one.path.exists()
    assert clean.remove_leftover(tmp_path, one) is False
    other = leftover(tmp_path / "a/b/y", tmp_path)
    other.path.write_text("other")
    assert clean.remove_leftover(tmp_path, other) is False and other.path.exists()
    behind = Leftover(tmp_path / "link/z", "", tmp_path, (tmp_path / "elsewhere/z").lstat())
    with pytest.raises(DiskError, match="cannot remove"):
        clean.remove_leftover(tmp_path, behind)
    assert (tmp_path / "elsewhere/z").exists()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with contextlib.suppress(DiskError):
            clean.remove_leftover(tmp_path, behind)
        clean.remove_leftover(tmp_path, other)
    assert len(os.listdir("/proc/self/fd")) == before


def test_folders_that_became_empty_go_but_not_the_one_that_is_cleaned(tmp_path: Path) -> None:
    make(tmp_path, "root/m/a/b/", "root/n/c/", "root/n/stays", "root/h/d/")
    for group in ("root/g", "root/k"):
        (tmp_path / group / ".hfship").mkdir(parents=True)
        (tmp_path / group / ".hfship/lock").touch()
    root = tmp_path / "root"

    def gone(name: str, group: str) -> Any:
        return Leftover(root / name, "", root / group, root.lstat()), root

    clean.remove_empty_folders(
        [gone("m/a/b/x", "m"), gone("n/c/x", "n"), gone("x", "g"), gone("y", ".")]
    )
    left = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    assert left == ["h", "h/d", "k", "k/.hfship", "k/.hfship/lock", "n", "n/stays"]


def test_what_the_disk_gets_back(tmp_path: Path) -> None:
    make(tmp_path, "one", "two", "three")
    for name in ("one", "two", "three"):
        (tmp_path / name).write_bytes(bytes(5000))
    os.link(tmp_path / "two", tmp_path / "two.again")
    os.link(tmp_path / "three", tmp_path / "three.stays")
    names = ("one", "two", "two.again", "three")
    items = [leftover(tmp_path / name, tmp_path) for name in names]
    size = items[0].status.st_blocks * 512
    assert size > 0 and clean.disk_usage(items) == 4 * size
    assert clean.freed_by(items) == 2 * size


# -- a folder as a whole


def found(folder: Path, *own: Path, cache: bool = False, old: bool = False) -> Any:
    return {one.what for one in clean.find_leftovers(folder, cache, old, own)}


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (["config.json"], True),
        (["m/config.json"], True),
        (["x.safetensors"], True),
        (["m/x.safetensors"], True),
        (["m/.hfship/x"], True),
        (["o/m/.hfship/x"], True),
        ([".hfship/x"], True),
        ([".cache/huggingface/x"], True),
        (["m/.cache/huggingface/x"], True),
        (["t.tar.zst.0001"], True),
        (["chunk_cache/x"], True),
        (["host/chunk-cache/x"], True),
        (["o/m/config.json"], False),
        (["letters/x.txt"], False),
        ([], False),
    ],
)
def test_which_folders_are_ours_to_clean(names: List[str], ours: bool, tmp_path: Path) -> None:
    make(tmp_path, *names)
    if ours:
        assert found(tmp_path) <= {"unfinished", "empty model folder"}
    else:
        with pytest.raises(UsageError, match="looks like neither models nor archives nor a cache"):
            found(tmp_path)
    found(tmp_path, tmp_path)  # one that the settings name


def test_chunks_go_from_a_cache_alone(tmp_path: Path) -> None:
    make(tmp_path, "chunk_cache/a/x", "host/chunk-cache/y", "other/z")
    assert found(tmp_path) == set()
    rows = found_in(tmp_path, clean.find_leftovers(tmp_path, True, False, []))
    assert rows == {
        ("chunk_cache/a/x", "cached chunks", "chunk_cache"),
        ("host/chunk-cache/y", "cached chunks", "host/chunk-cache"),
    }


def test_a_cache_is_cleaned_as_one_if_that_is_asked(tmp_path: Path) -> None:
    cache_of(tmp_path)
    with pytest.raises(UsageError, match="is a cache of huggingface_hub") as caught:
        found(tmp_path)
    assert caught.value.next_step == f"hfship clean --cache {tmp_path}"
    assert found(tmp_path, cache=True) == set()
    assert found(tmp_path, cache=True, old=True) == {"old revision", "unused content"}


def test_no_whole_home_and_no_whole_disk_is_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "home/me/models/config.json")
    home = tmp_path / "home/me"
    monkeypatch.setenv("HOME", str(home))
    for folder in (home, home.parent):
        with pytest.raises(UsageError, match="is not cleaned as a whole"):
            found(folder, folder)
    assert found(home / "models") == set()
    monkeypatch.setattr("hfship.ops.clean.os.path.ismount", lambda _: True)
    with pytest.raises(UsageError, match="is a mount point"):
        found(home / "models")
    assert found(home / "models", home / "models") == set()


def options(*folders: Path, **fields: Any) -> CleanOptions:
    values: Dict[str, Any] = {
        "own": folders,
        "cache": False,
        "old_revisions": False,
        "older_than_s": 0.0,
    }
    return CleanOptions(folders, **{**values, **fields})


def test_groups_of_all_folders_with_why_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/t.tar.zst.incomplete", f"a/m/.hfship/partial/{SHA1}.part", "a/m/x")
    make(tmp_path, "b/t.tar.zst.incomplete", "b/t.tar.zst.0001.incomplete")
    for path in tmp_path.rglob("*.*"):
        os.utime(path, (1, 1))
    asked: List[Any] = []

    def open_files(names: Any) -> Any:
        asked.append(set(names))
        return {"t.tar.zst.0001.incomplete": {inode: 9}}

    inode = (tmp_path / "b/t.tar.zst.0001.incomplete").stat().st_ino
    monkeypatch.setattr("hfship.ops.clean.open_files", open_files)
    groups = list(clean.find_groups(options(tmp_path / "b", tmp_path / "a")))
    rows = [
        (one.group.relative_to(one.root).as_posix(), one.root.name, len(one.items), one.kept)
        for one in groups
    ]
    assert rows == [
        ("m", "a", 1, ""),
        ("t.tar.zst", "a", 1, ""),
        ("t.tar.zst", "b", 2, "process 9 has t.tar.zst.0001.incomplete open"),
    ]
    assert asked == [
        {
            "t.tar.zst.incomplete",
            "t.tar.zst.0001.incomplete",
            "m.incomplete",
            f"{SHA1}.part",
        }
    ]


def test_a_group_is_locked_until_the_next_one(tmp_path: Path) -> None:
    make(tmp_path, f"a/.hfship/partial/{SHA1}.part", f"b/.hfship/partial/{SHA1}.part")
    for path in tmp_path.rglob("*.part"):
        os.utime(path, (1, 1))
    groups = clean.find_groups(options(tmp_path))
    for name in ("a", "b"):
        assert next(groups).group == tmp_path / name
        held = sorted(path.parent.parent.name for path in tmp_path.glob("*/.hfship/lock"))
        assert held == [name]
    assert next(groups, None) is None and not list(tmp_path.glob("*/.hfship/lock"))


@pytest.mark.parametrize(("older_than_s", "count"), [(0, 1), (1000, 1), (1001, 0)])
def test_only_what_is_old_enough_is_named(
    older_than_s: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "t.tar.zst.incomplete")
    os.utime(tmp_path / "t.tar.zst.incomplete", (4000, 4000))
    monkeypatch.setattr("hfship.ops.clean.time.time", lambda: 5000.0)
    groups = list(clean.find_groups(options(tmp_path, older_than_s=older_than_s)))
    assert len(groups) == count


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no folder"):
        list(clean.find_groups(options(tmp_path / "none")))


def test_a_lock_that_cannot_be_taken_keeps_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> Any:
        raise HostError("no locks here", "", "")

    make(tmp_path, "m/.hfship/x")
    monkeypatch.setattr("hfship.ops.clean.FolderLock", refuse)
    assert why(tmp_path / "m", []) == "no locks here"
