#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A model from the Hub to the site, end to end: fetch, pack --split, push, verify, unpack.

    python3 benchmarks/all.py chain                     in the one table
    python3 benchmarks/chain.py --gb 30 --folder DIR    a model of 30 GB: DIR needs 2.6 times that

Every hop stands beside the limit of what carries its bytes, measured in turns with it: curl for the
line from the Hub, zstd for the processor, rsync for the line to the site, tar for the disk there.
None of these proves a byte, but for "then sha256". What remains to each hop is its share of all.
What no later hop reads is removed as it goes, so that a disk of a common machine has room for all.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import fetch  # noqa: E402
from measure import (  # noqa: E402
    CORES,
    OURS,
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
from pack import DIGEST, make_in_child  # noqa: E402

PARTS = 8  # 30 GB on disks with FAT, whose files end at 4 GiB
ROOM = 2.6  # times the model: it and its archive, and the archive of tar and zstd


class Chain:
    """One model on its way."""

    def __init__(self, work: Path, scale: Scale) -> None:
        self.work, self.scale = work, scale
        self.hub = fetch.Bench(work, scale)
        self.model = work / "model" / "x"
        self.packed = work / "packed"
        self.site = work / "site"
        self.other = work / "other"  # where the others write
        self.size = 0
        self._written = self.other  # by the run before, of the same hop

    def rows(self) -> Iterator[Row]:
        """Each hop, then all of them."""
        source = self.hub.files / fetch.REPO
        make_in_child(source, "bf16", self.scale)
        sizes = {path.name: path.stat().st_size for path in source.iterdir()}
        self.size = sum(sizes.values())
        hops = []
        if has("nginx"):
            with self.hub.servers():
                self.hub.hub.faults.cdn = f"{self.hub.base}/raw"
                self.hub.published(sizes)
                hops.append(self.hop("fetch", {OURS: self.fetch, **self.curl()}))
            shutil.rmtree(source)
        else:
            self.model.parent.mkdir()
            source.rename(self.model)
            yield Row("chain, fetch", OURS, said="left out: nginx is not here")
        hops.append(self.hop("pack --split", {OURS: self.pack, "tar | zstd -1": self.tar}))
        shutil.rmtree(self.model)
        if has("rsync"):
            pushes = {OURS: self.push, "rsync": self.rsync, "rsync, then sha256": self.rsync_proven}
            hops.append(self.hop("push", pushes))
            shutil.rmtree(self.packed)
        else:
            self.packed.rename(self.site)
            yield Row("chain, push", OURS, said="left out: rsync is not here")
        hops.append(self.hop("verify", {OURS: self.verify}))
        hops.append(self.hop("unpack", {OURS: self.unpack, "tar --zstd -x": self.untar}))

        ours = [hop[0] for hop in hops]
        total = sum(row.seconds for row in ours)
        for hop in hops:
            share = f"{100 * hop[0].seconds / total:.0f} % of the way"
            yield replace(hop[0], said=share)
            yield from hop[1:]
        cpu = sum(row.cpu or 0 for row in ours)
        memory = max(row.memory for row in ours)
        yield Row("chain, all of it", OURS, total, self.size, cpu, memory)

    def hop(self, name: str, tools: Mapping[str, Callable[[], Run]]) -> List[Row]:
        """A hop, ours last: what it leaves is what the next one takes."""
        others = {tool: run for tool, run in tools.items() if tool != OURS}
        runs = in_turns({**others, OURS: tools[OURS]}, self.scale.rounds)
        self._written = self.other
        ours_first = {tool: runs[tool] for tool in tools}
        return rows_of(f"chain, {name}", ours_first, self.size)

    def empty(self, folder: Path) -> None:
        """Make an empty folder for a run, and remove what the run before it wrote."""
        for old in (self._written, folder):
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
        self._written = folder

    # -- the hops

    def fetch(self) -> Run:
        self.empty(self.model)
        words = ship("fetch", fetch.REPO, "-o", self.model.parent, "--name", "x", "-q")
        return measured(words, env=self.hub.environment())

    def curl(self) -> Dict[str, Callable[[], Run]]:
        """The line's limit, and with a proof of what came."""
        found: Dict[str, Callable[[], Run]] = {}
        for tool in ("curl", "curl, then sha256"):
            if has("curl"):
                found[tool] = partial(self.curl_once, tool)
        return found

    def curl_once(self, tool: str) -> Run:
        self.empty(self.other)
        base = f"{self.hub.base}/raw/{fetch.REPO}"
        return measured(self.hub.command(tool, self.other, base), env=self.hub.environment())

    def pack(self) -> Run:
        self.empty(self.packed)
        split = max(self.size // PARTS, 3 << 20)
        return measured(ship("pack", self.model, "-o", self.packed, "--split", split, "-q"))

    def tar(self) -> Run:
        self.empty(self.other)
        folder, name = quoted(self.model.parent), self.model.name
        tar = f"tar -C {folder} -c {name} | zstd -q -f -1 -T{CORES} -o {quoted(self.zstd)}"
        return shell(tar)

    @property
    def zstd(self) -> Path:
        """The archive of tar and zstd."""
        return self.work / "other.tar.zst"

    def push(self) -> Run:
        self.empty(self.site)
        return measured(ship("push", self.packed, self.site, "-q"))

    def rsync(self) -> Run:
        self.empty(self.other)
        return measured(["rsync", "-a", "--whole-file", f"{self.packed}/", self.other])

    def rsync_proven(self) -> Run:
        self.empty(self.other)
        copy = f"rsync -a --whole-file {quoted(self.packed)}/ {quoted(self.other)}"
        return shell(f"{copy}; find {quoted(self.other)} -type f | xargs -P{CORES} -n1 {DIGEST}")

    def verify(self) -> Run:
        return measured(ship("verify", self.site, "-q"))

    def unpack(self) -> Run:
        self.empty(self.work / "models")
        return measured(ship("unpack", self.site, "-o", self.work / "models", "-q"))

    def untar(self) -> Run:
        self.empty(self.other)
        return shell(f"tar -C {quoted(self.other)} --zstd -xf {quoted(self.zstd)}")


def shell(line: str) -> Run:
    return measured(["bash", "-ec", f"set -o pipefail; {line}"])


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def rows(work: Path, scale: Scale) -> Iterator[Row]:
    """Each hop, and all of them."""
    yield from Chain(work, scale).rows()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=30.0, help="size of the model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the files lie, on both sides")
    args = parser.parse_args()
    scale = full(args.gb)._replace(rounds=args.rounds)
    with tempfile.TemporaryDirectory(prefix="hfship-bench-", dir=args.folder) as folder:
        needed = ROOM * scale.size
        if shutil.disk_usage(folder).free < needed:
            raise SystemExit(f"{folder} has too little room: {needed / 1e9:.0f} GB are needed")
        print(facts_text(Path(folder)), flush=True)
        print(table(rows(Path(folder), scale)))


if __name__ == "__main__":
    main()
