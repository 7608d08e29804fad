# SPDX-License-Identifier: Apache-2.0
"""The proof of a model folder before a container sees it, as far as its manifest and a key go.

Each time     names and sizes, and with a key the signature of what the manifest lists; no file
              beside these that an engine may load or run, and with a key none at all
When needed   the SHA-256 of every file: at the first start, and once more for a file that was
              touched since

What was proven is remembered in DEPLOY_DIR/NAME/proven.json (docs/formats.md, "Deployment"), which
is nobody else's, and bound to the very files that were read: {"format": "hfship-proven/1", "files":
{PATH: {"device", "inode", "size", "mtime_ns", "ctime_ns", "sha256"}}}.

Promises: follows no link below the model folder. What the operator insists on (--allow-changed) is
left out of the proof, and said. Never: proves what has no manifest; changes the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from hfship.archive.folder_check import unlisted_files
from hfship.archive.schedule import workers_for
from hfship.archive.signature import folder_signature
from hfship.archive.versions import version_of
from hfship.base.below import (
    FileIdentity,
    identity_of,
    is_foreign,
    opened_below,
    owner_of,
    stat_below,
)
from hfship.base.content import content_files
from hfship.base.errors import IntegrityError, command_line
from hfship.base.files import CHUNK, disk_errors, write_below
from hfship.base.manifest import BRING_AGAIN
from hfship.base.reading import LIST_SIZE, parse_json
from hfship.base.text import counted, human_bytes, shorten
from hfship.base.values import dataclass
from hfship.base.wholeness import require_whole
from hfship.base.workers import Workers, default_jobs
from hfship.serve.deployments import make_own_folder, read_own
from hfship.serve.model_folder import WEIGHTS, changed_error

if TYPE_CHECKING:
    from hfship.base.manifest import FileEntry, Manifest
    from hfship.base.report import Reporter

PROVEN_FILE, PROVEN_FORMAT = "proven.json", "hfship-proven/1"
# Two changes of a file within the clock's steps look like one: what is younger is read again.
SETTLED_NS = 50_000_000
# Beside weights: what is imported, unpickled, or filled in as a template.
_CODE = re.compile(
    r"\.(py|pyc|pyd|so|pkl|pickle|joblib|ckpt|npy|npz|jinja|jinja2|j2)$"
    r"|(^|/)(chat_template\.json|tokenizer_config\.json|processor_config\.json)$"
)


class HashedFile(NamedTuple):
    """A file that was read: which very file it was, and the SHA-256 of its bytes."""

    identity: FileIdentity
    sha256: str
    settled: bool  # else it may be changed again and look the same


@dataclass(frozen=True)
class TrustedFolder:
    """A model folder whose names, sizes and signature are right.

    `entries` are the files whose content is to be proven: all that the manifest lists, but for
    those that may differ. `signed_by` is the fingerprint of the key, and what that did not sign;
    "" where none was asked for; `version` has the first digits of the model's version.
    """

    folder: Path
    entries: Sequence[FileEntry] = ()
    signed_by: str = ""
    version: str = ""


# -- names, sizes, the signature


def trust_folder(
    folder: Path,
    manifest: Optional[Manifest],
    allowed: Sequence[str],
    key: Optional[Path],
    reporter: Reporter,
) -> TrustedFolder:
    """Check what can be checked at once. `allowed` are files that may differ or be extra.

    Sizes are those of serve.model_folder.require_complete. Raises IntegrityError, IncompleteError,
    UsageError for the key.
    """
    signed = folder_signature(folder, manifest, key)
    if manifest is None:
        # Nobody vouches for it: at least what brought it must have been done.
        require_whole(folder, dict(content_files(folder)), BRING_AGAIN)
        return TrustedFolder(folder)

    if manifest.caveats:
        reporter.warn(f"{folder}: {manifest.caveats[2:]}")
    _look_at_extra(folder, manifest, allowed, signed is not None, reporter)
    _warn_of_owners(folder, manifest, reporter)

    may_differ = {path for path in allowed if not WEIGHTS.search(path)}
    entries = [entry for entry in manifest.files if entry.path not in may_differ]
    signed_by = ""
    if signed:
        signed_by = signed.signer
    return TrustedFolder(folder, entries, signed_by, version_of(manifest).id[:12])


def _look_at_extra(
    folder: Path, manifest: Manifest, allowed: Sequence[str], signed: bool, reporter: Reporter
) -> None:
    """Refuse, or name, what the manifest does not list, and name what the operator insists on."""
    extra = [path for path in unlisted_files(folder, manifest) if path not in allowed]
    refused = [path for path in extra if signed or may_be_loaded(path)]
    if refused:
        raise _extra_error(folder, refused, signed)
    if extra:
        reporter.warn(f"{folder}: not in the manifest: {shorten(extra)}")
    if allowed:
        reporter.warn(f"{folder}: not proven, as --allow-changed says: {shorten(allowed)}")


def may_be_loaded(path: str) -> bool:
    """Whether an engine that finds a file may load it as weights, or run what is in it.

    >>> [may_be_loaded(path) for path in ("extra.safetensors", "a/b.py", "chat_template.jinja")]
    [True, True, True]
    >>> [may_be_loaded(path) for path in ("NOTES.txt", "o200k_base.tiktoken", ".gitattributes")]
    [False, False, False]
    """
    path = path.lower()
    return bool(WEIGHTS.search(path) or _CODE.search(path))


def _extra_error(folder: Path, paths: Sequence[str], signed: bool) -> IntegrityError:
    why = "not in the manifest, and an engine may load or run them"
    if signed:
        why = "not in the manifest, which a key was asked to vouch for"
    insist = ["hfship", "serve", folder]
    for path in paths[:10]:
        insist += ["--allow-changed", path]
    return IntegrityError(
        f"{folder} has {counted(len(paths), 'file')} that nobody vouches for",
        f"{shorten(paths)}: {why}",
        f"move them out of the folder; or, if they are yours: {command_line(*insist)}",
    )


def _warn_of_owners(folder: Path, manifest: Manifest, reporter: Reporter) -> None:
    """Say who else can change what is served while it is served."""
    others = set()
    statuses = [os.stat(folder)]
    for entry in manifest.files:
        status = stat_below(folder, entry.path)
        statuses.append(status)
    for status in statuses:
        if is_foreign(status):
            others.add(owner_of(status))

    if others:
        names = ", ".join(sorted(others))
        reporter.warn(
            f"{folder} is of {names}, or open to others: it can change while it is served"
        )


# -- content


def unproven(trusted: TrustedFolder, known: Mapping[str, HashedFile]) -> List[FileEntry]:
    """The files whose content nobody proved since they were last touched. Raises DiskError."""
    folder = trusted.folder
    found = []
    for entry in trusted.entries:
        with disk_errors("read", folder / entry.path):
            now = identity_of(stat_below(folder, entry.path))
        untouched = HashedFile(now, entry.sha256, settled=True)
        if known.get(entry.path) != untouched:
            found.append(entry)

    return found


def prove_content(
    trusted: TrustedFolder, entries: Sequence[FileEntry], deployment: Path, reporter: Reporter
) -> None:
    """Read these files of a folder, and remember those that are right, also when it is interrupted.

    Raises IntegrityError for those that are not what the manifest lists, DiskError.
    """
    proven = read_proven(deployment)
    wrong: List[FileEntry] = []
    try:
        for entry, file in _hashed(trusted.folder, entries, reporter):
            proven.pop(entry.path, None)
            if file.sha256 != entry.sha256:
                wrong.append(entry)
            elif file.settled:
                proven[entry.path] = file
    finally:
        write_proven(deployment, proven)

    if wrong:
        raise changed_error(trusted.folder, wrong, "SHA-256 other than in the manifest")

    count = counted(len(entries), "file")
    size = human_bytes(sum(entry.size for entry in entries))
    reporter.info(f"{trusted.folder}: {count} verified, {size}")


def _hashed(
    folder: Path, entries: Sequence[FileEntry], reporter: Reporter
) -> Iterator[Tuple[FileEntry, HashedFile]]:
    """The files as they are hashed by as many workers as there are cores."""
    left = iter(entries)

    def next_task(_: int, idle: bool) -> Optional[Tuple[FileEntry]]:
        if idle:
            for entry in left:
                return (entry,)
        return None

    def read(count: Callable[[int], None], entry: FileEntry) -> HashedFile:
        return hash_below(folder, entry.path, count)

    size = sum(entry.size for entry in entries)
    count = workers_for(default_jobs(), size)
    with reporter.stage("verify", size) as stage, Workers(count, read, stage.add) as workers:
        for done in stage.each(workers.run(next_task), len(entries)):
            (entry,) = done.task
            yield entry, done.result


def hash_below(folder: Path, path: str, count: Callable[[int], None]) -> HashedFile:
    """Read a file below a folder. `count` is called with the bytes of each piece. Raises DiskError.

    A file that was changed a moment ago, or meanwhile, is not settled.
    """
    digest = hashlib.sha256()
    with disk_errors("read", folder / path), opened_below(folder, path) as fd:
        before = identity_of(os.fstat(fd))
        while True:
            piece = os.read(fd, CHUNK)
            if not piece:
                break
            digest.update(piece)
            count(len(piece))
        after = identity_of(os.fstat(fd))

    is_old = after.ctime_ns < time.time_ns() - SETTLED_NS
    return HashedFile(after, digest.hexdigest(), settled=is_old and before == after)


def refuse_changed(trusted: TrustedFolder) -> None:
    """Read all files of a small folder, such as an adapter. Raises IntegrityError, DiskError."""
    folder = trusted.folder
    wrong = []
    for entry in trusted.entries:
        if hash_below(folder, entry.path, lambda _: None).sha256 != entry.sha256:
            wrong.append(entry)
    if wrong:
        raise changed_error(folder, wrong, "SHA-256 other than in the manifest")


def read_proven(deployment: Path) -> Dict[str, HashedFile]:
    """What was proven for a deployment; {} where nothing sensible is written. Raises HostError."""
    content = read_own(deployment, PROVEN_FILE, LIST_SIZE) or b"{}"
    found = {}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        value = parse_json(content)
        for path, row in value["files"].items():
            numbers = [row[field] for field in FileIdentity._fields]
            identity = FileIdentity(*numbers)
            found[path] = HashedFile(identity, row["sha256"], settled=True)
    return found


def write_proven(deployment: Path, proven: Mapping[str, HashedFile]) -> None:
    """Remember what was proven for a deployment. Raises DiskError, HostError."""
    make_own_folder(deployment)
    files = {}
    for path, file in proven.items():
        row: Dict[str, Any] = file.identity._asdict()
        row["sha256"] = file.sha256
        files[path] = row

    value = {"format": PROVEN_FORMAT, "files": files}
    text = json.dumps(value, sort_keys=True, indent=1)
    name = f"{deployment.name}/{PROVEN_FILE}"
    write_below(deployment.parent, name, text + "\n", 0o600)
