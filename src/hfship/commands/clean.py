# SPDX-License-Identifier: Apache-2.0
"""`hfship clean`."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

from hfship.base.errors import Exit, HfshipError, UsageError, error_row
from hfship.base.settings import hub_path
from hfship.base.text import counted, human_bytes
from hfship.commands.options import age_s
from hfship.commands.results import confirm, error_of, leftover_row, show_leftovers

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.ops.clean import CleanOptions, Group, Leftover


# What is removed with an option, and nothing else.
_ONLY = {
    "--jobs": "--jobs is for records and logs alone; --log-dir DIR names another folder of them",
    "--images": "--images is for images alone",
    "--kept": "--kept is for versions that unpack kept, in HFSHIP_SITE_MODELS_DIR",
}


def clean_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `clean`."""
    add = parser.add_argument
    folders = "folder of models or archives (default: both of ours)"
    add("folders", nargs="*", metavar="DIR", help=folders)
    cache = "also caches of hf: what is unfinished or unused, Xet chunks"
    add("--cache", action="store_true", help=cache)
    add("--old-revisions", action="store_true", help="with --cache: also revisions without a ref")
    older = "only what is older, like 12h or 7d"
    add("--older-than", type=age_s, default=0, metavar="AGE", help=older)
    jobs = "only records and logs of jobs that have ended, but for those that can be resumed"
    add("--jobs", action="store_true", help=jobs)
    images = "only image folders that were fetched; docker: also its images that nothing uses"
    add("--images", nargs="?", const="folders", choices=("folders", "docker"), help=images)
    kept = "only versions that unpack --all kept: all, or all but the last N of each model"
    add("--kept", nargs="?", const=0, type=int, choices=range(100), metavar="N", help=kept)
    add("--dry-run", action="store_true", help="show what would go")
    add("-y", "--yes", action="store_true", help="do not ask")


def cmd_clean(context: Context) -> Exit:
    """Show what may go and why the rest stays, ask, remove."""
    from hfship.ops.clean import find_groups, freed_by

    _require_one_kind(context.args)
    if context.args.jobs:
        from hfship.commands.clean_jobs import clean_jobs

        return clean_jobs(context)

    if context.args.images:
        from hfship.commands.clean_images import clean_images

        return clean_images(context)

    if context.args.kept is not None:
        from hfship.commands.clean_kept import clean_kept

        return clean_kept(context)

    options = _clean_options(context)
    with context.reporter.clock("looking for leftovers"):
        groups = list(find_groups(options, context.reporter.warn))
    shown = [item for group in groups if not group.kept for item in group.items]
    if context.args.json:
        _clean_as_json(context, options, groups, shown)
        return Exit.OK

    _show(groups, freed_by(shown), context)
    removed: List[Leftover] = []
    _ask_and_remove(context, options, shown, removed)
    if removed:
        freed = human_bytes(freed_by(removed))
        context.reporter.result(f"removed {counted(len(removed), 'file')}, freed {freed}")

    return Exit.OK


def _require_one_kind(args: argparse.Namespace) -> None:
    """Raise UsageError for options that do not count with --jobs, --images or --kept, which would
    be passed over."""
    chosen = {
        "--jobs": args.jobs,
        "--images": args.images is not None,
        "--kept": args.kept is not None,
    }
    kinds = [flag for flag, given in chosen.items() if given]
    if not kinds:
        return
    others = {
        "a folder": bool(args.folders),
        "--cache": args.cache,
        "--old-revisions": args.old_revisions,
        "--older-than": bool(args.older_than) and kinds[0] != "--jobs",
    }
    beside = kinds[1:] + [name for name, given in others.items() if given]
    if beside:
        what = f"{kinds[0]} and {beside[0]} do not go together"
        raise UsageError(what, _ONLY[kinds[0]], f"hfship clean {kinds[0]}")


def _clean_options(context: Context) -> CleanOptions:
    """What is asked for. Raises UsageError."""
    from hfship.ops.clean import CleanOptions

    args, settings = context.args, context.settings
    if args.old_revisions and not args.cache:
        raise UsageError("--old-revisions is for caches", "", "add --cache")
    if "" in args.folders:
        raise UsageError("the name of a folder is empty", "", "hfship clean DIR")

    own = [settings.models_dir, settings.package_dir]
    if args.cache:
        own.append(hub_path(os.environ, "hub", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
        own.append(hub_path(os.environ, "xet", "HF_XET_CACHE"))

    own = [Path(os.path.realpath(path)) for path in own]
    folders = [Path(os.path.realpath(name)) for name in args.folders]
    if not folders:
        folders = [path for path in own if path.is_dir()]
    return CleanOptions(
        folders,
        own,
        args.cache,
        args.old_revisions,
        args.older_than,
    )


def _clean_as_json(
    context: Context, options: CleanOptions, groups: Sequence[Group], shown: Sequence[Leftover]
) -> None:
    """Remove, and print one object that says how far it came, also when an error ends it."""
    from hfship.ops.clean import freed_by

    removed: List[Leftover] = []
    failure: Dict[str, Any] = {}
    try:
        _ask_and_remove(context, options, shown, removed)
    except (HfshipError, KeyboardInterrupt) as exc:
        failure = error_row(error_of(exc))
        raise
    finally:
        result = {
            **failure,
            "schema": context.reporter.schema,
            "leftovers": [row for group in groups for row in _rows(group)],
            "bytes": freed_by(shown),
            "removed": len(removed),
            "freed": freed_by(removed),
        }
        context.reporter.result_json(result)


def _ask_and_remove(
    context: Context, options: CleanOptions, shown: Sequence[Leftover], removed: List[Leftover]
) -> None:
    """Remove what was shown; what went is added to `removed` one by one.

    Looks again before, since somebody may have begun to work there meanwhile. Raises UsageError
    when the operator does not say yes.
    """
    from hfship.ops.clean import find_groups, freed_by, remove_empty_folders, remove_leftover

    if not shown or context.args.dry_run:
        return
    if not context.args.yes:
        confirm(f"remove them and free {human_bytes(freed_by(shown))}?", context.reporter)

    paths = {item.path for item in shown}
    gone: List[Tuple[Leftover, Path]] = []
    with contextlib.closing(find_groups(options)) as groups:
        for group in groups:
            going = [item for item in group.items if item.path in paths and not group.kept]
            for item in going:
                gone.append((item, group.root))
                if remove_leftover(group.root, item):
                    removed.append(item)

    remove_empty_folders(gone)


def _rows(group: Group) -> List[Dict[str, Any]]:
    """A row of the table, and of --json, for each kind of leftover in a group."""
    from hfship.ops.clean import disk_usage

    rows = []
    for what in sorted({item.what for item in group.items}):
        items = [item for item in group.items if item.what == what]
        paths = [str(item.path) for item in items]
        size = disk_usage(items)
        row = leftover_row(str(group.group), what, len(items), size, paths, group.kept)
        rows.append(row)

    return rows


def _show(groups: Sequence[Group], total: int, context: Context) -> None:
    reporter = context.reporter
    for where, why in sorted({(str(group.group), group.kept) for group in groups if group.kept}):
        reporter.info(f"kept: {where}: {why}")

    rows = [row for group in groups for row in _rows(group)]
    show_leftovers(rows, total, context)
