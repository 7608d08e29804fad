# SPDX-License-Identifier: Apache-2.0
"""Whose signatures count, on keys and bundles that are written here; test_approval.py signs for real."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

import pytest

from hfship.archive import approval as room
from hfship.archive.approval import (
    MOST_BUNDLES,
    REVOKED,
    Approval,
    Approvals,
    Trust,
    TrustedKey,
    archive_bundle,
    bundles_beside,
    bundles_in,
    find_approvals,
    fitting_bundles,
    of_manifest,
    read_trust,
    require_approved,
    role_name,
)
from hfship.archive.files import ArchiveFiles
from hfship.archive.signature import SIGNATURE_PATH, Signed
from hfship.base.errors import IntegrityError, UsageError
from hfship.base.manifest import make_manifest
from hfship.base.processes import Completed

PRINTS = {name: name * 64 for name in "abcd"}
POLICY: Any = SimpleNamespace(keys=Path("keys"), require=("release", "security"))


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint of a key is its text, 64 times."""

    def read_key(path: Path) -> Any:
        return SimpleNamespace(fingerprint=path.read_text() * 64)

    monkeypatch.setattr(room, "read_key", read_key)


def folder_of(folder: Path, **keys: str) -> Path:
    """A folder of keys: a place, its slashes as __, and the text of a key."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for place, text in keys.items():
        path = folder / f"{place.replace('__', '/')}.pem"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# -- the folder of keys


def test_keys_have_the_roles_of_their_folders(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "keys",
        release__kim="a",
        security__kim="a",
        security__lee="b",
        revoked__old="c",
        top="d",
    )
    (folder / "release/readme.txt").write_text("d")
    (folder / "Not A Role").mkdir()
    (folder / "Not A Role/x.pem").write_text("d")
    both = TrustedKey("release/kim.pem", "a", PRINTS["a"], ("release", "security"))
    one = TrustedKey("security/lee.pem", "b", PRINTS["b"], ("security",))
    trust = read_trust(folder)
    assert trust == Trust(
        {PRINTS["a"]: both, PRINTS["b"]: one}, {PRINTS["c"]: f"{REVOKED}/old.pem"}
    )


def test_the_last_day_of_a_key_stands_in_its_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "keys")
    (folder / "release").mkdir()
    (folder / "release/kim.until-2027-01-31.pem").write_text("a")
    (folder / "release/lee.until-2027-1-31.pem").write_text("b")
    keys = read_trust(folder).keys
    assert (keys[PRINTS["a"]].until, keys[PRINTS["b"]].until) == ("2027-01-31", "")


PEM = "-----BEGIN PUBLIC KEY-----\nMII\n-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize(
    ("code", "out", "fits"),
    [
        (0, f"{PEM}notAfter=Jan  5 10:00:00 2027 GMT\n", True),
        (0, f"notAfter=Jan  5 10:00:00 2027 GMT\n{PEM}", True),
        (1, f"{PEM}notAfter=Jan  5 10:00:00 2027 GMT\n", False),
        (0, PEM, False),
        (0, "notAfter=Jan  5 10:00:00 2027 GMT\n", False),
    ],
)
def test_a_certificate_counts_until_its_end(
    code: int, out: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []

    def run(argv: List[str]) -> Completed:
        asked.append(argv)
        return Completed(code, out, " odd\n")

    monkeypatch.setattr(room, "run_program", run)
    folder = folder_of(tmp_path / "keys", release__kim="-----BEGIN CERTIFICATE-----")
    path = folder / "release/kim.pem"
    if fits:
        (key,) = read_trust(folder).keys.values()
        assert (key.pem, key.until, key.fingerprint) == (PEM, "2027-01-05", PEM * 64)
        shown = ["-noout", "-pubkey", "-enddate"]
        assert asked == [["openssl", "x509", "-in", str(path), *shown]]
    else:
        with pytest.raises(UsageError, match=f"{path} is no certificate") as told:
            read_trust(folder)
        assert told.value.why == "odd"


def test_folders_that_anybody_may_write_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "keys", release__kim="a")
    for place in (folder / "release", folder):
        place.chmod(0o707)
        with pytest.raises(UsageError) as told:
            read_trust(folder)
        assert told.value.what == f"anybody may put keys into {place}"
        assert told.value.next_step == f"chmod o-w {place}"
        place.chmod(0o775)
    assert len(read_trust(folder).keys) == 1, "a group may"


def test_folders_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing says whose"):
        read_trust(None)
    for place in (tmp_path / "gone", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError) as told:
            read_trust(place)
        assert told.value.what == f"the folder of keys {place} cannot be read" and told.value.why
    folder = folder_of(tmp_path / "keys")
    (folder / "release/kim.pem").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"kim.pem cannot be read"):
        read_trust(folder)


# -- where signatures lie


def test_where_a_signature_lies(tmp_path: Path) -> None:
    assert role_name("security", "0123456789ab") == "security-01234567.sig"
    files = ArchiveFiles(tmp_path, "m.tar.zst", {})
    place = archive_bundle(files, "security", "0123456789ab")
    assert place == tmp_path / "m.tar.zst.security-01234567.sig"


NAMES = ["release-01234567.sig", "a_1-89abcdef.sig"]
NO_NAMES = ["Release-01234567.sig", "release-0123456.sig", "release-01234567.sig.old", "x.sig"]


def test_signatures_beside_an_archive(tmp_path: Path) -> None:
    files = ArchiveFiles(tmp_path, "m.tar.zst", {})
    for name in (*NAMES, *NO_NAMES):
        (tmp_path / f"m.tar.zst.{name}").touch()
    (tmp_path / f"other.tar.zst.{NAMES[0]}").touch()
    (tmp_path / "m.tar.zst.folder-01234567.sig").mkdir()
    found = [tmp_path / f"m.tar.zst.{name}" for name in sorted(NAMES)]
    assert bundles_beside(files) == found
    (tmp_path / "m.tar.zst.sig").touch()
    assert bundles_beside(files) == [tmp_path / "m.tar.zst.sig", *found]


def test_signatures_in_a_folder(tmp_path: Path) -> None:
    place = tmp_path / ".hfship/signatures"
    place.mkdir(parents=True)
    for name in (*NAMES, *NO_NAMES):
        (place / name).touch()
    (place / "link-01234567.sig").symlink_to(place / NAMES[0])
    found = [place / name for name in sorted(NAMES)]
    assert bundles_in(tmp_path) == found
    (tmp_path / SIGNATURE_PATH).touch()
    assert bundles_in(tmp_path) == [tmp_path / SIGNATURE_PATH, *found]
    for number in range(MOST_BUNDLES):
        (place / f"z-{number:08x}.sig").touch()
    assert len(bundles_in(tmp_path)) == MOST_BUNDLES


TEXT = b"the text of a manifest"
TEXT_SUM = hashlib.sha256(TEXT).hexdigest()


def test_signatures_of_a_text_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ".hfship/signatures"
    place.mkdir(parents=True)
    said: Dict[str, Any] = {
        "model.sig": Signed({}, (), "a", manifest=TEXT_SUM),
        "a-00000000.sig": ValueError("odd"),
        "b-00000000.sig": Signed({}, (), "a", manifest=TEXT_SUM),
        "c-00000000.sig": Signed({}, (), "a", manifest="0" * 64),
        "d-00000000.sig": OSError("odd"),
        "e-00000000.sig": Signed({}, (), "a", manifest=TEXT_SUM),
    }
    for name in said:
        (place / name).touch()
    (tmp_path / SIGNATURE_PATH).touch()

    def facts(path: Path) -> Tuple[str, Signed]:
        found = said[path.name]
        if isinstance(found, Exception):
            raise found
        return "a", found

    monkeypatch.setattr(room, "bundle_facts", facts)
    names = ["b-00000000.sig", "e-00000000.sig"]
    assert fitting_bundles(tmp_path, TEXT) == {name: place / name for name in names}


# -- which count

TRUST = Trust(
    {
        PRINTS["a"]: TrustedKey("release/kim.pem", "a", PRINTS["a"], ("release",), "2027-01-31"),
        PRINTS["b"]: TrustedKey("x/lee.pem", "b", PRINTS["b"], ("security", "release")),
        PRINTS["c"]: TrustedKey("release/old.pem", "c", PRINTS["c"], ("release",)),
    },
    {PRINTS["c"]: "revoked/old.pem", PRINTS["d"]: "revoked/d.pem"},
)

# (key, role, today) -> the role that it has, how the key is shown, and why it does not count
JUDGED: List[Any] = [
    ("a", "release", "2027-01-31", "release", "release/kim.pem", ""),
    ("a", "", "2027-01-31", "release", "release/kim.pem", ""),
    (
        "a",
        "release",
        "2027-02-01",
        "release",
        "release/kim.pem",
        "its key expired: it counts until 2027-01-31",
    ),
    (
        "a",
        "security",
        "2027-01-01",
        "security",
        "release/kim.pem",
        "its key may sign as release only",
    ),
    ("b", "security", "2099-01-01", "security", "x/lee.pem", ""),
    (
        "b",
        "legal",
        "2027-01-01",
        "legal",
        "x/lee.pem",
        "its key may sign as security, release only",
    ),
    (
        "c",
        "release",
        "2027-01-01",
        "release",
        "release/old.pem",
        "its key was revoked: revoked/old.pem",
    ),
    (
        "d",
        "release",
        "2027-01-01",
        "release",
        "key dddddddddddd",
        "its key was revoked: revoked/d.pem",
    ),
    (
        "e",
        "release",
        "2027-01-01",
        "release",
        "key eeeeeeeeeeee",
        "its key is not in the folder of keys",
    ),
]


@pytest.mark.parametrize(("key", "role", "today", "as_role", "shown", "problem"), JUDGED)
def test_which_signatures_count(
    key: str,
    role: str,
    today: str,
    as_role: str,
    shown: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    print_ = key * 64
    signed = Signed({}, (), print_, role=role)
    proven: List[Any] = []

    def prove(path: Path, public: Path) -> Signed:
        proven.append((path, public.read_text()))
        return signed

    monkeypatch.setattr(room, "read_trust", lambda folder: {Path("keys"): TRUST}[folder])
    monkeypatch.setattr(room, "bundle_facts", lambda _: (print_, signed))
    monkeypatch.setattr(room, "prove_signature", prove)
    found = find_approvals([Path("x/a.sig")], POLICY, today)
    counts = None if problem else signed
    approval = Approval(as_role, "a.sig", shown, print_, problem, counts)
    assert found == Approvals((approval,), POLICY.require)
    assert proven == ([] if problem else [(Path("x/a.sig"), key)])
    assert approval.text() == f"{as_role} ({shown})" + (f": {problem}" if problem else "")
    assert approval.json() == {
        "role": as_role,
        "bundle": "a.sig",
        "key": print_,
        "counts": not problem,
        "problem": problem,
    }


def test_what_is_no_signature_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "read_trust", lambda _: TRUST)

    def odd(*_: Any) -> Any:
        raise ValueError("x" * 300)

    monkeypatch.setattr(room, "bundle_facts", odd)
    (one,) = find_approvals([Path("a.sig")], POLICY, "2027-01-01").found
    assert one == Approval("?", "a.sig", "", "", f"it cannot be read: {'x' * 300}"[:200])

    def refused(*_: Any) -> Any:
        raise IntegrityError("what", "why", "")

    monkeypatch.setattr(
        room, "bundle_facts", lambda _: (PRINTS["b"], Signed({}, (), "", role="security"))
    )
    monkeypatch.setattr(room, "prove_signature", refused)
    (one,) = find_approvals([Path("a.sig")], POLICY, "2027-01-01").found
    assert one.problem == "it is no valid signature: why" and one.signed is None


@pytest.mark.parametrize(
    ("folder", "require", "asked"),
    [(None, (), False), (Path("keys"), (), True), (None, ("release",), True)],
)
def test_keys_are_read_where_they_are_asked_for(
    folder: Optional[Path], require: Any, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: List[Any] = []
    monkeypatch.setattr(room, "read_trust", lambda given: read.append(given) or TRUST)
    policy: Any = SimpleNamespace(keys=folder, require=require)
    assert find_approvals([], policy, "2027-01-01") == Approvals((), require)
    assert read == ([folder] if asked else [])


def approval(role: str, key: str, problem: str = "", signed: Optional[Signed] = None) -> Approval:
    return Approval(role, f"{role}.sig", f"{key}.pem", key, problem, signed)


@pytest.mark.parametrize(
    ("found", "required", "missing"),
    [
        ([], ["release"], ["release"]),
        ([approval("release", "a")], ["release"], []),
        ([approval("release", "a", "expired")], ["release"], ["release"]),
        ([approval("release", "a"), approval("release", "a")], ["release", "release"], ["release"]),
        ([approval("release", "a"), approval("release", "b")], ["release", "release"], []),
        ([approval("legal", "a")], ["security", "release"], ["release", "security"]),
    ],
)
def test_which_roles_are_missing(found: Any, required: Any, missing: List[str]) -> None:
    approvals = Approvals(tuple(found), tuple(required))
    assert approvals.missing == missing
    if not missing:
        require_approved(approvals, "/m")
        return
    with pytest.raises(IntegrityError) as told:
        require_approved(approvals, "/m")
    assert told.value.what == "/m is not approved"
    signed = [f"signed: {one.text()}" for one in found]
    assert told.value.why.splitlines() == [f"missing: {', '.join(missing)}", *signed]
    steps = [f"hfship sign /m --as {role} --key KEY.pem" for role in missing]
    assert told.value.next_step.splitlines() == steps


def test_who_approved_is_told() -> None:
    found = (approval("release", "a"), approval("security", "b"), approval("legal", "c", "expired"))
    assert Approvals(found).text() == "; approved by release (a.pem), security (b.pem)"
    assert Approvals(found[2:]).text() == ""


def test_signatures_of_other_files_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = Signed({}, (), "a"), Signed({}, (), "b")
    manifest = make_manifest("m", [])

    def require(given: Any, text: bytes, signed: Signed, where: Path) -> None:
        assert (given, text, where) == (manifest, TEXT, Path("/m"))
        if signed is wrong:
            raise IntegrityError("what", "why", "")

    monkeypatch.setattr(room, "require_signed", require)
    found = (
        approval("release", "a", signed=right),
        approval("security", "b", signed=wrong),
        approval("legal", "c", "expired"),
    )
    checked = of_manifest(Approvals(found, ("release",)), manifest, TEXT, Path("/m"))
    assert [one.problem for one in checked.found] == ["", "it is of other files: why", "expired"]
    assert checked.required == ("release",)
    with pytest.raises(IntegrityError, match="/m is not approved"):
        of_manifest(Approvals(found, ("security",)), manifest, TEXT, Path("/m"))
    unknown = Approvals(found, ("legal",))
    assert of_manifest(unknown, None, TEXT, Path("/m")) is unknown
