# SPDX-License-Identifier: Apache-2.0
"""`hfship completion`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hfship.base.errors import Exit

if TYPE_CHECKING:
    from hfship.commands.context import Context

SHELLS = ("bash", "zsh", "fish")


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of completion."""
    parser.add_argument("shell", choices=SHELLS, help="your shell")


def cmd_completion(context: Context) -> Exit:
    """Print what makes a shell complete hfship."""
    from hfship.commands.completion_scripts import SCRIPTS

    shell = context.args.shell
    script = SCRIPTS[shell].rstrip("\n")
    context.reporter.result_of(script, {"shell": shell, "script": script})
    return Exit.OK
