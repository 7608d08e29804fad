# SPDX-License-Identifier: Apache-2.0
"""Other programs: the one way to run them.

Promises: no other program gets a token, a key or a password in its environment; none outlives us,
also when we are killed; one that is missing or cannot be run is a HostError that names it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    TypeVar,
    Union,
)

from hfship.base.errors import HostError
from hfship.base.redaction import is_secret_variable
from hfship.base.values import dataclass

MOST_OUTPUT = 16 << 20  # bytes of memory for what a program says
_LINE = 64  # bytes that Python needs for a line, beside its text
END_S = 5.0  # a program that was asked to end is killed after that
T = TypeVar("T")
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Completed:
    """What another program left: exit status and output, and why it was ended by us ("": it ended
    by itself, or was stopped)."""

    code: int
    out: str
    err: str
    ended: str = ""


def without_secrets(more: Optional[Mapping[str, str]] = None) -> Dict[str, str]:
    """The environment of another program: ours, less what is secret in it, and `more`.

    What other programs need of it they keep: ssh its agent, docker its host, all of them PATH.
    """
    environ = {}
    for name, value in os.environ.items():
        if not is_secret_variable(name, value):
            environ[name] = value
    if more:
        environ.update(more)
    return environ


@lru_cache(maxsize=None)
def libc() -> Any:
    """The C library; None for a Python without ctypes."""
    with contextlib.suppress(ImportError, OSError):
        return importlib.import_module("ctypes").CDLL(None)
    return None


def end_with_parent(parent: int, by: signal.Signals) -> bool:
    """In a new child of `parent`: have the kernel end it by that signal when the thread that made
    it is gone (prctl(2)). False when it is gone already."""
    c_library = libc()
    if c_library:
        c_library.prctl(_PR_SET_PDEATHSIG, by)
    return os.getppid() == parent


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and the like wait until the end of the block, and are raised there: for what must not
    be torn in two, as a fork or the making of a file that somebody has to remove.

    In another thread than the main one, where Python raises none of them, nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    caught: List[int] = []
    handlers: Dict[int, Any] = {}
    for ending in ENDING_SIGNALS:
        if callable(signal.getsignal(ending)):
            handlers[ending] = signal.signal(ending, lambda got, _: caught.append(got))

    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if caught:
        first = caught[0]
        handlers[first](first, None)


def _bound_to_us() -> Callable[[], None]:
    """What a new child does before it becomes the other program.

    SIGTERM lets it end its own children: the ssh of rsync, the container of docker.
    """
    us = os.getpid()
    libc()  # loaded here: after a fork nothing may wait for the lock of an import

    def bind() -> None:
        if not end_with_parent(us, signal.SIGTERM):
            os._exit(1)

    return bind


class Aside(Generic[T]):
    """A call that waits for another program, made beside other work.

    >>> Aside(lambda: 1 + 1).result()
    2
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._returned: List[T] = []
        self._raised: Optional[BaseException] = None
        # A daemon: who ends meanwhile need not wait for it.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            value = self._call()
            self._returned.append(value)
        except BaseException as exc:  # noqa: BLE001 - raised where the result is asked for
            self._raised = exc

    def result(self) -> T:
        """What the call returned, once it has. Raises what it raised."""
        self._thread.join()
        if self._raised:
            raise self._raised
        return self._returned[0]


@contextlib.contextmanager
def started(
    argv: Sequence[str],
    env: Optional[Mapping[str, str]] = None,
    stdin: Any = subprocess.DEVNULL,
    **options: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """Another program while it runs, with `options` of Popen; at the end one waits for it.

    `env` is added to our own environment, which is passed on without secrets. Raises HostError when
    it cannot be started.
    """
    with _start_errors(argv[0]):
        process = subprocess.Popen(
            list(argv), env=without_secrets(env), stdin=stdin, preexec_fn=_bound_to_us(), **options
        )
    try:
        yield process
    finally:
        # What it did not read any more is no error of ours: its exit status tells. And it would
        # hide the one with which we leave.
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        with process:
            pass


def run_program(
    argv: Sequence[str],
    stdin: Union[str, bytes, None] = None,
    env: Optional[Mapping[str, str]] = None,
    cwd: Optional[Path] = None,
    timeout_s: Optional[float] = None,
) -> Completed:
    """Run another program to its end and keep its output. Without `stdin` it gets an empty one.

    `env` is as for `started`. Raises HostError when the program is missing or takes longer than
    `timeout_s`; a non-zero exit status is the caller's to judge.
    """
    data = stdin or b""
    if isinstance(data, str):
        data = data.encode()

    pipe = subprocess.PIPE
    with started(argv, env, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            out, err = process.communicate(data, timeout_s)
        except subprocess.TimeoutExpired as exc:
            process.kill()
            why = f"no end within {timeout_s:.0f} s"
            raise HostError(f"{argv[0]} did not answer", why, f"run {argv[0]} by hand") from exc
        except BaseException:  # Ctrl-C, which it got as well
            process.kill()
            raise

    return Completed(process.returncode, _text(out), _text(err))


def program_lines(argv: Sequence[str]) -> Iterator[str]:
    """The lines that another program writes to stdout and stderr, as they come, however many.

    Raises HostError where it cannot be started.
    """
    with started(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            for line in process.stdout or ():
                yield _text(line).rstrip("\n")
        finally:
            process.terminate()


def _text(output: Union[bytes, bytearray]) -> str:
    return output.decode("utf-8", "replace")


@contextlib.contextmanager
def _start_errors(program: str) -> Iterator[None]:
    """Raises as HostError that a program cannot be started."""
    try:
        yield
    except FileNotFoundError as exc:
        why = f"{program} was not found on PATH"
        raise HostError(f"{program} is not installed", why, f"install {program}") from exc
    except PermissionError as exc:
        step = f"check the permissions of {program}"
        raise HostError(f"{program} cannot be run", str(exc), step) from exc


class _Lines:
    """What a program says in one of its streams, line by line; `on_line` is that of
    follow_program."""

    def __init__(self, on_line: Callable[[str], bool] = lambda _: False) -> None:
        self._on_line = on_line
        self._kept: List[str] = []
        self._rest = bytearray()  # of a line that is not ended yet
        self._size = 0  # bytes of memory for those that are kept
        self.taken_at = time.monotonic()  # when a line came last that was taken

    def add(self, piece: bytes) -> None:
        """Take what was read."""
        first, *others = re.split(rb"[\r\n]+", piece)
        self._rest += first
        for line in others:
            self._end_line()
            self._rest += line

    def _end_line(self) -> None:
        line = _text(self._rest)
        self._rest.clear()
        if self._on_line(line):
            self.taken_at = time.monotonic()
        else:
            self._kept.append(line)
            self._size += _LINE + len(line)

    @property
    def size(self) -> int:
        """Bytes of memory that it takes."""
        return self._size + len(self._rest)

    def text(self) -> str:
        """The lines that are kept, and the one that is not ended."""
        return "\n".join([*self._kept, _text(self._rest)]).strip()


def follow_program(
    argv: Sequence[str],
    stop: threading.Event,
    stdin: str = "",
    on_line: Callable[[str], bool] = lambda _: False,
    patience_s: float = float("inf"),
) -> Completed:
    """Run another program in a session of its own, with all that it starts, for as long as `stop`
    is not set.

    Each line of its stdout, ended by LF or CR, goes to `on_line` as it comes; those for which that
    returns False are kept. The program is ended when no line was taken for `patience_s`, or when
    what is kept would need more than MOST_OUTPUT. Raises HostError when it cannot be started.
    """
    pipe = subprocess.PIPE
    out, err = _Lines(on_line), _Lines()
    with started(
        argv, {"LC_ALL": "C"}, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stderr
        streams = {process.stdout.fileno(): out, process.stderr.fileno(): err}
        try:
            ended = _converse(process, stdin.encode(), streams, stop, patience_s)
        finally:
            if process.returncode is None:
                _end_session(process)

    return Completed(process.returncode, out.text(), err.text(), ended)


def _converse(
    process: subprocess.Popen[bytes],
    data: bytes,
    streams: Mapping[int, _Lines],
    stop: threading.Event,
    patience_s: float,
) -> str:
    """Write `data` to a program and read what it says, to its end, or until it is to be ended; why,
    or ""."""
    assert process.stdin
    unread = set(streams)
    while unread and not stop.is_set():
        reason = _reason_to_end(list(streams.values()), patience_s)
        if reason:
            return reason
        if not data:
            process.stdin.close()
        inputs = [process.stdin] if data else []
        readable, writable, _ = select.select(unread, inputs, [], 0.2)
        if writable:
            data = _written(process.stdin.fileno(), data)
        for fd in readable:
            piece = os.read(fd, 1 << 16)
            streams[fd].add(piece)
            if not piece:
                unread.remove(fd)

    if not unread:
        process.wait()
    return ""


def _reason_to_end(streams: Sequence[_Lines], patience_s: float) -> str:
    """Why a program is not waited for any longer; "" while it is."""
    taken_at = max(lines.taken_at for lines in streams)
    if time.monotonic() - taken_at > patience_s:
        return f"no answer within {patience_s:.0f} s"
    if sum(lines.size for lines in streams) > MOST_OUTPUT:
        return "it does not stop saying things that mean nothing here"
    return ""


def _written(fd: int, data: bytes) -> bytes:
    """Write a piece to a pipe that is ready for it; the rest, none where nobody reads it."""
    try:
        written = os.write(fd, data[: select.PIPE_BUF])  # no more: it would wait
    except BrokenPipeError:
        return b""
    return data[written:]


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
            return
