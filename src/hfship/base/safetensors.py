# SPDX-License-Identifier: Apache-2.0
"""Headers of safetensors files: which tensors a file holds, and whether it is whole.

A file (the Format section of safetensors' README; integers are little-endian):

    0      8  N, the length of the header
    8      N  JSON: for each name of a tensor {"dtype": "BF16", "shape": [...],
              "data_offsets": [begin, end]}; and "__metadata__", a table of texts
    8 + N  .  the tensors; the offsets count from here, and leave no gap and no overlap

Promises: a header comes from outside, so every number in it is checked against the size of its
file. Never: reads a tensor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple

from hfship.base.below import open_regular
from hfship.base.errors import IntegrityError
from hfship.base.files import disk_error
from hfship.base.manifest import BRING_AGAIN
from hfship.base.reading import parse_json
from hfship.base.text import human_bytes

LENGTH_SIZE = 8  # bytes in front of the header
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit: MAX_HEADER_SIZE in safetensors


class TensorSpan(NamedTuple):
    """Where a tensor lies, in bytes after the header. The offsets are not checked yet."""

    begin: int
    end: int
    dtype: str

    def follows(self, offset: int) -> bool:
        """Whether the tensor begins there, and its offsets are whole numbers in order."""
        if type(self.begin) is not int or type(self.end) is not int:
            return False
        return self.begin == offset <= self.end


def tensor_bytes(header: bytes, data_size: int) -> Mapping[str, int]:
    """Bytes per dtype that a header describes; `data_size` bytes follow it in the file.

    Raises ValueError unless the tensors fill these without gap or overlap, as the format demands.

    >>> tensor_bytes(b'{"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}', 4)
    {'BF16': 4}
    """
    totals: Dict[str, int] = {}
    end = 0
    for span in _tensor_spans(header):
        if not span.follows(end):
            raise ValueError(f"the header has a gap or an overlap at byte {end}")
        size = span.end - end
        totals.setdefault(span.dtype, 0)
        totals[span.dtype] += size
        end = span.end

    if end > data_size:
        raise ValueError(f"the file is cut: {human_bytes(end - data_size)} are missing")
    if end < data_size:
        raise ValueError(f"{human_bytes(data_size - end)} follow the last tensor")

    return totals


def _tensor_spans(header: bytes) -> List[TensorSpan]:
    """The spans of all tensors, in the order of their offsets. Raises ValueError."""
    spans: List[TensorSpan] = []
    try:
        for name, tensor in parse_json(header).items():
            if name == "__metadata__":
                continue
            offsets = tensor["data_offsets"]
            dtype = str(tensor["dtype"])
            spans.append(TensorSpan(offsets[0], offsets[1], dtype))
        return sorted(spans)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as exc:
        kind = type(exc).__name__
        raise ValueError(f"the header is not a safetensors header ({kind})") from exc


def read_tensor_bytes(path: Path) -> Mapping[str, int]:
    """Bytes per dtype of one safetensors file.

    Raises IntegrityError that names the file, DiskError.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < LENGTH_SIZE:
                raise ValueError(f"the file has {size} bytes, less than a safetensors header")
            length = int.from_bytes(stream.read(LENGTH_SIZE), "little")
            data_size = size - LENGTH_SIZE - length
            if length > HEADER_LIMIT:
                raise ValueError(f"the header claims {length} bytes: not a safetensors file")
            if data_size < 0:
                raise ValueError(
                    f"the file is cut: its header has {length} bytes, the whole file {size}"
                )
            return tensor_bytes(stream.read(length), data_size)
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    except ValueError as exc:
        raise IntegrityError(f"{path} is damaged", str(exc), BRING_AGAIN) from exc
