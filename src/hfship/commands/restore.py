# SPDX-License-Identifier: Apache-2.0
"""From the archives that an operator names to a model folder.

Owns which of the archives of a model are unpacked, in which order, and how that is told. Promises:
the newest version is taken, deltas in their order; a model never goes back to an older version
unless that was asked for. Never: opens what another model is called after.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple, Union

from hfship.archive.files import STDIN, archives_in, merged, model_of
from hfship.archive.folder_check import check_folder, folder_error, require_nothing_else
from hfship.archive.kept import kept_versions, mend_place
from hfship.archive.layout import Delta
from hfship.archive.media import MediaChange
from hfship.archive.reader import Archive
from hfship.archive.signature import folder_signature, keep_bundle, open_trusted
from hfship.archive.unpack import (
    Unpacked,
    UnpackOptions,
    matches_any,
    remove_archive,
    require_manifest,
    unpack_archive,
)
from hfship.archive.versions import FoundArchive, Lineage, choose, version_of
from hfship.base.errors import IntegrityError, NotFoundError, UsageError, command_line
from hfship.base.manifest import read_manifest
from hfship.base.policy import Policy
from hfship.base.text import counted, shorten
from hfship.base.values import dataclass, field, replace
from hfship.commands.admission import look_again, require_listed
from hfship.commands.approving import (
    approve_archive,
    approve_content,
    keep_signatures,
    refuse_unsigned,
)
from hfship.commands.names import named_archives
from hfship.commands.record import Recorder

if TYPE_CHECKING:
    from hfship.archive.consumed import Consumed
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.signature import Signed
    from hfship.archive.unpack_foreign import ForeignModel
    from hfship.archive.versions import Choice, Version
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter
    from hfship.ops.scan import Scan


@dataclass(frozen=True)
class NamedModel:
    """The archives of a model: those that an operator named, and others `beside` them, which may
    be what a delta among them needs."""

    name: str
    named: Tuple[ArchiveFiles, ...]
    beside: Tuple[ArchiveFiles, ...] = ()


@dataclass(frozen=True)
class Restore:
    """How to restore models, into `out`/NAME.

    `key` is the public key that they must be signed with (default: HFSHIP_KEY, else none). With
    `wait`, media with missing parts are asked for. `allow_older` goes back to an older version.
    `policy` is that of this site: what it refuses is not restored, or not under its name.
    """

    out: Path
    options: UnpackOptions = field(default_factory=UnpackOptions)
    key: Optional[Path] = None
    wait: bool = False
    allow_older: bool = False
    policy: Policy = Policy()


@dataclass(frozen=True)
class Restored:
    """A model folder, and the version that was there `before`."""

    done: Unpacked
    before: Optional[Version] = None


# -- what is named


def models_named(arguments: Sequence[str], places: Sequence[Path]) -> List[NamedModel]:
    """The models of the archives that are named. Raises NotFoundError."""
    step = "give the path of NAME.tar.zst or of any part"
    found: List[ArchiveFiles] = []
    for argument in arguments:
        found += named_archives(argument, places, step)

    groups: Dict[str, List[ArchiveFiles]] = {}
    for files in merged(found):
        groups.setdefault(model_of(files.name), []).append(files)
    return [NamedModel(name, tuple(group), _beside(name, group)) for name, group in groups.items()]


def _beside(name: str, named: Sequence[ArchiveFiles]) -> Tuple[ArchiveFiles, ...]:
    """The other archives of a model, in the folders of those that are named."""
    if name == STDIN:
        return ()

    known = {files.path for files in named}
    folders = dict.fromkeys(files.folder for files in named)
    others: List[ArchiveFiles] = []
    for folder in folders:
        for files in archives_in(folder):
            if model_of(files.name) == name and files.path not in known:
                others.append(files)
    return tuple(others)


# -- what they carry


@dataclass(frozen=True)
class OpenedArchive:
    """An archive that can be restored from, and what is found in it."""

    found: FoundArchive
    archive: Archive
    signed: Optional[Signed]


def found_archive(archive: Archive, only: Sequence[str] = ()) -> FoundArchive:
    """What an archive carries. With `only`, a delta needs no more than the files that match.

    Raises DamageError for one that cannot be restored from.
    """
    manifest = require_manifest(archive)
    delta = archive.delta
    needs = set()
    for entry in manifest.files:
        if entry.path in delta.absent and (not only or matches_any(entry.path, only)):
            needs.add(entry.sha256)
    return FoundArchive(
        files=archive.files,
        name=manifest.name,
        version=version_of(manifest),
        is_delta=delta != Delta(),
        base=delta.base,
        needs=frozenset(needs),
    )


def _open(
    files: ArchiveFiles, how: Restore, reporter: Reporter
) -> Union[OpenedArchive, ForeignModel]:
    """Open an archive, of whatever program. Raises as open_trusted and found_archive."""
    media = None
    if how.wait:
        media = MediaChange(files, reporter)
        files = media.with_tables()

    approvals = approve_archive(files, how.policy)
    archive, signed = open_trusted(files, how.key, media)
    if not isinstance(archive, Archive):
        refuse_unsigned(files.place, how.policy)
        return archive
    approvals = approve_content(approvals, archive)
    if approvals and approvals.counting:
        reporter.info(f"{files.name}{approvals.text()}".replace("; ", ": ", 1))
    found = found_archive(archive, how.options.only)
    return OpenedArchive(found, archive, signed)


def _open_named(model: NamedModel, how: Restore, reporter: Reporter) -> List[OpenedArchive]:
    """The archives of a model that are named, those without damage first.

    Raises as `_open`, for whatever is wrong with one of them: it might be the newest. UsageError
    for archives of two models, or of another program, among several.
    """
    opened: List[OpenedArchive] = []
    for files in model.named:
        try:
            one = _open(files, how, reporter)
        except IntegrityError as exc:
            others = [other for other in model.named if other is not files]
            steps = [exc.next_step, "or take another one:"]
            steps += [command_line("hfship", "unpack", other.place) for other in others]
            exc.next_step = "\n".join(steps)
            raise
        if not isinstance(one, OpenedArchive) or not _is_same_model(opened, one):
            places = [str(other.place) for other in model.named]
            what = f"{model.name} means archives that do not belong together"
            why = f"there are {shorten(places)}"
            step = command_line("hfship", "unpack", model.named[0].place)
            raise UsageError(what, why, f"{step}     # one of them")
        opened.append(one)

    return sorted(opened, key=lambda one: bool(one.archive.damages))


def _open_beside(
    model: NamedModel, named: Sequence[OpenedArchive], how: Restore, reporter: Reporter
) -> List[OpenedArchive]:
    """The other archives of the same model that can be opened: nobody asked for them."""
    without_waiting = replace(how, wait=False)
    opened: List[OpenedArchive] = []
    for files in model.beside:
        with contextlib.suppress(IntegrityError):
            one = _open(files, without_waiting, reporter)
            if isinstance(one, OpenedArchive) and _is_same_model(named, one):
                opened.append(one)

    return opened


def _is_same_model(known: Sequence[OpenedArchive], one: OpenedArchive) -> bool:
    """Whether an archive carries a version of the model that others carry."""
    names = {one.found.name, *(other.found.name for other in known)}
    repos = {one.found.version.repo, *(other.found.version.repo for other in known)} - {""}
    return len(names) == 1 and len(repos) < 2


# -- the restoring


def restore_model(model: NamedModel, how: Restore, reporter: Reporter) -> Restored:
    """Restore the newest version of a model; its signature stays with it.

    Raises NotFoundError for a delta without a base, UsageError for an older version than is there,
    and as open_trusted, unpack_archive and unpack_foreign.
    """
    return restore_opened(model, open_model(model, how, reporter), how, reporter)


def open_model(
    model: NamedModel, how: Restore, reporter: Reporter
) -> Union[ForeignModel, List[OpenedArchive]]:
    """The archives of a model that are named, those without damage first; or one of another
    program. Raises as open_trusted, and UsageError for archives that do not belong together."""
    if how.options.consume and model.name == STDIN:
        raise UsageError("--consume is for files, not for a pipe", "", "leave it out")

    if len(model.named) > 1:
        return _open_named(model, how, reporter)
    only = _open(model.named[0], how, reporter)
    if not isinstance(only, OpenedArchive):
        return only
    return [only]


def restore_opened(
    model: NamedModel,
    named: Union[ForeignModel, List[OpenedArchive]],
    how: Restore,
    reporter: Reporter,
) -> Restored:
    """Restore what `open_model` opened; see `restore_model`."""

    recorder = Recorder(how.policy, reporter)
    scans: List[Scan] = []

    def accept(folder: Path, manifest: Manifest) -> None:
        called = how.out / (how.options.name or manifest.name)
        look_again(folder, manifest, how.policy, reporter, called)
        scans.extend(recorder.scan(folder))

    how = replace(how, options=replace(how.options, accept=accept))
    if not isinstance(named, list):
        restored = Restored(_restore_foreign(named, how))
    else:
        beside = _open_beside(model, named, how, reporter)
        restored = _restore_newest(named, beside, how, reporter)
    done = restored.done
    recorder.note_scans(done.folder, scans, done.manifest)
    return restored


def _restore_newest(
    named: Sequence[OpenedArchive],
    beside: Sequence[OpenedArchive],
    how: Restore,
    reporter: Reporter,
) -> Restored:
    """Restore the newest version among the archives that are named."""
    wanted = [one.found for one in named]
    found = [*wanted, *(one.found for one in beside)]
    target = how.out / (how.options.name or wanted[0].name)
    before = _version_before(target, reporter)
    choice = choose(found, wanted, before, _bases(target, how))
    _tell(found, choice, reporter)
    if choice.lacks_base:
        raise _base_error(choice, choice.lacks_base, target)
    if before and not how.allow_older:
        _require_no_older(found, choice.chain[-1], target, before)

    written, seconds = 0, 0.0
    options = how.options
    for step in choice.chain:
        (opened,) = (one for one in (*named, *beside) if one.found is step)
        listed = require_manifest(opened.archive)
        require_listed(listed, how.policy, str(opened.archive.files.place))
        done = _restore(opened, how, options, reporter)
        written += done.written
        seconds += done.seconds
        options = replace(options, base=None)  # the next one goes over this one

    return Restored(replace(done, written=written, seconds=seconds), before)


def _version_before(target: Path, reporter: Reporter) -> Optional[Version]:
    """The version that is in place, once what a killed run had put aside is there again."""
    mended = mend_place(target)
    if mended:
        reporter.info(f"{target} is again what it was: a run was killed as {mended} was put aside")
    return version_in(target)


def _bases(target: Path, how: Restore) -> List[Version]:
    """The other versions from which a delta may take files: that of --base, and kept ones."""
    bases = [one.version for one in kept_versions(target)]
    named = None
    if how.options.base:
        named = version_in(how.options.base)
    if named:
        bases.append(named)
    return bases


def version_in(folder: Path) -> Optional[Version]:
    """The version of the model in a folder; None without one, or if its manifest is damaged."""
    try:
        manifest = read_manifest(folder)
    except IntegrityError:
        return None
    if manifest is None:
        return None
    return version_of(manifest)


def tell_what_unpack_takes(model: NamedModel, how: Restore, reporter: Reporter) -> None:
    """Say what each of several archives of a model carries, and which of them unpack would take.

    Nothing, where one cannot be opened: whoever verifies them says why.
    """
    if len(model.named) < 2:
        return
    with contextlib.suppress(IntegrityError, UsageError):
        found = [one.found for one in _open_named(model, how, reporter)]
        present = version_in(how.out / found[0].name)
        _tell(found, choose(found, found, present), reporter, "unpack takes")


def _tell(
    found: Sequence[FoundArchive], choice: Choice, reporter: Reporter, verb: str = "taken"
) -> None:
    """Say what each of several archives carries, and which of them are taken."""
    if len(found) < 2:
        return
    lines = [f"{archive.name}: {archive.text()}" for archive in found]
    if choice.chain and not choice.lacks_base:
        taken = ", then ".join(str(archive.files.place) for archive in choice.chain)
        lines.append(f"{found[0].name}: {verb}: {taken}")
    for line in lines:
        reporter.info(line)


def _base_error(choice: Choice, delta: FoundArchive, target: Path) -> NotFoundError:
    """The error of a delta that has the newest version, and no base."""
    place = delta.files.place
    what = f"{place} is a delta: {counted(len(delta.needs), 'file')} "
    what += "must come from an older version on site"
    since = "the version that it was packed since"
    if delta.base:
        since = f"version {delta.base[:7]}"
    why = f"it carries {delta.version.label}, packed since {since}"
    why += f", which is neither {target} nor in an archive beside it"
    steps = ["bring that version, or name its folder with --base DIR, or bring the whole archive"]
    if choice.chain:
        older = choice.chain[-1]
        step = command_line("hfship", "unpack", older.files.place)
        steps.append(f"{step}     # {older.version.label}, which is older")
    return NotFoundError(what, why, "\n".join(steps))


def _require_no_older(
    found: Sequence[FoundArchive], taken: FoundArchive, target: Path, before: Version
) -> None:
    """Refuse to go back from the version that is there. Raises UsageError."""
    repos = {taken.version.repo, before.repo} - {""}
    if len(repos) > 1 or not Lineage(found, before).is_older(taken.version, before):
        return

    what = f"{target} would go back from {before.label} to {taken.version.short}"
    why = f"{taken.files.place} is older than what is there"
    step = command_line("hfship", "unpack", "--allow-older", taken.files.place, "-o", target.parent)
    raise UsageError(what, why, f"{step}     # goes back")


def _restore(
    opened: OpenedArchive, how: Restore, options: UnpackOptions, reporter: Reporter
) -> Unpacked:
    """Restore one archive of ours, with its signatures and its log of custody. Raises as
    unpack_archive."""
    files = opened.archive.files
    signed = opened.signed
    if signed:
        reporter.info(f"{files.name}: signed by {signed.signer}")
    done = unpack_archive(opened.archive, how.out, options, reporter)
    if signed:
        require_nothing_else(done.folder, done.manifest)
    keep_bundle(files, done.folder)
    keep_signatures(files, done.folder)
    if done.written:
        details = {"archive": files.name, "files": len(done.manifest.files)}
        recorder = Recorder(how.policy, reporter)
        recorder.carry_to_folder(files, done.folder, done.manifest, details)
    if options.consume:
        remove_archive(files)
    return done


def finish_consumed(consumed: Consumed, how: Restore, reporter: Reporter) -> Restored:
    """Prove a model of which an earlier run of the same command was removing the archive, and
    remove the rest. Raises IntegrityError, DiskError."""
    started = time.monotonic()
    folder = consumed.folder
    reporter.info(f"{folder}: its archive was unpacked and removed earlier")
    manifest = read_manifest(folder)
    signed = folder_signature(folder, manifest, how.key)
    if manifest is None:
        raise IntegrityError(f"{folder} has no manifest", "", "bring the archive again")

    if signed:
        reporter.info(f"{folder}: signed by {signed.signer}")
        require_nothing_else(folder, manifest)
    damages = check_folder(folder, manifest, how.options.jobs, reporter)
    if damages:
        raise folder_error(folder, manifest, damages)

    if consumed.is_same:
        remove_archive(consumed.files)
    seconds = time.monotonic() - started
    return Restored(Unpacked(folder, manifest, 0, seconds))


def _restore_foreign(model: ForeignModel, how: Restore) -> Unpacked:
    """Restore an archive of another program. Raises as unpack_foreign."""
    from hfship.archive.unpack_foreign import unpack_foreign  # few archives are of other programs

    return unpack_foreign(model, how.out, how.options)
