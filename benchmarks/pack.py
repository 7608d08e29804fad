"""Pack, verify and unpack side by side with tar and zstd, pzstd and ZipNN: ratio, speed, CPU and memory.

    make bench                                        the table, and build/bench-pack.json
    python3 benchmarks/pack.py --gb 4 --jobs 1 2 16   more data, other numbers of workers
    python3 benchmarks/pack.py --zipnn venv/bin/python   a Python that has zipnn

Every program reads the same files from the page cache and writes to the same folder. hfship, which runs as the built
dist/hfship.pyz, also hashes every file, writes a manifest and the sums of what it wrote; unpacking, it proves every
byte. The others do not: rows with "+ sha256sum" do by hand what it takes to know as much, "hashed too" does it in one
pass, as a pipe of zstd, tar and sha256sum. Rows of the step "floor" are what one stream costs that nobody can split:
hashing the model's files one after the other, or its archive.

Memory is the largest sum over all processes of a program at one time: their own pages, and their part of shared ones.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

ROOT = Path(__file__).resolve().parent.parent
PYZ = ROOT / "dist" / "hfship.pyz"
sys.path.insert(0, str(ROOT))

import hfship  # noqa: E402

BASE = 16 << 20  # bytes of distinct data per file, then repeated: farther than any window below zstd level 10 reaches

# All files in one process; the seconds that count are those without the import of torch, which it prints.
ZIPNN = """
import pathlib, sys, time
from zipnn import ZipNN
source, target, dtype, threads, mode = sys.argv[1:]
codec = ZipNN(bytearray_dtype=dtype, input_format="byte", threads=int(threads))
started = time.monotonic()
for path in sorted(pathlib.Path(source).glob("*.safetensors")):
    with open(path, "rb") as stream, open(pathlib.Path(target) / path.name, "wb") as out:
        while mode == "pack":
            piece = stream.read(256 << 20)
            if not piece:
                break
            packed = codec.compress(bytearray(piece))
            out.write(len(packed).to_bytes(8, "little") + packed)
        while mode == "unpack":
            head = stream.read(8)
            if not head:
                break
            out.write(codec.decompress(stream.read(int.from_bytes(head, "little"))))
print(time.monotonic() - started)
"""


def gaussian(kind: str, size: int, seed: int) -> bytes:
    """Weights as tensors of a model have them: each row normal, with a deviation of its own."""
    chance = random.Random(seed)
    if kind == "int4":
        return chance.randbytes(size)
    if kind == "fp8":
        wide = gaussian("bf16", 2 * size, seed)
        # e4m3 keeps 3 bits of mantissa; scaled so that the largest exponents are in use.
        high, low = wide[1::2], wide[0::2]
        table = {(top, rest >> 4): _fp8(top, rest) for top in set(high) for rest in range(0, 256, 16)}
        return bytes(table[top, rest >> 4] for top, rest in zip(high, low))
    values = array.array("f")
    count = size // (4 if kind == "f32" else 2)
    while len(values) < count:
        deviation = 0.02 * 1.2 ** (len(values) // 4096 % 7)
        values.extend(chance.gauss(0, deviation) for _ in range(4096))
    wide = values.tobytes()[: 4 * count]
    if kind == "f32":
        return wide
    narrow = bytearray(2 * count)
    narrow[0::2], narrow[1::2] = wide[2::4], wide[3::4]
    return bytes(narrow)


def _fp8(high: int, low: int) -> int:
    exponent = ((high & 0x7F) << 1 | low >> 7) - 113
    return high & 0x80 | (max(0, min(15, exponent)) << 3) | low >> 4 & 7


MODELS = {
    "bf16": ["bf16", "bf16", "bf16", "bf16"],
    "fp8": ["fp8", "fp8", "fp8", "fp8"],
    "f32": ["f32", "f32", "f32", "f32"],
    "mixed": ["bf16", "fp8", "int4", "f32"],
    "1file": ["bf16"],
    "shards": ["bf16"] * 16,  # as large models have them: 20 to 60
}


def make_model(folder: Path, kinds: Sequence[str], size: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bench"}')
    bases: Dict[str, bytes] = {}
    for number, kind in enumerate(kinds):
        base = bases.setdefault(kind, gaussian(kind, BASE, number))
        with (folder / f"model-{number:05d}.safetensors").open("wb") as stream:
            for _ in range(max(size // len(kinds) // BASE, 1)):
                stream.write(base)
    # As fetch leaves a model: with its manifest.
    hfship.manifest_to_pack(folder, None, 1, hfship.Reporter("none", -1))


def pss(pid: int) -> int:
    """Bytes that a process holds, and its part of those it shares (PSS, proc_pid_smaps(5)); 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except OSError:
        return 0


class Memory(threading.Thread):
    """The peak of what a process and all its descendants have in memory, together (PSS of proc_pid_smaps(5))."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.peak, self._session, self._ended = 0, session, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            processes = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
            self.peak = max(self.peak, sum(map(pss, filter(self._of_session, processes))))

    def _of_session(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self._session
        except OSError:  # it ended meanwhile
            return False

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.peak


def measure(argv: Sequence[Any], repeat: int, clean: Path) -> Dict[str, float]:
    """The best of some runs: seconds, CPU seconds, peak memory of all processes together."""
    best: Dict[str, float] = {}
    for _ in range(repeat):
        shutil.rmtree(clean, ignore_errors=True)
        clean.mkdir(parents=True)
        os.sync()
        before, started = children_cpu(), time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        memory = Memory(process.pid)
        out, err = process.communicate()
        seconds = time.monotonic() - started
        peak = memory.end()
        if process.returncode:
            raise SystemExit(f"{argv}: {err}")
        if argv[1:2] == ["-c"]:
            seconds = float(out)
        cpu = children_cpu() - before
        if not best or seconds < best["seconds"]:
            best = {"seconds": seconds, "cpu": cpu, "peak": peak, "bytes": folder_size(clean)}
    return best


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def folder_size(folder: Path) -> int:
    """Bytes of its files, without the hfship.pyz that pack puts beside an archive: some MB for any number of models."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyz")


class Bench:
    """One model through all programs."""

    def __init__(self, work: Path, model: Path, options: argparse.Namespace) -> None:
        self.work, self.model, self.options = work, model, options
        self.size = sum(size for _, size in hfship.content_files(model))
        self.rows: List[Dict[str, Any]] = []

    def row(self, step: str, program: str, jobs: int, argv: Sequence[Any], keep: str = "") -> None:
        out = self.work / "out"
        found = measure(argv, self.options.repeat, out)
        ratio = found["bytes"] / self.size
        self.rows.append({"model": self.model.name, "step": step, "program": program, "jobs": jobs, **found})
        line = [self.model.name, step, program, str(jobs), f"{ratio:.4f}", f"{self.size / found['seconds'] / 1e6:.0f}"]
        line += [f"{found['cpu'] / self.size * 1e9:.2f}", f"{found['peak'] / 1e6:.0f}"]
        print("  ".join(cell.rjust(width) for cell, width in zip(line, (6, 6, 20, 4, 7, 6, 6, 6))), flush=True)
        if keep:
            shutil.rmtree(self.work / keep, ignore_errors=True)
            out.rename(self.work / keep)

    def run(self) -> None:
        out, name = self.work / "out", self.model.name
        ship = [sys.executable, PYZ]
        parent = self.model.parent
        self.row("floor", "sha256sum files", 1, ["sh", "-ec", f"sha256sum {self.model}/*"])
        sums = self.work / "sums"
        subprocess.run(["sh", "-ec", f"cd {parent}; sha256sum {name}/* >{sums}"], check=True)
        for jobs in self.options.jobs:
            for level in (1, 3):
                tar = f"tar -C {parent} -c {name} | zstd -q -{level} -T{jobs} -o {out}/x.tar.zst"
                self.row("pack", f"tar | zstd -{level}", jobs, ["sh", "-ec", tar], f"zstd{level}")
            if shutil.which("pzstd"):
                tar = f"tar -C {parent} -c {name} | pzstd -q -1 -p {jobs} -o {out}/x.tar.zst"
                self.row("pack", "tar | pzstd -1", jobs, ["sh", "-ec", tar], "pzstd")
            for profile in hfship.PROFILES:
                command = [*ship, "pack", self.model, "-o", out, "--profile", profile, "-j", jobs]
                self.row("pack", f"hfship {profile}", jobs, command, profile)
            untar = f"tar -C {out} --zstd -xf {self.work}/zstd1/x.tar.zst"
            self.row("floor", "sha256sum archive", 1, ["sh", "-ec", f"sha256sum {self.work}/zstd1/x.tar.zst"])
            self.row("unpack", "tar --zstd -x", jobs, ["sh", "-ec", untar])
            proof = f"cd {out}; sha256sum --quiet -c {sums}"
            self.row("unpack", "tar -x + sha256sum", jobs, ["sh", "-ec", f"{untar}; {proof}"])
            once = f"{{ zstd -qdc {self.work}/zstd1/x.tar.zst | tee /dev/fd/3 | tar -C {out} -x; }} 3>&1 | sha256sum"
            self.row("unpack", "tar -x, hashed too", jobs, ["sh", "-ec", once])
            if shutil.which("pzstd"):
                pipe = f"pzstd -q -dc -p {jobs} {self.work}/pzstd/x.tar.zst | tar -C {out} -x"
                self.row("unpack", "pzstd -d | tar -x", jobs, ["sh", "-ec", pipe])
            for profile in hfship.PROFILES:
                archive = self.work / profile / f"{name}.tar.zst"
                self.row("verify", f"hfship {profile}", jobs, [*ship, "verify", archive, "-j", jobs])
                self.row("unpack", f"hfship {profile}", jobs, [*ship, "unpack", archive, "-o", out, "-j", jobs])
            self.zipnn(jobs)

    def zipnn(self, jobs: int) -> None:
        dtypes = {"bf16": "bfloat16", "f32": "float32"}
        if self.options.zipnn and self.model.name in dtypes:
            command = [self.options.zipnn, "-c", ZIPNN]
            dtype, out = dtypes[self.model.name], self.work / "out"
            self.row("pack", "ZipNN", jobs, [*command, self.model, out, dtype, jobs, "pack"], "znn")
            self.row("unpack", "ZipNN", jobs, [*command, self.work / "znn", out, dtype, jobs, "unpack"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="bytes of each model, in 10^9")
    parser.add_argument("--jobs", type=int, nargs="+", default=sorted({1, hfship.default_jobs()}))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--zipnn", metavar="PYTHON", help="a Python that has zipnn")
    parser.add_argument("--work", type=Path, help="folder for the data (default: a temporary one)")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench-pack.json")
    options = parser.parse_args()
    if not PYZ.exists() or PYZ.stat().st_mtime < (ROOT / "hfship.py").stat().st_mtime:
        raise SystemExit(f"{PYZ} is missing or older than hfship.py: make build")
    print(" model    step               program  jobs    size    MB/s  CPU/GB  MB RAM")
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            # In a process of its own: a child's peak memory counts what its parent had when it was started.
            if not (child := os.fork()):
                make_model(Path(work) / "models" / name, MODELS[name], int(options.gb * 1e9))
                os._exit(0)
            os.waitpid(child, 0)
            bench = Bench(Path(work), Path(work) / "models" / name, options)
            bench.run()
            rows += bench.rows
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"cores": hfship.default_jobs(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
