# SPDX-License-Identifier: Apache-2.0
"""Which part goes onto which medium, and when.

Media are written at the same time, each at its own speed. Each goes on behind the part that it has,
so a medium holds parts that follow each other, and who unpacks changes media seldom. A disk that
turns, or can be pulled out, takes one part at a time; others as many as there are cores for.

Never: writes; it looks for free room, and for the kind of a disk.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.archive.part_cut import Group
from hfship.archive.sidecars import SIDECARS_SIZE
from hfship.base.files import free_bytes

_DISKS = Path("/sys/dev/block")


class Places:
    """Gives the groups of `left` to `folders`, `width` of them at a time: to one folder in their
    order, to several so that each has groups that follow each other."""

    def __init__(self, folders: Sequence[Path], left: Sequence[Group], width: int) -> None:
        self._folders = folders
        self._left = {group.first: group for group in left}
        self._most = {folder: parts_at_once(folder, width) for folder in folders}
        self.at_once = min(width, len(left), sum(self._most.values()))  # groups, at most
        self._behind: Dict[Path, int] = {}  # folder -> the first frame behind its last part
        self._writing: Dict[int, Path] = {}  # the first frame of a group -> its folder

    def next(self, coming: Mapping[Path, int]) -> Optional[Tuple[Group, Path]]:
        """A group, and the folder it goes to; None while none takes another. `coming` are bytes
        that are still to be written to a folder."""
        if not self._left:
            return None
        for folder in sorted(self._folders, key=self._load):
            if self._load(folder) == self._most[folder]:
                continue
            group = self._next_for(folder)
            if _room(folder, coming) > group.size:
                return self._give(group, folder)

        if self._writing:
            return None  # what is being written may need less than was planned for it
        folder = self.roomiest(coming)
        return self._give(self._next_for(folder), folder)

    def done(self, first: int) -> None:
        """The group that begins with this frame is written."""
        self._writing.pop(first, None)

    def roomiest(self, coming: Mapping[Path, int]) -> Path:
        """The folder with most room."""
        return max(self._folders, key=lambda folder: _room(folder, coming))

    def _load(self, folder: Path) -> int:
        return list(self._writing.values()).count(folder)

    def _give(self, group: Group, folder: Path) -> Tuple[Group, Path]:
        first = group.first
        del self._left[first]
        self._behind[folder] = group.last
        self._writing[first] = folder
        return group, folder

    def _next_for(self, folder: Path) -> Group:
        """The group that follows what a folder has; else one where others come to last."""
        if len(self._folders) == 1:
            return next(iter(self._left.values()))
        following = self._behind.get(folder, 0)
        if following in self._left:
            return self._left[following]

        run = max(self._runs(), key=len)
        leading = run[0]
        if leading.first == 0:
            return leading
        middle = (len(run) - 1) // 2
        return run[middle]

    def _runs(self) -> List[List[Group]]:
        """The groups that are left, as runs of those that follow each other."""
        runs: List[List[Group]] = []
        for first in sorted(self._left):
            group = self._left[first]
            if runs and runs[-1][-1].last == first:
                runs[-1].append(group)
            else:
                runs.append([group])
        return runs


def _room(folder: Path, coming: Mapping[Path, int]) -> int:
    """Bytes of a folder that are free for further parts."""
    return free_bytes(folder) - coming.get(folder, 0) - SIDECARS_SIZE


def parts_at_once(folder: Path, most: int) -> int:
    """How many parts a folder takes at a time: one on a disk that turns or can be pulled out, for
    which many places at once are slow; else `most`."""
    number = os.stat(folder).st_dev
    disk = _DISKS / f"{os.major(number)}:{os.minor(number)}"
    for kind in ("queue/rotational", "../queue/rotational", "removable", "../removable"):
        with contextlib.suppress(OSError):
            if (disk / kind).read_text().strip() == "1":
                return 1
    return most
