# SPDX-License-Identifier: Apache-2.0
"""Monitoring of a site: the files of Prometheus, Grafana, Alertmanager and the exporters.

Owns DEPLOY_DIR/_monitoring, and what `hfship export monitoring DIR` writes for sites that have a
Prometheus and a Grafana of their own: the same without the compose file. Pure.

  prometheus/          prometheus.yml, targets.json (file_sd), the rules, and tests of these
  grafana/             dashboards, and how Grafana finds them and Prometheus without a network
  alertmanager/        alertmanager.yml, where alerts go out
  gpu-textfile.sh      GPU figures of nvidia-smi for node exporter, where there is no DCGM
  docker-compose.yml   all of it
Promises: nothing phones home; only Prometheus and Grafana have ports, on loopback unless the models
file says otherwise; the password of Grafana is made once, and in .env alone.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple

from hfship.serve.files import yaml_lines
from hfship.site.dashboards import dashboard_texts, provisioning_texts
from hfship.site.rules import (
    PROMETHEUS_FILE,
    RULES_FILE,
    RULES_TEST_FILE,
    TARGETS_FILE,
    prometheus_text,
    rules_test_text,
    rules_text,
    targets_text,
)
from hfship.site.settings import MonitoringSettings
from hfship.site.terms import SITE_NETWORK, GatewayModel

MONITORING_FOLDER = "_monitoring"
PROJECT = "hfship_monitoring"
COMPOSE_FILE = "docker-compose.yml"
ALERTMANAGER_FILE = "alertmanager/alertmanager.yml"
GPU_SCRIPT = "gpu-textfile.sh"
PASSWORD_VARIABLE = "GF_SECURITY_ADMIN_PASSWORD"

_GPU_SCRIPT = r"""#!/bin/sh
# GPU figures for node exporter (--collector.textfile.directory DIR), by nvidia-smi.
# From cron or a timer, every 15 s to 60 s: gpu-textfile.sh DIR
set -eu
dir=${1:?usage: gpu-textfile.sh DIR}
query=index,uuid,name,utilization.gpu,memory.used,memory.total,temperature.gpu,power.draw
nvidia-smi --query-gpu=$query --format=csv,noheader,nounits | awk -F ', *' '
  { labels = "{gpu=\"" $1 "\",uuid=\"" $2 "\",name=\"" $3 "\"} "
    put("utilization_ratio", $4, 0.01); put("memory_used_bytes", $5, 1048576)
    put("memory_total_bytes", $6, 1048576); put("temperature_celsius", $7, 1)
    put("power_watts", $8, 1) }
  function put(name, value, unit) {
    if (value ~ /^[0-9.]+$/) lines[name] = lines[name] "hfship_gpu_" name labels value * unit "\n" }
  END { for (name in lines) printf "# TYPE hfship_gpu_%s gauge\n%s", name, lines[name] }
' > "$dir/.hfship_gpu.$$"
mv "$dir/.hfship_gpu.$$" "$dir/hfship_gpu.prom"
"""


def exporters(settings: MonitoringSettings) -> List[Tuple[str, str]]:
    """The exporters beside the models, as (job, HOST:PORT)."""
    found = []
    if settings.node_exporter_image:
        found.append(("node", "node-exporter:9100"))
    if settings.dcgm_image:
        found.append(("gpu", "dcgm-exporter:9400"))
    return found


def export_texts(
    settings: MonitoringSettings, models: Sequence[GatewayModel], prometheus: str
) -> Dict[str, str]:
    """The files for a Prometheus and a Grafana, by path. `prometheus`: its address for Grafana."""
    texts = {
        f"prometheus/{PROMETHEUS_FILE}": prometheus_text(settings),
        f"prometheus/{TARGETS_FILE}": targets_text(models, exporters(settings)),
        f"prometheus/{RULES_FILE}": rules_text(),
        f"prometheus/{RULES_TEST_FILE}": rules_test_text(),
        GPU_SCRIPT: _GPU_SCRIPT,
    }
    provisioning = {**provisioning_texts(prometheus)}
    for name, text in dashboard_texts().items():
        provisioning[f"dashboards/{name}"] = text
    for name, text in provisioning.items():
        texts[f"grafana/{name}"] = text
    if settings.webhook or settings.mail_to:
        texts[ALERTMANAGER_FILE] = alertmanager_text(settings)

    return texts


def alertmanager_value(settings: MonitoringSettings) -> Mapping[str, Any]:
    """alertmanager.yml: what is critical at once, the rest once a day."""
    receiver: Dict[str, Any] = {"name": "site"}
    if settings.webhook:
        receiver["webhook_configs"] = [{"url": settings.webhook}]
    if settings.mail_to:
        mail = {
            "to": settings.mail_to,
            "from": settings.mail_from or settings.mail_to,
            "smarthost": settings.smtp or "localhost:25",
            "require_tls": False,
        }
        receiver["email_configs"] = [mail]
    warnings = {"matchers": ['severity="warning"'], "receiver": "site", "repeat_interval": "24h"}
    route = {
        "receiver": "site",
        "group_by": ["alertname"],
        "group_wait": "10s",
        "repeat_interval": "1h",
        "routes": [warnings],
    }
    return {"route": route, "receivers": [receiver]}


def alertmanager_text(settings: MonitoringSettings) -> str:
    """The text of alertmanager.yml."""
    return "\n".join(yaml_lines(alertmanager_value(settings))).replace("$$", "$") + "\n"


# -- the containers


def compose_value(
    settings: MonitoringSettings, owner: str, prometheus_image: str, grafana_image: str
) -> Mapping[str, Any]:
    """What docker-compose.yml says. Without an image of Grafana it is left out."""
    host = settings.host
    if ":" in host:  # IPv6
        host = f"[{host}]"
    services: Dict[str, Any] = {
        "prometheus": _service(
            prometheus_image,
            owner,
            command=[
                f"--config.file=/etc/prometheus/{PROMETHEUS_FILE}",
                "--storage.tsdb.path=/prometheus",
                f"--storage.tsdb.retention.time={settings.retention}",
                "--web.enable-lifecycle",
            ],
            volumes=[
                _bind("./prometheus", "/etc/prometheus"),
                _bind("./data/prometheus", "/prometheus", read_only=False),
            ],
            ports=[f"{host}:{settings.prometheus_port}:9090"],
        )
    }
    if grafana_image:
        services["grafana"] = _grafana(settings, owner, grafana_image, host)
    if settings.alertmanager_image:
        services["alertmanager"] = _service(
            settings.alertmanager_image,
            owner,
            command=["--config.file=/etc/alertmanager/alertmanager.yml", "--storage.path=/tmp"],
            volumes=[_bind("./alertmanager", "/etc/alertmanager")],
        )
    if settings.node_exporter_image:
        services["node-exporter"] = _service(
            settings.node_exporter_image,
            owner,
            command=["--path.rootfs=/host", "--collector.textfile.directory=/textfile"],
            volumes=[_bind("/", "/host"), _bind("./data/textfile", "/textfile")],
        )
    if settings.dcgm_image:
        gpus = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        dcgm = _service(settings.dcgm_image, "0:0")
        dcgm["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
        services["dcgm-exporter"] = dcgm

    return {
        "name": PROJECT,
        "services": services,
        "networks": {SITE_NETWORK: {"external": True}},
    }


def _grafana(settings: MonitoringSettings, owner: str, image: str, host: str) -> Mapping[str, Any]:
    service = _service(
        image,
        owner,
        volumes=[
            _bind("./grafana", "/etc/grafana/provisioning"),
            _bind("./data/grafana", "/var/lib/grafana", read_only=False),
        ],
        ports=[f"{host}:{settings.grafana_port}:3000"],
    )
    service["env_file"] = [".env"]  # the password of admin
    service["environment"] = {
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        "GF_PLUGINS_PREINSTALL_DISABLED": "true",
        "GF_NEWS_NEWS_FEED_ENABLED": "false",
        "GF_SECURITY_DISABLE_GRAVATAR": "true",
        "GF_USERS_ALLOW_SIGN_UP": "false",
    }
    return service


def _service(image: str, owner: str, **more: Any) -> Dict[str, Any]:
    return {
        "image": image,
        "pull_policy": "never",
        "user": owner,
        "networks": ["default", SITE_NETWORK],
        "restart": "unless-stopped",
        "security_opt": ["no-new-privileges:true"],
        "logging": {"driver": "json-file", "options": {"max-size": "20m", "max-file": "3"}},
        **more,
    }


def _bind(source: str, target: str, read_only: bool = True) -> Mapping[str, Any]:
    return {"type": "bind", "source": source, "target": target, "read_only": read_only}


def compose_text(
    settings: MonitoringSettings, owner: str, prometheus_image: str, grafana_image: str
) -> str:
    """The text of docker-compose.yml."""
    value = compose_value(settings, owner, prometheus_image, grafana_image)
    head = "# Written by hfship; `hfship serve --models FILE` writes it again."
    return "\n".join([head, *yaml_lines(value)]) + "\n"
