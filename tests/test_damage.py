# SPDX-License-Identifier: Apache-2.0
"""How damage is told, and when two pieces of it are one."""

from __future__ import annotations

import random
from typing import Tuple

import pytest

from hfship.archive.damage import Damage, FileRange, merge_adjacent


@pytest.mark.parametrize(
    ("before", "after", "continues"),
    [
        (("a", 0, 9), ("a", 10, 12), True),
        (("a", 0, 9), ("b", 10, 12), False),
        (("a", 0, 9), ("a", 9, 12), False),
        (("a", 0, 9), ("a", 11, 12), False),
        (("a", 0, -1), ("a", 0, 5), True),
    ],
)
def test_ranges_of_a_file_that_adjoin(
    before: Tuple[str, int, int], after: Tuple[str, int, int], continues: bool
) -> None:
    assert FileRange(*after).continues(FileRange(*before)) is continues


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (Damage("is odd"), "is odd"),
        (Damage("is odd", 12), "is odd"),
        (Damage("is odd", 0, 30), "bytes 0-29 of the archive: is odd"),
        (Damage("is odd", None, 30), "is odd"),
        (Damage("is odd", frames=(3, 3)), "frame 3: is odd"),
        (Damage("is odd", frames=(3, 5)), "frames 3-5: is odd"),
        (Damage("is odd", parts=("p", "q")), "p, q: is odd"),
        (
            Damage("is odd", 5, 1, (1, 2), ("p",), (FileRange("a", 0, -1),)),
            "p, frames 1-2, bytes 5-5 of the archive: is odd; hits a",
        ),
    ],
)
def test_damage_in_words(damage: Damage, text: str) -> None:
    assert damage.text() == text


def bad(first: int, last: int, what: str = "bad", part: str = "p", path: str = "a") -> Damage:
    hit = FileRange(path, 10 * first, 10 * last + 9)
    return Damage(what, 10 * first, 10 * (last - first + 1), (first, last), (part,), (hit,))


@pytest.mark.parametrize(
    ("before", "after", "continues"),
    [
        (bad(1, 2), bad(3, 3), True),
        (bad(1, 2), bad(4, 4), False),
        (bad(1, 2), bad(2, 3), False),
        (bad(1, 2), bad(3, 3, "other"), False),
        (Damage("bad"), bad(3, 3), False),
        (bad(1, 2), Damage("bad"), False),
    ],
)
def test_damage_that_goes_on(before: Damage, after: Damage, continues: bool) -> None:
    assert after.continues(before) is continues


def test_adjoining_damage_is_one_and_what_has_no_place_comes_last() -> None:
    """In the order of the archive, whatever the order in which it was found."""
    pieces = [
        Damage("part", 0, 50, (), ("p",)),
        bad(0, 0),
        bad(1, 2, part="q"),
        bad(3, 3, path="b"),
        bad(5, 5),
        bad(6, 6, "other"),
        Damage("odd"),
        Damage("lost", frames=(9, 9)),
    ]
    hits = (FileRange("a", 0, 29), FileRange("b", 30, 39))
    expected = [
        Damage("part", 0, 50, (), ("p",)),
        Damage("bad", 0, 40, (0, 3), ("p", "q"), hits),
        bad(5, 5),
        bad(6, 6, "other"),
        Damage("odd"),
        Damage("lost", frames=(9, 9)),
    ]
    chance = random.Random(7)
    for _ in range(20):
        chance.shuffle(pieces)
        assert merge_adjacent(pieces) == expected


def test_files_between_which_something_is_whole_stay_two_places() -> None:
    one = Damage("bad", 0, 10, (1, 1), (), (FileRange("a", 0, 4), FileRange("a", 6, 9)))
    two = Damage("bad", 10, 10, (2, 2), (), (FileRange("a", 10, 19), FileRange("c", 0, 3)))
    (found,) = merge_adjacent([two, one])
    assert found.files == (FileRange("a", 0, 4), FileRange("a", 6, 19), FileRange("c", 0, 3))
