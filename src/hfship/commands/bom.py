# SPDX-License-Identifier: Apache-2.0
"""`hfship bom`: the bill of materials of models, archives and images; also beside an archive."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence, Union

from hfship.base.errors import Exit, HfshipError, IntegrityError, NotFoundError, UsageError
from hfship.base.settings import home_path
from hfship.base.text import counted
from hfship.base.values import replace

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest
    from hfship.commands.context import Context


def bom_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship bom`."""
    add = parser.add_argument
    what = "model, archive or any part of it, folder, or image that was fetched or is in docker"
    add("targets", nargs="*", metavar="NAME|ARCHIVE|DIR|IMAGE", help=what)
    add("--models", dest="models_file", metavar="FILE", help="of all models of this file")
    add("-o", "--output", type=home_path, metavar="FILE", help="write it there (default: stdout)")


def cmd_bom(context: Context) -> Exit:
    """Print one bill of materials, CycloneDX 1.6, of all that is named."""
    args = context.args
    names: List[str] = list(args.targets)
    if args.models_file and context.file and not names:
        names = [model.name for model in context.file.models]
    if not names:
        raise UsageError("nothing to list", "no name is given", "hfship bom NAME")
    manifests = [manifest_named(name, context) for name in names]
    text = bill_text(manifests)

    if not args.output:
        context.reporter.result(text.rstrip("\n"))
        return Exit.OK
    from hfship.base.files import atomic_write

    atomic_write(args.output, text)
    count = counted(len(manifests), "model")
    listed = [manifest.name for manifest in manifests]
    row = {
        "path": str(args.output),
        "models": listed,
    }
    context.reporter.result_of(f"wrote {args.output}: {count}", row)
    return Exit.OK


def manifest_named(name: str, context: Context) -> Manifest:
    """The manifest that a word means: of a model folder, else of an archive, else of an image that
    docker has. Raises NotFoundError, IntegrityError for a damaged one, UsageError for a folder
    without."""
    from hfship.archive.files import find_archives, is_archive_name
    from hfship.archive.opening import open_archive
    from hfship.base.manifest import read_manifest
    from hfship.commands.names import archive_word, find_folder, find_model

    settings = context.settings
    places = [settings.package_dir, settings.transfer_dir]
    folder: Optional[Path] = None
    if not is_archive_name(name):
        folder = find_folder(name, [settings.models_dir, settings.site_models_dir])
    archives = []
    if folder is None or not (folder / ".hfship").is_dir():
        archives = find_archives(archive_word(name, places), places)
    if archives:
        manifest = open_archive(archives[0]).manifest
        if manifest is None:
            raise IntegrityError(f"{archives[0].place} is damaged", "", "hfship verify it")
        return manifest
    try:
        folder = folder or find_model(name, settings, places)
    except NotFoundError:
        held = manifest_in_docker(name)
        if held is None:
            raise
        return held
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(f"{folder} has no manifest", "", "fetch, pack or unpack it first")
    return manifest


def manifest_in_docker(name: str) -> Optional[Manifest]:
    """What stands in the place of a manifest for an image that docker alone has, by its name or
    its ID: without files. None where docker has none, or is not there."""
    from hfship.base.manifest import make_manifest
    from hfship.hub.registry_protocol import SCHEME, parse_reference
    from hfship.serve.docker import inspect_image
    from hfship.serve.engines import facts_in

    try:
        row = inspect_image(name)
        tags = row.get("RepoTags") or [name]
        called = name
        if "@" not in name and not {name, f"{name}:latest"} & {*tags}:  # it is an ID
            called = tags[0]
        reference = parse_reference(f"{SCHEME}{called}")
        facts = facts_in(row, reference)
    except (HfshipError, ValueError, KeyError, TypeError, IndexError):
        return None
    return replace(make_manifest(reference.folder_name, ()), image=facts)


def bill_text(manifests: Sequence[Manifest]) -> str:
    """The bill of some models, by this hfship. Raises OSError where vendor.lock is missing."""
    from hfship import __version__
    from hfship.archive.bom import bill_of

    return bill_of(manifests, __version__, _lock())


def _lock() -> str:
    """The text of vendor.lock: inside hfship.pyz, or at the top of a checkout."""
    from hfship.base.pyz import own_entry, own_file

    top = own_file().parent
    beside = top / "vendor.lock"
    if own_file().name == "hfship.py" and beside.is_file():
        return beside.read_text("utf-8")
    return own_entry("vendor.lock").decode()


def write_beside(
    manifest: Manifest, archive: str, target: Path, key: Union[Path, str, None]
) -> None:
    """Put the bill of a model beside its archive, signed where that is. Raises DiskError,
    UsageError for the key."""
    from hfship.archive.bom import statement_of
    from hfship.archive.files import BOM
    from hfship.archive.signature import SIGNATURE, sign_statement
    from hfship.base.files import atomic_write

    text = bill_text([manifest])
    name = archive + BOM
    atomic_write(target / name, text)
    if key:
        statement = statement_of(name, text.encode())
        atomic_write(target / (name + SIGNATURE), sign_statement(statement, key))
