# SPDX-License-Identifier: Apache-2.0
"""What the file that runs holds, in a checkout and in hfship.pyz; test_pyz.py has built ones."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from hfship.base import pyz as own
from hfship.base.errors import IntegrityError

ROOT = Path(__file__).resolve().parent.parent
CONTENT = {"hfship/a.py": b"a", "docs/b.md": b"b"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Loader:
    """What Python imports from."""

    content = b"all of it"

    def __init__(self, entries: Dict[str, bytes]) -> None:
        self.entries = entries

    def get_data(self, path: str) -> bytes:
        """One entry of hfship.pyz."""
        name = path[len("/run/hfship.pyz/") :]
        assert path.startswith("/run/hfship.pyz/")
        if name not in self.entries:
            raise OSError(name)
        return self.entries[name]


def table(entries: Dict[str, bytes]) -> bytes:
    sums = {name: sha256(content) for name, content in entries.items()}
    return json.dumps({"version": "1", "entries": sums}).encode()


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A pyz that runs, with these entries."""
    made = Loader({**CONTENT, own.BUILD_TABLE: table(CONTENT)})
    monkeypatch.setattr(own, "_ROOT", Path("/run/hfship.pyz"))
    monkeypatch.setattr(own, "__loader__", made)
    return made


def test_of_a_checkout() -> None:
    assert own.own_file() == ROOT / "hfship.py" and own.own_content() == b""
    assert own.own_document("json.md") == (ROOT / "docs/json.md").read_bytes()
    assert own.own_entry("hfship/base/pyz.py") == Path(own.__file__).read_bytes()


def test_of_a_pyz(loader: Loader) -> None:
    assert own.own_file() == Path("/run/hfship.pyz") and own.own_content() == b"all of it"
    assert own.own_document("b.md") == b"b" and own.own_entry("hfship/a.py") == b"a"


SEAL = b"#!/usr/bin/env python3\n# sha256 of all bytes after this line: %s\n"


def write_pyz(path: Path, entries: Dict[str, bytes], names: Optional[List[str]] = None) -> None:
    """A pyz as it is built, sealed."""
    body = path.with_name("body.zip")
    with zipfile.ZipFile(body, "w") as archive:
        for name in names or entries:
            archive.writestr(name, entries[name])
    content = body.read_bytes()
    path.write_bytes(SEAL % sha256(content).encode() + content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"extra": b"x"}, ["extra: extra entry"]),
        ({"hfship/a.py": b"changed"}, ["hfship/a.py: changed"]),
        ({"hfship/a.py": None}, ["hfship/a.py: missing"]),
        ({"twice": True}, ["hfship/a.py: there twice"]),
    ],
    ids=str,
)
def test_each_entry_is_proven(
    changes: Dict[str, Any], problems: List[str], loader: Loader, tmp_path: Path
) -> None:
    entries = {**loader.entries, **changes}
    twice = entries.pop("twice", False)
    entries = {name: content for name, content in entries.items() if content is not None}
    names = [*entries, "hfship/a.py"] if twice else None
    write_pyz(tmp_path / "x.pyz", entries, names)
    assert own.entry_problems(tmp_path / "x.pyz") == problems
    if problems:
        with pytest.raises(IntegrityError) as told:
            own.verify_own_file(tmp_path / "x.pyz")
        assert told.value.what == f"{tmp_path}/x.pyz is not as it was built"
        assert told.value.why == "\n".join(problems)
    else:
        content = (tmp_path / "x.pyz").read_bytes()
        assert own.verify_own_file(tmp_path / "x.pyz") == sha256(content)


def test_what_python_imports_is_proven_too(loader: Loader, tmp_path: Path) -> None:
    write_pyz(tmp_path / "x.pyz", loader.entries)
    loader.entries["hfship/a.py"] = b"another"
    assert own.entry_problems(tmp_path / "x.pyz") == ["hfship/a.py: changed"]
    del loader.entries["hfship/a.py"]
    assert own.entry_problems(tmp_path / "x.pyz") == ["hfship/a.py: hfship/a.py"]


@pytest.mark.parametrize("place", ["before", "behind", "no seal", "no zip"])
def test_every_other_byte_is_sealed(place: str, loader: Loader, tmp_path: Path) -> None:
    path = tmp_path / "x.pyz"
    write_pyz(path, loader.entries)
    content = path.read_bytes()
    changed = {
        "before": b"#\n" + content,
        "behind": content[:-1] + b"x",
        "no seal": content.partition(b"PK")[2],
        "no zip": b"x",
    }
    path.write_bytes(changed[place])
    with pytest.raises(IntegrityError, match="is not as it was built"):
        own.verify_own_file(path)


def test_an_entry_that_cannot_be_read_is_told(loader: Loader, tmp_path: Path) -> None:
    write_pyz(tmp_path / "x.pyz", loader.entries)

    def damaged(name: str) -> bytes:
        raise own.damaged_entry(name, "EOFError: cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "own_entry", damaged)
        with zipfile.ZipFile(tmp_path / "x.pyz") as archive:
            assert own._entry_problem(archive, "hfship/a.py", "") == "hfship/a.py: EOFError: cut"
