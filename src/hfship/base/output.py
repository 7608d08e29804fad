# SPDX-License-Identifier: Apache-2.0
"""The outputs: stdout for results, stderr for all else.

Owns every byte that reaches a terminal or a pipe that stands for one. Promises: secrets that were
registered, and whatever looks like one, never pass; a name that the terminal cannot show, or a
reader that has gone, ends no work; lines for people have their time (UTC) in front where they pile
up, in a pipe or a file. Nothing else in this package prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Dict, Iterator, Mapping, Optional

from hfship.base.errors import DiskError
from hfship.base.text import fitted, harmless, harmless_json

if TYPE_CHECKING:
    from typing import Protocol

    from hfship.base.redaction import Redactor

    class LastLine(Protocol):
        """What stands on the last line of the terminal, below everything that is said: tqdm's
        bar, or a countdown."""

        def clear(self) -> Any:
            """Take it away, for a line that is said."""

        def refresh(self) -> Any:
            """Show it again."""


COLOUR_MODES = ("auto", "always", "never")  # of --color


class ReaderGone(BrokenPipeError):
    """Whoever read our stdout (head, less) has gone: no fault of what we do, unlike any other pipe
    that breaks."""


def silence(fd: int) -> None:
    """Drop what is buffered for an output that takes no more: Python would end with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)


def _encoding_for(stream: io.TextIOWrapper) -> str:
    """UTF-8, but on a terminal of another encoding (GBK, ISO-8859-1) that one."""
    if not (sys.flags.utf8_mode and stream.isatty()):
        return stream.encoding
    import locale

    of_terminal = locale.nl_langinfo(locale.CODESET)
    # The locale C says ASCII of every terminal.
    if not of_terminal or of_terminal.startswith("ANSI_X3.4"):
        return stream.encoding
    return of_terminal


def wants_colour(mode: str, is_terminal: bool, env: Mapping[str, str]) -> bool:
    """Whether an output gets colours, by --color, then NO_COLOR (no-color.org) and TERM.

    >>> wants_colour("auto", True, {}), wants_colour("auto", True, {"NO_COLOR": "1"})
    (True, False)
    >>> wants_colour("always", False, {"NO_COLOR": "1"}), wants_colour("auto", False, {})
    (True, False)
    """
    if mode != "auto":
        return mode == "always"
    if env.get("NO_COLOR") or env.get("TERM") == "dumb":
        return False
    return is_terminal


class Output:
    """stdout and stderr, and how much is said (verbosity).

    verbosity: -1 errors and warnings only, 0 normal, 1 details.
    """

    def __init__(self, out: Optional[IO[str]], err: Optional[IO[str]], redactor: Redactor) -> None:
        closed = io.StringIO()  # for a stream that the caller closed
        self.out = out or sys.stdout or closed
        self.err = err or sys.stderr or closed
        self.verbosity = 0
        self.has_times = not self.err.isatty()  # in front of each line for people
        self._colour_mode = "never"
        self.last_line: Optional[LastLine] = None
        self._redactor = redactor
        self._lock = threading.RLock()
        for stream in (self.out, self.err):
            if not isinstance(stream, io.TextIOWrapper):
                continue
            # A name that the terminal cannot show must not end the work.
            stream.reconfigure(encoding=_encoding_for(stream), errors="backslashreplace")

    @property
    def width(self) -> int:
        """Characters that a line of results may have."""
        if self.out.isatty():
            return shutil.get_terminal_size().columns
        return 1000

    @property
    def err_width(self) -> int:
        """Characters that a line for people may have."""
        if self.err.isatty():
            return shutil.get_terminal_size().columns
        return 1000

    def set_colour(self, mode: str) -> None:
        """Colour states as --color says: auto, always or never."""
        self._colour_mode = mode

    def _coloured(self, text: str, stream: IO[str]) -> str:
        """A text without what steers a terminal, and with our own colours."""
        plain = harmless(text)
        if not wants_colour(self._colour_mode, stream.isatty(), os.environ):
            return plain
        from hfship.base.colours import coloured

        return coloured(plain)

    def show(self, text: str) -> None:
        """Write text to stdout as it is. Raises ReaderGone; DiskError for what else fails."""
        try:
            with self._lock:
                self.out.write(self._redactor.text(text))
                self.out.flush()
        except BrokenPipeError as exc:
            raise ReaderGone(*exc.args) from exc
        except OSError as exc:
            silence(1)
            step = "the work is done; run the same command again to see its result"
            raise DiskError(f"cannot write the result: {exc.strerror}", "", step) from exc

    def result(self, text: str, fit: bool = False) -> None:
        """Write a result to stdout, without what would steer a terminal; with `fit`, broken between
        words. A reader that has gone does not change the exit code."""
        if fit and self.out.isatty():
            text = fitted(text, self.width)
        self._show_line(self._coloured(text, self.out))

    def _show_line(self, line: str) -> None:
        try:
            self.show(line + "\n")
        except ReaderGone:
            silence(1)

    def reveal(self, text: str) -> None:
        """Write a secret to stdout, for which it was asked; nothing of it is replaced."""
        with self._lock:
            self.out.write(text + "\n")
            self.out.flush()

    def json_result(self, value: object) -> None:
        """Write a value as indented JSON to stdout, without what would steer a terminal."""
        encoding = getattr(self.out, "encoding", None) or "utf-8"
        plain_name = encoding.lower().replace("-", "")
        text = json.dumps(
            value,
            indent=2,
            ensure_ascii=plain_name != "utf8",
        )

        self._show_line(harmless_json(text))

    def line(self, text: str) -> None:
        """Write lines for people to stderr."""
        shown = self._redactor.text(text)
        now = ""
        if self.has_times:
            now = time.strftime("%H:%M:%SZ ", time.gmtime())
        if self.err.isatty():
            shown = fitted(shown, self.err_width - len(now))
        shown = self._coloured(shown, self.err)
        self._write_line(now + shown.replace("\n", f"\n{now}"))

    def json_line(self, value: Dict[str, Any]) -> None:
        """Write an object as a line of JSON to stderr."""
        redacted = self._redactor.value(value)
        line = json.dumps(redacted, ensure_ascii=False)
        self._write_line(harmless_json(line))

    def _write_line(self, line: str) -> None:
        with self.terminal():
            if self.last_line is not None:
                self.last_line.clear()
            self.err.write(line + "\n")
            self.err.flush()
            if self.last_line is not None:
                self.last_line.refresh()

    @contextlib.contextmanager
    def terminal(self) -> Iterator[None]:
        """Hold stderr: one thread at a time writes to it. What cannot be written is dropped."""
        with self._lock:
            try:
                yield
                self.err.flush()  # else Python does at its end, and fails there
            except OSError:  # the terminal is closed, or the reader of a pipe has gone
                silence(2)
