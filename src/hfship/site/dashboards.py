# SPDX-License-Identifier: Apache-2.0
"""The dashboards of a site: what Grafana shows, and how it finds that without a network.

Owns three dashboards: for operators (is it up, who uses it), for a model, for GPUs; and the files
by which Grafana takes them and Prometheus when it starts (provisioning). Pure. Queries name the
metrics of old and of new vLLM.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from hfship.base.values import dataclass
from hfship.site.rules import INTER_TOKEN, KV_USAGE, PER_TOKEN

_WIDTH, _HEIGHT = 12, 8  # of a panel, on a grid of 24 columns
_SMALL = 4  # height of a panel of a single figure
_SOURCE = {"type": "prometheus", "uid": "hfship"}


@dataclass(frozen=True)
class Panel:
    """One figure or graph. `queries` are (legend, PromQL)."""

    title: str
    queries: Tuple[Tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    about: str = ""


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; `variable` is a label of which one value is chosen, and where it comes from."""

    uid: str
    title: str
    panels: Tuple[Panel, ...]
    variable: str = ""
    values: str = ""


def _quantile(share: str, bucket: str) -> str:
    rate = f"sum by (le) (rate({bucket}[5m]))"

    return f"histogram_quantile({share}, {rate})"


def _of_model(metric: str) -> str:
    return f'{metric}{{model_name=~"$model"}}'


def _inter_token(share: str) -> str:
    rates = f"rate({_of_model(INTER_TOKEN)}[5m]) or rate({_of_model(PER_TOKEN)}[5m])"
    return f"histogram_quantile({share}, sum by (le) ({rates}))"


_ANSWERS = 'rate(haproxy_frontend_http_responses_total{proxy="openai"}[1m])'
OPERATORS = Dashboard(
    "hfship-site",
    "hfship: the site",
    (
        Panel("Replicas that answer", (("", 'sum(up{job="vllm"})'),), kind="stat"),
        Panel(
            "Replicas that do not", (("", 'count(up{job="vllm"} == 0) or vector(0)'),), kind="stat"
        ),
        Panel("Requests running", (("", "sum(vllm:num_requests_running)"),), kind="stat"),
        Panel("Requests waiting", (("", "sum(vllm:num_requests_waiting)"),), kind="stat"),
        Panel(
            "Alerts",
            (("{{alertname}} {{instance}}{{proxy}}", 'ALERTS{alertstate="firing"}'),),
            about="What fires now; nothing is good",
        ),
        Panel(
            "Requests by model",
            (("{{proxy}}", "sum by (proxy) (rate(haproxy_backend_http_requests_total[1m]))"),),
            "reqps",
        ),
        Panel(
            "Answers by status",
            (("{{code}}", f"sum by (code) ({_ANSWERS})"),),
            "reqps",
            about="4xx: refused by the gateway or vLLM; 5xx: failed",
        ),
        Panel(
            "Who serves",
            (("{{proxy}} {{server}}", "haproxy_server_current_sessions"),),
            about="Requests that run now, by replica",
        ),
        Panel(
            "Tokens a second",
            (("{{model_name}}", "sum by (model_name) (rate(vllm:generation_tokens_total[1m]))"),),
        ),
        Panel("KV cache in use", (("{{instance}}", KV_USAGE),), "percentunit"),
    ),
)
MODEL = Dashboard(
    "hfship-model",
    "hfship: a model",
    (
        Panel(
            "Time to first token",
            tuple(
                (name, _quantile(share, _of_model("vllm:time_to_first_token_seconds_bucket")))
                for name, share in (("p50", "0.5"), ("p95", "0.95"), ("p99", "0.99"))
            ),
            "s",
        ),
        Panel(
            "Time between tokens",
            tuple((name, _inter_token(share)) for name, share in (("p50", "0.5"), ("p95", "0.95"))),
            "s",
        ),
        Panel(
            "Running and waiting",
            (
                ("running {{instance}}", _of_model("vllm:num_requests_running")),
                ("waiting {{instance}}", _of_model("vllm:num_requests_waiting")),
            ),
        ),
        Panel(
            "KV cache in use",
            (
                (
                    "{{instance}}",
                    f"{_of_model('vllm:kv_cache_usage_perc')} or"
                    f" {_of_model('vllm:gpu_cache_usage_perc')}",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Tokens a second",
            (
                ("made", f"sum(rate({_of_model('vllm:generation_tokens_total')}[1m]))"),
                ("read", f"sum(rate({_of_model('vllm:prompt_tokens_total')}[1m]))"),
            ),
        ),
        Panel(
            "Prefixes found in the cache",
            (
                (
                    "share",
                    f"sum(rate({_of_model('vllm:prefix_cache_hits_total')}[5m])) /"
                    f" sum(rate({_of_model('vllm:prefix_cache_queries_total')}[5m]))",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Whole requests",
            (("p95", _quantile("0.95", _of_model("vllm:e2e_request_latency_seconds_bucket"))),),
            "s",
        ),
        Panel(
            "Requests that were pushed out of the cache",
            (("{{instance}}", f"rate({_of_model('vllm:num_preemptions_total')}[5m])"),),
            about="More than now and then: fewer requests at a time, or more memory",
        ),
    ),
    "model",
    "label_values(vllm:num_requests_running, model_name)",
)


def _gpu(dcgm: str, ours: str) -> Tuple[Tuple[str, str], ...]:
    return (("{{instance}} GPU {{gpu}}", f"{dcgm} or {ours}"),)


GPUS = Dashboard(
    "hfship-gpus",
    "hfship: GPUs",
    (
        Panel(
            "Busy",
            _gpu("DCGM_FI_DEV_GPU_UTIL / 100", "hfship_gpu_utilization_ratio"),
            "percentunit",
        ),
        Panel(
            "Memory in use",
            _gpu("DCGM_FI_DEV_FB_USED * 1048576", "hfship_gpu_memory_used_bytes"),
            "bytes",
        ),
        Panel(
            "Temperature", _gpu("DCGM_FI_DEV_GPU_TEMP", "hfship_gpu_temperature_celsius"), "celsius"
        ),
        Panel("Power", _gpu("DCGM_FI_DEV_POWER_USAGE", "hfship_gpu_power_watts"), "watt"),
        Panel("XID errors", _gpu("DCGM_FI_DEV_XID_ERRORS", "hfship_gpu_xid")),
    ),
)
DASHBOARDS = (OPERATORS, MODEL, GPUS)


def dashboard_value(dashboard: Dashboard) -> Dict[str, Any]:
    """A dashboard as Grafana's JSON (schemaVersion 39, of Grafana 10.4; newer ones read it)."""
    variables = []
    if dashboard.variable:
        variables.append(
            {
                "name": dashboard.variable,
                "type": "query",
                "datasource": _SOURCE,
                "query": {"query": dashboard.values, "refId": dashboard.variable},
                "refresh": 2,
                "includeAll": True,
                "multi": True,
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["hfship"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": _placed_panels(dashboard.panels),
    }


def _placed_panels(panels: Sequence[Panel]) -> List[Dict[str, Any]]:
    """The panels on the grid: single figures four in a row, graphs two."""
    placed = []
    x, y, row = 0, 0, 0
    for number, panel in enumerate(panels, 1):
        width, height = _WIDTH, _HEIGHT
        if panel.kind == "stat":
            width, height = _WIDTH // 2, _SMALL
        if x + width > 2 * _WIDTH:
            x, y = 0, y + row
        placed.append(_panel_value(panel, number, {"x": x, "y": y, "w": width, "h": height}))
        x, row = x + width, height
    return placed


def _panel_value(panel: Panel, number: int, place: Mapping[str, int]) -> Dict[str, Any]:
    targets = []
    for letter, (legend, query) in zip("ABCDEFGH", panel.queries):
        target = {"refId": letter, "datasource": _SOURCE, "expr": query, "legendFormat": legend}
        targets.append(target)
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": dict(place),
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def dashboard_texts() -> Dict[str, str]:
    """The dashboards by the names of their files."""
    return {
        f"{one.uid}.json": json.dumps(dashboard_value(one), indent=1) + "\n" for one in DASHBOARDS
    }


def queries() -> List[str]:
    """All queries of all dashboards."""
    return [query for one in DASHBOARDS for panel in one.panels for _, query in panel.queries]


def provisioning_texts(prometheus: str) -> Dict[str, str]:
    """What Grafana reads when it starts, by path. `prometheus` is its address there."""
    from hfship.serve.files import yaml_lines

    source = {
        "name": "hfship",
        "uid": _SOURCE["uid"],
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus,
        "isDefault": True,
    }
    folder = {
        "name": "hfship",
        "type": "file",
        "options": {"path": "/etc/grafana/provisioning/dashboards"},
    }
    files = {
        "datasources/hfship.yml": {"apiVersion": 1, "datasources": [source]},
        "dashboards/hfship.yml": {"apiVersion": 1, "providers": [folder]},
    }
    return {name: "\n".join(yaml_lines(value)) + "\n" for name, value in files.items()}
