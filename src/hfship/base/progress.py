# SPDX-License-Identifier: Apache-2.0
"""Progress: stages that count, and how they are shown.

A stage counts what one step (fetching, packing, ...) has done. It is shown on stderr as a bar of
tqdm, as plain lines, or as lines of JSON (`--progress json`, docs/json.md).
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator

from hfship.base.text import clock_text, cut, human_bytes, human_seconds

if TYPE_CHECKING:
    from hfship.base.output import Output

PLAIN_INTERVAL_S = 10.0  # one progress line per interval where there is no terminal
BAR_INTERVAL_S = 0.25
CLOCK_INTERVAL_S = 1.0
JSON_INTERVAL_S = 1.0
INTERVALS_S = {"bar": BAR_INTERVAL_S, "json": JSON_INTERVAL_S}


class Stage:
    """Counts of one step (fetching, packing, ...); its methods may be called from any thread.

    `total` and `done` are in `unit`s, bytes ("B") unless it says otherwise; `files` is how many
    files it is about, and `finished` how many of them are done, where that is known. `model` is the
    one of a list that it is about, as `2/3 NAME`.
    """

    def __init__(self, name: str, total: int, unit: str = "B", model: str = "") -> None:
        self.name = name
        self.model = model
        self.total = total
        self.unit = unit
        self.done = 0
        self.skipped = 0
        self.files = 0
        self.finished = 0
        self.bar: Any = None  # of tqdm, where one is shown
        self._started_at = time.monotonic()
        self._ended_at = 0.0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count `count` more units as done; negative takes back."""
        with self._lock:
            self.done += count

    def skip(self, count: int) -> None:
        """Count units that were already there: they are progress, but no speed."""
        with self._lock:
            self.done += count
            self.skipped += count

    def expect(self, files: int) -> None:
        """Say that the stage is about as many more files."""
        with self._lock:
            self.files += files

    def finish(self, files: int) -> None:
        """Count files as done."""
        with self._lock:
            self.finished += files

    def restart_clock(self) -> None:
        """Measure the speed from now on."""
        self._started_at = time.monotonic()

    def stop_clock(self) -> None:
        """Measure the speed up to now."""
        self._ended_at = time.monotonic()

    def each(self, results: Iterable[Any], files: int) -> Iterator[Any]:
        """The results of work on as many files, counted as they come."""
        self.expect(files)
        for result in results:
            self.finish(1)
            yield result

    @property
    def seconds(self) -> float:
        """Seconds from the start to now, or to the end."""
        return (self._ended_at or time.monotonic()) - self._started_at

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return (self.done - self.skipped) / max(self.seconds, 1e-6)

    @property
    def counts(self) -> Dict[str, Any]:
        """How far it is, for JSON: done, total, unit and rate (units per second)."""
        return {"done": self.done, "total": self.total, "unit": self.unit, "rate": round(self.rate)}

    def amounts(self) -> str:
        """The progress for people, without the name of the stage."""
        percent = 100 * self.done / self.total if self.total else 100
        share = f"{percent:3.0f} %"
        if self.unit != "B":
            return f"{share}  {self.done}/{self.total} {self.unit}"

        amount = f"{human_bytes(self.done)} of {human_bytes(self.total)}"
        line = f"{share}  {amount}  {human_bytes(self.rate)}/s"
        if not 0 < self.done < self.total:
            return line

        left_s = 0.0
        if self.rate > 0:
            left_s = (self.total - self.done) / self.rate
        return f"{line}, {human_seconds(left_s)} left"

    @property
    def label(self) -> str:
        """What people read before the amounts: `pack`, of a list `pack 2/3 NAME`."""
        return f"{self.name} {self.model}".rstrip()

    def line(self) -> str:
        """The progress as one plain line."""
        return f"{self.label}: {self.amounts()}"


class Clock:
    """Something that is waited for: since when, and for how long at most; 0: nobody knows.

    What is waited for may change while it goes on, as the phases of a start do; its methods may be
    called from any thread.
    """

    def __init__(self, doing: str, limit_s: float = 0) -> None:
        self.doing = doing
        self.limit_s = limit_s
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long it has been waited."""
        return time.monotonic() - self._began

    def text(self) -> str:
        """`starting m 1:13 of at most 1:00:00`"""
        line = f"{self.doing} {clock_text(self.seconds)}"
        if self.limit_s:
            line += f" of at most {clock_text(self.limit_s)}"
        return line


class _LastLine:
    """A countdown or a clock on the last line of the terminal. What is said takes its place for a
    second."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def clear(self) -> None:
        """Take it away."""
        self._output.err.write("\r\033[K")

    def refresh(self) -> None:
        """Nothing: the next second is shown soon."""

    def write(self, text: str) -> None:
        """Show another text, or none."""
        self._output.err.write(f"\r\033[K{text}")
        self._output.err.flush()


class ProgressDisplay:
    """Shows progress on stderr. `mode`: "bar", "plain", "json" (events) or "none"."""

    def __init__(self, output: Output) -> None:
        self.mode = "none"
        self._output = output
        self._bar: Any = None  # of tqdm: the one that stands on the last line

    def set_mode(self, progress: str) -> None:
        """Show it as --progress says: "auto" is a bar on a terminal, and plain lines elsewhere."""
        if progress != "auto":
            self.mode = progress
        elif self._output.err.isatty():
            self.mode = "bar"
        else:
            self.mode = "plain"
        if self.mode == "plain":
            self._output.has_times = True

    def leave_terminal(self) -> None:
        """Draw nothing any more: nobody looks. JSON events go on."""
        if self.mode != "json":
            self.mode = "none"

    def event(self, kind: str, **fields: object) -> None:
        """One JSON line, where --progress json asked for events."""
        if self.mode == "json":
            self._output.json_line({"event": kind, **fields})

    def say(self, text: str, level: str) -> None:
        """A line for people, or the event that carries it."""
        if self.mode == "json":
            self.event("log", level=level, text=text)
        else:
            self._output.line(text)

    @contextlib.contextmanager
    def watching(self, stage: Stage) -> Iterator[None]:
        """Show how far a stage is while it goes on, from a thread."""
        over = threading.Event()
        ticker = threading.Thread(
            target=self._show_until, args=(stage, over), name="progress", daemon=True
        )
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()

    @contextlib.contextmanager
    def ticking(self, clock: Clock) -> Iterator[None]:
        """Show for how long something is waited for, from a thread; a wait of less than a second is
        not shown."""
        over = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(clock, over), name="clock", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()

    def _tick(self, clock: Clock, over: threading.Event) -> None:
        interval_s = PLAIN_INTERVAL_S
        if self.mode == "bar":
            interval_s = CLOCK_INTERVAL_S
        is_shown = False
        while not over.wait(interval_s):
            is_shown = True
            self._show_clock(clock)
        if is_shown and self.mode == "bar":
            with self._output.terminal():
                self._show_waiting("")

    def _show_clock(self, clock: Clock) -> None:
        if self._output.verbosity < 0:
            return
        if self.mode == "json":
            seconds, limit_s = round(clock.seconds), round(clock.limit_s)
            self.event("clock", doing=clock.doing, seconds=seconds, limit=limit_s)
        elif self.mode == "plain":
            self.say(clock.text(), "info")
        elif self.mode == "bar":
            with self._output.terminal():
                self._show_waiting(cut(clock.text(), self._output.err_width - 1))

    def _show_until(self, stage: Stage, over: threading.Event) -> None:
        if self.mode == "bar":  # it stands there from the beginning
            self._show(stage, final=False)
        while not over.wait(INTERVALS_S.get(self.mode, PLAIN_INTERVAL_S)):
            self._show(stage, final=False)
        self._show(stage, final=True)

    def _show(self, stage: Stage, final: bool) -> None:
        """How far a stage is. One that ends before its first plain line has none."""
        if self._output.verbosity < 0 or not stage.total:
            return
        if self.mode == "json":
            self.event("progress", final=final, stage=stage.name, **stage.counts)
        elif self.mode == "bar":
            self._draw_bar(stage, final)
        elif self.mode == "plain" and (not final or stage.seconds > PLAIN_INTERVAL_S):
            self.say(stage.line(), "info")

    def countdown(self, seconds: int) -> None:
        """How long is still to be waited, as an event or beside the bar; 0 takes it away."""
        if self.mode == "json":
            self.event("waiting", seconds=seconds)
        elif self.mode == "bar" and self._output.verbosity >= 0:
            text = f"waiting {seconds} s" if seconds else ""
            with self._output.terminal():
                self._show_waiting(text)

    def _show_waiting(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        line = _LastLine(self._output)
        self._output.last_line = line if text else None
        line.write(text)

    def _draw_bar(self, stage: Stage, final: bool) -> None:
        try:
            from tqdm import tqdm
        except ImportError:  # hfship.py alone
            self.mode = "plain"
            return

        with self._output.terminal():
            if stage.bar is None:
                tqdm.monitor_interval = 0  # no thread that looks after bars: we update them
                self._set_bar(tqdm(**self._bar_options(stage)))
                stage.bar = self._bar
                return
            stage.bar.set_description(stage.label, refresh=False)
            stage.bar.total = stage.total
            stage.bar.initial = stage.skipped
            moved = stage.done - stage.bar.n
            if moved:
                stage.bar.update(moved)
            else:  # its clock goes on
                stage.bar.refresh()
            if final:
                stage.bar.close()
                self._set_bar(None)

    def _set_bar(self, bar: Any) -> None:
        self._bar = bar
        self._output.last_line = bar

    def _bar_options(self, stage: Stage) -> Dict[str, Any]:
        """The arguments of tqdm for a new bar."""
        options: Dict[str, Any] = {
            "desc": stage.label,
            "total": stage.total,
            "file": self._output.err,
            "dynamic_ncols": True,
            "mininterval": 0,
        }
        if stage.unit == "B":
            options.update(unit="B", unit_scale=True, unit_divisor=1000)
        else:
            options["unit"] = " " + stage.unit

        return options
