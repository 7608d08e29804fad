# SPDX-License-Identifier: Apache-2.0
"""What killed runs left, and its removal.

Owns the rules by which a file of hfship or huggingface_hub is a leftover. Promises: a file goes
only if its name and place say that it is unfinished or unused, if nobody works in its group (a
model folder, an archive, a repository of a cache), and if it still is the file that was shown.
Never: follows a symbolic link below the folder; removes what a manifest lists.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import (
    AbstractSet,
    Callable,
    Dict,
    Generator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from hfship.base.below import remove_below
from hfship.base.content import (
    MARK_PATH,
    REPLACED,
    is_work_folder,
)
from hfship.base.errors import HfshipError, NotFoundError, UsageError
from hfship.base.files import INCOMPLETE, WORK_DIR, disk_error, remove_if_empty
from hfship.base.locks import FolderLock, host_name, process_start
from hfship.base.manifest import (
    MANIFEST_PATH,
    listed_paths,
    read_manifest,
)
from hfship.base.reading import read_small
from hfship.base.values import dataclass

# What changed less than this many seconds ago may be in use by a host or a user whose processes
# we cannot see.
YOUNG_S = 60.0

_SIDECAR = r"READ-ME-FIRST\.txt|hfship\.pyz|[^/]+\.tar\.zst(?:\.\d{4,}|\.sha256|\.sig)?"
_HF_DOWNLOADS = r"(^|/)\.cache/huggingface/download/(.+/)?[^/]+"
_WORK = r"(^|/)\.hfship/partial/[0-9a-f]{40}\."
_TEMPORARY = rf"(^|/)\.(?:{_SIDECAR}|[^/]+\.(?:json|metadata)|lease)\.\d+\.tmp$"
# Path below the folder -> what it is. The first row that matches counts.
_LEFTOVERS = (
    (re.compile(_HF_DOWNLOADS + r"\.incomplete$"), "unfinished download of hf"),
    (re.compile(_HF_DOWNLOADS + r"\.lock$"), "lock of hf"),
    (re.compile(_WORK + r"(part|json|now|part\.aria2)$"), "unfinished download"),
    (re.compile(rf"(^|/)(?:{_SIDECAR})\.incomplete$"), "unfinished archive"),
    (re.compile(_TEMPORARY), "unfinished file"),
)
_BOOKKEEPING = re.compile(r"\.(hfship|cache/huggingface)/")
_ARCHIVE = re.compile(r"\.?(.+\.tar\.zst)")
_LEASE = (WORK_DIR, "lease")

_REPO_FOLDER = re.compile(r"(models|datasets|spaces)--.+$")
_SHARED_CONTENT = re.compile(r"[0-9a-f]{64}(\.refs|\.lock)?$")

_CHUNK_CACHES = ("chunk[-_]cache", "*/chunk[-_]cache")
# One of these shows that a folder is ours to clean.
_CLEANABLE = (
    f"{WORK_DIR}/*",
    f"*/{WORK_DIR}",
    f"*/*/{WORK_DIR}",
    ".cache/huggingface",
    "*/.cache/huggingface",
    "*.tar.zst*",
    "config.json",
    "*/config.json",
    "*.safetensors",
    "*/*.safetensors",
    *_CHUNK_CACHES,
)

AS_OWNER = "run it as the user who owns the folder"
Files = Dict[Path, os.stat_result]


class Leftover(NamedTuple):
    """A file, or a link in a cache, that may go."""

    path: Path
    what: str  # for people
    group: Path  # what somebody works in as a whole: a model, an archive, a repository of a cache
    status: os.stat_result  # its lstat when it was seen


def files_below(folder: Path, closed: Optional[Set[Path]] = None) -> Files:
    """All in a folder that is not a folder, links too, with its lstat.

    Raises DiskError where it cannot look, but for folders in it that another user closed, if there
    is a set to put them into. A folder that is a link, or not there, has none.
    """

    def refuse(exc: OSError) -> None:
        if isinstance(exc, FileNotFoundError):
            return
        place = Path(exc.filename)
        if closed is not None and isinstance(exc, PermissionError) and place != folder:
            closed.add(place)
            return
        raise disk_error(exc, "look into", place, AS_OWNER)

    found: Files = {}
    if folder.is_symlink():
        return found

    for root, folders, names in os.walk(folder, onerror=refuse):
        for name in folders:
            path = os.path.join(root, name)
            if os.path.islink(path):
                names.append(name)
        for name in names:
            path = os.path.join(root, name)
            with contextlib.suppress(FileNotFoundError):  # a live download finished it meanwhile
                found[Path(path)] = os.lstat(path)

    return found


# ---- folders of models and archives --------------------------------------------------


class Holder(NamedTuple):
    """The folder that a file belongs to: a model, or one that holds archives."""

    folder: Path
    is_model: bool  # it has a folder of ours for bookkeeping
    listed: AbstractSet[str]  # content by its manifest, whatever the names look like
    fate: str  # what the folder as a whole is, if it may go; else ""


def _files_seen(folder: Path, complain: Callable[[str], None]) -> Files:
    """All files below a folder, but for leases, which go with the lock that we take, and for models
    in which a folder may not be looked into: those are left alone, which `complain` is told."""
    closed: Set[Path] = set()
    files = files_below(folder, closed)
    left_alone: Set[Path] = set()
    is_model = (folder / WORK_DIR).is_dir()
    for place in sorted(closed):
        model = folder
        if not is_model:
            model = folder / place.relative_to(folder).parts[0]
        if model not in left_alone:
            left_alone.add(model)
            complain(f"{model} is left alone: {place} may not be looked into")

    seen: Files = {}
    for path, status in files.items():
        if path.parts[-2:] != _LEASE and left_alone.isdisjoint(path.parents):
            seen[path] = status
    return seen


def folder_leftovers(
    folder: Path, complain: Callable[[str], None] = lambda _: None
) -> List[Leftover]:
    """What killed runs left in a folder of models or archives, or in a model. `complain` is called
    with a sentence about each model that is left alone, because not all of it can be seen."""
    files = _files_seen(folder, complain)

    models: Set[Path] = set()
    for path in files:
        for parent in path.parents:
            if parent.name == WORK_DIR:
                models.add(parent.parent)

    holders: Dict[Path, Holder] = {}
    found = []
    going: Set[Path] = set()
    for path, status in files.items():
        place = _holding_folder(path, models)
        if place not in holders:
            holders[place] = _holder(place, place in models)
        holder = holders[place]
        what = holder.fate or _what_remains(path, folder, holder)
        if what:
            group = _group(path, holder)
            found.append(Leftover(path, what, group, status))
            going.add(path)

    return found + _empty_models(models, files, going)


def _holding_folder(path: Path, models: AbstractSet[Path]) -> Path:
    """The innermost model that a file lies in; else its folder."""
    for parent in path.parents:
        if parent in models or is_work_folder(parent.name):
            return parent
    return path.parent


def _holder(folder: Path, is_model: bool) -> Holder:
    listed: AbstractSet[str] = frozenset()
    if is_model:
        listed = _listed_paths(folder)
    has_manifest = (folder / MANIFEST_PATH).exists()
    is_ours = is_work_folder(folder.name) and (folder / MARK_PATH).is_file()
    name, _, _ = folder.name.rpartition("~")
    fate = ""
    if is_ours and folder.name.endswith(REPLACED):
        # While NAME is missing, the model that was to be replaced is the only one there is.
        if folder.with_name(name).is_dir():
            fate = "replaced model"
    elif is_ours and not has_manifest:
        fate = "unfinished unpack"

    return Holder(folder, is_model, listed, fate)


def _what_remains(path: Path, folder: Path, holder: Holder) -> str:
    """What a single file is by its name and place, if it may go; else ""."""
    if path.relative_to(holder.folder).as_posix() in holder.listed:
        return ""

    name = path.relative_to(folder).as_posix()
    for pattern, what in _LEFTOVERS:
        if pattern.search(name):
            return what

    return ""


def _group(path: Path, holder: Holder) -> Path:
    """What a file belongs to: its model, or the archive that it is a part or sidecar of."""
    archive = _ARCHIVE.match(path.name)
    if archive and not holder.is_model:
        return path.parent / archive[1]
    return holder.folder


def _empty_models(
    models: AbstractSet[Path], files: Mapping[Path, os.stat_result], going: Set[Path]
) -> List[Leftover]:
    """The bookkeeping of models that have no manifest, and no other file once `going` are gone."""
    found = []
    for model in sorted(models, reverse=True):  # a model may lie in another one
        if (model / MANIFEST_PATH).exists():
            continue
        left = []
        has_content = False
        for path in files:
            if model not in path.parents or path in going:
                continue
            left.append(path)
            name = path.relative_to(model).as_posix()
            if not _BOOKKEEPING.match(name):
                has_content = True
        if has_content:
            continue
        for path in left:
            found.append(Leftover(path, "empty model folder", model, files[path]))
        going.update(left)

    return found


def _listed_paths(model: Path) -> AbstractSet[str]:
    """Files that belong to a finished model, whatever their names look like."""
    with contextlib.suppress(HfshipError):
        return listed_paths(read_manifest(model))
    return frozenset()


# ---- caches of huggingface_hub -------------------------------------------------------

Identity = Tuple[int, int]


def cache_leftovers(cache: Path, old_revisions: bool) -> List[Leftover]:
    """What is unfinished or unused in a cache of huggingface_hub.

    With `old_revisions` also the revisions that no ref leads to.
    """
    found: List[Leftover] = []
    used: Set[Identity] = set()
    for repo in sorted(cache.iterdir()):
        if not _REPO_FOLDER.match(repo.name):
            continue
        found += _repo_leftovers(repo, old_revisions)
        blobs = repo.resolve() / "blobs"
        for path in files_below(blobs):
            used.add(_first_step(path))

    locks = cache / ".locks"
    for path, status in files_below(locks).items():
        repo = cache / path.relative_to(locks).parts[0]
        found.append(Leftover(path, "lock of hf", repo, status))

    return found + _unused_shared_contents(cache / "blobs", used)


def _unused_shared_contents(store: Path, used: AbstractSet[Identity]) -> List[Leftover]:
    """Contents that several repositories shared, and none uses any more.

    Each content HASH has a list of its names in HASH.refs, and maybe a HASH.lock.
    """
    if not (store / ".huggingface-shared-blobs").is_file():
        return []

    found = []
    files = files_below(store)
    for path, status in files.items():
        if not _SHARED_CONTENT.match(path.name):
            continue
        content = path.with_name(path.name[:64])
        refs = content.with_name(f"{content.name}.refs")
        if content not in files or refs not in files:
            continue
        identity = _identity(files[content])
        if identity not in used:
            found.append(Leftover(path, "unused content", content, status))

    return found


def _identity(status: os.stat_result) -> Identity:
    """What names a file whatever path leads to its folder."""
    return status.st_dev, status.st_ino


def _first_step(path: Path) -> Identity:
    """The identity of what a link leads to, which may be a link.

    (0, 0) for other files, and if nothing is there.
    """
    with contextlib.suppress(OSError):
        target = os.path.join(path.parent, os.readlink(path))
        status = os.lstat(target)
        return _identity(status)
    return 0, 0


def _repo_leftovers(repo: Path, old_revisions: bool) -> List[Leftover]:
    """What may go of one repository of a cache.

    Unfinished and unreferenced blobs, links to nothing, and revisions that no ref leads to.
    """
    refs = repo / "refs"
    snapshots = repo / "snapshots"
    blobs = repo / "blobs"
    for folder in (repo, refs, snapshots, blobs):
        if folder.is_symlink():
            return []

    found = _snapshot_leftovers(repo, refs, snapshots, old_revisions)
    going = {item.path for item in found}
    used = set()
    for path in files_below(snapshots):
        if path not in going:
            used.add(_first_step(path))

    for path, status in files_below(blobs).items():
        if _identity(status) in used:
            continue
        what = "unused content"
        if path.suffix == INCOMPLETE:
            what = "unfinished download of hf"
        found.append(Leftover(path, what, repo, status))

    return found


def _snapshot_leftovers(
    repo: Path, refs: Path, snapshots: Path, old_revisions: bool
) -> List[Leftover]:
    known = set()
    for ref in files_below(refs):
        try:
            commit = read_small(ref).decode("utf-8", "replace").strip()
        except OSError:  # nobody knows which revision it needs
            old_revisions = False
        else:
            known.add(commit)

    found = []
    for path, status in files_below(snapshots).items():
        commit = path.relative_to(snapshots).parts[0]
        if old_revisions and commit not in known:
            found.append(Leftover(path, "old revision", repo, status))
        elif path.is_symlink() and not path.exists():
            found.append(Leftover(path, "link to nothing", repo, status))

    return found


# ---- who works there -----------------------------------------------------------------

OpenFiles = Dict[str, Dict[int, int]]


def open_files(names: AbstractSet[str]) -> OpenFiles:
    """Files with these names that processes hold open or have mapped.

    name -> {inode: process}, as far as we may look into other processes.
    """
    found: OpenFiles = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        if pid != os.getpid():
            with contextlib.suppress(OSError):  # gone, or of another user
                _add_open_files(pid, names, found)

    return found


def _add_open_files(pid: int, names: AbstractSet[str], found: OpenFiles) -> None:
    for fd in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(fd.path)
            name = os.path.basename(target)
            if name in names:
                status = os.stat(fd.path)
                holders = found.setdefault(name, {})
                holders[status.st_ino] = pid

    maps = Path(f"/proc/{pid}/maps")
    text = maps.read_text(errors="replace")
    for line in text.splitlines():
        *_, inode, path = line.split(None, 5)
        name = os.path.basename(path)
        if name in names and inode.isdigit():
            holders = found.setdefault(name, {})
            holders[int(inode)] = pid


def is_locked(path: Path) -> bool:
    """Whether a process holds an flock on a file, or the file itself is a lock.

    The latter is filelock's SoftFileLock: it holds the process and, on a line below, its host.
    """
    never_wait = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, never_wait)
    except OSError:
        return False

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = os.read(fd, 300).decode("utf-8", "replace")
    except BlockingIOError:
        return True
    finally:
        os.close(fd)

    pid, _, host = content.strip().partition("\n")
    if path.suffix != ".lock" or not pid.isdigit():
        return False
    if host not in ("", host_name()):
        return True  # nobody can look into another machine

    return bool(process_start(int(pid)))


def why_kept(
    group: Path, items: Sequence[Leftover], opened: OpenFiles, stack: contextlib.ExitStack
) -> str:
    """Why a group must stay as it is; "" when nobody works in it.

    Our own lock on it is then held by `stack`, which also takes a lock file away that was not
    there before.
    """
    claimed = group.name + INCOMPLETE  # a pack holds this one, and parts maybe on another medium
    holders = opened.get(claimed)
    if group.suffix == ".zst" and holders:
        pid = min(holders.values())
        return f"process {pid} has {claimed} open"

    now = time.time()
    for item in items:
        reason = _why_item_is_kept(item, opened, now)
        if reason:
            return reason

    return _why_not_lockable(group, stack)


def _why_item_is_kept(item: Leftover, opened: OpenFiles, now: float) -> str:
    name = item.path.name
    holders = opened.get(name, {})
    pid = holders.get(item.status.st_ino)
    if pid is not None:
        return f"process {pid} has {name} open"
    if is_locked(item.path):
        return f"a process holds {name}"
    if item.path.parent.name == WORK_DIR:  # there the lock knows better
        return ""

    age = now - item.status.st_mtime
    if age < YOUNG_S:
        age = max(age, 0)
        return f"{name} changed {age:.0f} s ago, which is too new: try again in a minute"

    return ""


def _why_not_lockable(group: Path, stack: contextlib.ExitStack) -> str:
    folder = group / WORK_DIR
    if not folder.is_dir() or folder.is_symlink():
        return ""

    existed = os.path.lexists(folder / "lock")
    try:
        stack.enter_context(FolderLock(group))
    except HfshipError as exc:
        return exc.what

    if not existed:
        stack.callback(remove_below, group, f"{WORK_DIR}/lock")  # while it is still ours
    return ""


# ---- removing ------------------------------------------------------------------------


def remove_leftover(root: Path, item: Leftover) -> bool:
    """Remove a file if it still is the one that was seen; whether it was.

    Folders on the way from `root` are opened one by one, links refused. Raises DiskError.
    """
    *folders, name = item.path.relative_to(root).parts
    of_folder = os.O_RDONLY | os.O_DIRECTORY
    fd = os.open(root, of_folder)
    try:
        for folder in folders:
            inner = os.open(folder, of_folder | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        same = _version(status) == _version(item.status)
        if same:
            os.unlink(name, dir_fd=fd)
        return same
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise disk_error(exc, "remove", item.path, AS_OWNER) from exc
    finally:
        os.close(fd)


def _version(status: os.stat_result) -> Tuple[int, int, int]:
    """What changes when somebody writes to a file or puts another in its place."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def remove_empty_folders(gone: Sequence[Tuple[Leftover, Path]]) -> None:
    """Remove what became empty without these files, each given with the folder that was cleaned."""
    folders: Set[Path] = set()
    groups: Set[Path] = set()
    for item, root in gone:
        for folder in item.path.parents:
            if root in folder.parents:
                folders.add(folder)
        if root in item.group.parents:
            groups.add(item.group)

    for folder in sorted(folders, reverse=True):  # the innermost first
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)

    for group in groups:
        remove_if_empty(group)


def disk_usage(items: Sequence[Leftover]) -> int:
    """Bytes that files take on the disk."""
    return sum(item.status.st_blocks * 512 for item in items)


def freed_by(items: Sequence[Leftover]) -> int:
    """Bytes that the disk gets back.

    A file with several names counts once, and only when all of them go.
    """
    names: Dict[Identity, int] = Counter()
    statuses = {}
    for item in items:
        identity = _identity(item.status)
        names[identity] += 1
        statuses[identity] = item.status

    freed = 0
    for identity, status in statuses.items():
        if status.st_nlink <= names[identity]:
            freed += status.st_blocks * 512

    return freed


# ---- a folder as a whole -------------------------------------------------------------


def find_leftovers(
    folder: Path,
    cache: bool,
    old_revisions: bool,
    own: Sequence[Path],
    complain: Callable[[str], None] = lambda _: None,
) -> List[Leftover]:
    """What may go from a folder of models or archives, a cache of huggingface_hub, or of Xet's.

    Raises UsageError for a folder that is none of these; `own` are those that the settings name.
    """
    _refuse_whole_disks(folder, own)
    if any(_REPO_FOLDER.match(path.name) for path in folder.iterdir()):
        if cache:
            return cache_leftovers(folder, old_revisions)
        raise UsageError(
            f"{folder} is a cache of huggingface_hub",
            "",
            f"hfship clean --cache {folder}",
        )

    if folder not in own and not _holds_any(folder, _CLEANABLE):
        raise UsageError(
            f"{folder} looks like neither models nor archives nor a cache",
            "",
            "name a folder of models or archives",
        )

    found = folder_leftovers(folder, complain)
    if not cache:
        return found

    for pattern in _CHUNK_CACHES:
        for place in folder.glob(pattern):
            for path, status in files_below(place).items():
                found.append(Leftover(path, "cached chunks", place, status))

    return found


def _refuse_whole_disks(folder: Path, own: Sequence[Path]) -> None:
    home = Path(os.path.realpath(os.path.expanduser("~")))
    if folder == home or folder in home.parents:
        raise UsageError(
            f"{folder} is not cleaned as a whole",
            "all kinds of things live there",
            "name a folder of models or archives",
        )

    if os.path.ismount(folder) and folder not in own:
        raise UsageError(
            f"{folder} is a mount point",
            "it is not cleaned as a whole",
            "name the folders in it",
        )


def _holds_any(folder: Path, patterns: Sequence[str]) -> bool:
    for pattern in patterns:
        for _ in folder.glob(pattern):
            return True
    return False


@dataclass(frozen=True)
class CleanOptions:
    """What `clean` is asked for."""

    folders: Sequence[Path]
    own: Sequence[Path]  # folders that the settings name
    cache: bool
    old_revisions: bool
    older_than_s: float


@dataclass(frozen=True)
class Group:
    """What was found in one group, and whether it may go."""

    group: Path
    root: Path  # the folder that is cleaned
    items: Sequence[Leftover]
    kept: str  # why it stays; "" if it goes


def find_groups(
    options: CleanOptions, complain: Callable[[str], None] = lambda _: None
) -> Generator[Group, None, None]:
    """What killed runs left in some folders. A group that may go is locked until the next one: all
    together they may be more than a process may have open files.

    Raises NotFoundError, UsageError, DiskError.
    """
    found: Dict[Tuple[Path, Path], List[Leftover]] = {}
    for folder in options.folders:
        if not folder.is_dir():
            raise NotFoundError(f"there is no folder {folder}", "", "hfship clean DIR")
        items = find_leftovers(folder, options.cache, options.old_revisions, options.own, complain)
        for item in items:
            age = time.time() - item.status.st_mtime
            if age >= options.older_than_s:
                key = (item.group, folder)
                found.setdefault(key, []).append(item)

    names: Set[str] = set()
    for (group, _), items in found.items():
        names.add(group.name + INCOMPLETE)
        for item in items:
            names.add(item.path.name)

    opened = open_files(names)
    for (group, root), items in sorted(found.items()):
        with contextlib.ExitStack() as lock:
            kept = why_kept(group, items, opened, lock)
            yield Group(group, root, items, kept)
