# SPDX-License-Identifier: Apache-2.0
"""Container images of vLLM: what docker lists, and which one a plan uses."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Optional, Sequence, Tuple

from hfship.base.errors import HostError
from hfship.base.reading import parse_json
from hfship.base.values import replace
from hfship.serve.terms import ENTRYPOINT, IMAGE_SAYS, Image
from hfship.serve.vllm import CUDA_13, SPARSE, VLLM, cuda_of, least_capability
from hfship.serve.vllm_table import ARCHITECTURES, knows, parse_version

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts
    from hfship.serve.terms import Capability, Gpu, Host, ServeOptions, Version


# In the name of an image for a device that hfship does not serve on; <none> has lost its name.
_OTHER_DEVICES = re.compile("<none>|rocm|tpu|xpu|hpu|gaudi|neuron|ascend|npu|musa|router")
_OWN = re.compile(r"(^|/)vllm/vllm-openai(-[a-z0-9]+)*(:|$)")
_FOR_CPU = re.compile(r"(^|[-_:.])cpu([-_:.]|$)")
# CUDA 12.8 is the first that knows Blackwell, compute capability 10.0.
_BLACKWELL, _BLACKWELL_CUDA = (10, 0), (12, 8)


def parse_images(text: str) -> Tuple[Image, ...]:
    """The vLLM images in the lines of `docker image ls --no-trunc --format '{{json .}}'`; those for
    other devices are left out.

    >>> found = parse_images('{"Repository": "vllm/vllm-openai", "Tag": "v0.8.3", "ID": "1"}')
    >>> found[0].version
    (0, 8, 3)
    """
    images = []
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        repository = row.get("Repository", "")
        reference = f"{repository}:{row.get('Tag', '')}"
        name, tag = _name_and_tag(reference)
        if "vllm" not in name:
            continue
        if _OTHER_DEVICES.search(f"{name}:{tag}"):
            continue
        image_id = row.get("ID", "")
        images.append(image_called(reference, image_id))

    return tuple(images)


def _name_and_tag(reference: str) -> Tuple[str, str]:
    """Of a reference, without the host and the owner.

    >>> _name_and_tag("host:5000/vllm/vllm-openai:v0.8.3")
    ('vllm-openai', 'v0.8.3')
    """
    last = reference.rpartition("/")[2]
    name, _, tag = last.partition(":")
    return name, tag


def is_own(reference: str) -> bool:
    """Whether an image is of vLLM's own repositories, or a copy with their names.

    >>> [is_own(name) for name in ("vllm/vllm-openai:v0.8.3", "host:5000/vllm/vllm-openai-cpu:1")]
    [True, True]
    >>> [is_own(name) for name in ("lmcache/vllm-openai:v0.3.12", "corp/my-vllm:1.2")]
    [False, False]
    """
    return _OWN.search(reference) is not None


def image_called(reference: str, image_id: str) -> Image:
    """The image with what its name says of it: whether it is for CPUs, and vLLM's version, which
    the tags of others do not mean."""
    name, tag = _name_and_tag(reference)
    for_cpu = _FOR_CPU.search(f"{name}:{tag}")
    version = None
    if is_own(reference):
        version = parse_version(tag)
    return Image(
        reference=reference,
        id=image_id,
        version=version,
        cpu=for_cpu is not None,
    )


def image_that_says(image: Image, output: str) -> Image:
    """The image with what it says of itself, in lines of in_image.py. Raises HostError for one that
    has no vLLM.

    >>> said = IMAGE_SAYS + '{"stage": "about", "version": "0.11.0", "cuda": "12.8", "program": ""}'
    >>> image_that_says(Image("lmcache/vllm-openai:v0.3.12"), said).version
    (0, 11, 0)
    """
    _, _, line = output.rpartition(IMAGE_SAYS)
    try:
        said = parse_json(line)
        version, cuda, program = str(said["version"]), str(said["cuda"]), said["program"]
    except (ValueError, KeyError, TypeError):
        return image
    if not version and not program:
        step = "name an image of vLLM with --image"
        raise HostError(f"there is no vLLM in {image.reference}", "it says so itself", step)

    entrypoint: Tuple[str, ...] = ENTRYPOINT
    if not program:
        entrypoint = ("python3", "-m", "vllm.entrypoints.cli.main", "serve")
    return replace(
        image,
        version=parse_version(version),
        cuda=image.cuda or cuda,
        entrypoint=entrypoint,
    )


def choose_device(options: ServeOptions, host: Host) -> str:
    """The device to serve on, "gpu" or "cpu". The CPU only when asked for, or when there is no GPU
    and every vLLM image here is built for CPUs.

    Raises HostError where a GPU is wanted and none is there.
    """
    device = options.device
    if device == "auto":
        device = _fitting_device(options, host)
    if device == "gpu" and not host.gpus:
        what = "this machine has no GPU that can be used"
        cpu = "serve on the CPU with --device cpu"
        step = f"install the NVIDIA driver and try nvidia-smi, or {cpu}"
        raise HostError(what, host.gpu_problem, step)

    return device


def _fitting_device(options: ServeOptions, host: Host) -> str:
    """The device that the image asked for is built for; without one, what the host has."""
    if options.image:
        for image in host.images:
            if image.reference == options.image and image.cpu:
                return "cpu"
        return "gpu"

    only_cpu_images = bool(host.images) and all(image.cpu for image in host.images)
    if only_cpu_images and not host.gpus:
        return "cpu"

    return "gpu"


def choose_image(
    images: Sequence[Image], wanted: Optional[str], device: str, architecture: str = ""
) -> Image:
    """The image asked for, or the newest one for the device that has the model's class, which
    vLLM may have dropped; vLLM's own repository before look-alikes.

    Raises HostError that names what is there.
    """
    if wanted:
        names = (wanted, f"{wanted}:latest")
        found = [image for image in images if image.reference in names or image.id == wanted]
    else:
        found = [image for image in images if image.cpu == (device == "cpu")]

    if not found:
        raise _no_image(images, wanted, device)

    def rank(image: Image) -> Tuple[bool, Version, bool, int]:
        version = image.version or (0, 0, 0)
        has_model = knows(version, ARCHITECTURES, architecture)
        return has_model, version, is_own(image.reference), -len(image.reference)

    return max(found, key=rank)


def _no_image(images: Sequence[Image], wanted: Optional[str], device: str) -> HostError:
    """The error when docker has no such image, with how to bring one."""
    if wanted:
        what = f"docker has no image {wanted}"
        bring = wanted
    else:
        what = f"docker has no vLLM image for the {device.upper()}"
        bring = "vllm/vllm-openai:vX.Y.Z"
        if device == "cpu":
            bring = "vllm/vllm-openai-cpu:vX.Y.Z"

    why = "docker has no vLLM image"
    if images:
        why = "here are: " + ", ".join(image.reference for image in images)
    folder = bring.rpartition("/")[2].replace(":", "_")
    fetch = f"hfship fetch docker://{bring} && hfship pack {folder}"
    there = f"where there is a network: {fetch}"
    here = f"here: hfship unpack {folder}.tar.zst, then the same command again"
    return HostError(what, why, f"{there}\n{here}")


def require_capability(name: str, facts: ModelFacts, gpus: Sequence[Gpu], image: Image) -> None:
    """Refuse GPUs for which the image, or vLLM's kernels for the quantisation, were not built.

    What is not known of them passes. Raises HostError.
    """
    least, demanded_by = least_capability(facts, image)
    cuda = cuda_of(image)
    for gpu in gpus:
        has = capability_text(gpu.capability)
        what = f"cannot serve {name} on {gpu.label}: compute capability {has}"
        if (0, 0) < gpu.capability < least:
            raise HostError(
                what,
                f"{demanded_by} needs compute capability {capability_text(least)}",
                _instead_of(demanded_by),
            )
        if gpu.capability >= _BLACKWELL and (0, 0) < cuda < _BLACKWELL_CUDA:
            raise HostError(
                what,
                f"it needs CUDA 12.8, {image.reference} has {image.cuda}",
                "choose a newer --image",
            )


def _instead_of(demanded_by: str) -> str:
    """What to do where GPUs are too old for what demands newer ones."""
    if demanded_by == CUDA_13:
        return "--image of CUDA 12: vLLM before 0.20, or a tag that ends in -cu129"
    newer = "name newer GPUs with --gpus"
    if demanded_by == SPARSE:
        return f"{newer}: H100, H200, B200 and later ones"
    if demanded_by == VLLM:
        return newer
    return f"{newer}, or take the model in another quantisation: 16 bits, or GPTQ"


def capability_text(capability: Capability) -> str:
    """
    >>> capability_text((8, 9))
    '8.9'
    """
    major, minor = capability
    return f"{major}.{minor}"
