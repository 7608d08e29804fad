# SPDX-License-Identifier: Apache-2.0
"""The argument parser, made from the table of commands.

Owns how a command line is read. Promises: only the room of the command that was typed is imported,
and only its arguments are built, so that `hfship --help` imports no command at all.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any, Dict, List, NoReturn, Sequence, Tuple

from hfship import __version__
from hfship.base.errors import UsageError, as_typed, nearest, program_name
from hfship.base.output import COLOUR_MODES
from hfship.base.settings import home_path
from hfship.commands.context import CALL_OPTIONS, DEFAULT_OPTIONS, MODEL_OPTIONS
from hfship.commands.table import COMMANDS, EXIT_CODES, GROUPS, examples_of

if TYPE_CHECKING:
    from hfship.commands.context import Command


def file_options(command: str) -> Dict[str, argparse.Action]:
    """The options of a command that a models file may set, by dest."""
    parser = argparse.ArgumentParser()
    next(row for row in COMMANDS if row.name == command).arguments(parser)
    options = {action.dest: action for action in parser._actions if action.option_strings}
    allowed = MODEL_OPTIONS.get(command, ()) + DEFAULT_OPTIONS.get(command, ())
    if not allowed:
        allowed = tuple(dest for dest in options if dest not in CALL_OPTIONS)
    return {dest: action for dest, action in options.items() if dest in allowed}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command takes."""
    group = parser.add_argument_group("output")
    group.add_argument("-q", "--quiet", action="store_true", help="warnings and errors only")
    group.add_argument("-v", "--verbose", action="store_true", help="say more")
    group.add_argument("--json", action="store_true", help="results as JSON on stdout")
    group.add_argument(
        "--progress",
        choices=("auto", "bar", "plain", "json", "none"),
        default="auto",
        help="how progress is shown (default: %(default)s)",
    )
    group.add_argument(
        "--color",
        choices=COLOUR_MODES,
        default="auto",
        help="colours for states, on a terminal (default: %(default)s, NO_COLOR: none)",
    )
    logs = "records and logs of jobs (default: HFSHIP_LOG_DIR, ~/logs/hfship)"
    group.add_argument("--log-dir", metavar="DIR", help=logs)
    group.add_argument("--log-file", type=home_path, metavar="FILE", help="also write a log there")
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="of logs (default: %(default)s)",
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are reported like all others.

    Options have no abbreviations: what is written down of a command line must know by their names
    which values are secret.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "", f"{self.prog} --help")


class _CommandParser(_Parser):
    """The parser of one command; without arguments until `fill`, or until it parses.

    When it parses, its result holds what was given and no more; `defaults` has the rest.
    Names and options come in any order: argparse alone refuses `push NAME -p 22 HOST:DIR`.
    """

    def __init__(self, command: Command, **options: Any) -> None:
        super().__init__(
            description=command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.command = command
        self.defaults: Dict[str, Any] = {}  # by dest, once it parses
        self._filled = False
        self._intermixed = False

    def fill(self) -> None:
        """Add the arguments; this imports the room of the command."""
        self._filled = True
        examples = [as_typed(line) for line in examples_of(self.command.name)]
        self.epilog = "\n  ".join(["examples:", *examples])
        self.command.arguments(self)
        if self.command.models:
            listed = "do it for all models of this file, or for those that are named"
            self.add_argument("--models", dest="models_file", metavar="FILE", help=listed)
        if self.command.job:
            detached = "go on without this terminal; watch shows it"
            self.add_argument("--background", action="store_true", help=detached)

        add_common_arguments(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self._filled:
            self.fill()
            self._set_defaults_aside()
        # parse_known_intermixed_args calls this method, and it knows no "--".
        if self._intermixed or "--" in args:
            return super().parse_known_args(args, namespace)

        self._intermixed = True
        return self.parse_known_intermixed_args(args, namespace)

    def _set_defaults_aside(self) -> None:
        """Move the defaults to `self.defaults`, and those that help shows into its texts."""
        for action in self._actions:
            default = action.default
            if default == argparse.SUPPRESS:  # --help
                continue
            if action.help:
                shown = str(default).replace("%", "%%")
                action.help = action.help.replace("%(default)s", shown)
            if default is None and action.nargs == argparse.ZERO_OR_MORE:
                default = []
            if isinstance(default, str) and callable(action.type):
                default = action.type(default)
            self.defaults[action.dest] = default
            action.default = argparse.SUPPRESS


class _AllParser(_Parser):
    """The parser of all commands, whose help argparse would print as one list."""

    def __init__(self) -> None:
        super().__init__(prog=program_name())
        self.add_argument("--version", action="version", version=f"hfship {__version__}")
        subparsers = self.add_subparsers(
            dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser
        )
        self.commands: Dict[str, _CommandParser] = {
            command.name: subparsers.add_parser(command.name, command=command, help=command.summary)
            for command in COMMANDS
        }

    def format_help(self) -> str:
        about = "Carry Hugging Face models across an air gap and put them into service."
        lines = [self.format_usage(), about]
        for command in COMMANDS:
            if command.name in GROUPS:
                lines.append(f"\n{GROUPS[command.name]}:")
            lines.append(f"  {command.name:<10}  {command.summary}")

        more = f"{self.prog} COMMAND --help shows options and examples."
        more += f"\n{self.prog} help offline is where to begin without a network."
        lines += [f"\n{more}\n", EXIT_CODES]
        return "\n".join(lines)


def help_of(command: str = "") -> str:
    """What `hfship COMMAND --help` prints, or `hfship --help`."""
    parser = _AllParser()
    if not command:
        return parser.format_help()
    command_parser = parser.commands[command]
    command_parser.fill()
    command_parser._set_defaults_aside()
    return command_parser.format_help()


def command_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command, with its arguments."""
    parser = _AllParser().commands[command]
    parser.fill()
    return parser


def build_parser() -> argparse.ArgumentParser:
    """The parser with the arguments of all commands, for tests."""
    parser = _AllParser()
    for command_parser in parser.commands.values():
        command_parser.fill()
    return parser


# Options of all commands, without a value, which other programs take before the command.
_FOR_ALL = ("-q", "--quiet", "-v", "--verbose", "--json")


def command_first(words: Sequence[str]) -> List[str]:
    """The words with options that stand before the command behind it.

    >>> command_first(["-q", "--json", "list", "models"])
    ['list', '-q', '--json', 'models']
    >>> command_first(["--version"])
    ['--version']
    """
    count = 0
    while count < len(words) and words[count] in _FOR_ALL:
        count += 1
    return [*words[count : count + 1], *words[:count], *words[count + 1 :]]


HOSTS_WORD = "hosts:"  # stands for all that --hosts and --on mean


def _means_hosts(word: str) -> bool:
    return word in ("--hosts", "--on") or word.startswith("--on=")


def with_passed_on(words: Sequence[str]) -> Sequence[str]:
    """The words with what follows `--`, which is for vLLM, as values of --extra-arg.

    argparse cannot tell it from our own options.

    >>> with_passed_on(["serve", "M", "--", "--enforce-eager"])
    ['serve', 'M', '--extra-arg=--enforce-eager']
    """
    if words[:1] == ["push"] and any(_means_hosts(word) for word in words):
        return [*words, HOSTS_WORD]  # where to push to is always the last word
    if "--" not in words or words[0] != "serve":
        return words
    at = list(words).index("--")
    passed_on = [f"--extra-arg={word}" for word in words[at + 1 :]]
    return [*words[:at], *passed_on]


def parse_words(words: Sequence[str]) -> Tuple[argparse.Namespace, Dict[str, Any]]:
    """The arguments, and those of them that were given. Raises UsageError.

    `--help` and `--version` print what they ask for and raise SystemExit, as argparse does; so do
    no words at all.
    """
    _require_command(words)
    parser = _AllParser()
    if not words:
        parser.print_help()
        parser.exit()
    parsed, unknown = parser.parse_known_args(with_passed_on(words))
    given = vars(parsed)
    command = parser.commands[parsed.command]
    if unknown:
        word = unknown[0]
        if word.startswith("-"):
            word = word.partition("=")[0]  # the value may be a secret
        from hfship.commands.meant import option_meant  # for mistakes only

        meant = option_meant(words, word, list(command._option_string_actions))
        if meant:
            raise meant
        close = nearest(word, command._option_string_actions)
        what = f"{parsed.command} does not know {word}{close}"
        raise UsageError(what, "", f"hfship {parsed.command} --help")

    return argparse.Namespace(**{**command.defaults, **given}), given


def _require_command(words: Sequence[str]) -> None:
    """Raise UsageError, with all commands, where the first word is none of them and no option."""
    names: List[str] = [command.name for command in COMMANDS]
    if not words or words[0] in ("-h", "--help", "--version") or words[0] in names:
        return
    if words[0].startswith("-"):
        option = words[0].partition("=")[0]  # the value may be a secret
        what = f"{option} stands before the command, and belongs behind it"
        raise UsageError(what, "", "hfship --help")
    from hfship.commands.meant import command_meant  # for mistakes only

    meant = command_meant(words)
    if meant:
        raise meant
    what = f"there is no command {words[0]}{nearest(words[0], names)}"

    known = textwrap.fill("the commands are: " + ", ".join(names), 70)
    raise UsageError(what, known, "hfship --help")
