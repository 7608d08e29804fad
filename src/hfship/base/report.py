# SPDX-License-Identifier: Apache-2.0
"""Reporting: the one object through which every room speaks.

The Reporter hands each message to its owners: the outputs (base/output), the logs (base/eventlog),
the progress (base/progress), the state of the run (base/runstate) and the secrets
(base/redaction). Promises: results go to stdout, all else to stderr; nothing that is said has a
secret in it. Never: prints itself.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Protocol, Type

from hfship.base.errors import error_fields, error_row
from hfship.base.eventlog import EventLog
from hfship.base.output import Output
from hfship.base.progress import PLAIN_INTERVAL_S, Clock, ProgressDisplay, Stage
from hfship.base.redaction import Redactor
from hfship.base.runstate import JsonResults, RunState
from hfship.base.text import utc

if TYPE_CHECKING:
    from hfship.base.errors import HfshipError


class Result(Protocol):
    """What a command found or did for one of its subjects; usually a frozen dataclass."""

    def text(self) -> str:
        """The result for people, without a line break at its end; "" when that has been said."""

    def json(self) -> Dict[str, Any]:
        """The result for --json, without "schema": docs/json.md."""


class FailedResult:
    """The result for a subject whose error was reported by itself: among the results of --json."""

    def __init__(self, error: HfshipError, name: str = "") -> None:
        self.error = error
        self.name = name

    def text(self) -> str:
        """Nothing: the error was said on stderr."""
        return ""

    def json(self) -> Dict[str, Any]:
        """The error, after the name of its subject where there is one."""
        row = error_row(self.error)
        if self.name:
            return {"name": self.name, **row}
        return row


class Reporter:
    """Everything hfship says: results to `out`, the rest to `err`, all of it redacted.

    progress: "auto" (bar on a terminal, plain lines elsewhere), "bar", "plain", "json" or "none".
    verbosity: -1 errors and warnings only, 0 normal, 1 details.
    """

    def __init__(
        self,
        progress: str = "auto",
        verbosity: int = 0,
        out: Optional[IO[str]] = None,
        err: Optional[IO[str]] = None,
        as_json: bool = False,
    ) -> None:
        self.run = RunState()
        self._redactor = Redactor()
        self._output = Output(out, err, self._redactor)
        self._progress = ProgressDisplay(self._output)
        self._logs = EventLog()
        self._json = JsonResults()
        self.adjust(progress, verbosity, as_json)

    def adjust(
        self, progress: str, verbosity: int, as_json: bool = False, schema: str = ""
    ) -> None:
        """Speak as the command line asks; `schema` is that of the JSON results."""
        self._progress.set_mode(progress)
        self._output.verbosity = verbosity
        self._json.wanted = as_json
        self._json.schema = schema

    def set_colour(self, mode: str) -> None:
        """Colour states as --color says: auto, always or never."""
        self._output.set_colour(mode)

    def leave_terminal(self) -> None:
        """Draw nothing any more, in a process that goes on in the background."""
        self._progress.leave_terminal()

    # -- what is asked of it

    @property
    def out(self) -> IO[str]:
        """The stream of the results."""
        return self._output.out

    @property
    def err(self) -> IO[str]:
        """The stream of all else."""
        return self._output.err

    @property
    def width(self) -> int:
        """Characters that a line of results may have."""
        return self._output.width

    @property
    def verbosity(self) -> int:
        """-1, 0 or 1."""
        return self._output.verbosity

    @property
    def sends_events(self) -> bool:
        """Are there JSON events instead of lines for people?"""
        return self._progress.mode == "json"

    @property
    def draws_bars(self) -> bool:
        """Is progress shown as bars, which stay when they are full?"""
        return self._progress.mode == "bar"

    @property
    def schema(self) -> str:
        """The schema of the JSON results."""
        return self._json.schema

    @property
    def gathers(self) -> bool:
        """Are JSON results gathered for a list of runs?"""
        return self._json.gathered is not None

    # -- secrets

    def hide(self, secret: str) -> None:
        """Register a secret: *** replaces it in all that is said, also as it looks in a URL."""
        self._redactor.hide(secret)

    def redacted(self, value: Any) -> Any:
        """A value as it may be shown, with every text in it redacted."""
        return self._redactor.value(value)

    # -- logs

    def open_log(self, path: Path, form: str) -> None:
        """Write a log from now on, what was said so far included. Raises OSError."""
        self._logs.open(path, form, self.run.job)

    def log(self, level: str, message: str, **details: Any) -> None:
        """An event for the logs alone.

        `details` are for JSON, but for `rows`, each of which is a line of its own.
        """
        event = {
            "time": utc(),
            "level": level,
            "job": self.run.job,
            "stage": self.run.doing,
            "message": message,
            **details,
        }
        troubles = self._logs.write(self.redacted(event))
        for path, why in troubles.items():
            self.say(f"warning: cannot write the log {path}: {why}; the work goes on without it")

    def log_progress(self, stage: Stage) -> None:
        """How far a stage is, for the logs, whose lines have the name of the stage already."""
        self.log("info", stage.amounts(), **stage.counts)

    # -- results

    def show(self, text: str) -> None:
        """A part of the result that is not worth a log, to stdout.

        Raises ReaderGone when its reader has gone, DiskError for what else cannot be written.
        """
        self._output.show(text)

    def result(self, text: str, fit: bool = False) -> None:
        """A result of the command, to stdout; with `fit`, broken between words on a terminal."""
        self.run.results.append(text.partition("\n")[0])
        self.log("result", text)
        self._output.result(text, fit)

    def reveal(self, secret: str, value: Mapping[str, Any]) -> None:
        """A secret that is shown this once, as it is: alone, or with --json within `value`, which
        has it, too. Logs never have it."""
        if self._json.wanted:
            value = self._json.with_schema(dict(value))
            self._json.printed = True
            secret = json.dumps(value, indent=2)
        self._output.reveal(secret)

    def result_of(self, text: str, value: object) -> None:
        """A result that has both forms; --json chooses."""
        if self._json.wanted:
            self.result_json(value)
        else:
            self.result(text, fit=True)

    def result_json(self, value: object) -> None:
        """A JSON result, to stdout: an object or a list of them, each with its schema.

        Within `gather_results` lists become part of one list.
        """
        if isinstance(value, list):
            rows = self.with_schema(value)
            if self._json.gathered is not None:
                self._json.gathered += rows
                return
            self._print_json(rows)
        else:
            self._print_json(self.with_schema([value])[0])

    def _print_json(self, result: object) -> None:
        self.log("result", json.dumps(result, ensure_ascii=False))
        self._output.json_result(result)
        self._json.printed = True

    def with_schema(self, rows: List[Any]) -> List[Dict[str, Any]]:
        """Rows of JSON results as they are printed: redacted, each with the name of its schema."""
        return [self._json.with_schema(self.redacted(row)) for row in rows]

    @contextlib.contextmanager
    def gather_results(self) -> Iterator[List[Dict[str, Any]]]:
        """Gather the JSON results of several runs, and print them as one list at the end.

        The list that it gives may be appended to. Within another one it is that one.
        """
        outer = self._json.gathered
        if outer is not None:
            yield outer
            return
        gathered: List[Dict[str, Any]] = []
        self._json.gathered = gathered
        try:
            yield gathered
        finally:
            self._json.gathered = None
            if gathered and self._json.wanted:
                self.result_json(gathered)

    # -- messages

    def detail(self, text: str) -> None:
        """Something that --verbose asks for."""
        if self.verbosity > 0:
            self._message("info", text)

    def info(self, text: str) -> None:
        """Something that --quiet does without."""
        if self.verbosity >= 0:
            self._message("info", text)

    def warn(self, text: str) -> None:
        """Something that should be looked at."""
        self._message("warning", "warning: " + text)

    @contextlib.contextmanager
    def about(self, model: str, number: int, count: int) -> Iterator[None]:
        """Work on one model of a list: each line that is said in between names it."""
        before = self.run.model, self.run.model_number
        self.run.model, self.run.model_number = model, f"{number}/{count}"
        try:
            yield
        finally:
            self.run.model, self.run.model_number = before

    def _naming(self, text: str, start: str = "") -> str:
        """A text with the name of the model that it is about, behind its `start`; as it is where
        it has the name already, or there is but one model."""
        model = self.run.model
        named = re.search(rf"(?<![\w.-]){re.escape(model)}(?![\w-])", text)
        if not model or named or not text.startswith(start):
            return text
        return f"{start}{model}: {text[len(start) :]}"

    def _message(self, level: str, text: str) -> None:
        text = self._naming(text, "warning: " if level == "warning" else "")
        self.log(level, text)
        self.say(text, level)

    def say(self, text: str, level: str = "info") -> None:
        """Something for people, that no log needs."""
        self._progress.say(text, level)

    def event(self, kind: str, **fields: object) -> None:
        """One JSON line to stderr, where --progress json asked for events."""
        self._progress.event(kind, **fields)

    # -- errors

    def error(self, error: HfshipError) -> None:
        """Print an error; with JSON events as an event that carries its exit code."""
        self.run.failure = error
        fields = {**error_fields(error), "exit_code": int(error.code)}
        text = self._naming(error.text(), "hfship: ")
        self.log("error", text, **fields)
        if self.sends_events:
            self.event("error", **fields)
        else:
            self.say(text)

    def failed(self, error: HfshipError) -> None:
        """Print the error that ends the command; with --json also as its result if it has none."""
        self.error(error)
        if self._json.wanted and not self._json.printed:
            self.result_json(error_row(error))

    def bug(self, kind: Type[BaseException], exc: BaseException, trace: Any) -> None:
        """Print an exception that nobody foresaw as Python does, but without secrets.

        A `sys.excepthook`.
        """
        import traceback

        lines = traceback.format_exception(kind, exc, trace)
        self._output.err.write(self.redacted("".join(lines)))

    # -- progress

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str = "B") -> Iterator[Stage]:
        """A step with progress; without a `total` there is nothing to do, and nothing to report."""
        model = f"{self.run.model_number} {self.run.model}".strip()
        stage = Stage(name, total, unit, model)
        if total:
            self.run.begin_stage(stage)
        try:
            with self._progress.watching(stage):
                yield stage
        finally:
            stage.stop_clock()
            if total:
                self.log_progress(stage)
                self.run.end_stage(stage)

    def enter_phase(self, name: str, phase: str) -> None:
        """What `name` does now, where no amount is known."""
        self.run.begin_phase(phase)
        self.info(f"{name}: {phase}")
        self.event("phase", name=name, phase=phase)

    def countdown(self, seconds: float) -> None:
        """Show how long is still to be waited; called once a second, and with 0 at the end."""
        left = round(seconds)
        if self._progress.mode != "plain":
            self._progress.countdown(left)
        elif left and left % PLAIN_INTERVAL_S == 0:
            self.info(f"still waiting, {left} s left")

    @contextlib.contextmanager
    def clock(self, doing: str, limit_s: float = 0) -> Iterator[Clock]:
        """Wait for something: a clock ticks on a terminal, elsewhere there is a line from time to
        time. `doing` says for what, and may be changed in the clock; `limit_s` 0: without limit."""
        clock = Clock(doing, limit_s)
        with self._progress.ticking(clock):
            yield clock

    # -- the run

    def name_job(self, name: str) -> None:
        """Give the run its name, which every event in the logs has from now on."""
        self.run.job = name

    def then(self, command: str, subject: object) -> None:
        """What comes after a success: a command, for all subjects that it is said of."""
        self.run.add_next(command, str(subject))

    def then_elsewhere(self, *words: str) -> None:
        """What comes after a success: a command that is not ours, or that needs more words."""
        self.run.next_words = words
