# SPDX-License-Identifier: Apache-2.0
"""hfship on the hosts of a site: one command there, or the same on many at once.

What a host does it does itself, by the hfship.pyz in its data folder, which is brought there first
and is bit for bit the one that runs here: so models are proven, GPUs planned and files locked where
they are, and docker needs no other door than its own socket. Through ssh go words in and JSON out.

Promises: keys, known hosts and jumps are those of the operator's ssh; a host that does not answer
holds no other up; what was begun there goes on when the line breaks, and the next run finds it.
Never: a question of ssh; a word that a shell there could take apart.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Mapping, Sequence, TypeVar, Union

from hfship.base import errors
from hfship.base.errors import HfshipError, HostError, NetworkError, UsageError
from hfship.base.processes import Completed, follow_program
from hfship.base.pyz import own_content
from hfship.base.settings import FOLDERS
from hfship.base.values import dataclass
from hfship.ops.destination import SSH_OPTIONS, Destination
from hfship.site.hosts import SiteHost

PROGRAM = "hfship.pyz"
LOOK_S = 20.0  # for a host to say how it is
SILENCE_S = 180.0  # after which a host that works is given up: it says something each 15 s
IN_USE_S = 1800.0  # for which one waits for what an earlier run left at work there
IN_USE_POLL_S = 3.0
TICK_S = 0.2
NOT_YET = float("inf")
MOST_AT_ONCE = 256
_ABSENT = 76  # exit status of the script: the program is not there, or is another one
_NO_PYTHON = 127

# POSIX sh, read from stdin. What hfship says to people comes as it is said; its result at the end.
_RUN_SCRIPT = """\
LC_ALL=C.UTF-8; export LC_ALL
main() {{
  exec 4>&1
  cd /
  if echo {sha256}'  '{program} | sha256sum -c >/dev/null 2>&1; then :; else
    echo; echo {mark} begin; echo {mark} end {absent}; exit 0
  fi
  out=$(env {variables} python3 {program} {words} 2>&4 4>&- </dev/null)
  code=$?
  echo; echo {mark} begin; printf '%s\\n' "$out"; echo {mark} end "$code"
}}
main
"""
_PUT_SCRIPT = """\
umask 022
mkdir -p -- {folder} && cd -- {folder} && test -w . || {{ echo 'cannot write there'; exit 73; }}
umask 077
base64 -d >{partial} <<'CONTENT' && chmod {mode:o} {partial} && mv -f -- {partial} {name}
{content}
CONTENT
"""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class FarResult:
    """What hfship said on a host: its exit code, and the JSON of its result (None for none)."""

    code: int
    value: Any


class FarHost:
    """A host of the site. `stop` ends what is asked of it; `say` is told what it says meanwhile."""

    def __init__(self, host: SiteHost, say: Callable[[str], None] = lambda _: None) -> None:
        self.host = host
        self.stop = threading.Event()
        self.asked_at = time.monotonic()  # while the program is brought, NOT_YET
        self._say = say
        self._to = destination_of(host)

    @property
    def name(self) -> str:
        """Its name in the models file."""
        return self.host.name

    @property
    def program(self) -> str:
        """Where its hfship.pyz is."""
        return f"{self.host.data}/{PROGRAM}"

    def at(self, folder: str) -> Destination:
        """A folder there, as push has it."""
        to = self._to
        return Destination(to.host, folder, to.ssh)

    def hfship(self, *words: object, silence_s: float = SILENCE_S) -> FarResult:
        """Run a command there to its end, whatever that is. Raises HfshipError when there is no
        answer."""
        content = program_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        for _ in range(2):
            done = self._run(sha256, [*map(str, words), "--json"], silence_s)
            if done.code != _ABSENT:
                return self._result_of(done)
            self._bring(content)
        raise HostError(f"{self.name} does not keep {self.program}", "", "look at its disk")

    def asked(self, *words: object, silence_s: float = SILENCE_S) -> Any:
        """What a command there results in. One that an earlier run left at work is waited for.
        Raises what it fails with, of the same class as here."""
        deadline = time.monotonic() + IN_USE_S
        while True:
            result = self.hfship(*words, silence_s=silence_s)
            failure = failure_of(self.name, result)
            if failure is None:
                return result.value
            if "in use by" not in failure.what or time.monotonic() > deadline:
                raise failure
            self._say("an earlier run is at work there: waiting for it")
            if self.stop.wait(IN_USE_POLL_S):
                raise failure

    def sh(self, script: str) -> Completed:
        """Run a script of POSIX sh there. Raises what Destination.error returns."""
        return self._to.run(script, self.stop)

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Have a file there with this content, as a whole or not at all. Raises HfshipError."""
        folder, _, name = path.rpartition("/")
        partial = f".{name}.{secrets.token_hex(4)}.incomplete"
        script = _PUT_SCRIPT.format(
            folder=shlex.quote(folder),
            partial=shlex.quote(partial),
            name=shlex.quote(name),
            mode=mode,
            content=base64.encodebytes(content).decode("ascii"),
        )
        done = self.sh(script)
        if done.code:
            raise self.at(folder).error(done)

    def _bring(self, content: bytes) -> None:
        self._say(f"bringing {PROGRAM}")
        self.asked_at = NOT_YET
        self.put(self.program, content, 0o755)
        self.asked_at = time.monotonic()

    def _run(self, sha256: str, words: Sequence[str], silence_s: float) -> Completed:
        mark = f"hfship-{secrets.token_hex(8)}"
        script = _RUN_SCRIPT.format(
            mark=mark,
            sha256=sha256,
            program=shlex.quote(self.program),
            variables=shlex.join(self._variables()),
            words=shlex.join(words),
            absent=_ABSENT,
        )
        argv = ["sh"]
        if self._to.host:
            argv = [*self._to.command(), "sh"]
        result = _Result(mark, self._say)
        done = follow_program(argv, self.stop, script, result.take, silence_s)
        if result.code is None:
            raise self._no_answer(done)
        return Completed(result.code, done.out, done.err)

    def _variables(self) -> List[str]:
        """Settings there: the folders of the host, and nothing that its login has set."""
        words = ["-u", "HFSHIP_MODELS_FILE"]
        for name, folder in self.host.folders.items():
            words.append(f"{FOLDERS[name].variable}={folder}")
        return words

    def _no_answer(self, done: Completed) -> HfshipError:
        if self.stop.is_set() and not done.ended:
            return self._too_slow()
        return self._to.error(done)

    def _too_slow(self) -> HfshipError:
        step = "timeout = 120, or more, in its [[host]], if it is only slow"
        if self._to.host:
            step = f"{self._to.login()} true     # is it there?\n{step}"
        return NetworkError(f"{self.name} does not answer", "it took too long", step)

    def _result_of(self, done: Completed) -> FarResult:
        if done.code == _NO_PYTHON:
            step = f"install python3 (3.8 or later) on {self.name}"
            raise HostError(f"{self.name} has no python3", done.err[-300:], step)
        text = done.out.strip()
        if not text:
            return FarResult(done.code, None)
        try:
            return FarResult(done.code, json.loads(text))
        except ValueError as exc:
            what = f"{self.name} answers what is no result"
            raise HostError(what, text[-300:], "run hfship there by hand") from exc


class _Result:
    """Follows what the script says: lines for people, and after the mark the result."""

    def __init__(self, mark: str, say: Callable[[str], None]) -> None:
        self._mark, self._say = mark, say
        self._begun = False
        self.code: Union[int, None] = None

    def take(self, line: str) -> bool:
        """Take a line; False for one of the result, which is kept."""
        if line == f"{self._mark} begin":
            self._begun = True
            return True
        ended = re.match(rf"{self._mark} end (\d{{1,3}})$", line)
        if ended:
            self.code = int(ended[1])
            return True
        if not self._begun and line.strip():
            self._say(line)
        return not self._begun


def destination_of(host: SiteHost) -> Destination:
    """How ssh reaches a host, without a question."""
    if host.local:
        return Destination("", host.data)
    ssh = ["ssh", "-o", "BatchMode=yes", *SSH_OPTIONS]
    if host.port:
        ssh += ["-p", str(host.port)]
    if host.key:
        ssh += ["-i", host.key]
    if host.jump:
        ssh += ["-J", host.jump]
    where = host.reached_at
    if ":" in where:
        where = f"[{where}]"
    if host.user:
        where = f"{host.user}@{where}"
    return Destination(where, host.data, tuple(ssh))


def program_bytes() -> bytes:
    """The hfship.pyz that runs, to be brought to hosts. Raises UsageError for one from source."""
    content = own_content()
    if not content:
        step = "make build, then python3 dist/hfship.pyz ..."
        raise UsageError("hosts are served by hfship.pyz, and this runs from source", "", step)
    return content


_CLASSES = {
    int(one.code): one
    for one in (
        errors.UsageError,
        errors.IncompleteError,
        errors.AuthError,
        errors.NotFoundError,
        errors.IntegrityError,
        errors.DiskError,
        errors.NetworkError,
        errors.HostError,
        errors.Interrupted,
    )
}


def failure_of(name: str, result: FarResult) -> Union[HfshipError, None]:
    """What a command on the host `name` failed with; None for one that did not.

    >>> row = {"error": {"what": "no x", "why": "", "next": "hfship list"}, "exit_code": 5}
    >>> failure = failure_of("gpu1", FarResult(5, [row]))
    >>> type(failure).__name__, failure.what, failure.next_step
    ('NotFoundError', 'gpu1: no x', 'on gpu1: hfship list')
    """
    for row in reversed(rows_of(result.value)):
        error = row.get("error")
        if isinstance(error, dict):
            kind = _CLASSES.get(int(row.get("exit_code", 0)), HostError)
            step = str(error.get("next", ""))
            if step:
                step = f"on {name}: {step}"
            return kind(f"{name}: {error.get('what', '')}", str(error.get("why", "")), step)
    return None


def rows_of(value: Any) -> List[Mapping[str, Any]]:
    """The rows of a JSON result: those of a list, or the one that it is."""
    rows = value if isinstance(value, list) else [value]
    return [row for row in rows if isinstance(row, dict)]


# -- many at once


def at_once(
    hosts: Sequence[FarHost], work: Callable[[FarHost], Answer], limit_s: float = 0.0
) -> Dict[str, Union[Answer, HfshipError]]:
    """What `work` gives for each host, or the error that it raised, by name, in the order of
    `hosts`. With a limit (seconds; that of the host wins) a host that is not done by then is given
    up; Ctrl-C gives up all. The program that is brought there first has its own time."""
    ended = threading.Event()

    def guarded(host: FarHost) -> Union[Answer, HfshipError]:
        limit = limit_s and (host.host.timeout or limit_s)
        if limit:
            host.asked_at = time.monotonic()
            threading.Thread(target=give_up, args=(host, limit), daemon=True).start()
        try:
            return work(host)
        except HfshipError as exc:
            return exc

    def give_up(host: FarHost, limit: float) -> None:
        while not ended.wait(TICK_S):
            if time.monotonic() > host.asked_at + limit:
                host.stop.set()
                return

    with ThreadPoolExecutor(min(len(hosts), MOST_AT_ONCE) or 1) as threads:
        try:
            answers = list(threads.map(guarded, hosts))
        except BaseException:
            for host in hosts:
                host.stop.set()
            raise
        finally:
            ended.set()
    return {host.name: answer for host, answer in zip(hosts, answers)}
