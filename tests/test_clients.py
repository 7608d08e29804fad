"""Parsers of tool calls and thoughts: found by what a template says, and only where the image has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Tuple

import pytest

from hfship.base.errors import HostError, NotFoundError
from hfship.serve.clients import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    formats_of,
    parser_settings,
    parser_warnings,
    parsers_for,
    read_template,
    with_clients,
)
from hfship.serve.plan import vllm_arguments
from hfship.serve.terms import NEWEST, ServeOptions
from hfship.serve.vllm_table import REASONING_PARSERS, TOOL_PARSERS, intervals_of, knows, versions
from test_deploy import PLAN
from test_facts import facts_of

TOOLS = "{% if tools %}…{% endif %}"
THINKS = "{{ content.split('</think>')[-1] }}"
OPENS = "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"

# (model type, what its template says): the parsers. The words are those of the published templates.
FAMILIES = {
    "Qwen2.5": ("qwen2", TOOLS + '<tool_call>\n{"name": <function-name>', "hermes", ""),
    "Qwen3": ("qwen3", TOOLS + "<tool_call>" + THINKS, "hermes", "qwen3"),
    "Qwen3 Instruct 2507": ("qwen3_moe", TOOLS + "<tool_call>", "hermes", ""),
    "Qwen3-Coder": ("qwen3_moe", TOOLS + "<tool_call>\n<function=x>", "qwen3_coder", ""),
    "Qwen3.5": ("qwen3_5", TOOLS + "<tool_call>\n<function=x>" + THINKS, "qwen3_coder", "qwen3"),
    "QwQ": ("qwen2", TOOLS + "<tool_call>" + THINKS + OPENS, "hermes", "deepseek_r1"),
    "R1-Distill": ("llama", "<｜Assistant｜>" + THINKS, "", "deepseek_r1"),
    "DeepSeek-R1-0528": (
        "deepseek_v3",
        TOOLS + "<｜tool▁calls▁begin｜>function<｜tool▁sep｜>\n```json" + THINKS,
        "deepseek_v3",
        "deepseek_r1",
    ),
    # its own template does not show tools to the model
    "DeepSeek-V3.1": (
        "deepseek_v3",
        "{% if thinking %}<｜tool▁calls▁begin｜>{{ message['tool_calls'] }}" + THINKS,
        "",
        "deepseek_v3",
    ),
    "DeepSeek-V3.2": ("deepseek_v32", "", "deepseek_v32", "deepseek_v3"),
    "Llama-3.1": ("llama", TOOLS + '<|eot_id|>{"name": x, "parameters": y}', "llama3_json", ""),
    "Llama-3": ("llama", "<|eot_id|>", "", ""),
    "Llama-4": ("llama4", TOOLS + "[func_name1(params", "llama4_pythonic", ""),
    "Mistral": ("mistral", TOOLS + "[TOOL_CALLS]", "mistral", ""),
    "Magistral": ("mistral3", TOOLS + "[TOOL_CALLS][THINK]", "mistral", "mistral"),
    "gpt-oss": ("gpt_oss", "", "openai", "openai_gptoss"),
    "GLM-4.6": ("glm4_moe", TOOLS + "{function-name}\n<arg_key>" + THINKS, "glm45", "glm45"),
    "GLM-4.7": ("glm4_moe", TOOLS + "{function-name}<arg_key>" + THINKS, "glm47", "glm47"),
    "Kimi-K2": ("kimi_k2", TOOLS + "<|tool_calls_section_begin|>", "kimi_k2", ""),
    "Kimi-K2-Thinking": (
        "kimi_k2",
        TOOLS + "<|tool_calls_section_begin|>" + THINKS,
        "kimi_k2",
        "kimi_k2",
    ),
    "MiniMax-M2": ("minimax_m2", TOOLS + "<minimax:tool_call>" + THINKS, "minimax_m2", "minimax_m2"),
    "Seed-OSS": ("seed_oss", TOOLS + "<seed:tool_call><seed:think>", "seed_oss", "seed_oss"),
    "Granite-3.1": ("granite", TOOLS + "<|tool_call|>", "granite", ""),
    "Granite-4": ("granitemoehybrid", TOOLS + "<tool_call>", "granite4", ""),
    "Gemma-4": ("gemma4", TOOLS + "<|tool_call>call:<|channel>", "gemma4", "gemma4"),
    "Gemma-3": ("gemma3", "<start_of_turn>", "", ""),
    "Phi-4-mini": ("phi3", TOOLS + "functools[{", "phi4_mini_json", ""),
    "Nemotron-3": (
        "nemotron_h",
        TOOLS + "<tool_call>\n<function=x>" + THINKS,
        "qwen3_coder",
        "nemotron_v3",
    ),
    # its calls stand in <TOOLCALL>, which no parser of vLLM reads
    "Nemotron-Nano-v2": ("nemotron_h", TOOLS + "<TOOLCALL>[" + THINKS, "", "nemotron_v3"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_parsers_of_a_family(family: str) -> None:
    model_type, template, tools, reasoning = FAMILIES[family]
    facts = _facts(*formats_of(model_type, template))
    assert parsers_for(facts, NEWEST, ServeOptions()) == (tools, reasoning)


def _facts(tools: Tuple[str, ...], reasoning: Tuple[str, ...]) -> Any:
    return replace(facts_of("Qwen3-8B"), tool_parsers=tools, reasoning_parsers=reasoning)


def test_every_parser_of_the_tables_exists() -> None:
    for kind, formats in ((TOOL_PARSERS, TOOL_FORMATS), (REASONING_PARSERS, REASONING_FORMATS)):
        names = {name for format_ in formats for name in format_.parsers}
        assert [name for name in names if not intervals_of(kind, name)] == []


@pytest.mark.parametrize("version", [*versions(), NEWEST], ids=str)
def test_a_parser_is_named_only_where_the_version_has_it(version: Any) -> None:
    for kind, formats in ((TOOL_PARSERS, TOOL_FORMATS), (REASONING_PARSERS, REASONING_FORMATS)):
        for format_ in formats:
            facts = _facts(format_.parsers, format_.parsers)
            found = parsers_for(facts, version, ServeOptions())
            name = found.tools if kind == TOOL_PARSERS else found.reasoning
            assert not name or knows(version, kind, name)
            missed = [
                text for text in parser_warnings(facts, version) if format_.parsers[0] in text
            ]
            assert bool(name) or missed


@pytest.mark.parametrize(
    "version, tools, reasoning, emitted",
    [
        ((0, 8, 3), "hermes", "", ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]),
        ((0, 8, 3), "", "deepseek_r1", ["--enable-reasoning", "--reasoning-parser", "deepseek_r1"]),
        ((0, 20, 0), "", "qwen3", ["--reasoning-parser", "qwen3"]),
        ((0, 20, 0), "", "", []),
    ],
)
def test_what_is_emitted(version: Any, tools: str, reasoning: str, emitted: Any) -> None:
    plan = replace(PLAN, version=version, tool_parser=tools, reasoning_parser=reasoning)
    words = [word for pair in parser_settings(plan).items() for word in pair if word]
    assert sorted(words) == sorted(emitted)
    assert set(emitted) <= set(vllm_arguments(plan))
    own = vllm_arguments(replace(plan, extra_args=("--tool-call-parser=x", "--reasoning-parser=y")))
    assert "hermes" not in own and "qwen3" not in own and "deepseek_r1" not in own


def test_no_tools_means_none() -> None:
    facts = _facts(("hermes",), ("qwen3",))
    assert parsers_for(facts, NEWEST, ServeOptions(no_tools=True)) == ("", "")


def test_warning_names_the_versions_that_have_the_parser() -> None:
    (said,) = parser_warnings(_facts(("minimax_m2",), ()), (0, 8, 3))
    assert "minimax_m2 from 0.11.1 on" in said and "refused" in said
    assert list(parser_warnings(_facts(("minimax_m2",), ()), (0, 11, 1))) == []


# -- templates in files

FILES = {
    "none": ({}, ""),
    "jinja": ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": "T"}}, "J"),
    "settings": ({"tokenizer_config.json": {"chat_template": "T"}}, "T"),
    "beside others": (
        {
            "chat_template.jinja": "J",
            "additional_chat_templates/tool_use.jinja": "U",
            "additional_chat_templates/rag.jinja": "R",
            "tokenizer_config.json": {"chat_template": "T"},
        },
        "J\nR\nU",
    ),
    "settings that another reader has, too": (
        {
            "additional_chat_templates/tool_use.jinja": "U",
            "chat_template.json": {"chat_template": "P"},
        },
        "U",
    ),
    "others alone": ({"additional_chat_templates/tool_use.jinja": "U"}, "U"),
    "processor and settings": (
        {
            "chat_template.json": {"chat_template": "P"},
            "tokenizer_config.json": {"chat_template": "T"},
        },
        "P",
    ),
    "processor": ({"chat_template.json": {"chat_template": "P"}}, "P"),
    "two": (
        {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "U"}]}},
        "D\nU",
    ),
    "odd": ({"tokenizer_config.json": {"chat_template": [1, {"template": 2}]}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_where_a_template_lies(case: str, tmp_path: Path) -> None:
    files, expected = FILES[case]
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_template(tmp_path) == expected


def test_a_given_template_wins_over_the_models(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    given = tmp_path / "mine.jinja"
    given.write_text(TOOLS + "<tool_call>")
    facts = replace(facts_of("Qwen3-8B"), chat_template=False)
    found = with_clients(facts, tmp_path, ServeOptions(chat_template=str(given)))
    assert found.chat_template and found.tool_parsers == ("hermes",)
    assert with_clients(facts, tmp_path, ServeOptions()).tool_parsers == ()
    (tmp_path / "chat_template.jinja").write_text(TOOLS + "<tool_call>" + THINKS)
    found = with_clients(facts, tmp_path, ServeOptions())
    assert (found.tool_parsers, found.reasoning_parsers) == (("hermes",), ("qwen3",))
    embeds = replace(facts, embeds=True)
    assert with_clients(embeds, tmp_path, ServeOptions()) == embeds
    asked = with_clients(embeds, tmp_path, ServeOptions(chat_template=str(given)))
    assert asked.tool_parsers == ("hermes",)


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jinja"
    with pytest.raises(NotFoundError):
        with_clients(facts_of("Qwen3-8B"), tmp_path, ServeOptions(chat_template=str(path)))
    with pytest.raises(HostError, match="Is a directory"):
        with_clients(facts_of("Qwen3-8B"), tmp_path, ServeOptions(chat_template=str(tmp_path)))
    for content in (b"", b"\xff\xfe", b"x" * (1 << 20) + b"x"):
        path.write_bytes(content)
        with pytest.raises(HostError, match="is no chat template"):
            with_clients(facts_of("Qwen3-8B"), tmp_path, ServeOptions(chat_template=str(path)))
