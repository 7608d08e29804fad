# SPDX-License-Identifier: Apache-2.0
"""`unpack`: which archives its words mean, what an earlier run consumed, and the order of what is done;
test_unpack.py unpacks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence, Tuple

import pytest

from hfship.archive.unpack import Unpacked
from hfship.base.errors import IntegrityError
from hfship.base.report import Reporter
from hfship.commands import unpack
from hfship.commands.restore import Restored
from hfship.commands.run import guarded, run_line
from hfship.commands.unpack import without_consumed
from hfship.commands.unpacking import UnpackResult
from support import archives as a


class Played:
    """The archives that are here, those that an earlier run consumed, and what was done."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.here: List[str] = []
        self.consumed: List[str] = []
        self.did: List[Any] = []
        for name in ("TRANSFER", "PACKAGE", "SITE_MODELS", "MODELS", "LOG", "DEPLOY"):
            monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(root / name.lower()))
        monkeypatch.setenv("HOME", str(root))
        monkeypatch.chdir(root)
        self.places = [root / "transfer", root / "package"]
        monkeypatch.setattr("hfship.archive.bundle.archives_meant", self.meant)
        monkeypatch.setattr(unpack, "archive_word", self.word)
        monkeypatch.setattr("hfship.archive.files.find_archives", self.find)
        monkeypatch.setattr("hfship.archive.consumed.find_consumed", self.find_consumed)
        monkeypatch.setattr("hfship.commands.restore.finish_consumed", self.finish)
        monkeypatch.setattr("hfship.commands.restore.models_named", self.models)
        monkeypatch.setattr("hfship.commands.restore.open_model", self.open)
        monkeypatch.setattr(unpack, "unpack_opened", self.unpack)
        monkeypatch.setattr(
            "hfship.commands.update.take_all", lambda _: self.did.append("all") or 0
        )
        monkeypatch.setattr(
            "hfship.commands.hosts_carry.unpack_on_hosts", lambda _: self.did.append("hosts") or 0
        )

    def restored(self, name: str, written: int = 0) -> Restored:
        folder = self.root / "done" / name
        manifest = a.make_model(folder, {"w": b"12345"})
        return Restored(Unpacked(folder, manifest, written, 1.0))

    def meant(self, words: Sequence[str]) -> List[str]:
        return [one for word in words for one in word.split("+")]

    def word(self, word: str, places: Any) -> str:
        assert places == self.places
        return word.lower()

    def find(self, word: str, places: Any) -> List[str]:
        assert places == self.places
        return [word] if word in self.here else []

    def find_consumed(self, word: str, places: Any, out: Path) -> List[str]:
        assert places == self.places and out.name == "site_models"
        return [word] if word in self.consumed else []

    def finish(self, one: str, how: Any, reporter: Any) -> Restored:
        self.did.append(f"finish {one}")
        return self.restored(one)

    def models(self, names: Sequence[str], places: Any) -> List[Any]:
        assert places == self.places
        self.did.append(list(names))
        return [SimpleNamespace(name=name) for name in names]

    def open(self, model: Any, how: Any, reporter: Any) -> str:
        if model.name == "torn":
            raise IntegrityError("torn cannot be read")
        return f"opened {model.name}"

    def unpack(self, model: Any, opened: str, how: Any, context: Any) -> UnpackResult:
        self.did.append(opened)
        return UnpackResult(self.restored(model.name, 1).done)

    def run(self, *words: str) -> Tuple[int, List[Dict[str, Any]], str]:
        out, err = io.StringIO(), io.StringIO()
        reporter = Reporter("plain", 0, out, err, as_json=True)
        code, _ = guarded(reporter, lambda: run_line(["unpack", "--json", *words], reporter))
        text = out.getvalue()
        return code, json.loads(text) if text.startswith("[") else [], text + err.getvalue()


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(tmp_path, monkeypatch)


def test_archives_are_unpacked_one_after_another(played: Played) -> None:
    code, rows, _ = played.run("A", "b+C")
    assert code == 0 and [row["state"] for row in rows] == ["unpacked"] * 3
    assert played.did == [["a", "b", "c"], "opened a", "opened b", "opened c"]
    assert [row["name"] for row in rows] == ["a", "b", "c"]


def test_after_one_that_cannot_be_read_the_others_are_unpacked(played: Played) -> None:
    code, rows, said = played.run("torn", "b")
    assert code != 0 and "torn cannot be read" in said
    assert played.did[1:] == ["opened b"] and len(rows) == 2


def test_what_an_earlier_run_consumed_is_a_result_too(played: Played) -> None:
    played.here, played.consumed = ["new", "both"], ["old", "both"]
    code, rows, _ = played.run("new", "old", "both", "--consume")
    assert code == 0
    assert played.did == ["finish old", "finish both", ["new", "both"], "opened new", "opened both"]
    assert [row["path"].rpartition("/")[2] for row in rows] == ["new", "both", "old", "both"]
    assert [row["state"] for row in rows] == ["unpacked"] * 2 + ["already there"] * 2


def test_without_consume_nobody_looks_for_what_was_consumed(played: Played) -> None:
    played.consumed = ["old"]
    assert played.run("old")[0] == 0
    assert played.did == [["old"], "opened old"]


def test_what_is_nowhere_is_left_to_who_says_so(played: Played) -> None:
    how: Any = SimpleNamespace(out=played.root / "site_models")
    quiet: Any = None
    assert without_consumed(["gone"], played.places, how, quiet) == (["gone"], [])


@pytest.mark.parametrize(
    "words, did", [(["--all"], "all"), (["--hosts", "m"], "hosts"), (["--hosts", "--all"], "hosts")]
)
def test_all_and_hosts_are_done_elsewhere(words: List[str], did: str, played: Played) -> None:
    assert played.run(*words)[0] == 0 and played.did == [did]


def test_a_name_is_for_one_archive(played: Played) -> None:
    code, _, said = played.run("a", "b", "--name", "x")
    assert code == 2 and "--name is for one archive" in said and played.did == [["a", "b"]]
    assert played.run("a", "--name", "x")[0] == 0
