# SPDX-License-Identifier: Apache-2.0
"""The program that runs within images, in a process of its own: what it tells of vLLM and torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.serve import in_image

# In this locale a text of UTF-8 is read only by who says that it is one.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

# what torch/version.py says -> the version of CUDA
VERSIONS = {
    "__version__ = '2.8'\n# ü\ncuda: Optional[str] = '12.8'\nhip = None\n": "12.8",
    "cuda = '11'\n": "11",
    "cuda: Optional[str] = None\n": "",
    "cudart = '9.9'\n  cuda = '9.9'\n": "",
}


def about(folder: Path, path: str) -> Dict[str, Any]:
    """What it says of the packages in a folder."""
    env = {"PYTHONPATH": str(folder), "PATH": path, **ASCII}
    argv = [sys.executable, "-S", str(Path(in_image.__file__)), "about"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(in_image.MARK)]
    found = json.loads(row[len(in_image.MARK) :])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("said", VERSIONS)
def test_versions_are_read_whatever_the_locale(said: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text(said, encoding="utf-8")
    (tmp_path / "vllm-1.dist-info").mkdir()
    (tmp_path / "vllm-1.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.11.0\n")
    program = tmp_path / "bin/vllm"
    program.parent.mkdir()
    program.touch(0o755)
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    wanted = {"version": "0.11.0", "cuda": VERSIONS[said], "program": str(program)}
    assert about(tmp_path, path) == {"stage": "about", **wanted}


def test_of_what_is_not_there_nothing_is_said(tmp_path: Path) -> None:
    nothing = {"version": "", "cuda": "", "program": ""}
    assert about(tmp_path, str(tmp_path)) == {"stage": "about", **nothing}
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    assert about(tmp_path, str(tmp_path)) == {"stage": "about", **nothing}


# -- with a vLLM that is played


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vllm(**{"a.b": {"name": value}}): modules of vLLM, or of another name, that can be imported."""

    def install(modules: Dict[str, Any]) -> None:
        for name in [one for one in sys.modules if one.partition(".")[0] in ("vllm", "jinja2")]:
            monkeypatch.delitem(sys.modules, name)
        for name, content in modules.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                if parent not in sys.modules:
                    made = ModuleType(parent)
                    made.__path__ = []  # type: ignore[attr-defined]
                    monkeypatch.setitem(sys.modules, parent, made)
            vars(sys.modules[name]).update(content)

    return install


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> List[Dict[str, Any]]:
    """What the program says."""
    found: List[Dict[str, Any]] = []

    def tell(stage: str, **said: Any) -> None:
        found.append({"stage": stage, **said})

    monkeypatch.setattr(in_image, "tell", tell)
    return found


LONG = "max_model_len (9) is greater than the derived max_model_len (max_position_embeddings=5)"
ENGINE = "vllm.engine.arg_utils"
USAGE = {"vllm.usage.usage_lib": {"UsageContext": SimpleNamespace(OPENAI_API_SERVER="server")}}


@pytest.mark.parametrize(
    ("said", "free", "length"),
    [("", False, 9), ("", True, 9), (LONG, True, 5), (LONG, False, 0), ("another", True, 0)],
)
def test_a_context_that_is_too_long_is_shortened_where_it_is_free(
    said: str, free: bool, length: int, vllm: Any
) -> None:
    args = SimpleNamespace(max_model_len=9)

    class Args:
        @staticmethod
        def from_cli_args(given: Any) -> Any:
            assert given is args

            def create(usage_context: str) -> Any:
                assert usage_context == "server"
                if said and args.max_model_len == 9:
                    raise ValueError(said)
                return args.max_model_len

            return SimpleNamespace(create_engine_config=create)

    vllm({ENGINE: {"AsyncEngineArgs": Args}, **USAGE})
    if length:
        assert in_image.engine_config(args, free) == length
    else:
        with pytest.raises(ValueError, match=said.partition(" (")[0]):
            in_image.engine_config(args, free)


@pytest.mark.parametrize("place", ["vllm.tokenizers", "vllm.transformers_utils.tokenizer"])
@pytest.mark.parametrize("words", [["Hello"], []])
def test_a_tokenizer_has_words(place: str, words: List[str], vllm: Any) -> None:
    tokenizer = SimpleNamespace(encode=lambda text: words if text == "Hello" else None)
    vllm({place: {"cached_tokenizer_from_config": lambda model: model and tokenizer}})
    args = SimpleNamespace(skip_tokenizer_init=False)
    if words:
        assert in_image.tokenizer_of(args, "model") is tokenizer
        assert in_image.tokenizer_of(SimpleNamespace(), "model") is tokenizer
    else:
        with pytest.raises(ValueError, match="makes nothing of a text"):
            in_image.tokenizer_of(args, "model")
    assert in_image.tokenizer_of(SimpleNamespace(skip_tokenizer_init=True), "model") is None


class SyntaxFault(Exception):
    """jinja2's TemplateSyntaxError."""

    lineno = 7


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (None, None, ""),
        (SyntaxFault("odd"), ValueError, "the chat template, line 7: odd"),
        (KeyError("x"), ImportError, "KeyError: 'x'"),
    ],
)
@pytest.mark.parametrize("given", [None, "name", "file"])
def test_a_template_has_to_be_one_that_can_be_read(
    given: Any, fault: Any, error: Any, said: str, vllm: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    vllm({"jinja2": {"TemplateSyntaxError": SyntaxFault}})
    (tmp_path / "file").write_text("text ü", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    opened: List[Any] = []

    def open_it(path: str, **options: Any) -> Any:
        opened.append(options)
        return Path(path).open(**options)

    monkeypatch.setattr(in_image, "open", open_it, raising=False)
    asked: List[Any] = []

    def apply(question: Any, **options: Any) -> None:
        asked.append((question, options))
        if fault:
            raise fault

    args = SimpleNamespace(chat_template=given)
    tokenizer = SimpleNamespace(apply_chat_template=apply)
    if error:
        with pytest.raises(error) as raised:
            in_image.fill_template(args, tokenizer)
        assert str(raised.value) == said
    else:
        in_image.fill_template(args, tokenizer)
    template = "text ü" if given == "file" else given
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    assert asked == [([{"role": "user", "content": "Hello"}], options)]
    assert opened == ([{"encoding": "utf-8"}] if given == "file" else [])


def test_adapters_are_looked_at(vllm: Any) -> None:
    seen: List[Any] = []

    class Helper:
        @staticmethod
        def from_local_dir(path: str, length: int) -> Any:
            return SimpleNamespace(validate_legal=lambda lora: seen.append((path, length, lora)))

    vllm({"vllm.lora.peft_helper": {"PEFTHelper": Helper}})
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=9), lora_config="lora")
    modules = [SimpleNamespace(path="/a"), SimpleNamespace(path="/b")]
    in_image.read_adapters(SimpleNamespace(lora_modules=modules), config)
    assert seen == [("/a", 9, "lora"), ("/b", 9, "lora")]
    in_image.read_adapters(SimpleNamespace(lora_modules=None), config)
    assert len(seen) == 2


@pytest.mark.parametrize("place", ["vllm.tool_parsers", "vllm.entrypoints.openai.tool_parsers"])
@pytest.mark.parametrize(
    ("args", "asked"),
    [
        ({"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}, ["hermes", "qwen3"]),
        ({"tool_call_parser": None, "reasoning_parser": ""}, []),
        ({}, []),
    ],
)
def test_parsers_are_looked_for(place: str, args: Any, asked: List[str], vllm: Any) -> None:
    found: List[str] = []
    tools = SimpleNamespace(get_tool_parser=found.append)
    reasoning = SimpleNamespace(get_reasoning_parser=found.append)
    vllm(
        {
            place: {"ToolParserManager": tools},
            "vllm.reasoning": {"ReasoningParserManager": reasoning},
        }
    )
    in_image.find_parsers(SimpleNamespace(**args))
    assert found == asked


def config_of(**fields: Any) -> Any:
    """Of 3 layers with 2 heads of 64 in 2 bytes."""
    values: Dict[str, Any] = {
        "hf_text_config": SimpleNamespace(layer_types=fields.pop("types", None)),
        "is_hybrid": False,
        "use_mla": False,
        "get_sliding_window": lambda: fields.get("window"),
        "dtype": SimpleNamespace(itemsize=2),
        "get_num_kv_heads": lambda parallel: {"split": 2}[parallel],
        "get_num_layers": lambda parallel: {"split": 3}[parallel],
        "get_head_size": lambda: 64,
        "max_model_len": 5.0,
    }
    cache = SimpleNamespace(cache_dtype=fields.pop("cache", "auto"))
    model = SimpleNamespace(**{**values, **fields})
    return SimpleNamespace(model_config=model, cache_config=cache, parallel_config="split")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, 2 * 3 * 2 * 64 * 2),
        ({"cache": "fp8_e5m2"}, 2 * 3 * 2 * 64),
        ({"types": ["full_attention"] * 3}, 2 * 3 * 2 * 64 * 2),
        ({"types": ["full_attention", "sliding_attention"]}, None),
        ({"is_hybrid": True}, None),
        ({"use_mla": True}, None),
        ({"window": 4096}, None),
    ],
)
def test_bytes_of_a_token_where_all_layers_are_alike(fields: Any, wanted: Any) -> None:
    assert in_image.kv_bytes_per_token(config_of(**fields)) == wanted


# faults of the stages -> what is told
STAGES: List[Any] = [
    ({}, [("done", {"max_model_len": 5, "kv_bytes": 7})]),
    (
        {"engine_config": ImportError("x")},
        [("config", {"skipped": "ImportError: x"}), ("done", {})],
    ),
    (
        {"tokenizer_of": TypeError("t"), "fill_template": AssertionError("not called")},
        [
            ("tokenizer", {"skipped": "TypeError: t"}),
            ("done", {"max_model_len": 5, "kv_bytes": 7}),
        ],
    ),
    ({"fill_template": ValueError("t")}, [("template", {"refused": "t"})]),
    ({"read_adapters": ValueError("a")}, [("lora", {"refused": "a"})]),
    (
        {"kv_bytes_per_token": AttributeError("k")},
        [
            ("kv", {"skipped": "AttributeError: k"}),
            ("done", {"max_model_len": 5, "kv_bytes": None}),
        ],
    ),
    ({"find_parsers": KeyError("p")}, [("parsers", {"refused": "KeyError: 'p'"})]),
    ({"engine_config": NotImplementedError()}, [("config", {"refused": "NotImplementedError"})]),
]


@pytest.mark.parametrize(("faults", "wanted"), STAGES, ids=lambda value: str(value)[:40])
def test_the_stages_of_a_check(
    faults: Any, wanted: Any, told: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SimpleNamespace(model_tag="tag", model="default")
    given: Dict[str, Any] = {}
    results = {"engine_config": config_of(), "tokenizer_of": "words", "kv_bytes_per_token": 7}
    for name in (*results, "fill_template", "read_adapters", "find_parsers"):

        def stage(*words: Any, name: str = name) -> Any:
            given[name] = words
            if name in faults:
                raise faults[name]
            return results.get(name)

        monkeypatch.setattr(in_image, name, stage)
    with contextlib.suppress(in_image.Refused):
        in_image.check(args, free=True)
    assert told == [{"stage": stage, **said} for stage, said in wanted]
    assert args.model == "tag" and given["engine_config"] == (args, True)
    if "fill_template" in given:
        assert given["fill_template"] == (args, "words")
    if not faults:
        config = results["engine_config"]
        assert given["read_adapters"] == (args, config) and given["find_parsers"] == (args,)
        assert given["tokenizer_of"] == (args, config.model_config)  # type: ignore[attr-defined]


def test_without_a_tag_the_model_is_that_of_the_arguments(
    told: List[Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(in_image, "engine_config", lambda *_: None)
    monkeypatch.setattr(in_image, "find_parsers", lambda _: None)
    args = SimpleNamespace(model="m")
    in_image.check(args, free=False)
    assert args.model == "m" and told == [{"stage": "done"}]


@pytest.mark.parametrize(
    ("code", "said"), [(None, ""), (0, ""), (2, "no such --option"), (2, "x" * 3000)]
)
def test_vllms_own_command_line_ends_in_the_check(
    code: Any, said: str, told: List[Any], vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = SimpleNamespace()
    checked: List[Any] = []
    monkeypatch.setattr(in_image, "check", lambda args, free: checked.append((args, free)))
    monkeypatch.setattr(sys, "argv", ["x"])

    def main() -> None:
        command.cmd("parsed")
        print(f"usage: vllm\nvllm: error: other\nvllm: error:  {said}\n", file=sys.stderr)
        if code is not None:
            raise SystemExit(code)

    serve = SimpleNamespace(ServeSubcommand=command)
    vllm(
        {
            "vllm": {"__version__": "0.11.0"},
            "vllm.entrypoints.cli": {"serve": serve},
            "vllm.entrypoints.cli.main": {"main": main},
        }
    )
    version = {"stage": "version", "version": "0.11.0"}
    if code:
        with pytest.raises(in_image.Refused):
            in_image.serve_command(["m", "--x"], free=True)
        refused = said[: in_image.MOST_TEXT]
        assert told == [version, {"stage": "arguments", "refused": refused}]
    else:
        in_image.serve_command(["m", "--x"], free=True)
        assert told == [version]
    assert checked == [("parsed", True)] and sys.argv == ["vllm", "serve", "m", "--x"]


@pytest.mark.parametrize("said", VERSIONS)
def test_the_file_of_torch_is_read_as_utf_8(
    said: str, told: List[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(said, encoding="utf-8")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "torch" else None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"vllm": "1.2"}[name])
    monkeypatch.setattr(in_image.shutil, "which", lambda name: f"/bin/{name}")

    def open_it(path: str, encoding: str = "ascii") -> Any:
        return Path(path).open(encoding=encoding)

    monkeypatch.setattr(in_image, "open", open_it, raising=False)
    in_image.about()
    wanted = {"version": "1.2", "cuda": VERSIONS[said], "program": "/bin/vllm"}
    assert told == [{"stage": "about", **wanted}]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: SimpleNamespace(origin=None))
    monkeypatch.setattr(in_image.shutil, "which", lambda _: None)
    in_image.about()
    assert told[1] == {"stage": "about", "version": "1.2", "cuda": "", "program": ""}


def test_a_line_is_one_line_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    in_image.tell("x", said="two\nlines")
    assert capsys.readouterr().out == '\nhfship-preflight {"stage": "x", "said": "two\\nlines"}\n'


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(" a \n"), "a"),
        (ValueError(), "ValueError"),
        (KeyError("k"), "KeyError: 'k'"),
        (ValueError("x" * 3000), "x" * in_image.MOST_TEXT),
        (ValueError("1 error\n  Value error, it is odd [type=value_error, x]"), "it is odd"),
        (ValueError("Assertion error, it is odd"), "it is odd"),
    ],
)
def test_a_sentence_is_what_vllm_says(error: Exception, text: str) -> None:
    assert in_image.sentence(error) == text


def test_a_refusal_that_was_told_is_not_told_again(told: List[Any]) -> None:
    def refuse() -> None:
        raise in_image.Refused

    with pytest.raises(in_image.Refused):
        in_image.checked("x", refuse)
    assert not told and in_image.checked("x", lambda: 7) == 7


@pytest.mark.parametrize("error", in_image.NOT_KNOWN)
def test_what_a_version_does_not_let_be_checked_is_skipped(error: Any, told: List[Any]) -> None:
    def fail() -> None:
        raise error("words")

    assert in_image.checked("x", fail) is None
    assert told == [{"stage": "x", "skipped": f"{error.__name__}: words"}]
