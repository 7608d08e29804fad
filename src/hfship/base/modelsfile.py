# SPDX-License-Identifier: Apache-2.0
"""The models file: its format, and mistakes in it with their place.

Format of a models file, in TOML or (named *.json) in JSON: a table `defaults`, a list of tables
`model`, and tables of a site. What may stand in them is a tree of Key, which commands/modelskeys.py
makes from the options of the commands: a file can ask for what a command line can.

Promises: mistakes are said at once, each with file, line and key, in about the time that it takes
to read the file. Never: a key that is passed over in silence.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import re
from itertools import chain, islice
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from hfship.base.errors import HostError, NotFoundError, UsageError, nearest
from hfship.base.reading import read_small
from hfship.base.settings import FOLDERS, ListedModel, ModelsFile
from hfship.base.values import dataclass, field, replace

KeyPath = Tuple[Union[str, int], ...]  # names of tables and indexes of lists, down to a key
LineOf = Callable[[KeyPath], int]
MOST_MISTAKES = 20  # that are said


class Kind(NamedTuple):
    """A kind of values: the types that they are parsed to, and what is said to be expected."""

    types: Tuple[type, ...]
    expected: str


KINDS: Mapping[str, Kind] = {
    "boolean": Kind((bool,), "true or false"),
    "integer": Kind((int,), "a whole number"),
    "number": Kind((int, float), "a number"),
    "string": Kind((str,), "a text in quotes"),
    "array": Kind((list,), 'a list, like ["a", "b"]'),
    "object": Kind((dict,), "a table"),
    "tables": Kind((list,), "a list of tables"),
}
_LARGEST_FILE = 1 << 24  # bytes
MOST_DIGITS = 400  # of a number in JSON; Python 3.8 takes hours for millions


@dataclass(frozen=True)
class Key:
    """What may stand under a key. `read` makes the option's value of it, or raises ValueError or
    UsageError; `inside` are the keys of a table, or of each table of a list, which `read` gets when
    these are right."""

    kind: str
    about: str = ""
    read: Callable[[Any], Any] = lambda value: value
    choices: Tuple[Any, ...] = ()
    inside: Mapping[str, Key] = field(default_factory=dict)


class Mistake(NamedTuple):
    """What is wrong in a models file, and under which key."""

    path: KeyPath
    what: str


def mistakes_in(key: Key, value: Any, path: KeyPath = ()) -> Iterator[Mistake]:
    """All that is wrong with the value at `path` and below."""
    if not _is_of_kind(value, key.kind):
        shown = json.dumps(value, default=str, ensure_ascii=False)
        expected = KINDS[key.kind].expected
        yield Mistake(path, f"expects {expected}, not {shown[:40]}")
    elif key.choices and value not in key.choices:
        choices = ", ".join(map(str, key.choices))
        yield Mistake(path, f"{value!r} is not one of: {choices}")
    elif key.kind == "tables":
        table = replace(key, kind="object")
        for index, item in enumerate(value):
            here = (*path, index)
            yield from mistakes_in(table, item, here)
    elif key.inside and any(_mistakes_in_table(key, value, path)):
        yield from _mistakes_in_table(key, value, path)
    else:
        refused = _refusal(key, value)
        if refused is not None:
            yield Mistake(path, refused)


def _is_of_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # an int to Python
        return kind == "boolean"
    return isinstance(value, KINDS[kind].types)


def _mistakes_in_table(key: Key, table: Mapping[str, Any], path: KeyPath) -> Iterator[Mistake]:
    for name, item in table.items():
        here = (*path, name)
        known = key.inside.get(name)
        if known:
            yield from mistakes_in(known, item, here)
        else:
            hint = nearest(name, key.inside)
            yield Mistake(here, f"is not a key{hint}")


def _refusal(key: Key, value: Any) -> Optional[str]:
    """Why the option of the key does not take the value; None when it does."""
    try:
        key.read(value)
    except UsageError as exc:
        if exc.why:
            return f"{exc.what}; {exc.why}"
        return exc.what
    except ValueError as exc:
        return str(exc)

    return None


def mistakes_among(models: Sequence[ListedModel]) -> Iterator[Mistake]:
    """Models that lack a name, or that a name would confuse with another."""
    called: Dict[str, Set[int]] = {}
    for index, model in enumerate(models):
        for word in (model.name, model.deployment):
            called.setdefault(word, set()).add(index)

    for index, model in enumerate(models):
        path = ("model", index)
        name = model.name
        deployment = model.deployment
        is_called = "another model or its deployment is called"
        if not name:
            yield Mistake(path, "has neither repo nor name")
        elif called[name] != {index}:
            yield Mistake(path, f"{is_called} {name} too")
        elif called[deployment] != {index}:
            yield Mistake((*path, "serve"), f"{is_called} {deployment} too")


class Syntax(NamedTuple):
    """How a models file is written: `load` parses a text or raises ValueError, `lines` finds the
    lines of keys in a text that parses."""

    name: str
    load: Callable[[str], Any]
    lines: Callable[[str], LineOf]


def syntax_of(path: Path) -> Syntax:
    """The syntax of a models file, by its name. Raises HostError when this Python reads no TOML."""
    if path.suffix == ".json":
        return Syntax("JSON", json_tables, json_lines)
    load = toml_parser()
    return Syntax("TOML", load, toml_lines)


Check = Callable[[ModelsFile], Iterable[Mistake]]  # of what no single key can tell


def read_models_file(path: Path, schema: Key, checks: Sequence[Check] = ()) -> ModelsFile:
    """The models file at `path`. Raises NotFoundError, HostError, and a UsageError that names file,
    line and key of all that is wrong with it; `checks` find what a whole file alone can tell."""
    syntax = syntax_of(path)
    text, value = _parsed(path, syntax)
    mistakes = list(islice(mistakes_in(schema, value), MOST_MISTAKES + 1))
    if mistakes:
        raise _mistakes_error(path, text, syntax, mistakes)

    file = models_file_of(path, value)
    found = chain(mistakes_among(file.models), *(check(file) for check in checks))
    mistakes = list(islice(found, MOST_MISTAKES + 1))
    if mistakes:
        raise _mistakes_error(path, text, syntax, mistakes)

    return file


def _parsed(path: Path, syntax: Syntax) -> Tuple[str, Any]:
    """(text of the file, what it parses to)."""
    try:
        # An editor of Windows may have put a byte order mark before the text.
        content = read_small(path, _LARGEST_FILE, or_pipe=True)
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        return text, syntax.load(text)
    except OSError as exc:
        what = f"cannot read the models file {path}: {exc.strerror}"
        step = "hfship models --example > models.toml, and edit that"
        raise NotFoundError(what, "", step) from exc
    except (ValueError, RecursionError) as exc:
        place = str(path)
        line = re.search(r"line (\d+)", str(exc))
        if line:
            place += f":{line[1]}"
        step = "mend it there; hfship models --example shows a whole file"
        raise UsageError(f"{place}: this is not {syntax.name}", str(exc), step) from exc


def _mistakes_error(
    path: Path, text: str, syntax: Syntax, mistakes: Sequence[Mistake]
) -> UsageError:
    """The mistakes in the order of the file, each with its line and key."""
    line_of = syntax.lines(text)
    places = []
    for mistake in mistakes[:MOST_MISTAKES]:
        line = line_of(mistake.path)
        key = dotted(mistake.path) or "the file"
        places.append((line, key, mistake.what))

    lines = []
    for line, key, what in sorted(places):
        lines.append(f"{path}:{line}: {key}: {what}")
    if len(mistakes) > MOST_MISTAKES:
        lines.append("and more of them")

    step = "hfship models --schema lists every key"
    if len(lines) == 1:
        return UsageError(lines[0], "", step)

    return UsageError(f"{path} has mistakes", "\n".join(lines), step)


# Keys of [[model]] for the copies of a model that run, and where.
COPY_KEYS = ("replicas", "standby", "affinity", "mode", "hosts", "host_labels", "nodes")
# Keys of [defaults] and [[model]] that are no options of commands for single models.
_NO_WISHES = (*FOLDERS, "endpoint", "serve", *COPY_KEYS)


def models_file_of(path: Path, value: Mapping[str, Any]) -> ModelsFile:
    """The models in the tables of a models file that has no mistakes."""
    defaults = value.get("defaults", {})
    tables = value.get("model", ())
    models = tuple(_listed_model(defaults, table) for table in tables)
    others = _listed_model(defaults, {"name": ""})
    tables = {name: table for name, table in value.items() if name not in ("defaults", "model")}
    policy = tables.pop("policy", {})
    return ModelsFile(path, defaults, models, others, policy, tables)


def _listed_model(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> ListedModel:
    """The model of a [[model]], with what the [defaults] say of it."""
    repo = own.get("repo", "")
    name = own.get("name")
    if not name:
        without_revision = repo.partition("@")[0]
        name = without_revision.rpartition("/")[2]

    wishes = {**defaults, **own}
    for key in _NO_WISHES:
        wishes.pop(key, None)

    serve: Dict[str, Any] = {}
    if "image" in defaults:
        serve["image"] = defaults["image"]
    for table in (defaults, own):
        options = table.get("serve", {})
        serve.update(options)

    copies = {key: own[key] for key in COPY_KEYS if key in own}
    return ListedModel(name, repo, wishes, serve, copies)


def chosen_models(file: ModelsFile, names: Sequence[str]) -> Tuple[ListedModel, ...]:
    """The models that `names` (names, deployments or repositories) mean, each once; all, without
    names. Raises NotFoundError."""
    path = file.path
    known = file.known
    if not known:
        raise NotFoundError(
            f"{path} lists no model",
            "it has no [[model]]",
            "hfship models --example",
        )

    if not names:
        return file.models

    chosen = {}
    for name in names:
        model = file.called(name)
        if model is None:
            here = ", ".join(model.name for model in file.models)
            hint = nearest(name, known)
            raise NotFoundError(
                f"{path} has no model {name}{hint}",
                f"in it are: {here}",
                f"hfship models {path}",
            )
        chosen[model.name] = model

    return tuple(chosen.values())


# -- TOML


def toml_parser() -> Callable[[str], Any]:
    """`loads` of tomllib, or of tomli that hfship.pyz carries for Pythons below 3.11.

    Raises HostError when there is none.
    """
    for name in ("tomllib", "tomli"):
        with contextlib.suppress(ImportError):
            loads: Callable[[str], Any] = importlib.import_module(name).loads
            return loads

    raise HostError(
        "this Python reads no TOML",
        "tomllib came with 3.11",
        "use hfship.pyz, or write the file in JSON",
    )


def toml_lines(text: str) -> LineOf:
    """Where the keys of valid TOML are; for a path that no statement brings, its table.

    Parsers do not tell lines, but one finds them: each statement is parsed alone, and tells a table
    or the keys in it.
    """
    loads = toml_parser()
    lines = text.split("\n")
    found: Dict[KeyPath, int] = {(): 1}
    counts: Dict[KeyPath, int] = {}  # the tables of a list so far
    table: KeyPath = ()
    for start, value in _toml_statements(lines, loads):
        brought: Iterable[KeyPath]
        if lines[start].lstrip().startswith("["):
            table = _table_of(value, counts)
            brought = [table]
        else:
            brought = _paths_in(value, table)
        for path in brought:
            found.setdefault(path, start + 1)

    def line_of(path: KeyPath) -> int:
        while path not in found:
            path = path[:-1]
        return found[path]

    return line_of


def _table_of(header: Any, counts: Dict[KeyPath, int]) -> KeyPath:
    """The path of the table that a header, parsed alone, begins. Counts those of a list."""
    path: KeyPath = ()
    while header:
        ((name, header),) = header.items()
        path = (*path, name)
        if isinstance(header, list):
            counts[path] = counts.get(path, -1) + 1
            header = {}
        if path in counts:
            path = (*path, counts[path])
    return path


def _paths_in(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The paths of all values in a value, but not its own."""
    items: Iterable[Tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for step, inner in items:
        yield (*path, step)
        yield from _paths_in(inner, (*path, step))


# How the last line of a statement of several lines ends.
_TOML_END = re.compile(r"""(\]|\}|\"{3}|'{3})\s*(#.*)?$""")
_TOML_PATIENCE = 50  # times the length of the file that may be parsed to find its statements


def _toml_statements(
    lines: Sequence[str], loads: Callable[[str], Any]
) -> Iterator[Tuple[int, Any]]:
    """The first line of each statement, from 0, and its value: the fewest lines that parse alone.
    Blank ones and comments are statements too. Ends early where too much would have to be parsed.
    """
    start = 0
    left = _TOML_PATIENCE * sum(len(line) + 1 for line in lines)
    for stop in range(1, len(lines) + 1):
        if stop > start + 1 and not _TOML_END.search(lines[stop - 1]):
            continue
        candidate = "\n".join(lines[start:stop])
        left -= len(candidate)
        if left < 0:
            return
        with contextlib.suppress(ValueError):
            value = loads(candidate)
            yield start, value
            start = stop


# -- JSON


def json_tables(text: str) -> Any:
    """Parsed JSON. Raises ValueError also for a key that is there twice: json keeps the last."""

    def table_of(pairs: Sequence[Tuple[str, Any]]) -> Dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = ", ".join(name for name, _ in pairs)
            raise ValueError(f"a table has one of its keys twice: {names}")
        return table

    def whole_number(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError(f"a number has {len(digits)} digits")
        return int(digits)

    return json.loads(text, object_pairs_hook=table_of, parse_int=whole_number)


def json_lines(text: str) -> LineOf:
    """Where the keys of valid JSON are: the line (from 1) on which the last key of a path stands; 1
    without a key.

    >>> json_lines('{"model": [\\n {"a": "{"},\\n {"a":\\n 1}]}')(("model", 1, "a"))
    3

    Parsers do not tell lines, but carry them: `text` is parsed with every key followed by its own.
    """
    numbered = json.loads(_with_numbered_keys(text))

    def line_of(path: KeyPath) -> int:
        value = numbered
        line = 1
        for step in path:
            if isinstance(step, int):
                value = value[step]
            else:
                line, value = _numbered_item(value, step)
        return line

    return line_of


_JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?')  # with a colon it is a key


def _with_numbered_keys(text: str) -> str:
    """The JSON with a line break and its line number at the end of each key.

    >>> print(_with_numbered_keys('{"a": "x"}'))
    {"a\\n1": "x"}
    """

    pieces = []
    line, end = 1, 0
    for string in _JSON_STRING.finditer(text):
        between = text[end : string.start()]
        line += between.count("\n")
        content, colon = string.groups()
        shown = string[0]
        if colon:
            shown = f'"{content}\\n{line}":'
        pieces += [between, shown]
        line += string[0].count("\n")
        end = string.end()

    return "".join([*pieces, text[end:]])


def _numbered_item(table: Mapping[str, Any], name: str) -> Tuple[int, Any]:
    """(line, value) of a key in a table whose keys are numbered."""
    for key, value in table.items():
        own_name, _, line = key.rpartition("\n")
        if own_name == name:
            return int(line), value
    raise KeyError(name)


# -- keys


def dotted(path: KeyPath) -> str:
    """A path for people, who count from 1.

    >>> dotted(("model", 0, "serve", "port"))
    'model 1: serve.port'
    """
    text = ""
    separator = ""
    for step in path:
        if isinstance(step, int):
            text += f" {step + 1}"
            separator = ": "
        else:
            text += separator + step
            separator = "."

    return text


def json_schema(key: Key) -> Dict[str, Any]:
    """The keys as a JSON Schema (draft 2020-12) for editors, as `hfship models --schema` prints."""
    if key.kind == "tables":
        table = replace(key, kind="object")
        return {
            "type": "array",
            "items": json_schema(table),
        }

    schema: Dict[str, Any] = {
        "type": key.kind,
        "description": key.about,
    }
    if key.choices:
        schema["enum"] = list(key.choices)
    if key.inside:
        properties = {name: json_schema(item) for name, item in key.inside.items()}
        schema["properties"] = properties
        schema["additionalProperties"] = False

    return schema
