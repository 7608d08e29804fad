# SPDX-License-Identifier: Apache-2.0
"""What is known of this run while it runs: for its record, its summary and its JSON results.

Promises: the Reporter alone writes it; whoever keeps the record of the job reads it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Deque, Dict, List, Optional, Tuple

if TYPE_CHECKING:
    from hfship.base.errors import HfshipError
    from hfship.base.progress import Stage


class RunState:
    """How far this run is, and what came of it so far."""

    def __init__(self) -> None:
        self.job = ""  # its name, once it has one
        self.words: Tuple[str, ...] = ()  # its command line; secrets may be in it
        # Set when the first stage or phase begins: arguments and locks are fine.
        self.working = threading.Event()
        self.phase = ""  # what is done outside stages
        self.model = ""  # of a list, the one that is worked on ...
        self.model_number = ""  # ... and its number, as `2/3`
        self.stages: List[Stage] = []  # under way
        self.past: List[Stage] = []
        self.results: Deque[str] = deque(maxlen=5)  # the first line of each
        self.failure: Optional[HfshipError] = None  # the last
        self.next_words: Tuple[str, ...] = ()  # the command that comes after a success

    @property
    def doing(self) -> str:
        """The name of the stage or phase."""
        if self.stages:
            return self.stages[-1].name
        return self.phase

    def begin_stage(self, stage: Stage) -> None:
        """A stage begins."""
        self.stages.append(stage)
        self.working.set()

    def end_stage(self, stage: Stage) -> None:
        """A stage ended."""
        self.past.append(stage)
        self.stages.remove(stage)

    def begin_phase(self, phase: str) -> None:
        """Something begins whose amount is not known."""
        self.phase = phase
        self.working.set()

    def forget_failure(self) -> None:
        """The next one of a list begins."""
        self.failure = None

    def add_next(self, command: str, subject: str) -> None:
        """Name the command that comes after a success; its subjects add up, and of two commands the
        first one stays."""
        if not self.next_words:
            self.next_words = ("hfship", command)
        if self.next_words[:2] == ("hfship", command) and subject not in self.next_words:
            self.next_words = (*self.next_words, subject)


class JsonResults:
    """The results of --json: whether there are any, and those of a list, gathered."""

    def __init__(self) -> None:
        self.wanted = False
        self.printed = False
        self.schema = ""  # docs/json.md
        self.gathered: Optional[List[Dict[str, Any]]] = None  # while the runs of a list gather them

    def with_schema(self, row: Dict[str, Any]) -> Dict[str, Any]:
        """A row with the name of its schema first, unless it has one of its own."""
        return {"schema": self.schema, **row}
