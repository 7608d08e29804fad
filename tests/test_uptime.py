"""Deployments that are proven by what they are for, and kept up: a real Docker engine, a real vLLM, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Dict

import pytest

from conftest import PYZ, ROOT, missing
from support import components
from support.uptime_box import POOLING

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """What tests/support/uptime_box.py saw, once for all tests here."""
    components.require("vllm-image")
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    work = tmp_path_factory.mktemp("uptime")
    script = str(ROOT / "tests/support/uptime_box.py")
    argv = components.with_docker_argv([sys.executable, script, str(PYZ), str(work)])
    env = {**os.environ, "HFSHIP_STUB_GPUS": "none"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1700, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    found: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("command", ["serve", "status"])
def test_models_of_a_host_are_served_together_each_proven_by_its_task(
    seen: Dict[str, Any], command: str
) -> None:
    code, rows = seen["pooling"][command]
    found = {row["name"]: (row["state"], row["task"]) for row in rows}
    assert (code, found) == (0, {task: ("healthy", task) for task in POOLING}), rows
    assert len({row["url"] for row in rows}) == len(POOLING)


def test_a_chat_is_served_and_what_vllm_measured_is_kept(seen: Dict[str, Any]) -> None:
    code, served = seen["trouble"]["serve"]
    assert (code, served["task"]) == (0, "chat") and served["start_s"] > 0
    # So small a model may load its weights, and answer, between two looks at the log.
    assert "starting" in served["phases"] and len(served["phases"]) > 1, served
    measured = seen["trouble"]["measured"]
    assert measured["kv_tokens"] > 2048 and measured["task"] == "chat"


def test_an_engine_that_stands_still_is_hung_and_repaired(seen: Dict[str, Any]) -> None:
    trouble = seen["trouble"]
    code, hung = trouble["hung"]
    assert (code, hung["state"], hung["fault"]) == (9, "hung", "hung"), hung
    code, repaired = trouble["repair"]
    assert (code, repaired["repair"]) == (3, "restart"), repaired
    code, again = trouble["again"]
    assert (code, again["task"]) == (0, "chat"), again


def test_a_container_that_was_killed_is_down_and_started(seen: Dict[str, Any]) -> None:
    trouble = seen["trouble"]
    code, killed = trouble["killed"]
    assert (code, killed["state"]) == (9, "down") and "137" in killed["note"]
    code, repaired = trouble["repair again"]
    assert (code, repaired["repair"]) == (3, "start"), repaired
    assert " start down: it ended (exit code 137" in trouble["repairs"]


def test_what_was_stopped_is_left_alone_until_it_is_restarted(seen: Dict[str, Any]) -> None:
    code, stopped = seen["trouble"]["stopped"]
    assert (code, stopped["state"], stopped["repair"]) == (0, "stopped", "")
    code, restarted = seen["trouble"]["restart"]
    assert (code, restarted["state"], restarted["task"]) == (0, "healthy", "chat")
