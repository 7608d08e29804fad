# SPDX-License-Identifier: Apache-2.0
"""`hfship pack`."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence

from hfship.base.content import is_work_folder
from hfship.base.errors import UsageError, as_typed, command_line
from hfship.base.files import atomic_write, disk_errors
from hfship.base.manifest import MANIFEST_PATH, parse_manifest, read_manifest
from hfship.base.reading import LIST_SIZE, read_small
from hfship.base.settings import home_path
from hfship.base.text import counted, human_bytes, human_seconds
from hfship.base.values import dataclass, replace
from hfship.commands.admission import admit, code_rows, site_policy
from hfship.commands.approving import carry_signatures
from hfship.commands.bom import write_beside
from hfship.commands.names import find_model, named_archives
from hfship.commands.options import add_jobs_option, signing_key
from hfship.commands.record import recorder_of
from hfship.commands.results import each_of
from hfship.commands.runs import no_name_given

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.pack import Packed
    from hfship.archive.pack_plan import PackOptions, PackPlan
    from hfship.archive.reader import Archive
    from hfship.base.errors import Exit
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter, Result
    from hfship.base.settings import Settings
    from hfship.commands.context import Context


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship pack`."""
    from hfship.archive.pack_plan import PROFILES, parse_split

    add = parser.add_argument
    what = "model in the models folder, or any folder; an archive to cut or to join"
    add("models", nargs="*", metavar="NAME|DIR|ARCHIVE", help=what)
    add("--all", action="store_true", help="every model in the models folder")
    where = "where NAME.tar.zst appears (default: HFSHIP_PACKAGE_DIR, ~/transfer_package)"
    add("-o", "--output", type=home_path, metavar="DIR", help=where)
    split = "cut into parts: fat32, dvd, bd25, bd50, or e.g. 8G"
    add("--split", type=parse_split, metavar="MEDIUM|SIZE", help=split)
    add("--join", action="store_true", help="make one file of the parts of an archive")
    media = "medium for parts; repeat for the next ones"
    add("--to", type=home_path, action="append", default=[], metavar="DIR", help=media)
    profile = "smallest: floats as byte planes; store: no compression (default: %(default)s)"
    add("--profile", choices=PROFILES, default="standard", help=profile)
    add(
        "--level",
        type=int,
        default=1,
        choices=range(1, 20),
        metavar="1-19",
        help="zstd level (default: 1)",
    )
    add(
        "--since",
        metavar="MANIFEST|ARCHIVE|DIR",
        help="leave out files that this version has: a delta",
    )
    sign = "sign with this private key (ECDSA), or pkcs11:URI of one that stays in its token"
    add("--sign", type=signing_key, metavar="KEY.pem", help=sign)
    with_image = "also the image that serves it, and what makes a delivery of both"
    add("--with-image", nargs="?", const="", metavar="IMAGE", help=with_image)
    add("--name", help="name of the model in the archive (default: as in its manifest)")
    add("--force", action="store_true", help="replace an archive of the same name")
    add("--dry-run", action="store_true", help="say what would be written")
    add_jobs_option(parser)


@dataclass(frozen=True)
class PlannedPack:
    """What --dry-run says would be packed into a folder."""

    plan: PackPlan
    folder: Path

    def text(self) -> str:
        """`would pack NAME: 3 files, 1.2 GB, into DIR/NAME.tar.zst, at most 1.3 GB`"""
        manifest = self.plan.manifest
        files = counted(len(manifest.files), "file")
        content = f"{files}, {human_bytes(manifest.size)}"
        archive = self.folder / self.plan.archive
        most = human_bytes(self.plan.size_at_most)
        return f"would pack {manifest.name}: {content}, into {archive}, at most {most}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "pack"."""
        plan = self.plan
        return {
            "name": plan.manifest.name,
            "state": "planned",
            "archive": str(self.folder / plan.archive),
            "bytes_in": plan.manifest.size,
            "bytes_out_at_most": plan.size_at_most,
            "parts_at_most": plan.parts_at_most,
        }


@dataclass(frozen=True)
class PackResult:
    """A model that was packed, or was there already."""

    packed: Packed

    @property
    def ratio(self) -> float:
        """Bytes of the archive for each byte of the model."""
        packed = self.packed
        return packed.size / max(packed.manifest.size, 1)

    def text(self) -> str:
        """`packed NAME: DIR/NAME.tar.zst (1.2 GB, 70.1 % of 1.7 GB) in 3 s`"""
        packed = self.packed
        where = str(packed.parts[0].path)
        if len(packed.parts) > 1:
            more = counted(len(packed.parts) - 1, "more part")
            where = f"{where} and {more}"
        share = f"{100 * self.ratio:.1f} % of {human_bytes(packed.manifest.size)}"
        amounts = f"{human_bytes(packed.size)}, {share}"
        how = ", was packed already"
        if packed.fresh:
            how = f" in {human_seconds(packed.seconds)}"
        if packed.replaced:
            how += f"; replaces {packed.replaced.short}"
        return f"packed {packed.manifest.name}: {where} ({amounts}){how}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "pack"."""
        packed = self.packed
        parts = []
        for part in packed.parts:
            row = {"path": str(part.path), "size": part.size, "sha256": part.sha256}
            parts.append(row)
        return {
            "name": packed.manifest.name,
            "state": "packed" if packed.fresh else "already packed",
            "replaces": packed.replaced.id if packed.replaced else None,
            "parts": parts,
            "bytes_in": packed.manifest.size,
            "bytes_out": packed.size,
            "ratio": round(self.ratio, 4),
            "seconds": round(packed.seconds, 2),
            "license": packed.manifest.licence,
            "code_files": code_rows(packed.manifest),
        }


def cmd_pack(context: Context) -> Exit:
    """Pack models, one after another; goes on after one that cannot be packed."""
    args = context.args
    archives = archives_to_recut(args, context.settings)
    if archives:
        return each_of(
            context, [(files.name, partial(recut_archive, files, context)) for files in archives]
        )

    if not args.models and not args.all:
        raise no_name_given("pack", context)
    folders = models_to_pack(args.models, args.all, context.settings, context.reporter.warn)
    if args.name and len(folders) > 1:
        raise UsageError("--name is for one model", "", "pack them one by one")

    targets = target_folders(args, context.settings)
    options = pack_options(args)
    if args.with_image is not None and not args.dry_run:
        return pack_deliveries(folders, targets, options, context)
    works = [
        (folder.name, partial(pack_folder, folder, targets, options, context)) for folder in folders
    ]
    code = each_of(context, works)
    if not args.dry_run:
        carry_models_file(targets, context)
        remind_of_image(folders, targets, context)
    return code


def carry_models_file(targets: Sequence[Path], context: Context) -> None:
    """Put the models file beside the archives: the far side serves by it. Raises DiskError."""
    from hfship.archive.bundle import MODELS_FILE

    file = context.file
    if file is None or file.path.suffix != ".toml":
        return
    content = _content_of(file.path)
    for target in targets:
        atomic_write(target / MODELS_FILE, content)


def remind_of_image(folders: Sequence[Path], targets: Sequence[Path], context: Context) -> None:
    """Say that the image has to cross, too, where none lies with what is packed."""
    from hfship.commands.bundles import has_image

    models = [folder for folder in folders if not (folder / "oci-layout").exists()]
    if not models or len(models) < len(folders):
        return
    if has_image(targets, context.settings):
        return
    step = command_line("hfship", "pack", *(folder.name for folder in models[:3]), "--with-image")
    context.reporter.info(as_typed(f"the far side needs an image of vLLM, too: {step}"))


def pack_deliveries(
    folders: Sequence[Path], targets: Sequence[Path], options: PackOptions, context: Context
) -> Exit:
    """Pack models and the images that serve them, and what makes deliveries of these.

    Raises NotFoundError for a model whose image is not here.
    """
    from hfship.commands.bundles import finish_bundles, image_folder

    wanted = context.args.with_image
    images = {folder: image_folder(wanted, folder, context.settings) for folder in folders}
    packed: Dict[Path, Packed] = {}

    def pack(folder: Path) -> Result:
        run = context
        if folder not in images:  # --name and --since are for the model
            values = {**vars(context.args), "name": None, "since": None}
            run = replace(context, args=argparse.Namespace(**values))
        result = pack_folder(folder, targets, options, run)
        assert isinstance(result, PackResult)
        packed[folder] = result.packed
        return result

    everything = dict.fromkeys([*images.values(), *folders])
    code = each_of(context, [(folder.name, partial(pack, folder)) for folder in everything])
    pairs = []
    for folder, image in images.items():
        if folder in packed and image in packed:
            pairs.append((packed[folder], packed[image]))
    for path in finish_bundles(pairs, targets, context):
        context.reporter.info(
            f"{path}: model, image and hfship.pyz; there: hfship serve {path.name}"
        )
    return code


def pack_folder(
    folder: Path, targets: Sequence[Path], options: PackOptions, context: Context
) -> Result:
    """Pack the model in a folder into the first of `targets`, parts also into the others; sign it
    if asked for. With --dry-run say what would be done.

    Raises as cached_model, manifest_to_pack, plan_pack, sign_manifest and pack_model.
    """
    from hfship.archive.pack import pack_model
    from hfship.archive.pack_manifest import cached_manifest, manifest_to_pack
    from hfship.archive.pack_plan import plan_pack
    from hfship.archive.signature import SIGNATURE, sign_manifest
    from hfship.hub.cache import cached_model

    args, reporter = context.args, context.reporter
    policy = site_policy(context)
    first, *others = targets
    keep = not args.dry_run
    cached = cached_model(folder, context.settings.endpoint)
    if cached:
        folder = cached.folder
        manifest = cached_manifest(cached, args.name, options.jobs, reporter, args.force)
        manifest = admit(folder, manifest, policy, reporter)
    else:

        def accept(manifest: Manifest) -> Manifest:
            return admit(folder, manifest, policy, reporter)

        manifest = manifest_to_pack(
            folder, args.name, options.jobs, reporter, keep, args.force, accept
        )
    if manifest.image:  # its layers are compressed
        options = replace(options, profile="store")
    if args.since:
        options = replace(options, since=manifest_since(args.since, manifest, context))
    plan = plan_pack(folder, manifest, options)
    if args.dry_run:
        return PlannedPack(plan, first)

    recorder = recorder_of(context)
    recorder.note_scans(folder, recorder.scan(folder), manifest)

    signature = None
    if args.sign:
        signature = sign_manifest(manifest, args.sign)  # a wrong key is said before the work
    packed = pack_model(plan, first, reporter, others)
    reporter.then("verify", packed.parts[0].path.parent / plan.archive)
    if args.sign and packed.manifest != manifest:  # that of an archive that was there before
        signature = sign_manifest(packed.manifest, args.sign)
    for target in targets:
        if signature is not None:
            atomic_write(target / (plan.archive + SIGNATURE), signature)
        carry_signatures(folder, packed.manifest, plan.archive, target)
        if policy.bom:
            write_beside(packed.manifest, plan.archive, target, args.sign)
    carry_custody(folder, targets, plan, packed, context)
    return PackResult(packed)


def carry_custody(
    folder: Path, targets: Sequence[Path], plan: PackPlan, packed: Packed, context: Context
) -> None:
    """Put the log of custody beside an archive, where it is new or has none yet."""
    from hfship.archive.custody import CUSTODY

    name = plan.archive
    is_there = all((target / (name + CUSTODY)).exists() for target in targets)
    if is_there and not packed.fresh:
        return
    details = {"archive": name, "parts": len(packed.parts), "bytes": packed.size}
    if context.args.sign:
        from hfship.archive.signature import read_key

        details["signed"] = read_key(context.args.sign, private=True).fingerprint
    recorder_of(context).carry_to_archive(folder, targets, name, packed.manifest, details)


def recut_archive(files: ArchiveFiles, context: Context) -> Result:
    """Cut an archive into parts, or join these, beside it or where it is asked for.

    Raises as `recut`; ForeignArchive for one of another program.
    """
    from hfship.archive.recut import RecutOptions, recut

    args, reporter = context.args, context.reporter
    targets = target_folders(args, context.settings)
    if not args.to and not args.output:
        targets = [files.folder]
    options = RecutOptions(args.split, args.force, read_back=bool(args.to))
    packed = recut(files, targets, options, reporter)
    reporter.then("verify", packed.parts[0].path)
    return PackResult(packed)


# -- what was asked for


def archives_to_recut(args: argparse.Namespace, settings: Settings) -> List[ArchiveFiles]:
    """The archives that are named, to be cut or joined; none where models are to be packed.

    Raises NotFoundError, UsageError for archives and models in one call, and for what cannot be
    asked for of an archive.
    """
    from hfship.archive.files import is_archive_name, merged

    named = [name for name in args.models if args.join or is_archive_name(name)]
    if not named:
        return []

    found: List[ArchiveFiles] = []
    for name in named:
        places = [settings.package_dir, settings.transfer_dir]
        step = "give the path of NAME.tar.zst or of any part"
        found += named_archives(name, places, step)
    if len(named) < len(args.models):
        raise UsageError("archives and models are packed one by one", "", "name one kind only")
    if args.split is None and not args.join:
        what = f"{found[0].path} is packed already"
        cut = command_line("hfship", "pack", found[0].path)
        step = f"to cut it: {cut} --split fat32\nto join its parts: {cut} --join"
        raise UsageError(what, "", step)

    _require_no_more(args)
    return merged(found)


def _require_no_more(args: argparse.Namespace) -> None:
    """Refuse what cannot be asked for of an archive that is cut or joined. Raises UsageError."""
    if args.join and args.split is not None:
        raise UsageError("--split cuts, --join makes one file", "", "give one of them")
    for flag in ("since", "sign", "name", "dry_run"):
        if getattr(args, flag):
            option = "--" + flag.replace("_", "-")
            what = f"{option} is for models: an archive is cut or joined as it is"
            raise UsageError(what, "", f"leave {option} out")


def models_to_pack(
    names: Sequence[str],
    every: bool,
    settings: Settings,
    complain: Callable[[str], None] = lambda _: None,
) -> List[Path]:
    """The folders of the models that are named; with `every` and no names, of all complete ones in
    the models folder that may be read. Raises UsageError when there are none."""
    if names:
        return [find_model(name, settings) for name in names]

    found = []
    if every and settings.models_dir.is_dir():
        for path in sorted(settings.models_dir.iterdir()):
            if not _is_readable(path):
                complain(f"{path} is left out: permission denied")
                continue
            complete = (path / MANIFEST_PATH).is_file() and not is_work_folder(path.name)
            if complete:
                found.append(find_model(str(path), settings))
    if not found:
        step = f"name a model in {settings.models_dir}, or a folder"
        raise UsageError("nothing to pack", "", step)
    return found


def _is_readable(folder: Path) -> bool:
    """May we look into a folder, and read its manifest if it has one?"""
    if not folder.is_dir():
        return True
    manifest = folder / MANIFEST_PATH
    if not os.access(folder, os.R_OK | os.X_OK):
        return False
    return os.access(manifest, os.R_OK) or not os.path.lexists(manifest)


def target_folders(args: argparse.Namespace, settings: Settings) -> List[Path]:
    """Where the archive is written: one folder, or with --to several media. Raises UsageError."""
    media: List[Path] = args.to
    if not media:
        return [args.output or settings.package_dir]
    if args.output or not args.split:
        step = "give --split, and --to for each medium instead of -o"
        raise UsageError("--to is for parts on several media", "", step)
    return media


def pack_options(args: argparse.Namespace) -> PackOptions:
    """How to pack, but for --since, which differs from model to model."""
    from hfship.archive.pack_plan import PackOptions

    return PackOptions(
        split=args.split,
        level=args.level,
        jobs=args.jobs,
        force=args.force,
        profile=args.profile,
        read_back=bool(args.to),  # media are removable, and may lie
    )


def _content_of(path: Path) -> bytes:
    with disk_errors("read", path):
        return read_small(path, LIST_SIZE)


def manifest_since(place: str, model: Manifest, context: Context) -> Manifest:
    """The manifest that --since means for a model: by its own path, by archives, or by a model
    folder.

    Of several archives the newest one that carries another version than the model has now, so that
    the same command can run again. Raises UsageError when there is none, NotFoundError,
    IntegrityError for one that is not valid.
    """
    from hfship.archive.files import find_archives

    path = Path(place)
    if path.is_file() and path.suffix == ".json":
        return parse_manifest(_content_of(path), place)

    settings = context.settings
    step = "name a manifest.json, an archive or a model folder"
    places = [settings.package_dir, settings.transfer_dir]
    found = find_archives(place, places)
    if found:
        manifest = _newest_of(found, model, context.reporter)
    else:
        folder = find_model(place, settings, places, step)
        manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(f"{place} has no manifest", "", step)
    return manifest


def _newest_of(
    found: Sequence[ArchiveFiles], model: Manifest, reporter: Reporter
) -> Optional[Manifest]:
    """The newest manifest in archives of a model, but for the version that the model has itself;
    None where they have none. Of several it is said which."""
    from hfship.archive.versions import Lineage, version_of
    from hfship.commands.restore import found_archive

    archives = _archives_of(model.name, found)
    if len(archives) < 2:
        return next((archive.manifest for archive in archives), None)

    carried = [found_archive(archive) for archive in archives]
    lineage = Lineage(carried)
    present = version_of(model)
    candidates = [number for number, one in enumerate(carried) if one.version.id != present.id]
    if not candidates:
        candidates = list(range(len(carried)))
    newest = max(candidates, key=lambda number: lineage.rank(carried[number].version))
    reporter.info(f"{model.name}: what changed since {carried[newest].text()}")
    return archives[newest].manifest


def _archives_of(name: str, found: Sequence[ArchiveFiles]) -> List[Archive]:
    """The archives that carry a model of that name, or any model if none does, less those without
    a manifest that can be read."""
    from hfship.archive.files import model_of
    from hfship.archive.opening import open_archive

    of_model = [files for files in found if model_of(files.name) == name]
    archives = [open_archive(files) for files in of_model or found]
    return [archive for archive in archives if archive.manifest]
