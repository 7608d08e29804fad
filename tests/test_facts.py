"""Model facts: what serving reads from config.json, safetensors headers and the tokenizer's files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.base.errors import HostError, IncompleteError, IntegrityError, NotFoundError
from hfship.base.manifest import FileEntry, make_manifest, write_manifest
from hfship.base.safetensors import read_tensor_bytes, tensor_bytes
from hfship.serve.facts import (
    MOST_LENGTH,
    ModelFacts,
    Quantization,
    facts_from_config,
    longest_context,
    quantization_of,
    text_config,
    unbelievable,
)
from hfship.serve.fit import as_loaded, kv_bytes, longest_fit
from hfship.serve.layers import layer_counts
from hfship.serve.mistral import config_from_params
from hfship.serve.model_folder import WEIGHTS_INDEX, read_facts, shortened_length
from hfship.serve.split_rules import Split
from hfship.serve.terms import ServeOptions

# The configs of published models, cut down to what shapes a deployment.
CONFIGS: Dict[str, Dict[str, Any]] = {
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936,
        "max_position_embeddings": 40960, "torch_dtype": "bfloat16", "sliding_window": None, "use_sliding_window": False,
        "max_window_layers": 36, "rope_scaling": None,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064,
        "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "sliding_window": 131072, "use_sliding_window": False,
    },
    "Llama-3.1-70B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "vocab_size": 129280,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
        "rope_scaling": {"factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    },
    "gpt-oss-120b": {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": 36, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088,
        "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"},
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "Mixtral-8x7B": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    },
    "Qwen3-30B-A3B-FP8": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "vocab_size": 151936, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "Qwen2.5-72B-AWQ": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "hidden_size": 8192, "intermediate_size": 29696, "vocab_size": 152064,
        "max_position_embeddings": 32768, "torch_dtype": "float16",
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    },
    "gemma-3-27b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "gemma3_text", "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16,
            "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    },
    "Qwen3-Next-80B": {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048,
        "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10,
        "vocab_size": 151936, "max_position_embeddings": 262144, "full_attention_interval": 4, "dtype": "bfloat16",
    },
}  # fmt: skip
GB = 10**9
WEIGHTS = {
    "Qwen3-8B": 16_381_470_720, "Qwen2.5-7B": 15_231_233_024, "Llama-3.1-70B": 141_107_412_992, "DeepSeek-V3": 688 * GB,
    "gpt-oss-120b": 65 * GB, "Mixtral-8x7B": 93_405_585_408, "Qwen3-30B-A3B-FP8": 31 * GB, "Qwen2.5-72B-AWQ": 41 * GB,
    "gemma-3-27b": 54_864_000_000, "Qwen3-Next-80B": 162 * GB,
}  # fmt: skip


def facts_of(name: str, **changes: Any) -> ModelFacts:
    return facts_from_config({**CONFIGS[name], **changes}, {"BF16": WEIGHTS[name]})


@pytest.mark.parametrize(
    "name, tp, width, expected",
    [
        ("Qwen3-8B", 1, 2, 147_456),
        ("Qwen3-8B", 2, 2, 73_728),
        ("Qwen3-8B", 16, 2, 18_432),  # 8 heads over 16 GPUs: one each, replicated
        ("Qwen3-8B", 1, 1, 73_728),  # FP8 cache
        ("Llama-3.1-70B", 1, 2, 327_680),
        ("Qwen2.5-7B", 1, 2, 57_344),
        ("DeepSeek-V3", 1, 2, 70_272),
        ("DeepSeek-V3", 8, 2, 70_272),  # MLA's latent is the same on every GPU
        ("Mixtral-8x7B", 1, 2, 131_072),
        ("Qwen3-Next-80B", 1, 2, 24_576),  # 12 of 48 layers keep a cache
    ],
)
def test_kv_cache_per_token_is_what_vllm_allocates(
    name: str, tp: int, width: int, expected: int
) -> None:
    facts, tokens = facts_of(name), 1 << 20
    growth = kv_bytes(facts, Split(tp), 2 * tokens, width) - kv_bytes(
        facts, Split(tp), tokens, width
    )
    assert growth == pytest.approx(expected * tokens, rel=0.001)  # in whole blocks


def test_windowed_layers_stop_growing_at_their_window() -> None:
    facts = facts_of("gpt-oss-120b")
    assert (facts.full_layers, facts.window_layers, facts.window) == (18, 18, 128)
    growth = kv_bytes(facts, Split(), 100_016, 2, 8192) - kv_bytes(facts, Split(), 100_000, 2, 8192)
    assert growth == 16 * 18 * 2 * 8 * 64 * 2
    before_0_10 = as_loaded(facts, (0, 9, 2), ServeOptions())
    assert kv_bytes(before_0_10, Split(), 1600, 2) == 1600 * 36 * 2 * 8 * 64 * 2


@pytest.mark.parametrize(
    "name, length, layers",
    [
        ("Qwen3-8B", 40960, (36, 0)),
        ("Qwen2.5-7B", 32768, (28, 0)),  # ships a window that is switched off
        ("Llama-3.1-70B", 131072, (80, 0)),  # llama3 scaling is in max_position_embeddings already
        ("DeepSeek-V3", 163840, (61, 0)),
        ("gpt-oss-120b", 131072, (18, 18)),
        (
            "gemma-3-27b",
            131072,
            (10, 52),
        ),  # length, heads and pattern come from the type's defaults
        ("Qwen3-Next-80B", 262144, (12, 0)),
    ],
)
def test_context_length_and_layers(name: str, length: int, layers: tuple) -> None:
    facts = facts_of(name)
    assert (facts.max_length, (facts.full_layers, facts.window_layers)) == (length, layers)


@pytest.mark.parametrize(
    "raw, expected",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("gptq", 4, 128, (), False)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 0, 0, (128, 128), False)),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            },
            ("compressed-tensors", 4, 32, (), True),
        ),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"}}, ("nvfp4", 0, 16, (), True)),
        ({"quant_method": None, "weight_block_size": "x", "config_groups": {"a": 3}}, ("unknown", 0, 0, (), False)),
    ],
)  # fmt: skip
def test_quantisation_of_every_dialect(raw: Dict[str, Any], expected: tuple) -> None:
    quant = quantization_of({"quantization_config": raw})
    assert quant == Quantization(*expected)


@pytest.mark.parametrize(
    "kinds, window, full, windowed, states",
    [
        (["deepseek_sparse_attention"] * 78, 0, 78, 0, 0),
        (["indexed_attention", "linear_attention"] * 8, 0, 8, 0, 8),
        (["hybrid_sliding", "hybrid"], 512, 1, 1, 0),
        (["mamba", "moe", "attention", "mlp"], 0, 1, 0, 1),
        (["conv", "full_attention"], 0, 1, 0, 1),
        (["mamba", "hybrid", "mamba"], 0, 1, 0, 3),  # Zamba2
        (["something_new", None, 7], 0, 3, 0, 0),
    ],
)
def test_a_kind_of_layer_that_nobody_knows_keeps_the_whole_context(
    kinds: list, window: int, full: int, windowed: int, states: int
) -> None:
    text = {"layer_types": kinds, "sliding_window": window}
    assert layer_counts(text, len(kinds)) == (full, windowed, states)


SHAPES: Dict[str, Tuple[Dict[str, Any], Tuple[int, ...]]] = {  # layers with a cache, KV heads, head_dim, latent
    "LFM2": ({"full_attn_idxs": [2, 5, 8], "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048}, (3, 8, 64, 0)),
    "Kimi-Linear": ({"linear_attn_config": {"full_attn_layers": [4, 8, 12]}, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 27, "num_attention_heads": 32, "head_dim": 72}, (3, 32, 72, 576)),
    "LongCat": ({"model_type": "longcat_flash", "num_layers": 28, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 64, "hidden_size": 6144}, (56, 64, 96, 576)),
    "DBRX": ({"attn_config": {"kv_n_heads": 8}, "n_layers": 40, "n_heads": 48, "d_model": 6144}, (40, 8, 128, 0)),
    "Falcon 7B": ({"model_type": "falcon", "multi_query": True, "num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544}, (32, 1, 64, 0)),
    "Falcon 40B": ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8, "num_hidden_layers": 60, "num_attention_heads": 128, "hidden_size": 8192}, (60, 8, 64, 0)),
    "MiniCPM3": ({"model_type": "minicpm3", "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "num_hidden_layers": 62, "num_attention_heads": 40, "hidden_size": 2560}, (62, 40, 96, 0)),
    "LLaVA 1.5": ({"text_config": {"model_type": "llama", "max_position_embeddings": 4096}}, (32, 32, 128, 0)),
    "LLaVA 1.6": ({"text_config": {"model_type": "mistral"}}, (32, 8, 128, 0)),
    "Qwen2-Audio": ({"text_config": {"model_type": "qwen2", "intermediate_size": 11008}}, (32, 32, 128, 0)),
    "Nemotron-H": ({"layers_block_type": ["mamba", "attention", "moe"] * 4, "num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128}, (4, 2, 128, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_in_other_keys_and_in_defaults(name: str) -> None:
    config, expected = SHAPES[name]
    facts = facts_from_config(config, {})
    assert (facts.full_layers, facts.kv_heads, facts.head_dim, facts.mla_dim) == expected


def test_the_key_of_command_r_wins() -> None:
    assert longest_context({"max_position_embeddings": 8192, "model_max_length": 131072}) == 131072


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=20,  # with more, to draw a value can take seconds on a busy machine
)


@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_no_config_breaks_the_reader(name: str, data: st.DataObject) -> None:
    config = dict(CONFIGS[name])
    keys = st.sampled_from(
        sorted(
            {*config, "text_config", "layer_types", "rope_parameters", "auto_map", "block_configs"}
            | {"linear_attn_config", "mamba_d_state", "mamba_d_head", "attn_type_list"}
        )
    )
    for key in data.draw(st.lists(keys, max_size=6)):
        config[key] = data.draw(json_values)
    facts = facts_from_config(config, {"BF16": 1000})
    assert facts.weight_bytes == 1000
    assert facts.full_layers >= 0 and facts.window_layers >= 0 and facts.state_layers >= 0
    if not unbelievable(facts):
        assert kv_bytes(facts, Split(2), 4096, 2, 8192) >= 0


# ---- safetensors ---------------------------------------------------------------------


def safetensors(tensors: Dict[str, Any], data: int, cut: int = 0) -> bytes:
    header = json.dumps(tensors).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(data)
    return whole[: len(whole) - cut]


def tensor(start: Any, stop: Any, dtype: Any = "BF16") -> Dict[str, Any]:
    return {"dtype": dtype, "shape": [1], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "less than a safetensors header"),
        (b"\x01\x00", "less than a safetensors header"),
        (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "the file is cut"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors header"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not a safetensors header"),
        (struct.pack("<Q", 40_000) + b"[" * 40_000, "not a safetensors header"),
        (safetensors({"a": tensor(0, 100)}, 100, cut=1), "the file is cut: 1 B are missing"),
        (safetensors({"a": tensor(0, 100)}, 101), "1 B follow the last tensor"),
        (safetensors({"a": tensor(0, 10), "b": tensor(5, 20)}, 20), "overlap"),
        (safetensors({"a": tensor(0, 10), "b": tensor(12, 20)}, 20), "gap"),
        (safetensors({"a": tensor(-5, 10)}, 10), "gap or an overlap"),
        (safetensors({"a": tensor(0, "9" * 30)}, 10), "gap or an overlap"),
        (safetensors({"a": {"dtype": "BF16"}}, 10), "not a safetensors header"),
        (safetensors({"a": tensor(0, 2**70)}, 10), "the file is cut"),
    ],
)
def test_hostile_or_cut_shard_is_an_integrity_error(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        read_tensor_bytes(path)
    assert reason in caught.value.why and str(path) in caught.value.what


@given(st.binary(max_size=200), st.integers(0, 300))
def test_no_header_breaks_the_parser(header: bytes, size: int) -> None:
    try:
        assert sum(tensor_bytes(header, size).values()) == size
    except ValueError:
        pass


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.integers(0, 50), max_size=6))
def test_header_that_a_writer_made_is_read(sizes: Dict[str, int]) -> None:
    tensors, at = {}, 0
    for name, size in sizes.items():
        tensors[name], at = tensor(at, at + size, "F16"), at + size
    tensors.pop("__metadata__", None)
    expected = sum(t["data_offsets"][1] - t["data_offsets"][0] for t in tensors.values())
    if expected == at:
        assert sum(tensor_bytes(json.dumps(tensors).encode(), at).values()) == at


# ---- folders -------------------------------------------------------------------------


def make_folder(folder: Path, config: Optional[Dict[str, Any]] = None, shards: int = 2) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(config if config is not None else CONFIGS["Qwen3-8B"])
    )
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    for name in names:
        (folder / name).write_bytes(safetensors({"w": tensor(0, 100)}, 100))
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {f"w{n}": n for n in names}}))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


def remove_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / WEIGHTS_INDEX]:
        path.unlink(missing_ok=True)


def only_gguf(folder: Path) -> None:
    remove_weights(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")


def lora(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


def series_without_index(folder: Path) -> None:
    (folder / WEIGHTS_INDEX).unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()


def bad_index(folder: Path) -> None:
    (folder / WEIGHTS_INDEX).write_text('{"weight_map": {"w": "../../etc/passwd"}}')


def cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def manifest_says_more(folder: Path) -> None:
    entry = FileEntry("tokenizer.json", 5, "0" * 64)
    write_manifest(folder, make_manifest("m", [entry]))


def under_way(folder: Path) -> None:
    (folder / ".hfship/partial").mkdir(parents=True)


def manifest_of_more(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size + 1
    write_manifest(folder, make_manifest("m", [FileEntry(name, size, "0" * 64)]))


def changed_config(folder: Path) -> None:
    manifest_of_more(folder, "config.json")


def changed_weights(folder: Path) -> None:
    manifest_of_more(folder, "model-00001-of-00002.safetensors")


def link_outside(folder: Path) -> None:
    target = folder.parent / "blob"
    (folder / "model-00001-of-00002.safetensors").rename(target)
    (folder / "model-00001-of-00002.safetensors").symlink_to(target)


@pytest.mark.parametrize(
    "harm, error, said",
    [
        (lambda f: (f / "config.json").unlink(), NotFoundError, "no config.json"),
        (lambda f: (f / "config.json").write_text("{}"), NotFoundError, "config.json is empty"),
        (lambda f: (f / "config.json").write_text("{"), IntegrityError, "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), IntegrityError, "not a JSON table"),
        (remove_weights, NotFoundError, "no *.safetensors"),
        (only_gguf, HostError, "GGUF"),
        (lora, HostError, "LoRA adapter"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), IntegrityError, "00002-of-00002.safetensors is missing"),
        (series_without_index, IntegrityError, "00001-of-00002.safetensors is missing"),
        (bad_index, IntegrityError, "unsafe path"),
        (cut_shard, IntegrityError, "1 B are missing"),
        (manifest_says_more, IntegrityError, "tokenizer.json is missing"),
        (link_outside, HostError, "cannot see"),
        (under_way, IncompleteError, "not complete yet"),
        (changed_config, IntegrityError, "config.json is changed"),
        (changed_weights, IntegrityError, "00001-of-00002.safetensors is damaged"),
    ],
)  # fmt: skip
def test_folder_that_cannot_be_served_says_why(
    tmp_path: Path, harm: Any, error: type, said: str
) -> None:
    folder = make_folder(tmp_path / "m")
    harm(folder)
    with pytest.raises(error) as caught:
        read_facts(folder)
    assert said in caught.value.text()


def test_only_files_of_the_index_count(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "consolidated.safetensors").write_bytes(b"not even safetensors")
    assert read_facts(folder).weight_bytes == 200


def test_facts_of_a_real_folder(model: Path) -> None:
    facts = read_facts(model)
    files = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    assert 0 < files - facts.weight_bytes < 100_000
    assert facts.chat_template and not facts.embeds and facts.dtype == "float16"


# -- Mistral's own layout

PIXTRAL = {
    "dim": 5120, "n_layers": 40, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "rope_theta": 1e9, "norm_eps": 1e-5, "vocab_size": 131072,
    "vision_encoder": {"hidden_size": 1024, "image_size": 1024, "patch_size": 16, "num_hidden_layers": 24,
                       "intermediate_size": 4096, "num_attention_heads": 16},
}  # fmt: skip


def own_layout(folder: Path, *more: str) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PIXTRAL))
    shard = safetensors({"a": tensor(0, 1000)}, 1000)
    (folder / "consolidated.safetensors").write_bytes(shard)
    for name in more:
        (folder / name).write_text("{}")
    return folder


def test_mistrals_own_layout_is_a_model(tmp_path: Path) -> None:
    facts = read_facts(own_layout(tmp_path / "m", "tekken.json"))
    assert (facts.architecture, facts.layers) == ("PixtralForConditionalGeneration", 40)
    assert (facts.kv_heads, facts.head_dim, facts.max_length) == (8, 128, 128_000)
    assert (facts.dtype, facts.weight_bytes) == ("bfloat16", 1000)
    assert facts.own_layout and facts.own_tokenizer and facts.chat_template


def test_the_usual_layout_wins_where_both_are_there(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "params.json").write_text(json.dumps(PIXTRAL))
    (folder / "consolidated.safetensors").write_bytes(b"whatever")
    facts = read_facts(folder)
    assert not facts.own_layout and facts.architecture == "Qwen3ForCausalLM"


def test_mistrals_tokenizer_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "tekken.json").write_text("{}")
    assert read_facts(folder).own_tokenizer
    (folder / "tokenizer.json").write_text("{}")
    assert not read_facts(folder).own_tokenizer


@pytest.mark.parametrize(
    "params, expected",
    [
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, ("MixtralForCausalLM", 128_000, 32, 0)),
        ({"moe": {"num_experts": 128, "num_shared_experts": 1}, "qk_nope_head_dim": 64, "kv_lora_rank": 512},
         ("MistralLarge3ForCausalLM", 128_000, 32, 0)),
        ({"sliding_window": [None, 4096, 4096, 4096], "max_seq_len": 32768}, ("MistralForCausalLM", 32768, 8, 24)),
        ({"sliding_window": 4096}, ("MistralForCausalLM", 128_000, 0, 32)),
        ({"max_position_embeddings": 65536, "yarn": {"factor": 4, "original_max_position_embeddings": 16384}},
         ("MistralForCausalLM", 65536, 32, 0)),
        ({"multimodal": {"whisper_model_args": {"encoder_args": {"dim": 1280, "n_layers": 32, "hidden_dim": 5120}}}},
         ("VoxtralForConditionalGeneration", 128_000, 32, 0)),
        ({"model_type": "mamba", "n_layers": 64}, ("Mamba2ForCausalLM", 128_000, 0, 0)),
    ],
)  # fmt: skip
def test_params_in_all_their_forms(params: Dict[str, Any], expected: tuple) -> None:
    base = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
    }
    facts = facts_from_config(config_from_params({**base, **params}), {"BF16": 1000})
    layers = (facts.architecture, facts.max_length, facts.full_layers, facts.window_layers)
    assert layers == expected


@given(
    st.dictionaries(
        st.sampled_from(
            ["moe", "yarn", "sliding_window", "multimodal", "quantization", "n_layers"]
        ),
        json_values,
    )
)
def test_no_params_break_the_reader(params: Dict[str, Any]) -> None:
    assert facts_from_config(config_from_params(params), {}).architecture


@pytest.mark.parametrize(
    "config, tokenizer, length",
    [
        ({"model_type": "xlm-roberta", "position_embedding_type": "absolute"}, 8192, 8192),
        ({"model_type": "xlm-roberta"}, 512, 512),
        ({"model_type": "xlm-roberta"}, 1e30, 8194),
        ({"model_type": "nomic_bert", "position_embedding_type": "rotary"}, 512, 8194),
        ({"model_type": "qwen2"}, 512, 8194),
    ],
)
def test_where_positions_are_absolute_the_tokenizer_limits_the_context(
    config: Dict[str, Any], tokenizer: Any, length: int, tmp_path: Path
) -> None:
    settings = {"model_max_length": tokenizer}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert shortened_length(tmp_path, config, 8194) == length


def test_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_facts(tmp_path / "nothing")


LLAMA4 = {"model_type": "llama4_text", "attention_chunk_size": 8192, "no_rope_layers": []}
HUGE = {"rope_type": "linear", "factor": 1e300}


@pytest.mark.parametrize(
    "config, layers",
    [
        (LLAMA4, (12, 36)),
        ({**LLAMA4, "no_rope_layer_interval": 2}, (24, 24)),
        ({**LLAMA4, "no_rope_layers": [1, 1, 0] * 16}, (16, 32)),
        ({"sliding_window": 4096, "sliding_window_pattern": "LLLG"}, (12, 36)),
        ({"sliding_window": 4096, "sliding_window_pattern": "LLGLLGL"}, (14, 34)),
    ],
)
def test_layers_with_full_attention(config: Dict[str, Any], layers: Tuple[int, int]) -> None:
    assert layer_counts(text_config(config), 48)[:2] == layers


def test_a_number_of_layers_that_cannot_be_costs_no_time() -> None:
    config = {"sliding_window": 4096, "sliding_window_pattern": "LLLG"}
    assert layer_counts(config, 4 * 10**17) == (10**17, 3 * 10**17, 0)


@pytest.mark.parametrize(
    "config, length",
    [
        ({"max_position_embeddings": 2e12}, MOST_LENGTH),
        ({"max_position_embeddings": 4096, "rope_scaling": HUGE}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {**HUGE, "factor": float("inf")}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {**HUGE, "factor": -4}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {**HUGE, "factor": None}}, 4096),
        ({"max_position_embeddings": 40960, "rope_scaling": {"type": "yarn", "factor": 4}}, 40960),
    ],
)
def test_odd_lengths(config: Dict[str, Any], length: int) -> None:
    assert longest_context(config) == length
    facts = facts_from_config(
        {**config, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 2}, {}
    )
    assert longest_fit(facts, Split(), 1 << 40, ServeOptions(), 1)


@pytest.mark.parametrize(
    "content, why",
    [
        (b"1234567", "less than a safetensors header"),
        ((1 << 40).to_bytes(8, "little") + bytes(100), "the header claims"),
        ((101).to_bytes(8, "little") + b"{}".ljust(100), "the file is cut: its header has 101"),
        ((100).to_bytes(8, "little") + b"{}".ljust(100), None),
    ],
)
def test_lengths_that_do_not_fit_are_named(
    content: bytes, why: Optional[str], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    if why is None:
        assert read_tensor_bytes(path) == {}
        return
    with pytest.raises(IntegrityError) as caught:
        read_tensor_bytes(path)
    assert why in caught.value.why


def test_a_decoder_has_its_own_layers_beside_those_of_the_encoder() -> None:
    turbo = {"num_hidden_layers": 32, "encoder_layers": 32, "decoder_layers": 4}
    facts = facts_from_config({"model_type": "whisper", "d_model": 1280, **turbo}, {})
    assert (facts.layers, facts.full_layers, facts.cross_layers) == (4, 4, 4)


BLOCKS = [
    {"attention": {"n_heads_in_group": 8}},
    {"attention": {"n_heads_in_group": 4}},
    7,
    {"attention": {"no_op": True}},
]
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 32, "hidden_size": 4096}

# What a config has beside SIZES: what the facts are then.
PARTS_OF_FACTS: Dict[str, Tuple[Dict[str, Any], Dict[str, Any]]] = {
    "no window": ({}, {"window": 0, "kv_heads": 32, "dense_layers": 0, "padded_channels": 0}),
    "a class": ({"architectures": ["A", "B"]}, {"architecture": "A"}),
    "no class": ({"architectures": []}, {"architecture": ""}),
    "Nemotron-NAS": ({"block_configs": BLOCKS}, {"kv_heads": 8, "full_layers": 2}),
    "first layers without experts": ({"first_k_dense_replace": 3}, {"dense_layers": 3}),
    "an encoder of any size": (
        {"vision_config": {"hidden_size": 8, "intermediate_size": 24, "spatial_merge_size": 2}},
        {"encoder_hidden": 8, "encoder_channels": 24, "encoder_patches": 4, "encoder_tokens": 16384},
    ),
    "merged by the whole model": (
        {"vision_config": {"hidden_size": 8}, "spatial_merge_size": 3},
        {"encoder_patches": 9, "encoder_channels": 32},
    ),
    "Gemma's inputs of each layer": (
        {"hidden_size_per_layer_input": 256},
        {"replicated": 2 * 4 * 4096 * 256},
    ),
    "Kimi-Linear": ({"model_type": "kimi_linear"}, {"padded_channels": 256}),
    "Kimi-Linear that says it": (
        {"model_type": "kimi_linear", "min_moe_intermediate_per_partition": 512},
        {"padded_channels": 512},
    ),
    "several lengths": (
        {"max_position_embeddings": 8192, "max_sequence_length": 4096},
        {"max_length": 4096},
    ),
    "quantised in the text's part": (
        {"text_config": {**SIZES, "quantization_config": {"quant_method": "awq", "bits": 4}}},
        {"quantization": Quantization("awq", 4)},
    ),
    "blocks of compressed-tensors": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"block_structure": [128, 128]}}},
            }
        },
        {"quantization": Quantization("compressed-tensors", block=(128, 128))},
    ),
    "blocks that are none": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0, -1, True]}},
        {"quantization": Quantization("fp8", block=(128,))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS_OF_FACTS)
def test_a_part_of_a_config_is_a_fact(case: str) -> None:
    parts, expected = PARTS_OF_FACTS[case]
    facts = facts_from_config({**SIZES, **parts}, {})
    assert {name: getattr(facts, name) for name in expected} == expected


@pytest.mark.parametrize("factor, length", [(4, 16384), (0.5, 2048), (1, 4096)])
def test_positions_are_stretched_by_any_factor(factor: float, length: int) -> None:
    rope = {"rope_type": "linear", "factor": factor}
    assert longest_context({"max_position_embeddings": 4096, "rope_scaling": rope}) == length
