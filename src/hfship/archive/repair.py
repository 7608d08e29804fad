# SPDX-License-Identifier: Apache-2.0
"""Repair of an archive from another copy of it.

Owns what of a damaged archive is replaced, and by what. Promises: only bytes that are damaged or
missing are written, and only after they were proven in the other copy; a killed repair can be run
again. Never: changes the other copy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Tuple

from hfship.archive.files import read_index
from hfship.archive.frames import Frame
from hfship.archive.layout import index_at
from hfship.archive.opening import indexed_archive
from hfship.archive.reader import read_parts
from hfship.archive.verify import verify_archive
from hfship.archive.zstd import ZstdError
from hfship.base.errors import IntegrityError
from hfship.base.files import disk_errors, opened, pwrite_all
from hfship.base.values import replace

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.frames import Index
    from hfship.archive.reader import Archive
    from hfship.base.report import Reporter


def repair_archive(
    files: ArchiveFiles, other: ArchiveFiles, jobs: int, reporter: Reporter
) -> Tuple[ArchiveFiles, int]:
    """Replace damaged frames, missing parts and damaged tables by those of another copy, which
    has the same parts.

    Returns the repaired archive and the bytes that were replaced. Raises IntegrityError where the
    copy cannot help.
    """
    own_index = read_index(files)
    index = _common_index(own_index, files, other)
    source = indexed_archive(other, index)
    archive = replace(indexed_archive(files, index), damages=())
    pieces = _damaged_frames(archive, jobs, reporter)
    if own_index is None:
        pieces.append(_tables_of(archive))
    for piece in pieces:
        content = _read_piece(source, piece, files)
        part = archive.parts[index_at(archive.parts, piece.offset + 1) - 1]
        write_at(part.path, content, piece.offset - part.start)

    for part in archive.parts:
        if part.path.stat().st_size > part.size:
            os.truncate(part.path, part.size)

    repaired = files
    if files.numbers:  # also of the parts that were missing
        numbers = {number: part.path for number, part in enumerate(archive.parts, 1)}
        repaired = replace(files, numbers=numbers)

    return repaired, sum(piece.size for piece in pieces)


def _common_index(ours: Optional[Index], files: ArchiveFiles, other: ArchiveFiles) -> Index:
    """The tables of the other copy, which must be ours as far as ours can be read."""
    theirs = read_index(other)
    if theirs and ours in (None, theirs):
        return theirs

    why = "its tables are damaged"
    if theirs:
        why = "it is another archive, or was packed or cut in another way"
    what = f"{files.path} cannot be repaired from {other.path}"
    raise IntegrityError(what, why, "use another copy")


def _damaged_frames(archive: Archive, jobs: int, reporter: Reporter) -> List[Frame]:
    frames: List[Frame] = []
    for damage in verify_archive(archive, jobs, reporter, quick=True):
        first, last = damage.frames
        frames += archive.frames[first - 1 : last]
    return frames


def _tables_of(archive: Archive) -> Frame:
    """Check frame and seek table, as one piece that holds nothing of the tar stream."""
    start = archive.frames.size
    return Frame(start, archive.size - start, 0, 0)


def _read_piece(source: Archive, piece: Frame, files: ArchiveFiles) -> bytes:
    """A piece of the other copy. Raises IntegrityError if it is damaged there, too."""
    try:
        if piece.length:
            return source.unit(piece)
        return read_parts(source.parts, piece.offset, piece.size)
    except ZstdError as exc:
        where = f"{source.files.path} is damaged where {files.path} is"
        what = f"{where}: frame at byte {piece.offset} {exc}"
        raise IntegrityError(what, "", "use another copy") from exc


def write_at(path: Path, content: bytes, offset: int) -> None:
    """Put bytes into a file, which is made if need be, durably. Raises DiskError."""
    with disk_errors("write", path), opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        pwrite_all(fd, content, offset)
        os.fsync(fd)
