"""Placement over hosts: nothing is given away twice, nothing moves without need, refusals count."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import pytest

from hfship.serve.cards import assumed_gpus
from hfship.serve.plan import make_plan
from hfship.serve.proof import TrustedFolder
from hfship.serve.survey import Purpose, Request
from hfship.serve.terms import Host, Plan, ServeOptions
from hfship.site.hosts import HostFacts, Interface, Placing, SiteHost
from hfship.site.spread import Placement, Wish, _Seat, place
from test_facts import facts_of
from test_plan import IMAGE
from test_serve import Site, site  # noqa: F401

FACTS = {"small": facts_of("Qwen3-8B"), "large": facts_of("Llama-3.1-70B")}
Facts = Dict[str, HostFacts]
ANYWHERE = Placing()


def decide(asked: Request, host: Host, previous: Optional[Plan]) -> Plan:
    """As serve.survey.decide, without docker."""
    plan = make_plan(asked.name, "/m", asked.facts, host, IMAGE, asked.options, previous)
    if asked.network:
        return replace(plan, network=asked.network, port=0)
    return plan


def wish(
    name: str,
    kind: str = "small",
    standby: bool = False,
    placing: Placing = ANYWHERE,
    network: Optional[str] = None,
    **options: Any,
) -> Wish:
    """A copy; "m.2" is one of m."""
    model = name.partition(".")[0]
    wanted = ServeOptions(**{"device": "gpu", **options})
    folder = TrustedFolder(Path("/m") / model)
    request = Request(name, folder, FACTS[kind], wanted, Purpose.SHOW, network=network)
    return Wish(request, model, placing, standby)


def host_of(name: str, spec: str = "8x80GB", **said: Any) -> HostFacts:
    gpus = [replace(gpu, uuid=f"GPU-{name}-{gpu.index}") for gpu in assumed_gpus(spec)]
    return HostFacts(name, offer=Host(tuple(gpus)), **said)


def site_of(count: int, spec: str = "8x80GB") -> Facts:
    return {f"h{number}": host_of(f"h{number}", spec) for number in range(count)}


def spread(
    wishes: Sequence[Wish], facts: Mapping[str, HostFacts], hosts: Sequence[SiteHost] = ()
) -> Placement:
    return place(wishes, hosts or [SiteHost(name) for name in facts], facts, decide)


def after(found: Placement, facts: Mapping[str, HostFacts]) -> Facts:
    """The facts once all runs as it was placed, with the memory in use that nvidia-smi shows."""
    then = {}
    for name, host in facts.items():
        plans = tuple(plan for _, plan in found.on_host(name))
        running = frozenset(plan.name for plan in plans)
        gpus = []
        for gpu in host.offer.gpus:
            share = sum(plan.gpu_memory_utilization for plan in plans if gpu.uuid in plan.gpus)
            gpus.append(replace(gpu, used=int(gpu.total * share)))
        offer = replace(host.offer, gpus=tuple(gpus))
        then[name] = replace(host, offer=offer, plans=plans, running=running)
    return then


def at(found: Placement) -> Dict[str, Any]:
    """Where each copy is."""
    return {
        name: (one.hosts, tuple(plan.gpus for plan in one.plans))
        for name, one in found.placed.items()
    }


def require_apart(found: Placement, facts: Mapping[str, HostFacts]) -> None:
    """No GPU and no port twice."""
    for host in facts:
        shares: Dict[str, float] = Counter()
        ports: List[int] = []
        for _, plan in found.on_host(host):
            ports.append(plan.port)
            for gpu in plan.gpus:
                assert gpu.startswith(f"GPU-{host}-")
                shares[gpu] += plan.gpu_memory_utilization
        assert all(share <= 1.0 for share in shares.values()), shares
        assert len(set(ports)) == len(ports)


def some_site(seed: int) -> Any:
    """(wishes, facts, hosts) of a site that nobody would build."""
    draw = random.Random(seed)
    facts, hosts = {}, []
    for number in range(draw.randint(1, 6)):
        spec = draw.choice(["8x80GB", "4x80GB", "2x141GB", "1x24GB", "4x80GB,2x24GB"])
        name = f"h{number}"
        facts[name] = host_of(name, spec)
        labels = {"zone": draw.choice("ab")}
        hosts.append(SiteHost(name, labels=labels, drain=draw.random() < 0.1))
    wishes = []
    for number in range(draw.randint(1, 5)):
        kind = draw.choice(["small", "small", "large"])
        options: Dict[str, Any] = {}
        if kind == "small" and draw.random() < 0.4:
            options["gpu_memory_utilization"] = 0.45
        placing = Placing()
        if draw.random() < 0.3:
            placing = Placing(host_labels={"zone": draw.choice("ab")})
        elif draw.random() < 0.2:
            placing = Placing(hosts=(draw.choice(hosts).name,))
        for copy in range(draw.randint(1, 3)):
            name = f"m{number}.{copy}"
            wishes.append(wish(name, kind, copy == 2, placing, **options))
    return wishes, facts, hosts


@pytest.mark.parametrize("seed", range(12))
def test_any_site_is_shared_out_once_and_for_all(seed: int) -> None:
    wishes, facts, hosts = some_site(seed)
    found = spread(wishes, facts, hosts)
    names = {one.request.name for one in wishes}
    assert set(found.placed) | set(found.refused) == names
    assert not set(found.placed) & set(found.refused)
    require_apart(found, facts)
    by_name = {host.name: host for host in hosts}
    for one in wishes:
        for host in (
            found.placed[one.request.name].hosts if one.request.name in found.placed else ()
        ):
            assert not one.placing.refuses(by_name[host]) and not by_name[host].drain

    then = after(found, facts)
    again = spread(wishes, then, hosts)
    assert at(again) == at(found) and not again.surplus
    assert not any(one.moves for one in again.placed.values())
    assert [error.text() for error in again.refused.values()] == [
        error.text() for error in again.refused.values()
    ]

    gone = random.Random(seed).choice(hosts).name
    lost = {**then, gone: HostFacts(gone, "no route to host")}
    moved = spread(wishes, lost, hosts)
    require_apart(moved, lost)
    for name, one in found.placed.items():
        if gone not in one.hosts:
            assert at(moved)[name] == at(found)[name], "what is elsewhere stays"


def test_copies_and_standbys_are_on_hosts_of_their_own() -> None:
    wishes = [wish("a"), wish("a.2"), wish("a.3", standby=True), wish("b"), wish("b.2")]
    found = spread(wishes, site_of(3))
    assert len({found.placed[name].hosts for name in ("a", "a.2", "a.3")}) == 3
    assert found.placed["a.3"].standby and not found.warnings
    crowded = spread(wishes, site_of(1))
    assert "a, a.2, a.3 are all on h0: when it fails, all of them do" in crowded.warnings


def test_first_copies_come_before_second_ones_and_standbys_last() -> None:
    facts = {"h0": host_of("h0", "2x80GB")}
    wishes = [wish("a"), wish("a.2", standby=True), wish("b"), wish("b.2")]
    found = spread(wishes, facts)
    assert list(found.placed) == ["a", "b"] and list(found.refused) == ["a.2", "b.2"]


def test_what_may_run_in_few_places_goes_first() -> None:
    facts = site_of(2, "1x80GB")
    pinned = wish("pinned", placing=Placing(hosts=("h0",)))
    found = spread([wish("a"), pinned], facts)
    assert found.placed["pinned"].hosts == ("h0",) and found.placed["a"].hosts == ("h1",)


def test_whole_hosts_stay_free_for_large_models() -> None:
    facts = {**site_of(2), "little": host_of("little", "1x80GB")}
    found = spread([wish("a")], facts)
    assert found.placed["a"].hosts == ("little",)


def test_a_host_with_the_files_is_preferred() -> None:
    facts = {**site_of(2), "h1": host_of("h1", models={"a": "sum"})}
    assert spread([wish("a")], facts).placed["a"].hosts == ("h1",)


def test_a_refusal_has_the_arithmetic_of_each_host() -> None:
    facts = {
        **{f"h{number}": host_of(f"h{number}", "1x24GB") for number in range(4)},
        "off": HostFacts("off", "off does not answer"),
        "other": host_of("other"),
    }
    hosts = [*(SiteHost(name) for name in facts if name != "other"), SiteHost("other", drain=True)]
    error = spread([wish("big", "large", placing=Placing(nodes=1))], facts, hosts).refused["big"]
    assert error.what == "no host has a place for big"
    assert "off: does not answer\n" in error.why
    assert "other: is drained" in error.why
    assert "h0, h1 and 2 more: cannot serve big on 1 GPU of 24.0 GB" in error.why
    assert "of weights" in error.why and "leave too little" in error.why


def test_a_drained_host_is_left_and_holds_its_gpus_until_then() -> None:
    facts = site_of(2, "1x80GB")
    before = spread([wish("a")], facts)
    (home,) = before.placed["a"].hosts
    hosts = [SiteHost(name, drain=name == home) for name in facts]
    found = spread([wish("a"), wish("b")], after(before, facts), hosts)
    assert found.placed["a"].moves and found.placed["a"].before == (home,)
    assert found.surplus == ((home, "a"),) and list(found.refused) == ["b"]


def test_what_runs_twice_keeps_the_copy_that_answers() -> None:
    facts = site_of(2, "1x80GB")
    plan = spread([wish("a")], facts).placed["a"].plans[0]
    for host in facts:
        own = replace(plan, gpus=(f"GPU-{host}-0",))
        facts[host] = replace(facts[host], plans=(own,), running=frozenset("a"))
    facts["h1"] = replace(facts["h1"], healthy=frozenset("a"))
    found = spread([wish("a"), wish("b")], facts)
    assert found.placed["a"].hosts == ("h1",) and found.surplus == (("h0", "a"),)
    assert list(found.refused) == ["b"], "h0 is free once a has stopped there"


def test_a_running_copy_does_not_grow_because_others_left() -> None:
    """With three GPUs free it became a pipeline; it is not made anew when there are four."""
    facts = {"h0": host_of("h0", "4x80GB")}
    first = spread([wish("x", gpus=("0",)), wish("a", "large")], facts)
    assert (
        len(first.plans["a"].gpus) == 3
        and len(spread([wish("a", "large")], facts).plans["a"].gpus) == 4
    )
    then = after(first, facts)
    alone = replace(then["h0"], plans=tuple(p for p in then["h0"].plans if p.name == "a"))
    alone = replace(alone, running=frozenset("a"))
    again = spread([wish("a", "large")], {"h0": alone})
    assert at(again)["a"] == at(first)["a"]


def test_copies_with_contexts_that_differ_are_named() -> None:
    facts = {"h0": host_of("h0", "1x80GB"), "h1": host_of("h1", "1x24GB")}
    found = spread([wish("a"), wish("a.2")], facts)
    assert len(found.placed) == 2
    assert any("copies of a hold contexts that differ" in text for text in found.warnings)


def test_a_site_can_be_planned_before_it_is_bought(site: Site, model: Path) -> None:  # noqa: F811
    hosts = '[[host]]\nname = "gpu1"\n[[host]]\nname = "gpu2"\ndrain = true\n'
    file = site.hfship.home / "models.toml"
    file.write_text(f'[gateway]\n{hosts}[[model]]\nname = "m"\nreplicas = 3\n')
    done = site("serve", "--models", file, "--plan", "--assume-gpus", "2xH100", code=9)
    assert done.stdout.splitlines()[0].split()[:3] == ["model", "host", "GPUs"]
    assert "m, m.2 are all on gpu1" in done.stdout and "no host has a place for m.3" in done.stdout
    assert "gpu1: no GPU is free" in done.stdout and "gpu2: is drained" in done.stdout


# -- models larger than a host


def node(name: str, spec: str = "8x80GB", infiniband: Sequence[str] = ()) -> HostFacts:
    number = int(name[1:]) + 1
    there = (Interface("eth0", f"10.0.0.{number}"), Interface("ib0", f"10.1.0.{number}", 400_000))
    return replace(host_of(name, spec), interfaces=there, infiniband=tuple(infiniband))


def test_a_model_larger_than_a_host_spans_hosts_that_are_alike() -> None:
    facts = {name: node(name, "1x80GB") for name in ("h0", "h1", "h2", "h3")}
    facts["h0"] = host_of("h0", "1x24GB")
    found = spread([wish("big", "large", network="hfship")], facts)
    big = found.placed["big"]
    assert big.hosts == ("h1", "h2", "h3")
    assert [plan.gpus for plan in big.plans] == [(f"GPU-{host}-0",) for host in big.hosts]
    head = big.plans[0]
    assert (head.tensor_parallel_size, head.pipeline_parallel_size) == (1, 3)
    assert head.nodes == ("10.1.0.2", "10.1.0.3", "10.1.0.4"), "by the fastest network"
    assert [plan.node_rank for plan in big.plans] == [0, 1, 2]
    assert head.bind == "10.1.0.2" and head.port and not head.network
    require_apart(found, facts)

    then = after(found, facts)
    again = spread([wish("big", "large", network="hfship"), wish("a")], then)
    assert at(again)["big"] == at(found)["big"] and again.placed["a"].hosts == ("h0",)


def test_as_many_hosts_as_are_asked_for() -> None:
    facts = {name: node(name) for name in ("h0", "h1", "h2")}
    two = Placing(nodes=2)
    found = spread([wish("big", "large", placing=two), wish("a", "large", placing=two)], facts)
    assert found.placed["big"].hosts == ("h0", "h1")
    plan = found.placed["big"].plans[1]
    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size, plan.node_rank) == (8, 2, 1)
    assert any("big: close ports 29501" in note and "10.1.0.1" in note for note in found.notes())
    error = found.refused["a"]
    assert "2 idle hosts of one kind are wanted, there are 1" in error.why


def test_a_model_on_the_cpu_keeps_no_host_from_a_group() -> None:
    facts = {name: node(name, "2x80GB") for name in ("h0", "h1")}
    for name, one in facts.items():
        facts[name] = replace(one, offer=replace(one.offer, memory=64 << 30))
    group = wish("big", "large", placing=Placing(nodes=2))
    found = spread([wish("small", max_model_len=512, device="cpu"), group], facts)
    assert set(found.placed) == {"small", "big"} and found.placed["big"].hosts == ("h0", "h1")
    again = spread([wish("small", max_model_len=512, device="cpu"), group], after(found, facts))
    assert at(again) == at(found)


def test_a_group_moves_as_one_when_a_member_is_gone() -> None:
    facts = {name: node(name, "2x80GB") for name in ("h0", "h1", "h2", "h3")}
    two = [wish("big", "large", placing=Placing(nodes=2))]
    found = spread(two, facts)
    then: Facts = {**after(found, facts), "h1": HostFacts("h1", "no route to host")}
    moved = spread(two, then)
    assert moved.placed["big"].hosts == ("h2", "h3")
    assert moved.surplus == (("h0", "big"),), "what is left of the group is to stop"


def test_a_group_of_which_a_member_died_keeps_its_hosts() -> None:
    facts = {name: node(name, "2x80GB") for name in ("h0", "h1", "h2", "h3")}
    two = [wish("big", "large", placing=Placing(nodes=2))]
    found = spread(two, facts)
    then = after(found, facts)
    for died in (["h1"], ["h0"], ["h0", "h1"]):
        left = dict(then)
        for name in died:
            left[name] = replace(facts[name], plans=then[name].plans)
        assert at(spread(two, left)) == at(found) and not spread(two, left).surplus


def test_a_model_for_which_no_number_of_hosts_is_enough_says_so_once() -> None:
    facts = site_of(4, "8x24GB")
    error = spread(
        [wish("big", "large", max_model_len=131072, wanted_concurrency=500)], facts
    ).refused["big"]
    assert error.why.count("cannot serve big on 8 GPUs") == 1, error.why
    assert "h0, h1 and 2 more: cannot serve big on 32 GPUs" in error.why


def test_the_table_of_hosts() -> None:
    facts = {"gpu1": host_of("gpu1"), "gpu2": host_of("gpu2", "2x80GB")}
    hosts = [SiteHost(name) for name in facts]
    wishes = [wish("a", "large"), wish("b"), wish("b.2", standby=True)]
    text = spread(wishes, facts, hosts).text()
    table, usage = text.split("\n\n")
    assert table.splitlines()[0].split() == [
        "model",
        "host",
        "GPUs",
        "share",
        "context",
        "port",
        "state",
        "image",
    ]
    assert table.splitlines()[1].split()[:3] == ["a", "gpu1", "0-3"]
    assert "b.2 (standby)" in table
    assert usage.splitlines()[1].startswith("gpu1  8 x assumed 80.0 GB     3  a on 0-3, b.2 on 4")
    assert all(len(line) <= 80 for line in usage.splitlines())


def test_notes_have_warnings_and_the_arithmetic_of_refusals() -> None:
    facts = {"h0": host_of("h0", "1x80GB")}
    found = spread(
        [
            wish("a", gpu_memory_utilization=0.45),
            wish("a.2", gpu_memory_utilization=0.45),
            wish("b"),
        ],
        facts,
    )
    notes = found.notes()
    assert notes[0].startswith("a, a.2 are all on h0") and "no host has a place for b:" in notes
    assert notes[-1].startswith("  ") and "is in use" in "\n".join(notes)


def test_a_copy_sees_its_own_gpus_as_free_and_all_others_as_they_are() -> None:
    facts = host_of("h", "3x80GB")
    gpus = [replace(gpu, used=7) for gpu in facts.offer.gpus]
    plan = decide(wish("small").request, Host(tuple(gpus[:1])), None)
    held = replace(facts, plans=(plan,), running=frozenset({"small"}))
    seat = _Seat(SiteHost("h"), held, 0, {"small"}, {})
    assert [gpu.used for gpu in seat.without_own("small", gpus)] == [0, 7, 7]
    assert seat.without_own("other", gpus) == tuple(gpus)
