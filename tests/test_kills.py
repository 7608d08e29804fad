"""pack and unpack, killed before every single change of a name or a size, and after the last one: the same command ends
with 0, and leaves what a run leaves that nobody killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Set

import pytest

from conftest import ROOT, Program
from hfship.base.files import atomic_write
from support import archives as a

KILLER = """
import os, signal, sys

left = int(sys.argv.pop(1))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            die()
        return function(*arguments, **options)

    return call


for name in ("replace", "rename", "link", "unlink", "truncate", "ftruncate", "mkdir", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
from hfship.commands.run import main

main()
print("end", file=sys.stderr)
die()
"""
FILES = {**a.SMALL, "w.bin": a.noise(2 << 20), "v.bin": a.noise(2 << 20, 1)}


def run(home: Path, changes: int, *arguments: object) -> str:
    """Run hfship, killed before it has made more than so many changes, at the latest at its end; what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HOME": str(home)}
    argv = [sys.executable, "-c", KILLER, str(changes), *map(str, arguments)]
    done = subprocess.run(
        argv, env=environment, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stderr


def names_in(folder: Path) -> Set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def model_in(folder: Path) -> Path:
    a.make_model(folder / "m", FILES)
    return folder / "m"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--split", "2300000")], ids=["whole", "parts"])
def test_pack_killed_at_every_change(options: List[str], tmp_path: Path, pyz: Program) -> None:
    model = model_in(tmp_path)
    papers = {"HFSHIP_POLICY_CUSTODY": "true", "HFSHIP_POLICY_BOM": "true"}
    pyz("pack", model, "-o", tmp_path / "whole", *options, env=papers)
    wanted = names_in(tmp_path / "whole")
    for changes in range(200):
        out = tmp_path / f"out{changes}"
        said = run(tmp_path, changes, "pack", model, "-o", out, *options)
        pyz("pack", model, "-o", out, *options, env=papers)
        assert names_in(out) == wanted, changes
        if "end" in said.splitlines():
            break
    else:
        pytest.fail("it never ends")
    pyz("verify", tmp_path / "out0")


def consume(site: Path, medium: Path, name: object, changes: int, pyz: Program) -> str:
    """unpack --consume, killed, and once more; what the first run said."""
    folders = {"HFSHIP_TRANSFER_DIR": str(medium)}
    argv = ["unpack", "--consume", name, "-o", site]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFSHIP_TRANSFER_DIR", str(medium))
        said = run(site.parent, changes, *argv)
    pyz(*argv, env=folders)
    return said


@pytest.mark.slow
def test_consume_killed_at_every_change(tmp_path: Path, pyz: Program) -> None:
    model = model_in(tmp_path)
    a.pack(model, tmp_path / "medium", split=2_300_000)
    content = a.tree(model)
    for changes in range(200):
        medium, site = tmp_path / f"medium{changes}", tmp_path / f"site{changes}"
        shutil.copytree(tmp_path / "medium", medium)
        said = consume(site, medium, medium / "m.tar.zst", changes, pyz)
        assert a.tree(site / "m") == content, changes
        assert not [name for name in names_in(medium) if name.startswith("m.tar")], changes
        assert os.listdir(site) == ["m"], changes
        if "end" in said.splitlines():
            break
    else:
        pytest.fail("it never ends")


@pytest.mark.parametrize("name", ["m.tar.zst.0001", "m.tar.zst", "", "m"])
@pytest.mark.parametrize("lost", [0, 1, 2, 4])
def test_consume_killed_when_little_is_left(
    lost: int, name: str, tmp_path: Path, pyz: Program
) -> None:
    model = model_in(tmp_path)
    medium, site = tmp_path / "medium", tmp_path / "site"
    files = a.pack(model, medium, split=2_300_000)
    spare = tmp_path / "spare"
    shutil.copytree(medium, spare)
    given = medium / name if name != "m" else "m"
    consume(site, medium, given, 1_000_000, pyz)
    for path in [*files.paths, files.sums][lost:]:  # as if it had been killed before
        shutil.copy(spare / path.name, medium)
    consume(site, medium, given, 1_000_000, pyz)
    assert not [name for name in names_in(medium) if name.startswith("m.tar")]


def test_another_archive_under_the_name_of_a_consumed_one_is_not_taken_for_it(
    tmp_path: Path, pyz: Program
) -> None:
    medium, site = tmp_path / "medium", tmp_path / "site"
    a.pack(model_in(tmp_path), medium, split=2_300_000)
    pyz("unpack", "--consume", medium, "-o", site)
    a.make_model(tmp_path / "other/m", {**FILES, "w.bin": a.noise(2 << 20, 7)})
    files = a.pack(tmp_path / "other/m", medium, split=2_300_000)
    files.paths[0].unlink()
    pyz("unpack", "--consume", medium / "m.tar.zst", "-o", site, code=6)
    assert files.paths[1].exists()


def test_what_a_killed_write_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".sums.99999999.tmp").write_text("cut")
    (tmp_path / ".other.99999999.tmp").write_text("cut")
    (tmp_path / ".sums.tmp").write_text("somebody else's")
    atomic_write(tmp_path / "sums", "whole")
    assert names_in(tmp_path) == {"sums", ".other.99999999.tmp", ".sums.tmp"}


def test_a_write_under_way_keeps_its_file(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from hfship.base import files\n"
        "def wait(*_): print('writes', flush=True); sys.stdin.read()\n"
        "files._fill = wait; files.atomic_write(Path(sys.argv[1]), 'slow')\n"
    )
    argv = [sys.executable, "-c", script, tmp_path / "sums"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, env=environment, cwd=tmp_path, **pipes) as other:
        assert other.stdout and other.stdout.readline()
        atomic_write(tmp_path / "sums", "whole")
        assert len(names_in(tmp_path)) == 2
        other.communicate(timeout=30)
    assert other.returncode == 0
