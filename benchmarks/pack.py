#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pack, verify and unpack side by side with tar and zstd, pzstd and ZipNN.

    python3 benchmarks/all.py pack                            in the one table
    python3 benchmarks/pack.py --gb 4 --jobs 16 --models fp8  more data, other workers and weights
    python3 benchmarks/pack.py --zipnn venv/bin/python        a Python that has zipnn

Every program reads the same files from the page cache and writes to the same folder. hfship, which
runs as the built dist/hfship.pyz, also hashes every file and what it writes; unpacking, it proves
every byte. The others do not: "hashed" does it for them in the same pipe, as a script would.
Rows called "floor" are what one stream costs that nobody can split: hashing the model's files one
after the other, or its archive.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import shlex
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from measure import (  # noqa: E402
    CORES,
    Row,
    Run,
    Scale,
    facts_text,
    full,
    has,
    in_turns,
    measured,
    rows_of,
    ship,
    table,
)

from hfship.archive.pack_plan import PROFILES  # noqa: E402

# What hashes for the others: it takes the processor's own instructions, as sha256sum may not.
DIGEST = "openssl dgst -sha256"

# Bytes of distinct data per file, then repeated: farther than the windows of zstd -1 and -3 reach.
BASE = 16 << 20
SMALL_BASE = 4 << 20

# All files in one process. What the import of torch takes counts: 1 to 2 seconds.
ZIPNN = """
import pathlib, sys
from zipnn import ZipNN
source, target, dtype, threads, mode = sys.argv[1:]
codec = ZipNN(bytearray_dtype=dtype, input_format="byte", threads=int(threads))
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
        table = {
            (top, rest >> 4): _fp8(top, rest) for top in set(high) for rest in range(0, 256, 16)
        }
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


# How safetensors calls the elements of each kind, and their bytes.
DTYPES = {"bf16": ("BF16", 2), "fp8": ("F8_E4M3", 1), "f32": ("F32", 4), "int4": ("U8", 1)}


def make_model(folder: Path, kinds: Sequence[str], size: int, base_size: int = BASE) -> None:
    """A model of about `size` bytes; a file for each of `kinds`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bench"}')
    bases: Dict[str, bytes] = {}
    for number, kind in enumerate(kinds):
        base = bases.get(kind)
        if base is None:
            base = bases[kind] = gaussian(kind, base_size, number)
        pieces = max(size // len(kinds) // base_size, 1)
        first = number * base_size // len(kinds)  # else all files would be one
        turned = base[first:] + base[:first]
        with (folder / f"model-{number:05d}.safetensors").open("wb") as stream:
            stream.write(header_of(kind, pieces * base_size))
            for _ in range(pieces):
                stream.write(turned)


def header_of(kind: str, size: int) -> bytes:
    """The beginning of a safetensors file with one tensor of `size` bytes."""
    dtype, width = DTYPES[kind]
    tensor = {"dtype": dtype, "shape": [size // width], "data_offsets": [0, size]}
    text = json.dumps({"weight": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def make_in_child(folder: Path, kind: str, scale: Scale) -> None:
    """Make a model in a process of its own: its memory would count for every program that is
    started after it.
    """
    base_size = SMALL_BASE if scale.is_small else BASE
    child = os.fork()
    if not child:
        code = 1
        try:
            make_model(folder, MODELS[kind], scale.size, base_size)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"the model {kind} could not be made")


def made_model(work: Path, kind: str, scale: Scale) -> Path:
    """A model as fetch leaves it: with its manifest."""
    folder = work / "models" / kind
    make_in_child(folder, kind, scale)
    measured(ship("pack", folder, "-o", work / "first", "--profile", "store"))
    shutil.rmtree(work / "first")
    return folder


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, without what hfship puts beside an archive."""
    archive_or_model = (path for path in folder.rglob("*") if path.suffix not in (".pyz", ".txt"))
    return sum(path.stat().st_size for path in archive_or_model if path.is_file())


class Tool(NamedTuple):
    """A program of a step: its command line, or a line for a shell, and the folder below the
    benchmark's in which its output is kept for the next step.
    """

    name: str
    command: Any
    keep: str = ""


class Bench:
    """One model through all programs."""

    def __init__(self, work: Path, model: Path, scale: Scale, jobs: int, zipnn: str = "") -> None:
        self.work, self.model, self.scale, self.jobs = work, model, scale, jobs
        self.zipnn = zipnn
        self.size = size_of(model)
        self.out = work / "out"
        self.ratios: Dict[str, float] = {}  # of what was packed: bytes of it per byte of the model

    def step(self, step: str, tools: Sequence[Tool]) -> List[Row]:
        """Tools in turns, each into an empty folder."""
        name = f"{step}, {self.model.name}, {self.jobs} workers"
        calls: Mapping[str, Callable[[], Run]] = {
            tool.name: partial(self.run, tool) for tool in tools
        }
        rows = rows_of(name, in_turns(calls, self.scale.rounds), self.size)
        if step != "pack":
            return rows
        return [self.with_ratio(row) for row in rows]

    def with_ratio(self, row: Row) -> Row:
        """A row that says how small the archive is."""
        ratio = self.ratios[row.tool]
        return Row(**{**vars(row), "said": f"{100 * ratio:.1f} % of the size"})

    def run(self, tool: Tool) -> Run:
        """One tool, once."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        argv = tool.command
        if isinstance(argv, str):
            argv = ["bash", "-ec", f"set -o pipefail; {argv}"]
        found = measured(argv)
        self.ratios[tool.name] = size_of(self.out) / self.size
        if tool.keep:
            shutil.rmtree(self.work / tool.keep, ignore_errors=True)
            self.out.rename(self.work / tool.keep)
        return found

    def rows(self) -> Iterator[Row]:
        """All steps."""
        yield from self.step("pack", self.packers())
        yield from self.step("verify", self.verifiers())
        yield from self.step("unpack", self.unpackers())

    def packers(self) -> List[Tool]:
        """Who packs."""
        model, out, jobs = shlex.quote(str(self.model)), shlex.quote(str(self.out)), self.jobs
        parent, name = shlex.quote(str(self.model.parent)), self.model.name
        tar = f"tar -C {parent} -c {name}"
        hashed = f"{tar} | tee >({DIGEST} >{out}/model) | zstd -q -1 -T{jobs}"
        hashed += f" | tee >({DIGEST} >{out}/sum) >{out}/x.tar.zst"
        pack = ship("pack", self.model, "-o", self.out, "-j", jobs)
        parts = max(self.size // 6, 3 << 20)
        tools = [
            Tool("hfship", pack, "standard"),
            Tool("hfship --split", [*pack, "--split", parts]),
            Tool("hfship --profile store", [*pack, "--profile", "store"], "store"),
            Tool("hfship --profile smallest", [*pack, "--profile", "smallest"], "smallest"),
            Tool("tar | zstd -1", f"{tar} | zstd -q -1 -T{jobs} -o {out}/x.tar.zst", "zstd"),
            Tool("tar | zstd -1, hashed", hashed),
            Tool("floor: SHA-256 of the files", f"{DIGEST} {model}/*.safetensors"),
        ]
        if not self.scale.is_small:
            third = f"{tar} | zstd -q -3 -T{jobs} -o {out}/x.tar.zst"
            tools.append(Tool("tar | zstd -3", third))
        if has("pzstd"):
            pzstd = f"{tar} | pzstd -q -1 -p {jobs} -o {out}/x.tar.zst"
            tools.append(Tool("tar | pzstd -1", pzstd, "pzstd"))
        if self.zipnn:
            tools.append(Tool("ZipNN", self.zipnn_words(self.model, "pack"), "znn"))
        return tools

    def verifiers(self) -> List[Tool]:
        """Who proves an archive."""
        tools = []
        for profile in PROFILES:
            archive = self.archive_of(profile)
            tools.append(Tool(named("hfship", profile), ship("verify", archive, "-j", self.jobs)))
        zstd = shlex.quote(str(self.work / "zstd/x.tar.zst"))
        return [
            *tools,
            Tool("zstd -t", f"zstd -q -t {zstd}"),
            Tool("floor: SHA-256 of the archive", f"{DIGEST} {zstd}"),
        ]

    def unpackers(self) -> List[Tool]:
        """Who unpacks."""
        out, jobs = shlex.quote(str(self.out)), self.jobs
        tools = []
        for profile in PROFILES:
            command = ship("unpack", self.archive_of(profile), "-o", self.out, "-j", jobs)
            tools.append(Tool(named("hfship", profile), command))
        zstd = shlex.quote(str(self.work / "zstd/x.tar.zst"))
        hashed = f"zstd -qdc {zstd} | tee >({DIGEST} >&2) | tar -C {out} -x"
        tools += [
            Tool("tar --zstd -x", f"tar -C {out} --zstd -xf {zstd}"),
            Tool("tar --zstd -x, hashed", hashed),
        ]
        if has("pzstd"):
            source = shlex.quote(str(self.work / "pzstd/x.tar.zst"))
            tools.append(
                Tool("pzstd -d | tar -x", f"pzstd -q -dc -p {jobs} {source} | tar -C {out} -x")
            )
        if self.zipnn:
            tools.append(Tool("ZipNN", self.zipnn_words(self.work / "znn", "unpack")))
        return tools

    def archive_of(self, profile: str) -> Path:
        return self.work / profile / f"{self.model.name}.tar.zst"

    def zipnn_words(self, source: Path, mode: str) -> List[Any]:
        dtype = {"bf16": "bfloat16", "f32": "float32"}[self.model.name]
        return [self.zipnn, "-c", ZIPNN, source, self.out, dtype, self.jobs, mode]


def named(program: str, profile: str) -> str:
    """hfship with a profile that is not the usual one."""
    if profile == PROFILES[0]:
        return program
    return f"{program} --profile {profile}"


def rows(
    work: Path,
    scale: Scale,
    models: Sequence[str] = ("bf16",),
    jobs: Sequence[int] = (CORES,),
    zipnn: str = "",
) -> Iterator[Row]:
    """The rows of some models and numbers of workers."""
    for kind in models:
        model = made_model(work, kind, scale)
        for count in jobs:
            with_zipnn = zipnn if kind in ("bf16", "f32") else ""
            yield from Bench(work, model, scale, count, with_zipnn).rows()
        for left in work.iterdir():
            shutil.rmtree(left)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="bytes of each model, in 10^9")
    parser.add_argument("--jobs", type=int, nargs="+", default=[CORES])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["bf16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--zipnn", metavar="PYTHON", default="", help="a Python that has zipnn")
    parser.add_argument("--folder", type=Path, help="for the data (default: a temporary one)")
    args = parser.parse_args()
    scale = full(args.gb)._replace(rounds=args.rounds)
    with tempfile.TemporaryDirectory(prefix="hfship-bench-", dir=args.folder) as folder:
        print(facts_text(Path(folder)), flush=True)
        print(table(rows(Path(folder), scale, args.models, args.jobs, args.zipnn)))


if __name__ == "__main__":
    main()
