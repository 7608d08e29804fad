"""One parser per call: what it builds, and what is given or a default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Set

import pytest

from conftest import ROOT
from hfship.base.errors import UsageError
from hfship.commands.parser import parse_words
from hfship.commands.table import COMMANDS

ROOMS = {f"hfship.commands.{command.room}" for command in COMMANDS}
IMPORTED = """
import sys
from hfship.commands.run import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(*(name for name in sys.modules if name.startswith("hfship.")))
"""


def rooms_for(words: List[str], folder: Path) -> Set[str]:
    """The rooms of commands that a command line imports."""
    argv = [sys.executable, "-c", IMPORTED, *words]
    env = {"PYTHONPATH": str(ROOT / "src"), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return ROOMS & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words, rooms",
    [
        ("--help", []),
        ("--version", []),
        ("--json", []),
        ("no-command", []),
        ("clean --help", ["clean"]),
        ("version", ["version"]),
        ("watch --once", ["watch"]),
    ],
)
def test_only_the_room_of_the_typed_command_is_imported(
    words: str, rooms: List[str], tmp_path: Path
) -> None:
    expected = {f"hfship.commands.{room}" for room in rooms}
    assert rooms_for(words.split(), tmp_path) == expected


@pytest.mark.parametrize(
    "words, given",
    [
        ("watch", {}),
        ("watch --once", {"once": True}),
        ("watch a b", {"jobs": ["a", "b"]}),
        ("watch --also x a --also y", {"also": ["x", "y"], "jobs": ["a"]}),
        ("watch --progress auto", {"progress": "auto"}),  # its default, but given
    ],
)
def test_what_is_given_is_told_from_defaults(words: str, given: Dict[str, Any]) -> None:
    args, found = parse_words(words.split())
    assert found == {"command": "watch", **given}
    defaults = {"jobs": [], "also": [], "once": False, "interval": None, "progress": "auto"}
    assert {**vars(args), **defaults, **given} == vars(args)


def test_a_second_call_has_defaults_of_its_own() -> None:
    first, _ = parse_words(["watch"])
    first.also.append("x")
    second, _ = parse_words(["watch"])
    assert second.also == []


@pytest.mark.parametrize(
    "words, hint",
    [
        ("fetsh", "did you mean fetch?"),
        ("-o x fetch a/b", "-o stands before the command, and belongs behind it"),
        ("watch --onse", "watch does not know --onse; did you mean --once?"),
        ("watch --interval x", "'x' is not a positive number of seconds"),
    ],
)
def test_wrong_words_are_refused_with_a_hint(words: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_words(words.split())
    assert hint in refused.value.text()


SECRET = "K=SEcret123"


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "m", "--en", SECRET],
        ["serve", "m", f"--en={SECRET}"],
        ["serve", f"--e={SECRET}", "m"],
        ["fetch", "o/m", f"--token={SECRET}"],
        ["fetch", "o/m", f"--token-f={SECRET}"],
        ["mirror", f"--token-fil={SECRET}"],
        ["push", "m", "host:d", "--engin", "x"],
    ],
)
def test_options_have_no_abbreviations(words: List[str]) -> None:
    """Else a secret value would be written down: what hides it knows options by their names."""
    with pytest.raises(UsageError, match="does not know --") as error:
        parse_words(words)
    assert "SEcret123" not in error.value.text()


def test_short_options_still_stand_together() -> None:
    args, _ = parse_words(["serve", "m", "-qv", "--env", SECRET])
    assert args.verbose and args.quiet
    assert args.env == [SECRET]
