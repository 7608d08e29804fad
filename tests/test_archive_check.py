# SPDX-License-Identifier: Apache-2.0
"""One pass over an archive: what is told as safe, and when; what of it is needed; and damage."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Set, Tuple

import pytest

from hfship.archive import check as room
from hfship.archive.check import ArchiveCheck, StreamedCheck, checker_of, contradiction, overlaps
from hfship.archive.damage import Damage, FileRange
from hfship.archive.files import ArchiveFiles
from hfship.archive.lanes import make_lanes
from hfship.archive.opening import open_archive
from hfship.archive.pipe import open_stream
from hfship.archive.stream_check import RecordingSink, Sink
from hfship.base.progress import Stage
from support import archives as a

MIB = 1 << 20
CONTENT = {
    "a": a.noise(3000),
    "sub/b": b"",
    "c": a.noise(3000, 1),
    "d": a.noise(600_000, 3),
    "w": a.noise(3 * MIB + 100, 2),
}
FRAME = MIB // 4


class Kept(Sink):
    """What came, in a folder: workers write it. How files end is told to who leads them."""

    keeps = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: List[str] = []
        self.abandoned: List[Tuple[str, bool]] = []
        self.checkpoints: List[int] = []

    def path(self, entry: Any) -> Path:
        """Where a file lies."""
        return self.folder / entry.path.replace("/", "_")

    def begin(self, entry: Any) -> None:
        self.path(entry).touch()

    def write(self, entry: Any, offset: int, content: Any) -> None:
        fd = os.open(self.path(entry), os.O_WRONLY | os.O_CREAT)
        os.pwrite(fd, content, offset)
        os.close(fd)

    def read(self, entry: Any, offset: int, size: int) -> bytes:
        return (self.folder / "before").read_bytes()[offset : offset + size]

    def checkpoint(self, entry: Any, size: int) -> None:
        self.checkpoints.append(size)

    def finish(self, entry: Any) -> None:
        self.finished.append(entry.path)

    def abandon(self, entry: Any, lost: bool) -> None:
        self.abandoned.append((entry.path, lost))

    def content(self, path: str) -> bytes:
        """Of a file."""
        return (self.folder / path.replace("/", "_")).read_bytes()


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    """A sink, once more at each call."""

    def make() -> Kept:
        folder = tmp_path / f"kept{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Kept(folder)

    return make


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ArchiveFiles:
    root = tmp_path_factory.mktemp("packed")
    a.make_model(root / "m", CONTENT)
    return a.pack(root / "m", root / "out", frame_size=FRAME)


def broken(packed: ArchiveFiles, tmp_path: Path, *numbers: int) -> ArchiveFiles:
    """A copy of which these frames, counted from 1, are damaged."""
    content = bytearray(packed.path.read_bytes())
    frames = open_archive(packed).frames
    for number in numbers:
        frame = frames[number - 1]
        content[frame.offset + frame.size - 2] ^= 1
    path = tmp_path / packed.name
    path.write_bytes(bytes(content))
    return ArchiveFiles(tmp_path, packed.name, {})


def frame_of(packed: ArchiveFiles, path: str) -> int:
    """The number of the first frame of a file."""
    archive = open_archive(packed)
    (segment,) = [one for one in archive.segments if one.entry and one.entry.path == path]
    starts = [number for number, one in enumerate(archive.frames, 1) if one.start <= segment.start]
    return starts[-1]


def run(files: ArchiveFiles, sink: Sink, after: Any = None, **options: Any) -> Any:
    check = ArchiveCheck(open_archive(files), sink, 1, **options)
    stage = Stage("unpack", check.size)
    return check, check.run(stage, after), stage


def test_all_is_proven_and_handed_on(kept: Any, packed: ArchiveFiles) -> None:
    sink = kept()
    check, damages, stage = run(packed, sink)
    assert damages == [] and {path: sink.content(path) for path in CONTENT} == CONTENT
    assert sorted(one for one in sink.finished if one in CONTENT) == sorted(CONTENT)
    assert stage.done == stage.total == open_archive(packed).segments[-1].stop
    assert stage.files == stage.finished and sink.abandoned == []


def test_what_is_safe_is_told_lane_by_lane_and_within_large_files(
    kept: Any, packed: ArchiveFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = open_archive(packed)
    lanes = make_lanes(archive.frames, archive.segments)
    ends = [lane.frames[-1].stop for lane in lanes]
    told: List[int] = []
    sink = kept()
    run(packed, sink, told.append)
    assert told == ends and sink.checkpoints == []
    monkeypatch.setattr(room, "FLUSH_SIZE", MIB)
    told.clear()
    run(packed, sink, told.append)
    weight = next(one for one in archive.segments if one.entry and one.entry.path == "w")
    firsts = []
    for frame in archive.frames:
        first, last = weight.file_range(frame.start, frame.stop)
        if weight.start <= frame.start < weight.stop and first // MIB != last // MIB:
            firsts.append(first)
    assert sink.checkpoints == firsts and len(firsts) == 3
    within = [weight.start + first for first in firsts]
    assert told == sorted([*ends, *within])


@pytest.mark.parametrize("which", ["d", "w"])
def test_what_a_damage_needs_is_not_told_as_safe(
    kept: Any, which: str, packed: ArchiveFiles, tmp_path: Path
) -> None:
    number = frame_of(packed, which) + 1
    files = broken(packed, tmp_path, number)
    told: List[int] = []
    sink = kept()
    _, damages, _ = run(files, sink, told.append)
    start = open_archive(packed).frames[number - 1].start
    assert [damage.frames for damage in damages] == [(number, number)]
    assert all(position <= start for position in told)
    assert which not in sink.finished
    assert (("w", True) in sink.abandoned) == (which == "w")
    assert ("w" in sink.finished) == (which == "d")


def test_what_an_earlier_run_wrote_is_read_back_and_proven(kept: Any, packed: ArchiveFiles) -> None:
    done = 3 * FRAME
    for there, proven in ((CONTENT["w"], True), (bytes(len(CONTENT["w"])), False)):
        sink = kept()
        (sink.folder / "before").write_bytes(there)
        _, damages, _ = run(packed, sink, resume={"w": done})
        assert ("w" in sink.finished) == proven and bool(damages) != proven
        assert sink.content("w")[done:] == CONTENT["w"][done:]
        assert not any(sink.content("w")[:done]), "it is not written again"


@pytest.mark.parametrize(
    ("skip", "sparse", "files"),
    [
        (set(), False, {"a", "c", "d", "w", "sub/b"}),
        ({"w"}, False, {"a", "c", "d", "sub/b"}),
        ({"a", "c", "d", "sub/b", ".hfship/manifest.json"}, False, {"a", "c", "d", "w", "sub/b"}),
        ({"a", "c", "d", "sub/b", ".hfship/manifest.json"}, True, {"w"}),
        ({"w"}, True, {"a", "c", "d", "sub/b"}),
    ],
)
def test_what_is_not_asked_for_is_not_read(
    kept: Any, skip: Set[str], sparse: bool, files: Set[str], packed: ArchiveFiles
) -> None:
    sink = kept()
    check, damages, stage = run(packed, sink, skip=skip, sparse=sparse)
    assert damages == [] and {one for one in sink.finished if one in CONTENT} == files
    assert stage.done == check.size


def test_a_sparse_pass_tells_of_damage_where_it_reads_alone(
    kept: Any, packed: ArchiveFiles, tmp_path: Path
) -> None:
    content = packed.path.read_bytes()
    (tmp_path / packed.name).write_bytes(content)
    archive = open_archive(packed)
    at = {path: archive.frames[frame_of(packed, path) - 1] for path in ("a", "w")}
    known = [Damage("odd", frame.offset, 1) for frame in at.values()]
    vars(archive)["damages"] = (*known, Damage("nobody knows where"))
    skip = {"a", "c", "d", "sub/b", ".hfship/manifest.json"}
    check = ArchiveCheck(archive, kept(), 1, skip=skip, sparse=True)
    assert check._damages == [known[1], Damage("nobody knows where")]
    rest = ArchiveCheck(archive, kept(), 1, skip=skip, sparse=True, resume={"w": FRAME})
    assert rest._damages == [Damage("nobody knows where")], "its first frame is there"
    whole = ArchiveCheck(archive, kept(), 1)
    assert whole._damages == list(archive.damages)


def test_quick_reads_what_lies_there_and_decodes_nothing(
    kept: Any, packed: ArchiveFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = kept()
    _, damages, stage = run(packed, sink, quick=True)
    assert damages == [] and not sink.finished and stage.finished == stage.files
    number = frame_of(packed, "w") + 1
    _, damages, _ = run(broken(packed, tmp_path, number), kept(), quick=True)
    assert [damage.frames for damage in damages] == [(number, number)]


def test_neighbouring_damage_is_told_together(
    kept: Any, packed: ArchiveFiles, tmp_path: Path
) -> None:
    number = frame_of(packed, "w")
    _, damages, _ = run(broken(packed, tmp_path, number, number + 1, number + 3), kept())
    assert [damage.frames for damage in damages] == [
        (number, number + 1),
        (number + 3, number + 3),
    ]


def test_what_an_archive_contradicts_is_told() -> None:
    segment: Any = type("S", (), {"what": "m/a", "start": 10, "stop": 15, "entry": None})()
    text = "m/a is odd (bytes 10-14 of the tar stream)"
    assert contradiction(segment, "is odd") == Damage(text)
    segment.entry = type("E", (), {"path": "a", "size": 5})()
    assert contradiction(segment, "is odd") == Damage(text, files=(FileRange("a", 0, 4),))


@pytest.mark.parametrize(
    ("offset", "size", "hit"),
    [(0, 10, False), (0, 11, True), (19, 1, True), (20, 10, False), (20, 11, True), (40, 1, False)],
)
def test_where_a_damage_lies(offset: int, size: int, hit: bool) -> None:
    assert overlaps(Damage("x", offset, size), [(10, 20), (30, 40)]) == hit
    assert overlaps(Damage("x", None, size), []) and overlaps(Damage("x", offset, 0), [])


# -- as a stream


def stream_of(files: ArchiveFiles) -> Any:
    return open_stream(ArchiveFiles(Path(), "-", {}), io.BytesIO(files.path.read_bytes()))


def test_a_stream_is_proven_in_one_pass(kept: Any, packed: ArchiveFiles, tmp_path: Path) -> None:
    assert checker_of(stream_of(packed)) is StreamedCheck
    assert checker_of(open_archive(packed)) is ArchiveCheck
    sink = kept()
    check = StreamedCheck(stream_of(packed), sink, 1)
    stage = Stage("unpack", check.size)
    assert check.run(stage) == [] and stage.done == check.size
    assert {path: sink.content(path) for path in CONTENT} == CONTENT
    number = frame_of(packed, "w")
    sink = kept()
    check = StreamedCheck(stream_of(broken(packed, tmp_path, number)), sink, 1)
    damages = check.run(Stage("unpack", check.size))
    assert {damage.frames for damage in damages} == {(number, number)}
    assert ("w", True) in sink.abandoned and "a" in sink.finished


def test_of_a_stream_what_is_there_is_not_decoded(kept: Any, packed: ArchiveFiles) -> None:
    archive = stream_of(packed)
    decoded: List[int] = []
    restored = archive.restored
    vars(archive)["restored"] = lambda frame, how: (
        decoded.append(frame.start) or restored(frame, how)
    )
    check = StreamedCheck(archive, kept(), 1, skip={"w"})
    check.run(Stage("unpack", check.size))
    weight = next(one for one in archive.segments if one.entry and one.entry.path == "w")
    inside = [
        frame.start
        for frame in archive.frames
        if weight.start <= frame.start and frame.stop <= weight.stop
    ]
    assert inside and not set(inside) & set(decoded) and archive.held == {}


@pytest.mark.parametrize("ends", ["finish", "abandon"])
def test_a_worker_lets_go_of_a_file_and_tells_how_it_ended(ends: str) -> None:
    let_go: List[Any] = []
    told: List[Any] = []
    entry: Any = object()
    sink = Sink()
    sink.release = let_go.append  # type: ignore[method-assign]
    sink.finish = lambda one: told.append(one)  # type: ignore[method-assign]
    sink.abandon = lambda one, lost: told.append((one, lost))  # type: ignore[method-assign]
    recording = RecordingSink(sink)
    if ends == "finish":
        recording.finish(entry)
    else:
        recording.abandon(entry, lost=True)
    assert let_go == [entry] and told == []
    (outcome,) = recording.outcomes
    outcome.pass_on(sink)
    assert told == ([entry] if ends == "finish" else [(entry, True)])


@pytest.mark.parametrize(
    ("done", "there", "readable", "waited", "looked"),
    [
        (0, "abc", 6, "a", "abbbc"),
        (0, "ab", 5, "a", "abbbc"),
        (0, "a", 2, "a", "ab"),
        (0, "", 1, "a", "a"),
        (2, "bc", 6, "b", "bbc"),
        (3, "b", 5, "b", "bc"),
        (5, "", 6, "c", ""),
    ],
)
def test_frames_are_read_as_far_as_their_media_are_there(
    done: int, there: str, readable: int, waited: str, looked: str
) -> None:
    """The next one is waited for; those behind it are taken as they lie there."""
    parts = "aabbbc"  # of each frame
    asked: List[str] = []
    waits: List[str] = []

    def look_for(path: str) -> bool:
        asked.append(path)
        return path in there

    media = SimpleNamespace(wait_for=waits.append, look_for=look_for)
    check: Any = ArchiveCheck.__new__(ArchiveCheck)
    check._lanes = [SimpleNamespace(frames=[0, 1, 2]), SimpleNamespace(frames=[3, 4, 5])]
    check.archive = SimpleNamespace(
        media=media, part_of=lambda frame: SimpleNamespace(path=parts[frame])
    )
    assert check._readable(done) == readable
    assert "".join(waits) == waited and "".join(asked) == looked
    check.archive.media = None
    assert check._readable(done) == 6
