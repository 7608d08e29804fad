"""sync asks a site over a real sshd what it has, and brings what it lacks, as deltas where it can."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import pytest

from conftest import Program
from hfship.archive.files import archives_in
from hfship.archive.opening import open_archive
from hfship.archive.versions import version_of
from hfship.base.errors import HostError
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import FileEntry, Manifest, Source, make_manifest, read_manifest
from hfship.base.report import Reporter
from hfship.base.settings import ListedModel, ModelsFile, load_settings
from hfship.commands.context import Context
from hfship.commands.parser import parse_words
from hfship.commands.run import main
from hfship.commands.sync import (
    _bring_tool,
    _fetch,
    _is_of_another_base,
    _packed_whole,
    _slug,
)
from hfship.ops.destination import Destination
from hfship.ops.sync_plan import (
    DELTA,
    THERE,
    WHOLE,
    FarStock,
    SyncStep,
    parse_stock,
    plan_image,
    plan_step,
)
from support import archives as a
from support.hub import FaultHub
from test_push import Site, near, site
from test_restore import COMMITS, make_commit

__all__ = ["site"]  # a fixture


# -- pure


def manifest(number: int, *sums: str) -> Manifest:
    entries = [FileEntry(name, 1, name * 64) for name in sums]
    source = Source("http://hub", "org/m", "main", "org/m", COMMITS[number])
    return make_manifest("m", entries, source)


STEPS: List[Tuple[Any, Any, str]] = [
    (manifest(0, "a", "b"), None, WHOLE),
    (manifest(0, "a", "b"), manifest(0, "a", "b"), THERE),
    (manifest(0, "a", "b"), manifest(0, "a"), DELTA),  # --only
    (manifest(1, "a", "c"), manifest(0, "a", "b"), DELTA),
    (manifest(1, "c"), manifest(0, "a"), WHOLE),
]


@pytest.mark.parametrize("case", STEPS)
def test_what_travels(case: Any) -> None:
    ours, there, action = case
    step = plan_step(ours, there)
    assert step.action == action
    assert (step.since is there) == (action == DELTA) or there is None
    assert step.version.id == version_of(ours).id


DIGESTS = ["sha256:" + digit * 64 for digit in "123"]
LAYERS = ["blobs/sha256/" + letter * 64 for letter in "abcd"]
DIFF_IDS = ["sha256:" + letter * 64 for letter in "6789"]


def image(layers: Sequence[str] = LAYERS) -> Manifest:
    """Of an image with four layers."""
    facts = ImageFacts("r/i:1", *DIGESTS, tuple(DIFF_IDS), "linux/amd64")
    names = {*layers, "manifest.json"}
    entries = [FileEntry(name, 1, f"{number:064}") for number, name in enumerate(sorted(names))]
    return replace(make_manifest("i_1", entries), image=facts)


@pytest.mark.parametrize("known", DIGESTS)
def test_an_image_that_docker_there_knows_does_not_travel(known: str) -> None:
    assert plan_image(image(), LAYERS, FarStock(images=frozenset([known]))).action == THERE


# What docker there has of layers, and how many of ours need not travel.
SHARED: List[Tuple[Sequence[Sequence[str]], int]] = [
    ([], 0),
    ([()], 0),  # the containerd store: it takes none without all
    ([DIFF_IDS[1:]], 0),  # not from the first on: docker looks for a layer with all below it
    ([["sha256:x"], DIFF_IDS[:1]], 1),
    ([DIFF_IDS[:3], DIFF_IDS[:1]], 3),
    ([[*DIFF_IDS[:2], "sha256:x", *DIFF_IDS[2:]]], 2),
    ([DIFF_IDS], 4),  # another configuration
]


@pytest.mark.parametrize("chains, count", SHARED)
def test_layers_that_docker_there_has_do_not_travel(
    chains: Sequence[Sequence[str]], count: int
) -> None:
    step = plan_image(image(), LAYERS, FarStock(layers=tuple(map(tuple, chains))))
    assert step.action == (DELTA if count else WHOLE)
    left_out = [entry.path for entry in step.since.files] if step.since else []
    assert left_out == LAYERS[:count]
    assert ("the layers that docker there lacks" in step.text()) == bool(count)


def test_a_layer_that_comes_again_higher_up_travels() -> None:
    """docker reads its file there."""
    layers = [*LAYERS[:3], LAYERS[0]]
    step = plan_image(image(layers), layers, FarStock(layers=(tuple(DIFF_IDS[:2]),)))
    assert step.since and [entry.path for entry in step.since.files] == [LAYERS[1]]


def test_an_image_whose_layers_are_not_known_travels_whole() -> None:
    far = FarStock(layers=(tuple(DIFF_IDS),))
    for layers in ([], LAYERS[:3], [*LAYERS, "x"]):
        assert plan_image(image(), layers, far).action == WHOLE


def row(name: str, state: str, path: str) -> Dict[str, str]:
    return {"name": name, "state": state, "path": path}


def test_what_can_be_built_upon() -> None:
    models = [row("a", "whole", "/d/a"), row("b", "changed", "/d/b"), row("a~1", "kept", "/d/a~1")]
    said = {"models": models, "images": [{"id": "sha256:1"}, {"reference": "old"}]}
    assert parse_stock(json.dumps(said)) == FarStock({"a": "/d/a"}, frozenset(["sha256:1"]))
    rows = [{"digests": ["sha256:2", "sha256:3"], "layers": ["sha256:4"]}]
    stock = parse_stock(json.dumps({**said, "docker_images": rows}))
    assert stock.images == {"sha256:1", "sha256:2", "sha256:3"} and stock.layers == (("sha256:4",),)


@pytest.mark.parametrize("said", ["", "sh: python3: not found", "[]", "{}", '{"models": [1]}'])
def test_what_is_no_list(said: str) -> None:
    with pytest.raises(ValueError):
        parse_stock(said)


# -- with a far side that is played


class Pushed:
    """What a push says."""

    def text(self) -> str:
        return "pushed"

    def json(self) -> Dict[str, Any]:
        return {"pushed": True}


class PlayedSite:
    """A connected side with a model, and a site of which is told what it has."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.models, self.packages = root / "models", root / "packages"
        self.has: Any = None  # the manifest of the model there
        self.pushed: List[Path] = []
        self.told: List[str] = []

    def commit(self, number: int) -> Manifest:
        """The model here is at a commit."""
        shutil.rmtree(self.models, ignore_errors=True)
        found = read_manifest(make_commit(self.models / "m", number))
        assert found
        return found

    def sync(self, *words: str, to: str = "ops@far:/in") -> Tuple[int, List[Dict[str, Any]], str]:
        """(exit code, rows, what was said); the archives that were pushed are in `pushed`."""
        self._capsys.readouterr()
        self.pushed, self.told = [], []
        code = main(["sync", "--json", *words, to])
        said = self._capsys.readouterr()
        return code, json.loads(said.out), said.err


@pytest.fixture
def played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> PlayedSite:
    made = PlayedSite(tmp_path, capsys)
    folders = {"MODELS": made.models, "PACKAGE": made.packages, "SITE_MODELS": tmp_path / "site"}
    for name, folder in folders.items():
        monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))

    def far_stock(*_: Any) -> FarStock:
        return FarStock({"m": "/d/m"} if made.has else {})

    def push(_: Any, files: Sequence[Any], *__: Any) -> Pushed:
        made.pushed += [file.path for file in files if file.path.name.endswith(".zst")]
        return Pushed()

    monkeypatch.setattr(
        "hfship.ops.destination.connected", lambda to, *_: contextlib.nullcontext(to)
    )
    monkeypatch.setattr("hfship.ops.far_side.far_stock", far_stock)
    monkeypatch.setattr("hfship.ops.far_side.far_manifest", lambda *_: made.has)
    monkeypatch.setattr("hfship.ops.push.push", push)
    monkeypatch.setattr("hfship.commands.sync._bring_tool", lambda *_: made.told.append("tool"))
    return made


def test_what_was_packed_whole_is_pushed_again_and_not_packed_again(played: PlayedSite) -> None:
    played.commit(0)
    a.pack(make_commit(played.root / "other/a", 0), played.packages)
    code, (step, pushed), said = played.sync()
    archive = played.packages / "m.tar.zst"
    assert code == 0 and played.pushed == [archive] and played.told == ["tool"]
    assert (step["action"], step["archive"]) == ("whole", str(archive)) and pushed["pushed"]
    assert step["bytes"] == archive.stat().st_size
    assert "next  ssh ops@far 'python3 /in/hfship.pyz unpack --all /in'" in said
    written = archive.stat().st_mtime_ns
    assert played.sync()[0] == 0 and played.pushed == [archive]
    assert archive.stat().st_mtime_ns == written
    # Of another version it is no archive.
    played.commit(1)
    played.sync()
    assert archive.stat().st_mtime_ns != written


def test_a_delta_is_since_what_the_site_has_now(played: PlayedSite) -> None:
    """An earlier sync may have left one there since a version that the site has no longer."""
    first = played.commit(0)
    second = played.commit(1)
    played.commit(2)
    archive = played.packages / "sync" / "ops_far_in" / "m.delta.tar.zst"
    other = make_commit(played.root / "other/a", 1)  # of which a delta lies there, too
    a.pack(other, archive.parent, since=first)
    bases = []
    for has in (first, first, second):
        played.has = has
        code, (step, _), _ = played.sync()
        assert code == 0 and step["action"] == "delta" and played.pushed == [archive]
        _, files = archives_in(archive.parent)
        bases.append((open_archive(files).delta.base, archive.stat().st_mtime_ns))
    assert [base for base, _ in bases] == [COMMITS[0], COMMITS[0], COMMITS[1]]
    assert bases[0] == bases[1], "the same again is there already"
    assert not (played.packages / "m.tar.zst").exists()


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_what_is_there_does_not_travel_and_a_dry_run_changes_nothing(
    words: List[str], played: PlayedSite
) -> None:
    newest = played.commit(1)
    played.has = newest if not words else None
    code, (step,), said = played.sync(*words)
    assert code == 0 and step["action"] == ("whole" if words else "there")
    assert (step["archive"], step["bytes"]) == (None, 0)
    assert not list(played.packages.rglob("*.zst")) and played.pushed == []
    assert "unpack --all" not in said and played.told == ([] if words else ["tool"])


def test_a_folder_without_a_manifest_is_told_before_anything_is_packed(played: PlayedSite) -> None:
    played.commit(0)
    shutil.rmtree(played.models / "m" / ".hfship")
    code, _, said = played.sync("m")
    assert code == 6 and "has no manifest" in said and played.pushed == []


# -- over ssh


class Sites:
    """A connected side with a models file, and a site behind sshd."""

    def __init__(self, pyz: Program, site: Site, root: Path) -> None:
        self.pyz, self.site, self.root = pyz, site, root
        self.far, self.models = root / "far", root / "site"
        self.file = root / "models.toml"
        self.file.write_text(
            f'[defaults]\nsite_models_dir = "{self.models}"\n[[model]]\nrepo = "org/m"\n'
        )

    def sync(self, *words: object, code: int = 0) -> Any:
        key = ["--port", self.site.port, "--identity", self.site.folder / "user"]
        to = f"root@127.0.0.1:{self.far}"
        models = ["--models", self.file]
        return self.pyz("sync", *key, *models, *words, to, code=code, env=near(self.root))

    def rows(self, *words: object) -> List[Dict[str, Any]]:
        found: List[Dict[str, Any]] = json.loads(self.sync("--json", *words).stdout)
        return found

    def commit(self, number: int) -> None:
        """The model here is at a commit."""
        folder = self.pyz.home / "models/m"
        shutil.rmtree(folder, ignore_errors=True)
        make_commit(folder, number)

    def take(self) -> None:
        """What the site does with what came."""
        env = {"HFSHIP_SITE_MODELS_DIR": str(self.models)}
        self.pyz("unpack", "--all", self.far, env=env)


@pytest.fixture
def sites(pyz: Program, site: Site, tmp_path: Path) -> Sites:
    return Sites(pyz, site, tmp_path)


def test_a_site_gets_what_it_lacks_and_nothing_twice(sites: Sites) -> None:
    sites.commit(0)
    first, pushed = sites.rows("--no-fetch")
    assert (first["action"], first["version"]) == ("whole", COMMITS[0])
    assert {file["name"] for file in pushed["files"]} >= {"m.tar.zst", "m.tar.zst.sha256"}
    assert {"hfship.pyz", "models.toml"} <= set(os.listdir(sites.far))
    sites.take()
    assert [row["action"] for row in sites.rows("--no-fetch")] == ["there"]
    # A new version travels as a delta of what the site says that it has.
    sites.commit(1)
    done = sites.sync("--no-fetch", "--dry-run")
    assert "m: commit 0000000 -> 1111111, what is new since" in done.stdout
    assert not (sites.far / "m.delta.tar.zst").exists()
    step, pushed = sites.rows("--no-fetch")
    assert (step["action"], step["version_there"]) == ("delta", COMMITS[0])
    # The same again, before the site has unpacked it: nothing is packed or sent anew.
    _, again = sites.rows("--no-fetch")
    assert again["bytes_sent"] == 0 < pushed["bytes_sent"]
    # And once more for a version that came meanwhile: since what is there, not since that delta.
    sites.commit(2)
    step, _ = sites.rows("--no-fetch")
    assert (step["action"], step["version_there"]) == ("delta", COMMITS[0])
    done = sites.sync("--no-fetch")
    assert f"hfship.pyz unpack --all {sites.far}" in done.stderr
    sites.take()
    assert [row["version_there"] for row in sites.rows("--no-fetch")] == [COMMITS[2]]


def test_a_site_that_cannot_tell_gets_all(sites: Sites) -> None:
    sites.commit(0)
    (sites.models / "m").mkdir(parents=True)
    (sites.models / "m/config.json").write_text("{}")  # a folder without a manifest
    step, _ = sites.rows("--no-fetch")
    assert (step["action"], step["version_there"]) == ("whole", None)


def test_what_the_models_file_lists_is_fetched_first(
    sites: Sites, hub: FaultHub, model: Path
) -> None:
    hub.add(model)
    sites.file.write_text(
        f'[defaults]\nendpoint = "{hub.url}"\nsite_models_dir = "{sites.models}"\n'
        '[[model]]\nrepo = "org/tiny"\n'
    )
    step, _ = sites.rows()
    assert (step["name"], step["action"]) == ("tiny", "whole")
    assert (sites.far / "tiny.tar.zst").exists()


def test_a_medium_cannot_be_asked(sites: Sites) -> None:
    done = sites.pyz("sync", sites.root / "usb/", code=2)
    assert "for a medium: " in done.stderr and "pack --all -o" in done.stderr


# -- which archives are there, and what else is brought


def step_of(action: str, since: Any = None, number: int = 1) -> Any:
    return SyncStep("m", action, version_of(manifest(number)), None, since)


def test_a_delta_of_another_base_is_made_anew(tmp_path: Path) -> None:
    """One that is there without all of its parts, of another model, or whole, says nothing."""
    first, second = (
        read_manifest(make_commit(tmp_path / f"models/{number}/m", number)) for number in (0, 1)
    )
    assert first and second
    assert not _is_of_another_base(tmp_path, step_of(DELTA, first)), "there is none"
    a.pack(tmp_path / "models/1/m", tmp_path / "out", since=first)
    found = [
        _is_of_another_base(tmp_path / "out", step)
        for step in (step_of(DELTA, first), step_of(DELTA, second), step_of(DELTA))
    ]
    assert found == [False, True, True]
    other = replace(step_of(DELTA, second), name="n")
    assert not _is_of_another_base(tmp_path / "out", other)
    a.pack(tmp_path / "models/1/m", tmp_path / "whole")
    assert not _is_of_another_base(tmp_path / "whole", step_of(DELTA, second))


def test_an_archive_that_was_packed_before_is_of_this_version_and_whole(tmp_path: Path) -> None:
    folder = make_commit(tmp_path / "models/m", 2)
    version = version_of(read_manifest(folder))  # type: ignore[arg-type]
    step = replace(step_of(WHOLE), version=version)
    assert _packed_whole(tmp_path, step) is None
    files = a.pack(folder, tmp_path / "out", frame_size=1000, split=4000)
    assert _packed_whole(tmp_path / "out", step) == files
    for other in (
        replace(step, name="n"),
        replace(step, version=replace(version, id="0" * 40)),
        replace(step, version=replace(version, sums=frozenset())),
    ):
        assert _packed_whole(tmp_path / "out", other) is None
    last = sorted(files.paths)[-1]
    content = last.read_bytes()
    last.unlink()
    assert _packed_whole(tmp_path / "out", step) is None
    last.write_bytes(content)
    before = make_commit(tmp_path / "before/m", 1)
    a.pack(folder, tmp_path / "delta", since=read_manifest(before))
    assert _packed_whole(tmp_path / "delta", step) is None, "a delta is not whole"


@pytest.mark.parametrize(
    "to, slug",
    [
        ("ops@far:/in", "ops_far_in"),
        ("far:/a b/../c", "far_a_b_.._c"),
        ("far:in.d", "far_in.d"),
        ("f:/", "f"),
    ],
)
def test_each_site_has_a_folder_for_its_deltas(to: str, slug: str) -> None:
    host, _, folder = to.partition(":")
    assert _slug(Destination(host, folder)) == slug


@pytest.mark.parametrize("suffix, names", [("toml", True), ("json", False), ("", False)])
def test_the_program_and_the_models_file_are_brought_first(
    suffix: str, names: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: List[Any] = []
    monkeypatch.setattr("hfship.ops.push.push", lambda *given: pushed.append(given))
    args, given = parse_words(["sync", "far:/in", "--bwlimit", "2M"])
    settings = load_settings({"HFSHIP_PACKAGE_DIR": str(tmp_path / "out"), "HOME": str(tmp_path)})
    file: Any = None
    if suffix:
        path = tmp_path / f"site.{suffix}"
        path.write_text("[defaults]\n")
        file = ModelsFile(path, {}, (), ListedModel(""))
    reporter = Reporter("none", -1)
    _bring_tool(Destination("far", "/in"), Context(args, settings, reporter, given, file))
    [(to, files, jobs, limit, told)] = pushed
    assert (str(to), jobs, limit, told) == ("far:/in", 1, 2_000_000, reporter)
    found = {one.name for one in files} - {"hfship.pyz"}
    assert found == {"READ-ME-FIRST.txt"} | ({"models.toml"} if names else set())
    if names:
        assert (tmp_path / "out/models.toml").read_text() == "[defaults]\n"


# -- the words of other commands


@pytest.mark.parametrize(
    "words, fetched",
    [
        (["far:/in"], ["fetch", "--models", "FILE"]),
        (["m", "far:/in", "--json"], ["fetch", "--models", "FILE", "m"]),
        (["far:/in", "--no-fetch"], None),
        (["far:/in", "--dry-run"], None),
    ],
)
def test_what_the_file_lists_is_fetched_with_the_words_of_fetch(
    words: List[str], fetched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: List[Any] = []

    def run_models(command: Any, context: Context) -> int:
        ran.append((command.name, context.args))
        return 3

    monkeypatch.setattr("hfship.commands.sync.run_models", run_models)
    args, given = parse_words(["sync", *words])
    file: Any = ModelsFile(tmp_path / "m.toml", {}, (), ListedModel(""))
    context = Context(args, load_settings({"HOME": "/"}), Reporter("none", -1), given, file)
    assert _fetch(context) == (3 if fetched else 0)
    assert _fetch(replace(context, file=None)) == 0
    if fetched is None:
        assert ran == []
        return
    [(name, asked)] = ran
    expected, _ = parse_words([word.replace("FILE", str(file.path)) for word in fetched])
    expected.json = "--json" in words
    assert name == "fetch" and asked == expected


@pytest.mark.parametrize("words", [["./disk/"], ["m", "./disk/"]])
def test_a_folder_of_this_machine_cannot_be_asked(words: List[str], played: PlayedSite) -> None:
    *names, to = words
    played._capsys.readouterr()
    code = main(["sync", *words])
    said = played._capsys.readouterr().err
    packs = f"hfship pack {' '.join(names) or '--all'} -o {to}"
    assert code == 2 and f"for a medium: {packs}" in said and played.told == []


def test_what_is_signed_is_packed_with_the_key(
    played: PlayedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    played.commit(0)
    packed: List[Any] = []

    def pack(folder: Path, targets: Any, options: Any, run: Any) -> Any:
        packed.append((folder, targets, options, run.args))
        raise HostError("no openssl")

    monkeypatch.setattr("hfship.commands.sync.pack_folder", pack)
    key = played.root / "key.pem"
    for words in ([], ["m"]):
        code, _, said = played.sync("--sign", str(key), *words)
        assert code == 9 and "no openssl" in said
    first, second = packed
    assert first[:2] == (played.models / "m", [played.packages]) == second[:2]
    assert str(first[3].sign) == str(key) == str(second[3].sign)
    assert first[3].all and not second[3].all and second[3].models == ["m"]
    assert not first[2].force and first[2].since is None
