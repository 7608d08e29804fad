"""`verify PART` reads that part alone; what is damaged is named by its own name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List, Tuple

import pytest

from conftest import without_times
from hfship.archive.damage import Damage
from hfship.archive.files import ArchiveFiles
from hfship.archive.part_check import can_be_alone, check_part
from hfship.commands.run import main
from support import archives as a

Run = Callable[..., Tuple[int, str, str]]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("series")
    a.make_model(root / "m", {"a": a.noise(9000), "c": a.noise(9000, 1)})
    a.pack(root / "m", root / "parts", frame_size=1000, split=5000)
    return root / "parts"


@pytest.fixture
def files(series: Path, tmp_path: Path) -> ArchiveFiles:
    shutil.copytree(series, tmp_path / "medium")
    return a.files_in(tmp_path / "medium")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in an empty folder of a machine with nothing on it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HFSHIP_TRANSFER_DIR", str(tmp_path / "transfer"))
    monkeypatch.setenv("HFSHIP_SITE_MODELS_DIR", str(tmp_path / "site"))

    def run_line(*words: Any) -> Tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, without_times(said.err)

    return run_line


def keep(files: ArchiveFiles, *numbers: int, sums: bool = True) -> None:
    """Leave nothing but these parts on the medium."""
    for number, path in files.numbers.items():
        if number not in numbers:
            path.unlink()
    if not sums:
        files.sums.unlink()


@pytest.mark.parametrize(
    "there, sums, proof",
    [
        ((2, 5), True, "as the tables in m.tar.zst.0005 say"),
        ((2, 5), False, "as the tables in m.tar.zst.0005 say"),
        ((2,), True, "as m.tar.zst.sha256 says"),
        ((2,), False, "by the checksums in its 4 frames"),
    ],
)
def test_a_part_is_proven_by_what_is_there(
    there: Tuple[int, ...], sums: bool, proof: str, files: ArchiveFiles, run: Run
) -> None:
    keep(files, *there, sums=sums)
    path = files.part(2)
    code, out, err = run("verify", path)
    assert code == 0 and re.fullmatch(r"  log   .*\n", err)
    size = f"{path.stat().st_size / 1000:.1f} kB"
    assert out.startswith(f"ok: {path}: part 2 alone, {size}, {proof}; other parts were not read")
    for offset in (40, path.stat().st_size - 40):
        with a.flipped(path, offset):
            code, out, err = run("verify", path)
            assert code == 6 and f"{path} is damaged in 1 place\n" in err
            assert (
                f"copy m.tar.zst.0002 again into {path.parent}, then: hfship verify {path}" in err
            )
    os.truncate(path, 777)
    assert run("verify", path)[0] == 6


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_no_other_part_but_the_last_is_read(number: int, files: ArchiveFiles) -> None:
    path = files.part(number)
    for other in files.paths[:-1]:
        if other != path:
            os.truncate(other, 0)
    found = check_part(files, path, a.QUIET)
    assert (found.number, found.damages) == (number, ())


def test_a_part_of_another_archive_is_none_of_this(files: ArchiveFiles, run: Run) -> None:
    shutil.copy(files.part(2), files.folder / "m.tar.zst.0009")
    code, _, err = run("verify", files.folder / "m.tar.zst.0009")
    assert code == 6 and "m.tar.zst.0009: is not part of this archive" in err


def test_several_parts_and_the_only_one_are_an_archive(
    files: ArchiveFiles, run: Run, tmp_path: Path
) -> None:
    code, out, _ = run("verify", *files.paths)
    assert code == 0 and out.startswith(f"ok: {files.place}: ") and "in 5 parts" in out
    keep(files, 1, 2)
    code, _, err = run("verify", *files.paths[:2])
    assert code == 6
    a.make_model(tmp_path / "one/m", {"a": b"a"})
    only = a.pack(tmp_path / "one/m", tmp_path / "only", split=5 << 20)
    assert not can_be_alone(only, only.path)
    assert "model m, 1 file" in run("verify", only.path)[1]


@pytest.mark.parametrize(
    "numbers, subject",
    [
        ((2,), "{0}/m.tar.zst.0002 is"),
        ((2, 3), "{0}/m.tar.zst.0002, {0}/m.tar.zst.0003 are"),
    ],
)
def test_the_headline_names_the_bad_parts(
    numbers: Tuple[int, ...], subject: str, files: ArchiveFiles, run: Run
) -> None:
    for number in numbers:
        with files.part(number).open("r+b") as stream:
            stream.seek(100)
            stream.write(bytes(10))
    said = subject.format(files.folder)
    for name in (files.folder, files.place):
        code, _, err = run("verify", name)
        assert code == 6 and f"hfship: {said} damaged in" in err
    for number in numbers:
        files.part(number).unlink()
    code, _, err = run("verify", files.folder)
    assert code == 6 and f"hfship: {said} missing\n" in err
    assert f"then: hfship verify {files.place}\n" in err


def test_the_current_folder_is_read_and_other_places_are_named(
    files: ArchiveFiles, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the medium, its own name means the medium."""
    shutil.copytree(files.folder, tmp_path / "transfer")
    with a.flipped(files.part(2), 100):
        assert run("verify", "m.tar.zst")[0] == 0
        monkeypatch.chdir(files.folder)
        for name in ("m.tar.zst", "m"):
            code, _, err = run("verify", name)
            assert code == 6 and "hfship: m.tar.zst.0002 is damaged in 1 place" in err
            assert f"{name}: also {tmp_path}/transfer/m.tar.zst, not read" in err
    assert run("verify", "m.tar.zst.0002")[0] == 0


def test_a_model_here_comes_before_archives_elsewhere(
    files: ArchiveFiles, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(files.folder, tmp_path / "transfer")
    for place in ("site", "elsewhere"):
        a.make_model(tmp_path / place / "m", {"w": place.encode()})
    assert run("verify", "m")[1].startswith(f"ok: {tmp_path}/transfer/m.tar.zst: ")
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = run("verify", "m")
    assert code == 0 and out.startswith(f"ok: {tmp_path}/elsewhere/m: 1 file")
    assert f"m: also {tmp_path}/transfer/m.tar.zst, not read" in err


def test_a_list_goes_on_and_ends_with_the_gravest_code(
    files: ArchiveFiles, run: Run, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "n", {"w": b"w"})
    (tmp_path / "plain").mkdir()
    code, out, err = run("verify", tmp_path / "plain", tmp_path / "n", "--json")
    plain, model = json.loads(out)
    assert code == 2 and (plain["ok"], model["ok"]) == (False, True)
    os.truncate(files.part(2), 0)
    code, _, err = run("verify", tmp_path / "plain", files.place)
    assert code == 6 and "m.tar.zst.0002" in err and "cannot be verified" in err


def test_a_part_is_alone_if_something_tells_what_it_must_be(files: ArchiveFiles) -> None:
    """The tables, else its sum, else its own frames."""
    path = files.part(2)
    assert can_be_alone(files, path)
    keep(files, 2)
    left = a.files_in(files.folder)
    assert can_be_alone(left, path)
    path.write_bytes(b"garbage")
    assert can_be_alone(left, path), "its sum tells that it is damaged"
    left.sums.unlink()
    assert not can_be_alone(left, path)


def test_a_part_with_whole_frames_and_another_sum_is_another_one(files: ArchiveFiles) -> None:
    keep(files, 2)
    files.sums.write_text(f"{'0' * 64}  m.tar.zst.0002\n")
    found = check_part(a.files_in(files.folder), files.part(2), a.QUIET)
    expected = Damage("is other than m.tar.zst.sha256 says", parts=("m.tar.zst.0002",))
    assert found.damages == (expected,)
    assert (found.path, found.number, found.size) == (
        files.part(2),
        2,
        files.part(2).stat().st_size,
    )


@pytest.mark.parametrize("tables", [True, False])
def test_the_damage_of_a_part_says_where_it_is(tables: bool, files: ArchiveFiles) -> None:
    """By the tables the frame is one of the archive; else it is one of the part."""
    keep(files, *((2, 5) if tables else (2,)), sums=False)
    path = files.part(2)
    shown: List[Tuple[str, int]] = []

    @contextlib.contextmanager
    def stage(name: str, size: int) -> Any:
        counted: List[int] = []
        yield SimpleNamespace(add=counted.append)
        shown.append((name, size))
        assert sum(counted) == size

    reporter: Any = SimpleNamespace(stage=stage)
    with a.flipped(path, 100):
        found = check_part(a.files_in(files.folder), path, reporter)
    (damage,) = found.damages
    first, last = damage.frames
    assert first == last and (first > 1) is tables
    assert damage.parts == ("m.tar.zst.0002",)
    ((name, size),) = shown
    assert name == "verify" and 0 < size <= path.stat().st_size
    assert (found.proof == "as the tables in m.tar.zst.0005 say") is tables


def test_the_size_of_what_is_hashed_is_shown(files: ArchiveFiles) -> None:
    keep(files, 2)
    shown: List[Tuple[str, int]] = []
    counted: List[int] = []

    @contextlib.contextmanager
    def stage(name: str, size: int) -> Any:
        shown.append((name, size))
        yield SimpleNamespace(add=counted.append)

    reporter: Any = SimpleNamespace(stage=stage)
    size = files.part(2).stat().st_size
    found = check_part(a.files_in(files.folder), files.part(2), reporter)
    assert shown == [("verify", size)] and sum(counted) == size and found.damages == ()
    assert found.text().startswith("part 2 alone, ") and found.text().endswith("were not read")
