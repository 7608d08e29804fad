# SPDX-License-Identifier: Apache-2.0
"""`verify` of several things: each is checked, what fails is told, and the rest goes on."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List

import pytest

from hfship.archive.verify import DamageError
from hfship.base.errors import HostError, IntegrityError
from hfship.commands import verify
from hfship.commands.verify import Check, Proven, checked, verify_targets


class Reporter:
    """Notes what was said, and of what."""

    def __init__(self) -> None:
        self.said: List[str] = []

    def error(self, error: Any) -> None:
        self.said.append(error.what)

    @contextlib.contextmanager
    def about(self, name: str, number: int, count: int) -> Iterator[None]:
        self.said.append(f"{number}/{count} {name}")
        yield


def failing(error: Exception) -> Proven:
    raise error


WHOLE = Check(Path("/p/a"), lambda: Proven("3 files"))
BROKEN = Check(Path("/p/b"), partial(failing, IntegrityError("b is damaged", "", "")))
AWAY = Check(Path("/p/c"), partial(failing, HostError("c is away", "", "")))


def context() -> Any:
    return SimpleNamespace(reporter=Reporter())


@pytest.mark.parametrize(
    ("checks", "said", "proven"),
    [
        ([WHOLE], [], ["3 files"]),
        ([BROKEN], ["b is damaged"], [""]),
        ([WHOLE, BROKEN], ["1/2 a", "2/2 b", "b is damaged"], ["3 files", ""]),
        ([AWAY, WHOLE], ["1/2 c", "c is away", "2/2 a"], ["", "3 files"]),
    ],
)
def test_of_several_what_fails_does_not_end_it(
    checks: List[Check], said: List[str], proven: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "checks_of", lambda *_: checks)
    run = context()
    results = list(verify_targets(["x"], run))
    assert run.reporter.said == said
    assert [result.proven for result in results] == proven
    assert [result.error is None for result in results] == [bool(text) for text in proven]
    assert [result.path for result in results] == [check.path for check in checks]


def test_of_one_another_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "checks_of", lambda *_: [AWAY])
    with pytest.raises(HostError):
        list(verify_targets(["x"], context()))


def test_approvals_are_told_with_what_is_proven() -> None:
    approvals: Any = SimpleNamespace(text=lambda: "; approved by two")
    check = Check(Path("/p"), lambda: Proven("3 files", approvals))
    result = checked(check, context(), IntegrityError)
    assert (result.proven, result.approvals) == ("3 files; approved by two", approvals)
    assert 0 <= result.seconds < 60


def test_damages_travel_with_the_error() -> None:
    error = DamageError("damaged", "", "")
    damages: Any = ("one", "two")
    error.damages = damages
    result = checked(Check(Path("/p"), partial(failing, error)), context(), IntegrityError)
    assert result.damages == damages and result.error is error
