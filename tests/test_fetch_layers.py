# SPDX-License-Identifier: Apache-2.0
"""A model in the layers of a registry: what is fetched, what stays, and what is never replaced;
test_model_layers.py has registries."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import UsageError
from hfship.base.manifest import (
    FileEntry,
    Manifest,
    Source,
    make_manifest,
    read_manifest,
    write_manifest,
)
from hfship.base.values import replace
from hfship.commands import fetch_layers

SOURCE = Source("https://r", "r/m", "v1", "r/m", "1" * 40)
FILES = ("config.json", "w.safetensors")


def layer(name: str) -> Any:
    return SimpleNamespace(remote=SimpleNamespace(path=name))


MODEL: Any = SimpleNamespace(
    source=SOURCE,
    layers=(layer("l1"), layer("l2")),
    files=("f1", "f2"),
    reference=SimpleNamespace(url="docker://r/m:v1"),
)


class Site:
    """A registry that has the model, and what was done."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "m"
        self.stage = root / "m.layers~incomplete"
        self.did: List[Any] = []
        self.said: List[Any] = []
        self.context: Any = SimpleNamespace(
            args=SimpleNamespace(repair=False),
            reporter=SimpleNamespace(then=lambda *words: self.said.append(words)),
        )

    def plan(self, client: Any, model: Any, stage: Path, locks: Any) -> str:
        assert (client, model) == ("client", MODEL)
        locks.callback(lambda: self.did.append("given back"))
        stage.mkdir()
        return "plan"

    def bring(self, client: Any, plan: str, folder: Path, stop: Any, context: Any) -> None:
        assert (self.stage / ".hfship").is_dir(), "clean has to know whose it is"
        self.did.append(("bring", client, plan, folder))

    def restore(self, layers: Any, folder: Path, source: Source, accept: Any) -> Manifest:
        self.did.append(("restore", [(one.path, one.file) for one in layers], folder, source))
        admitted: Manifest = accept(folder, self.make())
        return admitted

    def admit(self, work: Path, manifest: Manifest, policy: str, _: Any) -> Manifest:
        self.did.append(("admit", work, policy))
        return manifest

    def note(self, folder: Path, event: str, manifest: Manifest, details: Dict[str, Any]) -> None:
        self.did.append((event, folder, details))

    def make(self, **source: Any) -> Manifest:
        files = [FileEntry(name, 700, "0" * 64) for name in FILES]
        return make_manifest("m", files, replace(SOURCE, **source))

    def have(self, with_files: bool = True, **source: Any) -> None:
        """Have the model here."""
        self.folder.mkdir()
        for name in FILES if with_files else ():
            (self.folder / name).write_bytes(b"x" * 700)
        write_manifest(self.folder, self.make(**source))

    def fetch(self) -> Any:
        return fetch_layers.fetch_layers(
            "client",  # type: ignore[arg-type]
            MODEL,
            self.folder,
            threading.Event(),
            self.context,
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(tmp_path)
    recorder = SimpleNamespace(note_in_folder=made.note)
    layer_of = SimpleNamespace
    patched: Dict[str, Any] = {
        "hfship.archive.layer_tars.Layer": lambda path, file: layer_of(path=path, file=file),
        "hfship.archive.layer_tars.restore_layers": made.restore,
        "hfship.hub.image.plan_layers": made.plan,
        "hfship.commands.fetch_layers.bring": made.bring,
        "hfship.commands.fetch_layers.admit": made.admit,
        "hfship.commands.fetch_layers.site_policy": lambda _: "policy",
        "hfship.commands.fetch_layers.recorder_of": lambda _: recorder,
    }
    for name, fake in patched.items():
        monkeypatch.setattr(name, fake)
    return made


def test_layers_are_brought_proven_noted_and_gone(site: Site) -> None:
    result = site.fetch()
    bring, restore, admit, (event, folder, details), last = site.did
    assert bring == ("bring", "client", "plan", site.root)
    layers = [(site.stage / "l1", "f1"), (site.stage / "l2", "f2")]
    assert restore == ("restore", layers, site.folder, SOURCE)
    assert admit == ("admit", site.folder, "policy")
    assert (event, folder, last) == ("fetched", site.folder, "given back")
    assert {name: details[name] for name in ("endpoint", "repo", "commit", "files")} == {
        "endpoint": "https://r",
        "repo": "r/m",
        "commit": "1" * 40,
        "files": 2,
    }
    assert "SHA-256" in details["proof"] and not site.stage.exists()
    assert site.said == [("pack", site.folder)]
    assert (result.name, result.repo, result.commit) == ("m", "r/m", "1" * 40)
    assert (result.files, result.size, result.fetched_files) == (2, 1400, 2)
    assert result.proof == "every layer verified, and unpacked" and result.manifest == site.make()


def test_what_is_here_stays(site: Site) -> None:
    site.have()
    result = site.fetch()
    assert site.did == [] and result.manifest == read_manifest(site.folder)
    assert (result.files, result.fetched_files) == (2, 0)
    assert result.proof == "verified earlier, nothing to fetch"


@pytest.mark.parametrize("what", ["another commit", "repaired", "a file is gone"])
def test_what_is_not_the_same_is_fetched(what: str, site: Site) -> None:
    site.context.args.repair = what == "repaired"
    changes = {"commit": "2" * 40} if what == "another commit" else {}
    site.have(with_files=what != "a file is gone", **changes)
    assert site.fetch().fetched_files == 2 and site.did[0][0] == "bring"


@pytest.mark.parametrize("what", ["no manifest", "a file that is not listed", "another", "local"])
def test_something_else_of_that_name_is_never_replaced(what: str, site: Site) -> None:
    if what == "no manifest":
        site.folder.mkdir()
        (site.folder / "x").touch()
    elif what == "local":
        site.folder.mkdir()
        write_manifest(site.folder, make_manifest("m", [FileEntry("x", 1, "0" * 64)]))
    else:
        site.have(commit="2" * 40, **({"repo": "r/n"} if what == "another" else {}))
    if what.startswith("a file"):
        (site.folder / "x").touch()
    with pytest.raises(UsageError, match="holds something else") as caught:
        site.fetch()
    assert caught.value.next_step == "hfship fetch docker://r/m:v1 --name ANOTHER_NAME"
    assert site.did == []


def test_a_plan_is_of_all_layers(tmp_path: Path) -> None:
    remote = [SimpleNamespace(path=name, size=7) for name in ("l1", "l2")]
    model: Any = SimpleNamespace(
        source=SOURCE, layers=[SimpleNamespace(remote=one) for one in remote]
    )
    plan = fetch_layers.layers_plan(model, tmp_path / "m")
    assert (plan.name, plan.folder, plan.present) == ("m", tmp_path / "m", {})
    assert plan.wanted == plan.snapshot.files == tuple(remote)
    assert plan.snapshot.source == SOURCE and plan.hub_notes is False
