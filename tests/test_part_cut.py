"""Parts side by side: where they begin, who makes what, and onto which medium they go."""

from pathlib import Path
from typing import Dict, List, Set, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as some

from hfship.archive import pack_schedule, part_places
from hfship.archive.pack_schedule import PackSchedule, PackStep
from hfship.archive.part_cut import (
    Group,
    Sample,
    beginning_order,
    cut_parts,
    estimates,
    sampled_frames,
)
from hfship.archive.part_places import Places
from hfship.archive.sidecars import SIDECARS_SIZE


@given(some.lists(some.integers(1, 50), min_size=1), some.integers(50, 200))
def test_groups_are_all_frames_in_their_order(sizes: List[int], limit: int) -> None:
    groups = cut_parts(sizes, limit)
    frames = [frame for group in groups for frame in range(group.first, group.last)]
    assert frames == list(range(len(sizes)))
    for group, following in zip(groups, groups[1:]):
        assert group.size == sum(sizes[group.first : group.last]) <= limit
        assert group.size + sizes[following.first] > limit


@pytest.mark.parametrize("count", [1, 64, 65, 1000])
def test_a_frame_is_estimated_by_the_sample_next_to_it(count: int) -> None:
    numbers = sampled_frames(count)
    edges = [2000 * number for number in range(count + 1)]
    # Each sample shrinks to as many of 1000 bytes as its number says.
    sizes = estimates(edges, [Sample(1000, max(number % 900, 1)) for number in numbers])
    assert len(sizes) == count
    for number in numbers:
        exact = 2 * max(number % 900, 1)
        assert exact < sizes[number] <= exact + exact // 64 + 1


@given(
    some.sets(some.integers(1, 59)), some.integers(1, 20), some.integers(1, 5), some.integers(0, 9)
)
def test_groups_begin_in_an_order_that_no_file_waits_in(
    inner: Set[int], limit: int, files: int, left_out: int
) -> None:
    cuts = [0, *sorted(inner), 60]
    groups = cut_parts([1] * 60, limit)
    del groups[left_out : left_out + 1]  # packed before
    order = beginning_order(groups, cuts, files)
    assert sorted(order) == groups
    for first, last in zip(cuts, cuts[1:]):
        ending_in_file = [group.first for group in order if first < group.last <= last]
        assert ending_in_file == sorted(ending_in_file)


def test_groups_of_some_files_begin_in_turns() -> None:
    cuts = [0, 4, 8, 12]
    groups = cut_parts([1] * 12, 2)
    for files, expected in (
        (1, [1, 2, 3, 4, 5, 6]),
        (2, [1, 3, 2, 5, 4, 6]),
        (9, [1, 3, 5, 2, 4, 6]),
    ):
        assert [group.number for group in beginning_order(groups, cuts, files)] == expected


def play(cuts: List[int], groups: List[Group], workers: int, width: int) -> List[PackStep]:
    """A run of workers, each with a step at a time; a unit is written as soon as it is made."""
    schedule = PackSchedule(cuts, 2 * workers + 4, workers)
    waiting = list(groups)
    steps: List[PackStep] = []
    while True:
        while waiting and schedule.making < width:
            schedule.begin(waiting.pop(0))
        given_out = [schedule.next(worker, idle=True) for worker in range(workers)]
        round_of_steps = [step for step in given_out if step]
        if not round_of_steps:
            return steps
        for step in round_of_steps:
            if step.make:
                schedule.release(step.group, step.slot)
        steps += round_of_steps


@given(some.data(), some.integers(1, 9), some.integers(1, 4))
def test_every_frame_is_made_once_and_proven_in_its_order(
    data: some.DataObject, workers: int, width: int
) -> None:
    count = data.draw(some.integers(1, 60))
    inner = data.draw(some.sets(some.integers(1, count - 1) if count > 1 else some.nothing()))
    cuts = [0, *sorted(inner), count]
    groups = cut_parts([1] * count, data.draw(some.integers(1, 20)))
    steps = play(cuts, groups, workers, width)
    assert sorted(step.frame for step in steps if step.make) == list(range(count))
    taken = [step for step in steps if step.take]
    assert sorted(step.frame for step in taken) == list(range(count))
    for lane, (first, last) in enumerate(zip(cuts, cuts[1:])):
        assert [s.frame for s in taken if s.lane == lane] == list(range(first, last))


def test_what_was_packed_before_is_only_proven() -> None:
    first, second = cut_parts([1] * 4, 2)
    schedule = PackSchedule([0, 3, 4], 6, 1)
    schedule.packed_before(first)
    schedule.begin(second)
    steps = [schedule.next(0, idle=True) for _ in range(4)]
    assert [(s.frame, s.make, s.take) for s in steps if s] == [
        (0, False, True),
        (1, False, True),
        (2, True, True),
        (3, True, True),
    ]


def steps_of(schedule: PackSchedule, worker: int, count: int) -> List[Tuple[int, bool, bool]]:
    found = [schedule.next(worker, idle=False) for _ in range(count)]
    return [(step.frame, step.make, step.take) for step in found if step]


def test_what_is_most_of_a_model_is_taken_ahead_of_making(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_schedule, "READ_AGAIN_WITHIN", 3)
    schedule = PackSchedule([0, 20], 12, 4)
    (group,) = cut_parts([1] * 20, 20)
    schedule.begin(group)
    ahead = [(0, False, True), (1, False, True), (2, False, True)]
    assert steps_of(schedule, 0, 9) == ahead
    assert steps_of(schedule, 1, 2) == [(0, True, False), (1, True, False)]
    assert steps_of(schedule, 0, 9) == [(3, False, True), (4, False, True)]


def test_what_is_little_of_a_model_is_read_once() -> None:
    schedule = PackSchedule([0, 4, 8, 12, 16, 20], 12, 8)
    (group,) = cut_parts([1] * 20, 20)
    schedule.begin(group)
    assert steps_of(schedule, 0, 4) == [
        (0, True, True),
        (1, True, True),
        (2, True, True),
        (3, True, True),
    ]


def test_groups_share_the_memory_and_the_last_one_has_all_of_it() -> None:
    schedule = PackSchedule([0, 8], 4, 1)
    first, second = cut_parts([1] * 8, 4)
    schedule.begin(first)
    schedule.begin(second)
    made = [schedule.next(0, idle=True, owns=False) for _ in range(5)]
    assert [step.group for step in made if step] == [0, 4, 0, 4]
    for step in made[:3]:
        assert step is not None
        schedule.release(step.group, step.slot)
    rest = [schedule.next(0, idle=True, owns=False) for _ in range(9)]
    assert len([step for step in rest if step]) == 3


# media -> (free room in parts, parts at a time); what each gets of ten parts if all are equally fast
MEDIA: Dict[str, Tuple[Dict[str, Tuple[int, int]], Dict[str, List[int]]]] = {
    "one": ({"a": (99, 1)}, {"a": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}),
    "two": ({"a": (99, 1), "b": (99, 1)}, {"a": [1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10]}),
    "a small one": ({"a": (3, 1), "b": (99, 1)}, {"a": [1, 2, 3], "b": [6, 7, 8, 9, 10, 4, 5]}),
    "fast ones": ({"a": (99, 2), "b": (99, 2)}, {"a": [1, 2, 3, 4, 5], "b": [6, 7, 8, 9, 10]}),
}


@pytest.mark.parametrize("case", MEDIA)
def test_a_medium_has_parts_that_follow_each_other(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    media, expected = MEDIA[case]
    room = {name: parts * 10 + SIDECARS_SIZE + 1 for name, (parts, _) in media.items()}
    monkeypatch.setattr(part_places, "free_bytes", lambda folder: room[folder.name])
    monkeypatch.setattr(part_places, "parts_at_once", lambda folder, _: media[folder.name][1])
    places = Places([Path(name) for name in media], cut_parts([10] * 10, 10), 4)
    got: Dict[str, List[int]] = {name: [] for name in media}
    while True:
        written = []
        for _ in range(len(media)):  # as many as there are media, then these are written
            found = places.next({})
            if found is None:
                break
            group, folder = found
            room[folder.name] -= group.size
            got[folder.name].append(group.number)
            written.append(group)
        if not written:
            break
        for group in written:
            places.done(group.first)
    assert got == expected


def test_a_fast_medium_takes_over_from_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_places, "free_bytes", lambda _: 1 << 40)
    monkeypatch.setattr(part_places, "parts_at_once", lambda *_: 1)
    slow, fast = Path("slow"), Path("fast")
    places = Places([slow, fast], cut_parts([10] * 6, 10), 2)
    first = places.next({})
    assert first is not None and first[1] == slow
    got = []
    while True:
        found = places.next({})
        if found is None:
            break
        group, folder = found
        assert folder == fast
        got.append(group.number)
        places.done(group.first)
    assert got == [4, 5, 6, 2, 3]
