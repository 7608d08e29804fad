"""One hfship at a time per folder."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest

from hfship.base import locks
from hfship.base.errors import DiskError, IncompleteError
from hfship.base.locks import (
    FolderLock,
    InUseError,
    Owner,
    boot_id,
    lock_within,
    process_start,
    read_owner,
    still_runs,
)


def test_a_lock_is_exclusive_and_released(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(IncompleteError, match="in use"), FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass
    assert os.listdir(tmp_path / ".hfship") == ["lock"]


@pytest.mark.parametrize(
    "owner, age_s, outcome",
    [
        ({"host": "{here}", "pid": 1, "start": "{start}", "boot_id": "{boot}"}, 999, "in use"),
        (
            {"host": "{here}", "pid": 1, "start": "12345", "boot_id": "{boot}"},
            0,
            "taken",
        ),  # the pid was reused
        (
            {"host": "{here}", "pid": 1, "start": "{start}", "boot_id": "before"},
            0,
            "taken",
        ),  # rebooted since
        ({"host": "another", "pid": 1, "start": "1", "boot_id": "x"}, 5, "in use"),
        ({"host": "another", "pid": 1, "start": "1", "boot_id": "x"}, 70, "taken, doubtful"),
        ({"host": "another", "pid": 1, "start": "1", "boot_id": "x"}, -30, "in use"),
        ({"host": "another", "pid": 1, "start": "1", "boot_id": "x"}, -90, "taken, doubtful"),
        (
            {"host": "another", "pid": 1, "start": "1", "boot_id": "{boot}"},
            0,
            "taken",
        ),  # a container that is gone
        ("garbage", 70, "taken"),  # whoever lives would have seen it
        ("", 5, "in use"),
        ("[" * 100_000, 70, "taken"),
        ({"host": "{here}", "pid": "abc", "start": "", "boot_id": "{boot}"}, 5, "in use"),
    ],
)
def test_a_lease_ends_with_its_owner(
    owner: Any, age_s: float, outcome: str, tmp_path: Path
) -> None:
    """The lease decides where flock does nothing, as on some network filesystems."""
    (tmp_path / ".hfship").mkdir()
    here = {"{here}": socket.gethostname(), "{start}": process_start(1), "{boot}": boot_id()}
    lease = tmp_path / ".hfship" / "lease"
    if isinstance(owner, dict):
        owner = json.dumps({key: here.get(value, value) for key, value in owner.items()})
    lease.write_text(owner)
    os.utime(lease, (time.time() - age_s,) * 2)
    if outcome == "in use":
        with pytest.raises(IncompleteError, match="in use"), FolderLock(tmp_path):
            pass
    else:
        with FolderLock(tmp_path) as lock:
            assert lock.doubtful == ("doubtful" in outcome)


def test_a_full_disk_leaves_no_torn_lease(small_disk: Any) -> None:
    disk = small_disk(1)
    (disk / ".hfship").mkdir()
    (disk / ".hfship" / "lock").touch()
    with pytest.raises(OSError, match="No space"):
        (disk / "filler").write_bytes(bytes(2 << 20))
    with pytest.raises(DiskError, match="full"), FolderLock(disk):
        pass
    assert os.listdir(disk / ".hfship") == ["lock"]


def test_whoever_lost_the_lease_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.base.locks.LEASE_BEAT_S", 0.01)
    lost = threading.Event()
    with FolderLock(tmp_path, lost.set):
        (tmp_path / ".hfship" / "lease").write_text('{"host": "another"}')
        assert lost.wait(5)
    assert (tmp_path / ".hfship" / "lease").exists()  # it is not ours to remove


@pytest.mark.parametrize(
    "owner, label",
    [
        (Owner("gpu1", 7), "process 7 on gpu1"),
        (Owner(), "process ? on ?"),
        (Owner("evil\x1b[31m", 7), "process 7 on evil?[31m"),
        (Owner("h" * 500, 7), f"process 7 on {'h' * 80}"),
    ],
)
def test_owners_are_named_without_what_they_could_do_to_a_terminal(
    owner: Owner, label: str
) -> None:
    assert owner.label == label


def test_a_lease_is_on_the_disk_before_its_owner_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut would leave an empty one, which names no owner."""
    synced: List[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with FolderLock(tmp_path / "m"):
        assert "lease" in synced


STAT = "{pid} ({name}) {state} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 23 24"


@pytest.mark.parametrize(
    "text, start",
    [
        (STAT.format(pid=7, name="sh", state="S"), "4711"),
        (STAT.format(pid=7, name="a (b) Z 1", state="R"), "4711"),
        (STAT.format(pid=7, name="sh", state="Z"), ""),
        (STAT.format(pid=7, name="sh", state="X"), ""),
        ("7 (sh) S " + "1 " * 18 + "4712", "4712"),
        ("7 (sh) S " + "1 " * 18, ""),
        ("", ""),
    ],
)
def test_a_process_is_known_by_its_start(
    text: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert process_start(7) == start


def test_what_the_kernel_does_not_say_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = process_start(os.getpid())
    assert ours.isdecimal() and int(ours) > 0
    assert process_start(1 << 30) == ""
    assert len(boot_id()) == 36

    def refuse(*_: object, **__: object) -> str:
        raise OSError("not here")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert (boot_id.__wrapped__(), process_start(os.getpid())) == ("", "")


@pytest.mark.parametrize(
    "start, boot, runs",
    [
        ("{start}", "{boot}", True),
        ("", "{boot}", False),
        ("{start}", "before", False),
        ("1", "{boot}", False),
    ],
)
def test_a_process_runs_while_nothing_of_it_differs(start: str, boot: str, runs: bool) -> None:
    pid = os.getpid()
    start, boot = start.format(start=process_start(pid)), boot.format(boot=boot_id())
    assert still_runs(pid, start, boot) == runs
    assert not still_runs(1 << 30, "", boot_id())


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "it is no object"),
        ("{}", "its process is 0"),
        ('{"pid": 0}', "its process is 0"),
        ('{"pid": -1}', "its process is -1"),
        ('{"pid": "x"}', "pid is not what it should be"),
        ("{", "Expecting"),
    ],
)
def test_a_lease_that_is_none_names_nobody(content: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_owner(content.encode())


@pytest.mark.parametrize(
    "owner, is_here",
    [
        (Owner("another", 1, "1", "{boot}"), True),
        (Owner("{here}", 1, "1", "x"), True),
        (Owner("another", 1, "1", "x"), False),
        (Owner("another", 1, "1", ""), False),
        (Owner(), False),
    ],
)
def test_here_is_this_kernel_or_a_host_of_this_name(owner: Owner, is_here: bool) -> None:
    told = Owner(
        owner.host.format(here=socket.gethostname()),
        owner.pid,
        owner.start,
        owner.boot_id.format(boot=boot_id()),
    )
    assert told.is_here == is_here
    assert read_owner(json.dumps(vars(Owner("h", 7, "8", "9"))).encode()) == Owner("h", 7, "8", "9")


def test_where_the_kernel_names_no_boot_all_hosts_are_not_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locks, "boot_id", lambda: "")
    assert not Owner("another", 1).is_here


@pytest.mark.parametrize("host, pid", [("{here}", 1), ("another", 0)])
def test_who_holds_a_folder_is_told(host: str, pid: int, tmp_path: Path) -> None:
    """Its process only where one of that number is ours to look at. No descriptor stays open."""
    host = host.format(here=socket.gethostname())
    owner = {"host": host, "pid": 1, "start": process_start(1), "boot_id": boot_id()}
    (tmp_path / ".hfship").mkdir()
    (tmp_path / ".hfship" / "lease").write_text(json.dumps(owner))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(InUseError) as caught, FolderLock(tmp_path):
        pass
    assert set(os.listdir("/proc/self/fd")) <= before
    error = caught.value
    assert error.what == f"{tmp_path} is in use by another hfship" and error.pid == pid
    assert error.why == f"process 1 on {host} holds {tmp_path}/.hfship/lock"
    assert "forgotten after 60 s" in error.next_step
    assert InUseError("a", "b", "c").pid == 0


def test_who_holds_the_lock_is_told_by_the_lease(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(InUseError) as caught, FolderLock(tmp_path):
            pass
        assert caught.value.pid == os.getpid() and set(os.listdir("/proc/self/fd")) <= before
        (tmp_path / ".hfship" / "lease").unlink()
        with pytest.raises(InUseError, match="in use") as caught, FolderLock(tmp_path):
            pass
        assert caught.value.pid == 0 and "process ? on ?" in caught.value.why


@pytest.mark.parametrize("removed", [False, True])
def test_nothing_is_left_of_a_lock(
    removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told that it was lost, no thread goes on, no descriptor stays open."""
    monkeypatch.setattr(locks, "LEASE_BEAT_S", 0.01)
    lost: List[bool] = []
    synced: List[str] = []
    threads = set(threading.enumerate())
    before = set(os.listdir("/proc/self/fd"))
    with FolderLock(tmp_path, lambda: lost.append(True)) as lock:
        (keeper,) = set(threading.enumerate()) - threads
        assert keeper.daemon
        if removed:
            with monkeypatch.context() as patch:
                name_of = "/proc/self/fd/{}".format
                patch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(name_of(fd))))
                lock.remove()
            assert os.listdir(tmp_path / ".hfship") == []
            assert synced == [str(tmp_path / ".hfship")]
            keeper.join(30)
            assert not keeper.is_alive()
    keeper.join(30)
    assert not keeper.is_alive() and not lost
    assert set(os.listdir("/proc/self/fd")) <= before
    assert os.listdir(tmp_path / ".hfship") == ([] if removed else ["lock"])


def test_a_lease_is_touched_while_its_owner_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_BEAT_S", 0.01)
    umask = os.umask(0)
    try:
        with FolderLock(tmp_path):
            lease = tmp_path / ".hfship" / "lease"
            for path in (lease, tmp_path / ".hfship" / "lock"):
                assert path.stat().st_mode & 0o777 == 0o644
            assert json.loads(lease.read_text()) == {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "start": process_start(os.getpid()),
                "boot_id": boot_id(),
            }
            os.utime(lease, (1, 1))
            deadline = time.monotonic() + 30
            while lease.stat().st_mtime == 1 and time.monotonic() < deadline:
                time.sleep(0.005)
            assert lease.stat().st_mtime > 1
    finally:
        os.umask(umask)


def test_a_lease_that_cannot_be_written_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, data: bytes) -> None:
        os.write(fd, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(locks, "write_all", refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match="cannot lock .*lock: the disk is full"):
        FolderLock(tmp_path).__enter__()
    assert os.listdir(tmp_path / ".hfship") == ["lock"]
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_lock_is_waited_for_with_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock_within(tmp_path, 0) as has_waited:
        assert not has_waited
        with pytest.raises(InUseError), lock_within(tmp_path, -1):
            pass
    other = FolderLock(tmp_path)
    other.__enter__()
    naps: List[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            other.__exit__()

    still = SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0)
    monkeypatch.setattr(locks, "time", still)
    with lock_within(tmp_path, 5) as has_waited:
        assert has_waited and naps == [locks.LOCK_POLL_S] * 2
    assert not (tmp_path / ".hfship" / "lease").exists()


def test_the_age_of_a_lease_is_told_by_the_clock_of_its_disk(tmp_path: Path) -> None:
    """Not by when somebody touched the lock last."""
    (tmp_path / ".hfship").mkdir()
    lock, lease = tmp_path / ".hfship" / "lock", tmp_path / ".hfship" / "lease"
    lock.touch()
    os.utime(lock, (1, 1))
    lease.write_text(json.dumps({"host": "another", "pid": 1, "start": "1", "boot_id": "x"}))
    with pytest.raises(InUseError), FolderLock(tmp_path):
        pass
