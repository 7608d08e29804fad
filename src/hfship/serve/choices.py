# SPDX-License-Identifier: Apache-2.0
"""What else could be: every split of a machine, by the images that are here, in three groups.

    runs             the whole context fits
    runs with less   a shorter one fits, and the options that make it so
    does not run     and why

Pure. What is chosen is decided by serve/parallel; here it is only told what the others would give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, List, Optional, Sequence

from hfship.base.errors import HostError
from hfship.base.text import human_bytes
from hfship.base.values import dataclass, replace
from hfship.serve.fit import (
    Fit,
    GpuKind,
    as_loaded,
    batch_limits,
    fit,
    gpu_share,
    kv_bytes,
    kv_width,
    usual_length,
    weights_per_gpu,
    working_memory,
)
from hfship.serve.gpus import gpu_pools
from hfship.serve.images import require_capability
from hfship.serve.parallel import (
    USUAL_SPLITS,
    kind_of,
    requests_held,
    rounded_requests,
    usable,
)
from hfship.serve.plan import require_supported
from hfship.serve.split_rules import Split, split_problem
from hfship.serve.terms import NEWEST, Image

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts
    from hfship.serve.terms import Gpu, Host, Plan, ServeOptions

RUNS, WITH_LESS, DOES_NOT = "runs", "runs with less", "does not run"
GROUPS = (RUNS, WITH_LESS, DOES_NOT)


@dataclass(frozen=True)
class Choice:
    """One image with one split. `need` is bytes per GPU for a request of the whole context,
    `length` the tokens that fit, `flags` what asks for it, `why` what is against it."""

    group: str
    image: str
    split: str = ""
    need: int = 0
    length: int = 0
    requests: float = 0.0
    flags: str = ""
    why: str = ""


def images_told(plan: Plan, host: Host) -> List[Image]:
    """The plan's image, and the others for its device that are here, the newest first."""
    own = Image(plan.image, plan.image_id, plan.version)
    for_cpu = plan.device == "cpu"
    others = []
    for image in host.images:
        if image.reference != plan.image and image.cpu == for_cpu:
            others.append(image)
    newest_first = sorted(
        others,
        key=lambda image: image.version or NEWEST,
        reverse=True,
    )

    return [own, *newest_first]


def choices(
    name: str,
    facts: ModelFacts,
    host: Host,
    images: Sequence[Image],
    options: ServeOptions,
    chosen: Sequence[str] = (),
) -> List[Choice]:
    """All choices on the GPUs that may be used, the best first; none where there is no GPU.

    `chosen` are the UUIDs of the plan: of mixed GPUs, their kind is told of.
    """
    pool = _pool_told(host, options, chosen)
    if not pool:
        return []

    found: List[Choice] = []
    for image in images:
        found.extend(_of_image(name, facts, pool, image, options))
    return sorted(found, key=lambda choice: GROUPS.index(choice.group))


def _pool_told(host: Host, options: ServeOptions, chosen: Sequence[str]) -> Sequence[Gpu]:
    """The GPUs of the kind that was chosen, else of the first; none where none may be used."""
    try:
        pools = gpu_pools(host, options, chosen)
    except HostError:
        return ()
    return pools[0].gpus


def _of_image(
    name: str, facts: ModelFacts, pool: Sequence[Gpu], image: Image, options: ServeOptions
) -> Iterator[Choice]:
    try:
        require_supported(name, facts, image)
        require_capability(name, facts, pool, image)
    except HostError as exc:
        yield Choice(DOES_NOT, image.reference, why=exc.why)
        return
    loaded = as_loaded(facts, image.version or NEWEST, options)

    for split in _splits_told(loaded, usable(pool), options):
        yield _choice(loaded, split, kind_of(pool), image, options)


def _splits_told(facts: ModelFacts, count: int, options: ServeOptions) -> Iterator[Split]:
    """Those of usual machines, all GPUs at once, and a pipeline where they cannot be divided."""
    sizes = sorted({size for size in (*USUAL_SPLITS, count) if size <= count})
    if options.tensor_parallel_size:
        sizes = [options.tensor_parallel_size]
    stages, copies = max(1, options.pipeline_parallel_size), max(1, options.data_parallel_size)
    for size in sizes:
        split = Split(size, stages, copies, options.enable_expert_parallel)
        if split.gpus <= count:
            yield split
    asked = options.tensor_parallel_size or options.pipeline_parallel_size
    if count > 1 and not asked and split_problem(facts, Split(count)):
        yield Split(1, count)


def _choice(
    facts: ModelFacts, split: Split, kind: GpuKind, image: Image, options: ServeOptions
) -> Choice:
    """How a split does."""
    bare = Choice(DOES_NOT, image.reference, str(split), flags=split.flags)
    problem = split_problem(facts, split)
    if problem:
        return replace(bare, why=problem)

    full = options.max_model_len or usual_length(facts)
    found = fit(facts, split, kind, options)
    need = _needed(facts, split, full, kind, options)
    length = min(found.length, full)
    held = requests_held(facts, found, length, kind, options)
    requests = rounded_requests(held)
    told = replace(bare, need=need, length=length, requests=requests)
    if found.length >= full:
        return replace(told, group=RUNS)
    if found.length:
        flags = f"{split.flags} --max-model-len {found.length}"
        return replace(told, group=WITH_LESS, flags=flags)

    narrow = _with_narrow_cache(facts, split, kind, options)
    if narrow:
        flags = f"{split.flags} --kv-cache-dtype fp8 --max-model-len {narrow.length}"
        return replace(told, group=WITH_LESS, length=narrow.length, flags=flags)

    share = human_bytes(gpu_share(kind, options))
    return replace(told, why=f"each has {share} for it")


def _needed(
    facts: ModelFacts, split: Split, length: int, kind: GpuKind, options: ServeOptions
) -> int:
    """Bytes on each GPU that one request of `length` tokens takes, with all that must be there."""
    in_flight, _ = batch_limits(kind)
    weights = weights_per_gpu(facts, split)
    working = working_memory(facts, split, kind, options)
    request = kv_bytes(facts, split, length, kv_width(facts, options), in_flight)
    return weights + working + request


def _with_narrow_cache(
    facts: ModelFacts, split: Split, kind: GpuKind, options: ServeOptions
) -> Optional[Fit]:
    """What an FP8 cache gives, where it gives anything."""
    if options.kv_cache_dtype != "auto":
        return None
    found = fit(facts, split, kind, replace(options, kv_cache_dtype="fp8"))
    if found.length:
        return found
    return None
