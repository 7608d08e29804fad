#!/usr/bin/env python3
"""The fuzz tests with one seed after the other, until the time is up or one fails.

make fuzz [SECONDS=3600]     first the seeds of seeds.txt, then fresh ones
make fuzz SEED=N             that one seed, once
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator, List, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ROUND_S = 600  # what one seed takes, about: new seeds find more than longer rounds


def kept_seeds() -> List[int]:
    """The seeds of seeds.txt."""
    lines = (HERE / "seeds.txt").read_text().splitlines()
    return [int(line) for line in lines if line.strip() and not line.startswith("#")]


def seeds() -> Iterator[int]:
    """Those that are kept, then fresh ones for ever."""
    yield from kept_seeds()
    while True:
        yield secrets.randbits(32)


def passes(seed: int, round_s: float, arguments: Sequence[str]) -> bool:
    """Run the fuzz tests with a seed. pytest says what fails, and how to see that input again."""
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}"]
    environment = {**os.environ, "HFSHIP_FUZZ_SECONDS": f"{round_s:.0f}"}
    targets = arguments or ["tests/fuzz"]
    command = [sys.executable, "-m", "pytest", *options, *targets]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 with the first seed that fails."""
    parser = argparse.ArgumentParser(description="hostile input with fresh seeds, for a while")
    parser.add_argument("--seconds", type=float, default=3600, help="default: 3600")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("tests", nargs="*", help="default: all of tests/fuzz")
    options = parser.parse_args(arguments)

    end = time.monotonic() + options.seconds
    done = 0
    for seed in seeds() if options.seed is None else [options.seed]:
        left = end - time.monotonic()
        if left <= 0:
            break
        # At least a second, which is as long as in the suite, but with this seed.
        if not passes(seed, max(1.0, min(left, ROUND_S)), options.tests):
            print(f"failed with seed {seed}; again: make fuzz SEED={seed}", flush=True)
            return 1
        done += 1
        print(f"seed {seed} passed; {max(0.0, end - time.monotonic()):.0f} s left", flush=True)
    print(f"{done} seeds, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
