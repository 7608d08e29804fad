"""`help`: the texts that travel, and bare `hfship`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT, Program
from hfship.base.errors import Exit, UsageError
from hfship.commands.guide import TOPICS
from hfship.commands.parser import build_parser, with_passed_on
from hfship.commands.table import COMMANDS


def test_the_topics_are_those_that_the_documents_name() -> None:
    named = set(re.findall(r"hfship(?:\.pyz)? help ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"offline", "exit-codes", "runbook", "json", "formats"} == set(TOPICS) >= named


def test_no_words_at_all_print_help(hfship: Program) -> None:
    assert hfship().stdout == hfship("--help").stdout


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_is_printed_from_inside_the_file(
    topic: str, hfship: Program, tmp_path: Path
) -> None:
    said = hfship("help", *topic.split("-"), cwd=tmp_path).stdout
    text = (ROOT / "docs" / TOPICS[topic].file).read_text(encoding="utf-8")
    assert said == re.sub(r"(?<=Bearer )\w+", "***", text)  # as all that looks like a key


@pytest.mark.parametrize("command", ["serve", "list"])
def test_help_of_a_command_is_its_help(command: str, hfship: Program) -> None:
    assert hfship("help", command).stdout == hfship(command, "--help").stdout


def test_other_words_are_refused_with_a_hint(hfship: Program) -> None:
    assert "did you mean runbook?" in hfship("help", "runbok", code=2).stderr
    overview = hfship("help").stdout
    assert all(topic in overview for topic in TOPICS)
    assert all(command.name in overview for command in COMMANDS)


def test_every_exit_code_is_told() -> None:
    told = re.findall(r"(?m)^ {0,2}(\d+) ", (ROOT / "docs/exit-codes.txt").read_text())
    assert [int(code) for code in told] == [int(code) for code in Exit]


@pytest.mark.parametrize("name", ["offline.txt", "exit-codes.txt"])
def test_commands_in_the_texts_are_commands_that_the_parser_takes(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    lines = re.findall(r"(?m)^ +(?:until )?hfship (.*?)(?:;.*|  +#.*)?$", text)
    assert lines
    for line in lines:
        try:
            build_parser().parse_args(list(with_passed_on(shlex.split(line))))
        except (SystemExit, UsageError) as exc:
            pytest.fail(f"{name}: hfship {line}: {exc}")
    assert max(map(len, text.splitlines())) <= 80
