"""What is there before a pack: packed already, replaced, or in the way with what differs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence

import pytest

from hfship.archive import pack_before as room
from hfship.archive.opening import open_archive
from hfship.archive.pack import Packed, pack_model
from hfship.archive.pack_plan import PackOptions, plan_pack
from hfship.base.errors import UsageError
from hfship.base.manifest import FileEntry, Source, make_manifest, read_manifest, write_manifest
from hfship.base.values import replace
from hfship.commands.pack import PackResult
from support import archives as a

FILES = {"config.json": b"{}", "w1": a.noise(3000), "w2": a.noise(3000, 2)}
OLD, NEW = "052469e" + "0" * 33, "9f86d08" + "1" * 33


def model(
    folder: Path,
    files: Dict[str, bytes],
    commit: Optional[str] = OLD,
    fetched_at: str = "",
    repo: str = "org/m",
) -> Path:
    """A model folder m as fetch leaves it, or without `commit` as somebody made it."""
    entries = []
    for path, content in files.items():
        (folder / "m").mkdir(parents=True, exist_ok=True)
        (folder / "m" / path).write_bytes(content)
        entries.append(FileEntry(path, len(content), hashlib.sha256(content).hexdigest()))
    source = None
    if commit:
        source = Source("http://hub", repo, "main", repo, commit, fetched_at=fetched_at)
    write_manifest(folder / "m", make_manifest("m", entries, source))
    return folder / "m"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the archive of the old commit."""
    pack(model(tmp_path / "old", FILES, fetched_at="2026-01-02"), tmp_path / "out")
    return tmp_path / "out"


def pack(folder: Path, out: Path, **options: Any) -> Packed:
    manifest = read_manifest(folder)
    assert manifest
    return pack_model(plan_pack(folder, manifest, PackOptions(**options)), out, a.QUIET)


CHANGED = {**FILES, "w2": b"other"}


@pytest.mark.parametrize("fetched_at", ["2026-01-02", "2026-01-03", ""])
def test_a_new_commit_replaces_the_archive_of_the_older_one(
    fetched_at: str, out: Path, tmp_path: Path
) -> None:
    new = model(tmp_path / "new", CHANGED, NEW, fetched_at)
    packed = pack(new, out)
    assert packed.fresh and packed.replaced and packed.replaced.short == "052469e"
    assert PackResult(packed).text().endswith("; replaces 052469e")
    assert a.verify(a.files_in(out)) == []
    assert open_archive(a.files_in(out)).text == (new / ".hfship/manifest.json").read_bytes()
    again = pack(new, out)
    assert (again.fresh, again.replaced, again.parts) == (False, None, packed.parts)


def test_a_replaced_archive_leaves_no_file_behind(tmp_path: Path) -> None:
    old = model(tmp_path / "old", FILES)
    pack(old, tmp_path / "out", frame_size=1000, split=4000)
    pack(model(tmp_path / "new", CHANGED, NEW), tmp_path / "out", frame_size=1000, split=5000)
    assert a.verify(a.files_in(tmp_path / "out")) == []


@pytest.mark.parametrize("change", [{"fetched_at": "2027-01-01"}, {"commit": NEW}])
def test_equal_files_are_packed_already(change: Dict[str, str], out: Path, tmp_path: Path) -> None:
    """Fetched again, or at a commit that changed nothing of what is packed."""
    again = model(tmp_path / "again", FILES, **change)
    packed = pack(again, out)
    assert not packed.fresh and packed.manifest == read_manifest(tmp_path / "old/m")


@pytest.mark.parametrize(
    "files, source, options, why",
    [
        (CHANGED, {}, {}, "it holds commit 052469e, the folder commit 052469e\nchanged: w2"),
        ({**FILES, "new": b""}, {}, {}, "not in it: new"),
        ({"w1": FILES["w1"]}, {}, {}, "only in it: config.json, w2"),
        (CHANGED, {"commit": NEW, "fetched_at": "2026-01-01"}, {}, "the folder commit 9f86d08"),
        (CHANGED, {"commit": NEW, "repo": "other/m"}, {}, "the folder commit 9f86d08"),
        (CHANGED, {"commit": None}, {}, "the folder version "),
        (FILES, {}, {"split": 4 << 20}, "it is one file, asked for are parts"),
    ],
)
def test_of_what_is_in_the_way_it_is_said_what_differs(
    files: Dict[str, bytes],
    source: Dict[str, Any],
    options: Dict[str, Any],
    why: str,
    out: Path,
    tmp_path: Path,
) -> None:
    before = (out / "m.tar.zst").read_bytes()
    with pytest.raises(UsageError, match="m.tar.zst is there already") as caught:
        pack(model(tmp_path / "new", files, **source), out, **options)
    assert why in caught.value.why and "--force" in caught.value.next_step
    assert (out / "m.tar.zst").read_bytes() == before
    assert pack(model(tmp_path / "new", files, **source), out, force=True, **options).fresh


def test_forms_are_told_apart(tmp_path: Path) -> None:
    big = model(tmp_path / "old", {"w": a.noise(4 << 20)})
    pack(big, tmp_path / "parts", split=8 << 20)
    with pytest.raises(UsageError) as caught:
        pack(big, tmp_path / "parts")
    assert "it is in parts, asked for is one file" in caught.value.why
    with pytest.raises(UsageError) as caught:
        pack(big, tmp_path / "parts", split=3 << 20)
    assert "asked for are 3.1 MB at most" in caught.value.why
    pack(big, tmp_path / "whole")
    with pytest.raises(UsageError) as caught:
        pack(big, tmp_path / "whole", profile="smallest")
    assert "it was packed without --profile smallest" in caught.value.why


def test_deltas_since_another_version_are_told_apart(out: Path, tmp_path: Path) -> None:
    new = model(tmp_path / "new", CHANGED, NEW)
    old = read_manifest(tmp_path / "old/m")
    assert pack(new, out, since=old).fresh and not pack(new, out, since=old).fresh
    other = read_manifest(model(tmp_path / "other", {"w1": FILES["w1"]}, "2" * 40))
    with pytest.raises(UsageError, match="m.delta.tar.zst is there already") as caught:
        pack(new, out, since=other)
    assert "a delta since another version" in caught.value.why
    assert (out / "m.tar.zst").exists()


def test_a_damaged_archive_is_in_the_way(out: Path, tmp_path: Path) -> None:
    with (out / "m.tar.zst").open("r+b") as stream:
        stream.write(bytes(100))
    with pytest.raises(UsageError) as caught:
        pack(model(tmp_path / "new", CHANGED, NEW), out)
    assert "it is damaged" in caught.value.why


def test_what_lies_beside_an_archive_is_written_again(out: Path, tmp_path: Path) -> None:
    """A run that was killed may not have got to it; on all media."""
    guide = out / "READ-ME-FIRST.txt"
    text = guide.read_text()
    guide.unlink()
    old = tmp_path / "old/m"
    manifest = read_manifest(old)
    assert manifest
    more = tmp_path / "more"
    packed = pack_model(plan_pack(old, manifest, PackOptions()), out, a.QUIET, [more])
    assert not packed.fresh and guide.read_text() == text
    assert (more / "READ-ME-FIRST.txt").read_text() == text


def entry(path: str, digit: str) -> FileEntry:
    return FileEntry(path, 1, digit * 64)


BEFORE = make_manifest("m", [entry("a", "1"), entry("b", "2"), entry("c", "3")])


@pytest.mark.parametrize(
    ("planned", "differs"),
    [
        (BEFORE, []),
        (make_manifest("m", [entry("a", "1"), entry("b", "2")]), ["only in it: c"]),
        (
            make_manifest(
                "m", [entry("a", "9"), entry("b", "8"), entry("d", "3"), entry("0", "4")]
            ),
            ["not in it: 0, d", "only in it: c", "changed: a, b"],
        ),
        (replace(BEFORE, name="n"), ["it is called m"]),
        (replace(BEFORE, unproven=True), ["it is called m"]),
    ],
)
def test_what_differs_in_the_files(planned: Any, differs: List[str]) -> None:
    assert room._other_files(BEFORE, planned) == differs


def test_an_archive_that_nobody_proved_is_called_so() -> None:
    there = replace(BEFORE, unproven=True)
    assert room._other_files(there, BEFORE) == [f"it is called m{there.caveats}"]


def of_commit(commit: str = OLD, at: str = "", name: str = "m", repo: str = "o/m") -> Any:
    source = Source("http://hub", repo, "main", repo, commit, fetched_at=at) if commit else None
    return make_manifest(name, [entry("a", commit[:1] or "9")], source)


@pytest.mark.parametrize(
    ("there", "planned", "older"),
    [
        (of_commit(), of_commit(NEW), True),
        (of_commit(at="2026-01-01"), of_commit(NEW, "2026-01-02"), True),
        (of_commit(at="2026-01-03"), of_commit(NEW, "2026-01-02"), False),
        (of_commit(), of_commit(), False),
        (of_commit(), of_commit(NEW, name="n"), False),
        (of_commit(), of_commit(NEW, repo="o/n"), False),
        (of_commit(""), of_commit(NEW), False),
        (of_commit(), of_commit(""), False),
    ],
)
def test_which_archive_is_older(there: Any, planned: Any, older: bool) -> None:
    assert room._is_older(there, planned) is older


def named(path: Path, name: str) -> Any:
    return SimpleNamespace(name=name, path=path)


@pytest.mark.parametrize("fat", [True, False])
def test_names_that_differ_in_case_are_one_on_fat(fat: bool, tmp_path: Path) -> None:
    path = tmp_path / "M.tar.zst.0001"
    path.touch()
    if fat:  # where the name as it would be written leads to the same file
        (tmp_path / "m.tar.zst.0001").touch()
    assert room._is_named(named(path, "M.tar.zst"), "m.tar.zst") is fat
    assert room._is_named(named(path, "M.tar.zst"), "M.tar.zst")
    assert not room._is_named(named(path, "n.tar.zst"), "m.tar.zst")


@pytest.mark.parametrize(
    ("present", "listed", "ours"),
    [("1 2", "1 2 3", True), ("1 2 3", "1 2 3", False), ("1 4", "1 2 3", False), ("1", "", False)],
)
def test_what_a_killed_run_had_named_is_gone_on_with(present: str, listed: str, ours: bool) -> None:
    files: Any = SimpleNamespace(
        paths=[Path(name) for name in present.split()],
        path=Path("/t/m.tar.zst.0001"),
        sums=Path("/t/m.tar.zst.sha256"),
        listed=lambda: dict.fromkeys(listed.split()),
    )
    plan: Any = SimpleNamespace(manifest=BEFORE)
    if ours:
        room._require_unfinished(plan, files)
        return
    with pytest.raises(UsageError, match="/t/m.tar.zst.0001 is there already") as caught:
        room._require_unfinished(plan, files)
    assert caught.value.why.endswith("it is not what m.tar.zst.sha256 lists")


def form(split: int, numbers: int, sizes: Sequence[int], planes: bool = False) -> Any:
    """(how a plan wants it, an archive of parts of these sizes)"""
    plan = SimpleNamespace(
        options=SimpleNamespace(split=split), segments=[SimpleNamespace(planes=False)]
    )
    archive = SimpleNamespace(
        files=SimpleNamespace(numbers=dict.fromkeys(range(numbers))),
        parts=[SimpleNamespace(size=size) for size in sizes],
        segments=[SimpleNamespace(planes=False), SimpleNamespace(planes=planes)],
    )
    return plan, archive


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (form(0, 0, [9000]), []),
        (form(0, 2, [4, 5]), ["it is in parts, asked for is one file"]),
        (form(4000, 0, [9000]), ["it is one file, asked for are parts"]),
        (form(4000, 2, [4000, 100]), []),
        (form(4000, 2, [4001, 100]), ["it has a part of 4.0 kB, asked for are 4.0 kB at most"]),
        (form(0, 0, [9000], planes=True), ["it was packed with --profile smallest"]),
    ],
)
def test_what_differs_in_the_form(given: Any, said: List[str]) -> None:
    assert room._other_form(*given) == said
