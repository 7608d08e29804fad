"""what pack writes, refuses and leaves behind."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from conftest import PYZ, ROOT
from hfship.archive.files import PART_NAME, part_name
from hfship.archive.pack import pack_model
from hfship.archive.pack_journal import claim
from hfship.archive.pack_plan import PackOptions, PackPlan, plan_pack
from hfship.archive.pack_run import read_range
from hfship.base.errors import DiskError, IntegrityError
from hfship.base.files import make_dir
from hfship.base.manifest import MANIFEST_PATH, read_manifest
from support import archives as a


@pytest.fixture
def model(tmp_path):
    a.make_model(tmp_path / "models" / "m", a.BIG)
    return tmp_path / "models" / "m"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("split", [None, 4_600_000])
def test_bytes_do_not_depend_on_the_number_of_threads(model, tmp_path, split):
    outs = [tmp_path / f"out{jobs}" for jobs in (1, 2, 5)]
    for jobs, out in zip((1, 2, 5), outs):
        a.pack(model, out, jobs=jobs, split=split)
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])


def test_progress_ends_at_its_total(model, tmp_path, monkeypatch):
    original = a.QUIET.stage
    ends = []

    @contextlib.contextmanager
    def noted(*args, **options):
        with original(*args, **options) as stage:
            yield stage
        ends.append((stage.name, stage.done, stage.total))

    monkeypatch.setattr(a.QUIET, "stage", noted)
    a.pack(model, tmp_path / "out")
    ((name, done, total),) = ends
    assert name == "pack" and done == total > sum(map(len, a.BIG.values()))


def test_the_concatenation_of_parts_is_an_archive(model, tmp_path):
    parts = a.pack(model, tmp_path / "parts", split=4_600_000)
    assert [p.name for p in parts.paths] == ["m.tar.zst.0001", "m.tar.zst.0002"]
    assert all(p.stat().st_size <= 4_600_000 for p in parts.paths)
    joined = tmp_path / "joined" / "m.tar.zst"
    joined.parent.mkdir()
    joined.write_bytes(b"".join(p.read_bytes() for p in parts.paths))
    assert a.verify(a.files_in(joined.parent)) == []
    a.unpack(a.files_in(joined.parent), tmp_path / "un")
    assert a.tree(tmp_path / "un/m") == a.tree(model)


@pytest.mark.parametrize("split, parts", [(6000, 4), (8000, 3), (100_000, 1)])
def test_parts_never_exceed_their_limit(tmp_path, split, parts):
    a.make_model(tmp_path / "m", {"a": a.noise(20_000), "b": bytes(3000)})
    files = a.pack(tmp_path / "m", tmp_path / "out", split=split, frame_size=1000)
    assert len(files.paths) >= parts and max(p.stat().st_size for p in files.paths) <= split
    assert a.verify(files) == []


def test_more_than_9999_parts_still_sort_by_name():
    names = [part_name("m.tar.zst", n, 10_001) for n in (1, 2, 999, 9999, 10_000, 10_001)]
    assert names == sorted(names) and all(PART_NAME.match(n) for n in names)


def test_parts_with_wide_numbers_are_read(tmp_path, monkeypatch):
    a.make_model(tmp_path / "m", {"a": a.noise(20_000)})
    monkeypatch.setattr(PackPlan, "parts_at_most", 12_345)
    files = a.pack(tmp_path / "m", tmp_path / "out", split=120_000, frame_size=1000)
    assert files.path.name == "m.tar.zst.00001" and a.verify(files) == []


def test_sums_are_what_sha256sum_checks(hfship, model, tmp_path):
    hfship("pack", model, "-o", tmp_path / "out", "--split", "5M")
    subprocess.run(
        ["sha256sum", "-c", "--strict", "m.tar.zst.sha256"], check=True, cwd=tmp_path / "out"
    )
    assert "cat NAME.tar.zst.0*" in (tmp_path / "out/READ-ME-FIRST.txt").read_text()
    assert not list((tmp_path / "out").glob("*.incomplete"))


def test_name_is_looked_up_and_json_tells_the_result(hfship, model, tmp_path):
    env = {"HFSHIP_MODELS_DIR": str(model.parent), "HFSHIP_PACKAGE_DIR": str(tmp_path / "pkg")}
    (row,) = json.loads(hfship("pack", "m", "--json", env=env).stdout)
    (part,) = row["parts"]
    assert row["state"] == "packed" and row["bytes_in"] == sum(map(len, a.BIG.values()))
    assert hashlib.sha256((tmp_path / "pkg/m.tar.zst").read_bytes()).hexdigest() == part["sha256"]
    (again,) = json.loads(hfship("pack", "--all", "--json", env=env).stdout)
    assert (again["state"], again["parts"]) == ("already packed", row["parts"])


def test_folder_without_manifest_gets_one(hfship, model, tmp_path):
    written = (model / ".hfship/manifest.json").read_bytes()
    (model / ".hfship/manifest.json").unlink()
    hfship("pack", model, "-o", tmp_path / "out")
    assert (model / ".hfship/manifest.json").read_bytes() == written


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda m: (m / "config.json").unlink(), "config.json is missing"),
        (lambda m: (m / "config.json").write_bytes(b"longer than it was........"), "config.json has 26 bytes instead of 22"),
        (lambda m: (m / "w1.safetensors").write_bytes(a.tensors(a.noise(5 << 20, 9))), "w1.safetensors has SHA-256"),
        (lambda m: (m / "sub/a.txt").write_bytes(b"jello " * 40), "sub/a.txt has SHA-256"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_the_manifest_says_leave_no_archive(
    hfship, model, tmp_path, harm, says
):
    harm(model)
    done = hfship("pack", model, "-o", tmp_path / "out", code=6)
    assert says in done.stderr and "next" in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_file_that_shrinks_while_it_is_packed_is_named(model, tmp_path):
    plan = plan_pack(model, read_manifest(model), PackOptions(jobs=1))
    with (model / "w3.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(IntegrityError, match="not what its manifest says") as error:
        pack_model(plan, tmp_path / "out", a.QUIET)
    assert "w3.safetensors became shorter" in error.value.why


def test_files_outside_the_manifest_are_named_and_left_out(hfship, model, tmp_path):
    (model / "notes.txt").write_text("mine")
    done = hfship("pack", model, "-o", tmp_path / "out")
    assert "not packed: notes.txt" in done.stderr
    assert (
        "m/notes.txt"
        not in subprocess.run(
            ["tar", "--zstd", "-tf", tmp_path / "out/m.tar.zst"], capture_output=True, text=True
        ).stdout
    )


def test_another_archive_is_replaced_only_by_force(hfship, model, tmp_path):
    out = tmp_path / "out"
    hfship("pack", model, "-o", out, "--split", "5M")
    assert "give --force" in hfship("pack", model, "-o", out, code=2).stderr
    hfship("pack", model, "-o", out, "--force")
    assert {p.name for p in out.iterdir()} - {"hfship.pyz"} == {
        "m.tar.zst",
        "m.tar.zst.sha256",
        "READ-ME-FIRST.txt",
    }
    (out / "m.tar.zst").write_bytes(b"something else")
    hfship("pack", model, "-o", out, code=2)
    assert (out / "m.tar.zst").read_bytes() == b"something else"


def test_a_set_that_a_killed_run_named_in_part_is_completed(model, tmp_path):
    files = a.pack(model, tmp_path / "out", split=4_600_000)
    whole = contents(tmp_path / "out")
    files.paths[1].unlink()
    (tmp_path / "out/m.tar.zst.0002.incomplete").write_bytes(b"half")
    a.pack(model, tmp_path / "out", split=4_600_000)
    assert contents(tmp_path / "out") == whole


def test_an_older_version_that_is_not_there_is_not_fetched(hfship, model, tmp_path):
    said = hfship("pack", model, "--since", "nothing", "-o", tmp_path / "out", code=5).stderr
    assert (
        "nothing was not found" in said and "name a manifest.json" in said and "fetch" not in said
    )


@pytest.mark.parametrize(
    "args", [["--split", "1M"], ["--split", "huge"], ["--name", "../x"], ["/nowhere"], []]
)
def test_usage_errors_tell_the_next_step(hfship, model, tmp_path, args):
    target = [] if args in ([], ["/nowhere"]) else [model]
    done = hfship(
        "pack", *target, *args, "-o", tmp_path / "out", code=5 if args == ["/nowhere"] else 2
    )
    assert "hfship: " in done.stderr and "next" in done.stderr


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, resource.RLIM_INFINITY))


def test_a_file_size_limit_is_told_before_the_first_byte(model, tmp_path):
    argv = [sys.executable, ROOT / "hfship.py", "pack", model, "-o", tmp_path / "out"]
    done = subprocess.run(argv, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert (
        done.returncode == 7
        and "too large for the target" in done.stderr
        and "give --split 6000000" in done.stderr
    )
    subprocess.run([*argv, "--split", "6000000"], check=True, preexec_fn=limit_file_size)
    assert a.verify(a.files_in(tmp_path / "out")) == []


def test_a_disk_that_runs_full_leaves_nothing_under_a_final_name(
    hfship, model, tmp_path, small_disk, monkeypatch
):
    done = hfship("pack", model, "-o", small_disk(5), code=7)
    assert "free" in done.stderr
    disk = small_disk(5)
    monkeypatch.setattr("hfship.archive.pack.require_room", lambda *_: None)
    with pytest.raises(DiskError, match="the disk is full"):
        a.pack(model, disk, split=5_000_000, jobs=2)
    assert list(disk.iterdir()) == []


def test_ctrl_c_ends_at_once_and_removes_what_was_not_finished(tmp_path):
    a.make_model(tmp_path / "m", {f"w{i}.bin": a.noise(30_000_000, i) for i in range(4)})
    argv = [
        sys.executable,
        ROOT / "hfship.py",
        "pack",
        tmp_path / "m",
        "-o",
        tmp_path / "out",
        "--level",
        "19",
    ]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/*.incomplete")):
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=20)[1]
    assert process.returncode == 130 and time.monotonic() - started < 5
    assert list((tmp_path / "out").iterdir()) == []


def test_second_pack_of_the_same_archive_is_refused_while_the_first_runs(hfship, model, tmp_path):
    out = make_dir(tmp_path / "out")
    with claim(out / "m.tar.zst.incomplete"):
        assert "another hfship" in hfship("pack", model, "-o", out, code=3).stderr
        assert [p.name for p in out.iterdir()] == ["m.tar.zst.incomplete"]
    assert list(out.iterdir()) == []
    hfship("pack", model, "-o", out)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_the_umask_decides_who_may_read_what_travels(umask, model, tmp_path, hfship):
    hfship("pack", model, "-o", tmp_path / "out", preexec_fn=lambda: os.umask(umask))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes.pop("hfship.pyz", 0o755) == 0o755
    assert set(modes.values()) <= {0o644 & ~umask, 0o666 & ~umask}


def test_all_goes_on_after_a_broken_model(model, tmp_path, hfship):
    a.make_model(model.parent / "a", {"config.json": b"{}"})
    a.make_model(model.parent / "z", {"config.json": b"{}"})
    (model.parent / "a/config.json").write_bytes(b"{ }")
    env = {"HFSHIP_MODELS_DIR": str(model.parent)}
    done = hfship("pack", "--all", "-o", tmp_path / "out", "--json", env=env, code=6)
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows if "error" not in row] == ["m", "z"] and len(rows) == 3
    assert (
        "models/a is not what its manifest says" in done.stderr
        and "pack: 3 models, 2 ok, 1 failed" in done.stderr
    )
    assert "fetch" not in done.stderr
    hfship("pack", model.parent / "a", "-o", tmp_path / "out", code=6)


@pytest.mark.parametrize(
    "split, says", [("1M", "give --split 21"), ("dvd9", "fat32, dvd, bd25, bd50")]
)
def test_a_split_that_cannot_be_names_what_can(split, says, model, tmp_path, hfship):
    assert says in hfship("pack", model, "-o", tmp_path / "out", "--split", split, code=2).stderr


def test_holes_of_a_sparse_model_need_no_room(tmp_path, small_disk, hfship):
    (tmp_path / "m").mkdir()
    with (tmp_path / "m/w.bin").open("wb") as stream:
        stream.truncate(600 << 20)
        stream.seek(300 << 20)
        stream.write(a.noise(1 << 20))
    disk = small_disk(30)
    done = hfship("pack", tmp_path / "m", "-o", disk, "--profile", "store")
    assert (disk / "m.tar.zst").stat().st_size < 6 << 20, done.stdout
    hfship("verify", disk / "m.tar.zst")


@pytest.mark.parametrize("name", ["hfship.pyz", "hfship", "hfship-0.9.zip", "a b/c"])
def test_the_pyz_puts_itself_beside_the_archive_whatever_it_is_called(name, model, tmp_path, pyz):
    started = tmp_path / "bin" / name
    started.parent.mkdir(parents=True)
    content = PYZ.read_bytes()
    started.write_bytes(content)
    argv = [sys.executable, started, "pack", model, "-o", tmp_path / "out"]
    subprocess.run(argv, check=True, env=pyz.env())
    assert (tmp_path / "out/hfship.pyz").read_bytes() == content
    subprocess.run(
        [sys.executable, tmp_path / "out/hfship.pyz", "verify", tmp_path / "out"], check=True
    )


def test_dry_run_makes_no_manifest(hfship, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    assert (
        "would pack m: 1 file"
        in hfship("pack", tmp_path / "m", "-o", tmp_path / "out", "--dry-run").stdout
    )
    assert os.listdir(tmp_path / "m") == ["config.json"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["pack", "verify"])
def test_a_folder_that_is_being_fetched_is_incomplete_and_not_damaged(command, hfship, tmp_path):
    (tmp_path / "m/.hfship").mkdir(parents=True)
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "m/.hfship/verified.jsonl").touch()
    assert "is not complete yet" in hfship(command, tmp_path / "m", code=3).stderr


def test_dry_run_writes_nothing(hfship, model, tmp_path):
    assert (
        "would pack m: 7 files" in hfship("pack", model, "-o", tmp_path / "out", "--dry-run").stdout
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fork_size, reads", [(0, 2), (1 << 40, 1)])
def test_hash_and_frames_share_one_read(fork_size, reads, model, tmp_path, monkeypatch):
    """Of one process; of several some read what another has just read."""
    original = read_range

    def noted(plan, entry, offset, size):
        with (tmp_path / "read").open("a") as log:  # a file: workers are processes
            log.write(f"{size}\n")
        return original(plan, entry, offset, size)

    monkeypatch.setattr("hfship.archive.pack_run.read_range", noted)
    monkeypatch.setattr("hfship.archive.schedule.FORK_SIZE", fork_size)
    monkeypatch.setattr("hfship.base.workers.FORK_SIZE", fork_size)
    a.pack(model, tmp_path / "out")
    size = sum(map(len, a.BIG.values()))
    assert size <= sum(map(int, (tmp_path / "read").read_text().split())) <= reads * size
    assert os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    "trace", ["model.safetensors.incomplete", ".hfship/partial/x.json", ".hfship/verified.jsonl"]
)
def test_a_model_that_is_not_fetched_to_the_end_is_not_packed(hfship, model, tmp_path, trace):
    (model / MANIFEST_PATH).unlink()
    (model / trace).parent.mkdir(parents=True, exist_ok=True)
    (model / trace).write_text("{}")
    done = hfship("pack", model, "-o", tmp_path / "out", code=3)
    assert "is not complete yet" in done.stderr and not (model / MANIFEST_PATH).exists()


def test_force_packs_again_over_a_damaged_archive(hfship, model, tmp_path):
    hfship("pack", model, "-o", tmp_path / "out")
    archive = tmp_path / "out" / "m.tar.zst"
    good = archive.read_bytes()
    archive.write_bytes(good[:5000] + b"damage" + good[5006:])
    assert "packed already" in hfship("pack", model, "-o", tmp_path / "out").stdout
    hfship("pack", model, "-o", tmp_path / "out", "--force")
    assert archive.read_bytes() == good
