# SPDX-License-Identifier: Apache-2.0
"""The runtime socket of HAProxy: what changes while it runs, without a reload.

Owns every word exchanged there (HAProxy Management Guide, "Unix Socket commands"). A command is a
line, and some take a payload, which ends with an empty line; then HAProxy answers and closes.

Promises: a map is replaced as a whole, between one request and the next. Raises HostError for a
gateway that does not answer, and for what it refuses.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Sequence

from hfship.base.errors import HostError
from hfship.base.values import dataclass
from hfship.site.maps import Maps, map_path
from hfship.site.terms import ADMIN_SOCKET, BACKEND

TIMEOUT_S = 10.0
RELOAD_S = 0.7  # in which nobody may answer
_MOST_PAYLOAD = 8000  # bytes; a command has to fit into one buffer of HAProxy
_ANSWER = 1 << 24  # bytes of an answer that are read
# What HAProxy says of success, with a version of a map or without a word.
_DONE = re.compile(r"\s*(New version created: \d+\s*)?\Z")


class GatewayDownError(HostError):
    """No gateway answers at the socket."""


@dataclass(frozen=True)
class ServerState:
    """A replica as HAProxy sees it: `state` is UP, DOWN, MAINT, ..., `sessions` run there now."""

    backend: str
    name: str
    state: str
    backup: bool
    sessions: int
    requests: int


@dataclass(frozen=True)
class KeyUse:
    """What a key did: requests that run now, those of the last minute, and all that were accepted
    since the gateway started, or since its last hour of silence."""

    name: str
    running: int
    last_minute: int
    accepted: int


def ask(folder: Path, command: str) -> str:
    """What HAProxy answers to one command."""
    # A path to a socket has 107 bytes at most; through the folder it is always short.
    try:
        fd = os.open(folder / ADMIN_SOCKET, os.O_PATH)
    except OSError as exc:
        raise _down(exc.strerror or "") from exc
    try:
        return _patiently(f"/proc/self/fd/{fd}", command)
    except OSError as exc:
        raise _down(exc.strerror or str(exc)) from exc
    finally:
        os.close(fd)


def _patiently(address: str, command: str) -> str:
    """Raises OSError. A process that a reload ends may drop the connection: then its successor is
    asked."""
    deadline = time.monotonic() + RELOAD_S
    while True:
        try:
            return _exchange(address, command)
        except (ConnectionError, BlockingIOError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _down(why: str) -> GatewayDownError:
    return GatewayDownError("the gateway does not answer", why, "hfship serve --models FILE")


def _exchange(address: str, command: str) -> str:
    """Raises OSError."""
    pieces: List[bytes] = []
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(address)
        connection.sendall(command.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        while sum(map(len, pieces)) < _ANSWER:
            piece = connection.recv(1 << 16)
            if not piece:
                break
            pieces.append(piece)

    return b"".join(pieces).decode("utf-8", "replace")


def tell(folder: Path, command: str) -> None:
    """Give a command that answers nothing. Raises HostError with what HAProxy says instead."""
    answer = ask(folder, command)
    if not _DONE.match(answer):
        words = command.split("\n")[0]
        raise HostError(f"the gateway refuses: {words}", answer.strip()[:500], "")


def replace_maps(folder: Path, maps: Maps) -> None:
    """Have these maps replaced, in their order; each as a whole, between two requests."""
    for name, entries in maps.items():
        _replace_map(folder, map_path(name), entries)


def _replace_map(folder: Path, path: str, entries: Mapping[str, str]) -> None:
    """A reload in between forgets the new version of a map: then it is made again."""
    for _ in range(2):
        with contextlib.suppress(HostError):
            _replace_map_once(folder, path, entries)
            return
    _replace_map_once(folder, path, entries)


def _replace_map_once(folder: Path, path: str, entries: Mapping[str, str]) -> None:
    answer = ask(folder, f"prepare map {path}")
    version = re.search(r"New version created: (\d+)", answer)
    if version is None:
        raise HostError(f"the gateway has no {path}", answer.strip()[:500], "")
    for lines in _payloads(entries):
        tell(folder, f"add map @{version[1]} {path} <<\n{lines}")
    tell(folder, f"commit map @{version[1]} {path}")


def _payloads(entries: Mapping[str, str]) -> Iterator[str]:
    r"""The lines of a map in pieces that a command can carry.

    >>> list(_payloads({"a": "1", "b": "2"}))
    ['a 1\nb 2\n']
    """
    piece = ""
    for key, value in entries.items():
        line = f"{key} {value}\n"
        if piece and len(piece) + len(line) > _MOST_PAYLOAD:
            yield piece
            piece = ""
        piece += line
    if piece:
        yield piece


def generation(folder: Path) -> str:
    """The generation of the configuration that HAProxy has read."""
    found = re.search(r"^description: (.*)$", ask(folder, "show info"), re.MULTILINE)
    return found[1].strip() if found else ""


def server_states(folder: Path) -> List[ServerState]:
    """All replicas of all models."""
    states = []
    for row in _stat_rows(ask(folder, "show stat -1 4 -1")):
        if not row["pxname"].startswith(BACKEND):  # the page of the site
            continue
        states.append(
            ServerState(
                backend=row["pxname"],
                name=row["svname"],
                state=_state_of(row["status"]),
                backup=row["bck"] == "1",
                sessions=int(row["scur"] or 0),
                requests=int(row["stot"] or 0),
            )
        )
    return states


def _state_of(status: str) -> str:
    """The state of a server in one word. A container that does not run has no address: to HAProxy
    that is maintenance, to people it is down.

    >>> _state_of("UP 1/2"), _state_of("MAINT"), _state_of("MAINT (resolution)")
    ('UP', 'MAINT', 'DOWN')
    """
    if status == "MAINT (resolution)":
        return "DOWN"
    return status.split(" ")[0]


def _stat_rows(text: str) -> List[Dict[str, str]]:
    """The rows of `show stat`, by column.

    >>> _stat_rows("# pxname,svname,\\nbe_m,r1,\\n")
    [{'pxname': 'be_m', 'svname': 'r1', '': ''}]
    """
    lines = [line for line in text.splitlines() if line]
    if not lines:
        return []
    columns = lines[0].lstrip("# ").split(",")
    return [dict(zip(columns, line.split(","))) for line in lines[1:]]


def key_uses(folder: Path) -> List[KeyUse]:
    """What the keys did, as far as the gateway remembers.

    A line of `show table`: `0x5: key=alice use=0 exp=9 gpc0=3 conn_cur=1 gpc0_rate(60000)=2`.
    """
    uses = []
    for line in ask(folder, "show table st_key").splitlines():
        values = dict(re.findall(r"([a-z0-9_]+)(?:\(\d+\))?=(\S+)", line))
        if "key" in values:
            uses.append(
                KeyUse(
                    values["key"],
                    running=int(values.get("conn_cur", 0)),
                    last_minute=int(values.get("gpc0_rate", 0)),
                    accepted=int(values.get("gpc0", 0)),
                )
            )
    return uses


def set_servers(folder: Path, backend: str, names: Sequence[str], state: str) -> None:
    """Set replicas of a model to `drain`, `maint` or `ready`."""
    for name in names:
        tell(folder, f"set server {backend}/{name} state {state}")


def end_sessions(folder: Path, backend: str, name: str) -> None:
    """End what runs on a replica, with an error for its clients."""
    tell(folder, f"shutdown sessions server {backend}/{name}")
