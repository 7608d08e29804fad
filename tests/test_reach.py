"""hfship on other hosts: what it says there comes here with its code; a silent host holds nobody up.

The hosts here are this machine, without ssh; tests/test_site_hosts.py has real ones.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any, List

import pytest

from conftest import PYZ, missing
from hfship.base.errors import HfshipError, HostError, NotFoundError
from hfship.base.locks import InUseError
from hfship.ops import hostlease, reach
from hfship.ops.destination import Destination
from hfship.ops.inventory import Inventory, misfits, take_inventory
from hfship.ops.reach import FarHost, at_once
from hfship.site.hosts import HostFacts, SiteHost


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    if not PYZ.exists():
        missing("dist/hfship.pyz (make build)")
    monkeypatch.setattr(reach, "program_bytes", PYZ.read_bytes)
    monkeypatch.setenv("HFSHIP_MODELS_FILE", "/nowhere")  # of the control host: not for the others


@pytest.fixture
def host(tmp_path: Path) -> FarHost:
    return FarHost(SiteHost("near", local=True, data=str(tmp_path / "data")))


def test_the_program_is_brought_and_its_result_and_code_come_back(host: FarHost) -> None:
    said: List[str] = []
    host._say = said.append
    assert host.asked("version")["schema"] == "hfship-version/1"
    program = Path(host.program)
    assert (
        hashlib.sha256(program.read_bytes()).digest() == hashlib.sha256(PYZ.read_bytes()).digest()
    )
    assert said == ["bringing hfship.pyz"]
    program.write_bytes(b"an older one")
    assert host.asked("version") and program.read_bytes() == PYZ.read_bytes()
    assert not list(program.parent.glob(".*")), "nothing is left beside it"


def test_a_failure_there_is_of_its_class_here(host: FarHost) -> None:
    with pytest.raises(NotFoundError) as caught:
        host.asked("unpack", "nothing; touch /tmp/taken-apart 'x")
    assert caught.value.what.startswith("near: ") and "nothing; touch" in caught.value.what


def test_what_it_says_comes_as_it_is_said(host: FarHost) -> None:
    said: List[str] = []
    host._say = said.append
    host.hfship("unpack", "nothing")
    assert any("nothing" in line for line in said), said


def test_a_file_is_put_as_a_whole_with_its_mode(host: FarHost, tmp_path: Path) -> None:
    target = tmp_path / "data/a b/it's"
    host.put(str(target), b"\0secret\n" * 5000, 0o600)
    assert target.read_bytes() == b"\0secret\n" * 5000
    assert target.stat().st_mode & 0o777 == 0o600 and len(list(target.parent.iterdir())) == 1


def test_what_is_sent_has_the_time_that_a_slow_line_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = tmp_path / "ssh"
    line.write_text("#!/bin/sh\nsleep 2\nexec sh\n")
    line.chmod(0o755)
    monkeypatch.setattr("hfship.ops.destination.ANSWER_S", 0.5)
    host = FarHost(SiteHost("far", data=str(tmp_path)))
    host._to = Destination("far", str(tmp_path), (str(line),))
    content = bytes(2_000_000)  # of which even a slow line carries more than one takes to wake
    host.put(str(tmp_path / "program"), content)
    assert (tmp_path / "program").read_bytes() == content
    with pytest.raises(HostError, match="does not answer"):
        host.sh("true")


def test_a_silent_host_holds_no_other_up(tmp_path: Path) -> None:
    hosts = [FarHost(SiteHost(name, local=True, data=str(tmp_path))) for name in ("dead", "live")]
    began = time.monotonic()

    def work(host: FarHost) -> str:
        script = "sleep 60" if host.name == "dead" else "echo here"
        return host.sh(script).out

    answers = at_once(hosts, work, limit_s=1.0)
    assert time.monotonic() - began < 20
    assert answers["live"] == "here" and isinstance(answers["dead"], HostError)


def test_a_host_that_is_given_up_is_looked_at_by_its_own_way() -> None:
    host = FarHost(SiteHost("slow", address="10.0.0.9", user="ops", port=2200))
    error = host._too_slow()
    assert error.code == 8 and error.next_step.startswith("ssh -p 2200 ops@10.0.0.9 true ")
    near = FarHost(SiteHost("near", local=True))
    assert near._too_slow().next_step.startswith("timeout = ")


def test_a_host_without_ssh_is_in_the_inventory_with_the_reason(tmp_path: Path) -> None:
    nowhere = FarHost(SiteHost("gone", address="host.invalid", data=str(tmp_path)))
    inventory = take_inventory([nowhere])
    assert inventory.facts["gone"].problem == "no host host.invalid is known"
    assert inventory.exit_code == 8 and "does not answer" in inventory.text()


def test_of_two_control_hosts_one_gets_the_lease(host: FarHost, tmp_path: Path) -> None:
    mine = hostlease.own_lease()
    other = mine.replace('"host": "', '"host": "other-').replace('"boot_id": "', '"boot_id": "x')
    hostlease.take(host, mine)
    hostlease.take(host, mine)  # renewed
    with pytest.raises(InUseError, match="near is being changed from another control host"):
        hostlease.take(host, other)
    hostlease.release(host, other)
    lease = tmp_path / "data/deploy/_site/lease"
    assert lease.exists(), "nobody gives back what is not theirs"
    hostlease.release(host, mine)
    assert not lease.exists()


def test_the_lease_of_a_dead_control_host_is_taken(host: FarHost, tmp_path: Path) -> None:
    import os

    mine = hostlease.own_lease()
    lease = tmp_path / "data/deploy/_site/lease"
    lease.parent.mkdir(parents=True)
    other = mine.replace('"host": "', '"host": "other-').replace('"boot_id": "', '"boot_id": "x')
    lease.write_text(other)
    os.utime(lease, (time.time() - 61, time.time() - 61))
    hostlease.take(host, mine)
    lease.write_text(mine.replace('"start": "', '"start": "1'))  # of a process here that is dead
    hostlease.take(host, mine)
    assert lease.read_text() == mine


def test_leases_are_given_back(host: FarHost, tmp_path: Path) -> None:
    with hostlease.leased([host], lambda _: None) as failures:
        assert not failures and (tmp_path / "data/deploy/_site/lease").exists()
    assert not (tmp_path / "data/deploy/_site/lease").exists()


def test_what_mends_docker_is_in_the_table_of_hosts() -> None:
    facts = HostFacts("a", "docker is not installed", "install docker", free=1)
    text = Inventory({"a": facts}, {}).text()
    assert "a: docker is not installed\nnext  a: install docker" in text


MISFITS = {
    "clock": ({"clock_offset_s": 400.0}, "its clock is 6 min 40 s ahead of ours"),
    "behind": ({"clock_offset_s": -9.0}, "behind ours"),
    "docker": ({"docker": "20.10.24"}, "has docker 20, most have 28"),
    "processor": ({"architecture": "aarch64"}, "has processor aarch64, most have x86_64"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_together_is_named(case: str) -> None:
    changed, expected = MISFITS[case]
    usual = {"docker": "28.5.2", "architecture": "x86_64", "free": 1}
    facts = [
        HostFacts("a", **usual),
        HostFacts("b", **usual),
        HostFacts("c", **{**usual, **changed}),
    ]
    [(name, what)] = misfits(facts)
    assert name == "c" and expected in what


@pytest.mark.parametrize(
    ("shift", "said"), [(0.0, ""), (4000.0, "ahead of ours"), (-4000.0, "behind ours")]
)
def test_a_clock_that_is_apart_is_told_but_not_the_time_an_answer_takes(
    shift: float, said: str, host: FarHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = FarHost.asked

    def shifted(self: FarHost, *words: object) -> Any:
        value = asked(self, *words)
        value["time"] += shift
        return value

    monkeypatch.setattr(FarHost, "asked", shifted)
    inventory = take_inventory([host], limit_s=0)
    assert inventory.exit_code == 0 and said in inventory.text()
    assert ("its clock is" in inventory.text()) == bool(said)


def test_an_error_without_an_answer_is_an_error(tmp_path: Path) -> None:
    broken = FarHost(SiteHost("odd", local=True, data=str(tmp_path)))
    with pytest.raises(HfshipError):
        broken.put("/proc/nowhere/x", b"")
