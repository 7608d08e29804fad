"""Parts side by side: where they begin, who makes what, and onto which medium they go."""

from pathlib import Path
from typing import Dict, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as some

from hfship.archive import part_places
from hfship.archive.pack_schedule import PackSchedule, PackStep
from hfship.archive.part_cut import Group, Sample, cut_parts, estimates, sampled_frames
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


def play(cuts: List[int], groups: List[Group], workers: int, width: int) -> List[PackStep]:
    """A run of workers, each with a step at a time; a unit is written as soon as it is made."""
    schedule = PackSchedule(cuts, 2 * workers + 4, width)
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
