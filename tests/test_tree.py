# SPDX-License-Identifier: Apache-2.0
"""The folder that is unpacked into: what counts as ours in it, and how files get their names."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import List, Tuple

import pytest

from hfship.archive.tree import Tree
from hfship.base.content import PARTIAL_DIR, work_path
from hfship.base.errors import IntegrityError
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
