# SPDX-License-Identifier: Apache-2.0
"""What the looks of a security review cost: fetch and unpack beside a build that does not look.

    python3 benchmarks/all.py --gb 4 --rounds 5 --folder /dev/shm looks

That build leaves out the look into each file, the facts of the card, and the log of custody; all
else is the same code. The model has safetensors alone: the walk over the opcodes of a pickle is
told by itself, for a file that is opcodes and no data.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping

from measure import OURS, PYZ, ROOT, Row, Run, Scale, in_turns, measured, rows_of

NAME = "looks"
BARE = "without looks"
# Functions of commands/admission.py, and what they return in the build that does not look.
LEFT_OUT = {"look_again": "[]", "completed_card": "manifest.card"}
NUMBERS = 2_000_000  # of a list in a pickle


def build_without(work: Path) -> Path:
    """A pyz of these sources whose functions of LEFT_OUT do nothing."""
    tree = work / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "tests", "dist"))
    path = tree / "src/hfship/commands/admission.py"
    text = path.read_text()
    for name, value in LEFT_OUT.items():
        head = rf'(\ndef {name}\(.*?"""\n)'
        text, count = re.subn(head, rf"\1    return {value}\n", text, count=1, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"commands/admission.py has no {name} that can be left out")
    path.write_text(text)
    pyz = work / "without.pyz"
    command = [sys.executable, "build_zipapp.py", "-o", str(pyz)]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return pyz


class Side:
    """A build with folders of its own."""

    def __init__(self, pyz: Path, place: Path, looks: bool) -> None:
        self.pyz, self.place = pyz, place
        self.env = {"HOME": str(place), "PATH": os.environ["PATH"]}
        for name in ("MODELS", "PACKAGE", "SITE_MODELS", "LOG"):
            self.env[f"HFSHIP_{name}_DIR"] = str(place / name.lower())
        if not looks:
            self.env["HFSHIP_POLICY_CUSTODY"] = "false"

    def run(self, *words: Any, anew: str = "") -> Run:
        """One run; the folder `anew` is removed before."""
        if anew:
            shutil.rmtree(self.place / anew, ignore_errors=True)
        return measured([sys.executable, str(self.pyz), *words], env=self.env)


def rows(work: Path, scale: Scale) -> Iterator[Row]:
    """Fetch and unpack with and without looks, then the walk over opcodes."""
    from support.make_model import make_model

    hub = work / "hub"
    make_model(hub / "org" / NAME, size_mb=scale.size / 1e6, shards=4)
    sides = {
        OURS: Side(PYZ, work / "ours", looks=True),
        BARE: Side(build_without(work), work / "bare", looks=False),
    }
    words = [sys.executable, str(PYZ), "mirror", str(hub), "--port", "0", "-q"]
    env = sides[OURS].env
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as mirror:
        try:
            assert mirror.stdout
            (url,) = re.findall(r"http://[^\s/]+:\d+", mirror.stdout.readline())
            fetch = ("fetch", f"org/{NAME}", "--endpoint", url, "-q")
            yield from compared("fetch", sides, scale, fetch, "models")
        finally:
            mirror.terminate()
    sides[OURS].run("pack", NAME, "-q")
    archive = sides[OURS].place / "package" / f"{NAME}.tar.zst"
    for side in sides.values():
        shutil.rmtree(side.place / "models")
    yield from compared("unpack", sides, scale, ("unpack", archive, "-q"), "site_models")
    yield walk_row(work / "opcodes.pkl", 1 if scale.is_small else 10)


def compared(
    step: str, sides: Mapping[str, Side], scale: Scale, words: Any, anew: str
) -> Iterator[Row]:
    """Both builds in turns: medians, and what the looks add to them."""

    def once(side: Side) -> Callable[[], Run]:
        return lambda: side.run(*words, anew=anew)

    runs = in_turns({tool: once(side) for tool, side in sides.items()}, scale.rounds)
    ours, bare = rows_of(f"looks, {step}", runs, scale.size, statistics.median)
    medians: Dict[str, float] = {}
    for tool, of_tool in runs.items():
        medians[tool] = statistics.median(run.cpu for run in of_tool)
    more_cpu = 100 * (medians[OURS] / medians[BARE] - 1)
    more_time = 100 * (ours.seconds / bare.seconds - 1)
    yield replace(ours, said=f"looks: CPU {more_cpu:+.1f} %, time {more_time:+.1f} %")
    yield bare


def walk_row(path: Path, times: int) -> Row:
    """The look at a pickle that is opcodes alone, as a protocol of few bytes for each has them."""
    from hfship.base.checkpoints import look_for_pickles

    with path.open("wb") as stream:
        for _ in range(times):
            pickle.dump(list(range(NUMBERS // 10)), stream, protocol=4)
    size = path.stat().st_size
    began, cpu = time.monotonic(), time.process_time()
    with path.open("rb") as stream:
        found = look_for_pickles(stream, size, ".pkl")
    assert found is not None, "it is a pickle"
    seconds = time.monotonic() - began
    return Row("looks, opcodes of a pickle", OURS, seconds, size, time.process_time() - cpu)
