# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: a program that is measured, programs in turns, and one table of all.

Memory is the most that a program and all its descendants hold at one time, what they share counted
once (PSS, proc_pid_smaps(5)). CPU seconds are those of all of them, by wait4.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
)

ROOT = Path(__file__).resolve().parent.parent
PYZ = ROOT / "dist" / "hfship.pyz"
TOOLS = ROOT / "dist" / "tools" / "bin"  # carried along, for a machine without a network
CORES = len(os.sched_getaffinity(0))
SAMPLE_S = 0.05  # between two looks at a program's memory
OURS = "hfship"

# Programs whose versions belong to the figures, and what makes each say it.
VERSIONS = {
    "nginx": "-v",
    "curl": "--version",
    "aria2c": "--version",
    "openssl": "version",
    "hf": "version",
    "rsync": "--version",
    "tar": "--version",
    "zstd": "--version",
}


class Missing(Exception):
    """A program that a measurement needs is not on this machine."""


class Run(NamedTuple):
    """One measured command: wall and CPU seconds, and its most memory in bytes."""

    seconds: float
    cpu: float
    memory: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table: what a program did in a step.

    With an `amount` of bytes it is a speed, else a time. `said` is what no number tells.
    """

    step: str
    tool: str
    seconds: float = 0.0
    amount: int = 0
    cpu: Optional[float] = None
    memory: int = 0
    said: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether hfship did it."""
        return self.tool.startswith(OURS)

    @property
    def speed(self) -> str:
        """MB/s, or a time."""
        if not self.seconds:
            return ""
        if self.amount:
            return f"{self.amount / self.seconds / 1e6:.0f} MB/s"
        if self.seconds < 1:
            return f"{self.seconds * 1000:.1f} ms"
        return f"{self.seconds:.1f} s"

    @property
    def cpu_text(self) -> str:
        """CPU seconds for each GB."""
        if self.cpu is None or not self.amount:
            return ""
        return f"{self.cpu / self.amount * 1e9:.2f}"

    @property
    def memory_text(self) -> str:
        """MB."""
        return f"{self.memory / 1e6:.0f}" if self.memory else ""

    def beside(self, ours: Optional[Row]) -> str:
        """How hfship compares: its speed, and its CPU, as a ratio."""
        if ours is None or ours is self or not ours.seconds or not self.seconds:
            return ""
        text = f"{self.seconds / ours.seconds:.2f}"
        if self.cpu and ours.cpu and self.amount == ours.amount:
            text += f", CPU {ours.cpu / self.cpu:.2f}"
        return text


class Scale(NamedTuple):
    """How much is measured: bytes of what is large, small files, and how often. What `is_small` is
    run for its errors, not for its times.
    """

    size: int
    files: int
    rounds: int
    is_small: bool = False


SMALL = Scale(24_000_000, 100, 1, is_small=True)


def full(gigabytes: float) -> Scale:
    """What figures are taken from."""
    return Scale(int(gigabytes * 1e9), 2000, 3)


# -- programs


def program(name: str) -> str:
    """A program of this benchmark: carried along, else of this machine. Raises Missing."""
    from support import components

    client = components.path("hf")
    installed = {"hf": client, "hf-python": client and client.with_name("python3")}.get(name)
    folders = os.pathsep.join([str(TOOLS), os.environ["PATH"], "/usr/sbin"])
    found = installed or shutil.which(name, path=folders)
    if (TOOLS / name).exists():
        found = TOOLS / name
    if not found:
        raise Missing(f"{name} is missing; install it, or put it into {TOOLS}")
    return str(found)


def has(name: str) -> bool:
    """Whether a program is there."""
    try:
        return bool(program(name))
    except Missing:
        return False


def machine(folder: Path) -> Dict[str, Any]:
    """What the figures depend on: the machine, the versions, the filesystem that was written to."""
    said = {}
    for name, flag in VERSIONS.items():
        if has(name):
            said[name] = version_of(program(name), flag)
    models = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    filesystem = subprocess.run(
        ["df", "--output=fstype", folder], capture_output=True, text=True, check=False
    ).stdout
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "CPU": models[0] if models else platform.machine(),
        "cores": CORES,
        "memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release(),
        "filesystem": filesystem.split()[-1],
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **said,
        "hfship.pyz": hashlib.sha256(PYZ.read_bytes()).hexdigest()[:12],
    }


def facts_text(folder: Path) -> str:
    """The facts of `machine` in a line."""
    return ", ".join(f"{name} {value}" for name, value in machine(folder).items())


def version_of(path: str, flag: str) -> str:
    """The first version number that a program says."""
    done = subprocess.run([path, flag], capture_output=True, text=True, check=False)
    return " ".join(re.findall(r"\d+(?:\.\d+)+", done.stdout + done.stderr)[:1])


# -- one command


def pss(pid: int) -> int:
    """Bytes that a process holds, and its part of those it shares; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except OSError:
        return 0


def family(pid: int) -> List[int]:
    """A process and all its descendants that run now."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):  # one ends while it is looked at
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def watch(process: subprocess.Popen[Any], sample_s: float = SAMPLE_S) -> Run:
    """Wait for a program that was just started."""
    began = time.monotonic()
    memory, pid = 0, 0
    looked = began
    while not pid:
        now = time.monotonic()
        if now - looked >= sample_s:
            memory = max(memory, sum(map(pss, family(process.pid))))
            looked = now
        time.sleep(0.002)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run(time.monotonic() - began, usage.ru_utime + usage.ru_stime, memory)


def measured(argv: Sequence[Any], **keywords: Any) -> Run:
    """A program from start to end. Raises SystemExit with what it said, when it fails."""
    words = [str(word) for word in argv]
    with Path(os.devnull).open("wb") as nowhere, tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(words, stdout=nowhere, stderr=complaints, **keywords)
        run = watch(process)
        if process.returncode:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace")
            raise SystemExit(f"{' '.join(words)}\nended with {process.returncode}: {said}")
    return run


def ship(*words: Any) -> List[str]:
    """The command line of hfship."""
    return [sys.executable, str(PYZ), *map(str, words)]


def in_turns(tools: Mapping[str, Callable[[], Run]], rounds: int) -> Dict[str, List[Run]]:
    """Each program once in each round, so that what else the machine does falls on all."""
    runs: Dict[str, List[Run]] = {tool: [] for tool in tools}
    for _ in range(rounds):
        for tool, run in tools.items():
            runs[tool].append(run())
    return runs


def rows_of(
    step: str,
    runs: Mapping[str, Sequence[Run]],
    amount: int,
    pick: Callable[..., float] = min,
) -> List[Row]:
    """A row for each program: its shortest time (or as `pick` says), least CPU, most memory."""
    rows = []
    for tool, of_tool in runs.items():
        seconds = pick(run.seconds for run in of_tool)
        cpu = min(run.cpu for run in of_tool)
        memory = max(run.memory for run in of_tool)
        rows.append(Row(step, tool, seconds, amount, cpu, memory))
    return rows


# -- the table


def table(rows: Iterable[Row]) -> str:
    """All rows in Markdown; our first row of a step is what the others stand beside."""
    rows = list(rows)
    head = ["step", "program", "speed", "CPU s/GB", "MB", "hfship beside it", ""]
    lines = [head]
    ours: Dict[str, Row] = {}
    for row in rows:
        if row.is_ours and row.seconds:
            ours.setdefault(row.step, row)
    for row in rows:
        beside = row.beside(ours.get(row.step))
        line = [row.step, row.tool, row.speed, row.cpu_text, row.memory_text, beside, row.said]
        lines.append([cell.replace("|", "\\|") for cell in line])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
    return f"| {' | '.join(padded)} |"


def as_json(row: Row) -> Dict[str, Any]:
    """A row for a file."""
    return asdict(row)
