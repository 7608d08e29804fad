"""§11: OpenSSF model signing, through openssl; the reference implementation as the other side."""

import base64
import json
import shutil
import subprocess

import archives as a
import components
import pytest
from conftest import ROOT, missing

import hfship as h

FILES = {**a.SMALL, ".gitattributes": b"*.bin lfs", "w.safetensors": a.noise(2 << 20)}


def make_key(folder, curve="prime256v1"):
    folder.mkdir(exist_ok=True)
    private, public = folder / "key.pem", folder / "pub.pem"
    if not shutil.which("openssl"):
        missing("openssl")
    subprocess.run(["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", private], check=True)
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
    fingerprint = h.public_key(keys[1])[1]
    assert f"signed by {fingerprint}" in hfship("verify", signed, "--key", keys[1]).stdout
    assert f"signed by {fingerprint}" in hfship("unpack", signed, "-o", tmp_path / "un", "--key", keys[1]).stderr
    assert f"signed by {fingerprint}" in hfship("verify", tmp_path / "un/m", "--key", keys[1]).stdout
    openssl = subprocess.run(["sha256sum", keys[1]], capture_output=True, text=True, check=True).stdout
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
def test_a_changed_signature_stops_before_anything_is_decompressed(what, signed, keys, tmp_path, monkeypatch):
    signature, key = signed.with_name("m.tar.zst.sig"), keys[1]
    if what == "key":
        key = make_key(tmp_path / "others")[1]
    elif what == "junk":
        signature.write_text("junk")
    else:
        signature.write_text(json.dumps(change(json.loads(signature.read_text()), what)))
    monkeypatch.setattr(h, "open_archive", lambda *_: pytest.fail("it was read"))
    with pytest.raises(h.IntegrityError, match="no valid signature"):
        h.open_trusted(a.files_in(signed.parent), key)


def test_every_changed_byte_of_a_signature_is_found_or_means_nothing(signed, keys):
    signature = signed.with_name("m.tar.zst.sig")
    said = h.prove_signature(signature, keys[1])
    for offset in range(0, signature.stat().st_size, 17):
        with a.flipped(signature, offset, 1 << offset % 7):
            try:
                assert h.prove_signature(signature, keys[1]) == said
            except h.IntegrityError:
                pass


def test_an_archive_of_other_files_than_signed_is_refused(signed, keys, tmp_path, hfship):
    for number, files in enumerate(({**FILES, "config.json": b"other"}, {**FILES, "more": b"1"}, {"empty": b""})):
        a.make_model(tmp_path / str(number) / "m", files)
        hfship("pack", tmp_path / str(number) / "m", "-o", tmp_path / f"out{number}")
        shutil.copy(signed.with_name("m.tar.zst.sig"), tmp_path / f"out{number}")
        done = hfship("unpack", tmp_path / f"out{number}", "-o", tmp_path / "un", "--key", keys[1], code=6)
        assert "is not what was signed" in done.stderr and not (tmp_path / "un/m").exists()


@pytest.mark.parametrize("curve", ["secp224r1", "secp256k1", "not a key"])
def test_keys_that_cannot_be_used_are_refused(curve, tmp_path, hfship, signed):
    private, public = make_key(tmp_path / "k", curve if " " not in curve else "prime256v1")
    if " " in curve:
        private.write_text("junk"), public.write_text("junk")
    done = hfship("pack", tmp_path / "m", "-o", tmp_path / "out2", "--sign", private, code=2)
    assert not list(tmp_path.glob("out2/*.tar.zst*"))  # said before the work
    assert "no private key that can be used" in done.stderr
    assert "no public key that can be used" in hfship("verify", signed, "--key", public, code=2).stderr


@pytest.fixture(scope="session")
def model_signing():
    return components.require("model-signing")


VECTORS = ROOT / "tests/fixtures/oms"
PUBLISHED_KEY = VECTORS / "signing-key-pub.pem"


@pytest.mark.parametrize("version", ["v0.3.1", "v1.0.0", "v1.0.1", "v1.1.0"])
def test_published_bundles_of_every_version_are_proven(version, tmp_path):
    folder = VECTORS / f"{version}-elliptic-key"
    signed = h.prove_signature(folder / "model.sig", PUBLISHED_KEY)
    single = version < "v1.0.1"  # the model was one file, which they call "."
    files = {"." if single else path.name: h.sha256_file(path) for path in folder.glob("signme*")}
    assert signed.files == files
    bundle = json.loads((folder / "model.sig").read_bytes())
    assert signed.fingerprint == bundle["verificationMaterial"]["publicKey"].get("hint", signed.fingerprint)
    with pytest.raises(h.IntegrityError, match="no valid signature"):
        h.prove_signature(folder / "model.sig", make_key(tmp_path / "k", "secp384r1")[1])


@pytest.mark.parametrize("path", sorted(VECTORS.glob("v1.0/*/*.json")), ids=lambda path: path.name[:-12])
def test_published_vectors_of_the_specification(path):
    if path.name == "key.bundle.json":
        signed = h.prove_signature(path, PUBLISHED_KEY)
        assert set(signed.files) == {"signme-1", "signme-2"} and "ignore-me" in signed.ignored
    else:  # not valid, or valid with a certificate, which only those can prove who have its authority's
        with pytest.raises(h.IntegrityError, match="no valid signature"):
            h.prove_signature(path, PUBLISHED_KEY)


def test_a_predicate_of_another_type_is_refused_even_if_it_is_signed(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(h, "OMS_PREDICATE", "https://example.com/wrong-predicate/v1.0")
    text = h.sign_manifest(a.make_model(tmp_path / "m", a.SMALL), keys[0])
    monkeypatch.undo()
    (tmp_path / "s").write_text(text)
    with pytest.raises(h.IntegrityError, match="no valid signature"):
        h.prove_signature(tmp_path / "s", keys[1])


@pytest.mark.real
@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_every_curve_of_the_specification_works_both_ways(curve, model_signing, tmp_path):
    private, public = make_key(tmp_path / "keys", curve)
    manifest = a.make_model(tmp_path / "m", FILES)
    shutil.move(tmp_path / "m/.hfship", tmp_path / "kept")
    (tmp_path / "ours").write_text(h.sign_manifest(manifest, private))
    argv = [model_signing, "verify", "key", "--public_key", public, "--signature", tmp_path / "ours", tmp_path / "m"]
    subprocess.run(argv, check=True)
    argv = [model_signing, "sign", "key", "--private_key", private, "--signature", tmp_path / "theirs", tmp_path / "m"]
    subprocess.run(argv, check=True)
    h.require_signed(manifest, h.prove_signature(tmp_path / "theirs", public), tmp_path)


@pytest.mark.real
def test_the_reference_implementation_accepts_ours(model_signing, signed, keys, tmp_path, hfship):
    hfship("unpack", signed, "-o", tmp_path / "un")
    argv = [model_signing, "verify", "key", "--public_key", keys[1], "--signature", f"{signed}.sig", tmp_path / "un/m"]
    subprocess.run(argv, check=True)
    (tmp_path / "un/m/config.json").write_bytes(b"{}")
    assert subprocess.run(argv, check=False).returncode
    (tmp_path / "un/m/config.json").write_bytes(FILES["config.json"])
    (tmp_path / "un/m/extra").write_bytes(b"")
    assert subprocess.run(argv, check=False).returncode


@pytest.mark.real
def test_we_accept_the_reference_implementation(model_signing, keys, tmp_path, hfship):
    a.make_model(tmp_path / "m", FILES)
    argv = [model_signing, "sign", "key", "--private_key", keys[0], "--signature", tmp_path / "m/.hfship/model.sig"]
    subprocess.run([*argv, "--ignore-paths", tmp_path / "m/.hfship", tmp_path / "m"], check=True)
    hfship("verify", tmp_path / "m", "--key", keys[1])
    h.write_manifest(tmp_path / "m", h.make_manifest("m", h.read_manifest(tmp_path / "m").files[:-1]))
    hfship("verify", tmp_path / "m", "--key", keys[1], code=6)
