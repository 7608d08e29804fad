"""Words of other programs are answered with the right ones, as a command that works.

tests/golden/asked/meant.txt has what is said to each of them; HFSHIP_GOLDEN=write makes it anew.
"""

from __future__ import annotations

import os
import shlex
from typing import Iterator, List

import pytest

from conftest import ROOT
from hfship.base.errors import UsageError
from hfship.base.settings import parse_rate
from hfship.commands.meant import COMMANDS_MEANT, FOR_ALL, FOR_ONE, Meant, file_meant
from hfship.commands.parser import build_parser, parse_words, with_passed_on
from hfship.commands.table import COMMANDS

TYPED = [
    ("fetch a/b --local-dir /mnt", "fetch a/b --output /mnt"),
    ("fetch a/b --local-dir=/mnt", "fetch a/b --output /mnt"),
    ("fetch a/b --max-workers 8 --revision v1", "fetch a/b --jobs 8 --revision v1"),
    *((f"pack m {word} /mnt", "pack m --output /mnt") for word in ("--out", "--outdir", "--dest")),
    ("fetch --resume a/b", "fetch a/b"),
    ("fetch a/b --no-progress=1 --overwrite=true", "fetch a/b --progress none --force"),
    ("fetch a/b --resume-download", "fetch a/b"),
    ("fetch a/b --token hf_SEcret", "fetch a/b --token-file FILE"),
    ("fetch a/b --token=hf_SEcret", "fetch a/b --token-file FILE"),
    ("serve m --tp 2", "serve m --tensor-parallel-size 2"),
    ("serve m --dry-run", "serve m --plan"),
    ("serve m --dry-run --env K=SEcret", "serve --help"),
    ("serve m --tp 2 -- --tp 3", "serve m --tensor-parallel-size 2 -- --tp 3"),
    ("pack m --compress", "pack m --profile smallest"),
    ("push m host:dir --dry-run", "push m host:dir"),
    ("unpack m -d /data", "unpack m --output /data"),
    ("download a/b", "fetch a/b"),
    ("download a/b --local-dir x --token hf_SEcret", "fetch a/b --output x --token-file FILE"),
    ("fetch a/b --max-workers 8 --token hf_SEcret", "fetch a/b --jobs 8 --token-file FILE"),
    ("pull a/b", "fetch a/b"),
    ("ls", "list"),
    ("ps", "status"),
]


@pytest.mark.parametrize("typed, step", TYPED)
def test_what_was_meant_is_the_next_command(typed: str, step: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_words(shlex.split(typed))
    assert refused.value.next_step == f"hfship {step}"
    assert "SEcret" not in refused.value.text()


def answer(line: str) -> str:
    """What is said to a command line, "" where it is none of another program."""
    with pytest.raises(UsageError) as refused:
        parse_words(shlex.split(line))
    error = refused.value
    if "called" not in error.what and "leave it out" not in error.what:
        return ""
    return f"{error.what} | {error.why} | {error.next_step}"


def typed(command: str, option: str, meant: Meant) -> Iterator[str]:
    """An option as people type it; before and behind other words."""
    yield f"{command} {option}=7 m" if meant.value else f"{command} {option} m"
    yield f"{command} m {option} 7 -- {option} 8" if meant.value else f"{command} m {option}"


def test_every_word_of_another_program_is_answered() -> None:
    lines = [f"{word} m n" for word in COMMANDS_MEANT]
    for command, rows in FOR_ONE.items():
        for option, meant in rows.items():
            lines += typed(command, option, meant)
    names = [command.name for command in COMMANDS]
    for option, meant in FOR_ALL.items():
        knows = next(name for name in names if answer(f"{name} {option}"))
        lines += typed(knows, option, meant)
    page = "".join(f"$ {line}\n{answer(line)}\n" for line in lines)
    path = ROOT / "tests" / "golden" / "asked" / "meant.txt"
    if os.environ.get("HFSHIP_GOLDEN") == "write":
        path.write_text(page, encoding="utf-8")
    assert page == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words, files",
    [
        (
            ["o/m", "a.json", "b", "dir/x.GGUF", "[ab]", "a?"],
            ["a.json", "dir/x.GGUF", "[ab]", "a?"],
        ),
        (["o/m", "a.jsonx", "json", "o/n"], []),
        (["o/m.bin"], []),
    ],
)
def test_words_that_are_files_of_the_first(words: List[str], files: List[str]) -> None:
    assert file_meant(words) == ({"o/m": files} if files else {})


def proposals() -> List[str]:
    """Every proposal of the tables, as it would be typed."""
    found = []
    options = {command.name for command in COMMANDS}
    for command, rows in FOR_ONE.items():
        assert command in options
        found += [f"{command} {meant.instead}" for meant in rows.values() if meant.instead]
    return found


def test_every_option_that_is_proposed_exists() -> None:
    parser = build_parser()
    known = {
        name: set(sub._option_string_actions)
        for action in parser._actions
        if isinstance(action.choices, dict)
        for name, sub in action.choices.items()
    }
    for line in proposals():
        command, option = line.split()[:2]
        assert option.partition("=")[0] in known[command], line
    everywhere = set().union(*known.values())
    for meant in FOR_ALL.values():
        assert not meant.instead or meant.instead.partition("=")[0] in everywhere
    for command, rows in FOR_ONE.items():
        assert not set(rows) & known[command], "a row for an option that exists"


def test_every_command_that_is_proposed_exists() -> None:
    names = {command.name for command in COMMANDS}
    assert {meant.split()[0] for meant in COMMANDS_MEANT.values()} <= names
    assert not names & set(COMMANDS_MEANT)


@pytest.mark.parametrize(
    "text, rate",
    [
        ("50MB/s", 50_000_000),
        ("50 MB/s", 50_000_000),
        ("50M", 50_000_000),
        ("1GiB/s", 1 << 30),
        ("512kBps", 512_000),
        ("100", 100),
        ("20m/s", 20_000_000),
    ],
)
def test_a_rate_is_read_as_people_write_it(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["50Mbit/s", "50Mbps", "50Mb/s", "fast", "", "10MB/min", "/s"])
def test_a_rate_in_bits_or_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_rate(text)
    assert refused.value.next_step


def test_serve_passes_on_what_is_vllms() -> None:
    assert with_passed_on(["serve", "m", "--", "--tp", "3"])[-1] == "--extra-arg=3"
