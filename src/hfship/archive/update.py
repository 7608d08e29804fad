# SPDX-License-Identifier: Apache-2.0
"""What a medium brings that a site does not have: which archives are unpacked, and in which order.

Pure. Images come first, since models need them; an image of which only the new layers travel comes
after those that travel whole, as it may need theirs. Models go from what is here to the newest
version that is reachable, deltas in their order (archive/versions.py). What is here already, and
what is older than that, is left alone, and said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Mapping, Optional, Sequence, Tuple

from hfship.archive.versions import Lineage, choose
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.versions import Choice, FoundArchive, Version

# What becomes of an offer.
BRING = "bring"  # it is unpacked, or tried: what is wrong with it is said by who tries
HERE = "here"
OLDER = "older"


@dataclass(frozen=True)
class Offer:
    """A model or an image on the medium, by its name, and the archives that carry it.

    Of archives that cannot be read, and of those of other programs, there are none in `found`.
    """

    name: str
    found: Tuple[FoundArchive, ...] = ()
    is_image: bool = False


@dataclass(frozen=True)
class Here:
    """What a site has of a model: the version that is in place, whole as far as a look tells, and
    earlier ones that are kept."""

    present: Optional[Version] = None
    is_whole: bool = False
    kept: Tuple[Version, ...] = ()


@dataclass(frozen=True)
class UpdateStep:
    """What becomes of an offer: from version `before` to `after`, None where neither is known."""

    offer: Offer
    action: str
    before: Optional[Version] = None
    after: Optional[Version] = None

    def text(self) -> str:
        """For people: what would be done.

        >>> UpdateStep(Offer("m"), BRING).text()
        'm: to be unpacked'
        """
        name = self.offer.name
        if self.action == HERE and self.after:
            return f"{name}: {self.after.label} is here"
        if self.action == OLDER and self.after and self.before:
            return f"{name}: {self.after.label} is older than {self.before.short}, which is here"
        if self.before and self.after and self.before.id != self.after.id:
            return f"{name}: {self.before.label} -> {self.after.short}"
        if self.after:
            return f"{name}: {self.after.label}, new here"
        return f"{name}: to be unpacked"


def plan_update(
    offers: Sequence[Offer], here: Mapping[str, Here], allow_older: bool = False
) -> List[UpdateStep]:
    """What becomes of each offer, in the order in which it is done."""
    steps = []
    for offer in sorted(offers, key=_order):
        has = here.get(offer.name, Here())
        step = _step(offer, has, allow_older)
        steps.append(step)
    return steps


def _order(offer: Offer) -> Tuple[bool, bool, str]:
    needs_others = offer.is_image and all(one.is_delta for one in offer.found)
    return not offer.is_image, needs_others, offer.name


def _step(offer: Offer, here: Here, allow_older: bool) -> UpdateStep:
    if offer.is_image or not offer.found:  # the engine says whether it has an image
        return UpdateStep(offer, BRING)
    present = here.present
    choice = choose(offer.found, offer.found, present, here.kept)
    after = _wanted(choice)
    if present is None or after is None:
        return UpdateStep(offer, BRING, present, after)
    is_same = after.id == present.id and after.sums <= present.sums
    if is_same and here.is_whole:
        return UpdateStep(offer, HERE, present, after)
    if not allow_older and Lineage(offer.found, present).is_older(after, present):
        return UpdateStep(offer, OLDER, present, after)
    return UpdateStep(offer, BRING, present, after)


def _wanted(choice: Choice) -> Optional[Version]:
    """The version that will be in place; of a delta without a base the one that it carries."""
    if choice.lacks_base:
        return choice.lacks_base.version
    if choice.chain:
        return choice.chain[-1].version
    return None
