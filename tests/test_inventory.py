"""What hosts say of themselves: as a table, as JSON, and what of it does not fit together."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest

from hfship.base.errors import HfshipError, IntegrityError, NetworkError, NotFoundError
from hfship.ops import inventory as room
from hfship.ops.inventory import (
    Inventory,
    failure_lines,
    gpus_text,
    misfits,
    summary_of,
    take_inventory,
)
from hfship.ops.reach import FarHost
from hfship.serve.terms import Gpu, Host, Image, Plan
from hfship.site.hosts import HostFacts, SiteHost

H200 = Gpu(0, "GPU-0", "NVIDIA H200", 141 << 30)
FACTS = HostFacts(
    "a",
    offer=Host((H200, Gpu(1, "GPU-1", "NVIDIA H200", 141 << 30)), (Image("vllm:1"),)),
    plans=(
        Plan(name="m", bind="10.0.0.1", port=8000, gpus=("GPU-0",)),
        Plan(name="n", bind="10.0.0.1", port=8001),
        Plan(name="o", bind="10.0.0.1", port=8002),
    ),
    running=frozenset({"m", "n"}),
    healthy=frozenset({"m", "gone"}),
    models={"z": "1", "b": "2"},
    docker="28.5.2",
    architecture="x86_64",
    clock_offset_s=1.26,
    free=2_000_000_000,
    drained=True,
)
SILENT = HostFacts("b", "b does not answer")
DOWN = NetworkError("b does not answer", "it took\ntoo long", "ssh b true")


def test_hosts_are_a_table_with_what_is_wrong_below() -> None:
    mends = HostFacts("c", "docker is not installed", "install docker", free=1)
    found = Inventory({"a": FACTS, "b": SILENT, "c": mends}, {"b": DOWN})
    header, *rows = [line.split() for line in found.text().splitlines()]
    assert header == ["host", "GPUs", "free", "docker", "models", "deployments"]
    assert rows == [
        ["a", "2x", "H200", "2.0", "GB", "28.5.2", "2", "1", "of", "3", "healthy", "drained"],
        ["b", "?", "does", "not", "answer"],
        ["c", "none", "1", "B", "no", "0"],
        ["b", "does", "not", "answer:", "it", "took;", "too", "long"],
        ["c:", "docker", "is", "not", "installed"],
        ["next", "c:", "install", "docker"],
    ]


def test_hosts_are_json_for_programs() -> None:
    (row,) = Inventory({"a": FACTS}, {}).json()
    deployment = {"name": "m", "running": True, "healthy": True, "gpus": ["GPU-0"]}
    other = {"name": "n", "running": True, "healthy": False, "gpus": []}
    gpus = [{"uuid": f"GPU-{n}", "name": "NVIDIA H200", "bytes": 141 << 30} for n in (0, 1)]
    assert row == {
        "schema": "hfship-host/1",
        "host": "a",
        "problem": "",
        "next": "",
        "gpus": gpus,
        "images": ["vllm:1"],
        "free": 2_000_000_000,
        "docker": "28.5.2",
        "models": ["b", "z"],
        "deployments": [
            {**deployment, "url": FACTS.plans[0].url},
            {**other, "url": FACTS.plans[1].url},
            {**other, "name": "o", "running": False, "url": FACTS.plans[2].url},
        ],
        "clock_offset_s": 1.3,
        "drained": True,
    }


@pytest.mark.parametrize(
    "failures, code",
    [({}, 0), ({"b": DOWN}, 8), ({"b": DOWN, "c": NotFoundError("c", "", "")}, 8)],
)
def test_the_gravest_failure_is_the_exit_code(failures: Dict[str, HfshipError], code: int) -> None:
    assert Inventory({}, failures).exit_code == code


@pytest.mark.parametrize(
    "what, line",
    [
        ("d: no disk", "d: no disk"),
        ("d does not answer", "d does not answer"),
        ("docker is gone", "d: docker is gone"),
    ],
)
def test_a_failure_has_the_name_of_its_host_once(what: str, line: str) -> None:
    assert failure_lines({"d": HfshipError(what, "", "")}) == [line]
    assert failure_lines({"d": HfshipError(what, "why", "")}) == [f"{line}: why"]


def test_kinds_of_gpus_are_counted() -> None:
    gpus = (H200, Gpu(1, "GPU-1", "NVIDIA L40S", 0), H200)
    assert gpus_text(HostFacts("a", offer=Host(gpus))) == "2x H200, 1x L40S"
    assert gpus_text(HostFacts("a")) == "none"


def test_what_most_have_is_usual_and_silent_hosts_are_no_misfits() -> None:
    hosts = [
        HostFacts("a", docker="28.1", architecture="x86_64"),
        HostFacts("b", docker="28.5", architecture="x86_64", clock_offset_s=5.0),
        HostFacts("g", docker="28.5", clock_offset_s=5.1),
        HostFacts("c", docker="27.0", architecture="aarch64", clock_offset_s=-5.1),
        HostFacts("d", "no answer", docker="20.0", clock_offset_s=99.0),
        HostFacts("e", free=1),
        HostFacts("f", docker="27.9", architecture="x86_64"),
    ]
    assert misfits(hosts) == [
        ("g", "its clock is 5.1 s ahead of ours: set up NTP"),
        ("c", "its clock is 5.1 s behind ours: set up NTP"),
        ("c", "has docker 27, most have 28"),
        ("f", "has docker 27, most have 28"),
        ("c", "has processor aarch64, most have x86_64"),
    ]
    assert misfits([]) == [] == misfits([HostFacts("a"), HostFacts("b")])


def test_how_a_command_went_is_counted() -> None:
    assert summary_of({"a": 1}) == "1 host, 1 ok, 0 failed"


# What the clock there says, less ours as it is asked, and how long it takes: what counts as apart.
CLOCKS: List[Any] = [
    (0.0, 0.0, 0.0),
    (1.0, 4.0, 0.0),  # it looked at its clock while it was asked
    (4.0, 4.0, 0.0),
    (-9.0, 4.0, -13.0),
    (30.0, 4.0, 26.0),
]


@pytest.mark.parametrize("shift, took, offset", CLOCKS)
def test_the_time_that_an_answer_takes_is_not_the_clocks_fault(
    shift: float, took: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]

    def asked(self: FarHost, *words: object) -> Any:
        assert words == ("doctor", "--facts")
        clock[0] += took
        return {"time": 1000.0 + shift}

    def facts_of(name: str, value: Any, now: float) -> HostFacts:
        return HostFacts(name, clock_offset_s=value["time"] - now)

    monkeypatch.setattr(FarHost, "asked", asked)
    monkeypatch.setattr(room, "facts_of", facts_of)
    monkeypatch.setattr(room.time, "time", lambda: clock[0])
    found = room._facts(FarHost(SiteHost("a")))
    assert found.clock_offset_s == offset


def test_what_hosts_answer_is_kept_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(host: FarHost) -> HostFacts:
        if host.name == "b":
            raise DOWN
        return FACTS

    monkeypatch.setattr(room, "_facts", look)
    found = take_inventory([FarHost(SiteHost("a")), FarHost(SiteHost("b"))], limit_s=0)
    assert found.facts == {"a": FACTS, "b": HostFacts("b", problem=DOWN.what)}
    assert found.failures == {"b": DOWN}


def test_one_that_answers_nothing_sensible_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FarHost, "asked", lambda *_: [7])
    found = take_inventory([FarHost(SiteHost("a"))], limit_s=0)
    assert isinstance(found.failures["a"], IntegrityError)
    assert found.facts["a"] == HostFacts("a", problem="a tells no facts")
    assert found.failures["a"].why == "[7]"
