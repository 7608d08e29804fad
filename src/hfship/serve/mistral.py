# SPDX-License-Identifier: Apache-2.0
"""Mistral's own layout of a model: params.json, consolidated*.safetensors, tekken.json.

Owns how params.json tells what config.json tells elsewhere, as vLLM reads it
(vllm/transformers_utils/configs/mistral.py), and when vLLM must be told that a model is so laid
out: by itself it goes by config.json, and by consolidated*.safetensors, which a fetch leaves out
where the same weights lie beside them. Pure.
"""

from __future__ import annotations

from typing import AbstractSet, Any, Dict, List, Mapping

from hfship.serve.config_values import number_in, table_in

PARAMS = "params.json"
TEKKEN = "tekken.json"
UNTOLD_LENGTH = 128_000  # tokens, where params.json tells none

# Mistral's key -> that of config.json.
_KEYS: Mapping[str, str] = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "expand": "expand",
    "n_groups": "n_groups",
}
_KEYS_OF_EXPERTS: Mapping[str, str] = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
}
_KEYS_OF_AUDIO: Mapping[str, str] = {
    "dim": "d_model",
    "n_layers": "encoder_layers",
    "hidden_dim": "encoder_ffn_dim",
    "n_heads": "encoder_attention_heads",
}


def is_consolidated(name: str) -> bool:
    """Whether a file has weights as Mistral lays them out.

    >>> is_consolidated("consolidated-00001-of-00002.safetensors"), is_consolidated("model.bin")
    (True, False)
    """
    return name.startswith("consolidated") and name.endswith(".safetensors")


def has_own_layout(names: AbstractSet[str]) -> bool:
    """Whether a folder has only Mistral's own weights: then vLLM reads params.json, too."""
    consolidated = any(is_consolidated(name) for name in names)
    others = [name for name in names if name.endswith(".safetensors") and not is_consolidated(name)]
    return PARAMS in names and consolidated and not others


def needs_own_tokenizer(names: AbstractSet[str]) -> bool:
    """Whether vLLM must take Mistral's tokenizer: with the own layout, and where there is no other.

    >>> needs_own_tokenizer({"tekken.json"}), needs_own_tokenizer({"tekken.json", "tokenizer.json"})
    (True, False)
    """
    others = names & {"tokenizer.json", "tokenizer.model"}
    return TEKKEN in names and (not others or has_own_layout(names))


def config_from_params(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json would tell.

    >>> pixtral = {"dim": 5120, "n_layers": 40, "vision_encoder": {"hidden_size": 1024}}
    >>> config = config_from_params(pixtral)
    >>> config["architectures"], config["text_config"]["hidden_size"]
    (['PixtralForConditionalGeneration'], 5120)
    """
    text: Dict[str, Any] = dict(params)
    for key, name in _KEYS.items():
        if key in params:
            text[name] = params[key]
    text["max_position_embeddings"] = _length(params)
    text.update(_window(params))
    yarn = table_in(params, "yarn")
    if yarn:
        text["rope_scaling"] = {**yarn, "rope_type": "yarn"}
    experts = table_in(params, "moe")
    for key, name in _KEYS_OF_EXPERTS.items():
        if key in experts:
            text[name] = experts[key]
    quantization = quantization_in(params)
    if quantization:
        text["quantization_config"] = quantization

    text["architectures"] = [_architecture(params)]
    text["model_type"] = "mistral"
    if params.get("model_type") == "mamba":
        text["model_type"] = "mamba2"

    return _with_encoder(text, params)


def _length(params: Mapping[str, Any]) -> int:
    stated = number_in(params, "max_position_embeddings")
    return stated or number_in(params, "max_seq_len") or UNTOLD_LENGTH


def _architecture(params: Mapping[str, Any]) -> str:
    """The class that vLLM takes for the language model."""
    experts = table_in(params, "moe")
    if params.get("model_type") == "mamba":
        return "Mamba2ForCausalLM"
    if number_in(experts, "num_shared_experts"):
        return "MistralLarge3ForCausalLM"
    if experts:
        return "MixtralForCausalLM"
    return "MistralForCausalLM"


def _window(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """A window for all layers, or a list of windows that repeats, null for a layer without one."""
    windows = params.get("sliding_window")
    if not isinstance(windows, list):
        return {}
    sizes: List[int] = [size for size in windows if type(size) is int and size > 0]
    if not sizes:
        return {"sliding_window": None}
    repeats = min(number_in(params, "n_layers"), 10_000) // len(windows)
    kinds = ["full_attention" if size is None else "sliding_attention" for size in windows]
    return {"sliding_window": max(sizes), "layer_types": kinds * repeats}


def quantization_in(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """What quantization_config would say; {} for nothing.

    >>> quantization_in({"quantization": {"qformat_weight": "fp8_e4m3"}})
    {'quant_method': 'fp8'}
    """
    quantization = table_in(params, "quantization")
    if quantization.get("qformat_weight") == "fp8_e4m3":
        return {"quant_method": "fp8"}
    return quantization


def _with_encoder(text: Dict[str, Any], params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a model with an encoder of images or of speech, or of the text alone."""
    multimodal = table_in(params, "multimodal")
    vision = table_in(multimodal, "vision_encoder_args") or table_in(params, "vision_encoder")
    speech = table_in(table_in(multimodal, "whisper_model_args"), "encoder_args")
    config: Dict[str, Any] = {"text_config": text}
    if "quantization_config" in text:
        config["quantization_config"] = text["quantization_config"]
    if vision:
        config["architectures"] = ["PixtralForConditionalGeneration"]
        return {**config, "model_type": "pixtral", "vision_config": vision}
    if speech:
        causal = speech.get("causal") is True
        name = "VoxtralRealtimeGeneration" if causal else "VoxtralForConditionalGeneration"
        audio = {new: speech[old] for old, new in _KEYS_OF_AUDIO.items() if old in speech}
        config["architectures"] = [name]
        return {**config, "model_type": "voxtral", "audio_config": audio}

    return text
