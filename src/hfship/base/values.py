# SPDX-License-Identifier: Apache-2.0
"""Values: what rooms hand to each other, and how to define them without making a start slow.

`dataclass` of the standard library writes six methods of each class as text and compiles them while
a room is imported: 0.5 to 1 ms a class. A start of hfship defines some forty and uses five. Here
five of the methods are functions that all classes share, and `__init__`, which is called most, is
written when the first value is made. `inspect`, which `dataclasses` imports, stays away, too.

Promised is what the library promises, for `frozen` and `eq` of a class, and for `default`,
`default_factory` and `repr` of a field: anything else is a TypeError while the room is imported.
`fields`, `replace` and `asdict` of the library know these classes, and type checkers see its own.

    >>> @dataclass(frozen=True)
    ... class Point:
    ...     x: int
    ...     y: int = 0
    >>> replace(Point(1), y=2)
    Point(x=1, y=2)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, NoReturn, Tuple

NONE = object()  # where a field has no default: None is one


class Field:
    """What is known of a field."""

    def __init__(
        self, default: object = NONE, default_factory: object = NONE, repr: bool = True
    ) -> None:
        if type(default).__hash__ is None:
            raise ValueError(f"one {type(default).__name__} for all values: use default_factory")
        self.default = default
        self.default_factory = default_factory
        self.repr = repr


class LibraryFields:
    """`__dataclass_fields__` of a class, made when the standard library asks for it."""

    def __get__(self, _: object, kind: Any) -> Dict[str, Any]:
        import dataclasses

        rows = []
        for name, one in kind.__fields__.items():
            given = {key: value for key, value in vars(one).items() if value is not NONE}
            rows.append((name, Any, dataclasses.field(**given)))
        made: Any = dataclasses.make_dataclass(kind.__name__, rows)
        kind.__dataclass_fields__ = made.__dataclass_fields__
        return kind.__dataclass_fields__  # type: ignore[no-any-return]


# -- methods that all classes share


def _parts(value: Any) -> Tuple[object, ...]:
    return tuple([getattr(value, name) for name in value.__fields__])


def _equal(self: Any, other: Any) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return _parts(self) == _parts(other)


def _hash(self: Any) -> int:
    return hash(_parts(self))


def _repr(self: Any) -> str:
    shown = [name for name, one in self.__fields__.items() if one.repr]
    parts = [f"{name}={getattr(self, name)!r}" for name in shown]
    return f"{type(self).__qualname__}({', '.join(parts)})"


def _refuse(_: object, name: str, *__: object) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"cannot assign to field {name!r}")


# -- what is made for each class


def _dataclass(kind: Any = None, *, frozen: bool = False, eq: bool = True) -> Any:
    """Make a dataclass of a class."""
    if kind is None:
        return partial(_dataclass, frozen=frozen, eq=eq)
    kind.__fields__ = {}
    for base in kind.__mro__[:0:-1]:
        kind.__fields__.update(vars(base).get("__fields__", {}))
    kind.__fields__.update(_own_fields(kind))
    kind.__dataclass_fields__ = LibraryFields()

    def __init__(self: Any, *args: object, **kwargs: object) -> None:
        kind.__init__ = _written_init(kind, frozen)  # in two threads at once, twice the same
        kind.__init__(self, *args, **kwargs)

    kind.__init__ = __init__
    if "__repr__" not in vars(kind):
        kind.__repr__ = _repr
    if eq:
        kind.__eq__ = _equal
        kind.__hash__ = _hash if frozen else None
    if frozen:
        kind.__setattr__ = kind.__delattr__ = _refuse
    return kind


def _own_fields(kind: Any) -> Dict[str, Field]:
    """The fields that a class adds to those of its bases. Their defaults become its attributes."""
    found = {}
    for name, hint in vars(kind).get("__annotations__", {}).items():
        if "ClassVar[" in str(hint):
            continue
        one = vars(kind).get(name, NONE)
        if not isinstance(one, Field):
            one = Field(one)
        found[name] = one
        if one.default is not NONE:
            setattr(kind, name, one.default)
        elif name in vars(kind):
            delattr(kind, name)
    return found


def _written_init(kind: Any, frozen: bool) -> Callable[..., None]:
    """`__init__` of a class: one assignment for each field, in their order."""
    scope: Dict[str, object] = {"_set": object.__setattr__, "_none": NONE}
    arguments = ["self"]
    lines = ["pass"]
    for name, one in kind.__fields__.items():
        argument = value = name
        if one.default is not NONE:
            scope[f"_{name}"] = one.default
            argument = f"{name}=_{name}"
        elif one.default_factory is not NONE:
            scope[f"_{name}"] = one.default_factory
            argument = f"{name}=_none"
            value = f"_{name}() if {name} is _none else {name}"
        arguments.append(argument)
        lines.append(f"_set(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
    exec(f"def __init__({', '.join(arguments)}): {'; '.join(lines)}", scope)
    written: Any = scope["__init__"]
    written.__qualname__ = f"{kind.__qualname__}.__init__"
    return written  # type: ignore[no-any-return]


# -- functions of values, and the names that rooms import


def field_names(kind: Any) -> Iterable[str]:
    """The names of a dataclass's fields, in their order."""
    names: Dict[str, Field] = kind.__fields__
    return names


def _replace(value: Any, **changes: object) -> Any:
    same = dict(zip(value.__fields__, _parts(value)))
    return type(value)(**{**same, **changes})


def _asdict(value: Any) -> Any:
    """A value with dicts for the dataclasses in it."""
    if hasattr(type(value), "__fields__"):
        return {name: _asdict(getattr(value, name)) for name in value.__fields__}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a NamedTuple
        return type(value)(*map(_asdict, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_asdict, value))
    if isinstance(value, dict):
        return type(value)((_asdict(key), _asdict(part)) for key, part in value.items())
    return value


if TYPE_CHECKING:
    from dataclasses import asdict as asdict
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
else:
    dataclass, field, replace, asdict = _dataclass, Field, _replace, _asdict
