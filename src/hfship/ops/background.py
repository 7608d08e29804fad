# SPDX-License-Identifier: Apache-2.0
"""Runs that outlive their terminal: detach, follow, stop, resume.

Owns the pipe between a command with --background and the process that goes on: that writes the name
of its job, or as JSON why there is none.
Never: signals or resumes what another user's record names, unless the process is that user's.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, Sequence, Tuple, Union

from hfship.base.errors import (
    Exit,
    HfshipError,
    HostError,
    IncompleteError,
    NotFoundError,
    UsageError,
    as_typed,
    command_line,
)
from hfship.base.files import disk_error
from hfship.base.locks import InUseError, host_name, still_runs
from hfship.base.processes import run_program
from hfship.base.pyz import own_file
from hfship.base.reading import parse_json
from hfship.base.report import FailedResult
from hfship.base.settings import TOKEN_VARIABLES, find_token, hub_path
from hfship.base.values import dataclass, replace
from hfship.ops.jobs import (
    STOP_STEPS,
    current_folder,
    read_job,
    write_job,
)

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.ops.jobs import Job, JobRecord


def detach(folder: Path) -> Tuple[int, int]:
    """Fork a process of its own session, which no terminal's end ends.

    Returns its id (0 in it) and a pipe: for it to say its name, for us to hear it. What it says
    goes to our stderr until it has begun. Raises DiskError when the log folder cannot be used:
    nobody would know of the job.
    """
    import tempfile  # few jobs are put into the background, and it loads much

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(4096))
    except OSError as exc:
        step = "free space, or choose another folder with --log-dir"
        raise disk_error(exc, "keep the log of a background job in", folder, step) from exc

    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader

    os.close(reader)
    os.setsid()
    # A shell's & has SIGINT ignored, and `stop` sends it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return 0, writer


def await_job(pid: int, reader: int) -> Tuple[str, int]:
    """Wait until a detached process has begun or ended.

    Returns its name and 0, or why it ended, as JSON, and its exit code.
    """
    with os.fdopen(reader) as stream:
        try:
            said = stream.read()
            if said and not said.startswith("{"):
                return said, 0
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGINT)
            said = stream.read()

    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        return said, os.WEXITSTATUS(status)

    return said, 128 + os.WTERMSIG(status)


def stop_job(job: Job) -> str:
    """End a job as Ctrl-C does, and by force when it does not listen.

    Returns a sentence about what came of it. Raises HostError.
    """
    record = job.record
    if not _may_signal(job):
        why = f"it is a job of {job.user} on {record.host}"
        step = f"stop it there as {job.user}: hfship stop {record.name}"
        raise HostError(f"cannot stop {job.label}", why, step)

    if job.state != "running" and not job.resumable:
        return f"{record.name} has ended already ({job.state})"
    if not _end_process(record):
        why = f"process {record.pid} hangs in the kernel"
        raise HostError(f"{record.name} does not end", why, "check its disk")

    with contextlib.suppress(OSError, ValueError):
        ended = read_job(job.folder / (record.name + ".json")).record
        if ended.state != "done" and job.uid == os.geteuid():  # where it could not say so itself
            write_job(job.folder, replace(ended, state="stopped", exit_code=int(Exit.INTERRUPTED)))

    return f"stopped {record.name}; to continue: {command_of(record)}"


def _may_signal(job: Job) -> bool:
    """Is it a job of this machine and of this user, or of one whom root may signal?"""
    record = job.record
    if record.host != host_name() or os.geteuid() not in (0, job.uid):
        return False
    if job.state == "running":
        with contextlib.suppress(FileNotFoundError):
            # Else the record is a trap for root.
            return os.stat(f"/proc/{record.pid}").st_uid == job.uid

    return True


def _end_process(record: JobRecord) -> bool:
    """Signal the process of a job, ever harder, until it ends. Returns whether it did."""
    process = record.pid, record.start, record.boot_id
    for signum, patience_s in STOP_STEPS:
        deadline = time.monotonic() + patience_s
        with contextlib.suppress(ProcessLookupError):
            if still_runs(*process):
                os.kill(record.pid, signum)
        while time.monotonic() < deadline and still_runs(*process):
            time.sleep(0.05)

    return not still_runs(*process)


def command_of(record: JobRecord) -> str:
    """The command of a job, to be typed once more."""
    command = as_typed(command_line("hfship", *record.words))
    if record.cwd == current_folder():
        return command
    return f"cd {shlex.quote(record.cwd)} && {command}"


def with_job(exc: InUseError, jobs: Sequence[Job], name: str) -> InUseError:
    """The error with the name of the job that is in the way of one that would be called `name`."""
    holder = ""
    for job in jobs:
        record = job.record
        is_holder = record.name == name
        if exc.pid:
            is_holder = record.pid == exc.pid
        if job.state == "running" and is_holder:
            holder = record.name
            break

    if not holder:
        return exc

    step = f"hfship logs -f {holder}   or: hfship stop {holder}"
    return InUseError(exc.what, f"{exc.why}\nthat is the job {holder}", step, exc.pid)


@dataclass(frozen=True)
class ResumedJob:
    """A job that was started again."""

    name: str

    def text(self) -> str:
        """One line."""
        return f"resumed {self.name}"

    def json(self) -> Dict[str, Any]:
        """Its name and state."""
        return {"name": self.name, "state": "resumed"}


def resume_jobs(
    jobs: Sequence[Job], reporter: Reporter
) -> Iterator[Union[ResumedJob, FailedResult]]:
    """Start again what was interrupted in the background on this machine; what came of each.

    What is left alone is said, with the reason.
    """
    for job in jobs:
        if job.uid != os.geteuid():
            continue
        record = job.record
        why_left = _why_left(job)
        if why_left:
            reporter.info(f"{record.name} {why_left}")
        elif job.resumable:
            try:
                yield ResumedJob(resume_job(record, reporter))
            except HfshipError as exc:
                reporter.error(exc)
                yield FailedResult(exc, record.name)


def _why_left(job: Job) -> str:
    """Why a job of ours that has not ended well is not resumed here; "" where nothing need be
    said."""
    record = job.record
    if job.state == "running":
        return "runs"
    if job.state == "failed" and not job.resumable:
        return f"failed with {record.exit_code}, and is left to you: {command_of(record)}"
    if not job.resumable:
        return ""
    if record.host != host_name():
        return f"is resumed on {record.host}, where it ran"
    if not record.background:
        return f"ran in the foreground, and is left to you: {command_of(record)}"
    return ""


def resume_job(record: JobRecord, reporter: Reporter) -> str:
    """Run a job's command again, with its folder and environment; returns the job's name.

    Secrets come from where they always come from. Raises UsageError, NotFoundError and
    IncompleteError.
    """
    what, step = f"cannot resume {record.name}", command_of(record)
    if "***" in " ".join(record.words):
        raise UsageError(what, "its command line had a secret, and no secret is written down", step)
    if not Path(record.cwd).is_dir():
        why = f"its folder {record.cwd} is not there"
        raise NotFoundError(what, why, f"mount it, or: hfship stop {record.name}")

    _warn_of_missing_secrets(record, reporter)
    argv = [sys.executable, str(own_file()), *record.words]
    everything = {**os.environ, **record.env}  # it is hfship itself that runs
    done = run_program(argv, env=everything, cwd=Path(record.cwd))
    if done.code:
        raise IncompleteError(f"{what}: exit code {done.code}", done.err.strip(), step)

    return _job_that_began(done.out) or record.name


def _job_that_began(said: str) -> str:
    """The name that a command with --background printed, alone or with --json."""
    said = said.strip()
    if not said.startswith("{"):
        return said
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(parse_json(said)["job"])
    return ""


def _warn_of_missing_secrets(record: JobRecord, reporter: Reporter) -> None:
    """Say which variables with secrets it had that are not set now, unless a token is found."""
    missing = [name for name in record.needs if not os.environ.get(name)]
    if not missing:
        return

    env = {**os.environ, **record.env}
    only_tokens = set(missing) <= set(TOKEN_VARIABLES)
    if only_tokens and find_token(env) is not None:
        return

    file = hub_path(env, "token", "HF_TOKEN_PATH")
    names = ", ".join(missing)
    reporter.warn(
        f"{record.name} had {names}, which is not set now; a token is also read from {file}"
    )
