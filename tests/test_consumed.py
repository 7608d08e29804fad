# SPDX-License-Identifier: Apache-2.0
"""What a folder tells of archives that were removed for it, and which an argument means."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict

import pytest

from hfship.archive.consumed import (
    CONSUMED_PATH,
    MOST_CONSUMED,
    Consumed,
    ConsumedArchive,
    consumed_in,
    find_consumed,
    note_consumed,
)
from hfship.archive.files import ArchiveFiles, find_archives

SUMS = b"0  m.tar.zst\n"
SUM = hashlib.sha256(SUMS).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """models/m, with room for a note."""
    folder = tmp_path / "models/m"
    (folder / ".hfship").mkdir(parents=True)
    return folder


def archive(folder: Path, name: str = "m.tar.zst") -> ArchiveFiles:
    return ArchiveFiles(folder, name, {})


def put(folder: Path, *rows: Any, form: str = "hfship-consumed/1") -> None:
    (folder / CONSUMED_PATH).write_text(json.dumps({"format": form, "archives": rows}))


def test_a_note_tells_which_archive_it_was(model: Path, tmp_path: Path) -> None:
    note_consumed(model, model, archive(tmp_path))
    path = str(tmp_path / "m.tar.zst")
    assert consumed_in(model) == [ConsumedArchive(path, "")]
    (tmp_path / "m.tar.zst.sha256").write_bytes(SUMS)
    note_consumed(model, model, archive(tmp_path))
    note_consumed(model, model, archive(tmp_path, "n.tar.zst"))
    other = str(tmp_path / "n.tar.zst")
    assert consumed_in(model) == [ConsumedArchive(path, SUM), ConsumedArchive(other, "")]
    assert json.loads((model / CONSUMED_PATH).read_text()) == {
        "format": "hfship-consumed/1",
        "archives": [{"path": path, "sums": SUM}, {"path": other, "sums": ""}],
    }
    assert (model / CONSUMED_PATH).read_text().endswith("\n")


def test_what_the_folder_before_knew_stays_known_but_not_for_ever(
    model: Path, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    (before / ".hfship").mkdir(parents=True)
    put(before, *({"path": f"/{number}", "sums": ""} for number in range(MOST_CONSUMED)))
    note_consumed(model, before, archive(tmp_path))
    found = consumed_in(model)
    assert len(found) == MOST_CONSUMED and found[0].path == "/1"
    assert found[-1].path == str(tmp_path / "m.tar.zst")


@pytest.mark.parametrize(
    "text",
    [
        "torn",
        "[]",
        "{}",
        '{"format": "hfship-consumed/2", "archives": [{"path": "/a", "sums": ""}]}',
        '{"format": "hfship-consumed/1"}',
        '{"format": "hfship-consumed/1", "archives": 7}',
        '{"format": "hfship-consumed/1", "archives": [7]}',
        '{"format": "hfship-consumed/1", "archives": [{"path": "/a"}]}',
    ],
)
def test_what_is_no_note_tells_nothing(text: str, model: Path) -> None:
    (model / CONSUMED_PATH).write_text(text)
    assert consumed_in(model) == []
    assert consumed_in(model / "gone") == []


# argument -> whether it means the archive DIR/m.tar.zst, of which nothing is left
MEANT: Dict[str, bool] = {
    "DIR/m.tar.zst": True,
    "DIR/m.tar.zst.0001": True,
    "DIR/m": True,
    "DIR": True,
    "m": True,
    "m.tar.zst": True,
    "n": False,
    "DIR/n.tar.zst": False,
    "OTHER/m.tar.zst": False,
    "OTHER": False,
}


@pytest.mark.parametrize("argument", MEANT)
def test_what_an_argument_means(
    argument: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "transfer", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    put(model, {"path": f"{folder}/m.tar.zst", "sums": SUM})
    word = argument.replace("DIR", str(folder)).replace("OTHER", str(other))
    found = find_consumed(word, [folder], model.parent)
    wanted = Consumed(model, archive(folder), is_same=False)
    assert found == ([wanted] if MEANT[argument] else [])
    assert find_consumed("m", [], model.parent) == []


@pytest.mark.parametrize(
    ("noted", "left", "found", "is_same"),
    [
        (SUM, SUMS, True, True),
        (SUM, b"other", True, False),
        ("", None, True, False),
        ("", SUMS, True, False),
    ],
)
def test_sums_that_are_left_tell_whether_it_is_the_same(
    noted: str, left: Any, found: bool, is_same: bool, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "transfer"
    folder.mkdir()
    put(model, {"path": f"{folder}/m.tar.zst", "sums": noted})
    if left is not None:
        (folder / "m.tar.zst.sha256").write_bytes(left)
    consumed = find_consumed(f"{folder}/m.tar.zst", [], model.parent)
    assert [(one.folder, one.is_same) for one in consumed] == ([(model, is_same)] if found else [])


def test_an_archive_that_is_whole_was_not_removed(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "transfer"
    folder.mkdir()
    put(model, {"path": f"{folder}/m.tar.zst", "sums": SUM})
    (folder / "m.tar.zst").write_bytes(b"x")
    (folder / "m.tar.zst.sha256").write_bytes(SUMS)
    (files,) = find_archives(f"{folder}/m.tar.zst", [])
    wanted = [] if files.is_complete else [Consumed(model, files, is_same=True)]
    assert find_consumed(f"{folder}/m.tar.zst", [], model.parent) == wanted


def test_where_there_are_no_models_nothing_was_removed(tmp_path: Path) -> None:
    assert find_consumed("m", [tmp_path], tmp_path / "gone") == []
