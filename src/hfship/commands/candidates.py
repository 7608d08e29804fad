# SPDX-License-Identifier: Apache-2.0
"""What may come next on a command line: what the completion of a shell asks for.

    hfship completion --words -- WORD...

where the WORDs are those behind the name of the program, the last of them as far as it is typed,
maybe empty. The answer, of which this room owns the form:

    files                    what the shell shall offer of its own: files, dirs or none
    Qwen3-8B<TAB>model       a word that fits, and what it is; as many lines as there are

Promises: the words come from the parser that will read them, and from what is here; nothing is
changed, and what is wrong with a line is not this room's to say.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from hfship.base.errors import HfshipError
from hfship.base.settings import load_settings
from hfship.base.values import dataclass
from hfship.commands.known_names import listed_names, names_of, paths_that_end
from hfship.commands.table import COMMANDS

if TYPE_CHECKING:
    from hfship.base.settings import Settings

FILES, DIRS, NONE = "files", "dirs", "none"

# What the words of a command mean, by its name and the dest of the argument.
_KINDS_OF: Mapping[Tuple[str, str], Tuple[str, ...]] = {
    ("fetch", "repos"): ("repos",),
    ("pack", "models"): ("models",),
    ("pack", "since"): ("archives",),
    ("push", "archives"): ("archives",),
    ("verify", "targets"): ("archives", "models"),
    ("verify", "repair_from"): ("archives",),
    ("unpack", "archives"): ("archives",),
    ("serve", "names"): ("models",),
    ("status", "names"): ("deployments",),
    ("restart", "names"): ("deployments",),
    ("stop", "names"): ("deployments", "jobs"),
    ("logs", "name"): ("deployments", "jobs"),
    ("watch", "jobs"): ("jobs",),
}
# Words that stand beside files where a command takes both.
_ALSO_FILES = ("models", "archives", "targets", "since", "repair_from")
# Values that are usual, by the dest of the option.
_USUAL: Mapping[str, Tuple[str, ...]] = {
    "split": ("fat32", "dvd", "bd25", "bd50", "4300M"),
    "older_than": ("1d", "7d", "30d"),
    "limit_rate": ("10M", "50M", "100M"),
    "bwlimit": ("10M", "50M", "100M"),
    "gpus": ("all", "0", "0,1"),
    "assume_gpus": ("1xH100", "2xH100", "8xH200"),
    "host": ("0.0.0.0", "127.0.0.1"),
    "bind": ("0.0.0.0", "127.0.0.1"),
}
_USUAL_OF: Mapping[Tuple[str, str], Tuple[str, ...]] = {("logs", "since"): ("1h", "1d", "7d")}
_MODELS_FILES = (".toml", ".json")
_A_FILE = re.compile(r"FILE|ARCHIVE|PART|pem")
_SEPARATOR = re.compile(r"[\n\t\r]")
_A_FOLDER = re.compile(r"\bDIR\b")


@dataclass(frozen=True)
class Candidates:
    """What the shell shall offer of its own, and words that fit with what they are."""

    shell: str
    words: Tuple[Tuple[str, str], ...] = ()

    def text(self) -> str:
        """The answer to the shell."""
        lines = [self.shell]
        for word, about in self.words:
            is_torn = _SEPARATOR.search(word)
            if not is_torn:  # else no shell takes it as a word
                lines.append(f"{word}\t{about}")

        lines.append("")
        return "\n".join(lines)


def candidates(words: Sequence[str], settings: Settings) -> Candidates:
    """What fits at the last of the words."""
    *before, current = words or [""]
    if before and before[-1] == "=":  # bash takes --split=fat32 for three words
        before = before[:-1]
    if current == "=":
        current = ""
    if not before:
        return _starting_with(current, NONE, [(row.name, row.summary) for row in COMMANDS])

    command = before[0]
    if command not in [row.name for row in COMMANDS] or "--" in before:
        return Candidates(NONE)
    return _Line(command, before[1:], current, settings).candidates()


def _starting_with(start: str, shell: str, words: Sequence[Tuple[str, str]]) -> Candidates:
    fitting = []
    for word, about in words:
        if word.startswith(start):
            fitting.append((word, about))
    return Candidates(shell, tuple(fitting))


class _Line:
    """A command line of one command, up to the word that is typed."""

    def __init__(
        self, command: str, before: Sequence[str], current: str, settings: Settings
    ) -> None:
        from hfship.commands.parser import command_parser

        self._command = command
        self._before = before
        self._current = current
        self._settings = settings
        actions: List[argparse.Action] = command_parser(command)._actions
        self._actions = [one for one in actions if one.help != argparse.SUPPRESS]
        self._options = {name: one for one in self._actions for name in one.option_strings}

    def candidates(self) -> Candidates:
        """What fits."""
        option, equals, value = self._current.partition("=")
        if equals and option in self._options:
            found = self._values(self._options[option], value)
            words = [(f"{option}={word}", about) for word, about in found.words]
            return Candidates(NONE, tuple(words))

        last = self._before[-1] if self._before else ""
        if last in self._options and _takes_value(self._options[last]):
            return self._values(self._options[last], self._current)
        if self._current.startswith("-"):
            return _starting_with(self._current, NONE, list(self._unused_options()))
        return self._positionals()

    def _unused_options(self) -> Iterator[Tuple[str, str]]:
        """The long options that may still be given."""
        for action in self._actions:
            repeats = isinstance(action, argparse._AppendAction)
            is_used = set(action.option_strings) & set(self._before)
            if is_used and not repeats:
                continue
            about = str(action.help or "").replace("%(default)s", _shown(action.default))
            for name in action.option_strings:
                if name.startswith("--"):
                    yield name, about

    def _positionals(self) -> Candidates:
        """The words that a command takes beside its options, wherever they stand."""
        shell = NONE
        words: List[Tuple[str, str]] = []
        for action in self._actions:
            if action.option_strings:
                continue
            found = self._values(action, self._current)
            words += [pair for pair in found.words if pair[0] not in self._before]
            if found.shell == FILES or shell == NONE:  # files are more than folders
                shell = found.shell
        return Candidates(shell, tuple(words))

    def _values(self, action: argparse.Action, start: str) -> Candidates:
        """The values of an option, or the words of a positional, that begin so."""
        if action.choices:
            return _starting_with(start, NONE, [(str(one), "") for one in action.choices])
        if action.dest == "models_file":
            paths = paths_that_end(start, _MODELS_FILES)
            return Candidates(NONE, tuple((path, "") for path in paths))

        key = (self._command, action.dest)
        words: List[Tuple[str, str]] = []
        for kind in _KINDS_OF.get(key, ()):
            words += [(name, kind[:-1]) for name in self._names(kind)]
        usual = _USUAL_OF.get(key)
        if usual is None and key not in _KINDS_OF:
            usual = _USUAL.get(action.dest)
        words += [(value, "") for value in usual or ()]
        return _starting_with(start, self._of_shell(action), list(dict(words).items()))

    def _names(self, kind: str) -> List[str]:
        """Names of a kind that are here, and those of the models file where a command takes one."""
        names = names_of(kind, self._settings)
        if kind in ("models", "archives", "repos", "deployments"):
            names = [*self._listed(), *names]
        return names

    def _listed(self) -> List[str]:
        from hfship.commands.modelskeys import models_file

        named = None
        for word, value in zip(self._before, self._before[1:]):
            if word == "--models":
                named = os.path.expanduser(value)
        with contextlib.suppress(HfshipError, OSError):
            file = models_file(argparse.Namespace(models_file=named))
            if file:
                return listed_names(self._command, file)
        return []

    def _of_shell(self, action: argparse.Action) -> str:
        """What the shell offers itself, as the name of the value says."""
        shown = str(action.metavar or "")
        also = action.dest in _ALSO_FILES and (self._command, action.dest) in _KINDS_OF
        if _A_FILE.search(shown) or also:
            return FILES
        if _A_FOLDER.search(shown):
            return DIRS
        return NONE


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def _shown(default: Any) -> str:
    if default is None:
        return ""
    return str(default)


def answer(words: Sequence[str], env: Mapping[str, str]) -> str:
    """The answer to `completion --words -- WORD...`."""
    if list(words[:1]) == ["--"]:
        words = words[1:]
    of_env: Dict[str, str] = dict(env)
    of_env.pop("HF_ENDPOINT", None)  # a wrong one is for the command to refuse
    settings = load_settings(of_env)
    return candidates(words, settings).text()
