"""Local state as somebody else may leave it: leases, locks, records, journals, proofs, manifests, tokens.

Two tables, each for every reader: things that are no files, and contents that are none of ours. A reader says so, or
goes on as if nothing were there; it waits for nothing, follows nothing, and takes no memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Program
from fuzz.conftest import fuzzed
from hfship.archive.pack_journal import claim
from hfship.archive.tree import Journal, Tree
from hfship.base.errors import HfshipError
from hfship.base.files import filesystem_of
from hfship.base.locks import FolderLock
from hfship.base.manifest import read_manifest
from hfship.base.settings import find_token, read_token_file
from hfship.hub.partial import PartialFile, Transfer
from hfship.hub.protocol import RemoteFile
from hfship.hub.verified import VerifiedLog
from hfship.ops.jobs import JobRecord, expire_jobs, free_name, parse_job, read_jobs
from hfship.ops.watch import job_row, watch_lines

REMOTE = RemoteFile("w.bin", 1 << 22, "", "a" * 64)
SECONDS = 5  # of the processor, that a reader may take
PATIENCE_S = 120  # for one that waits
MEMORY = 400 << 20  # bytes that it may take


# -- the readers: what they read, below a folder, and how


def read_lease(folder: Path) -> None:
    with FolderLock(folder):
        pass


def read_proofs(folder: Path) -> None:
    log = VerifiedLog(folder)
    assert log.sha256_of(REMOTE) is None
    assert all(isinstance(mark, str) for mark in log.marks_of(REMOTE))


def read_partial(folder: Path) -> None:
    transfer = _transfer(folder)
    with contextlib.suppress(OSError):  # where the folder leads elsewhere
        os.close(transfer.open_work_file(os.O_RDWR | os.O_CREAT))
        os.truncate(transfer.work_file, REMOTE.size)
    arrived = PartialFile(transfer, filesystem_of(folder)).found()
    assert all(0 <= start < stop <= REMOTE.size for start, stop in arrived.spans)


def _transfer(folder: Path) -> Transfer:
    return Transfer(REMOTE, None, folder, VerifiedLog(folder))  # type: ignore[arg-type]


def read_unpack_journal(folder: Path) -> None:
    with Tree(folder) as tree:
        journal = Journal(tree)
        assert journal.read([]) == {}
        journal.close(remove=False)


def read_pack_journal(folder: Path) -> None:
    with claim(folder / "m.tar.zst.incomplete", journal=True):
        pass


def read_records(folder: Path) -> None:
    complaints: list = []
    jobs = read_jobs([folder], complaints.append)
    assert "".join(complaints).isprintable()
    assert "".join(watch_lines(jobs, 0, 200, 50)).isprintable()
    for job in jobs:
        json.dumps(job_row(job))
    expire_jobs(folder)
    free_name(folder, JobRecord(name="fetch-m"))


def read_env_token(folder: Path) -> None:
    find_token({"HF_TOKEN_PATH": str(folder / "token")})


READERS: Dict[str, Callable[[Path], object]] = {
    ".hfship/lease": read_lease,
    ".hfship/lock": read_lease,
    ".hfship/verified.jsonl": read_proofs,
    ".hfship/manifest.json": read_manifest,
    ".hfship/journal": read_unpack_journal,
    "PARTIAL": read_partial,
    "m.tar.zst.incomplete": read_pack_journal,
    "fetch-m.json": read_records,
    "fetch-m.log": read_records,
    "token": read_env_token,
    "token file": lambda folder: read_token_file(folder / "token file"),
}


def place_of(reader: str, folder: Path) -> Path:
    """Where a reader finds what it reads."""
    path = folder / reader
    if reader == "PARTIAL":
        path = folder / _transfer(folder).journal_path("json")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Neither long nor much memory; an error for operators is an answer."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s, or waited")

    signals = (signal.SIGALRM, signal.SIGPROF)
    before = [signal.signal(number, too_long) for number in signals]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    signal.alarm(PATIENCE_S)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    except HfshipError as exc:
        assert len(exc.text()) < 5000
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


# -- what is no file of ours


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a long path is none for a socket
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 42)


def _linked_parent(path: Path) -> None:
    """The folder that it lies in leads elsewhere."""
    if path.parent.name in ("partial", ".hfship"):
        path.parent.rmdir()
        path.parent.symlink_to(path.parents[2] / "elsewhere")


TRAPS: Dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "sparse": _sparse,
    "folder": os.mkdir,
    "socket": _socket,
    "link": lambda path: path.symlink_to(_outside(path) / "secret"),
    "dangling link": lambda path: path.symlink_to(_outside(path) / "new"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "linked parent": _linked_parent,
    "empty": Path.touch,
}


def _outside(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "folder").parent


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_of_ours_is_left_alone(reader: str, trap: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "folder"
    path = place_of(reader, folder)
    TRAPS[trap](path)
    with bounded():
        READERS[reader](folder)
    assert (tmp_path / "secret").read_text() == "secret"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "folder", "secret"]
    assert os.listdir(tmp_path / "elsewhere") == []


# -- what is none of our content

CONTENTS: Dict[str, bytes] = {
    "nesting": b"[" * 10**6,
    "nesting of objects": b'{"a":' * 10**5,
    "closed nesting": b"[" * 500 + b"]" * 500,
    "infinity": b'{"pid": 1e999, "size": Infinity, "updated_at": -Infinity}',
    "not a number": b'{"format": "hfship-job/1", "rate": NaN}',
    "digits": b'{"pid": ' + b"9" * 10**6 + b"}",
    "negative": b'{"pid": -1, "host": "", "start": "", "boot_id": ""}',
    "no pid": b'{"pid": 0, "host": [], "start": {}, "boot_id": 1}',
    "surrogates": b'{"host": "\\ud800", "pid": 1, "name": "\\udcff", "path": "\\ud800"}',
    "other types": b'[1, 2.5, null, true, "text"]\n"text"\n1\nnull\n{}\n',
    "no utf-8": b'\xff\xfe{"\xc3": 1}',
    "zeros": bytes(1 << 16),
    "many lines": b"{}\n" * 10**4,
    "many values": b"[" + b"{}," * 10**6 + b"{}]",
    "one long line": b"x" * (1 << 24),
    "escapes": b'{"host": "\x1b[2J\x9b", "pid": 1, "format": "hfship-job/1", "name": "\x1b"}',
    "keys that are none of ours": b'{"__class__": 1, "format": {}, "files": {}, "source": []}',
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_content_of_ours_is_no_trouble(
    reader: str, content: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    place_of(reader, folder).write_bytes(CONTENTS[content])
    with bounded():
        READERS[reader](folder)


# -- generated

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["a" * 64, "w.bin", "\x1b[2J", "hfship-job/1", "running", "../x"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
FIELDS: Dict[str, st.SearchStrategy] = {
    "lease": st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("host", "pid", "start", "boot_id"), VALUES)
    ),
    "proof": st.fixed_dictionaries(
        {"path": st.just("w.bin") | VALUES, "etag": st.just("a" * 64) | VALUES},
        optional={
            name: VALUES | st.integers(0, 9)
            for name in ("device", "inode", "size", "mtime_ns", "ctime_ns", "sha256", "marks")
        },
    ),
    "partial": st.fixed_dictionaries(
        {
            "format": st.just("hfship-partial/1"),
            "path": st.just(REMOTE.path),
            "size": st.just(REMOTE.size),
            "etag": st.just(REMOTE.etag),
            "boot_id": VALUES,
            "synced": st.lists(st.tuples(SCALARS, SCALARS)) | VALUES,
            "written": st.lists(st.tuples(SCALARS, SCALARS)) | VALUES,
        }
    ),
    "record": st.fixed_dictionaries(
        {"format": st.just("hfship-job/1"), "name": st.just("fetch-m")},
        optional={name: VALUES for name in vars(JobRecord()) if name != "name"},
    ),
}
GENERATED = {
    "lease": ".hfship/lease",
    "proof": ".hfship/verified.jsonl",
    "partial": "PARTIAL",
    "record": "fetch-m.json",
}


@pytest.mark.parametrize("kind", GENERATED)
def test_generated_state_is_believed_or_not(kind: str, tmp_path: Path) -> None:
    reader = GENERATED[kind]
    folder = tmp_path / "folder"
    path = place_of(reader, folder)

    @given(st.lists(FIELDS[kind], min_size=1, max_size=3))
    @fuzzed(examples=30)
    def check(rows: list) -> None:
        path.write_text("\n".join(json.dumps(row) for row in rows))
        with bounded():
            READERS[reader](folder)

    check()


@given(FIELDS["record"])
@fuzzed(examples=60)
def test_a_record_has_the_types_of_its_fields(value: Dict[str, Any]) -> None:
    try:
        record = parse_job(json.dumps(value).encode())
    except ValueError:
        return
    for name, usual in vars(JobRecord()).items():
        found = getattr(record, name)
        if usual is not None and not isinstance(usual, float):
            assert isinstance(found, type(usual))


# -- many folders, few descriptors


def test_more_folders_than_open_files(pyz: Program, tmp_path: Path) -> None:
    """As 1,500 folders at `ulimit -n 1024`."""
    count, most = 150, 96
    limited = Program(["bash", "-c", f'ulimit -n {most}; exec "$@"', "-", *pyz.argv], pyz.home)
    model = tmp_path / "m"
    for number in range(count):
        (model / f"d{number}").mkdir(parents=True)
        (model / f"d{number}" / "x").write_text("x")
        partial = tmp_path / f"models/m{number}/.hfship/partial/0.json"
        partial.parent.mkdir(parents=True)
        partial.write_text("{}")
        os.utime(partial, (0, 0))
    limited("pack", model, "-o", tmp_path / "out")
    limited("verify", tmp_path / "out/m.tar.zst")
    limited("unpack", tmp_path / "out/m.tar.zst", "-o", tmp_path / "far")
    assert len(list((tmp_path / "far/m").iterdir())) == count + 1
    limited("clean", "--yes", tmp_path / "models")
    assert not list(tmp_path.glob("models/*/.hfship/partial/0.json"))
