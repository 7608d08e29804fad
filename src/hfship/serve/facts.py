# SPDX-License-Identifier: Apache-2.0
"""Facts of a model: what serving must know about it.

Owns how config.json is read, as vLLM and transformers read it: shape, precision, quantisation,
context length. Pure: the folder is read by serve/model_folder.
Promises: no config breaks it; what a config does not tell is 0 or empty.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

from hfship.base.values import dataclass
from hfship.serve.config_values import number_in, table_in, word_in
from hfship.serve.layers import layer_counts, window_of
from hfship.serve.state_cache import State, state_of

# safetensors' names of the types that vLLM can compute in.
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

# What a config leaves out when it equals its model type's default; vLLM fills it in from
# transformers' classes.
_TYPE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"head_dim": 256, "sliding_window_pattern": 2, "max_position_embeddings": 8192},
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072, "sliding_window_pattern": 6,
    },
    "llama": {
        "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
        "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "llama4_text": {"no_rope_layer_interval": 4},
    "mistral": {
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
    },
    "qwen2": {
        "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
        "intermediate_size": 22016, "vocab_size": 151936,
    },
}  # fmt: skip

# The keys under which vLLM looks for the context length, the smallest wins (vllm/config:
# _get_and_verify_max_len).
_LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length",
    "max_sequence_length", "max_seq_length", "seq_len", "max_target_positions",
)  # fmt: skip
_KV_HEAD_KEYS = (
    "n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num",
    "num_attention_groups",
)  # fmt: skip
# Model types with a latent that vLLM expands: it runs them with ordinary attention.
_LATENT_AS_PLAIN = ("minicpm3",)
# Rope types whose max_position_embeddings is already the stretched length.
_ROPE_ALREADY_SCALED = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
)
# Encoders of images whose heads vLLM 0.32 divides: modules with dist_utils.divide(num_heads, tp).
_SPLIT_VISION = re.compile(
    r"qwen|glm|siglip|clip|pixtral|mistral3|moonvit|kimi|dots|ernie|exaone|isaac|aimv2|blip"
    r"|onevision|mimo|pangu|paddle|idefics|llama4|llava|paligemma|gemma3\Z"
)
_LONGROPE = ("longrope", "su")  # the older name
SCALE_BYTES = 4  # of the keys of an indexer in FP8
LARGEST_IMAGE = 16384  # tokens, as the processors of Qwen-VL and its kin allow by themselves
MOST_LENGTH = 2**31  # tokens; what a config says beyond that is no length
# The most that is taken for true: some hundred times what the largest models of 2026 have.
_BELIEVED: Mapping[str, int] = {
    "layers": 10_000, "heads": 100_000, "kv_heads": 100_000, "head_dim": 1 << 20,
    "mla_dim": 1 << 20, "hidden": 1 << 24, "intermediate": 1 << 26,
    "moe_intermediate": 1 << 26, "experts": 1 << 20, "experts_per_token": 1 << 16,
    "vocab": 1 << 28, "value_dim": 1 << 20, "window_kv_heads": 100_000,
    "encoder_hidden": 1 << 24, "encoder_channels": 1 << 26, "encoder_patches": 1 << 16,
    "indexer_bytes": 1 << 30, "window_head_dim": 1 << 20, "window_value_dim": 1 << 20,
    "state_layers": 10_000,
}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised.

    `group`: input channels per scale (AWQ, GPTQ); `block`: rows x columns per scale (FP8).
    """

    method: str
    bits: int = 0
    group: int = 0
    block: Tuple[int, ...] = ()
    fp8_kv_cache: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What serving needs to know about a model. A number that the model does not tell is 0."""

    architecture: str
    model_type: str
    layers: int
    full_layers: int  # attention over the whole context
    window_layers: int  # attention over the last `window` tokens
    window: int
    heads: int
    kv_heads: int
    head_dim: int
    mla_dim: int  # latent KV values per token and layer (DeepSeek's MLA); 0: ordinary attention
    hidden: int
    intermediate: int
    moe_intermediate: int
    experts: int
    experts_per_token: int
    vocab: int
    dtype: str
    max_length: int  # tokens
    weight_bytes: int
    quantization: Optional[Quantization] = None
    remote_code: Tuple[str, ...] = ()  # classes of auto_map
    chat_template: bool = True
    embeds: bool = False  # answers /v1/embeddings, not completions
    pickled: bool = False  # weights are pickles: loading them can run code
    own_layout: bool = False  # Mistral's: params.json, consolidated*.safetensors
    own_tokenizer: bool = False  # Mistral's tekken.json alone
    tiktoken: bool = False  # brings the encodings that gpt-oss needs offline
    stretched_length: int = 0  # tokens, as vLLM before 0.30 derives them
    sparse: bool = False  # attention by an indexer (DeepSeek's DSA)
    # vLLM's parsers for what it writes, the best first (serve/clients.py).
    tool_parsers: Tuple[str, ...] = ()
    reasoning_parsers: Tuple[str, ...] = ()
    indexer_bytes: int = 0  # of a token, in the indexers of all layers together
    compressed: Tuple[int, int] = (0, 0)  # layers of DeepSeek V4 by 4 and by 128
    value_dim: int = 0  # values per head; 0: as many as head_dim
    window_kv_heads: int = 0  # of layers with a window; 0: as the others
    window_head_dim: int = 0  # keys per head there; 0: as the others
    window_value_dim: int = 0
    vision_heads: int = 0  # of an encoder of images that is split like the rest
    vision_intermediate: int = 0
    encoder_hidden: int = 0  # of an encoder of images, split or not
    encoder_channels: int = 0
    encoder_patches: int = 0  # that become one token
    encoder_tokens: int = 0  # of the largest image, where one image may be so large
    dense_layers: int = 0  # that come before those with experts
    padded_channels: int = 0  # of an expert on a GPU, at least: they are padded to it; 0: never
    replicated: int = 0  # values that every GPU holds, however many there are
    original_length: int = 0  # tokens, before longrope stretched them: what vLLM takes by itself
    state_layers: int = 0  # keep a state of fixed size (Mamba, linear attention)
    state: State = State()
    cross_layers: int = 0  # of a decoder, that look at what an encoder made
    # How a version of vLLM holds it: see serve/fit.as_loaded.
    batches: int = 1  # in flight at a time
    finer_blocks: bool = False  # FP8 blocks of experts are made finer where a split cuts them
    states_limit: bool = False  # no more requests at a time than blocks for their states


def facts_from_config(config: Mapping[str, Any], tensors: Mapping[str, int]) -> ModelFacts:
    """The facts that config.json tells, and the bytes per dtype of the weights."""
    text = text_config(config)
    # Of an encoder and a decoder, num_hidden_layers are those of the encoder.
    decoder = number_in(text, "decoder_layers")
    layers = decoder or number_in(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = number_in(text, "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads")
    hidden = number_in(text, "hidden_size", "n_embd", "d_model")
    intermediate = number_in(
        text, "intermediate_size", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"
    )
    kinds = layer_counts(text, layers)
    window = 0
    if kinds.windowed:
        window = window_of(text)
    state = State()
    if kinds.states:
        state = state_of(text)
    head_dim = head_dim_of(text, hidden, heads)
    kv_heads = kv_heads_of(text, heads)
    windowed = _window_shape(text, kv_heads, head_dim)
    vision = _split_vision(config)
    encoder = _image_encoder(config)
    return ModelFacts(
        architecture=architecture_of(config, text),
        model_type=word_in(config.get("model_type")),
        layers=layers,
        full_layers=kinds.full,
        window_layers=kinds.windowed,
        window=window,
        heads=heads,
        kv_heads=number_in(text, "num_global_key_value_heads") or kv_heads,
        head_dim=number_in(text, "global_head_dim") or head_dim,
        mla_dim=latent_values(text),
        hidden=hidden,
        intermediate=intermediate or 4 * hidden,
        moe_intermediate=number_in(text, "moe_intermediate_size"),
        experts=number_in(text, "num_local_experts", "num_experts", "n_routed_experts"),
        experts_per_token=number_in(
            text, "num_experts_per_tok", "num_experts_per_token", "experts_per_token"
        ),
        vocab=number_in(text, "vocab_size"),
        dtype=dtype_of(config, text, tensors),
        max_length=longest_context(text),
        stretched_length=longest_context(text, yarn_stretches=True),
        sparse=number_in(text, "index_topk") > 0,
        vision_heads=number_in(vision, "num_heads", "num_attention_heads", "attention_heads"),
        vision_intermediate=number_in(vision, "intermediate_size"),
        encoder_hidden=encoder.hidden,
        encoder_channels=encoder.channels,
        encoder_patches=encoder.patches,
        encoder_tokens=encoder.tokens,
        dense_layers=number_in(text, "first_k_dense_replace"),
        padded_channels=_padded_channels(text),
        replicated=_replicated_values(config, text, layers, hidden),
        original_length=unstretched_length(text),
        indexer_bytes=indexer_bytes(text, layers),
        compressed=_compressed_layers(text, layers),
        value_dim=_value_dim(text, "v_head_dim"),
        window_kv_heads=windowed.kv_heads,
        window_head_dim=windowed.head_dim,
        window_value_dim=_value_dim(text, "swa_v_head_dim"),
        state_layers=kinds.states,
        state=state,
        cross_layers=decoder,
        weight_bytes=sum(tensors.values()),
        quantization=quantization_of(config),
        remote_code=remote_classes(config),
    )


def unbelievable(facts: ModelFacts) -> str:
    """Which number no model has, "" when all may be: no memory is reckoned with such a number.

    >>> config = {"num_hidden_layers": 10**17, "num_attention_heads": 8}
    >>> unbelievable(facts_from_config(config, {}))
    'layers: 100000000000000000, and 10000 is the most that is believed'
    """
    for name, most in _BELIEVED.items():
        number = getattr(facts, name)
        if number > most:
            return f"{name}: {number}, and {most} is the most that is believed"

    return ""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model, completed by its type's defaults.

    >>> text_config({"text_config": {"model_type": "llama4_text", "head_dim": None}})
    {'no_rope_layer_interval': 4, 'model_type': 'llama4_text'}
    """
    keys = ("text_config", "llm_config", "language_config", "thinker_config")
    part = table_in(config, *keys) or config
    part = table_in(part, "text_config") or part  # inside thinker_config once more
    model_type = str(part.get("model_type"))
    described: Dict[str, Any] = dict(_TYPE_DEFAULTS.get(model_type, {}))
    for key, value in part.items():
        if value is not None:
            described[key] = value

    return described


def architecture_of(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The class of the model, "" when the config names none."""
    names = config.get("architectures") or text.get("architectures")
    if isinstance(names, list) and names:
        return word_in(names[0])
    return ""


def kv_heads_of(text: Mapping[str, Any], heads: int) -> int:
    """How many heads have keys and values of their own: as many as heads, where nothing is said.

    >>> falcon = {"model_type": "falcon", "multi_query": True}
    >>> kv_heads_of({"attn_config": {"kv_n_heads": 8}}, 48), kv_heads_of(falcon, 71)
    (8, 1)
    """
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        return 1  # Falcon 7B
    nested = number_in(table_in(text, "attn_config"), "kv_n_heads")  # DBRX, MPT
    return nested or number_in(text, *_KV_HEAD_KEYS) or _most_heads_of_blocks(text, heads)


def _most_heads_of_blocks(text: Mapping[str, Any], heads: int) -> int:
    """Nemotron-NAS: how many heads share keys and values differs from block to block."""
    sharing = []
    blocks = text.get("block_configs")
    if isinstance(blocks, list):
        tables = [table_in(block, "attention") for block in blocks if isinstance(block, dict)]
        sharing = [number_in(table, "n_heads_in_group") for table in tables]
    return heads // min((count for count in sharing if count), default=1)


def head_dim_of(text: Mapping[str, Any], hidden: int, heads: int) -> int:
    """Values per attention head; 0 where the config does not tell."""
    head_dim = number_in(text, "head_dim", "attention_head_dim")
    if text.get("model_type") in _LATENT_AS_PLAIN:
        plain = number_in(text, "qk_nope_head_dim")
        rotary = number_in(text, "qk_rope_head_dim")
        head_dim = plain + rotary
    if head_dim or not heads:
        return head_dim
    return hidden // heads


def _vision_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of its encoder of images."""
    thinker = table_in(config, "thinker_config")
    return table_in(config, "vision_config", "vision_encoder") or table_in(thinker, "vision_config")


def _split_vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The encoder of images, where vLLM divides it over the GPUs. (Others, Gemma 4's and InternViT
    say, run whole on each where heads do not divide.)"""
    vision = _vision_of(config)
    kind = word_in(vision.get("model_type")) or word_in(config.get("model_type"))
    if _SPLIT_VISION.search(kind):
        return vision

    return {}


class _Encoder(NamedTuple):
    hidden: int
    channels: int
    patches: int
    tokens: int


def _image_encoder(config: Mapping[str, Any]) -> _Encoder:
    """What the encoder of images works with: patches of images become tokens, several each.

    >>> gemma3 = {"hidden_size": 1152, "image_size": 896, "patch_size": 14}
    >>> _image_encoder({"vision_config": gemma3, "mm_tokens_per_image": 256})
    _Encoder(hidden=1152, channels=4608, patches=16, tokens=0)
    """
    vision = _vision_of(config)
    hidden = number_in(vision, "hidden_size", "embed_dim")
    channels = number_in(vision, "intermediate_size") or 4 * hidden
    merged = number_in(vision, "spatial_merge_size") or number_in(config, "spatial_merge_size")
    if merged:  # images of any size, of which one may fill the largest batch
        return _Encoder(hidden, channels, merged * merged, LARGEST_IMAGE)
    side = number_in(vision, "image_size") // max(1, number_in(vision, "patch_size"))
    per_image = number_in(config, "mm_tokens_per_image") or side * side
    return _Encoder(hidden, channels, max(1, side * side // max(1, per_image)), 0)


def _replicated_values(
    config: Mapping[str, Any], text: Mapping[str, Any], layers: int, hidden: int
) -> int:
    """Values of weights that every GPU holds: MLA's projections to the latent, encoders of audio,
    and of images where vLLM does not divide them, Gemma's inputs of each layer, and what stands at
    both ends of whisper.

    >>> audio = {"encoder_layers": 32, "d_model": 1280, "encoder_ffn_dim": 5120}
    >>> _replicated_values({"audio_config": audio}, {}, 0, 0)
    629145600
    """
    ranks = number_in(text, "q_lora_rank") + number_in(text, "kv_lora_rank")
    projections = layers * hidden * (ranks + number_in(text, "qk_rope_head_dim"))
    part = table_in(config, "thinker_config") or config
    audio = table_in(part, "audio_config", "audio_encoder_config")
    width = number_in(audio, "d_model", "hidden_size")
    channels = number_in(audio, "encoder_ffn_dim", "intermediate_size")
    blocks = number_in(audio, "encoder_layers", "num_hidden_layers")
    values = projections + blocks * (4 * width * width + 2 * width * channels)
    values += 2 * layers * hidden * number_in(text, "hidden_size_per_layer_input")
    if text.get("model_type") == "whisper":
        values += _whisper_ends(text)
    if not _split_vision(config):
        vision = _vision_of(config)
        encoder = _image_encoder(config)
        depth = number_in(vision, "num_hidden_layers", "depth")
        values += depth * encoder.hidden * (4 * encoder.hidden + 3 * encoder.channels)
    return values


def _whisper_ends(text: Mapping[str, Any]) -> int:
    """Values of whisper's vocabulary, positions and two convolutions of width 3, all plain layers.

    (vllm/model_executor/models/whisper.py.)

    >>> _whisper_ends({"d_model": 384, "vocab_size": 51865, "max_source_positions": 1500,
    ...     "max_target_positions": 448, "num_mel_bins": 80})
    21198720
    """
    width = number_in(text, "d_model")
    positions = number_in(text, "max_source_positions") + number_in(text, "max_target_positions")
    convolved = 3 * (number_in(text, "num_mel_bins") + width)
    rows = number_in(text, "vocab_size") + positions + convolved
    return width * rows


def _padded_channels(text: Mapping[str, Any]) -> int:
    """Channels that an expert has on each GPU at least.

    (vllm/models/kimi_k3/nvidia/model.py: KimiMoE.)
    """
    if text.get("model_type") != "kimi_linear":
        return 0
    return number_in(text, "min_moe_intermediate_per_partition") or 256


class _Shape(NamedTuple):
    """Heads that have keys and values of their own, and keys of each."""

    kv_heads: int
    head_dim: int


def _window_shape(text: Mapping[str, Any], kv_heads: int, head_dim: int) -> _Shape:
    """The shape of layers with a window, where it is not that of the others.

    >>> gemma4 = {"num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512}
    >>> _window_shape(gemma4, 8, 256), _window_shape({"swa_num_key_value_heads": 8}, 4, 192)
    (_Shape(kv_heads=8, head_dim=256), _Shape(kv_heads=8, head_dim=192))
    """
    if number_in(text, "global_head_dim", "num_global_key_value_heads"):
        return _Shape(kv_heads, head_dim)  # Gemma 4
    heads = number_in(text, "swa_num_key_value_heads")  # MiMo-V2
    if not heads:
        return _Shape(0, 0)

    return _Shape(heads, number_in(text, "swa_head_dim") or head_dim)


def _value_dim(text: Mapping[str, Any], key: str) -> int:
    """Values per head where they are fewer than keys, and vLLM keeps them so; 0 elsewhere."""
    if str(text.get("model_type")).startswith("mimo_v2"):
        return number_in(text, key)

    return 0


def latent_values(text: Mapping[str, Any]) -> int:
    """Values that MLA keeps per token and layer; 0 for ordinary attention."""
    latent = number_in(text, "kv_lora_rank")
    if not latent or text.get("model_type") in _LATENT_AS_PLAIN:
        return 0
    return latent + number_in(text, "qk_rope_head_dim")


def _compressed_layers(text: Mapping[str, Any], layers: int) -> Tuple[int, int]:
    """How many layers compress the context by 4 and by 128, as DeepSeek V4 does.

    >>> _compressed_layers({"compress_ratios": [0, 4, 128, 4, 0]}, 4)
    (2, 1)
    """
    ratios = text.get("compress_ratios")
    if not isinstance(ratios, list):
        return 0, 0
    told = ratios[:layers]

    return told.count(4), told.count(128)


def indexer_bytes(text: Mapping[str, Any], layers: int) -> int:
    """Bytes of a token that the indexers of all layers keep, the same on every GPU: in DeepSeek's
    FP8 and a scale, in MiniMax's 16 bits.

    >>> indexer_bytes({"index_topk": 2048, "index_head_dim": 128}, 61)
    8052
    >>> sparse = {"sparse_attention_freq": [0, 1, 1], "sparse_index_dim": 128}
    >>> indexer_bytes({"sparse_attention_config": sparse}, 3)
    512
    """
    if number_in(text, "index_topk"):
        keys = number_in(text, "index_head_dim")
        return layers * (keys + SCALE_BYTES)
    sparse = table_in(text, "sparse_attention_config")
    flags = sparse.get("sparse_attention_freq")
    indexers = layers
    if isinstance(flags, list):
        indexers = sum(1 for flag in flags[:layers] if flag)
    return 2 * indexers * number_in(sparse, "sparse_index_dim")


def dtype_of(config: Mapping[str, Any], text: Mapping[str, Any], tensors: Mapping[str, int]) -> str:
    """The type to compute in: as declared, or else that of the most bytes of the weights.

    >>> dtype_of({"torch_dtype": "torch.float16"}, {}, {})
    'float16'
    >>> dtype_of({}, {}, {"U8": 9, "BF16": 2, "F32": 1})
    'bfloat16'
    """
    for part in (config, text):
        for key in ("dtype", "torch_dtype"):
            declared = word_in(part.get(key))
            if declared:
                return declared.replace("torch.", "")

    stored = [name for name in tensors if name in _DTYPE_NAMES]
    if not stored:
        return ""

    return _DTYPE_NAMES[max(stored, key=tensors.__getitem__)]


def remote_classes(config: Mapping[str, Any]) -> Tuple[str, ...]:
    """The classes of Python code that the model brings, or names in another repository.

    >>> remote_classes({"auto_map": {"AutoModel": "m.Model", "AutoConfig": "org/code--c.Config"}})
    ('m.Model', 'org/code--c.Config')
    """
    names = []
    for name in table_in(config, "auto_map").values():
        if word_in(name):
            names.append(name)
    return tuple(sorted(names))


def longest_context(text: Mapping[str, Any], yarn_stretches: bool = False) -> int:
    """The context length in tokens that vLLM derives; 0 when the config does not tell.

    Before 0.30 YaRN stretches the original length (`yarn_stretches`); from then on what the config
    states is taken to be stretched already, as transformers does.

    >>> linear = {"type": "linear", "factor": 4.0}
    >>> longest_context({"max_position_embeddings": 2048, "rope_scaling": linear})
    8192
    >>> llama3 = {"rope_type": "llama3", "factor": 8.0}
    >>> longest_context({"max_position_embeddings": 131072, "rope_scaling": llama3})
    131072
    >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    >>> config = {"max_position_embeddings": 32768, "rope_scaling": yarn}
    >>> longest_context(config), longest_context(config, yarn_stretches=True)
    (32768, 131072)
    """
    length = _stated_length(text)
    rope = _rope_of(text)
    kind = _rope_kind(rope)
    original = number_in(rope, "original_max_position_embeddings")
    factor = _rope_factor(rope)
    if kind == "yarn" and original and yarn_stretches:
        length = original
    elif kind in _ROPE_ALREADY_SCALED:
        factor = 1

    if "gemma3" in str(text.get("model_type")):
        factor = 1  # vLLM does not stretch it
    return int(min(length * factor, MOST_LENGTH))


def unstretched_length(text: Mapping[str, Any]) -> int:
    """The length that vLLM takes by itself where longrope stretches it: then short prompts are
    answered as well as before. 0 for models without.

    >>> phi3 = {"original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope"}}
    >>> unstretched_length(phi3), unstretched_length({"original_max_position_embeddings": 4096})
    (4096, 0)
    """
    if _rope_kind(_rope_of(text)) not in _LONGROPE:
        return 0
    return number_in(text, "original_max_position_embeddings")


def _rope_of(text: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = table_in(text, "rope_scaling", "rope_parameters")
    return table_in(rope, "full_attention") or rope  # transformers 5: one for each kind of layer


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _stated_length(text: Mapping[str, Any]) -> int:
    """The smallest of the lengths that the config states, 0 when it states none. Command-R's own
    key wins, which may be the largest."""
    own = number_in(text, "model_max_length")
    if own:
        return own
    stated = []
    for key in _LENGTH_KEYS:
        length = number_in(text, key)
        if length:
            stated.append(length)
    return min(stated, default=0)


def _rope_factor(rope: Mapping[str, Any]) -> float:
    """By how much the positions are stretched; 1 where nothing sensible is said."""
    factor = rope.get("factor")
    if isinstance(factor, (int, float)) and 0 < factor < MOST_LENGTH:
        return factor
    return 1


def quantization_of(config: Mapping[str, Any]) -> Optional[Quantization]:
    """The quantisation that config.json declares; None without one.

    Knows the dialects of fp8, awq, gptq, compressed-tensors, modelopt, mxfp4, ...
    """
    declared = table_in(config, "quantization_config", "compression_config")
    declared = declared or table_in(text_config(config), "quantization_config")
    declared = {**declared, **table_in(declared, "quantization")}  # ModelOpt nests once more
    if not declared:
        return None

    weights = _first_group(declared)
    method = word_in(declared.get("quant_method")) or word_in(declared.get("quant_algo"))
    bits = number_in(declared, "bits", "w_bit", "num_bits")
    group = number_in(declared, "group_size", "q_group_size")
    block = declared.get("weight_block_size") or weights.get("block_structure")
    kv_bits = number_in(table_in(declared, "kv_cache_scheme"), "num_bits")
    return Quantization(
        method=method.lower() or "unknown",
        bits=bits or number_in(weights, "num_bits"),
        group=group or number_in(weights, "group_size"),
        block=_block_of(block),
        fp8_kv_cache=kv_bits == 8 or declared.get("kv_cache_quant_algo") == "FP8",
    )


def _first_group(declared: Mapping[str, Any]) -> Mapping[str, Any]:
    """compressed-tensors: how the weights of the first group of layers are quantised."""
    for group in table_in(declared, "config_groups").values():
        if isinstance(group, dict):
            return table_in(group, "weights")
    return {}


def _block_of(shape: object) -> Tuple[int, ...]:
    """The shape of a block, () for anything else than a list of positive whole numbers."""
    if not isinstance(shape, list):
        return ()
    return tuple(size for size in shape if type(size) is int and size > 0)
