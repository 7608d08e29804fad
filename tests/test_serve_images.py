# SPDX-License-Identifier: Apache-2.0
"""Which image a plan uses, and for which GPUs it was built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, List, Sequence

import pytest

from hfship.base.errors import HostError
from hfship.base.values import replace
from hfship.serve import images as room
from hfship.serve.images import choose_device, choose_image, image_called, parse_images
from hfship.serve.terms import ENTRYPOINT, IMAGE_SAYS, Gpu, Host, Image, ServeOptions
from hfship.serve.vllm import CUDA_13, SPARSE, VLLM


@pytest.mark.parametrize(
    ("repository", "tag", "version", "cpu"),
    [
        ("vllm/vllm-openai", "v0.27.1", (0, 27, 1), False),
        ("host:5000/vllm/vllm-openai-cpu", "v0.27.1", (0, 27, 1), True),
        ("corp/my-vllm", "v0.27.1", None, False),
        ("corp/vllm", "1.2-cpu", None, True),
        ("corp/vllm", "cpuinfo", None, False),
        ("vllm/vllm-openai", "latest", None, False),
    ],
)
def test_what_the_name_of_an_image_says(repository: str, tag: str, version: Any, cpu: bool) -> None:
    line = f'{{"Repository": "{repository}", "Tag": "{tag}", "ID": "sha256:7"}}'
    (found,) = parse_images(f"WARNING: x\n{line}\n")
    assert found == Image(f"{repository}:{tag}", "sha256:7", version, cpu)


@pytest.mark.parametrize(
    "name",
    ["vllm/vllm-openai-rocm:1", "vllm-tpu:1", "vllm/vllm-openai:<none>", "nginx:1", "vllm/other:1"],
)
def test_images_for_other_devices_are_left_out(name: str) -> None:
    repository, _, tag = name.partition(":")
    assert parse_images(f'{{"Repository": "{repository}", "Tag": "{tag}"}}') == ()


@pytest.mark.parametrize(
    ("said", "version", "cuda", "entrypoint"),
    [
        (
            '{"version": "0.11.0", "cuda": "12.8", "program": "vllm"}',
            (0, 11, 0),
            "12.8",
            ENTRYPOINT,
        ),
        (
            '{"version": "0.11.0", "cuda": "12.8", "program": ""}',
            (0, 11, 0),
            "12.8",
            ("python3", "-m", "vllm.entrypoints.cli.main", "serve"),
        ),
        ('{"version": "", "cuda": "", "program": "vllm"}', None, "", ENTRYPOINT),
    ],
)
def test_what_an_image_says_of_itself(said: str, version: Any, cuda: str, entrypoint: Any) -> None:
    image = Image("corp/vllm:1", "sha256:7")
    found = room.image_that_says(image, f"noise{IMAGE_SAYS}{{}}\n{IMAGE_SAYS}{said}")
    assert found == Image("corp/vllm:1", "sha256:7", version, False, cuda, entrypoint)
    known = room.image_that_says(replace(image, cuda="13.0"), IMAGE_SAYS + said)
    assert known.cuda == "13.0"


@pytest.mark.parametrize("said", ["", "torn", "[]", '{"version": "1"}'])
def test_an_image_that_says_nothing_is_what_its_name_says(said: str) -> None:
    image = image_called("vllm/vllm-openai:v0.27.1", "sha256:7")
    assert room.image_that_says(image, IMAGE_SAYS + said) == image


def test_an_image_without_vllm_is_refused() -> None:
    said = IMAGE_SAYS + '{"version": "", "cuda": "12.8", "program": ""}'
    with pytest.raises(HostError, match="there is no vLLM in x:1"):
        room.image_that_says(Image("x:1"), said)


# -- the device


GPU = Gpu(0, "GPU-1", "L40S", 48 << 30)
ON_GPU, ON_CPU = Image("vllm:1"), Image("vllm-cpu:1", cpu=True)


@pytest.mark.parametrize(
    ("device", "image", "gpus", "images", "found"),
    [
        ("auto", "", [GPU], [ON_CPU], "gpu"),
        ("auto", "", [], [ON_CPU], "cpu"),
        ("auto", "", [], [ON_CPU, ON_GPU], None),
        ("auto", "", [], [], None),
        ("auto", "vllm-cpu:1", [GPU], [ON_CPU, ON_GPU], "cpu"),
        ("auto", "vllm:1", [GPU], [ON_CPU], "gpu"),
        ("auto", "vllm:1", [], [ON_CPU, ON_GPU], None),
        ("cpu", "", [GPU], [ON_GPU], "cpu"),
        ("gpu", "", [GPU], [ON_CPU], "gpu"),
        ("gpu", "", [], [ON_CPU], None),
    ],
)
def test_the_device_to_serve_on(
    device: str, image: str, gpus: Sequence[Gpu], images: Sequence[Image], found: Any
) -> None:
    options = ServeOptions(device=device, image=image)
    host = Host(tuple(gpus), tuple(images), gpu_problem="the driver is gone")
    if found:
        assert choose_device(options, host) == found
        return
    with pytest.raises(HostError, match="no GPU that can be used") as told:
        choose_device(options, host)
    assert told.value.why == "the driver is gone" and "--device cpu" in told.value.next_step


# -- the image


def own(version: str, **fields: Any) -> Image:
    return replace(image_called(f"vllm/vllm-openai:v{version}", f"sha256:{version}"), **fields)


IMAGES = [
    own("0.20.0"),
    own("0.30.0"),
    own("0.25.0"),
    image_called("vllm/vllm-openai-cpu:v0.31.0", "sha256:cpu"),
    image_called("corp/vllm:9", "sha256:corp"),
    Image("local:latest", "sha256:local"),
]


@pytest.mark.parametrize(
    ("wanted", "device", "found"),
    [
        (None, "gpu", "vllm/vllm-openai:v0.30.0"),
        (None, "cpu", "vllm/vllm-openai-cpu:v0.31.0"),
        ("corp/vllm:9", "gpu", "corp/vllm:9"),
        ("local", "gpu", "local:latest"),
        ("sha256:corp", "cpu", "corp/vllm:9"),
        ("vllm/vllm-openai:v0.20.0", "cpu", "vllm/vllm-openai:v0.20.0"),
    ],
)
def test_the_image_asked_for_or_the_newest(wanted: Any, device: str, found: str) -> None:
    assert choose_image(IMAGES, wanted, device).reference == found


def test_of_equal_images_vllms_own_comes_first_then_the_shorter_name() -> None:
    copies = [
        Image("corp/vllm:1", version=(0, 30, 0)),
        replace(own("0.30.0"), reference="host/vllm/vllm-openai:v0.30.0"),
        own("0.30.0"),
    ]
    assert choose_image(copies, None, "gpu") is copies[2]
    assert choose_image(copies[:2], None, "gpu") is copies[1]
    assert choose_image([Image("bb:1"), Image("a:1")], None, "gpu").reference == "a:1"


def test_an_image_that_has_the_model_comes_before_a_newer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "knows", lambda version, table, name: (version, table, name) == HAS)
    assert choose_image(IMAGES, None, "gpu", "OldModel").version == (0, 25, 0)


HAS = ((0, 25, 0), room.ARCHITECTURES, "OldModel")


@pytest.mark.parametrize(
    ("images", "wanted", "device", "what", "why", "bring"),
    [
        ([], None, "gpu", "no vLLM image for the GPU", "has no vLLM image", "vllm-openai:vX.Y.Z"),
        ([ON_GPU], None, "cpu", "image for the CPU", "here are: vllm:1", "vllm-openai-cpu:vX.Y.Z"),
        ([ON_GPU, ON_CPU], "x/y:2", "gpu", "no image x/y:2", "here are: vllm:1, vllm-cpu:1", "x/y:2"),
    ],
)  # fmt: skip
def test_an_image_that_is_not_here_is_told_with_how_to_bring_it(
    images: List[Image], wanted: Any, device: str, what: str, why: str, bring: str
) -> None:
    with pytest.raises(HostError, match=what) as told:
        choose_image(images, wanted, device)
    assert why in told.value.why
    there, here = told.value.next_step.splitlines()
    folder = bring.rpartition("/")[2].replace(":", "_")
    assert f"{bring} && hfship pack {folder}" in there and f"unpack {folder}.tar.zst" in here


# -- GPUs that are too old, or too new


@pytest.mark.parametrize(
    ("demanded_by", "step"),
    [
        (CUDA_13, "--image of CUDA 12: vLLM before 0.20, or a tag that ends in -cu129"),
        (SPARSE, "name newer GPUs with --gpus: H100, H200, B200 and later ones"),
        (VLLM, "name newer GPUs with --gpus"),
        (
            "fp8",
            "name newer GPUs with --gpus, or take the model in another quantisation: 16 bits, or GPTQ",
        ),
    ],
)
def test_what_to_do_with_gpus_that_are_too_old(demanded_by: str, step: str) -> None:
    assert room._instead_of(demanded_by) == step


def facts_of(sparse: bool = False, method: str = "") -> Any:
    quantization = SimpleNamespace(method=method) if method else None
    return SimpleNamespace(sparse=sparse, quantization=quantization)


@pytest.mark.parametrize(
    ("capabilities", "cuda", "facts", "why", "step"),
    [
        ([(7, 0)], "12.8", facts_of(), "", ""),
        ([(0, 0)], "13.0", facts_of(sparse=True), "", ""),  # what is not known passes
        ([(8, 0), (6, 1)], "12.8", facts_of(), "vLLM needs compute capability 7.0", "--gpus"),
        ([(7, 0)], "13.0", facts_of(), "CUDA 13 needs compute capability 7.5", "-cu129"),
        ([(8, 9)], "12.8", facts_of(sparse=True), "sparse attention needs", "H100"),
        ([(7, 0)], "12.8", facts_of(method="awq"), "awq needs compute capability 7.5", "GPTQ"),
        ([(10, 0)], "12.8", facts_of(), "", ""),
        ([(10, 0)], "", facts_of(), "", ""),
        ([(12, 0)], "12.6", facts_of(), "it needs CUDA 12.8, vllm:1 has 12.6", "newer --image"),
        ([(9, 0)], "12.6", facts_of(), "", ""),
    ],
)
def test_gpus_for_which_an_image_was_built(
    capabilities: Any, cuda: str, facts: Any, why: str, step: str
) -> None:
    gpus = [replace(GPU, capability=one) for one in capabilities]
    image = Image("vllm:1", version=(0, 30, 0), cuda=cuda)
    if not why:
        room.require_capability("m", facts, gpus, image)
        return
    with pytest.raises(HostError, match="cannot serve m on GPU 0") as told:
        room.require_capability("m", facts, gpus, image)
    assert why in told.value.why and step in told.value.next_step
    major, minor = capabilities[-1]
    assert told.value.what.endswith(f"compute capability {major}.{minor}")
