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

import pytest

from conftest import ROOT, Program
from hfship.base.errors import NetworkError
from hfship.base.redaction import redact
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
