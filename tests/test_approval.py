"""Signatures of roles: who may sign as what, what no longer counts, and the whole way with two reviewers."""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest

from conftest import missing
from hfship.archive.approval import Approval, Approvals, bundles_beside, find_approvals, read_trust
from hfship.base.errors import UsageError
from hfship.base.policy import Policy
from support import archives as a
from support import components

if not shutil.which("openssl"):
    missing("openssl")


def make_key(path):
    """A private key at `path`, its public key at path.pub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path]
    subprocess.run(make, check=True)
    public = path.with_suffix(".pub")
    subprocess.run(["openssl", "pkey", "-in", path, "-pubout", "-out", public], check=True)
    return path, public


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Private and public keys, by name."""
    folder = tmp_path_factory.mktemp("pairs")
    return {name: make_key(folder / f"{name}.pem") for name in ("build", "kim", "lee", "eve")}


@pytest.fixture
def trusted(tmp_path, pairs):
    """The site's folder of keys: build releases, kim and lee do security."""
    folder = tmp_path / "trusted"
    for role, name in (("release", "build"), ("security", "kim"), ("security", "lee")):
        (folder / role).mkdir(parents=True, exist_ok=True)
        shutil.copy(pairs[name][1], folder / role / f"{name}.pem")
    (folder / "revoked").mkdir()
    return folder


@pytest.fixture
def packed(tmp_path, hfship, pairs):
    """An archive that build signed when it was packed."""
    a.make_model(tmp_path / "m", {**a.SMALL, "model.safetensors": a.tensors(a.noise(1000))})
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", "--sign", pairs["build"][0])
    return tmp_path / "out/m.tar.zst"


def sign(hfship, target, pair, role, **how):
    return hfship("sign", target, "--key", pair[0], "--as", role, **how)


def test_the_whole_way_with_two_reviewers_of_whom_one_leaves(
    packed, pairs, trusted, tmp_path, hfship
):
    env = {
        "HFSHIP_KEYS": str(trusted),
        "HFSHIP_POLICY_REQUIRE": "release,security",
        "HFSHIP_POLICY_CUSTODY": "true",
    }
    unpack = ("unpack", packed, "-o", tmp_path / "un")
    done = hfship(*unpack, env=env, code=6)
    assert "missing: security" in done.stderr
    assert "signed: release (release/build.pem)" in done.stderr
    assert not (tmp_path / "un").exists()
    sign(hfship, packed, pairs["kim"], "security", env=env)
    assert (
        "approved by release (release/build.pem), security (security/kim.pem)"
        in hfship("verify", packed, env=env).stdout
    )
    # Kim leaves; what Kim signed counts no more, whenever that was.
    shutil.move(trusted / "security/kim.pem", trusted / "revoked/kim.pem")
    done = hfship(*unpack, env=env, code=6)
    assert "its key was revoked: revoked/kim.pem" in done.stderr
    sign(hfship, packed, pairs["lee"], "security", env=env)
    (row,) = json.loads(hfship("verify", packed, "--json", env=env).stdout)
    counts = {one["bundle"]: one["counts"] for one in row["approvals"]}
    assert sorted(counts.values()) == [False, True, True]
    hfship(*unpack, env=env)
    folder = tmp_path / "un/m"
    hfship("verify", folder, env=env)
    hfship("custody", folder)
    done = hfship("serve", folder, "--plan", env={**env, "HFSHIP_POLICY_REQUIRE": "legal"}, code=6)
    assert "missing: legal" in done.stderr


CASES = {  # who signs as what, and why it does not count
    "one who may": ("kim", "security", ""),
    "another role than the key's": ("kim", "release", "its key may sign as security only"),
    "a stranger": ("eve", "security", "its key is not in the folder of keys"),
}


@pytest.mark.parametrize("name", CASES)
def test_who_may_sign_as_what(name, packed, pairs, trusted, hfship):
    key, role, problem = CASES[name]
    sign(hfship, packed, pairs[key], role)
    policy = Policy(keys=trusted)
    found = find_approvals(bundles_beside(a.files_in(packed.parent)), policy, "2026-11-29")
    (one,) = [one for one in found.found if one.bundle != "m.tar.zst.sig"]
    assert (one.role, one.problem) == (role, problem)


@pytest.mark.parametrize(("days_after", "counts"), [(0, True), (1, False)])
@pytest.mark.parametrize("by", ["name", "certificate"])
def test_a_key_expires(by, days_after, counts, packed, pairs, trusted, tmp_path, hfship):
    sign(hfship, packed, pairs["lee"], "security")
    shutil.rmtree(trusted / "security")
    (trusted / "security").mkdir()
    last_day = datetime.now(timezone.utc).date() + timedelta(days=30)
    if by == "name":
        shutil.copy(pairs["lee"][1], trusted / f"security/lee.until-{last_day}.pem")
    else:
        made = ["openssl", "req", "-x509", "-new", "-key", pairs["lee"][0], "-subj", "/CN=lee"]
        target = trusted / "security/lee.pem"
        subprocess.run([*made, "-days", "30", "-out", target], capture_output=True, check=True)
    today = str(last_day + timedelta(days=days_after))
    found = find_approvals(bundles_beside(a.files_in(packed.parent)), Policy(keys=trusted), today)
    (one,) = [one for one in found.found if one.role == "security"]
    assert (one.problem == "") == counts
    assert counts or f"its key expired: it counts until {last_day}" in one.problem


def test_a_signature_of_other_files_does_not_count(packed, pairs, trusted, tmp_path, hfship):
    a.make_model(tmp_path / "other/m", {**a.SMALL, "more": b"1"})
    hfship("pack", tmp_path / "other/m", "-o", tmp_path / "out2")
    sign(hfship, tmp_path / "out2/m.tar.zst", pairs["kim"], "security")
    (bundle,) = (tmp_path / "out2").glob("*security-*.sig")
    shutil.copy(bundle, packed.parent)
    env = {"HFSHIP_KEYS": str(trusted), "HFSHIP_POLICY_REQUIRE": "security"}
    done = hfship("verify", packed, env=env, code=6)
    assert "it is of other files" in done.stderr


@pytest.mark.parametrize("content", ["", "junk", "{}", '{"mediaType": 1}', "[" * 100_000])
def test_what_is_no_signature_does_not_count(content, packed, trusted, hfship):
    packed.with_name("m.tar.zst.security-01234567.sig").write_text(content)
    env = {"HFSHIP_KEYS": str(trusted), "HFSHIP_POLICY_REQUIRE": "security"}
    assert "cannot be read" in hfship("verify", packed, env=env, code=6).stderr


def test_one_signature_counts_once_and_two_of_a_role_can_be_asked_for():
    kim = Approval("security", "a", "kim", "1" * 64)
    lee = Approval("security", "b", "lee", "2" * 64)
    wanted = ("security", "security")
    assert Approvals((kim, kim), wanted).missing == ["security"]
    assert Approvals((kim, lee), wanted).missing == []


def test_folders_of_keys_that_cannot_be_trusted(trusted, tmp_path, hfship, packed):
    with pytest.raises(UsageError, match="nothing says whose"):
        read_trust(None)
    with pytest.raises(UsageError, match="cannot be read"):
        read_trust(tmp_path / "none")
    (trusted / "security").chmod(0o777)
    with pytest.raises(UsageError, match="anybody may put keys"):
        read_trust(trusted)
    (trusted / "security").chmod(0o755)
    (trusted / "security/junk.pem").write_text("junk")
    env = {"HFSHIP_KEYS": str(trusted)}
    hfship("verify", packed, env=env, code=2)


def test_a_signature_of_a_folder_goes_along_when_it_is_packed(pairs, trusted, tmp_path, hfship):
    a.make_model(tmp_path / "m", a.SMALL)
    sign(hfship, tmp_path / "m", pairs["kim"], "security")
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out")
    env = {"HFSHIP_KEYS": str(trusted), "HFSHIP_POLICY_REQUIRE": "security"}
    hfship("verify", tmp_path / "out/m.tar.zst", env=env)
    hfship("push", tmp_path / "out/m.tar.zst", f"{tmp_path}/far/")
    assert list((tmp_path / "far").glob("*security-*.sig"))


def test_what_sign_refuses(packed, pairs, tmp_path, hfship):
    done = hfship("sign", packed, "--key", "pkcs11:token=x;pin-value=1234", code=2)
    assert "1234" not in done.stderr.partition("next")[0]
    with_pin = ("--sign", "pkcs11:token=x;pin-value=1234")
    assert "has its PIN in it" in hfship("pack", tmp_path / "m", *with_pin, code=2).stderr
    hfship("sign", packed, "--key", pairs["kim"][1], code=2)
    hfship("sign", packed, "--key", tmp_path / "none", code=2)
    hfship("sign", packed, "--key", pairs["kim"][0], "--as", "revoked", code=2)
    hfship("sign", tmp_path / "nothing", "--key", pairs["kim"][0], code=5)
    assert not list(packed.parent.glob("*-*.sig"))


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """What openssl needs for a token of SoftHSM with the key `release`: environment, URI and public key."""
    programs = components.require("pkcs11")
    lib = programs.parent / "root/usr/lib/x86_64-linux-gnu"
    folder = tmp_path_factory.mktemp("token")
    (folder / "tokens").mkdir()
    (folder / "pin").write_text("1234")
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\n")
    module = lib / "softhsm/libsofthsm2.so"
    (folder / "openssl.cnf").write_text(
        "openssl_conf = a\n[a]\nproviders = b\n[b]\ndefault = c\npkcs11 = d\n[c]\nactivate = 1\n[d]\nactivate = 1\n"
        f"module = {lib}/ossl-modules/pkcs11.so\npkcs11-module-path = {module}\npkcs11-module-quirks = no-deinit\n"
    )
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SOFTHSM2_CONF": str(folder / "softhsm2.conf"),
        "OPENSSL_CONF": str(folder / "openssl.cnf"),
        "OPENSSL_MODULES": str(lib / "ossl-modules"),
    }
    key, public = make_key(folder / "key.pem")
    pkcs8 = ["openssl", "pkcs8", "-topk8", "-nocrypt", "-in", key, "-out", folder / "pkcs8.pem"]
    subprocess.run(pkcs8, check=True)
    util = ["softhsm2-util", "--module", module, "--pin", "1234"]
    for words in (
        ["--init-token", "--free", "--label", "site", "--so-pin", "5678"],
        ["--import", folder / "pkcs8.pem", "--token", "site", "--label", "release", "--id", "01"],
    ):
        subprocess.run([*util, *words], env={**os.environ, **env}, check=True, capture_output=True)
    key.unlink()
    (folder / "pkcs8.pem").unlink()
    return env, f"pkcs11:token=site;type=private;pin-source=file:{folder}/pin;object=", public


@pytest.mark.real
def test_a_real_token_signs(tmp_path, hfship, token):
    """openssl's pkcs11 provider with SoftHSM: the private key is in the token alone."""
    env, uri, public = token
    a.make_model(tmp_path / "m", a.SMALL)
    release = uri + "release"
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", "--sign", release, env=env)
    archive = tmp_path / "out/m.tar.zst"
    hfship("sign", archive, "--key", release, "--as", "security", env=env)
    for role in ("release", "security"):
        (tmp_path / "keys" / role).mkdir(parents=True)
        shutil.copy(public, tmp_path / "keys" / role / "hsm.pem")
    trusting = {"HFSHIP_KEYS": str(tmp_path / "keys"), "HFSHIP_POLICY_REQUIRE": "release,security"}
    said = hfship("verify", archive, env=trusting).stdout  # with the openssl of this system
    assert "approved by release (release/hsm.pem), security (release/hsm.pem)" in said
    for wrong in (uri + "none", release.replace("/pin;", "/none;")):
        done = hfship("sign", archive, "--key", wrong, env=env, code=2)
        assert "is no private key that can be used" in done.stderr
        assert "must print its public key; a PIN comes by ;pin-source" in done.stderr
        assert "ecparam" not in done.stderr


STUB = """#!{python}
import os, sys
words = sys.argv[1:]
found = [word for word in words if word.startswith("pkcs11:")]
if found:
    at = words.index("-provider")
    assert words[at : at + 4] == ["-provider", "pkcs11", "-provider", "default"], words
    del words[at : at + 4]
    assert found == ["pkcs11:token=site;object=kim;pin-source=file:/run/pin"], found
    words = ["{key}" if word in found else word for word in words]
os.execv("{openssl}", ["openssl", *words])
"""


def test_a_key_in_a_token_is_handed_through_to_openssl(packed, pairs, trusted, tmp_path, hfship):
    """openssl is real but for its provider: what stands in for it takes the key from a file."""
    program = tmp_path / "bin/openssl"
    program.parent.mkdir()
    program.write_text(
        STUB.format(python=sys.executable, key=pairs["kim"][0], openssl=shutil.which("openssl"))
    )
    program.chmod(0o755)
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    uri = "pkcs11:token=site;object=kim;pin-source=file:/run/pin"
    hfship("sign", packed, "--key", uri, "--as", "security", env=env)
    env = {"HFSHIP_KEYS": str(trusted), "HFSHIP_POLICY_REQUIRE": "security"}
    assert "security (security/kim.pem)" in hfship("verify", packed, env=env).stdout
