"""fetch docker://: registries, their logins and faults, resume and repair, and what lies in an image folder."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Program, free_port, missing, program
from hfship.base.errors import HostError, UsageError
from hfship.base.imagefacts import KIND, read_facts
from hfship.base.manifest import Source
from hfship.hub.answers import refused_signature, sent_on
from hfship.hub.registry_login import RegistryLogin, find_login, known_cas
from hfship.hub.registry_protocol import (
    Descriptor,
    choose_platform,
    endpoint_of,
    is_local,
    parse_challenge,
    parse_config,
    parse_image_manifest,
    parse_index,
    parse_reference,
)
from support.network import make_certificate
from support.registry import (
    MANIFEST,
    FaultRegistry,
    Image,
    digest,
    dumps,
    make_image,
    noise,
    real_registry,
    small_image,
)
from support.tokens import SigningCdn, TokenService

MB = 1_000_000
IMAGE, ARM = small_image(), small_image(seed=1, architecture="arm64")


@pytest.fixture
def hfship(tmp_path: Path) -> Program:
    return program("source", tmp_path / "home")


@pytest.fixture
def registry() -> Iterator[FaultRegistry]:
    """A registry on loopback with org/app:1 for two platforms."""
    with FaultRegistry() as server:
        server.add_index({"amd64": IMAGE, "arm64": ARM})
        yield server


def image_at(registry: FaultRegistry, tag: str = ":1") -> str:
    return f"docker://{registry.host}/org/app{tag}"


def fetch_words(registry: FaultRegistry, out: Path, *more: Any) -> List[Any]:
    return ["fetch", image_at(registry), "-o", out, "--platform", "linux/amd64", *more]


def blobs_of(folder: Path) -> Dict[str, bytes]:
    blobs = folder / "blobs/sha256"
    return {f"sha256:{path.name}": path.read_bytes() for path in blobs.iterdir()}


def holds(folder: Path, image: Image = IMAGE) -> bool:
    """Whether a folder holds an image, every blob under its digest, and nothing unfinished."""
    found = blobs_of(folder)
    whole = all(digest(content) == name for name, content in found.items())
    return whole and {*image.blobs, image.digest} <= {*found} and not partials(folder)


def partials(folder: Path) -> List[Path]:
    return list((folder / ".hfship").glob("partial/*"))


# ---- from several places, and who did it

# name: (faults of the mirror, faults of the registry, whether the registry gives manifests)
MIRRORED: Dict[str, Tuple[Dict[str, Any], Dict[str, Any], bool]] = {
    "the mirror has all": ({}, {"missing": IMAGE.layers}, False),
    "the registry gives nothing": ({}, {"answer": (500, {}, b"")}, False),
    "the mirror wants a login": ({"basic": True, "user": "a:b"}, {}, True),
    "the mirror fails": ({"answer": (500, {}, b"")}, {}, True),
    "the mirror pulls no more": ({"limit": {"Retry-After": "30000"}}, {}, True),
    "the mirror names another digest": ({"wrong_digest": True}, {}, True),
    "the mirror has no layer": ({"missing": IMAGE.layers}, {}, False),
    "the mirror flips a layer": ({"flip": IMAGE.layers[0], "flip_times": 9}, {}, False),
}


@pytest.mark.parametrize("name", MIRRORED)
def test_a_mirror_is_asked_first_and_the_registry_where_that_fails(
    name: str, hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    of_mirror, of_registry, asks = MIRRORED[name]
    registry.faults.tokens = True
    with FaultRegistry() as mirror:
        mirror.add_index({"amd64": IMAGE, "arm64": ARM})
        vars(mirror.faults).update(of_mirror)
        vars(registry.faults).update(of_registry)
        hfship(*fetch_words(registry, tmp_path, "--mirror", mirror.url))
        assert holds(tmp_path / "app_1")
        assert not any(sent for _, _, sent in mirror.requests), "a token went to the mirror"
        assert any("/manifests/" in path for _, path, _ in mirror.requests)
        asked = any(
            "/manifests/" in path for method, path, _ in registry.requests if method == "GET"
        )
        assert asked == asks


def test_a_mirror_that_is_gone_is_done_without(
    hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    with FaultRegistry() as gone:
        url = gone.url
    hfship(*fetch_words(registry, tmp_path, "--mirror", url))
    assert holds(tmp_path / "app_1")


def test_the_log_of_custody_says_where_an_image_came_from(
    hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    env = {"HFSHIP_POLICY_CUSTODY": "true"}
    hfship(*fetch_words(registry, tmp_path), env=env)
    hfship(*fetch_words(registry, tmp_path), env=env)
    (row,) = json.loads(hfship("custody", tmp_path / "app_1", "--json", env=env).stdout)
    (line,) = row["lines"]
    assert line["event"] == "fetched"
    assert line["details"]["reference"] == f"{registry.host}/org/app:1"


# ---- what comes, and how often is asked


def test_an_image_comes_through_tokens_and_a_cdn_with_one_get_for_each_manifest(
    pyz: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    registry.faults.tokens = registry.faults.cdn = True
    (row,) = json.loads(pyz(*fetch_words(registry, tmp_path, "--json")).stdout)
    folder = tmp_path / "app_1"
    assert holds(folder) and row["kind"] == "image"
    manifest = json.loads((folder / ".hfship/manifest.json").read_text())
    assert manifest["kind"] == "image" and manifest["image"] == row["image"]
    assert manifest["image"]["diff_ids"] == IMAGE.diff_ids
    assert manifest["image"]["manifest_digest"] == IMAGE.digest
    assert manifest["image"]["config_digest"] == IMAGE.config
    (top,) = json.loads((folder / "index.json").read_text())["manifests"]
    assert top["annotations"]["io.containerd.image.name"] == f"{registry.host}/org/app:1"
    (classic,) = json.loads((folder / "manifest.json").read_text())
    assert [f"sha256:{path[13:]}" for path in classic["Layers"]] == IMAGE.layers
    with_token = [target for _, target, sent in registry.requests if sent]
    manifests = [target for target in with_token if "/manifests/" in target]
    assert len(manifests) == len(set(manifests)) == 2
    cdn = [sent for _, target, sent in registry.requests if "/cdn/" in target]
    assert cdn and not any(cdn), "a token went to the CDN"


def test_a_rerun_asks_what_the_tag_means_and_gets_nothing(
    hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    hfship(*fetch_words(registry, tmp_path))
    before = (tmp_path / "app_1/.hfship/manifest.json").read_bytes()
    registry.requests.clear()
    assert "nothing to fetch" in hfship(*fetch_words(registry, tmp_path)).stdout
    assert {method for method, target, _ in registry.requests if "/v2/o" in target} == {"HEAD"}
    assert (tmp_path / "app_1/.hfship/manifest.json").read_bytes() == before


def test_a_tag_that_moved_is_told_and_old_layers_go(
    hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    hfship(*fetch_words(registry, tmp_path))
    newer = small_image(seed=7)
    registry.add_index({"amd64": newer})
    said = hfship(*fetch_words(registry, tmp_path)).stdout
    assert "the tag moved" in said and holds(tmp_path / "app_1", newer)
    assert IMAGE.layers[0] not in blobs_of(tmp_path / "app_1")
    kept = {name for name in newer.layers if name in IMAGE.layers}
    assert kept, "both share a layer"
    assert sum(target.endswith(IMAGE.layers[1]) for _, target, _ in registry.requests) == 1


def test_list_shows_what_an_image_says_of_itself(
    hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    image = small_image(labels={"org.opencontainers.image.version": "1.2\x1b[31m"})
    index = json.loads(registry.add_index({"amd64": image}))
    said = {"vnd.docker.reference.digest": image.digest}
    index["manifests"][-1]["annotations"] = said
    registry.manifests["org/app", "1"] = dumps(index)
    hfship(*fetch_words(registry, hfship.home / "models"))
    shown = hfship("list", "app_1").stdout
    assert image.digest not in shown and image.config in shown and "\x1b" not in shown
    assert "label org.opencontainers.image.version" in shown and "in the registry: " in shown
    row = json.loads(hfship("list", f"{registry.host}/org/app:1", "--json").stdout)
    assert row["attestation"] == "sha256:" + "0" * 64 and row["image"]["diff_ids"] == image.diff_ids
    assert "list knows no app_2" in hfship("list", "app_2", code=2).stderr


def test_layers_that_another_image_has_are_taken_from_there(
    hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    base = noise(3 * MB)
    first, second = make_image([base]), make_image([base, b"x" * 10240])
    registry.add(first, "org/a")
    registry.add(second, "org/b")
    hfship("fetch", f"docker://{registry.host}/org/a:1", "-o", tmp_path)
    hfship("fetch", f"docker://{registry.host}/org/b:1", "-o", tmp_path)
    assert sum(target.endswith(first.layers[0]) for _, target, _ in registry.requests) == 1
    assert holds(tmp_path / "b_1", second)


LOGIN = {"auths": {"HOST": {"auth": base64.b64encode(b"me:pass word").decode()}}}

# name -> (faults, options of the image, docker's config.json)
SURVIVED: Dict[str, Tuple[Dict[str, Any], Dict[str, Any], Any]] = {
    "Range ignored": ({"ignore_range": True}, {}, None),
    "Range ignored by a CDN": ({"ignore_range": True, "cdn": True}, {}, None),
    "addresses at a CDN that end": ({"cdn": True, "cdn_refuses": 2}, {}, None),
    "cut": ({"cut": 3}, {}, None),
    "flipped once": ({"flip": IMAGE.layers[0], "flip_times": 1}, {}, None),
    "tokens for one request each": ({"tokens": True, "token_uses": 1}, {}, None),
    "429": ({"too_many": 2}, {}, None),
    "zstd layers": ({}, {"compression": "zstd"}, None),
    "plain layers": ({}, {"compression": "plain"}, None),
    "Basic": ({"basic": True, "user": "me:pass word"}, {}, LOGIN),
    "tokens for a user": ({"tokens": True, "user": "me:pass word"}, {}, LOGIN),
}


@pytest.mark.parametrize("name", SURVIVED)
def test_fetch_survives(
    name: str, registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    faults, options, config = SURVIVED[name]
    image = small_image(**options) if options else IMAGE
    registry.add(image)
    vars(registry.faults).update(faults)
    if config:
        (hfship.home / ".docker").mkdir()
        text = json.dumps(config).replace("HOST", registry.host)
        (hfship.home / ".docker/config.json").write_text(text)
    done = hfship(*fetch_words(registry, tmp_path / "out"))
    assert holds(tmp_path / "out/app_1", image)
    assert "pass word" not in done.stdout + done.stderr


SCHEMA_1 = dumps({"schemaVersion": 1, "name": "org/app", "fsLayers": []})
ARTIFACT = dumps(
    {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": "application/vnd.example",
        "config": {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": "sha256:" + "a" * 64,
            "size": 2,
        },
        "layers": [],
    }
)
LIMIT = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600"}

# name -> (faults, words in place of the image or beside it, exit code, words of the message)
REFUSED: Dict[str, Tuple[Dict[str, Any], List[str], int, List[str]]] = {
    "unknown image": ({}, ["docker://HOST/org/nothing:1"], 5, ["NAME_UNKNOWN", "check the name"]),
    "unknown tag": ({}, ["docker://HOST/org/app:2"], 5, ["MANIFEST_UNKNOWN", "it has 1"]),
    "unknown digest": ({}, [f"docker://HOST/org/app@sha256:{'e' * 64}"], 5, ["does not have"]),
    "no such name": ({}, ["docker://HOST/Org/App"], 2, ["small letters"]),
    "short digest": ({}, ["docker://HOST/org/app@sha256:12"], 2, ["64 hex digits"]),
    "wrong digest": ({"wrong_digest": True}, [], 6, ["sends another manifest", "11111"]),
    "flipped again and again": (
        {"flip": IMAGE.layers[0], "flip_times": 99},
        [],
        6,
        ["arrives damaged", IMAGE.layers[0][7:]],
    ),
    "a layer is missing": ({"missing": [IMAGE.layers[0]]}, [], 5, ["BLOB_UNKNOWN", "pushed"]),
    "no login": ({"basic": True, "user": "a:b"}, [], 4, ["wants a login", "docker login HOST"]),
    "no token without login": ({"tokens": True, "user": "a:b"}, [], 4, ["wants a login"]),
    "wrong password": (
        {"tokens": True, "user": "a:b"},
        ["--registry-user", "a", "--registry-password-file", "FILE"],
        4,
        ["refuses the login of --registry-user a"],
    ),
    "user without password": ({}, ["--registry-user", "a"], 2, ["--registry-password-file"]),
    "pull limit": ({"limit": LIMIT}, [], 8, ["0 of 100 pulls left", "docker login HOST"]),
    "no platform": ({}, ["--platform", "linux/s390x"], 9, ["linux/amd64, linux/arm64"]),
    "schema 1": ({"answer": (200, {}, SCHEMA_1)}, [], 6, ["schema 1"]),
    "no manifest": ({"answer": (200, {}, b"<html>")}, [], 6, ["cannot be used as an image"]),
    "an artifact": ({"answer": (200, {}, ARTIFACT)}, [], 2, ["application/vnd.example"]),
    "too large": ({"answer": (200, {}, b" " * (5 << 20))}, [], 8, ["too large"]),
    "aria2": ({}, ["--engine", "aria2"], 2, ["aria2 fetches no images"]),
    "flags of models": ({}, ["--include", "*"], 2, ["--include is for models"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fetch_refuses(name: str, registry: FaultRegistry, hfship: Program, tmp_path: Path) -> None:
    faults, words, code, said = REFUSED[name]
    vars(registry.faults).update(faults)
    (tmp_path / "password").write_text("wrong\n")
    given = [
        w.replace("HOST", registry.host).replace("FILE", f"{tmp_path}/password") for w in words
    ]
    if not any(word.startswith("docker:") for word in given):
        given.append(image_at(registry))
    if "--platform" not in given:
        given += ["--platform", "linux/amd64"]
    done = hfship("fetch", *given, "-o", tmp_path / "out", code=code)
    for text in said:
        assert text.replace("HOST", registry.host) in done.stderr
    assert not list((tmp_path / "out").glob("*/.hfship/manifest.json"))
    assert "wrong" not in done.stderr or name != "wrong password"


@pytest.mark.parametrize("error", [sent_on, refused_signature])
def test_where_a_cdn_refuses_a_layer_no_other_hub_is_advised(error: Any) -> None:
    name = "r.example/app"
    source = Source("https://r.example", name, "1", name, "", repo_type=KIND)
    step = error(403, "https://cdn.example/a", "blobs/sha256/1", source).next_step
    assert "firewall blocks cdn.example" in step and "hfship" not in step


def test_an_image_for_another_platform_is_told_though_the_tag_has_no_index(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    registry.add(ARM)
    done = hfship(*fetch_words(registry, tmp_path), code=9)
    assert "is an image for linux/arm64, not for linux/amd64" in done.stderr
    hfship("fetch", image_at(registry), "-o", tmp_path, "--platform", "linux/arm64")
    assert holds(tmp_path / "app_1", ARM)


# ---- kills and damage


def test_a_killed_fetch_goes_on_inside_a_layer(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    size = 24 * MB
    image = make_image([noise(size)], "plain")
    registry.add(image)
    registry.faults.rate_bps = 8 * MB
    process = hfship.start(*fetch_words(registry, tmp_path, "-j", 2))
    while registry.blob_bytes < size / 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "app_1/.hfship/manifest.json").exists()
    (journal,) = (tmp_path / "app_1/.hfship/partial").glob("*.now")
    arrived = sum(stop - start for start, stop in json.loads(journal.read_text())["written"])
    before = registry.settled()
    registry.faults.rate_bps = 0
    hfship(*fetch_words(registry, tmp_path))
    assert holds(tmp_path / "app_1", image)
    twice = registry.blob_bytes - before - (size - arrived)
    assert arrived > size / 3 and twice < 0.02 * size, (arrived, twice)


def test_what_rots_is_found_and_only_that_is_fetched(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    image = make_image([noise(12 * MB), noise(3 * MB, 2)], "plain")
    registry.add(image)
    hfship(*fetch_words(registry, tmp_path))
    victim = tmp_path / "app_1/blobs/sha256" / image.layers[0][7:]
    content = bytearray(victim.read_bytes())
    content[9 * MB] ^= 1
    victim.write_bytes(bytes(content))
    done = hfship(*fetch_words(registry, tmp_path, "--verify"), code=6)
    assert image.layers[0][7:] in done.stderr and "--repair" in done.stderr
    before = registry.blob_bytes
    hfship(*fetch_words(registry, tmp_path, "--repair"))
    assert registry.blob_bytes - before < 9 * MB and holds(tmp_path / "app_1", image)


def test_a_folder_of_something_else_stays(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    registry.add(IMAGE, "other/app")
    hfship(*fetch_words(registry, tmp_path))
    other = f"docker://{registry.host}/other/app:1"
    done = hfship("fetch", other, "-o", tmp_path, "--platform", "linux/amd64", code=2)
    assert "holds something else" in done.stderr and holds(tmp_path / "app_1")


# ---- logins

HELPER = """#!/bin/sh
read host
[ "$host" = "r.example:5000" ] || exit 1
echo '{"ServerURL": "x", "Username": "USER", "Secret": "s3cret"}'
"""
AUTH = base64.b64encode(b"u:p").decode()

# name -> (config.json, user of the helper, what is found: user, password, identity token)
LOGINS: Dict[str, Tuple[Any, str, Any]] = {
    "auth": ({"auths": {"r.example:5000": {"auth": AUTH}}}, "", ("u", "p", "")),
    "with https": ({"auths": {"https://r.example:5000": {"auth": AUTH}}}, "", ("u", "p", "")),
    "of a part": ({"auths": {"r.example:5000/org": {"auth": AUTH}}}, "", ("u", "p", "")),
    "identity token": (
        {"auths": {"r.example:5000": {"auth": AUTH, "identitytoken": "i"}}},
        "",
        ("u", "p", "i"),
    ),
    "another host": ({"auths": {"r.example": {"auth": AUTH}}}, "", None),
    "helper for it": ({"credHelpers": {"r.example:5000": "test"}}, "joe", ("joe", "s3cret", "")),
    "helper for all": ({"credsStore": "test"}, "joe", ("joe", "s3cret", "")),
    "helper with a token": ({"credsStore": "test"}, "<token>", ("", "", "s3cret")),
    "helper that is not there": ({"credsStore": "none"}, "", None),
    "helper that is a path": ({"credsStore": "../../bin/sh"}, "", None),
    "empty": ({}, "", None),
    "a list": ([], "", None),
    "no base64": ({"auths": {"r.example:5000": {"auth": "?"}}}, "", None),
}


@pytest.mark.parametrize("name", LOGINS)
def test_logins_are_found_where_docker_keeps_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, user, wanted = LOGINS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    helper = tmp_path / "docker-credential-test"
    helper.write_text(HELPER.replace("USER", user))
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    env = {"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    found = find_login("r.example:5000", "r.example:5000/org/app", env, lambda _: None)
    assert (found[:3] if found else None) == wanted


def entry(platform: str) -> Descriptor:
    """Of an index."""
    return Descriptor("application/json", f"sha256:{platform:0>64}", 1, {}, platform)


@pytest.mark.parametrize(
    ("there", "found", "step"),
    [
        (["linux/arm64", "linux/amd64"], "linux/amd64", ""),
        (["linux/amd64/v2", "linux/amd64"], "linux/amd64", ""),
        (["linux/amd64/v3", "linux/amd64/v2"], "linux/amd64/v3", ""),
        (["linux/amd64v2", "linux/arm64"], "", "give one of them with --platform"),
        (["", ""], "", "name another tag"),
        ([], "", "name another tag"),
    ],
)
def test_which_of_an_index_is_for_a_platform(there: List[str], found: str, step: str) -> None:
    entries = [entry(platform) for platform in there]
    if found:
        assert choose_platform(entries, "linux/amd64", "org/app").platform == found
        return
    with pytest.raises(HostError) as told:
        choose_platform(entries, "linux/amd64", "org/app")
    assert told.value.next_step == step and "no image for linux/amd64" in told.value.what
    named = ", ".join(filter(None, there)) or "nothing that can run"
    assert told.value.why == f"it is there for: {named}"


def test_docker_hub_has_a_key_of_its_own(tmp_path: Path) -> None:
    config = {"auths": {"https://index.docker.io/v1/": {"auth": AUTH}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    env = {"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    found = find_login("docker.io", "docker.io/library/busybox", env, lambda _: None)
    assert found and found.user == "u"


def test_cas_of_docker_are_believed_for_their_registry(tmp_path: Path) -> None:
    place = tmp_path / ".docker/certs.d/r.example:5000"
    place.mkdir(parents=True)
    (place / "ca.crt").write_text("x")
    env = {"HOME": str(tmp_path)}
    assert list(known_cas("r.example:5000", env)) == [str(place / "ca.crt")]
    assert not list(known_cas("r.example", env))


def test_a_password_of_one_letter_does_not_tear_words(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    registry.faults.tokens, registry.faults.user = True, "a:b"
    (tmp_path / "password").write_text("b\n")
    login = ["--registry-user", "a", "--registry-password-file", tmp_path / "password"]
    hfship(*fetch_words(registry, tmp_path, *login))
    assert holds(tmp_path / "app_1")


def test_a_login_does_not_show_its_password() -> None:
    login = RegistryLogin("me", "secret", "", "config.json")
    assert "secret" not in repr(login) and "secret" not in f"{login}"


# ---- what strangers send

REFERENCES = {
    "docker://vllm/vllm-openai:v1": "docker.io/vllm/vllm-openai:v1",
    "docker://busybox": "docker.io/library/busybox:latest",
    "docker://docker.io/busybox:1": "docker.io/library/busybox:1",
    "docker://index.docker.io/a/b": "docker.io/a/b:latest",
    "docker://localhost/a": "localhost/a:latest",
    "docker://host:5000/a/b/c:x": "host:5000/a/b/c:x",
    "docker://quay.io/a/b@sha256:" + "a" * 64: "quay.io/a/b:sha256-aaaaaaaaaaaa",
    "docker://[::1]:5000/a:1": "[::1]:5000/a:1",
}
NO_REFERENCES = [
    *(
        "docker://",
        "docker:///a",
        "docker://A/b",
        "docker://a/../b",
        "docker://a:b:c",
        "docker://h:5000/",
    ),
    *(
        "docker://a b",
        "docker://a@sha256:x",
        "docker://a@",
        "docker://" + "a" * 300,
        "docker://a:" + "t" * 129,
    ),
    *("docker://-x/a", "docker://u:p@host/a", "docker://a/b?x=1", "docker://a\n"),
]


@pytest.mark.parametrize("text", REFERENCES)
def test_references_are_read_as_docker_reads_them(text: str) -> None:
    assert parse_reference(text).local_reference == REFERENCES[text]


@pytest.mark.parametrize("text", NO_REFERENCES)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@given(st.text(max_size=60))
def test_any_text_is_a_reference_that_reads_back_or_refused(text: str) -> None:
    try:
        reference = parse_reference(f"docker://{text}")
    except UsageError:
        return
    assert parse_reference(reference.url) == reference
    assert "/" not in reference.folder_name and len(reference.folder_name) <= 96


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3)
    ),
)
FIELDS = (
    "manifests",
    "config",
    "layers",
    "digest",
    "size",
    "platform",
    "rootfs",
    "diff_ids",
    "annotations",
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.text(max_size=200))
def test_what_is_no_manifest_is_a_value_error_or_its_kin(value: Any, challenge: str) -> None:
    for read in (parse_index, parse_image_manifest, parse_config):
        try:
            read(dumps(value))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    try:
        read_facts(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    parse_challenge(challenge)


# ---- the real registry


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """docker-registry behind TLS and Basic, with org/app:1."""
    if not shutil.which("docker-registry") or not shutil.which("htpasswd"):
        missing("docker-registry and htpasswd")
    folder = tmp_path_factory.mktemp("registry")
    certificate = make_certificate(folder, names="DNS:localhost,IP:127.0.0.1")
    with real_registry(folder / "real", free_port(), certificate, "me:secret") as server:
        server.add(IMAGE)
        yield server


def test_the_real_registry_behind_tls_and_basic_gives_what_it_gives_skopeo(
    real: Any, pyz: Program, tmp_path: Path
) -> None:
    if not shutil.which("skopeo"):
        missing("skopeo")
    source = f"docker://{real.host}/org/app:1"
    place = pyz.home / ".docker/certs.d" / real.host
    place.mkdir(parents=True)
    shutil.copy(real.certificate, place / "ca.crt")
    (tmp_path / "password").write_text("secret\n")
    login = ["--registry-user", "me", "--registry-password-file", tmp_path / "password"]
    refused = pyz("fetch", source, "-o", tmp_path, code=4)
    assert "wants a login" in refused.stderr
    done = pyz("fetch", source, "-o", tmp_path, *login)
    assert holds(tmp_path / "app_1") and "secret" not in done.stderr + done.stdout
    skopeo = ["skopeo", "copy", "-q", "--src-creds", "me:secret", "--src-cert-dir", str(place)]
    subprocess.run([*skopeo, source, f"oci:{tmp_path}/theirs:1"], check=True)
    theirs = blobs_of(tmp_path / "theirs")
    ours = blobs_of(tmp_path / "app_1")
    assert ours == theirs, "the same manifest, configuration and layers"


DYING_TOKENS = {
    "the registry sends the layers itself": False,
    "a CDN sends the layers, at addresses that end": True,
}


@pytest.mark.parametrize("name", DYING_TOKENS)
def test_a_token_that_dies_within_a_layer_is_renewed_and_goes_to_no_cdn(
    name: str, pyz: Program, tmp_path: Path
) -> None:
    """With the real registry and signed tokens, which it takes for a second and a half; the layer takes four."""
    if not shutil.which("docker-registry"):
        missing("docker-registry")
    folder, port = tmp_path / "real", free_port()
    image = make_image([noise(25 * MB)], "plain")
    with real_registry(folder, port) as filled:
        filled.add(image)
    certificate = make_certificate(tmp_path, names="DNS:localhost")
    with TokenService(certificate, 1.5) as service, SigningCdn(folder / "data") as cdn:
        settings = [service.settings]
        if DYING_TOKENS[name]:
            redirect = f"{{name: redirect, options: {{baseurl: '{cdn.url}'}}}}"
            settings.append(f"middleware: {{storage: [{redirect}]}}")
        with real_registry(folder, port, more=settings, access_log=True) as real:
            words = ["fetch", f"docker://{real.host}/org/app:1", "-o", tmp_path / "out"]
            done = pyz(*words, "-j", 1, "--limit-rate", "6M", "-v")
    assert holds(tmp_path / "out/app_1", image)
    asked = re.findall(r'"GET /v2/org/app/blobs/\S+ HTTP/1.1" (\d+)', (folder / "log").read_text())
    sent = "307" if DYING_TOKENS[name] else "206"
    assert "401" in asked[asked.index(sent) :], "the token died within the layer"
    assert len(service.tokens) > 1
    assert bool(cdn.headers) == DYING_TOKENS[name]
    assert not any("Authorization" in headers for headers in cdn.headers)
    assert not any(token in done.stdout + done.stderr for token in service.tokens)


def test_plain_http_is_for_this_machine_and_for_who_asks_for_it() -> None:
    """Without --plain-http another machine is asked by https."""
    other = parse_reference("docker://registry.example:5000/a:1")
    assert is_local("127.0.0.1:5000") and is_local("localhost") and not is_local(other.registry)
    assert endpoint_of(other.registry, plain_http=False) == "https://registry.example:5000"
    assert endpoint_of(other.registry, plain_http=True) == "http://registry.example:5000"
    assert endpoint_of("docker.io", plain_http=False) == "https://registry-1.docker.io"
