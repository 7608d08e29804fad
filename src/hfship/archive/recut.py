# SPDX-License-Identifier: Apache-2.0
"""Cut an archive into parts, or join its parts, without unpacking it.

Parts are the archive cut between units, so units are copied as they are, and only the tables at the
end, which list the parts, are made anew: the files are, byte for byte, those that pack would have
written in that form. Each unit is proven by its CRC-32 on the way.

A killed run is gone on with: what it wrote is read again and kept as far as its units are right.
Sums come first, then the names, then what was there before goes, if it lies in the same folder.

Promises: at any instant one of the two forms is whole. Never: decodes a frame.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Sequence, Tuple

from hfship.archive.files import ArchiveFiles, archives_in, part_name
from hfship.archive.frames import encode_tail, largest_unit, read_units, tail_size
from hfship.archive.opening import open_archive
from hfship.archive.pack import Packed, is_file_of, require_large_files
from hfship.archive.pack_journal import WrittenPart, claim
from hfship.archive.pack_plan import frame_size_for, most_parts, require_roomy_parts
from hfship.archive.pack_run import require_read_back
from hfship.archive.sidecars import SIDECARS_SIZE, write_sidecars
from hfship.archive.signature import SIGNATURE
from hfship.archive.verify import archive_error
from hfship.archive.zstd import ZstdError
from hfship.base.errors import IntegrityError, UsageError, command_line
from hfship.base.files import (
    INCOMPLETE,
    atomic_write,
    disk_errors,
    free_bytes,
    make_dir,
    pread_exactly,
    pwrite_all,
    rename_durably,
    require_room,
)
from hfship.base.text import shorten
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.frames import Frame
    from hfship.archive.reader import Archive
    from hfship.base.manifest import Manifest
    from hfship.base.progress import Stage
    from hfship.base.report import Reporter


@dataclass(frozen=True)
class RecutOptions:
    """`split` is the bytes of a part, None to join them. `force` replaces another archive of that
    name; `read_back` reads from the medium what was written to it."""

    split: Optional[int]
    force: bool
    read_back: bool = False


@dataclass(frozen=True)
class _Cut:
    """A file to be: its name, the units [first, stop) of the archive, and all of its bytes; `tail`
    are the tables, in the last one."""

    name: str
    first: int
    stop: int
    size: int
    tail: bytes = b""


# -- the cuts


def cut_units(sizes: Sequence[int], split: int) -> List[int]:
    """How many units go into each part: as many as fit.

    >>> cut_units([3, 3, 3, 9, 1], 9)
    [3, 1, 1]
    """
    counts: List[int] = []
    room = 0
    for size in sizes:
        if size > room:
            counts.append(0)
            room = split
        counts[-1] += 1
        room -= size
    return counts


def plan_cuts(archive: Archive, manifest: Manifest, split: Optional[int]) -> List[_Cut]:
    """The files of an archive in the form that pack gives it. Raises UsageError for parts that are
    too small."""
    frames = archive.frames
    name = archive.files.name
    if split is None:
        tail = encode_tail(frames, [frames.size])
        return [_Cut(name, 0, len(frames), frames.size + len(tail), tail)]

    lengths = [frame.length for frame in frames]
    frame_size = max(frame_size_for(manifest.size), *lengths)
    most = most_parts(sum(map(largest_unit, lengths)), split, frame_size)
    require_roomy_parts(split, frame_size, tail_size(len(frames), most))

    sizes = [frame.size for frame in frames]
    counts = cut_units(sizes, split)
    parts: List[Tuple[int, int, int]] = []  # first unit, one behind the last, bytes
    first = 0
    for count in counts:
        stop = first + count
        parts.append((first, stop, sum(sizes[first:stop])))
        first = stop

    _, stop, last = parts[-1]
    if last + tail_size(len(frames), len(parts)) > split:
        parts.append((stop, stop, 0))
    tail = encode_tail(frames, [size for _, _, size in parts])

    cuts = []
    for number, (first, stop, size) in enumerate(parts, 1):
        own = tail if number == len(parts) else b""
        cuts.append(_Cut(part_name(name, number, most), first, stop, size + len(own), own))
    return cuts


# -- the run


def recut(
    files: ArchiveFiles, folders: Sequence[Path], options: RecutOptions, reporter: Reporter
) -> Packed:
    """Write an archive anew, in parts or as one file, into `folders`, one after the other.

    Files of it that lie in one of these folders go when the new ones have their names. Raises
    UsageError for another archive in the way, IntegrityError for damage, InUseError, DiskError.
    """
    started = time.monotonic()
    for folder in folders:
        make_dir(folder)
    archive, manifest = _opened(files, folders, options)
    cuts = plan_cuts(archive, manifest, options.split)
    parts = _parts_there(files, cuts, folders)
    fresh = parts is None
    if parts is None:
        _require_free_names(archive, cuts, folders, options.force)
        _make_room(archive, cuts, folders, options.split)
        lock = folders[0] / (files.name + INCOMPLETE)
        with claim(lock, journal=True) as fd:
            parts = _write_all(archive, cuts, folders, options, reporter)
            _publish(archive, parts, folders)
            if options.split is not None:
                os.ftruncate(fd, 0)  # else it is the archive

    _remove_others(files.name, parts, folders)
    for folder in folders:
        write_sidecars(folder, reporter)
        _copy_signature(files, folder)
    seconds = time.monotonic() - started
    return Packed(manifest, parts, seconds, fresh)


def _opened(
    files: ArchiveFiles, folders: Sequence[Path], options: RecutOptions
) -> Tuple[Archive, Manifest]:
    """An archive without known damage, and its manifest; where a killed run had begun to remove the
    old form, the new one. Raises IntegrityError."""
    try:
        archive = open_archive(files)
        if archive.damages or not archive.manifest:
            verify = command_line("hfship", "verify", files.path)
            raise archive_error(archive, archive.damages, verify)
    except IntegrityError:
        there = _finished(files, folders, options)
        if there is None or not there.manifest:
            raise
        archive = there

    assert archive.manifest
    return archive, archive.manifest


def _finished(
    files: ArchiveFiles, folders: Sequence[Path], options: RecutOptions
) -> Optional[Archive]:
    """The new form, of which the sums tell, where what is left of the old one is a piece of it."""
    wants_parts = options.split is not None
    for folder in folders:
        for other in archives_in(folder):
            if other.name != files.name or bool(other.numbers) != wants_parts:
                continue
            if set(other.listed()) != {path.name for path in other.paths}:
                continue
            archive = open_archive(other)
            if not archive.damages and all(_is_piece_of(path, archive) for path in files.paths):
                return archive
    return None


def _is_piece_of(path: Path, archive: Archive) -> bool:
    """Whether a file begins with a unit of an archive, or holds none."""
    with disk_errors("read", path), path.open("rb") as stream:
        unit, length = next(read_units(stream))
    if length < 0:
        return True
    crc = zlib.crc32(unit)
    return any(frame.crc == crc and frame.size == len(unit) for frame in archive.frames)


def _parts_there(
    files: ArchiveFiles, cuts: Sequence[_Cut], folders: Sequence[Path]
) -> Optional[Tuple[WrittenPart, ...]]:
    """The files that are wanted, if all are there and listed in the sums beside them."""
    listed = ArchiveFiles(folders[0], files.name, {}).listed()
    if set(listed) != {cut.name for cut in cuts}:
        return None

    parts = []
    for cut in cuts:
        path = _place_of(cut.name, folders)
        if path is None or path.stat().st_size != cut.size:
            return None
        parts.append(WrittenPart(path, cut.size, listed[cut.name]))
    return tuple(parts)


def _place_of(name: str, folders: Sequence[Path]) -> Optional[Path]:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    return None


def _require_free_names(
    archive: Archive, cuts: Sequence[_Cut], folders: Sequence[Path], force: bool
) -> None:
    """Refuse to write over what is read, and to replace files of another archive of that name.
    Raises UsageError."""
    names = {cut.name for cut in cuts}
    targets = {(folder / name).resolve() for folder in folders for name in names}
    for path in archive.files.paths:
        if path.resolve() in targets:
            what = f"{path} would be written while it is read"
            raise UsageError(what, "the new parts have the names of the old ones", "give -o DIR")

    in_the_way: List[str] = []
    for folder in folders:
        in_the_way += _others_in(folder, archive, cuts)
    if in_the_way and not force:
        what = f"{in_the_way[0]} is there already"
        why = f"another archive would be replaced: {shorten(in_the_way)}"
        raise UsageError(what, why, "give --force to replace it, or another folder with -o DIR")


def _others_in(folder: Path, archive: Archive, cuts: Sequence[_Cut]) -> List[str]:
    """Files of another archive of that name: neither those that are read, nor what a killed run
    had named."""
    name = archive.files.name
    known = {path.resolve() for path in archive.files.paths}
    listed = ArchiveFiles(folder, name, {}).listed()
    sizes = {cut.name: cut.size for cut in cuts}
    others = []
    for path in sorted(folder.iterdir()):
        if not is_file_of(path, name) or path.resolve() in known:
            continue
        ours = path.name in listed and path.stat().st_size == sizes.get(path.name)
        if not ours:
            others.append(str(path))
    return others


def _make_room(
    archive: Archive, cuts: Sequence[_Cut], folders: Sequence[Path], split: Optional[int]
) -> None:
    """Refuse, before the first byte, what finds no room. Raises DiskError."""
    what = f"{'join' if split is None else 'split'} {archive.files.name}"
    largest = max(cut.size for cut in cuts)
    for folder in folders:
        require_large_files(folder, largest, what)
    written = 0
    for cut in cuts:
        path = _place_of(cut.name + INCOMPLETE, folders)
        if path:
            written += min(path.stat().st_size, cut.size)
    elsewhere = sum(max(free_bytes(folder) - SIDECARS_SIZE, 0) for folder in folders[1:])
    needed = sum(cut.size for cut in cuts) - written - elsewhere
    step = "free space, or choose another folder with -o or --to"
    require_room(folders[0], needed, largest, what, step)


# -- the bytes


def _write_all(
    archive: Archive,
    cuts: Sequence[_Cut],
    folders: Sequence[Path],
    options: RecutOptions,
    reporter: Reporter,
) -> Tuple[WrittenPart, ...]:
    parts = []
    name = "join" if options.split is None else "split"
    with reporter.stage(name, sum(cut.size for cut in cuts)) as stage:
        for cut in cuts:
            folder = _folder_for(cut, folders)
            path = folder / cut.name
            sha256 = _write(archive, cut, path, options.read_back, stage)
            parts.append(WrittenPart(path, cut.size, sha256))
    return tuple(parts)


def _folder_for(cut: _Cut, folders: Sequence[Path]) -> Path:
    """Where a part was begun; else the first folder with room for it, or the last."""
    begun = _place_of(cut.name + INCOMPLETE, folders)
    if not begun:
        begun = _place_of(cut.name, folders)
    if begun:
        return begun.parent
    for folder in folders:
        if free_bytes(folder) > cut.size + SIDECARS_SIZE:
            return folder
    return folders[-1]


def _write(archive: Archive, cut: _Cut, path: Path, read_back: bool, stage: Stage) -> str:
    """Write a file under its name and .incomplete, durably. Returns its SHA-256."""
    unfinished = path.with_name(path.name + INCOMPLETE)
    digest = hashlib.sha256()
    frames = archive.frames[cut.first : cut.stop]
    with _writable(unfinished, path) as fd:
        kept = _keep_right_units(fd, frames, digest)
        offset = sum(frame.size for frame in frames[:kept])
        stage.skip(offset)
        with disk_errors("write", unfinished):
            os.ftruncate(fd, offset)
            for frame in frames[kept:]:
                unit = _proven_unit(archive, frame)
                pwrite_all(fd, unit, offset)
                digest.update(unit)
                offset += len(unit)
                stage.add(len(unit))
            pwrite_all(fd, cut.tail, offset)
            digest.update(cut.tail)
            stage.add(len(cut.tail))
            os.fsync(fd)
            sha256 = digest.hexdigest()
            if read_back:
                require_read_back(unfinished, fd, sha256)
    return sha256


@contextlib.contextmanager
def _writable(unfinished: Path, path: Path) -> Iterator[int]:
    """A file to write, with what an earlier run wrote of it; also one that it had named already."""
    with disk_errors("create", unfinished):
        if path.is_file() and not path.is_symlink() and not unfinished.exists():
            os.replace(path, unfinished)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        fd = os.open(unfinished, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _keep_right_units(fd: int, frames: Sequence[Frame], digest: Any) -> int:
    """How many units an earlier run wrote right, from the beginning; `digest` gets their bytes."""
    offset = 0
    for number, frame in enumerate(frames):
        unit = pread_exactly(fd, frame.size, offset)
        if len(unit) != frame.size or zlib.crc32(unit) != frame.crc:
            return number
        digest.update(unit)
        offset += frame.size
    return len(frames)


def _proven_unit(archive: Archive, frame: Frame) -> bytes:
    """A unit as it lies in the archive. Raises IntegrityError."""
    try:
        return archive.unit(frame)
    except ZstdError as exc:
        path = archive.part_of(frame).path
        what = f"{path} is damaged"
        why = f"bytes {frame.offset}-{frame.offset + frame.size - 1} of the archive: {exc}"
        verify = command_line("hfship", "verify", archive.files.path)
        raise IntegrityError(what, why, f"{verify}     # finds all damage") from exc


# -- the names


def _publish(archive: Archive, parts: Sequence[WrittenPart], folders: Sequence[Path]) -> None:
    name = archive.files.name
    sums = "".join(f"{part.sha256}  {part.path.name}\n" for part in parts)
    for folder in folders:
        atomic_write(folder / f"{name}.sha256", sums)
        for part in parts:
            if part.path.parent == folder:
                with disk_errors("rename to", part.path):
                    rename_durably(part.unfinished, part.path)


def _remove_others(name: str, parts: Sequence[WrittenPart], folders: Sequence[Path]) -> None:
    """Remove the old form, and what was replaced, from the folders of the new one."""
    kept = {part.path for part in parts}
    for folder in folders:
        with disk_errors("remove from", folder):
            for path in list(folder.iterdir()):
                if is_file_of(path, name) and path not in kept:
                    path.unlink()
            for path in list(folder.glob(f"{name}.*{INCOMPLETE}")):
                path.unlink()  # of a run that was to cut otherwise


def _copy_signature(files: ArchiveFiles, folder: Path) -> None:
    name = files.name + SIGNATURE
    if folder.resolve() == files.folder.resolve():
        return
    with contextlib.suppress(FileNotFoundError):
        atomic_write(folder / name, (files.folder / name).read_bytes())
