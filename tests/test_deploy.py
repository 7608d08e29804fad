"""Deployment files: the plan in, text out, and read back by the programs that will read it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import components
import pytest
import yaml
from conftest import missing
from hypothesis import given
from hypothesis import strategies as st
from test_plan import plan

import hfship

PLAN = plan("Llama-3.1-70B", "4x80GB", served_names=("Llama-3.1-70B", "meta-llama/Llama-3.1-70B"))
printable = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30)


def compose(of: hfship.Plan) -> Dict[str, Any]:
    return yaml.safe_load(hfship.compose_text(of))


def uninterpolated(text: str) -> str:
    """What compose makes of a string: $$ is $."""
    assert "$" not in text.replace("$$", ""), text
    return text.replace("$$", "$")


def test_compose_file_says_what_the_plan_says() -> None:
    service = compose(PLAN)["services"]["vllm"]
    assert service["image"] == PLAN.image and service["pull_policy"] == "never"
    assert service["entrypoint"] == ["vllm", "serve"] and service["command"][0] == "/models/Llama-3.1-70B"
    assert service["container_name"] == "vllm_Llama-3.1-70B"
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["volumes"][0] == {
        "type": "bind",
        "source": "/m",
        "target": "/models/Llama-3.1-70B",
        "read_only": True,
        "bind": {"create_host_path": False},
    }
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "device_ids": list(PLAN.gpus), "capabilities": ["gpu"]}]
    assert service["security_opt"] == ["no-new-privileges:true"] and service["ipc"] == "private"
    assert "ulimits" not in service
    assert service["restart"] == "unless-stopped" and service["healthcheck"]["start_period"] == "3600s"


def test_cpu_reserves_no_gpu() -> None:
    cpu = replace(PLAN, device="cpu", gpus=())
    service = compose(cpu)["services"]["vllm"]
    assert "deploy" not in service
    assert "--tensor-parallel-size" not in service["command"] and "--gpu-memory-utilization" not in service["command"]


@pytest.mark.parametrize(
    "version, flags, absent",
    [
        ((0, 8, 3), ["--disable-log-requests"], ["--shutdown-timeout", "--disable-access-log-for-endpoints"]),
        ((0, 10, 2), [], ["--disable-log-requests", "--shutdown-timeout"]),
        ((0, 16, 0), ["--disable-access-log-for-endpoints"], ["--shutdown-timeout"]),
        ((0, 33, 0), ["--disable-access-log-for-endpoints", "--shutdown-timeout"], ["--disable-log-requests"]),
        (hfship.NEWEST, ["--shutdown-timeout"], ["--disable-log-requests"]),
    ],
)
def test_arguments_are_those_that_the_version_knows(version: tuple, flags: list, absent: list) -> None:
    arguments = hfship.vllm_arguments(replace(PLAN, version=version))
    assert set(flags) <= set(arguments) and not set(absent) & set(arguments)


def test_operators_arguments_win() -> None:
    arguments = hfship.vllm_arguments(replace(PLAN, extra_args=("--max_model_len=512", "--shutdown-timeout", "5")))
    assert arguments.count("--shutdown-timeout") == 1 and "--max-model-len" not in arguments
    dashes = hfship.vllm_arguments(replace(PLAN, extra_args=("--max-model-len=512",)))
    assert "--max-model-len" not in dashes and dashes[-1] == "--max-model-len=512"


def test_key_is_in_env_file_alone() -> None:
    key = "sk-secret"
    assert key not in hfship.plan_text(PLAN) + hfship.compose_text(PLAN)
    assert hfship.key_in_env(hfship.env_text(PLAN, key)) == key
    assert "key" not in " ".join(hfship.vllm_arguments(PLAN))


@pytest.mark.parametrize("key", ["a b", "a$b", "a=b", "é", "a\\b", "a#b", "a\tb"])
def test_key_that_would_not_arrive_unchanged_is_refused(key: str, tmp_path: Path) -> None:
    """Whoever edits .env hears it at once, without the key, and not as 401 from the API or as a traceback."""
    (tmp_path / ".env").write_text(f"VLLM_API_KEY='{key}'\n")
    with pytest.raises(hfship.UsageError) as caught:
        hfship.read_key(tmp_path, hfship.Reporter("none"))
    assert key not in caught.value.text() and str(tmp_path) in caught.value.what
    assert caught.value.__cause__ is None


def test_same_plan_same_bytes() -> None:
    for text in (hfship.plan_text, hfship.compose_text, lambda p: hfship.env_text(p, "k")):
        assert text(PLAN) == text(replace(PLAN))


def test_nothing_may_look_for_a_network() -> None:
    text = hfship.env_text(PLAN, "k")
    for line in ("HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "VLLM_NO_USAGE_STATS=1", "DO_NOT_TRACK=1"):
        assert line in text.splitlines()


def test_plan_is_read_back() -> None:
    assert hfship.parse_plan(hfship.plan_text(PLAN), "x") == PLAN
    newer = json.loads(hfship.plan_text(PLAN))
    newer["field_of_a_later_version"] = 1
    assert hfship.parse_plan(json.dumps(newer), "x") == PLAN


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "hfship-plan/2"}', '{"format": "hfship-plan/1"}'])
def test_damaged_plan_is_named(text: str) -> None:
    with pytest.raises(hfship.IntegrityError, match="x/plan.json"):
        hfship.parse_plan(text, "x/plan.json")


@pytest.mark.parametrize(
    "bind, port, url", [("::1", "[::1]:8000:8000", "[::1]"), ("0.0.0.0", "0.0.0.0:8000:8000", "127.0.0.1")]
)
def test_bind_address(bind: str, port: str, url: str) -> None:
    bound = replace(PLAN, bind=bind)
    assert compose(bound)["services"]["vllm"]["ports"] == [port] and bound.url == f"http://{url}:8000/v1"


values = st.recursive(
    st.booleans() | st.integers() | printable,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z]{1,8}_", fullmatch=True), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(values)
def test_every_value_survives_yaml(value: Any) -> None:
    def doubled(v: Any) -> Any:
        if isinstance(v, str):
            return v.replace("$", "$$")
        if isinstance(v, list):
            return [doubled(i) for i in v]
        return {k: doubled(i) for k, i in v.items()} if isinstance(v, dict) else v

    assert yaml.safe_load("\n".join(hfship.yaml_lines(value))) == doubled(value)


@given(printable, printable)
def test_no_path_or_argument_changes_the_meaning(path: str, argument: str) -> None:
    service = compose(replace(PLAN, model_dir="/m/" + path, extra_args=(argument,)))["services"]["vllm"]
    assert uninterpolated(service["volumes"][0]["source"]) == "/m/" + path
    assert uninterpolated(service["command"][-1]) == argument
    assert set(service) == set(compose(PLAN)["services"]["vllm"])


@given(st.text(max_size=5), st.text(max_size=5))
def test_variables_that_env_files_cannot_carry_are_refused(name: str, value: str) -> None:
    try:
        hfship.require_env(name, value)
    except hfship.UsageError:
        return
    assert name.isidentifier() and not set("\n\r\0") & set(value)


@pytest.mark.parametrize("name", ["", "A B", "1A", "A=B", "VLLM_API_KEY", "Ä", "A\n"])
def test_bad_variable_names(name: str) -> None:
    with pytest.raises(hfship.UsageError):
        hfship.require_env(name, "x")


NASTY = [
    "1",
    "",
    "a b",
    "a#b",
    "a #b",
    "$HOME",
    "${X}",
    "it's",
    'say "x"',
    "\\n",
    "it's \\ $5 `x`",
    "x=y",
    "ü 漢",
    "'",
    '"',
    "-",
]


@pytest.mark.real
def test_docker_compose_reads_it_all_back(tmp_path: Path) -> None:
    """The real compose, where it is installed: names, arguments and variables arrive as they were written."""
    docker = components.path("docker")
    if not docker:
        missing("docker compose")
    env = {f"V{i}": value for i, value in enumerate(NASTY)}
    nasty = replace(PLAN, env=env, extra_args=tuple(NASTY), model_dir="/m/a: b $c #d 'e' \"f\"")
    (tmp_path / "docker-compose.yml").write_text(hfship.compose_text(nasty))
    (tmp_path / ".env").write_text(hfship.env_text(nasty, "sk-1"))
    argv = [str(docker), "compose", "-f", str(tmp_path / "docker-compose.yml"), "config", "--format", "json"]
    plugins = {"DOCKER_CONFIG": str(components.HOME / "docker/config"), "PATH": os.environ["PATH"]}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=plugins)
    assert done.returncode == 0, done.stderr
    service = json.loads(done.stdout)["services"]["vllm"]
    # `config` prints what can be read again: its own $ are doubled.
    assert {k: uninterpolated(v) for k, v in service["environment"].items()} == {**env, "VLLM_API_KEY": "sk-1"}
    assert [uninterpolated(v) for v in service["command"][-len(NASTY) :]] == NASTY
    assert uninterpolated(service["volumes"][0]["source"]) == nasty.model_dir
