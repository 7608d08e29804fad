# SPDX-License-Identifier: Apache-2.0
"""The order of steps from the Hub to a folder, on plans made by hand; test_fetch.py has a Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.card import Card
from hfship.base.content import PARTIAL_DIR
from hfship.base.errors import (
    DiskError,
    IncompleteError,
    IntegrityError,
    NotFoundError,
    UsageError,
)
from hfship.base.manifest import FileEntry, Source, make_manifest, read_manifest, write_manifest
from hfship.base.report import Reporter
from hfship.base.values import replace
from hfship.hub import fetch
from hfship.hub.fetch import FetchPlan, FetchRequest, bytes_to_write, finish_fetch, missing_or_wrong
from hfship.hub.protocol import RemoteFile, Snapshot
from hfship.hub.ranges import SMALL_FILE
from hfship.hub.verified import VerifiedLog

SOURCE = Source("https://hub", "org/m", "main", "org/m", "0" * 40)
SHA = "5e" * 32
CONFIG, INDEX, SHARD, OTHER = (
    RemoteFile(path, size, "e" + path, SHA)
    for path, size in (
        ("config.json", 3),
        ("model.safetensors.index.json", 5),
        ("model-00001-of-00002.safetensors", 700),
        ("model-00002-of-00002.safetensors", 900),
    )
)


def plan_of(folder: Path, present: Dict[str, str], *wanted: RemoteFile, **fields: Any) -> FetchPlan:
    log: Any = SimpleNamespace(sha256_of=lambda file: present.get(file.path))
    snapshot = Snapshot(SOURCE, (CONFIG, INDEX, SHARD, OTHER), Card(license="mit"))
    return FetchPlan("m", folder, snapshot, wanted, present, log, **fields)


def proven(*files: RemoteFile) -> Dict[str, str]:
    return {file.path: SHA for file in files}


def test_what_a_plan_needs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, proven(CONFIG), CONFIG, SHARD)
    assert plan.left_out == (OTHER.path, INDEX.path)
    assert [transfer.remote for transfer in plan.transfers] == [SHARD]
    assert plan.present_sizes == [3]
    assert plan.new_inodes == 2 + fetch.SPARE_INODES
    assert bytes_to_write(plan) == 700


@pytest.mark.parametrize(
    ("fields", "wanted", "kind", "notes"),
    [
        ({}, [SHARD], "model", True),
        ({"hub_notes": False}, [SHARD], "model", False),
        ({}, [SHARD], "image", False),
        ({}, [SHARD, RemoteFile(".cache/x", 1, "e", SHA)], "model", False),
    ],
)
def test_huggingface_hub_finds_its_notes_where_it_may(
    fields: Dict[str, Any], wanted: List[RemoteFile], kind: str, notes: bool, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, {}, *wanted, outdates=True, **fields)
    source = replace(SOURCE, repo_type=kind)
    plan = replace(plan, snapshot=replace(plan.snapshot, source=source))
    assert {(one.hub_notes, one.outdates) for one in plan.transfers} == {(notes, True)}


def finished(folder: Path, *wanted: RemoteFile) -> Any:
    return finish_fetch(plan_of(folder, proven(*wanted), *wanted))


def test_the_manifest_tells_what_is_not_there(tmp_path: Path) -> None:
    index = {"weight_map": {"a": SHARD.path, "b": OTHER.path}}
    (tmp_path / INDEX.path).write_text(json.dumps(index))
    manifest = finished(tmp_path, CONFIG, INDEX, SHARD)
    assert manifest == read_manifest(tmp_path)
    assert [(file.path, file.size, file.sha256) for file in manifest.files] == [
        (file.path, file.size, SHA) for file in (CONFIG, SHARD, INDEX)
    ]
    assert (manifest.left_out, manifest.left_out_paths) == (1, (OTHER.path,))
    assert manifest.partial == (OTHER.path,) and manifest.card.license == "mit"


def test_an_unchanged_manifest_keeps_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.hub.fetch.utc_exact", lambda: "2026-01-01T00:00:00Z")
    first = finished(tmp_path, CONFIG)
    monkeypatch.setattr("hfship.hub.fetch.utc_exact", lambda: "2026-01-02T00:00:00Z")
    assert finished(tmp_path, CONFIG) == first == read_manifest(tmp_path)
    later = finished(tmp_path, CONFIG, SHARD)
    assert later == read_manifest(tmp_path) and later.source.fetched_at == "2026-01-02T00:00:00Z"


def test_a_file_that_changed_has_no_manifest(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, proven(CONFIG), CONFIG, SHARD)
    with pytest.raises(IntegrityError, match="changed while it was fetched"):
        finish_fetch(plan)
    assert read_manifest(tmp_path) is None


def test_what_the_policy_makes_of_a_manifest_is_written(tmp_path: Path) -> None:
    def accept(folder: Path, manifest: Any) -> Any:
        assert folder == tmp_path
        return replace(manifest, name="accepted")

    made = finish_fetch(plan_of(tmp_path, proven(CONFIG), CONFIG), accept=accept)
    written = read_manifest(tmp_path)
    assert written is not None and made.name == written.name == "accepted"


@pytest.mark.parametrize(
    ("there", "present", "errors"),
    [
        ([], [CONFIG, SHARD], []),
        ([SHARD], [CONFIG], [(IntegrityError, "1 wrong file", SHARD.path)]),
        ([], [CONFIG], [(IncompleteError, "1 missing file", SHARD.path)]),
        (
            [CONFIG],
            [],
            [
                (IntegrityError, "1 wrong file", CONFIG.path),
                (IncompleteError, "1 missing file", SHARD.path),
            ],
        ),
    ],
)
def test_wrong_files_are_told_from_missing_ones(
    there: List[RemoteFile], present: List[RemoteFile], errors: List[Any], tmp_path: Path
) -> None:
    for file in there:
        (tmp_path / file.path).write_text("x")
    found = missing_or_wrong(plan_of(tmp_path, proven(*present), CONFIG, SHARD))
    said = [(type(error), error.what.rpartition(": ")[2], error.why) for error in found]
    assert said == errors
    assert all("--repair" in error.next_step for error in found)


def test_a_long_list_of_files_is_named_in_part(tmp_path: Path) -> None:
    many = [RemoteFile(f"f{number:02}", 1, "e", SHA) for number in range(30)]
    (error,) = missing_or_wrong(plan_of(tmp_path, {}, *many))
    assert error.what.endswith("30 missing files")
    assert error.why.split(", ") == [file.path for file in many[:20]]


class Progress:
    """A reporter and its stages; notes what was said."""

    def __init__(self) -> None:
        self.said: List[str] = []
        self.read = 0

    def info(self, text: str) -> None:
        self.said.append(text)

    def stage(self, name: str, total: int) -> Any:
        self.said.append(f"{name} {total}")
        return self

    def add(self, count: int) -> None:
        self.read += count

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


@pytest.mark.parametrize(
    ("content", "rehash", "there"),
    [
        (b"yes", False, True),
        (b"yes", True, True),
        (b"no!", False, False),
        (b"longer", False, False),
        (None, False, False),
    ],
)
def test_what_lies_there_is_adopted_when_it_is_right(
    content: Any, rehash: bool, there: bool, tmp_path: Path
) -> None:
    remote = RemoteFile("a", 3, "e", hashlib.sha256(b"yes").hexdigest())
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    log, reporter = VerifiedLog(tmp_path), Progress()
    for expected in [3, 3] if rehash else [3, 0]:  # the second time it is remembered
        reporter.read = 0
        present = fetch.present_files(tmp_path, [remote], log, reporter, rehash)  # type: ignore[arg-type]
        assert present == ({"a": remote.sha256} if there else {})
        if there:
            assert reporter.read == expected


@pytest.mark.parametrize(
    ("request_fields", "flags"),
    [
        ({}, ["--exclude", "bad"]),
        ({"include": ("a",)}, ["--include", "a", "--exclude", "bad"]),
        ({"exclude": ("b",)}, ["--exclude", "b", "--exclude", "bad"]),
        ({"all_files": True}, ["--exclude", "bad", "--all-files"]),
    ],
)
def test_the_rest_is_a_command(
    request_fields: Dict[str, Any], flags: List[str], tmp_path: Path
) -> None:
    asked = FetchRequest("org/m", None, "m", **request_fields)
    said = fetch._rest_without(["bad"], asked, SOURCE, tmp_path / "m")
    words = said.split()
    start = words.index(flags[0])
    assert words[start : start + len(flags)] == flags


@pytest.mark.parametrize("nameless", [1, 2, 30])
def test_what_nothing_would_prove_is_refused(nameless: int, tmp_path: Path) -> None:
    wanted = [RemoteFile(f"f{n}", 1, "" if n < nameless else "e", None) for n in range(30)]
    asked = FetchRequest("org/m", None, "m")
    with pytest.raises(IntegrityError) as caught:
        fetch._require_hashes(wanted, asked, SOURCE, tmp_path / "m")
    has_rest = "to fetch the rest" in caught.value.next_step
    assert has_rest is (nameless < 30)
    fetch._require_hashes(wanted[nameless:], asked, SOURCE, tmp_path / "m")


def test_selections_of_a_commit_add_up(tmp_path: Path) -> None:
    manifest = finished(tmp_path, CONFIG, SHARD, OTHER)
    for file in (CONFIG, SHARD):
        (tmp_path / file.path).touch()
    snapshot = Snapshot(SOURCE, (CONFIG, INDEX, SHARD, OTHER))
    reporter: Any = Progress()
    together = fetch._with_earlier([CONFIG, INDEX], snapshot, tmp_path, manifest, reporter)
    assert together == [CONFIG, INDEX, SHARD]
    assert reporter.said == ["m: 1 file of earlier selections of this commit stay"]
    reporter.said.clear()
    assert fetch._with_earlier([CONFIG, SHARD], snapshot, tmp_path, manifest, reporter)
    assert reporter.said == []


class Hub(Progress):
    """A client that knows one snapshot, and its reporter."""

    def __init__(self, *files: RemoteFile) -> None:
        super().__init__()
        self.files = files
        self.asked: List[Any] = []
        self.reporter = self

    def clock(self, text: str) -> Any:
        return self

    def detail(self, text: str) -> None:
        self.said.append(text)

    def about(self, name: str, number: int, count: int) -> Any:
        self.said.append(f"{number}/{count} {name}")
        return self

    def snapshot(self, repo: str, revision: Any, repo_type: str) -> Snapshot:
        self.asked.append((repo, revision, repo_type))
        if repo == "org/none":
            raise NotFoundError("no such repository", "", "")
        return Snapshot(SOURCE, self.files)


ASKED = FetchRequest("org/m", "v1", "m", all_files=True)


def planned(
    folder: Path, hub: Any, request: FetchRequest = ASKED, dry_run: bool = True
) -> FetchPlan:
    return fetch.plan_fetch(hub, request, folder, hub, dry_run)


def test_a_plan_of_an_empty_folder(tmp_path: Path) -> None:
    hub = Hub(CONFIG, SHARD)
    plan = planned(tmp_path / "m", hub)
    assert hub.asked == [("org/m", "v1", "model")]
    assert (plan.name, plan.folder, plan.wanted) == ("m", tmp_path / "m", (CONFIG, SHARD))
    assert plan.outdates and plan.present == {} and plan.snapshot.source == SOURCE
    assert f"org/m: main is {'0' * 40}; 2 files wanted, 0 of them here and proven" in hub.said


@pytest.mark.parametrize(
    ("held", "outdates", "wanted"),
    [
        ({}, False, [CONFIG, SHARD]),  # an earlier selection stays
        ({"commit": "1" * 40}, True, [CONFIG]),
    ],
)
def test_a_plan_of_a_folder_with_a_manifest(
    held: Dict[str, str], outdates: bool, wanted: List[RemoteFile], tmp_path: Path
) -> None:
    source = replace(SOURCE, **held)
    entries = [FileEntry(file.path, file.size, SHA) for file in (CONFIG, SHARD)]
    write_manifest(tmp_path, make_manifest("m", entries, source))
    (tmp_path / SHARD.path).touch()
    plan = planned(tmp_path, Hub(CONFIG, SHARD), replace(ASKED, include=("config.json",)))
    assert (plan.outdates, list(plan.wanted)) == (outdates, wanted)


def test_another_model_in_the_folder_is_never_touched(tmp_path: Path) -> None:
    source = replace(SOURCE, resolved_repo="org/other")
    write_manifest(tmp_path, make_manifest("m", [], source))
    with pytest.raises(UsageError, match="holds another model, org/other") as caught:
        planned(tmp_path, Hub(CONFIG))
    assert caught.value.next_step == "hfship fetch org/m --name ANOTHER_NAME"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"all_files": True}, ["config.json", "model.safetensors", "pytorch_model.bin"]),
        ({"all_files": False}, ["config.json", "model.safetensors"]),
        ({"all_files": False, "include": ("*.bin",)}, ["pytorch_model.bin"]),
        ({"all_files": False, "repo_type": "dataset"}, None),
        ({"exclude": ("*.bin", "config*")}, ["model.safetensors"]),
    ],
)
def test_formats_that_vllm_does_not_read_are_left_out(
    fields: Dict[str, Any], wanted: Any, tmp_path: Path
) -> None:
    names = ["config.json", "model.safetensors", "pytorch_model.bin"]
    hub = Hub(*(RemoteFile(name, 5, "e", SHA) for name in names))
    plan = planned(tmp_path, hub, replace(ASKED, **fields))
    assert [file.path for file in plan.wanted] == (wanted or names)
    told = [line for line in hub.said if "leaving out 1 file (5 B)" in line]
    assert bool(told) is (fields == {"all_files": False})


def test_a_selection_of_nothing_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        planned(tmp_path, Hub(CONFIG), replace(ASKED, include=("*.x",)))
    assert caught.value.why == "1 file in the repository, none selected"


def test_names_that_cannot_be_files_are_refused(tmp_path: Path) -> None:
    bad = RemoteFile("../x", 1, "e", SHA)
    with pytest.raises(IntegrityError, match="cannot be used") as caught:
        planned(tmp_path, Hub(CONFIG, bad))
    assert "--exclude" in caught.value.next_step and "tell the owner" in caught.value.next_step
    twins = [RemoteFile(name, 1, "e", SHA) for name in ("a", "a/b")]
    with pytest.raises(IntegrityError, match="cannot be used"):
        planned(tmp_path, Hub(*twins))


def test_of_several_repositories_one_may_fail(tmp_path: Path) -> None:
    stack = contextlib.ExitStack()
    hub: Any = Hub(CONFIG)
    requests = [replace(ASKED, repo="org/none", name="none"), ASKED]
    plans, failures = fetch.plan_all(hub, requests, tmp_path, stack, threading.Event(), True)
    assert [plan.name for plan in plans] == ["m"] and [str(one.what) for one in failures] == [
        "no such repository"
    ]
    assert "1/2 none" in hub.said and "2/2 m" in hub.said
    with pytest.raises(NotFoundError):
        fetch.plan_all(hub, requests[:1], tmp_path, stack, threading.Event(), True)
    assert not (tmp_path / "m").exists()  # a dry run makes nothing


@pytest.mark.parametrize("doubtful", [False, True])
def test_what_another_may_still_write_is_begun_anew(
    doubtful: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "m" / PARTIAL_DIR
    partial.mkdir(parents=True)
    (partial / "x.part").touch()
    lock = contextlib.nullcontext(SimpleNamespace(doubtful=doubtful))
    monkeypatch.setattr("hfship.hub.fetch.FolderLock", lambda *_: lock)
    with contextlib.ExitStack() as locks:
        fetch.lock_folder(tmp_path / "m", locks, threading.Event())
        assert (partial / "x.part").exists() is not doubtful


@pytest.mark.parametrize("where", [".hfship", "sub"])
def test_a_folder_that_others_can_change_is_refused(where: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("root, to give a folder away")
    (tmp_path / "m" / "sub").mkdir(parents=True)
    (tmp_path / "m" / ".hfship").mkdir()
    fetch._require_ours(tmp_path / "m", ("", ".hfship", "sub", "not-there"))
    os.chown(tmp_path / "m" / where, 65534, 65534)
    with pytest.raises(DiskError, match="belongs to"):
        fetch._require_ours(tmp_path / "m", ("", ".hfship", "sub"))


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_folder_is_asked_for_its_names_unless_nothing_is_written(
    dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(fetch, "require_names", lambda *words: asked.append(words))
    monkeypatch.setattr(fetch, "_require_ours", lambda *words: asked.append(words))
    deep = RemoteFile("a/b/x", 1, "e", SHA)
    planned(tmp_path, Hub(CONFIG, deep), dry_run=dry_run)
    if dry_run:
        assert asked == []
        return
    ((folder, folders), names) = asked
    assert folder == tmp_path and sorted(folders) == ["a", "a/b"]
    assert names == (tmp_path, ["config.json", "a/b/x"], f"fetch into {tmp_path}")


def test_a_folder_is_locked_while_it_is_fetched_into(tmp_path: Path) -> None:
    stop = threading.Event()
    hub: Any = Hub(CONFIG)
    with contextlib.ExitStack() as locks:
        plans, _ = fetch.plan_all(hub, [ASKED], tmp_path, locks, stop, dry_run=False)
        assert plans[0].folder == tmp_path / "m"
        with pytest.raises(IncompleteError, match="in use"):
            fetch.lock_folder(tmp_path / "m", contextlib.ExitStack(), stop)
        assert not any("1/1" in line for line in hub.said)
    assert not (tmp_path / "m").exists()  # nothing came


def test_a_folder_of_another_user_may_be_taken_over(tmp_path: Path) -> None:
    error = fetch._foreign_folder(tmp_path / "m", tmp_path / "m" / "sub", "kim")
    assert error.what == f"cannot fetch into {tmp_path}/m: {tmp_path}/m/sub belongs to kim"
    assert error.why == "who could change the files after they were proven"
    us = f"{os.geteuid()}:{os.getegid()}"
    assert error.next_step.endswith(f":\nchown -R {us} {tmp_path}/m")
    assert error.next_step.startswith("run it as kim, choose another folder with -o DIR")


def test_names_that_cannot_be_used_are_left_out_by_a_command(tmp_path: Path) -> None:
    bad = [RemoteFile(f"../{number}", 1, "e", SHA) for number in range(2)]
    with pytest.raises(IntegrityError) as caught:
        planned(tmp_path, Hub(CONFIG, *bad))
    step = caught.value.next_step
    assert step.startswith("to fetch the rest: hfship fetch")
    assert step.endswith("\nand tell the owner of org/m")
    assert caught.value.what == "the listing of org/m cannot be used" and caught.value.why
    twins = [RemoteFile("a", 1, "e", SHA), RemoteFile("a/b", 1, "e", SHA)]
    with pytest.raises(IntegrityError) as caught:
        planned(tmp_path, Hub(*twins))
    assert caught.value.next_step == "tell the owner of org/m"


def test_files_that_nothing_proves_are_counted_and_named_in_part(tmp_path: Path) -> None:
    files = [RemoteFile(f"f{n}", 1, "" if n < 9 else "e", None) for n in range(10)]
    with pytest.raises(IntegrityError) as caught:
        planned(tmp_path, Hub(*files))
    error = caught.value
    assert error.what == "https://hub lists 9 files of org/m without a hash"
    assert error.why.startswith("nothing would prove f0, f1, f2, f3, f4") and "f5" not in error.why
    first, rest = error.next_step.split("\n")
    assert first == (
        "HF_ENDPOINT=https://huggingface.co hfship fetch org/m --mirror https://hub"
        " (hashes from there, bytes from here)"
    )
    assert rest.startswith("to fetch the rest: ") and rest.count("--exclude") == 9


def test_a_selection_of_nothing_says_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        planned(tmp_path, Hub(), ASKED)
    assert caught.value.what == "nothing to fetch from org/m"
    assert caught.value.why == "0 files in the repository, none selected"
    assert caught.value.next_step == "check --include and --exclude"


def test_what_was_here_is_taken_into_the_plan(tmp_path: Path) -> None:
    right = RemoteFile("a", 3, "e", hashlib.sha256(b"yes").hexdigest())
    (tmp_path / "a").write_bytes(b"yes")
    hub = Hub(right, CONFIG)
    plan = planned(tmp_path, hub)
    assert plan.present == {"a": right.sha256} and "checking 3" in hub.said
    assert hub.said[-1].endswith("; 2 files wanted, 1 of them here and proven")
    (tmp_path / "a").write_bytes(b"no!")
    assert planned(tmp_path, Hub(right)).present == {}


def test_what_is_mended_is_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[Any] = []

    def mend(client: Any, transfers: Any, root: Path, repair_only: bool) -> Dict[str, str]:
        asked.append((client, [one.remote for one in transfers], root, repair_only))
        return proven(SHARD)

    monkeypatch.setattr(fetch, "mend_locally", mend)
    plan = plan_of(tmp_path, proven(CONFIG), CONFIG, SHARD, OTHER)
    client: Any = object()
    assert fetch.mend_plan(client, plan, tmp_path, True).present == proven(CONFIG, SHARD)
    assert asked == [(client, [SHARD, OTHER], tmp_path, True)]


class Bringing:
    """What the two engines are given; a stage of a real reporter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reporter = Reporter("none", -1)
        self.brought: List[Any] = []
        monkeypatch.setattr(fetch, "fetch_with_aria2", self._aria2)
        monkeypatch.setattr(fetch, "Download", self._download)

    def _aria2(self, client: Any, transfers: Any, stage: Any, settings: Any) -> None:
        assert client is self and settings == "settings"
        self.brought.append(("aria2", [one.remote.path for one in transfers], stage))
        stage.skip(1)

    def _download(self, client: Any, transfers: Any, stage: Any, stop: Any, settings: Any) -> Any:
        assert client is self and (stop, settings) == ("stop", "settings")
        self.brought.append(("own", [one.remote.path for one in transfers], stage))
        return SimpleNamespace(run=lambda: stage.skip(7))


@pytest.mark.parametrize("engine", ["own", "aria2"])
def test_large_files_are_for_the_engine_and_all_else_is_ours(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = SMALL_FILE, SMALL_FILE + 1
    first = RemoteFile("s", small, "e", SHA), RemoteFile("l", large, "e", SHA)
    second = RemoteFile("t", 5, "e", SHA), RemoteFile("p", 30, "e", SHA)
    plans = [plan_of(tmp_path, {}, *first), plan_of(tmp_path, proven(second[1]), *second)]
    client: Any = Bringing(monkeypatch)
    came = fetch.fetch_files(client, plans, "stop", "settings", engine)  # type: ignore[arg-type]
    stages = [stage for *_, stage in client.brought]
    names = [(kind, paths) for kind, paths, _ in client.brought]
    if engine == "own":
        assert names == [("own", ["s", "l", "t"])] and came == small + large + 5 - 7
    else:
        assert names == [("aria2", ["l"]), ("own", ["s", "t"])]
        assert came == large - 1 + small + 5 - 7
        assert (stages[0].name, stages[0].total) == ("fetching (aria2)", large)
    own = stages[-1]
    assert own.name == "fetching" and own.skipped == 30 + 7
    assert (own.files, own.finished) == (1, 1)
    assert own.total == sum(file.size for file in (*first, *second)) - (engine == "aria2") * large


def test_nothing_is_begun_where_nothing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client: Any = Bringing(monkeypatch)
    plan = plan_of(tmp_path, proven(CONFIG), CONFIG)
    assert fetch.fetch_files(client, [plan], "stop", "settings", "aria2") == 0  # type: ignore[arg-type]
    assert client.brought == []


def test_what_a_kill_left_of_journals_goes_at_the_end(tmp_path: Path) -> None:
    for left, stays in ((".x.tmp", False), ("x.json", True)):
        folder = tmp_path / PARTIAL_DIR
        folder.mkdir(parents=True, exist_ok=True)
        (folder / left).touch()
        finish_fetch(plan_of(tmp_path, proven(CONFIG), CONFIG))
        assert folder.exists() is stays


def test_a_manifest_without_a_source_is_another() -> None:
    with_source, without = make_manifest("m", [], SOURCE), make_manifest("m", [])
    later = replace(with_source, source=replace(SOURCE, fetched_at="later"))
    assert fetch._equal_but_for_time(with_source, later)
    assert not fetch._equal_but_for_time(with_source, replace(later, name="n"))
    for pair in ((without, with_source), (with_source, without), (without, without)):
        assert not fetch._equal_but_for_time(*pair)
