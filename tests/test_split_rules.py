"""The divisibility rules of vLLM, number by number: one fact that does not divide, and what is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict

import pytest

from hfship.serve.facts import ModelFacts, Quantization, State
from hfship.serve.split_rules import Split, kv_heads_per_gpu, split_problem
from test_facts import facts_of

PLAIN = facts_of("Qwen3-8B")
FP8 = Quantization("fp8", block=(128, 128))

# What differs from a model that divides by all of this, the split, and what is said.
PROBLEMS: Dict[str, Any] = {
    "divides": ({}, Split(8), ""),
    "alone": ({"heads": 7, "vocab": 7, "intermediate": 7}, Split(), ""),
    "heads": ({"heads": 36}, Split(8), "36 attention heads are not divisible by 8"),
    "KV heads": ({"heads": 24, "kv_heads": 6}, Split(4), "6 KV heads cannot be spread over 4"),
    "no KV heads": ({"kv_heads": 0}, Split(8), ""),
    "a latent has no KV heads": ({"heads": 24, "kv_heads": 6, "mla_dim": 576}, Split(4), ""),
    "heads of states": (
        {"state": State(heads=(12,))},
        Split(8),
        "12 heads of states are not divisible by 8",
    ),
    "groups of Mamba": (
        {"state": State(groups=6)},
        Split(4),
        "6 groups of Mamba are not divisible by 4",
    ),
    "one group of Mamba": ({"state": State(groups=1)}, Split(4), ""),
    "vision heads": ({"vision_heads": 12}, Split(8), "12 heads of the vision encoder"),
    "vision channels": (
        {"vision_intermediate": 12},
        Split(8),
        "the vision encoder's 12 channels are not divisible by 8",
    ),
    "a vocabulary that is padded": ({"vocab": 65}, Split(8), ""),
    "a vocabulary": (
        {"vocab": 64, "heads": 192, "kv_heads": 192, "intermediate": 192},
        Split(3),
        "a vocabulary of 64 does not divide by 3",
    ),
    "channels": (
        {"intermediate": 12_292},
        Split(8),
        "the MLP's 12292 channels are not divisible by 8",
    ),
    "channels of experts, cut by copies, too": (
        {"experts": 4, "moe_intermediate": 12},
        Split(4, dp=2),
        "the MLP's 12 channels are not divisible by 8",
    ),
    "experts that stay whole": (
        {"experts": 4, "moe_intermediate": 13},
        Split(4, dp=2, whole_experts=True),
        "",
    ),
    "all layers are experts": (
        {"experts": 4, "moe_intermediate": 0, "intermediate": 12},
        Split(1, dp=8),
        "the MLP's 12 channels are not divisible by 8",
    ),
    "blocks": (
        {"quantization": FP8, "intermediate": 1280},
        Split(4),
        "the MLP's 1280 channels over 4 GPUs cut through the 128-wide FP8 blocks",
    ),
    "blocks of two GPUs": (
        {"quantization": FP8, "intermediate": 384},
        Split(2),
        "the MLP's 384 channels over 2 GPUs cut through the 128-wide FP8 blocks",
    ),
    "blocks of experts that are made finer": (
        {"quantization": FP8, "experts": 4, "moe_intermediate": 256, "finer_blocks": True},
        Split(4),
        "",
    ),
    "blocks of plain layers are not": (
        {"quantization": FP8, "intermediate": 1280, "finer_blocks": True},
        Split(4),
        "the MLP's 1280 channels over 4 GPUs cut through the 128-wide FP8 blocks",
    ),
    "groups": (
        {"quantization": Quantization("awq", 4, group=128), "intermediate": 1280},
        Split(4),
        "cut through awq's groups of 128",
    ),
    "groups whose kernels pad": (
        {"quantization": Quantization("mxfp4", 4, group=128), "intermediate": 1280},
        Split(4),
        "",
    ),
    "rows of K and V": (
        {"quantization": replace(FP8, block=(128, 64)), "head_dim": 64},
        Split(8),
        "64 rows of KV heads per GPU cut through the 128-wide FP8 blocks",
    ),
    "rows of a latent": (
        {"quantization": FP8, "head_dim": 64, "mla_dim": 576},
        Split(8),
        "",
    ),
    "as many stages as layers": ({"layers": 4}, Split(pp=4), ""),
    "more stages than layers": ({"layers": 4}, Split(pp=5), "4 layers are fewer than 5 stages"),
    "a class without stages": (
        {"architecture": "WhisperForConditionalGeneration"},
        Split(pp=2),
        "without pipeline parallelism only",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_does_not_divide_is_said(case: str) -> None:
    changes, split, said = PROBLEMS[case]
    facts: ModelFacts = replace(PLAIN, **changes)
    problem = split_problem(facts, split)
    assert said in problem and bool(problem) == bool(said)


@pytest.mark.parametrize(
    "split, gpus, cuts, flags",
    [
        (Split(2, 2), 4, 2, "--tensor-parallel-size 2 --pipeline-parallel-size 2"),
        (Split(2, dp=2), 4, 4, "--tensor-parallel-size 2 --data-parallel-size 2"),
        (
            Split(2, dp=2, whole_experts=True),
            4,
            1,
            "--tensor-parallel-size 2 --data-parallel-size 2",
        ),
        (Split(), 1, 1, "--tensor-parallel-size 1"),
    ],
)
def test_a_split_is_flags_and_gpus(split: Split, gpus: int, cuts: int, flags: str) -> None:
    assert (split.gpus, split.cuts_of_experts, split.flags) == (gpus, cuts, flags)


@pytest.mark.parametrize("heads, tp, each", [(0, 4, 0), (8, 4, 2), (8, 16, 1), (8, 8, 1)])
def test_heads_of_each_gpu(heads: int, tp: int, each: int) -> None:
    assert kv_heads_per_gpu(heads, tp) == each
