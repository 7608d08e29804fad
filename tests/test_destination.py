"""A folder on another host: how ssh is called, what its failures mean, and who is asked a question."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence

import pytest

from hfship.base.errors import AuthError, DiskError, HostError, NetworkError, UsageError
from hfship.base.processes import Completed
from hfship.ops import destination as room
from hfship.ops.destination import SSH_OPTIONS, Destination, connected, patience_for

SSH = ("ssh", "-o", "BatchMode=yes", *SSH_OPTIONS, "-p", "22")
FAR = Destination("ops@gpu1", "/data", SSH)
NEAR = Destination("", "/data")


def test_a_destination_is_written_as_rsync_reads_it() -> None:
    assert (str(FAR), FAR.path_of("a")) == ("ops@gpu1:/data", "ops@gpu1:/data/a")
    assert (str(NEAR), NEAR.path_of("a")) == ("/data", "/data/a")


def test_ssh_gets_our_options_first_and_the_host_last() -> None:
    far = Destination("ops@[::1]", "/d", ("ssh", "-p", "22"))
    more = far.with_options("A=1", "B=2")
    assert more.command("-N") == [
        "ssh",
        "-o",
        "A=1",
        "-o",
        "B=2",
        "-p",
        "22",
        "-N",
        "--",
        "ops@::1",
    ]
    assert (more.host, more.folder) == (far.host, far.folder)


def test_an_operator_types_ssh_without_our_options() -> None:
    assert FAR.login() == "ssh -p 22 ops@gpu1"
    private = FAR.with_options("ControlPath=/tmp/x/ssh")
    assert private.login() == "ssh -p 22 ops@gpu1"
    assert FAR.with_options("Port=1").login() == "ssh -o Port=1 -p 22 ops@gpu1"


def test_one_waits_longer_for_more_bytes() -> None:
    assert patience_for(0) == room.ANSWER_S
    assert patience_for(5_000_000) == room.ANSWER_S + 5
    assert patience_for(0, 40_000) == room.ANSWER_S + 2
    assert patience_for(1_000_000, 20_000) == room.ANSWER_S + 2


# -- what comes back


class Shell:
    """Plays what a script is given to, and what comes back; `mark` stands for that of the script."""

    def __init__(self, said: str = "", code: int = 0, err: str = "", ended: str = "") -> None:
        self.done = Completed(code, said, err, ended)
        self.argv: List[Sequence[str]] = []
        self.patience: List[Optional[float]] = []

    def follow(
        self,
        argv: Sequence[str],
        stop: threading.Event,
        script: str = "",
        patience_s: Optional[float] = None,
    ) -> Completed:
        self.argv.append(argv)
        self.patience.append(patience_s)
        mark = ""
        for line in script.splitlines():
            if line.endswith(" begin"):
                mark = line.split()[1]
        return Completed(
            self.done.code, self.done.out.replace("MARK", mark), self.done.err, self.done.ended
        )


@pytest.mark.parametrize("to, argv", [(FAR, [*SSH, "--", "ops@gpu1", "sh"]), (NEAR, ["sh"])])
def test_a_script_goes_to_sh_and_its_answer_stands_between_marks(
    to: Destination, argv: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell("Welcome!\nMARK begin\n two\nlines \nMARK end 73\nlogout\n")
    monkeypatch.setattr(room, "follow_program", shell.follow)
    done = to.run("script", threading.Event(), size=9_000_000)
    assert done == Completed(73, "two\nlines", "")
    assert shell.argv == [argv]
    (patience,) = shell.patience
    assert patience and patience > patience_for(9_000_000), "the script goes there, too"


@pytest.mark.parametrize(
    "said, err, code, ended, kind, what, why, step",
    [
        ("", "", 0, "no answer for 60 s", HostError, "ops@gpu1 does not answer", "no answer for 60 s", "echo hello"),
        ("Menu", "", 0, "", HostError, "ops@gpu1 runs no command for us", "Menu", "ssh -p 22 ops@gpu1 echo hello"),
        ("MARK begin\nx", "", 255, "", NetworkError, "the connection to ops@gpu1 broke", "MARK begin\nx", "run the same"),
        ("", "", 12, "", NetworkError, "the connection to ops@gpu1 broke", "exit status 12", "run the same"),
        ("", "odd", 3, "", HostError, "a program on ops@gpu1 ended with 3", "odd", "put that right"),
        ("", "No space left on device", 1, "", DiskError, "ops@gpu1:/data is full", "No space left on device", "free space"),
        ("", "ssh: Permission denied (publickey).", 255, "", AuthError, "ops@gpu1 does not let us in", "ssh: Permission denied (publickey).", "--identity"),
        ("", "Host key verification failed.", 255, "", AuthError, "the host key of ops@gpu1 is not known here", "Host key verification failed.", "ssh -p 22 ops@gpu1 once in a terminal"),
    ],
)  # fmt: skip
def test_a_failure_says_what_it_means(
    said: str, err: str, code: int, ended: str, kind: Any, what: str, why: str, step: str
) -> None:
    error = FAR.error(Completed(code, said, err, ended))
    assert type(error) is kind and (error.what, error.why) == (what, why)
    assert step in error.next_step


def test_a_disk_of_this_machine_is_called_so() -> None:
    error = NEAR.error(Completed(0, "", "", "no answer for 60 s"))
    assert error.what == "this machine does not answer"
    assert error.next_step.startswith("look at the disk of /data")


@pytest.mark.parametrize(
    "said, removal",
    [
        ("  ssh-keygen -f '/k' -R '[gpu1]:22'\n", "ssh-keygen -f '/k' -R '[gpu1]:22'"),
        ("", "ssh-keygen -R gpu1"),
    ],
)
def test_a_host_key_that_changed_is_forgotten_as_ssh_proposes(said: str, removal: str) -> None:
    text = f"@@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\n{said}"
    error = FAR.error(Completed(255, "", text))
    assert isinstance(error, AuthError) and error.next_step.endswith(removal)
    assert "@" not in error.why


def test_of_many_words_the_last_are_shown() -> None:
    said = "\n".join(f"line {number}" for number in range(20)) + "\n\n" + "x" * 500
    lines = FAR.error(Completed(3, said, "")).why.splitlines()
    assert lines == [*(f"line {number}" for number in range(13, 20)), "x" * 400]


# -- a question


class Asked:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.infos: List[str] = []
        self.clocks: List[str] = []

    def info(self, text: str) -> None:
        self.infos.append(text)

    @contextlib.contextmanager
    def clock(self, text: str, _: float) -> Iterator[None]:
        self.clocks.append(text)
        yield


PLAIN = Destination("gpu1", "/data", ("ssh",))
DENIED = "gpu1: Permission denied (publickey,password)."


@pytest.mark.parametrize(
    "code, err, may_ask, outcome",
    [
        (0, "", False, "batch"),
        (0, "", True, "batch"),
        (255, DENIED, True, "shared"),
        (255, "Host key verification failed.", True, "shared"),
        (255, DENIED, False, "error"),
        (1, DENIED, True, "error"),
        (255, "IDENTIFICATION HAS CHANGED\nHost key verification failed.", True, "error"),
        (255, "Connection refused", True, "error"),
    ],
)
def test_a_question_is_put_only_where_there_is_one_and_somebody_to_answer(
    code: int, err: str, may_ask: bool, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell("", code, err)
    monkeypatch.setattr(room, "follow_program", shell.follow)

    @contextlib.contextmanager
    def shared(to: Destination) -> Iterator[str]:
        assert to is PLAIN
        yield "ControlPath=/x"

    monkeypatch.setattr(room, "_shared_connection", shared)
    asked: Any = Asked()
    if outcome == "error":
        errors = (AuthError, NetworkError, DiskError)
        with pytest.raises(errors), connected(PLAIN, may_ask, asked):
            pass
    else:
        with connected(PLAIN, may_ask, asked) as to:
            batch = PLAIN.with_options("BatchMode=yes")
            expected = batch if outcome == "batch" else batch.with_options("ControlPath=/x")
            assert to == expected
    assert shell.argv == [["ssh", "-o", "BatchMode=yes", "--", "gpu1", "true"]]
    assert shell.patience == [room.ANSWER_S] and asked.clocks == ["connecting to gpu1"]
    assert bool(asked.infos) == (outcome == "shared")


def test_a_folder_of_this_machine_needs_no_connection() -> None:
    with connected(NEAR, False, None) as to:  # type: ignore[arg-type]
        assert to is NEAR


def ssh(folder: Path, body: str) -> Destination:
    """A destination with an ssh that is a script; $control is where it is to listen."""
    path = folder / "ssh"
    path.write_text(f'#!/bin/sh\ncontrol=${{2#ControlPath=}}\necho "$@" >{folder}/argv\n{body}\n')
    path.chmod(0o755)
    return Destination("gpu1", "/data", (str(path),))


def test_one_connection_serves_all_and_ends_with_us(tmp_path: Path) -> None:
    to = ssh(tmp_path, 'touch "$control"; echo $$ >' + f"{tmp_path}/pid; exec sleep 600")
    with room._shared_connection(to) as option:
        name, _, place = option.partition("=")
        assert name == "ControlPath" and Path(place).exists()
        assert Path(place).parent.stat().st_mode & 0o77 == 0, "nobody else may use it"
        argv = (tmp_path / "argv").read_text().split()
        assert argv == ["-o", option, "-M", "-N", "--", "gpu1"]
    assert not Path(place).parent.exists()


def test_a_connection_that_is_not_let_in_says_why(tmp_path: Path) -> None:
    to = ssh(tmp_path, f"echo '{DENIED}' >&2; exit 255")
    with pytest.raises(AuthError, match="does not let") as caught, room._shared_connection(to):
        pass
    assert caught.value.why == DENIED


@pytest.mark.parametrize(
    ("text", "host", "folder"),
    [
        ("gpu1:", "gpu1", "."),
        ("gpu1:~", "gpu1", "."),
        ("gpu1:~/", "gpu1", "."),
        ("me@gpu1:~/in/a", "me@gpu1", "in/a"),
        ("gpu1:~other/in", "gpu1", "~other/in"),
        ("gpu1:in", "gpu1", "in"),
        ("me@[fd00::1]:/data", "me@[fd00::1]", "/data"),
        ("{here}/new", "", "{here}/new"),
        ("{here}", "", "{here}"),
        ("./a:b", "", "{here}/a:b"),
        ("there", "", "{here}/there"),
        ("~/new", "", "{home}/new"),
        ("file", None, "it is a file"),
        ("gpu1", None, "for a host gpu1:DIR"),
        ("", None, "is no destination"),
        ("a\x07:b", None, "is no destination"),
        ("-oX:/d", None, "is not a host"),
    ],
)
def test_where_a_word_leads(
    text: str, host: Any, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    (here / "there").mkdir(parents=True)
    (here / "file").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    text, folder = (word.format(here=here, home=home) for word in (text, folder))
    if host is None:
        with pytest.raises(UsageError) as told:
            room.parse_destination(text)
        error = told.value
        assert folder in f"{error.what} {error.why} {error.next_step}"
        return
    found = room.parse_destination(text, ("ssh", "-p", "22"))
    assert (found.host, found.folder) == (host, folder)
    assert found.ssh == (("ssh", "-p", "22") if host else ())
