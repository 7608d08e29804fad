# SPDX-License-Identifier: Apache-2.0
"""Replicas out of service, on a gateway that notes what it is told; the real one: test_gateway_run.py."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.site import rolling
from hfship.site.admin import ServerState


class Site:
    """Model m with the replicas a and b at the gateway; `looks` are the states of a, look by look."""

    def __init__(self) -> None:
        self.told: List[str] = []
        self.looks: List[Tuple[str, int]] = [("UP", 0)]
        self.refuses = ""  # the command that the gateway does not take
        self.now = 0.0
        self.asked = 0

    def tell(self, words: str) -> None:
        if self.refuses and words.startswith(self.refuses):
            raise HostError("refused", "", "")
        self.told.append(words)

    def server_states(self, folder: Path) -> List[ServerState]:
        self.asked += 1
        if self.refuses == "states":
            raise HostError("no answer", "", "")
        state, sessions = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        rows = [("be_other", "a", "UP", 7), ("be_m", "b", "UP", 5), ("be_m", "a", state, sessions)]
        return [ServerState(backend, name, word, False, n, 0) for backend, name, word, n in rows]

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @contextlib.contextmanager
    def clock(self, stage: str, limit_s: float) -> Iterator[None]:
        self.told.append(f"clock {limit_s:g}")
        yield


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site()
    replicas = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    models = [
        SimpleNamespace(backend="be_other", replicas=[SimpleNamespace(name="c")]),
        SimpleNamespace(backend="be_m", replicas=replicas),
    ]
    patched: Dict[str, Any] = {
        "read_gateway": lambda folder: (
            None if folder.name == "none" else SimpleNamespace(models=models)
        ),
        "set_servers": lambda _, backend, names, state: made.tell(f"{state} {backend} {names}"),
        "end_sessions": lambda _, backend, name: made.tell(f"end {backend} {name}"),
        "server_states": made.server_states,
        "time": SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep),
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.site.rolling.{name}", value)
    return made


@pytest.mark.parametrize(
    ("folder", "name", "backend"),
    [("g", "a", "be_m"), ("g", "c", "be_other"), ("g", "x", None), ("none", "a", None)],
)
def test_the_backend_of_a_replica(
    folder: str, name: str, backend: Optional[str], site: Site
) -> None:
    assert rolling.backend_of(Path(folder), name) == backend


DRAINED = ["drain be_m ['a']", "clock 2", "ready be_m ['a']"]


@pytest.mark.parametrize(
    ("looks", "refuses", "name", "idle", "told", "seconds"),
    [
        ([("DRAIN", 0)], "", "a", True, DRAINED, 0),
        ([("DRAIN", 2), ("DRAIN", 1), ("DRAIN", 0)], "", "a", True, DRAINED, 1),
        ([("DRAIN", 1)], "", "a", False, DRAINED, 2),
        ([("DRAIN", 1)], "", "x", True, [], 0),  # no gateway has it
        ([("DRAIN", 1)], "drain", "a", True, [], 0),  # none runs
        ([("DRAIN", 0)], "ready", "a", True, DRAINED[:2], 0),
    ],
)
def test_a_replica_is_let_go_of_and_comes_back(
    looks: Any, refuses: str, name: str, idle: bool, told: List[str], seconds: float, site: Site
) -> None:
    site.looks, site.refuses = looks, refuses
    reporter: Any = site
    with rolling.drained(Path("g"), name, reporter, patience_s=2) as answered:
        assert answered is idle
        assert site.told == told[:2]
    assert (site.told, site.now) == (told, seconds)


def test_a_replica_comes_back_after_an_error_too(site: Site) -> None:
    reporter: Any = site
    with pytest.raises(KeyError), rolling.drained(Path("g"), "a", reporter, patience_s=2):
        raise KeyError
    assert site.told == DRAINED


@pytest.mark.parametrize(
    ("looks", "refuses", "name", "up", "seconds"),
    [
        ([("UP", 0)], "", "a", True, 0),
        ([("DOWN", 0), ("MAINT", 0), ("UP", 9)], "", "a", True, 1),
        ([("DOWN", 0)], "", "a", False, 2),
        ([("UP", 0)], "states", "a", False, 2),
        ([("DOWN", 0)], "", "x", True, 0),
    ],
)
def test_waiting_for_the_gateway_to_find_a_replica(
    looks: Any, refuses: str, name: str, up: bool, seconds: float, site: Site
) -> None:
    site.looks, site.refuses = looks, refuses
    assert rolling.await_up(Path("g"), name, patience_s=2) is up
    assert site.now == seconds


@pytest.mark.parametrize(
    ("name", "refuses", "taken", "told"),
    [
        ("a", "", True, ["maint be_m ['a']", "end be_m a"]),
        ("a", "maint", False, []),
        ("a", "end", False, ["maint be_m ['a']"]),
        ("x", "", False, []),
    ],
)
def test_a_replica_that_hangs_is_cut_off(
    name: str, refuses: str, taken: bool, told: List[str], site: Site
) -> None:
    site.refuses = refuses
    assert rolling.take_out(Path("g"), name) is taken
    assert site.told == told
    if refuses == "maint":
        assert rolling.send_elsewhere(Path("g"), name) is False


def test_what_no_gateway_has_is_not_sent_elsewhere(site: Site) -> None:
    assert rolling.send_elsewhere(Path("g"), "x") is False
    assert rolling.end_requests(Path("g"), "x") is False
    assert site.told == []


@pytest.mark.parametrize(
    ("name", "state", "refuses", "told"),
    [
        ("b", "MAINT", "", []),
        ("a", "MAINT", "", ["ready be_m ['a']"]),
        ("a", "UP", "", []),
        ("a", "DRAIN", "", []),
        ("a", "MAINT", "states", []),
        ("x", "MAINT", "", []),
    ],
)
def test_only_what_was_taken_out_is_brought_back(
    name: str, state: str, refuses: str, told: List[str], site: Site
) -> None:
    site.looks, site.refuses = [(state, 0)], refuses
    rolling.bring_back(Path("g"), name)
    assert site.told == told
    assert site.asked == (0 if name == "x" else 1)


def test_the_requests_of_a_replica_are_those_of_no_other(site: Site) -> None:
    site.looks = [("UP", 3)]
    assert rolling.sessions_of(Path("g"), "be_m", "a") == 3
