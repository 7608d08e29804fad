# SPDX-License-Identifier: Apache-2.0
"""Which signatures the verbs look at, on which day, and what is refused without them; test_approval.py
signs with openssl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.archive.approval import SIGNATURES_DIR
from hfship.base.errors import IntegrityError
from hfship.base.policy import Policy
from hfship.commands import approving
from hfship.commands.approving import (
    approve_archive,
    approve_content,
    approve_folder,
    approve_served,
    carry_signatures,
    keep_signatures,
    refuse_unsigned,
)
from support import archives as a


class Signed:
    """What was looked at, and when; `found` stands for the signatures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: List[Any] = []
        self.missing = False
        at = "hfship.archive.approval"
        monkeypatch.setattr("hfship.base.text.utc_exact", lambda: "2026-01-31T23:59:59.999999Z")
        monkeypatch.setattr(f"{at}.find_approvals", self.find)
        monkeypatch.setattr(f"{at}.of_manifest", self.of)
        monkeypatch.setattr(f"{at}.require_approved", self.require)
        monkeypatch.setattr(f"{at}.bundles_beside", lambda files: [f"beside {files.name}"])
        monkeypatch.setattr(f"{at}.bundles_in", lambda folder: [f"in {folder.name}"])

    def find(self, bundles: Any, policy: Policy, today: str) -> str:
        self.did.append((bundles, today))
        return "found"

    def of(self, found: Any, manifest: Any, text: bytes, place: Path) -> str:
        self.did.append((found, manifest, text, place.name))
        return "of it"

    def require(self, found: Any, place: Path) -> None:
        self.did.append((found, place.name))
        if self.missing:
            raise IntegrityError("a role is missing")


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch) -> Signed:
    return Signed(monkeypatch)


NOBODY = Policy(keys=None, require=())
POLICIES: List[Policy] = [Policy(keys=Path("/keys")), Policy(keys=None, require=("security",))]


@pytest.mark.parametrize("policy", POLICIES, ids=["keys", "require"])
def test_signatures_count_on_the_day_on_which_they_are_read(
    policy: Policy, signed: Signed, tmp_path: Path
) -> None:
    files: Any = SimpleNamespace(name="m.tar.zst", place=tmp_path / "m.tar.zst")
    found: Any = approve_archive(files, policy)
    assert found == "found"
    assert signed.did == [(["beside m.tar.zst"], "2026-01-31"), ("found", "m.tar.zst")]
    signed.did.clear()
    manifest = a.make_model(tmp_path / "m", {"w": b"1"})
    found = approve_folder(tmp_path / "m", manifest, policy)
    assert found == "of it"
    text = manifest.to_json().encode()
    assert signed.did == [(["in m"], "2026-01-31"), ("found", manifest, text, "m")]
    signed.missing = True
    with pytest.raises(IntegrityError):
        approve_archive(files, policy)


def test_where_nobody_asks_nothing_is_looked_at(signed: Signed, tmp_path: Path) -> None:
    nothing: Any = None
    assert approve_archive(nothing, NOBODY) is None
    assert approve_folder(tmp_path, nothing, NOBODY) is None
    assert approve_content(None, nothing) is None
    approve_served(tmp_path, None, NOBODY)
    refuse_unsigned("x", NOBODY)
    assert signed.did == []


def test_signatures_are_of_what_the_archive_holds(signed: Signed, tmp_path: Path) -> None:
    files = SimpleNamespace(place=tmp_path / "m.tar.zst")
    archive: Any = SimpleNamespace(manifest="M", text=b"T", files=files)
    given: Any = "given"
    found: Any = approve_content(given, archive)
    assert found == "of it" and signed.did == [("given", "M", b"T", "m.tar.zst")]


def test_what_cannot_be_signed_is_not_served_where_roles_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = Policy(keys=None, require=("release", "security"))
    with pytest.raises(IntegrityError, match="m is not approved") as caught:
        refuse_unsigned("m", policy)
    assert "require: release, security; it is no archive of hfship" in caught.value.why
    with pytest.raises(IntegrityError, match="is not approved"):
        approve_served(tmp_path, None, policy)
    asked: List[Any] = []
    monkeypatch.setattr(approving, "approve_folder", lambda *given: asked.append(given))
    manifest: Any = "M"
    approve_served(tmp_path, manifest, policy)
    assert asked == [(tmp_path, "M", policy)]


def test_signatures_of_roles_go_with_what_is_unpacked_and_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, security = "m.tar.zst.sigstore.json", "m.tar.zst.security-0.sigstore.json"
    beside = [tmp_path / release, tmp_path / "gone.json", tmp_path / security]
    for path in (beside[0], beside[2]):
        path.write_text(path.name)
    monkeypatch.setattr("hfship.archive.approval.bundles_beside", lambda _: beside)
    monkeypatch.setattr("hfship.archive.signature.bundle_of", lambda _: beside[0])
    folder = tmp_path / "m"
    folder.mkdir()
    files: Any = SimpleNamespace(name="-")
    keep_signatures(files, folder)
    assert list(folder.iterdir()) == []
    files = SimpleNamespace(name="m.tar.zst")
    keep_signatures(files, folder)
    [kept] = (folder / SIGNATURES_DIR).iterdir()
    assert (kept.name, kept.read_text()) == ("security-0.sigstore.json", security)

    texts: List[bytes] = []

    def fitting(place: Path, text: bytes) -> Dict[str, Path]:
        assert place == folder
        texts.append(text)
        return {"security-0.sigstore.json": kept}

    monkeypatch.setattr("hfship.archive.approval.fitting_bundles", fitting)
    manifest = a.make_model(tmp_path / "n", {"w": b"1"})
    carry_signatures(folder, manifest, "n.tar.zst", tmp_path)
    assert texts == [manifest.to_json().encode()]
    assert (tmp_path / "n.tar.zst.security-0.sigstore.json").read_text() == security
