# SPDX-License-Identifier: Apache-2.0
"""What doctor says of this machine's disks and Pythons; test_doctor.py runs it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import DiskError, HfshipError
from hfship.ops import doctor
from hfship.ops.probe import ProbeWarning


def said(work: Any, *words: Any) -> str:
    """What a probe says: its text, `warn: TEXT | STEP`, or `fail: ERROR`."""
    try:
        return str(work(*words))
    except ProbeWarning as exc:
        return f"warn: {exc.text} | {exc.next_step}"
    except HfshipError as exc:
        return f"fail: {exc.what}"


def test_the_speed_of_a_disk_is_that_of_what_reached_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: List[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size))
    times = iter([10.0, 10.5, 11.0])
    monkeypatch.setattr("hfship.ops.doctor.time.monotonic", lambda: next(times))
    assert doctor._write_speed(tmp_path, 5000) == 10_000
    assert synced == [5000] and list(tmp_path.iterdir()) == []
    with pytest.raises(DiskError):
        doctor._write_speed(tmp_path / "none", 1)


TB, GB = 10**12, 10**9


@pytest.mark.parametrize(
    ("free", "limit", "probed", "expected"),
    [
        (TB, 0, None, "D: 1.0 TB free on ext4, writes 2.0 GB/s"),
        (
            TB,
            4 * GB,
            None,
            "warn: D: 1.0 TB free on ext4, writes 2.0 GB/s, files up to 4.0 GB"
            " | hfship pack --split fat32",
        ),
        (
            doctor.LITTLE_ROOM - 1,
            0,
            None,
            "most models need more: free space",
        ),
        (doctor.LITTLE_ROOM, 0, None, "D: "),
        (1000, 0, 500, "most models need more: free space"),
    ],
)
def test_what_is_said_of_a_disk(
    free: int, limit: int, probed: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: List[int] = []

    def speed(folder: Path, count: int) -> float:
        counts.append(count)
        return 2.0 * GB

    kind = SimpleNamespace(kind="ext4", max_file_size=limit)
    patched: Dict[str, Any] = {
        "filesystem_of": lambda _: kind,
        "free_bytes": lambda _: free,
        "existing_ancestor": lambda folder: folder,
        "_write_speed": speed,
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.ops.doctor.{name}", value)
    found = said(doctor.probe_disk, Path("D"))
    assert expected in found and found.startswith("warn") == ("|" in found)
    assert counts == [probed or doctor.DISK_PROBE_BYTES]


@pytest.mark.parametrize(
    ("version", "offline", "expected"),
    [
        ((3, 10), False, "on PATH: 3.8, 3.12"),
        ((3, 9), True, "warn: "),
        ((3, 9), False, "fail: "),
    ],
)
def test_what_is_said_of_a_python(
    version: Any, offline: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ("python3.8", "python3.12")
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr("hfship.ops.doctor.sys.version_info", version)
    found = said(doctor.probe_python, offline)
    assert found.startswith(expected) or (version >= (3, 10) and found.endswith(expected))
    assert ("need 3.10" in found or "needs 3.10" in found) == (version < (3, 10))


def test_a_site_needs_fewer_programs() -> None:
    def names(offline: bool) -> List[str]:
        return [probe.check for probe in doctor.program_probes(offline)]

    assert names(True) == [name for name in names(False) if name in ("zstd", "openssl")]
    assert set(names(True)) < set(names(False))
