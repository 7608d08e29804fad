# SPDX-License-Identifier: Apache-2.0
"""What a mirror has read, so that one that starts again reads only what changed.

Owns a file in the cache of the user who runs the mirror, for each folder that is mirrored:
`mirror.HASH.jsonl` (docs/formats.md, "Caches"), a JSON object a line:
  {"path", "device", "inode", "size", "mtime_ns", "ctime_ns", "sha256"}
Promises: a line is believed only for the very file that was read, untouched since, and not at all
where somebody else could have written it. A record that cannot be read or written costs time alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from hfship.base.below import FileIdentity, checked_file, is_foreign, open_regular
from hfship.base.files import write_all
from hfship.base.reading import LIST_SIZE, parse_json, read_whole
from hfship.base.settings import cache_folder


class ReadFile(NamedTuple):
    """A line of the record: a file, as it was when it was read."""

    path: str  # absolute
    identity: FileIdentity
    sha256: str


def record_path(root: Path) -> Optional[Path]:
    """Where the record of a mirrored folder lies; None for a user without a home."""
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha1(os.fsencode(root.resolve()))
    return folder / f"mirror.{digest.hexdigest()[:16]}.jsonl"


class ProofRecord:
    """The record at `path`; without a path nothing is remembered. For one thread."""

    def __init__(self, path: Optional[Path] = None) -> None:
        self._path = path
        self._files: Dict[str, ReadFile] = {}
        for line in self._lines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                file = read_line(line)
                self._files[file.path] = file

    def sha256_of(self, path: Path, identity: FileIdentity) -> str:
        """The SHA-256 of a file that was read and was not touched since; "" for any other."""
        file = self._files.get(os.path.abspath(path))
        if file is None or file.identity != identity:
            return ""

        return file.sha256

    def add(self, path: Path, identity: FileIdentity, sha256: str) -> None:
        """Remember a file that was read."""
        file = ReadFile(os.path.abspath(path), identity, sha256)
        self._files[file.path] = file
        row = {
            "path": file.path,
            **identity._asdict(),
            "sha256": sha256,
        }
        with contextlib.suppress(OSError):
            self._append(json.dumps(row) + "\n")

    def _lines(self) -> List[bytes]:
        if self._path is None:
            return []
        with contextlib.suppress(OSError):
            fd = open_regular(self._path)
            try:
                if not is_foreign(os.fstat(fd)):
                    return read_whole(fd, LIST_SIZE).splitlines()
            finally:
                os.close(fd)
        return []

    def _append(self, line: str) -> None:
        """Raises OSError."""
        if self._path is None:
            return

        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        opened = os.open(self._path, flags, 0o600)
        fd = checked_file(opened, self._path)
        try:
            status = os.fstat(fd)
            if is_foreign(status):
                return
            if status.st_size > LIST_SIZE // 2:  # of files that have gone, mostly
                os.ftruncate(fd, 0)
            write_all(fd, line.encode())
        finally:
            os.close(fd)


def read_line(line: bytes) -> ReadFile:
    """A line of the record. Raises ValueError, KeyError or TypeError for anything else."""
    row = parse_json(line)
    numbers = [row[field] for field in FileIdentity._fields]
    if not all(type(number) is int for number in numbers):
        raise ValueError("a number is none")
    return ReadFile(str(row["path"]), FileIdentity(*numbers), str(row["sha256"]))
