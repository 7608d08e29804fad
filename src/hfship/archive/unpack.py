# SPDX-License-Identifier: Apache-2.0
"""From an archive to a model folder.

Owns the way back: restore a model to NAME~incomplete, which becomes NAME, or repair NAME in place.

Promises: every bit of the archive that is asked for is checked; damage is located and the rest goes
on; a model appears under its name complete and proven or not at all; a killed run keeps the files
it had proven, and most of a weight that was on its way. Never: follows a symbolic link below the
target folder; writes a file that the manifest does not list; trusts a tar header.
"""

from __future__ import annotations

import contextlib
import os
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Callable,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from hfship.archive.check import checker_of
from hfship.archive.consumed import note_consumed
from hfship.archive.folder_check import unlisted_files
from hfship.archive.kept import drop_beyond, kept_versions, put_aside
from hfship.archive.lanes import make_lanes
from hfship.archive.pipe import Streamed
from hfship.archive.schedule import workers_for
from hfship.archive.tree import FolderSink, Journal, Tree
from hfship.archive.verify import archive_error, verify_archive
from hfship.archive.versions import version_of
from hfship.archive.work_folder import (
    locked_tree,
    publish_folder,
    remove_leftovers,
    work_folder_of,
)
from hfship.base.below import owner_in
from hfship.base.content import PARTIAL_DIR, all_folders_of
from hfship.base.errors import IntegrityError, NotFoundError, UsageError, command_line
from hfship.base.filenames import require_names
from hfship.base.files import (
    SPARE_INODES,
    atomic_write,
    disk_errors,
    make_dir,
    require_inodes,
    require_room,
)
from hfship.base.manifest import MANIFEST_PATH, make_manifest, read_manifest
from hfship.base.report import Reporter
from hfship.base.text import counted, shorten
from hfship.base.values import dataclass, field, replace
from hfship.base.weights import missing_of_those
from hfship.base.workers import Workers, default_jobs

if TYPE_CHECKING:
    from hfship.archive.damage import Damage
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.reader import Archive
    from hfship.base.manifest import FileEntry, Manifest


@dataclass(frozen=True)
class UnpackOptions:
    """What to unpack and how.

    `name` is that of the folder ("": as in the archive). Only files that match a glob of `only` are
    restored, if there are any globs. `base` is the folder of another version on site, from which
    files with the same SHA-256 are taken (default: the folder to be replaced). `consume` removes
    parts as soon as their files are safe. `force` replaces a folder that has files of its own.
    `keep` is how many earlier versions stay beside the new one. `jobs` is the number of worker
    processes at most. `accept` gets the folder when all files are
    proven, with its manifest, and raises for a model that is not to be had under its name.
    """

    name: str = ""
    only: Tuple[str, ...] = ()
    base: Optional[Path] = None
    consume: bool = False
    force: bool = False
    keep: int = 0
    jobs: int = field(default_factory=default_jobs)
    accept: Callable[[Path, Manifest], None] = lambda _folder, _manifest: None


@dataclass(frozen=True)
class Unpacked:
    """What unpack leaves: the model folder. `written` is the number of files that were not there
    before, `seconds` how long it took."""

    folder: Path
    manifest: Manifest
    written: int
    seconds: float


def unpack_archive(
    archive: Archive, out: Path, options: UnpackOptions, reporter: Reporter
) -> Unpacked:
    """Restore a model to `out`/NAME, in NAME~incomplete until all of it is proven.

    A folder that already holds this version is proven, and repaired in place if need be. With
    `consume` what is left of the archive is the caller's to remove, see remove_archive. Raises
    IntegrityError for damage, after everything undamaged was restored; NotFoundError for files that
    only an older version has; UsageError for a folder that must not be replaced; DiskError.
    """
    started = time.monotonic()
    wanted = _wanted(archive, options.only)
    manifest = wanted.manifest
    target = target_folder(out, options.name or manifest.name)
    in_place = _is_there(target, wanted, options.force)
    work = work_folder_of(target)
    if in_place:
        work = target
    with locked_tree(work, mark=not in_place) as (tree, lock):
        paths = [entry.path for entry in manifest.files]
        require_names(work, paths, f"unpack into {work.parent}")
        if not in_place:
            remove_leftovers(work, manifest)
            _take_from_bases(tree, manifest, options.base or target, target)
        missing = _missing_files(archive, tree, manifest, options.jobs, reporter)
        is_new = bool(missing) or not in_place
        if is_new:
            _restore(archive, tree, missing, options, reporter)
            _require_all(tree, manifest)
        options.accept(tree.root, manifest)
        if is_new:
            tree.remove_work_files()
            atomic_write(work / MANIFEST_PATH, wanted.text)
            tree.sync()
        if options.consume:
            note_consumed(work, target, archive.files)
        if not in_place:
            lock.remove()
            _publish(work, target, manifest, options.keep)

    return Unpacked(
        folder=target,
        manifest=manifest,
        written=len(missing),
        seconds=time.monotonic() - started,
    )


def _publish(work: Path, target: Path, coming: Manifest, keep: int) -> None:
    """NAME~incomplete becomes NAME. Another version that was NAME is put aside where one is to be
    kept; of those that were kept before only so many stay."""
    if not keep:
        publish_folder(work, target)
        return
    present = read_manifest(target)
    if present is not None:
        replaced = version_of(present)
        if replaced.id != version_of(coming).id:
            put_aside(target, replaced)
    publish_folder(work, target)
    drop_beyond(target, keep)


# -- what is to be restored, and where to


@dataclass(frozen=True)
class _Wanted:
    """What is to be restored: a manifest, and its text as it will lie in the folder."""

    manifest: Manifest
    text: bytes


def _wanted(archive: Archive, only: Sequence[str]) -> _Wanted:
    """All of the archive, or the files that match one of the globs of `only`.

    Raises DamageError if the archive cannot be restored from, NotFoundError if no file matches.
    """
    manifest = require_manifest(archive)
    if not only:
        return _Wanted(manifest, archive.text)

    chosen = matching_files(manifest, only)
    if not chosen.files:
        raise NotFoundError(
            f"no file of {archive.files.name} matches {', '.join(only)}",
            shorten([entry.path for entry in manifest.files]),
            "give another --only GLOB",
        )

    return _Wanted(chosen, chosen.to_json().encode("utf-8"))


def require_manifest(archive: Archive) -> Manifest:
    """The manifest of an archive that can be restored from. Raises DamageError."""
    if archive.manifest and archive.segments:
        return archive.manifest
    damages: Sequence[Damage] = archive.damages
    if not damages:
        damages = verify_archive(archive, 1, Reporter("none"))
    again = command_line("hfship", "unpack", archive.files.place)
    raise archive_error(archive, damages, again)


def matching_files(manifest: Manifest, globs: Sequence[str]) -> Manifest:
    """The manifest of the files that match one of the globs; it counts the others as left out, and
    names the weights without which the model is partial."""
    files = [entry for entry in manifest.files if matches_any(entry.path, globs)]
    kept = {entry.path for entry in files}
    others = [entry.path for entry in manifest.files if entry.path not in kept]
    missing = missing_of_those(kept, others)
    return replace(
        manifest,
        files=tuple(files),
        left_out=manifest.left_out + len(others),
        partial=tuple(sorted({*manifest.partial, *missing})),
    )


def matches_any(path: str, globs: Sequence[str]) -> bool:
    """Whether a path matches one of the globs, in which `*` stands for slashes, too."""
    return any(fnmatchcase(path, glob) for glob in globs)


def target_folder(out: Path, name: str) -> Path:
    """`out`/NAME; `out` is made if need be. Raises UsageError for a wrong NAME, DiskError."""
    parent = make_dir(out)
    checked = make_manifest(name, ())
    return parent / checked.name


def _is_there(target: Path, wanted: _Wanted, force: bool) -> bool:
    """Whether `target` holds the version that is wanted.

    Raises IntegrityError for what is no folder, UsageError for one that only `force` replaces.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise IntegrityError(
            f"cannot unpack into {target}",
            "it is a symbolic link or a file, not a folder; hfship does not follow it",
            f"remove {target}, or give --name",
        )

    if not target.exists():
        return False

    present = read_manifest(target)
    is_same = present is not None and present.to_json().encode("utf-8") == wanted.text
    if is_same and not _is_foreign(target, wanted.manifest):
        return True
    if not force:
        _require_same_model(target, present, wanted.manifest)
    unlisted = unlisted_files(target, present)  # refuses what is no file, with `force`, too
    if unlisted and not force:
        raise UsageError(
            f"{target} is there already",
            f"it would be replaced, and has files that are in no manifest: {shorten(unlisted)}",
            "move them away, give --name, or replace all with --force",
        )

    return False


def _is_foreign(target: Path, manifest: Manifest) -> bool:
    """Whether somebody else can change a model: then it is made anew, and proven. Raises
    DiskError."""
    with disk_errors("use", target):
        owner = owner_in(target.parent)
        paths = [PARTIAL_DIR, MANIFEST_PATH, *(entry.path for entry in manifest.files)]
        for path in [".", *paths, *all_folders_of(paths)]:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if owner.is_foreign(os.lstat(target / path)):
                    return True
    return False


def _require_same_model(target: Path, present: Optional[Manifest], packed: Manifest) -> None:
    """Refuse to replace a model from another repository. Raises UsageError."""
    if present is None or present.source is None or packed.source is None:
        return

    here, there = present.source.resolved_repo, packed.source.resolved_repo
    if here != there:
        raise UsageError(
            f"{target} is another model",
            f"it holds {here}, the archive holds {there}",
            "give --name, or replace it with --force",
        )


# -- what is there already


def _take_from_bases(tree: Tree, manifest: Manifest, base: Path, target: Path) -> None:
    """Take what the model in folder `base` has, then what earlier versions of NAME have."""
    _take_from_base(tree, manifest, base)
    for kept in kept_versions(target):
        _take_from_base(tree, manifest, kept.folder)


def _take_from_base(tree: Tree, manifest: Manifest, base: Path) -> None:
    """Link or copy files that the model in folder `base` has, by SHA-256. They are proven next."""
    try:
        base_manifest = read_manifest(base)
    except IntegrityError:
        return

    if base_manifest is None:
        return

    sources: Dict[str, Path] = {}
    for entry in base_manifest.files:
        sources[entry.sha256] = base / entry.path

    for entry in manifest.files:
        source = sources.get(entry.sha256)
        if source and source.is_file() and not (tree.root / entry.path).exists():
            tree.link_or_copy(source.resolve(), entry)


def _proven_files(
    tree: Tree, manifest: Manifest, jobs: int, reporter: Reporter
) -> AbstractSet[str]:
    """Paths of files that are there already, with the right SHA-256."""
    present = _present_files(tree.root, manifest)
    if not present:
        return frozenset()

    total_files = counted(len(manifest.files), "file")
    reporter.info(f"{tree.root}: proving the {len(present)} of {total_files} that are there")

    def prove(count: Callable[[int], None], entry: FileEntry) -> bool:
        found = tree.sha256(entry, count)
        return found == entry.sha256

    size = sum(entry.size for entry in present)
    count = workers_for(jobs, size)
    with reporter.stage("prove", size) as stage, Workers(count, prove, stage.add) as workers:
        answers = workers.map(present)
        proven = list(stage.each(answers, len(present)))

    return {entry.path for entry, good in zip(present, proven) if good}


def _present_files(folder: Path, manifest: Manifest) -> List[FileEntry]:
    """The files of a manifest that are in a folder, proven or not."""
    present: List[FileEntry] = []
    for entry in manifest.files:
        path = folder / entry.path
        if path.is_file():
            present.append(entry)
    return present


def _missing_files(
    archive: Archive, tree: Tree, manifest: Manifest, jobs: int, reporter: Reporter
) -> List[FileEntry]:
    """The files that are not there yet with the right SHA-256.

    Raises NotFoundError if the archive is a delta and leaves one of them out.
    """
    proven = _proven_files(tree, manifest, jobs, reporter)
    missing = [entry for entry in manifest.files if entry.path not in proven]
    absent = [entry.path for entry in missing if entry.path in archive.delta.absent]
    if absent:
        raise NotFoundError(
            f"{archive.files.name} is a delta: {counted(len(absent), 'file')} "
            "must come from an older version on site",
            f"not found, or not intact: {shorten(absent)}",
            "name the folder of that version with --base DIR, or bring the whole archive",
        )

    return missing


# -- the pass over the archive


def _restore(
    archive: Archive,
    tree: Tree,
    missing: Sequence[FileEntry],
    options: UnpackOptions,
    reporter: Reporter,
) -> None:
    """Write the files that are missing, resuming weights where a killed run left its journal.

    Raises DamageError after all that is intact was written; DiskError.
    """
    journal = Journal(tree)
    resume: Mapping[str, int] = {}
    if not isinstance(archive, Streamed):  # a stream passes from its beginning
        resume = journal.read(missing)
    there = sum(resume.values())
    _require_room_for_files(archive, tree.root, missing, there, options.consume)

    restoring = _Restoring(archive, tree, journal, missing, options, reporter)
    damages: List[Damage] = []
    try:
        damages = restoring.run(resume)
        if resume and _may_be_wrong_checkpoint(damages):
            damages = restoring.run({})
    finally:
        complete = not damages and restoring.is_complete
        journal.close(remove=complete)

    if damages:
        out = tree.root.parent
        again = command_line("hfship", "unpack", "-o", out, archive.files.place)
        raise archive_error(archive, damages, again)


def _require_all(tree: Tree, manifest: Manifest) -> None:
    """Look at all files once more before they count as a model. Raises IntegrityError."""
    wrong = [entry.path for entry in manifest.files if not tree.holds(entry)]
    if wrong:
        raise IntegrityError(
            f"{tree.root} was changed while it was unpacked",
            f"missing, or not of their size: {shorten(wrong)}",
            "leave the folder alone, and run the same command again",
        )


def _may_be_wrong_checkpoint(damages: Sequence[Damage]) -> bool:
    """Whether a file has another SHA-256 though its frames are intact.

    What the journal counted as written may be to blame: writing it anew tells.
    """
    wrong_content = [damage for damage in damages if damage.offset is None]
    return any(damage.files for damage in wrong_content)


class _Restoring:
    """Passes over an archive that write the files that are missing, until all are there."""

    def __init__(
        self,
        archive: Archive,
        tree: Tree,
        journal: Journal,
        missing: Sequence[FileEntry],
        options: UnpackOptions,
        reporter: Reporter,
    ) -> None:
        self._archive = archive
        self._tree = tree
        self._journal = journal
        self._options = options
        self._reporter = reporter
        self._missing = {entry.path for entry in missing}
        # Files of the archive that need not be written: not asked for, there already, or finished.
        self._done: Set[str] = set()
        for segment in archive.segments:
            if segment.entry and segment.entry.path not in self._missing:
                self._done.add(segment.entry.path)

        self._free_before: Optional[Callable[[int], None]] = None
        if options.consume:
            parts = PartsToFree(archive, tree)
            self._free_before = parts.free_before

    @property
    def is_complete(self) -> bool:
        """Whether all files that were missing are finished."""
        return self._missing <= self._done

    def run(self, resume: Mapping[str, int]) -> List[Damage]:
        """One pass, resuming files behind the bytes (path -> size) that are there; the damage."""
        options = self._options
        sink = FolderSink(
            self._tree,
            kept=self._done,
            journal=self._journal,
            resume=resume,
            reserve=not options.consume,  # the parts that are freed on the way make the room
        )
        try:
            make_check = checker_of(self._archive)
            check = make_check(
                self._archive,
                sink,
                options.jobs,
                skip=self._done,
                resume=resume,
                sparse=options.consume or bool(options.only),
            )
            with self._reporter.stage("unpack", check.size) as stage:
                damages = check.run(stage, self._free_before)
        finally:
            sink.close()

        self._done |= sink.finished
        return damages


# -- room on the disk


class PartsToFree:
    """Removes the parts of an archive whose files are safe.

    The last part, which has the tables, stays till the end; so do, of the first ones, the bytes of
    the manifest, for a run that has to go on after this one was killed.
    """

    def __init__(self, archive: Archive, tree: Tree) -> None:
        self._archive = archive
        self._tree = tree
        self._left = list(archive.parts[:-1])
        self._next_frame = 0  # the first that is not safe
        # The first lane has the manifest.
        leading = make_lanes(archive.frames, archive.segments)[0]
        last_frame = leading.frames[-1]
        self._manifest_end = last_frame.offset + last_frame.size

    def free_before(self, position: int) -> None:
        """Remove the parts that end before a position of the tar stream; what is before it is safe.

        Names are made durable before each. Raises DiskError.
        """
        safe_end = self._safe_end(position)
        while self._left:
            part = self._left[0]
            if part.stop > safe_end:
                break
            self._tree.sync()
            self._left.pop(0)
            manifest_bytes = max(self._manifest_end - part.start, 0)
            free_file(part.path, keep=manifest_bytes)

    def _safe_end(self, position: int) -> int:
        """Up to where in the archive its frames end before a position of the tar stream.

        Called with growing positions, so it goes on from the frame at which it stopped.
        """
        frames = self._archive.frames
        while self._next_frame < len(frames):
            frame = frames[self._next_frame]
            if frame.start >= position:
                return frame.offset
            self._next_frame += 1
        return self._archive.size


def remove_archive(files: ArchiveFiles) -> None:
    """Remove what is left of an archive, last its sums, by which a run after a kill knows it; the
    model folder has all that it had. Raises DiskError.
    """
    for path in files.paths:
        free_file(path)
    free_file(files.sums)


def free_file(path: Path, keep: int = 0) -> None:
    """Remove a file, which may be gone already, but for its first `keep` bytes.

    Raises DiskError.
    """
    step = "leave out --consume, or make the folder writable"
    with disk_errors("remove", path, step), contextlib.suppress(FileNotFoundError):
        if keep == 0:
            path.unlink()
            return
        size = path.stat().st_size
        if size > keep:
            os.truncate(path, keep)


def _require_room_for_files(
    archive: Archive, folder: Path, files: Sequence[FileEntry], there: int, consume: bool
) -> None:
    """Refuse before the first byte when files do not fit, of which `there` bytes are written.

    With `consume` the parts of the archive make room. Raises DiskError.
    """
    what = f"unpack into {folder}"
    step = "free space, or choose another folder with -o DIR"
    if not consume and not isinstance(archive, Streamed):
        step = "free space, give --consume, or choose another folder with -o DIR"
    step += _step_of_kept(folder)
    sizes = [entry.size for entry in files]
    needed = sum(sizes) - there
    if consume:
        needed -= _freed_on_the_way(archive, folder)
    largest = max(sizes, default=0)
    require_room(folder, needed, largest, what, step)
    require_inodes(folder, len(files) + SPARE_INODES, what, step)


def _step_of_kept(folder: Path) -> str:
    """The command that makes room where earlier versions of a model are kept, as one more step."""
    name = folder.name.partition("~")[0]
    kept = kept_versions(folder.with_name(name))
    if not kept:
        return ""
    return "\nor without the oldest version that is kept: " + command_line(
        "rm", "-r", kept[0].folder
    )


def _freed_on_the_way(archive: Archive, folder: Path) -> int:
    """Bytes that --consume frees on the disk of `folder` while files are written.

    All parts that are there but one: it is removed only when its files are safe.
    """
    medium = os.stat(archive.files.path)
    target = os.stat(folder)
    if medium.st_dev != target.st_dev:
        return 0

    sizes: List[int] = []
    for part in archive.parts:
        if part.path.exists():
            sizes.append(part.size)

    return sum(sizes) - max(sizes)
