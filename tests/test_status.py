"""The state of a deployment from what docker tells of its container; docker is played."""

from __future__ import annotations

import calendar
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.base.errors import HostError
from hfship.base.processes import Completed
from hfship.commands.status import exit_of
from hfship.serve import docker, status
from hfship.serve.deployments import Deployment
from hfship.serve.messages import Answer, Container
from hfship.serve.status import DeploymentStatus, Vitals, deployment_state, troubles_of
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
