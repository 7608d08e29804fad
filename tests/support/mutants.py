# SPDX-License-Identifier: Apache-2.0
"""The small faults that a room can have, as tests/mutate.py puts them in: none in texts for people,
and none in the plain numbers of a module, which are tuned, not right."""

from __future__ import annotations

import ast
import difflib
import random
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

SOURCE = Path("src/hfship")

COMPARISONS = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
}
OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}
EMPTY = {
    "str": '""',
    "bytes": 'b""',
    "int": "0",
    "float": "0.0",
    "List": "[]",
    "Dict": "{}",
    "Tuple": "()",
}
TYPING = (
    "Callable",
    "Dict",
    "Iterable",
    "Iterator",
    "List",
    "Mapping",
    "Optional",
    "Sequence",
    "Set",
    "Tuple",
    "Union",
)
TEXT_CALLS = (
    "cast",
    "TypeVar",
    "NewType",
    "fail",
    "hide",
    "info",
    "detail",
    "warn",
    "warning",
    "result",
    "debug",
)
TEXT_KEYWORDS = ("help", "metavar", "prog", "usage", "description", "epilog")


class Mutant(NamedTuple):
    """A fault: bytes `start` to `stop` of a room replaced."""

    room: str  # "archive/verify.py"
    line: int
    start: int
    stop: int
    text: str
    what: str
    function: str  # around it; "" for what stands outside all

    def applied(self, source: str) -> str:
        """The text of the room with the fault."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.stop :]).decode()


class Faults(ast.NodeVisitor):
    """Collects the mutants of one room: none in texts for people, docstrings, hints, decorators."""

    def __init__(self, room: str, source: str) -> None:
        self.found: List[Mutant] = []
        self._room, self._source = room, source
        self._data = source.encode()
        self._starts = [0]
        for line in self._data.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._functions: List[str] = []  # names of those around
        self._returns: List[str] = []  # and what they return
        self._keys: Set[int] = set()  # constants that the program, and not a person, reads
        self.visit(ast.parse(source))

    # where things are

    def _span(self, node: Any) -> Tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, stop = self._span(node)
        return self._data[start:stop].decode()

    def _add(self, node: Any, text: str, what: str) -> None:
        self._add_bytes(node.lineno, *self._span(node), text, what)

    def _add_bytes(self, line: int, start: int, stop: int, text: str, what: str) -> None:
        around = next(iter(self._functions[-1:]), "")
        self.found.append(Mutant(self._room, line, start, stop, text, what, around))

    def _between(self, left: Any, right: Any, old: str, new: str, what: str) -> None:
        """Replace the operator between two expressions."""
        start, stop = self._span(left)[1], self._span(right)[0]
        text = self._data[start:stop].decode()
        sign = r"\s+".join(re.escape(word) for word in old.split())
        match = re.search(rf"\b{sign}\b" if old[0].isalpha() else sign, text)
        if match and "#" not in text[: match.start()]:
            before = len(text[: match.start()].encode())
            after = len(text[: match.end()].encode())
            line = self._data[: start + before].count(b"\n") + 1
            self._add_bytes(line, start + before, start + after, new, what)

    # statements

    def visit_FunctionDef(self, node: Any) -> None:
        """The body and the defaults; hints and decorators are left."""
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        self._functions.append(node.name)
        self._returns.append(ast.unparse(node.returns) if node.returns else "")
        for statement in node.body:
            self.visit(statement)
        self._returns.pop()
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """The body alone."""
        for statement in node.body:
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        """Conditions of statements."""
        if "TYPE_CHECKING" not in self._text(node.test) and "__name__" not in self._text(node.test):
            self._negate(node.test)
            self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        """A loop that does not run; one that never ends is of no use."""
        self._add(node.test, "False", "loop never entered")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """Conditions of ternaries."""
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Conditions of comprehensions."""
        for condition in node.ifs:
            self._negate(condition)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        self._add(test, f"(not ({self._text(test)}))", "condition negated")

    def visit_Return(self, node: ast.Return) -> None:
        """Other values, of the type that the function promises where that is simple."""
        if node.value is None:
            self._add(node, "pass", "return removed")
            return
        kind = self._returns[-1].partition("[")[0] if self._returns else ""
        others = ["True", "False"] if kind == "bool" else [EMPTY.get(kind, "None")]
        for other in others:
            if self._text(node.value) != other:
                self._add(node.value, other, f"returns {other}")
        self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Calls for their effect are removed, but for what is said; docstrings stay."""
        if isinstance(node.value, ast.Constant):
            return
        if not is_text(node.value):
            self._add(node, "pass", "statement removed")
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """State that is not kept. A name that was never set would be noticed at once."""
        plain = any(isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)
        if not plain and self._functions[-1:] != ["__init__"]:
            self._add(node, "pass", "statement removed")
        if self._functions or not is_number(node.value):  # what is tuned has no right value
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """The value alone."""
        if node.value and (self._functions or not is_number(node.value)):
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """`x += 1` not done, and done the other way round."""
        self._add(node, "pass", "statement removed")
        old, new = OPERATORS.get(type(node.op), ("", ""))
        if old and not is_sequence(node.value):
            self._between(node.target, node.value, f"{old}=", f"{new}=", f"{old}= becomes {new}=")
        self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """An error that is not raised, but for what cannot happen."""
        if "AssertionError" not in self._text(node):
            self._add(node, "pass", "error not raised")

    def visit_Delete(self, node: ast.Delete) -> None:
        """Something that stays."""
        self._add(node, "pass", "statement removed")

    def visit_Break(self, node: ast.Break) -> None:
        """break and continue."""
        self._add(node, "continue", "break becomes continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        """break and continue."""
        self._add(node, "break", "continue becomes break")
        self._add(node, "pass", "statement removed")

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        """One of several errors that is no longer caught."""
        if isinstance(node.type, ast.Tuple):
            for error in node.type.elts:
                rest = [self._text(one) for one in node.type.elts if one is not error]
                self._add(node.type, f"({', '.join(rest)},)", f"{self._text(error)} not caught")
        for statement in node.body:
            self.visit(statement)

    # expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        """Other comparisons."""
        values = [node.left, *node.comparators]
        for left, operator, right in zip(values, node.ops, node.comparators):
            old, others = COMPARISONS[type(operator)]
            for new in others:
                self._between(left, right, old, new, f"{old} becomes {new}")
        self._read_by_program(values)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """`and` for `or`, and one condition less."""
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):
            self._between(left, right, old, new, f"{old} becomes {new}")
        for value in node.values:
            rest = [f"({self._text(one)})" for one in node.values if one is not value]
            self._add(node, f"({f' {old} '.join(rest)})", f"a part of {old} removed")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Arithmetic; lists and texts know but one operator."""
        old, new = OPERATORS.get(type(node.op), ("", ""))
        of_paths = old == "/" and re.search("path|folder|dir|file|root", self._text(node), re.I)
        if old and not of_paths and not is_sequence(node.left) and not is_sequence(node.right):
            self._between(node.left, node.right, old, new, f"{old} becomes {new}")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """`not` and `-` removed."""
        self._add(node, f"({self._text(node.operand)})", "sign removed")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Keys and positions; not in types."""
        if not (isinstance(node.value, ast.Name) and node.value.id in TYPING):
            self._read_by_program([node.slice])
            self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        """Keys are read by programs."""
        self._read_by_program(node.keys)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Optional arguments dropped, min for max; no change in what is said."""
        if is_text(node):
            return
        if isinstance(node.func, ast.Name) and node.func.id in TWINS:
            twin = TWINS[node.func.id]
            self._add(node.func, twin, f"{node.func.id} becomes {twin}")
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in TEXT_KEYWORDS:
                self._drop(keyword)
                self.visit(keyword.value)
        if isinstance(
            node.func, ast.Attribute
        ):  # d.get("key"), s.partition("="), folder.glob("*.json")
            self._read_by_program(node.args)
        for part in [node.func, *node.args]:
            self.visit(part)

    def _drop(self, keyword: ast.keyword) -> None:
        start, stop = self._span(keyword)
        after = re.match(rb"\s*,?[ \t]*", self._data[stop:])
        length = after.end() if after else 0
        self._add_bytes(keyword.lineno, start, stop + length, "", f"argument {keyword.arg} dropped")

    def visit_Constant(self, node: ast.Constant) -> None:
        """Numbers, switches, and words that the program reads."""
        value = node.value
        if isinstance(value, bool):
            self._add(node, str(not value), f"{value} becomes {not value}")
        elif isinstance(value, (int, float)):
            self._add(node, f"{value + 1}", f"{value} becomes {value + 1}")
        elif isinstance(value, str) and id(node) in self._keys and not re.search(r"\s\S", value):
            self._add(node, repr("x" + value), "another word")
        elif isinstance(value, bytes) and id(node) in self._keys:
            self._add(node, repr(b"x" + value), "other bytes")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts; and before Python 3.12 their parts do not say where they are."""

    def _read_by_program(self, values: Sequence[Optional[ast.expr]]) -> None:
        for value in values:
            elements = value.elts if isinstance(value, (ast.Tuple, ast.List, ast.Set)) else [value]
            self._keys.update(id(element) for element in elements)


def is_text(node: ast.AST) -> bool:
    """Whether a call is for people or the type checker: reporter.info(...), UsageError(...)."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in TEXT_CALLS or name.endswith("Error")


def is_number(node: ast.AST) -> bool:
    """Whether an expression is a plain number: 64 << 20, int(0.7 * GIB).

    >>> [is_number(ast.parse(text, mode="eval").body) for text in ("-2 * MIB", "(1, 2)", "True")]
    [True, False, False]
    """
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    numeric = (ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Name, ast.Load)
    if isinstance(node, ast.Call):
        return bool(node.args) and all(is_number(part) for part in node.args)
    return isinstance(node, numeric) and all(map(is_number, ast.iter_child_nodes(node)))


def is_sequence(node: ast.AST) -> bool:
    """Whether an expression is plainly a text or a list."""
    texts = (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple)
    return isinstance(node, texts) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


def draw(sources: Dict[str, str], count: int, seed: int) -> List[Mutant]:
    """`count` faults of different lines, each line as likely as any other that can have one."""
    chance = random.Random(seed)
    lines: Dict[Tuple[str, int], List[Mutant]] = {}
    for room, source in sorted(sources.items()):
        for mutant in Faults(room, source).found:
            lines.setdefault((room, mutant.line), []).append(mutant)
    order = sorted(lines)
    chance.shuffle(order)
    drawn: List[Mutant] = []
    for place in order:
        chance.shuffle(lines[place])
        usable = (one for one in lines[place] if is_valid(one, sources[one.room]))
        drawn += [one for one in [next(usable, None)] if one]
        if len(drawn) == count:
            break
    return drawn


def is_valid(mutant: Mutant, source: str) -> bool:
    """Whether a fault compiles and is one."""
    try:
        tree = ast.parse(mutant.applied(source))
        compile(tree, mutant.room, "exec")  # `continue` outside a loop parses
    except SyntaxError:
        return False
    return ast.dump(tree) != ast.dump(ast.parse(source))


def diff_of(mutant: Mutant, source: str) -> str:
    """A fault as a patch."""
    name = f"{SOURCE}/{mutant.room}"
    before, after = (
        source.splitlines(keepends=True),
        mutant.applied(source).splitlines(keepends=True),
    )
    return "".join(difflib.unified_diff(before, after, name, f"{name} ({mutant.what})"))
