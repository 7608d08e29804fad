"""From what a command does to an exit code, the state of its job, and what is printed of it."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple

import pytest

from conftest import ROOT
from hfship.base.errors import NetworkError, UsageError
from hfship.base.output import ReaderGone
from hfship.base.report import Reporter
from hfship.base.settings import load_settings
from hfship.commands import run
from hfship.commands.context import Context
from hfship.commands.parser import parse_words
from hfship.commands.run import Terminated, guarded, main, print_job, run_line
from hfship.commands.table import COMMANDS


@pytest.mark.parametrize(
    "end, code, state, said",
    [
        (0, 0, "done", ""),
        (6, 6, "failed", ""),
        (NetworkError("no network"), 8, "failed", "no network"),
        (UsageError("no such option"), 2, "failed", "no such option"),
        (OSError(28, "No space left on device", "/x"), 7, "failed", "/x"),
        (KeyboardInterrupt(), 130, "stopped", "interrupted"),
        (Terminated(), 130, "interrupted", "interrupted"),
    ],
)
def test_how_a_command_ends(end: Any, code: int, state: str, said: str) -> None:
    """A job that nobody wanted to stop can be told from one that was stopped."""
    err = io.StringIO()

    def work() -> int:
        if isinstance(end, BaseException):
            raise end
        return int(end)

    assert guarded(Reporter("none", 0, io.StringIO(), err), work) == (code, state)
    assert said in err.getvalue() and bool(said) == bool(err.getvalue())


def printed(folder: Path, said: str, code: int, *words: str) -> Tuple[str, str]:
    """What a command with --background prints on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    args, given = parse_words(["fetch", "org/x", "--background", *words])
    reporter = Reporter("plain", 0, out, err)
    settings = load_settings({"HFSHIP_LOG_DIR": str(folder)})
    print_job(Context(args, settings, reporter, given), 7, said, code)
    return out.getvalue(), err.getvalue()


def test_the_name_of_a_job_is_the_result_of_its_start(tmp_path: Path) -> None:
    out, err = printed(tmp_path, "fetch-x", 0)
    assert out == "fetch-x\n" and f"log   {tmp_path}/fetch-x.log" in err


def test_of_a_job_that_did_not_begin_nothing_is_said_twice(tmp_path: Path) -> None:
    assert printed(tmp_path, "", 130) == ("", "")
    assert printed(tmp_path, json.dumps({"error": {"what": "x"}}), 5) == ("", "")


@pytest.mark.parametrize(
    "said, code, expected",
    [
        ("fetch-x", 0, {"schema": "hfship-background/1", "job": "fetch-x", "pid": 7}),
        ('{"error": {"what": "x"}}', 5, {"error": {"what": "x"}, "exit_code": 5}),
    ],
)
def test_a_start_as_json(said: str, code: int, expected: Dict[str, Any], tmp_path: Path) -> None:
    row = json.loads(printed(tmp_path, said, code, "--json")[0])
    assert {**row, **expected} == row
    assert code or row["log"] == f"{tmp_path}/fetch-x.log"


def test_a_job_that_said_nothing_was_interrupted(tmp_path: Path) -> None:
    row = json.loads(printed(tmp_path, "", 137, "--json")[0])
    assert row["error"]["what"] == "interrupted" and row["exit_code"] == 137


@pytest.mark.parametrize("words", ["fetch org/x --dry-run", "serve m --plan"])
def test_what_is_only_shown_does_not_run_in_the_background(words: str) -> None:
    with pytest.raises(UsageError, match="--background is for work"):
        run_line([*words.split(), "--background"], Reporter("none"))


DROPPED = """
import gc, os, signal, sys, time, weakref
from hfship.commands import run

SIGNUM = signal.Signals[sys.argv[1]]

def strike(*_):
    os.kill(os.getpid(), SIGNUM)
    for _ in range(1000):  # here the handler runs
        pass

class Ends:
    __del__ = strike

class Plain:
    pass

def in_del():
    Ends()

def in_weakref():
    thing = Plain()
    kept = weakref.ref(thing, strike)
    del thing

def in_collection():
    one = Ends()
    one.self = one
    del one
    gc.collect()

def in_generator():
    def generate():
        try:
            yield
        finally:
            strike()
    running = generate()
    next(running)
    del running

def work(*_):
    globals()[sys.argv[2]]()
    time.sleep(30)
    return 0

run.run_line = work
sys.exit(run.main([]))
"""


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("place", ["in_del", "in_weakref", "in_collection", "in_generator"])
def test_a_signal_that_python_drops_comes_again(place: str, signum: str, tmp_path: Path) -> None:
    """What a handler raises within the end of an object is lost: the run would go on, and end with 0."""
    argv = [sys.executable, "-c", DROPPED, signum, place]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert done.returncode == 130
    assert "Exception ignored" not in done.stderr
    assert "interrupted" in done.stderr


def test_what_else_python_drops_is_said(tmp_path: Path) -> None:
    dropped = DROPPED.replace("os.kill(os.getpid(), SIGNUM)", "1 / 0").replace(
        "sleep(30)", "sleep(0)"
    )
    argv = [sys.executable, "-c", dropped, "SIGINT", "in_del"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        ({}, {"SIGTERM", "SIGHUP"}),  # the suite handles SIGINT itself
        ({"SIGINT": signal.SIG_DFL}, {"SIGTERM", "SIGHUP", "SIGINT"}),
        ({"SIGHUP": signal.SIG_IGN}, {"SIGTERM"}),  # nohup
        ({"SIGINT": signal.SIG_IGN}, {"SIGTERM", "SIGHUP"}),  # a shell's background job
    ],
)
def test_signals_end_it_with_the_state_saved_unless_they_are_ignored(
    before: Dict[str, Any], changed: Set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: Dict[Any, Any] = {}
    known = {signal.Signals[name]: handler for name, handler in before.items()}
    monkeypatch.setattr(run.signal, "getsignal", lambda signum: known.get(signum, print))
    monkeypatch.setattr(run.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr("hfship.commands.run.run_line", lambda words, _: seen.append(words) or 6)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    seen: List[Any] = []
    assert run.main(["--json", "verify", "x"]) == 6
    assert seen == [["verify", "x", "--json"]] or seen == [["verify", "--json", "x"]]
    assert {signal.Signals(signum).name for signum in handlers} == changed
    for name in changed - {"SIGINT"}:
        with pytest.raises(Terminated):
            handlers[signal.Signals[name]](0, None)
    if "SIGINT" in changed:
        assert handlers[signal.SIGINT] is signal.default_int_handler
    assert sys.unraisablehook is run.raise_again


def test_a_reader_that_went_away_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> int:
        raise ReaderGone

    silenced: List[int] = []
    monkeypatch.setattr("hfship.commands.run.silence", silenced.append)
    assert guarded(Reporter("none", 0, io.StringIO(), io.StringIO()), work) == (0, "done")
    assert silenced == [1]


def test_any_other_pipe_that_breaks_is_a_failure() -> None:
    """Else half a load into an engine would count as one."""

    def work() -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    code, state = guarded(Reporter("none", 0, io.StringIO(), io.StringIO()), work)
    assert code != 0 and state == "failed"


@pytest.mark.parametrize(
    ("line", "variable", "read"),
    [
        ("verify x", "", False),
        ("verify x", "m.toml", True),
        ("verify x --models m.toml", "", True),
        ("models", "m.toml", False),
        ("version", "m.toml", False),
    ],
)
def test_which_commands_read_a_models_file(
    line: str, variable: str, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, _ = parse_words(line.split())
    monkeypatch.setenv("HFSHIP_MODELS_FILE", variable)
    monkeypatch.setattr("hfship.commands.modelskeys.models_file", lambda _: "the file")
    (command,) = [one for one in COMMANDS if one.name == line.split()[0]]
    assert run._models_file(command, args) == ("the file" if read else None)


@pytest.mark.parametrize(
    ("line", "has_home", "log_dir"),
    [
        ("watch", True, "HOME/logs/hfship"),
        ("watch --log-dir l", True, "HERE/l"),
        ("version", False, "/dev/null"),
    ],
)
def test_where_records_lie(
    line: str, has_home: bool, log_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HFSHIP_LOG_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/me" if has_home else "")
    args, _ = parse_words(line.split())
    (command,) = [one for one in COMMANDS if one.name == line.split()[0]]
    found = run._settings(command, args, None).log_dir
    assert str(found) == log_dir.replace("HOME", "/home/me").replace("HERE", str(tmp_path))


@pytest.mark.parametrize(
    ("line", "subjects"),
    [
        ("fetch o/a o/b", ["o/a", "o/b"]),
        ("fetch o/a --name x", ["x"]),
        ("verify a", ["a"]),
        ("mirror d", ["d"]),
        ("mirror", []),
        ("watch a", []),
    ],
)
def test_what_a_job_is_named_after(line: str, subjects: List[str]) -> None:
    args, _ = parse_words(line.split())
    (command,) = [one for one in COMMANDS if one.name == line.split()[0]]
    assert run._subjects(command, args) == subjects


# -- a start


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "words, coloured, as_json",
    [
        (["nonsense"], True, False),
        (["status", "--nonsense"], True, False),
        (["status", "--nonsense", "--json"], True, True),
        (["help", "nowhere", "--color=never"], False, False),
    ],
)
def test_an_error_of_the_words_is_coloured_and_said_as_json(
    words: List[str], coloured: bool, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they were read, too; and signals and hooks are ours from then on."""
    out, err = io.StringIO(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.setattr(sys, "unraisablehook", None)
    before = {signum: signal.getsignal(signum) for signum in (1, 2, 15)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        code = main(words)
        now = [signal.getsignal(signum) for signum in (1, 2, 15)]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert code in (2, 5) and ("\x1b[" in err.getvalue()) == coloured
    assert out.getvalue().startswith("{") == as_json
    assert now == [signal.SIG_IGN, signal.default_int_handler, run._terminate]
    assert sys.excepthook is not None and sys.unraisablehook is run.raise_again


def test_words_are_those_of_the_program_unless_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hfship", "nonsense"])
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.setattr(sys, "unraisablehook", None)
    assert main() == 2 and "nonsense" in capsys.readouterr().err
    assert main(["version"]) == 0 and "hfship" in capsys.readouterr().out


def test_a_shell_that_completes_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(
        "hfship.commands.candidates.answer", lambda words, _: asked.append(words) or "a\nb\n"
    )
    out = io.StringIO()
    reporter = Reporter("plain", 0, out, io.StringIO())
    assert run_line(["completion", "--words", "fetch", "o"], reporter) == 0
    assert asked == [["fetch", "o"]] and out.getvalue() == "a\nb\n"


def test_a_log_goes_where_it_is_wanted_in_the_form_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    words = ["version", "--log-file", str(path), "--log-format", "json"]
    reporter = Reporter("plain", 0, io.StringIO(), io.StringIO())
    assert run_line(words, reporter) == 0
    assert all(json.loads(line) for line in path.read_text().splitlines())
    nowhere = ["version", "--log-file", str(tmp_path / "none/log")]
    code, _ = guarded(reporter, lambda: run_line(nowhere, reporter))
    assert code == 7
