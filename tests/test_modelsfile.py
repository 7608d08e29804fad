"""The format of a models file: what is a mistake and where it is, and the models that it lists."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import pytest

from hfship.base import modelsfile
from hfship.base.errors import NotFoundError, UsageError
from hfship.base.modelsfile import (
    COPY_KEYS,
    MOST_DIGITS,
    MOST_MISTAKES,
    Key,
    KeyPath,
    Mistake,
    chosen_models,
    dotted,
    json_lines,
    json_schema,
    json_tables,
    mistakes_among,
    mistakes_in,
    models_file_of,
    read_models_file,
    toml_lines,
    toml_parser,
)
from hfship.base.settings import FOLDERS, ListedModel, ModelsFile


def even(value: int) -> int:
    """An option that takes even numbers: two ways to refuse one."""
    if value == 7:
        raise UsageError("7 is refused", "it is a prime", "take 8")
    if value == 9:
        raise UsageError("9 is refused")
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


def no_both(table: Dict[str, Any]) -> Dict[str, Any]:
    if len(table) > 1:
        raise ValueError("one of a and b is enough")
    return table


PART = Key("object", inside={"a": Key("integer", read=even), "b": Key("string")}, read=no_both)
SCHEMA = Key(
    "object",
    inside={
        "flag": Key("boolean"),
        "count": Key("integer"),
        "share": Key("number"),
        "word": Key("string"),
        "list": Key("array"),
        "any": Key("object"),
        "part": PART,
        "parts": Key("tables", inside=PART.inside, read=no_both),
        "level": Key("integer", choices=(1, 2)),
        "mode": Key("string", choices=("slow", "fast")),
    },
)


def said(value: Any) -> List[str]:
    return [f"{dotted(path)}: {what}" for path, what in mistakes_in(SCHEMA, value)]


@pytest.mark.parametrize(
    "value, mistakes",
    [
        ({}, []),
        ({"flag": True, "count": 0, "share": 1, "word": "", "list": [], "any": {"x": 1}}, []),
        ({"share": 0.5, "level": 2, "mode": "fast", "parts": [], "part": {}}, []),
        ({"part": {"a": 8}, "parts": [{"a": 8}, {"b": ""}]}, []),
        ([], [": expects a table, not []"]),
        ({"flag": 1}, ["flag: expects true or false, not 1"]),
        ({"flag": "true"}, ['flag: expects true or false, not "true"']),
        ({"count": True}, ["count: expects a whole number, not true"]),
        ({"count": 1.5}, ["count: expects a whole number, not 1.5"]),
        ({"share": False}, ["share: expects a number, not false"]),
        ({"share": "1"}, ['share: expects a number, not "1"']),
        ({"word": 1}, ["word: expects a text in quotes, not 1"]),
        ({"list": "é" * 50}, [f'list: expects a list, like ["a", "b"], not "{"é" * 39}']),
        ({"any": [1]}, ["any: expects a table, not [1]"]),
        ({"parts": {"a": 8}}, ['parts: expects a list of tables, not {"a": 8}']),
        ({"parts": [{}, 1]}, ["parts 2: expects a table, not 1"]),
        ({"level": 3}, ["level: 3 is not one of: 1, 2"]),
        ({"mode": "Fast"}, ["mode: 'Fast' is not one of: slow, fast"]),
        ({"part": {"a": 7}}, ["part.a: 7 is refused; it is a prime"]),
        ({"part": {"a": 9}}, ["part.a: 9 is refused"]),
        ({"part": {"a": 3}}, ["part.a: 3 is odd"]),
        ({"part": {"a": 8, "b": ""}}, ["part: one of a and b is enough"]),
        ({"part": {"a": 3, "b": ""}}, ["part.a: 3 is odd"]),
        ({"parts": [{"b": ""}, {"a": 8, "b": ""}]}, ["parts 2: one of a and b is enough"]),
        ({"parts": [{"b": 1}, {"a": 7}]}, ["parts 1: b: ", "parts 2: a: 7 is refused"]),
        ({"wrod": 1}, ["wrod: is not a key; did you mean word?"]),
        ({"xyz": 1}, ["xyz: is not a key"]),
        ({"part": {"c": 1, "a": 3}}, ["part.c: is not a key", "part.a: 3 is odd"]),
        ({"word": 1, "flag": 2}, ["word: expects", "flag: expects"]),
    ],
)
def test_what_is_a_mistake(value: Any, mistakes: Sequence[str]) -> None:
    found = said(value)
    assert len(found) == len(mistakes)
    assert all(one.startswith(start) for one, start in zip(found, mistakes)), found
    exact = [one for one, start in zip(found, mistakes) if len(mistakes) == 1 and one != start]
    assert not exact


def model(name: str, deployment: str = "", repo: str = "") -> ListedModel:
    return ListedModel(name, repo, serve={"name": deployment} if deployment else {})


@pytest.mark.parametrize(
    "models, mistakes",
    [
        ([model("a"), model("b", "c")], []),
        ([model("a", "a")], []),
        ([model("")], [(("model", 0), "has neither repo nor name")]),
        ([model("a"), model("")], [(("model", 1), "has neither repo nor name")]),
        (
            [model("a"), model("a")],
            [
                (("model", number), "another model or its deployment is called a too")
                for number in (0, 1)
            ],
        ),
        (
            [model("a"), model("b", "a")],
            [
                (("model", 0), "another model or its deployment is called a too"),
                (("model", 1, "serve"), "another model or its deployment is called a too"),
            ],
        ),
        (
            [model("a", "c"), model("b", "c")],
            [
                (("model", number, "serve"), "another model or its deployment is called c too")
                for number in (0, 1)
            ],
        ),
    ],
)
def test_no_name_means_two_models(
    models: Sequence[ListedModel], mistakes: Sequence[Mistake]
) -> None:
    assert [tuple(one) for one in mistakes_among(models)] == list(mistakes)


# -- reading it


def refusal(path: Path, *checks: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read_models_file(path, SCHEMA, checks)
    return caught.value


def test_one_mistake_is_the_error_and_several_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("\nword = 1\n")
    one = refusal(path)
    assert (one.what, one.why) == (f"{path}:2: word: expects a text in quotes, not 1", "")
    assert one.next_step == "hfship models --schema lists every key"
    path.write_text("[part]\nc = 1\na = 3\nb = 2\n")
    several = refusal(path)
    assert several.what == f"{path} has mistakes"
    assert several.why.split("\n") == [
        f"{path}:2: part.c: is not a key",
        f"{path}:3: part.a: 3 is odd",
        f"{path}:4: part.b: expects a text in quotes, not 2",
    ]
    assert several.next_step == one.next_step


@pytest.mark.parametrize("more", [0, 1, 5])
def test_so_many_mistakes_are_said(more: int, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("".join(f"x{number} = 1\n" for number in range(MOST_MISTAKES + more)))
    lines = refusal(path).why.split("\n")
    assert len(lines) == MOST_MISTAKES + bool(more)
    assert (lines[-1] == "and more of them") == bool(more)
    path.write_text("")

    def check(_: ModelsFile) -> Iterator[Mistake]:
        for number in range(MOST_MISTAKES + more):
            yield Mistake((), f"{number:03}")
        assert more < 2, "nobody asked for so many"

    lines = refusal(path, check).why.split("\n")
    assert lines[0] == f"{path}:1: the file: 000" and len(lines) == MOST_MISTAKES + bool(more)


def test_a_file_is_checked_as_a_whole_when_its_keys_are_right(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("word = 'x'\n[part]\n")
    asked: List[ModelsFile] = []

    def check(file: ModelsFile) -> List[Mistake]:
        asked.append(file)
        return [Mistake(("part",), "is alone")] if len(asked) > 1 else []

    file = read_models_file(path, SCHEMA, [check])
    assert asked == [file] and file.tables == {"word": "x", "part": {}}
    assert refusal(path, check).what == f"{path}:2: part: is alone"
    path.write_text("word = 1\n")
    assert len(asked) == 2 and refusal(path, check) and len(asked) == 2


def test_a_file_may_be_a_pipe_of_a_shell(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"word = 'x'\n")
    os.close(writer)
    try:
        assert read_models_file(Path(f"/proc/self/fd/{reader}"), SCHEMA).tables == {"word": "x"}
    finally:
        os.close(reader)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_lines_end_as_any_editor_ends_them(newline: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(b"\xef\xbb\xbf" + newline.join([b"# x", b"", b"word = 1", b""]))
    assert refusal(path).what.startswith(f"{path}:3: word: ")


def test_what_cannot_be_read_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        read_models_file(tmp_path / "m.toml", SCHEMA)
    path = tmp_path / "m.toml"
    assert caught.value.what == f"cannot read the models file {path}: No such file or directory"
    assert caught.value.next_step == "hfship models --example > models.toml, and edit that"
    path.write_text("word = 'x'\nword = \n")
    error = refusal(path)
    assert error.what == f"{path}:2: this is not TOML" and "line 2" in error.why
    assert error.next_step == "mend it there; hfship models --example shows a whole file"
    path.write_bytes(b"word = '\xff'")
    assert refusal(path).what == f"{path}: this is not TOML"
    other = tmp_path / "m.json"
    other.write_text('{"word":\n x}')
    assert refusal(other).what == f"{other}:2: this is not JSON"
    other.write_text("[" * 100_000 if sys.version_info < (3, 13) else "[")
    assert "this is not JSON" in refusal(other).what
    with path.open("wb") as stream:
        stream.truncate((1 << 24) + 1)
    with pytest.raises(NotFoundError, match="it has more than 16.8 MB"):
        read_models_file(path, SCHEMA)


# -- the models in it

TABLES = {
    "defaults": {
        "endpoint": "https://hub",
        "models_dir": "m",
        "split": "dvd",
        "include": ["x"],
        "replicas": 3,
        "image": "v1",
        "serve": {"port": 1, "dtype": "auto"},
    },
    "model": [
        {"repo": "org/a@v1", "include": ["y"], "replicas": 2, "serve": {"port": 2}},
        {"name": "b", "image": "v2", "hosts": ["h"], "nodes": 2},
        {"repo": "c", "name": "", "serve": {"image": "v3"}},
    ],
    "policy": {"pickle": "refuse"},
    "gateway": {"port": 443},
    "host": [{"name": "h"}],
}


def test_a_model_has_what_the_defaults_say_where_it_says_nothing() -> None:
    file = models_file_of(Path("m.toml"), TABLES)
    first, second, third = file.models
    assert first == ListedModel(
        "a",
        "org/a@v1",
        {"split": "dvd", "include": ["y"], "image": "v1", "repo": "org/a@v1"},
        {"image": "v1", "port": 2, "dtype": "auto"},
        {"replicas": 2},
    )
    assert (second.name, second.repo, second.copies) == ("b", "", {"hosts": ["h"], "nodes": 2})
    assert second.wishes["image"] == "v2" and second.serve["image"] == "v1"
    assert (third.name, third.serve["image"], third.copies) == ("c", "v3", {})
    assert file.others == ListedModel(
        "",
        "",
        {"split": "dvd", "include": ["x"], "image": "v1", "name": ""},
        {"image": "v1", "port": 1, "dtype": "auto"},
        {},
    )
    assert file.defaults == TABLES["defaults"] and file.policy == {"pickle": "refuse"}
    assert file.tables == {"gateway": {"port": 443}, "host": [{"name": "h"}]}
    empty = models_file_of(Path("m.toml"), {})
    assert (empty.models, empty.policy, empty.tables, empty.defaults) == ((), {}, {}, {})
    assert empty.others == ListedModel("", "", {"name": ""})


@pytest.mark.parametrize("key", [*FOLDERS, "endpoint", "serve", *COPY_KEYS])
def test_what_is_no_option_of_a_command_for_one_model_is_no_wish(key: str) -> None:
    value: Any = {} if key == "serve" else "x"
    for tables in ({"defaults": {key: value}}, {"model": [{"name": "a", key: value}]}):
        file = models_file_of(Path("m.toml"), tables)
        assert all(key not in one.wishes for one in (file.others, *file.models))
        assert file.others.copies == {}
        if key in COPY_KEYS and file.models:
            assert file.models[0].copies == {key: "x"}


def test_models_are_chosen_by_any_of_their_names() -> None:
    models = (
        ListedModel("a", "org/A-1@v1", serve={"name": "chat"}),
        ListedModel("b", "org/b"),
        ListedModel("c"),
    )
    file = ModelsFile(Path("/m.toml"), {}, models, ListedModel(""))
    assert chosen_models(file, []) == models
    for words, names in [
        (["c", "a"], "ca"),
        (["org/A-1"], "a"),
        (["chat", "org/b"], "ab"),
        (["CHAT", "a", "B", "b"], "ab"),
    ]:
        assert "".join(one.name for one in chosen_models(file, words)) == names
    with pytest.raises(NotFoundError) as caught:
        chosen_models(file, ["a", "chta"])
    assert caught.value.what == "/m.toml has no model chta; did you mean chat?"
    assert caught.value.why == "in it are: a, b, c"
    assert caught.value.next_step == "hfship models /m.toml"
    with pytest.raises(NotFoundError) as caught:
        chosen_models(ModelsFile(Path("/m.toml"), {}, (), ListedModel("")), [])
    assert (caught.value.what, caught.value.why) == (
        "/m.toml lists no model",
        "it has no [[model]]",
    )
    assert caught.value.next_step == "hfship models --example"


# -- lines

TOML = """\
top = 1
[ a . b ]  # a table
x = [
  1, # ]
  { y = 2 },
]
[[list]]
x.y = { z = 1 }

[[list]]
  [list.sub]
  'quoted.key' = '''
[not]
'''
[[list.deep]]
x = 1
[[list.deep]]
x = 2
"""
PLACES = {
    (): 1,
    ("top",): 1,
    ("a", "b"): 2,
    ("a", "b", "x"): 3,
    ("a", "b", "x", 1, "y"): 3,
    ("list", 0): 7,
    ("list", 0, "x", "y", "z"): 8,
    ("list", 1): 10,
    ("list", 1, "sub"): 11,
    ("list", 1, "sub", "quoted.key"): 12,
    ("list", 1, "deep", 0, "x"): 16,
    ("list", 1, "deep", 1): 17,
    ("list", 1, "deep", 1, "x"): 18,
    # What no statement brings has the line of its table, or the first.
    ("list", 1, "sub", "none", 3): 11,
    ("list", 0, "none"): 7,
    ("a",): 1,
    ("none", 5): 1,
}


@pytest.mark.parametrize("path", PLACES, ids=dotted)
def test_where_a_key_of_toml_stands(path: KeyPath) -> None:
    assert toml_lines(TOML)(path) == PLACES[path]


def test_lines_are_not_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that would take very long, the beginning is known."""
    parsed: List[int] = []
    loads = toml_parser()

    def counting(text: str) -> Any:
        parsed.append(len(text))
        return loads(text)

    monkeypatch.setattr(modelsfile, "toml_parser", lambda: counting)
    text = "a = 1\nb = [ []\n" + ",[]\n" * 800 + "]\nc = 1\n"
    lines = toml_lines(text)
    assert (lines(("a",)), lines(("c",))) == (1, 1)
    assert sum(parsed) <= 50 * (len(text) + 1)
    assert toml_lines("b = [ []\n" + ",[]\n" * 50 + "]\nc = 1\n")(("c",)) == 53


JSON = """\
{"a": {"b": [ {"c": "x\\"y: {"},
   {"c":
      1, "d": "long"}
 ]}, "e" : 1,

"f\\"g": {"": 2}}
"""


@pytest.mark.parametrize(
    "path, line",
    [
        ((), 1),
        (("a",), 1),
        (("a", "b", 0), 1),
        (("a", "b", 1, "c"), 2),
        (("a", "b", 1, "d"), 3),
        (("e",), 4),
        (('f"g',), 6),
        (('f"g', ""), 6),
    ],
    ids=str,
)
def test_where_a_key_of_json_stands(path: KeyPath, line: int) -> None:
    assert json_lines(JSON)(path) == line


def test_json_has_each_key_once_and_numbers_that_end() -> None:
    assert json_tables('{"a": [1, {"b": -2.5}]}') == {"a": [1, {"b": -2.5}]}
    with pytest.raises(ValueError, match="a table has one of its keys twice: a, b, a"):
        json_tables('{"a": 1, "b": 2, "a": 3}')
    assert json_tables("9" * MOST_DIGITS) == int("9" * MOST_DIGITS)
    with pytest.raises(ValueError, match=f"a number has {MOST_DIGITS + 1} digits"):
        json_tables("9" * (MOST_DIGITS + 1))


@pytest.mark.parametrize(
    "path, shown",
    [
        ((), ""),
        (("a",), "a"),
        (("a", "b"), "a.b"),
        (("a", 0), "a 1"),
        (("a", 0, "b", "c"), "a 1: b.c"),
        (("a", 0, 1, "b"), "a 1 2: b"),
    ],
    ids=str,
)
def test_people_count_from_one(path: KeyPath, shown: str) -> None:
    assert dotted(path) == shown


def test_the_schema_says_what_a_key_is() -> None:
    key = Key(
        "object",
        "all",
        inside={
            "mode": Key("string", "how fast", choices=("slow", "fast")),
            "parts": Key("tables", "some", inside={"a": Key("integer", "one")}),
        },
    )
    one = {"type": "integer", "description": "one"}
    assert json_schema(key) == {
        "type": "object",
        "description": "all",
        "properties": {
            "mode": {"type": "string", "description": "how fast", "enum": ["slow", "fast"]},
            "parts": {
                "type": "array",
                "items": {
                    "type": "object",
                    "description": "some",
                    "properties": {"a": one},
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
    }
