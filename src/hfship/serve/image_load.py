# SPDX-License-Identifier: Apache-2.0
"""From an archive of an image into an engine, without a second copy on disk.

Owns the one pass: the frames are decoded in order, every file is proven, and goes on as a tar into
the command that loads it. Promises: nothing is loaded of an archive that is damaged, because its
end is sent only after all of it was proven; what the engine has then is proven by its digests.
Never: writes a file.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, AbstractSet, Dict, List, Optional, Set, Type, Union

from hfship.archive.check import StreamedCheck
from hfship.archive.layout import padding, tar_header
from hfship.archive.pipe import Streamed, open_stream
from hfship.archive.stream_check import Sink
from hfship.archive.streams import pieces_of_files, stream_of
from hfship.archive.verify import archive_error
from hfship.base.below import opened_below
from hfship.base.errors import (
    DiskError,
    HfshipError,
    HostError,
    IntegrityError,
    NotFoundError,
    command_line,
)
from hfship.base.files import CHUNK, disk_errors, pread_exactly, sha256_file
from hfship.base.imagefacts import MANIFEST_JSON, layer_paths
from hfship.base.manifest import read_manifest
from hfship.base.processes import started
from hfship.base.text import counted, printable, shorten
from hfship.base.values import dataclass, replace
from hfship.serve.engines import (
    engine_state,
    held_image,
    layers_there,
    load_command,
    require_fitting,
    require_loaded,
)

if TYPE_CHECKING:
    from hfship.archive.reader import Archive
    from hfship.base.imagefacts import ImageFacts
    from hfship.base.manifest import FileEntry, Manifest
    from hfship.base.report import Reporter
    from hfship.serve.engines import EngineState, HeldImage

END_OF_TAR = bytes(1024)  # two blocks of zeros: POSIX ustar
LOAD_ENDS_S = 3600.0  # a loader unpacks layers after the last byte came
NO_SPACE = "no space left on device"  # strerror(ENOSPC), as Go says it
_SHOWN = 1000


@dataclass(frozen=True)
class LoadOptions:
    """How to load: into which engine; `base` is the folder of another version of the image, for
    layers that a delta leaves out; `force` also loads what is for another machine."""

    engine: str = "docker"
    base: Optional[Path] = None
    force: bool = False
    jobs: int = 1


@dataclass(frozen=True)
class Loaded:
    """An image that an engine has: `sent` are the bytes that went there, 0 if it had it; `before`
    is the image that had the name until now."""

    manifest: Manifest
    facts: ImageFacts
    held: HeldImage
    engine: EngineState
    sent: int
    layers_sent: int
    seconds: float
    before: Optional[HeldImage] = None


class Loader:
    """An engine's command that reads a tar on its stdin, while it runs."""

    def __init__(self, process: subprocess.Popen[bytes], engine: EngineState) -> None:
        self._process = process
        self._engine = engine
        self.sent = 0

    def write(self, content: Union[bytes, bytearray, memoryview]) -> None:
        """Send some bytes. Raises HostError with what the engine says when it reads no more, and
        DiskError when it has no room."""
        stdin = self._stdin
        try:
            stdin.write(content)
        except BrokenPipeError as exc:
            raise self._failed() from exc
        self.sent += len(content)

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def finish(self) -> None:
        """All is sent: wait until it is loaded. Raises as `write`."""
        self.write(END_OF_TAR)
        try:
            self._stdin.close()
        except BrokenPipeError as exc:
            raise self._failed() from exc
        if self._process.wait(LOAD_ENDS_S):
            raise self._failed()

    def cancel(self) -> None:
        """Have nothing loaded: the tar that came has no end."""
        self._process.kill()

    def _failed(self) -> HfshipError:
        self._process.wait(LOAD_ENDS_S)
        said = b""
        if self._process.stdout:
            said = self._process.stdout.read()
        words = said.decode("utf-8", "replace").strip()
        text = printable(words[-_SHOWN:])
        engine = self._engine
        step = load_advice(engine, text)
        error: Type[HfshipError] = HostError
        if NO_SPACE in text:
            error = DiskError
        return error(f"{engine.name} {engine.version} did not load the image", text, step)


def load_advice(engine: EngineState, said: str) -> str:
    """What to do about what an engine said."""
    name = engine.name
    if NO_SPACE in said:
        place = name
        if engine.folder:
            place = engine.folder
        return f"free space for {place}, then run the same command again: nothing was loaded"
    if name == "docker" and ("invalid tar header" in said or "unexpected EOF" in said):
        # Debian's 20.10 says so of layers compressed by zstd, 26 and 28 load them.
        return (
            "update docker, if it is older than 23: it may not read layers that zstd compressed\n"
            "or load it elsewhere: --engine podman, --engine ctr"
        )
    return f"look at its log, and at its room: {name} system df"


class LoaderSink(Sink):
    """Passes the files of an image on as a tar, in the order in which they come."""

    def __init__(self, loader: Loader, skip: AbstractSet[str]) -> None:
        self._loader = loader
        self._skip = skip
        self.sent: Set[str] = set()

    def begin(self, entry: FileEntry) -> None:
        if entry.path in self._skip:
            return
        header = tar_header(entry.path, entry.size)
        self._loader.write(header)

    def write(self, entry: FileEntry, _: int, content: Union[bytes, bytearray, memoryview]) -> None:
        if entry.path in self._skip:
            return
        self._loader.write(content)

    def finish(self, entry: FileEntry) -> None:
        if entry.path in self._skip:
            return
        zeros = padding(entry.size)
        self._loader.write(zeros)
        self.sent.add(entry.path)


def load_archive(
    archive: Archive, facts: ImageFacts, options: LoadOptions, reporter: Reporter
) -> Loaded:
    """Load the image of an archive into an engine, unless it has it.

    Raises HostError for an engine that is not there, does not fit or refuses it; DamageError for an
    archive that is damaged: then nothing was loaded; NotFoundError for a delta whose other layers
    are nowhere; IntegrityError for an engine that has another image then.
    """
    began = time.monotonic()
    manifest = archive.manifest
    assert manifest is not None
    engine = engine_state(options.engine)
    before = held_image(engine, facts.reference)
    if before and before.is_image(facts):
        return Loaded(manifest, facts, before, engine, 0, 0, time.monotonic() - began)

    plan = _plan(archive, manifest, facts, engine, options)
    require_fitting(engine, facts, plan.size, options.force)
    layers = counted(len(facts.diff_ids), "layer")
    if plan.there:
        reporter.info(f"{facts.name}: {engine.name} has {len(plan.there)} of {layers}")
    sent = _send(archive, engine, plan, options, reporter)
    held = require_loaded(engine, facts)
    return Loaded(
        manifest=manifest,
        facts=facts,
        held=held,
        engine=engine,
        sent=sent,
        layers_sent=len(facts.diff_ids) - len(plan.there),
        seconds=time.monotonic() - began,
        before=before,
    )


# -- what is sent


@dataclass(frozen=True)
class _LoadPlan:
    """What of an image is sent: all but the files that the engine has (`there`), of which those
    `from_base` come from another version's folder; `size` in bytes."""

    there: AbstractSet[str]
    from_base: Dict[str, Path]
    entries: Dict[str, FileEntry]
    size: int


def _plan(
    archive: Archive,
    manifest: Manifest,
    facts: ImageFacts,
    engine: EngineState,
    options: LoadOptions,
) -> _LoadPlan:
    entries = {entry.path: entry for entry in manifest.files}
    there: Set[str] = set()
    count = layers_there(engine, facts)
    if count:
        there = _first_layers(archive, manifest, count)
    absent = [path for path in archive.delta.absent if path not in there]
    from_base = _layers_of_base(options.base, entries, absent)
    missing = [path for path in absent if path not in from_base]
    if missing:
        raise NotFoundError(
            f"{archive.files.name} is a delta: {counted(len(missing), 'file')} "
            "must come from an older version on site",
            f"{engine.name} does not have them as layers of another image: {shorten(missing, 3)}",
            "name the folder of that version with --base DIR, or bring the whole archive",
        )
    size = sum(entry.size for path, entry in entries.items() if path not in there)
    return _LoadPlan(frozenset(there), from_base, entries, size)


def _first_layers(archive: Archive, manifest: Manifest, count: int) -> Set[str]:
    """The paths of the first layers of an image, by its manifest.json; none when that is not in
    the archive, or says something else than the manifest of the archive."""
    layers = layer_paths(_content_of(archive, MANIFEST_JSON))
    known = {entry.path for entry in manifest.files}
    first = set(layers[:count])
    later = set(layers[count:])
    return (first & known) - later


def _content_of(archive: Archive, path: str) -> bytes:
    """A small file of an archive that can be read twice; empty for a stream."""
    if isinstance(archive, Streamed):
        return b""
    found = bytearray()
    from hfship.archive.zstd import load_zstd

    decompress = load_zstd().decompressor()
    for segment in archive.segments:
        if segment.entry is None or segment.entry.path != path:
            continue
        for frame in archive.frames:
            if frame.stop <= segment.start or frame.start >= segment.stop:
                continue
            content = archive.decode(frame, decompress)
            start = max(segment.start - frame.start, 0)
            found += content[start : segment.stop - frame.start]
    return bytes(found)


def _layers_of_base(
    base: Optional[Path], entries: Dict[str, FileEntry], absent: List[str]
) -> Dict[str, Path]:
    """Where the files that a delta leaves out lie in the folder of another version."""
    if base is None or not absent:
        return {}
    manifest = read_manifest(base)
    if manifest is None:
        raise NotFoundError(f"{base} has no manifest", "", "name the folder of an image")
    known = {entry.sha256: base / entry.path for entry in manifest.files}
    found = {}
    for path in absent:
        source = known.get(entries[path].sha256)
        if source:
            found[path] = source
    return found


# -- the pass


def _send(
    archive: Archive, engine: EngineState, plan: _LoadPlan, options: LoadOptions, reporter: Reporter
) -> int:
    """Send all that is planned; the bytes that went. Raises DamageError, HostError."""
    streamed = _as_stream(archive)
    argv = load_command(engine)
    pipe = subprocess.PIPE
    with started(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT) as process:
        loader = Loader(process, engine)
        try:
            sink = LoaderSink(loader, plan.there)
            check = StreamedCheck(streamed, sink, options.jobs, skip=plan.there)
            with reporter.stage(f"load into {engine.name}", check.size) as stage:
                damages = check.run(stage)
            if damages:
                loader.cancel()
                again = command_line("hfship", "unpack", archive.files.place)
                raise archive_error(archive, damages, again)
            _send_from_base(loader, plan)
            loader.finish()
        except BaseException:
            loader.cancel()
            raise
    return loader.sent


def _as_stream(archive: Archive) -> Streamed:
    """An archive as it is read from its first byte to its last. Raises IntegrityError where parts
    are missing."""
    if isinstance(archive, Streamed):
        return archive
    missing = [part.path.name for part in archive.parts if not part.path.exists()]
    if missing:
        step = "copy them again, then run the same command"
        raise IntegrityError(f"{archive.files.name} is not complete", shorten(missing), step)
    paths = [part.path for part in archive.parts]
    streamed = open_stream(archive.files, stream_of(pieces_of_files(paths)))
    if streamed.text != archive.text:
        what = f"{archive.files.name} changed while it was read"
        raise IntegrityError(what, "", "run the same command again")
    return replace(streamed, files=archive.files)


def _send_from_base(loader: Loader, plan: _LoadPlan) -> None:
    """The layers that lie in the folder of another version, each proven before it is sent."""
    for path, source in plan.from_base.items():
        entry = plan.entries[path]
        with disk_errors("read", source):
            if sha256_file(source, lambda _: None) != entry.sha256:
                what = f"{source} is not what its manifest says"
                raise IntegrityError(what, "", "name another folder with --base")
            loader.write(tar_header(path, entry.size))
            with opened_below(source.parent, source.name) as fd:
                for offset in range(0, entry.size, CHUNK):
                    loader.write(pread_exactly(fd, CHUNK, offset))
            loader.write(padding(entry.size))
