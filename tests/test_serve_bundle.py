# SPDX-License-Identifier: Apache-2.0
"""What `serve BUNDLE` and `serve --rollback` do before a model is served; test_bundle.py and
test_update.py have real archives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest

from hfship.base.errors import IntegrityError, UsageError
from hfship.commands import rollback, serve_bundle


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A delivery of an image and a model, and what was done with it."""
    made = SimpleNamespace(did=[], said=[], image="image", refused=None)

    def unpacked_bundle(context: Any, word: str, load: Any, unpack: Any) -> Any:
        load(Path("/d/app.tar.zst"))
        made.did.append(unpack(Path("/d/m.tar.zst")))
        return [(context, word)]

    def models_named(words: List[str], places: List[Any]) -> List[str]:
        assert places == []
        return [f"named {word}" for word in words]

    def open_model(named: str, how: Any, reporter: Any) -> str:
        made.did.append((named, how.folder, how.key, how.policy))
        return "opened"

    def restore_opened(named: str, opened: str, how: Any, reporter: Any) -> Any:
        made.did.append(("restore", named, opened))
        return SimpleNamespace(done=SimpleNamespace(folder=Path("/site/m")))

    def load_image(image: str, how: Any, engine: str, reporter: Any) -> Any:
        made.did.append(("load", image, engine))
        return SimpleNamespace(text=lambda: "vllm:1 was loaded")

    patched: Dict[str, Any] = {
        "require_no_plan": lambda *_: made.refused,
        "site_policy": lambda _: "policy",
        "Restore": lambda folder, key, policy: SimpleNamespace(
            folder=folder, key=key, policy=policy
        ),
        "unpacked_bundle": unpacked_bundle,
        "models_named": models_named,
        "open_model": open_model,
        "restore_opened": restore_opened,
        "image_in": lambda _: made.image,
        "load_image": load_image,
    }
    for name, fake in patched.items():
        monkeypatch.setattr(serve_bundle, name, fake)
    made.context = SimpleNamespace(
        args=SimpleNamespace(key=""),
        settings=SimpleNamespace(site_models_dir=tmp_path),
        reporter=SimpleNamespace(info=made.said.append),
    )
    return made


@pytest.mark.parametrize("key", ["", "/keys/kim.pem"])
def test_the_image_goes_into_docker_and_the_model_into_its_folder(
    key: str, site: Any, tmp_path: Path
) -> None:
    site.context.args.key = key
    assert serve_bundle.bring_bundle(site.context, "b") == [(site.context, "b")]
    how = (tmp_path, Path(key) if key else None, "policy")
    assert site.did == [
        ("named /d/app.tar.zst", *how),
        ("load", "image", "docker"),
        ("named /d/m.tar.zst", *how),
        ("restore", "named /d/m.tar.zst", "opened"),
        Path("/site/m"),
    ]
    assert site.said == ["vllm:1 was loaded"]


def test_a_delivery_that_cannot_be_is_refused(site: Any) -> None:
    site.image = None
    with pytest.raises(IntegrityError, match=r"/d/app.tar.zst holds no image"):
        serve_bundle.bring_bundle(site.context, "b")
    site.did.clear()
    site.refused = UsageError("--plan of a delivery", "", "")
    with pytest.raises(UsageError):
        serve_bundle.bring_bundle(site.context, "b")
    assert site.did == []


# -- --rollback


def version(name: str) -> Any:
    return SimpleNamespace(label=f"version {name}", short=name)


A, B = version("a"), version("b")


@pytest.mark.parametrize(
    ("before", "wanted", "said"),
    [
        (
            A,
            "",
            [
                "m: version a -> b, which was kept",
                "forward again: hfship serve m --rollback newest; the image stays, --image names"
                " another one",
            ],
        ),
        (A, "b", ["m: version a -> b, which was kept"]),
        (None, "b", ["m: none -> b, which was kept"]),
        (B, "b", ["m is at version b, as it was asked for"]),
    ],
)
def test_where_a_model_went_is_said(
    before: Optional[Any], wanted: str, said: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: List[str] = []
    reporter = SimpleNamespace(info=found.append)
    settings = SimpleNamespace(site_models_dir=Path("/site"), models_dir=Path("/models"))
    context: Any = SimpleNamespace(settings=settings, reporter=reporter)

    def find_folder(word: str, places: List[Path]) -> Path:
        assert places == [Path("/site"), Path("/models")]
        return Path("/site") / word

    def go_back(folder: Path, version: str) -> Any:
        assert (folder, version) == (Path("/site/m"), wanted)
        return SimpleNamespace(before=before, now=B)

    monkeypatch.setattr(rollback, "find_folder", find_folder)
    monkeypatch.setattr(rollback, "go_back", go_back)
    rollback.roll_back("m", wanted, context)
    assert found == said


@pytest.mark.parametrize(
    ("served", "kept", "place"),
    [
        (Path("/served/m"), (), Path("/served/m")),
        (None, (Path("/site/m"), Path("/models/m")), Path("/site/m")),
        (None, (Path("/models/m"),), Path("/models/m")),
        (None, (), Path("/site/m")),
    ],
)
def test_a_model_that_is_not_in_its_place_is_found_where_it_was(
    served: Optional[Path], kept: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: List[Path] = []

    def go_back(folder: Path, _: str) -> Any:
        went.append(folder)
        return SimpleNamespace(before=A, now=B)

    monkeypatch.setattr(rollback, "find_folder", lambda *_: None)
    monkeypatch.setattr(rollback, "served_folder", lambda *_: served)
    monkeypatch.setattr(rollback, "kept_versions", lambda target: [B] if target in kept else [])
    monkeypatch.setattr(rollback, "go_back", go_back)
    settings = SimpleNamespace(site_models_dir=Path("/site"), models_dir=Path("/models"))
    reporter = SimpleNamespace(info=lambda _: None)
    context: Any = SimpleNamespace(settings=settings, reporter=reporter)
    rollback.roll_back("m", "b", context)
    assert went == [place]
