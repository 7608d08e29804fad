# SPDX-License-Identifier: Apache-2.0
"""An archive that comes through a pipe: read once, from its beginning, tables last.

Owns how such an archive is opened and how its frames become known. Promises: it is proven as one
on a disk is, by its frames and files first and by its tables in the end.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import zlib
from itertools import chain, repeat, tee
from typing import IO, TYPE_CHECKING, ClassVar, Dict, Iterator, List, Sequence, Tuple

from hfship.archive.damage import Damage
from hfship.archive.files import SUM_LINE
from hfship.archive.frames import (
    Frames,
    announced_tail_size,
    decode_tail,
    frame_in,
    read_units,
    tail_size,
    unit_header,
)
from hfship.archive.layout import read_leading, stream_layout
from hfship.archive.reader import Archive, ForeignArchive, Part
from hfship.archive.streams import pieces_of, stream_of
from hfship.archive.zstd import ZstdError, load_zstd
from hfship.base.errors import IncompleteError
from hfship.base.values import dataclass, field

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.frames import Frame


@dataclass(frozen=True)
class Streamed(Archive):
    """An archive that comes as a stream: `units` (see read_units) brings its frames, which become
    known as they come; `held` are the units that wait to be decoded, by their offset."""

    is_stream: ClassVar[bool] = True

    units: Iterator[Tuple[bytes, int]] = iter(())
    held: Dict[int, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the units that came so far."""
        return self.frames.size

    def frames_to_come(self, tail: List[bytes]) -> Iterator[Tuple[int, Frame]]:
        """All frames, numbered from 1; then the tables are in `tail`, unless the stream ends early.

        The unit of each is held until `unit` is called for it.
        """
        # ValueError: a unit is cut or out of bounds, so no further one can be found.
        with contextlib.suppress(ValueError):
            for unit, length in self.units:
                if length < 0:
                    tail.append(unit)
                    return
                self.held[self.frames.size] = unit
                crc = zlib.crc32(unit)
                self.frames.append(len(unit), length, crc)
                yield len(self.frames), self.frames[-1]

    def unit(self, frame: Frame) -> bytes:
        """The unit of a frame, once: it is not held any more."""
        return self.held.pop(frame.offset)

    def check_tables(self, tail: Sequence[bytes]) -> List[Damage]:
        """What is wrong with the tables, or with the frames according to them. `tail` is what
        `frames_to_come` left. Raises IncompleteError when the tables did not come."""
        end = self.size
        tables = b"".join(tail)
        size = announced_tail_size(tables)
        if size is None:
            size = tail_size(len(self.frames), 1)
        if len(tables) < size:
            raise IncompleteError(
                "the archive on standard input ended too early: "
                f"no frame is whole from byte {end} on",
                "what sends it was stopped, or lost its connection",
                "send it again: files that are complete are kept",
            )

        try:
            index = decode_tail(tables[:size])
        except (ValueError, struct.error):
            return [Damage("neither a frame nor intact tables", end, len(tables))]

        following = tables[size:]
        # `cat NAME.tar.zst.*` sends NAME.tar.zst.sha256, too.
        if following and not SUM_LINE.match(following.decode("ascii", "replace")):
            return [Damage("something else follows the archive", end + size, len(following))]

        return self._compare(index.frames)

    def _compare(self, known: Frames) -> List[Damage]:
        """What is wrong with the frames that came, as the tables know them."""
        damages = []
        pairs = zip(self.frames, chain(known, repeat(None)))
        for number, (frame, expected) in enumerate(pairs, 1):
            if frame != expected:
                damage = self.damage("CRC-32 differs", number)
                damages.append(damage)

        if not damages and len(known) != len(self.frames):
            damages.append(Damage("frames are missing", self.size))
        return damages


def open_stream(files: ArchiveFiles, stream: IO[bytes]) -> Streamed:
    """The archive that comes as a stream. Raises ForeignArchive when it does not begin like one,
    IncompleteError when nothing comes."""
    # Three readers: of the first bytes, of the units, and of all again, if it is not ours.
    for_head, for_units, for_others = tee(pieces_of(stream), 3)
    head = stream_of(for_head).read(8)
    if not head:
        raise IncompleteError(
            "nothing came through the pipe", "", "look at what the sending command said"
        )

    units = read_units(stream_of(for_units))
    read: List[Tuple[bytes, int]] = []
    try:
        if head != unit_header(0)[:8]:
            raise ValueError("no unit of ours begins here")
        leading = read_leading(_decoded(units, read), "the manifest in the stream")
        segments = stream_layout(*leading)
    except (ValueError, ZstdError) as exc:
        raise ForeignArchive(files, stream_of(for_others)) from exc

    return Streamed(
        files,
        parts=(Part(0, sys.maxsize, files.path),),
        frames=Frames(),
        damages=(),
        manifest=leading.manifest,
        text=leading.text,
        segments=segments,
        delta=leading.parsed_delta(),
        units=chain(read, units),
    )


def _decoded(units: Iterator[Tuple[bytes, int]], read: List[Tuple[bytes, int]]) -> Iterator[bytes]:
    """The content of units, one after the other; what was taken of `units` is added to `read`."""
    decompress = load_zstd().decompressor()
    for unit, length in units:
        read.append((unit, length))
        if length < 0:
            return
        yield decompress(frame_in(unit), length)
