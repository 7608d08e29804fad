"""A site takes what is new on a medium, keeps what was in place, and goes back to it and forward again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import test_serve
from conftest import Program
from hfship.archive.files import ArchiveFiles
from hfship.archive.kept import KeptVersion, kept_versions, to_drop, version_to_place
from hfship.archive.update import BRING, HERE, OLDER, Here, Offer, plan_update
from hfship.archive.versions import FoundArchive, Version
from hfship.archive.work_folder import locked_tree, work_folder_of
from hfship.base.content import content_files, is_work_folder, kept_name
from hfship.base.errors import NotFoundError
from hfship.base.manifest import FileEntry, Source, make_manifest, write_manifest
from hfship.base.report import Reporter
from hfship.serve.deployments import write_deployment
from hfship.serve.terms import Plan
from support import archives as a
from test_restore import COMMITS, CONTENTS, Site, packed, site

__all__ = ["packed", "site"]  # fixtures

IDS = [digit * 40 for digit in "abcd"]


# -- which version: pure


def version(number: int, files: str = "", time: str = "") -> Version:
    return Version(IDS[number], "org/m", IDS[number], time, frozenset(files))


def kept(number: int, until: str, chosen: str = "") -> KeptVersion:
    return KeptVersion(Path(f"m~{IDS[number][:12]}"), version(number), until, chosen)


# (kept, oldest first; present; rolled back from; wanted; what becomes NAME, None: it is that already)
PLACES: List[Tuple[Sequence[KeptVersion], Optional[int], str, str, Optional[int]]] = [
    ([kept(0, "1")], 1, "", "", 0),
    ([kept(0, "1")], 1, "", "newest", None),
    ([kept(0, "1"), kept(1, "2")], 2, "", "", 1),
    ([kept(0, "1"), kept(1, "2")], 2, "", "aaaa", 0),
    ([kept(0, "1"), kept(1, "2")], 2, "", "cccc", None),
    ([kept(2, "3")], 1, IDS[2], "", None),  # rolled back: the same command changes nothing
    ([kept(2, "3")], 1, IDS[2], "newest", 2),
    ([kept(0, "1"), kept(1, "2")], 2, IDS[1], "newest", 1),
    ([kept(1, "1"), kept(0, "2")], 2, "", "", 0),  # C came over A, to which one had gone back
    # Killed between the two renames: of a rollback, of the way forward, of unpack.
    ([kept(0, "1", chosen=IDS[1]), kept(1, "2")], None, "", "", 0),
    ([kept(0, "1", chosen=IDS[1]), kept(1, "2")], None, "", "newest", 1),
    ([kept(1, "1"), kept(0, "2", chosen=IDS[1])], None, "", "newest", 1),
    ([kept(1, "1"), kept(0, "2", chosen=IDS[1])], None, "", "", 0),
    ([kept(0, "1", chosen=IDS[3]), kept(1, "2")], None, "", "", 1),
    ([kept(0, "1")], None, "", "newest", 0),
]


@pytest.mark.parametrize("case", PLACES)
def test_which_version_takes_the_place(case: Any) -> None:
    versions, present, rolled_back, wanted, expected = case
    there = None if present is None else version(present)
    chosen = version_to_place(versions, there, rolled_back, wanted)
    assert (chosen and chosen.version.id) == (None if expected is None else IDS[expected])


@pytest.mark.parametrize("versions", [[], [kept(1, "1")]])
@pytest.mark.parametrize("wanted", ["", "dddd"])
def test_nothing_to_go_back_to(versions: Sequence[KeptVersion], wanted: str) -> None:
    with pytest.raises(NotFoundError, match="kept"):
        version_to_place(versions, version(1), "", wanted)


@given(st.permutations(range(4)), st.integers(0, 5), st.integers(0, 3))
def test_the_newest_of_the_others_stay(order: List[int], keep: int, present: int) -> None:
    versions = [kept(number, str(at)) for at, number in enumerate(order)]
    gone = to_drop(versions, IDS[present], keep)
    stays = [one for one in versions if one not in gone]
    others = [one for one in versions if one.version.id != IDS[present]]
    assert stays == others[len(others) - min(keep, len(others)) :]


def test_a_kept_version_is_no_model_of_its_own() -> None:
    assert is_work_folder(kept_name("m", IDS[0]))
    assert not is_work_folder("m-abcdefabcdef")


# -- what a medium brings: pure


def archive(name: str, carried: Version, base: str = "", needs: str = "") -> FoundArchive:
    files = ArchiveFiles(Path(), f"{name}.tar.zst", {})
    return FoundArchive(files, name, carried, bool(base), base, frozenset(needs))


OLD, NEW = version(0, "xy", "2026-01-01"), version(1, "xz", "2026-02-01")
WHOLE = Offer("m", (archive("m", NEW),))
DELTA = Offer("m", (archive("m", NEW, IDS[0], "x"),))
STEPS = {
    "nothing is here": (WHOLE, Here(), BRING),
    "an older one is here": (WHOLE, Here(OLD, True), BRING),
    "it is here": (WHOLE, Here(NEW, True), HERE),
    "it is here and looks damaged": (WHOLE, Here(NEW, False), BRING),
    "part of it is here": (WHOLE, Here(version(1, "x", "2026-02-01"), True), BRING),
    "a newer one is here": (Offer("m", (archive("m", OLD),)), Here(NEW, True), OLDER),
    "a delta of what is here": (DELTA, Here(OLD, True), BRING),
    "a delta of what is kept": (DELTA, Here(version(2, "q"), True, (OLD,)), BRING),
    "a delta without its base": (DELTA, Here(), BRING),  # who tries says what is missing
    "an archive that cannot be read": (Offer("m"), Here(NEW, True), BRING),
    "an image": (Offer("m", (archive("m", NEW),), is_image=True), Here(), BRING),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_becomes_of_an_offer(name: str) -> None:
    offer, here, action = STEPS[name]
    (step,) = plan_update([offer], {"m": here})
    assert step.action == action
    assert step.text().startswith("m: ")


def test_an_older_version_is_taken_where_that_is_asked_for() -> None:
    (step,) = plan_update([Offer("m", (archive("m", OLD),))], {"m": Here(NEW, True)}, True)
    assert (step.action, step.text()) == (BRING, "m: commit bbbbbbb -> aaaaaaa")


@given(st.permutations(["model", "b-model", "image", "a-delta-image"]))
def test_images_come_first_and_those_that_need_others_later(names: List[str]) -> None:
    made = {
        "model": WHOLE,
        "b-model": Offer("b", (archive("b", NEW),)),
        "image": Offer("image", (archive("image", NEW),), is_image=True),
        "a-delta-image": Offer("a-new", (archive("a-new", NEW, IDS[0]),), is_image=True),
    }
    steps = plan_update([made[name] for name in names], {})
    assert [step.offer.name for step in steps] == ["image", "a-new", "b", "m"]


# -- on disk


def names(folder: Path) -> List[str]:
    return sorted(os.listdir(folder))


def aside(number: int) -> str:
    return kept_name("m", COMMITS[number])


def test_all_that_is_new_is_taken_and_what_was_in_place_is_kept(site: Site) -> None:
    site.put(0, site.transfer)
    assert site.run("unpack", "--all").code == 0
    assert (site.commit, names(site.models)) == (0, ["m"])
    site.put(1, site.transfer)
    said = site.run("unpack", "--all", "--dry-run")
    assert said.out == "m: commit 0000000 -> 1111111\n" and site.commit == 0
    said = site.run("unpack", "--all", site.transfer)
    assert "commit 0000000 -> 1111111" in said.out
    assert (site.commit, names(site.models)) == (1, ["m", aside(0)])
    proven = os.stat(site.models / "m/w1").st_ino
    assert proven == os.stat(site.models / aside(0) / "w1").st_ino, "what is common is one file"
    # The same command again reads no content, and says so.
    said = site.run("unpack", "--all", "--json")
    (row,) = json.loads(said.out)
    assert (row["state"], row["commit"]) == ("already there", COMMITS[1])
    assert "proving" not in said.err
    site.put(2, site.transfer)
    assert site.run("unpack", "--all").code == 0
    assert names(site.models) == ["m", aside(1)], "one is kept"
    site.run("unpack", "--all", "--keep", "0")
    assert (site.commit, names(site.models)) == (2, ["m"])


def test_plain_unpack_keeps_what_it_is_told_to(site: Site) -> None:
    for number, keep in ((0, "2"), (1, "2"), (2, "2")):
        site.put(number, site.transfer)
        site.run("unpack", "m", "--keep", keep)
    assert names(site.models) == ["m", aside(0), aside(1)]
    rows = json.loads(site.run("list", "models", "--json").out)["models"]
    states = {row["name"]: row["state"] for row in rows}
    assert states == {"m": "whole", aside(0): "kept", aside(1): "kept"}


def kept_versions_of(site: Site) -> None:
    """Three versions, of which two are kept."""
    for number in range(3):
        site.put(number, site.transfer)
        site.run("unpack", "m", "--keep", "2")


def test_clean_removes_kept_versions_but_the_last(site: Site) -> None:
    kept_versions_of(site)
    shown = json.loads(site.run("clean", "--kept", "--dry-run", "--json").out)
    assert [row["where"] for row in shown["leftovers"]] == [
        str(site.models / aside(number)) for number in (0, 1)
    ]
    assert "bytes" in shown and names(site.models) == ["m", aside(0), aside(1)]
    free = sum(
        path.stat().st_size
        for path in (site.models / aside(0)).rglob("*")
        if path.is_file() and path.stat().st_nlink == 1
    )
    assert shown["leftovers"][0]["bytes"] == free, "what others have, too, stays"
    said = site.run("clean", "--kept", "1", "--yes").out
    assert f"commit {COMMITS[0][:7]}" in said and "removed 1 version" in said
    assert names(site.models) == ["m", aside(1)]
    assert site.run("clean", "--kept", "1", "--yes").out == "nothing to clean\n"
    assert "removed 1 version" in site.run("clean", "--kept", "--yes").out
    assert (site.commit, names(site.models)) == (2, ["m"])


def test_clean_leaves_a_version_with_which_a_container_still_runs(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept_versions_of(site)
    plan = Plan(name="m", model_dir=str(site.models / "m"), model_version=COMMITS[0][:12])
    write_deployment(tmp_path / "deploy/m", plan, Reporter())
    monkeypatch.setenv("HFSHIP_DEPLOY_DIR", str(tmp_path / "deploy"))
    done = site.run("clean", "--kept", "--yes")
    assert f"kept: {site.models / aside(0)}: the deployment m runs with it" in done.err
    assert names(site.models) == ["m", aside(0)]


def test_clean_removes_no_kept_version_while_its_model_is_worked_on(site: Site) -> None:
    kept_versions_of(site)
    with locked_tree(work_folder_of(site.models / "m")):
        assert site.run("clean", "--kept", "--yes").code == 3
    assert names(site.models) == ["m", aside(0), aside(1)]


# What does not go together, and what is said of it.
TOGETHER = [
    ("--kept", "--older-than", "1d"),
    ("--kept", "--cache"),
    ("--kept", "--images"),
    ("--images", "--older-than", "1d"),
    ("--images", "folders", "dir"),
    ("--jobs", "--kept"),
    ("--jobs", "--cache", "--old-revisions"),
]


@pytest.mark.parametrize("words", TOGETHER, ids=" ".join)
def test_what_clean_would_pass_over_is_refused(words: Sequence[str], site: Site) -> None:
    done = site.run("clean", *words, "--yes")
    assert done.code == 2 and "do not go together" in done.err


def go(site: Site, *words: str) -> str:
    """Go back without serving, which needs docker."""
    from hfship.archive.kept import go_back

    wanted = words[0] if words else ""
    went = go_back(site.models / "m", wanted)
    return went.now.id


def test_back_and_forward(site: Site) -> None:
    for number in (0, 1):
        site.put(number, site.transfer)
        site.run("unpack", "--all")
    for words, commit in (
        ((), 0),
        ((), 0),
        (("newest",), 1),
        (("newest",), 1),
        ((COMMITS[0][:7],), 0),
    ):
        assert go(site, *words) == COMMITS[commit]
        assert site.commit == commit
        assert names(site.models) == ["m", aside(1 - commit)]
    # A delta of the version that is kept, not of the one that is in place.
    site.put(2, site.transfer)
    assert site.run("unpack", "--all").code == 0
    assert site.commit == 2


def test_a_full_disk_names_the_version_that_could_go(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (0, 1):
        site.put(number, site.transfer)
        site.run("unpack", "--all")
    site.put(2, site.transfer)
    monkeypatch.setattr("hfship.base.files.free_bytes", lambda _: 1000)
    said = site.run("unpack", "--all")
    kept = site.models / aside(0)
    assert said.code == 7 and f"rm -r '{kept}'" in said.err
    assert site.commit == 1 and aside(0) in names(site.models)


def test_what_hfship_has_not_made_is_left_alone(site: Site) -> None:
    site.put(0, site.transfer)
    site.run("unpack", "--all")
    stranger = site.models / aside(0)
    shutil.copytree(site.models / "m", stranger)
    assert kept_versions(site.models / "m") == []
    site.put(1, site.transfer)
    said = site.run("unpack", "--all")
    assert said.code == 6 and f"{stranger} is in the way" in said.err
    assert stranger.is_dir() and site.commit == 0


def test_one_that_cannot_be_taken_keeps_no_other_from_it(site: Site) -> None:
    site.put(0, site.transfer)
    (site.transfer / "a.tar.zst").write_bytes(b"(\xb5/\xfd nothing")
    said = site.run("unpack", "--all")
    assert (said.code, site.commit) == (6, 0)
    assert "a.tar.zst" in said.err and "unpack: 2 models, 1 ok, 1 failed" in said.err


WRONG = [
    (["unpack", "--dry-run", "m"], "--dry-run is for --all"),
    (["unpack", "--all", "--name", "x"], "--name is for one archive"),
    (["unpack", "--all", "--only", "*"], "--only is for one archive"),
    (["unpack", "--all", "--keep", "-1"], "--keep"),
    (["serve", "--rollback", "m"], "name the model before --rollback"),
    (["serve", "m", "--rollback", "--plan"], "--rollback is no plan"),
]


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused(case: Any, site: Site) -> None:
    words, expected = case
    said = site.run(*words)
    assert said.code == 2 and expected in said.err


# -- served


def test_serve_takes_the_new_version_and_goes_back(
    hfship: Program, tmp_path: Path, made_model: Path
) -> None:
    machine = test_serve.Site(hfship, tmp_path, made_model)
    (machine.models / "m").unlink()
    for number in (0, 1):
        model = tmp_path / f"{number}/m"
        shutil.copytree(made_model, model)
        (model / "README.md").write_text(f"version {number}")
        write_commit(model, number)
        a.pack(model, tmp_path / f"medium{number}")
    try:
        said = []
        for number in (0, 1):
            machine("unpack", "--all", tmp_path / f"medium{number}")
            said.append(machine("serve", "m").stderr)
            assert f'"{COMMITS[number][:12]}"' in machine.text("docker-compose.yml")
        assert "version 000000000000 -> 111111111111" in said[1], "docker makes it anew, and why"
        done = machine("serve", "m", "--rollback")
        assert "m: commit 1111111 -> 0000000, which was kept" in done.stderr
        assert f'"{COMMITS[0][:12]}"' in machine.text("docker-compose.yml")
        again = machine("serve", "m", "--rollback")
        assert "m is at commit 0000000, as it was asked for" in again.stderr
        machine("serve", "m", "--rollback", "newest", "--write-only")
        assert (machine.models / "m/README.md").read_text() == "version 1"
    finally:
        machine("stop", "m")
    machine("serve", "none", "--rollback", code=5)


def write_commit(folder: Path, number: int) -> None:
    """The manifest of a model that was fetched at one of the commits."""
    entries = []
    for path, _ in content_files(folder):
        content = (folder / path).read_bytes()
        entries.append(FileEntry(path, len(content), hashlib.sha256(content).hexdigest()))
    time = f"2026-01-0{number + 1}T12:00:00Z"
    source = Source("http://hub", "org/m", "main", "org/m", COMMITS[number], fetched_at=time)
    write_manifest(folder, make_manifest("m", entries, source))


# -- killed at every change


def state(root: Path) -> Dict[str, str]:
    """The commit of each folder of models that is whole."""
    found = {}
    for folder in root.iterdir():
        manifest = folder / ".hfship/manifest.json"
        if manifest.exists():
            commit = json.loads(manifest.read_text())["source"]["commit"]
            number = COMMITS.index(commit)
            for path, content in CONTENTS[number].items():
                assert (folder / path).read_bytes() == content, folder
            found[folder.name] = commit
    return found


CHANGES = ("replace", "rename", "link", "unlink", "mkdir", "rmdir")


def killed(changes: int, work: Callable[[], object]) -> bool:
    """Do it in a process that is killed before it makes one more than so many changes of names;
    whether it was, or came to its end."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status)
    try:
        left = changes

        def counted(change: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **options)

            return call

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        work()
    finally:
        os._exit(0)


def killed_at_every_change(site: Site, work: Callable[[], object], commit: int) -> None:
    """Kill it before each of its changes: at any time a version is whole, and when it is done once
    more all is as it is without a kill."""
    start = site.models.with_name("start")
    shutil.copytree(site.models, start)
    changes, was_killed = 0, True
    while was_killed:
        shutil.rmtree(site.models)
        shutil.copytree(start, site.models)
        was_killed = killed(changes, work)
        assert state(site.models), f"after {changes} changes no version is whole"
        work()
        assert (site.commit, names(site.models)) == (commit, ["m", aside(1 - commit)]), changes
        changes += 1
    assert changes > 5


def test_update_killed_at_every_change(site: Site) -> None:
    site.put(0, site.transfer)
    site.run("unpack", "--all")
    site.put(1, site.transfer)
    killed_at_every_change(site, lambda: site.run("unpack", "--all"), commit=1)


@pytest.mark.parametrize("wanted", ["", "newest"])
def test_rollback_killed_at_every_change(wanted: str, site: Site) -> None:
    for number in (0, 1):
        site.put(number, site.transfer)
        site.run("unpack", "--all")
    if wanted:
        go(site)
    killed_at_every_change(site, lambda: go(site, wanted), commit=1 if wanted else 0)
