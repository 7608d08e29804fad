# SPDX-License-Identifier: Apache-2.0
"""Which program listens on a port of this machine.

Source: proc(5), /proc/net/tcp, and the links in /proc/PID/fd. Promises: what may not be seen (the
processes of other users, for one who is not root) is not guessed.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Dict, Iterator, Mapping, Set

from hfship.base.values import dataclass

PROC = Path("/proc")
_LISTENS = "0A"  # TCP_LISTEN of include/net/tcp_states.h
_SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True)
class Listener:
    """What listens on a port; pid 0 and no program where that is not ours to see."""

    port: int
    pid: int = 0
    program: str = ""

    def text(self) -> str:
        """For people."""
        if not self.pid:
            return "a process of another user"
        return f"{self.program} (process {self.pid})"


def listening_sockets(text: str) -> Dict[str, int]:
    """inode -> port of the sockets that listen, of the lines of /proc/net/tcp or tcp6.

    >>> line = "0: 0100007F:1F90 00000000:0000 0A 0:0 0:0 0 0 0 4711 1 ffff"
    >>> listening_sockets("  sl  local_address ..." + chr(10) + line)
    {'4711': 8080}
    """
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[3] != _LISTENS:
            continue
        inode = fields[9]
        port = fields[1].rpartition(":")[2]
        with contextlib.suppress(ValueError):
            found[inode] = int(port, 16)

    return found


def listeners() -> Mapping[int, Listener]:
    """What listens on this machine, by port."""
    ports: Dict[str, int] = {}
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            text = (PROC / table).read_text()
            ports.update(listening_sockets(text))

    found = {}
    for port in ports.values():
        found[port] = Listener(port)

    for pid in _pids():
        known = _sockets_of(pid) & ports.keys()
        for inode in known:
            port = ports[inode]
            program = program_of(pid)
            found[port] = Listener(port, pid, program)

    return found


def program_of(pid: int) -> str:
    """The name of a process; "" when it is gone."""
    with contextlib.suppress(OSError):
        comm = PROC / str(pid) / "comm"
        name = comm.read_text(errors="replace")
        return name.strip()

    return ""


def _pids() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for name in os.listdir(PROC):
            if name.isdecimal():
                yield int(name)


def _sockets_of(pid: int) -> Set[str]:
    """The inodes of the sockets that a process has open, as far as we may see."""
    found: Set[str] = set()
    folder = PROC / str(pid) / "fd"
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                socket = _SOCKET.fullmatch(target)
                if socket:
                    inode = socket[1]
                    found.add(inode)

    return found
