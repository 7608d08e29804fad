# SPDX-License-Identifier: Apache-2.0
"""Probes of doctor, and what they find.

Owns how a probe runs and how its end becomes a finding.
Promises: a probe that hangs costs its limit and no more; whatever ends it is a finding.
"""

from __future__ import annotations

import threading
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence

from hfship.base.errors import Exit, HfshipError, as_typed
from hfship.base.text import counted, table
from hfship.base.values import dataclass
from hfship.hub.answers import root_cause
from hfship.hub.retry import RetryableError

if TYPE_CHECKING:
    from hfship.base.report import Reporter

PROBE_TIMEOUT_S = 5.0


class ProbeWarning(Exception):
    """Raised by a probe that found something which works, but not well."""

    def __init__(self, text: str, next_step: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.next_step = next_step


@dataclass(frozen=True)
class Finding:
    """What one probe found: `state` is ok, warn or fail; a failure has the code of its kind."""

    check: str
    state: str
    text: str
    next: str = ""
    exit_code: Exit = Exit.OK

    def json(self) -> Dict[str, Any]:
        """The finding for --json: docs/json.md."""
        return {
            "check": self.check,
            "state": self.state,
            "note": self.text,
            "next": as_typed(self.next),
            "exit_code": self.exit_code,
        }


@dataclass(frozen=True)
class Diagnosis:
    """All that doctor found."""

    findings: Sequence[Finding]

    def text(self) -> str:
        """A table of the findings, below it the steps to take, and how many are bad."""
        rows = []
        checks: Dict[str, List[str]] = {}  # by the step that they ask for
        for finding in self.findings:
            rows.append([finding.state, finding.check, finding.text])
            if finding.next:
                checks.setdefault(as_typed(finding.next), []).append(finding.check)

        steps = [f"next  {', '.join(names)}: {step}" for step, names in checks.items()]
        return "\n".join([table(rows), *steps, self.count()])

    def count(self) -> str:
        """How many problems and warnings there are.

        >>> one = Finding("dns", "warn", "slow")
        >>> Diagnosis([one]).count(), Diagnosis([]).count()
        ('no problem, 1 warning', 'no problem, no warning')
        """
        counts = []
        for state, noun in (("fail", "problem"), ("warn", "warning")):
            number = sum(finding.state == state for finding in self.findings)
            counts.append(counted(number, noun) if number else f"no {noun}")
        return ", ".join(counts)

    def json(self) -> List[Dict[str, Any]]:
        """The findings for --json."""
        return [finding.json() for finding in self.findings]

    @property
    def exit_code(self) -> Exit:
        """That of the first failure."""
        for finding in self.findings:
            if finding.state == "fail":
                return finding.exit_code
        return Exit.OK


class RunningProbe:
    """A probe under way, in a thread that nobody has to wait for."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._found: Optional[Finding] = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._found = self._probe.examine()

    def result(self, reporter: Reporter) -> Finding:
        """What was found, at the latest when the probe's time is over; until then a clock ticks."""
        with reporter.clock(f"looking at {self._probe.check}", self._probe.limit_s):
            self._thread.join(self._probe.limit_s)
        if self._found:
            return self._found
        text = f"no answer in {self._probe.limit_s:.0f} s"
        return Finding(self._probe.check, "fail", text, self._probe.when_silent, self._probe.code)


@dataclass(frozen=True)
class Probe:
    """One thing to look at. `work` returns what it found, or raises.

    ProbeWarning is a warning; HfshipError and errors of the network are failures. `required`: after
    its failure those that follow make no sense. `when_silent` is the step after a probe that did
    not end, or ended with an error that has none of its own; `code`, the exit code of both.
    """

    check: str
    work: Callable[[], str]
    limit_s: float = PROBE_TIMEOUT_S
    required: bool = False
    when_silent: str = "check the network, the name server, the proxy and HF_ENDPOINT"
    code: Exit = Exit.NETWORK

    def start(self) -> RunningProbe:
        """Begin, and do not wait."""
        return RunningProbe(self)

    def run(self, reporter: Reporter) -> Finding:
        """What was found, at the latest when the time is over; until then a clock ticks."""
        return self.start().result(reporter)

    def examine(self) -> Finding:
        """What was found, whenever that is known."""
        try:
            return Finding(self.check, "ok", self.work())
        except ProbeWarning as exc:
            return Finding(self.check, "warn", exc.text, exc.next_step)
        except HfshipError as exc:
            text = exc.what
            if exc.why:
                text += f": {exc.why}"
            return Finding(self.check, "fail", text, exc.next_step, exc.code)
        except (RetryableError, OSError, HTTPException, ValueError) as exc:
            cause = root_cause(exc)
            return Finding(self.check, "fail", cause, self.when_silent, self.code)


def local_probe(check: str, work: Callable[[], str], limit_s: float = PROBE_TIMEOUT_S) -> Probe:
    """A probe of this machine, which no network can make fail."""
    step = "hfship doctor --offline once more, with less to do here; dmesg tells of bad disks"
    return Probe(check, work, limit_s, when_silent=step, code=Exit.HOST)
