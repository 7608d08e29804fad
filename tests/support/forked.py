# SPDX-License-Identifier: Apache-2.0
"""hfship from source in a copy of the process that tests it: for tests/mutate.py, which waits for
little else than Pythons that start. The suite itself starts programs as operators do."""

from __future__ import annotations

import gc
import os
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, Dict, List, Mapping, Optional, Sequence

# What a start takes from its environment is that of the copied process here.
_OF_A_START = ("LANG", "LC_ALL", "TZ", "PYTHONPATH")
_KNOWN = {"env", "cwd", "timeout", "capture_output", "text", "check", "input"}


def run_forked(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run does it, for what can be done so; that itself for the rest."""
    env: Mapping[str, str] = options.get("env") or os.environ
    same_start = all(env.get(name) in (None, os.environ.get(name)) for name in _OF_A_START)
    same_python = argv[0] == sys.executable and argv[1].endswith("hfship.py")
    captures = options.get("capture_output") and options.get("text")
    if not (same_start and same_python and captures and _KNOWN.issuperset(options)):
        return subprocess.run(argv, **options)  # type: ignore[no-any-return]
    with tempfile.TemporaryFile() as given:
        given.write((options.get("input") or "").encode())
        given.seek(0)
        pipes = [os.pipe(), os.pipe()]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become(argv, env, options.get("cwd"), [given.fileno(), pipes[0][1], pipes[1][1]])
        for _, write in pipes:
            os.close(write)
        said = _all_said([read for read, _ in pipes], pid, argv, options.get("timeout"))
    _, status = os.waitpid(pid, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    out, err = (text.decode("utf-8").replace("\r\n", "\n") for text in said)
    return subprocess.CompletedProcess(list(argv), code, out, err)


def _become(argv: Sequence[str], env: Mapping[str, str], cwd: Any, own: List[int]) -> None:
    """Be that program, and end as it does. Does not return."""
    code = 1
    try:
        gc.freeze()  # what the tests hold must not close what is ours by its number
        for target, fd in enumerate([os.dup(fd) for fd in own]):
            os.dup2(fd, target)
        os.closerange(3, 1024)
        os.environ.clear()
        os.environ.update(env)
        if cwd is not None:
            os.chdir(cwd)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(signum, signal.SIG_DFL)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        sys.argv = list(argv[1:])
        runpy.run_path(argv[1], run_name="__main__")
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:  # noqa: BLE001 - it is told, and ends us
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 120
        os._exit(code)


def _all_said(
    fds: Sequence[int], pid: int, argv: Sequence[str], timeout_s: Optional[float]
) -> List[bytes]:
    """What comes out of some pipes until all are closed. Raises TimeoutExpired."""
    deadline = time.monotonic() + (timeout_s or 3600)
    said: Dict[int, bytes] = dict.fromkeys(fds, b"")
    with selectors.DefaultSelector() as ready:
        for fd in fds:
            ready.register(fd, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select(max(0.0, deadline - time.monotonic())):
                piece = os.read(key.fd, 1 << 16)
                said[key.fd] += piece
                if not piece:
                    ready.unregister(key.fd)
                    os.close(key.fd)
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise subprocess.TimeoutExpired(list(argv), timeout_s or 0)
    return list(said.values())
