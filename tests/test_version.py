# SPDX-License-Identifier: Apache-2.0
"""`version`: which parts are told, and what --verify adds; test_pyz.py proves the built file."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict

import pytest

import hfship
from hfship.base.errors import Exit, HostError, IntegrityError
from hfship.commands.context import Context
from hfship.commands.version import cmd_version

BUILT = Path("/media/hfship.pyz")


class Asked:
    """`version` of a file that runs, with a zstd of some kind; what it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.problem = ""
        self.zstd: Any = SimpleNamespace(name="compression.zstd", origin="of this Python")
        self._patch = monkeypatch
        monkeypatch.setattr("hfship.commands.version.verify_own_file", self._verify)
        monkeypatch.setattr("hfship.archive.zstd.load_zstd", self._load)

    def _verify(self, path: Path) -> str:
        if self.problem:
            raise IntegrityError(f"{path} is not as it was built", self.problem, "copy it again")
        return "0123abcd"

    def _load(self) -> Any:
        if isinstance(self.zstd, HostError):
            raise self.zstd
        return self.zstd

    def __call__(self, path: Path, verify: bool) -> Dict[str, Any]:
        said: Dict[str, Any] = {}

        def result_of(text: str, value: Any) -> None:
            assert [line.split()[0] for line in text.splitlines()] == list(value)
            said.update(value)

        self._patch.setattr("hfship.commands.version.own_file", lambda: path)
        settings: Any = None
        reporter: Any = SimpleNamespace(result_of=result_of)
        context = Context(argparse.Namespace(verify=verify), settings, reporter)
        assert cmd_version(context) == Exit.OK
        return said


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def test_the_parts_are_told_and_nothing_is_proven_unasked(asked: Asked) -> None:
    asked.problem = "nobody looks"
    told = asked(BUILT, False)
    assert list(told) == ["hfship", "python", "zstd"]
    assert told["hfship"] == {"version": hfship.__version__, "origin": str(BUILT)}
    assert told["zstd"] == {"version": "compression.zstd", "origin": "of this Python"}


def test_without_zstd_the_reason_is_told_in_its_place(asked: Asked) -> None:
    asked.zstd = HostError("no zstd", "no memfd\nand no folder", "")
    assert asked(BUILT, False)["zstd"] == {
        "version": "none",
        "origin": "no zstd: no memfd\nand no folder",
    }


@pytest.mark.parametrize(
    ("path", "version", "origin"),
    [
        (BUILT, "as it was built", "sha256 0123abcd"),
        (Path("/src/hfship.py"), "nothing to verify", "hfship.py runs from source"),
    ],
)
def test_verify_tells_what_was_proven(path: Path, version: str, origin: str, asked: Asked) -> None:
    assert asked(path, True)["verify"] == {"version": version, "origin": origin}


def test_a_file_that_was_changed_is_no_version(asked: Asked) -> None:
    asked.problem = "base/text.py: changed"
    with pytest.raises(IntegrityError, match="not as it was built"):
        asked(BUILT, True)
