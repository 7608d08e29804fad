"""A second reader of what hfship writes, made from docs/formats.md alone; it shares no line with hfship.

    python3 -I second_reader.py OUT [--base DIR] FILE...     restores a model; FILEs are the parts, in their order

For tests: it holds a whole archive in memory. What it refuses raises Refused.
"""

import argparse
import base64
import hashlib
import json
import re
import struct
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import zstandard

MIB = 1 << 20
WEIGHT = MIB
LARGEST_CONTENT = 64 * MIB
RESTORE_PY = {
    "4e118ed493fe932ac7ff1144302c393c816bf56b900c101f08cf8e0fb783aa01": 2 * MIB,
    "0582a4ea0294b7723f58d5cebc5b19f3a1b88baa1ceef8e0b75eb3e95889678b": 2 * MIB,
    "6f128e60fb249187ba650a865119c6f2974e0bd05e55f28f479d26d5669c7241": 4 * MIB,
}
Range = Tuple[int, int]


class Refused(Exception):
    """What the page says must be refused."""


def require(condition: Any, why: str) -> None:
    if not condition:
        raise Refused(why)


# -- manifest


def check_path(path: str) -> None:
    require(isinstance(path, str), "a path is text")
    segments = path.split("/")
    require(not {"", ".", ".."} & {*segments}, f"segments of {path!r}")
    require(
        "\\" not in path and not any(c < " " or c == "\x7f" for c in path),
        f"characters of {path!r}",
    )
    require(not re.match("[A-Za-z]:", path), f"drive in {path!r}")
    require(not any("\ud800" <= c <= "\udfff" for c in path), f"surrogate in {path!r}")
    require(all(len(segment.encode()) <= 255 for segment in segments), f"long segment in {path!r}")
    never = {".hfship", ".git", ".hg", ".svn", ".ssh", "git~1"}
    names = {segment.casefold().rstrip(". ") for segment in segments}
    require(not names & never, f"{path!r} is never content")
    require(len(path) <= 4000 and len(segments) <= 100, f"{path[:99]!r} is too long")


def check_source(source: Dict[str, Any]) -> None:
    must = {"endpoint", "repo", "revision", "resolved_repo", "commit"}
    may = {"license", "gated", "fetched_at", "repo_type"}
    require(must <= {*source} <= must | may, f"fields of the source: {sorted(source)}")
    for key, value in source.items():
        if not (
            (key == "license" and value is None) or (key == "gated" and isinstance(value, bool))
        ):
            require(
                isinstance(value, str) and all(map(is_printable, value)), f"{key} of the source"
            )
    repo = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"
    if source.get("repo_type") == "image":
        require(re.fullmatch("[0-9a-f]{64}", source["commit"]), "digest of the source")
        return
    for key in ("repo", "resolved_repo"):
        require(re.fullmatch(repo, source[key]) and ".." not in source[key], f"{key} of the source")
    require(re.fullmatch("[0-9a-f]{40}", source["commit"]), "commit of the source")
    require(
        source.get("repo_type", "model") in ("model", "dataset", "space"), "repo_type of the source"
    )


def is_printable(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] not in "CZ"


def read_manifest(text: bytes) -> Dict[str, Any]:
    """A manifest whose files are in canonical order."""
    try:
        manifest = json.loads(text)
        require(manifest["format"] == "hfship-manifest/1", "format")
        require(re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,95}", manifest["name"]), "name")
        for entry in manifest["files"]:
            check_path(entry["path"])
            require(re.fullmatch("[0-9a-f]{64}", entry["sha256"]), "sha256")
            require(type(entry["size"]) is int and entry["size"] >= 0, "size")
        if manifest.get("source") is not None:
            check_source(manifest["source"])
        require(manifest.get("kind", "model") in ("model", "image"), "kind")
        if manifest.get("kind") == "image":
            image = manifest["image"]
            digests = [image[key] for key in ("digest", "manifest_digest", "config_digest")]
            require(1 <= len(image["diff_ids"]) <= 1000, "number of layers")
            for one in (*digests, *image["diff_ids"]):
                require(re.fullmatch("sha256:[0-9a-f]{64}", one), "digest")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Refused(f"no manifest: {exc!r}") from exc
    paths = [entry["path"] for entry in manifest["files"]]
    folders = {path[:at] for path in paths for at, character in enumerate(path) if character == "/"}
    require(len({*paths}) == len(paths) and not folders & {*paths}, "two paths that cannot both be")
    left_out = manifest.get("left_out", 0)
    require(type(left_out) is int and left_out >= 0, "left_out")
    manifest["files"].sort(key=lambda entry: entry["path"].encode())
    return manifest


def write_manifest(manifest: Dict[str, Any]) -> bytes:
    """The bytes that a writer makes of it."""
    return (json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


# -- units and tables


class Unit(NamedTuple):
    """Where a unit lies in the archive, its content in the tar stream, and its CRC-32, if a table tells."""

    offset: int
    size: int
    start: int
    length: int
    crc: Optional[int]


class Tables(NamedTuple):
    units: List[Unit]
    parts: Tuple[int, ...]
    entries: List[Tuple[int, int]]


def content_size(frame: bytes) -> int:
    """The content size that a zstd frame declares (RFC 8878, 3.1.1.1)."""
    require(frame[:4] == b"\x28\xb5\x2f\xfd" and len(frame) > 5, "no zstd frame")
    descriptor = frame[4]
    single = descriptor >> 5 & 1
    at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[descriptor >> 6]
    require(width, "a frame that does not tell its content size")
    return int.from_bytes(frame[at : at + width], "little") + (256 if width == 2 else 0)


def decode_unit(data: bytes, length: Optional[int] = None) -> bytes:
    """The content of a unit, which is all of `data`."""
    require(len(data) > 12, "a unit is cut")
    magic, four, size = struct.unpack("<III", data[:12])
    require((magic, four, size) == (0x184D2A50, 4, len(data) - 12), "the header of a unit")
    declared = content_size(data[12:])
    require(
        length in (None, declared) and 0 < declared <= LARGEST_CONTENT,
        f"a frame declares {declared} bytes",
    )
    require(len(data) <= 12 + declared + declared // 256 + 128, "a unit is too large")
    decoder = zstandard.ZstdDecompressor().decompressobj()
    try:
        content = decoder.decompress(data[12:])
    except zstandard.ZstdError as exc:
        raise Refused(str(exc)) from exc
    require(
        decoder.eof and not decoder.unused_data and len(content) == declared,
        "not exactly one frame",
    )
    return content


def walk(data: bytes) -> Tuple[List[Unit], int]:
    """The units from the front, without the tables; and where what is none begins."""
    units, at, start = [], 0, 0
    while data[at : at + 4] == struct.pack("<I", 0x184D2A50):
        require(len(data) >= at + 12, "a unit is cut")
        size = 12 + struct.unpack_from("<I", data, at + 8)[0]
        content = decode_unit(data[at : at + size])
        units.append(Unit(at, size, start, len(content), None))
        at, start = at + size, start + len(content)
    return units, at


def read_tables(part: bytes) -> Tables:
    """The tables at the end of the last part."""
    require(len(part) >= 17, "too short for tables")
    check_size, zero, count, descriptor, magic = struct.unpack("<IIIBI", part[-17:])
    require(magic == 0x8F92EAB1 and descriptor == 0 and count % 2 and zero == 0, "no seek table")
    table_size = 8 + 8 * count + 9
    require(
        check_size >= 56 and check_size + table_size <= len(part),
        "the tables are larger than the part",
    )
    table = part[len(part) - table_size :]
    check = part[len(part) - table_size - check_size : len(part) - table_size]
    require(hashlib.sha256(check[:-32] + table).digest() == check[-32:], "SHA-256 of the tables")
    magic, length, label, units, parts = struct.unpack("<II8sII", check[:24])
    require(
        (magic, length, label) == (0x184D2A55, 48 + 8 * parts + 4 * units, b"hfship/1"),
        "check frame",
    )
    require(length + 8 == check_size and count == 2 * units + 1, "sizes of the tables")
    require(
        struct.unpack("<II", table[:8]) == (0x184D2A5E, 8 * count + 9), "head of the seek table"
    )
    sizes = struct.unpack_from(f"<{parts}Q", check, 24)
    crcs = struct.unpack_from(f"<{units}I", check, 24 + 8 * parts)
    entries = [struct.unpack_from("<II", table, 8 + 8 * number) for number in range(count)]
    found, offset, start = [], 0, 0
    for header, (frame, length), crc in zip(entries[::2], entries[1::2], crcs):
        require(header == (12, 0), "entry of a header")
        require(
            0 < length <= LARGEST_CONTENT and frame <= length + length // 256 + 128,
            "entry of a frame",
        )
        found.append(Unit(offset, frame + 12, start, length, crc))
        offset, start = offset + frame + 12, start + length
    require(sum(sizes) == offset + check_size + table_size, "bytes of all parts")
    return Tables(found, sizes, entries)


def read_stream(parts: Sequence[bytes]) -> Tuple[Tables, List[bytes]]:
    """The tables of an archive, and the content of every unit."""
    tables = read_tables(parts[-1])
    require(
        tuple(map(len, parts)) == tables.parts, f"parts of {[len(part) for part in parts]} bytes"
    )
    edges = [0]
    for size in tables.parts:
        edges.append(edges[-1] + size)
    contents, data = [], b"".join(parts)
    for unit in tables.units:
        stop = unit.offset + unit.size
        require(not any(unit.offset < edge < stop for edge in edges), "a unit lies in two parts")
        require(zlib.crc32(data[unit.offset : stop]) == unit.crc, "CRC-32 of a unit")
        contents.append(decode_unit(data[unit.offset : stop], unit.length))
    return tables, contents


# -- tar stream


def ustar(name: bytes, size: int, kind: bytes) -> bytes:
    def block(total: bytes) -> bytes:
        fields = [
            name.ljust(100, b"\0"),
            b"0000644\0",
            b"0000000\0",
            b"0000000\0",
            b"%011o\0" % size,
        ]
        fields += [b"00000000000\0", total, kind, bytes(100), b"ustar\0" + b"00", bytes(64)]
        return b"".join([*fields, b"0000000\0", b"0000000\0", bytes(167)])

    return block(b"%06o\0 " % sum(block(b" " * 8)))


def pax_record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
    return str(length).encode() + rest


def pad(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax_records(path: str, size: int) -> bytes:
    long = len(path.encode()) > 100 or not path.isascii()
    large = size >= 8**11
    return (pax_record("path", path) if long else b"") + (
        pax_record("size", str(size)) if large else b""
    )


def tar_header(path: str, size: int) -> bytes:
    records = pax_records(path, size)
    before = ustar(b"././@PaxHeader", len(records), b"x") + pad(records) if records else b""
    name = "".join(c if c.isascii() else "?" for c in path[:100]).encode()
    return before + ustar(name, size if size < 8**11 else 0, b"0")


def first_member(stream: bytes) -> bytes:
    """The content of the first member, whose name is not known yet."""
    at = 0
    for _ in range(2):
        block = stream[at : at + 512]
        require(
            len(block) == 512 and block[257:262] == b"ustar" and block[156:157] in b"0x",
            "no tar header",
        )
        size = int(block[124:135], 8)
        at += 512
        if block[156:157] == b"0":
            require(at + size <= min(len(stream), LARGEST_CONTENT), "a manifest without end")
            return stream[at : at + size]
        at += size + -size % 512
    raise Refused("two PAX headers")


class Member(NamedTuple):
    """A file of the model in the tar stream; B if its bytes are in planes, else 0."""

    entry: Dict[str, Any]
    start: int
    stop: int
    planes: int


class Layout(NamedTuple):
    manifest: Dict[str, Any]
    text: bytes
    planes: int
    absent: List[str]
    members: List[Member]


def read_layout(stream: bytes) -> Layout:
    """What lies where in a tar stream, all of whose bytes but those of the files are checked."""
    text = first_member(stream)
    manifest = read_manifest(text)
    name, at, leading = manifest["name"], 0, {}
    for path in ("manifest.json", "restore.py", "delta.json"):
        # A member is known by its header, which tells its size: in a ustar block, here never a PAX header for `size`.
        prefix = len(tar_header(f"{name}/.hfship/{path}", 0)) - 512
        digits = stream[at + prefix + 124 : at + prefix + 135]
        size = int(digits, 8) if re.fullmatch(b"[0-7]{11}", digits) else 0
        header = tar_header(f"{name}/.hfship/{path}", size)
        if stream[at : at + len(header)] == header:
            start = at + len(header)
            leading[path] = stream[start : start + size]
            at = start + size + -size % 512
            require(start + size <= LARGEST_CONTENT, f"{path} ends too late")
    require(leading.get("manifest.json") == text, "the first member is not the manifest")
    planes = 0
    if "restore.py" in leading:
        planes = RESTORE_PY.get(hashlib.sha256(leading["restore.py"]).hexdigest(), 0)
        require(planes, "an unknown restore.py")
    absent = read_delta(leading["delta.json"], manifest) if "delta.json" in leading else []
    pieces = [
        pad(tar_header(f"{name}/.hfship/{path}", len(content)) + content)
        for path, content in leading.items()
    ]
    return Layout(
        manifest, text, planes, absent, _members(stream, manifest, planes, absent, b"".join(pieces))
    )


def _members(
    stream: bytes, manifest: Dict[str, Any], planes: int, absent: Sequence[str], leading: bytes
) -> List[Member]:
    members, at = [], len(leading)
    require(stream[:at] == leading, "the leading members")
    for large in (False, True):
        for entry in manifest["files"]:
            if (entry["size"] >= WEIGHT) != large or entry["path"] in absent:
                continue
            block = planes if large else 0
            size = entry["size"] + (-(-entry["size"] // block) if block else 0)
            header = tar_header(
                f"{manifest['name']}/{entry['path']}" + (".planes" if block else ""), size
            )
            require(stream[at : at + len(header)] == header, f"the header of {entry['path']}")
            start = at + len(header)
            at = start + size + -size % 512
            require(not any(stream[start + size : at]), f"padding of {entry['path']}")
            members.append(Member(entry, start, start + size, block))
    require(stream[at:] == bytes(1024), "the end of the tar stream")
    return members


def read_delta(text: bytes, manifest: Dict[str, Any]) -> List[str]:
    try:
        found = json.loads(text)
        absent = found["absent"]
        absent.sort(key=lambda path: path.encode())
        fields = {"format": "hfship-delta/1", "absent": absent}
        if found["format"] == "hfship-delta/2":
            fields = {"format": "hfship-delta/2", "base": found["base"], "absent": absent}
            require(re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", found["base"]), "a base")
        same = json.dumps(fields, ensure_ascii=False) + "\n"
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Refused(f"no delta: {exc!r}") from exc
    require(text == same.encode(), "a delta in another form")
    require({*absent} <= {entry["path"] for entry in manifest["files"]}, "a delta of other files")
    return absent


def join_planes(block: bytes) -> bytes:
    """The bytes of the file in one block."""
    width, size = block[-1], len(block) - 1
    require(width in (1, 2, 4), f"elements of {width} bytes")
    count = size // width
    found = bytearray(block[:size])
    for number in range(width):
        found[width - 1 - number : count * width : width] = block[number * count :][:count]
    return bytes(found)


# -- a whole archive


class Model(NamedTuple):
    """What an archive brings: `files` are proven; `layout.absent` are to be taken from elsewhere."""

    tables: Tables
    layout: Layout
    files: Dict[str, bytes]


def read_archive(paths: Sequence[Path]) -> Model:
    """Read an archive, whose parts are `paths` in their order, and prove all of it."""
    tables, contents = read_stream([path.read_bytes() for path in paths])
    stream = b"".join(contents)
    layout, files = read_layout(stream), {}
    for member in layout.members:
        content = stream[member.start : member.stop]
        if member.planes:
            content = b"".join(map(join_planes, _blocks(member, tables.units, contents)))
        digest = hashlib.sha256(content).hexdigest()
        require(digest == member.entry["sha256"], f"SHA-256 of {member.entry['path']}")
        files[member.entry["path"]] = content
    return Model(tables, layout, files)


def _blocks(member: Member, units: Sequence[Unit], contents: Sequence[bytes]) -> List[bytes]:
    found, at = [], member.start
    for unit, content in zip(units, contents):
        if unit.start < member.stop and unit.start + unit.length > member.start:
            expected = min(member.planes + 1, member.stop - at)
            require(
                (unit.start, unit.length) == (at, expected),
                f"a unit of {member.entry['path']} is no block",
            )
            found.append(content)
            at += expected
    return found


def restore(model: Model, folder: Path, base: Optional[Path] = None) -> None:
    """Write a model into `folder`, taking what a delta leaves out from the model in `base`."""
    wanted = {entry["path"]: entry["sha256"] for entry in model.layout.manifest["files"]}
    files = dict(model.files)
    if model.layout.absent:
        there = base.rglob("*") if base else ()
        known = {
            hashlib.sha256(path.read_bytes()).hexdigest(): path for path in there if path.is_file()
        }
        for path in model.layout.absent:
            require(wanted[path] in known, f"{path} is nowhere")
            files[path] = known[wanted[path]].read_bytes()
    files[".hfship/manifest.json"] = model.layout.text
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def read_sums(text: str) -> List[Tuple[str, str]]:
    """(SHA-256, file name) of each line of NAME.tar.zst.sha256."""
    rows = [re.fullmatch("([0-9a-f]{64}) [ *]([^/]+)", line) for line in text.splitlines()]
    require(all(rows), "a line of the sums")
    return [(row[1], row[2]) for row in rows if row]


def read_custody(
    text: bytes, manifest: str = "", heads: Sequence[str] = ()
) -> List[Dict[str, Any]]:
    """The lines of a log of custody beside what has this manifest (SHA-256), over which signatures with `custody` = `heads` lie."""
    require(not text or text.endswith(b"\n"), "the last line is cut")
    known = []
    lines: List[Dict[str, Any]] = []
    previous = "0" * 64
    for number, row in enumerate(text.split(b"\n")[:-1], 1):
        try:
            line = json.loads(row)
        except ValueError as exc:
            raise Refused(f"line {number}") from exc
        require(isinstance(line, dict) and isinstance(line.get("details"), dict), f"line {number}")
        texts = ("at", "event", "host", "key", "manifest", "model", "previous", "user")
        require(all(isinstance(line.get(key), str) for key in texts), f"texts of line {number}")
        require(line.get("n") == number and line["previous"] == previous, f"chain at {number}")
        require("broken" not in line, f"line {number} tells of a break")
        previous = hashlib.sha256(row + b"\n").hexdigest()
        known.append(previous)
        lines.append(line)
    require(not lines or manifest in ("", lines[-1]["manifest"]), "of another manifest")
    require(set(heads) <= {*known}, "a signature was made over another log")
    return lines


def read_role(name: str, archive: str, bundle: bytes) -> Tuple[str, str, bytes, bytes]:
    """(role, SHA-256 of the last line of the log at that time, what is signed, signature in DER) of a role's bundle."""
    value = json.loads(bundle)
    named = re.fullmatch(re.escape(archive) + r"\.([a-z][a-z0-9_]*)-([0-9a-f]{8})\.sig", name)
    require(named, "the name of a role's bundle")
    hint = value["verificationMaterial"]["publicKey"]["hint"]
    payload = base64.b64decode(value["dsseEnvelope"]["payload"], validate=True)
    predicate = json.loads(payload)["predicate"]
    require(
        named and named[1] == predicate["role"] and hint.startswith(named[2]), "its role and key"
    )
    signed = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)
    der = base64.b64decode(value["dsseEnvelope"]["signatures"][0]["sig"], validate=True)
    return predicate["role"], predicate.get("custody", ""), signed, der


# -- work under way


def work_path(path: str) -> str:
    """Where, in a model folder, the bytes of PATH lie until they are proven."""
    return f".hfship/partial/{hashlib.sha1(path.encode()).hexdigest()}.part"


def ranges_that_arrived(folder: Path, path: str, size: int, etag: str, boot_id: str) -> List[Range]:
    """Which ranges of PATH need not be fetched, on a machine with this boot_id."""
    name = hashlib.sha1(path.encode()).hexdigest()
    for suffix in ("now", "json"):
        try:
            state = json.loads((folder / ".hfship/partial" / f"{name}.{suffix}").read_bytes())
            told = [state[key] for key in ("format", "path", "size", "etag")]
            same_boot = state["boot_id"] == boot_id != ""
            whole = (folder / work_path(path)).stat().st_size == size
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (
            told == ["hfship-partial/1", path, size, etag]
            and whole
            and (same_boot or suffix == "json")
        ):
            ranges = state["written" if same_boot else "synced"]
            return sorted((max(0, start), min(stop, size)) for start, stop in ranges)
    return []


def proven_files(folder: Path) -> Dict[str, Dict[str, Any]]:
    """The lines of verified.jsonl that hold for the files as they are now."""
    lines: Dict[str, Dict[str, Any]] = {}
    for line in (folder / ".hfship/verified.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
            lines[record["path"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    found = {}
    for path, record in lines.items():
        try:
            status = (folder / path).lstat()
        except OSError:
            continue
        names = {"device": "st_dev", "inode": "st_ino", "size": "st_size"}
        names.update(mtime_ns="st_mtime_ns", ctime_ns="st_ctime_ns")
        if all(record[field] == getattr(status, name) for field, name in names.items()):
            found[path] = record
    return found


def marks_of(content: bytes) -> List[str]:
    stops = range(8 * MIB, len(content) + 1, 8 * MIB)
    return [hashlib.sha256(content[:stop]).hexdigest()[:16] for stop in stops]


def parts_that_are_complete(listing: Path) -> List[Path]:
    """The files of the parts with which the run after a killed pack goes on."""
    plan, *lines = listing.read_text().splitlines()
    require(re.fullmatch("[0-9a-f]{64}", plan), "the first line names no plan")
    found: Dict[int, Path] = {}
    for line in lines:
        try:
            first, count, path, size, sha256 = json.loads(line)
            content = Path(path).read_bytes()
            units, stop = walk(content)
        except (ValueError, TypeError, OSError, Refused):
            continue
        digest = hashlib.sha256(content).hexdigest()
        if (len(units), len(content), digest) == (count, size, sha256) and stop <= size:
            found[first] = Path(path)
    return [found[first] for first in sorted(found)]


def bytes_that_are_there(folder: Path, manifest: Dict[str, Any]) -> Dict[str, int]:
    """How much of each weight a killed unpack left in NAME~incomplete."""
    wanted = {(entry["path"], entry["sha256"]): entry["size"] for entry in manifest["files"]}
    found = {}
    for line in (folder / ".hfship/journal").read_text().splitlines():
        try:
            path, sha256, size = json.loads(line)
            unfinished = folder / work_path(path)
            whole = wanted[path, sha256]
            if not unfinished.is_symlink() and 0 < size <= whole == unfinished.stat().st_size:
                found[path] = size
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


# -- deployments and jobs


def read_plan(text: str, defaults: Dict[str, Any]) -> Dict[str, Any]:
    """A plan, with the values of the page for fields that are missing."""
    try:
        value = json.loads(text)
        require(value["format"] == "hfship-plan/1" and value["name"], "format or name")
    except (ValueError, KeyError, TypeError) as exc:
        raise Refused(f"no plan: {exc!r}") from exc
    for key, default in defaults.items():
        found = value.get(key, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        require(isinstance(found, kinds), f"{key} of the plan is {found!r}")
        require(not isinstance(found, (int, float)) or abs(found) < 1e18, f"{key} of the plan")
    known = ("format", "name", *defaults)
    return {key: value.get(key, defaults.get(key)) for key in known}


def read_env(text: str) -> Dict[str, str]:
    """The variables of a .env."""
    head, *lines = text.splitlines()
    require(head.startswith("#"), "the first line is a comment")
    found = {}
    for line in lines:
        name, _, value = line.partition("=")
        if value[:1] == "'":
            value = value[1:-1]
        elif value[:1] == '"':
            value = re.sub(r'\\(["\\$])', r"\1", value[1:-1])
        found[name] = value
    return found


def read_job(path: Path) -> Dict[str, Any]:
    require(not path.is_symlink(), "a record that is a link")
    with path.open("rb") as stream:
        record = json.loads(stream.read(MIB))
    require(record["format"] == "hfship-job/1", "format")
    require(
        record["name"] == path.stem and re.fullmatch("[A-Za-z0-9._+-]+", path.stem),
        "the name of a job",
    )
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description="Restores a model that hfship packed.")
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    try:
        model = read_archive(args.files)
        restore(model, args.out / model.layout.manifest["name"], args.base)
    except Refused as exc:
        print(f"refused: {exc}", file=sys.stderr)
        return 6
    return 0


if __name__ == "__main__":
    sys.exit(main())
