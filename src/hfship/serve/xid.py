# SPDX-License-Identifier: Apache-2.0
"""XID errors of GPUs: what the NVIDIA driver says of hardware faults, in the kernel's log.

nvidia-smi does not tell them, and DCGM's exporter is not everywhere. A line:
`[ 4711.250321] NVRM: Xid (PCI:0000:3b:00): 79, pid=..., GPU has fallen off the bus.`
(docs.nvidia.com/deploy/xid-errors). Reading is apart from what it means. Never: needs root; where
the kernel's log may not be read nothing is told.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence, Tuple

from hfship.base.errors import HostError
from hfship.base.processes import run_program
from hfship.serve.docker import ask_nvidia_smi

RECENT_S = 3600.0  # an XID is told for so long
_LOGS: Sequence[Sequence[str]] = (
    ("dmesg",),
    ("journalctl", "--dmesg", "--no-pager", "--output", "short-monotonic"),
)
_LOG_TIMEOUT_S = 10.0
_LINE = re.compile(r"\[\s*(\d+\.\d+)\].*NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")


def parse_xids(log: str, uptime_s: float, recent_s: float = RECENT_S) -> Dict[str, int]:
    """The last XID of each GPU, by its place on the bus, of a log of the kernel with seconds since
    it started.

    >>> parse_xids("[ 90.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen\\n", 100.0)
    {'3b:00': 79}
    >>> parse_xids("[ 90.5] NVRM: Xid (PCI:0000:3b:00): 79\\n", 9000.0)
    {}
    """
    found = {}
    for line in log.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        at, bus, number = match.groups()
        if float(at) >= uptime_s - recent_s:
            place = _place(bus)
            found[place] = int(number)
    return found


def _place(bus: str) -> str:
    """Bus and device, as the driver and nvidia-smi write them alike.

    >>> _place("00000000:3B:00.0"), _place("0000:3b:00")
    ('3b:00', '3b:00')
    """
    return ":".join(bus.lower().partition(".")[0].split(":")[-2:])


def gpu_xids(gpus: str, xids: Dict[str, int]) -> Tuple[Tuple[str, int], ...]:
    """(GPU, its XID or 0) of `nvidia-smi --query-gpu=index,pci.bus_id` as csv without a header.

    >>> gpu_xids("0, 00000000:3B:00.0\\n1, 00000000:5E:00.0\\n", {"3b:00": 79})
    (('0', 79), ('1', 0))
    """
    rows = []
    for line in gpus.splitlines():
        index, _, bus = line.partition(",")
        if index.strip().isdecimal():
            rows.append((index.strip(), xids.get(_place(bus.strip()), 0)))
    return tuple(rows)


def read_xids() -> Tuple[Tuple[str, int], ...]:
    """(GPU, its XID of the last hour or 0); nothing where there are no GPUs, or the kernel's log
    is not for us."""
    gpus = ask_nvidia_smi("--query-gpu=index,pci.bus_id", "--format=csv,noheader")
    if not gpus:
        return ()
    for log in _kernel_logs():
        uptime = Path("/proc/uptime").read_text().split()[0]
        return gpu_xids(gpus, parse_xids(log, float(uptime)))
    return ()


def _kernel_logs() -> Iterator[str]:
    for argv in _LOGS:
        done: Optional[str] = None
        with contextlib.suppress(HostError):
            result = run_program(argv, timeout_s=_LOG_TIMEOUT_S)
            if result.code == 0:
                done = result.out
        if done is not None:
            yield done
