# SPDX-License-Identifier: Apache-2.0
"""What results say, as text and as JSON: tests/golden/results holds it, field by field.

Each result is made twice, once with all that its fields can hold and once with as little as they
can, so that every key and every part of a sentence is seen. HFSHIP_GOLDEN=write makes them anew.
"""

from __future__ import annotations

import inspect
import json
import os
from typing import Any, List

import pytest

from conftest import ROOT
from hfship.base.errors import HfshipError
from support.samples import Samples, UnknownTypeError, classes_with

GOLDEN = ROOT / "tests" / "golden" / "results"
RESULTS = {
    f"{kind.__module__.partition('.')[2]}.{kind.__name__}": kind
    for methods in ("json", "text")
    for kind in classes_with(methods)
}
# What makes no sense with fields that do not fit each other.
NONSENSE = (IndexError, KeyError, ValueError, FileNotFoundError, UnknownTypeError, HfshipError)


def said(value: Any, method: str) -> List[str]:
    """What a value says by one of its methods."""
    if not callable(vars(type(value)).get(method)):
        return []
    bound = getattr(value, method)
    settings = {"width": 100} if "width" in inspect.signature(bound).parameters else {}
    try:
        answer = bound(**settings)
    except NONSENSE:
        return []
    text = answer if method == "text" else json.dumps(answer, indent=1, ensure_ascii=False)
    return [f"-- {method}", text]


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_result_says_what_it_said(name: str) -> None:
    lines: List[str] = []
    for full in (True, False):
        try:
            value = Samples(full).value(RESULTS[name])
        except NONSENSE:
            continue
        words = [*said(value, "text"), *said(value, "json")]
        if words:
            lines += [f"---- {'full' if full else 'empty'}", *words]
    path = GOLDEN / f"{name}.txt"
    page = "\n".join(lines) + "\n"
    if os.environ.get("HFSHIP_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")
    assert page == path.read_text(encoding="utf-8")
