# SPDX-License-Identifier: Apache-2.0
"""What the layers of a model keep of a request: the whole context, a window of it, or a state.

Owns how configs tell the kinds of their layers, in every dialect. Pure.
Promises: a kind of layer that nobody has heard of keeps the whole context, so that no plan counts
on memory that is not there. No loop over a number that a config claims.
"""

from __future__ import annotations

import re
from typing import Any, List, Mapping, NamedTuple, Optional

from hfship.serve.config_values import number_in, table_in

# Model types with two attentions in each layer.
_TWICE_A_LAYER = ("longcat_flash",)
# Model types of which every layer keeps a state, and those that have attention beside it.
_ALL_STATES = ("mamba", "mamba2", "falcon_mamba")
_STATES_BESIDE_ATTENTION = ("falcon_h1",)
# Names of layers, in transformers' layer_types and their like. What is none of these keeps the
# whole context.
_WINDOWED_KINDS = frozenset({"sliding_attention", "chunked_attention", "hybrid_sliding"})
_STATE_KINDS = re.compile(r"mamba|linear|conv|recurrent|rwkv|delta|ssm")
_EMPTY_KINDS = re.compile(r"moe\Z|mlp\Z")
_BOTH_KINDS = frozenset({"hybrid"})  # Zamba2: Mamba, and attention beside it


class LayerCounts(NamedTuple):
    """How many layers keep a cache of the whole context, one of a window, and a state of fixed
    size. A layer may keep two of them."""

    full: int
    windowed: int = 0
    states: int = 0


def layer_counts(text: Mapping[str, Any], layers: int) -> LayerCounts:
    """What the layers keep.

    >>> kinds = ["sliding_attention", "full_attention"]
    >>> layer_counts({"layer_types": kinds, "sliding_window": 128}, 2)
    LayerCounts(full=1, windowed=1, states=0)
    >>> layer_counts({"full_attention_interval": 4}, 48)
    LayerCounts(full=12, windowed=0, states=36)
    >>> layer_counts({"sliding_window_pattern": "LLLG", "sliding_window": 4096}, 32)
    LayerCounts(full=8, windowed=24, states=0)
    """
    return (
        _by_model_type(text, layers)
        or _by_names(text, layers)
        or _by_blocks(text)
        or _by_pattern(text)
        or _by_place(text, layers)
        or _by_window(text, layers)
    )


def _by_model_type(text: Mapping[str, Any], layers: int) -> Optional[LayerCounts]:
    """Of model types whose layers are all alike."""
    model_type = text.get("model_type")
    if model_type in _ALL_STATES:
        return LayerCounts(0, 0, layers)
    if model_type in _STATES_BESIDE_ATTENTION:
        return LayerCounts(layers, 0, layers)
    if model_type in _TWICE_A_LAYER:
        return LayerCounts(2 * layers)
    return None


def _by_names(text: Mapping[str, Any], layers: int) -> Optional[LayerCounts]:
    """Of configs that name each layer. The last ones may share the cache of others (Gemma)."""
    kinds = text.get("layer_types") or text.get("layers_block_type")
    if not isinstance(kinds, list) or not kinds:
        return None
    owned = max(0, layers - number_in(text, "num_kv_shared_layers"))
    return _counted_kinds([str(kind) for kind in kinds[:owned]], window_of(text))


def _by_blocks(text: Mapping[str, Any]) -> Optional[LayerCounts]:
    """Nemotron-NAS: some layers have no attention."""
    blocks = text.get("block_configs")
    if not isinstance(blocks, list) or not blocks:
        return None
    attentions = [table_in(block, "attention") for block in blocks if isinstance(block, dict)]
    return LayerCounts(sum(attention.get("no_op") is not True for attention in attentions))


def _by_pattern(text: Mapping[str, Any]) -> Optional[LayerCounts]:
    """Nemotron-H: * attention, M Mamba, - MLP, E experts."""
    pattern = text.get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        return None
    return LayerCounts(pattern.count("*"), 0, pattern.count("M"))


def _by_place(text: Mapping[str, Any], layers: int) -> Optional[LayerCounts]:
    """Of configs that tell where layers with attention are: the others keep a state."""
    full = _layers_named_full(text, layers)
    if full is None:
        return None
    return LayerCounts(full, 0, layers - full)


def _by_window(text: Mapping[str, Any], layers: int) -> LayerCounts:
    """Of all other configs: attention, with a window or without."""
    if not window_of(text):
        return LayerCounts(layers)
    full = _full_among_windowed(text, layers)
    return LayerCounts(full, layers - full)


def _counted_kinds(kinds: List[str], window: int) -> LayerCounts:
    """Without a window, the layers for one look at all."""
    windowed = sum(kind in _WINDOWED_KINDS for kind in kinds)
    states = sum(_STATE_KINDS.search(kind) is not None for kind in kinds)
    empty = sum(_EMPTY_KINDS.search(kind) is not None for kind in kinds)
    both = sum(kind in _BOTH_KINDS for kind in kinds)
    full = len(kinds) - windowed - states - empty
    if states == 0:
        both = 0
    if not window:
        return LayerCounts(full + windowed, 0, states + both)
    return LayerCounts(full, windowed, states + both)


def _layers_named_full(text: Mapping[str, Any], layers: int) -> Optional[int]:
    """How many layers look at the whole context, where the others keep a state; None where the
    config is not of such a model."""
    lists = (
        text.get("full_attn_idxs"),  # LFM2
        text.get("attn_layer_indices"),  # Bamba
        table_in(text, "linear_attn_config").get("full_attn_layers"),  # Kimi-Linear
    )
    for named in lists:
        if isinstance(named, list) and named:
            return min(len(named), layers)

    flags = text.get("attn_type_list")  # MiniMax-01: 0 where a layer keeps a state
    if isinstance(flags, list) and flags:
        return sum(1 for flag in flags[:layers] if flag != 0)

    interval = number_in(text, "full_attention_interval", "attn_layer_period")
    if interval:
        return layers // interval
    interval = number_in(text, "layer_group_size")
    if interval > 1:  # Ling and Ring with linear layers; the last group may be short
        return layers // interval + layers % interval
    return None


def _full_among_windowed(text: Mapping[str, Any], layers: int) -> int:
    """How many layers look at the whole context, in a model that has a window."""
    ropes = text.get("no_rope_layers")
    if isinstance(ropes, list) and ropes:
        # Llama 4: 1 where a layer has a position encoding, and looks at a chunk.
        return sum(not rope for rope in ropes[:layers])

    flags = text.get("hybrid_layer_pattern")
    if isinstance(flags, list) and flags:  # MiMo-V2: 1 where a layer looks at a window
        return sum(flag != 1 for flag in flags[:layers])

    pattern = text.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:
        # EXAONE 4: L looks at a window, G at all. No loop: a config may claim any number.
        whole, rest = divmod(layers, len(pattern))
        return whole * pattern.count("G") + pattern[:rest].count("G")

    interval = number_in(text, "no_rope_layer_interval", "sliding_window_pattern")
    if interval:
        return layers // interval
    if text.get("use_sliding_window"):
        # Qwen2 counts the full layers that come first.
        return min(layers, number_in(text, "max_window_layers"))

    return 0  # Mistral 7B, Phi-3


def window_of(text: Mapping[str, Any]) -> int:
    """Tokens that windowed layers look back; 0 when there is no window."""
    if text.get("use_sliding_window") is False:  # Qwen2 ships a window that is switched off
        return 0
    return number_in(text, "sliding_window", "attention_chunk_size", "sliding_window_size")
