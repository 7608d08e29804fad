# SPDX-License-Identifier: Apache-2.0
"""What another side says of what it has, with answers that are written here; test_sync.py has hosts."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest

from hfship.base.errors import NetworkError
from hfship.base.manifest import FileEntry, make_manifest
from hfship.base.processes import Completed
from hfship.ops import far_side as room
from hfship.ops.destination import Destination
from hfship.ops.sync_plan import FarStock

FAR = Destination("me@gpu1", "/da ta", ("ssh",))


class Side:
    """What is asked of it, and the answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scripts: List[str] = []
        self.answer: Any = Completed(0, "", "")
        self.warned: List[str] = []
        self.reporter: Any = SimpleNamespace(warn=self.warned.append)
        monkeypatch.setattr(Destination, "run", self._run)

    def _run(self, script: str, stop: threading.Event) -> Completed:
        assert not stop.is_set()
        self.scripts.append(script)
        if isinstance(self.answer, Exception):
            raise self.answer
        assert isinstance(self.answer, Completed)
        return self.answer


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Side:
    return Side(monkeypatch)


def test_what_it_has_is_what_its_list_says(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = FarStock()
    read: List[str] = []
    monkeypatch.setattr(room, "parse_stock", lambda text: read.append(text) or stock)
    side.answer = Completed(0, "rows", "")
    assert room.far_stock(FAR, "it's.toml", side.reporter) is stock
    assert read == ["rows"] and side.warned == []


@pytest.mark.parametrize("there", [True, False])
def test_its_own_file_asks_there_with_the_models_file_that_lies_beside(
    there: bool, side: Side, tmp_path: Path
) -> None:
    folder = tmp_path / "da ta"
    folder.mkdir()
    (folder / "hfship.pyz").write_text("import sys; print(sys.argv[1:])")
    if there:
        (folder / "it's.toml").write_text("")
    room.far_stock(Destination("h", str(folder), ("ssh",)), "it's.toml", side.reporter)
    done = subprocess.run(["sh"], input=side.scripts[0], capture_output=True, text=True, check=True)
    words = ["list", "models", "images", "--json"]
    if there:
        words += ["--models", "it's.toml"]
    assert done.stdout == f"{words}\n"
    assert done.stderr == ""
    room.far_stock(Destination("h", str(tmp_path / "none"), ("ssh",)), "x", side.reporter)
    gone = subprocess.run(
        ["sh"], input=side.scripts[1], capture_output=True, text=True, check=False
    )
    assert gone.returncode == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Completed(1, "{}", ""), "exit status 1"),
        (Completed(0, "torn", ""), ""),
        (Completed(0, "", ""), ""),
    ],
)
def test_a_side_that_cannot_say_gets_everything(answer: Completed, why: str, side: Side) -> None:
    side.answer = answer
    assert room.far_stock(FAR, "models.toml", side.reporter) == FarStock()
    (said,) = side.warned
    assert said.startswith("me@gpu1 cannot say what it has, so all of it travels (python3 /da ta/")
    assert why in said


def test_a_side_that_does_not_answer_is_an_error(side: Side) -> None:
    side.answer = NetworkError("gone", "", "")
    with pytest.raises(NetworkError):
        room.far_stock(FAR, "models.toml", side.reporter)
    with pytest.raises(NetworkError):
        room.far_manifest(FAR, "/models/m")


def test_the_manifest_of_a_model_there(side: Side) -> None:
    manifest = make_manifest("m", [FileEntry("w", 1, "1" * 64)])
    side.answer = Completed(0, manifest.to_json(), "")
    assert room.far_manifest(FAR, "/models/it's") == manifest
    assert side.scripts == ["cat -- '/models/it'\"'\"'s/.hfship/manifest.json' 2>&-"]
    for answer in (Completed(1, manifest.to_json(), ""), Completed(0, "torn", "")):
        side.answer = answer
        assert room.far_manifest(FAR, "/models/m") is None
