"""A delivery of a model with its image: pack --with-image, and serve BUNDLE on a machine that had neither."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Program, program
from hfship.archive.bundle import Bundle, BundleItem, models_text, read_bundle, read_me_text
from hfship.base.errors import IntegrityError
from hfship.base.modelsfile import read_models_file
from hfship.commands.modelskeys import models_schema
from support.registry import FaultRegistry, make_image, noise, small_image
from test_serve import Site

REFERENCE = "vllm/vllm-openai:v0.32.0"


class Connected(NamedTuple):
    """The connected side: a home with a model and images of vLLM, and the folder of the delivery."""

    hfship: Program
    media: Path
    host: str


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory, made_model: Path) -> Iterator[Connected]:
    root = tmp_path_factory.mktemp("connected")
    hfship = program("pyz", root / "home")
    shutil.copytree(made_model, hfship.home / "models/tiny")
    with FaultRegistry() as registry:
        for tag, seed in (("v0.31.0", 1), ("v0.32.0", 2)):
            registry.add(small_image(3_000_000, seed), "vllm/vllm-openai", tag)
        registry.add(make_image([noise(10_000)]), "org/other")
        names = ["vllm/vllm-openai:v0.31.0", REFERENCE, "org/other:1"]
        hfship("fetch", *(f"docker://{registry.host}/{name}" for name in names))
        hfship("pack", "tiny", "--with-image", "--split", "2300k", "-o", root / "media")
        yield Connected(hfship, root / "media", registry.host)


def test_a_delivery_holds_all_that_a_machine_needs(connected: Connected) -> None:
    names = {path.name for path in connected.media.iterdir()}
    assert {"hfship.pyz", "READ-ME-FIRST.txt", "models.toml", "tiny.bundle.json"} <= names
    assert {"vllm-openai_v0.32.0.tar.zst.0001", "tiny.tar.zst.0001"} <= names
    assert not any("v0.31.0" in name or "other" in name for name in names)
    text = (connected.media / "READ-ME-FIRST.txt").read_text()
    assert "python3 hfship.pyz serve tiny.bundle.json" in text and REFERENCE in text
    file = read_models_file(connected.media / "models.toml", models_schema())
    assert file.models[0].serve["image"] == f"{connected.host}/{REFERENCE}"


def test_every_command_of_the_read_me_works(connected: Connected, tmp_path: Path) -> None:
    site = Site(program("pyz", tmp_path / "home"), tmp_path / "far", connected.media)
    media = tmp_path / "media"
    shutil.copytree(connected.media, media)
    lines = (media / "READ-ME-FIRST.txt").read_text().partition("These files carry")[0].splitlines()
    commands = [line.split()[2:] for line in lines if line.startswith("    python3")]
    assert [words[0] for words in commands] == ["verify", "serve", "unpack", "unpack", "serve"]
    try:
        for words in commands[:2]:
            site(*words, cwd=media, env=far_env(site))
        assert (site.models / "tiny/config.json").exists()
        again = site("serve", "tiny.bundle.json", "--json", cwd=media, env=far_env(site))
        (row,) = json.loads(again.stdout)
        assert row["state"] == "healthy" and row["image"].endswith(REFERENCE)
        loads = [call for call in site.calls() if call[0] == "load"]
        assert len(loads) == 1, "an image that is there is not sent again"
    finally:
        site("stop", "tiny", env=far_env(site))


def far_env(site: Site) -> Dict[str, str]:
    return {"PATH": f"{site.bin}:{os.environ['PATH']}", "HFSHIP_STUB_GPUS": "1x H200 143771"}


def test_verify_and_unpack_take_a_delivery(connected: Connected, tmp_path: Path) -> None:
    hfship = program("source", tmp_path / "home")
    rows = json.loads(hfship("verify", connected.media / "tiny.bundle.json", "--json").stdout)
    assert len(rows) == 2
    hfship("unpack", connected.media / "tiny.bundle.json", "-o", tmp_path / "far")
    assert {path.name for path in (tmp_path / "far").iterdir()} == {"tiny", "vllm-openai_v0.32.0"}


def test_a_delivery_that_is_not_whole_is_told(connected: Connected, tmp_path: Path) -> None:
    media = tmp_path / "media"
    shutil.copytree(connected.media, media)
    for path in media.glob("vllm-openai*"):
        path.unlink()
    site = Site(program("source", tmp_path / "home"), tmp_path / "far", media)
    done = site("serve", media / "tiny.bundle.json", code=5)
    assert "missing: vllm-openai_v0.32.0.tar.zst" in done.stderr
    done = site("serve", media / "tiny.bundle.json", "--plan", code=2)
    assert "not unpacked yet" in done.stderr


def test_an_image_that_was_not_fetched_is_named_with_the_command(connected: Connected) -> None:
    done = connected.hfship("pack", "tiny", "--with-image", "vllm/vllm-openai:v9", code=5)
    assert "hfship.pyz fetch docker://vllm/vllm-openai:v9" in done.stderr


def test_pack_reminds_of_the_image(connected: Connected, tmp_path: Path) -> None:
    done = connected.hfship("pack", "tiny", "-o", tmp_path)
    assert "--with-image" in done.stderr
    done = connected.hfship("pack", "tiny", "-o", connected.media, code=None)
    assert "--with-image" not in done.stderr


def test_a_models_file_names_images(connected: Connected, tmp_path: Path) -> None:
    with FaultRegistry() as registry:
        registry.add(small_image(), "org/app", "7")
        (tmp_path / "m.toml").write_text(
            f'[[image]]\nreference = "docker://{registry.host}/org/app:7"\n'
            'platform = "linux/amd64"\n[[model]]\nrepo = "org/tiny"\nname = "tiny"\n'
        )
        env = {"HF_ENDPOINT": "http://127.0.0.1:9"}
        options = ("--models", tmp_path / "m.toml")
        connected.hfship("fetch", *options, env=env, code=None)
    assert (connected.hfship.home / "models/app_7/oci-layout").exists()
    connected.hfship("pack", *options, "-o", tmp_path / "out")
    out = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {"tiny.tar.zst", "app_7.tar.zst"} <= out.keys()
    assert out["models.toml"].read_bytes() == (tmp_path / "m.toml").read_bytes()
    (tmp_path / "bad.toml").write_text('[[image]]\nreference = "docker://A/B"\n')
    done = connected.hfship("models", tmp_path / "bad.toml", code=2)
    assert "is not an image" in done.stderr


def test_images_that_a_site_is_made_of_travel(connected: Connected, tmp_path: Path) -> None:
    with FaultRegistry() as registry:
        registry.add(small_image(), "org/haproxy", "3.4")
        registry.add(small_image(seed=3), "org/prometheus", "3")
        (tmp_path / "m.toml").write_text(
            f'[gateway]\nimage = "{registry.host}/org/haproxy:3.4"\n'
            f'[monitoring]\nprometheus_image = "{registry.host}/org/prometheus:3"\n'
            '[[model]]\nrepo = "org/tiny"\nname = "tiny"\n'
        )
        options = ("--models", tmp_path / "m.toml")
        connected.hfship("fetch", *options, env={"HF_ENDPOINT": "http://127.0.0.1:9"}, code=None)
    done = connected.hfship("pack", *options, "-o", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tiny.tar.zst", "haproxy_3.4.tar.zst", "prometheus_3.tar.zst"} <= names
    assert "has no [" not in done.stderr
    (tmp_path / "m.toml").write_text('[gateway]\n[[model]]\nrepo = "org/tiny"\nname = "tiny"\n')
    done = connected.hfship("pack", *options, "-o", tmp_path / "out")
    assert "has no [gateway] image" in done.stderr


# ---- the format

ITEM = {"kind": "model", "name": "m", "archive": "m.tar.zst", "version": "0", "reference": ""}
WRONG: Dict[str, Any] = {
    "another format": {"format": "hfship-bundle/2", "name": "m", "items": []},
    "no items": {"format": "hfship-bundle/1", "name": "m"},
    "a path": {
        "format": "hfship-bundle/1",
        "name": "m",
        "items": [{**ITEM, "archive": "../m.tar.zst"}],
    },
    "no archive": {"format": "hfship-bundle/1", "name": "m", "items": [{**ITEM, "archive": "m"}]},
    "another kind": {"format": "hfship-bundle/1", "name": "m", "items": [{**ITEM, "kind": "key"}]},
    "a name": {"format": "hfship-bundle/1", "name": "../m", "items": [ITEM]},
    "a list": [],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_delivery_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.bundle.json"
    path.write_text(json.dumps(WRONG[name]))
    with pytest.raises(IntegrityError):
        read_bundle(path)


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


@given(rows=st.lists(st.tuples(st.sampled_from(["image", "model"]), NAMES), min_size=1, max_size=4))
def test_a_delivery_reads_back(rows: List[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    items = [BundleItem(kind, name, f"{name}.tar.zst", "0" * 40, "") for kind, name in rows]
    bundle = Bundle("all", tuple(items))
    path = tmp_path_factory.mktemp("bundle") / "all.bundle.json"
    path.write_text(bundle.text())
    assert read_bundle(path) == bundle
    assert all(name in read_me_text([bundle]) for _, name in rows)
    assert models_text([bundle]).count("[[model]]") == len(bundle.models)
