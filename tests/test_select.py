"""Which files of a repository are fetched."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Dict, List, Set, Tuple
from urllib.request import urlopen

import pytest

from conftest import Program
from hfship.base.manifest import Manifest, read_manifest
from hfship.hub.protocol import RemoteFile
from hfship.hub.select import pattern_of, refusal_of, select_files, without_duplicates
from support.hub import FaultHub

MB = 1 << 20

# What a repository has -> what is left out of it. A size is 1 byte where none is given: too little
# to tell anything.
LEFT_OUT: Dict[str, Tuple[List[str], List[str]]] = {
    "transformers, all formats": (
        ["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "config.json"],
        ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot"],
    ),
    "shards of both, with indexes": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
         "pytorch_model-00001-of-00003.bin", "pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin",
         "pytorch_model.bin.index.json"],
        ["pytorch_model-00001-of-00003.bin", "pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin",
         "pytorch_model.bin.index.json"],
    ),
    "six digits": (
        ["model-00001-of-000001.safetensors", "pytorch_model.bin"],
        ["pytorch_model.bin"],
    ),
    "sentence-transformers: each module by itself": (
        ["model.safetensors", "pytorch_model.bin", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
         "2_Dense/pytorch_model.bin"],
        ["pytorch_model.bin"],
    ),
    "a module with both": (
        ["model.safetensors", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "3_Dense/pytorch_model.bin"],
        ["2_Dense/pytorch_model.bin"],
    ),
    "a tower without safetensors": (
        ["model.safetensors", "vision_tower/pytorch_model.bin", "vision_tower/pytorch_model.bin.index.json"],
        [],
    ),
    "no safetensors at all": (["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"], []),
    "a shard of the safetensors is not there": (["model-00002-of-00002.safetensors", "pytorch_model.bin"], []),
    "safetensors of something else": (["adapter_model.safetensors", "pytorch_model.bin"], []),
    "no weights of the model": (["model.safetensors", "training_args.bin", "optimizer.bin", "scheduler.bin", "vocab.bin"], []),
    "variants are others": (
        ["model.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin", "pytorch_model.bin.index.fp16.json"],
        ["pytorch_model.bin"],
    ),
    "variants that are there": (
        ["model.fp16.safetensors", "pytorch_model.fp16.bin", "pytorch_model.bin"],
        ["pytorch_model.fp16.bin"],
    ),
    "shards of variants, old and new": (
        ["model.fp16-00001-of-00001.safetensors", "pytorch_model-00001-of-00001.fp16.bin"],
        ["pytorch_model-00001-of-00001.fp16.bin"],
    ),
    "a diffusers pipeline": (
        ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"],
        [],
    ),
    "Llama: the weights of Meta": (
        ["model.safetensors", "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"],
        ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"],
    ),
    "only the weights of Meta": (["original/consolidated.00.pth", "original/params.json", "config.json"], []),
    "gpt-oss": (
        ["model.safetensors", "original/model.safetensors", "original/config.json", "metal/model.bin"],
        ["original/model.safetensors", "original/config.json"],
    ),
    "a .bin in original/": (["model.safetensors", "original/pytorch_model.bin"], []),
    "Mistral: its own layout alone": (
        ["consolidated.safetensors", "params.json", "tekken.json", "SYSTEM_PROMPT.txt"],
        [],
    ),
    "Mistral: consolidated": (
        ["model.safetensors", "consolidated.safetensors", "params.json", "tekken.json"],
        ["consolidated.safetensors"],
    ),
    "Mistral, in parts": (
        ["model.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors",
         "consolidated.safetensors.index.json"],
        ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors",
         "consolidated.safetensors.index.json"],
    ),
    "consolidated alone": (["consolidated.safetensors", "params.json"], []),
    "consolidated.00.pth": (["model.safetensors", "consolidated.00.pth"], ["consolidated.00.pth"]),
    "other .pth": (["model.safetensors", "tts.pth", "vocoder/generator.pt"], []),
    "gguf is another quantisation": (["model.safetensors", "model-Q4_K_M.gguf"], []),
    "exports": (
        ["model.safetensors", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q4.onnx", "model.onnx", "64.tflite",
         "openvino/openvino_model.bin", "openvino/openvino_model.xml",
         "coreml/float32_model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"],
        ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q4.onnx", "model.onnx", "64.tflite",
         "openvino/openvino_model.bin", "openvino/openvino_model.xml",
         "coreml/float32_model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"],
    ),
    "exports of a module": (
        ["a/model.safetensors", "a/onnx/model.onnx", "b/onnx/model.onnx"],
        ["a/onnx/model.onnx"],
    ),
    "an ONNX that the model's own code loads": (["model.safetensors", "campplus.onnx", "speech/tokenizer.onnx"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out(name: str) -> None:
    listed, left_out = LEFT_OUT[name]
    files = [RemoteFile(path, 1, "") for path in listed]
    kept = {file.path for file in without_duplicates(files)}
    assert set(listed) - kept == set(left_out)


@pytest.mark.parametrize(
    "safetensors, other, left_out",
    [
        (100, 200, True),  # bfloat16, float32
        (100, 101, True),
        (100, 50, True),
        (25, 100, False),  # four bits: other weights
        (1, 500, False),  # the head alone
    ],
)
@pytest.mark.parametrize("path", ["pytorch_model.bin", "consolidated.safetensors", "tf_model.h5"])
def test_what_is_much_larger_is_something_else(
    safetensors: int, other: int, left_out: bool, path: str
) -> None:
    files = [
        RemoteFile("model.safetensors", safetensors * MB, ""),
        RemoteFile(path, other * MB, ""),
    ]
    assert (len(without_duplicates(files)) == 1) == left_out


def test_absurd_numbers_of_shards_cost_nothing() -> None:
    names = [f"model-00001-of-{total:05d}.safetensors" for total in range(90_000, 99_999)]
    files = [RemoteFile(path, 1, "") for path in [*names, "pytorch_model.bin"]]
    assert len(without_duplicates(files)) == len(files)


# (patterns, paths that they match of these), as `filter_repo_objects` of huggingface_hub 2.4 says
PATHS = ["a.json", ".gitattributes", "sub/a.json", "sub/deep/b.bin", "subway/c", "A.JSON", "[x]"]
PATTERNS: List[Tuple[List[str], List[str]]] = [
    (["*"], PATHS),
    (["*.json"], ["a.json", "sub/a.json"]),
    (["sub/"], ["sub/a.json", "sub/deep/b.bin"]),
    (["sub/*"], ["sub/a.json", "sub/deep/b.bin"]),
    (["sub"], []),
    (["?.json"], ["a.json"]),
    (["[!a]*"], [".gitattributes", "sub/a.json", "sub/deep/b.bin", "subway/c", "A.JSON", "[x]"]),
    (["[[]x]"], ["[x]"]),
    ([".*"], [".gitattributes"]),
]


@pytest.mark.parametrize("patterns, matched", PATTERNS)
def test_patterns_mean_what_they_mean_for_hf(patterns: List[str], matched: List[str]) -> None:
    files = [RemoteFile(path, 1, "") for path in PATHS]
    assert [file.path for file in select_files(files, patterns, [])] == matched
    rest = [path for path in PATHS if path not in matched]
    assert [file.path for file in select_files(files, [], patterns)] == rest


@pytest.mark.parametrize(
    "path",
    [
        "a\\b", "a\tb", "C:\\x", "../../x", "/abs", ".hfship/manifest.json", ".HFSHIP/x", "a//b", "a/./b", "x" * 256,
        "bad\udcff", "a[1]\n", "a*\x7f",
    ],
)  # fmt: skip
def test_what_is_refused_can_be_excluded_as_proposed(path: str) -> None:
    assert refusal_of(path)
    pattern = pattern_of(path)
    assert pattern.isprintable()
    others = [RemoteFile(name, 1, "") for name in ("config.json", "a", "x", "abs")]
    assert select_files([RemoteFile(path, 1, ""), *others], [], [pattern]) == others


# -- with a Hub


def held(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest
    return manifest


def paths_in(folder: Path) -> Set[str]:
    return {entry.path for entry in held(folder).files}


def commit_at(hub: FaultHub) -> str:
    with urlopen(f"{hub.url}/api/models/org/tiny") as answer:
        return str(json.load(answer)["sha"])


def test_what_is_left_out_is_said_and_recorded(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    for path in ("tf_model.h5", "flax_model.msgpack", "2_Dense/pytorch_model.bin"):
        (published / path).parent.mkdir(exist_ok=True)
        (published / path).write_bytes(b"x" * 1000)
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    done = hfship(*command, "--json")
    left_out = ["flax_model.msgpack", "tf_model.h5"]
    (row,) = json.loads(done.stdout)
    assert row["left_out"] == left_out and row["partial"] == []
    assert "leaving out 2 files (2.0 kB)" in done.stderr
    assert all(name in done.stderr for name in left_out)
    manifest = held(tmp_path / "tiny")
    assert (manifest.left_out, list(manifest.left_out_paths)) == (2, left_out)
    assert "2_Dense/pytorch_model.bin" in paths_in(tmp_path / "tiny")
    assert f"left out: {', '.join(left_out)}" in hfship("verify", tmp_path / "tiny").stdout
    hfship(*command, "--all-files")
    assert held(tmp_path / "tiny").left_out == 0


def test_selections_of_a_commit_add_up(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    folder = tmp_path / "tiny"
    hfship(*command, "--include", "*.json")
    first = paths_in(folder)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(held(folder).partial) == shards
    done = hfship(*command, "--include", shards[0])
    assert paths_in(folder) == first | {shards[0]}
    assert list(held(folder).partial) == shards[1:]
    assert "of earlier selections of this commit stay" in done.stderr and shards[1] in done.stdout
    hfship(*command, "--include", "*.safetensors")
    assert paths_in(folder) == first | set(shards) and not held(folder).partial
    assert held(folder).left_out == len(list(published.rglob("*.*"))) + 1 - len(first) - 2
    (folder / "tokenizer.json").unlink()  # what is gone is not fetched again by another selection
    (folder / "config.json").write_bytes(b"damaged")  # but what is there is right afterwards
    hub.forget()
    hfship(*command, "--include", "README.md")
    assert paths_in(folder) == first - {"tokenizer.json"} | {*shards, "README.md"}
    hfship("verify", folder)
    assert (folder / "config.json").read_bytes() == (published / "config.json").read_bytes()


def test_selections_of_another_commit_do_not_add_up(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    hfship(*command, "--include", "*.json")
    before = commit_at(hub)
    (published / "README.md").write_text("a new commit")
    while commit_at(hub) == before:
        time.sleep(0.1)
    hfship(*command, "--include", "README.md")
    assert paths_in(tmp_path / "tiny") == {"README.md"}


def test_a_partial_model_is_called_that_wherever_it_goes(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "a")
    done = hfship(*command, "--exclude", "*-00002-of-*")
    missing = "model-00002-of-00002.safetensors"
    says = f"partial: 1 file of weights that its index names not in it ({missing})"
    folder = tmp_path / "a" / "tiny"
    assert says in done.stdout and says in hfship("verify", folder).stdout
    assert missing in hfship("pack", folder, "-o", tmp_path / "b").stderr
    archive = tmp_path / "b" / "tiny.tar.zst"
    assert says in hfship("verify", archive).stdout
    assert says in hfship("unpack", archive, "-o", tmp_path / "c").stdout
    served = hfship("serve", tmp_path / "c" / "tiny", "--plan", code=6)
    assert "is partial" in served.stderr and missing in served.stderr


REFUSED = ["a\\b.txt", "tab\there", ".hfship/manifest.json", "../../x", "C:\\x"]


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_are_refused_matter_only_where_they_are_wanted(
    name: str, hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    hub.faults.evil_path = name
    command = ("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path)
    refused = hfship(*command, code=6)
    assert "cannot be used" in refused.stderr
    proposed = re.search("to fetch the rest: .*?(fetch .*)", refused.stderr)
    assert proposed
    hfship(*shlex.split(proposed[1]))
    assert "config.json" in paths_in(tmp_path / "tiny")
    hfship(*command, "--include", "tokenizer*")


def test_a_proposal_keeps_what_was_asked_for(
    hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    hub.faults.evil_path = "a\\b.json"
    asked = ["--include", "*.json", "--exclude", "tokenizer*"]
    refused = hfship(
        "fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, *asked, code=6
    ).stderr
    proposed = re.search("to fetch the rest: .*?(fetch .*)", refused)
    assert proposed and shlex.join(asked) in proposed[1]
    hfship(*shlex.split(proposed[1]))
    assert all(path.endswith(".json") for path in paths_in(tmp_path / "tiny"))
