# SPDX-License-Identifier: Apache-2.0
"""The side of tests/mutate.py within pytest (-p support.judging): takes from $MUTATE_PLAN what to
run, and notes in $MUTATE_NOTES what became of each test and what it took; with `map` in the plan
also which functions of the rooms each test calls (traced.py).

Seconds are those of processors, of the tests and all programs that they waited for: a machine that
is busy with other things changes little of them. Only the limit of a single test is in seconds of
a clock, for a test that hangs uses no processor; tests/mutate.py asks such a test a second time.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
from hypothesis import HealthCheck, settings

PLAN: Dict[str, Any] = {}  # pytest reads this room for examples, too, and then there is none
if "MUTATE_PLAN" in os.environ:
    PLAN.update(json.loads(Path(os.environ["MUTATE_PLAN"]).read_text()))
SEEN = Path(".mutate-seen")
TRACED = "_called"  # of traced.py, in the package hfship
WRITE_S = 5  # the notes of a map are long
notes: Dict[str, Dict[str, Any]] = {}
written = [0.0]  # when


def pytest_configure() -> None:
    """Nothing fails because the machine is slow: that is no fault of a mutant."""
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("mutate", patient)
    settings.load_profile("mutate")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """What is wanted, in the order of the plan; to be mapped is all that runs anywhere."""
    if PLAN["map"]:
        for item in items:
            item.add_marker(pytest.mark.timeout(PLAN["limit"]), append=False)
        return
    limits: Dict[str, float] = PLAN["wanted"]
    order = {name: place for place, name in enumerate(limits)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in order])
    items[:] = sorted(
        (item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid]
    )
    for item in items:
        item.add_marker(pytest.mark.timeout(limits[item.nodeid]), append=False)


def used_s() -> float:
    """Seconds of processors that this process and those it waited for have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Sinks:
    """The files into which functions are written, one for each test and each shared fixture."""

    def __init__(self) -> None:
        self._files: Dict[str, Path] = {}
        self._open: List[str] = []

    def enter(self, name: str) -> None:
        """What is called from now on belongs to a test or a fixture."""
        self._open.append(name)
        self._point()

    def leave(self) -> None:
        """Back to the test that asked for a fixture."""
        self._open.pop()
        self._point()

    def _point(self) -> None:
        if not self._open:
            return
        path = self._files.setdefault(self._open[-1], SEEN / f"{len(self._files)}")
        path.touch()
        path.chmod(0o666)
        link = SEEN / "next"
        link.symlink_to(path.name)
        link.rename(SEEN / "current")
        called = getattr(sys.modules.get("hfship"), TRACED, None)
        if called is not None:
            called.clear()

    def functions(self, names: List[str]) -> Set[str]:
        """What some tests and fixtures called."""
        found: Set[str] = set()
        for name in names:
            if name in self._files:
                found.update(self._files[name].read_text("utf-8").splitlines())
        return found


def name_of(fixturedef: Any) -> str:
    """A fixture, told from others of its name in other files."""
    return f"fixture {fixturedef.baseid}::{fixturedef.argname}"


def fixtures_of(item: pytest.Item) -> List[str]:
    """Those that a test can use."""
    known: Dict[str, Any] = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    return [name_of(one) for found in known.values() for one in found]


sinks = Sinks()
shared_s: Dict[str, float] = {}  # what each shared fixture took, without those that it asked for


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[None]:
    """What a shared fixture calls belongs to all tests that use it, not to the first alone, and so
    does what it takes."""
    if not PLAN["map"] or fixturedef.scope == "function":
        return (yield)  # type: ignore[return-value]
    name = name_of(fixturedef)
    known, used = sum(shared_s.values()), used_s()
    sinks.enter(name)
    try:
        return (yield)  # type: ignore[return-value]
    finally:
        sinks.leave()
        of_others = sum(shared_s.values()) - known
        shared_s[name] = shared_s.get(name, 0.0) + used_s() - used - of_others


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measure a test with all that it sets up, and note it at once: the next may be the last."""
    name = item.nodeid
    note = notes.setdefault(name, {"outcome": "passed", "cpu": 0.0, "wall": 0.0})
    if PLAN["map"]:
        sinks.enter(name)
    used, started, known = used_s(), time.monotonic(), sum(shared_s.values())
    try:
        return (yield)  # type: ignore[return-value]
    finally:
        of_fixtures = sum(shared_s.values()) - known
        note["cpu"] = round(used_s() - used - of_fixtures, 3)
        note["wall"] = round(time.monotonic() - started, 3)
        if PLAN["map"]:
            sinks.leave()
            fixtures = fixtures_of(item)
            note["saw"] = sorted(sinks.functions([name, *fixtures]))
            note["shared"] = {one: round(shared_s[one], 3) for one in fixtures if one in shared_s}
        if not PLAN["map"] or time.monotonic() - written[0] > WRITE_S:
            write_notes()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What did not pass stays so. It is noted before -x ends the run."""
    note = notes.setdefault(report.nodeid, {"outcome": "passed", "cpu": 0.0, "wall": 0.0})
    if note["outcome"] == "passed":
        note["outcome"] = report.outcome
    if report.failed and "Failed: Timeout" in str(report.longrepr):
        note["outcome"] = "hung"


def pytest_sessionfinish() -> None:
    """All that was noted."""
    write_notes()


def write_notes() -> None:
    """Whole or not at all: whoever runs us may end us at any time."""
    written[0] = time.monotonic()
    path = Path(os.environ["MUTATE_NOTES"])
    fresh = path.with_name(path.name + ".next")
    fresh.write_text(json.dumps(notes))
    fresh.rename(path)
