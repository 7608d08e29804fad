# SPDX-License-Identifier: Apache-2.0
"""No thread of ours holds up the end of the program: Ctrl-C ends it while a network does not answer."""

from __future__ import annotations

import ast
from typing import Iterator, Tuple

from conftest import ROOT

SOURCE = ROOT / "src" / "hfship"


def threads() -> Iterator[Tuple[str, ast.Call]]:
    """Each thread that is made, with its place."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Thread"):
                yield f"{path.relative_to(SOURCE).as_posix()}:{node.lineno}", node


def test_every_thread_is_a_daemon() -> None:
    made = dict(threads())
    assert made
    wrong = []
    for place, call in made.items():
        settings = {one.arg: ast.unparse(one.value) for one in call.keywords}
        if settings.get("daemon") != "True":
            wrong.append(place)
    assert wrong == []
