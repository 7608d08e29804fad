# SPDX-License-Identifier: Apache-2.0
"""Push: archives to another host, with what travels beside them.

While a file is on its way it is NAME.incomplete on the far side, and it gets its name there when
its SHA-256 was proven there. So a cut line, a killed rsync or a power cut leaves nothing that looks
complete, and rsync goes on behind the bytes that arrived (--append-verify: 1.4 s for the last
quarter of 2 GB; finding the same bytes by its delta algorithm, which --partial-dir would use, takes
7 s). What arrived wrong is sent again by that algorithm.

Promises: what has its name there is proven there; no byte that arrived right is sent twice. Never:
removes a file there; writes outside the folder that was named.
"""

from __future__ import annotations

import re
import shlex
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from hfship.archive.approval import bundles_beside
from hfship.archive.bundle import BUNDLE_SUFFIX, MODELS_FILE
from hfship.archive.custody import CUSTODY
from hfship.archive.files import BOM, model_of
from hfship.archive.signature import SIGNATURE
from hfship.base.errors import DiskError, IntegrityError, NotFoundError, UsageError
from hfship.base.files import INCOMPLETE, require_room, sha256_file
from hfship.base.processes import follow_program
from hfship.base.text import counted, human_bytes, human_seconds, shorten
from hfship.base.values import dataclass, replace
from hfship.ops.destination import ANSWER_S, NO_FILE_THERE, patience_for

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.errors import HfshipError
    from hfship.base.progress import Stage
    from hfship.base.report import Reporter
    from hfship.ops.destination import Destination

# Files at a time. ssh lets 2 MiB be on their way per connection: at 50 ms that is 40 MB/s, whatever
# the line could do.
PUSH_JOBS = 4
# A smaller limit is for one rsync at a time, so that the last files have all of it.
STREAM_BPS = 40_000_000

# Options of rsync(1), which writes into NAME.incomplete itself in both cases.
SEND_THE_REST = ("--append-verify",)
SEND_DIFFERENCES = ("--inplace", "--ignore-times", "--no-whole-file")
# The content came or not, and something else failed, as setting times and modes does on shares:
# the sum there decides.
_PARTLY_SENT = 23

_HASH_IN_PYTHON = """\
import hashlib, sys
digest = hashlib.sha256()
for piece in iter(lambda: sys.stdin.buffer.read(1 << 20), b""): digest.update(piece)
print(digest.hexdigest())
"""
# Scripts of POSIX sh for the far side: see Destination.run.
_PROBE_SCRIPT = """\
command -v rsync >/dev/null || echo 'rsync: not found'
mkdir -p -- {folder} && cd -- {folder} && test -w . || {{ echo 'cannot write there'; exit 73; }}
taken=
for name in {names}; do
  partial=$name{suffix}
  if test -d "$name"; then echo "$name{not_a_file}"; taken=yes; fi
  if test -h "$partial" || {{ test -e "$partial" && test ! -f "$partial"; }}
  then echo "$partial{not_a_file}"; taken=yes; fi
done
test -z "$taken" || exit 75
echo "at $(pwd -P)"
df -Pk . | tail -n 1 | sed 's/^/room /'
stat -c 'has %s %b %n' -- {names} {partials} 2>/dev/null
true
"""
# OpenSSL, which Python takes, too, has the processor's own instructions for SHA-256: a fourth of
# the time that sha256sum needs on Debian and Ubuntu.
_PROVE_SCRIPT = """\
cd -- {folder} || exit 73
{{ command -v openssl || command -v python3 || command -v sha256sum; }} >/dev/null \
|| {{ echo 'no sha256sum and no python3 there'; exit 74; }}
sum=$(openssl dgst -sha256 -r <{found} 2>/dev/null \
|| python3 -c {python} <{found} 2>/dev/null || sha256sum <{found})
case $sum in {sha256}*) ;; *) echo {found}': FAILED'; {refuse}; exit 1;; esac
{accept}
"""


@dataclass(frozen=True)
class PushFile:
    """A file to push: where it lies here, its bytes and its hex SHA-256."""

    path: Path
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name on the far side, once it is proven there."""
        return self.path.name

    @property
    def partial_name(self) -> str:
        """Its name on the far side until then."""
        return self.path.name + INCOMPLETE


@dataclass(frozen=True)
class PushedFile:
    """A file that is there, proven; `sent` bytes of it went over the line (0: it was there).

    `complaint` is what rsync said that does not change that: times that could not be set.
    """

    file: PushFile
    sent: int
    complaint: str = ""


@dataclass(frozen=True)
class PushResult:
    """What a push brought to a destination."""

    to: Destination
    files: Tuple[PushedFile, ...]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of all files."""
        sizes = [pushed.file.size for pushed in self.files]
        return sum(sizes)

    @property
    def sent(self) -> int:
        """Bytes that went over the line."""
        amounts = [pushed.sent for pushed in self.files]
        return sum(amounts)

    def text(self) -> str:
        """How much is there, how much of it was sent, and how fast."""
        count = counted(len(self.files), "file")
        size = human_bytes(self.size)
        text = f"pushed to {self.to}: {count}, {size}, SHA-256 of every file checked there"
        if self.sent:
            sent = human_bytes(self.sent)
            duration = human_seconds(self.seconds)
            speed = human_bytes(self.sent / self.seconds)
            text += f", sent {sent} in {duration} ({speed}/s)"

        there = self.size - self.sent
        if there > 0:
            text += f", {human_bytes(there)} were there already"
        return text

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "push"."""
        return {
            "to": str(self.to),
            "bytes": self.size,
            "bytes_sent": self.sent,
            "seconds": round(self.seconds, 2),
            "files": [
                {
                    "name": pushed.file.name,
                    "size": pushed.file.size,
                    "sha256": pushed.file.sha256,
                    "sent": pushed.sent,
                }
                for pushed in self.files
            ],
        }


# -- what is to be pushed


def files_to_push(archives: Iterable[ArchiveFiles], reporter: Reporter) -> List[PushFile]:
    """The files of archives, those that travel beside an archive before it.

    Raises NotFoundError for a file of an archive without a sum in NAME.sha256, UsageError for two
    files of one name.
    """
    found: Dict[str, PushFile] = {}
    for files in archives:
        sums = files.listed()
        _require_sums(files, sums, reporter)
        for path in [*_files_beside(files), *files.paths]:
            file = push_file(path, sums)
            known = found.setdefault(file.name, file)
            if known.sha256 != file.sha256:
                what = f"two different files are called {file.name}"
                raise UsageError(what, "", "push them one by one")

    return list(found.values())


def push_file(path: Path, sums: Mapping[str, str]) -> PushFile:
    """A file, with its sum as listed; those that travel beside an archive are hashed."""
    sha256 = sums.get(path.name)
    if not sha256:
        sha256 = sha256_file(path)
    place = path.absolute()
    status = path.stat()
    return PushFile(place, status.st_size, sha256)


def _require_sums(files: ArchiveFiles, sums: Mapping[str, str], reporter: Reporter) -> None:
    """Refuse an archive with files that have no sum; warn of those that have one and are not here.

    Raises NotFoundError.
    """
    names = [path.name for path in files.paths]
    unlisted = [name for name in names if name not in sums]
    if unlisted:
        model = files.name[: -len(".tar.zst")]
        raise NotFoundError(
            f"{files.sums} has no sum of {unlisted[0]}",
            "the far side could not be proven",
            f"hfship pack --force {model}, or copy {files.sums.name} beside it",
        )

    absent = sorted(set(sums) - set(names))
    if absent:
        reporter.warn(f"{files.name}: not here, and not pushed: {shorten(absent)}")


def _files_beside(files: ArchiveFiles) -> List[Path]:
    """What travels beside an archive, of that what is there."""
    beside = [
        files.sums,
        *bundles_beside(files),
        files.folder / f"{files.name}{BOM}",
        files.folder / f"{files.name}{BOM}{SIGNATURE}",
        files.folder / f"{files.name}{CUSTODY}",
        files.folder / "hfship.pyz",
        files.folder / "READ-ME-FIRST.txt",
        files.folder / f"{model_of(files.name)}{BUNDLE_SUFFIX}",
        files.folder / MODELS_FILE,
    ]
    return [path for path in beside if path.is_file()]


# -- what is there already


@dataclass(frozen=True)
class FarFile:
    """A file on the far side: its bytes, and the bytes of the disk that are allocated to it."""

    size: int
    allocated: int

    @property
    def stored(self) -> int:
        """Bytes of it that take no more room: rsync may have given it its size already."""
        return min(self.size, self.allocated)


NO_FILE = FarFile(0, 0)


@dataclass(frozen=True)
class FarSide:
    """What the probe found: the absolute path of the folder, bytes that are free there, and the
    files, by name, of those that were asked for."""

    folder: str
    free: int
    files: Mapping[str, FarFile]


# Lines of the probe: the folder; the KiB that are free, as `df -Pk` says; and of each file its
# bytes, its blocks of 512 bytes and its name.
_PROBED_FOLDER = re.compile(r"^at (/.*)$", re.MULTILINE)
_PROBED_ROOM = re.compile(r"^room .* (\d{1,18}) +\d+% ", re.MULTILINE)
_PROBED_FILE = re.compile(r"^has (\d{1,18}) (\d{1,18}) (.*)$", re.MULTILINE)


def parse_probe(output: str) -> Optional[FarSide]:
    """What the probe script printed; None when it did not get into the folder, or found no rsync.

    >>> parse_probe("at /data\\nroom /dev/sda1 900 100 800 12% /\\nhas 5 8 m.tar.zst")
    FarSide(folder='/data', free=819200, files={'m.tar.zst': FarFile(size=5, allocated=4096)})
    """
    folder = _PROBED_FOLDER.search(output)
    if not folder or not folder[1].isprintable() or "rsync: not found" in output:
        return None

    free = sys.maxsize  # where df says nothing, the disk itself will
    room = _PROBED_ROOM.search(output)
    if room:
        free = int(room[1]) * 1024
    files: Dict[str, FarFile] = {}
    for size, blocks, name in _PROBED_FILE.findall(output):
        allocated = int(blocks) * 512
        files[name] = FarFile(int(size), allocated)

    return FarSide(folder[1], free, files)


def room_for(file: PushFile, there: Mapping[str, FarFile]) -> int:
    """Bytes of the disk that a file will take there, beyond what is there of it."""
    whole = there.get(file.name, NO_FILE)
    partial = there.get(file.partial_name, NO_FILE)
    stored = partial.stored
    if whole.size == file.size:
        stored = max(stored, whole.stored)
    return max(0, file.size - stored)


class RsyncOutput:
    """Follows what one rsync prints (--info=progress2,stats2): progress, and what was sent.

    `there` are the bytes of the file that an earlier run sent. `literal` becomes the bytes of the
    file that went over the line.
    """

    def __init__(self, stage: Stage, there: int) -> None:
        self._stage = stage
        self.position = there  # bytes of the file that the stage counts
        self.literal = 0

    def read_line(self, line: str) -> bool:
        """Take a line; False for one that is not of rsync's report, so an error."""
        progress = re.match(r" *(\d{1,18}) +\d+% ", line)
        if progress:
            # rsync begins to count at 0, and goes on behind what was there.
            position = max(self.position, int(progress[1]))
            self._stage.add(position - self.position)
            self.position = position
            return True

        literal = re.match(r"Literal data: (\d{1,18})", line)
        if literal:
            self.literal = int(literal[1])
        return bool(re.match(r"[A-Z][\w ()]+: [\d.]|sent \d|total size", line))


# -- the push


@dataclass(frozen=True)
class _Attempt:
    """One way to send a file: options of rsync, and the bytes there that are not sent again."""

    options: Tuple[str, ...]
    there: int


@dataclass(frozen=True)
class _Sent:
    """What came of an attempt: bytes that went over the line, and what failed beside the content,
    or with it."""

    size: int
    failure: Optional[HfshipError]

    @property
    def complaint(self) -> str:
        """What rsync said of it first."""
        if not self.failure:
            return ""
        first, *_ = self.failure.why.splitlines()
        return first


class Push:
    """One push: sees what is there, sends what is not, and proves each file there.

    Threads share it. `streams` is the number of rsyncs that run at a time, `options` are those of
    each, and `stop` ends what runs.
    """

    def __init__(
        self,
        to: Destination,
        files: Sequence[PushFile],
        stage: Stage,
        stop: threading.Event,
        streams: int,
        options: Sequence[str],
    ) -> None:
        self._to = to
        self._files = files
        self._stage = stage
        self._stop = stop
        self._line = threading.Semaphore(streams)
        self._options = options
        self._there: Mapping[str, FarFile] = {}

    def prepare(self) -> None:
        """Make the folder, see what is there, and refuse when the rest has no room.

        Raises HfshipError.
        """
        far = self._probe()
        self._to = replace(self._to, folder=far.folder)
        self._there = far.files
        if not self._to.host:
            folder = Path(far.folder)
            largest = max(file.size for file in self._files)
            step = "hfship pack --split fat32, then push again"
            require_room(folder, 0, largest, "push", step)

        needed = sum(room_for(file, far.files) for file in self._files)
        missing = needed - far.free
        if missing > 0:
            free = human_bytes(far.free)
            raise DiskError(
                f"cannot push: {self._to} has {free} free, {human_bytes(needed)} needed",
                f"{human_bytes(missing)} are missing",
                "free space there, or choose another folder",
            )

    def _probe(self) -> FarSide:
        script = _PROBE_SCRIPT.format(
            folder=shlex.quote(self._to.folder),
            names=shlex.join(file.name for file in self._files),
            partials=shlex.join(file.partial_name for file in self._files),
            suffix=INCOMPLETE,
            not_a_file=NO_FILE_THERE,
        )
        done = self._to.run(script, self._stop)
        far = parse_probe(done.out)
        if done.code or far is None:
            raise self._to.error(done)

        return far

    def bring(self, file: PushFile) -> PushedFile:
        """Have a file there, proven.

        Raises IntegrityError when it arrives wrong twice, and what Destination.error returns.
        """
        whole = self._there.get(file.name)
        if whole and whole.size == file.size and self._is_proven(file, file.name):
            self._stage.skip(file.size)
            return PushedFile(file, 0)

        partial = self._there.get(file.partial_name, NO_FILE)
        attempts = [_Attempt(SEND_DIFFERENCES, there=0)]
        if partial.size < file.size and not whole:
            first = _Attempt(SEND_THE_REST, there=partial.size)
            attempts.insert(0, first)

        size = 0
        for attempt in attempts:
            sent = self._send(file, attempt)
            size += sent.size
            if self._is_proven(file, file.partial_name):
                return PushedFile(file, size, sent.complaint)
            if sent.failure:
                raise sent.failure
            self._stage.add(-file.size)

        raise IntegrityError(
            f"{file.name} arrives damaged at {self._to}",
            f"its SHA-256 is not {file.sha256}",
            f"hfship verify {file.path}, then look at the disk there",
        )

    def _is_proven(self, file: PushFile, found: str) -> bool:
        """Prove a file there, which has the name `found`.

        One that is as it should be gets its name, a wrong one loses it.
        """
        name = shlex.quote(file.name)
        partial = shlex.quote(file.partial_name)
        if found == file.name:
            accept = "true"
            refuse = _rename(name, partial)
        else:
            accept = f"sync -- {partial} 2>/dev/null; {_rename(partial, name)}"
            refuse = "true"

        script = _PROVE_SCRIPT.format(
            folder=shlex.quote(self._to.folder),
            python=shlex.quote(_HASH_IN_PYTHON),
            sha256=file.sha256,
            found=shlex.quote(found),
            accept=accept,
            refuse=refuse,
        )
        done = self._to.run(script, self._stop, file.size)
        if done.code and ": FAILED" not in done.out:
            raise self._to.error(done)

        return done.code == 0

    def _send(self, file: PushFile, attempt: _Attempt) -> _Sent:
        """One rsync. Raises what Destination.error returns when nothing of it can be of use."""
        argv = [
            "rsync",
            "--times",
            "--info=progress2,stats2",
            "--no-h",
            *attempt.options,
            *self._options,
        ]
        if self._to.host:
            argv += ["-s", "-e", shlex.join(self._to.ssh)]
        argv += [str(file.path), self._to.path_of(file.partial_name)]
        output = RsyncOutput(self._stage, attempt.there)
        self._stage.skip(attempt.there)
        with self._line:
            done = follow_program(
                argv, self._stop, on_line=output.read_line, patience_s=patience_for(file.size)
            )

        failure = None
        if done.code:
            failure = self._to.error(done)
            if done.code != _PARTLY_SENT:
                raise failure

        self._stage.add(file.size - output.position)
        return _Sent(output.literal, failure)


def _rename(source: str, target: str) -> str:
    """A line of a script that gives a file a name, and not into a folder of that name."""
    refuse = f"echo {target}{shlex.quote(NO_FILE_THERE)}; exit 75"
    return f"if test -d {target}; then {refuse}; fi; mv -f -- {source} {target}"


def streams_of(jobs: int, limit_bps: int) -> Tuple[int, List[str]]:
    """(how many rsyncs run at a time, the options of each), for a limit on all, 0 for none.

    >>> streams_of(4, 0), streams_of(4, 100_000_000)
    ((4, []), (2, ['--bwlimit=48828']))
    """
    if not limit_bps:
        return jobs, []
    streams = min(jobs, max(1, limit_bps // STREAM_BPS))
    share = max(1, limit_bps // streams // 1024)
    return streams, [f"--bwlimit={share}"]  # KiB per second


def push(
    to: Destination, files: Sequence[PushFile], jobs: int, limit_bps: int, reporter: Reporter
) -> PushResult:
    """Bring all files to where they go, `jobs` at a time, each proven there.

    `limit_bps` is in bytes per second of all, 0 for none. rsync cannot change its limit while it
    runs: so each has a fixed share, and while a file is proven the next one is sent. Raises
    HfshipError.
    """
    streams, options = streams_of(jobs, limit_bps)
    started = time.monotonic()
    stop = threading.Event()
    size = sum(file.size for file in files)
    with reporter.stage("push", size) as stage:
        run = Push(to, files, stage, stop, streams, options)
        with reporter.clock(f"looking at {to}", ANSWER_S):
            run.prepare()
        stage.restart_clock()
        with ThreadPoolExecutor(jobs) as threads:
            try:
                arrived = threads.map(run.bring, files)
                pushed = tuple(stage.each(arrived, len(files)))
            finally:
                stop.set()

    for file in pushed:
        if file.complaint:
            reporter.warn(f"{file.complaint}; every SHA-256 there is right, so all has arrived")
            break
    seconds = time.monotonic() - started
    return PushResult(to, pushed, seconds)
