# SPDX-License-Identifier: Apache-2.0
"""The manifest of what is packed, made where there is none.

Owns what of a folder never travels, and what is looked at before a byte is hashed: where no Hub
vouches for the files, they must look whole, and no token of the Hub may stand in one of them.

Promises: a folder of huggingface_hub's cache is only read. Never: reads weights, but to hash them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Callable, List, Mapping, Optional, Sequence

from hfship.archive.schedule import workers_for
from hfship.base.content import content_files, folder_content
from hfship.base.errors import (
    DiskError,
    IncompleteError,
    IntegrityError,
    UsageError,
    command_line,
)
from hfship.base.files import disk_errors, sha256_file
from hfship.base.manifest import (
    MANIFEST_PATH,
    FileEntry,
    listed_paths,
    make_manifest,
    read_manifest,
    require_finished,
    write_manifest,
)
from hfship.base.reading import read_small
from hfship.base.text import printable, shorten
from hfship.base.values import replace
from hfship.base.wholeness import Fault, find_faults, require_whole
from hfship.base.workers import Workers
from hfship.hub.cache import damaged_blobs, not_downloaded
from hfship.hub.protocol import fetch_command

if TYPE_CHECKING:
    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter
    from hfship.hub.cache import CachedModel

# What other programs, and people, keep beside a model for themselves: of the path below the folder.
PRIVATE = re.compile(
    r"""
    (^|/)(
        (\.git|\.hg|\.svn|\.ssh|\.aws|\.hfd|\.huggingface|\.idea|\.vscode|__pycache__)/.*
        | \.cache/huggingface/.* | \.ipynb_checkpoints/.*
        | \.env(\.[^/]*)? | \.netrc | \.git-credentials | \.(bash|python)_history
        | \.[^/]*\.sw[a-p] | [^/]*~ | \#[^/]*\# | \.\#[^/]*
        | \.DS_Store | \._[^/]* | Thumbs\.db | desktop\.ini | \.nfs[0-9a-f]+
        | \.msc | \.mv | \.mdl
    )$
    """,
    re.VERBOSE,
)
# As long as tokens are; hf_xxx... stands in instructions.
_TOKEN = re.compile(rb"\b(hf|api_org)_(?!x+\b|X+\b)[A-Za-z0-9]{30,}\b")
_TEXT_SIZE = 1 << 20  # bytes; of larger files nobody wrote a token into one


def manifest_to_pack(
    folder: Path,
    name: Optional[str],
    jobs: int,
    reporter: Reporter,
    keep: bool = True,
    force: bool = False,
    accept: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Manifest:
    """The manifest of a folder, under another `name` if one is given. A folder without one gets it,
    as `accept` returns it, written if `keep` is set; one that is there goes through `accept` as
    well, and stays as it is.

    Files outside the manifest are warned of. What no Hub vouches for must look whole and hold no
    token, unless `force` insists. Raises IntegrityError for files that are missing, of another size
    or damaged, UsageError for a folder without files or with a token, IncompleteError for one that
    is not complete, DiskError.
    """
    manifest = read_manifest(folder)
    content = folder_content(folder, listed_paths(manifest))
    if content.never:
        reporter.warn(f"{folder}: never packed: {shorten(content.never)}")
    found = dict(content.files)
    if manifest is None:
        require_finished(folder)
        manifest = accept(_new_manifest(folder, found, name, jobs, reporter, force))
        if keep:
            _keep_manifest(folder, manifest, reporter)
    else:
        wrong = _wrong_sizes(manifest, found)
        if wrong:
            raise mismatch_error(folder, manifest, wrong)
        _look_at_listed(folder, manifest, reporter, force)
        accept(manifest)

    extra = sorted(set(found) - listed_paths(manifest))
    if extra:
        reporter.warn(f"{folder}: not in the manifest, so not packed: {shorten(extra)}")
    if manifest.partial or manifest.faults:
        reporter.warn(f"{folder}{manifest.caveats}")
    if not name:
        return manifest

    valid_name = make_manifest(name, ()).name
    return replace(manifest, name=valid_name)


def _new_manifest(
    folder: Path,
    found: Mapping[str, int],
    name: Optional[str],
    jobs: int,
    reporter: Reporter,
    force: bool,
) -> Manifest:
    """The manifest of a folder that has none, but files `found`, path -> bytes."""
    sizes = {path: size for path, size in found.items() if not PRIVATE.search(path)}
    faults = _require_whole(folder, sizes, force)
    _require_no_token(folder, sizes, force)
    name = name or folder.resolve().name
    manifest = _manifest_of_files(folder, sizes, name, jobs, reporter)
    return _with_faults(manifest, faults)


def cached_manifest(
    model: CachedModel, name: Optional[str], jobs: int, reporter: Reporter, force: bool = False
) -> Manifest:
    """The manifest of a commit in huggingface_hub's cache; nothing is written there.

    Every file is proven by the hash that its blob is called by. Raises IncompleteError for blobs
    that are still coming, unless `force` insists, IntegrityError, UsageError, DiskError.
    """
    folder = model.folder
    if model.coming and not force:
        what = f"{folder.parent.parent} is not complete"
        names = shorten([path.name for path in model.coming], 5)
        fetch = command_line("hf", "download", model.source.repo)
        step = f"{fetch}\nor remove what no download needs any more, or: {_insisting(folder)}"
        raise IncompleteError(what, f"still to come: {names}", step)

    sizes = dict(content_files(folder))
    faults = _require_whole(folder, sizes, force)
    manifest = _manifest_of_files(folder, sizes, name or model.name, jobs, reporter)
    wrong = damaged_blobs(model, manifest.files)
    if wrong:
        fetch = command_line("hf", "download", "--force-download", model.source.repo)
        raise IntegrityError(f"{folder} is damaged", shorten(wrong, 20, "\n"), fetch)
    left_out = not_downloaded(model, sizes.keys())
    manifest = replace(
        manifest,
        source=model.source,
        left_out=len(left_out),
        left_out_paths=tuple(left_out),
    )
    return _with_faults(manifest, faults)


def _with_faults(manifest: Manifest, faults: Sequence[Fault]) -> Manifest:
    """The manifest with faults on which somebody insists."""
    missing = [fault.path for fault in faults if fault.is_missing]
    others = [fault.text() for fault in faults if not fault.is_missing]
    return replace(manifest, partial=tuple(missing), faults=tuple(others))


def _look_at_listed(folder: Path, manifest: Manifest, reporter: Reporter, force: bool) -> None:
    """The same for a folder with a manifest. What the Hub published is only warned of."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    if manifest.source:
        tokens = _with_tokens(folder, sizes)
        if tokens:
            reporter.warn(f"{folder}: a token of the Hub stands in {shorten(tokens)}, as published")
        return

    private = [path for path in sizes if PRIVATE.search(path)]
    if private and not force:
        what = f"{folder} has files in its manifest that are nobody else's business"
        remove = command_line("rm", *(folder / path for path in [*private, MANIFEST_PATH]))
        raise UsageError(what, shorten(private), f"{remove}\nthen pack again, or give --force")
    if not manifest.faults and not manifest.partial:
        _require_whole(folder, sizes, force, listed=True)
        _require_no_token(folder, sizes, force)


# -- before a byte is hashed


def _require_whole(
    folder: Path, sizes: Mapping[str, int], force: bool, listed: bool = False
) -> List[Fault]:
    """Refuse files, path -> bytes, that do not look whole. Returns the faults on which `force`
    insists. Raises IncompleteError, IntegrityError, DiskError."""
    if force:
        return find_faults(folder, sizes, listed)
    step = f"bring those files again, then pack again\nto pack it as it is: {_insisting(folder)}"
    require_whole(folder, sizes, step, listed)
    return []


def _require_no_token(folder: Path, sizes: Mapping[str, int], force: bool) -> None:
    tokens = _with_tokens(folder, sizes)
    if not tokens or force:
        return

    what = f"{folder} holds a token of the Hub, which who gets the archive could use"
    why = f"it stands in {shorten(tokens)}"
    step = "take it out of there, and revoke it at https://huggingface.co/settings/tokens"
    raise UsageError(what, why, f"{step}\nif it is none: {_insisting(folder)}")


def _insisting(folder: Path) -> str:
    return command_line("hfship", "pack", folder, "--force")


def _with_tokens(folder: Path, sizes: Mapping[str, int]) -> List[str]:
    """The small text files in which a token of the Hub's form stands."""
    found = []
    for path, size in sizes.items():
        if size > _TEXT_SIZE:
            continue
        with disk_errors("read", folder / path):
            content = read_small(folder / path, _TEXT_SIZE)
        if b"\0" not in content and _TOKEN.search(content):
            found.append(printable(path))
    return found


def _manifest_of_files(
    folder: Path, sizes: Mapping[str, int], name: str, jobs: int, reporter: Reporter
) -> Manifest:
    """Hash the files of a folder, path -> bytes, and make their manifest."""
    if not sizes:
        what = f"{folder} holds no files"
        raise UsageError(what, "", "name the folder of a model")

    make_manifest(name, ())  # a name that cannot be: say so before hashing
    reporter.info(f"{folder} has no manifest: hashing its files to make one")

    def hashed(count: Callable[[int], None], path: str) -> FileEntry:
        file = folder / path
        size = sizes[path]
        with disk_errors("read", file):
            sha256 = sha256_file(file, count)
        return FileEntry(path, size, sha256)

    total = sum(sizes.values())
    count = workers_for(jobs, total)
    with reporter.stage("hash", total) as stage, Workers(count, hashed, stage.add) as workers:
        files = workers.map(list(sizes))

    return make_manifest(name, files)


def _keep_manifest(folder: Path, manifest: Manifest, reporter: Reporter) -> None:
    """Write a manifest into its folder, if that can be written to."""
    try:
        write_manifest(folder, manifest)
    except DiskError as exc:
        reporter.warn(f"{exc.what}: the manifest travels in the archive only")


def _wrong_sizes(manifest: Manifest, sizes: Mapping[str, int]) -> List[str]:
    """What is wrong, in words, with each file that is not as large as its manifest says."""
    wrong = []
    for entry in manifest.files:
        size = sizes.get(entry.path)
        if size is None:
            wrong.append(f"{entry.path} is missing")
        elif size != entry.size:
            wrong.append(f"{entry.path} has {size} bytes instead of {entry.size}")

    return wrong


def mismatch_error(folder: Path, manifest: Manifest, wrong: Sequence[str]) -> IntegrityError:
    """The error of a folder that is not what its manifest says; `wrong` are the files, in words."""
    source = manifest.source
    if source:
        remedy = fetch_command(source, source.commit, folder)
    else:
        path = folder / MANIFEST_PATH
        remedy = f"restore the file, or remove {path} if the change is meant"

    what = f"{folder} is not what its manifest says"
    why = shorten(wrong, 20, "\n")
    return IntegrityError(what, why, f"{remedy}, then pack again")
