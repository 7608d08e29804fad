# SPDX-License-Identifier: Apache-2.0
"""What every command takes, option by option, and a models file, key by key: tests/golden/arguments
holds it.

Shell scripts and models files of operators rely on it: a change is seen in the diff of that folder,
which HFSHIP_GOLDEN=write makes anew.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest

from conftest import ROOT
from hfship.base.errors import HfshipError
from hfship.base.modelsfile import Key
from hfship.commands.modelskeys import models_schema
from hfship.commands.parser import command_parser
from hfship.commands.table import COMMANDS

GOLDEN = ROOT / "tests" / "golden" / "arguments"
# What an option makes of these tells its type.
WORDS = (
    "",
    "-1",
    "0",
    "0.5",
    "1",
    "70000",
    "20M",
    "10m",
    "90%",
    "a",
    "a=b",
    "a/b",
    "10.0.0.1",
    "k=\n",
)
# And what a key of a models file makes of these, by its kind.
VALUES: Dict[str, Sequence[Any]] = {
    "string": (
        *WORDS,
        "1KiB",
        "64MiB",
        "65MiB",
        "4GiB",
        "5GiB",
        "1023",
        "1024",
        "30d",
        "d",
        "30x",
        "6/min",
        "6/h",
        "2030-01-31",
        "10.0.0.1/24",
        "/d",
        "/d/../e",
        "/d e",
        "d/",
        "a@b:1",
        "k'",
        'k"',
        "k\\",
        "linux/arm64",
        "docker://a:1",
        "org/m@main",
        "x" * 16,
    ),
    "integer": (-1, 0, 1, 8, 64, 65, 65_535, 65_536, 100_000, 100_001),
    "number": (-1, 0, 0.5, 1, 1.5),
    "array": ([], ["a"], ["a", 1], [1, 0], [0, 0], ["all"], ["models", "gateway"], ["org"]),
    "object": ({}, {"a": "b"}, {"a": 1}, {"a b": "c"}, {"a": "b c"}, {"a": [1]}),
}
REFUSES = (ValueError, argparse.ArgumentTypeError, HfshipError)


def takes(read: Callable[[Any], Any], words: Sequence[Any]) -> str:
    """The words that an option takes for its value, and the numbers that it makes of them."""
    taken, refused = [], []
    for word in words:
        try:
            value = read(word)
        except REFUSES:
            refused.append(repr(word))
            continue
        is_number = isinstance(value, (int, float)) and value < 1e9  # and no time of today
        is_read = isinstance(word, str) and is_number
        taken.append(f"{word} ({value:g})" if is_read else repr(word))
    if not refused:
        return "anything"
    return ", ".join(taken) if len(taken) < 3 * len(refused) else f"all but {', '.join(refused)}"


def described(action: argparse.Action) -> str:
    """An option in one line; what Pythons say in different ways is left out."""
    kind = type(action).__name__.strip("_").replace("Action", "").lower()
    default: Any = action.default
    if "one per core" in (action.help or ""):
        default = "cores"
    parts = [", ".join(action.option_strings) or f"<{action.metavar}>", kind, f"dest={action.dest}"]
    facts = {"nargs": action.nargs, "const": action.const, "default": default}
    parts += [f"{name}={value!r}" for name, value in facts.items() if value is not None]
    if action.option_strings and action.required:
        parts.append("required")
    if action.option_strings and action.metavar:
        parts.append(f"metavar={action.metavar}")
    if action.choices is not None:
        choices = list(action.choices)
        if isinstance(action.choices, range):
            choices = [choices[0], "to", choices[-1]]
        parts.append(f"choices={' '.join(map(str, choices))}")
    if callable(action.type):
        parts.append(f"takes: {takes(action.type, WORDS)}")
    return "  ".join(parts)


def lines_of(command: str) -> List[str]:
    """All that a command takes."""
    parser = command_parser(command)
    groups = [
        f"one of: {', '.join(action.dest for action in group._group_actions)}"
        for group in parser._mutually_exclusive_groups
    ]
    return [described(action) for action in parser._actions if action.dest != "help"] + groups


def keys_of(key: Key, path: str = "") -> Iterator[str]:
    """The keys of a models file in one line each, those of tables behind them."""
    for name, inner in key.inside.items():
        here = f"{path}.{name}".lstrip(".")
        parts = [here, inner.kind, inner.about and "described"]
        if inner.choices:
            parts.append(f"choices={' '.join(map(str, inner.choices))}")
        elif inner.kind in VALUES and not inner.inside:
            parts.append(f"takes: {takes(inner.read, VALUES[inner.kind])}")
        yield "  ".join(filter(None, parts))
        yield from keys_of(inner, here)


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_a_command_takes_what_it_took(command: str) -> None:
    require_kept(f"{command}.txt", lines_of(command))


def test_a_models_file_takes_what_it_took() -> None:
    require_kept("models-file.txt", list(keys_of(models_schema())))


def require_kept(name: str, lines: Sequence[str]) -> None:
    """Nothing changed but by intention."""
    path = GOLDEN / name
    if os.environ.get("HFSHIP_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert list(lines) == path.read_text(encoding="utf-8").splitlines()
