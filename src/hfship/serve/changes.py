# SPDX-License-Identifier: Apache-2.0
"""What differs between a plan that runs and the next one, for the operator: docker makes a
container anew whose compose file or variables changed, and its clients lose their answers.

Promises: pure; names variables and never shows their values.
"""

from __future__ import annotations

from typing import Dict, List, Sequence

from hfship.serve.files import compose_text
from hfship.serve.plan import vllm_arguments
from hfship.serve.terms import Plan


def changes(old: Plan, new: Plan) -> List[str]:
    """What of the container changes, a text each; [] where docker leaves it as it is.

    >>> from dataclasses import replace
    >>> plan = Plan(name="m", port=8000, max_model_len=512, image="vllm:1")
    >>> changes(plan, replace(plan, max_model_len=1024, port=8001))
    ['port 8000 -> 8001', '--max-model-len 512 -> 1024']
    """
    same_files = compose_text(old) == compose_text(new)
    if same_files and dict(old.env) == dict(new.env):
        return []

    found = []
    for word, before, now in (
        ("version", old.model_version or "unknown", new.model_version or "unknown"),
        ("image", old.image, new.image),
        ("address", old.bind, new.bind),
        ("port", old.port, new.port),
        ("shared memory", old.shm_size, new.shm_size),
        ("GPUs", _listed(old.gpus), _listed(new.gpus)),
    ):
        if before != now:
            found.append(f"{word} {before} -> {now}")
    if old.image == new.image and old.image_id != new.image_id:
        found.append("the image that has its name")

    found += _argument_changes(vllm_arguments(old), vllm_arguments(new))
    found += _variable_changes(old, new)
    return found or ["its compose file"]


def _listed(gpus: Sequence[str]) -> str:
    return ", ".join(gpus) or "none"


def flags_of(arguments: Sequence[str]) -> Dict[str, str]:
    """The flags of vLLM and their values, "" for one without; the model is among them as `model`.

    >>> flags_of(["/models/m", "--served-model-name", "m", "org/m", "--x", "--y=1"])
    {'model': '/models/m', '--served-model-name': 'm org/m', '--x': '', '--y': '1'}
    """
    found: Dict[str, str] = {}
    flag = "model"
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
            found[flag] = value
            continue
        values = [found.get(flag, ""), argument]
        found[flag] = " ".join(values).strip()
    return found


def _argument_changes(old: Sequence[str], new: Sequence[str]) -> List[str]:
    before, now = flags_of(old), flags_of(new)
    found = []
    for flag in [*before, *(flag for flag in now if flag not in before)]:
        if flag not in now:
            found.append(f"without {flag}")
        elif flag not in before:
            found.append(f"with {flag} {now[flag]}".rstrip())
        elif before[flag] != now[flag]:
            found.append(f"{flag} {before[flag]} -> {now[flag]}")
    return found


def _variable_changes(old: Plan, new: Plan) -> List[str]:
    """The names of variables that change; their values may be secret."""
    names = sorted({*old.env, *new.env})
    changed = [name for name in names if old.env.get(name) != new.env.get(name)]
    if not changed:
        return []
    joined = ", ".join(changed)
    return [f"variables {joined}"]
