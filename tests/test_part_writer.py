# SPDX-License-Identifier: Apache-2.0
"""Where units go when an archive is cut into parts, and who writes, hashes and seals these: one step
at a time, without workers; test_pack.py and test_media.py have whole archives."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Optional

import pytest

from hfship.archive.frames import Frames
from hfship.archive.pack_journal import DonePart
from hfship.archive.part_cut import Group
from hfship.archive.part_places import Places
from hfship.archive.part_writer import HashUnits, PartWriter, SealPart, Unit, WriteUnits

FRAMES = Frames([(50, 60, None)] * 5)
FIRST, SECOND = Group(1, 0, 3, 250), Group(2, 3, 5, 150)


def writer_of(
    folder: Path, split: Optional[int] = 1000, workers: int = 2, groups: Any = (FIRST, SECOND)
) -> Any:
    """A writer of two groups, five frames, that may have both open; `done` has what it journals."""
    options = SimpleNamespace(split=split)
    plan: Any = SimpleNamespace(archive="m.tar.zst", options=options, parts_at_most=9, count=5)
    done: List[DonePart] = []
    made: Any = PartWriter(plan, workers, done.append)
    resumed: Any = SimpleNamespace(parts=[], complete=False)
    made.go_on(resumed, Places([folder], groups, workers))
    made.done = done
    return made


def work(writer: Any, worker: int) -> str:
    """Do the next task of a worker; what it was."""
    task = writer.next_task(worker)
    if task is None:
        return ""
    name = task.path.name.replace(".incomplete", "")
    if isinstance(task, WriteUnits):
        with task.path.open("r+b") as stream:
            stream.seek(task.offset)
            for unit in task.units:
                stream.write(bytes([unit.number]) * unit.size)
        writer.written(task)
        return f"write {name} {[unit.number for unit in task.units]} at {task.offset}"
    if isinstance(task, HashUnits):
        return f"hash {name} {[unit.number for unit in task.units]}"
    assert isinstance(task, SealPart)
    content = task.path.read_bytes()
    writer.sealed(task.path, hashlib.sha256(content).hexdigest())
    return f"seal {name} {task.hashed} of {len(content)}"


def all_work(writer: Any, workers: int = 2) -> List[str]:
    """All tasks that there are now."""
    steps: List[str] = []
    while True:
        found = [step for step in (work(writer, one) for one in range(workers)) if step]
        if not found:
            return steps
        steps += found


def place_all(writer: Any, group: Group, size: int = 50) -> None:
    for number in range(group.first, group.last):
        writer.place(group, Unit(number, size, 0))
    writer.end(group)


def test_parts_are_written_hashed_and_sealed(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    assert writer.begin(frozenset()) == FIRST
    place_all(writer, FIRST)
    assert sorted(all_work(writer)) == [
        "hash m.tar.zst.0001 [0, 1, 2]",
        "seal m.tar.zst.0001 150 of 150",
        "write m.tar.zst.0001 [0, 1, 2] at 0",
    ]
    assert [writer.has_role(worker) for worker in (0, 1)] == [False, False]
    assert writer.begin(frozenset()) == SECOND
    assert writer.begin(frozenset()) is None
    place_all(writer, SECOND)
    all_work(writer)
    assert not writer.finished
    writer.finish(FRAMES)
    assert writer.finished
    steps = all_work(writer)
    assert [step.partition(" of ")[0] for step in steps] == ["seal m.tar.zst.0002 100"]
    assert writer.parts == writer.done
    assert [(part.first, part.count, part.size) for part in writer.done] == [
        (0, 3, 150),
        (3, 2, (tmp_path / "m.tar.zst.0002.incomplete").stat().st_size),
    ]
    assert all(
        hashlib.sha256(part.path.read_bytes()).hexdigest() == part.sha256 for part in writer.done
    )


def test_a_part_that_is_full_goes_on_in_another(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, split=100)
    writer.begin(frozenset())
    place_all(writer, FIRST)
    names = {step.split(" ")[1] for step in all_work(writer)}
    assert names == {"m.tar.zst.0001", "m.tar.zst.0001+2"}
    done = sorted((part.first, part.count, part.size) for part in writer.done)
    assert done == [(0, 2, 100), (2, 1, 50)]


def test_one_archive_is_one_file(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, split=None, groups=(Group(1, 0, 5, 10),))
    group = writer.begin(frozenset())
    place_all(writer, group, 10_000)
    steps = all_work(writer)
    assert "write m.tar.zst [0, 1, 2, 3] at 0" in steps and "hash m.tar.zst [4]" in steps
    assert "write m.tar.zst [4] at 40000" in steps
    assert not any(step.startswith("seal") for step in steps)  # the tables are still to come
    writer.finish(FRAMES)
    assert any(step.startswith("seal m.tar.zst 50000 of ") for step in all_work(writer))


def roles_of(writer: Any, workers: int) -> List[int]:
    return [worker for worker in range(workers) if writer.has_role(worker)]


def test_roles_go_to_those_with_the_fewest_and_not_to_owners(tmp_path: Path) -> None:
    writer = writer_of(tmp_path, workers=8)
    other = tmp_path / "other"
    other.mkdir()
    writer._places = Places([tmp_path, other], (FIRST, SECOND), 3)
    writer.begin(frozenset({7}))
    assert roles_of(writer, 8) == [5, 6]
    writer.begin(frozenset())
    assert roles_of(writer, 8) == [4, 5, 6, 7]


@pytest.mark.parametrize("workers", [1, 3])
def test_one_worker_has_both_roles_where_there_are_few(workers: int, tmp_path: Path) -> None:
    writer = writer_of(tmp_path, workers=workers)
    writer.begin(frozenset({workers - 1}))
    assert len(roles_of(writer, workers)) == 1
    place_all(writer, FIRST)
    all_work(writer, workers)
    assert roles_of(writer, workers) == [] and len(writer.done) == 1


@pytest.mark.parametrize("complete", [False, True])
def test_what_was_not_published_is_removed(complete: bool, tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    writer.begin(frozenset())
    place_all(writer, FIRST)
    all_work(writer)
    writer.begin(frozenset())
    assert len(list(tmp_path.iterdir())) == 2
    writer.discard(complete)
    assert len(list(tmp_path.iterdir())) == (0 if complete else 1)


def test_parts_of_an_earlier_run_stay_or_go(tmp_path: Path) -> None:
    parts = [DonePart(first, 1, tmp_path / f"p{first}", 5, "5e") for first in (0, 1)]
    for part in parts:
        part.path.touch()
    writer = writer_of(tmp_path)
    writer.parts = list(parts)
    resumed: Any = SimpleNamespace(parts=parts[:1], complete=True)
    writer.go_on(resumed, Places([tmp_path], (SECOND,), 1))
    assert writer.parts == parts[:1] and writer.finished
    assert [path.name for path in tmp_path.iterdir()] == ["p0"]
    assert writer.begin(frozenset()) == SECOND


def test_room_that_is_still_to_be_written_is_counted(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    assert writer._coming() == {}
    writer.begin(frozenset())
    assert writer._coming() == {tmp_path: 250}  # as planned
    for number in range(3):
        writer.place(FIRST, Unit(number, 100, 0))
    assert writer._coming() == {tmp_path: 300}  # it is larger
    work(writer, 0)
    work(writer, 1)
    assert writer._coming() == {tmp_path: 0}
