# SPDX-License-Identifier: Apache-2.0
"""`hfship verify`."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Type,
)

from hfship.archive.versions import version_of
from hfship.base.errors import (
    Exit,
    HfshipError,
    IncompleteError,
    IntegrityError,
    NotFoundError,
    UsageError,
    command_line,
    error_fields,
)
from hfship.base.manifest import (
    BRING_AGAIN,
    MANIFEST_PATH,
    read_manifest,
    require_finished,
)
from hfship.base.text import counted, human_bytes, human_seconds, shorten
from hfship.base.values import asdict, dataclass
from hfship.commands.admission import site_policy
from hfship.commands.approving import (
    approve_archive,
    approve_content,
    approve_folder,
    refuse_unsigned,
)
from hfship.commands.names import archive_word, find_model, word_for
from hfship.commands.options import add_jobs_option, add_key_option
from hfship.commands.record import recorder_of
from hfship.commands.results import exit_of_list, print_results

if TYPE_CHECKING:
    from hfship.archive.approval import Approvals
    from hfship.archive.damage import Damage
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.reader import Archive
    from hfship.archive.signature import Signed
    from hfship.archive.versions import FoundArchive
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter
    from hfship.commands.context import Context

MOST_DAMAGES = 1000  # in the result for --json


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship verify`."""
    add = parser.add_argument
    add(
        "targets",
        nargs="*",
        metavar="ARCHIVE|PART|DIR|NAME|-",
        help="archive, part, model folder, or - for a pipe",
    )
    add(
        "--quick",
        action="store_true",
        help="archives: prove the medium by checksums, decode nothing",
    )
    add("--repair-from", metavar="ARCHIVE", help="replace what is damaged by bytes of another copy")
    add_key_option(parser)
    add_jobs_option(parser)


def cmd_verify(context: Context) -> Exit:
    """Verify archives and model folders; goes on after a damaged one."""
    args = context.args
    if args.repair_from and len(args.targets) > 1:
        raise UsageError("--repair-from is for one archive", "", "repair them one by one")
    results = print_results(context, verify_targets(args.targets, context))
    return exit_of_list(result.error.code for result in results if result.error)


# -- results


@dataclass(frozen=True)
class Verified:
    """What became of the check of one archive or folder: in words what is proven, or the error."""

    path: Path
    seconds: float
    proven: str = ""
    error: Optional[HfshipError] = None
    damages: Sequence[Damage] = ()
    approvals: Optional[Approvals] = None
    archive: Optional[Archive] = None

    def text(self) -> str:
        """`ok: PATH: what is proven, 3 s`; an error was said already."""
        if self.error:
            return ""
        return f"ok: {self.path}: {self.proven}, {human_seconds(self.seconds)}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "verify"."""
        error = None
        if self.error:
            error = error_fields(self.error)
        return {
            "path": str(self.path),
            "ok": error is None,
            "error": error,
            "damages": [asdict(damage) for damage in self.damages[:MOST_DAMAGES]],
            "approvals": _approval_rows(self.approvals),
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True)
class ProvenArchive:
    """An archive of ours that was proven, with --quick by its checksums alone."""

    archive: Archive
    manifest: Manifest
    quick: bool = False
    signed: Optional[Signed] = None
    repaired: Optional[int] = None  # bytes that --repair-from replaced

    def text(self) -> str:
        """`1.2 GB in 3 parts, 600 frames, model NAME, 7 files, 1.7 GB`, and what is to be known."""
        archive = self.archive
        text = ""
        if self.repaired is not None:
            text = f"{human_bytes(self.repaired)} replaced; "
        text += human_bytes(archive.size)
        if archive.files.numbers:
            text += f" in {counted(len(archive.parts), 'part')}"
        frames = counted(len(archive.frames), "frame")
        files = counted(len(self.manifest.files), "file")
        model = self.manifest.name
        version = version_of(self.manifest)
        if version.commit:
            model += f" at {version.label}"
        text += f", {frames}, model {model}, {files}"
        text += f", {human_bytes(self.manifest.size)}{self.manifest.caveats}"
        absent = archive.delta.absent
        if absent:
            text += f"; a delta, {len(absent)} of them come from an older version"
        if not self.quick:
            return text + _signature_text(self.signed)
        text += "; only checksums were proven"
        if self.signed:
            # Not "signed by": the content was not compared with what was signed.
            text += f", and that the key {self.signed.fingerprint} vouches for the manifest"
        return text


def _approval_rows(approvals: Optional[Approvals]) -> List[Dict[str, object]]:
    if approvals is None:
        return []
    return [one.json() for one in approvals.found]


def _signature_text(signed: Optional[Signed]) -> str:
    if signed is None:
        return ""
    return f"; signed by {signed.signer}"


# -- the checks


@dataclass(frozen=True)
class Proven:
    """What is proven, in words, and the signatures of roles; the archive, if it is one of ours."""

    text: str
    approvals: Optional[Approvals] = None
    archive: Optional[Archive] = None


@dataclass(frozen=True)
class Check:
    """An archive, a part or a folder to check; `work` returns what is proven, or raises."""

    path: Path
    work: Callable[[], Proven]


def verify_targets(targets: Sequence[str], context: Context) -> Iterator[Verified]:
    """Check what is named; of several, goes on after one that fails. Last, says of deltas whether
    they are whole with the archives that were proven beside them.

    Raises as `find_model` for a target that is nothing, before the first check.
    """
    checks = checks_of(targets, context)
    proven: List[Archive] = []
    for number, check in enumerate(checks, 1):
        if len(checks) == 1:
            yield checked(check, context, IntegrityError)
            continue
        with context.reporter.about(check.path.name, number, len(checks)):
            result = checked(check, context, HfshipError)
        if result.archive:
            proven.append(result.archive)
        yield result
    if any(archive.delta.absent for archive in proven):
        tell_chains(proven, context.reporter)


def tell_chains(proven: Sequence[Archive], reporter: Reporter) -> None:
    """Say of each model with deltas which archives give its newest version, all of them proven;
    warn where none of the others is the base of a delta."""
    from hfship.archive.versions import choose
    from hfship.commands.restore import found_archive

    by_name: Dict[str, List[FoundArchive]] = {}
    for archive in proven:
        found = found_archive(archive)
        by_name.setdefault(found.name, []).append(found)
    for name, of_model in by_name.items():
        if len(of_model) < 2:
            continue
        chain, delta = choose(of_model, of_model)
        if delta:
            place = delta.files.place
            why = "none of the archives beside it has all files that it needs"
            reporter.warn(f"{place} is a delta, and {why}: the site must have them")
        elif len(chain) > 1:
            places = ", then ".join(str(archive.files.place) for archive in chain)
            version = chain[-1].version.label
            reporter.info(f"{name}: proven as a chain, with all files of {version}: {places}")


def checks_of(targets: Sequence[str], context: Context) -> List[Check]:
    """What is to be checked: parts that are named alone, archives, then folders. Parts of one
    archive in several places are one. Raises as `find_model`."""
    from hfship.archive.files import merged

    if any(target.endswith(".bundle.json") for target in targets):
        from hfship.archive.bundle import archives_meant

        targets = archives_meant(targets)
    parts: List[Check] = []
    archives: List[ArchiveFiles] = []
    folders: List[Path] = []
    for target in targets:
        found = _archives_meant(target, context)
        if not found:
            folders.append(find_model(target, context.settings, _archive_places(context)))
        elif _is_part_alone(target, found[0], targets, context):
            path = Path(target)
            parts.append(Check(path, partial(verify_part, found[0], path, context)))
        else:
            archives += found

    checks = list(parts)
    for files in merged(archives):
        checks.append(Check(files.place, partial(verify_files, files, context)))

    for folder in folders:
        checks.append(Check(folder, partial(verify_folder, folder, context)))
    return checks


def _archive_places(context: Context) -> List[Path]:
    return [context.settings.transfer_dir, context.settings.package_dir]


def _archives_meant(target: str, context: Context) -> List[ArchiveFiles]:
    """The archives that a target means: a file, a folder of archives, or a NAME."""
    from hfship.archive.files import find_archives

    target = archive_word(target, _archive_places(context))
    found = find_archives(target, _archive_places(context))
    here = Path(target)
    is_path = "/" in target or here.is_file()
    if not found or is_path or found[0].folder == here:
        return found

    from hfship.commands.restore import NamedModel, Restore, tell_what_unpack_takes

    how = Restore(context.settings.site_models_dir, key=context.args.key)
    tell_what_unpack_takes(NamedModel(target, tuple(found)), how, context.reporter)
    return _in_first_place(target, found, context.reporter)


def _in_first_place(
    name: str, found: Sequence[ArchiveFiles], reporter: Reporter
) -> List[ArchiveFiles]:
    """The archives of a NAME in the first place that has any; none where a model of that name lies
    in the current folder. Other places are named."""
    first = found[0].folder
    if first != Path() and Path(name, MANIFEST_PATH).is_file():
        first = Path(name)
    others = [str(files.place) for files in found if files.folder != first]
    if others:
        places = shorten(others)
        reporter.info(f"{name}: also {places}, not read: verify it by its path")
    return [files for files in found if files.folder == first]


def _is_part_alone(
    target: str, files: ArchiveFiles, targets: Sequence[str], context: Context
) -> bool:
    """Whether one part of a series is to be read, and nothing else.

    Not where several parts are named, and not for a signature or a repair: these are of the whole.
    """
    from hfship.archive.files import PART_NAME

    match = PART_NAME.match(target)
    if match is None or not Path(target).is_file():
        return False

    from hfship.archive.part_check import can_be_alone
    from hfship.archive.signature import trusted_key

    for other in targets:
        also = PART_NAME.match(other)
        if other != target and also and Path(also["archive"]).name == files.name:
            return False
    if context.args.repair_from or context.args.key or trusted_key():
        return False
    return can_be_alone(files, Path(target))


def checked(check: Check, context: Context, kind: Type[HfshipError]) -> Verified:
    """The result of one check; an error of `kind` is reported here, another one raised."""
    from hfship.archive.verify import DamageError

    started = time.monotonic()
    try:
        proven = check.work()
    except kind as exc:
        context.reporter.error(exc)
        damages: Sequence[Damage] = ()
        if isinstance(exc, DamageError):
            damages = exc.damages
        seconds = time.monotonic() - started
        return Verified(check.path, seconds, error=exc, damages=damages)
    seconds = time.monotonic() - started
    text = proven.text
    if proven.approvals:
        text += proven.approvals.text()
    return Verified(
        check.path,
        seconds,
        text,
        approvals=proven.approvals,
        archive=proven.archive,
    )


def verify_part(files: ArchiveFiles, path: Path, context: Context) -> Proven:
    """Verify one part of an archive alone. Returns what is proven. Raises DamageError."""
    from hfship.archive.part_check import check_part
    from hfship.archive.verify import DamageError

    found = check_part(files, path, context.reporter)
    if not found.damages:
        return Proven(found.text())
    count = counted(len(found.damages), "place")
    again = command_line("hfship", "verify", path)
    step = f"copy {path.name} again into {path.parent}, then: {again}"
    raise DamageError(f"{path} is damaged in {count}", found.damages, step)


def verify_files(files: ArchiveFiles, context: Context) -> Proven:
    """Verify an archive, of whatever program, with --repair-from after its repair.

    Returns what is proven. Raises IntegrityError; NotFoundError for the other copy.
    """
    from hfship.archive.reader import Archive
    from hfship.archive.signature import open_trusted
    from hfship.archive.verify import archive_error, require_sums, verify_archive

    args = context.args
    repaired = None
    if args.repair_from:
        files, repaired = repair_from(args.repair_from, files, context)
    policy = site_policy(context)
    try:
        approvals = approve_archive(files, policy)
        archive, signed = open_trusted(files, args.key)
        if not isinstance(archive, Archive):
            from hfship.archive.unpack_foreign import verify_foreign  # few are of other programs

            refuse_unsigned(files.place, policy)
            return Proven(verify_foreign(archive) + require_sums(files))
        approvals = approve_content(approvals, archive)
        damages = verify_archive(archive, args.jobs, context.reporter, args.quick)
    except IncompleteError as exc:  # a pipe that ended too early
        raise IntegrityError(exc.what, exc.why, exc.next_step) from exc

    manifest = archive.manifest
    if damages or not manifest:
        command = command_line("hfship", "verify", files.place)
        raise archive_error(archive, damages, command)
    warn_if_renamed(files, manifest.name, context.reporter)
    require_declared(manifest, context, files.place)
    _after_archive(files, context)
    details = {"quick": args.quick, "repaired": bool(repaired)}
    recorder_of(context).note_beside(files, "verified", manifest, details)
    text = ProvenArchive(archive, manifest, args.quick, signed, repaired).text()
    return Proven(text, approvals, archive)


def _after_archive(files: ArchiveFiles, context: Context) -> None:
    """Name what comes after an archive is proven: where it was packed it is sent, elsewhere it is
    unpacked."""
    from hfship.archive.files import STDIN

    if files.name == STDIN:
        return
    if files.folder.absolute() == context.settings.package_dir.absolute():
        context.reporter.then_elsewhere("hfship", "push", str(files.place), "HOST:DIR")
    else:
        context.reporter.then("unpack", files.place)


def require_declared(manifest: Manifest, context: Context, where: Path) -> None:
    """Refuse what the policy refuses by licence, names and sizes; say what the sender declared: an
    archive is not looked into. Raises IntegrityError."""
    from hfship.commands.admission import require_listed, site_policy, tell_declared

    require_listed(manifest, site_policy(context), str(where))
    tell_declared(manifest, context.reporter)


def look_into(folder: Path, manifest: Manifest, context: Context) -> None:
    """Refuse what the policy refuses of the files in a folder. Raises IntegrityError, DiskError."""
    from hfship.commands.admission import look_again, site_policy

    look_again(folder, manifest, site_policy(context), context.reporter)


def repair_from(place: str, files: ArchiveFiles, context: Context) -> Tuple[ArchiveFiles, int]:
    """Repair an archive from the copy at `place`. Returns it, and the bytes that were replaced.

    Raises NotFoundError, IntegrityError where the copy cannot help, DiskError.
    """
    from hfship.archive.files import find_archives
    from hfship.archive.repair import repair_archive

    found = find_archives(place, [])
    if not found:
        step = "name the other copy, or any part of it"
        raise NotFoundError(f"no archive {place}", "", step)
    return repair_archive(files, found[0], context.args.jobs, context.reporter)


def warn_if_renamed(files: ArchiveFiles, name: str, reporter: Reporter) -> None:
    """Warn of an archive that is not called as its model `name`: what lies beside it is."""
    from hfship.archive.files import STDIN

    if files.name in (f"{name}.tar.zst", f"{name}.delta.tar.zst", STDIN):
        return

    sidecars = f"{name}.tar.zst.sha256 and .sig"
    reporter.warn(f"{files.path} was renamed: {sidecars} no longer fit, rename it back")


def verify_folder(folder: Path, context: Context) -> Proven:
    """Verify a model folder by its manifest, and the manifest by its signature if a key is known.

    Returns what is proven. Raises IntegrityError; IncompleteError for a folder that is not
    complete, UsageError for one without manifest.
    """
    from hfship.archive.folder_check import (
        check_folder,
        folder_error,
        require_nothing_else,
        require_whole_folder,
        unlisted_files,
    )
    from hfship.archive.signature import folder_signature

    manifest = _manifest_of(folder)
    policy = site_policy(context)
    approvals = approve_folder(folder, manifest, policy)
    signed = folder_signature(folder, manifest, context.args.key)
    if signed:
        require_nothing_else(folder, manifest)
    unlisted = unlisted_files(folder, manifest)
    if unlisted:
        context.reporter.warn(f"{folder}: not in the manifest: {shorten(unlisted)}")
    damages = check_folder(folder, manifest, context.args.jobs, context.reporter)
    if damages:
        raise folder_error(folder, manifest, damages)
    require_whole_folder(folder, manifest, BRING_AGAIN)
    look_into(folder, manifest, context)

    on_site = folder.parent == context.settings.site_models_dir.absolute()
    places = [context.settings.site_models_dir, context.settings.models_dir]
    context.reporter.then("serve" if on_site else "pack", word_for(folder, places))
    files = counted(len(manifest.files), "file")
    size = human_bytes(manifest.size)
    recorder_of(context).note_in_folder(folder, "verified", manifest)
    return Proven(f"{files}, {size}{manifest.caveats}{_signature_text(signed)}", approvals)


def _manifest_of(folder: Path) -> Manifest:
    from hfship.base.content import content_files
    from hfship.base.wholeness import require_whole

    manifest = read_manifest(folder)
    if manifest is None:
        require_finished(folder)
        require_whole(folder, dict(content_files(folder)), BRING_AGAIN)
        what = f"{folder} cannot be verified"
        why = f"it has neither archives nor {MANIFEST_PATH}"
        step = "name an archive, a part, or the folder of a model"
        raise UsageError(what, why, step)
    return manifest
