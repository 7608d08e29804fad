"""Plans for real shapes of models, against what vLLM itself says of them.

tests/fixtures/zoo.json has a row for each shape: its config, bytes of its weights by type, and for
each tensor parallel size what the classes of vLLM 0.32 make of it on an H100, asked without a GPU:
bytes of weights on each GPU, the layers that keep a cache ([kind, tokens of a block, window, bytes of
a block, layers]), bytes that a request needs by its length, or the words of the refusal. In rows that
are `packed`, blocks of layers differ in size: of these the bytes of requests alone are held to it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.serve.cards import assumed_gpus
from hfship.serve.facts import ModelFacts, facts_from_config
from hfship.serve.fit import (
    LEAST_LENGTH,
    GpuKind,
    as_loaded,
    batch_limits,
    kv_bytes,
    kv_width,
    weights_per_gpu,
    working_memory,
)
from hfship.serve.plan import make_plan
from hfship.serve.split_rules import Split, split_problem
from hfship.serve.terms import CUDA_SEES, Host, Image, Plan, ServeOptions

ZOO: Mapping[str, Any] = json.loads(
    Path(__file__).with_name("fixtures").joinpath("zoo.json").read_text()
)
MACHINES = ("1x24GB", "4xL40S", "1xH100", "2xH100", "4xH100", "8xH100", "8xH200", "8xB200")
IMAGE = Image("vllm/vllm-openai:v0.32.0", "sha256:1", (0, 32, 0), cuda="13.0")
OPTIONS = ServeOptions(device="gpu")
H100_IN_FLIGHT = 2 * 8192  # tokens of the batches with which `needs` were asked for
ENCODED = 8192  # tokens of the encoder, beside which whisper's decoder has its own


def facts_of(name: str) -> ModelFacts:
    row = ZOO[name]
    return facts_from_config(row["config"], row["tensors"])


@lru_cache(maxsize=None)
def groups_of(name: str, tp: int) -> Tuple[int, Tuple[Tuple[str, int, int, int], ...]]:
    """(bytes of a block of all layers of a group, (kind, tokens of a block, window, groups))."""
    layers = ZOO[name]["tp"][str(tp)]["layers"]
    counts = [count for *_, count in layers]
    least, most = min(counts), max(counts)
    size = most if most < 1.5 * least else least
    page = max(page for _, _, _, page, _ in layers)
    groups = []
    for kind, block, window, _, count in layers:
        groups.append((kind, block, window, -(-count // size)))
    return size * page, tuple(groups)


def needed(name: str, tp: int, tokens: int, in_flight: int, states: int) -> int:
    """Bytes of a request, by the rules that vLLM tells of its classes: `states` blocks of a state."""
    size, groups = groups_of(name, tp)
    blocks = 0
    for kind, block, window, count in groups:
        if kind == "full":
            blocks += count * -(-tokens // block)
        elif kind == "window":
            seen = min(window - 1 + in_flight, tokens)
            blocks += count * (-(-seen // block) + 1)
        elif kind == "chunk":
            blocks += count * -(-min(window + in_flight, tokens) // block)
        elif kind == "cross":
            blocks += count * -(-ENCODED // block)
        else:
            blocks += count * states
    return size * blocks


def states_of(name: str, tp: int) -> int:
    """Blocks that a state takes: what makes `needed` say what vLLM said."""
    for states in (1, 2, 3):
        needs = ZOO[name]["tp"][str(tp)]["needs"].items()
        if all(needed(name, tp, int(n), H100_IN_FLIGHT, states) == said for n, said in needs):
            return states
    raise AssertionError(f"{name} over {tp}: the rules of this test are not vLLM's")


def longest(name: str, tp: int, budget: int, in_flight: int) -> int:
    """The longest request that vLLM takes with so many bytes of cache, by halving."""
    good, bad = 0, ZOO[name]["length"] + 1
    states = states_of(name, tp)
    while bad - good > 1:
        middle = (good + bad) // 2
        if needed(name, tp, middle, in_flight, states) <= budget:
            good = middle
        else:
            bad = middle
    return good


def planned(name: str, machine: str) -> Any:
    """The plan, or the refusal."""
    try:
        return make_plan(name, "/m", facts_of(name), Host(assumed_gpus(machine)), IMAGE, OPTIONS)
    except HostError as exc:
        return exc


@pytest.mark.parametrize("name", list(ZOO))
def test_no_plan_is_refused_by_vllm_and_none_wastes_a_fifth(name: str) -> None:
    faults: List[str] = []
    for machine in MACHINES:
        plan = planned(name, machine)
        if isinstance(plan, Plan):
            faults.extend(f"{machine}: {fault}" for fault in faults_of(name, machine, plan))
    assert not faults


def faults_of(name: str, machine: str, plan: Plan) -> Iterator[str]:
    said = ZOO[name]["tp"].get(str(plan.tensor_parallel_size), {"layers": []})
    if "refused" in said:
        yield f"vLLM refuses TP={plan.tensor_parallel_size}: {said['refused']}"
        return
    if plan.max_model_len > ZOO[name]["length"]:
        yield f"{plan.max_model_len} tokens, and vLLM takes {ZOO[name]['length']}"
    if not said["layers"] or plan.pipeline_parallel_size > 1 or "packed" in ZOO[name]:
        return

    tp, total = plan.tensor_parallel_size, assumed_gpus(machine)[0].total
    tokens, sequences = batch_limits(GpuKind(total))
    most = longest(name, tp, plan.kv_bytes, 2 * tokens)
    if not 0.8 * most <= plan.max_model_len <= most:
        yield f"{plan.max_model_len} tokens, and vLLM would take up to {most}"
    size, groups = groups_of(name, tp)
    if any(kind == "state" for kind, *_ in groups):
        blocks = plan.kv_bytes // size
        if (plan.max_num_seqs or sequences) > blocks:
            yield f"{plan.max_num_seqs or sequences} requests, and {blocks} blocks for states"


@pytest.mark.parametrize("name", list(ZOO))
def test_no_model_is_refused_that_vllm_would_run(name: str) -> None:
    faults: List[str] = []
    for machine in MACHINES:
        plan = planned(name, machine)
        if isinstance(plan, HostError):
            works = sorted(tp for tp in possible_splits(name, machine))
            if works:
                faults.append(f"{machine}: TP={works} would run: {plan.why}")
    assert not faults


def possible_splits(name: str, machine: str) -> Iterator[int]:
    """The splits that vLLM takes, with room for weights, work and a short context."""
    cards = assumed_gpus(machine)
    facts = as_loaded(facts_of(name), (0, 32, 0), OPTIONS)
    tokens, _ = batch_limits(GpuKind(cards[0].total))
    for size, said in ZOO[name]["tp"].items():
        tp = int(size)
        if tp > len(cards) or "refused" in said or "packed" in ZOO[name]:
            continue
        share = int(cards[0].total * CUDA_SEES * OPTIONS.gpu_memory_utilization)
        room = share - int(1.06 * said["weights"])
        room -= working_memory(facts, Split(tp), GpuKind(cards[0].total), OPTIONS)
        if room > 0 and said["layers"] and longest(name, tp, room, 2 * tokens) >= LEAST_LENGTH:
            yield tp


@pytest.mark.parametrize("name", list(ZOO))
def test_splits_are_those_that_vllm_takes(name: str) -> None:
    facts = as_loaded(facts_of(name), (0, 32, 0), OPTIONS)
    dropped = all("refused" in said for said in ZOO[name]["tp"].values())
    faults: Dict[str, str] = {}
    for size, said in ZOO[name]["tp"].items():
        problem = split_problem(facts, Split(int(size)))
        if bool(problem) != ("refused" in said) and not dropped:
            faults[size] = problem or said["refused"]
        if "weights" in said:
            ratio = weights_per_gpu(facts, Split(int(size))) / said["weights"]
            if not 0.97 < ratio < 1.1:
                faults[size] = f"{ratio:.3f} of the weights"
    assert not faults


def test_experts_of_kimi_are_padded_by_the_versions_that_do() -> None:
    facts = facts_of("Kimi-Linear-48B-A3B-Instruct")
    before, now = (as_loaded(facts, version, OPTIONS) for version in ((0, 20, 0), (0, 32, 0)))
    over_4, over_8 = Split(4), Split(8)
    assert weights_per_gpu(before, over_4) == weights_per_gpu(now, over_4)
    assert weights_per_gpu(now, over_8) > 1.8 * weights_per_gpu(before, over_8)
    # Whole experts are as wide as they are.
    whole = Split(8, whole_experts=True)
    assert weights_per_gpu(before, whole) == weights_per_gpu(now, whole)


@pytest.mark.parametrize("name", list(ZOO))
def test_a_request_needs_the_bytes_that_vllm_says(name: str) -> None:
    facts = as_loaded(facts_of(name), (0, 32, 0), OPTIONS)
    faults: Dict[str, float] = {}
    for size, said in ZOO[name]["tp"].items():
        for length, need in said.get("needs", {}).items():
            width = kv_width(facts, OPTIONS)
            ours = kv_bytes(facts, Split(int(size)), int(length), width, H100_IN_FLIGHT // 2)
            is_whole = int(length) >= 2048 or "Whisper" in facts.architecture
            if is_whole and not 0.99 <= ours / need <= 1.02:
                faults[f"TP={size}, {length} tokens"] = ours / need
    assert not faults


def test_the_rules_of_this_test_are_those_that_vllm_told() -> None:
    told = 0
    for name, row in ZOO.items():
        for size, said in row["tp"].items():
            if "needs" in said and "packed" not in row:
                assert states_of(name, int(size)) in (1, 2, 3)
                told += len(said["needs"])
    assert told > 800
