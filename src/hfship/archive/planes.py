# SPDX-License-Identifier: Apache-2.0
"""Byte planes: weights in an order that compresses, and back. archive/restore_script.py has the
format.

Owns how the content of a frame is compressed: in planes or not, and with what parameters of zstd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from hfship.archive.layout import TAR_BLOCK
from hfship.archive.zstd import ZstdError

if TYPE_CHECKING:
    from hfship.archive.frames import Compress
    from hfship.archive.zstd import Zstd

PLANE_WIDTHS = (1, 2, 4)  # bytes of an element: int8 and fp8, bf16 and f16, f32

# Samples of a block from which its width is found, and bytes of each: costs some 2 % of the time.
TRIAL_SAMPLES = 4
TRIAL_SIZE = 8 << 10

# libzstd's lowest level: it looks for no match and codes no literal, but still checksums.
STORE_LEVEL = -131072

# zstd as a mere Huffman coder. Exponents have no strings worth finding; levels 1 and 3 lose by
# looking for them. A plane that does not compress is recognised by its first bytes, and stored.
ENTROPY_ONLY = {
    "strategy": 1,
    "window_log": 17,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
}
# With a code for every 8 KiB instead of every 128: smaller where the rows of a tensor differ in
# scale, but slower.
ENTROPY_FINE = {**ENTROPY_ONLY, "window_log": 13}

# Bytes of the exponents of a block on which the two are compared, and to what part of the size the
# slower one must bring them.
TABLE_TRIAL_SIZE = 64 << 10
TABLE_TRIAL_GAIN = 0.999


def split_planes(block: bytes, width: int) -> memoryview:
    """A block of a weight in planes: `width` planes, the rest, one byte that tells the width.

    >>> bytes(split_planes(b"a1b2c", 2))
    b'12abc\\x02'
    """
    count = len(block) // width
    whole = count * width
    planes = bytearray(len(block) + 1)
    for number in range(width):
        byte = width - 1 - number  # of each element; the last one first
        first = number * count
        planes[first : first + count] = block[byte:whole:width]

    planes[whole:-1] = block[whole:]
    planes[-1] = width
    return memoryview(planes)


def join_planes(planes: bytes) -> Union[bytes, bytearray]:
    """The block of a weight that is in planes. Raises ZstdError for a width that is none.

    >>> bytes(join_planes(split_planes(b"a1b2c", 2)))
    b'a1b2c'
    """
    width = planes[-1]
    if width not in PLANE_WIDTHS:
        raise ZstdError(f"elements of {width} bytes")
    if width == 1:
        return planes[:-1]

    size = len(planes) - 1
    count = size // width
    whole = count * width
    block = bytearray(size)
    for number in range(width):
        byte = width - 1 - number
        first = number * count
        block[byte:whole:width] = planes[first : first + count]

    block[whole:] = planes[whole:-1]
    return block


def best_width(block: bytes, compress: Compress) -> int:
    """The width of elements whose planes compress best, tried on samples from all over a block."""
    # A multiple of all widths, so that every sample begins with an element.
    step = len(block) // TRIAL_SAMPLES
    step = max(step & -4, 4)
    samples = []
    for start in range(0, len(block), step):
        samples.append(block[start : start + TRIAL_SIZE])

    sample = b"".join(samples)

    sizes = {}
    for width in PLANE_WIDTHS:
        planes = [sample[number::width] for number in range(width)]
        sizes[width] = sum(len(compress(plane)) for plane in planes)

    return min(PLANE_WIDTHS, key=sizes.__getitem__)


class FrameEncoder:
    """Turns content into zstd frames, for a profile of pack (`store` compresses nothing)
    and a level of zstd. Not for several threads at once."""

    def __init__(self, zstd: Zstd, profile: str, level: int) -> None:
        self._store = profile == "store"
        if self._store:
            level = STORE_LEVEL
        self._usual = zstd.compressor(level)
        self._dense = zstd.compressor(1)
        self._coarse = zstd.compressor(1, **ENTROPY_ONLY)
        self._fine = zstd.compressor(1, **ENTROPY_FINE)

    def encode(self, content: bytes, planes: bool) -> bytes:
        """The zstd frame of some content; with `planes` that is put in planes first."""
        if planes:
            return self._encode_planes(content)
        if self._store and _is_hole(content):
            # Stored, the holes of a sparse file would take as much room as data.
            return self._dense(content)
        return self._usual(content)

    def _encode_planes(self, content: bytes) -> bytes:
        width = best_width(content, self._coarse)
        planes = split_planes(content, width)
        if width == 1:
            return self._usual(planes)

        # The first plane holds the exponents; the trial is made in the middle of it.
        middle = len(planes) // width // 2
        sample = planes[middle : middle + TABLE_TRIAL_SIZE]
        coarse = len(self._coarse(sample))
        fine = len(self._fine(sample))
        if fine < TABLE_TRIAL_GAIN * coarse:
            return self._fine(planes)

        return self._coarse(planes)


def _is_hole(content: bytes) -> bool:
    """Whether there are nothing but zeros."""
    if any(content[:TAR_BLOCK]):
        return False  # almost all content ends here, after a glance
    return content == bytes(len(content))
