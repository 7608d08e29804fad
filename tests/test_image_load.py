# SPDX-License-Identifier: Apache-2.0
"""What an engine is sent of an image, and what is said when it takes none; test_images.py has
whole programs."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Type

import pytest

from hfship.base.errors import (
    DiskError,
    HfshipError,
    HostError,
    IntegrityError,
    NotFoundError,
)
from hfship.base.files import CHUNK
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import MANIFEST_PATH, FileEntry, make_manifest
from hfship.base.report import Reporter
from hfship.serve import image_load as room
from hfship.serve.engines import EngineState, HeldImage
from hfship.serve.image_load import (
    END_OF_TAR,
    Loaded,
    Loader,
    LoaderSink,
    LoadOptions,
    load_advice,
    load_archive,
)

DOCKER = EngineState("docker", "20.10", "amd64", "/var/lib/docker")
PODMAN = EngineState("podman", "5.0", "amd64")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Process:
    """An engine's command: what it was sent, and how it ends."""

    def __init__(self, code: int = 0, said: bytes = b"", breaks: str = "") -> None:
        self.code, self.breaks = code, breaks
        self.got = bytearray()
        self.stdin: Any = SimpleNamespace(write=self.write, close=self.close)
        self.stdout: Any = io.BytesIO(said)
        self.closed = self.killed = False
        self.waited: List[float] = []

    def write(self, content: Any) -> None:
        """Take bytes."""
        if self.breaks == "write":
            raise BrokenPipeError
        self.got += content

    def close(self) -> None:
        """No more comes."""
        if self.breaks == "close":
            raise BrokenPipeError
        self.closed = True

    def wait(self, timeout: float) -> int:
        """Its exit status."""
        self.waited.append(timeout)
        return self.code

    def kill(self) -> None:
        """End it."""
        self.killed = True


def loader_of(process: Process, engine: EngineState = DOCKER) -> Loader:
    return Loader(process, engine)  # type: ignore[arg-type]


# -- the command


def test_what_was_sent_is_counted_and_has_an_end() -> None:
    process = Process()
    loader = loader_of(process)
    loader.write(b"abc")
    loader.write(memoryview(b"de"))
    assert loader.sent == 5 and not process.closed
    loader.finish()
    assert process.got == b"abcde" + END_OF_TAR and process.closed and not process.killed
    assert process.waited == [room.LOAD_ENDS_S] and loader.sent == 5 + len(END_OF_TAR)
    loader.cancel()
    assert process.killed


FULL = "free space for /var/lib/docker, then run the same command again: nothing was loaded"
OLD = "update docker, if it is older than 23"
LOG = "look at its log, and at its room: docker system df"


@pytest.mark.parametrize(
    ("process", "error", "why", "step"),
    [
        (Process(1, b" no \n"), HostError, "no", LOG),
        (Process(1, b"x", breaks="write"), HostError, "x", LOG),
        (Process(1, b"x", breaks="close"), HostError, "x", LOG),
        (Process(1, b"write: no space left on device"), DiskError, "write: no space left", FULL),
        (Process(1, b"archive/tar: invalid tar header"), HostError, "archive/tar: invalid", OLD),
        (Process(1, b"unexpected EOF"), HostError, "unexpected EOF", OLD),
        (Process(1, b"a\x1b[2J\xff"), HostError, "a?[2J\ufffd", LOG),
        (Process(1, b"x" + b"y" * 1000), HostError, "y" * 1000, LOG),
    ],
)
def test_an_engine_that_takes_nothing_is_told(
    process: Process, error: Type[HfshipError], why: str, step: str
) -> None:
    with pytest.raises(error) as told:
        loader_of(process).finish()
    assert type(told.value) is error
    assert told.value.what == "docker 20.10 did not load the image"
    assert told.value.why.startswith(why) and told.value.next_step.startswith(step)
    if len(why) == 1000:
        assert told.value.why == why


def test_a_command_that_nobody_listens_to_says_nothing() -> None:
    process = Process(1)
    process.stdout = None
    with pytest.raises(HostError) as told:
        loader_of(process).finish()
    assert told.value.why == ""


@pytest.mark.parametrize(
    ("engine", "said", "advice"),
    [
        (PODMAN, "no space left on device", "free space for podman, then"),
        (PODMAN, "unexpected EOF", "look at its log, and at its room: podman system df"),
        (DOCKER, "no space left on device: unexpected EOF", FULL),
    ],
)
def test_what_is_advised(engine: EngineState, said: str, advice: str) -> None:
    assert load_advice(engine, said).startswith(advice)


# -- the tar


def test_files_go_as_a_tar_but_for_those_that_are_there() -> None:
    process = Process()
    loader = loader_of(process)
    sink = LoaderSink(loader, {"blobs/b"})
    for path, content in {"blobs/a": b"1" * 513, "blobs/b": b"2", "index.json": b"{}"}.items():
        entry = FileEntry(path, len(content), sha256(content))
        sink.begin(entry)
        sink.write(entry, 0, content[:1])
        sink.write(entry, 1, content[1:])
        sink.finish(entry)
    loader.finish()
    with tarfile.open(fileobj=io.BytesIO(bytes(process.got))) as tar:
        found = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    assert found == {"blobs/a": b"1" * 513, "index.json": b"{}"}
    assert sink.sent == {"blobs/a", "index.json"} and len(process.got) % 512 == 0


# -- what is planned, of an archive that is written here

CONTENT = {"blobs/a": b"a" * 700, "blobs/b": b"b" * 20, "blobs/c": b"c" * 3}
TEXT = json.dumps([{"Layers": list(CONTENT)}]).encode()
SUMS = [f"sha256:{digit * 64}" for digit in "012345"]
FACTS = ImageFacts("docker.io/org/app:1", *SUMS[:3], tuple(SUMS[3:]), "linux/amd64")
FILES = {**CONTENT, "manifest.json": TEXT}
MANIFEST = make_manifest("app_1", [FileEntry(p, len(c), sha256(c)) for p, c in FILES.items()])
ENTRIES = {entry.path: entry for entry in MANIFEST.files}
FRAME = 256  # bytes of a frame, decoded


class FakeArchive:
    """An archive with these files one after the other, in frames of 256 bytes."""

    def __init__(self, folder: Path, absent: Any = ()) -> None:
        self.manifest = MANIFEST
        self.text = "text"
        self.files = SimpleNamespace(name="app_1.tar.zst", place=str(folder / "app_1.tar.zst"))
        self.delta = SimpleNamespace(absent=absent)
        self.parts = [SimpleNamespace(path=folder / f"part{number}") for number in (1, 2)]
        self.stream = b"head"
        self.segments = [SimpleNamespace(entry=None, start=0, stop=4)]
        for path, content in FILES.items():
            start = len(self.stream)
            self.stream += content
            stop = len(self.stream)
            self.segments.append(SimpleNamespace(entry=ENTRIES[path], start=start, stop=stop))
        starts = range(0, len(self.stream), FRAME)
        stops = [min(start + FRAME, len(self.stream)) for start in starts]
        self.frames = [SimpleNamespace(start=a, stop=b) for a, b in zip(starts, stops)]
        self.decoded: List[int] = []

    def decode(self, frame: Any, _: Any) -> bytes:
        """The content of a frame."""
        self.decoded.append(frame.start)
        return self.stream[frame.start : frame.stop]


@pytest.mark.parametrize("path", [*FILES, "nothing"])
def test_a_small_file_is_read_from_its_frames_alone(path: str, tmp_path: Path) -> None:
    archive: Any = FakeArchive(tmp_path)
    assert room._content_of(archive, path) == FILES.get(path, b"")
    segments = [one for one in archive.segments if one.entry and one.entry.path == path]
    wanted = [
        frame.start
        for frame in archive.frames
        if segments and frame.start < segments[0].stop and frame.stop > segments[0].start
    ]
    assert archive.decoded == wanted


@pytest.mark.parametrize(
    ("layers", "count", "there"),
    [
        (["blobs/a", "blobs/b", "blobs/c"], 2, {"blobs/a", "blobs/b"}),
        (["blobs/a", "blobs/b", "blobs/a"], 2, {"blobs/b"}),  # twice: it must go, too
        (["blobs/a", "blobs/other"], 2, {"blobs/a"}),
        ([], 2, set()),
    ],
)
def test_which_files_the_first_layers_are(
    layers: List[str], count: int, there: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps([{"Layers": layers}]).encode()
    monkeypatch.setattr(room, "_content_of", lambda _, path: text * (path == "manifest.json"))
    archive: Any = FakeArchive(tmp_path)
    assert room._first_layers(archive, MANIFEST, count) == there


def plan(archive: Any, there: int, monkeypatch: Any, **options: Any) -> Any:
    monkeypatch.setattr(room, "layers_there", lambda *_: there)
    return room._plan(archive, MANIFEST, FACTS, DOCKER, LoadOptions(**options))


def test_what_is_sent_is_what_is_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    archive: Any = FakeArchive(tmp_path)
    planned = plan(archive, 2, monkeypatch)
    assert planned.there == {"blobs/a", "blobs/b"} and planned.from_base == {}
    assert planned.size == len(CONTENT["blobs/c"]) + len(TEXT) and planned.entries == ENTRIES
    assert plan(archive, 0, monkeypatch).size == MANIFEST.size


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of an older version, with one layer under another name."""
    folder = tmp_path / "older"
    (folder / ".hfship").mkdir(parents=True)
    (folder / "old").write_bytes(CONTENT["blobs/a"])
    entries = [FileEntry("old", 700, sha256(CONTENT["blobs/a"]))]
    (folder / MANIFEST_PATH).write_text(make_manifest("older", entries).to_json())
    return folder


def test_a_delta_takes_layers_from_an_older_version(
    base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    archive: Any = FakeArchive(tmp_path, absent=("blobs/a",))
    assert plan(archive, 0, monkeypatch, base=base).from_base == {"blobs/a": base / "old"}
    assert plan(archive, 1, monkeypatch, base=base).from_base == {}
    assert plan(archive, 1, monkeypatch).from_base == {}
    for options in ({}, {"base": base}):
        more: Any = FakeArchive(tmp_path, absent=("blobs/b",))
        with pytest.raises(NotFoundError) as told:
            plan(more, 0, monkeypatch, **options)
        assert told.value.what.startswith("app_1.tar.zst is a delta: 1 file must come from")
        assert told.value.why.endswith("as layers of another image: blobs/b")
    with pytest.raises(NotFoundError, match="has no manifest"):
        plan(archive, 0, monkeypatch, base=tmp_path)


def test_layers_of_an_older_version_are_proven_and_sent(base: Path) -> None:
    (base / "old").write_bytes(bytes(CHUNK + 1))
    digest = sha256(bytes(CHUNK + 1))
    entries = {"blobs/a": FileEntry("blobs/a", CHUNK + 1, digest)}
    planned: Any = SimpleNamespace(from_base={"blobs/a": base / "old"}, entries=entries)
    process = Process()
    loader = loader_of(process)
    room._send_from_base(loader, planned)
    loader.finish()
    with tarfile.open(fileobj=io.BytesIO(bytes(process.got))) as tar:
        (member,) = tar.getmembers()
        assert member.name == "blobs/a"
        assert tar.extractfile(member).read() == bytes(CHUNK + 1)  # type: ignore[union-attr]
    assert len(process.got) == 512 + CHUNK + 512 + len(END_OF_TAR), "whole blocks"
    (base / "old").write_bytes(b"other")
    process = Process()
    with pytest.raises(IntegrityError, match="is not what its manifest says"):
        room._send_from_base(loader_of(process), planned)
    assert not process.got


# -- as a stream


def test_an_archive_is_read_as_a_stream_if_all_of_it_is_there(
    tmp_path: Path, monkeypatch: Any
) -> None:
    archive: Any = FakeArchive(tmp_path)
    with pytest.raises(IntegrityError) as told:
        room._as_stream(archive)
    assert told.value.what == "app_1.tar.zst is not complete" and told.value.why == "part1, part2"
    for part in archive.parts:
        part.path.touch()
    for text, changed in (("text", False), ("other", True)):
        opened = room.Streamed.__new__(room.Streamed)
        vars(opened).update(text=text, files="of the stream")
        monkeypatch.setattr(room, "open_stream", lambda *_, opened=opened: opened)
        monkeypatch.setattr(room, "replace", lambda one, files: (one, files))
        if changed:
            with pytest.raises(IntegrityError, match="changed while it was read"):
                room._as_stream(archive)
        else:
            assert room._as_stream(archive) == (opened, archive.files)
    stream = room.Streamed.__new__(room.Streamed)
    assert room._as_stream(stream) is stream and room._content_of(stream, "x") == b""


# -- the pass


class Pass:
    """`_send` with an engine's command and a check that are written here."""

    def __init__(self, monkeypatch: Any, folder: Path, damages: Any = ()) -> None:
        self.process = Process()
        self.options: Any = None
        self.damages = damages
        self.fails: Any = None
        self.archive: Any = FakeArchive(folder)
        monkeypatch.setattr(room, "_as_stream", lambda archive: archive)
        monkeypatch.setattr(room, "started", self.started)
        monkeypatch.setattr(room, "StreamedCheck", self.check)

    @contextmanager
    def started(self, argv: List[str], **options: Any) -> Iterator[Process]:
        """The command."""
        assert argv == ["docker", "load", "-q"]
        pipe = room.subprocess.PIPE
        assert options == {"stdin": pipe, "stdout": pipe, "stderr": room.subprocess.STDOUT}
        yield self.process

    def check(self, streamed: Any, sink: LoaderSink, jobs: int, skip: Any) -> Any:
        """A check that sends one file."""
        self.options = (jobs, skip)
        entry = FileEntry("x", 1, "")

        def run(_: Any) -> Any:
            if self.fails:
                raise self.fails
            sink.begin(entry)
            sink.write(entry, 0, b"1")
            sink.finish(entry)
            return self.damages

        assert streamed is self.archive
        return SimpleNamespace(run=run, size=1)

    def send(self) -> int:
        """The bytes that went."""
        planned: Any = SimpleNamespace(there={"blobs/b"}, from_base={}, entries={})
        options = LoadOptions(jobs=3)
        return room._send(self.archive, DOCKER, planned, options, Reporter("none", -1))


def test_all_is_sent_and_counted(monkeypatch: Any, tmp_path: Path) -> None:
    passed = Pass(monkeypatch, tmp_path)
    assert passed.send() == len(passed.process.got) == 1024 + len(END_OF_TAR)
    assert passed.options == (3, {"blobs/b"}) and not passed.process.killed


def test_of_a_damaged_archive_the_end_is_not_sent(monkeypatch: Any, tmp_path: Path) -> None:
    passed = Pass(monkeypatch, tmp_path, damages=["damage"])
    said: List[Any] = []

    def error(archive: Any, damages: Any, again: str) -> Exception:
        said.append((archive, damages, again))
        return IntegrityError("damaged", "", "")

    monkeypatch.setattr(room, "archive_error", error)
    with pytest.raises(IntegrityError, match="damaged"):
        passed.send()
    assert said == [(passed.archive, ["damage"], f"hfship unpack {tmp_path}/app_1.tar.zst")]
    assert passed.process.killed and len(passed.process.got) == 1024


def test_a_pass_that_fails_loads_nothing(monkeypatch: Any, tmp_path: Path) -> None:
    passed = Pass(monkeypatch, tmp_path)
    passed.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        passed.send()
    assert passed.process.killed and not passed.process.closed


HELD = HeldImage(FACTS.config_digest, FACTS.diff_ids)
OTHER = HeldImage("sha256:other", ())


@pytest.mark.parametrize("before", [HELD, OTHER, None])
def test_an_image_that_is_there_is_not_loaded_again(
    before: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    archive: Any = FakeArchive(tmp_path)
    asked: Dict[str, Any] = {}
    err = io.StringIO()
    reporter = Reporter("plain", 0, err=err)
    monkeypatch.setattr(
        room, "engine_state", lambda name: asked.setdefault("engine", name) and DOCKER
    )
    monkeypatch.setattr(room, "held_image", lambda *_: before)
    monkeypatch.setattr(room, "layers_there", lambda *_: 1)
    monkeypatch.setattr(room, "require_fitting", lambda *words: asked.update(fitting=words))
    monkeypatch.setattr(room, "_send", lambda *words: asked.update(sent=words) or 77)
    monkeypatch.setattr(room, "require_loaded", lambda *_: HELD)
    options = LoadOptions(force=True)
    loaded = load_archive(archive, FACTS, options, reporter)
    assert asked["engine"] == "docker" and 0 <= loaded.seconds < 100
    facts = {**vars(loaded), "seconds": 0.0}
    if before is HELD:
        assert Loaded(**facts) == Loaded(MANIFEST, FACTS, HELD, DOCKER, 0, 0, 0.0)
        assert list(asked) == ["engine"] and not err.getvalue()
        return
    assert Loaded(**facts) == Loaded(MANIFEST, FACTS, HELD, DOCKER, 77, 2, 0.0, before)
    size = MANIFEST.size - len(CONTENT["blobs/a"])
    assert asked["fitting"] == (DOCKER, FACTS, size, True)
    assert asked["sent"][:2] == (archive, DOCKER) and asked["sent"][3:] == (options, reporter)
    assert "org/app:1: docker has 1 of 3 layers" in err.getvalue()
    monkeypatch.setattr(room, "layers_there", lambda *_: 0)
    err.truncate(0)
    load_archive(archive, FACTS, options, reporter)
    assert "docker has" not in err.getvalue()
