# SPDX-License-Identifier: Apache-2.0
"""The folder that is unpacked into: what counts as ours in it, and how files get their names."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Tuple

import pytest

from hfship.archive.tree import JOURNAL_PATH, FolderSink, Journal, Tree
from hfship.base.content import PARTIAL_DIR, work_path
from hfship.base.errors import DiskError, IntegrityError
from hfship.base.manifest import FileEntry

CONTENT = b"weights"
ENTRY = FileEntry("sub/w", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def make(root: Path, kind: str) -> None:
    """What lies at sub/w."""
    path = root / "sub" / "w"
    if kind == "nothing":
        return
    if kind == "a folder":
        path.mkdir(parents=True)
        return
    path.parent.mkdir(parents=True)
    if kind == "a link":
        path.symlink_to(root / "elsewhere")
        (root / "elsewhere").write_bytes(CONTENT)
    elif kind == "a fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(CONTENT[:-1] if kind == "shorter" else CONTENT)
    if kind == "foreign":
        if os.geteuid() != 0:
            pytest.skip("root, to give a file away")
        os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("a file", True),
        ("shorter", False),
        ("foreign", False),
        ("a link", False),
        ("a fifo", False),
        ("a folder", False),
        ("nothing", False),
    ],
)
def test_a_file_counts_that_has_its_size_and_is_ours(kind: str, ours: bool, tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    make(root, kind)
    read: List[int] = []
    with Tree(root) as tree:
        assert tree.holds(ENTRY) is ours
        assert (tree.status("sub/w") is None) == (kind == "nothing")
        assert tree.sha256(ENTRY, read.append) == (ENTRY.sha256 if ours else None)
    assert sum(read) == (len(CONTENT) if ours else 0)


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with Tree(tmp_path / "m") as tree:
        fd = tree.create("sub/w", len(CONTENT))
        assert not (tmp_path / "m/sub/w").exists()
        os.write(fd, CONTENT)
        os.close(fd)
        tree.publish("sub/w")
        assert (tmp_path / "m/sub/w").read_bytes() == CONTENT
        os.close(tree.create("x", 1))
        os.close(tree.create("x", 1))  # what a kill left is replaced
        assert (tmp_path / "m" / work_path("x")).exists()
        tree.discard("x")
        assert not (tmp_path / "m" / work_path("x")).exists()
        tree.discard("x")
        os.close(tree.create("y", 1))
        tree.remove_work_files()
        assert not (tmp_path / "m" / PARTIAL_DIR).exists()


@pytest.mark.parametrize("foreign", [False, True])
def test_a_file_from_elsewhere_is_linked_unless_others_can_change_it(
    foreign: bool, tmp_path: Path
) -> None:
    source = tmp_path / "w"
    source.write_bytes(CONTENT)
    if foreign:
        if os.geteuid() != 0:
            pytest.skip("root, to give a file away")
        os.chown(source, 65534, 65534)
    with Tree(tmp_path / "m") as tree:
        tree.link_or_copy(source, ENTRY)
    made = tmp_path / "m/sub/w"
    assert made.read_bytes() == CONTENT and made.samefile(source) is not foreign


@pytest.mark.parametrize("where", ["m", "m/sub"])
def test_no_link_is_followed(where: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    if where == "m":
        (tmp_path / "m").rmdir()
    (tmp_path / where).symlink_to(tmp_path)
    with pytest.raises(IntegrityError) as caught, Tree(tmp_path / "m") as tree:
        tree.status("sub/w")
    assert str(tmp_path / where) in caught.value.next_step


def test_a_copy_is_whole_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    source.chmod(0o666)
    synced: List[Tuple[bool, int]] = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        status = os.fstat(fd)
        if status.st_size == len(CONTENT) or not status.st_size:
            synced.append(((tmp_path / "m/sub/w").exists(), status.st_size))
        sync(fd)

    monkeypatch.setattr("hfship.archive.tree.os.fsync", fsync)
    with Tree(tmp_path / "m") as tree:
        monkeypatch.setattr(tree, "_link", lambda *_: False)
        tree.link_or_copy(source, ENTRY)
    assert (tmp_path / "m/sub/w").read_bytes() == CONTENT
    whole = [there for there, size in synced if size == len(CONTENT)]
    assert whole[0] is False and whole[-1] is True, synced


def test_a_file_that_cannot_be_linked_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies on another disk, or has as many names as it may have."""
    source = tmp_path / "source"
    source.write_bytes(CONTENT)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr("hfship.archive.tree.os.link", refuse)
    with Tree(tmp_path / "m") as tree:
        tree.link_or_copy(source, ENTRY)
    made = tmp_path / "m/sub/w"
    assert made.read_bytes() == CONTENT and not made.samefile(source)
    assert not (tmp_path / "m" / work_path("sub/w")).exists()


# -- the journal


def other(path: str, size: int, sha256: str = "1" * 64) -> FileEntry:
    return FileEntry(path, size, sha256)


def test_a_journal_tells_how_far_files_were_written(tmp_path: Path) -> None:
    a, b, lost = other("a", 100), other("sub/b", 50), other("lost", 9)
    with Tree(tmp_path / "m") as tree:
        journal = Journal(tree)
        assert journal.read([a]) == {}
        os.close(tree.create("a", 100))
        os.close(tree.create("sub/b", 50))
        for entry, size in ((a, 10), (b, 50), (a, 40), (lost, 3)):
            journal.note(entry, size)
        assert journal.read([a, b, lost]) == {"a": 40, "sub/b": 50}, "of a lost one nothing is left"
        assert journal.read([other("a", 100, "2" * 64)]) == {}, "another version of it"
        journal.close(remove=False)
        assert (tmp_path / "m" / JOURNAL_PATH).read_text().splitlines()[0] == (
            f'["a", "{"1" * 64}", 10]'
        )
        again = Journal(tree)
        assert again.read([a]) == {"a": 40}
        again.close(remove=True)
        assert not (tmp_path / "m" / JOURNAL_PATH).exists()
        gone = Journal(tree)
        os.unlink(tmp_path / "m" / JOURNAL_PATH)
        gone.close(remove=True)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ('["a", "{sha256}", 7]', 7),
        ('["a", "{sha256}", 100]', 100),
        ('["a", "{sha256}", 101]', 5),
        ('["a", "{sha256}", 0]', 5),
        ('["a", "{sha256}", -1]', 5),
        ('["a", "{sha256}", true]', 5),
        ('["a", "{sha256}", 7.0]', 5),
        ('["a", "{sha256}", 7', 5),
        ('["a", "{sha256}"]', 5),
        ('["b", "{sha256}", 7]', 5),
        ('[["a"], "{sha256}", 7]', 5),
        ("7", 5),
    ],
)
def test_a_line_that_is_no_checkpoint_is_passed_over(line: str, size: int, tmp_path: Path) -> None:
    entry = other("a", 100)
    with Tree(tmp_path / "m") as tree:
        os.close(tree.create("a", 100))
        journal = Journal(tree)
        journal.note(entry, 5)
        with (tmp_path / "m" / JOURNAL_PATH).open("a") as stream:
            stream.write(line.replace("{sha256}", "1" * 64) + "\n")
        assert journal.read([entry]) == {"a": size}
        os.truncate(tmp_path / "m" / work_path("a"), 99)
        assert journal.read([entry]) == {}, "a work file has its final size"
        journal.close(remove=True)


# -- the sink


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    with Tree(tmp_path / "m") as made:
        yield made


def sink_of(tree: Tree, kept: Sequence[str] = (), **resume: int) -> Tuple[FolderSink, Journal]:
    journal = Journal(tree)
    return FolderSink(tree, set(kept), journal, resume), journal


WHOLE = other("w", 10)


def test_a_file_is_written_piece_by_piece_and_gets_its_name_at_the_end(
    tree: Tree, tmp_path: Path
) -> None:
    sink, journal = sink_of(tree)
    sink.begin(WHOLE)
    work = tmp_path / "m" / work_path("w")
    assert work.stat().st_size == 10, "it has its size at once"
    sink.write(WHOLE, 4, b"456789")
    sink.write(WHOLE, 0, memoryview(b"0123"))
    assert sink.read(WHOLE, 2, 4) == b"2345"
    sink.checkpoint(WHOLE, 10)
    assert journal.read([WHOLE]) == {"w": 10}
    assert not (tmp_path / "m/w").exists() and sink.finished == set()
    sink.finish(WHOLE)
    assert (tmp_path / "m/w").read_bytes() == b"0123456789" and not work.exists()
    assert sink.finished == {"w"} and sink._held == {}
    journal.close(remove=True)


def test_what_is_kept_is_not_touched(tree: Tree, tmp_path: Path) -> None:
    sink, journal = sink_of(tree, ["w"])
    sink.begin(WHOLE)
    sink.write(WHOLE, 0, b"x")
    sink.checkpoint(WHOLE, 5)
    sink.finish(WHOLE)
    sink.abandon(WHOLE, lost=False)
    assert sink.finished == set() and sink._held == {} and journal.read([WHOLE]) == {}
    assert not (tmp_path / "m/w").exists() and not (tmp_path / "m" / work_path("w")).exists()
    journal.close(remove=True)


def test_a_file_goes_on_where_an_earlier_run_was(tree: Tree, tmp_path: Path) -> None:
    fd = tree.create("w", 10)
    os.write(fd, b"0123")
    os.close(fd)
    sink, journal = sink_of(tree, w=4)
    sink.begin(WHOLE)
    assert sink.read(WHOLE, 0, 4) == b"0123", "it was not made anew"
    for size, noted in ((3, None), (4, None), (5, 5)):
        sink.checkpoint(WHOLE, size)
        assert journal.read([WHOLE]).get("w") == noted
    journal.close(remove=True)
    sink.close()


@pytest.mark.parametrize(("lost", "stays"), [(True, True), (False, False)])
def test_a_file_with_wrong_content_goes(
    lost: bool, stays: bool, tree: Tree, tmp_path: Path
) -> None:
    sink, journal = sink_of(tree)
    sink.begin(WHOLE)
    sink.abandon(WHOLE, lost)
    assert (tmp_path / "m" / work_path("w")).exists() is stays and sink._held == {}
    sink.release(WHOLE)
    journal.close(remove=True)


def test_another_worker_goes_on_in_a_file_and_closes_what_it_opened(tree: Tree) -> None:
    first, journal = sink_of(tree)
    first.begin(WHOLE)
    second = FolderSink(tree, set(), journal, {})
    before = set(os.listdir("/proc/self/fd"))
    second.write(WHOLE, 0, b"abc")
    assert second.read(WHOLE, 0, 3) == b"abc"
    assert set(os.listdir("/proc/self/fd")) == before
    (held,) = first._held.values()
    first.close()
    with pytest.raises(OSError):
        os.fstat(held)
    journal.close(remove=True)


@pytest.mark.parametrize("reserve", [True, False])
def test_blocks_are_reserved_if_that_is_asked(
    reserve: bool, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    known: Any = object()
    monkeypatch.setattr("hfship.archive.tree.filesystem_of", lambda root: {tree.root: known}[root])
    monkeypatch.setattr("hfship.archive.tree.preallocate", lambda _, *more: asked.append(more))
    journal = Journal(tree)
    sink = FolderSink(tree, set(), journal, {}, reserve)
    sink.begin(WHOLE)
    ((size, filesystem),) = asked
    assert size == 10 and (filesystem is known) is reserve
    assert filesystem.kind == "" if not reserve else True
    sink.close()
    journal.close(remove=True)


def test_a_disk_that_is_full_is_told_with_the_file_and_nothing_stays_open(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink, journal = sink_of(tree)
    sink.begin(WHOLE)
    monkeypatch.setattr("hfship.archive.tree.pwrite_all", full)
    with pytest.raises(DiskError, match="cannot write .*m/w"):
        sink.write(WHOLE, 0, b"x")
    monkeypatch.setattr("hfship.archive.tree.preallocate", full)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match="cannot create .*m/x"):
        tree.create("x", 10)
    assert set(os.listdir("/proc/self/fd")) == before
    sink.close()
    journal.close(remove=True)


def test_a_file_is_durable_before_and_after_it_gets_its_name(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, or its name could lead to nothing; after, as rename_durably says."""
    sink, journal = sink_of(tree)
    sink.begin(WHOLE)
    (held,) = sink._held.values()
    synced: List[bool] = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        if fd == held:
            synced.append((tmp_path / "m/w").exists())
        sync(fd)

    monkeypatch.setattr("hfship.archive.tree.os.fsync", fsync)
    sink.finish(WHOLE)
    assert synced == [False, True]
    journal.close(remove=True)


def test_all_names_are_made_durable_the_innermost_first(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: List[str] = []
    with tree.folder("a/b"):
        pass
    monkeypatch.setattr(
        "hfship.archive.tree.fsync_dir",
        lambda folder: synced.append(folder.relative_to(tmp_path).as_posix()),
    )
    tree.sync()
    assert synced == ["m/a/b", "m/a", "m"]
