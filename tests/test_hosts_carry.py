# SPDX-License-Identifier: Apache-2.0
"""Archives to all hosts, and into their folders of models: what is asked, and what it came to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import Exit, HostError, IntegrityError, UsageError
from hfship.commands import hosts_carry
from hfship.commands.hosts_carry import OnHosts, word_there
from hfship.ops.reach import FarHost
from hfship.site.hosts import SiteHost

ARGS: Dict[str, Any] = {
    **dict.fromkeys(("all", "dry_run", "consume", "force", "allow_older"), False),
    "only": [],
    "engine": "",
    "keep": None,
    "archives": ["m.tar.zst.0001", "org/n"],
    **dict.fromkeys(("output", "base", "name", "wait"), None),
}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hosts a and b, and what was asked of them and printed."""
    made = SimpleNamespace(asked=[], said=[], printed=[], answers={}, failures={})
    made.reporter = SimpleNamespace(info=made.said.append)

    def at_once(hosts: List[FarHost], work: Any) -> Dict[str, Any]:
        for host in hosts:
            host._say(f"12:00:00Z at work on {host.name}")
            work(SimpleNamespace(asked=lambda *words: made.asked.append(words)))
        return {host.name: made.answers[host.name] for host in hosts}

    def bring(hosts: List[FarHost], files: Any, jobs: int, limit_bps: int, reporter: Any) -> Any:
        names = [host.name for host in hosts]
        hosts[0]._say("bringing")
        made.asked.append((names, files, jobs, limit_bps, reporter is made.reporter))
        return SimpleNamespace(failures=made.failures)

    def print_results(_: Any, results: Any) -> None:
        made.printed.extend(results)

    hosts = [FarHost(SiteHost(name)) for name in ("a", "b")]
    monkeypatch.setattr(hosts_carry, "chosen_hosts", lambda _: hosts)
    monkeypatch.setattr(hosts_carry, "at_once", at_once)
    monkeypatch.setattr(hosts_carry, "bring", bring)
    monkeypatch.setattr(hosts_carry, "merged", lambda archives: [*archives, "merged"])
    monkeypatch.setattr(hosts_carry, "files_to_push", lambda archives, _: [*archives, "files"])
    monkeypatch.setattr(hosts_carry, "print_results", print_results)
    return made


def context_of(site: Any, **args: Any) -> Any:
    return SimpleNamespace(args=SimpleNamespace(**{**ARGS, **args}), reporter=site.reporter)


# -- push

ALONE = {"ssh_port": 0, "identity": "", "ssh_options": [], "jobs": 3}


def test_archives_go_to_all_hosts_at_once(site: Any) -> None:
    archives: Any = ["x"]
    assert hosts_carry.push_to_hosts(context_of(site, **ALONE), archives, 9) == Exit.OK
    assert site.asked == [(["a", "b"], ["x", "merged", "files"], 3, 9, True)]
    assert site.said == ["a: bringing"] and len(site.printed) == 1
    site.failures["b"] = IntegrityError("b", "", "")
    assert hosts_carry.push_to_hosts(context_of(site, **ALONE), archives, 9) == Exit.INTEGRITY


@pytest.mark.parametrize("given", [{"ssh_port": 22}, {"identity": "k"}, {"ssh_options": ["x"]}])
def test_ways_to_one_host_are_none_to_all(given: Dict[str, Any], site: Any) -> None:
    with pytest.raises(UsageError, match="are for one host"):
        hosts_carry.push_to_hosts(context_of(site, **{**ALONE, **given}), [], 0)
    assert site.asked == []


# -- unpack


def test_each_host_unpacks_with_the_same_options(site: Any) -> None:
    site.answers = {"a": {"name": "m", "state": "unpacked"}, "b": HostError("b is odd", "", "")}
    given = {"all": True, "allow_older": True, "only": ["*.json", "b"], "engine": "e", "keep": 0}
    assert hosts_carry.unpack_on_hosts(context_of(site, **given)) == Exit.HOST
    words = ("unpack", "m", "org/n", "--all", "--allow-older")
    words += ("--only", "*.json", "--only", "b", "--engine", "e", "--keep", "0")
    assert site.asked == [words, words]
    assert site.said == ["a: at work on a", "b: at work on b"]
    [result] = site.printed
    assert result == OnHosts("unpack", site.answers)


@pytest.mark.parametrize("name", ["dry_run", "consume", "force"])
def test_options_are_spelled_as_they_are_typed(name: str, site: Any) -> None:
    words = hosts_carry._options_there(context_of(site, **{name: True}))
    assert words == ["--" + name.replace("_", "-")]


@pytest.mark.parametrize("name", ["output", "base", "name", "wait"])
def test_options_of_one_machine_are_refused(name: str, site: Any) -> None:
    with pytest.raises(UsageError, match=f"--{name} is for one host"):
        hosts_carry.unpack_on_hosts(context_of(site, **{name: "x"}))


def test_words_that_mean_the_same_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.tar.zst").touch()
    Path("folder").mkdir()
    words = {
        "m": "m",
        "org/m": "org/m",
        "m.tar.zst": "m",
        "./m.tar.zst": "m",
        "/media/m.tar.zst": "m",
        "/media/m.tar.zst.0002": "m",
        "folder": "folder",
        str(tmp_path / "folder"): "folder",
    }
    assert {word: word_there(word) for word in words} == words


# -- what it came to


def test_what_a_command_came_to_is_told_host_by_host() -> None:
    answers: Dict[str, Any] = {
        "a": [{"name": "m", "state": "unpacked", "bytes": 2_000_000_000}, {"reference": "vllm:1"}],
        "b": HostError("b is odd", "why", ""),
        "c": None,
    }
    result = OnHosts("unpack", answers)
    lines = [line.split() for line in result.text().splitlines() if line]
    assert lines == [
        ["a", "m", "unpacked", "2.0", "GB"],
        ["a", "vllm:1"],
        ["b", "failed"],
        ["b", "is", "odd:", "why"],
        ["unpack:", "2", "of", "3", "hosts", "ok"],
    ]
    assert list(result.failures) == ["b"]
    value = result.json()
    assert (value["schema"], value["command"]) == ("hfship-hosts/1", "unpack")
    rows = [(one["host"], one["exit_code"], len(one["results"])) for one in value["hosts"]]
    assert rows == [("a", 0, 2), ("b", int(Exit.HOST), 1), ("c", 0, 0)]
    assert value["hosts"][1]["results"][0]["error"]["what"] == "b is odd"


def test_what_a_host_says_is_told_once_under_its_name(site: Any) -> None:
    say = hosts_carry.speaker("a", site.reporter)
    for line in ("12:00:00Z loading", "loading 12:00:00Z", "  next  hfship logs", "x 1:2"):
        say(line)
    assert site.said == ["a: loading", "a: loading 12:00:00Z", "a: x 1:2"]
