#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build hfship.pyz: hfship.py, the libraries it carries, and zstd for every Python it may meet, as one runnable file.

    vendor.lock -> wheels, by hash -> entries -> deflate -> zip -> seal -> dist/hfship.pyz
                   (build/wheels)     + stripped .so      (build/deflate)

The same inputs give the same bytes on every machine and every Python from 3.9 on. Nothing that may differ between
machines takes part: the compressor is the one below and not the zlib at hand (zlib and zlib-ng give different bytes),
the ELF stripping is the one below and not binutils', and names, order, dates and modes are fixed. A second build needs
no network: wheels are kept in build/wheels and compressed entries in build/deflate.

Layout of the result:

    #!/usr/bin/env python3
    # sha256 of all bytes after this line: HEX         `tail -n +3 hfship.pyz | sha256sum` must say the same
    (zip)
      LICENSE  __main__.py  hfship.py  hfship-build.json
      native/ABI/backend_c.so          zstandard's C backend; ABI as in "cpython-311-x86_64-linux-gnu"
      vendor/PACKAGE/...               pure Python, as in its wheel
      vendor/licenses/PACKAGE/...

hfship-build.json is {"version": VERSION, "entries": {NAME: SHA-256 of its content}} for all other entries.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

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


def download(requirement: Requirement, folder: Path) -> None:
    """Let pip bring the wheels of one requirement, from wherever pip is set up to look; only the hashes count."""
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "requirements.txt"
        lock.write_text(requirement.text(), encoding="ascii")
        for target in pip_targets(requirement):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(lock), "-d", str(folder)]
            if subprocess.run(command + target, check=False).returncode:
                raise BuildError(f"pip could not download {requirement.pin} ({' '.join(target)})")


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


def collect(wheels: Iterable[Path]) -> Entries:
    """All entries of the pyz, with the table that lists them."""
    program = (ROOT / "hfship.py").read_bytes()
    version = re.search(rb'^__version__ = "([^"]+)"', program, re.MULTILINE)
    if not version:
        raise BuildError("hfship.py has no __version__")
    entries: Entries = {"LICENSE": (ROOT / "LICENSE").read_bytes(), "hfship.py": program}
    for path in wheels:
        entries.update(wheel_entries(path))
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
import sys

VENDORED = ()
# What the vendored packages would pick up if a host has it.
OPTIONAL = ("chardet", "charset_normalizer", "simplejson", "brotli", "brotlicffi", "h2", "OpenSSL", "hfship", "vendor")


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


def run():
    check_python()
    pyz = os.path.dirname(os.path.abspath(__file__))
    shut_out_host(pyz)
    import warnings

    # requests misses charset_normalizer aloud; nothing here guesses encodings.
    warnings.filterwarnings("ignore", "Unable to find acceptable character detection")
    try:
        import hfship
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
#
# RFC 1951, written here so that its output depends on nothing but its input: LZ77 with lazy matching over hash chains,
# and blocks with dynamic Huffman codes. Slower than zlib by far and within 1 % of zlib -9.

WINDOW = 1 << 15
MAX_MATCH = 258
CHAIN = 24  # candidates tried per position
GOOD_MATCH = 64  # a match of this length is taken without looking for a better one
BLOCK_TOKENS = 1 << 15

# RFC 1951 §3.2.5: code -> (base, extra bits), for lengths from 3 and distances from 1.
LENGTHS = [(3 + i, 0) for i in range(8)]
LENGTHS += [(3 + ((4 + i) << extra), extra) for extra in range(1, 6) for i in range(4)]
LENGTHS[-1:] = [(227, 5), (258, 0)]
DISTANCES = [(1 + i, 0) for i in range(4)]
DISTANCES += [(1 + ((2 + i) << extra), extra) for extra in range(1, 14) for i in range(2)]
LENGTH_CODE = [0] * 3 + [max(c for c, (base, _) in enumerate(LENGTHS) if base <= n) for n in range(3, MAX_MATCH + 1)]
CODE_LENGTH_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)

Token = Tuple[int, int]  # (literal byte, 0) or (match length, distance)


def distance_code(distance: int) -> int:
    """The code of a distance.

    >>> [distance_code(d) for d in (1, 4, 5, 6, 7, 24577, 32768)]
    [0, 3, 4, 4, 5, 29, 29]
    """
    if distance <= 4:
        return distance - 1
    extra = (distance - 1).bit_length() - 2
    return 2 * extra + ((distance - 1) >> extra)


def longest_match(data: bytes, position: int, candidate: int, chain: List[int], beat: int) -> Token:
    """The longest match at `position` that is longer than `beat` bytes, or (0, 0). `candidate` is the nearest one."""
    limit = min(MAX_MATCH, len(data) - position)
    found = (0, 0)
    here = int.from_bytes(data[position : position + limit], "little")
    oldest = max(position - WINDOW, 0)
    for _ in range(CHAIN):
        if candidate < oldest or beat >= limit:
            break
        if data[candidate + beat] == data[position + beat]:
            differ = here ^ int.from_bytes(data[candidate : candidate + limit], "little")
            length = ((differ & -differ).bit_length() - 1) >> 3 if differ else limit
            if length > beat:
                beat, found = length, (length, position - candidate)
                if length >= GOOD_MATCH:
                    break
        candidate = chain[candidate]
    # Three bytes from far away cost more than three literals.
    return (0, 0) if found[0] == 3 and found[1] > 4096 else found


def tokens(data: bytes) -> Iterator[Token]:
    """`data` as literals and matches. A match is put off by one byte while the next position has a longer one."""
    newest: Dict[bytes, int] = {}
    chain = [-1] * len(data)

    def enter(position: int) -> int:
        key = data[position : position + 3]
        candidate = chain[position] = newest.get(key, -1)
        newest[key] = position
        return candidate

    position, last = 0, len(data) - 3
    pending: Token = (0, 0)  # the match that starts one byte before `position`
    while position < len(data):
        candidate = enter(position) if position <= last else -1
        better = (0, 0)
        if candidate >= 0 and pending[0] < GOOD_MATCH:
            better = longest_match(data, position, candidate, chain, max(pending[0], 2))
        if pending[0] and not better[0]:
            yield pending
            stop = position - 1 + pending[0]
            for inside in range(position + 1, min(stop, last + 1)):
                enter(inside)
            position, pending = stop, (0, 0)
            continue
        if pending[0] or not better[0]:
            # The byte that the put-off match began with, or a byte that no match begins with.
            yield (data[position - 1] if pending[0] else data[position], 0)
        pending = better
        position += 1
    if pending[0]:
        yield pending


def code_lengths(counts: Sequence[int], limit: int) -> List[int]:
    """Lengths of a Huffman code for symbols that occur `counts` times, none above `limit` bits.

    >>> code_lengths([5, 0, 1, 2], 15)
    [1, 0, 2, 2]
    """
    while True:
        lengths = [0] * len(counts)
        heap = [(count, symbol, [symbol]) for symbol, count in enumerate(counts) if count]
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            (count, tie, symbols), (other_count, _, other) = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in symbols + other:
                lengths[symbol] += 1
            heapq.heappush(heap, (count + other_count, tie, symbols + other))
        if max(lengths) <= limit:
            return lengths
        counts = [(count + 1) // 2 for count in counts]  # flatter counts make a flatter tree


def canonical_code(lengths: Sequence[int]) -> List[Tuple[int, int]]:
    """(bits, number of bits) of each symbol, the bits reversed as deflate writes them (RFC 1951 §3.2.2)."""
    code, codes = 0, [(0, 0)] * len(lengths)
    for length in range(1, max(lengths) + 1):
        code <<= 1
        for symbol, own in enumerate(lengths):
            if own == length:
                codes[symbol] = (int(f"{code:0{length}b}"[::-1], 2), length)
                code += 1
    return codes


def run_lengths(lengths: Sequence[int]) -> List[Tuple[int, int, int]]:
    """Code lengths as (symbol, extra value, extra bits), with runs as RFC 1951 §3.2.7 writes them."""
    out: List[Tuple[int, int, int]] = []
    for match in re.finditer(rb"(?s)(.)\1*", bytes(lengths)):
        value, left = match[1][0], len(match[0])
        if value:
            out.append((value, 0, 0))
            left -= 1
        while left >= 3:
            if value:
                step, symbol, base, bits = min(left, 6), 16, 3, 2
            elif left > 10:
                step, symbol, base, bits = min(left, 138), 18, 11, 7
            else:
                step, symbol, base, bits = left, 17, 3, 3
            out.append((symbol, step - base, bits))
            left -= step
        out += [(value, 0, 0)] * left
    return out


class BitWriter:
    """Collects bits, the first one lowest (RFC 1951 §3.1.1)."""

    def __init__(self) -> None:
        self._done = bytearray()
        self._bits = 0
        self._count = 0

    def write(self, value: int, count: int) -> None:
        self._bits |= value << self._count
        self._count += count
        if self._count >= 512:
            self._done += (self._bits & ((1 << 512) - 1)).to_bytes(64, "little")
            self._bits >>= 512
            self._count -= 512

    def finish(self) -> bytes:
        """All bytes, the last one filled up with zero bits."""
        return bytes(self._done) + self._bits.to_bytes((self._count + 7) // 8, "little")


def write_block(out: BitWriter, block: Sequence[Token], final: bool) -> None:
    """One block with its own Huffman codes (RFC 1951 §3.2.7)."""
    literal_counts, distance_counts = [0] * 286, [0] * 30
    literal_counts[256] = 1
    for value, distance in block:
        literal_counts[257 + LENGTH_CODE[value] if distance else value] += 1
        if distance:
            distance_counts[distance_code(distance)] += 1
    literals = code_lengths(literal_counts, 15)
    distances = code_lengths(distance_counts, 15) if any(distance_counts) else [1] + [0] * 29
    write_code_tables(out, literals, distances, final)
    literal_codes, distance_codes = canonical_code(literals), canonical_code(distances)
    for value, distance in block:
        if not distance:
            out.write(*literal_codes[value])
            continue
        code = LENGTH_CODE[value]
        out.write(*literal_codes[257 + code])
        out.write(value - LENGTHS[code][0], LENGTHS[code][1])
        code = distance_code(distance)
        out.write(*distance_codes[code])
        out.write(distance - DISTANCES[code][0], DISTANCES[code][1])
    out.write(*literal_codes[256])


def write_code_tables(out: BitWriter, literals: Sequence[int], distances: Sequence[int], final: bool) -> None:
    """The header of a block: its two Huffman codes, themselves run-length and Huffman coded."""
    runs = run_lengths([*literals, *distances])
    counts = [0] * 19
    for symbol, _, _ in runs:
        counts[symbol] += 1
    lengths = code_lengths(counts, 7)
    used = max(i for i, symbol in enumerate(CODE_LENGTH_ORDER) if lengths[symbol]) + 1
    out.write(final | 2 << 1, 3)
    out.write(len(literals) - 257, 5)
    out.write(len(distances) - 1, 5)
    out.write(max(used, 4) - 4, 4)
    for symbol in CODE_LENGTH_ORDER[: max(used, 4)]:
        out.write(lengths[symbol], 3)
    codes = canonical_code(lengths)
    for symbol, extra, bits in runs:
        out.write(*codes[symbol])
        out.write(extra, bits)


def deflate(data: bytes) -> bytes:
    """`data` as a raw deflate stream."""
    out = BitWriter()
    stream = list(tokens(data))
    for start in range(0, max(len(stream), 1), BLOCK_TOKENS):
        write_block(out, stream[start : start + BLOCK_TOKENS], start + BLOCK_TOKENS >= len(stream))
    return out.finish()


def inflate(raw: bytes) -> bytes:
    """What a raw deflate stream holds; b"" when it is damaged."""
    try:
        return zlib.decompress(raw, -15)
    except zlib.error:
        return b""


def deflate_all(contents: Sequence[bytes], cache: Path) -> List[bytes]:
    """Deflate on all cores; results are kept by the SHA-256 of content and of this program, and checked when reused."""
    cache.mkdir(parents=True, exist_ok=True)
    recipe = Path(__file__).read_bytes()
    paths = [cache / sha256(recipe + content) for content in contents]
    results = [path.read_bytes() if path.exists() else b"" for path in paths]
    todo = [i for i, content in enumerate(contents) if content and inflate(results[i]) != content]
    with ProcessPoolExecutor() as pool:
        for i, raw in zip(todo, pool.map(deflate, [contents[i] for i in todo])):
            if inflate(raw) != contents[i]:
                raise BuildError("zlib does not give back what was deflated")
            paths[i].write_bytes(raw)
            results[i] = raw
    return results


# ---- zip and seal --------------------------------------------------------------------

PREFIX = "#!/usr/bin/env python3\n# sha256 of all bytes after this line: {}\n"
DOS_TIME, DOS_DATE = 0, 0x21  # 1980-01-01 00:00:00, the first moment that zip knows
MODE = 0o100644


def zip_bytes(entries: Entries, compress: Callable[[Sequence[bytes]], List[bytes]], start: int) -> bytes:
    """A zip file of `entries` whose first byte lies at offset `start` of the whole (PKWARE APPNOTE 6.3.x §4.3)."""
    body, directory = bytearray(), bytearray()
    packed = compress(list(entries.values()))
    for (name, content), raw in zip(entries.items(), packed):
        method, raw = (8, raw) if raw and len(raw) < len(content) else (0, content)
        sizes = (zlib.crc32(content), len(raw), len(content), len(name), 0)
        fields = struct.pack("<HHHHHIIIHH", 20, 0, method, DOS_TIME, DOS_DATE, *sizes)
        made_by = 3 << 8 | 20  # Unix, so that the modes below count
        directory += b"PK\x01\x02" + struct.pack("<H", made_by) + fields
        directory += struct.pack("<HHHII", 0, 0, 0, MODE << 16, start + len(body)) + name.encode("ascii")
        body += b"PK\x03\x04" + fields + name.encode("ascii") + raw
    counts = (0, 0, len(entries), len(entries), len(directory), start + len(body), 0)
    return bytes(body + directory) + b"PK\x05\x06" + struct.pack("<HHHHIIH", *counts)


def sealed(entries: Entries, cache: Path) -> bytes:
    """The whole pyz: shebang, seal, zip."""
    start = len(PREFIX.format("0" * 64))
    archive = zip_bytes(entries, lambda contents: deflate_all(contents, cache), start)
    return PREFIX.format(sha256(archive)).encode("ascii") + archive


def build(output: Path, cache: Path) -> None:
    """Write the pyz. It appears complete or not at all."""
    requirements = parse_lock((ROOT / "vendor.lock").read_text(encoding="ascii"))
    wheels = get_wheels(requirements, cache / "wheels")
    pyz = sealed(collect(wheels.values()), cache / "deflate")
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
