"""The main job on real components: every Python, other Debians without network, a real Docker engine and a real vLLM."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Tuple

import pytest

from conftest import PYZ, ROOT, Program, program
from support import components
from support.hub import FaultHub
from support.make_model import make_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

Package = Tuple[
    Path, Path
]  # folder with the archive and hfship.pyz; the model folder it was made of


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """What travels: tiny.tar.zst in two parts with its sidecars, packed by the built pyz."""
    root = tmp_path_factory.mktemp("package")
    model = root / "tiny"
    make_model(model, size_mb=9, shards=2)
    hfship = program("pyz", root / "home")
    hfship("pack", model, "-o", root / "medium", "--split", "6M")
    return root / "medium", model


def files_of(folder: Path) -> dict:
    """path -> SHA-256 of the model files in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".hfship" not in path.parts)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


@pytest.mark.parametrize("python", components.pythons(), ids=lambda python: python.version)
def test_offline_commands_on_every_python(
    python: components.Interpreter, package: Package, tmp_path: Path
) -> None:
    medium, model = package
    hfship = program("pyz", tmp_path / "home", str(python.path))
    hfship.argv[1] = str(medium / "hfship.pyz")
    hfship("verify", medium / "tiny.tar.zst")
    hfship("unpack", medium / "tiny.tar.zst.0001", "-o", tmp_path / "site")
    plan = json.loads(
        hfship(
            "serve", tmp_path / "site" / "tiny", "--plan", "--assume-gpus", "1x24GB", "--json"
        ).stdout
    )
    assert plan and files_of(tmp_path / "site" / "tiny") == files_of(model)
    (tmp_path / "models.toml").write_text(
        hfship("models", "--example").stdout
    )  # read by tomllib or our own tomli
    assert "llama-70b" in hfship("models", tmp_path / "models.toml").stdout


@pytest.mark.parametrize("suite", ["chroot-bullseye", "chroot-forky"])
def test_offline_commands_on_other_debians_without_network(
    suite: str, package: Package, tmp_path: Path
) -> None:
    """Python 3.9 and 3.14 as Debian ships them, in a root with nothing else and only a loopback interface."""
    components.require(suite)
    medium, model = package
    work = tmp_path / "work"
    work.mkdir()
    prefix = components.chroot_argv(suite, {str(medium): "/medium", str(work): "/carried"})

    def inside(*args: str) -> str:
        argv = [*prefix, "env", "HOME=/carried/home", "python3", "/medium/hfship.pyz", *args]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    inside("version", "--verify")
    inside("verify", "/medium/tiny.tar.zst")
    inside("unpack", "/medium/tiny.tar.zst.0001", "-o", "/carried/site")
    assert "context" in inside("serve", "/carried/site/tiny", "--plan", "--assume-gpus", "1x24GB")
    assert files_of(work / "site" / "tiny") == files_of(model)
    (work / "models.toml").write_text(inside("models", "--example"))
    assert "llama-70b" in inside("models", "/carried/models.toml")


def test_forky_reads_our_archive_with_its_own_zstd_module(package: Package, tmp_path: Path) -> None:
    """Python 3.14's compression.zstd, through tarfile, needs nothing of ours."""
    components.require("chroot-forky")
    medium, model = package
    whole = tmp_path / "tiny.tar.zst"
    with whole.open("wb") as out:
        for part in sorted(medium.glob("tiny.tar.zst.0*")):
            out.write(part.read_bytes())
    script = "import tarfile; tarfile.open('/carried/tiny.tar.zst', 'r:zst').extractall('/carried/out', filter='data')"
    argv = [
        *components.chroot_argv("chroot-forky", {str(tmp_path): "/carried"}),
        "python3",
        "-c",
        script,
    ]
    subprocess.run(argv, check=True, timeout=120)
    assert files_of(tmp_path / "out" / "tiny") == files_of(model)


def test_we_read_what_its_own_zstd_module_packed(
    package: Package, pyz: Program, tmp_path: Path
) -> None:
    """tarfile of Python 3.14 writes .tar.zst, too."""
    components.require("chroot-forky")
    _, model = package
    (tmp_path / "work").mkdir()
    script = "with tarfile.open('/carried/tiny.tar.zst', 'w:zst') as tar: tar.add('/model', 'tiny')"
    binds = {str(tmp_path / "work"): "/carried", str(model): "/model"}
    argv = [
        *components.chroot_argv("chroot-forky", binds),
        "python3",
        "-c",
        "import tarfile\n" + script,
    ]
    subprocess.run(argv, check=True, timeout=120)
    pyz("unpack", tmp_path / "work" / "tiny.tar.zst", "-o", tmp_path / "site")
    assert files_of(tmp_path / "site" / "tiny") == files_of(model)


def test_real_weights_travel_unchanged(pyz: Program, hub: FaultHub, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, from the Hub's layout to the far side and back to the same bytes."""
    source = components.require("minilm")
    hub.add(source, "sentence-transformers/all-MiniLM-L6-v2")
    pyz("fetch", "sentence-transformers/all-MiniLM-L6-v2", "--endpoint", hub.url)
    pyz("pack", "all-MiniLM-L6-v2")
    archive = pyz.home / "transfer_package" / "all-MiniLM-L6-v2.tar.zst"
    pyz("verify", archive)
    shutil.rmtree(pyz.home / "models")
    pyz("unpack", archive)
    assert files_of(pyz.home / "site" / "all-MiniLM-L6-v2") == files_of(source)


def in_the_box(script: str, **env: str) -> str:
    """Run a shell script beside a real Docker engine in a network namespace that has only loopback."""
    components.require("vllm-image")
    argv = components.with_docker_argv(["sh", "-euc", script])
    done = subprocess.run(
        argv, env={**os.environ, **env}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


AIR_GAPPED = "! grep -v 'lo:\\|docker0:' /proc/net/dev | grep ':'"
DEMO = f"{sys.executable} {ROOT}/tests/demo.py {PYZ}"


@pytest.mark.alone
def test_main_job_in_the_air_gapped_box(pyz: Program) -> None:
    """`make demo` where there is docker, a vLLM image and no network: fetch, pack, verify, unpack, a real completion.

    The image goes by the name of the GPU build, so that plan, reservation and flags are those of a GPU box; a box
    without GPUs is that of test_readme.py.
    """
    image = components.VLLM_IMAGE
    script = f"docker tag {image} {image[:-4]}; trap 'docker rmi {image[:-4]}' EXIT; {DEMO}"
    said = in_the_box(f"{AIR_GAPPED}; {script}", HFSHIP_STUB_GPUS="2x H200 143771")
    assert "answer: " in said and "serve, completion" in said and "not run" not in said, said
    assert "GPU 0 (NVIDIA H200" in said
