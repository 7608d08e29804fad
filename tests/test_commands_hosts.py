# SPDX-License-Identifier: Apache-2.0
"""What all hosts say, as one answer; test_reach.py and test_site_hosts.py have hosts."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.errors import Exit, HostError
from hfship.commands.hosts import HostFindings, deployments_in, status_of_hosts
from hfship.ops import reach
from hfship.ops.reach import LOOK_S, FarHost
from hfship.site.hosts import SiteHost

OK = {"check": "docker", "state": "ok", "note": "27", "schema": "hfship-doctor/1"}
WARN = {"check": "disk", "state": "warn", "note": "full\nsoon", "next": "hfship clean"}
FAIL = {"check": "gpu", "state": "fail", "note": "gone", "exit_code": 7}


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([], 0, []),
        ([("a", OK), ("a", OK)], 0, ["a ok 2 checks"]),
        ([("a", WARN)], 0, ["a warn disk full; soon", "next a: hfship clean"]),
        ([("a", OK), ("b", FAIL), ("a", OK)], 7, ["a ok 2 checks", "b fail gpu gone"]),
        ([("a", {"state": "fail"})], 9, ["a fail"]),
        ([("a", FAIL), ("b", {**FAIL, "exit_code": 6})], 7, ["a fail gpu gone", "b fail gpu gone"]),
    ],
)
def test_what_doctor_found(rows: List[Tuple[str, Dict[str, Any]]], code: int, said: Any) -> None:
    findings = HostFindings(rows)
    assert findings.exit_code == Exit(code)
    lines = [" ".join(line.split()) for line in findings.text().splitlines()]
    assert [line for line in lines if line] == said
    assert findings.json() == [
        {"host": host, **{key: row[key] for key in row if key != "schema"}} for host, row in rows
    ]


def test_deployments_are_told_by_host_and_silent_hosts_are_failures() -> None:
    row = {
        "name": "m",
        "state": "healthy",
        "url": "http://x",
        "note": "",
        "uptime": 5,
        "restarts": 0,
    }
    error = HostError("no answer", "", "")
    answers = {"a": SimpleNamespace(value=[row, {"name": "x"}]), "b": error}
    rows, failures = deployments_in(answers)
    assert [(host, status.name, status.state) for host, status in rows] == [("a", "m", "healthy")]
    assert failures == {"b": error}


@pytest.mark.parametrize("repair", [False, True])
def test_status_of_all_hosts_gives_each_the_time_that_it_may_take(
    repair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host looks for as long as --hang-after at what may hang; it is asked as one would here."""
    asked: Dict[str, Any] = {}
    said: List[str] = []
    silent = HostError("b does not answer", "", "")
    rows = [{"name": "m", "state": "healthy", "url": "http://x", "note": "slow"}]

    def at_once(hosts: List[str], work: Any, limit_s: float) -> Dict[str, Any]:
        far = SimpleNamespace(hfship=lambda *words: asked.update(words=words))
        work(far)
        asked.update(hosts=hosts, limit_s=limit_s)
        return {"a": SimpleNamespace(value=rows), "b": silent}

    monkeypatch.setattr("hfship.commands.hosts.chosen_hosts", lambda _: ["a", "b"])
    monkeypatch.setattr("hfship.commands.hosts.at_once", at_once)
    args = SimpleNamespace(names=["m"], hang_after=300, repair=repair, grace=20)
    reporter = SimpleNamespace(
        width=100,
        clock=lambda *_: contextlib.nullcontext(),
        result_of=lambda text, _: said.append(text),
    )
    context: Any = SimpleNamespace(args=args, reporter=reporter)
    repaired: List[Any] = []

    def mend(found: Any, failures: List[str]) -> Exit:
        repaired.append(([host for host, _ in found], failures))
        return Exit.DISK

    code = status_of_hosts(context, lambda found: Exit(len(found) - 1), mend)
    more = ("--repair", "--grace", "20") if repair else ()
    assert asked == {
        "words": ("status", "m", "--hang-after", "300", *more),
        "hosts": ["a", "b"],
        "limit_s": LOOK_S + 300,
    }
    (text,) = said
    assert "healthy" in text and "a: m: slow" in text and "b does not answer" in text
    assert repaired == ([(["a"], ["b"])] if repair else []) and code == Exit.HOST


@pytest.mark.parametrize("timeout", [0, 3600])
def test_the_limit_of_a_host_begins_when_it_is_asked(timeout: int) -> None:
    """Not when it was first thought of: another question may have taken longer than the limit."""
    host = FarHost(SiteHost("a", local=True, timeout=timeout))
    host.asked_at -= 7200
    given_up = reach.at_once([host], lambda one: one.stop.wait(3 * reach.TICK_S), 1800)
    assert given_up == {"a": False}


@pytest.mark.parametrize(("timeout", "limit_s"), [(0, 0.001), (1, 3600)])
def test_a_host_that_takes_longer_than_its_limit_is_given_up(timeout: int, limit_s: float) -> None:
    host = FarHost(SiteHost("a", local=True, timeout=timeout))
    assert reach.at_once([host], lambda one: one.stop.wait(300), limit_s) == {"a": True}
