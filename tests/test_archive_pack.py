# SPDX-License-Identifier: Apache-2.0
"""How much room an archive takes, and how runs of pack end; whole runs are in test_pack.py."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List

import pytest

from hfship.archive import pack_run
from hfship.archive.pack import holes_in, pack_model
from hfship.archive.pack_plan import PackOptions, plan_pack
from hfship.archive.pack_run import require_read_back
from hfship.base.errors import Exit, HfshipError
from hfship.base.report import Reporter
from support import archives as a

MIB = 1 << 20


@pytest.mark.parametrize(
    ("data", "grain", "holes"),
    [
        ([(0, 1)], 0, 7),
        ([(0, 1), (4, 5)], 0, 6),
        ([(0, 8)], 0, 0),
        ([(0, 1)], 1, 5),
        ([(0, 1), (2, 3), (7, 8)], 1, 2),
        ([(3, 4)], 0, 7),
        ([], 0, 8),
        ([], 5, 0),
    ],
)
def test_holes_of_a_file_take_no_room(data: Any, grain: int, holes: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as stream:
        stream.truncate(8 * MIB)
        for start, stop in data:
            stream.seek(start * MIB)
            stream.write(b"x" * ((stop - start) * MIB))
    assert holes_in(path, grain * MIB) == holes * MIB
    assert holes_in(tmp_path / "gone", 0) == 0


def test_a_run_that_ends_early_can_run_again() -> None:
    plan: Any = SimpleNamespace(archive="m.tar.zst")
    error = pack_run._ended_early(plan)
    assert error.what == "m.tar.zst was not written to its end" and error.code is Exit.INCOMPLETE
    assert error.next_step == "run the same command again: complete parts stay"


def test_a_medium_that_gives_back_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(b"bytes")
    fd = os.open(path, os.O_RDWR)
    right = "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"
    try:
        require_read_back(path, fd, right)
        with pytest.raises((HfshipError, OSError)):
            require_read_back(path, fd, "0" * 64)
    finally:
        os.close(fd)


@pytest.mark.parametrize("split", [None, 3 << 20])
def test_files_and_bytes_are_counted_as_they_are_packed(split: Any, tmp_path: Path) -> None:
    files = {"a": b"a", "empty": b"", "w": a.noise(5 << 20), "z": b"z" * 3000}
    manifest = a.make_model(tmp_path / "m", files)
    reporter = Reporter("none", -1)
    seen: List[Any] = []
    stage_of = reporter.stage

    @contextlib.contextmanager
    def stage(*words: Any, **options: Any) -> Iterator[Any]:
        with stage_of(*words, **options) as found:
            seen.append(found)
            yield found

    reporter.stage = stage  # type: ignore[method-assign]
    plan = plan_pack(tmp_path / "m", manifest, PackOptions(split=split, jobs=2))
    pack_model(plan, tmp_path / "out", reporter)
    packing = next(one for one in seen if one.name == "pack")
    assert packing.files == packing.finished >= len(files)
    assert packing.done == packing.total > manifest.size
