# SPDX-License-Identifier: Apache-2.0
"""Values in a config.json, which anybody may have written: numbers, tables and names, as far as
they are believed. Pure; what is none is 0 or empty."""

from __future__ import annotations

import math
from typing import Any, Mapping

_MOST_NUMBER = 10**18
_MOST_WORD = 200  # characters of a name


def word_in(value: object) -> str:
    """A name that a config gives, "" for what cannot be one: no text, or one that cannot be shown.

    >>> word_in("Qwen3ForCausalLM"), word_in("\\ud800"), word_in("a\\nb"), word_in(None)
    ('Qwen3ForCausalLM', '', '', '')
    """
    if isinstance(value, str) and value.isprintable() and len(value) <= _MOST_WORD:
        return value
    return ""


def number_in(config: Mapping[str, Any], *keys: str) -> int:
    """The first of `keys` that holds a positive whole number, at most 10**18, else 0.

    >>> number_in({"a": None, "b": "8", "c": True, "d": 8}, "a", "b", "c", "d")
    8
    """
    for key in keys:
        value: Any = config.get(key)
        if type(value) in (int, float) and 0 < value < math.inf and value == int(value):
            return min(int(value), _MOST_NUMBER)
    return 0


def table_in(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The first of `keys` that holds a table, else an empty one.

    >>> table_in({"a": 1, "b": {"c": 2}}, "a", "b")
    {'c': 2}
    """
    for key in keys:
        value: Any = config.get(key)
        if isinstance(value, dict):
            return value
    return {}
