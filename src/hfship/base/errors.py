# SPDX-License-Identifier: Apache-2.0
"""Errors and exit codes.

Promises: every failure that an operator can meet is an HfshipError that says what happened, why,
and the exact next command; its class decides the exit code that runbooks act on.

Next steps name commands as `hfship fetch ...`. Where they are shown, `as_typed` puts the name there
under which this program was called.
"""

from __future__ import annotations

import re
import shlex
import sys
from enum import IntEnum
from typing import Any, Dict, Iterable, Optional


class Exit(IntEnum):
    """Exit codes; a contract with runbooks, never renumbered."""

    OK = 0
    USAGE = 2
    INCOMPLETE = 3  # the state is saved: run the same command again
    AUTH = 4
    NOT_FOUND = 5
    INTEGRITY = 6
    DISK = 7
    NETWORK = 8
    HOST = 9  # docker, GPU, image or memory of this machine
    INTERRUPTED = 130


class HfshipError(Exception):
    """A failure as an operator reads it at 3 a.m.: what happened, why, and what to do next."""

    code = Exit.INCOMPLETE

    def __init__(self, what: str, why: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def text(self) -> str:
        """The error as it is printed; `why` and `next` are left out when they are empty.

        >>> why = "~/models has no folder x"
        >>> print(UsageError("no such model: x", why, "hfship fetch ORG/x").text())
        hfship: no such model: x
          why   ~/models has no folder x
          next  hfship fetch ORG/x
        """
        lines = [f"hfship: {self.what}"]
        labelled = {
            "why": self.why,
            "next": as_typed(self.next_step),
        }
        for label, text in labelled.items():
            if not text:
                continue
            indented = text.replace("\n", "\n        ")
            lines.append(f"  {label:<5} {indented}")

        return "\n".join(lines)


# As in commands/table.py, on a higher floor. They tell "hfship serve m" from "GPUs that hfship
# knows".
COMMAND_NAMES = (
    "fetch",
    "pack",
    "push",
    "sync",
    "sign",
    "bom",
    "custody",
    "verify",
    "unpack",
    "serve",
    "status",
    "stop",
    "restart",
    "logs",
    "drain",
    "undrain",
    "key",
    "export",
    "list",
    "watch",
    "models",
    "mirror",
    "clean",
    "doctor",
    "completion",
    "help",
    "version",
)


def program_name() -> str:
    """What an operator types to run this program: `hfship`, or `python3 .../hfship.pyz`."""
    called = sys.argv[0]
    if called.endswith(".pyz"):
        return f"python3 {shlex.quote(called)}"
    return "hfship"


def as_typed(text: str) -> str:
    """`text` with `program_name()` for the hfship of its commands, which may stand in a
    sentence."""
    first_words = "|".join([*COMMAND_NAMES, "--help"])
    command = rf"\bhfship(?= ({first_words})\b)"
    name = program_name()
    # A function, because backslashes in a text to put there would mean something.
    return re.sub(command, lambda _: name, text)


LEAST_LIKENESS = 0.7  # of a word that is proposed; "other" is no "nowhere" (0.67)


def closest(word: str, known: Iterable[str]) -> str:
    """The word that was probably meant; "" when none is near."""
    import difflib  # costs some milliseconds, for mistakes only

    by_letters = {name.casefold(): name for name in known}
    matches = difflib.get_close_matches(word.casefold(), by_letters, 1, LEAST_LIKENESS)
    return "".join(by_letters[match] for match in matches)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the word that was probably meant, for the end of a sentence; "" when none is near.

    >>> nearest("fetsh", ["fetch", "pack"]), nearest("x", ["fetch"])
    ('; did you mean fetch?', '')
    """
    found = closest(word, known)
    if not found:
        return ""
    return f"; did you mean {found}?"


_AGAIN = re.compile(r"(?m)^(.*, then )?run the same command again(?:[:;,] (.*)|( later| in .*))?$")
_WITH = re.compile(r"(?m)^the same command with (\S+)$")
_INSTEAD = re.compile(r"(?m)^the same command with (\S+) for (.*)$")


def with_command(step: str, typed: str) -> str:
    """A next step with the command that was `typed`, in the place of words for it.

    >>> with_command("run the same command again: what arrived is kept", "hfship fetch a/b")
    'hfship fetch a/b     # what arrived is kept'
    >>> print(with_command("check the cable, then run the same command again", "hfship fetch a/b"))
    check the cable, then:
    hfship fetch a/b
    >>> with_command("the same command with --yes", "hfship clean")
    'hfship clean --yes'
    >>> with_command("the same command with tiny for tyny", "hfship serve tyny --plan")
    'hfship serve tiny --plan'
    """
    if not typed:
        return step
    step = _INSTEAD.sub(lambda found: _instead(typed, found[1], found[2]), step)
    step = _WITH.sub(lambda found: f"{typed} {found[1]}", step)
    return _AGAIN.sub(lambda found: _again(typed, *found.groups()), step)


def _instead(typed: str, word: str, wrong: str) -> str:
    """The command that was typed, with one word for another."""
    words = [word if one == wrong else one for one in shlex.split(typed)]
    return command_line(*words)


def _again(typed: str, before: Optional[str], why: Optional[str], when: Optional[str]) -> str:
    line = typed
    comment = why or (when or "").strip()
    if comment:
        line += f"     # {comment}"
    if before:
        return f"{before.rstrip()}:\n{line}"
    return line


def meant_step(word: str, known: Iterable[str], step: str) -> str:
    """The next step for a word that nothing is called: the same command with the nearest one, else
    `step`."""
    meant = closest(word, known)
    if not meant:
        return step
    return f"the same command with {meant} for {word}"


def error_fields(error: HfshipError) -> Dict[str, str]:
    """An error for JSON: {"what", "why", "next"}."""
    return {
        "what": error.what,
        "why": error.why,
        "next": as_typed(error.next_step),
    }


def command_line(*words: object) -> str:
    """A command that can be pasted into a shell, whatever its words hold.

    >>> from pathlib import Path
    >>> command_line("hfship", "verify", Path("/mnt/my disk/m.tar.zst"))
    "hfship verify '/mnt/my disk/m.tar.zst'"
    """
    quoted = [shlex.quote(str(word)) for word in words]
    return " ".join(quoted)


def error_row(error: HfshipError) -> Dict[str, Any]:
    """An error among the results of --json (schema hfship-error/1)."""
    return {
        "schema": "hfship-error/1",
        "error": error_fields(error),
        "exit_code": int(error.code),
    }


class UsageError(HfshipError):
    """The command line or a settings file is wrong."""

    code = Exit.USAGE


class IncompleteError(HfshipError):
    """Stopped before the end with the state saved: the same command continues."""


class AuthError(HfshipError):
    """Token missing, wrong or without access (gated, private)."""

    code = Exit.AUTH


class NotFoundError(HfshipError):
    """A repository, revision, file, archive or deployment does not exist."""

    code = Exit.NOT_FOUND


class IntegrityError(HfshipError):
    """Bytes are not what the manifest or the Hub says they are."""

    code = Exit.INTEGRITY


class DiskError(HfshipError):
    """Not enough room, a file-size limit, or a disk that refuses."""

    code = Exit.DISK


class NoRoomError(DiskError):
    """The disk, the quota or the file is full: a write failed for that."""


class NetworkError(HfshipError):
    """The network failed for longer than the retry budget."""

    code = Exit.NETWORK


class HostError(HfshipError):
    """This machine cannot do it: docker, GPU, image, memory, port, Python."""

    code = Exit.HOST


class Interrupted(HfshipError):
    """Ctrl-C or SIGTERM, with the state saved."""

    code = Exit.INTERRUPTED
