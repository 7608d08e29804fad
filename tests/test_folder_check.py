"""The proof of a model folder: every way in which a file is not what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.archive.folder_check import check_file, check_folder, unlisted_files
from support import archives as a

FILES = {"a": b"one", "b": b"two", "sub/c": b"three"}
HARMS: Dict[str, Any] = {
    "a has 2 bytes instead of 3": lambda m: (m / "a").write_bytes(b"on"),
    "a has SHA-256": lambda m: (m / "a").write_bytes(b"eno"),
    "sub/c is missing": lambda m: (m / "sub/c").unlink(),
    "b cannot be read: Is a directory": lambda m: ((m / "b").unlink(), (m / "b").mkdir()),
}


@pytest.mark.parametrize("said", HARMS)
def test_what_is_wrong_with_a_file_is_said(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = a.make_model(tmp_path / "m", FILES)
    assert check_folder(tmp_path / "m", manifest, 1, a.QUIET) == []
    HARMS[said](tmp_path / "m")
    if "cannot be read" in said:  # whatever bytes the file system gives a folder
        size = (tmp_path / "m/b").stat().st_size
        object.__setattr__(manifest.files[1], "size", size)
    (damage,) = check_folder(tmp_path / "m", manifest, 1, a.QUIET)
    assert damage.what.startswith(said)


def test_a_file_is_counted_as_it_is_read(tmp_path: Path) -> None:
    manifest = a.make_model(tmp_path / "m", FILES)
    counts: List[int] = []
    assert check_file(tmp_path / "m/a", manifest.files[0], counts.append) is None
    assert sum(counts) == 3


def test_files_beside_the_manifest_are_listed(tmp_path: Path) -> None:
    manifest = a.make_model(tmp_path / "m", FILES)
    (tmp_path / "m/new").write_bytes(b"")
    assert unlisted_files(tmp_path / "m", manifest) == ["new"]
    assert unlisted_files(tmp_path / "m", None) == ["a", "b", "new", "sub/c"]
