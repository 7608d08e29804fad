"""Jobs: background, watch, stop, logs, resume; and the logs of every run."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Program, missing
from hfship.base.errors import HostError, UsageError
from hfship.base.eventlog import LOG_KEEP, LogFile
from hfship.base.locks import InUseError, process_start
from hfship.base.report import Reporter
from hfship.ops.background import (
    await_job,
    detach,
    resume_job,
    resume_jobs,
    stop_job,
    with_job,
)
from hfship.ops.jobs import (
    JOB_FORMAT,
    STOP_STEPS,
    Job,
    JobRecord,
    expire_jobs,
    free_name,
    new_record,
    parse_job,
    public_words,
    read_job,
    read_jobs,
    state_of,
    write_job,
)
from hfship.ops.service import Service, install_text
from hfship.ops.watch import watch_lines
from support import components
from support.folders import same_files
from support.hub import FaultHub

TOKEN = "hf_good1234567"


@pytest.fixture
def published(hub: FaultHub, model: Path) -> Path:
    return hub.add(model)


@pytest.fixture
def fetch(hub: FaultHub, published: Path, tmp_path: Path) -> List[Any]:
    """A fetch of org/tiny that does not end before the hub lets it: half a minute, or `hub.faults.rate_bps = None`."""
    hub.faults.rate_bps = 100_000
    return ["fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path / "out"]


@pytest.fixture(autouse=True)
def no_job_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    for path in (tmp_path / "home/logs/hfship").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            job = read_job(path)
            if job.state == "running":
                os.kill(job.record.pid, signal.SIGKILL)


def logs_of(program: Program) -> Path:
    return program.home / "logs/hfship"


def job(program: Program, name: str) -> Job:
    return read_job(logs_of(program) / f"{name}.json")


def until(true: Callable[[], Any], what: str = "") -> Any:
    """Wait for something that must come."""
    for _ in range(1200):
        with contextlib.suppress(FileNotFoundError):
            found = true()
            if found:
                return found
        time.sleep(0.05)
    raise AssertionError(f"did not come: {what or true}")


def in_terminal(
    program: Program, *arguments: Any, size: Tuple[int, int] = (24, 80)
) -> Tuple[int, int]:
    """Run hfship in a terminal of its own: its process and our end of the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the suite itself runs under nohup
        os.execvpe(
            program.argv[0],
            [*program.argv, *map(str, arguments)],
            {**program.env(), "TERM": "xterm"},
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    return pid, terminal


def read_until(terminal: int, words: bytes) -> bytes:
    seen = b""
    while words not in seen:
        with contextlib.suppress(BlockingIOError):
            piece = os.read(terminal, 65536)
            assert piece, seen
            seen += piece
    return seen


# ---- background ----------------------------------------------------------------------


def test_a_background_fetch_outlives_its_terminal(
    hfship: Program, hub: FaultHub, fetch: List[Any], published: Path
) -> None:
    pid, terminal = in_terminal(hfship, *fetch, "--background")
    read_until(terminal, b"fetch-tiny\r\n")
    os.close(terminal)  # SIGHUP to everything in it
    os.waitpid(pid, 0)
    assert job(hfship, "fetch-tiny").state == "running"
    hub.faults.rate_bps = None
    until(lambda: job(hfship, "fetch-tiny").state == "done")
    assert same_files(published, Path(fetch[-1]) / "tiny")
    log = (logs_of(hfship) / "fetch-tiny.log").read_text()
    assert "began: hfship fetch org/tiny" in log and "every file verified" in log
    assert "summary: exit 0 (done)" in log and "summary: next" in log


def test_a_detached_process_has_nothing_of_its_terminal(tmp_path: Path) -> None:
    ours = os.getpid()
    try:
        pid, pipe = detach(tmp_path / "logs")
        if not pid:
            found = {
                "leads its session": os.getsid(0) == os.getpid(),
                "no SIGHUP": signal.getsignal(signal.SIGHUP) is signal.SIG_IGN,
                "Ctrl-C": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
                "nowhere": [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1)],
            }
            os.write(pipe, json.dumps(found).encode())
    finally:
        if os.getpid() != ours:  # whatever went wrong in it, the suite does not run twice
            os._exit(7)
    said, code = await_job(pid, pipe)
    assert code == 7 and json.loads(said) == {
        "leads its session": True,
        "no SIGHUP": True,
        "Ctrl-C": True,
        "nowhere": ["/dev/null", "/dev/null"],
    }


@pytest.mark.parametrize(
    "said, signum, code",
    [("fetch-x", 0, 0), ('{"what": "x"}', 0, 3), ("", 0, 3), ("", signal.SIGKILL, 137)],
)
def test_a_command_hears_how_its_background_job_began(said: str, signum: int, code: int) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writer, said.encode())
        if signum:
            os.kill(os.getpid(), signum)
        os._exit(3)
    os.close(writer)
    assert await_job(pid, reader) == (said, code)
    if code == 0:  # nobody has waited for it
        os.waitpid(pid, 0)


def test_a_foreground_fetch_ends_with_its_terminal_and_can_go_on(
    hfship: Program, fetch: List[Any]
) -> None:
    pid, terminal = in_terminal(hfship, *fetch)
    until(lambda: job(hfship, "fetch-tiny").record.done > 100_000)
    os.close(terminal)
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 130
    ended = job(hfship, "fetch-tiny")
    assert (ended.state, ended.record.exit_code) == ("interrupted", 130)
    assert "left to you" in hfship("watch", "--resume-all").stderr  # it has no --background


def test_killed_and_resumed_byte_for_byte(
    hfship: Program, hub: FaultHub, fetch: List[Any], published: Path
) -> None:
    assert hfship(*fetch, "--background").stdout == "fetch-tiny\n"
    until(lambda: job(hfship, "fetch-tiny").record.done > 400_000)
    os.kill(job(hfship, "fetch-tiny").record.pid, signal.SIGKILL)
    until(lambda: job(hfship, "fetch-tiny").state == "interrupted")
    assert "--resume-all" in hfship("watch", "--once").stdout
    assert hfship("watch", "--resume-all").stdout == "resumed fetch-tiny\n"
    again = hfship("watch", "--resume-all")
    assert again.stdout == "" and "fetch-tiny runs\nnothing to resume" in again.stderr
    hub.faults.rate_bps = None
    until(lambda: job(hfship, "fetch-tiny").state == "done")
    assert same_files(published, Path(fetch[-1]) / "tiny")
    size = sum(path.stat().st_size for path in published.rglob("*") if path.is_file())
    assert hub.traffic.body_bytes < size + 200_000
    ended, manifest = (
        job(hfship, "fetch-tiny").record,
        Path(fetch[-1]) / "tiny/.hfship/manifest.json",
    )
    listed = json.loads(manifest.read_text())["files"]
    assert ended.files == ended.finished == len(listed) and ended.done == sum(
        file["size"] for file in listed
    )


def test_stop_saves_the_state_and_means_it(
    hfship: Program, hub: FaultHub, fetch: List[Any], published: Path
) -> None:
    hfship(*fetch, "--background")
    until(lambda: job(hfship, "fetch-tiny").record.done > 100_000)
    assert "stopped fetch-tiny" in hfship("stop", "fetch-tiny").stdout
    ended = job(hfship, "fetch-tiny")
    assert (ended.state, ended.record.exit_code) == ("stopped", 130)
    assert hfship("watch", "--resume-all").stdout == ""
    assert "ended already" in hfship("stop", "fetch-tiny").stdout
    hub.faults.rate_bps = None
    hfship(*fetch)
    assert same_files(published, Path(fetch[-1]) / "tiny")
    assert [path.name for path in logs_of(hfship).glob("*.json")] == [
        "fetch-tiny.json"
    ]  # the same job


def test_stop_ends_by_force_what_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hfship.ops.background.STOP_STEPS", [(number, 0.2) for number, _ in STOP_STEPS]
    )
    deaf = [sys.executable, "-c", "import signal,time\nfor n in (2, 15): signal.signal(n, signal.SIG_IGN)\n"
            "print(flush=True); time.sleep(60)"]  # fmt: skip
    with subprocess.Popen(deaf, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        record = replace(a_record(tmp_path), pid=process.pid, start=process_start(process.pid))
        write_job(tmp_path, record)
        stop_job(read_job(tmp_path / "fetch-x.json"))
        assert process.wait() == -signal.SIGKILL
    assert read_job(tmp_path / "fetch-x.json").state == "stopped"


def test_one_folder_has_one_job(hfship: Program, fetch: List[Any], tmp_path: Path) -> None:
    hfship(*fetch, "--background")
    for more in ([], ["--background"]):
        done = hfship(*fetch, *more, code=3)
        assert "that is the job fetch-tiny" in done.stderr and "stop fetch-tiny" in done.stderr
    assert job(hfship, "fetch-tiny").state == "running"  # and its record is still its own
    elsewhere = [*fetch[:-1], tmp_path / "other"]
    assert hfship(*elsewhere, "--background").stdout == "fetch-tiny-2\n"


@pytest.mark.parametrize("pid, name", [(7, "pack-m-2"), (0, "pack-m"), (99, "")])
def test_the_job_in_the_way_is_named(pid: int, name: str, tmp_path: Path) -> None:
    """By its process, or where only a lock tells of it by what it is about."""
    records = [
        replace(a_record(tmp_path), name=f"pack-{n}", pid=p)
        for n, p in (("x", 5), ("m", 6), ("m-2", 7))
    ]
    jobs = [Job(record, tmp_path, 0, "running") for record in records]
    error = with_job(InUseError("m.tar.zst", "why", "wait", pid), jobs, "pack-m")
    assert error.next_step.endswith(f"hfship stop {name}" if name else "wait")


# arguments -> exit code, words
REFUSED: Dict[str, Any] = {
    "usage": (["fetch", "org/tiny", "-j", "0", "--background"], 2, "--jobs"),
    "not UTF-8": (["fetch", "org/tiny", "--revision", "\udcff"], 2, "is not a revision"),
    "unknown repository": (
        ["fetch", "org/nothing", "--background"],
        5,
        "org/nothing was not found",
    ),
    "unknown archive": (["verify", "nothing", "--background"], 5, "nothing"),
    "two unknown": (["fetch", "org/no", "org/none", "--background"], 5, "org/none was not found"),
    "nothing to see": (
        ["fetch", "org/tiny", "--background", "--dry-run"],
        2,
        "--background is for work",
    ),
    "stop nothing": (["stop", "nothing"], 5, "no such deployment or job: nothing"),
    "stop no name": (["stop", "../x"], 5, "watch --once"),
    "logs of nothing": (["logs", "nothing"], 5, "jobs: none"),
    "logs of no lines": (["logs", "m", "--tail", "-1"], 2, "--tail"),
    "watch backwards": (["watch", "--interval", "-1"], 2, "not a positive number of seconds"),
    "watch nothing": (["watch", "nothing"], 5, "no such job: nothing"),
    "no log folder": (
        ["fetch", "org/tiny", "--background", "--log-dir", "/dev/null/x"],
        7,
        "--log-dir",
    ),
    "no log file": (["fetch", "org/tiny", "--log-file", "/nowhere/x"], 7, "--log-file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_it_begins(
    name: str, hfship: Program, hub: FaultHub, published: Path
) -> None:
    arguments, code, words = REFUSED[name]
    done = hfship(*arguments, env={"HF_ENDPOINT": hub.url}, code=code)
    assert words in done.stderr + done.stdout and not list(logs_of(hfship).glob("*"))
    row = json.loads(hfship(*arguments, "--json", env={"HF_ENDPOINT": hub.url}, code=code).stdout)
    assert row["schema"] == "hfship-error/1" and row["exit_code"] == code
    assert row["error"]["what"] in done.stderr


def test_the_name_that_was_meant_is_said(hfship: Program, model: Path, tmp_path: Path) -> None:
    hfship("pack", model, "-o", tmp_path)
    for command in ("stop", "logs"):
        said = hfship(command, "pack-tinny", code=5).stderr
        assert "did you mean pack-tiny?" in said and f" {command} pack-tiny\n" in said


def test_every_job_command_runs_in_the_background(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    commands = [["pack", model, "-o", tmp_path], ["verify", tmp_path / "tiny.tar.zst"]]
    for command in [*commands, ["unpack", tmp_path / "tiny.tar.zst", "-o", tmp_path / "out"]]:
        started = json.loads(hfship(*command, "--background", "--json").stdout)
        assert started["job"] == f"{command[0]}-tiny"
        ended = until(lambda name=started["job"]: (j := job(hfship, name)).state == "done" and j)
        assert (
            ended.record.files == ended.record.finished > 1
            and ended.record.done == ended.record.total
        )
    assert same_files(model, tmp_path / "out/tiny")


def test_a_list_is_counted_whole(hfship: Program, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other", ignore=shutil.ignore_patterns(".hfship"))
    hfship("pack", model, tmp_path / "other", "-o", tmp_path / "packed")
    alone = job(
        hfship,
        json.loads(hfship("pack", model, "-o", tmp_path / "one", "--background", "--json").stdout)[
            "job"
        ],
    )
    alone = until(lambda: (j := job(hfship, alone.record.name)).state == "done" and j)
    both = job(hfship, f"pack-{model.name}+1")
    assert both.record.files == both.record.finished == 2 * alone.record.files > 2
    assert both.record.done == both.record.total > 1.9 * alone.record.done


def test_the_summary_does_not_tell_an_error_twice(
    hfship: Program, model: Path, tmp_path: Path
) -> None:
    hfship("pack", model, "-o", tmp_path)
    archive = tmp_path / "tiny.tar.zst"
    with archive.open("r+b") as stream:
        stream.seek(archive.stat().st_size // 2)
        stream.write(bytes(64))
    said = hfship("verify", archive, "-v", code=6).stderr
    assert (
        "\n  exit  6 (failed)" in said and len(re.findall(r"^  (?:next|why) ", said, re.M)) <= 2
    ), said
    assert "summary: next" in (logs_of(hfship) / "verify-tiny.log").read_text()


# ---- secrets -------------------------------------------------------------------------


def test_a_token_is_in_no_record_and_is_found_again(
    pyz: Program, hub: FaultHub, fetch: List[Any]
) -> None:
    vars(hub.faults).update(gated=True, token=TOKEN)
    pyz(
        *fetch,
        "--background",
        env={"HF_TOKEN": TOKEN, "https_proxy": "http://me:hunter22@127.0.0.1:9"},
    )
    record = until(lambda: job(pyz, "fetch-tiny").record)
    os.kill(record.pid, signal.SIGKILL)
    until(lambda: job(pyz, "fetch-tiny").state == "interrupted")
    assert record.needs == ("https_proxy", "HF_TOKEN")
    refused = pyz("watch", "--resume-all", code=3)
    assert "had https_proxy, HF_TOKEN" in refused.stderr and "exit code 4" in refused.stderr
    file = pyz.home / ".cache/huggingface/token"
    file.parent.mkdir(parents=True)
    file.write_text(TOKEN)
    hub.faults.rate_bps = None
    assert pyz("watch", "--resume-all").stdout == "resumed fetch-tiny\n"
    until(lambda: job(pyz, "fetch-tiny").state == "done")
    for path in logs_of(pyz).iterdir():
        assert TOKEN not in path.read_text() and "hunter22" not in path.read_text()


def test_a_secret_on_the_command_line_is_not_written_and_not_guessed(tmp_path: Path) -> None:
    record = new_record(
        "serve-m", ["serve", "m", "--env", "KEY=hunter22"], True, {"HFSHIP_KEY": "k.pem"}
    )
    assert "hunter22" not in json.dumps(asdict(record)) and record.env == {"HFSHIP_KEY": "k.pem"}
    with pytest.raises(UsageError, match="cannot resume"):
        resume_job(record, Reporter("none"))


@pytest.mark.parametrize(
    "env, kept, needs",
    [
        ({"HFSHIP_MODELS_DIR": "/m", "HF_HOME": "/h"}, ["HFSHIP_MODELS_DIR", "HF_HOME"], ()),
        ({"https_proxy": "http://p", "SSL_CERT_FILE": "/c"}, ["https_proxy", "SSL_CERT_FILE"], ()),
        ({"HTTPS_PROXY": "http://u:hunter22@p", "PATH": "/bin"}, ["PATH"], ("HTTPS_PROXY",)),
        ({"HF_TOKEN": TOKEN, "EDITOR": "vi"}, [], ("HF_TOKEN",)),
        ({"HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": TOKEN}, [], ("HUGGING_FACE_HUB_TOKEN",)),
    ],
)
def test_of_a_secret_the_name_of_its_variable_is_kept(
    env: Dict[str, str], kept: List[str], needs: Tuple[str, ...]
) -> None:
    """Else a resumed job could not say what it misses."""
    record = new_record("fetch-x", ["fetch", "x"], False, env)
    assert record.env == {name: env[name] for name in kept} and record.needs == needs


def test_a_new_record_is_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.time()
    record = new_record("pack-m", ["pack", "m"], True, {})
    assert state_of(record) == "running"
    assert (record.name, record.command, record.words) == ("pack-m", "pack", ("pack", "m"))
    assert (record.pid, record.host) == (os.getpid(), socket.gethostname())
    assert (record.background, record.cwd) == (True, str(tmp_path))
    assert began <= record.began_at == record.updated_at <= time.time()


class Everywhere:
    """A Reporter whose every output is kept."""

    def __init__(self, folder: Path, progress: str) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.reporter = Reporter(progress, 1, self.out, self.err)
        self.logs = [folder / "text.log", folder / "json.log"]
        for path, form in zip(self.logs, ("text", "json")):
            path.unlink(missing_ok=True)
            self.reporter.open_log(path, form)

    def text(self) -> str:
        return (
            self.out.getvalue()
            + self.err.getvalue()
            + "".join(path.read_text() for path in self.logs)
        )


@settings(max_examples=50)
@given(
    secret=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8).filter(
        lambda s: "*" not in s
    ),
    around=st.text(max_size=20),
    progress=st.sampled_from(["plain", "json"]),
)
def test_no_output_shows_a_secret(
    tmp_path_factory: Any, secret: str, around: str, progress: str
) -> None:
    """Tokens of any printable characters, in every kind of message, in every output."""
    everywhere = Everywhere(tmp_path_factory.getbasetemp(), progress)
    reporter, text = everywhere.reporter, f"{around}{secret}{around}"
    hidden = {secret, json.dumps(secret)[1:-1], quote(secret), quote(secret, safe="")}
    if any(part in f"{around}***{around}" for part in hidden):
        return
    reporter.hide(secret)
    for say in (reporter.info, reporter.detail, reporter.warn, reporter.result):
        say(text)
    reporter.result_json({text: [{"a": text}]})
    reporter.error(UsageError(text, text, text))
    reporter.event("x", a=[text])
    reporter.enter_phase(text, text)
    reporter.log("info", quote(secret), rows={"a": text})
    with reporter.stage(text, 5):
        pass
    shown = everywhere.text()
    assert not [part for part in hidden if part in shown], shown


# ---- watch ---------------------------------------------------------------------------


def a_record(folder: Path, name: str = "fetch-x") -> JobRecord:
    return new_record(name, ["fetch", "org/x", "--background"], True, {})


RECORDS = st.builds(
    JobRecord,
    name=st.from_regex(r"[A-Za-z0-9._+-]{1,90}", fullmatch=True),
    stage=st.text(max_size=30),
    unit=st.sampled_from(["B", "files"]),
    done=st.integers(0, 10**15),
    total=st.integers(0, 10**15),
    files=st.integers(0, 10**6),
    finished=st.integers(0, 10**6),
    rate=st.floats(0, 1e13),
    exit_code=st.one_of(st.none(), st.integers(0, 255)),
    error=st.dictionaries(st.sampled_from(["what", "why"]), st.text()),
)
STATES = st.sampled_from(["running", "done", "failed", "stopped", "interrupted"])


@given(st.lists(st.tuples(RECORDS, STATES), max_size=40), st.integers(20, 200), st.integers(1, 60))
def test_watch_fits_every_screen(jobs: List[Any], width: int, height: int) -> None:
    lines = watch_lines([Job(r, Path("/x"), 0, s) for r, s in jobs], time.time(), width, height)
    assert len(lines) <= height and all(
        len(line) <= width and line.isprintable() for line in lines
    ), lines


@pytest.mark.parametrize(
    "state, done, total, rate, left_s",
    [
        ("running", 40, 100, 2.0, 30.0),
        ("running", 0, 100, 1.0, 100.0),
        ("running", 100, 100, 2.0, 0.0),
        ("running", 0, 100, 0.0, None),
        ("running", 101, 100, 2.0, None),
        ("stopped", 40, 100, 2.0, None),
    ],
)
def test_the_time_that_is_left(
    state: str, done: int, total: int, rate: float, left_s: Any, tmp_path: Path
) -> None:
    record = replace(a_record(tmp_path), done=done, total=total, rate=rate)
    assert Job(record, tmp_path, 0, state).left_s == left_s


@pytest.mark.parametrize("uid, label", [(os.geteuid(), "fetch-x"), (4_000_000, "4000000:fetch-x")])
def test_a_job_of_another_user_has_his_name_or_number(uid: int, label: str, tmp_path: Path) -> None:
    assert Job(a_record(tmp_path), tmp_path, uid, "done").label == label


def test_watch_without_jobs_says_so_and_no_more() -> None:
    assert watch_lines([], 0, 80, 24) == ["no jobs yet"]


def screens(output: bytes) -> List[List[str]]:
    """The frames that were drawn, as lines."""
    frames = output.decode().split("\x1b[?1049l")[0].split("\x1b[H")[1:]
    return [frame.replace("\x1b[K", "").replace("\x1b[J", "").split("\r\n") for frame in frames]


def test_watch_on_a_terminal(hfship: Program, fetch: List[Any]) -> None:
    hfship(*fetch, "--background")
    pid, terminal = in_terminal(hfship, "watch")
    seen = read_until(terminal, b"B/s  ") + read_until(terminal, b"\x1b[J")
    silent = not termios.tcgetattr(terminal)[3] & termios.ECHO
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 60, 0, 0))
    small = (
        read_until(terminal, b"\x1b[J")
        + read_until(terminal, b"\x1b[J")
        + read_until(terminal, b"\x1b[J")
    )
    os.write(terminal, b"q")
    end = read_until(
        terminal, b"\x1b[?1049l"
    )  # what was there before comes back, and so does the cursor
    assert os.waitpid(pid, 0)[1] == 0 and b"\x1b[?25h" in end
    assert silent and termios.tcgetattr(terminal)[3] & termios.ECHO
    frame = next(frame for frame in screens(seen) if "B/s  " in frame[3] and "q quits" in frame[-1])
    assert len(frame) == 24 and max(map(len, frame)) <= 80 and frame[0].startswith("1 running, ")
    shape = r"fetch-tiny +fetching +\d+/\d+ +.* [kM]?B +\d+ % +.*B/s +(\d+[hms]){1,2} left"
    assert re.match(shape, frame[3])
    frame = [frame for frame in screens(small) if "q quits" in frame[-1]][-1]
    assert len(frame) == 10 and max(map(len, frame)) <= 60


def test_watch_in_a_pipe_ends_with_the_last_job(pyz: Program, fetch: List[Any]) -> None:
    assert pyz("watch").stdout == "" and json.loads(pyz("watch", "--json").stdout) == []
    pyz(*fetch, "--background")
    until(lambda: job(pyz, "fetch-tiny").record.done)
    (row,) = json.loads(pyz("watch", "--json").stdout)
    assert (
        row["state"] == "running"
        and row["total"] > row["done"] >= 0
        and row["user"]
        and row["unit"] == "B"
    )
    watchers = [
        pyz.start("watch", "fetch-tiny", "--interval", "0.2", *more) for more in ([], ["--json"])
    ]
    first = [watcher.stdout.readline() for watcher in watchers]  # type: ignore[union-attr]
    pyz("stop", "fetch-tiny")
    last = [watcher.communicate(timeout=60)[0].splitlines()[-1] for watcher in watchers]
    assert (
        re.match(r"\d{4}-\d\d-\d\dT[\d:]+Z fetch-tiny: fetching  \d+/\d+", first[0])
        and ": stopped" in last[0]
    )
    assert [json.loads(line)[0]["state"] for line in (first[1], last[1])] == ["running", "stopped"]
    assert "fetch-tiny  stopped" in pyz("watch", "--once").stdout


def test_logs_follow_a_job_to_its_end(pyz: Program, hub: FaultHub, fetch: List[Any]) -> None:
    pyz(*fetch, "--background")
    with pyz.start("logs", "-f", "fetch-tiny") as logs:
        followed = logs.stdout.readline()  # type: ignore[union-attr]
        hub.faults.rate_bps = None
        followed += logs.communicate(timeout=60)[0]
    assert followed == (logs_of(pyz) / "fetch-tiny.log").read_text() and "exit 0 (done)" in followed
    assert pyz("logs", "--tail", "1", "fetch-tiny").stdout == followed.splitlines(keepends=True)[-1]


DAMAGED = {
    "empty": b"",
    "cut": b'{"format": "hfship-job/1", "name"',
    "not ours": b'{"name": "app"}',
    "a list": b"[1]",
    "not text": b"\xff\xfe",
    "wrong types": b'{"format": "hfship-job/1", "name": 5}',
    "another name": b'{"format": "hfship-job/1", "name": "../../x"}',
    "not a number": b'{"format": "hfship-job/1", "name": "fetch-x", "rate": NaN}',
    "too large": b'{"format": "hfship-job/1", "name": "fetch-x", "done": 1' + b"0" * 400 + b"}",
    "no words": b'{"format": "hfship-job/1", "name": "fetch-x", "words": [1]}',
}


def test_damaged_records_are_named_and_passed_over(hfship: Program) -> None:
    logs_of(hfship).mkdir(parents=True)
    for name, content in DAMAGED.items():
        (logs_of(hfship) / f"fetch-{name}.json").write_bytes(
            content.replace(b"fetch-x", f"fetch-{name}".encode())
        )
    (logs_of(hfship) / "fetch-link.json").symlink_to("/dev/zero")
    os.mkfifo(logs_of(hfship) / "fetch-fifo.json")
    for command in (["watch", "--once"], ["watch", "--json"], ["watch", "--resume-all"]):
        assert hfship(*command).stderr.count("is not the record of a job") == len(DAMAGED) + 2
    assert "is not the record" in hfship("stop", "fetch-empty", code=5).stderr


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(), SCALARS, max_size=3)


@given(st.dictionaries(st.sampled_from(sorted(vars(JobRecord()))), VALUES))
def test_any_record_is_read_or_refused(values: Dict[str, Any]) -> None:
    content = json.dumps({"format": JOB_FORMAT, **values})
    with contextlib.suppress(ValueError):
        watch_lines([Job(parse_job(content.encode()), Path("/x"), 0, "running")], 0.0, 80, 24)


@pytest.mark.parametrize(
    "values",
    [
        {"words": ["fetch", 1]},
        {"words": [None]},
        {"env": {"A": 1}},
        {"env": {"A": ["b"]}},
        {"needs": [["HF_TOKEN"]]},
        {"words": "fetch"},
        {"format": "hfship-job/9"},
    ],
)
def test_a_record_whose_words_are_no_texts_is_none(values: Dict[str, Any]) -> None:
    whole = {"format": JOB_FORMAT, "words": ["fetch"], "env": {"A": "b"}, "needs": ["HF_TOKEN"]}
    assert parse_job(json.dumps(whole).encode()).words == ("fetch",)
    with pytest.raises(ValueError):
        parse_job(json.dumps({**whole, **values}).encode())


def test_a_process_that_got_the_number_of_another_is_not_the_job(tmp_path: Path) -> None:
    mine = a_record(tmp_path)
    assert state_of(mine) == "running"
    for other in ({"start": "1"}, {"boot_id": "x"}, {"pid": 2**22 + 1}, {"start": ""}):
        assert state_of(replace(mine, **other)) == "interrupted", other
    elsewhere = replace(mine, host="elsewhere", updated_at=time.time())
    assert state_of(elsewhere) == "running"
    assert state_of(replace(elsewhere, updated_at=time.time() - 100)) == "interrupted"


def test_a_forged_record_ends_no_foreign_process(tmp_path: Path) -> None:
    """Whoever may write a record may not make another user's `stop` send signals."""
    if os.geteuid() != 0:
        missing("root, to give a file away")
    with subprocess.Popen(["sleep", "60"]) as victim:
        record = replace(a_record(tmp_path), pid=victim.pid, start=process_start(victim.pid))
        write_job(tmp_path, record)
        os.chown(tmp_path / "fetch-x.json", 65534, 65534)
        forged = read_job(tmp_path / "fetch-x.json")
        assert forged.label == f"{forged.user}:fetch-x" and forged.state == "running"
        with pytest.raises(HostError, match="cannot stop"):
            stop_job(forged)
        assert not list(resume_jobs([forged._replace(state="interrupted")], Reporter("none")))
        assert victim.poll() is None
        victim.kill()


def test_old_jobs_leave_with_their_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.ops.jobs.JOBS_KEPT", 2)
    now, day = time.time(), 86400
    for name, age in (("a", 0), ("b", 1), ("c", 2), ("d", 100)):
        write_job(
            tmp_path, replace(a_record(tmp_path, name), state="done", updated_at=now - age * day)
        )
        (tmp_path / f"{name}.log").write_text("x")
        (tmp_path / f"{name}.log.1").write_text("x")
    write_job(tmp_path, replace(a_record(tmp_path, "e"), updated_at=now - 90 * day))
    expire_jobs(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a.json", "a.log", "a.log.1", "b.json", "b.log", "b.log.1", "e.json"]


@pytest.mark.parametrize(
    "state, code, resumable",
    [
        ("interrupted", None, True),
        ("interrupted", 130, True),
        ("failed", 8, True),
        ("failed", 7, False),
    ]
    + [("stopped", 130, False), ("done", 0, False), ("running", None, False)],
)
def test_what_resume_all_goes_on_with(
    state: str, code: Any, resumable: bool, tmp_path: Path
) -> None:
    """A job that lost its network is among them: at boot the network may come later than we do."""
    assert (
        Job(replace(a_record(tmp_path), exit_code=code), tmp_path, 0, state).resumable is resumable
    )


@pytest.mark.parametrize(
    "old, name",
    [
        ({"state": "done", "words": ("fetch", "org/other")}, "fetch-x"),
        ({"state": "stopped", "words": ("fetch", "org/other")}, "fetch-x"),
        ({"state": "running"}, "fetch-x-2"),
        ({"state": "interrupted"}, "fetch-x"),  # the same command goes on with it
        ({"state": "interrupted", "words": ("fetch", "org/x")}, "fetch-x"),
        ({"state": "interrupted", "words": ("fetch", "org/other")}, "fetch-x-2"),
        ({"state": "interrupted", "cwd": "/other"}, "fetch-x-2"),
        ({"state": "failed", "exit_code": 8, "cwd": "/other"}, "fetch-x-2"),
        ({"state": "failed", "exit_code": 7, "cwd": "/other"}, "fetch-x"),
    ],
)
def test_a_job_that_is_still_needed_keeps_its_name(
    old: Dict[str, Any], name: str, tmp_path: Path
) -> None:
    record = a_record(tmp_path)
    assert free_name(tmp_path, record) == "fetch-x"
    write_job(tmp_path, replace(record, **old))
    assert free_name(tmp_path, record) == name


def test_a_name_that_another_user_has_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = a_record(tmp_path)
    write_job(tmp_path, replace(record, state="done"))
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    assert free_name(tmp_path, record) == "fetch-x-2"


def test_running_jobs_come_first_and_the_youngest_of_the_others(tmp_path: Path) -> None:
    states = {"b": "running", "old": "done", "young": "failed", "a": "running"}
    for number, (name, state) in enumerate(states.items()):
        write_job(tmp_path, replace(a_record(tmp_path, name), state=state, updated_at=number))
    (tmp_path / "x.json").write_text("{}")
    said: List[str] = []
    found = read_jobs([tmp_path], said.append)
    assert [found.record.name for found in found] == ["a", "b", "young", "old"]
    assert len(said) == 1 and str(tmp_path / "x.json") in said[0]


def test_install_prints_what_resumes_jobs_at_boot(hfship: Program) -> None:
    text = hfship("watch", "--install").stdout
    assert (
        "@reboot " in text
        and "ExecStart=" in text
        and text.count("watch --resume-all --log-dir") == 2
    )
    assert Path(re.search(r"ExecStart=\S+ (\S+)", text)[1]).is_file()  # type: ignore[index]


@pytest.mark.real
@pytest.mark.parametrize("folder", ["/logs", "/a b's/50% of ${HOME}/$x"])
def test_systemd_reads_the_unit_as_it_was_meant(folder: str, tmp_path: Path) -> None:
    root = components.require("systemd")
    libraries = [
        root / place
        for place in (
            "usr/lib/x86_64-linux-gnu/systemd",
            "lib/x86_64-linux-gnu",
            "usr/lib/x86_64-linux-gnu",
        )
    ]
    argv = ["/bin/echo", "/x/my hfship.pyz", "watch", "--resume-all", "--log-dir", folder]
    unit = tmp_path / "hfship-resume.service"
    service = Service("hfship-resume", "Resume", tuple(argv), stays=False)
    text = install_text(service, Path("/home/me"))
    assert service.unit() in text and "/home/me/.config/systemd/user/hfship-resume.service" in text
    unit.write_text(service.unit())
    units = f"{tmp_path}:{root}/usr/lib/systemd/user"
    env = {
        "SYSTEMD_UNIT_PATH": units,
        "SYSTEMD_LOG_LEVEL": "debug",
        "XDG_RUNTIME_DIR": str(tmp_path),
    }
    env["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    verify = [root / "usr/bin/systemd-analyze", "--user", "verify", unit]
    done = subprocess.run(verify, env=env, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and not re.search(r"hfship-resume.service:\d+", said), said
    (line,) = re.findall(r"ExecStart:\s+Command Line: (.*)", said)
    assert shlex.split(line.replace(r"\$\$", "$")) == argv, (
        "it makes $ of $$ when it runs the line, and shows $ as \\$"
    )


# ---- logs ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_event_is_one_line(
    form: str, hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    log = tmp_path / "my.log"
    command = [
        "fetch",
        "org/tiny",
        "--endpoint",
        hub.url,
        "-o",
        tmp_path,
        "--log-format",
        form,
        "--log-file",
        log,
    ]
    hfship(*command)
    hfship(*command[:1], "org/gone", *command[2:], code=5)
    assert log.read_text().startswith((logs_of(hfship) / "fetch-tiny.log").read_text()[:20])
    for line in log.read_text().splitlines():
        if form == "json":
            event = json.loads(line)
            assert {"time", "level", "job", "stage", "message"} <= set(event)
        assert re.match(r'(\{"time": ")?20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ', line), line
    last = log.read_text().splitlines()[-1]
    assert json.loads(last)["exit_code"] == 5 if form == "json" else " | why   HTTP 404" in last
    if form == "json":
        (summary,) = [
            json.loads(line)
            for line in log.read_text().splitlines()
            if '"message": "summary"' in line
        ]
        assert summary["rows"]["exit"] == "0 (done)" and " pack " in summary["rows"]["next"]


def event(message: str) -> Dict[str, str]:
    return {"time": "T", "level": "info", "job": "", "stage": "", "message": message}


def test_logs_turn_over_and_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.base.eventlog.LOG_SIZE", 100)
    log = LogFile(tmp_path / "a.log")
    for number in range(50):
        log.write(event(f"{number:030d}"))
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [
        "a.log",
        *(f"a.log.{n}" for n in range(1, LOG_KEEP + 1)),
    ]
    assert all(path.stat().st_size <= 100 for path in files)
    kept = [
        int(line.split()[-1])
        for path in [*files[:0:-1], files[0]]
        for line in path.read_text().splitlines()
    ]
    assert kept == list(range(kept[0], 50)) and len(kept) >= 8


def test_a_full_disk_stops_the_log_and_nothing_else(
    tmp_path: Path, small_disk: Callable[..., Path]
) -> None:
    disk = small_disk(1)
    log, filler = LogFile(disk / "a.log"), disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    said = [log.write(event("x" * 5000)) for _ in range(5)]
    assert [bool(text) for text in said] == [True, False, False, False, False] and "space" in said[
        0
    ]
    filler.unlink()
    assert log.write(event("again")) == ""
    assert "5 lines before this one could not be written" in (disk / "a.log").read_text()


# options -> what is said
BROKEN_LOGS = {
    "full": (["--log-file", "/dev/full"], "cannot write the log /dev/full: No space left"),
    "no folder": (["--log-dir", "/dev/null/logs"], "cannot create the folder /dev/null/logs"),
}


@pytest.mark.parametrize("name", BROKEN_LOGS)
def test_the_work_goes_on_without_a_log(
    name: str, hfship: Program, hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    options, words = BROKEN_LOGS[name]
    done = hfship("fetch", "org/tiny", "--endpoint", hub.url, "-o", tmp_path, *options)
    assert done.stderr.count("warning: ") == 1 and words in done.stderr, done.stderr
    assert same_files(published, tmp_path / "tiny")


# -- secrets

SECRET = "SEcret123"


@pytest.mark.parametrize(
    "variable, value",
    [
        ("HF_HUB_TOKEN", SECRET),
        ("HF_HUB_ACCESS_TOKEN", SECRET),
        ("HF_TOKEN", SECRET),
        ("https_proxy", f"http://me:{SECRET}@proxy:3128"),
        ("HTTPS_PROXY", f"{SECRET}@proxy"),
        ("ALL_PROXY", f"me:{SECRET}@proxy"),
        ("all_proxy", f"socks5://me:{SECRET}/x@proxy"),
        ("HF_HUB_USER_AGENT_ORIGIN", f"https://cdn/?key={SECRET}"),
    ],
)
def test_no_secret_variable_is_in_a_record(variable: str, value: str) -> None:
    record = new_record("fetch-m", ["fetch", "o/m"], True, {variable: value, "PATH": "/bin"})
    assert SECRET not in json.dumps(asdict(record))
    assert record.needs == (variable,)
    assert record.env == {"PATH": "/bin"}


@pytest.mark.parametrize("variable", ["HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"])
def test_what_a_resumed_job_needs_stays_in_its_record(variable: str) -> None:
    record = new_record("fetch-m", ["fetch", "o/m"], True, {variable: "1"})
    assert record.env == {variable: "1"} and record.needs == ()


@pytest.mark.parametrize(
    "words",
    [
        ["--env", f"K={SECRET}"],
        [f"--env=K={SECRET}"],
        ["--", "--api-key", SECRET],
        ["--", f"--api-key={SECRET}"],
        ["--", "--hf-token", SECRET],
        ["--", f"--hf_token={SECRET}"],
        [f"--extra-arg=--hf-token={SECRET}"],
        ["--extra-arg=--hf-token", f"--extra-arg={SECRET}"],
        ["--extra-arg", "--hf-token", "--extra-arg", SECRET],
        ["--extra-arg", f"--hf-token={SECRET}"],
        [f"http://me:{SECRET}@host/"],
        ["--env", "--env", f"K={SECRET}"],
    ],
)
def test_no_secret_word_is_in_a_record(words: List[str]) -> None:
    public = public_words(["serve", "m", *words, "--name", "n"])
    assert SECRET not in " ".join(public)
    assert public[:2] == ("serve", "m") and public[-2:] == ("--name", "n")
