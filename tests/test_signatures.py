"""OpenSSF model signing, through openssl; the reference implementation as the other side."""

import base64
import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, missing
from hfship.archive.signature import (
    DSSE_TYPE,
    OMS_BUNDLE,
    Signed,
    _digest_of_all,
    _statement,
    open_trusted,
    prove_signature,
    read_key,
    require_signed,
    sign_manifest,
)
from hfship.base.errors import IntegrityError
from hfship.base.files import sha256_file
from hfship.base.manifest import (
    MANIFEST_PATH,
    FileEntry,
    Source,
    make_manifest,
    read_manifest,
    write_manifest,
)
from support import archives as a
from support import components

FILES = {**a.SMALL, ".gitattributes": b"*.bin lfs", "w.safetensors": a.tensors(a.noise(2 << 20))}


def make_key(folder, curve="prime256v1"):
    folder.mkdir(exist_ok=True)
    private, public = folder / "key.pem", folder / "pub.pem"
    if not shutil.which("openssl"):
        missing("openssl")
    subprocess.run(
        ["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", private], check=True
    )
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@pytest.fixture
def keys(tmp_path):
    return make_key(tmp_path / "keys")


@pytest.fixture
def signed(tmp_path, keys, hfship):
    a.make_model(tmp_path / "m", FILES)
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", "--sign", keys[0])
    return tmp_path / "out" / "m.tar.zst"


def test_signature_is_proven_and_its_key_named(signed, keys, tmp_path, hfship):
    fingerprint = read_key(keys[1]).fingerprint
    assert f"signed by {fingerprint}" in hfship("verify", signed, "--key", keys[1]).stdout
    assert (
        f"signed by {fingerprint}"
        in hfship("unpack", signed, "-o", tmp_path / "un", "--key", keys[1]).stderr
    )
    assert (
        f"signed by {fingerprint}" in hfship("verify", tmp_path / "un/m", "--key", keys[1]).stdout
    )
    openssl = subprocess.run(
        ["sha256sum", keys[1]], capture_output=True, text=True, check=True
    ).stdout
    assert openssl.startswith(fingerprint)


def test_only_a_key_that_is_given_makes_a_signature_necessary(signed, keys, tmp_path, hfship):
    signature = signed.with_name("m.tar.zst.sig")
    signature.unlink()
    hfship("verify", signed)
    for env, arguments in (({}, ["--key", keys[1]]), ({"HFSHIP_KEY": str(keys[1])}, [])):
        for command in (["verify", signed], ["unpack", signed, "-o", tmp_path / "un"]):
            done = hfship(*command, *arguments, env=env, code=6)
            assert "m.tar.zst.sig is missing" in done.stderr
    assert not (tmp_path / "un").exists()


def change(bundle, what):
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    if what == "payload":
        statement["predicate"]["resources"][0]["digest"] = "0" * 64
        envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    elif what == "signature":
        envelope["signatures"][0]["sig"] = base64.b64encode(b"0" * 70).decode()
    elif what == "type":
        envelope["payloadType"] = "text/plain"
    elif what == "none":
        envelope["signatures"] = []
    return bundle


@pytest.mark.parametrize("what", ["payload", "signature", "type", "none", "junk", "key"])
def test_a_changed_signature_stops_before_anything_is_decompressed(
    what, signed, keys, tmp_path, monkeypatch
):
    signature, key = signed.with_name("m.tar.zst.sig"), keys[1]
    if what == "key":
        key = make_key(tmp_path / "others")[1]
    elif what == "junk":
        signature.write_text("junk")
    else:
        signature.write_text(json.dumps(change(json.loads(signature.read_text()), what)))
    monkeypatch.setattr(
        "hfship.archive.signature.open_archive", lambda *_: pytest.fail("it was read")
    )
    with pytest.raises(IntegrityError, match="no valid signature"):
        open_trusted(a.files_in(signed.parent), key)


def test_every_changed_byte_of_a_signature_is_found_or_means_nothing(signed, keys):
    signature = signed.with_name("m.tar.zst.sig")
    said = prove_signature(signature, keys[1])
    for offset in range(0, signature.stat().st_size, 17):
        with a.flipped(signature, offset, 1 << offset % 7):
            try:
                assert prove_signature(signature, keys[1]) == said
            except IntegrityError:
                pass


def test_an_archive_of_other_files_than_signed_is_refused(signed, keys, tmp_path, hfship):
    for number, files in enumerate(
        ({**FILES, "config.json": b"other"}, {**FILES, "more": b"1"}, {"empty": b""})
    ):
        a.make_model(tmp_path / str(number) / "m", files)
        hfship("pack", tmp_path / str(number) / "m", "-o", tmp_path / f"out{number}")
        shutil.copy(signed.with_name("m.tar.zst.sig"), tmp_path / f"out{number}")
        done = hfship(
            "unpack", tmp_path / f"out{number}", "-o", tmp_path / "un", "--key", keys[1], code=6
        )
        assert "is not what was signed" in done.stderr and not (tmp_path / "un/m").exists()


def like(manifest, **changes):
    """Another manifest with the same files."""
    return dataclasses.replace(manifest, **changes)


SOURCE = Source("https://huggingface.co", "org/a", "main", "org/a", "a" * 40)
OTHERS = {
    "name": {"name": "b"},
    "repo": {"source": dataclasses.replace(SOURCE, repo="org/b", resolved_repo="org/b")},
    "commit": {"source": dataclasses.replace(SOURCE, commit="b" * 40)},
    "endpoint": {"source": dataclasses.replace(SOURCE, endpoint="https://elsewhere")},
    "no source": {"source": None},
    "left out": {"left_out": 1},
    "unproven": {"unproven": True},
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_signature_is_of_one_name_source_and_commit(change, keys, tmp_path, hfship):
    folder = tmp_path / "a"
    write_manifest(folder, like(a.make_model(folder, FILES), source=SOURCE))
    hfship("pack", folder, "-o", tmp_path / "out", "--sign", keys[0])
    signature = tmp_path / "out/a.tar.zst.sig"

    other = like(read_manifest(folder), **OTHERS[change])
    write_manifest(folder, other)
    hfship("pack", folder, "-o", tmp_path / "evil")
    (tmp_path / "evil" / f"{other.name}.tar.zst.sig").write_bytes(signature.read_bytes())
    evil = tmp_path / "evil" / f"{other.name}.tar.zst"
    for command in (
        ["verify", evil],
        ["verify", "--quick", evil],
        ["unpack", evil, "-o", tmp_path / "un"],
    ):
        assert "not what was signed" in hfship(*command, "--key", keys[1], code=6).stderr
    assert not list((tmp_path / "un").glob("*"))

    (folder / ".hfship/model.sig").write_bytes(signature.read_bytes())
    assert "not what was signed" in hfship("verify", folder, "--key", keys[1], code=6).stderr


def sign_content(manifest, key, monkeypatch):
    """A bundle as hfship 0.1.0 made it, and as other programs do: without the manifest."""

    def content_statement(manifest):
        statement = _statement(manifest)
        files = [one for one in statement["predicate"]["resources"] if one["name"] != MANIFEST_PATH]
        statement["predicate"]["resources"] = files
        digest = _digest_of_all(one["digest"] for one in files)
        statement["subject"][0]["digest"]["sha256"] = digest
        return statement

    with monkeypatch.context() as before:
        before.setattr("hfship.archive.signature._statement", content_statement)
        return sign_manifest(manifest, key)


def test_a_signature_without_the_manifest_vouches_for_content_and_says_so(
    signed, keys, tmp_path, hfship, monkeypatch
):
    text = sign_content(read_manifest(tmp_path / "m"), keys[0], monkeypatch)
    signed.with_name("m.tar.zst.sig").write_text(text)
    un = tmp_path / "un"
    said = hfship("verify", signed, "--key", keys[1]).stdout
    said += hfship("unpack", signed, "-o", un, "--key", keys[1]).stderr
    said += hfship("verify", un / "m", "--key", keys[1]).stdout
    assert said.count("its content alone: name, source and commit are not signed") == 3


@pytest.mark.parametrize(
    "extra",
    [
        "more.safetensors",
        ".gitattributes2",
        ".github/x",
        ".cache/x",
        ".git/config",
        "sub/.git/config",
    ],
)
def test_files_beside_those_that_were_signed_are_refused_with_a_key(
    extra, signed, keys, tmp_path, hfship
):
    hfship("unpack", signed, "-o", tmp_path / "un")
    path = tmp_path / "un/m" / extra
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("x")
    for command in (["verify", tmp_path / "un/m"], ["unpack", signed, "-o", tmp_path / "un"]):
        done = hfship(*command, "--key", keys[1], code=6)
        assert "nobody signed" in done.stderr
        assert extra.replace(".git/config", ".git") in done.stderr
    hfship("verify", tmp_path / "un/m")


def test_content_that_was_not_read_is_not_called_signed(signed, keys, hfship):
    said = hfship("verify", "--quick", signed, "--key", keys[1]).stdout
    assert "signed by" not in said and "vouches for the manifest" in said


def test_a_pipe_has_no_signature(signed, keys, tmp_path, hfship):
    shutil.copy(f"{signed}.sig", tmp_path / "-.sig")
    for command in (["verify", "-"], ["unpack", "-", "-o", tmp_path / "un"]):
        with signed.open("rb") as stream:
            done = hfship(*command, "--key", keys[1], cwd=tmp_path, stdin=stream, code=6)
        assert "pipe brings no signature" in done.stderr
    with signed.open("rb") as stream:
        hfship("unpack", "-", "-o", tmp_path / "un", cwd=tmp_path, stdin=stream)
    assert not (tmp_path / "un/m/.hfship/model.sig").exists()


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_key_is_an_error(value, signed, tmp_path, hfship):
    hfship("unpack", signed, "-o", tmp_path / "un")
    for command in (
        ["verify", signed],
        ["verify", tmp_path / "un/m"],
        ["unpack", signed, "-o", tmp_path / "un2"],
    ):
        done = hfship(*command, env={"HFSHIP_KEY": value}, code=2)
        assert "HFSHIP_KEY is empty" in done.stderr
    assert not (tmp_path / "un2").exists()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
def test_a_signature_or_key_that_is_no_file_is_not_read(kind, signed, keys, tmp_path, hfship):
    hfship("unpack", signed, "-o", tmp_path / "un")
    a.no_file(signed.with_name("m.tar.zst.sig"), kind)
    for command in (["verify", signed], ["unpack", signed, "-o", tmp_path / "un2"]):
        done = hfship(*command, "--key", keys[1], code=6, timeout=60)
        assert "no valid signature" in done.stderr
    hfship("unpack", signed, "-o", tmp_path / "un2")
    assert not (tmp_path / "un2/m/.hfship/model.sig").exists()

    a.no_file(tmp_path / "un/m/.hfship/model.sig", kind)
    hfship("verify", tmp_path / "un/m", "--key", keys[1], code=6, timeout=60)
    a.no_file(keys[1], kind)
    done = hfship("verify", signed, "--key", keys[1], code=2, timeout=60)
    assert "no public key that can be used" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        "1" + "0" * 5000,
        "[" + "{}," * (1 << 21) + "0]",
        "null",
        "[]",
        '{"mediaType": NaN}',
    ],
    ids=["nested", "objects", "digits", "many", "null", "list", "NaN"],
)
def test_a_bundle_or_payload_that_is_made_to_harm_is_refused(text, keys, tmp_path):
    envelope = {
        "payload": base64.b64encode(text.encode()).decode(),
        "payloadType": DSSE_TYPE,
        "signatures": [{"sig": ""}],
    }
    bundle = {
        "mediaType": OMS_BUNDLE,
        "verificationMaterial": {"publicKey": {}},
        "dsseEnvelope": envelope,
    }
    for number, content in enumerate((text, json.dumps(bundle))):
        path = tmp_path / str(number)
        path.write_text(content)
        with pytest.raises(IntegrityError, match="no valid signature"):
            prove_signature(path, keys[1])


@pytest.mark.parametrize(
    "listed, signed_files, right",
    [
        ({"w": 1, ".git/config": 2}, {"w": 1}, True),  # left out
        ({"w": 1, "mine/notes/a": 2}, {"w": 1}, True),  # left out by this signature
        ({"w": 1, ".github": 2}, {"w": 1}, False),  # .git is another folder
        ({"w": 1, "sub/.git/config": 2}, {"w": 1}, False),  # not at the top
        ({"w": 1, ".git/config": 2}, {"w": 1, ".git/config": 2}, True),
        ({"w": 1, ".git/config": 2}, {"w": 1, ".git/config": 3}, False),  # signed all the same
        ({"w": 1}, {"w": 1, ".git/config": 3}, False),  # signed and missing
        ({"w": 1}, {"w": 2}, False),
        ({"w": 1, "more": 1}, {"w": 1}, False),
        ({}, {"w": 1}, False),
    ],
)
def test_what_a_signature_leaves_out_must_be_right_where_it_is_signed(listed, signed_files, right):
    entries = [FileEntry(path, 1, f"{number:064x}") for path, number in listed.items()]
    files = {path: f"{number:064x}" for path, number in signed_files.items()}
    found = Signed(files, (".git", "mine/notes"), "fingerprint")
    if right:
        require_signed(make_manifest("m", entries), b"", found, Path("m"))
    else:
        with pytest.raises(IntegrityError, match="not what was signed"):
            require_signed(make_manifest("m", entries), b"", found, Path("m"))


@pytest.mark.parametrize("curve", ["secp224r1", "secp256k1", "not a key"])
def test_keys_that_cannot_be_used_are_refused(curve, tmp_path, hfship, signed):
    private, public = make_key(tmp_path / "k", curve if " " not in curve else "prime256v1")
    if " " in curve:
        private.write_text("junk"), public.write_text("junk")
    done = hfship("pack", tmp_path / "m", "-o", tmp_path / "out2", "--sign", private, code=2)
    assert not list(tmp_path.glob("out2/*.tar.zst*"))  # said before the work
    assert "no private key that can be used" in done.stderr
    assert (
        "no public key that can be used" in hfship("verify", signed, "--key", public, code=2).stderr
    )


@pytest.fixture(scope="session")
def model_signing():
    return components.require("model-signing")


VECTORS = ROOT / "tests/fixtures/oms"
PUBLISHED_KEY = VECTORS / "signing-key-pub.pem"


@pytest.mark.parametrize("version", ["v0.3.1", "v1.0.0", "v1.0.1", "v1.1.0"])
def test_published_bundles_of_every_version_are_proven(version, tmp_path):
    folder = VECTORS / f"{version}-elliptic-key"
    signed = prove_signature(folder / "model.sig", PUBLISHED_KEY)
    single = version < "v1.0.1"  # the model was one file, which they call "."
    files = {"." if single else path.name: sha256_file(path) for path in folder.glob("signme*")}
    assert signed.files == files
    bundle = json.loads((folder / "model.sig").read_bytes())
    assert signed.fingerprint == bundle["verificationMaterial"]["publicKey"].get(
        "hint", signed.fingerprint
    )
    with pytest.raises(IntegrityError, match="no valid signature"):
        prove_signature(folder / "model.sig", make_key(tmp_path / "k", "secp384r1")[1])


@pytest.mark.parametrize(
    "path", sorted(VECTORS.glob("v1.0/*/*.json")), ids=lambda path: path.name[:-12]
)
def test_published_vectors_of_the_specification(path):
    if path.name == "key.bundle.json":
        signed = prove_signature(path, PUBLISHED_KEY)
        assert set(signed.files) == {"signme-1", "signme-2"} and "ignore-me" in signed.ignored
    else:  # not valid, or valid with a certificate, which only those can prove who have its authority's
        with pytest.raises(IntegrityError, match="no valid signature"):
            prove_signature(path, PUBLISHED_KEY)


def test_a_predicate_of_another_type_is_refused_even_if_it_is_signed(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hfship.archive.signature.OMS_PREDICATE", "https://example.com/wrong-predicate/v1.0"
    )
    text = sign_manifest(a.make_model(tmp_path / "m", a.SMALL), keys[0])
    monkeypatch.undo()
    (tmp_path / "s").write_text(text)
    with pytest.raises(IntegrityError, match="no valid signature"):
        prove_signature(tmp_path / "s", keys[1])


@pytest.mark.real
@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_every_curve_of_the_specification_works_both_ways(curve, model_signing, tmp_path):
    private, public = make_key(tmp_path / "keys", curve)
    manifest = a.make_model(tmp_path / "m", FILES)
    (tmp_path / "ours").write_text(sign_manifest(manifest, private))
    argv = [
        model_signing,
        "verify",
        "key",
        "--public_key",
        public,
        "--signature",
        tmp_path / "ours",
        tmp_path / "m",
    ]
    subprocess.run(argv, check=True)
    shutil.move(tmp_path / "m/.hfship", tmp_path / "kept")
    argv = [
        model_signing,
        "sign",
        "key",
        "--private_key",
        private,
        "--signature",
        tmp_path / "theirs",
        tmp_path / "m",
    ]
    subprocess.run(argv, check=True)
    require_signed(manifest, b"", prove_signature(tmp_path / "theirs", public), tmp_path)


@pytest.mark.real
def test_the_reference_implementation_accepts_ours(model_signing, signed, keys, tmp_path, hfship):
    hfship("unpack", signed, "-o", tmp_path / "un")
    argv = [
        model_signing,
        "verify",
        "key",
        "--public_key",
        keys[1],
        "--signature",
        f"{signed}.sig",
        tmp_path / "un/m",
    ]
    subprocess.run(argv, check=True)
    (tmp_path / "un/m/config.json").write_bytes(b"{}")
    assert subprocess.run(argv, check=False).returncode
    (tmp_path / "un/m/config.json").write_bytes(FILES["config.json"])
    (tmp_path / "un/m/extra").write_bytes(b"")
    assert subprocess.run(argv, check=False).returncode


@pytest.mark.real
def test_we_accept_the_reference_implementation(model_signing, keys, tmp_path, hfship):
    a.make_model(tmp_path / "m", FILES)
    argv = [
        model_signing,
        "sign",
        "key",
        "--private_key",
        keys[0],
        "--signature",
        tmp_path / "m/.hfship/model.sig",
    ]
    subprocess.run([*argv, "--ignore-paths", tmp_path / "m/.hfship", tmp_path / "m"], check=True)
    hfship("verify", tmp_path / "m", "--key", keys[1])
    write_manifest(tmp_path / "m", make_manifest("m", read_manifest(tmp_path / "m").files[:-1]))
    hfship("verify", tmp_path / "m", "--key", keys[1], code=6)
