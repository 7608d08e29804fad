# SPDX-License-Identifier: Apache-2.0
"""Approval: who has signed a delivery, in which role, and whether that is enough for this site.

Owns where the signatures of roles lie, the folder of trusted keys, and how they are counted:

  NAME.tar.zst.ROLE-FINGERPRINT8.sig     beside an archive, a bundle as archive/signature.py has it,
                                         with the role in its signed predicate
  NAME.tar.zst.sig                       that of `pack --sign`, which counts as "release"
  .hfship/signatures/, .hfship/model.sig the same in a model folder
  KEYS/ROLE/*.pem                        public keys, or X.509 certificates, that may sign in a
                                         role; several at a time for a roll-over
  KEYS/ROLE/*.until-2027-06-30.pem       a key that counts until the end of that day (UTC)
  KEYS/revoked/*.pem                     keys that count no more, wherever else they lie

Promises: a role counts by the site's folder of keys, never by what a bundle says of itself; a key
that expired or was revoked counts for nothing, whenever it signed: nobody proves when that was.
Never: takes a key from beside an archive.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from hfship.archive.signature import (
    SIGNATURE,
    SIGNATURE_PATH,
    Signed,
    bundle_facts,
    bundle_of,
    prove_signature,
    read_key,
    require_signed,
)
from hfship.base.errors import HfshipError, IntegrityError, UsageError, command_line
from hfship.base.files import WORK_DIR
from hfship.base.policy import RELEASE, is_role
from hfship.base.processes import run_program
from hfship.base.reading import read_small
from hfship.base.values import dataclass, replace

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.base.manifest import Manifest
    from hfship.base.policy import Policy

SIGNATURES_DIR = f"{WORK_DIR}/signatures"  # in a model folder
REVOKED = "revoked"
MOST_BUNDLES = 100  # beside an archive
_UNTIL = re.compile(r"\.until-(\d{4}-\d{2}-\d{2})\.pem\Z")
_NAME = re.compile(r"(?P<role>[a-z][a-z0-9_]*)-[0-9a-f]{8}\.sig\Z")
_SHORT = 12  # digits of a fingerprint that people read


@dataclass(frozen=True)
class TrustedKey:
    """A key of the site's folder: its file, public key in PEM, fingerprint, the roles in which it
    may sign, and the last day on which it counts ("": any)."""

    file: str
    pem: str
    fingerprint: str
    roles: Tuple[str, ...]
    until: str = ""


@dataclass(frozen=True)
class Trust:
    """The site's folder of keys: those that it trusts by fingerprint, and those it revoked."""

    keys: Mapping[str, TrustedKey]
    revoked: Mapping[str, str]  # fingerprint -> file


@dataclass(frozen=True)
class Approval:
    """One signature: the role, the file of the bundle, the key (its file in the folder of keys, or
    the first digits of its fingerprint), and why it does not count ("": it does)."""

    role: str
    bundle: str
    key: str
    fingerprint: str
    problem: str = ""
    signed: Optional[Signed] = None

    def text(self) -> str:
        """`security (keys/security/kim.pem)`, and why it does not count."""
        text = f"{self.role} ({self.key})"
        if self.problem:
            text += ": "
            text += self.problem
        return text

    def json(self) -> Dict[str, object]:
        """A row of "approvals" in docs/json.md, "verify"."""
        return {
            "role": self.role,
            "bundle": self.bundle,
            "key": self.fingerprint,
            "counts": not self.problem,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Approvals:
    """All signatures of a delivery, and the roles that the site asks for."""

    found: Tuple[Approval, ...] = ()
    required: Tuple[str, ...] = ()

    @property
    def counting(self) -> List[Approval]:
        """Those that count, each key once for a role."""
        by_key = {}
        for one in self.found:
            if not one.problem:
                by_key[(one.role, one.fingerprint)] = one
        return list(by_key.values())

    @property
    def missing(self) -> List[str]:
        """The roles that are asked for and have not signed, each as often as it is missing.

        >>> Approvals((), ("release", "security")).missing
        ['release', 'security']
        """
        roles = [one.role for one in self.counting]
        present = Counter(roles)
        wanted = Counter(self.required)
        lacking = wanted - present
        return sorted(lacking.elements())

    def text(self) -> str:
        """`; approved by release (a.pem), security (b.pem)`, for the end of a sentence; "" for
        none."""
        if not self.counting:
            return ""
        texts = [one.text() for one in self.counting]
        signers = ", ".join(texts)
        return f"; approved by {signers}"


# -- the folder of keys


def read_trust(folder: Optional[Path]) -> Trust:
    """The keys that a site trusts. Raises UsageError for a folder that is none, that anybody may
    write, or that has a key which cannot be read."""
    if folder is None:
        what = "[policy] require asks for signatures, and nothing says whose"
        step = "export HFSHIP_KEYS=DIR, or set keys in [policy]: DIR/ROLE/NAME.pem are public keys"
        raise UsageError(what, "", step)

    _require_private(folder)
    found: Dict[str, TrustedKey] = {}
    revoked: Dict[str, str] = {}
    for place in sorted(folder.iterdir()):
        if not place.is_dir():
            continue
        _require_private(place)
        for path in sorted(place.glob("*.pem")):
            key = _trusted_key(path, folder)
            if place.name == REVOKED:
                revoked[key.fingerprint] = key.file
            elif is_role(place.name):
                known = found.get(key.fingerprint, key)
                roles = (*known.roles, place.name)
                found[key.fingerprint] = replace(known, roles=roles)
    return Trust(found, revoked)


def _require_private(folder: Path) -> None:
    """Refuse a folder of keys into which anybody could put one. Raises UsageError."""
    try:
        mode = os.stat(folder).st_mode
        os.listdir(folder)
    except OSError as exc:
        what = f"the folder of keys {folder} cannot be read"
        raise UsageError(what, exc.strerror or "", "make it: DIR/ROLE/NAME.pem") from exc

    if mode & stat.S_IWOTH:
        what = f"anybody may put keys into {folder}"
        raise UsageError(what, "", command_line("chmod", "o-w", folder))


def _trusted_key(path: Path, folder: Path) -> TrustedKey:
    """A key of the folder, without roles. Raises UsageError."""
    try:
        text = read_small(path).decode("utf-8", "replace")
    except OSError as exc:
        raise UsageError(f"{path} cannot be read", exc.strerror or "", "") from exc
    until = ""
    named = _UNTIL.search(path.name)
    if named:
        until = named[1]
    if "BEGIN CERTIFICATE" in text:
        text, until = _of_certificate(path)
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as stream:
        stream.write(text)
        stream.flush()
        fingerprint = read_key(Path(stream.name)).fingerprint
    return TrustedKey(
        file=str(path.relative_to(folder)),
        pem=text,
        fingerprint=fingerprint,
        roles=(),
        until=until,
    )


def _of_certificate(path: Path) -> Tuple[str, str]:
    """(public key in PEM, last day) of a certificate. Raises UsageError."""
    done = run_program(["openssl", "x509", "-in", str(path), "-noout", "-pubkey", "-enddate"])
    end = re.search(r"notAfter=(.*) GMT", done.out)
    start = done.out.find("-----BEGIN PUBLIC KEY-----")
    stop = done.out.find("-----END PUBLIC KEY-----")
    if done.code or not end or start < 0:
        raise UsageError(f"{path} is no certificate", done.err.strip()[:300], "")
    when = time.strptime(end[1], "%b %d %H:%M:%S %Y")
    pem = done.out[start:stop] + "-----END PUBLIC KEY-----\n"
    return pem, time.strftime("%Y-%m-%d", when)


# -- signatures


def role_name(role: str, fingerprint: str) -> str:
    """The end of the name of a bundle: `security-0123abcd.sig`."""
    short = fingerprint[:8]
    name = f"{role}-{short}"
    return name + SIGNATURE


def archive_bundle(files: ArchiveFiles, role: str, fingerprint: str) -> Path:
    """Where the signature of a role lies beside an archive."""
    ending = role_name(role, fingerprint)
    folder = files.folder
    name = f"{files.name}.{ending}"
    return folder / name


def bundles_beside(files: ArchiveFiles) -> List[Path]:
    """The signatures that lie beside an archive. Raises IntegrityError for a pipe."""
    plain = bundle_of(files)
    found = [plain]
    start = f"{files.name}."
    for path in sorted(files.folder.glob("*.sig")):
        if path.name.startswith(start) and _NAME.match(path.name[len(start) :]):
            found.append(path)
    return [path for path in found if path.is_file()][:MOST_BUNDLES]


def bundles_in(folder: Path) -> List[Path]:
    """The signatures in a model folder."""
    found = [folder / SIGNATURE_PATH]
    for path in sorted((folder / SIGNATURES_DIR).glob("*.sig")):
        if _NAME.match(path.name):
            found.append(path)
    return [path for path in found if path.is_file() and not path.is_symlink()][:MOST_BUNDLES]


def find_approvals(bundles: Sequence[Path], policy: Policy, today: str) -> Approvals:
    """The signatures in some bundles, each proven with the key that the site trusts for it; `today`
    as 2026-11-29. Raises UsageError for the folder of keys."""
    if policy.keys is None and not policy.require:
        return Approvals()

    trust = read_trust(policy.keys)
    found: List[Approval] = []
    for path in bundles:
        approval = _approval(path, trust, today)
        found.append(approval)
    return Approvals(tuple(found), policy.require)


def _approval(path: Path, trust: Trust, today: str) -> Approval:
    """One signature, and whether it counts."""
    try:
        fingerprint, unproven = bundle_facts(path)
    except (ValueError, OSError, HfshipError) as exc:
        problem = f"it cannot be read: {exc}"
        return Approval("?", path.name, "", "", problem[:200])

    role = unproven.role or RELEASE
    key = trust.keys.get(fingerprint)
    shown = f"key {fingerprint[:_SHORT]}"
    if key:
        shown = key.file
    approval = Approval(role, path.name, shown, fingerprint)
    problem = _problem_of(key, fingerprint, role, trust, today)
    if problem or key is None:
        return replace(approval, problem=problem)

    with tempfile.NamedTemporaryFile("w", suffix=".pem") as stream:
        stream.write(key.pem)
        stream.flush()
        try:
            signed = prove_signature(path, Path(stream.name))
        except IntegrityError as exc:
            return replace(approval, problem=f"it is no valid signature: {exc.why}")
    return replace(approval, signed=signed)


def _problem_of(
    key: Optional[TrustedKey], fingerprint: str, role: str, trust: Trust, today: str
) -> str:
    """Why a key does not count, whatever it signed; "" when it may."""
    if fingerprint in trust.revoked:
        return f"its key was revoked: {trust.revoked[fingerprint]}"
    if key is None:
        return "its key is not in the folder of keys"

    if key.until and today > key.until:
        return f"its key expired: it counts until {key.until}"
    if role not in key.roles:
        return f"its key may sign as {', '.join(key.roles)} only"
    return ""


def require_approved(approvals: Approvals, where: object) -> None:
    """Raise IntegrityError where a role that the site asks for has not signed."""
    missing = approvals.missing
    if not missing:
        return
    lines = [f"missing: {', '.join(missing)}"]
    lines += [f"signed: {one.text()}" for one in approvals.found]
    steps = []
    for role in dict.fromkeys(missing):
        steps.append(command_line("hfship", "sign", where, "--as", role, "--key") + " KEY.pem")
    raise IntegrityError(f"{where} is not approved", "\n".join(lines), "\n".join(steps))


def of_manifest(
    approvals: Approvals, manifest: Optional[Manifest], text: bytes, where: Path
) -> Approvals:
    """The signatures, of which those of other files than a manifest lists do not count. Raises
    IntegrityError where that leaves a role missing."""
    if manifest is None:
        return approvals
    checked: List[Approval] = []
    for one in approvals.found:
        if one.signed:
            one = replace(one, problem=_difference(manifest, text, one.signed, where))
        checked.append(one)
    found = replace(approvals, found=tuple(checked))
    require_approved(found, where)
    return found


def _difference(manifest: Manifest, text: bytes, signed: Signed, where: Path) -> str:
    try:
        require_signed(manifest, text, signed, where)
    except IntegrityError as exc:
        return f"it is of other files: {exc.why}"
    return ""


def fitting_bundles(folder: Path, text: bytes) -> Dict[str, Path]:
    """The signatures of roles in a model folder that are of the manifest with this text, by the
    name that they have behind that of an archive."""
    sha256 = hashlib.sha256(text).hexdigest()
    found: Dict[str, Path] = {}
    seen: Set[Path] = {folder / SIGNATURE_PATH}
    for path in bundles_in(folder):
        if path in seen:
            continue
        try:
            _, signed = bundle_facts(path)
        except (ValueError, OSError, HfshipError):
            continue
        if signed.manifest == sha256:
            found[path.name] = path
    return found
