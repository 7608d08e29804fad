#!/usr/bin/env python3
"""fetch of an image beside skopeo and docker, from one docker-registry on loopback:

    python3 benchmarks/images.py [--json FILE] [--mb 400] [--layers 4] [--rounds 3] [--mbit 1000]

    raw        MB/s and CPU seconds per GB of `hfship fetch`, `skopeo copy` to an OCI folder and
               `docker pull`, in turns; the median of each. docker's daemons are counted, too, and
               docker unpacks the layers, which the others do not
    over       bytes that came beyond the image's in a whole run: what a server had sent on
               connections that were closed for others, as far as the kernel took it
    kill       killed with SIGKILL at half of the bytes, run again: bytes that came twice beside
               those. Of docker the client is killed, which ends its pull

What counts are the ratios. With --mbit the loopback device passes on so many megabits a second, as
the wire of a site does: without it the programs are slower than the line, and what waits in their
sockets when they are killed, up to 30 MB a connection, has come, too.

All of it runs beside a Docker engine in a network namespace that has only loopback
(tests/stubs/with-docker), so what the loopback device counts is what the registry sent. Needs
docker-registry, skopeo and the component `docker`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
PYZ = ROOT / "dist/hfship.pyz"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from support import components  # noqa: E402
from support.registry import layer_of, make_image, noise, real_registry  # noqa: E402

INSIDE = "HFSHIP_BENCHMARK_INSIDE"
PORT = 5055
NAME = f"localhost:{PORT}/bench/app:1"
MB = 1_000_000
PIECE_MB = 100  # of noise at once, which has a largest size
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Tool(NamedTuple):
    """A program that fetches the image, and what makes it forget that it has it."""

    name: str
    command: Sequence[str]
    forget: Callable[[], None]


class Run(NamedTuple):
    """Wall and CPU seconds of a run, and the bytes that came."""

    seconds: float
    cpu: float
    received: int


def received() -> int:
    """Bytes that the loopback device brought since it is up."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise SystemExit("there is no loopback device")


def slow_down(mbit: int) -> None:
    """Let loopback pass on no more than so many megabits per second."""
    limit = ["rate", f"{mbit}mbit", "burst", "1mb", "latency", "50ms"]
    subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "tbf", *limit], check=True)


def daemons_cpu() -> float:
    """CPU seconds of docker's daemons so far."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "comm").read_text().strip()
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if name in ("dockerd", "containerd"):
            total += (int(fields[11]) + int(fields[12])) * TICK_S
    return total


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(tool: Tool) -> Run:
    """One whole run, from nothing."""
    tool.forget()
    began, cpu, bytes_before = time.monotonic(), children_cpu() + daemons_cpu(), received()
    subprocess.run(tool.command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    return Run(seconds, children_cpu() + daemons_cpu() - cpu, received() - bytes_before)


def twice(tool: Tool, size: int, whole: float) -> float:
    """Bytes that came twice, where the tool was killed at half of `size` bytes and run again, of
    which a whole run gets `whole`."""
    tool.forget()
    before = received()
    process = subprocess.Popen(
        tool.command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while received() - before < size // 2 and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # what is on its way in the kernel
    subprocess.run(tool.command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return max(0, received() - before - whole)


def tools(work: Path) -> List[Tool]:
    """The three, each with a place of its own."""
    ours, theirs = work / "hfship", work / "skopeo"

    def remove_image() -> None:
        subprocess.run(["docker", "rmi", "-f", NAME], capture_output=True, check=False)

    fetch = [sys.executable, str(PYZ), "fetch", f"docker://{NAME}", "-o", str(ours)]
    copy = ["skopeo", "copy", "--src-tls-verify=false", f"docker://{NAME}", f"oci:{theirs}:1"]
    return [
        Tool("hfship", fetch, lambda: shutil.rmtree(ours, ignore_errors=True)),
        Tool("skopeo", copy, lambda: shutil.rmtree(theirs, ignore_errors=True)),
        Tool("docker", ["docker", "pull", "-q", NAME], remove_image),
    ]


def benchmark(args: argparse.Namespace) -> Dict[str, Any]:
    """All figures, beside the engine."""
    rows: Dict[str, Dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="hfship-images-") as folder:
        work = Path(folder)
        os.environ["HOME"] = str(work)
        tars = []
        for number in range(args.layers):
            pieces = args.mb // args.layers // PIECE_MB or 1
            content = [
                noise(args.mb * MB // args.layers // pieces, number * 1000 + i)
                for i in range(pieces)
            ]
            tars.append(layer_of({f"{number}-{i}": piece for i, piece in enumerate(content)}))
        image = make_image(tars)
        size = sum(len(blob) for blob in image.blobs.values())
        with real_registry(work / "registry", PORT) as registry:
            registry.add(image, "bench/app", "1")
            if args.mbit:
                slow_down(args.mbit)
            candidates = tools(work)
            runs: Dict[str, List[Run]] = {tool.name: [] for tool in candidates}
            for _ in range(args.rounds):
                for tool in candidates:
                    runs[tool.name].append(measured(tool))
            for tool in candidates:
                seconds = statistics.median(run.seconds for run in runs[tool.name])
                cpu = statistics.median(run.cpu for run in runs[tool.name])
                whole = statistics.median(run.received for run in runs[tool.name])
                again = twice(tool, size, whole)
                rows[tool.name] = {
                    "mb_per_s": size / MB / seconds,
                    "cpu_s_per_gb": cpu / (size / 1e9),
                    "over_percent": 100 * (whole - size) / size,
                    "twice_mb": again / MB,
                    "twice_percent": 100 * again / size,
                }
    return {"bytes": size, "layers": args.layers, "tools": rows}


def table(found: Dict[str, Any]) -> str:
    """For people: each figure, and how ours compares."""
    rows = found["tools"]
    ours = rows["hfship"]
    heads = f"{'':10}{'MB/s':>8}{'CPU s/GB':>10}{'over %':>8}{'twice MB':>10}{'%':>7}"
    lines = [heads + "   hfship: speed, CPU"]
    for name, row in rows.items():
        speed = ours["mb_per_s"] / row["mb_per_s"]
        cpu = ours["cpu_s_per_gb"] / row["cpu_s_per_gb"]
        figures = f"{row['mb_per_s']:8.0f}{row['cpu_s_per_gb']:10.2f}"
        figures += f"{row['over_percent']:8.1f}{row['twice_mb']:10.0f}{row['twice_percent']:7.1f}"
        lines.append(f"{name:10}{figures}   {speed:.2f}x, {cpu:.2f}x")
    return "\n".join(lines)


def main() -> None:
    """Run it, beside an engine of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbit", type=int, default=0)
    args = parser.parse_args()
    if not os.environ.get(INSIDE):
        components.require("docker")
        os.environ[INSIDE] = "1"
        argv = components.with_docker_argv([sys.executable, *sys.argv])
        raise SystemExit(subprocess.run(argv, check=False).returncode)
    found = benchmark(args)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
