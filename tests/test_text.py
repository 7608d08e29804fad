"""Texts for people: tables and sentences that fit, and colours."""

from __future__ import annotations

import io
import re
from typing import Dict, List

import pytest

from hfship.base.colours import coloured
from hfship.base.report import Reporter
from hfship.base.text import fitted, narrow_table, table, utc_exact

ROWS = [{"name": "model", "size": "10 B", "note": "a long note", "when": "now"}]
COLUMNS = ["name", "size", "note", "when"]


@pytest.mark.parametrize(
    "width, header",
    [
        (80, "name   size  note         when"),
        (30, "name   size  note         when"),
        (29, "name   size  when"),
        (17, "name   size  when"),
        (16, "name   size"),
        (5, "name   size"),  # no more may be left out
    ],
)
def test_a_narrow_table_leaves_out_what_may_be_missed(width: int, header: str) -> None:
    lines = narrow_table(ROWS, COLUMNS, ["note", "when"], width).splitlines()
    assert lines[0] == header and len(lines) == 2


def test_the_exact_time_sorts_as_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = [1769860800.0, 1769860800.004, 1769860800.25, 1769860801.0]
    said = []
    for moment in moments:
        monkeypatch.setattr("hfship.base.text.time.time", lambda moment=moment: moment)
        said.append(utc_exact())
    assert said[0] == "2026-01-31T12:00:00.000Z" and said[2] == "2026-01-31T12:00:00.250Z"
    assert said == sorted(said) and len({*said}) == 4


LONG = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    "said, lines",
    [
        ("short", ["short"]),
        ("a sentence that is wider than it may be here", ["a sentence that is wider than it", "  may be here"]),
        ("a https://example.org/a/very/long/address/of/it", ["a", "  https://example.org/a/very/long/address/of/it"]),
        (f"  why   {LONG}", ["  why   one two three four five", "        six seven eight nine ten"]),
        (f"  why   x\n        {LONG}", ["  why   x", "        one two three four five", "        six seven eight nine ten"]),
        (f"  next  hfship {LONG}", [f"  next  hfship {LONG}"]),
        (f"  next  x\n        hfship {LONG}", ["  next  x", f"        hfship {LONG}"]),
        (f"  log   /{LONG}", [f"  log   /{LONG}"]),
        ("  why   there is:\n        tiny  1.0 MB  whole  /data/models", ["  why   there is:", "        tiny  1.0 MB  whole  /d~"]),
        (f"ok  x  {LONG}", ["ok  x  one two three four five", "       six seven eight nine ten"]),
        (f"  try  awk {LONG}", [f"  try  awk {LONG}"]),
        ("0123456789  0123456789  squeezed in here", ["0123456789  0123456789  squeezed in here"]),
    ],
)  # fmt: skip
def test_what_is_said_fits_the_terminal(said: str, lines: List[str]) -> None:
    assert fitted(said, 32).splitlines() == lines
    assert fitted(said, 200) == said


def test_words_are_neither_lost_nor_added() -> None:
    for width in range(10, 80):
        for said in (LONG, f"  why   {LONG}", f"ok  x  {LONG}"):
            assert fitted(said, width).split() == said.split()
            assert max(map(len, fitted(said, width).splitlines())) <= max(width, 31) or width < 32


@pytest.mark.parametrize(
    "said, colours",
    [
        ("ok: a.tar.zst", ["32"]),
        ("warn  docker  x", ["33"]),
        ("  tiny  healthy  http://x", ["32"]),
        ("  tiny  9.2 MB  changed", ["31"]),
        ("hfship: no", ["1;31"]),
        ("warning: x\n  next  hfship list", ["33", "1"]),
        ("it is done, and ok", []),
        ("unpacked /a/ok: 2 files", []),
    ],
)
def test_states_have_colours(said: str, colours: List[str]) -> None:
    shown = coloured(said)
    assert re.findall(r"\x1b\[([\d;]+)m(?=\w)", shown) == colours
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == said


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "mode, env, is_coloured",
    [
        ("auto", {}, True),
        ("auto", {"NO_COLOR": "1"}, False),
        ("auto", {"TERM": "dumb"}, False),
        ("always", {"NO_COLOR": "1"}, True),
        ("never", {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    mode: str, env: Dict[str, str], is_coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    out, err = Terminal(), io.StringIO()
    reporter = Reporter("none", 0, out, err)
    reporter.set_colour(mode)
    reporter.result("ok: \x1b[2J it")
    reporter.warn("x")
    assert out.getvalue() == ("\x1b[32mok\x1b[0m: ?[2J it\n" if is_coloured else "ok: ?[2J it\n")
    assert ("\x1b" in err.getvalue()) == (mode == "always")


def test_numbers_are_aligned_right_where_the_whole_column_is_of_numbers() -> None:
    rows = [["7", "7 B", "-"], ["12", "unknown", "120"]]
    assert table(rows) == " 7  7 B      -\n12  unknown  120"
