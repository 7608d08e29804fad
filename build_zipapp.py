#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build hfship.pyz: src/hfship, the libraries it carries, and zstd for every Python that has none.

    vendor.lock -> wheels, by hash -> entries -> deflate -> zip -> seal -> dist/hfship.pyz
                   (build/wheels)     + stripped .so
                   src, launcher.py

The same inputs give the same bytes on every machine and every Python from 3.10 on. Nothing that may
differ between machines takes part: the compressor is the libdeflate of build.lock and not the zlib
at hand (zlib and zlib-ng give different bytes), the ELF stripping is the one below and not
binutils', and names, order, dates and modes are fixed. A second build needs no network: what pip
brought is kept in build/.

Layout of the result:

    #!/usr/bin/env python3
    # sha256 of all bytes after this line: HEX     what `tail -n +3 hfship.pyz | sha256sum` says
    (zip)
      LICENSE, vendor.lock             what is inside, for the bill of materials
      __main__.py                      calls the next one
      docs/NAME                        the texts that `hfship help` prints
      hfship/...                       as in src/
      hfship-build.json
      hfship_launcher.py               launcher.py, with the tables of modules and vendored packages
      native/ABI/backend_c.so          zstandard's C backend, for each ABI, such as
                                       cpython-311-x86_64-linux-gnu
      vendor/PACKAGE/...               pure Python, as in its wheel
      vendor/licenses/PACKAGE/...

hfship-build.json is {"version": VERSION, "entries": {NAME: SHA-256 of its content}} for all other
entries.
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
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "src"
TOPICS_MODULE = "hfship.commands.guide"  # TOPICS names the texts of docs/ that travel
# CPython versions that zstandard has wheels for, without those that have zstd themselves (3.14 on).
PYTHONS = ("39", "310", "311", "312", "313")
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of the ELF header

# The whole of __main__.py. Python compiles that file twice at every start, so it is short.
MAIN = b"""import sys

from hfship_launcher import run

sys.exit(run())
"""

# Never imported here: tqdm for notebooks, frameworks and chats, urllib3 inside a browser, over
# pyOpenSSL, SOCKS or with HTTP/2, what packages are as programs, tests, stubs, manuals.
LEFT_OUT = re.compile(
    r"tqdm/(contrib/|asyncio|auto|completion|dask|keras|notebook|rich|tk\.py|tqdm\.1|_main\.py)"
    r"|urllib3/(contrib/(emscripten/|pyopenssl\.py|socks\.py)|http2/connection\.py)|certifi/tests/"
    r"|idna/cli\.py|.*(\.pyi|/py\.typed|/__main__\.py)$"
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
    return [
        Requirement(words[0], tuple(re.findall(r"--hash=sha256:(\w+)", " ".join(words))))
        for words in lines
    ]


def sha256(content: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


def cached_wheels(folder: Path, wanted: Iterable[str]) -> Dict[str, Path]:
    """Wheels of `folder` whose SHA-256 is wanted, by SHA-256; the name of a file proves nothing."""
    found = {sha256(path.read_bytes()): path for path in sorted(folder.glob("*.whl"))}
    return {digest: found[digest] for digest in wanted if digest in found}


def pip_targets(requirement: Requirement) -> List[List[str]]:
    """pip options that select each wheel of a requirement.

    urllib3 asks for Python 3.10: pip is told of the newest.
    """
    if not requirement.compiled:
        return [
            [
                "--python-version",
                "3.14",
                "--implementation",
                "py",
                "--abi",
                "none",
                "--platform",
                "any",
            ]
        ]
    return [
        ["--python-version", python, "--implementation", "cp", "--abi", f"cp{python}"]
        + [
            option
            for tag in ("manylinux2014", "manylinux_2_17")
            for option in ("--platform", f"{tag}_{machine}")
        ]
        for python in PYTHONS
        for machine in MACHINES
    ]


def pip(command: str, *arguments: str) -> None:
    """Run pip. Raises BuildError; what pip has to say is on stderr."""
    argv = [
        sys.executable,
        "-m",
        "pip",
        command,
        "--quiet",
        "--disable-pip-version-check",
        *arguments,
    ]
    if subprocess.run(argv, check=False).returncode:
        raise BuildError(f"pip {command} {' '.join(arguments)} failed")


def download(requirement: Requirement, folder: Path) -> None:
    """Let pip bring the wheels of one requirement, from wherever pip is set up to look; only the
    hashes count.
    """
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "requirements.txt"
        lock.write_text(requirement.text(), encoding="ascii")
        for target in pip_targets(requirement):
            options = [
                "--only-binary=:all:",
                "--require-hashes",
                "-r",
                str(lock),
                "-d",
                str(folder),
            ]
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
    """A 64-bit little-endian shared object without what the loader never reads.

    That is sections, symbols and debug data.

    The loader works from the program headers alone (ELF-64 Object File Format 1.5, §"Program Header
    Table"); what lies behind the last segment's bytes, and the section header table, serve linkers
    and debuggers.
    """
    if (
        image[:6] != b"\x7fELF\x02\x01"
        or struct.unpack_from("<H", image, 18)[0] != MACHINES[machine]
    ):
        raise BuildError(f"not a 64-bit ELF file for {machine}")
    table, size, count = *struct.unpack_from("<Q", image, 32), *struct.unpack_from("<HH", image, 54)
    end = table + size * count
    for index in range(count):
        offset, length = struct.unpack_from(
            "<8x Q 16x Q", image, table + size * index
        )  # p_offset, p_filesz
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
                entries[f"native/{compiled[1]}/backend_c.so"] = strip_elf(
                    wheel.read(name), compiled[2]
                )
            elif not (info or name.endswith("/") or package == "zstandard" or LEFT_OUT.match(name)):
                entries[f"vendor/{name}"] = wheel.read(name)
    return entries


def package_entries() -> Entries:
    """The modules of hfship, and the tables that they read."""
    paths = sorted((SOURCE / "hfship").rglob("*"))
    return {
        path.relative_to(SOURCE).as_posix(): path.read_bytes()
        for path in paths
        if path.suffix in (".py", ".json")
    }


def version_of(package: Entries) -> str:
    """The version that hfship's package says it has."""
    text = package["hfship/__init__.py"].decode("utf-8")
    version = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if not version:
        raise BuildError("src/hfship/__init__.py has no __version__")
    return version[1]


def launcher(modules: Iterable[str], vendored: Iterable[str]) -> bytes:
    """launcher.py with its tables: the entries of hfship's modules, and the vendored packages."""
    text = (ROOT / "launcher.py").read_text(encoding="ascii")
    for name, table in (("MODULES", modules), ("VENDORED", vendored)):
        empty = f"\n{name} = ()  # type"
        if text.count(empty) != 1:
            raise BuildError(f"launcher.py has no table {name} to fill in")
        text = text.replace(empty, f"\n{name} = {tuple(sorted(table))}  # type")
    return text.encode("ascii")


def document_entries() -> Entries:
    """The texts that `hfship help` prints: there is no network where they are read."""
    topics = importlib.import_module(TOPICS_MODULE).TOPICS
    return {
        f"docs/{topic.file}": (ROOT / "docs" / topic.file).read_bytes() for topic in topics.values()
    }


def collect(wheels: Iterable[Path]) -> Entries:
    """All entries of the pyz, with the table that lists them."""
    package = package_entries()
    entries: Entries = {name: (ROOT / name).read_bytes() for name in ("LICENSE", "vendor.lock")}
    entries.update(package)
    entries.update(document_entries())
    for path in wheels:
        entries.update(wheel_entries(path))
    vendored = {re.split(r"[/.]", name)[1] for name in entries if name.startswith("vendor/")}
    modules = [name for name in package if name.endswith(".py")]
    entries["__main__.py"] = MAIN
    entries["hfship_launcher.py"] = launcher(modules, vendored - {"licenses"})
    digests = {name: sha256(entries[name]) for name in sorted(entries)}
    table = {"version": version_of(package), "entries": digests}
    entries["hfship-build.json"] = (json.dumps(table, indent=1) + "\n").encode("ascii")
    return dict(sorted(entries.items()))


# ---- deflate -------------------------------------------------------------------------


def load_tools(folder: Path) -> None:
    """Make importable what build.lock names, installed by hash below `folder` at the first
    build.
    """
    lock = ROOT / "build.lock"
    tools = folder / f"{sys.implementation.cache_tag}-{sha256(lock.read_bytes())[:8]}"
    if not tools.is_dir():
        pip(
            "install",
            "--target",
            str(tools),
            "--only-binary=:all:",
            "--require-hashes",
            "-r",
            str(lock),
        )
    sys.path[:0] = [str(tools), str(SOURCE)]


def load_libdeflate() -> Callable[[bytes], bytes]:
    """libdeflate's compressor at its best level."""
    deflate = importlib.import_module("deflate")
    return lambda content: bytes(deflate.deflate_compress(content, 12))


# ---- zip and seal --------------------------------------------------------------------

PREFIX = "#!/usr/bin/env python3\n# sha256 of all bytes after this line: {}\n"
DOS_TIME, DOS_DATE = 0, 0x21  # 1980-01-01 00:00:00, the first moment that zip knows
MODE = 0o100644


def zip_bytes(entries: Entries, compress: Callable[[bytes], bytes], start: int) -> bytes:
    """A zip file of `entries` whose first byte lies at offset `start` of the whole (PKWARE
    APPNOTE 6.3.x §4.3).
    """
    body, directory = bytearray(), bytearray()
    for name, content in entries.items():
        raw = compress(content)
        method, raw = (8, raw) if len(raw) < len(content) else (0, content)
        sizes = (zlib.crc32(content), len(raw), len(content), len(name), 0)
        fields = struct.pack("<HHHHHIIIHH", 20, 0, method, DOS_TIME, DOS_DATE, *sizes)
        made_by = 3 << 8 | 20  # Unix, so that the modes below count
        directory += b"PK\x01\x02" + struct.pack("<H", made_by) + fields
        directory += struct.pack("<HHHII", 0, 0, 0, MODE << 16, start + len(body)) + name.encode(
            "ascii"
        )
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
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "dist" / "hfship.pyz", metavar="FILE"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "build",
        metavar="DIR",
        help="downloads and intermediates",
    )
    args = parser.parse_args()
    try:
        build(args.output, args.cache)
    except BuildError as exc:
        print(f"build_zipapp: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
