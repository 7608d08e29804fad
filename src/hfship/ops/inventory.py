# SPDX-License-Identifier: Apache-2.0
"""What the hosts of a site say of themselves, asked of all at once, and what of it does not fit.

Promises: a host that does not answer is in the result, with the reason; a question changes nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from hfship.base.errors import Exit, HfshipError, IntegrityError
from hfship.base.text import counted, human_bytes, human_seconds, table
from hfship.base.values import dataclass, replace
from hfship.ops.reach import LOOK_S, FarHost, at_once
from hfship.site.facts import facts_of
from hfship.site.hosts import HostFacts

CLOCK_SLACK_S = 5.0  # apart by more, logs of hosts cannot be laid side by side, and keys end oddly


@dataclass(frozen=True)
class Inventory:
    """What each host said, by name; of one that did not, the error."""

    facts: Mapping[str, HostFacts]
    failures: Mapping[str, HfshipError]

    def text(self) -> str:
        """A table of the hosts, below it what is wrong."""
        header = ["host", "GPUs", "free", "docker", "models", "deployments", ""]
        facts = list(self.facts.values())
        rows = [_row(one) for one in facts]
        lines = [table(rows, header)]
        lines += failure_lines(self.failures)
        for name, what in misfits(facts):
            lines.append(f"{name}: {what}")
        for one in facts:
            if one.next_step:
                lines.append(f"next  {one.name}: {one.next_step}")
        return "\n".join(lines)

    def json(self) -> List[Dict[str, Any]]:
        """docs/json.md, "hosts"."""
        return [self._json_row(one) for one in self.facts.values()]

    def _json_row(self, facts: HostFacts) -> Dict[str, Any]:
        offer = facts.offer
        return {
            "schema": "hfship-host/1",
            "host": facts.name,
            "problem": facts.problem,
            "next": facts.next_step,
            "gpus": [
                {"uuid": gpu.uuid, "name": gpu.name, "bytes": gpu.total} for gpu in offer.gpus
            ],
            "images": [image.reference for image in offer.images],
            "free": facts.free,
            "docker": facts.docker,
            "models": sorted(facts.models),
            "deployments": [
                {
                    "name": plan.name,
                    "running": plan.name in facts.running,
                    "healthy": plan.name in facts.healthy,
                    "gpus": list(plan.gpus),
                    "url": plan.url,
                }
                for plan in facts.plans
            ],
            "clock_offset_s": round(facts.clock_offset_s, 1),
            "drained": facts.drained,
        }

    @property
    def exit_code(self) -> Exit:
        """0 where all answered; else the gravest of those that did not."""
        codes = [one.code for one in self.failures.values()]
        return max(codes, default=Exit.OK)


def failure_lines(failures: Mapping[str, HfshipError]) -> List[str]:
    """What is wrong with hosts that did not answer, a line each, with the name of the host."""
    lines = []
    for name, error in failures.items():
        text = error.what
        if error.why:
            text += f": {error.why}"
        if not text.startswith((f"{name}:", f"{name} ")):  # of host d, "docker ..." is not told
            text = f"{name}: {text}"
        line = text.replace("\n", "; ")
        lines.append(line)
    return lines


def _row(facts: HostFacts) -> List[str]:
    if facts.silent:
        return [facts.name, "?", "", "", "", "", "does not answer"]
    healthy = len([plan for plan in facts.plans if plan.name in facts.healthy])
    deployments = ""
    if facts.plans:
        deployments = f"{healthy} of {len(facts.plans)} healthy"
    return [
        facts.name,
        gpus_text(facts),
        human_bytes(facts.free),
        facts.docker or "no",
        str(len(facts.models)),
        deployments,
        "drained" if facts.drained else "",
    ]


def gpus_text(facts: HostFacts) -> str:
    """Its GPUs in a few words: 8x H200."""
    names = Counter(gpu.name.replace("NVIDIA ", "") for gpu in facts.offer.gpus)
    words = [f"{count}x {name}" for name, count in names.items()]
    return ", ".join(words) or "none"


def take_inventory(hosts: Sequence[FarHost], limit_s: float = LOOK_S) -> Inventory:
    """Ask all hosts."""
    answers = at_once(hosts, _facts, limit_s)
    facts: Dict[str, HostFacts] = {}
    failures: Dict[str, HfshipError] = {}
    for name, answer in answers.items():
        if isinstance(answer, HfshipError):
            failures[name] = answer
            facts[name] = HostFacts(name, problem=answer.what)
        else:
            facts[name] = answer
    return Inventory(facts, failures)


def _facts(host: FarHost) -> HostFacts:
    before = time.time()
    value = host.asked("doctor", "--facts")
    if not isinstance(value, dict):
        what = f"{host.name} tells no facts"
        raise IntegrityError(what, str(value)[:200], "")
    now = time.time()
    facts = facts_of(host.name, value, now)
    # What it takes until it answers is not the clock's fault: it is right anywhere in between.
    took = time.time() - before
    offset = facts.clock_offset_s
    if -took <= offset <= 0:
        offset = 0.0
    return replace(facts, clock_offset_s=offset)


def misfits(facts: Sequence[HostFacts]) -> List[Tuple[str, str]]:
    """(host, what of it does not fit the others): docker that is missing or another one, clocks
    that are apart, kinds of processors."""
    found: List[Tuple[str, str]] = []
    there = [one for one in facts if not one.silent]
    for one in there:
        if one.problem:
            found.append((one.name, one.problem))
        if abs(one.clock_offset_s) > CLOCK_SLACK_S:
            ahead = "ahead of" if one.clock_offset_s > 0 else "behind"
            seconds = human_seconds(abs(one.clock_offset_s))
            found.append((one.name, f"its clock is {seconds} {ahead} ours: set up NTP"))
    for field, noun in (("docker", "docker"), ("architecture", "processor")):
        found += _odd_ones(there, field, noun)
    return found


def _odd_ones(facts: Sequence[HostFacts], field: str, noun: str) -> List[Tuple[str, str]]:
    values: Dict[str, str] = {}
    for one in facts:
        value: str = getattr(one, field)
        if not value:
            continue
        if field == "docker":  # what differs behind the first number changes nothing for us
            value, _, _ = value.partition(".")
        values[one.name] = value
    if not values:
        return []
    counts = Counter(values.values())
    ((usual, _),) = counts.most_common(1)
    found = []
    for name, value in values.items():
        if value != usual:
            found.append((name, f"has {noun} {value}, most have {usual}"))
    return found


def summary_of(answers: Mapping[str, Any]) -> str:
    """How a command went on all hosts.

    >>> summary_of({"a": 1, "b": HfshipError("no")})
    '2 hosts, 1 ok, 1 failed'
    """
    failed = sum(isinstance(one, HfshipError) for one in answers.values())
    return f"{counted(len(answers), 'host')}, {len(answers) - failed} ok, {failed} failed"
