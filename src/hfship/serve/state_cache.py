# SPDX-License-Identifier: Apache-2.0
"""The cache of requests as vLLM cuts it up: blocks, groups of layers, and the states of Mamba,
gated delta nets and linear attention.

Owns the size of a state (in every dialect of the configs), and how many bytes and blocks a request
takes. One pool of blocks serves all layers: they are put into groups of equal size, and a request
takes blocks of each group,

    full attention      one for each `block` tokens
    windows             for the window and the batches that are in flight, and one more
    states              at most 3: the state, one to come, one kept for prefixes

(vllm/v1/core/kv_cache_utils.py: _get_kv_cache_groups_uniform_page_size and
_get_packed_kv_cache_groups; vllm/v1/kv_cache_interface.py; vllm/platforms/interface.py:
_align_hybrid_block_size; vllm/model_executor/layers/mamba/mamba_utils.py; all of 0.32.)
Promises: pure; sizes in bytes, lengths in tokens.
"""

from __future__ import annotations

from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

from hfship.base.values import dataclass
from hfship.serve.config_values import number_in, table_in

PLAIN_BLOCK = 16  # tokens of a block, where no layer keeps a state
LATENT_BLOCK = 128  # tokens; the blocks of MLA beside states are a multiple of this
# Blocks that a request takes of a group of states; Mamba 2 keeps one more for prefixes.
STATE_BLOCKS, MAMBA2_BLOCKS = 2, 3
# Where one kind of layers has less than this times the layers of the other, groups are as large as
# the larger.
_NEARLY_EQUAL = 1.5

# Bytes of blocks of DeepSeek V4: 64 entries of the context, of its indexer, and two entries.
V4_ENTRIES, V4_INDEX, V4_PAIR = 37440, 8640, 1728

_FLOAT32 = ("float32", "float")


@dataclass(frozen=True)
class State:
    """What a layer keeps of a request: the last inputs of a convolution, and a recurrent state.

    `channels` are divided over the GPUs; the `shared` ones of each of `groups` too, where that
    comes out even, else each GPU has those of its heads. `recurrent` counts values, divided too.
    """

    channels: int = 0
    groups: int = 0
    shared: int = 0
    kept: int = 0  # inputs that the convolution looks back
    recurrent: int = 0
    recurrent_width: int = 0  # bytes per value; 0: as the model computes
    heads: Tuple[int, ...] = ()  # that are divided over the GPUs, none of them in parts
    blocks: int = STATE_BLOCKS

    def size(self, tp: int, width: float) -> int:
        """Bytes on each of `tp` GPUs. `width`: bytes per value of the model."""
        groups = self.groups
        if groups % tp:
            groups += tp - groups % tp
        convolved = self.channels + groups * self.shared
        wide = self.recurrent_width or width
        return int(
            divide_up(convolved, tp) * self.kept * width + divide_up(self.recurrent, tp) * wide
        )


def state_of(text: Mapping[str, Any]) -> State:
    """The state that layers without attention keep, in the dialects of the families.

    >>> granite = {"mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128}
    >>> state_of(granite).size(1, 2)
    2147840
    >>> lfm2 = {"conv_L_cache": 3, "hidden_size": 2048}
    >>> state_of(lfm2).size(1, 2)
    8192
    """
    return _delta_net(text) or _short_convolution(text) or _mamba(text) or _linear(text)


def _delta_net(text: Mapping[str, Any]) -> Optional[State]:
    """Gated delta nets: Qwen3-Next and later, OLMo-Hybrid."""
    kimi = table_in(text, "linear_attn_config")
    if kimi:
        return _kimi_delta(kimi)
    key_dim = number_in(text, "linear_key_head_dim")
    keys = number_in(text, "linear_num_key_heads") * key_dim
    heads = number_in(text, "linear_num_value_heads")
    values = heads * number_in(text, "linear_value_head_dim")
    if not values:
        return None
    kernel = number_in(text, "linear_conv_kernel_dim") or 4
    width = _width_of(text.get("mamba_ssm_dtype"))
    return State(
        channels=2 * keys + values,
        kept=kernel - 1,
        recurrent=values * key_dim,
        recurrent_width=width,
        heads=(heads, number_in(text, "linear_num_key_heads")),
    )


def _kimi_delta(kimi: Mapping[str, Any]) -> State:
    """Kimi's delta attention: its state is in float32."""
    head_dim = number_in(kimi, "head_dim")
    values = number_in(kimi, "num_heads") * head_dim
    kernel = number_in(kimi, "short_conv_kernel_size") or 4
    return State(
        channels=3 * values,
        kept=kernel - 1,
        recurrent=values * head_dim,
        recurrent_width=4,
        heads=(number_in(kimi, "num_heads"),),
    )


def _short_convolution(text: Mapping[str, Any]) -> Optional[State]:
    """LFM2."""
    kernel = number_in(text, "conv_L_cache")
    if not kernel:
        return None
    channels = number_in(text, "conv_dim") or number_in(text, "hidden_size")

    return State(channels, kept=kernel - 1)


def _mamba(text: Mapping[str, Any]) -> Optional[State]:
    """Mamba 2, and Mamba 1, which has no heads."""
    size = number_in(text, "ssm_state_size", "mamba_d_state", "state_size")
    if not size:
        return None
    heads = number_in(text, "mamba_num_heads", "mamba_n_heads", "n_mamba_heads")
    if text.get("model_type") == "mamba2":
        heads = number_in(text, "num_heads")
    inner = _mamba_channels(text, heads)
    kept = (number_in(text, "conv_kernel", "mamba_d_conv") or 4) - 1
    if not heads:
        return State(inner, kept=kept, recurrent=inner * size)

    width = 0
    if text.get("model_type") == "nemotron_h":
        width = _width_of(text.get("mamba_ssm_cache_dtype") or "float32")
    return State(
        channels=inner,
        groups=number_in(text, "mamba_n_groups", "mamba_ngroups", "n_groups") or 1,
        shared=2 * size,
        kept=kept,
        recurrent=inner * size,
        recurrent_width=width,
        heads=(heads,),
        blocks=MAMBA2_BLOCKS,
    )


def _mamba_channels(text: Mapping[str, Any], heads: int) -> int:
    """Channels inside a Mamba layer."""
    model_type = text.get("model_type")
    if model_type in ("mamba", "falcon_mamba"):
        return number_in(text, "intermediate_size")
    head_dim = number_in(
        text, "mamba_head_dim", "mamba_d_head", "mamba_headdim", "hidden_size_per_head"
    )
    if model_type == "mamba2":
        head_dim = number_in(text, "head_dim")
    if heads * head_dim:
        return heads * head_dim
    expand = number_in(text, "mamba_expand", "expand") or 2
    return number_in(text, "mamba_d_ssm") or expand * number_in(text, "hidden_size")


def _linear(text: Mapping[str, Any]) -> State:
    """Linear attention, and the guess where a config says nothing else: a matrix for each head."""
    heads = number_in(text, "num_attention_heads")
    head_dim = number_in(text, "head_dim")
    if heads and not head_dim:
        head_dim = number_in(text, "hidden_size") // heads

    recurrent = heads * head_dim * head_dim
    return State(recurrent=recurrent, recurrent_width=4)


def _width_of(dtype: object) -> int:
    """Bytes per value of a type that a config names, 0 for none."""
    if not isinstance(dtype, str):
        return 0
    if dtype in _FLOAT32:
        return 4
    return 2


@dataclass(frozen=True)
class Kept:
    """What the layers of a model keep on a GPU: how many there are of each kind, and bytes of a
    token in one of them.

    `state` is the bytes of a state; `latent` says that attention keeps MLA's latent.
    """

    full: int = 0
    full_token: int = 0
    windowed: int = 0
    window_token: int = 0
    window: int = 0
    states: int = 0
    state: int = 0
    state_blocks: int = STATE_BLOCKS
    latent: bool = False
    beside: int = 0  # bytes of a token in all layers, of caches beside attention
    cross: int = 0  # layers of a decoder that keep what the encoder made
    stages: int = 1  # of the pipeline: each has its share of the layers


class Windows(NamedTuple):
    """Groups of layers that keep a window of a request, in blocks of so many tokens."""

    groups: int
    window: int
    block: int

    def blocks_of(self, tokens: int, in_flight: int) -> int:
        """Blocks for a request of so many tokens, with `in_flight` tokens of batches."""
        seen = min(self.window - 1 + in_flight, tokens)

        return self.groups * (divide_up(seen, self.block) + 1)


@dataclass(frozen=True)
class Pool:
    """The blocks that requests take, of all groups of layers."""

    bytes: int  # of a block, for all layers of a group
    block: int  # tokens that it holds
    layers: int  # of a group, on each GPU
    full_groups: int = 0
    windows: Tuple[Windows, ...] = ()
    state_groups: int = 0
    state_blocks: int = 0
    cross_groups: int = 0

    def blocks_of(self, tokens: int, in_flight: int, encoded: int = 0) -> int:
        """Blocks that a request of so many tokens takes, with `in_flight` tokens of batches, and
        `encoded` tokens of an encoder.

        (CrossAttentionSpec in vllm/v1/kv_cache_interface.py: of the encoder, room for a batch.)
        """
        blocks = self.cross_groups * divide_up(encoded, self.block)
        blocks += self.full_groups * divide_up(tokens, self.block)
        blocks += self.state_groups * self.state_blocks
        for windows in self.windows:
            blocks += windows.blocks_of(tokens, in_flight)

        return blocks

    def request(self, tokens: int, in_flight: int, encoded: int = 0) -> int:
        """Bytes that a request takes."""
        return self.bytes * self.blocks_of(tokens, in_flight, encoded)

    def most_states(self, budget: int) -> int:
        """How many requests can run at a time with `budget` bytes, where layers keep states: vLLM
        wants a block for each. 0 where none does, and where nobody knows how large a block is.

        (vllm/config/compilation.py: "exceeds available Mamba cache blocks".)
        """
        if not self.state_groups or not self.bytes:
            return 0
        return max(0, budget // self.bytes - 1)  # one block is never given out


def pool_of(kept: Kept) -> Pool:
    """How the layers share blocks."""
    if not kept.full and not kept.windowed:
        return _pool_of_states(kept)

    block = _tokens_of_block(kept)
    page = block * (kept.full_token or kept.window_token)
    if kept.full and kept.windowed and kept.window_token != kept.full_token:
        return _packed(kept, block)

    size = _group_size([kept.full, kept.windowed, kept.states])

    return Pool(
        bytes=divide_up(size, kept.stages) * page + block * divide_up(kept.beside, kept.stages),
        block=block,
        layers=divide_up(size, kept.stages),
        full_groups=divide_up(kept.full, size),
        windows=_windows(divide_up(kept.windowed, size), kept.window, block),
        state_groups=divide_up(kept.states, size),
        state_blocks=kept.state_blocks,
        cross_groups=divide_up(kept.cross, size),
    )


def _windows(groups: int, window: int, block: int) -> Tuple[Windows, ...]:
    if not groups:
        return ()
    return (Windows(groups, window, block),)


def _pool_of_states(kept: Kept) -> Pool:
    """Where no layer has attention, a request takes one block, and no length makes it more."""
    layers = divide_up(kept.states, kept.stages)
    size = layers * kept.state
    return Pool(size, 1, layers, state_groups=min(1, size), state_blocks=1)


def _tokens_of_block(kept: Kept) -> int:
    """Where layers keep states, a block of attention is as large as a state, or larger."""
    token = kept.full_token or kept.window_token
    if not kept.states or not token:
        return PLAIN_BLOCK
    step = PLAIN_BLOCK
    if kept.latent:
        step = LATENT_BLOCK
    return max(PLAIN_BLOCK, step * divide_up(kept.state, step * token))


def _packed(kept: Kept, block: int) -> Pool:
    """Blocks of different sizes: the full layers are one group, and the others fill its blocks."""
    full = divide_up(kept.full, kept.stages)
    windowed = divide_up(kept.windowed, kept.stages)
    states = divide_up(kept.states, kept.stages)
    page = max(1, block * kept.full_token)
    window_page = max(1, block * kept.window_token)
    size = max(full * page, window_page)
    return Pool(
        bytes=size,
        block=block,
        layers=full,
        full_groups=1,
        windows=_windows(divide_up(windowed, size // window_page), kept.window, block),
        state_groups=divide_up(states, size // page),
        state_blocks=kept.state_blocks,
    )


def compressed_pool(layers: int, by_four: int, by_128: int, stages: int = 1) -> Pool:
    """The blocks of DeepSeek V4, which compresses the context of a layer by 4 or by 128.

    A block of 256 tokens has for each layer by 4 its 64 entries and those of its indexer, and for
    each by 128 its two. All layers keep a window of 128 as it is, and what is being compressed.
    (vllm/models/deepseek_v4: attention.py, compressor.py, of 0.32; sizes with their padding.)

    >>> compressed_pool(43, 21, 20).request(131072, 2 * 8192)
    7210114560
    """
    by_four, by_128 = divide_up(by_four, stages), divide_up(by_128, stages)
    size = max(by_four * (V4_ENTRIES + V4_INDEX) + by_128 * V4_PAIR, V4_ENTRIES)
    plain = divide_up(divide_up(layers, stages), size // V4_ENTRIES)
    return Pool(
        bytes=size,
        block=256,
        layers=by_four + by_128,
        full_groups=1,
        windows=(
            Windows(plain, 128, 64),
            Windows(min(1, by_four), 8, 4),
            Windows(min(1, by_128), 128, 8),
        ),
    )


def _group_size(layers: List[int]) -> int:
    """How many layers a group has, of kinds with so many layers each.

    >>> _group_size([10, 52]), _group_size([13, 12]), _group_size([36, 0])
    (10, 13, 36)
    """
    counts = [count for count in layers if count]
    least, most = min(counts, default=1), max(counts, default=1)
    if most < least * _NEARLY_EQUAL:
        return most

    return least


def divide_up(number: int, divisor: int) -> int:
    """The quotient, rounded up.

    >>> divide_up(64, 64), divide_up(65, 64)
    (1, 2)
    """
    return -(-number // divisor)
