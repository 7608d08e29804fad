"""Files: atomic writes, room, and what is said when a disk refuses."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Type, Union

import pytest

from conftest import Program, missing
from hfship.base.below import Refused
from hfship.base.errors import DiskError, NoRoomError
from hfship.base.files import (
    CHUNK,
    Filesystem,
    atomic_write,
    clone_file,
    disk_error,
    existing_ancestor,
    filesystem_of,
    free_bytes,
    free_inodes,
    make_dir,
    opened,
    pread_exactly,
    preallocate,
    pwrite_all,
    remove_if_empty,
    rename_durably,
    require_inodes,
    require_room,
    sha256_file,
    write_all,
    write_below,
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


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """The names of what is made durable, in order."""
    names: List[str] = []

    def fsync(fd: int) -> None:
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def test_a_name_is_durable_when_its_file_and_its_folder_are(
    tmp_path: Path, synced: List[str]
) -> None:
    """On FAT the new entry leads to nothing until the file is written once more."""
    (tmp_path / "new").mkdir()
    (tmp_path / "x.incomplete").write_text("text")
    rename_durably(tmp_path / "x.incomplete", tmp_path / "new" / "x")
    assert synced == ["x", "new"] and (tmp_path / "new" / "x").read_text() == "text"


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_written_is_durable_where_it_should_be(
    durable: bool, tmp_path: Path, synced: List[str]
) -> None:
    """Its bytes, and after it has its name all once more."""
    temporary = f".x.{os.getpid()}.tmp"
    for write in (
        lambda: atomic_write(tmp_path / "x", "text", durable=durable),
        lambda: write_below(tmp_path, "x", "text", durable=durable),
    ):
        synced.clear()
        write()
        assert synced == ([temporary, "x", tmp_path.name] if durable else [])


def test_what_killed_runs_left_of_a_file_goes_when_it_is_written(tmp_path: Path) -> None:
    """But not what another run is writing now, nor what only looks alike."""
    stay = [".x.tmp", ".x.1.tmp.y", ".xy.1.tmp", ".x.12345678901.tmp", "x.1.tmp", ".x.1a.tmp"]
    for name in [*stay, ".x.1.tmp", ".x.2.tmp"]:
        (tmp_path / name).touch()
    with (tmp_path / ".x.2.tmp").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        atomic_write(tmp_path / "x", "now", durable=False)
        assert (tmp_path / ".x.1.tmp").exists()
        atomic_write(tmp_path / "x", "text")
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, ".x.2.tmp", "x"])


def test_who_writes_a_file_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So another run does not take it for what a killed one left."""
    held: List[bool] = []

    def fsync(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            with open(f"/proc/self/fd/{fd}") as again:
                try:
                    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append(False)
                except BlockingIOError:
                    held.append(True)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "x", "text")
    assert held == [True, True]


def test_a_filesystem_without_modes_and_locks_takes_files_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    atomic_write(tmp_path / "x", "text", 0o600)
    assert (tmp_path / "x").read_text() == "text"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def in_pieces(call: Callable[..., Any]) -> Callable[..., Any]:
    """A system call that does no more than three bytes at a time."""

    def limited(fd: int, what: Any, *place: int) -> Any:
        return call(fd, min(what, 3) if isinstance(what, int) else what[:3], *place)

    return limited


def test_what_the_kernel_does_in_pieces_lies_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pwrite", "pread"):
        monkeypatch.setattr(os, name, in_pieces(getattr(os, name)))
    with (tmp_path / "x").open("w+b") as stream:
        pwrite_all(stream.fileno(), b"12345678", 2)
        assert stream.read() == b"\0\x0012345678"
        for size, offset, expected in [
            (8, 2, b"12345678"),
            (2, 4, b"34"),
            (5, 4, b"34567"),
            (9, 5, b"45678"),
            (1, 10, b""),
            (0, 2, b""),
        ]:
            assert pread_exactly(stream.fileno(), size, offset) == expected


MOUNTS = (
    "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {folder} rw - {kind} /dev/b rw\n"
    "3 1 8:3 / {folder}x rw - tmpfs none rw\n4 1 8:3 / /nowhere rw - tmpfs none rw\n"
)
UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    "kind, allowed, largest, journaled",
    [
        ("vfat", UNLIMITED, 2**32 - 1, False),
        ("msdos", UNLIMITED, 2**32 - 1, False),
        ("vfat", 1000, 1000, False),
        ("vfat", 2**40, 2**32 - 1, False),
        ("exfat", UNLIMITED, None, False),
        ("ext4", UNLIMITED, None, True),
        ("xfs", 2**40, 2**40, True),
        ("btrfs", UNLIMITED, None, True),
        ("overlay", UNLIMITED, None, False),
        ("f2fs", UNLIMITED, None, False),
    ],
)
def test_a_filesystem_tells_what_it_takes(
    kind: str,
    allowed: int,
    largest: Optional[int],
    journaled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = tmp_path / "mounts"
    table.write_text(MOUNTS.format(folder=tmp_path.resolve(), kind=kind))
    monkeypatch.setattr("hfship.base.files.MOUNT_TABLE", table)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, UNLIMITED))
    found = filesystem_of(tmp_path / "to come" / "x")
    assert found == Filesystem(kind, largest) and found.journaled == journaled


def test_of_two_mounts_on_one_point_the_later_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.base.files.MOUNT_TABLE", tmp_path / "mounts")
    twice = [MOUNTS.format(folder=tmp_path.resolve(), kind=kind) for kind in ("xfs", "nfs")]
    (tmp_path / "mounts").write_text("".join(twice))
    assert filesystem_of(tmp_path).kind == "nfs"


def test_what_is_to_come_lies_where_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert existing_ancestor(tmp_path) == tmp_path
    assert existing_ancestor(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing_ancestor(Path("a")) == tmp_path


FULL_OF = {"f_blocks": 9, "f_bavail": 3, "f_bfree": 5, "f_frsize": 7, "f_bsize": 11}


@pytest.mark.parametrize(
    "status, room, files",
    [
        ({**FULL_OF, "f_files": 4, "f_favail": 2, "f_ffree": 3}, 21, 2),
        ({**FULL_OF, "f_files": 0, "f_favail": 0, "f_ffree": 0}, 21, sys.maxsize),
        ({**FULL_OF, "f_blocks": 0, "f_files": 4, "f_favail": 0, "f_ffree": 3}, sys.maxsize, 0),
    ],
)
def test_room_is_what_this_user_may_still_use(
    status: Dict[str, int],
    room: int,
    files: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A FUSE filesystem that tells nothing is not full."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**status))
    assert (free_bytes(tmp_path / "x"), free_inodes(tmp_path / "x")) == (room, files)


@pytest.mark.parametrize(
    "total, largest, inodes, refused",
    [
        (1000, 400, 16, ""),
        (1001, 400, 16, "cannot test it: {folder} has 1.0 kB free, 1.0 kB needed|1 B are missing"),
        (
            3500,
            400,
            16,
            "cannot test it: {folder} has 1.0 kB free, 3.5 kB needed|2.5 kB are missing",
        ),
        (
            1000,
            401,
            16,
            "cannot test it: a file is too large for the target"
            "|the filesystem at {folder} takes files up to 400 B, the largest has 401 B",
        ),
        (
            1000,
            400,
            17,
            "cannot test it: too few inodes"
            "|{folder} has 16 inodes free, 17 needed: one for each file",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_byte(
    total: int,
    largest: int,
    inodes: int,
    refused: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hfship.base.files.free_bytes", lambda _: 1000)
    monkeypatch.setattr("hfship.base.files.free_inodes", lambda _: 16)
    monkeypatch.setattr("hfship.base.files.filesystem_of", lambda _: Filesystem("vfat", 400))

    def ask() -> None:
        require_room(tmp_path, total, largest, "test it", "take another")
        require_inodes(tmp_path, inodes, "test it", "take another")

    if not refused:
        ask()
        return
    with pytest.raises(DiskError) as caught:
        ask()
    said = f"{caught.value.what}|{caught.value.why}"
    assert said == refused.format(folder=tmp_path) and caught.value.next_step == "take another"


AGAIN = ", then run the same command again"
ANOTHER_FOLDER = "choose another folder (-o DIR), or fix this one"
BAD_DISK = f"look after the disk and its cable{AGAIN}"
ALONE = f"leave the folder alone meanwhile{AGAIN}"


@pytest.mark.parametrize(
    "number, kind, reason, step",
    [
        (errno.ENOSPC, NoRoomError, "the disk is full (1.0 kB free)", f"free space{AGAIN}"),
        (errno.EDQUOT, NoRoomError, "the disk quota is used up", f"free space{AGAIN}"),
        (errno.EFBIG, NoRoomError, "the file is too large for this", f"free space{AGAIN}"),
        (errno.EROFS, DiskError, "the filesystem is read-only", ANOTHER_FOLDER),
        (errno.EACCES, DiskError, "permission denied", ANOTHER_FOLDER),
        (errno.EPERM, DiskError, "permission denied", ANOTHER_FOLDER),
        (errno.EEXIST, DiskError, "SAID", ANOTHER_FOLDER),
        (errno.ENOTDIR, DiskError, "SAID", ANOTHER_FOLDER),
        (errno.EINVAL, DiskError, "SAID", ANOTHER_FOLDER),
        (errno.ENAMETOOLONG, DiskError, "SAID", ANOTHER_FOLDER),
        (errno.EIO, DiskError, "the disk reports an input/output error", BAD_DISK),
        (errno.ENODEV, DiskError, "SAID", BAD_DISK),
        (errno.ENXIO, DiskError, "SAID", BAD_DISK),
        (errno.ENOENT, DiskError, "SAID", ALONE),
        (errno.ELOOP, DiskError, "SAID", ALONE),
        (errno.EBUSY, DiskError, "SAID", f"free space{AGAIN}"),
    ],
)
def test_what_a_disk_says_is_told_with_what_to_do(
    number: int, kind: Type[DiskError], reason: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.base.files.free_bytes", lambda _: 1000)
    monkeypatch.setattr("hfship.base.files.free_inodes", lambda _: 1)
    error = disk_error(OSError(number, "SAID"), "write", Path("/x"))
    assert type(error) is kind and error.next_step == step
    assert error.what.startswith(f"cannot write /x: {reason}") and not error.why
    assert disk_error(OSError(number, "SAID"), "write", Path("/x"), "step").next_step == "step"


def test_what_a_disk_says_in_few_words_or_by_us_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = disk_error(Refused(errno.EACCES, "it is a socket", "/x"), "read", Path("/x"))
    assert refused.what == "cannot read /x: it is a socket"
    assert refused.next_step.startswith("remove what is there")
    assert disk_error(OSError("of us"), "read", Path("/x")).what == "cannot read /x: of us"
    assert disk_error(OSError(), "remove", Path("/x")).next_step == f"free space{AGAIN}"
    denied = disk_error(OSError(errno.EACCES, ""), "remove", Path("/x"))
    assert denied.next_step == "change that, or run it as its owner"
    monkeypatch.setattr("hfship.base.files.free_bytes", lambda _: 1000)
    monkeypatch.setattr("hfship.base.files.free_inodes", lambda _: 0)
    full = disk_error(OSError(errno.ENOSPC, "SAID"), "write", Path("/x"))
    assert full.what.endswith(": the disk takes no more files (no inodes are free)")


@pytest.mark.parametrize(
    "kind, size, said, reserved, raised",
    [
        ("ext4", 10, 0, True, False),
        ("xfs", 10, 0, True, False),
        ("btrfs", 10, 0, True, False),
        ("overlay", 10, 0, True, False),
        ("f2fs", 10, 0, True, False),
        ("nfs", 10, errno.ENOSPC, False, False),  # glibc would write every block
        ("ext4", 0, errno.ENOSPC, False, False),
        ("ext4", 10, errno.EOPNOTSUPP, False, False),
        ("ext4", 10, errno.EINVAL, False, False),
        ("ext4", 10, errno.ENOSPC, False, True),
    ],
)
def test_blocks_are_reserved_where_that_costs_nothing(
    kind: str,
    size: int,
    said: int,
    reserved: bool,
    raised: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: List[Any] = []

    def fallocate(fd: int, offset: int, length: int) -> None:
        if said:
            raise OSError(said, "SAID")
        asked.append((offset, length))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with (tmp_path / "x").open("wb") as stream:
        if raised:
            with pytest.raises(OSError, match="SAID"):
                preallocate(stream.fileno(), size, Filesystem(kind, None))
        else:
            preallocate(stream.fileno(), size, Filesystem(kind, None))
    assert asked == ([(0, size)] if reserved else [])
    assert (tmp_path / "x").stat().st_size == (0 if reserved or raised else size)


def test_a_filesystem_that_grows_files_by_writing_only_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with (tmp_path / "x").open("wb") as stream:
        preallocate(stream.fileno(), 10, Filesystem("fuse", None))


@pytest.mark.parametrize(
    "clones, links, foreign, linked",
    [
        (True, True, False, False),
        (False, True, False, True),
        (False, False, False, False),
        (False, True, True, False),  # who may write it could change both
    ],
)
def test_a_copy_costs_as_little_as_it_can(
    clones: bool,
    links: bool,
    foreign: bool,
    linked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = tmp_path / "x", tmp_path / "y"
    source.write_text("text")
    source.chmod(0o666 if foreign else 0o644)

    def ioctl(to: int, request: int, given: int) -> None:
        if not clones:
            raise OSError(errno.EOPNOTSUPP, "not here")
        assert request == 0x40049409
        os.pwrite(to, os.pread(given, 100, 0), 0)

    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    if not links:
        monkeypatch.setattr(os, "link", link)
    clone_file(source, target)
    assert target.read_text() == "text"
    assert (target.stat().st_ino == source.stat().st_ino) == linked
    with pytest.raises(FileExistsError):
        clone_file(source, target)


def test_folders_are_made_durably_from_the_innermost_on(
    tmp_path: Path, synced: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "a" / "b"
    assert make_dir(inner) == inner and inner.is_dir()
    assert synced == ["b", "a", tmp_path.name]
    synced.clear()
    assert make_dir(inner) == inner and synced == []
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot create the folder .*file/x"):
        make_dir(tmp_path / "file" / "x")

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "not to be read")

    monkeypatch.setattr("hfship.base.files.fsync_dir", refuse)
    assert make_dir(tmp_path / "c").is_dir()


def test_each_chunk_of_a_file_is_counted_and_hashed(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096 + b"end"
    (tmp_path / "x").write_bytes(content)
    counted: List[int] = []
    assert sha256_file(tmp_path / "x", counted.append) == hashlib.sha256(content).hexdigest()
    assert counted == [CHUNK, 3]
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "inside, itself, left",
    [
        ([".hfship/lock"], True, []),
        ([".hfship/lock"], False, ["m"]),
        ([".hfship/"], True, []),
        ([".hfship/lock", "x"], True, ["m", "m/.hfship", "m/.hfship/lock", "m/x"]),
        (["x"], False, ["m", "m/x"]),
        (
            [".hfship/lock", ".hfship/=plan"],
            True,
            ["m", "m/.hfship", "m/.hfship/=plan", "m/.hfship/lock"],
        ),
        ([".hfship/=plan"], False, ["m", "m/.hfship", "m/.hfship/=plan"]),
    ],
)
def test_a_folder_goes_when_nothing_is_in_it(
    inside: List[str], itself: bool, left: List[str], tmp_path: Path
) -> None:
    """But for locks, which are empty; what has a "=" in its name is not."""
    folder = tmp_path / "m"
    for name in inside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_text("plan" if "=" in name else "")
    remove_if_empty(folder, itself)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left
    remove_if_empty(tmp_path / "none")


def test_a_work_folder_elsewhere_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m" / ".hfship").symlink_to(tmp_path / "elsewhere")
    remove_if_empty(tmp_path / "m")
    assert (tmp_path / "m" / ".hfship").is_symlink()


def test_a_link_is_read_and_never_written(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with opened(tmp_path / "x", os.O_WRONLY | os.O_CREAT) as fd:
            os.write(fd, b"text")
    finally:
        os.umask(umask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    (tmp_path / "link").symlink_to("x")
    with opened(tmp_path / "link") as fd:
        assert os.read(fd, 9) == b"text"
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(OSError, match="link"), opened(tmp_path / "link", flags):
            pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
