# SPDX-License-Identifier: Apache-2.0
"""The start of a copy over several hosts: all members at once, and what is told when one fails.

The head waits for its members, and vLLM itself would wait for an hour: so each of the others is
looked at while the head starts. Promises: when one has ended the head is stopped, too, and the
error has what the members said last, since the cause may be in the log of any of them.
"""

from __future__ import annotations

import shlex
import threading
from typing import Any, Callable, List, Sequence, Union

from hfship.base.errors import HfshipError, HostError, NetworkError
from hfship.ops.reach import FarHost, at_once
from hfship.serve.files import container_name
from hfship.serve.messages import explain
from hfship.serve.stop import LAST_LOG

LOOK_EACH_S = 15.0
ENDED = ("exited", "dead")  # states of a container
LAST_LINES = 15  # of a member's log, that are shown

Start = Callable[[FarHost], Any]


class GroupStart:
    """One start of the group `name` over `hosts`, the head first; `start` starts a member."""

    def __init__(self, name: str, hosts: Sequence[FarHost], start: Start) -> None:
        self.name, self.hosts, self.start = name, hosts, start
        self._head = hosts[0]
        self._over = threading.Event()
        self._causes: List[HfshipError] = []  # in the order in which they came

    def run(self) -> Union[Any, HfshipError]:
        """What the head answered; the first error where one of them failed, and then all stop."""
        answers = at_once(self.hosts, self._member)
        if not self._causes:
            return answers[self._head.name]
        self.stop()
        return self._told(self._causes[0])

    def stop(self) -> None:
        """Stop all of it."""
        at_once(self.hosts, lambda one: one.hfship("stop", self.name))

    def _member(self, host: FarHost) -> Any:
        """Start a member; one that is not the head is looked at until the head is done."""
        try:
            answer = self.start(host)
            if host is not self._head:
                self._watch(host)
        except HfshipError as exc:
            self._causes.append(exc)
            if host is not self._head and not self._over.is_set():
                self._head.hfship("stop", self.name)
            raise
        finally:
            if host is self._head:
                self._over.set()
        return answer

    def _watch(self, host: FarHost) -> None:
        """Raise HostError when the member on a host has ended before the head was done."""
        while not self._over.wait(LOOK_EACH_S):
            if self._has_ended(host):
                what = f"{host.name}: {self.name} ended before the group answered"
                raise HostError(what, "", f"on {host.name}: hfship logs {self.name}")

    def _has_ended(self, host: FarHost) -> bool:
        """Whether the container of the member there has ended, or is gone."""
        words = ["docker", "inspect", "-f", "{{.State.Status}}", container_name(self.name)]
        try:
            done = host.sh(shlex.join(words))
        except NetworkError:  # a line that broke ends no member
            return False
        if done.code:
            return "No such" in done.out
        return done.out.strip() in ENDED

    def _told(self, error: HfshipError) -> HfshipError:
        """The error with what the members said last, but for the head that has told it already."""
        what, step = error.what, error.next_step
        parts = [error.why] if error.why else []
        for host in self.hosts:
            if host is self._head and error.why:
                continue
            log = self._last_log(host)
            if not log:
                continue
            cause, next_step = explain(log, self.name)
            if cause and cause not in what:
                what += f"; on {host.name} {cause}"
                step = next_step
            end = "\n".join(log.splitlines()[-LAST_LINES:])
            parts.append(f"the end of its log on {host.name}:\n{end}")
        why = "\n".join(parts)
        return type(error)(what, why, step)

    def _last_log(self, host: FarHost) -> str:
        """What the member on a host said last, as its stop kept it."""
        folder = host.host.folders["deploy_dir"]
        path = shlex.quote(f"{folder}/{self.name}/{LAST_LOG}")
        try:
            done = host.sh(f"tail -n 400 -- {path}")
        except HfshipError:
            return ""
        if done.code:
            return ""
        return done.out
