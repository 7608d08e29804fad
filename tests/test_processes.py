"""Other programs: what they are given, and what is said when they are missing."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List, Optional, Tuple

import pytest

from conftest import ROOT
from hfship.base import processes
from hfship.base.errors import HostError
from hfship.base.processes import (
    END_S,
    Aside,
    Completed,
    end_with_parent,
    follow_program,
    libc,
    program_lines,
    run_program,
    signals_held,
    started,
    without_secrets,
)

SECRETS = {
    "HF_TOKEN": "abc1",
    "HUGGING_FACE_HUB_TOKEN": "abc2",
    "HF_HUB_TOKEN": "abc3",
    "HFSHIP_MIRROR_TOKEN": "abc4",
    "AWS_SECRET_ACCESS_KEY": "abc5",
    "WANDB_API_KEY": "abc6",
    "PGPASSWORD": "abc7",
    "https_proxy": "http://me:abc8@proxy",
    "ALL_PROXY": "abc9@proxy",
    "MINE": "hf_" + 34 * "a",
}
PLAIN = {
    "PATH": "/usr/bin:/bin",
    "SSH_AUTH_SOCK": "/run/agent",
    "SSH_ASKPASS": "/usr/bin/ask",
    "DOCKER_HOST": "ssh://me@host",
    "HF_TOKEN_PATH": "/home/me/token",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HFSHIP_KEY": "/home/me/site.pub.pem",
    "TOKENIZERS_PARALLELISM": "8",
    "NO_PROXY": "localhost",
    "http_proxy": "http://proxy:3128",
}


def test_other_programs_get_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, **PLAIN}.items():
        monkeypatch.setenv(name, value)
    for run in (run_program, follow):
        lines = run(["env"]).out.splitlines()
        assert [
            name for name in SECRETS if any(line.startswith(name + "=") for line in lines)
        ] == []
        assert [f"{name}={value}" for name, value in PLAIN.items()] == [
            f"{name}={value}" for name, value in PLAIN.items() if f"{name}={value}" in lines
        ]
    assert "abc1" in run_program(["env"], env={"HF_TOKEN": "abc1"}).out


def follow(argv: List[str]) -> Completed:
    return follow_program(argv, threading.Event())


def test_missing_program_is_named() -> None:
    with pytest.raises(HostError, match="no-such-program is not installed"):
        run_program(["no-such-program"])


def test_what_a_program_did_not_read_hides_no_error() -> None:
    """A killed program leaves bytes for it in our buffer, which cannot be written at the end."""
    with pytest.raises(KeyError), started(["sleep", "60"], stdin=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(b"x")
        process.kill()
        process.wait()
        raise KeyError
    assert process.stdin.closed and process.returncode == -9


WAYS = {
    "run_program": "run_program(argv)",
    "follow_program": "follow_program(argv, threading.Event())",
    "in a thread": "worker = threading.Thread(target=run_program, args=(argv,)); worker.start()",
    "started": "process = started(argv); process.__enter__(); time.sleep(60)",
    "worker": """
workers = Workers(1, lambda count: os.execvp(argv[0], argv)); workers.__enter__()
workers.call(0)""",
}


@pytest.mark.parametrize("way", WAYS)
def test_no_program_outlives_us(way: str, tmp_path: Path) -> None:
    """Nor does a worker, when we are killed by the kernel."""
    pid_file = tmp_path / "pid"
    script = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT / "src")!r})
from hfship.base.processes import follow_program, run_program, started
from hfship.base.workers import Workers
argv = ["sh", "-c", "echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 60"]
{WAYS[way]}
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not pid_file.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    child = int(pid_file.read_text())
    process.kill()
    process.wait()
    while runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody waits for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(") ")[2][0] != "Z"


def test_all_that_a_program_started_ends_with_stop(tmp_path: Path) -> None:
    pid_file, stop = tmp_path / "pid", threading.Event()

    def stop_soon() -> None:
        while not pid_file.exists():
            time.sleep(0.02)
        time.sleep(0.1)
        stop.set()

    threading.Thread(target=stop_soon).start()
    began = time.monotonic()
    done = follow_program(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], stop)
    assert done.code and time.monotonic() - began < 30
    while runs(int(pid_file.read_text())):
        assert time.monotonic() - began < 30
        time.sleep(0.02)


@pytest.mark.parametrize("silent", [True, False])
def test_a_sign_of_life_is_a_line_that_is_taken(silent: bool) -> None:
    script = "for i in $(seq 20); do echo $i; sleep 0.2; done"
    done = follow_program(
        ["sh", "-c", script], threading.Event(), "", lambda _: not silent, patience_s=2.0
    )
    assert bool(done.ended) is silent
    assert done.out.startswith("1\n2") is silent


def test_output_that_does_not_end_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.base.processes.MOST_OUTPUT", 1 << 20)
    for command in ("yes", "cat /dev/zero", "yes >&2"):
        done = follow_program(["sh", "-c", command], threading.Event())
        assert "does not stop" in done.ended
        assert len(done.out) + len(done.err) < 3 << 20


def test_a_program_that_does_not_end_is_ended_and_told() -> None:
    began = time.monotonic()
    with pytest.raises(HostError) as caught:
        run_program([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2)
    assert time.monotonic() - began < 30
    assert (caught.value.why, caught.value.next_step) == (
        "no end within 0 s",
        f"run {sys.executable} by hand",
    )


def test_ctrl_c_while_a_program_runs_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_program([sys.executable, "-c", "import time; time.sleep(60)"])


@pytest.fixture
def got() -> Iterator[List[str]]:
    """The signals that came through, SIGTERM and SIGINT; SIGHUP is ignored."""
    came: List[str] = []

    def note(signum: int, _: object) -> None:
        came.append(signal.Signals(signum).name)

    handlers = {signal.SIGTERM: note, signal.SIGINT: note, signal.SIGHUP: signal.SIG_IGN}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    yield came
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_signals_wait_until_the_block_is_over(got: List[str]) -> None:
    with signals_held():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGINT)
        assert got == []
    assert got == ["SIGTERM"]  # the first
    signal.raise_signal(signal.SIGINT)
    assert got == ["SIGTERM", "SIGINT"]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with signals_held():
        pass
    assert got == ["SIGTERM", "SIGINT"]


def test_signals_are_not_lost_where_the_block_fails(got: List[str]) -> None:
    with pytest.raises(KeyError), signals_held():
        raise KeyError
    signal.raise_signal(signal.SIGTERM)
    assert got == ["SIGTERM"]


def test_another_thread_holds_no_signals(got: List[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: List[object] = []

    def work() -> None:
        with signals_held():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] and got == []


@pytest.mark.parametrize(
    "pieces, taken, kept, rest",
    [
        ([b"a\nb\n"], ["a", "b"], "", 0),
        ([b"a", b"b\r", b"c"], ["ab"], "c", 1),
        ([b"-a\n", b"-b\n\n", b"c\r\nd"], ["c"], "-a\n-b\nd", 1),
        ([b"\xc3", b"\xa9\n-\xff\n"], ["\xe9"], "-\ufffd", 0),
        ([b"", b"  x  "], [], "x", 5),
    ],
)
def test_lines_are_taken_or_kept_as_they_come(
    pieces: List[bytes], taken: List[str], kept: str, rest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that is kept takes memory beside its text, however short it is."""
    now = [100.0]
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    came: List[str] = []

    def take(line: str) -> bool:
        if line.startswith("-") or not line:
            return False
        came.append(line)
        return True

    lines = processes._Lines(take)
    assert lines.taken_at == 100.0
    now[0] = 107.0
    for piece in pieces:
        lines.add(piece)
    assert came == taken and lines.text() == kept
    assert lines.taken_at == (107.0 if taken else 100.0)
    whole = lines._kept
    assert lines.size == sum(64 + len(line) for line in whole) + rest
    untaken = processes._Lines()
    untaken.add(b"a\n")
    assert untaken.text() == "a" and untaken.taken_at == 107.0


@pytest.mark.parametrize(
    "taken_ago, sizes, reason",
    [
        ([5.0, 9.0], [0, 0], ""),
        ([5.1, 9.0], [0, 0], "no answer within 5 s"),
        ([9.0, 4.0], [0, 0], ""),
        ([0.0, 0.0], [8 << 20, 8 << 20], ""),
        ([0.0, 0.0], [8 << 20, (8 << 20) + 1], "it does not stop saying things that mean nothing"),
    ],
)
def test_why_a_program_is_not_waited_for(
    taken_ago: List[float], sizes: List[int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: 100.0))
    streams: Any = [
        SimpleNamespace(taken_at=100.0 - ago, size=size) for ago, size in zip(taken_ago, sizes)
    ]
    found = processes._reason_to_end(streams, 5.0)
    assert found.startswith(reason) and bool(found) == bool(reason)
    assert processes._reason_to_end(streams[:1], float("inf")) == ""


def test_a_pipe_is_given_what_it_takes_at_once() -> None:
    reader, writer = os.pipe()
    data = bytes(2 * select.PIPE_BUF + 5)
    assert len(processes._written(writer, data)) == select.PIPE_BUF + 5
    assert len(os.read(reader, 1 << 20)) == select.PIPE_BUF
    os.close(reader)
    assert processes._written(writer, data) == b""  # nobody reads it
    os.close(writer)


@pytest.mark.parametrize(
    "ends_at, sent",
    [
        (1, [signal.SIGTERM]),
        (2, [signal.SIGTERM, signal.SIGKILL]),
        (9, [signal.SIGTERM, signal.SIGKILL]),
    ],
)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_program_is_asked_to_end_and_then_killed(
    ends_at: int, sent: List[int], is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: List[Any] = []

    def killpg(pid: int, how: int) -> None:
        events.append((pid, how))
        if not is_there:
            raise ProcessLookupError

    def wait(seconds: float) -> None:
        assert seconds == END_S
        if len(events) < ends_at:
            raise subprocess.TimeoutExpired("x", seconds)

    monkeypatch.setattr(os, "killpg", killpg)
    process: Any = SimpleNamespace(pid=4711, wait=wait)
    processes._end_session(process)
    assert events == [(4711, how) for how in sent]


def test_the_kernel_ends_a_child_whose_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: List[Tuple[int, int]] = []
    library = SimpleNamespace(prctl=lambda option, value: calls.append((option, value)))
    monkeypatch.setattr(processes, "libc", lambda: library)
    assert end_with_parent(os.getppid(), signal.SIGTERM)
    assert not end_with_parent(os.getpid(), signal.SIGKILL)
    assert calls == [(1, signal.SIGTERM), (1, signal.SIGKILL)]
    monkeypatch.setattr(processes, "libc", lambda: None)
    assert end_with_parent(os.getppid(), signal.SIGTERM)


@pytest.mark.parametrize("error", [ImportError, OSError, None])
def test_a_python_without_ctypes_has_no_library(
    error: Optional[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        assert name == "ctypes"
        if error:
            raise error
        return SimpleNamespace(CDLL=lambda path: ("library", path))

    monkeypatch.setattr(processes, "importlib", SimpleNamespace(import_module=load))
    assert libc.__wrapped__() == (None if error else ("library", None))


def test_what_is_done_aside_is_waited_for() -> None:
    assert Aside(lambda: 7).result() == 7
    free = threading.Event()

    def fail() -> None:
        free.wait(30)
        raise KeyError("of the call")

    aside = Aside(fail)
    assert aside._thread.daemon
    free.set()
    for _ in range(2):
        with pytest.raises(KeyError, match="of the call"):
            aside.result()


def test_lines_of_a_program_come_with_both_its_streams_and_it_ends_with_who_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = "echo a; echo b >&2; printf 'c\\377'"
    assert list(program_lines(["sh", "-c", script])) == ["a", "b", "c\ufffd"]
    ended: List[str] = []
    asked: List[Any] = []

    @contextlib.contextmanager
    def fake(argv: List[str], **options: Any) -> Iterator[Any]:
        asked.append((argv, options))
        yield SimpleNamespace(
            stdout=iter([b"a\n", b"b\n"]), terminate=lambda: ended.append("terminated")
        )
        ended.append("left")

    monkeypatch.setattr(processes, "started", fake)
    lines: Any = program_lines(["x"])
    assert next(lines) == "a" and not ended
    lines.close()
    assert ended[0] == "terminated"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    assert asked == [(["x"], streams)]
    ended.clear()
    assert list(program_lines(["x"])) == ["a", "b"] and ended == ["terminated", "left"]


@pytest.mark.parametrize("stdin", [None, "text\n", b"text\n"])
def test_what_a_program_is_given_and_leaves(stdin: Any, tmp_path: Path) -> None:
    script = "cat; pwd; echo $MORE; echo err >&2; exit 3"
    done = run_program(["sh", "-c", script], stdin, {"MORE": "more"}, tmp_path)
    given = "text\n" if stdin else ""
    assert done == Completed(3, f"{given}{tmp_path.resolve()}\nmore\n", "err\n", "")


def test_a_program_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("x")
    for argv in ([str(tmp_path / "tool")], [str(tmp_path)]):
        with pytest.raises(HostError, match=f"{argv[0]} cannot be run") as caught:
            run_program(argv)
        assert caught.value.next_step == f"check the permissions of {argv[0]}"
        assert "Permission denied" in caught.value.why
    with pytest.raises(HostError, match="none-such is not installed") as caught:
        run_program(["none-such"])
    assert caught.value.why == "none-such was not found on PATH"
    assert caught.value.next_step == "install none-such"


def test_more_wins_over_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc")
    monkeypatch.setenv("PLAIN", "old")
    assert "HF_TOKEN" not in without_secrets() and without_secrets()["PLAIN"] == "old"
    more = without_secrets({"PLAIN": "new", "HF_TOKEN": "mine"})
    assert (more["PLAIN"], more["HF_TOKEN"]) == ("new", "mine")


def test_a_program_that_is_followed_speaks_plainly_in_a_session_of_its_own() -> None:
    script = "import os, sys; print(os.getsid(0) == os.getpid(), os.environ['LC_ALL']); "
    script += "data = sys.stdin.read(); print(len(data)); print('e', file=sys.stderr); sys.exit(4)"
    taken: List[str] = []

    def on_line(line: str) -> bool:
        taken.append(line)
        return line.startswith("True")

    argv = [sys.executable, "-c", script]
    done = follow_program(argv, threading.Event(), "x" * 100_000, on_line)
    assert taken == ["True C", "100000"] and done == Completed(4, "100000", "e", "")
    stopped = threading.Event()
    stopped.set()
    assert follow_program(["sleep", "60"], stopped).code == -signal.SIGTERM
