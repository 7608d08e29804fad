# SPDX-License-Identifier: Apache-2.0
"""How the end of a probe becomes a finding, and what all of them say; test_doctor.py has real ones."""

from __future__ import annotations

import contextlib
import threading
import time
from http.client import BadStatusLine
from typing import Any, Iterator, List, Tuple

import pytest

from hfship.base.errors import AuthError, Exit, HostError, NetworkError
from hfship.hub.retry import RetryableError
from hfship.ops import probe as room
from hfship.ops.probe import Diagnosis, Finding, Probe, ProbeWarning, local_probe

SILENT = Probe("x", str).when_silent


def raising(error: BaseException) -> Any:
    def work() -> str:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda: "fine", Finding("x", "ok", "fine")),
        (raising(ProbeWarning("slow")), Finding("x", "warn", "slow")),
        (raising(ProbeWarning("slow", "wait")), Finding("x", "warn", "slow", "wait")),
        (
            raising(AuthError("refused", "401", "hf auth login")),
            Finding("x", "fail", "refused: 401", "hf auth login", Exit.AUTH),
        ),
        (raising(HostError("gone", "", "")), Finding("x", "fail", "gone", "", Exit.HOST)),
        (
            raising(ConnectionResetError("reset by peer")),
            Finding("x", "fail", "reset by peer", SILENT, Exit.NETWORK),
        ),
        (
            raising(BadStatusLine("SSH-2.0")),
            Finding("x", "fail", "SSH-2.0", SILENT, Exit.NETWORK),
        ),
        (raising(ValueError("no date")), Finding("x", "fail", "no date", SILENT, Exit.NETWORK)),
        (
            raising(RetryableError("it is busy")),
            Finding("x", "fail", "it is busy", SILENT, Exit.NETWORK),
        ),
    ],
)
def test_however_a_probe_ends_that_is_a_finding(work: Any, found: Finding) -> None:
    assert Probe("x", work).examine() == found


def test_a_fault_of_ours_is_no_finding() -> None:
    with pytest.raises(KeyError):
        Probe("x", raising(KeyError("x"))).examine()


class Watched:
    """A reporter that notes its clocks."""

    def __init__(self) -> None:
        self.clocks: List[Tuple[str, float]] = []

    @contextlib.contextmanager
    def clock(self, text: str, limit_s: float) -> Iterator[None]:
        self.clocks.append((text, limit_s))
        yield


def test_a_probe_that_hangs_is_left_when_its_time_is_over() -> None:
    go_on = threading.Event()

    def hang() -> str:
        go_on.wait(60)
        return ""

    reporter: Any = Watched()
    found = Probe("x", hang, 0.02, when_silent="look", code=Exit.DISK).run(reporter)
    assert found == Finding("x", "fail", "no answer in 0 s", "look", Exit.DISK)
    running = Probe("y", hang, 3.6, when_silent="look").start()
    assert running._thread.daemon
    go_on.set()
    running._thread.join(60)
    assert running.result(reporter) == Finding("y", "ok", "")
    assert reporter.clocks == [("looking at x", 0.02), ("looking at y", 3.6)]


def test_a_probe_that_takes_a_while_is_waited_for() -> None:
    began = threading.Event()

    class Begins(Watched):
        """Whose clock lets the probe go on."""

        @contextlib.contextmanager
        def clock(self, text: str, limit_s: float) -> Iterator[None]:  # noqa: ARG002
            began.set()
            yield

    def work() -> str:
        began.wait(60)
        time.sleep(0.05)
        return "late"

    reporter: Any = Begins()
    assert Probe("x", work, 60.0).run(reporter) == Finding("x", "ok", "late")


def test_the_seconds_of_a_silent_probe_are_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.RunningProbe, "_run", lambda _: None)
    reporter: Any = Watched()
    assert Probe("x", str, 4.6).run(reporter).text == "no answer in 5 s"


def test_a_probe_of_this_machine_is_no_matter_of_the_network() -> None:
    made = local_probe("disk", str)
    assert (made.check, made.limit_s, made.required) == ("disk", room.PROBE_TIMEOUT_S, False)
    assert made.code == Exit.HOST and made.when_silent.startswith("hfship doctor --offline")
    assert local_probe("disk", str, 60.0).limit_s == 60.0
    plain = Probe("dns", str)
    assert (plain.limit_s, plain.required, plain.code) == (5.0, False, Exit.NETWORK)


FINDINGS = [
    Finding("dns", "ok", "hub is 10.0.0.1"),
    Finding("token", "fail", "refused", "hfship login", Exit.AUTH),
    Finding("disk", "warn", "full", "hfship clean"),
    Finding("speed", "fail", "none", "hfship login", Exit.NETWORK),
]


def test_what_is_said_of_all_findings() -> None:
    """A step that several ask for is said once."""
    lines = Diagnosis(FINDINGS).text().splitlines()
    cells = [line.split() for line in lines[:4]]
    assert [row[:2] for row in cells] == [[one.state, one.check] for one in FINDINGS]
    assert [" ".join(row[2:]) for row in cells] == [one.text for one in FINDINGS]
    steps = ["token, speed: hfship login", "disk: hfship clean"]
    assert lines[4:6] == [f"next  {step}" for step in steps]
    assert lines[6:] == ["2 problems, 1 warning"]


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        (FINDINGS, Exit.AUTH),
        (FINDINGS[2:], Exit.NETWORK),
        (FINDINGS[2:3], Exit.OK),
        ([], Exit.OK),
        ([Finding("x", "fail", "", "", NetworkError.code)], Exit.NETWORK),
    ],
)
def test_the_exit_code_is_that_of_the_first_failure(findings: List[Finding], code: Exit) -> None:
    assert Diagnosis(findings).exit_code == code


def test_findings_for_programs() -> None:
    rows = Diagnosis(FINDINGS).json()
    assert rows[1] == {
        "check": "token",
        "state": "fail",
        "note": "refused",
        "next": "hfship login",
        "exit_code": Exit.AUTH,
    }
    assert [row["check"] for row in rows] == [one.check for one in FINDINGS]
    assert rows[0]["exit_code"] == 0 and rows[0]["next"] == ""
