"""GPUs as nvidia-smi tells of them: slices, memory that is shared, and what is said of those in use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, List

import pytest

from hfship.base.errors import HostError
from hfship.base.text import GIB
from hfship.serve.gpus import gpu_pools, parse_nvidia_smi, with_slices
from hfship.serve.parallel import usable
from hfship.serve.terms import CUDA_SEES, Gpu, Host, ServeOptions

H100 = Gpu(0, "GPU-0", "NVIDIA H100", 80 * GIB, capability=(9, 0))


def gpus(*changes: Any) -> Host:
    found = []
    for index, change in enumerate(changes):
        found.append(replace(H100, index=index, uuid=f"GPU-{index}", **change))
    return Host(tuple(found), memory=64 * GIB)


@pytest.mark.parametrize("driver, read", [("580.95.05", "580.95.05"), ("[N/A]", "")])
def test_the_driver_is_a_version_or_not_known(driver: str, read: str) -> None:
    line = f"0, GPU-0, NVIDIA H100, 81920, 1024, 9.0, {driver}, Enabled\n"
    (gpu,) = parse_nvidia_smi(line)
    assert gpu == replace(H100, used=GIB, driver=read, mig=True)


def test_slices_of_a_gpu_that_is_not_listed_are_nobodys() -> None:
    whole = replace(H100, used=GIB, mig=True)
    listed = (
        "  MIG 1g.10gb     Device  0: (UUID: MIG-lost)\n"
        "GPU 1: NVIDIA H100 (UUID: GPU-other)\n"
        "  MIG 1g.10gb     Device  0: (UUID: MIG-other)\n"
        "GPU 0: NVIDIA H100 (UUID: GPU-0)\n"
        "  MIG 1g.10gb     Device  3: (UUID: MIG-ours)\n"
    )
    _, part = with_slices([whole], listed, {"0:3": 10 * GIB})
    assert (part.uuid, part.slice, part.total) == ("MIG-ours", "0:3", 10 * GIB)
    assert (part.used, part.mig, part.capability) == (0, False, (9, 0))


def test_a_gpu_without_memory_of_its_own_shares_that_of_the_host() -> None:
    pool, _ = gpu_pools(gpus({"total": 0, "name": "NVIDIA GB10"}), ServeOptions())[0]
    assert [gpu.total for gpu in pool] == [64 * GIB]


def test_a_slice_that_tells_no_memory_is_left_out() -> None:
    with pytest.raises(HostError, match="no GPU is free") as caught:
        gpu_pools(replace(gpus({"total": 0, "slice": "0:0"}), memory=0), ServeOptions())
    assert "does not tell its memory" in caught.value.why


@pytest.mark.parametrize("free, is_left_out", [(0.9, False), (0.8999, True)])
def test_a_gpu_must_have_free_what_is_asked_of_it(free: float, is_left_out: bool) -> None:
    """Of what CUDA sees of it: vLLM refuses to start with less."""
    of_cuda = 80 * GIB * CUDA_SEES
    used = int(of_cuda * (1 - free)) - (0 if is_left_out else 1)
    pool, _ = gpu_pools(gpus({}, {"used": used}), ServeOptions(gpu_memory_utilization=0.9))[0]
    assert len(pool) == (1 if is_left_out else 2)


@pytest.mark.parametrize("used, said", [(GIB, 0), (GIB + 1, 1)])
def test_what_others_use_beyond_a_gib_is_said(used: int, said: int) -> None:
    _, warnings = gpu_pools(gpus({"used": used}), ServeOptions(gpu_memory_utilization=0.5))[0]
    assert len(warnings) == said


def test_gpus_that_differ_and_are_named_are_told() -> None:
    host = gpus({}, {"name": "NVIDIA A100"})
    _, warnings = gpu_pools(host, ServeOptions(gpus=("0", "1")))[0]
    assert "the GPUs differ; the smallest decides" in " ".join(warnings)


# What of the GPUs is in use: how the operator could share them.
IN_USE: List[Any] = [
    ([{"used": 40 * GIB}], "--gpu-memory-utilization 0.47"),  # half is free, less a margin
    ([{"used": 40 * GIB}, {"used": 60 * GIB}], "--gpu-memory-utilization 0.47"),
    ([{"used": 20 * GIB}], "--gpu-memory-utilization 0.72"),
    ([{"used": 8 * GIB + 1}], "--gpu-memory-utilization 0.86"),
    ([{"used": 67 * GIB}], "--gpu-memory-utilization 0.13"),
    ([{"used": 68 * GIB + 1}], ""),  # no more than 15 % is left
    ([{"used": 79 * GIB}], ""),
    ([{"used": 40 * GIB}, {"mig": True}], "--gpu-memory-utilization 0.47"),
    ([{"mig": True}, {"used": 79 * GIB}], ""),
]


@pytest.mark.parametrize("changes, advice", IN_USE)
def test_how_to_share_what_is_in_use(changes: Any, advice: str) -> None:
    with pytest.raises(HostError) as caught:
        gpu_pools(gpus(*changes), ServeOptions(gpu_memory_utilization=0.9))
    step = caught.value.next_step
    assert step.startswith("stop what holds them")
    assert advice in step and ("or share" in step) == bool(advice)


@pytest.mark.parametrize(
    "changes, most",
    [([{}, {}], 2), ([{"slice": "0:0"}, {"slice": "0:1"}], 1), ([{}, {"slice": "0:0"}], 1)],
)
def test_a_process_sees_one_slice_alone(changes: Any, most: int) -> None:
    assert usable(gpus(*changes).gpus) == most


def test_the_kind_that_a_deployment_holds_comes_first_even_in_part() -> None:
    host = gpus(
        {},
        {},
        {"name": "NVIDIA L40S", "total": 48 * GIB},
        {"name": "NVIDIA L40S", "total": 48 * GIB},
    )
    pools = gpu_pools(host, ServeOptions(), ("GPU-2",))
    assert [gpu.index for gpu in pools[0].gpus][0] == 2
    assert [gpu.index for gpu in gpu_pools(host, ServeOptions())[0].gpus] == [0, 1]


def test_of_slices_the_smaller_come_first_and_whole_gpus_before_them() -> None:
    host = gpus(
        {"name": "H100 MIG 3g.40gb", "slice": "0:0", "total": 40 * GIB},
        {"name": "H100 MIG 1g.10gb", "slice": "0:1", "total": 10 * GIB},
        {},
    )
    pools = gpu_pools(host, ServeOptions())
    assert [[gpu.index for gpu in pool.gpus] for pool in pools] == [[2], [1], [0]]
