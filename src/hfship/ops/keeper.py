# SPDX-License-Identifier: Apache-2.0
"""Keeps the record and the log of this run up to date.

Promises: a record or a log that cannot be written never stops the work; that is reported once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Deque, Dict, List, Mapping, Optional, Sequence, Set

from hfship.base.errors import DiskError, as_typed, command_line, error_fields, error_row
from hfship.base.files import disk_error, make_dir, opened
from hfship.base.locks import LEASE_BEAT_S
from hfship.base.progress import PLAIN_INTERVAL_S
from hfship.base.text import human_bytes, human_seconds
from hfship.base.values import dataclass, replace
from hfship.ops.jobs import RECORD_INTERVAL_S, expire_jobs, free_name, write_job

if TYPE_CHECKING:
    from hfship.base.progress import Stage
    from hfship.base.report import Reporter
    from hfship.ops.jobs import JobRecord

LOG_PROGRESS_S = 30.0
# A run that neither works nor ended by then has begun: it waits for a network, a disk, docker.
START_WAIT_S = 5.0
NAMING_S = 2.0  # to find a name takes milliseconds
SAY_THEIR_SPEED = ("fetch", "push")  # with their results
RATE_LOOKS = 40  # the rate is that of the last ten seconds


@dataclass(frozen=True)
class _Look:
    """How far a stage was at a time (seconds, monotonic), without what was there already."""

    stage: Stage
    at: float
    done: int


class JobKeeper:
    """Keeps the record and the log of this run up to date, from a thread of its own.

    A detached process tells its name through `pipe`, and lets go of the terminal, when it has
    begun.
    """

    def __init__(
        self, reporter: Reporter, folder: Path, record: JobRecord, form: str, pipe: int = -1
    ) -> None:
        self._reporter = reporter
        self._run = reporter.run
        self._folder = folder
        self._record = record
        self._form = form
        self._pipe = pipe
        self._looks: Deque[_Look] = deque(maxlen=RATE_LOOKS)
        self._is_broken = False
        self._has_begun = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="job", daemon=True)
        self._thread.start()

    def end(self, code: int, state: str) -> None:
        """Write down how the run ended, unless it was refused before it began."""
        worked = self._run.working.is_set()
        self._over.set()
        self._run.working.set()
        self._thread.join()
        failure = self._run.failure
        if code and not (worked or self._has_begun):
            if self._pipe >= 0 and failure:
                self._answer(json.dumps(self._reporter.redacted(error_row(failure))))
            return

        if not self._has_begun:
            self._begin()
        # The stage that the record shows when all is over: that of the most bytes.
        stages = self._run.past
        main = max(stages, key=lambda stage: (stage.unit == "B", stage.done), default=None)
        ended = replace(
            self._now(main),
            rate=0.0,
            stage="",
            state=state,
            exit_code=code,
            error={},
        )
        if main:
            ended = replace(ended, rate=main.rate)
        if code and failure:
            ended = replace(ended, error=self._reporter.redacted(error_fields(failure)))
        self._write(ended)
        self._summarize(code)

    def _keep(self) -> None:
        self._run.working.wait(START_WAIT_S)
        if self._over.is_set():
            return

        self._begin()
        logged_at = time.monotonic()
        while not self._over.wait(RECORD_INTERVAL_S):
            stage = self._stage()
            new, old = self._now(stage), self._record
            has_changed = replace(new, updated_at=old.updated_at) != old
            if has_changed or new.updated_at - old.updated_at > LEASE_BEAT_S:
                self._write(new)
            if stage and time.monotonic() - logged_at > LOG_PROGRESS_S:
                logged_at = time.monotonic()
                self._reporter.log_progress(stage)

    def _stage(self) -> Optional[Stage]:
        """The stage under way."""
        for stage in self._run.stages[-1:]:
            return stage
        return None

    def _begin(self) -> None:
        """Take a name, write the first record and open the log."""
        self._has_begun = True
        try:
            self._take_name()
            self._reporter.name_job(self._record.name)
            expire_jobs(self._folder)
            line = command_line("hfship", *self._record.words)
            self._reporter.log("info", f"began: {line}")
            self._reporter.open_log(self._log(), self._form)
        except DiskError as exc:
            self._complain(exc)
        except OSError as exc:
            self._complain(disk_error(exc, "write the log in", self._folder))

        if self._pipe >= 0:
            os.dup2(1, 2)
            self._answer(self._record.name)

    def _take_name(self) -> None:
        with opened(make_dir(self._folder)) as fd:
            _lock_for_a_while(fd)  # two runs that begin together get two names
            self._record = replace(self._record, name=free_name(self._folder, self._record))
            self._write(self._now(self._stage()))

    def _log(self) -> Path:
        return self._folder / (self._record.name + ".log")

    def _answer(self, text: str) -> None:
        """Tell the process that waits for us the name of the job, or as JSON why there is none."""
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._pipe, "w") as stream:
            stream.write(text)

    def _now(self, stage: Optional[Stage]) -> JobRecord:
        """The record as it is now. A stage that there is once per model counts as one."""
        record = replace(self._record, updated_at=time.time(), stage=self._run.doing, rate=0.0)
        rate = 0
        if stage:
            rate = self._rate(stage)
        elif self._run.past:  # between stages, as far as the last one came
            stage = self._run.past[-1]
        else:
            return record

        alike = [past for past in self._run.past if past.name == stage.name and past is not stage]
        alike.append(stage)
        return replace(
            record,
            unit=stage.unit,
            done=sum(one.done for one in alike),
            total=sum(one.total for one in alike),
            files=sum(one.files for one in alike),
            finished=sum(one.finished for one in alike),
            rate=rate,
        )

    def _rate(self, stage: Stage) -> int:
        """Units per second, lately."""
        now = _Look(stage, time.monotonic(), stage.done - stage.skipped)
        if self._looks and self._looks[-1].stage is not stage:
            self._looks.clear()
        self._looks.append(now)
        first = self._looks[0]
        seconds = now.at - first.at
        if seconds <= 1:
            return round(stage.rate)

        return round(max(now.done - first.done, 0) / seconds)

    def _write(self, record: JobRecord) -> None:
        self._record = record
        try:
            write_job(self._folder, record)
            self._is_broken = False
        except DiskError as exc:
            self._complain(exc)

    def _complain(self, exc: DiskError) -> None:
        if not self._is_broken:
            self._is_broken = True
            self._reporter.warn(f"{exc.what}; the work goes on, but `hfship watch` does not see it")

    def _summarize(self, code: int) -> None:
        """The block at the end: in the log, and on stderr after a run that was long."""
        record, reporter = self._record, self._reporter
        took = time.time() - record.began_at
        next_step = as_typed(command_line(*self._run.next_words))
        if code:
            next_step = record.error.get("next", "")
        all_rows = {
            "command": command_line("hfship", *record.words),
            "result": "; ".join(self._run.results),
            "moved": "; ".join(speeds_of(self._run.past)),
            "took": human_seconds(took),
            "exit": f"{code} ({record.state})",
            "why": record.error.get("what", ""),
            "next": next_step,
            "log": str(self._log()),
        }
        rows = {label: text for label, text in all_rows.items() if text}
        rows = reporter.redacted(rows)
        reporter.log("info", "summary", rows=rows)
        reporter.event("summary", **rows)
        if reporter.sends_events or reporter.verbosity < 0:
            return
        left_out = _left_out(code, record.command, took, reporter.verbosity)
        shown = {label: text for label, text in rows.items() if label not in left_out}
        if "moved" in shown:
            shown = {"speed": shown.pop("moved"), **shown}
        reporter.say(end_text(shown))


def _lock_for_a_while(fd: int) -> None:
    """Lock a folder, if that comes soon: NFS does not lock folders, and anybody may hold it."""
    give_up_at = time.monotonic() + NAMING_S
    while time.monotonic() < give_up_at:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return
        else:
            return


def _left_out(code: int, command: str, took: float, verbosity: int) -> Set[str]:
    """The rows of the summary that a terminal does without: what was typed there, and what was
    said."""
    left_out = {"why"}
    if code:
        left_out.add("next")
    if verbosity > 0:
        return left_out
    left_out |= {"command", "result", "exit"}
    if took < PLAIN_INTERVAL_S:
        left_out |= {"moved", "took"}
    if command in SAY_THEIR_SPEED:
        left_out.add("moved")
    return left_out


def end_text(rows: Mapping[str, str]) -> str:
    """The last lines of a run: as an error has its own.

    >>> print(end_text({"next": "hfship pack m", "log": "/logs/fetch-m.log"}))
      next  hfship pack m
      log   /logs/fetch-m.log
    """
    return "\n".join(f"  {label:<5} {text}" for label, text in rows.items())


def speeds_of(stages: Sequence[Stage]) -> List[str]:
    """What was moved, by the name of the stage: bytes, seconds and bytes per second, for people."""
    moved: Dict[str, int] = {}
    seconds: Dict[str, float] = {}
    for stage in stages:
        if stage.unit == "B" and stage.done > stage.skipped:
            moved[stage.name] = moved.get(stage.name, 0) + stage.done - stage.skipped
            seconds[stage.name] = seconds.get(stage.name, 0.0) + max(stage.seconds, 1e-3)

    return [
        f"{name} {human_bytes(size)} in {human_seconds(seconds[name])}"
        f" ({human_bytes(size / seconds[name])}/s)"
        for name, size in moved.items()
    ]
