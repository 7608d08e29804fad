"""What fits into memory, number by number: how a version loads a model, experts, and RAM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, Optional

import pytest

from hfship.base.errors import HostError
from hfship.base.text import GIB
from hfship.serve.facts import Quantization
from hfship.serve.fit import (
    LENGTH_STEP,
    Fit,
    GpuKind,
    as_loaded,
    batch_limits,
    expert_bytes,
    fit_cpu,
    kv_width,
    memory_on_cpu,
    weights_per_gpu,
)
from hfship.serve.split_rules import Split
from hfship.serve.terms import NEWEST, ServeOptions
from test_facts import facts_of

QWEN = facts_of("Qwen3-8B")
CPU = ServeOptions(device="cpu")


@pytest.mark.parametrize(
    "fit, said",
    [
        (Fit(Split(2), length=4096), "holds 4096 tokens"),
        (Fit(Split(2), length=4096, requests=2), "holds 4096 tokens for each of 2 requests"),
        (Fit(Split(2), "heads do not divide", length=4096), "heads do not divide"),
    ],
)
def test_a_fit_says_what_it_holds(fit: Fit, said: str) -> None:
    assert str(fit) == f"{Split(2)}: {said}"


@pytest.mark.parametrize(
    "dtype, quantization, asked, device, share",
    [
        ("bfloat16", None, "auto", "gpu", 1.0),
        ("bfloat16", None, "float32", "gpu", 2.0),
        ("float16", None, "float32", "cpu", 2.0),
        ("bfloat16", Quantization("fp8"), "float32", "gpu", 1.0),
        ("float32", None, "auto", "gpu", 0.5),
        ("float32", None, "float32", "gpu", 1.0),
        ("float32", None, "auto", "cpu", 1.0),  # it is not narrowed there
        ("float32", Quantization("awq", 4), "auto", "gpu", 1.0),
    ],
)
def test_weights_are_held_as_wide_as_they_are_computed(
    dtype: str, quantization: Optional[Quantization], asked: str, device: str, share: float
) -> None:
    facts = replace(QWEN, dtype=dtype, quantization=quantization)
    options = ServeOptions(dtype=asked, device=device)
    assert as_loaded(facts, NEWEST, options).weight_bytes == share * QWEN.weight_bytes


@pytest.mark.parametrize("device, limited", [("gpu", True), ("cpu", False)])
def test_the_newest_holds_two_batches_and_on_gpus_no_more_requests_than_states(
    device: str, limited: bool
) -> None:
    loaded = as_loaded(QWEN, NEWEST, ServeOptions(device=device))
    assert (loaded.batches, loaded.states_limit) == (2, limited)


@pytest.mark.parametrize(
    "options, width",
    [({}, 2), ({"dtype": "float32"}, 4), ({"dtype": "float32", "kv_cache_dtype": "fp8"}, 1)],
)
def test_a_value_of_the_cache_is_as_wide_as_the_computation(
    options: Dict[str, Any], width: int
) -> None:
    assert kv_width(QWEN, ServeOptions(**options)) == width


@pytest.mark.parametrize(
    "total, small, limits",
    [
        (160 * GIB, False, (16384, 1024)),
        (160 * GIB - 1, False, (8192, 1024)),
        (70 * GIB, False, (8192, 1024)),
        (70 * GIB, True, (2048, 256)),
        (70 * GIB - 1, False, (2048, 256)),
    ],
)
def test_batches_go_by_the_memory_of_a_gpu(total: int, small: bool, limits: Any) -> None:
    assert batch_limits(GpuKind(total, small)) == limits


MOE = replace(
    QWEN,
    layers=10,
    dense_layers=2,
    experts=4,
    hidden=8,
    moe_intermediate=16,
    weight_bytes=100_000,
    replicated=0,
)
VALUES = 8 * 4 * 3 * 8 * 16  # of 8 layers with 4 experts of three matrices


@pytest.mark.parametrize(
    "quantization, expected",
    [
        (None, VALUES * 2),
        (Quantization("fp8"), VALUES),
        (Quantization("awq", 4), VALUES // 2),
        (Quantization("mxfp4"), VALUES // 2),
    ],
)
def test_experts_take_three_matrices_in_each_layer_that_has_them(
    quantization: Optional[Quantization], expected: int
) -> None:
    assert expert_bytes(replace(MOE, quantization=quantization)) == expected
    assert expert_bytes(replace(MOE, dense_layers=10)) == 0
    assert expert_bytes(replace(MOE, weight_bytes=1000)) == 970, "at most nearly all weights"


def test_only_experts_are_divided_among_copies() -> None:
    """Of two copies on a GPU each: each holds all but the experts, of which it has half."""
    assert weights_per_gpu(MOE, Split(dp=2)) == 100_000 - VALUES * 2 // 2
    dense = replace(MOE, experts=0)
    assert weights_per_gpu(dense, Split(dp=2)) == 100_000


def test_what_every_gpu_holds_is_not_divided_with_the_experts() -> None:
    facts = replace(MOE, weight_bytes=VALUES * 2, replicated=VALUES // 2)
    held = VALUES  # in two bytes each
    assert weights_per_gpu(facts, Split(dp=2)) == pytest.approx(held + (VALUES * 2 - held) / 2)


# -- RAM


def test_the_cache_in_ram_is_what_is_left_in_whole_gib() -> None:
    least = memory_on_cpu(QWEN.weight_bytes, 0)
    assert fit_cpu("m", QWEN, least + 2 * GIB, CPU).kv == 2 * GIB
    assert fit_cpu("m", QWEN, least + 2 * GIB - 1, CPU).kv == GIB
    assert fit_cpu("m", QWEN, least + 5 * GIB, CPU, held=2 * GIB).kv == 3 * GIB
    full = fit_cpu("m", QWEN, 1 << 42, CPU)
    assert full.kv < 100 * GIB and full.length == QWEN.max_length, "no more than a few requests"


def test_a_length_that_just_fits_into_ram_is_taken_and_the_next_refused() -> None:
    memory = memory_on_cpu(QWEN.weight_bytes, GIB)
    longest = fit_cpu("m", QWEN, memory, CPU).length
    assert fit_cpu("m", QWEN, memory, replace(CPU, max_model_len=longest)).length == longest
    more = replace(CPU, max_model_len=longest + LENGTH_STEP)
    with pytest.raises(HostError, match="cannot serve m on the CPU: too little RAM") as caught:
        fit_cpu("m", QWEN, memory, more)
    assert f"and {longest} tokens would fit" in caught.value.why
    assert caught.value.next_step == f"hfship serve m --max-model-len {longest}"


@pytest.mark.parametrize("held, step", [(0, "a machine with more memory"), (GIB, "hfship status")])
def test_weights_that_do_not_fit_into_ram_are_refused(held: int, step: str) -> None:
    with pytest.raises(HostError) as caught:
        fit_cpu("m", QWEN, 4 * GIB, CPU, held)
    assert "4.3 GB of RAM can be used" in caught.value.why
    assert "with the shortest context" in caught.value.why
    assert "would fit" not in caught.value.why and step in caught.value.next_step
    assert ("other models hold 1.1 GB" in caught.value.why) == bool(held)
