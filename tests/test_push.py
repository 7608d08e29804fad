"""push: archives over a real ssh and rsync, with the line cut and the disk full on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from archives import noise
from conftest import Program, free_port, missing
from network import CutLine

import hfship


class Site:
    """A host behind ssh: a real sshd on a high port with keys of its own, and what its user sees."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.known = folder, home / ".ssh" / "known_hosts"
        folder.mkdir()
        self.known.parent.mkdir(parents=True, mode=0o700)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.port = free_port()
        self.start()
        self.line = CutLine(self.port)
        for port in (self.port, self.line.port):
            self.trust(port, (folder / "host.pub").read_text())

    def start(self) -> None:
        settings = {"Port": self.port, "ListenAddress": "127.0.0.1", "HostKey": self.folder / "host", "UsePAM": "no"}
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
        names = ["sh", "mkdir", "df", "tail", "sed", "stat", "mv", "sync", "rsync", "sha256sum", "python3"]
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
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F none -o UserKnownHostsFile={made.known} "$@"\n')
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
    assert {p.name: p.read_bytes() for p in far.iterdir()} == {p.name: p.read_bytes() for p in package.iterdir()}
    subprocess.run(["sha256sum", "-c", "--quiet", "m.tar.zst.sha256"], cwd=far, check=True)


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
    assert row_of(hfship(*arguments(site, tmp_path, "--json"), env=near(tmp_path)))["bytes_sent"] == 0


@pytest.mark.real
def test_a_cut_line_resumes_and_what_is_unfinished_never_has_its_name(
    site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    site.line.cut_at = 7_000_000
    args = arguments(site, tmp_path, "-j", "1", "--json", port=site.line.port)
    said = pyz(*args, code=8, env=near(tmp_path)).stderr
    assert "what arrived is kept" in said
    for path in (tmp_path / "far").iterdir():
        assert path.suffix == ".incomplete" or path.read_bytes() == (package / path.name).read_bytes()
    kept = sum(p.stat().st_size for p in (tmp_path / "far").iterdir())
    assert kept > 1_000_000
    site.line.cut_at = None
    row = row_of(pyz(*args, env=near(tmp_path)))
    assert_arrived(package, tmp_path / "far")
    assert row["bytes_sent"] == row["bytes"] - kept


@pytest.mark.real
def test_a_terminal_is_asked_once_for_the_passphrase(site: Site, package: Path, pyz: Program, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", site.folder / "user"], check=True)
    assert "ssh-copy-id" in pyz(*arguments(site, tmp_path), code=4, env=near(tmp_path)).stderr
    pid, terminal = pty.fork()
    if not pid:
        env = pyz.env(near(tmp_path))
        os.execvpe(pyz.argv[0], [*pyz.argv, *map(str, arguments(site, tmp_path))], env)
    said = b""
    with contextlib.suppress(OSError):  # how a terminal says that its program is gone
        while piece := os.read(terminal, 4096):
            said += piece
            if piece.rstrip().endswith(b"user':"):
                os.write(terminal, b"open sesame\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    assert said.count(b"Enter passphrase") == 1 and b"sesame" not in said
    assert_arrived(package, tmp_path / "far")


@pytest.mark.parametrize("limit, share, at_once", [("20M", 19531, 1), ("100M", 48828, 2)])
def test_a_limit_is_used_to_the_last_file(
    limit: str, share: int, at_once: int, package: Path, pyz: Program, tmp_path: Path
) -> None:
    if not shutil.which("rsync"):
        missing("rsync")
    log, fake = tmp_path / "log", tmp_path / "near/rsync"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "start $*" >> {log}\n{shutil.which("rsync")} "$@"\necho end >> {log}\n')
    fake.chmod(0o755)
    pyz("push", "m", tmp_path / "far", "--bwlimit", limit, "-j", "3", env=near(tmp_path))
    assert_arrived(package, tmp_path / "far")
    lines = log.read_text().splitlines()
    running = list(accumulate(1 if line.startswith("start") else -1 for line in lines))
    assert 1 <= max(running) <= at_once and len(lines) == 2 * len(list(package.iterdir()))
    assert all(f" --bwlimit={share} " in line for line in lines if line.startswith("start"))


@pytest.mark.real
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_push_goes_on(how: signal.Signals, site: Site, package: Path, pyz: Program, tmp_path: Path) -> None:
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
@pytest.mark.parametrize("hasher", ["sha256sum", "python3"])
def test_only_a_damaged_part_is_sent_again(
    hasher: str, site: Site, package: Path, pyz: Program, tmp_path: Path
) -> None:
    """Same size, same time, another byte: rsync by itself would call it complete."""
    site.without("python3" if hasher == "sha256sum" else "sha256sum")
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
def test_a_disk_that_damages_is_told_and_keeps_no_name(site: Site, package: Path, pyz: Program, tmp_path: Path) -> None:
    (package / "m.tar.zst.sha256").write_text(f"{'0' * 64}  m.tar.zst.0001\n")
    for name in ("m.tar.zst.0002", "m.tar.zst.0003"):
        (package / name).unlink()
    said = pyz(*arguments(site, tmp_path), code=6, env=near(tmp_path)).stderr
    assert "arrives damaged" in said and "hfship verify" in said.replace(" ".join(pyz.argv[1:]), "hfship")
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
        site.without("sha256sum", "python3")
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
    (far / "m.tar.zst.0002").write_bytes(bytes((package / "m.tar.zst.0002").stat().st_size)[:1_990_000])
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


def test_a_disk_of_this_machine_is_a_target_too(package: Path, hfship: Program, tmp_path: Path) -> None:
    if not shutil.which("rsync"):
        missing("rsync")
    said = hfship("push", "m", tmp_path / "usb stick").stdout
    assert "every sum proven there" in said
    assert_arrived(package, tmp_path / "usb stick")


def test_a_disk_that_takes_no_large_files_is_refused(package: Path, pyz: Program, tmp_path: Path) -> None:
    limit = (2_000_000, 2_000_000)  # as FAT has one of 4 GiB
    refuse = {"code": 7, "preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}
    assert "--split" in pyz("push", "m", tmp_path / "usb", **refuse).stderr
    assert not list((tmp_path / "usb").iterdir())


def test_parts_without_a_sum_are_not_pushed(package: Path, pyz: Program, tmp_path: Path) -> None:
    (package / "m.tar.zst.sha256").unlink()
    assert "hfship pack" in pyz("push", "m", tmp_path / "x", code=5).stderr.replace(" ".join(pyz.argv[1:]), "hfship")
    assert "no archive nothing" in pyz("push", "nothing", tmp_path / "x", code=5).stderr


@pytest.mark.parametrize("text", ["-oProxyCommand=x:dir", "-x:y", "", "h:\udcff", "/a\nb"])
def test_what_is_no_destination_is_refused_and_no_host_is_taken_for_an_option(text: str) -> None:
    with pytest.raises(hfship.UsageError):
        hfship.parse_destination(text)


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
    for values in (vars(hfship.parse_words(words.split())[0]), hfship.parse_words(words.split())[1]):
        assert values[dest] == names and (words[:4] != "push" or values["to"].endswith("h:x"))
