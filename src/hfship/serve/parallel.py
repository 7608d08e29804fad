# SPDX-License-Identifier: Apache-2.0
"""Over how many GPUs, and how: the choice of a split.

Owns the order of preference: the fewest GPUs that hold the context and the requests that are
wanted, tensor parallelism before a pipeline, which comes in where nothing else fits (3 GPUs, say);
copies where more requests at a time are wanted. GPUs that stay idle are named with the command that
uses them. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from hfship.base.errors import HostError, UsageError, command_line
from hfship.base.text import counted, human_bytes
from hfship.base.values import replace
from hfship.serve.cards import advised_cards
from hfship.serve.fit import (
    LEAST_LENGTH,
    USEFUL_LENGTH,
    Fit,
    GpuKind,
    batch_limits,
    fit,
    kv_bytes,
    kv_width,
    usual_length,
    weights_per_gpu,
)
from hfship.serve.split_rules import Split, split_problem
from hfship.serve.state_cache import divide_up
from hfship.serve.terms import Image
from hfship.serve.vllm import knows_flag, least_capability
from hfship.serve.vllm_table import FLAGS, intervals_of, version_text

if TYPE_CHECKING:
    from hfship.serve.cards import Card
    from hfship.serve.facts import ModelFacts
    from hfship.serve.terms import Gpu, ServeOptions, Version

USUAL_SHARE = 0.9  # of each GPU, where nobody asked for another
WORTH_MORE_GPUS = 1.2  # times the requests
MOST_GPUS = 16  # that advice is given about
USUAL_SPLITS = (1, 2, 4, 8)  # the tensor parallel sizes of machines that are sold
NO_GPU = "-"  # in the table of what to buy
NO_NUMBER = "no number of the GPUs that hfship knows"


class Demand(NamedTuple):
    """What a deployment is to hold."""

    length: int  # tokens of a request
    requests: int  # of that length at a time, over all copies

    def of_a_copy(self, split: Split) -> int:
        """Requests that each copy must hold."""
        return divide_up(self.requests, split.dp)


def demand_of(facts: ModelFacts, options: ServeOptions) -> Demand:
    """As asked for, or a useful context for one request."""
    length = options.max_model_len or min(usual_length(facts), USEFUL_LENGTH)
    return Demand(length, max(1, options.wanted_concurrency))


def require_known_ways(
    name: str, facts: ModelFacts, version: Version, options: ServeOptions
) -> None:
    """Refuse ways to spread a model that this vLLM, or the model, does not have.

    Raises HostError, UsageError.
    """
    if options.enable_expert_parallel and not facts.experts:
        why = f"{facts.architecture} has no experts: its layers are divided as they are"
        step = command_line("hfship", "serve", name, *_other_ways(options))
        raise UsageError("--enable-expert-parallel makes no sense here", why, step)
    for flag in _flags_wanted(options):
        if options.device == "cpu":
            why = "this is served on the CPU, by one process"
            step = command_line("hfship", "serve", name, "--device", "cpu", "--reset")
            raise UsageError(f"{flag} is for GPUs", why, step)
        if not knows_flag(version, flag):
            spans = ", ".join(interval.text() for interval in intervals_of(FLAGS, flag))
            why = f"vLLM {version_text(version)} does not know it: it is there {spans}"
            raise HostError(f"{flag} cannot be used", why, "choose another --image")


def _other_ways(options: ServeOptions) -> List[str]:
    """The sizes that were asked for, as words, without expert parallelism."""
    sizes = {
        "--tensor-parallel-size": options.tensor_parallel_size,
        "--pipeline-parallel-size": options.pipeline_parallel_size,
        "--data-parallel-size": options.data_parallel_size,
    }
    words: List[str] = []
    for flag, size in sizes.items():
        if size:
            words += [flag, str(size)]
    return words


def _flags_wanted(options: ServeOptions) -> Iterator[str]:
    """Flags of vLLM that the options need."""
    if options.pipeline_parallel_size > 1:
        yield "--pipeline-parallel-size"
    if options.data_parallel_size > 1:
        yield "--data-parallel-size"
    if options.enable_expert_parallel:
        yield "--enable-expert-parallel"


def choose_split(
    name: str, facts: ModelFacts, pool: Sequence[Gpu], version: Version, options: ServeOptions
) -> Fit:
    """The split over GPUs of the pool that holds what is wanted with the fewest of them.

    Where no context was asked for: a useful one, or else the longest that there is. Raises
    HostError that names what would work.
    """
    require_known_ways(name, facts, version, options)
    demand = demand_of(facts, options)
    kind = kind_of(pool)
    fits: List[Fit] = []
    for with_stages in (False, True):
        for split in splits(facts, usable(pool), options, with_stages):
            found = fit(facts, split, kind, options, demand.of_a_copy(split))
            fits.append(found)
            if found.length >= demand.length:
                return found
        works = [found for found in fits if found.length]
        if works and not options.max_model_len:
            return max(works, key=lambda found: (found.length, -found.gpus))

    raise refusal(name, facts, pool, fits, options)


def splits(
    facts: ModelFacts, count: int, options: ServeOptions, with_stages: bool
) -> Iterator[Split]:
    """The splits over at most `count` GPUs, the preferred ones first.

    With stages: those with a pipeline that nobody asked for, and only those. Copies are made where
    requests at a time are asked for, or their number.
    """
    found = []
    for tp in _sizes(options.tensor_parallel_size, count):
        beside = count // tp
        for pp in _stages(options, beside, with_stages):
            for dp in _copies(options, count // (tp * pp)):
                split = Split(tp, pp, dp, options.enable_expert_parallel)
                found.append(split)

    def effort(split: Split) -> Tuple[int, int, int]:
        # Copies answer more; but of a model with experts they wait for each other.
        widest = split.dp if facts.experts else split.tp
        return split.gpus, split.pp, widest

    return iter(sorted(found, key=effort))


def _sizes(asked: int, most: int) -> Sequence[int]:
    if asked:
        return [asked] if asked <= most else []
    return range(1, most + 1)


def _stages(options: ServeOptions, most: int, with_stages: bool) -> Sequence[int]:
    asked = options.pipeline_parallel_size
    if with_stages:
        if asked:
            return []
        return range(2, most + 1)
    return _sizes(asked or 1, most)


def _copies(options: ServeOptions, most: int) -> Sequence[int]:
    asked = options.data_parallel_size
    if asked or options.wanted_concurrency <= 1:
        return _sizes(asked or 1, most)
    return range(1, most + 1)


def usable(pool: Sequence[Gpu]) -> int:
    """How many of a pool one model can take: of the slices of a GPU, one process sees one alone."""
    if any(gpu.slice for gpu in pool):
        return 1
    return len(pool)


def kind_of(pool: Sequence[Gpu]) -> GpuKind:
    """The smallest GPU: a split is even, so that one decides.

    vLLM's defaults go by the name of an A100, too (get_batch_defaults in vllm/engine/arg_utils.py).
    """
    least = min(gpu.total for gpu in pool)
    return GpuKind(least, any("a100" in gpu.name.lower() for gpu in pool))


def requests_held(
    facts: ModelFacts, found: Fit, length: int, kind: GpuKind, options: ServeOptions
) -> float:
    """How many requests of `length` tokens all copies hold at a time; 0 where none takes memory."""
    in_flight, _ = batch_limits(kind)
    width = kv_width(facts, options)
    request = kv_bytes(facts, found.split, length, width, in_flight)
    if not request:
        return 0.0

    return found.split.dp * found.kv / request


def rounded_requests(requests: float) -> float:
    """To one decimal place, to none beyond 10.

    >>> rounded_requests(0.26), rounded_requests(10.4)
    (0.3, 10.0)
    """
    if requests > 10:
        return round(requests, 0)
    return round(requests, 1)


def idle_advice(
    name: str, facts: ModelFacts, pool: Sequence[Gpu], found: Fit, options: ServeOptions
) -> str:
    """What would use the GPUs that stay idle, for people; "" where none does, or nothing would."""
    idle = pool[found.gpus :]
    if not idle:
        return ""

    labels = [gpu.slice or str(gpu.index) for gpu in idle]
    who = "GPU " + ", ".join(labels)
    if any(gpu.slice for gpu in pool):
        return f"{who}: for other models, a slice serves one alone"

    more = _wider(facts, pool, found, options)
    if more is None:
        return f"{who}: for other models"

    kind = kind_of(pool)
    held = requests_held(facts, more, found.length, kind, options)
    command = f"hfship serve {name} {more.split.flags}"
    return f"{who}: {command}    (about {rounded_requests(held):g} requests)"


def _wider(
    facts: ModelFacts, pool: Sequence[Gpu], found: Fit, options: ServeOptions
) -> Optional[Fit]:
    """What holds most requests of the length that was found, with more GPUs."""
    kind = kind_of(pool)
    wanted = replace(options, max_model_len=found.length)
    best = None
    least = WORTH_MORE_GPUS * requests_held(facts, found, found.length, kind, options)
    for split in _wider_splits(found.split, len(pool)):
        more = fit(facts, split, kind, wanted)
        if more.length < found.length:
            continue

        held = requests_held(facts, more, found.length, kind, options)
        if held > least:
            best = more
            least = WORTH_MORE_GPUS * held

    return best


def _wider_splits(split: Split, count: int) -> Iterator[Split]:
    """Splits over more GPUs, at most `count`: more copies, or each of them over more."""
    for tp in range(split.tp, count + 1):
        most = count // (tp * split.pp)
        for dp in range(1, most + 1):
            wider = split._replace(tp=tp, dp=dp)
            if wider.gpus > split.gpus:
                yield wider


def refusal(
    name: str, facts: ModelFacts, pool: Sequence[Gpu], fits: Sequence[Fit], options: ServeOptions
) -> HostError:
    """The error for a model that does not fit as asked, with the nearest plans that do."""
    kind = kind_of(pool)
    gpus = counted(len(pool), "GPU")
    what = f"cannot serve {name} on {gpus} of {human_bytes(kind.total)}"
    asked = _asked_for(options)
    if asked:
        what += f" with {asked}"

    tried = list(fits)
    if not tried:  # more GPUs were asked for than there are
        split = _asked_split(options)
        problem = split_problem(facts, split)
        free = counted(usable(pool), "free GPU")
        tried.append(Fit(split, problem or f"there are only {free}"))

    why = "\n".join(str(found) for found in _telling(tried))
    works = _ways_out(name, facts, pool, options)
    return HostError(what, why, "what works: " + "\n  or ".join(works))


def _ways_out(
    name: str, facts: ModelFacts, pool: Sequence[Gpu], options: ServeOptions
) -> List[str]:
    """Commands that work on this pool, and what other GPUs would hold where they hold more."""
    flags = _that_work(facts, pool, options) or _larger_share(facts, pool, options)
    works = [f"hfship serve {name} {words}" for words in flags]
    if works and _holds_all(facts, pool, options):
        return works

    beyond = advice_beyond(facts, usable(pool), kind_of(pool), options)
    if beyond != NO_NUMBER or not works:
        works.append(beyond)
    return works


def _that_work(facts: ModelFacts, pool: Sequence[Gpu], options: ServeOptions) -> List[str]:
    """Flags with which the pool serves the model: less of what was asked for, or another split. Of
    the splits that hold as much, the one with fewest GPUs."""
    if options.wanted_concurrency:
        most = _most_requests(facts, pool, options)
        if most:
            return [most]
    works: List[str] = []
    held = (0, 0)
    for found in nearest_plans(facts, pool, options):
        holds = (found.length, found.sequences)
        if holds > held:
            held = holds
            works.append(_flags_of(facts, found))
    return works


def _holds_all(facts: ModelFacts, pool: Sequence[Gpu], options: ServeOptions) -> bool:
    """Whether the pool holds all that was asked for but the split, or the share, itself."""
    demand = demand_of(facts, options)
    if demand.requests > 1:
        return False
    options = replace(options, gpu_memory_utilization=USUAL_SHARE)
    return any(found.length >= demand.length for found in nearest_plans(facts, pool, options))


def _larger_share(facts: ModelFacts, pool: Sequence[Gpu], options: ServeOptions) -> List[str]:
    """The least share of each GPU that does, as far as others leave it, as flags."""
    most = min(USUAL_SHARE, min(1 - gpu.used / gpu.total for gpu in pool))
    for percent in range(5, int(100 * most) + 1, 5):
        share = percent / 100
        if share <= options.gpu_memory_utilization:
            continue
        more = replace(options, gpu_memory_utilization=share)
        if any(found.length for found in nearest_plans(facts, pool, more)):
            return [f"--gpu-memory-utilization {share:g}"]
    return []


def _asked_for(options: ServeOptions) -> str:
    """What was asked for that may not be possible, as flags."""
    asked = {
        "--tensor-parallel-size": options.tensor_parallel_size,
        "--pipeline-parallel-size": options.pipeline_parallel_size,
        "--data-parallel-size": options.data_parallel_size,
        "--max-model-len": options.max_model_len,
        "--max-num-seqs": options.max_num_seqs,
        "--concurrency": options.wanted_concurrency,
    }
    return " ".join(f"{flag} {value}" for flag, value in asked.items() if value)


def _asked_split(options: ServeOptions) -> Split:
    return Split(
        max(1, options.tensor_parallel_size),
        max(1, options.pipeline_parallel_size),
        max(1, options.data_parallel_size),
        options.enable_expert_parallel,
    )


def _telling(tried: Sequence[Fit]) -> Sequence[Fit]:
    """Those that say why: all without a pipeline, or else all, at most eight."""
    plain = [found for found in tried if found.split.pp == 1]
    return (plain or tried)[:8]


def nearest_plans(facts: ModelFacts, pool: Sequence[Gpu], options: ServeOptions) -> Iterator[Fit]:
    """What fits on the pool with less context, fewer requests or another split."""
    kind = kind_of(pool)
    plain = replace(
        options,
        tensor_parallel_size=0,
        pipeline_parallel_size=0,
        data_parallel_size=0,
        wanted_concurrency=0,
    )
    with_pipelines = False
    for with_stages in (False, True):
        for split in splits(facts, usable(pool), plain, with_stages):
            found = fit(facts, split, kind, plain)
            if found.length or found.sequences:
                with_pipelines = True
                yield found
        if with_pipelines:
            return


def _most_requests(facts: ModelFacts, pool: Sequence[Gpu], options: ServeOptions) -> str:
    """The most requests at a time of the length that is wanted, as flags; "" where none fits."""
    kind, demand = kind_of(pool), demand_of(facts, options)
    most = 0.0
    for split in splits(facts, usable(pool), replace(options, wanted_concurrency=2), False):
        found = fit(facts, split, kind, replace(options, max_model_len=demand.length))
        if found.length >= demand.length:
            most = max(most, requests_held(facts, found, demand.length, kind, options))
    if most < 1:
        return ""
    return f"--concurrency {int(most)} --max-model-len {demand.length}"


def _flags_of(facts: ModelFacts, found: Fit) -> str:
    """What asks for a plan: its split, and its context where that is not the model's own."""
    if not found.length:
        return f"{found.split.flags} --max-num-seqs {found.sequences}"
    if found.length == usual_length(facts):
        return found.split.flags
    return f"{found.split.flags} --max-model-len {found.length}"


def advice_beyond(facts: ModelFacts, count: int, kind: GpuKind, options: ServeOptions) -> str:
    """What would do beyond `count` GPUs: the smallest number of such GPUs, or else other ones."""
    wanted = options.max_model_len or min(usual_length(facts), LEAST_LENGTH)
    requests = max(1, options.wanted_concurrency)
    for tp in range(count + 1, MOST_GPUS + 1):
        found = fit(facts, Split(tp), kind, options, requests)
        if found.length >= wanted:
            gpus = counted(tp, "such GPU")
            return f"{gpus} ({found.split.flags}, {found.length} tokens)"

    for tp in USUAL_SPLITS:
        card = smallest_gpu(facts, Split(tp), wanted, options, requests)
        if card != NO_GPU:
            return f"{tp} x {card}"

    return NO_NUMBER


def _kind_of_card(card: Card) -> GpuKind:
    return GpuKind(card.mebibytes << 20, "a100" in card.label.lower())


def smallest_gpu(
    facts: ModelFacts, split: Split, length: int, options: ServeOptions, requests: int = 1
) -> str:
    """The smallest usual GPU that runs the model, if `split` holds `requests` of `length` tokens;
    or NO_GPU."""
    least, _ = least_capability(facts, Image(""))
    for card in advised_cards():
        if card.capability < least:
            continue
        found = fit(facts, split, _kind_of_card(card), options, requests)
        if found.length >= length:
            return card.label

    return NO_GPU


def sizing(facts: ModelFacts, options: ServeOptions) -> List[List[str]]:
    """What to buy, for a machine still to be chosen.

    Rows of (split, weights per GPU, GPU for a short context, GPU for the full one).
    """
    full = options.max_model_len or usual_length(facts)
    short = min(full, 8192)
    rows = []
    for tp in USUAL_SPLITS:
        split = Split(tp)
        row = [
            str(split),
            split_problem(facts, split) or human_bytes(weights_per_gpu(facts, split)),
            smallest_gpu(facts, split, short, options),
            smallest_gpu(facts, split, full, options),
        ]
        rows.append(row)

    return rows
