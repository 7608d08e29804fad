"""Configs, plans, environments and models files as nobody should write them: a clear error or a sound plan, in no time."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.conftest import fuzzed
from hfship.base.errors import HfshipError, IntegrityError, NotFoundError, UsageError
from hfship.base.modelsfile import MOST_MISTAKES, read_models_file
from hfship.commands.modelskeys import models_schema
from hfship.serve.files import (
    compose_text,
    env_text,
    key_in_env,
    parse_plan,
    plan_text,
    variables_in_env,
)
from hfship.serve.model_folder import read_facts
from hfship.serve.parallel import sizing
from hfship.serve.plan import make_plan, vllm_arguments
from hfship.serve.terms import Host, Image, Plan, ServeOptions
from test_facts import CONFIGS
from test_plan import gpus

# -- config.json

NUMBERS = st.sampled_from(
    [0, 1, -1, 2**31 - 1, 2**31, 2**63, 10**17, 10**18, 10**30, 10**399, 1e17, 1e300, 0.5, -0.0]
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\ud800", "a\udfff", "\x1b[31m", "a\nb", "x" * 10**5]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
# What facts are read from, besides what the configs of the table have.
MORE_KEYS = (
    "text_config", "layer_types", "rope_parameters", "rope_scaling", "quantization_config", "auto_map",
    "kv_lora_rank", "full_attention_interval", "sliding_window", "sliding_window_pattern", "no_rope_layers",
    "hybrid_override_pattern", "model_max_length", "n_layer", "dtype", "architectures",
)  # fmt: skip


@st.composite
def configs(draw: Any) -> Dict[str, Any]:
    """The config of a published model, some of it made wrong."""
    config = dict(CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))])
    keys = sorted({*config, *MORE_KEYS})
    for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4)):
        config[key] = draw(VALUES)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (made / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    return made


def plans_of(folder: Path) -> Iterator[Plan]:
    """Plans for a folder, on GPUs and on the CPU. Raises HfshipError."""
    facts = read_facts(folder)
    json.dumps(asdict(facts), ensure_ascii=False).encode()
    assert all(len(row) == 4 for row in sizing(facts, ServeOptions()))
    image = Image("vllm/vllm-openai:v0.27.1", "sha256:1", (0, 27, 1))
    for host, options in (
        (Host(gpus("4x80GB")), ServeOptions(device="gpu")),
        (Host(memory=2**40), ServeOptions(device="cpu")),
    ):
        yield make_plan("m", str(folder), facts, host, image, options)


NO_HEADS = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
}


@given(configs())
@example(NO_HEADS)  # layers that keep states beside others of which nobody knows the width
@fuzzed(examples=400)
def test_any_config_gives_a_sound_plan_or_a_clear_error(
    folder: Path, config: Mapping[str, Any]
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    try:
        for plan in plans_of(folder):
            assert parse_plan(plan_text(plan), "it") == plan
            assert 0 <= plan.max_model_len <= 2**28
            compose_text(plan).encode()
            assert all(len(word) < 300 for word in vllm_arguments(plan))
    except HfshipError as exc:
        exc.text().encode()
        assert len(exc.text()) < 3000


HOSTILE: Dict[str, Any] = {
    "layers": {"num_hidden_layers": 10**17},
    "context": {"max_position_embeddings": 2**31, "layer_types": ["mamba"]},
    "surrogates": {"architectures": ["\ud800"]},
    "escape codes": {"architectures": ["\x1b[31mX"]},
    "vocabulary": {"vocab_size": 10**17},
    "experts": {"num_experts": 10**17},
    "digits": {"hidden_size": 10**399},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_model_has_is_refused(case: str, folder: Path) -> None:
    config = {**CONFIGS["Qwen3-8B"], **HOSTILE[case]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfshipError) as caught:
        list(plans_of(folder))
    assert caught.value.what.isprintable() and caught.value.why and caught.value.next_step


NO_CONFIGS: Dict[str, bytes] = {
    "nothing": b"",
    "nesting": b"[" * 10**6,
    "nested tables": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "digits": b'{"num_hidden_layers": ' + b"9" * 10**6 + b"}",
    "no number": b'{"num_hidden_layers": NaN}',
    "endless": b'{"num_hidden_layers": 1e999}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "other bytes": b'{"a": "\xff"}',
    "empty": b"{}",
    "zeros": bytes(10**6),
}


@pytest.mark.parametrize("case", NO_CONFIGS)
def test_what_is_no_config_is_refused(case: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(NO_CONFIGS[case])
    with pytest.raises((IntegrityError, NotFoundError), match=r"config\.json|is not a model"):
        read_facts(folder)


# -- plan.json, docker-compose.yml, .env

printable = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).filter(
    lambda name: name != "VLLM_API_KEY"
)


@st.composite
def plans(draw: Any) -> Plan:
    """A plan whose texts are of every kind that the options take."""
    env = draw(st.dictionaries(names, printable, max_size=4))
    asked = draw(st.lists(st.sampled_from(sorted(env)), unique=True)) if env else []
    return Plan(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        image=draw(printable),
        model_dir="/m/" + draw(printable),
        served_names=tuple(draw(st.lists(printable, min_size=1, max_size=3))),
        extra_args=tuple(draw(st.lists(printable, max_size=3))),
        gpus=tuple(draw(st.lists(printable, max_size=2))),
        device=draw(st.sampled_from(["gpu", "cpu"])),
        bind=draw(st.sampled_from(["127.0.0.1", "0.0.0.0", "::1"])),
        port=draw(st.integers(1, 65535)),
        env=env,
        wishes={"env": [f"{name}={env[name]}" for name in asked]} if asked else {},
    )


def uninterpolated(value: Any) -> Any:
    """What compose makes of texts: $$ is $, and no other $ is left."""
    if isinstance(value, str):
        assert "$" not in value.replace("$$", "")
        return value.replace("$$", "$")
    if isinstance(value, list):
        return [uninterpolated(item) for item in value]
    if isinstance(value, dict):
        return {key: uninterpolated(item) for key, item in value.items()}
    return value


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SERVICE_KEYS = set(yaml.safe_load(compose_text(Plan(name="m", device="cpu")))["services"]["vllm"])


@given(plans())
@fuzzed(examples=400)
def test_a_compose_file_says_what_the_plan_says_and_no_more(plan: Plan) -> None:
    service = uninterpolated(yaml.load(compose_text(plan), LOADER))["services"]["vllm"]
    assert service["image"] == plan.image and service["command"] == vllm_arguments(plan)
    assert service["volumes"][0]["source"] == plan.model_dir
    assert service["volumes"][0]["read_only"] is True and len(service["volumes"]) == 2
    assert service["pull_policy"] == "never" and service["env_file"] == [".env"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    expected = {"deploy"} if plan.device == "gpu" else set()
    assert set(service) - SERVICE_KEYS == expected


@given(plans())
@fuzzed(examples=200)
def test_variables_come_back_from_env_and_those_asked_for_are_nowhere_else(plan: Plan) -> None:
    text = env_text(plan, "sk-1")
    assert key_in_env(text) == "sk-1" and variables_in_env(text) == dict(plan.env)
    kept = json.loads(plan_text(plan))
    asked = [item.partition("=")[0] for item in plan.wishes.get("env", [])]
    assert kept["wishes"].get("env", []) == asked and not set(kept["env"]) & set(asked)


@given(st.dictionaries(st.sampled_from(sorted(asdict(Plan()))), VALUES, max_size=5))
@fuzzed(examples=200)
def test_a_plan_of_any_shape_is_read_or_refused(fields: Dict[str, Any]) -> None:
    text = json.dumps({"format": "hfship-plan/1", "name": "m", **fields})
    try:
        parse_plan(text, "it")
    except IntegrityError as exc:
        exc.text()


# -- models files

MODELS = 3000
TOML: Dict[str, str] = {
    "unknown keys": '[[model]]\nrepo = "o/m{}"\n[model.serve]\nprot = 1\n',
    "digits": '[[model]]\nrepo = "o/m{}"\n[model.serve]\nmax_model_len = ' + "9" * 400 + "\n",
    "one name": '[[model]]\nrepo = "o/m"\n',
    "names that cannot be": '[[model]]\nrepo = "../{}"\n',
}


@pytest.mark.parametrize("case", TOML)
def test_thousands_of_mistakes_are_told_at_once(case: str, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text("".join(TOML[case].replace("{}", str(i)) for i in range(MODELS)))
    with pytest.raises(UsageError) as caught:
        read_models_file(path, models_schema())
    lines = caught.value.why.splitlines()
    assert len(lines) == MOST_MISTAKES + 1 and lines[-1] == "and more of them"
    assert all(len(line) < 300 for line in lines)


def test_thousands_of_models_are_read(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text("".join(f'[[model]]\nrepo = "o/m{i}"\n' for i in range(MODELS)))
    assert len(read_models_file(path, models_schema()).models) == MODELS


NO_MODELS_FILES: Dict[str, bytes] = {
    "nested.toml": b"a = " + b"[" * 10**5,
    "tables.toml": b"[" + b".".join([b"a"] * 10**4) + b"]",
    "nested.json": b"[" * 10**6,
    "digits.json": b'{"model": [{"repo": ' + b"9" * 10**5 + b"}]}",
    "bytes.toml": b"\xff\xfe",
    "long.toml": b"#\n" * 10**7,
    "open.toml": b'a = """' + b"x\n" * 10**5,
    "brackets.toml": b'a = """\n' + b"]\n" * 10**5 + b'"""\nb = 1\n',
}


@pytest.mark.parametrize("name", NO_MODELS_FILES)
def test_what_is_no_models_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(NO_MODELS_FILES[name])
    with pytest.raises((UsageError, NotFoundError)):
        read_models_file(path, models_schema())


@given(st.dictionaries(st.sampled_from(["defaults", "model", "x"]), VALUES, max_size=3))
@fuzzed(examples=100)
def test_a_models_file_of_any_shape_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: Dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "models.json"
    path.write_text(json.dumps(value))
    said: List[str] = []
    try:
        read_models_file(path, models_schema())
    except UsageError as exc:
        said.append(exc.text())
