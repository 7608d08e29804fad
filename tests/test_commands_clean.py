# SPDX-License-Identifier: Apache-2.0
"""`clean`: what is shown, asked and removed, with leftovers that are made up; test_clean.py makes real
ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List, Sequence, Tuple

import pytest

from hfship.base.errors import DiskError, UsageError
from hfship.base.report import Reporter
from hfship.commands import clean
from hfship.commands.run import guarded, run_line


def leftover(name: str, what: str, size: int) -> Any:
    return SimpleNamespace(path=Path(f"/x/{name}"), what=what, size=size)


A, B, C = leftover("a", "parts", 10), leftover("b", "parts", 20), leftover("c", "journal", 5)
KEPT = leftover("k", "parts", 100)
D = leftover("d", "journal", 7)
ROOT, OTHER = Path("/x"), Path("/y")


def group(root: Path, name: str, *items: Any, kept: str = "") -> Any:
    return SimpleNamespace(group=root / name, root=root, items=list(items), kept=kept)


class Disk:
    """What lies there, and what became of it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = [group(ROOT, "m", A, C, B), group(OTHER, "n", KEPT, kept="in use by 7")]
        self.looks: List[Any] = [first]
        self.options: List[Any] = []
        self.removed: List[Any] = []
        self.emptied: List[Any] = []
        self.asked: List[str] = []
        self.stays: Sequence[Any] = ()
        self.fails: Any = None
        self.refuses = False
        for name in ("MODELS", "PACKAGE", "LOG", "DEPLOY"):
            monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(root / name.lower()))
        monkeypatch.setenv("HOME", str(root))
        at = "hfship.ops.clean"
        monkeypatch.setattr(f"{at}.find_groups", self.find)
        monkeypatch.setattr(f"{at}.disk_usage", lambda items: sum(one.size for one in items))
        monkeypatch.setattr(f"{at}.freed_by", lambda items: sum(one.size for one in items))
        monkeypatch.setattr(f"{at}.remove_leftover", self.remove)
        monkeypatch.setattr(f"{at}.remove_empty_folders", lambda gone: self.emptied.extend(gone))
        monkeypatch.setattr(clean, "confirm", self.confirm)

    def find(self, options: Any, *warn: Any) -> Iterator[Any]:
        assert len(warn) == (not self.options), "what is wrong is told once"
        self.options.append(options)
        yield from self.looks[min(len(self.options), len(self.looks)) - 1]

    def remove(self, root: Path, item: Any) -> bool:
        if item is self.fails:
            raise DiskError("the disk is read-only")
        self.removed.append((root, item))
        return item not in self.stays

    def confirm(self, text: str, _: Reporter) -> None:
        self.asked.append(text)
        if self.refuses:
            raise UsageError("nobody said yes")

    def run(self, *words: str) -> Tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        reporter = Reporter("plain", 0, out, err, as_json="--json" in words)
        code, _ = guarded(reporter, lambda: run_line(["clean", *words], reporter))
        return code, out.getvalue(), err.getvalue()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


ALL = [(ROOT, A), (ROOT, C), (ROOT, B)]


@pytest.mark.parametrize("yes", [False, True])
def test_what_was_shown_is_removed_once_somebody_says_yes(yes: bool, disk: Disk) -> None:
    code, out, err = disk.run(*(["--yes"] if yes else []))
    assert code == 0 and disk.removed == ALL and len(disk.options) == 2
    assert disk.asked == ([] if yes else ["remove them and free 35 B?"])
    assert "removed 3 files, freed 35 B" in out and "kept: /y/n: in use by 7" in err
    assert disk.emptied == [(item, root) for root, item in ALL]


def test_what_nobody_agreed_to_stays(disk: Disk) -> None:
    disk.refuses = True
    assert disk.run()[0] == 2 and disk.removed == disk.emptied == []


@pytest.mark.parametrize("words", [["--dry-run"], ["--dry-run", "--yes"]])
def test_a_dry_run_removes_nothing_and_asks_nobody(words: List[str], disk: Disk) -> None:
    code, out, _ = disk.run(*words)
    assert code == 0 and disk.removed == disk.asked == [] and "removed" not in out
    assert len(disk.options) == 1


def test_where_there_is_nothing_nobody_is_asked(disk: Disk) -> None:
    disk.looks = [[group(OTHER, "n", KEPT, kept="in use by 7")]]
    code, _, err = disk.run()
    assert code == 0 and disk.asked == disk.removed == [] and "in use by 7" in err


def test_only_what_was_shown_and_is_free_still_goes(disk: Disk) -> None:
    """Somebody began to work there, and something is new, since it was shown."""
    disk.looks.append([group(ROOT, "m", A, D), group(ROOT, "o", B, kept="in use by 8")])
    assert disk.run("--yes")[0] == 0
    assert disk.removed == [(ROOT, A)] and disk.emptied == [(A, ROOT)]


def test_what_went_by_itself_is_not_counted(disk: Disk) -> None:
    disk.stays = [B]
    _, out, _ = disk.run("--yes")
    assert "removed 2 files, freed 15 B" in out and len(disk.emptied) == 3


def test_the_result_says_how_far_it_came(disk: Disk) -> None:
    code, out, _ = disk.run("--yes", "--json")
    value = json.loads(out)
    rows = value.pop("leftovers")
    expected = {"schema": "hfship-clean/1", "bytes": 35, "removed": 3, "freed": 35}
    assert code == 0 and value == expected
    assert [(row["what"], row["paths"], row["bytes"]) for row in rows] == [
        ("journal", ["/x/c"], 5),
        ("parts", ["/x/a", "/x/b"], 30),
        ("parts", ["/x/k"], 100),
    ]
    disk.fails, disk.removed, disk.options = B, [], []
    code, out, _ = disk.run("--yes", "--json")
    value = json.loads(out)
    assert code == 7 and (value["removed"], value["freed"]) == (2, 15)
    assert value["error"]["what"] == "the disk is read-only"


def test_a_folder_is_cleaned_with_its_age(disk: Disk, tmp_path: Path) -> None:
    for name in ("models", "d"):
        (tmp_path / name).mkdir()
    disk.run("--dry-run")
    [first], disk.options = disk.options, []
    disk.run("--dry-run", str(tmp_path / "d"), "--older-than", "2h", "--cache")
    [second] = disk.options
    assert first.folders == [tmp_path / "models"] and not first.cache
    assert first.own == [tmp_path / "models", tmp_path / "package"]
    assert second.folders == [tmp_path / "d"] and second.cache and not second.old_revisions
    assert len(second.own) == 4 and (first.older_than_s, second.older_than_s) == (0, 7200)
