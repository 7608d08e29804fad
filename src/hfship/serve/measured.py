# SPDX-License-Identifier: Apache-2.0
"""What vLLM measured when a deployment started, for the next plan and for people.

Kept in DEPLOY_DIR/NAME/measured.json (docs/formats.md, "Deployment"): hfship-measured/1, the fields
of Measured. `basis` says what was measured; a plan with another basis takes nothing from it.

Promises: what is not there or cannot be read is nothing measured; a context that was asked for is
never changed. Never: makes a context longer while the deployment runs.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

from hfship.base.errors import HfshipError
from hfship.base.files import write_below
from hfship.base.reading import parse_json
from hfship.base.settings import typed_fields
from hfship.base.text import GIB, clock_text, human_bytes, utc
from hfship.base.values import asdict, dataclass, field, replace
from hfship.serve.deployments import read_own
from hfship.serve.parallel import rounded_requests

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.serve.facts import ModelFacts
    from hfship.serve.start import Started
    from hfship.serve.terms import Plan

MEASURED_FILE, MEASURED_FORMAT = "measured.json", "hfship-measured/1"
ROUND_TO = 1024  # tokens of context
# What a measurement depends on, of a plan.
_BASIS = (
    "image_id",
    "device",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "gpu_memory_utilization",
    "dtype",
    "kv_cache_dtype",
    "extra_args",
    "model_dir",
    "weight_bytes",
)


@dataclass(frozen=True)
class Measured:
    """What the log of a start tells, and what the first request showed. 0 and "": not told."""

    at: str = ""  # UTC
    basis: Mapping[str, Any] = field(default_factory=dict)
    max_model_len: int = 0  # that it was started with
    kv_tokens: int = 0
    kv_bytes: int = 0  # per GPU
    concurrency: float = 0.0  # requests of max_model_len that the cache of an engine holds
    weight_bytes: int = 0  # per GPU, as loaded
    load_s: float = 0.0  # of weights, as vLLM says
    start_s: float = 0.0  # from `up` to the first answer; 0 where it ran before
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds by phase of a start
    fits_length: int = 0  # tokens of context, of a start that failed for too long a context
    fits_states: int = 0  # requests at a time, of a start that failed for want of blocks for states
    task: str = ""  # of serve/task.py, proven by an answer
    route: str = ""


# Lines of vLLM 0.8.3 to 0.33: vllm/v1/worker/gpu_worker.py, cpu_worker.py, gpu_model_runner.py,
# v1/core/kv_cache_utils.py, model_executor/model_loader/default_loader.py, config/compilation.py.
_NUMBERS = {
    "kv_tokens": (r"KV cache size: ([\d,]+) tokens", 1),
    "kv_bytes": (r"[Aa]vailable KV cache memory: ([\d.]+) GiB", GIB),
    "weight_bytes": (r"Model loading took ([\d.]+) Gi?B", GIB),
    "load_s": (r"Model loading took [\d.]+ Gi?B(?: memory)? and ([\d.]+) seconds", 1),
    "concurrency": (r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", 1),
    "fits_length": (r"estimated maximum model length is (\d+)", 1),
    "fits_states": (r"exceeds available Mamba cache blocks \((\d+)\)", 1),
}
_FRACTIONS = ("load_s", "concurrency")
_LOAD_ALONE = re.compile(r"Loading weights took ([\d.]+) seconds")


def measured_in(log: str) -> Measured:
    """What a log tells; of several starts in it the last.

    >>> measured_in("Model loading took 14.99 GiB and 3.5 seconds").load_s
    3.5
    >>> measured_in("GPU KV cache size: 1,234,567 tokens").kv_tokens
    1234567
    """
    found: Dict[str, Any] = {}
    for name, (pattern, unit) in _NUMBERS.items():
        for text in re.findall(pattern, log):
            digits = text.replace(",", "")
            found[name] = float(digits) * unit

    for text in _LOAD_ALONE.findall(log):
        found.setdefault("load_s", float(text))
    for name, value in found.items():
        if name not in _FRACTIONS:
            found[name] = int(value)
    return Measured(**found)


def basis_of(plan: Plan) -> Dict[str, Any]:
    """What a measurement depends on: fields of the plan, and the kind of its GPUs."""
    basis: Dict[str, Any] = {}
    for name in _BASIS:
        value = getattr(plan, name)
        if isinstance(value, tuple):
            value = list(value)  # as JSON has it
        basis[name] = value
    # Not what the plan chose: that may follow from what was measured.
    basis["max_num_seqs"] = plan.wishes.get("max_num_seqs", 0)
    kinds = []
    for label in plan.gpu_names:
        kind = re.sub(r"^GPU \d+ ", "", label)
        kinds.append(kind)
    basis["gpus"] = sorted(kinds)
    return basis


def fits(measured: Measured, plan: Plan) -> bool:
    """Whether what was measured is about a plan like this one."""
    return bool(measured.basis) and dict(measured.basis) == basis_of(plan)


def informed_plan(plan: Plan, measured: Measured, facts: ModelFacts, is_running: bool) -> Plan:
    """The plan with what was measured in place of what was estimated.

    A context that did not fit is shortened, and so are requests at a time for which there were no
    blocks; a context that we chose too short grows, unless the deployment runs, or its KV cache is
    not in proportion to the context.
    """
    if not fits(measured, plan):
        return plan
    if measured.fits_states and "max_num_seqs" not in plan.wishes:
        most = min(plan.max_num_seqs or measured.fits_states, measured.fits_states)
        plan = replace(plan, max_num_seqs=most)
    if plan.max_model_len and "max_model_len" not in plan.wishes:
        plan = _with_length(plan, measured, facts, is_running)
    return plan


def as_measured(plan: Plan, measured: Measured, facts: ModelFacts) -> Plan:
    """An informed plan as people are shown it: the cache and what it holds are as vLLM says. What
    is written down stays as it was planned: a second serve changes nothing."""
    return replace(
        plan,
        kv_bytes=measured.kv_bytes or plan.kv_bytes,
        concurrency=_requests_held(plan, measured, facts) or plan.concurrency,
    )


def _with_length(plan: Plan, measured: Measured, facts: ModelFacts, is_running: bool) -> Plan:
    """The plan with the context that fits, as was measured."""
    length = plan.max_model_len
    if measured.fits_length:
        length = min(length, measured.fits_length)
    elif not is_running and _is_proportional(facts):
        longest = measured.kv_tokens // ROUND_TO * ROUND_TO
        length = max(length, min(longest, facts.max_length))
    if length == plan.max_model_len:
        return plan

    warnings = [warning for warning in plan.warnings if not warning.startswith("context short")]
    if length < facts.max_length:
        warnings.append(f"context of {length} of {facts.max_length} tokens: what vLLM measured")
    return replace(plan, max_model_len=length, warnings=tuple(warnings))


def _requests_held(plan: Plan, measured: Measured, facts: ModelFacts) -> float:
    """Requests of full length that all copies hold, as measured; 0 where that is of another
    length, and no rule leads to this one."""
    held = 0.0
    if measured.max_model_len == plan.max_model_len:
        held = measured.concurrency
    if not held and plan.max_model_len and _is_proportional(facts):
        held = measured.kv_tokens / plan.max_model_len
    return rounded_requests(held * max(1, plan.data_parallel_size))


def measured_after(plan: Plan, before: Measured, log: str, started: Optional[Started]) -> Measured:
    """What to keep after a start: what the log tells, and what is known from before where it is of
    the same basis and the log has lost it. Of a start that failed the context that fits alone."""
    found = measured_in(log)
    basis = basis_of(plan)
    old = before if before.basis == basis else Measured()
    if started is None:
        return _of_failed_start(found, replace(old, basis=basis))

    kept = {}
    for name in ("kv_tokens", "kv_bytes", "concurrency", "weight_bytes", "load_s"):
        kept[name] = getattr(found, name) or getattr(old, name)
    answer = started.answer
    new = replace(
        old,
        basis=basis,
        max_model_len=plan.max_model_len,
        start_s=started.seconds or old.start_s,
        phases=dict(started.phases) or old.phases,
        task=answer.task,
        route=answer.route,
        **kept,
    )
    if new == old:  # nothing to write: a second serve changes nothing
        return old
    return replace(new, at=utc())


def _of_failed_start(found: Measured, old: Measured) -> Measured:
    """What a start that failed adds to what is known: what would fit; nothing where it tells
    nothing."""
    if not found.fits_length and not found.fits_states:
        return Measured()
    return replace(
        old,
        at=utc(),
        fits_length=found.fits_length or old.fits_length,
        fits_states=found.fits_states or old.fits_states,
    )


def _is_proportional(facts: ModelFacts) -> bool:
    """Whether each token of context takes as much of the KV cache as every other."""
    return facts.window_layers == 0 and facts.full_layers == facts.layers


def measured_text(measured: Measured) -> str:
    """What was measured, for people: what the KV cache holds and how long a start takes."""
    parts = []
    if measured.kv_tokens:
        parts.append(f"{measured.kv_tokens} tokens")
    if measured.kv_bytes:
        cache = human_bytes(measured.kv_bytes)
        parts.append(f"{cache} of KV cache")
    if measured.weight_bytes:
        weights = human_bytes(measured.weight_bytes)
        parts.append(f"{weights} of weights")
    if measured.start_s:
        start = clock_text(measured.start_s)
        parts.append(f"started in {start}")
    if not parts:
        return ""
    day = measured.at[:10]
    joined = ", ".join(parts)
    return f"{joined} (vLLM, {day})"


def read_measured(folder: Path) -> Measured:
    """What was measured for the deployment in a folder; nothing where nothing sensible is there."""
    content: Optional[bytes] = None
    with contextlib.suppress(HfshipError):
        content = read_own(folder, MEASURED_FILE)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        value = parse_json(content or b"")
        if value["format"] == MEASURED_FORMAT:
            usual = Measured()
            known = typed_fields(usual, value)
            return Measured(**known)
    return Measured()


def write_measured(folder: Path, measured: Measured) -> None:
    """Keep what was measured. Raises DiskError, HostError."""
    value = {"format": MEASURED_FORMAT, **asdict(measured)}
    text = json.dumps(value, sort_keys=True, indent=1)
    path = f"{folder.name}/{MEASURED_FILE}"
    write_below(folder.parent, path, text + "\n", 0o644)
