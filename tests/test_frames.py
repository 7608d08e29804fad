"""§8: the format. Properties of layout, cut and tables; other programs as readers."""

import hashlib
import json
import shutil
import subprocess
import tarfile
from io import BytesIO

import archives as a
import components
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hfship as h

SHA = "0" * 64
paths = st.text("abé/. -_", min_size=1, max_size=130).filter(lambda p: _is_path(p))
entries = st.builds(h.FileEntry, paths, st.integers(0, 3 << 20) | st.integers(0, 600) | st.just(9 << 30), st.just(SHA))


def _is_path(path):
    try:
        h.check_relative_path(path)
    except ValueError:
        return False
    return True


@st.composite
def manifests(draw):
    chosen = {entry.path: entry for entry in draw(st.lists(entries, max_size=6))}
    try:
        h.check_distinct_paths(chosen)
    except ValueError:
        chosen = {}
    return h.make_manifest("m", chosen.values())


@given(manifests())
def test_layout_is_sorted_gapless_and_holds_every_file_once(manifest):
    text = manifest.to_json().encode()
    layout = h.stream_layout(manifest, text)
    at = 0
    for segment in layout:
        assert segment.start == at and (segment.entry or len(segment.known) == segment.size > 0)
        at = segment.stop
    assert at % 512 == 0
    assert sorted(s.entry.path for s in layout if s.entry) == sorted(e.path for e in manifest.files)


@given(manifests())
def test_headers_are_what_tarfile_reads(manifest):
    for entry in manifest.files:
        stream = h.tar_header("m/" + entry.path, entry.size)
        with tarfile.open(fileobj=BytesIO(stream + bytes(1024)), mode="r|") as tar:
            info = tar.next()
        assert (info.name, info.size, info.isreg(), info.mode, info.mtime, info.uid) == (
            "m/" + entry.path, entry.size, True, 0o644, 0, 0,
        )  # fmt: skip


@given(manifests().filter(lambda m: m.size < 1 << 24), st.integers(1, 5 << 20).filter(lambda n: n > 4000))
@settings(max_examples=40)
def test_cut_is_gapless_bounded_and_never_runs_into_a_weight(manifest, frame_size):
    layout = h.stream_layout(manifest, manifest.to_json().encode())
    edges = list(h.cut_frames(layout, frame_size))
    assert edges[0] == 0 and edges[-1] == layout[-1].stop
    assert all(0 < stop - start <= frame_size for start, stop in zip(edges, edges[1:]))
    assert {edge for s in layout if s.entry and s.size >= h.WEIGHT_SIZE for edge in (s.start, s.stop)} <= {*edges}


@st.composite
def tables(draw):
    rows = draw(
        st.lists(st.tuples(st.integers(20, 4000), st.integers(4000, 9000), st.integers(0, 2**32 - 1)), min_size=1)
    )
    frames = h.Frames(rows)
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
    assert frames[-1] == table[0][-1] and table[0] == h.Frames((f.size, f.length, f.crc) for f in frames)
    with pytest.raises(IndexError):
        table[0][len(frames)]


@given(tables())
def test_tables_survive_the_round_trip(table):
    frames, sizes = table
    tail = h.encode_tail(frames, sizes)
    assert len(tail) == h.tail_size(len(frames), len(sizes)) == h.tail_extent(tail[-17:])[0]
    index = h.decode_tail(tail)
    assert index.frames == frames
    assert list(index.part_sizes) == [*sizes[:-1], sizes[-1] + len(tail)]


@given(tables(), st.data())
def test_tables_with_a_flipped_bit_or_a_cut_are_refused(table, data):
    tail = bytearray(h.encode_tail(*table))
    bit = data.draw(st.integers(0, 8 * len(tail) - 1))
    tail[bit // 8] ^= 1 << bit % 8
    with pytest.raises((ValueError, h.struct.error)):
        h.decode_tail(bytes(tail))
    tail[bit // 8] ^= 1 << bit % 8
    with pytest.raises((ValueError, h.struct.error)):
        h.decode_tail(bytes(tail[: bit // 8]))


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_parsers(junk):
    for parser in (h.decode_tail, h.unit_at, h.manifest_extent):
        try:
            parser(junk)
        except (ValueError, h.struct.error):
            pass


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536, 300_000])
def test_a_unit_tells_its_own_size_and_content(size):
    unit = h.encode_unit(a.noise(size), h.load_zstd().compressor(1))
    if size >= 6:
        assert h.unit_at(unit[:30] + bytes(30)) == (len(unit), size)
    assert len(unit) <= h.largest_unit(size)


def test_lanes_hold_every_frame_and_segment_once(tmp_path):
    manifest = a.make_model(tmp_path / "m", a.BIG)
    for frame_size in (999, 70_000, 1 << 20, 64 << 20):
        plan = h.plan_pack(tmp_path / "m", manifest, h.PackOptions(frame_size=frame_size))
        frames = h.Frames((stop - start + 12, stop - start, 0) for start, stop in zip(plan.edges, plan.edges[1:]))
        lanes = h.make_lanes(frames, plan.segments)
        assert [frame for lane in lanes for frame in lane.frames] == list(frames)
        assert [segment for lane in lanes for segment in lane.segments] == list(plan.segments)
        assert [lane.file.path for lane in lanes if lane.file] == [f"w{n}.safetensors" for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("interop")
    long = "sub/" + "x" * 120 + ".txt"
    a.make_model(root / "m", {**a.BIG, "naïve 文.txt": b"utf-8", long: b"long"})
    return root / "m", a.pack(root / "m", root / "whole"), a.pack(root / "m", root / "parts", split=4_600_000)


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
    assert (tmp_path / "m/.hfship/manifest.json").read_bytes() == (model / ".hfship/manifest.json").read_bytes()


def test_python_streaming_reader_and_seek_table_reader_agree(packed):
    _, whole, _ = packed
    archive = h.open_archive(whole)
    decompress = h.load_zstd().decompressor()
    stream = b"".join(archive.decode(frame, decompress) for frame in archive.frames)
    with tarfile.open(fileobj=BytesIO(stream)) as tar:
        assert tar.getnames()[0] == "m/.hfship/manifest.json"
        assert all(m.isreg() and (m.uid, m.gid, m.mtime, m.mode) == (0, 0, 0, 0o644) for m in tar)


def test_seekable_format_library_reads_the_table(packed):
    pyzstd = pytest.importorskip("pyzstd")
    _, whole, _ = packed
    archive = h.open_archive(whole)
    with pyzstd.SeekableZstdFile(str(whole.path)) as stream:
        for frame in list(archive.frames)[::3]:
            stream.seek(frame.start)
            assert stream.read(frame.length) == archive.decode(frame, h.load_zstd().decompressor())


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
    expected.update({f"{p} end": hashlib.sha256(c[-4000:]).hexdigest() for p, c in files.items() if len(c) > 4000})
    assert json.loads(said.splitlines()[-1]) == expected
