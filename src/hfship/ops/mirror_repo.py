# SPDX-License-Identifier: Apache-2.0
"""A model folder as a repository of the mirror.

Owns which files of a folder are served, and the proof of each: its hashes, and the identity that it
had on disk when it was read, or when the record of fetch says that it was. Promises: a folder that
is not a whole model, or not what its manifest says, is no repository, with the reason; of a folder
with a manifest only the files that it lists are served, of another one none that is hidden or a
link; a file is given out only while it is the very one that was proven. Never: writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from hfship.base.below import FileIdentity, Refused, identity_of, kind_of, opened_below
from hfship.base.content import content_files, is_work_folder
from hfship.base.errors import IncompleteError, IntegrityError
from hfship.base.files import CHUNK
from hfship.base.manifest import MANIFEST_PATH, Source, read_manifest, require_finished
from hfship.base.text import human_bytes, shorten
from hfship.base.values import dataclass
from hfship.base.weights import missing_shards
from hfship.hub.protocol import RemoteFile, git_blob_sha1
from hfship.hub.verified import VerifiedLog
from hfship.ops.proof_record import ProofRecord

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest
    from hfship.base.wholeness import Fault

    # What is wrong with the files (path -> bytes) of a folder.
    Judge = Callable[[Path, Mapping[str, int]], Sequence[Fault]]
    # How the reading of so many bytes of a folder is shown: within it, what is read is counted.
    Counter = Callable[[int], None]
    Progress = Callable[[str, int], ContextManager[Counter]]

# Bytes. Larger files have a SHA-256 as their etag, smaller ones a git blob id, as on the Hub.
LFS_THRESHOLD = 1 << 20
# Two changes of a file within the clock's steps look like one: it is read when that is over.
SETTLED_NS = 50_000_000
LONG_READ = 1 << 30  # bytes; that so many are read is said
SHOWN_READ = 64 << 20  # bytes; reading fewer takes no time that is worth a bar
_LFS_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".gguf",
    ".pt",
    ".pth",
    ".onnx",
    ".h5",
    ".msgpack",
    ".zip",
    ".tar",
    ".model",
)
_SHOWN_HIDDEN = (".gitattributes",)  # the Hub has it in every repository


class ChangedError(Exception):
    """A file is not the one any more that was proven."""


class Proof(NamedTuple):
    """A file as it was proven: as the Hub would list it, its SHA-256, and its identity then."""

    remote: RemoteFile
    sha256: str
    identity: FileIdentity


@dataclass(frozen=True, eq=False)  # equal to itself alone, so that its tree can be cached by it
class MirrorRepo:
    """One model folder as a repository at one commit."""

    source: Source
    folder: Path
    files: Mapping[str, RemoteFile]  # by path, as the Hub would list them
    identities: Mapping[str, FileIdentity]  # of the same, when they were proven
    others: str = ""  # what lies in the folder and is not served, for people

    @property
    def repo(self) -> str:
        """Its id, as ORG/NAME."""
        return self.source.resolved_repo

    @property
    def commit(self) -> str:
        """The commit of the Hub, or a SHA-1 of all names and hashes where there is none."""
        return self.source.commit

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def rank(self) -> Tuple[object, ...]:
        """Of several folders of a repository, that of the highest rank is its `main`."""
        source = self.source
        return bool(source.endpoint), source.revision == "main", source.fetched_at, len(self.files)

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """The descriptor of one of its files. Raises ChangedError, OSError."""
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(opened_below(self.folder, path))
            except FileNotFoundError as exc:
                raise ChangedError(f"{path} has gone") from exc
            except (Refused, NotADirectoryError) as exc:
                raise ChangedError(f"{path} has changed: {exc.strerror}") from exc
            self.require_proven(path, fd)
            yield fd

    def require_proven(self, path: str, fd: int) -> None:
        """Raise ChangedError unless the open file at `path` is as it was proven."""
        if identity_of(os.fstat(fd)) != self.identities[path]:
            raise ChangedError(f"{path} has changed")


class _View(NamedTuple):
    """What one look at a folder shows without reading its files."""

    manifest: Optional[Manifest]
    of_manifest: Optional[FileIdentity]
    identities: Mapping[str, FileIdentity]  # by path, of the files that are to be served
    others: str

    @property
    def state(self) -> object:
        """What changes when anything of a model is written."""
        return self.of_manifest, self.identities, self.others

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file."""
        return {path: identity.size for path, identity in self.identities.items()}

    @property
    def expected(self) -> Mapping[str, str]:
        """The SHA-256 that each file must have; {} where no manifest says so."""
        if self.manifest is None:
            return {}
        return {entry.path: entry.sha256 for entry in self.manifest.files}


def _count_nothing(_: int) -> None:
    pass


@contextlib.contextmanager
def no_progress(_: str, __: int) -> Iterator[Counter]:
    """Reading that nobody watches."""
    yield _count_nothing


class MirroredFolder:
    """A model folder, and what is known of it from one look to the next.

    `say` is told when much has to be read, and `progress` how far that is; `record` has what was
    read by earlier mirrors; `judge` says what is wrong with files for which no manifest vouches.
    """

    def __init__(
        self,
        folder: Path,
        repo_type: str,
        name: str,
        say: Callable[[str], None],
        record: ProofRecord,
        judge: Judge,
        progress: Progress = no_progress,
    ) -> None:
        self._folder = folder
        self._repo_type = repo_type
        self._name = name
        self._say = say
        self._record = record
        self._judge = judge
        self._progress = progress
        self._proofs: Dict[str, Proof] = {}
        self._view: Optional[_View] = None
        self._outcome: Union[None, MirrorRepo, IntegrityError] = None

    def repo(self) -> MirrorRepo:
        """The folder as a repository. Only what changed since the last time is read.

        Raises IncompleteError, IntegrityError, DiskError, OSError: it must not be served.
        """
        view = self._look()
        same = self._view is not None and self._view.state == view.state
        if not same or self._outcome is None:
            require_whole(self._folder, view)
            try:
                self._require_no_faults(view)
                self._outcome = self._prove(view)
            except IntegrityError as exc:  # that took reading, too
                self._outcome = exc
            self._view = view

        if isinstance(self._outcome, IntegrityError):
            raise self._outcome
        return self._outcome

    def _look(self) -> _View:
        folder = self._folder
        of_manifest = _identity_at(folder, MANIFEST_PATH)
        manifest = None
        if self._view and self._view.of_manifest == of_manifest:
            manifest = self._view.manifest
        elif of_manifest:
            manifest = read_manifest(folder)

        if manifest is None:
            paths = [path for path, _ in content_files(folder)]
            hidden = [path for path in paths if _is_hidden(path)]
            visible = [path for path in paths if not _is_hidden(path)]
            return _View(None, None, _identities(folder, visible), _told(hidden, "hidden"))

        listed = [entry.path for entry in manifest.files]
        unlisted = _unlisted_files(folder, listed)
        others = _told(unlisted, "not in its manifest")
        return _View(manifest, of_manifest, _identities(folder, listed), others)

    def _require_no_faults(self, view: _View) -> None:
        """Refuse files, of which nobody says what they should be, that tell themselves that they
        are not whole. Raises IncompleteError, IntegrityError, DiskError."""
        if view.manifest:
            return
        faults = self._judge(self._folder, view.sizes)
        if not faults:
            return

        why = shorten([fault.text() for fault in faults], 3)
        if any(fault.unfinished for fault in faults):
            raise IncompleteError(f"{self._folder} is not complete yet", why)
        raise IntegrityError(f"{self._folder} is damaged", why)

    def _prove(self, view: _View) -> MirrorRepo:
        """Raises IntegrityError, IncompleteError, OSError."""
        expected = view.expected
        self._proofs = self._known_proofs(view.identities, expected)
        self._read_the_others(view.identities, expected)
        files = {}
        identities = {}
        for path in view.identities:
            proof = self._proofs[path]
            files[path] = proof.remote
            identities[path] = proof.identity

        source = None
        if view.manifest:
            source = view.manifest.source
        if source is None:
            source = self._own_source(files)
        return MirrorRepo(source, self._folder, files, identities, view.others)

    def _read_the_others(
        self, identities: Mapping[str, FileIdentity], expected: Mapping[str, str]
    ) -> None:
        """Read what is not proven yet. Raises IntegrityError, IncompleteError, OSError."""
        unknown = [path for path in identities if path not in self._proofs]
        size = sum(identities[path].size for path in unknown)
        if size >= LONG_READ:
            amount = human_bytes(size)
            self._say(f"{self._folder}: reading {amount} of which nothing here says they are right")

        progress = self._progress
        if size < SHOWN_READ:
            progress = no_progress
        with progress(self._name, size) as count:
            for path in unknown:
                proof = read_proof(self._folder, path, count)
                self._proofs[path] = proof
                if proof.remote.sha256:  # a large one; the others are read in no time
                    self._record.add(self._folder / path, proof.identity, proof.sha256)
                if expected.get(path, proof.sha256) != proof.sha256:
                    raise _differs(self._folder, path)

    def _known_proofs(
        self, identities: Mapping[str, FileIdentity], expected: Mapping[str, str]
    ) -> Dict[str, Proof]:
        """What needs no reading: files as they were the last time, and those that a record, of
        fetch or of an earlier mirror, says were read as they are."""
        known = {}
        log = VerifiedLog(self._folder)
        for path, identity in identities.items():
            sha256 = expected.get(path, "")
            proof = self._proofs.get(path)
            if proof and proof.identity == identity and sha256 in ("", proof.sha256):
                known[path] = proof
            elif is_large(path, identity.size):
                recorded = self._record.sha256_of(self._folder / path, identity)
                remote = _lfs_file(path, identity.size, sha256 or recorded)
                if recorded == "":
                    recorded = log.sha256_of(remote) or ""
                if recorded and recorded == remote.sha256:
                    known[path] = Proof(remote, recorded, identity)

        return known

    def _own_source(self, files: Mapping[str, RemoteFile]) -> Source:
        """What stands for the commit of a folder of which nobody says where it came from."""
        commit = hashlib.sha1()
        for path in sorted(files):
            line = f"{path} {files[path].etag}\n"
            commit.update(line.encode())

        return Source(
            endpoint="",
            repo=self._name,
            revision="main",
            resolved_repo=self._name,
            commit=commit.hexdigest(),
            repo_type=self._repo_type,
        )


# ---- what lies in a folder


def _identity_at(folder: Path, path: str) -> Optional[FileIdentity]:
    """The identity of a regular file; None where nothing is.

    What is looked at here by its name is opened folder by folder before it is read. Raises
    IntegrityError for what is no file, OSError.
    """
    try:
        status = os.lstat(folder / path)
    except (FileNotFoundError, NotADirectoryError):
        return None

    if not stat.S_ISREG(status.st_mode):
        what = f"{folder} has something that is not served"
        why = f"{path} is {kind_of(status.st_mode)}"
        raise IntegrityError(what, why, "put a copy of the file in its place")

    return identity_of(status)


def _identities(folder: Path, paths: Sequence[str]) -> Mapping[str, FileIdentity]:
    """Those of the files that are there. Raises IntegrityError, OSError."""
    found = {}
    for path in paths:
        identity = _identity_at(folder, path)
        if identity:
            found[path] = identity
    return found


def _is_hidden(path: str) -> bool:
    """Whether a file is one that programs keep for themselves.

    >>> [_is_hidden(path) for path in (".env", "a/.cache/x", ".gitattributes", "a.b/c")]
    [True, True, False, False]
    """
    if path in _SHOWN_HIDDEN:
        return False
    return any(name.startswith(".") for name in path.split("/"))


def _unlisted_files(folder: Path, listed: Sequence[str]) -> List[str]:
    """What lies in a folder beside the files that its manifest lists."""
    try:
        paths = [path for path, _ in content_files(folder, frozenset(listed))]
    except IntegrityError as exc:  # something that is no file: nobody asks for it
        return [exc.why]
    known = set(listed)
    return [path for path in paths if path not in known]


def _told(paths: Sequence[str], what: str) -> str:
    if not paths:
        return ""
    return f"{shorten(sorted(paths))} ({what})"


def require_whole(folder: Path, view: _View) -> None:
    """Refuse a folder that is not, or no longer, a whole model, as far as names and sizes tell.

    Raises IncompleteError, IntegrityError, DiskError.
    """
    what = f"{folder} is not complete yet"
    manifest = view.manifest
    absent = _missing_files(folder, view)
    if not absent:
        absent = _missing_weights(folder, view)
        if manifest:  # somebody chose so
            what = f"{folder} is not a whole model"

    if absent:
        why = f"{shorten(sorted(absent))} missing"
        raise IncompleteError(what, why)
    if not view.identities or is_work_folder(folder.name):
        why = "there is no file that can be read"
        raise IncompleteError(what, why)


def _missing_files(folder: Path, view: _View) -> Set[str]:
    """Files that the manifest lists and that are not there.

    Raises IntegrityError where one has another size, IncompleteError where work goes on in a folder
    without a manifest.
    """
    if view.manifest is None:
        require_finished(folder)
        return set()

    absent = set()
    for entry in view.manifest.files:
        identity = view.identities.get(entry.path)
        if identity is None:
            absent.add(entry.path)
        elif identity.size != entry.size:
            raise _differs(folder, entry.path)
    return absent


def _missing_weights(folder: Path, view: _View) -> Set[str]:
    """Files of weights that an index, or the numbers of others, name and that are not there.

    Raises IntegrityError for an index that nobody vouches for, DiskError.
    """
    paths = set(view.identities)
    if view.manifest is None:
        return set(missing_shards(folder, paths))

    missing = set(view.manifest.partial)
    with contextlib.suppress(IntegrityError):  # an index that was published so
        missing |= set(missing_shards(folder, paths))
    return missing


def _differs(folder: Path, path: str) -> IntegrityError:
    what = f"{folder} is not what its manifest says"
    return IntegrityError(what, f"{path} differs")


# ---- proofs


def is_large(path: str, size: int) -> bool:
    """Whether the Hub would keep a file in LFS: large ones and weights."""
    return size > LFS_THRESHOLD or path.endswith(_LFS_SUFFIXES)


def read_proof(folder: Path, path: str, count: Counter = _count_nothing) -> Proof:
    """Read a file for its hashes; `count` is told of the bytes. Raises IncompleteError when it is
    being written, OSError."""
    with opened_below(folder, path) as fd:
        identity = identity_of(os.fstat(fd))
        age_ns = time.time_ns() - identity.ctime_ns
        if 0 <= age_ns < SETTLED_NS:
            time.sleep(SETTLED_NS / 1e9)
        sha256 = hashlib.sha256()
        blob = git_blob_sha1(identity.size)
        large = is_large(path, identity.size)
        buffer = memoryview(bytearray(CHUNK))
        with open(fd, "rb", buffering=0, closefd=False) as stream:
            while True:
                size = stream.readinto(buffer)
                if not size:
                    break
                sha256.update(buffer[:size])
                count(size)
                if not large:
                    blob.update(buffer[:size])

        if identity_of(os.fstat(fd)) != identity:
            raise IncompleteError(f"{folder} is not complete yet", f"{path} is being written")

    digest = sha256.hexdigest()
    remote = RemoteFile(path, identity.size, blob.hexdigest())
    if large:
        remote = _lfs_file(path, identity.size, digest)
    return Proof(remote, digest, identity)


def _lfs_file(path: str, size: int, sha256: str) -> RemoteFile:
    """A file as the Hub lists it that it keeps in LFS."""
    # The text of the LFS pointer; its blob id is the `oid` of the entry (git-lfs specification).
    lines = (
        "version https://git-lfs.github.com/spec/v1",
        f"oid sha256:{sha256}",
        f"size {size}",
        "",
    )
    pointer = "\n".join(lines).encode()
    blob = git_blob_sha1(len(pointer))
    blob.update(pointer)
    return RemoteFile(path, size, blob.hexdigest(), sha256)
