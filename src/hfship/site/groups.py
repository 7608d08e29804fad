# SPDX-License-Identifier: Apache-2.0
"""A model larger than a host: how a copy is divided over hosts, and how the group starts and ends.

Tensor parallelism stays within a host, whose links are fast; a pipeline goes over hosts, or, where
data parallelism is asked for, each host has whole copies. All members have one plan but for GPUs,
address and rank. None restarts alone: what is left of a group hangs in a collective, so that all
stop before one starts again. Pure.
"""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    Callable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from hfship.base.errors import HfshipError, HostError, IntegrityError
from hfship.base.text import counted
from hfship.base.values import replace
from hfship.serve.nodes import DATA_PARALLEL, node_environment, open_ports, way_of
from hfship.serve.vllm import knows_flag
from hfship.serve.vllm_table import version_text

if TYPE_CHECKING:
    from hfship.serve.survey import Request
    from hfship.serve.terms import Gpu, Host, Plan, ServeOptions


class Member(NamedTuple):
    """One host of a group."""

    gpus: Tuple[Gpu, ...]
    address: str
    interface: str = ""  # that has the address; "": not known
    infiniband: Tuple[str, ...] = ()


Decide = Callable[["Request", "Host", Optional["Plan"]], "Plan"]


def node_plans(
    request: Request,
    whole: Host,
    members: Sequence[Member],
    previous: Optional[Plan],
    decide: Decide,
) -> Tuple[Plan, ...]:
    """The plan of each member, the one that answers first. `whole` is the first host with the GPUs
    of all. Raises HfshipError where they hold the model not even together."""
    _require_alike_gpus(request, members)
    each = len(members[0].gpus)
    together = replace(whole, gpus=tuple(_numbered(members)))
    errors: List[HfshipError] = []
    for options in divisions(request.options, len(members), each):
        # Docker's networks end at the host: the group talks through the host's own.
        asked = replace(request, options=options, network="")
        try:
            plan = decide(asked, together, previous)
            require_way(plan, each)
        except HfshipError as exc:
            errors.append(exc)
            continue
        behind_gateway = bool(request.network or (previous and previous.network))
        return tuple(_plan_of(plan, members, rank, behind_gateway) for rank in range(len(members)))
    raise errors[0]


def _require_alike_gpus(request: Request, members: Sequence[Member]) -> None:
    if request.options.gpus:
        what = f"{request.name} cannot span hosts with GPUs that are named"
        raise HostError(what, "it takes all GPUs of each", "leave gpus out, or set nodes = 1")
    kinds = {tuple((gpu.name, gpu.total) for gpu in member.gpus) for member in members}
    if len(kinds) > 1:
        told = "; ".join(f"{member.address}: {_told(member.gpus)}" for member in members)
        raise HostError(f"{request.name} cannot span hosts whose GPUs differ", told)


def _told(gpus: Sequence[Gpu]) -> str:
    return ", ".join(gpu.label for gpu in gpus) or "none"


def _numbered(members: Sequence[Member]) -> Iterator[Gpu]:
    """The GPUs of all members, each with a number and name of its own."""
    for rank, member in enumerate(members):
        for gpu in member.gpus:
            index = rank * len(member.gpus) + gpu.index
            yield replace(gpu, index=index, uuid=f"{gpu.uuid}@{rank}")


def divisions(options: ServeOptions, nodes: int, each: int) -> Iterator[ServeOptions]:
    """The ways to divide a model over `nodes` hosts with `each` GPUs, the best first: as asked for,
    else the widest tensor parallelism within a host, and a pipeline over all that is left.

    >>> from hfship.serve.terms import ServeOptions
    >>> found = divisions(ServeOptions(), 2, 4)
    >>> [(one.tensor_parallel_size, one.pipeline_parallel_size) for one in found]
    [(4, 2), (2, 4), (1, 8)]
    >>> [wide] = divisions(ServeOptions(data_parallel_size=4), 2, 8)
    >>> wide.tensor_parallel_size, wide.pipeline_parallel_size, wide.data_parallel_size
    (4, 1, 4)
    """
    gpus = nodes * each
    copies = max(1, options.data_parallel_size)
    stages = options.pipeline_parallel_size
    widths: Sequence[int] = [width for width in range(each, 0, -1) if each % width == 0]
    if options.tensor_parallel_size:
        widths = [options.tensor_parallel_size]
    elif copies > 1:
        widths = [max(1, gpus // (copies * max(1, stages)))]
    for width in widths:
        left = max(1, gpus // (width * copies))
        yield replace(
            options,
            tensor_parallel_size=width,
            pipeline_parallel_size=stages or left,
            data_parallel_size=copies,
        )


def require_way(plan: Plan, each: int) -> None:
    """Refuse a division that vLLM does not know. `each`: GPUs of a host. Raises HostError."""
    way = way_of(plan)
    width = plan.tensor_parallel_size
    stages = plan.pipeline_parallel_size
    copy = width * stages
    sizes = f"TP={width} PP={stages}"
    if way != DATA_PARALLEL:
        if width > each:
            gpus = counted(each, "GPU")
            what = f"{sizes} cannot be spread over hosts of {gpus}"
            why = "tensor parallelism stays within a host"
            step = f"tensor_parallel_size = {each}, and nodes for more"
            raise HostError(what, why, f"{step}; or leave both sizes out")
        return
    if not knows_flag(plan.version, "--data-parallel-address"):
        version = version_text(plan.version)
        what = "data parallelism over hosts cannot be used"
        why = f"vLLM {version} does not know it: it is there from 0.9.0 on"
        raise HostError(what, why, "choose another --image")
    if each % copy:  # also where a copy takes more than a host has
        what = "data parallelism cannot be spread over these hosts"
        why = f"each of its copies takes {copy} GPUs ({sizes}), a host has {each}"
        step = "fewer GPUs for a copy, or none of data_parallel_size"
        raise HostError(what, why, step)


def _plan_of(plan: Plan, members: Sequence[Member], rank: int, behind_gateway: bool) -> Plan:
    """The plan of one member."""
    member = members[rank]
    nodes = tuple(one.address for one in members)
    bind = plan.bind
    if behind_gateway:  # which is on another host, or in a network of docker
        bind = nodes[0]
    warnings = [*plan.warnings, _closed_ports(plan, nodes)]
    if not member.interface:
        what = f"the interface with {member.address} is not known"
        warnings.append(f"{what}: NCCL and Gloo may take another; set interface in [[host]]")
    own = node_environment(member.address, member.interface, member.infiniband)
    return replace(
        plan,
        gpus=tuple(gpu.uuid for gpu in member.gpus),
        gpu_names=tuple(gpu.label for gpu in member.gpus),
        nodes=nodes,
        node_rank=rank,
        interface=member.interface,
        infiniband=member.infiniband,
        bind=bind,
        network="",
        idle="",
        env={**own, **plan.env},
        warnings=tuple(warnings),
    )


def _closed_ports(plan: Plan, nodes: Sequence[str]) -> str:
    ports = ", ".join(open_ports(plan))
    hosts = ", ".join(nodes)
    return (
        f"close ports {ports} of {hosts} to all but these hosts: what goes there is not encrypted"
    )


# -- a group starts, and ends, as one

UP, DOWN, UNKNOWN = "up", "down", "unknown"  # of a member; unknown: its host does not answer
START, STOP = "start", "stop"


_OF_STATUS = {"down": DOWN, "stopped": DOWN, "unknown": UNKNOWN}


def member_state(status: str) -> str:
    """Whether a member is up, by the state that `status` on its host tells.

    >>> member_state("hung"), member_state("down"), member_state("unknown")
    ('up', 'down', 'unknown')
    """
    return _OF_STATUS.get(status, UP)


class Step(NamedTuple):
    """What is to be done with a member; `rank` is its place in the group."""

    verb: str
    rank: int


def group_steps(states: Sequence[str], hung: bool = False) -> List[Step]:
    """What brings a group back, in order: nothing where all are up. `hung`: it no longer answers.

    All that is up stops first, the head before the others, so that it can end its answers; then all
    start, the head first. Where a member's host does not answer nothing starts: the rest stops, so
    that its GPUs are free for another place.

    >>> group_steps([UP, DOWN])
    [Step(verb='stop', rank=0), Step(verb='start', rank=0), Step(verb='start', rank=1)]
    >>> group_steps([UP, UP]), group_steps([DOWN, UNKNOWN])
    ([], [])
    """
    all_up = all(state == UP for state in states)
    if all_up and not hung:
        return []
    steps = []
    for rank, state in enumerate(states):
        if state == UP:
            steps.append(Step(STOP, rank))
    if UNKNOWN not in states:
        for rank in range(len(states)):
            steps.append(Step(START, rank))
    return steps


def require_same(name: str, what: str, found: Mapping[str, str]) -> None:
    """Refuse a group whose members do not have the same image, or model, which is called `name`.
    `found` has its digest by host, "" where it is not there. Raises HostError, IntegrityError."""
    missing = []
    for host, digest in found.items():
        if not digest:
            missing.append(host)
    if missing:
        hosts = ", ".join(missing)
        there = f"the {what} {name} is not on {hosts}"
        why = "all hosts of a group need it"
        raise HostError(there, why, f"hfship push {name} --hosts")
    if len(set(found.values())) < 2:
        return
    told = []
    for host, digest in found.items():
        told.append(f"{host}: {digest[:19]}")
    raise IntegrityError(
        f"the hosts of a group do not have the same {what} {name}",
        "\n".join(told),
        "bring it again to those that differ",
    )
