# SPDX-License-Identifier: Apache-2.0
"""--hosts of `push` and `unpack`: archives to all hosts, and into their folders of models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Sequence, Union

from hfship.archive.files import PART_NAME, merged, model_of
from hfship.base.errors import Exit, HfshipError, UsageError, error_row
from hfship.base.text import counted, human_bytes, table
from hfship.base.values import dataclass
from hfship.commands.hosts import chosen_hosts
from hfship.commands.results import exit_of_list, print_results
from hfship.ops.bring import bring
from hfship.ops.inventory import failure_lines
from hfship.ops.push import files_to_push
from hfship.ops.reach import FarHost, at_once, rows_of

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.report import Reporter
    from hfship.commands.context import Context

_TIME = re.compile(r"^\d\d:\d\d:\d\dZ ")
# Options of unpack that mean the same there.
_FLAGS = ("all", "dry_run", "consume", "force", "allow_older")


def push_to_hosts(context: Context, archives: Sequence[ArchiveFiles], limit_bps: int) -> Exit:
    """Bring archives to all hosts that are meant; `limit_bps` as for push."""
    args, reporter = context.args, context.reporter
    if args.ssh_port or args.identity or args.ssh_options:
        what = "--port, --identity and --ssh-option are for one host"
        raise UsageError(what, "", "set port, key and jump of each [[host]]")
    files = files_to_push(merged(archives), reporter)
    hosts = talking_hosts(chosen_hosts(context), reporter)
    result = bring(hosts, files, args.jobs, limit_bps, reporter)
    print_results(context, [result])
    return exit_of_list(failure.code for failure in result.failures.values())


def talking_hosts(hosts: Sequence[FarHost], reporter: Reporter) -> List[FarHost]:
    """The hosts, with what they say told under their names."""
    return [FarHost(host.host, speaker(host.name, reporter)) for host in hosts]


def speaker(name: str, reporter: Reporter) -> Callable[[str], None]:
    """Tells what a host says, under its name."""

    def say(line: str) -> None:
        line = _TIME.sub("", line)  # each line has ours
        if not line.startswith("  "):  # what comes next there, and where its log is
            reporter.info(f"{name}: {line}")

    return say


def unpack_on_hosts(context: Context) -> Exit:
    """Unpack archives on all hosts that are meant, each by its own hfship."""
    args = context.args
    words = ["unpack", *map(word_there, args.archives), *_options_there(context)]
    hosts = talking_hosts(chosen_hosts(context), context.reporter)
    answers = at_once(hosts, lambda one: one.asked(*words))
    result = OnHosts("unpack", answers)
    print_results(context, [result])
    return exit_of_list(failure.code for failure in result.failures.values())


def word_there(word: str) -> str:
    """The word that means an archive in the transfer folder of a host.

    >>> word_there("/media/usb/m.tar.zst.0001"), word_there("org/m")
    ('m', 'org/m')
    """
    name = Path(word).name
    part = PART_NAME.match(name)
    if part:
        name = part["archive"]
    if part or Path(word).exists() or ".tar" in name:
        return model_of(name)
    return word


def _options_there(context: Context) -> List[str]:
    args = context.args
    words = [f"--{name.replace('_', '-')}" for name in _FLAGS if getattr(args, name)]
    for glob in args.only:
        words += ["--only", glob]
    if args.engine:
        words += ["--engine", args.engine]
    if args.keep is not None:
        words += ["--keep", str(args.keep)]
    for name in ("output", "base", "name", "wait"):
        if getattr(args, name):
            raise UsageError(f"--{name} is for one host", "", "leave it out, or run it there")
    return words


def on_hosts_json(command: str, answers: Mapping[str, Union[Any, HfshipError]]) -> Dict[str, Any]:
    """What a command came to on each host, for --json."""
    hosts: List[Dict[str, Any]] = []
    for name, answer in answers.items():
        results = rows_of(answer)
        code = Exit.OK
        if isinstance(answer, HfshipError):
            results, code = [error_row(answer)], answer.code
        hosts.append({"host": name, "exit_code": int(code), "results": results})
    return {"schema": "hfship-hosts/1", "command": command, "hosts": hosts}


@dataclass(frozen=True)
class OnHosts:
    """What a command came to on each host: the JSON of its result there, or the error."""

    command: str
    answers: Mapping[str, Union[Any, HfshipError]]

    @property
    def failures(self) -> Dict[str, HfshipError]:
        """The errors."""
        return {n: one for n, one in self.answers.items() if isinstance(one, HfshipError)}

    def text(self) -> str:
        """A line for each host, and one for all."""
        rows = []
        for name, answer in self.answers.items():
            if isinstance(answer, HfshipError):
                rows.append([name, "failed", "", ""])
            for row in rows_of(answer):
                rows.append([name, *_cells(row)])
        good = len(self.answers) - len(self.failures)
        summary = f"{self.command}: {good} of {counted(len(self.answers), 'host')} ok"
        return "\n".join([table(rows), *failure_lines(self.failures), summary])

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "hosts"."""
        return on_hosts_json(self.command, self.answers)


def _cells(row: Mapping[str, Any]) -> List[str]:
    size = row.get("bytes")
    amount = ""
    if isinstance(size, int):
        amount = human_bytes(size)
    return [str(row.get("name") or row.get("reference") or ""), str(row.get("state", "")), amount]
