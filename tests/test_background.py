"""Jobs that are stopped and resumed, decision by decision: processes and hosts are played."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import pytest

from hfship.base.errors import HfshipError, HostError, IncompleteError, NotFoundError, UsageError
from hfship.base.locks import InUseError, boot_id, host_name, process_start
from hfship.base.processes import Completed
from hfship.base.report import FailedResult
from hfship.base.values import replace
from hfship.ops import background as room
from hfship.ops.background import (
    ResumedJob,
    await_job,
    command_of,
    resume_job,
    resume_jobs,
    stop_job,
    with_job,
)
from hfship.ops.jobs import Job, JobRecord, read_job, write_job

OURS = os.geteuid()


class Said:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.infos: List[str] = []
        self.warnings: List[str] = []
        self.errors: List[HfshipError] = []

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def error(self, error: HfshipError) -> None:
        self.errors.append(error)


@pytest.fixture
def said() -> Any:
    return Said()


def job(state: str, folder: Path = Path("/x"), uid: int = OURS, **fields: Any) -> Job:
    given: Dict[str, Any] = {
        "name": "pack-m",
        "words": ("pack", "m"),
        "cwd": os.getcwd(),
        "host": host_name(),
        "background": True,
        "state": state,
        **fields,
    }
    return Job(JobRecord(**given), folder, uid, state)


# -- to be typed again


@pytest.mark.parametrize(
    "cwd, command",
    [(os.getcwd(), "hfship pack 'a b'"), ("/my models", "cd '/my models' && hfship pack 'a b'")],
)
def test_the_command_of_a_job_works_from_here(cwd: str, command: str) -> None:
    assert command_of(JobRecord(words=("pack", "a b"), cwd=cwd)) == command


@pytest.mark.parametrize(
    "pid, jobs, holder",
    [
        (7, [job("running", name="a", pid=8), job("running", name="b", pid=7)], "b"),
        (7, [job("running", name="b", pid=7), job("running", name="c", pid=7)], "b"),
        (7, [job("interrupted", name="b", pid=7)], ""),
        (0, [job("running", name="b"), job("running", name="pack-m")], "pack-m"),
        (0, [job("done", name="pack-m")], ""),
    ],
)
def test_who_is_in_the_way_is_named(pid: int, jobs: List[Job], holder: str) -> None:
    error = InUseError("m is in use", "process 7", "wait", pid)
    told = with_job(error, jobs, "pack-m")
    if not holder:
        assert told is error
        return
    assert (told.what, told.pid) == ("m is in use", pid)
    assert told.why == f"process 7\nthat is the job {holder}"
    assert told.next_step == f"hfship logs -f {holder}   or: hfship stop {holder}"


# -- begun in the background


@pytest.mark.parametrize(
    "said, code, signum, expected",
    [
        ("pack-m", 0, 0, ("pack-m", 0)),
        ('{"what": "no disk"}', 6, 0, ('{"what": "no disk"}', 6)),
        ("", 7, 0, ("", 7)),
        ("", 0, signal.SIGKILL, ("", 128 + 9)),
    ],
)
def test_a_job_has_begun_as_it_says_its_name_or_has_ended(
    said: str, code: int, signum: int, expected: Any
) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, said.encode())
        if signum:
            os.kill(os.getpid(), signum)
        os._exit(code)
    os.close(writer)
    assert await_job(pid, reader) == expected
    if expected[0] == "pack-m":
        os.waitpid(pid, 0)


def test_ctrl_c_goes_to_the_job_that_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        """Is interrupted once."""

        reads = 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self) -> str:
            self.reads += 1
            if self.reads == 1:
                raise KeyboardInterrupt
            return "{}"

    signals: List[Any] = []
    monkeypatch.setattr(room.os, "fdopen", lambda _: Pipe())
    monkeypatch.setattr(room.os, "kill", lambda *given: signals.append(given))
    monkeypatch.setattr(room.os, "waitpid", lambda pid, _: (pid, 130 << 8))
    assert await_job(4711, 9) == ("{}", 130)
    assert signals == [(4711, signal.SIGINT)]


# -- stop


class Process:
    """A process that ends at one of the signals, or never."""

    def __init__(self, ends_at: Optional[int]) -> None:
        self.ends_at, self.runs = ends_at, True
        self.signals: List[int] = []

    def kill(self, pid: int, signum: int) -> None:
        assert pid == 4711
        self.signals.append(signum)
        if signum == self.ends_at:
            self.runs = False


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    played = Process(signal.SIGINT)
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(room.os, "kill", played.kill)
    monkeypatch.setattr(room.time, "sleep", sleep)
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(room, "still_runs", lambda *_: played.runs)
    monkeypatch.setattr(room, "_may_signal", lambda _: True)
    return played


@pytest.mark.parametrize(
    "ends_at, signals",
    [
        (signal.SIGINT, [signal.SIGINT]),
        (signal.SIGTERM, [signal.SIGINT, signal.SIGTERM]),
        (signal.SIGKILL, [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]),
    ],
)
def test_a_job_is_ended_ever_harder_and_its_record_says_so(
    ends_at: int, signals: List[int], process: Process, tmp_path: Path
) -> None:
    process.ends_at = ends_at
    made = job("running", tmp_path, pid=4711)
    write_job(tmp_path, made.record)
    assert stop_job(made) == "stopped pack-m; to continue: hfship pack m"
    assert process.signals == signals
    record = read_job(tmp_path / "pack-m.json").record
    assert (record.state, record.exit_code) == ("stopped", 130)


def test_one_that_does_not_end_is_told(process: Process, tmp_path: Path) -> None:
    process.ends_at = None
    with pytest.raises(HostError, match="pack-m does not end") as caught:
        stop_job(job("running", tmp_path, pid=4711))
    assert caught.value.why == "process 4711 hangs in the kernel"


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_what_it_says_itself_stays(state: str, process: Process, tmp_path: Path) -> None:
    """It may have ended well as it was stopped; what has no record any more has none."""
    made = job("running", tmp_path, pid=4711)
    write_job(tmp_path, replace(made.record, state=state, exit_code=0))
    stop_job(made)
    record = read_job(tmp_path / "pack-m.json").record
    assert record.state == state and (record.exit_code == 0) == (state == "done")
    (tmp_path / "pack-m.json").unlink()
    stop_job(made)
    assert not list(tmp_path.iterdir())


def test_what_has_ended_is_left_alone(process: Process) -> None:
    assert stop_job(job("done")) == "pack-m has ended already (done)"
    assert stop_job(job("failed", exit_code=5)) == "pack-m has ended already (failed)"
    assert not process.signals
    process.runs = False
    assert stop_job(job("interrupted")).startswith("stopped pack-m") and not process.signals


@pytest.mark.parametrize(
    "state, uid, host, runs, euid, may",
    [
        ("running", OURS, "", True, OURS, True),
        ("running", OURS, "elsewhere", True, OURS, False),
        ("running", OURS + 1, "", True, OURS + 2, False),
        ("running", OURS + 1, "", True, OURS + 1, False),  # the process is another's
        ("running", OURS + 1, "", True, 0, False),  # a trap for root
        ("running", OURS, "", False, OURS, True),  # it has just ended
        ("interrupted", OURS + 1, "", True, 0, True),
    ],
)
def test_only_processes_of_the_user_of_the_record_are_signalled(
    state: str,
    uid: int,
    host: str,
    runs: bool,
    euid: int,
    may: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pid = os.getpid() if runs else 2**22 + 1
    made = job(state, uid=uid, host=host or host_name(), pid=pid)
    monkeypatch.setattr(room.os, "geteuid", lambda: euid)
    assert room._may_signal(made) == may
    if may:
        return
    with pytest.raises(HostError, match="cannot stop ") as caught:
        stop_job(made)
    assert f"on {made.record.host}" in caught.value.why


def test_a_process_that_has_ended_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another's now."""
    record = JobRecord(pid=os.getpid(), start="1", boot_id=boot_id())
    assert process_start(os.getpid()) != "1"
    monkeypatch.setattr(room.os, "kill", lambda *_: pytest.fail("signalled"))
    assert room._end_process(record)


# -- resume

LEFT: List[Any] = [
    (job("running"), "pack-m runs"),
    (job("failed", exit_code=5), "pack-m failed with 5, and is left to you: hfship pack m"),
    (job("done"), None),
    (job("interrupted", host="gpu9"), "pack-m is resumed on gpu9, where it ran"),
    (
        job("interrupted", background=False),
        "pack-m ran in the foreground, and is left to you: hfship pack m",
    ),
    (job("running", uid=OURS + 1), None),  # of another user
]


@pytest.mark.parametrize("left, reason", LEFT)
def test_what_is_not_resumed_is_said_and_the_others_are(
    left: Job, reason: Optional[str], said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "resume_job", lambda record, _: record.name)
    found = list(resume_jobs([left, job("interrupted", name="pack-n")], said))
    assert found == [ResumedJob("pack-n")]
    assert said.infos == ([reason] if reason else [])


def test_one_that_cannot_be_resumed_holds_no_other_up(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = NotFoundError("cannot resume a", "", "")

    def resume(record: JobRecord, _: Any) -> str:
        if record.name == "a":
            raise error
        return record.name

    monkeypatch.setattr(room, "resume_job", resume)
    jobs = [job("interrupted", name="a"), job("failed", name="b", exit_code=8)]
    failed, resumed = resume_jobs(jobs, said)
    assert isinstance(failed, FailedResult) and resumed == ResumedJob("b")
    assert said.errors == [error]
    assert ResumedJob("b").json() == {"name": "b", "state": "resumed"}
    assert ResumedJob("b").text() == "resumed b"


class Again:
    """What the command of a job is started with, and what it says."""

    def __init__(self) -> None:
        self.done = Completed(0, "pack-m-2\n", "")
        self.asked: List[Any] = []

    def run(self, argv: Sequence[str], env: Any, cwd: Path) -> Completed:
        self.asked.append((list(argv[2:]), env, cwd))
        return self.done


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> Again:
    played = Again()
    monkeypatch.setattr(room, "run_program", played.run)
    monkeypatch.setattr(room, "own_file", lambda: Path("/hfship.pyz"))
    return played


@pytest.mark.parametrize(
    "out, name",
    [
        ("pack-m-2\n", "pack-m-2"),
        ('{"job": "pack-m-3"}\n', "pack-m-3"),
        ('{"x": 1}', "pack-m"),
        ("{", "pack-m"),
        ("", "pack-m"),
    ],
)
def test_a_job_is_started_where_and_as_it_was(
    out: str, name: str, again: Again, said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/theirs")
    monkeypatch.setenv("KEPT", "1")
    again.done = Completed(0, out, "")
    record = job("interrupted", cwd=str(tmp_path), env={"HF_HOME": "/its own"}).record
    assert resume_job(record, said) == name
    ((words, env, cwd),) = again.asked
    assert words == ["pack", "m"] and cwd == tmp_path
    assert (env["HF_HOME"], env["KEPT"]) == ("/its own", "1") and not said.warnings


def test_what_cannot_be_started_again_is_told(again: Again, said: Any, tmp_path: Path) -> None:
    record = job("interrupted", cwd=str(tmp_path / "gone")).record
    with pytest.raises(NotFoundError, match="cannot resume pack-m") as caught:
        resume_job(record, said)
    assert str(tmp_path / "gone") in caught.value.why
    with pytest.raises(UsageError, match="cannot resume pack-m"):
        resume_job(replace(record, cwd=str(tmp_path), words=("pack", "--key=***")), said)
    assert not again.asked
    again.done = Completed(4, "", " no disk \n")
    with pytest.raises(IncompleteError, match="cannot resume pack-m: exit code 4") as failed:
        resume_job(replace(record, cwd=str(tmp_path)), said)
    assert failed.value.why == "no disk"


@pytest.mark.parametrize(
    "needs, is_set, has_token, warned",
    [
        ((), False, False, ""),
        (("HF_TOKEN",), True, False, ""),
        (("HF_TOKEN",), False, True, ""),  # of the login
        (("HF_TOKEN",), False, False, "HF_TOKEN"),
        (("HF_TOKEN", "OTHER_KEY"), False, True, "HF_TOKEN, OTHER_KEY"),
        (("HF_TOKEN", "OTHER_KEY"), True, False, "OTHER_KEY"),
    ],
)
def test_secrets_that_it_had_and_now_lacks_are_told(
    needs: Any,
    is_set: bool,
    has_token: bool,
    warned: str,
    again: Again,
    said: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "OTHER_KEY"):
        monkeypatch.delenv(name, raising=False)
    if is_set:
        monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(room, "find_token", lambda _: "hf_x" if has_token else None)
    resume_job(job("interrupted", cwd=str(tmp_path), needs=needs).record, said)
    assert len(said.warnings) == bool(warned)
    if warned:
        assert said.warnings[0].startswith(f"pack-m had {warned}, which is not set now")


class System:
    """The module os, in which nothing is forked and no descriptor of ours is replaced."""

    def __init__(self, pid: int) -> None:
        self.did: List[Any] = []
        self._pid = pid

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fork(self) -> int:
        """Which of the two goes on here."""
        self.did.append("fork")
        return self._pid

    def setsid(self) -> None:
        """No terminal's end ends it."""
        self.did.append("setsid")

    def dup2(self, old: int, new: int) -> None:
        """What lies behind a descriptor."""
        self.did.append((os.readlink(f"/proc/self/fd/{old}"), new))


@pytest.mark.parametrize("pid", [0, 7])
def test_who_is_detached_has_no_terminal_and_hears_ctrl_c_alone(
    pid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(pid)
    signals: Dict[int, Any] = {}
    monkeypatch.setattr(room, "os", system)
    monkeypatch.setattr(room.signal, "signal", signals.__setitem__)
    before = set(os.listdir("/proc/self/fd"))
    found, pipe = room.detach(tmp_path / "logs/hfship")
    assert found == pid and list((tmp_path / "logs/hfship").iterdir()) == []
    if pid:
        assert system.did == ["fork"] and not signals
        with os.fdopen(pipe) as stream:
            assert stream.read() == "", "the other end is the child's alone"
        assert set(os.listdir("/proc/self/fd")) == before
        return
    assert system.did == ["fork", "setsid", ("/dev/null", 0), ("/dev/null", 1)]
    assert signals == {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_IGN,
    }
    with pytest.raises(BrokenPipeError):  # its other end is the parent's alone
        os.write(pipe, b"x")
    os.close(pipe)
    for fd in set(os.listdir("/proc/self/fd")) - before:
        if os.path.exists(f"/proc/self/fd/{fd}"):
            os.close(int(fd))


def test_a_folder_that_takes_no_log_is_told_before_anything_is_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System(0)
    monkeypatch.setattr(room, "os", system)
    (tmp_path / "file").write_text("x")
    with pytest.raises(HfshipError, match="cannot keep the log of a background job in") as told:
        room.detach(tmp_path / "file")
    assert system.did == [] and "--log-dir" in told.value.next_step


@pytest.mark.parametrize(
    ("needs", "found", "warned"),
    [
        ((), False, False),
        (("HF_TOKEN",), False, True),
        (("HF_TOKEN",), True, False),
        (room.TOKEN_VARIABLES, True, False),
        ((*room.TOKEN_VARIABLES, "OTHER"), True, True),
        (("OTHER",), True, True),
        (("SET",), False, False),
    ],
)
def test_secrets_that_a_job_had_and_that_are_not_here_are_told(
    needs: Any, found: bool, warned: bool, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*room.TOKEN_VARIABLES, "OTHER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SET", "1")
    record = job("interrupted", needs=needs, env={"HF_HOME": "/h"}).record
    seen: List[Any] = []

    def find_token(env: Any) -> Any:
        seen.append(env["HF_HOME"])
        return "token" if found else None

    monkeypatch.setattr(room, "find_token", find_token)
    room._warn_of_missing_secrets(record, said)
    assert bool(said.warnings) is warned
    if warned:
        assert said.warnings[0].startswith(f"pack-m had {', '.join(needs)}, which is not set now")
        assert said.warnings[0].endswith("/h/token")
    assert set(seen) <= {"/h"}
