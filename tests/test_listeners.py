# SPDX-License-Identifier: Apache-2.0
"""Ports of this machine: who listens where, and what is free."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hfship.base import listeners as room
from hfship.base.errors import HostError
from hfship.base.listeners import Listener, listeners, listening_sockets, program_of
from hfship.base.network import family_of, port_is_free

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid inode"
LINE = "   0: {address} 00000000:0000 {state} 0:0 00:0 00 0 0 {inode} 1"


def table(*rows: tuple[str, str, str]) -> str:
    lines = [LINE.format(address=one, state=state, inode=inode) for one, state, inode in rows]
    return "\n".join([HEAD, *lines])


def test_what_listens_is_told_from_what_talks() -> None:
    text = table(
        ("0100007F:1F90", "0A", "7"),
        ("0100007F:1F91", "01", "8"),
        ("00000000000000000000000000000000:0050", "0A", "9"),
        ("broken:port", "0A", "10"),
    )
    assert listening_sockets(text + "\n  0: x 0A") == {"7": 8080, "9": 80}


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc in which process 42 has socket 7, and nobody whom we may see has socket 9."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(table(("0100007F:1F90", "0A", "7")))
    (tmp_path / "net" / "tcp6").write_text(table(("00:0050", "0A", "9")))
    fds = tmp_path / "42" / "fd"
    fds.mkdir(parents=True)
    (tmp_path / "42" / "comm").write_text("vllm\n")
    for name, target in (("0", "/dev/null"), ("3", "socket:[7]"), ("4", "xsocket:[9]")):
        (fds / name).symlink_to(target)
    (fds / "5").write_text("no link")
    (tmp_path / "43").mkdir()
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(room, "PROC", tmp_path)
    return tmp_path


def test_a_listener_has_the_name_of_its_program_where_we_may_see_it(proc: Path) -> None:
    assert listeners() == {8080: Listener(8080, 42, "vllm"), 80: Listener(80)}
    assert Listener(8080, 42, "vllm").text() == "vllm (process 42)"
    assert Listener(80).text() == "a process of another user"
    assert program_of(99) == ""
    (proc / "net" / "tcp6").unlink()
    assert list(listeners()) == [8080]


def test_where_there_is_no_proc_nothing_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PROC", tmp_path / "none")
    assert listeners() == {}


def test_a_port_is_free_until_somebody_listens() -> None:
    assert (family_of("127.0.0.1"), family_of("::1")) == (socket.AF_INET, socket.AF_INET6)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free("127.0.0.1", port)
        found = listeners()[port]
        assert found.pid == os.getpid() and found.program == program_of(os.getpid()) != ""
    assert port_is_free("127.0.0.1", 0)
    with pytest.raises(HostError, match="cannot listen on 192.0.2.77") as caught:
        port_is_free("192.0.2.77", 0)
    assert caught.value.next_step == "give an address of this machine as --host"
