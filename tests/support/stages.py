# SPDX-License-Identifier: Apache-2.0
"""A reporter that keeps what it is told: its stages, and what is said beside them."""

from __future__ import annotations

import contextlib
from typing import Iterator, List, Tuple

from hfship.base.progress import Stage


class KeptStages:
    """Stands for a Reporter where stages and infos are all that is asked of it."""

    def __init__(self) -> None:
        self.shown: List[Tuple[str, int, int]] = []  # name, size, and what was done at the end
        self.said: List[str] = []

    @contextlib.contextmanager
    def stage(self, name: str, size: int) -> Iterator[Stage]:
        """A stage, which is kept when it ends well."""
        made = Stage(name, size)
        yield made
        self.shown.append((name, size, made.done))

    def info(self, text: str) -> None:
        self.said.append(text)
