"""Files: atomic writes, room, and what is said when a disk refuses."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from typing import Optional, Union

import pytest

from conftest import Program, missing
from hfship.base.errors import DiskError
from hfship.base.files import (
    Filesystem,
    atomic_write,
    disk_error,
    filesystem_of,
    require_room,
    write_all,
)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "x"
    atomic_write(target, "old", 0o600)
    assert target.stat().st_mode & 0o777 == 0o600
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError):
        atomic_write(tmp_path / "folder", "new")
    assert target.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["folder", "x"]


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("content", ["tür\n", b"\0\xff", ""])
def test_atomic_write_replaces_a_file_and_leaves_nothing_beside_it(
    content: Union[str, bytes], durable: bool, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("an old and longer content")
    atomic_write(tmp_path / "x", content, durable=durable)
    expected = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "x").read_bytes() == expected
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("mode, expected", [(None, 0o640), (0o644, 0o644), (0o600, 0o600)])
def test_a_mode_holds_whatever_the_umask(
    mode: Optional[int], expected: int, tmp_path: Path
) -> None:
    umask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "x", "", mode)
    finally:
        os.umask(umask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == expected


def test_what_the_kernel_takes_in_pieces_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    with (tmp_path / "x").open("wb") as stream:
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        write_all(stream.fileno(), b"12345678")
    assert (tmp_path / "x").read_bytes() == b"12345678"


def test_room_is_checked_against_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_room(tmp_path / "a" / "b", 1, 1, "test", "")
    with pytest.raises(DiskError, match="needed"):
        require_room(tmp_path / "a" / "b", 1 << 60, 1, "test", "")


def test_without_a_mount_table_no_limit_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.base.files.MOUNT_TABLE", tmp_path / "none")
    assert filesystem_of(tmp_path) == Filesystem("", None)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 2000))
    assert filesystem_of(tmp_path) == Filesystem("", 1000)


def test_a_model_travels_where_there_is_no_proc(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    """As in a chroot into which nobody mounted it."""
    hide = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if subprocess.run([*hide, "true"], capture_output=True, check=False).returncode:
        missing("the right to hide /proc in a mount namespace")
    inside = Program([*hide, *hfship.argv], hfship.home)
    inside("pack", model, "-o", tmp_path / "out", "--name", "m")
    inside("unpack", tmp_path / "out/m.tar.zst", "-o", tmp_path / "un")
    for path in model.iterdir():
        if path.is_file():
            assert (tmp_path / "un/m" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "doing, step", [("write", "-o DIR"), ("read", "as its owner"), ("use", "as its owner")]
)
def test_no_other_folder_is_proposed_where_a_command_takes_none(doing: str, step: str) -> None:
    assert step in disk_error(PermissionError(13, "Permission denied"), doing, Path("/x")).next_step
