# SPDX-License-Identifier: Apache-2.0
"""Media that are changed while an archive is read: `unpack --wait` asks for the next one.

Owns the waiting: a part is looked for in every folder where parts of the archive were found.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Set

from hfship.archive.files import PART_NAME, read_index
from hfship.base.text import shorten
from hfship.base.values import replace

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.report import Reporter

MEDIA_POLL_S = 0.5


class MediaChange:
    """Asks for the medium with a part that is missing, once, and waits until it is there."""

    def __init__(self, files: ArchiveFiles, reporter: Reporter) -> None:
        self._files = files
        self._reporter = reporter
        self._folders = sorted({path.parent for path in files.paths})
        self._asked: Set[str] = set()  # names of parts

    def look_for(self, path: Path) -> Optional[Path]:
        """Where a part is now; None if it is nowhere."""
        for folder in self._folders:
            found = folder / path.name
            if found.is_file():
                return found
        return None

    def wait_for(self, path: Path) -> Path:
        """Where a part is, as soon as its medium is there."""
        while True:
            found = self.look_for(path)
            if found:
                self._asked.discard(path.name)
                return found
            self._ask_for(path.name)
            time.sleep(MEDIA_POLL_S)

    def _ask_for(self, name: str) -> None:
        if name in self._asked:
            return

        self._asked.add(name)
        places = shorten([str(folder) for folder in self._folders])
        self._reporter.warn(f"waiting for the medium with {name} in {places}")

    def with_tables(self) -> ArchiveFiles:
        """The archive with its last part, which has the tables, and whose name is in the sums."""
        files = self._files
        last = max(files.listed(), default="")
        match = PART_NAME.match(last)
        if match is None or read_index(files):
            return files

        path = self.wait_for(files.folder / last)
        number = int(match["number"])
        return replace(files, numbers={**files.numbers, number: path})
