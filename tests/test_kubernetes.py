"""The site as manifests: the schemas of Kubernetes and of LeaderWorkerSet take them, and they say what compose says."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from conftest import Program
from hfship.serve.cards import assumed_gpus
from hfship.serve.plan import make_plan, vllm_arguments
from hfship.serve.terms import Host, Image, Plan, ServeOptions
from hfship.site.gateway_files import gateway_files, gateway_of
from hfship.site.hosts import Placing
from hfship.site.kubernetes import (
    PLACEHOLDER,
    ClusterGateway,
    ClusterModel,
    ClusterOptions,
    cluster_texts,
    object_name,
)
from hfship.site.maps import key_maps, model_maps
from hfship.site.settings import GatewaySettings
from hfship.site.terms import AccessKey, GatewayModel, Replica
from support import components
from test_facts import facts_of
from test_nodes import DP_OLD, NEW, OLD, group
from test_serve import Site, site  # noqa: F401

LWS = Path(__file__).parent / "fixtures/lws-v1.json"
VERSIONS = ("1.27", "1.37")  # the oldest with all that is used, and the newest that is known

# Prints one JSON object: file -> document -> mistakes. Its command line exits 0 on failures, so its Python API is used.
CHECKS = """
import json, sys
import jsonschema, kubernetes_validate, yaml
version, lws, *paths = sys.argv[1:]
spec_schema = json.load(open(lws))
def builtin(document):
    try:
        kubernetes_validate.validate(document, version, strict=True)
        return []
    except kubernetes_validate.ValidationError as exc:
        return [str(exc)]
found, kinds = [], []
for path in paths:
    for document in yaml.safe_load_all(open(path)):
        kind = document["kind"]
        kinds.append(kind)
        if kind == "LeaderWorkerSet":
            validator = jsonschema.Draft7Validator(spec_schema)
            found += [error.message for error in validator.iter_errors(document["spec"])]
            for name in ("leaderTemplate", "workerTemplate"):
                template = document["spec"]["leaderWorkerTemplate"][name]
                metadata = {"name": "x", **template["metadata"]}
                found += builtin({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
        elif kind != "ServiceMonitor":  # the schema of which nobody has here
            found += [f"{path}: {kind}: {text}" for text in builtin(document)]
print(json.dumps({"found": found, "kinds": kinds}))
"""


def plan_of(
    name: str, model: str = "Qwen3-8B", spec: str = "1x80GB", image: Image = NEW, **options: Any
) -> Plan:
    wanted = ServeOptions(device="gpu", **options)
    return make_plan(
        name,
        f"/data/models/huggingface/{name}",
        facts_of(model),
        Host(assumed_gpus(spec)),
        image,
        wanted,
    )


def a_gateway(models: Tuple[ClusterModel, ...]) -> ClusterGateway:
    before = tuple(
        GatewayModel(
            one.plan.name, (one.plan.name,), (Replica(one.name, f"{one.name}.models.svc:8000"),)
        )
        for one in models
    )
    gateway = replace(gateway_of(GatewaySettings(), before, (3, 2)), resolver="")
    upstream = {one.name: PLACEHOLDER for one in before}
    keys = [AccessKey("alice", "5e" * 32, rate=60)]
    files = gateway_files(
        gateway,
        GatewaySettings(),
        "haproxy:3.2",
        "99:99",
        "",
        model_maps(before, upstream),
        key_maps(before, keys),
    )
    return ClusterGateway(files, "haproxy:3.2", 8080)


SMALL = ClusterModel(plan_of("Qwen3-8B", wishes={"env": ["TOKEN=x"]}, env={"TOKEN": "x"}), 2)
PINNED = ClusterModel(plan_of("b"), 1, Placing(("gpu1",), {"gpu": "h200"}))
GROUPS = {
    "mp": ClusterModel(replace(group(NEW)[0], name="big"), 2),
    "ray": ClusterModel(replace(group(OLD)[0], name="old")),
    "dp": ClusterModel(
        replace(group(DP_OLD, model="Mixtral-8x7B", data_parallel_size=4)[0], name="moe")
    ),
}
MODELS = (SMALL, PINNED, *GROUPS.values())
SITE = ClusterOptions(registry="registry.site:5000", nodes=("gpu1", "gpu2"), service_monitor=True)


def written(
    folder: Path, options: ClusterOptions, models: Tuple[ClusterModel, ...] = MODELS
) -> List[Path]:
    texts = cluster_texts(models, options, a_gateway(models))
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts if name.endswith(".yaml")]


def checked(paths: List[Path], version: str) -> Any:
    python = components.require("kubernetes-validate")
    done = subprocess.run(
        [python, "-c", CHECKS, version, LWS, *paths], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_all_manifests(version: str, tmp_path: Path) -> None:
    said = checked(written(tmp_path, SITE), version)
    assert said["found"] == []
    kinds = [
        "ConfigMap",
        "Deployment",
        "LeaderWorkerSet",
        "Namespace",
        "NetworkPolicy",
        "PersistentVolume",
    ]
    kinds += ["PersistentVolumeClaim", "PodDisruptionBudget", "Secret", "Service", "ServiceMonitor"]
    assert sorted(set(said["kinds"])) == kinds


def test_models_as_images_need_a_newer_kubernetes(tmp_path: Path) -> None:
    paths = written(tmp_path, replace(SITE, model_volume="image"))
    assert not (tmp_path / "storage.yaml").exists()
    assert checked(paths, "1.37")["found"] == []
    assert any("image" in text for text in checked(paths, "1.27")["found"])
    text = (
        (tmp_path / "qwen3-8b-d6be32.yaml").read_text()
        if (tmp_path / "qwen3-8b-d6be32.yaml").exists()
        else ""
    )
    text = text or (tmp_path / f"{SMALL.name}.yaml").read_text()
    assert f'reference: "registry.site:5000/models/{object_name("Qwen3-8B")}:1-image"' in text


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    """Else a validator that sees nothing would pass all of the above."""
    path = tmp_path / "big.yaml"
    text = cluster_texts(MODELS, SITE)["big.yaml"]
    path.write_text(
        text.replace('"RecreateGroupOnPodRestart"', '"Sometimes"').replace(
            "containerPort:", "port:"
        )
    )
    found = checked([path], "1.37")["found"]
    assert any("Sometimes" in text for text in found) and any(
        "containerPort" in text for text in found
    )


def documents(name: str, options: ClusterOptions = SITE) -> Dict[str, Any]:
    """The manifests of a file, by kind, read by another program."""
    python = components.require("kubernetes-validate")
    program = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin))))"
    text = cluster_texts(MODELS, options, a_gateway(MODELS))[name]
    done = subprocess.run(
        [python, "-c", program], input=text, capture_output=True, text=True, check=True
    )
    return {one["kind"]: one for one in json.loads(done.stdout)}


def test_a_deployment_is_what_compose_starts() -> None:
    found = documents(f"{SMALL.name}.yaml")
    spec = found["Deployment"]["spec"]
    assert spec["replicas"] == 2 and spec["strategy"]["rollingUpdate"] == {
        "maxSurge": 0,
        "maxUnavailable": 1,
    }
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] + container["args"] == [
        "vllm",
        "serve",
        *vllm_arguments(SMALL.plan),
    ]
    assert container["image"] == "registry.site:5000/vllm/vllm-openai:v0.32.0"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert pod["terminationGracePeriodSeconds"] > 30 + 10 and not pod["enableServiceLinks"]
    model = container["volumeMounts"][0]
    assert (model["mountPath"], model["subPath"], model["readOnly"]) == (
        "/models/Qwen3-8B",
        "Qwen3-8B",
        True,
    )
    rules = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rules["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == ["gpu1", "gpu2"]
    assert found["NetworkPolicy"]["spec"]["egress"] == []
    names = {one["name"]: one.get("value") for one in container["env"]}
    assert "TOKEN" not in names and names["HF_HUB_OFFLINE"] == "1"


def test_nothing_secret_is_in_any_file() -> None:
    texts = cluster_texts(MODELS, SITE, a_gateway(MODELS))
    assert all("=x" not in text and '"x"' not in text for text in texts.values())
    assert "TOKEN" in texts["secrets.yaml"] and "TOKEN" not in texts[f"{SMALL.name}.yaml"]
    assert PLACEHOLDER in texts["secrets.yaml"] and PLACEHOLDER not in texts["gateway.yaml"]
    assert "5e5e" in texts["secrets.yaml"] and "5e5e" not in texts["gateway.yaml"]


def test_pins_and_labels_choose_nodes() -> None:
    pod = documents("b.yaml")["Deployment"]["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    rules = {
        rule["key"]: rule["values"] for rule in terms["nodeSelectorTerms"][0]["matchExpressions"]
    }
    assert rules == {"kubernetes.io/hostname": ["gpu1"], "gpu": ["h200"]}
    pod = documents("b.yaml", replace(SITE, nodes=()))["Deployment"]["spec"]["template"]["spec"]
    assert "affinity" in pod


SCRIPTS = [
    ("big", 0, ["--nnodes 2 --node-rank 0 --master-addr $VLLM_HOST_IP", "--host 0.0.0.0 --port 8000"]),
    ("big", 1, ["--node-rank $LWS_WORKER_INDEX --master-addr $LWS_LEADER_ADDRESS", "--headless"]),
    ("old", 0, ["ray start --head --port=6379", "--node-ip-address=$VLLM_HOST_IP", "RAY_ADDRESS=$VLLM_HOST_IP:6379"]),
    ("old", 1, ["ray start --address=$LWS_LEADER_ADDRESS:6379 --block --node-ip-address=$VLLM_HOST_IP"]),
    ("moe", 0, ["--data-parallel-address $VLLM_HOST_IP"]),
    ("moe", 1, ["--data-parallel-start-rank $((LWS_WORKER_INDEX * 2))", "--data-parallel-address $LWS_LEADER_ADDRESS"]),
]  # fmt: skip


@pytest.mark.parametrize("name, rank, parts", SCRIPTS)
def test_members_of_a_group_find_each_other(name: str, rank: int, parts: List[str]) -> None:
    found = documents(f"{name}.yaml")
    template = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2 and template["restartPolicy"] == "RecreateGroupOnPodRestart"
    pod = template[("leaderTemplate", "workerTemplate")[rank]]["spec"]
    (container,) = pod["containers"]
    (script,) = container["args"]
    script = script.replace("$$(", "$(")  # as Kubernetes reads it
    assert "@" not in script and all(part in script for part in parts), script
    subprocess.run(["sh", "-n", "-c", script], check=True)
    assert ("startupProbe" in container) == (rank == 0)
    address = container["env"][-1]
    assert address == {
        "name": "VLLM_HOST_IP",
        "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}},
    }
    assert found["Service"]["spec"]["selector"]["role"] == "leader"
    assert {"podSelector": {"matchLabels": {"app.kubernetes.io/name": name}}} in found[
        "NetworkPolicy"
    ]["spec"]["egress"][0]["to"]


def test_the_same_input_gives_the_same_bytes_and_a_readme_of_five_lines() -> None:
    texts = cluster_texts(MODELS, SITE, a_gateway(MODELS))
    assert texts == cluster_texts(MODELS, SITE, a_gateway(MODELS))
    lines = texts["README.txt"].splitlines()
    assert len(lines) == 5
    assert (
        "hfship push vllm-openai_v0.32.0 docker://registry.site:5000/vllm/vllm-openai:v0.32.0"
        in lines[1]
    )
    assert "LeaderWorkerSet" in lines[0] and "gpu1, gpu2" in lines[2]
    other = cluster_texts((SMALL,), ClusterOptions(model_volume="image", registry="r"))[
        "README.txt"
    ]
    assert f"hfship push Qwen3-8B docker://r/models/{SMALL.name}:1" in other
    asleep = tuple(replace(one, replicas=0) for one in (PINNED, GROUPS["mp"]))
    last = cluster_texts((SMALL, *asleep), SITE)["README.txt"].splitlines()[-1]
    assert last.endswith(
        "; on demand: kubectl -n models scale --replicas=1 deploy/b leaderworkerset/big"
    )


def test_names_that_kubernetes_takes() -> None:
    for name in ("Qwen3-8B", "x" * 90, "8b", "a.b_c", "qwen3-8b"):
        found = object_name(name)
        assert len(found) <= 63 and found == found.lower() and found[-1].isalnum(), found
    assert object_name("a.b") != object_name("a-b") != object_name("A-b")


# -- the command


FILE = """
[defaults]
image = "vllm/vllm-openai:v0.32.0"
[gateway]
image = "haproxy:3.2"
[[host]]
name = "gpu1"
[[host]]
name = "gpu2"
[[model]]
name = "m"
replicas = 2
[[key]]
name = "alice"
"""


def test_a_models_file_becomes_manifests(site: Site, model: Path, tmp_path: Path) -> None:  # noqa: F811
    file = site.hfship.home / "models.toml"
    file.write_text(FILE)
    out = tmp_path / "out"
    words = ("export", "kubernetes", "-o", out, "--models", file, "--assume-gpus", "8xH100")
    done = site(*words)
    assert f"wrote 6 files to {out}" in done.stdout
    names = [
        "README.txt",
        "gateway.yaml",
        "m.yaml",
        "namespace.yaml",
        "secrets.yaml",
        "storage.yaml",
    ]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "secrets.yaml").stat().st_mode & 0o777 == 0o600
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    site(*words)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert checked(sorted(out.glob("*.yaml")), "1.37")["found"] == []
    assert (
        '"m.models.svc:8000"' in before["gateway.yaml"].decode()
        or "m.models.svc:8000" in before["gateway.yaml"].decode()
    )
    file.write_text(FILE.replace("replicas = 2", 'mode = "on-demand"'))
    site(*words)
    assert "replicas: 0" in (out / "m.yaml").read_text()
    assert "scale --replicas=1 deploy/m" in (out / "README.txt").read_text()
    assert "model_asleep" in (out / "gateway.yaml").read_text()


REFUSED: List[Tuple[List[str], int, str]] = [
    (["swarm", "out"], 2, "its stack files have no GPUs"),
    (["kubernetes"], 2, "no folder is given"),
    (["kubernetes", "out"], 2, "none is given"),
    (["kubernetes", "out", "--models", "FILE", "--namespace", "A b"], 2, "is no name of Kubernetes"),
    (["kubernetes", "out", "--models", "FILE", "--registry", "http://x"], 2, "is not a registry"),
    (["kubernetes", "out", "--models", "FILE", "--model-volume", "image"], 2, "needs a registry"),
]  # fmt: skip


@pytest.mark.parametrize("words, code, said", REFUSED)
def test_what_cannot_be_exported_says_why(
    words: List[str], code: int, said: str, hfship: Program
) -> None:
    file = hfship.home / "models.toml"
    file.write_text(FILE)
    done = hfship(
        "export",
        *[str(file) if word == "FILE" else word for word in words],
        code=code,
        cwd=hfship.home,
    )
    assert said in " ".join(done.stderr.split())
    assert not (hfship.home / "out").exists()
