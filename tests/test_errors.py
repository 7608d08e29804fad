"""Errors: what is said, the exit code, and the next command, on the command line and in JSON."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

from conftest import Program
from hfship.base.errors import (
    COMMAND_NAMES,
    NetworkError,
    UsageError,
    as_typed,
    closest,
    command_line,
    error_fields,
    error_row,
    meant_step,
    nearest,
    with_command,
)
from hfship.base.report import Reporter
from hfship.commands.run import guarded
from hfship.commands.table import COMMANDS


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["nonsense"], 2, "there is no command nonsense\n"),
        (["fetsh", "org/x"], 2, "did you mean fetch?"),
        (["fetch"], 2, "fetch Qwen/Qwen3-8B"),
        (["fetch", "org/x", "--limit-rate", "fast"], 2, "is not a size"),
        (["fetch", "org/x", "--endpoint", "ftp://x"], 2, "not an http"),
        (["fetch", "org/x", "-j", "0"], 2, "--jobs"),
        (["verify", "nowhere.tar.zst"], 5, "nowhere.tar.zst"),
        (["unpack", "nowhere.tar.zst"], 5, "nowhere.tar.zst"),
        (["pack", "nothing"], 5, "nothing"),
        (["serve", "nothing"], 5, "nothing"),
        (["status", "nothing"], 5, "nothing"),
    ],
)
def test_exit_codes(arguments: List[str], code: int, words: str, hfship: Program) -> None:
    assert words in hfship(*arguments, code=code).stderr


def test_every_command_explains_itself(hfship: Program) -> None:
    listing = hfship("--help").stdout
    commands = re.findall(r"^  ([a-z]+) ", listing, re.MULTILINE)
    assert len(commands) >= 10 and "exit codes" in listing
    for command in commands:
        assert "examples:" in hfship(command, "--help").stdout


def test_json_errors_are_events(hfship: Program) -> None:
    done = hfship("verify", "nowhere.tar.zst", "--progress", "json", code=5)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events[-1]["event"] == "error" and events[-1]["exit_code"] == 5 and events[-1]["next"]


CASES: Dict[str, Any] = {  # arguments, environment, exit code
    "NAME is empty": (["pack", ""], {}, 2),
    "rate is no size": (["fetch", "x/y", "--limit-rate", "abc"], {}, 2),
    "models folder is a file": (["verify", "m"], {"HFSHIP_MODELS_DIR": "/dev/null"}, 5),
    "settings are no folder": (["fetch", "x/y", "--dry-run"], {"HF_ENDPOINT": "http://h:abc"}, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_json_errors_are_results(name: str, hfship: Program) -> None:
    arguments, env, code = CASES[name]
    done = hfship(*arguments, "--json", env=env, code=code)
    value = json.loads(done.stdout)
    row = value[0] if isinstance(value, list) else value
    assert row["exit_code"] == code and row["error"]["what"] in done.stderr


def test_what_the_system_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()

    def work() -> int:
        raise PermissionError(13, "Permission denied", b"/m\xff")

    assert guarded(Reporter("none", 0, io.StringIO(), err), work)[0] == 7
    assert "cannot use /m\udcff: permission denied" in err.getvalue()


def test_commands_are_known_by_name() -> None:
    assert tuple(command.name for command in COMMANDS) == COMMAND_NAMES


@pytest.mark.parametrize(
    "called, typed",
    [("/usr/bin/hfship", "hfship"), ("/my \\1/hfship.pyz", "python3 '/my \\1/hfship.pyz'")],
)
def test_next_steps_name_the_program_as_it_was_called(
    called: str, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    text = "no GPU that hfship knows, hfship serves: hfship serve m, or try hfship --help"
    expected = f"no GPU that hfship knows, hfship serves: {typed} serve m, or try {typed} --help"
    assert as_typed(text) == expected
    error = UsageError("x", "hfship serve", "hfship serve m")
    assert error.text().splitlines()[1:] == ["  why   hfship serve", f"  next  {typed} serve m"]
    assert error_fields(error)["next"] == f"{typed} serve m"


@pytest.mark.parametrize(
    "words, code", [("unpack -o out", 5), ("verify", 2), ("push m", 2), ("clean --yes", 2)]
)
def test_an_unset_variable_does_not_mean_the_current_folder(
    words: str, code: int, model: Path, hfship: Program, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    hfship("pack", model, "-o", here, "--name", "m")
    left = here / "x.tar.zst.incomplete"
    left.touch()
    os.utime(left, (0, 0))
    before = sorted(here.iterdir())
    hfship(*words.split(), "", code=code, cwd=here)
    assert sorted(here.iterdir()) == before


STEPS = [
    ("run the same command again", "{typed}"),
    ("run the same command again: it goes on", "{typed}     # it goes on"),
    ("run the same command again; it goes on", "{typed}     # it goes on"),
    ("run the same command again, it goes on", "{typed}     # it goes on"),
    ("run the same command again later", "{typed}     # later"),
    ("run the same command again in 5 min", "{typed}     # in 5 min"),
    ("free space, then run the same command again", "free space, then:\n{typed}"),
    ("do x\nrun the same command again", "do x\n{typed}"),
    ("run the same command again and again", "run the same command again and again"),
    ("the same command with --yes", "{typed} --yes"),
    ("the same command with a for b c", "hfship fetch a"),
    ("hfship list", "hfship list"),
]


@pytest.mark.parametrize("step, shown", STEPS)
def test_the_next_step_is_what_was_typed(step: str, shown: str) -> None:
    typed = "hfship fetch 'b c'"
    assert with_command(step, typed) == shown.format(typed=typed)
    assert with_command(step, "") == step


@pytest.mark.parametrize(
    "word, known, found",
    [
        ("FETSH", ["fetch", "pack"], "fetch"),
        ("qwen3", ["Qwen3", "x"], "Qwen3"),
        ("nowhere", ["other"], ""),
        ("x", [], ""),
    ],
)
def test_a_word_that_is_near_is_proposed(word: str, known: List[str], found: str) -> None:
    assert closest(word, known) == found
    assert nearest(word, known) == (f"; did you mean {found}?" if found else "")
    meant = f"the same command with {found} for {word}"
    assert meant_step(word, known, "step") == (meant if found else "step")


def test_an_error_in_json_has_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/my tools/hfship.pyz"])
    error = NetworkError("no route", "unplugged", "hfship fetch a/b, or hfship --help; hfship that")
    typed = "python3 '/opt/my tools/hfship.pyz'"
    parts = {
        "what": "no route",
        "why": "unplugged",
        "next": f"{typed} fetch a/b, or {typed} --help; hfship that",
    }
    assert error_fields(error) == parts
    assert error_row(error) == {"schema": "hfship-error/1", "error": parts, "exit_code": 8}
    assert command_line("hfship", Path("/a b"), 7) == "hfship '/a b' 7"
