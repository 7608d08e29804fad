# SPDX-License-Identifier: Apache-2.0
"""A start that is waited for, on a clock, a log and a docker made by hand; test_serve.py has programs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional

import pytest

from hfship.base.errors import DiskError, HostError, IncompleteError
from hfship.serve import start
from hfship.serve.start import restart_deployment, startup_failure, wait_until_it_answers
from hfship.serve.terms import Plan

PLAN = Plan(name="m", device="cpu", bind="127.0.0.1", port=8000, ready_timeout_s=100)


class Engine:
    """An engine, its docker, its log and the reporter, all on one clock."""

    def __init__(self, folder: Path) -> None:
        self.deployment: Any = SimpleNamespace(plan=PLAN, folder=folder)
        self.now = 1000.0
        self.began = 1000.0
        self.answers: List[Any] = []  # (seconds, status, works): from then on
        self.logs: List[Any] = []  # (seconds, text)
        self.container: Any = SimpleNamespace(id="1", restarts=0, started_at=1000.0)
        self.after: Any = None  # the container once docker was told
        self.trouble = ""
        self.told: List[str] = []
        self.said: List[str] = []
        self.doing = ""

    @property
    def seconds(self) -> float:
        return self.now - self.began

    def at(self, rows: List[Any]) -> Any:
        found = None
        for row in rows:
            if row[0] <= self.seconds:
                found = row
        return found

    def health(self, plan: Any) -> Any:
        self.now += 0.01  # each question takes a while
        row = self.at(self.answers)
        status = row[1] if row else 0
        works = bool(row and row[2])
        return SimpleNamespace(status=status, works=works, text=f"answer {status}", seconds=0.1)

    def log(self, name: str, lines: int, since: float = 0.0) -> Any:
        row = self.at(self.logs)
        at = self.began + row[0] if row else 0.0
        return SimpleNamespace(text=row[1] if row else "", last_at=at)

    def docker(self, words: List[str], *_: Any) -> str:
        self.told.append(" ".join(words))
        if self.after is not None:
            self.container = self.after
        return ""

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @contextlib.contextmanager
    def clock(self, text: str, limit_s: float) -> Iterator[Any]:
        self.said.append(f"clock {text} {limit_s:g}")
        yield self

    def warn(self, text: str) -> None:
        self.said.append(f"warn: {text}")

    def enter_phase(self, name: str, phase: str) -> None:
        self.said.append(f"{self.seconds:.0f} {phase}")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Engine(tmp_path)
    stall = SimpleNamespace(cause="its disk is slow", steps=["look", "wait"])
    patched: Dict[str, Any] = {
        "inspect_container": lambda _: made.container,
        "docker": made.docker,
        "compose": lambda _, *words: ["compose", *words],
        "forget_stop": lambda folder: made.told.append(f"forget {folder == tmp_path}"),
        "require_docker_room": lambda doing: made.told.append(f"room to {doing}"),
        "replace": lambda deployment, **_: deployment,
        "direct": lambda plan: plan,
        "read_health": made.health,
        "read_log": made.log,
        "ask_model": lambda *_: made.health(None),
        "container_trouble": lambda *_: made.trouble,
        "phase_of": lambda text: text or "starting",
        "log_tail": lambda _, lines: "\n".join(f"line {n}" for n in range(lines)),
        "explain": lambda *_: ("", ""),
        "stall_of": lambda *_: stall,
        "cpu_percent": lambda _: 5,
        "time": SimpleNamespace(
            monotonic=lambda: made.now, time=lambda: made.now, sleep=made.sleep
        ),
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.serve.start.{name}", value)
    return made


def waited(engine: Any, restarts: int = 0) -> Any:
    return wait_until_it_answers(engine.deployment, restarts, engine)


def test_what_ran_before_has_no_times(engine: Any) -> None:
    engine.answers, engine.logs = [(0, 200, True)], [(0, "the log")]
    found = waited(engine)
    assert (found.seconds, found.phases, found.log) == (0.0, {}, "the log")
    assert found.answer.works and found.phases_text() == ""
    assert engine.said == ["clock m: starting 100"]


def test_the_phases_of_a_start_are_said_and_timed(engine: Any) -> None:
    engine.logs = [(0, "starting"), (10, "loading, 1 %"), (12, "loading, 50 %"), (19, "compiling")]
    engine.answers = [(50, 200, True)]
    found = waited(engine)
    assert 50 <= found.seconds < 60
    assert list(found.phases) == ["starting", "loading", "compiling"]
    assert sum(found.phases.values()) == pytest.approx(found.seconds, abs=1.5)
    phases = [line.split(" ", 1)[1] for line in engine.said[1:]]
    assert phases[0] == "starting" and phases[1].startswith("loading") and "compiling" in phases
    assert sum(phase.startswith("loading") for phase in phases) == 1  # a percentage that grows
    assert engine.doing == "m: compiling"


@pytest.mark.parametrize(
    ("container", "trouble", "error"),
    [(None, "it is gone", HostError), ("there", "it ended with 1", HostError)],
)
def test_a_container_that_died_is_told_and_stopped(
    container: Optional[str], trouble: str, error: type, engine: Any
) -> None:
    if container is None:
        engine.container = None
    engine.trouble = trouble
    with pytest.raises(error, match=f"m did not start: {trouble}"):
        waited(engine)
    assert engine.told == ["compose stop"]


def test_an_api_that_refuses_does_not_come_right_by_waiting(engine: Any) -> None:
    engine.answers = [(0, 404, False)]
    with pytest.raises(HostError, match="m refuses requests") as caught:
        waited(engine)
    assert (caught.value.why, caught.value.next_step) == ("answer 404", "hfship logs m")


@pytest.mark.parametrize("status", [0, 500, 503])
def test_when_the_time_is_up_it_goes_on_loading(status: int, engine: Any) -> None:
    engine.answers = [(0, status, False)]
    engine.logs = [(number, f"loading {number}%") for number in range(200)]
    with pytest.raises(IncompleteError, match="m does not answer after 1 min 40 s") as caught:
        waited(engine)
    assert "(loading " in caught.value.what
    assert "hfship serve m waits again" in caught.value.next_step
    assert "last answer" in caught.value.why and "line 0" in caught.value.why
    assert 100 < engine.seconds < 110


def test_a_log_that_stands_still_is_told_once(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.serve.start.STALLED_AFTER_S", 20)
    engine.logs = [(0, "loading"), (40, "loading more"), (41, "compiling")]
    engine.answers = [(80, 200, True)]
    waited(engine)
    warned = [line for line in engine.said if line.startswith("warn")]
    assert len(warned) == 2  # and again after it went on
    assert "m is stalled: nothing new in its log for" in warned[0]
    assert warned[0].endswith("(loading); its disk is slow\n  try  look\n  try  wait")


@pytest.mark.parametrize(
    ("before", "after", "restarts"),
    [("1", "1", 4), ("1", "2", 0), (None, "2", 0)],
)
def test_restarts_are_counted_of_the_same_container(
    before: Optional[str], after: str, restarts: int, engine: Any
) -> None:
    engine.container = SimpleNamespace(id=before, restarts=4) if before else None
    engine.after = SimpleNamespace(id=after, restarts=9)
    assert start.start(engine.deployment) == restarts
    assert engine.told == ["room to start m", "compose up -d", "forget True"]


def test_a_container_that_is_there_is_restarted(engine: Any) -> None:
    engine.after = SimpleNamespace(id="1", restarts=9)
    assert restart_deployment(engine.deployment, engine) == 9
    assert engine.told == ["restart vllm_m", "forget True"]
    engine.told.clear()
    engine.container, engine.after = None, None
    assert restart_deployment(engine.deployment, engine) == 0
    assert "compose up -d" in engine.told


@pytest.mark.parametrize(
    ("cause", "step", "what", "next_step"),
    [
        ("", "", "m did not start: it ended", "hfship logs m"),
        ("no memory", "use less", "m did not start: it ended; no memory", "use less"),
    ],
)
def test_why_it_did_not_start(
    cause: str, step: str, what: str, next_step: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.serve.start.explain", lambda *_: (cause, step))
    error = startup_failure(engine.deployment, "it ended")
    assert (error.what, error.next_step) == (what, next_step)
    lines = error.why.splitlines()
    assert lines[0] == "the end of its log:" and len(lines) == start.TAIL_LINES + 1
    assert lines[-1] == f"line {start.PROGRESS_LINES - 1}"


@pytest.mark.parametrize("root", ["", "/nowhere", "here"])
def test_room_is_asked_for_where_docker_keeps_its_data(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []

    def require_room(folder: Path, *words: Any) -> None:
        asked.append(folder)
        raise DiskError("no room", "", "")

    place = str(tmp_path) if root == "here" else root
    monkeypatch.setattr("hfship.serve.start.engine_info", lambda: SimpleNamespace(root=place))
    monkeypatch.setattr("hfship.serve.start.require_room", require_room)
    if root == "here":
        with pytest.raises(DiskError):
            start.require_docker_room("start m")
        assert asked == [tmp_path]
    else:
        start.require_docker_room("start m")
        assert asked == []


# -- looks and pauses


ANSWERS, SILENT = SimpleNamespace(status=503, text=""), SimpleNamespace(status=0, text="refused")
OTHER = SimpleNamespace(status=0, text="reset")


@pytest.mark.parametrize(
    ("before", "waited_s", "bind", "later", "passed", "asked"),
    [
        (ANSWERS, 0, "x", [], 0.0, 0),  # it answers: the first request is asked at once
        (ANSWERS, 3, "x", [], 1.0, 0),
        (ANSWERS, 30, "x", [], 2.0, 0),  # a fifteenth of the time that it takes already
        (ANSWERS, 3000, "x", [], 5.0, 0),
        (SILENT, 0, "", [], 1.0, 0),  # nobody here can ask it
        (SILENT, 0, "x", [SILENT] * 99, 1.0, 10),
        (SILENT, 45, "x", [SILENT] * 99, 3.0, 30),
        (SILENT, 45, "x", [SILENT, SILENT, ANSWERS], 0.3, 3),
        (SILENT, 45, "x", [OTHER] * 99, 1.1, 11),  # not within the first second
        (SILENT, 45, "x", [*[SILENT] * 20, OTHER], 2.1, 21),
    ],
)
def test_how_long_until_the_next_look(
    before: Any,
    waited_s: float,
    bind: str,
    later: List[Any],
    passed: float,
    asked: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = [0]
    left = iter(later)
    questions: List[Any] = []

    def sleep(seconds: float) -> None:
        assert seconds == start.POLL_S == 0.1
        ticks[0] += 1

    clock = SimpleNamespace(monotonic=lambda: round(ticks[0] * 0.1, 6), sleep=sleep)
    monkeypatch.setattr(start, "time", clock)
    monkeypatch.setattr(start, "read_health", lambda plan: questions.append(plan) or next(left))
    plan: Any = SimpleNamespace(bind=bind)
    start._pause(plan, before, waited_s)
    assert (ticks[0], len(questions)) == (round(passed * 10), asked)


def watch_of(engine: Any) -> Any:
    return start._StartWatch(engine.deployment, engine, engine)


@pytest.mark.parametrize(("seconds", "late"), [(99.0, False), (100.0, False), (100.1, True)])
def test_time_is_up_when_it_is_up(seconds: float, late: bool, engine: Any) -> None:
    engine.now = engine.began + seconds
    engine.logs = [(seconds, "loading")]
    watch = watch_of(engine)
    if late:
        with pytest.raises(IncompleteError, match="does not answer after"):
            watch.look(SILENT, engine.began)
    else:
        watch.look(SILENT, engine.began)


@pytest.mark.parametrize("since_s", [0.0, 50.0])
def test_a_start_stands_still_once_its_log_does(since_s: float, engine: Any) -> None:
    """Since its last line, or since the container began; told once, and again after it moved."""
    engine.deployment.plan = SimpleNamespace(name="m", ready_timeout_s=10**6)
    engine.logs = [(0, "loading"), (1000, "loading more")]
    watch = watch_of(engine)
    limit = start.STALLED_AFTER_S + since_s
    told = []
    for seconds in (limit - 1, limit, limit + 5, 1000, 1000 + start.STALLED_AFTER_S):
        engine.now = engine.began + seconds
        engine.said.clear()
        watch.look(SILENT, engine.began + since_s)
        told.append(any(line.startswith("warn: m is stalled") for line in engine.said))
    assert told == [False, True, False, False, True]


def test_a_percentage_that_grows_is_not_said_each_time(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "phase_name", lambda phase: phase.split()[0] if phase else "")
    watch = watch_of(engine)
    for seconds, phase in (
        (1, "loading 1%"),
        (2, "loading 2%"),
        (11, "loading 3%"),
        (12, "loading 4%"),
        (13, "compiling"),
        (14, "compiling"),
    ):
        engine.now = engine.began + seconds
        watch._say(phase)
        assert engine.doing == f"m: {phase}"
    assert engine.said == ["1 loading 1%", "12 loading 4%", "13 compiling"]
