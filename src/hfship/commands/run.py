# SPDX-License-Identifier: Apache-2.0
"""From the words of a command line to an exit code.

Owns the order of a start: parse, settings, log, run; and the only place where errors become exit
codes. Never: does the work of a command.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Callable, List, Mapping, NoReturn, Optional, Sequence, Tuple

from hfship.base.errors import (
    Exit,
    HfshipError,
    Interrupted,
    UsageError,
    as_typed,
    command_line,
    error_row,
    with_command,
)
from hfship.base.files import disk_errors
from hfship.base.locks import InUseError
from hfship.base.output import ReaderGone, silence
from hfship.base.report import Reporter
from hfship.base.settings import FOLDERS, home_path, load_settings
from hfship.base.values import replace
from hfship.commands.context import Context
from hfship.commands.parser import command_first, parse_words
from hfship.commands.results import error_of
from hfship.commands.runs import run_models
from hfship.commands.table import COMMANDS

if TYPE_CHECKING:
    import argparse
    from sys import UnraisableHookArgs

    from hfship.base.settings import ModelsFile, Settings
    from hfship.commands.context import Command


# Commands that use no folder of the settings.
WITHOUT_FOLDERS = ("models", "completion", "version")


# Options, by their dest, with which a command shows or installs something, and does no work.
ONLY_SHOWN = ("dry_run", "plan", "install")

RAISE_AGAIN_S = 0.01  # after which a signal that Python dropped comes again


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the end of the terminal: like Ctrl-C, but nobody wanted this job stopped."""


def _terminate(*_: object) -> NoReturn:
    """SIGTERM and SIGHUP end like Ctrl-C: state saved, exit code 130."""
    raise Terminated


def raise_again(lost: UnraisableHookArgs) -> None:
    """Let a signal come once more that came where Python drops what its handler raised: within the
    end of an object (`__del__`), or a collection of garbage. A `sys.unraisablehook`."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signum = signal.SIGINT
    if isinstance(lost.exc_value, Terminated):
        signum = signal.SIGTERM
    # Not here: what is raised here is dropped as well. Nor does this wait, as Thread.start() does,
    # until the other thread runs.
    _thread.start_new_thread(_signal_main_thread, (signum,))


def _signal_main_thread(signum: int) -> None:
    main_thread = threading.main_thread().ident
    time.sleep(RAISE_AGAIN_S)
    if main_thread:
        signal.pthread_kill(main_thread, signum)


def guarded(reporter: Reporter, work: Callable[[], int]) -> Tuple[int, str]:
    """The exit code of `work`, and the state of a job that ends so; errors are reported.

    The only place where errors become exit codes.
    """
    try:
        code = int(work())
    except ReaderGone:  # of what we only show
        silence(1)
        return int(Exit.OK), "done"
    except (HfshipError, OSError, KeyboardInterrupt) as exc:
        error = error_of(exc)
        error.next_step = with_command(error.next_step, _typed(reporter.run.words))
        reporter.failed(error)
        return int(error.code), _state_after(exc)

    if code:
        return code, "failed"
    return code, "done"


def _state_after(exc: BaseException) -> str:
    """The state of a job that an exception ended."""
    if isinstance(exc, Terminated):
        return "interrupted"
    if isinstance(exc, KeyboardInterrupt):
        return "stopped"
    return "failed"


def run_job(command: Command, context: Context, words: Sequence[str]) -> int:
    """Run a command with a record and a log of its own.

    With --background in a process that outlives us, whose name this one prints.
    """
    from hfship.ops.jobs import job_name, new_record, read_jobs
    from hfship.ops.keeper import JobKeeper

    args, reporter, folder = context.args, context.reporter, context.settings.log_dir
    pipe = -1
    if args.background:
        from hfship.ops.background import await_job, detach

        pid, pipe = detach(folder)
        if pid:
            said, code = await_job(pid, pipe)
            print_job(context, pid, said, code)
            return code
        reporter.leave_terminal()

    name = job_name(command.name, _subjects(command, args))
    record = new_record(name, words, args.background, os.environ)
    keeper = JobKeeper(reporter, folder, record, args.log_format, pipe)

    def work() -> int:
        try:
            return run_models(command, context)
        except InUseError as exc:
            from hfship.ops.background import with_job

            raise with_job(exc, read_jobs([folder]), name) from exc

    code, state = 1, "failed"
    try:
        code, state = guarded(reporter, work)
    except BaseException as exc:
        reporter.log("error", f"bug: {type(exc).__name__}: {exc}")
        raise
    finally:
        keeper.end(code, state)

    return code


def _subjects(command: Command, args: argparse.Namespace) -> List[str]:
    """What the job is named after: --name, else the models that the words mean, or the folder."""
    if getattr(args, "name", None):
        return [args.name]
    if not command.models:
        folder = getattr(args, "folder", None)
        return [folder] if folder else []
    words: List[str] = getattr(args, command.models)
    return words


def print_job(context: Context, pid: int, said: str, code: int) -> None:
    """Print the name of the job that goes on without us, which is what it `said`.

    What went wrong before (`code` is not 0) it has printed itself, but for --json: that it said.
    """
    args, reporter = context.args, context.reporter
    log = str(context.settings.log_dir / f"{said}.log")
    if code and args.json:
        error = error_row(Interrupted("interrupted"))
        if said.startswith("{"):
            error = json.loads(said)
        reporter.result_json({**error, "exit_code": code})
    elif args.json:
        result = {
            "schema": "hfship-background/1",
            "job": said,
            "pid": pid,
            "log": log,
        }
        reporter.result_json(result)
    elif not code:
        text = f"runs in the background; hfship watch shows it\n  log   {log}"
        reporter.info(as_typed(text))
        reporter.result(said)


def _typed(words: Sequence[str]) -> str:
    """The command line as it may be shown, "" where secrets are in it, or where there is none."""
    if not words:
        return ""
    from hfship.ops.jobs import public_words

    if list(public_words(words)) != list(words):
        return ""
    return command_line("hfship", *words)


def run_line(words: Sequence[str], reporter: Reporter) -> int:
    """Parse a command line, resolve the settings, open the log asked for, and run the command."""
    if list(words[:2]) == ["completion", "--words"]:  # a shell asks, at every TAB
        from hfship.commands.candidates import answer

        reporter.show(answer(words[2:], os.environ))
        return Exit.OK

    args, given = parse_words(words)
    schema = f"hfship-{args.command}/1"
    reporter.set_colour(args.color)
    reporter.adjust(args.progress, args.verbose - args.quiet, args.json, schema)
    command = next(row for row in COMMANDS if row.name == args.command)
    file = _models_file(command, args)
    context = Context(args, _settings(command, args, file), reporter, given, file)
    if args.log_file:
        _open_log(args, reporter)
    if not command.job:
        return run_models(command, context)
    if not any(getattr(args, dest, False) for dest in ONLY_SHOWN):
        return run_job(command, context, words)
    if args.background:
        why = "nothing would be seen of what is shown"
        raise UsageError("--background is for work", why, "leave it out")

    return run_models(command, context)


def _models_file(command: Command, args: argparse.Namespace) -> Optional[ModelsFile]:
    """The models file that the command line or the environment names, read."""
    named = getattr(args, "models_file", None) or os.environ.get("HFSHIP_MODELS_FILE")
    if not named or command.name in ("models", "version"):
        return None
    from hfship.commands.modelskeys import models_file

    return models_file(args)


def _settings(command: Command, args: argparse.Namespace, file: Optional[ModelsFile]) -> Settings:
    env: Mapping[str, str] = os.environ
    if command.name in WITHOUT_FOLDERS:  # then nobody needs a home, either
        env = {**env, **{folder.variable: os.devnull for folder in FOLDERS.values()}}
    settings = load_settings(env, getattr(args, "endpoint", None), file)
    if not args.log_dir:
        return settings
    return replace(settings, log_dir=home_path(args.log_dir).absolute())


def _open_log(args: argparse.Namespace, reporter: Reporter) -> None:
    with disk_errors("write the log", args.log_file, "give --log-file another FILE"):
        reporter.open_log(args.log_file, args.log_format)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command line, `sys.argv` by default; its exit code."""
    words = list(sys.argv[1:])
    if argv is not None:
        words = list(argv)

    words = command_first(words)
    # Also what is wrong with the words is said as JSON.
    reporter = Reporter(as_json="--json" in words)
    reporter.set_colour("auto")
    sys.excepthook = reporter.bug
    sys.unraisablehook = raise_again
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
            signal.signal(signum, _terminate)

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # so far there was nothing to save
        signal.signal(signal.SIGINT, signal.default_int_handler)
    reporter.run.words = tuple(words)
    code, _ = guarded(reporter, lambda: run_line(words, reporter))
    return code
