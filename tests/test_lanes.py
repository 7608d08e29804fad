# SPDX-License-Identifier: Apache-2.0
"""Where frames and lanes of the tar stream begin."""

from __future__ import annotations

from typing import List, Tuple

import pytest

from hfship.archive.frames import Frames
from hfship.archive.lanes import cut_frames, cut_lanes, make_lanes
from hfship.archive.layout import WEIGHT_SIZE, Segment
from hfship.base.manifest import FileEntry


def segments_of(*parts: Tuple[str, int, int]) -> List[Segment]:
    """Segments one behind the other: name ("" of the archive itself), size, block of planes."""
    segments, start = [], 0
    for name, size, planes in parts:
        entry = FileEntry(name, size, "") if name else None
        segments.append(Segment(start, size, name or "tar header", entry=entry, planes=planes))
        start += size
    return segments


W, STEP = WEIGHT_SIZE, WEIGHT_SIZE // 2 + 1


@pytest.mark.parametrize(
    ("parts", "edges"),
    [
        ([("a", 7, 0)], [0, 7]),
        ([("a", W - 1, 0)], [0, STEP, W - 1]),  # no weight, and yet no frame is longer than a step
        (
            [("a", 5, 0), ("b", W - 1, 0)],
            [0, STEP, 2 * STEP, W + 4],
        ),  # two small files share frames
        ([("w", W, 0)], [0, STEP, W]),
        ([("a", 5, 0), ("w", W, 0), ("b", 5, 0)], [0, 5, 5 + STEP, 5 + W, 10 + W]),
        ([("v", W, 0), ("w", W, 0)], [0, STEP, W, W + STEP, 2 * W]),
        ([("", W, 0)], [0, STEP, W]),  # what is no file is no weight
        # a block of planes has one byte more than its bytes of the file
        ([("w", W, STEP - 1)], [0, STEP, W]),
        ([("w", W, W // 4), ("b", 5, 0)], [0, *(n * (W // 4 + 1) for n in (1, 2, 3)), W, W + 5]),
    ],
)
def test_frames_begin_where_weights_do(parts: List[Tuple[str, int, int]], edges: List[int]) -> None:
    assert list(cut_frames(segments_of(*parts), STEP)) == edges


@pytest.mark.parametrize(
    ("edges", "sizes", "cuts"),
    [
        ([0, 10], [10], [0, 1]),
        ([0, 10, 20], [20], [0, 2]),
        ([0, 10, 20], [10, 10], [0, 1, 2]),
        ([0, 10, 20], [4, 16], [0, 2]),  # the second segment begins within a frame
        ([3, 10, 20], [10, 10], [0, 1, 2]),  # the first frame begins a lane wherever it is
        ([0, 10, 20], [], [0, 2]),
    ],
)
def test_lanes_begin_with_a_frame_and_a_segment(
    edges: List[int], sizes: List[int], cuts: List[int]
) -> None:
    assert cut_lanes(edges, segments_of(*(("x", size, 0) for size in sizes))) == cuts


def test_a_lane_is_a_file_where_it_holds_nothing_else() -> None:
    frames = Frames([(9, size, None) for size in (10, 5, 6, 2)])
    segments = segments_of(("", 4, 0), ("a", 6, 0), ("b", 11, 0), ("", 2, 0))
    lanes = make_lanes(frames, segments)
    facts = [(lane.first, lane.file, [file.path for file in lane.files]) for lane in lanes]
    assert facts == [(1, None, ["a"]), (2, segments[2].entry, ["b"]), (4, None, [])]
    assert [len(lane) for lane in make_lanes(frames, [])] and make_lanes(frames, [])[0].files == []
