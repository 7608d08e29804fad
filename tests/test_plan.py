"""Plans: facts and a host in, a plan or a refusal that names what works out. No docker, no GPU."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any, Dict, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.base.errors import HostError, UsageError
from hfship.base.text import GIB
from hfship.serve.cards import assumed_gpus
from hfship.serve.facts import MOST_LENGTH, ModelFacts, facts_from_config
from hfship.serve.fit import (
    LEAST_LENGTH,
    LENGTH_STEP,
    Fit,
    GpuKind,
    as_loaded,
    batch_limits,
    kv_bytes,
    kv_width,
)
from hfship.serve.gpus import gpu_pools, parse_nvidia_smi, with_claims
from hfship.serve.images import choose_device, choose_image, parse_images, require_capability
from hfship.serve.parallel import sizing, smallest_gpu
from hfship.serve.plan import (
    PORTS,
    choose_dtype,
    choose_port,
    concurrent_requests,
    context_length,
    environment,
    make_plan,
    plan_warnings,
    requests_at_a_time,
    require_supported,
    vllm_arguments,
    vllm_settings,
)
from hfship.serve.split_rules import Split, split_problem
from hfship.serve.terms import Gpu, Host, Image, Plan, ServeOptions, Version
from hfship.serve.vllm import flag_warnings, refuse_own_flags
from test_facts import CONFIGS, facts_of

IMAGE = Image("vllm/vllm-openai:v0.27.1", "sha256:1", (0, 27, 1), cuda="13.0.1")
H200 = (
    "0, GPU-00000000-0000-4000-8000-000000000000, NVIDIA H200, 143771, 0, 9.0, 580.159.04, Disabled"
)


def gpus(spec: str, **fields: Any) -> Tuple[Gpu, ...]:
    return tuple(replace(gpu, **fields) for gpu in assumed_gpus(spec))


def plan(name: str, spec: str, image: Image = IMAGE, **options: Any) -> Plan:
    host = Host(gpus(spec))
    return make_plan(name, "/m", facts_of(name), host, image, ServeOptions(device="gpu", **options))


def plan_of(facts: ModelFacts, spec: str) -> Plan:
    return make_plan("m", "/m", facts, Host(gpus(spec)), IMAGE, ServeOptions(device="gpu"))


def refusal(name: str, spec: str, **options: Any) -> HostError:
    with pytest.raises(HostError) as caught:
        plan(name, spec, **options)
    return caught.value


@pytest.mark.parametrize(
    "name, spec, options, tp, length",
    [
        ("Qwen3-8B", "1x80GB", {}, 1, 40960),
        ("Qwen3-8B", "8x80GB", {}, 1, 40960),  # spare GPUs are for replicas
        ("Qwen3-8B", "1x24GB", {}, 1, 18432),  # shortened to what fits
        ("Qwen3-8B", "2x24GB", {}, 2, 40960),
        ("Qwen3-8B", "1x24GB", {"max_num_seqs": 64}, 1, 19456),
        ("Qwen3-8B", "1x24GB", {"kv_cache_dtype": "fp8"}, 1, 36864),
        ("Qwen3-8B", "1x24GB", {"max_model_len": 8192}, 1, 8192),
        ("Qwen3-8B", "4x80GB", {"tensor_parallel_size": 4}, 4, 40960),
        ("Qwen2.5-7B", "8x48GB", {}, 1, 32768),
        ("Llama-3.1-70B", "8x80GB", {}, 4, 131072),
        ("Llama-3.1-70B", "2x150GB", {}, 2, 131072),
        ("Mixtral-8x7B", "4x80GB", {}, 2, 32768),
        ("DeepSeek-V3", "8x150GB", {}, 8, 163840),
        ("gpt-oss-120b", "1xH100", {}, 1, 35840),  # vLLM pads MXFP4 by some 9 %
        ("gpt-oss-120b", "2x80GB", {}, 2, 131072),
        ("gpt-oss-120b", "2x80GB", {"max_model_len": 131072}, 2, 131072),
        ("Qwen3-30B-A3B-FP8", "8x48GB", {}, 1, 40960),
        ("Qwen2.5-72B-AWQ", "2x48GB", {}, 2, 32768),
    ],
)
def test_smallest_split_that_holds_a_useful_context(
    name: str, spec: str, options: Dict[str, Any], tp: int, length: int
) -> None:
    found = plan(name, spec, **options)
    assert (found.tensor_parallel_size, found.max_model_len) == (tp, length)
    assert len(found.gpus) == tp and found.concurrency >= 1


@pytest.mark.parametrize(
    "name, tp, problem",
    [
        ("Llama-3.1-70B", 3, "64 attention heads"),
        ("Qwen2.5-7B", 8, "28 attention heads"),
        ("Qwen2.5-7B", 7, "4 KV heads cannot be spread over 7"),
        ("Qwen2.5-7B", 4, ""),
        ("Qwen3-8B", 16, ""),  # KV heads are replicated
        ("DeepSeek-V3", 16, ""),
        ("DeepSeek-V3", 32, "18432 channels over 32 GPUs cut through the 128-wide FP8 blocks"),
        ("Qwen3-30B-A3B-FP8", 2, ""),
        ("Qwen3-30B-A3B-FP8", 8, "768 channels over 8 GPUs cut through the 128-wide FP8 blocks"),
        (
            "Qwen2.5-72B-AWQ",
            8,
            "",
        ),  # padded by its makers so that it splits: the original's 29568 does not
        ("Qwen2.5-72B-AWQ", 16, "29696 channels over 16 GPUs cut through awq's groups of 128"),
        ("gpt-oss-120b", 8, ""),
    ],
)
def test_splits_obey_vllms_divisibility_rules(name: str, tp: int, problem: str) -> None:
    found = split_problem(facts_of(name), Split(tp))
    assert problem in found and bool(problem) == bool(found)


def test_fp8_blocks_bind_the_kv_heads_too() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    facts = facts_of("Qwen3-8B", head_dim=64, quantization_config=fp8)
    assert split_problem(facts, Split(4)) == ""
    problem = split_problem(facts, Split(8))
    assert "64 rows of KV heads per GPU cut through the 128-wide FP8 blocks" in problem


@pytest.mark.parametrize(
    "name, spec, options, said",
    [
        (
            "Llama-3.1-70B",
            "3x80GB",
            {"tensor_parallel_size": 3},
            ["64 attention heads", "--tensor-parallel-size 1 --pipeline-parallel-size 3"],
        ),
        ("Llama-3.1-70B", "2x80GB", {}, ["TP=2: 72.7 GB of weights", "4 such GPUs"]),
        (
            "Llama-3.1-70B",
            "1x24GB",
            {},
            ["what works", "8 such GPUs (--tensor-parallel-size 8, 7168 tokens)"],
        ),
        (
            "Qwen3-8B",
            "1x24GB",
            {"max_model_len": 40960},
            ["holds 18432 tokens", "--max-model-len 18432", "2 such GPUs"],
        ),
        ("Qwen3-8B", "2x80GB", {"tensor_parallel_size": 4}, ["there are only 2 free GPUs"]),
        (
            "Qwen3-8B",
            "1x80GB",
            {"max_model_len": 50000},
            ["made for 40960", "VLLM_ALLOW_LONG_MAX_MODEL_LEN"],
        ),
        ("Qwen3-8B", "1x16GB", {}, ["2 such GPUs (--tensor-parallel-size 2"]),
    ],
)
def test_refusal_names_the_nearest_plan_that_works(
    name: str, spec: str, options: Dict[str, Any], said: list
) -> None:
    error = refusal(name, spec, **options)
    for text in said:
        assert text in error.text()
    assert name in error.what


def test_advice_beyond_this_machine_names_gpus_that_do() -> None:
    """No number of such small GPUs holds the model: the GPUs that the refusal names instead do."""
    text = refusal("DeepSeek-V3", "1x24GB").next_step
    count, name = text.replace("what works: ", "").split(" x ")
    assert plan("DeepSeek-V3", f"{count}x{name.split()[0]}").max_model_len >= LEAST_LENGTH


def test_float32_of_a_16_bit_model_takes_twice_the_room() -> None:
    assert (
        plan("Qwen3-8B", "1x80GB").weight_bytes * 2
        == plan("Qwen3-8B", "1x80GB", dtype="float32").weight_bytes
    )
    assert "2 such GPUs" in refusal("Qwen3-8B", "1x32GB", dtype="float32").text()


def test_context_beyond_the_models_own_must_fit_too() -> None:
    insist = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    assert plan("Qwen3-8B", "1x80GB", max_model_len=131072, env=insist).max_model_len == 131072
    assert "such GPUs" in refusal("Qwen3-8B", "1x32GB", max_model_len=131072, env=insist).text()


@pytest.mark.parametrize("spec", ["", "x", "2x", "0x80GB", "2xH999", "80GB", "2 x 80GB"])
def test_gpus_to_assume_that_make_no_sense(spec: str) -> None:
    with pytest.raises(UsageError):
        assumed_gpus(spec)


def test_gpus_to_assume_by_their_name() -> None:
    card = assumed_gpus("2xH200")[1]
    assert (card.index, card.total, card.capability) == (1, 143771 << 20, (9, 0))


def test_plan_named_in_a_refusal_works() -> None:
    assert plan("Qwen3-8B", "1x24GB", max_model_len=18432).max_model_len == 18432


@given(
    st.sampled_from(["Qwen3-8B", "Llama-3.1-70B", "gpt-oss-120b", "DeepSeek-V3"]),
    st.integers(1, 8),
    st.integers(4, 300),
)
def test_every_plan_fits(name: str, count: int, gigabytes: int) -> None:
    """What a plan promises is in the memory that it counts with: weights, working memory and one full request."""
    try:
        found = plan(name, f"{count}x{gigabytes}GB")
    except HostError as error:
        assert "what works" in error.next_step
        return
    facts = facts_of(name)
    split = Split(found.tensor_parallel_size, found.pipeline_parallel_size)
    assert split_problem(facts, split) == ""
    in_flight = batch_limits(GpuKind(gigabytes * 10**9))[0]
    request = kv_bytes(facts, split, found.max_model_len, 2, in_flight)
    assert request <= found.kv_bytes
    held = facts.weight_bytes / split.gpus + found.kv_bytes
    assert held < gigabytes * 10**9 * found.gpu_memory_utilization


def test_same_input_same_plan() -> None:
    assert plan("Llama-3.1-70B", "8x80GB") == plan("Llama-3.1-70B", "8x80GB")


# ---- nvidia-smi ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (H200, [("NVIDIA H200", 143771 << 20, 0, (9, 0), False)]),
        (H200.replace("Disabled", "Enabled"), [("NVIDIA H200", 143771 << 20, 0, (9, 0), True)]),
        ("1, GPU-2, NVIDIA GB10, [N/A], [N/A], 12.1, 580.95, [N/A]", [("NVIDIA GB10", 0, 0, (12, 1), False)]),
        ("0, GPU-1, Tesla V100, 16384, 12, [Not Supported], 535.1, [N/A]", [("Tesla V100", 16384 << 20, 12 << 20, (0, 0), False)]),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", []),
        ("No devices were found", []),
        (f"Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error\n{H200}", [("NVIDIA H200", 143771 << 20, 0, (9, 0), False)]),
        ("", []),
    ],
)  # fmt: skip
def test_nvidia_smi_lines(text: str, expected: list) -> None:
    found = parse_nvidia_smi(text)
    assert [(g.name, g.total, g.used, g.capability, g.mig) for g in found] == expected


@given(st.text(alphabet="0123456789,. []N/AGPU-²٣\n", max_size=80) | st.text(max_size=80))
def test_no_output_of_nvidia_smi_breaks_the_parser(text: str) -> None:
    parse_nvidia_smi(text)


# ---- GPUs ----------------------------------------------------------------------------


def host(*changes: Dict[str, Any], spec: str = "4x80GB") -> Host:
    cards = [replace(g, name="NVIDIA H100", uuid=f"GPU-{g.index}") for g in assumed_gpus(spec)]
    for index, change in enumerate(changes):
        cards[index] = replace(cards[index], **change)
    return Host(tuple(cards))


BUSY = {"used": 60 * 10**9}


@pytest.mark.parametrize(
    "changes, options, own, indexes, warning",
    [
        ([], {}, (), [0, 1, 2, 3], ""),
        (
            [BUSY],
            {},
            (),
            [1, 2, 3],
            "GPU 0 (NVIDIA H100, 80.0 GB) is in use (60.0 GB) and is left out",
        ),
        ([BUSY], {}, ("GPU-0",), [0, 1, 2, 3], ""),  # its own memory
        ([{}, {}, BUSY], {}, ("GPU-2",), [2, 0, 1, 3], ""),  # keeps the GPU it has
        ([{"mig": True}], {}, (), [1, 2, 3], "MIG"),
        ([{"name": "NVIDIA L4", "total": 24 * 10**9}], {}, (), [1, 2, 3], "differs"),
        ([], {"gpus": ("2", "GPU-1")}, (), [1, 2], ""),
        ([{"used": 2 * GIB}], {"gpus": ("0",)}, (), [0], "already has 2.1 GB"),
        ([BUSY], {"gpus": ("0",), "gpu_memory_utilization": 0.2}, (), [0], "already has 60.0 GB"),
        ([], {"gpus": ("0", "0", "GPU-0")}, (), [0], ""),  # one GPU, named three times
    ],
)
def test_gpus_that_may_be_used(
    changes: list, options: Dict[str, Any], own: tuple, indexes: list, warning: str
) -> None:
    pool, warnings = gpu_pools(host(*changes), ServeOptions(**options), own)[0]
    assert [g.index for g in pool] == indexes
    assert warning in " ".join(warnings) and bool(warning) == bool(warnings)


@pytest.mark.parametrize(
    "changes, options, error, said",
    [
        ([BUSY] * 4, {}, HostError, "--gpu-memory-utilization 0.22"),
        ([BUSY], {"gpus": ("0", "1")}, HostError, "a GPU is not free"),
        ([{"mig": True}] * 4, {}, HostError, "nvidia-smi -mig 0"),
        ([], {"gpus": ("7",)}, UsageError, "names no GPU"),
        ([], {"gpus": ("GPU-",)}, UsageError, "names no GPU"),
    ],
)
def test_gpus_that_may_not_be_used(
    changes: list, options: Dict[str, Any], error: type, said: str
) -> None:
    with pytest.raises(error) as caught:
        gpu_pools(host(*changes), ServeOptions(**options))[0]
    assert said in caught.value.text()


def test_gpu_of_a_deployment_that_still_loads_is_taken() -> None:
    loading = replace(plan("Qwen3-8B", "1x80GB"), gpus=("GPU-0",))
    claimed = with_claims(host().gpus, [loading])
    pool, _ = gpu_pools(replace(host(), gpus=claimed), ServeOptions())[0]
    assert [g.index for g in pool] == [1, 2, 3]


# ---- images --------------------------------------------------------------------------


def images(*names: str) -> Tuple[Image, ...]:
    rows = [name.rsplit(":", 1) for name in names]
    lines = [
        f'{{"Repository": "{r}", "Tag": "{t}", "ID": "sha256:{i}"}}'
        for i, (r, t) in enumerate(rows)
    ]
    return parse_images("\n".join(lines))


GPU_IMAGES = images(
    "vllm/vllm-openai:v0.8.3", "vllm/vllm-openai:v0.27.1-cu129", "vllm/vllm-openai:v0.27.1", "vllm/vllm-openai:latest",
    "reg.site:5000/ai/vllm-openai:v0.27.1", "vllm/vllm-openai-rocm:v0.30.0", "vllm/vllm-openai:<none>", "redis:7",
    "vllm/vllm-openai-cpu:v0.31.0",
)  # fmt: skip


@pytest.mark.parametrize(
    "wanted, device, expected",
    [
        (None, "gpu", "vllm/vllm-openai:v0.27.1"),
        (None, "cpu", "vllm/vllm-openai-cpu:v0.31.0"),
        ("vllm/vllm-openai:v0.8.3", "gpu", "vllm/vllm-openai:v0.8.3"),
        ("vllm/vllm-openai", "gpu", "vllm/vllm-openai:latest"),
        ("sha256:1", "gpu", "vllm/vllm-openai:v0.27.1-cu129"),
        ("vllm/vllm-openai:v1.0.0", "gpu", None),
    ],
)
def test_image_is_the_newest_one_for_the_device(wanted: str, device: str, expected: str) -> None:
    if expected is None:
        with pytest.raises(HostError, match="docker has no image"):
            choose_image(GPU_IMAGES, wanted, device)
    else:
        assert choose_image(GPU_IMAGES, wanted, device).reference == expected


@pytest.mark.parametrize("name", ["base:1", "redis:7", "vllm/vllm-openai-rocm:v0.30.0"])
def test_no_image_says_which_to_bring(name: str) -> None:
    with pytest.raises(HostError) as caught:
        choose_image(images(name), None, "gpu")
    assert "hfship unpack" in caught.value.next_step


@pytest.mark.parametrize(
    "has_gpu, names, device, expected",
    [
        (True, ["vllm/vllm-openai:v0.27.1"], "auto", "gpu"),
        (True, ["vllm/vllm-openai-cpu:v0.27.1"], "auto", "gpu"),
        (False, ["vllm/vllm-openai:v0.27.1-cpu"], "auto", "cpu"),
        (False, ["vllm/vllm-openai:v0.27.1", "vllm/vllm-openai-cpu:v0.27.1"], "auto", None),
        (False, [], "auto", None),
        (False, [], "cpu", "cpu"),
        (False, ["vllm/vllm-openai-cpu:v0.27.1"], "gpu", None),
    ],
)
def test_cpu_only_when_asked_for_or_nothing_else_is_meant(
    has_gpu: bool, names: list, device: str, expected: str
) -> None:
    machine = Host(gpus("1x80GB") if has_gpu else (), images(*names))
    options = ServeOptions(device=device)
    if expected is None:
        with pytest.raises(HostError, match="no GPU"):
            choose_device(options, machine)
    else:
        assert choose_device(options, machine) == expected


# ---- CPU, ports, warnings ------------------------------------------------------------


def test_cpu_plan_sets_the_cache_and_no_gpu() -> None:
    machine = Host(memory=64 * GIB)
    options = ServeOptions(device="cpu")
    found = make_plan("Qwen3-8B", "/m", facts_of("Qwen3-8B"), machine, IMAGE, options)
    assert found.device == "cpu" and found.gpus == ()
    assert found.env["VLLM_CPU_KVCACHE_SPACE"] == str(found.kv_bytes // GIB) == "23"
    with pytest.raises(HostError, match="RAM"):
        make_plan("Qwen3-8B", "/m", facts_of("Qwen3-8B"), Host(memory=GIB), IMAGE, options)


TWELVE = tuple(str(index) for index in range(12))


def test_every_option_reaches_the_plan() -> None:
    options = ServeOptions(
        served_names=("a", "b"), image=IMAGE.reference, device="gpu", gpus=TWELVE, tensor_parallel_size=2,
        pipeline_parallel_size=3, data_parallel_size=2, enable_expert_parallel=True, wanted_concurrency=4,
        gpu_memory_utilization=0.7, max_model_len=4096, max_num_seqs=9, dtype="half", kv_cache_dtype="fp8",
        trust_remote_code=True, bind="0.0.0.0", port=8765, shm_size="3gb", ready_timeout_s=4321, env={"A": "b"},
        extra_args=("--enforce-eager",), aliases=("b",), allow_changed=("config.json",), key="/k.pem",
        no_tools=True, chat_template="/t.jinja", lora=("a=/a",), mounts=("/data",), wishes={"port": 8765},
    )  # fmt: skip
    asked, plain = asdict(options), asdict(ServeOptions())
    assert [key for key in asked if asked[key] == plain[key]] == []
    machine = Host(gpus("14x80GB"))
    found = asdict(make_plan("m", "/m", facts_of("Mixtral-8x7B"), machine, IMAGE, options))
    assert found["env"].pop("A") == "b" and asked.pop("env")
    asked["gpus"] = tuple(gpu.uuid for gpu in machine.gpus[:12])
    assert {key: found[key] for key in asked} == asked


@pytest.mark.parametrize(
    "wanted, previous, taken, expected",
    [
        (None, None, {8000}, 8001),
        (9000, None, set(), 9000),
        (None, 8007, {8000}, 8007),
        (None, 8000, {8000}, 8001),
    ],
)
def test_port(wanted: Any, previous: Any, taken: set, expected: int) -> None:
    assert choose_port("m", wanted, previous, taken) == expected


def test_taken_port_is_named() -> None:
    with pytest.raises(HostError, match="port 8000 is taken"):
        choose_port("m", 8000, None, {8000})


@pytest.mark.parametrize(
    "model, facts, options, card, warning",
    [
        ("Qwen3-8B", {"chat_template": False}, {}, {}, "no chat template"),
        ("Qwen3-8B", {"pickled": True}, {}, {}, "pickles"),
        ("DeepSeek-V3", {}, {}, {}, "needs --trust-remote-code"),
        (
            "Qwen3-8B",
            {"remote_code": ("o/r--m.C",)},
            {"trust_remote_code": True},
            {},
            "code of another repository",
        ),
        ("gpt-oss-120b", {}, {}, {}, "o200k_base.tiktoken"),
        ("Qwen3-8B", {}, {}, {"driver": "535.104.05"}, "the driver 535.104.05 is older"),
        ("Qwen3-8B", {"heads": 0, "kv_heads": 0, "head_dim": 0}, {}, {}, "is a guess"),
    ],
)
def test_warnings(
    model: str, facts: Dict[str, Any], options: Dict[str, Any], card: Dict[str, Any], warning: str
) -> None:
    shape = replace(facts_of(model), **facts)
    machine = Host(gpus("8x150GB", **card))
    found = make_plan(model, "/m", shape, machine, IMAGE, ServeOptions(device="gpu", **options))
    assert warning in " ".join(found.warnings) and len(found.warnings) == 1


def test_drivers_are_named_in_the_same_order_every_time() -> None:
    versions = ["535.104.05", "470.57.02", "525.60.13", "550.54.15"]
    machine = Host(tuple(replace(g, driver=v) for g, v in zip(gpus("4x80GB"), versions)))
    options = ServeOptions(device="gpu", tensor_parallel_size=4)
    found = make_plan("m", "/m", facts_of("Qwen3-8B"), machine, IMAGE, options)
    assert f"the driver {', '.join(sorted(versions))} is older" in found.warnings[-1]


@pytest.mark.parametrize(
    "model, capability, version, cuda, said",
    [
        ("Qwen3-30B-A3B-FP8", (7, 5), (0, 8, 3), "12.4.0", "fp8 needs compute capability 8.0"),
        ("Qwen3-30B-A3B-FP8", (7, 5), (0, 27, 1), "12.9.1", None),  # Marlin came down to Turing
        ("Qwen3-30B-A3B-FP8", (7, 0), (0, 27, 1), "12.9.1", "fp8 needs compute capability 7.5"),
        ("gpt-oss-120b", (7, 5), (0, 27, 1), "13.0.1", "mxfp4 needs compute capability 8.0"),
        ("Qwen2.5-72B-AWQ", (7, 0), (0, 27, 1), "12.9.1", "awq needs compute capability 7.5"),
        ("Qwen3-8B", (6, 1), (0, 8, 3), "12.4.0", "vLLM needs compute capability 7.0"),
        ("Qwen3-8B", (7, 0), (0, 27, 1), "13.0.1", "CUDA 13 needs compute capability 7.5"),
        ("Qwen3-8B", (7, 0), (0, 27, 1), "", None),  # what is not known is not refused
        ("Qwen3-8B", (10, 0), (0, 8, 3), "12.4.0", "needs CUDA 12.8"),
        ("Qwen3-8B", (10, 0), (0, 27, 1), "13.0.1", None),
        ("Qwen3-8B", (0, 0), (0, 27, 1), "13.0.1", None),
    ],
)
def test_gpu_that_image_or_quantisation_cannot_use_is_refused(
    model: str, capability: tuple, version: tuple, cuda: str, said: Any
) -> None:
    machine, image = (
        Host(gpus("8x150GB", capability=capability)),
        replace(IMAGE, version=version, cuda=cuda),
    )
    options = ServeOptions(device="gpu")
    if said is None:
        assert make_plan(model, "/m", facts_of(model), machine, image, options).gpus
        return
    with pytest.raises(HostError) as caught:
        make_plan(model, "/m", facts_of(model), machine, image, options)
    assert said in caught.value.why and model in caught.value.what and caught.value.next_step


def test_old_gpu_computes_in_float16() -> None:
    machine = Host(gpus("1x80GB", capability=(7, 5)))
    options = ServeOptions(device="gpu")
    assert make_plan("m", "/m", facts_of("Qwen3-8B"), machine, IMAGE, options).dtype == "float16"


@pytest.mark.parametrize(
    "argument, version, said",
    [
        ("--enable-reasoning", (0, 27, 1), "write --reasoning-parser NAME alone"),
        ("--swap-space=4", (0, 27, 1), "vLLM has it up to 0.17.1"),
        ("--runner", (0, 8, 3), "vLLM has it from 0.10.1 on"),
        ("--max_num_queued_reqs=5", (0, 8, 3), "vLLM has it from 0.29.0 on"),
        ("--enforce-eagre", (0, 27, 1), "did you mean --enforce-eager?"),
        ("--no-such-thing-at-all", (0, 27, 1), "does not know --no-such-thing-at-all"),
        ("--task", (0, 8, 3), None),
        ("--model-loader-extra-config", (0, 8, 3), None),
        ("--no-enable-prefix-caching", (0, 27, 1), None),
        ("--compilation-config.mode=3", (0, 27, 1), None),
        ("--enforce-eag", (0, 27, 1), None),  # argparse takes the beginning of one option
    ],
)
def test_of_a_flag_that_the_image_does_not_know_is_warned(
    argument: str, version: tuple, said: str
) -> None:
    """Never refused: an image may have been patched."""
    warnings = list(flag_warnings([argument], version))
    if said is None:
        assert not warnings
    else:
        assert len(warnings) == 1 and said in warnings[0]
    image = replace(IMAGE, version=version)
    options = ServeOptions(device="gpu", extra_args=(argument,))
    machine = Host(gpus("1x80GB"))
    made = make_plan("m", "/m", facts_of("Qwen3-8B"), machine, image, options)
    assert set(warnings) <= set(made.warnings)


@pytest.mark.parametrize(
    "argument",
    [
        "--api-key=sk-1",
        "--api_key=sk-1",
        "--api-k=sk-1",
        "--port",
        "--host",
        "--served-model-name",
        "-tp=2",
        "--pipeline-parallel-size=3",
        "--pipeline-par",
        "-dp",
        "--enable_expert_parallel",
    ],
)
def test_flags_that_are_hfships_own_are_refused(argument: str) -> None:
    """A key would lie in docker-compose.yml and in the process list; a name or port of one's own breaks the proof."""
    with pytest.raises(UsageError) as caught:
        refuse_own_flags([argument])
    assert "sk-1" not in caught.value.text()


def test_sizing_tells_what_to_buy() -> None:
    rows = sizing(facts_of("Llama-3.1-70B"), ServeOptions())
    assert [row[0] for row in rows] == ["TP=1", "TP=2", "TP=4", "TP=8"]
    assert "H100 80 GB" in rows[2][3]


def test_a_context_that_no_machine_holds_costs_no_time() -> None:
    endless = replace(facts_of("Llama-3.1-70B"), max_length=MOST_LENGTH)
    found = plan_of(endless, "8x80GB")
    assert found.max_model_len > 131072 and found.max_model_len % LENGTH_STEP == 0
    assert sizing(endless, ServeOptions())[0][3] == "-"


@pytest.mark.parametrize("options, short", [({}, 8192), ({"max_model_len": 1000}, 1000)])
def test_sizing_tells_of_a_short_context_and_of_the_full_one(
    options: Dict[str, Any], short: int
) -> None:
    facts, wanted = facts_of("Llama-3.1-70B"), ServeOptions(**options)
    full = wanted.max_model_len or facts.max_length
    for row, tp in zip(sizing(facts, wanted), (1, 2, 4, 8)):
        assert row[2:] == [smallest_gpu(facts, Split(tp), n, wanted) for n in (short, full)]
    assert options or any(row[2] != row[3] for row in sizing(facts, wanted))


def test_a_model_whose_requests_take_no_cache_has_no_count_of_them() -> None:
    no_layers = replace(facts_of("Qwen3-8B"), full_layers=0, window_layers=0)
    cards, options = gpus("1x80GB"), ServeOptions()
    assert concurrent_requests(no_layers, Fit(Split(), "", GIB, 4096), cards, 4096, options) == 0


@pytest.mark.parametrize("requests, said", [(0.26, 0.3), (9.96, 10.0), (10.4, 10.0), (99.6, 100.0)])
def test_requests_at_once_are_told_to_a_tenth_and_from_ten_on_whole(
    requests: float, said: float
) -> None:
    facts, options = facts_of("Qwen3-8B"), ServeOptions()
    cache = int(requests * kv_bytes(facts, Split(), 4096, 2))
    found = Fit(Split(), "", cache, 4096)
    assert concurrent_requests(facts, found, gpus("1x80GB"), 4096, options) == said


def test_sizing_names_no_gpu_that_cannot_run_the_model() -> None:
    """Eight T4 would hold it, but MXFP4 needs compute capability 8.0."""
    rows = sizing(facts_of("gpt-oss-120b"), ServeOptions())
    assert rows[3][2] == "L4 24 GB"


def test_mistrals_own_layout_is_told_to_vllm() -> None:
    facts = replace(facts_of("Qwen3-8B"), own_tokenizer=True)
    arguments = vllm_arguments(plan_of(facts, "1x80GB"))
    assert "--tokenizer-mode" in arguments and "--load-format" not in arguments
    arguments = vllm_arguments(plan_of(replace(facts, own_layout=True), "1x80GB"))
    for flag in ("--tokenizer-mode", "--config-format", "--load-format"):
        assert arguments[arguments.index(flag) + 1] == "mistral"


# -- states of Mamba and its kin

QWEN3_NEXT_STATES = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip


def hybrid(version: Version, spec: str, **options: Any) -> Plan:
    facts = facts_of("Qwen3-Next-80B", **QWEN3_NEXT_STATES)
    image = replace(IMAGE, reference="vllm", version=version)
    wanted = ServeOptions(device="gpu", **options)
    return make_plan("m", "/m", facts, Host(gpus(spec)), image, wanted)


def test_no_more_requests_at_a_time_than_states_from_0_20() -> None:
    before = hybrid((0, 19, 1), "2x100GB")
    assert before.max_num_seqs == 0
    after = hybrid((0, 20, 0), "2x100GB")
    block = 12 * 544 * 1024  # 12 layers in a group, a KV head of 256 keys and values each
    assert 0 < after.max_num_seqs == after.kv_bytes // block - 1 < 1024
    arguments = vllm_arguments(after)
    at = arguments.index("--max-num-seqs")
    assert arguments[at + 1] == str(after.max_num_seqs)


def test_more_requests_at_a_time_than_states_take_more_gpus_or_are_refused() -> None:
    few = hybrid((0, 32, 0), "8xH100", max_num_seqs=10)
    many = hybrid((0, 32, 0), "8xH100", max_num_seqs=9000)
    assert many.tensor_parallel_size > few.tensor_parallel_size
    with pytest.raises(HostError) as caught:
        hybrid((0, 32, 0), "4xH100", max_num_seqs=20_000)
    assert "hold the states of" in caught.value.why
    named = re.search(r"--tensor-parallel-size 4 --max-num-seqs (\d+)", caught.value.next_step)
    assert named
    works = hybrid((0, 32, 0), "4xH100", tensor_parallel_size=4, max_num_seqs=int(named[1]))
    assert works.max_num_seqs == int(named[1])


LONGROPE = {
    "rope_scaling": {"type": "longrope"}, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def test_longrope_is_as_long_as_vllm_takes_it_and_longer_when_asked() -> None:
    facts = facts_of("Qwen3-8B", **LONGROPE)
    made = plan_of(facts, "1x80GB")
    assert made.max_model_len == 4096
    assert "for all of it --max-model-len 131072" in str(made.warnings)
    options = ServeOptions(device="gpu", max_model_len=131072)
    longer = make_plan("m", "/m", facts, Host(gpus("1x80GB")), IMAGE, options)
    assert longer.max_model_len == 131072


def test_a_model_that_tells_no_length_has_vllms_own() -> None:
    config = {**CONFIGS["Qwen3-8B"]}
    del config["max_position_embeddings"]
    facts = facts_from_config(config, {"BF16": 16 * 10**9})
    assert plan_of(facts, "1x80GB").max_model_len == 2048


@pytest.mark.parametrize(
    "vision, tp, problem",
    [
        ({"num_heads": 12}, 8, "12 heads of the vision encoder"),
        ({"num_heads": 16, "intermediate_size": 3420}, 8, "3420 channels"),
        ({"num_heads": 16, "intermediate_size": 3420}, 4, ""),
        ({"num_attention_heads": 25, "model_type": "intern_vit_6b"}, 8, ""),
        ({"num_attention_heads": 12, "model_type": "gemma4_vision"}, 8, ""),
    ],
)
def test_the_encoder_of_images_must_divide_too(vision: dict, tp: int, problem: str) -> None:
    said = split_problem(facts_of("Qwen3-8B", vision_config=vision), Split(tp))
    assert problem in said and bool(problem) == bool(said)


# -- what changed from version to version of vLLM

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def loaded(name: str, version: Version, **config: Any) -> ModelFacts:
    return as_loaded(facts_of(name, **config), version, ServeOptions())


def test_yarn_stretches_the_original_length_until_0_29() -> None:
    config = {"max_position_embeddings": 32768, "rope_scaling": YARN}
    assert loaded("Qwen3-8B", (0, 29, 0), **config).max_length == 131072
    newer = loaded("Qwen3-8B", (0, 30, 0), **config)
    assert newer.max_length == 32768
    image = replace(IMAGE, version=(0, 32, 0))
    options = ServeOptions(device="gpu")
    facts = facts_of("Qwen3-8B", **config)
    made = make_plan("m", "/m", facts, Host(gpus("1x80GB")), image, options)
    assert made.max_model_len == 32768 and "YaRN is set for 131072 tokens" in str(made.warnings)
    with pytest.raises(HostError, match="131072 tokens of context"):
        wanted = replace(options, max_model_len=131072)
        make_plan("m", "/m", facts, Host(gpus("1x80GB")), image, wanted)


@pytest.mark.parametrize("name, length", [("gpt-oss-120b", 131072), ("DeepSeek-V3", 163840)])
def test_yarn_of_configs_that_state_the_stretched_length(name: str, length: int) -> None:
    assert {loaded(name, version).max_length for version in ((0, 9, 0), (0, 33, 0))} == {length}


def test_two_batches_are_in_flight_from_0_26() -> None:
    before, after = (loaded("gemma-3-27b", version) for version in ((0, 25, 1), (0, 26, 0)))
    windowed = 52 * 2 * 16 * 128 * 2
    grown = kv_bytes(after, Split(), 131072, 2, 8192) - kv_bytes(before, Split(), 131072, 2, 8192)
    assert grown == 8192 * windowed * 60 // 52  # six groups of the ten that look at all


@pytest.mark.parametrize("version, width", [((0, 13, 0), 2.0), ((0, 14, 0), 1.0)])
def test_fp8_of_the_kv_cache_is_taken_from_the_checkpoint_from_0_14(
    version: Version, width: float
) -> None:
    quant = {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}
    facts = loaded("Qwen3-8B", version, quantization_config=quant)
    assert kv_width(facts, ServeOptions()) == width


@pytest.mark.parametrize(
    "tp, version, problem",
    [
        (8, (0, 28, 0), "768 channels over 8 GPUs cut through the 128-wide FP8 blocks"),
        (8, (0, 29, 0), ""),  # 96 channels: blocks of 32
        (16, (0, 29, 0), "768 channels over 16 GPUs cut through"),  # 48: blocks of 16 are too fine
    ],
)
def test_fp8_blocks_of_experts_are_made_finer_from_0_29(
    tp: int, version: Version, problem: str
) -> None:
    said = split_problem(loaded("Qwen3-30B-A3B-FP8", version), Split(tp))
    assert problem in said and bool(problem) == bool(said)


@pytest.mark.parametrize(
    "architecture, method, version, said",
    [
        ("MPTForCausalLM", "", (0, 32, 0), "may not run MPTForCausalLM: it is there up to 0.28.0"),
        ("LlamaForCausalLM", "bitsandbytes", (0, 32, 0), "may not run bitsandbytes"),
        ("Qwen3_5ForConditionalGeneration", "", (0, 8, 3), "it is there from 0."),
        ("LlamaForCausalLM", "awq", (0, 32, 0), None),
        ("NobodyKnowsThisForCausalLM", "nor_this", (0, 32, 0), None),
    ],
)
def test_what_the_image_dropped_or_has_not_yet_is_said(
    architecture: str, method: str, version: Version, said: str
) -> None:
    quant = {"quantization_config": {"quant_method": method}} if method else {}
    facts = facts_of("Qwen3-8B", architectures=[architecture], **quant)
    image = replace(IMAGE, reference="ours/vllm-openai:patched", version=version)
    options = ServeOptions(device="gpu")
    made = make_plan("m", "/m", facts, Host(gpus("1x80GB")), image, options)
    assert (said is None) == ("may not run" not in str(made.warnings))
    assert said is None or said in str(made.warnings)


@pytest.mark.parametrize(
    "architecture, method, version, said",
    [
        ("MPTForCausalLM", "", (0, 32, 0), "does not run MPTForCausalLM: it is there up to 0.28.0"),
        ("LlamaForCausalLM", "bitsandbytes", (0, 32, 0), "does not run bitsandbytes: it is there"),
        ("Qwen3_5ForConditionalGeneration", "", (0, 8, 3), ""),  # transformers may have it
        ("MPTForCausalLM", "", (0, 32, 7), ""),  # nobody looked at that version
        ("LlamaForCausalLM", "awq", (0, 32, 0), ""),
    ],
)
def test_what_vllms_own_image_surely_does_not_run_is_refused(
    architecture: str, method: str, version: Version, said: str
) -> None:
    quant = {"quantization_config": {"quant_method": method}} if method else {}
    facts = facts_of("Qwen3-8B", architectures=[architecture], **quant)
    image = replace(IMAGE, version=version)
    if not said:
        require_supported("m", facts, image)
        return
    with pytest.raises(HostError) as caught:
        require_supported("m", facts, image)
    assert said in caught.value.why


def test_the_newest_image_that_has_the_model_is_chosen() -> None:
    there = images(
        "vllm/vllm-openai:v0.33.0", "vllm/vllm-openai:v0.27.1", "vllm/vllm-openai:v0.8.3"
    )
    for architecture, expected in (("LlamaForCausalLM", "v0.33.0"), ("MPTForCausalLM", "v0.27.1")):
        assert choose_image(there, None, "gpu", architecture).reference.endswith(expected)


def test_a_tag_of_others_is_not_vllms_version() -> None:
    for reference, version in (
        ("lmcache/vllm-openai:v0.3.12", None),
        ("corp/vllm:0.27.1", None),
        ("registry.corp:5000/vllm/vllm-openai:v0.27.1-cu129", (0, 27, 1)),
    ):
        assert images(reference)[0].version == version


def test_gemma_needs_bfloat16_or_float32() -> None:
    machine = Host(gpus("1x150GB", capability=(7, 5)))
    options = ServeOptions(device="gpu")
    facts = replace(facts_of("gemma-3-27b"), model_type="gemma3")
    with pytest.raises(HostError) as caught:
        make_plan("g", "/m", facts, machine, IMAGE, options)
    assert "float16" in caught.value.why and "--dtype float32" in caught.value.next_step
    assert make_plan("g", "/m", facts, machine, IMAGE, replace(options, dtype="float32"))


def test_sparse_attention_needs_hopper() -> None:
    facts = facts_of("DeepSeek-V3", index_topk=2048, index_head_dim=128)
    with pytest.raises(HostError, match="compute capability 8.0") as caught:
        require_capability("d", facts, gpus("8x80GB", capability=(8, 0)), IMAGE)
    assert "sparse attention needs compute capability 9.0" in caught.value.why
    require_capability("d", facts, gpus("8x80GB", capability=(9, 0)), IMAGE)


SHAPE = Plan(device="gpu", tensor_parallel_size=2, pipeline_parallel_size=1, data_parallel_size=1)
FOR_LOGS = {
    "--disable-access-log-for-endpoints": "/health,/metrics,/ping",
    "--shutdown-timeout": "30",
}
ON_GPUS = {"--tensor-parallel-size": "2", "--gpu-memory-utilization": "0.9"}


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({}, ON_GPUS),
        ({"device": "cpu"}, {}),
        ({"pipeline_parallel_size": 2}, {**ON_GPUS, "--pipeline-parallel-size": "2"}),
        ({"data_parallel_size": 2}, {**ON_GPUS, "--data-parallel-size": "2"}),
        ({"enable_expert_parallel": True}, {**ON_GPUS, "--enable-expert-parallel": ""}),
        ({"gpu_memory_utilization": 0.5}, {**ON_GPUS, "--gpu-memory-utilization": "0.5"}),
        ({"max_model_len": 1}, {**ON_GPUS, "--max-model-len": "1"}),
        ({"max_num_seqs": 1}, {**ON_GPUS, "--max-num-seqs": "1"}),
        ({"dtype": "half"}, {**ON_GPUS, "--dtype": "half"}),
        ({"kv_cache_dtype": "fp8"}, {**ON_GPUS, "--kv-cache-dtype": "fp8"}),
        ({"tokenizer_mode": "mistral"}, {**ON_GPUS, "--tokenizer-mode": "mistral"}),
        (
            {"load_format": "mistral"},
            {**ON_GPUS, "--config-format": "mistral", "--load-format": "mistral"},
        ),
        ({"trust_remote_code": True}, {**ON_GPUS, "--trust-remote-code": ""}),
        (
            {"tool_parser": "hermes"},
            {**ON_GPUS, "--enable-auto-tool-choice": "", "--tool-call-parser": "hermes"},
        ),
        ({"reasoning_parser": "qwen3"}, {**ON_GPUS, "--reasoning-parser": "qwen3"}),
        (
            {"reasoning_parser": "qwen3", "version": (0, 8, 5)},
            {
                **ON_GPUS,
                "--reasoning-parser": "qwen3",
                "--enable-reasoning": "",
                "--disable-log-requests": "",
            },
        ),
        ({"version": (0, 10, 1)}, {**ON_GPUS, "--disable-log-requests": ""}),
        ({"version": (0, 10, 2)}, ON_GPUS),
    ],
)
def test_what_a_plan_holds_becomes_a_flag(changed: Dict[str, Any], flags: Dict[str, str]) -> None:
    assert vllm_settings(replace(SHAPE, **changed)) == {**flags, **FOR_LOGS}


MADE = replace(SHAPE, name="m", served_names=("m", "n"), max_model_len=8)


@pytest.mark.parametrize(
    ("changed", "there", "not_there"),
    [
        ({}, "/models/m --served-model-name m n --host 0.0.0.0 --port 8000", "--nnodes"),
        ({}, "--max-model-len 8 --disable-access-log-for-endpoints", "--dtype"),
        ({"version": (0, 6, 0)}, "--max-model-len 8", "--disable-access-log-for-endpoints"),
        ({"extra_args": ("--max-model-len", "9")}, "--max-model-len 9", "--max-model-len 8"),
        (
            {"nodes": ("10.0.0.1", "10.0.0.2"), "bind": "10.0.0.1", "port": 8001},
            "--host 10.0.0.1 --port 8001",
            "--host 0.0.0.0",
        ),
    ],
)
def test_what_an_operator_passes_on_wins(
    changed: Dict[str, Any], there: str, not_there: str
) -> None:
    words = " ".join(vllm_arguments(replace(MADE, **changed)))
    assert there in words and not_there not in words


# -- what a plan takes over, and what it says


def test_a_plan_has_what_the_model_and_the_image_say() -> None:
    facts = replace(
        facts_of("Qwen3-8B"), embeds=True, tool_parsers=("hermes",), reasoning_parsers=("qwen3",)
    )
    image = replace(IMAGE, entrypoint=("python3", "-m", "x"))
    options = ServeOptions(device="gpu")
    found = make_plan("m", "/m", facts, Host(gpus("1x80GB")), image, options)
    assert (found.entrypoint, found.embeds) == (("python3", "-m", "x"), True)
    assert (found.tool_parser, found.reasoning_parser) == ("hermes", "qwen3")
    assert "embedding" in found.tasks


def test_what_no_plan_can_be_made_of_is_refused() -> None:
    with pytest.raises(HostError, match="cannot serve m") as caught:
        plan_of(replace(facts_of("Qwen3-8B"), architecture=""), "1x80GB")
    assert caught.value.why == "config.json names no architecture"
    with pytest.raises(UsageError):
        plan("Qwen3-8B", "1x80GB", extra_args=("--port", "1"))


def test_of_kinds_that_hold_too_little_the_one_that_holds_most_is_taken() -> None:
    """Of two kinds of GPUs, of which neither holds a useful context."""
    small, large = gpus("1x23GB"), gpus("1x24GB")
    cards = (
        replace(small[0], uuid="GPU-a", name="A"),
        replace(small[0], uuid="GPU-b", name="A", index=1),
        replace(large[0], uuid="GPU-c", name="B", index=2),
    )
    wanted = ServeOptions(device="gpu", tensor_parallel_size=1, pipeline_parallel_size=1)
    alone = make_plan("m", "/m", facts_of("Qwen3-8B"), Host(cards[2:]), IMAGE, wanted)
    both = make_plan("m", "/m", facts_of("Qwen3-8B"), Host(cards), IMAGE, wanted)
    assert both.gpus == ("GPU-c",) and both.max_model_len == alone.max_model_len


def test_a_context_that_no_model_was_made_for_is_not_believed() -> None:
    with pytest.raises(HostError, match="cannot serve m with") as caught:
        context_length("m", Fit(Split(), length=1 << 31), ServeOptions())
    assert caught.value.next_step == "hfship serve m --max-model-len 32768"
    asked = ServeOptions(max_model_len=1 << 31)
    assert context_length("m", Fit(Split(), length=1 << 31), asked) == 1 << 31


@pytest.mark.parametrize(
    "asked, states, expected",
    [(5, 100, 5), (0, 0, 0), (0, 100, 100), (0, 1024, 0), (0, 1023, 1023)],
)
def test_no_more_requests_are_let_in_than_have_states(
    asked: int, states: int, expected: int
) -> None:
    """On a GPU of 80 GiB vLLM itself lets 1024 in."""
    pool = gpus("1x80GB", total=80 << 30)
    found = Fit(Split(), sequences=states)
    assert requests_at_a_time(found, pool, ServeOptions(max_num_seqs=asked)) == expected
    assert requests_at_a_time(found, [], ServeOptions(max_num_seqs=asked)) == asked


def test_one_old_gpu_decides_what_is_computed_in() -> None:
    new, old = (
        replace(gpus("1x80GB")[0], capability=(9, 0)),
        replace(gpus("1x16GB")[0], capability=(7, 5)),
    )
    facts = facts_of("Qwen3-8B")
    assert choose_dtype("m", facts, [new, old], ServeOptions()) == "float16"
    assert choose_dtype("m", facts, [new, new], ServeOptions()) == "auto"
    assert choose_dtype("m", facts, [old], ServeOptions(dtype="float32")) == "float32"


def test_where_all_ports_are_taken_one_must_be_given() -> None:
    with pytest.raises(HostError, match="no port from 8000 to"):
        choose_port("m", None, None, set(PORTS))
    assert choose_port("m", None, None, set(PORTS[:-1])) == PORTS[-1]


@pytest.mark.parametrize(
    "device, changes, asked, expected, absent",
    [
        ("gpu", {}, {}, {"HF_HUB_OFFLINE": "1"}, ["VLLM_CPU_KVCACHE_SPACE", "TIKTOKEN_ENCODINGS_BASE"]),
        ("cpu", {}, {}, {"VLLM_CPU_KVCACHE_SPACE": "5", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}, []),
        ("gpu", {"tiktoken": True}, {}, {"TIKTOKEN_ENCODINGS_BASE": "/models/m"}, []),
        ("gpu", {}, {"HF_HUB_OFFLINE": "0", "A": "b"}, {"HF_HUB_OFFLINE": "0", "A": "b"}, []),
    ],
)  # fmt: skip
def test_variables_of_the_container(
    device: str,
    changes: Dict[str, Any],
    asked: Dict[str, str],
    expected: Dict[str, str],
    absent: Any,
) -> None:
    facts = replace(facts_of("Qwen3-8B"), **changes)
    values = environment("m", facts, ServeOptions(device=device, env=asked), 5 << 30)
    assert expected.items() <= values.items() and list(values) == sorted(values)
    assert not set(absent) & set(values)


# What differs from a model and an image of which nothing need be said: what is said.
SAID: Dict[str, Any] = {
    "nothing": ({}, {}, {}, 40960, ""),
    "an image of no known version": ({}, {"version": None}, {}, 40960, "is unknown; taken for the newest"),
    "parsers that it lacks": ({"tool_parsers": ("minimax_m2",)}, {"version": (0, 8, 5)}, {}, 40960, "tool calls will be refused"),
    "parsers that nobody wants": ({"tool_parsers": ("minimax_m2",)}, {"version": (0, 8, 5)}, {"no_tools": True}, 40960, ""),
    "less context": ({}, {}, {}, 1024, "context shortened to 1024 of 40960 tokens"),
    "no context": ({}, {}, {}, 0, ""),
    "less context, as asked for": ({}, {}, {"max_model_len": 1024}, 1024, ""),
    "no shape": ({"heads": 0}, {}, {}, 40960, "the KV cache is a guess"),
    "an old driver": ({}, {}, {}, 40960, "the driver 470.1 is older"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_will_be_otherwise_than_expected_is_said(case: str) -> None:
    changes, of_image, options, length, expected = SAID[case]
    facts = replace(facts_of("Qwen3-8B"), chat_template=True, **changes)
    image = replace(Image("ours/vllm:1", "sha256:1", (0, 27, 1), cuda="13.0.1"), **of_image)
    driver = "470.1" if "driver" in case else "580.1"
    found = plan_warnings(
        facts, gpus("1x80GB", driver=driver), image, ServeOptions(**options), length
    )
    said = "\n".join(found)
    assert expected in said and len(found) == bool(expected), said
