"""What no host can mend alone: groups of which a member died, and hosts that tell of nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Tuple, cast

import pytest

from hfship.base.values import replace
from hfship.commands.repairing import repaired
from hfship.commands.repairing_hosts import groups_of, without_docker
from hfship.serve.deployments import Deployment
from hfship.serve.status import DeploymentStatus
from hfship.serve.terms import Plan
from hfship.site.groups import DOWN, UNKNOWN, UP

if TYPE_CHECKING:
    from hfship.commands.context import Context


def row(host: str, state: str, fault: str = "") -> Tuple[str, DeploymentStatus]:
    return host, DeploymentStatus("m", state, "vllm_m", "i", "http://h0", 8000, (), fault=fault)


WELL, DEAD, HANGS = ("healthy", ""), ("down", "down"), ("hung", "hung")
# How its members are, which hosts are silent: the states of the group, and whether it hangs; none: it is left alone.
GROUPS: List[Tuple[List[Tuple[str, str]], List[str], Optional[Tuple[List[str], bool]]]] = [
    ([WELL, WELL], [], ([UP, UP], False)),
    ([HANGS, DEAD], [], ([UP, DOWN], True)),
    ([HANGS, HANGS], [], ([UP, UP], True)),
    ([HANGS], ["h1"], ([UP, UNKNOWN], True)),
    ([HANGS], [], ([UP, DOWN], True)),
    ([("unknown", ""), WELL], [], ([UNKNOWN, UP], False)),
    ([WELL, ("stopped", "")], [], None),
    ([], ["h0", "h1"], None),
]


@pytest.mark.parametrize("members, silent, found", GROUPS)
def test_what_hosts_tell_of_a_group(
    members: List[Tuple[str, str]], silent: List[str], found: Optional[Tuple[List[str], bool]]
) -> None:
    rows = [row(f"h{number}", *one) for number, one in enumerate(members)]
    places = {"m": ("h0", "h1"), "single": ("h0",)}
    groups = [(list(one.states), one.is_hung) for one in groups_of(places, rows, silent)]
    assert groups == ([found] if found else [])


def test_a_host_that_tells_of_nothing_has_no_docker() -> None:
    rows = [row("h0", "unknown"), row("h0", "unknown"), row("h1", "unknown"), row("h1", "healthy")]
    assert without_docker(rows) == ["h0"]


def test_a_member_is_not_repaired_alone(tmp_path: Path) -> None:
    plan = Plan(name="m", nodes=("10.0.0.1", "10.0.0.2"), node_rank=1)
    deployment = Deployment(tmp_path, plan, "sk-1")
    _, status = row("h1", "down", "down")
    told = repaired(cast("Context", None), deployment, status)
    assert told.state == "down" and not told.repair and "starts again as one" in told.note


def told_of(name: str, host: str, state: str, fault: str = "") -> Tuple[str, DeploymentStatus]:
    """What a host tells of a deployment."""
    return host, replace(row(host, state, fault)[1], name=name)


def test_every_group_is_found_by_its_own_rows() -> None:
    """Behind a model of one host, rows of others, and members that nobody tells of."""
    places = {"single": ("h0",), "m": ("h0", "h1", "h2"), "n": ("h1", "h2")}
    rows = [
        told_of("n", "h1", "healthy"),
        told_of("single", "h0", "down", "down"),
        told_of("m", "h1", "healthy"),
        told_of("m", "h2", "hung", "hung"),
        told_of("n", "h2", "down", "down"),
    ]
    first, second = groups_of(places, rows, [])
    assert (first.name, first.hosts, first.states) == ("m", ("h0", "h1", "h2"), [DOWN, UP, UP])
    assert first.is_hung and first.worst == rows[3][1]
    assert (second.name, second.states, second.is_hung) == ("n", [UP, DOWN], False)
    assert second.worst == rows[4][1]
