"""A site of several hosts: network namespaces on one wire, each with a real sshd and a real dockerd of its own.

    with Hosts(folder, ["control", "gpu1", "gpu2"]) as hosts:
        hosts["gpu1"].run(["docker", "ps"])
        hosts.cut("gpu1")

Every host has a name, an address (10.77.0.1 and up), its own /run and shared memory, its own `hosts.data` and ~/.ssh, and a process namespace
with which all that runs in it ends. What its docker has as images are hard links to the layers of with-docker's data root:
they take no room and no time, and nothing that one host does reaches another.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Sequence

from conftest import missing
from support import components

NETWORK = "10.77.0"
START_S = 60.0
AUTHORIZED = "/run/authorized"  # which the users that log in can read
_BOOT = """
set -e
hostname "$1"; ip link set lo up
mount -t tmpfs run /run; mkdir /run/sshd /run/containerd /run/lock
mount -t tmpfs shm /dev/shm
mkdir -p "$3" /root/.ssh; mount --bind "$2/data" "$3"; mount --bind "$2/ssh" /root/.ssh
mount --bind "$2/hosts" /etc/hosts
echo > "$2/up"
exec tini -g -- sleep 1000000
"""
# What dockerd keeps of containers, networks and volumes is each host's own, and begins empty.
_KEPT = ("image", "overlay2", "engine-id", "buildkit", "plugins", "runtimes")


class Host:
    """One of them: programs run there by `run`, as an operator's would who is logged in."""

    def __init__(self, folder: Path, name: str, number: int, data: Path, gpus: str) -> None:
        self.folder, self.name, self.data = folder, name, data
        self.address = f"{NETWORK}.{number}"
        self.gpus = gpus
        self.pid = 0
        self._boot: subprocess.Popen[bytes]
        self._dockerd: List[subprocess.Popen[bytes]] = []

    def own(self, path: Path) -> Path:
        """Where a path below the folder of data lies for the test."""
        return self.folder / "data" / path.relative_to(self.data)

    @property
    def env(self) -> Dict[str, str]:
        """The variables of a login there."""
        folders = [
            components.HOME / "docker/bin",
            *(components.HOME / "docker/root/usr" / name for name in ("bin", "sbin")),
            components.TESTS / "stubs",
        ]
        path = [*map(str, folders), "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        return {
            "PATH": ":".join(path),
            "HOME": str(self.data / "home"),
            "DOCKER_CONFIG": str(components.HOME / "docker/config"),
            "HFSHIP_STUB_GPUS": self.gpus,
            "HFSHIP_POLICY_CUSTODY": "false",
            "HFSHIP_POLICY_BOM": "false",
        }

    def argv(self, argv: Sequence[Any]) -> List[str]:
        """A command as it is run there."""
        inside = ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-i", "-p"]
        return [*inside, *map(str, argv)]

    def run(self, argv: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program there to its end."""
        env = {**self.env, **options.pop("env", {})}
        options = {"capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run(self.argv(argv), env=env, **options)

    def start(self, argv: Sequence[Any], **options: Any) -> subprocess.Popen[str]:
        """Start a program there."""
        env = {**self.env, **options.pop("env", {})}
        return subprocess.Popen(self.argv(argv), env=env, text=True, **options)

    def docker(self, *words: str) -> str:
        """The output of docker there."""
        done = self.run(["docker", *words])
        return str(done.stdout + done.stderr)

    # -- its life

    def boot(self, wire: int) -> None:
        """Start it, and plug it in."""
        command = [
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--mount-proc",
        ]
        command += ["--kill-child=KILL", "sh", "-c", _BOOT, "boot", self.name]
        self._boot = subprocess.Popen([*command, str(self.folder), str(self.data)])
        _wait_for(lambda: (self.folder / "up").exists(), f"{self.name} to boot")
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children")
        self.pid = int(children.read_text().split()[0])
        _ip(wire, f"link add {self.name} type veth peer name eth0 netns {self.pid}")
        _ip(wire, f"link set {self.name} master wire up")
        _ip(self.pid, f"addr add {self.address}/24 dev eth0")
        _ip(self.pid, "link set eth0 up")

    def start_sshd(self, client_key: str) -> None:
        """Let whoever has the key of the control host in."""
        self.run(["tee", AUTHORIZED], input=client_key, check=True)
        self.add_sshd(22, self.env)

    def add_sshd(self, port: int, env: Dict[str, str]) -> None:
        """One more sshd there, whose logins have other variables."""
        variables = " ".join(f'"{name}={value}"' for name, value in env.items())
        config = self.folder / f"sshd_config.{port}"
        config.write_text(
            f"Port {port}\nHostKey {self.folder}/hostkey\nAuthorizedKeysFile {AUTHORIZED}\n"
            f"UsePAM no\nStrictModes no\nMaxStartups 100\nPidFile none\nSetEnv {variables}\n"
        )
        self.start(["/usr/sbin/sshd", "-D", "-q", "-f", config], start_new_session=True)

    def add_user(self, name: str, home: str) -> None:
        """A user there who is in no group, with a disk of their own as home."""
        passwd = self.folder / "passwd"
        row = f"{name}:x:61234:61234::{home}:/bin/sh\n"
        passwd.write_text(Path("/etc/passwd").read_text() + row)
        disk = f"mkdir -p {home} && mount -t tmpfs -o mode=755,uid=61234,gid=61234 home {home}"
        self.run(["mount", "--bind", passwd, "/etc/passwd"], check=True)
        self.run(["sh", "-c", disk], check=True)

    def start_docker(self) -> None:
        """Start dockerd, and wait until it answers."""
        root = self.folder / "docker"
        command = ["dockerd", "--config-file", self.folder / "daemon.json", "--data-root", root]
        log = open(self.folder / "dockerd.log", "ab")
        self._dockerd.append(
            self.start(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        )
        _wait_for(lambda: self.run(["docker", "version"]).returncode == 0, f"docker of {self.name}")

    def kill_docker(self) -> None:
        """End dockerd and its containers, as the machine that loses both."""
        self.run(["pkill", "-KILL", "-x", "dockerd"])
        self.run(["pkill", "-KILL", "-f", "^.*containerd-shim"])
        for one in self.docker_pids():
            self.run(["kill", "-9", one])
        _wait_for(lambda: not self.docker_pids(), "its containers to end")

    def docker_pids(self) -> List[str]:
        """The processes of containers: those that an engine's shims started."""
        listed = self.run(["ps", "-eo", "pid=,cgroup="]).stdout
        return [line.split()[0] for line in listed.splitlines() if "/docker" in line]

    def end(self) -> None:
        """Pull its plug."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._boot.wait()
            self.pid = 0


class Hosts:
    """The hosts of a site, for as long as the `with`."""

    def __init__(self, folder: Path, names: Sequence[str], gpus: str = "none") -> None:
        for name in ("docker", "site-images"):
            components.require(name)
        for program in ("/usr/sbin/sshd", "rsync", "tini"):
            if not shutil.which(program):
                missing(program)
        if os.geteuid() != 0:
            missing("root, for namespaces")
        self.folder = folder
        self.data = folder / "data"
        self.hosts = {
            name: Host(folder / name, name, number, self.data, gpus)
            for number, name in enumerate(names, 1)
        }
        self._wire: subprocess.Popen[bytes]

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Hosts:
        self.data.mkdir(parents=True)
        self._wire = subprocess.Popen(["unshare", "--net", "sleep", "1000000"])
        root = os.readlink("/proc/self/ns/net")
        _wait_for(lambda: os.readlink(f"/proc/{self._wire.pid}/ns/net") != root, "the wire")
        _ip(self._wire.pid, "link add wire type bridge")
        _ip(self._wire.pid, "link set wire up")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        listed = "".join(f"{one.address} {one.name}\n" for one in self.hosts.values())
        known = ""
        for host in self.hosts.values():
            for name in ("data/home", "ssh"):
                (host.folder / name).mkdir(parents=True)
            (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{listed}")
            (host.folder / "daemon.json").write_text("{}")
            for key in ("hostkey", "ssh/id_ed25519"):
                words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host.folder / key]
                subprocess.run(words, check=True)
            public = (host.folder / "hostkey.pub").read_text()
            known += f"{host.name},{host.address} {public}"
            copy_images(host.folder / "docker")
        keys = "".join((h.folder / "ssh/id_ed25519.pub").read_text() for h in self.hosts.values())
        for host in self.hosts.values():
            (host.folder / "ssh/known_hosts").write_text(known)
            host.boot(self._wire.pid)
            host.start_sshd(keys)
        with ThreadPoolExecutor(len(self.hosts)) as threads:
            list(threads.map(Host.start_docker, self.hosts.values()))

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.end()
        self._wire.kill()
        self._wire.wait()

    def cut(self, name: str) -> None:
        """Pull the cable of a host."""
        _ip(self._wire.pid, f"link set {name} down")

    def plug_in(self, name: str) -> None:
        """Put it in again."""
        _ip(self._wire.pid, f"link set {name} up")


def copy_images(to: Path) -> None:
    """A data root of docker with the images of with-docker's: its layers by hard links."""
    to.mkdir()
    for name in _KEPT:
        source = components.docker_data() / name
        if not source.exists():
            continue
        how = "-al" if name == "overlay2" else "-a"
        subprocess.run(["cp", how, "--one-file-system", source, to], check=False)
    shutil.rmtree(to / "image/overlay2/layerdb/mounts", ignore_errors=True)


def image_with(host: Host, base: str, name: str, files: Dict[str, bytes]) -> bytes:
    """A tar for `docker load` of an image that is `base` with more programs. Their layer alone is in it: the others are
    there, and what every host loads has one ID."""
    base_id = host.docker("image", "inspect", "-f", "{{.Id}}", base).strip().partition(":")[2]
    kept = host.folder / "docker/image/overlay2/imagedb/content/sha256" / base_id
    config = json.loads(kept.read_text())
    layer = tar_of(files, 0o755)
    config["rootfs"]["diff_ids"].append(f"sha256:{hashlib.sha256(layer).hexdigest()}")
    config.setdefault("history", []).append({"created_by": "tests"})
    text = json.dumps(config).encode()
    layers = [f"{number}.tar" for number in range(len(config["rootfs"]["diff_ids"]))]
    about = [{"Config": "config.json", "RepoTags": [name], "Layers": layers}]
    return tar_of(
        {"manifest.json": json.dumps(about).encode(), "config.json": text, layers[-1]: layer}, 0o644
    )


def tar_of(files: Dict[str, bytes], mode: int) -> bytes:
    """A tar of files, the same each time."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(content), mode
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _ip(pid: int, words: str) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *words.split()], check=True)


def _wait_for(happened: Any, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {START_S:.0f} s for {what}")
        time.sleep(0.1)
