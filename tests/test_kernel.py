"""On a real kernel: FAT32 and its limits, media that are pulled out, and power cuts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest

from conftest import ROOT, Program
from hfship.archive.pack_plan import SPLITS
from hfship.base.content import work_path
from hfship.base.manifest import FileEntry, make_manifest, read_manifest
from support import archives as a
from support.kernel import Kernel

pytestmark = pytest.mark.real

FILES = {
    **a.SMALL,
    "w1.bin": a.noise(9 << 20, 1),
    "w2.bin": a.noise(8 << 20, 2),
    "w3.bin": bytes(3 << 20),
}
LARGE = {**a.SMALL, **{f"w{number}.bin": a.noise(40 << 20, number) for number in range(3)}}
SPLIT = 4_400_000
FAT_LIMIT = 2**32 - 1

# hfship, beside a Hub: the folder of its repositories, bytes a second (0: all it can), the size of
# a file `larger` that it lists, too (0: none), then what to run.
HUB = f"""
import subprocess, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
from support.hub import FaultHub
with FaultHub(Path(sys.argv[1])) as hub:
    hub.faults.rate_bps = float(sys.argv[2]) or None
    hub.faults.evil_size = int(sys.argv[3])
    hub.faults.evil_path = "larger" if hub.faults.evil_size else None
    code = subprocess.run([*sys.argv[4:], "--endpoint", hub.url]).returncode
    print("sent", hub.traffic.body_bytes, file=sys.stderr)
sys.exit(code)
"""
# hfship that believes that there is room.
CARELESS = f"""
import sys
sys.path.insert(0, {str(ROOT / "src")!r})
from hfship.archive import pack, unpack
from hfship.commands.run import main
pack.require_room = unpack.require_room = unpack._require_room_for_files = lambda *_: None
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def kernel(tmp_path: Path, pyz: Program) -> Iterator[Callable[..., Kernel]]:
    """kernel(megabytes, kind): a guest that runs, in which `pyz` runs then, too."""
    guests = []

    def start(megabytes: int, kind: str) -> Kernel:
        guests.append(Kernel(tmp_path, megabytes, kind))
        guests[-1].boot()
        pyz.run = guests[-1].run
        return guests[-1]

    yield start
    for guest in guests:
        guest.halt()


@pytest.fixture
def fat(kernel: Callable[..., Kernel]) -> Kernel:
    """A guest with an empty FAT32 disk of 100 MB."""
    return kernel(100, "vfat")


def started(guest: Kernel, pyz: Program, *args: Any) -> Any:
    """hfship at work in the guest."""
    return guest.start([*pyz.argv, *args], pyz.env())


def names_in(guest: Kernel, folder: Path) -> list:
    return guest.run(["ls", "-A", folder]).stdout.split()


def fetched(
    guest: Kernel, pyz: Program, hub: Path, *args: Any, rate: float = 0, larger: int = 0
) -> list:
    """The command line of a fetch beside a Hub."""
    return [sys.executable, "-c", HUB, hub, rate, larger, *pyz.argv, "fetch", "org/m", *args]


def make_hub(root: Path, files: Dict[str, bytes]) -> Path:
    a.make_model(root / "org" / "m", files)
    return root


# -- FAT32


def test_parts_are_written_to_fat32_and_travel_on_it(
    fat: Kernel, pyz: Program, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "m", FILES)
    pyz("pack", tmp_path / "m", "--split", SPLIT, "-o", fat.disk)
    found = set(names_in(fat, fat.disk))
    assert {f"m.tar.zst.{number:04}" for number in range(1, 6)} | {
        "m.tar.zst.sha256",
        "READ-ME-FIRST.txt",
    } <= found
    assert "already" in pyz("pack", tmp_path / "m", "--split", SPLIT, "-o", fat.disk).stdout
    fat.reboot()
    pyz("verify", fat.disk)
    pyz("unpack", fat.disk, "-o", tmp_path / "un")
    pyz("unpack", fat.disk, "-o", fat.disk / "un")
    assert a.tree(tmp_path / "un/m") == a.tree(fat.seen(fat.disk / "un/m")) == FILES
    assert (
        fat.run(["sha256sum", "-c", "--strict", "m.tar.zst.sha256"], cwd=fat.disk).returncode == 0
    )
    refused = pyz(
        "pack", tmp_path / "m", "--name", "M", "--split", SPLIT, "-o", fat.disk, code=2
    ).stderr
    assert "is there already" in refused  # names that differ in case are the same there


def test_parts_that_find_no_room_on_fat32_go_to_the_next_medium(
    fat: Kernel, pyz: Program, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "m", FILES)
    fat.run(["dd", "if=/dev/zero", f"of={fat.disk}/other", "bs=1M", "count=85"])
    pyz("pack", tmp_path / "m", "--split", SPLIT, "--to", fat.disk, "--to", tmp_path / "second")
    parts = [
        sum(".tar.zst.0" in name for name in names_in(fat, place))
        for place in (fat.disk, tmp_path / "second")
    ]
    assert min(parts) >= 1 and sum(parts) == 5
    pyz("unpack", fat.disk, tmp_path / "second", "-o", tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == FILES


def test_fetch_onto_fat32(fat: Kernel, pyz: Program, tmp_path: Path) -> None:
    """No links, no permissions, times to two seconds: what is proven is still known after the next boot."""
    hub = make_hub(tmp_path / "hub", FILES)
    done = fat.run(fetched(fat, pyz, hub, "-o", fat.disk), pyz.env())
    assert done.returncode == 0, done.stderr
    fat.reboot()
    done = fat.run(fetched(fat, pyz, hub, "-o", fat.disk), pyz.env())
    assert done.returncode == 0 and "sent 0\n" in done.stderr, done.stderr
    assert a.tree(fat.seen(fat.disk / "m")) == FILES


def test_names_that_fat_cannot_hold(fat: Kernel, pyz: Program, tmp_path: Path) -> None:
    for number, names in enumerate((["a?.txt", "sub/a|b", "tail.", "blank /x"], ["A", "a"])):
        files = {"config.json": b"{}", **{name: name.encode() for name in names}}
        hub = make_hub(tmp_path / f"hub{number}", files)
        archive = a.pack(hub / "org/m", tmp_path / f"out{number}").path
        for argv in ([*pyz.argv, "unpack", archive], fetched(fat, pyz, hub)):
            done = fat.run([*argv, "-o", fat.disk / "un"], pyz.env())
            assert done.returncode == 7 and "another folder" in done.stderr, done.stderr
            assert all(words in done.stderr for words in (names, ["ignores case"])[number]), (
                done.stderr
            )
            assert not names_in(fat, fat.disk / "un")
        assert (
            a.tree(a.unpack(a.files_in(archive.parent), tmp_path / f"un{number}").folder) == files
        )


def test_what_is_larger_than_4_gib_is_refused_before_the_first_byte(
    kernel: Callable[..., Kernel], pyz: Program, tmp_path: Path
) -> None:
    fat = kernel(12 << 10, "vfat")
    beyond = f"import os; os.pwrite(os.open('{fat.disk}/x', os.O_CREAT | os.O_WRONLY), b'x', {FAT_LIMIT})"
    assert (
        "File too large" in fat.run([sys.executable, "-c", beyond]).stderr
        and SPLITS["fat32"] == FAT_LIMIT
    )
    fat.run(["rm", fat.disk / "x"])
    model = tmp_path / "m"
    (model / ".hfship").mkdir(parents=True)
    with (model / "w.bin").open("wb") as stream:
        stream.truncate(FAT_LIMIT + 1)
    (model / ".hfship/manifest.json").write_text(
        make_manifest("m", [FileEntry("w.bin", FAT_LIMIT + 1, "0" * 64)]).to_json()
    )
    said = pyz("pack", model, "--profile", "store", "-o", fat.disk, code=7).stderr
    assert "too large for the target" in said and "give --split fat32" in said
    hub = make_hub(tmp_path / "hub", a.SMALL)
    command = fetched(fat, pyz, hub, "-o", fat.disk, larger=FAT_LIMIT + 1)
    done = fat.run(command, pyz.env())
    assert done.returncode == 7 and "too large for the target" in done.stderr
    assert not names_in(fat, fat.disk)


@pytest.mark.slow
def test_a_part_as_large_as_fat32_allows(
    kernel: Callable[..., Kernel], pyz: Program, tmp_path: Path
) -> None:
    fat = kernel(6 << 10, "vfat")
    (tmp_path / "m").mkdir()
    piece = a.noise(64 << 20)
    with (tmp_path / "m/w.bin").open("wb") as stream:
        for _ in range(65):
            stream.write(piece)
    argv = ["pack", tmp_path / "m", "--profile", "store", "--split", "fat32", "-o", fat.disk]
    pyz(*argv, timeout=280)
    sizes = [
        int(size)
        for size in fat.run(["sh", "-c", "stat -c %s m.tar.zst.0*"], cwd=fat.disk).stdout.split()
    ]
    assert len(sizes) == 2 and FAT_LIMIT - (4 << 20) < sizes[0] <= FAT_LIMIT
    assert (
        fat.run(["sha256sum", "-c", "--strict", "m.tar.zst.sha256"], cwd=fat.disk).returncode == 0
    )


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_full_fat_disk_loses_nothing(
    command: str, fat: Kernel, pyz: Program, tmp_path: Path
) -> None:
    a.make_model(tmp_path / "m", FILES)
    source = tmp_path / "m" if command == "pack" else a.pack(tmp_path / "m", tmp_path / "out").path
    argv = [command, source, "-o", fat.disk / "x"] + ["--split", SPLIT] * (command == "pack")
    fat.run(["dd", "if=/dev/zero", f"of={fat.disk}/other", "bs=1M", "count=85"])
    assert "needed" in pyz(*argv, code=7).stderr
    done = fat.run([sys.executable, "-c", CARELESS, *argv], pyz.env())
    assert done.returncode == 7 and "the disk is full" in done.stderr
    assert not names_in(fat, fat.disk / "x") or (
        command == "unpack" and names_in(fat, fat.disk / "x") == ["m~incomplete"]
    )
    fat.run(["rm", fat.disk / "other"])
    pyz(*argv)
    pyz("verify", fat.disk / "x" / ("" if command == "pack" else "m"))


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_medium_that_is_pulled_out(
    command: str, kernel: Callable[..., Kernel], pyz: Program, tmp_path: Path
) -> None:
    fat = kernel(400, "vfat")
    a.make_model(tmp_path / "m", LARGE)
    source = tmp_path / "m" if command == "pack" else a.pack(tmp_path / "m", tmp_path / "out").path
    argv = [command, source, "-o", fat.disk / "x"] + ["--split", SPLIT] * (command == "pack")
    running = started(fat, pyz, *argv)
    fat.wait_until_written(30)
    fat.pull()
    done = running.wait()
    assert done.returncode == 7 and "input/output error" in done.stderr and "cable" in done.stderr
    fat.cut()
    fat.boot()
    again = pyz(*argv).stderr
    assert command == "unpack" or "going on with" in again
    pyz("verify", fat.disk / "x" / ("" if command == "pack" else "m"))


# -- power cuts: what was not synced is lost. At once after exit code 0, too.


def right_or_unfinished(folder: Path, files: Dict[str, bytes]) -> int:
    """Every file that has its final name is whole and right; the bytes that have."""
    found = {path: folder / path for path in files if (folder / path).exists()}
    assert all(path.read_bytes() == files[name] for name, path in found.items())
    return sum(len(files[name]) for name in found)


@pytest.mark.parametrize("kind", ["vfat", "ext4"])
def test_what_exit_code_0_promised_survives_a_power_cut(
    kind: str, kernel: Callable[..., Kernel], pyz: Program, tmp_path: Path
) -> None:
    """At once after it; also what was not written but copied, from another disk."""
    guest = kernel(400, kind)
    hub = make_hub(tmp_path / "hub", FILES)
    whole = a.pack(hub / "org/m", tmp_path / "parts", split=SPLIT)
    older = {**FILES, "w3.bin": b"older"}
    a.make_model(tmp_path / "older/m", older)
    delta = ["pack", hub / "org/m", "--since", tmp_path / "older/m", "-o", tmp_path / "delta"]
    subprocess.run([*pyz.argv, *map(str, delta)], check=True, capture_output=True)
    blobs = tmp_path / "home/.cache/huggingface/hub/models--org--m/blobs"
    blobs.mkdir(parents=True)
    shutil.copy(hub / "org/m/w1.bin", blobs / read_manifest(hub / "org/m").files[-3].sha256)  # type: ignore[union-attr]
    disk = guest.disk
    commands = {
        "packed": [*pyz.argv, "pack", hub / "org/m", "--split", SPLIT, "-o", disk / "packed"],
        "unpacked": [*pyz.argv, "unpack", whole.path, "-o", disk / "unpacked"],
        "delta": [
            *pyz.argv,
            "unpack",
            tmp_path / "delta",
            "--base",
            tmp_path / "older/m",
            "-o",
            disk / "delta",
        ],
        "fetched": fetched(guest, pyz, hub, "-o", disk / "fetched"),
    }
    for argv in commands.values():
        done = guest.run(argv, pyz.env())
        assert done.returncode == 0, done.stderr
        guest.cut()
        guest.boot()
    assert "w1.bin: taken from" in done.stderr
    seen = guest.seen(disk)
    for name in ("unpacked", "delta", "fetched"):
        assert a.tree(seen / name / "m") == FILES and read_manifest(seen / name / "m"), name
    parts = {path.name: path.read_bytes() for path in whole.folder.glob("m.tar.zst.*")}
    assert {name: (seen / "packed" / name).read_bytes() for name in parts} == parts


def test_fetch_after_power_cuts(
    kernel: Callable[..., Kernel], pyz: Program, tmp_path: Path
) -> None:
    """On XFS, where a file that was renamed before it was synced may be empty afterwards."""
    guest = kernel(400, "xfs")
    files = {**a.SMALL, "w0.bin": a.noise(6 << 20, 3), "w1.bin": a.noise(48 << 20, 4)}
    hub = make_hub(tmp_path / "hub", files)
    boots, synced = set(), 0
    used = guest.image.stat().st_blocks // 2048
    for megabytes in (12, 24, 36):
        guest.start(fetched(guest, pyz, hub, "-o", guest.disk, rate=15e6), pyz.env())
        guest.wait_until_written(used + megabytes)
        guest.cut()
        guest.boot()
        boots.add(guest.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout)
        folder = guest.seen(guest.disk / "m")
        durable = right_or_unfinished(folder, files)
        for journal in folder.glob(".hfship/partial/*.json"):
            state = json.loads(journal.read_bytes())
            under_way = folder / work_path(state["path"])
            for start, stop in state["synced"] if under_way.exists() else ():
                assert under_way.read_bytes()[start:stop] == files[state["path"]][start:stop]
                durable += stop - start
        assert durable >= synced  # nothing that was durable is fetched again
        synced = durable
    assert synced > 16 << 20 and len(boots) == 3
    done = guest.run(fetched(guest, pyz, hub, "-o", guest.disk, rate=60e6), pyz.env())
    assert done.returncode == 0, done.stderr
    total = sum(map(len, files.values()))
    assert int(done.stderr.rsplit("sent ", 1)[1]) < total - synced + (
        8 << 20
    )  # what lay in sockets counts as sent
    guest.reboot()
    assert a.tree(guest.seen(guest.disk / "m")) == files


def test_pack_after_power_cuts(kernel: Callable[..., Kernel], pyz: Program, tmp_path: Path) -> None:
    guest = kernel(400, "vfat")
    a.make_model(tmp_path / "m", LARGE)
    whole = {
        p.name: p.read_bytes()
        for p in a.pack(tmp_path / "m", tmp_path / "parts", split=SPLIT).paths
    }
    argv = ["pack", tmp_path / "m", "--split", SPLIT, "-o", guest.disk / "out"]
    used, kept = guest.image.stat().st_blocks // 2048, 0
    for megabytes in (20, 50, 80):
        started(guest, pyz, *argv)
        guest.wait_until_written(used + megabytes)
        guest.cut()
        guest.boot()
        folder = guest.seen(guest.disk / "out")
        right_or_unfinished(folder, whole)
        rows = (folder / "m.tar.zst.incomplete").read_text().splitlines()[1:]
        for name in (Path(json.loads(row)[2]).name for row in rows):
            assert (folder / name).read_bytes() == whole[name[: -len(".incomplete")]]
        complete = [n for n, c in whole.items() if (folder / (n + ".incomplete")).exists()
                    and (folder / (n + ".incomplete")).read_bytes() == c]  # fmt: skip
        assert len(rows) >= max(
            kept, len(complete) - 2
        )  # the last ones may be whole, and not noted yet
        kept = len(rows)
    assert kept > 5 and f"going on with {kept} complete parts" in pyz(*argv).stderr
    guest.reboot()
    assert right_or_unfinished(guest.seen(guest.disk / "out"), whole) == sum(
        map(len, whole.values())
    )


def test_unpack_that_frees_the_parts_after_power_cuts(
    kernel: Callable[..., Kernel], pyz: Program, tmp_path: Path
) -> None:
    """A part that is gone is never needed again."""
    guest = kernel(600, "ext4")
    files = {**a.SMALL, "w0.bin": a.noise(6 << 20, 3), "w1.bin": a.noise(80 << 20, 4) * 2}
    a.make_model(tmp_path / "m", files)
    a.pack(tmp_path / "m", tmp_path / "in", split=20 << 20)
    guest.run(["sh", "-c", f"cp -r {tmp_path}/in {guest.disk}; sync"])
    argv = ["unpack", guest.disk / "in", "--consume", "-o", guest.disk / "out"]
    used, noted = guest.image.stat().st_blocks // 2048, 0
    for megabytes in (40, 90, 140):
        started(guest, pyz, *argv)
        guest.wait_until_written(used + megabytes)
        guest.cut()
        guest.boot()
        folder = guest.seen(guest.disk / "out/m~incomplete")
        right_or_unfinished(folder, files)
        journal = folder / ".hfship/journal"
        for row in journal.read_text().splitlines() if journal.exists() else ():
            path, _, size = json.loads(row)
            assert (folder / work_path(path)).read_bytes()[:size] == files[path][:size]
            noted = max(noted, size)
    assert noted > 60 << 20
    pyz(*argv)
    guest.reboot()
    assert a.tree(guest.seen(guest.disk / "out/m")) == files
    assert not guest.run(["ls", guest.disk / "in"]).stdout.count("tar.zst")
