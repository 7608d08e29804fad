# SPDX-License-Identifier: Apache-2.0
"""`clean --kept`: which versions go, and what becomes free; test_update.py has real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List, Tuple

import pytest

from hfship.archive.kept import KeptVersion
from hfship.archive.versions import Version
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
