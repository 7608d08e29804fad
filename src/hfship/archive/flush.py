# SPDX-License-Identifier: Apache-2.0
"""Work for the disk beside the work for the processor: done in order, while the caller goes on."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Callable, Deque, Optional

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# Bytes between flushes: Ctrl-C must not wait until gigabytes reached a slow medium.
FLUSH_SIZE = 64 << 20


class SerialExecutor:
    """One thread that makes calls in the order in which they are submitted; at most two wait.

    A context manager: what still waits at its end is not done any more.
    """

    def __init__(self) -> None:
        self._pool: Optional[ThreadPoolExecutor] = None  # until the first call
        self._pending: Deque[Future[Any]] = deque()

    def __enter__(self) -> SerialExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.cancel()
        if self._pool:
            self._pool.shutdown()

    def submit(self, work: Callable[..., Any], *args: Any) -> None:
        """Queue a call; wait while more than two are queued. Raises what an earlier one raised."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor  # verify needs none

            self._pool = ThreadPoolExecutor(1)
        future = self._pool.submit(work, *args)
        self._pending.append(future)
        self.drain(2)

    def drain(self, left: int = 0) -> None:
        """Wait until at most `left` calls are queued. Raises what one of them raised."""
        while len(self._pending) > left:
            oldest = self._pending.popleft()
            oldest.result()
