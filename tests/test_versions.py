"""Of all archives of a model, wherever they lie, the newest version is unpacked, deltas in order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import FrozenSet, List, Optional, Sequence

import pytest

from hfship.archive.files import ArchiveFiles
from hfship.archive.versions import Choice, FoundArchive, Lineage, Version, choose, version_of
from hfship.base.manifest import FileEntry, Source, make_manifest


def version(name: str, sums: str = "", fetched_at: str = "") -> Version:
    """A version called by one letter; `sums` are the files that it has, a letter each."""
    return Version(name, "org/m", name, fetched_at, frozenset(sums))


def whole(of: Version, place: str = "t") -> FoundArchive:
    return FoundArchive(ArchiveFiles(Path(place), f"m-{of.id}.tar.zst", {}), "m", of)


def delta(of: Version, base: Version, says: bool = True, place: str = "t") -> FoundArchive:
    """What `pack --since base` makes of a version; it `says` so since hfship-delta/2."""
    files = ArchiveFiles(Path(place), f"m-{base.id}-{of.id}.delta.tar.zst", {})
    needs = of.sums & base.sums
    return FoundArchive(files, "m", of, True, base.id if says else "", needs)


# c is a file that never changes: by it alone every delta fits every version.
A, B = version("a", "c1"), version("b", "c2")
C, D = version("c", "c3x"), version("d", "c4x")
OLD, NEW = version("a", "c1", "2026-01-01"), version("b", "c2", "2026-02-01")


@pytest.mark.parametrize(
    "found, present, taken",
    [
        ([whole(A)], None, ["m-a"]),
        # the old version and a delta beside it, in whatever order
        ([whole(A), delta(B, A)], None, ["m-a", "m-a-b.delta"]),
        ([delta(B, A), whole(A)], None, ["m-a", "m-a-b.delta"]),
        ([whole(A), delta(B, A)], A, ["m-a-b.delta"]),
        ([whole(A), delta(B, A)], B, ["m-a-b.delta"]),
        # alone
        ([delta(B, A)], A, ["m-a-b.delta"]),
        # a chain
        ([delta(D, C), delta(C, A), whole(A)], None, ["m-a", "m-a-c.delta", "m-c-d.delta"]),
        ([delta(D, C), delta(C, A), whole(A)], C, ["m-c-d.delta"]),
        # the shorter way
        ([delta(D, B), delta(B, A), whole(A)], None, ["m-a", "m-b-d.delta"]),
        ([whole(A), delta(B, A), whole(B)], None, ["m-b"]),
        # to mend what is there, a whole one
        ([delta(B, A), whole(B)], B, ["m-b"]),
        # without a delta between them, by the time of the fetch
        ([whole(OLD), whole(NEW)], None, ["m-b"]),
        ([whole(NEW), whole(OLD)], OLD, ["m-b"]),
        # of which nothing is known, the first
        ([whole(B), whole(A)], None, ["m-b"]),
        ([whole(A, "here"), whole(A, "there")], None, ["m-a"]),
        # a delta that does not say what it was packed since
        ([whole(OLD), delta(NEW, OLD, says=False)], None, ["m-a", "m-a-b.delta"]),
        # an older version that was fetched again is older nevertheless
        ([whole(version("a", "c1", "2027")), delta(NEW, OLD)], None, ["m-a", "m-a-b.delta"]),
        # what has nothing in common with its base needs none
        ([delta(version("b", "2"), version("a", "1"))], None, ["m-a-b.delta"]),
    ],
)
def test_the_newest_is_taken(
    found: List[FoundArchive], present: Optional[Version], taken: List[str]
) -> None:
    choice = choose(found, found, present)
    assert [archive.files.name[: -len(".tar.zst")] for archive in choice.chain] == taken
    assert choice.lacks_base is None


def test_what_is_named_is_taken_and_what_lies_beside_it_helps() -> None:
    beside = [whole(A), delta(B, A), delta(C, B)]
    named = delta(B, A)
    assert choose([named, *beside], [named]).chain == (beside[0], named)
    assert choose(beside, [beside[0]]).chain == (beside[0],)


def test_a_delta_without_base_is_told_and_what_could_be_taken_instead() -> None:
    lonely = delta(C, version("b", "c3"))
    choice = choose([whole(version("a", "cz")), lonely], [whole(version("a", "cz")), lonely])
    assert choice.lacks_base == lonely and [one.version.id for one in choice.chain] == ["a"]
    assert choose([lonely], [lonely]) == ((), lonely)
    assert choose([lonely], [lonely], bases=[version("x", "c3")]).chain == (lonely,)


def test_older_is_known_of_deltas_and_of_times() -> None:
    lineage = Lineage([delta(B, A), delta(C, B)])
    assert lineage.is_older(A, C) and not lineage.is_older(C, A) and not lineage.is_older(A, A)
    assert not lineage.is_older(A, version("x")) and not lineage.is_older(version("x"), A)
    assert Lineage([]).is_older(OLD, NEW) and not Lineage([]).is_older(NEW, OLD)
    # There and back again: none is older by that.
    circle = Lineage([delta(B, A), delta(A, B)])
    assert not circle.is_older(A, A) and {*circle.ancestors(A)} == {"b"}


@pytest.mark.parametrize("seed", range(300))
def test_any_archives_in_any_place_lead_to_the_newest_that_can_be_reached(seed: int) -> None:
    """History is a row of versions, each with some files of the one before. Of it some archives are
    left, whole ones and deltas, in any order; on site is one of the versions, or none."""
    rng = random.Random(seed)
    history = _history(rng)
    timed = rng.random() < 0.5
    if timed:
        history = [
            Version(one.id, one.repo, one.commit, f"2026-01-{number:02}", one.sums)
            for number, one in enumerate(history, 1)
        ]
    found = [whole(one) for one in history if rng.random() < 0.3]
    steps = [delta(new, old) for old, new in zip(history, history[1:])]
    if timed:  # without times, only an unbroken row of deltas tells what is older
        steps = [step for step in steps if rng.random() < 0.7]
    found += steps
    rng.shuffle(found)
    present = rng.choice([None, *history])

    choice = choose(found, found, present)

    have = present.sums if present else frozenset()
    for archive in choice.chain:  # each fits what is there when its turn comes
        assert archive.needs <= have
        have = archive.version.sums
    if not found:
        assert choice == Choice()
        return

    order = [one.id for one in history]
    newest = max((archive.version for archive in found), key=lambda one: order.index(one.id))
    reachable = _reachable(found, present)
    if choice.lacks_base:
        assert choice.lacks_base.version == newest and newest.id not in reachable
    else:
        assert choice.chain[-1].version == newest
    if choice.chain:
        best = max(reachable, key=order.index)
        assert choice.chain[-1].version.id == best
        older = present and order.index(best) < order.index(present.id)
        assert Lineage(found, present).is_older(choice.chain[-1].version, present or A) == bool(
            older
        )


def _history(rng: random.Random) -> List[Version]:
    """Versions with one to three new files each; what they keep of the one before is random."""
    versions: List[Version] = []
    kept: List[str] = ["config"]
    for number in range(rng.randint(1, 6)):
        kept = [name for name in kept if name == "config" or rng.random() < 0.6]
        kept += [f"{number}.{index}" for index in range(rng.randint(1, 3))]
        name = f"{number:040x}"
        versions.append(Version(name, "org/m", name, "", frozenset(kept)))
    return versions


def _reachable(found: Sequence[FoundArchive], present: Optional[Version]) -> FrozenSet[str]:
    """The ids of all versions that can be made, by trying again until nothing changes."""
    have = [frozenset[str]()] if present is None else [frozenset(), present.sums]
    reached: List[str] = []
    for _ in found:
        for archive in found:
            if any(archive.needs <= sums for sums in have):
                have.append(archive.version.sums)
                reached.append(archive.version.id)
    return frozenset(reached)


def test_a_version_is_its_commit_or_its_files() -> None:
    files = [FileEntry("a", 1, "0" * 64), FileEntry("b", 1, "1" * 64)]
    source = Source("http://hub", "org/m", "main", "org/m", "c" * 40, fetched_at="2026")
    known = version_of(make_manifest("m", files, source))
    assert (known.id, known.label, known.fetched_at) == ("c" * 40, "commit ccccccc", "2026")
    local = version_of(make_manifest("m", files))
    assert local.id == version_of(make_manifest("n", reversed(files))).id and not local.commit
    assert local.id != version_of(make_manifest("m", files[:1])).id
    assert local.sums == {"0" * 64, "1" * 64}


COMMIT = Version("0123456789" * 4, "org/m", "0123456789" * 4)


@pytest.mark.parametrize(
    ("numbers", "is_delta", "base", "text"),
    [
        ((), False, "", "commit 0123456 in t/m.tar.zst"),
        ((1,), False, "", "commit 0123456 in t/m.tar.zst in 1 part"),
        ((1, 2), False, "", "commit 0123456 in t/m.tar.zst in 2 parts"),
        ((), True, "", "commit 0123456 in t/m.tar.zst, a delta"),
        ((), True, "f" * 40, "commit 0123456 in t/m.tar.zst, a delta since fffffff"),
        ((1, 2), True, "f" * 40, "commit 0123456 in t/m.tar.zst in 2 parts, a delta since fffffff"),
    ],
)
def test_what_is_said_of_an_archive(
    numbers: Sequence[int], is_delta: bool, base: str, text: str
) -> None:
    paths = {number: Path(f"t/m.tar.zst.{number:04}") for number in numbers}
    files = ArchiveFiles(Path("t"), "m.tar.zst", paths)
    assert FoundArchive(files, "m", COMMIT, is_delta, base).text() == text


def test_a_version_knows_all_that_it_is_made_of() -> None:
    found = [
        delta(B, A),
        delta(C, B),
        delta(C, A),
        delta(A, C),
    ]  # in a circle, by somebody's mistake
    lineage = Lineage(found)
    assert lineage.ancestors(C) == {"a", "b"}
    assert Lineage(found[:2]).ancestors(C) == {"a", "b"}
    assert Lineage(found[:1]).ancestors(C) == frozenset() == lineage.ancestors(D)
    assert Lineage([delta(B, A, says=False)]).ancestors(B) == frozenset()


def test_the_rank_of_a_version_is_that_of_the_newest_it_is_made_of() -> None:
    late_base = version("a", "c1", "2026-05-01")
    newer = version("b", "c2", "2026-02-01")
    lineage = Lineage([delta(newer, late_base), whole(late_base), whole(OLD)])
    assert lineage.rank(newer) == ("2026-05-01", 1, "2026-02-01")
    assert lineage.rank(late_base) == lineage.rank(OLD) == ("2026-05-01", 0, "2026-05-01")
    assert lineage.rank(D) == ("", 0, "")


def test_the_time_of_what_is_here_counts() -> None:
    """Of an archive whose own time nobody noted."""
    silent = version("a", "c1")
    assert not Lineage([whole(silent), whole(NEW)]).is_older(silent, NEW)
    assert Lineage([whole(silent), whole(NEW)], OLD).is_older(silent, NEW)
    assert not Lineage([whole(silent), whole(NEW)], OLD).is_older(NEW, silent)
    assert not Lineage([], OLD).is_older(OLD, OLD)


def test_of_several_bases_the_one_that_is_named_is_taken() -> None:
    """Though others have all that the delta needs, too; and what is here needs no archive."""
    twin = version("e", "c2")
    found = [whole(twin), whole(B), delta(D, B)]
    assert choose(found, found[2:]).chain == (found[1], found[2])
    unnamed = [whole(twin), whole(B), delta(D, B, says=False)]
    assert choose(unnamed, unnamed[2:]).chain == (unnamed[0], unnamed[2])
    alone = [delta(D, B)]
    assert choose(alone, alone).lacks_base == alone[0] and choose(alone, alone).chain == ()
    assert choose(alone, alone, bases=[B]) == Choice((alone[0],))
    assert choose(alone, alone, present=B) == Choice((alone[0],))


def test_a_whole_archive_mends_what_is_present_and_ways_are_short() -> None:
    found = [delta(B, A), whole(B), whole(A)]
    assert choose(found, found[:2], present=B).chain == (found[1],)
    assert choose(found, found[:2], present=A).chain == (found[0],), "the first of equals"
    far = [delta(B, A), whole(A), whole(B)]
    assert choose(far, far).chain == (far[2],), "and the shorter way"
    assert choose([], []) == Choice()
