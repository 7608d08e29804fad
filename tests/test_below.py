"""Below a folder nothing that somebody put in the way is followed, waited for or read for ever."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest

from hfship.base.below import (
    Owner,
    Refused,
    folder_below,
    identity_of,
    is_foreign,
    kind_of,
    open_in,
    open_regular,
    opened_below,
    owner_in,
    owner_of,
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


@pytest.mark.parametrize(
    "mode, kind",
    [
        (stat.S_IFLNK, "a symbolic link"),
        (stat.S_IFDIR, "a folder"),
        (stat.S_IFIFO, "a named pipe"),
        (stat.S_IFSOCK, "a socket"),
        (stat.S_IFCHR, "a device"),
        (stat.S_IFBLK, "a device"),
        (stat.S_IFREG, "a file"),
        (0, "no file"),
    ],
)
def test_each_kind_of_file_has_its_name(mode: int, kind: str) -> None:
    assert kind_of(mode | 0o644) == kind


def no_file_can_be_made(number: int) -> Callable[..., Any]:
    """What stands in for TemporaryFile on a disk that takes none."""

    def refuse(**_: object) -> Any:
        raise OSError(number, "not here")

    return refuse


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT]
)
def test_where_nothing_can_be_made_the_owner_is_who_runs_this(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", no_file_can_be_made(number))
    assert owner_in(tmp_path) == Owner(os.geteuid(), os.getegid(), 0)


def test_another_trouble_of_the_disk_is_none_of_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", no_file_can_be_made(errno.EIO))
    with pytest.raises(OSError, match="not here"):
        owner_in(tmp_path)


def test_the_owner_of_what_we_make_is_tried_in_the_folder_itself(tmp_path: Path) -> None:
    """Where users are mapped it is neither the folder's owner nor we; here it is we."""
    with pytest.raises(FileNotFoundError):
        owner_in(tmp_path / "none")
    assert owner_in(tmp_path) == Owner(os.geteuid(), os.getegid(), 0o100600)


def test_a_file_is_the_same_until_somebody_touches_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("text")
    status = path.stat()
    before = identity_of(status)
    assert before == (
        status.st_dev,
        status.st_ino,
        4,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    renamed = before._replace(ctime_ns=1)
    assert before.is_same_content(renamed) and before != renamed
    for field in ("device", "inode", "size", "mtime_ns"):
        assert not before.is_same_content(before._replace(**{field: 1}))


@pytest.mark.parametrize("mode, foreign", [(0o644, False), (0o646, True), (0o664, False)])
def test_what_we_own_is_foreign_where_others_may_write(mode: int, foreign: bool) -> None:
    status = os.stat_result((mode, 1, 1, 1, os.geteuid(), os.getegid(), 0, 0, 0, 0))
    assert is_foreign(status) == foreign
    others = os.stat_result((mode, 1, 1, 1, 98765, os.getegid(), 0, 0, 0, 0))
    assert is_foreign(others)


def test_an_owner_without_a_name_has_a_number() -> None:
    us = pwd.getpwuid(0)
    status = os.stat_result((0o644, 1, 1, 1, 0, 0, 0, 0, 0, 0))
    assert owner_of(status) == us.pw_name
    status = os.stat_result((0o644, 1, 1, 1, 98765, 0, 0, 0, 0, 0))
    assert owner_of(status) == "user 98765"


def test_a_folder_is_opened_for_its_path_alone(model: Path) -> None:
    """It need not be readable, and is a folder."""
    for path in ("", ".hfship"):
        with folder_below(model, path) as fd:
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    with pytest.raises(NotADirectoryError), folder_below(model.parent / "secret"):
        pass


def test_folders_on_the_way_are_made_where_that_is_asked_for_and_are_durable(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one first: FAT must not lead to a folder that was never written."""
    synced: List[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    with pytest.raises(FileNotFoundError), folder_below(model, "a/b"):
        pass
    assert not (model / "a").exists()
    for order in (["a", "model", "b", "a"], []):
        with folder_below(model, "a/b", make=True) as fd:
            assert os.path.samestat(os.fstat(fd), (model / "a" / "b").stat())
        assert [os.path.basename(path) for path in synced] == order
        synced.clear()


def test_a_folder_that_another_made_meanwhile_is_taken(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: List[int] = []
    mkdir = os.mkdir

    def late(name: str, dir_fd: int) -> None:
        mkdir(name, dir_fd=dir_fd)
        mkdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", late)
    monkeypatch.setattr(os, "fsync", synced.append)
    with folder_below(model, "a", make=True) as fd:
        assert stat.S_ISDIR(os.fstat(fd).st_mode)
    assert not synced  # who made it does that


def test_a_new_file_has_the_mode_that_is_asked_for(model: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT
    umask = os.umask(0)
    try:
        with opened_below(model, "a", flags), opened_below(model, "b", flags, 0o600):
            pass
        with folder_below(model) as folder:
            for name, mode in (("c", {}), ("d", {"mode": 0o640})):
                os.close(open_in(folder, name, flags, **mode))
    finally:
        os.umask(umask)
    modes = {name: (model / name).stat().st_mode & 0o777 for name in "abcd"}
    assert modes == {"a": 0o666, "b": 0o600, "c": 0o666, "d": 0o640}


def test_an_error_that_is_no_trap_stays_what_it_is(model: Path) -> None:
    with pytest.raises(FileNotFoundError), opened_below(model, "none"):
        pass
    with pytest.raises(FileNotFoundError):
        open_regular(model / "none")
    with pytest.raises(FileNotFoundError):
        stat_below(model, "none")


def test_a_pipe_is_read_where_one_may_be_given(tmp_path: Path) -> None:
    """As <(command) of a shell: what is read from it is waited for."""
    reader, writer = os.pipe()
    try:
        path = Path(f"/proc/self/fd/{reader}")
        with pytest.raises(Refused, match="it is a named pipe"):
            open_regular(path)
        fd = open_regular(path, or_pipe=True)
        assert os.get_blocking(fd)
        os.close(fd)
        os.mkdir(tmp_path / "x")
        with pytest.raises(Refused, match="it is a folder"):
            open_regular(tmp_path / "x", or_pipe=True)
    finally:
        os.close(reader)
        os.close(writer)


def test_of_a_link_the_link_itself_is_looked_at_and_removed(model: Path) -> None:
    (model / "x").symlink_to(model.parent / "secret")
    assert stat.S_ISLNK(stat_below(model, "x").st_mode)
    remove_below(model, "x")
    assert not (model / "x").is_symlink() and (model.parent / "secret").exists()
