# SPDX-License-Identifier: Apache-2.0
"""Weights: headers of safetensors, and which files of a series or an index belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest

from hfship.base import weights
from hfship.base.errors import DiskError, IntegrityError
from hfship.base.manifest import BRING_AGAIN
from hfship.base.safetensors import HEADER_LIMIT, TensorSpan, read_tensor_bytes, tensor_bytes
from hfship.base.weights import (
    missing_of_those,
    missing_shards,
    shards_named,
    whole_series,
)


def tensor(begin: Any, end: Any, dtype: str = "F32") -> Dict[str, Any]:
    return {"dtype": dtype, "shape": [1], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "tensors, size, found",
    [
        ({}, 0, {}),
        (
            {"b": tensor(4, 10), "a": tensor(0, 4, "BF16"), "c": tensor(10, 12)},
            12,
            {"BF16": 4, "F32": 8},
        ),
        ({"a": tensor(0, 0)}, 0, {"F32": 0}),
        ({"__metadata__": {"format": "pt"}, "a": tensor(0, 4)}, 4, {"F32": 4}),
        ({"a": tensor(0, 4), "b": tensor(5, 6)}, 6, "a gap or an overlap at byte 4"),
        ({"a": tensor(0, 4), "b": tensor(3, 6)}, 6, "a gap or an overlap at byte 4"),
        ({"a": tensor(1, 4)}, 4, "a gap or an overlap at byte 0"),
        ({"a": tensor(0, -1)}, 0, "a gap or an overlap at byte 0"),
        ({"a": tensor(0.0, 4)}, 4, "a gap or an overlap"),
        ({"a": tensor(0, 4.0)}, 4, "a gap or an overlap"),
        ({"a": tensor(False, 4)}, 4, "a gap or an overlap"),
        ({"a": tensor(0, 2000)}, 1, "the file is cut: 2.0 kB are missing"),
        ({"a": tensor(0, 1)}, 2001, "2.0 kB follow the last tensor"),
        ({"a": {"dtype": "F32"}}, 0, r"is not a safetensors header \(KeyError\)"),
        ({"a": {"data_offsets": [0, 1]}}, 1, r"\(KeyError\)"),
        ({"a": {"dtype": "F32", "data_offsets": [0]}}, 0, r"\(IndexError\)"),
        ({"a": tensor("0", 4), "b": tensor(0, 4)}, 4, r"\(TypeError\)"),
        ({"a": 7}, 0, r"\(TypeError\)"),
        ([], 0, r"\(AttributeError\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_header_describes_each_byte(tensors: Any, size: int, found: Any) -> None:
    header = json.dumps(tensors).encode()
    if isinstance(found, dict):
        assert tensor_bytes(header, size) == found
        return
    with pytest.raises(ValueError, match=found):
        tensor_bytes(header, size)


def test_a_tensor_follows_another() -> None:
    assert TensorSpan(4, 4, "").follows(4) and TensorSpan(4, 5, "").follows(4)
    assert not TensorSpan(4, 3, "").follows(4) and not TensorSpan(5, 6, "").follows(4)


def whole(size: int, header: bytes, behind: bytes = b"") -> bytes:
    return size.to_bytes(8, "little") + header + behind


HEADER = json.dumps({"a": tensor(0, 4)}).encode()


@pytest.mark.parametrize(
    "content, found",
    [
        (whole(len(HEADER), HEADER, b"1234"), {"F32": 4}),
        (whole(len(HEADER), HEADER, b"123"), "the file is cut: 1 B are missing"),
        (whole(len(HEADER), HEADER[:-1]), f"its header has {len(HEADER)} bytes, the whole file"),
        (b"1234567", "the file has 7 bytes, less than a safetensors header"),
        (b"", "the file has 0 bytes"),
        (whole(0, b""), r"is not a safetensors header \(ValueError|JSONDecodeError\)"),
        (
            whole(HEADER_LIMIT + 1, b"x"),
            "the header claims 100000001 bytes: not a safetensors file",
        ),
        (whole(HEADER_LIMIT, b"x"), "the file is cut: its header has 100000000 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_file_says_of_itself(content: bytes, found: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    if isinstance(found, dict):
        assert read_tensor_bytes(path) == found
        return
    with pytest.raises(IntegrityError) as caught:
        read_tensor_bytes(path)
    assert caught.value.what == f"{path} is damaged" and caught.value.next_step == BRING_AGAIN
    with pytest.raises(IntegrityError, match="damaged"):
        read_tensor_bytes(path)
    import re

    assert re.search(found, caught.value.why)
    with pytest.raises(DiskError, match="cannot read"):
        read_tensor_bytes(tmp_path / "none")


# -- which belong together


def shards(total: int, *numbers: int, name: str = "m") -> List[str]:
    return [f"{name}-{number:05}-of-{total:05}.safetensors" for number in numbers]


def test_a_series_is_known_by_one_of_it() -> None:
    assert whole_series(["x", *shards(3, 2)]) == {"x", *shards(3, 1, 2, 3)}
    for name in ("m-00001-of-10002.safetensors", "m-1-of-2.safetensors", "m-00001-of-00002.bin"):
        assert whole_series([name]) == {name}


def index(folder: Path, path: str, *names: Any) -> str:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"weight_map": {str(n): name for n, name in enumerate(names)}}))
    return path


MAIN, OTHER = "model.safetensors.index.json", "consolidated.safetensors.index.json"


@pytest.mark.parametrize(
    "indexes, paths, missing",
    [
        ({}, shards(3, 1, 3), shards(3, 2)),
        ({}, [*shards(2, 1, 2), *shards(2, 1, name="n")], shards(2, 2, name="n")),
        ({}, ["config.json"], []),
        ({MAIN: ["a", "b"]}, ["a"], ["b"]),
        ({MAIN: ["a", "b"]}, ["c.safetensors"], ["a", "b"]),  # vLLM goes by it
        ({OTHER: ["a", "b"]}, ["a"], ["b"]),
        ({OTHER: ["a", "b"]}, ["c.safetensors"], []),  # of another format
        ({OTHER: ["a", "b"]}, ["c.pth"], []),
        ({OTHER: ["a", "b"]}, ["pytorch_model.bin"], []),
        ({OTHER: ["a", "b"]}, ["pytorch_model-1.bin"], []),
        ({OTHER: ["a", "b"]}, ["c.gguf"], []),
        ({OTHER: ["a", "b"]}, ["x.bin"], ["a", "b"]),
        ({OTHER: ["a", "b"]}, ["d/c.gguf"], ["a", "b"]),
        ({f"d/{OTHER}": ["a", "b"]}, ["d/c.gguf"], []),
        ({f"d/{MAIN}": ["a", "b"]}, ["d/a"], ["d/b"]),
        ({"pytorch_model.bin.index.fp16.json": ["a"]}, [], ["a"]),
        ({"x.index.json": ["a"]}, [], []),
    ],
    ids=str,
)
def test_what_is_missing(
    indexes: Dict[str, Sequence[str]], paths: List[str], missing: List[str], tmp_path: Path
) -> None:
    there = {index(tmp_path, path, *names) for path, names in indexes.items()}
    assert missing_shards(tmp_path, {*paths, *there}) == missing


@pytest.mark.parametrize(
    "value",
    [[], {}, {"weight_map": []}, {"weight_map": {"a": "../x"}}, {"weight_map": {"a": "/x"}}],
)
def test_an_index_that_is_none_is_damaged(value: Any, tmp_path: Path) -> None:
    (tmp_path / MAIN).write_text(json.dumps(value))
    with pytest.raises(IntegrityError) as caught:
        shards_named(tmp_path, MAIN)
    assert caught.value.what == f"{tmp_path}/{MAIN} is damaged"
    assert caught.value.why.startswith("it names no files of weights (")
    assert caught.value.next_step == BRING_AGAIN
    with pytest.raises(DiskError):
        shards_named(tmp_path, "none.json")


def test_hostile_numbers_ask_for_no_more_than_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_MOST_MISSING", 10)
    many = {one for n in range(50) for one in shards(9, 1, name=f"m{n}")}
    assert len(missing_shards(tmp_path, many)) == 16


def test_what_was_dropped_and_belongs_to_what_was_kept() -> None:
    series = shards(3, 1, 2, 3)
    assert missing_of_those({series[0]}, [series[2], "x", *shards(2, 1, name="n")]) == [series[2]]
    kept = {f"d/{MAIN}"}
    dropped = [*shards(2, 2, 1, name="d/n"), *shards(2, 1), "d/x.safetensors"]
    assert missing_of_those(kept, dropped) == shards(2, 1, 2, name="d/n")
    assert missing_of_those({"config.json"}, dropped) == []
