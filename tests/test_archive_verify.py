# SPDX-License-Identifier: Apache-2.0
"""How damage of an archive is headed; test_media.py and test_unpack.py have whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import pytest

from hfship.archive import verify as room
from hfship.archive.damage import Damage
from hfship.archive.files import ArchiveFiles

FOLDER = Path("/media")
PARTS = ArchiveFiles(
    FOLDER, "m.tar.zst", {1: FOLDER / "m.tar.zst.0001", 2: FOLDER / "m.tar.zst.0002"}
)
WHOLE = ArchiveFiles(FOLDER, "m.tar.zst", {})
FIRST, SECOND = "m.tar.zst.0001", "m.tar.zst.0002"


def gone(*parts: str) -> Damage:
    return Damage(room.MISSING, parts=parts)


def bad(*parts: str) -> Damage:
    return Damage("is odd", 1, 2, parts=parts)


@pytest.mark.parametrize(
    ("files", "damages", "said"),
    [
        (PARTS, [gone(FIRST)], f"/media/{FIRST} is missing"),
        (PARTS, [gone(FIRST), gone(SECOND)], f"/media/{FIRST}, /media/{SECOND} are missing"),
        (PARTS, [bad(FIRST)], f"/media/{FIRST} is damaged in 1 place"),
        (
            PARTS,
            [bad(FIRST), gone(SECOND)],
            f"/media/{FIRST}, /media/{SECOND} are damaged in 2 places",
        ),
        (WHOLE, [Damage("is odd", 1, 2), Damage("is odd", 9, 2)], "is damaged in 2 places"),
    ],
)
def test_the_files_that_are_damaged_are_named(files: Any, damages: List[Damage], said: str) -> None:
    headline = room._headline(files, damages)
    assert headline.endswith(said) and headline.startswith("/media/m.tar.zst")
