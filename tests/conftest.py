"""Fixtures of the suite: the program under test (source and built pyz), a Hub that can misbehave, model folders."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYZ = ROOT / "dist" / "hfship.pyz"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub import FaultHub  # noqa: E402
from make_model import make_model  # noqa: E402

# A job that a shell runs in the background ignores Ctrl-C, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REQUIRE_ALL = os.environ.get("HFSHIP_REQUIRE_ALL") == "1"


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def missing(reason: str) -> None:
    """Skip because the machine lacks something; in CI that is a failure."""
    if REQUIRE_ALL:
        pytest.fail(f"required here, but missing: {reason}")
    pytest.skip(reason)


class Program:
    """hfship as an operator runs it: one process per call."""

    def __init__(self, argv: list, home: Path) -> None:
        self.argv = argv
        self.home = home
        self.run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run  # or that of a guest; see kernel.py

    def env(self, extra: Optional[Dict[str, str]] = None) -> Dict[str, str]:
        """A clean environment: nothing of the machine's tokens, endpoints or folders."""
        kept = ("PATH", "LANG", "LC_ALL", "DOCKER_HOST", "DOCKER_CONFIG", "HFSHIP_CACHE")
        keep = {k: v for k, v in os.environ.items() if k in kept}
        folders = {
            "HFSHIP_TRANSFER_DIR": str(self.home / "transfer"),
            "HFSHIP_SITE_MODELS_DIR": str(self.home / "site"),
            "HFSHIP_DEPLOY_DIR": str(self.home / "deploy"),
        }
        return {**keep, "HOME": str(self.home), **folders, **(extra or {})}

    def start(self, *args: Any, env: Optional[Dict[str, str]] = None, **options: Any) -> subprocess.Popen[str]:
        """A running hfship, for tests that kill it."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen([*self.argv, *map(str, args)], env=self.env(env), **options)

    def __call__(
        self,
        *args: Any,
        code: Optional[int] = 0,
        env: Optional[Dict[str, str]] = None,
        cwd: Optional[Path] = None,
        timeout: float = 120,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end and check the exit code (None = any)."""
        done = self.run(
            [*self.argv, *map(str, args)],
            env=self.env(env),
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        if code is not None:
            said = f"{args}: exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
            assert done.returncode == code, said
        assert "Traceback" not in done.stderr, done.stderr
        return done


def program(kind: str, home: Path, python: str = sys.executable) -> Program:
    """The program under test as source or as the built pyz."""
    if kind == "pyz" and not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    home.mkdir(parents=True, exist_ok=True)
    return Program([python, str(PYZ if kind == "pyz" else ROOT / "hfship.py")], home)


@pytest.fixture(scope="session", autouse=True)
def logs_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs that get the suite's own environment must not write into the logs and the cache of whoever runs it."""
    os.environ["HFSHIP_LOG_DIR"] = str(tmp_path_factory.mktemp("logs"))
    os.environ["HFSHIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["source", "pyz"])
def hfship(request: pytest.FixtureRequest, tmp_path: Path) -> Program:
    """hfship, once from source and once from the built pyz."""
    return program(request.param, tmp_path / "home")


@pytest.fixture
def pyz(tmp_path: Path) -> Program:
    """The built pyz only, for slow tests on real components."""
    return program("pyz", tmp_path / "home")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FaultHub]:
    """A Hub on loopback with one repository `org/tiny` (see `model`), whose faults a test switches on."""
    with FaultHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of real shape (about 3 MB in two shards); never written to."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model(folder, size_mb=3, shards=2)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """small_disk(megabytes, options="") -> folder on a file system of its own of that size."""
    if os.geteuid() != 0:
        missing("root, to mount a small tmpfs")
    mounted: List[Path] = []

    def mount(megabytes: int, options: str = "") -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        settings = f"size={megabytes}M" + ("," + options if options else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", settings, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            missing(f"a tmpfs that can be mounted: {done.stderr}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


Check = Callable[..., "subprocess.CompletedProcess[str]"]
