# SPDX-License-Identifier: Apache-2.0
"""What a host tells of itself, and what a control host makes of it."""

from __future__ import annotations

import json
import os
import shlex
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import HostError, IntegrityError
from hfship.base.files import sha256_file
from hfship.base.manifest import MANIFEST_PATH, make_manifest, write_manifest
from hfship.base.settings import load_settings
from hfship.base.values import asdict
from hfship.serve.terms import Gpu, Host, Image, Plan
from hfship.site import facts
from hfship.site.hosts import Interface

GPU = Gpu(0, "GPU-1", "H200", 143771)
IMAGES = (Image("vllm:1", "sha256:1", (0, 11, 2)), Image("odd:1"))
# What their labels say, and what is noted of them.
READ = (IMAGES[0], Image("odd:1", cuda="12.8"))
OFFER = Host((GPU,), IMAGES, 5 << 30, frozenset({8001, 8000}), "", frozenset({"nvidia.com/gpu=0"}))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """What a host with one deployment tells, as it comes out of JSON."""
    env = {
        "HFSHIP_DEPLOY_DIR": str(tmp_path / "deploy"),
        "HFSHIP_SITE_MODELS_DIR": str(tmp_path / "site"),
        "HFSHIP_MODELS_DIR": str(tmp_path / "models"),
    }
    (tmp_path / "deploy/_site").mkdir(parents=True)
    (tmp_path / "deploy/_site/drained").touch()
    for place, name in (("site", "a"), ("models", "a"), ("models", "b")):
        folder = tmp_path / place / name
        folder.mkdir(parents=True)
        write_manifest(folder, make_manifest(f"{name}-{place}", []))
    (tmp_path / "models/no-model").mkdir()
    deployments = [SimpleNamespace(plan=Plan(name="m", device="cpu"))]
    states = {"m": "healthy", "n": "starting", "o": "exited", "p": "unhealthy"}

    def read_image(image: Image, may_ask: bool = True) -> Image:
        assert not may_ask  # a container that starts takes seconds
        return READ[IMAGES.index(image)]

    patched: Dict[str, Any] = {
        "read_machine": lambda *_: SimpleNamespace(host=OFFER),
        "list_deployments": lambda *_: (deployments, {}),
        "container_states": lambda: states,
        "read_image": read_image,
        "port_is_free": lambda _, port: port != 8003,
        "docker_there": lambda: facts.DockerThere("", "", "27.1"),
        "interfaces": lambda: [Interface("eth0", "10.0.0.1", 25000)],
        "infiniband": lambda _: ["mlx5_0"],
        "free_bytes": lambda _: 77,
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.site.facts.{name}", value)
    monkeypatch.setattr("hfship.site.facts.time.time", lambda: 1000.0)
    value: Dict[str, Any] = json.loads(json.dumps(facts.own_facts(load_settings(env))))
    return value


def test_what_a_host_tells_is_read_back(told: Dict[str, Any], tmp_path: Path) -> None:
    found = facts.facts_of("h", told, now=990.0, lease="l")
    assert told["host"] == os.uname().nodename
    assert found.offer == Host(OFFER.gpus, READ, OFFER.memory, frozenset({8003}), "", OFFER.cdi)
    assert [one.name for one in found.plans] == ["m"]
    assert (found.running, found.healthy) == (frozenset("mnp"), frozenset("m"))
    folders = {"a": tmp_path / "site/a", "b": tmp_path / "models/b"}  # that of the site wins
    assert found.models == {
        name: sha256_file(folder / MANIFEST_PATH) for name, folder in folders.items()
    }
    assert found.interfaces == (Interface("eth0", "10.0.0.1", 25000),)
    assert found.infiniband == ("mlx5_0",)
    assert (found.name, found.docker, found.problem, found.lease) == ("h", "27.1", "", "l")
    assert (found.clock_offset_s, found.free, found.drained) == (10.0, 77, True)
    assert found.architecture == told["architecture"]


@pytest.mark.parametrize("name", ["schema", "offer", "plans", "models", "time", "docker_problem"])
def test_facts_that_are_none_are_refused(name: str, told: Dict[str, Any]) -> None:
    for broken in ({**told, name: 7.5 if name != "time" else "x"}, {**told}):
        if broken == told:
            del broken[name]
        elif name == "docker_problem":
            continue
        with pytest.raises(IntegrityError, match="h tells facts that are none"):
            facts.facts_of("h", broken, 0.0)


BROKEN: List[Dict[str, Any]] = [
    {"plans": [{"name": 7}]},
    {"models": ["m"]},
    {"interfaces": [{"name": 7}]},
    {"free": "much"},
    {"running": 7},
]


@pytest.mark.parametrize("change", BROKEN)
def test_a_part_of_facts_that_is_none_is_refused(
    change: Dict[str, Any], told: Dict[str, Any]
) -> None:
    with pytest.raises(IntegrityError, match="h tells facts that are none") as caught:
        facts.facts_of("h", {**told, **change}, 0.0)
    assert caught.value.next_step == "have the same hfship.pyz on h as here"


def test_containers_are_none_where_docker_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def docker(*_: Any) -> str:
        raise HostError("cannot use docker", "it is down", "")

    monkeypatch.setattr("hfship.site.facts.docker", docker)
    assert facts.container_states() == {}
    monkeypatch.setattr("hfship.site.facts.docker", lambda *_: "m\trunning\tUp (healthy)\n")
    assert facts.container_states() == {"m": "healthy"}


COMPOSE = '{"ClientInfo": {"Plugins": [{"Name": "compose"}]}, "ServerVersion": "28.5.2"}'
NO_PLUGIN = '{"ClientInfo": {"Plugins": []}, "ServerVersion": "%s"}'
NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
NO_RIGHTS = (
    "permission denied while trying to connect to the docker API at unix:///var/run/docker.sock"
)
# What docker says to `version`, `info` and `compose`: (why no model can be served, what mends it, its version).
DOCKERS: Dict[str, Any] = {
    "well": (("28.5.2", COMPOSE, ""), ("", "", "28.5.2")),
    "no program": ((), ("docker is not installed", "install docker", "")),
    "no daemon": ((NO_DAEMON,), ("the docker daemon is not running", "systemctl start docker", "")),
    "no rights": ((NO_RIGHTS,), ("this user may not talk to docker", "usermod -aG docker", "")),
    "no compose": (
        ("28.5.2", NO_PLUGIN % "28.5.2", "docker: unknown command: docker compose"),
        ("docker has no compose plugin", "install docker-compose-plugin", "28.5.2"),
    ),
    "too old": (
        ("19.03.15", NO_PLUGIN % "19.03.15", "docker: 'compose' is not a docker command."),
        ("docker 19.03.15 is older than its compose plugin", "update docker to 20.10", "19.03.15"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DOCKERS)
def test_a_docker_that_serves_nothing_says_why_and_what_mends_it(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, (problem, step, version) = DOCKERS[case]
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = []
    for verb, answer in zip(("version", "info", "compose"), said):
        fails = len(said) == 1 or verb == "compose"
        rows.append(f"{verb}) echo {shlex.quote(answer)} >&{1 + fails}; exit {int(fails)};;")
    if rows:
        program = tmp_path / "docker"
        program.write_text("#!/bin/sh\ncase $1 in " + "\n".join(rows) + "\nesac\n")
        program.chmod(0o755)
    found = facts.docker_there()
    assert problem in found.problem and step in found.next_step and found.version == version
    assert bool(found.problem) == bool(problem) and bool(found.next_step) == bool(problem)


def test_interfaces_are_those_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(fd: Any, request: int, name: bytes) -> bytes:
        assert request == 0x8915
        if name.rstrip(b"\0") == b"eth1":
            raise OSError(99, "it has no address")
        asked.append(name.rstrip(b"\0").decode())
        assert len(name) == 256
        return bytes(20) + bytes([10, 0, 0, 7]) + bytes(232)

    asked: List[str] = []
    names = ["lo", "docker0", "br-1", "veth1", "eth0", "eth1", "longest-name-15"]
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(names)))
    monkeypatch.setattr("hfship.site.facts.fcntl.ioctl", ioctl)
    speeds = {"eth0": 9, "longest-name-15": 7}
    monkeypatch.setattr("hfship.site.facts._speed_of", speeds.get)
    found = [Interface(name, "10.0.0.7", speed) for name, speed in speeds.items()]
    assert facts.interfaces() == found and asked == list(speeds)


@pytest.mark.parametrize(("text", "speed"), [("25000\n", 25000), ("-1\n", 0), ("", 0), (None, 0)])
def test_the_speed_of_an_interface(text: Any, speed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        assert str(path) == "/sys/class/net/eth0/speed"
        if text is None:
            raise OSError
        return str(text)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert facts._speed_of("eth0") == speed


def test_adapters_with_a_port_that_works(tmp_path: Path) -> None:
    ports: Dict[str, List[str]] = {
        "b": ["1: DOWN"],
        "c": ["1: DOWN", "4: ACTIVE"],
        "a": ["4: ACTIVE"],
    }
    for name, states in ports.items():
        for number, state in enumerate(states):
            (tmp_path / name / "ports" / str(number)).mkdir(parents=True)
            (tmp_path / name / "ports" / str(number) / "state").write_text(state)
    assert facts.infiniband(tmp_path) == ["a", "c"]
    assert facts.infiniband(tmp_path / "none") == []
    assert asdict(Interface("a", "b"))["name"] == "a"
