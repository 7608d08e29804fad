"""What holds for every room of src/hfship.

`python tests/support/house.py` ROOM.py lists what breaks a rule there.
"""

from __future__ import annotations

import ast
import textwrap
from typing import Dict, List, Sequence, Tuple

import pytest

from conftest import ROOT
from mutate import TESTS, targets_of
from support import house
from support.house import RULES, Finding, Room, cycles, parse_room, read_rooms, upward_imports

SHOWN = 60  # findings of a rule


@pytest.fixture(scope="module")
def rooms() -> List[Room]:
    """All rooms; rules that look at none of them would all hold."""
    found = read_rooms()
    assert {room.floor for room in found} >= set(house.FLOORS)
    return found


def require_none(found: Sequence[str]) -> None:
    """Fail with the offenders."""
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    if found:
        pytest.fail("\n".join([f"{len(found)} findings", *found[:SHOWN], *more]), pytrace=False)


def placed(room: str, finding: Finding) -> str:
    """A finding as editors and terminals link it."""
    return f"src/hfship/{room}:{finding.line}: {finding.text}"


# -- the house


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str, rooms: List[Room]) -> None:
    require_none([placed(room.name, one) for room in rooms for one in sorted(RULES[rule](room))])


def test_rooms_import_downwards(rooms: List[Room]) -> None:
    require_none([placed(*found) for found in upward_imports(rooms)])


def test_rooms_have_an_order(rooms: List[Room]) -> None:
    require_none(cycles(rooms))


def test_lines_are_read_once(rooms: List[Room]) -> None:
    whole = house.density_of(rooms)
    figures = {room.name: house.density_of([room]) for room in rooms}
    if whole.median > house.MOST_DENSITY:
        names = sorted(figures, key=lambda name: -figures[name].median)
        dense = [
            f"src/hfship/{name}: {figures[name].median:.1f} syntax nodes a line" for name in names
        ]
        require_none([f"median {whole.median:.2f}, at most {house.MOST_DENSITY}", *dense[:15]])


def test_ternaries_are_rare(rooms: List[Room]) -> None:
    whole = house.density_of(rooms)
    figures = {room.name: house.density_of([room]) for room in rooms}
    if whole.ternary_rate > house.MOST_TERNARIES:
        names = sorted(figures, key=lambda name: -figures[name].ternaries)
        many = [f"src/hfship/{name}: {figures[name].ternaries} ternaries" for name in names]
        rate = f"{whole.ternary_rate:.1f} ternaries per 1,000, at most {house.MOST_TERNARIES:g}"
        require_none([rate, *many[:15]])


def test_rooms_have_tests(rooms: List[Room]) -> None:
    """`make mutate` knows where: else its table lacks the room, or names what is gone."""
    files = [f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")]
    names = {room.name for room in rooms}
    require_none(
        [
            f"src/hfship/{room.name}: no test file of its name, nor in TESTS of tests/mutate.py"
            for room in rooms
            if list(house.functions_of(room.tree)) and not targets_of(room.name, files, "")
        ]
        + [f"tests/mutate.py: no room {name}" for name in TESTS if f"{name}.py" not in names]
        + [
            f"tests/mutate.py: no tests/test_{word}.py for {name}"
            for name, words in TESTS.items()
            for word in words.split()
            if f"tests/test_{word}.py" not in files
        ]
    )


def test_exceptions_from_the_rules_are_used(rooms: List[Room]) -> None:
    by_name = {room.name: room for room in rooms}
    for name, means in house.STARTERS.items():
        used = {one for node in by_name[name].nodes for one in house.started_by(node)}
        assert used == set(means), name
    for name in house.PRINTERS:
        assert list(house.prints(by_name[name]._replace(name="base/other.py"))), name


# -- the rules: what they find, and what they leave alone

NINE = "def f(a, b, c):\n" + 3 * "    if a and b and c:\n        pass\n"  # as many decisions

# rule: (text of the room base/x.py, the lines with a finding)
FINDINGS: Dict[str, List[Tuple[str, List[int]]]] = {
    "rooms of 900 lines": [
        ("x = 1\n" * 900, []),
        ("x = 1\n" * 901, [901]),
    ],
    "lines of 100": [
        ("# " + 98 * "x" + "\n# " + 99 * "x", [2]),
        ("# " + 98 * "ü", []),  # characters, not bytes
    ],
    "ten decisions": [
        (NINE + "    return a or b\n", []),
        (NINE + "    return a or b or c\n", [1]),
        (NINE + "    return a if b else c\n", []),
        (NINE + "    return a if b or c else c\n", [1]),
        (NINE + "    return [x for x in a]\n", []),
        (NINE + "    return [x for x in a if x]\n", [1]),
        (NINE + "    return {x for y in a for x in y}\n", [1]),
        (NINE + "    for x in a:\n        while b:\n            pass\n", [1]),
        (NINE + "    try:\n        a()\n    except b:\n        pass\n", []),
        (NINE + "    try:\n        a() or b\n    except b:\n        pass\n", [1]),
        (NINE + "    return lambda: a or b or c\n", [1]),
        (NINE + "    def g():\n        return a or b or c\n", []),
        ("def g():\n" + textwrap.indent(NINE + "    return a or b or c\n", "    "), [2]),
        ("class A:\n" + textwrap.indent(NINE, "    "), []),
        ("class A:\n" + textwrap.indent(NINE + "    return a or b or c\n", "    "), [2]),
        ("async " + NINE + "    async for x in a:\n        b or c\n", [1]),
    ],
    "no ternary in a ternary": [
        ("x = a if b else c\ny = (a if b else c, a if b else c)", []),
        ("x = a if b else c if d else e", [1]),
        ("x = a if (b if c else d) else e", [1]),
        ("x = f(a if b else c) if d else e", [1]),
    ],
    "statements are no expressions": [
        ('"""Words."""\nf()\nx = a or b\n...', []),
        ("async def f():\n    await g()\n    yield 1\n", []),
        ("f() if a else g()", [1]),
        ("a or f()\na and f()", [1, 2]),
        ("[f(x) for x in a]\n{f(x) for x in a}", [1, 2]),
        ("f(), g()\nnot f()", [1, 2]),
    ],
    "booleans are no numbers": [
        ('x = "-" * width\ny = [0] * len(a)\nz = 3 * (a + b)', []),
        ("x = a[0]\ny = a[1:]\nz = a[key]", []),
        ("x = [a] * bool(b)\ny = bool(b) * [a]", [1, 2]),
        ('x = "s" * (a != 1)\nx = "s" * (not a)', [1, 2]),
        ('x += ["s"] * (a > b and c < d)\nx *= a == b', [1, 2]),
        ('x = "s" * a.isdigit() + "t" * a.startswith("b")', [1, 1]),
        ("x = (a, b)[c > d]\nx = [a, b][not c]", [1, 2]),
        ("def f(a: bool, b: int):\n    return [1] * a + [2] * b", [2]),
        ("def f(a):\n    b, c = a > 1, 2\n    return [1] * b + [2] * c", [3]),
        ("def f(a: bool):\n    def g():\n        return [1] * a", [3]),
        ("def f(a: bool):\n    pass\ndef g(a):\n    return [1] * a", []),
        ("class A:\n    a: bool\n    b: int\nx = [1] * c.a + [2] * c.b", [4]),
        ("def f() -> bool:\n    pass\nx = [1] * f() + [2] * g()", [3]),
        ('add("-a", "--all", action="store_true")\nx = [1] * args.all', [2]),
    ],
    "calls have names": [
        ("f(a if b else c)", []),
        ("(f if a else g)(x)\n(f or g)(x)", [1, 2]),
    ],
    "loops have names": [
        ("for x in a or ():\n    pass\ny = [x for x in a if b]", []),
        ("for x in a if b else c:\n    pass\ny = [x for x in (a if b else c)]", [1, 3]),
    ],
    "one room prints": [
        ('# print("x")\nx = sys.stdin\nos.write(fd, data)\nprinter(x)', []),
        ("print(1)\nf(print)\nsys.stdout.write(x)\nsys.stderr.buffer.write(x)", [1, 2, 3, 4]),
        ("x = sys.__stdout__\nfrom sys import stderr\nos.write(2, x)", [1, 2, 3]),
        ('traceback.print_exc()\nopen(1, "w")', [1, 2]),
    ],
    "few rooms start programs": [
        ("import os\nos.kill(1, 2)\nrun_program([])", []),
        ("import subprocess\nfrom subprocess import run", [1, 2]),
        ("def f():\n    import multiprocessing.pool", [2]),
        ('os.system("x")\nos.execvp(a, b)\nos.posix_spawn(a)\nos.fork()', [1, 2, 3, 4]),
    ],
    "words are parsed above": [
        ("import os", []),
        ("import argparse\nfrom argparse import Namespace", [1, 2]),
        ("if TYPE_CHECKING:\n    import argparse", [2]),
    ],
    "values are quick to define": [
        ("from hfship.base.values import dataclass", []),
        ("from dataclasses import dataclass\nimport dataclasses", [1, 2]),
    ],
    "all is documented": [
        ('"""Words."""\ndef f():\n    """Words."""\ndef _g(): ...\n', []),
        ("x = 1\ndef f(): ...\nasync def g(): ...\nclass A: ...", [1, 2, 3, 4]),
        ('"""W."""\nclass A:\n    """W."""\n    def f(self): ...\n    def _g(self): ...', [4]),
        ('"""W."""\nclass A(NamedTuple):\n    """W."""\n    def f(self): ...', [4]),
        ('"""W."""\nclass A(B):\n    """W."""\n    def f(self): ...', []),
        ('"""W."""\nclass A:\n    """W."""\n    @property\n    def f(self): ...', []),
        ('"""W."""\nclass _A:\n    def f(self): ...', []),
    ],
    "annotations are lazy": [
        ('"""W."""\nfrom __future__ import annotations\nimport os', []),
        ('"""W."""\nimport os', [2]),
        ('"""W."""\n\ndef f(): ...', [3]),
    ],
}

# (rule, room, its text, the lines with a finding)
ALLOWED_THERE = [
    ("one room prints", "base/output.py", "print(1)\nsys.stdout.write(x)", []),
    ("one room prints", "commands/report.py", "print(1)", [1]),
    ("few rooms start programs", "base/processes.py", "import subprocess\nos.fork()", [2]),
    ("words are parsed above", "commands/x.py", "import argparse", []),
    ("values are quick to define", "base/values.py", "import dataclasses", []),
    ("annotations are lazy", "base/__init__.py", "import os", []),
]


@pytest.mark.parametrize(
    "rule, source, lines",
    [(rule, source, lines) for rule, cases in FINDINGS.items() for source, lines in cases],
)
def test_what_a_rule_finds(rule: str, source: str, lines: List[int]) -> None:
    assert sorted(one.line for one in RULES[rule](parse_room("base/x.py", source))) == lines


@pytest.mark.parametrize("rule, name, source, lines", ALLOWED_THERE)
def test_what_some_rooms_may(rule: str, name: str, source: str, lines: List[int]) -> None:
    assert [one.line for one in RULES[rule](parse_room(name, source))] == lines


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_known_to_find_and_to_spare(rule: str) -> None:
    assert {bool(lines) for _, lines in FINDINGS[rule]} == {True, False}


BASE = {
    "__init__.py": "",
    "base/__init__.py": "",
    "base/a.py": "",
    "base/b.py": "",
    "hub/__init__.py": "",
    "hub/c.py": "",
}

# (the room besides or in place of those of BASE, its text, the lines with a finding)
IMPORTS: List[Tuple[str, str, List[int]]] = [
    ("hub/c.py", "import os\nfrom hfship.base.a import x", []),
    ("hub/c.py", "import hfship.base.b\nfrom hfship.base import a", []),
    ("base/b.py", "from hfship.base.a import x\nfrom .a import y\nfrom . import a\nimport hub", []),
    ("base/b.py", "from hfship import __version__\nimport hfship", []),
    ("base/a.py", "\nfrom hfship.hub.c import x", [2]),
    (
        "base/a.py",
        "import hfship.hub.c\nimport hfship.hub.c as c\nfrom hfship.hub import c",
        [1, 2, 3],
    ),
    ("base/a.py", "def f():\n    from hfship.hub.c import x", [2]),
    ("base/a.py", "if TYPE_CHECKING:\n    from hfship.hub.c import X", [2]),
    ("base/a.py", "from ..hub.c import x\nfrom ..hub import c\nfrom .. import hub", [1, 2, 3]),
    ("base/a.py", 'importlib.import_module("hfship.hub.c")\n__import__("hfship.hub.c")', [1, 2]),
    ("base/a.py", "import hfship.__main__", [1]),
    ("__main__.py", "from hfship.hub.c import main", []),
    ("hub/c.py", "from hfship.base import x\nimport hfship.base", [1, 2]),  # a floor
    ("hub/__init__.py", "from hfship.hub.c import x\nfrom hfship.base.a import y", [1, 2]),
    ("__init__.py", "from hfship.base.a import x", [1]),
    ("cellar/a.py", "", [1]),
    ("base/deep/a.py", "", [1]),
]


def small_house(sources: Dict[str, str]) -> List[Room]:
    """BASE with other rooms."""
    return [parse_room(name, source) for name, source in {**BASE, **sources}.items()]


@pytest.mark.parametrize("name, source, lines", IMPORTS)
def test_which_imports_go_upwards(name: str, source: str, lines: List[int]) -> None:
    found = list(upward_imports(small_house({"__main__.py": "", name: source})))
    assert found == [(name, one) for _, one in found]
    assert [one.line for _, one in found] == lines


@pytest.mark.parametrize(
    "sources, expected",
    [
        (
            {
                "base/b.py": "import hfship.base.a",
                "hub/c.py": "import hfship.base.a, hfship.base.b",
            },
            [],
        ),
        (
            {
                "base/a.py": "\nimport hfship.base.b",
                "base/b.py": "def f():\n    \n    from . import a",
            },
            ["base/a.py:2 -> base/b.py:3 -> base/a.py"],
        ),
        ({"base/a.py": "import hfship.base.a"}, ["base/a.py:1 -> base/a.py"]),
        (
            {
                "base/a.py": "from . import b",
                "base/b.py": "from . import d",
                "base/d.py": "from . import a, e",
                "base/e.py": "",
            },
            ["base/a.py:1 -> base/b.py:1 -> base/d.py:1 -> base/a.py"],
        ),
        (
            {
                "base/a.py": "from . import b",
                "base/b.py": "from . import a, d",
                "base/d.py": "from . import b",
            },
            ["base/a.py:1 -> base/b.py:1 -> base/a.py", "base/d.py:1 -> base/b.py:1 -> base/d.py"],
        ),
    ],
)
def test_which_rooms_have_no_order(sources: Dict[str, str], expected: List[str]) -> None:
    assert cycles(small_house(sources)) == expected


def test_density_is_that_of_bodies() -> None:
    source = '''
        # a comment
        def f(a: int) -> int:
            """Words that count as code lines, but not as lines of the body."""

            b = a if a else 1

            return b
        def g():
            """Nothing else."""
        class A:
            x = 1
    '''
    found = house.density_of([parse_room("base/x.py", textwrap.dedent(source))])
    # Assign, Name, IfExp with three parts, Return and Name over three lines, of which one is blank.
    assert (found.densities, found.code_lines, found.ternaries) == ([8 / 3], 8, 1)
    assert found.ternary_rate == 125


def test_mccabe_counts_what_is_inside() -> None:
    function = ast.parse(NINE + "    def g():\n        return [x for x in a if x]\n").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert (house.decisions(function), house.mccabe(function)) == (9, 11)


def test_the_tool_lists_a_room(
    rooms: List[Room], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [room for room in rooms if room.floor in ("", "base")]
    monkeypatch.setattr(house, "read_rooms", lambda: some)
    assert house.main([]) == 0
    table = capsys.readouterr().out
    assert "\nbase/errors.py " in table and "\nall " in table
    assert house.main(["src/hfship/__init__.py"]) == 0
    assert capsys.readouterr().out.startswith("__init__.py: ")
    assert house.main(["cellar/a.py"]) == 2
