# SPDX-License-Identifier: Apache-2.0
"""Gateways on other hosts: what a control host sends them, and what such a host makes of it."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

import pytest

from hfship.base.errors import (
    HostError,
    IncompleteError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    UsageError,
)
from hfship.base.locks import InUseError, lock_within
from hfship.base.settings import ListedModel, ModelsFile
from hfship.base.values import replace
from hfship.commands import gateway_hosts
from hfship.site.gatewayset import GatewaySet, parse_set
from hfship.site.hosts import HostFacts, Interface, SiteHost
from hfship.site.keepalived import check_text
from hfship.site.maps import key_maps
from hfship.site.settings import GatewaySettings
from hfship.site.store import gateway_folder, read_keys, write_keys
from hfship.site.terms import AccessKey, GatewayModel, Replica
from hfship.site.untold import note_untold, read_untold

MODELS = (GatewayModel("m", ("m",), (Replica("m", "h:1"), Replica("m.2", "h:2"))),)
KEY = AccessKey("bob", "5e" * 32)
SET = GatewaySet(GatewaySettings(image="haproxy:3"), MODELS, (KEY,), {"m": "sk-m"}, "PEM")


class Far:
    """A host that notes what is put and asked there; its docker may refuse."""

    def __init__(self, name: str, error: Optional[Exception] = None, code: int = 0) -> None:
        self.host, self.name = SiteHost(name, data=f"/data/{name}"), name
        self.error, self.code = error, code
        self.did: List[Any] = []

    def put(self, path: str, content: bytes, mode: int) -> None:
        self.did.append((path, content, mode))

    def asked(self, *words: str) -> None:
        self.did.append(" ".join(words))
        if self.error:
            raise self.error

    def sh(self, script: str) -> Any:
        self.did.append(script)
        return SimpleNamespace(code=self.code, out="", err="Permission denied")

    def at(self, folder: str) -> Any:
        error = HostError(f"{self.name}: {folder} cannot be removed", "", "")
        return SimpleNamespace(error=lambda done: error if done.code else None)


# -- which hosts


def file_of(**tables: Any) -> ModelsFile:
    """A models file with these tables."""
    return ModelsFile(Path("/models.toml"), {}, (), ListedModel(""), tables=tables)


def test_only_hosts_whose_roles_name_the_gateway_have_one() -> None:
    """By default none does, and the control host has its own."""
    tables: List[Dict[str, Any]] = [
        {"name": "a", "roles": ["models", "gateway"]},
        {"name": "b", "roles": ["models"]},
        {"name": "c"},
        {"name": "here", "roles": ["gateway"], "local": True},
        {"name": "gone", "roles": ["gateway"]},
    ]
    hosts = [SiteHost(name, local=name == "here") for name in ("c", "b", "a", "here")]
    found = gateway_hosts.gateway_hosts(file_of(host=tables), hosts)
    assert [one.name for one in found] == ["a"]


# -- on the control host


def test_each_host_is_sent_the_set_with_its_own_files() -> None:
    error = HostError("c: no image of HAProxy", "", "")
    hosts: Any = [Far("a"), Far("b"), Far("c", error)]
    files = {"a": {"keepalived.conf": "of a"}, "c": {}}
    assert gateway_hosts.send_sets(hosts, SET, files) == {"c": error}
    for host in hosts:
        (path, content, mode), asked = host.did
        assert path == f"/data/{host.name}/deploy/_site/gateway.json" and mode == 0o600
        assert asked == "serve --gateway"
        assert parse_set(content, "") == replace(SET, files=files.get(host.name, {}))


def test_a_gateway_ends_with_its_keys(tmp_path: Path) -> None:
    """The script, run here, with a docker that has a container or none."""
    hosts: Any = [Far("a b"), Far("c", code=1)]
    failures = gateway_hosts.end_gateways(hosts)
    assert {name: one.what for name, one in failures.items()} == {
        "c": "c: /data/c/deploy cannot be removed"
    }
    [script] = hosts[0].did
    assert "rm -rf -- '/data/a b/deploy'/_gateway '/data/a b/deploy'/_site/gateway.json" in script
    for docker, code, removed in (
        ("echo id1", 0, True),
        ("true", 0, True),
        ("exit 1", 1, False),
        ("test $1 = ps && echo id1", 1, False),
    ):
        deploy = tmp_path / f"deploy{code}{len(docker)}"
        for folder in ("_gateway", "_site", "m"):
            (deploy / folder).mkdir(parents=True)
        (deploy / "_site/gateway.json").touch()
        (deploy / "_site/site.json").touch()
        own = script.replace("'/data/a b/deploy'", str(deploy))
        function = f'docker() {{ echo "$*" >>{tmp_path}/told; {docker}; }}\n'
        done = subprocess.run(["sh", "-c", function + own], capture_output=True, check=False)
        assert done.returncode == code, docker
        left = {"_site/site.json": True, "m": True}
        left.update(dict.fromkeys(("_gateway", "_site/gateway.json"), not removed))
        assert {name: (deploy / name).exists() for name in left} == left, docker
    told = (tmp_path / "told").read_text()
    assert told.startswith("ps -aq --filter name=^/hfship_gateway$\nrm -f id1\n")


def test_a_set_is_kept_to_be_sent_again(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        gateway_hosts.read_set(tmp_path)
    gateway_hosts.keep_set(tmp_path, SET)
    assert gateway_hosts.read_set(tmp_path) == SET
    path = tmp_path / "_site/gateway.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.parent.stat().st_mode & 0o007 == 0


def test_what_is_told_is_locked_in_a_folder_of_our_own(tmp_path: Path) -> None:
    with gateway_hosts.telling(tmp_path), pytest.raises(InUseError):
        lock_within(tmp_path / "_site", 0.0).__enter__()
    assert (tmp_path / "_site").stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("given", [True, False])
def test_the_keys_that_are_sent_are_those_of_now(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy = tmp_path / "deploy"
    gateway_folder(deploy).mkdir(parents=True, mode=0o700)
    write_keys(gateway_folder(deploy), (KEY,))
    old = replace(SET, keys=())
    gateway_hosts.keep_set(deploy, replace(old, certificate="OLD") if given else old)
    note_untold(deploy, ["a", "b", "c"], ["bob"])
    hosts: Any = [Far("a"), Far("b", HostError("b", "", ""))]
    failures = gateway_hosts.send_now(deploy, hosts, {"a": {"x": "y"}}, old if given else None)
    assert list(failures) == ["b"] and gateway_hosts.read_set(deploy) == SET
    assert parse_set(hosts[0].did[0][1], "") == replace(SET, files={"x": "y"})
    assert set(read_untold(deploy)) == {"b", "c"}, "who has not heard, and who was not asked"


def test_a_host_that_nobody_can_reach_is_a_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = NetworkError("a does not answer", "", "")

    def send_now(deploy: Path, hosts: Any, files: Any) -> Dict[str, Any]:
        assert (deploy, files) == (tmp_path, {})
        sent.append([one.name for one in hosts])
        return {"a": error} if hosts else {}

    sent: List[Any] = []
    monkeypatch.setattr(gateway_hosts, "send_now", send_now)
    settings = SimpleNamespace(deploy_dir=tmp_path)
    context: Any = SimpleNamespace(settings=settings, file=file_of(host=[{"name": "a"}]))
    found = gateway_hosts.send_keys(context, ["a", "gone"])
    assert found["a"] is error and isinstance(found["gone"], NotFoundError)
    assert "/models.toml has no host gone any more" in found["gone"].what
    context.file = None
    found = gateway_hosts.send_keys(context, ["a"])
    assert isinstance(found["a"], UsageError) and sent == [["a"], []]


UNTOLD = {"a": ("bob", "alice"), "b": ("bob",)}
TOLD: List[Tuple[Dict[str, Any], str, str, str]] = [
    ({"a": NetworkError("a is gone", "", "x")}, "on a: what changed of bob, alice", "a is gone", "key sync"),
    (
        {"b": NetworkError("no answer"), "a": NetworkError("no answer")},
        "on b, a: what changed of bob, alice",
        "no answer",
        "key sync",
    ),
    ({"c": NetworkError("c is gone")}, "on c: what changed of keys", "c is gone", "key sync"),
    (
        {"a": NetworkError("a is gone"), "b": HostError("b: docker is down", "", "systemctl start docker")},
        "on a, b: what changed of bob, alice",
        "a is gone; b: docker is down",
        "systemctl start docker",
    ),
    ({"b": HostError("b: odd", "", "")}, "on b: what changed of bob", "b: odd", "key sync"),
]  # fmt: skip


@pytest.mark.parametrize(("failures", "what", "why", "step"), TOLD)
def test_who_does_not_know_and_of_what_is_told(
    failures: Dict[str, Any], what: str, why: str, step: str
) -> None:
    with pytest.raises(IncompleteError) as caught:
        gateway_hosts.require_told(failures, UNTOLD)
    error = caught.value
    assert error.what.endswith(f"not known yet at the gateway {what}")
    assert error.why == f"{why}\nuntil it knows, that gateway takes keys as they were"
    assert step in error.next_step


def test_all_that_have_heard_is_no_error() -> None:
    gateway_hosts.require_told({}, UNTOLD)


# -- keepalived


def test_the_address_is_first_at_the_control_host_and_each_checks_its_own_gateway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gateway_hosts, "host_name", lambda: "control")
    monkeypatch.setattr(gateway_hosts, "interfaces", lambda: [Interface("eth9", "10.0.0.1")])
    hosts = [SiteHost("a", data="/d")]
    facts = {"a": HostFacts("a", interfaces=(Interface("bond0", "10.0.0.2"),))}
    settings = GatewaySettings(port=9000, tls_cert="c", address="10.0.0.9/24")
    found = gateway_hosts.keepalived_files(settings, hosts, facts, Path("/deploy"))
    for name, interface, check, peer in (
        ("", "eth9", "/deploy/_gateway/check-gateway.sh", "10.0.0.2"),
        ("a", "bond0", "/d/deploy/_gateway/check-gateway.sh", "10.0.0.1"),
    ):
        text = found[name]["keepalived.conf"]
        assert f"interface {interface}\n" in text and check in text and f"{peer}\n" in text
        assert found[name]["check-gateway.sh"] == check_text(9000, tls=True)
    assert "priority 200\n" in found[""]["keepalived.conf"]
    plain = replace(settings, tls_cert="")
    files = gateway_hosts.keepalived_files(plain, hosts, facts, Path("/deploy"))
    assert files["a"]["check-gateway.sh"] == check_text(9000, tls=False)
    nothing = replace(settings, address="")
    assert gateway_hosts.keepalived_files(nothing, hosts, facts, Path("/")) == {}


# -- on such a host


def test_a_gateway_is_set_up_as_the_control_host_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy = tmp_path / "deploy"
    gateway_hosts.keep_set(deploy, replace(SET, files={"keepalived.conf": "k"}))
    did: List[Any] = []

    def apply_files(folder: Path, files: Any, live: Any) -> Any:
        did.append((folder, "apply", live))
        return SimpleNamespace(value="was set up")

    def check_files(folder: Path, files: Any, image: str) -> None:
        did.append((folder, "check", image))

    patched: Dict[str, Any] = {
        "require_docker": lambda: did.append("docker"),
        "find_image": lambda name: SimpleNamespace(version=(3, 4), reference=name),
        "require_network": lambda: did.append("network"),
        "check_files": check_files,
        "apply_files": apply_files,
        "owner": lambda: "7:8",
    }
    for name, fake in patched.items():
        monkeypatch.setattr(gateway_hosts, name, fake)
    said: List[Any] = []
    reporter = SimpleNamespace(info=said.append, result_of=lambda *both: said.append(both))
    settings = SimpleNamespace(deploy_dir=deploy)
    context: Any = SimpleNamespace(settings=settings, reporter=reporter)
    gateway_hosts.serve_gateway(context)
    folder = gateway_folder(deploy)
    live = key_maps(MODELS, (KEY,))
    assert did == [
        "docker",
        "network",
        (folder, "check", "haproxy:3"),
        (folder, "apply", live),
    ]
    assert read_keys(folder) == (KEY,)
    own = folder / "keepalived.conf"
    assert own.read_text() == "k" and stat.S_IMODE(own.stat().st_mode) == 0o644
    row = {"schema": "hfship-planned/1", "name": "gateway", "state": "was set up"}
    assert said == ["the gateway was set up", ("", [{**row, "url": "", "start_s": None}])]


def test_a_host_that_no_control_host_knows_has_no_gateway(tmp_path: Path) -> None:
    settings = SimpleNamespace(deploy_dir=tmp_path)
    context: Any = SimpleNamespace(settings=settings)
    with pytest.raises(NotFoundError, match="no control host has put a gateway here"):
        gateway_hosts.serve_gateway(context)
