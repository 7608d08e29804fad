# SPDX-License-Identifier: Apache-2.0
"""`clean --kept`: which versions go, and what becomes free; test_update.py has real ones."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from hfship.archive.kept import KeptVersion
from hfship.archive.versions import Version
from hfship.base.errors import Exit
from hfship.commands import clean_kept
from hfship.serve.terms import Plan

ID = "abcdef0123456789"


def kept(folder: Path, number: int = 1) -> KeptVersion:
    return KeptVersion(folder, Version(ID, f"commit {number}"), f"2026-01-0{number}T00:00:00Z")


def test_what_versions_share_is_free_with_the_last_of_them(tmp_path: Path) -> None:
    first, second, stays = (tmp_path / name for name in ("first", "second", "stays"))
    for folder in (first, second, stays):
        (folder / "sub").mkdir(parents=True)
    (first / "own").write_bytes(b"x" * 10)
    (first / "sub/link").symlink_to("/nowhere")
    (first / "both").write_bytes(b"x" * 100)
    os.link(first / "both", second / "sub/both")
    (first / "all").write_bytes(b"x" * 1000)
    for folder in (second, stays):
        os.link(first / "all", folder / "all")
    rows = clean_kept._rows([kept(first), kept(second, 2)])
    assert [(row["files"], row["bytes"], row["paths"]) for row in rows] == [
        (3, 10, [str(first)]),
        (2, 100, [str(second)]),
    ]
    assert rows[1]["what"].endswith(", in place until 2026-01-02")
    assert clean_kept._rows([kept(first)])[0]["bytes"] == 10, "the other has the rest still"


@pytest.mark.parametrize("yes", [True, False])
def test_what_nobody_runs_with_goes(
    yes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("m", "m~1", "m~2", "n"):
        (tmp_path / name).mkdir()
    versions = {"m": [kept(tmp_path / "m~1"), kept(tmp_path / "m~2")]}
    plans = [SimpleNamespace(plan=Plan(name="d", model_dir=str(tmp_path / "m")))]
    dropped: List[Any] = []
    said: List[str] = []
    told: Dict[str, Any] = {}

    def served_by(target: Path, one: KeptVersion, found: List[Plan]) -> str:
        assert target == tmp_path / "m" and [plan.name for plan in found] == ["d"]
        return "d" if one.folder.name == "m~1" else ""

    def kept_beyond(target: Path, keep: int) -> List[KeptVersion]:
        assert keep == 3
        return versions.get(target.name, [])

    @contextlib.contextmanager
    def locked_tree(folder: Path) -> Iterator[None]:
        dropped.append(f"lock {folder.name}")
        yield

    patched: Dict[str, Any] = {
        "readable_deployments": lambda *_: plans,
        "kept_of": lambda name: name.partition("~")[0] if "~" in name else "",
        "kept_beyond": kept_beyond,
        "_served_by": served_by,
        "locked_tree": locked_tree,
        "drop": lambda folder: dropped.append(folder.name),
    }
    for name, fake in patched.items():
        monkeypatch.setattr(clean_kept, name, fake)
    reporter = SimpleNamespace(info=said.append, warn=None, result_json=told.update)
    settings = SimpleNamespace(site_models_dir=tmp_path)
    args = SimpleNamespace(kept=3, json=True, dry_run=not yes, yes=yes)
    context: Any = SimpleNamespace(args=args, settings=settings, reporter=reporter)
    assert clean_kept.clean_kept(context) is Exit.OK
    assert said == [f"kept: {tmp_path}/m~1: the deployment d runs with it"]
    assert [row["where"] for row in told["leftovers"]] == [str(tmp_path / "m~2")]
    assert dropped == (["lock m~incomplete", "m~2"] if yes else [])


# (model of a deployment, first digits of its version) -> whether its container has these files
SERVED: List[Tuple[str, str, bool]] = [
    ("/site/m", "abcdef01", True),
    ("/site/m", "abcdef02", False),
    ("/site/m", "", False),
    ("/site/n", "abcdef01", False),
]


@pytest.mark.parametrize(("model", "version", "serves"), SERVED)
def test_a_version_that_a_deployment_runs_with_stays(
    model: str, version: str, serves: bool
) -> None:
    plans = [Plan(name="other"), Plan(name="d", model_dir=model, model_version=version)]
    found = clean_kept._served_by(Path("/site/m"), kept(Path("/site/m~kept")), plans)
    assert found == ("d" if serves else "")


def test_without_a_folder_of_models_nothing_is_kept(tmp_path: Path) -> None:
    assert clean_kept._models_with_kept(tmp_path / "none") == []
    (tmp_path / "m").mkdir()
    found: List[Any] = clean_kept._models_with_kept(tmp_path)
    assert found == []
