# SPDX-License-Identifier: Apache-2.0
"""Damage: something that is wrong with an archive or a model folder, and where it lies.

Owns how damage is described to people, and when two pieces of it are one. Pure.
"""

from __future__ import annotations

from typing import Iterable, List, NamedTuple, Optional, Tuple

from hfship.base.text import shorten
from hfship.base.values import dataclass

MISSING = "is missing"  # what is said of a part, and of its frames
NOT_OURS = "is not part of this archive"  # what is said of a file with a part's name


class FileRange(NamedTuple):
    """Bytes of a file, from the `first` to the `last`; an empty file has `last` -1."""

    path: str
    first: int
    last: int

    def text(self) -> str:
        """
        >>> FileRange("m/a", 0, 9).text(), FileRange("m/empty", 0, -1).text()
        ('m/a bytes 0-9', 'm/empty')
        """
        empty = self.last < self.first
        if empty:
            return self.path
        return f"{self.path} bytes {self.first}-{self.last}"

    def continues(self, before: FileRange) -> bool:
        """Whether it lies right behind `before`, in the same file."""
        if self.path != before.path:
            return False
        return self.first == before.last + 1


@dataclass(frozen=True)
class Damage:
    """Something wrong: `what` it is, and where in the archive, as far as that is known.

    `offset` and `size` are bytes of the archive; `frames` are the first and the last frame,
    numbered from 1, or empty; `parts` are names of files; `files` is what it hits.
    """

    what: str
    offset: Optional[int] = None
    size: int = 0
    frames: Tuple[int, ...] = ()
    parts: Tuple[str, ...] = ()
    files: Tuple[FileRange, ...] = ()

    def text(self) -> str:
        """One line for a person.

        >>> hits = (FileRange("a", 0, 9), FileRange("b", 0, 3))
        >>> print(Damage("is odd", 12, 30, (1, 1), ("m.tar.zst.0002",), hits).text())
        m.tar.zst.0002, frame 1, bytes 12-41 of the archive: is odd; hits a bytes 0-9, b bytes 0-3
        """
        text = self.what
        where = self._where()
        if where:
            text = f"{', '.join(where)}: {text}"
        if self.files:
            hits = shorten([hit.text() for hit in self.files])
            text += f"; hits {hits}"
        return text

    def _where(self) -> List[str]:
        where = []
        if self.parts:
            where.append(", ".join(self.parts))
        if self.frames:
            first, last = self.frames
            if first == last:
                where.append(f"frame {first}")
            else:
                where.append(f"frames {first}-{last}")

        if self.offset is not None and self.size:
            last_byte = self.offset + self.size - 1
            where.append(f"bytes {self.offset}-{last_byte} of the archive")

        return where

    def continues(self, before: Damage) -> bool:
        """Whether the same is wrong with the frames behind those of `before`."""
        if not self.frames or not before.frames:
            return False
        if self.what != before.what:
            return False
        _, last_before = before.frames
        first, _ = self.frames
        return first == last_before + 1


def merge_adjacent(damages: Iterable[Damage]) -> List[Damage]:
    """Damage in the order of the archive, adjoining frames as one: a bad part is one place, not
    1,000 frames. What has no place in the archive comes last.

    >>> def bad(number):
    ...     hits = (FileRange("a", number, number),)
    ...     return Damage("bad", 9 * number, 9, (number, number), ("p",), hits)
    >>> for damage in merge_adjacent([Damage("odd"), bad(5), bad(2), bad(3)]):
    ...     print(damage.text())
    p, frames 2-3, bytes 18-35 of the archive: bad; hits a bytes 2-3
    p, frame 5, bytes 45-53 of the archive: bad; hits a bytes 5-5
    odd
    """
    merged: List[Damage] = []
    for damage in sorted(damages, key=_place):
        if merged and damage.continues(merged[-1]):
            merged[-1] = _joined(merged[-1], damage)
        else:
            merged.append(damage)
    return merged


def _place(damage: Damage) -> Tuple[bool, int, bool]:
    """The key that sorts damage: by offset, a part before its frames, what has no offset last."""
    if damage.offset is None:
        return True, 0, bool(damage.frames)
    return False, damage.offset, bool(damage.frames)


def _joined(damage: Damage, following: Damage) -> Damage:
    """Two pieces of damage, of which the second continues the first, as one."""
    parts = list(damage.parts)
    for name in following.parts:
        if name not in parts:
            parts.append(name)

    files = list(damage.files)
    for hit in following.files:
        if files and hit.continues(files[-1]):
            files[-1] = FileRange(hit.path, files[-1].first, hit.last)
        else:
            files.append(hit)

    first, _ = damage.frames
    _, last = following.frames
    return Damage(
        damage.what,
        damage.offset,
        damage.size + following.size,
        frames=(first, last),
        parts=tuple(parts),
        files=tuple(files),
    )
