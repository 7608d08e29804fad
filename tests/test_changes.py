"""What is said before a container that runs is made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List

import pytest

from hfship.serve.changes import changes
from test_plan import plan

PLAN = replace(plan("Qwen3-8B", "2x80GB"), env={"A": "secret", "B": "1"}, image_id="sha256:1")
CHANGED: List[Any] = [
    ({}, []),
    ({"concurrency": 9.0, "kv_bytes": 1}, []),  # what is only told
    ({"max_model_len": 512}, [f"--max-model-len {PLAN.max_model_len} -> 512"]),
    ({"image": "vllm:2"}, [f"image {PLAN.image} -> vllm:2"]),
    ({"image_id": "sha256:2"}, ["the image that has its name"]),
    ({"bind": "0.0.0.0", "port": 9000}, ["address 127.0.0.1 -> 0.0.0.0", f"port {PLAN.port} -> 9000"]),
    ({"gpus": ()}, [f"GPUs {PLAN.gpus[0]} -> none"]),
    ({"extra_args": ("--enforce-eager",)}, ["with --enforce-eager"]),
    ({"env": {"A": "other", "C": "2"}}, ["variables A, B, C"]),
    ({"model_dir": "/elsewhere"}, ["its compose file"]),
]  # fmt: skip


@pytest.mark.parametrize("fields, said", CHANGED)
def test_what_changes_is_named(fields: Dict[str, Any], said: List[str]) -> None:
    found = changes(PLAN, replace(PLAN, **fields))
    assert found == said and not any("secret" in text or "other" in text for text in found)


def test_what_is_left_out_is_named() -> None:
    assert changes(replace(PLAN, extra_args=("--enforce-eager",)), PLAN) == [
        "without --enforce-eager"
    ]
