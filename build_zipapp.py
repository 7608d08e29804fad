#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build hfship.pyz: hfship.py, the libraries it carries, and zstd for every Python it may meet, as one runnable file.

    vendor.lock -> wheels, by hash -> entries -> deflate -> zip -> seal -> dist/hfship.pyz
                   (build/wheels)     + stripped .so

The same inputs give the same bytes on every machine and every Python from 3.10 on. Nothing that may differ between
machines takes part: the compressor is the libdeflate of build.lock and not the zlib at hand (zlib and zlib-ng give
different bytes), the ELF stripping is the one below and not binutils', the completion scripts hold no text that comes
from argparse or from the machine, and names, order, dates and modes are fixed. A second build needs no network: what
pip brought is kept in build/.

Layout of the result:

    #!/usr/bin/env python3
    # sha256 of all bytes after this line: HEX         `tail -n +3 hfship.pyz | sha256sum` must say the same
    (zip)
      LICENSE  __main__.py  hfship.py  hfship-build.json
      completion/SHELL                 made by shtab, which stays behind
      native/ABI/backend_c.so          zstandard's C backend; ABI as in "cpython-311-x86_64-linux-gnu"
      vendor/PACKAGE/...               pure Python, as in its wheel
      vendor/licenses/PACKAGE/...

hfship-build.json is {"version": VERSION, "entries": {NAME: SHA-256 of its content}} for all other entries.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parent
PYTHONS = ("39", "310", "311", "312", "313", "314")  # CPython versions that zstandard has wheels for
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of the ELF header

# Never imported here: tqdm for notebooks, frameworks and chats, urllib3 inside a browser, tests, stubs, manuals.
LEFT_OUT = re.compile(
    r"tqdm/(contrib/|asyncio|auto|completion|dask|keras|notebook|rich|tk\.py|tqdm\.1)"
    r"|urllib3/contrib/emscripten/|certifi/tests/|.*(\.pyi|/py\.typed)$"
)


class BuildError(Exception):
    """The build cannot go on; the text says why."""


# ---- vendor.lock and wheels ----------------------------------------------------------


@dataclass(frozen=True)
class Requirement:
    """One pinned package of vendor.lock and the SHA-256 of its wheels."""

    pin: str
    hashes: Tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """A wheel for each Python and machine, instead of one for all."""
        return len(self.hashes) > 1

    def text(self) -> str:
        """The requirement as pip reads it."""
        return " ".join([self.pin, *(f"--hash=sha256:{digest}" for digest in self.hashes)]) + "\n"


def parse_lock(text: str) -> List[Requirement]:
    """Requirements of a lock file in pip's format.

    >>> parse_lock("# why" + chr(10) + "a==1 " + chr(92) + chr(10) + "  --hash=sha256:00")
    [Requirement(pin='a==1', hashes=('00',))]
    """
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return [Requirement(words[0], tuple(re.findall(r"--hash=sha256:(\w+)", " ".join(words)))) for words in lines]


def sha256(content: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


def cached_wheels(folder: Path, wanted: Iterable[str]) -> Dict[str, Path]:
    """Wheels of `folder` whose SHA-256 is wanted, by SHA-256; the name of a file proves nothing."""
    found = {sha256(path.read_bytes()): path for path in sorted(folder.glob("*.whl"))}
    return {digest: found[digest] for digest in wanted if digest in found}


def pip_targets(requirement: Requirement) -> List[List[str]]:
    """pip options that select each wheel of a requirement. requests asks for Python 3.10: pip is told of the newest."""
    if not requirement.compiled:
        return [["--python-version", "3.14", "--implementation", "py", "--abi", "none", "--platform", "any"]]
    return [
        ["--python-version", python, "--implementation", "cp", "--abi", f"cp{python}"]
        + [option for tag in ("manylinux2014", "manylinux_2_17") for option in ("--platform", f"{tag}_{machine}")]
        for python in PYTHONS
        for machine in MACHINES
    ]


def pip(command: str, *arguments: str) -> None:
    """Run pip. Raises BuildError; what pip has to say is on stderr."""
    argv = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(argv, check=False).returncode:
        raise BuildError(f"pip {command} {' '.join(arguments)} failed")


def download(requirement: Requirement, folder: Path) -> None:
    """Let pip bring the wheels of one requirement, from wherever pip is set up to look; only the hashes count."""
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "requirements.txt"
        lock.write_text(requirement.text(), encoding="ascii")
        for target in pip_targets(requirement):
            options = ["--only-binary=:all:", "--require-hashes", "-r", str(lock), "-d", str(folder)]
            pip("download", "--no-deps", *options, *target)


def get_wheels(requirements: Sequence[Requirement], folder: Path) -> Dict[str, Path]:
    """All locked wheels by SHA-256, downloaded if they are not in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [digest for requirement in requirements for digest in requirement.hashes]
    have = cached_wheels(folder, wanted)
    for requirement in requirements:
        if not have.keys() >= set(requirement.hashes):
            download(requirement, folder)
    have = cached_wheels(folder, wanted)
    missing = set(wanted) - have.keys()
    if missing:
        raise BuildError(f"no wheel has the SHA-256 {', '.join(sorted(missing))}")
    return have


# ---- entries -------------------------------------------------------------------------

Entries = Dict[str, bytes]


def strip_elf(image: bytes, machine: str) -> bytes:
    """A 64-bit little-endian shared object without what the loader never reads: sections, symbols and debug data.

    The loader works from the program headers alone (ELF-64 Object File Format 1.5, §"Program Header Table"); what lies
    behind the last segment's bytes, and the section header table, serve linkers and debuggers.
    """
    if image[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", image, 18)[0] != MACHINES[machine]:
        raise BuildError(f"not a 64-bit ELF file for {machine}")
    table, size, count = *struct.unpack_from("<Q", image, 32), *struct.unpack_from("<HH", image, 54)
    end = table + size * count
    for index in range(count):
        offset, length = struct.unpack_from("<8x Q 16x Q", image, table + size * index)  # p_offset, p_filesz
        end = max(end, offset + length)
    if end > len(image):
        raise BuildError("a segment lies outside of the ELF file")
    stripped = bytearray(image[:end])
    struct.pack_into("<Q", stripped, 40, 0)  # e_shoff
    struct.pack_into("<HHH", stripped, 58, 0, 0, 0)  # e_shentsize, e_shnum, e_shstrndx
    return bytes(stripped)


def wheel_entries(path: Path) -> Entries:
    """What hfship.pyz takes from one wheel, under the names it has there."""
    package = path.name.split("-")[0].lower()
    entries: Entries = {}
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            info = re.match(r"[^/]+\.dist-info/", name)
            compiled = re.fullmatch(r"zstandard/backend_c\.(cpython-\d+-(\w+)-linux-gnu)\.so", name)
            if info and re.match(r"LICEN[CS]E|NOTICE|COPYING", name.rsplit("/", 1)[1]):
                entries[f"vendor/licenses/{package}/{name.rsplit('/', 1)[1]}"] = wheel.read(name)
            elif compiled:
                entries[f"native/{compiled[1]}/backend_c.so"] = strip_elf(wheel.read(name), compiled[2])
            elif not (info or name.endswith("/") or package == "zstandard" or LEFT_OUT.match(name)):
                entries[f"vendor/{name}"] = wheel.read(name)
    return entries


def completion_script(program: Any, shell: str) -> str:
    """What makes a shell complete hfship and hfship.pyz, by shtab from the program's own parser.

    shtab asks argparse for no words but the help texts, so that all Pythons give the same script.
    """
    shtab = importlib.import_module("shtab")
    parser = program.build_parser()
    parser.prog = "hfship"
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    for action in (action for command in commands.values() for action in command._actions):
        if action.dest == "jobs":
            action.default = "N"  # the cores of this machine
        if not action.choices and re.search(r"FILE|DIR|ARCHIVE|pem", str(action.metavar)):
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
    script = shtab.complete(parser, shell).rstrip("\n")
    return re.sub(r"(?m)^(#compdef|complete .*|  compdef .*) hfship$", r"\g<0> hfship.pyz", script)


def collect(wheels: Iterable[Path]) -> Entries:
    """All entries of the pyz, with the table that lists them."""
    program = (ROOT / "hfship.py").read_bytes()
    version = re.search(rb'^__version__ = "([^"]+)"', program, re.MULTILINE)
    if not version:
        raise BuildError("hfship.py has no __version__")
    entries: Entries = {"LICENSE": (ROOT / "LICENSE").read_bytes(), "hfship.py": program}
    for path in wheels:
        entries.update(wheel_entries(path))
    program_module = importlib.import_module("hfship")
    for shell in program_module.SHELLS:
        entries[f"completion/{shell}"] = completion_script(program_module, shell).encode("utf-8")
    packages = {re.split(r"[/.]", name)[1] for name in entries if name.startswith("vendor/")} - {"licenses"}
    entries["__main__.py"] = LAUNCHER.replace("VENDORED = ()", f"VENDORED = {tuple(sorted(packages))}").encode("ascii")
    table = {"version": version[1].decode(), "entries": {name: sha256(entries[name]) for name in sorted(entries)}}
    entries["hfship-build.json"] = (json.dumps(table, indent=1) + "\n").encode("ascii")
    return dict(sorted(entries.items()))


# ---- the launcher --------------------------------------------------------------------

# Must compile on Python 2.7: a SyntaxError is no answer to the question which Python is needed.
LAUNCHER = '''\
"""Start hfship from this file, and from nothing else that the host's Python has installed."""
import os
import signal
import sys

VENDORED = ()
# What hfship and the vendored packages would pick up if a host has imported it.
OPTIONAL = ("hfship", "zstandard", "chardet", "charset_normalizer", "simplejson")
OPTIONAL += ("brotli", "brotlicffi", "h2", "OpenSSL")


def fail(code, what, why, next_step):
    sys.stderr.write("hfship: %s\\n  why   %s\\n  next  %s\\n" % (what, why, next_step))
    sys.exit(code)


def check_python():
    if sys.version_info < (3, 8):
        version = "%d.%d.%d" % sys.version_info[:3]
        message = "hfship needs Python 3.8 or newer; this is %s (%s); next: python3.11 %s, or any other from 3.8 on\\n"
        sys.stderr.write(message % (version, sys.executable, " ".join(sys.argv)))
        sys.exit(9)


def is_standard_library(path):
    """Whether a sys.path entry belongs to Python itself; neither site-packages nor PYTHONPATH do."""
    home = os.path.dirname(os.__file__)
    name = os.path.basename(path)
    if path == home or path.startswith(home + os.sep):
        return "-packages" not in path[len(home) :]
    return name == "lib-dynload" or name == "python%d%d.zip" % sys.version_info[:2]


def shut_out_host(pyz):
    """Import from this file and the standard library only, whatever .pth files and sitecustomize did before us."""
    sys.dont_write_bytecode = True
    sys.path[:] = [pyz, os.path.join(pyz, "vendor")] + [path for path in sys.path if is_standard_library(path)]
    # Editable installs answer imports from finders of their own.
    sys.meta_path[:] = [f for f in sys.meta_path if str(getattr(f, "__module__", "")).startswith("_frozen_importlib")]
    for name in list(sys.modules):
        if name.split(".")[0] in VENDORED + OPTIONAL:
            del sys.modules[name]


def cache_file():
    """Where the bytecode of hfship lies between two runs."""
    folder = os.environ.get("HFSHIP_CACHE")
    folder = folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "hfship")
    return os.path.join(folder, "hfship.%s.bytecode" % sys.implementation.cache_tag)


def cached(path, seal):
    """The bytecode in the cache; None unless it is of this source, whole, and nobody else could have put it there."""
    import marshal

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as stream:
            status = os.fstat(fd)
            content = stream.read()
    except OSError:
        return None
    private = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return marshal.loads(content[32:]) if private and content[:32] == seal(content[32:]) else None


def keep(path, content):
    """Put bytecode into the cache. Where that cannot be done the next start takes as long as this one."""
    temporary = "%s.%d.tmp" % (path, os.getpid())
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(content)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
    except OSError:
        pass


def load(pyz, write):
    """Import hfship, which is large: to compile it is most of a start, so its bytecode is kept."""
    import hashlib
    import importlib.util
    import marshal
    import zipimport

    name = os.path.join(pyz, "hfship.py")
    spec = importlib.util.spec_from_file_location("hfship", name, loader=zipimport.zipimporter(pyz))
    source = spec.loader.get_data(name)
    of = importlib.util.MAGIC_NUMBER + b"%d" % sys.flags.optimize + hashlib.sha256(source).digest()

    def seal(content):
        return hashlib.sha256(of + content).digest()

    path = cache_file()
    code = cached(path, seal)
    if code is None:
        code = compile(source, name, "exec", dont_inherit=True)
        content = marshal.dumps(code)
        if write and os.path.isabs(path):  # a user without a home has none
            keep(path, seal(content) + content)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hfship"] = module
    exec(code, vars(module))
    return module


def run():
    check_python()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until hfship runs, Ctrl-C ends this without a traceback
    pyz = os.path.dirname(os.path.abspath(__file__))
    write = not sys.dont_write_bytecode
    shut_out_host(pyz)
    import warnings

    # requests misses charset_normalizer aloud; nothing here guesses encodings.
    warnings.filterwarnings("ignore", "Unable to find acceptable character detection")
    try:
        hfship = load(pyz, write)
    except Exception as exc:
        missing = getattr(exc, "name", None)
        if isinstance(exc, ImportError) and missing not in (None, "hfship"):
            fail(9, "this Python lacks the module %s" % missing, str(exc), "install Python's whole standard library")
        why = "%s: %s" % (type(exc).__name__, exc)
        fail(6, "%s is damaged" % pyz, why, "compare its SHA-256 with the published one and copy it again")
    return hfship.main()


if __name__ == "__main__":
    sys.exit(run())
'''

# ---- deflate -------------------------------------------------------------------------


def load_tools(folder: Path) -> None:
    """Make importable what build.lock names, installed by hash below `folder` at the first build."""
    lock = ROOT / "build.lock"
    tools = folder / f"{sys.implementation.cache_tag}-{sha256(lock.read_bytes())[:8]}"
    if not tools.is_dir():
        pip("install", "--target", str(tools), "--only-binary=:all:", "--require-hashes", "-r", str(lock))
    sys.path[:0] = [str(tools), str(ROOT)]


def load_libdeflate() -> Callable[[bytes], bytes]:
    """libdeflate's compressor at its best level."""
    deflate = importlib.import_module("deflate")
    return lambda content: bytes(deflate.deflate_compress(content, 12))


# ---- zip and seal --------------------------------------------------------------------

PREFIX = "#!/usr/bin/env python3\n# sha256 of all bytes after this line: {}\n"
DOS_TIME, DOS_DATE = 0, 0x21  # 1980-01-01 00:00:00, the first moment that zip knows
MODE = 0o100644


def zip_bytes(entries: Entries, compress: Callable[[bytes], bytes], start: int) -> bytes:
    """A zip file of `entries` whose first byte lies at offset `start` of the whole (PKWARE APPNOTE 6.3.x §4.3)."""
    body, directory = bytearray(), bytearray()
    for name, content in entries.items():
        raw = compress(content)
        method, raw = (8, raw) if len(raw) < len(content) else (0, content)
        sizes = (zlib.crc32(content), len(raw), len(content), len(name), 0)
        fields = struct.pack("<HHHHHIIIHH", 20, 0, method, DOS_TIME, DOS_DATE, *sizes)
        made_by = 3 << 8 | 20  # Unix, so that the modes below count
        directory += b"PK\x01\x02" + struct.pack("<H", made_by) + fields
        directory += struct.pack("<HHHII", 0, 0, 0, MODE << 16, start + len(body)) + name.encode("ascii")
        body += b"PK\x03\x04" + fields + name.encode("ascii") + raw
    counts = (0, 0, len(entries), len(entries), len(directory), start + len(body), 0)
    return bytes(body + directory) + b"PK\x05\x06" + struct.pack("<HHHHIIH", *counts)


def sealed(entries: Entries, compress: Callable[[bytes], bytes]) -> bytes:
    """The whole pyz: shebang, seal, zip."""
    archive = zip_bytes(entries, compress, start=len(PREFIX.format("0" * 64)))
    return PREFIX.format(sha256(archive)).encode("ascii") + archive


def build(output: Path, cache: Path) -> None:
    """Write the pyz. It appears complete or not at all."""
    requirements = parse_lock((ROOT / "vendor.lock").read_text(encoding="ascii"))
    wheels = get_wheels(requirements, cache / "wheels")
    load_tools(cache / "tools")
    pyz = sealed(collect(wheels.values()), load_libdeflate())
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(pyz)
    temporary.chmod(0o755)
    temporary.replace(output)
    print(f"{sha256(pyz)}  {output}  ({len(pyz)} bytes)")


def main() -> int:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Build hfship.pyz.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist" / "hfship.pyz", metavar="FILE")
    parser.add_argument("--cache", type=Path, default=ROOT / "build", metavar="DIR", help="downloads and intermediates")
    args = parser.parse_args()
    try:
        build(args.output, args.cache)
    except BuildError as exc:
        print(f"build_zipapp: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
