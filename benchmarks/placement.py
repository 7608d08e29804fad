"""Placement at size, and archives to many hosts: by each other, or one after the other.

    python3 benchmarks/placement.py [HOSTS] [REPLICAS]

A site of hosts with 8 GPUs of 80 GB: a tenth of the models takes 4 GPUs, the others one; 4 copies
of each. Placed anew, planned again, and after a host left. CPU seconds of one core.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Mapping, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from hfship.ops.relay import Schedule  # noqa: E402
from hfship.serve.cards import assumed_gpus  # noqa: E402
from hfship.serve.plan import make_plan  # noqa: E402
from hfship.serve.proof import TrustedFolder  # noqa: E402
from hfship.serve.survey import Purpose, Request  # noqa: E402
from hfship.serve.terms import Host, Plan, ServeOptions  # noqa: E402
from hfship.site.hosts import HostFacts, SiteHost  # noqa: E402
from hfship.site.spread import Placement, Wish, place  # noqa: E402
from test_facts import facts_of  # noqa: E402
from test_plan import IMAGE  # noqa: E402

COPIES = 4
SMALL, LARGE = facts_of("Qwen3-8B"), facts_of("Llama-3.1-70B")


def decide(asked: Request, host: Host, previous: Optional[Plan]) -> Plan:
    """As serve.survey.decide, without docker."""
    return make_plan(asked.name, "/m", asked.facts, host, IMAGE, asked.options, previous)


def wishes_for(count: int) -> List[Wish]:
    """Copies of models."""
    wishes = []
    for number in range(count):
        model = f"m{number // COPIES}"
        facts = LARGE if (number // COPIES) % 10 == 0 else SMALL
        options = ServeOptions(device="gpu")
        folder = TrustedFolder(Path("/m") / model)
        request = Request(f"{model}.{number % COPIES}", folder, facts, options, Purpose.SHOW)
        wishes.append(Wish(request, model))
    return wishes


def site_of(count: int) -> Dict[str, HostFacts]:
    """Hosts that are idle."""
    facts = {}
    for number in range(count):
        name = f"h{number}"
        gpus = [replace(gpu, uuid=f"{name}-{gpu.index}") for gpu in assumed_gpus("8x80GB")]
        facts[name] = HostFacts(name, offer=Host(tuple(gpus)))
    return facts


def after(found: Placement, facts: Mapping[str, HostFacts]) -> Dict[str, HostFacts]:
    """The facts once all runs as it was placed."""
    then = {}
    for name, host in facts.items():
        plans = tuple(plan for _, plan in found.on_host(name))
        then[name] = replace(host, plans=plans, running=frozenset(plan.name for plan in plans))
    return then


def tell(what: str, found: Placement, began: float) -> None:
    """A line of figures."""
    seconds = time.process_time() - began
    moves = sum(one.moves for one in found.placed.values())
    new = sum(not one.before for one in found.placed.values())
    print(
        f"{what:12} {seconds:6.1f} s  {len(found.placed)} placed, {len(found.refused)} refused,"
        f" {moves} moved, {new} new, {len(found.warnings)} warnings"
    )


def placements(hosts: int, replicas: int) -> None:
    """Placed, planned again, and after a host left."""
    wishes, facts = wishes_for(replicas), site_of(hosts)
    sites = [SiteHost(name) for name in facts]
    began = time.process_time()
    found = place(wishes, sites, facts, decide)
    tell("anew", found, began)

    running = after(found, facts)
    began = time.process_time()
    tell("again", place(wishes, sites, running, decide), began)

    gone = "h7"
    lost = len(list(found.on_host(gone)))
    began = time.process_time()
    left = {**running, gone: HostFacts(gone, "no route to host")}
    tell(f"without {gone}", place(wishes, sites, left, decide), began)
    print(f"             {lost} copies ran there")


def pushes(hosts: int) -> None:
    """Rounds in which every part takes as long as every other."""
    for parts in (1, 16, 64):
        names = [f"h{number}" for number in range(hosts)]
        files = [f"part{number}" for number in range(parts)]
        began = time.process_time()
        rounds = Schedule(files, names, 1).rounds()
        seconds = time.process_time() - began
        alone = hosts * parts
        print(
            f"{hosts} hosts, {parts:2} parts: {rounds:4} rounds by each other, {alone:5} one by one"
            f" ({alone / rounds:.0f}x), scheduled in {seconds:.1f} s"
        )


def main(words: List[str]) -> None:
    """Print the figures."""
    hosts, replicas = [int(word) for word in words or ("200", "1000")]
    placements(hosts, replicas)
    pushes(16)
    pushes(64)


if __name__ == "__main__":
    main(sys.argv[1:])
