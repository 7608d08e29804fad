# SPDX-License-Identifier: Apache-2.0
"""Prove an archive, and say what is damaged and what to do about it.

Promises: every bit of the archive is checked; damage is located, and the rest is checked
nevertheless. Never: writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Sequence, Set, Tuple

from hfship.archive.check import checker_of
from hfship.archive.damage import MISSING, NOT_OURS, Damage
from hfship.archive.files import STDIN
from hfship.archive.stream_check import Sink
from hfship.base.errors import IntegrityError
from hfship.base.files import sha256_file
from hfship.base.text import counted, shorten

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.reader import Archive
    from hfship.base.report import Reporter


DAMAGES_SHOWN = 20


def verify_archive(
    archive: Archive, jobs: int, reporter: Reporter, quick: bool = False
) -> List[Damage]:
    """Prove an archive: every frame, every file, and that nothing else is in it. Needs no space.

    With `quick` only the checksums of frames and tables, some five times as fast.
    """
    check = checker_of(archive)(archive, Sink(), jobs, quick=quick)
    with reporter.stage("verify", check.size) as stage:
        return check.run(stage)


class DamageError(IntegrityError):
    """Damage that was looked for, and located."""

    def __init__(self, what: str, damages: Sequence[Damage], next_step: str) -> None:
        places = [damage.text() for damage in damages]
        super().__init__(what, shorten(places, DAMAGES_SHOWN, "\n"), next_step)
        self.damages = damages


def archive_error(archive: Archive, damages: Sequence[Damage], again: str) -> DamageError:
    """The damage of an archive; `again` is the command to run after the repair."""
    what = _headline(archive.files, damages)
    return DamageError(what, damages, _how_to_repair(archive, damages, again))


def _headline(files: ArchiveFiles, damages: Sequence[Damage]) -> str:
    """Which files are damaged: of an archive in parts the bad ones."""
    damaged, not_ours = _bad_parts(damages)
    names = sorted(damaged) or sorted(not_ours)
    subject = str(files.place)
    if files.numbers and names:
        folders = {path.name: path.parent for path in files.paths}
        places = [str(folders.get(name, files.folder) / name) for name in names]
        subject = shorten(places)

    verb = "is" if len(names) < 2 else "are"
    if damages and all(damage.what == MISSING for damage in damages):
        return f"{subject} {verb} missing"
    return f"{subject} {verb} damaged in {counted(len(damages), 'place')}"


def _bad_parts(damages: Sequence[Damage]) -> Tuple[Set[str], Set[str]]:
    """The names of parts that are damaged, and of those that are not of this archive."""
    not_ours: Set[str] = set()
    damaged: Set[str] = set()
    for damage in damages:
        damaged.update(damage.parts)
        if damage.what == NOT_OURS:
            not_ours.update(damage.parts)
    return damaged - not_ours, not_ours


def _how_to_repair(archive: Archive, damages: Sequence[Damage], again: str) -> str:
    if archive.files.name == STDIN:
        copies = "send it again, from another copy if it stays damaged"
        return f"{copies}: cat NAME.tar.zst* | {again}"

    damaged, not_ours = _bad_parts(damages)
    folder = archive.files.folder
    steps = []
    if damaged:
        steps.append(f"copy {shorten(sorted(damaged))} again into {folder}")
    if not_ours:
        steps.append(f"remove {shorten(sorted(not_ours))} from {folder}")
    if not steps:
        made_so = "no bytes are damaged, the archive was made so"
        return f"{made_so}: pack the model again where it came from"

    return ", ".join([*steps, f"then: {again}"])


def require_sums(files: ArchiveFiles) -> str:
    """Prove files by NAME.tar.zst.sha256.

    Returns that for the end of a sentence, "" when none of them is listed. Raises IntegrityError.
    """
    listed = files.listed()
    known = [path for path in files.paths if path.name in listed]
    wrong = []
    for path in known:
        if sha256_file(path) != listed[path.name]:
            wrong.append(path.name)
    if wrong:
        names = shorten(wrong)
        what = f"{files.path} is damaged"
        why = f"other than {files.sums} says: {names}"
        raise IntegrityError(what, why, f"copy {names} again")
    if not known:
        return ""
    return f"; as {files.sums.name} says"
