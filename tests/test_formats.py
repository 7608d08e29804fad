"""docs/formats.md: a second reader, made from that page alone, reads what hfship writes; so the page is right.

Where something must be refused, hfship and the second reader agree, too. Nothing here imports hfship.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest
import zstandard

from conftest import ROOT, Program, missing
from support import second_reader as reader
from support.hub import FaultHub

PAGE = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
BOOT = Path("/proc/sys/kernel/random/boot_id")
MIB = 1 << 20
Files = Dict[str, bytes]


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def weights(width: int, count: int) -> bytes:
    """Elements that differ in all bytes but the last, as floats do in little-endian order."""
    content = bytearray(noise(width * count, width))
    content[width - 1 :: width] = bytes([0x3C]) * count
    return bytes(content)


FILES: Files = {
    "config.json": b'{"model_type": "tiny"}',
    "empty": b"",
    "na\u00efve \u6587.txt": b"not ASCII",
    "sub/" + "x" * 120 + ".txt": b"more than 100 bytes",
    "sub/b.bin": noise(700),
    "edge/weight.bin": noise(MIB),
    "edge/under.bin": noise(MIB - 1),
    "w1.dat": weights(2, 5 * MIB // 2) + b"!",
    "w2.dat": weights(4, MIB // 2),
    "w3.dat": bytes(2 * MIB + 3),
}


def make_model(folder: Path, files: Files) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def files_of(folder: Path) -> Files:
    """All files of a restored model but the manifest."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {path: content for path, content in found.items() if not path.startswith(".hfship/")}


def parts_in(folder: Path) -> List[Path]:
    whole = [path for path in folder.iterdir() if path.name.endswith(".tar.zst")]
    return whole or sorted(
        path for path in folder.iterdir() if re.search(r"\.tar\.zst\.[0-9]+$", path.name)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("formats") / "m", FILES)


# -- what the page shows


def example(name: str) -> str:
    """The block of the page with that name."""
    found = re.findall(rf"^```[a-z]+ {name}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, name
    return str(found[0])


def dumped(text: str) -> bytes:
    """The bytes of a hex dump; with offsets, * stands for lines of zeros."""
    content = b""
    for line in text.splitlines():
        offset, colon, digits = line.rpartition(":")
        if line != "*":
            content = content.ljust(int(offset, 16) if colon else 0, b"\0") + bytes.fromhex(digits)
    return content


def table(heading: str) -> List[List[str]]:
    """The rows of the first table below a heading of the page."""
    text = PAGE.split(f"\n{heading}\n")[1]
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_every_format_is_on_a_page() -> None:
    pages = PAGE + (ROOT / "docs/json.md").read_text(encoding="utf-8")
    named = {
        name
        for path in (ROOT / "src/hfship").rglob("*.py")
        for name in re.findall(r'"(hfship-[a-z-]+/[0-9]+)"', path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert sorted(name for name in named if name not in pages) == []


def test_examples_of_units_planes_headers_and_delta() -> None:
    assert reader.decode_unit(dumped(example("unit"))) == b"abc"
    assert reader.join_planes(dumped(example("planes"))) == b"a1b2c"
    header = dumped(example("ustar"))
    assert header == reader.tar_header("m/a", 5) and len(header) == 512
    found = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    assert (found.name, found.size, found.mode, found.type, found.mtime) == (
        "m/a",
        5,
        0o644,
        b"0",
        0,
    )
    assert example("pax").encode() == reader.pax_records("m/\u00e9", 9 << 30)
    listed = {"files": [{"path": "w1.safetensors"}, {"path": "sub/b.bin"}, {"path": "a"}]}
    assert reader.read_delta(example("delta").encode(), listed) == ["sub/b.bin", "w1.safetensors"]


@pytest.mark.parametrize("size", [0, 77, 8**11 - 1, 8**11, 9 << 30])
@pytest.mark.parametrize(
    "path", ["m/a", "m/" + "x" * 98, "m/" + "x" * 99, "m/\u00e9", "m/" + "\u6587" * 60]
)
def test_headers_are_what_another_program_reads(path: str, size: int) -> None:
    stream = reader.tar_header(path, size)
    found = tarfile.TarInfo.frombuf(stream[-512:], "utf-8", "strict")
    records = dict(
        re.findall(r"[0-9]+ (path|size)=(.*)\n", reader.pax_records(path, size).decode())
    )
    assert (records.get("path", found.name), int(records.get("size", found.size))) == (path, size)
    assert len(stream) == (1536 if records else 512)


def test_the_whole_archive_of_the_page(hfship: Program, tmp_path: Path) -> None:
    """The dump is read by the second reader, and verified and unpacked by hfship; the text below it is true."""
    path = tmp_path / "m.tar.zst"
    path.write_bytes(dumped(example("archive")))
    model = reader.read_archive([path])
    assert model.files == {"a": b"abc\n"} and model.layout.text.decode() in PAGE
    ((offset, size, start, length, crc),) = model.tables.units
    assert (offset, size, start, length, crc) == (0, 12 + 276, 0, 3072, 0xA5353CDA)
    assert model.tables.parts == (397,) and model.tables.entries == [(12, 0), (276, 3072), (68, 0)]
    hfship("verify", path)
    hfship("unpack", path, "-o", tmp_path / "out")
    assert files_of(tmp_path / "out/m") == model.files
    assert (tmp_path / "out/m/.hfship/manifest.json").read_bytes() == model.layout.text


# -- what hfship packs

FORMS: Dict[str, List[str]] = {
    "whole": [],
    "stored": ["--profile", "store"],
    "parts": ["--split", "2500000"],
    "planes": ["--profile", "smallest"],
    "planes in parts": ["--profile", "smallest", "--split", "2500000"],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_second_reader_restores_every_byte(
    form: str, hfship: Program, source: Path, tmp_path: Path
) -> None:
    hfship("pack", source, "-o", tmp_path / "out", *FORMS[form])
    paths = parts_in(tmp_path / "out")
    assert ("parts" in form) == (len(paths) > 1) and all(
        path.name.startswith("m.tar.zst") for path in paths
    )
    model = reader.read_archive(paths)
    assert model.files == FILES and bool(model.layout.planes) == ("planes" in form)
    assert model.layout.text == (source / ".hfship/manifest.json").read_bytes()
    assert reader.write_manifest(model.layout.manifest) == model.layout.text
    order = [member.entry["path"] for member in model.layout.members]
    small = sorted((path for path in FILES if len(FILES[path]) < MIB), key=str.encode)
    assert order == small + sorted(
        (path for path in FILES if len(FILES[path]) >= MIB), key=str.encode
    )
    sums = [(hashlib.sha256(path.read_bytes()).hexdigest(), path.name) for path in paths]
    assert reader.read_sums((tmp_path / "out/m.tar.zst.sha256").read_text()) == sums
    reader.restore(model, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == FILES


def test_the_seek_table_leads_to_every_byte(hfship: Program, source: Path, tmp_path: Path) -> None:
    """Each unit alone is what lies at its place of the stream, which other programs see as one."""
    hfship("pack", source, "-o", tmp_path)
    content = (tmp_path / "m.tar.zst").read_bytes()
    tables = reader.read_tables(content)
    stream = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True).read()
    for unit in tables.units:
        piece = reader.decode_unit(content[unit.offset : unit.offset + unit.size], unit.length)
        assert stream[unit.start : unit.start + unit.length] == piece
    assert sum(unit.length for unit in tables.units) == len(stream)
    walked, end = reader.walk(content)
    assert [unit._replace(crc=None) for unit in tables.units] == walked and end == walked[
        -1
    ].offset + walked[-1].size
    assert sum(size for size, _ in tables.entries[:-1]) == end
    assert sum(length for _, length in tables.entries) == len(stream)


def test_parts_through_a_pipe_end_with_tables_and_sums(
    hfship: Program, source: Path, tmp_path: Path
) -> None:
    """As `cat NAME.tar.zst.*` sends them: without a look at the end, the units are found from the front."""
    hfship("pack", source, "-o", tmp_path / "out", *FORMS["parts"])
    (sums,) = (tmp_path / "out").glob("*.sha256")
    archive = b"".join(path.read_bytes() for path in parts_in(tmp_path / "out"))
    (tmp_path / "sent").write_bytes(archive + sums.read_bytes())
    with (tmp_path / "sent").open("rb") as stream:
        hfship("verify", "-", stdin=stream)
    units, end = reader.walk((tmp_path / "sent").read_bytes())
    assert len(units) == len(reader.read_tables(archive).units)
    assert reader.read_sums(
        (tmp_path / "sent").read_bytes()[len(archive) :].decode()
    ) and end < len(archive)


def test_planes_of_all_widths_are_each_one_unit(
    hfship: Program, source: Path, tmp_path: Path
) -> None:
    hfship("pack", source, "-o", tmp_path, "--profile", "smallest")
    paths = parts_in(tmp_path)
    model = reader.read_archive(paths)
    _, contents = reader.read_stream([path.read_bytes() for path in paths])
    widths = {}
    for member in model.layout.members:
        held = [
            (u, c)
            for u, c in zip(model.tables.units, contents)
            if member.start <= u.start < member.stop
        ]
        if member.planes:
            widths[member.entry["path"]] = [content[-1] for _, content in held]
            assert [unit.length for unit, _ in held[:-1]] == [2 * MIB + 1] * (len(held) - 1)
    assert {path: {*found} for path, found in widths.items() if path in ("w1.dat", "w2.dat")} == {
        "w1.dat": {2},
        "w2.dat": {4},
    }
    assert {1, 2, 4} == {width for found in widths.values() for width in found}


def test_a_last_part_may_hold_the_tables_alone(
    hfship: Program, source: Path, tmp_path: Path
) -> None:
    hfship("pack", source, "-o", tmp_path / "whole", *FORMS["stored"])
    units = reader.read_tables((tmp_path / "whole/m.tar.zst").read_bytes()).units
    full = units[-1].offset + units[-1].size
    hfship("pack", source, "-o", tmp_path / "out", *FORMS["stored"], "--split", str(full))
    paths = parts_in(tmp_path / "out")
    assert [path.name for path in paths] == ["m.tar.zst.0001", "m.tar.zst.0002"]
    assert reader.walk(paths[0].read_bytes())[1] == full and reader.walk(paths[1].read_bytes()) == (
        [],
        0,
    )
    assert reader.read_archive(paths).files == FILES


def test_a_delta_is_completed_from_the_older_version(
    hfship: Program, source: Path, tmp_path: Path
) -> None:
    newer = {**FILES, "config.json": b"{}", "new.bin": noise(3 * MIB, 9)}
    make_model(tmp_path / "new/m", newer)
    hfship("pack", source, "-o", tmp_path / "old")
    hfship("pack", tmp_path / "new/m", "--since", source, "-o", tmp_path / "out")
    (path,) = parts_in(tmp_path / "out")
    model = reader.read_archive([path])
    assert path.name == "m.delta.tar.zst" and {*model.files} == {"config.json", "new.bin"}
    assert model.layout.absent == sorted({*FILES} - {"config.json"}, key=str.encode)
    with pytest.raises(reader.Refused, match="nowhere"):
        reader.restore(model, tmp_path / "alone")
    reader.restore(model, tmp_path / "restored", base=source)
    assert files_of(tmp_path / "restored") == newer


def test_the_second_reader_needs_no_hfship(hfship: Program, source: Path, tmp_path: Path) -> None:
    """It runs as a program of its own, from a folder without hfship."""
    hfship("pack", source, "-o", tmp_path / "out", *FORMS["planes in parts"])
    script = shutil.copy(reader.__file__, tmp_path / "second_reader.py")
    argv = [sys.executable, "-I", script, tmp_path / "restored", *parts_in(tmp_path / "out")]
    subprocess.run(argv, check=True, cwd=tmp_path)
    assert files_of(tmp_path / "restored/m") == FILES
    assert "hfship" not in re.findall(
        r"^(?:import|from) (\w+)", Path(script).read_text(), re.MULTILINE
    )


def test_what_belongs_to_a_model_folder(hfship: Program, tmp_path: Path) -> None:
    content = {"a": b"1", "sub/b": b"2", ".gitattributes": b"3", "x.incomplete.txt": b"4"}
    others = (".git/c", "sub/.git/c", ".cache/huggingface/download/c.lock", "sub/.hfship/c", ".env")
    make_model(tmp_path / "m", {**content, **dict.fromkeys(others, b"no")})
    (tmp_path / "elsewhere").write_bytes(b"5")
    (tmp_path / "m/link").symlink_to(tmp_path / "elsewhere")
    hf = ".cache/huggingface/download/c.incomplete"
    for name in (hf, ".hfship/partial", ".hfship/verified.jsonl", ".hfship/lease"):
        make_model(tmp_path / "m", {name: b""})
        assert (
            "is not complete yet"
            in hfship("pack", tmp_path / "m", "-o", tmp_path / "out", code=3).stderr
        )
        (tmp_path / "m" / name).unlink()
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out")
    assert reader.read_archive(parts_in(tmp_path / "out")).files == {**content, "link": b"5"}
    make_model(tmp_path / "m", {".cache/huggingface/download/a.metadata": b"1"})  # a note
    hfship("pack", tmp_path / "m", "-o", tmp_path / "again")
    assert (
        parts_in(tmp_path / "again")[0].read_bytes() == parts_in(tmp_path / "out")[0].read_bytes()
    )


# -- a second writer, for what hfship would not write


def unit_of(content: bytes) -> bytes:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    return bytes.fromhex("502a4d18 04000000") + len(frame).to_bytes(4, "little") + frame


def tables_of(units: Sequence[bytes], lengths: Sequence[int], label: bytes = b"hfship/1") -> bytes:
    """Check frame and seek table of a whole file."""
    count = 2 * len(units) + 1
    check_size, table_size = 64 + 4 * len(units), 17 + 8 * count
    total = sum(map(len, units)) + check_size + table_size
    check = [0x184D2A55, check_size - 8, label, len(units), 1, total, *map(zlib.crc32, units)]
    table = [0x184D2A5E, table_size - 8]
    for unit, length in zip(units, lengths):
        table += [12, 0, len(unit) - 12, length]
    table += [check_size, 0, count]

    def packed(values: Sequence[Any]) -> bytes:
        widths = {5: 8} if values is check else {}
        return b"".join(
            value if isinstance(value, bytes) else value.to_bytes(widths.get(number, 4), "little")
            for number, value in enumerate(values)
        )

    tail = packed(table) + b"\0" + bytes.fromhex("b1ea928f")
    return packed(check) + hashlib.sha256(packed(check) + tail).digest() + tail


def manifest_of(files: Files, **more: Any) -> Dict[str, Any]:
    rows = [
        {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in files.items()
    ]
    return {
        "format": "hfship-manifest/1",
        "name": "m",
        "source": None,
        "files": rows,
        "totals": {},
        **more,
    }


Members = List[Tuple[str, bytes]]


def members_of(files: Files, leading: Optional[Files] = None, **more: Any) -> Members:
    """The members of an archive of small files."""
    first = {"manifest.json": json.dumps(manifest_of(files, **more)).encode(), **(leading or {})}
    found = [(f"m/.hfship/{path}", content) for path, content in first.items()]
    return found + [(f"m/{path}", files[path]) for path in sorted(files, key=str.encode)]


def stream_of(members: Members) -> bytes:
    pieces = [
        reader.tar_header(path, len(content)) + reader.pad(content) for path, content in members
    ]
    return b"".join(pieces) + bytes(1024)


def archive_of(stream: bytes, size: int = 1000, **more: Any) -> bytes:
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    units = list(map(unit_of, pieces))
    return b"".join(units) + tables_of(units, list(map(len, pieces)), **more)


SMALL: Files = {"a": b"abc\n", "b/c": noise(900)}
GOOD = stream_of(members_of(SMALL))
CONTENT = GOOD.index(b"abc\n")  # of the file a
PROGRAM = b"print('not the program of the format')\n"


def flipped(content: bytes, at: int, mask: int = 1) -> bytes:
    at %= len(content)
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


def with_second_frame() -> bytes:
    """A unit with something behind its frame, under tables that agree."""
    units = [unit_of(GOOD[:1000]), unit_of(GOOD[1000:])]
    frame = units[0][12:] + unit_of(b"more")[12:]
    units[0] = units[0][:8] + len(frame).to_bytes(4, "little") + frame
    return b"".join(units) + tables_of(units, [1000, len(GOOD) - 1000])


def with_lengths(change: int) -> bytes:
    """Tables that tell another content size than the frames."""
    units = [unit_of(GOOD[:1000]), unit_of(GOOD[1000:])]
    return b"".join(units) + tables_of(units, [1000 + change, len(GOOD) - 1000 - change])


def with_delta(text: bytes) -> bytes:
    return archive_of(
        stream_of([m for m in members_of(SMALL, {"delta.json": text}) if m[0] != "m/a"])
    )


def renamed(name: str) -> Members:
    return [(path.replace("m/a", name), content) for path, content in members_of(SMALL)]


WHOLE = archive_of(GOOD)


# What is damaged, or made to do harm.
def with_changed_tables(table: str, at: int) -> bytes:
    """A good archive with one bit of a table changed, and the SHA-256 of the tables made to fit."""
    whole = archive_of(GOOD)
    units = -(-len(GOOD) // 1000)
    table_size = 17 + 8 * (2 * units + 1)
    check_size = 64 + 4 * units
    start = len(whole) - table_size - check_size
    tables = {"check": whole[start : -table_size - 32], "seek": whole[-table_size:]}
    tables[table] = flipped(tables[table], at)
    digest = hashlib.sha256(tables["check"] + tables["seek"]).digest()
    return whole[:start] + tables["check"] + digest + tables["seek"]


REFUSED: Dict[str, Callable[[], bytes]] = {
    "magic of the check frame": lambda: with_changed_tables("check", 0),
    "length of the check frame": lambda: with_changed_tables("check", 4),
    "magic of the seek table": lambda: with_changed_tables("seek", 0),
    "length of the seek table": lambda: with_changed_tables("seek", 4),
    "entry of a header": lambda: with_changed_tables("seek", 8),
    "entry of the check frame": lambda: with_changed_tables("seek", -17),
    "number of entries": lambda: with_changed_tables("seek", -9),
    "first byte": lambda: flipped(WHOLE, 0),
    "pzstd length": lambda: flipped(WHOLE, 4),
    "frame size": lambda: flipped(WHOLE, 8),
    "frame": lambda: flipped(WHOLE, 60),
    "bit that decoders ignore": lambda: flipped(WHOLE, 16, 0x10),  # only the CRC-32 tells
    "check frame": lambda: flipped(WHOLE, WHOLE.index(b"hfship/1\x05") + 9),
    "seek table": lambda: flipped(WHOLE, len(WHOLE) - 30),
    "end": lambda: WHOLE[:-1],
    "end more": lambda: WHOLE + b"\0",
    "beginning": lambda: WHOLE[12:],
    "label": lambda: archive_of(GOOD, label=b"hfship/2"),
    "second frame": with_second_frame,
    "longer than told": lambda: with_lengths(-1),
    "shorter than told": lambda: with_lengths(1),
    "content": lambda: archive_of(flipped(GOOD, CONTENT)),
    "padding": lambda: archive_of(flipped(GOOD, CONTENT + 4)),
    "mode": lambda: archive_of(flipped(GOOD, CONTENT - 512 + 106)),
    "end of the stream": lambda: archive_of(flipped(GOOD, len(GOOD) - 1)),
    "stream too long": lambda: archive_of(GOOD + bytes(512)),
    "stream too short": lambda: archive_of(GOOD[:-512]),
    "other name": lambda: archive_of(stream_of(renamed("n/a"))),
    "name that leaves": lambda: archive_of(stream_of(renamed("m/../../a"))),
    "missing member": lambda: archive_of(stream_of(members_of(SMALL)[:-1])),
    "member too many": lambda: archive_of(stream_of([*members_of(SMALL), ("m/z", b"")])),
    "other order": lambda: archive_of(
        stream_of([*members_of(SMALL)[:1], *members_of(SMALL)[:0:-1]])
    ),
    "unknown program": lambda: archive_of(stream_of(members_of(SMALL, {"restore.py": PROGRAM}))),
    "delta in another form": lambda: with_delta(b'{"absent": ["a"], "format": "hfship-delta/1"}\n'),
    "delta of others": lambda: with_delta(b'{"format": "hfship-delta/1", "absent": ["x"]}\n'),
    "delta of another kind": lambda: with_delta(b'{"format": "hfship-delta/2", "absent": ["a"]}\n'),
    "delta of no base": lambda: with_delta(
        b'{"format": "hfship-delta/2", "base": "main", "absent": ["a"]}\n'
    ),
    "no manifest": lambda: archive_of(
        stream_of([("m/.hfship/manifest.json", b"{}"), *members_of(SMALL)[1:]])
    ),
    "unsafe path": lambda: archive_of(stream_of(members_of({"../a": b"abc\n"}))),
}


def test_what_must_be_refused_is_refused_by_both(hfship: Program, tmp_path: Path) -> None:
    """And of what is the same but for the fault, pieces of 1000 bytes and any JSON, both make the files."""
    good = {
        "pieces": WHOLE,
        "delta": with_delta(b'{"format": "hfship-delta/1", "absent": ["a"]}\n'),
        "delta with base": with_delta(
            b'{"format": "hfship-delta/2", "base": "%s", "absent": ["a"]}\n' % (b"0" * 40)
        ),
        "unknown fields": archive_of(stream_of(members_of(SMALL, more=1))),
        "one piece": archive_of(GOOD, len(GOOD)),
    }
    for name, content in {**good, **{name: make() for name, make in REFUSED.items()}}.items():
        (tmp_path / f"{name.replace(' ', '_')}.tar.zst").write_bytes(content)
    rows = json.loads(hfship("verify", tmp_path, "--json", code=6).stdout)
    theirs = {Path(row["path"]).name[:-8].replace("_", " "): row["ok"] for row in rows}
    ours = {}
    for name in theirs:
        try:
            reader.read_archive([tmp_path / f"{name.replace(' ', '_')}.tar.zst"])
            ours[name] = True
        except reader.Refused:
            ours[name] = False
    expected = {**dict.fromkeys(good, True), **dict.fromkeys(REFUSED, False)}
    assert ours == expected
    assert theirs == expected


def planes_of(content: bytes, block: int, width: int = 1) -> List[bytes]:
    """The blocks of a weight, in so many planes."""
    found = []
    for at in range(0, len(content), block):
        piece = content[at : at + block]
        whole = len(piece) // width * width
        planes = [piece[number:whole:width] for number in reversed(range(width))]
        found.append(b"".join([*planes, piece[whole:], bytes([width])]))
    return found


def with_planes(
    restore: bytes, blocks: Sequence[bytes], content: bytes, halves: bool = False
) -> bytes:
    """An archive of the weight `w` in planes; with `halves`, blocks are in two units."""
    members = [
        *members_of({"w": content}, {"restore.py": restore})[:2],
        ("m/w.planes", b"".join(blocks)),
    ]
    stream = stream_of(members)
    start = stream.index(blocks[0][:9])
    stop = start + sum(map(len, blocks))
    step = -(-len(blocks[0]) // (2 if halves else 1))
    middle = [stream[at : min(at + step, stop)] for at in range(start, stop, step)]
    pieces = [stream[:start], *middle, stream[stop:]]
    units = list(map(unit_of, pieces))
    return b"".join(units) + tables_of(units, list(map(len, pieces)))


def test_planes_of_both_programs_and_broken_ones(
    hfship: Program, source: Path, tmp_path: Path
) -> None:
    """Programs of hfship 0.1.0 lack a check; blocks of 4 MiB are those of one of these."""
    hfship("pack", source, "-o", tmp_path / "out", *FORMS["planes"])
    _, contents = reader.read_stream([path.read_bytes() for path in parts_in(tmp_path / "out")])
    stream, header = b"".join(contents), reader.tar_header("m/.hfship/restore.py", 2091)
    start = stream.index(header) + len(header)
    now = stream[start : start + 2091]
    unchecked = re.sub(rb"def is_inside.*?\n\n\n", b"", now, flags=re.DOTALL)
    unchecked = re.sub(rb"    if not is_inside.*?continue\n", b"", unchecked, flags=re.DOTALL)
    before = unchecked.replace(b"2 MiB", b"4 MiB").replace(b"(2 <<", b"(4 <<")
    programs = ((now, "2 MiB"), (unchecked, "2 MiB"), (before, "4 MiB"))
    rows = {(len(text), hashlib.sha256(text).hexdigest(), size) for text, size in programs}
    assert {
        (int(size), sha256.strip("`"), block) for size, sha256, block in table("### Planes")
    } == rows
    content = noise(5 * MIB, 1)
    cases = {
        "now": (True, with_planes(now, planes_of(content, 2 * MIB), content)),
        "two": (True, with_planes(now, planes_of(content, 2 * MIB, width=2), content)),
        "unchecked": (True, with_planes(unchecked, planes_of(content, 2 * MIB), content)),
        "before": (True, with_planes(before, planes_of(content, 4 * MIB), content)),
        "other_size": (False, with_planes(now, planes_of(content, 4 * MIB), content)),
        "width": (False, with_planes(now, planes_of(content, 2 * MIB, width=3), content)),
        "halves": (False, with_planes(now, planes_of(content, 2 * MIB), content, halves=True)),
    }
    for name, (fine, archive) in cases.items():
        path = tmp_path / f"{name}.tar.zst"
        path.write_bytes(archive)
        hfship("verify", path, code=0 if fine else 6)
        if fine:
            assert reader.read_archive([path]).files == {"w": content}
            continue
        with pytest.raises(reader.Refused):
            reader.read_archive([path])


def test_parts_that_are_not_as_the_tables_say(
    hfship: Program, source: Path, tmp_path: Path
) -> None:
    hfship("pack", source, "-o", tmp_path, *FORMS["parts"])
    paths = parts_in(tmp_path)
    content = [path.read_bytes() for path in paths]
    wrong = {
        "one is missing": content[1:],
        "one is cut": [content[0][:-1], *content[1:]],
        "two are exchanged": [content[1], content[0], *content[2:]],
        "the last is missing": content[:-1],
    }
    for name, parts in wrong.items():
        with pytest.raises(reader.Refused):
            reader.read_stream(parts)
            pytest.fail(name)


# -- manifests

BAD_PATHS = [
    *(
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/../b",
        "./a",
        "a\\b",
        "a\nb",
        "a\x7fb",
        "C:a",
        "c:/a",
        "\ud800",
    ),
    *("x" * 256, "\u6587" * 86, ".hfship/a", ".HFship", ".hfship"),
    ".git/a",
    "a/.hfship",
    "a/.Git",
    ".ssh./a",
    "GIT~1",
    "a/" * 100 + "a",
]
GOOD_PATHS = [
    "...",
    "1:b",
    "ab:c",
    "a b",
    ".gitattributes",
    ".github/a",
    ".DS_Store",
    ".cache/huggingface/download/a.metadata",
    "x" * 255,
    "\u6587" * 85,
    "a.incomplete",
    "\u00a0",
]
SOURCE = {
    "endpoint": "https://hub",
    "repo": "o/n",
    "revision": "main",
    "resolved_repo": "o/n",
    "commit": "0" * 40,
}
FULL_SOURCE = {
    **SOURCE,
    "license": None,
    "gated": False,
    "fetched_at": "2026-01-31T12:00:00Z",
    "repo_type": "model",
}


def one(**changes: Any) -> Dict[str, Any]:
    """A manifest of the file `a`, whose row is changed."""
    manifest = manifest_of({"a": b"1"})
    manifest["files"][0].update(changes)
    return manifest


BAD_MANIFESTS: Dict[str, Any] = {
    **{f"path {number}": one(path=path) for number, path in enumerate(BAD_PATHS)},
    "format": {**one(), "format": "hfship-manifest/2"},
    "list": [],
    "no files": {"format": "hfship-manifest/1", "name": "m"},
    **{f"name {name!r}": {**one(), "name": name} for name in ("", "a/b", ".m", "m" * 97, "m\n")},
    **{f"size {size}": one(size=size) for size in (-1, 1.0, "1", True, None)},
    **{f"sha256 {sha}": one(sha256=sha) for sha in ("0" * 63, "A" * 64, "")},
    "twice": {**one(), "files": one()["files"] * 2},
    "file and folder": manifest_of({"a": b"1", "a/b": b"2"}),
    "left_out": {**one(), "left_out": -1},
    "source without commit": {**one(), "source": {**SOURCE, "commit": "main"}},
    "source with more": {**one(), "source": {**SOURCE, "more": 1}},
    "source with less": {**one(), "source": {"repo": "o/n"}},
    "source of a strange repo": {**one(), "source": {**SOURCE, "repo": "o/../n"}},
    "source of a strange type": {**one(), "source": {**FULL_SOURCE, "repo_type": "bucket"}},
    "source with a line break": {**one(), "source": {**SOURCE, "revision": "a\nb"}},
}
GOOD_MANIFESTS: Dict[str, Any] = {
    **{f"path {number}": one(path=path) for number, path in enumerate(GOOD_PATHS)},
    "unknown field": {**one(), "more": [1]},
    "left_out": {**one(), "left_out": 3},
    "short source": {**one(), "source": SOURCE},
    "full source": {**one(), "source": {**FULL_SOURCE, "gated": "manual", "license": "mit"}},
}


def test_both_refuse_the_same_manifests(hfship: Program, tmp_path: Path) -> None:
    expected, cases = {}, {}
    for fine, manifests in ((False, BAD_MANIFESTS), (True, GOOD_MANIFESTS)):
        for number, (name, manifest) in enumerate(manifests.items()):
            folder = make_model(
                tmp_path / f"{fine}{number}",
                {".hfship/manifest.json": json.dumps(manifest).encode()},
            )
            expected[fine, name] = fine
            cases[str(folder)] = fine, name
            if fine:
                make_model(folder, {manifest["files"][0]["path"]: b"1"})
    rows = json.loads(hfship("verify", *cases, "--json", code=6).stdout)
    assert {cases[row["path"]]: row["ok"] for row in rows} == expected
    assert all("is not a valid manifest" in row["error"]["what"] for row in rows if not row["ok"])
    ours = {}
    for folder, case in cases.items():
        try:
            reader.read_manifest((Path(folder) / ".hfship/manifest.json").read_bytes())
            ours[case] = True
        except reader.Refused:
            ours[case] = False
    assert ours == expected


# -- signature


def test_a_signature_is_what_the_page_says(hfship: Program, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        missing("openssl")
    key, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    subprocess.run(
        ["openssl", "ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", key], check=True
    )
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    make_model(tmp_path / "m", {**SMALL, ".gitattributes": b"x"})
    hfship("pack", tmp_path / "m", "-o", tmp_path, "--sign", key)
    bundle = json.loads((tmp_path / "m.tar.zst.sig").read_bytes())
    envelope = bundle["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    signed = tmp_path / "signed"
    signed.write_bytes(f"DSSEv1 28 application/vnd.in-toto+json {len(payload)} ".encode() + payload)
    (tmp_path / "der").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    argv = ["openssl", "dgst", "-sha384", "-verify", public, "-signature", tmp_path / "der", signed]
    subprocess.run(argv, check=True)
    assert (kind, bundle["mediaType"]) == (
        "application/vnd.in-toto+json",
        "application/vnd.dev.sigstore.bundle.v0.3+json",
    )
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    assert hint == hashlib.sha256(public.read_bytes()).hexdigest()
    text = (tmp_path / "m/.hfship/manifest.json").read_bytes()
    contents = {**SMALL, ".hfship/manifest.json": text}
    files = sorted(contents)
    digests = [hashlib.sha256(contents[path]).digest() for path in files]
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [
        {"name": "m", "digest": {"sha256": hashlib.sha256(b"".join(digests)).hexdigest()}},
    ]
    assert statement["predicateType"] == "https://model_signing/signature/v1.0"
    assert statement["predicate"]["serialization"]["method"] == "files"
    assert statement["predicate"]["resources"] == [
        {"name": path, "algorithm": "sha256", "digest": digest.hex()}
        for path, digest in zip(files, digests)
    ]


def test_custody_and_the_signature_of_a_role_are_what_the_page_says(
    hfship: Program, tmp_path: Path
) -> None:
    if not shutil.which("openssl"):
        missing("openssl")
    key, public = tmp_path / "key.pem", tmp_path / "pub.pem"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True
    )
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    make_model(tmp_path / "m", SMALL)
    env = {"HFSHIP_POLICY_CUSTODY": "true"}
    archive = tmp_path / "m.tar.zst"
    hfship("pack", tmp_path / "m", "-o", tmp_path, env=env)
    hfship("sign", archive, "--key", key, "--as", "security", env=env)
    hfship("verify", archive, env=env)
    (bundle,) = tmp_path.glob("m.tar.zst.security-*.sig")
    role, head, signed, der = reader.read_role(bundle.name, archive.name, bundle.read_bytes())
    (tmp_path / "signed").write_bytes(signed)
    (tmp_path / "der").write_bytes(der)
    argv = ["openssl", "dgst", "-sha256", "-verify", public, "-signature", tmp_path / "der"]
    subprocess.run([*argv, tmp_path / "signed"], check=True)
    text = (tmp_path / "m/.hfship/manifest.json").read_bytes()
    manifest = hashlib.sha256(text).hexdigest()
    log = Path(f"{archive}.custody.jsonl")
    whole = log.read_bytes()
    lines = reader.read_custody(whole, manifest, [head])
    assert (role, [line["event"] for line in lines]) == (
        "security",
        ["packed", "signed", "verified"],
    )
    assert lines[1]["previous"] == head
    assert lines[1]["key"] == hashlib.sha256(public.read_bytes()).hexdigest()
    rows = whole.splitlines(keepends=True)
    for broken in (
        b"".join(rows[1:]),
        rows[0] + rows[2],
        whole[:-1],
        whole.replace(b'"packed"', b'"peeked"'),
        whole + b"[]\n",
        rows[0].replace(b'"n":1', b'"n":1,"x":1'),  # whole, and not what was signed
    ):
        log.write_bytes(broken)
        hfship("custody", archive, code=6)
        with pytest.raises(reader.Refused):
            reader.read_custody(broken, manifest, [head])


# -- work under way


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 60
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


LARGE = noise(24 * MIB, 5)


@pytest.fixture
def fetching(hfship: Program, hub: FaultHub, tmp_path: Path) -> Tuple[Program, FaultHub, List[Any]]:
    """A slow Hub with one file of 24 MiB, and the command that brings it."""
    hub.add(
        make_model(tmp_path / "published", {"w.safetensors": LARGE, "config.json": b"{}"}), "org/m"
    )
    hub.faults.rate_bps = 5 * MIB
    return hfship, hub, ["fetch", "org/m", "--endpoint", hub.url, "-o", tmp_path / "models"]


def test_a_killed_fetch_tells_what_it_has(
    fetching: Tuple[Program, FaultHub, List[Any]], tmp_path: Path
) -> None:
    """What the journals tell is there, before and after a reboot; the run that goes on leaves `verified.jsonl`."""
    hfship, hub, command = fetching
    folder, boot = tmp_path / "models/m", BOOT.read_text().strip()
    digest = hashlib.sha256(LARGE).hexdigest()

    def arrived(boot_id: str, etag: str = digest) -> List[reader.Range]:
        return reader.ranges_that_arrived(folder, "w.safetensors", len(LARGE), etag, boot_id)

    def total(ranges: Sequence[reader.Range]) -> int:
        return sum(stop - start for start, stop in ranges)

    with hfship.start(*command) as process:
        wait_for(lambda: 0 < total(arrived("another")) < total(arrived(boot)), process)
        lease = json.loads((folder / ".hfship/lease").read_bytes())
        start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        killed(process)
    assert lease == {
        "host": socket.gethostname(),
        "pid": process.pid,
        "start": start,
        "boot_id": boot,
    }
    assert {*lease} == {*json.loads(example("lease"))}
    content = (folder / reader.work_path("w.safetensors")).read_bytes()
    for ranges in (arrived(boot), arrived("another")):
        assert ranges and all(content[start:stop] == LARGE[start:stop] for start, stop in ranges)
    assert arrived(boot, etag="0" * 64) == []
    for path in (folder / ".hfship/partial").iterdir():
        if not path.name.startswith(".") and path.suffix != ".part":
            assert {*json.loads(path.read_bytes())} == {*json.loads(example("partial"))}
    hub.faults.rate_bps = None
    sent = hub.traffic.body_bytes
    hfship(*command)
    assert hub.traffic.body_bytes - sent < len(LARGE) - total(arrived(boot)) + 4 * MIB
    assert (folder / "w.safetensors").read_bytes() == LARGE and not (
        folder / ".hfship/partial"
    ).exists()
    proven = reader.proven_files(folder)
    record = proven["w.safetensors"]
    assert {*record} == {*json.loads(example("verified"))} and {*proven} == {
        "w.safetensors",
        "config.json",
    }
    assert (record["sha256"], record["etag"], record["marks"]) == (
        digest,
        digest,
        reader.marks_of(LARGE),
    )
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert proven["config.json"]["etag"] == blob
    manifest = reader.read_manifest((folder / ".hfship/manifest.json").read_bytes())
    assert [entry["path"] for entry in manifest["files"]] == ["config.json", "w.safetensors"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", manifest["source"]["fetched_at"])
    assert {*manifest["source"]} == {*FULL_SOURCE}
    os.utime(folder / "config.json")
    assert {*reader.proven_files(folder)} == {"w.safetensors"}


def test_a_killed_pack_tells_which_parts_are_complete(hfship: Program, tmp_path: Path) -> None:
    folder = make_model(
        tmp_path / "m", {f"w{number}.bin": noise(12 * MIB, number) for number in range(3)}
    )
    command = [
        "pack",
        folder,
        "-o",
        tmp_path / "out",
        "--split",
        "2500000",
        "--level",
        "15",
        "-j",
        "1",
    ]
    listing = tmp_path / "out/m.tar.zst.incomplete"
    with hfship.start(*command) as process:
        wait_for(lambda: text_of(listing).count("\n") >= 4, process)
        killed(process)
    complete = reader.parts_that_are_complete(listing)
    assert len(complete) >= 3
    assert complete == [
        tmp_path / f"out/m.tar.zst.{n:04d}.incomplete" for n in range(1, len(complete) + 1)
    ]
    before = [path.read_bytes() for path in complete]
    damaged = complete[1].read_bytes()
    complete[1].write_bytes(flipped(damaged, 1000))
    assert reader.parts_that_are_complete(listing) == complete[:1] + complete[2:]
    complete[1].write_bytes(damaged)
    said = hfship(*command, "--progress", "json").stderr
    assert f"going on with {len(complete)} complete parts" in said
    proof = [event for event in map(json.loads, said.splitlines()) if event.get("stage") == "prove"]
    size = sum(map(len, before))
    assert proof[-1]["final"] and proof[-1]["done"] == proof[-1]["total"] == size
    paths = parts_in(tmp_path / "out")
    assert [path.read_bytes() for path in paths[: len(before)]] == before and not listing.exists()
    assert reader.read_archive(paths).files == files_of(folder)


def test_an_unfinished_unpack_tells_how_far_it_is(hfship: Program, tmp_path: Path) -> None:
    """An archive with damage near its end is unpacked as far as it goes; the journal tells how far."""
    content = bytes(40 * MIB) + noise(MIB, 3) + bytes(39 * MIB)
    make_model(tmp_path / "m", {"w.bin": content, "a": b"1"})
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out")
    path = tmp_path / "out/m.tar.zst"
    intact = path.read_bytes()
    last = reader.read_tables(intact).units[-2]
    path.write_bytes(flipped(intact, last.offset + 20))
    hfship("unpack", path, "-o", tmp_path / "site", code=6)
    folder = tmp_path / "site/m~incomplete"
    manifest = reader.read_manifest((tmp_path / "m/.hfship/manifest.json").read_bytes())
    assert not (tmp_path / "site/m").exists() and (folder / "a").read_bytes() == b"1"
    found = reader.bytes_that_are_there(folder, manifest)
    assert 0 < found["w.bin"] < len(content)
    assert (folder / reader.work_path("w.bin")).read_bytes()[: found["w.bin"]] == content[
        : found["w.bin"]
    ]
    line = json.loads((folder / ".hfship/journal").read_text().splitlines()[-1])
    assert [*map(type, line)] == [*map(type, json.loads(example("journal")))]
    with (folder / ".hfship/journal").open("a") as stream:
        stream.write('["w.bin", "' + "0" * 64 + '", 9]\n["w.bi')  # of another version, and torn
    assert reader.bytes_that_are_there(folder, manifest) == found
    path.write_bytes(intact)
    hfship("unpack", path, "-o", tmp_path / "site")
    assert files_of(tmp_path / "site/m") == files_of(tmp_path / "m") and not folder.exists()
    assert not (tmp_path / "site/m/.hfship/journal").exists()


# -- deployments and jobs


@pytest.fixture
def deployed(hfship: Program, model: Path, tmp_path: Path) -> Tuple[Program, Path, Dict[str, str]]:
    """The folder that `serve --write-only` makes on a machine that stub programs play."""
    stubs = {"docker": "fake-docker", "nvidia-smi": "nvidia-smi"}
    for folder in ("bin", "state", "home/site"):
        (tmp_path / folder).mkdir(parents=True)
    for name, stub in stubs.items():
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/stubs/{stub}" "$@"\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "home/site/m").symlink_to(model)
    env = {"PATH": str(tmp_path / "bin"), "FAKE_STATE": str(tmp_path / "state")}
    words = ["serve", "m", "--write-only", "--env", "A=it's $5", "--env", "B=1", "--env", 'C=x "y"']
    hfship(*words, env=env)
    return hfship, tmp_path / "home/deploy/m", env


TYPES: Dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "object of text": lambda value: all(
        isinstance(item, str) for pair in value.items() for item in pair
    ),
    "list of text": lambda value: (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ),
    "list of 3 integers": lambda value: (
        isinstance(value, list) and [*map(type, value)] == [int] * 3
    ),
}


def test_a_plan_has_the_fields_of_the_page(deployed: Tuple[Program, Path, Dict[str, str]]) -> None:
    _, folder, _ = deployed
    rows = {
        name.strip("`"): (kind, default.strip("`"))
        for name, kind, default, _ in table("## Deployment")
    }
    defaults = {name: json.loads(default) for name, (_, default) in rows.items() if default}
    text = (folder / "plan.json").read_text()
    value = json.loads(text)
    assert sorted(value) == sorted(rows) and text == reader.write_manifest(value).decode()
    assert all(TYPES[rows[name][0]](found) for name, found in value.items())
    assert reader.read_plan(text, defaults) == value
    assert all(TYPES[rows[name][0]](default) for name, default in defaults.items())
    env = reader.read_env((folder / ".env").read_text())
    key = env.pop("VLLM_API_KEY")
    assert re.fullmatch(r"[A-Za-z0-9_.~/:@%+-]{20,}", key) and key not in text
    asked = {name: env.pop(name) for name in value["wishes"]["env"]}
    assert asked == {"A": "it's $5", "B": "1", "C": 'x "y"'} and env == value["env"]
    assert not any(secret in text for secret in ("it's $5", 'x "y"', r"x \"y\""))
    assert (
        folder.stat().st_mode & 0o777 == 0o750 and (folder / ".env").stat().st_mode & 0o777 == 0o600
    )


BAD_PLANS = {
    "format": ("format", "hfship-plan/2"),
    "no name": ("name", ""),
    "type": ("port", "8000"),
    "list": ("gpus", "GPU-1"),
    "endless": ("concurrency", 1e300),
}


def test_plans_are_read_as_the_page_says(deployed: Tuple[Program, Path, Dict[str, str]]) -> None:
    """What hfship refuses, the second reader does; a short plan has the defaults, and an unknown field does no harm."""
    hfship, folder, env = deployed
    rows = {name.strip("`"): default.strip("`") for name, _, default, _ in table("## Deployment")}
    defaults = {name: json.loads(default) for name, default in rows.items() if default}
    whole = json.loads((folder / "plan.json").read_text())
    for key, value in BAD_PLANS.values():
        text = json.dumps({**whole, key: value})
        with pytest.raises(reader.Refused):
            reader.read_plan(text, defaults)
        (folder / "plan.json").write_text(text)
        said = hfship("status", env=env, code=None)
        assert "is not a valid plan" in said.stdout + said.stderr, (key, value)
    short = {"format": "hfship-plan/1", "name": "m", "more": 1}
    assert reader.read_plan(json.dumps(short), defaults) == {
        "format": "hfship-plan/1",
        "name": "m",
        **defaults,
    }
    (folder / "plan.json").write_text(json.dumps(short))
    said = hfship("status", env=env, code=None)
    assert "valid plan" not in said.stdout + said.stderr


def test_a_record_is_what_the_pages_say(hfship: Program, source: Path, tmp_path: Path) -> None:
    """The fields are in json.md, as a JSON Schema."""
    hfship("pack", source, "-o", tmp_path / "out")
    logs = hfship.home / "logs/hfship"
    record = reader.read_job(logs / "pack-m.json")
    page = (ROOT / "docs/json.md").read_text(encoding="utf-8")
    (schema,) = (
        found
        for found in map(json.loads, re.findall(r"```json\n(\{.*?\n\})\n```", page, re.DOTALL))
        if found["title"] == "hfship-job/1"
    )
    assert {*record} == {*schema["properties"]} and (logs / "pack-m.log").is_file()
    assert (record["state"], record["exit_code"], record["command"], record["words"][0]) == (
        "done",
        0,
        "pack",
        "pack",
    )
    assert (record["host"], record["boot_id"]) == (socket.gethostname(), BOOT.read_text().strip())
    copy = logs / "pack-other.json"
    copy.write_text((logs / "pack-m.json").read_text())
    with pytest.raises(reader.Refused):
        reader.read_job(copy)
    assert "pack-other" in hfship("watch", "--once").stderr
