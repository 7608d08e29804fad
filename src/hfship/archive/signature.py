# SPDX-License-Identifier: Apache-2.0
"""Signatures.

Owns who vouches for a model: a bundle of OpenSSF model signing (OMS 1.0) with an ECDSA key,
NAME.tar.zst.sig beside an archive and NAME/.hfship/model.sig in a model folder. openssl does the
cryptography. In short (docs/formats.md, "Signature", in full):

  bundle    JSON: "mediaType"; "verificationMaterial": {"publicKey": {"hint": fingerprint},
            "tlogEntries": []}; "dsseEnvelope": {"payload": base64, "payloadType",
            "signatures": [{"sig": base64 of DER, "keyid": ""}]}
  signed    "DSSEv1 28 application/vnd.in-toto+json LENGTH PAYLOAD"
  payload   in-toto statement: subject NAME with the SHA-256 of all digests, one after the other;
            predicate with "serialization" (method "files") and "resources": name and SHA-256 of
            every file and of .hfship/manifest.json, sorted by name
  fingerprint  SHA-256 of the public key's PEM text, in hex

What OMS leaves out by default (.git, .gitattributes, .gitignore, .github at the top) is no
resource: programs of OMS would miss it. The manifest vouches for it, as for name, source and
commit. Bundles of other programs and of hfship 0.1.0 do not sign the manifest: they vouch for
content alone, and `Signed.signer` says so.

Promises: with a key, nothing of an archive is decompressed before its signature is proven, and what
is restored is what was signed. Never: takes a trusted key from the archive or from beside it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

from hfship.archive.files import STDIN
from hfship.archive.opening import open_archive
from hfship.archive.reader import ForeignArchive
from hfship.base.below import Refused
from hfship.base.errors import IntegrityError, UsageError, command_line
from hfship.base.files import WORK_DIR, disk_error, disk_errors, write_below
from hfship.base.manifest import MANIFEST_PATH, FileEntry
from hfship.base.processes import run_program
from hfship.base.reading import LIST_SIZE, parse_json, read_below, read_small
from hfship.base.text import shorten
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.archive.files import ArchiveFiles
    from hfship.archive.media import MediaChange
    from hfship.archive.reader import Archive
    from hfship.archive.unpack_foreign import ForeignModel
    from hfship.base.manifest import Manifest

SIGNATURE = ".sig"  # suffix of the bundle beside an archive
SIGNATURE_PATH = f"{WORK_DIR}/model.sig"  # in a model folder
OMS_PREDICATE = "https://model_signing/signature/v1.0"
OMS_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
# What a bundle of ours tells others to leave out: what they leave out by default, and what lies in
# our folder beside the manifest.
OMS_IGNORED = (".git", ".gitattributes", ".github", ".gitignore", ".cache")
_OUR_STATE = (
    "consumed",
    "custody.jsonl",
    "delta.json",
    "journal",
    "lease",
    "lock",
    "model.sig",
    "names",
    "partial",
    "restore.py",
    "signatures",
    "verified.jsonl",
    "work-folder",
)
IGNORED = (*OMS_IGNORED, *(f"{WORK_DIR}/{name}" for name in _OUR_STATE))
LARGEST_BUNDLE = 64 << 20  # bytes: those of 200,000 files
DSSE_TYPE = "application/vnd.in-toto+json"

# Hash of a signature by the curve of its key, which the DER of a public key begins with (in base64)
CURVES = {
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE": "sha256",  # P-256
    "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAE": "sha384",  # P-384
    "MIGbMBAGByqGSM49AgEGBSuBBAAjA4GGAAQ": "sha512",  # P-521
}
PKCS11 = "pkcs11:"  # how a URI of RFC 7512 begins
MAKE_KEYS = (
    "openssl ecparam -name prime256v1 -genkey -noout -out KEY; "
    "openssl pkey -in KEY -pubout -out PUB"
)
# Of a key in a token, which openssl itself must be able to reach.
PKCS11_HELP = "must print its public key; a PIN comes by ;pin-source=file:PATH"


@dataclass(frozen=True)
class Key:
    """What a key file says: the hash that is signed with it ("sha256"), and the fingerprint of its
    public key."""

    hash_name: str
    fingerprint: str


@dataclass(frozen=True)
class Signed:
    """What a proven signature says: the files that were signed (path -> SHA-256), paths that it
    leaves out, and the fingerprint of the key; the name of the model and the SHA-256 of the
    manifest's text, both "" where it does not sign the manifest."""

    files: Mapping[str, str]
    ignored: Tuple[str, ...]
    fingerprint: str
    name: str = ""
    manifest: str = ""
    role: str = ""  # in which somebody signed, where that is said
    custody: str = ""  # SHA-256 of the last line of the log of custody at that time

    @property
    def signer(self) -> str:
        """Who vouches for what, for people: behind "signed by"."""
        if self.manifest:
            return self.fingerprint
        return f"{self.fingerprint}, its content alone: name, source and commit are not signed"


@dataclass(frozen=True)
class _Envelope:
    """The signed part of a bundle, decoded but not proven."""

    payload: bytes
    payload_type: str
    signature: bytes  # DER


def is_of_hardware(key: Union[Path, str]) -> bool:
    """Whether a key stays in a token or HSM: a URI of RFC 7512, for openssl's provider."""
    text = str(key)
    return text.startswith(PKCS11)


def _providers(key: Union[Path, str]) -> List[str]:
    """Options of openssl that bring what a key of hardware needs (provider(7))."""
    if is_of_hardware(key):
        return ["-provider", "pkcs11", "-provider", "default"]
    return []


def read_key(path: Union[Path, str], private: bool = False) -> Key:
    """A key file in PEM, or a key of hardware by its pkcs11: URI. Raises UsageError for what is
    none, or is on another curve."""
    if not is_of_hardware(path):
        _require_file(Path(path), private)
    argv = [
        "openssl",
        "pkey",
        "-in",
        str(path),
        "-pubout",
        *_providers(path),
    ]
    if not private:
        argv.append("-pubin")

    done = run_program(argv)
    pem = done.out
    hash_name = _hash_of_curve(pem)
    if done.code or not hash_name:
        kind = "private" if private else "public"
        why = done.err.strip()
        if not why:
            why = "it is no ECDSA key on the curve P-256, P-384 or P-521"
        step = MAKE_KEYS
        if is_of_hardware(path):
            step = f"{command_line(*argv)}   {PKCS11_HELP}"
        raise UsageError(f"{path} is no {kind} key that can be used", why, step)

    fingerprint = hashlib.sha256(pem.encode()).hexdigest()
    return Key(hash_name, fingerprint)


def _require_file(path: Path, private: bool) -> None:
    """Refuse what openssl would wait for, or read without end. Raises UsageError."""
    kind = "private" if private else "public"
    try:
        read_small(path)
    except OSError as exc:
        what = f"{path} is no {kind} key that can be used"
        raise UsageError(what, exc.strerror or str(exc), MAKE_KEYS) from exc


def _hash_of_curve(pem: str) -> str:
    """The hash that a public key in PEM signs with; "" for a key on another curve, or for none."""
    lines = pem.split("\n")
    body = "".join(lines[1:-2])  # without BEGIN and END
    for start, name in CURVES.items():
        if body.startswith(start):
            return name
    return ""


def trusted_key() -> Optional[Path]:
    """The public key that this site asks every archive to be signed with: HFSHIP_KEY.

    Raises UsageError when that is set to nothing: a mistake must not pass for "no key is asked".
    """
    found = os.environ.get("HFSHIP_KEY")
    if found is None:
        return None
    if not found.strip():
        why = "it names the public key that all archives of this site must be signed with"
        step = "set it to the path of PUB.pem; or, to ask for no signature: unset HFSHIP_KEY"
        raise UsageError("HFSHIP_KEY is empty", why, step)
    return Path(found)


# -- sign


def sign_manifest(
    manifest: Manifest, key: Union[Path, str], more: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """The bundle for a manifest; `more` stands in its predicate, and is signed as well. Raises
    UsageError for a key that cannot sign."""
    statement = _statement(manifest)
    predicate = statement["predicate"]
    predicate.update(more)
    return sign_statement(statement, key)


def sign_statement(statement: Mapping[str, Any], key: Union[Path, str]) -> str:
    """The bundle for an in-toto statement. Raises UsageError for a key that cannot sign."""
    found = read_key(key, private=True)
    payload = json.dumps(statement, ensure_ascii=False).encode()
    argv = ["openssl", "dgst", f"-{found.hash_name}", "-hex", "-sign", str(key), *_providers(key)]
    done = run_program(argv, _signed_bytes(payload))
    if done.code:
        raise UsageError(f"cannot sign with {key}", done.err.strip(), "give another --sign KEY.pem")

    signature = bytes.fromhex(done.out.split()[-1])
    bundle = {
        "mediaType": OMS_BUNDLE,
        "verificationMaterial": {
            "publicKey": {"hint": found.fingerprint},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": DSSE_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle) + "\n"


def _statement(manifest: Manifest) -> Dict[str, Any]:
    """The in-toto statement about a manifest and its files."""
    text = manifest.to_json().encode()
    files = [FileEntry(MANIFEST_PATH, len(text), hashlib.sha256(text).hexdigest())]
    for entry in manifest.files:
        if not _is_ignored(entry.path, IGNORED):
            files.append(entry)

    files.sort(key=lambda entry: entry.path.encode())
    digest = _digest_of_all(entry.sha256 for entry in files)
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": manifest.name, "digest": {"sha256": digest}}],
        "predicateType": OMS_PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(IGNORED),
            },
            "resources": [_resource(entry) for entry in files],
        },
    }


def _resource(entry: FileEntry) -> Dict[str, str]:
    return {
        "name": entry.path,
        "algorithm": "sha256",
        "digest": entry.sha256,
    }


def _digest_of_all(digests: Iterable[str]) -> str:
    """Hex SHA-256 of digests (hex), of which each counts as its 32 bytes."""
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(bytes.fromhex(digest))
    return whole.hexdigest()


def _signed_bytes(payload: bytes) -> bytes:
    """What is signed: the payload and its type, unambiguously (DSSE v1, "PAE")."""
    type_length = len(DSSE_TYPE)
    header = f"DSSEv1 {type_length} {DSSE_TYPE} {len(payload)} "
    return header.encode() + payload


# -- prove


def prove_signature(path: Path, key: Path) -> Signed:
    """What the bundle at `path` says, proven with a public key. Raises IntegrityError; UsageError
    for the key."""
    public = read_key(key)
    next_step = "get the signature and the public key again from who packed the model"
    try:
        bundle = parse_json(_bundle_at(path))
        envelope = _read_envelope(bundle)
        if envelope.payload_type != DSSE_TYPE or not _was_signed(envelope, key, public):
            raise ValueError(
                f"it was not made with this key, whose fingerprint is {public.fingerprint}"
            )
        statement = parse_json(envelope.payload)
        return _read_statement(statement, public.fingerprint)
    except FileNotFoundError as exc:
        why = "a signature is asked for by --key or HFSHIP_KEY"
        raise IntegrityError(f"{path} is missing", why, next_step) from exc
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as exc:
        raise IntegrityError(f"{path} is no valid signature", str(exc), next_step) from exc


def _bundle_at(path: Path) -> bytes:
    """The text of a bundle. Raises FileNotFoundError, ValueError for what is no file or too large,
    DiskError."""
    try:
        return read_small(path, LARGEST_BUNDLE)
    except FileNotFoundError:
        raise
    except Refused as exc:
        raise ValueError(exc.strerror) from exc
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc


def _read_envelope(bundle: Any) -> _Envelope:
    """The envelope in a bundle that was parsed. Raises ValueError, KeyError, TypeError, IndexError
    or AttributeError, as for any JSON that is of another form."""
    by_key = bundle["mediaType"] == OMS_BUNDLE
    if not by_key or "publicKey" not in bundle.get("verificationMaterial", ()):
        raise ValueError("it is no bundle of a signature by a plain key")

    envelope = bundle["dsseEnvelope"]
    payload = envelope["payload"]
    signature = envelope["signatures"][0]["sig"]
    return _Envelope(
        payload=base64.b64decode(payload, validate=True),
        payload_type=envelope["payloadType"],
        signature=base64.b64decode(signature, validate=True),
    )


def _was_signed(envelope: _Envelope, key: Path, public: Key) -> bool:
    """Whether the payload has a right signature by a public key, of which `key` is the file."""
    import tempfile  # loads much, and few are signed

    with tempfile.NamedTemporaryFile() as stream:
        stream.write(envelope.signature)
        stream.flush()
        argv = [
            "openssl",
            "dgst",
            f"-{public.hash_name}",
            "-verify",
            str(key),
            "-signature",
            stream.name,
        ]
        done = run_program(argv, _signed_bytes(envelope.payload))

    return done.code == 0


def _read_statement(statement: Any, fingerprint: str) -> Signed:
    """What a statement says, if OMS 1.0 accepts it. Raises ValueError, and as `_read_envelope`."""
    predicate = statement["predicate"]
    serialization = predicate["serialization"]
    resources = predicate["resources"]
    kind = statement["predicateType"]
    method = serialization["method"]
    if kind != OMS_PREDICATE or method != "files":
        raise ValueError(f"it signs by {kind} {method}, not {OMS_PREDICATE} files")

    for resource in resources:
        if resource["algorithm"] != "sha256":
            raise ValueError("a file was not hashed with SHA-256")

    digest = _digest_of_all(resource["digest"] for resource in resources)
    subjects = [subject["digest"]["sha256"] for subject in statement["subject"]]
    if subjects != [digest]:
        raise ValueError("the digest of all files is wrong")

    ignored = map(str, serialization.get("ignore_paths", ()))
    files = {str(resource["name"]): str(resource["digest"]) for resource in resources}
    manifest = files.pop(MANIFEST_PATH, "")
    name = ""
    if manifest:
        name = str(statement["subject"][0]["name"])
    return Signed(
        files=files,
        ignored=(*OMS_IGNORED, WORK_DIR, *ignored),
        fingerprint=fingerprint,
        name=name,
        manifest=manifest,
        role=str(predicate.get("role", "")),
        custody=str(predicate.get("custody", "")),
    )


def bundle_facts(path: Path) -> Tuple[str, Signed]:
    """(fingerprint that a bundle names, what it says), none of it proven. Raises ValueError, also
    for what is no bundle; DiskError, FileNotFoundError."""
    try:
        bundle = parse_json(_bundle_at(path))
        key = bundle["verificationMaterial"]["publicKey"]
        hint = str(key["hint"])
        envelope = _read_envelope(bundle)
        statement = parse_json(envelope.payload)
        return hint, _read_statement(statement, hint)
    except (KeyError, TypeError, IndexError, AttributeError) as exc:
        raise ValueError(f"it is no bundle of a signature: {exc}") from exc


def require_signed(manifest: Manifest, text: bytes, signed: Signed, where: Path) -> None:
    """Raise IntegrityError unless a manifest, of which `text` are the bytes, is what was signed, or
    lists just what was signed where it is not.

    Files that the signature leaves out may be listed, but one that is signed all the same must be
    right.
    """
    if signed.manifest:
        _require_signed_manifest(manifest, text, signed, where)
    listed = {entry.path: entry.sha256 for entry in manifest.files}
    wrong: List[str] = []
    for path in {*listed, *signed.files}:
        if path not in signed.files and _is_ignored(path, signed.ignored):
            continue
        if listed.get(path) != signed.files.get(path):
            wrong.append(path)

    if wrong:
        raise IntegrityError(
            f"{where} is not what was signed",
            f"other than signed, not signed, or missing: {shorten(sorted(wrong))}",
            "get the archive and its signature again",
        )


def _require_signed_manifest(manifest: Manifest, text: bytes, signed: Signed, where: Path) -> None:
    """Raise IntegrityError for other files, another name, source or commit than was signed."""
    sha256 = hashlib.sha256(text).hexdigest()
    if manifest.name == signed.name and sha256 == signed.manifest:
        return
    why = "its name, source, commit or list of files is another"
    if manifest.name != signed.name:
        why = f"{signed.name} was signed, this says it is {manifest.name}"
    raise IntegrityError(
        f"{where} is not what was signed", why, "get the archive and its signature again"
    )


def folder_signature(
    folder: Path, manifest: Optional[Manifest], key: Optional[Path]
) -> Optional[Signed]:
    """The signature of a model folder, proven with `key` or HFSHIP_KEY; None without either.

    Raises IntegrityError, UsageError for the key.
    """
    key = key or trusted_key()
    if key is None:
        return None
    if manifest is None:
        why = "it has no manifest, and a signature is asked for by --key or HFSHIP_KEY"
        raise IntegrityError(f"nobody signed {folder}", why, "fetch or unpack the model again")

    signed = prove_signature(folder / SIGNATURE_PATH, key)
    with disk_errors("read", folder / MANIFEST_PATH):
        text = read_below(folder, MANIFEST_PATH, LIST_SIZE)
    require_signed(manifest, text, signed, folder)
    return signed


def _is_ignored(path: str, ignored: Iterable[str]) -> bool:
    """Whether a path is one of `ignored`, or lies below one.

    >>> [_is_ignored(path, [".git"]) for path in (".git", ".git/config", ".github")]
    [True, True, False]
    """
    return any(path == prefix or path.startswith(prefix + "/") for prefix in ignored)


def bundle_of(files: ArchiveFiles) -> Path:
    """Where the bundle of an archive lies. Raises IntegrityError for a pipe, which has none."""
    if files.name == STDIN:
        raise IntegrityError(
            "an archive that comes through a pipe brings no signature",
            "a signature is asked for by --key or HFSHIP_KEY",
            "put it into a folder, with NAME.tar.zst.sig beside it, and name the file",
        )
    return files.folder / (files.name + SIGNATURE)


def keep_bundle(files: ArchiveFiles, folder: Path) -> None:
    """Put the bundle of an archive into the model folder that was made of it, if there is one.

    Whoever asks for a key proves it there. Raises DiskError.
    """
    if files.name == STDIN:
        return
    with contextlib.suppress(FileNotFoundError, ValueError):
        write_below(folder, SIGNATURE_PATH, _bundle_at(bundle_of(files)))


def open_trusted(
    files: ArchiveFiles, key: Optional[Path], media: Optional[MediaChange] = None
) -> Tuple[Union[Archive, ForeignModel], Optional[Signed]]:
    """Open an archive, of whatever program.

    With a key, or HFSHIP_KEY, only once its signature is proven, and only if it holds what was
    signed. Raises IntegrityError, UsageError for the key, and as open_archive.
    """
    key = key or trusted_key()
    signed = None
    if key:
        read_key(key)  # what is wrong with it is said before what is wrong with the archive
        signed = prove_signature(bundle_of(files), key)
    try:
        archive = open_archive(files, media)
    except ForeignArchive as exc:
        if signed:
            why = "its signature can be proven only for archives of hfship"
            raise IntegrityError(exc.what, why) from exc
        stream = exc.stream
    else:
        if signed and archive.manifest:
            require_signed(archive.manifest, archive.text, signed, files.path)
        return archive, signed

    # Not in the handler: while the exception is alive, so is what was read of the stream till then.
    from hfship.archive.unpack_foreign import ForeignModel  # few archives are of other programs

    return ForeignModel(files, stream), None
