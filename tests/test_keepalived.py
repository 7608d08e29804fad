"""One address for several gateways: what keepalived is told, and what a control host sends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from conftest import missing
from hfship.base.errors import IntegrityError
from hfship.commands.gateway_hosts import without_copy
from hfship.site.gatewayset import GatewaySet, parse_set, set_text
from hfship.site.keepalived import GatewayHost, check_text, keepalived_text
from hfship.site.settings import GatewaySettings
from hfship.site.terms import AccessKey, GatewayModel, Replica
from support import components

HOSTS = [GatewayHost("a", "10.0.0.1", "eth0"), GatewayHost("b", "10.0.0.2", "bond0")]
MODEL = GatewayModel("m", ("m", "o/m"), (Replica("m", "h:1"), Replica("m.2", "h:2", True)))
SET = GatewaySet(
    GatewaySettings(port=9000, address="10.0.0.9/24"),
    (MODEL,),
    (AccessKey("bob", "5e" * 32, ("m",), rate=6),),
    {"m": "sk-secret"},
    "PEM",
    {"keepalived.conf": "x"},
)


def test_hosts_differ_in_what_is_theirs_alone() -> None:
    texts = [keepalived_text("10.0.0.9/24", HOSTS, own, "/d/check") for own in (0, 1)]
    first, second = (set(text.splitlines()) for text in texts)
    assert {line.split()[0] for line in first - second} == {
        *("router_id", "interface", "priority", "unicast_src_ip", "10.0.0.2"),
    }
    assert "    priority 200" in first and "    priority 199" in second
    assert "        10.0.0.9/24" in first & second


def test_the_check_asks_the_gateway_of_its_own_host() -> None:
    assert "http://127.0.0.1:9000/health" in check_text(9000, tls=False)
    assert "https://127.0.0.1:9443/health" in check_text(9443, tls=True)


def test_what_is_sent_is_read_back() -> None:
    assert parse_set(set_text(SET).encode(), "here") == SET
    assert "sk-secret" not in repr(SET) and "PEM" not in repr(SET)


NO_SETS: List[Dict[str, Any]] = [
    {"format": "x"},
    {"settings": {"port": "x"}},
    {"models": 3},
    {"models": [3]},
    {"models": [{"name": "m"}]},
    {"keys": [{"name": 1}]},
    {"upstream": 3},
    {"files": ["x"]},
]


@pytest.mark.parametrize("change", NO_SETS)
def test_what_is_no_set_is_refused(change: Dict[str, Any]) -> None:
    text = json.dumps({**json.loads(set_text(SET)), **change})
    with pytest.raises(IntegrityError, match="here cannot be read"):
        parse_set(text.encode(), "here")


@pytest.mark.parametrize("name", json.loads(set_text(SET)))
def test_a_set_without_a_part_is_refused(name: str) -> None:
    value = json.loads(set_text(SET))
    del value[name]
    with pytest.raises(IntegrityError, match="here cannot be read"):
        parse_set(json.dumps(value).encode(), "here")


def test_a_copy_that_restarts_gets_no_requests_unless_it_is_the_only_one() -> None:
    [model] = without_copy(SET, "m").models
    assert [one.name for one in model.replicas] == ["m.2"]
    [model] = without_copy(without_copy(SET, "m"), "m.2").models
    assert [one.name for one in model.replicas] == ["m.2"]


# -- the real one, in two network namespaces


class Wire:
    """Two hosts joined by a cable, each with a keepalived."""

    def __init__(self, folder: Path, program: Path) -> None:
        self.folder, self.program = folder, program
        self.hosts: List[subprocess.Popen[bytes]] = []
        self.daemons: List[subprocess.Popen[bytes]] = []

    def inside(self, host: int, *words: object) -> List[str]:
        return ["nsenter", "-t", str(self.hosts[host].pid), "-n", *map(str, words)]

    def run(self, host: int, *words: object) -> str:
        done = subprocess.run(self.inside(host, *words), check=True, capture_output=True, text=True)
        return done.stdout

    def join(self) -> None:
        own = os.readlink("/proc/self/ns/net")
        for _ in range(2):
            self.hosts.append(subprocess.Popen(["unshare", "--net", "sleep", "600"]))
        for host in self.hosts:
            while os.readlink(f"/proc/{host.pid}/ns/net") == own:
                time.sleep(0.02)
        far = self.hosts[1].pid
        self.run(0, *f"ip link add eth0 type veth peer name bond0 netns {far}".split())
        for number, member in enumerate(HOSTS):
            self.run(number, "ip", "link", "set", "lo", "up")
            self.run(number, "ip", "addr", "add", f"{member.address}/24", "dev", member.interface)
            self.run(number, "ip", "link", "set", member.interface, "up")

    def start(self, host: int) -> None:
        check = self.folder / f"check{host}"
        check.write_text("exit 0\n")
        config = self.folder / f"{host}.conf"
        config.write_text(keepalived_text("10.0.0.9/24", HOSTS, host, str(check)))
        root = self.program.parents[2]
        libraries = ":".join(str(root / top / "x86_64-linux-gnu") for top in ("lib", "usr/lib"))
        pids = [f"-{letter}{self.folder}/{host}.{letter}" for letter in "pr"]
        argv = self.inside(host, self.program, "-n", "-l", "-P", "-f", config, *pids)
        env = {**os.environ, "LD_LIBRARY_PATH": libraries}
        log = open(self.folder / f"{host}.log", "wb")
        self.daemons.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))

    def holders(self) -> List[int]:
        return [host for host in (0, 1) if "10.0.0.9/24" in self.run(host, "ip", "-br", "addr")]

    def seconds_until(self, holders: List[int], limit_s: float = 20.0) -> float:
        began = time.monotonic()
        while self.holders() != holders:
            logs = [path.read_text()[-800:] for path in self.folder.glob("*.log")]
            assert time.monotonic() - began < limit_s, (self.holders(), logs)
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self) -> None:
        for process in [*self.daemons, *self.hosts]:
            process.terminate()
        for process in [*self.daemons, *self.hosts]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    if os.geteuid() != 0:
        missing("root, for namespaces")
    made = Wire(tmp_path, components.require("keepalived"))
    try:
        made.join()
        yield made
    finally:
        made.end()


@pytest.mark.real
def test_the_address_moves_when_a_gateway_or_its_host_is_gone_and_stays_then(wire: Wire) -> None:
    wire.start(0)
    wire.seconds_until([0])
    wire.start(1)
    time.sleep(1)
    assert wire.holders() == [0]
    (wire.folder / "check0").write_text("exit 1\n")  # its gateway does not answer
    wire.seconds_until([1])
    (wire.folder / "check0").write_text("exit 0\n")
    time.sleep(3)
    assert wire.holders() == [1], "it goes back only when it has to"
    wire.daemons[1].kill()
    wire.seconds_until([0])
