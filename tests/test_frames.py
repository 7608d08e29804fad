"""the format. Properties of layout, cut and tables; other programs as readers."""

import hashlib
import json
import shutil
import struct
import subprocess
import tarfile
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfship.archive.frames import (
    Frames,
    decode_tail,
    encode_tail,
    encode_unit,
    largest_unit,
    tail_extent,
    tail_size,
    unit_at,
)
from hfship.archive.layout import member_extent
from hfship.archive.opening import open_archive
from hfship.archive.zstd import load_zstd
from support import archives as a
from support import components


@st.composite
def tables(draw):
    rows = draw(
        st.lists(
            st.tuples(st.integers(20, 4000), st.integers(4000, 9000), st.integers(0, 2**32 - 1)),
            min_size=1,
        )
    )
    frames = Frames(rows)
    cut = draw(st.lists(st.integers(0, frames.size), max_size=3))
    edges = [0, *sorted(cut), frames.size]
    return frames, [b - a for a, b in zip(edges, edges[1:])]


@given(tables(), st.data())
def test_frames_are_a_sequence_of_what_was_put_in(table, data):
    frames = list(table[0])
    stops = [(frame.offset + frame.size, frame.stop) for frame in frames]
    assert [(frame.offset, frame.start) for frame in frames] == [(0, 0), *stops[:-1]]
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(frames))] * 2)))
    some = table[0][first:last]
    assert list(some) == frames[first:last] and len(some) == last - first
    assert some.size == sum(frame.size for frame in frames[first:last])
    assert frames[-1] == table[0][-1] and table[0] == Frames(
        (f.size, f.length, f.crc) for f in frames
    )
    with pytest.raises(IndexError):
        table[0][len(frames)]


@given(tables())
def test_tables_survive_the_round_trip(table):
    frames, sizes = table
    tail = encode_tail(frames, sizes)
    assert len(tail) == tail_size(len(frames), len(sizes)) == tail_extent(tail[-17:])[0]
    index = decode_tail(tail)
    assert index.frames == frames
    assert list(index.part_sizes) == [*sizes[:-1], sizes[-1] + len(tail)]


@given(tables(), st.data())
def test_tables_with_a_flipped_bit_or_a_cut_are_refused(table, data):
    tail = bytearray(encode_tail(*table))
    bit = data.draw(st.integers(0, 8 * len(tail) - 1))
    tail[bit // 8] ^= 1 << bit % 8
    with pytest.raises((ValueError, struct.error)):
        decode_tail(bytes(tail))
    tail[bit // 8] ^= 1 << bit % 8
    with pytest.raises((ValueError, struct.error)):
        decode_tail(bytes(tail[: bit // 8]))


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_parsers(junk):
    for parser in (decode_tail, unit_at, member_extent):
        try:
            parser(junk)
        except (ValueError, struct.error):
            pass


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536, 300_000])
def test_a_unit_tells_its_own_size_and_content(size):
    unit = encode_unit(a.noise(size), load_zstd().compressor(1))
    if size >= 6:
        assert unit_at(unit[:30] + bytes(30)) == (len(unit), size)
    assert len(unit) <= largest_unit(size)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("interop")
    long = "sub/" + "x" * 120 + ".txt"
    a.make_model(root / "m", {**a.BIG, "naïve 文.txt": b"utf-8", long: b"long"})
    return (
        root / "m",
        a.pack(root / "m", root / "whole"),
        a.pack(root / "m", root / "parts", split=4_600_000),
    )


READERS = {
    "tar": "tar --zstd -xf {whole}",
    "zstd": "zstd -dc {whole} | tar -x",
    "pzstd": "pzstd -dc {whole} | tar -x",
    "cat parts": "cat {parts}.0* | tar --zstd -x",
    "each part is a zstd file": "for p in {parts}.0*; do zstd -qt $p || exit 1; zstd -dqc $p; done | tar -x",
}


@pytest.mark.parametrize("reader", READERS)
def test_other_programs_read_the_archive(reader, packed, tmp_path):
    for tool in ("tar", "zstd", "pzstd"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    model, whole, parts = packed
    command = READERS[reader].format(whole=whole.path, parts=parts.folder / parts.name)
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert a.tree(tmp_path / "m") == a.tree(model)
    assert (tmp_path / "m/.hfship/manifest.json").read_bytes() == (
        model / ".hfship/manifest.json"
    ).read_bytes()


def test_python_streaming_reader_and_seek_table_reader_agree(packed):
    _, whole, _ = packed
    archive = open_archive(whole)
    decompress = load_zstd().decompressor()
    stream = b"".join(archive.decode(frame, decompress) for frame in archive.frames)
    with tarfile.open(fileobj=BytesIO(stream)) as tar:
        assert tar.getnames()[0] == "m/.hfship/manifest.json"
        assert all(m.isreg() and (m.uid, m.gid, m.mtime, m.mode) == (0, 0, 0, 0o644) for m in tar)


def test_seekable_format_library_reads_the_table(packed):
    pyzstd = pytest.importorskip("pyzstd")
    _, whole, _ = packed
    archive = open_archive(whole)
    with pyzstd.SeekableZstdFile(str(whole.path)) as stream:
        for frame in list(archive.frames)[::3]:
            stream.seek(frame.start)
            assert stream.read(frame.length) == archive.decode(frame, load_zstd().decompressor())


RATARMOUNT = """
import hashlib, json, sys
from ratarmountcore.mountsource.factory import open_mount_source
source, found = open_mount_source(sys.argv[1], indexFilePath=":memory:"), {}
for path in json.loads(sys.argv[2]):
    with source.open(source.lookup("/m/" + path)) as stream:
        found[path] = hashlib.sha256(stream.read()).hexdigest()
        if stream.seek(0, 2) > 4000:  # a look at one place of a large file
            stream.seek(-4000, 2)
            found[path + " end"] = hashlib.sha256(stream.read()).hexdigest()
print(json.dumps(found))
"""


@pytest.mark.real
def test_ratarmount_finds_every_file_without_unpacking(packed):
    """Through indexed_zstd, as `ratarmount` mounts it."""
    model, whole, _ = packed
    files = a.tree(model)
    argv = [components.require("ratarmount"), "-c", RATARMOUNT, whole.path, json.dumps(list(files))]
    said = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
    expected = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    expected.update(
        {
            f"{p} end": hashlib.sha256(c[-4000:]).hexdigest()
            for p, c in files.items()
            if len(c) > 4000
        }
    )
    assert json.loads(said.splitlines()[-1]) == expected
