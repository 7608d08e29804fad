# SPDX-License-Identifier: Apache-2.0
"""What all hosts say, as one answer; test_reach.py and test_site_hosts.py have hosts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence, Tuple

import pytest

from hfship.base.errors import Exit, HostError, NetworkError, NotFoundError, UsageError
from hfship.base.settings import ListedModel, ModelsFile
from hfship.commands import hosts
from hfship.commands.hosts import HostFindings, deployments_in, status_of_hosts
from hfship.ops import reach
from hfship.ops.inventory import Inventory
from hfship.ops.reach import LOOK_S, FarHost
from hfship.site.hosts import HostFacts, SiteHost

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


# -- the hosts that are meant

TABLES = {"host": [{"name": "gpu1", "timeout": 7}, {"name": "gpu2"}, {"name": "gpu3"}]}


def context_of(on: Sequence[str] = (), tables: Any = TABLES, **args: Any) -> Any:
    """A context that notes what it is told."""
    said: List[Any] = []
    reporter = SimpleNamespace(
        said=said,
        width=100,
        clock=lambda *_: contextlib.nullcontext(),
        result_of=lambda *both: said.append(both),
        info=said.append,
    )
    file = ModelsFile(Path("/models.toml"), {}, (), ListedModel(""), tables=tables)
    return SimpleNamespace(args=SimpleNamespace(on=on, **args), reporter=reporter, file=file)


@pytest.mark.parametrize(
    ("on", "names"),
    [
        ((), ["gpu1", "gpu2", "gpu3"]),
        (("gpu3", "gpu1"), ["gpu1", "gpu3"]),
        (("gpu3,gpu2",), ["gpu2", "gpu3"]),
    ],
)
def test_hosts_are_meant_by_their_names_or_all_are(on: Sequence[str], names: List[str]) -> None:
    found = hosts.chosen_hosts(context_of(on))
    assert [one.name for one in found] == names
    assert found[0].host.timeout == (7 if names[0] == "gpu1" else 0)


def test_hosts_that_nobody_has_are_told() -> None:
    with pytest.raises(NotFoundError, match="no host is called gpu9; did you mean") as caught:
        hosts.chosen_hosts(context_of(["gpu1", "gpu9"]))
    assert caught.value.why == "/models.toml has gpu1, gpu2, gpu3"
    with pytest.raises(UsageError, match=r"/models.toml has no \[\[host\]\]"):
        hosts.chosen_hosts(context_of(tables={}))
    context = context_of()
    context.file = None
    with pytest.raises(UsageError, match="none is given") as missing:
        hosts.chosen_hosts(context)
    assert "--models FILE" in missing.value.next_step


# -- list and doctor


def test_a_list_of_hosts_is_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = Inventory(
        {"gpu1": HostFacts("gpu1", "no route")}, {"gpu1": HostError("no", "", "")}
    )
    monkeypatch.setattr(hosts, "take_inventory", lambda asked: inventory if len(asked) == 1 else 0)
    context = context_of(["gpu1"])
    assert hosts.list_hosts(context) == inventory.exit_code != Exit.OK
    assert context.reporter.said == [(inventory.text(), inventory.json())]


def test_doctor_tells_each_host_and_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be asked is told once, and a problem of docker by its own doctor alone."""
    silent = NetworkError("gpu1 does not answer", "no route", "ssh gpu1")
    facts = {
        "gpu1": HostFacts("gpu1", clock_offset_s=99.0, free=1),
        "gpu2": HostFacts("gpu2", "docker is down", free=1),
        "gpu3": HostFacts("gpu3", clock_offset_s=-61.0, free=1),
    }
    first: List[FarHost] = []

    def take_inventory(asked: List[FarHost]) -> Inventory:
        first.extend(asked)
        return Inventory(facts, {"gpu1": silent})

    def at_once(asked: List[FarHost], work: Any, limit_s: float) -> Dict[str, Any]:
        assert limit_s == hosts.DOCTOR_S and not set(map(id, asked)) & set(map(id, first))
        answer = SimpleNamespace(hfship=lambda *words: words)
        assert work(answer) == ("doctor", "--offline")
        rows = {"gpu2": [FAIL], "gpu3": [OK, OK]}
        found = {one.name: SimpleNamespace(value=rows.get(one.name)) for one in asked}
        return {**found, "gpu1": silent}

    monkeypatch.setattr(hosts, "take_inventory", take_inventory)
    monkeypatch.setattr(hosts, "at_once", at_once)
    context = context_of()
    assert hosts.diagnose_hosts(context) == Exit.NETWORK
    [(text, rows)] = context.reporter.said
    ssh = {"check": "ssh", "state": "fail", "note": "gpu1 does not answer: no route"}
    clock = "its clock is 1 min 01 s behind ours: set up NTP"
    assert rows == [
        {"host": "gpu1", **ssh, "next": "ssh gpu1", "exit_code": int(Exit.NETWORK)},
        {"host": "gpu2", **FAIL},
        {"host": "gpu3", "check": "docker", "state": "ok", "note": "27"},
        {"host": "gpu3", "check": "docker", "state": "ok", "note": "27"},
        {"host": "gpu3", "check": "site", "state": "warn", "note": clock, "next": ""},
    ]
    assert text == HostFindings([(row["host"], row) for row in rows]).text()


def test_an_error_without_a_reason_is_a_finding_by_itself() -> None:
    assert hosts._failed_finding(HostError("odd", "", ""))["note"] == "odd"


# -- status


def test_deployments_behind_odd_rows_and_silent_hosts_are_told() -> None:
    rows = [{"name": "job"}, {"name": "m", "state": "down", "gpus": [0, 1], "task": None}]
    answers = {"a": HostError("no answer", "", ""), "b": SimpleNamespace(value=rows)}
    [(host, status)], failures = deployments_in(answers)
    assert (host, status.name, status.gpus, status.task) == ("b", "m", ("0", "1"), "")
    assert list(failures) == ["a"]


def test_status_of_hosts_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Dict[str, Any] = {"gpu1": SimpleNamespace(value=[{"name": "m", "state": "healthy"}])}
    monkeypatch.setattr(hosts, "at_once", lambda *_: answers)
    args = {"names": [], "hang_after": 60, "repair": False}
    context = context_of(**args)
    assert status_of_hosts(context, lambda _: Exit.OK, lambda *_: Exit.OK) == Exit.OK
    answers["gpu2"] = NetworkError("gpu2 is silent", "", "")
    assert status_of_hosts(context, lambda _: Exit.OK, lambda *_: Exit.OK) == Exit.NETWORK
    (_, [row]), (_, rows) = context.reporter.said
    assert (row["host"], row["name"], row["state"]) == ("gpu1", "m", "healthy")
    assert rows[0] == row and rows[1]["name"] == "gpu2"
    assert rows[1]["error"]["what"] == "gpu2 is silent"
    answers.clear()
    status_of_hosts(context, lambda _: Exit.OK, lambda *_: Exit.OK)
    assert context.reporter.said[-1] == ("no deployments", [])
