"""What a machine has left for a deployment: ports and GPUs, less what other deployments hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Set, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.serve import survey as room
from hfship.serve.cards import assumed_gpus
from hfship.serve.deployments import Deployment
from hfship.serve.messages import Container
from hfship.serve.mounts import Adapter
from hfship.serve.survey import (
    Claims,
    Machine,
    Purpose,
    Request,
    claims_of,
    decide,
    free_host,
    image_to_come,
    is_running,
    ports_in_use,
    read_machine,
    survey,
    with_plans,
)
from hfship.serve.terms import CUDA_SEES, Host, Image, Plan, ServeOptions
from test_facts import facts_of

PLANS = {
    "a": Plan(name="a", port=8000, gpus=("GPU-assumed-0",), gpu_memory_utilization=0.5),
    "b": Plan(name="b", port=8001, gpus=("GPU-assumed-1",), gpu_memory_utilization=0.5),
}


@pytest.mark.parametrize(
    "name, running, own_gpus, own_port, others_running, stopped",
    [
        ("a", {"a", "b"}, ("GPU-assumed-0",), 8000, {"b"}, set()),
        ("a", {"a"}, ("GPU-assumed-0",), 8000, set(), {"b"}),
        ("a", {"b"}, (), None, {"b"}, set()),  # its GPUs may be another's now
        ("a", None, (), 8000, set(), {"b"}),  # docker does not answer: it may run
        ("new", {"a"}, None, None, {"a"}, {"b"}),
    ],
)
def test_claims_are_of_the_others(
    name: str,
    running: Optional[Set[str]],
    own_gpus: Optional[Tuple[str, ...]],
    own_port: Optional[int],
    others_running: Set[str],
    stopped: Set[str],
) -> None:
    claims = claims_of(PLANS, name, running)
    assert own_gpus == (claims.own.gpus if claims.own else None)
    assert claims.own_port == own_port
    assert {plan.name for plan in claims.running} == others_running
    assert {plan.name for plan in claims.stopped} == stopped


def test_what_is_left_of_a_host() -> None:
    host = Host(assumed_gpus("3x80GB"))
    left = free_host(host, Claims(running=(PLANS["a"],), stopped=(PLANS["b"],)), {8005})
    assert left.taken_ports == {8000, 8001, 8005}
    half = int(host.gpus[0].total * CUDA_SEES * 0.5)
    assert [(gpu.used, gpu.spoken_for) for gpu in left.gpus] == [
        (half, False),
        (0, True),
        (0, False),
    ]


@pytest.mark.parametrize(
    "purpose, wanted, expected",
    [
        (Purpose.START, "x/vllm:v0.9.2", None),
        (Purpose.WRITE, "", "or name one with --image"),
        (Purpose.WRITE, "x/vllm:v0.9.2", {"reference": "x/vllm:v0.9.2", "version": (0, 9, 2)}),
        (Purpose.SHOW, "", {"reference": "vllm/vllm-openai", "version": None}),
    ],
)
def test_image_that_docker_has_not(purpose: Purpose, wanted: str, expected: Any) -> None:
    options = ServeOptions(image=wanted)
    request = Request("m", Path("/m"), facts_of("Qwen3-8B"), options, purpose)
    missing = HostError("docker has no image", "", "docker load")
    if not isinstance(expected, dict):
        with pytest.raises(HostError, match="docker has no image") as caught:
            image_to_come(request, "gpu", missing)
        assert (expected or "docker load") in caught.value.next_step
        return
    image = image_to_come(request, "gpu", missing)
    assert {"reference": image.reference, "version": image.version} == expected
    assert (image.id, image.cpu) == ("", False)


class Said:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.infos: List[str] = []
        self.warnings: List[str] = []

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def said() -> Any:
    return Said()


# -- the machine


def test_a_machine_is_docker_and_its_gpus(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(assumed_gpus("1x80GB"))
    read = {"x:1": (host, frozenset({"vllm_a"}))}
    monkeypatch.setattr(room, "read_host_and_containers", lambda wanted: read[wanted])
    expected = Machine(host, True, frozenset({"vllm_a"}))
    assert read_machine("x:1", Purpose.START, said) == expected


@pytest.mark.parametrize("purpose", list(Purpose))
def test_only_a_start_needs_docker(
    purpose: Purpose, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> Any:
        raise HostError("docker does not answer", "no daemon", "start it")

    monkeypatch.setattr(room, "read_host_and_containers", fail)
    host = Host(assumed_gpus("1x80GB"))
    monkeypatch.setattr(room, "read_host", lambda images: {(): host}[images])
    if purpose is Purpose.START:
        with pytest.raises(HostError, match="docker does not answer"):
            read_machine("", purpose, said)
        return
    assert read_machine("", purpose, said) == Machine(host, docker_answers=False)
    assert said.warnings == ["docker does not answer (no daemon)"]


DEPLOYMENTS = [Deployment(Path("/d") / name, plan, "") for name, plan in PLANS.items()]


@pytest.mark.parametrize(
    "answers, beside, running, used, own_gpus",
    [
        (True, [], {"b"}, [False, True], ()),
        (False, [], set(), [False, False], ()),
        (True, [Plan(name="c", port=8002, gpus=("GPU-assumed-0",), gpu_memory_utilization=0.5)],
         {"b"}, [True, True], ()),
    ],
)  # fmt: skip
def test_what_is_left_for_a_deployment(
    answers: bool,
    beside: List[Plan],
    running: Set[str],
    used: List[bool],
    own_gpus: Tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of `a`, which does not run, while `b` does, and what runs in another container is nobody's."""
    monkeypatch.setattr(room, "port_is_free", lambda _, port: port != 8003)
    containers = frozenset({"vllm_b", "a"}) if answers else frozenset()
    machine = Machine(Host(assumed_gpus("2x80GB")), answers, containers)
    left, own = survey(machine, DEPLOYMENTS, "a", ServeOptions(), beside)
    assert left.running == running
    assert [gpu.used > 0 for gpu in left.gpus] == used
    assert own and own.name == "a" and own.gpus == own_gpus
    assert {8001, 8003} <= left.taken_ports
    assert 8000 not in left.taken_ports, "it is its own"
    assert (8002 in left.taken_ports) == bool(beside)


@pytest.mark.parametrize(
    "container, runs",
    [(Container("1", "running"), True), (Container("1", "exited"), False), (None, False)],
)
def test_what_runs_is_what_docker_says(
    container: Optional[Container], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "inspect_container", lambda name: {"m": container}[name])
    assert is_running("m") == runs


def test_plans_that_will_run_replace_what_their_deployments_claim() -> None:
    claims = Claims(running=(PLANS["a"],), stopped=(PLANS["b"], Plan(name="c")))
    moved = [replace(PLANS["a"], port=9000), replace(PLANS["b"], port=9001)]
    found = with_plans(claims, moved)
    assert [(plan.name, plan.port) for plan in found.running] == [("a", 9000), ("b", 9001)]
    assert [plan.name for plan in found.stopped] == ["c"]


@pytest.mark.parametrize(
    "options, own_port, expected",
    [
        ({"port": 8000}, None, {8000}),
        ({"port": 8000}, 8000, set()),  # it listens there itself
        ({"port": 9999}, None, set()),
        ({}, None, {8000, 8001}),
        ({}, 8001, {8000}),
    ],
)
def test_ports_that_something_else_has(
    options: Dict[str, Any], own_port: Optional[int], expected: Set[int], monkeypatch: Any
) -> None:
    taken = {("0.0.0.0", 8000), ("0.0.0.0", 8001)}
    monkeypatch.setattr(room, "port_is_free", lambda bind, port: (bind, port) not in taken)
    assert ports_in_use(ServeOptions(bind="0.0.0.0", **options), own_port) == expected


def test_models_on_the_cpu_hold_ram() -> None:
    on_cpu = Plan(name="c", device="cpu", weight_bytes=10 << 30, kv_bytes=2 << 30)
    on_gpu = Plan(name="g", device="gpu", weight_bytes=10 << 30, kv_bytes=2 << 30)
    left = free_host(Host(), Claims(running=(on_cpu, on_gpu), stopped=(on_cpu,)), set())
    assert left.held == room.memory_on_cpu(10 << 30, 2 << 30)


# -- the decision

GPU_IMAGE = Image("vllm/vllm-openai:v0.32.0", "sha256:1", (0, 32, 0), cuda="13.0.1")
CPU_IMAGE = Image("vllm/vllm-openai-cpu:v0.32.0", "sha256:2", (0, 32, 0), cpu=True)


def request(tmp_path: Path, purpose: Purpose = Purpose.START, **changes: Any) -> Request:
    model = SimpleNamespace(folder=tmp_path, signed_by="ann", version="v2")
    options = ServeOptions(**changes.pop("options", {}))
    made = Request("m", model, facts_of("Qwen3-8B"), options, purpose)  # type: ignore[arg-type]
    return replace(made, **changes)


def test_a_plan_has_what_the_model_and_the_host_say(tmp_path: Path, said: Any) -> None:
    (gpu,) = assumed_gpus("1xH100")
    host = Host(
        (gpu,), (GPU_IMAGE,), memory=64 << 30, cdi=frozenset({f"nvidia.com/gpu={gpu.uuid}"})
    )
    looked: List[Image] = []

    def look(image: Image) -> Image:
        looked.append(image)
        return replace(image, id="sha256:9")

    adapters = (Adapter("a", tmp_path, 24),)
    plan = decide(request(tmp_path, adapters=adapters), host, None, said, look)
    assert looked == [GPU_IMAGE] and plan.image_id == "sha256:9"
    assert (plan.signed_by, plan.model_version) == ("ann", "v2")
    assert (plan.max_lora_rank, plan.memory_limit, plan.cdi) == (32, 64 << 30, True)
    assert (plan.model_dir, plan.gpus) == (str(tmp_path), (gpu.uuid,))
    assert plan.network == "" and plan.port
    assert not said.infos and not said.warnings
    without = decide(request(tmp_path), replace(host, cdi=frozenset()), None, said, look)
    assert not without.cdi


@pytest.mark.parametrize(
    "asked, before, network",
    [(None, "", ""), ("site", "", "site"), (None, "site", "site"), ("", "site", "")],
)
def test_behind_a_gateway_it_has_no_port(
    asked: Optional[str], before: str, network: str, tmp_path: Path, said: Any
) -> None:
    host = Host(assumed_gpus("1xH100"), (GPU_IMAGE,), memory=64 << 30)
    previous = Plan(name="m", network=before) if before else None
    made = decide(request(tmp_path, network=asked), host, previous, said, lambda image: image)
    assert made.network == network and bool(made.port) != bool(network)


@pytest.mark.parametrize("device, infos", [("auto", 1), ("cpu", 0)])
def test_the_cpu_is_told_where_nobody_asked_for_it(
    device: str, infos: int, tmp_path: Path, said: Any
) -> None:
    host = Host((), (CPU_IMAGE,), memory=256 << 30)
    asked = request(tmp_path, options={"device": device})
    plan = decide(asked, host, None, said, lambda image: image)
    assert (plan.device, plan.cdi, len(said.infos)) == ("cpu", False, infos)


@pytest.mark.parametrize("images, warned", [((CPU_IMAGE,), 1), ((), 0)])
def test_a_plan_that_is_shown_stands_on_an_image_to_come(
    images: Tuple[Image, ...], warned: int, tmp_path: Path, said: Any
) -> None:
    host = Host(assumed_gpus("1xH100"), images, memory=64 << 30)
    shown = request(tmp_path, Purpose.SHOW, options={"device": "gpu"})
    plan = decide(shown, host, None, said, lambda image: image)
    assert (plan.image, len(said.warnings)) == ("vllm/vllm-openai", warned)
    with pytest.raises(HostError, match="docker has no"):
        decide(replace(shown, purpose=Purpose.START), host, None, said, lambda image: image)
