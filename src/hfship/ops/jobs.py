# SPDX-License-Identifier: Apache-2.0
"""Records of jobs: what is known of runs while they run and after.

Each fetch, pack, verify, unpack, serve and push has a log JOB.log in the log folder and beside it a
record JOB.json; watch, stop, logs and --resume-all work with these. This room names, writes, reads
and expires records; ops/keeper keeps that of a run up to date.

A record (`hfship-job/1`, JSON, replaced atomically up to four times a second) holds the fields of
JobRecord; docs/formats.md has it in full. `state` is running, done, failed, stopped (by Ctrl-C or
`stop`) or interrupted (killed, terminal closed, reboot). Whoever reads a record takes "running"
for interrupted when the process is gone. A run that is refused before it began (arguments, locks,
nothing found) leaves no record.

Promises: no secret is in a record.
Never: signals, resumes or believes a process because of what another user's record says, or reads
or writes a record or log that somebody put there as a link, a pipe or a file of his own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pwd
import re
import signal
import stat
import time
from pathlib import Path
from typing import (
    Any,
    Callable,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from hfship.base.below import Refused, opened_below, stat_below
from hfship.base.errors import Exit
from hfship.base.eventlog import LOG_KEEP
from hfship.base.files import write_below
from hfship.base.locks import LEASE_EXPIRY_S, boot_id, host_name, process_start, still_runs
from hfship.base.reading import STATE_SIZE, parse_json, read_whole
from hfship.base.redaction import is_secret_variable, redact
from hfship.base.settings import TOKEN_VARIABLES, typed_fields
from hfship.base.text import printable
from hfship.base.values import asdict, dataclass, field

JOB_FORMAT = "hfship-job/1"
RECORD_INTERVAL_S = 0.25
JOBS_KEPT, JOB_DAYS = 100, 90  # ended jobs beyond these go, with their logs
MOST_FILES = 10_000  # that are looked at in a log folder, which may be anybody's
OTHER_LOGS = "/home/*/logs/hfship"  # where watch looks for the jobs of other users
STOP_STEPS = (
    (signal.SIGINT, 5.0),
    (signal.SIGTERM, 10.0),
    (signal.SIGKILL, 5.0),
)  # and how long each may take
# Options whose values are in no record; of vLLM's (--hf-token), too.
_SECRET_OPTION = re.compile(
    r"(?i)--([\w-]+[-_])?(env|token|password|passwd|passphrase|secret|api[-_]?key)$"
)
_PASSED_ON = "--extra-arg"  # what follows is a word for vLLM
# What a job that is resumed by cron or systemd must find again of its environment.
_KEPT_VARIABLES = re.compile(
    r"HFSHIP_(\w+_DIR|KEY)|HF_(ENDPOINT|HOME|TOKEN_PATH|HUB_\w+)"
    r"|HUGGINGFACE_HUB_CACHE|NETRC|XDG_CACHE_HOME|PATH|LANG|LC_ALL"
    r"|TMPDIR|DOCKER_(HOST|CONFIG)|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE"
    r"|(?i:https?|all|no)_(?i:proxy)"
)


@dataclass(frozen=True)
class JobRecord:
    """One run: how it was started, the process, and how far it is.

    Times are seconds since the epoch.
    """

    name: str = ""
    command: str = ""
    words: Tuple[str, ...] = ()  # the command line after the program; *** where a secret was
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    needs: Tuple[str, ...] = ()  # environment variables with secrets that it had
    background: bool = False
    host: str = ""
    pid: int = 0
    # process_start and boot_id: no other process that gets the number is taken for it.
    start: str = ""
    boot_id: str = ""
    began_at: float = 0.0
    updated_at: float = 0.0
    state: str = "running"
    stage: str = ""
    unit: str = "B"
    done: int = 0
    total: int = 0
    files: int = 0
    finished: int = 0  # files
    rate: float = 0.0  # units per second, lately
    exit_code: Optional[int] = None
    error: Mapping[str, str] = field(default_factory=dict)  # what, why, next


class Job(NamedTuple):
    """A record, the folder in which it lies, whose it is, and its state as it is now."""

    record: JobRecord
    folder: Path
    uid: int
    state: str

    @property
    def log(self) -> Path:
        """The log, which may not be there."""
        return self.folder / (self.record.name + ".log")

    @property
    def label(self) -> str:
        """The name, with that of its user when that is somebody else."""
        return self.record.name if self.uid == os.geteuid() else f"{self.user}:{self.record.name}"

    @property
    def user(self) -> str:
        """The name of its user, or the number where that has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def resumable(self) -> bool:
        """Did something else than its own work end it, or the network, which comes back?"""
        if self.state == "failed":
            return self.record.exit_code == Exit.NETWORK
        return self.state == "interrupted"

    @property
    def left_s(self) -> Optional[float]:
        """Seconds to the end of the stage at the present speed; None when that is not known."""
        record = self.record
        if self.state != "running" or record.rate < 1 or record.done > record.total:
            return None
        return (record.total - record.done) / record.rate


def job_name(command: str, subjects: Sequence[str]) -> str:
    """The name for a run of `command` on these models or archives.

    >>> [job_name("fetch", w) for w in (["Qwen/Qwen3-8B@main"], ["/t/m.tar.zst.0001", "n"], [])]
    ['fetch-Qwen3-8B', 'fetch-m+1', 'fetch-all']
    """
    if not subjects:
        return f"{command}-all"

    last_part = subjects[0].rstrip("/").rpartition("/")[2]
    subject = re.sub(r"@.*|\.tar\.zst.*", "", last_part)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", subject).strip("-.")[:60] or "all"
    if len(subjects) == 1:
        return f"{command}-{label}"

    return f"{command}-{label}+{len(subjects) - 1}"


def public_words(words: Sequence[str]) -> Tuple[str, ...]:
    """A command line as it may be written down.

    >>> public_words(["serve", "m", "--env", "A=b", "--token=c", "http://u:pass@h"])
    ('serve', 'm', '--env', '***', '--token=***', 'http://u:***@h')
    >>> public_words(["--extra-arg=--hf-token", "--extra-arg", "c"])
    ('--extra-arg=--hf-token', '--extra-arg', '***')
    """
    public: List[str] = []
    is_secret = False  # the next value
    for word in words:
        passed_on = ""
        if word.startswith(_PASSED_ON + "="):
            passed_on = _PASSED_ON + "="
            word = word[len(passed_on) :]
        option, has_value, _ = word.partition("=")
        if word == _PASSED_ON:
            public.append(word)
            continue
        if is_secret:
            public.append(f"{passed_on}***")
        elif has_value and _SECRET_OPTION.match(option):
            public.append(f"{passed_on}{option}=***")
        else:
            public.append(passed_on + redact(word))
        is_secret = _SECRET_OPTION.match(word) is not None

    return tuple(public)


def current_folder() -> str:
    """Where we are; / when that was removed."""
    with contextlib.suppress(FileNotFoundError):
        return os.getcwd()
    return "/"


def new_record(
    name: str, words: Sequence[str], background: bool, env: Mapping[str, str]
) -> JobRecord:
    """The record of this process."""
    pid, now = os.getpid(), time.time()
    kept = {name: value for name, value in env.items() if _KEPT_VARIABLES.fullmatch(name)}
    secret = [name for name, value in kept.items() if is_secret_variable(name, value)]
    secret += [name for name in TOKEN_VARIABLES if env.get(name)]
    return JobRecord(
        name=name,
        command=words[0],
        words=public_words(words),
        cwd=current_folder(),
        env={name: value for name, value in kept.items() if name not in secret},
        needs=tuple(secret),
        background=background,
        host=host_name(),
        pid=pid,
        start=process_start(pid),
        boot_id=boot_id(),
        began_at=now,
        updated_at=now,
    )


def parse_job(content: bytes) -> JobRecord:
    """Read a record. Raises ValueError for what is none."""
    value = parse_json(content)
    if not isinstance(value, dict) or value.get("format") != JOB_FORMAT:
        raise ValueError(f"its format is not {JOB_FORMAT}")

    known = typed_fields(JobRecord(), value)
    for name, found in known.items():
        inside: Iterable[Any] = ()
        if isinstance(found, dict):
            inside = found.values()
        elif isinstance(found, tuple):
            inside = found

        if not all(isinstance(item, str) for item in inside):
            raise ValueError(f"{name} is not what it should be")

    return JobRecord(**known)


def state_of(record: JobRecord) -> str:
    """The state now. Of another machine's process its silence tells."""
    if record.state != "running":
        return record.state
    if record.host == host_name():
        is_alive = still_runs(record.pid, record.start, record.boot_id)
    else:
        is_alive = time.time() - record.updated_at < LEASE_EXPIRY_S

    if is_alive:
        return "running"

    return "interrupted"


def read_job(path: Path) -> Job:
    """The job whose record lies at `path`. Raises OSError and ValueError."""
    # Whoever may write there may have put a link or a pipe in its place.
    with opened_below(path.parent, path.name) as fd:
        record = parse_job(read_whole(fd, STATE_SIZE))
        uid = os.fstat(fd).st_uid
    if record.name != path.stem or not re.fullmatch(r"[A-Za-z0-9._+-]+", record.name):
        raise ValueError(f"it is of another job, {record.name}")
    return Job(record, path.parent, uid, state_of(record))


def read_jobs(
    folders: Iterable[Path], complain: Callable[[str], None] = lambda _: None
) -> List[Job]:
    """All jobs of log folders: the running ones by name, then the others, the youngest first.

    `complain` is called with a sentence for each file that is no record.
    """
    running: List[Job] = []
    ended: List[Job] = []
    for path in (path for folder in folders for path in _record_paths(folder)):
        try:
            job = read_job(path)
        except FileNotFoundError:
            continue  # it has just expired
        except (OSError, ValueError) as exc:
            why = printable(f"{path} is not the record of a job ({exc})")
            complain(f"{why}; remove it if it is not needed")
            continue
        if job.state == "running":
            running.append(job)
        else:
            ended.append(job)

    running.sort(key=lambda job: job.record.name)
    ended.sort(key=lambda job: job.record.updated_at, reverse=True)
    return running + ended


def _record_paths(folder: Path) -> List[Path]:
    """What may be the records of a log folder, in order; of thousands, which nobody keeps, some."""
    paths: List[Path] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MOST_FILES):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                paths.append(folder / entry.name)
    return sorted(paths)


def write_job(folder: Path, record: JobRecord) -> None:
    """Replace a record. Raises DiskError."""
    text = json.dumps({"format": JOB_FORMAT, **asdict(record)}, indent=1)
    write_below(folder, record.name + ".json", text, durable=False)


def expire_jobs(folder: Path) -> None:
    """Remove our ended jobs that are old or too many, with their logs."""
    oldest = time.time() - JOB_DAYS * 86400
    for number, job in enumerate(our_ended_jobs(folder)):
        if number < JOBS_KEPT and job.record.updated_at >= oldest:
            continue
        with contextlib.suppress(OSError, ValueError):  # another run expires it too
            remove_job(job)


def our_ended_jobs(folder: Path) -> List[Job]:
    """Those of this user in a log folder that do not run, the youngest first."""
    us = os.geteuid()
    ended = []
    for job in read_jobs([folder]):
        if job.uid == us and job.state != "running":
            ended.append(job)
    return ended


def job_files(job: Job) -> List[Path]:
    """The record of a job, and its logs."""
    record = job.folder / f"{job.record.name}.json"
    logs = log_files(job)
    return [record, *logs]


def remove_job(job: Job) -> bool:
    """Remove the record and the logs of a job, unless a run has taken its name meanwhile.

    Returns whether they went. Raises OSError, ValueError.
    """
    record, *logs = job_files(job)
    if read_job(record).record != job.record:
        return False
    for path in [*logs, record]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return True


def log_files(job: Job) -> List[Path]:
    """The log of a job, the oldest part first."""
    names = [f"{job.log.name}.{number}" for number in range(LOG_KEEP, 0, -1)]
    paths = [job.log.with_name(name) for name in [*names, job.log.name]]
    return [path for path in paths if path.is_file()]


def free_name(folder: Path, record: JobRecord) -> str:
    """The name of an earlier run of the same command, or one that no run needs any more.

    One that waits to be resumed keeps its name, whatever became of others of that name: its record
    would say for ever that it waits.
    """
    waiting = _waiting_name(folder, record)
    if waiting:
        return waiting

    for number in range(1, 1000):
        name = record.name
        if number > 1:
            name = f"{record.name}-{number}"
        if _may_take(folder, name, record):
            break

    return name


def _waiting_name(folder: Path, record: JobRecord) -> str:
    """The name of our job that waits for this very command to be run again; "" where none does."""
    numbered = re.compile(re.escape(record.name) + r"(-\d+)?\.json")
    for path in _record_paths(folder):
        if not numbered.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError, ValueError):
            old = read_job(path)
            ours = old.uid == os.geteuid()
            if ours and old.resumable and _asked_for(record) == _asked_for(old.record):
                return old.record.name
    return ""


def _may_take(folder: Path, name: str, record: JobRecord) -> bool:
    """Are the files of this name ours, or not there, and needed by no other run?"""
    record_name = f"{name}.json"
    if not (is_ours(folder, record_name) and is_ours(folder, f"{name}.log")):
        return False
    try:
        old = read_job(folder / record_name)
    except (FileNotFoundError, Refused, ValueError):
        return True
    return _may_replace(record, old)


def is_ours(folder: Path, name: str) -> bool:
    """Is it a file of this user, or not there? Raises OSError for a folder that cannot be read."""
    try:
        status = stat_below(folder, name)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _may_replace(record: JobRecord, old: Job) -> bool:
    """Is the old job over, and not waiting to be resumed by another command?"""
    if old.state == "running":
        return False
    return not old.resumable or _asked_for(record) == _asked_for(old.record)


def _asked_for(record: JobRecord) -> List[str]:
    """What a run does, and where: in the foreground or not, it is the same."""
    return [*(word for word in record.words if word != "--background"), record.cwd]
