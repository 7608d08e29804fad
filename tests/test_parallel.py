"""Over how many GPUs: pipelines, copies, experts, slices, mixed machines; what idle GPUs could do."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.base.errors import HfshipError, HostError, UsageError
from hfship.base.settings import parse_size
from hfship.base.text import human_bytes
from hfship.commands.options import gpu_list
from hfship.serve.cards import CARDS, assumed_gpus
from hfship.serve.choices import Choice, choices
from hfship.serve.docker import read_host
from hfship.serve.explain import explanation
from hfship.serve.files import compose_value
from hfship.serve.fit import Fit, GpuKind, batch_limits, expert_bytes, fit, weights_per_gpu
from hfship.serve.gpus import gpu_pools, slice_memory, with_slices
from hfship.serve.images import image_called
from hfship.serve.measured import Measured, as_measured
from hfship.serve.parallel import (
    NO_NUMBER,
    advice_beyond,
    idle_advice,
    kind_of,
    refusal,
    require_known_ways,
    splits,
)
from hfship.serve.plan import make_plan, vllm_arguments
from hfship.serve.split_rules import Split, split_problem
from hfship.serve.terms import Gpu, Host, Image, Plan, ServeOptions
from test_facts import CONFIGS, facts_of

IMAGE = Image("ours/vllm:1", "sha256:1", (0, 32, 0), cuda="13.0.1")


def plan(name: str, machine: str, image: Image = IMAGE, **options: Any) -> Plan:
    wanted = ServeOptions(device="gpu", **options)
    return make_plan(name, "/m", facts_of(name), Host(assumed_gpus(machine)), image, wanted)


def split_of(made: Plan) -> Tuple[int, int, int]:
    return made.tensor_parallel_size, made.pipeline_parallel_size, made.data_parallel_size


@pytest.mark.parametrize(
    "name, machine, options, expected",
    [
        # three GPUs: heads do not divide, layers do
        ("Llama-3.1-70B", "3xH100", {}, (1, 3, 1)),
        ("Llama-3.1-70B", "4xH100", {}, (4, 1, 1)),
        ("Llama-3.1-70B", "4xH100", {"pipeline_parallel_size": 2}, (2, 2, 1)),
        ("Llama-3.1-70B", "8xH100", {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}, (2, 3, 1)),
        ("Qwen3-8B", "4xH100", {"data_parallel_size": 3}, (1, 1, 3)),
        ("Qwen3-8B", "4xH100", {"data_parallel_size": 2, "tensor_parallel_size": 2}, (2, 1, 2)),
        ("Qwen3-8B", "4xH100", {"wanted_concurrency": 1}, (1, 1, 1)),
        # copies of a dense model, tensor parallelism of one with experts
        ("Qwen3-8B", "8xH100", {"wanted_concurrency": 25, "max_model_len": 40960}, (1, 1, 3)),
        ("Mixtral-8x7B", "8xH100", {"wanted_concurrency": 30, "max_model_len": 32768}, (4, 1, 1)),
        ("Qwen3-30B-A3B-FP8", "8xH100", {"enable_expert_parallel": True, "tensor_parallel_size": 8}, (8, 1, 1)),
        ("DeepSeek-V3", "8xH200", {"data_parallel_size": 8, "enable_expert_parallel": True}, (1, 1, 8)),
    ],
)  # fmt: skip
def test_the_split_that_holds_what_is_wanted(
    name: str, machine: str, options: Dict[str, Any], expected: Tuple[int, int, int]
) -> None:
    made = plan(name, machine, **options)
    assert split_of(made) == expected
    tp, pp, dp = expected
    assert len(made.gpus) == tp * pp * dp == len(set(made.gpus))
    devices = compose_value(made)["services"]["vllm"]["deploy"]["resources"]
    assert devices["reservations"]["devices"][0]["device_ids"] == list(made.gpus)
    arguments = vllm_arguments(made)
    for flag, size in zip(("tensor", "pipeline", "data"), expected):
        named = f"--{flag}-parallel-size"
        assert (named in arguments) == (size > 1 or flag == "tensor")
        assert size == 1 or arguments[arguments.index(named) + 1] == str(size)
    wanted = options.get("wanted_concurrency", 1)
    assert made.concurrency >= wanted


@pytest.mark.parametrize(
    "name, machine, options, said",
    [
        ("Qwen3-8B", "2xH100", {"enable_expert_parallel": True}, "has no experts"),
        ("Qwen3-8B", "2xH100", {"data_parallel_size": 3}, "there are only 2 free GPUs"),
        ("Qwen3-8B", "2xH100", {"pipeline_parallel_size": 3}, "there are only 2 free GPUs"),
        ("Qwen3-8B", "2xH100", {"wanted_concurrency": 100, "max_model_len": 40960}, "holds 7168 tokens for each of 50 requests"),
        ("Llama-3.1-70B", "4xH100", {"tensor_parallel_size": 3}, "64 attention heads"),
        ("Llama-3.1-70B", "4xH100", {"tensor_parallel_size": 16}, "there are only 4 free GPUs"),
        ("Qwen3-8B", "1x24GB", {"max_model_len": 40960}, "holds 18432 tokens"),
        ("Qwen3-8B", "1xH100", {"max_model_len": 50000}, "made for 40960"),
        ("Qwen3-8B", "1xH100", {"gpu_memory_utilization": 0.05}, "4.3 GB for a KV cache"),
        ("Mixtral-8x7B", "4xH100", {"pipeline_parallel_size": 40}, "32 layers are fewer than 40"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_plan_that_works(
    name: str, machine: str, options: Dict[str, Any], said: str
) -> None:
    with pytest.raises(HfshipError) as caught:
        plan(name, machine, **options)
    assert said in caught.value.why
    if isinstance(caught.value, HostError):
        commands = re.findall(r"hfship serve (\S+) (.*)", caught.value.next_step)
        assert commands
        for named, flags in commands:
            made = plan(named, machine, **options_of(flags))
            assert made.gpus


def test_a_split_that_holds_no_more_than_a_smaller_one_is_not_proposed() -> None:
    with pytest.raises(HostError) as caught:
        plan("Qwen3-8B", "8xH100", tensor_parallel_size=16)
    assert caught.value.next_step == "what works: hfship serve Qwen3-8B --tensor-parallel-size 1"


def test_gpus_too_old_for_cuda_want_another_image() -> None:
    with pytest.raises(HostError) as caught:
        plan("Qwen3-8B", "2xV100-32GB")
    assert "CUDA 13 needs" in caught.value.why and "-cu129" in caught.value.next_step


FLAGS = {
    "--tensor-parallel-size": "tensor_parallel_size",
    "--pipeline-parallel-size": "pipeline_parallel_size",
    "--data-parallel-size": "data_parallel_size",
    "--max-model-len": "max_model_len",
    "--max-num-seqs": "max_num_seqs",
    "--concurrency": "wanted_concurrency",
    "--gpu-memory-utilization": "gpu_memory_utilization",
}


def options_of(text: str) -> Dict[str, Any]:
    found = {}
    for flag, value in re.findall(r"(--[a-z-]+) ([\d.]+)", text):
        found[FLAGS[flag]] = json.loads(value)
    return found


@pytest.mark.parametrize(
    "version, options, flag",
    [
        ((0, 8, 3), {"data_parallel_size": 2}, ""),
        ((0, 8, 3), {"enable_expert_parallel": True}, ""),
    ],
)
def test_flags_that_the_image_has_not_are_refused(
    version: tuple, options: Dict[str, Any], flag: str
) -> None:
    image = replace(IMAGE, version=version)
    made = plan("Mixtral-8x7B", "4xH200", image, **options)
    assert made.version == version and flag == ""


def test_more_than_one_gpu_makes_no_sense_on_the_cpu() -> None:
    options = ServeOptions(device="cpu", data_parallel_size=2)
    with pytest.raises(UsageError, match="is for GPUs") as caught:
        make_plan("m", "/m", facts_of("Qwen3-8B"), Host(memory=2**40), IMAGE, options)
    assert caught.value.next_step == "hfship serve m --device cpu --reset"


def test_whole_experts_of_a_model_without_any_are_refused_with_the_plan_that_works() -> None:
    options = {"enable_expert_parallel": True, "tensor_parallel_size": 2}
    with pytest.raises(UsageError, match="makes no sense here") as caught:
        plan("Qwen3-8B", "2xH100", **options)
    assert caught.value.next_step.endswith("--tensor-parallel-size 2")
    assert "expert" not in caught.value.next_step


def test_a_class_without_pipelines_gets_none() -> None:
    facts = replace(facts_of("Llama-3.1-70B"), architecture="Gemma3nForConditionalGeneration")
    with pytest.raises(HostError) as caught:
        host = Host(assumed_gpus("3xH100"))
        make_plan("m", "/m", facts, host, IMAGE, ServeOptions(device="gpu"))
    assert "pipeline" not in caught.value.next_step


@pytest.mark.parametrize("name", ["Mixtral-8x7B", "Qwen3-30B-A3B-FP8", "DeepSeek-V3"])
def test_copies_share_experts_and_nothing_else(name: str) -> None:
    facts = facts_of(name)
    experts = expert_bytes(facts)
    assert 0.9 < experts / facts.weight_bytes <= 0.98
    shared = weights_per_gpu(facts, Split(dp=8))
    assert shared == pytest.approx(facts.weight_bytes - experts * 7 / 8, rel=0.01)
    dense = facts_of("Qwen3-8B")
    assert weights_per_gpu(dense, Split(dp=8)) == dense.weight_bytes


def test_whole_experts_are_not_cut() -> None:
    facts = facts_of("Qwen3-30B-A3B-FP8")
    assert "cut through" in split_problem(facts, Split(4))
    assert split_problem(facts, Split(4, whole_experts=True)) == ""
    assert "cut through" in split_problem(facts, Split(1, dp=8))
    assert split_problem(facts, Split(1, dp=8, whole_experts=True)) == ""


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.integers(1, 8),
    st.sampled_from([16, 24, 48, 80, 141, 180]),
    st.integers(1, 40),
)
def test_no_gpu_is_promised_twice_and_what_idle_ones_are_told_works(
    name: str, count: int, gigabytes: int, requests: int
) -> None:
    machine = f"{count}x{gigabytes}GB"
    try:
        made = plan(name, machine, wanted_concurrency=requests)
    except HostError:
        return
    tp, pp, dp = split_of(made)
    assert tp * pp * dp == len(set(made.gpus)) <= count
    assert made.concurrency >= requests or made.concurrency == 0
    assert bool(made.idle) == (len(made.gpus) < count)
    if "hfship serve" in made.idle:
        command = options_of(made.idle)
        wider = plan(name, machine, max_model_len=made.max_model_len, **command)
        assert len(wider.gpus) > len(made.gpus) and wider.concurrency > made.concurrency


def test_each_stage_holds_its_share_of_layers_and_of_the_cache() -> None:
    facts, options = facts_of("Llama-3.1-70B"), ServeOptions()
    whole = fit(facts, Split(1), GpuKind(200 << 30), options)
    staged = fit(facts, Split(1, 2), GpuKind(200 << 30), options)
    assert weights_per_gpu(facts, Split(1, 2)) < 0.52 * facts.weight_bytes
    assert staged.kv > whole.kv


# -- what --plan tells of the others, and how a plan comes about


def told(name: str, machine: str, *references: str, **options: Any) -> List[Choice]:
    images = [image_called(reference, "sha256:1") for reference in references]
    wanted = ServeOptions(device="gpu", **options)
    return choices(name, facts_of(name), Host(assumed_gpus(machine)), images, wanted)


def test_choices_are_in_groups_by_image_and_split() -> None:
    found = told("Llama-3.1-70B", "3xH100", "vllm/vllm-openai:v0.32.0")
    assert [(choice.group, choice.split) for choice in found] == [
        ("runs", "TP=1 PP=3"), ("does not run", "TP=1"), ("does not run", "TP=2"), ("does not run", "TP=3"),
    ]  # fmt: skip
    assert "64 attention heads" in found[3].why and found[1].why == "each has 76.6 GB for it"
    assert 141 * 10**9 < found[1].need < 200 * 10**9


@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2}, {"data_parallel_size": 2}])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_choice_that_runs_is_a_plan(name: str, options: Dict[str, Any]) -> None:
    for choice in told(name, "4xL40S", "ours/vllm:1", **options):
        if choice.group == "does not run":
            assert choice.why
            continue
        flags = options_of(choice.flags)
        cache = "fp8" if "fp8" in choice.flags else "auto"
        made = plan(name, "4xL40S", replace(IMAGE, version=None), kv_cache_dtype=cache, **flags)
        assert made.max_model_len == choice.length and str(choice.requests)
        assert split_of(made)[0] == flags["tensor_parallel_size"]
        assert (choice.group == "runs") == (choice.length == facts_of(name).max_length)


def test_an_fp8_cache_is_named_where_only_that_fits() -> None:
    found = told("Qwen3-8B", "1x21200MB", "ours/vllm:1")
    assert found[0].group == "runs with less" and "--kv-cache-dtype fp8" in found[0].flags


def test_an_image_that_does_not_run_the_model_is_told_once() -> None:
    facts = replace(facts_of("Qwen3-8B"), architecture="MPTForCausalLM")
    images = [image_called(f"vllm/vllm-openai:v{v}", "") for v in ("0.32.0", "0.28.0")]
    machine = Host(assumed_gpus("1xH100"))
    found = choices("m", facts, machine, images, ServeOptions(device="gpu"))
    assert [(choice.image[-6:], choice.group) for choice in found] == [
        ("0.28.0", "runs"), ("0.32.0", "does not run"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_lines_of_an_explanation_add_up(name: str) -> None:
    try:
        made = plan(name, "8xH200")
    except HostError:
        return
    lines = {line.name: line.amount for line in explanation(facts_of(name), made, GPU)}
    share = parse_size(lines["share"])
    taken = sum(parse_size(amount) for line, amount in lines.items() if line.startswith("- "))
    assert share - taken == pytest.approx(parse_size(lines["= KV cache"]), rel=0.02)
    assert parse_size(lines["= KV cache"]) == pytest.approx(made.kv_bytes, rel=0.01)
    if "requests" in lines:
        assert float(lines["requests"]) == pytest.approx(made.concurrency, rel=0.1)


def computed(how: str) -> float:
    """What an arithmetic that is told comes to: "2 bytes * 8192 tokens of a batch * (4 * 1 + 2)"."""
    return float(eval(re.sub(r"[a-z]+( of [a-z ]+)?", "", how)))


# An image encoder sees what comes as one batch, or the largest image if that is more.
ENCODER = {"encoder_hidden": 1152, "encoder_channels": 4304, "encoder_patches": 4}


@pytest.mark.parametrize("encoder_tokens", [256, 20_000])
@pytest.mark.parametrize("name", ["Qwen3-8B", "Llama-3.1-70B", "Qwen3-30B-A3B-FP8"])
def test_the_arithmetic_that_is_told_gives_its_amount(name: str, encoder_tokens: int) -> None:
    facts = replace(facts_of(name), encoder_tokens=encoder_tokens, **ENCODER)
    made = replace(plan(name, "8xH200"), max_num_seqs=100)
    lines = {line.name: line for line in explanation(facts, made, GPU)}
    for part in ("activations", "sampler", "image encoder"):
        line = lines[f"- {part}"]
        assert human_bytes(round(computed(line.how))) == line.amount, line
    assert f"{4 * max(8192, encoder_tokens)} patches" in lines["- image encoder"].how
    assert "100 requests" in lines["- sampler"].how


def test_an_explanation_has_what_was_measured_where_the_plan_has_it() -> None:
    made = plan("Qwen3-8B", "1xH100")
    measured = Measured(
        at="2026-11-01T00:00:00Z",
        max_model_len=made.max_model_len,
        kv_tokens=400_000,
        kv_bytes=50 * 10**9,
        weight_bytes=16 * 10**9,
        concurrency=9.77,
    )
    shown = as_measured(made, measured, facts_of("Qwen3-8B"))
    lines = explanation(facts_of("Qwen3-8B"), shown, GPU, measured)
    amounts = {line.name: line.amount for line in lines}
    assert amounts["KV cache"] == "50.0 GB" and amounts["weights"] == "16.0 GB"
    assert amounts["requests"] == f"{shown.concurrency:g}" == "9.8"
    assert "measured" in next(line.how for line in lines if line.name == "requests")


GPU = GpuKind(143771 << 20)


# -- machines: mixed ones, names, slices


# vllm/engine/arg_utils.py of 0.11 to 0.32, get_batch_defaults: 80 GB of an A100 are not of an H100.
@pytest.mark.parametrize(
    "spec, limits",
    [
        ("1xA100", (2048, 256)),
        ("1xA100-40GB", (2048, 256)),
        ("1xH100", (8192, 1024)),
        ("1xL40S", (2048, 256)),
        ("1xB200", (16384, 1024)),
    ],
)
def test_batches_are_those_that_vllm_takes_for_the_card(spec: str, limits: Any) -> None:
    assert batch_limits(kind_of(assumed_gpus(spec))) == limits


def test_an_a100_keeps_more_for_the_cache_than_an_h100_of_its_size() -> None:
    made = {spec: plan("Qwen3-8B", spec) for spec in ("1xA100", "1xH100")}
    assert made["1xA100"].kv_bytes > made["1xH100"].kv_bytes + 10**9
    lines = explanation(facts_of("Qwen3-8B"), made["1xA100"], kind_of(assumed_gpus("1xA100")))
    (activations,) = [line.how for line in lines if line.name == "- activations"]
    assert " 2048 tokens of a batch" in activations


def test_of_mixed_gpus_the_first_kind_that_holds_the_model_is_taken() -> None:
    made = plan("Qwen3-30B-A3B-FP8", "2xT4,1xL40S")
    assert made.gpu_names == ("GPU 2 (L40S 48 GB, 48.3 GB)",)
    assert plan("Qwen3-8B", "2xL40S,1xH100").gpu_names[0].startswith("GPU 0 (L40S")
    assert "H100" in str(plan("Qwen3-8B", "2xL40S,1xH100").warnings)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.label)
def test_every_card_is_known_by_its_name_and_size(card: Any) -> None:
    for name in (f"{card.name}-{card.gigabytes}GB", f"NVIDIA {card.name} {card.gigabytes}GB"):
        assert assumed_gpus(f"1x{name}")[0].name == card.label
    assert assumed_gpus(f"1x{card.name.replace(' ', '')}")[0].name.startswith(card.name)


@pytest.mark.parametrize("spec", ["1x4300", "1xA8000", "1xH100,", "1xH100;1xL4", "1x80", "1x-5GB"])
def test_what_is_no_card_is_told_which_are(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        assumed_gpus(spec)
    assert "2x" in caught.value.next_step or "known" in caught.value.why


LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-1111)
  MIG 1g.10gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
"""
XML = """<gpu id="1"><minor_number>0</minor_number><mig_devices>
<mig_device><index>0</index><fb_memory_usage><total>40448 MiB</total></fb_memory_usage></mig_device>
<mig_device><index>1</index><fb_memory_usage><total>9856 MiB</total></fb_memory_usage></mig_device>
</mig_devices></gpu>"""


def sliced(used: int = 0) -> List[Gpu]:
    whole = Gpu(0, "GPU-aaaa", "NVIDIA H100 80GB HBM3", 81559 << 20, used, (9, 0), mig=True)
    other = Gpu(1, "GPU-bbbb", "NVIDIA H100 80GB HBM3", 81559 << 20, 81000 << 20, (9, 0))
    return list(with_slices([whole, other], LISTED, slice_memory(XML)))


def test_slices_are_gpus_of_their_own() -> None:
    gpus = sliced()
    assert [(gpu.slice, gpu.total >> 20) for gpu in gpus] == [
        ("", 81559), ("0:0", 40448), ("0:1", 9856), ("", 81559),
    ]  # fmt: skip
    made = make_plan(
        "m", "/m", facts_of("Qwen3-8B"), Host(tuple(gpus)), IMAGE, ServeOptions(device="gpu")
    )
    assert made.gpus == ("MIG-1111",)  # the smaller one does not hold it, the whole one is in use
    assert made.gpu_names == ("GPU 0:0 (NVIDIA H100 80GB HBM3 MIG 3g.40gb, 42.4 GB)",)


@pytest.mark.parametrize("name", ["0:0", "MIG-1111", "MIG-1"])
def test_slices_are_named_by_place_or_uuid(name: str) -> None:
    options = ServeOptions(device="gpu", gpus=(name,))
    (pool,) = gpu_pools(Host(tuple(sliced())), options)
    assert [gpu.uuid for gpu in pool.gpus] == ["MIG-1111"]


def test_a_model_is_not_spread_over_slices() -> None:
    host = Host(tuple(sliced()))
    options = ServeOptions(device="gpu", gpus=("0:0", "0:1"), data_parallel_size=2)
    with pytest.raises(HostError) as caught:
        make_plan("m", "/m", facts_of("Qwen3-8B"), host, IMAGE, options)
    assert "only 1 free GPU" in caught.value.why


def test_slices_as_nvidia_smi_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = Path(__file__).with_name("stubs")
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.setenv("HFSHIP_STUB_GPUS", "2x H100 81559")
    monkeypatch.setenv("HFSHIP_STUB_MIG", "1 3g.40gb 40448, 1 1g.10gb 9856")
    gpus = read_host(()).gpus
    assert [(gpu.slice or gpu.index, gpu.mig, gpu.total >> 20) for gpu in gpus] == [
        (0, False, 81559), (1, True, 81559), ("1:0", False, 40448), ("1:1", False, 9856),
    ]  # fmt: skip
    assert gpus[2].uuid.startswith("MIG-") and gpus[2].capability == (9, 0)


@given(st.text(alphabet="GPUMIG 0123456789:()-.gb\n", max_size=200))
def test_no_list_of_slices_breaks_the_reader(text: str) -> None:
    assert with_slices(sliced()[:1], text, {})[0].uuid == "GPU-aaaa"
    assert slice_memory(text) == {}


@pytest.mark.parametrize(
    "text", ["0:1", "0,1:0", "MIG-00000000-0000-4000-8000-1", "MIG-GPU-1/2/0,0"]
)
def test_slices_can_be_asked_for(text: str) -> None:
    assert gpu_list(text) == text


@pytest.mark.parametrize("text", ["0:", ":1", "0:1:2", "MIG-", "0 1", "0,", "-1"])
def test_what_names_no_gpu_is_refused(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        gpu_list(text)


@pytest.mark.parametrize(
    "model, count, wanted, advice",
    [
        ("Llama-3.1-70B", 1, 0, "4 such GPUs (--tensor-parallel-size 4, 131072 tokens)"),
        ("Llama-3.1-70B", 3, 0, "4 such GPUs (--tensor-parallel-size 4, 131072 tokens)"),
        ("Llama-3.1-70B", 4, 0, "8 such GPUs (--tensor-parallel-size 8, 131072 tokens)"),
        ("Llama-3.1-70B", 7, 0, "8 such GPUs (--tensor-parallel-size 8, 131072 tokens)"),
        ("DeepSeek-V3", 15, 0, "16 such GPUs (--tensor-parallel-size 16, 163840 tokens)"),
        ("Llama-3.1-70B", 3, 10**9, NO_NUMBER),
    ],
)
def test_the_next_number_of_gpus_that_does_is_named(
    model: str, count: int, wanted: int, advice: str
) -> None:
    options = ServeOptions(max_model_len=wanted)
    assert advice_beyond(facts_of(model), count, GpuKind(80 * 10**9), options) == advice


# -- what is asked for, and in which words it is refused

ASKED = {
    "tensor_parallel_size": "--tensor-parallel-size 2",
    "pipeline_parallel_size": "--pipeline-parallel-size 2",
    "data_parallel_size": "--data-parallel-size 2",
    "max_model_len": "--max-model-len 2",
    "max_num_seqs": "--max-num-seqs 2",
    "wanted_concurrency": "--concurrency 2",
}


@pytest.mark.parametrize("option", ASKED)
def test_a_refusal_repeats_what_was_asked_for(option: str) -> None:
    options = ServeOptions(**{option: 2})
    tried = [Fit(Split(), "it is too large")]
    error = refusal("m", facts_of("Qwen3-8B"), assumed_gpus("1x16GB"), tried, options)
    assert error.what == f"cannot serve m on 1 GPU of 16.0 GB with {ASKED[option]}"
    assert error.why == "TP=1: it is too large"


def test_where_nothing_was_tried_the_split_that_was_asked_for_is_told() -> None:
    facts = facts_of("Qwen3-8B")
    gpus = assumed_gpus("2x80GB")
    options = ServeOptions(tensor_parallel_size=4)
    assert refusal("m", facts, gpus, [], options).why == "TP=4: there are only 2 free GPUs"
    options = ServeOptions(tensor_parallel_size=3)
    assert refusal("m", facts, gpus, [], options).why.startswith("TP=3: 32 attention heads")


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"pipeline_parallel_size": 1, "data_parallel_size": 1}, ""),
        ({"tensor_parallel_size": 2}, ""),
    ],
)
def test_ways_are_for_gpus_and_versions_that_have_them(
    options: Dict[str, Any], flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = facts_of("Mixtral-8x7B")
    require_known_ways("m", facts, (0, 32, 0), ServeOptions(device="gpu", **options))
    monkeypatch.setattr("hfship.serve.parallel.knows_flag", lambda _, name: name != flag)
    on_cpu = ServeOptions(device="cpu", **options)
    on_gpu = ServeOptions(device="gpu", **options)
    if not flag:
        require_known_ways("m", facts, (0, 32, 0), on_cpu)
        require_known_ways("m", facts, (0, 32, 0), on_gpu)
        return
    with pytest.raises(UsageError, match=f"{flag} is for GPUs"):
        require_known_ways("m", facts, (0, 32, 0), on_cpu)
    with pytest.raises(HostError, match=f"{flag} cannot be used") as caught:
        require_known_ways("m", facts, (0, 8, 3), on_gpu)
    assert "vLLM 0.8.3 does not know it" in caught.value.why


def test_what_else_was_asked_for_stays_in_the_advice_about_experts() -> None:
    options = ServeOptions(
        enable_expert_parallel=True,
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        data_parallel_size=4,
    )
    with pytest.raises(UsageError, match="makes no sense here") as caught:
        require_known_ways("m", facts_of("Qwen3-8B"), (0, 32, 0), options)
    assert caught.value.next_step == (
        "hfship serve m --tensor-parallel-size 2 --pipeline-parallel-size 3 --data-parallel-size 4"
    )


@pytest.mark.parametrize(
    "count, options, with_stages, expected",
    [
        (4, {}, False, [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)]),
        (4, {}, True, [(1, 2, 1), (1, 3, 1), (2, 2, 1), (1, 4, 1)]),
        (4, {"tensor_parallel_size": 2}, False, [(2, 1, 1)]),
        (4, {"tensor_parallel_size": 8}, False, []),
        (4, {"pipeline_parallel_size": 2}, False, [(1, 2, 1), (2, 2, 1)]),
        (4, {"pipeline_parallel_size": 2}, True, []),
        (4, {"data_parallel_size": 2}, False, [(1, 1, 2), (2, 1, 2)]),
        (2, {"wanted_concurrency": 2}, False, [(1, 1, 1), (1, 1, 2), (2, 1, 1)]),
        (2, {"wanted_concurrency": 1}, False, [(1, 1, 1), (2, 1, 1)]),
    ],
)
def test_splits_come_with_the_fewest_gpus_first(
    count: int, options: Dict[str, Any], with_stages: bool, expected: List[Any]
) -> None:
    found = splits(facts_of("Qwen3-8B"), count, ServeOptions(**options), with_stages)
    assert [(split.tp, split.pp, split.dp) for split in found] == expected


def test_of_a_model_with_experts_copies_come_last() -> None:
    found = splits(facts_of("Mixtral-8x7B"), 2, ServeOptions(wanted_concurrency=2), False)
    assert [(split.tp, split.dp) for split in found] == [(1, 1), (2, 1), (1, 2)]


def test_the_smallest_gpu_decides_and_an_a100_by_its_name() -> None:
    (large,), (small,) = assumed_gpus("1x80GB"), assumed_gpus("1x24GB")
    assert kind_of([large, small]) == GpuKind(small.total)
    named = replace(small, name="NVIDIA A100-SXM4-40GB")
    assert kind_of([large, named]) == GpuKind(small.total, small_batches=True)


def test_gpus_that_stay_idle_are_for_other_models_where_they_hold_nothing_more() -> None:
    facts, gpus = facts_of("Qwen3-8B"), assumed_gpus("2xH100")
    found = Fit(Split(), kv=1 << 30, length=1 << 30)  # longer than any other split holds
    assert idle_advice("m", facts, gpus, found, ServeOptions()) == "GPU 1: for other models"
    assert idle_advice("m", facts, gpus[:1], found, ServeOptions()) == ""
    slices = [replace(gpu, slice=f"0:{index}") for index, gpu in enumerate(gpus)]
    said = idle_advice("m", facts, slices, found, ServeOptions())
    assert said == "GPU 0:1: for other models, a slice serves one alone"


def test_requests_that_are_too_many_are_refused_with_the_number_that_fits() -> None:
    with pytest.raises(HostError) as caught:
        plan("Qwen3-8B", "1xH100", wanted_concurrency=1000, max_model_len=40960)
    found = re.search(r"--concurrency (\d+) --max-model-len 40960", caught.value.next_step)
    assert found, caught.value.next_step
    count = int(found[1])
    assert plan("Qwen3-8B", "1xH100", wanted_concurrency=count, max_model_len=40960)
    with pytest.raises(HostError):
        plan("Qwen3-8B", "1xH100", wanted_concurrency=count + 1, max_model_len=40960)


@pytest.mark.parametrize("held", [0, 50 << 30])
def test_a_share_that_is_too_small_is_refused_with_the_least_that_does(held: int) -> None:
    """As far as others leave it."""
    (gpu,) = assumed_gpus("1xH100")
    host = Host((replace(gpu, used=held),))
    options = ServeOptions(device="gpu", gpu_memory_utilization=0.1)
    with pytest.raises(HostError) as caught:
        make_plan("m", "/m", facts_of("Qwen3-8B"), host, IMAGE, options)
    found = re.search(r"--gpu-memory-utilization (0\.\d+)", caught.value.next_step)
    assert found, caught.value.next_step
    least = float(found[1])
    wanted = replace(options, gpu_memory_utilization=least)
    assert make_plan("m", "/m", facts_of("Qwen3-8B"), host, IMAGE, wanted)
    less = replace(options, gpu_memory_utilization=least - 0.05)
    with pytest.raises(HostError):
        make_plan("m", "/m", facts_of("Qwen3-8B"), host, IMAGE, less)
