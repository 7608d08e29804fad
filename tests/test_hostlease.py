"""Leases of hosts, and who has them: the hosts are folders of this machine, without ssh."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from hfship.base.errors import HfshipError, HostError, NetworkError
from hfship.base.locks import InUseError
from hfship.base.processes import Completed
from hfship.ops import hostlease
from hfship.ops.hostlease import EXPIRY_S, leased, own_lease, release, take
from hfship.ops.reach import FarHost
from hfship.site.hosts import SiteHost

MINE = '{"host": "here", "pid": 1, "start": "1", "boot_id": "b"}'
THEIRS = '{"host": "other", "pid": 7, "start": "1", "boot_id": "x"}'


@pytest.fixture
def host(tmp_path: Path) -> FarHost:
    return FarHost(SiteHost("near", local=True, data=str(tmp_path / "it's data")))


@pytest.fixture
def lease(tmp_path: Path) -> Path:
    path = tmp_path / "it's data/deploy/_site/lease"
    path.parent.mkdir(parents=True)
    return path


def aged(path: Path, text: str, age_s: float) -> None:
    path.write_text(text)
    at = time.time() - age_s
    os.utime(path, (at, at))


def test_our_lease_says_who_we_are() -> None:
    owner = json.loads(own_lease())
    assert owner["pid"] == os.getpid() and owner["host"] == os.uname().nodename
    assert owner["start"] and owner["boot_id"] and own_lease() == own_lease()


# Seconds since the lease of another was renewed, by the clock there, which may have been set back.
@pytest.mark.parametrize(
    "age_s, is_held",
    [(0, True), (EXPIRY_S - 20, True), (EXPIRY_S + 1, False), (-30, True), (-EXPIRY_S - 20, False)],
)
def test_a_lease_is_held_until_it_expires(
    age_s: float, is_held: bool, host: FarHost, lease: Path
) -> None:
    aged(lease, THEIRS, age_s)
    if not is_held:
        take(host, MINE)
        assert lease.read_text() == MINE
        return
    with pytest.raises(
        InUseError, match="near is being changed from another control host"
    ) as caught:
        take(host, MINE)
    assert "other" in caught.value.why and "last seen" in caught.value.why
    assert "-" not in caught.value.why.partition("last seen")[2], "no time before now"
    assert lease.read_text() == THEIRS


def test_our_own_is_renewed(host: FarHost, lease: Path) -> None:
    aged(lease, MINE, 50)
    take(host, MINE)
    assert time.time() - lease.stat().st_mtime < 40 and lease.read_text() == MINE


def test_what_is_no_lease_is_somebodys_until_it_expires(host: FarHost, lease: Path) -> None:
    aged(lease, "no json", 0)
    with pytest.raises(InUseError):
        take(host, MINE)
    aged(lease, "no json", EXPIRY_S + 1)
    take(host, MINE)


def test_only_ours_is_given_back(host: FarHost, lease: Path) -> None:
    lease.write_text(THEIRS)
    release(host, MINE)
    assert lease.read_text() == THEIRS
    lease.write_text(MINE)
    release(host, MINE)
    assert not lease.exists()


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    broken = FarHost(SiteHost("near", local=True, data=str(tmp_path / "file")))
    with pytest.raises(HfshipError) as caught:
        take(broken, MINE)
    assert not isinstance(caught.value, InUseError)
    release(broken, MINE)  # it has nothing


def test_who_died_between_two_looks_is_not_waited_for(
    host: FarHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this machine, and dead, but each time another one holds it."""
    owners = [own_lease().replace('"start": "', f'"start": "{number}') for number in (1, 2)]
    asked: List[str] = []

    def sh(self: FarHost, script: str) -> Completed:
        asked.append(script)
        return Completed(0, f"held 3 {owners[len(asked) - 1]}\n", "")

    monkeypatch.setattr(FarHost, "sh", sh)
    with pytest.raises(InUseError):
        take(host, own_lease())
    assert len(asked) == 2 and '"start": "1' in asked[1], "the dead one is named as dead"


# -- of many hosts


class Site:
    """Hosts whose leases are played: who fails, and what was asked in which order."""

    def __init__(self) -> None:
        self.failures: Dict[str, HfshipError] = {}
        self.taken: List[str] = []
        self.released: List[str] = []

    def take(self, host: FarHost, mine: str) -> None:
        assert mine == own_lease()
        self.taken.append(host.name)
        if host.name in self.failures:
            raise self.failures[host.name]

    def release(self, host: FarHost, mine: str) -> None:
        assert mine == own_lease() and not host.stop.is_set()
        self.released.append(host.name)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    played = Site()
    monkeypatch.setattr(hostlease, "take", played.take)
    monkeypatch.setattr(hostlease, "release", played.release)
    yield played


def far(*names: str) -> List[FarHost]:
    return [FarHost(SiteHost(name)) for name in names]


def test_hosts_that_answer_are_held_and_given_back(site: Site) -> None:
    site.failures["b"] = NetworkError("b does not answer", "", "")
    hosts = far("c", "b", "a")
    with leased(hosts, lambda _: None) as failures:
        assert failures == [site.failures["b"]] and not site.released
        for host in hosts:
            host.stop.set()  # as Ctrl-C does
    assert sorted(site.taken) == ["a", "b", "c"]
    assert sorted(site.released) == ["a", "c"]


def test_a_host_in_use_ends_it_and_the_others_are_given_back(site: Site) -> None:
    site.failures["b"] = InUseError("b is being changed", "", "")
    site.failures["c"] = NetworkError("c does not answer", "", "")
    begun = False
    with pytest.raises(InUseError, match="b is being"), leased(far("a", "b", "c"), lambda _: None):
        begun = True
    assert not begun
    assert site.released == ["a"]


def test_what_fails_inside_gives_all_back(site: Site) -> None:
    with pytest.raises(HostError, match="inside"), leased(far("a"), lambda _: None):
        raise HostError("inside", "", "")
    assert site.released == ["a"]


def test_leases_are_renewed_and_a_lost_one_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not answer for a while is not lost."""
    monkeypatch.setattr(hostlease, "BEAT_S", 0.01)
    lost: List[str] = []
    told = threading.Event()

    def on_loss(name: str) -> None:
        lost.append(name)
        told.set()

    with leased(far("a", "b", "c"), on_loss):
        site.failures["b"] = NetworkError("b does not answer", "", "")
        site.failures["c"] = InUseError("c is being changed", "", "")
        assert told.wait(60)
    assert set(lost) == {"c"} and site.taken.count("a") > 1


def test_a_host_that_hangs_holds_up_neither_what_is_renewed_nor_the_end(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking has no limit: there the program may be brought; all later looks have one."""
    limits: List[float] = []
    renewed = threading.Event()

    def at_once(hosts: List[FarHost], work: Any, limit_s: float = 0.0) -> Any:
        limits.append(limit_s)
        if len(limits) == 3:
            renewed.set()
        return {host.name: work(host) for host in hosts}

    monkeypatch.setattr(hostlease, "at_once", at_once)
    monkeypatch.setattr(hostlease, "BEAT_S", 0.01)
    with leased(far("a"), lambda _: None):
        assert renewed.wait(60)
    assert limits[0] == 0.0 and limits[-1] == 10.0
    assert set(limits[1:-1]) == {0.01}
