"""A model larger than a host: what each member of the group is told, and how the group starts again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

import pytest

from hfship.base.errors import HostError, IntegrityError
from hfship.base.values import dataclass, replace
from hfship.serve.cards import assumed_gpus
from hfship.serve.files import (
    COMPOSE_FILE,
    ENV_FILE,
    compose_text,
    compose_value,
    env_text,
    parse_plan,
    plan_text,
)
from hfship.serve.nodes import open_ports
from hfship.serve.plan import make_plan, vllm_arguments
from hfship.serve.proof import TrustedFolder
from hfship.serve.survey import Purpose, Request
from hfship.serve.terms import Host, Image, Plan, ServeOptions
from hfship.site.groups import (
    DOWN,
    START,
    STOP,
    UNKNOWN,
    UP,
    Member,
    Step,
    group_steps,
    node_plans,
    require_same,
    require_way,
)
from support import components
from test_facts import facts_of

OLD = Image("vllm/vllm-openai:v0.8.3", "sha256:0", (0, 8, 3), cuda="12.4")
DP_OLD = Image("vllm/vllm-openai:v0.10.2", "sha256:2", (0, 10, 2), cuda="12.8")
NEW = Image("vllm/vllm-openai:v0.32.0", "sha256:1", (0, 32, 0), cuda="13.0.1")
EIGHT = tuple(replace(gpu, total=80 << 30) for gpu in assumed_gpus("8x80GB"))


def members(count: int = 2, infiniband: Tuple[str, ...] = ()) -> List[Member]:
    found = []
    for number in range(count):
        gpus = tuple(replace(gpu, uuid=f"GPU-{number}-{gpu.index}") for gpu in EIGHT)
        found.append(Member(gpus, f"10.0.0.{number + 1}", "eth1", infiniband))
    return found


def group(
    image: Image,
    count: int = 2,
    model: str = "Llama-3.1-70B",
    infiniband: Tuple[str, ...] = (),
    **options: Any,
) -> Tuple[Plan, ...]:
    def decide(asked: Request, host: Host, previous: Optional[Plan]) -> Plan:
        return make_plan(asked.name, "/data/m", asked.facts, host, image, asked.options, previous)

    wanted = ServeOptions(device="gpu", **options)
    folder = TrustedFolder(Path("/data/m"))
    request = Request("m", folder, facts_of(model), wanted, Purpose.SHOW)
    host = Host(EIGHT, (image,))
    return node_plans(request, host, members(count, infiniband), None, decide)


def flags(plan: Plan) -> Dict[str, str]:
    words = vllm_arguments(plan)
    return {
        word: (words[number + 1 : number + 2] or [""])[0]
        for number, word in enumerate(words)
        if word.startswith("--")
    }


def test_a_new_image_works_through_its_own_processes() -> None:
    head, worker = group(NEW)
    told = flags(head)
    assert (told["--tensor-parallel-size"], told["--pipeline-parallel-size"]) == ("8", "2")
    assert (told["--nnodes"], told["--node-rank"]) == ("2", "0")
    assert (told["--master-addr"], told["--master-port"]) == ("10.0.0.1", "29501")
    assert "--headless" not in told and "--headless" in flags(worker)
    assert flags(worker)["--node-rank"] == "1" and flags(worker)["--master-addr"] == "10.0.0.1"
    assert told["--host"] == "127.0.0.1" and told["--port"] == str(head.port)
    assert head.gpus == tuple(f"GPU-0-{number}" for number in range(8))
    assert worker.gpus[0] == "GPU-1-0" and worker.gpu_names == head.gpu_names


def test_an_old_image_works_through_ray() -> None:
    head, worker = (compose_value(plan)["services"]["vllm"] for plan in group(OLD))
    assert head["entrypoint"] == worker["entrypoint"] == ["sh", "-c"]
    (script,) = head["command"]
    assert (
        script.startswith("ray start --head --port=6379") and "--node-ip-address=10.0.0.1" in script
    )
    assert "export RAY_ADDRESS=10.0.0.1:6379 && exec vllm serve /models/m" in script
    assert "--distributed-executor-backend ray" in script and "--nnodes" not in script
    (script,) = worker["command"]
    assert "exec ray start --address=10.0.0.1:6379 --block --node-ip-address=10.0.0.2" in script
    subprocess.run(["sh", "-n", "-c", script], check=True)


def test_copies_that_share_experts_are_apart_by_host() -> None:
    head, worker = group(
        DP_OLD, model="Mixtral-8x7B", data_parallel_size=4, enable_expert_parallel=True
    )
    told = flags(head)
    assert (told["--tensor-parallel-size"], told["--data-parallel-size"]) == ("4", "4")
    assert (told["--data-parallel-size-local"], told["--data-parallel-address"]) == (
        "2",
        "10.0.0.1",
    )
    assert told["--data-parallel-rpc-port"] == "13345" and "--data-parallel-start-rank" not in told
    told = flags(worker)
    assert told["--data-parallel-start-rank"] == "2" and "--headless" in told
    assert "--enable-expert-parallel" in told and "--nnodes" not in told


def test_a_member_is_told_its_network() -> None:
    plan = group(NEW, infiniband=("mlx5_0", "mlx5_1"))[1]
    assert plan.env["VLLM_HOST_IP"] == "10.0.0.2"
    assert (plan.env["NCCL_SOCKET_IFNAME"], plan.env["GLOO_SOCKET_IFNAME"]) == ("=eth1", "eth1")
    assert plan.env["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1" and "NCCL_IB_DISABLE" not in plan.env
    service = compose_value(plan)["services"]["vllm"]
    assert (
        service["devices"] == ["/dev/infiniband:/dev/infiniband"]
        and "IPC_LOCK" in service["cap_add"]
        and service["ulimits"]["memlock"] == -1
    )
    plain = group(NEW)[0]
    assert plain.env["NCCL_IB_DISABLE"] == "1"
    service = compose_value(plain)["services"]["vllm"]
    assert (
        service["network_mode"] == "host" and "ports" not in service and "networks" not in service
    )
    assert service["restart"] == "no" and "memlock" not in service["ulimits"]
    assert "devices" not in service and "cap_add" not in service
    assert f"127.0.0.1:{plain.port}/health" in service["healthcheck"]["test"][-1]
    assert compose_value(plan)["services"]["vllm"]["healthcheck"] == {"disable": True}


def test_ports_that_must_be_closed_are_named() -> None:
    for image, ports in ((NEW, "29501, 32768-60999"), (OLD, "6379, 6380, 6381, 10002-10999")):
        plan = group(image)[0]
        assert ", ".join(open_ports(plan)).startswith(ports)
        assert any(
            f"close ports {ports}" in text and "10.0.0.1, 10.0.0.2" in text
            for text in plan.warnings
        )


def test_plan_json_brings_a_group_back() -> None:
    for plan in group(NEW, infiniband=("mlx5_0",)):
        assert parse_plan(plan_text(plan), "plan.json") == plan


REFUSED: List[Tuple[Image, Dict[str, Any], str]] = [
    (NEW, {"gpus": ("0",)}, "cannot span hosts with GPUs that are named"),
    (NEW, {"tensor_parallel_size": 16}, "tensor parallelism stays within a host"),
    (NEW, {"model": "Mixtral-8x7B", "data_parallel_size": 1, "max_model_len": 10**9}, "tokens of context"),
    (OLD, {"model": "Mixtral-8x7B", "data_parallel_size": 2}, "choose another --image"),
    (NEW, {"model": "Mixtral-8x7B", "data_parallel_size": 2, "tensor_parallel_size": 4, "pipeline_parallel_size": 4}, ""),
]  # fmt: skip


@pytest.mark.parametrize("image, options, said", REFUSED)
def test_what_cannot_span_hosts_says_why(image: Image, options: Dict[str, Any], said: str) -> None:
    with pytest.raises(HostError) as caught:
        group(image, **options)
    assert said in caught.value.text()


def test_hosts_whose_gpus_differ_are_no_group() -> None:
    one, two = members()
    few = two._replace(gpus=two.gpus[:4])
    folder = TrustedFolder(Path("/data/m"))
    request = Request("m", folder, facts_of("Llama-3.1-70B"), ServeOptions(), Purpose.SHOW)
    with pytest.raises(HostError, match="whose GPUs differ"):
        node_plans(request, Host(EIGHT), [one, few], None, lambda *_: Plan())


def test_gpus_that_differ_are_told_by_host() -> None:
    one, two = members()
    request: Any = SimpleNamespace(name="m", options=ServeOptions())
    for other, said in ((two.gpus[:2], f"{EIGHT[0].label}, {EIGHT[1].label}"), ((), "none")):
        with pytest.raises(HostError) as caught:
            node_plans(request, Host(), [one, two._replace(gpus=other)], None, lambda *_: Plan())
        told = ", ".join(gpu.label for gpu in EIGHT)
        assert caught.value.why == f"10.0.0.1: {told}; 10.0.0.2: {said}"


@dataclass(frozen=True)
class Asked:
    """What a group needs of a request."""

    name: str
    options: ServeOptions
    network: str = ""


def decided(
    network: str = "",
    before: Optional[Plan] = None,
    interface: str = "eth1",
    first_s_error: Optional[HostError] = None,
) -> Tuple[List[Plan], Tuple[Plan, ...]]:
    """What is decided for two hosts of eight GPUs: what was asked for, and the plans."""
    asked: List[Any] = []

    def decide(request: Any, host: Host, previous: Optional[Plan]) -> Plan:
        assert previous is before and host.memory == 7
        asked.append((request, host))
        if first_s_error and len(asked) == 1:
            raise first_s_error
        sizes = request.options
        return Plan(
            name="m",
            bind="127.0.0.1",
            tensor_parallel_size=sizes.tensor_parallel_size,
            pipeline_parallel_size=sizes.pipeline_parallel_size,
            network="hfship",
            idle="GPU 7",
            env={"A": "b"},
            warnings=("w",),
        )

    request: Any = Asked("m", ServeOptions(), network)
    hosts = [one._replace(interface=interface) for one in members()]
    plans = node_plans(request, Host(EIGHT, memory=7), hosts, before, decide)
    return asked, plans


def test_all_gpus_are_decided_on_together_each_with_a_number_of_its_own() -> None:
    [(request, host)], plans = decided(network="hfship")
    assert request.network == "" and [gpu.index for gpu in host.gpus] == list(range(16))
    names = [f"GPU-{rank}-{index}@{rank}" for rank in (0, 1) for index in range(8)]
    assert [gpu.uuid for gpu in host.gpus] == names
    sizes = request.options.tensor_parallel_size, request.options.pipeline_parallel_size
    assert sizes == (8, 2)
    for rank, plan in enumerate(plans):
        assert plan.gpus == tuple(f"GPU-{rank}-{index}" for index in range(8))
        assert plan.gpu_names == tuple(gpu.label for gpu in EIGHT)
        assert (plan.nodes, plan.node_rank) == (("10.0.0.1", "10.0.0.2"), rank)
        assert (plan.interface, plan.network, plan.idle) == ("eth1", "", "")
        assert plan.env["A"] == "b" and plan.warnings[0] == "w" and len(plan.warnings) == 2


def test_a_division_that_does_not_go_is_followed_by_the_next() -> None:
    error = HostError("it does not fit", "", "")
    asked, [head, _] = decided(first_s_error=error)
    sizes = [request.options.tensor_parallel_size for request, _ in asked]
    assert sizes == [8, 4] and (head.tensor_parallel_size, head.pipeline_parallel_size) == (4, 4)


@pytest.mark.parametrize(
    ("network", "before", "bind"),
    [
        ("", None, "127.0.0.1"),
        ("", Plan(), "127.0.0.1"),
        ("", Plan(network="hfship"), "10.0.0.1"),
        ("hfship", None, "10.0.0.1"),
    ],
)
def test_a_gateway_reaches_a_group_at_its_head(
    network: str, before: Optional[Plan], bind: str
) -> None:
    _, plans = decided(network, before)
    assert [plan.bind for plan in plans] == [bind, bind]


def test_an_interface_that_is_not_known_is_said() -> None:
    _, plans = decided(interface="")
    assert [plan.warnings[-1].partition(":")[0] for plan in plans] == [
        "the interface with 10.0.0.1 is not known",
        "the interface with 10.0.0.2 is not known",
    ]


# TP, PP, copies -> whether vLLM can spread that over hosts of 8 GPUs
WAYS: List[Tuple[int, int, int, bool]] = [
    (8, 2, 1, True),
    (9, 1, 1, False),
    (8, 1, 2, True),
    (4, 2, 2, True),
    (2, 1, 8, True),
    (3, 1, 2, False),
    (4, 4, 2, False),
    (16, 1, 2, False),
]


@pytest.mark.parametrize(("width", "stages", "copies", "goes"), WAYS)
def test_a_division_that_vllm_does_not_know_is_refused(
    width: int, stages: int, copies: int, goes: bool
) -> None:
    plan = Plan(
        version=(0, 32, 0),
        tensor_parallel_size=width,
        pipeline_parallel_size=stages,
        data_parallel_size=copies,
    )
    with contextlib.nullcontext() if goes else pytest.raises(HostError, match="cannot be spread"):
        require_way(plan, 8)


STATES: List[Tuple[List[str], bool, List[Step]]] = [
    ([UP, UP, UP], False, []),
    ([UP, UP], True, [Step(STOP, 0), Step(STOP, 1), Step(START, 0), Step(START, 1)]),
    ([DOWN, UP], False, [Step(STOP, 1), Step(START, 0), Step(START, 1)]),
    ([UP, DOWN], False, [Step(STOP, 0), Step(START, 0), Step(START, 1)]),
    ([DOWN, DOWN], False, [Step(START, 0), Step(START, 1)]),
    ([UP, UNKNOWN], False, [Step(STOP, 0)]),
    ([DOWN, UNKNOWN], False, []),
]


@pytest.mark.parametrize("states, hung, steps", STATES)
def test_a_group_starts_again_as_one(states: List[str], hung: bool, steps: List[Step]) -> None:
    assert group_steps(states, hung) == steps


def test_all_members_have_the_same_files() -> None:
    require_same("m", "model", {"h0": "a" * 64, "h1": "a" * 64})
    with pytest.raises(HostError, match="the model m is not on h1"):
        require_same("m", "model", {"h0": "a" * 64, "h1": ""})
    with pytest.raises(HostError, match="the model m is not on h0, h2"):
        require_same("m", "model", {"h0": "", "h1": "a", "h2": ""})
    with pytest.raises(IntegrityError, match="do not have the same image") as caught:
        require_same("m", "image", {"h0": "sha256:" + "a" * 64, "h1": "sha256:" + "b" * 64})
    assert caught.value.why == f"h0: sha256:{'a' * 12}\nh1: sha256:{'b' * 12}"


# -- what the programs themselves say to it


@pytest.mark.parametrize("image", [OLD, DP_OLD, NEW], ids=["ray", "dp", "mp"])
def test_docker_compose_takes_the_files_of_each_member(image: Image, tmp_path: Path) -> None:
    docker = components.require("docker")
    options: Dict[str, Any] = {}
    if image is DP_OLD:
        options = {"model": "Mixtral-8x7B", "data_parallel_size": 4}
    for rank, plan in enumerate(group(image, infiniband=("mlx5_0",), **options)):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / COMPOSE_FILE).write_text(compose_text(plan))
        (folder / ENV_FILE).write_text(env_text(plan, "sk-1"))
        done = subprocess.run(
            [docker, "compose", "-f", folder / COMPOSE_FILE, "config", "--format", "json"],
            env={**os.environ, "DOCKER_CONFIG": str(components.HOME / "docker/config")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        service = json.loads(done.stdout)["services"]["vllm"]
        assert service["network_mode"] == "host" and service["restart"] == "no"
        assert service["environment"]["VLLM_HOST_IP"] == f"10.0.0.{rank + 1}"
        wanted = compose_value(plan)["services"]["vllm"]["command"]
        assert [word.replace("$$", "$") for word in service["command"]] == wanted


# vLLM reads its arguments, and refuses what does not go together, before it looks for GPUs.
PARSES = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for arguments in json.load(sys.stdin):
    parsed = parser.parse_args(arguments)
    validate_parsed_serve_args(parsed)
    fields = "nnodes node_rank master_addr master_port headless tensor_parallel_size pipeline_parallel_size"
    fields += " data_parallel_size data_parallel_size_local data_parallel_start_rank data_parallel_address"
    print(json.dumps({name: getattr(parsed, name) for name in fields.split()}))
"""


def test_vllm_itself_reads_what_members_are_told() -> None:
    """Takes 15 s of a core: it imports vLLM."""
    packages = components.require_torch()
    spread = group(NEW)
    shared = group(NEW, model="Mixtral-8x7B", data_parallel_size=4, enable_expert_parallel=True)
    told = [vllm_arguments(plan) for plan in (*spread, *shared)]
    done = subprocess.run(
        [components.python311(), "-c", PARSES, packages],
        input=json.dumps(told),
        env={**os.environ, "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["node_rank"] for one in read] == [0, 1, 0, 0]
    assert [one["headless"] for one in read] == [False, True, False, True]
    assert [one["nnodes"] for one in read] == [2, 2, 1, 1]
    assert (read[1]["master_addr"], read[1]["master_port"]) == ("10.0.0.1", 29501)
    assert [one["data_parallel_start_rank"] for one in read] == [None, None, None, 2]
    assert [one["data_parallel_size_local"] for one in read] == [None, None, 2, 2]
