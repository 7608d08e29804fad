"""The cache of requests as vLLM cuts it up: sizes of states, blocks, groups of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.serve.facts import facts_from_config
from hfship.serve.fit import cache_pool
from hfship.serve.layers import layer_counts
from hfship.serve.split_rules import Split, split_problem
from hfship.serve.state_cache import Kept, compressed_pool, pool_of, state_of

# What vLLM 0.32 says a layer keeps, in bytes over 1 and over 2 GPUs (MambaSpec.page_size_bytes
# before it is padded, as MambaStateShapeCalculator counts it).
STATES: Dict[str, tuple] = {
    "Qwen3-Next": (
        {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4},
        1_097_728, 548_864,
    ),
    "Qwen3.5, whose state is in float32": (
        {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32"},
        2_146_304, 1_073_152,
    ),
    "Kimi-Linear": ({"linear_attn_config": {"num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4}}, 2_170_880, 1_085_440),
    "Granite 4": ({"mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "hidden_size": 4096}, 2_147_840, 1_074_688),
    "Codestral": ({"model_type": "mamba2", "num_heads": 128, "head_dim": 64, "state_size": 128, "n_groups": 8, "conv_kernel": 4, "expand": 2, "hidden_size": 4096}, 2_158_592, 1_079_296),
    "Nemotron-H, float32 where it says nothing": ({"model_type": "nemotron_h", "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4}, 2_134_016, 1_067_008),
    "Jamba": ({"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "hidden_size": 4096}, 311_296, 155_648),
    "LFM2": ({"conv_L_cache": 3, "conv_dim": 2048}, 8_192, 4_096),
    "nothing said": ({"num_attention_heads": 32, "hidden_size": 4096}, 2_097_152, 1_048_576),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_size_of_a_state_is_what_vllm_allocates(name: str) -> None:
    config, alone, split = STATES[name]
    state = state_of(config)
    assert (state.size(1, 2), state.size(2, 2)) == (alone, split)


@pytest.mark.parametrize(
    "tokens, said", [(2048, 845_890_560), (8192, 3_371_535_360), (1_048_576, 10_802_142_720)]
)
def test_deepseek_v4_keeps_what_vllm_says(tokens: int, said: int) -> None:
    assert compressed_pool(43, 21, 20).request(tokens, 2 * 8192) == said
    ratios = {"compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0], "num_hidden_layers": 43}
    facts = facts_from_config(ratios, {})
    assert facts.compressed == (21, 20)
    assert cache_pool(facts, Split(8), 2) == compressed_pool(43, 21, 20)


def test_keys_of_indexers_are_on_every_gpu() -> None:
    latent = Kept(full=61, full_token=1152, latent=True, beside=61 * 132)
    assert pool_of(latent).request(131072, 0) == 131072 * 61 * (1152 + 132)


@pytest.mark.parametrize(
    "state, tp, problem",
    [
        ({"mamba_n_heads": 112, "mamba_d_state": 64, "mamba_n_groups": 2}, 8, "2 groups of Mamba"),
        ({"mamba_n_heads": 112, "mamba_d_state": 64, "mamba_n_groups": 1}, 8, ""),
        ({"mamba_n_heads": 100, "mamba_d_state": 64}, 8, "100 heads of states"),
        ({"linear_attn_config": {"num_heads": 12, "head_dim": 128}}, 8, "12 heads of states"),
    ],
)
def test_states_must_divide_too(state: Dict[str, Any], tp: int, problem: str) -> None:
    heads = {"num_attention_heads": 64, "num_hidden_layers": 8, "hidden_size": 4096}
    config = {**heads, **state, "layer_types": ["mamba", "full_attention"] * 4}
    said = split_problem(facts_from_config(config, {}), Split(tp))
    assert problem in said and bool(problem) == bool(said)


def test_groups_of_mamba_that_do_not_divide_are_on_every_gpu() -> None:
    state = state_of({"mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128})
    eighth = 128 * 64 // 8
    assert state.size(8, 2) == 3 * 2 * (eighth + 2 * 128) + 2 * eighth * 128


@pytest.mark.parametrize(
    "config, layers, expected",
    [
        ({"model_type": "mamba2"}, 64, (0, 0, 64)),
        ({"model_type": "falcon_h1"}, 44, (44, 0, 44)),
        ({"hybrid_override_pattern": "M-M*-ME"}, 7, (1, 0, 3)),
        ({"attn_layer_indices": [9, 18, 27]}, 32, (3, 0, 29)),
        ({"layer_group_size": 8}, 33, (5, 0, 28)),
        ({"attn_type_list": [0] * 7 + [1]}, 8, (1, 0, 7)),
        ({"hybrid_layer_pattern": [0, 1, 1, 1], "sliding_window_size": 128}, 4, (1, 3, 0)),
        ({"block_configs": [{"attention": {"no_op": True}}, {"attention": {}}]}, 2, (1, 0, 0)),
        (
            {
                "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
                "sliding_window": 512,
                "num_kv_shared_layers": 2,
            },
            5,
            (0, 3, 0),
        ),
    ],
)
def test_layers_by_what_they_keep(config: Dict[str, Any], layers: int, expected: tuple) -> None:
    assert layer_counts(config, layers) == expected


QWEN3_NEXT = Kept(full=12, full_token=2048, states=36, state=1_097_728)


def test_a_block_of_attention_is_as_large_as_a_state() -> None:
    pool = pool_of(QWEN3_NEXT)
    assert (pool.block, pool.bytes, pool.state_groups) == (544, 12 * 544 * 2048, 3)
    # four blocks of attention, and two of each of three groups of states
    assert pool.request(2048, 0) == (4 + 3 * 2) * pool.bytes
    assert pool.most_states(100 * pool.bytes + 5) == 99


def test_latents_beside_states_have_blocks_of_128() -> None:
    kimi = Kept(full=7, full_token=1152, states=20, state=2_170_880, latent=True)
    assert (pool_of(kimi).block, pool_of(kimi).state_groups) == (1920, 3)


def test_windows_are_padded_to_groups_of_the_layers_that_look_at_all() -> None:
    gemma = Kept(full=10, full_token=8192, windowed=52, window_token=8192, window=1024)
    assert pool_of(gemma).request(131072, 16384) == 19_301_662_720
    # 12 and 13 make groups of 13 each
    (windows,) = pool_of(replace(gemma, full=13, windowed=12)).windows
    assert windows.groups == 1


def test_windows_of_other_sizes_fill_the_blocks_of_the_layers_that_look_at_all() -> None:
    mimo = Kept(full=9, full_token=2560, windowed=39, window_token=5120, window=128)
    pool = pool_of(mimo)
    assert (pool.bytes, pool.windows[0].groups) == (9 * 16 * 2560, 10)


def test_layers_of_states_alone_take_one_block_however_long_a_request_is() -> None:
    pool = pool_of(Kept(states=64, state=2_158_592))
    assert pool.request(10, 0) == pool.request(10**6, 8192) == 64 * 2_158_592


numbers = st.integers(0, 80)


@given(
    st.builds(
        Kept,
        full=numbers,
        full_token=st.integers(0, 9000),
        windowed=numbers,
        window_token=st.integers(0, 9000),
        window=st.integers(1, 9000),
        states=numbers,
        state=st.integers(0, 3_000_000),
        latent=st.booleans(),
        stages=st.integers(1, 8),
    ),
    st.integers(1, 300_000),
    st.integers(0, 16384),
)
def test_longer_requests_and_larger_batches_never_take_less(
    kept: Kept, tokens: int, in_flight: int
) -> None:
    pool = pool_of(kept)
    request = pool.request(tokens, in_flight)
    assert 0 <= request <= pool.request(tokens + 1, in_flight)
    assert request <= pool.request(tokens, in_flight + 1)
    least = kept.full * kept.full_token * tokens // kept.stages  # every token of every full layer
    assert request >= least - kept.full * kept.full_token
