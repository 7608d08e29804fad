# SPDX-License-Identifier: Apache-2.0
"""`hfship unpack`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Callable, List, Sequence, Tuple

from hfship.base.errors import UsageError
from hfship.base.settings import home_path
from hfship.commands.names import archive_word
from hfship.commands.options import (
    add_jobs_option,
    add_key_option,
    hosts_arguments,
    means_hosts,
)
from hfship.commands.results import each_of
from hfship.commands.unpacking import UnpackResult, restore_of, unpack_opened

if TYPE_CHECKING:
    from hfship.base.errors import Exit
    from hfship.base.report import Reporter, Result
    from hfship.commands.context import Context
    from hfship.commands.restore import NamedModel, Restore, Restored


def unpack_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship unpack`."""
    add = parser.add_argument
    what = "archive, any part, their folder, NAME, or - for a pipe"
    add("archives", nargs="*", metavar="ARCHIVE|PART|NAME|-", help=what)
    where = "where NAME/ appears (default: HFSHIP_SITE_MODELS_DIR, /data/models/huggingface)"
    add("-o", "--output", type=home_path, metavar="DIR", help=where)
    add("--name", help="name of the folder (default: as in the archive)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="restore only these files; repeatable",
    )
    add("--consume", action="store_true", help="remove parts as their files are safe, to save room")
    add("--wait", action="store_true", help="ask for media with missing parts, and wait for them")
    add_key_option(parser)
    add(
        "--base",
        type=home_path,
        metavar="DIR",
        help="an older version with files that a delta leaves out",
    )
    new = "all that is new in these folders, in order: images, models, deltas"
    add("--all", action="store_true", help=new)
    kept = "earlier versions that stay, for serve --rollback (default: 1 with --all, else 0)"
    add("--keep", type=int, choices=range(100), metavar="N", help=kept)
    add("--dry-run", action="store_true", help="with --all: say what is new, and do nothing")
    add("--force", action="store_true", help="replace a folder that has files of its own")
    add("--allow-older", action="store_true", help="go back to an older version of the model")
    where = "where images go: docker, podman or ctr (default: docker; with -o into a folder)"
    add("--engine", choices=("docker", "podman", "ctr"), help=where)
    add_jobs_option(parser)
    hosts_arguments(parser, "unpack what push brought there")


def cmd_unpack(context: Context) -> Exit:
    """Unpack the models of the archives that are named, one after another; goes on after one that
    cannot be unpacked."""
    from hfship.archive.bundle import archives_meant
    from hfship.commands.restore import models_named, open_model

    args, settings, reporter = context.args, context.settings, context.reporter
    require_sensible(args)
    if means_hosts(args):
        from hfship.commands.hosts_carry import unpack_on_hosts

        return unpack_on_hosts(context)
    if args.all:
        from hfship.commands.update import take_all

        return take_all(context)
    places = [settings.transfer_dir, settings.package_dir]
    how = restore_of(context)
    finished: List[Restored] = []
    meant = archives_meant(args.archives)
    names = [archive_word(name, places) for name in meant]
    if args.consume:
        names, finished = without_consumed(names, places, how, reporter)
    models = models_named(names, places)
    if args.name and len(models) > 1:
        raise UsageError("--name is for one archive", "", "unpack them one by one")

    def unpack(model: NamedModel) -> Result:
        return unpack_opened(model, open_model(model, how, reporter), how, context)

    works: List[Tuple[str, Callable[[], Result]]] = []
    for model in models:
        works.append((model.name, partial(unpack, model)))
    for restored in finished:
        works.append((restored.done.folder.name, partial(UnpackResult, restored.done)))
    return each_of(context, works)


def require_sensible(args: argparse.Namespace) -> None:
    """Raise UsageError for options that make no sense together."""
    if args.dry_run and not args.all:
        step = "hfship verify ARCHIVE says what unpack would take of one"
        raise UsageError("--dry-run is for --all", "", step)
    for flag in ("name", "only", "base"):
        if args.all and getattr(args, flag):
            why = "--all takes each model as it is, under its own name"
            raise UsageError(f"--{flag} is for one archive", why, f"leave --{flag} or --all out")


def without_consumed(
    arguments: Sequence[str], places: Sequence[Path], how: Restore, reporter: Reporter
) -> Tuple[List[str], List[Restored]]:
    """The arguments that mean archives to unpack; and the models whose archives an earlier run
    consumed, after the rest of these was removed. Raises as finish_consumed."""
    from hfship.archive.consumed import find_consumed
    from hfship.archive.files import find_archives
    from hfship.commands.restore import finish_consumed

    left: List[str] = []
    finished: List[Restored] = []
    for argument in arguments:
        consumed = find_consumed(argument, places, how.out)
        finished += [finish_consumed(one, how, reporter) for one in consumed]
        if not consumed or find_archives(argument, places):
            left.append(argument)
    return left, finished
