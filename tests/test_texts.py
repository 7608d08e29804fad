# SPDX-License-Identifier: Apache-2.0
"""The texts that hfship writes for other programs, whole: tests/golden/texts holds them.

vLLM, docker, HAProxy, Kubernetes, Prometheus, keepalived and systemd read them, and other tests let
the real ones do so; here each line is held, also what none of them complains of. HFSHIP_GOLDEN=write
makes them anew: read the diff as those programs would.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from conftest import ROOT
from hfship.base.errors import HostError
from hfship.base.values import replace
from hfship.commands.serve_results import facts_summary, plan_summary
from hfship.ops.service import Service, install_text
from hfship.serve.explain import explanation
from hfship.serve.files import compose_text as model_compose
from hfship.serve.files import env_text, plan_text
from hfship.serve.fit import GpuKind
from hfship.serve.measured import Measured
from hfship.serve.terms import Plan
from hfship.site.dashboards import dashboard_texts, provisioning_texts
from hfship.site.gateway import config_text
from hfship.site.gatewayset import set_text
from hfship.site.keepalived import check_text, keepalived_text
from hfship.site.kubernetes import ClusterModel, ClusterOptions, cluster_texts
from hfship.site.maps import key_maps, map_text, model_maps
from hfship.site.monitoring import alertmanager_text, compose_text, export_texts
from hfship.site.settings import MonitoringSettings
from hfship.site.terms import IMAGE, ON_DEMAND, PREFIX, AccessKey, Gateway, GatewayModel, Replica
from hfship.site.timers import timer_texts
from test_facts import CONFIGS, facts_of
from test_keepalived import HOSTS, SET
from test_kubernetes import MODELS, SITE, a_gateway
from test_monitoring import ALL
from test_nodes import NEW, group
from test_plan import plan

GOLDEN = ROOT / "tests" / "golden" / "texts"


def joined(texts: Dict[str, str]) -> str:
    """Several files as one text."""
    return "\n".join(f"==== {name}\n{text}" for name, text in texts.items())


def of_plan(name: str, spec: str, **options: Any) -> Callable[[], str]:
    """All that is made of a model, and what is said of it; or why it cannot be served."""

    def text() -> str:
        facts = facts_of(name)
        try:
            made = plan(name, spec, **options)
        except HostError as exc:
            return f"{exc.what}\n{exc.why}\n{exc.next_step}\n"
        kind = GpuKind(80 * 10**9)
        lines = [
            f"{line.name} | {line.amount} | {line.how}" for line in explanation(facts, made, kind)
        ]
        return joined(
            {
                "facts": facts_summary(name, facts),
                "summary": plan_summary(made, Measured()),
                "explanation": "\n".join(lines),
                "plan.json": plan_text(made),
                "docker-compose.yml": model_compose(made),
                ".env": env_text(made, "sk-key"),
            }
        )

    return text


REPLICAS = (Replica("m", "vllm_m:8000"), Replica("m.2", "vllm_m.2:8000", True))
SERVED = (GatewayModel("m", ("m", "org/m"), REPLICAS), GatewayModel("n", ("n",), REPLICAS[:1]))
CHOSEN = (
    GatewayModel("m", ("m",), REPLICAS, affinity=PREFIX),
    GatewayModel("n", ("n",), REPLICAS[:1], mode=ON_DEMAND),
)
KEYS = (
    AccessKey("all", "aa" * 32),
    AccessKey("some", "bb" * 32, ("m",), rate=60, streams=2),
    AccessKey("none", "cc" * 32, ()),
)


def of_gateway(**fields: Any) -> Callable[[], str]:
    """haproxy.cfg."""
    return lambda: config_text(Gateway(**{"models": SERVED, "version": (3, 4), **fields}), "gen")


def of_maps() -> str:
    maps = {**model_maps(SERVED, {"m": "sk-m", "n": "sk-n"}), **key_maps(SERVED, KEYS)}
    return joined({name: map_text(entries) for name, entries in maps.items()})


def of_monitoring(settings: MonitoringSettings) -> Callable[[], str]:
    """All files of [monitoring]."""
    return lambda: joined(
        {
            **export_texts(settings, SERVED, "http://prometheus:9090"),
            "docker-compose.yml": compose_text(settings, "7:8", "prom:2", "grafana:11"),
            "alertmanager.yml": alertmanager_text(settings),
        }
    )


# One on the CPU that loads for two hours, and one over hosts with InfiniBand; on any node.
ODD_PLANS = (
    Plan(
        name="odd",
        model_dir="/data/models/odd-folder/",
        image="vllm:1",
        port=8000,
        memory_limit=7 << 30,
        cap_add=("SYS_NICE",),
        ready_timeout_s=7200,
    ),
    replace(group(NEW, infiniband=("mlx5_0",))[1], name="wide", cap_add=()),
)
ODD_MODELS = tuple(ClusterModel(one) for one in ODD_PLANS)
WITH_IMAGES = ClusterOptions(registry="registry.site:5000", model_volume=IMAGE)


def of_services() -> str:
    argv = ("/opt/my files/hfship.pyz", "watch", "--resume-all", "50%")
    texts = {}
    for stays in (True, False):
        for user in ("", "ops"):
            unit = Service("hfship-x", "About", argv, stays=stays, user=user)
            texts[f"stays={stays} user={user}"] = install_text(unit, Path("/home/me"))
    return joined(texts)


def of_address() -> str:
    texts = {f"host {own}": keepalived_text("10.0.0.9/24", HOSTS, own, "/check") for own in (0, 1)}
    texts["check"] = check_text(9000, tls=False)
    texts["check with TLS"] = check_text(9443, tls=True)
    return joined({**texts, "set": set_text(SET)})


def of_timers() -> str:
    from hfship.site.settings import Schedule

    schedules = [Schedule("22:00", "night", "day"), Schedule("06:00", "day", "night")]
    return joined(timer_texts(schedules, ["/opt/my files/hfship.pyz"], "/etc/models.toml"))


OPEN = {"bind": "0.0.0.0", "port": 9000, "ready_timeout_s": 60}
CASES: Dict[str, Callable[[], str]] = {
    **{f"plan-{name}": of_plan(name, "8x80GB") for name in CONFIGS},
    "plan-open": of_plan("Qwen3-8B", "1x80GB", **OPEN, env={"A": "b c"}, key="/k.pem"),
    "plan-two-copies": of_plan("Qwen3-8B", "2x80GB", data_parallel_size=2, max_model_len=4096),
    "plan-stages": of_plan("Qwen3-8B", "2x80GB", pipeline_parallel_size=2, max_num_seqs=7),
    "plan-tight": of_plan("Qwen3-8B", "1x24GB", wanted_concurrency=2),
    "plan-mounts": of_plan("Qwen3-8B", "1x80GB", lora=("a=/l/a",), mounts=("/x",)),
    "plan-too-large": of_plan("Llama-3.1-70B", "1x24GB"),
    "haproxy-2.6": of_gateway(version=(2, 6)),
    "haproxy-3.4": of_gateway(),
    "haproxy-tls": of_gateway(tls_bind=":8443", https_port=443, resolver="127.0.0.11:53"),
    "haproxy-large": of_gateway(max_body=9 << 20, max_upload=99 << 20, timeout_s=60),
    "haproxy-affinity": of_gateway(models=CHOSEN),
    "maps": of_maps,
    "kubernetes": lambda: joined(cluster_texts(MODELS, SITE, a_gateway(MODELS))),
    "kubernetes-images": lambda: joined(cluster_texts(ODD_MODELS, WITH_IMAGES)),
    "kubernetes-plain": lambda: joined(cluster_texts(MODELS[:1], ClusterOptions())),
    "monitoring": of_monitoring(ALL),
    "monitoring-plain": of_monitoring(MonitoringSettings()),
    "monitoring-mail": of_monitoring(MonitoringSettings("::1", mail_to="ops@site")),
    "monitoring-webhook": of_monitoring(MonitoringSettings(webhook="http://pager/a$b")),
    "dashboards": lambda: joined(dashboard_texts()),
    "provisioning": lambda: joined(provisioning_texts("http://prometheus:9090")),
    "keepalived": of_address,
    "systemd": of_services,
    "timers": of_timers,
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_is_what_it_was(name: str) -> None:
    said = CASES[name]()
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("HFSHIP_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(said, encoding="utf-8")
    assert said == path.read_text(encoding="utf-8")
