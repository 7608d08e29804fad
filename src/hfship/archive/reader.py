# SPDX-License-Identifier: Apache-2.0
"""An archive opened for reading: its parts on disk, its frames, and what the manifest says of them.

Owns how a frame is read and what can be wrong with it. Never: writes; reads more than one frame at
a time.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar, List, NamedTuple, Optional, Sequence, Tuple, Union

from hfship.archive.damage import MISSING, Damage, FileRange
from hfship.archive.frames import PZSTD_HEADER, Frames, frame_in, unit_header
from hfship.archive.layout import Delta, index_at, segments_between
from hfship.archive.planes import join_planes
from hfship.archive.zstd import ZstdError
from hfship.base.below import open_regular
from hfship.base.errors import IntegrityError
from hfship.base.files import pread_exactly
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.frames import Decompress, Frame
    from hfship.archive.layout import Segment
    from hfship.archive.media import MediaChange
    from hfship.base.manifest import Manifest


class ForeignArchive(IntegrityError):
    """Nothing tells that hfship made it: `stream` may be an archive of another program."""

    def __init__(self, files: ArchiveFiles, stream: IO[bytes]) -> None:
        super().__init__(
            f"{files.path} was not made by hfship, or both its beginning and its end are damaged",
            "it has neither the tables of hfship at its end nor a manifest in its first frame",
            f"copy it again; if another program made it: hfship unpack {files.path}",
        )
        self.files = files
        self.stream = stream


class Part(NamedTuple):
    """One file of an archive: if it is whole, bytes [start, start + size) of the archive."""

    start: int
    size: int
    path: Path

    @property
    def stop(self) -> int:
        """The first byte of the archive behind it."""
        return self.start + self.size


@dataclass(frozen=True)
class Archive:
    """An archive opened for reading.

    `damages` is what opening it brought up; `frames` all that could be found. `manifest` is None
    and `segments` are empty when the manifest cannot be read or the stream is not what it implies;
    `text` are the exact bytes of the manifest, `delta` tells which files are left out. `media`
    asks for parts that are missing.
    """

    is_stream: ClassVar[bool] = False  # whether it comes once, in its own order

    files: ArchiveFiles
    parts: Tuple[Part, ...]
    frames: Frames
    damages: Tuple[Damage, ...]
    manifest: Optional[Manifest] = None
    text: bytes = b""
    segments: Tuple[Segment, ...] = ()
    delta: Delta = Delta()
    media: Optional[MediaChange] = None

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def stream_size(self) -> int:
        """Bytes of the tar stream in the frames."""
        return self.frames.edges[-1]

    # -- where a frame lies

    def part_of(self, frame: Frame) -> Part:
        """The part that a frame lies on."""
        return part_at(self.parts, frame.offset)

    def files_between(self, start: int, stop: int) -> Tuple[FileRange, ...]:
        """The files, or ranges of them, that lie in [start, stop) of the tar stream."""
        hits: List[FileRange] = []
        for segment in segments_between(self.segments, start, stop):
            if segment.entry is None:
                continue
            first, behind = segment.file_range(start, stop)
            hit = FileRange(segment.entry.path, first, behind - 1)
            hits.append(hit)

        return tuple(hits)

    def damage(self, what: str, number: int) -> Damage:
        """Damage of a frame, counted from 1, with its part and the files it holds."""
        frame = self.frames[number - 1]
        return Damage(
            what,
            frame.offset,
            frame.size,
            frames=(number, number),
            parts=(self.part_of(frame).path.name,),
            files=self.files_between(frame.start, frame.stop),
        )

    # -- what is in it

    def unit(self, frame: Frame) -> bytes:
        """A unit as it lies on the medium, intact. Raises ZstdError that says what is wrong with
        it."""
        try:
            unit = read_parts(self.parts, frame.offset, frame.size, self.media)
        except OSError as exc:
            raise ZstdError(f"cannot be read: {exc.strerror}") from exc

        if len(unit) != frame.size:
            raise ZstdError(MISSING)
        if frame.crc is not None and zlib.crc32(unit) != frame.crc:
            raise ZstdError("CRC-32 differs")

        header = unit_header(frame.size - PZSTD_HEADER.size)
        if not unit.startswith(header):
            raise ZstdError("does not begin with its header")

        return unit

    def decode(self, frame: Frame, decompress: Decompress) -> bytes:
        """The stream bytes in a frame. Raises ZstdError."""
        unit = self.unit(frame)
        zstd_frame = frame_in(unit)
        return decompress(zstd_frame, frame.length)

    def restored(self, frame: Frame, decompress: Decompress) -> Union[bytes, bytearray]:
        """The content of a frame, planes joined. Raises ZstdError."""
        content = self.decode(frame, decompress)
        segment = self._segment_at(frame.start)
        if segment is None or not segment.planes:
            return content

        block_size = segment.planes + 1
        before = frame.start - segment.start
        block_end = min(frame.start + block_size, segment.stop)
        if before % block_size or frame.stop != block_end:
            raise ZstdError("is not one block of planes")

        return join_planes(content)

    def _segment_at(self, start: int) -> Optional[Segment]:
        """The segment that holds a byte of the tar stream, if the segments are known."""
        behind = index_at(self.segments, start + 1)
        if behind == 0:
            return None
        return self.segments[behind - 1]


def part_at(parts: Sequence[Part], offset: int) -> Part:
    """The part that holds a byte of the archive."""
    behind = index_at(parts, offset + 1)
    number = max(behind - 1, 0)
    return parts[number]


def read_parts(
    parts: Sequence[Part], offset: int, size: int, media: Optional[MediaChange] = None
) -> bytes:
    """Bytes of an archive that lie in one part; fewer when the part ends early or is missing, and
    there is no `media` to ask. Raises OSError."""
    part = part_at(parts, offset)
    path = part.path
    if media and not path.exists():
        path = media.wait_for(path)
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        return b""
    try:
        return pread_exactly(fd, size, offset - part.start)
    finally:
        os.close(fd)
