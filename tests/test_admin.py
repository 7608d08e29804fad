# SPDX-License-Identifier: Apache-2.0
"""The runtime socket of a gateway that does not behave: tests/test_keys.py has a real one."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List, Optional, Sequence

import pytest

from hfship.base.errors import HostError
from hfship.site import admin
from hfship.site.maps import map_path
from hfship.site.terms import ADMIN_SOCKET

RESET = None  # an answer: the connection is dropped before the command is read
CREATED = "New version created: 7\n"


def bind(listener: socket.socket, folder: Path) -> None:
    """Listen in a folder whose path may be longer than that of a socket."""
    fd = os.open((folder / ADMIN_SOCKET).parent, os.O_PATH)
    listener.bind(f"/proc/self/fd/{fd}/{Path(ADMIN_SOCKET).name}")
    os.close(fd)


@contextlib.contextmanager
def haproxy(folder: Path, answers: Sequence[Optional[str]]) -> Iterator[List[str]]:
    """A socket that gives these answers, one to each connection; yields the commands."""
    commands: List[str] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                if answer is not RESET:
                    commands.append(connection.makefile().read().strip("\n"))
                    connection.sendall(answer.encode("utf-8", "surrogateescape"))

    with socket.socket(socket.AF_UNIX) as listener:
        bind(listener, folder)
        listener.listen(8)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield commands
        thread.join(5)


@pytest.fixture(autouse=True)
def folder_of_a_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reloads take no time."""
    (tmp_path / ADMIN_SOCKET).parent.mkdir()
    monkeypatch.setattr("hfship.site.admin.RELOAD_S", 0.1)


def test_a_connection_that_a_reload_drops_is_made_again(tmp_path: Path) -> None:
    with haproxy(tmp_path, [RESET, RESET, "description: 5 \n"]) as commands:
        assert admin.generation(tmp_path) == "5"
    assert commands == ["show info"]


def test_a_queue_that_is_full_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange(address: str, command: str) -> str:
        turns.append(command)
        if len(turns) < 2:
            raise BlockingIOError(11, "try again")
        return "done"

    turns: List[str] = []
    (tmp_path / ADMIN_SOCKET).touch()
    monkeypatch.setattr("hfship.site.admin._exchange", exchange)
    assert admin.ask(tmp_path, "show info") == "done"


@pytest.mark.parametrize("left_behind", [False, True])
def test_a_gateway_that_is_gone_is_said_to_be_down(tmp_path: Path, left_behind: bool) -> None:
    if left_behind:
        with socket.socket(socket.AF_UNIX) as dead:
            bind(dead, tmp_path)
    with pytest.raises(admin.GatewayDownError) as caught:
        admin.ask(tmp_path, "show info")
    expected = "Connection refused" if left_behind else "No such file or directory"
    assert expected in caught.value.why


def test_what_haproxy_refuses_is_told_without_the_payload(tmp_path: Path) -> None:
    with haproxy(tmp_path, ["no such map\n"]), pytest.raises(HostError) as caught:
        admin.tell(tmp_path, "add map @7 x <<\nsecret")
    assert (caught.value.what, caught.value.why) == (
        "the gateway refuses: add map @7 x <<",
        "no such map",
    )


def test_a_gateway_that_takes_a_command_and_says_nothing_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.site.admin.TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        bind(listener, tmp_path)
        listener.listen(8)
        with pytest.raises(admin.GatewayDownError, match="does not answer"):
            admin.ask(tmp_path, "show info")


def test_asking_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with haproxy(tmp_path, ["well\n"]):
        admin.ask(tmp_path, "show info")
    with pytest.raises(admin.GatewayDownError):
        admin.ask(tmp_path, "show info")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_bytes_that_are_no_text_are_shown_as_such(tmp_path: Path) -> None:
    with haproxy(tmp_path, ["a\udcffb"]):
        assert admin.ask(tmp_path, "show info") == "a\ufffdb"


def test_servers_are_set_one_by_one_and_their_sessions_ended(tmp_path: Path) -> None:
    with haproxy(tmp_path, ["\n", "\n", "\n"]) as commands:
        admin.set_servers(tmp_path, "be_m", ["m", "m.2"], "drain")
        admin.end_sessions(tmp_path, "be_m", "m")
    assert commands == [
        "set server be_m/m state drain",
        "set server be_m/m.2 state drain",
        "shutdown sessions server be_m/m",
    ]


MAP = map_path("keys")
WHOLE = [f"prepare map {MAP}", f"add map @7 {MAP} <<\na 1", f"commit map @7 {MAP}"]


@pytest.mark.parametrize(
    ("answers", "commands"),
    [
        ([CREATED, "", ""], WHOLE),
        ([CREATED, "", "unknown version\n", CREATED, "", ""], WHOLE + WHOLE),  # it forgot the map
    ],
)
def test_a_map_is_replaced_as_a_whole(
    answers: Sequence[Optional[str]], commands: List[str], tmp_path: Path
) -> None:
    with haproxy(tmp_path, answers) as asked:
        admin.replace_maps(tmp_path, {"keys": {"a": "1"}})
    assert asked == commands


def test_a_map_that_does_not_exist_is_an_error_in_the_end(tmp_path: Path) -> None:
    with haproxy(tmp_path, ["unknown map\n"] * 3) as asked, pytest.raises(HostError) as caught:
        admin.replace_maps(tmp_path, {"keys": {"a": "1"}})
    assert asked == [f"prepare map {MAP}"] * 3
    assert caught.value.why == "unknown map"


def test_a_map_goes_in_pieces_that_fit_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.site.admin._MOST_PAYLOAD", 8)
    entries = {"a": "1", "b": "2", "c": "3", "long-line": "4"}
    pieces = list(admin._payloads(entries))
    assert pieces == ["a 1\nb 2\n", "c 3\n", "long-line 4\n"]
    assert list(admin._payloads({})) == []


STAT = """# pxname,svname,scur,stot,bck,status,
page,FRONTEND,1,2,0,OPEN,
be_m,r1,3,9,0,UP 1/2,
be_m,r2,,,1,MAINT (resolution),
"""
TABLE = """# table: st_key, type: string, size:1048576, used:2
0x5: key=alice use=0 exp=9 gpc0=3 conn_cur=1 gpc0_rate(60000)=2
0x6: key=bob use=0 exp=9
"""


def test_what_the_gateway_counts_is_read(tmp_path: Path) -> None:
    def values(rows: Sequence[Any]) -> List[List[Any]]:
        return [list(vars(row).values()) for row in rows]

    with haproxy(tmp_path, [STAT, TABLE]) as commands:
        servers = admin.server_states(tmp_path)
        keys = admin.key_uses(tmp_path)
    assert values(servers) == [
        ["be_m", "r1", "UP", False, 3, 9],
        ["be_m", "r2", "DOWN", True, 0, 0],
    ]
    assert values(keys) == [["alice", 1, 2, 3], ["bob", 0, 0, 0]]
    assert commands == ["show stat -1 4 -1", "show table st_key"]


@pytest.mark.parametrize(("most", "read"), [(4, 1), (5, 2), (8, 2), (9, 3)])
def test_an_answer_is_read_up_to_its_limit(
    most: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a gateway that says more and more."""
    done: List[Any] = []

    class Connection:
        def __getattr__(self, name: str) -> Any:
            return lambda *given: done.append((name, *given))

        def recv(self, size: int) -> bytes:
            done.append(("recv", size))
            return b"more"

    system = SimpleNamespace(socket=lambda _: Connection(), AF_UNIX=1, SHUT_WR=2)
    monkeypatch.setattr(admin, "socket", system)
    monkeypatch.setattr(admin, "_ANSWER", most)
    assert admin._exchange("/a", "show info") == "more" * read
    assert done == [
        ("settimeout", admin.TIMEOUT_S),
        ("connect", "/a"),
        ("sendall", b"show info\n"),
        ("shutdown", 2),
        *[("recv", 1 << 16)] * read,
        ("close",),
    ]


def test_what_a_reload_ends_is_asked_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked = [0.0], []

    def exchange(*given: str) -> str:
        asked.append(given)
        raise ConnectionResetError("dropped")

    def sleep(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(admin, "time", clock)
    monkeypatch.setattr(admin, "RELOAD_S", 0.1)
    monkeypatch.setattr(admin, "_exchange", exchange)
    with pytest.raises(ConnectionResetError):
        admin._patiently("/a", "show info")
    assert asked == [("/a", "show info")] * 4
