"""Archives that are cut into parts and joined again, without being unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from conftest import ROOT, Program
from hfship.archive.recut import RecutOptions, cut_units, recut
from support import archives as a

SPLITS = [2_200_000, 3_000_000, 4_600_000, 100_000_000]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    a.make_model(tmp_path / "models" / "m", a.BIG)
    return tmp_path / "models" / "m"


def contents(folder: Path) -> Dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("profile", ["standard", "smallest", "store"])
def test_what_is_cut_is_what_pack_writes_in_parts(
    split: int, profile: str, model: Path, tmp_path: Path
) -> None:
    whole = a.pack(model, tmp_path / "whole", profile=profile)
    a.pack(model, tmp_path / "parts", profile=profile, split=split)
    packed = recut(whole, [tmp_path / "cut"], RecutOptions(split, force=False), a.QUIET)
    assert packed.fresh and contents(tmp_path / "cut") == contents(tmp_path / "parts")
    joined = recut(
        a.files_in(tmp_path / "cut"),
        [tmp_path / "joined"],
        RecutOptions(None, force=False),
        a.QUIET,
    )
    assert joined.fresh and contents(tmp_path / "joined") == contents(tmp_path / "whole")


@pytest.mark.parametrize("limit", range(6000, 7000, 97))
def test_tables_that_fill_a_part_are_cut_alike(limit: int, tmp_path: Path) -> None:
    a.make_model(tmp_path / "m", {"a": a.noise(20_000), "b": bytes(3000)})
    whole = a.pack(tmp_path / "m", tmp_path / "whole", frame_size=2 << 20)
    split = limit + 2_110_000
    a.pack(tmp_path / "m", tmp_path / "parts", split=split)
    recut(whole, [tmp_path / "cut"], RecutOptions(split, force=False), a.QUIET)
    assert contents(tmp_path / "cut") == contents(tmp_path / "parts")


def test_units_are_never_cut() -> None:
    assert cut_units([5, 5, 5], 10) == [2, 1]
    assert cut_units([10, 10], 10) == [1, 1]
    assert cut_units([], 10) == []


def test_in_its_place_the_new_form_follows_the_old_one(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hfship("pack", model, "-o", out)
    before = contents(out)
    done = hfship("pack", out / "m.tar.zst", "--split", "3M")
    names = {name for name in contents(out) if name.startswith("m.tar.zst.0")}
    assert len(names) == 3 and not (out / "m.tar.zst").exists() and "0001 and 2 more" in done.stdout
    subprocess.run(["sha256sum", "-c", "--strict", "m.tar.zst.sha256"], check=True, cwd=out)
    assert "packed already" in hfship("pack", out / "m.tar.zst.0002", "--split", "3M").stdout
    hfship("verify", out / "m.tar.zst.0001")
    stream = subprocess.run(
        ["sh", "-c", "cat m.tar.zst.0* | zstd -dc | tar -tf -"],
        check=True,
        capture_output=True,
        cwd=out,
    )
    assert b"m/w1.safetensors" in stream.stdout
    hfship("pack", out / "m.tar.zst.0001", "--join")
    assert contents(out) == before
    assert "packed already" in hfship("pack", out / "m.tar.zst", "--join").stdout


def test_elsewhere_the_archive_stays_and_its_signature_comes_along(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    hfship("pack", model, "-o", tmp_path / "out")
    (tmp_path / "out/m.tar.zst.sig").write_text("signed")
    before = contents(tmp_path / "out")
    command = ("pack", tmp_path / "out/m.tar.zst", "--split", "3M")
    hfship(*command, "-o", tmp_path / "usb")
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "usb/m.tar.zst.sig").read_text() == "signed"
    assert (tmp_path / "usb/READ-ME-FIRST.txt").exists()
    hfship("unpack", tmp_path / "usb/m.tar.zst.0001", "-o", tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == a.tree(model)


def test_parts_go_onto_several_media(
    pyz: Program, model: Path, tmp_path: Path, small_disk: Any
) -> None:
    pyz("pack", model, "-o", tmp_path / "out")
    media = [small_disk(13), small_disk(32)]
    to = [word for medium in media for word in ("--to", medium)]
    pyz("pack", tmp_path / "out/m.tar.zst", "--split", "3M", *to)
    names = [sorted(path.name for path in medium.glob("*.zst.0*")) for medium in media]
    assert names[0] and names[1] and sum(map(len, names)) == 3
    parts = [next(medium.glob("*.zst.0*")) for medium in media]
    pyz("pack", *parts, "--join", "-o", tmp_path / "joined")
    name = "m.tar.zst"
    assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("split", [3_000_000, None])
def test_a_killed_run_is_gone_on_with(split: Any, model: Path, tmp_path: Path) -> None:
    """At every write: what was there is whole until the new form has its names."""
    source = a.pack(model, tmp_path / "source", split=None if split else 3_000_000)
    target = tmp_path / "target"
    whole = tmp_path / "right"
    recut(source, [whole], RecutOptions(split, force=False), a.QUIET)
    for size in (0, 1000, 2_500_000):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in whole.glob("m.tar.zst*"):
            if path.suffix == ".sha256":
                continue
            content = path.read_bytes()[:size]
            (target / f"{path.name}.incomplete").write_bytes(content + b"not synced")
            break
        recut(source, [target], RecutOptions(split, force=False), a.QUIET)
        assert contents(target) == contents(whole)


def test_a_run_that_is_killed_for_real_is_gone_on_with(tmp_path: Path) -> None:
    a.make_model(tmp_path / "m", {"w.bin": a.noise(200 << 20)})
    source = a.pack(tmp_path / "m", tmp_path / "out", profile="store")
    before = hashlib.sha256(source.path.read_bytes()).hexdigest()
    argv = [sys.executable, ROOT / "hfship.py", "pack", source.path, "--split", "20M"]
    for _ in range(6):
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert source.path.exists() or (tmp_path / "out/m.tar.zst.0011").exists()
        if not source.path.exists():
            break
    if source.path.exists():
        subprocess.run(argv, check=True)
    assert not list((tmp_path / "out").glob("*.incomplete"))
    join = [*argv[:3], tmp_path / "out/m.tar.zst.0003", "--join"]
    subprocess.run(join, check=True)
    assert hashlib.sha256(source.path.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("gone", [[1], [3], [1, 2], [1, 3], [2, 3]])
def test_a_join_that_was_killed_while_it_removed_the_parts_is_finished(
    gone: Any, pyz: Program, model: Path, tmp_path: Path
) -> None:
    a.pack(model, tmp_path / "whole")
    a.pack(model, tmp_path / "out", split=3_000_000)
    for name in ("m.tar.zst", "m.tar.zst.sha256"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "out" / name)
    for number in gone:
        (tmp_path / f"out/m.tar.zst.000{number}").unlink()
    left = sorted((tmp_path / "out").glob("m.tar.zst.0*"))
    pyz("pack", left[0], "--join")
    assert not list((tmp_path / "out").glob("m.tar.zst.0*"))
    assert a.verify(a.files_in(tmp_path / "out")) == []


def test_damage_is_named_and_nothing_goes(pyz: Program, model: Path, tmp_path: Path) -> None:
    files = a.pack(model, tmp_path / "out", split=3_000_000)
    with a.flipped(files.paths[1], 100_000):
        done = pyz("pack", files.path, "--join", code=6)
    assert "m.tar.zst.0002 is damaged" in done.stderr
    assert all(path.exists() for path in files.paths)
    files.paths[1].unlink()
    assert "0002" in pyz("pack", files.path, "--join", code=6).stderr
    assert files.paths[0].exists() and files.paths[2].exists()


def test_another_archive_is_not_replaced(pyz: Program, model: Path, tmp_path: Path) -> None:
    files = a.pack(model, tmp_path / "out")
    other = tmp_path / "usb"
    other.mkdir()
    (other / "m.tar.zst.0001").write_bytes(b"other")
    command = ("pack", files.path, "--split", "3M", "-o", other)
    assert "is there already" in pyz(*command, code=2).stderr
    assert os.listdir(other) == ["m.tar.zst.0001"]
    pyz(*command, "--force")
    assert a.verify(a.files_in(other)) == []


@pytest.mark.parametrize(
    "words, says",
    [
        (["m.tar.zst"], "packed already"),
        (["m.tar.zst", "--join", "--split", "3M"], "give one of them"),
        (["m.tar.zst", "--split", "3M", "--sign", "k.pem"], "leave --sign out"),
        (["m.tar.zst", "--split", "1M"], "give --split"),
        (["m.tar.zst", "../models/m", "--split", "3M"], "one kind"),
    ],
)
def test_what_cannot_be_asked_for(
    words: Any, says: str, pyz: Program, model: Path, tmp_path: Path
) -> None:
    a.pack(model, tmp_path / "out")
    done = pyz("pack", *words, cwd=tmp_path / "out", code=2)
    assert says in done.stderr
    assert sorted(os.listdir(tmp_path / "out"))[-2:] == ["m.tar.zst", "m.tar.zst.sha256"]


def test_parts_are_not_cut_anew_where_they_lie(pyz: Program, model: Path, tmp_path: Path) -> None:
    files = a.pack(model, tmp_path / "out", split=3_000_000)
    done = pyz("pack", files.path, "--split", "5M", code=2)
    assert "give -o DIR" in done.stderr
    pyz("pack", files.path, "--split", "5M", "-o", tmp_path / "new")
    assert a.verify(a.files_in(tmp_path / "new")) == []


def test_archives_of_other_programs_are_not_cut(pyz: Program, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    subprocess.run(["tar", "--zstd", "-cf", "m.tar.zst", "m"], check=True, cwd=tmp_path)
    done = pyz("pack", tmp_path / "m.tar.zst", "--split", "3M", code=6)
    assert "was not made by hfship" in done.stderr


def test_progress_of_a_cut_ends_at_its_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.make_model(tmp_path / "m", {"a": a.noise(20_000), "b": bytes(3000)})
    whole = a.pack(tmp_path / "m", tmp_path / "whole", frame_size=2 << 20)
    ends = []
    stage_of = a.QUIET.stage

    @contextlib.contextmanager
    def stage(*words: Any, **options: Any) -> Iterator[Any]:
        with stage_of(*words, **options) as found:
            yield found
        ends.append((found.done, found.total))

    monkeypatch.setattr(a.QUIET, "stage", stage)
    recut(whole, [tmp_path / "cut"], RecutOptions(2_116_000, force=False), a.QUIET)
    assert ends and all(done == total > 20_000 for done, total in ends), ends
