# SPDX-License-Identifier: Apache-2.0
"""What each key of a config.json means, one by one; test_facts.py has whole models."""

from __future__ import annotations

from typing import Any, Dict

import pytest

from hfship.base.values import asdict, replace
from hfship.serve import facts as room
from hfship.serve.facts import ModelFacts, Quantization, facts_from_config, quantization_of

PLAIN: Dict[str, Any] = {
    "architectures": ["XForCausalLM"],
    "model_type": "x",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
FACTS = ModelFacts(
    architecture="XForCausalLM",
    model_type="x",
    layers=3,
    full_layers=3,
    window_layers=0,
    window=0,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mla_dim=0,
    hidden=64,
    intermediate=128,
    moe_intermediate=0,
    experts=0,
    experts_per_token=0,
    vocab=1000,
    dtype="bfloat16",
    max_length=2048,
    stretched_length=2048,
    weight_bytes=7,
    encoder_patches=1,
)


def differing(found: ModelFacts, expected: ModelFacts = FACTS) -> Dict[str, Any]:
    """The fields that differ, as they were found."""
    known = asdict(expected)
    return {name: value for name, value in asdict(found).items() if value != known[name]}


def facts(**changes: Any) -> ModelFacts:
    config = {key: value for key, value in {**PLAIN, **changes}.items() if value is not None}
    return facts_from_config(config, {"BF16": 5, "F32": 2})


def test_a_plain_model_has_nothing_else() -> None:
    """What no key says is 0, or not there."""
    assert differing(facts()) == {}
    told = asdict(FACTS)
    assert told["compressed"] == (0, 0) and told["chat_template"] is True
    known = set(told) - {"chat_template", "architecture", "model_type", "dtype", "state"}
    silent = {name for name in known if not told[name] or told[name] == (0, 0)}
    assert len(silent) == len(known) - 13


# A key in place of another, or beside it -> the field that it is.
KEYS = [
    ("n_layer", "num_hidden_layers", 9, {"layers": 9, "full_layers": 9}),
    ("num_layers", "num_hidden_layers", 9, {"layers": 9, "full_layers": 9}),
    ("n_layers", "num_hidden_layers", 9, {"layers": 9, "full_layers": 9}),
    ("n_head", "num_attention_heads", 8, {"heads": 8, "head_dim": 8}),
    ("n_heads", "num_attention_heads", 8, {"heads": 8, "head_dim": 8}),
    ("decoder_attention_heads", "num_attention_heads", 8, {"heads": 8, "head_dim": 8}),
    ("n_embd", "hidden_size", 32, {"hidden": 32, "head_dim": 8}),
    ("d_model", "hidden_size", 32, {"hidden": 32, "head_dim": 8}),
    ("n_inner", "intermediate_size", 99, {"intermediate": 99}),
    ("ffn_hidden_size", "intermediate_size", 99, {"intermediate": 99}),
    ("decoder_ffn_dim", "intermediate_size", 99, {"intermediate": 99}),
    ("x", "intermediate_size", 1, {"intermediate": 256}),  # as transformers has it
    ("n_head_kv", "num_key_value_heads", 1, {"kv_heads": 1}),
    ("num_kv_heads", "num_key_value_heads", 1, {"kv_heads": 1}),
    ("multi_query_group_num", "num_key_value_heads", 1, {"kv_heads": 1}),
    ("num_attention_groups", "num_key_value_heads", 1, {"kv_heads": 1}),
    ("attn_config", "num_key_value_heads", {"kv_n_heads": 1}, {"kv_heads": 1}),
    ("x", "num_key_value_heads", 1, {"kv_heads": 4}),
    ("multi_query", "", True, {"kv_heads": 1}),
    ("multi_query", "", False, {}),
    ("num_global_key_value_heads", "", 8, {"kv_heads": 8, "window_kv_heads": 2, "window_head_dim": 16}),
    ("global_head_dim", "", 512, {"head_dim": 512, "window_kv_heads": 2, "window_head_dim": 16}),
    ("swa_num_key_value_heads", "", 8, {"window_kv_heads": 8, "window_head_dim": 16}),
    ("head_dim", "", 32, {"head_dim": 32}),
    ("attention_head_dim", "", 32, {"head_dim": 32}),
    ("moe_intermediate_size", "", 33, {"moe_intermediate": 33}),
    ("num_local_experts", "", 8, {"experts": 8}),
    ("num_experts", "", 8, {"experts": 8}),
    ("n_routed_experts", "", 8, {"experts": 8}),
    ("num_experts_per_tok", "", 2, {"experts_per_token": 2}),
    ("num_experts_per_token", "", 2, {"experts_per_token": 2}),
    ("experts_per_token", "", 2, {"experts_per_token": 2}),
    ("first_k_dense_replace", "", 1, {"dense_layers": 1}),
    ("decoder_layers", "", 2, {"layers": 2, "full_layers": 2, "cross_layers": 2}),
    ("n_positions", "max_position_embeddings", 9, {"max_length": 9, "stretched_length": 9}),
    ("max_seq_len", "max_position_embeddings", 9, {"max_length": 9, "stretched_length": 9}),
    ("seq_length", "max_position_embeddings", 9, {"max_length": 9, "stretched_length": 9}),
    ("max_sequence_length", "max_position_embeddings", 9, {"max_length": 9, "stretched_length": 9}),
    ("max_seq_length", "max_position_embeddings", 9, {"max_length": 9, "stretched_length": 9}),
    ("seq_len", "max_position_embeddings", 9, {"max_length": 9, "stretched_length": 9}),
    ("max_target_positions", "max_position_embeddings", 9, {"max_length": 9, "stretched_length": 9}),
    ("seq_len", "", 9, {"max_length": 9, "stretched_length": 9}),  # the smallest
    ("model_max_length", "", 9999, {"max_length": 9999, "stretched_length": 9999}),
    ("x", "max_position_embeddings", 1, {"max_length": 0, "stretched_length": 0}),
    ("dtype", "", "float16", {"dtype": "float16"}),
    ("dtype", "torch_dtype", "torch.float32", {"dtype": "float32"}),
    ("x", "torch_dtype", 1, {}),  # that of the most bytes
    ("auto_map", "", {"A": "m.X", "B": 5, "C": "a--b.Y"}, {"remote_code": ("a--b.Y", "m.X")}),
    ("compress_ratios", "", [4, 128, 4, 4], {"compressed": (2, 1)}),
    ("compress_ratios", "", "4", {}),
    ("kv_lora_rank", "", 512, {"mla_dim": 512, "replicated": 3 * 64 * 512}),
    ("index_topk", "", 9, {"sparse": True, "indexer_bytes": 12}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "instead", "value", "fields"), KEYS)
def test_what_a_key_means(key: str, instead: str, value: Any, fields: Dict[str, Any]) -> None:
    without = {instead: None} if instead else {}
    assert differing(facts(**without, **{key: value})) == fields


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        (
            {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 100},
            {"mla_dim": 576, "replicated": 3 * 64 * 676},
        ),
        (
            {
                "model_type": "minicpm3",
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 5,
            },
            {"model_type": "minicpm3", "head_dim": 9, "replicated": 3 * 64 * 516},
        ),
        ({"multi_query": True, "new_decoder_architecture": True}, {}),
        (
            {"model_type": "mimo_v2_flash", "v_head_dim": 7, "swa_v_head_dim": 8},
            {"model_type": "mimo_v2_flash", "value_dim": 7, "window_value_dim": 8},
        ),
        ({"v_head_dim": 7, "swa_v_head_dim": 8}, {}),
        (
            {"swa_num_key_value_heads": 8, "swa_head_dim": 5},
            {"window_kv_heads": 8, "window_head_dim": 5},
        ),
        (
            {"model_type": "kimi_linear"},
            {"model_type": "kimi_linear", "padded_channels": 256},
        ),
        (
            {"model_type": "kimi_linear", "min_moe_intermediate_per_partition": 64},
            {"model_type": "kimi_linear", "padded_channels": 64},
        ),
        (
            {
                "num_key_value_heads": None,
                "block_configs": [
                    {"attention": {"n_heads_in_group": 4}},
                    {"attention": {"n_heads_in_group": None}},
                    "odd",
                ],
            },
            {"kv_heads": 1, "full_layers": 2},  # of those that have attention
        ),
        ({"hidden_size_per_layer_input": 10}, {"replicated": 2 * 3 * 64 * 10}),
        (
            {"index_topk": 9, "index_head_dim": 128},
            {"sparse": True, "indexer_bytes": 3 * 132},
        ),
        (
            {"sparse_attention_config": {"sparse_attention_freq": [1, 0, 1, 1], "sparse_index_dim": 8}},
            {"indexer_bytes": 2 * 2 * 8},
        ),
        (
            {"sparse_attention_config": {"sparse_index_dim": 8}},
            {"indexer_bytes": 2 * 3 * 8},
        ),
        (
            {
                "model_type": "whisper",
                "d_model": 10,
                "vocab_size": 100,
                "max_source_positions": 20,
                "num_mel_bins": 5,
            },
            {"model_type": "whisper", "vocab": 100, "replicated": 10 * (100 + 20 + 3 * (5 + 10))},
        ),
    ],
)  # fmt: skip
def test_what_keys_mean_together(changes: Dict[str, Any], fields: Dict[str, Any]) -> None:
    assert differing(facts(**changes)) == fields


# -- the context


def rope(kind: str, factor: Any = 4.0, key: str = "rope_type", **more: Any) -> Dict[str, Any]:
    return {"rope_scaling": {key: kind, "factor": factor, **more}}


@pytest.mark.parametrize(
    ("changes", "length", "stretched", "original"),
    [
        (rope("linear"), 8192, 8192, 0),
        (rope("linear", key="type"), 8192, 8192, 0),
        (rope("dynamic"), 8192, 8192, 0),
        (rope("llama3"), 2048, 2048, 0),
        (rope("yarn"), 2048, 2048, 0),
        (rope("yarn", original_max_position_embeddings=1000), 2048, 4000, 0),
        (rope("deepseek_yarn"), 2048, 2048, 0),
        (rope("deepseek_llama_scaling"), 2048, 2048, 0),
        ({**rope("longrope"), "original_max_position_embeddings": 512}, 2048, 2048, 512),
        ({**rope("su"), "original_max_position_embeddings": 512}, 2048, 2048, 512),
        ({"original_max_position_embeddings": 512}, 2048, 2048, 0),
        (rope("linear", "x"), 2048, 2048, 0),
        (rope("linear", 0), 2048, 2048, 0),
        (rope("linear", -4), 2048, 2048, 0),
        (rope("linear", 2**31), 2048, 2048, 0),
        (rope("linear", 2.0**30), 2**31, 2**31, 0),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 4096, 4096, 0),
        ({**rope("linear"), "model_type": "gemma3"}, 2048, 2048, 0),
    ],
)  # fmt: skip
def test_how_far_a_context_is_stretched(
    changes: Dict[str, Any], length: int, stretched: int, original: int
) -> None:
    found = facts(**changes)
    assert (found.max_length, found.stretched_length, found.original_length) == (
        length,
        stretched,
        original,
    )


# -- encoders


VISION = {"hidden_size": 10, "intermediate_size": 30, "num_heads": 5, "depth": 2}
WHOLE = 2 * 10 * (40 + 90)  # values of such an encoder that is not split


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (
            {"vision_config": {**VISION, "model_type": "qwen2_vl", "spatial_merge_size": 2}},
            {
                "vision_heads": 5,
                "vision_intermediate": 30,
                "encoder_hidden": 10,
                "encoder_channels": 30,
                "encoder_patches": 4,
                "encoder_tokens": room.LARGEST_IMAGE,
            },
        ),
        (
            {"vision_config": {**VISION, "model_type": "internvit", "image_size": 28, "patch_size": 14}},
            {
                "encoder_hidden": 10,
                "encoder_channels": 30,
                "encoder_patches": 1,
                "replicated": WHOLE,
            },
        ),
        (
            {
                "vision_config": {"embed_dim": 10, "image_size": 56, "patch_size": 14, "num_hidden_layers": 2},
                "mm_tokens_per_image": 4,
            },
            {
                "encoder_hidden": 10,
                "encoder_channels": 40,
                "encoder_patches": 4,
                "replicated": 2 * 10 * (40 + 120),
            },
        ),
        (
            {"vision_encoder": {**VISION, "model_type": "pixtral"}, "spatial_merge_size": 3},
            {
                "vision_heads": 5,
                "vision_intermediate": 30,
                "encoder_hidden": 10,
                "encoder_channels": 30,
                "encoder_patches": 9,
                "encoder_tokens": room.LARGEST_IMAGE,
            },
        ),
        (
            {"audio_config": {"hidden_size": 10, "intermediate_size": 20, "num_hidden_layers": 2}},
            {"encoder_patches": 1, "replicated": 2 * (400 + 400)},
        ),
        (
            {"thinker_config": {"audio_config": {"d_model": 10, "encoder_ffn_dim": 20, "encoder_layers": 2}}},
            {"replicated": 2 * (400 + 400)},
        ),
    ],
)  # fmt: skip
def test_encoders_of_images_and_audio(config: Dict[str, Any], fields: Dict[str, Any]) -> None:
    if "thinker_config" in config:
        config["thinker_config"] = {**config["thinker_config"], "text_config": PLAIN}
    found = facts(**config)
    assert {name: getattr(found, name) for name in fields} == fields
    others = ("vision_heads", "encoder_hidden", "encoder_tokens", "replicated")
    assert all(not getattr(found, name) for name in others if name not in fields)


@pytest.mark.parametrize(
    "kind",
    [
        "qwen2_5_vl",
        "glm4v",
        "siglip",
        "clip_vision",
        "pixtral",
        "mistral3",
        "moonvit",
        "kimi_vl",
        "dots_vit",
        "ernie",
        "exaone",
        "isaac",
        "aimv2",
        "blip_2",
        "onevision",
        "mimovl",
        "pangu",
        "paddleocr",
        "idefics",
        "llama4_vision",
        "llava",
        "paligemma",
        "gemma3",
    ],
)
def test_encoders_that_vllm_divides(kind: str) -> None:
    found = facts(vision_config={**VISION, "model_type": kind})
    assert found.vision_heads == 5 and found.replicated == 0
    by_model = facts(vision_config=VISION, model_type=kind)
    assert by_model.vision_heads == 5
    assert facts(vision_config={**VISION, "model_type": "gemma3n"}).vision_heads == 0


# -- what a config leaves out


def parameters(found: ModelFacts) -> int:
    """Of a llama with its own output layer."""
    attention = 2 * found.hidden * (found.heads + found.kv_heads) * found.head_dim
    block = attention + 3 * found.hidden * found.intermediate + 2 * found.hidden
    return 2 * found.vocab * found.hidden + found.layers * block + found.hidden


@pytest.mark.parametrize(
    ("model_type", "count"),
    [("llama", 6_738_415_616), ("mistral", 7_241_732_096)],  # Llama-2-7B, Mistral-7B-v0.1
)
def test_a_config_that_names_its_type_alone_is_the_first_model_of_it(
    model_type: str, count: int
) -> None:
    found = facts_from_config({"text_config": {"model_type": model_type}}, {})
    assert parameters(found) == count


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"max_length": 2048}),
        ("gemma2", {"head_dim": 256, "max_length": 8192}),
        (
            "gemma3_text",  # as google/gemma-3-4b-it leaves them out
            {"heads": 8, "kv_heads": 4, "head_dim": 256, "vocab": 262208, "max_length": 131072},
        ),
        (
            "qwen2",
            {"layers": 32, "heads": 32, "hidden": 4096, "intermediate": 22016, "vocab": 151936},
        ),
    ],
)
def test_what_a_type_means_by_itself(model_type: str, fields: Dict[str, Any]) -> None:
    found = facts_from_config({"model_type": model_type}, {})
    assert {name: getattr(found, name) for name in fields} == fields
    told = facts_from_config({"model_type": model_type, "hidden_size": 7, "vocab_size": None}, {})
    assert told.hidden == 7 and told.vocab == found.vocab


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config", "thinker_config"])
def test_the_language_model_is_a_part_of_the_config(key: str) -> None:
    found = facts_from_config({"model_type": "y", key: PLAIN}, {"BF16": 7})
    assert found == replace(FACTS, model_type="y")
    twice = facts_from_config({key: {"text_config": PLAIN}, "architectures": ["Outer"]}, {})
    assert (twice.hidden, twice.architecture) == (64, "Outer")


# -- what is believed


@pytest.mark.parametrize("name", room._BELIEVED)
def test_numbers_that_no_model_has(name: str) -> None:
    most = room._BELIEVED[name]
    assert room.unbelievable(replace(FACTS, **{name: most})) == ""
    said = room.unbelievable(replace(FACTS, **{name: most + 1}))
    assert said == f"{name}: {most + 1}, and {most} is the most that is believed"


# -- quantisation


NONE = Quantization("unknown", 0, 0, (), False)


@pytest.mark.parametrize(
    ("declared", "found"),
    [
        ({"quant_method": "FP8"}, {"method": "fp8"}),
        ({"quant_algo": "NVFP4"}, {"method": "nvfp4"}),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, {"method": "awq", "bits": 4, "group": 128}),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, {"method": "awq", "bits": 4, "group": 64}),
        ({"quant_method": "x", "num_bits": 8}, {"method": "x", "bits": 8}),
        ({"weight_block_size": [128, 64]}, {"block": (128, 64)}),
        ({"weight_block_size": [128, 0, True, "x", -1]}, {"block": (128,)}),
        ({"weight_block_size": 5}, {}),
        ({"kv_cache_scheme": {"num_bits": 8}}, {"fp8_kv_cache": True}),
        ({"kv_cache_scheme": {"num_bits": 4}}, {}),
        ({"kv_cache_quant_algo": "FP8"}, {"fp8_kv_cache": True}),
        ({"kv_cache_quant_algo": "INT8"}, {}),
        (
            {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "producer": {}},
            {"method": "fp8", "fp8_kv_cache": True},
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": "odd",
                    "b": {"weights": {"num_bits": 4, "group_size": 32, "block_structure": [2, 3]}},
                    "c": {"weights": {"num_bits": 8}},
                },
            },
            {"method": "compressed-tensors", "bits": 4, "group": 32, "block": (2, 3)},
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_dialects_of_quantisation(
    declared: Dict[str, Any], found: Dict[str, Any], place: str
) -> None:
    config: Dict[str, Any] = {place: declared}
    if place == "text_config":
        config = {place: {"quantization_config": declared}}
    assert quantization_of(config) == replace(NONE, **found)
    assert facts_from_config(config, {}).quantization == replace(NONE, **found)


@pytest.mark.parametrize("config", [{}, {"quantization_config": {}}, {"quantization_config": "x"}])
def test_what_declares_no_quantisation_has_none(config: Dict[str, Any]) -> None:
    assert quantization_of(config) is None


@pytest.mark.parametrize(
    ("tensors", "dtype"),
    [
        ({"BF16": 1, "F16": 2}, "float16"),
        ({"F32": 3, "F16": 2}, "float32"),
        ({"F64": 3}, "float64"),
        ({"U8": 9, "I32": 9}, ""),
        ({}, ""),
    ],
)
def test_what_is_computed_in_is_what_the_weights_are(tensors: Dict[str, int], dtype: str) -> None:
    found = facts_from_config({}, tensors)
    assert found.dtype == dtype and found.weight_bytes == sum(tensors.values())
