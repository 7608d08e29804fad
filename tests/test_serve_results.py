# SPDX-License-Identifier: Apache-2.0
"""What people read of a plan and of a model that answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.values import replace
from hfship.commands.serve_results import (
    address_text,
    curl_example,
    dtype_text,
    plan_summary,
    split_summary,
)
from hfship.serve.terms import Plan

PLAN = Plan(
    name="m",
    image="vllm/vllm-openai:v1",
    image_id="sha256:1",
    version=(0, 11, 2),
    gpus=("GPU-1", "GPU-2"),
    gpu_names=("0: H200", "1: H200"),
    tensor_parallel_size=2,
    max_model_len=4096,
    kv_bytes=5_000_000_000,
    concurrency=2.5,
    served_names=("m", "chat"),
    tool_parser="hermes",
    reasoning_parser="qwen3",
    lora=("sql=/a", "law=/b"),
    signed_by="0123",
    idle="sleeps",
    port=8001,
)


def lines(plan: Plan) -> Dict[str, str]:
    """What is said of a plan, by its label."""
    unmeasured: Any = SimpleNamespace()
    rows = plan_summary(plan, unmeasured).splitlines()
    at = rows[0].index(plan.image)
    return {row[:at].strip(): row[at:].strip() for row in rows}


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.commands.serve_results.measured_text", lambda _: "MEASURED")


def test_all_of_a_plan_is_told() -> None:
    assert lines(PLAN) == {
        "image": "vllm/vllm-openai:v1 (vLLM 0.11.2)",
        "runs on": "0: H200, 1: H200: split over 2",
        "context": "4096 tokens",
        "cache": "5.0 GB of KV cache per GPU, for about 2.5 requests of full length",
        "idle": "sleeps",
        "measured": "MEASURED",
        "names": "m, chat",
        "tools": "hermes, qwen3",
        "adapters": "sql, law",
        "address": "http://127.0.0.1:8001/v1",
        "signed": "by 0123",
    }


@pytest.mark.parametrize(
    "changes, label, said",
    [
        ({"image_id": ""}, "image", "vllm/vllm-openai:v1, not loaded here"),
        ({"gpus": (), "gpu_names": ()}, "runs on", "CPU"),
        ({"gpus": ("GPU-1",), "gpu_names": ("0: H200",)}, "runs on", "0: H200"),
        ({"max_model_len": 0}, "context", "as vLLM decides"),
        ({"gpus": ()}, "cache", "5.0 GB of KV cache, for about 2.5 requests of full length"),
        ({"tool_parser": ""}, "tools", "qwen3"),
        ({"tool_parser": "", "reasoning_parser": ""}, "tools", None),
        ({"lora": ()}, "adapters", None),
        ({"signed_by": ""}, "signed", None),
        ({"idle": ""}, "idle", None),
        ({"dtype": "half", "kv_cache_dtype": "fp8"}, "dtype", "half, KV cache in fp8"),
    ],
)
def test_what_a_plan_does_not_have_is_not_told(
    changes: Dict[str, Any], label: str, said: Any
) -> None:
    assert lines(replace(PLAN, **changes)).get(label) == said


@pytest.mark.parametrize(
    "dtype, cache, said",
    [("auto", "auto", ""), ("half", "auto", "half"), ("auto", "fp8", "KV cache in fp8")],
)
def test_a_type_is_told_where_it_is_not_the_models_own(dtype: str, cache: str, said: str) -> None:
    assert dtype_text(replace(PLAN, dtype=dtype, kv_cache_dtype=cache)) == said


@pytest.mark.parametrize(
    "sizes, said",
    [
        ((1, 1, 1), ""),
        ((2, 1, 1), "split over 2"),
        ((1, 3, 1), "a pipeline of 3 stages"),
        ((2, 3, 1), "a pipeline of 3 stages, each stage split over 2"),
        ((2, 3, 4), "4 copies, each a pipeline of 3 stages, each split over 2"),
        ((1, 1, 4), "4 copies"),
    ],
)
def test_how_a_model_is_split(sizes: List[int], said: str) -> None:
    tensor, pipeline, data = sizes
    plan = replace(
        PLAN,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
    )
    assert split_summary(plan) == said


@pytest.mark.parametrize(
    "bind, said",
    [
        ("127.0.0.1", ""),
        ("::1", ""),
        ("0.0.0.0", ", open to all networks of this machine: 0.0.0.0:8001"),
        ("::", ", open to all networks of this machine: [::]:8001"),
        ("10.0.0.1", ", open to the network of this address: 10.0.0.1:8001"),
    ],
)
def test_an_address_says_who_may_reach_it(bind: str, said: str) -> None:
    plan = replace(PLAN, bind=bind)
    assert address_text(plan) == plan.url + said


@pytest.mark.parametrize(
    "task, route, has, lacks",
    [
        ("chat", "/v1/chat/completions", ['"model": "m"', '"max_tokens": '], ["temperature"]),
        ("transcription", "/v1/audio/transcriptions", ["-F file=@FILE.wav -F model=m"], [" -d "]),
        ("none", "/v1/models", ["-H @- http://127.0.0.1:8001/v1/models"], [" -d ", " -F "]),
        ("embedding", "/v1/embeddings", ['"model": "m"', '"input"'], ["max_tokens"]),
    ],
)
def test_the_request_that_proved_a_model(
    task: str, route: str, has: List[str], lacks: List[str]
) -> None:
    answer: Any = SimpleNamespace(task=task, route=route)
    text = curl_example(PLAN, Path("/d e/.env"), answer)
    assert text.startswith("awk -F= '/^VLLM_API_KEY=/") and "'/d e/.env' | curl -s -H @- " in text
    assert f"http://127.0.0.1:8001{route}" in text
    assert all(word in text for word in has) and not any(word in text for word in lacks)
