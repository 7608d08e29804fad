# SPDX-License-Identifier: Apache-2.0
"""Replicas that have requests and do nothing about them: the suspicion of a hang, within seconds.

A suspicion is no proof: who acts on it asks the engine itself (serve/status). Pure, but for the
look. Promises: an engine that does steps, or has nothing to do, is never suspected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.base.values import dataclass
from hfship.serve.engine import Heartbeat
from hfship.serve.terms import Plan
from hfship.site.admin import GatewayDownError, ServerState, server_states
from hfship.site.readings import read_heartbeats
from hfship.site.terms import Gateway


@dataclass(frozen=True)
class Look:
    """A look at a replica: the steps that its engine has done (None: it does not say), and whether
    it has requests, by its own word or by that of the gateway."""

    steps: Optional[float]
    busy: bool


class Silences:
    """Since when each replica is busy without a step."""

    def __init__(self) -> None:
        self._steps: Dict[str, Optional[float]] = {}
        self._since: Dict[str, float] = {}

    def silent_s(self, name: str, look: Look, now: float) -> float:
        """Note a look at a replica at `now`; for how many seconds it is silent.

        >>> silences = Silences()
        >>> [silences.silent_s("m", Look(5, True), now) for now in (1.0, 2.0, 3.0)]
        [0.0, 1.0, 2.0]
        >>> silences.silent_s("m", Look(6, True), 4.0), silences.silent_s("m", Look(6, False), 9.0)
        (0.0, 0.0)
        """
        moved = look.steps is not None and look.steps != self._steps.get(name)
        if moved:
            self._steps[name] = look.steps
        if moved or not look.busy:
            self._since[name] = now

        return now - self._since.setdefault(name, now)


def look_of(heart: Optional[Heartbeat], sessions: int) -> Look:
    """What a heartbeat and the requests that the gateway has there tell together."""
    if heart is None:
        return Look(None, sessions > 0)
    return Look(heart.steps, heart.running + heart.waiting + sessions > 0)


def has_other(gateway: Gateway, states: Sequence[ServerState], name: str) -> bool:
    """Whether another replica of the same model answers, that clients can be sent to."""
    for model in gateway.models:
        names = [replica.name for replica in model.replicas]
        if name not in names:
            continue
        for one in states:
            is_other = one.backend == model.backend and one.name != name
            if is_other and one.state == "UP":
                return True
        return False
    return False


def read_looks(
    folder: Path, plans: Mapping[str, Plan], timeout_s: float
) -> Tuple[Dict[str, Look], List[ServerState]]:
    """A look at each of these replicas, and all of them as the gateway has them: none where that
    does not answer. Raises HostError."""
    try:
        states = server_states(folder)
    except GatewayDownError:
        return {}, []
    sessions = {one.name: one.sessions for one in states}
    hearts = read_heartbeats(plans, timeout_s)
    looks = {}
    for name in plans:
        looks[name] = look_of(hearts[name], sessions.get(name, 0))
    return looks, states
