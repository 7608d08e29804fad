# SPDX-License-Identifier: Apache-2.0
"""How far a start is, from vLLM's log; and what is likely in the way of one that says nothing.

Owns the phases of a start, their seconds, and the table of causes of a stall.
Promises: pure; the clock is the caller's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Sequence, Tuple

from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.serve.terms import Plan

# A log without a new line for so long is a stall: a shard of 5 GB takes four minutes at 20 MB/s,
# compiling is silent for up to three.
STALLED_AFTER_S = 300.0
BUSY_PERCENT = 50.0  # of one core: a program that waits for a disk uses less, one that spins more

BEGIN = "starting"
JOIN, WEIGHTS, COMPILE = "joining the GPUs", "loading weights", "compiling"
CACHE, GRAPHS, API = "sizing the KV cache", "capturing CUDA graphs", "opening the API"

# What a line of vLLM's log says about how far it is; the last line that matches tells.
_PHASES: Tuple[Tuple[str, str], ...] = (
    (r"checkpoint shards:\s+(\d+)%", WEIGHTS + ", {0} %"),
    (r"Loading weights took|Model loading took", CACHE),
    (r"Starting to load model|Loading (?:safetensors|weights|model)", WEIGHTS),
    (r"Dynamo bytecode|Compiling a graph|compiled graph|torch\.compile takes", COMPILE),
    (r"Available KV cache memory|KV cache size|# (?:GPU|CPU) blocks", CACHE),
    (r"(?i:capturing (?:cuda|cudagraph|the model)|graph capturing)", GRAPHS),
    (r"Starting vLLM (?:API )?server|Application startup complete|Uvicorn running", API),
    (r"vLLM is using nccl|Initializing distributed|init_process_group|Found nccl", JOIN),
)
_PATTERNS = tuple((re.compile(pattern), phase) for pattern, phase in _PHASES)


def phase_of(log: str) -> str:
    """How far vLLM is, from its log.

    >>> phase_of("Loading safetensors checkpoint shards:  45% Completed | 13/29")
    'loading weights, 45 %'
    """
    lines = log.replace("\r", "\n").splitlines()
    for line in reversed(lines):
        for pattern, phase in _PATTERNS:
            match = pattern.search(line)
            if match:
                return phase.format(*match.groups())
    return BEGIN


def phase_name(phase: str) -> str:
    """A phase without how far it is.

    >>> phase_name("loading weights, 45 %")
    'loading weights'
    """
    return phase.partition(",")[0]


@dataclass(frozen=True)
class PhaseTimes:
    """The phases of a start in their order, each with the second of the start that it began at."""

    begins: Tuple[Tuple[str, float], ...] = ()

    def with_phase(self, phase: str, at: float) -> PhaseTimes:
        """These, and a phase that is seen at a second; the last one goes on."""
        name = phase_name(phase)
        if self.begins and self.begins[-1][0] == name:
            return self
        return PhaseTimes((*self.begins, (name, at)))

    def seconds(self, end: float) -> Dict[str, float]:
        """Seconds by phase, of a start that ended at `end`.

        >>> PhaseTimes().with_phase("starting", 0).with_phase("compiling", 8.0).seconds(20.0)
        {'starting': 8.0, 'compiling': 12.0}
        """
        found: Dict[str, float] = {}
        ends = [begin for _, begin in self.begins[1:]]
        ends.append(end)
        for (name, begin), until in zip(self.begins, ends):
            lasted = until - begin
            so_far = found.get(name, 0.0)
            found[name] = round(so_far + lasted, 1)
        return found


class Stall(NamedTuple):
    """Why a start may hang, and what to try."""

    cause: str
    steps: List[str]


# (phases, whether the engine must be split over GPUs, whether it must be busy or idle (None: any),
# cause, what to try). The first row that fits.
_STALLS: Sequence[Tuple[Tuple[str, ...], bool, object, str, Tuple[str, ...]]] = (
    (
        (BEGIN, JOIN, WEIGHTS, CACHE, GRAPHS),
        True,
        True,
        "the GPUs wait for each other (NCCL): direct access between them may be blocked",
        (
            "hfship serve {name} --env NCCL_P2P_DISABLE=1 -- --disable-custom-all-reduce",
            "hfship serve {name} --shm-size 32gb",
            "hfship serve {name} --env NCCL_DEBUG=INFO     # then: hfship logs {name}",
        ),
    ),
    (
        (WEIGHTS,),
        False,
        False,
        "the weights come slowly, or not at all: the disk or the network file system hangs",
        (
            "dd if={folder}/FILE of=/dev/null bs=16M count=64     # how fast it reads",
            "dmesg | tail     # what the kernel says of the disk",
            "copy the model to a local disk, then hfship serve {name}",
        ),
    ),
    (
        (JOIN,),
        False,
        None,
        "the processes of the engine wait for each other",
        (
            "hfship serve {name} --shm-size 32gb",
            "hfship serve {name} --env NCCL_DEBUG=INFO     # then: hfship logs {name}",
        ),
    ),
    (
        (COMPILE, GRAPHS),
        False,
        None,
        "kernels are compiled, which can take ten minutes on few cores",
        ("hfship serve {name} -- --enforce-eager     # without: slower, but it starts",),
    ),
    (
        (BEGIN,),
        False,
        False,
        "the image is read from a slow disk, or the driver does not answer",
        ("nvidia-smi     # must answer at once", "dmesg | tail"),
    ),
)


def stall_of(plan: Plan, phase: str, cpu_percent: float) -> Stall:
    """The likely cause of a start that says nothing, from its phase and how busy it is.

    >>> from hfship.serve.terms import Plan
    >>> two = Plan(name="m", gpus=("GPU-1", "GPU-2"))
    >>> stall_of(two, "loading weights, 45 %", cpu_percent=200).steps[0]
    'hfship serve m --env NCCL_P2P_DISABLE=1 -- --disable-custom-all-reduce'
    >>> stall_of(two, "loading weights, 45 %", cpu_percent=1).cause[:11]
    'the weights'
    """
    name, busy = phase_name(phase), cpu_percent >= BUSY_PERCENT
    for phases, is_split, wanted, cause, steps in _STALLS:
        if name not in phases or (is_split and len(plan.gpus) < 2):
            continue
        if wanted is None or wanted == busy:
            return Stall(cause, [_filled(step, plan) for step in steps])

    step = "hfship logs {name} --tail 50"
    return Stall("nothing is known of the cause", [_filled(step, plan)])


def _filled(step: str, plan: Plan) -> str:
    return step.format(name=plan.name, folder=plan.model_dir)
