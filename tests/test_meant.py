"""Words of other programs are answered with the right ones, as a command that works."""

from __future__ import annotations

import shlex
from typing import List

import pytest

from hfship.base.errors import UsageError
from hfship.base.settings import parse_rate
from hfship.commands.meant import COMMANDS_MEANT, FOR_ALL, FOR_ONE
from hfship.commands.parser import build_parser, parse_words, with_passed_on
from hfship.commands.table import COMMANDS

TYPED = [
    ("fetch a/b --local-dir /mnt", "fetch a/b --output /mnt"),
    ("fetch a/b --local-dir=/mnt", "fetch a/b --output /mnt"),
    ("fetch a/b --max-workers 8 --revision v1", "fetch a/b --jobs 8 --revision v1"),
    *((f"pack m {word} /mnt", "pack m --output /mnt") for word in ("--out", "--outdir", "--dest")),
    ("fetch --resume a/b", "fetch a/b"),
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
