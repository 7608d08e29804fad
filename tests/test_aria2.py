"""What aria2c is told, without aria2c."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Sequence

import pytest

from hfship.base.errors import IntegrityError, NetworkError
from hfship.base.manifest import Source
from hfship.base.processes import Completed
from hfship.base.progress import Stage
from hfship.base.proxies import Proxies
from hfship.hub import aria2
from hfship.hub.partial import Transfer
from hfship.hub.protocol import RemoteFile
from hfship.hub.verified import VerifiedLog


@pytest.mark.parametrize(
    "connections, limit_bps, expected",
    [
        (0, 0, ["--split=16", "--max-connection-per-server=16"]),
        (4, 0, ["--split=4", "--max-connection-per-server=4"]),
        (99, 0, ["--split=16", "--max-connection-per-server=16"]),  # aria2c refuses more
        (1, 5e6, ["--split=1", "--max-overall-download-limit=5000000"]),
    ],
)
def test_aria2_opens_as_many_connections_as_it_may_and_is_asked_for(
    connections: int, limit_bps: float, expected: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: List[List[str]] = []
    monkeypatch.setattr(aria2, "run_program", lambda argv, *_, **__: ran.append(argv))
    settings: Any = SimpleNamespace(connections=connections, limit_bps=limit_bps)
    client: Any = SimpleNamespace(endpoint="https://hub", authorization="", proxies=Proxies({}))
    aria2.run_aria2(client, [], settings)
    assert set(expected) <= set(ran[0])
    limited = any("download-limit" in argument for argument in ran[0])
    assert limited == bool(limit_bps)


@pytest.mark.parametrize(
    "url, authorization, shown",
    [
        ("https://hub/org/m/resolve/main/w", "Bearer hf_1", True),
        ("https://hub/org/m/resolve/main/w", "", False),
        ("https://cdn/w?signature=1", "Bearer hf_1", False),
        ("http://hub/org/m/resolve/main/w", "Bearer hf_1", False),
    ],
)
def test_orders_show_the_token_to_the_hub_alone(url: str, authorization: str, shown: bool) -> None:
    transfer: Any = SimpleNamespace(work_file=Path("/m/.hfship/partial/1.part"))
    orders = aria2.aria2_orders([transfer], [url], "https://hub", authorization).splitlines()
    assert orders[:3] == [url, "  dir=/m/.hfship/partial", "  out=1.part"]
    assert orders[3:] == (["  header=Authorization: Bearer hf_1"] if shown else [])


# -- what it brings

CONTENT = b"weights" * 99
SOURCE = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
REMOTE = RemoteFile("sub/w", len(CONTENT), "", hashlib.sha256(CONTENT).hexdigest())


def transfer_to(folder: Path, remote: RemoteFile = REMOTE) -> Transfer:
    folder.mkdir(exist_ok=True)
    return Transfer(remote, SOURCE, folder, VerifiedLog(folder))


class Brings:
    """An aria2c that brings one content after the other; None: it goes on with the file."""

    def __init__(self, transfer: Transfer, *contents: Any) -> None:
        self.transfer = transfer
        self.contents = list(contents)
        self.rounds: List[int] = []
        self.found: List[bool] = []

    def __call__(self, _: Any, transfers: Sequence[Transfer], __: Any) -> Completed:
        """One round."""
        self.rounds.append(len(transfers))
        self.found.append(self.transfer.work_file.exists())
        content = self.contents.pop(0)
        control = aria2.control_file(self.transfer)
        control.touch()
        if content is not None:
            self.transfer.work_file.write_bytes(content)
            control.unlink()
        return Completed(7, "", " https://h/x?token=secret no\n" if content is None else "")


def fetch(transfer: Transfer, *contents: Any) -> Brings:
    """Fetch a file by aria2c; who brought it."""
    brings = Brings(transfer, *contents)
    stage = Stage("fetching", REMOTE.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aria2, "run_aria2", brings)
        aria2.fetch_with_aria2(SimpleNamespace(), [transfer], stage, SimpleNamespace())  # type: ignore[arg-type]
    return brings


def test_what_comes_right_gets_its_name(tmp_path: Path) -> None:
    transfer = transfer_to(tmp_path / "m")
    assert fetch(transfer, CONTENT).rounds == [1]
    assert transfer.target.read_bytes() == CONTENT and not transfer.work_file.exists()
    assert VerifiedLog(transfer.folder).sha256_of(REMOTE) == REMOTE.sha256


def test_an_address_that_ends_is_signed_anew(tmp_path: Path) -> None:
    transfer = transfer_to(tmp_path / "m")
    assert fetch(transfer, None, None, CONTENT).rounds == [1, 1, 1]
    with pytest.raises(NetworkError) as told:
        fetch(transfer_to(tmp_path / "n"), *[None] * aria2.ARIA2_ROUNDS)
    assert told.value.what == "aria2c did not finish 1 file"
    assert told.value.why.startswith("https://h/x?") and "secret" not in told.value.why


@pytest.mark.parametrize("control", [True, False])
def test_what_another_engine_began_is_not_taken_for_complete(control: bool, tmp_path: Path) -> None:
    transfer = transfer_to(tmp_path / "m")
    transfer.work_file.parent.mkdir(parents=True)
    transfer.work_file.write_bytes(b"begun")
    if control:
        aria2.control_file(transfer).touch()
    assert fetch(transfer, CONTENT).found == [control]


@pytest.mark.parametrize(
    ("content", "what", "why"),
    [
        (CONTENT[:-1] + b"x", "sub/w arrives damaged through aria2c", ""),
        (CONTENT[:-1], "sub/w does not come whole through aria2c", "it brought 692 bytes of 693"),
        (CONTENT + b"x", "sub/w does not come whole through aria2c", "it brought 694 bytes of 693"),
    ],
)
def test_what_comes_wrong_is_removed(content: bytes, what: str, why: str, tmp_path: Path) -> None:
    transfer = transfer_to(tmp_path / "m")
    with pytest.raises(IntegrityError) as told:
        fetch(transfer, content)
    assert (told.value.what, told.value.why) == (what, why)
    assert told.value.next_step == "run the same command again, without --engine aria2"
    assert not transfer.work_file.exists() and not transfer.target.exists()


def test_blocks_that_another_program_writes_are_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aria2, "BAR_INTERVAL_S", 0.001)
    stage = Stage("fetching", 900)
    growing: Any = [SimpleNamespace(allocated=300), SimpleNamespace(allocated=40)]
    seen = threading.Event()
    add = stage.add

    def added(count: int) -> None:
        add(count)
        if stage.done == 345:
            seen.set()

    monkeypatch.setattr(stage, "add", added)
    with aria2._watch_growth(growing, stage):
        growing[0].allocated = 305
        assert seen.wait(60)
