# SPDX-License-Identifier: Apache-2.0
"""Hashes of files and the record of proven ones: what is believed, and what huggingface_hub finds."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, Dict, Optional

import pytest

from hfship.base.below import identity_of
from hfship.base.files import CHUNK
from hfship.hub import verified as room
from hfship.hub.protocol import RemoteFile
from hfship.hub.verified import FileHasher, VerifiedLog, hash_below, hash_file, read_line

CONTENT = b"0123456789"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob 10\0" + CONTENT).hexdigest()
LARGE, SMALL = RemoteFile("w", 10, "", SHA256), RemoteFile("w", 10, BLOB)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK_SIZE", 4)


def hashed(remote: RemoteFile, *pieces: bytes) -> FileHasher:
    hasher = FileHasher(remote)
    for piece in pieces:
        hasher.update(piece)
    return hasher


@pytest.mark.parametrize("remote", [LARGE, SMALL], ids=["SHA-256", "git"])
def test_a_file_matches_when_all_of_it_came(remote: RemoteFile) -> None:
    for pieces in ([CONTENT], [CONTENT[:3], CONTENT[3:9], CONTENT[9:]], [b"", CONTENT]):
        hasher = hashed(remote, *pieces)
        assert hasher.matches() and hasher.position == 10 and hasher.sha256 == SHA256
        marks = [hashlib.sha256(CONTENT[:stop]).hexdigest()[:16] for stop in (4, 8)]
        assert hasher.marks == marks
    for pieces in ([CONTENT[:9]], [CONTENT, b"x"], [CONTENT[::-1]]):
        assert not hashed(remote, *pieces).matches()
    first = hashed(remote, CONTENT[:5])
    second = first.copy()
    second.update(CONTENT[5:])
    assert second.matches() and second.marks[:1] == first.marks and len(first.marks) == 1
    first.update(b"x" * 5)
    assert not first.matches() and second.matches()


def recorded(folder: Path, remote: RemoteFile = LARGE) -> VerifiedLog:
    """The record of a folder in which a file was proven."""
    (folder / "w").write_bytes(CONTENT)
    log = VerifiedLog(folder)
    log.add(remote, (folder / "w").stat(), hashed(remote, CONTENT))
    return log


def test_what_was_proven_is_known_to_the_next_run(tmp_path: Path) -> None:
    marks = hashed(LARGE, CONTENT).marks
    umask = os.umask(0)
    try:
        log = recorded(tmp_path)
    finally:
        os.umask(umask)
    path = tmp_path / ".hfship" / "verified.jsonl"
    assert path.stat().st_mode & 0o777 == 0o644
    for one in (log, VerifiedLog(tmp_path)):
        assert one.sha256_of(LARGE) == SHA256 and one.marks_of(LARGE) == marks
        one.marks_of(LARGE).clear()
        assert one.marks_of(LARGE) == marks
    status = (tmp_path / "w").stat()
    assert json.loads(path.read_text()) == {
        "path": "w",
        **identity_of(status)._asdict(),
        "etag": SHA256,
        "sha256": SHA256,
        "marks": marks,
    }
    assert log.sha256_of(RemoteFile("w", 10, "", "0" * 64)) is None
    assert log.marks_of(RemoteFile("w", 12, "", SHA256)) == []
    assert log.marks_of(RemoteFile("v", 10, "", SHA256)) == []
    assert VerifiedLog(tmp_path / "none").sha256_of(LARGE) is None


def test_a_file_that_was_touched_is_proven_no_more(tmp_path: Path) -> None:
    log = recorded(tmp_path)
    path = tmp_path / "w"
    os.utime(path, ns=(1, path.stat().st_mtime_ns))
    assert log.sha256_of(LARGE) is None
    assert log.marks_of(LARGE)  # it was right once: a repair needs them
    log.add(LARGE, path.stat(), hashed(LARGE, CONTENT))
    assert log.sha256_of(LARGE) == SHA256
    path.rename(tmp_path / "v")
    path.symlink_to("v")
    assert log.sha256_of(LARGE) is None
    path.unlink()
    assert log.sha256_of(LARGE) is None


def test_a_file_that_another_replaced_meanwhile_is_not_recorded(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    before = (tmp_path / "w").stat()
    (tmp_path / "v").write_bytes(CONTENT)
    (tmp_path / "v").rename(tmp_path / "w")
    log = VerifiedLog(tmp_path)
    log.add(LARGE, before, hashed(LARGE, CONTENT))
    assert log.sha256_of(LARGE) is None and not (tmp_path / ".hfship").exists()


def test_of_a_small_file_both_hashes_are_known(tmp_path: Path) -> None:
    log = recorded(tmp_path, SMALL)
    assert log.sha256_of(SMALL) == SHA256
    assert log.sha256_of(RemoteFile("w", 10, "0" * 40)) is None
    # The Hub gives its SHA-256 now: it has another ETag.
    assert log.sha256_of(LARGE) is None


@pytest.mark.parametrize("mode, believed", [(0o644, True), (0o666, False)])
def test_a_record_that_others_can_write_is_replaced(
    mode: int, believed: bool, tmp_path: Path
) -> None:
    recorded(tmp_path)
    path = tmp_path / ".hfship" / "verified.jsonl"
    path.chmod(mode)
    log = VerifiedLog(tmp_path)
    assert (log.sha256_of(LARGE) == SHA256) is believed
    log.add(LARGE, (tmp_path / "w").stat(), hashed(LARGE, CONTENT))
    log.add(LARGE, (tmp_path / "w").stat(), hashed(LARGE, CONTENT))
    assert path.read_text().count("\n") == (3 if believed else 2)
    assert path.stat().st_mode & 0o022 == 0


def test_a_link_in_the_place_of_the_record_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".hfship").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / ".hfship" / "verified.jsonl").symlink_to(tmp_path / "secret")
    log = recorded(tmp_path)
    assert log.sha256_of(LARGE) == SHA256 and (tmp_path / "secret").read_text() == "secret"


LINE: Dict[str, Any] = {
    "path": "a",
    "device": 1,
    "inode": 2,
    "size": 3,
    "mtime_ns": 4,
    "ctime_ns": 5,
    "etag": "e",
    "sha256": "f" * 64,
    "marks": ["a", "b"],
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("path", 1),
        ("etag", None),
        ("sha256", "f" * 63),
        ("sha256", 7),
        ("marks", [1]),
        ("marks", 1),
        *((name, value) for name in ("device", "ctime_ns") for value in ("1", True, 1.0, None)),
    ],
)
def test_a_line_of_another_form_is_none(name: str, value: Any) -> None:
    line = read_line(json.dumps(LINE).encode())
    assert json.loads(line.line()) == LINE and tuple(line.identity) == (1, 2, 3, 4, 5)
    with pytest.raises((ValueError, TypeError)):
        read_line(json.dumps({**LINE, name: value}).encode())
    fewer = {key: one for key, one in LINE.items() if key != name}
    if name == "marks":
        assert read_line(json.dumps(fewer).encode()).marks == []
        return
    with pytest.raises(KeyError):
        read_line(json.dumps(fewer).encode())


def test_a_whole_file_is_hashed_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BLOCK_SIZE", 1 << 20)
    content = bytes(CHUNK) + CONTENT
    path = tmp_path / "w"
    path.write_bytes(content)
    remote = RemoteFile("w", len(content), "", hashlib.sha256(content).hexdigest())
    for call in (
        lambda hasher, count: hash_file(path, hasher, count),
        lambda hasher, count: hash_below(tmp_path, "w", hasher, count),
    ):
        counted: Any = []
        hasher = FileHasher(remote)
        assert call(hasher, counted.append).st_ino == path.stat().st_ino
        assert hasher.matches() and counted == [CHUNK, 10]
    (tmp_path / "link").symlink_to("w")
    with pytest.raises(OSError, match="link"):
        hash_file(tmp_path / "link", FileHasher(remote), print)


@pytest.mark.parametrize("folder", ["", "sub/"])
def test_huggingface_hub_finds_what_it_would_have_written(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub/_local_folder.py: the commit, the ETag and when, each on a line."""
    remote = RemoteFile(f"{folder}w", 10, "b" * 40, SHA256)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "w").write_bytes(CONTENT)
    room.write_hub_metadata(tmp_path, remote, "c" * 40)
    cache = tmp_path / ".cache" / "huggingface"
    lines = (cache / "download" / f"{folder}w.metadata").read_text().splitlines()
    assert lines[:2] == ["c" * 40, SHA256] and float(lines[2]) > 0 and len(lines) == 3
    assert (cache / ".gitignore").read_text() == "*"
    found: Optional[str] = None
    for path in cache.rglob("CACHEDIR.TAG"):
        found = path.read_text()
    assert found is not None and found.startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


def test_notes_for_others_cost_little_and_fail_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        assert stat.S_ISDIR(os.fstat(fd).st_mode), "they need not be durable"

    monkeypatch.setattr(os, "fsync", fsync)
    room.write_hub_metadata(tmp_path, LARGE, "c" * 40)
    cache = tmp_path / ".cache" / "huggingface"
    (cache / "CACHEDIR.TAG").write_text("of another")
    room.write_hub_metadata(tmp_path, LARGE, "d" * 40)
    assert (cache / "CACHEDIR.TAG").read_text() == "of another"
    assert (cache / "download" / "w.metadata").read_text().startswith("d" * 40)
    room.write_hub_metadata(tmp_path, RemoteFile("x" * 250, 1, BLOB), "c" * 40)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".cache").write_text("in the way")
    room.write_hub_metadata(tmp_path / "m", LARGE, "c" * 40)
    assert (tmp_path / "m" / ".cache").read_text() == "in the way"
