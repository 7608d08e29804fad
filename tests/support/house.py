#!/usr/bin/env python3
"""The rules of the house, read from the syntax of its rooms, and how dense the rooms are.

    python tests/support/house.py              a row for each room, and the whole
    python tests/support/house.py ROOM.py ...  what breaks a rule there, and what to unfold first

`tests/test_house.py` holds src/hfship to what is found here. Nothing is imported from the program:
what does not even load can be looked at. The words: a *room* is a module, a *floor* is a folder of
them; FLOORS is their order.
"""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path
from typing import (
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

SOURCE = Path(__file__).resolve().parent.parent.parent / "src" / "hfship"
FLOORS = ("base", "hub", "archive", "serve", "site", "ops", "commands")

MOST_LINES = 900  # of a room
MOST_COLUMNS = 100
MOST_DECISIONS = 10  # of a function
MOST_DENSITY = 5.5  # syntax nodes per line of a function's body, median over all functions
MOST_TERNARIES = 15.0  # per 1,000 code lines

# Who may start programs or processes, with what, and why not through `run_program`.
STARTERS: Dict[str, Tuple[str, ...]] = {
    "base/processes.py": ("subprocess",),  # run_program and follow_program: what everyone else uses
    "base/workers.py": ("os.fork",),  # forked workers
    "ops/background.py": ("os.fork",),  # a job that outlives its terminal
    "serve/image_load.py": ("subprocess",),  # the pipe into `docker load`, gigabytes as they come
    "serve/docker.py": ("subprocess",),  # docker's log: bytes copied as they come, until Ctrl-C
}
# Whoever writes to the terminal past the reporter escapes redaction, --json and the log.
PRINTERS = (
    "base/output.py",
    "serve/in_image.py",  # a program of its own, which runs in the image: hfship reads its output
)
# Only what an operator types is parsed by argparse; all below takes values.
ARGPARSE_FLOORS = ("commands",)
# The library compiles six methods of each class while a room is imported, at every start.
DATACLASSES = "base/values.py"

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp)


class Finding(NamedTuple):
    """What breaks a rule, and in which line (from 1)."""

    line: int
    text: str


class Room(NamedTuple):
    """One module. `booleans` are what any room declares as bool: attributes and functions."""

    name: str  # "base/text.py", from src/hfship
    source: str
    tree: ast.Module
    nodes: Tuple[ast.AST, ...]  # of all the tree
    booleans: FrozenSet[str] = frozenset()

    @property
    def floor(self) -> str:
        """The folder; "" for what lies beside the floors."""
        return self.name.rpartition("/")[0]

    @property
    def module(self) -> str:
        """As it is imported: "hfship.base.text", and "hfship.base" for its __init__."""
        return module_name(self.name)


class Import(NamedTuple):
    """One import of something of ours: by the room `importer`, of a module: a room or a floor."""

    importer: str
    line: int
    module: str


def module_name(name: str) -> str:
    """
    >>> module_name("base/text.py"), module_name("base/__init__.py"), module_name("__main__.py")
    ('hfship.base.text', 'hfship.base', 'hfship.__main__')
    """
    parts = ["hfship", *name[: -len(".py")].split("/")]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def parse_room(name: str, source: str) -> Room:
    """The room called `name` ("base/text.py") with the given text. Raises SyntaxError."""
    tree = ast.parse(source, name)
    nodes = tuple(ast.walk(tree))
    return Room(name, source, tree, nodes, frozenset(declared_booleans(nodes)))


def read_rooms(folder: Path = SOURCE) -> List[Room]:
    """All rooms below `folder` in the order of their floors; each knows the booleans of all."""
    rooms = [
        parse_room(path.relative_to(folder).as_posix(), path.read_text("utf-8"))
        for path in folder.rglob("*.py")
    ]
    booleans = frozenset().union(*(room.booleans for room in rooms))
    return sorted(
        (room._replace(booleans=booleans) for room in rooms),
        key=lambda room: (level(room.module), room.name),
    )


# -- floors: who imports whom


def level(module: str) -> int:
    """The floor of a module: -1 for the package itself (its version), above all for what starts it.

    >>> level("hfship"), level("hfship.base.text"), level("hfship.commands.run")
    (-1, 0, 6)
    >>> level("hfship.__main__")
    7
    """
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    return FLOORS.index(parts[1]) if parts[1] in FLOORS else len(FLOORS)


def imports_of(room: Room, modules: Iterable[str]) -> Iterator[Import]:
    """Every import of ours, wherever it stands. `modules` tell rooms from names in rooms."""
    known = set(modules)
    for node in room.nodes:
        for module in imported_names(node, room):
            while module not in known and "." in module:
                module = module.rpartition(".")[0]
            yield Import(room.name, node.lineno, module)  # type: ignore[attr-defined]


def imported_names(node: ast.AST, room: Room) -> Iterator[str]:
    """What an import, or import_module("hfship.x"), asks for of ours: modules, or names in them."""
    if isinstance(node, ast.Import):
        asked = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:  # relative: one point is the folder that the room lies in
            folder = ["hfship", *room.name.split("/")[:-1]]
            origin = ".".join([*folder[: len(folder) - node.level + 1], *origin.split(".")]).rstrip(
                "."
            )
        asked = [f"{origin}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
        asked = [
            part.value
            for part in node.args
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
    else:
        asked = []
    for name in asked:
        if name == "hfship" or name.startswith("hfship."):
            yield name


def upward_imports(rooms: Sequence[Room]) -> Iterator[Tuple[str, Finding]]:
    """(room, finding) for imports of a higher floor or a whole one, or by what must not import."""
    modules = [room.module for room in rooms]
    for room in rooms:
        if room.floor and room.floor not in FLOORS:
            yield room.name, Finding(1, f"lies on no floor: {room.floor}")
        for found in imports_of(room, modules):
            if level(found.module) > level(room.module):
                yield room.name, Finding(found.line, f"imports {found.module}, which lies above it")
            elif room.name.endswith("__init__.py"):
                yield (
                    room.name,
                    Finding(
                        found.line,
                        f"imports {found.module}: every import of the floor would load it",
                    ),
                )
            elif found.module.count(".") == 1 and level(found.module) < len(FLOORS):
                yield (
                    room.name,
                    Finding(found.line, f"imports {found.module}, which is a floor and no room"),
                )


def cycles(rooms: Sequence[Room]) -> List[str]:
    """The shortest cycles: "a.py:3 -> b.py:7 -> a.py", where line 3 of a.py imports b.py."""
    by_module = {room.module: room.name for room in rooms}
    uses: Dict[str, Dict[str, int]] = {room.name: {} for room in rooms}
    for room in rooms:
        for found in imports_of(room, by_module):
            uses[room.name].setdefault(by_module.get(found.module, ""), found.line)
    found_cycles: Dict[FrozenSet[str], str] = {}
    for name in uses:
        path = shortest_way_back(name, uses)
        if path:
            steps = [
                f"{room}:{uses[room][following]}"
                for room, following in zip(path, [*path[1:], path[0]])
            ]
            found_cycles.setdefault(frozenset(path), " -> ".join([*steps, path[0]]))
    return sorted(found_cycles.values())


def shortest_way_back(start: str, uses: Dict[str, Dict[str, int]]) -> List[str]:
    """The rooms from `start` back to itself, breadth first; empty when nothing leads back."""
    came_from: Dict[str, str] = {}
    waiting = [start]
    while waiting:
        room = waiting.pop(0)
        for used in uses[room]:
            if used == start:
                path = [room]
                while path[-1] != start:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if used in uses and used not in came_from:
                came_from[used] = room
                waiting.append(used)
    return []


# -- rules about the text of one room


def too_long(room: Room) -> Iterator[Finding]:
    """A room of more than MOST_LINES."""
    count = len(room.source.splitlines())
    if count > MOST_LINES:
        yield Finding(count, f"{count} lines, at most {MOST_LINES}")


def wide_lines(room: Room) -> Iterator[Finding]:
    """Lines of more than MOST_COLUMNS characters."""
    for number, line in enumerate(room.source.splitlines(), 1):
        if len(line) > MOST_COLUMNS:
            yield Finding(number, f"{len(line)} characters, at most {MOST_COLUMNS}")


def many_decisions(room: Room) -> Iterator[Finding]:
    """Functions of more than MOST_DECISIONS."""
    for name, function in functions_of(room.tree):
        count = decisions(function)
        if count > MOST_DECISIONS:
            yield Finding(
                function.lineno, f"{name} has {count} decisions, at most {MOST_DECISIONS}"
            )


def decisions(function: Function) -> int:
    """How often the way through a function forks, its lambdas included, functions in it not.

    >>> decisions(ast.parse('''
    ... def f(x):
    ...     for y in x or z and w:                             # 3: for, or, and
    ...         yield y if y else [a for a in y if a if b]     # 4: ternary, for, two conditions
    ... ''').body[0])
    7
    """
    count = 0
    for node in own_nodes(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def mccabe(function: Function) -> int:
    """The ways through a function and what it defines, as flake8 counts if it saw expressions."""
    ways = 1
    for node in ast.walk(function):
        ways += isinstance(node, (*BRANCHES, ast.comprehension))
        if isinstance(node, ast.BoolOp):
            ways += len(node.values) - 1
    return ways


def nested_ternaries(room: Room) -> Iterator[Finding]:
    """A ternary anywhere inside a ternary."""
    for node in room.nodes:
        if isinstance(node, ast.IfExp) and any(
            isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node
        ):
            yield Finding(node.lineno, "a ternary inside a ternary")


def effects_of_expressions(room: Room) -> Iterator[Finding]:
    """Statements that are an expression and neither call, wait nor document."""
    plain = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.Constant)
    for node in room.nodes:
        if isinstance(node, ast.Expr) and not isinstance(node.value, plain):
            yield Finding(node.lineno, f"{kind_of(node.value)} as a statement")


def booleans_as_numbers(room: Room) -> Iterator[Finding]:
    """A list or text times a boolean, and a boolean as an index: an `if` says it."""
    for names, node in with_boolean_names(room.tree, room.booleans):
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Mult):
            parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
            if any(is_boolean(part, names) for part in parts):
                yield Finding(node.lineno, f"multiplied by a boolean: {ast.unparse(node)[:60]}")
        elif isinstance(node, ast.Subscript) and is_boolean(node.slice, names):
            yield Finding(node.lineno, f"a boolean as an index: {ast.unparse(node)[:60]}")


def chosen_calls(room: Room) -> Iterator[Finding]:
    """(a if c else b)(x), and (a or b)(x)."""
    for node in room.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.IfExp, ast.BoolOp)):
            yield Finding(node.lineno, f"calls the outcome of {kind_of(node.func)}")


def chosen_loops(room: Room) -> Iterator[Finding]:
    """for x in (a if c else b)."""
    for node in room.nodes:
        if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)) and isinstance(
            node.iter, ast.IfExp
        ):
            yield Finding(node.iter.lineno, "loops over a ternary")


def prints(room: Room) -> Iterator[Finding]:
    """Output past the reporter."""
    if room.name in PRINTERS:
        return
    for node in room.nodes:
        if isinstance(node, ast.Name) and node.id == "print":
            yield Finding(node.lineno, "prints")
        elif isinstance(node, ast.Attribute) and dotted(node).startswith(
            ("sys.stdout", "sys.stderr", "sys.__std")
        ):
            if dotted(node).count(".") == 1:  # else the name inside says it
                yield Finding(node.lineno, f"uses {dotted(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            if {"stdout", "stderr"} & {alias.name for alias in node.names}:
                yield Finding(node.lineno, "imports an output")
        elif isinstance(node, ast.Call) and writes_to_the_terminal(node):
            yield Finding(node.lineno, f"writes to the terminal: {ast.unparse(node)[:60]}")


def writes_to_the_terminal(call: ast.Call) -> bool:
    """os.write(1, ...), open(2, "w"), traceback.print_exc()."""
    name = dotted(call.func)
    first = call.args[0] if call.args else None
    to_output = (
        isinstance(first, ast.Constant) and type(first.value) is int and first.value in (1, 2)
    )
    return name.startswith("traceback.print_") or (
        to_output and name in ("os.write", "os.writev", "os.fdopen", "open")
    )


def starts_programs(room: Room) -> Iterator[Finding]:
    """Processes that neither run_program nor a room of STARTERS starts."""
    allowed = STARTERS.get(room.name, ())
    for node in room.nodes:
        for name in started_by(node):
            if name not in allowed:
                text = f"uses {name}: {', '.join(sorted(STARTERS))} do that"
                yield Finding(node.lineno, text)  # type: ignore[attr-defined]


def started_by(node: ast.AST) -> Iterator[str]:
    """The means to start a process that a node of the syntax tree names."""
    for name in top_imports(node):
        if name in ("subprocess", "multiprocessing", "pty"):
            yield name
    if isinstance(node, ast.Attribute):
        name = dotted(node)
        if name.startswith(
            ("os.system", "os.popen", "os.fork", "os.exec", "os.spawn", "os.posix_spawn")
        ):
            yield name


def parses_words(room: Room) -> Iterator[Finding]:
    """argparse below the commands."""
    if room.floor in ARGPARSE_FLOORS:
        return
    for node in room.nodes:
        if "argparse" in top_imports(node):
            yield Finding(node.lineno, "imports argparse")  # type: ignore[attr-defined]


def slow_values(room: Room) -> Iterator[Finding]:
    """The library's dataclasses beside those of base/values.py."""
    if room.name == DATACLASSES:
        return
    for node in room.nodes:
        if "dataclasses" in top_imports(node):
            text = "imports dataclasses: hfship.base.values has them"
            yield Finding(node.lineno, text)  # type: ignore[attr-defined]


def undocumented(room: Room) -> Iterator[Finding]:
    """Rooms and public classes, functions and methods without a docstring. A property is documented
    by its name and type, a method of a class with bases by what it overrides."""
    if not ast.get_docstring(room.tree):
        yield Finding(1, "the room has no docstring")
    for name, node in public_definitions(room.tree):
        if not ast.get_docstring(node):
            yield Finding(node.lineno, f"{name} has no docstring")


def public_definitions(
    tree: Union[ast.Module, ast.ClassDef], inside: str = ""
) -> Iterator[Tuple[str, Union[ast.ClassDef, Function]]]:
    """(name, definition) of what a module or class offers, without overriding methods."""
    for node in tree.body:
        if (
            not isinstance(node, (ast.ClassDef, *FUNCTIONS))
            or node.name.startswith("_")
            or is_property(node)
        ):
            continue
        yield inside + node.name, node
        if isinstance(node, ast.ClassDef) and all(
            dotted(base) in ("NamedTuple", "Protocol") for base in node.bases
        ):
            yield from public_definitions(node, f"{node.name}.")


def is_property(node: Union[ast.ClassDef, Function]) -> bool:
    """Whether a definition is a property, or sets one."""
    names = [dotted(decorator) for decorator in node.decorator_list]
    return any(name.endswith(("property", ".setter")) for name in names)


def old_annotations(room: Room) -> Iterator[Finding]:
    """A room that Python 3.8 would make evaluate its type hints."""
    if room.name.rpartition("/")[2].startswith(
        "__"
    ):  # __init__ and __main__ have nothing to annotate
        return
    for node in room.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, *FUNCTIONS)):
            yield Finding(node.lineno, "lacks: from __future__ import annotations")
            return


RULES: Dict[str, Callable[[Room], Iterator[Finding]]] = {
    "rooms of 900 lines": too_long,
    "lines of 100": wide_lines,
    "ten decisions": many_decisions,
    "no ternary in a ternary": nested_ternaries,
    "statements are no expressions": effects_of_expressions,
    "booleans are no numbers": booleans_as_numbers,
    "calls have names": chosen_calls,
    "loops have names": chosen_loops,
    "one room prints": prints,
    "few rooms start programs": starts_programs,
    "words are parsed above": parses_words,
    "values are quick to define": slow_values,
    "all is documented": undocumented,
    "annotations are lazy": old_annotations,
}


# -- the syntax tree


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function's body without those of functions defined in it."""
    waiting: List[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, FUNCTIONS):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def functions_of(tree: ast.AST, inside: str = "") -> Iterator[Tuple[str, Function]]:
    """(name as in `Class.method` and `outer.inner`, function) of all functions, in their order."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            if not isinstance(node, ast.ClassDef):
                yield inside + node.name, node
            yield from functions_of(node, f"{inside}{node.name}.")
        else:
            yield from functions_of(node, inside)


def dotted(node: ast.AST) -> str:
    """
    >>> dotted(ast.parse("sys.stdout.buffer", mode="eval").body)
    'sys.stdout.buffer'
    >>> dotted(ast.parse("f().x", mode="eval").body)
    '.x'
    """
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def called_name(call: ast.Call) -> str:
    """The last word of what is called."""
    return dotted(call.func).rpartition(".")[2]


def top_imports(node: ast.AST) -> List[str]:
    """The packages that an import statement takes something of."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [(node.module or "").partition(".")[0]]
    return []


def kind_of(node: ast.expr) -> str:
    """An expression in words."""
    if isinstance(node, COMPREHENSIONS):
        return "a comprehension"
    return {ast.IfExp: "a ternary", ast.BoolOp: "and/or"}.get(
        type(node), f"a {type(node).__name__.lower()}"
    )


# -- booleans, as far as names and annotations tell


def declared_booleans(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Attributes annotated as bool, functions that return one, and flags of the command line."""
    for node in nodes:
        if isinstance(node, FUNCTIONS) and is_bool(node.returns):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and is_bool(part.annotation):
                    yield dotted(part.target)
        elif isinstance(node, ast.Call):
            words = [word for word in node.args if isinstance(word, ast.Constant)]
            actions = [word.value for word in node.keywords if word.arg == "action"]
            if any(
                isinstance(action, ast.Constant) and action.value == "store_true"
                for action in actions
            ):
                yield str(words[-1].value).lstrip("-").replace("-", "_")


def is_bool(annotation: Optional[ast.expr]) -> bool:
    """Whether an annotation is `bool`."""
    return isinstance(annotation, ast.Name) and annotation.id == "bool"


def with_boolean_names(
    node: ast.AST, names: FrozenSet[str]
) -> Iterator[Tuple[FrozenSet[str], ast.AST]]:
    """(boolean names there, node) for every node; those of locals with a space before."""
    if isinstance(node, FUNCTIONS):
        names = names | frozenset(local_booleans(node, names))
    yield names, node
    for child in ast.iter_child_nodes(node):
        yield from with_boolean_names(child, names)


def local_booleans(function: Function, known: FrozenSet[str]) -> Iterator[str]:
    """Arguments annotated as bool, and names that only get booleans; each with a space before."""
    arguments = function.args
    for argument in [
        *arguments.args,
        *arguments.kwonlyargs,
        *getattr(arguments, "posonlyargs", []),
    ]:
        if is_bool(argument.annotation):
            yield f" {argument.arg}"
    given: Dict[str, List[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name, value in pairs(target, node.value):
                    given.setdefault(name, []).append(value)
        elif (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and is_bool(node.annotation)
        ):
            yield f" {node.target.id}"
    for name, values in given.items():
        if all(is_boolean(value, known) for value in values):
            yield f" {name}"


def pairs(target: ast.expr, value: ast.expr) -> Iterator[Tuple[str, ast.expr]]:
    """(name, value) of an assignment, also of several at once."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif (
        isinstance(target, ast.Tuple)
        and isinstance(value, ast.Tuple)
        and len(target.elts) == len(value.elts)
    ):
        for one, its in zip(target.elts, value.elts):
            yield from pairs(one, its)


def is_boolean(node: ast.AST, names: FrozenSet[str]) -> bool:
    """Whether an expression can be seen to be True or False."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool)
    if isinstance(node, ast.BoolOp):
        return all(is_boolean(value, names) for value in node.values)
    if isinstance(node, ast.NamedExpr):
        return is_boolean(node.value, names)
    if isinstance(node, ast.Name):
        return f" {node.id}" in names
    if isinstance(node, ast.Attribute):
        return node.attr in names
    if isinstance(node, ast.Call):
        tests = ("bool", "any", "all", "callable", "hasattr", "exists", "startswith", "endswith")
        name = called_name(node)
        return name in tests or name in names or name.startswith("is")
    return isinstance(node, ast.Compare) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )


# -- density


class Density(NamedTuple):
    """How much stands in the lines of some rooms."""

    lines: int
    code_lines: int  # neither blank nor only a comment
    densities: List[
        float
    ]  # of each function: expressions and statements per line of its body, without the docstring
    ternaries: int
    crowded: List[Tuple[str, int]]  # functions of more than MOST_DECISIONS
    widest: int

    @property
    def median(self) -> float:
        """Syntax nodes per line of the median function."""
        return statistics.median(self.densities) if self.densities else 0.0

    @property
    def ternary_rate(self) -> float:
        """Ternaries per 1,000 code lines."""
        return 1000 * self.ternaries / max(self.code_lines, 1)


def body_of(function: Function) -> List[ast.stmt]:
    """The statements of a function without its docstring."""
    return (
        function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    )


def nodes_and_lines(function: Function) -> Tuple[int, int]:
    """Expressions and statements in a function's body, and its lines; (0, 0) without a body."""
    body = body_of(function)
    if not body:
        return 0, 0
    nodes = sum(
        isinstance(part, (ast.expr, ast.stmt)) for statement in body for part in ast.walk(statement)
    )
    return nodes, (body[-1].end_lineno or 0) - body[0].lineno + 1


_MEASURED: Dict[str, Density] = {}  # source of a room -> its figures


def density_of(rooms: Sequence[Room]) -> Density:
    """The figures of some rooms together."""
    found = []
    for room in rooms:
        if room.source not in _MEASURED:
            _MEASURED[room.source] = _measure(room)
        found.append(_MEASURED[room.source])
    return Density(
        lines=sum(one.lines for one in found),
        code_lines=sum(one.code_lines for one in found),
        densities=[density for one in found for density in one.densities],
        ternaries=sum(one.ternaries for one in found),
        crowded=[function for one in found for function in one.crowded],
        widest=max((one.widest for one in found), default=0),
    )


def _measure(room: Room) -> Density:
    lines = room.source.splitlines()
    functions = list(functions_of(room.tree))
    measured = [nodes_and_lines(function) for _, function in functions]
    forks = [(name, decisions(function)) for name, function in functions]
    return Density(
        lines=len(lines),
        code_lines=sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines),
        densities=[nodes / length for nodes, length in measured if length],
        ternaries=sum(isinstance(node, ast.IfExp) for node in room.nodes),
        crowded=[(name, count) for name, count in forks if count > MOST_DECISIONS],
        widest=max(map(len, lines), default=0),
    )


# -- as a program


def row_of(name: str, found: Density, findings: int) -> str:
    """A row of the table."""
    crowded = ", ".join(
        f"{function} {count}"
        for function, count in sorted(found.crowded, key=lambda one: -one[1])[:3]
    )
    more = f", +{len(found.crowded) - 3}" if len(found.crowded) > 3 else ""
    size = f"{found.lines:6} {len(found.densities):5}"
    density = f"{found.median:6.1f} {found.ternary_rate:6.1f} {found.widest:6}"
    return f"{name:29}{size} {density} {findings:6}  {crowded}{more}".rstrip()


def findings_of(room: Room, rooms: Sequence[Room]) -> List[Finding]:
    """What breaks a rule in one of the rooms, by line."""
    upward = [finding for name, finding in upward_imports(rooms) if name == room.name]
    return sorted([*upward, *(finding for rule in RULES.values() for finding in rule(room))])


def print_table(rooms: Sequence[Room]) -> None:
    """Every room in a row, the whole last; `breaks` are all findings of all rules."""
    heads = f"{'lines':>6} {'funcs':>5} {'nodes':>6} {'?:/k':>6} {'widest':>6} {'breaks':>6}"
    print(f"{'room':29}{heads}  above {MOST_DECISIONS} decisions")
    upward = [name for name, _ in upward_imports(rooms)]
    total = 0
    for room in rooms:
        count = upward.count(room.name) + sum(len(list(rule(room))) for rule in RULES.values())
        print(row_of(room.name, density_of([room]), count))
        total += count
    whole = density_of(rooms)
    print(row_of("all", whole, total))
    ways = sum(mccabe(one) > MOST_DECISIONS for room in rooms for _, one in functions_of(room.tree))
    crowded = f"above {MOST_DECISIONS} decisions: {len(whole.crowded)} functions"
    print(f"{crowded}; above {MOST_DECISIONS} ways (McCabe, with expressions): {ways}")
    goals = f"nodes <= {MOST_DENSITY}, ?:/k <= {MOST_TERNARIES:g}, widest <= {MOST_COLUMNS}"
    print(f"goals: {goals}, breaks 0")
    for cycle in cycles(rooms):
        print(f"cycle: {cycle}")


def print_offenders(room: Room, rooms: Sequence[Room]) -> bool:
    """What breaks a rule in one room, and the functions with the most nodes beyond MOST_DENSITY.
    Returns whether a rule is broken."""
    found = density_of([room])
    figures = f"{found.lines} lines, {found.median:.1f} nodes a line, {found.ternaries} ternaries"
    print(f"{room.name}: {figures} ({found.ternary_rate:.0f} per 1,000)")
    findings = findings_of(room, rooms)
    wide = list(wide_lines(room))
    for finding in findings:
        if finding not in wide:
            print(f"  {room.name}:{finding.line}: {finding.text}")
    if wide:
        numbers = " ".join(str(finding.line) for finding in wide)
        print(f"  {len(wide)} lines above {MOST_COLUMNS} characters: {numbers}")
    circles = [cycle for cycle in cycles(rooms) if f"{room.name}:" in cycle]
    for cycle in circles:
        print(f"  cycle: {cycle}")
    measured = [
        (*nodes_and_lines(function), name, function.lineno)
        for name, function in functions_of(room.tree)
    ]
    dense = sorted(
        (lines * MOST_DENSITY - nodes, nodes, lines, name, line)
        for nodes, lines, name, line in measured
    )
    for excess, nodes, lines, name, line in dense[:8]:
        if excess < 0:
            print(
                f"  dense  {room.name}:{line} {name}: {nodes / lines:.1f} nodes a line over {lines}"
            )
    return bool(findings or circles)


def main(arguments: Sequence[str]) -> int:
    """The table, or the offenders in the rooms named as "base/text.py" or by path. Exit code 1:
    they break a rule; 2: there is no such room."""
    rooms = read_rooms()
    if not arguments:
        print_table(rooms)
        return 0
    broken = False
    for word in arguments:
        chosen = [room for room in rooms if f"/hfship/{word}".endswith(f"/hfship/{room.name}")]
        if not chosen:
            print(f"there is no room {word}", file=sys.stderr)
            return 2
        broken = print_offenders(chosen[0], rooms) or broken
    return int(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
