#!/usr/bin/env python3
"""The whole suite: tests marked `alone` one after the other, and beside them all others, by workers.

    make test [PYTEST_ARGS="-k word"]

What the first part says is shown when both have ended. (The groups of pytest-xdist would do, but
version 3.8 does not see them under pytest 9.2.) A worker takes a file at a time, so that what the
tests of a file share is made once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Sequence

WORKERS = 2  # beside the part that needs them least: it waits for docker and vLLM
BY_FILE = ("-n", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder")
BEHIND = ("nice", "-n", "5")  # the first part has one test after the other, and must not end last
NO_TESTS = 5  # the exit code of pytest where arguments select none


def files_of_alone(arguments: Sequence[str]) -> List[str]:
    """The files that say `alone`: none of the others is read for that part, where no file is asked for."""
    if os.geteuid() != 0 or any(Path(word.split("::")[0]).exists() for word in arguments):
        return []  # of other users more are alone: conftest.py
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    return [str(path) for path in files if "mark.alone" in path.read_text(encoding="utf-8")]


def main(arguments: Sequence[str]) -> int:
    """Exit code: the first of a part that is no success."""
    files = files_of_alone(arguments)
    pytest = [sys.executable, "-m", "pytest", *arguments]
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen([*pytest, "-m", "alone", *files], stdout=said, stderr=said) as alone:
            try:
                others = subprocess.run([*BEHIND, *pytest, *BY_FILE, "-m", "not alone"])
            except BaseException:
                alone.terminate()
                raise
        said.seek(0)
        print(said.read(), flush=True)
    codes = {alone.returncode, others.returncode} - {0, NO_TESTS}
    return min(codes, default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
