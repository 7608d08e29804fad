"""JSON that somebody else may have written."""

from __future__ import annotations

import json
import sys

import pytest

from hfship.base.reading import DEEPEST, MOST_VALUES, parse_json

SOUND = [
    {"a": [1, 2.5, -3e-7, None, True, "\U0001f600"]},
    [],
    "text",
    10**399,
    sys.float_info.max,
]


@pytest.mark.parametrize("value", SOUND)
def test_what_is_json_is_read(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == value
    assert parse_json("\ufeff".encode() + text.encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        b"\xff\xfe",
        b'"\xc3"',
        "NaN",
        "[-Infinity]",
        '{"a": 1e400}',
        "-" + "9" * 401,
        "9" * 10**6,
        "[" * 10**6,
        '{"a":' * 10**5,
        "[" * 2000 + "]" * 2000,
        "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1),
        '{"a":' * 500 + "1" + "}" * 500,
        "[" + "{}," * MOST_VALUES + "0]",
    ],
)
def test_what_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_depth_is_that_of_lists_and_objects() -> None:
    deepest = "[" * DEEPEST + "]" * DEEPEST
    parse_json(deepest)
    parse_json(f'{{"a": {deepest[1:-1]}}}')
