"""Fixtures of the suite: the program under test (source and built pyz), a Hub that can misbehave, model folders."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
PYZ = ROOT / "dist" / "hfship.pyz"
sys.path[:0] = [str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]

from support.forked import run_forked  # noqa: E402
from support.hub import FaultHub  # noqa: E402
from support.make_model import make_model  # noqa: E402

# A job that a shell runs in the background ignores Ctrl-C, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says what else the machine does. What hangs has pytest's own limit.
hypothesis.settings.register_profile("hfship", deadline=None)
hypothesis.settings.load_profile("hfship")

REQUIRE_ALL = os.environ.get("HFSHIP_REQUIRE_ALL") == "1"

KINDS = ("source", "pyz")  # of the program under test
CLONE_NEWNET = 0x40000000  # linux/sched.h
# `serve` takes the first free port from 8000 before docker binds it.
WITH_PORTS = {"test_serve", "test_models", "test_jobs", "test_golden", "test_readme"}


def pytest_configure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share no ports: each has a network of its own, with loopback alone."""
    if hasattr(config, "workerinput") and os.geteuid() == 0:
        if ctypes.CDLL(None).unshare(CLONE_NEWNET):
            pytest.exit("root may not make a network of its own here: unshare(CLONE_NEWNET)")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        # Of TEST-NET-1 (RFC 5737): resolvers ask for no kind of address of which a machine has none.
        subprocess.run(["ip", "address", "add", "192.0.2.1/32", "dev", "lo"], check=True)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Where workers have no networks of their own, what needs ports runs alone, too. Tests of
    programs run on the pyz, and the first of each file from source, too: see `hfship`. All run from
    source alone where the pyz is older, or with HFSHIP_TEST_PYZ=source.
    """
    for item in items:
        if item.path.stem in WITH_PORTS and os.geteuid() != 0:
            item.add_marker(pytest.mark.alone)
    if not any("::" in argument for argument in config.args):  # else all of that test is wanted
        wanted = os.environ.get("HFSHIP_TEST_PYZ") or ("pyz" if is_built() else "source")
        once_more = runs_of_the_other_kind(items, wanted)
        config.hook.pytest_deselected(items=once_more)
        left_out = set(once_more)
        items[:] = [item for item in items if item not in left_out]


def is_built() -> bool:
    """Whether the pyz is there and younger than every source file."""
    if REQUIRE_ALL or not PYZ.exists():
        return REQUIRE_ALL
    made = PYZ.stat().st_mtime
    sources = [ROOT / "launcher.py", *(ROOT / "src").rglob("*.py")]
    return all(path.stat().st_mtime <= made for path in sources)


def runs_of_the_other_kind(items: List[pytest.Item], wanted: str) -> List[pytest.Item]:
    """Items that run on the other than the wanted kind of program; the first function of each
    file that does so shows both.
    """
    first: Dict[Path, str] = {}
    found = []
    for item in items:
        kind = getattr(item, "callspec", None) and item.callspec.params.get("hfship")
        if kind in KINDS:
            name = first.setdefault(item.path, item.originalname)
            if kind != wanted and (wanted == "source" or name != item.originalname):
                found.append(item)
    return found


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def missing(reason: str) -> None:
    """Skip because the machine lacks something; in CI that is a failure."""
    if REQUIRE_ALL:
        pytest.fail(f"required here, but missing: {reason}")
    pytest.skip(reason)


def without_times(said: str) -> str:
    """What was said on stderr, without the time that each line has in a pipe.

    >>> without_times("04:05:06Z warning: it was 04:05:06Z\\n04:05:06Z   next  x\\n")
    'warning: it was 04:05:06Z\\n  next  x\\n'
    """
    return re.sub(r"(?m)^\d\d:\d\d:\d\dZ ", "", said)


class Program:
    """hfship as an operator runs it: one process per call."""

    def __init__(self, argv: list, home: Path) -> None:
        self.argv = argv
        self.home = home
        # Or that of a guest: support/kernel.py.
        self.run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run

    def env(self, extra: Optional[Dict[str, str]] = None) -> Dict[str, str]:
        """A clean environment: nothing of the machine's tokens, endpoints or folders."""
        kept = ("PATH", "LANG", "LC_ALL", "DOCKER_HOST", "DOCKER_CONFIG", "HFSHIP_CACHE")
        keep = {k: v for k, v in os.environ.items() if k in kept}
        folders = {
            "HFSHIP_TRANSFER_DIR": str(self.home / "transfer"),
            "HFSHIP_SITE_MODELS_DIR": str(self.home / "site"),
            "HFSHIP_DEPLOY_DIR": str(self.home / "deploy"),
        }
        # What lies beside archives for reviewers is asked for by the tests of it alone.
        papers = {"HFSHIP_POLICY_CUSTODY": "false", "HFSHIP_POLICY_BOM": "false"}
        return {**keep, "HOME": str(self.home), **papers, **folders, **(extra or {})}

    def start(
        self, *args: Any, env: Optional[Dict[str, str]] = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A running hfship, for tests that kill it."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen([*self.argv, *map(str, args)], env=self.env(env), **options)

    def __call__(
        self,
        *args: Any,
        code: Optional[int] = 0,
        env: Optional[Dict[str, str]] = None,
        cwd: Optional[Path] = None,
        timeout: float = 300,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end and check the exit code (None = any). `stderr` is without times."""
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
        done.stderr = without_times(done.stderr)
        return done


def program(kind: str, home: Path, python: str = sys.executable) -> Program:
    """The program under test as source or as the built pyz; for tests/mutate.py always the source."""
    forked = os.environ.get("HFSHIP_TEST_FORK") == "1"
    if forked:
        kind = "source"
    if kind == "pyz" and not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    home.mkdir(parents=True, exist_ok=True)
    made = Program([python, str(PYZ if kind == "pyz" else ROOT / "hfship.py")], home)
    if forked:
        made.run = run_forked
    return made


@pytest.fixture(scope="session", autouse=True)
def logs_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs that get the suite's own environment must not write into the logs and the cache of whoever runs it."""
    os.environ["HFSHIP_LOG_DIR"] = str(tmp_path_factory.mktemp("logs"))
    os.environ["HFSHIP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=KINDS)
def hfship(request: pytest.FixtureRequest, tmp_path: Path) -> Program:
    """hfship as users have it, the built pyz; in the first test of each file from source, too."""
    return program(request.param, tmp_path / "home")


@pytest.fixture
def pyz(tmp_path: Path) -> Program:
    """The built pyz only, for slow tests on real components; for tests/mutate.py the source."""
    return program(os.environ.get("HFSHIP_TEST_PYZ", "pyz"), tmp_path / "home")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FaultHub]:
    """A Hub on loopback with one repository `org/tiny` (see `model`), whose faults a test switches on."""
    with FaultHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture(scope="session")
def made_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `model`."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_model(folder, size_mb=3, shards=2)
    return folder


@pytest.fixture
def model(made_model: Path) -> Iterator[Path]:
    """A small model of real shape (about 3 MB in two shards), without a manifest; its files are never written to."""
    yield made_model
    shutil.rmtree(
        made_model / ".hfship", ignore_errors=True
    )  # what pack left, under the name that one test gave it


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
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", settings, "tmpfs", folder],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            missing(f"a tmpfs that can be mounted: {done.stderr}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


Check = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def published(hub: FaultHub, model: Path) -> Path:
    """The small model as org/tiny; returns the Hub's copy."""
    folder = hub.add(model)
    (folder / "sub folder").mkdir()
    (folder / "sub folder" / "ünïcode #1?.txt").write_text("x")
    (folder / "empty").touch()
    return folder
