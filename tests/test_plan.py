"""Plans: facts and a host in, a plan or a refusal that names what works out. No docker, no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_facts import facts_of

import hfship

IMAGE = hfship.Image("vllm/vllm-openai:v0.27.1", "sha256:1", (0, 27, 1), cuda="13.0.1")
H200 = "0, GPU-00000000-0000-4000-8000-000000000000, NVIDIA H200, 143771, 0, 9.0, 580.159.04, Disabled"


def gpus(spec: str, **fields: Any) -> Tuple[hfship.Gpu, ...]:
    return tuple(replace(gpu, **fields) for gpu in hfship.assumed_gpus(spec))


def plan(name: str, spec: str, image: hfship.Image = IMAGE, **options: Any) -> hfship.Plan:
    host = hfship.Host(gpus(spec))
    return hfship.make_plan(name, "/m", facts_of(name), host, image, hfship.ServeOptions(device="gpu", **options))


def refusal(name: str, spec: str, **options: Any) -> hfship.HostError:
    with pytest.raises(hfship.HostError) as caught:
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
        ("gpt-oss-120b", "1x80GB", {}, 1, 68608),
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
        ("Qwen2.5-72B-AWQ", 8, ""),  # padded by its makers so that it splits: the original's 29568 does not
        ("Qwen2.5-72B-AWQ", 16, "29696 channels over 16 GPUs cut through awq's groups of 128"),
        ("gpt-oss-120b", 8, ""),
    ],
)
def test_splits_obey_vllms_divisibility_rules(name: str, tp: int, problem: str) -> None:
    found = hfship.split_problem(facts_of(name), tp)
    assert problem in found and bool(problem) == bool(found)


def test_fp8_blocks_bind_the_kv_heads_too() -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    facts = facts_of("Qwen3-8B", head_dim=64, quantization_config=fp8)
    assert hfship.split_problem(facts, 4) == ""
    assert "64 rows of KV heads per GPU cut through the 128-wide FP8 blocks" in hfship.split_problem(facts, 8)


@pytest.mark.parametrize(
    "name, spec, options, said",
    [
        ("Llama-3.1-70B", "3x80GB", {"tensor_parallel_size": 3}, ["64 attention heads", "--tensor-parallel-size 4"]),
        ("Llama-3.1-70B", "2x80GB", {}, ["TP=2: 72.7 GB of weights", "4 such GPUs"]),
        ("Llama-3.1-70B", "1x24GB", {}, ["what works", "8 such GPUs (--tensor-parallel-size 8, 7168 tokens)"]),
        (
            "Qwen3-8B",
            "1x24GB",
            {"max_model_len": 40960},
            ["holds 18432 tokens", "--max-model-len 18432", "2 such GPUs"],
        ),
        ("Qwen3-8B", "2x80GB", {"tensor_parallel_size": 4}, ["there are only 2 free GPUs"]),
        ("Qwen3-8B", "1x80GB", {"max_model_len": 50000}, ["made for 40960", "VLLM_ALLOW_LONG_MAX_MODEL_LEN"]),
        ("Qwen3-8B", "1x16GB", {}, ["2 such GPUs (--tensor-parallel-size 2"]),
    ],
)
def test_refusal_names_the_nearest_plan_that_works(name: str, spec: str, options: Dict[str, Any], said: list) -> None:
    error = refusal(name, spec, **options)
    for text in said:
        assert text in error.text()
    assert name in error.what


def test_advice_beyond_this_machine_names_gpus_that_do() -> None:
    """No number of such small GPUs holds the model: the GPUs that the refusal names instead do."""
    text = refusal("DeepSeek-V3", "1x24GB").next_step
    count, name = text.replace("what works: ", "").split(" x ")
    assert plan("DeepSeek-V3", f"{count}x{name.split()[0]}").max_model_len >= hfship.LEAST_LENGTH


def test_float32_of_a_16_bit_model_takes_twice_the_room() -> None:
    assert plan("Qwen3-8B", "1x80GB").weight_bytes * 2 == plan("Qwen3-8B", "1x80GB", dtype="float32").weight_bytes
    assert "2 such GPUs" in refusal("Qwen3-8B", "1x32GB", dtype="float32").text()


def test_context_beyond_the_models_own_must_fit_too() -> None:
    insist = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    assert plan("Qwen3-8B", "1x80GB", max_model_len=131072, env=insist).max_model_len == 131072
    assert "such GPUs" in refusal("Qwen3-8B", "1x32GB", max_model_len=131072, env=insist).text()


@pytest.mark.parametrize("spec", ["", "x", "2x", "0x80GB", "2xH999", "80GB", "2 x 80GB"])
def test_gpus_to_assume_that_make_no_sense(spec: str) -> None:
    with pytest.raises(hfship.UsageError):
        hfship.assumed_gpus(spec)


def test_gpus_to_assume_by_their_name() -> None:
    card = hfship.assumed_gpus("2xH200")[1]
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
    except hfship.HostError as error:
        assert "what works" in error.next_step
        return
    facts, tp = facts_of(name), found.tensor_parallel_size
    assert hfship.split_problem(facts, tp) == ""
    in_flight = hfship.batch_limits(gigabytes * 10**9)[0]
    request = hfship.kv_bytes(facts, tp, found.max_model_len, 2, in_flight)
    assert request <= found.kv_bytes
    assert facts.weight_bytes / tp + found.kv_bytes < gigabytes * 10**9 * found.gpu_memory_utilization


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
    found = hfship.parse_nvidia_smi(text)
    assert [(g.name, g.total, g.used, g.capability, g.mig) for g in found] == expected


@given(st.text(alphabet="0123456789,. []N/AGPU-²٣\n", max_size=80) | st.text(max_size=80))
def test_no_output_of_nvidia_smi_breaks_the_parser(text: str) -> None:
    hfship.parse_nvidia_smi(text)


# ---- GPUs ----------------------------------------------------------------------------


def host(*changes: Dict[str, Any], spec: str = "4x80GB") -> hfship.Host:
    cards = [replace(g, name="NVIDIA H100", uuid=f"GPU-{g.index}") for g in hfship.assumed_gpus(spec)]
    for index, change in enumerate(changes):
        cards[index] = replace(cards[index], **change)
    return hfship.Host(tuple(cards))


BUSY = {"used": 60 * 10**9}


@pytest.mark.parametrize(
    "changes, options, own, indexes, warning",
    [
        ([], {}, (), [0, 1, 2, 3], ""),
        ([BUSY], {}, (), [1, 2, 3], "GPU 0 (NVIDIA H100, 80.0 GB) is in use (60.0 GB) and is left out"),
        ([BUSY], {}, ("GPU-0",), [0, 1, 2, 3], ""),  # its own memory
        ([{}, {}, BUSY], {}, ("GPU-2",), [2, 0, 1, 3], ""),  # keeps the GPU it has
        ([{"mig": True}], {}, (), [1, 2, 3], "MIG"),
        ([{"name": "NVIDIA L4", "total": 24 * 10**9}], {}, (), [1, 2, 3], "differs"),
        ([], {"gpus": ("2", "GPU-1")}, (), [1, 2], ""),
        ([{"used": 2 * hfship.GIB}], {"gpus": ("0",)}, (), [0], "already has 2.1 GB"),
        ([BUSY], {"gpus": ("0",), "gpu_memory_utilization": 0.2}, (), [0], "already has 60.0 GB"),
        ([], {"gpus": ("0", "0", "GPU-0")}, (), [0], ""),  # one GPU, named three times
    ],
)
def test_gpus_that_may_be_used(changes: list, options: Dict[str, Any], own: tuple, indexes: list, warning: str) -> None:
    pool, warnings = hfship.gpu_pool(host(*changes), hfship.ServeOptions(**options), own)
    assert [g.index for g in pool] == indexes
    assert warning in " ".join(warnings) and bool(warning) == bool(warnings)


@pytest.mark.parametrize(
    "changes, options, error, said",
    [
        ([BUSY] * 4, {}, hfship.HostError, "--gpu-memory-utilization 0.22"),
        ([BUSY], {"gpus": ("0", "1")}, hfship.HostError, "a GPU is not free"),
        ([{"mig": True}] * 4, {}, hfship.HostError, "nvidia-smi -mig 0"),
        ([], {"gpus": ("7",)}, hfship.UsageError, "names no GPU"),
        ([], {"gpus": ("GPU-",)}, hfship.UsageError, "names no GPU"),
    ],
)
def test_gpus_that_may_not_be_used(changes: list, options: Dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error) as caught:
        hfship.gpu_pool(host(*changes), hfship.ServeOptions(**options))
    assert said in caught.value.text()


def test_gpu_of_a_deployment_that_still_loads_is_taken() -> None:
    loading = replace(plan("Qwen3-8B", "1x80GB"), gpus=("GPU-0",))
    claimed = hfship.with_claims(host().gpus, [loading])
    pool, _ = hfship.gpu_pool(replace(host(), gpus=claimed), hfship.ServeOptions())
    assert [g.index for g in pool] == [1, 2, 3]


# ---- images --------------------------------------------------------------------------


def images(*names: str) -> Tuple[hfship.Image, ...]:
    rows = [name.rsplit(":", 1) for name in names]
    lines = [f'{{"Repository": "{r}", "Tag": "{t}", "ID": "sha256:{i}"}}' for i, (r, t) in enumerate(rows)]
    return hfship.parse_images("\n".join(lines))


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
        with pytest.raises(hfship.HostError, match="docker has no image"):
            hfship.choose_image(GPU_IMAGES, wanted, device)
    else:
        assert hfship.choose_image(GPU_IMAGES, wanted, device).reference == expected


@pytest.mark.parametrize("name", ["base:1", "redis:7", "vllm/vllm-openai-rocm:v0.30.0"])
def test_no_image_says_which_to_bring(name: str) -> None:
    with pytest.raises(hfship.HostError) as caught:
        hfship.choose_image(images(name), None, "gpu")
    assert "docker load" in caught.value.next_step


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
    machine = hfship.Host(gpus("1x80GB") if has_gpu else (), images(*names))
    options = hfship.ServeOptions(device=device)
    if expected is None:
        with pytest.raises(hfship.HostError, match="no GPU"):
            hfship.choose_device(options, machine)
    else:
        assert hfship.choose_device(options, machine) == expected


# ---- CPU, ports, warnings ------------------------------------------------------------


def test_cpu_plan_sets_the_cache_and_no_gpu() -> None:
    machine = hfship.Host(memory=64 * hfship.GIB)
    options = hfship.ServeOptions(device="cpu")
    found = hfship.make_plan("Qwen3-8B", "/m", facts_of("Qwen3-8B"), machine, IMAGE, options)
    assert found.device == "cpu" and found.gpus == ()
    assert found.env["VLLM_CPU_KVCACHE_SPACE"] == str(found.kv_bytes // hfship.GIB) == "23"
    with pytest.raises(hfship.HostError, match="RAM"):
        hfship.make_plan("Qwen3-8B", "/m", facts_of("Qwen3-8B"), hfship.Host(memory=hfship.GIB), IMAGE, options)


@pytest.mark.parametrize(
    "wanted, previous, taken, expected",
    [(None, None, {8000}, 8001), (9000, None, set(), 9000), (None, 8007, {8000}, 8007), (None, 8000, {8000}, 8001)],
)
def test_port(wanted: Any, previous: Any, taken: set, expected: int) -> None:
    assert hfship.choose_port(wanted, previous, taken) == expected


def test_taken_port_is_named() -> None:
    with pytest.raises(hfship.HostError, match="port 8000 is taken"):
        hfship.choose_port(8000, None, {8000})


@pytest.mark.parametrize(
    "model, facts, options, card, warning",
    [
        ("Qwen3-8B", {"chat_template": False}, {}, {}, "no chat template"),
        ("Qwen3-8B", {"pickled": True}, {}, {}, "pickles"),
        ("DeepSeek-V3", {}, {}, {}, "needs --trust-remote-code"),
        ("Qwen3-8B", {"remote_code": ("o/r--m.C",)}, {"trust_remote_code": True}, {}, "code of another repository"),
        ("gpt-oss-120b", {}, {}, {}, "o200k_base.tiktoken"),
        ("Qwen3-8B", {}, {}, {"driver": "535.104.05"}, "the driver 535.104.05 is older"),
        ("Qwen3-8B", {"heads": 0, "kv_heads": 0, "head_dim": 0}, {}, {}, "is a guess"),
    ],
)
def test_warnings(
    model: str, facts: Dict[str, Any], options: Dict[str, Any], card: Dict[str, Any], warning: str
) -> None:
    shape = replace(facts_of(model), **facts)
    machine = hfship.Host(gpus("8x150GB", **card))
    found = hfship.make_plan(model, "/m", shape, machine, IMAGE, hfship.ServeOptions(device="gpu", **options))
    assert warning in " ".join(found.warnings) and len(found.warnings) == 1


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
    machine, image = hfship.Host(gpus("8x150GB", capability=capability)), replace(IMAGE, version=version, cuda=cuda)
    options = hfship.ServeOptions(device="gpu")
    if said is None:
        assert hfship.make_plan(model, "/m", facts_of(model), machine, image, options).gpus
        return
    with pytest.raises(hfship.HostError) as caught:
        hfship.make_plan(model, "/m", facts_of(model), machine, image, options)
    assert said in caught.value.why and model in caught.value.what and caught.value.next_step


def test_old_gpu_computes_in_float16() -> None:
    machine = hfship.Host(gpus("1x80GB", capability=(7, 5)))
    options = hfship.ServeOptions(device="gpu")
    assert hfship.make_plan("m", "/m", facts_of("Qwen3-8B"), machine, IMAGE, options).dtype == "float16"


@pytest.mark.parametrize(
    "argument, version, said",
    [
        ("--enable-reasoning", (0, 27, 1), "--reasoning-parser NAME alone"),
        ("--swap-space=4", (0, 27, 1), "versions until 0.18.0 do"),
        ("--runner", (0, 8, 3), "versions from 0.10.0 do"),
        ("--task", (0, 8, 3), None),
        ("--anything-else", (0, 8, 3), None),
        ("--max_num_queued_reqs=5", (0, 8, 3), "versions from 0.30.0 do"),
        ("--model-loader-extra-config", (0, 8, 3), None),
    ],
)
def test_flag_that_the_image_does_not_know_is_refused(argument: str, version: tuple, said: str) -> None:
    if said is None:
        hfship.require_known_flags([argument], version)
    else:
        with pytest.raises(hfship.HostError) as caught:
            hfship.require_known_flags([argument], version)
        assert said in caught.value.text()


@pytest.mark.parametrize(
    "argument", ["--api-key=sk-1", "--api_key=sk-1", "--api-k=sk-1", "--port", "--host", "--served-model-name", "-tp=2"]
)
def test_flags_that_are_hfships_own_are_refused(argument: str) -> None:
    """A key would lie in docker-compose.yml and in the process list; a name or port of one's own breaks the proof."""
    with pytest.raises(hfship.UsageError) as caught:
        hfship.require_known_flags([argument], (0, 27, 1))
    assert "sk-1" not in caught.value.text()


def test_sizing_tells_what_to_buy() -> None:
    rows = hfship.sizing(facts_of("Llama-3.1-70B"), hfship.ServeOptions())
    assert [row[0] for row in rows] == ["TP=1", "TP=2", "TP=4", "TP=8"]
    assert "H100 80 GB" in rows[2][3]


def test_sizing_names_no_gpu_that_cannot_run_the_model() -> None:
    """Eight T4 would hold it, but MXFP4 needs compute capability 8.0."""
    rows = hfship.sizing(facts_of("gpt-oss-120b"), hfship.ServeOptions())
    assert rows[3][2] == "L4 24 GB"
