# SPDX-License-Identifier: Apache-2.0
"""What clients of the API expect: tool calls and thoughts, read by vLLM's parsers.

Owns which of vLLM's parsers suits a model. A parser is found by what the chat template tells the
model to write, since that is what the parser has to read; by the family where vLLM makes the prompt
itself. The names of parsers are those of vllm_table.json.
Promises: a parser that the image's vLLM lacks is not asked for, and a template without tools gets
none: what the model never learnt of is better refused than passed over.
Never: runs a template; asks docker.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from hfship.base.errors import HostError, NotFoundError
from hfship.base.values import replace
from hfship.serve.model_folder import read_json
from hfship.serve.vllm_table import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    intervals_of,
    knows,
    version_text,
)

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts
    from hfship.serve.terms import Plan, ServeOptions, Version

TEMPLATE_SIZE = 1 << 20  # bytes; the longest that is published has 40 kB
# Up to this version a reasoning parser is used only with --enable-reasoning.
REASONING_ASKED: Version = (0, 8, 99)


class Format(NamedTuple):
    """A way to write tool calls or thoughts: of which models, and vLLM's parsers for it, the best
    first. A model has it if its type matches `family`, and the template contains all `marks`."""

    family: str
    marks: Tuple[str, ...]
    parsers: Tuple[str, ...]


# The first row that holds. Marks are what the parsers of vLLM 0.8.3 to 0.33 look for.
TOOL_FORMATS: Sequence[Format] = (
    Format("gpt_oss", (), ("openai",)),
    Format("deepseek_v32", (), ("deepseek_v32",)),
    Format("deepseek_v4", (), ("deepseek_v4",)),
    Format("kimi_k3", ("tools",), ("kimi_k3",)),
    Format("minimax_m3", ("tools",), ("minimax_m3",)),
    Format("step3p5", ("<function=",), ("step3p5", "qwen3_coder")),
    Format("step3", ("tools",), ("step3",)),
    Format("mimo", ("<function=",), ("mimo", "qwen3_coder")),
    Format("hunyuan", ("<tool_calls>",), ("hunyuan_a13b",)),
    Format("jamba", ("<tool_calls>",), ("jamba",)),
    Format("ernie", ("<tool_call>",), ("ernie45",)),
    Format("olmo3", ("<function_calls>",), ("olmo3",)),
    Format("granite", ("<|tool_call|>",), ("granite",)),
    Format("granite", ("<tool_call>",), ("granite4", "hermes")),
    Format("", ("｜DSML｜function_calls",), ("deepseek_v32",)),
    Format("", ("｜DSML｜",), ("deepseek_v4",)),
    Format("", ("<｜tool▁calls▁begin｜>", "```json"), ("deepseek_v3",)),
    Format("", ("<｜tool▁calls▁begin｜>",), ("deepseek_v31",)),
    Format("", ("<|tool_calls_section_begin|>",), ("kimi_k2",)),
    Format("", ("<minimax:tool_call>",), ("minimax_m2",)),
    Format("", ("<seed:tool_call>",), ("seed_oss",)),
    Format("", ("<longcat_tool_call>",), ("longcat",)),
    Format("", ("<arg_key>", "{function-name}<arg_key>"), ("glm47", "glm45")),
    Format("", ("<arg_key>",), ("glm45", "glm4_moe")),
    Format("", ("[TOOL_CALLS]",), ("mistral",)),
    Format("", ("<|tool_call_start|>",), ("lfm2",)),
    Format("", ("<|tool_call>",), ("gemma4",)),
    Format("", ("<start_function_call>",), ("functiongemma",)),
    Format("", ("<|START_ACTION|>",), ("cohere_command3",)),
    Format("", ("<|tools_prefix|>",), ("apertus",)),
    Format("", ("functools[",), ("phi4_mini_json",)),
    Format("", ("<|plugin|>",), ("internlm",)),
    Format("", ("<|channel|>", "functions"), ("openai",)),
    Format("llama4", ("[func_name1(",), ("llama4_pythonic", "pythonic")),
    Format("", ("[func_name1(",), ("pythonic",)),
    Format("llama4", ('"parameters"',), ("llama4_json", "llama3_json")),
    Format("", ("<function=", "<tool_call>"), ("qwen3_coder", "qwen3_xml")),
    Format("", ("<tool_call>",), ("hermes",)),
    Format("llama|mllama", ('"parameters"', "<|eot_id|>"), ("llama3_json",)),
)
REASONING_FORMATS: Sequence[Format] = (
    Format("gpt_oss", (), ("openai_gptoss", "GptOss")),
    Format("deepseek_v32", (), ("deepseek_v3",)),
    Format("deepseek_v4", (), ("deepseek_v4",)),
    Format("", ("[THINK]",), ("mistral",)),
    Format("", ("<seed:think>",), ("seed_oss",)),
    Format("gemma4", ("<|channel>",), ("gemma4",)),
    Format("granite", ("Here is my thought process",), ("granite",)),
    Format("", ("<|channel|>analysis",), ("openai_gptoss", "GptOss")),
    Format("kimi_k3", ("</think>",), ("kimi_k3",)),
    Format("minimax_m3", ("</think>",), ("minimax_m3",)),
    Format("", ("</think>", "<minimax:tool_call>"), ("minimax_m2",)),
    Format("", ("</think>", "<|tool_calls_section_begin|>"), ("kimi_k2",)),
    Format("", ("</think>", "{function-name}<arg_key>"), ("glm47", "glm45")),
    Format("glm", ("</think>",), ("glm45", "glm4_moe")),
    Format("qwen3", ("</think>",), ("qwen3",)),
    Format("nemotron_h", ("</think>",), ("nemotron_v3", "deepseek_r1")),
    Format("step3p5", ("</think>",), ("step3p5",)),
    Format("step3", ("</think>",), ("step3",)),
    Format("mimo", ("</think>",), ("mimo", "qwen3")),
    Format("hunyuan", ("<think>",), ("hunyuan_a13b",)),
    Format("ernie", ("</think>",), ("ernie45",)),
    Format("olmo3", ("<think>",), ("olmo3",)),
    # DeepSeek's hybrids think when they are asked to, the others always.
    Format("deepseek_v3", ("</think>", "thinking"), ("deepseek_v3",)),
    Format("deepseek", ("</think>",), ("deepseek_r1",)),
    Format("", ("</think>", "<｜Assistant｜>"), ("deepseek_r1",)),
)
# A template that opens the thought in the prompt: then all is thought until it is closed.
_OPENS_THOUGHT = re.compile(r"add_generation_prompt(?!.*add_generation_prompt).*<think>", re.DOTALL)


def formats_of(model_type: str, template: str) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
    """(parsers of tool calls, parsers of thoughts) for a model, each the best first; () for none.

    >>> formats_of("qwen3", "{% if tools %}<tool_call>{% endif %}<think>x</think>")
    (('hermes',), ('qwen3',))
    >>> formats_of("qwen2", "{{ messages }}")
    ((), ())
    """
    tools: Tuple[str, ...] = ()
    shows_tools = re.search(r"\btools\b", template)
    if shows_tools or not template:
        tools = _parsers(TOOL_FORMATS, model_type, template)

    reasoning = _parsers(REASONING_FORMATS, model_type, template)
    if reasoning:
        return tools, reasoning
    if "</think>" in template and _OPENS_THOUGHT.search(template):
        reasoning = ("deepseek_r1",)
    return tools, reasoning


def _parsers(formats: Sequence[Format], model_type: str, template: str) -> Tuple[str, ...]:
    for format_ in formats:
        of_family = re.match(format_.family, model_type)
        if of_family and all(mark in template for mark in format_.marks):
            return format_.parsers
    return ()


def parser_for(kind: str, names: Sequence[str], version: Version) -> str:
    """The first parser of a kind that this vLLM has; "" where it has none.

    >>> parser_for(TOOL_PARSERS, ("glm47", "glm45"), (0, 11, 0))
    'glm45'
    """
    for name in names:
        if knows(version, kind, name):
            return name
    return ""


class Parsers(NamedTuple):
    """vLLM's parsers for a model; "" for none."""

    tools: str = ""
    reasoning: str = ""


def parsers_for(facts: ModelFacts, version: Version, options: ServeOptions) -> Parsers:
    """The parsers that this vLLM has for a model, none with --no-tools."""
    if options.no_tools:
        return Parsers()
    return Parsers(
        parser_for(TOOL_PARSERS, facts.tool_parsers, version),
        parser_for(REASONING_PARSERS, facts.reasoning_parsers, version),
    )


def parser_warnings(facts: ModelFacts, version: Version) -> Iterator[str]:
    """What clients will miss because this vLLM is too old, or too new, for it."""
    wanted = {
        TOOL_PARSERS: (facts.tool_parsers, "tool calls will be refused"),
        REASONING_PARSERS: (facts.reasoning_parsers, "thoughts will stand in the answer"),
    }
    for kind, (names, missed) in wanted.items():
        if not names or parser_for(kind, names, version):
            continue

        spans = []
        for name in names:
            for interval in intervals_of(kind, name):
                span = f"{name} {interval.text()}"
                spans.append(span)
        have = ", ".join(spans)
        yield f"{missed}: vLLM {version_text(version)} has no parser for them ({have})"


# -- the chat template


def with_clients(facts: ModelFacts, folder: Path, options: ServeOptions) -> ModelFacts:
    """The facts of a model, with what its chat template, or that of the options, tells of clients.

    A model that makes embeddings, or has no template at all, is not asked to call tools. Raises
    NotFoundError, HostError, IntegrityError, DiskError.
    """
    if facts.embeds and not options.chat_template:
        return facts
    if options.chat_template:
        template = template_text(Path(options.chat_template))
        facts = replace(facts, chat_template=True)
    else:
        template = read_template(folder)
    tools, reasoning = formats_of(facts.model_type, template)
    if facts.own_tokenizer and not options.chat_template:
        tools = ("mistral",)  # vLLM writes the prompt by tekken.json
    return replace(facts, tool_parsers=tools, reasoning_parsers=reasoning)


def read_template(folder: Path) -> str:
    """The text of the chat templates of a model, as vLLM looks for them; "" where there are none.

    A model may have one for tools beside its usual one: then both. Raises IntegrityError,
    HostError, DiskError.
    """
    path = folder / "chat_template.jinja"
    texts = []
    if path.is_file():
        texts.append(template_text(path))
    for extra in sorted(folder.glob("additional_chat_templates/*.jinja")):
        texts.append(template_text(extra))
    for name in ("chat_template.json", "tokenizer_config.json"):
        if texts:
            break
        config = read_json(folder, name)
        texts += _templates_in(config.get("chat_template"))
    return "\n".join(texts)


def _templates_in(value: Any) -> List[str]:
    """The templates in a tokenizer's settings: a text, or a list of tables with a name each."""
    if isinstance(value, str):
        return [value]
    found = []
    if isinstance(value, list):
        for row in value:
            if isinstance(row, dict) and isinstance(row.get("template"), str):
                found.append(row["template"])
    return found


def template_text(path: Path) -> str:
    """The text of a chat template in a file. Raises NotFoundError, HostError."""
    try:
        with open(path, "rb") as file:
            content = file.read(TEMPLATE_SIZE + 1)
    except FileNotFoundError as exc:
        raise NotFoundError(f"there is no chat template {path}", "", "name a file") from exc
    except OSError as exc:
        raise HostError(f"cannot read {path}: {exc.strerror}", "", "name a file") from exc
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if len(content) > TEMPLATE_SIZE or not text.strip():
        what = f"{path} is no chat template"
        raise HostError(what, "it is empty, larger than 1 MB, or no text in UTF-8", "look at it")
    return text


# -- the arguments


def parser_settings(plan: Plan) -> Mapping[str, str]:
    """Flags of `vllm serve` and their values ("": a flag without one) for the parsers of a plan."""
    settings = {}
    if plan.tool_parser:
        settings["--enable-auto-tool-choice"] = ""
        settings["--tool-call-parser"] = plan.tool_parser
    if plan.reasoning_parser:
        settings["--reasoning-parser"] = plan.reasoning_parser
        if plan.version <= REASONING_ASKED:
            settings["--enable-reasoning"] = ""
    return settings
