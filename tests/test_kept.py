# SPDX-License-Identifier: Apache-2.0
"""Versions that are kept beside NAME, on folders; test_update.py kills programs at every change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.archive import kept as room
from hfship.archive.kept import (
    KEPT_PATH,
    ROLLED_BACK_PATH,
    KeptVersion,
    drop,
    drop_beyond,
    go_back,
    kept_beyond,
    kept_versions,
    mend_place,
    put_aside,
    put_in_place,
    rolled_back_from,
)
from hfship.archive.versions import version_of
from hfship.base.content import MARK_PATH
from hfship.base.errors import IntegrityError, NotFoundError
from hfship.base.manifest import FileEntry, make_manifest, read_manifest, write_manifest


def version(folder: Path, number: int) -> Any:
    """Put a version of the model into a folder, and return it."""
    folder.mkdir(exist_ok=True)
    (folder / "w").write_text(f"{number}")
    manifest = make_manifest("m", [FileEntry("w", 1, f"{number}" * 64)])
    write_manifest(folder, manifest)
    return version_of(manifest)


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NAME, of which a clock counts the versions that are put aside."""
    now = [0]

    def later() -> str:
        now[0] += 1
        return f"2027-01-01T00:00:{now[0]:02}.000000Z"

    monkeypatch.setattr(room, "utc_exact", later)
    return tmp_path / "m"


def aside(target: Path, number: int) -> Any:
    """A version that was NAME, put aside."""
    made = version(target, number)
    put_aside(target, made)
    return made


def names(target: Path) -> List[str]:
    return sorted(path.name for path in target.parent.iterdir())


def content(folder: Path) -> str:
    return (folder / "w").read_text()


def test_what_is_put_aside_can_be_found_and_removed(target: Path) -> None:
    first = aside(target, 1)
    folder = target.with_name(f"m~{first.id[:12]}")
    assert not target.exists() and (folder / MARK_PATH).exists()
    assert (folder / KEPT_PATH).read_text() == "2027-01-01T00:00:01.000000Z\n"
    assert kept_versions(target) == [KeptVersion(folder, first, "2027-01-01T00:00:01.000000Z", "")]
    drop(folder)
    assert names(target) == []


def test_an_earlier_copy_of_a_version_is_replaced(target: Path) -> None:
    first = aside(target, 1)
    (target.with_name(f"m~{first.id[:12]}") / "old").touch()
    aside(target, 1)
    (one,) = kept_versions(target)
    assert one.until.endswith(":02.000000Z") and not (one.folder / "old").exists()


def test_what_is_not_ours_is_neither_kept_nor_removed(target: Path) -> None:
    folder = target.with_name("m~" + "0" * 12)
    version(folder, 1)
    assert kept_versions(target) == []
    with pytest.raises(IntegrityError) as told:
        drop(folder)
    assert told.value.what == f"{folder} is in the way" and content(folder) == "1"
    with pytest.raises(IntegrityError):
        made = version(target, 1)
        target.with_name(f"m~{made.id[:12]}").mkdir()
        put_aside(target, made)
    assert content(target) == "1"
    link = target.with_name("m~" + "1" * 12)
    aside(target.with_name("n"), 1)
    (kept,) = kept_versions(target.with_name("n"))
    link.symlink_to(kept.folder)
    assert kept_versions(target) == []
    with pytest.raises(IntegrityError):
        drop(link)
    assert content(kept.folder) == "1"


def test_what_is_half_removed_is_none(target: Path) -> None:
    first = aside(target, 1)
    folder = target.with_name(f"m~{first.id[:12]}")
    (folder / ".hfship/manifest.json").unlink()
    assert kept_versions(target) == []
    (folder / ".hfship/manifest.json").write_text("torn")
    assert kept_versions(target) == []
    drop(folder)
    assert names(target) == []


def test_versions_are_in_the_order_in_which_they_were_in_place(target: Path) -> None:
    order = [aside(target, number).id for number in (3, 1, 2)]
    assert [one.version.id for one in kept_versions(target)] == order


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_all_but_the_last_few_go(keep: int, target: Path) -> None:
    made = [aside(target, number) for number in (1, 2, 3)]
    version(target, 4)
    gone = made[: 3 - keep]
    assert [one.version for one in kept_beyond(target, keep)] == gone
    folders = [target.with_name(f"m~{one.id[:12]}") for one in gone]
    assert drop_beyond(target, keep) == folders
    assert [one.version for one in kept_versions(target)] == made[3 - keep :]
    assert content(target) == "4"


def test_a_copy_of_what_is_in_place_goes_first(target: Path) -> None:
    first, second = aside(target, 1), aside(target, 2)
    version(target, 1)
    assert [one.version for one in kept_beyond(target, 1)] == [first]
    (target / ".hfship/manifest.json").unlink()
    assert [one.version for one in kept_beyond(target, 1)] == [first]
    assert [one.version for one in kept_beyond(target, 0)] == [first, second]


@pytest.mark.parametrize("rolled_back", [True, False])
def test_notes_of_what_was_kept_go_when_it_is_in_place(rolled_back: bool, target: Path) -> None:
    aside(target, 1)
    (one,) = kept_versions(target)
    (one.folder / ROLLED_BACK_PATH).write_text(" abc \n")
    put_in_place(one.folder, target, rolled_back)
    assert content(target) == "1" and not one.folder.exists()
    assert not (target / KEPT_PATH).exists() and not (target / MARK_PATH).exists()
    assert rolled_back_from(target) == ("abc" if rolled_back else "")


# -- after a kill


def test_what_was_being_replaced_becomes_name_again(target: Path) -> None:
    assert mend_place(target) is None
    version(target, 1)
    assert mend_place(target) is None
    replaced = target.with_name("m~replaced")
    aside(target, 1)
    (one,) = kept_versions(target)
    assert mend_place(target) == one.folder and content(target) == "1"
    put_aside(target, one.version)
    version(replaced, 2)
    room.put_mark(replaced)
    assert mend_place(target) == replaced and content(target) == "2"
    assert not (target / MARK_PATH).exists() and not replaced.exists()


def test_the_version_that_was_in_place_last_becomes_name_again(target: Path) -> None:
    aside(target, 1)
    second = aside(target, 2)
    assert mend_place(target) == target.with_name(f"m~{second.id[:12]}")
    assert content(target) == "2" and len(kept_versions(target)) == 1


def test_what_hfship_has_not_made_stays_where_it_is(target: Path) -> None:
    version(target.with_name("m~replaced"), 1)
    assert mend_place(target) is None and not target.exists()


# -- going back


def test_back_and_forward(target: Path) -> None:
    first, second = aside(target, 1), version(target, 2)
    went = go_back(target, "")
    assert (went.before, went.now) == (second, first) and content(target) == "1"
    assert rolled_back_from(target) == second.id
    again = go_back(target, "")
    assert (again.before, again.now) == (first, first) and content(target) == "1"
    forward = go_back(target, "newest")
    assert (forward.before, forward.now) == (first, second) and content(target) == "2"
    assert rolled_back_from(target) == ""
    assert [one.version for one in kept_versions(target)] == [first]
    by_id = go_back(target, first.id[:8])
    assert by_id.now == first and content(target) == "1" and rolled_back_from(target) == ""


def test_without_name_a_killed_run_is_gone_on_with(target: Path) -> None:
    first = aside(target, 1)
    went = go_back(target, first.id[:8])
    assert (went.before, went.now) == (None, first) and content(target) == "1"
    with pytest.raises(NotFoundError, match="no earlier version is kept"):
        go_back(target, "")


REFUSED: Dict[str, Any] = {
    "a link": lambda target: target.symlink_to(target.with_name("other")),
    "no manifest": lambda target: target.mkdir(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_left(name: str, target: Path) -> None:
    aside(target, 1)
    version(target.with_name("other"), 9)
    REFUSED[name](target)
    before = names(target)
    with pytest.raises(IntegrityError) as told:
        go_back(target, "")
    said = {
        "a link": (f"{target} is a symbolic link", f"ls -l {target}"),
        "no manifest": (
            f"{target} has no manifest, so it cannot be kept",
            f"hfship verify {target}",
        ),
    }
    assert (told.value.what, told.value.next_step) == said[name]
    assert [one for one in names(target) if "incomplete" not in one] == before
    assert read_manifest(target.with_name("other"))


def test_the_manifest_of_a_version_goes_first(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves is no model any more, and nothing that one could go back to."""
    aside(target, 1)
    (one,) = kept_versions(target)

    def killed(folder: Path) -> None:
        assert folder == one.folder and content(folder) == "1"
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "remove_work_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        drop(one.folder)
    assert read_manifest(one.folder) is None and (one.folder / MARK_PATH).exists()


# -- which version is meant


A, B, C = (SimpleNamespace(id=digit * 64, short=digit * 7) for digit in "abc")


def kept_of(*versions: Any, **chosen: str) -> List[KeptVersion]:
    return [KeptVersion(Path(one.short), one, "", chosen.get(one.short[0], "")) for one in versions]


@pytest.mark.parametrize(
    ("kept", "present", "rolled_back", "wanted", "found"),
    [
        (kept_of(A, B), C, "", "", B),
        (kept_of(A, B), B, "", "", A),  # a copy of what is in place is not meant
        (kept_of(A, B), C, "", "a", A),
        (kept_of(A, B), C, "", "c", None),
        (kept_of(A, B), C, "", "newest", None),
        (kept_of(A, C), B, C.id, "newest", C),
        (kept_of(A, C), B, C.id, "", None),  # it is rolled back already
        (kept_of(A, A), C, "", "a" * 12, A),
        (kept_of(), C, "", "", "no earlier version is kept"),
        (kept_of(A), A, "", "", "no earlier version is kept"),
        (kept_of(A, B), C, "", "d" * 20, f"no version {'d' * 12} is kept"),
        # a run was killed between its two renames
        (kept_of(A, B), None, "", "", B),
        (kept_of(A, B, a=B.id), None, "", "", A),
        (kept_of(A, B, a=B.id), None, "", "newest", B),
        (kept_of(A, B, b=A.id), None, "", "newest", A),
        (kept_of(A, B, b=A.id), None, "", "", B),
        (kept_of(A, B), None, "", "a", A),
        (kept_of(), None, "", "newest", "no earlier version is kept"),
    ],
)
def test_which_version_is_meant(
    kept: List[KeptVersion], present: Any, rolled_back: str, wanted: str, found: Any
) -> None:
    if isinstance(found, str):
        with pytest.raises(NotFoundError, match=found) as told:
            room.version_to_place(kept, present, rolled_back, wanted)
        assert told.value.next_step.startswith("hfship unpack --allow-older ARCHIVE")
        assert "is kept" in found and (wanted[:1] != "d" or "aaaaaaa, bbbbbbb" in told.value.why)
        return
    chosen = room.version_to_place(kept, present, rolled_back, wanted)
    assert (chosen and chosen.version) == found


@pytest.mark.parametrize(
    ("present", "keep", "gone"),
    [
        ("", 3, []),
        ("", 2, [A]),
        ("", 0, [A, B, C]),
        (B.id, 2, [B]),
        (B.id, 1, [B, A]),
        (B.id, 9, [B]),
    ],
)
def test_which_versions_go(present: str, keep: int, gone: List[Any]) -> None:
    assert [one.version for one in room.to_drop(kept_of(A, B, C), present, keep)] == gone
