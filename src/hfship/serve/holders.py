# SPDX-License-Identifier: Apache-2.0
"""Who holds the memory of GPUs: processes, by the containers that they run in.

Sources: `nvidia-smi --query-compute-apps`; the control groups of docker, of which both versions end
in the container's id (/proc/PID/cgroup). In a container, or where another user's processes are
hidden, memory is held by what nobody can name; that is said.
"""

from __future__ import annotations

import contextlib
import re
from typing import List, Mapping, Sequence, Tuple

from hfship.base.errors import HostError
from hfship.base.listeners import PROC, program_of
from hfship.base.processes import run_program
from hfship.base.text import human_bytes
from hfship.base.values import dataclass, replace

NVIDIA_SMI_APPS = "gpu_uuid,pid,process_name,used_memory"
NVIDIA_SMI_TIMEOUT_S = 20.0
_CONTAINER = re.compile(r"\b([0-9a-f]{64})\b")


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU, and the container that it runs in; "" for none."""

    gpu: str  # UUID
    pid: int
    program: str
    used: int  # bytes; 0: not told
    container: str = ""  # its name

    def text(self) -> str:
        """For people."""
        who = f"{self.program} (process {self.pid})"
        if self.container:
            who = f"the container {self.container}"
        if not self.used:
            return who

        used = human_bytes(self.used)
        return f"{who}, {used}"


def parse_compute_apps(text: str) -> Tuple[Holder, ...]:
    """What `nvidia-smi --query-compute-apps=NVIDIA_SMI_APPS --format=csv,noheader,nounits` says.

    >>> parse_compute_apps("GPU-1, 77, /usr/bin/python3, 1024")[0].text()
    'python3 (process 77), 1.1 GB'
    >>> parse_compute_apps("GPU-1, 77, [Not Found], [N/A]")[0].text()
    'a program (process 77)'
    """
    found = []
    for line in text.splitlines():
        # A path may hold commas; the three other fields do not.
        fields = line.split(",")
        if len(fields) < 4 or not fields[1].strip().isdecimal():
            continue
        uuid, pid, *path, used = (field.strip() for field in fields)
        program = ",".join(path)
        program = program.rpartition("/")[2]
        if program.startswith("["):
            program = "a program"
        size = 0
        if used.isdecimal():
            size = int(used) << 20
        holder = Holder(
            uuid,
            int(pid),
            program,
            size,
        )
        found.append(holder)

    return tuple(found)


def container_in(cgroup: str) -> str:
    """The id of the container in the text of /proc/PID/cgroup; "" outside of containers.

    >>> container_in("0::/system.slice/docker-" + "a" * 64 + ".scope")[:5]
    'aaaaa'
    >>> container_in("0::/user.slice/session-3.scope")
    ''
    """
    ids = _CONTAINER.findall(cgroup)
    if not ids:
        return ""
    return str(ids[-1])


def read_holders(names: Mapping[str, str]) -> Tuple[Holder, ...]:
    """The processes that hold memory of GPUs. `names`: of containers, by their id. Raises
    HostError."""
    argv = [
        "nvidia-smi",
        f"--query-compute-apps={NVIDIA_SMI_APPS}",
        "--format=csv,noheader,nounits",
    ]
    done = run_program(argv, timeout_s=NVIDIA_SMI_TIMEOUT_S)
    found = []
    for holder in parse_compute_apps(done.out):
        placed = _placed(holder, names)
        found.append(placed)

    return tuple(found)


def _placed(holder: Holder, names: Mapping[str, str]) -> Holder:
    """The holder with its container, and the name of its program where nvidia-smi hides it."""
    container = ""
    with contextlib.suppress(OSError):
        cgroup = PROC / str(holder.pid) / "cgroup"
        container = container_in(cgroup.read_text())
    program = holder.program
    if program == "a program":
        program = program_of(holder.pid) or program

    short_id = container[:12]
    name = names.get(container, short_id)
    return replace(
        holder,
        program=program,
        container=name,
    )


def container_names() -> Mapping[str, str]:
    """The names of all containers that run, by their id; none where docker does not answer."""
    argv = ["docker", "ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}"]
    found = {}
    with contextlib.suppress(HostError):
        done = run_program(argv, timeout_s=NVIDIA_SMI_TIMEOUT_S)
        for line in done.out.splitlines():
            container, _, name = line.partition(" ")
            found[container] = name

    return found


def held_text(holders: Sequence[Holder], used: int) -> str:
    """Who holds `used` bytes of a GPU, for people."""
    if not holders:
        amount = human_bytes(used)
        return f"{amount} by no process that can be seen from here"

    texts = []
    for holder in holders:
        text = holder.text()
        texts.append(text)

    return "; ".join(texts)


def strangers(holders: Sequence[Holder], ours: Sequence[str]) -> List[Holder]:
    """Those that run in none of our containers."""
    found = []
    for holder in holders:
        if holder.container not in ours:
            found.append(holder)
    return found
