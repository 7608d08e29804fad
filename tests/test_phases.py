"""How far a start is, and why one that says nothing may hang."""

from __future__ import annotations

import pytest

from hfship.serve.phases import PhaseTimes, phase_of, stall_of
from hfship.serve.terms import Plan

# Lines as vLLM 0.32 writes them, after its own time, process and file.
LINES = {
    "INFO 11-28 22:00:01 [parallel_state.py:1500] world_size=2 rank=0 backend=nccl\n(Worker pid=9) INFO [pynccl.py:111] vLLM is using nccl==2.28.9": "joining the GPUs",
    "(EngineCore pid=7) INFO 11-28 22:00:01 [gpu_model_runner.py:5012] Starting to load model /models/m...": "loading weights",
    "Loading safetensors checkpoint shards:  45% Completed | 13/29 [00:10<00:12,  1.30it/s]": "loading weights, 45 %",
    "INFO [default_loader.py:502] Loading weights took 11.02 seconds": "sizing the KV cache",
    "INFO [backends.py:399] Compiling a graph for compile range (1, 8192) takes 12.3 s": "compiling",
    "INFO [gpu_worker.py:760] Available KV cache memory: 33.1 GiB": "sizing the KV cache",
    "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  52%|█████▏    | 35/67": "capturing CUDA graphs",
    "INFO [entry.py:140] Starting vLLM server on http://0.0.0.0:8000": "opening the API",
    "INFO:     Application startup complete.": "opening the API",
    "": "starting",
    "INFO something else": "starting",
}


@pytest.mark.parametrize("line", LINES)
def test_the_last_line_that_tells_is_the_phase(line: str) -> None:
    assert phase_of(f"INFO one\n{line}\nINFO another\n") == LINES[line]


def test_times_of_phases_add_up() -> None:
    times = PhaseTimes()
    for at, phase in (
        (0, "starting"),
        (4, "loading weights, 1 %"),
        (9, "loading weights, 90 %"),
        (20, "compiling"),
    ):
        times = times.with_phase(phase, at)
    assert times.seconds(50) == {"starting": 4, "loading weights": 16, "compiling": 30}


ONE, TWO = ("GPU-1",), ("GPU-1", "GPU-2")
STALLS = [
    (TWO, "joining the GPUs", 100, "NCCL", "NCCL_P2P_DISABLE=1"),
    (TWO, "capturing CUDA graphs", 200, "NCCL", "--disable-custom-all-reduce"),
    (TWO, "joining the GPUs", 0, "wait for each other", "--shm-size"),
    (TWO, "loading weights, 3 %", 2, "disk", "dd if=/m/FILE"),
    (ONE, "loading weights, 3 %", 2, "disk", "dmesg"),
    (ONE, "compiling", 100, "compiled", "--enforce-eager"),
    (ONE, "starting", 0, "driver", "nvidia-smi"),
    (ONE, "opening the API", 0, "nothing is known", "hfship logs m"),
    ((), "starting", 100, "nothing is known", "hfship logs m"),
]  # fmt: skip


@pytest.mark.parametrize("gpus, phase, busy, cause, step", STALLS)
def test_a_stall_has_a_likely_cause_and_something_to_try(
    gpus: tuple, phase: str, busy: float, cause: str, step: str
) -> None:
    stall = stall_of(Plan(name="m", model_dir="/m", gpus=gpus), phase, busy)
    assert cause in stall.cause and step in " ".join(stall.steps)
    assert "{" not in stall.cause + " ".join(stall.steps)
