# SPDX-License-Identifier: Apache-2.0
"""The site's own scanners, run on the files of a model.

Owns how a line of `scan` in [policy] becomes a program: {} in a word stands for the folder, which
comes last where no word has it; no shell reads it. Exit status 0 lets the model pass, any other
refuses it. The first line of `PROGRAM --version` is its version.

Promises: what a scanner said is noted with its version, host and time; a scan that was done
elsewhere is never taken for one that was done here.
"""

from __future__ import annotations

import shlex
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List

from hfship.base.errors import HostError, IntegrityError
from hfship.base.processes import follow_program, run_program
from hfship.base.text import human_seconds, printable
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.base.report import Reporter

VERSION_S = 60.0  # a scanner says its version within that
_LONGEST_WORDS = 500  # characters of its last lines that are kept


@dataclass(frozen=True)
class Scan:
    """What a scanner said: its line in the policy, version, exit status, last words, seconds."""

    command: str
    version: str
    code: int
    words: str
    seconds: float

    def details(self) -> Dict[str, Any]:
        """As it is noted in the log of custody."""
        return {
            "command": self.command,
            "version": self.version,
            "exit": self.code,
            "words": self.words,
            "seconds": round(self.seconds, 1),
        }


def scan_argv(command: str, folder: Path) -> List[str]:
    """The words of a scanner's command line for a folder.

    >>> from pathlib import Path
    >>> scan_argv("clamscan -r --no-summary", Path("/data/my m"))
    ['clamscan', '-r', '--no-summary', '/data/my m']
    >>> scan_argv("check --in={} -q", Path("/data/m"))
    ['check', '--in=/data/m', '-q']
    """
    words = shlex.split(command)
    if not any("{}" in word for word in words[1:]):
        words.append("{}")
    place = str(folder)
    return [words[0], *(word.replace("{}", place) for word in words[1:])]


def scan(command: str, folder: Path, reporter: Reporter) -> Scan:
    """Run one scanner on a folder. Raises IntegrityError where it refuses it, HostError where it
    cannot be run."""
    argv = scan_argv(command, folder)
    version = _version_of(argv[0])
    started = time.monotonic()
    with reporter.clock(f"{argv[0]} looks at {folder}"):
        done = follow_program(argv, threading.Event())
    seconds = time.monotonic() - started
    said = f"{done.out}\n{done.err}".strip()
    found = Scan(command, version, done.code, _last_words(said), seconds)
    if done.ended:
        raise HostError(f"{argv[0]} did not end: {done.ended}", "", "run it by hand")
    if done.code:
        why = f"{version}, exit status {done.code}\n{found.words}"
        step = "look at what it found; [policy] scan names it"
        raise IntegrityError(f"{folder}: {argv[0]} refuses it", why, step)
    reporter.info(f"{folder}: {argv[0]} ({version}) lets it pass, {human_seconds(seconds)}")
    return found


def _version_of(program: str) -> str:
    """The first line that a program says of its version; "version unknown" where it says none."""
    done = run_program([program, "--version"], timeout_s=VERSION_S)
    lines = f"{done.out}\n{done.err}".strip().splitlines()
    if done.code or not lines:
        return "version unknown"
    return printable(lines[0])[:100]


def _last_words(said: str) -> str:
    lines = said.splitlines()
    text = "; ".join(printable(line) for line in lines[-5:])
    return text[-_LONGEST_WORDS:]
