# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's cards by name: what holds of each row of the table, and how they may be called."""

from __future__ import annotations

from typing import List

import pytest

from hfship.base.errors import UsageError
from hfship.serve.cards import CARDS, Card, advised_cards, assumed_gpus
from hfship.serve.terms import Gpu

# NVIDIA's list of compute capabilities (developer.nvidia.com/cuda-gpus), from Volta on, of cards.
CAPABILITIES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.label.replace(" ", "-"))
def test_the_memory_of_a_card_is_what_it_is_sold_with(card: Card) -> None:
    """In GiB, less what the driver takes; GDDR gives a sixteenth of it to the correction of errors
    where that is always on."""
    share = card.mebibytes / (1024 * card.gigabytes)
    usual, corrected = 0.99 <= share <= 1.0, 0.936 <= share <= 0.938
    assert usual or corrected, share
    assert card.capability in CAPABILITIES
    assert assumed_gpus(f"1x{card.name.replace(' ', '')}-{card.gigabytes}GB") == (
        Gpu(0, "GPU-assumed-0", card.label, card.mebibytes << 20, capability=card.capability),
    )


def test_cards_are_sorted_by_architecture() -> None:
    found = [card.capability for card in CARDS]
    assert found == sorted(found) and set(found) == set(CAPABILITIES)


@pytest.mark.parametrize(
    "names",
    [
        "A10 A10G",
        "A2 A16",
        "L2 L4",
        "L20 L40 L40S A40",
        "H100 H800",
        "A100 A800",
        "RTX_3090 TITAN_RTX A30 RTX_6000",
        "RTX_4090 RTX_A5000",
        "RTX_A6000 RTX_6000_Ada",
    ],
)
def test_cards_of_one_make_have_one_memory(names: str) -> None:
    first = {card.name: card for card in reversed(CARDS)}
    sizes = {first[name.replace("_", " ")].mebibytes for name in names.split()}
    assert len(sizes) == 1


def test_cards_of_several_sizes_are_told_apart() -> None:
    sizes = {card.label for card in CARDS}
    assert len(sizes) == len(CARDS)
    for name in ("V100", "A100", "A800", "H20", "GH200"):
        labels = [card.label for card in CARDS if card.name == name]
        assert len(labels) == 2 and assumed_gpus(f"1x{name}")[0].name == labels[0]


def test_what_advice_names_is_of_each_architecture_and_size() -> None:
    found = [card.label for card in advised_cards()]
    assert found == [
        "T4 16 GB",
        "L4 24 GB",
        "L40S 48 GB",
        "H100 80 GB",
        "A100 80 GB",
        "H20 96 GB",
        "H200 141 GB",
        "B200 180 GB",
    ]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1xH100", ["H100 80 GB"]),
        ("1x NVIDIA H100 SXM5", ["H100 80 GB"]),
        ("1xh100-pcie", ["H100 80 GB"]),
        ("1xH100_HBM3", ["H100 80 GB"]),
        ("1xH100 NVL", ["H100 NVL 94 GB"]),
        ("1xTesla V100-SXM", ["V100 16 GB"]),
        ("1xTesla V100 SXM4", ["V100 16 GB"]),
        ("1xV100-32G", ["V100 32 GB"]),
        ("1xQuadro RTX 8000", ["RTX 8000 48 GB"]),
        ("1xGeForce RTX 4090", ["RTX 4090 24 GB"]),
        ("1x4090", ["RTX 4090 24 GB"]),
        ("1xRTX PRO 6000", ["RTX PRO 6000 96 GB"]),
        ("2xA100-40GB + 1xL4", ["A100 40 GB", "A100 40 GB", "L4 24 GB"]),
        ("1x24gib, 1x1 TB ", ["assumed", "assumed"]),
    ],
)
def test_how_cards_may_be_called(text: str, labels: List[str]) -> None:
    found = assumed_gpus(text)
    assert [gpu.name for gpu in found] == labels
    assert [(gpu.index, gpu.uuid) for gpu in found] == [
        (number, f"GPU-assumed-{number}") for number in range(len(labels))
    ]


def test_memory_alone_is_a_card_of_which_no_more_is_known() -> None:
    first, second = assumed_gpus("1x24GiB,1x80GB")
    assert (first.total, second.total) == (24 << 30, 80 * 10**9)
    assert first.capability == (0, 0) and first.name == "assumed"


@pytest.mark.parametrize("text", ["", "H100", "0xH100", "100xH100", "2x", "2xH100,,1xL4", "axL4"])
def test_what_is_no_set_of_cards(text: str) -> None:
    with pytest.raises(UsageError, match="is not a set of GPUs") as told:
        assumed_gpus(text)
    assert told.value.next_step == "write it like 2xH100 or 2x80GB"


@pytest.mark.parametrize(("text", "near"), [("1xh10", "H100"), ("1xzzzzz", "A100")])
def test_a_card_that_nobody_knows_is_told_with_one_that_is_near(text: str, near: str) -> None:
    with pytest.raises(UsageError, match="no NVIDIA card is called") as told:
        assumed_gpus(text)
    assert near in told.value.next_step or (near == "H100" and "2xH" in told.value.next_step)
    assert "RTX4090" in told.value.why and told.value.why.count("A100") == 1
