# SPDX-License-Identifier: Apache-2.0
"""The Hub's API: what its clients ask, and what it answers of a repository. Pure.

Owns the forms of questions and answers: the segments of a path, the paths of a POST, information,
trees, refs and lists. Sources: huggingface_hub 2.4; the Hub's OpenAPI leaves most of it out.
Promises: an answer is bounded, by PAGE entries or by the files of one repository; no Xet hash is in
it: the mirror is no Xet store.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
)
from urllib.parse import parse_qs, urlencode

from hfship.base.manifest import REPO_TYPES
from hfship.base.reading import parse_json
from hfship.ops.http_request import BadRequest, asked_number

if TYPE_CHECKING:
    from hfship.hub.protocol import RemoteFile
    from hfship.ops.mirror_repo import MirrorRepo

PAGE = 1000  # entries of a tree or list at most, as on huggingface.co
MOST_PATHS = 10_000  # that a POST may ask for
API_FOLDERS = ("whoami-v2", *(f"{repo_type}s" for repo_type in REPO_TYPES))
WHO_AM_I = {
    "type": "user",
    "name": "mirror",
    "fullname": "mirror",
    "orgs": [],
    "auth": {
        "type": "access_token",
        "accessToken": {"displayName": "mirror", "role": "read"},
    },
}
_VERBS = ("revision", "tree", "paths-info", "refs", "treesize", "auth-check")


class Question(NamedTuple):
    """What is asked about a repository."""

    repo_id: str
    verb: str
    revision: str
    path: str


def parse_question(parts: Sequence[str]) -> Question:
    """The segments of a path below /api/models/: ID[/VERB[/REV[/PATH...]]].

    ID has one or two segments.

    >>> parse_question(["org", "m", "tree", "main", "sub", "x"])
    Question(repo_id='org/m', verb='tree', revision='main', path='sub/x')
    >>> parse_question(["m"])
    Question(repo_id='m', verb='revision', revision='main', path='')
    """
    for at in (1, 2):
        if at < len(parts) and parts[at] in _VERBS:
            revision, *path = parts[at + 1 :] or ["main"]
            return Question(
                repo_id="/".join(parts[:at]),
                verb=parts[at],
                revision=revision,
                path="/".join(path),
            )

    repo_id = "/".join(parts)
    return Question(repo_id, "revision", "main", "")


def asked_paths(body: bytes, content_type: str) -> Set[str]:
    """The `paths` of a POST to paths-info, in JSON or as a form; none if it has no such list.

    Raises BadRequest for too many of them.
    """
    text = body.decode("utf-8", "replace")
    try:
        if "json" in content_type:
            asked = parse_json(text)["paths"]
        else:
            asked = parse_qs(text, max_num_fields=MOST_PATHS)["paths"]
        paths = {path for path in list(asked) if isinstance(path, str)}
    except (ValueError, TypeError, KeyError):
        return set()

    if len(paths) > MOST_PATHS:
        raise BadRequest(413, f"there are more than {MOST_PATHS} paths")
    return paths


class Page(NamedTuple):
    """A part of a list, and the query that leads to the next part; "" behind the last one."""

    rows: Sequence[Mapping[str, Any]]
    next_query: str


class Span(NamedTuple):
    """The part of a list that a query asks for: rows [start, stop)."""

    start: int
    stop: int


def asked_span(query: Mapping[str, str], most: int) -> Span:
    """What `limit` and `cursor` ask for, at most `most` rows; the cursor is a position.

    >>> asked_span({}, 1000), asked_span({"cursor": "10", "limit": "99999"}, 1000)
    (Span(start=0, stop=1000), Span(start=10, stop=1010))
    """
    limit = asked_number(query.get("limit"), most)
    start = asked_number(query.get("cursor"), 0)
    return Span(start, start + min(limit, most))


def _next_query(query: Mapping[str, str], span: Span, total: int) -> str:
    if span.stop >= total or span.start == span.stop:  # pages of none would never end
        return ""
    following = {
        **query,
        "cursor": span.stop,
        "limit": span.stop - span.start,
    }
    return urlencode(following)


# ---- one repository


def repo_summary(repo: MirrorRepo) -> Dict[str, Any]:
    """What a list says of a repository."""
    license = repo.source.license
    return {
        "_id": repo.commit[:24],
        "id": repo.repo,
        "modelId": repo.repo,
        "author": repo.repo.rpartition("/")[0] or None,
        "sha": repo.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [f"license:{license}"] if license else [],
        "cardData": {"license": license} if license else {},
        "siblings": [],
        "usedStorage": repo.size,
    }


def repo_info(repo: MirrorRepo) -> Dict[str, Any]:
    """The Hub's answer to /api/models/ID/revision/REV: with the files."""
    siblings = []
    for path, file in sorted(repo.files.items()):
        sibling = {
            "rfilename": path,
            "size": file.size,
            "blobId": file.git_sha1,
        }
        siblings.append({**sibling, **_lfs(file, "sha256")})

    return {**repo_summary(repo), "siblings": siblings}


def repo_refs(commits: Mapping[str, str]) -> Mapping[str, object]:
    """The Hub's answer to /api/models/ID/refs, of branches and their commits."""
    branches = []
    for name, commit in sorted(commits.items()):
        branch = {
            "name": name,
            "ref": f"refs/heads/{name}",
            "targetCommit": commit,
        }
        branches.append(branch)

    return {
        "branches": branches,
        "tags": [],
        "converts": [],
    }


def _lfs(file: RemoteFile, key: str) -> Dict[str, Any]:
    """What an answer says of a file that the Hub keeps in LFS, with its SHA-256 under `key`."""
    if not file.sha256:
        return {}

    lfs = {
        key: file.sha256,
        "size": file.size,
        "pointerSize": 134,
    }
    return {"lfs": lfs}


# ---- trees


@lru_cache(maxsize=4)  # a client asks page after page
def tree_paths(repo: MirrorRepo, below: str, recursive: bool) -> Sequence[str]:
    """The paths of a folder ("" = root), sorted, those of folders included."""
    prefix = ""
    if below:
        prefix = f"{below}/"
    found: Set[str] = set()
    for path in repo.files:
        if not path.startswith(prefix):
            continue
        inside = path[len(prefix) :]
        *inner_folders, _ = inside.split("/")
        if recursive or not inner_folders:
            found.add(path)
        if not recursive:
            inner_folders = inner_folders[:1]
        for depth in range(1, len(inner_folders) + 1):
            inner = "/".join(inner_folders[:depth])
            found.add(prefix + inner)

    return sorted(found)


def tree_page(repo: MirrorRepo, below: str, query: Mapping[str, str], most: int) -> Optional[Page]:
    """One page of the Hub's answer for a folder; None when there is no such folder."""
    recursive = query.get("recursive", "").lower() in ("1", "true")
    paths = tree_paths(repo, below, recursive)
    if below and not paths:
        return None

    span = asked_span(query, most)
    if span.start == span.stop:
        span = Span(span.start, span.start + most)
    rows = [_tree_entry(repo, path) for path in paths[span.start : span.stop]]
    return Page(rows, _next_query(query, span, len(paths)))


def tree_entries(repo: MirrorRepo, wanted: Set[str]) -> List[Mapping[str, Any]]:
    """The Hub's answer to paths-info: of the paths those that exist, in order."""
    every = tree_paths(repo, "", recursive=True)
    return [_tree_entry(repo, path) for path in every if path in wanted]


def _tree_entry(repo: MirrorRepo, path: str) -> Mapping[str, Any]:
    file = repo.files.get(path)
    if file is None:
        oid = hashlib.sha1(path.encode())
        return {
            "type": "directory",
            "oid": oid.hexdigest(),
            "size": 0,
            "path": path,
        }

    entry = {
        "type": "file",
        "oid": file.git_sha1,
        "size": file.size,
        "path": path,
    }
    return {**entry, **_lfs(file, "oid")}


# ---- all repositories


def overview_row(repo: MirrorRepo) -> Dict[str, Any]:
    """What the list at / says of a repository: docs/json.md, mirror."""
    return {
        "repo": repo.repo,
        "repo_type": repo.source.repo_type,
        "commit": repo.commit,
        "bytes": repo.size,
        "files": len(repo.files),
    }


def repo_page(repos: Sequence[MirrorRepo], repo_type: str, query: Mapping[str, str]) -> Page:
    """One page of /api/models?search=WORDS&author=ORG&limit=N."""
    author = query.get("author", "").lower()
    words = query.get("search", "").lower()
    found = []
    for repo in repos:
        name = repo.repo.lower()
        wanted = words in name and name.startswith(author)
        if wanted and repo.source.repo_type == repo_type:
            found.append(repo)

    span = asked_span(query, PAGE)
    rows = [repo_summary(repo) for repo in found[span.start : span.stop]]
    return Page(rows, _next_query(query, span, len(found)))
