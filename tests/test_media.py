"""parts on several media, killed runs, too little room, deltas, repair from another copy."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from hfship.archive.layout import padding, tar_header
from hfship.archive.opening import open_archive
from hfship.archive.pack import pack_model
from hfship.archive.pack_plan import PROFILES, PackOptions, plan_pack
from hfship.archive.part_writer import PartWriter
from hfship.archive.reader import Archive
from hfship.archive.verify import verify_archive
from hfship.base.content import MARK_PATH, work_path
from hfship.base.errors import DiskError, IntegrityError
from hfship.base.files import sha256_file
from hfship.base.manifest import make_manifest, read_manifest
from support import archives as a

FILES = {
    **a.SMALL,
    "w1.bin": a.noise(9 << 20, 1),
    "w2.bin": a.noise(8 << 20, 2),
    "w3.bin": bytes(3 << 20),
}
SPLIT = 4_400_000


@pytest.fixture
def model(tmp_path):
    a.make_model(tmp_path / "m", FILES)
    return tmp_path / "m"


@pytest.fixture
def parts(model, tmp_path):
    return a.pack(model, tmp_path / "out", split=SPLIT)


def contents(*folders):
    """The SHA-256 of each file of an archive: pytest takes minutes to show how megabytes differ."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in folder.iterdir()
        if "tar.zst" in path.name
    }


# -- writing to media


def test_media_are_filled_side_by_side(model, parts, small_disk, hfship, tmp_path):
    """Each has parts that follow each other, as far as there is room."""
    media = [small_disk(18), small_disk(24)]
    hfship("pack", model, "--split", SPLIT, "--to", media[0], "--to", media[1])
    assert contents(*media) == contents(parts.folder)
    held = [sorted(path.name[-1] for path in m.glob("*.tar.zst.0*")) for m in media]
    assert held == [["1", "2"], ["3", "4", "5"]]
    for medium in media:
        subprocess.run(
            ["sha256sum", "-c", "--ignore-missing", "--strict", "m.tar.zst.sha256"],
            check=True,
            cwd=medium,
        )
    for command in (["verify"], ["unpack", "-o", tmp_path / "un"]):
        hfship(*command, *media)
    assert a.tree(tmp_path / "un/m") == FILES
    assert (
        "already"
        in hfship("pack", model, "--split", SPLIT, "--to", media[0], "--to", media[1]).stdout
    )


def test_too_few_media_are_told_before_the_first_byte(model, small_disk, hfship):
    medium = small_disk(10)
    assert "needed" in hfship("pack", model, "--split", SPLIT, "--to", medium, code=7).stderr
    hfship("pack", model, "--to", medium, code=2)


def test_a_medium_that_gives_back_other_bytes_is_found(model, tmp_path, monkeypatch):
    original = sha256_file

    def lying(path, *count):
        return "0" * 64 if path.name.endswith("0002.incomplete") else original(path, *count)

    monkeypatch.setattr("hfship.archive.pack_run.sha256_file", lying)
    with pytest.raises(DiskError, match="gives back other bytes"):
        a.pack(model, tmp_path / "out", split=SPLIT, read_back=True)
    assert not list((tmp_path / "out").glob("*.0001"))


def kill_at(hfship, argv, delay):
    process = subprocess.Popen(
        [sys.executable, ROOT / "hfship.py", *map(str, argv)],
        env=hfship.env(),
        stderr=subprocess.DEVNULL,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_pack_killed_as_parts_get_their_names_goes_on(
    model, parts, tmp_path, monkeypatch, hfship
):
    """All parts are complete then, some under their names already: none is made a second time."""
    renamed = []

    def kill_at_the_third(source, target):
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(target)
        os.rename(source, target)

    monkeypatch.setattr("hfship.archive.pack.rename_durably", kill_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        a.pack(model, tmp_path / "killed", split=SPLIT)
    monkeypatch.undo()
    before = {path.stat().st_ino for path in (tmp_path / "killed").glob("*.0*")}
    hfship("pack", model, "-o", tmp_path / "killed", "--split", SPLIT)
    after = {path.stat().st_ino for path in (tmp_path / "killed").glob("*.0*")}
    assert contents(tmp_path / "killed") == contents(parts.folder)
    assert len(after) == 5 and len(after & before) >= 4


@pytest.mark.parametrize("jobs", [1, 2, 8])
@pytest.mark.parametrize("gaps", [(0,), (1,), (3,), (0, 2), (1, 3), (4,), (1, 4)], ids=str)
def test_parts_that_are_missing_among_complete_ones_are_made(
    gaps, jobs, model, parts, tmp_path, monkeypatch
):
    """Also where the last part is open until the tables come, and waits for them."""
    out = tmp_path / "killed"

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hfship.archive.pack.rename_durably", kill)
        a.pack(model, out, split=SPLIT)
    complete = sorted(out.glob("*.0*"))
    assert len(complete) == 5
    for gap in gaps:
        complete[gap].write_bytes(b"changed")
    a.pack(model, out, split=SPLIT, jobs=jobs)
    assert contents(out) == contents(parts.folder)


@pytest.mark.parametrize("seed", range(6))
def test_killed_pack_goes_on_with_its_complete_parts(seed, tmp_path, hfship):
    a.make_model(tmp_path / "m", {f"w{i}.bin": a.noise(12_000_000, i) for i in range(5)})
    whole = contents(a.pack(tmp_path / "m", tmp_path / "whole", split=5_000_000).folder)
    argv = ["pack", tmp_path / "m", "-o", tmp_path / "out", "--split", 5_000_000]
    for _ in range(3):
        kill_at(hfship, argv, random.Random(seed).uniform(0.15, 0.6))
    found = sorted((tmp_path / "out").glob("*.0*"))  # some may have got their names
    journal = tmp_path / "out/m.tar.zst.incomplete"
    complete = journal.read_text().count("\n") - 1 if journal.exists() else 0
    if complete > 1 and seed % 2 and found[1].suffix == ".incomplete":
        # A part that changed meanwhile is written again.
        with found[1].open("r+b") as stream:
            stream.seek(77)
            stream.write(b"changed")
        found.pop(1)
        complete -= 1
    before = {path.stat().st_ino for path in found}
    hfship(*argv)
    assert contents(tmp_path / "out") == whole
    after = {path.stat().st_ino for path in (tmp_path / "out").glob("*.0*")}
    assert len(before & after) >= complete - 1  # the part with the tables may be made anew


def test_a_resumed_pack_still_proves_every_file(model, tmp_path, monkeypatch):
    plan = plan_pack(model, read_manifest(model), PackOptions(split=SPLIT))

    def stop_after(self, path, sha256, sealed=PartWriter.sealed):
        sealed(self, path, sha256)
        if len(self.parts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PartWriter, "sealed", stop_after)
    with pytest.raises(KeyboardInterrupt):
        pack_model(plan, tmp_path / "out", a.QUIET)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("*.0*"))) == 2
    with a.flipped(model / "w1.bin", 5), pytest.raises(
        IntegrityError, match="not what its manifest says"
    ):
        pack_model(plan, tmp_path / "out", a.QUIET)
    assert list((tmp_path / "out").iterdir()) == []


def test_twelve_hundred_parts(tmp_path, hfship):
    a.make_model(tmp_path / "n", {"w.bin": a.noise(50 << 20)})
    files = a.pack(tmp_path / "n", tmp_path / "parts", split=80_000, frame_size=40_000)
    assert len(files.paths) >= 1200
    assert a.verify(files) == []
    hfship("unpack", files.path, "-o", tmp_path / "un")
    assert a.tree(tmp_path / "un/n") == a.tree(tmp_path / "n")


# -- unpacking from media


@pytest.mark.parametrize("order", [[0], [4], [2]])
def test_media_are_asked_for_one_after_the_other(order, parts, tmp_path, hfship):
    slot, shelf = tmp_path / "slot", tmp_path / "shelf"
    slot.mkdir()
    paths = parts.paths
    shutil.move(parts.folder, shelf)
    shutil.copy(shelf / "m.tar.zst.sha256", slot)
    shutil.copy(shelf / paths[order[0]].name, slot)
    process = hfship.start(
        "unpack", slot / paths[order[0]].name, "-o", tmp_path / "un", "--wait", "-j", "1"
    )
    asked = []
    for line in process.stderr:
        if "waiting for the medium with" not in line:
            continue
        asked.append(line.split("with ")[1].split(" ")[0])
        for path in slot.glob("*.tar.zst.0*"):
            path.unlink()
        shutil.copy(shelf / asked[-1], slot / "copying")
        os.rename(slot / "copying", slot / asked[-1])
    assert process.wait() == 0 and a.tree(tmp_path / "un/m") == FILES
    assert {path.name for path in paths[1:-1]} <= set(asked) | {paths[order[0]].name}


def test_waiting_for_a_medium_ends_by_ctrl_c(parts, tmp_path, hfship):
    parts.paths[1].unlink()
    process = hfship.start("unpack", parts.path, "-o", tmp_path / "un", "--wait")
    while "waiting" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)  # without a signal it waits for ever
    assert process.returncode == 130


@pytest.mark.parametrize("profile", ["standard", "smallest"])
def test_only_what_is_asked_for_is_read(profile, model, tmp_path, hfship):
    files = a.pack(model, tmp_path / "out", split=SPLIT, profile=profile)
    archive = open_archive(files)
    (start,) = [s.start for s in archive.segments if s.entry and s.entry.path == "w2.bin"]
    needed = {
        p.path
        for p in archive.parts
        for f in archive.frames
        if f.stop > start and p.start <= f.offset < p.stop
    }
    unneeded = [p for p in files.paths[1:-1] if p not in needed]
    assert unneeded
    for path in unneeded:
        path.unlink()
    hfship("unpack", files.path, "-o", tmp_path / "un", "--only", "w2*", "--only", "config.json")
    assert a.tree(tmp_path / "un/m") == {p: FILES[p] for p in ("w2.bin", "config.json")}
    left_out = f"partial by choice: {len(FILES) - 2} other files of the model left out"
    assert left_out in hfship("verify", tmp_path / "un/m").stdout
    hfship("pack", tmp_path / "un/m", "-o", tmp_path / "again")
    assert left_out in hfship("verify", tmp_path / "again/m.tar.zst").stdout
    said = hfship(
        "unpack", tmp_path / "again/m.tar.zst", "-o", tmp_path / "un4", "--only", "w2*"
    ).stdout
    assert f"partial by choice: {len(FILES) - 1} other files" in said
    hfship("unpack", files.path, "-o", tmp_path / "un2", "--only", "w1*", code=6)
    assert (
        "matches nothing"
        in hfship("unpack", files.path, "-o", tmp_path / "un3", "--only", "nothing", code=5).stderr
    )


# -- killed, damaged, too small


def test_a_killed_unpack_goes_on_inside_a_file(tmp_path, monkeypatch, hfship):
    monkeypatch.setattr("hfship.archive.check.FLUSH_SIZE", 8 << 20)
    files = {"w.bin": a.noise(60 << 20), "v.bin": a.noise(5 << 20)}
    a.make_model(tmp_path / "m", files)
    archive = a.pack(tmp_path / "m", tmp_path / "out")
    original, count = Archive.unit, []

    def failing(self, frame):
        count.append(frame)
        if len(count) > 20:
            time.sleep(0.5)  # the leader is told what was taken before, and writes its journal
            raise KeyboardInterrupt
        return original(self, frame)

    monkeypatch.setattr(Archive, "unit", failing)
    with pytest.raises(KeyboardInterrupt):
        a.unpack(archive, tmp_path / "un")
    lines = [
        json.loads(x)
        for x in (tmp_path / "un/m~incomplete/.hfship/journal").read_text().splitlines()
    ]
    assert lines and lines[-1][2] >= 8 << 20
    read = []
    monkeypatch.setattr(
        Archive, "unit", lambda self, frame: read.append(frame.length) or original(self, frame)
    )
    assert a.unpack(archive, tmp_path / "un").written >= 1
    assert a.tree(tmp_path / "un/m") == files
    assert sum(read) < (66 << 20) - (lines[-1][2] - (9 << 20))
    assert not (tmp_path / "un/m/.hfship/journal").exists()


@pytest.mark.parametrize("lie", ["changed", "journal", "junk", "short"])
def test_a_journal_is_only_a_hint(lie, tmp_path, monkeypatch):
    monkeypatch.setattr("hfship.archive.check.FLUSH_SIZE", 8 << 20)
    a.make_model(tmp_path / "m", {"w.bin": a.noise(30 << 20)})
    archive = a.pack(tmp_path / "m", tmp_path / "out")
    work = tmp_path / "un/m~incomplete"
    (work / ".hfship/partial").mkdir(parents=True)
    (work / MARK_PATH).touch()
    content = bytearray(a.noise(30 << 20))
    content[1000] ^= lie == "changed"
    (work / work_path("w.bin")).write_bytes(content[: 9 << 20] if lie == "short" else content)
    sha256 = read_manifest(tmp_path / "m").files[0].sha256
    line = json.dumps(["w.bin", sha256, (8 << 20) if lie != "journal" else 1 << 50])
    (work / ".hfship/journal").write_text("junk\n[1]\n{}\n" if lie == "junk" else line + "\n")
    a.unpack(archive, tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == {"w.bin": a.noise(30 << 20)}


@pytest.mark.parametrize("seed", range(6))
def test_kill_at_any_time_then_resume(seed, tmp_path, hfship):
    files = {"w.bin": a.noise(150_000_000, seed), "v.bin": a.noise(5_000_000)}
    a.make_model(tmp_path / "m", files)
    profile = PROFILES[seed % 3]
    archive = a.pack(tmp_path / "m", tmp_path / "out", split=40_000_000, profile=profile)
    consume = ["--consume"] if seed % 2 else []
    argv = ["unpack", archive.path, "-o", tmp_path / "un", *consume]
    for _ in range(3):
        kill_at(hfship, argv, random.Random(seed).uniform(0.15, 0.5))
    if not (tmp_path / "un/m").exists():
        hfship(*argv)
    assert a.tree(tmp_path / "un/m") == files
    assert sorted(p.name for p in (tmp_path / "un").iterdir()) == ["m"]
    hfship("verify", tmp_path / "un/m")


def test_consume_needs_room_for_the_model_and_one_part(small_disk, tmp_path, hfship):
    files = {**a.SMALL, **{f"w{i}.bin": a.noise(6_000_000, i) for i in range(4)}}
    a.make_model(tmp_path / "m", files)
    disk = small_disk(34)
    a.pack(tmp_path / "m", disk / "in", split=5_000_000)
    assert "--consume" in hfship("unpack", disk / "in", "-o", disk / "un", code=7).stderr
    hfship("unpack", disk / "in", "-o", disk / "un", "--consume")
    assert a.tree(disk / "un/m") == files
    assert not list((disk / "in").glob("m.tar*"))


def test_consume_on_a_medium_that_cannot_be_written_is_told(parts, small_disk, tmp_path, hfship):
    disk = small_disk(40)
    shutil.copytree(parts.folder, disk / "in")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = hfship("unpack", disk / "in", "-o", tmp_path / "un", "--consume", code=7)
    assert "read-only" in done.stderr and "leave out --consume" in done.stderr


def test_consume_keeps_what_a_damaged_part_still_needs(tmp_path, hfship, monkeypatch):
    a.make_model(tmp_path / "m", {"w.bin": a.noise(260_000_000), "v.bin": a.noise(9_000_000)})
    files = a.pack(tmp_path / "m", tmp_path / "out", split=70_000_000)
    spare = files.paths[2].read_bytes()
    with a.flipped(files.paths[2], 40_000_000):
        done = hfship("unpack", files.path, "-o", tmp_path / "un", "--consume", code=6)
    assert "m.tar.zst.0003" in done.stderr and "copy m.tar.zst.0003 again" in done.stderr
    assert not files.paths[1].exists() and all(p.exists() for p in files.paths[2:])
    files.paths[2].write_bytes(spare)
    hfship("unpack", files.path, "-o", tmp_path / "un", "--consume")
    assert a.tree(tmp_path / "un/m") == a.tree(tmp_path / "m")
    assert not list((tmp_path / "out").glob("m.tar*"))


@pytest.mark.parametrize("megabytes", [3, 5, 7, 9, 11, 13, 15, 17, 18, 19])
def test_a_disk_that_runs_full_anywhere_loses_nothing(
    megabytes, model, parts, small_disk, monkeypatch
):
    disk = small_disk(megabytes)
    monkeypatch.setattr("hfship.archive.pack.require_room", lambda *_: None)
    monkeypatch.setattr("hfship.archive.unpack.require_room", lambda *_: None)
    monkeypatch.setattr("hfship.archive.unpack._require_room_for_files", lambda *_: None)
    if megabytes < 16:
        with pytest.raises(DiskError, match="the disk is full"):
            a.pack(model, disk, split=SPLIT)
        assert list(disk.iterdir()) == []
    try:
        a.unpack(parts, disk)
    except DiskError:
        assert not (disk / "m").exists()
        subprocess.run(["mount", "-o", "remount,size=40M", disk], check=True)
        a.unpack(parts, disk)
    assert a.tree(disk / "m") == FILES


# -- quick, repair


def test_quick_finds_every_flipped_byte(tmp_path, hfship):
    a.make_model(tmp_path / "m", a.SMALL)
    files = a.pack(tmp_path / "m", tmp_path / "out", frame_size=900)
    for offset in range(files.path.stat().st_size):
        with a.flipped(files.path, offset, 1 << offset % 8):
            assert verify_archive(open_archive(files), 1, a.QUIET, quick=True), offset
    assert "only checksums" in hfship("verify", files.path, "--quick").stdout
    with a.flipped(files.path, 300):
        hfship("verify", files.path, "--quick", code=6)


def harm_frames(files):
    for path, at in ((files.paths[0], 99), (files.paths[2], 3_000_000)):
        with path.open("r+b") as stream:
            stream.seek(at)
            stream.write(b"harm")


HARMS = {
    "frames": harm_frames,
    "missing part": lambda f: f.paths[1].unlink(),
    "missing first part": lambda f: f.paths[0].unlink(),
    "missing last part": lambda f: f.paths[-1].unlink(),
    "cut part": lambda f: os.truncate(f.paths[1], 1000),
    "longer part": lambda f: f.paths[1].open("ab").write(b"more"),
    "cut tables": lambda f: os.truncate(f.paths[-1], f.paths[-1].stat().st_size - 9),
    "nothing": lambda f: f.paths,
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_repair_takes_only_what_is_damaged_from_the_other_copy(harm, parts, tmp_path, hfship):
    shutil.copytree(parts.folder, tmp_path / "copy")
    whole = contents(parts.folder)
    HARMS[harm](parts)
    some = next(path for path in parts.paths if path.exists())
    done = hfship("verify", some, "--repair-from", tmp_path / "copy")
    assert "replaced" in done.stdout and contents(parts.folder) == whole


def test_repair_from_what_cannot_help_is_refused(parts, model, tmp_path, hfship):
    other = a.pack(model, tmp_path / "other", split=9_000_000)
    assert "another way" in hfship("verify", parts.path, "--repair-from", other.path, code=6).stderr
    shutil.copytree(parts.folder, tmp_path / "copy")
    harm_frames(parts)
    harm_frames(a.files_in(tmp_path / "copy"))
    assert (
        "use another copy"
        in hfship("verify", parts.path, "--repair-from", tmp_path / "copy", code=6).stderr
    )


# -- delta


@pytest.fixture
def newer(tmp_path, model):
    files = {
        **FILES,
        "config.json": b"new",
        "moved/w1.bin": FILES["w1.bin"],
        "w4.bin": a.noise(2 << 20, 4),
    }
    del files["w1.bin"]
    a.make_model(tmp_path / "new" / "m", files)
    return tmp_path / "new" / "m", files


@pytest.mark.parametrize("since", ["model", "manifest", "archive"])
@pytest.mark.parametrize("profile", ["standard", "smallest"])
def test_delta_carries_only_what_is_new(since, profile, model, parts, newer, tmp_path, hfship):
    places = {"model": model, "manifest": model / ".hfship/manifest.json", "archive": parts.path}
    hfship(
        "pack", newer[0], "-o", tmp_path / "delta", "--since", places[since], "--profile", profile
    )
    delta = tmp_path / "delta/m.delta.tar.zst"
    assert delta.stat().st_size < 3 << 20
    assert "come from an older version" in hfship("verify", delta).stdout
    done = hfship("unpack", delta, "-o", tmp_path / "un", code=5)
    assert "--base" in done.stderr and not (tmp_path / "un/m").exists()
    hfship("unpack", parts.path, "-o", tmp_path / "un")
    before = (tmp_path / "un/m/w1.bin").stat().st_ino
    (row,) = json.loads(hfship("unpack", delta, "-o", tmp_path / "un", "--json").stdout)
    assert a.tree(tmp_path / "un/m") == newer[1] and row["written"] == 2
    assert (tmp_path / "un/m/moved/w1.bin").stat().st_ino == before
    hfship("unpack", delta, "-o", tmp_path / "un2", "--base", model)
    assert a.tree(tmp_path / "un2/m") == newer[1]


@pytest.mark.parametrize("base", ["its own", "another"])
def test_deltas_are_verified_with_their_base_without_unpacking(
    base, model, newer, tmp_path, hfship
):
    """A chain of two deltas, named in any order; over another version it is not whole."""
    newest = tmp_path / "newest/m"
    a.make_model(newest, {**newer[1], "w5.bin": a.noise(2 << 20, 5)})
    hfship("pack", newer[0], "-o", tmp_path / "one", "--since", model)
    hfship("pack", newest, "-o", tmp_path / "two", "--since", newer[0])
    if base == "another":
        (model / "w3.bin").write_bytes(a.noise(2 << 20, 9))
        shutil.rmtree(model / ".hfship")
    hfship("pack", model, "-o", tmp_path / "whole")
    names = ["two/m.delta.tar.zst", "whole/m.tar.zst", "one/m.delta.tar.zst"]
    places = [tmp_path / name for name in names]
    done = hfship("verify", *places)
    chain = f"{places[1]}, then {places[2]}, then {places[0]}"
    if base == "its own":
        assert "m: proven as a chain, with all files of version " in done.stderr
        assert chain in done.stderr
    else:
        assert f"{places[0]} is a delta, and none of the archives beside it" in done.stderr


def test_delta_on_a_damaged_version_is_refused(model, parts, newer, tmp_path, hfship):
    hfship("pack", newer[0], "-o", tmp_path / "delta", "--since", model)
    hfship("unpack", parts.path, "-o", tmp_path / "un")
    with a.flipped(tmp_path / "un/m/w2.bin", 5):
        done = hfship("unpack", tmp_path / "delta/m.delta.tar.zst", "-o", tmp_path / "un", code=5)
        assert "w2.bin" in done.stderr


@pytest.mark.parametrize(
    "text", [b'{"format": "hfship-delta/1", "absent": ["nothing"]}\n', b"[]\n", b"junk", b"{}\n"]
)
def test_a_lying_delta_is_refused(text, model, newer, tmp_path, monkeypatch):
    monkeypatch.setattr("hfship.archive.pack_plan.delta_json", lambda _: text)
    plan = plan_pack(newer[0], read_manifest(newer[0]), PackOptions(since=None))
    members = [("m/.hfship/manifest.json", plan.text), ("m/.hfship/delta.json", text)]
    monkeypatch.undo()
    stream = b"".join(tar_header(p, len(c)) + c + padding(len(c)) for p, c in members) + bytes(1024)
    files = a.seal(stream, tmp_path / "m.tar.zst")
    assert a.verify(files)
    with pytest.raises(IntegrityError):
        a.unpack(files, tmp_path / "un")


# -- names that every filesystem takes; test_kernel.py has the real FAT32


@pytest.mark.parametrize(
    "name",
    ["a:b", "a?b", "a*b", 'a"b', "a<b", "a>b", "a|b", "a\\b", "a/b", ".a", "ä", "a b", "x" * 97],
)
def test_names_that_fat_cannot_hold_are_refused(name, model, tmp_path, hfship):
    assert (
        "cannot be the name"
        in hfship("pack", model, "--name", name, "-o", tmp_path / "out", code=2).stderr
    )


@pytest.mark.parametrize("name", ["m", "Qwen3-14B", "a..", "con", "x" * 96])
def test_names_written_beside_archives_are_legal_everywhere(name, model, tmp_path):
    """FAT, exFAT, NTFS and UDF: no reserved character, no dot or blank at the end, at most 255 characters."""
    plan = plan_pack(
        model, make_manifest(name, read_manifest(model).files), PackOptions(split=SPLIT)
    )
    pack_model(plan, tmp_path / "out", a.QUIET)
    for path in (tmp_path / "out").iterdir():
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,120}", path.name) and not path.name.endswith(".")
