# SPDX-License-Identifier: Apache-2.0
"""The proof that files are what the Hub listed, and the records of it.

Owns the hash of a file that is fetched, and two local records that do not travel:

`.hfship/verified.jsonl`, one JSON object a line (docs/formats.md, "Fetch under way"):
  {"path", "device", "inode", "size", "mtime_ns", "ctime_ns", "etag", "sha256", "marks"}
With it a rerun on a complete folder reads no content, and a repair fetches only what is bad. Lines
are appended and not durable: a line that a power cut tore is passed over, of two lines with the
same path the later one counts.

`.cache/huggingface/download/PATH.metadata`, which `hf download --local-dir` believes.

Promises: a record is believed only for the very file that was proven, untouched since, and the
Hub's etag; and not at all where somebody else could have written it. So a folder that came from
elsewhere is read again, whatever record came with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Union

from hfship.base.below import (
    FileIdentity,
    folder_below,
    identity_of,
    open_in,
    opened_below,
    owner_in,
    stat_below,
)
from hfship.base.errors import DiskError
from hfship.base.files import (
    CHUNK,
    WORK_DIR,
    disk_errors_below,
    write_all,
    write_below,
)
from hfship.base.manifest import _SHA256
from hfship.base.reading import LIST_SIZE, parse_json, read_whole
from hfship.hub.protocol import git_blob_sha1
from hfship.hub.ranges import BLOCK_SIZE

if TYPE_CHECKING:
    from hfship.hub.protocol import RemoteFile

_NAME = "verified.jsonl"
_RECORD = f"{WORK_DIR}/{_NAME}"
# https://bford.info/cachedir/: backup programs pass over the folder
CACHEDIR_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Cache directory of huggingface_hub, written by hfship.\n"
)


class FileHasher:
    """Hashes a file from its beginning: SHA-256 for the manifest, and the git blob id where the Hub
    gives only that.

    `marks` has for each whole block the first 16 hex digits of the SHA-256 of everything up to its
    end. They cost nothing, and tell which block of a damaged file is the first bad one.
    """

    def __init__(self, remote: RemoteFile) -> None:
        self.position = 0  # bytes hashed
        self.marks: List[str] = []
        self._remote = remote
        self._sha256 = hashlib.sha256()
        self._git: Any = None  # where the Hub does not give the SHA-256
        if not remote.sha256:
            self._git = git_blob_sha1(remote.size)

    def update(self, piece: Union[bytes, memoryview]) -> None:
        """The next bytes of the file."""
        rest = memoryview(piece)
        while rest:
            part = rest[: BLOCK_SIZE - self.position % BLOCK_SIZE]
            rest = rest[len(part) :]
            self._sha256.update(part)
            if self._git:
                self._git.update(part)
            self.position += len(part)
            if self.position % BLOCK_SIZE == 0:
                self.marks.append(self.sha256[:16])

    def copy(self) -> FileHasher:
        """The same state once more: the two go on independently."""
        twin = FileHasher(self._remote)
        twin.position = self.position
        twin.marks = list(self.marks)
        twin._sha256 = self._sha256.copy()
        if self._git:
            twin._git = self._git.copy()
        return twin

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def matches(self) -> bool:
        """Is the content, now fed completely, what the Hub listed?"""
        if self.position != self._remote.size:
            return False
        if self._git:
            blob_id: str = self._git.hexdigest()
            return blob_id == self._remote.git_sha1
        return self.sha256 == self._remote.sha256


class VerifiedFile(NamedTuple):
    """A line of verified.jsonl: a file, as it was when it was proven."""

    path: str
    identity: FileIdentity  # of the file itself, not of what a link leads to
    etag: str
    sha256: str
    marks: List[str]

    def line(self) -> str:
        """As it is written."""
        row = {
            "path": self.path,
            **self.identity._asdict(),
            "etag": self.etag,
            "sha256": self.sha256,
            "marks": self.marks,
        }
        return json.dumps(row) + "\n"


class VerifiedLog:
    """Which files of a folder were proven, so that a rerun reads no content."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: Dict[str, VerifiedFile] = {}
        self._is_ours = False  # what lies there: else it is replaced
        with contextlib.suppress(OSError):
            for line in self._lines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                    file = read_line(line)
                    self._files[file.path] = file

    def _lines(self) -> List[bytes]:
        """The lines of the record; none where somebody else may write to it. Raises OSError."""
        with opened_below(self._folder, _RECORD) as fd:
            if owner_in(self._folder).is_foreign(os.fstat(fd)):
                return []
            lines = read_whole(fd, LIST_SIZE).splitlines()

        self._is_ours = True
        return lines

    def sha256_of(self, remote: RemoteFile) -> Optional[str]:
        """The SHA-256 of the file on disk, if it was proven to be `remote` and was not touched
        since; else None."""
        file = self._known(remote)
        if file is None:
            return None

        try:
            status = stat_below(self._folder, remote.path)
        except OSError:
            return None

        if identity_of(status) != file.identity:
            return None

        return file.sha256

    def marks_of(self, remote: RemoteFile) -> List[str]:
        """The block marks of the file as it was when it was right; [] when they are not known."""
        file = self._known(remote)
        if file is None or len(file.marks) != remote.size // BLOCK_SIZE:
            return []
        return list(file.marks)

    def _known(self, remote: RemoteFile) -> Optional[VerifiedFile]:
        """What the record says of this content; None if it is of other content."""
        file = self._files.get(remote.path)
        if file is None or file.etag != remote.etag:
            return None
        if remote.sha256 and file.sha256 != remote.sha256:
            return None
        return file

    def add(self, remote: RemoteFile, status: os.stat_result, hasher: FileHasher) -> None:
        """Remember a file whose hash matches; `status` is that of what was hashed, which may have
        been renamed since. Raises DiskError."""
        file = self.proof(remote, status, hasher)
        if file:
            self.put(file)

    def proof(
        self, remote: RemoteFile, status: os.stat_result, hasher: FileHasher
    ) -> Optional[VerifiedFile]:
        """What there is to remember of such a file; None when somebody was faster, and another file
        lies there: the next run looks at it again. Raises DiskError."""
        with disk_errors_below("write", self._folder, _RECORD):
            now = identity_of(stat_below(self._folder, remote.path))
        if not now.is_same_content(identity_of(status)):
            return None
        return VerifiedFile(remote.path, now, remote.etag, hasher.sha256, hasher.marks)

    def put(self, file: VerifiedFile) -> None:
        """Remember it. Raises DiskError."""
        with self._lock, disk_errors_below("write", self._folder, _RECORD):
            self._files[file.path] = file
            self._append(file.line())

    def _append(self, line: str) -> None:
        with folder_below(self._folder, WORK_DIR, make=True) as work:
            if not self._is_ours:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_NAME, dir_fd=work)
                self._is_ours = True
            fd = open_in(work, _NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            write_all(fd, line.encode())
        finally:
            os.close(fd)


def read_line(line: bytes) -> VerifiedFile:
    """A line of verified.jsonl. Raises ValueError, KeyError or TypeError for anything else.

    >>> numbers = '"device": 1, "inode": 2, "size": 3, "mtime_ns": 4, "ctime_ns": 5'
    >>> text = f'{{"path": "a", {numbers}, "etag": "e", "sha256": "{"f" * 64}"}}'
    >>> read_line(text.encode()).identity
    FileIdentity(device=1, inode=2, size=3, mtime_ns=4, ctime_ns=5)
    """
    row = parse_json(line)
    path, etag, sha256 = row["path"], row["etag"], row["sha256"]
    marks = list(row.get("marks", ()))
    numbers = [row[field] for field in FileIdentity._fields]
    if not all(type(number) is int for number in numbers):
        raise ValueError("a number is none")
    if not all(isinstance(text, str) for text in (path, etag, sha256, *marks)):
        raise ValueError("a text is none")
    if not _SHA256.match(sha256):
        raise ValueError(f"sha256 is {sha256!r}")

    return VerifiedFile(path, FileIdentity(*numbers), etag, sha256, marks)


def hash_file(path: Path, hasher: FileHasher, count: Callable[[int], None]) -> os.stat_result:
    """Feed a whole file, which is no link, to the hasher; `count` is called with the size of each
    piece.

    Returns the status of what was read, from before: who writes meanwhile changes it. Raises
    OSError.
    """
    with opened_below(path.parent, path.name) as fd:
        return _hash(fd, hasher, count)


def hash_below(
    folder: Path, path: str, hasher: FileHasher, count: Callable[[int], None]
) -> os.stat_result:
    """Feed a whole file below a folder to the hasher, as `hash_file` does. No link is followed."""
    with opened_below(folder, path) as fd:
        return _hash(fd, hasher, count)


def _hash(fd: int, hasher: FileHasher, count: Callable[[int], None]) -> os.stat_result:
    status = os.fstat(fd)
    while True:
        piece = os.read(fd, CHUNK)
        if not piece:
            return status
        hasher.update(piece)
        count(len(piece))


def write_hub_metadata(folder: Path, remote: RemoteFile, commit: str) -> None:
    """What huggingface_hub (`_local_folder.py`) writes for a file of a local folder, so that
    `hf download --local-dir` finds nothing to do.

    Three lines: commit, etag, Unix time; it is believed while the file is not younger than that.
    """
    cache = ".cache/huggingface"
    note = f"{cache}/download/{remote.path}.metadata"
    text = f"{commit}\n{remote.etag}\n{time.time()}\n"
    if not os.path.lexists(f"{folder}/{cache}/CACHEDIR.TAG"):
        with contextlib.suppress(DiskError):  # another thread does the same
            write_below(folder, f"{cache}/.gitignore", "*", durable=False)
            write_below(folder, f"{cache}/CACHEDIR.TAG", CACHEDIR_TAG, durable=False)
    with contextlib.suppress(DiskError):  # a name is too long, or something is in the way
        write_below(folder, note, text, durable=False)
