"""What docker and vLLM print when they fail, in their words, and what is made of it."""

from __future__ import annotations

import re
from typing import Any, Dict, Tuple

import pytest

from hfship.serve.messages import KNOWN_FAILURES, Answer, Container, container_trouble, explain

# As they stand in the source of vLLM 0.33, torch, CUDA, docker and NVIDIA's toolkit: part of the cause, of the step.
SAID: Dict[str, Tuple[str, str]] = {
    "ValueError: max_num_seqs (1024) exceeds available Mamba cache blocks (327). Each decode sequence requires one Mamba "
    "cache block, so CUDA graph capture cannot proceed.": ("holds 327 requests", "--max-num-seqs 327"),
    "ValueError: User-specified max_model_len (131072) is greater than the derived max_model_len "
    "(max_position_embeddings=32768.0 or model_max_length=None in model's config.json).": ("32768 tokens", "--max-model-len 32768"),
    "ValueError: Total number of attention heads (28) must be divisible by tensor parallel size (8).": ("28 attention heads", "--tensor-parallel-size"),
    "ValueError: The quantization method moe_wna16 + awq is not supported for the current GPU. Minimum capability: 75. "
    "Current capability: 70.": ("moe_wna16 + awq", "another quantisation"),
    "ValueError: Unknown quantization method: bitsandbytes. Must be one of ['awq', 'fp8'].": ("bitsandbytes", "--image"),
    "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has compute "
    "capability 7.5.": ("no bfloat16", "--dtype float16"),
    "ValueError: The model type 'gemma2' does not support float16. Reason: Numerical instability.": ("gemma2", "--dtype float32"),
    "The supplied chat template string (/host/x.jinja) appears path-like, but doesn't exist! Tried: /host/x.jinja": ("/host/x.jinja", "--chat-template FILE"),
    "RuntimeError: Cannot find any model weights with `/models/m`": ("no weights", "hfship verify"),
    "ValueError: No valid attention backend found for cuda with AttentionSelectorConfig(head_size=576). Reasons: {}.": ("on cuda", "--kv-cache-dtype"),
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized": ("fabric manager", "nvidia-fabricmanager"),
    "Error 803: system has unsupported display driver / cuda driver combination": ("driver that runs", "reboot"),
    "Failed to initialize NVML: Driver/library version mismatch": ("sees no GPU", "nvidia-smi"),
    "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory": ("no libraries", "nvidia-container-toolkit"),
    "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device": ("not built for this GPU", "--image"),
    "Error response from daemon: CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=GPU-1": ("nvidia.com/gpu=GPU-1", "nvidia-ctk cdi"),
    "stderr: nvidia-container-cli: device error: MIG-1-2: unknown device: unknown": ("MIG-1-2: it is gone", "--reset"),
    "Error response from daemon: No such image: vllm/vllm-openai:v9": ("not have the image", "docker load"),
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error": ("talk to each other", "NCCL_P2P_DISABLE=1"),
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl.": ("no C compiler", "--image"),
    "OSError: Can't load tokenizer for '/models/m'.": ("tokenizer", "hfship verify"),
    "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer": ("damaged", "hfship verify"),
    # -- of the engine and its toolkit
    "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock": ("may not talk to docker", "usermod"),
    "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?": ("not running", "systemctl start docker"),
    "docker: 'compose' is not a docker command.": ("no compose plugin", "docker-compose-plugin"),
    "Error response from daemon: client version 1.24 is too old. Minimum supported API version is 1.44": ("too old", "one release"),
    'Error response from daemon: could not select device driver "nvidia" with capabilities: [[gpu]]': ("no NVIDIA runtime", "nvidia-container-toolkit"),
    "docker: Error response from daemon: unknown or invalid runtime name: nvidia.": ("no NVIDIA runtime", "nvidia-ctk"),
    "nvidia-container-cli: mount error: failed to add device rules: unable to find any existing device filters attached to the "
    "cgroup: bpf_prog_query(BPF_CGROUP_DEVICE) failed: operation not permitted: unknown.": ("control groups", "no-cgroups"),
    "Bind for 127.0.0.1:8000 failed: port is already allocated": ("port is taken", "--port"),
    "failed to bind host port for 10.9.9.9:8000: cannot assign requested address": ("does not have the address", "--host"),
    'Conflict. The container name "/vllm_m" is already in use by container "abc".': ("vllm_m", "docker rm -f vllm_m"),
    'invalid mount config for type "bind": bind source path does not exist: /data/models/m': ("/data/models/m is not there", "bring it back"),
    "exec /usr/local/bin/vllm: exec format error": ("another kind of processor", "uname -m"),
    'unable to start container process: exec: "vllm": executable file not found in $PATH: unknown': ("no vLLM", "--image"),
    "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0, please update your driver to a newer version": ("older than the image", "cu129"),
    "RuntimeError: The NVIDIA driver on your system is too old (found version 12040).": ("older than the image", "driver"),
    "RuntimeError: Failed to infer device type, please set the environment variable": ("sees no GPU", "nvidia-smi"),
    "NVIDIA-SMI: libnvidia-ml.so.1: cannot open shared object file: No such file or directory": ("no libraries", "nvidia-container-toolkit"),
    "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered": ("has a fault", "dmesg"),
    "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost. Reboot the system to recover this GPU": ("has a fault", "dmesg"),
    "RuntimeError: CUDA error: PTX was compiled with an unsupported toolchain.": ("not built for this GPU", "--image"),
    'failed to create task for container: exec: "docker-init": executable file not found in $PATH': ("docker-init", "tini"),
    # -- of vLLM
    "ValueError: Free memory on device cuda:0 (9.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.9, 71.3 GiB).": ("another process", "nvidia-smi"),
    "ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (3.00 GiB). Based on the available memory, the estimated maximum model length is 24576.": ("24576 tokens", "--max-model-len 24576"),
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`": ("one request of full length", "--max-model-len"),
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": ("ran out of memory", "--tensor-parallel-size"),
    "ValueError: World size (4) is larger than the number of available GPUs (2) in this node.": ("fewer GPUs", "--gpus"),
    "ValueError: Weight output_partition_size = 192 is not divisible by weight quantization block_n = 128.": ("blocks of 128", "--tensor-parallel-size"),
    "ValueError: max_num_batched_tokens (2048) is smaller than max_model_len (32768).": ("2048 tokens", "--max-num-batched-tokens 32768"),
    "api_server.py: error: unrecognized arguments: --no-such-flag": ("--no-such-flag", "--image"),
    "vllm serve: error: argument --kv-cache-dtype: invalid choice: 'nvfp4' (choose from 'auto', 'fp8')": ("nvfp4", "--kv-cache-dtype"),
    "KeyError: 'invalid tool call parser: qwen9 (chose from { hermes,mistral })'": ("qwen9", "--image"),
    "TypeError: Error: --enable-auto-tool-choice requires --tool-call-parser": ("parser", "--tool-call-parser"),
    "ValueError: Loading lora a failed: No adapter found for /adapters/a": ("/adapters/a", "--lora"),
    "ValueError: LoRA rank 64 is greater than max_lora_rank 16.": ("rank 64", "--max-lora-rank 64"),
    "ValueError: Loading /models/m requires you to execute the configuration file. Please set the option `trust_remote_code=True`": ("own code", "--trust-remote-code"),
    "The checkpoint you are trying to load has model type `qwen9` but Transformers does not recognize this architecture.": ("older than the model", "docker load"),
    "ValueError: Tokenizer class Qwen9Tokenizer does not exist or is not currently imported.": ("Qwen9Tokenizer", "newer vLLM image"),
    "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder": ("does not have", "carry it over"),
    "ValueError: Invalid repository ID or local directory specified: '/models/m'": ("missing", "hfship verify"),
    "openai_harmony.HarmonyError: error downloading or loading vocab file: failed to download or load vocab file": ("tiktoken", "o200k_base"),
    "Fetching cubin fmhaSm100Kernel_Qkv from https://edge.urm.nvidia.com/artifactory/sw-kernelinferencelibrary-public-generic-local/": ("not in the image", "flashinfer"),
    "AssertionError: BatchedGemmEnums.h not found": ("not in the image", "flashinfer"),
    "OSError: [Errno 28] No space left on device: '/root/.cache/vllm/torch_compile_cache/abc/rank_0_0/x'": ("full", "docker system df"),
    "RuntimeError: unable to allocate shared memory(shm) for file </torch_7_1>: No space left on device (28)": ("shared memory", "--shm-size"),
    "PermissionError: [Errno 13] Permission denied: '/models/m/config.json'": ("may not read", "chmod"),
    "TimeoutError: Timed out waiting for engine core processes to start. This is often caused by slow weight loading": ("longer than vLLM waits", "VLLM_ENGINE_READY_TIMEOUT_S"),
    "(EngineCore pid=99) died: exit code -4": ("CPU lacks", "--dtype"),
}  # fmt: skip


@pytest.mark.parametrize("text", SAID)
def test_a_message_has_its_cause_and_next_step(text: str) -> None:
    log = f"INFO 11-28 one\n(EngineCore pid=7) ERROR 11-28 22:00:00 [core.py:1] {text}\nTraceback"
    cause, step = explain(log, "m")
    assert SAID[text][0] in cause and SAID[text][1] in step
    assert "{" not in cause + step


def test_what_nobody_knows_is_left_as_it_is() -> None:
    assert explain("INFO Application startup complete.", "m") == ("", "")


def test_every_row_is_shown_by_a_real_message() -> None:
    shown = set()
    for text in SAID:
        for row, (pattern, _, _) in enumerate(KNOWN_FAILURES):
            if re.search(pattern, text):
                shown.add(row)
                break
    missing = [pattern for row, (pattern, _, _) in enumerate(KNOWN_FAILURES) if row not in shown]
    assert not missing


def test_every_row_has_a_cause_and_a_step() -> None:
    assert all(cause and step for _, cause, step in KNOWN_FAILURES)


ENDED = "the machine ran out of memory"


@pytest.mark.parametrize(
    "container, trouble",
    [
        (None, "it is gone"),
        (Container("1", "running", restarts=2), ""),
        (Container("1", "running", restarts=3), "it restarted"),
        (Container("1", "created"), ""),
        (Container("1", "exited", exit_code=1), "it ended (exit code 1)"),
        (Container("1", "dead", exit_code=1), "it ended (exit code 1)"),
        (Container("1", "restarting", exit_code=1), "it restarted (exit code 1)"),
        (
            Container("1", "exited", exit_code=137, oom_killed=True),
            f"it ended (exit code 137: {ENDED})",
        ),
        (
            Container("1", "exited", exit_code=137),
            f"it ended (exit code 137: killed, by hand or because {ENDED})",
        ),
        (Container("1", "exited", exit_code=138), "it ended (exit code 138)"),
    ],
)
def test_what_became_of_a_container_that_starts(container: Any, trouble: str) -> None:
    assert container_trouble(container, 2) == trouble


def test_an_answer_is_told_with_its_status_and_its_beginning() -> None:
    assert str(Answer(500, "x" * 300)) == "HTTP 500: " + "x" * 200
