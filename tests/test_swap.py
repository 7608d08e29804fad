# SPDX-License-Identifier: Apache-2.0
"""serve NAME --instead-of OTHER, in what it asks and does; test_gateway_run.py has it with docker."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List

import pytest

from hfship.base.errors import HfshipError, NotFoundError, UsageError
from hfship.commands.swap import make_room


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """What was done, in order; containers run but for those called absent."""
    done: List[str] = []

    def note(step: str, answer: Any = None) -> Any:
        done.append(step)
        return answer

    def find(context: Any, name: str) -> None:
        if name == "unknown":
            raise NotFoundError("no such model", "", "")
        note(f"find {name}")

    @contextlib.contextmanager
    def drained(gateway: Path, name: str, reporter: Any) -> Iterator[None]:
        note(f"drain {name} at {gateway.name}")
        yield
        note(f"undrain {name}")

    def named(context: Any, name: str) -> Any:
        return SimpleNamespace(plan=SimpleNamespace(name=name.lower()))

    def inspect(name: str) -> Any:
        return None if "absent" in name else {"name": name}

    def stop(deployment: Any, remove: bool) -> None:
        note(f"stop {deployment.plan.name}{' and remove' if remove else ''}")

    monkeypatch.setattr("hfship.commands.serve_model.find_served_model", find)
    monkeypatch.setattr("hfship.commands.swap.named_deployment", named)
    monkeypatch.setattr("hfship.commands.swap.drained", drained)
    monkeypatch.setattr("hfship.serve.docker.inspect_container", inspect)
    monkeypatch.setattr("hfship.serve.docker.require_docker", lambda: note("docker"))
    monkeypatch.setattr("hfship.serve.stop.stop_deployment", stop)
    return done


def context_of(folder: Path, **options: Any) -> Any:
    given = {"names": ["new"], "instead_of": "Old", "plan": False, "write_only": False, **options}
    return SimpleNamespace(
        args=argparse.Namespace(**given),
        settings=SimpleNamespace(deploy_dir=folder),
        reporter=SimpleNamespace(info=str),
    )


def taken(name: str) -> List[str]:
    """The steps for a replica that runs."""
    return [f"drain {name} at _gateway", f"stop {name}", f"undrain {name}"]


@pytest.mark.parametrize(
    ("instead_of", "replicas", "stopped"),
    [
        ("Old", [], ["old"]),
        ("Old", ["old.2", "old.64", "old.65", "old.1", "older.2"], ["old", "old.2", "old.64"]),
        ("absent", [], []),
        ("absent", ["absent.2"], []),
    ],
)
def test_all_replicas_answer_and_stop_in_order(
    instead_of: str, replicas: List[str], stopped: List[str], tmp_path: Path, steps: List[str]
) -> None:
    for name in replicas:
        (tmp_path / name).mkdir()
    make_room(context_of(tmp_path, instead_of=instead_of, names=["new", "two"]))
    expected = [step for name in stopped for step in taken(name)]
    assert steps == ["find new", "find two", "docker", *expected]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"plan": True}, UsageError),
        ({"write_only": True}, UsageError),
        ({"names": ["Old"]}, UsageError),
        ({"names": ["unknown"]}, NotFoundError),
    ],
)
def test_what_is_wrong_is_said_before_anything_stops(
    options: Any, error: type, tmp_path: Path, steps: List[str]
) -> None:
    with pytest.raises(HfshipError) as caught:
        make_room(context_of(tmp_path, **options))
    assert type(caught.value) is error and steps == []
