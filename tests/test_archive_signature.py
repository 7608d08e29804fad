# SPDX-License-Identifier: Apache-2.0
"""Bundles that cannot be read, and what a signature is of; test_signatures.py signs for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfship.archive import signature as room
from hfship.archive.signature import LARGEST_BUNDLE, Signed, bundle_facts
from hfship.base.errors import DiskError


def test_a_bundle_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(FileNotFoundError):
        bundle_facts(tmp_path / "gone.sig")
    with pytest.raises(ValueError):
        bundle_facts(tmp_path)
    (tmp_path / "large.sig").write_bytes(b" " * (LARGEST_BUNDLE + 1))
    with pytest.raises(ValueError):
        bundle_facts(tmp_path / "large.sig")

    def broken(*_: Any) -> Any:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(room, "read_small", broken)
    with pytest.raises(DiskError, match="cannot read"):
        bundle_facts(tmp_path / "x.sig")


def test_who_signs_for_what() -> None:
    assert Signed({}, (), "ab", manifest="cd").signer == "ab"
    assert Signed({}, (), "ab").signer.startswith("ab, its content alone")
