# SPDX-License-Identifier: Apache-2.0
"""Numbers, times and tables as people read them. Pure."""

from __future__ import annotations

import re
import time
from typing import List, Mapping, Optional, Sequence

GIB = 1 << 30
DAY_S = 86400


# Characters that steer a terminal, or turn the text around them: C0, C1, line separators, and those
# of the directions of writing (Unicode TR 36, "Bidirectional Text Spoofing").
_STEERING = "\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069"
_STEERS_TEXT = re.compile(f"[\x00-\x08\x0b-\x1f{_STEERING}]")
_STEERS_JSON = re.compile(f"[{_STEERING}]")  # JSON escapes C0


def harmless(text: str) -> str:
    """`text` without what would steer a terminal; tabs and line feeds stay.

    >>> harmless("a\\tb\\n\\x1b[2J\\u202e")
    'a\\tb\\n?[2J?'
    """
    return _STEERS_TEXT.sub("?", text)


def harmless_json(text: str) -> str:
    """A JSON text that means the same, with all escaped that would steer a terminal.

    >>> harmless_json('"\\x9b31m"')
    '"\\\\u009b31m"'
    """
    return _STEERS_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def printable(text: str) -> str:
    """`text` on one line, and without characters that steer a terminal.

    >>> printable("a\\n  b \\x1b[2J\\udcff")
    'a | b ?[2J?'
    """
    line = re.sub(r"\s*[\r\n]+\s*", " | ", text.strip())
    if line.isprintable():
        return line
    return "".join(char if char.isprintable() else "?" for char in line)


def utc(at: Optional[float] = None) -> str:
    """A time (seconds since the epoch; None: now) as ISO 8601 in UTC.

    >>> utc(0.5)
    '1970-01-01T00:00:00Z'
    """
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def utc_exact() -> str:
    """The time as ISO 8601 in UTC, with milliseconds: of two fetches, which one came later."""
    now = time.time()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    return f"{seconds}.{int(now * 1000) % 1000:03d}Z"


def human_bytes(count: float) -> str:
    """Bytes for people, in the decimal units that disks and networks are sold in.

    >>> [human_bytes(n) for n in (0, 999, 1000, 29_540_000_000)]
    ['0 B', '999 B', '1.0 kB', '29.5 GB']
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(0, "file"), counted(1, "file"), counted(12, "missing part")
    ('0 files', '1 file', '12 missing parts')
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> [human_seconds(s) for s in (0.02, 0.21, 59.7, 61, 3700)]
    ['less than 0.1 s', '0.2 s', '59.7 s', '1 min 01 s', '1 h 01 min']
    """
    if seconds < 0.1:
        return "less than 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s"

    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"

    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Columns padded to their widest cell.

    Those of numbers (cells that start with a digit, are "-" or empty) are aligned right.

    >>> print(table([["a", "1 B"], ["long", "10 B"]], ["name", "size"]))
    name  size
    a      1 B
    long  10 B
    """
    cells = [list(row) for row in rows]
    has_numbers = [all(_is_number(cell) for cell in column) for column in zip(*cells)]
    if header:
        cells.insert(0, list(header))
        has_numbers = has_numbers or [False] * len(header)

    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = map(_padded, row, widths, has_numbers)
        lines.append("  ".join(padded).rstrip())

    return "\n".join(lines)


def _padded(cell: str, width: int, in_numbers: bool) -> str:
    """A cell as wide as its column; a number in a column of numbers is on the right."""
    if in_numbers and cell[:1].isdigit():
        return cell.rjust(width)
    return cell.ljust(width)


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "-")


def cut(text: str, width: int) -> str:
    """`text` in at most `width` characters, with a mark at its end where some were cut off.

    >>> cut("abcdef", 4), cut("abcd", 4)
    ('abc~', 'abcd')
    """
    if len(text) <= width:
        return text
    return text[: max(width - 1, 0)] + "~"


def narrow_table(
    rows: Sequence[Mapping[str, str]], columns: Sequence[str], optional: Sequence[str], width: int
) -> str:
    """A table of at most `width` characters.

    It leaves out the `optional` columns, one after the other, until it fits; what is still too wide
    is cut, with a mark.

    >>> row = {"name": "a-long-name", "size": "1 B", "note": "all of it"}
    >>> print(narrow_table([row], ["name", "size", "note"], ["note"], 14))
    name      size
    a-long-~   1 B
    """
    shown = [[row[column] for column in columns] for row in rows]
    text = table(shown, columns)
    lines = text.splitlines()
    if max(map(len, lines)) <= width:
        return text
    if optional:
        fewer = [column for column in columns if column != optional[0]]
        return narrow_table(rows, fewer, optional[1:], width)
    fitting = _cut_cells(shown, columns, width)
    return table(fitting, columns)


_NARROWEST = 8  # characters of a column that is cut
_GAP = 2  # between columns


def _cut_cells(rows: Sequence[Sequence[str]], header: Sequence[str], width: int) -> List[List[str]]:
    """The cells with the widest columns cut until all fit, or until none is wide."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    room = width - _GAP * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _NARROWEST:
        widest = widths.index(max(widths))
        widths[widest] -= 1
    cells = []
    for row in rows:
        fitting = map(cut, row, widths)
        cells.append(list(fitting))
    return cells


_LABELLED = re.compile(r"  (why|next|log|took|speed) ")
_CONTINUED = " " * 8  # before lines that go on after a label
_COLUMNS = re.compile(r"\S {2,}(?=\S)")
_COMMAND = re.compile(r"(.*: )?(hfship|python3|docker|cd|awk|curl|ssh|sudo) ")
_LEAST_ROOM = 24  # columns that are worth a column of text


def fitted(text: str, width: int) -> str:
    """What is said, for a terminal: sentences, and the last column of a table, are broken between
    words. Commands, which are behind `next`, stay whole: they may be copied.

    >>> said = "hfship: no model m here\\n  why   looked in one, two and three places"
    >>> print(fitted(said + "\\n  next  hfship fetch ORG/m --output /data/models", 34))
    hfship: no model m here
      why   looked in one, two and
            three places
      next  hfship fetch ORG/m --output /data/models
    """
    lines: List[str] = []
    label = ""
    for line in text.split("\n"):
        found = _LABELLED.match(line)
        if found:
            label = found[1]
        elif not line.startswith(_CONTINUED):
            label = ""
        lines += _fitted_line(line, label, width)
    return "\n".join(lines)


def _fitted_line(line: str, label: str, width: int) -> List[str]:
    """A line, of which `label` is that of its block, as several."""
    if len(line) <= width or label in ("next", "log"):
        return [line]
    if label:
        return _behind(line, len(_CONTINUED), width)
    columns = list(_COLUMNS.finditer(line))
    if not columns:
        return _broken(line, width, "  ")
    return _behind(line, columns[-1].end(), width)


def _behind(line: str, start: int, width: int) -> List[str]:
    """A line whose text from a column on is broken there; a command stays whole, and so does what
    would be squeezed into few columns."""
    said = line[start:]
    room = width - start
    if room < _LEAST_ROOM or _COMMAND.match(said):
        return [line]
    if _COLUMNS.search(said):  # a table
        return [cut(line, width)]
    first, *others = _broken(said, room, "")
    return [line[:start] + first, *(" " * start + other for other in others)]


def _broken(line: str, width: int, indent: str) -> List[str]:
    """One line as several. Its own indentation stays, before `indent` in those that follow."""
    if len(line) <= width:
        return [line]
    import textwrap

    own = line[: len(line) - len(line.lstrip())]
    wrapper = textwrap.TextWrapper(
        width=width,
        initial_indent=own,
        subsequent_indent=own + indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.wrap(line.strip())


def labelled(**rows: str) -> str:
    """Lines with a label each.

    >>> print(labelled(runs_on="CPU"))
      runs on  CPU
    """
    lines = []
    for label, text in rows.items():
        if text:
            lines.append(f"  {label.replace('_', ' '):<8} {text}")
    return "\n".join(lines)


def shorten(items: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """A list for people that does not fill the screen.

    >>> shorten(["a", "b", "c"]), shorten(["a", "b", "c"], 2)
    ('a, b, c', 'a, b, and 1 more')
    """
    shown = list(items[:limit])
    if len(items) > limit:
        shown.append(f"and {len(items) - limit} more")
    return separator.join(shown)


def clock_text(seconds: float) -> str:
    """A duration as a clock shows it.

    >>> [clock_text(s) for s in (0.4, 73, 3600, 90_061)]
    ['0:00', '1:13', '1:00:00', '25:01:01']
    """
    minutes, rest_s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest_s:02d}"
    return f"{minutes}:{rest_s:02d}"


def short_seconds(seconds: float) -> str:
    """A duration in at most seven characters.

    >>> [short_seconds(s) for s in (0.4, 59.9, 61, 3700, 200_000, 1e12)]
    ['0s', '59s', '1m01s', '1h01m', '2d07h', '>999d']
    """
    if seconds >= 1000 * DAY_S:
        return ">999d"
    if seconds < 60:
        return f"{int(seconds)}s"

    minutes, rest_s = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest_s:02d}s"

    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"

    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h"
