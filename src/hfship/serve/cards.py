# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's cards by name: for planning machines that are not here, and for advice what to buy.

Memory is what nvidia-smi prints as memory.total, in MiB: read from machines or from published
output. Never: asks this machine.
"""

from __future__ import annotations

import re
from typing import List, NamedTuple, Sequence, Tuple

from hfship.base.errors import UsageError, closest
from hfship.base.settings import parse_size
from hfship.base.values import replace
from hfship.serve.terms import Capability, Gpu


class Card(NamedTuple):
    """A card, and the GB that it is sold with. `advised`: among those that advice names."""

    name: str
    gigabytes: int
    mebibytes: int
    capability: Capability
    advised: bool = False

    @property
    def label(self) -> str:
        """With the size that it is sold with.

        >>> Card("T4", 16, 15360, (7, 5)).label
        'T4 16 GB'
        """
        return f"{self.name} {self.gigabytes} GB"


# By architecture, then by size; the first of several sizes is meant where none is named.
CARDS: Sequence[Card] = (
    Card("V100", 16, 16384, (7, 0)),
    Card("V100", 32, 32768, (7, 0)),
    Card("T4", 16, 15360, (7, 5), advised=True),
    Card("RTX 2080 Ti", 11, 11264, (7, 5)),
    Card("TITAN RTX", 24, 24576, (7, 5)),
    Card("RTX 6000", 24, 24576, (7, 5)),
    Card("RTX 8000", 48, 49152, (7, 5)),
    Card("A100", 80, 81920, (8, 0), advised=True),
    Card("A100", 40, 40960, (8, 0)),
    Card("A800", 80, 81920, (8, 0)),
    Card("A800", 40, 40960, (8, 0)),
    Card("A30", 24, 24576, (8, 0)),
    Card("A2", 16, 15356, (8, 6)),
    Card("A10", 24, 23028, (8, 6)),
    Card("A10G", 24, 23028, (8, 6)),
    Card("A16", 16, 15356, (8, 6)),
    Card("A40", 48, 46068, (8, 6)),
    Card("RTX 3060", 12, 12288, (8, 6)),
    Card("RTX 3090", 24, 24576, (8, 6)),
    Card("RTX A4000", 16, 16376, (8, 6)),
    Card("RTX A4500", 20, 20470, (8, 6)),
    Card("RTX A5000", 24, 24564, (8, 6)),
    Card("RTX A6000", 48, 49140, (8, 6)),
    Card("L2", 24, 23034, (8, 9)),
    Card("L4", 24, 23034, (8, 9), advised=True),
    Card("L20", 48, 46068, (8, 9)),
    Card("L40", 48, 46068, (8, 9)),
    Card("L40S", 48, 46068, (8, 9), advised=True),
    Card("RTX 4060 Ti", 16, 16380, (8, 9)),
    Card("RTX 4070 Ti", 16, 16376, (8, 9)),
    Card("RTX 4080", 16, 16376, (8, 9)),
    Card("RTX 4090", 24, 24564, (8, 9)),
    Card("RTX 4000 Ada", 20, 20475, (8, 9)),
    Card("RTX 4500 Ada", 24, 24570, (8, 9)),
    Card("RTX 5000 Ada", 32, 32760, (8, 9)),
    Card("RTX 6000 Ada", 48, 49140, (8, 9)),
    Card("H100", 80, 81559, (9, 0), advised=True),
    Card("H100 NVL", 94, 95830, (9, 0)),
    Card("H800", 80, 81559, (9, 0)),
    Card("H20", 96, 97871, (9, 0), advised=True),
    Card("H20", 141, 143771, (9, 0)),
    Card("H200", 141, 143771, (9, 0), advised=True),
    Card("H200 NVL", 141, 143771, (9, 0)),
    Card("GH200", 96, 97871, (9, 0)),
    Card("GH200", 144, 147456, (9, 0)),
    Card("B100", 180, 183359, (10, 0)),
    Card("B200", 180, 183359, (10, 0), advised=True),
    Card("GB200", 186, 189471, (10, 0)),
    Card("B300", 270, 275040, (10, 3)),
    Card("GB300", 279, 284208, (10, 3)),
    Card("RTX 5060 Ti", 16, 16311, (12, 0)),
    Card("RTX 5070 Ti", 16, 16303, (12, 0)),
    Card("RTX 5080", 16, 16303, (12, 0)),
    Card("RTX 5090", 32, 32607, (12, 0)),
    Card("RTX PRO 4000", 24, 24467, (12, 0)),
    Card("RTX PRO 4500", 32, 32623, (12, 0)),
    Card("RTX PRO 5000", 48, 48935, (12, 0)),
    Card("RTX PRO 6000", 96, 97887, (12, 0)),
    Card("GB10", 119, 121856, (12, 1)),
)


_MEMORY = re.compile(r"[\d.]+\s*[kMGT]i?B?\Z", re.ASCII | re.IGNORECASE)


def advised_cards() -> List[Card]:
    """What advice names, smallest first."""
    advised = [card for card in CARDS if card.advised]
    return sorted(advised, key=lambda card: card.mebibytes)


def assumed_gpus(text: str) -> Tuple[Gpu, ...]:
    """GPUs of a machine that is planned for from afar, like 2x80GB, 2xH100 or 4xL40S,1xA100-40GB.

    Raises UsageError.

    >>> [gpu.label for gpu in assumed_gpus("2x80GB,1xh100")]
    ['GPU 0 (assumed, 80.0 GB)', 'GPU 1 (assumed, 80.0 GB)', 'GPU 2 (H100 80 GB, 85.5 GB)']
    """
    gpus: List[Gpu] = []
    for group in re.split(r"[,+]", text):
        match = re.match(r"\s*([1-9]\d?)x(.+?)\s*\Z", group, re.ASCII)
        if not match:
            why = "it is COUNTxCARD or COUNTxMEMORY, several with commas between them"
            raise UsageError(
                f"{text!r} is not a set of GPUs", why, "write it like 2xH100 or 2x80GB"
            )
        card = _card_called(match[2])
        for _ in range(int(match[1])):
            index = len(gpus)
            gpus.append(replace(card, index=index, uuid=f"GPU-assumed-{index}"))

    return tuple(gpus)


def _card_called(text: str) -> Gpu:
    """The card that is called so, or one with so much memory. Raises UsageError."""
    wanted = _plain(text)
    for card in CARDS:
        if wanted in _names_of(card):
            total = card.mebibytes << 20
            return Gpu(0, "", card.label, total, capability=card.capability)

    if _MEMORY.match(text):
        return Gpu(0, "", "assumed", parse_size(text))

    known = sorted({card.name.replace(" ", "") for card in CARDS})
    near = closest(text.upper(), known) or "A100"
    raise UsageError(
        f"no NVIDIA card is called {text!r}",
        "known are " + ", ".join(known),
        f"write a known name, like 2x{near}, or its memory, like 2x24GB",
    )


def _plain(text: str) -> str:
    """
    >>> _plain("NVIDIA RTX 4090"), _plain("a100-40gb")
    ('4090', 'A10040GB')
    """
    plain = re.sub(r"[\s_-]|NVIDIA|GEFORCE|TESLA|QUADRO", "", text.upper())
    return re.sub(r"\ARTX(?=\d{4})", "", plain)


def _names_of(card: Card) -> Sequence[str]:
    """How a card may be called: with its size, too, and with its form where that is told."""
    plain = _plain(card.name)
    sized = f"{plain}{card.gigabytes}"
    forms = [f"{plain}{form}" for form in ("SXM", "SXM4", "SXM5", "PCIE", "HBM3")]
    return (plain, f"{sized}GB", f"{sized}G", *forms)
