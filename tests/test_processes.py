"""Other programs: what they are given, and what is said when they are missing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Iterator, List

import pytest

from conftest import ROOT
from hfship.base.errors import HostError
from hfship.base.processes import Completed, follow_program, run_program, signals_held, started

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
