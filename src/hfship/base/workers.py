# SPDX-License-Identifier: Apache-2.0
"""Forked workers: tasks in, results out, on as many cores as there are.

Promises: no worker outlives this process; what ends a worker, or a task of it, is raised here.

concurrent.futures.ProcessPoolExecutor does not do: it gives a task to any worker, and here the
tasks of a file belong to one, in their order, and a connection to the worker that opened it; of a
worker that was killed it says BrokenProcessPool, not by which signal; it has no word for what a
task has done so far; its workers outlive a parent that is killed; and it pickles the function.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import selectors
import signal
import socket
import threading
import warnings
from collections import deque
from typing import Any, Callable, Deque, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from hfship.base.errors import HfshipError, HostError
from hfship.base.processes import ENDING_SIGNALS, end_with_parent, libc, signals_held

FORK_SIZE = 8 << 20  # bytes from which on workers are forked
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h

Task = Tuple[Any, ...]  # the arguments of `work` behind `count`


def default_jobs() -> int:
    """One worker per core that this process may use."""
    cores = os.sched_getaffinity(0)
    return len(cores)


class Outcome(NamedTuple):
    """How a worker's task ended: what it raised and the cause of that, or its result."""

    error: Optional[BaseException] = None
    cause: Optional[BaseException] = None
    result: Any = None


class _Link:
    """One end of the way between us and a worker: messages both ways, pickled, each behind its size
    (4 bytes, big-endian).

    multiprocessing.Connection does the same with twice the calls of the kernel, of which there are
    thousands a second: two to read a message, and a new poll object for each wait.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def __del__(self) -> None:
        self.close()  # else Python warns

    def send(self, message: Any) -> None:
        """Send a message. Raises OSError when the other end is gone, and what pickle raises."""
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._socket.sendall(len(content).to_bytes(4, "big") + content)

    @property
    def has_message(self) -> bool:
        """Whether a whole message was received."""
        received = self._received
        return len(received) >= 4 and len(received) >= 4 + int.from_bytes(received[:4], "big")

    def receive(self) -> Any:
        """The next message. Raises EOFError, or OSError, when the other end is gone."""
        while not self.has_message:
            content = self._socket.recv(1 << 16)
            if not content:
                raise EOFError
            self._received += content
        end = 4 + int.from_bytes(self._received[:4], "big")
        message = pickle.loads(memoryview(self._received)[4:end])
        del self._received[:end]
        return message


class Done(NamedTuple):
    """A task that is done, the number of its worker, and its result."""

    worker: int
    task: Task
    result: Any


class Workers:
    """Workers that each run `work(count, *task)` for the tasks they are sent, one after the other.

    A context manager; entering forks, and raises HostError when that fails. Workers know all that
    this process knows then; tasks and results are pickled and should be small: data goes through
    files and slots. What a task passes to `count` goes to `progress` here.

    With a `count` of 0 tasks run in this process: forking is not worth it. With more workers than
    `most`, they are threads of that many processes: connections, which wait more than they compute.
    """

    def __init__(
        self,
        count: int,
        work: Callable[..., Any],
        progress: Callable[[Any], None] = lambda _: None,
        most: int = 1 << 10,
    ) -> None:
        self.count = count
        self._work = work
        self._progress = progress
        self._processes = min(count, most)
        self._tasks: List[Deque[Task]] = [deque() for _ in range(max(count, 1))]
        self._links: List[_Link] = []  # of each worker
        self._selector: Optional[selectors.BaseSelector] = None  # of the links
        self._pids: List[int] = []  # of each process
        # Workers that have sent something; without workers the results.
        self._ready: Deque[Any] = deque()

    def __enter__(self) -> Workers:
        if self.count:
            try:
                with signals_held():
                    self._start()
            except BaseException:
                self.__exit__()
                raise

        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._pids:
            # Children of a process that ignores SIGCHLD leave nothing to signal or to wait for.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        for pid in self._pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

        self._links = []  # each is closed when nobody waits at it any more
        if self._selector:
            self._selector.close()
        self._ready.clear()

    def _start(self) -> None:
        """Fork all processes, or raise HostError with some of them running."""
        _tune_malloc()
        far_ends: List[_Link] = []
        try:
            with _no_collection():
                for _ in range(self.count):
                    ours, far_end = socket.socketpair()
                    self._links.append(_Link(ours))
                    far_ends.append(_Link(far_end))
                for number in range(self._processes):
                    own = far_ends[number :: self._processes]
                    self._fork(own, [link for link in far_ends if link not in own])
        except OSError as exc:
            raise _short_of_memory("cannot start a worker", str(exc)) from exc
        finally:
            for link in far_ends:
                link.close()

    def _fork(self, own: Sequence[_Link], others: Sequence[_Link]) -> None:
        """One process with a worker at each of its `own` links; `others` are those of the
        others."""
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns when there are threads. Ours, progress and the heartbeat of a lock,
            # share no lock with workers.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()

        if pid:
            self._pids.append(pid)
            return

        try:
            for ending in ENDING_SIGNALS:  # these are for the parent, which then ends us
                signal.signal(ending, signal.SIG_IGN)
            has_parent = end_with_parent(parent, signal.SIGKILL)
            for link in [*self._links, *others]:
                link.close()  # else nobody would see the end of the other processes
            if has_parent:
                self._serve_all(own)
        finally:
            os._exit(0)

    # -- in a worker

    def _serve_all(self, links: Sequence[_Link]) -> None:
        first, *others = links
        for link in others:
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()
        self._serve(first)

    def _serve(self, link: _Link) -> None:
        """What a worker does until its parent is gone."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                task = link.receive()
                outcome = self._outcome_of(task, link.send)
                try:
                    link.send(outcome)
                except (AttributeError, TypeError, ValueError, pickle.PicklingError) as exc:
                    # It cannot be pickled, and the parent waits for an answer.
                    what = RuntimeError(f"{type(outcome.error).__name__}: {exc}")
                    link.send(Outcome(what, outcome.cause))

    def _outcome_of(self, task: Task, count: Callable[[Any], None]) -> Outcome:
        try:
            return Outcome(result=self._work(count, *task))
        except HfshipError as exc:
            cause = exc.__cause__
            if not isinstance(cause, (OSError, RuntimeError)):
                cause = None  # it may not be fit for a pipe
            return Outcome(exc, cause)
        except BaseException as exc:  # noqa: BLE001 - the parent raises it
            import traceback  # loads much that a run without a fault has no use for

            return Outcome(exc, RuntimeError(traceback.format_exc()))

    # -- in the parent

    def send(self, worker: int, *task: Any) -> None:
        """Give a worker another task."""
        self._tasks[worker].append(task)
        if not self.count:
            self._ready.append(self._work(self._progress, *task))
            return
        # A worker that is gone is noticed by who waits for its result.
        with contextlib.suppress(ConnectionError, IndexError):
            self._links[worker].send(task)

    @property
    def busy(self) -> bool:
        """Whether there are tasks whose results were not received."""
        return any(self._tasks)

    def receive(self) -> Done:
        """The next task that is done. Raises what it raised, HostError when its worker was
        ended."""
        if not self.count:
            return Done(0, self._tasks[0].popleft(), self._ready.popleft())

        while True:
            if not self._ready:
                self._ready.extend(self._wait())
            worker = self._ready.popleft()
            outcome = self._next_message(worker)
            if self._links[worker].has_message:
                self._ready.append(worker)
            if outcome:
                return Done(worker, self._tasks[worker].popleft(), outcome.result)

    def _wait(self) -> List[int]:
        """Wait for workers to send something."""
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
            for worker, link in enumerate(self._links):
                self._selector.register(link, selectors.EVENT_READ, worker)
        return [key.data for key, _ in self._selector.select()]

    def call(self, worker: int, *task: Any) -> Any:
        """Run a task on a worker that nobody else uses meanwhile, and wait for its result.

        For a thread per worker. Raises as `receive` does.
        """
        self.send(worker, *task)
        outcome = None
        while outcome is None:
            outcome = self._next_message(worker)
        self._tasks[worker].popleft()
        return outcome.result

    def _next_message(self, worker: int) -> Optional[Outcome]:
        """The outcome that a worker sends; None if it was progress. Raises what its task raised."""
        try:
            message = self._links[worker].receive()
        except (EOFError, ConnectionError, IndexError) as exc:
            raise self._end_of(worker) from exc

        if not isinstance(message, Outcome):
            self._progress(message)
            return None
        if isinstance(message.error, MemoryError):
            raise _short_of_memory("a worker got no more memory", "") from message.error
        if message.error:
            raise message.error from message.cause

        return message

    def _end_of(self, worker: int) -> HostError:
        """The error of a worker that is gone."""
        pid = self._pids[worker % self._processes]
        ended_by = "us"
        with contextlib.suppress(ChildProcessError):
            # WNOWAIT: `__exit__` waits for it too.
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            if end and end.si_code == os.CLD_EXITED:
                ended_by = f"status {end.si_status}"
            elif end:
                ended_by = signal.Signals(end.si_status).name

        why = "where memory is short, the kernel does so"
        return _short_of_memory(f"a worker was ended by {ended_by}", why)

    def run(self, next_task: Callable[[int, bool], Optional[Task]]) -> Iterator[Done]:
        """Keep every worker at up to two tasks that `next_task(worker, idle)` has for it; yield
        those that are done, until there are no more. Raises as `receive` does."""
        while True:
            for worker, waiting in enumerate(self._tasks):
                while len(waiting) < 2:
                    task = next_task(worker, not waiting)
                    if task is None:
                        break
                    self.send(worker, *task)
            if not self.busy:
                return
            yield self.receive()

    def map(self, items: Sequence[Any]) -> List[Any]:
        """The results of `work(count, item)` for all items, in their order."""
        left = iter(items)

        def next_task(_: int, idle: bool) -> Optional[Task]:
            if idle:
                for item in left:
                    return (item,)
            return None

        results = {}
        for done in self.run(next_task):
            (item,) = done.task
            results[item] = done.result

        return [results[item] for item in items]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """What is there at a fork inside is never collected by a worker, whose first collection would
    copy all memory that it shares with us."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _tune_malloc() -> None:
    """Keep the memory of a frame for the next one: the kernel would have to fill it with zeros
    anew."""
    c_library = libc()
    with contextlib.suppress(AttributeError):  # no ctypes, or no mallopt in this C library
        c_library.mallopt(_M_MMAP_THRESHOLD, FORK_SIZE)
        c_library.mallopt(_M_TRIM_THRESHOLD, 8 * FORK_SIZE)


def _short_of_memory(what: str, why: str) -> HostError:
    step = "run the same command again, it goes on where it stopped; -j 1 needs least memory"
    return HostError(what, why, step)
