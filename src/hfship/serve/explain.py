# SPDX-License-Identifier: Apache-2.0
"""The arithmetic behind a plan, line by line: what a GPU has, what takes it, what is left.

Pure. Every number is computed by serve/fit, where the plan has it from; here it is only told how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, List, Mapping, NamedTuple, Optional

from hfship.base.text import human_bytes
from hfship.serve.fit import (
    MXFP4_PADDING,
    GpuKind,
    as_loaded,
    batch_limits,
    batches_in_flight,
    cache_pool,
    gpu_share,
    kv_width,
    weights_per_gpu,
    working_parts,
)
from hfship.serve.parallel import rounded_requests
from hfship.serve.split_rules import Split, kv_heads_per_gpu
from hfship.serve.terms import CUDA_SEES

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts
    from hfship.serve.measured import Measured
    from hfship.serve.terms import Plan


class Line(NamedTuple):
    """A quantity of a GPU: what it is, in bytes or as it is, and how it comes about."""

    name: str
    amount: str
    how: str


def explanation(
    facts: ModelFacts, plan: Plan, kind: GpuKind, measured: Optional[Measured] = None
) -> List[Line]:
    """The lines of a plan for GPUs; `facts` as they were read, `kind` of its GPUs.

    Where a start like it was measured, the plan has that cache (measured.as_measured), and so have
    the lines, beside what was estimated.
    """
    loaded = as_loaded(facts, plan.version, plan)
    split = Split(
        plan.tensor_parallel_size,
        plan.pipeline_parallel_size,
        plan.data_parallel_size,
        plan.enable_expert_parallel,
    )
    lines = [*_memory_lines(facts, loaded, plan, split, kind)]
    if measured is not None:
        lines += _measured_lines(measured)
    lines += _request_lines(loaded, plan, split, kind)
    if measured is not None and measured.kv_tokens:
        how = f"as vLLM measured: {measured.kv_tokens} tokens in the cache"
        told = Line("requests", f"{plan.concurrency:.9g}", how)
        lines = [told if line.name == told.name else line for line in lines]
    return lines


def _measured_lines(measured: Measured) -> Iterator[Line]:
    """What vLLM said of a start like this, which counts in the place of the estimates."""
    day = measured.at[:10]
    how = f"as vLLM measured on {day}"
    if measured.weight_bytes:
        yield Line("weights", human_bytes(measured.weight_bytes), how)
    if measured.kv_bytes:
        yield Line("KV cache", human_bytes(measured.kv_bytes), how)


def _memory_lines(
    facts: ModelFacts, loaded: ModelFacts, plan: Plan, split: Split, kind: GpuKind
) -> Iterator[Line]:
    share = gpu_share(kind, plan)
    yield Line("memory", human_bytes(kind.total), "of the GPU, as nvidia-smi says")
    used = f"{CUDA_SEES:g} that CUDA sees * {plan.gpu_memory_utilization:g}"
    yield Line("share", human_bytes(share), f"memory * {used} (--gpu-memory-utilization)")
    weights = weights_per_gpu(loaded, split)
    yield Line("- weights", human_bytes(weights), _how_weights(facts, loaded, split))
    parts = working_parts(loaded, split, kind, plan)
    how = _how_work(loaded, split, kind, plan)
    for name, size in parts.items():
        yield Line(f"- {name}", human_bytes(size), how.get(name, "a usual amount"))
    left = share - weights - sum(parts.values())
    yield Line("= KV cache", human_bytes(left), "what is left")


def _how_weights(facts: ModelFacts, loaded: ModelFacts, split: Split) -> str:
    size = human_bytes(facts.weight_bytes)
    how = f"{size} in the files"
    if loaded.weight_bytes != facts.weight_bytes:
        times = loaded.weight_bytes / max(1, facts.weight_bytes)
        reason = "as they are loaded"
        is_padded = abs(times - MXFP4_PADDING) < 0.01
        if is_padded:
            reason = "of padding by the kernels of MXFP4"
        how += f" * {times:.3g} {reason}"
    if split.gpus > 1:
        how += f", over {split}, a little unevenly"

    return how


def _how_work(facts: ModelFacts, split: Split, kind: GpuKind, plan: Plan) -> Mapping[str, str]:
    in_flight, sequences = batch_limits(kind)
    sequences = plan.max_num_seqs or sequences
    channels = max(facts.intermediate, facts.moe_intermediate * facts.experts_per_token)
    widths = f"4 * {facts.hidden} + 3 * {channels} / {split.tp}"
    patches = facts.encoder_patches * max(in_flight, facts.encoder_tokens)
    encoder = f"4 * {facts.encoder_hidden} + 3 * {facts.encoder_channels}"
    return {
        "activations": f"2 bytes * {in_flight} tokens of a batch * ({widths})",
        "sampler": f"8 bytes * {sequences} requests * {facts.vocab} words",
        "image encoder": f"2 bytes * {patches} patches of images * ({encoder})",
        "NCCL": "buffers between the GPUs",
    }


def _request_lines(facts: ModelFacts, plan: Plan, split: Split, kind: GpuKind) -> Iterator[Line]:
    width = kv_width(facts, plan)
    pool = cache_pool(facts, split, width)
    in_flight, _ = batch_limits(kind)
    batches = batches_in_flight(facts, split)
    length = plan.max_model_len
    yield Line("layers", str(facts.layers), _how_layers(facts))
    if facts.full_layers + facts.window_layers:
        yield Line(
            "a token", human_bytes(pool.bytes // pool.block), _how_token(facts, split, width)
        )
    if facts.state_layers:
        state = facts.state.size(split.tp, max(2, width))
        yield Line(
            "a state", human_bytes(state), "of one layer, for as long as a request is served"
        )
    blocks = pool.blocks_of(length, batches * in_flight, in_flight)
    how = f"{blocks} blocks of {pool.block} tokens in {pool.layers} layers, for {length} tokens"
    if pool.cross_groups:
        how += f" and {in_flight} of the encoder"
    for windows in pool.windows:
        how += (
            f", windows of {windows.window} and the tokens of {batches} batches that are on the way"
        )
    yield Line("a request", human_bytes(blocks * pool.bytes), how)
    if blocks:
        held = split.dp * plan.kv_bytes / (blocks * pool.bytes)
        copies = ""
        if split.dp > 1:
            copies = f"{split.dp} copies * "
        requests = f"{rounded_requests(held):.9g}"
        yield Line("requests", requests, f"{copies}KV cache / a request")
    if pool.state_groups:
        most = pool.most_states(plan.kv_bytes)
        yield Line("at a time", str(most), "blocks for states: vLLM takes no more requests")


def _how_layers(facts: ModelFacts) -> str:
    kinds = []
    if facts.full_layers:
        kinds.append(f"{facts.full_layers} keep the whole context")
    if facts.window_layers:
        kinds.append(f"{facts.window_layers} a window of {facts.window} tokens")
    if facts.state_layers:
        kinds.append(f"{facts.state_layers} a state")

    return ", ".join(kinds)


def _how_token(facts: ModelFacts, split: Split, width: float) -> str:
    if facts.mla_dim:
        values = f"{facts.mla_dim} values of the latent"
    else:
        heads = kv_heads_per_gpu(facts.kv_heads, split.tp)
        values = f"{heads} KV heads * {facts.head_dim + (facts.value_dim or facts.head_dim)} values"
    return f"{values} * {width:g} bytes"
