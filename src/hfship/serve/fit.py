# SPDX-License-Identifier: Apache-2.0
"""Will it split, will it fit: memory of weights, context and runtime.

Owns an estimate of what vLLM will measure. Sizes are in bytes, lengths in tokens. On each GPU

    share      = memory * CUDA_SEES * gpu_memory_utilization
    weights    = those of its rank and stage, see weights_per_gpu
    working    = CUDA context, NCCL when split, activations, sampler, CUDA graphs, image encoder
    KV cache   = share - weights - working

and a length fits when one request of it fits into the KV cache (`kv_bytes`).
Promises: pure. Estimates lean to the safe side by some 10 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, NamedTuple, Tuple

from hfship.base.errors import HostError
from hfship.base.text import GIB, human_bytes
from hfship.base.values import dataclass, replace
from hfship.serve.facts import MOST_LENGTH
from hfship.serve.split_rules import Split, kv_heads_per_gpu, split_problem
from hfship.serve.state_cache import Kept, Pool, compressed_pool, divide_up, pool_of
from hfship.serve.terms import CUDA_SEES
from hfship.serve.vllm import (
    FINER_BLOCKS,
    FLOAT32,
    HYBRID_KV,
    KV_FROM_CHECKPOINT,
    PADDED_EXPERTS,
    STATES_LIMIT,
    TWO_BATCHES,
    YARN_AS_STATED,
)

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts
    from hfship.serve.terms import ServeOptions, Version

ALONE = Split()  # on one GPU, or in RAM
USEFUL_LENGTH = 32768  # tokens; a smaller split is preferred once it holds this much context
LEAST_LENGTH = 2048  # tokens; below, a deployment is of no use
LENGTH_STEP = 1024
UNTOLD_LENGTH = 2048  # vLLM's own, for a model that tells none
CONTEXT_BYTES = int(0.7 * GIB)  # CUDA context per process
NCCL_BYTES = int(0.7 * GIB)  # buffers between GPUs, only with tensor parallelism
GRAPH_BYTES = GIB  # CUDA graphs: 0.5 to 2 GiB
MXFP4_PADDING = 1.09  # gpt-oss: 65.2 GB in the files, 70.8 GB as vLLM 0.32 holds them
MOST_EXPERTS = 0.97  # of the weights
FOUR_BITS = ("mxfp4", "nvfp4", "modelopt_fp4", "awq", "gptq")
UNEVEN_SPLIT = 1.03  # norms, latent projections and the like are replicated on every GPU
CPU_RUNTIME_BYTES = 3 * GIB  # measured: a container with a tiny model takes 2.4 GiB
CPU_IN_FLIGHT = 2048  # tokens per batch, vLLM's default on CPUs
CPU_REQUESTS = 4  # of full length, for which the KV cache in RAM is made


class GpuKind(NamedTuple):
    """What counts of the GPUs of a split: bytes of the smallest, and whether it is one for which
    vLLM takes small batches although it is large."""

    total: int = 0
    small_batches: bool = False


@dataclass(frozen=True)
class Fit:
    """What a split gives."""

    split: Split
    problem: str = ""  # why it cannot be, "" when it can
    kv: int = 0  # bytes of KV cache per GPU
    length: int = 0  # tokens of context that fit into it; 0: none
    sequences: int = 0  # requests at a time that it has states for; 0: not limited by states
    requests: int = 1  # of that length that each copy holds at a time

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return self.split.gpus

    def __str__(self) -> str:
        if self.problem:
            return f"{self.split}: {self.problem}"
        if self.requests > 1:
            return f"{self.split}: holds {self.length} tokens for each of {self.requests} requests"
        return f"{self.split}: holds {self.length} tokens"


def as_loaded(facts: ModelFacts, version: Version, options: ServeOptions) -> ModelFacts:
    """The facts as this vLLM holds the model: what changed from version to version.

    A 16-bit model that is to run in float32 takes twice the bytes; a 32-bit one is narrowed to 16.
    """
    if version < HYBRID_KV:
        layers = facts.full_layers + facts.window_layers
        facts = replace(facts, full_layers=layers, window_layers=0)
    if version < YARN_AS_STATED:
        facts = replace(facts, max_length=max(facts.max_length, facts.stretched_length))
    if version >= TWO_BATCHES:
        facts = replace(facts, batches=2)
    if version >= STATES_LIMIT and options.device != "cpu":
        facts = replace(facts, states_limit=True)
    if version < PADDED_EXPERTS:
        facts = replace(facts, padded_channels=0)
    if version >= FINER_BLOCKS:
        facts = replace(facts, finer_blocks=True)
    quantization = facts.quantization
    if quantization and version < KV_FROM_CHECKPOINT:
        facts = replace(facts, quantization=replace(quantization, fp8_kv_cache=False))
    return replace(facts, weight_bytes=_bytes_as_loaded(facts, options))


def _bytes_as_loaded(facts: ModelFacts, options: ServeOptions) -> int:
    quantization = facts.quantization
    if quantization and quantization.method == "mxfp4":
        return int(MXFP4_PADDING * facts.weight_bytes)
    plain_16_bit = facts.dtype in ("bfloat16", "float16") and not quantization
    if options.dtype in FLOAT32 and plain_16_bit:
        return 2 * facts.weight_bytes
    narrowed = facts.dtype == "float32" and not quantization and options.device != "cpu"
    if narrowed and options.dtype not in FLOAT32:
        return facts.weight_bytes // 2
    return facts.weight_bytes


def kv_bytes(facts: ModelFacts, split: Split, tokens: int, width: float, in_flight: int = 0) -> int:
    """Bytes of the cache of one request with `tokens` tokens, on each GPU. `in_flight`: tokens of a
    batch. See serve/state_cache."""
    pool = cache_pool(facts, split, width)
    return pool.request(tokens, batches_in_flight(facts, split) * in_flight, in_flight)


def batches_in_flight(facts: ModelFacts, split: Split) -> int:
    """Batches that are under way at a time. (vllm/config/vllm.py: max_concurrent_batches.)"""
    if facts.batches > 1:
        return split.pp + 1
    return 1


def cache_pool(facts: ModelFacts, split: Split, width: float) -> Pool:
    """The blocks of the cache on each GPU.

    values of a token = 2 * KV heads per GPU * head_dim, or with MLA its latent, which is the
                        same on every GPU
    bytes             = `width` * values, in each layer with attention
    """
    if any(facts.compressed):
        return compressed_pool(facts.layers, *facts.compressed, split.pp)
    heads = kv_heads_per_gpu(facts.kv_heads, split.tp)
    values = facts.mla_dim or heads * (facts.head_dim + (facts.value_dim or facts.head_dim))
    window_values = values
    if facts.window_kv_heads:
        heads = kv_heads_per_gpu(facts.window_kv_heads, split.tp)
        keys = facts.window_head_dim
        window_values = heads * (keys + (facts.window_value_dim or keys))

    return pool_of(
        Kept(
            full=facts.full_layers,
            full_token=int(values * width),
            windowed=facts.window_layers,
            window_token=int(window_values * width),
            window=facts.window,
            states=facts.state_layers,
            state=facts.state.size(split.tp, max(2, width)),
            state_blocks=facts.state.blocks,
            latent=facts.mla_dim > 0,
            beside=facts.indexer_bytes,
            cross=facts.cross_layers,
            stages=split.pp,
        )
    )


def kv_width(facts: ModelFacts, options: ServeOptions) -> float:
    """Bytes per value of the KV cache: 1 for FP8, 2 for 16-bit, 4 for 32-bit models."""
    cache = options.kv_cache_dtype
    if cache == "auto" and facts.quantization and facts.quantization.fp8_kv_cache:
        return 1.0
    if cache.startswith("fp8"):
        return 1.0
    # vLLM casts 32-bit models to 16 bits unless told otherwise.
    if options.dtype in FLOAT32:
        return 4.0

    return 2.0


def batch_limits(kind: GpuKind) -> Tuple[int, int]:
    """(tokens in flight, sequences) that vLLM's defaults allow on a GPU.

    (vllm/engine/arg_utils.py.)
    """
    if kind.total >= 160 * GIB:
        return 16384, 1024
    if kind.total >= 70 * GIB and not kind.small_batches:
        return 8192, 1024
    return 2048, 256


def weights_per_gpu(facts: ModelFacts, split: Split) -> int:
    """Bytes of weights on the GPU that has most.

    share of a rank = (weights - experts - replicated) / tp + experts / (tp * dp), unevenly, and
                      what experts are padded with
    stages          = the layers of the largest, and the vocabulary at both ends
    """
    if split.gpus == 1:
        return facts.weight_bytes

    replicated = min(facts.weight_bytes, int(facts.replicated * _bytes_per_value(facts)))
    experts = 0
    if split.dp > 1:
        experts = min(expert_bytes(facts), facts.weight_bytes - replicated)
    divided = (facts.weight_bytes - replicated - experts) / split.tp
    rank = divided + experts / (split.tp * split.dp)
    if split.tp > 1:
        rank *= UNEVEN_SPLIT
    rank += replicated + _padding(facts, split)
    if split.pp == 1:
        return int(rank)

    share = divide_up(facts.layers, split.pp) / max(1, facts.layers)
    ends = 2 * facts.vocab * facts.hidden / split.tp
    return min(int(rank), int(rank * share + ends))


def _padding(facts: ModelFacts, split: Split) -> float:
    """Bytes with which the experts of a GPU are padded to channels that a kernel takes."""
    channels = facts.moe_intermediate
    if split.tp == 1 or split.whole_experts or not channels:
        return 0.0
    padded = facts.padded_channels * split.tp
    if padded <= channels:
        return 0.0
    part = expert_bytes(facts) / split.cuts_of_experts
    return part * (padded / channels - 1)


def expert_bytes(facts: ModelFacts) -> int:
    """Bytes of the experts of all layers, at most nearly all weights: three matrices each."""
    channels = facts.moe_intermediate or facts.intermediate
    layers = max(0, facts.layers - facts.dense_layers)
    values = layers * facts.experts * 3 * facts.hidden * channels
    quantization = facts.quantization
    width = _bytes_per_value(facts)
    if quantization and quantization.bits:
        width = quantization.bits / 8
    elif quantization and quantization.method in FOUR_BITS:
        width = 0.5
    most = int(facts.weight_bytes * MOST_EXPERTS)
    return min(most, int(values * width))


def _bytes_per_value(facts: ModelFacts) -> float:
    """Bytes of a weight that is not quantised, or only to 8 bits."""
    if facts.quantization and facts.quantization.method == "fp8":
        return 1.0
    return 2.0


def working_memory(facts: ModelFacts, split: Split, kind: GpuKind, options: ServeOptions) -> int:
    """Bytes that a GPU holds beside weights and cache: what vLLM's profiling run measures."""
    return sum(working_parts(facts, split, kind, options).values())


def working_parts(
    facts: ModelFacts, split: Split, kind: GpuKind, options: ServeOptions
) -> Mapping[str, int]:
    """Bytes of all that is neither weights nor cache.

        activations = 2 bytes * tokens in flight * (4 * hidden + 3 * MLP channels / tp)
        sampler     = 8 bytes * sequences * vocabulary
        encoder     = 2 bytes * patches * (4 * hidden + 3 * channels), of the largest images

    (vllm/v1/worker/gpu_worker.py: determine_available_memory.)
    """
    in_flight, sequences = batch_limits(kind)
    sequences = options.max_num_seqs or sequences
    channels = max(facts.intermediate, facts.moe_intermediate * facts.experts_per_token)
    parts = {
        "CUDA context": CONTEXT_BYTES,
        "activations": 2 * in_flight * (4 * facts.hidden + 3 * channels // split.tp),
        "sampler": 8 * sequences * facts.vocab,
        "CUDA graphs": GRAPH_BYTES,
    }
    if facts.encoder_hidden:
        seen = facts.encoder_patches * max(in_flight, facts.encoder_tokens)
        widths = 4 * facts.encoder_hidden + 3 * facts.encoder_channels
        parts["image encoder"] = 2 * seen * widths
    talks = split.tp * split.pp > 1 or (split.dp > 1 and facts.experts > 0)
    if talks:  # copies of a dense model know nothing of each other
        parts["NCCL"] = NCCL_BYTES
    return parts


def fit(
    facts: ModelFacts, split: Split, kind: GpuKind, options: ServeOptions, requests: int = 1
) -> Fit:
    """How the model fits on GPUs of a kind, so that each copy holds `requests` of
    full length at a time."""
    problem = split_problem(facts, split)
    if problem:
        return Fit(split, problem)

    share = gpu_share(kind, options)
    weights = weights_per_gpu(facts, split)
    working = working_memory(facts, split, kind, options)
    cache = max(0, share - weights - working)

    in_flight, _ = batch_limits(kind)
    length = longest_fit(facts, split, cache // requests, options, in_flight)
    if not length:
        problem = (
            f"{human_bytes(weights)} of weights"
            f" and {human_bytes(working)} of working memory per GPU"
            f" leave too little of {human_bytes(share)} for a KV cache"
        )
        if requests > 1:
            problem += f" of {requests} requests"

    sequences = requests_with_states(facts, split, cache, options)
    wanted = max(requests, options.max_num_seqs)
    if length and facts.states_limit and facts.state_layers and sequences < wanted:
        problem = f"{human_bytes(cache)} of cache hold the states of {sequences} requests at a time"
        return Fit(split, problem, cache, sequences=sequences)

    return Fit(split, problem, cache, length, sequences, requests)


def gpu_share(kind: GpuKind, options: ServeOptions) -> int:
    """Bytes of a GPU that vLLM may take."""
    return int(kind.total * CUDA_SEES * options.gpu_memory_utilization)


def requests_with_states(facts: ModelFacts, split: Split, cache: int, options: ServeOptions) -> int:
    """How many requests `cache` bytes have states for, 0 where that limits nothing.

    vLLM refuses to start, after it loaded all, when --max-num-seqs is more.
    """
    if not facts.states_limit:
        return 0
    return cache_pool(facts, split, kv_width(facts, options)).most_states(cache)


def usual_length(facts: ModelFacts) -> int:
    """The context in tokens that vLLM takes where none is asked for and memory does not limit it.

    (vllm/config/model.py: _get_and_verify_max_len.)
    """
    length = facts.max_length or UNTOLD_LENGTH
    if facts.original_length:
        return min(length, facts.original_length)
    return length


def longest_fit(
    facts: ModelFacts, split: Split, budget: int, options: ServeOptions, in_flight: int
) -> int:
    """Tokens of the longest request whose KV cache fits into `budget` bytes; 0: none does.

    vLLM demands that one request of full length fits.
    """
    if budget <= 0:
        return 0

    longest = max(usual_length(facts), options.max_model_len)
    longest = min(longest, MOST_LENGTH)
    width = kv_width(facts, options)

    def fits(length: int) -> bool:
        return kv_bytes(facts, split, length, width, in_flight) <= budget

    if fits(longest):
        return longest

    # Then the longest round length, found by halving: the bytes grow with the length.
    least = LEAST_LENGTH // LENGTH_STEP
    good, bad = least - 1, longest // LENGTH_STEP + 1  # steps
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle * LENGTH_STEP):
            good = middle
        else:
            bad = middle

    if good < least:
        return 0

    return good * LENGTH_STEP


def memory_on_cpu(weight_bytes: int, kv_bytes: int) -> int:
    """Bytes of RAM that a model on the CPU takes."""
    return weight_bytes + CPU_RUNTIME_BYTES + kv_bytes


def fit_cpu(name: str, facts: ModelFacts, memory: int, options: ServeOptions, held: int = 0) -> Fit:
    """The fit into `memory` bytes of RAM, of which others hold `held`, by one process.

    The KV cache holds a few requests of full length, as far as the RAM goes. It is in whole GiB, as
    VLLM_CPU_KVCACHE_SPACE wants it. Raises HostError.
    """
    full = options.max_model_len or usual_length(facts)
    request = kv_bytes(facts, ALONE, full, kv_width(facts, options), CPU_IN_FLIGHT)
    wanted_gib = max(1, divide_up(CPU_REQUESTS * request, GIB))
    least = memory_on_cpu(facts.weight_bytes, 0)
    free_gib = (memory - held - least) // GIB
    cache = min(wanted_gib, free_gib) * GIB

    length = longest_fit(facts, ALONE, cache, options, CPU_IN_FLIGHT)
    if length < max(1, options.max_model_len):
        raise _no_room_on_cpu(name, facts, memory, held, length)

    return Fit(ALONE, "", cache, length)


def _no_room_on_cpu(name: str, facts: ModelFacts, memory: int, held: int, length: int) -> HostError:
    """The error where RAM does not do; `length` tokens of context would fit."""
    why = f"{human_bytes(memory)} of RAM can be used"
    step = "take a machine with more memory, or one with GPUs"
    if held:
        why += f", of which other models hold {human_bytes(held)}"
        step = "hfship status    # what runs, and may be stopped"
    needed = human_bytes(memory_on_cpu(facts.weight_bytes, GIB))
    why += f"; it needs {needed} with the shortest context"
    if length:
        why += f", and {length} tokens would fit"
        step = f"hfship serve {name} --max-model-len {length}"
    return HostError(f"cannot serve {name} on the CPU: too little RAM", why, step)
