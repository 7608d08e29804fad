"""The built file: runs on every Python, uses nothing of the host's, finds a zstd, proves itself, and is reproducible."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Union

import build_zipapp
import pytest

import hfship
from hfship.base import pyz as own
from hfship.base.errors import IntegrityError
from hfship.commands.guide import TOPICS

ROOT = Path(build_zipapp.__file__).resolve().parent
PACKAGE = sorted(build_zipapp.package_entries())
INPUTS = ["launcher.py", "build_zipapp.py", "vendor.lock", "build.lock", "LICENSE"]
INPUTS += [f"src/{name}" for name in PACKAGE]
INPUTS += [f"docs/{topic.file}" for topic in TOPICS.values()]


def find_pythons() -> Dict[str, str]:
    """Every Python of this machine, on PATH or under pyenv: "3.11" -> path."""
    names = [
        f"python{major}.{minor}"
        for major, minors in ((2, (7,)), (3, range(4, 16)))
        for minor in minors
    ]
    paths = [shutil.which(name) for name in names] + ["/usr/bin/python3", sys.executable]
    paths += [
        str(path) for path in sorted(Path("~/.pyenv/versions").expanduser().glob("*/bin/python"))
    ]
    found: Dict[str, str] = {}
    for path in filter(None, paths):
        probe = [path, "-c", "import sys; sys.stdout.write('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(probe, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found.setdefault(answer.stdout, path)
    return found


def version_key(version: str) -> List[int]:
    return [int(part) for part in version.split(".")]


PYTHONS = find_pythons()
SUPPORTED = sorted((v for v in PYTHONS if version_key(v) >= [3, 8]), key=version_key)
TOO_OLD = sorted((v for v in PYTHONS if version_key(v) < [3, 8]), key=version_key)
CARRIED = [v for v in SUPPORTED if v.replace(".", "") in build_zipapp.PYTHONS]
PYTHON = PYTHONS[CARRIED[-1]] if CARRIED else sys.executable


@pytest.fixture(scope="session")
def pyz() -> Path:
    path = ROOT / "dist" / "hfship.pyz"
    newest = max((ROOT / name).stat().st_mtime for name in INPUTS)
    if not path.exists() or path.stat().st_mtime < newest:
        subprocess.run([sys.executable, str(ROOT / "build_zipapp.py"), "-o", str(path)], check=True)
    return path


def run(
    python: str, *arguments: object, env: Optional[Mapping[str, str]] = None, cwd: Path = Path("/")
) -> subprocess.CompletedProcess:
    """Run a Python with an environment of our making."""
    base = {"PATH": os.environ["PATH"], "HOME": "/proc/none", "LC_ALL": "C"}
    command = [python, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**base, **(env or {})}, cwd=cwd, check=False
    )


# ---- every Python --------------------------------------------------------------------


@pytest.mark.parametrize("version", SUPPORTED)
def test_runs_on_every_python(pyz: Path, version: str) -> None:
    done = run(PYTHONS[version], pyz, "version", "--json", "--verify")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    facts = json.loads(done.stdout)
    assert facts["hfship"] == {"version": hfship.__version__, "origin": str(pyz)}
    assert facts["python"]["version"].startswith(version + ".")
    assert facts["verify"]["origin"].endswith(hashlib.sha256(pyz.read_bytes()).hexdigest())
    if version in CARRIED:
        assert facts["zstd"] == {
            "version": "zstandard 0.25.0 (libzstd 1.5.7)",
            "origin": "hfship.pyz, in memory",
        }


@pytest.mark.parametrize("version", TOO_OLD)
def test_an_old_python_gets_one_clear_line(pyz: Path, version: str) -> None:
    done = run(PYTHONS[version], pyz, "fetch", "org/model")
    assert (done.returncode, done.stdout) == (9, "")
    assert re.fullmatch(
        rf"hfship needs Python 3\.8 or newer; this is {version}\.\d+ \(.+\); next: python3\.11 \S+hfship\.pyz .+\n",
        done.stderr,
    )


@pytest.mark.parametrize("version", [v for v in SUPPORTED if version_key(v) < [3, 10]])
def test_fetch_names_the_newer_python_that_is_there(
    pyz: Path, version: str, tmp_path: Path
) -> None:
    (tmp_path / "python3.12").touch(mode=0o755)
    for path, step in (
        (tmp_path, f"python3.12 {pyz} fetch org/model"),
        ("/nowhere", "none is on PATH"),
    ):
        done = run(PYTHONS[version], pyz, "fetch", "org/model", env={"PATH": str(path)})
        assert (
            done.returncode == 9
            and step in done.stderr
            and f"this is Python {version}" in done.stderr
        )


NEWER_NODES = (ast.JoinedStr, ast.NamedExpr, ast.Nonlocal, ast.AnnAssign, ast.YieldFrom)
NEWER_NODES += (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
# The fields of older nodes that only newer programs use.
NEWER_FIELDS = {
    ast.arg: ["annotation"],
    ast.FunctionDef: ["returns"],
    ast.arguments: ["kwonlyargs", "posonlyargs"],
}
NEWER_FIELDS.update({ast.Raise: ["cause"], ast.ClassDef: ["keywords"]})
NEWER = [
    "f''",
    "(a := 1)",
    "a: int",
    "raise a from b",
    "class A(metaclass=B): pass",
    "async def f(): pass",
]
NEWER += [f"def f({words}): pass" for words in ("*, a", "a, /", "a: int", "*a: int", "**a: int")]
NEWER += ["def f() -> int: pass", "def f(): yield from a", "def f():\n def g(): nonlocal a\n a = 1"]


def newer_than_python_2(text: str) -> List[str]:
    """What in a program the grammar of Python 2.7 does not know."""
    nodes = list(ast.walk(ast.parse(text)))
    fields = [(node, field) for node in nodes for field in NEWER_FIELDS.get(type(node), [])]
    newer = [type(node).__name__ for node in nodes if isinstance(node, NEWER_NODES)]
    return newer + [
        f"{type(node).__name__}.{field}" for node, field in fields if getattr(node, field)
    ]


@pytest.mark.parametrize("name", ["launcher.py", "hfship.py"])
def test_what_starts_first_is_in_the_grammar_of_old_pythons(name: str) -> None:
    """Also where no old Python is at hand: a SyntaxError does not say which Python is needed."""
    assert newer_than_python_2((ROOT / name).read_text(encoding="ascii")) == []


@pytest.mark.parametrize("text", NEWER)
def test_newer_grammar_is_noticed(text: str) -> None:
    assert newer_than_python_2(text)


@pytest.mark.parametrize("version", TOO_OLD)
def test_the_script_too_says_so_in_one_line(version: str) -> None:
    done = run(PYTHONS[version], ROOT / "hfship.py", "version")
    assert (done.returncode, done.stdout) == (9, "")
    assert re.fullmatch(
        r"hfship needs Python 3\.8 or newer; this is .+ any other from 3\.8 on\n", done.stderr
    )


@pytest.mark.parametrize("version", SUPPORTED)
def test_runs_from_a_checkout(version: str, tmp_path: Path) -> None:
    (tmp_path / "hfship").symlink_to(ROOT / "hfship.py")
    for argv, env in (
        ([ROOT / "hfship.py"], {}),
        ([tmp_path / "hfship"], {}),
        (["-m", "hfship"], {"PYTHONPATH": str(ROOT / "src")}),
    ):
        done = run(PYTHONS[version], "-B", *argv, "version", "--json", env=env)
        assert json.loads(done.stdout)["hfship"] == {
            "version": hfship.__version__,
            "origin": str(ROOT / "hfship.py"),
        }


def test_a_script_without_its_package_says_what_to_copy(tmp_path: Path) -> None:
    shutil.copy(ROOT / "hfship.py", tmp_path)
    done = run(PYTHON, tmp_path / "hfship.py", "version")
    assert (done.returncode, done.stdout) == (9, "")
    assert (
        done.stderr
        == f"hfship runs from a checkout, and {tmp_path}/src/hfship is not there; next: copy hfship.pyz\n"
    )


@pytest.mark.parametrize("version", SUPPORTED)
def test_is_a_module_too(pyz: Path, version: str) -> None:
    code = (
        "from hfship.archive import zstd; z = zstd.load_zstd(); c = bytes(range(256)) * 5000;"
        "assert z.decompressor()(z.compressor(1)(c), len(c)) == c; print(zstd.__file__, z.name)"
    )
    done = run(PYTHONS[version], "-c", code, env={"PYTHONPATH": str(pyz)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{pyz}/hfship/archive/zstd.py ")


def test_works_by_relative_path_and_by_shebang(pyz: Path, tmp_path: Path) -> None:
    copy = shutil.copy2(pyz, tmp_path / "hf ship.pyz")
    for command in ([PYTHON, "./hf ship.pyz"], [PYTHON, "-I", "hf ship.pyz"], ["./hf ship.pyz"]):
        done = run(
            *command,
            "version",
            env={"PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"},
            cwd=tmp_path,
        )
        assert f"({copy})" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["version"], ["version", "--help"], ["version", "--verify"]]
)
def test_offline_commands_import_no_network_library(pyz: Path, arguments: List[str]) -> None:
    done = run(
        PYTHON, "-S", "-X", "importtime", pyz, *arguments
    )  # -S: what .pth files import is not our doing
    assert done.returncode == 0
    imported = {
        line.rsplit("|", 1)[1].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "argparse" in imported
    assert not {
        name
        for name in imported
        if name.split(".")[0] in ("requests", "urllib3", "certifi", "idna", "tqdm")
    }


@pytest.mark.parametrize("module, command", [("argparse", "version"), ("http", "mirror")])
def test_a_python_that_lacks_a_module_is_told_apart_from_damage(
    pyz: Path, tmp_path: Path, module: str, command: str
) -> None:
    """Debian's python3-minimal has no http. What a command alone needs is missed when it runs."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    done = run(PYTHON, pyz, command, env={"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (9, "")
    assert done.stderr.startswith(f"hfship: this Python lacks the module {module}\n  why   "), (
        done.stderr
    )


def test_writes_nothing_but_bytecode(pyz: Path, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(PYTHON, pyz, "version", "--verify", env=env, cwd=tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())
    del env["PYTHONDONTWRITEBYTECODE"]
    assert run(PYTHON, pyz, "version", "--verify", env=env, cwd=tmp_path).returncode == 0
    (written,) = (path for path in tmp_path.rglob("*") if not path.is_dir())
    assert written.parent == tmp_path / ".cache" / "hfship" and written.name.endswith(".bytecode")
    assert (written.stat().st_mode & 0o777, written.parent.stat().st_mode & 0o777) == (0o600, 0o700)


# ---- bytecode kept between runs ------------------------------------------------------


def test_what_is_vendored_is_compiled_once(pyz: Path, tmp_path: Path) -> None:
    """Else each start that uses the network compiles a client of HTTP."""
    assert run(PYTHON, pyz, "version", env={"HFSHIP_CACHE": str(tmp_path)}).returncode == 0
    (cache,) = tmp_path.iterdir()
    kept = cache.read_bytes()
    for name in ("hfship/hub/session.py", "vendor/urllib3/poolmanager.py"):
        assert f"hfship.pyz/{name}".encode() in kept


# A cache as the launcher writes it, but for one module.
FORGED = """
import marshal, sys, types, zipfile
launcher = types.ModuleType("launcher")
exec(zipfile.ZipFile(sys.argv[1]).read("hfship_launcher.py"), vars(launcher))
pyz = launcher.Pyz(sys.argv[1])
true = pyz.compiled
forged = compile("def main(): print('from the cache')", "x", "exec")
pyz.compiled = lambda entry: forged if entry == "hfship/commands/run.py" else true(entry)
launcher.keep = lambda path, content: sys.stdout.buffer.write(content)
launcher.can_keep = lambda path: True
launcher.cache_file = lambda: "/nowhere"
launcher.load_codes(pyz, True)
"""


def swap(path: Path, old: bytes, new: bytes) -> None:
    """Change the first of some bytes in a file."""
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


SPOILT: Dict[str, Callable[[Path], object]] = {
    "of another source": lambda path: path.write_bytes(bytes(32) + path.read_bytes()[32:]),
    "code is changed": lambda path: swap(path, b"from the cache", b"From the cache"),
    "the table is changed": lambda path: swap(path, b"hfship/ops/stock.py", b"hfship/ops/stork.py"),
    "cut in its code": lambda path: os.truncate(path, path.read_bytes().index(b"from the cache")),
    "cut in its table": lambda path: os.truncate(path, 1000),
    "cut in its seal": lambda path: os.truncate(path, 20),
    "empty": lambda path: path.write_bytes(b""),
    "others may write to it": lambda path: path.chmod(0o666),
    "somebody else's": lambda path: os.chown(path, 12345, 12345),
    "a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("version", SUPPORTED)
def test_bytecode_is_used_where_it_is_private_and_right(
    pyz: Path, tmp_path: Path, version: str
) -> None:
    env = {"HFSHIP_CACHE": str(tmp_path)}
    first = run(PYTHONS[version], pyz, "version", env=env)
    (kept,) = tmp_path.iterdir()
    inode = kept.stat().st_ino
    again = run(PYTHONS[version], pyz, "version", env=env)
    assert (again.returncode, again.stdout) == (0, first.stdout) and kept.stat().st_ino == inode
    forge = subprocess.run(
        [PYTHONS[version], "-c", FORGED, pyz], stdout=subprocess.PIPE, check=True
    )
    kept.write_bytes(forge.stdout)
    assert run(PYTHONS[version], pyz, "version", env=env).stdout == "from the cache\n"


def test_a_user_without_a_home_keeps_no_bytecode(pyz: Path, tmp_path: Path) -> None:
    env = {"HOME": "not/absolute", "XDG_CACHE_HOME": ""}
    assert run(PYTHON, pyz, "version", env=env, cwd=tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def forged(pyz: Path) -> bytes:
    """A cache of PYTHON whose `main` says so."""
    return subprocess.run([PYTHON, "-c", FORGED, pyz], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("how", SPOILT)
def test_bytecode_that_cannot_be_trusted_is_not_run(
    pyz: Path, tmp_path: Path, forged: bytes, how: str
) -> None:
    if how == "somebody else's" and os.geteuid():
        pytest.skip("only root gives files away")
    tag = run(PYTHON, "-c", "import sys; print(sys.implementation.cache_tag)").stdout.strip()
    kept = tmp_path / f"hfship.{tag}.bytecode"
    kept.write_bytes(forged)
    kept.chmod(0o600)
    SPOILT[how](kept)
    done = run(PYTHON, pyz, "version", env={"HFSHIP_CACHE": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("hfship")
    assert not list(tmp_path.glob("*.tmp"))


def test_each_version_keeps_and_runs_its_own_bytecode(pyz: Path, tmp_path: Path) -> None:
    env, other = {"HFSHIP_CACHE": str(tmp_path / "c")}, tmp_path / "hfship.pyz"
    source = (
        (ROOT / "src/hfship/__init__.py")
        .read_bytes()
        .replace(hfship.__version__.encode(), b"9.9.9")
    )
    other.write_bytes(rewritten({"hfship/__init__.py": source})(pyz.read_bytes()))
    for path, version in (
        (pyz, hfship.__version__),
        (other, "9.9.9"),
        (other, "9.9.9"),
        (pyz, hfship.__version__),
    ):
        assert run(PYTHON, path, "--version", env=env).stdout == f"hfship {version}\n"


def test_bytecode_of_a_copy_that_is_whole_does_not_hide_damage(pyz: Path, tmp_path: Path) -> None:
    env, copy = {"HFSHIP_CACHE": str(tmp_path / "c")}, tmp_path / "hfship.pyz"
    assert run(PYTHON, pyz, "version", env=env).returncode == 0
    copy.write_bytes(flip_in("hfship/ops/mirror.py")(pyz.read_bytes()))
    done = run(PYTHON, copy, "version", env=env)
    assert (
        done.returncode == 6
        and f"{copy} is damaged" in done.stderr
        and "hfship/ops/mirror.py" in done.stderr
    )
    assert run(PYTHON, pyz, "version", env=env).returncode == 0


def test_two_first_starts_at_once(pyz: Path, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HFSHIP_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen([PYTHON, pyz, "version"], env=env, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    answers = {process.communicate()[0] for process in running}
    assert len(answers) == 1 and b"hfship  " in answers.pop()
    assert {process.returncode for process in running} == {0}
    (kept,) = tmp_path.iterdir()
    written = kept.stat()
    assert run(PYTHON, pyz, "version", env=env).returncode == 0
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


# ---- the file is replaced under a running program ------------------------------------

AFTERWARDS: Dict[str, Callable[[Path], object]] = {
    "as it was": lambda path: path.read_bytes(),
    "a newer one renamed over it": lambda path: os.replace(other_file(path), path),
    "another one copied over it": lambda path: shutil.copyfile(other_file(path), path),
    "cut": lambda path: os.truncate(path, 100),
    "gone": lambda path: path.unlink(),
}
# Runs hfship in this process, lets the file change, and then uses all that it had not used yet.
LATER = """
import importlib, inspect, os, pickle, runpy, sys, traceback
pyz = sys.argv[1]
sys.argv = [pyz, "--version"]
try:
    runpy.run_path(pyz, run_name="__main__")
except SystemExit as exc:
    assert exc.code == 0, exc.code
assert not any(os.path.realpath("/proc/self/fd/" + fd) == pyz for fd in os.listdir("/proc/self/fd"))
(ours,) = (finder for finder in sys.meta_path if type(finder).__name__ == "Pyz")
early = {name for name in ours.modules if name in sys.modules}
print("now", flush=True)
sys.stdin.readline()

for name in ours.modules:
    if name.split(".")[0] == "hfship" and not name.endswith("__main__"):
        module = importlib.import_module(name)
        path = os.path.join(pyz, *ours.modules[name].split("/"))
        assert module.__file__ == module.__spec__.origin == path, (module.__file__, path)
        assert module.__loader__.get_data(path) == module.__loader__.get_source(name).encode()
import tqdm, tomli
from hfship.base import errors, pyz as own
from hfship.archive.zstd import load_zstd
assert str(own.own_file()) == pyz
assert own.own_entry("vendor/certifi/cacert.pem").startswith(b"\\n# Issuer")
assert own.own_build()["entries"]
zstd, content = load_zstd(), bytes(range(256)) * 5000
assert zstd.decompressor()(zstd.compressor(1)(content), len(content)) == content
if sys.version_info >= (3, 10):
    import urllib3, certifi
    with open(certifi.where()) as stream:
        assert stream.read() == certifi.contents()
    assert certifi.contents().encode() == own.own_entry("vendor/certifi/cacert.pem")

# The lines of the source, and objects that a forked worker names.
source = inspect.getsource(own.own_entry)
assert source.startswith("def own_entry(")
try:
    own.own_entry("nothing")
except FileNotFoundError:
    lines = traceback.format_exc().splitlines()
(at,) = (number for number, line in enumerate(lines) if "hfship.pyz/hfship/base/pyz.py" in line)
assert lines[at + 1].strip() in source and lines[at + 1].strip(), lines
receive, send = os.pipe()
if os.fork() == 0:
    try:
        os.write(send, pickle.dumps(errors.UsageError("what", "why", "next")))
    finally:
        os._exit(0)
error = pickle.loads(os.read(receive, 10000))
assert type(error) is errors.UsageError and error.why == "why"
assert os.wait()[1] == 0
for name in ("hfship.base.nothing", "hfship.nothing", "tqdm.nothing", "vendor"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise AssertionError(name)
print(len(set(sys.modules) & set(ours.modules) - early), "modules were imported later")
"""


def other_file(path: Path) -> Path:
    """A file of the same size that is no hfship.pyz, beside it."""
    other = path.with_name("other")
    other.write_bytes(os.urandom(path.stat().st_size))
    return other


@pytest.mark.parametrize(
    "version, how",
    [(CARRIED[-1], how) for how in AFTERWARDS]
    + [(v, "another one copied over it") for v in SUPPORTED if v not in CARRIED[-1:]],
)
@pytest.mark.parametrize("cache", ["kept", "none"])
def test_nothing_is_read_from_the_file_after_the_start(
    pyz: Path, tmp_path: Path, version: str, how: str, cache: str
) -> None:
    copy = Path(shutil.copy(pyz, tmp_path / "hfship.pyz"))
    env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "HFSHIP_CACHE": "/proc/none"}
    if cache == "kept":
        env["HFSHIP_CACHE"] = str(tmp_path / "cache")
        assert run(PYTHONS[version], copy, "version", env=env).returncode == 0
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [PYTHONS[version], "-c", LATER, str(copy)]
    process = subprocess.Popen(command, env=env, text=True, **pipes)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [
        f"hfship {hfship.__version__}\n",
        "now\n",
    ]
    AFTERWARDS[how](copy)
    out, err = process.communicate("\n")
    assert (process.returncode, err) == (0, "")
    assert int(out.split()[0]) > 30


@pytest.mark.parametrize("how", AFTERWARDS)
def test_a_mirror_goes_on_when_its_file_changes(
    pyz: Path, model: Path, tmp_path: Path, how: str
) -> None:
    copy = Path(shutil.copy(pyz, tmp_path / "hfship.pyz"))
    (tmp_path / "models" / "org").mkdir(parents=True)
    (tmp_path / "models" / "org" / "tiny").symlink_to(model)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
    command = [PYTHON, str(copy), "mirror", str(tmp_path / "models"), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            url = next(
                word.rstrip(":")
                for word in process.stdout.readline().split()
                if word.startswith("http")
            )
            AFTERWARDS[how](copy)
            with urllib.request.urlopen(f"{url}/api/models/org/tiny/revision/main") as answer:
                assert json.load(answer)["id"] == "org/tiny"
        finally:
            process.terminate()
            _, err = process.communicate()
    assert "Traceback" not in err and "bug" not in err, err


# ---- nothing of the host's -----------------------------------------------------------

POISONED = (
    "urllib3",
    "zstandard",
    "tqdm",
    "tomli",
    "certifi",
    "idna",
    "hfship",
    "brotli",
)
PROBE = """
import runpy, sys
pyz = sys.argv[1]
sys.argv = [pyz, "version"]
try:
    runpy.run_path(pyz, run_name="__main__")
except SystemExit as exc:
    assert exc.code == 0, exc.code
import hfship, tqdm, tomli
modules = [hfship, tqdm, tomli]
if sys.version_info >= (3, 10):
    import urllib3, certifi, idna
    modules += [urllib3, certifi, idna]
for module in modules:
    assert module.__file__.startswith(pyz + "/"), module
for name in ("zstandard", "brotli"):
    assert name not in sys.modules
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(name)
"""


@pytest.fixture
def poison(tmp_path: Path) -> Path:
    folder = tmp_path / "poison"
    folder.mkdir()
    for name in POISONED:
        (folder / f"{name}.py").write_text("poisoned = True\n")
    return folder


def user_site(python: str, base: Path) -> Path:
    code = "import site; print(site.getusersitepackages())"
    path = Path(run(python, "-c", code, env={"PYTHONUSERBASE": str(base)}).stdout.strip())
    path.mkdir(parents=True)
    return path


EDITABLE_FINDER = """
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in {names!r}:
            return importlib.util.spec_from_file_location(name, {folder!r} + "/" + name + ".py")
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("version", SUPPORTED)
@pytest.mark.parametrize(
    "road", ["PYTHONPATH", "cwd", "user site", ".pth imports", "sitecustomize", "editable"]
)
def test_imports_nothing_of_the_host(
    pyz: Path, poison: Path, tmp_path: Path, version: str, road: str
) -> None:
    python, base = PYTHONS[version], tmp_path / "userbase"
    site = user_site(python, base)
    env = {"PYTHONUSERBASE": str(base)}
    imports = "import sys; sys.path.insert(0, {!r}); import {}\n".format(
        str(poison), ", ".join(POISONED)
    )
    if road == "PYTHONPATH":
        env["PYTHONPATH"] = str(poison)
    elif road == "user site":
        for module in poison.iterdir():
            shutil.copy(module, site)
    elif road == ".pth imports":
        (site / "x.pth").write_text(imports)
    elif road == "editable":
        (site / "finder_for_test.py").write_text(
            EDITABLE_FINDER.format(names=POISONED, folder=str(poison))
        )
        (site / "x.pth").write_text("import finder_for_test\n")
    elif road == "sitecustomize":
        (poison / "sitecustomize.py").write_text(imports)
        env["PYTHONPATH"] = str(poison)
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    done = run(python, probe, pyz, env=env, cwd=poison if road == "cwd" else tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert f"({pyz})" in done.stdout


# ---- zstd backends -------------------------------------------------------------------

ROUND_TRIP = """
from hfship.archive.zstd import load_zstd
zstd = load_zstd()
content = bytes(range(256)) * 20000
assert zstd.decompressor()(zstd.compressor(1)(content), len(content)) == content
print(zstd.origin)
"""


def origin(pyz: Path, python: str = PYTHON, prefix: List[str] = [], **env: str) -> str:  # noqa: B006
    """Where load_zstd found its library, after a round trip; the error text when it found none."""
    base = {"PATH": os.environ["PATH"], "HOME": "/proc/none", "PYTHONPATH": str(pyz)}
    command = [*prefix, python, "-c", ROUND_TRIP]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**base, **env}, cwd="/", check=False
    )
    return (done.stdout or done.stderr).strip()


@pytest.mark.parametrize("version", CARRIED)
def test_the_carried_library_loads_from_memory_and_from_a_cache(
    pyz: Path, tmp_path: Path, version: str
) -> None:
    python = PYTHONS[version]
    assert origin(pyz, python, HFSHIP_ZSTD="memfd") == "hfship.pyz, in memory"
    assert str(tmp_path / "c") in origin(
        pyz, python, HFSHIP_ZSTD="cache", HFSHIP_CACHE=str(tmp_path / "c")
    )
    (library,) = (tmp_path / "c").iterdir()
    assert library.stat().st_mode & 0o777 == 0o600
    assert library.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_systems_library_serves_every_python(pyz: Path, version: str) -> None:
    found = origin(pyz, PYTHONS[version], HFSHIP_ZSTD="system")
    if "cannot open shared object" in found or "_ctypes" in found:
        pytest.skip(f"no libzstd.so.1 or no ctypes for {version}")
    assert found == "libzstd.so.1 of this system"


def test_where_memory_may_not_run_code_the_cache_serves(pyz: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\ndel os.memfd_create\n")
    found = origin(pyz, PYTHONPATH=f"{tmp_path}:{pyz}", XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert found.startswith(f"hfship.pyz, by way of {tmp_path}/xdg/hfship/backend_c-")


def spoil_group_writable(cache: Path) -> None:
    cache.chmod(0o770)


def spoil_link(cache: Path) -> None:
    cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to("elsewhere")


def spoil_file(cache: Path) -> None:
    shutil.rmtree(cache)
    cache.write_text("")


def spoil_owner(cache: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    os.chown(cache, 12345, 12345)


@pytest.mark.parametrize("spoil", [spoil_group_writable, spoil_link, spoil_file, spoil_owner])
def test_a_cache_that_others_can_write_is_refused(
    pyz: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    env = {
        "HFSHIP_ZSTD": "cache",
        "HFSHIP_CACHE": str(cache),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }
    spoil(cache)
    assert f"by way of {tmp_path}/xdg/hfship" in origin(pyz, **env)


def test_a_changed_library_in_the_cache_is_replaced(pyz: Path, tmp_path: Path) -> None:
    env = {"HFSHIP_ZSTD": "cache", "HFSHIP_CACHE": str(tmp_path / "c")}
    assert "by way of" in origin(pyz, **env)
    (library,) = (tmp_path / "c").iterdir()
    right = library.read_bytes()
    for wrong in (b"", right[:-1], right[:5000] + b"evil" + right[5004:]):
        library.write_bytes(wrong)
        assert "by way of" in origin(pyz, **env)
        assert library.read_bytes() == right
        assert list((tmp_path / "c").iterdir()) == [library], "nothing is left behind"


def test_the_folder_beside_the_file_is_the_last_resort(pyz: Path, tmp_path: Path) -> None:
    copy = shutil.copy2(pyz, tmp_path / "hfship.pyz")
    found = origin(
        Path(copy), HFSHIP_ZSTD="cache", XDG_CACHE_HOME="/proc/none", HFSHIP_CACHE="/sys/none"
    )
    assert f"by way of {tmp_path}/.hfship-cache/backend_c-" in found


def test_a_noexec_disk_stops_the_cache_but_not_memory(pyz: Path, tmp_path: Path) -> None:
    mount = ["unshare", "-m", *([] if os.geteuid() == 0 else ["-r"]), "sh", "-c"]
    mount += [
        'mount -t tmpfs -o noexec tmpfs "$0" && cp "$1" "$0/hfship.pyz" && shift && exec "$@"'
    ]
    mount += [str(tmp_path), str(pyz)]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a noexec tmpfs here")
    on_disk = tmp_path / "hfship.pyz"
    env = {"HOME": str(tmp_path), "PYTHONPATH": str(on_disk), "HFSHIP_CACHE": str(tmp_path / "c")}
    assert origin(on_disk, prefix=mount, **env) == "hfship.pyz, in memory"
    refused = origin(on_disk, prefix=mount, HFSHIP_ZSTD="cache", **env)
    assert "HostError: no zstd library can be used" in refused


def test_when_nothing_works_the_reasons_are_all_told(pyz: Path) -> None:
    env = {"HFSHIP_ZSTD": "stdlib", "HOME": "/proc/none"}
    done = run(PYTHON, pyz, "version", env=env)
    assert (
        "zstd    none (no zstd library can be used: stdlib     No module named 'compression'"
        in done.stdout
    )


# ---- the file proves itself ----------------------------------------------------------


def entry_span(content: bytes, name: str) -> slice:
    """Where the compressed bytes of an entry lie."""
    info = zipfile.ZipFile(io.BytesIO(content)).getinfo(name)
    start = info.header_offset + 30 + len(name)
    return slice(start, start + info.compress_size)


def flip(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :]


def flip_in(name: str) -> Callable[[bytes], bytes]:
    def tamper(content: bytes) -> bytes:
        span = entry_span(content, name)
        return flip(content, (span.start + span.stop) // 2)

    return tamper


def directory(content: bytes) -> int:
    """Offset of the central directory; its first record is LICENSE's."""
    start: int = struct.unpack_from("<I", content, len(content) - 6)[0]
    assert content[start + 46 : start + 53] == b"LICENSE"
    return start


def rewritten(changes: Mapping[str, Optional[bytes]], twice: str = "") -> Callable[[bytes], bytes]:
    """A whole new zip, valid in itself, with entries changed, added or (None) removed, as an attacker would make it."""

    def tamper(content: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            entries = {**{name: old.read(name) for name in old.namelist()}, **changes}
        out = io.BytesIO()
        out.write(b"".join(content.splitlines(keepends=True)[:2]))
        with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as new, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a name is there twice
            for name in [*entries, *[twice] * bool(twice)]:
                value = entries[name]
                if value is not None:
                    new.writestr(name, value)
        return out.getvalue()

    return tamper


TAMPERS = {
    "licence flipped": (flip_in("LICENSE"), "LICENSE: "),
    "other machine's library flipped": (
        flip_in("native/cpython-39-aarch64-linux-gnu/backend_c.so"),
        "aarch64",
    ),
    "vendored module flipped": (flip_in("vendor/tqdm/std.py"), "vendor/tqdm/std.py: "),
    "certificates flipped": (flip_in("vendor/certifi/cacert.pem"), "vendor/certifi/cacert.pem: "),
    "module flipped": (flip_in("hfship/base/errors.py"), "hfship/base/errors.py"),
    "module flipped that would not be imported": (
        flip_in("hfship/ops/mirror.py"),
        "hfship/ops/mirror.py",
    ),
    "module that does not compile": (rewritten({"hfship/base/errors.py": b"def ("}), "is damaged"),
    "module missing": (
        rewritten({"hfship/base/errors.py": None}),
        "hfship/base/errors.py: no such entry",
    ),
    "module missing that would not be imported": (
        rewritten({"hfship/ops/mirror.py": None}),
        "hfship/ops/mirror.py",
    ),
    "module added": (rewritten({"hfship/evil.py": b"evil = 1\n"}), "hfship/evil.py: extra entry"),
    "build table flipped": (flip_in("hfship-build.json"), "hfship-build.json"),
    "entry replaced": (
        rewritten({"vendor/tqdm/std.py": b"evil = 1\n"}),
        "vendor/tqdm/std.py: changed",
    ),
    "entry added": (
        rewritten({"vendor/simplejson.py": b"evil = 1\n"}),
        "vendor/simplejson.py: extra entry",
    ),
    "entry removed": (rewritten({"vendor/tqdm/std.py": None}), "vendor/tqdm/std.py: missing"),
    "entry twice": (rewritten({}, twice="vendor/tqdm/std.py"), "vendor/tqdm/std.py: there twice"),
    "build table made to fit": (
        rewritten({"hfship-build.json": b'{"version": "9", "entries": {}}'}),
        "extra entry",
    ),
    "build table is no table": (rewritten({"hfship-build.json": b"[]"}), "hfship-build.json: "),
    "date in directory": (lambda c: flip(c, directory(c) + 13), "zip headers"),
    "mode in directory": (lambda c: flip(c, directory(c) + 40), "zip headers"),
    "CRC in directory": (lambda c: flip(c, directory(c) + 16), "LICENSE: "),
    "size in directory": (lambda c: flip(c, directory(c) + 21), "LICENSE: "),
    "name in directory": (lambda c: flip(c, directory(c) + 46), "LICENSE: missing"),
    "date in local header": (lambda c: flip(c, entry_span(c, "LICENSE").start - 27), "zip headers"),
    "junk before the zip": (lambda c: c.replace(b"\nPK", b"\njunkPK", 1), "zip headers"),
    "junk as comment": (lambda c: c[:-2] + b"\4\0junk", "zip headers"),
    "junk behind": (lambda c: c + b"junk", "zip headers"),
    "seal changed": (lambda c: c.replace(b"# sha256", b"# SHA256", 1), "zip headers"),
    "seal removed": (lambda c: c.replace(c.split(b"\n")[1] + b"\n", b"", 1), None),
    "cut": (lambda c: c[:-1], None),
}


@pytest.mark.parametrize("tamper, named", TAMPERS.values(), ids=TAMPERS)
def test_verify_names_what_was_changed(
    pyz: Path, tmp_path: Path, tamper: Callable[[bytes], bytes], named: Optional[str]
) -> None:
    copy = tmp_path / "hfship.pyz"
    copy.write_bytes(tamper(pyz.read_bytes()))
    assert copy.read_bytes() != pyz.read_bytes()
    done = run(PYTHON, copy, "version", "--verify")
    if named is None:  # Python itself finds no program in it
        assert done.returncode == 1, done.stdout
    else:
        assert (done.returncode, done.stdout) == (6, ""), done.stderr
        assert named in done.stderr
        assert "next  " in done.stderr


def test_no_flipped_byte_passes(pyz: Path, tmp_path: Path) -> None:
    content, copy = pyz.read_bytes(), tmp_path / "hfship.pyz"
    start = directory(content)
    inside = range(0, start, start // 15)
    for offset in [*inside, *range(start, len(content), (len(content) - start) // 15)]:
        copy.write_bytes(flip(content, offset))
        done = run(PYTHON, copy, "version", "--verify")
        assert done.returncode != 0, offset


def test_a_library_damaged_in_the_file_is_not_loaded(pyz: Path, tmp_path: Path) -> None:
    suffix = run(
        PYTHON, "-c", "import _imp; print(_imp.extension_suffixes()[0][1:-3])"
    ).stdout.strip()
    copy = tmp_path / "hfship.pyz"
    copy.write_bytes(flip_in(f"native/{suffix}/backend_c.so")(pyz.read_bytes()))
    done = run(PYTHON, copy, "version")
    assert done.returncode == 6
    assert f"native/{suffix}/backend_c.so" in done.stderr


def test_the_seal_can_be_checked_by_hand(pyz: Path) -> None:
    by_hand = f"tail -n +3 '{pyz}' | sha256sum"
    done = subprocess.run(by_hand, shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert pyz.read_bytes().split(b"\n")[1].decode().endswith(done.stdout.split()[0])


def test_from_source_there_is_nothing_to_verify() -> None:
    done = run(sys.executable, ROOT / "hfship.py", "version", "--verify")
    assert done.returncode == 0, done.stderr
    assert "nothing to verify (hfship.py runs from source)" in done.stdout


class Loader:
    """What Python imports from, where `found` is what it finds or raises."""

    def __init__(self, found: Union[bytes, Exception]) -> None:
        self.found = found

    def get_data(self, _: str) -> bytes:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    "damage", [ImportError("bad local header"), EOFError("cut"), zlib.error("invalid block")]
)
def test_an_entry_that_cannot_be_read_is_named(
    damage: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "__loader__", Loader(damage))
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        own.own_entry("LICENSE")
    assert caught.value.why == f"LICENSE: {type(damage).__name__}: {damage}"
    assert "copy it again" in caught.value.next_step


@pytest.mark.parametrize(
    "table",
    [b"", b"{", b"\xff", b"[]", b"{}", b'{"version": "1"}', b'{"version": "1", "entries": 1}'],
)
def test_a_build_table_that_is_none_is_damage(
    table: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "__loader__", Loader(table))
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        own.own_build()
    assert caught.value.why.startswith("hfship-build.json: ")


def test_the_build_table_is_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"version": "1.2", "entries": {"LICENSE": "ab"}}
    monkeypatch.setattr(own, "__loader__", Loader(json.dumps({**table, "more": 1}).encode()))
    assert own.own_build() == table
    monkeypatch.setattr(own, "__loader__", Loader(FileNotFoundError()))
    assert own.own_build() == {}  # from source


# ---- the build -----------------------------------------------------------------------


def test_size(pyz: Path) -> None:
    assert pyz.stat().st_size <= 6_000_000


def test_contents(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        table = json.loads(archive.read("hfship-build.json"))
        infos = archive.infolist()
    assert names == sorted(names)
    assert table["version"] == hfship.__version__
    assert set(table["entries"]) == set(names) - {"hfship-build.json"}
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {info.external_attr >> 16 for info in infos} == {0o100644}
    assert not [info for info in infos if info.extra or info.comment or info.is_dir()]
    natives = [name for name in names if name.startswith("native/")]
    assert len(natives) == len(build_zipapp.PYTHONS) * len(build_zipapp.MACHINES)
    packages = {re.split(r"[/.]", name)[1] for name in names if name.startswith("vendor/")} - {
        "licenses"
    }
    licensed = {name.split("/")[2] for name in names if name.startswith("vendor/licenses/")}
    assert licensed == packages | {"zstandard"}


@pytest.mark.slow
@pytest.mark.alone  # a first build asks pip for its tools, and workers have no network
def test_another_python_in_another_folder_builds_the_same_bytes(pyz: Path, tmp_path: Path) -> None:
    python = next(
        (PYTHONS[version] for version in CARRIED if version != "3.9"), PYTHON
    )  # building needs 3.10
    folder = tmp_path / "deeper" / "down"
    folder.mkdir(parents=True)
    for name in INPUTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    if (ROOT / "build" / "wheels").exists():  # what is compressed already is not taken along
        shutil.copytree(ROOT / "build" / "wheels", folder / "build" / "wheels")
    env = {
        **os.environ,
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "4",
        "SOURCE_DATE_EPOCH": "1700000000",
    }
    script = 'umask 077; exec "$0" "$@"'
    command = ["sh", "-c", script, python, "build_zipapp.py", "-o", "elsewhere.pyz"]
    subprocess.run(command, check=True, cwd=folder, env=env, capture_output=True)
    assert (folder / "elsewhere.pyz").read_bytes() == pyz.read_bytes()
    assert (folder / "elsewhere.pyz").stat().st_mode & 0o777 == 0o755


def test_a_wheel_that_is_not_the_locked_one_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "requests-2.34.2-py3-none-any.whl").write_bytes(b"not the wheel")
    assert build_zipapp.cached_wheels(tmp_path, ["00" * 32]) == {}


def test_a_launcher_without_its_tables_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = build_zipapp.launcher(["hfship/b.py", "hfship/a.py"], ["c"]).decode()
    assert (
        "\nMODULES = ('hfship/a.py', 'hfship/b.py')  # type" in text
        and "\nVENDORED = ('c',)  # type" in text
    )
    (tmp_path / "launcher.py").write_text(text)
    monkeypatch.setattr(build_zipapp, "ROOT", tmp_path)
    with pytest.raises(build_zipapp.BuildError, match="no table MODULES"):
        build_zipapp.launcher([], [])


def test_the_lock_names_hashes_and_no_hosts() -> None:
    text = (ROOT / "vendor.lock").read_text()
    assert "://" not in text and "index" not in text
    requirements = build_zipapp.parse_lock(text)
    assert all(re.fullmatch(r"\w+==[\d.]+", r.pin) and r.hashes for r in requirements)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for r in requirements for digest in r.hashes)
    assert [len(r.hashes) for r in requirements if r.compiled] == [10]


@pytest.mark.parametrize(
    "image, machine",
    [
        (b"", "x86_64"),
        (b"MZ" + bytes(100), "x86_64"),
        (b"\x7fELF\x01\x01" + bytes(100), "x86_64"),
        (b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", 183) + bytes(100), "x86_64"),
        (
            b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", 62) + bytes(12) + struct.pack("<Q", 64) + bytes(14)
            + struct.pack("<HH", 56, 1) + bytes(6) + struct.pack("<8xQ16xQ16x", 0, 500),
            "x86_64",
        ),
    ],
    ids=["empty", "no ELF", "32 bit", "another machine", "segment outside"],
)  # fmt: skip
def test_what_cannot_be_stripped_is_refused(image: bytes, machine: str) -> None:
    with pytest.raises(build_zipapp.BuildError):
        build_zipapp.strip_elf(image, machine)


def test_ctrl_c_before_anything_began_is_no_traceback(tmp_path: Path) -> None:
    pyz = tmp_path / "hfship.pyz"
    modules = {"hfship/__init__.py": "", "hfship/commands/__init__.py": ""}
    modules["hfship/commands/run.py"] = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    with zipfile.ZipFile(pyz, "w") as archive:
        archive.writestr("__main__.py", build_zipapp.MAIN)
        archive.writestr("hfship_launcher.py", build_zipapp.launcher(modules, []))
        for name, source in modules.items():
            archive.writestr(name, source)
    done = subprocess.run([sys.executable, str(pyz)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT and not done.stderr
