# SPDX-License-Identifier: Apache-2.0
"""`hfship help`: what an operator needs where there is no network, from inside this file.

The texts are those of docs/, which build_zipapp.py puts into hfship.pyz.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Dict, List, NamedTuple

from hfship.base.errors import Exit, UsageError, as_typed, nearest
from hfship.base.pyz import own_document

if TYPE_CHECKING:
    from hfship.commands.context import Context


class Topic(NamedTuple):
    """A text of docs/, and what it is about."""

    file: str
    about: str


TOPICS: Dict[str, Topic] = {
    "offline": Topic("offline.txt", "the far side, from a medium to an answer"),
    "exit-codes": Topic("exit-codes.txt", "what each exit code means, and what to do"),
    "runbook": Topic("runbook.sh", "a script for both sides: exit codes, --json, jq"),
    "json": Topic("json.md", "the results of --json, field by field"),
    "formats": Topic("formats.md", "what lies on disk, byte by byte"),
}
# What people call them besides.
ALSO_CALLED = {"offline-start": "offline", "exit": "exit-codes", "codes": "exit-codes"}


def help_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship help`."""
    about = f"a command, or one of: {', '.join(TOPICS)}"
    parser.add_argument("topic", nargs="*", metavar="TOPIC|COMMAND", help=about)


def cmd_help(context: Context) -> Exit:
    """Print a text, the help of a command, or which there are."""
    words: List[str] = context.args.topic
    name = "-".join(words).lower()
    name = ALSO_CALLED.get(name, name)
    if name in TOPICS:
        text = own_document(TOPICS[name].file).decode("utf-8").rstrip("\n")
    elif name:
        text = _command_help(name)
    else:
        text = _overview()
    context.reporter.result_of(text, {"topic": name, "text": text})
    return Exit.OK


def _command_help(name: str) -> str:
    """The help of a command. Raises UsageError."""
    from hfship.commands.parser import help_of
    from hfship.commands.table import COMMANDS

    names = [command.name for command in COMMANDS]
    if name not in names:
        known = [*TOPICS, *names]
        what = f"there is no help about {name}{nearest(name, known)}"
        why = f"the topics are: {', '.join(TOPICS)}"
        raise UsageError(what, why, "hfship help")
    return help_of(name).rstrip("\n")


def _overview() -> str:
    from hfship.commands.parser import help_of
    from hfship.commands.table import EXIT_CODES

    commands = help_of().replace(EXIT_CODES, "").rstrip("\n")
    lines = [commands, "\nhelp topics, all inside this file:"]
    for name, topic in TOPICS.items():
        lines.append(f"  {as_typed('hfship help')} {name:<10}  {topic.about}")
    return "\n".join(lines)
