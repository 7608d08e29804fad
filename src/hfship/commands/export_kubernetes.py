# SPDX-License-Identifier: Apache-2.0
"""`hfship export kubernetes`: the models of a models file, planned as `serve` plans them, as
manifests. Nothing is applied, no cluster is asked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, List, Optional, Tuple

from hfship.base.errors import Exit, HostError, UsageError
from hfship.base.files import atomic_write, make_dir
from hfship.base.report import Reporter
from hfship.base.text import counted
from hfship.base.values import replace
from hfship.serve.cards import assumed_gpus
from hfship.serve.survey import Purpose, decide, read_machine
from hfship.serve.terms import Host
from hfship.site.gateway_files import gateway_files, gateway_of
from hfship.site.hosts import MODELS_ROLE, HostFacts, SiteHost, placing_of, site_hosts
from hfship.site.keys import with_rights
from hfship.site.kubernetes import (
    GATEWAY_RUN,
    PLACEHOLDER,
    ClusterGateway,
    ClusterModel,
    ClusterOptions,
    cluster_texts,
)
from hfship.site.maps import key_maps, model_maps
from hfship.site.settings import copies_of, gateway_settings, key_rights
from hfship.site.spread import MOST_SPANNED, Wish, place
from hfship.site.store import gateway_folder, read_keys
from hfship.site.terms import IMAGE, ON_DEMAND, PLAIN_PORT, GatewayModel, Replica

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.base.settings import ListedModel, ModelsFile
    from hfship.commands.context import Context
    from hfship.serve.survey import Request
    from hfship.serve.terms import Plan

HAPROXY_IMAGE = "haproxy:3.2"  # where [gateway] names none
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_REGISTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d{1,5})?(/[a-z0-9._/-]*[a-z0-9])?\Z")


def export_kubernetes(context: Context, folder: Path) -> Exit:
    """Plan all models, and write the manifests."""
    file = context.file
    if file is None or not file.models:
        step = "hfship export kubernetes DIR --models FILE"
        raise UsageError("the models are those of a models file, and none is given", "", step)

    options = cluster_options(context, file)
    models = cluster_models(context, file)
    gateway = cluster_gateway(context, file, models, options)
    texts = cluster_texts(models, options, gateway)
    make_dir(folder)
    for name, text in texts.items():
        secret = name == "secrets.yaml"
        atomic_write(folder / name, text, mode=0o600 if secret else 0o644)

    count = counted(len(texts), "file")
    readme = folder / "README.txt"
    text = f"wrote {count} to {folder}\n  then   cat {readme}"
    context.reporter.result_of(text, {"folder": str(folder), "files": sorted(texts)})
    return Exit.OK


def cluster_options(context: Context, file: ModelsFile) -> ClusterOptions:
    """What the cluster is like. Raises UsageError."""
    args = context.args
    if not _NAMESPACE.match(args.namespace):
        why = "it has lower case letters, digits and -"
        raise UsageError(f"--namespace {args.namespace} is no name of Kubernetes", why, "")
    if args.registry and not _REGISTRY.match(args.registry):
        why = "it is written like registry.site:5000"
        raise UsageError(f"--registry {args.registry} is not a registry", why, "")
    if args.model_volume == IMAGE and not args.registry:
        what = "--model-volume image needs a registry"
        raise UsageError(what, "the nodes pull the models from it", "add --registry HOST:PORT")
    hosts = [host.name for host in site_hosts(file) if MODELS_ROLE in host.roles]
    return ClusterOptions(
        namespace=args.namespace,
        registry=args.registry,
        model_volume=args.model_volume,
        models_dir=str(context.settings.site_models_dir),
        nodes=tuple(hosts),
        service_monitor=args.service_monitor,
    )


def cluster_models(context: Context, file: ModelsFile) -> List[ClusterModel]:
    """The models of the file, each planned for nodes like those that are assumed."""
    if context.args.assume_gpus:
        here = Host(assumed_gpus(context.args.assume_gpus))
    else:
        here = read_machine("", Purpose.SHOW, context.reporter).host
    found = []
    for listed, request in requests_of(context, file):
        copies = copies_of(listed)
        replicas = copies.replicas + copies.standby
        if copies.mode == ON_DEMAND:
            replicas = 0  # kubectl scale starts it: the README says how
        plan = plan_for(request, here, listed)
        placing = placing_of(listed)
        found.append(ClusterModel(plan, replicas, placing))
    return found


def requests_of(context: Context, file: ModelsFile) -> List[Tuple[ListedModel, Request]]:
    """What `serve` would be asked for each model."""
    from hfship.commands.parser import parse_words
    from hfship.commands.runs import runs_of
    from hfship.commands.serve_model import read_request
    from hfship.commands.table import COMMANDS

    names = [model.name for model in file.models]
    words = ["serve", "--plan", "--reset", "--models", str(file.path), *names]
    args, asked = parse_words(words)
    serving = replace(context, args=args, asked=asked)
    (command,) = [row for row in COMMANDS if row.name == "serve"]
    runs = runs_of(command, serving, file)
    found = []
    for model in file.models:
        run = runs[model.deployment]
        found.append((model, read_request(run, run.args.names[0])))
    return found


def plan_for(request: Request, here: Host, listed: ListedModel) -> Plan:
    """The plan for one node, or over as few as hold the model. Raises HostError."""
    quiet = Reporter("none", -1)

    def plan_of(asked: Request, left: Host, previous: Optional[Plan]) -> Plan:
        return decide(asked, left, previous, quiet)

    nodes = [SiteHost(f"node{number}") for number in range(1, MOST_SPANNED + 1)]
    facts = {node.name: HostFacts(node.name, offer=here) for node in nodes}
    alone = replace(request, network="")
    wish = Wish(alone, placing=replace(placing_of(listed), hosts=(), host_labels={}))
    placement = place([wish], nodes, facts, plan_of)
    if request.name in placement.refused:
        error = placement.refused[request.name]
        if not here.gpus:
            step = "hfship export kubernetes DIR --assume-gpus 8xH100"
            raise HostError(error.what, error.why, step)
        raise error
    plan = placement.plans[request.name]
    if ":" not in plan.image.rpartition("/")[2]:
        what = f"{request.name} has no image with a tag"
        step = 'image = "vllm/vllm-openai:v0.32.0" in [defaults]'
        raise UsageError(what, "a cluster must run the version that was planned for", step)
    return plan


def cluster_gateway(
    context: Context,
    file: ModelsFile,
    models: List[ClusterModel],
    options: ClusterOptions,
) -> Optional[ClusterGateway]:
    """The gateway before these models; None where the file has none. TLS ends at the cluster's own
    ingress."""
    settings = gateway_settings(file)
    if settings is None:
        return None
    settings = replace(settings, tls_cert="", tls_key="", http_port=0)
    image = settings.image or HAPROXY_IMAGE
    before = tuple(
        gateway_model(model, listed, options) for model, listed in zip(models, file.models)
    )
    gateway = gateway_of(settings, before, version_in(image))
    gateway = replace(gateway, resolver="", admin_socket=f"{GATEWAY_RUN}/admin.sock")
    stored = read_keys(gateway_folder(context.settings.deploy_dir))
    keys = with_rights(stored, key_rights(file, 0))
    upstream = {model.name: PLACEHOLDER for model in before}
    files = gateway_files(
        gateway, settings, image, "99:99", "", model_maps(before, upstream), key_maps(before, keys)
    )
    return ClusterGateway(files, image, PLAIN_PORT)


def gateway_model(
    model: ClusterModel, listed: ListedModel, options: ClusterOptions
) -> GatewayModel:
    """A model as the gateway sees it: one address, behind which the cluster has its copies."""
    address = f"{model.name}.{options.namespace}.svc:8000"
    replica = Replica(model.name, address)
    copies = copies_of(listed)
    return GatewayModel(
        listed.deployment,
        model.plan.served_names,
        (replica,),
        copies.affinity,
        copies.mode,
    )


def version_in(image: str) -> Tuple[int, int]:
    """The version of HAProxy that a tag tells; the oldest that it may be, where it tells none.

    >>> version_in("haproxy:3.4.1-alpine"), version_in("registry/haproxy:site")
    ((3, 4), (2, 6))
    """
    match = re.search(r":v?(\d+)\.(\d+)[^/]*\Z", image)
    if not match:
        return (2, 6)
    return int(match[1]), int(match[2])
