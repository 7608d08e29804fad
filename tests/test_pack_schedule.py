# SPDX-License-Identifier: Apache-2.0
"""What a schedule of a pack knows at each step, and that nothing is left of it at its end;
test_part_cut.py has its order."""

from __future__ import annotations

import random
from typing import Any, List, Set, Tuple

import pytest

from hfship.archive import pack_schedule
from hfship.archive.pack_schedule import PackSchedule, PackStep
from hfship.archive.part_cut import Group, cut_parts


def end_of(schedule: PackSchedule) -> Tuple[Any, ...]:
    """What a schedule holds that ended."""
    state: Any = schedule
    return (schedule.all_taken, schedule.making, state._opened, state._owned, state._unproven)


@pytest.mark.parametrize("seed", range(60))
def test_workers_in_any_order_leave_nothing_behind(seed: int) -> None:
    """Units are written in any order, later than they are made; some groups were packed before."""
    chance = random.Random(seed)
    count = chance.randint(1, 50)
    cuts = [0, *sorted(chance.sample(range(1, count), chance.randint(0, min(5, count - 1)))), count]
    groups = cut_parts([1] * count, chance.randint(1, 20))
    before = {group for group in groups if chance.random() < 0.2}
    workers, slots = chance.randint(1, 6), chance.randint(1, 9)
    schedule = PackSchedule(cuts, slots, workers)
    for group in before:
        schedule.packed_before(group)
    waiting = [group for group in groups if group not in before]
    making: List[PackStep] = []
    made: List[int] = []
    taken: List[Tuple[int, int]] = []
    owners: Set[Tuple[int, int]] = set()
    for _ in range(40 * count):
        if waiting and chance.random() < 0.5:
            schedule.begin(waiting.pop(0))
        if making and chance.random() < 0.7:
            done = making.pop(chance.randrange(len(making)))
            schedule.release(done.group, done.slot)
        worker = chance.randrange(workers)
        step = schedule.next(worker, chance.random() < 0.8, owns=chance.random() < 0.9)
        if step is None:
            continue
        assert step.make or step.take
        if step.make:
            assert 0 <= step.slot < slots
            assert step.slot not in {one.slot for one in making}, "a slot holds one unit"
            made.append(step.frame)
            making.append(step)
            assert step.frame in range(
                *next((g.first, g.last) for g in groups if g.first == step.group)
            )
        else:
            assert (step.slot, step.group) == (-1, -1)
        if step.take:
            taken.append((step.lane, step.frame))
            owners.add((step.lane, worker))
        else:
            assert step.lane == -1
    for done in making:
        schedule.release(done.group, done.slot)
    assert end_of(schedule) == (True, 0, {}, {}, 0)
    known = {frame for group in before for frame in range(group.first, group.last)}
    assert sorted(made) == [frame for frame in range(count) if frame not in known]
    assert len({lane for lane, _ in owners}) == len(owners), "a lane is one worker's"
    for lane, (first, last) in enumerate(zip(cuts, cuts[1:])):
        assert [frame for of, frame in taken if of == lane] == list(range(first, last))


GROUP = Group(1, 0, 4, 4)


def test_a_schedule_counts_what_is_made_and_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_schedule, "READ_AGAIN_WITHIN", 1)
    schedule: Any = PackSchedule([0, 4], 4, 1)
    schedule.begin(GROUP)
    seen = []
    for frame in range(4):
        step = schedule.next(0, idle=True, owns=False)
        assert step == PackStep(frame, -1, make=True, take=False, group=0, slot=step.slot)
        seen.append((schedule._unproven, schedule.far_behind, schedule.making))
    assert seen == [(1, False, 1), (2, False, 1), (3, False, 1), (4, False, 0)]
    assert schedule.next(0, idle=True, owns=False) is None
    for slot in range(4):
        assert schedule.far_behind is False, "as long as the group is at hand"
        schedule.release(0, slot)
    assert schedule.far_behind is True and schedule._opened == {}
    assert schedule.next(0, idle=True) == PackStep(0, 0, make=False, take=True)
    assert schedule._unproven == 3 and set(schedule.owners) == {0} and not schedule.all_taken
    for frame in (1, 2, 3):
        assert schedule.next(0, idle=False) == PackStep(frame, 0, make=False, take=True)
        assert schedule.far_behind is (frame < 2)
    assert schedule.all_taken and set(schedule.owners) == set()


def test_a_worker_with_a_lane_makes_others_only_when_it_is_idle() -> None:
    schedule = PackSchedule([0, 2, 4], 4, 1)
    schedule.begin(Group(1, 0, 2, 2))
    first = schedule.next(0, idle=False)
    assert first and (first.frame, first.lane, first.make, first.take) == (0, 0, True, True)
    other = schedule.next(1, idle=True)
    assert other and (other.frame, other.take) == (1, False), "no lane begins there"
    schedule.begin(Group(2, 2, 4, 2))
    second = schedule.next(1, idle=True, owns=False)
    assert second and (second.frame, second.lane, second.take) == (2, -1, False)
    proving = schedule.next(0, idle=False)
    assert proving == PackStep(1, 0, make=False, take=True)
    assert set(schedule.owners) == set(), "the lane is taken to its end"


def test_a_lane_that_cannot_go_on_waits() -> None:
    """Its next frame is of a group that is not begun, or has no memory."""
    schedule = PackSchedule([0, 4, 40], 1, 2)
    assert schedule.next(0, idle=True) is None
    schedule.begin(Group(1, 0, 2, 2))
    assert schedule.next(0, idle=True) == PackStep(0, 0, True, True, 0, 0)
    assert schedule.next(0, idle=True) is None and set(schedule.owners) == {0}
    schedule.release(0, 0)
    assert schedule.next(0, idle=True) == PackStep(1, 0, True, True, 0, 0)
    assert schedule.next(0, idle=True) is None, "its group is not begun"
