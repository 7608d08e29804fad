# SPDX-License-Identifier: Apache-2.0
"""From a placement to what is to be done on which host, in which order. Pure.

What is new starts first, on all hosts at once; what changes is let go of by the gateway, and starts
anew one copy of a model after the other; what runs beside its place is drained and stopped last. So
a model that answered answers all the time.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Tuple

from hfship.base.values import dataclass, replace
from hfship.serve.changes import changes
from hfship.serve.files import parse_plan, plan_text
from hfship.serve.terms import Image, Plan
from hfship.site.hosts import HostFacts, SiteHost, member_of
from hfship.site.spread import Placement
from hfship.site.terms import GatewayModel


@dataclass(frozen=True)
class Step:
    """One deployment on its hosts, each with the plan for it, the one that answers first."""

    name: str
    plans: Mapping[str, Plan]

    @property
    def head(self) -> str:
        """The host that answers."""
        return next(iter(self.plans))

    @property
    def address(self) -> str:
        """HOST:PORT where it answers."""
        plan = self.plans[self.head]
        host = f"[{plan.bind}]" if ":" in plan.bind else plan.bind
        return f"{host}:{plan.port}"


@dataclass(frozen=True)
class Work:
    """What is to be done: `begin` what does not run yet, `change` what runs otherwise, `keep` what
    runs as it should, `end` (host, deployment) what has no place there any more."""

    begin: Tuple[Step, ...] = ()
    change: Tuple[Step, ...] = ()
    keep: Tuple[Step, ...] = ()
    end: Tuple[Tuple[str, str], ...] = ()

    @property
    def steps(self) -> Tuple[Step, ...]:
        """All that will run."""
        return (*self.begin, *self.change, *self.keep)

    def text(self) -> str:
        """What is done, in a line."""
        parts = []
        for verb, steps in (
            ("start", self.begin),
            ("change", self.change),
            ("keep", self.keep),
        ):
            names = ", ".join(step.name for step in steps)
            if names:
                parts.append(f"{verb} {names}")
        ends = []
        for host, name in self.end:
            ends.append(f"{name} on {host}")
        if ends:
            parts.append("end " + ", ".join(ends))
        return "; ".join(parts) or "nothing to do"


def at_home(plan: Plan, host: SiteHost, facts: HostFacts, model: str) -> Plan:
    """A plan as the host has to have it: its own folder of models, and the address at which others
    reach it. Of a group that is the address of its head."""
    folder = f"{host.folders['site_models_dir']}/{model}"
    if plan.nodes:
        return replace(plan, model_dir=folder, bind=plan.nodes[0])
    address, _, _ = member_of(host, facts)
    return replace(
        plan,
        model_dir=folder,
        bind=address,
        network="",
    )


def work_of(
    placement: Placement,
    hosts: Mapping[str, SiteHost],
    facts: Mapping[str, HostFacts],
    folders: Mapping[str, str],
) -> Work:
    """What is to be done. `folders` are the names of the model folders, by deployment."""
    begin: List[Step] = []
    change: List[Step] = []
    keep: List[Step] = []
    for name, placed in placement.placed.items():
        plans: Dict[str, Plan] = {}
        for host, plan in zip(placed.hosts, placed.plans):
            plans[host] = at_home(
                plan,
                hosts[host],
                facts[host],
                folders[name],
            )
        step = Step(name, plans)
        states = [_state(facts[host], plan) for host, plan in plans.items()]
        if "new" in states:
            begin.append(step)
        elif "other" in states:
            change.append(step)
        else:
            keep.append(step)
    return Work(
        begin=tuple(begin),
        change=tuple(change),
        keep=tuple(keep),
        end=placement.surplus,
    )


def _state(facts: HostFacts, plan: Plan) -> str:
    """Whether a deployment is new to a host, runs by another plan, or as it should."""
    running = {one.name: one for one in facts.running_plans}
    before = running.get(plan.name)
    if before is None:
        return "new"
    # As plan.json tells it: without the values of variables that were asked for, which may be
    # secret, and with the rights that the host itself adds.
    told = parse_plan(plan_text(plan), plan.name)
    if changes(before, replace(told, cap_add=before.cap_add)):
        return "other"
    return "same"


def reached(
    models: Sequence[GatewayModel], addresses: Mapping[str, str]
) -> Tuple[GatewayModel, ...]:
    """The models of a gateway with the addresses of their copies on other hosts; those without one
    are left out."""
    found = []
    for model in models:
        replicas = [
            replace(one, address=addresses[one.name])
            for one in model.replicas
            if one.name in addresses
        ]
        if replicas:
            found.append(replace(model, replicas=tuple(replicas)))
    return tuple(found)


def with_pool(facts: Mapping[str, HostFacts]) -> Dict[str, HostFacts]:
    """The facts with the images of all hosts on each: what one has can be brought to the others."""
    pool: Dict[str, Image] = {}
    for one in facts.values():
        for image in one.offer.images:
            pool.setdefault(image.reference, image)
    found = {}
    for name, one in facts.items():
        own = {image.reference: image for image in one.offer.images}
        images = tuple({**pool, **own}.values())
        found[name] = replace(one, offer=replace(one.offer, images=images))
    return found
