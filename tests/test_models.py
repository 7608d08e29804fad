"""The models file: what may stand in it, what is said of mistakes, and every command doing its list."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Program
from hfship.base.errors import Exit, HostError, NotFoundError, UsageError
from hfship.base.modelsfile import (
    KeyPath,
    json_lines,
    json_schema,
    read_models_file,
    toml_lines,
    toml_parser,
)
from hfship.base.report import Reporter
from hfship.base.settings import ModelsFile, load_settings
from hfship.commands.context import Command, Context
from hfship.commands.models import MODELS_EXAMPLE
from hfship.commands.modelskeys import models_schema
from hfship.commands.parser import file_options, parse_words
from hfship.commands.results import error_of
from hfship.commands.runs import run_list, runs_of
from hfship.commands.serve import serve_arguments
from hfship.commands.table import COMMANDS
from support.hub import FaultHub

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLE = MODELS_EXAMPLE
SCHEMA = models_schema()


def read(folder: Path, text: str, name: str = "models.toml") -> ModelsFile:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_models_file(path, SCHEMA)


def refusal(folder: Path, text: str, name: str = "models.toml") -> str:
    with pytest.raises(UsageError) as caught:
        read(folder, text, name)
    return caught.value.text()


# -- what may stand in it


def test_every_option_of_serve_can_be_asked_for() -> None:
    """A new option of `serve` becomes a key by itself; those for a single call are the only ones that do not."""
    parser = argparse.ArgumentParser()
    serve_arguments(parser)
    given = set(vars(parser.parse_args(["m"]))) - {"names"}
    assert given - set(file_options("serve")) == {
        "plan",
        "explain",
        "no_preflight",
        "write_only",
        "reset",
        "instead_of",
        "assume_gpus",
        "rollback",
        "planned",
        "gateway",
    }
    keys = set(SCHEMA.inside["model"].inside["serve"].inside)
    assert {
        "tensor_parallel_size",
        "aliases",
        "served_model_name",
        "host",
        "timeout",
        "extra_args",
        "env",
    } <= keys


def test_example_shows_a_valid_file(tmp_path: Path) -> None:
    first, second = read(tmp_path, EXAMPLE).models
    assert (first.name, first.deployment, second.name) == ("Qwen3-8B", "Qwen3-8B", "llama-70b")
    assert first.serve["gpu_memory_utilization"] == second.serve["gpu_memory_utilization"] == 0.9
    commented = (
        EXAMPLE.replace("# endpoint", "endpoint")
        .replace("# mirror", "mirror")
        .replace("# profile", "profile")
    )
    assert (
        read(tmp_path, commented.replace("# split", "split").replace("# image", "image"))
        .models[0]
        .serve["image"]
    )


def test_toml_and_json_are_one_format(tmp_path: Path) -> None:
    as_json = json.dumps(tomllib.loads(EXAMPLE))
    assert read(tmp_path, as_json, "models.json").models == read(tmp_path, EXAMPLE).models


def test_models_command(hfship: Program, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(hfship("models", "--example").stdout)
    assert "llama-70b" in hfship("models", path).stdout
    listed = json.loads(hfship("models", "--json", env={"HFSHIP_MODELS_FILE": str(path)}).stdout)
    assert [model["deployment"] for model in listed["models"]] == ["Qwen3-8B", "llama-70b"]
    schema = json.loads(hfship("models", "--schema").stdout)
    assert (
        schema["properties"]["model"]["items"]["properties"]["serve"]["properties"]["port"]["type"]
        == "integer"
    )
    assert "--example" in hfship("models", code=2).stderr
    assert "nowhere.toml" in hfship("models", tmp_path / "nowhere.toml", code=5).stderr


MISTAKES = [
    ('[[model]]\nrepo = "a/b"\nrevison = "x"', "models.toml:3: model 1: revison: is not a key; did you mean revision?"),
    ("[defaults]\n\nmodelsdir = 1", "models.toml:3: defaults.modelsdir: is not a key; did you mean models_dir?"),
    ("[hosts]\nport = 1", "models.toml:1: hosts: is not a key; did you mean host?"),
    ('[[model]]\nrepo = "a/b"\n[model.serve]\nport = "1"', 'models.toml:4: model 1: serve.port: expects a whole number, not "1"'),
    ('[[model]]\nrepo = "a/b"\nserve.port = 99999', "models.toml:3: model 1: serve.port: '99999' is not a port"),
    ('[[model]]\nrepo = "a/b"\nserve.port = true', "serve.port: expects a whole number, not true"),
    ('[[model]]\nrepo = "a/b"\nserve.dtype = "foo"', "serve.dtype: 'foo' is not one of: auto, bfloat16"),
    ('[[model]]\nrepo = "a/b"\nserve.gpus = "0"', "serve.gpus: expects a list"),
    ('[[model]]\nrepo = "a/b"\nserve.gpus = ["x"]', "is not a list of GPUs"),
    ('[[model]]\nrepo = "a/b"\nserve.env = { VLLM_API_KEY = "sk" }', "--env VLLM_API_KEY is refused"),
    ('[[model]]\nrepo = "a/b"\nserve.host = "localhost"', "is not an IP address"),
    ('[[model]]\nrepo = "a/b"\ninclude = [[1]]', "expects texts or whole numbers"),
    ('[[model]]\nrepo = "a/b"\nserve = 1', "model 1: serve: expects a table, not 1"),
    ('[[model]]\nrepo = "a b"', "models.toml:2: model 1: repo: 'a b' is not a repository"),
    ('[[model]]\nname = "../x"', "cannot be the name of a model"),
    ('[[model]]\nname = "x"\nsplit = "lots"', "models.toml:3: model 1: split: 'lots' is not a size"),
    ('[defaults.serve]\nport = 1', "models.toml:2: defaults.serve.port: is not a key"),
    ('[[model]]\nrepo = "a/b"\n\n[[model]]\nrepo = "c/b"', "models.toml:4: model 2: another model or its deployment is called b too"),
    ('[[model]]\nname = "a"\n[[model]]\nname = "b"\nserve.name = "a"', "models.toml:5: model 2: serve: another model or"),
    ('[[model]]\nname = "a"\nserve.name = "b"\n[[model]]\nname = "b"\nserve.name = "c"', "models.toml:3: model 1: serve: another"),
    ("[[model]]\nrevision = 'x'", "models.toml:1: model 1: has neither repo nor name"),
    ("model = 1", "models.toml:1: model: expects a list of tables"),
    ("a = \n", "models.toml:1: this is not TOML"),
    ("[[model]]\nname = 'a'\nname = 'b'\n", "models.toml:3: this is not TOML"),
    ("[defaults]\n5 = 1", "models.toml:2: defaults.5: is not a key"),
]  # fmt: skip


@pytest.mark.parametrize("text, said", MISTAKES, ids=[said for _, said in MISTAKES])
def test_mistakes_are_named_with_file_line_and_key(text: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text, said",
    [
        (
            '{"model": [\n {"repo": "a/b",\n  "revison": 1}]}',
            "models.json:3: model 1: revison: is not a key",
        ),
        (
            '{"model": [{"repo": "a/b"},\n {"name": "b"}]}',
            "models.json:1: model 2: another model or its deployment is called b too",
        ),
        ('{"model":\n [,]}', "models.json:2: this is not JSON"),
        ('{"model": [], "model": []}', "one of its keys twice"),
        ("[]", "models.json:1: the file: expects a table"),
        ("[" * 100_000, "this is not JSON"),
    ],
)
def test_mistakes_in_json(text: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, text, "models.json")


def test_all_mistakes_are_said_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    said = refusal(tmp_path, '[[model]]\nrepo = "a/b"\nx = 1\n[defaults]\ny = 1\n')
    assert said.index("models.toml:3") < said.index("models.toml:5")


def test_a_file_that_windows_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_bytes(b"\xef\xbb\xbf" + EXAMPLE.replace("\n", "\r\n").encode())
    assert len(read_models_file(tmp_path / "models.toml", SCHEMA).models) == 2
    (tmp_path / "models.toml").write_bytes("[[model]]\r\n\r\nname = 'ä'\r\n".encode("utf-16"))
    with pytest.raises(UsageError, match="not TOML"):
        read_models_file(tmp_path / "models.toml", SCHEMA)


# -- lines, tested against real parses

TOML_VALUES = ["1", '"a # [b]"', "'''\n[x]\nk1 = 2\n'''", '"""\nname = \\"\n"""', "[\n  1, # ]\n  2,\n]", "{ a = 1 }", "[{ a = 1 }]"]  # fmt: skip
NOISE = ["", "# [[model]]", "   ", "# k1 = '''"]


@st.composite
def toml_with_lines(draw: Any) -> Tuple[str, Dict[KeyPath, int]]:
    """A TOML text, and the line on which each of its keys begins."""
    lines: List[str] = []
    places: Dict[KeyPath, int] = {}
    counts = {"model": 0, "other": 0}
    for number in range(draw(st.integers(1, 6))):
        lines += draw(st.lists(st.sampled_from(NOISE), max_size=2))
        name = draw(st.sampled_from(sorted(counts)))
        here: KeyPath = (name, counts[name])
        counts[name] += 1
        places[here] = len(lines) + 1
        lines.append(f"[[{name}]]  # {number}")
        for table in [(), ("serve",)] if draw(st.booleans()) else [()]:
            if table:
                lines.append(f"[ {name} . serve ]")
            for key in range(draw(st.integers(0, 4))):
                lines += draw(st.lists(st.sampled_from(NOISE), max_size=1))
                places[(*here, *table, f"k{key}")] = len(lines) + 1
                lines += f"k{key} = {draw(st.sampled_from(TOML_VALUES))}".split("\n")
    return "\n".join(lines), places


@given(toml_with_lines())
def test_lines_of_toml(case: Tuple[str, Dict[KeyPath, int]]) -> None:
    text, places = case
    tomllib.loads(text)
    assert {path: toml_lines(text)(path) for path in places} == places


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(json_values, st.sampled_from([1, "\t"]), st.booleans())
def test_lines_of_json(value: Any, indent: Any, ascii_only: bool) -> None:
    """json.dumps gives each key a line of its own: with every key numbered, the line says whether it is the right one."""
    keys: List[KeyPath] = []

    def number(item: Any, path: KeyPath) -> Any:
        if isinstance(item, list):
            return [number(inner, (*path, i)) for i, inner in enumerate(item)]
        if not isinstance(item, dict):
            return item
        renamed = {}
        for name, inner in item.items():
            unique = f"{name}#{len(keys)}"
            keys.append((*path, unique))
            renamed[unique] = number(inner, (*path, unique))
        return renamed

    text = json.dumps(number(value, ()), indent=indent, ensure_ascii=ascii_only)
    for path in keys:
        line = text.split("\n")[json_lines(text)(path) - 1]
        assert line.strip().startswith(json.dumps(path[-1], ensure_ascii=ascii_only) + ":")


# -- what wins


def test_flags_beat_the_environment_beats_the_file_beats_defaults(tmp_path: Path) -> None:
    file = read(
        tmp_path, '[defaults]\nmodels_dir = "m"\npackage_dir = "~/p"\nendpoint = "http://file"\n'
    )
    settings = load_settings({"HFSHIP_PACKAGE_DIR": "e"}, None, file)
    assert (settings.models_dir, settings.package_dir) == (tmp_path / "m", Path("e"))
    assert settings.transfer_dir == Path("/data/transfer") and settings.endpoint == "http://file"
    assert load_settings({"HF_ENDPOINT": "http://env"}, None, file).endpoint == "http://env"
    assert (
        load_settings({"HF_ENDPOINT": "http://env"}, "http://flag", file).endpoint == "http://flag"
    )


RUNS = """
[defaults]
split = "dvd"
image = "vllm/vllm-openai:v1.2.3"
[defaults.serve]
max_model_len = 1024
[[model]]
repo = "org/a@v1"
include = ["x"]
[model.serve]
name = "chat"
port = 8001
env = { A = "1" }
[[model]]
repo = "org/b"
split = "fat32"
"""


def runs(folder: Path, words: str, env: bool = False) -> Dict[str, Any]:
    """The arguments of each run that a command line makes of RUNS."""
    file = read(folder, RUNS)
    args, given_ = parse_words(words.split() + ([] if env else ["--models", str(file.path)]))
    command = next(row for row in COMMANDS if row.name == args.command)
    context = Context(args, load_settings({}), Reporter("none"), given_)
    return {name: vars(run.args) for name, run in runs_of(command, context, file).items()}


def test_a_run_has_what_the_file_asks_of_its_model(tmp_path: Path) -> None:
    fetched = runs(tmp_path, "fetch --include y")
    assert [(run["repos"], run["name"], run["include"]) for run in fetched.values()] == [
        (["org/a@v1"], "a", ["y"]), (["org/b"], "b", ["y"])]  # fmt: skip
    assert runs(tmp_path, "fetch a")["a"]["include"] == ["x"]
    packed = runs(tmp_path, "pack")
    assert (packed["a"]["split"], packed["b"]["split"]) == (4_700_000_000, 2**32 - 1)
    assert runs(tmp_path, "pack --split 1G b")["b"]["split"] == 10**9
    served = runs(tmp_path, "serve")
    assert [served["chat"][k] for k in ("names", "name", "port", "env", "max_model_len")] == [
        ["a"],
        "chat",
        8001,
        ["A=1"],
        1024,
    ]
    assert served["b"]["image"] == "vllm/vllm-openai:v1.2.3" and served["b"]["port"] == 0
    assert runs(tmp_path, "status")["status"]["names"] == ["chat", "b"]
    assert runs(tmp_path, "stop chat")["chat"]["names"] == ["chat"]
    assert list(runs(tmp_path, "verify org/b")) == ["b"]


def test_the_file_of_the_environment_leaves_other_words_alone(tmp_path: Path) -> None:
    packed = runs(tmp_path, "pack a /some/where other", env=True)
    assert {name: (run["models"], run["split"]) for name, run in packed.items()} == {
        "a": (["a"], 4_700_000_000), "/some/where, other": (["/some/where", "other"], 4_700_000_000)}  # fmt: skip
    assert runs(tmp_path, "status", env=True)[""]["names"] == []


# -- doing the list


@pytest.fixture
def listed(hub: FaultHub, model: Path, tmp_path: Path) -> Path:
    """A models file with two models of the Hub and one that it does not have."""
    hub.add(model)
    hub.add(model, "org/other")
    path = tmp_path / "models.toml"
    path.write_text(
        f'[defaults]\nendpoint = "{hub.url}"\nmodels_dir = "m"\npackage_dir = "p"\n'
        '[[model]]\nrepo = "org/tiny"\nexclude = ["README.md"]\n'
        '[[model]]\nrepo = "org/nowhere"\n'
        '[[model]]\nrepo = "org/other"\nname = "second"\nprofile = "store"\n'
    )
    return path


def test_every_command_does_its_list_and_goes_on_after_a_failure(
    hfship: Program, listed: Path
) -> None:
    folder = listed.parent
    done = hfship("fetch", "--models", listed, "--json", code=5)
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["tiny", "nowhere", "second"] and rows[1][
        "exit_code"
    ] == 5
    assert (
        "fetch: 3 models, 2 ok, 1 failed" in done.stderr
        and "  nowhere  org/nowhere was not found on http" in done.stderr
    )
    assert (
        not (folder / "m" / "tiny" / "README.md").exists()
        and (folder / "m" / "second" / "README.md").exists()
    )
    assert (
        "no model tinny; did you mean tiny?"
        in hfship("pack", "--models", listed, "tinny", code=5).stderr
    )
    assert "3 models, 2 ok" in hfship("pack", "--models", listed, code=5).stderr
    archives = {path.name for path in (folder / "p").glob("*.zst")}
    assert archives == {"tiny.tar.zst", "second.tar.zst"}
    names = ("tiny", "org/other")
    assert hfship("verify", "--models", listed, *names).stdout.count("ok: ") == 2
    shutil.move(folder / "p", hfship.home / "transfer")
    said = hfship("unpack", "--models", listed, *names, "-v").stderr
    assert "2 models, 2 ok, 0 failed" in said
    assert re.search(r"\n  next +.* serve tiny second\n", said), "what comes next is for both"
    assert (hfship.home / "site" / "second" / "config.json").is_file()
    assert hfship("unpack", "--models", listed, "nowhere", code=5).stderr.count("no archive") == 1


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/a"), NotFoundError("gone")]
)
def test_a_list_goes_on_after_any_failure_of_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: List[str] = []

    def run(_: Command, context: Context) -> Exit:
        done.append(context.args.name)
        if context.args.name == "a":
            raise error
        return Exit.OK

    monkeypatch.setattr(Command, "run", run)
    command = Command("pack", "", "pack")
    reporter, settings = Reporter(as_json=True), load_settings({})
    one = {n: Context(argparse.Namespace(name=n, json=True), settings, reporter) for n in "ab"}
    assert run_list(command, one, reporter) == error_of(error).code and done == ["a", "b"]
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "a" and row["exit_code"] == error_of(error).code and row["error"]["what"]


def test_an_option_for_one_model_is_refused_for_a_list(hfship: Program, listed: Path) -> None:
    done = hfship("serve", "--models", listed, "--port", "8000", code=2)
    assert "--port is for one model, not for 3" in done.stderr


def test_the_file_of_the_environment_serves_single_calls(hfship: Program, listed: Path) -> None:
    env = {"HFSHIP_MODELS_FILE": str(listed)}
    hfship("fetch", "tiny", env=env)
    assert not (listed.parent / "m" / "tiny" / "README.md").exists()
    hfship("fetch", "org/other", "--name", "mine", env=env)
    hfship("pack", "tiny", "mine", env=env)
    assert len(list((listed.parent / "p").glob("*.zst"))) == 2
    assert "nothing to fetch" in hfship("fetch", env=env, code=2).stderr


def test_the_schema_of_tables_is_that_of_a_list_of_them() -> None:
    """As draft 2020-12 words it: a type for each key, which ones must be there, and no others."""
    models = json_schema(models_schema())["properties"]["model"]
    assert models["type"] == "array"
    table = models["items"]
    assert (table["type"], table["additionalProperties"]) == ("object", False)
    assert all({"type", "description"} <= set(key) for key in table["properties"].values())


def test_a_python_that_reads_no_toml_is_told_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HostError) as refused:
        toml_parser()
    assert "hfship.pyz" in refused.value.next_step
