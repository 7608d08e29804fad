# SPDX-License-Identifier: Apache-2.0
"""Archives of the same name that are there before a pack: left alone, replaced, or in the way.

Owns what makes two archives the same: their files, by path and SHA-256, and their form. When and
from where a model was fetched does not. Promises: only a complete archive of an older commit of the
same model is replaced unasked; of all else it is said what differs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence, Tuple

from hfship.archive.files import archives_in, merged
from hfship.archive.opening import open_archive
from hfship.archive.pack_journal import WrittenPart
from hfship.archive.pack_plan import plan_pack
from hfship.archive.versions import Lineage, version_of
from hfship.base.errors import HfshipError, UsageError
from hfship.base.text import human_bytes, shorten
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.layout import Segment
    from hfship.archive.pack_plan import PackPlan
    from hfship.archive.reader import Archive
    from hfship.archive.versions import Version
    from hfship.base.manifest import Manifest


@dataclass(frozen=True)
class PackedBefore:
    """What was there: an archive as it is asked for, with its own manifest; or no `parts`, and the
    version that is to be replaced."""

    manifest: Manifest
    parts: Tuple[WrittenPart, ...] = ()

    @property
    def version(self) -> Version:
        """Which one it is."""
        return version_of(self.manifest)


def packed_before(plan: PackPlan, folders: Sequence[Path]) -> Optional[PackedBefore]:
    """The archive that is there and as planned, or is to be replaced; None if there is none, or
    one that a killed run of ours did not complete.

    Raises UsageError for another one, which says what differs.
    """
    replaced: Optional[PackedBefore] = None
    for files in _archives_named(plan.archive, folders):
        if not files.is_complete:
            _require_unfinished(plan, files)
            continue
        archive = _intact(files)
        if archive is None or archive.manifest is None:
            raise _in_the_way(plan, files, "it is damaged, or of another program")
        differs = differences(plan, archive)
        if not differs:
            return PackedBefore(archive.manifest, _parts_of(archive))
        if not _is_older(archive.manifest, plan.manifest):
            raise _in_the_way(plan, files, "\n".join(differs))
        replaced = PackedBefore(archive.manifest)

    return replaced


def _archives_named(archive: str, folders: Sequence[Path]) -> List[ArchiveFiles]:
    """The archives that new files of this name would replace."""
    found: List[ArchiveFiles] = []
    for folder in folders:
        found += archives_in(folder)
    return [files for files in merged(found) if _is_named(files, archive)]


def _is_named(files: ArchiveFiles, archive: str) -> bool:
    """Whether new files of `archive` would replace these: on FAT also when they differ in case."""
    if files.name == archive:
        return True
    if files.name.lower() != archive.lower():
        return False

    rest_of_name = files.path.name[len(archive) :]
    as_written = files.path.with_name(archive + rest_of_name)
    return as_written.exists()


def _intact(files: ArchiveFiles) -> Optional[Archive]:
    """The archive, if no damage of it is known."""
    with contextlib.suppress(HfshipError):
        archive = open_archive(files)
        if not archive.damages and archive.segments:
            return archive
    return None


def _parts_of(archive: Archive) -> Tuple[WrittenPart, ...]:
    listed = archive.files.listed()
    return tuple(
        WrittenPart(part.path, part.size, listed[part.path.name]) for part in archive.parts
    )


def _require_unfinished(plan: PackPlan, files: ArchiveFiles) -> None:
    """Refuse to replace an archive, unless it is what a killed run of ours had named so far."""
    present = {path.name for path in files.paths}
    if present < set(files.listed()):
        return
    raise _in_the_way(plan, files, f"it is not what {files.sums.name} lists")


def _in_the_way(plan: PackPlan, files: ArchiveFiles, why: str) -> UsageError:
    reason = f"it is not the archive of {plan.manifest.name} asked for:\n{why}"
    step = "give --force to replace it, or another folder with -o DIR"
    return UsageError(f"{files.path} is there already", reason, step)


# -- what differs


def differences(plan: PackPlan, archive: Archive) -> List[str]:
    """What is other in an archive than planned, in words; nothing, if it needs no packing."""
    manifest = archive.manifest
    assert manifest is not None  # or nothing can be compared
    differs = _other_files(manifest, plan.manifest)
    if differs:
        return [_other_version(manifest, plan.manifest), *differs]
    differs = _other_form(plan, archive)
    if differs:
        return differs

    # Of the same files, but maybe of another time: all the rest of the stream must be as planned.
    planned = plan_pack(plan.folder, manifest, plan.options)
    if [one.known for one in archive.segments] != [one.known for one in planned.segments]:
        return ["it is a delta since another version"]
    return []


def _other_version(there: Manifest, planned: Manifest) -> str:
    """Which versions two manifests are of."""
    return f"it holds {version_of(there).label}, the folder {version_of(planned).label}"


def _other_files(there: Manifest, planned: Manifest) -> List[str]:
    """What differs in the files of two manifests, in words."""
    before = {entry.path: entry.sha256 for entry in there.files}
    now = {entry.path: entry.sha256 for entry in planned.files}
    changed = [path for path in now if before.get(path, now[path]) != now[path]]
    kinds = {
        "not in it": sorted(now.keys() - before.keys()),
        "only in it": sorted(before.keys() - now.keys()),
        "changed": changed,
    }
    differs = [f"{kind}: {shorten(paths)}" for kind, paths in kinds.items() if paths]
    if (there.name, there.unproven) != (planned.name, planned.unproven):
        differs.append(f"it is called {there.name}{there.caveats}")
    return differs


def _other_form(plan: PackPlan, archive: Archive) -> List[str]:
    """What differs in the form of an archive of the same files, in words."""
    split = plan.options.split
    in_parts = bool(archive.files.numbers)
    if in_parts and not split:
        return ["it is in parts, asked for is one file"]
    if split and not in_parts:
        return ["it is one file, asked for are parts"]
    largest = max(part.size for part in archive.parts)
    if split and largest > split:
        present = human_bytes(largest)
        most = human_bytes(split)
        return [f"it has a part of {present}, asked for are {most} at most"]

    smallest = _has_planes(archive.segments)
    if smallest != _has_planes(plan.segments):
        how = "with" if smallest else "without"
        return [f"it was packed {how} --profile smallest"]
    return []


def _has_planes(segments: Sequence[Segment]) -> bool:
    return any(segment.planes for segment in segments)


def _is_older(there: Manifest, planned: Manifest) -> bool:
    """Whether an archive is of another commit of the same model, and not known to be the newer."""
    before, now = version_of(there), version_of(planned)
    if there.name != planned.name or not before.commit or before.repo != now.repo:
        return False
    return before.id != now.id and not Lineage([]).is_older(now, before)
