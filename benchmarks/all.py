#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""hfship beside its peers: one run, one table, which is that of the README.

    make bench                                 all of it; some 20 minutes on 16 cores
    python3 benchmarks/all.py pack chain       some of it
    python3 benchmarks/all.py --gb 16 --folder /dev/shm pack
    python3 benchmarks/all.py --small          all of it in two minutes: for its errors, not its
                                               times; what CI runs

Programs take turns, so that what else the machine does falls on all of them. "hfship beside it" is
how many times as fast hfship is as a program, and how many times its CPU seconds it takes. Programs
that are not here are left out, and said, unless HFSHIP_REQUIRE_ALL is set. Benchmarks that need a
docker (serve.py, images.py), and placement.py, stand alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import List

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from measure import (  # noqa: E402
    PYZ,
    SMALL,
    VERSIONS,
    Missing,
    Row,
    Scale,
    as_json,
    full,
    has,
    machine,
    table,
)

# Each is a room with `rows(work, scale)`, imported when its turn comes: they need different things.
SECTIONS = ("fetch", "pack", "chain", "gateway", "start", "looks")


def section_rows(name: str, folder: Path, scale: Scale) -> List[Row]:
    """The rows of a section, as they come on stderr, too."""
    rows = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"hfship-{name}-", dir=folder) as work:
        try:
            for row in import_module(name).rows(Path(work), scale):
                rows.append(row)
                said = f"{row.step}: {row.tool}  {row.speed}  {row.cpu_text}  {row.said}"
                print(said, file=sys.stderr, flush=True)
        except Missing as exc:
            rows.append(Row(name, "all", said=f"left out: {exc}"))
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def require_all() -> None:
    """Refuse to leave anything out where nothing may be. Raises SystemExit."""
    absent = [name for name in VERSIONS if not has(name)]
    if absent and os.environ.get("HFSHIP_REQUIRE_ALL"):
        raise SystemExit(f"not here: {', '.join(absent)}")


def require_built() -> None:
    """Refuse a build that is older than its sources. Raises SystemExit."""
    newest = max(path.stat().st_mtime for path in (ROOT / "src").rglob("*.py"))
    if not PYZ.exists() or PYZ.stat().st_mtime < newest:
        raise SystemExit(f"{PYZ} is missing or older than its sources: make build")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(SECTIONS)
    parser.add_argument("section", nargs="*", help=f"of {names} (default: all)")
    parser.add_argument("--small", action="store_true", help="for its errors, not for its times")
    parser.add_argument("--gb", type=float, default=4.0, help="bytes of what is large, in 10^9")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files lie: /dev/shm for memory")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json")
    args = parser.parse_args()
    unknown = sorted(set(args.section) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {unknown[0]}: {names}")
    require_built()
    require_all()

    scale = SMALL if args.small else full(args.gb)._replace(rounds=args.rounds)
    facts = machine(args.folder or Path(tempfile.gettempdir()))
    rows: List[Row] = []
    for name in args.section or SECTIONS:
        rows += section_rows(name, args.folder, scale)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    print(table(rows))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": facts, "rows": [as_json(row) for row in rows]}
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
