"""The tar stream of a model, its cut into frames and lanes, and how its beginning is read."""

import tarfile
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfship.archive.frames import LARGEST_FRAME, Frames
from hfship.archive.lanes import cut_frames, make_lanes
from hfship.archive.layout import (
    DELTA_PATH,
    RESTORE_PATH,
    WEIGHT_SIZE,
    delta_json,
    padding,
    read_leading,
    stream_layout,
    tar_header,
)
from hfship.archive.pack_plan import PackOptions, plan_pack
from hfship.archive.restore_script import RESTORE_PY
from hfship.archive.zstd import ZstdError
from hfship.base.content import check_distinct_paths, check_relative_path
from hfship.base.errors import IntegrityError
from hfship.base.manifest import FileEntry, make_manifest
from support import archives as a

SHA = "0" * 64
paths = st.text("abé/. -_", min_size=1, max_size=130).filter(lambda p: _is_path(p))
entries = st.builds(
    FileEntry, paths, st.integers(0, 3 << 20) | st.integers(0, 600) | st.just(9 << 30), st.just(SHA)
)


def _is_path(path):
    try:
        check_relative_path(path)
    except ValueError:
        return False
    return True


@st.composite
def manifests(draw):
    chosen = {entry.path: entry for entry in draw(st.lists(entries, max_size=6))}
    try:
        check_distinct_paths(chosen)
    except ValueError:
        chosen = {}
    return make_manifest("m", chosen.values())


@given(manifests())
def test_layout_is_sorted_gapless_and_holds_every_file_once(manifest):
    text = manifest.to_json().encode()
    layout = stream_layout(manifest, text)
    at = 0
    for segment in layout:
        assert segment.start == at and (segment.entry or len(segment.known) == segment.size > 0)
        at = segment.stop
    assert at % 512 == 0
    assert sorted(s.entry.path for s in layout if s.entry) == sorted(e.path for e in manifest.files)


@given(manifests())
def test_headers_are_what_tarfile_reads(manifest):
    for entry in manifest.files:
        stream = tar_header("m/" + entry.path, entry.size)
        with tarfile.open(fileobj=BytesIO(stream + bytes(1024)), mode="r|") as tar:
            info = tar.next()
        assert (info.name, info.size, info.isreg(), info.mode, info.mtime, info.uid) == (
            "m/" + entry.path, entry.size, True, 0o644, 0, 0,
        )  # fmt: skip


@given(
    manifests().filter(lambda m: m.size < 1 << 24),
    st.integers(1, 5 << 20).filter(lambda n: n > 4000),
)
@settings(max_examples=40)
def test_cut_is_gapless_bounded_and_never_runs_into_a_weight(manifest, frame_size):
    layout = stream_layout(manifest, manifest.to_json().encode())
    edges = list(cut_frames(layout, frame_size))
    assert edges[0] == 0 and edges[-1] == layout[-1].stop
    assert all(0 < stop - start <= frame_size for start, stop in zip(edges, edges[1:]))
    assert {
        edge for s in layout if s.entry and s.size >= WEIGHT_SIZE for edge in (s.start, s.stop)
    } <= {*edges}


def test_lanes_hold_every_frame_and_segment_once(tmp_path):
    manifest = a.make_model(tmp_path / "m", a.BIG)
    for frame_size in (999, 70_000, 1 << 20, 64 << 20):
        plan = plan_pack(tmp_path / "m", manifest, PackOptions(frame_size=frame_size))
        frames = Frames(
            (stop - start + 12, stop - start, 0) for start, stop in zip(plan.edges, plan.edges[1:])
        )
        lanes = make_lanes(frames, plan.segments)
        assert [frame for lane in lanes for frame in lane.frames] == list(frames)
        assert [segment for lane in lanes for segment in lane.segments] == list(plan.segments)
        assert [lane.file.path for lane in lanes if lane.file] == [
            f"w{n}.safetensors" for n in (1, 2, 3)
        ]


# -- the leading members

MANIFEST = make_manifest("m", [FileEntry("w.bin", 3 << 20, SHA), FileEntry("z", 3, SHA)])
TEXT = MANIFEST.to_json().encode()
DELTA = delta_json(["z"])


def member(path, content):
    return tar_header(path, len(content)) + content + padding(len(content))


FIRST = member("m/.hfship/manifest.json", TEXT)
RESTORE = member(f"m/{RESTORE_PATH}", RESTORE_PY)
ABSENT = member(f"m/{DELTA_PATH}", DELTA)
FILE = member("m/a", b"abc")


def pieces(*contents):
    """Contents as pieces; one that is an error is raised."""
    for content in contents:
        if isinstance(content, Exception):
            raise content
        yield content


def in_pieces(stream, size):
    return [stream[at : at + size] for at in range(0, len(stream), size)]


@pytest.mark.parametrize("size", [1, 511, 512, 700, 1 << 20])
@pytest.mark.parametrize(
    "members, restore, delta",
    [
        ((FIRST,), b"", b""),
        ((FIRST, FILE), b"", b""),
        ((FIRST, RESTORE, FILE), RESTORE_PY, b""),
        ((FIRST, ABSENT, FILE), b"", DELTA),
        ((FIRST, RESTORE, ABSENT, FILE), RESTORE_PY, DELTA),
        # in another order, or of another model, they are files like any other
        ((FIRST, ABSENT, RESTORE), b"", DELTA),
        ((FIRST, FILE, RESTORE), b"", b""),
        ((FIRST, member(f"other/{DELTA_PATH}", DELTA)), b"", b""),
    ],
)
def test_leading_members_are_read_in_their_order(members, restore, delta, size):
    found = read_leading(iter(in_pieces(b"".join(members), size)), "it")
    assert (found.manifest, found.text) == (MANIFEST, TEXT)
    assert (found.restore, found.delta) == (restore, delta)
    assert found.parsed_delta().absent == ({"z"} if delta else frozenset())


def test_no_more_is_taken_than_the_leading_members_need():
    taken = []

    def stream():
        for piece in in_pieces(FIRST + RESTORE + FILE + bytes(1 << 20), 512):
            taken.append(piece)
            yield piece

    read_leading(stream(), "it")
    # The header behind them tells that it is none of them.
    assert len(b"".join(taken)) <= len(FIRST + RESTORE + FILE)


@pytest.mark.parametrize(
    "stream, error, says",
    [
        ([b""], ValueError, "no tar header"),
        ([bytes(1024)], ValueError, "no tar header"),
        ([FIRST[:-600]], ValueError, "no tar header|no end"),
        ([tar_header("m/x", LARGEST_FRAME) + bytes(9)], ValueError, "no end"),
        ([member("m/x", b"{}")], IntegrityError, "it"),
        ([FIRST, member(f"m/{RESTORE_PATH}", RESTORE_PY + b"#")], ValueError, "restore.py"),
        ([ZstdError("CRC-32 differs")], ZstdError, "CRC-32"),
        ([FIRST[:700], ZstdError("CRC-32 differs")], ZstdError, "CRC-32"),
    ],
)
def test_a_stream_that_begins_otherwise_is_refused(stream, error, says):
    with pytest.raises(error, match=says):
        read_leading(pieces(*stream), "it")


def test_what_follows_a_lost_piece_is_not_taken_for_it():
    """The piece with restore.py is lost: the delta behind it must not be read in its place."""
    stream = pieces(FIRST, ZstdError("CRC-32 differs"), ABSENT)
    found = read_leading(stream, "it")
    assert (found.text, found.restore, found.delta) == (TEXT, b"", b"")


@pytest.mark.parametrize(
    "delta",
    [
        b"{}",
        b"[]",
        b'{"absent": 1}',
        b"{",
        delta_json(["z"])[:-1],
        delta_json(["z"]).replace(b", ", b","),
        delta_json(["unknown"]),
        delta_json(["z"], "main"),
        delta_json(["z"], SHA[:41]),
        delta_json(["z"], SHA).replace(b"delta/2", b"delta/1"),
        delta_json(["z"], SHA).replace(b"delta/2", b"delta/3"),
        delta_json(["z"]).replace(b"delta/1", b"delta/2"),
    ],
)
def test_a_delta_that_is_none_is_refused(delta):
    with pytest.raises(ValueError):
        stream_layout(MANIFEST, TEXT, b"", delta)
