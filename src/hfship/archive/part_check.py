# SPDX-License-Identifier: Apache-2.0
"""The proof of one part of an archive, read alone: one medium of a series, without the others.

Promises: every byte of the part is read, and of the other parts none but the tables at the end of
the last, where that is there. These have a CRC-32 for each frame; without them NAME.tar.zst.sha256
tells, and without that the checksums in the frames themselves. Never: says anything of the files of
the model, which are whole only with all parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, List, Sequence, Tuple

from hfship.archive.damage import NOT_OURS, Damage, merge_adjacent
from hfship.archive.files import PART_NAME, read_index
from hfship.archive.opening import indexed_archive, walked_archive
from hfship.archive.zstd import ZstdError, load_zstd
from hfship.base.files import sha256_file
from hfship.base.text import counted, human_bytes
from hfship.base.values import dataclass, replace

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.frames import Decompress, Frame
    from hfship.archive.reader import Archive
    from hfship.base.report import Reporter


@dataclass(frozen=True)
class PartCheck:
    """What came of reading a part: the damage, or how it was proven."""

    path: Path
    number: int
    size: int
    damages: Tuple[Damage, ...]
    proof: str

    def text(self) -> str:
        """`part 2 alone, 240 MB, as the tables in NAME.tar.zst.0005 say`"""
        size = human_bytes(self.size)
        return f"part {self.number} alone, {size}, {self.proof}; other parts were not read"


def can_be_alone(files: ArchiveFiles, path: Path) -> bool:
    """Whether the part at `path` is one of several, of which something tells what it must be."""
    index = read_index(files)
    if index:
        return len(index.part_sizes) > 1
    if path.name in files.listed():
        return True
    alone = replace(files, numbers={1: path})
    frames = walked_archive(alone).frames
    return len(frames) > 0


def check_part(files: ArchiveFiles, path: Path, reporter: Reporter) -> PartCheck:
    """Prove the part at `path` of an archive that was found. Raises DiskError."""
    match = PART_NAME.match(path.name)
    assert match is not None  # or it is no part
    number = int(match["number"])
    with_part = replace(files, numbers={**files.numbers, number: path})
    damages, proof = _prove(with_part, path, reporter)
    size = path.stat().st_size
    return PartCheck(
        path,
        number,
        size,
        tuple(damages),
        proof,
    )


def _prove(files: ArchiveFiles, path: Path, reporter: Reporter) -> Tuple[List[Damage], str]:
    """The damage of a part, and what it was compared with."""
    index = read_index(files)
    if index and len(index.part_sizes) > 1:
        archive = indexed_archive(files, index)
        last = archive.parts[-1].path.name
        return _damage_by_tables(archive, path, reporter), f"as the tables in {last} say"

    listed = files.listed().get(path.name)
    if listed:
        size = path.stat().st_size
        with reporter.stage("verify", size) as stage:
            sha256 = sha256_file(path, stage.add)
        if sha256 == listed:
            return [], f"as {files.sums.name} says"

    alone = replace(files, numbers={1: path})
    archive = walked_archive(alone)
    damages = _damage_of_frames(archive, list(archive.frames), reporter)
    if archive.frames.size < archive.size:
        damages += archive.damages
    if listed and not damages:
        damages = [Damage(f"is other than {files.sums.name} says", parts=(path.name,))]
    frames = counted(len(archive.frames), "frame")
    return damages, f"by the checksums in its {frames}"


def _damage_by_tables(archive: Archive, path: Path, reporter: Reporter) -> List[Damage]:
    """The damage of a part of an archive whose tables are known."""
    parts = [part for part in archive.parts if part.path == path]
    if not parts:
        return [Damage(NOT_OURS, parts=(path.name,))]

    (part,) = parts
    known = [damage for damage in archive.damages if path.name in damage.parts]
    frames = [frame for frame in archive.frames if part.start <= frame.offset < part.stop]
    found = _damage_of_frames(archive, frames, reporter)
    return merge_adjacent([*known, *found])


def _damage_of_frames(
    archive: Archive, frames: Sequence[Frame], reporter: Reporter
) -> List[Damage]:
    """The damage of some frames of an archive."""
    decompress = load_zstd().decompressor()
    numbers = {}
    for number, frame in enumerate(archive.frames, 1):
        numbers[frame.offset] = number
    size = sum(frame.size for frame in frames)
    damages: List[Damage] = []
    with reporter.stage("verify", size) as stage:
        for frame in frames:
            try:
                _require_intact(archive, frame, decompress)
            except ZstdError as exc:
                number = numbers[frame.offset]
                damages.append(archive.damage(str(exc), number))
            stage.add(frame.size)

    return merge_adjacent(damages)


def _require_intact(archive: Archive, frame: Frame, decompress: Decompress) -> None:
    """Read a frame; without a CRC-32 of it known, its content, too. Raises ZstdError."""
    if frame.crc is not None:
        archive.unit(frame)
    else:
        archive.decode(frame, decompress)
