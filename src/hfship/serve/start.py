# SPDX-License-Identifier: Apache-2.0
"""Start, wait, stop; and the proof that a deployment works.

The proof is one real request that comes back with something made, not /health: that answers 200
while the engine hangs.
Promises: a container that dies or restarts ends the wait at once, with its last log lines, a cause
and a next step where the message is known. Starting what runs as planned changes nothing. A log
that says nothing for minutes is said to be stalled, with what is likely in the way.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Tuple

from hfship.base.errors import HostError, IncompleteError
from hfship.base.files import require_room
from hfship.base.processes import Aside
from hfship.base.progress import PLAIN_INTERVAL_S
from hfship.base.text import GIB, clock_text, human_seconds
from hfship.base.values import dataclass, field, replace
from hfship.serve.docker import (
    COMPOSE_TIMEOUT_S,
    compose,
    cpu_percent,
    direct,
    docker,
    engine_info,
    inspect_container,
    log_tail,
    read_log,
)
from hfship.serve.engine import ask_model, read_health
from hfship.serve.files import container_name
from hfship.serve.messages import Answer, container_trouble, explain
from hfship.serve.phases import STALLED_AFTER_S, PhaseTimes, phase_name, phase_of, stall_of
from hfship.serve.stop import forget_stop

if TYPE_CHECKING:
    from hfship.base.progress import Clock
    from hfship.base.report import Reporter
    from hfship.serve.deployments import Deployment
    from hfship.serve.terms import Plan

# Between two looks at container and log, each of which takes a tenth of a second of one core from
# a model that loads: a second at first, later a part of the time that it takes already.
LOOK_S, MOST_LOOK_S, LOOK_SHARE = 1.0, 5.0, 1 / 15
POLL_S = 0.1  # between two questions whether it listens
REQUEST_TIMEOUT_S = 120.0  # the first request may compile kernels
TAIL_LINES = 30  # of the log, shown when a start fails
PROGRESS_LINES = 400  # of the log, looked at for the phase
LOG_LINES = 5000  # of a start, looked at for what was measured
# Where docker keeps its data: vLLM's compile cache, logs, the container's own layer.
DOCKER_ROOM = 2 * GIB


@dataclass(frozen=True)
class Started:
    """A model that answered: its first answer, how long the phases of its start took, and its log
    until then.

    `seconds` is 0 for one that answered at once, since it ran before.
    """

    answer: Answer
    seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    log: str = ""

    def phases_text(self) -> str:
        """The start for people, "" for what ran before.

        >>> Started(Answer(200, ""), 61.0, {"starting": 20.0, "compiling": 41.0}).phases_text()
        'started in 1:01 (starting 0:20, compiling 0:41)'
        """
        if not self.seconds:
            return ""
        parts = ", ".join(f"{name} {clock_text(seconds)}" for name, seconds in self.phases.items())
        return f"started in {clock_text(self.seconds)} ({parts})"


def start(deployment: Deployment) -> int:
    """`docker compose up -d`. The number of restarts that the container had before.

    Raises HostError, DiskError.
    """
    name = deployment.plan.name
    doing = f"start {name}"
    require_docker_room(doing)
    before = inspect_container(name)
    docker(compose(deployment, "up", "-d"), doing, COMPOSE_TIMEOUT_S, name)
    forget_stop(deployment.folder)
    if before is None:
        return 0
    after = inspect_container(name)
    if after and before.id == after.id:
        return before.restarts

    return 0


def restart_deployment(deployment: Deployment, reporter: Reporter) -> int:
    """Start the container again, or make it where there is none, as the deployment's files say.

    The number of restarts that it had before. Raises HostError, DiskError.
    """
    name = deployment.plan.name
    container = inspect_container(name)
    if container is None:
        return start(deployment)

    with reporter.clock(f"restarting {name}", COMPOSE_TIMEOUT_S):
        docker(["restart", container_name(name)], f"restart {name}", COMPOSE_TIMEOUT_S, name)
    forget_stop(deployment.folder)
    after = inspect_container(name)
    if after is None:
        return 0
    return after.restarts


def require_docker_room(doing: str) -> None:
    """Raise DiskError where docker keeps its data and little room is left."""
    root = Path(engine_info().root)
    if root.is_absolute() and root.is_dir():  # else the engine is on another machine
        step = "free space there; docker system df says what takes it"
        require_room(root, DOCKER_ROOM, 0, doing, step)


def wait_until_it_answers(
    deployment: Deployment, restarts_before: int, reporter: Reporter
) -> Started:
    """Wait until the model answers a real request, saying which phase it is in.

    Raises HostError when the container dies or the API refuses; IncompleteError when time is up.
    """
    plan = deployment.plan
    with reporter.clock(f"{plan.name}: starting", plan.ready_timeout_s) as clock:
        watch = _StartWatch(deployment, reporter, clock)
        near = replace(deployment, plan=direct(plan))
        _pause(near.plan, read_health(near.plan), 0)
        while True:
            looked = Aside(lambda: inspect_container(plan.name))
            # Docker tells once where it is, and need not be asked for each request.
            near = replace(deployment, plan=direct(plan))
            answer = read_health(near.plan)
            log = ""
            if answer.status:
                answer, log = _ask(near)
            container = looked.result()
            trouble = container_trouble(container, restarts_before)
            if container is None or trouble:
                raise startup_failure(deployment, trouble)
            if answer.works:
                return watch.started(answer, log)
            if 400 <= answer.status < 500:
                what = f"{plan.name} refuses requests"
                raise HostError(what, answer.text[:500], f"hfship logs {plan.name}")
            watch.look(answer, container.started_at)
            _pause(near.plan, answer, clock.seconds)


def _ask(near: Deployment) -> Tuple[Answer, str]:
    """(the answer to a real request, the log): what vLLM measured is in that before it listens."""
    name = near.plan.name
    log = Aside(lambda: read_log(name, LOG_LINES))
    answer = ask_model(near, REQUEST_TIMEOUT_S)
    tail = log.result()
    return answer, tail.text


def _pause(plan: Plan, before: Answer, waited_s: float) -> None:
    """Wait until the next look; of an engine that was silent, no longer than until it answers, or
    is silent in another way: then its container may have ended. One that answers is not waited for
    at the start."""
    if before.status and not waited_s:
        return
    started = time.monotonic()
    most_s = min(max(LOOK_S, waited_s * LOOK_SHARE), MOST_LOOK_S)
    passed = 0.0
    while passed < most_s:
        time.sleep(POLL_S)
        passed = time.monotonic() - started
        if before.status or not plan.bind:
            continue
        answer = read_health(plan)
        if answer.status or (passed > LOOK_S and answer.text != before.text):
            return


class _StartWatch:
    """What was seen of a start so far: the phases with their times, and when the log last grew."""

    def __init__(self, deployment: Deployment, reporter: Reporter, clock: Clock) -> None:
        self._deployment, self._reporter = deployment, reporter
        self._plan = deployment.plan
        self._clock = clock
        self._times = PhaseTimes()
        self._phase = ""
        self._said_at = 0.0
        self._has_stalled = False

    def started(self, answer: Answer, log: str) -> Started:
        """The start that ends with this answer."""
        if not self._times.begins:
            return Started(answer, log=log)
        seconds = self._clock.seconds
        return Started(
            answer,
            round(seconds, 1),
            self._times.seconds(seconds),
            log,
        )

    def look(self, answer: Answer, since: float) -> None:
        """Look at the log since the container started: say the phase, or that nothing moves.

        Raises IncompleteError when the time is up.
        """
        log = read_log(self._plan.name, PROGRESS_LINES, since)
        phase = phase_of(log.text)
        self._times = self._times.with_phase(phase, self._clock.seconds)
        self._say(phase)
        silent_s = time.time() - max(log.last_at, since)
        if silent_s >= STALLED_AFTER_S:
            self._say_stalled(phase, silent_s)
        else:
            self._has_stalled = False
        if self._clock.seconds > self._plan.ready_timeout_s:
            raise self._too_late(phase, answer)

    def _say(self, phase: str) -> None:
        """Say a phase that is new; a percentage that grows is not said each time. The clock shows
        all."""
        name = self._plan.name
        self._clock.doing = f"{name}: {phase}"
        if phase == self._phase:
            return

        now = self._clock.seconds
        is_new = phase_name(phase) != phase_name(self._phase)
        if is_new or now - self._said_at > PLAIN_INTERVAL_S:
            self._said_at = now
            self._phase = phase
            self._reporter.enter_phase(name, phase)

    def _say_stalled(self, phase: str, silent_s: float) -> None:
        if self._has_stalled:
            return
        self._has_stalled = True
        name = self._plan.name
        stall = stall_of(self._plan, phase, cpu_percent(name))
        steps = "\n  try  ".join(stall.steps)
        self._reporter.warn(
            f"{name} is stalled: nothing new in its log for {human_seconds(silent_s)}"
            f" ({phase}); {stall.cause}\n  try  {steps}"
        )

    def _too_late(self, phase: str, answer: Answer) -> IncompleteError:
        name = self._plan.name
        log = log_tail(self._deployment, TAIL_LINES).rstrip()
        patience = human_seconds(self._plan.ready_timeout_s)
        return IncompleteError(
            f"{name} does not answer after {patience} ({phase})",
            f"last answer: {answer}; the end of its log:\n{log}",
            f"it goes on loading: hfship serve {name} waits again; hfship logs -f {name}",
        )


def startup_failure(deployment: Deployment, trouble: str) -> HostError:
    """The error for a container that died; it is stopped, lest it restart for ever."""
    name = deployment.plan.name
    log = log_tail(deployment, PROGRESS_LINES)
    with contextlib.suppress(HostError):  # what killed it is the news, not that stopping failed
        docker(compose(deployment, "stop"), f"stop {name}", COMPOSE_TIMEOUT_S)

    cause, next_step = explain(log, name)
    what = f"{name} did not start: {trouble}"
    if cause:
        what += f"; {cause}"
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    return HostError(what, f"the end of its log:\n{tail}", next_step or f"hfship logs {name}")
