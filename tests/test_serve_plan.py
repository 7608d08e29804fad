# SPDX-License-Identifier: Apache-2.0
"""What goes into a plan from where, with choices that are played; test_plan.py has models and GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Dict, List, Sequence

import pytest

from hfship.base.errors import HostError
from hfship.base.values import replace
from hfship.serve import plan as room
from hfship.serve.fit import Fit
from hfship.serve.gpus import GpuPool
from hfship.serve.split_rules import Split
from hfship.serve.terms import NEWEST, Gpu, Host, Image, Plan, ServeOptions
from test_facts import facts_of

GPUS = tuple(Gpu(number, f"GPU-{number}", "L40S", 48 << 30) for number in range(3))
OWN = Image("vllm/vllm-openai:v0.27.1", "sha256:1", (0, 27, 1), cuda="12.8", entrypoint=("x",))
FACTS = replace(
    facts_of("Qwen3-8B"), weight_bytes=77, own_tokenizer=True, own_layout=True, embeds=True
)
FOUND = Fit(Split(2, 1, 1), kv=55, length=4096)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """Choices that say what they were asked."""
    asked: Dict[str, Any] = {}

    def answer(name: str, value: Any) -> Any:
        def choose(*given: Any) -> Any:
            asked[name] = given
            return value

        return choose

    parsers = SimpleNamespace(tools="hermes", reasoning="qwen3")
    for name, value in {
        "as_loaded": FACTS,
        "require_known_model": None,
        "require_supported": None,
        "refuse_own_flags": None,
        "parsers_for": parsers,
        "best_fit": (GpuPool(GPUS, ("the pool warns",)), FOUND),
        "context_length": 4096,
        "choose_port": 8005,
        "requests_at_a_time": 9,
        "choose_dtype": "half",
        "environment": {"A": "1"},
        "likely_tasks": ["embed", "score"],
        "concurrent_requests": 3.5,
        "idle_gpus": "one is idle",
        "plan_warnings": ["it is old"],
    }.items():
        monkeypatch.setattr(room, name, answer(name, value))
    return asked


def test_a_plan_has_what_was_chosen_and_what_that_rests_on(played: Dict[str, Any]) -> None:
    options = ServeOptions(device="gpu", port=7, extra_args=("--x",), aliases=("a",))
    before = Plan(name="m", port=8001, gpus=("GPU-9",))
    host = Host(GPUS, taken_ports=frozenset([8000]))
    facts = facts_of("Qwen3-8B")
    made = room.make_plan("m", "/models/m", facts, host, OWN, options, before)
    assert made == replace(
        Plan(),
        device="gpu",
        extra_args=("--x",),
        aliases=("a",),
        max_num_seqs=9,
        served_names=("m",),
        gpus=("GPU-0", "GPU-1"),
        tensor_parallel_size=2,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        max_model_len=4096,
        dtype="half",
        port=8005,
        shm_size="16gb",
        env={"A": "1"},
        name="m",
        model_dir="/models/m",
        image=OWN.reference,
        image_id="sha256:1",
        entrypoint=("x",),
        version=(0, 27, 1),
        embeds=True,
        tokenizer_mode="mistral",
        load_format="mistral",
        tool_parser="hermes",
        reasoning_parser="qwen3",
        tasks=("embed", "score"),
        gpu_names=(GPUS[0].label, GPUS[1].label),
        weight_bytes=77,
        kv_bytes=55,
        concurrency=3.5,
        idle="one is idle",
        warnings=("the pool warns", "it is old"),
    )
    two = GPUS[:2]
    assert played == {
        "as_loaded": (facts, (0, 27, 1), options),
        "require_known_model": ("m", FACTS, options),
        "require_supported": ("m", FACTS, OWN),
        "refuse_own_flags": (("--x",),),
        "parsers_for": (FACTS, (0, 27, 1), options),
        "best_fit": ("m", FACTS, host, OWN, options, ("GPU-9",)),
        "context_length": ("m", FOUND, options),
        "choose_port": ("m", 7, 8001, frozenset([8000])),
        "requests_at_a_time": (FOUND, GPUS, options),
        "choose_dtype": ("m", FACTS, two, options),
        "environment": ("m", FACTS, options, 55),
        "likely_tasks": (FACTS.architecture, True, FACTS.chat_template),
        "concurrent_requests": (FACTS, FOUND, GPUS, 4096, options),
        "idle_gpus": ("m", FACTS, GPUS, FOUND, options),
        "plan_warnings": (FACTS, two, OWN, options, 4096),
    }


def test_what_is_not_known_is_taken_for_the_newest_and_nothing_is_kept_of_no_plan(
    played: Dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(FACTS, own_tokenizer=False, own_layout=False)
    monkeypatch.setattr(room, "as_loaded", lambda *_: plain)
    options = ServeOptions(served_names=("a", "b"), shm_size="1g")
    image = replace(OWN, version=None)
    made = room.make_plan("m", "/m", plain, Host(GPUS), image, options)
    assert made.version == NEWEST and played["parsers_for"][1] == NEWEST
    assert (made.tokenizer_mode, made.load_format) == ("", "")
    assert (made.served_names, made.shm_size) == (("a", "b"), "1g")
    assert played["best_fit"][-1] == () and played["choose_port"][2] is None


# -- the GPUs


def test_of_the_kinds_of_gpus_the_first_that_is_useful_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools = [GpuPool((gpu,), ()) for gpu in GPUS]
    lengths: Dict[str, Any] = {}
    asked: List[Any] = []

    def fit(name: str, facts: Any, pool: GpuPool, *more: Any) -> Fit:
        asked.append((name, facts, *more))
        found = lengths[pool.gpus[0].uuid]
        if isinstance(found, HostError):
            raise found
        return Fit(Split(1, 1, 1), length=found)

    monkeypatch.setattr(room, "gpu_pools", lambda *given: asked.append(given) or pools)
    monkeypatch.setattr(room, "_fit_of_kind", fit)
    monkeypatch.setattr(room, "demand_of", lambda *_: SimpleNamespace(length=1000))
    host, options = Host(GPUS), ServeOptions()
    refused = [HostError(f"refused {number}", "", "") for number in range(3)]
    for found, taken in (
        ([999, 1000, 5000], 1),
        ([refused[0], 1200, 5000], 1),
        ([100, 300, 200], 1),
        ([300, refused[1], refused[2]], 0),
        (refused, None),
    ):
        lengths = dict(zip(("GPU-0", "GPU-1", "GPU-2"), found))
        del asked[:]
        if taken is None:
            with pytest.raises(HostError, match="refused 0"):
                room.best_fit("m", FACTS, host, OWN, options, ("own",))
            continue
        pool, best = room.best_fit("m", FACTS, host, OWN, options, ("own",))
        assert pool is pools[taken] and best.length == found[taken]
        assert asked[0] == (host, options, ("own",))
        assert asked[1] == ("m", FACTS, host, OWN, options)


@pytest.mark.parametrize("version", [(0, 27, 1), None])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_kind_of_gpus_or_the_cpu(
    version: Any, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    for name in ("require_known_ways", "fit_cpu", "require_capability", "choose_split"):
        monkeypatch.setattr(
            room, name, lambda *given, name=name: asked.append((name, *given)) or name
        )
    image = replace(OWN, version=version)
    pool = GpuPool(GPUS if on_gpu else (), ())
    host, options = Host((), memory=9, held=4), ServeOptions()
    found: Any = room._fit_of_kind("m", FACTS, pool, host, image, options)
    known = version or NEWEST
    if on_gpu:
        assert found == "choose_split"
        assert asked == [
            ("require_capability", "m", FACTS, GPUS, image),
            ("choose_split", "m", FACTS, GPUS, known, options),
        ]
    else:
        assert found == "fit_cpu"
        assert asked == [
            ("require_known_ways", "m", FACTS, known, options),
            ("fit_cpu", "m", FACTS, 9, options, 4),
        ]


@pytest.mark.parametrize(
    ("dtype", "of_model", "model_type", "capabilities", "found"),
    [
        ("auto", "bfloat16", "qwen3", [(8, 0)], "auto"),
        ("auto", "bfloat16", "qwen3", [(9, 0), (7, 5)], "float16"),
        ("auto", "bfloat16", "qwen3", [(0, 0)], "auto"),  # nobody knows
        ("auto", "float16", "qwen3", [(7, 5)], "auto"),
        ("half", "bfloat16", "gemma2", [(7, 5)], "half"),
        ("auto", "bfloat16", "gemma2", [(7, 5)], None),
        ("auto", "float16", "gemma2", [(7, 5)], "auto"),
        ("auto", "bfloat16", "gemma2", [(8, 0)], "auto"),
        ("auto", "bfloat16", "qwen3", [], "auto"),
    ],
)
def test_what_is_computed_in(
    dtype: str, of_model: str, model_type: str, capabilities: Any, found: Any
) -> None:
    gpus = [replace(GPUS[0], capability=one) for one in capabilities]
    facts = replace(FACTS, dtype=of_model, model_type=model_type)
    if found:
        assert room.choose_dtype("m", facts, gpus, ServeOptions(dtype=dtype)) == found
        return
    with pytest.raises(HostError, match="which has no bfloat16"):
        room.choose_dtype("m", facts, gpus, ServeOptions(dtype=dtype))


@pytest.mark.parametrize(
    ("wanted", "previous", "taken", "found"),
    [
        (None, None, [], 8000),
        (None, None, [8000, 8001, 8003], 8002),
        (None, 8100, [8000], 8100),
        (None, 8100, [8100], 8000),
        (7000, 8100, [], 7000),
        (7000, None, [7000, 8000], "port 7000 is taken"),
    ],
)
def test_the_port(wanted: Any, previous: Any, taken: List[int], found: Any) -> None:
    if isinstance(found, int):
        assert room.choose_port("m", wanted, previous, frozenset(taken)) == found
        return
    with pytest.raises(HostError, match=found) as told:
        room.choose_port("m", wanted, previous, frozenset(taken))
    assert told.value.next_step == "hfship serve m --port 8001"


# -- what vLLM surely does not run


@pytest.mark.parametrize(
    ("version", "reference", "spans", "quantization", "refused"),
    [
        ((0, 20, 0), OWN.reference, [((0, 5, 0), (0, 10, 0))], False, True),  # dropped
        ((0, 20, 0), OWN.reference, [((0, 5, 0), (0, 30, 0))], False, False),
        ((0, 20, 0), OWN.reference, [((0, 25, 0), (0, 30, 0))], False, False),  # not yet
        ((0, 20, 0), OWN.reference, [((0, 5, 0), (0, 10, 0)), ((0, 25, 0), (0, 30, 0))], False, False),
        ((0, 20, 0), OWN.reference, [((0, 25, 0), (0, 30, 0))], True, True),
        ((0, 20, 0), OWN.reference, [], False, False),
        ((0, 20, 0), "corp/vllm:1", [((0, 5, 0), (0, 10, 0))], False, False),
        ((0, 20, 1), OWN.reference, [((0, 5, 0), (0, 10, 0))], False, False),  # nobody knows it
        (None, OWN.reference, [((0, 5, 0), (0, 10, 0))], False, False),
    ],
)  # fmt: skip
def test_what_a_version_surely_does_not_run(
    version: Any,
    reference: str,
    spans: Sequence[Any],
    quantization: bool,
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = room.QUANTIZATIONS if quantization else room.ARCHITECTURES
    intervals = tuple(
        SimpleNamespace(first=first, last=last, text=lambda: "in others") for first, last in spans
    )

    def intervals_of(of: str, name: str) -> Any:
        return intervals if of == kind else ()

    def knows(known: Any, of: str, name: str) -> bool:
        assert of == kind and name in ("fp8", FACTS.architecture)
        return any(one.first <= known <= one.last for one in intervals)

    monkeypatch.setattr(room, "intervals_of", intervals_of)
    monkeypatch.setattr(room, "knows", knows)
    monkeypatch.setattr(room, "versions", lambda: ((0, 20, 0),))
    facts = replace(FACTS, quantization=SimpleNamespace(method="fp8"))
    image = replace(OWN, version=version, reference=reference)
    if not refused:
        room.require_supported("m", facts, image)
        return
    with pytest.raises(HostError) as told:
        room.require_supported("m", facts, image)
    what = "fp8" if quantization else FACTS.architecture
    assert told.value.why == f"vLLM 0.20.0 does not run {what}: it is there in others"


# -- the command line


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {}),
        ({"max_model_len": 9}, {"--max-model-len": "9"}),
        ({"max_num_seqs": 8}, {"--max-num-seqs": "8"}),
        ({"dtype": "half"}, {"--dtype": "half"}),
        ({"kv_cache_dtype": "fp8"}, {"--kv-cache-dtype": "fp8"}),
        ({"tokenizer_mode": "mistral"}, {"--tokenizer-mode": "mistral"}),
        ({"load_format": "mistral"}, {"--config-format": "mistral", "--load-format": "mistral"}),
        ({"trust_remote_code": True}, {"--trust-remote-code": ""}),
        ({"version": (0, 10, 1)}, {"--disable-log-requests": ""}),
        ({"version": (0, 10, 2)}, {}),
        ({"nodes": ("10.0.0.1", "10.0.0.2")}, {"--nodes": "two"}),
        (
            {"device": "gpu", "tensor_parallel_size": 1, "gpu_memory_utilization": 0.9},
            {"--tensor-parallel-size": "1", "--gpu-memory-utilization": "0.9"},
        ),
        (
            {
                "device": "gpu",
                "tensor_parallel_size": 2,
                "pipeline_parallel_size": 3,
                "data_parallel_size": 4,
                "enable_expert_parallel": True,
                "gpu_memory_utilization": 0.5,
            },
            {
                "--tensor-parallel-size": "2",
                "--pipeline-parallel-size": "3",
                "--data-parallel-size": "4",
                "--enable-expert-parallel": "",
                "--gpu-memory-utilization": "0.5",
            },
        ),
    ],
)
def test_flags_of_a_plan(
    fields: Dict[str, Any], settings: Dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "node_settings", lambda _: {"--nodes": "two"})
    plan = replace(Plan(name="m", device="cpu"), **fields)
    always = {
        "--disable-access-log-for-endpoints": "/health,/metrics,/ping",
        "--shutdown-timeout": "30",
    }
    assert room.vllm_settings(plan) == {**settings, **always}


def test_what_is_passed_on_wins_and_what_a_version_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"--mine": "1", "--bare": "", "--unknown": "x", "--given": "y"}
    monkeypatch.setattr(room, "vllm_settings", lambda _: settings)
    monkeypatch.setattr(
        room, "knows_flag", lambda *asked: asked == (NEWEST, asked[1]) and asked[1] != "--unknown"
    )
    monkeypatch.setattr(room, "mount_arguments", lambda _: {"--lora": ["a", "b"], "--too": ["c"]})
    monkeypatch.setattr(room, "passed_on", lambda _: ["--given=z", "--too", "d"])
    plan = Plan(name="m", served_names=("a", "b"), extra_args=("--given=z", "--too", "d"))
    assert room.vllm_arguments(plan) == [
        *("/models/m", "--served-model-name", "a", "b", "--host", "0.0.0.0", "--port", "8000"),
        *("--mine", "1", "--bare", "--lora", "a", "b", "--given=z", "--too", "d"),
    ]


# -- variables and warnings


def test_nothing_looks_for_a_network_and_the_operator_wins() -> None:
    options = ServeOptions(device="cpu", ready_timeout_s=5000, env={"DO_NOT_TRACK": "0", "Z": "9"})
    found = room.environment("m", replace(FACTS, tiktoken=True), options, 5 << 30)
    assert list(found) == sorted(found)
    assert found == {
        "DO_NOT_TRACK": "0",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "TIKTOKEN_ENCODINGS_BASE": "/models/m",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "5",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENGINE_READY_TIMEOUT_S": "5000",
        "VLLM_NO_USAGE_STATS": "1",
        "Z": "9",
    }
    on_gpu = room.environment("m", FACTS, ServeOptions(device="gpu", ready_timeout_s=5), 1)
    assert on_gpu["VLLM_ENGINE_READY_TIMEOUT_S"] == "3600"
    assert not [name for name in on_gpu if "CPU" in name or "TIKTOKEN" in name]


def codes(**fields: Any) -> List[str]:
    options = ServeOptions(trust_remote_code=fields.pop("trusts", False))
    return list(room._code_warnings(replace(FACTS, **fields), options))


def test_code_that_a_model_brings_is_told() -> None:
    assert codes() == []
    assert len(codes(pickled=True)) == 1 and "pickles" in codes(pickled=True)[0]
    own = ("configuration.X",)
    assert f"if vLLM does not know {FACTS.architecture}" in codes(remote_code=own)[0]
    assert codes(remote_code=own, trusts=True) == []
    foreign = (*own, "org/other--modeling.Y")
    said = codes(remote_code=foreign, trusts=True)
    assert said == ["code of another repository is not in the folder: org/other--modeling.Y"]
    assert len(codes(remote_code=foreign)) == 1


@pytest.mark.parametrize(
    ("facts", "options", "length", "said"),
    [
        ({"max_length": 100}, {}, 100, []),
        ({"max_length": 100}, {}, 0, []),
        ({"max_length": 100}, {}, 99, ["context shortened to 99 of 100 tokens: that is what fits"]),
        ({"max_length": 100}, {"max_model_len": 99}, 99, []),
        ({"heads": 0}, {"max_model_len": 1}, 1, ["the KV cache is a guess"]),
        ({"layers": 0}, {"max_model_len": 1}, 1, ["the KV cache is a guess"]),
        ({"max_length": 100, "stretched_length": 400}, {}, 100, ["YaRN is set for 400 tokens"]),
        ({"max_length": 100, "stretched_length": 400}, {"max_model_len": 9}, 9, []),
        (
            {"max_length": 100, "original_length": 40},
            {},
            40,
            ["context of 40 tokens, as vLLM takes it: beyond that, LongRoPE"],
        ),
    ],
)
def test_what_is_said_of_the_context(
    facts: Dict[str, Any],
    options: Dict[str, Any],
    length: int,
    said: List[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "usual_length", lambda one: one.original_length or one.max_length)
    known = replace(FACTS, stretched_length=0)
    found = list(room._context_warnings(replace(known, **facts), ServeOptions(**options), length))
    assert len(found) == len(said)
    assert all(part in whole for part, whole in zip(said, found))


@pytest.mark.parametrize(
    ("cuda", "drivers", "said"),
    [
        ("12.8", ["525.1", "580.1"], ""),
        ("12.8", ["524.9", "580.1", "500.0"], "the driver 500.0, 524.9 is older"),
        ("13.0", ["579.1"], "the image has CUDA 13.0, the driver 579.1 is older"),
        ("13.0", ["580.1", ""], ""),
        ("", ["1.0"], ""),
        ("11.8", ["1.0"], ""),
    ],
)
def test_drivers_that_are_too_old_are_told(cuda: str, drivers: List[str], said: str) -> None:
    gpus = [replace(GPUS[0], driver=driver) for driver in drivers]
    found = list(room._driver_warnings(gpus, replace(OWN, cuda=cuda)))
    assert (said in found[0]) if said else not found


@pytest.mark.parametrize(
    ("tasks", "embeds", "template", "warned"),
    [
        (["completion"], False, False, True),
        ([], False, False, True),
        (["completion"], False, True, False),
        (["completion"], True, False, False),
        (["embed"], False, False, False),
    ],
)
def test_who_writes_without_a_template_is_told(
    tasks: List[str], embeds: bool, template: bool, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "likely_tasks", lambda *_: tasks)
    facts = replace(FACTS, embeds=embeds, chat_template=template)
    assert bool(list(room._api_warnings(facts))) is warned


@pytest.mark.parametrize(
    ("model_type", "tiktoken", "env", "warned"),
    [
        ("gpt_oss", False, {}, True),
        ("gpt_oss", True, {}, False),
        ("gpt_oss", False, {"TIKTOKEN_ENCODINGS_BASE": "/x"}, False),
        ("qwen3", False, {}, False),
    ],
)
def test_what_a_model_would_load_from_a_network_is_told(
    model_type: str, tiktoken: bool, env: Dict[str, str], warned: bool
) -> None:
    facts = replace(FACTS, model_type=model_type, tiktoken=tiktoken)
    assert bool(list(room._offline_warnings(facts, ServeOptions(env=env)))) is warned


@pytest.mark.parametrize(
    ("image_id", "version", "no_tools", "said"),
    [
        ("sha256:1", None, False, ["the vLLM version of x is unknown", "parsers"]),
        ("", None, False, ["parsers"]),
        ("sha256:1", (0, 27, 1), True, []),
    ],
)
def test_what_is_said_of_an_image(
    image_id: str, version: Any, no_tools: bool, said: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "_support_warnings",
        "_api_warnings",
        "_code_warnings",
        "_offline_warnings",
        "_context_warnings",
        "_driver_warnings",
        "flag_warnings",
    ):
        monkeypatch.setattr(room, name, lambda *_: [])
    monkeypatch.setattr(room, "parser_warnings", lambda _, known: [f"parsers of {known}"])
    image = Image("x", image_id, version)
    found = room.plan_warnings(FACTS, GPUS, image, ServeOptions(no_tools=no_tools), 9)
    assert len(found) == len(said)
    assert all(whole.startswith(part) for part, whole in zip(said, found))
    if said:
        assert found[-1] == f"parsers of {NEWEST}"


def test_warnings_of_all_kinds_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["support", "api", "code", "offline", "context", "driver"]
    options = ServeOptions(extra_args=("--x",))
    asked: Dict[str, Any] = {}
    for name in names:
        monkeypatch.setattr(
            room,
            f"_{name}_warnings",
            lambda *given, name=name: asked.update({name: given}) or [name],
        )
    monkeypatch.setattr(room, "parser_warnings", lambda *_: ["parser"])
    monkeypatch.setattr(room, "flag_warnings", lambda *given: [f"flags {given}"])
    found = room.plan_warnings(FACTS, GPUS, OWN, options, 9)
    expected = [*names[:2], "parser", *names[2:], "flags (('--x',), (0, 27, 1))"]
    assert found == expected
    assert asked == {
        "support": (FACTS, OWN),
        "api": (FACTS,),
        "code": (FACTS, options),
        "offline": (FACTS, options),
        "context": (FACTS, options, 9),
        "driver": (GPUS, OWN),
    }


@pytest.mark.parametrize(
    ("architecture", "length", "most", "insists", "said"),
    [
        ("", 0, 0, False, "cannot serve m"),
        ("X", 100, 100, False, ""),
        ("X", 101, 100, False, "with 101 tokens of context"),
        ("X", 101, 0, False, ""),
        ("X", 101, 100, True, ""),
    ],
)
def test_what_vllm_would_refuse_after_minutes(
    architecture: str, length: int, most: int, insists: bool, said: str
) -> None:
    env = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"} if insists else {}
    facts = replace(FACTS, architecture=architecture, max_length=most)
    options = ServeOptions(max_model_len=length, env=env)
    if not said:
        room.require_known_model("m", facts, options)
        return
    with pytest.raises(HostError, match=said):
        room.require_known_model("m", facts, options)


@pytest.mark.parametrize(("gpus", "size"), [(0, "4gb"), (1, "4gb"), (2, "16gb")])
def test_shared_memory(gpus: int, size: str) -> None:
    assert room.default_shm_size(gpus) == size


def test_nothing_is_idle_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "idle_advice", lambda *given: given)
    options = ServeOptions()
    assert room.idle_gpus("m", FACTS, (), FOUND, options) == ""
    found: Any = room.idle_gpus("m", FACTS, GPUS, FOUND, options)
    assert found == ("m", FACTS, GPUS, FOUND, options)
