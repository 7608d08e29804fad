"""Models that other tools put into a registry: KitOps, modctl and oras, in files and in archives, by manifests as these write
them (modelpack/model-spec v0.0.7, kitops pkg/lib/constants/mediatype, oras.land annotations)."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from conftest import Program, program
from support import archives as a
from support.registry import COMPRESSION, FaultRegistry, digest, dumps, layer_of

KIT = "application/vnd.kitops.modelkit"
PACK = "application/vnd.cncf.model"
FILE_PATH, TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
FILES = {"config.json": b'{"model_type": "tiny"}', "model.safetensors": a.tensors(a.noise(9000))}
DOCS = {"README.md": b"# hello", "docs/more.md": b"more"}

Layer = Tuple[str, bytes, Dict[str, str]]  # media type, content, annotations


def tar_layer(kind: str, files: Dict[str, bytes], compression: str = "gzip") -> Layer:
    """A tar of files, with the folders in which they lie as KitOps walks them."""
    suffix, compress = COMPRESSION[compression]
    return f"{kind}.tar{suffix}", compress(layer_of(files)), {}


def file_layers(files: Dict[str, bytes], kind: str, key: str) -> List[Layer]:
    return [(kind, content, {key: path}) for path, content in files.items()]


# tool: (type of the configuration, artifactType, layers, files that are the model)
TOOLS: Dict[str, Tuple[str, str, Sequence[Layer], Dict[str, bytes]]] = {
    "kitops": (
        f"{KIT}.config.v1+json",
        f"{KIT}.manifest.v1+json",
        [tar_layer(f"{KIT}.model.v1", FILES), tar_layer(f"{KIT}.docs.v1", DOCS)],
        {**FILES, **DOCS},
    ),
    "kitops, not compressed": (
        f"{KIT}.config.v1+json",
        "",
        [tar_layer(f"{KIT}.model.v1", FILES, "plain")],
        FILES,
    ),
    "kitops, as ModelPack with its Kitfile": (
        f"{PACK}.config.v1+json",
        f"{PACK}.manifest.v1+json",
        [
            (f"{KIT}.config.v1+json", b"{}", {}),
            tar_layer(f"{PACK}.weight.v1", FILES),
            tar_layer(f"{PACK}.doc.v1", DOCS, "zstd"),
        ],
        {**FILES, **DOCS},
    ),
    "modctl, raw": (
        f"{PACK}.config.v1+json",
        f"{PACK}.manifest.v1+json",
        file_layers({**FILES, **DOCS}, f"{PACK}.weight.v1.raw", FILE_PATH),
        {**FILES, **DOCS},
    ),
    "modctl, some in archives": (
        f"{PACK}.config.v1+json",
        f"{PACK}.manifest.v1+json",
        [
            *file_layers(FILES, f"{PACK}.weight.v1.raw", FILE_PATH),
            tar_layer(f"{PACK}.doc.v1", DOCS, "plain"),
        ],
        {**FILES, **DOCS},
    ),
    "oras": (
        "application/vnd.oci.empty.v1+json",
        "application/vnd.unknown.artifact.v1",
        file_layers(FILES, "application/vnd.oci.image.layer.v1.tar", TITLE),
        FILES,
    ),
    "oras of Python, with a folder": (
        "application/vnd.unknown.config.v1+json",
        "",
        [
            *file_layers(FILES, "application/vnd.oci.image.layer.v1.tar", TITLE),
            (
                "application/vnd.oci.image.layer.v1.tar+gzip",
                COMPRESSION["gzip"][1](layer_of({"docs/more.md": b"more"})),
                {TITLE: "docs"},
            ),
        ],
        {**FILES, "docs/more.md": b"more"},
    ),
    "oras, with a folder": (
        "application/vnd.oci.empty.v1+json",
        "application/vnd.unknown.artifact.v1",
        [
            *file_layers(FILES, "application/vnd.oci.image.layer.v1.tar", TITLE),
            (
                "application/vnd.oci.image.layer.v1.tar+gzip",
                COMPRESSION["gzip"][1](layer_of({"docs/more.md": b"more"})),
                {TITLE: "docs", UNPACK: "true"},
            ),
        ],
        {**FILES, "docs/more.md": b"more"},
    ),
}


def put(registry: FaultRegistry, tool: str, layers: Sequence[Layer] = ()) -> List[str]:
    """Put a model into a registry as a tool does; the digests of its layers."""
    config_type, artifact, of_tool, _ = TOOLS[tool]
    config = b"{}"
    registry.blobs[digest(config)] = config
    described = []
    for kind, content, notes in layers or of_tool:
        registry.blobs[digest(content)] = content
        row: Dict[str, Any] = {"mediaType": kind, "digest": digest(content)}
        described.append({**row, "size": len(content), "annotations": notes})
    value: Dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": config_type, "digest": digest(config), "size": len(config)},
        "layers": described,
    }
    if artifact:
        value["artifactType"] = artifact
    body = dumps(value)
    registry.manifests["site/m", "1"] = body
    registry.manifests["site/m", digest(body)] = body
    return [row["digest"] for row in described]


@pytest.fixture
def registry() -> Iterator[FaultRegistry]:
    with FaultRegistry() as server:
        yield server


@pytest.fixture
def hfship(tmp_path: Path) -> Program:
    return program("source", tmp_path / "home")


def words(registry: FaultRegistry, out: Path, *more: Any) -> List[Any]:
    return ["fetch", f"docker://{registry.host}/site/m:1", "-o", out, "--name", "m", *more]


def model_in(folder: Path) -> Dict[str, bytes]:
    found: Dict[str, bytes] = a.tree(folder)
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_a_model_of_another_tool_comes_byte_for_byte(
    tool: str, registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    put(registry, tool)
    (row,) = json.loads(hfship(*words(registry, tmp_path / "out", "--json")).stdout)
    assert model_in(tmp_path / "out/m") == TOOLS[tool][3]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m"]
    assert row["files"] == len(TOOLS[tool][3])
    # What is here is not asked for again; and it is a model like any other.
    registry.blob_bytes = 0
    done = hfship(*words(registry, tmp_path / "out"))
    assert "nothing to fetch" in done.stdout and registry.blob_bytes <= 2
    hfship("pack", tmp_path / "out/m", "-o", tmp_path / "packed")
    hfship("verify", tmp_path / "packed/m.tar.zst")


def test_a_newer_one_takes_its_place_and_a_stranger_is_left_alone(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    put(registry, "kitops")
    hfship(*words(registry, tmp_path))
    put(registry, "kitops", [tar_layer(f"{KIT}.model.v1", {"config.json": b"new"})])
    hfship(*words(registry, tmp_path))
    assert model_in(tmp_path / "m") == {"config.json": b"new"}
    put(registry, "kitops")
    (tmp_path / "m/mine.txt").write_text("notes")
    done = hfship(*words(registry, tmp_path), code=2)
    assert "holds something else" in done.stderr and (tmp_path / "m/mine.txt").exists()


def evil(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member)
    return stream.getvalue()


MODEL = f"{KIT}.model.v1.tar"
EVIL: Dict[str, Tuple[Sequence[Layer], str]] = {
    "a path that leads out": ([(MODEL, evil("../../x"), {})], "unsafe path"),
    "an absolute path": ([(MODEL, evil("/etc/x"), {})], "unsafe path"),
    "a link": ([(MODEL, evil("x", tarfile.SYMTYPE, "/etc"), {})], "link"),
    "what is never content": ([(MODEL, evil(".git/config"), {})], "never part of a model"),
    "our own folder": ([(MODEL, evil(".hfship/manifest.json"), {})], "holds no files"),
    "no tar": ([(MODEL, a.noise(2000), {})], "cannot be unpacked"),
    "a cut tar": ([(MODEL, layer_of(FILES)[:5000], {})], "cannot be unpacked"),
    "the same file twice": (
        [
            tar_layer(f"{KIT}.model.v1", {"a": b"1"}),
            tar_layer(f"{KIT}.docs.v1", {"a": b"2"}),
        ],
        "twice",
    ),
}


@pytest.mark.parametrize("name", EVIL)
def test_hostile_layers_are_refused_and_nothing_appears(
    name: str, registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    layers, said = EVIL[name]
    put(registry, "kitops", layers)
    done = hfship(*words(registry, tmp_path / "out"), code=6)
    assert said in done.stderr
    assert not (tmp_path / "out/m").exists()
    assert not list(tmp_path.glob("x")) and not Path("/etc/x").exists()


def test_a_flipped_layer_is_fetched_again(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    layers = put(registry, "kitops")
    registry.faults.flip, registry.faults.flip_times = layers[0], 1
    hfship(*words(registry, tmp_path))
    assert model_in(tmp_path / "m") == TOOLS["kitops"][3]


def test_a_layer_that_changed_on_disk_is_not_unpacked(
    registry: FaultRegistry, hfship: Program, tmp_path: Path
) -> None:
    from hfship.archive.layer_tars import Layer, restore_layers
    from hfship.base.errors import IntegrityError
    from hfship.base.manifest import Source

    blob = tmp_path / ("0" * 64)
    blob.write_bytes(layer_of(FILES))
    source = Source("http://r", "site/m", "1", "site/m", "1" * 64)
    with pytest.raises(IntegrityError, match="is not what its digest says"):
        restore_layers([Layer(blob)], tmp_path / "m", source, lambda _, manifest: manifest)
    assert not (tmp_path / "m").exists()
