# SPDX-License-Identifier: Apache-2.0
"""Values of any class of hfship, made from the types of its fields: for tests of what they say."""

from __future__ import annotations

import ast
import enum
import functools
import importlib
import inspect
import pkgutil
import types
import typing
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import hfship
from hfship.archive.frames import Frames
from hfship.base.errors import HfshipError


class UnknownTypeError(Exception):
    """A type of which no sample can be made."""


def rooms() -> List[types.ModuleType]:
    """All rooms, imported."""
    found = pkgutil.walk_packages(hfship.__path__, "hfship.")
    return [importlib.import_module(one.name) for one in found if not one.name.endswith("__")]


def classes_with(*methods: str) -> Iterator[type]:
    """The classes of values that have these methods of their own."""
    for room in rooms():
        for kind in vars(room).values():
            is_value = hasattr(kind, "__fields__") or hasattr(kind, "_fields")
            if not inspect.isclass(kind) or not is_value or kind.__module__ != room.__name__:
                continue
            if all(callable(vars(kind).get(name)) for name in methods):
                yield kind


@functools.lru_cache(maxsize=None)
def names_in(room: types.ModuleType) -> Dict[str, Any]:
    """What the annotations of a room may name, imports for the type checker too."""
    names: Dict[str, Any] = {**vars(typing), **vars(room)}
    tree = ast.parse(inspect.getsource(room))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            source = importlib.import_module(str(node.module))
            for alias in node.names:
                if hasattr(source, alias.name):
                    names[alias.asname or alias.name] = getattr(source, alias.name)
    return names


def number_of(name: str) -> int:
    """A number for a field, whatever other fields there are."""
    return 10 + zlib.crc32(name.encode()) % 90


class Samples:
    """Makes values: `full` ones have everything, others only what they cannot be without."""

    def __init__(self, full: bool) -> None:
        self._full = full

    def value(self, kind: type) -> Any:
        """A value of a class, each field different."""
        hints: Dict[str, str] = {}
        for base in reversed(kind.__mro__):
            hints.update(getattr(base, "__annotations__", {}))
        wanted = list(getattr(kind, "__fields__", None) or getattr(kind, "_fields", ()))
        names = names_in(importlib.import_module(kind.__module__))
        made = {}
        for name in wanted:
            hint = hints[name]
            if isinstance(hint, typing.ForwardRef):
                hint = hint.__forward_arg__
            made[name] = self.of(eval(hint, names) if isinstance(hint, str) else hint, name)
        return kind(**made)

    def of(self, hint: Any, name: str) -> Any:
        """A value of a type."""
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin is not None:
            return self._composed(origin, inner, name)
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return list(hint)[-1 if self._full else 0]
        if isinstance(hint, type) and issubclass(hint, HfshipError):
            return hint(f"what of {name}", f"why of {name}", "hfship next")
        if hint is Frames:
            return Frames([(9, 10, None), (9, 5, None)])
        plain: Dict[Any, Callable[[], Any]] = {
            str: lambda: name if self._full else "",
            int: lambda: 1000 * number_of(name) if self._full else 0,
            float: lambda: 0.5 + number_of(name) if self._full else 0.0,
            bool: lambda: self._full,
            bytes: lambda: name.encode(),
            Path: lambda: Path("/", name),
            Any: lambda: name,
            object: lambda: name,
        }
        if hint in plain:
            return plain[hint]()
        if hasattr(hint, "__fields__") or hasattr(hint, "_fields"):
            return self.value(hint)
        if str(getattr(hint, "__module__", "")).startswith("hfship."):
            return None  # it does work, and is not told of
        raise UnknownTypeError(f"{name}: {hint}")

    def _composed(self, origin: Any, inner: Tuple[Any, ...], name: str) -> Any:
        if origin is typing.Union:
            empty = type(None) in inner and not self._full
            return None if empty else self.of(inner[0], name)
        if inspect.isclass(origin) and issubclass(origin, typing.Mapping):
            values = {self.of(inner[0], f"{name}-key"): self.of(inner[1], f"{name}-value")}
            return values if self._full else {}
        if origin is tuple and inner[-1] is not Ellipsis:
            return tuple(self.of(one, f"{name}-{number}") for number, one in enumerate(inner, 1))
        if inspect.isclass(origin) and issubclass(origin, typing.Collection):
            count = 2 if self._full else 0
            values_of = [self.of(inner[0], f"{name}-{number + 1}") for number in range(count)]
            return tuple(values_of) if origin is tuple else values_of
        raise UnknownTypeError(f"{name}: {origin}")
