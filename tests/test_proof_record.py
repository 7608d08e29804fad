"""What a mirror remembers of what it has read, from one start to the next."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import List

import pytest

from conftest import Program, missing
from hfship.base.below import identity_of
from hfship.ops.catalogue import RepoCatalogue
from hfship.ops.mirror_repo import read_proof
from hfship.ops.proof_record import ProofRecord, record_path
from test_mirror import TINY, Mirror, publish
from test_mirror_repo import SHARD, flip_byte, same_times


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """The files that are read."""
    paths: List[str] = []
    monkeypatch.setattr(
        "hfship.ops.mirror_repo.read_proof",
        lambda folder, path, *count: (paths.append(path), read_proof(folder, path, *count))[1],
    )
    return paths


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_mirror_that_starts_again_reads_no_large_file(
    with_manifest: bool, read: List[str], model: Path, tmp_path: Path
) -> None:
    publish(tmp_path / "site", "tiny", model, TINY if with_manifest else None)
    record = tmp_path / "cache/record"
    (first,) = RepoCatalogue(tmp_path / "site", record=record).repos()
    assert SHARD in read and record.stat().st_mode & 0o777 == 0o600
    read.clear()
    (again,) = RepoCatalogue(tmp_path / "site", record=record).repos()
    assert SHARD not in read and again.files == first.files and again.commit == first.commit


def test_what_was_touched_copied_or_changed_is_read_again(
    read: List[str], model: Path, tmp_path: Path
) -> None:
    folder = publish(tmp_path / "site", "tiny", model, TINY)
    record = tmp_path / "record"
    assert RepoCatalogue(tmp_path / "site", record=record).repos()
    read.clear()
    shutil.copy2(folder / SHARD, tmp_path / "copy")
    os.replace(tmp_path / "copy", folder / SHARD)
    assert RepoCatalogue(tmp_path / "site", record=record).repos() and SHARD in read
    read.clear()
    same_times(folder / SHARD, flip_byte)
    assert not RepoCatalogue(tmp_path / "site", record=record).repos() and SHARD in read
    read.clear()  # nor is it offered from what is remembered of the wrong one
    assert not RepoCatalogue(tmp_path / "site", record=record).repos()


@pytest.mark.parametrize("plant", ["another user's", "open to all", "a link", "a pipe", "garbage"])
def test_a_record_that_is_not_ours_is_not_believed_or_written(
    plant: str, read: List[str], model: Path, tmp_path: Path
) -> None:
    folder = publish(tmp_path / "site", "tiny", model, TINY)
    record = tmp_path / "record"
    ProofRecord(record).add(folder / SHARD, identity_of((folder / SHARD).stat()), "f" * 64)
    elsewhere = tmp_path / "elsewhere"
    if plant == "another user's":
        if os.geteuid():
            missing("root, to make a file of another user")
        os.chown(record, 12345, 12345)
    elif plant == "open to all":
        record.chmod(0o666)
    elif plant == "garbage":
        record.write_bytes(b'{"path": 3}\n\xff\n{"path": "' + b"[" * 100_000 + b"\n")
    else:
        record.unlink()
        if plant == "a link":
            elsewhere.write_text("theirs")
            record.symlink_to(elsewhere)
        else:
            os.mkfifo(record)
    before = record.read_bytes() if plant in ("another user's", "open to all") else b""
    assert RepoCatalogue(tmp_path / "site", record=record).repos() and SHARD in read
    if before:
        assert record.read_bytes() == before
    if plant == "a link":
        assert elsewhere.read_text() == "theirs"


def test_where_the_record_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One for each folder, whatever it is called by; none for a user without a home."""
    (tmp_path / "site").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "site")
    monkeypatch.setenv("HFSHIP_CACHE", str(tmp_path / "cache"))
    path = record_path(tmp_path / "site")
    assert path and path.parent == tmp_path / "cache" and path == record_path(tmp_path / "link")
    assert path != record_path(tmp_path)
    monkeypatch.delenv("HFSHIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = record_path(tmp_path)
    assert found and found.parent == tmp_path / "xdg/hfship"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert record_path(tmp_path) is None
    assert ProofRecord(None).sha256_of(tmp_path, identity_of(tmp_path.stat())) == ""


def test_a_mirror_remembers_and_leaves_its_folder_as_it_was(
    pyz: Program, model: Path, tmp_path: Path
) -> None:
    publish(tmp_path / "site", "tiny", model, TINY)
    before = sorted((tmp_path / "site").rglob("*"))
    pyz.home.mkdir(exist_ok=True)
    cache = str(tmp_path / "cache")
    for _ in range(2):
        with Mirror(pyz, tmp_path / "site", HFSHIP_CACHE=cache) as mirror:
            assert "org/tiny" in mirror.said
    (record,) = (tmp_path / "cache").glob("mirror.*.jsonl")
    assert record.read_text().count(SHARD) == 1
    assert sorted((tmp_path / "site").rglob("*")) == before
