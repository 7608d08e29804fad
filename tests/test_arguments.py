# SPDX-License-Identifier: Apache-2.0
"""What every command takes, option by option: tests/golden/arguments holds it.

Shell scripts and models files of operators rely on it: a change is seen in the diff of that folder,
which HFSHIP_GOLDEN=write makes anew.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, List

import pytest

from conftest import ROOT
from hfship.base.errors import HfshipError
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


def takes(action: argparse.Action) -> str:
    """The words that an option takes for its value, and the numbers that it makes of them."""
    taken = []
    assert callable(action.type)
    for word in WORDS:
        try:
            value = action.type(word)
        except (ValueError, argparse.ArgumentTypeError, HfshipError):
            continue
        is_number = isinstance(value, (int, float)) and value < 1e9  # and no time of today
        taken.append(f"{word} ({value:g})" if is_number else repr(word))
    return ", ".join(taken) if len(taken) < len(WORDS) else "anything"


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
    if action.type is not None:
        parts.append(f"takes: {takes(action)}")
    return "  ".join(parts)


def lines_of(command: str) -> List[str]:
    """All that a command takes."""
    parser = command_parser(command)
    groups = [
        f"one of: {', '.join(action.dest for action in group._group_actions)}"
        for group in parser._mutually_exclusive_groups
    ]
    return [described(action) for action in parser._actions if action.dest != "help"] + groups


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_a_command_takes_what_it_took(command: str) -> None:
    lines = lines_of(command)
    path = GOLDEN / f"{command}.txt"
    if os.environ.get("HFSHIP_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == path.read_text(encoding="utf-8").splitlines()
