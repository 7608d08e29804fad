"""Which files an argument means, which tables belong to which parts, and where damage is one."""

from pathlib import Path
from typing import Dict, List, Sequence

import pytest

from hfship.archive.damage import Damage, FileRange, merge_adjacent
from hfship.archive.files import ArchiveFiles, archives_in, find_archives, merged, read_index
from hfship.archive.frames import Frames, encode_tail
from hfship.archive.media import MediaChange
from hfship.base.errors import DiskError
from support import archives as a

PARTS = ("parts.tar.zst.0001", "parts.tar.zst.0003", "parts.tar.zst.0010")
BOTH = ("both.tar.zst", "both.tar.zst.0001")
LEFT_ALONE = ("both.tar.zst.001", "parts.tar.zst.sha256", "note.txt", "x.tar.zst.0001.incomplete")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "transfer").mkdir()
    for name in ("whole.tar.zst", *BOTH, *PARTS, *LEFT_ALONE):
        (tmp_path / "transfer" / name).write_bytes(b"")
    return tmp_path / "transfer"


def names_of(archives: Sequence[ArchiveFiles]) -> List[List[str]]:
    return [[path.name for path in files.paths] for files in archives]


def test_archives_of_a_folder_are_sorted_whole_files_first(folder: Path) -> None:
    assert names_of(archives_in(folder)) == [
        ["both.tar.zst"],
        ["both.tar.zst.0001"],
        list(PARTS),
        ["whole.tar.zst"],
    ]
    assert archives_in(folder / "nothing") == []


@pytest.mark.parametrize(
    "argument, found",
    [
        # a name is looked up in the folders
        ("whole", [["whole.tar.zst"]]),
        ("whole.tar.zst", [["whole.tar.zst"]]),
        ("parts", [list(PARTS)]),
        ("parts.tar.zst.0003", [list(PARTS)]),
        ("parts.tar.zst.0099", [list(PARTS)]),
        ("parts.tar.zst.sha256", [list(PARTS)]),
        ("whole.tar.zst.sig", [["whole.tar.zst"]]),
        ("nothing", []),
        # a NAME means all of them; of a whole file and parts the whole file is meant, unless a part
        # is named
        ("both", [["both.tar.zst"], ["both.tar.zst.0001"]]),
        ("both.tar.zst", [["both.tar.zst"]]),
        ("both.tar.zst.0001", [["both.tar.zst.0001"]]),
        # a path is looked up where it points to, and nowhere else
        ("{folder}/whole.tar.zst", [["whole.tar.zst"]]),
        ("{folder}/parts.tar.zst.0010", [list(PARTS)]),
        ("{folder}/parts", [list(PARTS)]),
        ("./whole", []),
        # any other file may be an archive
        ("{folder}/note.txt", [["note.txt"]]),
        # nothing is meant by an empty variable of a script
        ("", []),
        ("-", [["-"]]),
    ],
)
def test_which_archive_is_meant(
    argument: str, found: List[List[str]], folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argument = argument.format(folder=folder)
    assert names_of(find_archives(argument, [tmp_path / "none", folder])) == found


def test_a_folder_means_all_its_archives(folder: Path) -> None:
    assert find_archives(str(folder), []) == archives_in(folder)


def test_a_missing_part_is_named_like_the_others_and_expected_beside_them(folder: Path) -> None:
    (files,) = find_archives("parts", [folder])
    assert files.part(3) == folder / "parts.tar.zst.0003"
    assert files.part(2) == folder / "parts.tar.zst.0002"
    wide = ArchiveFiles(folder, "m.tar.zst", {1: folder / "m.tar.zst.000001"})
    assert wide.part(22) == folder / "m.tar.zst.000022"
    (whole,) = find_archives("whole", [folder])
    assert whole.part(1) == folder / "whole.tar.zst"


def test_parts_of_several_folders_are_one_archive_the_first_found_counts(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    numbers: List[Dict[int, Path]] = [
        {1: one / "m.tar.zst.0001"},
        {1: two / "m.tar.zst.0001", 2: two / "m.tar.zst.0002"},
    ]
    found = [ArchiveFiles(one, "m.tar.zst", numbers[0]), ArchiveFiles(two, "m.tar.zst", numbers[1])]
    whole = [ArchiveFiles(one, "m.tar.zst", {}), ArchiveFiles(two, "m.tar.zst", {})]
    joined, *others = merged([*found, *whole, whole[0]])
    assert joined.paths == [one / "m.tar.zst.0001", two / "m.tar.zst.0002"]
    assert joined.folder == one and others == whole


def test_the_tables_are_those_that_fit_the_most_parts(tmp_path: Path) -> None:
    """The third part is left from another pack, whose tables lie on it."""
    ours = encode_tail(Frames([(100, 90, 1), (100, 90, 1)]), [100, 100])
    others = encode_tail(Frames([(50, 40, 1)]), [50, 0, 0])
    contents = {1: bytes(100), 2: bytes(100) + ours, 3: others}
    for number, content in contents.items():
        (tmp_path / f"m.tar.zst.000{number}").write_bytes(content)
    index = read_index(archives_in(tmp_path)[0])
    assert index and index.part_sizes == (100, 100 + len(ours))


@pytest.mark.parametrize("content", [b"", b"short", bytes(99), b"\xff" * 99])
def test_what_has_no_tables_has_no_index(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.tar.zst").write_bytes(content)
    assert read_index(archives_in(tmp_path)[0]) is None


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot read .*m.tar.zst"):
        read_index(ArchiveFiles(tmp_path, "m.tar.zst", {}))


def test_a_medium_is_asked_for_once_each_time_it_is_missing(tmp_path: Path, monkeypatch) -> None:
    said: List[str] = []
    part = tmp_path / "m.tar.zst.0002"

    class Listener:
        def warn(self, text: str) -> None:
            said.append(text)

    polls: List[float] = []

    def insert_medium(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) % 3 == 0:
            part.write_bytes(b"")

    monkeypatch.setattr("hfship.archive.media.time.sleep", insert_medium)
    files = ArchiveFiles(tmp_path, "m.tar.zst", {1: tmp_path / "m.tar.zst.0001"})
    media = MediaChange(files, Listener())  # type: ignore[arg-type]
    elsewhere = Path("/nowhere/m.tar.zst.0002")
    assert media.look_for(elsewhere) is None
    for times in (1, 2):
        assert media.wait_for(elsewhere) == part
        assert media.wait_for(elsewhere) == part
        assert len(said) == times and part.name in said[-1] and len(polls) == 3 * times
        part.unlink()


def test_the_medium_with_the_tables_is_waited_for(tmp_path: Path) -> None:
    """They are on the last part, which the sums name; where no sums are, nothing is known of it."""
    first, last = tmp_path / "m.tar.zst.0001", tmp_path / "m.tar.zst.0002"
    first.write_bytes(b"")
    last.write_bytes(b"")
    files = ArchiveFiles(tmp_path, "m.tar.zst", {1: first})
    assert MediaChange(files, a.QUIET).with_tables().numbers == {1: first}
    lines = [f"{'0' * 64}  {path.name}\n" for path in (first, last)]
    (tmp_path / "m.tar.zst.sha256").write_text("".join(lines))
    assert MediaChange(files, a.QUIET).with_tables().numbers == {1: first, 2: last}


# -- damage


def bad(first: int, last: int, what: str = "CRC-32 differs", path: str = "w") -> Damage:
    """Damage of frames of 9 bytes that hold 10 bytes of a file each."""
    hits = (FileRange(path, 10 * first, 10 * last + 9),)
    size = 9 * (last - first + 1)
    return Damage(what, 9 * first, size, (first, last), (f"part {first // 4}",), hits)


@pytest.mark.parametrize(
    "damages, expected",
    [
        ([], []),
        ([bad(1, 1)], [bad(1, 1)]),
        ([bad(2, 2), bad(1, 1), bad(3, 3)], [bad(1, 3)]),
        ([bad(1, 1), bad(3, 3)], [bad(1, 1), bad(3, 3)]),
        ([bad(1, 1), bad(2, 2, "is missing")], [bad(1, 1), bad(2, 2, "is missing")]),
    ],
)
def test_adjoining_frames_are_one_damage(damages: List[Damage], expected: List[Damage]) -> None:
    assert merge_adjacent(damages) == expected


def test_damage_over_parts_and_files_names_all_of_them_once() -> None:
    (damage,) = merge_adjacent([bad(2, 2, path="a"), bad(3, 3, path="b"), bad(4, 4, path="b")])
    assert damage.parts == ("part 0", "part 1") and damage.frames == (2, 4)
    assert damage.files == (("a", 20, 29), ("b", 30, 49))


def test_a_part_comes_before_its_frames_and_what_lies_nowhere_last() -> None:
    part = Damage("is missing", 9, 90, parts=("p",))
    nowhere = Damage("does not begin with a manifest")
    assert merge_adjacent([nowhere, bad(1, 1), part]) == [part, bad(1, 1), nowhere]


def test_the_frames_of_a_missing_part_are_one_damage(tmp_path: Path) -> None:
    a.make_model(tmp_path / "m", {"w.bin": a.noise(7 << 20)})
    archive = a.pack(tmp_path / "m", tmp_path / "out", split=5 << 20)
    archive.part(1).unlink()
    part, frames = a.verify(a.files_in(tmp_path / "out"))
    assert part.what == frames.what == "is missing"
    assert part.parts == frames.parts == ("m.tar.zst.0001",)
    assert part.size == frames.size and frames.frames == (1, 3)
