# SPDX-License-Identifier: Apache-2.0
"""`hfship drain` and `undrain`: a host of the site made empty, and given models again.

A host is drained by a file on it, so that every control host knows: DEPLOY_DIR/_site/drained. What
runs there starts on other hosts first; then the gateway sends nothing there any more, and each
model is stopped when its last request is answered.
"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Dict, List, Sequence, Union

from hfship.base.errors import Exit, HfshipError, UsageError, as_typed, command_line
from hfship.base.values import replace
from hfship.commands.hosts import hosts_called
from hfship.commands.hosts_carry import OnHosts, speaker
from hfship.commands.parser import parse_words
from hfship.commands.results import exit_of_list, print_results
from hfship.commands.runs import runs_of
from hfship.commands.serve_hosts import serve_on_hosts
from hfship.commands.table import COMMANDS
from hfship.ops.reach import FarHost, at_once
from hfship.site.facts import DRAINED_FILE

if TYPE_CHECKING:
    from hfship.base.settings import ModelsFile
    from hfship.commands.context import Context
    from hfship.site.hosts import SiteHost


def drain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship drain`."""
    add = parser.add_argument
    add("hosts", nargs="+", metavar="HOST", help="hosts of the models file")
    add("--models", dest="models_file", metavar="FILE", help="models file with the hosts")


def undrain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship undrain`."""
    drain_arguments(parser)


def cmd_drain(context: Context) -> Exit:
    """Move what runs on hosts to others, and leave them empty."""
    result = _mark(context, "touch")
    if result.failures:
        print_results(context, [result])
        return exit_of_list(failure.code for failure in result.failures.values())
    return serve_again(context, [])


def cmd_undrain(context: Context) -> Exit:
    """Let hosts be given models again."""
    result = _mark(context, "rm -f")
    print_results(context, [result])
    if not result.failures and context.file:
        step = as_typed(command_line("hfship", "serve", "--models", context.file.path))
        context.reporter.info(f"  next  {step}     # places models there again")
    return exit_of_list(failure.code for failure in result.failures.values())


def _mark(context: Context, command: str) -> OnHosts:
    """Have the file that drains a host there, or not."""
    file = required_file(context)
    hosts = [FarHost(one, speaker(one.name, context.reporter)) for one in _named(context, file)]

    def mark(host: FarHost) -> List[Dict[str, str]]:
        folder = host.host.folders["deploy_dir"]
        path = shlex.quote(f"{folder}/{DRAINED_FILE}")
        done = host.sh(f"mkdir -p -- {shlex.quote(folder)}/_site && {command} -- {path}")
        if done.code:
            raise host.at(folder).error(done)
        state = "drained" if command == "touch" else "takes models"
        return [{"name": "", "state": state}]

    answers: Dict[str, Union[List[Dict[str, str]], HfshipError]] = at_once(hosts, mark)
    return OnHosts(context.args.command, answers)


def required_file(context: Context) -> ModelsFile:
    """The models file. Raises UsageError where none is given."""
    if context.file is None:
        step = "--models FILE, or export HFSHIP_MODELS_FILE=FILE"
        raise UsageError("the hosts are in a models file, and none is given", "", step)
    return context.file


def _named(context: Context, file: ModelsFile) -> Sequence[SiteHost]:
    return hosts_called(file, context.args.hosts)


def serve_again(context: Context, gone: Sequence[str]) -> Exit:
    """Serve the models file, as `hfship serve` does; copies on hosts that are `gone` elsewhere."""
    file = required_file(context)
    args, given = parse_words(["serve", "--models", str(file.path)])
    args.json = context.args.json
    serving = replace(context, args=args, asked=given)
    command = next(one for one in COMMANDS if one.name == "serve")
    return serve_on_hosts(serving, runs_of(command, serving, file), gone)
