"""push: archives over a real ssh and rsync, with the line cut and the disk full on the way."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import pytest

from conftest import Program, free_port, missing
from hfship.base.errors import (
    AuthError,
    DiskError,
    HfshipError,
    HostError,
    NetworkError,
    UsageError,
)
from hfship.base.processes import Completed
from hfship.base.progress import Stage
from hfship.base.report import Reporter
from hfship.commands.parser import parse_words
from hfship.ops.destination import Destination, connected, parse_destination
from hfship.ops.push import FarFile, PushFile, RsyncOutput, parse_probe, room_for
from support.archives import noise
from support.network import CutLine


class Site:
    """A host behind ssh: a real sshd on a high port with keys of its own, and what its user sees."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.known = folder, home / ".ssh" / "known_hosts"
        folder.mkdir()
        self.known.parent.mkdir(parents=True, mode=0o700)
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.port = free_port()
        self.start()
        self.line = CutLine(self.port)
        for port in (self.port, self.line.port):
            self.trust(port, (folder / "host.pub").read_text())

    def start(self) -> None:
        settings = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.folder / "host",
            "UsePAM": "no",
        }
        settings.update({"StrictModes": "no", "PidFile": self.folder / "pid", "MaxStartups": "100"})
        settings.update(
            {
                "AuthorizedKeysFile": self.folder / "user.pub",
                "SetEnv": f"HOME={self.folder} PATH={self.bin}:/usr/bin:/bin",
            }
        )
        config = self.folder / "config"
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        Path("/run/sshd").mkdir(exist_ok=True)
        self.daemon = subprocess.Popen(["/usr/sbin/sshd", "-D", "-q", "-f", config])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("sshd did not start")

    def trust(self, port: int, key: str) -> None:
        with self.known.open("a") as stream:
            stream.write(f"[127.0.0.1]:{port} {key}")

    def without(self, *programs: str) -> None:
        """What the far side has on its PATH, less some programs."""
        names = [
            "sh",
            "mkdir",
            "df",
            "tail",
            "sed",
            "stat",
            "mv",
            "sync",
            "rsync",
            "openssl",
            "sha256sum",
            "python3",
        ]
        for name in set(names) - set(programs):
            (self.bin / name).symlink_to(shutil.which(name, path="/usr/bin:/bin") or "")
        config = self.folder / "config"
        config.write_text(config.read_text().replace(f"{self.bin}:/usr/bin:/bin", str(self.bin)))
        self.daemon.send_signal(signal.SIGHUP)
        time.sleep(0.3)

    def close(self) -> None:
        self.line.close()
        self.daemon.terminate()
        self.daemon.wait(20)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    for name in ("/usr/sbin/sshd", "ssh", "rsync"):
        if not shutil.which(name):
            missing(name)
    if os.geteuid() != 0:
        missing("root, to run sshd")
    # ssh takes the home folder from passwd: the files of the tests are named by an `ssh` of their own.
    home = tmp_path / "home"
    made = Site(tmp_path / "site", home)
    wrapper = tmp_path / "near" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\nexec /usr/bin/ssh -F none -o UserKnownHostsFile={made.known} "$@"\n'
    )
    wrapper.chmod(0o755)
    yield made
    made.close()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An archive in three parts, with what lies beside it."""
    folder = tmp_path / "home" / "transfer_package"
    folder.mkdir(parents=True)
    parts = {f"m.tar.zst.{n:04d}": noise(3_000_000 + n, n) for n in (1, 2, 3)}
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in parts.items()]
    (folder / "m.tar.zst.sha256").write_text("".join(lines))
    (folder / "READ-ME-FIRST.txt").write_text("read me")
    return folder


def arguments(site: Site, tmp_path: Path, *more: Any, port: Optional[int] = None) -> List[Any]:
    key = ["--port", port or site.port, "--identity", site.folder / "user"]
    return ["push", *key, *more, "m", f"root@127.0.0.1:{tmp_path}/far"]


def near(tmp_path: Path, **more: str) -> Dict[str, str]:
    return {"PATH": f"{tmp_path / 'near'}:{os.environ['PATH']}", **more}


def assert_arrived(package: Path, far: Path) -> None:
    """Exactly the package is there, and its own tool agrees."""
    assert {p.name: p.read_bytes() for p in far.iterdir()} == {
        p.name: p.read_bytes() for p in package.iterdir()
    }
    subprocess.run(["sha256sum", "-c", "--quiet", "m.tar.zst.sha256"], cwd=far, check=True)


def running_with(text: str) -> List[str]:
    """The command lines of rsync and ssh that have a text in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if text in " ".join(words) and Path(words[0]).name in ("rsync", "ssh"):
                found.append(" ".join(words))
    return found


def wait_for_bytes(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_none_runs(folder: Path) -> None:
    """Until no rsync and no ssh works for a test any more."""
    deadline = time.monotonic() + 10
    while running_with(str(folder)):
        assert time.monotonic() < deadline, running_with(str(folder))
        time.sleep(0.05)


def row_of(done: subprocess.CompletedProcess[str]) -> Dict[str, Any]:
    (row,) = json.loads(done.stdout)
    return dict(row)


@pytest.mark.real
def test_a_push_arrives_and_a_second_one_sends_nothing(
    site: Site, package: Path, hfship: Program, tmp_path: Path
) -> None:
    first = row_of(hfship(*arguments(site, tmp_path, "--json"), env=near(tmp_path)))
    assert_arrived(package, tmp_path / "far")
    assert first["bytes_sent"] == first["bytes"] == sum(p.stat().st_size for p in package.iterdir())
    assert (
        row_of(hfship(*arguments(site, tmp_path, "--json"), env=near(tmp_path)))["bytes_sent"] == 0
    )


@pytest.mark.real
def test_a_cut_line_resumes_and_what_is_unfinished_never_has_its_name(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    site.line.cut_at = 7_000_000
    args = arguments(site, tmp_path, "-j", "1", "--json", port=site.line.port)
    said = pyz(*args, code=8, env=near(tmp_path)).stderr
    assert "what arrived is kept" in said
    for path in (tmp_path / "far").iterdir():
        assert (
            path.suffix == ".incomplete" or path.read_bytes() == (package / path.name).read_bytes()
        )
    kept = sum(p.stat().st_size for p in (tmp_path / "far").iterdir())
    assert kept > 1_000_000
    site.line.cut_at = None
    row = row_of(pyz(*args, env=near(tmp_path)))
    assert_arrived(package, tmp_path / "far")
    assert row["bytes_sent"] == row["bytes"] - kept


ASKS = b"user': "  # the end of ssh's question after the passphrase of a key


def start_at_a_terminal(
    pyz: Program, *words: Any, env: Dict[str, str]
) -> Tuple[subprocess.Popen[bytes], int]:
    """hfship at a terminal of its own; not by pty.fork(), which does not suit a process with threads."""
    ours, its = pty.openpty()
    argv = ["setsid", "--ctty", *pyz.argv, *map(str, words)]
    started = subprocess.Popen(argv, env=pyz.env(env), stdin=its, stdout=its, stderr=its)
    os.close(its)
    return started, ours


def said_until(terminal: int, end: Optional[bytes], timeout_s: float = 120) -> bytes:
    """What is said at a terminal until it ends so; None: until its program is gone."""
    said = b""
    deadline = time.monotonic() + timeout_s
    while end is None or not said.endswith(end):
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"no {end!r} in {timeout_s} s: {said!r}"
        try:
            said += os.read(terminal, 4096)
        except OSError:  # how a terminal says that its program is gone
            assert end is None, said
            break
    return said


@pytest.mark.real
def test_a_terminal_is_asked_once_for_the_passphrase(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", site.folder / "user"], check=True
    )
    assert "ssh-copy-id" in pyz(*arguments(site, tmp_path), code=4, env=near(tmp_path)).stderr
    push, terminal = start_at_a_terminal(pyz, *arguments(site, tmp_path), env=near(tmp_path))
    said = said_until(terminal, ASKS)
    os.write(terminal, b"open sesame\n")
    said += said_until(terminal, None)
    assert push.wait(60) == 0, said
    assert said.count(b"Enter passphrase") == 1 and b"sesame" not in said
    assert_arrived(package, tmp_path / "far")


@pytest.mark.real
def test_the_connection_that_asked_ends_with_a_killed_push(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", site.folder / "user"], check=True
    )
    args = arguments(site, tmp_path, "--bwlimit", "100k", "-j", "1")
    push, terminal = start_at_a_terminal(pyz, *args, env=near(tmp_path))
    said_until(terminal, ASKS)
    os.write(terminal, b"open sesame\n")
    wait_for_bytes(tmp_path / "far" / "m.tar.zst.0001.incomplete")
    assert any(" -M -N " in line for line in running_with(str(tmp_path)))
    push.kill()
    push.wait(60)
    wait_until_none_runs(tmp_path)
    os.close(terminal)


@pytest.mark.parametrize("limit, share, at_once", [("20M", 19531, 1), ("100M", 48828, 2)])
def test_a_limit_is_used_to_the_last_file(
    limit: str, share: int, at_once: int, package: Path, pyz: Program, tmp_path: Path
) -> None:
    if not shutil.which("rsync"):
        missing("rsync")
    log, fake = tmp_path / "log", tmp_path / "near/rsync"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\necho "start $*" >> {log}\n{shutil.which("rsync")} "$@"\necho end >> {log}\n'
    )
    fake.chmod(0o755)
    pyz("push", "m", tmp_path / "far", "--bwlimit", limit, "-j", "3", env=near(tmp_path))
    assert_arrived(package, tmp_path / "far")
    lines = log.read_text().splitlines()
    running = list(accumulate(1 if line.startswith("start") else -1 for line in lines))
    assert 1 <= max(running) <= at_once and len(lines) == 2 * len(list(package.iterdir()))
    assert all(f" --bwlimit={share} " in line for line in lines if line.startswith("start"))


@pytest.mark.real
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_push_goes_on(
    how: signal.Signals, site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    args = arguments(site, tmp_path, "--bwlimit", "400k", "-j", "2")
    process = pyz.start(*args, env=near(tmp_path), start_new_session=True)
    far = tmp_path / "far"
    deadline = time.monotonic() + 60
    while not list(far.glob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == signal.SIGKILL:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGTERM else -9)
    pyz(*arguments(site, tmp_path), env=near(tmp_path))
    assert_arrived(package, far)


@pytest.mark.real
def test_a_push_that_is_killed_alone_leaves_no_rsync_and_no_ssh(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    """kill -9 of the one process, as the kernel does that is short of memory."""
    process = pyz.start(
        *arguments(site, tmp_path, "--bwlimit", "100k", "-j", "1"), env=near(tmp_path)
    )
    wait_for_bytes(tmp_path / "far" / "m.tar.zst.0001.incomplete")
    assert len(running_with(str(tmp_path))) >= 2
    process.kill()
    process.communicate(timeout=30)
    wait_until_none_runs(tmp_path)
    pyz(*arguments(site, tmp_path), env=near(tmp_path))
    assert_arrived(package, tmp_path / "far")


@pytest.mark.real
@pytest.mark.parametrize("hasher", ["openssl", "python3", "sha256sum"])
def test_only_a_damaged_part_is_sent_again(
    hasher: str, site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    """Same size, same time, another byte: rsync by itself would call it complete."""
    site.without(*{"openssl", "python3", "sha256sum"} - {hasher})
    far = tmp_path / "far"
    shutil.copytree(package, far)
    target = far / "m.tar.zst.0002"
    times = target.stat()
    content = bytearray(target.read_bytes())
    content[1_000_000] ^= 1
    target.write_bytes(content)
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    row = row_of(pyz(*arguments(site, tmp_path, "--json"), env=near(tmp_path)))
    assert {f["name"] for f in row["files"] if f["sent"]} == {"m.tar.zst.0002"}
    assert 0 < row["bytes_sent"] < 100_000
    assert_arrived(package, far)


@pytest.mark.real
def test_a_disk_that_damages_is_told_and_keeps_no_name(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    (package / "m.tar.zst.sha256").write_text(f"{'0' * 64}  m.tar.zst.0001\n")
    for name in ("m.tar.zst.0002", "m.tar.zst.0003"):
        (package / name).unlink()
    said = pyz(*arguments(site, tmp_path), code=6, env=near(tmp_path)).stderr
    assert "arrives damaged" in said and "hfship verify" in said.replace(
        " ".join(pyz.argv[1:]), "hfship"
    )
    assert not (tmp_path / "far" / "m.tar.zst.0001").exists()


@pytest.mark.real
@pytest.mark.parametrize(
    "case, code, words",
    [
        ("refused", 8, "check --port"),
        ("unknown host", 8, "no host root@nowhere.invalid is known"),
        ("host key unknown", 4, "compare the fingerprint"),
        ("host key changed", 4, "ssh-keygen"),
        ("no key", 4, "ssh-copy-id"),
        ("no rsync there", 9, "install rsync on root@127.0.0.1"),
        ("no rsync here", 9, "install rsync"),
        ("nothing that hashes", 9, "install coreutils"),
        ("folder refused", 7, "cannot write to"),
    ],
)
def test_what_is_wrong_is_told_with_its_way_out(
    case: str, code: int, words: str, site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    args, env = arguments(site, tmp_path), near(tmp_path)
    if case == "refused":
        args = arguments(site, tmp_path, port=free_port())
    elif case == "unknown host":
        args[-1] = "root@nowhere.invalid:x"
    elif case == "host key unknown":
        site.known.unlink()
    elif case == "host key changed":
        site.known.write_text(f"[127.0.0.1]:{site.port} {(site.folder / 'user.pub').read_text()}")
    elif case == "no key":
        (site.folder / "user.pub").write_text("")
    elif case.startswith("no rsync there"):
        site.without("rsync")
    elif case.startswith("nothing"):
        site.without("openssl", "sha256sum", "python3")
    elif case == "no rsync here":
        env["PATH"] = str(tmp_path / "near")
        (tmp_path / "near" / "sh").symlink_to("/bin/sh")
    elif case == "folder refused":
        (tmp_path / "far").write_text("a file")
    said = pyz(*args, code=code, env=env).stderr
    assert words in said, said
    if case == "host key unknown":
        assert re.search(rf"next  ssh .*-p {site.port} .*root@127.0.0.1 once", said), said
    if case == "host key changed":
        assert f"{site.known}:1" in said and "whether the key was changed" in said


@pytest.mark.real
def test_a_target_without_room_is_refused_and_one_that_runs_full_goes_on(
    site: Site, package: Path, pyz: Program, tmp_path: Path, small_disk: Any
) -> None:
    far = small_disk(5)
    args = arguments(site, tmp_path)[:-1] + [f"root@127.0.0.1:{far}"]
    said = pyz(*args, code=7, env=near(tmp_path)).stderr
    assert "needed" in said and not list(far.iterdir())
    (far / "m.tar.zst.0001").write_bytes((package / "m.tar.zst.0001").read_bytes())
    (far / "m.tar.zst.0002").write_bytes(
        bytes((package / "m.tar.zst.0002").stat().st_size)[:1_990_000]
    )
    subprocess.run(["mount", "-o", "remount,size=20M", far], check=True)
    process = pyz.start(*args, "--bwlimit", "1M", "-j", "1", env=near(tmp_path))
    while not list(far.glob("*.incomplete")):
        assert process.poll() is None
        time.sleep(0.05)
    subprocess.run(["mount", "-o", "remount,size=6M", far], check=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 7 and ("is full" in said or "takes no more" in said), said
    subprocess.run(["mount", "-o", "remount,size=20M", far], check=True)
    pyz(*args, env=near(tmp_path))
    assert_arrived(package, far)


def test_a_disk_of_this_machine_is_a_target_too(
    package: Path, hfship: Program, tmp_path: Path
) -> None:
    if not shutil.which("rsync"):
        missing("rsync")
    said = hfship("push", "m", tmp_path / "usb stick").stdout
    assert "SHA-256 of every file checked there" in said
    assert_arrived(package, tmp_path / "usb stick")


def test_a_disk_that_takes_no_large_files_is_refused(
    package: Path, pyz: Program, tmp_path: Path
) -> None:
    limit = (2_000_000, 2_000_000)  # as FAT has one of 4 GiB
    refuse = {"code": 7, "preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}
    assert "--split" in pyz("push", "m", tmp_path / "usb", **refuse).stderr
    assert not list((tmp_path / "usb").iterdir())


def test_a_share_that_sets_no_times_has_what_is_proven_there(
    package: Path, hfship: Program, tmp_path: Path
) -> None:
    """As SMB: rsync ends with 23, and the cause comes on a line of its progress."""
    for name in ("rsync", "setpriv"):
        if not shutil.which(name):
            missing(name)
    if os.geteuid() != 0:
        missing("root, to own a file as somebody else")
    share = tmp_path / "share"
    share.mkdir()
    other = share / "m.tar.zst.0002.incomplete"
    other.touch()
    other.chmod(0o666)
    os.chown(other, 65534, 65534)
    powerless = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--"]
    pusher = Program([*powerless, *hfship.argv], hfship.home)
    said = pusher("push", "m", share)
    assert_arrived(package, share)
    assert "SHA-256 of every file checked there" in said.stdout
    assert "failed to set times" in said.stderr and "m.tar.zst.0002" in said.stderr


@pytest.mark.parametrize(
    "there, words",
    [
        ("folder m.tar.zst.0002", "m.tar.zst.0002: no file"),
        ("folder m.tar.zst.0002.incomplete", "m.tar.zst.0002.incomplete: no file"),
        ("link m.tar.zst.0002.incomplete", "m.tar.zst.0002.incomplete: no file"),
        ("pipe m.tar.zst.0002.incomplete", "m.tar.zst.0002.incomplete: no file"),
        ("link-to-folder m.tar.zst.0002", "m.tar.zst.0002: no file"),
    ],
)
def test_what_is_no_file_there_is_told_before_a_byte_is_sent(
    there: str, words: str, package: Path, pyz: Program, tmp_path: Path
) -> None:
    if not shutil.which("rsync"):
        missing("rsync")
    far, elsewhere = tmp_path / "far", tmp_path / "elsewhere"
    far.mkdir()
    elsewhere.mkdir()
    kind, name = there.split(" ")
    path = far / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(elsewhere / "file")
    else:
        path.symlink_to(elsewhere)
    said = pyz("push", "m", far, code=7).stderr
    assert "a folder or a link is where a file belongs" in said and words in said
    assert os.listdir(far) == [name] and not os.listdir(elsewhere)


@pytest.mark.real
def test_what_a_login_shell_says_is_not_taken_for_an_answer(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    noise_of_it = f"at {decoy}\nroom x 1 1 1 1% /\nhas 5 8 m.tar.zst\nrsync: not found\nx: FAILED"
    start = site.folder / ".bashrc"
    start.write_text(f"echo '{noise_of_it}' >&2\n")
    pyz(*arguments(site, tmp_path), env=near(tmp_path))
    assert_arrived(package, tmp_path / "far")
    pyz(*arguments(site, tmp_path), env=near(tmp_path))
    assert not os.listdir(decoy)
    # What it prints on stdout breaks rsync, whoever calls it.
    start.write_text(f"echo '{noise_of_it}'\n")
    args = arguments(site, tmp_path)
    said = pyz(*args[:-1], f"root@127.0.0.1:{tmp_path}/other", code=9, env=near(tmp_path)).stderr
    assert "the login shell of root@127.0.0.1 prints something" in said, said
    assert f"-i {site.folder}/user root@127.0.0.1 true" in said
    assert not os.listdir(decoy)


@pytest.mark.real
def test_options_of_ssh_come_from_the_command_line(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    args = ["push", "m", f"root@127.0.0.1:{tmp_path}/far"]
    options = [f"Port={site.port}", f"IdentityFile={site.folder}/user", "ConnectTimeout=5"]
    for option in options:
        args += ["--ssh-option", option]
    pyz(*args, env=near(tmp_path))
    assert_arrived(package, tmp_path / "far")
    said = pyz(*args, "--ssh-option", "NoSuchThing=1", code=2, env=near(tmp_path)).stderr
    assert "ssh does not take its options" in said and "nosuchthing" in said
    assert "KEY=VALUE" in pyz(*args, "--ssh-option", "Port", code=2, env=near(tmp_path)).stderr


FAR_SIDES = {
    "says nothing": ("sleep 100", "no answer within"),
    "never stops": ("yes", "it does not stop"),
    "never stops on stderr": ("yes >&2", "it does not stop"),
    "never ends its line": ("cat /dev/zero", "it does not stop"),
    "says something now and then": ("while sleep 0.2; do echo; done", "no answer within"),
    "does not listen": ("trap '' TERM; sleep 100", "no answer within"),
    "has a menu": ("echo choose", "runs no command for us"),
}


@pytest.mark.parametrize("case", FAR_SIDES)
def test_a_far_side_that_does_not_answer_is_left(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does, words = FAR_SIDES[case]
    # Who never stops is left for what he says, however slow the machine is; others for the time.
    patience_s = 60.0 if words == "it does not stop" else 1.0
    monkeypatch.setattr("hfship.ops.destination.ANSWER_S", patience_s)
    monkeypatch.setattr("hfship.base.processes.END_S", 0.5)
    shell = tmp_path / "ssh"
    shell.write_text(f"#!/bin/sh\n{does}\n")
    shell.chmod(0o755)
    to = Destination("me@gpu1", "/data", (str(shell),))
    with pytest.raises(HostError) as caught:
        to.run("true", threading.Event())
    error = caught.value
    assert words in f"{error.what} {error.why}"
    assert f"{shell} me@gpu1 echo hello" in error.next_step
    assert len(error.why) < 10_000
    if case != "has a menu":
        monkeypatch.setattr("hfship.ops.destination.ANSWER_S", 1.0)
        with pytest.raises(HostError), connected(to, False, Reporter()):
            pass


def test_a_script_longer_than_a_pipe_reaches_a_shell_that_does_not_read(tmp_path: Path) -> None:
    to = Destination("", str(tmp_path))
    assert to.run("exec < /dev/null; " + "true;" * 50_000, threading.Event()).code == 0


def test_parts_without_a_sum_are_not_pushed(package: Path, pyz: Program, tmp_path: Path) -> None:
    (package / "m.tar.zst.sha256").unlink()
    assert "hfship pack" in pyz("push", "m", tmp_path / "x", code=5).stderr.replace(
        " ".join(pyz.argv[1:]), "hfship"
    )
    assert "no archive nothing" in pyz("push", "nothing", tmp_path / "x", code=5).stderr


@pytest.mark.parametrize("text", ["-oProxyCommand=x:dir", "-x:y", "", "h:\udcff", "/a\nb"])
def test_what_is_no_destination_is_refused_and_no_host_is_taken_for_an_option(text: str) -> None:
    with pytest.raises(UsageError):
        parse_destination(text)


@pytest.mark.parametrize(
    "words, what, step",
    [
        ("push m gpu1", "gpu1 is no destination", "gpu1:DIR"),
        ("push m new", "new is no destination", "./new"),
        ("push m", "no target is given", "push m [USER@]HOST:DIR"),
        ("push m ~/transfer_package/m.tar.zst.0001", "no target is given", "[USER@]HOST:DIR"),
        ("push m m.tar.zst", "no target is given", "[USER@]HOST:DIR"),
        ("push m .hidden", ".hidden is no destination", "./.hidden"),
        ("push me@gpu1:", "nothing to push", "push m [USER@]HOST:DIR"),
        ("push", "[USER@]HOST:DIR", "--help"),
    ],
)
def test_a_target_is_a_host_or_a_folder_that_is_meant(
    words: str, what: str, step: str, package: Path, pyz: Program, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    argv = words.replace("~", str(pyz.home)).split()
    said = pyz(*argv, code=2, cwd=here).stderr
    assert what in said and step in said, said
    assert not os.listdir(here)


@pytest.mark.parametrize("target", ["there", ".", "./new", "sub/new", "~/new"])
def test_a_folder_is_a_target_that_exists_or_has_a_slash(
    target: str, package: Path, pyz: Program, tmp_path: Path
) -> None:
    if not shutil.which("rsync"):
        missing("rsync")
    here = tmp_path / "here"
    (here / "there").mkdir(parents=True)
    pyz("push", "m", target, cwd=here)
    expanded = target.replace("~", str(pyz.home))
    assert (here / expanded / "m.tar.zst.0003").exists()


@pytest.mark.parametrize(
    "words, dest, names",
    [
        ("push A -p 2 B me@h:x", "archives", ["A", "B"]),
        ("push A --models m.toml -p 2 h:x", "archives", ["A"]),
        ("push -- -A.tar.zst h:x", "archives", ["-A.tar.zst"]),
        ("fetch a/b --limit-rate 5M c/d", "repos", ["a/b", "c/d"]),
        ("pack A --split 8G B --dry-run", "models", ["A", "B"]),
    ],
)
def test_names_and_options_come_in_any_order(words: str, dest: str, names: List[str]) -> None:
    for values in (vars(parse_words(words.split())[0]), parse_words(words.split())[1]):
        assert values[dest] == names and (words[:4] != "push" or values["to"].endswith("h:x"))


# -- what other programs print


@pytest.mark.parametrize(
    "said, code, kind, what",
    [
        ("rsync: write failed on m: No space left on device (28)", 11, DiskError, "is full"),
        ("rsync: write failed on m: File too large (27)", 11, DiskError, "no file of this size"),
        ("rsync error: error in file IO (code 11) at receiver.c(393)", 11, DiskError, "no more"),
        ("mkdir: cannot create: Read-only file system", 73, DiskError, "cannot write to"),
        ("mv: cannot move 'm': Permission denied", 1, DiskError, "cannot write to"),
        ("me@gpu1: Permission denied (publickey,password).", 255, AuthError, "not let us in"),
        ("Permission denied, please try again.", 255, AuthError, "not let us in"),
        ("/etc/ssh: Bad configuration option: x", 255, UsageError, "does not take its options"),
        ("ssh: connect to host gpu1: Connection timed out", 255, NetworkError, "does not answer"),
        ("ssh: connect to host gpu1: No route to host", 255, NetworkError, "does not answer"),
        ("rsync: connection unexpectedly closed", 12, NetworkError, "the connection to me@gpu1"),
        ("", 255, NetworkError, "the connection to me@gpu1 broke"),
        ("sh: 1: Syntax error", 2, HostError, "a program on me@gpu1 ended with 2"),
    ],
)
def test_a_failure_there_is_an_error_of_its_kind(
    said: str, code: int, kind: Type[HfshipError], what: str
) -> None:
    error = Destination("me@gpu1", "/data", ("ssh",)).error(Completed(code, said, ""))
    assert type(error) is kind
    assert what in error.what
    assert error.why == (said or f"exit status {code}")
    assert error.next_step


def test_a_clock_ticks_while_ssh_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.base.progress.CLOCK_INTERVAL_S", 0.02)
    slow = tmp_path / "ssh"
    slow.write_text("#!/bin/sh\nsleep 0.3\n")
    slow.chmod(0o755)
    err = io.StringIO()
    with connected(
        Destination("gpu1", "/data", (str(slow),)), False, Reporter("bar", 0, io.StringIO(), err)
    ):
        assert "connecting to gpu1 0:00 of at most 1:00" in err.getvalue()


def test_the_frame_of_a_warning_of_ssh_is_left_out() -> None:
    frame = "@" * 59
    said = f"{frame}\n@ WARNING @\n{frame}\nREMOTE HOST IDENTIFICATION HAS CHANGED!\n\nIt differs."
    error = Destination("me@gpu1", "/data", ("ssh",)).error(Completed(255, said, ""))
    assert error.why == "REMOTE HOST IDENTIFICATION HAS CHANGED!\nIt differs."
    assert error.next_step.endswith("ssh-keygen -R gpu1")  # ssh said no command of its own


@pytest.mark.parametrize(
    "line, known, done, literal",
    [
        ("     1,000", False, 400, 0),
        ("         100  10%   95.37MB/s    0:00:00", True, 400, 0),  # it counts from 0
        ("         700  70%   95.37MB/s    0:00:00", True, 700, 0),
        (" 700 70% 9.37MB/s 0:00:00 (xfr#1, to-chk=0/1)", True, 700, 0),
        (" 700 70% 9.37MB/s ??:??:?? ", True, 700, 0),
        ("9" * 5000 + " 70% ", False, 400, 0),
        ("Literal data: 300 bytes", True, 400, 300),
        ("Number of files: 1 (reg: 1)", True, 400, 0),
        ("sent 355 bytes  received 35 bytes  780.00 bytes/sec", True, 400, 0),
        ("total size is 1000  speedup is 2.56", True, 400, 0),
        ("rsync: write failed", False, 400, 0),
    ],
)
def test_lines_of_rsync(line: str, known: bool, done: int, literal: int) -> None:
    stage = Stage("push", 1000)
    stage.skip(400)
    output = RsyncOutput(stage, 400)
    assert output.read_line(line) is known
    assert (stage.done, output.position, output.literal) == (done, done, literal)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "at relative/path",
        "at /data\nroom /dev/sda1 900 100 " + "9" * 5000 + " 12% /",
        "at /data\nhas " + "9" * 5000 + " 8 m",
        "has 1 2",
        "at /\x1b[31mdata",
    ],
)
def test_an_odd_answer_of_the_probe_means_nothing(said: str) -> None:
    far = parse_probe(said)
    assert far is None or (far.free == sys.maxsize and not far.files)


@pytest.mark.parametrize(
    "there, room",
    [
        ({}, 1000),
        ({"m": FarFile(1000, 4096)}, 0),
        ({"m": FarFile(999, 4096)}, 1000),  # another file of that name: it is sent beside it
        ({"m": FarFile(1000, 512)}, 488),  # with a hole
        ({"m.incomplete": FarFile(600, 4096)}, 400),
        ({"m.incomplete": FarFile(1000, 512)}, 488),  # rsync gave it its size before its content
        ({"m.incomplete": FarFile(2000, 4096)}, 0),
        ({"m": FarFile(1000, 4096), "m.incomplete": FarFile(600, 4096)}, 0),
    ],
)
def test_room_is_needed_for_what_is_not_there(there: Dict[str, FarFile], room: int) -> None:
    assert room_for(PushFile(Path("/here/m"), 1000, "0" * 64), there) == room
