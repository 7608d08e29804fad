# SPDX-License-Identifier: Apache-2.0
"""The start of monitoring, in what docker is told; test_monitoring.py has the real programs."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, List

import pytest

from hfship.base.errors import HostError
from hfship.site.monitoring_run import newest_image, set_up_monitoring, with_images
from hfship.site.settings import MonitoringSettings
from hfship.site.terms import GatewayModel, Replica

MODELS = [GatewayModel("m", ("m",), (Replica("m", "vllm_m:8000"),))]
MORE = [*MODELS, GatewayModel("n", ("n",), (Replica("n", "vllm_n:8000"),))]


def listed(*images: str) -> str:
    """What docker lists."""
    rows = [image.rpartition(":") for image in images]
    return "\n".join(json.dumps({"Repository": name, "Tag": tag}) for name, _, tag in rows)


PROMETHEUS, GRAFANA = "prom/prometheus:v3.1.0", "grafana/grafana:11.0.0"


class Docker:
    """Notes what it is told."""

    def __init__(self, *images: str) -> None:
        self.images = listed(*images)
        self.told: List[str] = []

    def __call__(self, words: List[str], about: str, timeout_s: float = 0) -> str:
        self.told.append(" ".join(words))
        return self.images if words[0] == "image" else ""


def set_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *images: str, models: Any = MODELS, **fields: Any
) -> Any:
    """What was said, and what docker was told after the list of images."""
    docker = Docker(*images)
    monkeypatch.setattr("hfship.site.monitoring_run.docker", docker)
    said = set_up_monitoring(folder, MonitoringSettings(**fields), models)
    assert docker.told[0] == "image ls --format {{json .}}"
    return said, docker.told[1:]


def test_it_starts_reloads_and_leaves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "_monitoring"
    compose = f"compose -p hfship_monitoring -f {folder / 'docker-compose.yml'}"
    up, reload = f"{compose} up -d --remove-orphans", f"{compose} kill -s HUP prometheus"

    said, told = set_up(tmp_path, monkeypatch, PROMETHEUS, GRAFANA)
    assert told == [up, reload]
    assert said.startswith("monitoring was set up: Prometheus at http://127.0.0.1:9090, Grafana at")
    assert ", Grafana at http://127.0.0.1:3000 (admin; " in said
    assert said.endswith(f"(admin; GF_SECURITY_ADMIN_PASSWORD in {folder / '.env'})")
    assert PROMETHEUS in (folder / "docker-compose.yml").read_text()
    assert GRAFANA in (folder / "docker-compose.yml").read_text()
    assert sorted(one.name for one in (folder / "data").iterdir()) == [
        *("grafana", "prometheus", "textfile"),
    ]
    assert {stat.S_IMODE(one.stat().st_mode) for one in (folder / "data").iterdir()} == {0o700}
    assert stat.S_IMODE((folder / ".env").stat().st_mode) == 0o600
    assert folder.stat().st_mode & 0o007 == 0
    shown = [*folder.glob("prometheus/*"), folder / "docker-compose.yml"]
    assert {stat.S_IMODE(one.stat().st_mode) for one in shown} == {0o644}
    assert [one.name for one in folder.rglob("*") if one.is_file() and one.stat().st_mode & 1]
    password = (folder / ".env").read_text()

    said, told = set_up(tmp_path, monkeypatch, PROMETHEUS, GRAFANA)
    assert told == [up] and said.startswith("monitoring runs as it is")
    assert (folder / ".env").read_text() == password

    said, told = set_up(tmp_path, monkeypatch, PROMETHEUS, models=MORE)
    assert up in told and said.endswith("; docker has no image of Grafana")
    assert "was set up" in said


def test_without_prometheus_the_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match="no image of Prometheus"):
        set_up(tmp_path, monkeypatch, GRAFANA)
    assert (tmp_path / "_monitoring/prometheus/prometheus.yml").exists()
    assert not (tmp_path / "_monitoring/docker-compose.yml").exists()


def test_what_is_asked_for_wins_over_what_is_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {"prometheus_image": "my/prom:1", "grafana_image": "my/graf:1"}
    set_up(tmp_path, monkeypatch, PROMETHEUS, GRAFANA, **images)
    text = (tmp_path / "_monitoring/docker-compose.yml").read_text()
    assert "my/prom:1" in text and "my/graf:1" in text
    assert PROMETHEUS not in text and GRAFANA not in text


NODE, ALERTS = "prom/node-exporter:v1.0.0", "prom/alertmanager:v0.27.0"


@pytest.mark.parametrize(
    ("fields", "node", "alerts"),
    [
        ({}, NODE, ""),
        ({"webhook": "http://x"}, NODE, ALERTS),
        ({"mail_to": "a@b"}, NODE, ALERTS),
        ({"mail_to": "a@b", "alertmanager_image": "mine:1"}, NODE, "mine:1"),
        ({"node_exporter_image": "mine:1", "alertmanager_image": "mine:2"}, "mine:1", ""),
    ],
)
def test_images_that_work_without_more(fields: Any, node: str, alerts: str) -> None:
    made = with_images(MonitoringSettings(**fields), listed(NODE, ALERTS))
    assert (made.node_exporter_image, made.alertmanager_image) == (node, alerts)


def test_an_image_without_a_tag_is_none() -> None:
    assert newest_image("warning\n" + listed("a/x:<none>", "b/y:v9"), "x") == ""
    assert newest_image(listed("a/x:v2.9.0", "b/x:v2.10.0", "x:v1.0.0"), "x") == "b/x:v2.10.0"


def test_alerts_that_go_nowhere_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = set_up(tmp_path, monkeypatch, PROMETHEUS, webhook="http://x")
    assert "no image of Alertmanager" in said
    said, _ = set_up(tmp_path, monkeypatch, PROMETHEUS, mail_to="a@b")
    assert "no image of Alertmanager" in said
    said, _ = set_up(tmp_path, monkeypatch, PROMETHEUS)
    assert "Alertmanager" not in said
    said, _ = set_up(tmp_path, monkeypatch, PROMETHEUS, ALERTS, webhook="http://x")
    assert "Alertmanager" not in said
