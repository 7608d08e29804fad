"""What spares a download: damaged files repaired block by block, equal files taken."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest

from hfship.base.manifest import Source
from hfship.base.report import Reporter
from hfship.base.settings import load_settings
from hfship.hub.client import HubClient
from hfship.hub.partial import Transfer
from hfship.hub.protocol import RemoteFile
from hfship.hub.ranges import BLOCK_SIZE
from hfship.hub.repair import repair_damaged, repair_file, reuse_local
from hfship.hub.verified import FileHasher, VerifiedLog

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
