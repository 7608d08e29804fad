"""Several models on one host: nothing is promised twice, and shares add up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import pytest

from hfship.base.errors import HostError
from hfship.serve.cards import assumed_gpus
from hfship.serve.plan import make_plan
from hfship.serve.proof import TrustedFolder
from hfship.serve.survey import Purpose, Request
from hfship.serve.terms import Host, Plan, ServeOptions
from hfship.site.hosts import HostFacts, SiteHost
from hfship.site.spread import Placement, Wish, _Seat, pinned, place
from test_facts import facts_of
from test_plan import IMAGE
from test_serve import Site, site  # noqa: F401


def request(name: str, model: str = "Qwen3-8B", **options: Any) -> Request:
    wanted = ServeOptions(device="gpu", **options)
    return Request(name, TrustedFolder(Path("/m")), facts_of(model), wanted, Purpose.SHOW)


def together(
    requests: List[Request],
    spec: Union[str, Host],
    before: Optional[Dict[str, Plan]] = None,
    running: Any = frozenset(),
) -> Placement:
    def decide(asked: Request, host: Host, previous: Optional[Plan]) -> Plan:
        return make_plan(asked.name, "/m", asked.facts, host, IMAGE, asked.options, previous)

    host = spec if isinstance(spec, Host) else Host(assumed_gpus(spec))
    plans = tuple((before or {}).values())
    facts = HostFacts("", offer=host, plans=plans, running=frozenset(running))
    wishes = [Wish(one) for one in requests]
    return place(wishes, [SiteHost("", local=True)], {"": facts}, decide)


def shares(found: Placement) -> Dict[str, float]:
    """What of each GPU is given away."""
    given: Dict[str, float] = Counter()
    for plan in found.plans.values():
        for gpu in plan.gpus:
            given[gpu] += plan.gpu_memory_utilization
    return given


def test_three_models_have_a_gpu_each_and_a_port_each() -> None:
    found = together([request(name) for name in "abc"], "3x80GB")
    assert not found.refused and list(found.plans) == ["a", "b", "c"]
    assert len({plan.gpus for plan in found.plans.values()}) == 3
    assert len({plan.port for plan in found.plans.values()}) == 3


def test_the_ram_of_a_host_is_not_promised_twice() -> None:
    asked = [replace(request(name), options=ServeOptions(device="cpu")) for name in "ab"]
    found = together(asked, Host(memory=20 << 30))
    assert list(found.plans) == ["a"]
    error = found.refused["b"]
    assert "of RAM can be used, of which other models hold" in error.why, error.why
    assert error.next_step.startswith("hfship status")
    assert not together(asked, Host(memory=99 << 30)).refused


# What a host says of its GPUs, and whether a group of hosts may have all of it.
IDLE: List[Any] = [
    ([{}], True),
    ([], False),
    ([{}, {"mig": True}], False),
    ([{}, {"slice": "0:0"}], False),
    ([{"used": 0.02}, {"used": 0.02}], True),
    ([{"used": 0.02}, {"used": 0.05}], False),
]


@pytest.mark.parametrize("changes, is_idle", IDLE)
def test_a_host_is_idle_when_all_of_its_gpus_are_free(changes: Any, is_idle: bool) -> None:
    whole = assumed_gpus(f"{max(len(changes), 1)}x80GB")
    gpus = []
    for gpu, change in zip(whole, changes):
        used = int(change.get("used", 0) * gpu.total)
        gpus.append(replace(gpu, **{**change, "used": used}))
    facts = HostFacts("a", offer=Host(tuple(gpus)))
    seat = _Seat(SiteHost("a"), facts, 0, frozenset(), {})
    assert seat.is_idle == is_idle


def test_a_host_that_holds_a_model_is_not_idle_unless_that_takes_no_gpu() -> None:
    facts = HostFacts("a", offer=Host(assumed_gpus("2x80GB")))
    for gpus, is_idle in (((), True), (("GPU-0",), False)):
        seat = _Seat(SiteHost("a"), facts, 0, frozenset(), {})
        seat.held["m"] = Plan(name="m", gpus=gpus)
        assert seat.is_idle == is_idle


def test_what_loads_on_a_host_and_is_not_placed_again_takes_its_share_too() -> None:
    gpus = [replace(gpu, uuid=f"GPU-{gpu.index}") for gpu in assumed_gpus("2x80GB")]
    loads = Plan(name="old", gpus=("GPU-0",), gpu_memory_utilization=0.9)
    facts = HostFacts("a", offer=Host(tuple(gpus)), plans=(loads,), running=frozenset({"old"}))
    seat = _Seat(SiteHost("a"), facts, 0, frozenset({"new"}), {})
    assert not seat.held and not seat.is_idle
    assert seat.free == pytest.approx(1.1, abs=0.02)


def test_the_large_model_finds_its_place_first() -> None:
    found = together([request("small"), request("large", "Llama-3.1-70B")], "5x80GB")
    assert len(found.plans["large"].gpus) == 4 and len(found.plans["small"].gpus) == 1
    assert max(shares(found).values()) <= 0.9


def test_named_gpus_are_left_to_the_model_that_names_them() -> None:
    found = together([request("large", "Llama-3.1-70B"), request("a", gpus=("0",))], "5x80GB")
    assert found.plans["a"].gpus == ("GPU-assumed-0",)
    assert "GPU-assumed-0" not in found.plans["large"].gpus


def test_declared_shares_add_up_where_no_gpu_is_free() -> None:
    half = {"gpu_memory_utilization": 0.45}
    found = together([request(name, **half) for name in "abc"], "2x80GB")
    assert sorted(shares(found).values()) == [0.45, 0.9]
    found = together([request(name, **half) for name in "ab"], "2x80GB")
    assert sorted(shares(found).values()) == [0.45, 0.45]  # an empty GPU before a shared one


def test_the_one_table_says_how_each_is_now() -> None:
    asked = [request(name) for name in "abcd"]
    first = together(asked[:2], "3x80GB")
    found = together(asked, "3x80GB", before=dict(first.plans), running={"a"})
    header, *rows = found.text().splitlines()
    assert header.split() == ["model", "GPUs", "share", "context", "port", "state", "image"]
    at = header.index("state")
    states = {row.split()[0]: row[at:].split("  ")[0] for row in rows}
    assert states == {"a": "runs", "b": "does not run", "c": "new", "d": "finds no place"}


def test_what_finds_no_place_is_told_who_has_it() -> None:
    found = together([request(name) for name in "abc"], "2x80GB")
    assert list(found.plans) == ["a", "b"] and list(found.refused) == ["c"]
    error = found.refused["c"]
    assert "a is given GPU 0" in error.text() and "gpu_memory_utilization = 0.45" in error.text()
    with pytest.raises(HostError):
        pinned(request("c"), found)
    assert "c" in found.text() and "no GPU is free" in found.text()


def test_what_runs_keeps_its_place() -> None:
    first = together([request("a")], "2x80GB").plans["a"]
    before = {"a": replace(first, gpus=("GPU-assumed-1",), port=8007)}
    found = together([request("b"), request("a")], "2x80GB", before, {"a"})
    assert found.plans["a"].gpus == ("GPU-assumed-1",) and found.plans["a"].port == 8007
    assert found.plans["b"].gpus == ("GPU-assumed-0",)


def test_what_runs_beside_the_list_keeps_its_gpu() -> None:
    other = replace(together([request("x")], "2x80GB").plans["x"], gpus=("GPU-assumed-0",))
    found = together([request("a"), request("b")], "2x80GB", {"x": other}, {"x"})
    assert [plan.gpus for plan in found.plans.values()] == [("GPU-assumed-1",)]


def test_a_request_is_pinned_to_what_was_given() -> None:
    found = together([request("a"), request("b")], "2x80GB")
    options = pinned(request("b"), found).options
    assert options.gpus == found.plans["b"].gpus and options.port == found.plans["b"].port
    assert pinned(request("z"), found) == request("z")


def test_a_models_file_is_planned_as_a_whole(site: Site, model: Path) -> None:  # noqa: F811
    for name in ("n", "o"):
        (site.models / name).symlink_to(model)
    rows = "".join(f'[[model]]\nrepo = "org/{name}"\n' for name in "mno")
    file = site.hfship.home / "models.toml"
    file.write_text(rows)
    env = {"HFSHIP_STUB_GPUS": "3x H200 143771"}
    done = site("serve", "--models", file, "--plan", env=env)
    table = done.stdout.splitlines()[:4]
    assert table[0].split() == ["model", "GPUs", "share", "context", "port", "state", "image"]
    assert all(" new " in row for row in table[1:])
    assert [row.split()[:2] for row in table[1:]] == [["m", "0"], ["n", "1"], ["o", "2"]]
    said = json.loads(site("serve", "--models", file, "--plan", "--json", env=env).stdout)
    assert len({row["plan"]["gpus"][0] for row in said}) == 3
    site("serve", "--models", file, "--write-only", env=env)
    plans = [json.loads((site.deploy / name / "plan.json").read_text()) for name in "mno"]
    assert [plan["gpus"] for plan in plans] == [row["plan"]["gpus"] for row in said]
    assert [plan["port"] for plan in plans] == [row["plan"]["port"] for row in said]
    assert all("gpus" not in plan["wishes"] for plan in plans)  # the next plan may choose anew
    few = {"HFSHIP_STUB_GPUS": "2x H200 143771"}
    done = site("serve", "--models", file, "--plan", env=few, code=9)
    assert "no GPU is free" in done.stdout + done.stderr and "is given" in done.stderr
