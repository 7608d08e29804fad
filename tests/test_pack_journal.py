"""What of an earlier run the next one goes on with."""

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfship.archive import pack_journal
from hfship.archive.opening import open_archive
from hfship.archive.pack_journal import DonePart, FoundPart, PackJournal, Resumed, claim
from hfship.archive.pack_plan import PackOptions, plan_pack
from hfship.archive.part_cut import cut_parts
from hfship.base.errors import NoRoomError
from hfship.base.progress import Stage
from support import archives as a


def found(first: int, count: int, tables: bool = False) -> FoundPart:
    part = DonePart(first, count, Path(f"{first}"), 1, "")
    return FoundPart(part, [(1, 1)] * count, tables)


GROUPS = cut_parts([1] * 6, 2)  # frames 0 and 1, 2 and 3, 4 and 5
RESUMED = {
    "whichever they are": ([found(2, 2)], [2]),
    "one that goes on": ([found(0, 1), found(1, 1)], [0, 1]),
    "half of one": ([found(0, 1), found(4, 2)], [4]),
    "of other cuts": ([found(0, 3), found(3, 3)], []),
    "overlapping": ([found(0, 2), found(1, 1), found(2, 2)], [0, 2]),
    "all, with the tables": ([found(0, 2), found(2, 2), found(4, 2, True)], [0, 2, 4]),
    "all, the tables apart": ([found(0, 2), found(2, 2), found(4, 2), found(6, 0, True)], [0, 2, 4, 6]),
    "tables, others missing": ([found(0, 2), found(4, 2, True)], [0]),
    "tables apart, others missing": ([found(0, 2), found(4, 2), found(6, 0, True)], [0, 4]),
    "all but the tables": ([found(0, 2), found(2, 2), found(4, 2)], [0, 2, 4]),
    "nothing": ([], []),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_parts_that_hold_whole_groups_are_gone_on_with(case: str) -> None:
    parts, kept = RESUMED[case]
    resumed = Resumed(tuple(parts)).whole(GROUPS)
    assert [part.first for part in resumed.parts] == kept
    assert resumed.complete == case.startswith("all, ")


def test_a_disk_that_is_full_at_the_journal_is_full_for_the_run(tmp_path, monkeypatch):
    """Then complete parts go, too: they would keep it full."""
    manifest = a.make_model(tmp_path / "m", a.SMALL)
    plan = plan_pack(tmp_path / "m", manifest, PackOptions(split=8 << 20))

    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "journal"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    journal = PackJournal(fd, path, plan)
    monkeypatch.setattr(pack_journal, "write_all", full)
    with pytest.raises(NoRoomError, match="journal"):
        journal.add(DonePart(0, 1, tmp_path / "m.tar.zst.0001.incomplete", 1, "0" * 64))
    with pytest.raises(NoRoomError, match="journal"):
        journal.begin(Resumed())
    os.close(fd)


LISTED = [DonePart(0, 2, Path("/out/m.1"), 100, "ab"), DonePart(2, 1, Path("/out/m.2"), 7, "cd")]


def plan_of(split):
    """A plan of nine frames, as far as its list needs one."""
    options = SimpleNamespace(split=split, jobs=1)
    return SimpleNamespace(
        key="plan", options=options, count=9, edges=range(10), archive="m", parts_at_most=9
    )


@pytest.fixture
def listed(tmp_path):
    """A journal of a plan in parts, and its file."""
    path = tmp_path / "journal"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield PackJournal(fd, path, plan_of(8 << 20)), path
    os.close(fd)


def test_a_list_names_its_plan_and_then_each_part(listed):
    journal, path = listed
    path.write_text("of another plan\n[1, 2")
    journal.begin(Resumed())
    key = journal._plan.key
    assert path.read_text() == f"{key}\n"
    for part in LISTED:
        journal.add(part)
    rows = ['[0, 2, "/out/m.1", 100, "ab"]', '[2, 1, "/out/m.2", 7, "cd"]']
    assert path.read_text().splitlines() == [key, *rows]
    journal.clear()
    assert path.read_text() == ""


def test_a_list_is_gone_on_with_behind_its_last_whole_line(listed, monkeypatch):
    journal, path = listed
    journal.begin(Resumed())
    for part in LISTED:
        journal.add(part)
    whole = path.read_text()
    path.write_text(whole + '[9, 1, "/out')
    monkeypatch.setattr(
        PackJournal, "_prove", lambda _, parts, __: [found(p.first, 1) for p in parts]
    )
    resumed = journal.resumable(a.QUIET)
    assert [one.first for one in resumed.parts] == [0, 2]
    journal.begin(resumed)
    assert path.read_text() == whole


# line -> whether it is a part of the plan
ROWS = {
    '[0, 2, "/out/m.1", 100, "ab"]': True,
    '[0, 2, "/out/m.1", 100]': False,
    '[0, 2, "/out/m.1", 100, "ab", 1]': False,
    '["x", 2, "/out/m.1", 100, "ab"]': False,
    '[0, 2, null, 100, "ab"]': False,
    "7": False,
    "torn": False,
    '[-1, 2, "/out/m.1", 100, "ab"]': False,
    '[0, -1, "/out/m.1", 100, "ab"]': False,
    '[0, 10, "/out/m.1", 100, "ab"]': False,
}


@pytest.mark.parametrize("row", ROWS)
def test_a_line_that_is_no_part_of_the_plan_is_passed_over(row, listed, monkeypatch):
    journal, path = listed
    proven = []
    monkeypatch.setattr(PackJournal, "_prove", lambda _, parts, __: proven.extend(parts) or [])
    path.write_text(f"{journal._plan.key}\n{row}\n")
    assert journal.resumable(a.QUIET) == Resumed()
    assert proven == ([LISTED[0]] if ROWS[row] else [])
    proven.clear()
    path.write_text(f"of another plan\n{row}\n")
    assert journal.resumable(a.QUIET) == Resumed() and not proven


def test_an_archive_in_one_file_has_no_list(tmp_path):
    path = tmp_path / "archive"
    path.write_text("content")
    fd = os.open(path, os.O_RDWR)
    journal = PackJournal(fd, path, plan_of(None))
    journal.begin(Resumed())
    journal.add(LISTED[0])
    assert journal.resumable(a.QUIET) == Resumed()
    journal.clear()
    os.close(fd)
    assert path.read_text() == "content"


@pytest.mark.parametrize("name", ["open_in", "_lock"])
def test_ctrl_c_while_the_file_is_made_leaves_none(monkeypatch, tmp_path, name):
    """Also when it comes as the file is there and nobody has promised yet to remove it."""
    real = getattr(pack_journal, name)

    def and_ctrl_c(*args):
        result = real(*args)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # Python runs the handler of a signal between two instructions
        return result

    monkeypatch.setattr(pack_journal, name, and_ctrl_c)
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "m.tar.zst.incomplete"):
        raise AssertionError("it went on")
    assert list(tmp_path.iterdir()) == []


# -- the file that is claimed


@pytest.mark.parametrize(
    ("journal", "before", "inside", "written", "left"),
    [
        (True, b"", b"", b"", None),
        (True, b"rows", b"rows", b"", b"rows"),
        (True, b"", b"", b"new", b"new"),
        (True, b"rows", b"rows", b"+", b"rows+"),  # at its end
        (False, b"rows", b"", b"", None),
        (False, b"", b"", b"archive", None),
    ],
)
def test_a_list_stays_for_the_next_run_and_nothing_else(
    journal, before, inside, written, left, tmp_path
):
    path = tmp_path / "m.tar.zst.incomplete"
    if before:
        path.write_bytes(before)
    with claim(path, journal) as fd:
        assert path.read_bytes() == inside
        with pytest.raises(pack_journal.InUseError), claim(path, journal):
            pytest.fail("two hold it")
        os.write(fd, written)
    assert (path.read_bytes() if path.exists() else None) == left
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_file_that_another_run_put_there_is_not_removed(tmp_path):
    path = tmp_path / "m.tar.zst.incomplete"
    with claim(path):
        path.unlink()
        path.write_text("another")
    assert path.read_text() == "another"
    with claim(tmp_path / "gone.incomplete"):
        (tmp_path / "gone.incomplete").unlink()


# -- what a part holds


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """An archive of some frames: it is like a part that has all of them, and the tables."""
    root = tmp_path_factory.mktemp("journal")
    a.make_model(root / "m", {"w": a.noise(5000)})
    files = a.pack(root / "m", root / "out", frame_size=1000)
    archive = open_archive(files)
    frames = list(archive.frames)
    edges = [frame.start for frame in frames] + [frames[-1].start + frames[-1].length]
    return files.path, frames, edges


@pytest.mark.parametrize(
    ("case", "tables"),
    [
        ("all", True),
        ("without the tables", False),
        ("one unit less", None),
        ("another sum", None),
        ("other edges", None),
        ("gone", None),
        ("garbage", None),
    ],
)
def test_a_part_is_read_again_to_the_byte(case, tables, packed, tmp_path):
    source, frames, edges = packed
    content = source.read_bytes()
    units = sum(frame.size for frame in frames)
    if case in ("without the tables", "one unit less"):
        content = content[: units - (frames[-1].size if case == "one unit less" else 0)]
    if case == "garbage":
        content = b"garbage" + content
    path = tmp_path / "part"
    path.write_bytes(content)
    sha256 = hashlib.sha256(content if case != "another sum" else b"x").hexdigest()
    if case == "gone":
        path.unlink()
    if case == "other edges":
        edges = [edge + 1 if 0 < number < 3 else edge for number, edge in enumerate(edges)]
        edges[1] += 5
    part = DonePart(0, len(frames), path, len(content), sha256)
    counted = []
    found = pack_journal._found(part, edges, counted.append)
    if tables is None:
        assert found is None
        return
    assert found == FoundPart(part, [(frame.size, frame.crc) for frame in frames], tables)
    assert sum(counted) == len(content)


def test_parts_are_proven_with_their_size_as_the_total(packed, monkeypatch):
    source, frames, edges = packed
    part = DonePart(0, len(frames), source, 77, "wrong")
    shown = []

    class Shown:
        @contextlib.contextmanager
        def stage(self, name, size):
            shown.append((name, size))
            yield Stage(name, size)

    plan = SimpleNamespace(edges=edges, options=SimpleNamespace(jobs=1, split=9))
    journal = PackJournal(-1, Path("x"), plan)
    assert journal._prove([part, part], Shown()) == [None, None]
    assert shown == [("prove", 154)]


@pytest.mark.parametrize(
    ("there", "content", "taken_back"),
    [
        (False, b"ours", True),
        (False, b"another", False),
        (True, b"ours", False),
        (False, None, False),
    ],
)
def test_names_that_a_killed_run_gave_are_taken_back(there, content, taken_back, tmp_path):
    plan = SimpleNamespace(
        archive="m.tar.zst", parts_at_most=3, options=SimpleNamespace(split=9, jobs=1)
    )
    parts = []
    for number in (1, 2):
        path = tmp_path / f"m.tar.zst.{number}.incomplete"
        parts.append(DonePart(number, 1, path, 4, hashlib.sha256(b"ours").hexdigest()))
    final = tmp_path / "m.tar.zst.0002"
    if content is not None:
        final.write_bytes(content)
    if there:
        parts[1].path.write_bytes(b"begun")
    PackJournal(-1, tmp_path / "x", plan)._take_names_back(parts)
    assert final.exists() == (content is not None and not taken_back)
    assert parts[1].path.exists() == (there or taken_back)
    if taken_back:
        assert parts[1].path.read_bytes() == b"ours"
