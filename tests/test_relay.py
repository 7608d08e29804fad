"""Which file goes from where next: every host gets all, once; many hosts take little longer than one."""

from __future__ import annotations

import random
from typing import List, Set, Tuple

import pytest

from hfship.ops.relay import HERE, Schedule, Transfer


def names(kind: str, count: int) -> List[str]:
    return [f"{kind}{number}" for number in range(count)]


def run(schedule: Schedule, can: Set[Tuple[str, str]], seed: int) -> Tuple[List[Transfer], int]:
    """(all transfers that arrived, how many were tried); transfers end in a random order."""
    chance = random.Random(seed)
    running: List[Transfer] = []
    arrived: List[Transfer] = []
    tried = 0
    while True:
        transfer = schedule.next()
        if transfer:
            tried += 1
            running.append(transfer)
            assert len({one.target for one in running}) == len(running), "one at a time for each"
            continue
        if not running:
            return arrived, tried
        ended = running.pop(chance.randrange(len(running)))
        if ended.source == HERE or (ended.source, ended.target) in can:
            schedule.arrived(ended)
            arrived.append(ended)
        else:
            schedule.failed(ended)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("hosts, files", [(1, 3), (2, 1), (5, 4), (9, 12)])
def test_every_host_gets_every_file_once_whoever_can_reach_whom(
    hosts: int, files: int, seed: int
) -> None:
    chance = random.Random(seed)
    of_hosts = names("h", hosts)
    can = {(a, b) for a in of_hosts for b in of_hosts if chance.random() < 0.5}
    arrived, _ = run(Schedule(names("f", files), of_hosts, slots=4), can, seed)
    assert len(arrived) == hosts * files
    assert len({(one.file, one.target) for one in arrived}) == hosts * files


def test_a_way_that_did_not_work_is_gone_once() -> None:
    schedule = Schedule(names("f", 6), names("h", 3), slots=4)
    arrived, tried = run(schedule, set(), seed=1)
    assert len(arrived) == 18 and tried - len(arrived) <= 3 * 2, "each pair of hosts once"


def test_a_host_that_cannot_be_reached_is_given_up_and_the_others_get_all() -> None:
    schedule = Schedule(["f"], ["dead", "live"], slots=1)
    first = schedule.next()
    assert first and first.target == "dead"
    schedule.failed(first)
    second = schedule.next()
    assert second == Transfer("f", HERE, "live")
    schedule.arrived(second)
    assert schedule.next() is None


def test_what_is_there_is_not_sent() -> None:
    schedule = Schedule(["f", "g"], ["a"], 1, there={"a": ["f"]})
    assert schedule.next() == Transfer("g", HERE, "a")


@pytest.mark.parametrize(
    "hosts, files, most_rounds", [(1, 8, 8), (3, 1, 2), (8, 1, 4), (8, 16, 24), (60, 16, 30)]
)
def test_a_tree_takes_little_longer_than_one_host(hosts: int, files: int, most_rounds: int) -> None:
    """One by one it would be hosts x files; one host alone takes as many rounds as there are files."""
    rounds = Schedule(names("f", files), names("h", hosts), slots=1).rounds()
    assert files <= rounds <= most_rounds


def test_where_hosts_reach_no_other_this_machine_sends_as_many_at_a_time_as_it_may() -> None:
    """It is the only one that sends then, and the line of each host may be slower than its own."""
    schedule = Schedule(["f", "g"], names("h", 4), slots=3)
    first = schedule.next()
    assert first and first.source == HERE and schedule.next() is None
    schedule.arrived(first)
    running = [schedule.next(), schedule.next()]
    relayed = next(one for one in running if one and one.source != HERE)
    schedule.failed(relayed)
    while len(running) < 10:
        running.append(schedule.next())
    from_here = [one for one in running if one and one.source == HERE]
    assert len(from_here) == 3
