# SPDX-License-Identifier: Apache-2.0
"""Small files that are read whole, and JSON that somebody else may have written.

Promises: only a regular file is read, and never more of it than its reader can need: a FIFO, a
device or a sparse file of terabytes costs nothing. Of JSON no nesting, number or word of it makes
more trouble than a ValueError.
"""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, NoReturn, Union

from hfship.base.below import Refused, open_regular, opened_below
from hfship.base.text import human_bytes

STATE_SIZE = 1 << 20  # bytes; more has no record, lease or plan
LIST_SIZE = 1 << 28  # bytes of what has a line for each file of a model: 500,000 files and more
MOST_VALUES = (
    1 << 21
)  # in a JSON text: each takes some 100 bytes of memory, and as few as 3 of text
DEEPEST = 32  # lists and objects in each other; configurations of models have about 8
_DIGITS = 400  # of a number: those of the largest float; Python 3.8 takes hours for millions


def read_small(path: Path, most: int = STATE_SIZE, or_pipe: bool = False) -> bytes:
    """The content of a regular file of at most `most` bytes, links followed. With `or_pipe` also
    that of a pipe, as `<(command)` of a shell is. Raises OSError."""
    fd = open_regular(path, or_pipe)
    try:
        return read_whole(fd, most, path)
    finally:
        os.close(fd)


def read_below(root: Path, path: str, most: int = STATE_SIZE) -> bytes:
    """The content of a regular file of at most `most` bytes below `root`, where no link is
    followed. Raises OSError."""
    with opened_below(root, path) as fd:
        return read_whole(fd, most, root / path)


def read_whole(fd: int, most: int, path: object = "") -> bytes:
    """What an open file holds, from where it is read next. Raises Refused for more than `most`
    bytes, OSError."""
    pieces: List[bytes] = []
    left = most + 1
    if os.fstat(fd).st_size > most:
        left = 0
    while left:
        piece = os.read(fd, min(left, 1 << 20))
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
        left -= len(piece)

    raise Refused(errno.EFBIG, f"it has more than {human_bytes(most)}", path)


def parse_json(content: Union[str, bytes], deepest: int = DEEPEST) -> Any:
    """The value of a JSON text in UTF-8. Raises ValueError, also for more than `deepest` lists and
    objects in each other, for numbers that are none (NaN) or have no end, and for more than about
    MOST_VALUES values and keys.

    >>> parse_json(b'{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> for text in ("[" * 10**6, "1e999", "NaN", "9" * 5000):
    ...     try:
    ...         parse_json(text)
    ...     except ValueError as exc:
    ...         print(exc)
    it is nested too deep
    1e999 is no number
    NaN is no number
    a number has 5000 digits
    """
    if isinstance(content, bytes):
        content = content.decode("utf-8-sig")
    # Each value but the first follows one of these; those within texts count, too.
    if sum(map(content.count, ",[{:")) >= MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values")
    try:
        value = json.loads(
            content, parse_int=_integer, parse_float=_finite, parse_constant=_no_number
        )
    except RecursionError as exc:
        raise ValueError("it is nested too deep") from exc

    _require_flat(value, deepest)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is no number")
    return number


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _require_flat(value: Any, deepest: int) -> None:
    """Raise ValueError for more than `deepest` lists and objects in each other."""
    level = [value]
    for _ in range(deepest + 1):
        level = [one for one in level if isinstance(one, (dict, list))]
        if not level:
            return
        level = [inner for one in level for inner in _inside(one)]

    raise ValueError("it is nested too deep")


def _inside(value: Union[Dict[str, Any], List[Any]]) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value
