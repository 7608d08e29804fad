# SPDX-License-Identifier: Apache-2.0
"""The versions of a model that archives carry, and which of these are unpacked, in which order.

Owns what *older* means. A version is known by its commit; without one, by its files. It is older
than what a delta made of it; where no delta tells, the time of the fetch does. What a delta needs
are files, by their SHA-256: whatever version has them is a base for it. Pure.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Set, Tuple

from hfship.base.text import counted
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.manifest import Manifest

_DIGEST = 64  # digits of what a registry calls a version of an image
_SHORT = 7  # digits of a commit that people read, as git shows them


@dataclass(frozen=True)
class Version:
    """A version of a model: `id` is its commit or, where it has none, the SHA-256 of its list of
    files; `sums` are the SHA-256 of these. What is not known is empty."""

    id: str
    repo: str = ""
    commit: str = ""
    fetched_at: str = ""
    sums: FrozenSet[str] = frozenset()

    @property
    def label(self) -> str:
        """How people call it.

        >>> Version("0" * 40, commit="0" * 40).label, Version("f" * 64).label
        ('commit 0000000', 'version fffffff')
        >>> Version("a" * 64, commit="a" * 64).label
        'digest aaaaaaa'
        """
        kind = "version"
        if self.commit:
            kind = "commit"
        if len(self.commit) == _DIGEST:
            kind = "digest"
        return f"{kind} {self.short}"

    @property
    def short(self) -> str:
        """The first digits of its id."""
        return self.id[:_SHORT]


@dataclass(frozen=True)
class FoundArchive:
    """An archive found at a place: which files it consists of, and what it carries.

    `name` is that of the model. Of a delta, `needs` are the SHA-256 of the files that it leaves
    out, and `base` is the id of the version that it was packed since; empty where it does not say.
    """

    files: ArchiveFiles
    name: str
    version: Version
    is_delta: bool = False
    base: str = ""
    needs: FrozenSet[str] = frozenset()

    def text(self) -> str:
        """`commit 052469e in DIR/NAME.delta.tar.zst, a delta since 9f86d08`"""
        text = f"{self.version.label} in {self.files.place}"
        if self.files.numbers:
            text += f" in {counted(len(self.files.numbers), 'part')}"
        if self.is_delta:
            text += ", a delta"
        if self.base:
            text += f" since {self.base[:_SHORT]}"
        return text


def version_of(manifest: Manifest) -> Version:
    """The version that a manifest lists."""
    sums = frozenset(entry.sha256 for entry in manifest.files)
    source = manifest.source
    if source:
        return Version(
            source.commit,
            source.resolved_repo,
            source.commit,
            source.fetched_at,
            sums,
        )

    digest = hashlib.sha256()
    for entry in manifest.files:
        digest.update(f"{entry.sha256}  {entry.path}\n".encode())
    return Version(digest.hexdigest(), sums=sums)


# -- older and newer


class Lineage:
    """Which versions are made of which, as the deltas among some archives tell."""

    def __init__(self, found: Sequence[FoundArchive], present: Optional[Version] = None) -> None:
        self._times: Dict[str, str] = {}  # id -> when it was fetched, the last time
        self._bases: Dict[str, Set[str]] = {}  # id -> ids of those that it was packed since
        versions = [archive.version for archive in found]
        if present:
            versions.append(present)

        for version in versions:
            known = self._times.get(version.id, "")
            self._times[version.id] = max(known, version.fetched_at)

        for archive in found:
            if archive.base:
                bases = self._bases.setdefault(archive.version.id, set())
                bases.add(archive.base)

    def ancestors(self, version: Version) -> FrozenSet[str]:
        """The ids of all that it is made of."""
        ancestors: Set[str] = set()
        to_follow = [version.id]
        while to_follow:
            bases = self._bases.get(to_follow.pop(), set())
            new = bases - ancestors
            ancestors |= new
            to_follow += new

        return frozenset(ancestors - {version.id})

    def rank(self, version: Version) -> Tuple[str, int, str]:
        """A key that sorts from old to new: a version never comes before what it is made of."""
        ancestors = self.ancestors(version)
        own_time = self._times.get(version.id, version.fetched_at)
        times = [self._times.get(ancestor, "") for ancestor in ancestors]
        return max([own_time, *times]), len(ancestors), own_time

    def is_older(self, one: Version, other: Version) -> bool:
        """Whether it is known that `one` is older than `other`."""
        if one.id == other.id:
            return False
        if one.id in self.ancestors(other):
            return True
        if other.id in self.ancestors(one):
            return False

        time_of_one, *_ = self.rank(one)
        time_of_other, *_ = self.rank(other)
        return "" < time_of_one < time_of_other


# -- the choice


class Choice(NamedTuple):
    """The archives to unpack, one over the other; the last carries the version that is wanted.

    Empty, when nothing can be unpacked. `lacks_base` is a delta that carries a newer version, or
    the only one, for which no base was found.
    """

    chain: Tuple[FoundArchive, ...] = ()
    lacks_base: Optional[FoundArchive] = None


def choose(
    found: Sequence[FoundArchive],
    wanted: Sequence[FoundArchive],
    present: Optional[Version] = None,
    bases: Sequence[Version] = (),
) -> Choice:
    """The way to the newest version that one of `wanted` carries, all of them among `found`.

    Deltas go over what is `present`, over other versions that are here (`bases`), or over other
    archives.
    Of two of the same version the first is taken, but the whole one before a delta to mend what is
    present, and the shorter way.
    """
    starts = [version.sums for version in (present, *bases) if version]
    chains = _chains(found, starts)
    lineage = Lineage(found, present)

    def preference(number: int) -> Tuple[Tuple[str, int, str], bool, bool, int, int]:
        archive = found[number]
        is_present = present is not None and archive.version.id == present.id
        return (
            lineage.rank(archive.version),
            number in chains,
            is_present and not archive.is_delta,
            -len(chains.get(number, ())),
            -number,
        )

    best_first = sorted(range(len(found)), key=preference, reverse=True)
    best_first = [number for number in best_first if found[number] in wanted]
    reachable = [number for number in best_first if number in chains]
    chain: Tuple[FoundArchive, ...] = ()
    if reachable:
        chain = tuple(found[number] for number in chains[reachable[0]])
    if best_first[:1] == reachable[:1]:
        return Choice(chain)
    return Choice(chain, lacks_base=found[best_first[0]])


def _chains(
    found: Sequence[FoundArchive], starts: Sequence[FrozenSet[str]]
) -> Dict[int, Tuple[int, ...]]:
    """For each archive that can be unpacked, by its number, the shortest way to it, itself last."""
    chains: Dict[int, Tuple[int, ...]] = {}
    for number, archive in enumerate(found):
        if any(archive.needs <= start for start in (frozenset(), *starts)):
            chains[number] = (number,)

    frontier = list(chains)
    while frontier:
        following: List[int] = []
        for number, archive in enumerate(found):
            base = _base_among(found, frontier, archive)
            if number not in chains and base is not None:
                chains[number] = (*chains[base], number)
                following.append(number)
        frontier = following

    return chains


def _base_among(
    found: Sequence[FoundArchive], numbers: Sequence[int], delta: FoundArchive
) -> Optional[int]:
    """The archive with all files that a delta needs: the one that it was packed since, if any."""
    bases = [number for number in numbers if delta.needs <= found[number].version.sums]
    for number in bases:
        if found[number].version.id == delta.base:
            return number

    if bases:
        return bases[0]
    return None
