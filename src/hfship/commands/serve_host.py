# SPDX-License-Identifier: Apache-2.0
"""`hfship serve` of several models: planned together for this host, before the first one starts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, AbstractSet, Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import HfshipError
from hfship.base.report import Reporter
from hfship.base.values import replace
from hfship.commands.names import readable_deployments
from hfship.commands.serve_model import read_request
from hfship.serve.cards import assumed_gpus
from hfship.serve.docker import running_among
from hfship.serve.survey import Purpose, decide, ports_in_use, read_machine
from hfship.site.hosts import HostFacts, SiteHost
from hfship.site.placement import place_of
from hfship.site.spread import Placement, Wish, place

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.serve.survey import Request
    from hfship.serve.terms import Host, Plan


def planned_together(runs: Mapping[str, Context]) -> Dict[str, Context]:
    """The runs of `serve`, each with the plans of all; as they are where nothing can be planned."""
    words = [(run, word) for run in runs.values() for word in run.args.names]
    together = together_of(words)
    if together is None:
        return dict(runs)
    first = next(iter(runs.values()))
    tell(first, together)
    return {name: replace(run, together=together) for name, run in runs.items()}


def pairs_together(pairs: Sequence[Tuple[Context, str]]) -> List[Tuple[Context, str]]:
    """The models of one command line, each with the plans of all."""
    together = together_of(pairs)
    if together is None:
        return list(pairs)
    context, _ = pairs[0]
    tell(context, together)
    return [(replace(run, together=together), word) for run, word in pairs]


def tell(context: Context, together: Placement) -> None:
    """Show the table: it is a result of --plan, news before a start."""
    text = together.text()
    if context.args.plan and not context.args.json:
        context.reporter.result(text)
    else:
        context.reporter.info(text)


def together_of(words: Sequence[Tuple[Context, str]]) -> Optional[Placement]:
    """The plans of all models that are here; None where there is no GPU to plan for, or only one
    model. What is wrong with a model is told when its turn comes."""
    requests: List[Request] = []
    for context, word in words:
        request = _request(context, word)
        if request:
            requests.append(request)
    if len(requests) < 2:
        return None

    context, _ = words[0]
    quiet = Reporter("none", -1)
    try:
        machine = read_machine("", Purpose.SHOW, quiet)
        host, before, running = _surveyed(context, machine.host, machine.docker_answers)
    except HfshipError:
        return None

    def in_use(request: Request, own_port: Optional[int]) -> AbstractSet[int]:
        return ports_in_use(request.options, own_port)

    def plan_of(request: Request, left: Host, previous: Optional[Plan]) -> Plan:
        return decide(request, left, previous, quiet)

    here = SiteHost("", local=True)
    facts = HostFacts("", offer=host, plans=tuple(before.values()), running=frozenset(running))
    wishes = [wish_of(context, request) for request in requests]
    together = place(wishes, [here], {"": facts}, plan_of, in_use)
    if not together.plans:
        return None
    return together


def wish_of(context: Context, request: Request) -> Wish:
    """A request as one copy of the model that the models file has."""
    found = place_of(context.file, request.name)
    return Wish(request, found.first if found else request.name)


def _request(context: Context, word: str) -> Optional[Request]:
    """What is to be served, read without a word and without unpacking anything."""
    args = argparse.Namespace(**{**vars(context.args), "plan": True})
    quiet = replace(context, args=args, reporter=Reporter("none", -1))
    try:
        request = read_request(quiet, word)
    except HfshipError:
        return None
    return request


def _surveyed(
    context: Context, host: Host, docker_answers: bool
) -> Tuple[Host, Dict[str, Plan], AbstractSet[str]]:
    """(the host, the plans of its deployments, the names of those that run)."""
    if context.args.assume_gpus:
        return replace(host, gpus=assumed_gpus(context.args.assume_gpus)), {}, frozenset()

    before = {}
    for deployment in readable_deployments(context):
        before[deployment.plan.name] = deployment.plan
    running: AbstractSet[str] = frozenset()
    if docker_answers:
        running = running_among(before)
    return host, before, running
