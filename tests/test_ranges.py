"""Which range comes next, over how many connections, and from where."""

from __future__ import annotations

import random
import statistics
from typing import Any, Dict, List, Set, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.hub.ranges import (
    COLLAPSE,
    COLLAPSE_TICKS,
    FAULTS_PER_STEP,
    FIRST_REQUEST,
    FIRST_TICKS,
    HOLD_TICKS,
    MAX_REQUEST,
    MAX_WINDOW,
    MIN_REQUEST,
    MIN_SHARE,
    MIN_STEAL,
    MIN_WINDOW,
    OVERDUE_S,
    REQUEST_SECONDS,
    SMALL_FILE,
    SMALL_FILE_TURN,
    SOON_S,
    START_CONNECTIONS,
    TRICKLE_BPS,
    TRICKLE_S,
    ConnectionCount,
    EndpointChoice,
    Flight,
    Intervals,
    RangeScheduler,
    Trickle,
    check_range_answer,
    publish_interval,
    request_size,
    window_size,
)
from hfship.hub.retry import RetryableError


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))))
def test_intervals_are_a_set_of_integers(spans: Any) -> None:
    have, model = Intervals(), set()
    for start, stop in spans:
        have.add(start, stop)
        model |= set(range(start, stop))
    assert {n for start, stop in have.spans for n in range(start, stop)} == model
    assert have.total == len(model) and have.spans == sorted(have.spans)
    gaps = {n for start, stop in have.missing(70) for n in range(start, stop)}
    assert gaps == set(range(70)) - model
    assert have.prefix == next(n for n in range(80) if n not in model)


@given(
    sizes=st.lists(st.integers(0, 60 << 20), min_size=1, max_size=6),
    workers=st.integers(1, 8),
    seed=st.integers(0, 1 << 30),
)
def test_scheduler_hands_out_every_byte_whatever_fails(
    sizes: List[int], workers: int, seed: int
) -> None:
    """Random speeds, failures, wrong bytes and servers without ranges: everything arrives, no two flights overlap, and
    what a reader may be writing is taken over by nobody."""
    rng = random.Random(seed)
    have = [Intervals([(0, rng.randint(0, size))]) for size in sizes]
    scheduler = RangeScheduler(sizes, have)
    flights: List[Any] = []
    whole: Set[int] = set()  # files of a server without ranges
    given_up: Set[int] = set()
    for turn in range(5000):
        if len(flights) < workers:
            flight = scheduler.next_flight(rng.choice([8 << 20, 64 << 20]), now=turn / 100)
            if flight:
                flight.expect(rng.choice([0.0, 1e6, 50e6]), turn / 100)
                assert (
                    flight.file not in given_up
                    and scheduler.have[flight.file].total < sizes[flight.file]
                )
                flights.append(flight)
                if rng.random() < 0.02:
                    scheduler.without_ranges(flight)
                    whole.add(flight.file)
                    if flight.start > 0:  # all of the file is no answer to it
                        scheduler.land(flight)
                        flights.remove(flight)
                        continue
        if not flights and not given_up:
            break
        for one in flights:
            others = [f for f in flights if f is not one and f.file == one.file not in whole]
            assert all(
                f.position >= one.stop or f.stop <= one.position or not f.left for f in others
            )
            assert all(f.position >= one.granted or f.granted <= one.position for f in others)
        if flights:
            flight = rng.choice(flights)
            upto = scheduler.grant(flight, rng.choice([1 << 10, 1 << 20, 8 << 20]))
            assert flight.position <= upto <= flight.stop
            if rng.random() < 0.9:
                scheduler.advance(flight, rng.randint(1, max(1, upto - flight.position)))
            if flight.left == 0 or rng.random() < 0.05:
                scheduler.land(flight)
                flights.remove(flight)
            elif rng.random() < 0.01:
                scheduler.give_up(flight.file)
                given_up.add(flight.file)
        for file in [file for file in given_up if scheduler.quiet(file)]:
            assert all(flight.file != file for flight in flights)
            scheduler.restart(file)
            given_up.remove(file)
    assert [intervals.total for intervals in scheduler.have] == sizes


def test_the_largest_file_comes_first() -> None:
    """It would end last. Small files wait for their turn."""
    sizes = [3 << 20, 1 << 20, 9 << 20, 5 << 20]
    scheduler = RangeScheduler(sizes, [Intervals() for _ in sizes])
    flights = [scheduler.next_flight(64 << 20) for _ in sizes]
    assert [flight.file for flight in flights if flight] == [2, 3, 0, 1]


@given(st.lists(st.floats(0, 1e10), max_size=200), st.integers(1, 64))
def test_connection_count_stays_within_its_bounds(goodputs: List[float], most: int) -> None:
    count = ConnectionCount(most)
    assert all(1 <= count.tick(goodput) <= most for goodput in goodputs)


@pytest.mark.parametrize(
    "serve, expected",
    [
        (lambda n: n * 10.0, (32, 32)),  # every connection brings more
        (lambda n: min(n, 10) * 10.0, (9, 14)),  # a plateau at ten
        (lambda _: 100.0, (8, 8)),  # one would do: nothing is gained, nothing is lost
        (lambda n: n * 10.0 if n <= 12 else 1.0, (1, 12)),  # a collapse beyond twelve
    ],
)
def test_connection_count_finds_what_is_worth_it(serve: Any, expected: Any) -> None:
    count = ConnectionCount(32)
    history = [count.tick(serve(count.limit)) for _ in range(120)]
    usual = statistics.mode(history[40:])
    assert expected[0] <= usual <= expected[1], history


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["ok", "fault", "refuse", "wrong"])),
        max_size=60,
    )
)
def test_there_is_always_a_source_and_wrong_bytes_end(events: Any) -> None:
    endpoints = EndpointChoice(3)
    for file, event in events:
        place = endpoints.choose(file)
        assert 0 <= place <= endpoints.hub
        if event == "ok":
            endpoints.success(file, place)
        elif event == "fault":
            endpoints.fault(place)
        elif event == "refuse" and place != endpoints.hub:
            endpoints.refuse(file, place)
        elif event == "wrong":
            endpoints.success(file, place)
            endpoints.bytes_were_wrong(file)
            assert endpoints.choose(file) != place or place == endpoints.hub


@pytest.mark.parametrize(
    "serve, has_room",
    [
        (lambda n: n * 10.0, True),
        (lambda n: 80 + (n - 8) * 6.0, True),
        (lambda n: 80 + (n - 8) * 4.0, False),  # they bring more, but less than half of it
        (lambda _: 80.0, False),
    ],
)
def test_a_line_has_room_while_more_connections_bring_what_they_should(
    serve: Any, has_room: bool
) -> None:
    count = ConnectionCount(32)
    assert not count.has_room, "nobody knows yet"
    for _ in range(FIRST_TICKS + 3):
        count.tick(serve(count.limit))
    assert count.has_room == has_room


def test_the_first_ticks_tell_nothing() -> None:
    """A line that fills slowly would make each step up look worth it."""
    count = ConnectionCount(32)
    for goodput in [1.0, 50.0, 100.0, 100.0, 100.0]:
        count.tick(goodput)
    assert count.limit == START_CONNECTIONS and not count.has_room


def test_a_server_without_ranges_sends_all_of_the_file_to_one() -> None:
    """Also when the flight that finds that out does not begin the file."""
    scheduler = RangeScheduler([32 << 20], [Intervals()])
    first, second = scheduler.next_flight(16 << 20), scheduler.next_flight(16 << 20)
    assert first and second and second.start > 0
    scheduler.without_ranges(second)
    scheduler.land(second)
    assert scheduler.next_flight(16 << 20) is None
    scheduler.advance(first, first.left)
    scheduler.land(first)
    whole = scheduler.next_flight(16 << 20)
    assert whole and (whole.start, whole.stop) == (0, 32 << 20)


def test_a_collapse_halves_the_connections_for_good() -> None:
    """Not a dip: only what stays below the share of the best for several ticks."""
    count = ConnectionCount(64)
    for _ in range(20):
        count.tick(count.limit * 10.0)
    before = count.limit
    low = COLLAPSE * before * 10.0 * 0.9
    history = [count.tick(low) for _ in range(COLLAPSE_TICKS)]
    assert history[:-1] == [before] * (COLLAPSE_TICKS - 1) and history[-1] == before // 2
    for _ in range(100):
        assert count.tick(count.limit * 10.0) <= before // 2


ONE_REQUEST = 64 << 20
STEALS = {
    "nobody knows when it is there": (0.0, 0.0, True),
    "it is soon there": (2 * ONE_REQUEST, 0.0, False),
    "it takes long": (ONE_REQUEST / 2, 0.0, True),
    "it is late, and may not come at all": (2 * ONE_REQUEST, 0.51, True),
}


@pytest.mark.parametrize("name", STEALS)
def test_what_is_soon_there_is_taken_over_by_nobody(name: str) -> None:
    """The server has sent much of it already."""
    speed, now, taken_over = STEALS[name]
    scheduler = RangeScheduler([ONE_REQUEST], [Intervals()])
    first = scheduler.next_flight(ONE_REQUEST)
    assert first
    first.expect(speed, 0.0)
    second = scheduler.next_flight(ONE_REQUEST, now)
    assert (second is not None) == taken_over
    assert first.stop == ONE_REQUEST // (2 if taken_over else 1)


@pytest.mark.parametrize(
    "speed, now, size, taken_over",
    [
        (0.0, 0.0, 2 * MIN_SHARE - 1, False),
        (0.0, 0.0, 2 * MIN_SHARE, True),
        (1.0, 0.0, 2 * MIN_STEAL - 1, False),
        (1.0, 0.0, 2 * MIN_STEAL, True),
        (1e9, OVERDUE_S, 2 * MIN_STEAL, False),  # the machine may be busy
        (1e9, 2 * OVERDUE_S, 2 * MIN_STEAL, True),
    ],
)
def test_little_is_taken_over_only_of_what_takes_long(
    speed: float, now: float, size: int, taken_over: bool
) -> None:
    scheduler = RangeScheduler([size], [Intervals()])
    first = scheduler.next_flight(ONE_REQUEST)
    assert first
    first.expect(speed, 0.0)
    assert (scheduler.next_flight(ONE_REQUEST, now) is not None) == taken_over


@pytest.mark.parametrize(
    "left, size, first",
    [
        (1e12, MAX_REQUEST, FIRST_REQUEST),
        (100 << 20, 50 << 20, FIRST_REQUEST),
        (10 << 20, 5 << 20, 5 << 20),
        (1 << 20, MIN_REQUEST, MIN_SHARE),
    ],
)
def test_the_last_requests_are_small(left: float, size: int, first: int) -> None:
    """So that little is taken over from others at the end."""
    assert (request_size(1e12, left), request_size(0.0, left)) == (size, first)


@pytest.mark.parametrize(
    "speed, total, seconds",
    [(0, 10**9, 0.05), (200e6, 10**9, 0.025), (1e9, 10**9, 0.01), (1e9, 10**11, 0.05)],
)
def test_a_kill_loses_a_small_share_of_a_small_download(
    speed: float, total: int, seconds: float
) -> None:
    assert publish_interval(speed, total) == seconds


@pytest.mark.parametrize(
    "speed, request_bytes, window_bytes",
    [
        (0, FIRST_REQUEST, MIN_WINDOW),
        (MIN_REQUEST / REQUEST_SECONDS, MIN_REQUEST, 17476),
        (10 << 20, 30 << 20, 524288),
        (1 << 40, MAX_REQUEST, MAX_WINDOW),
    ],
)
def test_requests_grow_with_the_connection(
    speed: float, request_bytes: int, window_bytes: int
) -> None:
    assert (request_size(speed, 1e12), window_size(speed)) == (request_bytes, window_bytes)


WHOLE, PART = {"Content-Length": "10"}, {"Content-Range": "bytes 4-7/10"}


@pytest.mark.parametrize(
    "status, headers, span, answer",
    [
        (206, PART, (4, 8), True),
        (206, {"Content-Range": "bytes 4-7/*"}, (4, 8), True),
        (206, {**PART, "Content-Encoding": "identity"}, (4, 8), True),
        (206, {**PART, "Content-Encoding": ""}, (4, 8), True),
        (206, {**PART, "Content-Encoding": "gzip"}, (4, 8), "compressed the body"),
        (206, {"Content-Range": "bytes 4-7/11"}, (4, 8), "asked for bytes 4-7/10"),
        (206, {"Content-Range": "bytes 4-8/10"}, (4, 8), "asked for bytes 4-7/10"),
        (206, {"Content-Range": "bytes 3-7/10"}, (4, 8), "asked for bytes 4-7/10"),
        (206, {}, (4, 8), "asked for bytes 4-7/10"),
        (206, {}, (0, 10), "asked for bytes 0-9/10"),
        (200, WHOLE, (0, 10), True),
        (200, {}, (0, 10), True),
        (200, WHOLE, (4, 8), False),
        (200, WHOLE, (0, 8), False),
        (200, WHOLE, (4, 10), False),
        (200, {"Content-Length": "9"}, (0, 10), "answers 200 with 9 bytes of 'no type'"),
        (200, {"Content-Length": "9", "Content-Type": "text/html"}, (0, 10), "of 'text/html'"),
        (416, WHOLE, (4, 8), "answers 416"),
        (204, WHOLE, (0, 10), "answers 204"),
    ],
)
def test_an_answer_is_to_the_question_or_none(
    status: int, headers: Dict[str, str], span: Tuple[int, int], answer: Any
) -> None:
    if isinstance(answer, bool):
        assert check_range_answer(status, headers, *span, 10) is answer
        return
    with pytest.raises(RetryableError, match=answer):
        check_range_answer(status, headers, *span, 10)


# what happens, in order -> who is asked for file 0 then; 0 and 1 are mirrors, 2 is the Hub
CHOICES: Dict[str, Tuple[List[Tuple[Any, ...]], int]] = {
    "the first": ([], 0),
    "a fault is one": ([("fault", 0)] * (FAULTS_PER_STEP - 1), 0),
    "faults in a row": ([("fault", 0)] * FAULTS_PER_STEP, 1),
    "a success between": ([*[("fault", 0)] * 2, ("success", 1, 0), *[("fault", 0)] * 2], 0),
    "a success after": ([*[("fault", 0)] * 5, ("success", 1, 0)], 0),
    "it faltered": ([("fault", 0, True)], 1),
    "both faltered": ([("fault", 0, True), ("fault", 1, True)], 2),
    "all faltered": ([("fault", 0, True), ("fault", 1, True), ("fault", 2, True)], 0),
    "one more than others": (
        [("fault", 0, True)] * 2 + [("fault", 1, True), ("fault", 2, True)],
        1,
    ),
    "it has none": ([("refuse", 0, 0)], 1),
    "it has none of another": ([("refuse", 1, 0)], 0),
    "nobody has it": ([("refuse", 0, 0), ("refuse", 0, 1)], 2),
    "wrong alone": ([("success", 0, 0), ("wrong", 0, {0})], 1),
    "wrong alone, of another": ([("success", 1, 0), ("wrong", 1, {0})], 1),
    "wrong of several": ([("success", 0, 0), ("success", 0, 1), ("wrong", 0, set())], 2),
    "wrong of several, of another": (
        [("success", 1, 0), ("success", 1, 1), ("wrong", 1, set())],
        0,
    ),
    "wrong of the Hub": ([("success", 0, 2), ("wrong", 0, set())], 0),
    "wrong of the Hub and one": ([("success", 0, 2), ("success", 0, 0), ("wrong", 0, set())], 1),
    "wrong, and once more": (
        [("success", 0, 0), ("wrong", 0, {0}), ("success", 0, 1), ("wrong", 0, {1})],
        2,
    ),
    "wrong of nobody": ([("wrong", 0, set())], 0),
}


@pytest.mark.parametrize("name", CHOICES)
def test_who_is_asked_next(name: str) -> None:
    events, asked = CHOICES[name]
    endpoints = EndpointChoice(3)
    assert endpoints.hub == 2
    for event, *details in events:
        if event == "wrong":
            assert endpoints.bytes_were_wrong(details[0]) == details[1]
        else:
            getattr(endpoints, event)(*details)
    assert endpoints.choose(0) == asked
    alone = EndpointChoice(1)
    alone.fault(0, faltered=True)
    assert alone.choose(7) == alone.hub == 0


def test_a_connection_that_hardly_brings_anything_is_told_by_each_stretch_alone() -> None:
    """What it brought before counts as little as what it does not bring."""
    enough = int(TRICKLE_BPS * TRICKLE_S)
    for stretches in (
        [(enough, False), (enough - 1, True), (0, True), (enough, False)],
        [(1000 * enough, False), (enough - 1, True)],
    ):
        trickle = Trickle()
        for count, is_all in stretches:
            assert not trickle.is_all_that_comes(count, TRICKLE_S / 2)
            assert trickle.is_all_that_comes(0, TRICKLE_S / 2) == is_all
    trickle = Trickle()
    assert trickle.is_all_that_comes(2 * enough - 1, 2 * TRICKLE_S)
    assert not trickle.is_all_that_comes(0, TRICKLE_S - 0.5)


def test_after_a_step_back_the_line_is_left_alone_for_a_while() -> None:
    count = ConnectionCount(32)
    history = [count.tick(100.0) for _ in range(2 * HOLD_TICKS + 40)]
    up = START_CONNECTIONS + START_CONNECTIONS // 2
    tried = [tick for tick, limit in enumerate(history) if limit == up]
    assert set(history) == {START_CONNECTIONS, up}
    # Two ticks at each trial: one to settle, one to tell; one more to settle after it.
    assert tried == [
        first + more
        for first in range(FIRST_TICKS, len(history), HOLD_TICKS + 4)
        for more in (0, 1)
        if first + more < len(history)
    ]


@pytest.mark.parametrize("most, steps", [(1, [1]), (3, [3]), (10, [8, 10]), (64, [8, 12, 18, 27])])
def test_half_as_many_more_are_tried_and_never_too_many(most: int, steps: List[int]) -> None:
    count = ConnectionCount(most)
    assert count.limit == steps[0]
    seen = [count.tick(count.limit * 10.0) for _ in range(FIRST_TICKS + 2 * len(steps) - 1)]
    assert list(dict.fromkeys(seen))[: len(steps)] == steps
    assert max(count.tick(count.limit * 10.0) for _ in range(60)) == most
    assert count.limit == most


def test_after_a_collapse_all_is_found_out_anew() -> None:
    count = ConnectionCount(16)
    for _ in range(40):
        count.tick(count.limit * 10.0)
    assert count.limit == 16 and count.has_room
    for _ in range(COLLAPSE_TICKS):
        count.tick(1.0)
    assert (count.limit, count.most, count.has_room) == (8, 8, False)
    # What it brings now is the measure, and it is left alone.
    assert [count.tick(1.0) for _ in range(HOLD_TICKS + 2 * COLLAPSE_TICKS)].count(8) > HOLD_TICKS
    assert count.limit == 8
    alone = ConnectionCount(1)
    for goodput in [100.0] * 10 + [1.0] * 30:
        assert alone.tick(goodput) == 1


def test_a_dip_ends_no_trial() -> None:
    """Bad ticks count in a row."""
    count = ConnectionCount(8)
    for _ in range(10):
        count.tick(100.0)
    for _ in range(3):
        for goodput in [1.0] * (COLLAPSE_TICKS - 1) + [100.0]:
            assert count.tick(goodput) == 8


def test_small_files_have_their_turns() -> None:
    sizes = [20 << 20] + [SMALL_FILE] * 2
    scheduler = RangeScheduler(sizes, [Intervals() for _ in sizes])
    turns = [scheduler.next_flight(1 << 20) for _ in range(2 * SMALL_FILE_TURN)]
    assert [flight and flight.file for flight in turns] == [0, 0, 0, 1, 0, 0, 0, 2]


def test_the_file_with_the_fewest_requests_comes_next() -> None:
    sizes = [20 << 20, 30 << 20]
    scheduler = RangeScheduler(sizes, [Intervals() for _ in sizes])
    flights = [scheduler.next_flight(5 << 20) for _ in range(4)]
    assert [flight and (flight.file, flight.start) for flight in flights] == [
        (1, 0),
        (0, 0),
        (1, 5 << 20),
        (0, 5 << 20),
    ]
    first = flights[0]
    assert first and (first.stop, first.left, first.free) == (5 << 20, 5 << 20, 5 << 20)
    assert scheduler.grant(first, 1 << 20) == first.granted == 1 << 20
    assert first.free == 4 << 20
    assert scheduler.grant(first, 1 << 30) == 5 << 20
    assert scheduler.advance(first, 2 << 20) == 2 << 20 and first.left == 3 << 20
    scheduler.land(first)
    again = scheduler.next_flight(64 << 20)
    assert again and (again.file, again.start, again.stop) == (1, 2 << 20, 5 << 20)


def test_a_short_rest_is_no_request_of_its_own() -> None:
    for size, stop in [((5 << 20) + MIN_REQUEST, (5 << 20) + MIN_REQUEST), ((7 << 20), 5 << 20)]:
        scheduler = RangeScheduler([size], [Intervals()])
        flight = scheduler.next_flight(5 << 20)
        assert flight and flight.stop == stop


def test_what_was_there_is_not_asked_for_and_not_counted_twice() -> None:
    size = 10 << 20
    scheduler = RangeScheduler(
        [size, 0, 5], [Intervals([(2 << 20, 4 << 20)]), Intervals(), Intervals([(0, 5)])]
    )
    first = scheduler.next_flight(64 << 20)
    second = scheduler.next_flight(64 << 20)
    assert first and (first.start, first.stop) == (0, 2 << 20)
    assert second and (second.start, second.stop) == (4 << 20, size)
    scheduler.without_ranges(first)
    assert first.stop == size and not scheduler.quiet(0) and scheduler.quiet(1)
    assert scheduler.advance(first, 3 << 20) == 2 << 20
    assert scheduler.advance(first, size) == 6 << 20
    assert (first.left, second.left) == (0, 0)  # it brings nothing new
    assert scheduler.advance(second, 5) == 0
    for flight in (first, second):
        scheduler.land(flight)
    assert scheduler.quiet(0) and scheduler.next_flight(64 << 20) is None
    assert scheduler.restart(0) == size and scheduler.have[0].total == 0
    whole = scheduler.next_flight(1)
    assert whole and (whole.start, whole.stop) == (0, size)


def test_a_file_that_was_given_up_ends_where_it_is() -> None:
    scheduler = RangeScheduler([20 << 20, 10 << 20], [Intervals(), Intervals()])
    flights = [scheduler.next_flight(5 << 20) for _ in range(4)]
    scheduler.give_up(0)
    lefts = [flight.left for flight in flights if flight]
    assert lefts == [0, 5 << 20, 0, 5 << 20]
    for flight in flights:
        assert flight
        scheduler.land(flight)
    again = [scheduler.next_flight(64 << 20, 0.0) for _ in range(3)]
    assert [flight and flight.file for flight in again] == [1, 1, 1]


@pytest.mark.parametrize(
    "due_in, soon, least",
    [
        (None, False, MIN_SHARE),
        (0.0, True, MIN_SHARE),
        (SOON_S, True, MIN_SHARE),
        (SOON_S + 0.25, False, MIN_STEAL),
        (-OVERDUE_S, False, MIN_SHARE),
        (-2 * OVERDUE_S, False, MIN_STEAL),
    ],
)
def test_when_a_range_is_there(due_in: Any, soon: bool, least: int) -> None:
    flight = Flight(0, 1000, 3000)
    flight.expect(0.0, 8.0)
    assert flight.due_at == float("-inf")
    if due_in is not None:
        flight.expect(1000.0, 8.0)
        assert flight.due_at == 10.0
    now = 10.0 - (due_in or 0.0)
    assert (flight.is_soon_there(now), flight.least_share(now)) == (soon, least)


def test_of_the_ranges_on_their_way_the_largest_rest_is_shared() -> None:
    sizes = [16 << 20, 12 << 20]
    scheduler = RangeScheduler(sizes, [Intervals(), Intervals()])
    first, second = (scheduler.next_flight(64 << 20) for _ in sizes)
    assert first and second
    scheduler.advance(first, 6 << 20)
    scheduler.grant(first, 1 << 20)
    third = scheduler.next_flight(64 << 20)
    assert third and (third.file, third.start, third.stop) == (1, 6 << 20, 12 << 20)
    assert second.stop == 6 << 20
    fourth = scheduler.next_flight(64 << 20)
    assert fourth and fourth.file == 0
    assert (first.stop, fourth.start, fourth.stop) == (fourth.start, (23 << 20) // 2, 16 << 20)
