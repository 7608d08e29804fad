# SPDX-License-Identifier: Apache-2.0
"""Around the work of `pack`: deliveries, the models file beside archives, the reminder of the image."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest

from hfship.base.errors import Exit, HostError
from hfship.base.values import dataclass, replace
from hfship.commands import pack


@dataclass(frozen=True)
class Context:
    """What these functions take of a context."""

    args: Any
    file: Any = None
    settings: Any = None
    reporter: Any = None


def context_of(file: Optional[Path] = None, **args: Any) -> Any:
    said: List[str] = []
    reporter = SimpleNamespace(info=said.append, said=said, then=lambda *words: said.append(words))
    models = SimpleNamespace(path=file) if file else None
    return Context(argparse.Namespace(**args), models, "settings", reporter)


@pytest.mark.parametrize(
    ("name", "carried"), [("site.toml", True), ("site.json", False), (None, False)]
)
def test_the_models_file_travels_with_the_archives(
    name: Optional[str], carried: bool, tmp_path: Path
) -> None:
    targets = [tmp_path / "a", tmp_path / "b"]
    for target in targets:
        target.mkdir()
    if name:
        (tmp_path / name).write_text("[[model]]\n")
    pack.carry_models_file(targets, context_of(tmp_path / name if name else None))
    found = [[path.read_text() for path in target.iterdir()] for target in targets]
    assert found == ([["[[model]]\n"]] * 2 if carried else [[], []])


@pytest.mark.parametrize(
    ("models", "images", "there", "said"),
    [
        (["m"], [], False, "the far side needs an image of vLLM, too: hfship pack m --with-image"),
        (["a", "b", "c", "d"], [], False, "hfship pack a b c --with-image"),
        (["m"], [], True, None),
        (["m"], ["i"], False, None),
        ([], ["i"], False, None),
    ],
)
def test_the_image_is_reminded_of_where_none_crosses(
    models: List[str],
    images: List[str],
    there: bool,
    said: Optional[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = [tmp_path / name for name in [*models, *images]]
    for folder in folders:
        folder.mkdir()
    for name in images:
        (tmp_path / name / "oci-layout").touch()
    monkeypatch.setattr("hfship.commands.bundles.has_image", lambda *_: there)
    context = context_of()
    pack.remind_of_image(folders, [tmp_path], context)
    assert len(context.reporter.said) == (said is not None)
    assert not said or said in context.reporter.said[0]


@pytest.mark.parametrize(
    ("fails", "pairs"),
    [
        ([], [("p:m", "p:i"), ("p:n", "p:i")]),
        (["n"], [("p:m", "p:i")]),
        (["i"], []),
    ],
)
def test_a_delivery_is_a_model_and_its_image(
    fails: List[str], pairs: List[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: List[Any] = []
    finished: List[Any] = []

    def pack_folder(folder: Path, targets: Any, options: Any, run: Any) -> Any:
        packed.append((folder.name, run.args.name, run.args.since))
        if folder.name in fails:
            raise HostError("no", "", "")
        return pack.PackResult(f"p:{folder.name}")  # type: ignore[arg-type]

    def each_of(_: Any, works: Any) -> Exit:
        code = Exit.OK
        for name, work in works:
            assert name in ("m", "n", "i")
            try:
                work()
            except HostError as exc:
                code = exc.code
        return code

    def finish(found: Any, *_: Any) -> List[Path]:
        finished.extend(found)
        return [tmp_path / "m.bundle.json"]

    monkeypatch.setattr("hfship.commands.pack.pack_folder", pack_folder)
    monkeypatch.setattr("hfship.commands.pack.each_of", each_of)
    monkeypatch.setattr("hfship.commands.bundles.image_folder", lambda *_: Path("/i"))
    monkeypatch.setattr("hfship.commands.bundles.finish_bundles", finish)
    context = context_of(with_image="", name="x", since="y")
    options: Any = None
    code = pack.pack_deliveries([Path("/m"), Path("/n")], [tmp_path], options, context)
    assert code == (Exit.HOST if fails else Exit.OK)
    assert packed == [("i", None, None), ("m", "x", "y"), ("n", "x", "y")]  # the image once
    assert finished == pairs
    path = tmp_path / "m.bundle.json"
    assert context.reporter.said == [
        f"{path}: model, image and hfship.pyz; there: hfship serve m.bundle.json"
    ]


@pytest.mark.parametrize(
    ("args", "targets", "read_back"),
    [
        ({"to": [], "output": None}, ["/beside"], False),
        ({"to": [], "output": Path("/out")}, ["/out"], False),
        ({"to": [Path("/a"), Path("/b")], "output": None}, ["/a", "/b"], True),
    ],
)
def test_an_archive_is_recut_beside_itself_unless_it_is_asked_for_elsewhere(
    args: Dict[str, Any], targets: List[str], read_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: List[Any] = []

    def recut(files: Any, places: Any, options: Any, reporter: Any) -> Any:
        cut.append(([str(place) for place in places], options))
        return SimpleNamespace(parts=[SimpleNamespace(path=Path("/beside/x.0001"))])

    monkeypatch.setattr("hfship.archive.recut.recut", recut)
    settings = SimpleNamespace(package_dir=Path("/packages"))
    context = replace(context_of(split=5, force=True, **args), settings=settings)
    files: Any = SimpleNamespace(folder=Path("/beside"))
    pack.recut_archive(files, context)
    ((places, options),) = cut
    assert places == targets
    assert (options.split, options.force, options.read_back) == (5, True, read_back)
    assert context.reporter.said == [("verify", Path("/beside/x.0001"))]
