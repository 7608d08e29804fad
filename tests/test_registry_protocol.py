# SPDX-License-Identifier: Apache-2.0
"""What registries are asked and say, and the texts of an image folder; test_registry.py has whole
programs, and references."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Optional, Type

import pytest

from hfship.base.errors import HostError, UsageError
from hfship.base.imagefacts import MOST_LAYERS
from hfship.hub.protocol import LARGEST_FILE, RemoteFile
from hfship.hub.registry_protocol import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Challenge,
    Descriptor,
    ImageConfig,
    ImageManifest,
    ImageReference,
    blob_path,
    blob_url,
    digest_of,
    endpoint_of,
    is_local,
    layout_texts,
    manifest_url,
    media_type_of,
    mismatch,
    parse_challenge,
    parse_config,
    parse_image_manifest,
    parse_index,
    parse_reference,
    read_descriptor,
    read_tags,
    require_platform,
    tags_url,
)

SUM = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- references

# text -> registry, path, tag, digest
READ = {
    "docker://busybox": ("docker.io", "library/busybox", "latest", ""),
    "docker://busybox:1": ("docker.io", "library/busybox", "1", ""),
    "docker://org/app": ("docker.io", "org/app", "latest", ""),
    "docker://docker.io/busybox": ("docker.io", "library/busybox", "latest", ""),
    "docker://registry-1.docker.io/org/app:1": ("docker.io", "org/app", "1", ""),
    "docker://localhost/app": ("localhost", "app", "latest", ""),
    "docker://h:5000/a/b:1": ("h:5000", "a/b", "1", ""),
    "docker://h.example/a/b/c": ("h.example", "a/b/c", "latest", ""),
    f"docker://h.example/a@{SUM}": ("h.example", "a", "", SUM),
    f"docker://h:5000/a:1@{SUM}": ("h:5000", "a", "1", SUM),
}


@pytest.mark.parametrize("text", READ)
def test_a_reference_is_read(text: str) -> None:
    reference = parse_reference(text)
    assert reference == ImageReference(*READ[text])
    assert parse_reference(reference.url) == reference


@pytest.mark.parametrize(
    ("tag", "digest", "wanted", "name", "local"),
    [
        ("1", "", "1", "org/app:1", "1"),
        ("", SUM, SUM, f"org/app@{SUM}", "sha256-abababababab"),
        ("1", SUM, SUM, f"org/app:1@{SUM}", "1"),
    ],
)
def test_how_an_image_is_called(tag: str, digest: str, wanted: str, name: str, local: str) -> None:
    reference = ImageReference("docker.io", "org/app", tag, digest)
    assert (reference.wanted, reference.name, reference.local_tag) == (wanted, name, local)
    assert reference.repository == "docker.io/org/app"
    assert reference.url == f"docker://{name}"
    assert reference.local_reference == f"docker.io/org/app:{local}"
    assert reference.folder_name == f"app_{local}"


def test_a_folder_has_a_name_that_fits() -> None:
    names = [ImageReference("h.example", "a/b", "t" * count).folder_name for count in (94, 95, 128)]
    assert [len(name) for name in names] == [96, 96, 96] and names[0] == "b_" + "t" * 94
    assert names[1][:83] == names[2][:83] == "b_" + "t" * 81 and names[1] != names[2]
    assert names[1][83] == "_"


@pytest.mark.parametrize(
    "text",
    [
        "docker://Org/app",
        f"docker://h.example/{'a' * 246}",
        "docker://a:b c",
        "docker://a@",
        f"docker://a@{SUM[:-1]}",
        "docker://a@sha512:" + "a" * 64,
        f"docker://a:{'t' * 129}",
    ],
)
def test_what_is_no_reference_is_told(text: str) -> None:
    with pytest.raises(UsageError) as told:
        parse_reference(text)
    assert told.value.what == f"{text[:200]!r} is not an image"
    assert "docker://[REGISTRY/]NAME:TAG" in told.value.next_step


def test_the_longest_names_that_fit() -> None:
    assert parse_reference(f"docker://h.example/{'a' * 245}:{'t' * 128}").tag == "t" * 128


@pytest.mark.parametrize(
    ("registry", "local"),
    [
        *[(name, True) for name in ("localhost", "localhost:5000", "127.0.0.1:80", "127.9.9.9")],
        *[("[::1]:5000", True), ("[::1]", True), ("[::2]:80", False)],
        *[(name, False) for name in ("10.0.0.1:5000", "localhost.example", "r.example")],
    ],
)
def test_which_registry_is_of_this_machine(registry: str, local: bool) -> None:
    assert is_local(registry) == local


def test_addresses() -> None:
    assert endpoint_of("r.example", False) == "https://r.example"
    assert endpoint_of("r.example", True) == "http://r.example"
    assert endpoint_of("docker.io", False) == "https://registry-1.docker.io"
    assert manifest_url("https://r", "a/b", "1") == "https://r/v2/a/b/manifests/1"
    assert tags_url("https://r", "a/b") == "https://r/v2/a/b/tags/list"
    assert blob_url("https://r", "a/b", SUM) == f"https://r/v2/a/b/blobs/{SUM}"
    assert blob_path(SUM) == "blobs/sha256/" + "ab" * 32
    assert (
        digest_of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ('{"tags": ["1", "a b", "2.0-x_y"]}', ["1", "2.0-x_y"]),
        ('{"tags": null}', []),
        ('{"tags": [1]}', []),
        ("{}", []),
        ("[]", []),
        ("<html>", []),
    ],
)
def test_tags_are_those_that_can_be_typed(text: str, tags: List[str]) -> None:
    assert read_tags(text) == tags


# -- the challenge

REALM = "https://a.example/t"
# header -> what it asks for
CHALLENGES: Dict[str, Optional[Challenge]] = {
    f'Bearer realm="{REALM}",service="r",scope="s"': Challenge(REALM, "r", "s"),
    f' BEARER  Scope="s" , REALM="{REALM}"': Challenge(REALM, "", "s"),
    f'Bearer realm="{REALM}"': Challenge(REALM, "", ""),
    'Bearer realm="http://a/t"': Challenge("http://a/t", "", ""),
    'Bearer realm="ftp://a/t"': None,
    'Bearer realm="https://a b"': None,
    'Bearer service="r"': None,
    f'Basic realm="{REALM}"': None,
    f'Bearer{" " * 4096}realm="{REALM}"': None,
    f'Bearer x="{"y" * 4096}",realm="{REALM}"': None,
    "": None,
}


@pytest.mark.parametrize("header", CHALLENGES, ids=lambda text: text[:50])
def test_a_challenge_is_read(header: str) -> None:
    assert parse_challenge(header) == CHALLENGES[header]


@pytest.mark.parametrize(
    ("challenge", "url"),
    [
        (Challenge(REALM, "r", "a:b"), f"{REALM}?service=r&scope=a%3Ab"),
        (Challenge(REALM, "a b", ""), f"{REALM}?service=a%20b"),
        (Challenge(REALM, "", "s"), f"{REALM}?scope=s"),
        (Challenge(f"{REALM}?x=1", "r", ""), f"{REALM}?x=1&service=r"),
    ],
)
def test_where_a_token_is_asked_for(challenge: Challenge, url: str) -> None:
    assert challenge.token_url() == url


# -- descriptors

ENTRY: Dict[str, Any] = {
    "mediaType": "a/b",
    "digest": SUM,
    "size": 7,
    "annotations": {"k": "v", "n": 1},
    "platform": {"os": "linux", "architecture": "amd64"},
    "urls": ["https://x"],
}
FOUND = Descriptor("a/b", SUM, 7, {"k": "v", "n": "1"}, "linux/amd64", ("https://x",))


def test_a_descriptor_is_read() -> None:
    assert read_descriptor(ENTRY) == FOUND
    assert FOUND.remote == RemoteFile("blobs/sha256/" + "ab" * 32, 7, "", "ab" * 32)
    plain = read_descriptor({"digest": SUM, "size": 0, "annotations": None, "urls": None})
    assert plain == Descriptor("", SUM, 0, {}, "", ())
    assert read_descriptor({**ENTRY, "mediaType": "x" * 201}).media_type == "x" * 200
    assert read_descriptor({**ENTRY, "size": LARGEST_FILE}).size == LARGEST_FILE


@pytest.mark.parametrize(
    "fields",
    [
        *({"digest": one} for one in (7, "sha256:ab", SUM + "\n", "md5:" + "ab" * 32, None)),
        *({"size": one} for one in (-1, LARGEST_FILE + 1, True, 7.0, "7", None)),
    ],
    ids=str,
)
def test_a_descriptor_that_cannot_be_is_refused(fields: Dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no digest that can be proven|the size of"):
        read_descriptor({**ENTRY, **fields})
    for name in ("digest", "size"):
        with pytest.raises(KeyError):
            read_descriptor({key: value for key, value in ENTRY.items() if key != name})


@pytest.mark.parametrize(
    ("value", "platform"),
    [
        ({"os": "linux", "architecture": "ARM64", "variant": "v8"}, "linux/arm64/v8"),
        ({"os": "linux", "architecture": "arm64", "variant": ""}, "linux/arm64"),
        ({"os": "unknown", "architecture": "unknown"}, ""),
        ({"os": "linux"}, ""),
        ({"architecture": "amd64"}, ""),
        ({"os": "li nux", "architecture": "amd64"}, ""),
    ],
)
def test_what_a_platform_is(value: Dict[str, str], platform: str) -> None:
    assert read_descriptor({**ENTRY, "platform": value}).platform == platform


# -- indexes and manifests


@pytest.mark.parametrize(
    ("value", "header", "kind"),
    [
        ({"mediaType": DOCKER_LIST}, OCI_MANIFEST, DOCKER_LIST),
        ({}, f"{OCI_MANIFEST}; charset=utf-8", OCI_MANIFEST),
        ({}, DOCKER_MANIFEST, DOCKER_MANIFEST),
        ({"mediaType": "x", "manifests": []}, "", OCI_INDEX),
        ({"manifests": []}, "text/html", OCI_INDEX),
        ({"config": {}, "layers": []}, "", OCI_MANIFEST),
        ({"config": {}}, "", ""),
        ({"layers": []}, "", ""),
        ([], OCI_INDEX, ""),
        ({}, "", ""),
    ],
)
def test_what_a_body_is(value: Any, header: str, kind: str) -> None:
    assert media_type_of(value, header) == kind


def test_an_index_has_entries_but_not_too_many() -> None:
    assert parse_index(dumps({"manifests": [ENTRY, {**ENTRY, "digest": OTHER}]})) == [
        FOUND,
        Descriptor("a/b", OTHER, 7, {"k": "v", "n": "1"}, "linux/amd64", ("https://x",)),
    ]
    assert len(parse_index(dumps({"manifests": [ENTRY] * (MOST_LAYERS + 1)}))) == MOST_LAYERS


MANIFEST: Dict[str, Any] = {
    "mediaType": OCI_MANIFEST,
    "config": ENTRY,
    "layers": [ENTRY],
    "artifactType": "a/t",
    "annotations": {"k": 1},
}


def test_a_manifest_is_read() -> None:
    whole = ImageManifest(FOUND, (FOUND,), "a/t", {"k": "1"}, OCI_MANIFEST)
    assert parse_image_manifest(dumps(MANIFEST)) == whole
    plain = {"config": ENTRY, "layers": []}
    assert parse_image_manifest(dumps(plain)) == ImageManifest(FOUND, (), "", {}, OCI_MANIFEST)
    most = MOST_LAYERS * 10
    assert len(parse_image_manifest(dumps({**MANIFEST, "layers": [ENTRY] * most})).layers) == most
    with pytest.raises(ValueError, match=f"it has {most + 1} layers"):
        parse_image_manifest(dumps({**MANIFEST, "layers": [ENTRY] * (most + 1)}))


CONFIG: Dict[str, Any] = {
    "os": "linux",
    "architecture": "amd64",
    "rootfs": {"diff_ids": [SUM, OTHER]},
    "config": {"Labels": {"k\x1b": "v\x1b", "n": 1}},
}


def test_a_configuration_is_read() -> None:
    found = parse_config(dumps(CONFIG))
    assert found == ImageConfig("linux/amd64", (SUM, OTHER), {"k?": "v?", "n": "1"})
    for config in (None, {}, {"Labels": None}):
        assert parse_config(dumps({**CONFIG, "config": config})).labels == {}
    labels = {"k" * 201: "v" * 501}
    long = parse_config(dumps({**CONFIG, "config": {"Labels": labels}}))
    assert long.labels == {"k" * 200: "v" * 500}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"os": ""}, ValueError),
        ({"rootfs": {"diff_ids": []}}, ValueError),
        ({"rootfs": {"diff_ids": [SUM] * (MOST_LAYERS + 1)}}, ValueError),
        ({"rootfs": {"diff_ids": SUM}}, ValueError),
        ({"rootfs": {"diff_ids": [SUM, 7]}}, ValueError),
        ({"rootfs": {"diff_ids": [SUM, "sha256:x"]}}, ValueError),
        ({"rootfs": {}}, KeyError),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_configuration_that_is_none_is_refused(
    fields: Dict[str, Any], error: Type[Exception]
) -> None:
    with pytest.raises(error):
        parse_config(dumps({**CONFIG, **fields}))
    most = {**CONFIG, "rootfs": {"diff_ids": [SUM] * MOST_LAYERS}}
    assert len(parse_config(dumps(most)).diff_ids) == MOST_LAYERS


@pytest.mark.parametrize(
    ("built", "wanted", "fits"),
    [
        ("linux/amd64", "linux/amd64", True),
        ("linux/arm64/v8", "linux/arm64", True),
        ("linux/arm64", "linux/arm64/v8", False),
        ("linux/amd64x", "linux/amd64", False),
        ("linux/arm64", "linux/amd64", False),
    ],
)
def test_an_image_is_for_the_platform_that_is_wanted(built: str, wanted: str, fits: bool) -> None:
    config = ImageConfig(built, (), {})
    if fits:
        require_platform(config, wanted, "x")
        return
    with pytest.raises(HostError) as told:
        require_platform(config, wanted, "x")
    assert told.value.what == f"x is an image for {built}, not for {wanted}"
    assert told.value.next_step.endswith(f"--platform {built}")


def test_what_is_not_what_its_digest_says_is_told() -> None:
    error = mismatch("x", "manifest", "found", "wanted")
    assert error.what == "the registry sends another manifest of x"
    assert error.why == "it has found, wanted is wanted"


# -- the texts of a folder


def test_what_lies_beside_the_blobs() -> None:
    top = Descriptor(OCI_INDEX, OTHER, 9, {})
    layers = (Descriptor("l", SUM, 7, {}), Descriptor("l", OTHER, 8, {}))
    manifest = ImageManifest(Descriptor("c", SUM, 7, {}), layers, "", {}, OCI_MANIFEST)
    texts = layout_texts(ImageReference("docker.io", "library/app", "1"), top, manifest)
    assert all(text.endswith(b"\n") and b" " not in text for text in texts.values())
    blobs = [f"blobs/sha256/{'ab' * 32}", f"blobs/sha256/{'cd' * 32}"]
    names = {
        "io.containerd.image.name": "docker.io/library/app:1",
        "org.opencontainers.image.ref.name": "1",
    }
    entry = {"mediaType": OCI_INDEX, "digest": OTHER, "size": 9, "annotations": names}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    assert {path: json.loads(text) for path, text in texts.items()} == {
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
        "index.json": index,
        "manifest.json": [{"Config": blobs[0], "RepoTags": ["app:1"], "Layers": blobs}],
    }
