# SPDX-License-Identifier: Apache-2.0
"""What a start of hfship costs: CPU time of short commands, with and without its cache of code.

    python3 benchmarks/all.py start                           this build, and bare Python
    python3 benchmarks/start.py --against OLD.pyz --runs 20   beside another build, as ratios

The builds take turns, so that what else the machine does falls on all of them; each has a home
of its own. CPU time is that of a process and all its children, by wait4. "Without cache" is a home
that cannot be written: every start compiles what it imports.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Sequence, Tuple

from measure import PYZ, Row, Scale

MODEL = "Tiny"
COMMANDS: Mapping[str, Sequence[str]] = {
    "--help": ("--help",),
    "version": ("version",),
    "verify": ("verify", f"{MODEL}.tar.zst"),
    "status": ("status",),
    "watch": ("watch", "--once"),
}


@dataclass(frozen=True)
class Build:
    """A pyz, and the folder that is its home, its current folder and all its other folders."""

    pyz: Path
    place: Path

    def environment(self, cached: bool) -> Dict[str, str]:
        """Where it finds its folders. A cache below a file can be neither read nor made."""
        cache = self.place / "cache"
        if not cached:
            cache = self.pyz / "no"
        folders = ("MODELS", "PACKAGE", "LOG", "TRANSFER", "SITE_MODELS", "DEPLOY")
        env = {f"HFSHIP_{name}_DIR": str(self.place / name.lower()) for name in folders}
        env.update(HOME=str(self.place), HFSHIP_CACHE=str(cache), PATH=os.environ["PATH"])
        return env

    def cpu_ms(self, words: Sequence[str], cached: bool) -> float:
        """CPU time of one call."""
        return cpu_ms([sys.executable, str(self.pyz), *words], self.place, self.environment(cached))


def cpu_ms(argv: Sequence[str], folder: Path, env: Mapping[str, str]) -> float:
    """CPU time, in milliseconds, of a program and its children."""
    with subprocess.Popen(
        argv, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3, 9):
        sys.exit(f"{argv} ended with {process.returncode}: {said.decode()}")
    return (usage.ru_utime + usage.ru_stime) * 1000


def prepare(pyz: Path, place: Path) -> Build:
    """A build with a small archive beside it."""
    build = Build(pyz.resolve(), place)
    model = place / "models" / MODEL
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "qwen3"}\n')
    (model / "notes.bin").write_bytes(random.Random(1).randbytes(64 << 10))
    build.cpu_ms(["pack", MODEL, "-o", str(place)], cached=True)
    return build


def measure(
    builds: Sequence[Build], runs: int, cached: bool
) -> Dict[Tuple[str, Path], List[float]]:
    """Milliseconds by command and build, the builds in turns."""
    taken: Dict[Tuple[str, Path], List[float]] = {}
    for _ in range(runs):
        for build in builds:
            bare = [sys.executable, "-c", ""]
            taken.setdefault(("bare Python", build.pyz), []).append(
                cpu_ms(bare, build.place, build.environment(cached))
            )
        for name, words in COMMANDS.items():
            for build in builds:
                taken.setdefault((name, build.pyz), []).append(build.cpu_ms(words, cached))
    return taken


def rows(work: Path, scale: Scale) -> Iterator[Row]:
    """A row for each command, beside bare Python: medians of CPU seconds."""
    build = prepare(PYZ, work / "start")
    for cached, step in ((True, "CPU of a start"), (False, "CPU of a start, without its cache")):
        taken = measure([build], 1 if scale.is_small else 20, cached)
        for name in COMMANDS:
            seconds = statistics.median(taken[name, build.pyz]) / 1000
            yield Row(f"{step}: {name}", "hfship", seconds)
            bare = statistics.median(taken["bare Python", build.pyz]) / 1000
            yield Row(f"{step}: {name}", "python3 -c ''", bare)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="CPU time of hfship's starts.")
    parser.add_argument("--against", type=Path, metavar="PYZ", help="another build, as the base")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--pyz", type=Path, default=PYZ, metavar="PYZ")
    args = parser.parse_args()
    pyzs = [args.pyz]
    if args.against:
        pyzs.insert(0, args.against)
    scratch = Path(tempfile.mkdtemp(prefix="bench-start-"))
    try:
        builds = [prepare(pyz, scratch / str(number)) for number, pyz in enumerate(pyzs)]
        for cached in (True, False):
            print("\nwith cache" if cached else "\nwithout cache")
            show(measure(builds, args.runs, cached), builds)
    finally:
        shutil.rmtree(scratch)
    return 0


def show(taken: Mapping[Tuple[str, Path], List[float]], builds: Sequence[Build]) -> None:
    """A row for each command: median and least of each build, and how the last compares."""
    for name in ("bare Python", *COMMANDS):
        row = f"  {name:12}"
        medians = []
        for build in builds:
            times = taken[name, build.pyz]
            medians.append(statistics.median(times))
            row += f"{medians[-1]:8.1f} ms (least {min(times):6.1f})"
        if len(builds) > 1:
            row += f"   {medians[-1] / medians[0] - 1:+.0%}"
        print(row)


if __name__ == "__main__":
    sys.exit(main())
