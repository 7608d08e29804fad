# SPDX-License-Identifier: Apache-2.0
"""What describes a delivery, to its last line; test_bundle.py packs and unpacks one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.archive.bundle import (
    Bundle,
    BundleItem,
    archives_meant,
    bundle_item,
    bundles_at,
    models_text,
    read_bundle,
    read_me_text,
    write_bundle,
)
from hfship.base.card import Card
from hfship.base.errors import IntegrityError, NotFoundError
from hfship.base.imagefacts import ImageFacts
from hfship.base.manifest import FileEntry, Source, make_manifest
from hfship.base.values import replace

DIGEST = "sha256:" + "a" * 64
IMAGE = BundleItem("image", "vllm_v1", "vllm_v1.tar.zst", "b" * 64, "vllm/vllm-openai:v1")
MODEL = BundleItem("model", "m", "my m.tar.zst", "c" * 40, "org/m")
BUNDLE = Bundle("m", (IMAGE, MODEL))


def test_a_delivery_is_written_and_read_back(tmp_path: Path) -> None:
    sized = Bundle("m", (IMAGE, replace(MODEL, size=7, licence="mit")))
    path = write_bundle(tmp_path, sized)
    assert path == tmp_path / "m.bundle.json" and read_bundle(path) == BUNDLE
    assert (
        path.read_text()
        == sized.text()
        == json.dumps(
            {
                "format": "hfship-bundle/1",
                "name": "m",
                "items": [
                    {
                        "kind": "image",
                        "name": "vllm_v1",
                        "archive": "vllm_v1.tar.zst",
                        "version": "b" * 64,
                        "reference": "vllm/vllm-openai:v1",
                    },
                    {
                        "kind": "model",
                        "name": "m",
                        "archive": "my m.tar.zst",
                        "version": "c" * 40,
                        "reference": "org/m",
                    },
                ],
            },
            sort_keys=True,
            indent=1,
        )
        + "\n"
    )


def test_what_is_of_a_kind() -> None:
    assert BUNDLE.images == [IMAGE] and BUNDLE.models == [MODEL]


def test_an_archive_of_a_model_and_of_an_image() -> None:
    source = Source("https://hub", "old/m", "main", "org/m", "c" * 40, license="mit")
    manifest = replace(make_manifest("m", [], source), card=Card(terms="accepted"))
    licence = "mit, terms accepted"
    wanted = BundleItem("model", "m", "m.tar.zst", "c" * 40, "org/m", 7, licence)
    assert bundle_item(manifest, "m.tar.zst", 7) == wanted
    plain = make_manifest("m", [FileEntry("a", 1, "0" * 64)])
    item = bundle_item(plain, "m.tar.zst", 0)
    assert (item.reference, item.licence, len(item.version)) == ("", "", 64)
    facts = ImageFacts(
        "docker.io/vllm/vllm-openai:v1", DIGEST, DIGEST, DIGEST, (DIGEST,), "linux/amd64"
    )
    of_image = bundle_item(replace(plain, image=facts), "i.tar.zst", 0)
    assert (of_image.kind, of_image.reference) == ("image", "vllm/vllm-openai:v1")


VALUE: Dict[str, Any] = json.loads(BUNDLE.text())
ROW: Dict[str, Any] = VALUE["items"][1]


def changed(**fields: Any) -> str:
    return json.dumps({**VALUE, "items": [{**ROW, **fields}]})


# text -> a word of why it is refused
REFUSED = {
    "torn": "",
    "[]": "",
    "{}": "format",
    json.dumps({**VALUE, "format": "hfship-bundle/2"}): "format is 'hfship-bundle/2'",
    json.dumps({**VALUE, "name": "../x"}): "",
    json.dumps({"format": "hfship-bundle/1", "items": []}): "name",
    json.dumps({"format": "hfship-bundle/1", "name": "m"}): "items",
    changed(kind="dataset"): "'dataset', which this hfship does not know",
    changed(kind=7): "no text",
    changed(version="a\x1b"): "no text",
    changed(name="a/b"): "",
    changed(archive="../m.tar.zst"): "'../m.tar.zst' is no archive beside it",
    changed(archive="m.zip"): "'m.zip' is no archive beside it",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[-40:])
def test_what_describes_no_delivery_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "m.bundle.json"
    path.write_text(text)
    with pytest.raises(IntegrityError) as told:
        read_bundle(path)
    assert told.value.what == f"{path} does not describe a delivery"
    assert REFUSED[text] in told.value.why and told.value.next_step == "copy it again"


def test_a_description_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no"):
        read_bundle(tmp_path / "gone.bundle.json")


def test_more_than_a_thousand_archives_are_no_delivery_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "m.bundle.json"
    path.write_text(json.dumps({**VALUE, "items": [ROW] * 1001}))
    assert len(read_bundle(path).items) == 1000


def test_which_deliveries_a_path_means(tmp_path: Path) -> None:
    for name in ("b.bundle.json", "a.bundle.json", "c.json"):
        (tmp_path / name).touch()
    found = [tmp_path / "a.bundle.json", tmp_path / "b.bundle.json"]
    assert bundles_at(tmp_path) == found and bundles_at(found[0]) == found[:1]
    assert bundles_at(tmp_path / "c.json") == [] and bundles_at(tmp_path / "gone") == []


def test_archives_stand_in_the_place_of_a_delivery(tmp_path: Path) -> None:
    path = write_bundle(tmp_path, BUNDLE)
    archives = [f"{tmp_path}/vllm_v1.tar.zst", f"{tmp_path}/my m.tar.zst"]
    assert archives_meant(["a", str(path), archives[1], "b", "a"]) == ["a", *archives, "b"]


# -- texts

OTHER = Bundle("n", (replace(MODEL, name="n", archive="n.tar.zst", reference=""),))


def test_a_models_file_of_deliveries() -> None:
    assert models_text([OTHER, BUNDLE, OTHER]).splitlines() == [
        "# Made by hfship pack --with-image: hfship serve --models models.toml",
        *("", "[[model]]", 'repo = "n"', 'name = "n"'),
        *("", "[[model]]", 'repo = "org/m"', 'name = "m"'),
        *("[model.serve]", 'image = "vllm/vllm-openai:v1"'),
        *("", "[[model]]", 'repo = "n"', 'name = "n"'),
    ]
    assert models_text([]).endswith("models.toml\n")


def test_a_read_me_for_who_has_nothing_else() -> None:
    sized = Bundle("my m", (replace(MODEL, size=2_000_000_000, licence="mit"), IMAGE))
    other = replace(MODEL, name="n", archive="n.tar.zst", reference="")
    text = read_me_text([sized, Bundle("n", (IMAGE, other))])
    lines: List[str] = [
        *("THIS DELIVERY", ""),
        "    my m.tar.zst: model org/m at cccccccccccc, 2.0 GB, licence mit",
        "    vllm_v1.tar.zst: image vllm/vllm-openai:v1 at bbbbbbbbbbbb",
        "    n.tar.zst: model n at cccccccccccc",
        "",
        "From this folder, with Python 3.8 or later, docker, and no network:",
        "",
        "    python3 hfship.pyz verify 'my m.tar.zst' vllm_v1.tar.zst n.tar.zst",
        "        proves every byte, and names what to copy again",
        "    python3 hfship.pyz serve 'my m.bundle.json'",
        "        image into docker, model into its folder, then waits for an answer",
        "    python3 hfship.pyz serve n.bundle.json",
        "        image into docker, model into its folder, then waits for an answer",
        *("", "Step by step:", ""),
        "    python3 hfship.pyz unpack 'my m.tar.zst'",
        "    python3 hfship.pyz unpack vllm_v1.tar.zst",
        "    python3 hfship.pyz unpack n.tar.zst",
        "    python3 hfship.pyz serve m",
        "    python3 hfship.pyz serve n",
        *("", "", ""),
    ]
    assert text == "\n".join(lines)
