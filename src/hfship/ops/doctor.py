# SPDX-License-Identifier: Apache-2.0
"""Doctor: this machine.

Owns the probes of the Python that runs, of disks and of other programs. Those of the network are in
ops/doctor_hub.py, so that nothing of it is loaded on the far side; what that side needs is in
ops/doctor_site.py, of which a connected machine needs nothing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, List, Sequence

from hfship.base.errors import HostError
from hfship.base.files import disk_error, existing_ancestor, filesystem_of, free_bytes, write_all
from hfship.base.processes import run_program
from hfship.base.text import GIB, human_bytes
from hfship.base.values import dataclass
from hfship.hub.session import OLDEST_PYTHON, with_newer_python
from hfship.ops.probe import PROBE_TIMEOUT_S, ProbeWarning, local_probe
from hfship.serve.messages import explain

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.ops.probe import Probe

DISK_PROBE_BYTES = 16 << 20
LITTLE_ROOM = 10 * GIB  # most models need more
VERSION = re.compile(r"\d+\.[\w.]+")
MOST_WORDS = 60  # characters of what a program says that does not work
PROGRAM_TIMEOUT_S = PROBE_TIMEOUT_S - 1  # a program that hangs is ended before its probe is left


@dataclass(frozen=True)
class Program:
    """A program that hfship runs: what makes it tell its version, who needs it, what brings it."""

    name: str
    arguments: str
    needed_by: str
    package: str


PROGRAMS: Sequence[Program] = (
    Program("rsync", "--version", "push", "rsync"),
    Program("ssh", "-V", "push", "an ssh client"),
    Program("aria2c", "--version", "fetch --engine aria2", "aria2"),
    Program("zstd", "--version", "reading archives without hfship", "zstd"),
    Program("openssl", "version", "signatures", "openssl"),
)
# Of the offline side: docker and the GPUs have probes of their own (ops/doctor_site.py).
SITE_PROGRAMS = ("zstd", "openssl")


def python_probe(offline: bool) -> Probe:
    """The probe of the Python that runs."""
    return local_probe("python", partial(probe_python, offline))


def disk_probes(folders: Sequence[Path]) -> List[Probe]:
    """The probes of the disks that folders are or will be on."""
    return [local_probe("disk", partial(probe_disk, folder)) for folder in folders]


def program_probes(offline: bool) -> List[Probe]:
    """The probes of the programs that a side needs."""
    probes = []
    for program in PROGRAMS:
        if not offline or program.name in SITE_PROGRAMS:
            work = partial(probe_program, program)
            probes.append(local_probe(program.name, work))
    return probes


def probe_python(offline: bool) -> str:
    """This Python and the others on PATH.

    One that is too old for the network is a failure unless `offline`.
    """
    on_path = ", ".join(_pythons_on_path()) or "no other"
    text = f"{platform.python_version()} ({sys.executable}); on PATH: {on_path}"
    if sys.version_info >= OLDEST_PYTHON:
        return text
    if offline:
        raise ProbeWarning(f"{text}; fetch needs 3.10", with_newer_python())

    what = f"{text}; fetch and a look at the network need 3.10"
    raise HostError(what, "", with_newer_python())


def _pythons_on_path() -> List[str]:
    """The versions ("3.12") of the Pythons that can be called by their version."""
    found = []
    for minor in range(8, 20):
        version = f"3.{minor}"
        if shutil.which(f"python{version}"):
            found.append(version)
    return found


def probe_disk(folder: Path) -> str:
    """Room, file-size limit and write speed of the disk that a folder is or will be on."""
    filesystem = filesystem_of(folder)
    free = free_bytes(folder)
    speed = _write_speed(existing_ancestor(folder), min(DISK_PROBE_BYTES, free // 2))
    room = f"{human_bytes(free)} free on {filesystem.kind}"
    text = f"{folder}: {room}, writes {human_bytes(speed)}/s"
    if filesystem.max_file_size:
        text += f", files up to {human_bytes(filesystem.max_file_size)}"
        raise ProbeWarning(text, "hfship pack --split fat32")
    if free < LITTLE_ROOM:
        raise ProbeWarning(text, "most models need more: free space")

    return text


def _write_speed(folder: Path, count: int) -> float:
    """Bytes per second at which `count` bytes reach the disk of a folder. Raises DiskError."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            fd = stream.fileno()
            began = time.monotonic()
            write_all(fd, bytes(count))
            os.fdatasync(fd)
            seconds = time.monotonic() - began
            return os.fstat(fd).st_size / seconds
    except OSError as exc:
        raise disk_error(exc, "write to", folder) from exc


def probe_program(program: Program) -> str:
    """The version of a program, or what cannot be done without it."""
    if not shutil.which(program.name):
        text = f"not installed; {program.needed_by} needs it"
        step = f"install {program.package} for that"
        raise ProbeWarning(text, step)

    argv = [program.name, *program.arguments.split()]
    done = run_program(argv, timeout_s=PROGRAM_TIMEOUT_S)
    output = done.out + done.err
    first_line, _, _ = output.strip().partition("\n")
    version = VERSION.search(first_line)
    if version and done.code == 0:
        return f"version {version[0]}"

    cause, step = explain(output, "MODEL")
    if not cause:
        cause = first_line[:MOST_WORDS] or f"ends with {done.code}"
    if not step:
        step = f"run {program.name} by hand"
    raise ProbeWarning(cause, step)
