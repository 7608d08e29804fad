# SPDX-License-Identifier: Apache-2.0
"""vLLM's versions: which flags each is given, which methods and drivers each needs. Rules by hand,
beside the table that was read from vLLM itself; nothing is asked of docker."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, AbstractSet, Iterator, List, Mapping, Sequence, Tuple

from hfship.base.errors import UsageError, nearest
from hfship.serve.terms import KEY_VARIABLE, NEWEST
from hfship.serve.vllm_table import FLAGS, all_known, intervals_of, knows, version_text

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts
    from hfship.serve.terms import Capability, Image, Version

FLOAT32 = ("float32", "float")  # as vLLM's --dtype spells it
DTYPES = ("auto", "bfloat16", "float16", "half", *FLOAT32)
KV_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla")

# From which version on (read in the wheels of the table's versions):
HYBRID_KV: Version = (0, 10, 0)  # windowed layers keep their window only
# `auto` takes the type of the KV cache from the checkpoint: utils/torch_utils.py
KV_FROM_CHECKPOINT: Version = (0, 14, 0)
# No more requests at a time than cache blocks, where layers keep states: config/compilation.py
STATES_LIMIT: Version = (0, 20, 0)
TWO_BATCHES: Version = (0, 26, 0)  # are in flight: asynchronous scheduling
# Kimi's experts are padded to channels that its kernels take: not in 0.20, there in 0.32.
PADDED_EXPERTS: Version = (0, 21, 0)
FINER_BLOCKS: Version = (0, 29, 0)  # FP8 blocks are refined: fused_moe/oracle/fp8.py
# YaRN's factor is taken to be in max_position_embeddings already: config/model.py
YARN_AS_STATED: Version = (0, 30, 0)

# (quantisation method, vLLM before this version, least capability): get_min_capability in vLLM
# 0.12, 0.17, 0.27 and 0.32. A method that is not here runs wherever vLLM does.
_LEAST_CAPABILITY: Sequence[Tuple[str, Version, Capability]] = (
    ("fp8", (0, 17, 0), (8, 0)),
    ("fp8", (100, 0, 0), (7, 5)),
    ("modelopt", (100, 0, 0), (7, 5)),
    ("mxfp4", (100, 0, 0), (8, 0)),
    ("awq", (100, 0, 0), (7, 5)),
)
# What demands a capability, beside quantisation methods.
VLLM, CUDA_13, SPARSE = "vLLM", "CUDA 13", "sparse attention"
# Least driver (major) per CUDA (major) of the image: NVIDIA's CUDA compatibility table.
LEAST_DRIVER = {12: 525, 13: 580}

# What to write where a version does not know a flag, or knows it no more.
INSTEAD: Mapping[str, str] = {
    "--device": "nothing: the image decides",
    "--disable-log-requests": "nothing: requests are not logged by default",
    "--enable-reasoning": "--reasoning-parser NAME alone",
    "--guided-decoding-backend": "--structured-outputs-config",
    "--kv-cache-memory-bytes": "--gpu-memory-utilization",
    "--max-seq-len-to-capture": "--compilation-config",
    "--num-scheduler-steps": "nothing: scheduling became asynchronous",
    "--rope-scaling": "--hf-overrides",
    "--runner": "--task",
    "--swap-space": "--cpu-offload-gb",
    "--task": "--runner and --convert",
}
# Flags of vLLM that hfship alone sets.
RESERVED_FLAGS = (
    "--api-key",
    "--host",
    "--port",
    "--model",
    "--served-model-name",
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--data-parallel-size",
    "-dp",
    "--enable-expert-parallel",
    "-ep",
)


def least_capability(facts: ModelFacts, image: Image) -> Tuple[Capability, str]:
    """(compute capability that a GPU must have, what demands it)."""
    needs: List[Tuple[Capability, str]] = [((7, 0), VLLM)]
    if cuda_of(image) >= (13, 0):
        needs.append(((7, 5), CUDA_13))
    if facts.sparse:
        needs.append(((9, 0), SPARSE))
    if facts.quantization:
        version = image.version or NEWEST
        for method, before, least in _LEAST_CAPABILITY:
            if method == facts.quantization.method and version < before:
                needs.append((least, method))

    return max(needs)


def cuda_of(image: Image) -> Tuple[int, int]:
    """(major, minor) of the CUDA in an image, (0, 0) when unknown."""
    match = re.match(r"(\d+)\.(\d+)", image.cuda)
    if not match:
        return (0, 0)
    return int(match[1]), int(match[2])


def flags_in(arguments: Sequence[str]) -> List[str]:
    """The flags among arguments of vLLM, which takes --max_model_len for --max-model-len.

    >>> flags_in(["--max_model_len=5", "--dtype", "half", "-tp", "2"])
    ['--max-model-len', '--dtype', '-tp']
    """
    flags = []
    for argument in arguments:
        if re.match("--?[a-z]", argument):
            flag = argument.partition("=")[0]
            flags.append(flag.replace("_", "-"))
    return flags


def knows_flag(version: Version, flag: str) -> bool:
    """Whether this vLLM surely has the flag; `--no-` before it and `.KEY` behind it are its own."""
    return knows(version, FLAGS, _plain_flag(flag))


def _plain_flag(flag: str) -> str:
    """
    >>> _plain_flag("--no-enable-prefix-caching"), _plain_flag("--compilation-config.mode")
    ('--enable-prefix-caching', '--compilation-config')
    """
    flag = flag.partition(".")[0]
    if flag.startswith("--no-"):
        return "--" + flag[len("--no-") :]
    return flag


def refuse_own_flags(arguments: Sequence[str]) -> None:
    """Refuse extra arguments that are hfship's to set. Raises UsageError.

    A key in a command line can be read by everybody; another name or port would not be found.
    """
    for flag in flags_in(arguments):
        if any(own.startswith(flag) for own in RESERVED_FLAGS):  # argparse takes abbreviations too
            key = f"the key is {KEY_VARIABLE} in the deployment's .env"
            raise UsageError(
                f"{flag} cannot be passed on to vLLM",
                "hfship sets it",
                f"give it to hfship serve before the --; {key}",
            )


def flag_warnings(arguments: Sequence[str], version: Version) -> Iterator[str]:
    """What is to be said of extra arguments: an image may have been patched, so none is refused."""
    known = all_known(version, FLAGS)
    for flag in flags_in(arguments):
        plain = _plain_flag(flag)
        if plain in known or _is_abbreviation(plain, known):
            continue
        spans = ", ".join(interval.text() for interval in intervals_of(FLAGS, plain))
        hint = nearest(plain, known)
        if spans:
            hint = f"; vLLM has it {spans}"
        if plain in INSTEAD:
            hint += f"; write {INSTEAD[plain]}"
        yield f"vLLM {version_text(version)} does not know {flag}{hint}"


def _is_abbreviation(flag: str, known: AbstractSet[str]) -> bool:
    """Whether it is the beginning of one flag, which argparse takes for that."""
    if not flag.startswith("--"):
        return False
    meant = [name for name in known if name.startswith(flag)]
    return len(meant) == 1
