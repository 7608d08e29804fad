"""The start of a copy over several hosts, on hosts that are played: which error is told, and that none waits for the dead."""

from __future__ import annotations

import threading
from typing import Any, Dict, List, Optional, Tuple, Union

import pytest

from hfship.base.errors import HfshipError, HostError, IntegrityError, NetworkError
from hfship.base.processes import Completed
from hfship.commands import group_start
from hfship.commands.group_start import GroupStart
from hfship.ops.reach import FarHost, FarResult
from hfship.site.hosts import SiteHost

NCCL = "INFO joining\nRuntimeError: NCCL error: unhandled system error\n"


class Played(FarHost):
    """A host whose member of the group does as `log` and `states` have it."""

    def __init__(self, name: str, states: List[Union[str, HfshipError]], log: str = "") -> None:
        super().__init__(SiteHost(name, local=True, data="/nowhere"))
        self.states, self.log = states, log
        self.stopped = threading.Event()
        self.looks = 0

    def hfship(self, *words: object, silence_s: float = 0) -> FarResult:
        if words[0] == "stop":
            self.stopped.set()
            return FarResult(0, [])
        raise AssertionError(f"asked for {words}")

    def sh(self, script: str) -> Completed:
        if "inspect" in script:
            assert script == "docker inspect -f '{{.State.Status}}' vllm_m"
            self.looks += 1
            state = self.states[min(self.looks, len(self.states)) - 1]
            if isinstance(state, HfshipError):
                raise state
            return Completed(int("No such" in state), state, "")
        assert script == "tail -n 400 -- /nowhere/deploy/m/last.log"
        return Completed(0 if self.log else 1, self.log, "")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_start, "LOOK_EACH_S", 0.01)


Answer = Optional[Union[HfshipError, str]]
GONE = HostError("h0: m did not start: it is gone", "the end of its log:\nhead", "hfship logs m")
DEAD = HostError("h0: m did not start: it ended", "the end of its log:\nKeyError", "hfship logs m")
BAD = IntegrityError("h1: the model is damaged", "", "hfship verify m")
LINE = NetworkError("the connection to h1 broke", "", "")
# What the head's start gives (None: it waits until it is stopped), that of the member, how the member is, its log:
# the type of the error and what is in it; None: it went well.
STARTS: Dict[str, Tuple[Answer, Answer, List[Any], str, Any]] = {
    "well": ("url", "started", ["running"], "", None),
    "the line breaks": ("late", "started", [LINE, "running", "running"], "", None),
    "the head dies": (DEAD, "started", ["running"], "AssertionError\n",
        (HostError, ["h0: m did not start: it ended", "KeyError", "its log on h1:\nAssertionError"])),
    "the member dies": (None, "started", ["running", "exited"], NCCL,
        (HostError, ["h1: m ended before the group answered; on h1 the GPUs could not talk to each other",
                     "its log on h1:\nINFO joining", "NCCL_P2P_DISABLE"])),
    "the member is gone": (None, "started", ["running", "Error: No such object: vllm_m"], "",
        (HostError, ["h1: m ended before the group answered", "on h1: hfship logs m"])),
    "the member does not start": (None, BAD, [], "",
        (IntegrityError, ["h1: the model is damaged", "hfship verify m"])),
}  # fmt: skip


@pytest.mark.parametrize("case", STARTS)
def test_a_group_starts_or_fails_as_one(case: str) -> None:
    head_gives, member_gives, states, log, expected = STARTS[case]
    head, member = Played("h0", []), Played("h1", states, log)

    def start(host: FarHost) -> Any:
        answer = head_gives if host is head else member_gives
        if answer == "late":
            while member.looks < 3:
                head.stopped.wait(0.01)
        if answer is None:
            assert head.stopped.wait(60), "nobody ended the head, which waits for the dead"
            answer = GONE
        if isinstance(answer, HfshipError):
            raise answer
        return answer

    told = GroupStart("m", [head, member], start).run()
    if expected is None:
        assert told == head_gives and not head.stopped.is_set() and not member.stopped.is_set()
        return
    kind, said = expected
    assert type(told) is kind and head.stopped.is_set() and member.stopped.is_set()
    for text in said:
        assert text in told.text().replace("\n        ", "\n"), told.text()
