"""The state of a deployment from what docker tells of its container; docker is played."""

from __future__ import annotations

import calendar
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import HostError
from hfship.base.processes import Completed
from hfship.commands.status import exit_of
from hfship.serve import docker, status
from hfship.serve.deployments import Deployment
from hfship.serve.messages import Answer, Container
from hfship.serve.status import DeploymentStatus, Vitals, deployment_state, troubles_of
from hfship.serve.stop import Stopped
from test_plan import plan

PLAN = replace(plan("Qwen3-8B", "1x80GB"), image_id="sha256:1")
RUNNING = Container("1", "running", image_id=PLAN.image_id)
WORKS = Answer(200, '{"choices": [{"text": "a"}]}', made=True)
SILENT = Answer(0, "connection refused")
INSPECTED: Dict[str, Any] = {
    "Id": "c1",
    "Image": "sha256:2",
    "RestartCount": 3,
    "State": {
        "Status": "exited",
        "ExitCode": 137,
        "OOMKilled": True,
        "StartedAt": "1970-01-02T00:00:01.123456789Z",
    },
}


def test_a_container_is_all_that_docker_tells_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = Completed(0, json.dumps([INSPECTED]), "")
    monkeypatch.setattr(docker, "run_program", lambda *_, **__: done)
    assert docker.inspect_container("m") == Container(
        id="c1",
        status="exited",
        exit_code=137,
        oom_killed=True,
        restarts=3,
        started_at=86401,
        image_id="sha256:2",
    )


@pytest.mark.parametrize("why", ["Error: No such container: vllm_m", "the daemon is gone"])
def test_only_a_container_that_is_not_there_is_none(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "run_program", lambda *_, **__: Completed(1, "[]", why))
    if "No such" in why:
        assert docker.inspect_container("m") is None
        return
    with pytest.raises(HostError):
        docker.inspect_container("m")


HEALTH = Answer(200, "")
MUTE = Answer(0, "no answer within 10 s", silent=True)
DEPLOYMENT = Deployment(Path("/nowhere"), PLAN, "")


@pytest.mark.parametrize(
    "container, vitals, state, said",
    [
        (RUNNING, Vitals(HEALTH, WORKS), "healthy", ""),
        (RUNNING, Vitals(SILENT, SILENT, "loading weights"), "loading", "loading weights"),
        (RUNNING, Vitals(SILENT, SILENT, "starting", 299.0), "loading", "starting"),
        (RUNNING, Vitals(SILENT, SILENT, "starting", 300.0), "stalled", "nothing new in its log for 5 min"),
        (RUNNING, Vitals(HEALTH, Answer(500, "broken")), "degraded", "500"),
        (RUNNING, Vitals(Answer(503, "dead"), Answer(503, "dead")), "degraded", "503"),
        (RUNNING, Vitals(HEALTH, replace(MUTE, text="tokens flow")), "degraded", "tokens flow"),
        (RUNNING, Vitals(HEALTH, MUTE, still_s=60.0), "hung", "no answer"),
        (RUNNING, Vitals(HEALTH, MUTE, still_s=59.0), "degraded", "no answer"),
        (RUNNING, Vitals(MUTE, MUTE, still_s=61.0), "hung", "no answer"),
        (RUNNING, Vitals(HEALTH, replace(WORKS, note="chat is refused")), "healthy", "chat is refused"),
        (RUNNING, Vitals(HEALTH, WORKS, lost_gpu=True), "healthy", "lost its GPU"),
        (RUNNING, Vitals(HEALTH, WORKS, lacks=("a", "b")), "healthy", "its API does not know the name a, b: hfship serve Qwen3-8B"),
        (RUNNING, Vitals(SILENT, SILENT, "starting", log="CUDA out of memory"), "loading", "ran out of memory"),
        (replace(RUNNING, restarts=1), Vitals(SILENT, SILENT), "degraded", "it restarted"),
        (replace(RUNNING, status="restarting"), Vitals(SILENT, SILENT), "degraded", "it restarted (exit code 0)"),
        (replace(RUNNING, status="exited", exit_code=1), Vitals(SILENT, SILENT), "down", "it ended (exit code 1)"),
        (replace(RUNNING, image_id="sha256:2"), Vitals(HEALTH, WORKS), "healthy", "an image that is not the plan"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(container: Container, vitals: Vitals, state: str, said: str) -> None:
    assert deployment_state(container, vitals) == state
    troubles = "; ".join(troubles_of(DEPLOYMENT, container, vitals, state))
    assert said in troubles if said else not troubles


def test_a_plan_of_no_known_image_takes_any() -> None:
    anything = Deployment(Path("/nowhere"), replace(PLAN, image_id=""), "")
    assert not troubles_of(anything, RUNNING, Vitals(HEALTH, WORKS), "healthy")


@pytest.mark.parametrize(
    "states, of_all, by_name",
    [
        ([], 0, 0),
        (["healthy", "stopped"], 0, 9),
        (["loading"], 3, 3),
        (["stalled", "healthy"], 3, 3),
        (["degraded", "down"], 9, 9),
        (["hung"], 9, 9),
        (["unknown"], 9, 9),
    ],
)
def test_the_gravest_state_is_the_exit_code(states: List[str], of_all: int, by_name: int) -> None:
    rows = [DeploymentStatus("m", state, "c", "i", "u", 1, ()) for state in states]
    assert exit_of(rows, by_name=False) == of_all
    assert exit_of(rows, by_name=True) == by_name


def test_a_bar_in_the_log_is_one_line() -> None:
    """Bars of tqdm are drawn anew with a carriage return; docker gives a time to the line only."""
    out = "2026-11-29T08:00:01.5Z one\n2026-11-29T08:00:03.5Z three\n"
    err = "2026-11-29T08:00:02.5Z shards:   0%\rshards: 100%\n2026-11-29T08:00:04.0Z \n"
    tail = docker.parse_log(out, err)
    assert tail.text == "one\nshards:   0%\rshards: 100%\nthree\n\n"
    assert tail.last_at == calendar.timegm((2026, 11, 29, 8, 0, 4))
    assert docker.parse_log("", "") == docker.LogTail()


@pytest.mark.parametrize(
    "started_at, last_at, silent_s", [(100, 0, 900), (100, 400, 600), (700, 400, 300)]
)
def test_an_engine_that_loads_is_silent_since_its_last_line_or_its_start(
    started_at: int, last_at: int, silent_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of the start before do not count."""
    monkeypatch.setattr(status, "read_health", lambda *_: SILENT)
    monkeypatch.setattr(status, "lost_its_gpu", lambda _: False)
    monkeypatch.setattr(status, "read_log", lambda *_: docker.LogTail("", last_at))
    monkeypatch.setattr(status.time, "time", lambda: 1000.0)
    container = replace(RUNNING, started_at=started_at)
    vitals = status.read_vitals(Deployment(Path("/d"), PLAN, ""), container, 60)
    assert vitals.silent_s == silent_s and not vitals.answer.works


# -- a row


STOPPED = Stopped("2026-01-01T00:00:00Z", "kim")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """What docker, the folder and the engine say, and what was asked of the engine."""
    says: Dict[str, Any] = {"container": RUNNING, "stopped": None, "vitals": None, "asked": []}

    def vitals(*given: Any) -> Vitals:
        says["asked"].append(given)
        return says["vitals"]  # type: ignore[no-any-return]

    monkeypatch.setattr(
        status, "inspect_container", lambda name: {PLAN.name: says["container"]}[name]
    )
    monkeypatch.setattr(
        status, "read_stopped", lambda folder: {DEPLOYMENT.folder: says["stopped"]}[folder]
    )
    monkeypatch.setattr(status, "read_vitals", vitals)
    monkeypatch.setattr(status.time, "time", lambda: 5000.4)
    return says


EXITED = replace(RUNNING, status="exited", exit_code=1, restarts=2)
GOOD = Vitals(HEALTH, replace(WORKS, seconds=0.12345, task="completion", note="slow"), phase="x")
LOADS = Vitals(SILENT, SILENT, "loading weights", silent_s=5.0)
STALLS = replace(LOADS, silent_s=999.0)


@pytest.mark.parametrize(
    ("container", "stopped", "vitals", "row"),
    [
        (None, None, None, {"state": "down", "fault": "down", "note": "no container"}),
        (None, STOPPED, None, {"state": "stopped", "note": str(STOPPED)}),
        (EXITED, STOPPED, None, {"state": "stopped", "note": str(STOPPED)}),
        (
            EXITED,
            None,
            None,
            {"state": "down", "fault": "down", "restarts": 2, "note": "it ended (exit code 1)"},
        ),
        (
            replace(RUNNING, status="restarting", exit_code=3),
            STOPPED,
            None,
            {"state": "degraded", "restarts": 0, "note": "it restarted (exit code 3)"},
        ),
        (
            replace(RUNNING, started_at=4000.0, restarts=1),
            STOPPED,  # it was started by hand meanwhile
            GOOD,
            {
                "state": "healthy",
                "uptime": 1000,
                "answer": 0.123,
                "restarts": 1,
                "task": "completion",
                "note": "it restarted; slow",
            },
        ),
        (
            replace(RUNNING, started_at=4000.0),
            None,
            LOADS,
            {"state": "loading", "uptime": 1000, "restarts": 0, "phase": "loading weights"},
        ),
        (
            replace(RUNNING, started_at=100.0),
            None,
            STALLS,
            {"state": "stalled", "uptime": 4900, "restarts": 0, "phase": "loading weights"},
        ),
    ],
)
def test_the_whole_row_of_a_deployment(
    container: Any, stopped: Any, vitals: Any, row: Dict[str, Any], played: Dict[str, Any]
) -> None:
    played.update(container=container, stopped=stopped, vitals=vitals)
    found = status.deployment_status(DEPLOYMENT, 33.0)
    asked = [(DEPLOYMENT, container, 33.0)] if vitals else []
    assert played["asked"] == asked
    expected = DeploymentStatus(
        PLAN.name, "", f"vllm_{PLAN.name}", PLAN.image, PLAN.url, PLAN.port, PLAN.gpus
    )
    if row["state"] in ("loading", "stalled"):
        row = {**row, "note": found.note}
        assert found.note.startswith("loading weights")
    if row["state"] == "stalled" and PLAN.ready_timeout_s < 4900:
        row = {**row, "fault": "late"}
    assert found == replace(expected, **row)


def test_how_long_is_waited_unless_it_is_said(played: Dict[str, Any]) -> None:
    played.update(vitals=GOOD)
    status.deployment_status(DEPLOYMENT)
    assert played["asked"][0][2] == status.HANG_S == 60.0


def test_rows_of_what_cannot_be_asked() -> None:
    row = status.unknown_status(PLAN, "no docker")
    assert (row.name, row.state, row.note, row.image) == (
        PLAN.name,
        "unknown",
        "no docker",
        PLAN.image,
    )
    assert (row.fault, row.uptime, row.answer, row.restarts) == ("", None, None, None)
    new = status.not_served_status("m")
    assert new == DeploymentStatus("m", "down", "vllm_m", "", "", 0, (), note="not served yet")
    assert new.json()["gpus"] == [] and new.json()["fault"] == ""


@pytest.mark.parametrize(
    ("fields", "cells"),
    [
        ({"image": ""}, "m healthy - - - - -"),
        ({}, "m healthy i u CPU - -"),
        ({"gpus": ("GPU-0123456789", "GPU-abcdefghij")}, "m healthy i u GPU-01234567,GPU-abcdefgh - -"),
        ({"uptime": 0, "answer": 0.0}, "m healthy i u CPU less_than_0.1_s 0.00_s"),
        ({"uptime": 90, "answer": 1.236}, "m healthy i u CPU 1_min_30_s 1.24_s"),
    ],
)  # fmt: skip
def test_the_cells_of_a_row(fields: Dict[str, Any], cells: str) -> None:
    values: Dict[str, Any] = {"image": "i", "gpus": (), **fields}
    row = DeploymentStatus("m", "healthy", "c", url="u", port=1, **values)
    assert " ".join(text.replace(" ", "_") for text in row.cells().values()) == cells
    assert list(row.cells()) == list(status.COLUMNS)


def test_below_the_table_is_what_is_wrong() -> None:
    rows = [
        DeploymentStatus("a", "down", "c", "i", "u", 1, (), note="it ended"),
        DeploymentStatus("b", "healthy", "c", "i", "u", 1, ()),
    ]
    lines = status.status_text(rows, 200).splitlines()
    assert len(lines) == 4 and lines[-1] == "a: it ended"
    assert lines[0].split() == list(status.COLUMNS)
    assert "image" not in status.status_text(rows, 30).splitlines()[0]


# -- vitals


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """An engine that is played: its health, its answer, whether it lost its GPU."""
    says: Dict[str, Any] = {"health": HEALTH, "answer": (WORKS, 0.0), "lost": False, "asked": []}

    def health(plan: Any, timeout_s: float) -> Answer:
        says["asked"].append(("health", plan.name, timeout_s))
        return says["health"]  # type: ignore[no-any-return]

    def ask(deployment: Deployment, hang_s: float, before: Answer) -> Any:
        assert before is says["health"]
        says["asked"].append(("ask", deployment.plan.name, hang_s))
        return says["answer"]

    def lost(name: str) -> bool:
        says["asked"].append(("gpu", name))
        return says["lost"]  # type: ignore[no-any-return]

    monkeypatch.setattr(status, "read_health", health)
    monkeypatch.setattr(status, "ask_and_watch", ask)
    monkeypatch.setattr(status, "lost_its_gpu", lost)
    monkeypatch.setattr(status, "missing_names", lambda _: ("alias",))
    tail = docker.LogTail("Loading weights", 400)
    monkeypatch.setattr(
        status, "read_log", lambda *given: says["asked"].append(("log", *given)) or tail
    )
    monkeypatch.setattr(status, "phase_of", lambda text: f"phase of {text}")
    monkeypatch.setattr(status.time, "time", lambda: 1000.0)
    return says


HEALTH_FIRST = [("gpu", PLAN.name), ("health", PLAN.name, status.STATUS_TIMEOUT_S)]
BUSY = replace(MUTE, seconds=9.0)


@pytest.mark.parametrize(
    ("health", "answer", "owner", "expected", "asked"),
    [
        (HEALTH, (WORKS, 0.0), "", {"answer": WORKS, "lacks": ("alias",)}, [("ask", PLAN.name, 7.0)]),
        (HEALTH, (BUSY, 9.0), "", {"answer": BUSY, "still_s": 9.0}, [("ask", PLAN.name, 7.0)]),
        (MUTE, (BUSY, 9.0), "", {"answer": BUSY, "still_s": 9.0}, [("ask", PLAN.name, 7.0)]),
        (Answer(503, "dead"), None, "", {"answer": Answer(503, "dead")}, []),
        (
            SILENT,
            None,
            "",
            {
                "answer": SILENT,
                "phase": "phase of Loading weights",
                "silent_s": 600.0,
                "log": "Loading weights",
            },
            [("log", PLAN.name, status.LOG_LINES, 100.0)],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lost", [True, False])
def test_what_is_asked_of_an_engine(
    health: Answer,
    answer: Any,
    owner: str,
    expected: Dict[str, Any],
    asked: List[Any],
    lost: bool,
    engine: Dict[str, Any],
) -> None:
    engine.update(health=health, answer=answer, lost=lost)
    container = replace(RUNNING, started_at=100.0)
    found = status.read_vitals(replace(DEPLOYMENT, owner=owner), container, 7.0)
    assert found == Vitals(health, lost_gpu=lost, **expected)
    assert engine["asked"] == [*HEALTH_FIRST, *asked]


@pytest.mark.parametrize(("code", "works"), [(200, True), (503, False), (404, False)])
def test_of_another_users_engine_its_health_is_all_that_is_asked(
    code: int, works: bool, engine: Dict[str, Any]
) -> None:
    engine["health"] = Answer(code, "x")
    found = status.read_vitals(replace(DEPLOYMENT, owner="ann"), RUNNING, 7.0)
    assert found.answer.works is works and "only ann has its key" in found.answer.note
    assert engine["asked"] == HEALTH_FIRST and found.lacks == ()


def test_on_the_cpu_no_gpu_is_lost(engine: Dict[str, Any]) -> None:
    engine["lost"] = True
    on_cpu = replace(DEPLOYMENT, plan=replace(PLAN, device="cpu"))
    assert not status.read_vitals(on_cpu, RUNNING, 7.0).lost_gpu
    assert engine["asked"][0][0] == "health"


def beats(*steps: Any) -> Any:
    """Heartbeats, one for each look; None for one that is not there."""
    left = iter(steps)

    def read(plan: Any, look_s: float) -> Any:
        assert plan is PLAN
        LOOKED.append(look_s)
        found = next(left)
        return found if found is None else SimpleNamespace(steps=found, running=2.0, waiting=3.0)

    return read


LOOKED: List[float] = []


@pytest.mark.parametrize(
    ("hang_s", "health", "steps", "text", "still_s", "joined"),
    [
        (60.0, HEALTH, (5, 6), "no answer in 10 s: 2 requests run, 3 wait, and tokens flow", 0.0, [10.0]),
        (8.0, HEALTH, (5, 5, 5, 5, 5, 5, 5, 5), "no answer and no step of the engine for 8 s", 8.0, [2.0, *[1.0] * 6]),
        (8.0, HEALTH, (None, 5, 5, 5, 5, 5, 5, 5), "no answer and no step", 0.0, [2.0, *[1.0] * 6]),
        (8.0, MUTE, (None,) * 8, "no answer and no step", 8.0, [2.0, *[1.0] * 6]),
        (8.0, HEALTH, (None,) * 8, "no answer and no step", 0.0, [2.0, *[1.0] * 6]),
        (8.0, HEALTH, (5, None, 5, 7), "and tokens flow", 0.0, [2.0, 1.0, 1.0]),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_answer_is_watched(
    hang_s: float,
    health: Answer,
    steps: Any,
    text: str,
    still_s: float,
    joined: List[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    waits: List[float] = []

    class Asking:
        def __init__(self, target: Any, name: str, daemon: bool) -> None:
            assert (name, daemon) == ("ask", True) and callable(target)

        def start(self) -> None:
            pass

        def join(self, seconds: float) -> None:
            waits.append(seconds)
            now[0] += seconds

    LOOKED.clear()
    monkeypatch.setattr(status, "STATUS_TIMEOUT_S", 10.0)
    monkeypatch.setattr(status, "LOOK_EVERY_S", 2.0)
    monkeypatch.setattr(status, "HEALTH_TIMEOUT_S", 5.0)
    monkeypatch.setattr(status, "threading", SimpleNamespace(Thread=Asking))
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(status, "read_heartbeat", beats(*steps))
    monkeypatch.setattr(status, "read_measured", lambda _: SimpleNamespace(task="chat"))
    answer, still = status.ask_and_watch(DEPLOYMENT, hang_s, health)
    assert waits == joined and still == still_s
    assert text in answer.text and answer.silent and answer.status == 0
    assert answer.seconds == sum(joined)
    assert set(LOOKED) == {min(5.0, joined[0])}


def test_an_answer_that_comes_is_all_there_is_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(status, "read_heartbeat", lambda *_: None)
    monkeypatch.setattr(status, "read_measured", lambda _: SimpleNamespace(task="chat"))
    monkeypatch.setattr(status, "ask_model", lambda *given: asked.append(given) or WORKS)
    assert status.ask_and_watch(DEPLOYMENT, 60.0, HEALTH) == (WORKS, 0.0)
    assert asked == [(DEPLOYMENT, 60.0 + status.STATUS_TIMEOUT_S, "chat")]
