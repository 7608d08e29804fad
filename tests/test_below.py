"""Below a folder nothing that somebody put in the way is followed, waited for or read for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Callable, Dict, List

import pytest

from hfship.base.below import (
    Owner,
    Refused,
    folder_below,
    open_regular,
    opened_below,
    owner_in,
    publish_below,
    remove_below,
    stat_below,
)
from hfship.base.errors import DiskError
from hfship.base.files import write_below
from hfship.base.reading import read_below, read_small


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # a long path is none for a socket
        server.bind(path.name)
        os.chdir(here)


# What somebody puts at .hfship/x of a folder; beside the folder lies `secret`.
TRAPS: Dict[str, Callable[[Path], None]] = {
    "a link": lambda path: path.symlink_to(path.parent.parent.parent / "secret"),
    "a dangling link": lambda path: path.symlink_to(path.parent.parent.parent / "new"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a named pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a socket": _socket,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model" / ".hfship").mkdir(parents=True)
    return tmp_path / "model"


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT])
def test_what_is_no_file_is_not_opened(trap: str, flags: int, model: Path) -> None:
    TRAPS[trap](model / ".hfship" / "x")
    with pytest.raises(Refused, match="is a"), opened_below(model, ".hfship/x", flags):
        pass
    assert sorted(os.listdir(model.parent)) == ["model", "secret"]


@pytest.mark.parametrize("trap", [*TRAPS, "a file"])
def test_what_is_no_folder_is_not_gone_through(trap: str, model: Path) -> None:
    if trap == "a folder":
        return
    way = model / ".hfship" / "x"
    TRAPS.get(trap, Path.touch)(way)
    for make in (True, False):
        with pytest.raises(Refused), folder_below(model, ".hfship/x/y", make):
            pass
    with pytest.raises(DiskError, match="cannot write .*: x is a"):
        write_below(model, ".hfship/x/y/z", "text")
    assert (model.parent / "secret").read_text() == "secret"


@pytest.mark.parametrize("path", ["../x", ".hfship/../../x", "/x", ".hfship//x", "./x/y"])
def test_a_path_stays_below(path: str, model: Path) -> None:
    with pytest.raises(Refused, match="leads elsewhere"), opened_below(model, path):
        pass
    with pytest.raises(DiskError):
        write_below(model, path, "")


def test_the_folder_itself_may_be_a_link(model: Path) -> None:
    link = model.parent / "link"
    link.symlink_to(model)
    write_below(link, ".hfship/a/b", "text")
    assert read_below(link, ".hfship/a/b") == b"text"
    assert stat_below(link, ".hfship/a/b").st_size == 4
    remove_below(link, ".hfship/a/b")
    remove_below(link, ".hfship/a/b")
    assert not (model / ".hfship" / "a" / "b").exists()


def test_what_lies_in_the_place_of_a_file_is_replaced_and_not_written_through(model: Path) -> None:
    secret = model.parent / "secret"
    (model / "x").symlink_to(secret)
    os.link(secret, model / f".x.{os.getpid()}.tmp")
    write_below(model, "x", "mine")
    assert secret.read_text() == "secret"
    assert (model / "x").read_text() == "mine"
    assert not (model / "x").is_symlink()
    assert os.listdir(model).count("x") == len(os.listdir(model)) - 1  # and .hfship


@pytest.mark.parametrize("trap", ["a named pipe", "a folder", "a socket"])
def test_a_given_path_is_a_file_behind_links(trap: str, model: Path) -> None:
    TRAPS[trap](model / "x")
    with pytest.raises(Refused, match=trap):
        open_regular(model / "x")
    (model / "y").symlink_to(model.parent / "secret")
    assert read_small(model / "y") == b"secret"


def test_no_more_is_read_than_is_asked_for(model: Path) -> None:
    file = model / "x"
    file.write_bytes(bytes(100))
    assert len(read_small(file, 100)) == 100
    os.truncate(file, 1 << 40)
    for read in (lambda: read_small(file, 100), lambda: read_below(model, "x")):
        with pytest.raises(Refused, match="more than"):
            read()
    with pytest.raises(Refused):
        read_small(Path("/proc/self/environ"), 1)  # of which stat says 0 bytes


@pytest.mark.parametrize(
    "uid, gid, mode, foreign",
    [
        (7, 8, 0o644, False),
        (0, 0, 0o664, False),
        (7, 8, 0o664, False),
        (12345, 8, 0o600, True),
        (7, 8, 0o666, True),
        (7, 12345, 0o664, True),
        (7, 12345, 0o644, False),
    ],
)
def test_foreign_is_what_others_own_or_write(uid: int, gid: int, mode: int, foreign: bool) -> None:
    status = os.stat_result((0o100000 | mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))
    assert Owner(7, 8, 0o100600).is_foreign(status) == foreign


def test_where_all_is_open_to_all_nothing_is_foreign_by_its_mode(tmp_path: Path) -> None:
    """As on FAT: what we make there for ourselves is somebody's, and open to all."""
    status = os.stat_result((0o100777, 1, 1, 1, 1000, 1000, 0, 0, 0, 0))
    assert not Owner(1000, 1000, 0o100777).is_foreign(status)
    owner = owner_in(tmp_path)
    assert (owner.uid, owner.gid) == (os.geteuid(), os.getegid())
    assert not owner.mode & 0o077


def test_a_file_gets_its_name_below_a_folder_or_not_at_all(tmp_path: Path) -> None:
    model, outside = tmp_path / "m", tmp_path / "outside"
    outside.mkdir()
    (model / "work").mkdir(parents=True)
    (model / "work/1").write_bytes(b"x")
    publish_below(model, "work/1", "a/b/x")
    assert (model / "a/b/x").read_bytes() == b"x" and not any((model / "work").iterdir())
    (model / "link").symlink_to(outside)
    with pytest.raises(OSError, match="link is a symbolic link"):
        publish_below(model, "a/b/x", "link/x")
    assert not any(outside.iterdir())


@pytest.mark.parametrize(
    "journaled, order", [(False, ["old", "x", "new"]), (True, ["new"])], ids=["FAT", "ext4"]
)
def test_what_a_name_needs_to_be_durable(
    journaled: bool, order: List[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rename is one step, its folder is enough. On FAT the old entry goes first, and the new
    one leads to nothing until the file is written once more."""
    for folder in ("old", "new"):
        (model / folder).mkdir()
    (model / "old" / "part").write_text("text")
    synced: List[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    publish_below(model, "old/part", "new/x", journaled)
    assert [os.path.basename(path) for path in synced] == order
    assert (model / "new" / "x").read_text() == "text"
