"""What reaches the terminal, the results and the log, and what never does: secrets."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest

from conftest import ROOT, Program
from hfship.base import output
from hfship.base.errors import NetworkError
from hfship.base.output import Output, wants_colour
from hfship.base.redaction import Redactor, is_secret_variable, redact
from hfship.base.report import Reporter
from test_manifest import A_FILE, GOOD


def test_a_reader_that_goes_away_does_not_change_the_exit_code(hfship: Program) -> None:
    """The work goes on: of two models the second is the damaged one."""
    for name, content in (("good", "a"), ("bad", "b")):
        folder = hfship.home / name
        (folder / ".hfship").mkdir(parents=True)
        (folder / "f").write_text(content)
        (folder / ".hfship/manifest.json").write_text(
            json.dumps({**GOOD, "name": name, "files": [A_FILE]})
        )
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*hfship.argv, "verify", str(hfship.home / "good"), str(hfship.home / "bad")]
    done = subprocess.run(
        argv, env=hfship.env(), stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode == 6 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("target, code", [("/dev/full", 7), ("-", 0)])
def test_a_result_that_cannot_be_written(target: str, code: int, hfship: Program) -> None:
    """A full disk is said; a stdout that the caller closed is not our business."""
    redirect = "1>&-" if target == "-" else f"> {target}"
    argv = ["sh", "-c", f'exec "$@" {redirect}', "sh", *hfship.argv, "version"]
    done = subprocess.run(argv, env=hfship.env(), stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


A_STAGE = """
import sys, time
from hfship.base.report import Reporter
with Reporter("bar").stage("pack", 40) as stage:
    for _ in range(40):
        time.sleep(0.05)
        stage.add(1)
print("done")
"""


def test_a_terminal_that_closes_below_the_bar_stops_nothing() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    argv = [sys.executable, "-c", A_STAGE]
    with subprocess.Popen(
        argv, cwd=ROOT / "src", stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as process:
        os.close(theirs)
        while b"pack" not in os.read(ours, 1000):
            pass
        os.close(ours)
        assert process.communicate(timeout=30)[0] == "done\n" and process.returncode == 0


SECRETS = [
    "Authorization: Bearer hf_abcdefghijklmnop",
    "token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH in a text",
    "VLLM_API_KEY=sk-abcdefghijklmnop_qrstuvwxyz-ABCDEFGHIJKLMNO",
    "https://us.aws.cdn.hf.co/x?Expires=1&Signature=abcdefghijklmnop&Key-Pair-Id=K",
    "http://user:abcdefghijklmnop@proxy:3128/",
]


@pytest.mark.parametrize("progress", ["plain", "json"])
@pytest.mark.parametrize("text", SECRETS)
def test_secrets_never_reach_any_output(text: str, progress: str, tmp_path: Path) -> None:
    out, err, log = io.StringIO(), io.StringIO(), tmp_path / "log"
    reporter = Reporter(progress, 1, out, err)
    reporter.open_log(log, "text")
    for say in (reporter.result, reporter.info, reporter.warn, reporter.detail):
        say(text)
    reporter.error(NetworkError(text, text, text))
    reporter.event("x", text=text)
    assert "abcdefghijklmnop" not in out.getvalue() + err.getvalue() + log.read_text()


def test_results_and_paths_stay_exact() -> None:
    out = io.StringIO()
    reporter = Reporter("plain", 0, out)
    value = {
        "path": "/hf_packages/sk-embedding-v2/m.tar.zst",
        "note": "HTTP 500 \"see http://h/x?y='1'\"",
    }
    reporter.result_json(value)
    assert json.loads(out.getvalue()) == {
        "schema": "",
        **value,
        "note": "HTTP 500 \"see http://h/x?***'1'\"",
    }


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_cannot_be_shown_end_nothing(encoding: str) -> None:
    out = io.BytesIO()
    reporter = Reporter(
        "plain", 0, io.TextIOWrapper(out, encoding), io.TextIOWrapper(io.BytesIO(), encoding)
    )
    name = "mod\xe8le-\udcff\x9b31m\x1b[2J"
    reporter.info(name)
    reporter.result(name)
    text = out.getvalue()
    assert b"\x1b" not in text and text.endswith(b"le-\\udcff?31m?[2J\n")
    reporter.result_json({"path": name})
    assert json.loads(out.getvalue()[len(text) :].decode(encoding))["path"] == name


def test_registered_secrets_are_hidden_whatever_they_look_like() -> None:
    err = io.StringIO()
    reporter = Reporter("plain", 0, err=err)
    reporter.hide("plain words")
    reporter.info("these are plain words")
    assert err.getvalue().endswith("Z these are ***\n")


def test_a_bug_is_told_without_secrets() -> None:
    err = io.StringIO()
    reporter = Reporter(progress="none", err=err)
    reporter.hide("plain words")
    try:
        try:
            raise ValueError("GET https://cdn/x?Signature=abcdef")
        except ValueError as exc:
            raise KeyError("plain words") from exc
    except KeyError as exc:
        reporter.bug(KeyError, exc, exc.__traceback__)
    said = err.getvalue()
    assert (
        "Traceback" in said
        and "test_report.py" in said
        and "KeyError" in said
        and "https://cdn/x" in said
    )
    assert "abcdef" not in said and "plain words" not in said


@pytest.mark.parametrize(
    "progress, expected",
    [
        ("plain", "TIME still waiting, 20 s left\nTIME still waiting, 10 s left\n"),
        ("bar", "\r\x1b[Kwaiting 20 s\r\x1b[Kwaiting 19 s\r\x1b[Kwaiting 10 s\r\x1b[K\r\x1b[K"),
        ("none", ""),
    ],
)
def test_countdown(progress: str, expected: str) -> None:
    err = io.StringIO()
    reporter = Reporter(progress=progress, err=err)
    for seconds in (20.1, 19, 9.9, 0.2, 0):
        reporter.countdown(seconds)
    assert re.sub(r"\d\d:\d\d:\d\dZ", "TIME", err.getvalue()) == expected


def test_each_line_in_a_pipe_has_its_time() -> None:
    err = io.StringIO()
    reporter = Reporter(err=err)
    reporter.info("image    a\nnames    b")
    reporter.warn("look")
    reporter.enter_phase("m", "loading")
    reporter.error(NetworkError("no route to hub", "unplugged", "plug it in"))
    reporter.say("  next  hfship pack m")
    said = [re.fullmatch(r"\d\d:\d\d:\d\dZ (.*)", line) for line in err.getvalue().splitlines()]
    assert [line and line[1] for line in said] == [
        "image    a",
        "names    b",
        "warning: look",
        "m: loading",
        "hfship: no route to hub",
        "  why   unplugged",
        "  next  plug it in",
        "  next  hfship pack m",
    ]


def test_events_go_to_who_asked_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("json")
    reporter.event("file", path="a", size=3)
    error = NetworkError("no route to hub", "unplugged", "plug it in")
    reporter.error(error)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["event"], first["path"], first["size"]) == ("file", "a", 3)
    assert (second["event"], second["exit_code"], second["what"]) == ("error", 8, error.what)
    assert reporter.run.failure is error


def test_results_of_several_runs_are_one_list_and_the_next_one_is_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter("plain", as_json=True)
    with reporter.gather_results():
        reporter.result_json([{"a": 1}])
        reporter.result_json([{"a": 2}])
    reporter.result_json([{"a": 3}])
    assert not reporter.gathers
    lists = json.loads("[" + re.sub(r"\]\s*\[", "],[", capsys.readouterr().out) + "]")
    assert [[row["a"] for row in rows] for rows in lists] == [[1, 2], [3]]


def test_a_secret_is_shown_where_it_was_asked_for_and_nowhere_else() -> None:
    raw = io.BytesIO()
    out, err = io.TextIOWrapper(raw), io.StringIO()
    reporter = Reporter(out=out, err=err)
    reporter.hide("sk-secret")
    reporter.info("the key is sk-secret")
    reporter.result("it is sk-secret")
    assert b"sk-secret" not in raw.getvalue() and "sk-secret" not in err.getvalue()
    reporter.reveal("sk-secret", {"key": "sk-secret"})
    assert raw.getvalue().splitlines()[-1] == b"sk-secret"  # at once
    assert "sk-secret" not in err.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + 34 * "a",
        "a key sk-" + 40 * "k",
        "BEARER abc",
        "ftp://me:pw@host",
        "HTTPS://token@host",
        "https://me:p/w@host/x",
        "http://cdn/x?Signature=abc",
    ],
)
def test_no_kind_of_secret_is_passed_over_for_speed(text: str) -> None:
    """Texts without any sign of a secret are not looked into: each kind has one of the signs."""
    for before in ("", "said: ", "Σ ſ K "):
        assert redact(before + text) != before + text
    assert (
        redact("no/secret.in me@host: 12:30, hf-x, sk_y")
        == "no/secret.in me@host: 12:30, hf-x, sk_y"
    )


@pytest.mark.parametrize("secret", ["a b/c", "pässwort/1", "x&y=z"])
@pytest.mark.parametrize(
    "form", ["{plain}", "http://h/{quoted}", "http://h/x/{whole}/y", "/{quoted}/", "{whole}"]
)
def test_a_secret_is_hidden_as_it_looks_in_a_url(form: str, secret: str) -> None:
    from urllib.parse import quote

    redactor = Redactor()
    redactor.hide("")
    assert redactor.text("abc") == "abc"
    redactor.hide(secret)
    forms = {"plain": secret, "quoted": quote(secret), "whole": quote(secret, safe="")}
    said = redactor.text(form.format(**forms))
    assert said == re.sub(r"\{\w+\}", "***", form)


def test_every_text_in_a_value_is_redacted() -> None:
    redactor = Redactor()
    redactor.hide("geheim")
    value = {"geheim": ["a geheim", ("geheim", 7)], 8: None, "deep": {"x": [{"y": "geheim"}]}}
    assert redactor.value(value) == {
        "***": ["a ***", ["***", 7]],
        "8": None,
        "deep": {"x": [{"y": "***"}]},
    }


@pytest.mark.parametrize(
    "text, secrets, said",
    [
        ("abcdef abcd", ["abcd", "abcdef"], "*** ***"),
        ("abc xabc abc.", ["abc"], "*** xabc ***."),
        ("abcd xabcd", ["abcd"], "*** x***"),
        ("a+b x+b", ["a+b"], "*** x+b"),
    ],
)
def test_the_longest_secret_goes_first_and_short_ones_are_words(
    text: str, secrets: List[str], said: str
) -> None:
    assert redact(text, secrets) == said
    assert redact(text, secrets[::-1]) == said


@pytest.mark.parametrize(
    "name, value, is_secret",
    [
        *[
            (name, "abc", True)
            for name in (
                "HF_TOKEN",
                "my_secret",
                "PGPASSWORD",
                "GPG_PASSPHRASE",
                "SSHPASS",
                "CREDENTIALS",
                "VLLM_API_KEY",
                "APIKEY",
                "AWS_ACCESS_KEY",
                "PRIVATE_KEY",
            )
        ],
        *[
            (name, "abc", False)
            for name in (
                "HF_TOKEN_PATH",
                "TOKEN_FILE",
                "SECRET_DIR",
                "SECRETS_SOCK",
                "TOKENIZERS_PARALLELISM",
                "KEYBOARD",
                "HOME",
            )
        ],
        *[
            ("HF_HUB_DISABLE_TOKEN", value, False)
            for value in ("", "0", "1", "on", "OFF", "yes", "No", "true", "False")
        ],
        ("HOME", "hf_" + 34 * "a", True),
        ("HTTPS_PROXY", "http://proxy:3128", False),
        ("http_proxy", "http://me:pw@proxy:3128", True),
        ("all_proxy", "me:pw@proxy", True),
        ("ALL_PROXY", "http://proxy:3128", False),
        ("no_proxy", "me:pw@proxy", False),
    ],
)
def test_variables_that_hold_secrets_are_known(name: str, value: str, is_secret: bool) -> None:
    assert is_secret_variable(name, value) is is_secret


VERBOSITIES = {
    -1: [("warning", "warning: b"), ("info", "e")],
    0: [("info", "a"), ("warning", "warning: b"), ("info", "e")],
    1: [("info", "a"), ("warning", "warning: b"), ("info", "d"), ("info", "e")],
}


@pytest.mark.parametrize("verbosity", VERBOSITIES)
@pytest.mark.parametrize("progress", ["plain", "json"])
def test_how_much_is_said_and_with_which_level(
    progress: str, verbosity: int, tmp_path: Path
) -> None:
    err = io.StringIO()
    reporter = Reporter(progress, verbosity, io.StringIO(), err)
    reporter.open_log(tmp_path / "log", "json")
    reporter.name_job("fetch-m")
    reporter.info("a")
    reporter.warn("b")
    reporter.detail("d")
    reporter.say("e")
    expected = VERBOSITIES[verbosity]
    if progress == "json":
        events = [json.loads(line) for line in err.getvalue().splitlines()]
        assert [(one["level"], one["text"]) for one in events] == expected
    else:
        lines = [line[10:] for line in err.getvalue().splitlines()]
        assert lines == [text for _, text in expected]
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(one["level"], one["message"]) for one in logged] == expected[:-1]
    assert {one["job"] for one in logged} == {"fetch-m"} and reporter.verbosity == verbosity


def test_an_error_has_its_parts_in_the_log(tmp_path: Path) -> None:
    reporter = Reporter("plain", -1, io.StringIO(), io.StringIO())
    reporter.open_log(tmp_path / "log", "json")
    reporter.run.words = ("fetch", "m")
    reporter.result("a\nb")
    reporter.error(NetworkError("no route", "unplugged", "plug it in"))
    result, error = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert (result["level"], result["message"]) == ("result", "a\nb")
    assert list(reporter.run.results) == ["a"]
    assert error["level"] == "error" and error["stage"] == ""
    parts = [error[name] for name in ("what", "why", "next", "exit_code")]
    assert parts == ["no route", "unplugged", "plug it in", 8]


def test_the_run_of_a_list_names_its_models() -> None:
    """Once: not where the text names it already, and not the part of another name."""
    err = io.StringIO()
    reporter = Reporter("plain", 0, io.StringIO(), err)
    with reporter.about("m", 2, 3):
        assert reporter.run.model_number == "2/3"
        for text in ("loading", "m: ready", "m-2 differs", "org/m is here", "x.m"):
            reporter.info(text)
        reporter.warn("slow")
        reporter.error(NetworkError("no route"))
        reporter.say("as it is")
        with reporter.stage("fetching", 1) as stage:
            assert stage.model == "2/3 m"
    reporter.info("done")
    assert reporter.run.model == reporter.run.model_number == ""
    assert [line[10:] for line in err.getvalue().splitlines()] == [
        "m: loading",
        "m: ready",
        "m: m-2 differs",
        "org/m is here",
        "m: x.m",
        "warning: m: slow",
        "hfship: m: no route",
        "as it is",
        "done",
    ]


def test_a_failure_is_a_result_where_json_has_none_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for printed, wanted, rows in [(False, True, 1), (True, True, 1), (False, False, 0)]:
        reporter = Reporter("none", as_json=wanted)
        if printed:
            reporter.result_json({"a": 1})
        reporter.failed(NetworkError("no route"))
        said = capsys.readouterr()
        assert said.out.count('"schema"') == rows and "no route" in said.err
        assert ('"a": 1' in said.out) == printed


@pytest.mark.parametrize("as_json", [True, False])
def test_a_result_has_the_form_that_is_asked_for(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter()
    reporter.adjust("none", 0, as_json, "hfship-x/1")
    assert reporter.schema == "hfship-x/1" and not reporter.gathers
    reporter.result_of("text", {"a": "hf_" + 34 * "a"})
    reporter.reveal("sk-secret", {"key": "sk-secret"})
    said = capsys.readouterr().out
    if as_json:
        first, second = (json.loads(text) for text in said.replace("}\n{", "}\0{").split("\0"))
        assert first == {"schema": "hfship-x/1", "a": "hf_***"}
        assert second == {"schema": "hfship-x/1", "key": "sk-secret"}
        assert '\n  "key"' in said
        reporter.failed(NetworkError("no route"))
        assert not capsys.readouterr().out
    else:
        assert said == "text\nsk-secret\n"


def test_results_that_failed_are_gathered_all_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter("none", as_json=True)
    with pytest.raises(KeyError), reporter.gather_results() as rows:
        with reporter.gather_results() as same:
            assert same is rows
        rows.append({"a": 1})
        raise KeyError
    assert json.loads(capsys.readouterr().out) == [{"schema": "", "a": 1}]
    with reporter.gather_results():
        assert reporter.gathers
    assert not reporter.gathers and not capsys.readouterr().out


def test_a_stage_without_an_amount_is_none(tmp_path: Path) -> None:
    reporter = Reporter("none", 0, io.StringIO(), io.StringIO())
    reporter.open_log(tmp_path / "log", "json")
    with reporter.stage("verifying", 0):
        assert reporter.run.doing == "" and not reporter.run.working.is_set()
    assert not reporter.run.past and not (tmp_path / "log").read_text()
    with pytest.raises(KeyError), reporter.stage("verifying", 2, "files") as stage:
        assert reporter.run.doing == "verifying" and reporter.run.working.is_set()
        stage.add(1)
        raise KeyError
    assert reporter.run.past == [stage] and not reporter.run.stages
    logged = json.loads((tmp_path / "log").read_text())
    assert (logged["stage"], logged["done"], logged["total"]) == ("verifying", 1, 2)
    assert logged["message"] == stage.amounts() and logged["level"] == "info"


def test_a_phase_is_said_and_an_event() -> None:
    err = io.StringIO()
    reporter = Reporter("json", 0, io.StringIO(), err)
    reporter.enter_phase("m", "loading")
    events = [json.loads(line) for line in err.getvalue().splitlines()]
    assert events[0] == {"event": "log", "level": "info", "text": "m: loading"}
    assert events[1] == {"event": "phase", "name": "m", "phase": "loading"}
    assert reporter.run.doing == "loading" and reporter.run.working.is_set()
    assert reporter.sends_events and not reporter.draws_bars


def test_what_comes_next_adds_up_for_one_command() -> None:
    run = Reporter("none").run
    for command, subject in [("pack", "a"), ("pack", "b"), ("push", "c"), ("pack", "a")]:
        run.add_next(command, subject)
    assert run.next_words == ("hfship", "pack", "a", "b")
    reporter = Reporter("none")
    reporter.then("pack", Path("/m"))
    assert reporter.run.next_words == ("hfship", "pack", "/m")
    reporter.then_elsewhere("sh", "x")
    assert reporter.run.next_words == ("sh", "x")
    reporter.then("pack", "a")
    assert reporter.run.next_words == ("sh", "x")
    reporter.run.failure = NetworkError("x")
    reporter.run.forget_failure()
    assert reporter.run.failure is None
    for number in range(7):
        reporter.run.results.append(str(number))
    assert len(reporter.run.results) == 5


def test_who_goes_to_the_background_draws_nothing() -> None:
    err = Terminal()
    reporter = Reporter("bar", 0, io.StringIO(), err)
    assert reporter.draws_bars
    reporter.leave_terminal()
    assert not reporter.draws_bars
    reporter.countdown(5)
    assert err.getvalue() == ""


def test_a_log_that_fails_is_told_once() -> None:
    err = io.StringIO()
    reporter = Reporter("plain", 0, io.StringIO(), err)
    reporter.open_log(Path("/dev/full"), "text")
    for _ in range(2):
        reporter.info("a")
    lines = [line[10:] for line in err.getvalue().splitlines()]
    assert len(lines) == 3 and lines[1:] == ["a", "a"]
    assert lines[0].startswith("warning: cannot write the log /dev/full: No space left")


class Terminal(io.StringIO):
    """A stream that is one."""

    def isatty(self) -> bool:
        return True


class Wrapped(io.TextIOWrapper):
    """A stream of Python that is a terminal, or none."""

    def __init__(self, encoding: str, is_terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize(
    "utf8_mode, is_terminal, of_terminal, encoding",
    [
        (1, True, "GBK", "gbk"),
        (1, True, "ISO-8859-1", "iso-8859-1"),
        (1, True, "UTF-8", "utf-8"),
        (1, True, "", "utf-8"),
        (1, True, "ANSI_X3.4-1968", "utf-8"),
        (1, False, "GBK", "utf-8"),
        (0, True, "GBK", "utf-8"),
    ],
)
def test_a_terminal_gets_the_encoding_that_it_shows(
    utf8_mode: int,
    is_terminal: bool,
    of_terminal: str,
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's UTF-8 mode is about files; the locale C says ASCII of every terminal."""
    import locale

    flags = SimpleNamespace(utf8_mode=utf8_mode)
    fake = SimpleNamespace(flags=flags, stdout=sys.stdout, stderr=sys.stderr)
    monkeypatch.setattr(output, "sys", fake)
    asked: List[int] = []
    monkeypatch.setattr(locale, "nl_langinfo", lambda item: asked.append(item) or of_terminal)
    streams = Wrapped("utf-8", is_terminal), Wrapped("utf-8", is_terminal)
    Output(*streams, Redactor())
    for stream in streams:
        assert stream.encoding.lower() == encoding and stream.errors == "backslashreplace"
    assert set(asked) <= {locale.CODESET}


@pytest.mark.parametrize(
    "mode, is_terminal, env, colours",
    [
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"NO_COLOR": ""}, True),
        ("auto", True, {"TERM": "dumb"}, False),
        ("auto", True, {"TERM": "xterm"}, True),
        ("always", False, {"NO_COLOR": "1", "TERM": "dumb"}, True),
        ("never", True, {}, False),
    ],
)
def test_colours_are_for_who_can_show_them(
    mode: str, is_terminal: bool, env: Dict[str, str], colours: bool
) -> None:
    assert wants_colour(mode, is_terminal, env) is colours


def test_lines_fit_the_terminal_and_are_whole_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "9")
    words = "one two three four five six seven eight nine ten"
    out, err = Terminal(), Terminal()
    said = Output(out, err, Redactor())
    assert (said.width, said.err_width, said.has_times) == (30, 30, False)
    said.result(words, fit=True)
    said.line(words)
    assert max(map(len, out.getvalue().splitlines())) <= 30
    assert out.getvalue() == err.getvalue() and out.getvalue().count("\n") == 2
    said.result(words)
    assert out.getvalue().endswith(f"\n{words}\n")
    said.has_times = True
    said.line(words)
    assert max(map(len, err.getvalue().splitlines())) <= 30
    piped = Output(io.StringIO(), io.StringIO(), Redactor())
    assert (piped.width, piped.err_width, piped.has_times) == (1000, 1000, True)
    piped.result(words, fit=True)
    piped.line(f"{words}\n{words}")
    assert piped.out.getvalue() == f"{words}\n"  # type: ignore[attr-defined]
    lines = piped.err.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert all(re.fullmatch(rf"\d\d:\d\d:\d\dZ {words}", line) for line in lines)


@pytest.mark.parametrize("mode, coloured", [("always", True), ("never", False)])
def test_results_and_lines_are_coloured(mode: str, coloured: bool) -> None:
    out, err = io.StringIO(), io.StringIO()
    reporter = Reporter("none", 0, out, err)
    reporter.result("m  running")
    assert "\x1b[" not in out.getvalue()
    reporter.set_colour(mode)
    reporter.result("warning: x")
    reporter.say("warning: x")
    assert ("\x1b[" in out.getvalue() + err.getvalue()) == coloured


@pytest.mark.parametrize("encoding, plain", [("utf-8", True), ("UTF8", True), ("ascii", False)])
def test_json_is_for_the_encoding_of_its_reader(encoding: str, plain: bool) -> None:
    raw = io.BytesIO()
    said = Output(io.TextIOWrapper(raw, encoding), io.StringIO(), Redactor())
    said.json_result({"a": "\xe8", "b": "\x9b"})
    text = raw.getvalue().decode("utf-8")
    assert ("\xe8" in text) == plain and "\x9b" not in text
    assert text.startswith('{\n  "a"') and json.loads(text) == {"a": "\xe8", "b": "\x9b"}
    said = Output(io.StringIO(), io.StringIO(), Redactor())
    said.json_result("\xe8")
    assert said.out.getvalue() == '"\xe8"\n'  # type: ignore[attr-defined]


class LastLine:
    """Notes when it is taken away and shown again."""

    def __init__(self, err: io.StringIO) -> None:
        self._err = err

    def clear(self) -> None:
        self._err.write("<")

    def refresh(self) -> None:
        self._err.write(">")


def test_what_is_said_stands_above_the_last_line() -> None:
    err = io.StringIO()
    said = Output(io.StringIO(), err, Redactor())
    said.has_times = False
    said.last_line = LastLine(err)
    said.line("a")
    said.json_line({"b": "hf_" + 34 * "a", "c": "\xe8\x9b"})
    assert err.getvalue() == '<a\n><{"b": "hf_***", "c": "\xe8\\u009b"}\n>'


class Broken(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self._error = error

    def flush(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    "error, raised",
    [(BrokenPipeError(32, "Broken pipe"), None), (OSError(28, "full"), "write the result: full")],
)
def test_an_output_that_breaks_is_silenced(
    error: OSError, raised: Optional[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is buffered would fail once more when Python ends."""
    silenced: List[int] = []
    monkeypatch.setattr(output, "silence", silenced.append)
    said = Output(Broken(error), Broken(error), Redactor())
    said.line("a")
    assert silenced == [2]
    if raised:
        with pytest.raises(Exception, match=raised) as caught:
            said.result("a")
        assert "run the same command again" in caught.value.next_step  # type: ignore[attr-defined]
    else:
        said.result("a")
        with pytest.raises(output.ReaderGone):
            said.show("a")
    assert silenced == [2, 1]


def test_silence_is_nowhere(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
    output.silence(fd)
    os.write(fd, b"text")
    os.close(fd)
    assert not (tmp_path / "x").read_bytes()


def test_closed_streams_are_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: Any = SimpleNamespace(flags=sys.flags, stdout=None, stderr=None)
    monkeypatch.setattr(output, "sys", closed)
    said = Output(None, None, Redactor())
    said.result("a")
    said.line("b")
    assert said.out is said.err


def test_what_is_not_asked_for_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No JSON, no schema, no limit of a wait."""
    reporter = Reporter("none", as_json=True)
    reporter.adjust("none", 0)
    assert reporter.schema == ""
    reporter.result_of("text", {"a": 1})
    assert capsys.readouterr().out == "text\n"
    with reporter.clock("waiting") as clock:
        assert (clock.doing, clock.limit_s) == ("waiting", 0)
    with reporter.clock("waiting", 5.0) as clock:
        assert clock.limit_s == 5.0
    reporter.open_log(tmp_path / "log", "json")
    reporter.result_json({"a": "\xe8"})
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert json.loads(last)["message"] == '{"schema": "", "a": "\xe8"}'
