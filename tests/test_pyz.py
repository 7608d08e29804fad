"""The built file: runs on every Python, uses nothing of the host's, finds a zstd, proves itself, and is reproducible."""

from __future__ import annotations

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
import warnings
import zipfile
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional

import pytest

import build_zipapp
import hfship

ROOT = Path(hfship.__file__).resolve().parent
INPUTS = ("hfship.py", "build_zipapp.py", "vendor.lock", "build.lock", "LICENSE")


def find_pythons() -> Dict[str, str]:
    """Every Python of this machine, on PATH or under pyenv: "3.11" -> path."""
    names = [f"python{major}.{minor}" for major, minors in ((2, (7,)), (3, range(4, 16))) for minor in minors]
    paths = [shutil.which(name) for name in names] + ["/usr/bin/python3", sys.executable]
    paths += [str(path) for path in sorted(Path("~/.pyenv/versions").expanduser().glob("*/bin/python"))]
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
    return subprocess.run(command, capture_output=True, text=True, env={**base, **(env or {})}, cwd=cwd, check=False)


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
        assert facts["zstd"] == {"version": "zstandard 0.25.0 (libzstd 1.5.7)", "origin": "hfship.pyz, in memory"}


@pytest.mark.parametrize("version", TOO_OLD)
def test_an_old_python_gets_one_clear_line(pyz: Path, version: str) -> None:
    done = run(PYTHONS[version], pyz, "fetch", "org/model")
    assert (done.returncode, done.stdout) == (9, "")
    assert re.fullmatch(
        rf"hfship needs Python 3\.8 or newer; this is {version}\.\d+ \(.+\); next: python3\.11 \S+hfship\.pyz .+\n",
        done.stderr,
    )


@pytest.mark.parametrize("version", [v for v in SUPPORTED if version_key(v) < [3, 10]])
def test_fetch_names_the_newer_python_that_is_there(pyz: Path, version: str, tmp_path: Path) -> None:
    (tmp_path / "python3.12").touch(mode=0o755)
    for path, step in ((tmp_path, f"python3.12 {pyz} fetch org/model"), ("/nowhere", "none is on PATH")):
        done = run(PYTHONS[version], pyz, "fetch", "org/model", env={"PATH": str(path)})
        assert done.returncode == 9 and step in done.stderr and f"this is Python {version}" in done.stderr


def test_the_launcher_says_so_on_a_python_we_do_not_have() -> None:
    """Where no old Python is at hand: nothing in the launcher is newer than 2.7's grammar knows."""
    newer = r"\bf['\"]|:=|->|\bnonlocal\b|\basync\b|\bawait\b|print\(|\bfrom None\b|\*\*\{|^\s*def .*\*,"
    assert not re.search(newer, build_zipapp.LAUNCHER, re.MULTILINE)


@pytest.mark.parametrize("version", SUPPORTED)
def test_is_a_module_too(pyz: Path, version: str) -> None:
    code = (
        "import hfship; z = hfship.load_zstd(); c = bytes(range(256)) * 5000;"
        "assert z.decompressor()(z.compressor(1)(c), len(c)) == c; print(hfship.__file__, z.name)"
    )
    done = run(PYTHONS[version], "-c", code, env={"PYTHONPATH": str(pyz)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{pyz}/hfship.py ")


def test_works_by_relative_path_and_by_shebang(pyz: Path, tmp_path: Path) -> None:
    copy = shutil.copy2(pyz, tmp_path / "hf ship.pyz")
    for command in ([PYTHON, "./hf ship.pyz"], [PYTHON, "-I", "hf ship.pyz"], ["./hf ship.pyz"]):
        done = run(*command, "version", env={"PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}, cwd=tmp_path)
        assert f"({copy})" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["version", "--help"], ["version", "--verify"]])
def test_offline_commands_import_no_network_library(pyz: Path, arguments: List[str]) -> None:
    done = run(PYTHON, "-S", "-X", "importtime", pyz, *arguments)  # -S: what .pth files import is not our doing
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not {name for name in imported if name.split(".")[0] in ("requests", "urllib3", "certifi", "idna", "tqdm")}


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

FORGED = """
import hashlib, importlib.util, marshal, sys, zipfile
code = marshal.dumps(compile("def main(): print('from the cache')", "x", "exec"))
source = zipfile.ZipFile(sys.argv[1]).read("hfship.py")
of = importlib.util.MAGIC_NUMBER + b"%d" % sys.flags.optimize + hashlib.sha256(source).digest()
sys.stdout.buffer.write(hashlib.sha256(of + code).digest() + code)
"""
SPOILT: Dict[str, Callable[[Path], object]] = {
    "of another source": lambda path: path.write_bytes(bytes(32) + path.read_bytes()[32:]),
    "a byte is flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "others may write to it": lambda path: path.chmod(0o666),
    "somebody else's": lambda path: os.chown(path, 12345, 12345),
    "a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("version", SUPPORTED)
def test_bytecode_is_used_where_it_is_private_and_right(pyz: Path, tmp_path: Path, version: str) -> None:
    env = {"HFSHIP_CACHE": str(tmp_path)}
    first = run(PYTHONS[version], pyz, "version", env=env)
    (kept,) = tmp_path.iterdir()
    inode = kept.stat().st_ino
    again = run(PYTHONS[version], pyz, "version", env=env)
    assert (again.returncode, again.stdout) == (0, first.stdout) and kept.stat().st_ino == inode
    forge = subprocess.run([PYTHONS[version], "-c", FORGED, pyz], stdout=subprocess.PIPE, check=True)
    kept.write_bytes(forge.stdout)
    assert run(PYTHONS[version], pyz, "version", env=env).stdout == "from the cache\n"


def test_a_user_without_a_home_keeps_no_bytecode(pyz: Path, tmp_path: Path) -> None:
    env = {"HOME": "not/absolute", "XDG_CACHE_HOME": ""}
    assert run(PYTHON, pyz, "version", env=env, cwd=tmp_path).returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", SPOILT)
def test_bytecode_that_cannot_be_trusted_is_not_run(pyz: Path, tmp_path: Path, how: str) -> None:
    if how == "somebody else's" and os.geteuid():
        pytest.skip("only root gives files away")
    env = {"HFSHIP_CACHE": str(tmp_path)}
    assert run(PYTHON, pyz, "version", env=env).returncode == 0
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(subprocess.run([PYTHON, "-c", FORGED, pyz], stdout=subprocess.PIPE, check=True).stdout)
    SPOILT[how](kept)
    done = run(PYTHON, pyz, "version", env=env)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("hfship")
    assert not list(tmp_path.glob("*.tmp"))


# ---- nothing of the host's -----------------------------------------------------------

POISONED = ("requests", "urllib3", "zstandard", "tqdm", "tomli", "certifi", "idna", "hfship", "charset_normalizer")
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
    import requests, urllib3, certifi, idna, socks, urllib3.contrib.socks
    modules += [requests, urllib3, certifi, idna, socks]
for module in modules:
    assert module.__file__.startswith(pyz + "/"), module
for name in ("zstandard", "charset_normalizer"):
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
@pytest.mark.parametrize("road", ["PYTHONPATH", "cwd", "user site", ".pth imports", "sitecustomize", "editable"])
def test_imports_nothing_of_the_host(pyz: Path, poison: Path, tmp_path: Path, version: str, road: str) -> None:
    python, base = PYTHONS[version], tmp_path / "userbase"
    site = user_site(python, base)
    env = {"PYTHONUSERBASE": str(base)}
    imports = "import sys; sys.path.insert(0, {!r}); import {}\n".format(str(poison), ", ".join(POISONED))
    if road == "PYTHONPATH":
        env["PYTHONPATH"] = str(poison)
    elif road == "user site":
        for module in poison.iterdir():
            shutil.copy(module, site)
    elif road == ".pth imports":
        (site / "x.pth").write_text(imports)
    elif road == "editable":
        (site / "finder_for_test.py").write_text(EDITABLE_FINDER.format(names=POISONED, folder=str(poison)))
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
import hfship
zstd = hfship.load_zstd()
content = bytes(range(256)) * 20000
assert zstd.decompressor()(zstd.compressor(1)(content), len(content)) == content
print(zstd.origin)
"""


def origin(pyz: Path, python: str = PYTHON, prefix: List[str] = [], **env: str) -> str:  # noqa: B006
    """Where load_zstd found its library, after a round trip; the error text when it found none."""
    base = {"PATH": os.environ["PATH"], "HOME": "/proc/none", "PYTHONPATH": str(pyz)}
    command = [*prefix, python, "-c", ROUND_TRIP]
    done = subprocess.run(command, capture_output=True, text=True, env={**base, **env}, cwd="/", check=False)
    return (done.stdout or done.stderr).strip()


@pytest.mark.parametrize("version", CARRIED)
def test_the_carried_library_loads_from_memory_and_from_a_cache(pyz: Path, tmp_path: Path, version: str) -> None:
    python = PYTHONS[version]
    assert origin(pyz, python, HFSHIP_ZSTD="memfd") == "hfship.pyz, in memory"
    assert str(tmp_path / "c") in origin(pyz, python, HFSHIP_ZSTD="cache", HFSHIP_CACHE=str(tmp_path / "c"))
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
def test_a_cache_that_others_can_write_is_refused(pyz: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    env = {"HFSHIP_ZSTD": "cache", "HFSHIP_CACHE": str(cache), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
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
    found = origin(Path(copy), HFSHIP_ZSTD="cache", XDG_CACHE_HOME="/proc/none", HFSHIP_CACHE="/sys/none")
    assert f"by way of {tmp_path}/.hfship-cache/backend_c-" in found


def test_a_noexec_disk_stops_the_cache_but_not_memory(pyz: Path, tmp_path: Path) -> None:
    mount = ["unshare", "-m", *([] if os.geteuid() == 0 else ["-r"]), "sh", "-c"]
    mount += ['mount -t tmpfs -o noexec tmpfs "$0" && cp "$1" "$0/hfship.pyz" && shift && exec "$@"']
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
    if CARRIED and version_key(CARRIED[-1]) >= [3, 14]:
        pytest.skip("this Python has compression.zstd")
    done = run(PYTHON, pyz, "version", env=env)
    assert "zstd    none (no zstd library can be used: stdlib     No module named 'compression'" in done.stdout


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
    "other machine's library flipped": (flip_in("native/cpython-39-aarch64-linux-gnu/backend_c.so"), "aarch64"),
    "vendored module flipped": (flip_in("vendor/tqdm/std.py"), "vendor/tqdm/std.py: "),
    "certificates flipped": (flip_in("vendor/certifi/cacert.pem"), "vendor/certifi/cacert.pem: "),
    "program flipped": (flip_in("hfship.py"), ""),
    "program that does not compile": (rewritten({"hfship.py": b"def ("}), "is damaged"),
    "program missing": (rewritten({"hfship.py": None}), "is damaged"),
    "build table flipped": (flip_in("hfship-build.json"), "hfship-build.json"),
    "entry replaced": (rewritten({"vendor/socks.py": b"evil = 1\n"}), "vendor/socks.py: changed"),
    "entry added": (rewritten({"vendor/simplejson.py": b"evil = 1\n"}), "vendor/simplejson.py: extra entry"),
    "entry removed": (rewritten({"vendor/socks.py": None}), "vendor/socks.py: missing"),
    "entry twice": (rewritten({}, twice="vendor/socks.py"), "vendor/socks.py: there twice"),
    "build table made to fit": (rewritten({"hfship-build.json": b'{"version": "9", "entries": {}}'}), "extra entry"),
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
    suffix = run(PYTHON, "-c", "import _imp; print(_imp.extension_suffixes()[0][1:-3])").stdout.strip()
    copy = tmp_path / "hfship.pyz"
    copy.write_bytes(flip_in(f"native/{suffix}/backend_c.so")(pyz.read_bytes()))
    done = run(PYTHON, copy, "version")
    assert done.returncode == 6
    assert f"native/{suffix}/backend_c.so" in done.stderr


def test_the_seal_can_be_checked_by_hand(pyz: Path) -> None:
    done = subprocess.run(f"tail -n +3 '{pyz}' | sha256sum", shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert pyz.read_bytes().split(b"\n")[1].decode().endswith(done.stdout.split()[0])


def test_from_source_there_is_nothing_to_verify() -> None:
    done = run(sys.executable, ROOT / "hfship.py", "version", "--verify")
    assert done.returncode == 0, done.stderr
    assert "nothing to verify (hfship.py runs from source)" in done.stdout


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
    packages = {re.split(r"[/.]", name)[1] for name in names if name.startswith("vendor/")} - {"licenses"}
    licensed = {name.split("/")[2] for name in names if name.startswith("vendor/licenses/")}
    assert licensed == packages - {"socks", "sockshandler"} | {"pysocks", "zstandard"}


@pytest.mark.slow
def test_another_python_in_another_folder_builds_the_same_bytes(pyz: Path, tmp_path: Path) -> None:
    python = next((PYTHONS[version] for version in CARRIED if version != "3.9"), PYTHON)  # building needs 3.10
    folder = tmp_path / "deeper" / "down"
    folder.mkdir(parents=True)
    for name in INPUTS:
        shutil.copy(ROOT / name, folder)
    if (ROOT / "build" / "wheels").exists():  # what is compressed already is not taken along
        shutil.copytree(ROOT / "build" / "wheels", folder / "build" / "wheels")
    env = {**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "4", "SOURCE_DATE_EPOCH": "1700000000"}
    script = 'umask 077; exec "$0" "$@"'
    command = ["sh", "-c", script, python, "build_zipapp.py", "-o", "elsewhere.pyz"]
    subprocess.run(command, check=True, cwd=folder, env=env, capture_output=True)
    assert (folder / "elsewhere.pyz").read_bytes() == pyz.read_bytes()
    assert (folder / "elsewhere.pyz").stat().st_mode & 0o777 == 0o755


def test_a_wheel_that_is_not_the_locked_one_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "requests-2.34.2-py3-none-any.whl").write_bytes(b"not the wheel")
    assert build_zipapp.cached_wheels(tmp_path, ["00" * 32]) == {}


def test_the_lock_names_hashes_and_no_hosts() -> None:
    text = (ROOT / "vendor.lock").read_text()
    assert "://" not in text and "index" not in text
    requirements = build_zipapp.parse_lock(text)
    assert all(re.fullmatch(r"\w+==[\d.]+", r.pin) and r.hashes for r in requirements)
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for r in requirements for digest in r.hashes)
    assert [len(r.hashes) for r in requirements if r.compiled] == [12]


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
    with zipfile.ZipFile(pyz, "w") as archive:
        archive.writestr("__main__.py", build_zipapp.LAUNCHER)
        archive.writestr("hfship.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, str(pyz)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT and not done.stderr
