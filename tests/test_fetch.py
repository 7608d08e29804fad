"""fetch: the Hub's protocol and its traps, resume, verification, and what is left on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from conftest import Program, missing, program
from hfship.base.content import work_path
from hfship.base.errors import IncompleteError
from hfship.base.manifest import (
    FileEntry,
    Source,
    make_manifest,
)
from hfship.base.processes import run_program
from hfship.base.report import Reporter
from hfship.base.settings import load_settings
from hfship.hub.client import HubClient
from hfship.hub.download import Verifier
from hfship.hub.download_state import DownloadState, TransferSettings
from hfship.hub.partial import Transfer
from hfship.hub.protocol import RemoteFile
from hfship.hub.ranges import Intervals, RangeScheduler
from hfship.hub.verified import VerifiedLog
from hfship.serve.model_folder import require_complete
from support.folders import leftovers, same_files
from support.hub import FaultHub

MB = 1_000_000


def test_fetch_brings_every_file_verified(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    done = hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out", "--json")
    folder = tmp_path / "out" / "tiny"
    assert same_files(published, folder) and not leftovers(folder)
    (row,) = json.loads(done.stdout)
    assert row["repo"] == "org/tiny" and row["bytes"] == sum(
        p.stat().st_size for p in published.rglob("*") if p.is_file()
    )
    manifest = json.loads((folder / ".hfship" / "manifest.json").read_text())
    assert manifest["source"]["commit"] == row["commit"] and manifest["source"]["license"] is None
    for entry in manifest["files"]:
        assert (
            hashlib.sha256((published / entry["path"]).read_bytes()).hexdigest() == entry["sha256"]
        )


def test_rerun_on_a_complete_folder_transfers_nothing(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    hfship(*command)
    manifest = (tmp_path / "tiny" / ".hfship" / "manifest.json").read_bytes()
    hub.forget()
    assert "nothing to fetch" in hfship(*command).stdout
    assert hub.traffic.body_bytes == 0 and not hub.traffic.paths("/resolve/")
    assert (tmp_path / "tiny" / ".hfship" / "manifest.json").read_bytes() == manifest


def test_a_changed_file_is_found_and_fetched_again(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    victim = tmp_path / "tiny" / "config.json"
    victim.write_bytes(victim.read_bytes()[::-1])
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    assert same_files(published, tmp_path / "tiny")


SURVIVED: Dict[str, Dict[str, Any]] = {
    "direct": {"direct": True},
    "paged tree": {"tree_page": 2},
    "signed URLs expire": {"expires_s": 0.5, "rate_bps": 3 * MB},
    "signed URL refused": {"refuse_signed_once": True},
    "Range ignored": {"ignore_range": True},
    "Range ignored by a mirror": {"ignore_range": True, "direct": True},
    "connection cut": {"cut_at": 300_000, "cut_times": 3},
    "byte flipped once": {"flip_at": 123_456, "flip_times": 1},
    "connection reset": {"cut_at": 300_000, "cut_times": 3, "reset": True},
    "another range than asked": {"wrong_content_range": 2},
    "compressed though not asked": {"gzip": 2},
    "whole files refused": {"needs_range": True},
    "429 and nothing more": {"too_many": 1},
    "429 with Retry-After": {"too_many": 2, "too_many_headers": {"Retry-After": "1"}},
    "429 with RateLimit": {"too_many": 1, "too_many_headers": {"RateLimit": '"api";r=0;t=0'}},
    "503 with a page": {"unavailable": 3},
}


@pytest.mark.parametrize("name", SURVIVED)
def test_fetch_survives(
    name: str, hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    vars(hub.faults).update(SURVIVED[name])
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out")
    assert same_files(published, tmp_path / "out" / "tiny") and not leftovers(
        tmp_path / "out" / "tiny"
    )


ITEM = {"type": "file", "oid": "b" * 40, "size": 3, "path": "a.txt"}

# name -> (faults, arguments, environment, exit code, words of the message)
REFUSED: Dict[str, Any] = {
    "a port that is none": (
        {"answer": ("/revision/", (302, {"Location": "http://h:99999/"}, ""))},
        ["a/b"],
        {},
        8,
        "no address",
    ),
    "deep": ({"answer": ("/revision/", (200, {}, "[" * 200_000))}, ["a/b"], {}, 8, "like a Hub"),
    "another id": (
        {"answer": ("/revision/", (200, {}, json.dumps({"sha": "a" * 40, "id": "../x?y"})))},
        ["a/b"],
        {},
        8,
        "like a Hub",
    ),
    **{
        f"tree of {item}": (
            {"answer": ("/tree/", (200, {}, json.dumps([item])))},
            ["org/tiny"],
            {},
            6,
            "cannot be used",
        )
        for item in ({**ITEM, "lfs": [1]}, {**ITEM, "lfs": "x"}, {**ITEM, "path": 5}, "x", None)
    },
    "unknown repo": ({}, ["org/nothing"], {}, 5, "org/nothing was not found"),
    "unknown revision": ({}, ["org/tiny@v9"], {}, 5, "no revision 'v9'"),
    "not a repo": ({}, ["../../etc"], {}, 2, "not a repository"),
    "gated, no token": (
        {"gated": True, "token": "hf_good1234"},
        ["org/tiny"],
        {},
        4,
        "org/tiny is gated",
    ),
    "wrong token": (
        {},
        ["org/tiny"],
        {"HF_TOKEN": "hf_bad12345"},
        4,
        "refuses the token from environment",
    ),
    "private, no token": (
        {"private": True, "token": "hf_good1234"},
        ["org/tiny"],
        {},
        5,
        "set HF_TOKEN",
    ),
    "login page": ({"html": True}, ["org/tiny"], {}, 8, "does not answer like a Hub"),
    "path escapes": ({"evil_path": "../../x"}, ["org/tiny"], {}, 6, "cannot be used"),
    "drive path": ({"evil_path": "C:\\x"}, ["org/tiny"], {}, 6, "cannot be used"),
    "our own folder": (
        {"evil_path": ".hfship/manifest.json"},
        ["org/tiny"],
        {},
        6,
        "cannot be used",
    ),
    "duplicate path": ({"evil_path": "config.json"}, ["org/tiny"], {}, 6, "cannot be used"),
    "byte flipped always": (
        {"flip_at": 5, "flip_times": 99},
        ["org/tiny"],
        {},
        6,
        "arrives damaged",
    ),
    "another commit": ({"moved": True}, ["org/tiny"], {}, 6, "is not what"),
    "nothing selected": ({}, ["org/tiny", "--include", "*.gguf"], {}, 5, "nothing to fetch"),
    "same folder twice": ({}, ["org/tiny", "org2/tiny"], {}, 2, "same folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fetch_refuses(
    name: str, hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    faults, arguments, env, code, words = REFUSED[name]
    vars(hub.faults).update(faults)
    done = hfship(
        "fetch", *arguments, "--endpoint", hub.url, "-o", tmp_path / "out", env=env, code=code
    )
    assert words in done.stderr and "next" in done.stderr, done.stderr
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("out/*/model*.safetensors"))
    assert "hf_bad12345" not in done.stderr and "secretsignature" not in done.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--include", "*.json"], lambda path: path.endswith(".json")),
        (["--exclude", "*.safetensors"], lambda path: not path.endswith(".safetensors")),
        (["--include", "sub folder/"], lambda path: path.startswith("sub folder/")),
    ],
)
def test_include_and_exclude(
    arguments: List[str],
    expected: Any,
    hfship: Program,
    hub: FaultHub,
    published: Path,
    tmp_path: Path,
) -> None:
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, *arguments)
    found = {str(p.relative_to(published)) for p in published.rglob("*") if p.is_file()}
    manifest = json.loads((tmp_path / "tiny" / ".hfship" / "manifest.json").read_text())
    assert {entry["path"] for entry in manifest["files"]} == {
        path for path in found if expected(path)
    }


def test_dry_run_writes_nothing(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    done = hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out", "--dry-run")
    assert "config.json" in done.stdout and not (tmp_path / "out").exists()


def test_several_repositories_in_one_call(
    hfship: Program, hub: FaultHub, published: Path, model: Path, tmp_path: Path
) -> None:
    other = hub.add(model, "org/second")
    hub.faults.rate_bps = 4 * MB
    words = ["org/tiny", "org/second", "--endpoint", hub.url, "-o", tmp_path]
    said = hfship("fetch", *words, "--progress", "bar").stderr
    shown = set(re.findall(r"fetching ([12]/2 \w+):", said))
    assert shown and shown < {"1/2 tiny", "1/2 second", "2/2 tiny", "2/2 second"}, said
    assert same_files(published, tmp_path / "tiny") and same_files(other, tmp_path / "second")
    said = hfship("fetch", *words, "--verify", "--progress", "bar").stderr
    assert set(re.findall(r"checking ([^:]*):", said)) == {"1/2 tiny", "2/2 second"}, said
    said = hfship("fetch", words[0], *words[2:], "--verify", "--progress", "bar").stderr
    assert "checking:" in said and "checking 1/" not in said, "one needs no name"


# -- kill, interrupt, disk


@pytest.fixture
def large(hub: FaultHub, tmp_path: Path) -> Path:
    """64 MB in three files, sent at 16 MB/s: time enough to be killed in."""
    folder = tmp_path / "large"
    folder.mkdir()
    rng = random.Random(1)
    for name, size in (("a.safetensors", 40 * MB), ("b.safetensors", 23 * MB), ("c.json", MB)):
        (folder / name).write_bytes(rng.randbytes(size))
    hub.faults.rate_bps = 16 * MB
    return hub.add(folder, "org/large")


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_fetch_resumes_without_sending_bytes_twice(
    pyz: Program, hub: FaultHub, tmp_path: Path
) -> None:
    """kill -9 at three points: less than 2 % of the bytes travel twice, and the result is verified."""
    sizes = {"a.safetensors": 150 * MB, "b.safetensors": 89 * MB, "c.json": MB}
    total = sum(sizes.values())
    (tmp_path / "large").mkdir()
    for name, size in sizes.items():
        (tmp_path / "large" / name).write_bytes(random.Random(size).randbytes(size))
    large = hub.add(tmp_path / "large", "org/large")
    hub.faults.rate_bps = 12 * MB
    command = ("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
    for share in (0.2, 0.5, 0.8):
        with pyz.start(*command) as process:
            wait_for(lambda share=share: hub.traffic.body_bytes > share * total)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        time.sleep(0.3)  # connections of the killed client drain
    assert (tmp_path / "out" / "large" / work_path("a.safetensors")).exists()
    pyz(*command)
    assert same_files(large, tmp_path / "out" / "large") and not leftovers(
        tmp_path / "out" / "large"
    )
    twice = hub.traffic.body_bytes / total - 1
    print(f"sent twice: {100 * twice:.2f} %")
    assert twice < 0.02


def readers_of(pid: int) -> List[int]:
    return [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]


@pytest.mark.parametrize("killed", ["a reader", "hfship"])
def test_no_process_outlives_the_others(
    killed: str, hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """A killed reader ends the run with its reason; a killed hfship takes its readers along. Either run is resumed."""
    hub.faults.rate_bps = 8 * MB
    command = ("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
    with hfship.start(*command) as process:
        wait_for(lambda: hub.traffic.body_bytes > 10 * MB)
        readers = readers_of(process.pid)
        assert readers
        os.kill(readers[0] if killed == "a reader" else process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=30)
    if killed == "a reader":
        assert process.returncode == 9 and "ended by SIGKILL" in err and "next  " in err
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in readers))
    hub.faults.rate_bps = None
    hfship(*command)
    assert same_files(large, tmp_path / "out" / "large") and not leftovers(
        tmp_path / "out" / "large"
    )


@pytest.mark.parametrize("done", ["removed", "replaced by a link"])
def test_a_folder_that_is_meddled_with(
    done: str, pyz: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """Nothing is written elsewhere, and the advice fits."""
    hub.faults.rate_bps = 8 * MB
    folder, elsewhere = tmp_path / "out" / "large", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    command = ("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
    with pyz.start(*command) as process:
        wait_for(lambda: hub.traffic.body_bytes > 6 * MB)
        for path in folder.glob(".hfship/partial/*.part"):
            path.unlink()
            if done == "replaced by a link":
                path.symlink_to(elsewhere)
        _, err = process.communicate(timeout=60)
    # The link itself is met, or the moment before it was there.
    says = re.search("leave the folder alone|is a symbolic link", err)
    assert process.returncode == 7 and says, err
    assert elsewhere.read_bytes() == b"precious"


def servable(folder: Path) -> bool:
    try:
        require_complete(folder)
    except IncompleteError:
        return False
    return True


def test_half_of_an_update_is_not_taken_for_a_model(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    """The shards of the new commit are as large as those of the old: sizes alone would not tell."""
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out")
    folder = tmp_path / "out" / "tiny"
    hfship(*command)
    for shard in published.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[::-1])
    hub.server.catalogue.forget()  # the Hub looks again
    hub.faults.rate_bps = MB
    with hfship.start(*command, "-j", "1") as process:
        wait_for(
            lambda: any(
                (published / p.name).read_bytes() == p.read_bytes()
                for p in folder.glob("*.safetensors")
            )
        )
        process.kill()
        process.communicate()
    assert not servable(folder)
    hfship("pack", folder, "-o", tmp_path, code=3)
    hub.faults.rate_bps = None
    hfship(*command)
    assert same_files(published, folder) and servable(folder)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_interrupt_ends_at_once_and_keeps_the_state(
    number: signal.Signals, code: int, hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    with hfship.start(
        "fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out"
    ) as process:
        wait_for(lambda: hub.traffic.body_bytes > 10 * MB)
        hub.faults.rate_bps = 1000  # what is left would take hours
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code and "what is complete is kept" in err
    kept = list((tmp_path / "out" / "large" / ".hfship" / "partial").glob("*.now"))
    assert kept and json.loads(kept[0].read_text())["written"]


def test_what_a_kill_leaves_of_an_atomic_write_goes_away(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny" / ".hfship" / "partial").mkdir(parents=True)
    (tmp_path / "tiny" / ".hfship" / "partial" / f".{'0' * 40}.json.749.tmp").write_text("{")
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    assert (
        not leftovers(tmp_path / "tiny")
        and not (tmp_path / "tiny" / ".hfship" / "partial").exists()
    )


def test_power_cut_trusts_only_what_was_synced(
    hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """Another boot id means that the page cache is gone: `written` ranges are fetched again."""
    hub.faults.rate_bps = None
    folder = tmp_path / "large"
    (folder / ".hfship" / "partial").mkdir(parents=True)
    size = 40 * MB
    (folder / work_path("a.safetensors")).write_bytes(bytes(size))  # zeros, as after a power cut
    etag = hashlib.sha256((large / "a.safetensors").read_bytes()).hexdigest()
    state = {"format": "hfship-partial/1", "path": "a.safetensors", "size": size, "etag": etag}
    state.update({"boot_id": "an earlier boot", "synced": [], "written": [[0, size]]})
    name = hashlib.sha1(b"a.safetensors").hexdigest()
    (folder / ".hfship" / "partial" / f"{name}.json").write_text(json.dumps(state))
    done = hfship("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path)
    assert same_files(large, folder) and "damaged" not in done.stderr


def test_no_room_is_said_before_the_first_byte(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    repo = hub.root / "org" / "huge"
    repo.mkdir()
    with (repo / "model.safetensors").open("wb") as file:
        file.truncate(1 << 20)
    (repo / ".hfship").mkdir()
    huge = hfship_module_manifest("huge", 1 << 20, "0" * 64)
    (repo / ".hfship" / "manifest.json").write_text(huge)
    done = hfship(
        "fetch",
        "org/tiny",
        "--endpoint",
        hub.url,
        "-o",
        tmp_path / "out",
        code=7,
        preexec_fn=limit_file_size,
    )
    assert "too large for the target" in done.stderr and not list(
        (tmp_path / "out").rglob("*.part")
    )


def hfship_module_manifest(name: str, size: int, sha256: str) -> str:
    return make_manifest(name, [FileEntry("model.safetensors", size, sha256)]).to_json()


def limit_file_size() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_keeps_the_state(
    hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    hub.faults.rate_bps = None
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = hfship_run("mount", "-t", "tmpfs", "-o", "size=80m", "none", str(disk))
    if mount:
        pytest.skip(f"cannot mount: {mount}")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(40 * MB))
        done = hfship("fetch", "org/large", "--endpoint", hub.url, "-o", disk, code=7)
        assert "free" in done.stderr
        filler.unlink()
        hfship("fetch", "org/large", "--endpoint", hub.url, "-o", disk)
        assert same_files(large, disk / "large")
    finally:
        hfship_run("umount", str(disk))


def hfship_run(*argv: str) -> str:
    done = run_program(argv)
    return done.err if done.code else ""


def test_second_fetch_into_the_same_folder_is_refused(
    hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    command = ("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
    with hfship.start(*command) as process:
        wait_for(lambda: hub.traffic.body_bytes > MB)
        done = hfship(*command, code=3)
        assert f"process {process.pid}" in done.stderr
        process.kill()
        process.communicate()


def test_what_came_is_on_the_disk_and_noted_while_the_rest_is_on_its_way(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    """A power cut loses what came since: the durable journal says what a kill would know, too."""
    hub.faults.rate_bps = 100_000

    def durable() -> Dict[str, List[Any]]:
        """What the durable journals say, by file."""
        journals = (tmp_path / "tiny" / ".hfship" / "partial").glob("*.json")
        values = [json.loads(path.read_text()) for path in journals]
        return {value["path"]: value["synced"] for value in values if value["synced"]}

    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    with hfship.start(*command) as process:
        wait_for(lambda: process.poll() is not None or len(durable()) == 2)
        assert process.poll() is None
        process.kill()
        process.communicate()
    for path, spans in durable().items():
        sent = (published / path).read_bytes()
        content = (tmp_path / "tiny" / work_path(path)).read_bytes()
        for start, stop in spans:
            assert content[start:stop] == sent[start:stop]


def test_stalled_connection_is_given_up(
    pyz: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    hub.faults.stall_at = 500_000
    pyz("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    assert same_files(published, tmp_path / "tiny")


# -- many connections, several sources, what is here already


BROUGHT_AT_ONCE = {
    "a small file": (100, (), TransferSettings(), True),
    "a large one": (2 * MB, (), TransferSettings(), False),
    "the rest of a small one": (100, ((0, 10),), TransferSettings(), False),
    "within a rate": (100, (), TransferSettings(limit_bps=1e3), False),
}


@pytest.mark.parametrize("case", BROUGHT_AT_ONCE)
def test_what_a_reader_brings_by_one_message(case: str, tmp_path: Path) -> None:
    size, found, settings, expected = BROUGHT_AT_ONCE[case]
    source = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
    remote = RemoteFile("w.bin", size, "", "a" * 64)
    transfer = Transfer(remote, source, tmp_path, VerifiedLog(tmp_path))
    with Reporter("none", -1).stage("test", size) as stage:
        state = DownloadState([transfer], settings, stage, threading.Event())
        state.scheduler = RangeScheduler([size], [Intervals(found)])
        flight = state.next_flight(0)
        assert flight and state.grant_small(flight) == expected
        assert (flight.granted == size) == expected


def test_small_files_take_no_new_connection_each(
    hfship: Program, hub: FaultHub, tmp_path: Path
) -> None:
    """The Hub redirects every one of them: the body of that answer must not end the connection."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(40):
        (many / f"part-{number}.json").write_text(f"[{number}]")
    folder = hub.add(many, "org/many")
    out = tmp_path / "out"
    hfship("fetch", "org/many", "--endpoint", hub.url, "-j", 2, "-o", out)
    assert same_files(folder, out / "many") and len(hub.traffic.paths("/cdn/")) == 40
    assert hub.traffic.connections <= 8


def test_all_readers_ask_the_cdn_as_soon_as_the_hub_has_led_one_of_them_there(
    hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """None waits until that address has answered the first: here it answers four or none."""
    hub.faults.together = threading.Barrier(4)
    hub.faults.rate_bps = None
    hfship("fetch", "org/large", "--endpoint", hub.url, "-j", 4, "-o", tmp_path / "out")
    assert same_files(large, tmp_path / "out" / "large") and not hub.faults.together.broken
    assert len(hub.traffic.paths("/resolve/")) == len(list(large.iterdir()))


def test_slow_connections_are_dialled_again(
    pyz: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """The first five connections get 100 kB/s: with them alone 64 MB would take over two minutes."""
    vars(hub.faults).update(rate_bps=None, slow_connections=5)
    pyz("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out", timeout=60)
    assert (
        same_files(large, tmp_path / "out" / "large")
        and hub.traffic.connections > hub.faults.slow_connections
    )


def test_a_server_that_punishes_crowds_is_not_crowded(
    pyz: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    vars(hub.faults).update(rate_bps=8 * MB, most_connections=8, slow_bps=2_000_000)
    pyz("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
    assert same_files(large, tmp_path / "out" / "large") and hub.traffic.most_bodies < 16


def test_limit_rate_holds(pyz: Program, hub: FaultHub, large: Path, tmp_path: Path) -> None:
    hub.faults.rate_bps = None
    began = time.monotonic()
    pyz("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out", "--limit-rate", "20M")
    assert time.monotonic() - began > 64 / 20 - 0.3


@pytest.fixture
def mirror(published: Path, tmp_path: Path) -> Iterator[FaultHub]:
    """A second Hub with the same model, as a mirror."""
    with FaultHub(tmp_path / "mirror") as server:
        server.add(published)
        server.faults.direct = True
        yield server


# name -> (faults of the mirror, does it end up as a source?, words of the warning)
MIRRORS: Dict[str, Any] = {
    "good": ({}, True, ""),
    "lacks a file": ({"missing": "00001-of-00002.safetensors"}, True, ""),
    "answers 503": ({"unavailable": 999}, False, ""),
    "wants a login": ({"private": True}, False, ""),
    "damages bytes": ({"flip_at": 5, "flip_times": 999}, True, "is not asked again"),
    "another commit": ({"moved": True, "direct": False}, False, ""),
}


@pytest.mark.parametrize("name", MIRRORS)
def test_mirrors(
    name: str, hfship: Program, hub: FaultHub, mirror: FaultHub, published: Path, tmp_path: Path
) -> None:
    """Ranges come from the mirror where it can, from the Hub where it cannot; wrong bytes are never believed."""
    faults, used, words = MIRRORS[name]
    vars(mirror.faults).update(faults)
    hub.faults.token = "hf_good1234"
    command = (
        "fetch",
        "org/tiny",
        "--endpoint",
        hub.url,
        "--mirror",
        mirror.url,
        "-o",
        tmp_path / "out",
    )
    done = hfship(*command, env={"HF_TOKEN": "hf_good1234"})
    assert same_files(published, tmp_path / "out" / "tiny") and words in done.stderr
    assert (mirror.traffic.body_bytes > 0) == used
    assert not any("Authorization" in headers for _, _, headers in mirror.traffic.requests)


def test_dead_mirror(hfship: Program, hub: FaultHub, published: Path, tmp_path: Path) -> None:
    hfship(
        "fetch",
        "org/tiny",
        "--endpoint",
        hub.url,
        "--mirror",
        "http://127.0.0.1:9",
        "-o",
        tmp_path / "out",
    )
    assert same_files(published, tmp_path / "out" / "tiny")


def test_equal_files_on_this_machine_are_not_fetched(
    hfship: Program, hub: FaultHub, model: Path, tmp_path: Path
) -> None:
    """From another model in the same folder, and from huggingface_hub's cache; damaged donors are not taken."""
    source = hub.add(model)
    hub.add(model, "org/second")
    hub.add(model, "org/third")
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out")
    hub.forget()
    done = hfship("fetch", "org/second", "--endpoint", hub.url, "-o", tmp_path / "out")
    assert hub.traffic.body_bytes < 100_000 and "taken from" in done.stderr
    blobs = tmp_path / "cache" / "models--org--third" / "blobs"
    blobs.mkdir(parents=True)
    for number, shard in enumerate(sorted(source.glob("*.safetensors"))):
        content = bytearray(shard.read_bytes())
        content[7] ^= number  # the first one is right, the second one is not
        (blobs / hashlib.sha256(shard.read_bytes()).hexdigest()).write_bytes(content)
    hub.forget()
    hfship(
        "fetch",
        "org/third",
        "--endpoint",
        hub.url,
        "-o",
        tmp_path / "new",
        env={"HF_HUB_CACHE": str(blobs.parent.parent)},
    )
    assert same_files(model, tmp_path / "new" / "third")
    assert 1_000_000 < hub.traffic.body_bytes < 2_000_000


def test_formats_that_vllm_does_not_read_are_left_out(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    for path in (
        "pytorch_model.bin",
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "training_args.bin",
    ):
        (published / path).parent.mkdir(exist_ok=True)
        (published / path).write_bytes(b"x" * 1000)
    done = hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert "training_args.bin" in names and not names & {"pytorch_model.bin", "onnx", "original"}
    assert "3 files (3.0 kB)" in done.stderr and "--all-files" in done.stderr
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, "--all-files")
    assert same_files(published, tmp_path / "tiny")


def test_repair_fetches_only_the_bad_blocks(
    hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    hub.faults.rate_bps = None
    command = ("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
    hfship(*command)
    assert "every file verified" in hfship(*command, "--verify").stdout
    victim = tmp_path / "out" / "large" / "a.safetensors"
    for position in (9_000_000, 39_999_999):
        with victim.open("r+b") as stream:
            stream.seek(position)
            byte = stream.read(1)
            stream.seek(position)
            stream.write(bytes([byte[0] ^ 255]))
    os.utime(victim, ns=(victim.stat().st_atime_ns, 1))
    done = hfship(*command, "--verify", code=6)
    assert "a.safetensors" in done.stderr and "--repair" in done.stderr
    hub.forget()
    assert "repaired" in hfship(*command, "--repair").stderr
    assert same_files(large, tmp_path / "out" / "large") and hub.traffic.body_bytes <= 2 * (8 << 20)
    (tmp_path / "out" / "large" / "b.safetensors").unlink()
    assert "missing" in hfship(*command, "--verify", code=3).stderr


def test_one_bad_repository_does_not_stop_the_others(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    done = hfship("fetch", "org/nothing", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, code=5)
    assert same_files(published, tmp_path / "tiny") and "org/nothing was not found" in done.stderr


def test_partial_files_of_a_silent_owner_are_not_continued(
    hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """Its host may still write into them: they cost bandwidth, never bytes."""
    hub.faults.rate_bps = None
    folder = tmp_path / "out" / "large"
    (folder / ".hfship" / "partial").mkdir(parents=True)
    (folder / ".hfship" / "lease").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(folder / ".hfship" / "lease", (1, 1))
    with (folder / work_path("a.safetensors")).open("wb") as silent:
        hfship("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
        silent.write(b"late")
    assert same_files(large, folder)


# name -> (faults, words of the details)
OTHER_OBJECTS: Dict[str, Any] = {
    "changed between ranges": ({"other_first": 2}, "has another file there"),
    "changed, and If-Range is ignored": (
        {"other_first": 2, "if_range": "ignored"},
        "has another file there",
    ),
    "If-Range is not understood": ({"if_range": "refused"}, ""),
    "every server has its own ETag": ({"etags_vary": True}, ""),
}


@pytest.mark.parametrize("name", OTHER_OBJECTS)
def test_ranges_of_two_objects_are_not_mixed(
    name: str, hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    faults, words = OTHER_OBJECTS[name]
    vars(hub.faults).update(rate_bps=None, **faults)
    done = hfship(
        "fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out", "-v", "-j", "4"
    )
    assert words in done.stderr
    assert same_files(large, tmp_path / "out" / "large") and not leftovers(
        tmp_path / "out" / "large"
    )


def test_token_that_expires_midway(
    hfship: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """The signed addresses run out and the token is refused: what came is kept for the next token."""
    vars(hub.faults).update(gated=True, token="hf_first1234", token_dies_at=10 * MB, expires_s=0.5)
    command = ("fetch", "org/large", "--endpoint", hub.url, "-o", tmp_path / "out")
    done = hfship(*command, env={"HF_TOKEN": "hf_first1234"}, code=4)
    assert (
        "refuses the token from environment variable HF_TOKEN" in done.stderr
        and "is kept" in done.stderr
    )
    journals = [
        json.loads(p.read_text())
        for p in (tmp_path / "out" / "large" / ".hfship" / "partial").glob("*.now")
    ]
    kept = {journal["path"]: journal["written"] for journal in journals}
    assert sum(stop - start for spans in kept.values() for start, stop in spans) > 8 * MB
    hub.forget()
    vars(hub.faults).update(token="hf_second123", token_dies_at=None, rate_bps=None)
    hfship(*command, env={"HF_TOKEN": "hf_second123"})
    assert same_files(large, tmp_path / "out" / "large")
    asked = [
        (path.partition("?")[0].rpartition("/")[2], headers["Range"])
        for _, path, headers in hub.traffic.requests
        if "Range" in headers
    ]
    assert len(asked) > 2
    for name, words in asked:
        first, last = map(int, words[len("bytes=") :].split("-"))
        assert all(last < start or first >= stop for start, stop in kept.get(name, [])), (
            name,
            words,
            kept,
        )


def test_details_tell_what_happens(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    done = hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, "-v")
    for words in ("org/tiny: main is ", "comes from localhost:", "config.json: verified, SHA-256 "):
        assert words in done.stderr, done.stderr
    assert "Signature" not in done.stderr


# -- aria2


@pytest.fixture
def aria2() -> None:
    if not shutil.which("aria2c"):
        missing("aria2c")


@pytest.mark.real
def test_aria2_brings_the_same_bytes(
    aria2: None, pyz: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    """The token is in no argv (aria2c reads it from a pipe) and reaches the Hub only; state is kept over a kill."""
    vars(hub.faults).update(token="hf_good1234", rate_bps=30 * MB)
    command = (
        "fetch",
        "org/large",
        "--endpoint",
        hub.url,
        "-o",
        tmp_path / "out",
        "--engine",
        "aria2",
    )
    env = {"HF_TOKEN": "hf_good1234"}
    with pyz.start(*command, env=env) as process:
        wait_for(lambda: hub.traffic.body_bytes > 20 * MB)
        argv = run_program(["ps", "-eo", "args"]).out
        process.kill()
        process.communicate()
    assert "aria2c" in argv and "hf_good1234" not in argv
    time.sleep(1.5)  # aria2c notices that its parent is gone
    hub.faults.rate_bps = None
    pyz(*command, env=env)
    assert same_files(large, tmp_path / "out" / "large") and not leftovers(
        tmp_path / "out" / "large"
    )
    assert hub.traffic.body_bytes < 1.5 * 64 * MB
    assert not list((tmp_path / "out").rglob("*aria2*"))


@pytest.mark.real
def test_damage_through_aria2_is_found(
    aria2: None, pyz: Program, hub: FaultHub, large: Path, tmp_path: Path
) -> None:
    vars(hub.faults).update(flip_at=5_000_000, flip_times=999, rate_bps=None)
    done = pyz(
        "fetch",
        "org/large",
        "--endpoint",
        hub.url,
        "-o",
        tmp_path / "out",
        "--engine",
        "aria2",
        code=6,
    )
    assert (
        "damaged through aria2c" in done.stderr
        and not (tmp_path / "out" / "large" / "a.safetensors").exists()
    )


def test_engine_aria2_without_aria2(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, "--engine", "aria2")
    assert "aria2c is not installed" in hfship(*command, env={"PATH": "/nowhere"}, code=9).stderr


def test_another_model_of_the_same_name_is_not_mixed_in(
    hfship: Program, hub: FaultHub, published: Path, model: Path, tmp_path: Path
) -> None:
    hub.add(model, "other/tiny")
    hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    done = hfship("fetch", "other/tiny", "--endpoint", hub.url, "-o", tmp_path, code=2)
    assert "holds another model, org/tiny" in done.stderr and "--name" in done.stderr
    assert same_files(published, tmp_path / "tiny")


def test_a_fetch_that_never_began_leaves_no_folder(
    hfship: Program, hub: FaultHub, tmp_path: Path
) -> None:
    hfship("fetch", "org/nothing", "--endpoint", hub.url, "-o", tmp_path / "out", code=5)
    assert not list((tmp_path / "out").iterdir())


def test_next_steps_can_be_typed_as_they_are(
    hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    for kind, words in (("source", "next  hfship fetch"), ("pyz", "next  python3 ")):
        run = program(kind, tmp_path / kind)
        run("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
        (tmp_path / "tiny" / "config.json").unlink()
        done = run("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, "--verify", code=3)
        assert words in done.stderr and "fetch --repair org/tiny" in done.stderr


@pytest.mark.parametrize("then", ["accept", "throw_away"])
def test_nothing_is_written_behind_the_hash(then: str, tmp_path: Path) -> None:
    """A file is neither finished nor begun anew while a reader may still be writing to it."""
    source = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
    remote = RemoteFile("w.bin", 8, "", hashlib.sha256(b"rightful").hexdigest())
    transfer = Transfer(remote, source, tmp_path, VerifiedLog(tmp_path))
    reporter, stop = Reporter("none", -1), threading.Event()
    client = HubClient(load_settings({}), None, reporter, stop)
    with reporter.stage("test", 8) as stage:
        state = DownloadState([transfer], TransferSettings(), stage, stop)
        verifier = Verifier(client, state, [client.endpoint])
        partial = state.files[0].partial
        flight = state.next_flight(0)
        assert flight
        partial.create()
        (tmp_path / work_path("w.bin")).write_bytes(b"rightful")
        partial.hash_up_to(8)
        state.advance(flight, state.grant(flight, 8))
        ender = threading.Thread(target=getattr(verifier, then), args=(0,))
        ender.start()
        ender.join(0.2)
        assert ender.is_alive() and not (tmp_path / "w.bin").exists()
        assert state.scheduler.next_flight(8) is None
        state.files[0].busy = True  # as the hash thread that ends it has made it
        assert not state.land(flight)
        state.release(0)
        ender.join(10)
        assert not ender.is_alive()
        if then == "accept":
            verifier.start_over(0)  # another connection finds another object there, too late
            assert state.complete and state.scheduler.next_flight(8) is None
    assert (tmp_path / "w.bin").exists() == (then == "accept")
