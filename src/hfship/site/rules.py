# SPDX-License-Identifier: Apache-2.0
"""What Prometheus is told of a site: what to ask, and when to raise an alarm.

Owns the texts of prometheus.yml, of the list of targets (file_sd), of the rules and of their tests
by `promtool test rules`. Pure. Metrics of vLLM are asked by their names of old and new versions.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, Sequence, Tuple

from hfship.base.values import dataclass
from hfship.serve.files import yaml_lines
from hfship.site.settings import MonitoringSettings
from hfship.site.terms import METRICS_PORT, GatewayModel

RULES_FILE, TARGETS_FILE = "hfship-rules.yml", "targets.json"
RULES_TEST_FILE, PROMETHEUS_FILE = "hfship-rules-test.yml", "prometheus.yml"
GATEWAY_TARGET = f"hfship_gateway:{METRICS_PORT}"

# Old and new names of one thing: up to which version the first, from which the second.
KV_USAGE = "vllm:kv_cache_usage_perc or vllm:gpu_cache_usage_perc"  # 0.9.2, 0.11.2
INTER_TOKEN = "vllm:inter_token_latency_seconds_bucket"  # from 0.10.2
PER_TOKEN = "vllm:time_per_output_token_seconds_bucket"  # up to 0.14.1


@dataclass(frozen=True)
class Alert:
    """An alert: while `expr` holds for `lasting`. `says` is for who is called at night."""

    name: str
    expr: str
    lasting: str
    severity: str  # critical: somebody gets up; warning: on the next day
    says: str


@dataclass(frozen=True)
class Recorded:
    """A figure that is computed once for rules and dashboards."""

    name: str
    expr: str


RECORDED = (
    Recorded("hfship:kv_cache_usage", KV_USAGE),
    Recorded(
        "hfship:ttft_p95",
        "histogram_quantile(0.95, sum by (model_name, le)"
        " (rate(vllm:time_to_first_token_seconds_bucket[5m])))",
    ),
    Recorded(
        "hfship:inter_token_p95",
        "histogram_quantile(0.95, sum by (model_name, le)"
        f" (rate({INTER_TOKEN}[5m]) or rate({PER_TOKEN}[5m])))",
    ),
    Recorded(
        "hfship:tokens_per_second",
        "sum by (model_name) (rate(vllm:generation_tokens_total[1m]))",
    ),
)
ALERTS = (
    Alert(
        "ModelDown",
        'up{job="vllm"} == 0',
        "1m",
        "critical",
        "{{ $labels.instance }} does not answer; hfship status {{ $labels.deployment }}",
    ),
    Alert(
        "ModelHung",
        "(vllm:num_requests_running > 0 or vllm:num_requests_waiting > 0) and on (instance)"
        " (increase(vllm:iteration_tokens_total_count[2m]) == 0)",
        "1m",
        "critical",
        "{{ $labels.instance }} has requests and makes no tokens; hfship status --repair",
    ),
    Alert(
        "KvCacheFull",
        "hfship:kv_cache_usage > 0.95",
        "10m",
        "warning",
        "the KV cache of {{ $labels.instance }} is full: requests wait or are computed again",
    ),
    Alert(
        "RequestsQueue",
        "avg_over_time(vllm:num_requests_waiting[5m]) > 20",
        "5m",
        "warning",
        "{{ $value }} requests wait at {{ $labels.instance }}: one more replica?",
    ),
    Alert(
        "FirstTokenSlow",
        "hfship:ttft_p95 > 10",
        "10m",
        "warning",
        "clients of {{ $labels.model_name }} wait {{ $value }} s for a first token",
    ),
    Alert(
        "NoReplica",
        'sum by (proxy) (haproxy_server_status{state="UP", proxy=~"be_.*"}) == 0',
        "15s",
        "critical",
        "no replica of {{ $labels.proxy }} answers: its clients get 503",
    ),
    Alert(
        "OnStandby",
        'sum by (proxy) (haproxy_backend_active_servers{proxy=~"be_.*"}) == 0 and'
        ' sum by (proxy) (haproxy_backend_backup_servers{proxy=~"be_.*"}) > 0',
        "1m",
        "warning",
        "only the standby of {{ $labels.proxy }} answers",
    ),
    Alert(
        "GatewayDown",
        'up{job="gateway"} == 0',
        "30s",
        "critical",
        "the gateway does not answer: no client reaches a model",
    ),
    Alert(
        "GatewayErrors",
        'sum by (proxy) (rate(haproxy_backend_http_responses_total{code="5xx",'
        'proxy=~"be_.*"}[5m])) > 0.1',
        "5m",
        "warning",
        "clients of {{ $labels.proxy }} get errors",
    ),
    Alert(
        "DiskFull",
        'node_filesystem_avail_bytes{fstype!~"tmpfs|overlay|squashfs"}'
        ' / node_filesystem_size_bytes{fstype!~"tmpfs|overlay|squashfs"} < 0.08',
        "10m",
        "warning",
        "{{ $labels.mountpoint }} on {{ $labels.instance }} is nearly full; hfship clean",
    ),
    Alert(
        "CertificateEnds",
        "hfship_certificate_days < 14",
        "1h",
        "warning",
        "the certificate of the gateway ends in {{ $value }} days",
    ),
    Alert(
        "GpuXid",
        "DCGM_FI_DEV_XID_ERRORS > 0 or hfship_gpu_xid > 0",
        "0s",
        "critical",
        "GPU {{ $labels.gpu }} on {{ $labels.instance }} reports XID {{ $value }}",
    ),
    Alert(
        "GpuHot",
        "DCGM_FI_DEV_GPU_TEMP > 87 or hfship_gpu_temperature_celsius > 87",
        "5m",
        "warning",
        "GPU {{ $labels.gpu }} on {{ $labels.instance }} has {{ $value }} degrees",
    ),
)


def _yaml(value: Any) -> str:
    """YAML for Prometheus, in which a $ is a $."""
    head = "# Written by hfship; `hfship serve --models FILE` writes it again."
    return "\n".join([head, *yaml_lines(value)]).replace("$$", "$") + "\n"


def rules_value() -> Dict[str, Any]:
    """The rules."""
    rules: List[Dict[str, Any]] = []
    for recorded in RECORDED:
        rules.append({"record": recorded.name, "expr": recorded.expr})
    for alert in ALERTS:
        rules.append(
            {
                "alert": alert.name,
                "expr": alert.expr,
                "for": alert.lasting,
                "labels": {"severity": alert.severity},
                "annotations": {"summary": alert.says},
            }
        )
    return {"groups": [{"name": "hfship", "rules": rules}]}


def rules_text() -> str:
    """The text of hfship-rules.yml."""
    return _yaml(rules_value())


def targets_value(models: Sequence[GatewayModel]) -> List[Dict[str, Any]]:
    """What is asked, as file_sd has it: each replica, with its model.

    >>> from hfship.site.terms import Replica
    >>> targets_value([GatewayModel("m", ("m",), (Replica("m.2", "vllm_m.2:8000"),))])[0]["labels"]
    {'job': 'vllm', 'model': 'm', 'deployment': 'm.2'}
    """
    targets: List[Dict[str, Any]] = []
    for model in models:
        for replica in model.replicas:
            labels = {"job": "vllm", "model": model.name, "deployment": replica.name}
            targets.append({"targets": [replica.address], "labels": labels})
    targets.append({"targets": [GATEWAY_TARGET], "labels": {"job": "gateway"}})
    return targets


def targets_text(models: Sequence[GatewayModel], exporters: Sequence[Tuple[str, str]] = ()) -> str:
    """The text of targets.json. `exporters` are (job, HOST:PORT)."""
    targets = targets_value(models)
    for job, address in exporters:
        targets.append({"targets": [address], "labels": {"job": job}})
    return json.dumps(targets, indent=1) + "\n"


def prometheus_value(settings: MonitoringSettings) -> Dict[str, Any]:
    """prometheus.yml; files beside it are named as they are there."""
    value: Dict[str, Any] = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": [RULES_FILE],
        "scrape_configs": [
            {
                "job_name": "hfship",
                "file_sd_configs": [{"files": [TARGETS_FILE], "refresh_interval": "30s"}],
            }
        ],
    }
    if settings.alertmanager_image:
        value["alerting"] = {
            "alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]
        }
    return value


def prometheus_text(settings: MonitoringSettings) -> str:
    """The text of prometheus.yml."""
    return _yaml(prometheus_value(settings))


# -- tests of the rules, for `promtool test rules`


def _series(name: str, values: str) -> Dict[str, str]:
    return {"series": name, "values": values}


def _fires(alert: str, at: str, summary: str, **labels: str) -> Dict[str, Any]:
    severity = next(one.severity for one in ALERTS if one.name == alert)
    expected = {
        "exp_labels": {"severity": severity, **labels},
        "exp_annotations": {"summary": summary},
    }

    return {"eval_time": at, "alertname": alert, "exp_alerts": [expected]}


def _silent(alert: str, at: str) -> Dict[str, Any]:
    return {"eval_time": at, "alertname": alert, "exp_alerts": []}


def rules_test_text() -> str:
    """Tests of the rules: each that matters at night fires on its series, and on no other."""
    hung = 'instance="a",model_name="m"'
    works = 'instance="b",model_name="m"'
    series = [
        _series(f"vllm:num_requests_running{{{hung}}}", "3x80"),
        _series(f"vllm:iteration_tokens_total_count{{{hung}}}", "0+10x10 100x70"),
        _series(f"vllm:num_requests_running{{{works}}}", "3x80"),
        _series(f"vllm:iteration_tokens_total_count{{{works}}}", "0+10x80"),
        _series('vllm:gpu_cache_usage_perc{instance="old",model_name="m"}', "0.99x80"),
        _series('vllm:kv_cache_usage_perc{instance="new",model_name="m"}', "0.5x80"),
        _series('up{job="vllm",instance="a",deployment="m"}', "1x10 0x70"),
        _series('up{job="gateway",instance="g"}', "1x80"),
        _series('haproxy_server_status{proxy="be_m",server="a",state="UP"}', "1x20 0x60"),
        _series('haproxy_server_status{proxy="be_n",server="a",state="UP"}', "1x80"),
        _series("hfship_certificate_days", "20x10 13x400"),
        _series('hfship_gpu_temperature_celsius{gpu="0",instance="h"}', "60x80"),
    ]
    full = "the KV cache of old is full: requests wait or are computed again"
    cases = [
        _silent("ModelHung", "2m"),
        _fires(
            "ModelHung",
            "7m",
            "a has requests and makes no tokens; hfship status --repair",
            instance="a",
            model_name="m",
        ),
        _fires("KvCacheFull", "12m", full, instance="old", model_name="m"),
        _silent("ModelDown", "2m"),
        _fires(
            "ModelDown",
            "5m",
            "a does not answer; hfship status m",
            job="vllm",
            instance="a",
            deployment="m",
        ),
        _silent("GatewayDown", "10m"),
        _silent("NoReplica", "4m"),
        _fires("NoReplica", "7m", "no replica of be_m answers: its clients get 503", proxy="be_m"),
        _fires("CertificateEnds", "80m", "the certificate of the gateway ends in 13 days"),
        _silent("GpuHot", "10m"),
    ]
    test = {"interval": "15s", "input_series": series, "alert_rule_test": cases}
    return _yaml({"rule_files": [RULES_FILE], "evaluation_interval": "15s", "tests": [test]})
