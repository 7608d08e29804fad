# SPDX-License-Identifier: Apache-2.0
"""The models of a folder, as the mirror finds them.

Owns which folders are repositories, which of them answers to a name and a revision, and when all is
looked at again. Promises: a folder is offered as soon as it is proven, and no longer when it is
not what was proven; what is not offered is said, with the reason. Never: answers a client; writes.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from hfship.base.errors import HfshipError
from hfship.base.files import WORK_DIR
from hfship.base.manifest import REPO_TYPES
from hfship.base.wholeness import find_faults
from hfship.ops.mirror_repo import MirroredFolder, MirrorRepo, no_progress
from hfship.ops.proof_record import ProofRecord

if TYPE_CHECKING:
    from hfship.ops.mirror_repo import Judge, Progress

RESCAN_S = 2.0  # how old what is known of the folder may be
FIRST_SCAN_S = 10.0  # that the first questions wait for all to be proven
STOP_GRACE_S = 8.0  # answers on their way may finish; docker kills after 10 s

RepoKey = Tuple[str, str]  # repository type, id in lower case
RepoIndex = Mapping[RepoKey, Sequence[MirrorRepo]]  # to its revisions, main first


class RepoCatalogue:
    """The repositories of a models folder, found anew while it changes.

    Safe to share between threads. `say` is told of every change; what is read for long is
    remembered in the file `record`, and shown as `progress`; what `judge` finds in a folder without
    a manifest keeps it from being served.
    """

    def __init__(
        self,
        root: Path,
        say: Callable[[str], None] = lambda _: None,
        record: Optional[Path] = None,
        judge: Judge = find_faults,
        progress: Progress = no_progress,
    ) -> None:
        self._root = root
        self._say = say
        self._record = ProofRecord(record)
        self._judge = judge
        self._progress = progress
        self._lock = threading.Lock()  # guards all below
        self._scanning: Optional[threading.Thread] = None
        self._began = 0.0  # time.monotonic() of the beginning of the first scan
        self._ended = float("-inf")  # and of the end of the last one
        self._all_seen = threading.Event()  # the first scan is over
        self._repos: Dict[str, MirrorRepo] = {}  # by their folder below the root
        self._left_out: Dict[str, str] = {}
        self._index: Optional[RepoIndex] = None  # of _repos; None when they changed
        self._folders: Dict[str, MirroredFolder] = {}  # of the thread that scans

    @property
    def left_out(self) -> Mapping[str, str]:
        """Each folder that is not served, below the root, and why."""
        with self._lock:
            return dict(self._left_out)

    @property
    def is_complete(self) -> bool:
        """Was all looked at, at least once?"""
        return self._all_seen.is_set()

    def index(self) -> RepoIndex:
        """What is served now.

        What takes long to prove is not waited for: it comes when it is proven.
        """
        with self._lock:
            scanning = self._scanning
            started = scanning is None or (not scanning.is_alive() and self._is_old())
            if scanning is None or started:
                scanning = threading.Thread(target=self._rescan, daemon=True)
                self._began = self._began or time.monotonic()
                self._scanning = scanning
                scanning.start()

        if not self.is_complete:
            left = self._began + FIRST_SCAN_S - time.monotonic()
            self._all_seen.wait(max(0.0, left))
        elif started:
            scanning.join(RESCAN_S)

        with self._lock:
            if self._index is None:
                self._index = _index_of(self._repos.values())
            return self._index

    def forget(self) -> None:
        """Look through the folder again at the next question."""
        with self._lock:
            self._ended = float("-inf")

    def _is_old(self) -> bool:
        age = time.monotonic() - self._ended
        return age > RESCAN_S

    def repos(self) -> List[MirrorRepo]:
        """The `main` of every repository, each under its own id only, sorted by it."""
        found = []
        index = self.index()
        for (_, key), revisions in index.items():
            main = revisions[0]
            own_key = main.repo.lower()
            if key == own_key:
                found.append(main)

        found.sort(key=lambda repo: repo.repo)
        return found

    def find(self, repo_type: str, repo: str, revision: str = "main") -> Optional[MirrorRepo]:
        """The repository at a branch, tag, or commit of at least seven digits."""
        key = (repo_type, repo.lower())
        held = self.index().get(key, ())
        for candidate in held:
            names = (candidate.commit, candidate.source.revision)
            if revision in names:
                return candidate

        for candidate in held:
            if len(revision) >= 7 and candidate.commit.startswith(revision):
                return candidate

        if held and revision == "main":
            return held[0]

        return None

    def branches(self, repo: MirrorRepo) -> Mapping[str, str]:
        """The revisions of a repository that are here, and their commits."""
        key = (repo.source.repo_type, repo.repo.lower())
        revisions = self.index().get(key, [repo])
        commits = {}
        for revision in reversed(revisions):  # of two with one name the main one counts
            name = revision.source.revision
            if name != revision.commit:
                commits[name] = revision.commit

        commits["main"] = repo.commit
        return commits

    def withdraw(self, repo: MirrorRepo, why: str) -> None:
        """Serve a repository no more, one of whose files changed, until it was looked at again."""
        name = self._name_of(repo.folder)
        with self._lock:
            if self._repos.get(name) is not repo:  # it was looked at meanwhile
                return
        reason = f"{repo.folder} is looked at again: {why}"
        self._leave_out(name, reason)
        self.forget()

    # ---- what a scan finds

    def _rescan(self) -> None:
        seen: Set[str] = set()
        try:
            for folder, repo_type, repo_id in model_folders(self._root):
                name = self._name_of(folder)
                seen.add(name)
                if name not in self._folders:
                    mirrored = MirroredFolder(
                        folder,
                        repo_type,
                        repo_id,
                        self._say,
                        self._record,
                        self._judge,
                        self._progress,
                    )
                    self._folders[name] = mirrored
                self._look_at(name, folder)
        except OSError as exc:
            root = str(self._root)
            seen.add(root)
            self._leave_out(root, f"{root} cannot be listed: {exc.strerror}")

        self._drop_all_but(seen)
        with self._lock:
            self._ended = time.monotonic()
        self._all_seen.set()

    def _name_of(self, folder: Path) -> str:
        return folder.relative_to(self._root).as_posix()

    def _look_at(self, name: str, folder: Path) -> None:
        try:
            repo = self._folders[name].repo()
        except HfshipError as exc:
            why = exc.what
            if exc.why:
                why += f" ({exc.why})"
            self._leave_out(name, why)
        except OSError as exc:
            self._leave_out(name, f"{folder}: {exc.strerror}")
        else:
            self._offer(name, repo)

    def _offer(self, name: str, repo: MirrorRepo) -> None:
        """Serve a repository, and say so if it is new."""
        with self._lock:
            is_new = name not in self._repos
            if self._repos.get(name) is not repo:
                self._repos[name] = repo
                self._index = None
            self._left_out.pop(name, None)

        if is_new and self.is_complete:  # else all would be new
            self._say(f"new: {repo.repo}")
        others = f"{name}: other files"
        if repo.others:
            self._leave_out(others, f"{repo.folder}: {repo.others}")
        else:
            with self._lock:
                self._left_out.pop(others, None)

    def _leave_out(self, name: str, why: str) -> None:
        """Serve something no more, and say so if that was not known."""
        with self._lock:
            is_known = self._left_out.get(name) == why
            self._left_out[name] = why
            if self._repos.pop(name, None):
                self._index = None

        if not is_known:
            self._say(f"not served: {why}")

    def _drop_all_but(self, seen: Set[str]) -> None:
        """Forget folders that are not there any more."""
        for name in self._folders.keys() - seen:
            del self._folders[name]

        gone = []
        with self._lock:
            for name in self._repos.keys() - seen:
                gone.append(self._repos.pop(name).repo)
                self._index = None
            for name in list(self._left_out):
                folder = name.partition(": ")[0]
                if folder not in seen:
                    del self._left_out[name]

        for repo in gone:
            self._say(f"gone: {repo}")


def _index_of(repos: Iterable[MirrorRepo]) -> RepoIndex:
    found: Dict[RepoKey, List[MirrorRepo]] = {}
    for repo in repos:
        source = repo.source
        ids = {source.repo.lower(), repo.repo.lower()}  # the Hub may have renamed it
        for repo_id in ids:
            key = (source.repo_type, repo_id)
            found.setdefault(key, []).append(repo)

    for held in found.values():
        held.sort(key=lambda repo: repo.rank, reverse=True)

    return found


def model_folders(root: Path) -> Iterator[Tuple[Path, str, str]]:
    """(folder, repository type, id) of every model below `root`: NAME/ and ORG/NAME/.

    A folder with files of its own, or into which a fetch has begun, is a model; datasets/ and
    spaces/ hold the same of their type. Raises OSError if `root` cannot be listed.
    """
    yield from _folders_of_type(root, "model", ("datasets", "spaces"))
    for repo_type in REPO_TYPES:
        if repo_type == "model":
            continue
        base = root / f"{repo_type}s"
        if base.is_dir():
            yield from _folders_of_type(base, repo_type, ())


def _folders_of_type(
    base: Path, repo_type: str, no_orgs: Sequence[str]
) -> Iterator[Tuple[Path, str, str]]:
    for folder in _visible_folders(base):
        name = folder.name
        if _is_model(folder):
            yield folder, repo_type, name
        elif name not in no_orgs:
            for inner in _visible_folders(folder):
                repo_id = f"{name}/{inner.name}"
                yield inner, repo_type, repo_id


def _visible_folders(root: Path) -> List[Path]:
    folders = []
    for path in root.iterdir():
        hidden = path.name.startswith(".")
        if os.path.isdir(path) and not hidden:  # False where a link leads to what we may not see
            folders.append(path)
    folders.sort()
    return folders


def _is_model(folder: Path) -> bool:
    try:
        return (folder / WORK_DIR).is_dir() or any(entry.is_file() for entry in folder.iterdir())
    except OSError:
        return True  # one that cannot be read: the list says so
