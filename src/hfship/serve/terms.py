# SPDX-License-Identifier: Apache-2.0
"""The terms of a plan: GPUs, image, host, what was asked for, and the plan itself. Values only."""

from __future__ import annotations

from typing import Any, FrozenSet, Mapping, Optional, Tuple

from hfship.base.text import human_bytes
from hfship.base.values import dataclass, field

# Of nvidia-smi's memory.total; measured 0.9957 on an H200 (the driver reserves the rest).
CUDA_SEES = 0.995

Version = Tuple[int, int, int]
Capability = Tuple[int, int]  # NVIDIA's compute capability
NEWEST: Version = (99, 0, 0)  # stands for "unknown, taken for the newest"
KEY_VARIABLE = "VLLM_API_KEY"
CONTAINER_PORT = 8000
IMAGE_SAYS = "hfship-preflight "  # before each line of serve/in_image.py, which runs in images
# vLLM up to 0.8 has another entry point in its image; this one exists in all versions.
ENTRYPOINT = ("vllm", "serve")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi shows it. Memory in bytes; a `total` of 0 is not known."""

    index: int
    uuid: str
    name: str
    total: int
    used: int = 0
    capability: Capability = (0, 0)  # (0, 0): unknown
    driver: str = ""
    mig: bool = False  # is divided into slices, which are GPUs of their own
    slice: str = ""  # "0:1" for the second slice of GPU 0
    spoken_for: bool = False  # by a deployment that does not run now

    @property
    def label(self) -> str:
        """The GPU for people."""
        memory = human_bytes(self.total)
        return f"GPU {self.slice or self.index} ({self.name}, {memory})"


@dataclass(frozen=True)
class Image:
    """A docker image with vLLM. `version` is vLLM's; None: unknown. `cuda` ("12.8") and `cpu` say
    what it was built for."""

    reference: str
    id: str = ""
    version: Optional[Version] = None
    cpu: bool = False
    cuda: str = ""
    entrypoint: Tuple[str, ...] = ENTRYPOINT


@dataclass(frozen=True)
class Host:
    """What this machine offers. `gpu_problem` says why `gpus` is empty."""

    gpus: Tuple[Gpu, ...] = ()
    images: Tuple[Image, ...] = ()
    memory: int = 0  # bytes of RAM that models may take
    taken_ports: FrozenSet[int] = frozenset()
    gpu_problem: str = "nvidia-smi shows no GPU"
    cdi: FrozenSet[str] = frozenset()  # devices that docker knows by CDI, where only that works
    held: int = 0  # bytes of the memory that other models on the CPU hold
    running: FrozenSet[str] = frozenset()  # deployments whose containers run


@dataclass(frozen=True)
class ServeOptions:
    """What the operator asked for. Empty, 0 and "auto" mean: decide for me."""

    served_names: Tuple[str, ...] = ()
    image: str = ""
    device: str = "auto"
    gpus: Tuple[str, ...] = ()  # indexes or UUIDs
    tensor_parallel_size: int = 0
    pipeline_parallel_size: int = 0
    data_parallel_size: int = 0
    enable_expert_parallel: bool = False
    wanted_concurrency: int = 0  # requests of full length at a time
    gpu_memory_utilization: float = 0.90
    max_model_len: int = 0
    max_num_seqs: int = 0
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    trust_remote_code: bool = False
    no_tools: bool = False  # no parsers of tool calls and thoughts
    chat_template: str = ""  # path of a file
    lora: Tuple[str, ...] = ()  # NAME=DIR of adapters
    mounts: Tuple[str, ...] = ()  # folders that the container may read
    bind: str = "127.0.0.1"
    port: int = 0
    shm_size: str = ""
    ready_timeout_s: int = 3600
    env: Mapping[str, str] = field(default_factory=dict)
    extra_args: Tuple[str, ...] = ()
    aliases: Tuple[str, ...] = ()  # served names beside the usual ones
    allow_changed: Tuple[str, ...] = ()  # files that may differ from the manifest
    key: str = ""  # path of the public key that the model must be signed with
    # The options as they were given, for the next serve. plan.json has them under this name.
    wishes: Mapping[str, Any] = field(default_factory=dict)


# An address to listen on -> where it is reached from this machine.
LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Plan(ServeOptions):
    """How one model is served: the options with the choices made, and what they rest on. It holds
    nothing secret.

    A max_model_len or max_num_seqs of 0 is left to vLLM.
    """

    name: str = ""
    model_dir: str = ""
    model_version: str = ""  # first digits of its id (archive/versions.py); "": nobody knows
    image_id: str = ""
    entrypoint: Tuple[str, ...] = ENTRYPOINT
    version: Version = NEWEST
    embeds: bool = False
    tokenizer_mode: str = ""  # of vLLM; "": as it finds
    load_format: str = ""
    tool_parser: str = ""  # of vLLM; "": none
    reasoning_parser: str = ""
    max_lora_rank: int = 0
    memory_limit: int = 0  # bytes of RAM for the container; 0: none
    cap_add: Tuple[str, ...] = ()  # rights of root that the container keeps
    cdi: bool = False  # GPUs are given by CDI, not by the NVIDIA runtime
    tasks: Tuple[str, ...] = ()  # of serve/task.py, the likeliest first; (): not known
    gpu_names: Tuple[str, ...] = ()
    weight_bytes: int = 0
    kv_bytes: int = 0  # per GPU
    idle: str = ""  # GPUs that nothing uses, and the command that does
    concurrency: float = 0.0  # requests of full length that the KV cache holds
    warnings: Tuple[str, ...] = ()
    signed_by: str = ""  # fingerprint of the key, where one was asked for
    network: str = ""  # docker's, on which the gateway alone reaches it; "": its port is published
    nodes: Tuple[str, ...] = ()  # addresses of the hosts that it spans, the head first; (): one
    node_rank: int = 0  # of this one
    interface: str = ""  # of the network between them
    infiniband: Tuple[str, ...] = ()  # HCAs that lead to them

    @property
    def listens_on(self) -> str:
        """The address that vLLM listens on, inside its container."""
        return self.bind if self.nodes else "0.0.0.0"

    @property
    def inner_port(self) -> int:
        """The port that vLLM listens on, inside its container: one over hosts has no other."""
        return self.port if self.nodes else CONTAINER_PORT

    @property
    def url(self) -> str:
        """Where clients on this machine reach the API; behind a gateway, where that one does."""
        if self.network:
            return f"http://vllm_{self.name}:{CONTAINER_PORT}/v1"
        host = LOOPBACK_OF.get(self.bind, self.bind)
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.port}/v1"
