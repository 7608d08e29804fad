"""The main job on every kind of machine: other Debians, another processor, the newest Python.

Each without a network, as an unprivileged user, with a home that cannot be written and a disk that runs no programs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import pytest

from conftest import PYZ, ROOT, missing, program
from hfship.base.files import sha256_file
from hfship.base.manifest import FileEntry, make_manifest, write_manifest
from support import components
from support.make_model import make_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

# component -> (what starts a Python there, what `version` says of it)
MACHINES: Dict[str, Tuple[List[str], str]] = {
    "chroot-bullseye": (["python3"], "python  3.9"),
    "machine-bookworm": (["python3"], "python  3.11"),
    "machine-trixie": (["python3"], "python  3.13"),
    "chroot-forky": (["python3"], "python  3.14"),
    "machine-python3.15": (["python3.15"], "python  3.15"),
    # Grace hosts: the libraries for aarch64 are executed, by an emulator.
    "machine-arm64": (["/qemu", "/usr/bin/python3"], "python  3.11"),
}  # fmt: skip

Data = Tuple[Path, Dict[str, str], Dict[str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """What machines see as /data, the SHA-256 of the model's files, and of its archive as it is made here."""
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    root = tmp_path_factory.mktemp("machines")
    folder = root / "data"
    make_model(folder / "tiny", size_mb=5, shards=2)
    files = {path.name: sha256_file(path) for path in sorted((folder / "tiny").iterdir())}
    shutil.copytree(folder / "tiny", folder / "hub/org/tiny")
    entries = [
        FileEntry(name, (folder / "tiny" / name).stat().st_size, sha256)
        for name, sha256 in files.items()
    ]
    write_manifest(folder / "tiny", make_manifest("tiny", entries))
    program("pyz", root / "home")("pack", folder / "tiny", "-o", root / "out", "--split", "3M")
    archive = {path.name: sha256_file(path) for path in (root / "out").glob("*.tar.zst.0*")}
    shutil.copy(PYZ, folder / "hfship.pyz")
    shutil.copy(ROOT / "tests/support/main_job.py", folder / "main_job.py")
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755)
    return folder, files, archive


@pytest.mark.parametrize("machine", MACHINES)
def test_main_job(machine: str, data: Data, small_disk: Callable[..., Path]) -> None:
    components.require(machine)
    folder, files, archive = data
    python, version = MACHINES[machine]
    work = small_disk(100, "noexec,nosuid,mode=777")
    home = small_disk(1, "ro")
    binds = {str(folder): "/data", str(work): "/disk", str(home): "/home/op"}
    command = [*python, "/data/main_job.py", *python, "/data/hfship.pyz"]
    done = subprocess.run(
        [*components.chroot_argv(machine, binds), *command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert version in said["version"] and "context" in said["plan"], said
    assert said["fetched"] in (files, None) and said["unpacked"] == files
    assert (said["fetched"] is None) == (machine == "chroot-bullseye")  # its Python is too old
    assert len(archive) > 1 and said["packed"] == archive
