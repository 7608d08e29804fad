# SPDX-License-Identifier: Apache-2.0
"""Holding back a run: while the Hub wants us to wait, and to the rate that the operator allows.

Owns the gate that every request passes, the stand-in for it (and for the reporter) in forked
processes, and the limit of bytes per second.
Promises: one 429 holds back all requests of the run; a run that is being stopped waits no
longer.
Never: sends anything to the Hub.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable, Optional, Union

from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.base.report import Reporter

SHOWN_WAIT_S = 1.0  # a shorter wait is not worth a line


class RateLimit:
    """Holds all workers together to a number of bytes per second; None does not hold."""

    def __init__(self, bytes_per_second: Optional[float], stop: threading.Event) -> None:
        self.bytes_per_second = bytes_per_second
        self._stop = stop
        self._lock = threading.Lock()
        self._free_at = 0.0  # of the monotonic clock

    def wait(self, count: int) -> None:
        """Return when `count` more bytes are within the limit."""
        if not self.bytes_per_second:
            return

        with self._lock:
            now = time.monotonic()
            began = max(now, self._free_at)
            self._free_at = began + count / self.bytes_per_second
            wait_s = self._free_at - now

        self._stop.wait(wait_s)


class Gate:
    """Holds back every request of this process while the Hub wants us to wait (429)."""

    def __init__(self, reporter: Reporter, stop: threading.Event) -> None:
        self._reporter = reporter
        self._stop = stop
        self._lock = threading.Lock()
        self._open_at = 0.0  # of the monotonic clock
        self._counting = False  # is there a thread that shows what is left?

    def hold(self, seconds: float, reason: str) -> None:
        """Close the gate for `seconds` from now on, and show how long that still is."""
        with self._lock:
            open_at = time.monotonic() + seconds
            is_longer = open_at > self._open_at + SHOWN_WAIT_S
            if is_longer and seconds > SHOWN_WAIT_S:
                self._reporter.info(f"{reason}: waiting {seconds:.0f} s")
            self._open_at = max(self._open_at, open_at)
            if not self._counting:
                self._counting = True
                threading.Thread(target=self._count_down, daemon=True).start()

    def _count_down(self) -> None:
        """Show once a second what is left, until the gate is open or the run ends."""
        while True:
            with self._lock:
                left_s = self._open_at - time.monotonic()
                if left_s <= 0 or self._stop.is_set():
                    self._counting = False
                    break
            self._reporter.countdown(left_s)
            self._stop.wait(min(1.0, left_s))

        self._reporter.countdown(0)

    def wait(self) -> None:
        """Return when the gate is open. Raises KeyboardInterrupt when the run is being stopped."""
        while True:
            if self._stop.is_set():
                raise KeyboardInterrupt
            left_s = self._open_at - time.monotonic()
            if left_s <= 0:
                return
            self._stop.wait(min(left_s, 1.0))


@dataclass(frozen=True)
class LineMessage:
    """A line for the reporter of the parent process."""

    text: str
    is_detail: bool


@dataclass(frozen=True)
class HoldMessage:
    """The parent's gate is to be closed for `seconds`."""

    seconds: float
    reason: str


ProxyMessage = Union[LineMessage, HoldMessage]


class ParentProxy:
    """Stands for the parent's Reporter and Gate in a forked process.

    It sends what they are to do; `HubClient.receive` does it in the parent. Without `with_details`
    it keeps those to itself: thousands of small files have one each.
    """

    def __init__(self, send: Callable[[ProxyMessage], None], with_details: bool = True) -> None:
        self._send = send
        self._with_details = with_details

    def info(self, text: str) -> None:
        """Have a line said."""
        self._send(LineMessage(text, is_detail=False))

    def detail(self, text: str) -> None:
        """Have a line said to who wants details."""
        if self._with_details:
            self._send(LineMessage(text, is_detail=True))

    def hold(self, seconds: float, reason: str) -> None:
        """Have the gate closed for `seconds`."""
        self._send(HoldMessage(seconds, reason))

    def wait(self) -> None:
        """Return at once: the parent passes its gate before it sends us a task."""
