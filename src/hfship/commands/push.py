# SPDX-License-Identifier: Apache-2.0
"""`hfship push`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence

from hfship.base.errors import Exit, UsageError, command_line
from hfship.base.report import Reporter
from hfship.base.settings import home_path, parse_rate, parse_size
from hfship.base.text import shorten
from hfship.commands.names import archive_word, find_folder, named_archives
from hfship.commands.options import (
    hosts_arguments,
    means_hosts,
    port_number,
    positive_number,
    ssh_option,
)
from hfship.commands.registries import registry_arguments
from hfship.commands.results import print_results
from hfship.commands.runs import no_name_given

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.commands.context import Context
    from hfship.ops.push import PushFile, PushResult


def push_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship push`."""
    add = parser.add_argument
    add(
        "archives",
        nargs="*",
        metavar="ARCHIVE|NAME|DIR",
        help="archive, part, their folder, or NAME",
    )
    add(
        "to",
        metavar="[USER@]HOST:DIR",
        help="where to, by ssh; without HOST: a folder of this machine, with a / if it is new",
    )
    ssh_arguments(parser)
    hosts_arguments(parser, "bring it to the transfer folders")
    group = parser.add_argument_group("registries, docker://REGISTRY/ORG/NAME:TAG")
    forms = "of a model: ModelPack artifact, image to mount, at TAG-image (default: %(default)s)"
    group.add_argument("--form", choices=("artifact", "image", "both"), default="both", help=forms)
    registry_arguments(group)


def ssh_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a way to another host."""
    from hfship.ops.push import PUSH_JOBS

    add = parser.add_argument
    port = "port of ssh (default: as in ~/.ssh/config)"
    add("-p", "--port", dest="ssh_port", type=port_number, metavar="N", help=port)
    add(
        "-i",
        "--identity",
        metavar="FILE",
        help="private key for ssh (default: those that ssh finds)",
    )
    add(
        "--ssh-option",
        dest="ssh_options",
        type=ssh_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of ssh_config(5), like ProxyJump=gate; can be given again",
    )
    add(
        "--bwlimit", metavar="RATE", help="bytes per second of all, like 20M; plain numbers are KiB"
    )
    what = "files at once (default: %(default)s)"
    add("-j", "--jobs", type=positive_number, default=PUSH_JOBS, metavar="N", help=what)


def cmd_push(context: Context) -> Exit:
    """Push archives with what travels beside them."""
    from hfship.archive.files import merged
    from hfship.ops.destination import connected, parse_destination
    from hfship.ops.push import files_to_push, push

    args, reporter = context.args, context.reporter
    if means_hosts(args):
        from hfship.commands.hosts_carry import push_to_hosts

        return push_to_hosts(context, _archives_to_push(context), limit_bps(args.bwlimit))
    if args.to.startswith("docker://"):
        from hfship.commands.push_registry import push_to_registry

        return push_to_registry(context)
    _require_target(context)
    to = parse_destination(args.to, ssh_command(args))
    limit = limit_bps(args.bwlimit)
    archives = merged(_archives_to_push(context))
    files = files_to_push(archives, reporter)
    may_ask = os.isatty(0) and reporter.err.isatty()
    with connected(to, may_ask, reporter) as destination:
        result = push(destination, files, args.jobs, limit, reporter)
        logs = _noted(archives, result, context)
        if logs:  # once more, with what has just been noted: too little for a bar of its own
            push(destination, logs, 1, limit, Reporter("none", -1))
        print_results(context, [result])

    context.reporter.then_elsewhere(*_words_there(result, ssh_typed(args)))
    return Exit.OK


def _noted(
    archives: Sequence[ArchiveFiles], result: PushResult, context: Context
) -> List[PushFile]:
    """Note in the logs of custody that archives were pushed; the logs, to be pushed again."""
    from hfship.archive.custody import CUSTODY
    from hfship.archive.opening import open_archive
    from hfship.base.errors import IntegrityError
    from hfship.commands.record import recorder_of
    from hfship.ops.push import push_file

    found: List[PushFile] = []
    recorder = recorder_of(context)
    if not recorder.policy.custody:
        return found
    for files in archives:
        log = files.folder / (files.name + CUSTODY)
        try:
            manifest = open_archive(files).manifest
        except IntegrityError:  # some of its parts are elsewhere
            manifest = None
        if manifest is None or not log.is_file():
            continue
        details = {"to": str(result.to), "bytes": result.size}
        recorder.note_beside(files, "pushed", manifest, details)
        found.append(push_file(log, {}))
    return found


def _words_there(result: PushResult, ssh: Sequence[str]) -> List[str]:
    """The command that comes next where the archives are now: it proves them on a disk of this
    machine; on another host it unpacks, with the hfship.pyz that travelled along if it did."""
    from hfship.archive.files import is_archive_name

    names = [pushed.file.name for pushed in result.files]
    pushed_archives = filter(is_archive_name, names)
    archives = dict.fromkeys(re.sub(r"\.\d{4,}$", "", name) for name in pushed_archives)
    paths = [f"{result.to.folder}/{name}" for name in archives]
    if not result.to.host:
        return ["hfship", "verify", *paths]
    program = ["hfship"]
    if "hfship.pyz" in names:
        program = ["python3", f"{result.to.folder}/hfship.pyz"]
    return [*ssh, result.to.host, command_line(*program, "unpack", *paths)]


def ssh_typed(args: argparse.Namespace) -> List[str]:
    """ssh as one would type it, with the options that were given."""
    words = ["ssh"]
    for option in args.ssh_options:
        words += ["-o", option]
    if args.ssh_port:
        words += ["-p", str(args.ssh_port)]
    if args.identity:
        words += ["-i", str(home_path(args.identity))]
    return words


def _require_target(context: Context) -> None:
    """Raise UsageError where what to push is given, but not where to; or where to, but not what."""
    from hfship.archive.files import find_archives
    from hfship.ops.destination import is_destination

    args = context.args
    places = _places(context)
    is_named = bool(find_archives(archive_word(args.to, places), places))
    if args.archives and (is_destination(args.to) or not is_named):
        return
    if is_destination(args.to) and not is_named:
        raise no_name_given("push", context)

    words = command_line("hfship", "push", *args.archives, args.to)
    why = f"{args.to} is the last word, and it is what to push"
    raise UsageError("no target is given", why, f"{words} [USER@]HOST:DIR   or a folder")


def _places(context: Context) -> List[Path]:
    """The folders in which archives are looked for."""
    return [context.settings.package_dir, context.settings.transfer_dir]


def ssh_command(args: argparse.Namespace) -> List[str]:
    """The command line of ssh as the options ask for it, without the host. The first value that ssh
    gets for an option counts."""
    from hfship.ops.destination import SSH_OPTIONS

    ssh = ["ssh"]
    for option in args.ssh_options:
        ssh += ["-o", option]
    ssh += SSH_OPTIONS
    if args.ssh_port:
        ssh += ["-p", str(args.ssh_port)]
    if args.identity:
        ssh += ["-i", str(home_path(args.identity))]
    return ssh


def limit_bps(bwlimit: Optional[str]) -> int:
    """Bytes per second of a --bwlimit; 0 without one. Raises UsageError.

    >>> limit_bps("20M"), limit_bps("100")
    (20000000, 102400)
    """
    if not bwlimit:
        return 0
    if bwlimit.isdigit():  # as rsync reads it
        return parse_size(f"{bwlimit}KiB")
    return parse_rate(bwlimit)


def _archives_to_push(context: Context) -> List[ArchiveFiles]:
    """The archives that are named. Raises NotFoundError, with the command that packs a model."""
    from hfship.archive.bundle import archives_meant

    places = _places(context)
    found: List[ArchiveFiles] = []
    for name in archives_meant(context.args.archives):
        step = "give a path, or pack it first"
        if find_folder(name, [context.settings.models_dir]):
            step = command_line("hfship", "pack", name)
        found += _first_of_name(name, named_archives(name, places, step), context.reporter)

    return found


def _first_of_name(
    argument: str, found: List[ArchiveFiles], reporter: Reporter
) -> List[ArchiveFiles]:
    """The archives that an argument means; of a NAME the first one, others are named."""
    first = found[0]
    if "/" in argument or first.folder == Path(argument):
        return found
    others = [str(files.place) for files in found[1:]]
    if others:
        reporter.info(f"{argument}: {first.place}, not {shorten(others)}: name these to push them")
    return [first]
