# SPDX-License-Identifier: Apache-2.0
"""Where a push goes, and how it gets there.

Owns the destination as it is typed, [USER@]HOST:DIR or the path of a folder, the command line of
ssh, the questions that are put to the shell there, and what failures of ssh, rsync and that shell
mean. Promises: after the first question (a password, an unknown host key) nothing waits for an
answer; a far side that says nothing, or never stops, is left after a while; what its login shell
says by itself is not taken for an answer. Never: accepts a host key itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, List, Optional, Sequence, Tuple, Type

from hfship.base.errors import AuthError, DiskError, HostError, NetworkError, UsageError
from hfship.base.processes import Completed, follow_program, started
from hfship.base.settings import home_path
from hfship.base.values import dataclass, replace

if TYPE_CHECKING:
    from hfship.base.errors import HfshipError
    from hfship.base.report import Reporter

SSH_OPTIONS = (
    "-o",
    "ConnectTimeout=15",
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ServerAliveCountMax=4",
)
# Logins by LDAP, and disks that an automounter has to find, take tens of seconds.
ANSWER_S = 60.0
SLOWEST_BPS = 1_000_000  # bytes per second at which a disk there is read, at the least
SLOWEST_LINE_BPS = 20_000  # and at which a line carries what is sent to it
RUN_AGAIN = "run the same command again: what arrived is kept"
FORMS = "write [USER@]HOST:DIR, or the path of a folder"
_SSH_FAILED = 255
# The connection broke: exit statuses of rsync (rsync(1): in socket I/O, in its data stream,
# timeouts), and that of ssh.
_BROKEN_CONNECTION = (10, 12, 30, 35, _SSH_FAILED)
# Of what a program said this is shown: its last lines, and of each so many characters.
_LINES_SHOWN = 8
_COLUMNS_SHOWN = 400
NO_FILE_THERE = ": no file has this name there"  # what a script says of a folder, or a link
# What the sh there runs: MARK lines around the answer, for login shells that say something before
# or after. It is read whole before any of it runs, and its errors are part of the answer.
_MARKED_SCRIPT = """\
LC_ALL=C
export LC_ALL
echo
echo {mark} begin
(
{script}
) 2>&1
echo {mark} end $?
"""

# [USER@]HOST: before the first "/"; HOST may be an IPv6 address in brackets.
_REMOTE = re.compile(r"((?:[^@:/]+@)?(?:\[[^\]/]+\]|[^:/\[]+)):(.*)$")


@dataclass(frozen=True)
class KnownFailure:
    """A message of ssh, rsync or the far side's shell, and what an operator has to know.

    `pattern` is searched in the output. `what` and `next_step` have {host}, {place} (the
    destination), {ssh} (the command to log in), {remove} (the one that forgets a host key).
    """

    pattern: str
    error: Type[HfshipError]
    what: str
    next_step: str


KNOWN_FAILURES = (  # the first that matches counts
    KnownFailure(
        re.escape(NO_FILE_THERE),
        DiskError,
        "in {place} a folder or a link is where a file belongs",
        f"move it away there, then {RUN_AGAIN}",
    ),
    KnownFailure(
        r"is your shell clean\?",
        HostError,
        "the login shell of {host} prints something, which rsync cannot tell from its own answer",
        "have the start-up files there (.bashrc and the like) print nothing without a terminal; "
        "this must print nothing: {ssh} true",
    ),
    KnownFailure(
        r"IDENTIFICATION HAS CHANGED",
        AuthError,
        "the host key of {host} is not the one that is known here",
        "ask the owner of {host}, not over this line, whether the key was changed; "
        "only then: {remove}",
    ),
    KnownFailure(
        r"Host key verification failed",
        AuthError,
        "the host key of {host} is not known here",
        "{ssh} once in a terminal, compare the fingerprint, then run the same command again",
    ),
    KnownFailure(
        r"Permission denied(?:, please| \([a-z])|Too many authentication failures",
        AuthError,
        "{host} does not let us in",
        "ssh-copy-id, or name the key with --identity, "
        "or run it in a terminal to be asked for the password",
    ),
    KnownFailure(
        r"No space left on device|[Qq]uota exceeded",
        DiskError,
        "{place} is full",
        f"free space there, then {RUN_AGAIN}",
    ),
    KnownFailure(
        r"File too large",
        DiskError,
        "{place} takes no file of this size",
        "hfship pack --split fat32, then push again",
    ),
    KnownFailure(
        r"cannot write there|Read-only file system|Permission denied|mv: cannot move",
        DiskError,
        "cannot write to {place}",
        "choose a folder that this user may make or write to, or fix that one",
    ),
    KnownFailure(
        r"\(code 11\) at receiver",
        DiskError,
        "the disk of {place} takes no more",
        f"see df and the disk there, then {RUN_AGAIN}",
    ),
    KnownFailure(
        r"Bad configuration option|Bad owner or permissions|missing argument|terminating, \d+ bad",
        UsageError,
        "ssh does not take its options",
        "put right --ssh-option, or the file that ssh names",
    ),
    KnownFailure(
        r"Could not resolve hostname",
        NetworkError,
        "no host {host} is known",
        "check the name, or give the address",
    ),
    KnownFailure(
        r"Connection refused",
        NetworkError,
        "{host} refuses the connection",
        "check --port, and that sshd runs there",
    ),
    KnownFailure(
        r"timed out|No route to host|unreachable",
        NetworkError,
        "{host} does not answer",
        "check the line and --port",
    ),
    KnownFailure(
        r"rsync: (?:command )?not found",
        HostError,
        "rsync is not installed on {host}",
        "install rsync on {host}",
    ),
    KnownFailure(
        r"no sha256sum and no python3",
        HostError,
        "nothing on {host} can hash",
        "install coreutils or python3 there",
    ),
)


@dataclass(frozen=True)
class Destination:
    """A folder on a host behind ssh, or with host "" on a disk of this machine.

    `ssh` is the command line of ssh with its options, without the host.
    """

    host: str
    folder: str
    ssh: Tuple[str, ...] = ()

    def __str__(self) -> str:
        return self._placed(self.folder)

    def path_of(self, name: str) -> str:
        """A file in the folder, as rsync takes it."""
        path = f"{self.folder}/{name}"
        return self._placed(path)

    def _placed(self, path: str) -> str:
        if self.host:
            return f"{self.host}:{path}"
        return path

    def with_options(self, *options: str) -> Destination:
        """The same, with options of ssh_config(5) before all others: the first value counts."""
        added: List[str] = []
        for option in options:
            added += ["-o", option]
        program, *others = self.ssh
        return replace(self, ssh=(program, *added, *others))

    def command(self, *options: str) -> List[str]:
        """The command line of ssh up to the host."""
        # ssh wants an IPv6 address without the brackets.
        address = self.host.replace("[", "").replace("]", "")
        argv = [*self.ssh, *options]
        argv += ["--", address]
        return argv

    def run(self, script: str, stop: threading.Event, size: int = 0) -> Completed:
        """Run a script of POSIX sh there, until `stop` is set; `out` is what it said.

        It goes in by stdin: so no shell that a user may have as login shell takes it apart. `size`
        are the bytes that it reads from the disk there. Raises what `error` returns when there is
        no answer.
        """
        argv = ["sh"]
        if self.host:
            argv = [*self.command(), "sh"]
        mark = f"hfship-{secrets.token_hex(8)}"
        marked = _MARKED_SCRIPT.format(mark=mark, script=script)
        patience_s = patience_for(size, len(marked))
        done = follow_program(argv, stop, marked, patience_s=patience_s)
        answer = _answer_in(done.out, mark)
        if answer is None:
            raise self.error(done)
        return answer

    def error(self, done: Completed) -> HfshipError:
        """What a failure of ssh, rsync or the shell there means."""
        host = self.host or "this machine"
        said = f"{done.out}\n{done.err}"
        why = _last_words(said)
        if done.ended:
            why = f"{done.ended}\n{why}".strip()
            return HostError(f"{host} does not answer", why, self._step_to_answer())

        words = {
            "host": host,
            "place": str(self),
            "ssh": self.login(),
            "remove": _key_removal(said, host),
        }
        for failure in KNOWN_FAILURES:
            if re.search(failure.pattern, said):
                what = failure.what.format(**words)
                next_step = failure.next_step.format(**words)
                return failure.error(what, why, next_step)

        if not done.code:  # no shell: a menu, a program that only takes files, a closed account
            return HostError(f"{host} runs no command for us", why, self._step_to_answer())

        why = why or f"exit status {done.code}"
        if done.code in _BROKEN_CONNECTION:
            return NetworkError(f"the connection to {host} broke", why, RUN_AGAIN)

        what = f"a program on {host} ended with {done.code}"
        return HostError(what, why, f"put that right, then {RUN_AGAIN}")

    def _step_to_answer(self) -> str:
        if not self.host:
            return f"look at the disk of {self.folder}, then {RUN_AGAIN}"
        return f"this must print hello at once, and nothing else: {self.login()} echo hello"

    def login(self) -> str:
        """The ssh command that an operator types: without our own options."""
        words = [word for word in self.command() if word != "--"]
        login = shlex.join(words)
        for _, value in zip(SSH_OPTIONS[::2], SSH_OPTIONS[1::2]):
            login = login.replace(f" -o {value}", "")
        return re.sub(r" -o (BatchMode=yes|ControlPath=\S+)", "", login)


def patience_for(size: int, sent: int = 0) -> float:
    """Seconds that one waits for an answer for which a file of `size` bytes is read there, and
    `sent` bytes go there first."""
    return ANSWER_S + size / SLOWEST_BPS + sent / SLOWEST_LINE_BPS


def _answer_in(output: str, mark: str) -> Optional[Completed]:
    """What a marked script said, and its exit status; None when it did not come to its end."""
    pattern = rf"^{mark} begin\n(.*?)^{mark} end (\d{{1,3}})$"
    found = re.search(pattern, output, re.MULTILINE | re.DOTALL)
    if not found:
        return None
    return Completed(int(found[2]), found[1].strip(), "")


def _last_words(output: str) -> str:
    """The last lines that a program said; not those of "@" with which ssh frames its warnings."""
    lines: List[str] = []
    for line in output.splitlines():
        if line.strip() and not line.startswith("@"):
            lines.append(line[:_COLUMNS_SHOWN])
    return "\n".join(lines[-_LINES_SHOWN:])


def _key_removal(output: str, host: str) -> str:
    """The command that forgets a host key: as ssh proposes it, which names its file and port."""
    proposed = re.search(r"ssh-keygen .*-R .*", output)
    if proposed:
        return proposed[0]
    return f"ssh-keygen -R {host.rpartition('@')[2]}"


def is_destination(text: str) -> bool:
    """Whether a word means a place to push to: a host, or a folder that exists or has a "/" in it.

    >>> [is_destination(word) for word in ("gpu1:", "./new", "..", "gpu1", "/etc/passwd", "")]
    [True, True, True, False, False, False]
    """
    if _REMOTE.match(text):
        return True
    path = home_path(text)
    if text and path.exists():
        return path.is_dir()
    return "/" in text


def parse_destination(text: str, ssh: Sequence[str] = ()) -> Destination:
    """[USER@]HOST:DIR, as rsync reads it: a ':' before the first '/' ends a host. Or a folder.

    Without DIR, or with "~", it is the home there. Raises UsageError.

    >>> [str(parse_destination(t)) for t in ("me@gpu1:/data", "gpu1:~/in", "[::1]:in")]
    ['me@gpu1:/data', 'gpu1:in', '[::1]:in']
    """
    if not text or not text.isprintable():
        raise UsageError(f"{text!r} is no destination", "", FORMS)
    if not is_destination(text):
        why = "without ':' it is a folder of this machine, which exists or has a '/' in its name"
        step = f"for a host {text}:DIR, for a new folder ./{text}"
        if os.path.exists(text):
            why, step = "it is a file", FORMS
        raise UsageError(f"{text} is no destination", why, step)

    remote = _REMOTE.match(text)
    if not remote:
        return Destination("", os.path.abspath(home_path(text)))

    host, folder = remote.groups()
    if host.startswith("-"):
        raise UsageError(f"{host!r} is not a host", "", "write [USER@]HOST:DIR")

    # ssh starts in the home folder, so a path below it is a relative one.
    below_home = re.sub(r"^~(/|$)", "", folder)
    if not below_home:
        below_home = "."
    return Destination(host, below_home, tuple(ssh))


@contextlib.contextmanager
def connected(to: Destination, may_ask: bool, reporter: Reporter) -> Iterator[Destination]:
    """The destination, reached once and from then on without a question.

    Where ssh has a question and somebody `may_ask` at the terminal, it is put there once, and one
    connection then serves for all. Raises what Destination.error returns.
    """
    if not to.host:
        yield to
        return

    # BatchMode keeps a job without a terminal from waiting for an answer for ever.
    batch = to.with_options("BatchMode=yes")
    argv = [*batch.command(), "true"]
    with reporter.clock(f"connecting to {to.host}", ANSWER_S):
        done = follow_program(argv, threading.Event(), patience_s=ANSWER_S)
    if done.code == 0:
        yield batch
    elif may_ask and _has_question(done):
        reporter.info(f"ssh asks for {to.host}:")
        with _shared_connection(to) as control:
            yield batch.with_options(control)
    else:
        raise to.error(done)


def _has_question(done: Completed) -> bool:
    """Whether ssh failed for want of an answer; a host key that has changed is no question."""
    if done.code != _SSH_FAILED or "CHANGED" in done.err:
        return False
    asked = re.search(r"Permission denied|Host key verification failed", done.err)
    return asked is not None


@contextlib.contextmanager
def _shared_connection(to: Destination) -> Iterator[str]:
    """One connection of ssh for all: the option with which others use it (ssh_config(5))."""
    with tempfile.TemporaryDirectory(prefix="hfship-") as private:
        socket = Path(private, "ssh")
        said = Path(private, "said")
        control = f"ControlPath={socket}"
        # It asks at /dev/tty, so it stays in the session of the terminal; and in the foreground,
        # so that it ends with us.
        argv = to.with_options(control).command("-M", "-N")
        with said.open("wb") as output, started(argv, stderr=output) as process:
            try:
                while not socket.exists():  # it listens there once it is let in
                    if process.poll() is not None:
                        words = said.read_text(encoding="utf-8", errors="replace")
                        raise to.error(Completed(process.returncode, "", words))
                    time.sleep(0.1)
                yield control
            finally:
                process.terminate()
