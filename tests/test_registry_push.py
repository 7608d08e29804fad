"""push NAME docker://: models as ModelPack and as images to mount, images as they came; and back."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from conftest import Program, free_port, missing, program
from hfship.base.manifest import FileEntry
from hfship.hub.modelpack import layer_type
from hfship.ops.model_forms import MOST_LAYERS, SMALL, layer_groups, tar_member
from hfship.ops.registry_push import CHUNK_SIZE, Blob, Stretch
from support.folders import same_files
from support.hub import FaultHub
from support.make_model import make_model
from support.registry import FaultRegistry, digest, real_registry, small_image

MODELPACK = "application/vnd.cncf.model.manifest.v1+json"


@pytest.fixture
def hfship(tmp_path: Path) -> Program:
    return program("source", tmp_path / "home")


@pytest.fixture
def registry() -> Iterator[FaultRegistry]:
    with FaultRegistry() as server:
        yield server


@pytest.fixture
def fetched(hfship: Program, hub: FaultHub, published: Path) -> Path:
    """org/tiny, fetched into the models folder."""
    hfship("fetch", "org/tiny", "--endpoint", hub.url)
    return hfship.home / "models/tiny"


def manifest_of(registry: FaultRegistry, name: str, tag: str) -> Dict[str, Any]:
    value = json.loads(registry.manifests[name, tag])
    assert isinstance(value, dict)
    return value


def target(registry: FaultRegistry, tag: str = "v1") -> str:
    return f"docker://{registry.host}/site/tiny:{tag}"


# ---- both forms, and back


def test_a_model_comes_back_byte_for_byte_with_the_hubs_proof(
    hfship: Program, registry: FaultRegistry, fetched: Path, tmp_path: Path
) -> None:
    rows = json.loads(hfship("push", "tiny", target(registry), "--json").stdout)
    assert [row["form"] for row in rows] == ["artifact", "image"]
    artifact = manifest_of(registry, "site/tiny", "v1")
    assert artifact["artifactType"] == MODELPACK
    paths = {layer["annotations"]["org.cncf.model.filepath"] for layer in artifact["layers"]}
    assert ".hfship/manifest.json" in paths and "sub folder/ünïcode #1?.txt" in paths
    assert all(layer["mediaType"].endswith(".raw") for layer in artifact["layers"])

    shutil.rmtree(fetched.parent)
    hfship("fetch", target(registry), "--name", "tiny", "-o", tmp_path / "back")
    back = tmp_path / "back/tiny"
    manifest = json.loads((back / ".hfship/manifest.json").read_text())
    assert manifest["source"]["repo"] == "org/tiny" and len(manifest["source"]["commit"]) == 40
    for entry in manifest["files"]:
        assert digest((back / entry["path"]).read_bytes()) == f"sha256:{entry['sha256']}"
    again = hfship("fetch", target(registry), "--name", "tiny", "-o", tmp_path / "back")
    assert "nothing to fetch" in again.stdout


def test_the_second_form_is_an_image_whose_layers_are_the_files(
    hfship: Program, registry: FaultRegistry, fetched: Path, tmp_path: Path
) -> None:
    hfship("push", "tiny", target(registry), "--form", "image")
    image = manifest_of(registry, "site/tiny", "v1")
    config = json.loads(registry.blobs[image["config"]["digest"]])
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in image["layers"]]
    for layer in image["layers"]:
        content = registry.blobs[layer["digest"]]
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(tmp_path / "mounted", filter="fully_trusted")
    shutil.rmtree(fetched / ".cache", ignore_errors=True)
    shutil.rmtree(tmp_path / "mounted/.hfship")
    for path in fetched.rglob("*"):
        inside = path.relative_to(fetched)
        if path.is_file() and inside.parts[0] != ".hfship":
            assert (tmp_path / "mounted" / inside).read_bytes() == path.read_bytes()
    again = json.loads(hfship("push", "tiny", target(registry), "--form", "image", "--json").stdout)
    assert again[0]["bytes_sent"] == 0


def test_an_image_is_pushed_as_it_came(
    hfship: Program, registry: FaultRegistry, tmp_path: Path
) -> None:
    image = small_image()
    registry.add_index({"amd64": image, "arm64": small_image(architecture="arm64")})
    hfship("fetch", f"docker://{registry.host}/org/app:1", "--platform", "linux/amd64")
    with FaultRegistry() as other:
        hfship("push", "app_1", f"docker://{other.host}/site/app:2")
        assert digest(other.manifests["site/app", "2"]) == image.digest
        assert {*image.blobs} <= {*other.blobs}
        before = other.pushed_bytes
        (row,) = json.loads(
            hfship("push", "app_1", f"docker://{other.host}/site/app:2", "--json").stdout
        )
        assert row["bytes_sent"] == 0 and other.pushed_bytes == before


# ---- faults


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one file of several chunks."""
    folder = tmp_path_factory.mktemp("large") / "large"
    make_model(folder, size_mb=5 * CHUNK_SIZE // (1 << 20), shards=1)
    program("source", folder.parent / "home")(
        "pack", folder, "-o", folder.parent, "--profile", "store"
    )
    return folder


@pytest.mark.parametrize(
    "faults",
    [
        {"refuse_chunks": True},
        {"lose_upload": 2},
        {"tokens": True, "token_uses": 2},
        {"basic": True, "user": "ann:pass word"},
    ],
    ids=str,
)
def test_push_survives(
    faults: Dict[str, Any], hfship: Program, registry: FaultRegistry, large: Path, tmp_path: Path
) -> None:
    vars(registry.faults).update(faults)
    (tmp_path / "password").write_text("pass word")
    login = ["--registry-user", "ann", "--registry-password-file", tmp_path / "password"]
    hfship("push", large, target(registry), "--form", "artifact", *login)
    for layer in manifest_of(registry, "site/tiny", "v1")["layers"]:
        assert digest(registry.blobs[layer["digest"]]) == layer["digest"]


def test_a_killed_push_goes_on_behind_the_last_chunk(
    hfship: Program, registry: FaultRegistry, large: Path
) -> None:
    registry.faults.upload_s = 0.3
    process = hfship.start("push", large, target(registry), "--form", "artifact")
    until = time.monotonic() + 60
    while registry.pushed_bytes < 2 * CHUNK_SIZE and time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)
    registry.faults.upload_s = 0.0
    hfship("push", large, target(registry), "--form", "artifact")
    size = sum(map(len, registry.blobs.values()))
    assert registry.pushed_bytes - size <= CHUNK_SIZE, "more than the chunk under way came twice"
    assert not list(large.glob(".hfship/push/*"))


def test_a_file_that_rotted_is_not_pushed(
    hfship: Program, registry: FaultRegistry, fetched: Path
) -> None:
    victim = fetched / "config.json"
    victim.write_bytes(victim.read_bytes()[::-1])
    done = hfship("push", "tiny", target(registry), "--form", "artifact", code=6)
    assert "is not what its manifest says" in done.stderr
    assert ("site/tiny", "v1") not in registry.manifests


REFUSED = {
    "no login": ({"basic": True, "user": "ann:pass word"}, ["tiny", "TARGET"], 4, "wants a login"),
    "unknown": ({}, ["nothing", "TARGET"], 5, "was not found"),
    "two": ({}, ["tiny", "tiny", "TARGET"], 2, "one at a time"),
    "no reference": ({}, ["tiny", "docker://A/B"], 2, "is not an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_push_refuses(name: str, hfship: Program, registry: FaultRegistry, fetched: Path) -> None:
    faults, words, code, said = REFUSED[name]
    vars(registry.faults).update(faults)
    given = [word.replace("TARGET", target(registry)) for word in words]
    assert said in hfship("push", *given, code=code).stderr


def test_a_path_that_leads_out_is_refused(hfship: Program, registry: FaultRegistry) -> None:
    layer = {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": "sha256:" + "b" * 64,
        "size": 2,
        "annotations": {"org.cncf.model.filepath": "../../x"},
    }
    value = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": MODELPACK,
        "config": {
            "mediaType": "application/vnd.cncf.model.config.v1+json",
            "digest": "sha256:" + "a" * 64,
            "size": 2,
        },
        "layers": [layer],
    }
    registry.manifests["site/tiny", "v1"] = json.dumps(value).encode()
    assert "unsafe path" in hfship("fetch", target(registry), code=6).stderr


# ---- pure


def test_weights_have_a_layer_each_as_far_as_there_are_layers() -> None:
    files = [FileEntry(f"{n}.safetensors", SMALL, "0" * 64) for n in range(250)]
    files += [FileEntry("config.json", 10, "0" * 64)]
    groups = layer_groups(files)
    assert len(groups) <= MOST_LAYERS and groups[0] == [files[-1]]
    assert sorted(f.path for group in groups for f in group) == sorted(f.path for f in files)
    assert [len(group) for group in layer_groups(files[:5])] == [0, 1, 1, 1, 1, 1]


def test_a_blob_of_stretches_reads_at_any_offset(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    stretches = tar_member("f", Stretch(10, path="f"))
    blob = Blob("sha256:", sum(stretch.size for stretch in stretches), tuple(stretches))
    whole = blob.read(tmp_path, 0, blob.size)
    with tarfile.open(fileobj=io.BytesIO(whole + bytes(1024))) as tar:
        assert tar.extractfile("f").read() == b"0123456789"  # type: ignore[union-attr]
    for offset in (0, 1, 511, 512, 515, 522, 1023, 1024):
        assert blob.read(tmp_path, offset, 7) == whole[offset : offset + 7]


def test_what_files_are_to_modelpack() -> None:
    assert layer_type("a/README.md").endswith("doc.v1.raw")
    assert layer_type("tokenizer.json").endswith("weight.config.v1.raw")


# ---- the real registry


def test_the_real_registry_holds_both_forms_and_skopeo_copies_them(
    pyz: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    if not shutil.which("docker-registry") or not shutil.which("skopeo"):
        missing("docker-registry and skopeo")
    pyz("fetch", "org/tiny", "--endpoint", hub.url)
    folder = pyz.home / "models/tiny"
    with real_registry(tmp_path / "real", free_port()) as server:
        where = f"docker://{server.host}/site/tiny"
        pyz("push", "tiny", f"{where}:v1")
        for tag in ("v1", "v1-image"):
            copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", f"{where}:{tag}"]
            subprocess.run([*copy, f"dir:{tmp_path}/{tag}"], check=True)
            manifest = json.loads((tmp_path / tag / "manifest.json").read_text())
            for layer in manifest["layers"]:
                content = (tmp_path / tag / layer["digest"][7:]).read_bytes()
                assert digest(content) == layer["digest"]
        tags = ["skopeo", "list-tags", "--tls-verify=false", where]
        listed = json.loads(subprocess.run(tags, check=True, capture_output=True).stdout)
        assert listed["Tags"] == ["v1", "v1-image"]
        pyz("fetch", f"{where}:v1", "--name", "tiny", "-o", tmp_path / "back")
    assert same_files(folder, tmp_path / "back/tiny")
