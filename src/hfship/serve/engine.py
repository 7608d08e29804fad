# SPDX-License-Identifier: Apache-2.0
"""Asking a running engine over HTTP: whether it is there, what it can do, one real request, and
how its heart beats.

Straight to its port, since no proxy may come between; at most ANSWER_LIMIT bytes of an answer are
read. Promises: never raises for what the engine answers or does not answer: that is an Answer.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from hfship.base.values import dataclass, replace
from hfship.serve.docker import api_address
from hfship.serve.messages import Answer
from hfship.serve.task import (
    REFUSALS,
    UNKNOWN,
    Task,
    parse_models,
    parse_routes,
    proves,
    request_of,
    task_named,
    tasks_to_try,
)

if TYPE_CHECKING:
    from hfship.serve.deployments import Deployment
    from hfship.serve.terms import Plan

ANSWER_LIMIT = 1 << 22  # bytes; /openapi.json of vLLM 0.33 has some 300 kB
HEALTH_TIMEOUT_S = 5.0
IDLE_POLL_S = 1.0
LOOK_EVERY_S = 2.0  # while a heart is watched

# In every version from 0.8.3 to 0.33: serve/vllm_table.json, "metrics".
_TOKENS = "vllm:iteration_tokens_total"
_UNKNOWN_NOTE = (
    "of no task that hfship knows: /health and /v1/models answer, nothing was asked of it"
)
_METRIC = re.compile(r"^(vllm:\w+)(?:\{.*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_MADE = "vllm:generation_tokens_total"
_KV = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # from 0.9.2; up to 0.11.2


@dataclass(frozen=True)
class Heartbeat:
    """How far an engine is: the steps and tokens that it has done, requests that run and wait, the
    tokens that it made, the share of its KV cache that is in use."""

    steps: float
    tokens: float
    running: float = 0
    waiting: float = 0
    made: float = 0
    kv: float = 0


def http_get(plan: Plan, path: str, timeout_s: float, key: str = "") -> Answer:
    """The answer to a GET."""
    return _http(plan, "GET", path, {}, b"", key, timeout_s)


def _http(
    plan: Plan,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes,
    key: str,
    timeout_s: float,
) -> Answer:
    from http.client import HTTPConnection, HTTPException  # 13 ms; not all that import us ask

    host, port = api_address(plan)
    if not host:
        return Answer(0, "its container has no address")
    sent = dict(headers)
    if key:
        sent["Authorization"] = f"Bearer {key}"
    started = time.monotonic()
    connection = HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, body or None, sent)
        response = connection.getresponse()
        text = response.read(ANSWER_LIMIT).decode("utf-8", "replace")
        return Answer(response.status, text, time.monotonic() - started)
    except (OSError, HTTPException) as exc:
        seconds = time.monotonic() - started
        import socket  # loads much, and most engines answer

        if isinstance(exc, socket.timeout):
            return Answer(0, f"no answer within {timeout_s:g} s", seconds, silent=True)
        kind = type(exc).__name__
        return Answer(0, f"{kind}: {exc}", seconds)
    finally:
        connection.close()


def read_health(plan: Plan, timeout_s: float = HEALTH_TIMEOUT_S) -> Answer:
    """The answer of /health: 200, or 503 of an engine that died. It says nothing of one that hangs.

    Nothing listens there before the model is loaded.
    """
    return http_get(plan, "/health", timeout_s)


def read_heartbeat(plan: Plan, timeout_s: float = HEALTH_TIMEOUT_S) -> Optional[Heartbeat]:
    """The heartbeat, None where /metrics does not answer."""
    answer = http_get(plan, "/metrics", timeout_s)
    if answer.status != 200:
        return None
    return parse_heartbeat(answer.text)


def wait_until_idle(plan: Plan, patience_s: float) -> bool:
    """Wait until an engine has no request left: twice in a row, since one may be on its way.
    Whether it has none; an engine that tells nothing has none that could be waited for."""
    deadline = time.monotonic() + patience_s
    idle = 0
    while idle < 2:
        if time.monotonic() > deadline:
            return False
        beat = read_heartbeat(plan)
        if beat is None:
            return True
        idle = idle + 1 if not beat.running + beat.waiting else 0
        time.sleep(IDLE_POLL_S)
    return True


def parse_heartbeat(text: str) -> Optional[Heartbeat]:
    r"""The heartbeat in the text of /metrics, summed over engines, of KV caches the fullest; None
    for something else.

    >>> parse_heartbeat('vllm:iteration_tokens_total_sum{engine="0"} 9\n'
    ...     'vllm:iteration_tokens_total_count{engine="0"} 4\nvllm:num_requests_running{} 1.0\n')
    Heartbeat(steps=4.0, tokens=9.0, running=1.0, waiting=0, made=0, kv=0)
    """
    found: Dict[str, List[float]] = {}
    for name, value in _METRIC.findall(text):
        found.setdefault(name, []).append(float(value))

    steps = found.get(f"{_TOKENS}_count")
    if steps is None:
        return None
    fullest = [value for name in _KV for value in found.get(name, ())]
    return Heartbeat(
        sum(steps),
        tokens=sum(found.get(f"{_TOKENS}_sum", ())),
        running=sum(found.get(_RUNNING, ())),
        waiting=sum(found.get(_WAITING, ())),
        made=sum(found.get(_MADE, ())),
        kv=max(fullest, default=0),
    )


def missing_names(deployment: Deployment) -> Tuple[str, ...]:
    """The names of the plan that /v1/models does not list; none where it does not answer."""
    plan = deployment.plan
    answer = http_get(plan, "/v1/models", HEALTH_TIMEOUT_S, deployment.key)
    listed = parse_models(answer.text)
    if answer.status != 200 or not listed:
        return ()
    return tuple(name for name in plan.served_names if name not in listed)


def ask_model(deployment: Deployment, timeout_s: float, proven: str = "") -> Answer:
    """The answer to one real request, of the task that the model is for.

    `proven` is the task that it answered before, which is asked first. Where the image lists routes
    and none is of a task that we know, or the architecture is of none and all is refused, /health
    and /v1/models must do.
    """
    plan = deployment.plan
    likely = likely_of(plan)
    if task_named(proven):
        likely = [proven, *likely]
    routes = read_routes(plan)
    refused: List[Answer] = []
    for task, route in tasks_to_try(likely, routes):
        answer = ask_task(deployment, task, route, timeout_s)
        if answer.works:
            return replace(answer, note=_refused_note(refused, likely))
        if answer.status not in REFUSALS:
            return answer  # it is broken, or our key is: no other request would do better
        refused.append(answer)

    if refused and plan.tasks:
        return refused[0]
    return _of_no_known_task(deployment, refused)


def likely_of(plan: Plan) -> List[str]:
    """The tasks that a plan's model is for; plans of older hfship have `embeds` alone."""
    if plan.tasks:
        return list(plan.tasks)
    if plan.embeds:
        return ["embedding"]
    return []


def read_routes(plan: Plan) -> Optional[FrozenSet[str]]:
    """The routes that the image opened for the model, None where it does not list them."""
    answer = http_get(plan, "/openapi.json", HEALTH_TIMEOUT_S)
    if answer.status != 200:
        return None
    return parse_routes(answer.text)


def ask_task(deployment: Deployment, task: Task, route: str, timeout_s: float) -> Answer:
    """The answer to the smallest request for a task, at one of its routes."""
    plan = deployment.plan
    kind, body = request_of(task, plan.served_names[0])
    answer = _http(
        plan,
        "POST",
        route,
        {"Content-Type": kind},
        body,
        deployment.key,
        timeout_s,
    )
    made = False
    if answer.status == 200:
        made = proves(task, answer.text)
    return replace(
        answer,
        task=task.name,
        route=route,
        made=made,
    )


def _refused_note(refused: Sequence[Answer], likely: Sequence[str]) -> str:
    """What clients will meet although the model answers: a chat that is refused."""
    for answer in refused:
        if answer.task == "chat" and "chat" in likely:
            return f"{answer.route} is refused: {answer}"
    return ""


def _of_no_known_task(deployment: Deployment, refused: Sequence[Answer]) -> Answer:
    """What is left to ask of a model that none of our requests is for."""
    plan = deployment.plan
    health = read_health(plan)
    if health.status != 200:
        return replace(health, task=UNKNOWN)
    models = http_get(plan, "/v1/models", HEALTH_TIMEOUT_S, deployment.key)
    listed = []
    if models.status == 200:
        listed = parse_models(models.text)
    if plan.served_names[0] not in listed:
        return refused[0] if refused else models

    return replace(
        models,
        task=UNKNOWN,
        route="/v1/models",
        note=_UNKNOWN_NOTE,
        made=True,
    )
