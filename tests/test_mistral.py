"""params.json in the words of config.json: what each part of it becomes."""

from __future__ import annotations

from typing import Any, Dict

import pytest

from hfship.serve.mistral import config_from_params

BASE = {"dim": 4096, "n_layers": 4, "n_heads": 32}
VISION = {"hidden_size": 1024, "num_hidden_layers": 24}
SPEECH = {"dim": 1280, "n_layers": 32, "hidden_dim": 5120, "n_heads": 20}

PARTS: Dict[str, Any] = {
    "plain": ({}, {"rope_scaling": None, "quantization_config": None, "model_type": "mistral"}),
    "yarn": (
        {"yarn": {"factor": 4}},
        {"rope_scaling": {"factor": 4, "rope_type": "yarn"}},
    ),
    "experts": (
        {
            "moe": {
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "expert_hidden_dim": 512,
                "first_k_dense_replace": 3,
            }
        },
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 512,
            "first_k_dense_replace": 3,
        },
    ),
    "fp8": (
        {"quantization": {"qformat_weight": "fp8_e4m3"}},
        {"quantization_config": {"quant_method": "fp8"}},
    ),
    "another quantisation": (
        {"quantization": {"quant_method": "compressed-tensors", "bits": 4}},
        {"quantization_config": {"quant_method": "compressed-tensors", "bits": 4}},
    ),
    "mamba": ({"model_type": "mamba"}, {"model_type": "mamba2"}),
    "a list of windows": (
        {"sliding_window": [None, 1024], "n_layers": 4},
        {"sliding_window": 1024, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "windows of several sizes": (
        {"sliding_window": [512, 1024, None, -1]},
        {"sliding_window": 1024},
    ),
    "windows of no size": ({"sliding_window": [None, -1, 0]}, {"sliding_window": None}),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_becomes_that_of_config_json(case: str) -> None:
    params, expected = PARTS[case]
    config = config_from_params({**BASE, **params})
    assert {key: config.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "params",
    [{"vision_encoder": VISION}, {"multimodal": {"vision_encoder_args": VISION}}],
)
def test_an_encoder_of_images_is_beside_the_text(params: Dict[str, Any]) -> None:
    quantized = {"quantization": {"qformat_weight": "fp8_e4m3"}}
    config = config_from_params({**BASE, **params, **quantized})
    assert (config["model_type"], config["vision_config"]) == ("pixtral", VISION)
    assert config["quantization_config"] == {"quant_method": "fp8"}
    assert config["text_config"]["hidden_size"] == 4096
    assert "quantization_config" not in config_from_params({**BASE, **params})


@pytest.mark.parametrize(
    "causal, architecture",
    [(True, "VoxtralRealtimeGeneration"), (False, "VoxtralForConditionalGeneration")],
)
def test_an_encoder_of_speech_is_beside_the_text(causal: bool, architecture: str) -> None:
    encoder = {**SPEECH, "causal": causal}
    config = config_from_params(
        {**BASE, "multimodal": {"whisper_model_args": {"encoder_args": encoder}}}
    )
    assert config["architectures"] == [architecture]
    assert config["model_type"] == "voxtral"
    assert config["audio_config"] == {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_ffn_dim": 5120,
        "encoder_attention_heads": 20,
    }
