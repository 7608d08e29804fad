# SPDX-License-Identifier: Apache-2.0
"""An archive that comes as a stream: its frames, its tables, and what is wrong with them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, List, Tuple

import pytest

from hfship.archive.files import ArchiveFiles
from hfship.archive.opening import open_archive
from hfship.archive.pipe import Streamed, open_stream
from hfship.archive.reader import ForeignArchive
from hfship.base.errors import IncompleteError
from support import archives as a


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tuple[ArchiveFiles, bytes]:
    """An archive of several frames, and its bytes."""
    root = tmp_path_factory.mktemp("piped")
    a.make_model(root / "m", {"a": a.noise(3000), "c": b"c"})
    files = a.pack(root / "m", root / "out", frame_size=1000)
    return files, files.path.read_bytes()


STDIN = ArchiveFiles(Path(), "-", {})


def streamed(content: bytes) -> Streamed:
    return open_stream(STDIN, io.BytesIO(content))


def passed(content: bytes) -> Tuple[Any, List[Any], List[bytes]]:
    """An archive of which all frames came: (number, unit) of each, and the tables."""
    archive = streamed(content)
    tail: List[bytes] = []
    found = [(number, archive.unit(frame)) for number, frame in archive.frames_to_come(tail)]
    return archive, found, tail


def end_of_frames(files: ArchiveFiles) -> int:
    frames = open_archive(files).frames
    return int(frames[-1].offset + frames[-1].size)


def test_frames_come_in_their_order_and_then_the_tables(whole: Any) -> None:
    files, content = whole
    opened = open_archive(files)
    archive, found, tail = passed(content)
    assert archive.manifest == opened.manifest and archive.text == opened.text
    assert list(archive.segments) == list(opened.segments) and archive.is_stream
    assert [number for number, _ in found] == list(range(1, len(opened.frames) + 1))
    units = [content[one.offset : one.offset + one.size] for one in opened.frames]
    assert [unit for _, unit in found] == units and len(units) > 3
    assert list(archive.frames) == list(opened.frames) and archive.held == {}
    assert b"".join(tail) == content[archive.size :] and archive.size == end_of_frames(files)
    assert archive.check_tables(tail) == []


def test_sums_may_follow_the_archive(whole: Any) -> None:
    files, content = whole
    archive, _, tail = passed(content + b"%s  %s\n" % (b"0" * 64, b"m.tar.zst"))
    assert archive.check_tables(tail) == []
    archive, _, tail = passed(content + b"more")
    (damage,) = archive.check_tables(tail)
    assert damage.what == "something else follows the archive"
    assert (damage.offset, damage.size) == (len(content), 4)


def test_tables_that_do_not_come_whole_are_told(whole: Any) -> None:
    files, content = whole
    end = end_of_frames(files)
    for stop in (end, end + 5, len(content) - 1):
        archive, _, tail = passed(content[:stop])
        with pytest.raises(IncompleteError, match=f"no frame is whole from byte {end} on"):
            archive.check_tables(tail)


def test_tables_that_cannot_be_read_are_damage(whole: Any) -> None:
    files, content = whole
    end = end_of_frames(files)
    broken = bytearray(content)
    broken[-1] ^= 1
    archive, _, tail = passed(bytes(broken))
    (damage,) = archive.check_tables(tail)
    assert damage.what == "neither a frame nor intact tables"
    assert (damage.offset, damage.size) == (end, len(content) - end)


def test_frames_that_are_not_those_of_the_tables_are_damage(whole: Any) -> None:
    files, content = whole
    frames = open_archive(files).frames
    changed = bytearray(content)
    changed[frames[2].offset + frames[2].size - 1] ^= 1
    archive, _, tail = passed(bytes(changed))
    (damage,) = archive.check_tables(tail)
    assert damage.what == "CRC-32 differs" and damage.frames == (3, 3)
    without = content[: frames[-1].offset] + content[end_of_frames(files) :]
    archive, _, tail = passed(without)
    assert [one.what for one in archive.check_tables(tail)] == ["frames are missing"]
    assert archive.check_tables(tail)[0].offset == frames[-1].offset


def test_what_is_no_archive_of_ours_can_be_read_again(whole: Any) -> None:
    _, content = whole
    for other in (b"x", b"PK" * 99, content[:4] + b"xxxx" + content[8:], content[:30]):
        with pytest.raises(ForeignArchive) as told:
            streamed(other)
        assert told.value.stream.read() == other
    with pytest.raises(IncompleteError, match="nothing came through the pipe"):
        streamed(b"")
