# SPDX-License-Identifier: Apache-2.0
"""`export kubernetes`: what it is told, what it writes and says; test_kubernetes.py has the manifests."""

from __future__ import annotations

import argparse
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.errors import Exit, HostError, UsageError
from hfship.base.settings import ListedModel, ModelsFile
from hfship.base.values import dataclass, replace
from hfship.commands import export_kubernetes
from hfship.serve.terms import Gpu, Host, Plan
from hfship.site.hosts import Placing
from hfship.site.kubernetes import ClusterModel, ClusterOptions, object_name
from hfship.site.spread import Placed, Placement
from hfship.site.store import gateway_folder, write_keys
from hfship.site.terms import IMAGE, LOCAL, AccessKey

LISTED = (
    ListedModel("m", copies={"replicas": 2, "standby": 1, "hosts": ["gpu1"]}),
    ListedModel("night", copies={"mode": "on-demand", "replicas": 2, "affinity": "prefix"}),
)
HOSTS = [{"name": "gpu1"}, {"name": "gw", "roles": ["gateway"]}, {"name": "gpu2"}]


def context_of(folder: Path, models: Tuple[ListedModel, ...] = LISTED, **args: Any) -> Any:
    """A context that notes its result."""
    given = {
        "namespace": "models",
        "registry": "",
        "model_volume": LOCAL,
        "service_monitor": False,
        "assume_gpus": "",
        **args,
    }
    said: List[Any] = []
    reporter = SimpleNamespace(said=said, result_of=lambda *both: said.append(both))
    settings = SimpleNamespace(site_models_dir=folder / "site", deploy_dir=folder / "deploy")
    file = ModelsFile(folder / "m.toml", {}, models, LISTED[0], tables={"host": HOSTS})
    return SimpleNamespace(
        args=argparse.Namespace(**given), settings=settings, reporter=reporter, file=file
    )


def options_of(folder: Path, **args: Any) -> ClusterOptions:
    context = context_of(folder, **args)
    return export_kubernetes.cluster_options(context, context.file)


# -- what the cluster is like


def test_the_cluster_is_as_the_command_says(tmp_path: Path) -> None:
    """Its nodes are the hosts of the models file that are for models."""
    given = {"namespace": "llm", "registry": "r.site:5000/x", "model_volume": IMAGE}
    assert options_of(tmp_path, service_monitor=True, **given) == ClusterOptions(
        namespace="llm",
        registry="r.site:5000/x",
        model_volume=IMAGE,
        models_dir=str(tmp_path / "site"),
        nodes=("gpu1", "gpu2"),
        service_monitor=True,
    )
    assert options_of(tmp_path, registry="r") == ClusterOptions(
        registry="r", models_dir=str(tmp_path / "site"), nodes=("gpu1", "gpu2")
    )


WRONG: List[Tuple[Dict[str, str], str]] = [
    ({"namespace": "LLM"}, "is no name of Kubernetes"),
    ({"namespace": ""}, "is no name of Kubernetes"),
    ({"registry": "http://r"}, "is not a registry"),
    ({"model_volume": IMAGE}, "needs a registry"),
]


@pytest.mark.parametrize(("args", "said"), WRONG)
def test_a_cluster_that_cannot_be_is_refused(
    args: Dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        options_of(tmp_path, **args)


# -- the models


@pytest.mark.parametrize("assumed", ["", "2xH100"])
def test_copies_are_those_of_the_models_file(
    assumed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on demand sleeps until somebody scales it."""
    here = Host((Gpu(0, "GPU-1", "H200", 1),))
    planned: List[Any] = []

    def plan_for(request: Any, host: Host, listed: ListedModel) -> Plan:
        planned.append((request, len(host.gpus)))
        return Plan(name=listed.name)

    machine = SimpleNamespace(host=here)
    monkeypatch.setattr(export_kubernetes, "read_machine", lambda *_: machine)
    monkeypatch.setattr(export_kubernetes, "plan_for", plan_for)
    pairs = [(one, f"request {one.name}") for one in LISTED]
    monkeypatch.setattr(export_kubernetes, "requests_of", lambda *_: pairs)
    context = context_of(tmp_path, assume_gpus=assumed)
    assert export_kubernetes.cluster_models(context, context.file) == [
        ClusterModel(Plan(name="m"), 3, Placing(hosts=("gpu1",))),
        ClusterModel(Plan(name="night"), 0),
    ]
    count = 2 if assumed else 1
    assert planned == [("request m", count), ("request night", count)]


@dataclass(frozen=True)
class Request:
    """What is asked for of a model."""

    name: str
    network: str = "hfship"


def planned(
    monkeypatch: pytest.MonkeyPatch, image: str, refused: bool = False, gpus: int = 1
) -> Plan:
    """The plan of m, which a placement over nodes gives."""
    here = Host(tuple(Gpu(number, f"GPU-{number}", "H200", 1) for number in range(gpus)))
    plan = Plan(name="m", image=image)

    def decide(asked: Any, left: Any, previous: Any, quiet: Any) -> Plan:
        quiet.info("said to nobody")
        return plan

    def place(wishes: Any, nodes: Any, facts: Any, plan_of: Any) -> Placement:
        [wish] = wishes
        assert wish.request == Request("m", network="")
        assert wish.placing == Placing(nodes=3), "nodes of the cluster are none of its hosts"
        assert list(facts) == [one.name for one in nodes] and len(nodes) > 1
        assert all(one.offer is here and one.name == name for name, one in facts.items())
        assert plan_of(wish.request, here, None) is plan
        if refused:
            return Placement({}, {"m": HostError("m does not fit", "why", "step")})
        return Placement({"m": Placed(("node1",), (plan,))}, {})

    monkeypatch.setattr(export_kubernetes, "decide", decide)
    monkeypatch.setattr(export_kubernetes, "place", place)
    listed = ListedModel("m", copies={"hosts": ["a"], "host_labels": {"x": "y"}, "nodes": 3})
    request: Any = Request("m")
    return export_kubernetes.plan_for(request, here, listed)


def test_a_plan_is_one_for_any_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(monkeypatch, "r:5000/vllm:1").image == "r:5000/vllm:1"
    assert "".join(capsys.readouterr()) == ""
    with pytest.raises(UsageError, match="m has no image with a tag"):
        planned(monkeypatch, "r:5000/vllm")
    with pytest.raises(HostError, match="m does not fit") as caught:
        planned(monkeypatch, "v:1", refused=True)
    assert caught.value.next_step == "step"
    with pytest.raises(HostError, match="m does not fit") as caught:
        planned(monkeypatch, "v:1", refused=True, gpus=0)
    assert "--assume-gpus" in caught.value.next_step and caught.value.why == "why"


# -- the gateway


def test_the_gateway_stands_before_the_addresses_of_the_cluster(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    folder = gateway_folder(tmp_path / "deploy")
    folder.mkdir(parents=True, mode=0o700)
    write_keys(folder, (AccessKey("bob", "5e" * 32),))
    models = [ClusterModel(Plan(name=one.name, served_names=(one.name, "x"))) for one in LISTED]
    options = ClusterOptions(namespace="llm")
    asked = (context, context.file, models, options)
    assert export_kubernetes.cluster_gateway(*asked) is None
    tables = {"gateway": {"tls_cert": "c.pem", "tls_key": "k", "port": 443, "http_port": 80}}
    context.file = replace(context.file, tables=tables)
    found = export_kubernetes.cluster_gateway(context, context.file, models, options)
    assert found is not None and (found.image, found.port) == ("haproxy:3.2", 8080)
    config = found.files.plain["haproxy.cfg"]
    for name in ("m", "night"):
        assert f"{object_name(name)}.llm.svc:8000" in config
    assert "balance hash" in config and "model_asleep" in config
    assert "ssl crt" not in config and "resolvers" not in config
    assert "bob" in found.files.secret["maps/keys.map"]
    tables["gateway"] = {"image": "mine:2.6"}
    found = export_kubernetes.cluster_gateway(context, context.file, models, options)
    assert found is not None and found.image == "mine:2.6"


# -- what is written


def test_manifests_are_written_and_secrets_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"README.txt": "r\n", "secrets.yaml": "s\n", "m.yaml": "m\n"}

    def cluster_texts(models: Any, options: Any, gateway: Any) -> Dict[str, str]:
        assert (models, gateway) == ("models", "gateway") and options.namespace == "models"
        return texts

    monkeypatch.setattr(export_kubernetes, "cluster_models", lambda *_: "models")
    monkeypatch.setattr(export_kubernetes, "cluster_gateway", lambda *_: "gateway")
    monkeypatch.setattr(export_kubernetes, "cluster_texts", cluster_texts)
    context, folder = context_of(tmp_path), tmp_path / "deep/out"
    assert export_kubernetes.export_kubernetes(context, folder) == Exit.OK
    assert {one.name: one.read_text() for one in folder.iterdir()} == texts
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()}
    assert modes == {"README.txt": 0o644, "secrets.yaml": 0o600, "m.yaml": 0o644}
    [(text, value)] = context.reporter.said
    assert text == f"wrote 3 files to {folder}\n  then   cat {folder}/README.txt"
    assert value == {"folder": str(folder), "files": ["README.txt", "m.yaml", "secrets.yaml"]}


@pytest.mark.parametrize("given", [True, False])
def test_without_models_there_is_nothing_to_export(given: bool, tmp_path: Path) -> None:
    context = context_of(tmp_path, models=())
    if not given:
        context.file = None
    with pytest.raises(UsageError, match="none is given"):
        export_kubernetes.export_kubernetes(context, tmp_path)
