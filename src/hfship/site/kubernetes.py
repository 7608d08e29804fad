# SPDX-License-Identifier: Apache-2.0
"""A site as manifests of Kubernetes: the same plans, for clusters that outgrow compose.

Pure: the same input gives the same bytes. Files only, which an operator reads and applies:
  README.txt       five lines: images, models, keys, apply
  namespace.yaml   the namespace
  storage.yaml     the folder of models on local disks, as one volume that all pods read
  secrets.yaml     keys of the models as "replace-me", and the gateway's maps
  MODEL.yaml       Deployment, or LeaderWorkerSet over several nodes; Service, PodDisruptionBudget,
                   NetworkPolicy; ServiceMonitor where it is asked for
  gateway.yaml     HAProxy with our configuration as ConfigMap, where there is a [gateway]

Checked against the schemas of Kubernetes 1.27 to 1.37 and of LeaderWorkerSet v1; an image volume
needs 1.31, and is on by default from 1.35 on.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

from hfship.base.text import counted
from hfship.base.values import dataclass, replace
from hfship.hub.registry_protocol import parse_reference
from hfship.serve.files import asked_variables, plain_yaml
from hfship.serve.nodes import node_command
from hfship.serve.plan import LOADING_S, vllm_arguments
from hfship.serve.terms import CONTAINER_PORT, KEY_VARIABLE
from hfship.site.gateway import CONFIG_FILE
from hfship.site.hosts import Placing
from hfship.site.terms import IMAGE, INSIDE, LOCAL, METRICS_PORT, PLAIN_PORT

if TYPE_CHECKING:
    from hfship.serve.terms import Plan
    from hfship.site.gateway_files import GatewayFiles

NODE_LABEL = "hfship/models"  # of nodes whose disk has the models, where no [[host]] names them
CLAIM = "hfship-models"
GATEWAY = "hfship-gateway"
PLACEHOLDER = "replace-me"  # for the key of all models
TO_FILL_IN = "fill-in"  # for variables whose values are nobody else's business
PROBE_S = 10
STOP_S = 90  # a pause until no new request comes, and --shutdown-timeout
PAUSE_S = 10
STORAGE = "4Ti"  # Kubernetes wants a number, and measures nothing
POD_INTERFACE = "eth0"

GATEWAY_RUN = "/gateway-run"  # for HAProxy's socket: a volume in INSIDE could not be mounted
# Kubernetes ends a pod by SIGTERM, which cuts answers off; SIGUSR1 ends HAProxy after the last one.
GATEWAY_STOP = "sleep 5; kill -USR1 1; sleep 3600"

Manifest = Dict[str, Any]


@dataclass(frozen=True)
class ClusterOptions:
    """What the cluster is like."""

    namespace: str = "models"
    registry: str = ""  # of the site; "": images as docker names them here
    model_volume: str = LOCAL
    models_dir: str = "/data/models/huggingface"  # on the nodes
    nodes: Tuple[str, ...] = ()  # names of those that have it; (): those with NODE_LABEL
    service_monitor: bool = False


@dataclass(frozen=True)
class ClusterModel:
    """A model, how many copies of it run, and where they may."""

    plan: Plan
    replicas: int = 1
    placing: Placing = Placing()

    @property
    def name(self) -> str:
        """Its name in Kubernetes."""
        return object_name(self.plan.name)


@dataclass(frozen=True)
class ClusterGateway:
    """The gateway: its files (site/gateway_files.py), its image, and the port for clients."""

    files: GatewayFiles
    image: str
    port: int


def object_name(name: str) -> str:
    """A name as Kubernetes takes it: lower case, digits and "-", different for different names.

    >>> object_name("qwen3-8b"), object_name("Qwen3.8B")
    ('qwen3-8b', 'qwen3-8b-50a0b8')
    """
    plain = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")[:50]
    if plain == name:
        return plain
    if not plain[:1].isalpha():
        plain = f"m{plain}"
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{plain}-{digest[:6]}"


def image_in(registry: str, reference: str) -> str:
    """An image as the site's registry names it.

    >>> image_in("registry.site:5000", "vllm/vllm-openai:v0.32.0")
    'registry.site:5000/vllm/vllm-openai:v0.32.0'
    >>> image_in("registry.site", "ghcr.io/org/vllm:1"), image_in("", "haproxy:3.2")
    ('registry.site/org/vllm:1', 'haproxy:3.2')
    """
    if not registry:
        return reference
    first, slash, rest = reference.partition("/")
    has_host = bool(slash) and ("." in first or ":" in first or first == "localhost")
    path = rest if has_host else reference
    return f"{registry}/{path}"


def model_image(name: str, options: ClusterOptions) -> str:
    """Where `hfship push NAME docker://...` puts a model to be mounted."""
    return f"{options.registry}/models/{object_name(name)}:1"


# -- all files


def cluster_texts(
    models: Sequence[ClusterModel],
    options: ClusterOptions,
    gateway: Optional[ClusterGateway] = None,
) -> Dict[str, str]:
    """The texts of all files, by name."""
    texts = {"namespace.yaml": manifest_text([namespace(options)])}
    if options.model_volume == LOCAL:
        texts["storage.yaml"] = manifest_text(storage(options))
    secrets = [model_secret(model, options) for model in models]
    for model in models:
        texts[f"{model.name}.yaml"] = manifest_text(model_manifests(model, options))
    if gateway is not None:
        secrets.append(gateway_secret(gateway, options))
        texts["gateway.yaml"] = manifest_text(gateway_manifests(gateway, options))
    texts["secrets.yaml"] = manifest_text(secrets)
    texts["README.txt"] = readme(models, options, gateway)
    return dict(sorted(texts.items()))


def manifest_text(manifests: Sequence[Manifest]) -> str:
    """Manifests as one file."""
    documents = []
    for manifest in manifests:
        lines = plain_yaml(manifest)
        documents.append("\n".join(lines))
    return "\n---\n".join(documents) + "\n"


def readme(
    models: Sequence[ClusterModel], options: ClusterOptions, gateway: Optional[ClusterGateway]
) -> str:
    """What to do with the files, in five lines."""
    space = options.namespace
    count = counted(len(models), "model")
    groups = [model.name for model in models if model.plan.nodes]
    first = f"Manifests of {count} for namespace {space}; nothing was applied."
    if groups:
        first += f" {', '.join(groups)}: the LeaderWorkerSet controller must be installed."
    images = [model.plan.image for model in models]
    if gateway is not None:
        images.append(gateway.image)
    lines = [
        first,
        "images:  " + _images_step(images, options),
        "models:  " + _models_step(models, options),
        f'keys:    sed -i "s/{PLACEHOLDER}/$(openssl rand -hex 24)/" secrets.yaml'
        f"    # and {TO_FILL_IN}, where it stands",
        f"apply:   kubectl apply -f namespace.yaml -f .; kubectl -n {space} get pods -w"
        + _sleepers_step(models, space),
    ]
    return "\n".join(lines) + "\n"


def _sleepers_step(models: Sequence[ClusterModel], space: str) -> str:
    """How the models start of which nothing runs until then; "" where there are none."""
    names = []
    for model in models:
        if model.replicas:
            continue
        kind = "deploy"
        if model.plan.nodes:
            kind = "leaderworkerset"
        names.append(f"{kind}/{model.name}")
    if not names:
        return ""
    which = " ".join(names)
    return f"; on demand: kubectl -n {space} scale --replicas=1 {which}"


def _images_step(images: Sequence[str], options: ClusterOptions) -> str:
    unique = list(dict.fromkeys(images))
    if not options.registry:
        return f"{', '.join(unique)} must be on every node, or export with --registry"
    commands = []
    for image in unique:
        folder = parse_reference(f"docker://{image}").folder_name
        commands.append(f"hfship push {folder} docker://{image_in(options.registry, image)}")
    return "; ".join(commands)


def _models_step(models: Sequence[ClusterModel], options: ClusterOptions) -> str:
    if options.model_volume == IMAGE:
        commands = []
        for model in models:
            folder = _folder_of(model.plan)
            commands.append(f"hfship push {folder} docker://{model_image(folder, options)}")
        return "; ".join(commands)
    names = " ".join(dict.fromkeys(_folder_of(model.plan) for model in models))
    where = ", ".join(options.nodes)
    if not where:
        where = f"each node that has kubectl label node NODE {NODE_LABEL}=true"
    return f"hfship unpack {names}    # into {options.models_dir} of {where}"


def _folder_of(plan: Plan) -> str:
    """The name of the model's folder."""
    return plan.model_dir.rstrip("/").rpartition("/")[2]


# -- parts that all share


def _head(api: str, kind: str, name: str, options: ClusterOptions) -> Manifest:
    return {
        "apiVersion": api,
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": options.namespace,
            "labels": _labels(name),
        },
    }


def _labels(name: str) -> Dict[str, str]:
    return {
        "app.kubernetes.io/managed-by": "hfship",
        "app.kubernetes.io/name": name,
    }


def _selector(name: str) -> Dict[str, str]:
    return {"app.kubernetes.io/name": name}


def namespace(options: ClusterOptions) -> Manifest:
    """The namespace: pods in it get no rights of the node."""
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": options.namespace,
            "labels": {"pod-security.kubernetes.io/enforce": "baseline"},
        },
    }


def storage(options: ClusterOptions) -> List[Manifest]:
    """The folder of models. One volume stands for the same folder of all nodes that have it."""
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": f"{options.namespace}-{CLAIM}",
            "labels": _labels(CLAIM),
        },
        "spec": {
            "capacity": {"storage": STORAGE},
            "accessModes": ["ReadOnlyMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": CLAIM,
            "claimRef": {
                "namespace": options.namespace,
                "name": CLAIM,
            },
            "local": {"path": options.models_dir},
            "nodeAffinity": {"required": _nodes_with_models(options)},
        },
    }
    claim = _head("v1", "PersistentVolumeClaim", CLAIM, options)
    claim["spec"] = {
        "accessModes": ["ReadOnlyMany"],
        "storageClassName": CLAIM,
        "volumeName": f"{options.namespace}-{CLAIM}",
        "resources": {"requests": {"storage": STORAGE}},
    }
    return [volume, claim]


def _nodes_with_models(options: ClusterOptions) -> Manifest:
    if options.nodes:
        rule = _one_of("kubernetes.io/hostname", options.nodes)
    else:
        rule = _one_of(NODE_LABEL, ["true"])
    return {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}


def _one_of(label: str, values: Sequence[str]) -> Manifest:
    return {
        "key": label,
        "operator": "In",
        "values": list(values),
    }


def model_secret(model: ClusterModel, options: ClusterOptions) -> Manifest:
    """The key of a model, and variables that were asked for: they may be secret."""
    values = {KEY_VARIABLE: PLACEHOLDER}
    asked = asked_variables(model.plan.wishes)
    for name in sorted(asked):
        values[name] = TO_FILL_IN
    secret = _head("v1", "Secret", model.name, options)
    secret["type"] = "Opaque"
    secret["stringData"] = values
    return secret


# -- a model


def model_manifests(model: ClusterModel, options: ClusterOptions) -> List[Manifest]:
    """All that runs a model and leads to it."""
    runs = deployment(model, options)
    if model.plan.nodes:
        runs = worker_set(model, options)
    found = [
        runs,
        service(model, options),
        disruption_budget(model, options),
        network_policy(model, options),
    ]
    if options.service_monitor:
        found.append(service_monitor(model, options))
    return found


def deployment(model: ClusterModel, options: ClusterOptions) -> Manifest:
    """A model on one node. Without surge: the GPUs of a new pod are those of the old one."""
    found = _head("apps/v1", "Deployment", model.name, options)
    found["spec"] = {
        "replicas": model.replicas,
        "progressDeadlineSeconds": _patience_s(model.plan) + 600,
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
        },
        "selector": {"matchLabels": _selector(model.name)},
        "template": {
            "metadata": {"labels": _labels(model.name)},
            "spec": pod_spec(model, options, model.plan),
        },
    }
    return found


def worker_set(model: ClusterModel, options: ClusterOptions) -> Manifest:
    """A model over several nodes: each copy is a group, which starts again as one."""
    plan = in_cluster(model.plan)
    worker = replace(plan, node_rank=1)
    found = _head("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", model.name, options)
    leader_labels = {**_labels(model.name), "role": "leader"}
    found["spec"] = {
        "replicas": model.replicas,
        "startupPolicy": "LeaderCreated",
        "rolloutStrategy": {
            "type": "RollingUpdate",
            "rollingUpdateConfiguration": {"maxSurge": 0, "maxUnavailable": 1},
        },
        "leaderWorkerTemplate": {
            "size": len(plan.nodes),
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": {
                "metadata": {"labels": leader_labels},
                "spec": pod_spec(model, options, plan),
            },
            "workerTemplate": {
                "metadata": {"labels": {**_labels(model.name), "role": "worker"}},
                "spec": pod_spec(model, options, worker),
            },
        },
    }
    return found


# Words that stand for what only a pod knows; no shell would quote them.
_LEADER, _OWN = "@LEADER@", "@OWN@"


def in_cluster(plan: Plan) -> Plan:
    """The plan of a group with what its pods know instead of addresses."""
    others = (_OWN,) * (len(plan.nodes) - 1)
    return replace(
        plan,
        nodes=(_LEADER, *others),
        node_rank=0,
        bind="0.0.0.0",
        port=CONTAINER_PORT,
    )


def pod_command(plan: Plan) -> Tuple[List[str], List[str]]:
    """(command, args) of the container. A `$(` of ours would be expanded by Kubernetes."""
    command = list(plan.entrypoint)
    arguments = vllm_arguments(plan)
    if plan.nodes:
        command = ["sh", "-c"]
        arguments = [group_script(plan, arguments)]
    escaped = []
    for word in arguments:
        escaped.append(word.replace("$(", "$$("))
    return command, escaped


def group_script(plan: Plan, arguments: Sequence[str]) -> str:
    """What the shell of a member runs. Workers of any number have the same pod."""
    entrypoint, command = node_command(plan, arguments)
    script = command[-1]
    if entrypoint[:2] != ["sh", "-c"]:
        words = shlex.join([*entrypoint, *command])
        script = f"exec {words}"

    head = "$LWS_LEADER_ADDRESS"
    if plan.node_rank == 0:
        head = "$VLLM_HOST_IP"  # ZeroMQ listens on addresses, not on names
    script = script.replace(_LEADER, head).replace(_OWN, "$VLLM_HOST_IP")
    local = plan.data_parallel_size // len(plan.nodes)
    first = f"$((LWS_WORKER_INDEX * {local}))"
    script = script.replace("--node-rank 1", "--node-rank $LWS_WORKER_INDEX")
    return script.replace(
        f"--data-parallel-start-rank {local}", f"--data-parallel-start-rank {first}"
    )


def pod_spec(model: ClusterModel, options: ClusterOptions, plan: Plan) -> Manifest:
    """What one pod of a model is."""
    command, arguments = pod_command(plan)
    container: Manifest = {
        "name": "vllm",
        "image": image_in(options.registry, plan.image),
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "args": arguments,
        "envFrom": [{"secretRef": {"name": model.name}}],
        "env": environment(plan),
        "resources": resources(plan),
        "securityContext": security(plan),
        "volumeMounts": _mounts(plan, options),
    }
    if not plan.node_rank:
        container["ports"] = [{"name": "http", "containerPort": CONTAINER_PORT}]
        container.update(probes(plan))
    spec: Manifest = {
        "automountServiceAccountToken": False,
        # Those of a service called vllm would be read as settings of vLLM.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": STOP_S,
        "containers": [container],
        "volumes": _volumes(plan, options),
        "topologySpreadConstraints": [_spread_over_nodes(model.name)],
    }
    affinity = node_affinity(model.placing, options)
    if affinity:
        spec["affinity"] = affinity
    return spec


def environment(plan: Plan) -> List[Manifest]:
    """Variables of the container, but for those that may be secret."""
    asked = asked_variables(plan.wishes)
    values = dict(plan.env)
    if plan.nodes:
        values["NCCL_SOCKET_IFNAME"] = f"={POD_INTERFACE}"
        values["GLOO_SOCKET_IFNAME"] = POD_INTERFACE
        values.pop("VLLM_HOST_IP", None)
        values.pop("NCCL_IB_HCA", None)
    found: List[Manifest] = []
    for name in sorted(values):
        if name not in asked:
            variable = {"name": name, "value": values[name]}
            found.append(variable)
    if plan.nodes:
        path = {"fieldPath": "status.podIP"}
        own = {"fieldRef": path}
        found.append({"name": "VLLM_HOST_IP", "valueFrom": own})
    return found


def resources(plan: Plan) -> Manifest:
    """GPUs, or the RAM that a model on the CPU may take."""
    if plan.gpus:
        count = len(plan.gpus)
        return {"limits": {"nvidia.com/gpu": str(count)}}
    if plan.memory_limit:
        return {"limits": {"memory": str(plan.memory_limit)}}
    return {}


def security(plan: Plan) -> Manifest:
    """The rights of the container: none, as in compose."""
    capabilities: Manifest = {"drop": ["ALL"]}
    if plan.cap_add:
        capabilities["add"] = list(plan.cap_add)
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": capabilities,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _patience_s(plan: Plan) -> int:
    return max(LOADING_S, plan.ready_timeout_s)


def probes(plan: Plan) -> Manifest:
    """When a pod is ready, and dead. While it loads nothing else is asked, for an hour."""
    health = {"httpGet": {"path": "/health", "port": "http"}}
    tries = _patience_s(plan) // PROBE_S
    return {
        "startupProbe": {
            **health,
            "periodSeconds": PROBE_S,
            "timeoutSeconds": 8,
            "failureThreshold": tries,
        },
        "readinessProbe": {
            **health,
            "periodSeconds": 5,
            "timeoutSeconds": 4,
            "failureThreshold": 2,
        },
        "livenessProbe": {
            **health,
            "periodSeconds": 15,
            "timeoutSeconds": 8,
            "failureThreshold": 4,
        },
        "lifecycle": {
            "preStop": {"exec": {"command": ["sleep", str(PAUSE_S)]}},
        },
    }


def _mounts(plan: Plan, options: ClusterOptions) -> List[Manifest]:
    model: Manifest = {
        "name": "model",
        "mountPath": f"/models/{plan.name}",
        "readOnly": True,
    }
    if options.model_volume == LOCAL:
        model["subPath"] = _folder_of(plan)
    return [
        model,
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "cache", "mountPath": "/root/.cache"},
    ]


def _volumes(plan: Plan, options: ClusterOptions) -> List[Manifest]:
    model: Manifest = {"name": "model"}
    if options.model_volume == LOCAL:
        model["persistentVolumeClaim"] = {"claimName": CLAIM, "readOnly": True}
    else:
        model["image"] = {
            "reference": model_image(_folder_of(plan), options) + "-image",
            "pullPolicy": "IfNotPresent",
        }
    shared = {"medium": "Memory", "sizeLimit": binary_size(plan.shm_size)}
    return [
        model,
        {"name": "shm", "emptyDir": shared},
        {"name": "cache", "emptyDir": {}},
    ]


def binary_size(text: str) -> str:
    """A size of docker as Kubernetes writes it.

    >>> binary_size("16gb"), binary_size("512m"), binary_size("")
    ('16Gi', '512Mi', '4Gi')
    """
    match = re.match(r"(\d+)\s*([kmgt])b?\Z", text.lower())
    if not match:
        return "4Gi"
    number, unit = match.groups()
    return f"{number}{unit.upper()}i"


def _spread_over_nodes(name: str) -> Manifest:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": _selector(name)},
    }


def node_affinity(placing: Placing, options: ClusterOptions) -> Manifest:
    """The nodes that may run a model: those with its files, its hosts and labels."""
    rules = []
    names = placing.hosts or options.nodes
    if names:
        rules.append(_one_of("kubernetes.io/hostname", names))
    elif options.model_volume == LOCAL:
        rules.append(_one_of(NODE_LABEL, ["true"]))
    labels = sorted(placing.host_labels.items())
    for label, value in labels:
        rules.append(_one_of(label, [value]))
    if not rules:
        return {}
    expressions = {"matchExpressions": rules}
    terms = {"nodeSelectorTerms": [expressions]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    return {"nodeAffinity": required}


def _answering(model: ClusterModel) -> Dict[str, str]:
    """The labels of the pods that answer clients."""
    labels = _selector(model.name)
    if model.plan.nodes:
        labels["role"] = "leader"
    return labels


def service(model: ClusterModel, options: ClusterOptions) -> Manifest:
    """The address of a model, in the cluster."""
    found = _head("v1", "Service", model.name, options)
    port = {
        "name": "http",
        "port": CONTAINER_PORT,
        "targetPort": "http",
    }
    found["spec"] = {
        "selector": _answering(model),
        "ports": [port],
    }
    return found


def disruption_budget(model: ClusterModel, options: ClusterOptions) -> Manifest:
    """Nodes are drained one copy at a time."""
    found = _head("policy/v1", "PodDisruptionBudget", model.name, options)
    found["spec"] = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": _answering(model)},
    }
    return found


def network_policy(model: ClusterModel, options: ClusterOptions) -> Manifest:
    """Who reaches a model: pods of its namespace, and monitoring; it reaches nobody, but the
    members of its group, whose traffic is not encrypted."""
    own_namespace: List[Manifest] = [{"podSelector": {}}]
    if options.service_monitor:
        own_namespace.append({"namespaceSelector": {"matchLabels": {"hfship/monitoring": "true"}}})
    clients = {
        "from": own_namespace,
        "ports": [{"protocol": "TCP", "port": CONTAINER_PORT}],
    }
    ingress: List[Manifest] = [clients]
    egress: List[Manifest] = []
    if model.plan.nodes:
        members = [{"podSelector": {"matchLabels": _selector(model.name)}}]
        ingress.append({"from": members})
        egress = [{"to": members}, {"ports": _dns_ports()}]
    found = _head("networking.k8s.io/v1", "NetworkPolicy", model.name, options)
    found["spec"] = {
        "podSelector": {"matchLabels": _selector(model.name)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return found


def _dns_ports() -> List[Manifest]:
    return [
        {"protocol": "UDP", "port": 53},
        {"protocol": "TCP", "port": 53},
    ]


def service_monitor(model: ClusterModel, options: ClusterOptions) -> Manifest:
    """For Prometheus' operator: vLLM's own figures."""
    found = _head("monitoring.coreos.com/v1", "ServiceMonitor", model.name, options)
    found["spec"] = {
        "selector": {"matchLabels": _selector(model.name)},
        "endpoints": [{"port": "http", "path": "/metrics", "interval": "15s"}],
    }
    return found


# -- the gateway


def gateway_secret(gateway: ClusterGateway, options: ClusterOptions) -> Manifest:
    """What HAProxy reads and nobody else may: keys by their SHA-256, and the models' own keys."""
    found = _head("v1", "Secret", GATEWAY, options)
    found["type"] = "Opaque"
    found["stringData"] = {_data_key(path): text for path, text in gateway.files.secret.items()}
    return found


def _data_key(path: str) -> str:
    """A path as a key of a ConfigMap or Secret."""
    return path.replace("/", "__")


def _items(paths: Sequence[str]) -> List[Manifest]:
    return [{"key": _data_key(path), "path": path} for path in paths]


def gateway_manifests(gateway: ClusterGateway, options: ClusterOptions) -> List[Manifest]:
    """HAProxy with our configuration: two of it, before all models."""
    config = _head("v1", "ConfigMap", GATEWAY, options)
    config["data"] = {CONFIG_FILE: gateway.files.plain[CONFIG_FILE]}
    sources = [
        {"configMap": {"name": GATEWAY, "items": _items([CONFIG_FILE])}},
        {"secret": {"name": GATEWAY, "items": _items(list(gateway.files.secret))}},
    ]
    pods = _head("apps/v1", "Deployment", GATEWAY, options)
    pods["spec"] = {
        "replicas": 2,
        "selector": {"matchLabels": _selector(GATEWAY)},
        "template": {
            "metadata": {
                "labels": _labels(GATEWAY),
                # Another configuration makes other pods.
                "annotations": {"hfship/generation": gateway.files.generation},
            },
            "spec": _gateway_pod(gateway, options, sources),
        },
    }
    address = _head("v1", "Service", GATEWAY, options)
    address["spec"] = {
        "selector": _selector(GATEWAY),
        "ports": [{"name": "api", "port": gateway.port, "targetPort": "api"}],
    }
    budget = _head("policy/v1", "PodDisruptionBudget", GATEWAY, options)
    budget["spec"] = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": _selector(GATEWAY)},
    }
    return [config, pods, address, budget]


def _gateway_pod(
    gateway: ClusterGateway, options: ClusterOptions, sources: Sequence[Manifest]
) -> Manifest:
    ready = {"tcpSocket": {"port": "api"}, "periodSeconds": 5}
    container = {
        "name": "haproxy",
        "image": image_in(options.registry, gateway.image),
        "imagePullPolicy": "IfNotPresent",
        "command": ["haproxy"],
        "args": ["-W", "-db", "-f", f"{INSIDE}/{CONFIG_FILE}"],
        "ports": [
            {"name": "api", "containerPort": PLAIN_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "readinessProbe": ready,
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", GATEWAY_STOP]}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 99,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": INSIDE, "readOnly": True},
            {"name": "run", "mountPath": GATEWAY_RUN},
        ],
    }
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 3600,  # it ends when the last answer is out
        "securityContext": {"fsGroup": 99},
        "containers": [container],
        "volumes": [
            {"name": "config", "projected": {"sources": list(sources)}},
            {"name": "run", "emptyDir": {}},
        ],
        "topologySpreadConstraints": [_spread_over_nodes(GATEWAY)],
    }
