# SPDX-License-Identifier: Apache-2.0
"""Stopping a deployment on purpose, and what is left of it: that it was, and the end of its log.

Owns two files in DEPLOY_DIR/NAME (docs/formats.md, "Deployment"): stopped.json, which is there as
long as nobody serves it again, and last.log, what the container said last, since docker removes
its log with it.
Promises: what is stopped stays so: neither docker nor `status --repair` starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
from typing import TYPE_CHECKING, Optional

from hfship.base.below import remove_below
from hfship.base.errors import HfshipError, HostError
from hfship.base.files import disk_errors, remove_if_empty, write_below
from hfship.base.reading import parse_json
from hfship.base.text import utc
from hfship.base.values import dataclass
from hfship.serve.deployments import read_own
from hfship.serve.docker import COMPOSE_TIMEOUT_S, compose, docker, read_log

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.serve.deployments import Deployment

STOPPED_FILE, STOPPED_FORMAT = "stopped.json", "hfship-stopped/1"
LAST_LOG = "last.log"
LAST_LINES = 10_000
LAST_SIZE = 1 << 24  # bytes of last.log that are read


@dataclass(frozen=True)
class Stopped:
    """That somebody stopped a deployment: when (UTC), and who."""

    at: str
    by: str

    def __str__(self) -> str:
        return f"stopped {self.at} by {self.by}"


def stop_deployment(deployment: Deployment, remove: bool) -> None:
    """`docker compose down`; with `remove` the compile cache and the deployment's folder go, too.

    Raises HostError, DiskError.
    """
    name, folder = deployment.plan.name, deployment.folder
    arguments = ["down"]
    if remove:
        arguments.append("--volumes")
    else:
        keep_log(deployment)
        _mark(folder)  # first: whoever looks meanwhile must not take it for an accident
    try:
        docker(compose(deployment, *arguments), f"stop {name}", COMPOSE_TIMEOUT_S, name)
    except HostError:
        if not remove:
            forget_stop(folder)
        raise
    if remove:
        with disk_errors("remove", folder):
            shutil.rmtree(folder)
        remove_if_empty(folder.parent, False)


def keep_log(deployment: Deployment) -> None:
    """Keep what the container said last, before it is removed. Raises DiskError, HostError."""
    log = read_log(deployment.plan.name, LAST_LINES)
    if not log.text:
        return
    folder = deployment.folder
    path = f"{folder.name}/{LAST_LOG}"
    write_below(
        folder.parent,
        path,
        log.text,
        0o640,
        durable=False,
    )


def read_last_log(folder: Path) -> str:
    """What was kept of the log of a container that is gone, "" where nothing was.

    Raises HostError.
    """
    content = read_own(folder, LAST_LOG, LAST_SIZE, of_others=True) or b""
    return content.decode("utf-8", "replace")


def _mark(folder: Path) -> None:
    value = {
        "format": STOPPED_FORMAT,
        "at": utc(),
        "by": _user(),
    }
    text = json.dumps(value, sort_keys=True, indent=1)
    path = f"{folder.name}/{STOPPED_FILE}"
    write_below(folder.parent, path, text + "\n", 0o644)


def _user() -> str:
    """Who asks for it: of a root that sudo made, the user who called it."""
    by = os.environ.get("SUDO_USER", "")
    if by:
        return by
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return f"user {os.geteuid()}"


def read_stopped(folder: Path) -> Optional[Stopped]:
    """That the deployment in a folder was stopped on purpose, None where it was not."""
    content: Optional[bytes] = None
    with contextlib.suppress(HfshipError):
        content = read_own(folder, STOPPED_FILE, of_others=True)
    if content is None:
        return None
    with contextlib.suppress(ValueError, AttributeError):
        value = parse_json(content)
        at = value.get("at", "")
        by = value.get("by", "")
        return Stopped(str(at), str(by))
    return Stopped("", "")


def forget_stop(folder: Path) -> None:
    """The deployment is started again. Raises DiskError."""
    with disk_errors("remove", folder / STOPPED_FILE):
        remove_below(folder.parent, f"{folder.name}/{STOPPED_FILE}")
