# SPDX-License-Identifier: Apache-2.0
"""The GPUs of a host: what nvidia-smi prints, and which of them a plan may use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from hfship.base.errors import HostError, UsageError
from hfship.base.text import GIB, human_bytes
from hfship.base.values import replace
from hfship.serve.terms import CUDA_SEES, Gpu

if TYPE_CHECKING:
    from hfship.serve.terms import Capability, Host, Plan, ServeOptions

NVIDIA_SMI_FIELDS = (
    "index,uuid,name,memory.total,memory.used,compute_cap,driver_version,mig.mode.current"
)


def parse_nvidia_smi(text: str) -> Tuple[Gpu, ...]:
    """The GPUs in `nvidia-smi --query-gpu=NVIDIA_SMI_FIELDS --format=csv,noheader,nounits`.

    Unknown values come as [N/A] and the like; a line that is not a GPU (a lost one, say) is passed
    over.
    """
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 8 or not cells[0].isdecimal() or not cells[1].startswith("GPU-"):
            continue
        index, uuid, name, total, used, capability, driver, mig = cells
        if not driver[:1].isdigit():
            driver = ""
        gpu = Gpu(
            index=int(index),
            uuid=uuid,
            name=name,
            total=_bytes_of(total),
            used=_bytes_of(used),
            capability=_capability_of(capability),
            driver=driver,
            mig=mig == "Enabled",
        )
        gpus.append(gpu)

    return tuple(gpus)


# Lines of `nvidia-smi -L`: a GPU, and the slices that it is divided into.
_LISTED_GPU = re.compile(r"GPU (\d+): .*\(UUID: (GPU-[^)]+)\)")
_LISTED_SLICE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")
# Of the GB in the name of a slice, the GiB that it has: 16 of 1g.18gb on an H200, 9.5 of 1g.10gb.
_OF_THE_NAME = 0.88


def with_slices(gpus: Sequence[Gpu], listed: str, memory: Mapping[str, int]) -> Tuple[Gpu, ...]:
    """The GPUs, and after each that is divided its slices, as `nvidia-smi -L` lists them.

    `memory` has the bytes of slices by "GPU:DEVICE", where nvidia-smi tells them; else what the
    name of the slice says counts, carefully.

    >>> whole = Gpu(0, "GPU-1", "NVIDIA H100", 80 << 30, capability=(9, 0), mig=True)
    >>> text = "GPU 0: H100 (UUID: GPU-1)\\n  MIG 3g.40gb     Device  0: (UUID: MIG-2)"
    >>> [(gpu.slice, gpu.uuid, gpu.total >> 30) for gpu in with_slices([whole], text, {})]
    [('', 'GPU-1', 80), ('0:0', 'MIG-2', 35)]
    """
    found: Dict[str, List[Gpu]] = {}
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    parent = None
    for line in listed.splitlines():
        gpu_line, slice_line = _LISTED_GPU.match(line), _LISTED_SLICE.match(line)
        if gpu_line:
            parent = by_uuid.get(gpu_line[2])
        elif slice_line and parent:
            profile, device, uuid = slice_line.groups()
            place = f"{parent.index}:{device}"
            total = memory.get(place) or _memory_of_profile(profile)
            name = f"{parent.name} MIG {profile}"
            part = replace(
                parent,
                uuid=uuid,
                name=name,
                total=total,
                used=0,
                mig=False,
                slice=place,
            )
            found.setdefault(parent.uuid, []).append(part)

    together = []
    for gpu in gpus:
        together += [gpu, *found.get(gpu.uuid, [])]
    return tuple(together)


def _memory_of_profile(profile: str) -> int:
    """
    >>> _memory_of_profile("1g.10gb+me") >> 20, _memory_of_profile("1c.2g")
    (9011, 0)
    """
    match = re.search(r"\.(\d{1,4})gb", profile, re.ASCII)
    if not match:
        return 0
    return int(int(match[1]) * GIB * _OF_THE_NAME)


def slice_memory(xml: str) -> Mapping[str, int]:
    """Bytes of the slices by "GPU:DEVICE", as `nvidia-smi -q -x` tells them."""
    found = {}
    for gpu in re.split(r"<gpu id=", xml)[1:]:
        number = re.search(r"<minor_number>(\d+)</minor_number>", gpu)
        for device in re.findall(r"<mig_device>.*?</mig_device>", gpu, re.DOTALL):
            index = re.search(r"<index>(\d+)</index>", device)
            total = re.search(r"<fb_memory_usage>\s*<total>(\d+) MiB</total>", device)
            if number and index and total:
                found[f"{number[1]}:{index[1]}"] = _bytes_of(total[1])
    return found


def _bytes_of(mebibytes: str) -> int:
    """0 when it is no number."""
    if not re.match(r"\d{1,9}$", mebibytes, re.ASCII):
        return 0
    return int(mebibytes) << 20


def _capability_of(text: str) -> Capability:
    """(0, 0) when it is none."""
    numbers = re.match(r"(\d{1,3})\.(\d{1,3})$", text, re.ASCII)
    if not numbers:
        return (0, 0)
    return int(numbers[1]), int(numbers[2])


class GpuPool(NamedTuple):
    """GPUs of one kind that may be used, and what is to be said of them."""

    gpus: Tuple[Gpu, ...]
    warnings: Tuple[str, ...]


def gpu_pools(host: Host, options: ServeOptions, own: Sequence[str] = ()) -> List[GpuPool]:
    """The GPUs that may be used: those named, or all free ones, a pool for each kind of them. The
    kind that `own` are of comes first, then the most common one.

    `own` are the UUIDs that this deployment already holds: their memory in use is its own, and they
    come first. Raises UsageError for a name that no GPU has, HostError when none is left or one of
    those named is not free. On the CPU there is one pool without any.
    """
    if options.device == "cpu":
        return [GpuPool((), ())]

    gpus = [_seen_by(own, gpu, host) for gpu in host.gpus]
    utilization = options.gpu_memory_utilization
    if options.gpus:
        named = _named_pool(gpus, options.gpus, utilization)
        return [_pool_of(named, own, [])]

    problems = {gpu: _gpu_problem(gpu, utilization) for gpu in gpus}
    free = [gpu for gpu in gpus if not problems[gpu]]
    if not free:
        raise _no_free_gpu(problems)

    pools = []
    for kind in _kinds(free, own):
        said = list(_left_out(kind, problems))
        pools.append(_pool_of(kind, own, said))
    return pools


def _left_out(kind: Sequence[Gpu], problems: Mapping[Gpu, str]) -> Iterator[str]:
    """What is said of GPUs that are not of a kind: their problem, or that they differ."""
    divided = {gpu.index for gpu in problems if gpu.slice}
    for gpu, problem in problems.items():
        if gpu in kind or (gpu.mig and gpu.index in divided):  # its slices are told of
            continue
        why = problem or "differs from the others"
        yield f"{gpu.label} {why} and is left out"


def _pool_of(gpus: Sequence[Gpu], own: Sequence[str], said: Sequence[str]) -> GpuPool:
    """The GPUs in the order in which they are taken."""

    def turn(gpu: Gpu) -> Tuple[bool, bool, bool, int]:
        return (
            gpu.uuid not in own,
            gpu.spoken_for,
            gpu.used > GIB,
            gpu.index,
        )

    order = sorted(gpus, key=turn)
    return GpuPool(tuple(order), (*said, *_pool_warnings(gpus)))


def _named_pool(gpus: Sequence[Gpu], names: Sequence[str], utilization: float) -> List[Gpu]:
    """The GPUs named, each once. Raises HostError when one of them cannot be used now."""
    named = list(dict.fromkeys(_named_gpu(gpus, name) for name in names))
    problems = {gpu: _gpu_problem(gpu, utilization) for gpu in named}
    if any(problems.values()):
        raise _no_free_gpu(problems)
    return named


def _seen_by(own: Sequence[str], gpu: Gpu, host: Host) -> Gpu:
    """The GPU as a deployment sees it that holds the UUIDs `own`: what it uses there is free for
    it.

    A GPU that does not say what memory it has shares that of the host.
    """
    used = gpu.used
    if gpu.uuid in own:
        used = 0
    return replace(gpu, total=gpu.total or host.memory, used=used)


def _named_gpu(gpus: Sequence[Gpu], name: str) -> Gpu:
    """The GPU with that index, or whose UUID begins so. Raises UsageError."""
    if name.startswith(("GPU-", "MIG-")):
        found = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
    else:
        found = [gpu for gpu in gpus if name in (gpu.slice or str(gpu.index), gpu.uuid)]

    if len(found) != 1:
        here = ", ".join(gpu.label for gpu in gpus)
        raise UsageError(
            f"--gpus {name} names no GPU of this machine",
            f"here are: {here}",
            "give indexes (of slices, GPU:DEVICE) or UUIDs",
        )

    return found[0]


def _gpu_problem(gpu: Gpu, utilization: float) -> str:
    """Why a GPU cannot be used now; "" when it can."""
    if gpu.mig:
        return "has MIG enabled"
    if gpu.slice and not gpu.total:
        return "does not tell its memory"
    usable = gpu.total * CUDA_SEES
    # vLLM refuses to start when less than its share is free.
    if usable - gpu.used < usable * utilization:
        return f"is in use ({human_bytes(gpu.used)})"
    return ""


def _kinds(gpus: Sequence[Gpu], own: Sequence[str]) -> List[List[Gpu]]:
    """The GPUs by kind: that of `own` first, whole ones before slices, then the kind of which there
    are most, of the larger one when there are as many; of slices the smaller first."""
    kinds: Dict[Tuple[str, int], List[Gpu]] = {}
    for gpu in gpus:
        kinds.setdefault((gpu.name, gpu.total), []).append(gpu)

    def rank(kind: Sequence[Gpu]) -> Tuple[bool, bool, int, int]:
        held = any(gpu.uuid in own for gpu in kind)
        total = kind[0].total
        if kind[0].slice:
            return not held, True, 0, total
        return not held, False, -len(kind), -total

    return sorted(kinds.values(), key=rank)


def _pool_warnings(pool: Sequence[Gpu]) -> Iterator[str]:
    for gpu in pool:
        if gpu.used > GIB:
            yield f"{gpu.label} already has {human_bytes(gpu.used)} in use"
    names = {gpu.name for gpu in pool}
    if len(names) > 1:
        labels = ", ".join(gpu.label for gpu in pool)
        yield f"the GPUs differ; the smallest decides: {labels}"


def _no_free_gpu(problems: Mapping[Gpu, str]) -> HostError:
    """The error when GPUs have problems, "" for those that have none."""
    what = "no GPU is free"
    if "" in problems.values():
        what = "a GPU is not free"
    states = []
    for gpu, problem in problems.items():
        state = problem or "is free"
        states.append(f"{gpu.label} {state}")

    why = "\n".join(states)
    all_have_mig = all(gpu.mig for gpu in problems)
    if all_have_mig:
        step = (
            "make a slice: nvidia-smi mig -cgi 0 -C (as root; 0 is all of the GPU)"
            "\nor switch MIG off: nvidia-smi -mig 0 (as root, with the GPU idle)"
        )
    else:
        busy = [gpu for gpu, problem in problems.items() if problem]
        who = "nvidia-smi names the processes; hfship status, the deployments"
        advice = _sharing_advice(busy)
        step = f"stop what holds them ({who}){advice}"

    return HostError(what, why, step)


def _sharing_advice(busy: Sequence[Gpu]) -> str:
    """How another model could share the emptiest of some GPUs; "" when none has 15 % left."""
    shareable = [gpu for gpu in busy if gpu.total and not gpu.mig]
    free_shares = [1 - gpu.used / gpu.total for gpu in shareable]
    room = max(free_shares, default=0)
    if room <= 0.15:
        return ""
    percent = int(room * 100 - 3)  # a margin
    return f", or share: --gpu-memory-utilization {percent / 100:.2f}"


def with_claims(gpus: Sequence[Gpu], running: Sequence[Plan]) -> Tuple[Gpu, ...]:
    """The GPUs with what running deployments will take of them: one that still loads shows little
    memory in use."""
    claimed = []
    for gpu in gpus:
        shares = []
        for plan in running:
            if gpu.uuid in plan.gpus:
                shares.append(plan.gpu_memory_utilization)
        planned = int(gpu.total * CUDA_SEES * sum(shares))
        used = max(gpu.used, planned)
        claimed.append(replace(gpu, used=used))

    return tuple(claimed)
