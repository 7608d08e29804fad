"""NAME means all archives of a model; what is there never goes back to an older version unasked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import pytest

from conftest import without_times
from hfship.base.errors import NotFoundError
from hfship.base.manifest import FileEntry, Source, make_manifest, read_manifest, write_manifest
from hfship.base.report import Reporter
from hfship.commands.run import main
from support import archives as a

COMMITS = ["0" * 40, "1" * 40, "2" * 40]
CONTENTS: Dict[int, Mapping[str, bytes]] = {
    0: {"config.json": b"{}", "w1": b"one", "w2": b"two"},
    1: {"config.json": b"{}", "w1": b"one", "w2": b"three"},
    2: {"config.json": b"{}", "w1": a.noise(9000), "w2": b"three"},
}


def make_commit(folder: Path, number: int, repo: str = "org/m") -> Path:
    """A model folder at one of the three commits, all of them fetched in the same second: which one
    is newer tell the deltas."""
    folder.mkdir(parents=True)
    entries = []
    for path, content in CONTENTS[number].items():
        (folder / path).write_bytes(content)
        entries.append(FileEntry(path, len(content), hashlib.sha256(content).hexdigest()))
    time = "2026-01-31T12:00:00Z"
    source = Source("http://hub", repo, "main", repo, COMMITS[number], fetched_at=time)
    write_manifest(folder, make_manifest(folder.name, entries, source))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0/: the whole first version; 1/ and 2/: the deltas to the next ones; 3/: the whole last one
    in parts."""
    root = tmp_path_factory.mktemp("packed")
    models = [make_commit(root / f"models/{number}/m", number) for number in range(3)]
    a.pack(models[0], root / "0")
    for number in (1, 2):
        a.pack(models[number], root / str(number), since=read_manifest(models[number - 1]))
    a.pack(models[2], root / "3", frame_size=1000, split=4000)
    return root


class Said(NamedTuple):
    """What a run said."""

    code: int
    out: str
    err: str


class Site:
    """A machine with a transfer folder, a folder of models, and somebody in a folder `here`."""

    def __init__(self, root: Path, packed: Path, capsys: Any) -> None:
        self.transfer, self.models, self.here = root / "transfer", root / "models", root / "here"
        self.here.mkdir()
        self.packages = root / "home/transfer_package"
        self._packed = packed
        self._capsys = capsys

    def put(self, number: int, place: Path, name: str = "") -> None:
        """Bring the files of an archive, under another name if one is given."""
        place.mkdir(parents=True, exist_ok=True)
        for path in (self._packed / str(number)).glob("m.*"):
            known = "m.delta.tar.zst" if number in (1, 2) else "m.tar.zst"
            shutil.copy(path, place / path.name.replace(known, name or known))

    def run(self, *words: object) -> Said:
        """Run a command line."""
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        said = self._capsys.readouterr()
        return Said(code, said.out, without_times(said.err))

    @property
    def commit(self) -> Optional[int]:
        """The commit that is unpacked, each of its files being right."""
        manifest = read_manifest(self.models / "m")
        if manifest is None:
            return None
        assert manifest.source
        number = COMMITS.index(manifest.source.commit)
        assert a.tree(self.models / "m") == CONTENTS[number]
        return number


@pytest.fixture
def site(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Site:
    made = Site(tmp_path, packed, capsys)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HFSHIP_TRANSFER_DIR", str(made.transfer))
    monkeypatch.setenv("HFSHIP_SITE_MODELS_DIR", str(made.models))
    monkeypatch.setenv("HFSHIP_PACKAGE_DIR", str(made.packages))
    monkeypatch.chdir(made.here)
    return made


def test_a_delta_beside_its_base_is_applied_and_stays(site: Site) -> None:
    site.put(0, site.transfer)
    said = site.run("unpack", "m")
    assert site.commit == 0 and "commit 0000000" in said.out
    site.put(1, site.transfer)
    said = site.run("unpack", "m")
    assert (said.code, site.commit) == (0, 1) and "commit 0000000 -> 1111111" in said.out
    assert f"m: commit 0000000 in {site.transfer}/m.tar.zst\n" in said.err
    delta = f"{site.transfer}/m.delta.tar.zst"
    assert f"m: commit 1111111 in {delta}, a delta since 0000000\n" in said.err
    assert f"m: taken: {delta}\n" in said.err
    said = site.run("unpack", "m")
    assert (said.code, site.commit) == (0, 1) and "were there already" in said.out


def test_chains_are_applied_in_their_order_wherever_they_lie(site: Site) -> None:
    site.put(0, site.here)
    site.put(2, site.transfer)
    site.put(1, site.packages)
    said = site.run("unpack", "m", "--json")
    (row,) = json.loads(said.out)
    assert (site.commit, row["commit"], row["commit_before"]) == (2, COMMITS[2], None)
    taken = ("m.tar.zst", f"{site.packages}/m.delta.tar.zst", f"{site.transfer}/m.delta.tar.zst")
    assert f"m: taken: {', then '.join(taken)}\n" in said.err


@pytest.mark.parametrize("second", ["m.delta.2.tar.zst", "m.delta (1).tar.zst", "m.delta2.tar.zst"])
def test_two_deltas_in_one_folder_are_told_apart(second: str, site: Site) -> None:
    site.put(0, site.transfer)
    site.put(1, site.transfer)
    site.put(2, site.transfer, second)
    assert site.run("unpack", site.transfer).code == 0 and site.commit == 2


def test_parts_beside_a_whole_file_of_that_name_are_seen(site: Site) -> None:
    site.put(0, site.transfer)
    site.put(3, site.transfer)
    said = site.run("unpack", "m", "--name", "n")
    assert said.code == 0, said.err
    assert f"m: commit 2222222 in {site.transfer}/m.tar.zst.0001 in 3 parts\n" in said.err


def test_a_delta_alone_is_found_by_the_name(site: Site) -> None:
    site.put(0, site.transfer)
    site.run("unpack", "m", "--consume")
    assert site.commit == 0 and not list(site.transfer.glob("*.zst"))
    site.put(1, site.transfer)
    said = site.run("unpack", "m")
    assert site.commit == 1 and "commit 0000000 -> 1111111" in said.out
    assert site.run("verify", "m").code == 0


def test_verify_says_what_unpack_would_take(site: Site) -> None:
    site.put(0, site.transfer)
    site.put(1, site.transfer)
    site.put(2, site.packages)
    said = site.run("verify", "m")
    assert said.code == 0 and said.out.count("ok: ") == 2
    assert "model m at commit 1111111" in said.out
    names = (
        "transfer/m.tar.zst",
        "transfer/m.delta.tar.zst",
        "home/transfer_package/m.delta.tar.zst",
    )
    root = site.transfer.parent
    places = [f"{root}/{name}" for name in names]
    assert f"m: commit 2222222 in {places[2]}, a delta since 1111111\n" in said.err
    assert f"m: unpack takes: {', then '.join(places)}\n" in said.err
    assert f"m: also {places[2]}, not read: verify it by its path\n" in said.err


def test_nothing_goes_back_unless_asked(site: Site) -> None:
    for number in (0, 1):
        site.put(number, site.transfer)
    site.run("unpack", "m")
    old = site.transfer / "m.tar.zst"
    said = site.run("unpack", old)
    assert (said.code, site.commit) == (2, 1)
    assert "would go back from commit 1111111 to 0000000" in said.err
    step = f"hfship unpack --allow-older {old} -o {site.models}"
    assert step in said.err
    assert "next  hfship" in said.err and f"{step}     # goes back\n" in said.err
    said = site.run(*step.split()[1:])
    assert (said.code, site.commit) == (0, 0) and "commit 1111111 -> 0000000" in said.out


def test_a_named_delta_takes_what_lies_beside_it(site: Site) -> None:
    site.put(0, site.transfer)
    site.put(1, site.transfer)
    said = site.run("unpack", site.transfer / "m.delta.tar.zst")
    assert (said.code, site.commit) == (0, 1)


def test_a_delta_without_base_names_the_version_that_it_needs(site: Site) -> None:
    site.put(0, site.transfer)
    site.put(2, site.transfer)
    said = site.run("unpack", "m")
    assert (said.code, site.commit) == (5, None)
    assert "is a delta: 2 files must come from an older version on site" in said.err
    assert "carries commit 2222222, packed since version 1111111" in said.err
    step = f"hfship unpack {site.transfer}/m.tar.zst"
    assert f"{step}     # commit 0000000, which is older" in said.err
    assert site.run(*step.split()[1:]).code == 0 and site.commit == 0
    # ... with --base, or after the delta between them
    make_commit(site.here / "base", 1)
    assert site.run("unpack", "m", "--base", site.here / "base").code == 0 and site.commit == 2


def test_the_current_folder_comes_first_and_other_places_are_named(site: Site) -> None:
    site.put(3, site.here)
    site.put(3, site.transfer)
    said = site.run("unpack", "m")
    assert site.commit == 2 and "m: taken: m.tar.zst\n" in said.err
    assert f"m: commit 2222222 in {site.transfer}/m.tar.zst in 3 parts\n" in said.err
    # ... unless a part of it is missing: without the first one nobody knows which version it is
    (site.here / "m.tar.zst.0002").unlink()
    said = site.run("unpack", "m")
    assert said.code == 0 and f"m: taken: {site.transfer}/m.tar.zst\n" in said.err
    (site.here / "m.tar.zst.0001").unlink()
    said = site.run("unpack", "m")
    step = f"hfship unpack {site.transfer}/m.tar.zst"
    assert said.code == 6 and f"or take another one:\n        {step}\n" in said.err
    assert site.run(*step.split()[1:]).code == 0


def test_a_folder_of_that_name_here_does_not_hide_the_archives(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put(0, site.transfer)
    site.run("unpack", "m")
    site.put(1, site.transfer)
    monkeypatch.chdir(site.models)
    assert site.run("unpack", "m").code == 0 and site.commit == 1


def test_archives_of_two_models_of_one_name_are_not_mixed(site: Site) -> None:
    site.put(0, site.transfer)
    other = make_commit(site.here / "other/m", 1, "another/m")
    a.pack(other, site.packages)
    said = site.run("unpack", "m")
    assert (said.code, site.commit) == (2, None)
    assert f"{site.transfer}/m.tar.zst, {site.packages}/m.tar.zst" in said.err


def test_a_list_goes_on_after_one_that_fails(site: Site) -> None:
    site.put(0, site.transfer)
    a.make_model(site.here / "n", {"w": b"w"})
    files = a.pack(site.here / "n", site.packages)
    os.truncate(files.path, 100)
    said = site.run("unpack", files.path, "m", "--progress", "plain")
    assert (said.code, site.commit) == (6, 0)
    assert "unpack: 2 models, 1 ok, 1 failed\n" in said.err
    said = site.run("unpack", files.path, "m", "--json")
    rows: List[Dict[str, Any]] = json.loads(said.out)
    assert [row["name"] for row in rows] == ["n", "m"] and rows[0]["exit_code"] == 6


@pytest.mark.parametrize(
    "text, named",
    [
        ("3 files are left out", "m: 3 files are left out"),
        ("/models/m: 3 files", "/models/m: 3 files"),
        ("m.tar.zst is damaged", "m.tar.zst is damaged"),
        ("them", "m: them"),
        ("mm and m-2", "m: mm and m-2"),
    ],
)
def test_a_line_that_names_its_model_is_left_alone(
    text: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter("plain")
    with reporter.about("m", 2, 3):
        reporter.info(text)
        reporter.warn(text)
        reporter.error(NotFoundError(text))
        with reporter.stage("pack", 100) as stage:
            assert stage.line().startswith("pack 2/3 m: ")
    said = without_times(capsys.readouterr().err)
    assert said == f"{named}\nwarning: {named}\nhfship: {named}\n"
    reporter.info(text)
    assert without_times(capsys.readouterr().err) == f"{text}\n"


def test_a_model_without_some_of_its_shards_is_called_partial(site: Site) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {str(number): shard for number, shard in enumerate(shards)}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    for shard in shards:
        header = json.dumps({"__metadata__": {"of": shard}}).encode()
        files[shard] = len(header).to_bytes(8, "little") + header
    a.make_model(site.here / "n", files)
    a.pack(site.here / "n", site.packages)
    said = site.run("unpack", "n", "--only", "*.json", "--only", "*1-of*")
    assert said.code == 0 and "partial: 1 file of weights" in said.out and shards[1] in said.out
    assert "partial: 1 file of weights" in site.run("verify", site.models / "n").out
    manifest = read_manifest(site.models / "n")
    assert manifest and manifest.partial == (shards[1],)
    said = site.run("unpack", "n")
    assert said.code == 0 and "partial" not in said.out


def test_push_takes_one_archive_of_a_name_and_names_the_others(site: Site) -> None:
    for number, place in ((0, site.packages), (1, site.packages), (3, site.transfer)):
        site.put(number, place)
    said = site.run("push", "m", f"{site.here}/medium")
    assert said.code == 0, said.err
    others = f"{site.packages}/m.delta.tar.zst, {site.transfer}/m.tar.zst"
    assert f"m: {site.packages}/m.tar.zst, not {others}: name these" in said.err
    assert not list((site.here / "medium").glob("m.delta*"))


@pytest.mark.parametrize(
    "there, base",
    [
        ([0, 1], 1),  # not the first that is found
        ([0, 1, 2], 1),  # what the model has itself tells of no change
        ([3, 2], 2),  # unless nothing else is there
    ],
)
def test_since_a_name_means_its_newest_other_version(
    there: List[int], base: int, site: Site
) -> None:
    places = [site.transfer, site.here, site.packages, site.transfer]
    for number in there:
        site.put(number, places[number])
    model = make_commit(site.here / "now/m", 2)
    for _ in range(2):  # the same command can run again
        said = site.run("pack", model, "--since", "m", "-o", site.here / "out")
        assert said.code == 0, said
        assert f"m: what changed since commit {str(base) * 7} in " in said.err
