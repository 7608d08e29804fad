# SPDX-License-Identifier: Apache-2.0
"""Replicas out of service: one that restarts is let go of first, one that hangs is cut off."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Optional

from hfship.base.errors import HostError
from hfship.site.admin import end_sessions, server_states, set_servers
from hfship.site.store import read_gateway

if TYPE_CHECKING:
    from hfship.base.report import Reporter

DRAIN_S = 600.0  # an answer that takes longer is cut off
UP_S = 30.0  # in which a replica that answers is found by the checks
_POLL_S = 0.5


def backend_of(folder: Path, deployment: str) -> Optional[str]:
    """The backend of the gateway that a deployment belongs to. Raises HostError, IntegrityError."""
    gateway = read_gateway(folder)
    if gateway is None:
        return None
    for model in gateway.models:
        if any(replica.name == deployment for replica in model.replicas):
            return model.backend
    return None


@contextlib.contextmanager
def drained(
    folder: Path, deployment: str, reporter: Reporter, patience_s: float = DRAIN_S
) -> Iterator[bool]:
    """Keep new requests from a replica, and wait until those that it has are answered. Gives
    whether all were. Where no gateway has it, nothing is done."""
    backend = backend_of(folder, deployment)
    if backend is None:
        yield True
        return
    try:
        set_servers(folder, backend, [deployment], "drain")
    except HostError:  # no gateway runs, or it does not know the replica yet
        yield True
        return
    try:
        with reporter.clock(f"{deployment}: answering its requests", patience_s):
            idle = _wait_until_idle(folder, backend, deployment, patience_s)
        yield idle
    finally:
        with contextlib.suppress(HostError):
            set_servers(folder, backend, [deployment], "ready")


def await_up(folder: Path, deployment: str, patience_s: float = UP_S) -> bool:
    """Wait until the gateway gives requests to a replica again, which takes two checks. Whether it
    does; where no gateway has it, at once."""
    deadline = time.monotonic() + patience_s
    backend = backend_of(folder, deployment)
    while backend and time.monotonic() < deadline:
        with contextlib.suppress(HostError):
            for one in server_states(folder):
                if (one.backend, one.name) == (backend, deployment) and one.state == "UP":
                    return True
        time.sleep(_POLL_S)
    return not backend


def _wait_until_idle(folder: Path, backend: str, name: str, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if not sessions_of(folder, backend, name):
            return True
        time.sleep(_POLL_S)
    return False


def sessions_of(folder: Path, backend: str, name: str) -> int:
    """The requests that run on a replica."""
    return sum(
        one.sessions for one in server_states(folder) if (one.backend, one.name) == (backend, name)
    )


def take_out(folder: Path, deployment: str) -> bool:
    """Keep all requests from a replica that hangs, and end those that wait for it: their clients
    may ask again, and are answered elsewhere. False where no gateway has it."""
    return send_elsewhere(folder, deployment) and end_requests(folder, deployment)


def send_elsewhere(folder: Path, deployment: str) -> bool:
    """Keep new requests from a replica. False where no gateway has it."""
    backend = backend_of(folder, deployment)
    if backend is None:
        return False
    try:
        set_servers(folder, backend, [deployment], "maint")
    except HostError:
        return False

    return True


def end_requests(folder: Path, deployment: str) -> bool:
    """End what still waits for a replica. False where no gateway has it.

    HAProxy 2.6 answers them 502. Of 3.x the log says 500, and clients get nothing: it writes that
    answer before the stream has a buffer for one (stream_shutdown_self in src/stream.c, which comes
    before stream_alloc_work_buffer; up to 3.5-dev5), whatever its configuration says. Clients of
    OpenAI ask again then. Where the engine is ended first, all versions say 502.
    """
    backend = backend_of(folder, deployment)
    if backend is None:
        return False
    try:
        end_sessions(folder, backend, deployment)
    except HostError:
        return False

    return True


def bring_back(folder: Path, deployment: str) -> None:
    """Let a replica have requests again that was taken out, as soon as it answers checks."""
    backend = backend_of(folder, deployment)
    if backend is None:
        return
    with contextlib.suppress(HostError):
        for server in server_states(folder):
            is_it = (server.backend, server.name) == (backend, deployment)
            if is_it and server.state == "MAINT":
                set_servers(folder, backend, [deployment], "ready")
