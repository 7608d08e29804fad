# SPDX-License-Identifier: Apache-2.0
"""The machine that a deployment is planned for: what it has, less what other deployments hold.

Reading (docker, nvidia-smi, ports) is apart from deciding, which is pure.
"""

from __future__ import annotations

from enum import Enum
from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Callable,
    FrozenSet,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from hfship.base.errors import HostError
from hfship.base.network import port_is_free
from hfship.base.values import dataclass, replace
from hfship.serve.docker import (
    inspect_container,
    read_host,
    read_host_and_containers,
    read_image,
)
from hfship.serve.files import CDI_KIND, container_name
from hfship.serve.fit import memory_on_cpu
from hfship.serve.gpus import with_claims
from hfship.serve.images import choose_device, choose_image
from hfship.serve.mounts import Adapter, mounts_of, rank_limit, rights_to_read
from hfship.serve.plan import PORTS, make_plan
from hfship.serve.terms import Host, Image, Plan
from hfship.serve.vllm_table import parse_version

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.serve.deployments import Deployment
    from hfship.serve.facts import ModelFacts
    from hfship.serve.proof import TrustedFolder
    from hfship.serve.terms import ServeOptions


class Purpose(Enum):
    """What a plan is made for. Only a start needs docker and an image that is there."""

    START = "start"
    WRITE = "write"  # the files alone
    SHOW = "show"  # the plan alone


@dataclass(frozen=True)
class Request:
    """One model that is to be served as `options` say."""

    name: str
    model: TrustedFolder
    facts: ModelFacts
    options: ServeOptions
    purpose: Purpose
    adapters: Tuple[Adapter, ...] = ()
    network: Optional[str] = None  # behind a gateway, docker's; None: as it was served before


@dataclass(frozen=True)
class Machine:
    """This machine as it is, before anything is known of deployments."""

    host: Host
    docker_answers: bool
    containers: FrozenSet[str] = frozenset()  # names of those that run


@dataclass(frozen=True)
class Claims:
    """What deployments hold of a machine, seen from the one that is planned.

    `own` is its plan so far, with GPUs only while it runs. `own_port` is where it may be listening
    itself, None where it is not. `running` and `stopped` are the plans of the others.
    """

    own: Optional[Plan] = None
    own_port: Optional[int] = None
    running: Tuple[Plan, ...] = ()
    stopped: Tuple[Plan, ...] = ()


def read_machine(wanted_image: str, purpose: Purpose, reporter: Reporter) -> Machine:
    """Docker's images and the GPUs. Raises HostError where docker is needed and does not answer."""
    try:
        host, containers = read_host_and_containers(wanted_image)
    except HostError as exc:
        if purpose is Purpose.START:
            raise
        reporter.warn(f"{exc.what} ({exc.why})")
        return Machine(read_host(()), docker_answers=False)

    return Machine(host, docker_answers=True, containers=containers)


def survey(
    machine: Machine,
    deployments: Sequence[Deployment],
    name: str,
    options: ServeOptions,
    beside: Sequence[Plan] = (),
) -> Tuple[Host, Optional[Plan]]:
    """(what the machine has left for the deployment `name`, the plan of `name` so far).

    `beside` are plans that will run, too.
    """
    plans = {}
    for deployment in deployments:
        plans[deployment.plan.name] = deployment.plan

    host = machine.host
    running = None
    if machine.docker_answers:
        names = [name for name in plans if container_name(name) in machine.containers]
        running = frozenset(names)
        host = replace(host, running=running)
    claims = claims_of(plans, name, running)
    claims = with_plans(claims, beside)
    in_use = ports_in_use(options, claims.own_port)
    left = free_host(host, claims, in_use)
    return left, claims.own


def is_running(name: str) -> bool:
    """Whether the container of a deployment runs. Raises HostError."""
    container = inspect_container(name)
    return container is not None and container.status == "running"


def claims_of(plans: Mapping[str, Plan], name: str, running: Optional[AbstractSet[str]]) -> Claims:
    """What the deployments with these plans hold, seen from `name`. `running`: None if not known.

    >>> plans = {name: Plan(name=name, port=8000, gpus=("GPU-1",)) for name in ("a", "b")}
    >>> claims = claims_of(plans, "a", running={"b"})
    >>> claims.own.gpus, claims.own_port, [plan.name for plan in claims.running], claims.stopped
    ((), None, ['b'], ())
    """
    up = running or frozenset()
    own = plans.get(name)
    own_port = None
    if own and (running is None or name in up):
        own_port = own.port
    if own and name not in up:
        own = replace(own, gpus=())
    others_up: List[Plan] = []
    stopped: List[Plan] = []
    for other, plan in plans.items():
        if other == name:
            continue
        if other in up:
            others_up.append(plan)
        else:
            stopped.append(plan)

    return Claims(own, own_port, tuple(others_up), tuple(stopped))


def with_plans(claims: Claims, beside: Sequence[Plan]) -> Claims:
    """The claims with those of plans that will run: they replace what their deployments claim."""
    coming = {plan.name for plan in beside}
    running = [plan for plan in claims.running if plan.name not in coming]
    stopped = [plan for plan in claims.stopped if plan.name not in coming]
    return replace(claims, running=(*running, *beside), stopped=tuple(stopped))


def ports_in_use(options: ServeOptions, own_port: Optional[int]) -> FrozenSet[int]:
    """The ports on which something else listens, of those that the plan may choose."""
    candidates = [options.port] if options.port else PORTS
    taken = set()
    for port in candidates:
        if port == own_port:
            continue
        if not port_is_free(options.bind, port):
            taken.add(port)
    return frozenset(taken)


def free_host(host: Host, claims: Claims, in_use: AbstractSet[int]) -> Host:
    """What the host has left: without ports that are in use, GPUs with what is claimed of them, and
    RAM with what models on the CPU hold.

    A deployment that is stopped keeps its port; its GPUs are taken last.
    """
    ports = set(in_use)
    spoken_for: Set[str] = set()
    for plan in claims.running:
        ports.add(plan.port)

    for plan in claims.stopped:
        ports.add(plan.port)
        spoken_for.update(plan.gpus)

    gpus = []
    for gpu in with_claims(host.gpus, claims.running):
        last = gpu.uuid in spoken_for
        gpus.append(replace(gpu, spoken_for=last))

    held = sum(
        memory_on_cpu(plan.weight_bytes, plan.kv_bytes)
        for plan in claims.running
        if plan.device == "cpu"
    )
    return replace(host, gpus=tuple(gpus), taken_ports=frozenset(ports), held=held)


def decide(
    request: Request,
    host: Host,
    previous: Optional[Plan],
    reporter: Reporter,
    look_at: Callable[[Image], Image] = read_image,
) -> Plan:
    """The plan for a host, once device and image are chosen. `look_at` gives the image with what is
    known of it. Raises HostError."""
    options = request.options
    device = choose_device(options, host)
    options = replace(options, device=device)
    if device == "cpu" and request.options.device == "auto":
        reporter.info("no GPU is used: the image is built for CPUs; serving on the CPU")
    try:
        model = request.facts.architecture
        chosen = choose_image(host.images, options.image, device, model)
        image = look_at(chosen)
    except HostError as exc:
        image = image_to_come(request, device, exc)
        if host.images:
            reporter.warn(f"{exc.what} ({exc.why})")

    plan = make_plan(
        request.name,
        str(request.model.folder.resolve()),
        request.facts,
        host,
        image,
        options,
        previous,
    )
    names = {f"{CDI_KIND}={uuid}" for uuid in plan.gpus}
    plan = replace(
        plan,
        signed_by=request.model.signed_by,
        model_version=request.model.version,
        max_lora_rank=rank_limit(request.adapters),
        memory_limit=host.memory,
        cap_add=rights_to_read([plan.model_dir, *(mount.host for mount in mounts_of(plan))]),
        cdi=bool(names) and names <= host.cdi,
    )
    network = request.network
    if network is None and previous:
        network = previous.network
    if network:
        return replace(plan, network=network, port=0)
    return plan


def image_to_come(request: Request, device: str, missing: HostError) -> Image:
    """The image that a plan stands on when docker has none: as it is named, or vLLM's own.

    Raises HostError where the image must be there, and for files that would name none.
    """
    wanted = request.options.image
    if request.purpose is Purpose.START:
        raise missing
    if request.purpose is Purpose.WRITE and not wanted:
        step = f"{missing.next_step}\nor name one with --image"
        raise HostError(missing.what, missing.why, step) from missing

    return Image(
        wanted or "vllm/vllm-openai",
        version=parse_version(wanted),
        cpu=device == "cpu",
    )
