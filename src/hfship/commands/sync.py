# SPDX-License-Identifier: Apache-2.0
"""`hfship sync`: fetch what is new, see what a site has, pack what it lacks, push that.

Promises: what a site has is asked, not assumed; each step is one of the verbs and resumes as that
does, so a killed sync is gone on with by the same command. Never: changes what is in place there:
that is `unpack --all`, which is named at the end.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple

from hfship.archive.bundle import MODELS_FILE
from hfship.archive.files import archives_in, find_archives, is_delta_name, model_of
from hfship.archive.opening import open_archive
from hfship.archive.versions import version_of
from hfship.base.errors import Exit, IntegrityError, UsageError, command_line
from hfship.base.files import disk_errors
from hfship.base.imagefacts import MANIFEST_JSON, layer_paths
from hfship.base.manifest import read_manifest
from hfship.base.reading import read_small
from hfship.base.settings import home_path
from hfship.base.values import dataclass, replace
from hfship.commands.pack import PackResult, models_to_pack, pack_folder, pack_options
from hfship.commands.parser import parse_words
from hfship.commands.push import limit_bps, ssh_arguments, ssh_command, ssh_typed
from hfship.commands.results import exit_of_list, print_results
from hfship.commands.runs import run_models, runs_of
from hfship.commands.table import COMMANDS
from hfship.ops.sync_plan import DELTA, THERE, SyncStep, plan_image, plan_step

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.manifest import Manifest
    from hfship.base.report import Result
    from hfship.commands.context import Command, Context
    from hfship.ops.destination import Destination


def sync_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship sync`."""
    add = parser.add_argument
    what = "models of the models file, or of the models folder (default: all)"
    add("names", nargs="*", metavar="NAME", help=what)
    add("to", metavar="[USER@]HOST:DIR", help="the transfer folder of the site, by ssh")
    listed = "fetch and bring what this file lists (default: HFSHIP_MODELS_FILE)"
    add("--models", dest="models_file", metavar="FILE", help=listed)
    add("--no-fetch", action="store_true", help="bring what is here, and fetch nothing")
    add("--dry-run", action="store_true", help="say what would travel, and fetch and push nothing")
    signed = "sign archives with this private key (ECDSA)"
    add("--sign", type=home_path, metavar="KEY.pem", help=signed)
    ssh_arguments(parser)


@dataclass(frozen=True)
class SyncedItem:
    """What becomes of a model or image, and the archive of what travels."""

    step: SyncStep
    files: Optional[ArchiveFiles] = None

    def text(self) -> str:
        """`m: commit 0000000 -> 1111111, what is new since: m.delta.tar.zst`"""
        text = self.step.text()
        if self.files:
            text += f": {self.files.name}"
        return text

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "sync"."""
        row = dict(self.step.json())
        row["archive"] = None
        row["bytes"] = 0
        if self.files:
            sizes = [path.stat().st_size for path in self.files.paths]
            row["archive"] = str(self.files.place)
            row["bytes"] = sum(sizes)
        return row


def cmd_sync(context: Context) -> Exit:
    """Bring a site what it lacks."""
    from hfship.ops.destination import connected, parse_destination

    args, reporter = context.args, context.reporter
    to = parse_destination(args.to, ssh_command(args))
    if not to.host:
        what = f"{args.to} is a folder of this machine, which cannot say what a site has"
        step = command_line("hfship", "pack", *(args.names or ["--all"]), "-o", args.to)
        raise UsageError(what, "sync asks the host by ssh", f"for a medium: {step}")
    with reporter.gather_results() as rows:
        codes = [_fetch(context)]
        may_ask = os.isatty(0) and reporter.err.isatty()
        with connected(to, may_ask, reporter) as destination:
            folders = _folders(context)
            steps = _ask(destination, folders, context)
            items = [_packed(folder, run, step, to, context) for folder, run, step in steps]
            rows.clear()
            results: List[Result] = list(items)
            if not args.dry_run:
                results += _pushed(destination, items, context)
        print_results(context, results)
    if any(item.files for item in items):
        unpack = command_line("python3", f"{to.folder}/hfship.pyz", "unpack", "--all", to.folder)
        reporter.then_elsewhere(*ssh_typed(args), to.host, unpack)
    return exit_of_list(codes)


def _command(name: str) -> Command:
    return next(row for row in COMMANDS if row.name == name)


def _run_as(name: str, words: List[str], context: Context) -> Context:
    """The context of another command, as if its words had been typed."""
    args, given = parse_words([name, *words])
    args.json = context.args.json
    return replace(context, args=args, asked=given)


def _fetch(context: Context) -> Exit:
    """Fetch what the models file lists; what fails does not keep the rest from travelling."""
    args = context.args
    if not context.file or args.no_fetch or args.dry_run:
        return Exit.OK
    words = ["--models", str(context.file.path), *args.names]
    return run_models(_command("fetch"), _run_as("fetch", words, context))


def _folders(context: Context) -> List[Tuple[Path, Context]]:
    """The folders of what shall be there, each with the options of `pack` for it."""
    args, file = context.args, context.file
    words = list(args.names)
    if args.sign:
        words += ["--sign", str(args.sign)]
    if file:
        run = _run_as("pack", ["--models", str(file.path), *words], context)
        runs = list(runs_of(_command("pack"), run, file).values())
    else:
        runs = [_run_as("pack", words if args.names else ["--all", *words], context)]
    found = []
    for run in runs:
        every = bool(run.args.all)
        for folder in models_to_pack(run.args.models, every, context.settings):
            found.append((folder, run))
    return found


def _ask(
    to: Destination, folders: List[Tuple[Path, Context]], context: Context
) -> List[Tuple[Path, Context, SyncStep]]:
    """What travels of each, by what the site says that it has."""
    from hfship.ops.far_side import far_manifest, far_stock

    reporter = context.reporter
    if not context.args.dry_run:
        _bring_tool(to, context)
    with reporter.clock(f"asking {to.host} what it has"):
        far = far_stock(to, MODELS_FILE, reporter)
        steps = []
        for folder, run in folders:
            manifest = _manifest_of(folder)
            there = None
            if manifest.image:
                step = plan_image(manifest, _layers_of(folder), far)
            else:
                if manifest.name in far.models:
                    there = far_manifest(to, far.models[manifest.name])
                step = plan_step(manifest, there)
            steps.append((folder, run, step))
    return steps


def _layers_of(folder: Path) -> Sequence[str]:
    """The files of an image's layers. Raises DiskError."""
    path = folder / MANIFEST_JSON
    with disk_errors("read", path):
        return layer_paths(read_small(path))


def _manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        why = "without one nobody knows which version it is"
        step = command_line("hfship", "pack", folder) + "     # writes one"
        raise IntegrityError(f"{folder} has no manifest", why, step)
    return manifest


def _bring_tool(to: Destination, context: Context) -> None:
    """Have hfship.pyz and the models file there, which are asked and which say where models lie."""
    from hfship.archive.sidecars import write_sidecars
    from hfship.base.files import atomic_write, make_dir
    from hfship.ops.push import push, push_file

    folder = make_dir(context.settings.package_dir)
    write_sidecars(folder, context.reporter)
    paths = [folder / "hfship.pyz", folder / "READ-ME-FIRST.txt"]
    if context.file and context.file.path.suffix == ".toml":
        atomic_write(folder / MODELS_FILE, context.file.path.read_bytes())
        paths.append(folder / MODELS_FILE)
    files = [push_file(path, {}) for path in paths if path.is_file()]
    push(to, files, 1, limit_bps(context.args.bwlimit), context.reporter)


def _packed(
    folder: Path, run: Context, step: SyncStep, to: Destination, context: Context
) -> SyncedItem:
    """Pack what travels. Deltas lie in a folder of each site, as each has its own versions."""
    if step.action == THERE or context.args.dry_run:
        return SyncedItem(step)
    target = context.settings.package_dir
    options = pack_options(run.args)
    if step.action == DELTA:
        target = target / "sync" / _slug(to)
        options = replace(options, since=step.since, force=_is_of_another_base(target, step))
    else:
        before = _packed_whole(target, step)
        if before:
            return SyncedItem(step, before)
    context.reporter.info(step.text())
    result = pack_folder(folder, [target], options, run)
    assert isinstance(result, PackResult)
    (files,) = find_archives(str(result.packed.parts[0].path), [])
    return SyncedItem(step, files)


def _packed_whole(folder: Path, step: SyncStep) -> Optional[ArchiveFiles]:
    """The archive of this version that was packed before, in whatever form."""
    for files in archives_in(folder):
        if model_of(files.name) != step.name or not files.is_complete:
            continue
        archive = open_archive(files)
        if archive.damages or archive.delta.absent or archive.manifest is None:
            continue
        wanted = step.version
        version = version_of(archive.manifest)
        if version.id == wanted.id and version.sums == wanted.sums:
            return files
    return None


def _slug(to: Destination) -> str:
    """A folder name for a site."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{to.host}_{to.folder}").strip("_.") or "site"


def _is_of_another_base(folder: Path, step: SyncStep) -> bool:
    """Whether the delta of an earlier sync lies there, since a version that the site no longer
    has: it is made anew."""
    for files in archives_in(folder):
        if model_of(files.name) != step.name or not is_delta_name(files.name):
            continue
        if not files.is_complete:
            continue
        base = open_archive(files).delta.base
        return step.since is None or base != version_of(step.since).id
    return False


def _pushed(to: Destination, items: List[SyncedItem], context: Context) -> Iterator[Result]:
    """Push the archives of what travels, and what travels beside them."""
    from hfship.ops.push import files_to_push, push

    args, reporter = context.args, context.reporter
    archives = [item.files for item in items if item.files]
    if archives:
        files = files_to_push(archives, reporter)
        limit = limit_bps(args.bwlimit)
        yield push(to, files, args.jobs, limit, reporter)
