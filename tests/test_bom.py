"""The bill of materials: valid by the official schema, the same for the same input, and what it says."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import uuid
from dataclasses import replace

import pytest

from hfship.archive.bom import bill_of, statement_of
from hfship.archive.bundle import Bundle, bundle_item, read_me_text
from hfship.archive.signature import read_key
from hfship.base.card import SPDX, Card, card_in, card_of
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import Declared, FileEntry, Source, make_manifest, parse_manifest
from support import archives as a
from support import components

ON = {"HFSHIP_POLICY_BOM": "true"}
SOURCE = Source("https://huggingface.co", "org/m", "main", "org/m", "ab" * 20, "apache-2.0", "auto",
                "2026-11-29T07:00:00.123Z")  # fmt: skip
FILES = (FileEntry("a/ü.bin", 3, "12" * 32), FileEntry("config.json", 2, "34" * 32))
CARD = Card("", "", "https://example.org/license", ("org/base", "org/other"), "accepted")
MODEL = replace(
    make_manifest("m", FILES, SOURCE),
    card=CARD,
    declared=(
        Declared("a/ü.bin", "pickle", "weights only", "allowed", 'pickle = "refuse"', "Kim"),
    ),
    left_out=1,
    left_out_paths=("x.onnx",),
)
SHA = "sha256:" + "56" * 32
IMAGE = replace(
    make_manifest("vllm_v1", (FileEntry("oci-layout", 1, "78" * 32),)),
    image=ImageFacts("docker.io/vllm/vllm-openai:v1", SHA, SHA, SHA, (SHA,), "linux/amd64"),
)
LOCK = "# text\nrequests==2.34.2 \\\n    --hash=sha256:00\nPySocks==1.7.1 \\\n"
BILLS = {
    "a model": [MODEL],
    "nothing known": [make_manifest("m", FILES)],
    "no file": [make_manifest("m", ())],
    "an image": [IMAGE],
    "an image that docker alone has": [replace(make_manifest("vllm_v1", ()), image=replace(IMAGE.image, digest="", manifest_digest=""))],
    "several": [MODEL, replace(MODEL, name="b"), IMAGE],
    "a licence that SPDX lacks": [replace(MODEL, source=replace(SOURCE, license="llama3.1"))],
    "another licence": [replace(MODEL, source=replace(SOURCE, license="other"), card=replace(CARD, license_name="q r"))],
    "an address that is none": [replace(MODEL, card=replace(CARD, license_link="https://a b/<x>"))],
    "a licence in the repository": [replace(MODEL, card=replace(CARD, license_link="LICENSE"))],
    "a time that is none": [replace(MODEL, source=replace(SOURCE, fetched_at="yesterday"))],
    "every licence": [replace(MODEL, name=f"m{n}", source=replace(SOURCE, license=name)) for n, name in enumerate(SPDX)],
}  # fmt: skip
CHECK = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
validator = JsonStrictValidator(SchemaVersion.V1_6)
for path in sys.argv[1:]:
    error = validator.validate_str(open(path, encoding="utf-8").read())
    if error: print(path, error.data if hasattr(error, "data") else error)
"""


def test_the_official_schema_accepts_all_bills(tmp_path):
    python = components.require("cyclonedx")
    paths = []
    for number, manifests in enumerate(BILLS.values()):
        path = tmp_path / f"{number}.json"
        path.write_text(bill_of(manifests, "0.3.0", LOCK), "utf-8")
        paths.append(path)
    wrong = json.loads(paths[0].read_text())
    wrong["metadata"]["component"]["type"] = "model"
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(wrong))
    said = components.run([str(python), "-c", CHECK, *map(str, paths), str(broken)])
    assert said.startswith(f"{broken} ") and "model" in said
    assert not [path for path in paths if f"{path} " in said]


def test_what_a_bill_says():
    bill = json.loads(bill_of([MODEL], "0.3.0", LOCK))
    model = bill["metadata"]["component"]
    assert model["licenses"] == [
        {"license": {"id": "Apache-2.0", "url": "https://example.org/license"}}
    ]
    assert model["purl"] == f"pkg:huggingface/org/m@{SOURCE.commit}"
    assert [one["name"] for one in model["pedigree"]["ancestors"]] == ["org/base", "org/other"]
    told = [(one["name"], one["value"]) for one in model["properties"]]
    assert ("hfship:terms", "accepted") in told
    assert ("hfship:declared", "a/ü.bin: pickle: weights only; allowed: Kim") in told
    digest = hashlib.sha256(MODEL.to_json().encode()).hexdigest()
    assert ("hfship:manifest-sha256", digest) in told
    files = {one["name"]: one["hashes"][0]["content"] for one in bill["components"]}
    assert files == {entry.path: entry.sha256 for entry in FILES}
    (tool,) = bill["metadata"]["tools"]["components"]
    assert [one["purl"] for one in tool["components"]] == [
        "pkg:pypi/pysocks@1.7.1",
        "pkg:pypi/requests@2.34.2",
    ]
    (other,) = json.loads(bill_of(BILLS["a licence that SPDX lacks"], "1", ""))["metadata"][
        "component"
    ]["licenses"]
    assert other["license"]["name"] == "llama3.1"


def prop(name, value):
    return {"name": f"hfship:{name}", "value": value}


def file_of(entry):
    return {
        "type": "file",
        "bom-ref": f"model:m/{entry.path}",
        "name": entry.path,
        "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
        "properties": [prop("bytes", str(entry.size))],
    }


MODEL_COMPONENT = {
    "type": "machine-learning-model",
    "bom-ref": "model:m",
    "name": "m",
    "version": SOURCE.commit,
    "publisher": "org",
    "purl": f"pkg:huggingface/org/m@{SOURCE.commit}",
    "externalReferences": [
        {"type": "distribution", "url": f"https://huggingface.co/org/m/tree/{SOURCE.commit}"}
    ],
    "licenses": [{"license": {"id": "Apache-2.0", "url": "https://example.org/license"}}],
    "pedigree": {
        "ancestors": [
            {"type": "machine-learning-model", "name": "org/base"},
            {"type": "machine-learning-model", "name": "org/other"},
        ]
    },
    "properties": [
        prop("bytes", "5"),
        prop("files", "2"),
        prop("manifest-sha256", hashlib.sha256(MODEL.to_json().encode()).hexdigest()),
        prop("terms", "accepted"),
        prop("left-out", "x.onnx"),
        prop("gated", "auto"),
        prop("revision", "main"),
        prop("fetched-at", "2026-11-29T07:00:00.123Z"),
        prop("declared", "a/ü.bin: pickle: weights only; allowed: Kim"),
    ],
}
IMAGE_COMPONENT = {
    "type": "container",
    "bom-ref": "image:docker.io/vllm/vllm-openai:v1",
    "name": "docker.io/vllm/vllm-openai",
    "version": "v1",
    "properties": [
        prop("platform", "linux/amd64"),
        prop("manifest-digest", SHA),
        prop("image-id", SHA),
        prop("bytes", "1"),
        prop("diff-id", SHA),
    ],
    "hashes": [{"alg": "SHA-256", "content": "56" * 32}],
    "purl": f"pkg:oci/vllm-openai@sha256%3A{'56' * 32}"
    "?repository_url=docker.io%2Fvllm%2Fvllm-openai",
    "externalReferences": [
        {"type": "bom", "url": f"oci://docker.io/vllm/vllm-openai@{SHA}"},
    ],
}


def bill_with(**fields):
    """A bill without its number."""
    package = {"type": "library", "version": "1.7.1", "purl": "pkg:pypi/pysocks@1.7.1"}
    tool = {
        "type": "application",
        "name": "hfship",
        "version": "0.3.0",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "components": [{**package, "name": "PySocks"}],
    }
    metadata = {"tools": {"components": [tool]}, **fields.pop("metadata", {})}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        **fields,
    }


TIME = "2026-11-29T07:00:00.123Z"
LATER = replace(MODEL, name="n", source=replace(SOURCE, fetched_at="2026-12-01T07:00:00Z"))
WHOLE = {
    "a model": (
        [MODEL],
        bill_with(
            metadata={"timestamp": TIME, "component": MODEL_COMPONENT},
            components=[file_of(entry) for entry in FILES],
        ),
    ),
    "an image": ([IMAGE], bill_with(metadata={"component": IMAGE_COMPONENT}, components=[])),
    "both": (
        [MODEL, IMAGE],
        bill_with(
            metadata={"timestamp": TIME},
            components=[
                IMAGE_COMPONENT,
                {**MODEL_COMPONENT, "components": [file_of(entry) for entry in FILES]},
            ],
        ),
    ),
    "nothing": ([], bill_with(components=[])),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_bill_to_its_last_field(name):
    manifests, wanted = WHOLE[name]
    text = bill_of(manifests, "0.3.0", "PySocks==1.7.1 \\\n")
    bill = json.loads(text)
    number = bill.pop("serialNumber")
    assert bill == wanted
    content = json.dumps(bill, sort_keys=True)
    space = uuid.UUID("7a3f3f0e-5d0b-5c6e-9d55-3a2c1f6b1c6e")
    assert number == f"urn:uuid:{uuid.uuid5(space, content)}"
    whole = {**bill, "serialNumber": number}
    assert text == json.dumps(whole, sort_keys=True, ensure_ascii=False, indent=1) + "\n"


def test_a_bill_has_the_time_of_the_latest():
    bill = json.loads(bill_of([MODEL, LATER], "1", ""))
    assert bill["metadata"]["timestamp"] == "2026-12-01T07:00:00Z"
    assert "components" not in bill["metadata"]["tools"]["components"][0]


def test_what_is_not_known_is_not_told():
    empty = make_manifest("m", ())
    digest = hashlib.sha256(empty.to_json().encode()).hexdigest()
    bill = json.loads(bill_of([empty], "1", ""))
    assert bill["metadata"]["component"] == {
        "type": "machine-learning-model",
        "bom-ref": "model:m",
        "name": "m",
        "properties": [
            prop("bytes", "0"),
            prop("files", "0"),
            prop("manifest-sha256", digest),
        ],
    }
    assert "timestamp" not in bill["metadata"] and bill["components"] == []
    of_docker = replace(IMAGE.image, digest="", manifest_digest="")
    image = replace(make_manifest("vllm_v1", ()), image=of_docker)
    component = json.loads(bill_of([image], "1", ""))["metadata"]["component"]
    assert component["properties"] == [
        prop("platform", "linux/amd64"),
        prop("image-id", SHA),
        prop("diff-id", SHA),
    ]
    assert not {"hashes", "purl", "externalReferences"} & component.keys()


@pytest.mark.parametrize(
    ("fields", "link", "licence"),
    [
        ({"license": "apache-2.0"}, "", {"id": "Apache-2.0"}),
        ({"license": "Apache-2.0"}, "http://a/b", {"id": "Apache-2.0", "url": "http://a/b"}),
        ({"license": "llama3.1"}, "LICENSE", {"name": "llama3.1"}),
        ({"license": "mit"}, "https://a b", {"id": "MIT"}),
        ({"license": "mit"}, "https://a|b", {"id": "MIT"}),
        ({"license": "mit"}, "ftp://a", {"id": "MIT"}),
        ({"license": None}, "https://a", None),
    ],
)
def test_a_licence_by_its_name_of_spdx(fields, link, licence):
    manifest = replace(MODEL, source=replace(SOURCE, **fields), card=Card(license_link=link))
    component = json.loads(bill_of([manifest], "1", ""))["metadata"]["component"]
    assert component.get("licenses") == ([{"license": licence}] if licence else None)


def test_the_statement_by_which_a_bill_is_signed():
    assert statement_of("m.cdx.json", b"{}") == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": "m.cdx.json", "digest": {"sha256": hashlib.sha256(b"{}").hexdigest()}}
        ],
        "predicateType": "https://cyclonedx.org/bom",
        "predicate": {"specVersion": "1.6"},
    }


def test_equal_input_gives_equal_bytes():
    again = parse_manifest(MODEL.to_json(), "m")
    assert again == MODEL
    assert bill_of([MODEL, IMAGE], "1", LOCK) == bill_of([IMAGE, again], "1", LOCK)
    assert bill_of([MODEL], "1", LOCK) != bill_of([replace(MODEL, name="n")], "1", LOCK)


@pytest.mark.parametrize(
    ("text", "license_", "base"),
    [
        ("---\nlicense: mit\n---\n", "mit", ()),
        (
            "\ufeff---\r\nlicense: 'apache-2.0' # ours\r\nbase_model: a/b\r\n---\r\n",
            "apache-2.0",
            ("a/b",),
        ),
        (
            '---\nbase_model:\n  - a/b\n  - "c/d"\nlicense: [mit, other]\n---',
            "mit, other",
            ("a/b", "c/d"),
        ),
        ("---\nbase_model: [a/b, 'c/d']\n---", "", ("a/b", "c/d")),
        ("---\nlicense: {a: b}\n---", "", ()),
        ("---\nlicense: 'open\n---", "", ()),
        ("---\nlicense: |\n  long\n---", "", ()),
        ("---\nlicense: mit\n", "", ()),
        ("license: mit", "", ()),
        ("", "", ()),
        ("---\n- a\n  b: c\n\t: \x00\n---", "", ()),
    ],
)
def test_cards_and_what_is_broken_of_them(text, license_, base):
    card = card_in(text)
    assert (card.license, card.base_model) == (license_, base)


@pytest.mark.parametrize(
    "facts", [None, 3, [], "x", {"license": {"a": 1}, "base_model": {"b": 2}}, {"license": True}]
)
def test_cards_of_any_form(facts):
    assert card_of(facts).license == ""


def test_the_bill_travels_beside_the_archive_signed_when_that_is(tmp_path, hfship):
    if not shutil.which("openssl"):
        pytest.skip("openssl")
    key = tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True
    )
    a.make_model(tmp_path / "m", a.SMALL)
    hfship("pack", tmp_path / "m", "-o", tmp_path / "without", "--sign", key)
    hfship("pack", tmp_path / "m", "-o", tmp_path / "out", "--sign", key, env=ON)
    archive = tmp_path / "out/m.tar.zst"
    assert archive.read_bytes() == (tmp_path / "without/m.tar.zst").read_bytes()
    bill = archive.with_name("m.tar.zst.cdx.json").read_bytes()
    assert (
        hfship("bom", archive).stdout.encode()
        == hfship("bom", tmp_path / "m").stdout.encode()
        == bill
    )
    bundle = json.loads(archive.with_name("m.tar.zst.cdx.json.sig").read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["subject"][0]["digest"]["sha256"] == hashlib.sha256(bill).hexdigest()
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    assert hint == read_key(key, private=True).fingerprint
    hfship("push", archive, f"{tmp_path}/far/")
    assert (tmp_path / "far/m.tar.zst.cdx.json.sig").exists()


def test_a_bill_of_a_list_and_of_nothing(tmp_path, hfship):
    site = tmp_path / "site"
    for name in ("one", "two"):
        a.make_model(site / name, a.SMALL)
    models = tmp_path / "models.toml"
    models.write_text(
        f'[defaults]\nsite_models_dir = "{site}"\n[[model]]\nname = "one"\n[[model]]\nname = "two"\n'
    )
    env = {"HFSHIP_SITE_MODELS_DIR": str(site)}
    hfship("bom", "--models", models, "-o", tmp_path / "site.json", env=env)
    bill = json.loads((tmp_path / "site.json").read_text())
    assert [one["bom-ref"] for one in bill["components"]] == ["model:one", "model:two"]
    hfship("bom", code=2)
    hfship("bom", "nothing", code=5)


INSPECTED = {
    "Id": "sha256:" + "ab" * 32,
    "RepoTags": ["busybox:1", "quay.io/a/b:2"],
    "RepoDigests": ["busybox@" + SHA],
    "Os": "linux",
    "Architecture": "arm64",
    "Variant": "v8",
    "RootFS": {"Type": "layers", "Layers": ["sha256:" + "cd" * 32]},
}


@pytest.mark.parametrize(
    ("word", "name", "digest"),
    [
        ("busybox:1", "docker.io/library/busybox", SHA),
        ("quay.io/a/b:2", "quay.io/a/b", ""),  # it came as a file: no registry knows it
        ("ab" * 6, "docker.io/library/busybox", SHA),
    ],
)
def test_an_image_that_docker_alone_has(word, name, digest, tmp_path, hfship):
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    (tmp_path / "inspected").write_text(json.dumps([INSPECTED]))
    docker.write_text(f'#!/bin/sh\n[ "$3" = {word} ] && exec cat {tmp_path}/inspected\nexit 1\n')
    docker.chmod(0o755)
    env = {"PATH": f"{docker.parent}:{os.environ['PATH']}"}
    bill = json.loads(hfship("bom", word, env=env).stdout)
    image = bill["metadata"]["component"]
    assert (image["type"], image["name"], image.get("purl", "")[:4]) == (
        "container",
        name,
        digest and "pkg:",
    )
    told = {one["name"]: one["value"] for one in image["properties"]}
    assert told == {
        "hfship:platform": "linux/arm64/v8",
        "hfship:image-id": INSPECTED["Id"],
        "hfship:diff-id": INSPECTED["RootFS"]["Layers"][0],
    }
    assert "was not found" in hfship("bom", "other", env=env, code=5).stderr


def test_the_licence_stands_in_the_words_of_a_delivery():
    item = bundle_item(MODEL, "m.tar.zst", 5)
    assert ", licence apache-2.0, terms accepted" in read_me_text([Bundle("m", (item,))])
    assert "licence" not in Bundle("m", (item,)).text()
