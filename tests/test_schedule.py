"""Which worker makes and takes which frame."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from hfship.archive.schedule import WORKER_MEMORY, WORKERS_MEMORY, Schedule, Step, workers_for
from hfship.base.workers import FORK_SIZE


@settings(max_examples=300)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    count=st.integers(1, 6),
    slots=st.integers(0, 8),
    serial=st.booleans(),
    ahead=st.one_of(st.none(), st.integers(1, 5)),
    seed=st.integers(0, 999),
)
def test_every_frame_is_made_once_and_every_lane_taken_in_its_order(
    lengths, count, slots, serial, ahead, seed
):
    chance, schedule = random.Random(seed), Schedule(lengths, slots, serial)
    first = [sum(lengths[:lane]) for lane in range(len(lengths))]
    made, taken, filled, pending = set(), {}, set(), [[] for _ in range(count)]
    while True:
        if ahead:  # as pack does: frames have their place in order
            placed = next((n for n in range(sum(lengths)) if n not in made), sum(lengths))
            schedule.limit = placed + ahead
        for worker in chance.sample(range(count), count):
            while len(pending[worker]) < 2:
                step = schedule.next(worker, not pending[worker])
                if step is None:
                    break
                if not step.make:
                    assert (step.lane, step.at, step.slot) in filled or step.slot < 0
                elif not step.take:
                    assert step.slot not in {slot for _, _, slot in filled} and len(filled) < slots
                if serial and step.make:
                    assert all(len(taken[lane][1]) == lengths[lane] for lane in range(step.lane))
                pending[worker].append(step)
        busy = [worker for worker in range(count) if pending[worker]]
        if not busy:
            break
        worker = chance.choice(busy)
        step = pending[worker].pop(0)
        if step.make:
            number = first[step.lane] + step.at
            assert number not in made and number < schedule.limit
            made.add(number)
        lost = step.make and chance.random() < 0.2
        if step.take:
            owner, frames = taken.setdefault(step.lane, (worker, []))
            assert owner == worker and frames == list(range(step.at))
            frames.append(step.at)
            filled.discard((step.lane, step.at, step.slot))
        elif not lost:
            filled.add((step.lane, step.at, step.slot))
        schedule.done(step, None if lost else 100)
    assert {lane: frames for lane, (_, frames) in taken.items()} == {
        n: list(range(x)) for n, x in enumerate(lengths)
    }
    assert len(made) == sum(lengths) and not filled


def make_and_take(lane, at):
    return Step(lane, at, make=True, take=True)


def ahead(lane, at, slot):
    return Step(lane, at, make=True, take=False, slot=slot)


def take(lane, at, slot, size):
    return Step(lane, at, make=False, take=True, slot=slot, size=size)


def test_a_worker_without_a_lane_makes_frames_for_the_one_that_is_behind_most():
    schedule = Schedule([3, 3], slots=2)
    assert schedule.next(0, True) == make_and_take(0, 0)
    assert schedule.next(1, True) == make_and_take(1, 0)
    assert schedule.next(2, True) == ahead(0, 1, slot=1)  # both are at their first frame
    assert schedule.next(2, False) == ahead(1, 1, slot=0)  # now the first lane is ahead
    assert schedule.next(2, False) is None  # no slot is free
    # A frame that is being made is waited for, and taken when it is there.
    assert schedule.next(0, True) is None
    schedule.done(ahead(0, 1, slot=1), 77)
    assert schedule.next(0, True) == take(0, 1, slot=1, size=77)


def test_content_that_was_lost_is_taken_as_lost_and_its_slot_is_free():
    schedule = Schedule([2], slots=1)
    assert schedule.next(0, True) == make_and_take(0, 0)
    step = schedule.next(1, True)
    assert step == ahead(0, 1, slot=0)
    schedule.done(step, None)
    assert schedule.next(0, True) == take(0, 1, slot=-1, size=-1)


def test_who_has_a_lane_helps_only_when_idle_and_nobody_waits():
    schedule = Schedule([2, 4], slots=4)
    assert schedule.next(0, True) == make_and_take(0, 0)
    assert schedule.next(1, True) == make_and_take(1, 0)
    assert schedule.next(2, True) == ahead(0, 1, slot=3)
    # The owner of the first lane waits for that frame. With a step left to do it does no more.
    assert schedule.next(0, False) is None
    assert schedule.next(0, True) == ahead(1, 1, slot=2)

    # What is left belongs to a worker that waits, as soon as the limit allows it.
    schedule.limit = 4
    assert schedule.next(2, True) is None
    schedule.limit = 6
    assert schedule.next(0, True) is None
    assert schedule.next(2, True) == ahead(1, 2, slot=1)


def test_frames_from_the_limit_on_wait():
    schedule = Schedule([2, 2], slots=2)
    schedule.limit = 1
    assert schedule.next(0, True) == make_and_take(0, 0) and schedule.all_taken
    assert schedule.next(0, True) is None and schedule.next(1, True) is None
    schedule.limit = 3
    assert not schedule.all_taken
    assert schedule.next(1, True) == make_and_take(1, 0)
    assert schedule.next(0, True) == make_and_take(0, 1)
    assert schedule.next(0, True) is None and schedule.all_taken


def test_serial_lanes_begin_when_those_before_are_done():
    schedule = Schedule([1, 1], slots=0, serial=True)
    step = schedule.next(0, True)
    assert step == make_and_take(0, 0)
    assert schedule.next(1, True) is None
    schedule.done(step, 9)
    assert schedule.next(1, True) == make_and_take(1, 0)


def test_workers_are_as_many_as_the_memory_allows():
    assert workers_for(8, FORK_SIZE - 1) == 0
    assert workers_for(8, FORK_SIZE) == 8
    assert workers_for(999, FORK_SIZE) == WORKERS_MEMORY // WORKER_MEMORY
    assert workers_for(999, FORK_SIZE, frame=2 << 20, held=5) == 16
    assert workers_for(8, FORK_SIZE, frame=1 << 30) == 1
