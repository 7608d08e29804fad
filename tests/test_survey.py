"""What a machine has left for a deployment: ports and GPUs, less what other deployments hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Set, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.serve.cards import assumed_gpus
from hfship.serve.survey import Claims, Purpose, Request, claims_of, free_host, image_to_come
from hfship.serve.terms import CUDA_SEES, Host, Plan, ServeOptions
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
