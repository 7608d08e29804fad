# SPDX-License-Identifier: Apache-2.0
"""NAME/.hfship/consumed: which archives `unpack --consume` removed once NAME was proven.

  JSON {"format": "hfship-consumed/1", "archives": [{"path": absolute path of NAME.tar.zst,
  "sums": hex SHA-256 of NAME.tar.zst.sha256, "" without one}, ...]}

A run that is killed while it removes the last files of an archive, or between that and its end,
leaves nothing else to tell the next run, of the same command, that all is done. Promises: it is
written before the first file is removed for good. Never: believed for more than that; the folder is
proven again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, List, Sequence

from hfship.archive.files import PART_NAME, SUMS_SIZE, ArchiveFiles, find_archives, model_of
from hfship.base.files import WORK_DIR, write_below
from hfship.base.reading import parse_json, read_below, read_small
from hfship.base.values import asdict, dataclass

CONSUMED_PATH = f"{WORK_DIR}/consumed"
CONSUMED_FORMAT = "hfship-consumed/1"
MOST_CONSUMED = 100  # archives of one model


@dataclass(frozen=True)
class ConsumedArchive:
    """An archive that was removed: the absolute path of NAME.tar.zst, and which one it was."""

    path: str
    sums: str

    @property
    def files(self) -> ArchiveFiles:
        """Its files, of which none may be there."""
        path = Path(self.path)
        return ArchiveFiles(path.parent, path.name, {})


@dataclass(frozen=True)
class Consumed:
    """A model folder, and the archive that an earlier run unpacked to it and removed. Files that it
    did not get to are there still, if what is there has the same sums (`is_same`)."""

    folder: Path
    files: ArchiveFiles
    is_same: bool


def note_consumed(folder: Path, before: Path, files: ArchiveFiles) -> None:
    """Write down in a folder that an archive is about to be removed; what was written down in
    `before`, the folder that it replaces, stays known. Raises DiskError."""
    archive = _consumed_archive(files)
    archives = [one for one in consumed_in(before) if one.path != archive.path]
    archives.append(archive)
    fields = {
        "format": CONSUMED_FORMAT,
        "archives": [asdict(one) for one in archives[-MOST_CONSUMED:]],
    }
    write_below(folder, CONSUMED_PATH, json.dumps(fields) + "\n")


def _consumed_archive(files: ArchiveFiles) -> ConsumedArchive:
    sums = ""
    try:
        content = read_small(files.sums, SUMS_SIZE)
        sums = hashlib.sha256(content).hexdigest()
    except OSError:
        pass
    path = os.path.abspath(files.place)
    return ConsumedArchive(path, sums)


def consumed_in(folder: Path) -> List[ConsumedArchive]:
    """The archives that were removed for the model in a folder; none where nothing says so."""
    try:
        fields = parse_json(read_below(folder, CONSUMED_PATH))
        if fields["format"] != CONSUMED_FORMAT:
            return []
        rows = fields["archives"]
        return [_parsed(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _parsed(row: Any) -> ConsumedArchive:
    path = str(row["path"])
    sums = str(row["sums"])
    return ConsumedArchive(path, sums)


def find_consumed(argument: str, places: Sequence[Path], out: Path) -> List[Consumed]:
    """The models in `out` of which the archive that an argument means was removed, or was about to
    be. An archive that is whole is none of these."""
    found = {os.path.abspath(files.place): files for files in find_archives(argument, places)}
    consumed = []
    for folder in _folders_in(out):
        for archive in consumed_in(folder):
            files = found.get(archive.path)
            if not found and _means(argument, Path(archive.path), places):
                files = archive.files  # at most its sums are there
            if files is None or files.is_complete:
                continue
            is_same = archive.sums != "" and archive == _consumed_archive(files)
            if is_same or not found:
                consumed.append(Consumed(folder, files, is_same))

    return consumed


def _folders_in(out: Path) -> List[Path]:
    if not os.path.isdir(out):
        return []
    return sorted(out.iterdir())


def _means(argument: str, archive: Path, places: Sequence[Path]) -> bool:
    """Whether an argument means an archive: by its path or that of a part, by its folder, or by
    the name of its model."""
    path = Path(os.path.abspath(argument))
    if path == archive.parent:
        return True

    part = PART_NAME.match(path.name)
    name = part["archive"] if part else path.name
    folders = [path.parent]
    if "/" not in argument:
        folders += [Path(os.path.abspath(place)) for place in places]
    return name in (archive.name, model_of(archive.name)) and archive.parent in folders
