# SPDX-License-Identifier: Apache-2.0
"""The plan of an archive, made before the first byte is read.

Owns what decides the bytes of an archive: the manifest of what is packed, and how its stream is cut
into frames. Promises: equal manifests and options give equal plans.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Optional, Sequence, Set, Tuple

from hfship.archive.frames import largest_unit, tail_size
from hfship.archive.lanes import cut_frames
from hfship.archive.layout import PLANES, WEIGHT_SIZE, delta_json, stream_layout
from hfship.archive.part_cut import CUT_VERSION
from hfship.archive.restore_script import RESTORE_PY, RESTORE_SUFFIX
from hfship.archive.versions import version_of
from hfship.archive.zstd import FRAME_SIZE, load_zstd
from hfship.base.content import NAME_MAX
from hfship.base.errors import UsageError
from hfship.base.imagefacts import BLOBS
from hfship.base.manifest import listed_paths
from hfship.base.settings import parse_size
from hfship.base.text import shorten
from hfship.base.values import dataclass, replace

if TYPE_CHECKING:
    from hfship.archive.layout import Segment
    from hfship.base.manifest import Manifest

# Medium -> the largest file it takes, in bytes.
SPLITS = {
    "fat32": 2**32 - 1,
    "dvd": 4_700_000_000,
    "bd25": 25_025_314_816,
    "bd50": 50_050_629_632,
}

PROFILES = ("standard", "smallest", "store")


@dataclass(frozen=True)
class PackOptions:
    """How to pack."""

    split: Optional[int] = None  # bytes of a part; None: one file
    level: int = 1  # of zstd
    jobs: int = 1  # workers
    force: bool = False  # replace another archive of the same name
    frame_size: int = 0  # bytes of content in a frame; 0: by the size of the model
    profile: str = "standard"  # one of PROFILES
    since: Optional[Manifest] = None  # what the far side has, for a delta
    read_back: bool = False  # read from the medium what was written to it


@dataclass(frozen=True)
class PackPlan:
    """All that decides the bytes of an archive: the layout of its stream, and where that is cut
    into frames: number N holds bytes [edges[N], edges[N + 1]). `text` is that of the manifest."""

    folder: Path
    manifest: Manifest
    text: bytes
    segments: Tuple[Segment, ...]
    edges: Sequence[int]
    options: PackOptions

    @property
    def archive(self) -> str:
        """The name of the archive, or what comes before the number of a part."""
        name = self.manifest.name
        if self.options.since:
            name += ".delta"
        return f"{name}.tar.zst"

    @property
    def key(self) -> str:
        """Equal for plans that give equal bytes."""
        digest = hashlib.sha256()
        for segment in self.segments:
            digest.update(segment.known)

        options = self.options
        form = (
            options.split,
            options.level,
            options.frame_size,
            options.profile,
            CUT_VERSION,
        )
        zstd = load_zstd().name
        digest.update(repr((form, zstd)).encode())
        return digest.hexdigest()

    @property
    def count(self) -> int:
        """How many frames there are."""
        return len(self.edges) - 1

    @property
    def largest_frame(self) -> int:
        """Bytes of content of the largest frame."""
        return max(self._frame_lengths())

    @property
    def units_at_most(self) -> int:
        """Bytes of all units if nothing compresses."""
        return sum(map(largest_unit, self._frame_lengths()))

    @property
    def size_at_most(self) -> int:
        """Bytes of the archive if nothing compresses."""
        tables = tail_size(self.count, self.parts_at_most)
        return self.units_at_most + tables

    @property
    def parts_at_most(self) -> int:
        """A bound for the number of parts."""
        split = self.options.split
        if split is None:
            return 1

        return most_parts(self.units_at_most, split, self.options.frame_size)

    def _frame_lengths(self) -> Iterator[int]:
        starts = self.edges
        stops = self.edges[1:]
        for start, stop in zip(starts, stops):
            yield stop - start


def parse_split(text: str) -> int:
    """Bytes of a part, from the name of a medium or a size. Raises UsageError.

    >>> [parse_split(t) for t in ("fat32", "DVD", "650M")]
    [4294967295, 4700000000, 650000000]
    """
    medium = SPLITS.get(text.lower())
    if medium:
        return medium

    try:
        return parse_size(text)
    except UsageError as exc:
        media = ", ".join(SPLITS)
        why = f"parts are as large as a medium ({media}) or a size; the least is about 2.2M"
        raise UsageError(exc.what, why, exc.next_step) from exc


def frame_size_for(size: int) -> int:
    """Bytes of content in a frame of a model of `size` bytes: so many that its tables are no burden
    to the memory.

    >>> [frame_size_for(size) >> 20 for size in (0, 10**11, 10**12, 2 * 10**12)]
    [2, 2, 4, 8]
    """
    doublings = (size >> 39).bit_length()
    return FRAME_SIZE << doublings


def most_parts(units_at_most: int, split: int, frame_size: int) -> int:
    """A bound for the number of parts: each but the last is planned to be full up to a unit, any
    two exceed one limit, and what goes on behind its part is half of them at most. `units_at_most`
    are bytes of all units if nothing compresses."""
    full_up_to_a_unit = split - largest_unit(frame_size)
    half = split // 2
    filled = max(full_up_to_a_unit, half, 1)
    return 2 * (units_at_most // filled) + 2


# -- the plan


def plan_pack(folder: Path, manifest: Manifest, options: PackOptions) -> PackPlan:
    """The plan of an archive of the files of a manifest.

    Raises UsageError for names that the profile takes, and when a part cannot hold a frame or the
    tables; ValueError for a delta that is none.
    """
    frame_size = options.frame_size or frame_size_for(manifest.size)
    options = replace(options, frame_size=frame_size)
    restore = b""
    if options.profile == "smallest":
        _require_no_planes(manifest)
        restore = RESTORE_PY

    delta = b""
    if options.since:
        absent = _paths_known_to(options.since, manifest)
        delta = delta_json(absent, version_of(options.since).id)

    text = manifest.to_json().encode("utf-8")
    segments = stream_layout(manifest, text, restore, delta)
    edges = cut_frames(segments, frame_size)
    plan = PackPlan(
        folder=folder,
        manifest=manifest,
        text=text,
        segments=segments,
        edges=array("Q", edges),
        options=options,
    )
    if options.split is not None:
        tables = tail_size(plan.count, plan.parts_at_most)
        require_roomy_parts(options.split, options.frame_size, tables)
    return plan


def _require_no_planes(manifest: Manifest) -> None:
    """Refuse files whose names planes take in the archive, or restore.py while it joins them."""
    paths = listed_paths(manifest)
    taken = {path for path in paths if path.endswith(PLANES)}
    long = []
    for entry in manifest.files:
        if entry.size < WEIGHT_SIZE:
            continue
        while_joined = entry.path + RESTORE_SUFFIX
        taken |= paths & {while_joined}
        if len(os.path.basename(while_joined).encode()) > NAME_MAX:
            long.append(entry.path)

    why = ""
    if taken:
        why = f"{shorten(sorted(taken))}: names that the profile takes itself"
    elif long:
        why = f"{shorten(long)}: names too long for what the profile adds"
    if why:
        what = f"{manifest.name} cannot be packed with --profile smallest"
        raise UsageError(what, why, "use another profile: --profile standard")


def _paths_known_to(since: Manifest, manifest: Manifest) -> Set[str]:
    """The files of `manifest` that are, by content, also in `since`; of an image its layers alone,
    which an engine may have: what describes them goes with every delta."""
    known = {entry.sha256 for entry in since.files}
    paths = set()
    for entry in manifest.files:
        if entry.sha256 in known:
            paths.add(entry.path)
    if manifest.image:
        described = {f"{BLOBS}{digest[7:]}" for digest in manifest.image.digests}
        paths = {path for path in paths if path.startswith(BLOBS)} - described
    return paths


def require_roomy_parts(split: int, frame_size: int, tables: int) -> None:
    """Refuse parts into which a frame, or the tables, do not go: neither is ever cut."""
    least = max(largest_unit(frame_size), tables)
    if split < least:
        what = f"parts of {split} bytes are too small"
        why = f"a part must hold a frame and the tables of this archive: {least} bytes"
        step = f"give --split {least}, or more"
        raise UsageError(what, why, step)
