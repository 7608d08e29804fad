"""What spares a download: damaged files repaired block by block, equal files taken."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import pytest

from hfship.base.errors import NetworkError
from hfship.base.manifest import Source
from hfship.base.report import Reporter
from hfship.base.settings import load_settings
from hfship.hub import repair as room
from hfship.hub.client import HubClient
from hfship.hub.partial import Transfer
from hfship.hub.protocol import RemoteFile
from hfship.hub.ranges import BLOCK_SIZE, SMALL_FILE
from hfship.hub.repair import (
    copies_in,
    fetch_bytes,
    hub_cache_blobs,
    mend_locally,
    repair_damaged,
    repair_file,
    reuse_local,
)
from hfship.hub.retry import BLOCK_RETRY, RetryableError
from hfship.hub.verified import FileHasher, VerifiedLog
from test_manifest import A_FILE, GOOD

SOURCE = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
CONTENT = b"".join(bytes([number]) * BLOCK_SIZE for number in range(3)) + b"the end"
REMOTE = RemoteFile("w.bin", len(CONTENT), "", hashlib.sha256(CONTENT).hexdigest())
Damage = Callable[[bytearray], None]


@pytest.fixture
def transfer(tmp_path: Path) -> Transfer:
    folder = tmp_path / "model"
    folder.mkdir()
    return Transfer(REMOTE, SOURCE, folder, VerifiedLog(folder))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> List[Tuple[int, int]]:
    """The ranges that a repair fetches of the right content."""
    ranges: List[Tuple[int, int]] = []

    def fetch_bytes(address: Any, start: int, stop: int, size: int) -> bytes:
        ranges.append((start, stop))
        return CONTENT[start:stop]

    monkeypatch.setattr("hfship.hub.repair.fetch_bytes", fetch_bytes)
    return ranges


def marks() -> List[str]:
    hasher = FileHasher(REMOTE)
    hasher.update(CONTENT)
    return hasher.marks


def repair(transfer: Transfer) -> bool:
    client = HubClient(load_settings({}), None, Reporter("none", -1), threading.Event())
    return repair_file(client, transfer, marks())


def flip(position: int) -> Damage:
    def damage(content: bytearray) -> None:
        content[position] ^= 1

    return damage


def cut(size: int) -> Damage:
    def damage(content: bytearray) -> None:
        del content[size:]

    return damage


BLOCK = [(n * BLOCK_SIZE, (n + 1) * BLOCK_SIZE) for n in range(3)]
TAIL = (3 * BLOCK_SIZE, len(CONTENT))
DAMAGES: Dict[str, Tuple[List[Damage], List[Tuple[int, int]]]] = {
    "none": ([], []),
    "first byte": ([flip(0)], [BLOCK[0]]),
    "last byte of a block": ([flip(BLOCK_SIZE - 1)], [BLOCK[0]]),
    "first byte of the second": ([flip(BLOCK_SIZE)], [BLOCK[1]]),
    "last byte": ([flip(len(CONTENT) - 1)], [TAIL]),
    "a block and the end": ([flip(BLOCK_SIZE), flip(len(CONTENT) - 1)], [BLOCK[1], TAIL]),
    "became shorter meanwhile": ([cut(2 * BLOCK_SIZE + 5)], [BLOCK[2], TAIL]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_only_damaged_blocks_are_fetched(
    case: str, transfer: Transfer, fetched: List[Tuple[int, int]]
) -> None:
    damages, ranges = DAMAGES[case]
    content = bytearray(CONTENT)
    for damage in damages:
        damage(content)
    transfer.target.write_bytes(content)
    assert repair(transfer)
    assert transfer.target.read_bytes() == CONTENT and fetched == ranges
    assert VerifiedLog(transfer.folder).sha256_of(REMOTE) == REMOTE.sha256


def test_more_than_half_is_fetched_anew(transfer: Transfer, fetched: List[Tuple[int, int]]) -> None:
    transfer.target.write_bytes(bytes(len(CONTENT)).replace(b"\0", b"x"))
    assert not repair(transfer)
    assert fetched == BLOCK[:1] and transfer.log.sha256_of(REMOTE) is None


def test_a_copy_counts_when_its_hash_matches(transfer: Transfer, tmp_path: Path) -> None:
    right, wrong, shorter = (tmp_path / name for name in ("right", "wrong", "shorter"))
    right.write_bytes(CONTENT)
    wrong.write_bytes(CONTENT[:-1] + b"x")
    shorter.write_bytes(CONTENT[:-1])
    reporter = Reporter("none", -1)
    missing = tmp_path / "missing"
    assert not reuse_local(transfer, [missing, shorter, wrong], reporter)
    assert not transfer.target.exists() and not transfer.work_file.exists()
    assert reuse_local(transfer, [wrong, right], reporter)
    assert transfer.target.read_bytes() == CONTENT
    assert VerifiedLog(transfer.folder).sha256_of(REMOTE) == REMOTE.sha256
    assert not reuse_local(transfer, [transfer.target], reporter)  # it is the very file


@pytest.mark.parametrize("state", ["damaged", "missing", "a link", "never right"])
def test_only_what_was_right_once_is_repaired(
    state: str, transfer: Transfer, fetched: List[Tuple[int, int]], tmp_path: Path
) -> None:
    hasher = FileHasher(REMOTE)
    hasher.update(CONTENT)
    transfer.target.write_bytes(CONTENT)
    if state != "never right":
        transfer.log.add(REMOTE, transfer.target.stat(), hasher)
    transfer.target.write_bytes(b"x" + CONTENT[1:])
    if state == "missing":
        transfer.target.unlink()
    elif state == "a link":
        transfer.target.rename(tmp_path / "elsewhere")
        transfer.target.symlink_to(tmp_path / "elsewhere")
    client = HubClient(load_settings({}), None, Reporter("none", -1), threading.Event())
    assert repair_damaged(client, transfer) is (state == "damaged")
    assert fetched == (BLOCK[:1] if state == "damaged" else [])


# -- which files, and from where


def of_size(size: int, folder: Path, path: str = "w.bin", sha256: Any = "a" * 64) -> Transfer:
    remote = RemoteFile(path, size, "b" * 40, sha256)
    return Transfer(remote, SOURCE, folder, VerifiedLog(folder))


class Asked:
    """What mend_locally asks of its parts, which mend what a test says."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, repaired: str = "", reused: str = ""
    ) -> None:
        self.events: List[Any] = []
        self.err = io.StringIO()
        self.client: Any = SimpleNamespace(reporter=Reporter("plain", 0, err=self.err))

        def repair_it(client: Any, transfer: Transfer) -> bool:
            assert client is self.client
            self.events.append(("repair", transfer.remote.path))
            return transfer.remote.path == repaired

        def reuse(transfer: Transfer, donors: List[Path], reporter: Reporter) -> bool:
            assert reporter is self.client.reporter
            self.events.append(("reuse", transfer.remote.path, donors))
            return transfer.remote.path == reused

        def look(root: Path) -> Dict[str, List[Path]]:
            self.events.append(("look", root))
            return {"a" * 64: [root / "x" / "w.bin"]}

        monkeypatch.setattr(room, "repair_damaged", repair_it)
        monkeypatch.setattr(room, "reuse_local", reuse)
        monkeypatch.setattr(room, "copies_in", look)
        monkeypatch.setattr(room, "hub_cache_blobs", lambda _, env: [Path(env["CACHE"])])


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and what others have of its file: each a donor."""
    (tmp_path / "m").mkdir()
    (tmp_path / "x").mkdir()
    for path in ("m/w.bin", "m/v.bin", "x/w.bin", "blob"):
        (tmp_path / path).touch()
    monkeypatch.setenv("CACHE", str(tmp_path / "blob"))
    return tmp_path


@pytest.mark.parametrize("repair_only", [True, False])
def test_each_large_file_is_repaired_or_taken_from_elsewhere(
    repair_only: bool, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch, repaired="w.bin", reused="v.bin")
    large = SMALL_FILE + 1
    transfers = [of_size(large, places / "m"), of_size(large, places / "m", "v.bin")]
    mended = mend_locally(asked.client, transfers, places, repair_only)
    looked = ("look", places)
    repairs = [("repair", "w.bin"), ("repair", "v.bin")]
    donors = [places / "m" / "v.bin", places / "blob", places / "x" / "w.bin"]
    if repair_only:
        assert asked.events == repairs and mended == {"w.bin": "a" * 64}
    else:
        assert asked.events == [looked, *repairs, ("reuse", "v.bin", donors)]
        assert mended == {"w.bin": "a" * 64, "v.bin": "a" * 64}
    assert asked.err.getvalue() == ""


def test_what_is_small_or_unproven_or_under_way_is_not_mended(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    begun = of_size(SMALL_FILE + 1, places / "m")
    begun.work_file.parent.mkdir(parents=True)
    begun.work_file.touch()
    transfers = [
        of_size(SMALL_FILE, places / "m", "s.bin"),
        of_size(SMALL_FILE + 1, places / "m", "g.bin", None),
        begun,
    ]
    assert mend_locally(asked.client, transfers, places, False) == {} and asked.events == []


def test_a_copy_that_cannot_be_read_is_told_once(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    (places / "x" / "w.bin").unlink()
    (places / "m" / "w.bin").unlink()
    (places / "m" / "w.bin").mkdir()
    real = room.open_regular

    def refuse(path: Path) -> int:
        if path.name in ("blob", "v.bin"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(room, "open_regular", refuse)
    before = set(os.listdir("/proc/self/fd"))
    large = SMALL_FILE + 1
    first, second = of_size(large, places / "m"), of_size(large, places / "m", "v.bin")
    assert mend_locally(asked.client, [first], places, False) == {}
    blob = places / "blob"
    said = f"warning: cannot take {blob}: Permission denied; it is fetched"
    assert asked.err.getvalue()[10:] == f"{said}\n"
    assert asked.events[-1] == ("reuse", "w.bin", [])
    assert mend_locally(asked.client, [first, second], places, False) == {}
    assert asked.err.getvalue().splitlines()[1][10:] == f"{said} (1 more like it)"
    assert set(os.listdir("/proc/self/fd")) <= before


def test_equal_files_are_known_by_the_manifests_beside(tmp_path: Path) -> None:
    manifests = {
        "b": json.dumps({**GOOD, "files": [A_FILE]}),
        "a": json.dumps({**GOOD, "files": [A_FILE]}),
        "broken": "{",
        "deep/er": json.dumps({**GOOD, "files": [A_FILE]}),
    }
    for name, text in manifests.items():
        path = tmp_path / name / ".hfship" / "manifest.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "plain").mkdir()
    name, sha256 = A_FILE["path"], A_FILE["sha256"]
    assert copies_in(tmp_path) == {sha256: [tmp_path / "a" / name, tmp_path / "b" / name]}
    assert copies_in(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "env, folder",
    [
        ({"HF_HUB_CACHE": "/c"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/d"}, "/d"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HUB_CACHE": "~nobody-here/x"}, None),
    ],
)
def test_where_the_cache_of_the_hub_keeps_a_file(
    env: Dict[str, str], folder: Any, tmp_path: Path
) -> None:
    blob = "models--org--m/blobs/" + "a" * 64
    found = [Path(folder) / blob] if folder else []
    assert hub_cache_blobs(of_size(1, tmp_path), env) == found
    source = Source("https://hub", "org/old", "main", "new", "0" * 40, repo_type="dataset")
    one = Transfer(RemoteFile("w", 1, "c" * 40), source, tmp_path, VerifiedLog(tmp_path))
    if folder:
        assert hub_cache_blobs(one, env) == [Path(folder) / "datasets--new/blobs" / ("c" * 40)]


# -- a block


class Address:
    """A file whose blocks come after so many failures."""

    path = "w.bin"

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.asked: List[Any] = []
        self.forgotten = 0

    def open(self, start: int, stop: int) -> Any:
        self.asked.append((start, stop))
        if self.failures:
            raise self.failures.pop(0)
        return open(os.devnull)

    def forget(self) -> None:
        self.forgotten += 1


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> List[Any]:
    """What is asked of an answer, whose body is "block"; how long is waited."""
    asked: List[Any] = []
    monkeypatch.setattr(room, "is_range", lambda _, *span: asked.append(("range", span)))
    monkeypatch.setattr(room, "read_body", lambda _, size: asked.append(("read", size)) or b"block")
    monkeypatch.setattr(room, "time", SimpleNamespace(sleep=lambda s: asked.append(("sleep", s))))
    return asked


def test_a_block_is_asked_for_again_at_a_fresh_address(block: List[Any]) -> None:
    address: Any = Address(RetryableError("reset"), OSError("broken"))
    assert fetch_bytes(address, 4, 10, 100) == b"block"
    assert address.asked == [(4, 10)] * 3 and address.forgotten == 2
    assert [kind for kind, _ in block] == ["sleep", "sleep", "range", "read"]
    assert block[-2:] == [("range", (4, 10, 100)), ("read", 6)]


def test_a_block_that_does_not_come_ends_the_repair(block: List[Any]) -> None:
    address: Any = Address(*[RetryableError("reset")] * 20)
    with pytest.raises(NetworkError) as caught:
        fetch_bytes(address, 4, 10, 100)
    error = caught.value
    assert (error.what, error.why) == ("a block of w.bin cannot be fetched", "reset")
    assert error.next_step == "run the same command again"
    tries = BLOCK_RETRY.attempts
    assert len(address.asked) == address.forgotten == tries and len(block) == tries - 1
    with pytest.raises(ZeroDivisionError):
        fetch_bytes(Address(ZeroDivisionError()), 4, 10, 100)  # type: ignore[arg-type]


def test_a_repair_is_told_with_what_it_cost(
    transfer: Transfer, fetched: List[Tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: List[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    transfer.target.write_bytes(b"x" + CONTENT[1:])
    err = io.StringIO()
    reporter = Reporter("plain", 0, err=err)
    client = HubClient(load_settings({}), None, reporter, threading.Event())
    assert repair_file(client, transfer, marks())
    assert err.getvalue()[10:] == "w.bin: repaired, 8.4 MB of 25.2 MB fetched\n"
    assert synced[0] == str(transfer.target)
    (stage,) = reporter.run.past
    assert (stage.name, stage.done, stage.total) == ("repairing", len(CONTENT), len(CONTENT))


def test_wrong_marks_make_nothing_right(
    transfer: Transfer, fetched: List[Tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched at the end is wrong, too."""
    transfer.target.write_bytes(CONTENT[:-1] + b"x")
    monkeypatch.setattr(room, "fetch_bytes", lambda _, *span: b"y" * (span[1] - span[0]))
    client = HubClient(load_settings({}), None, Reporter("none", -1), threading.Event())
    assert not repair_file(client, transfer, marks())
    assert transfer.log.sha256_of(REMOTE) is None


def test_a_copy_is_told_with_its_place_and_durable(
    transfer: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "right").write_bytes(CONTENT)
    (tmp_path / "link").symlink_to("right")
    synced: List[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    err = io.StringIO()
    reporter = Reporter("plain", 0, err=err)
    assert reuse_local(transfer, [tmp_path / "link"], reporter)
    assert err.getvalue()[10:] == f"w.bin: taken from {tmp_path}/link\n"
    assert str(transfer.work_file) in synced
    assert not transfer.target.is_symlink()
    (stage,) = reporter.run.past
    assert (stage.name, stage.done) == ("reusing", len(CONTENT))
    # What lies in the place itself is copied only where somebody else could change it.
    transfer.target.chmod(0o666)
    assert reuse_local(transfer, [transfer.target], reporter)
    assert transfer.target.stat().st_mode & 0o022 == 0
