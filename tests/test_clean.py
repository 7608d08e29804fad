"""clean: what killed downloads left goes; what is complete, in use or elsewhere stays."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import Program
from hfship.base.content import MARK_PATH, work_path
from hfship.base.errors import DiskError
from hfship.ops.clean import (
    Leftover,
    cache_leftovers,
    files_below,
    folder_leftovers,
    freed_by,
    is_locked,
    remove_leftover,
)
from support import archives, components
from support.archives import noise
from support.hub import FaultHub

COMMIT, OLD = "a" * 40, "b" * 40


def work_file(folder: Path) -> Path:
    """Where fetch writes a file of a model in `folder`; that place is made."""
    path = folder / work_path("w")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def below(root: Path) -> Iterator[Path]:
    """A folder and everything below, where a program may be at work that removes some of it."""
    yield root
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            yield Path(folder, name)


def age(*roots: Path, seconds: float = 3600) -> None:
    """Make everything below look as if nobody had touched it for a while."""
    then = time.time() - seconds
    for root in roots:
        for path in below(root):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (then, then), follow_symlinks=False)


def tree(root: Path) -> Set[str]:
    """Every file and link below, but for the locks that hfship leaves in a finished folder."""
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_symlink() or p.is_file()}


def clean(hfship: Program, *args: Any, **options: Any) -> Dict[str, Any]:
    return dict(json.loads(hfship("clean", "--json", "--yes", *args, **options).stdout))


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.fixture
def slow_hub(hub: FaultHub, tmp_path: Path) -> FaultHub:
    """A Hub whose repository takes half a minute."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(noise(12_000_000))
    hub.add(folder)
    hub.faults.rate_bps = 400_000
    return hub


# -- our own leftovers


def test_a_live_fetch_is_left_alone_and_a_killed_one_is_cleaned(
    slow_hub: FaultHub, hfship: Program, tmp_path: Path
) -> None:
    models = tmp_path / "home" / "models"
    process = hfship.start("fetch", "org/tiny", "--endpoint", slow_hub.url, "--all-files")
    wait_for(lambda: any(path.match("partial/*.json") for path in below(models)), process)
    age(models)
    live = clean(hfship)
    assert (
        live["removed"] == 0 and live["leftovers"] and all(row["kept"] for row in live["leftovers"])
    )
    process.kill()
    process.communicate()
    assert clean(hfship)["removed"] == 0, (
        "what changed a moment ago may be of a host that we cannot see"
    )
    age(models)
    done = clean(hfship)
    assert done["removed"] >= 2 and done["freed"] >= 12_000_000
    assert not list(models.rglob("*.part"))
    slow_hub.faults.rate_bps = None
    hfship("fetch", "org/tiny", "--endpoint", slow_hub.url)
    age(models)
    before = tree(models)
    assert clean(hfship)["leftovers"] == [] and tree(models) == before


def test_a_fetch_killed_before_its_first_byte_leaves_no_folder(
    pyz: Program, tmp_path: Path
) -> None:
    folder = tmp_path / "home" / "models" / "m"
    (folder / ".hfship").mkdir(parents=True)
    (folder / ".hfship" / "lock").touch()
    dead = {"host": socket.gethostname(), "pid": 1, "start": "1", "boot_id": "before"}
    (folder / ".hfship" / "lease").write_text(json.dumps(dead))
    age(folder)
    clean(pyz)
    assert not folder.exists() and folder.parent.exists()


def test_a_lease_of_another_host_is_believed(pyz: Program, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "models" / "m"
    archives.make_model(folder, archives.SMALL)
    work_file(folder).write_bytes(b"x" * 5000)
    age(folder)
    (folder / ".hfship" / "lease").write_text(json.dumps({"host": "another", "pid": 1}))
    rows = clean(pyz)["leftovers"]
    assert rows and all("in use by another hfship" in row["kept"] for row in rows)
    assert work_file(folder).exists()


def test_killed_packs_and_unpacks(hfship: Program, tmp_path: Path) -> None:
    """Parts of a running pack stay, also on a second medium; a replaced model stays while there is no other."""
    packages, models = tmp_path / "home" / "transfer_package", tmp_path / "home" / "models"
    packages.mkdir(parents=True)
    archives.make_model(models / "m", archives.SMALL)
    for name in (
        "killed.tar.zst.incomplete",
        "killed.tar.zst.0001.incomplete",
        "killed.tar.zst.0001",
        ".killed.tar.zst.sha256.12.tmp",
    ):
        (packages / name).write_bytes(b"x" * 9000)
    (packages / "mine.incomplete").write_text("not of hfship")
    for name in ("m~incomplete", "m~replaced", "n~replaced", "mine~incomplete"):
        shutil.copytree(models / "m", models / name)
        (models / name / MARK_PATH).touch()
    (models / "mine~incomplete" / MARK_PATH).unlink()  # whose it is, we do not know
    (
        models / "m~incomplete" / ".hfship" / "manifest.json"
    ).unlink()  # the last file that unpack writes
    (models / "m~incomplete" / ".hfship" / "lock").touch()
    age(packages, models)
    elsewhere = tmp_path / "killed.tar.zst.incomplete"
    elsewhere.touch()
    with contextlib.ExitStack() as stack:
        with elsewhere.open() as stream:
            holder = subprocess.Popen(["sleep", "60"], stdin=stream)
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        kept = [row for row in clean(hfship, packages)["leftovers"] if row["kept"]]
        assert (
            len(kept) == len(clean(hfship, packages)["leftovers"])
            and str(holder.pid) in kept[0]["kept"]
        )
    clean(hfship)
    assert tree(packages) == {"killed.tar.zst.0001", "mine.incomplete"}
    assert sorted(p.name for p in models.iterdir()) == [
        "m",
        "mine~incomplete",
        "n~replaced",
    ]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("successor", [True, False])
def test_a_replaced_model_goes_whole_or_stays_whole(
    manifest: bool, successor: bool, tmp_path: Path
) -> None:
    """It goes once NAME is there again; until then nothing of it does, whatever it looks like."""
    old = tmp_path / "m~replaced"
    archives.make_model(tmp_path / "n", {"w.bin": b"w", "sub/w.bin": b"s", "sub/deep/w.bin": b"d"})
    (tmp_path / "n").rename(old)
    if not manifest:
        (old / ".hfship" / "manifest.json").unlink(missing_ok=True)
    (old / ".hfship").mkdir(exist_ok=True)
    (old / MARK_PATH).touch()
    if successor:
        archives.make_model(tmp_path / "m", {"w.bin": b"new"})
    found = {item.path for item in folder_leftovers(tmp_path)}
    assert found == (set(files_below(old)) if successor else set())


@pytest.mark.parametrize("name", ["m.replaced.incomplete", "m~replaced", "m~incomplete"])
def test_a_folder_without_our_mark_is_nobodys_leftover(name: str, tmp_path: Path) -> None:
    archives.make_model(tmp_path / "m", {"w.bin": b"w", "x.incomplete": b"x"})
    shutil.copytree(tmp_path / "m", tmp_path / name)
    assert folder_leftovers(tmp_path) == []


# -- the caches of huggingface_hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a current and an old revision, and every kind of leftover; the place where hf looks for it."""
    hub = tmp_path / "home" / ".cache" / "huggingface" / "hub"
    repo = hub / "models--org--m"
    for name, text in {
        "new": "n" * 5000,
        "old": "o" * 6000,
        "both": "b" * 7000,
        "lost": "l" * 8000,
    }.items():
        (repo / "blobs").mkdir(parents=True, exist_ok=True)
        (repo / "blobs" / name).write_text(text)
    (repo / "blobs" / "etag.12345678.incomplete").write_text("i" * 9000)
    for commit, names in ((COMMIT, ("new", "both")), (OLD, ("old", "both"))):
        (repo / "snapshots" / commit / "sub").mkdir(parents=True)
        for name in names:
            (repo / "snapshots" / commit / "sub" / name).symlink_to(f"../../../blobs/{name}")
    (repo / "snapshots" / COMMIT / "gone").symlink_to("../../blobs/gone")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (hub / ".locks" / "models--org--m").mkdir(parents=True)
    (hub / ".locks" / "models--org--m" / "etag.lock").touch()
    for content in ("c" * 64, "d" * 64):
        store = hub / "blobs" / content[:2]
        store.mkdir(parents=True)
        (store / content).write_text(content)
        (store / f"{content}.refs").write_text("models--org--m/blobs/shared\n")
    (hub / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    (repo / "blobs" / "shared").symlink_to(f"../../blobs/cc/{'c' * 64}")
    (repo / "snapshots" / COMMIT / "shared").symlink_to("../../blobs/shared")
    (hub.parent / "xet" / "host" / "chunk_cache" / "ab").mkdir(parents=True)
    (hub.parent / "xet" / "host" / "chunk_cache" / "ab" / "chunk").write_text("x" * 4000)
    (hub.parent / "xet" / "host" / "shard_cache").mkdir()
    (hub.parent / "xet" / "host" / "shard_cache" / "s.mdb").write_text("x")
    age(hub.parent)
    return hub


KEPT = {f"models--org--m/snapshots/{COMMIT}/{name}" for name in ("sub/new", "sub/both", "shared")}
KEPT |= {"models--org--m/blobs/new", "models--org--m/blobs/both", "models--org--m/blobs/shared"}
KEPT |= {"models--org--m/refs/main", "blobs/.huggingface-shared-blobs"}
KEPT |= {f"blobs/cc/{'c' * 64}", f"blobs/cc/{'c' * 64}.refs"}
KEPT_OLD = {f"models--org--m/snapshots/{OLD}/sub/{name}" for name in ("old", "both")} | {
    "models--org--m/blobs/old"
}


@pytest.mark.parametrize("options, expected", [([], KEPT | KEPT_OLD), (["--old-revisions"], KEPT)])
def test_of_a_cache_stays_what_a_revision_needs(
    options: List[str], expected: Set[str], cache: Path, hfship: Program
) -> None:
    before = tree(cache)
    assert clean(hfship)["leftovers"] == [], "without --cache it is not looked at"
    shown = json.loads(hfship("clean", "--cache", "--dry-run", "--json", *options).stdout)
    assert tree(cache) == before and shown["removed"] == 0
    done = clean(hfship, "--cache", *options)
    assert done["freed"] == shown["bytes"] > 0
    assert tree(cache) == expected
    assert {p.name for p in (cache.parent / "xet").rglob("*") if p.is_file()} == {"s.mdb"}


def test_links_through_another_path_count(cache: Path, pyz: Program, tmp_path: Path) -> None:
    """A cache that was moved: the links say the old place, which leads to the new one."""
    (tmp_path / "old").symlink_to(cache)
    for name in ("new", "both"):
        link = cache / "models--org--m" / "snapshots" / COMMIT / "sub" / name
        link.unlink()
        link.symlink_to(tmp_path / "old" / "models--org--m" / "blobs" / name)
    clean(pyz, "--cache", cache)
    assert tree(cache) == KEPT | KEPT_OLD


def test_a_repository_with_parts_elsewhere_is_left_alone(
    cache: Path, pyz: Program, tmp_path: Path
) -> None:
    repo = cache / "models--org--m"
    (repo / "snapshots").rename(tmp_path / "snapshots")
    (repo / "snapshots").symlink_to(tmp_path / "snapshots")
    before = tree(repo)
    clean(pyz, "--cache", "--old-revisions", cache)
    assert tree(repo) == before


def test_a_repository_with_a_held_lock_is_left_alone(cache: Path, pyz: Program) -> None:
    before = tree(cache / "models--org--m")
    lock = cache / ".locks" / "models--org--m" / "etag.lock"
    holder = subprocess.Popen(["flock", lock, "sleep", "60"], process_group=0)
    wait_for(lambda: is_locked(lock), holder)
    age(cache)
    done = clean(pyz, "--cache", cache)
    os.killpg(holder.pid, signal.SIGKILL)
    holder.wait()
    assert all(row["kept"] for row in done["leftovers"] if "models--org--m" in row["where"])
    assert tree(cache / "models--org--m") == before


@pytest.mark.parametrize(
    "owner, kept",
    [("{pid}\n{host}\n", True), ("{pid}\nanother\n", True), ("999999999\n{host}\n", False)],
)
def test_a_lock_where_flock_does_not_work(
    owner: str, kept: bool, cache: Path, pyz: Program
) -> None:
    """filelock then writes who holds it, and the file itself is the lock."""
    lock = cache / ".locks" / "models--org--m" / "etag.lock"
    lock.write_text(owner.format(pid=os.getpid(), host=socket.gethostname()))
    age(cache)
    clean(pyz, "--cache", cache)
    assert lock.exists() == kept == (cache / "models--org--m" / "blobs" / "lost").exists()


def test_a_mapped_blob_is_in_use(cache: Path, pyz: Program) -> None:
    blob = cache / "models--org--m" / "blobs" / "lost"
    code = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=1); f.close(); print(flush=True); input()"
    holder = subprocess.Popen(
        ["python3", "-c", code, blob], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline()
    clean(pyz, "--cache", cache)
    assert blob.exists()
    holder.communicate("\n")
    clean(pyz, "--cache", cache)
    assert not blob.exists()


@pytest.mark.real
@pytest.mark.parametrize("place", ["cache", "local"])
def test_downloads_of_the_official_client(
    place: str, slow_hub: FaultHub, pyz: Program, tmp_path: Path
) -> None:
    """Left alone while it runs; cleaned once it was killed; and what it finished is whole."""
    hf = components.require("hf")
    local = tmp_path / "home" / "models" / "tiny"
    env = pyz.env(
        {"HF_ENDPOINT": slow_hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    )
    argv = [
        str(hf),
        "download",
        "org/tiny",
        *(["--local-dir", str(local)] if place == "local" else []),
    ]
    home = tmp_path / "home"
    process = subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any(path.suffix == ".incomplete" for path in below(home)), process)
    age(home)
    arguments = ["--cache"] if place == "cache" else []
    live = clean(pyz, *arguments)
    assert (
        live["removed"] == 0 and live["leftovers"] and all(row["kept"] for row in live["leftovers"])
    )
    process.kill()
    process.communicate()
    age(home)
    assert clean(pyz, *arguments)["removed"] >= 2
    assert not list(home.rglob("*.incomplete")) and not list(home.rglob("*.lock"))
    slow_hub.faults.rate_bps = None
    subprocess.run(argv, env=env, check=True, capture_output=True)
    age(home)
    clean(pyz, *arguments)
    slow_hub.forget()
    subprocess.run(argv, env=env, check=True, capture_output=True)
    assert slow_hub.traffic.body_bytes == 0, "nothing was missing"
    weights = next(p for p in home.rglob("model.safetensors"))
    assert weights.read_bytes() == (tmp_path / "made" / "model.safetensors").read_bytes()


# -- what is refused


@pytest.mark.parametrize(
    "folder, code, words",
    [
        ("/", 2, "not cleaned as a whole"),
        ("{home}", 2, "not cleaned as a whole"),
        ("{home}/..", 2, "not cleaned as a whole"),
        ("{home}/documents", 2, "looks like neither"),
        ("{home}/nothing", 5, "there is no folder"),
        ("/proc", 2, "mount point"),
    ],
)
def test_what_is_not_ours_is_refused(
    folder: str, code: int, words: str, hfship: Program, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    (home / "documents").mkdir()
    (home / "documents" / "thesis.incomplete").write_text("x")
    before = tree(home)
    assert words in hfship("clean", "--yes", folder.format(home=home), code=code).stderr
    assert tree(home) == before


def test_a_cache_wants_its_option(cache: Path, pyz: Program) -> None:
    assert "clean --cache" in pyz("clean", "--yes", cache, code=2).stderr


def test_who_only_looks_leaves_no_trace(hfship: Program, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "models" / "m"
    archives.make_model(folder, archives.SMALL)
    (folder / ".hfship").mkdir(exist_ok=True)
    work_file(folder).write_bytes(b"x" * 5000)
    age(folder)
    before = tree(tmp_path)
    rows = json.loads(hfship("clean", "--dry-run", "--json").stdout)["leftovers"]
    assert len(rows) == 1 and not rows[0]["kept"] and tree(tmp_path) == before
    said = json.loads(hfship("clean", "--json", code=2).stdout)  # nobody to ask
    assert said["leftovers"] == rows and said["removed"] == 0 and tree(tmp_path) == before
    assert said["error"]["what"] == "nothing was removed" and said["exit_code"] == 2
    assert "error" not in clean(hfship)


def test_nobody_to_ask(cache: Path, pyz: Program) -> None:
    before = tree(cache)
    done = pyz("clean", "--cache", code=2, stdin=subprocess.DEVNULL)
    assert (
        "unused content" in done.stdout
        and "clean --cache --yes" in done.stderr
        and tree(cache) == before
    )


@pytest.mark.parametrize("answer, code", [(b"y\n", 0), (b"\n", 2)])
def test_a_terminal_is_asked(answer: bytes, code: int, cache: Path, pyz: Program) -> None:
    before = tree(cache)
    pid, terminal = pty.fork()
    if not pid:
        os.execve(pyz.argv[0], [*pyz.argv, "clean", "--cache"], pyz.env())
    said = b""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 4096):
            said += piece
            if b"[y/N]" in piece:
                os.write(terminal, answer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code, said
    assert (tree(cache) == before) == bool(code)


@pytest.mark.parametrize("text", ["7", "x", "-1d", "7y"])
def test_an_age_that_is_none(text: str, pyz: Program) -> None:
    assert "not an age" in pyz("clean", f"--older-than={text}", code=2).stderr


def test_only_what_is_older(cache: Path, pyz: Program) -> None:
    young = cache / "models--org--m" / "blobs" / "lost"
    os.utime(young, (time.time() - 600,) * 2)
    clean(pyz, "--cache", "--older-than", "30m", cache)
    assert young.exists() and not (young.parent / "etag.12345678.incomplete").exists()


def test_a_link_on_the_way_is_not_followed(tmp_path: Path, hfship: Program) -> None:
    models = tmp_path / "home" / "models"
    (models / "m" / ".hfship").mkdir(parents=True)
    outside = tmp_path / "outside"
    (outside / ".hfship").mkdir(parents=True)
    for folder in (outside, models / "m"):
        work_file(folder).write_bytes(b"x")
        (folder / ".hfship" / "lock").touch()
    (models / "m" / "sub").symlink_to(outside)
    (models / "n").symlink_to(outside)
    (models / "m" / work_path("x")).symlink_to(work_file(outside))
    age(models, outside)
    clean(hfship)
    assert tree(outside) == {work_path("w"), ".hfship/lock"}


def test_what_changed_since_it_was_shown_stays(tmp_path: Path) -> None:
    path = tmp_path / "m" / "w.incomplete"
    path.parent.mkdir()
    path.write_text("one")
    item = Leftover(path, "", tmp_path, path.lstat())
    path.write_text("another")
    assert not remove_leftover(tmp_path, item) and path.exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m").rename(tmp_path / "away")
    (tmp_path / "m").symlink_to(tmp_path / "away")
    with pytest.raises(DiskError):
        remove_leftover(tmp_path, item._replace(status=path.lstat()))


def test_hard_links_free_their_bytes_once(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(8192))
    (tmp_path / "b").hardlink_to(path)
    (tmp_path / "outside").hardlink_to(path)
    items = [Leftover(tmp_path / n, "", tmp_path, path.lstat()) for n in "ab"]
    assert freed_by(items) == 0
    (tmp_path / "outside").unlink()
    items = [Leftover(tmp_path / n, "", tmp_path, path.lstat()) for n in "ab"]
    assert freed_by(items) == 8192


# -- random trees

NAMES = [
    "m",
    "w.safetensors",
    "w.safetensors.incomplete",
    ".hfship",
    "partial",
    "lock",
    ".cache",
    "huggingface",
]
NAMES += [
    "download",
    "x.lock",
    "a.b.incomplete",
    "m.incomplete",
    "m.tar.zst",
    "m.tar.zst.0001",
    "a" * 40 + ".json",
]
NAMES += [
    "m.tar.zst.0001.incomplete",
    "m~replaced",
    "m~incomplete",
    "a" * 40 + ".part",
    ".m.tar.zst.sha256.1.tmp",
    "verified.jsonl",
]
paths = st.lists(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=5).map("/".join), max_size=14, unique=True
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=paths, links=st.sets(st.integers(0, 13)))
@example(names=[".hfship/.hfship/m"], links=set())
def test_of_any_tree_only_unfinished_files_go(
    names: List[str], links: Set[int], tmp_path_factory: Any
) -> None:
    """A file that goes has a name of unfinished or internal files on its way, and nothing outside is ever touched."""
    root = tmp_path_factory.mktemp("tree")
    inside, outside = root / "models", root / "outside"
    outside.mkdir()
    (outside / "w.incomplete").write_text("precious")
    inside.mkdir()
    for number, name in enumerate(names):
        path = inside / name
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(outside) if number in links else path.write_text("x")
    before = tree(inside)
    found = folder_leftovers(inside)
    assert len({item.path for item in found}) == len(found)
    for item in found:
        assert remove_leftover(inside, item)
    for gone in before - tree(inside):
        folder, _, name = gone.rpartition("/")
        unfinished = "incomplete" in gone or name.endswith((".tmp", ".lock"))
        assert unfinished or "/.hfship/" in f"/{gone}" or "/.cache/huggingface/" in f"/{gone}", gone
    assert tree(root) - tree(inside) and (outside / "w.incomplete").read_text() == "precious"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blobs=st.sets(st.sampled_from("abcdef")),
    revisions=st.dictionaries(
        st.sampled_from([COMMIT, OLD, "c" * 40]), st.sets(st.sampled_from("abcdef"))
    ),
    refs=st.sets(st.sampled_from([COMMIT, OLD, "c" * 40])),
    old=st.booleans(),
)
def test_of_any_cache_every_revision_that_stays_is_whole(
    blobs: Set[str],
    revisions: Dict[str, Set[str]],
    refs: Set[str],
    old: bool,
    tmp_path_factory: Any,
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    repo = cache / "models--org--m"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    for name in blobs:
        (repo / "blobs" / name).write_text(name)
    for commit, names in revisions.items():
        for name in names:
            link = repo / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../blobs/{name}")
    for commit in refs:
        (repo / "refs" / commit[:1]).write_text(commit)
    for item in cache_leftovers(cache, old):
        assert remove_leftover(cache, item)
    kept = {
        commit: names & blobs for commit, names in revisions.items() if commit in refs or not old
    }
    for commit, names in kept.items():
        for name in names:
            assert (repo / "snapshots" / commit / name).read_text() == name
    expected = {name for names in kept.values() for name in names}
    assert {path.name for path in (repo / "blobs").iterdir()} == expected


@pytest.mark.parametrize(
    "content, locked",
    [
        (f"{os.getpid()}\n", True),
        (f"{os.getpid()}\n{socket.gethostname()}", True),
        (f"{2**22 + 5}\n{socket.gethostname()}", False),  # no process can have that number
        (f"{2**22 + 5}\n", False),
        (f"{2**22 + 5}\nanother-host", True),
        ("no number", False),
        ("", False),
    ],
    ids=["ours", "ours, here", "dead, here", "dead", "elsewhere", "no number", "empty"],
)
def test_a_file_that_is_a_lock_holds_while_its_process_lives(
    content: str, locked: bool, tmp_path: Path
) -> None:
    """Nobody can look into another host: what it says to hold is held."""
    for suffix, expected in ((".lock", locked), (".txt", False)):
        path = tmp_path / f"a{suffix}"
        path.write_text(content)
        assert is_locked(path) is expected


@pytest.mark.parametrize("own, code", [(True, 0), (False, 2)])
def test_an_empty_folder_is_cleaned_only_if_it_is_one_of_ours(
    own: bool, code: int, hfship: Program
) -> None:
    folder = hfship.home / "folder"
    folder.mkdir()
    env = {"HFSHIP_MODELS_DIR": str(folder)} if own else {}
    hfship("clean", folder, env=env, code=code)
