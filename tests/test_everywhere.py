# SPDX-License-Identifier: Apache-2.0
"""From a placement to what is to be done on which host."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.values import replace
from hfship.serve.files import parse_plan, plan_text
from hfship.serve.terms import Host, Image, Plan
from hfship.site.everywhere import Step, Work, at_home, reached, with_pool, work_of
from hfship.site.hosts import HostFacts, Interface, SiteHost
from hfship.site.spread import Placed, Placement
from hfship.site.terms import GatewayModel, Replica

HOSTS = {name: SiteHost(name, address=f"{name}.site", data=f"/data/{name}") for name in "ab"}
PLAN = Plan(name="m", image="vllm:1", port=8000, bind="127.0.0.1", network="hfship")


def facts(name: str, *running: Plan, **fields: Any) -> HostFacts:
    """A host that runs these."""
    names = frozenset(plan.name for plan in running)
    return HostFacts(name, **{"plans": running, "running": names, **fields})


# -- a plan at home

LAN = Interface("eth0", "10.0.0.5")
AT_HOME: List[Tuple[Plan, Tuple[Interface, ...], str, str]] = [
    (PLAN, (LAN,), "10.0.0.5", ""),
    (PLAN, (), "a.site", ""),
    (replace(PLAN, nodes=("10.0.0.8", "10.0.0.5")), (LAN,), "10.0.0.8", "hfship"),
]


@pytest.mark.parametrize(("plan", "interfaces", "bind", "network"), AT_HOME)
def test_a_plan_is_told_where_its_host_has_models_and_is_reached(
    plan: Plan, interfaces: Tuple[Interface, ...], bind: str, network: str
) -> None:
    home = at_home(plan, HOSTS["a"], facts("a", interfaces=interfaces), "m-folder")
    folder = "/data/a/models/huggingface/m-folder"
    assert home == replace(plan, model_dir=folder, bind=bind, network=network)


@pytest.mark.parametrize(
    ("bind", "address"), [("10.0.0.5", "10.0.0.5:8000"), ("2001:db8::1", "[2001:db8::1]:8000")]
)
def test_a_step_answers_on_its_first_host(bind: str, address: str) -> None:
    step = Step("m", {"b": replace(PLAN, bind=bind), "a": PLAN})
    assert (step.head, step.address) == ("b", address)


# -- what is to be done


def running(host: str, **fields: Any) -> Plan:
    """The plan of m as a host tells that it runs, some fields of it otherwise."""
    home = at_home(PLAN, HOSTS[host], facts(host), "m-folder")
    return replace(parse_plan(plan_text(home), host), **fields)


# what runs on a and b -> what is done about a copy that spans both
STATES: Dict[str, Tuple[Dict[str, List[Plan]], str]] = {
    "nothing runs": ({}, "begin"),
    "another one runs": ({"a": [replace(PLAN, name="n")]}, "begin"),
    "one half runs": ({"a": [running("a")]}, "begin"),
    "the other half runs otherwise": ({"b": [running("b", port=9)]}, "begin"),
    "all run": ({"a": [running("a")], "b": [running("b")]}, "keep"),
    "with rights that the host adds": (
        {"a": [running("a", cap_add=("IPC_LOCK",))], "b": [running("b")]},
        "keep",
    ),
    "one half runs otherwise": ({"a": [running("a")], "b": [running("b", port=9)]}, "change"),
    "all run otherwise": (
        {"a": [running("a", port=9)], "b": [running("b", image="vllm:2")]},
        "change",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_what_is_done_follows_from_what_runs(case: str) -> None:
    there, verb = STATES[case]
    hosts = {name: facts(name, *there.get(name, ())) for name in HOSTS}
    placement = Placement({"m": Placed(("b", "a"), (PLAN, PLAN))}, {}, surplus=(("a", "old"),))
    work = work_of(placement, HOSTS, hosts, {"m": "m-folder"})
    plans = {host: at_home(PLAN, HOSTS[host], hosts[host], "m-folder") for host in ("b", "a")}
    [step] = work.steps
    assert (step, step.head) == (Step("m", plans), "b")
    assert work == Work(**{verb: (step,)}, end=(("a", "old"),))


def test_a_value_that_was_asked_for_is_no_change() -> None:
    """It may be secret, so that plan.json does not have it."""
    plan = replace(PLAN, env={"HF_TOKEN": "secret", "A": "b"})
    there = at_home(plan, HOSTS["a"], facts("a"), "m")
    told = parse_plan(plan_text(there), "a")
    placement = Placement({"m": Placed(("a",), (plan,))}, {})
    work = work_of(placement, HOSTS, {"a": facts("a", told)}, {"m": "m"})
    assert [step.name for step in work.keep] == ["m"]


def test_work_in_a_line() -> None:
    steps = [Step(name, {"a": PLAN}) for name in ("m", "m.2", "n", "o")]
    all_of_it = Work((steps[0], steps[1]), (steps[2],), (steps[3],), (("a", "old"), ("b", "older")))
    said = "start m, m.2; change n; keep o; end old on a, older on b"
    assert (all_of_it.text(), Work().text()) == (said, "nothing to do")
    assert all_of_it.steps == tuple(steps)


# -- the gateway, and images


def test_a_gateway_gets_the_copies_whose_addresses_are_known() -> None:
    models = (
        GatewayModel("m", ("m",), (Replica("m", "x:1"), Replica("m.2", "x:2", True))),
        GatewayModel("n", ("n",), (Replica("n", "x:3"),)),
        GatewayModel("o", ("o",), (Replica("o", "x:4"), Replica("o.2", "x:5"))),
    )
    addresses = {"m": "a:1", "m.2": "b:1", "o.2": "b:2"}
    assert reached(models, addresses) == (
        replace(models[0], replicas=(Replica("m", "a:1"), Replica("m.2", "b:1", True))),
        replace(models[2], replicas=(Replica("o.2", "b:2"),)),
    )


def test_what_one_host_has_as_image_all_can_have() -> None:
    """Of an image that several have, each has its own."""
    one, other = Image("vllm:1", "sha256:1"), Image("vllm:1", "sha256:other")
    more = Image("vllm:2", "sha256:2")
    found = with_pool(
        {
            "a": facts("a", offer=Host(images=(one,), memory=7)),
            "b": facts("b", offer=Host(images=(other, more))),
            "c": facts("c", PLAN),
        }
    )
    images = {name: set(host.offer.images) for name, host in found.items()}
    assert images == {"a": {one, more}, "b": {other, more}, "c": {one, more}}
    assert found["a"].offer.memory == 7 and found["c"].plans == (PLAN,)
