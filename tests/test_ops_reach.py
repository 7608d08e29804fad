# SPDX-License-Identifier: Apache-2.0
"""What a host of the site is asked and what its answer means, with answers that are written here;
test_reach.py has programs."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Type

import pytest

from hfship.base.errors import (
    AuthError,
    DiskError,
    HfshipError,
    HostError,
    IncompleteError,
    IntegrityError,
    Interrupted,
    NetworkError,
    NotFoundError,
    UsageError,
)
from hfship.base.processes import Completed
from hfship.base.settings import FOLDERS
from hfship.ops import reach
from hfship.ops.destination import SSH_OPTIONS
from hfship.ops.reach import FarHost, FarResult, at_once, destination_of, failure_of, rows_of
from hfship.site.hosts import SiteHost

OPTIONS = " ".join(("ssh -o BatchMode=yes", *SSH_OPTIONS))


@pytest.mark.parametrize(
    ("host", "ssh", "where"),
    [
        (SiteHost("a"), OPTIONS, "a"),
        (SiteHost("a", local=True, user="ops", port=22), "", ""),
        (SiteHost("a", address="10.0.0.9", user="ops"), OPTIONS, "ops@10.0.0.9"),
        (SiteHost("a", address="fd00::1", user="ops"), OPTIONS, "ops@[fd00::1]"),
        (
            SiteHost("a", port=2200, key="/k", jump="j@b:2"),
            f"{OPTIONS} -p 2200 -i /k -J j@b:2",
            "a",
        ),
    ],
)
def test_how_ssh_reaches_a_host(host: SiteHost, ssh: str, where: str) -> None:
    to = destination_of(host)
    assert (to.host, to.folder, to.ssh) == (where, host.data, tuple(ssh.split()))


def test_folders_there_are_reached_the_same_way() -> None:
    host = FarHost(SiteHost("a", user="ops", port=2200, data="/d"))
    to = host.at("/d/x")
    assert (to.host, to.folder, to.ssh) == ("ops@a", "/d/x", destination_of(host.host).ssh)
    assert (host.name, host.program) == ("a", "/d/hfship.pyz")


def test_the_program_that_is_brought_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.ops.reach.own_content", lambda: b"PK program")
    assert reach.program_bytes() == b"PK program"
    monkeypatch.setattr("hfship.ops.reach.own_content", lambda: b"")
    with pytest.raises(UsageError, match="this runs from source") as caught:
        reach.program_bytes()
    assert caught.value.next_step.startswith("make build")


# -- what the answer means


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        (0, '{"a": 1}\n', "", FarResult(0, {"a": 1})),
        (6, " [1, 2] ", "", FarResult(6, [1, 2])),
        (5, " \n", "said", FarResult(5, None)),
        (0, "Welcome!" + "x" * 300, "", ("answers what is no result", "x" * 300, "by hand")),
        (127, "", "y" + "n" * 300, ("a has no python3", "n" * 300, "install python3")),
    ],
)
def test_what_was_printed_is_the_result(code: int, out: str, err: str, expected: Any) -> None:
    host = FarHost(SiteHost("a"))
    done = Completed(code, out, err)
    if isinstance(expected, FarResult):
        assert host._result_of(done) == expected
        return
    what, why, step = expected
    with pytest.raises(HostError, match=what) as caught:
        host._result_of(done)
    assert caught.value.why == why and step in caught.value.next_step


@pytest.mark.parametrize(
    ("stopped", "ended", "kind", "what"),
    [
        (True, "", NetworkError, "a does not answer"),
        (True, "no answer within 60 s", HostError, "a does not answer"),  # the words of the latter
        (False, "no answer within 60 s", HostError, "a does not answer"),
        (False, "", NetworkError, "the connection to a broke"),
    ],
)
def test_why_there_is_no_answer(
    stopped: bool, ended: str, kind: Type[HfshipError], what: str
) -> None:
    host = FarHost(SiteHost("a"))
    if stopped:
        host.stop.set()
    error = host._no_answer(Completed(255, "", "", ended))
    assert type(error) is kind and error.what == what
    assert (error.why == "it took too long") == (stopped and not ended)


KINDS = (
    UsageError,
    IncompleteError,
    AuthError,
    NotFoundError,
    IntegrityError,
    DiskError,
    NetworkError,
    HostError,
    Interrupted,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_there_is_of_the_same_class_here(kind: Type[HfshipError]) -> None:
    error = {"what": "no x", "why": "because", "next": ""}
    row = {"error": error, "exit_code": int(kind.code)}
    failure = failure_of("gpu1", FarResult(int(kind.code), row))
    assert type(failure) is kind
    assert (failure.what, failure.why, failure.next_step) == ("gpu1: no x", "because", "")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, None),
        ([], None),
        ({"error": None}, None),
        ([{"error": {"what": "first"}}, {"ok": 1}], "g: first"),
        ([{"error": {"what": "first"}}, {"error": {"what": "last"}}], "g: last"),
        ([{"error": {"what": "odd"}, "exit_code": 99}], "g: odd"),
        (["text", {"error": {}}], "g: "),
    ],
)
def test_the_last_row_that_failed_is_told(value: Any, what: Optional[str]) -> None:
    failure = failure_of("g", FarResult(1, value))
    if what is None:
        assert failure is None
    else:
        assert failure and (failure.what, failure.why, failure.next_step) == (what, "", "")
        assert type(failure) is HostError


def test_rows_of_a_result() -> None:
    row: Dict[str, Any] = {"a": 1}
    assert rows_of(row) == [row] and rows_of([row, 3, row]) == [row, row]
    assert rows_of(None) == rows_of("text") == []


# -- asking


class Played(FarHost):
    """A host whose answers are given."""

    def __init__(self, *answers: Any, **fields: Any) -> None:
        self.said: List[str] = []
        super().__init__(SiteHost("a", **fields), self.said.append)
        self.answers = list(answers)
        self.asked_for: List[Any] = []

    def _run(self, sha256: str, words: Any, silence_s: float) -> Any:
        self.asked_for.append((sha256, words, silence_s))
        return self.answers.pop(0)

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """What was put there, and whether its time runs."""
        self.asked_for.append((path, content, mode, self.asked_at))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("hfship.ops.reach.own_content", lambda: b"program")
    return hashlib.sha256(b"program").hexdigest()


OK, ABSENT = Completed(0, '{"ok": 1}', ""), Completed(76, "", "")


def test_the_program_is_brought_where_it_is_not(program: str) -> None:
    host = Played(ABSENT, OK, data="/d")
    began = host.asked_at
    assert host.hfship("list", Path("/x"), silence_s=7.0) == FarResult(0, {"ok": 1})
    asked = (program, ["list", "/x", "--json"], 7.0)
    brought = ("/d/hfship.pyz", b"program", 0o755, float("inf"))
    assert host.asked_for == [asked, brought, asked]
    assert host.said == ["bringing hfship.pyz"] and began <= host.asked_at < float("inf")


def test_a_host_that_does_not_keep_the_program_is_left(program: str) -> None:
    host = Played(ABSENT, ABSENT, data="/d")
    with pytest.raises(HostError, match="a does not keep /d/hfship.pyz"):
        host.hfship("list")
    assert [len(one) for one in host.asked_for] == [3, 4, 3, 4]
    assert host.asked_for[0] == (program, ["list", "--json"], reach.SILENCE_S)


IN_USE = FarResult(7, {"error": {"what": "x is in use by 7"}, "exit_code": 7})
BAD = FarResult(7, {"error": {"what": "x is full"}, "exit_code": 7})


@pytest.mark.parametrize(
    ("answers", "takes_s", "stops", "asked", "what"),
    [
        ([FarResult(0, {"a": 1})], 0, False, 1, ""),
        ([BAD], 0, False, 1, "a: x is full"),
        ([IN_USE, IN_USE, FarResult(0, {"a": 1})], 10, False, 3, ""),
        ([IN_USE, BAD], 10, False, 2, "a: x is full"),
        ([IN_USE, IN_USE], 10, True, 1, "a: x is in use by 7"),
        ([IN_USE] * 9, reach.IN_USE_S, False, 2, "a: x is in use by 7"),
        ([IN_USE] * 9, reach.IN_USE_S + 1, False, 1, "a: x is in use by 7"),
    ],
)
def test_what_is_at_work_there_is_waited_for(
    answers: List[FarResult],
    takes_s: float,
    stops: bool,
    asked: int,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, calls, waits = [50.0], [], []
    host = Played()

    def hfship(*words: object, silence_s: float) -> FarResult:
        calls.append((words, silence_s))
        now[0] += takes_s
        return answers[len(calls) - 1]

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return stops

    monkeypatch.setattr(host, "hfship", hfship)
    monkeypatch.setattr(host, "stop", SimpleNamespace(wait=wait))
    monkeypatch.setattr("hfship.ops.reach.time", SimpleNamespace(monotonic=lambda: now[0]))
    if what:
        with pytest.raises(DiskError, match=what):
            host.asked("serve", 3, silence_s=9.0)
    else:
        assert host.asked("serve", 3, silence_s=9.0) == {"a": 1}
    assert calls == [(("serve", 3), 9.0)] * asked
    told = len(waits)
    assert waits == [reach.IN_USE_POLL_S] * told
    assert host.said == ["an earlier run is at work there: waiting for it"] * told


def follow(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[str], List[str]], **fields: Any
) -> List[Any]:
    """What is started for a run there; its lines come from the mark in the script."""
    started: List[Any] = []

    def follow_program(argv: Any, stop: Any, script: str, take: Any, silence_s: float) -> Any:
        started.append((argv, stop, script, silence_s))
        found = re.search(r"hfship-[0-9a-f]{16}", script)
        assert found
        kept = [line for line in lines(found[0]) if not take(line)]
        values = {"code": 0, "out": "\n".join(kept), "err": "err", **fields}
        return Completed(**values)

    monkeypatch.setattr("hfship.ops.reach.follow_program", follow_program)
    return started


@pytest.mark.parametrize("local", [True, False])
def test_a_command_runs_there_with_the_folders_of_the_host_alone(
    local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: List[str] = []
    host = FarHost(SiteHost("a", data="/da ta", local=local), said.append)
    started = follow(
        monkeypatch,
        lambda mark: [
            "Welcome",
            "",
            f"{mark} end",
            f"{mark} begin",
            "{",
            "  ",
            f" {mark} end 5",
            f"{mark} end 5678",
            "}",
            f"{mark} end 6",
        ],
    )
    done = host._run("f" * 64, ["list", "it's"], 7.0)
    mark = said[1].split()[0]
    assert done == Completed(6, f"{{\n  \n {mark} end 5\n{mark} end 5678\n}}", "err")
    assert said == ["Welcome", f"{mark} end"], "empty lines are not told"
    ((argv, stop, script, silence_s),) = started
    assert argv == (["sh"] if local else [*OPTIONS.split(), "--", "a", "sh"])
    assert stop is host.stop and silence_s == 7.0
    assert "f" * 64 + "'  ''/da ta/hfship.pyz' | sha256sum" in script
    assert "list 'it'\"'\"'s' 2>&4" in script
    variables = shlex.split(script.partition("env ")[2].partition(" python3")[0])
    assert variables[:2] == ["-u", "HFSHIP_MODELS_FILE"]
    folders = dict(word.split("=") for word in variables[2:])
    assert folders == {FOLDERS[name].variable: at for name, at in host.host.folders.items()}
    assert folders["HFSHIP_DEPLOY_DIR"] == "/da ta/deploy"


def test_a_run_without_a_mark_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FarHost(SiteHost("a"))
    follow(monkeypatch, lambda mark: [f"{mark} begin", "{}"], code=255)
    with pytest.raises(NetworkError, match="the connection to a broke"):
        host._run("f" * 64, ["list"], 7.0)


def test_scripts_are_run_in_its_data_folder_and_end_with_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = FarHost(SiteHost("a", data="/d"))
    asked: List[Any] = []

    def run(self: Any, script: str, stop: Any) -> Any:
        asked.append((self.folder, script, stop))
        return Completed(0, "out", "")

    monkeypatch.setattr("hfship.ops.destination.Destination.run", run)
    assert host.sh("true").out == "out" and asked == [("/d", "true", host.stop)]


def test_what_is_put_there_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = FarHost(SiteHost("a", data="/d"))
    scripts: List[str] = []
    answer = Completed(0, "", "")

    def sh(script: str) -> Completed:
        scripts.append(script)
        return answer

    monkeypatch.setattr(host, "sh", sh)
    host.put(f"{tmp_path}/a b/x", b"content", 0o640)
    subprocess.run(["sh"], input=scripts[0].encode(), check=True)
    made = tmp_path / "a b/x"
    assert made.read_bytes() == b"content" and made.stat().st_mode & 0o777 == 0o640
    assert base64.b64encode(b"content").decode() in scripts[0]
    partial = re.findall(r"\.x\.[0-9a-f]{8}\.incomplete", scripts[0])
    assert len(partial) == 3 and len(set(partial)) == 1
    host.put(f"{tmp_path}/x", b"")
    assert "chmod 644" in scripts[1] and partial[0] not in scripts[1]
    answer = Completed(73, "cannot write there", "")
    with pytest.raises(DiskError, match="cannot write to a:/d/sub"):
        host.put("/d/sub/x", b"")


# -- many at once


def far(*names: str, **fields: Any) -> List[FarHost]:
    return [FarHost(SiteHost(name, **fields)) for name in names]


def test_answers_come_in_the_order_of_the_hosts_with_the_errors_of_those_that_fail() -> None:
    failure = NetworkError("b is away", "", "")

    def work(host: FarHost) -> str:
        if host.name == "b":
            raise failure
        return host.name.upper()

    hosts = far("c", "b", "a")
    asked_at = [host.asked_at for host in hosts]
    answers = at_once(hosts, work)
    assert [host.asked_at for host in hosts] == asked_at, "without a limit no clock is looked at"
    assert list(answers.items()) == [("c", "C"), ("b", failure), ("a", "A")]
    assert at_once([], work) == {}


def test_who_interrupts_one_interrupts_all() -> None:
    hosts = far("a", "b")

    def work(host: FarHost) -> None:
        if host.name == "a":
            raise KeyboardInterrupt
        assert host.stop.wait(30)

    with pytest.raises(KeyboardInterrupt):
        at_once(hosts, work)
    assert all(host.stop.is_set() for host in hosts)


@pytest.mark.parametrize(
    ("timeout", "limit_s", "passed_s", "given_up"),
    [
        (0, 10.0, 11.0, True),
        (0, 10.0, 9.0, False),
        (20, 10.0, 11.0, False),  # that of the host wins
        (20, 10.0, 21.0, True),
        (5, 10.0, 6.0, True),
        (20, 0.0, 99.0, False),  # there is no limit at all
    ],
)
def test_a_host_is_given_up_when_its_time_is_over(
    timeout: int,
    limit_s: float,
    passed_s: float,
    given_up: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hfship.ops.reach.TICK_S", 0.001)
    now = [1000.0]
    looks = threading.Semaphore(0)

    def monotonic() -> float:
        looks.release()
        return now[0]

    monkeypatch.setattr("hfship.ops.reach.time", SimpleNamespace(monotonic=monotonic))
    (host,) = far("a", timeout=timeout)
    host.asked_at = 0.0  # long ago: an earlier question

    def work(host: FarHost) -> bool:
        if limit_s:
            for _ in range(3):
                assert looks.acquire(timeout=30)
        assert not host.stop.is_set()
        now[0] += passed_s
        if given_up:
            return host.stop.wait(30)
        if limit_s:
            for _ in range(5):
                assert looks.acquire(timeout=30)
        return host.stop.is_set()

    before = set(threading.enumerate())
    assert at_once([host], work, limit_s) == {"a": given_up}
    for watching in set(threading.enumerate()) - before:
        watching.join(60)
        assert not watching.is_alive()
    assert host.asked_at == (1000.0 if limit_s else 0.0)


def test_no_host_is_given_up_while_the_program_is_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.ops.reach.TICK_S", 0.001)
    (host,) = far("a")

    def work(host: FarHost) -> bool:
        host.asked_at = reach.NOT_YET
        return host.stop.wait(0.05)

    assert at_once([host], work, 0.01) == {"a": False}
