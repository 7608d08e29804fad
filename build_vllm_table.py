#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make src/hfship/serve/vllm_table.json: what each version of vLLM knows, read from its wheels.

    python3 build_vllm_table.py FOLDER     FOLDER holds a folder for each version, 0.32.0/vllm/...,
                                           with the modules of its wheel, as pip brings it from PyPI
    python3 build_vllm_table.py --fetch FOLDER VERSION...     bring them there first

The modules are parsed, and nothing of them is run. What source text does not tell (values that an
option takes by code, a plugin's models) is not in the table; tests/test_vllm_table.py compares it
with what a real image says of itself, where one is there.

The table: {"versions": [...], KIND: {INTERVAL: [NAME, ...]}}. A KIND is one of flags,
architectures, quantizations, kv_cache_dtypes, tool_parsers, reasoning_parsers, metrics, routes. An
INTERVAL is FIRST..LAST, the first and last version of the list that has the name; "" at an end
stands for the first or the last of the list. A name that came twice stands in two intervals.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parent
TABLE = ROOT / "src" / "hfship" / "serve" / "vllm_table.json"
PLATFORMS = (
    "manylinux_2_35_x86_64",
    "manylinux_2_31_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)

Module = ast.Module
Sources = Mapping[str, Module]  # path below vllm/ -> the parsed module


# ---- wheels --------------------------------------------------------------------------


def fetch(folder: Path, version: str) -> None:
    """Put the modules of a version's wheel into FOLDER/VERSION."""
    target = folder / version
    if target.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        ask = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.12", *platforms]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *ask, "-d", scratch]
        subprocess.run([*pip, f"vllm=={version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    archive.extract(name, unpacked)
        shutil.move(str(unpacked), str(target))


TELLING = (
    "engine/",
    "entrypoints/",
    "config",
    "v1/metrics/",
    "reasoning/",
    "tool_parsers/",
    "model_executor/models/registry.py",
    "model_executor/layers/quantization/__init__.py",
)


def sources_of(folder: Path) -> Sources:
    """The modules of one version that tell something."""
    found = {}
    root = folder / "vllm"
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(TELLING):
            found[name] = ast.parse(path.read_bytes())
    return found


def version_key(version: str) -> Tuple[int, ...]:
    """For sorting.

    >>> sorted(["0.10.0", "0.9.2", "0.10.1.1"], key=version_key)
    ['0.9.2', '0.10.0', '0.10.1.1']
    """
    return tuple(map(int, re.findall(r"\d+", version)))


# ---- what a version knows ------------------------------------------------------------


def literal(node: ast.AST) -> Any:
    """The value of a node that is a literal, else None."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def assigned(module: Module) -> Iterator[Tuple[str, ast.AST]]:
    """The names that a module gives to values at its top, and the values."""
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def texts_in(node: ast.AST) -> Iterator[str]:
    """All texts in a node."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


_FLAG = re.compile(r"--?[a-zA-Z][a-z0-9-]*\Z")
# Where `vllm serve` puts its parser together.
_PARSERS = re.compile(
    r"engine/arg_utils\.py|entrypoints/(.*/)?cli_args\.py|entrypoints/cli/serve\.py"
)


def flags(sources: Sources) -> Set[str]:
    """The options of `vllm serve`: in calls of add_argument, in tables of them, and the fields of
    the frontend's dataclasses, from which options are made."""
    found: Set[str] = set()
    for name, module in sources.items():
        if not _PARSERS.match(name):
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                found.update(word for word in map(literal, node.args) if isinstance(word, str))
            elif isinstance(node, ast.Tuple) and node.elts:
                first = literal(node.elts[0])
                if isinstance(first, str) and first.startswith("--"):
                    found.add(first)
            elif isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        found.add("--" + field.target.id.replace("_", "-"))
    return {word.replace("_", "-") for word in found if _FLAG.match(word.replace("_", "-"))}


# Tables of the registry that say what is gone, or is in a plugin.
_NOT_IN_VLLM = ("_PREVIOUSLY_SUPPORTED_MODELS", "_OOT_SUPPORTED_MODELS")


def architectures(sources: Sources) -> Set[str]:
    """The classes that the registry of models loads."""
    found: Set[str] = set()
    for name, value in assigned(sources["model_executor/models/registry.py"]):
        is_table = name.endswith("_MODELS") and isinstance(value, ast.Dict)
        if is_table and name not in _NOT_IN_VLLM:
            found.update(key for key in map(_text, value.keys) if key)  # type: ignore[attr-defined]
    return found


def _text(node: Any) -> str:
    value = literal(node) if node is not None else None
    return value if isinstance(value, str) else ""


def quantizations(sources: Sources) -> Set[str]:
    """The methods that a checkpoint may name."""
    module = sources["model_executor/layers/quantization/__init__.py"]
    for name, value in assigned(module):
        if name in ("QuantizationMethods", "QUANTIZATION_METHODS"):
            found = set(texts_in(value))
            if found:
                return found
    return set()


def kv_cache_dtypes(sources: Sources) -> Set[str]:
    """What --kv-cache-dtype takes, where it is told by a list of words."""
    for name, module in sources.items():
        for assigned_name, value in assigned(module):
            if name.startswith("config") and assigned_name == "CacheDType":
                return set(texts_in(value))
    return _choices(sources["engine/arg_utils.py"], "--kv-cache-dtype")


def _choices(module: Module, flag: str) -> Set[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and flag in map(literal, node.args):
            for keyword in node.keywords:
                if keyword.arg == "choices":
                    return set(literal(keyword.value) or ())
    return set()


def tool_parsers(sources: Sources) -> Set[str]:
    """The names that --tool-call-parser takes."""
    return _registered(sources, re.compile(r"(entrypoints/openai/)?tool_parsers/"))


def reasoning_parsers(sources: Sources) -> Set[str]:
    """The names that --reasoning-parser takes."""
    return _registered(sources, re.compile(r"reasoning/|entrypoints/openai/reasoning_parsers/"))


def _registered(sources: Sources, place: re.Pattern[str]) -> Set[str]:
    """Names under which classes are registered: by a decorator, by a call, or in a table."""
    found: Set[str] = set()
    for name, module in sources.items():
        if not place.match(name):
            continue
        for node in ast.walk(module):
            called = getattr(getattr(node, "func", None), "attr", "")
            if called in ("register_module", "register_lazy_module"):
                found.update(_names_given(node))
        for assigned_name, value in assigned(module):
            if "REGISTER" in assigned_name and isinstance(value, ast.Dict):
                found.update(key for key in map(_text, value.keys) if key)
    return found


def _names_given(call: Any) -> Iterator[str]:
    """The names in a call of register_module(NAME, ...) or register_module(name=NAME or NAMES)."""
    nodes = list(call.args[:1])
    nodes += [keyword.value for keyword in call.keywords if keyword.arg == "name"]
    for node in nodes:
        value = literal(node)
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(name, str):
                yield name


_METRIC = re.compile(r"vllm:[a-z0-9_]+\Z")


def metrics(sources: Sources) -> Set[str]:
    """The names of metrics; a counter's is exposed with _total at its end."""
    found: Set[str] = set()
    for module in sources.values():
        found.update(text for text in texts_in(module) if _METRIC.match(text))
    return found


_VERBS = ("get", "post", "put", "delete", "websocket")


def routes(sources: Sources) -> Set[str]:
    """Method and path of the HTTP routes of the server, as `POST /v1/rerank`."""
    found: Set[str] = set()
    for name, module in sources.items():
        if not name.startswith("entrypoints/"):
            continue
        for node in ast.walk(module):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            verb = getattr(node.func, "attr", "")
            path = literal(node.args[0])
            if verb in _VERBS and isinstance(path, str) and path.startswith("/"):
                found.add(f"{verb.upper()} {path}")
    return found


KINDS: Sequence[Callable[[Sources], Set[str]]] = (
    flags,
    architectures,
    quantizations,
    kv_cache_dtypes,
    tool_parsers,
    reasoning_parsers,
    metrics,
    routes,
)


# ---- the table -----------------------------------------------------------------------


def intervals(versions: Sequence[str], has: Sequence[bool]) -> List[str]:
    """The intervals of versions in which something is there.

    >>> intervals(["1", "2", "3"], [True, True, True])
    ['..']
    >>> intervals(["1", "2", "3"], [True, False, True])
    ['..1', '3..']
    """
    found = []
    start = None
    for index, there in enumerate([*has, False]):
        if there and start is None:
            start = index
        elif not there and start is not None:
            first = versions[start] if start else ""
            last = versions[index - 1] if index < len(versions) else ""
            found.append(f"{first}..{last}")
            start = None
    return found


def table_of(known: Mapping[str, Mapping[str, Set[str]]]) -> Dict[str, Any]:
    """The table of what versions know: version -> kind -> names."""
    versions = sorted(known, key=version_key)
    table: Dict[str, Any] = {"versions": versions}
    for kind in KINDS:
        by_interval: Dict[str, List[str]] = {}
        of_kind = [known[version][kind.__name__] for version in versions]
        for name in sorted(set().union(*of_kind)):
            for interval in intervals(versions, [name in names for names in of_kind]):
                by_interval.setdefault(interval, []).append(name)
        table[kind.__name__] = dict(sorted(by_interval.items()))
    return table


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="make the table of vLLM's versions")
    parser.add_argument("--fetch", action="store_true", help="bring the wheels of these versions")
    parser.add_argument("folder", type=Path)
    parser.add_argument("versions", nargs="*")
    args = parser.parse_args()
    if args.fetch:
        for version in args.versions:
            fetch(args.folder, version)
    known = {}
    for folder in sorted(args.folder.iterdir(), key=lambda path: version_key(path.name)):
        if not (folder / "vllm").is_dir():
            continue
        sources = sources_of(folder)
        known[folder.name] = {kind.__name__: kind(sources) for kind in KINDS}
        counts = {name: len(names) for name, names in known[folder.name].items()}
        sys.stderr.write(f"{folder.name} {counts}\n")
    TABLE.write_text(json.dumps(table_of(known), separators=(",", ":")) + "\n", encoding="ascii")
    sys.stderr.write(f"{TABLE}: {TABLE.stat().st_size} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
