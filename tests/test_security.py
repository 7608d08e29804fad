"""SECURITY.md: its threat table names tests that exist, and threats that run through all commands."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from conftest import ROOT, Program, missing
from support import archives as a
from support.hub import FaultHub

NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_every_test_that_the_threat_table_names_exists() -> None:
    named = NAMED.findall((ROOT / "SECURITY.md").read_text())
    absent = [
        f"{file}::{name}" for file, name in named if name not in functions_of(ROOT / "tests" / file)
    ]
    assert not absent and len(named) > 50


def test_every_threat_has_a_test() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = text.partition("\n## Threats\n")[2].partition("\n## ")[0].splitlines()
    threats = [row for row in rows if row.startswith("| ")][1:]
    assert threats and not [row for row in threats if not NAMED.search(row)]


def functions_of(path: Path) -> set:
    """The names of the functions of a file of tests."""
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


LOOK_LIKE_WORK = [
    "w.bin",
    "w.bin.incomplete",
    "w.bin~incomplete",
    "w.bin~replaced",
    ".DS_Store",
    ".gitattributes",
    ".github/x",
    ".cache/huggingface/download/w.bin.metadata",
]


def test_no_published_name_meets_a_file_at_work(
    hub: FaultHub, pyz: Program, tmp_path: Path
) -> None:
    files = {name: name.encode() * 100_000 for name in LOOK_LIKE_WORK}
    content = {**a.SMALL, **files}
    a.make_model(tmp_path / "hub" / "org" / "m", content)
    pyz("fetch", "org/m", "--endpoint", hub.url, "-o", tmp_path / "here")
    pyz("verify", tmp_path / "here" / "m")
    pyz("pack", tmp_path / "here" / "m", "-o", tmp_path / "out")
    pyz("unpack", tmp_path / "out" / "m.tar.zst", "-o", tmp_path / "there")
    for name, expected in content.items():
        for place in ("here", "there"):
            assert (tmp_path / place / "m" / name).read_bytes() == expected, (place, name)


@pytest.mark.parametrize("what", ["", "w.bin", "sub", ".hfship", ".hfship/partial"])
@pytest.mark.parametrize("command", ["fetch", "unpack"])
def test_what_another_user_prepared_does_not_become_the_model(
    command: str, what: str, hub: FaultHub, pyz: Program, tmp_path: Path
) -> None:
    """Whose inode it is, may change it after it was proven."""
    if os.geteuid() != 0:
        missing("root, to give files away")
    repository = tmp_path / "hub" / "org" / "m"
    a.make_model(repository, {**a.SMALL, "w.bin": b"w" * 100_000})
    archive = a.pack(repository, tmp_path / "out").path
    model = tmp_path / "models" / "m"
    words = ["fetch", "org/m", "--endpoint", hub.url]
    if command == "unpack":
        words = ["unpack", archive]
    pyz(*words, "-o", tmp_path / "models")
    (model / ".hfship/partial").mkdir(exist_ok=True)
    os.chown(model / what, 4242, 4242)
    done = pyz(*words, "-o", tmp_path / "models", code=None)
    if done.returncode:
        assert done.returncode in (6, 7) and "4242" in done.stderr, done.stderr
        return
    for path in [model, *model.rglob("*")]:
        assert path.stat().st_uid == 0, path
