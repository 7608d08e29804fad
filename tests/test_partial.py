"""Files under way and the records of proven ones: what of an earlier run is believed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

from hfship.base.below import owner_in
from hfship.base.errors import DiskError, IntegrityError
from hfship.base.files import CHUNK, Filesystem, filesystem_of, write_below
from hfship.base.locks import boot_id
from hfship.base.manifest import MANIFEST_PATH, Source
from hfship.hub.partial import (
    Finished,
    Journal,
    PartialFile,
    Transfer,
    accept_file,
    finish_small,
    is_ours,
    read_journal,
)
from hfship.hub.protocol import RemoteFile
from hfship.hub.ranges import BLOCK_SIZE, SMALL_FILE
from hfship.hub.verified import FileHasher, VerifiedLog

SIZE = SMALL_FILE + 100
SOURCE = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
REMOTE = RemoteFile("sub/w.bin", SIZE, "", "a" * 64)
Spans = List[Tuple[int, int]]


@pytest.fixture
def transfer(tmp_path: Path) -> Transfer:
    """A file of which the work file is there."""
    transfer = Transfer(REMOTE, SOURCE, tmp_path, VerifiedLog(tmp_path))
    transfer.work_file.parent.mkdir(parents=True)
    with transfer.work_file.open("wb") as stream:
        stream.truncate(SIZE)
    return transfer


def journal(**changes: Any) -> Dict[str, Any]:
    """The journal of a run that was killed on this boot, with some fields changed."""
    row: Dict[str, Any] = {
        "format": "hfship-partial/1",
        "path": REMOTE.path,
        "size": SIZE,
        "etag": REMOTE.etag,
        "boot_id": boot_id(),
        "synced": [[0, 10]],
        "written": [[0, 20], [30, 40]],
    }
    return {**row, **changes}


def found(transfer: Transfer) -> Spans:
    return PartialFile(transfer, filesystem_of(transfer.folder)).found().spans


WRITTEN, SYNCED = [(0, 20), (30, 40)], [(0, 10)]
DURABLE: Dict[str, Tuple[Dict[str, Any], Spans]] = {
    "of this boot": ({}, WRITTEN),
    "of another boot": ({"boot_id": "another"}, SYNCED),
    "of no known boot": ({"boot_id": ""}, SYNCED),
    "beyond the file": ({"written": [[-5, 7], [SIZE - 1, SIZE + 9]]}, [(0, 7), (SIZE - 1, SIZE)]),
    "in any order": ({"written": [[30, 40], [0, 20]]}, WRITTEN),
    "of another format": ({"format": "hfship-partial/2"}, []),
    "of another file": ({"path": "w.bin"}, []),
    "of another size": ({"size": SIZE + 1}, []),
    "of other content": ({"etag": "b" * 64}, []),
    "with no ranges": ({"written": None}, []),
    "with ranges that are none": ({"written": [[1, 2, 3]]}, []),
    "with a text as an end": ({"written": [[0, "x"]]}, []),
    "with an endless range": ({"written": [[0, float("inf")]]}, []),
}


@pytest.mark.parametrize("case", DURABLE)
def test_a_journal_is_believed_as_far_as_it_can_be_true(case: str, transfer: Transfer) -> None:
    changes, spans = DURABLE[case]
    (transfer.folder / transfer.journal_path("json")).write_text(json.dumps(journal(**changes)))
    assert found(transfer) == spans


NOW: Dict[str, Tuple[str, Spans]] = {
    "of this boot": (json.dumps(journal(written=[[0, 50]])), [(0, 50)]),
    "of another boot": (json.dumps(journal(written=[[0, 50]], boot_id="another")), WRITTEN),
    "of no known boot": (json.dumps(journal(written=[[0, 50]], boot_id="")), WRITTEN),
    "emptied by a power cut": ("", WRITTEN),
    "a list": ("[]", WRITTEN),
}


@pytest.mark.parametrize("case", NOW)
def test_the_younger_journal_counts_on_this_boot_alone(case: str, transfer: Transfer) -> None:
    text, spans = NOW[case]
    (transfer.folder / transfer.journal_path("now")).write_text(text)
    (transfer.folder / transfer.journal_path("json")).write_text(json.dumps(journal()))
    assert found(transfer) == spans


def test_a_journal_of_a_file_with_another_size_counts_for_nothing(transfer: Transfer) -> None:
    (transfer.folder / transfer.journal_path("json")).write_text(json.dumps(journal()))
    os.truncate(transfer.work_file, SIZE - 1)
    assert found(transfer) == []
    transfer.work_file.unlink()
    assert found(transfer) == []


def test_what_is_published_is_found(transfer: Transfer) -> None:
    partial = PartialFile(transfer, filesystem_of(transfer.folder))
    partial.create()
    partial.sync([(0, 10)])
    partial.publish([(0, 20)])
    assert found(transfer) == [(0, 20)]
    assert json.loads((transfer.folder / transfer.journal_path("now")).read_text())["synced"] == [
        [0, 10]
    ]
    (transfer.folder / transfer.journal_path("now")).write_text("")
    assert found(transfer) == [(0, 10)]
    partial.start_over()
    assert found(transfer) == []


class SlowDisk:
    """A disk whose sync lasts until `free` is set: of what arrived, or of the durable journal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of: str = "what arrived") -> None:
        self.busy, self.free = threading.Event(), threading.Event()
        if of == "what arrived":
            monkeypatch.setattr(os, "fdatasync", self._sync)
        else:
            monkeypatch.setattr("hfship.hub.partial.write_below", self._write)

    def _sync(self, _: int) -> None:
        self.busy.set()
        assert self.free.wait(20)

    def _write(self, *arguments: Any, durable: bool) -> None:
        if durable:
            self._sync(0)
        write_below(*arguments, durable=durable)

    @contextlib.contextmanager
    def syncing(self, partial: PartialFile, spans: Any) -> Iterator[None]:
        """While a thread has `spans` synced; at the end it is done with it."""
        thread = threading.Thread(target=partial.sync, args=(spans,))
        thread.start()
        assert self.busy.wait(20)
        try:
            yield
        finally:
            self.free.set()
            thread.join(20)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("of", ["what arrived", "the journal"])
def test_what_arrives_while_the_disk_syncs_is_published(
    of: str, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialFile(transfer, filesystem_of(transfer.folder))
    partial.create()
    with SlowDisk(monkeypatch, of).syncing(partial, [(0, 10)]):
        assert found(transfer) == [(0, 10)], "before the disk has it, for a kill"
        publisher = threading.Thread(target=partial.publish, args=([(0, 20)],))
        publisher.start()
        publisher.join(10)
        assert found(transfer) == [(0, 20)]
    durable = json.loads((transfer.folder / transfer.journal_path("json")).read_text())
    written = {"what arrived": [[0, 20]], "the journal": [[0, 10]]}
    assert (durable["synced"], durable["written"]) == ([[0, 10]], written[of])
    assert found(transfer) == [(0, 20)]


@pytest.mark.parametrize("end", ["commit", "start_over"])
def test_no_durable_journal_comes_after_the_end_of_its_file(
    end: str, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialFile(transfer, filesystem_of(transfer.folder))
    partial.create()
    with SlowDisk(monkeypatch, "the journal").syncing(partial, [(0, 10)]):
        ending = threading.Thread(target=getattr(partial, end))
        ending.start()
        ending.join(0.2)
        assert ending.is_alive(), "it waits for the journal that is being written"
    ending.join(20)
    assert found(transfer) == []


def test_a_sync_says_nothing_of_what_was_forgotten_meanwhile(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialFile(transfer, filesystem_of(transfer.folder))
    partial.create()
    with SlowDisk(monkeypatch).syncing(partial, [(0, 10)]):
        partial.start_over()
    assert found(transfer) == [] and not (transfer.folder / transfer.journal_path("json")).exists()


@pytest.mark.parametrize("looks", [True, False])
def test_no_journal_of_another_size_outlives_a_small_file(looks: bool, tmp_path: Path) -> None:
    """It was larger at the commit whose fetch was broken off."""
    content = b"x" * 100
    remote = RemoteFile("w.bin", 100, "", hashlib.sha256(content).hexdigest())
    transfer = Transfer(remote, SOURCE, tmp_path, VerifiedLog(tmp_path))
    partial = PartialFile(transfer, filesystem_of(tmp_path))
    transfer.work_file.parent.mkdir(parents=True)
    left = [tmp_path / transfer.journal_path(suffix) for suffix in ("now", "json")]
    for path in left:
        path.write_text(json.dumps(journal(path="w.bin")))
    if looks:
        assert partial.found().spans == []
    os.pwrite(partial.create(), content, 0)
    partial.commit()
    assert (tmp_path / "w.bin").read_bytes() == content
    assert not any(path.exists() for path in left)


# -- small files, which their readers finish

CONTENT = b"x" * 100


def small(folder: Path, content: bytes, outdates: bool = False) -> Transfer:
    """A file of CONTENT, of whose bytes `content` came."""
    remote = RemoteFile("sub/w.json", 100, "", hashlib.sha256(CONTENT).hexdigest())
    transfer = Transfer(remote, SOURCE, folder, VerifiedLog(folder), outdates)
    transfer.work_file.parent.mkdir(parents=True)
    transfer.work_file.write_bytes(content)
    return transfer


def finished(transfer: Transfer, journaled: bool = True) -> Optional[Finished]:
    fd = transfer.open_work_file(os.O_RDWR)
    try:
        return finish_small(transfer, fd, journaled)
    finally:
        os.close(fd)


@pytest.mark.parametrize("journaled", [True, False])
def test_a_small_file_is_proven_and_named_where_it_came(tmp_path: Path, journaled: bool) -> None:
    transfer = small(tmp_path, CONTENT, outdates=True)
    (tmp_path / MANIFEST_PATH).write_text("{}")
    found = finished(transfer, journaled)
    assert found is not None and found.sha256 == transfer.remote.sha256
    assert transfer.target.read_bytes() == CONTENT and not transfer.work_file.exists()
    assert not (tmp_path / MANIFEST_PATH).exists()
    note = tmp_path / ".cache/huggingface/download/sub/w.json.metadata"
    assert note.read_text().splitlines()[:2] == [SOURCE.commit, transfer.remote.etag]
    assert VerifiedLog(tmp_path).sha256_of(transfer.remote) is None
    assert found.proof is not None
    transfer.log.put(found.proof)
    for log in (transfer.log, VerifiedLog(tmp_path)):
        assert log.sha256_of(transfer.remote) == found.sha256


def test_a_small_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = small(tmp_path, CONTENT)
    synced: List[Tuple[int, bool]] = []
    fsync = os.fsync

    def seen(fd: int) -> None:
        synced.append((os.fstat(fd).st_ino, transfer.target.exists()))
        fsync(fd)

    inode = transfer.work_file.stat().st_ino
    monkeypatch.setattr("os.fsync", seen)
    finished(transfer)
    assert synced[0] == (inode, False)
    assert (transfer.target.parent.stat().st_ino, True) in synced


@pytest.mark.parametrize("content", [b"y" * 100, b"x" * 99, b""])
def test_a_small_file_that_is_wrong_is_left_to_who_reports(tmp_path: Path, content: bytes) -> None:
    transfer = small(tmp_path, content)
    assert finished(transfer) is None
    assert transfer.work_file.read_bytes() == content and not transfer.target.exists()


def test_nothing_is_remembered_of_a_small_file_that_another_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = small(tmp_path, CONTENT)
    publish = Transfer.publish

    def slower(self: Transfer, journaled: bool) -> None:
        publish(self, journaled)
        self.target.unlink()
        self.target.write_bytes(b"another's")

    monkeypatch.setattr(Transfer, "publish", slower)
    assert finished(transfer) == Finished(transfer.remote.sha256 or "", None)


@pytest.mark.parametrize("finish", ["by its reader", "by its hash thread"])
def test_what_a_killed_run_left_of_a_larger_file_is_no_tail_of_a_small_one(
    tmp_path: Path, finish: str
) -> None:
    """That of another commit, killed before its first journal."""
    transfer = small(tmp_path, CONTENT + b"left")
    if finish == "by its reader":
        assert finished(transfer)
    else:
        partial = PartialFile(transfer, filesystem_of(tmp_path))
        partial.hash_up_to(100)
        partial.commit()
    assert transfer.target.read_bytes() == CONTENT


def test_a_sync_leaves_no_journal_of_a_file_that_is_finished(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialFile(transfer, filesystem_of(transfer.folder))
    partial.create()
    with SlowDisk(monkeypatch).syncing(partial, [(0, 10)]):
        partial.commit()
    assert transfer.target.exists() and not list(transfer.folder.glob(".hfship/partial/*"))


def test_what_an_earlier_run_left_is_forgotten_too(transfer: Transfer) -> None:
    (transfer.folder / transfer.journal_path("now")).write_text(json.dumps(journal()))
    partial = PartialFile(transfer, filesystem_of(transfer.folder))
    partial.found()
    partial.create()
    partial.start_over()
    assert found(transfer) == []


def test_a_file_that_becomes_shorter_is_an_error(transfer: Transfer) -> None:
    partial = PartialFile(transfer, filesystem_of(transfer.folder))
    partial.create()
    os.truncate(transfer.work_file, 10)
    with pytest.raises(IntegrityError, match="became shorter"):
        partial.hash_up_to(SIZE)


# -- proven files


def proven(folder: Path, content: bytes) -> Tuple[RemoteFile, VerifiedLog]:
    """A file with its line in the log of a folder."""
    remote = RemoteFile("w.bin", len(content), "", hashlib.sha256(content).hexdigest())
    path = folder / remote.path
    path.write_bytes(content)
    hasher = FileHasher(remote)
    hasher.update(content)
    assert hasher.matches()
    log = VerifiedLog(folder)
    log.add(remote, path.stat(), hasher)
    return remote, log


def test_a_proof_holds_until_the_file_or_the_hub_changes(tmp_path: Path) -> None:
    remote, log = proven(tmp_path, b"content")
    path = tmp_path / remote.path
    other = RemoteFile(remote.path, remote.size, "", "b" * 64)
    for each in (log, VerifiedLog(tmp_path)):
        assert each.sha256_of(remote) == remote.sha256
        assert each.sha256_of(other) is None and each.marks_of(other) == []
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert log.sha256_of(remote) is None
    path.unlink()
    assert log.sha256_of(remote) is None


@pytest.mark.parametrize("torn", [b'{"path": "w.bin", "si', b"[]", b'{"path": "w.bin"}', b"\xff"])
def test_a_torn_line_is_passed_over(torn: bytes, tmp_path: Path) -> None:
    remote, _ = proven(tmp_path, b"content")
    lines = tmp_path / ".hfship" / "verified.jsonl"
    lines.write_bytes(lines.read_bytes() + torn)
    assert VerifiedLog(tmp_path).sha256_of(remote) == remote.sha256


def test_of_two_lines_the_later_one_counts(tmp_path: Path) -> None:
    proven(tmp_path, b"older")
    remote, _ = proven(tmp_path, b"newer")
    assert VerifiedLog(tmp_path).sha256_of(remote) == hashlib.sha256(b"newer").hexdigest()


def test_marks_are_of_whole_blocks_however_the_bytes_come() -> None:
    content = os.urandom(1000) * (2 * BLOCK_SIZE // 1000 + 1)
    remote = RemoteFile("w.bin", len(content), "", hashlib.sha256(content).hexdigest())
    marks = [hashlib.sha256(content[: n * BLOCK_SIZE]).hexdigest()[:16] for n in (1, 2)]
    for step in (len(content), 3 << 20):
        hasher = FileHasher(remote)
        for start in range(0, len(content), step):
            hasher.update(content[start : start + step])
        assert hasher.matches() and hasher.marks == marks


def test_a_copy_of_a_hash_goes_on_by_itself() -> None:
    for content_hash in ({"sha256": hashlib.sha256(b"ab").hexdigest()}, {"sha256": None}):
        blob = hashlib.sha1(b"blob 2\0ab").hexdigest()
        first = FileHasher(RemoteFile("w", 2, blob, content_hash["sha256"]))
        first.update(b"a")
        second = first.copy()
        second.update(b"x")
        first.update(b"b")
        assert first.matches() and not second.matches()


# -- whose a file is


@pytest.mark.parametrize(
    "put, ours",
    [
        (lambda path: path.write_bytes(b"12345"), True),
        (lambda path: path.write_bytes(b"1234"), False),
        (lambda path: path.symlink_to("sound"), False),
        (os.mkfifo, False),
        (lambda _: None, False),
        (lambda path: (path.write_bytes(b"12345"), path.chmod(0o666)), False),
    ],
    ids=["a file", "of another size", "a link", "a pipe", "nothing", "open to all"],
)
def test_a_file_in_its_place_is_ours_if_nobody_else_can_change_it(
    put: Callable[[Path], Any], ours: bool, tmp_path: Path
) -> None:
    (tmp_path / "sound").write_bytes(b"12345")
    put(tmp_path / "x")
    remote = RemoteFile("x", 5, "", "a" * 64)
    assert is_ours(tmp_path, remote) is ours
    transfer = Transfer(remote, SOURCE, tmp_path, VerifiedLog(tmp_path))
    assert transfer.is_ours() is ours and transfer.target == tmp_path / "x"
    assert transfer.owner == owner_in(tmp_path)


def test_paths_of_a_file_under_way(transfer: Transfer) -> None:
    name = hashlib.sha1(b"sub/w.bin").hexdigest()
    assert transfer.work_path == f".hfship/partial/{name}.part"
    assert transfer.work_file == transfer.folder / transfer.work_path
    assert transfer.journal_path("now") == f".hfship/partial/{name}.now"


def test_blocks_that_a_file_has_already_are_not_needed_again(transfer: Transfer) -> None:
    assert transfer.allocated == 0
    with transfer.work_file.open("r+b") as stream:
        stream.write(b"x")
        os.fsync(stream.fileno())
    blocks = transfer.work_file.stat().st_blocks
    assert transfer.allocated == 512 * blocks > 0
    small = Transfer(
        RemoteFile("sub/w.bin", 7, "", "a" * 64), SOURCE, transfer.folder, transfer.log
    )
    assert small.allocated == 7
    transfer.work_file.unlink()
    assert transfer.allocated == 0


@pytest.mark.parametrize("trap", ["a link", "a dangling link", "a pipe", "open to all", "ours"])
def test_what_is_in_the_place_of_a_work_file_goes(trap: str, transfer: Transfer) -> None:
    path, secret = transfer.work_file, transfer.folder / "secret"
    secret.write_text("secret")
    if trap == "ours":
        path.write_text("ours")
    else:
        path.unlink()
    if "link" in trap:
        path.symlink_to(secret if trap == "a link" else transfer.folder / "none")
    elif trap == "a pipe":
        os.mkfifo(path)
    elif trap == "open to all":
        path.write_text("theirs")
        path.chmod(0o666)
    fd = transfer.open_work_file(os.O_RDWR | os.O_CREAT)
    assert os.read(fd, 9) == (b"ours" if trap == "ours" else b"")
    os.close(fd)
    assert not path.is_symlink() and path.is_file()
    assert secret.read_text() == "secret" and not (transfer.folder / "none").exists()


@pytest.mark.parametrize("outdates", [True, False])
@pytest.mark.parametrize("journaled", [True, False])
def test_a_manifest_goes_before_what_makes_it_untrue(
    outdates: bool, journaled: bool, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    manifest = transfer.folder / ".hfship" / "manifest.json"

    def publish(*arguments: Any) -> None:
        asked.append(arguments)
        assert manifest.exists() != outdates

    monkeypatch.setattr("hfship.hub.partial.publish_below", publish)
    one = Transfer(REMOTE, SOURCE, transfer.folder, transfer.log, outdates=outdates)
    manifest.write_text("{}")
    one.publish(journaled)
    if outdates:
        one.publish(journaled)
    assert set(asked) == {(transfer.folder, transfer.work_path, "sub/w.bin", journaled)}
    transfer.publish()
    assert asked[-1][3] is False


@pytest.mark.parametrize("hub_notes", [True, False])
def test_a_proven_file_is_remembered(
    hub_notes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"content"
    remote = RemoteFile("sub/w.bin", 7, "", hashlib.sha256(content).hexdigest())
    noted: List[Any] = []
    monkeypatch.setattr("hfship.hub.partial.write_hub_metadata", lambda *told: noted.append(told))
    log = VerifiedLog(tmp_path)
    transfer = Transfer(remote, SOURCE, tmp_path, log, hub_notes=hub_notes)
    partial = PartialFile(transfer, filesystem_of(tmp_path))
    os.pwrite(partial.create(), content, 0)
    partial.hash_up_to(7)
    assert partial.hasher.matches()
    accept_file(partial)
    assert (tmp_path / "sub" / "w.bin").read_bytes() == content
    assert log.sha256_of(remote) == remote.sha256
    assert noted == ([(tmp_path, remote, SOURCE.commit)] if hub_notes else [])
    assert Transfer(remote, SOURCE, tmp_path, log).hub_notes
    assert not Transfer(remote, SOURCE, tmp_path, log).outdates


# -- journals


def test_a_journal_is_what_was_written() -> None:
    row = journal(synced=[[0, 10]], written=[[0, 20]])
    said = read_journal(json.dumps(row).encode())
    assert said == Journal(
        REMOTE.path, SIZE, REMOTE.etag, boot_id(), synced=[(0, 10)], written=[(0, 20)]
    )
    assert json.loads(said.text()) == row
    assert said.belongs_to(REMOTE) and said.current and said.arrived == [(0, 20)]


def test_where_no_boot_is_known_nothing_is_in_the_page_cache(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.hub.partial.boot_id", lambda: "")
    (transfer.folder / transfer.journal_path("now")).write_text(json.dumps(journal(boot_id="")))
    (transfer.folder / transfer.journal_path("json")).write_text(
        json.dumps(journal(boot_id="", synced=[[0, 5]]))
    )
    assert found(transfer) == [(0, 5)]


@pytest.mark.parametrize("suffix", ["now", "json"])
def test_a_file_that_others_can_change_is_begun_anew(suffix: str, transfer: Transfer) -> None:
    (transfer.folder / transfer.journal_path(suffix)).write_text(json.dumps(journal()))
    assert found(transfer) == WRITTEN
    transfer.work_file.chmod(0o666)
    assert found(transfer) == []


class Written:
    """What is written of journals, and when bytes are made durable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: List[Any] = []
        monkeypatch.setattr(os, "fdatasync", lambda _: self.events.append("sync"))
        monkeypatch.setattr("hfship.hub.partial.write_below", self._write)

    def _write(self, folder: Path, path: str, text: str, durable: bool) -> None:
        row = json.loads(text)
        suffix = path.rpartition(".")[2]
        assert durable == (suffix == "json")
        assert (row["path"], row["size"], row["etag"]) == (REMOTE.path, SIZE, REMOTE.etag)
        assert row["boot_id"] == boot_id()
        self.events.append((suffix, row["synced"], row["written"]))

    def since(self) -> List[Any]:
        """What was new."""
        events, self.events[:] = list(self.events), []
        return events


def test_a_journal_is_written_when_there_is_something_new(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The durable one after the bytes that it tells of."""
    written = Written(monkeypatch)
    partial = PartialFile(transfer, Filesystem("", None))
    partial.publish([(0, 5)])
    partial.sync([(0, 5)])
    assert written.since() == []  # it is not under way
    before = set(os.listdir("/proc/self/fd"))
    fd = partial.create()
    assert fd >= 0 and partial.create() == fd
    partial.publish([(0, 5)])
    assert written.since() == [("now", [], [[0, 5]])]
    partial.publish([(0, 5)])
    assert written.since() == []
    partial.sync([(0, 9)])
    assert written.since() == [
        ("now", [], [[0, 9]]),
        "sync",
        ("now", [[0, 9]], [[0, 9]]),
        ("json", [[0, 9]], [[0, 9]]),
    ]
    partial.sync([(0, 9)])
    assert written.since() == []
    partial.start_over()
    assert written.since() == [("now", [], [])]
    partial.sync([(0, 9)])
    assert written.since()[-1] == ("json", [[0, 9]], [[0, 9]])
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1
    partial.commit()
    partial.publish([(0, 10)])
    partial.start_over()
    assert written.since() == [] and set(os.listdir("/proc/self/fd")) <= before


def test_a_sync_that_fails_leaves_no_descriptor(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    partial = PartialFile(transfer, Filesystem("", None))
    partial.create()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input"):
        partial.sync([(0, 9)])
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not (transfer.folder / transfer.journal_path("json")).exists()


def test_a_small_file_has_neither_room_nor_journals_before_it_comes(tmp_path: Path) -> None:
    for size in (SMALL_FILE, SMALL_FILE + 1):
        remote = RemoteFile(f"{size}", size, "", "a" * 64)
        transfer = Transfer(remote, SOURCE, tmp_path, VerifiedLog(tmp_path))
        partial = PartialFile(transfer, Filesystem("", None))
        partial.create()
        partial.sync([(0, 9)])
        is_large = size > SMALL_FILE
        assert transfer.work_file.stat().st_size == (size if is_large else 0)
        for suffix in ("now", "json"):
            assert (tmp_path / transfer.journal_path(suffix)).exists() == is_large


def test_the_hash_follows_as_far_as_it_is_told(transfer: Transfer) -> None:
    content = bytes(range(256)) * (SIZE // 256 + 1)
    transfer.work_file.write_bytes(content[:SIZE])
    partial = PartialFile(transfer, Filesystem("", None))
    for stop in (0, 10, CHUNK, CHUNK + 20, 5):
        before = partial.hasher.position
        partial.hash_up_to(stop)
        assert partial.hasher.position == max(before, stop)
    partial.hash_up_to(SIZE)
    hasher = partial.hasher
    partial.start_over()
    assert partial.hasher is not hasher and partial.hasher.position == 0


def test_what_cannot_be_finished_is_told_with_its_name(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialFile(transfer, Filesystem("", None))
    partial.create()
    (transfer.folder / "sub").write_text("in the way")
    with pytest.raises(DiskError, match=r"cannot finish .*/sub/w.bin: sub is a file"):
        partial.commit()
    blocked = Transfer(
        RemoteFile("v.bin", SIZE, "", "a" * 64), SOURCE, transfer.folder / "sub", transfer.log
    )
    with pytest.raises(DiskError, match=r"cannot create .*/sub/\.hfship/partial/"):
        PartialFile(blocked, Filesystem("", None)).create()


def test_a_file_is_durable_before_it_has_its_name(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: List[str] = []
    published: List[Any] = []
    partial = PartialFile(transfer, Filesystem("ext4", None))
    fd = partial.create()
    monkeypatch.setattr(os, "fsync", lambda one: events.append(f"sync {one == fd}"))
    monkeypatch.setattr(Transfer, "publish", lambda _, journaled: published.append(journaled))
    monkeypatch.setattr("hfship.hub.partial.remove_below", lambda _, path: events.append(path[-4:]))
    status = partial.commit()
    assert status.st_size == SIZE and events == ["sync True", ".now", "json"]
    assert published == [True]
    events.clear()
    again = PartialFile(transfer, Filesystem("", None))
    again.found()
    fd = again.create()
    again.commit()
    assert events == ["sync True"] and published == [True, False]
