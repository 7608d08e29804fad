"""What all tests share: the program under test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def hfship(tmp_path_factory):
    """Run the program: hfship("pack", "x", code=0) -> CompletedProcess; fails on any other exit code than `code`."""
    home = tmp_path_factory.mktemp("home")

    def run(*args, code=0, env={}, cwd=None, timeout=120):  # noqa: B006 - only read
        argv = [sys.executable, str(ROOT / "hfship.py"), *map(str, args)]
        environ = {**os.environ, "HOME": str(home), **env}
        done = subprocess.run(argv, capture_output=True, text=True, env=environ, cwd=cwd, timeout=timeout)
        assert done.returncode == code, f"exit {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(megabytes, options="") -> folder on a file system of its own of that size."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    mounted = []

    def mount(megabytes, options=""):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        settings = f"size={megabytes}M" + ("," + options if options else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", settings, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
