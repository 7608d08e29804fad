# SPDX-License-Identifier: Apache-2.0
"""What docker and vLLM print, and what it means for an operator.

Owns the table of their error messages, with cause and next step.
Promises: pure; a message that is not in the table is shown as it is.
"""

from __future__ import annotations

import re
from typing import Optional, Sequence, Tuple

from hfship.base.values import dataclass

# Messages of docker and vLLM -> (cause, next step). The first row that matches wins; {name} and
# groups are filled in.
KNOWN_FAILURES: Sequence[Tuple[str, str, str]] = (
    (
        r"permission denied.*docker(?:\.sock| daemon| API)",
        "this user may not talk to docker",
        "sudo usermod -aG docker $USER and log in again, or run hfship as root",
    ),
    (
        r"Cannot connect to the Docker daemon|Is the docker daemon running"
        r"|failed to connect to the docker API",
        "the docker daemon is not running, or DOCKER_HOST points to the wrong place",
        "systemctl start docker",
    ),
    (
        r"is not a docker command|unknown command: docker compose"
        r"|unknown (?:shorthand )?flag: .*-?-s",
        "docker has no compose plugin",
        "install docker-compose-plugin, or docker-compose-v2 (Debian, Ubuntu)",
    ),
    (
        r"client version (\S+) is too (old|new)",
        "docker's client is too {1}",
        "use client and engine of one release",
    ),
    (
        r"bpf_prog_query\(BPF_CGROUP_DEVICE\) failed|failed to add device rules",
        "NVIDIA's toolkit is too old for the control groups of this system",
        "update nvidia-container-toolkit, or set no-cgroups = true in"
        " /etc/nvidia-container-runtime/config.toml; then hfship serve {name}",
    ),
    (
        r"could not select device driver|unknown or invalid runtime name: nvidia"
        r"|[Uu]nknown runtime specified nvidia",
        "docker has no NVIDIA runtime",
        "install nvidia-container-toolkit, nvidia-ctk runtime configure, restart docker",
    ),
    (
        r"docker-init",
        "docker has no docker-init",
        "install tini, and link it as docker-init beside dockerd",
    ),
    (
        r"cannot assign requested address",
        "this machine does not have the address that it should listen on",
        "ip -brief addr     # shows which it has; then hfship serve {name} --host ADDRESS",
    ),
    (
        r"bind source path does not exist: (\S+)",
        "{0} is not there any more",
        "bring it back, or hfship serve {name} with the folder that is there now",
    ),
    (
        r"exec format error|image's platform \((\S+)\) does not match",
        "the image is for another kind of processor",
        "bring the image for this one: uname -m says which it is",
    ),
    (
        r"exec: \\?\"vllm\\?\": executable file not found",
        "there is no vLLM in the image",
        "hfship serve {name} --image vllm/vllm-openai:vX.Y.Z",
    ),
    (
        r"GPU is lost|[Ff]allen off the bus|uncorrectable ECC error|NVLink error",
        "the GPU has a fault, or its driver",
        "dmesg | grep -i xid     # names it; restart the machine, or leave that GPU out: --gpus",
    ),
    (
        r"port is already allocated|[Aa]ddress already in use",
        "the port is taken",
        "hfship serve {name} --port ANOTHER",
    ),
    (
        r"container name \"?/?(\S+?)\"? is already in use",
        "another container has the name {0}",
        "docker rm -f {0} if it is not needed, then hfship serve {name}",
    ),
    (
        r"unsatisfied condition: cuda|CUDA driver version is insufficient"
        r"|NVIDIA driver on your system is too old"
        r"|forward compatibility was attempted",
        "the NVIDIA driver is older than the image's CUDA",
        "update the driver, or use an image for it: --image vllm/vllm-openai:vX.Y.Z-cu129",
    ),
    (
        r"Failed to initialize NVML|nvml error: driver not loaded|Failed to infer device type",
        "the container sees no GPU",
        "check nvidia-smi here and nvidia-container-toolkit, then hfship serve {name}",
    ),
    (
        r"Free memory on device.*is less than desired GPU memory utilization",
        "another process holds memory of the GPU",
        "nvidia-smi names it; stop it, or lower --gpu-memory-utilization",
    ),
    (
        r"estimated maximum model length is (\d+)",
        "the KV cache holds {0} tokens, less than one request of full length",
        "hfship serve {name} --max-model-len {0}",
    ),
    (
        r"larger than the maximum number of tokens that can be stored in KV cache"
        r"|No available memory for the cache"
        r"|KV cache is needed, which is larger than the available",
        "the KV cache does not hold one request of full length",
        "hfship serve {name} with a smaller --max-model-len, or a larger --tensor-parallel-size",
    ),
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory",
        "the GPU ran out of memory",
        "hfship serve {name} with a larger --tensor-parallel-size or less --max-num-seqs",
    ),
    (
        r"larger than the number of available GPUs",
        "the container sees fewer GPUs than the model is split over",
        "hfship serve {name} without --tensor-parallel-size of your own, or with more --gpus",
    ),
    (
        r"is not divisible by weight quantization block_[nk] = (\d+)",
        "this split cuts through blocks of {0} quantised weights",
        "hfship serve {name} with a smaller --tensor-parallel-size",
    ),
    (
        r"max_num_batched_tokens \((\d+)\) is smaller than max_model_len \((\d+)\)",
        "a step takes {0} tokens, less than one request of {1}",
        "hfship serve {name} -- --max-num-batched-tokens {1}",
    ),
    (
        r"argument (--\S+?): invalid choice: '?([^\s']+)'?",
        "this version of vLLM does not know {1} for {0}",
        "hfship serve {name} with another {0}, or another --image",
    ),
    (
        r"invalid tool call parser: (\S+)",
        "this version of vLLM has no tool parser {0}",
        "hfship serve {name} without it, or with another --image",
    ),
    (
        r"enable-auto-tool-choice requires --tool-call-parser",
        "tool calls need a parser",
        "hfship serve {name} -- --enable-auto-tool-choice --tool-call-parser NAME",
    ),
    (
        r"No adapter found for (\S+)",
        "the container has no adapter {0}",
        "hfship serve {name} --lora NAME=DIR     # which mounts it, too",
    ),
    (
        r"LoRA rank (\d+) is greater than max_lora_rank",
        "the adapter has rank {0}, more than vLLM was told to hold",
        "hfship serve {name} -- --max-lora-rank {0}",
    ),
    (
        r"edge\.urm\.nvidia\.com|Enums\.h not found|Failed to get file .*cubin",
        "kernels for this GPU are not in the image, and vLLM looked for them in a network",
        "take an image that has them (flashinfer-cubin), or:"
        " hfship serve {name} --env VLLM_ATTENTION_BACKEND=FLASH_ATTN",
    ),
    (
        r"No space left on device: '[^']*(?:torch_compile_cache|\.cache|triton)",
        "the disk that docker keeps its data on is full: compiled kernels had no room",
        "docker system df     # what takes it; free some, then hfship serve {name}",
    ),
    (
        r"Timed out waiting for engine core processes to start|"
        r"did not initialize within|Did not receive response from front-end process",
        "loading took longer than vLLM waits",
        "hfship serve {name} --env VLLM_ENGINE_READY_TIMEOUT_S=7200",
    ),
    (
        r"Tokenizer class (\S+) does not exist or is not currently imported",
        "this vLLM does not know the tokenizer {0}",
        "bring a newer vLLM image: docker load -i FILE, then hfship serve {name}",
    ),
    (
        r"Invalid repository ID or local directory specified|does not appear to have a file named",
        "a file of the model is missing",
        "hfship verify {name}",
    ),
    (
        r"unrecognized arguments: (.+)",
        "this version of vLLM does not know {0}",
        "leave it out, or change the --image",
    ),
    (
        r"`trust_remote_code=True`",
        "the model runs its own code",
        "hfship serve {name} --trust-remote-code",
    ),
    (
        r"does not recognize this architecture|Model architectures .* are not supported"
        r"|has no vLLM implementation",
        "this vLLM is older than the model",
        "bring a newer vLLM image: docker load -i FILE, then hfship serve {name}",
    ),
    (
        r"LocalEntryNotFoundError|outgoing traffic has been disabled"
        r"|couldn't connect to 'https://huggingface\.co",
        "vLLM looked for a file that the model folder does not have",
        "compare the folder with the repository, fetch what is missing, carry it over",
    ),
    (
        r"HarmonyError|error downloading or loading vocab file",
        "gpt-oss wants its tiktoken encodings from the network",
        "put o200k_base.tiktoken and cl100k_base.tiktoken into the model folder, "
        "then hfship serve {name}",
    ),
    (
        r"No space left on device.*shm|unable to allocate shared memory|Bus error.*shared memory",
        "shared memory ran out",
        "hfship serve {name} --shm-size 32gb",
    ),
    (
        r"Permission denied: '/models",
        "the container may not read the model folder",
        "chmod -R a+rX the folder; with SELinux: chcon -Rt container_file_t FOLDER",
    ),
    (
        r"max_num_seqs \((\d+)\) exceeds available Mamba cache blocks \((\d+)\)",
        "the state cache of this hybrid model holds {1} requests, and {0} were wanted",
        "hfship serve {name} --max-num-seqs {1}",
    ),
    (
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len"
        r" \(\w+=(\d+)",
        "this vLLM derives a context of {1} tokens from the model, less than {0}",
        "hfship serve {name} --max-model-len {1}",
    ),
    (
        r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size"
        r" \((\d+)\)",
        "{0} attention heads do not divide by {1} GPUs",
        "hfship serve {name} with another --tensor-parallel-size",
    ),
    (
        r"[Qq]uantization method (.{1,60}?) is not supported for the current GPU\. "
        r"Minimum capability: (\d+)",
        "the GPU is too old for the quantisation {0}, which needs compute capability {1} / 10",
        "name newer GPUs with --gpus, or take a model with another quantisation",
    ),
    (
        r"Unknown quantization method: (\S+?)\. ",
        "this vLLM does not know the quantisation {0}",
        "choose another --image, or take a model with another quantisation",
    ),
    (
        r"Bfloat16 is only supported on GPUs with compute capability of at least 8\.0",
        "the GPU has no bfloat16",
        "hfship serve {name} --dtype float16 (gemma: float32)",
    ),
    (
        r"The model type '(\w+)' does not support float16",
        "{0} models do not run in float16",
        "hfship serve {name} --dtype float32, or on GPUs from Ampere on",
    ),
    (
        r"The supplied chat template string \((.{1,200}?)\) appears path-like, but doesn't exist",
        "the container has no file {0}",
        "hfship serve {name} --chat-template FILE     # which mounts it, too",
    ),
    (
        r"Cannot find any model weights with",
        "vLLM found no weights in the model folder",
        "hfship verify {name}",
    ),
    (
        r"No valid attention backend found for (.{1,60}?) with",
        "this vLLM has no attention kernel for the model on {0}",
        "hfship serve {name} --kv-cache-dtype bfloat16, or another --image",
    ),
    (
        r"Error 802|CUDA error: system not yet initialized",
        "the fabric manager that joins the GPUs does not run",
        "systemctl start nvidia-fabricmanager (of the driver's version), then hfship serve {name}",
    ),
    (
        r"Error 803|[Dd]river/library version mismatch",
        "the driver that runs is not the one that is installed",
        "reboot, then hfship serve {name}",
    ),
    (
        r"libnvidia-ml\.so\.1|libcuda\.so\.1: cannot open shared object",
        "the container was given no libraries of the driver",
        "install nvidia-container-toolkit, nvidia-ctk runtime configure, restart docker",
    ),
    (
        r"no kernel image is available for execution"
        r"|PTX was compiled with an unsupported toolchain",
        "the image was not built for this GPU and driver",
        "choose another --image: newer for a newer GPU, older for an older driver",
    ),
    (
        r"unresolvable CDI devices (\S+)",
        "docker does not know the GPU {0}",
        "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml, then hfship serve {name}",
    ),
    (
        r"device error: ([\w:-]+): unknown device",
        "the NVIDIA runtime does not know the GPU {0}: it is gone, or a slice made anew",
        "nvidia-smi -L    # what there is\nhfship serve {name} --reset",
    ),
    (
        r"[Nn]o such image|pull access denied for (?:\S+)",
        "docker does not have the image",
        "docker load -i image.tar, then hfship serve {name}",
    ),
    (
        r"NCCL error|ncclUnhandledCudaError|ncclSystemError|ncclInternalError",
        "the GPUs could not talk to each other",
        "hfship serve {name} --env NCCL_P2P_DISABLE=1 -- --disable-custom-all-reduce",
    ),
    (
        r"Failed to find C compiler",
        "the image has no C compiler, which kernels are made with",
        "choose an image of vllm/vllm-openai with --image",
    ),
    (
        r"Can't load tokenizer for|Couldn't instantiate the backend tokenizer",
        "the files of the tokenizer are missing or not readable for this vLLM",
        "hfship verify {name}     # and fetch the files of the tokenizer, if they were left out",
    ),
    (
        r"SafetensorError|MetadataIncompleteBuffer|InvalidHeaderDeserialization",
        "a file of weights is damaged",
        "hfship verify {name}",
    ),
    (
        r"SIGILL|Illegal instruction|exit code -4\b",
        "the CPU lacks an instruction that this dtype uses",
        "hfship serve {name} --dtype float32 (or float16)",
    ),
)


@dataclass(frozen=True)
class Container:
    """The state of a container as docker tells it."""

    id: str
    status: str  # created, running, restarting, exited, ...
    exit_code: int = 0
    oom_killed: bool = False
    restarts: int = 0
    started_at: float = 0.0  # seconds since the epoch
    image_id: str = ""


@dataclass(frozen=True)
class Answer:
    """What the API answered: HTTP status (0: none), body, seconds; and what was asked of it.

    `silent`: it was there, and did not answer in time. `made`: the body holds what a model made of
    a request for `task` at `route`. `note` says what its clients will meet all the same.
    """

    status: int
    text: str
    seconds: float = 0.0
    silent: bool = False
    made: bool = False
    task: str = ""
    route: str = ""
    note: str = ""

    @property
    def works(self) -> bool:
        """Whether a model has really produced something.

        >>> Answer(200, '{"choices": [{"text": "a"}]}', made=True).works, Answer(200, "{}").works
        (True, False)
        """
        return self.status == 200 and self.made

    def __str__(self) -> str:
        if not self.status:
            return self.text
        shown = self.text[:200]
        return f"HTTP {self.status}: {shown}"


def explain(text: str, name: str) -> Tuple[str, str]:
    """(cause, next step) of the first known message in `text`; ("", "") when none is known.

    >>> explain("vllm: error: unrecognized arguments: --foo", "m")[0]
    'this version of vLLM does not know --foo'
    """
    for pattern, cause, next_step in KNOWN_FAILURES:
        match = re.search(pattern, text)
        if match:
            groups = match.groups()
            cause = cause.format(*groups, name=name)
            next_step = next_step.format(*groups, name=name)
            return cause, next_step

    return "", ""


def container_trouble(container: Optional[Container], restarts_before: int) -> str:
    """Why a starting container will not become ready; "" while it may.

    >>> container_trouble(Container("1", "running", restarts=2), 0)
    'it restarted'
    """
    if container is None:
        return "it is gone"

    how = f"exit code {container.exit_code}"
    if container.oom_killed:
        how += ": the machine ran out of memory"
    elif container.exit_code == 137:
        how += ": killed, by hand or because the machine ran out of memory"

    if container.status in ("exited", "dead"):
        return f"it ended ({how})"
    if container.status == "restarting":
        return f"it restarted ({how})"
    if container.restarts > restarts_before:
        return "it restarted"

    return ""
