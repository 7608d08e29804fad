# SPDX-License-Identifier: Apache-2.0
"""Models from the Hub to their folders: plan, mend, download, finish.

Owns the order of the steps: what the repository has and what of it is here and proven; what needs
no download; the download of the rest; the manifest, last. Promises: a folder with a manifest of a
commit has every file of it, proven; another model in the folder is never touched.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

from hfship.base.below import Refused, owner_in, owner_of
from hfship.base.content import PARTIAL_DIR, all_folders_of, check_distinct_paths
from hfship.base.errors import (
    DiskError,
    HfshipError,
    IncompleteError,
    IntegrityError,
    NotFoundError,
    UsageError,
    command_line,
)
from hfship.base.filenames import require_names
from hfship.base.files import (
    SPARE_INODES,
    WORK_DIR,
    disk_errors,
    make_dir,
    remove_if_empty,
)
from hfship.base.imagefacts import KIND
from hfship.base.locks import FolderLock
from hfship.base.manifest import (
    FileEntry,
    make_manifest,
    read_manifest,
    write_manifest,
)
from hfship.base.settings import DEFAULT_ENDPOINT
from hfship.base.text import counted, human_bytes, printable, shorten, utc_exact
from hfship.base.values import dataclass, replace
from hfship.base.weights import missing_shards
from hfship.hub.aria2 import fetch_with_aria2
from hfship.hub.download import Download
from hfship.hub.partial import Transfer, is_ours
from hfship.hub.protocol import fetch_command
from hfship.hub.ranges import SMALL_FILE
from hfship.hub.repair import mend_locally
from hfship.hub.select import (
    is_usable_path,
    pattern_of,
    refusal_of,
    select_files,
    without_duplicates,
)
from hfship.hub.verified import FileHasher, VerifiedLog, hash_below

if TYPE_CHECKING:
    from hfship.base.imagefacts import ImageFacts
    from hfship.base.manifest import Manifest, Source
    from hfship.base.progress import Stage
    from hfship.base.report import Reporter
    from hfship.hub.client import HubClient
    from hfship.hub.download_state import TransferSettings
    from hfship.hub.protocol import RemoteFile, Snapshot
    from hfship.hub.transport import Transport

MOST_NAMED = 20  # files in an error


@dataclass(frozen=True)
class FetchRequest:
    """What the operator asked for: one repository and the files of it."""

    repo: str
    revision: Optional[str]  # None: the default branch
    name: str  # of the model folder
    repo_type: str = "model"
    include: Tuple[str, ...] = ()
    exclude: Tuple[str, ...] = ()
    all_files: bool = False  # also weights in formats that vLLM does not read
    rehash: bool = False  # believe no record: hash what is there


@dataclass(frozen=True)
class FetchPlan:
    """What one repository needs: the files that are wanted, and which are there, proven."""

    name: str
    folder: Path
    snapshot: Snapshot
    wanted: Tuple[RemoteFile, ...]
    present: Mapping[str, str]  # path -> SHA-256
    log: VerifiedLog
    outdates: bool = False  # a manifest of another commit lies there
    hub_notes: bool = True  # huggingface_hub finds nothing to do there

    @property
    def left_out(self) -> Tuple[str, ...]:
        """Paths of the other files of the repository."""
        wanted = {file.path for file in self.wanted}
        others = [file.path for file in self.snapshot.files if file.path not in wanted]
        return tuple(sorted(path for path in others if is_usable_path(path)))

    @property
    def transfers(self) -> List[Transfer]:
        """The files that are to be fetched."""
        source = self.snapshot.source
        hub_notes = self.hub_notes and source.repo_type != KIND
        if any(file.path.startswith(".cache/") for file in self.wanted):
            hub_notes = False
        return [
            Transfer(file, source, self.folder, self.log, self.outdates, hub_notes)
            for file in self.wanted
            if file.path not in self.present
        ]

    @property
    def new_inodes(self) -> int:
        """How many files will be made at the most: huggingface_hub has a record of each, too."""
        return 2 * len(self.transfers) + SPARE_INODES

    @property
    def present_sizes(self) -> List[int]:
        """Bytes of each file that is there."""
        return [file.size for file in self.wanted if file.path in self.present]


# -- the plan


def plan_all(
    client: HubClient,
    requests: Sequence[FetchRequest],
    root: Path,
    locks: contextlib.ExitStack,
    stop: threading.Event,
    dry_run: bool,
) -> Tuple[List[FetchPlan], List[HfshipError]]:
    """The plans of all repositories, and what went wrong with others of a list.

    Unless it is a dry run their folders are made and locked until `locks` is closed; whoever takes
    a lock away from us sets `stop`. Raises the HfshipError of a repository that is the only one.
    """
    plans: List[FetchPlan] = []
    failures: List[HfshipError] = []
    reporter = client.reporter
    for number, request in enumerate(requests, 1):
        folder = root / request.name
        try:
            with about_one_of(reporter, request.name, number, len(requests)):
                if not dry_run:
                    lock_folder(folder, locks, stop)
                plan = plan_fetch(client, request, folder, reporter, dry_run)
            plans.append(plan)
        except HfshipError as exc:
            if len(requests) == 1:
                raise
            failures.append(exc)

    return plans, failures


def about_one_of(reporter: Reporter, name: str, number: int, count: int) -> ContextManager[None]:
    """Work on one of several models: each line and bar names it, as `2/3 NAME`."""
    if count < 2:
        return contextlib.nullcontext()
    return reporter.about(name, number, count)


def lock_folder(folder: Path, locks: contextlib.ExitStack, stop: threading.Event) -> None:
    """Make a folder and have it locked until `locks` is closed; whoever takes the lock away from us
    sets `stop`. Raises DiskError for one of another user."""
    locks.callback(remove_if_empty, folder)
    _require_ours(make_dir(folder), ("", WORK_DIR, PARTIAL_DIR))
    lock = locks.enter_context(FolderLock(folder, stop.set))
    if lock.doubtful:  # whoever held it may still write: start over in files of our own
        for path in (folder / PARTIAL_DIR).glob("*.part"):
            path.unlink()


def _require_ours(folder: Path, inside: Iterable[str]) -> None:
    """Refuse a folder of another user, who can change what was proven in it: the folders at the
    paths `inside`, as far as they are there. Raises DiskError."""
    with disk_errors("use", folder):
        ours = owner_in(folder).uid
        for path in inside:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(folder / path)
                if status.st_uid not in (ours, 0):
                    raise _foreign_folder(folder, folder / path, owner_of(status))


def _foreign_folder(folder: Path, foreign: Path, owner: str) -> DiskError:
    us = f"{os.geteuid()}:{os.getegid()}"
    take_over = command_line("chown", "-R", us, folder)
    return DiskError(
        f"cannot fetch into {folder}: {foreign} belongs to {owner}",
        "who could change the files after they were proven",
        f"run it as {owner}, choose another folder with -o DIR, or take this one over:\n"
        f"{take_over}",
    )


def plan_fetch(
    client: HubClient,
    request: FetchRequest,
    folder: Path,
    reporter: Reporter,
    dry_run: bool = False,
) -> FetchPlan:
    """Ask the Hub what the repository has and look at what is here.

    Writes nothing but the record of proven files; unless it is a dry run, the filesystem is asked
    whether it takes the names. Raises what HubClient.snapshot does, UsageError,
    NotFoundError, DiskError.
    """
    with reporter.clock(f"asking for the files of {request.repo}"):
        snapshot = client.snapshot(request.repo, request.revision, request.repo_type)
    source = snapshot.source
    manifest = readable_manifest(folder)
    held = manifest.source if manifest else None
    if held and held.resolved_repo != source.resolved_repo:
        raise UsageError(
            f"{folder} holds another model, {held.resolved_repo}",
            "",
            f"hfship fetch {request.repo} --name ANOTHER_NAME",
        )

    wanted = _wanted_files(request, snapshot, reporter)
    _require_usable(wanted, request, source, folder)
    if manifest and held and held.commit == source.commit:
        wanted = _with_earlier(wanted, snapshot, folder, manifest, reporter)
    _require_hashes(wanted, request, source, folder)
    paths = [file.path for file in wanted]
    if not dry_run:
        _require_ours(folder, all_folders_of(paths))
        require_names(folder, paths, f"fetch into {folder}")

    log = VerifiedLog(folder)
    present = present_files(folder, wanted, log, reporter, request.rehash)
    outdates = held is None or held.commit != source.commit
    count = counted(len(wanted), "file")
    commit = f"{source.resolved_repo}: {source.revision} is {source.commit}"
    reporter.detail(f"{commit}; {count} wanted, {len(present)} of them here and proven")
    return FetchPlan(
        name=request.name,
        folder=folder,
        snapshot=snapshot,
        wanted=tuple(wanted),
        present=present,
        log=log,
        outdates=outdates,
    )


def readable_manifest(folder: Path) -> Optional[Manifest]:
    """The manifest of a folder; None for none, and for one that is damaged."""
    with contextlib.suppress(IntegrityError):
        return read_manifest(folder)
    return None


def _wanted_files(
    request: FetchRequest, snapshot: Snapshot, reporter: Reporter
) -> Sequence[RemoteFile]:
    """The files of a repository that were asked for. Raises NotFoundError when these are none."""
    wanted = select_files(snapshot.files, request.include, request.exclude)
    if request.repo_type == "model" and not request.all_files and not request.include:
        needed = without_duplicates(wanted)
        _report_left_out(request.repo, wanted, needed, reporter)
        wanted = needed

    if not wanted:
        raise NotFoundError(
            f"nothing to fetch from {request.repo}",
            f"{counted(len(snapshot.files), 'file')} in the repository, none selected",
            "check --include and --exclude",
        )

    return wanted


def _report_left_out(
    repo: str, everything: Sequence[RemoteFile], needed: Sequence[RemoteFile], reporter: Reporter
) -> None:
    kept = {file.path for file in needed}
    left_out = [file for file in everything if file.path not in kept]
    if not left_out:
        return

    count = counted(len(left_out), "file")
    size = human_bytes(total_size(left_out))
    names = shorten([printable(file.path) for file in left_out])
    reporter.info(
        f"{repo}: leaving out {count} ({size}) in formats that vLLM does not read;"
        f" --all-files brings them: {names}"
    )


def _require_usable(
    wanted: Sequence[RemoteFile], request: FetchRequest, source: Source, folder: Path
) -> None:
    """Refuse names that cannot be files of a model, with the command that leaves them out. Raises
    IntegrityError."""
    refused: Dict[str, str] = {}  # pattern -> why
    try:
        for file in wanted:
            why = refusal_of(file.path)
            if why:
                refused[pattern_of(file.path)] = why
        check_distinct_paths(file.path for file in wanted)
    except ValueError as exc:
        step = f"tell the owner of {source.repo}"
        raise IntegrityError(_unusable(source), str(exc), step) from exc

    if refused:
        step = _rest_without(refused, request, source, folder)
        step += f"\nand tell the owner of {source.repo}"
        raise IntegrityError(_unusable(source), shorten(list(refused.values())), step)


def _require_hashes(
    wanted: Sequence[RemoteFile], request: FetchRequest, source: Source, folder: Path
) -> None:
    """Refuse files that nothing would prove, as some proxies of the Hub list them. Raises
    IntegrityError."""
    unproven = [file.path for file in wanted if not file.etag]
    if not unproven:
        return

    elsewhere = command_line("hfship", "fetch", source.repo, "--mirror", source.endpoint)
    step = f"HF_ENDPOINT={DEFAULT_ENDPOINT} {elsewhere} (hashes from there, bytes from here)"
    if len(unproven) < len(wanted) and len(unproven) <= MOST_NAMED:
        step += "\n" + _rest_without(map(pattern_of, unproven), request, source, folder)
    count = counted(len(unproven), "file")
    raise IntegrityError(
        f"{source.endpoint} lists {count} of {source.repo} without a hash",
        f"nothing would prove {printable(shorten(unproven, 5))}",
        step,
    )


def _rest_without(
    patterns: Iterable[str], request: FetchRequest, source: Source, folder: Path
) -> str:
    """The command that fetches all but what matches some more patterns."""
    flags: List[str] = []
    for pattern in request.include:
        flags += ["--include", pattern]
    for pattern in [*request.exclude, *patterns]:
        flags += ["--exclude", pattern]
    if request.all_files:
        flags.append("--all-files")
    return f"to fetch the rest: {fetch_command(source, source.revision, folder, *flags)}"


def _unusable(source: Source) -> str:
    return f"the listing of {source.repo} cannot be used"


def _with_earlier(
    wanted: Sequence[RemoteFile],
    snapshot: Snapshot,
    folder: Path,
    manifest: Manifest,
    reporter: Reporter,
) -> Sequence[RemoteFile]:
    """The wanted files and those that earlier selections of this commit brought, as far as they
    are still there: selections add up."""
    paths = {file.path for file in wanted}
    earlier = set()
    for entry in manifest.files:
        if entry.path not in paths and os.path.lexists(folder / entry.path):
            earlier.add(entry.path)

    together = [file for file in snapshot.files if file.path in paths or file.path in earlier]
    added = len(together) - len(wanted)
    if added:
        count = counted(added, "file")
        reporter.info(f"{manifest.name}: {count} of earlier selections of this commit stay")
    return together


def total_size(files: Iterable[RemoteFile]) -> int:
    """Bytes of all files together."""
    return sum(file.size for file in files)


def present_files(
    folder: Path,
    wanted: Sequence[RemoteFile],
    log: VerifiedLog,
    reporter: Reporter,
    rehash: bool = False,
) -> Dict[str, str]:
    """path -> SHA-256 of the wanted files that lie in the folder already.

    Files that this hfship did not prove, or all with `rehash`, are hashed now and adopted when they
    are right (`hf download` never checks a hash).
    """
    present: Dict[str, str] = {}
    unproven: List[RemoteFile] = []
    for remote in wanted:
        sha256 = None
        if not rehash:
            sha256 = log.sha256_of(remote)
        if sha256:
            present[remote.path] = sha256
        elif is_ours(folder, remote):
            unproven.append(remote)

    with reporter.stage("checking", total_size(unproven)) as stage:
        for remote in unproven:
            sha256 = _prove(folder, remote, log, stage)
            if sha256:
                present[remote.path] = sha256

    return present


def _prove(folder: Path, remote: RemoteFile, log: VerifiedLog, stage: Stage) -> Optional[str]:
    """Read a file that lies there. Its SHA-256 if it is right, which is remembered; else None.

    Raises DiskError.
    """
    hasher = FileHasher(remote)
    with disk_errors("read", folder / remote.path):
        try:
            status = hash_below(folder, remote.path, hasher, stage.add)
        except (FileNotFoundError, Refused):  # it was there a moment ago
            return None

    if not hasher.matches():
        return None

    log.add(remote, status, hasher)
    return hasher.sha256


def bytes_to_write(plan: FetchPlan) -> int:
    """Room that the plan still needs: missing bytes, less the blocks that unfinished files have on
    the disk already."""
    return sum(transfer.remote.size - transfer.allocated for transfer in plan.transfers)


def missing_or_wrong(plan: FetchPlan) -> List[HfshipError]:
    """What `fetch --verify` found: an error for the files that are wrong, one for the missing."""
    wrong: List[str] = []
    missing: List[str] = []
    for transfer in plan.transfers:
        path = transfer.remote.path
        if transfer.target.exists():
            wrong.append(path)
        else:
            missing.append(path)

    folder = plan.folder
    source = plan.snapshot.source
    step = fetch_command(source, source.revision, folder, "--repair")
    errors: List[HfshipError] = []
    if wrong:
        count = counted(len(wrong), "wrong file")
        what = f"{folder}: {count}"
        names = _first_names(wrong)
        errors.append(IntegrityError(what, names, step))

    if missing:
        count = counted(len(missing), "missing file")
        what = f"{folder}: {count}"
        names = _first_names(missing)
        errors.append(IncompleteError(what, names, step))

    return errors


def _first_names(paths: Sequence[str]) -> str:
    """The first paths of a list that may be long, for an error."""
    named = paths[:MOST_NAMED]
    return ", ".join(named)


# -- the work


def mend_plan(client: Transport, plan: FetchPlan, root: Path, repair_only: bool) -> FetchPlan:
    """The plan without the files that could be repaired or taken from this machine."""
    mended = mend_locally(client, plan.transfers, root, repair_only)
    return replace(plan, present={**plan.present, **mended})


def fetch_files(
    client: Transport,
    plans: Sequence[FetchPlan],
    stop: threading.Event,
    settings: TransferSettings,
    engine: str,
) -> int:
    """Bring what is missing, all plans through one pool of connections. Returns the bytes that
    came.

    engine: "own", or "aria2" for the large files; small ones are our own either way. Raises the
    HfshipError that ended it, with everything that arrived kept.
    """
    ours: List[Transfer] = []
    theirs: List[Transfer] = []
    for plan in plans:
        for transfer in plan.transfers:
            if engine == "aria2" and transfer.remote.size > SMALL_FILE:
                theirs.append(transfer)
            else:
                ours.append(transfer)

    came = 0
    if theirs:
        came += _fetch_with_aria2(client, theirs, settings)
    if ours:
        present = [size for plan in plans for size in plan.present_sizes]
        came += _fetch_ourselves(client, ours, present, stop, settings)

    return came


def _fetch_with_aria2(
    client: Transport, transfers: Sequence[Transfer], settings: TransferSettings
) -> int:
    size = total_size(transfer.remote for transfer in transfers)
    with client.reporter.stage("fetching (aria2)", size) as stage:
        fetch_with_aria2(client, transfers, stage, settings)
    return stage.total - stage.skipped


def _fetch_ourselves(
    client: Transport,
    transfers: Sequence[Transfer],
    present: Sequence[int],
    stop: threading.Event,
    settings: TransferSettings,
) -> int:
    """Of the progress the sizes of files that are `present` are a part: an earlier run brought
    them."""
    missing_size = total_size(transfer.remote for transfer in transfers)
    present_size = sum(present)
    with client.reporter.stage("fetching", missing_size + present_size) as stage:
        download = Download(client, transfers, stage, stop, settings)
        stage.skip(present_size)
        stage.expect(len(present))
        stage.finish(len(present))
        download.run()

    return stage.total - stage.skipped


def finish_fetch(
    plan: FetchPlan,
    image: Optional[ImageFacts] = None,
    accept: Callable[[Path, Manifest], Manifest] = lambda _, manifest: manifest,
) -> Manifest:
    """All files are proven: write the manifest, as `accept` returns it for the folder; of an
    `image` with what is known of it.

    An unchanged manifest keeps its bytes, so that packing it again gives the same archive. Raises
    IntegrityError when a file was touched since it was proven, and what `accept` raises.
    """
    entries = []
    for file in plan.wanted:
        sha256 = plan.log.sha256_of(file)
        if not sha256:
            raise IntegrityError(
                f"{file.path} changed while it was fetched",
                "",
                "run the same command again",
            )
        entries.append(FileEntry(file.path, file.size, sha256))

    source = replace(plan.snapshot.source, fetched_at=utc_exact())
    left_out = plan.left_out
    manifest = replace(
        make_manifest(plan.name, entries, source),
        left_out=len(left_out),
        left_out_paths=left_out,
        partial=_missing_shards(plan),
        image=image,
        card=plan.snapshot.card,
    )
    manifest = accept(plan.folder, manifest)
    _remove_journals(plan.folder / PARTIAL_DIR)
    held = readable_manifest(plan.folder)
    if held and _equal_but_for_time(held, manifest):
        return held

    write_manifest(plan.folder, manifest)
    return manifest


def _missing_shards(plan: FetchPlan) -> Tuple[str, ...]:
    """Files of weights that an index of the model names and that were not wanted."""
    paths = {file.path for file in plan.wanted}
    with contextlib.suppress(IntegrityError):  # as it is published: who serves it is told
        return tuple(missing_shards(plan.folder, paths))
    return ()


def _remove_journals(folder: Path) -> None:
    """Remove the folder of journals, unless it holds some of other files."""
    with contextlib.suppress(OSError):
        for left in folder.glob(".*.tmp"):  # by a kill between the two steps of an atomic write
            left.unlink()
        folder.rmdir()


def _equal_but_for_time(held: Manifest, manifest: Manifest) -> bool:
    """Do two manifests differ at most in when their files were fetched?"""
    if held.source is None:
        return False
    if manifest.source is None:
        return False
    source = replace(held.source, fetched_at=manifest.source.fetched_at)
    return replace(held, source=source) == manifest
