# SPDX-License-Identifier: Apache-2.0
"""`fetch docker://...`: what is planned, brought and noted of images, and of models that lie in a
registry; test_registry.py has servers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.report import Reporter
from hfship.base.values import replace
from hfship.commands import fetch_image
from hfship.commands.fetch_image import FetchedImage, image_request
from hfship.commands.parser import parse_words
from hfship.commands.run import guarded, run_line
from hfship.hub.registry_protocol import parse_reference
from support import archives as a


class ImagePlan(SimpleNamespace):
    """Stands for hub.image.ImagePlan."""


class LayeredModel(SimpleNamespace):
    """Stands for hub.image.LayeredModel."""


class Result:
    """What a fetch came to."""

    def __init__(self, name: str) -> None:
        self.name = name

    def text(self) -> str:
        return self.name

    def json(self) -> Dict[str, Any]:
        return {"name": self.name}


class Registry:
    """A registry that has what `kind` says, and what became of it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.kind = "image"
        self.transfers: List[str] = ["layer"]
        self.did: List[Any] = []
        for name in ("MODELS", "PACKAGE", "LOG", "DEPLOY"):
            monkeypatch.setenv(f"HFSHIP_{name}_DIR", str(root / name.lower()))
        monkeypatch.setenv("HOME", str(root))
        facts = SimpleNamespace(
            name="org/app:1",
            reference="r.example/org/app:1",
            digest="sha256:" + "0" * 64,
            platform="linux/amd64",
            json=lambda: {"platform": "linux/amd64"},
        )
        self.image = SimpleNamespace(facts=facts, layers=["l1", "l2"])
        self.manifest = a.make_model(root / "made", {"w": b"12345"})
        at = "hfship.hub.image"
        monkeypatch.setattr(f"{at}.ImagePlan", ImagePlan)
        monkeypatch.setattr(f"{at}.LayeredModel", LayeredModel)
        monkeypatch.setattr(f"{at}.plan_image", self.plan)
        monkeypatch.setattr(f"{at}.write_known", self.write_known)
        monkeypatch.setattr(f"{at}.finish_image", self.finish)
        layers = "hfship.commands.fetch_layers"
        monkeypatch.setattr(f"{layers}.fetch_layers", self.layers)
        monkeypatch.setattr(f"{layers}.layers_plan", lambda _, folder: ("layers", folder.name))
        monkeypatch.setattr(fetch_image, "registry_client", self.client)
        monkeypatch.setattr(fetch_image, "bring", self.bring)
        monkeypatch.setattr(fetch_image, "finish_model", lambda *_: Result("model"))
        monkeypatch.setattr(fetch_image, "note_image", lambda *_: self.did.append("noted"))
        monkeypatch.setattr(
            fetch_image, "show_fetch_plans", lambda plans, _: self.did.append(plans)
        )

    def client(self, reference: Any, _: Any, stop: Any, connections: int) -> str:
        assert not stop.is_set()
        return f"{reference.name} by {connections}"

    def plan(
        self, client: str, request: Any, folder: Path, locks: Any, _: Any, dry_run: bool
    ) -> Any:
        self.did.append((client, request.name, str(folder.relative_to(self.root)), dry_run))
        locks.callback(lambda: self.did.append("unlocked"))
        files = SimpleNamespace(folder=folder, transfers=self.transfers, what="files")
        if self.kind == "image":
            return ImagePlan(files=files, moved="sha256:" + "1" * 64, image=self.image)
        return LayeredModel() if self.kind == "layers" else files

    def write_known(self, plan: Any) -> Any:
        self.did.append("known")
        return plan

    def bring(self, client: str, plan: Any, root: Path, _: Any, __: Any) -> None:
        self.did.append(("bring", plan.what, root.name))

    def finish(self, _: Any) -> Any:
        return self.manifest

    def layers(self, client: str, _: Any, folder: Path, __: Any, ___: Any) -> Result:
        self.did.append(("layers", client, folder.name))
        return Result("layered")

    def run(self, *words: str) -> Tuple[int, str, List[str]]:
        out = io.StringIO()
        reporter = Reporter("none", 0, out, io.StringIO(), as_json="--json" in words)
        code, _ = guarded(reporter, lambda: run_line(["fetch", *words], reporter))
        return code, out.getvalue(), list(reporter.run.next_words)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(tmp_path, monkeypatch)


APP = "docker://r.example/org/app:1"


def test_an_image_is_planned_brought_and_noted(registry: Registry) -> None:
    code, out, step = registry.run(APP, "-j", "3", "--json")
    assert code == 0
    (client, *planned), *others = registry.did
    assert client.startswith("r.example/org/app:1 by ") and int(client.split()[-1]) >= 3
    assert planned == ["app_1", "models/app_1", False]
    assert others == ["known", ("bring", "files", "models"), "noted", "unlocked"]
    [row] = json.loads(out)
    assert (row["name"], row["kind"], row["fetched_files"]) == ("made", "image", 1)
    assert (row["commit"], row["image"]) == ("0" * 64, {"platform": "linux/amd64"})
    assert step == ["hfship", "pack", str(registry.root / "models/app_1")]


def test_what_is_there_is_not_noted_again_and_verify_makes_nothing_known(
    registry: Registry,
) -> None:
    registry.transfers = []
    _, out, _ = registry.run(APP)
    assert "noted" not in registry.did and "verified earlier, nothing to fetch" in out
    registry.did = []
    _, out, _ = registry.run(APP, "--verify")
    assert "known" not in registry.did and "every layer verified" in out


def test_a_model_of_the_artifact_is_finished_as_one_of_the_hub(registry: Registry) -> None:
    registry.kind = "model"
    code, out, step = registry.run(APP, "-o", str(registry.root / "out"))
    assert (code, out) == (0, "model\n") and step[1] == "pack"
    assert registry.did[1:] == [("bring", "files", "out"), "unlocked"]


def test_a_model_of_layers_is_restored_without_the_lock_of_its_name(registry: Registry) -> None:
    registry.kind = "layers"
    code, out, _ = registry.run(APP, "--name", "x")
    assert (code, out) == (0, "layered\n")
    [planned, unlocked, (what, _, name)] = registry.did
    assert planned[1:3] == ("x", "models/x") and (unlocked, what, name) == (
        "unlocked",
        "layers",
        "x",
    )


@pytest.mark.parametrize(
    "kind, plan", [("layers", ("layers", "app_1")), ("model", "files"), ("image", "files")]
)
def test_a_dry_run_shows_the_plan_of_each(kind: str, plan: Any, registry: Registry) -> None:
    registry.kind = kind
    assert registry.run(APP, "--dry-run")[0] == 0
    planned, unlocked, [shown] = registry.did
    assert planned == ("r.example/org/app:1 by 1", "app_1", "models/app_1", True)
    assert unlocked == "unlocked" and getattr(shown, "what", shown) == plan


def test_several_are_fetched_one_after_another(registry: Registry) -> None:
    code, out, _ = registry.run(APP, "docker://r.example/org/app:2", "--json")
    assert code == 0 and len(json.loads(out)) == 2
    names = [did[1] for did in registry.did if len(did) == 4]
    assert names == ["app_1", "app_2"]


@pytest.mark.parametrize(
    "words",
    [
        [APP, "docker://other.example/x/app:1"],
        [APP, "docker://r.example/org/app:2", "--name", "x"],
        [APP, "--name", "../x"],
        [APP, "--revision", "v1"],
        ["docker://"],
    ],
)
def test_what_would_go_wrong_is_refused_before_anybody_is_asked(
    words: List[str], registry: Registry
) -> None:
    assert registry.run(*words)[0] != 0 and registry.did == []


@pytest.mark.parametrize(
    "words, platform, name, rehash",
    [
        ([], "linux/here", "app_1", False),
        (["--platform", "linux/arm64", "--name", "x"], "linux/arm64", "x", False),
        (["--verify"], "linux/here", "app_1", True),
        (["--repair"], "linux/here", "app_1", True),
    ],
)
def test_what_is_asked_for_of_an_image(
    words: List[str], platform: str, name: str, rehash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_image, "this_platform", lambda: "linux/here")
    args, _ = parse_words(["fetch", APP, *words])
    request = image_request(parse_reference(APP), args)
    assert (request.platform, request.name, request.rehash) == (platform, name, rehash)
    assert request.reference.name == "r.example/org/app:1"


@pytest.mark.parametrize(
    "fetched, hashed, moved, said",
    [
        (0, False, "", "verified earlier, nothing to fetch"),
        (2, False, "", "every layer verified"),
        (0, True, "", "every layer verified"),
        (0, False, "sha256:" + "1" * 64, "fetch; the tag moved: sha256:111111111111 -> sha256:000000000000"),
    ],
)  # fmt: skip
def test_what_is_said_of_an_image(
    fetched: int, hashed: bool, moved: str, said: str, registry: Registry
) -> None:
    files = SimpleNamespace(folder=Path("/m/app_1"))
    plan: Any = ImagePlan(files=files, image=registry.image)
    done = FetchedImage(plan, registry.manifest, fetched, moved, hashed)
    text = "/m/app_1: org/app:1 for linux/amd64, 2 layers, 5 B, sha256:000000000000; "
    assert done.text().startswith(text) and done.text().endswith(said)
    assert replace(done, fetched_files=4).json()["fetched_files"] == 4
