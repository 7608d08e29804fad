# SPDX-License-Identifier: Apache-2.0
"""The texts of a deployment, each function by itself; test_deploy.py has compose."""

from __future__ import annotations

import json
from typing import Any, Dict, List

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hfship.base.errors import IntegrityError, UsageError
from hfship.base.values import replace
from hfship.serve import files as room
from hfship.serve.terms import Plan

PLAN = Plan(
    name="m",
    model_dir="/models/m",
    port=8000,
    image="vllm:1",
    image_id="sha256:1",
    gpus=("GPU-1", "GPU-2"),
    env={"A": "1", "B": "it's"},
)


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("", "''"),
        ("plain_./:,@%+-9", "plain_./:,@%+-9"),
        ("a b", "'a b'"),
        ("$x", "'$x'"),
        ('say "x"', "'say \"x\"'"),
        ("it's", '"it\'s"'),
        ("a\\", '"a\\\\"'),  # in single quotes it would take the end away
        ("it's $5", '"it\'s \\$5"'),
        ('it\'s "x"', '"it\'s \\"x\\""'),
        ("x\n", "'x\n'"),
    ],
)
def test_values_of_a_variable_as_compose_reads_them(value: str, quoted: str) -> None:
    assert room.env_quote(value) == quoted and room.env_unquote(quoted) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [(" x ", "x"), ("'", "'"), ('"', '"'), ("''", ""), ("'a\"", "'a\""), ('"a\\nb"', "a\\nb")],
)
def test_values_that_an_operator_wrote(text: str, value: str) -> None:
    assert room.env_unquote(text) == value


def test_the_key_is_the_first_line_and_no_variable() -> None:
    text = room.env_text(PLAN, "sk-1")
    assert text.splitlines()[1:] == ["VLLM_API_KEY=sk-1", "A=1", 'B="it\'s"']
    assert "0600" in text.splitlines()[0] and "vllm_m" in text and text.endswith("\n")
    assert room.key_in_env(text) == "sk-1"
    assert room.variables_in_env(text) == {"A": "1", "B": "it's"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", ""),
        ("A=b\n", ""),
        ("# VLLM_API_KEY=x\n", ""),
        ("VLLM_API_KEY='sk-1'\n", "sk-1"),
        ('A=b\nVLLM_API_KEY= "sk-1" \n', "sk-1"),
        ("VLLM_API_KEY=\n", ""),
        ("VLLM_API_KEY=a b", None),
        ("VLLM_API_KEY=a$b", None),
    ],
)
def test_the_key_in_an_env(text: str, key: Any) -> None:
    if key is None:
        with pytest.raises(ValueError, match="VLLM_API_KEY may have letters"):
            room.key_in_env(text)
    else:
        assert room.key_in_env(text) == key


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("A_1", "x y", ""),
        ("_", "", ""),
        ("1A", "x", "not a variable"),
        ("A-B", "x", "not a variable"),
        ("", "x", "not a variable"),
        ("A\n", "x", "not a variable"),
        ("A", "x\ny", "not a variable"),
        ("A", "\x7f", "not a variable"),
        ("VLLM_API_KEY", "x", "is refused"),
    ],
)
def test_variables_that_an_env_can_carry(name: str, value: str, what: str) -> None:
    if not what:
        room.require_env(name, value)
        return
    with pytest.raises(UsageError, match=what):
        room.require_env(name, value)


# -- plan.json


ASKED: Dict[str, Any] = {"env": ["A=secret", "B"], "port": 1}


def test_secrets_that_were_asked_for_are_not_in_the_plan() -> None:
    plan = replace(PLAN, wishes=ASKED)
    value = room.plan_value(plan)
    assert value["env"] == {} and value["wishes"] == {"env": ["A", "B"], "port": 1}
    assert "secret" not in room.plan_text(plan)
    assert plan.wishes == ASKED and plan.env == PLAN.env, "the plan itself is as it was"
    assert room.plan_value(PLAN)["env"] == PLAN.env
    read = room.parse_plan(room.plan_text(plan), "plan.json")
    whole = room.with_variables(read, {"A": "secret", "C": "other"})
    assert whole.env == {"A": "secret"} and whole.wishes == {"env": ["A=secret"], "port": 1}
    assert room.with_variables(PLAN, {"A": "2"}) is PLAN


@pytest.mark.parametrize("wishes", [{}, {"env": None}, {"env": "A=1"}, {"env": []}])
def test_without_wishes_no_variable_was_asked_for(wishes: Dict[str, Any]) -> None:
    assert room.asked_variables(wishes) == []


def test_a_plan_is_read_as_it_was_written() -> None:
    text = room.plan_text(PLAN)
    assert text.startswith("{\n ") and text.endswith("}\n")
    value = json.loads(text)
    assert list(value) == sorted(value) and value["format"] == "hfship-plan/1"
    assert room.parse_plan(text, "plan.json") == PLAN


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "ValueError"),
        ("[]", "TypeError"),
        ("null", "TypeError"),
        ("{}", "KeyError: 'format'"),
        (
            '{"format": "hfship-plan/2", "name": "m"}',
            "format is 'hfship-plan/2', this hfship reads",
        ),
        ('{"format": "hfship-plan/1"}', "KeyError: 'name'"),
        ('{"format": "hfship-plan/1", "name": ""}', "ValueError"),
        ('{"format": "hfship-plan/1", "name": "m", "port": "x"}', "port"),
    ],
)
def test_what_is_no_plan(text: str, why: str) -> None:
    with pytest.raises(IntegrityError, match="plan.json is not a valid plan") as told:
        room.parse_plan(text, "plan.json")
    assert why in told.value.why or (why == "ValueError" and "Error" in told.value.why)
    assert told.value.next_step == "run hfship serve again"


# -- docker-compose.yml


def service_of(**fields: Any) -> Dict[str, Any]:
    return dict(room.compose_value(replace(PLAN, device="gpu", **fields))["services"]["vllm"])


def test_a_service_is_locked_down_and_restarts() -> None:
    found = service_of(bind="127.0.0.1", ready_timeout_s=4000, shm_size="16g")
    expected = {
        "container_name": "vllm_m",
        "image": "vllm:1",
        "pull_policy": "never",
        "env_file": [".env"],
        "shm_size": "16g",
        "ipc": "private",
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": "60s",
        "security_opt": ["no-new-privileges:true"],
        "cap_drop": ["ALL"],
        "pids_limit": 32768,
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}},
        "labels": {"hfship.name": "m", "hfship.image-id": "sha256:1"},
        "ports": ["127.0.0.1:8000:8000"],
    }
    assert {key: found[key] for key in expected} == expected
    devices = found["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [
        {"driver": "nvidia", "device_ids": ["GPU-1", "GPU-2"], "capabilities": ["gpu"]}
    ]
    health = found["healthcheck"]
    assert (health["interval"], health["timeout"], health["retries"]) == ("15s", "10s", 4)
    assert health["start_period"] == "4000s" and health["test"][:3] == ["CMD", "python3", "-c"]
    assert "http://127.0.0.1:8000/health" in health["test"][3]
    compile(health["test"][3], "healthcheck", "exec")
    assert not {"cap_add", "mem_limit", "networks"} & set(found)
    model, cache, *_ = found["volumes"]
    assert (model["source"], model["target"]) == ("/models/m", "/models/m")
    assert cache == {"type": "volume", "source": "vllm-cache", "target": "/root/.cache"}


@pytest.mark.parametrize(
    ("fields", "key", "value"),
    [
        ({"cap_add": ("SYS_NICE",)}, "cap_add", ["SYS_NICE"]),
        ({"memory_limit": 7}, "mem_limit", 7),
        ({"bind": "::1"}, "ports", ["[::1]:8000:8000"]),
        ({"network": "site"}, "networks", ["site"]),
        (
            {"model_version": "abc"},
            "labels",
            {
                "hfship.name": "m",
                "hfship.image-id": "sha256:1",
                "hfship.model-version": "abc",
            },
        ),
    ],
)
def test_what_a_plan_may_add_to_a_service(fields: Dict[str, Any], key: str, value: Any) -> None:
    found = service_of(**fields)
    assert found[key] == value
    assert ("ports" in found) == ("network" not in fields)


def test_a_deployment_has_its_own_project_network_and_cache() -> None:
    plain = room.compose_value(replace(PLAN, device="cpu"))
    assert plain["name"] == "hfship-m" and plain["volumes"] == {"vllm-cache": {}}
    assert "networks" not in plain and "deploy" not in plain["services"]["vllm"]
    joined = room.compose_value(replace(PLAN, network="site"))
    assert joined["networks"] == {"site": {"external": True}}
    text = room.compose_text(replace(PLAN, device="gpu"))
    assert text.startswith("# Written by hfship from plan.json; `hfship serve m` writes it again.")
    assert yaml.safe_load(text)["services"]["vllm"]["image"] == "vllm:1"


def test_gpus_by_cdi_have_the_name_of_their_kind() -> None:
    assert room.gpu_devices(replace(PLAN, cdi=True)) == {
        "driver": "cdi",
        "device_ids": ["nvidia.com/gpu=GPU-1", "nvidia.com/gpu=GPU-2"],
        "capabilities": ["gpu"],
    }


# -- YAML


VALUES = st.recursive(
    st.one_of(st.text(), st.integers(-9, 9), st.booleans(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    ),
    max_leaves=8,
)
LINES = st.lists(st.sampled_from(["one", " two", "", "$x", "- three", "#", "\tfour"]), max_size=4)


@settings(max_examples=60)
@given(st.one_of(VALUES, LINES.map("\n".join), LINES.map(lambda found: "\n".join([*found, ""]))))
def test_yaml_is_read_as_it_was_meant(value: Any) -> None:
    for key in ("x", None):
        wanted = value if key is None else {key: value}
        assert yaml.safe_load("\n".join([*room.plain_yaml(wanted), ""])) == wanted


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one\ntwo\n", ["x: |", "  one", "  two"]),
        ("one\n\ntwo\n", ["x: |", "  one", "  ", "  two"]),
        ("one\ntwo", ['x: "one\\ntwo"']),
        ("one\n\n", ['x: "one\\n\\n"']),
        (" one\n", ['x: " one\\n"']),
        ("\none\n", ['x: "\\none\\n"']),
        ("one\x07\n", ['x: "one\\u0007\\n"']),
        ("", ['x: ""']),
        ("one", ['x: "one"']),
    ],
)
def test_texts_of_several_lines_stay_readable_where_they_can(text: str, lines: List[str]) -> None:
    assert room.plain_yaml({"x": text}) == lines


@pytest.mark.parametrize("text", ["\x7f", "\x85", "\x9f", "\u2028", "\ufeff", "\ufffe", "é"])
def test_what_yaml_must_have_escaped_is(text: str) -> None:
    found = room.yaml_string(f"a{text}$")
    assert yaml.safe_load(found) == f"a{text}$$"
    assert (text in found) == (text == "é")
