"""Monitoring: rules by promtool, dashboards by their queries in a real Prometheus that asks a real HAProxy and engines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import yaml

from conftest import Program, free_port
from hfship.site.dashboards import DASHBOARDS, dashboard_value, queries
from hfship.site.monitoring import alertmanager_text, compose_text, export_texts
from hfship.site.monitoring_run import newest_image
from hfship.site.rules import ALERTS, rules_value
from hfship.site.settings import MonitoringSettings
from hfship.site.store import gateway_text, write_keys
from hfship.site.terms import GatewayModel, Replica
from support import components
from support.engine import start_engine
from support.gateways import another_port, key_named, make_gateway

ALL = MonitoringSettings(
    webhook="http://pager/hook",
    mail_to="ops@site",
    smtp="mail:25",
    alertmanager_image="prom/alertmanager:v0.27.0",
    node_exporter_image="node:1",
    dcgm_image="dcgm:1",
)


def promtool(folder: Path, *words: str) -> None:
    program = Path(str(components.require("prometheus"))) / "promtool"
    done = subprocess.run([program, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model = GatewayModel("m", ("m",), (Replica("m", "vllm_m:8000"),))
    for name, text in export_texts(ALL, [model], "http://prometheus:9090").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_promtool_takes_configuration_and_rules(exported: Path) -> None:
    folder = exported / "prometheus"
    promtool(folder, "check", "config", "prometheus.yml")
    promtool(folder, "check", "rules", "hfship-rules.yml")


def test_rules_fire_when_they_should_and_not_else(exported: Path) -> None:
    folder = exported / "prometheus"
    promtool(folder, "test", "rules", "hfship-rules-test.yml")
    rules = (folder / "hfship-rules.yml").read_text()
    (folder / "hfship-rules.yml").write_text(rules.replace("[2m]) == 0", "[2m]) == 1"))
    with pytest.raises(AssertionError):
        promtool(folder, "test", "rules", "hfship-rules-test.yml")


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in rules_value()["groups"][0]["rules"] if "alert" in rule]
    assert len(set(names)) == len(ALERTS)
    assert all(alert.severity in ("critical", "warning") and alert.says for alert in ALERTS)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda one: one.uid)
def test_a_dashboard_is_one_for_grafana(dashboard: Any) -> None:
    """What its importer asks for: ids, a place of its own on a grid of 24 columns, a source, targets."""
    value = dashboard_value(dashboard)
    panels = value["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) and value["uid"] == dashboard.uid
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert (
            place["x"] + place["w"] <= 24
            and panel["targets"]
            and panel["type"] in ("stat", "timeseries")
        )
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"hfship"}


def test_grafana_needs_no_network(exported: Path) -> None:
    source = yaml.safe_load((exported / "grafana/datasources/hfship.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    value = yaml.safe_load(compose_text(ALL, "0:0", "prom/prometheus:v2", "grafana/grafana:11"))
    environment = value["services"]["grafana"]["environment"]
    assert environment["GF_ANALYTICS_REPORTING_ENABLED"] == "false"
    assert "PASSWORD" not in json.dumps(value)
    assert {name for name, one in value["services"].items() if "ports" in one} == {
        "prometheus",
        "grafana",
    }
    ports = [port for one in value["services"].values() for port in one.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "grafana" not in yaml.safe_load(compose_text(ALL, "0:0", "p:1", ""))["services"]


def test_alerts_go_out_by_mail_and_webhook() -> None:
    value = yaml.safe_load(alertmanager_text(ALL))
    (receiver,) = value["receivers"]
    assert receiver["webhook_configs"] == [{"url": "http://pager/hook"}]
    assert receiver["email_configs"][0]["smarthost"] == "mail:25"
    assert value["route"]["receiver"] == receiver["name"] == "site"


def test_gpu_figures_of_nvidia_smi(exported: Path, tmp_path: Path) -> None:
    """As node exporter reads them; what a card does not tell is left out."""
    fake = tmp_path / "bin"
    fake.mkdir()
    rows = "0, GPU-1, NVIDIA H200, 97, 1000, 143771, 41, 120.5\n1, GPU-2, NVIDIA H200, [N/A], 5, 143771, 39, 90\n"
    (fake / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{rows}END\n")
    (fake / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{fake}:{os.environ['PATH']}"}
    subprocess.run(["sh", exported / "gpu-textfile.sh", tmp_path], env=env, check=True)
    text = (tmp_path / "hfship_gpu.prom").read_text()
    assert 'hfship_gpu_utilization_ratio{gpu="0",uuid="GPU-1",name="NVIDIA H200"} 0.97' in text
    assert (
        'hfship_gpu_memory_used_bytes{gpu="0",uuid="GPU-1",name="NVIDIA H200"} 1048576000' in text
    )
    assert text.count("hfship_gpu_utilization_ratio{") == 1 and text.count("# TYPE") == 5
    assert not list(tmp_path.glob(".hfship_gpu*"))
    program = Path(str(components.require("prometheus"))) / "promtool"
    subprocess.run([program, "check", "metrics"], input=text.encode(), check=False)


def test_export_writes_the_files(hfship: Program, tmp_path: Path) -> None:
    refused = hfship("export", "monitoring", tmp_path / "out", code=2)
    assert "there is no gateway in" in refused.stderr
    folder = hfship.home / "deploy/_gateway"
    write_keys(folder, [])
    made = make_gateway(
        "haproxy-2.6", folder, [GatewayModel("m", ("m",), (Replica("m", "h:1"),))], [], 1
    )
    (folder / "gateway.json").write_text(gateway_text(made.gateway))
    said = json.loads(hfship("export", "monitoring", tmp_path / "out", "--json").stdout)
    assert "prometheus/hfship-rules.yml" in said["files"]
    targets = json.loads((tmp_path / "out/prometheus/targets.json").read_text())
    assert targets[0] == {
        "targets": ["h:1"],
        "labels": {"job": "vllm", "model": "m", "deployment": "m"},
    }
    again = json.loads(hfship("export", "monitoring", tmp_path / "out", "--json").stdout)
    assert again["files"] == []


SCHEDULE = """
[gateway]
[[model]]
name = "day"
mode = "on-demand"
[[model]]
name = "night"
mode = "on-demand"
[[schedule]]
at = "22:00"
model = "night"
instead_of = "day"
"""


def test_a_schedule_becomes_timers_of_systemd(hfship: Program, tmp_path: Path) -> None:
    file = tmp_path / "my models.toml"
    file.write_text(SCHEDULE)
    hfship("export", "schedule", tmp_path / "units", "--models", file)
    service = (tmp_path / "units/hfship-swap-1.service").read_text()
    line = next(line for line in service.splitlines() if line.startswith("ExecStart="))
    assert line.endswith(f'serve --models "{file}" night --instead-of day')
    assert "OnCalendar=22:00\n" in (tmp_path / "units/hfship-swap-1.timer").read_text()
    file.write_text("[gateway]\n")
    refused = hfship("export", "schedule", tmp_path / "units", "--models", file, code=2)
    assert "no [[schedule]]" in refused.stderr


def test_the_newest_image_is_taken() -> None:
    rows = [
        {"Repository": f"host/{name}", "Tag": tag}
        for name, tag in (
            ("prometheus", "v2.9"),
            ("prometheus", "v2.42"),
            ("prometheus-x", "v9"),
            ("prometheus", "<none>"),
        )
    ]
    assert newest_image("\n".join(map(json.dumps, rows)), "prometheus") == "host/prometheus:v2.42"
    assert newest_image("", "grafana") == ""


# -- a real Prometheus


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus with our files, which asks an engine and HAProxy; its address."""
    root = tmp_path_factory.mktemp("prometheus")
    engine = start_engine(free_port(), "m")
    models = [GatewayModel("m", ("m",), (Replica("m", f"127.0.0.1:{engine.port}"),))]
    gateway = make_gateway(
        "haproxy-2.6",
        Path("/tmp") / f"hfship-{os.getpid()}",
        models,
        [key_named("bob")],
        free_port(),
    )
    texts = export_texts(MonitoringSettings(), models, "")
    for name in ("prometheus.yml", "targets.json", "hfship-rules.yml"):
        text = texts[f"prometheus/{name}"].replace("15s", "1s")
        (root / name).write_text(text.replace("hfship_gateway:8405", gateway.gateway.metrics_bind))
    port = another_port()
    program = Path(str(components.require("prometheus"))) / "prometheus"
    words = [
        "--config.file",
        root / "prometheus.yml",
        "--storage.tsdb.path",
        root / "data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    gateway.start()
    with open(root / "log", "wb") as log:
        process = subprocess.Popen([program, *map(str, words)], stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(40):
            gateway.chat("m", stream=True, max_tokens=5)
            gateway.chat("nothing")
            with contextlib.suppress(OSError, KeyError):
                if len(asked(address, "rate(haproxy_backend_http_requests_total[10s])")) >= 1:
                    break
            time.sleep(0.5)
        time.sleep(2)
        yield address
    finally:
        process.kill()
        process.wait()
        gateway.end()
        engine.kill()


def asked(address: str, query: str) -> List[Dict[str, Any]]:
    """What Prometheus answers to a query; an error of it is raised."""
    words = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(f"{address}/api/v1/query?{words}", timeout=10) as response:
        value = json.load(response)
    assert value["status"] == "success"
    found: List[Dict[str, Any]] = value["data"]["result"]
    return found


def test_prometheus_sees_models_and_gateway(prometheus: str) -> None:
    up = {(row["metric"]["job"], row["value"][1]) for row in asked(prometheus, "up")}
    assert up == {("vllm", "1"), ("gateway", "1")}


# What no engine of ours and no machine without a GPU has, and what is empty when all is well.
MAY_BE_EMPTY = re.compile(
    r"DCGM|hfship_gpu|ALERTS|gpu_cache|prefix_cache|preemptions|_bucket|prompt_tokens"
)


def test_every_query_of_every_dashboard_is_answered(prometheus: str) -> None:
    assert len(queries()) > 20
    for query in queries():
        found = asked(prometheus, query.replace("$model", ".*"))
        assert found or MAY_BE_EMPTY.search(query), query
