# SPDX-License-Identifier: Apache-2.0
"""The containers of monitoring: their images, their folders, their start.

Promises: files that are as they should be are not written again; what Prometheus reads anew by
itself (targets) restarts nothing, and rules are reloaded.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

from hfship.base.errors import HostError
from hfship.base.files import disk_errors, make_dir
from hfship.base.values import replace
from hfship.serve.deployments import make_own_folder, read_own
from hfship.serve.docker import COMPOSE_TIMEOUT_S, docker
from hfship.site.gateway_run import owner, tag_version
from hfship.site.monitoring import (
    COMPOSE_FILE,
    GPU_SCRIPT,
    MONITORING_FOLDER,
    PASSWORD_VARIABLE,
    PROJECT,
    compose_text,
    export_texts,
)
from hfship.site.settings import MonitoringSettings
from hfship.site.store import write_files
from hfship.site.terms import GatewayModel

ENV_FILE = ".env"
DATA_FOLDERS = ("prometheus", "grafana", "textfile")


def monitoring_folder(deploy_dir: Path) -> Path:
    """The folder of monitoring."""
    return deploy_dir / MONITORING_FOLDER


def newest_image(listing: str, name: str) -> str:
    """The newest image of which the repository is called `name`, "" without one.

    >>> rows = [{"Repository": "prom/prometheus", "Tag": tag} for tag in ("v2.42.0", "v3.1.0")]
    >>> newest_image("\\n".join(map(json.dumps, rows)), "prometheus")
    'prom/prometheus:v3.1.0'
    """
    found = []
    for line in listing.splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        repository, tag = row["Repository"], row["Tag"]
        if repository.rpartition("/")[2] == name and tag != "<none>":
            found.append((tag_version(tag), f"{repository}:{tag}"))
    return max(found, default=((), ""))[1]


def write_export(folder: Path, texts: Mapping[str, str]) -> List[str]:
    """Write the files for a Prometheus and a Grafana that are there; those that changed. Raises
    DiskError."""
    make_dir(folder)
    written = write_files(folder, texts, 0o644)
    with disk_errors("write", folder / GPU_SCRIPT):
        (folder / GPU_SCRIPT).chmod(0o755)

    return written


def set_up_monitoring(
    deploy_dir: Path, settings: MonitoringSettings, models: Sequence[GatewayModel]
) -> str:
    """Have Prometheus and Grafana watch the site; what was done, for people. Raises HostError where
    docker has no image of Prometheus; the files are there then."""
    folder = monitoring_folder(deploy_dir)
    make_own_folder(folder)
    listing = docker(["image", "ls", "--format", "{{json .}}"], "list images")
    settings = with_images(settings, listing)
    changed = write_export(folder, export_texts(settings, models, "http://prometheus:9090"))
    prometheus = settings.prometheus_image or newest_image(listing, "prometheus")
    if not prometheus:
        step = "bring prom/prometheus, or give the files there to a Prometheus that is there"
        raise HostError("docker has no image of Prometheus", f"its files are in {folder}", step)
    grafana = settings.grafana_image or newest_image(listing, "grafana")
    _make_folders(folder)
    _make_password(folder)
    text = compose_text(settings, owner(), prometheus, grafana)
    changed += write_files(folder, {COMPOSE_FILE: text}, 0o644)
    up = ["compose", "-p", PROJECT, "-f", str(folder / COMPOSE_FILE), "up", "-d"]
    docker([*up, "--remove-orphans"], "start monitoring", COMPOSE_TIMEOUT_S)
    if any(name.startswith("prometheus/") for name in changed):
        hang_up = ["compose", "-p", PROJECT, "-f", str(folder / COMPOSE_FILE), "kill"]
        docker([*hang_up, "-s", "HUP", "prometheus"], "reload Prometheus")
    return _told(settings, grafana, changed, folder)


def with_images(settings: MonitoringSettings, listing: str) -> MonitoringSettings:
    """The settings with the newest images that docker has of what works without more: node
    exporter, and Alertmanager where it has somebody to tell."""
    node = settings.node_exporter_image or newest_image(listing, "node-exporter")
    alerts = ""
    if settings.webhook or settings.mail_to:
        alerts = settings.alertmanager_image or newest_image(listing, "alertmanager")
    return replace(settings, node_exporter_image=node, alertmanager_image=alerts)


def _told(settings: MonitoringSettings, grafana: str, changed: List[str], folder: Path) -> str:
    state = "runs as it is"
    if changed:
        state = "was set up"
    said = f"monitoring {state}: Prometheus at http://{settings.host}:{settings.prometheus_port}"
    if (settings.webhook or settings.mail_to) and not settings.alertmanager_image:
        said += "; docker has no image of Alertmanager: alerts go nowhere"
    if grafana:
        said += f", Grafana at http://{settings.host}:{settings.grafana_port}"
        return said + f" (admin; {PASSWORD_VARIABLE} in {folder / ENV_FILE})"
    return said + "; docker has no image of Grafana"


def _make_folders(folder: Path) -> None:
    for name in DATA_FOLDERS:
        place = folder / "data" / name
        with disk_errors("write", place):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)


def _make_password(folder: Path) -> None:
    if read_own(folder, ENV_FILE) is None:
        text: Dict[str, str] = {ENV_FILE: f"{PASSWORD_VARIABLE}={secrets.token_urlsafe(18)}\n"}
        write_files(folder, text, 0o600)
