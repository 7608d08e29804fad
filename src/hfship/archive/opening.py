# SPDX-License-Identifier: Apache-2.0
"""From the files of an archive to its frames and its manifest.

Owns how damage of the tables, of the beginning and of whole parts is survived: whatever can still
be found is, and the rest is told as damage.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, List, Optional, Tuple

from hfship.archive.damage import MISSING, NOT_OURS, Damage
from hfship.archive.files import STDIN, read_index
from hfship.archive.frames import UNIT_HEAD_SIZE, Frames, unit_at
from hfship.archive.layout import read_leading, stream_layout
from hfship.archive.reader import Archive, ForeignArchive, Part, read_parts
from hfship.archive.streams import pieces_of_files, stream_of
from hfship.archive.zstd import ZstdError, load_zstd
from hfship.base.errors import IntegrityError
from hfship.base.values import replace

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.frames import Index
    from hfship.archive.media import MediaChange

_PARTS_SHOWN = 20  # of those that are missing


def open_archive(files: ArchiveFiles, media: Optional[MediaChange] = None) -> Archive:
    """Find all frames and the manifest of an archive, by its tables or, if these are damaged, by
    walking it. With `media`, parts that are missing are waited for when they are needed.

    Raises ForeignArchive when nothing tells that hfship made it, and IntegrityError when parts are
    missing that only the tables could have told about. All else that is wrong is in `damages`.
    """
    if files.name == STDIN:
        from hfship.archive.pipe import open_stream  # few archives come through a pipe

        return open_stream(files, open(0, "rb", buffering=0, closefd=False))

    index = read_index(files)
    if index is None:
        _require_all_parts(files)
        archive = _with_manifest(walked_archive(files))
        if not archive.manifest:
            raise ForeignArchive(files, stream_of(pieces_of_files(files.paths)))
        return archive

    archive = indexed_archive(files, index)
    if media:
        archive = replace(archive, media=media, damages=())
    return _with_manifest(archive)


# -- the frames


def indexed_archive(files: ArchiveFiles, index: Index) -> Archive:
    """An archive whose tables are known."""
    sizes = index.part_sizes
    if not files.numbers:  # parts that were put together
        sizes = (sum(sizes),)
    paths = [files.part(number) for number in range(1, len(sizes) + 1)]
    parts = _parts_in_a_row(zip(paths, sizes))

    damages = []
    for part in parts:
        what = _wrong_with(part)
        if what:
            damage = Damage(
                what,
                part.start,
                part.size,
                parts=(part.path.name,),
            )
            damages.append(damage)

    for number, path in sorted(files.numbers.items()):
        if number > len(sizes):
            damage = Damage(NOT_OURS, parts=(path.name,))
            damages.append(damage)

    return Archive(files, tuple(parts), index.frames, tuple(damages))


def _parts_in_a_row(files: Iterable[Tuple[Path, int]]) -> List[Part]:
    """The parts of an archive, from their paths and sizes."""
    parts: List[Part] = []
    start = 0
    for path, size in files:
        parts.append(Part(start, size, path))
        start += size
    return parts


def _wrong_with(part: Part) -> str:
    """What is wrong with the size of a part on disk; empty if nothing is."""
    if not part.path.exists():
        return MISSING
    size = part.path.stat().st_size
    if size != part.size:
        return f"has {size} bytes instead of {part.size}"
    return ""


def walked_archive(files: ArchiveFiles) -> Archive:
    """An archive without its tables: every unit tells where the next one begins."""
    parts = _parts_in_a_row((path, path.stat().st_size) for path in files.paths)
    end = parts[-1].stop

    frames = Frames()
    with contextlib.suppress(ValueError, OSError):  # no further unit can be found
        while frames.size < end:
            head = read_parts(parts, frames.size, UNIT_HEAD_SIZE)
            size, length = unit_at(head)
            if frames.size + size > end:
                break
            frames.append(size, length)

    names = [part.path.name for part in parts if part.stop > frames.size]
    if not names:
        names = [parts[-1].path.name]
    what = "neither a frame nor intact tables"
    damage = Damage(what, frames.size, end - frames.size, parts=tuple(names))
    return Archive(files, tuple(parts), frames, (damage,))


def _require_all_parts(files: ArchiveFiles) -> None:
    """Refuse an archive that lacks parts, by its sums or, without these, by the numbers."""
    present = {path.name for path in files.paths}
    missing = sorted(set(files.listed()) - present)
    number = len(missing)
    if not missing:
        missing = files.missing_parts(_PARTS_SHOWN)
        below = [known for known in files.numbers if known > 0]
        number = max(below, default=0) - len(below)

    if missing:
        names = ", ".join(missing[:_PARTS_SHOWN])
        if number > _PARTS_SHOWN:
            names += f", and {number - _PARTS_SHOWN} more"
        first = f"{missing[0]} is missing"
        if number > 1:
            first = f"{missing[0]} and {number - 1} more are missing"
        raise IntegrityError(
            f"{files.name} is not complete: {first}",
            f"missing in {files.folder}: {names}",
            "copy them again, then run the same command",
        )


# -- the manifest


def _with_manifest(archive: Archive) -> Archive:
    """The archive with its manifest, and the layout of the stream if it is what the manifest
    implies."""
    try:
        leading = read_leading(_decoded(archive), f"the manifest in {archive.files.name}")
        segments = stream_layout(*leading)
    except ZstdError:
        return archive  # the frame is reported when all frames are checked
    except ValueError as exc:
        return _damaged(archive, f"does not begin with a manifest: {exc}")
    except IntegrityError as exc:
        return _damaged(archive, f"{exc.what}: {exc.why}")

    known = replace(
        archive,
        manifest=leading.manifest,
        text=leading.text,
        segments=segments,
        delta=leading.parsed_delta(),
    )
    surplus = archive.stream_size - segments[-1].stop
    if not surplus:
        return known
    if surplus < 0 and archive.frames[0].crc is None:
        return _cut(known)  # without tables, it is the end that is lost

    more = "more" if surplus > 0 else "less"
    what = f"the tar stream has {abs(surplus)} bytes {more} than its manifest implies"
    return _damaged(replace(known, segments=()), what)


def _damaged(archive: Archive, what: str) -> Archive:
    damages = (*archive.damages, Damage(what))
    return replace(archive, damages=damages)


def _cut(archive: Archive) -> Archive:
    """An archive of which only the first frames could be found, with the files that it lacks."""
    end = archive.segments[-1].stop
    lost = archive.files_between(archive.stream_size, end)
    number = len(archive.frames) + 1
    what = f"the archive is cut: frames from number {number} on are missing"
    damage = replace(archive.damages[-1], what=what, files=lost)
    return replace(archive, damages=(damage,))


def _decoded(archive: Archive) -> Iterator[bytes]:
    """The tar stream, frame by frame."""
    decompress = load_zstd().decompressor()
    for frame in archive.frames:
        yield archive.decode(frame, decompress)
