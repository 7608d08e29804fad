# SPDX-License-Identifier: Apache-2.0
"""Archives to many hosts at once: from here, and from host to host where their own ssh lets them.

What is sent goes through push, here or by the hfship there: so it resumes behind the bytes that
arrived, and has its name where its SHA-256 was proven. In which order is told in ops/relay.py.

Promises: a host that fails holds no other up, and has the reason in the result; one that cannot
reach another is sent all from here; the next run sends nothing twice.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence, Union

from hfship.archive.files import is_archive_name
from hfship.base.errors import Exit, HfshipError, error_row
from hfship.base.text import counted, human_bytes, human_seconds, table
from hfship.base.values import dataclass
from hfship.ops.inventory import failure_lines
from hfship.ops.push import Push, PushFile, streams_of
from hfship.ops.reach import FarHost, at_once
from hfship.ops.relay import HERE, Schedule, Transfer

if TYPE_CHECKING:
    from hfship.base.progress import Stage
    from hfship.base.report import Reporter

# Of a file that is smaller, the way from host to host takes longer than it saves.
WORTH_RELAYING = 64 << 20


@dataclass(frozen=True)
class Brought:
    """What came of bringing files to hosts: by host the bytes that it has proven, or the error."""

    size: int
    answers: Mapping[str, Union[int, HfshipError]]
    relayed: int  # bytes that went from host to host
    seconds: float

    @property
    def failures(self) -> Dict[str, HfshipError]:
        """The errors of hosts that do not have all."""
        return {n: one for n, one in self.answers.items() if isinstance(one, HfshipError)}

    def text(self) -> str:
        """A line for each host, and one for all."""
        rows = []
        for name, answer in self.answers.items():
            state = f"{human_bytes(self.size)}, SHA-256 of every file checked there"
            if isinstance(answer, HfshipError):
                state = "failed"
            rows.append([name, state])
        good = len(self.answers) - len(self.failures)
        summary = f"pushed to {good} of {counted(len(self.answers), 'host')}"
        summary += f" in {human_seconds(self.seconds)}"
        if self.relayed:
            summary += f", {human_bytes(self.relayed)} of it from host to host"
        return "\n".join([table(rows), *failure_lines(self.failures), summary])

    def json(self) -> Dict[str, Any]:
        """docs/json.md, "hosts"."""
        hosts: List[Dict[str, Any]] = []
        for name, answer in self.answers.items():
            results: List[Dict[str, Any]] = [{"bytes": self.size}]
            code = Exit.OK
            if isinstance(answer, HfshipError):
                results, code = [error_row(answer)], answer.code
            hosts.append({"host": name, "exit_code": int(code), "results": results})
        return {"schema": "hfship-hosts/1", "command": "push", "hosts": hosts}


class _Bringing:
    """One run. Threads share it; `_changed` guards the schedule."""

    def __init__(
        self,
        hosts: Sequence[FarHost],
        files: Sequence[PushFile],
        stage: Stage,
        jobs: int,
        options: Sequence[str],
        reporter: Reporter,
    ) -> None:
        self._hosts = {host.name: host for host in hosts}
        self._files = {file.name: file for file in files}
        self._stage, self._jobs, self._reporter = stage, jobs, reporter
        self._options = options
        self._pushes: Dict[str, Push] = {}
        self._changed = threading.Condition()
        self.failures: Dict[str, HfshipError] = {}
        self.relayed = 0
        self._cannot_relay = False
        self._ended = 0  # transfers, since they were counted last

    def prepare(self, host: FarHost) -> None:
        """See what a host has, and bring it what is small."""
        to = host.at(host.host.folders["transfer_dir"])
        files = list(self._files.values())
        push = Push(
            to,
            files,
            self._stage,
            host.stop,
            self._jobs,
            self._options,
        )
        push.prepare()
        self._pushes[host.name] = push
        for file in files:
            if not self._is_large(file):
                push.bring(file)

    def _is_large(self, file: PushFile) -> bool:
        return is_archive_name(file.name) and file.size >= WORTH_RELAYING

    def run(self) -> None:
        """Bring all to all."""
        answers = at_once(list(self._hosts.values()), self.prepare)
        for name, answer in answers.items():
            if isinstance(answer, HfshipError):
                self._give_up(name, answer)
        large = [file.name for file in self._files.values() if self._is_large(file)]
        names = [name for name in self._hosts if name not in self.failures]
        schedule = Schedule(large, names, self._jobs)
        running = 0
        with ThreadPoolExecutor(len(names) + self._jobs) as threads, self._changed:
            while True:
                transfer = schedule.next()
                if transfer is None and not running:
                    return
                if transfer is None:
                    running -= self._wait_for_one()
                    continue
                running += 1
                threads.submit(self._carry, schedule, transfer)

    def _wait_for_one(self) -> int:
        self._ended = 0
        while not self._ended:
            self._changed.wait(0.5)
        return self._ended

    def _carry(self, schedule: Schedule, transfer: Transfer) -> None:
        """Do one transfer, and note in the schedule how it went."""
        failure = None
        try:
            self._send(transfer)
        except HfshipError as exc:
            failure = exc
        with self._changed:
            if failure is None:
                schedule.arrived(transfer)
            else:
                schedule.failed(transfer)
                self._tell_failure(transfer, failure)
            self._ended += 1
            self._changed.notify()

    def _send(self, transfer: Transfer) -> None:
        file = self._files[transfer.file]
        if transfer.source == HERE:
            self._pushes[transfer.target].bring(file)
            return
        source, target = self._hosts[transfer.source], self._hosts[transfer.target]
        words = relay_words(source, target, file)
        source.asked(*words)
        self._stage.add(file.size)
        self.relayed += file.size

    def _tell_failure(self, transfer: Transfer, failure: HfshipError) -> None:
        if transfer.source == HERE:
            self._give_up(transfer.target, failure)
        elif not self._cannot_relay:
            self._cannot_relay = True
            way = f"{transfer.source} cannot send to {transfer.target}"
            self._reporter.info(f"{way} ({failure.what}): it is sent from here")

    def _give_up(self, name: str, failure: HfshipError) -> None:
        self.failures[name] = failure
        self._reporter.warn("; ".join(failure_lines({name: failure})))


def relay_words(source: FarHost, target: FarHost, file: PushFile) -> List[str]:
    """The command with which one host sends a file to another, by its own ssh."""
    host = target.host
    where = host.reached_at
    if ":" in where:
        where = f"[{where}]"
    if host.user:
        where = f"{host.user}@{where}"
    folder = source.host.folders["transfer_dir"]
    folder_there = host.folders["transfer_dir"]
    words = [
        "push",
        f"{folder}/{file.name}",
        f"{where}:{folder_there}",
    ]
    if host.port:
        words += ["--port", str(host.port)]
    if host.jump:
        words += ["--ssh-option", f"ProxyJump={host.jump}"]
    return words


def bring(
    hosts: Sequence[FarHost],
    files: Sequence[PushFile],
    jobs: int,
    limit_bps: int,
    reporter: Reporter,
) -> Brought:
    """Have all files on all hosts, in their folders for transfer. `jobs` and `limit_bps` are those
    of push, for what is sent from here."""
    jobs, options = streams_of(jobs, limit_bps)
    began = time.monotonic()
    size = sum(file.size for file in files)
    with reporter.stage("push", size * len(hosts)) as stage:
        run = _Bringing(hosts, files, stage, jobs, options, reporter)
        try:
            run.run()
        finally:
            for host in hosts:
                host.stop.set()
    answers: Dict[str, Union[int, HfshipError]] = {}
    for host in hosts:
        answers[host.name] = run.failures.get(host.name, size)
    return Brought(size, answers, run.relayed, time.monotonic() - began)
