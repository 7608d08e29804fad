# SPDX-License-Identifier: Apache-2.0
"""Models in huggingface_hub's cache, read where they lie.

    models--ORG--NAME/refs/main                      the commit of a branch
                      snapshots/COMMIT/PATH          a link to the content of a file
                      blobs/ETAG                     that content: ETAG is its SHA-256, or the git
                                                     blob id of a small file; ETAG.incomplete comes
                      trees/COMMIT.json              {"files": {PATH: ...}}: what the Hub lists,
                                                     since huggingface_hub 2

Promises: a file counts as the Hub's when its content has the hash that its blob is called by.
Never: writes into the cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import AbstractSet, List, Optional, Sequence, Tuple

from hfship.base.below import Refused
from hfship.base.errors import NotFoundError, UsageError, command_line
from hfship.base.files import CHUNK, disk_errors
from hfship.base.manifest import (
    _COMMIT,
    FileEntry,
    Source,
    check_source,
)
from hfship.base.reading import LIST_SIZE, parse_json, read_small
from hfship.base.values import dataclass
from hfship.hub.protocol import git_blob_sha1

_FOLDER = re.compile(r"(model|dataset|space)s--([^/]+)\Z")
_ETAG = re.compile(r"(?P<git>[0-9a-f]{40})\Z|(?P<sha256>[0-9a-f]{64})\Z")
DEFAULT_REF = "main"


@dataclass(frozen=True)
class CachedModel:
    """One commit of a repository in the cache: the folder with the links to its files."""

    folder: Path
    source: Source

    @property
    def name(self) -> str:
        """What a model of this repository is called."""
        return self.source.repo.rpartition("/")[2]

    @property
    def coming(self) -> List[Path]:
        """Blobs that a download has not finished."""
        blobs = self.folder.parent.parent / "blobs"
        return sorted(blobs.glob("*.incomplete"))


def cached_model(folder: Path, endpoint: str) -> Optional[CachedModel]:
    """The model that a folder of the cache means: of a repository, or of one of its commits. None
    for any other folder.

    `endpoint` is where huggingface_hub got it from, which the cache does not tell. Raises
    UsageError where the cache has several commits and no branch tells which one is meant,
    NotFoundError where it has none.
    """
    repository = folder
    commit = ""
    if folder.parent.name == "snapshots" and _COMMIT.match(folder.name):
        commit = folder.name
        repository = folder.parent.parent
    match = _FOLDER.match(repository.name)
    if match is None or not (repository / "snapshots").is_dir():
        return None

    kind, repo = match[1], match[2].replace("--", "/")
    revision = commit
    if not commit:
        revision, commit = _commit_in(repository)
    source = Source(
        endpoint=endpoint,
        repo=repo,
        revision=revision,
        resolved_repo=repo,
        commit=commit,
        repo_type=kind,
    )
    try:
        check_source(source)
    except ValueError:
        return None
    return CachedModel(repository / "snapshots" / commit, source)


def _commit_in(repository: Path) -> Tuple[str, str]:
    """(revision, commit) of the one commit of a repository that is meant without naming one."""
    refs = _refs_of(repository)
    snapshots = repository / "snapshots"
    commits = sorted(path.name for path in snapshots.iterdir() if _COMMIT.match(path.name))
    here = [(ref, commit) for ref, commit in refs if commit in commits]
    for ref, commit in here:
        if ref == DEFAULT_REF:
            return ref, commit
    if len(here) == 1:
        return here[0]
    if len(commits) == 1:
        return commits[0], commits[0]
    if not commits:
        raise NotFoundError(f"{repository} holds no commit", "", "hfship fetch ORG/NAME")

    choices = [command_line("hfship", "pack", snapshots / commit) for commit in commits[:10]]
    what = f"{repository} holds {len(commits)} commits"
    raise UsageError(what, "no branch tells which one is meant", "\n".join(choices))


def _refs_of(repository: Path) -> List[Tuple[str, str]]:
    """(name, commit) of branches, tags and pull requests that can be read."""
    folder = repository / "refs"
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            commit = read_small(path).decode("ascii", "replace").strip()
        except (Refused, IsADirectoryError):
            continue
        if _COMMIT.match(commit):
            found.append((path.relative_to(folder).as_posix(), commit))
    return found


def not_downloaded(model: CachedModel, paths: AbstractSet[str]) -> List[str]:
    """Files that the Hub lists for this commit and that are not among `paths`, as far as the cache
    knows."""
    folder = model.folder.parent.parent
    try:
        tree = parse_json(read_small(folder / "trees" / f"{model.folder.name}.json", LIST_SIZE))
        return sorted(path for path in tree["files"] if path not in paths and path.isprintable())
    except (OSError, ValueError, KeyError, TypeError):
        return []  # of an older version


def damaged_blobs(model: CachedModel, files: Sequence[FileEntry]) -> List[str]:
    """What is wrong, in words, with files whose content has not the hash that their blob is called
    by. Raises DiskError."""
    wrong = []
    for entry in files:
        path = model.folder / entry.path
        if not path.is_symlink():
            continue  # on filesystems without links the cache holds copies, which tell no hash
        match = _ETAG.match(os.path.basename(os.readlink(path)))
        if match is None:
            continue
        found = entry.sha256
        if match["git"]:
            found = _git_blob_id(path, entry.size)
        if found != match[0]:
            wrong.append(f"{entry.path} is not what its blob says, {match[0]}")
    return wrong


def _git_blob_id(path: Path, size: int) -> str:
    digest = git_blob_sha1(size)
    with disk_errors("read", path), path.open("rb") as stream:
        while True:
            piece = stream.read(CHUNK)
            if not piece:
                return str(digest.hexdigest())
            digest.update(piece)
