# SPDX-License-Identifier: Apache-2.0
"""Which roles have signed what is verified, unpacked or served, and `hfship sign`."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, Optional

from hfship.base.errors import Exit, IntegrityError, UsageError
from hfship.base.policy import RELEASE, is_role
from hfship.base.values import dataclass
from hfship.commands.options import signing_key
from hfship.commands.results import print_results

if TYPE_CHECKING:
    from hfship.archive.approval import Approvals
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.reader import Archive
    from hfship.base.manifest import Manifest
    from hfship.base.policy import Policy
    from hfship.commands.context import Context


def sign_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship sign`."""
    add = parser.add_argument
    what = "archive or any part of it, model folder, or NAME"
    add("targets", nargs="*", metavar="ARCHIVE|DIR|NAME", help=what)
    key = "private key (ECDSA), or pkcs11:URI of one that stays in its token"
    add("--key", required=True, type=signing_key, metavar="KEY.pem", help=key)
    role = "role in which you sign (default: %(default)s)"
    add("--as", dest="role", type=read_role, default=RELEASE, metavar="ROLE", help=role)


def read_role(text: str) -> str:
    """A role. Raises UsageError."""
    if not is_role(text):
        raise UsageError(f"{text!r} is no role", "", "small letters, digits and _: --as security")
    return text


@dataclass(frozen=True)
class SignedResult:
    """What was signed, by which key, in which role, and where the signature lies."""

    target: Path
    role: str
    fingerprint: str
    bundle: Path
    manifest: Manifest

    def text(self) -> str:
        """`signed TARGET as ROLE: BUNDLE (key 0123456789ab)`"""
        key = self.fingerprint[:12]
        return f"signed {self.target} as {self.role}: {self.bundle} (key {key})"

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "sign"."""
        return {
            "path": str(self.target),
            "name": self.manifest.name,
            "role": self.role,
            "key": self.fingerprint,
            "signature": str(self.bundle),
        }


def cmd_sign(context: Context) -> Exit:
    """Sign archives and model folders in a role."""
    print_results(context, _signed(context))
    return Exit.OK


def _signed(context: Context) -> Iterator[SignedResult]:
    """Sign what is named. Raises NotFoundError, IntegrityError, UsageError, DiskError."""
    from hfship.archive.files import find_archives
    from hfship.commands.names import archive_word, find_model

    settings = context.settings
    places = [settings.package_dir, settings.transfer_dir]
    for target in context.args.targets:
        archives = find_archives(archive_word(target, places), places)
        if archives:
            for files in archives:
                yield sign_archive(files, context)
        else:
            yield sign_folder(find_model(target, settings, places), context)


def sign_archive(files: ArchiveFiles, context: Context) -> SignedResult:
    """Sign what an archive says that it holds. Raises IntegrityError for one that cannot be read or
    is of another program, UsageError for the key, DiskError."""
    from hfship.archive.approval import archive_bundle
    from hfship.archive.custody import log_beside
    from hfship.archive.opening import open_archive
    from hfship.commands.record import recorder_of

    archive = open_archive(files)
    manifest = archive.manifest
    if manifest is None or archive.damages:
        what = f"{files.place} is damaged: what it holds is not known"
        raise IntegrityError(what, "", f"hfship verify {files.place}")
    log = b""
    with contextlib.suppress(OSError):
        log = log_beside(files)
    done = _sign(manifest, log, context, files.place)
    bundle = archive_bundle(files, done.role, done.fingerprint)
    _write(bundle, done.text)
    result = SignedResult(files.place, done.role, done.fingerprint, bundle, manifest)
    details = {"role": done.role, "signature": bundle.name}
    recorder_of(context).note_beside(files, "signed", manifest, details, done.fingerprint)
    return result


def sign_folder(folder: Path, context: Context) -> SignedResult:
    """Sign what the manifest of a model folder lists. Raises IntegrityError, UsageError for a
    folder without one or for the key, DiskError."""
    from hfship.archive.approval import SIGNATURES_DIR, role_name
    from hfship.archive.custody import log_in
    from hfship.base.files import write_below
    from hfship.base.manifest import read_manifest
    from hfship.commands.record import recorder_of

    manifest = read_manifest(folder)
    if manifest is None:
        what = f"{folder} has no manifest, so nothing says what is to be signed"
        raise UsageError(what, "", "fetch, pack or unpack it first")
    log = b""
    with contextlib.suppress(OSError):
        log = log_in(folder)
    done = _sign(manifest, log, context, folder)
    path = f"{SIGNATURES_DIR}/{role_name(done.role, done.fingerprint)}"
    write_below(folder, path, done.text.encode())
    details = {"role": done.role, "signature": path}
    recorder_of(context).note_in_folder(folder, "signed", manifest, details, done.fingerprint)
    return SignedResult(folder, done.role, done.fingerprint, folder / path, manifest)


@dataclass(frozen=True)
class _Signature:
    role: str
    fingerprint: str
    text: str


def _sign(manifest: Manifest, log: bytes, context: Context, where: Path) -> _Signature:
    """The bundle of a role, which also signs the last line of the log of custody."""
    from hfship.archive.custody import read_chain
    from hfship.archive.signature import read_key, sign_manifest

    args = context.args
    fingerprint = read_key(args.key, private=True).fingerprint
    more = {"role": args.role}
    chain = read_chain(log)
    if chain.lines:
        more["custody"] = chain.head
    if chain.problems:
        context.reporter.warn(f"{where}: its log of custody is broken: {chain.problems[0]}")
    return _Signature(args.role, fingerprint, sign_manifest(manifest, args.key, more))


def _write(path: Path, text: str) -> None:
    from hfship.base.files import atomic_write

    atomic_write(path, text)


# -- what the other verbs ask


def approve_archive(files: ArchiveFiles, policy: Policy) -> Optional[Approvals]:
    """The signatures beside an archive, before it is opened; None where nobody asks.

    Raises IntegrityError where a role is missing that the site asks for, UsageError for its folder
    of keys.
    """
    if policy.keys is None and not policy.require:
        return None
    from hfship.archive.approval import bundles_beside, find_approvals, require_approved
    from hfship.base.text import utc_exact

    found = find_approvals(bundles_beside(files), policy, utc_exact()[:10])
    require_approved(found, files.place)
    return found


def approve_content(approvals: Optional[Approvals], archive: Archive) -> Optional[Approvals]:
    """The signatures, after it was looked whether they are of what the archive holds. Raises as
    `approve_archive`."""
    if approvals is None:
        return None
    from hfship.archive.approval import of_manifest

    return of_manifest(approvals, archive.manifest, archive.text, archive.files.place)


def approve_folder(folder: Path, manifest: Manifest, policy: Policy) -> Optional[Approvals]:
    """The signatures in a model folder; None where nobody asks. Raises as `approve_archive`."""
    if policy.keys is None and not policy.require:
        return None
    from hfship.archive.approval import bundles_in, find_approvals, of_manifest
    from hfship.base.text import utc_exact

    found = find_approvals(bundles_in(folder), policy, utc_exact()[:10])
    return of_manifest(found, manifest, manifest.to_json().encode(), folder)


def approve_served(folder: Path, manifest: Optional[Manifest], policy: Policy) -> None:
    """Refuse to serve a folder that lacks signatures which the site asks for. Raises as
    `approve_archive`."""
    if manifest:
        approve_folder(folder, manifest, policy)
    else:
        refuse_unsigned(folder, policy)


def refuse_unsigned(what: object, policy: Policy) -> None:
    """Refuse what cannot have been signed in a role, where the site asks for that. Raises
    IntegrityError."""
    if not policy.require:
        return
    roles = ", ".join(policy.require)
    why = f"[policy] require: {roles}; it is no archive of hfship"
    step = "pack it with hfship, and sign it"
    raise IntegrityError(f"{what} is not approved", why, step)


def keep_signatures(files: ArchiveFiles, folder: Path) -> None:
    """Put the signatures of roles beside an archive into the folder that was made of it. Raises
    DiskError."""
    from hfship.archive.approval import SIGNATURES_DIR, bundles_beside
    from hfship.archive.files import STDIN
    from hfship.archive.signature import LARGEST_BUNDLE, bundle_of
    from hfship.base.files import write_below
    from hfship.base.reading import read_small

    if files.name == STDIN:
        return
    for path in bundles_beside(files):
        if path == bundle_of(files):
            continue
        name = path.name[len(files.name) + 1 :]
        with contextlib.suppress(OSError):
            write_below(folder, f"{SIGNATURES_DIR}/{name}", read_small(path, LARGEST_BUNDLE))


def carry_signatures(folder: Path, manifest: Manifest, archive: str, target: Path) -> None:
    """Put the signatures of roles in a model folder beside the archive that was made of it, those
    that are of this manifest. Raises DiskError."""
    from hfship.archive.approval import fitting_bundles
    from hfship.base.files import atomic_write
    from hfship.base.reading import read_small

    text = manifest.to_json().encode()
    for name, path in fitting_bundles(folder, text).items():
        atomic_write(target / f"{archive}.{name}", read_small(path, 64 << 20))
