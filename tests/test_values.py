"""Our dataclasses are the library's: the same program says the same with both, on every Python."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from dataclasses import asdict as library_asdict
from dataclasses import fields as library_fields
from dataclasses import replace as library_replace
from typing import Sequence, Tuple

import pytest

from conftest import ROOT
from hfship.base import values
from hfship.base.values import asdict, dataclass, field, replace
from support import components
from support.components import Interpreter, pythons

# Runs with the names dataclass, field, replace, asdict, of either kind.
CLASSES = """
from __future__ import annotations
import copy, pickle
from typing import ClassVar, Dict, List, NamedTuple, Optional, Tuple

class Row(NamedTuple):
    size: int
    part: object = None

@dataclass(frozen=True)
class Point:
    x: int
    y: int = 2
    kind: ClassVar[str] = "point"
    @property
    def far(self):
        return self.x > 9

@dataclass(frozen=True)
class Named(Point):
    name: str = "n"
    y: int = 7
    secret: str = field(default="", repr=False)
    rows: Dict[str, int] = field(default_factory=dict)

@dataclass
class Open:
    items: List[int] = field(default_factory=list)
    size: int = 0
    at: Optional[Point] = None

@dataclass(frozen=True, eq=False)
class Alone:
    x: int

@dataclass(frozen=True)
class Secret:
    value: str = field(repr=False)
    source: str = "file"

@dataclass(frozen=True)
class Spoken:
    x: int
    def __repr__(self):
        return f"<{self.x}>"

@dataclass(frozen=True)
class Nothing:
    pass

class Plain(Point):
    def __init__(self):
        super().__init__(5)

def unlike(value):
    changed = copy.copy(value)
    vars(changed)["x"] = -1
    return value == changed
"""

# What is said by both alike: the repr of a result, or the type of an error.
SAID = [
    "Point(1)",
    "Point(1, 3), Point(x=1, y=3), Point(y=4, x=1)",
    "Point()",
    "Point(1, 2, 3)",
    "Point(1, x=2)",
    "Point(1, z=2)",
    "Point(1).kind, Point.kind, Point(10).far",
    "Point.y, Named.y, Named.secret",
    "Point.x",
    "Named.rows",
    "Point(1) == Point(1, 2), Point(1) == Point(2), Point(1) == (1, 2), Point(1) != Point(1)",
    "Point(1, 7) == Named(1)",
    "Point.__eq__(Point(1), 1)",
    "Point(float('nan')) == Point(float('nan'))",
    "len({Point(1), Point(1, 2), Point(1, 3)})",
    "hash(Point(1)) == hash(Point(1)) == hash((1, 2))",
    "hash(Open())",
    "hash(Point([]))",
    "unlike(Point(1))",
    "setattr(Point(1), 'x', 2)",
    "setattr(Point(1), 'new', 2)",
    "delattr(Point(1), 'x')",
    "Named(1)",
    "Named(1, secret='s'), Named(1, secret='s').secret",
    "Named(1) == Named(1, rows={}), Named(1) == Named(1, rows={'a': 1})",
    "Named(1).rows is Named(1).rows",
    "list(vars(Named(1)))",
    "Open(), Open() == Open(), Open().items is Open().items, Open([1]), Open(items=[2], size=3)",
    "(lambda one: (setattr(one, 'size', 5), one, delattr(one, 'size'), one.size))(Open())",
    "Alone(1) == Alone(1), len({Alone(1), Alone(1)})",
    "setattr(Alone(1), 'x', 2)",
    "Secret('s'), Secret('s') == Secret('t')",
    "Secret()",
    "Spoken(3)",
    "Nothing(), Nothing() == Nothing(), hash(Nothing()) == hash(())",
    "Plain(), Plain() == Point(5), Plain() == Plain()",
    "replace(Point(1), y=9), replace(Named(1, rows={'a': 1}), x=2), replace(Open([1]), size=9)",
    "replace(Point(1), z=9)",
    "asdict(Open([1], 2, Point(1)))",
    "asdict(Named(1, rows={'a': Point(2)})), asdict(Point(Row(1, Point(2)), (1, [Point(3)])))",
    "asdict(Point({1: {2: Row(3)}}))",
    "[copy.copy(one) for one in (Point(1), Named(1), Open([1]), Secret('s'))]",
    "copy.deepcopy(Named(1, rows={'a': 1}))",
    "pickle.loads(pickle.dumps(Named(1, secret='s', rows={'a': 1}))).secret",
    "pickle.loads(pickle.dumps(Point(1))) == Point(1)",
    "Point.__name__, Point.__module__, Point.__init__.__name__",
]

# Classes that are refused, with the error of both.
REFUSED = {
    "class A:\n    x: list = []": "ValueError",
    "class A:\n    x: dict = field(default={})": "ValueError",
    "class A:\n    x: set = set()": "ValueError",
}

PROGRAM = """
import dataclasses, sys, types
from hfship.base import values

def said(owner, text):
    try:
        return repr(eval(text, owner))
    except Exception as exc:
        return type(exc).__name__

def owner_of(names):
    module = types.ModuleType("owner")
    sys.modules["owner"] = module
    vars(module).update({name: getattr(names, name) for name in NAMES})
    exec(CLASSES, vars(module))
    return vars(module)

ours = [said(owner_of(values), text) for text in SAID]  # each begins with no value made
library = owner_of(dataclasses)
theirs = [said(library, text) for text in SAID]
for text, one, other in zip(SAID, ours, theirs):
    if one != other:
        print(f"{text}\\n  ours     {one}\\n  library  {other}")
"""


def require_alike(python: Sequence[str], cwd: str) -> None:
    """Both kinds say the same under a Python, started where the package is."""
    names = "NAMES = ('dataclass', 'field', 'replace', 'asdict')"
    argv = [*python, "-c", f"{names}\n{CLASSES = }\n{SAID = }\n{PROGRAM}"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, check=False)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("python", pythons(), ids=lambda python: python.version)
def test_ours_say_what_the_librarys_say(python: Interpreter) -> None:
    require_alike([str(python.path)], str(ROOT / "src"))


def test_ours_say_what_the_librarys_say_on_python_3_14() -> None:
    components.require("chroot-forky")
    inside = components.chroot_argv("chroot-forky", {str(ROOT / "src"): "/src"})
    require_alike([*inside, "env", "PYTHONPATH=/src", "python3"], "/")


@pytest.mark.parametrize("names", ["hfship.base.values", "dataclasses"])
@pytest.mark.parametrize("text, error", REFUSED.items())
def test_a_default_that_values_would_share_is_refused(names: str, text: str, error: str) -> None:
    owner = vars(sys.modules[names])
    with pytest.raises(ValueError):
        exec(f"@dataclass\n{text}", {"dataclass": owner["dataclass"], "field": owner["field"]})


@pytest.mark.parametrize("options", ["order=True", "init=False", "unsafe_hash=True"])
def test_what_is_not_there_is_refused_at_once(options: str) -> None:
    with pytest.raises(TypeError):
        exec(f"@dataclass({options})\nclass A:\n    x: int", {"dataclass": values.dataclass})
    with pytest.raises(TypeError):
        values.field(init=False)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Late:
    """Its `__init__` is written by a test."""

    x: int
    many: Tuple[int, ...] = ()
    secret: str = field(default="", repr=False)


def test_the_librarys_functions_know_ours() -> None:
    value = Late(1, (2, 3))
    assert [one.name for one in library_fields(Late)] == ["x", "many", "secret"]
    assert library_asdict(value) == asdict(value) == {"x": 1, "many": (2, 3), "secret": ""}
    assert library_replace(value, x=2) == replace(value, x=2) == Late(2, (2, 3))


def test_a_value_that_was_never_made_can_be_read() -> None:
    """Of a pickle, in a process that has made none so far."""

    @dataclass(frozen=True)
    class Unmade:
        x: int

    made = Unmade.__new__(Unmade)
    vars(made)["x"] = 3
    assert copy.copy(made) == made
    assert made == Unmade(3)
    assert pickle.loads(pickle.dumps(Late(1))) == Late(1)


def test_threads_may_make_the_first_value_at_once() -> None:
    for _ in range(50):

        @dataclass(frozen=True)
        class Shared:
            x: int
            y: int = 2

        found = []
        gate = threading.Barrier(8)

        def make(kind: type = Shared, gate: threading.Barrier = gate, into: list = found) -> None:
            gate.wait()
            into.append(kind(1))

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [Shared(1, 2)] * 8


def test_a_start_needs_neither_the_library_nor_inspect() -> None:
    code = "import sys, hfship.commands.run as r; print(sorted({'dataclasses', 'inspect'} & set(sys.modules)))"
    argv = [sys.executable, "-S", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT / "src", check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
