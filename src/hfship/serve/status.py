# SPDX-License-Identifier: Apache-2.0
"""The state of deployments, each proven by a real request.

stopped    somebody stopped it
down       no container, or one that has ended
hung       the engine is there, and neither answers nor makes a token
loading    the container runs and does not answer yet
stalled    it loads, and its log has said nothing for minutes
degraded   the container restarts, answers something else, or takes long while tokens flow
healthy    the model has made something: a token, an embedding, a score
unknown    docker cannot be asked, or the deployment's files cannot be read

/health is no proof: vLLM answers 200 there while its engine hangs (vllm#39863, kserve#6259). The
proof of a hang is that a real request has no answer for as long as `hang_s`, and the counter of
the engine's steps stands still all that time.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from hfship.base.text import human_seconds, narrow_table
from hfship.base.values import asdict, dataclass, replace
from hfship.serve.docker import STATUS_TIMEOUT_S, inspect_container, lost_its_gpu, read_log
from hfship.serve.engine import (
    HEALTH_TIMEOUT_S,
    LOOK_EVERY_S,
    ask_model,
    missing_names,
    read_health,
    read_heartbeat,
)
from hfship.serve.files import container_name
from hfship.serve.measured import read_measured
from hfship.serve.messages import Answer, Container, container_trouble, explain
from hfship.serve.phases import STALLED_AFTER_S, phase_of
from hfship.serve.stop import read_stopped

if TYPE_CHECKING:
    from hfship.serve.deployments import Deployment
    from hfship.serve.terms import Plan

COLUMNS = ("name", "state", "image", "url", "gpus", "uptime", "answer")
OPTIONAL_COLUMNS = ("image", "gpus", "answer", "uptime")  # left out in this order
HANG_S = 60.0  # without answer and without a step of the engine, until it is called hung
LOG_LINES = 400
# What is wrong with a deployment that a repair can mend: DeploymentStatus.fault.
DOWN, DEAD, HUNG, LATE, LOST_GPU = "down", "dead", "hung", "late", "lost GPU"


@dataclass(frozen=True)
class DeploymentStatus:
    """One row of `status`. `image` is "" where no plan is known."""

    name: str
    state: str
    container: str
    image: str
    url: str
    port: int
    gpus: Tuple[str, ...]  # UUIDs; empty on the CPU
    uptime: Optional[int] = None  # seconds
    answer: Optional[float] = None  # seconds until a real request was answered
    restarts: Optional[int] = None
    task: str = ""  # that the answer proved; "": none
    phase: str = ""  # of a start that goes on
    fault: str = ""  # what `status --repair` would mend
    repair: str = ""  # what it did
    note: str = ""  # what is wrong

    def json(self) -> Dict[str, Any]:
        """docs/json.md: status."""
        return {**asdict(self), "gpus": list(self.gpus)}

    def cells(self) -> Dict[str, str]:
        """The row for people, by column."""
        cells = dict.fromkeys(COLUMNS, "-")
        cells.update(name=self.name, state=self.state)
        if not self.image:
            return cells

        gpus = ",".join(uuid[:12] for uuid in self.gpus)
        cells.update(
            image=self.image,
            url=self.url,
            gpus=gpus or "CPU",
        )
        if self.uptime is not None:
            cells["uptime"] = human_seconds(self.uptime)
        if self.answer is not None:
            cells["answer"] = f"{self.answer:.2f} s"
        return cells


@dataclass(frozen=True)
class Vitals:
    """What was found of a container that runs: its /health, the answer to a real request, and for
    how long it neither answered nor did a step. `silent_s`: since its log said something."""

    health: Answer
    answer: Answer
    phase: str = ""
    silent_s: float = 0.0
    still_s: float = 0.0  # without an answer and without a step
    lost_gpu: bool = False
    log: str = ""
    lacks: Tuple[str, ...] = ()  # names of the plan that /v1/models does not list


def status_text(statuses: Sequence[DeploymentStatus], width: int) -> str:
    """The table of `status`, at most `width` wide if that can be; below it what is wrong."""
    rows = [status.cells() for status in statuses]
    lines = [narrow_table(rows, COLUMNS, OPTIONAL_COLUMNS, width)]
    for status in statuses:
        if status.note:
            lines.append(f"{status.name}: {status.note}")
    return "\n".join(lines)


def deployment_status(deployment: Deployment, hang_s: float = HANG_S) -> DeploymentStatus:
    """The state of a deployment, after a request to it if its container runs. Raises HostError.

    An engine that does not answer is watched for up to `hang_s` seconds.
    """
    plan = deployment.plan
    container = inspect_container(plan.name)
    ended = container is None or container.status not in ("running", "restarting")
    stopped = read_stopped(deployment.folder)
    if stopped and ended:
        return _status_of(plan, "stopped", note=str(stopped))
    if container is None:
        return _status_of(plan, "down", fault=DOWN, note="no container")

    vitals = Vitals(Answer(0, ""), Answer(0, ""))
    uptime = None
    if container.status == "running":
        vitals = read_vitals(deployment, container, hang_s)
        uptime = round(time.time() - container.started_at)

    state = deployment_state(container, vitals, hang_s)
    answer = vitals.answer
    return _status_of(
        plan,
        state,
        uptime=uptime,
        answer=round(answer.seconds, 3) if answer.works else None,
        restarts=container.restarts,
        task=answer.task if answer.works else "",
        phase=vitals.phase if state in ("loading", "stalled") else "",
        fault=fault_of(plan, state, vitals, uptime),
        note="; ".join(troubles_of(deployment, container, vitals, state)),
    )


def read_vitals(deployment: Deployment, container: Container, hang_s: float) -> Vitals:
    """Ask a running container all that tells its state."""
    plan = deployment.plan
    lost = plan.device == "gpu" and lost_its_gpu(plan.name)
    health = read_health(plan, STATUS_TIMEOUT_S)
    if not health.status and not health.silent:  # nothing listens: it loads
        log = read_log(plan.name, LOG_LINES, container.started_at)
        last_at = max(log.last_at, container.started_at)
        return Vitals(
            health,
            health,
            phase=phase_of(log.text),
            silent_s=time.time() - last_at,
            lost_gpu=lost,
            log=log.text,
        )
    if deployment.owner:  # its key is not ours to read: nothing can be asked in earnest
        note = f"only {deployment.owner} has its key: /health answers, nothing was asked of it"
        answer = replace(health, made=health.status == 200, note=note)
        return Vitals(health, answer, lost_gpu=lost)
    if health.status == 503:
        return Vitals(health, health, lost_gpu=lost)

    answer, still_s = ask_and_watch(deployment, hang_s, health)
    lacks: Tuple[str, ...] = ()
    if answer.works:
        lacks = missing_names(deployment)
    return Vitals(health, answer, still_s=still_s, lost_gpu=lost, lacks=lacks)


def ask_and_watch(deployment: Deployment, hang_s: float, health: Answer) -> Tuple[Answer, float]:
    """(the answer to a real request, seconds that passed without one and without a step).

    Where it is not there within STATUS_TIMEOUT_S, or a quarter of `hang_s`, the heart is watched,
    until it beats or `hang_s` have passed: an engine with much to do does its steps, one that hangs
    does none. Of one that answers and has no counter (--disable-log-stats) nothing is proven: 0.
    """
    first_s = min(STATUS_TIMEOUT_S, hang_s / 4)
    every_s = min(LOOK_EVERY_S, hang_s / 8)
    look_s = min(HEALTH_TIMEOUT_S, first_s)
    task = read_measured(deployment.folder).task
    answers: List[Answer] = []
    longer = hang_s + STATUS_TIMEOUT_S  # so that it is for us to say when it was long enough

    def ask() -> None:
        answers.append(ask_model(deployment, longer, task))

    began = time.monotonic()
    before = read_heartbeat(deployment.plan, look_s)
    asking = threading.Thread(target=ask, name="ask", daemon=True)
    asking.start()
    asking.join(first_s)
    while not answers:
        now = read_heartbeat(deployment.plan, look_s)
        waited = time.monotonic() - began
        if now and before and now.steps > before.steps:
            text = f"no answer in {waited:.0f} s: {now.running:.0f} requests run, "
            text += f"{now.waiting:.0f} wait, and tokens flow"
            return Answer(0, text, waited, silent=True), 0.0
        if waited >= hang_s:
            text = f"no answer and no step of the engine for {waited:.0f} s"
            proven = health.silent or before is not None
            return Answer(0, text, waited, silent=True), waited if proven else 0.0
        asking.join(every_s)

    return answers[0], 0.0


def unknown_status(plan: Plan, why: str) -> DeploymentStatus:
    """The row of a deployment that cannot be asked; a plan that cannot be read has a name only."""
    return _status_of(plan, "unknown", note=why)


def not_served_status(name: str) -> DeploymentStatus:
    """The row of a model that a models file lists, and that was not served yet."""
    return DeploymentStatus(
        name, "down", container_name(name), image="", url="", port=0, gpus=(), note="not served yet"
    )


def _status_of(plan: Plan, state: str, **found: Any) -> DeploymentStatus:
    return DeploymentStatus(
        plan.name,
        state,
        container_name(plan.name),
        image=plan.image,
        url=plan.url,
        port=plan.port,
        gpus=plan.gpus,
        **found,
    )


def troubles_of(
    deployment: Deployment, container: Container, vitals: Vitals, state: str
) -> List[str]:
    """What is wrong with a deployment that has a container, or worth a word."""
    plan = deployment.plan
    troubles = []
    if vitals.lost_gpu:
        troubles.append("the container has lost its GPU")
    trouble = container_trouble(container, restarts_before=0)
    if state == "hung":  # which is graver than that it restarted once
        troubles.append(str(vitals.answer))
    elif trouble:
        troubles.append(trouble)
    elif state in ("loading", "stalled"):
        troubles.append(_loading_text(vitals, state))
    elif state == "degraded":
        troubles.append(str(vitals.answer))
    cause, _ = explain(vitals.log, plan.name)
    if cause:
        troubles.append(cause)
    if vitals.answer.note:
        troubles.append(vitals.answer.note)
    if vitals.lacks:
        names = ", ".join(vitals.lacks)
        troubles.append(f"its API does not know the name {names}: hfship serve {plan.name}")
    if plan.image_id and container.image_id != plan.image_id:
        troubles.append("runs an image that is not the plan's")
    return troubles


def fault_of(plan: Plan, state: str, vitals: Vitals, uptime: Optional[int]) -> str:
    """What is wrong that a repair can mend, "" for nothing.

    An engine that works without seeing its GPU any more goes on; it is told, and left alone.
    """
    if state == "healthy":
        return ""
    if vitals.lost_gpu:
        return LOST_GPU
    if state in ("down", "hung"):
        return state
    if vitals.health.status == 503:  # vLLM: EngineDeadError
        return DEAD
    if state == "stalled" and uptime is not None and uptime > plan.ready_timeout_s:
        return LATE
    return ""


def _loading_text(vitals: Vitals, state: str) -> str:
    if state == "stalled":
        return f"{vitals.phase}; nothing new in its log for {human_seconds(vitals.silent_s)}"
    return vitals.phase


def deployment_state(container: Container, vitals: Vitals, hang_s: float = HANG_S) -> str:
    """The state of a deployment that has a container.

    >>> silent = Answer(0, "connection refused")
    >>> deployment_state(Container("1", "running"), Vitals(silent, silent))
    'loading'
    >>> deployment_state(Container("1", "exited", exit_code=1), Vitals(silent, silent))
    'down'
    """
    if container.status not in ("running", "restarting"):
        return "down"
    if vitals.answer.works:
        return "healthy"
    if vitals.still_s and vitals.still_s >= hang_s:
        return "hung"

    refused = vitals.health.status == 0 and not vitals.health.silent
    if container.status == "running" and refused and container.restarts == 0:
        if vitals.silent_s >= STALLED_AFTER_S:
            return "stalled"
        return "loading"

    return "degraded"
