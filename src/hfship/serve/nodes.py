# SPDX-License-Identifier: Apache-2.0
"""A copy of a model over several hosts: what vLLM and docker are told on each of them.

Its plan has `nodes`, the addresses of all, and `node_rank`, its own place among them. Three ways:
  mp   vLLM's own processes: --nnodes, --node-rank, --master-addr, from 0.11.1 on
  ray  in older versions, whose images have it: a head, and workers that join it
  dp   data parallelism, where it is asked for: whole copies on each host, which share the experts

Pure. (vllm/engine/arg_utils.py, docs/serving/parallelism_scaling.md, docs/usage/security.md. Of
NCCL's and Gloo's variables both are set: Gloo takes 127.0.0.1 where it is told none, vllm#7074.)
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Dict, List, Sequence, Tuple

from hfship.serve.vllm import knows_flag

if TYPE_CHECKING:
    from hfship.serve.terms import Plan

MASTER_PORT = 29501  # vLLM's own default
DATA_PARALLEL_PORT = 13345
RAY_PORTS = (6379, 6380, 6381)  # of its store, node and object managers
RAY_WORKER_PORTS = (10002, 10999)
EPHEMERAL_PORTS = "32768-60999"  # Linux' own range, from which NCCL, Gloo and ZeroMQ take theirs
MEET_TRIES, MEET_PAUSE_S = 720, 5  # for a worker to meet Ray's head, which may still be loading
STACK_BYTES = 67108864  # of threads, as NCCL's documents have it

MP, RAY, DATA_PARALLEL = "mp", "ray", "dp"


def way_of(plan: Plan) -> str:
    """How the members of a group work together."""
    if plan.data_parallel_size > 1:
        return DATA_PARALLEL
    if knows_flag(plan.version, "--nnodes"):
        return MP
    return RAY


def node_environment(address: str, interface: str, infiniband: Sequence[str]) -> Dict[str, str]:
    """Variables of a member: by which network it finds the others.

    >>> from pprint import pprint
    >>> pprint(node_environment("10.0.0.1", "eth1", ()))
    {'GLOO_SOCKET_IFNAME': 'eth1',
     'NCCL_DEBUG': 'WARN',
     'NCCL_IB_DISABLE': '1',
     'NCCL_SOCKET_IFNAME': '=eth1',
     'VLLM_HOST_IP': '10.0.0.1'}
    """
    values = {"VLLM_HOST_IP": address, "NCCL_DEBUG": "WARN"}
    if interface:
        # Without "=" NCCL takes all that begin so: eth1 would be eth10, too.
        values["NCCL_SOCKET_IFNAME"] = f"={interface}"
        values["GLOO_SOCKET_IFNAME"] = interface
    if infiniband:
        values["NCCL_IB_HCA"] = "=" + ",".join(infiniband)
    else:
        values["NCCL_IB_DISABLE"] = "1"
    return values


def open_ports(plan: Plan) -> List[str]:
    """Ports of the members that the others must reach, and nobody else may: what goes there is
    neither encrypted nor asked for a key. (vLLM's docs/usage/security.md.)"""
    way = way_of(plan)
    if way == RAY:
        first, last = RAY_WORKER_PORTS
        return [
            *map(str, RAY_PORTS),
            f"{first}-{last}",
            EPHEMERAL_PORTS,
        ]
    if way == DATA_PARALLEL:
        return [str(DATA_PARALLEL_PORT), EPHEMERAL_PORTS]
    return [str(MASTER_PORT), EPHEMERAL_PORTS]


def node_settings(plan: Plan) -> Dict[str, str]:
    """Flags of `vllm serve` of a member, beside those of any plan."""
    way = way_of(plan)
    settings: Dict[str, str] = {}
    if way == RAY:
        settings["--distributed-executor-backend"] = RAY
        return settings
    if way == MP:
        settings["--nnodes"] = str(len(plan.nodes))
        settings["--node-rank"] = str(plan.node_rank)
        settings["--master-addr"] = plan.nodes[0]
        settings["--master-port"] = str(MASTER_PORT)
        # The slowest disk decides when all have loaded; torch gives up after 10 minutes.
        settings["--distributed-timeout-seconds"] = "3600"
    else:
        local = plan.data_parallel_size // len(plan.nodes)
        settings["--data-parallel-size-local"] = str(local)
        settings["--data-parallel-address"] = plan.nodes[0]
        settings["--data-parallel-rpc-port"] = str(DATA_PARALLEL_PORT)
        if plan.node_rank:
            settings["--data-parallel-start-rank"] = str(local * plan.node_rank)
    if plan.node_rank:
        settings["--headless"] = ""
    return settings


def node_command(plan: Plan, arguments: Sequence[str]) -> Tuple[List[str], List[str]]:
    """(entrypoint, command) of a member's container."""
    if not plan.nodes or way_of(plan) != RAY:
        return list(plan.entrypoint), list(arguments)
    own, head = plan.nodes[plan.node_rank], plan.nodes[0]
    store, node, objects = RAY_PORTS
    first, last = RAY_WORKER_PORTS
    ports = f"--node-manager-port={node} --object-manager-port={objects}"
    ports += f" --min-worker-port={first} --max-worker-port={last}"
    own_address = f"--node-ip-address={own} {ports} --disable-usage-stats"
    if plan.node_rank == 0:
        start = f"ray start --head --port={store} --include-dashboard=false {own_address}"
        serve = shlex.join([*plan.entrypoint, *arguments])
        return ["sh", "-c"], [f"{start} && export RAY_ADDRESS={head}:{store} && exec {serve}"]

    meet = f"import socket; socket.create_connection(('{head}', {store}), 5)"
    wait = (
        f'n=0; until python3 -c "{meet}" 2>/dev/null; do n=$((n+1));'
        f" [ $n -lt {MEET_TRIES} ] || exit 1; sleep {MEET_PAUSE_S}; done"
    )
    return ["sh", "-c"], [f"{wait}; exec ray start --address={head}:{store} --block {own_address}"]


def node_service(plan: Plan) -> Dict[str, object]:
    """What the service of a member has in docker-compose.yml, beside that of any plan."""
    service: Dict[str, object] = {
        "network_mode": "host",
        "restart": "no",  # alone it would wait for members that wait for those before it
        "ulimits": {"stack": STACK_BYTES},
    }
    if plan.infiniband:
        # RDMA pins what it sends. Elsewhere nothing needs it, and an engine that may not raise
        # limits, as a rootless one, starts no container with it.
        service["ulimits"] = {"memlock": -1, "stack": STACK_BYTES}
        service["devices"] = ["/dev/infiniband:/dev/infiniband"]
        service["cap_add"] = [*plan.cap_add, "IPC_LOCK"]
    if plan.node_rank:
        service["healthcheck"] = {"disable": True}  # it has no API
    return service
