# SPDX-License-Identifier: Apache-2.0
"""Colours of what is said on a terminal: green for what is well, yellow and red for what is not.

Owns which words have a colour. Promises: a colour adds nothing to the words and takes nothing from
them. Pure; loaded by base/output where there are colours.
"""

from __future__ import annotations

import re
from typing import Match

_END = "\x1b[0m"
_GREEN, _YELLOW, _RED, _BOLD = "32", "33", "31", "1"
_WORDS = {
    _GREEN: "ok|healthy|whole|running|done|works",
    _YELLOW: "warn|loading|degraded|partial|unproven|incomplete|unfinished|interrupted|foreign",
    _RED: "fail|failed|down|unknown|changed|unreadable|missing",
}
_COLOUR_OF = {word: colour for colour, words in _WORDS.items() for word in words.split("|")}
_ANY = "|".join(_COLOUR_OF)
# A state stands at the beginning of a line, or alone in a column of a table.
_STATE = re.compile(rf"(?m)(?:(?<=^)|(?<=  ))(?:{_ANY})(?=:|  |$)")
_ERROR = re.compile(r"(?m)^(hfship:)(?= )")
_WARNING = re.compile(r"(?m)^(warning:)(?= )")
_LABEL = re.compile(r"(?m)^( *)(next)(?=  )")


def coloured(text: str) -> str:
    """`text` with its states, errors and warnings in colour.

    >>> coloured("ok: a.tar.zst")
    '\\x1b[32mok\\x1b[0m: a.tar.zst'
    >>> coloured("the download is done")
    'the download is done'
    """
    text = _STATE.sub(_coloured_state, text)
    text = _ERROR.sub(f"\x1b[{_BOLD};{_RED}m\\1{_END}", text)
    text = _WARNING.sub(f"\x1b[{_YELLOW}m\\1{_END}", text)
    return _LABEL.sub(f"\\1\x1b[{_BOLD}m\\2{_END}", text)


def _coloured_state(found: Match[str]) -> str:
    word = found[0]
    colour = _COLOUR_OF[word]
    return f"\x1b[{colour}m{word}{_END}"
