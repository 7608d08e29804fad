"""The table of vLLM's versions: how it is made from wheels, and that what is emitted stands in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from build_vllm_table import KINDS, sources_of, table_of, version_key

from hfship.base.errors import HostError
from hfship.serve.cards import assumed_gpus
from hfship.serve.clients import REASONING_FORMATS, TOOL_FORMATS, parser_for
from hfship.serve.plan import make_plan, vllm_arguments
from hfship.serve.terms import NEWEST, Host, Image, Plan, ServeOptions, Version
from hfship.serve.vllm import DTYPES, INSTEAD, flags_in
from hfship.serve.vllm_table import (
    ARCHITECTURES,
    FLAGS,
    QUANTIZATIONS,
    REASONING_PARSERS,
    ROUTES,
    TOOL_PARSERS,
    all_known,
    intervals_of,
    knows,
    parse_version,
    version_text,
    versions,
)
from support import components
from test_deploy import PLAN
from test_zoo import ZOO, facts_of

CPU = replace(PLAN, device="cpu", gpus=())
FULL = replace(
    PLAN,
    kv_cache_dtype="fp8",
    dtype="half",
    trust_remote_code=True,
    max_num_seqs=8,
    max_model_len=99,
)


@pytest.mark.parametrize("version", [*versions(), NEWEST], ids=str)
@pytest.mark.parametrize("plan", [PLAN, CPU, FULL], ids=["gpu", "cpu", "full"])
def test_every_flag_that_is_emitted_is_known_to_its_version(plan: Plan, version: Version) -> None:
    emitted = flags_in(vllm_arguments(replace(plan, version=version)))
    assert emitted and set(emitted) <= all_known(version, FLAGS)


# (kind, name): the first and the last version of the list that have it, as vLLM's own source has them.
KNOWN = {
    (FLAGS, "--runner"): ((0, 10, 1), None),
    (FLAGS, "--convert"): ((0, 10, 1), None),
    (FLAGS, "--enable-log-requests"): ((0, 10, 1), None),
    (FLAGS, "--disable-log-requests"): (None, (0, 16, 0)),
    (FLAGS, "--num-scheduler-steps"): (None, (0, 10, 0)),
    (FLAGS, "--max-seq-len-to-capture"): (None, (0, 10, 2)),
    (FLAGS, "--max-num-queued-reqs"): ((0, 29, 0), None),
    (FLAGS, "--sse-keep-alive-interval"): ((0, 29, 0), None),
    (FLAGS, "--task"): (None, (0, 12, 0)),
    (FLAGS, "--swap-space"): (None, (0, 17, 1)),
    (FLAGS, "--shutdown-timeout"): ((0, 18, 1), None),
    (FLAGS, "--nnodes"): ((0, 11, 1), None),
    (FLAGS, "--headless"): ((0, 9, 0), None),
    (FLAGS, "-tp"): (None, None),
    (FLAGS, "--max-model-len"): (None, None),
    (ARCHITECTURES, "LlamaForCausalLM"): (None, None),
    (ARCHITECTURES, "MPTForCausalLM"): (None, (0, 28, 0)),
    (QUANTIZATIONS, "awq"): (None, None),
    (TOOL_PARSERS, "hermes"): (None, None),
    (REASONING_PARSERS, "deepseek_r1"): (None, None),
    (ROUTES, "POST /v1/completions"): (None, None),
}  # fmt: skip


@pytest.mark.parametrize("kind, name", KNOWN)
def test_bounds(kind: str, name: str) -> None:
    first, last = KNOWN[kind, name]
    (interval,) = intervals_of(kind, name)
    assert interval == (first or (0, 0, 0), last or NEWEST)
    listed = versions()
    for version in listed:
        inside = (first or listed[0]) <= version <= (last or NEWEST)
        assert knows(version, kind, name) == inside
    assert knows((0, 1, 0), kind, name) == (first is None)
    assert knows(NEWEST, kind, name) == (last is None)


def test_between_two_versions_of_the_list_only_what_both_have_is_known() -> None:
    assert {(0, 10, 2), (0, 11, 0)} <= set(versions()) and (0, 10, 9) not in versions()
    assert not knows((0, 10, 9), FLAGS, "--max-seq-len-to-capture")
    assert knows((0, 10, 9), FLAGS, "--runner")


# -- how it is made

WHEELS: Dict[str, Dict[str, str]] = {
    "0.9.0": {
        "engine/arg_utils.py": "def f(parser):\n  parser.add_argument('--old', '-o')\n"
        "  parser.add_argument('--kv-cache-dtype', choices=['auto', 'fp8'])\n",
        "model_executor/models/registry.py": "_TEXT_MODELS = {'A': 1}\n",
        "model_executor/layers/quantization/__init__.py": "QUANTIZATION_METHODS = ['awq']\n",
        "entrypoints/openai/tool_parsers/x.py": "@M.register_module('one')\nclass X: pass\n",
        "entrypoints/openai/api_server.py": "@router.post('/v1/x')\ndef f(): pass\n",
        "engine/metrics.py": "name = 'vllm:old'\n",
    },
    "0.10.0": {
        "engine/arg_utils.py": "for name in (('--both-ways', 1),): pass\n"
        "raise SystemExit('nothing is run')\n",
        "entrypoints/common/cli_args.py": "class FrontendArgs:\n  uvicorn_log_level: str = 'info'\n",
        "config/cache.py": "CacheDType = Literal['auto', 'nvfp4']\n",
        "model_executor/models/registry.py": "_TEXT_MODELS = {'A': 1, 'B': 2}\n"
        "_PREVIOUSLY_SUPPORTED_MODELS = {'Gone': '0.1'}\n",
        "model_executor/layers/quantization/__init__.py": "QuantizationMethods = Literal['awq', 'fp8']\n",
        "tool_parsers/__init__.py": "_TOOL_PARSERS_TO_REGISTER = {'one': 1, 'two': 2}\n",
        "reasoning/__init__.py": "M.register_lazy_module(name='r1', module_path='x')\n",
    },
}  # fmt: skip


def test_the_table_is_read_from_source_text_and_nothing_is_run(tmp_path: Path) -> None:
    for version, files in WHEELS.items():
        for name, text in files.items():
            path = tmp_path / version / "vllm" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    known = {}
    for version in WHEELS:
        sources = sources_of(tmp_path / version)
        known[version] = {kind.__name__: kind(sources) for kind in KINDS}
    assert table_of(known) == {
        "versions": ["0.9.0", "0.10.0"],
        "flags": {"..0.9.0": ["--kv-cache-dtype", "--old", "-o"], "0.10.0..": ["--both-ways", "--uvicorn-log-level"]},
        "architectures": {"..": ["A"], "0.10.0..": ["B"]},
        "quantizations": {"..": ["awq"], "0.10.0..": ["fp8"]},
        "kv_cache_dtypes": {"..": ["auto"], "..0.9.0": ["fp8"], "0.10.0..": ["nvfp4"]},
        "tool_parsers": {"..": ["one"], "0.10.0..": ["two"]},
        "reasoning_parsers": {"0.10.0..": ["r1"]},
        "metrics": {"..0.9.0": ["vllm:old"]},
        "routes": {"..0.9.0": ["POST /v1/x"]},
    }  # fmt: skip


def test_versions_are_sorted_as_numbers() -> None:
    assert sorted(["0.10.0", "0.9.2", "0.10.1.1"], key=version_key)[0] == "0.9.2"


@pytest.mark.alone
@pytest.mark.real
def test_the_table_is_what_a_real_parser_says() -> None:
    components.require("vllm-image")
    run = f"docker run --rm --pull never --network none {components.VLLM_IMAGE} --help=all"
    done = subprocess.run(
        components.with_docker_argv(["sh", "-c", run]),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=280,
    )
    said = set()
    for line in re.findall(r"(?m)^  (-.*)$", done.stdout):
        options, _, _ = line.partition("  ")
        said.update(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", options))
    version: Optional[Version] = tuple(map(int, components.VLLM_VERSION.split(".")))  # type: ignore[assignment]
    assert version and len(said) > 300, done.stdout[-2000:]
    known = {flag for flag in all_known(version, FLAGS) if flag.startswith("--")}
    unsaid = {flag for flag in known if flag not in said}
    unknown = {flag for flag in said - known if flag.replace("--no-", "--", 1) not in known}
    assert not unsaid and unknown <= {"--help"}, (sorted(unsaid), sorted(unknown))


# Of each era one: 0.8.3 is hfship's first, --task went after 0.12, 0.20 has CUDA 13 and limits states.
EXECUTED = ("0.8.3", "0.11.0", "0.20.0")


def emitted_for(version: Version) -> List[List[str]]:
    """What plans of all kinds give to a version: real shapes, all parsers and types, all ways to split."""
    text = version_text(version)
    image = Image(f"vllm/vllm-openai:v{text}", "sha256:1", version, cuda="12.8")
    plans = [replace(plan, version=version) for plan in (PLAN, CPU, FULL)]
    for name in ZOO:
        for options in (
            ServeOptions(device="gpu"),
            ServeOptions(device="gpu", pipeline_parallel_size=2),
        ):
            with contextlib.suppress(HostError):
                host = Host(assumed_gpus("8xH200"))
                plans.append(make_plan(name, "/m", facts_of(name), host, image, options))
    plain = plans[0]
    plans += [replace(plain, dtype=dtype) for dtype in DTYPES]
    plans += [replace(plain, kv_cache_dtype=name) for name in ("fp8", "fp8_e4m3", "fp8_e5m2")]
    for format_ in TOOL_FORMATS:
        parser = parser_for(TOOL_PARSERS, format_.parsers, version)
        plans.append(replace(plain, tool_parser=parser))
    for format_ in REASONING_FORMATS:
        parser = parser_for(REASONING_PARSERS, format_.parsers, version)
        plans.append(replace(plain, reasoning_parser=parser))
    plans.append(replace(plain, data_parallel_size=2, enable_expert_parallel=True))
    plans.append(replace(plain, tokenizer_mode="mistral", load_format="mistral"))
    plans += [
        replace(plain, lora=("a=/x", "b=/y"), max_lora_rank=rank) for rank in (8, 16, 64, 256)
    ]
    plans.append(replace(plain, chat_template="/x/t.jinja"))
    over_hosts = replace(plain, nodes=("10.0.0.1", "10.0.0.2"), pipeline_parallel_size=2)
    plans += [replace(over_hosts, node_rank=rank) for rank in (0, 1)]
    if version >= (0, 9, 0):
        shared = replace(over_hosts, pipeline_parallel_size=1, data_parallel_size=4)
        plans += [replace(shared, node_rank=rank) for rank in (0, 1)]
    commands = {tuple(vllm_arguments(plan)) for plan in plans}
    return [list(command) for command in sorted(commands)]


@pytest.mark.real
@pytest.mark.parametrize("text", EXECUTED)
def test_the_parser_of_that_version_takes_what_is_emitted(text: str) -> None:
    """The parsers themselves, run out of their wheels beside the packages of the newest."""
    modules = components.require("vllm-parsers") / text
    version = parse_version(text)
    assert version and (modules / "vllm").is_dir()
    commands = emitted_for(version)
    wrong = [[*commands[0], "--no-such-flag"], [*commands[0], "--dtype", "none"]]
    script = Path(__file__).with_name("support") / "vllm_parsers.py"
    done = subprocess.run(
        [components.python311(), "-B", script, modules],
        input=json.dumps(commands + wrong),
        env={**os.environ, "PYTHONPATH": str(components.require_torch())},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert not done.returncode, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    refused = [f"{' '.join(command)}\n{why}" for command, why in zip(commands, said) if why]
    assert not refused, "\n".join(refused)
    assert len(commands) > 60 and all(said[-2:]), said[-2:]


@pytest.mark.parametrize("flag", INSTEAD)
def test_only_what_some_version_lacks_has_something_to_write_instead(flag: str) -> None:
    known = [flag in all_known(version, FLAGS) for version in versions()]
    assert any(known) and not all(known)
    for word in flags_in(INSTEAD[flag].split()):
        assert any(word in all_known(version, FLAGS) for version in versions()), word


@pytest.mark.parametrize(
    "version, name, known",
    [
        ((0, 32, 0), "Qwen2ForSequenceClassification", True),  # of Qwen2ForCausalLM
        ((0, 32, 0), "Qwen3ForTokenClassification", True),
        ((0, 8, 3), "Gemma3ForSequenceClassification", False),  # not yet made of others
        ((0, 32, 0), "NobodyForSequenceClassification", False),
        ((0, 32, 0), "NobodyForCausalLM", False),
    ],
)
def test_a_class_that_vllm_makes_of_another_is_known(version: Any, name: str, known: bool) -> None:
    assert knows(version, ARCHITECTURES, name) == known


def test_a_version_that_nobody_knows_is_called_so() -> None:
    assert [version_text(version) for version in ((0, 11, 2), NEWEST)] == ["0.11.2", "unknown"]
