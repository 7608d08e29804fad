# SPDX-License-Identifier: Apache-2.0
"""The deployments in `list`: all are asked, and one that cannot be is told; test_listing.py has the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, List

import pytest

from hfship.base.errors import HostError
from hfship.ops.stock import stocked_deployments


def deployment(name: str) -> Any:
    return SimpleNamespace(plan=SimpleNamespace(name=name, url=f"http://{name}"))


def status(one: Any) -> Any:
    if one.plan.name == "silent":
        raise HostError("it does not answer", "", "")
    return SimpleNamespace(state="healthy", note="up")


@pytest.mark.parametrize(
    ("found", "docker", "rows"),
    [
        ([], "", [("odd", "unknown", "", "odd is broken")]),
        (
            ["z", "a"],
            "",
            [
                ("a", "healthy", "http://a", "up"),
                ("odd", "unknown", "", "odd is broken"),
                ("z", "healthy", "http://z", "up"),
            ],
        ),
        (
            ["silent"],
            "",
            [
                ("odd", "unknown", "", "odd is broken"),
                ("silent", "unknown", "http://silent", "it does not answer"),
            ],
        ),
        (
            ["a"],
            "docker is down",
            [
                ("a", "unknown", "http://a", "docker is down"),
                ("odd", "unknown", "", "odd is broken"),
            ],
        ),
    ],
)
def test_all_deployments_are_listed_with_their_states(
    found: List[str], docker: str, rows: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def require() -> None:
        asked.append("docker")
        if docker:
            raise HostError(docker, "", "")

    asked: List[str] = []
    wrong = {"odd": HostError("odd is broken", "", "")}
    listed = ([deployment(name) for name in found], wrong)
    monkeypatch.setattr("hfship.serve.deployments.list_deployments", lambda *_: listed)
    monkeypatch.setattr("hfship.serve.docker.require_docker", require)
    monkeypatch.setattr("hfship.serve.status.deployment_status", status)
    reporter: Any = None
    made = stocked_deployments(Path("/d"), reporter)
    assert [(one.name, one.state, one.url, one.note) for one in made] == rows
    assert asked == (["docker"] if found else [])
