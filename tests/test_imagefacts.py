# SPDX-License-Identifier: Apache-2.0
"""What a manifest says of an image: read back as it was written, and nothing else believed."""

from __future__ import annotations

import json
from typing import Any, Dict

import pytest

from hfship.base.imagefacts import MOST_LAYERS, ImageFacts, layer_paths, read_facts

SUMS = [f"sha256:{digit * 64}" for digit in "0123456789"]
FACTS = ImageFacts(
    reference="docker.io/vllm/vllm-openai:v1",
    digest=SUMS[0],
    manifest_digest=SUMS[1],
    config_digest=SUMS[2],
    diff_ids=(SUMS[3], SUMS[4]),
    platform="linux/amd64",
)
VALUE: Dict[str, Any] = FACTS.json()


def test_facts_are_read_as_they_were_written() -> None:
    assert read_facts(json.loads(json.dumps(VALUE))) == FACTS
    assert FACTS.digests == (SUMS[2], SUMS[1], SUMS[0])


@pytest.mark.parametrize("layers", [1, MOST_LAYERS])
def test_an_image_has_layers_but_not_too_many(layers: int) -> None:
    assert len(read_facts({**VALUE, "diff_ids": [SUMS[5]] * layers}).diff_ids) == layers


@pytest.mark.parametrize("name", sorted(VALUE))
def test_each_fact_has_to_be_there_and_right(name: str) -> None:
    with pytest.raises(KeyError):
        read_facts({key: value for key, value in VALUE.items() if key != name})
    with pytest.raises((ValueError, TypeError)):
        read_facts({**VALUE, name: "x"})
    with pytest.raises((ValueError, TypeError)):
        read_facts({**VALUE, name: 7})


@pytest.mark.parametrize(
    "change",
    [
        {"diff_ids": []},
        {"diff_ids": [SUMS[5]] * (MOST_LAYERS + 1)},
        {"diff_ids": [SUMS[5], "sha256:x"]},
        {"reference": "vllm"},
        {"reference": ":v1"},
        {"reference": "a b:v1"},
        {"reference": "a:v 1"},
    ],
)
def test_what_is_no_image_is_refused(change: Dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        read_facts({**VALUE, **change})


@pytest.mark.parametrize("text", [b"", b"[]", b"[{}]", b"[3]", b"null", b'[{"Layers": 3}]'])
def test_another_file_has_no_layers(text: bytes) -> None:
    assert layer_paths(text) == ()
