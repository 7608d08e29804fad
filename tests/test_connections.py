"""How many connections a download has, and which are dialled again."""

from __future__ import annotations

import pytest

from hfship.hub.connections import Connections
from hfship.hub.ranges import (
    COLLAPSE_TICKS,
    EVICTIONS_PER_MINUTE,
    FIRST_TICKS,
    START_CONNECTIONS,
)

MB = 1e6


def test_a_number_that_the_operator_gave_stays() -> None:
    connections = Connections(most=40, fixed=True)
    assert connections.fixed and len(connections.open_missing()) == 40


def test_without_a_number_it_begins_with_a_few_and_opens_more_when_they_bring_more() -> None:
    connections = Connections(most=40, fixed=False)
    assert connections.open_missing() == list(range(START_CONNECTIONS))
    for tick in range(1, 5):
        connections.adapt(tick * 100 * MB)
    assert connections.limit > START_CONNECTIONS
    assert connections.open_missing() == list(range(START_CONNECTIONS, connections.limit))


def test_a_closed_connection_is_opened_anew_without_its_speed() -> None:
    connections = Connections(most=3, fixed=True)
    connections.open_missing()
    connections.measured(1, 5 * MB)
    connections.closed(1)
    assert connections.speed(1) == 0.0 and connections.open_missing() == [1]


@pytest.mark.parametrize("speed, slow", [(2.9, True), (3.0, False), (10.0, False)])
def test_slow_is_less_than_a_share_of_the_fastest(speed: float, slow: bool) -> None:
    connections = Connections(most=2, fixed=True)
    connections.measured(0, 10 * MB)
    connections.measured(1, speed * MB)
    dropped = connections.drop_slow(1, now=0.0)
    assert (dropped is not None) == slow
    assert connections.speed(1) == (0.0 if slow else speed * MB)


def test_a_connection_whose_bytes_wait_for_its_reader_is_not_slow() -> None:
    """On a machine that has too much to do it is the reader that is slow; dialling again would
    lose what waits."""
    connections = Connections(most=2, fixed=True)
    connections.measured(0, 10 * MB)
    connections.measured(1, MB, behind=True)
    assert connections.drop_slow(1, now=0.0) is None
    connections.measured(1, MB)
    assert connections.drop_slow(1, now=0.0)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_on_a_full_line_none_is_dialled_again(share: float) -> None:
    """Connections do not share a line evenly: another would not have more of it. One that the
    operator asked for is never tried with more."""
    connections = Connections(most=40, fixed=False)
    for _ in range(FIRST_TICKS + 1):
        connections.adapt(100 * MB)
    step = connections.limit / START_CONNECTIONS - 1
    for _ in range(2):
        connections.adapt(100 * MB * (1 + share * step))
    connections.measured(0, 10 * MB)
    connections.measured(1, MB)
    assert (connections.drop_slow(1, now=0.0) is not None) == (share > 0.5)


def test_one_too_many_brings_its_range_unless_it_crowds_the_server() -> None:
    connections = Connections(most=8, fixed=False)
    assert not connections.is_crowding(7)
    for _ in range(FIRST_TICKS):
        connections.adapt(MB)
    connections.adapt(100 * MB)
    for _ in range(COLLAPSE_TICKS):
        connections.adapt(MB)
    assert connections.limit == 4 and connections.is_crowding(4) and not connections.is_crowding(3)


def test_nothing_is_slow_before_anything_was_measured() -> None:
    assert Connections(most=2, fixed=True).drop_slow(0, now=0.0) is None


def test_only_so_many_are_dialled_again_in_a_minute() -> None:
    connections = Connections(most=2, fixed=True)
    connections.measured(0, 10 * MB)
    for number in range(EVICTIONS_PER_MINUTE):
        assert connections.drop_slow(1, now=number / EVICTIONS_PER_MINUTE)
    assert connections.drop_slow(1, now=59.9) is None
    assert connections.drop_slow(1, now=60.001)
    assert connections.drop_slow(1, now=60.002) is None
