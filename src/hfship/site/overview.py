# SPDX-License-Identifier: Apache-2.0
"""A site on one screen: its models, replicas, requests, tokens, keys and alerts.

Reading is apart from what it means. Promises: only what answers within seconds is asked, and what
does not is shown as unknown; nothing is started, changed or counted against a key.
"""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import NotFoundError
from hfship.base.text import counted, narrow_table
from hfship.base.values import asdict, dataclass, replace
from hfship.serve.docker import direct
from hfship.site.admin import GatewayDownError, KeyUse, ServerState, key_uses, server_states
from hfship.site.monitoring import MONITORING_FOLDER
from hfship.site.readings import (
    GPU_COLUMNS,
    GpuRow,
    certificate_days,
    certificate_trouble,
    read_alerts,
    read_gpus,
    read_heartbeats,
)
from hfship.site.store import gateway_folder, read_gateway
from hfship.site.terms import ON_DEMAND

if TYPE_CHECKING:
    from hfship.serve.engine import Heartbeat
    from hfship.serve.terms import Plan
    from hfship.site.terms import Gateway, GatewayModel, Replica

METRICS_TIMEOUT_S = 3.0
MUCH_KV, MANY_WAIT = 0.95, 20  # from which on somebody should look


@dataclass(frozen=True)
class ReplicaRow:
    """A replica: what the gateway does with it, and what it says of itself (None: unknown)."""

    model: str
    replica: str
    role: str  # active or standby
    state: str  # as HAProxy has it: UP, DOWN, MAINT, DRAIN; or ASLEEP, or unknown
    serves: bool  # whether it gets requests now
    gpus: int
    running: Optional[int] = None
    waiting: Optional[int] = None
    tokens_per_second: Optional[float] = None
    kv: Optional[float] = None

    def cells(self) -> Dict[str, str]:
        """The row for people."""
        cells = {
            "model": self.model,
            "replica": self.replica,
            "role": self.role,
            "state": self.state,
            "serves": "yes" if self.serves else "no",
            "gpus": str(self.gpus or "-"),
        }
        figures = {"running": self.running, "waiting": self.waiting}
        for name, value in figures.items():
            cells[name] = "-" if value is None else str(value)
        cells["tok/s"] = "-"
        if self.tokens_per_second is not None:
            cells["tok/s"] = f"{self.tokens_per_second:.0f}"
        cells["kv"] = "-"
        if self.kv is not None:
            cells["kv"] = f"{self.kv:.0%}"

        return cells


@dataclass(frozen=True)
class SiteView:
    """A site at one moment. `troubles` are what hfship sees, `alerts` what Prometheus says."""

    gateway: str  # up, down
    replicas: Tuple[ReplicaRow, ...]
    keys: Tuple[KeyUse, ...]  # that were used lately
    troubles: Tuple[str, ...]
    gpus: Tuple[GpuRow, ...] = ()
    alerts: Tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The site in a line.

        >>> SiteView("down", (), (), ()).headline
        'gateway down; 0 of 0 replicas serve'
        """
        rows = [row for row in self.replicas if row.state != ASLEEP]
        serving = sum(row.serves for row in rows)
        said = f"gateway {self.gateway}; {serving} of {counted(len(rows), 'replica')} serve"
        told = [row for row in rows if row.running is not None]
        if told:
            running = _sum(row.running for row in told)
            waiting = _sum(row.waiting for row in told)
            tokens = _sum(row.tokens_per_second for row in told)
            said += f"; requests: {running:.0f} running, {waiting:.0f} waiting"
            said += f"; {tokens:.0f} tokens/s"
        return said

    @property
    def keys_text(self) -> str:
        """The keys in use, in a line."""
        used = [f"{use.name} ({use.running} now, {use.last_minute}/min)" for use in self.keys]
        return ", ".join(used) or "none in the last minute"

    def text(self, width: int) -> str:
        """One screen."""
        rows = [row.cells() for row in self.replicas]
        lines = [self.headline, narrow_table(rows, COLUMNS, OPTIONAL_COLUMNS, width)]
        if self.gpus:
            gpus = [gpu.cells() for gpu in self.gpus]
            lines.append(narrow_table(gpus, GPU_COLUMNS, ("name", "temp"), width))
        lines.append(f"keys in use: {self.keys_text}")
        lines += self.troubles
        lines += [f"alert {alert}" for alert in self.alerts]
        wrapped = []
        for line in lines:
            wrapped += line.split("\n") if "\n" in line else textwrap.wrap(line, width)
        return "\n".join(wrapped)

    def json(self) -> Dict[str, Any]:
        """docs/json.md: status, with --site."""
        return {
            "schema": "hfship-site/1",
            "gateway": self.gateway,
            "replicas": [asdict(row) for row in self.replicas],
            "gpus": [asdict(row) for row in self.gpus],
            "keys": [asdict(use) for use in self.keys],
            "troubles": list(self.troubles),
            "alerts": list(self.alerts),
        }


def _sum(figures: Iterable[Optional[float]]) -> float:
    """Of those that are known."""
    return sum(one for one in figures if one is not None)


COLUMNS = (
    *("model", "replica", "role", "state", "serves"),
    *("gpus", "running", "waiting", "tok/s", "kv"),
)
ASLEEP = "ASLEEP"  # a model on demand of which no replica runs: nothing is wrong
OPTIONAL_COLUMNS = ("gpus", "role", "model", "serves")


def site_view(
    gateway: Gateway,
    plans: Mapping[str, Plan],
    states: Optional[Sequence[ServerState]],
    hearts: Mapping[str, Tuple[Optional[Heartbeat], Optional[Heartbeat]]],
    seconds: float,
    uses: Sequence[KeyUse],
) -> SiteView:
    """What was read, as one view. `states` is None where the gateway does not answer; `hearts` are
    those of each replica before and after some `seconds`."""
    rows: List[ReplicaRow] = []
    troubles: List[str] = []
    for model in gateway.models:
        seen = _ModelStates(model, states)
        for replica in model.replicas:
            both = hearts.get(replica.name, (None, None))
            figures = _figures(both, seconds)
            row = _row(model, replica, seen, plans.get(replica.name))
            rows.append(replace(row, **figures))
        if states is not None:
            troubles += _troubles(model, bool(seen.up), bool(seen.active))
    for row in rows:
        troubles += _row_troubles(row)

    running = [use for use in uses if use.running or use.last_minute]
    state_of_gateway = "down" if states is None else "up"
    return SiteView(
        gateway=state_of_gateway,
        replicas=tuple(rows),
        keys=tuple(running),
        troubles=tuple(troubles),
    )


class _ModelStates:
    """The replicas of a model as HAProxy has them: all, those that are up, and of these the active
    ones, without which the standby serves."""

    def __init__(self, model: GatewayModel, states: Optional[Sequence[ServerState]]) -> None:
        found = [one for one in states or () if one.backend == model.backend]
        self.all = {one.name: one for one in found}
        self.up = [one for one in found if one.state == "UP"]
        self.active = [one for one in self.up if not one.backup]

    def serves(self, name: str) -> bool:
        """Whether a replica gets requests now."""
        return name in [one.name for one in self.active or self.up]


def _row(
    model: GatewayModel, replica: Replica, seen: _ModelStates, plan: Optional[Plan]
) -> ReplicaRow:
    state = seen.all.get(replica.name)
    word = state.state if state else "unknown"
    if word == "DOWN" and not seen.up and model.mode == ON_DEMAND:
        word = ASLEEP
    role = "standby" if replica.standby else "active"
    gpus = len(plan.gpus) if plan else 0
    return ReplicaRow(
        model=model.name,
        replica=replica.name,
        role=role,
        state=word,
        serves=seen.serves(replica.name),
        gpus=gpus,
    )


def _troubles(model: GatewayModel, up: bool, active: bool) -> List[str]:
    if not up and model.mode == ON_DEMAND:  # it sleeps
        return []
    if not up:
        return [f"{model.name}: no replica answers; its clients get 503"]
    if not active:
        return [f"{model.name}: only the standby answers"]
    return []


def _row_troubles(row: ReplicaRow) -> List[str]:
    troubles = []
    if row.state == "MAINT":
        troubles.append(f"{row.replica}: set aside, by hand or since it hangs; hfship status")
    if row.kv is not None and row.kv >= MUCH_KV:
        troubles.append(f"{row.replica}: its KV cache is full, requests wait")
    if row.waiting is not None and row.waiting > MANY_WAIT:
        troubles.append(f"{row.replica}: {row.waiting} requests wait; one more replica?")
    return troubles


def _figures(
    hearts: Tuple[Optional[Heartbeat], Optional[Heartbeat]], seconds: float
) -> Dict[str, Any]:
    before, after = hearts
    if after is None:
        return {}
    figures: Dict[str, Any] = {
        "running": int(after.running),
        "waiting": int(after.waiting),
        "kv": round(after.kv, 3),
    }
    if before is not None and seconds > 0:
        made = max(0.0, after.made - before.made)
        figures["tokens_per_second"] = round(made / seconds, 1)

    return figures


# -- reading


def read_site(deploy_dir: Path, plans: Mapping[str, Plan], over_s: float = 1.0) -> SiteView:
    """The site now, with tokens counted for `over_s` seconds. Raises NotFoundError without a
    gateway, HostError, IntegrityError."""
    folder = gateway_folder(deploy_dir)
    gateway = read_gateway(folder)
    if gateway is None:
        step = "hfship serve --models FILE     # with [gateway] in it"
        raise NotFoundError(f"there is no gateway in {deploy_dir}", "", step)
    states: Optional[List[ServerState]] = None
    uses: List[KeyUse] = []
    try:
        states = server_states(folder)
        uses = key_uses(folder)
    except GatewayDownError:
        pass
    reached = {}
    for model in gateway.models:
        for replica in model.replicas:
            name = replica.name
            if name in plans:
                reached[name] = direct(plans[name])
    before = read_heartbeats(reached, METRICS_TIMEOUT_S)
    started = time.monotonic()
    gpus = read_gpus()
    alerts = read_alerts(deploy_dir / MONITORING_FOLDER)
    troubles = certificate_trouble(certificate_days(folder))
    time.sleep(max(0.0, started + over_s - time.monotonic()))
    after = read_heartbeats(reached, METRICS_TIMEOUT_S)
    seconds = time.monotonic() - started
    hearts = {name: (before[name], after[name]) for name in reached}
    view = site_view(gateway, plans, states, hearts, seconds, uses)
    return replace(
        view,
        gpus=gpus,
        alerts=tuple(alerts),
        troubles=(*view.troubles, *troubles),
    )
