"""Archives to many hosts: what goes from here, what from host to host, and what is said of each host."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from hfship.base.errors import HfshipError, HostError, NetworkError
from hfship.ops.bring import WORTH_RELAYING, Brought, bring, relay_words
from hfship.ops.push import PushFile
from hfship.ops.reach import FarHost
from hfship.site.hosts import SiteHost

PARTS = tuple(
    PushFile(Path(f"/out/m.tar.zst.{number:04}"), WORTH_RELAYING, "0" * 64) for number in (1, 2, 3)
)
SIDECAR = PushFile(Path("/out/m.tar.zst.sha256"), 100, "1" * 64)
LARGE_BUT_NO_ARCHIVE = PushFile(Path("/out/hfship.pyz"), WORTH_RELAYING, "2" * 64)
SMALL_PART = PushFile(Path("/out/small.tar.zst"), WORTH_RELAYING - 1, "3" * 64)


class Line:
    """What goes to hosts and between them, and what does not work."""

    def __init__(self) -> None:
        self.from_here: List[Tuple[str, str]] = []  # (host, file)
        self.relayed: List[Tuple[str, List[str]]] = []  # (host that sends, its words)
        self.prepared: Dict[str, Tuple[List[str], int, Sequence[str]]] = {}
        self.dead: Dict[str, HfshipError] = {}  # hosts that do not answer
        self.full: Dict[str, HfshipError] = {}  # hosts that take nothing that is large
        self.mute: Dict[str, HfshipError] = {}  # hosts that reach no other

    def push(
        self, to: Any, files: Any, stage: Any, stop: Any, streams: int, options: Any
    ) -> Pushing:
        assert not stop.is_set()
        return Pushing(self, to, files, streams, options)


class Pushing:
    """Stands for a Push to one host."""

    def __init__(self, line: Line, to: Any, files: Any, streams: int, options: Any) -> None:
        self.line, self.name = line, to.host
        line.prepared[to.host] = ([file.name for file in files], streams, options)
        assert to.folder == "/data/transfer"

    def prepare(self) -> None:
        if self.name in self.line.dead:
            raise self.line.dead[self.name]

    def bring(self, file: PushFile) -> None:
        if file.size >= WORTH_RELAYING and self.name in self.line.full:
            raise self.line.full[self.name]
        self.line.from_here.append((self.name, file.name))


class Said:
    """A reporter that keeps what it is told, and a stage that counts."""

    def __init__(self) -> None:
        self.infos: List[str] = []
        self.warnings: List[str] = []
        self.total = 0
        self.counted = 0

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def add(self, count: int) -> None:
        self.counted += count

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Said]:
        assert name == "push"
        self.total = total
        yield self


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    line = Line()

    def asked(self: FarHost, *words: object) -> None:
        if self.name in line.mute:
            raise line.mute[self.name]
        line.relayed.append((self.name, [str(word) for word in words]))

    monkeypatch.setattr("hfship.ops.bring.Push", line.push)
    monkeypatch.setattr(FarHost, "asked", asked)
    return line


def far(*names: str) -> List[FarHost]:
    return [FarHost(SiteHost(name, data="/data")) for name in names]


def brought(
    hosts: List[FarHost], files: Sequence[PushFile], jobs: int = 2, limit_bps: int = 0
) -> Tuple[Brought, Said]:
    said = Said()
    return bring(hosts, files, jobs, limit_bps, said), said  # type: ignore[arg-type]


def arrivals(line: Line) -> List[Tuple[str, str]]:
    """(host, file) of all that arrived, from wherever."""
    by_relay = []
    for _, words in line.relayed:
        target, _, _ = words[2].partition(":")
        by_relay.append((target, words[1].rpartition("/")[2]))
    return sorted([*line.from_here, *by_relay])


def test_every_host_gets_all_and_large_parts_go_from_host_to_host(line: Line) -> None:
    hosts = far("a", "b", "c")
    files = [*PARTS, SIDECAR, LARGE_BUT_NO_ARCHIVE, SMALL_PART]
    result, said = brought(hosts, files)
    assert arrivals(line) == sorted((host, file.name) for host in "abc" for file in files)
    for file in (SIDECAR, LARGE_BUT_NO_ARCHIVE, SMALL_PART):
        assert {host for host, name in line.from_here if name == file.name} == set("abc")
    assert line.relayed, "the line of this machine is left for what nobody has"
    size = sum(file.size for file in files)
    assert (result.size, result.answers) == (size, dict.fromkeys("abc", size))
    assert said.total == 3 * size
    assert result.relayed == said.counted == len(line.relayed) * WORTH_RELAYING
    assert all(host.stop.is_set() for host in hosts), "nothing is left at work"
    assert not result.failures and not said.warnings and not said.infos


def test_what_push_is_told_holds_for_each_host(line: Line) -> None:
    brought(far("a"), [*PARTS], jobs=4, limit_bps=100_000_000)
    assert line.prepared == {"a": ([file.name for file in PARTS], 2, ["--bwlimit=48828"])}


def test_one_that_does_not_answer_holds_no_other_up(line: Line) -> None:
    line.dead = {"b": NetworkError("b does not answer", "it took too long", "")}
    result, said = brought(far("a", "b", "c"), PARTS)
    assert {host for host, _ in arrivals(line)} == {"a", "c"}
    assert len(arrivals(line)) == 2 * len(PARTS)
    assert result.failures == line.dead
    assert said.warnings == ["b does not answer: it took too long"]


def test_where_nobody_answers_nothing_is_sent(line: Line) -> None:
    line.dead = {name: NetworkError(f"{name} does not answer", "", "") for name in "ab"}
    result, _ = brought(far("a", "b"), PARTS)
    assert result.failures == line.dead and not arrivals(line)


def test_one_that_fails_on_the_way_is_given_up_and_the_others_get_all(line: Line) -> None:
    line.full = {"a": HostError("disk full", "", "")}
    line.mute = dict.fromkeys("bc", HostError("b: no route", "", ""))
    result, said = brought(far("a", "b", "c"), PARTS)
    assert arrivals(line) == sorted((host, file.name) for host in "bc" for file in PARTS)
    assert result.failures == line.full
    assert said.warnings == ["a: disk full"]


def test_hosts_that_reach_no_other_are_sent_all_from_here_and_it_is_said_once(line: Line) -> None:
    line.mute = {name: HostError(f"{name}: Permission denied", "", "") for name in "abc"}
    result, said = brought(far("a", "b", "c"), PARTS)
    assert sorted(line.from_here) == sorted((host, file.name) for host in "abc" for file in PARTS)
    assert not result.failures and result.relayed == 0 and not said.warnings
    (text,) = said.infos
    source = text.partition(" cannot send to ")[0]
    assert text.endswith(f" ({source}: Permission denied): it is sent from here")


@pytest.mark.parametrize(
    "target, expected",
    [
        ({}, ["b:/srv/transfer"]),
        ({"address": "10.0.0.2", "user": "ops"}, ["ops@10.0.0.2:/srv/transfer"]),
        ({"address": "2001:db8::2"}, ["[2001:db8::2]:/srv/transfer"]),
        ({"address": "2001:db8::2", "user": "ops"}, ["ops@[2001:db8::2]:/srv/transfer"]),
        ({"port": 2222}, ["b:/srv/transfer", "--port", "2222"]),
        ({"jump": "gate"}, ["b:/srv/transfer", "--ssh-option", "ProxyJump=gate"]),
    ],
)
def test_a_host_is_told_the_way_to_another(target: Dict[str, Any], expected: List[str]) -> None:
    source = FarHost(SiteHost("a", data="/data", user="root", port=22, jump="x"))
    to = FarHost(SiteHost("b", data="/srv", **target))
    words = relay_words(source, to, PARTS[0])
    assert words == ["push", "/data/transfer/m.tar.zst.0001", *expected]


FAILED = HostError("disk full", "no space", "hfship clean")


@pytest.mark.parametrize(
    "relayed, expected",
    [
        (0, "pushed to 1 of 2 hosts in 5.0 s"),
        (3_000_000, "pushed to 1 of 2 hosts in 5.0 s, 3.0 MB of it from host to host"),
    ],
)
def test_what_came_of_it_is_told_by_host(relayed: int, expected: str) -> None:
    result = Brought(2_000_000, {"a": 2_000_000, "bb": FAILED}, relayed, 5.0)
    lines = result.text().splitlines()
    assert lines[0].startswith("a ")
    assert lines[0].endswith(" 2.0 MB, SHA-256 of every file checked there")
    assert lines[1].split() == ["bb", "failed"]
    assert lines[2:] == ["bb: disk full: no space", expected]
    value = result.json()
    assert (value["schema"], value["command"]) == ("hfship-hosts/1", "push")
    good, bad = value["hosts"]
    assert good == {"host": "a", "exit_code": 0, "results": [{"bytes": 2_000_000}]}
    assert (bad["host"], bad["exit_code"]) == ("bb", 9)
    assert bad["results"][0]["error"]["what"] == "disk full"
