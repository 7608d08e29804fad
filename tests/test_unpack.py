"""damage is found and located wherever it is; nothing evil gets out; a killed run goes on."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from conftest import ROOT
from hfship.archive.check import ArchiveCheck
from hfship.archive.layout import stream_layout
from hfship.archive.opening import open_archive
from hfship.archive.stream_check import Sink
from hfship.base.content import MARK_PATH, work_path
from hfship.base.errors import DiskError, IntegrityError
from hfship.base.files import pread_exactly, sha256_file
from hfship.base.manifest import (
    MANIFEST_FORMAT,
    FileEntry,
    Source,
    make_manifest,
    parse_manifest,
    write_manifest,
)
from hfship.base.report import Reporter
from support import archives as a


@pytest.fixture
def small(tmp_path):
    """A few KB in many frames, all kinds of segments."""
    a.make_model(tmp_path / "m", a.SMALL)
    return tmp_path / "m", a.pack(tmp_path / "m", tmp_path / "whole", frame_size=900)


@pytest.fixture
def parts(tmp_path):
    a.make_model(tmp_path / "m", {"a": a.noise(9000), "b": b"text" * 500, "c": a.noise(9000, 1)})
    return tmp_path / "m", a.pack(tmp_path / "m", tmp_path / "parts", frame_size=1000, split=5000)


def test_every_flipped_byte_is_found_located_and_refused(small, tmp_path):
    _, files = small
    size = files.path.stat().st_size
    assert size < 6000
    for offset in range(size):
        with a.flipped(files.path, offset, 1 << offset % 8):
            damages = a.verify(files)
            located = [
                d
                for d in damages
                if d.offset is not None and d.offset <= offset < d.offset + d.size
            ]
            assert located and located[0].parts == ("m.tar.zst",), (offset, damages)
            with pytest.raises(IntegrityError):
                a.unpack(files, tmp_path / "un")
            assert not (tmp_path / "un/m").exists()
    assert a.verify(files) == []
    a.unpack(files, tmp_path / "un")


def test_every_bit_that_zstd_itself_would_not_miss_is_found(small):
    _, files = small
    archive = open_archive(files)
    frame = archive.frames[2]
    for bit in range(8 * frame.size):
        with a.flipped(files.path, frame.offset + bit // 8, 1 << bit % 8):
            (damage,) = a.verify(files)
            assert damage.frames == (3, 3)


def test_every_cut_is_found_and_refused(small, tmp_path):
    _, files = small
    whole = files.path.read_bytes()
    for size in range(len(whole)):
        files.path.write_bytes(whole[:size])
        assert a.verify(files), size
        with pytest.raises(IntegrityError):
            a.unpack(files, tmp_path / "un")
    files.path.write_bytes(whole + b"\0")
    assert a.verify(files)
    files.path.write_bytes(b"\0" + whole)
    assert a.verify(files)


def test_damage_names_file_and_byte_range(hfship, tmp_path):
    a.make_model(tmp_path / "m", {**a.SMALL, "w.safetensors": a.noise(9 << 20)})
    files = a.pack(tmp_path / "m", tmp_path / "out")
    frame = open_archive(files).frames[2]
    with a.flipped(files.path, frame.offset + 1000), a.flipped(files.path, 40):
        done = hfship("verify", files.path, "--json", code=6)
        (row,) = json.loads(done.stdout)
        first, second = row["damages"]
        assert (first["frames"], second["frames"]) == ([1, 1], [3, 3])
        hfship("unpack", files.path, "-o", tmp_path / "un", code=6)
    with a.flipped(files.path, frame.offset + 1000):
        done = hfship("verify", files.path, code=6)
        assert re.search(
            r"m\.tar\.zst, frame 3, bytes \d+-\d+ of the archive: CRC-32 differs", done.stderr
        )
        assert f"hits w.safetensors bytes {2 << 20}-{(4 << 20) - 1}" in done.stderr
        assert "copy m.tar.zst again" in done.stderr


def test_undamaged_files_are_kept_for_the_run_after_the_repair(tmp_path):
    a.make_model(tmp_path / "m", a.BIG)
    files = a.pack(tmp_path / "m", tmp_path / "out")
    archive = open_archive(files)
    frame = next(
        f for f in archive.frames if "w1.safetensors" in str(archive.files_between(f.start, f.stop))
    )
    with a.flipped(files.path, frame.offset + 500), pytest.raises(IntegrityError):
        a.unpack(files, tmp_path / "un")
    assert not (tmp_path / "un/m").exists()
    assert a.unpack(files, tmp_path / "un").written == 1
    assert a.tree(tmp_path / "un/m") == a.tree(tmp_path / "m")


def part_of(files, number):
    return files.folder / f"m.tar.zst.{number:04d}"


def swap(files):
    one, two, spare = part_of(files, 1), part_of(files, 2), files.folder / "spare"
    one.rename(spare), two.rename(one), spare.rename(two)


def cut_at_frame_edge(files):
    archive = open_archive(files)
    part = archive.parts[1]
    last = [f for f in archive.frames if part.start <= f.offset < part.start + part.size][-1]
    os.truncate(part.path, last.offset - part.start)


PART_TRAPS = {
    "missing": (lambda f: part_of(f, 2).unlink(), {"m.tar.zst.0002"}),
    "first missing": (lambda f: part_of(f, 1).unlink(), {"m.tar.zst.0001"}),
    "last missing": (lambda f: f.paths[-1].unlink(), {"m.tar.zst.0005"}),
    "two missing": (lambda f: [part_of(f, n).unlink() for n in (2, 4)], {"m.tar.zst.0002", "m.tar.zst.0004"}),
    "renamed": (lambda f: part_of(f, 2).rename(f.folder / "m.tar.zst.0002.bak"), {"m.tar.zst.0002"}),
    "swapped": (swap, {"m.tar.zst.0001", "m.tar.zst.0002"}),
    "empty": (lambda f: os.truncate(part_of(f, 3), 0), {"m.tar.zst.0003"}),
    "cut": (lambda f: os.truncate(part_of(f, 3), 777), {"m.tar.zst.0003"}),
    "cut at a frame edge": (cut_at_frame_edge, {"m.tar.zst.0002"}),
    "copied over": (lambda f: shutil.copy(part_of(f, 3), part_of(f, 2)), {"m.tar.zst.0002"}),
    "renumbered": (lambda f: part_of(f, 2).rename(part_of(f, 9)), {"m.tar.zst.0002", "m.tar.zst.0009"}),
    "duplicated": (lambda f: shutil.copy(part_of(f, 3), part_of(f, 6)), {"m.tar.zst.0006"}),
    "duplicated with tables": (lambda f: shutil.copy(part_of(f, 5), part_of(f, 7)), {"m.tar.zst.0007"}),
    "appended to": (lambda f: part_of(f, 2).open("ab").write(b"x"), {"m.tar.zst.0002"}),
}  # fmt: skip


@pytest.mark.parametrize("trap", PART_TRAPS)
@pytest.mark.parametrize("sums", [True, False])
def test_bad_parts_are_named(parts, tmp_path, trap, sums, hfship):
    _, files = parts
    assert len(files.paths) == 5
    harm, names = PART_TRAPS[trap]
    if not sums:
        files.sums.unlink()
    harm(files)
    done = hfship("verify", files.folder, code=6)
    if trap == "last missing" and not sums:
        assert "cut" in done.stderr or "missing" in done.stderr
    else:
        assert (
            set(re.findall(r"m\.tar\.zst\.\d{4}", done.stderr.split("next")[0].split("\n", 1)[1]))
            == names
        )
    hfship("unpack", files.folder, "-o", tmp_path / "un", code=6)
    assert not (tmp_path / "un/m").exists()


def test_part_of_another_archive_is_named(parts, tmp_path):
    _, files = parts
    a.make_model(
        tmp_path / "other/m", {"a": a.noise(9000, 7), "b": b"text" * 500, "c": a.noise(9000, 8)}
    )
    other = a.pack(tmp_path / "other/m", tmp_path / "foreign", frame_size=1000, split=5000)
    shutil.copy(part_of(other, 2), part_of(files, 2))
    assert {name for damage in a.verify(files) for name in damage.parts} == {"m.tar.zst.0002"}


def test_a_part_left_over_from_a_larger_pack_is_blamed_not_ours(parts, tmp_path, hfship):
    _, files = parts
    a.make_model(
        tmp_path / "other/m", {"a": a.noise(9000, 7), "b": b"text" * 500, "c": a.noise(14000, 8)}
    )
    other = a.pack(tmp_path / "other/m", tmp_path / "foreign", frame_size=1000, split=5000)
    assert len(other.paths) == 6
    shutil.copy(part_of(other, 6), part_of(files, 6))
    said = hfship("verify", files.folder, code=6).stderr
    assert "damaged in 1 place" in said and "m.tar.zst.0006: is not part of this archive" in said
    assert "remove m.tar.zst.0006" in said
    part_of(files, 6).unlink()
    hfship("verify", files.folder)


def test_verify_names_the_model_and_says_when_the_file_was_renamed(small, tmp_path, hfship):
    _, files = small
    done = hfship("verify", files.path)
    assert "model m, 4 files" in done.stdout and "renamed" not in done.stderr
    files.path.rename(tmp_path / "whole/other.tar.zst")
    said = hfship("verify", tmp_path / "whole/other.tar.zst").stderr
    assert "was renamed: m.tar.zst.sha256" in said


def test_a_refused_unpack_leaves_nothing_behind(small, tmp_path, hfship, small_disk):
    _, files = small
    with a.flipped(files.path, 300):
        hfship("unpack", files.path, "-o", tmp_path / "un", code=6)
    disk = small_disk(1)
    a.make_model(tmp_path / "n", {"w": a.noise(3 << 20)})
    hfship("unpack", a.pack(tmp_path / "n", tmp_path / "out").path, "-o", disk, code=7)
    assert list(disk.iterdir()) == [] and list((tmp_path / "un").glob("*")) in (
        [],
        [tmp_path / "un/m~incomplete"],
    )


def test_what_is_not_found_is_told_with_the_folders_searched(hfship, tmp_path):
    said = hfship("verify", "nothing", code=5).stderr
    for folder in ("transfer", "transfer_package", "models", "site"):
        assert str(hfship.home / folder) in said


def test_any_part_the_folder_or_the_name_means_the_archive(hfship, parts, tmp_path):
    model, files = parts
    env = {
        "HFSHIP_TRANSFER_DIR": str(files.folder),
        "HFSHIP_SITE_MODELS_DIR": str(tmp_path / "site"),
    }
    for argument in (part_of(files, 3), files.folder, "m", "m.tar.zst", files.sums):
        assert "ok: " in hfship("verify", argument, env=env).stdout
    assert "unpacked" in hfship("unpack", "m", env=env).stdout
    assert a.tree(tmp_path / "site/m") == a.tree(model)
    assert "site/m: 3 files" in hfship("verify", tmp_path / "site/m").stdout
    hfship("verify", "nothing", env=env, code=5)
    hfship("unpack", "nothing", env=env, code=5)


def manifest_text(files, name="m"):
    """A manifest that says whatever it likes: path -> bytes."""
    value = {"format": MANIFEST_FORMAT, "name": name, "source": None, "files": []}
    for path, content in files.items():
        value["files"].append(
            {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        )
    return json.dumps(value).encode()


def info(name, kind, link="", size=0):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


GOOD = {"a": b"aaaa", "b": b"bbbb"}
EVIL = {
    "dotdot in the manifest": ({**GOOD, "../x": b"evil"}, [("m/../x", b"evil")]),
    "absolute in the manifest": ({**GOOD, "/tmp/x": b"evil"}, [("/tmp/x", b"evil")]),
    "work folder in the manifest": (
        {**GOOD, ".hfship/lock": b"evil"},
        [("m/.hfship/lock", b"evil")],
    ),
    "dotdot in a header": (GOOD, [("m/../x", b"evil")]),
    "absolute in a header": (GOOD, [("/tmp/hfship-evil", b"evil")]),
    "extra member": (GOOD, [("m/c", b"evil")]),
    "duplicate member": (GOOD, [("m/a", b"evil")]),
    "symlink": (GOOD, [(info("m/c", tarfile.SYMTYPE, "/etc"), b"")]),
    "hardlink": (GOOD, [(info("m/c", tarfile.LNKTYPE, "/etc/passwd"), b"")]),
    "device": (GOOD, [(info("m/c", tarfile.CHRTYPE), b"")]),
    "folder": (GOOD, [(info("m/c", tarfile.DIRTYPE), b"")]),
    "missing member": ({**GOOD, "c": b"evil"}, []),
}


@pytest.mark.parametrize("trap", EVIL)
def test_evil_archives_write_nothing(trap, tmp_path, hfship):
    listed, extra = EVIL[trap]
    members = [("m/.hfship/manifest.json", manifest_text(listed))]
    members += [(f"m/{path}", GOOD[path]) for path in sorted(set(listed) & set(GOOD))]
    files = a.seal(a.tar_of(members + extra)[:-10240] + bytes(1024), tmp_path / "m.tar.zst")
    hfship("verify", files.path, code=6)
    hfship("unpack", files.path, "-o", tmp_path / "un" / "deep", code=6)
    assert not [p for p in (tmp_path / "un").rglob("*") if p.is_file() or p.is_symlink()]
    assert not os.path.exists("/tmp/hfship-evil")


def replaced(member):
    """An archive whose stream has the right length, but another header for file `a`."""
    text = manifest_text(GOOD)
    manifest = parse_manifest(text, "x")
    layout = stream_layout(manifest, text)
    stream = b"".join(s.known or {"a": b"aaaa", "b": b"bbbb"}[s.entry.path] for s in layout)
    (at,) = [s.start for s in layout if s.what == "tar header of m/a"]
    return stream[:at] + member.tobuf(tarfile.USTAR_FORMAT)[:512] + stream[at + 512 :]


@pytest.mark.parametrize(
    "member",
    [
        info("m/../x", tarfile.REGTYPE, size=4),
        info("m/a", tarfile.SYMTYPE, "/etc/passwd"),
        info("m/a", tarfile.LNKTYPE, "/etc/passwd"),
        info("m/a", tarfile.REGTYPE, size=4096),
        info("m/a", tarfile.CHRTYPE),
    ],
    ids=["dotdot", "symlink", "hardlink", "lying size", "device"],
)
def test_lying_headers_are_found_and_named(member, tmp_path, hfship):
    files = a.seal(replaced(member), tmp_path / "m.tar.zst")
    assert "tar header of m/a differs" in hfship("verify", files.path, code=6).stderr
    done = hfship("unpack", files.path, "-o", tmp_path / "un", code=6)
    assert "tar header of m/a differs" in done.stderr and "pack the model again" in done.stderr
    assert not (tmp_path / "un/m").exists() and not (tmp_path / "un/x").exists()


def test_a_file_with_another_hash_than_the_manifest_says_is_named(tmp_path):
    text = manifest_text(GOOD)
    layout = stream_layout(parse_manifest(text, "x"), text)
    stream = b"".join(s.known or {"a": b"aaaa", "b": b"bbbX"}[s.entry.path] for s in layout)
    (damage,) = a.verify(a.seal(stream, tmp_path / "m.tar.zst"))
    assert "m/b has SHA-256" in damage.what and damage.files == (("b", 0, 3),)


def link_target(target, elsewhere):
    target.symlink_to(elsewhere)


def work_folder(target):
    """m~incomplete with our mark, as a killed run leaves it."""
    folder = target.parent / "m~incomplete"
    (folder / ".hfship/partial").mkdir(parents=True)
    (folder / MARK_PATH).touch()
    return folder


def link_inside(target, elsewhere):
    work_folder(target)
    (target.parent / "m~incomplete/sub").symlink_to(elsewhere)


def link_staging(target, elsewhere):
    (target.parent / "m~incomplete").symlink_to(elsewhere)


def link_work_dir(target, elsewhere):
    (target.parent / "m~incomplete").mkdir()
    (target.parent / "m~incomplete/.hfship").symlink_to(elsewhere)


def link_file(target, elsewhere):
    (work_folder(target) / work_path("config.json")).symlink_to(elsewhere / "f")


def link_partial(target, elsewhere):
    partial = work_folder(target) / ".hfship/partial"
    partial.rmdir()
    partial.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "plant, code",
    [
        (link_target, 6),
        (link_staging, 6),
        (link_work_dir, 6),
        (link_inside, 0),
        (link_file, 0),
        (link_partial, 0),
    ],
)
def test_links_are_never_followed(plant, code, small, tmp_path, hfship):
    _, files = small
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "un").mkdir()
    plant(tmp_path / "un/m", elsewhere)
    hfship("unpack", files.path, "-o", tmp_path / "un", code=code)
    assert list(elsewhere.iterdir()) == []
    if code == 0:
        assert not [p for p in (tmp_path / "un").rglob("*") if p.is_symlink()]


def test_link_below_an_intact_model_is_refused(small, tmp_path, hfship):
    _, files = small
    a.unpack(files, tmp_path / "un")
    shutil.move(tmp_path / "un/m/sub", tmp_path / "elsewhere")
    (tmp_path / "un/m/sub").symlink_to(tmp_path / "elsewhere")
    before = a.tree(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/a.txt").unlink()
    hfship("unpack", files.path, "-o", tmp_path / "un", code=6)
    assert not (tmp_path / "elsewhere/a.txt").exists() and "a.txt" in before


def test_same_version_is_proven_and_repaired_in_place(hfship, small, tmp_path):
    model, files = small
    hfship("unpack", files.path, "-o", tmp_path / "un")
    assert (
        "there already and are intact" in hfship("unpack", files.path, "-o", tmp_path / "un").stdout
    )
    (tmp_path / "un/m/mine.txt").write_text("mine")
    (tmp_path / "un/m/sub/b.bin").write_bytes(b"damaged")
    hfship("verify", tmp_path / "un/m", code=6)
    (row,) = json.loads(hfship("unpack", files.path, "-o", tmp_path / "un", "--json").stdout)
    assert row["written"] == 1 and (tmp_path / "un/m/mine.txt").exists()
    assert "not in the manifest: mine.txt" in hfship("verify", tmp_path / "un/m").stderr


def test_another_version_is_replaced_once_the_new_one_is_proven(small, tmp_path, hfship):
    model, files = small
    a.unpack(files, tmp_path / "un")
    (model / "config.json").write_bytes(b"new")
    (model / "empty").unlink()
    a.make_model(model, {"config.json": b"new"})
    newer = a.pack(model, tmp_path / "newer")
    (tmp_path / "un/m/mine.txt").write_text("mine")
    assert "mine.txt" in hfship("unpack", newer.path, "-o", tmp_path / "un", code=2).stderr
    (tmp_path / "un/m/mine.txt").unlink()
    with a.flipped(newer.path, 40):
        hfship("unpack", newer.path, "-o", tmp_path / "un", code=6)
    assert a.tree(tmp_path / "un/m") == a.SMALL
    hfship("unpack", newer.path, "-o", tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == {"config.json": b"new"}
    assert [p.name for p in (tmp_path / "un").iterdir()] == ["m"]


@pytest.mark.parametrize("delay", [0.15, 0.2, 0.25, 0.35, 0.5])
def test_killed_unpack_goes_on(tmp_path, hfship, delay):
    files = {f"w{i}.bin": a.noise(12_000_000, i) for i in range(6)}
    a.make_model(tmp_path / "m", files)
    archive = a.pack(tmp_path / "m", tmp_path / "out")
    argv = [
        sys.executable,
        ROOT / "hfship.py",
        "unpack",
        archive.path,
        "-o",
        tmp_path / "un",
        "-j",
        "1",
    ]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.kill()
    process.wait()
    finished = {p.name for p in (tmp_path / "un").rglob("*.bin") if p.is_file()}
    (row,) = json.loads(hfship("unpack", archive.path, "-o", tmp_path / "un", "--json").stdout)
    assert row["written"] == 6 - len(finished)
    assert a.tree(tmp_path / "un/m") == files
    assert [p.name for p in (tmp_path / "un").iterdir()] == ["m"]


SLOW = """
import sys, time; sys.path.insert(0, sys.argv.pop(1))
from hfship.archive.reader import Archive
from hfship.commands.run import main
decode = Archive.decode
Archive.decode = lambda *args: (print(end=".", flush=True), time.sleep(0.5), decode(*args))[2]
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["verify", "unpack"])
def test_ctrl_c_ends_at_once(tmp_path, command, number):
    a.make_model(tmp_path / "m", {f"w{i}.bin": bytes(40 << 20) for i in range(6)})
    archive = a.pack(tmp_path / "m", tmp_path / "out")
    where = ["-o", tmp_path / "un"] if command == "unpack" else []
    argv = [sys.executable, "-c", SLOW, ROOT / "src", command, archive.path, *where, "-j", "1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(3)
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"# what is complete is kept" in err
    assert time.monotonic() - started < 10, "all frames take half a minute"
    assert not (tmp_path / "un/m").exists()


def test_a_disk_that_runs_full_keeps_what_was_proven(tmp_path, small_disk, monkeypatch):
    a.make_model(tmp_path / "m", {f"w{i}.bin": a.noise(2_000_000, i) for i in range(4)})
    archive = a.pack(tmp_path / "m", tmp_path / "out")
    disk = small_disk(7)
    with pytest.raises(DiskError, match="free, 8.0 MB needed") as caught:
        a.unpack(archive, disk)
    assert "--consume" in caught.value.next_step
    monkeypatch.setattr("hfship.archive.unpack.require_room", lambda *_: None)
    with pytest.raises(DiskError, match="the disk is full"):
        a.unpack(archive, disk)
    assert not (disk / "m").exists()
    subprocess.run(["mount", "-o", "remount,size=20M", disk], check=True)
    assert a.unpack(archive, disk).written < 4
    assert a.tree(disk / "m") == a.tree(tmp_path / "m")


def test_a_full_disk_is_not_told_to_consume_what_cannot_be(small_disk, tmp_path, hfship):
    a.make_model(tmp_path / "m", {"w.bin": a.noise(8_000_000, 1)})
    archive = a.pack(tmp_path / "m", tmp_path / "out")
    disk = small_disk(7)
    for arguments in (("-",), (archive.path, "--consume")):
        with archive.path.open("rb") as stream:
            done = hfship("unpack", *arguments, "-o", disk, code=7, stdin=stream)
        assert "free space, or choose" in done.stderr and "--consume" not in done.stderr


def test_verify_takes_all_that_a_shells_star_gives(small, tmp_path, hfship):
    """NAME.tar.zst* names what lies beside the archive, too."""
    _, files = small
    Path(f"{files.path}.sig").write_text("{}")
    beside = sorted(files.folder.glob(f"{files.name}*"))
    assert len(beside) == 3 and hfship("verify", *beside).stdout.count("ok: ") == 1


def test_files_that_were_lost_are_not_counted_as_done(parts):
    _, files = parts
    part_of(files, 2).unlink()
    with Reporter().stage("verify", 1) as stage:
        damages = ArchiveCheck(open_archive(files), Sink(), 1).run(stage)
    lost = {path for damage in damages for path, *_ in damage.files}
    assert lost and stage.finished == stage.files - len(lost)


def test_inodes_are_counted_first(tmp_path, small_disk):
    a.make_model(tmp_path / "m", {f"f{i}": b"x" for i in range(40)})
    disk = small_disk(5, "nr_inodes=30")
    with pytest.raises(DiskError, match="too few inodes"):
        a.unpack(a.pack(tmp_path / "m", tmp_path / "out"), disk)


def test_read_errors_are_damage_at_a_place(small, monkeypatch):
    _, files = small
    original = pread_exactly

    def failing(fd, size, offset):
        if offset == frame.offset:
            raise OSError(5, "Input/output error")
        return original(fd, size, offset)

    frame = open_archive(files).frames[3]
    monkeypatch.setattr("hfship.archive.reader.pread_exactly", failing)
    (damage,) = a.verify(files)
    assert damage.frames == (4, 4) and "Input/output error" in damage.what


def test_another_model_of_the_same_name_is_replaced_only_by_force(hfship, tmp_path):
    for org in ("one", "two"):
        model = tmp_path / org / "m"
        a.make_model(model, {"config.json": org.encode()})
        entries = [FileEntry("config.json", 3, sha256_file(model / "config.json"))]
        source = Source("http://hub", f"{org}/m", "main", f"{org}/m", "0" * 40)
        write_manifest(model, make_manifest("m", entries, source))
        hfship("pack", model, "-o", tmp_path / f"medium-{org}")
    hfship("unpack", tmp_path / "medium-one", "-o", tmp_path / "site")
    done = hfship("unpack", tmp_path / "medium-two", "-o", tmp_path / "site", code=2)
    assert "it holds one/m, the archive holds two/m" in done.stderr
    hfship("unpack", tmp_path / "medium-two", "-o", tmp_path / "site", "--force")
    assert (tmp_path / "site" / "m" / "config.json").read_text() == "two"
