"""One hfship at a time per folder."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, List

import pytest

from hfship.base.errors import DiskError, IncompleteError
from hfship.base.locks import FolderLock, Owner, boot_id, process_start


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
