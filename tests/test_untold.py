# SPDX-License-Identifier: Apache-2.0
"""A key that changes while a gateway of another host is silent: who is told what, and what is remembered."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterator,
    List,
    Mapping,
    Sequence,
    Set,
    Tuple,
)

import pytest

from hfship.base.errors import (
    HfshipError,
    IncompleteError,
    IntegrityError,
    NetworkError,
    UsageError,
)
from hfship.base.locks import FolderLock, lock_within
from hfship.base.modelsfile import read_models_file
from hfship.base.report import Reporter
from hfship.commands import guard
from hfship.commands.gateway_hosts import keep_set, require_told
from hfship.commands.modelskeys import models_schema
from hfship.commands.run import guarded, run_line
from hfship.ops.reach import FarHost
from hfship.site.gatewayset import GatewaySet
from hfship.site.keys import without_key
from hfship.site.record import SiteRecord, write_record
from hfship.site.settings import GatewaySettings
from hfship.site.store import gateway_folder, gateway_text, read_keys, write_files, write_keys
from hfship.site.terms import Gateway, GatewayModel, Replica
from hfship.site.untold import UNTOLD_FILE, forget_untold, note_untold, read_untold

MODELS = (GatewayModel("m", ("m",), (Replica("m", "x:1"),)),)
FILE = """
[gateway]
[[host]]
name = "gw1"
[[host]]
name = "gw2"
"""


class Far:
    """The gateways of two other hosts: what each was told last, and which are silent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: Dict[str, List[str]] = {}
        self.silent: Set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    def send(self, hosts: Sequence[FarHost], wanted: GatewaySet, _: Any) -> Dict[str, HfshipError]:
        self.meanwhile()
        failures: Dict[str, HfshipError] = {}
        for host in hosts:
            if host.name in self.silent:
                failures[host.name] = NetworkError(f"{host.name} does not answer")
            else:
                self.keys[host.name] = [key.name for key in wanted.keys]
        return failures

    def run(self, *words: str) -> Tuple[int, str, str]:
        """`hfship key WORDS`: the exit code, stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        reporter = Reporter("plain", 0, out, err, as_json="--json" in words)
        code, _ = guarded(reporter, lambda: run_line(["key", *words], reporter))
        return code, out.getvalue(), err.getvalue()

    @property
    def untold(self) -> Mapping[str, Tuple[str, ...]]:
        return read_untold(self.folder)


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    deploy = tmp_path / "deploy"
    deploy.mkdir(mode=0o700)
    (tmp_path / "models.toml").write_text(FILE)
    monkeypatch.setenv("HFSHIP_DEPLOY_DIR", str(deploy))
    monkeypatch.setenv("HFSHIP_MODELS_FILE", str(tmp_path / "models.toml"))
    made = Far(deploy)
    monkeypatch.setattr("hfship.commands.gateway_hosts.send_sets", made.send)
    gateway_folder(deploy).mkdir(mode=0o700)
    write_files(
        gateway_folder(deploy), {"gateway.json": gateway_text(Gateway(MODELS, (3, 4)))}, 0o600
    )
    write_record(deploy, SiteRecord(gateways=("gw1", "gw2")))
    keep_set(deploy, GatewaySet(GatewaySettings(), MODELS, ()))
    for name in ("alice", "bob"):
        assert made.run("add", name)[0] == 0
    assert made.keys == dict.fromkeys(("gw1", "gw2"), ["alice", "bob"])
    yield made


def test_a_revocation_that_a_silent_gateway_misses_ends_with_3_and_the_next_step(far: Far) -> None:
    far.silent = {"gw2"}
    code, out, err = far.run("revoke", "bob", "--yes")
    assert code == 3 and out == "bob: revoked\n"
    assert "not known yet at the gateway on gw2: what changed of bob" in err
    assert "gw2 does not answer" in err and "that gateway takes keys as they were" in err
    assert "next  hfship key sync" in err
    assert far.keys == {"gw1": ["alice"], "gw2": ["alice", "bob"]}
    assert far.untold == {"gw2": ("bob",)}
    assert "not known yet at the gateway on gw2: what changed of bob" in far.run("list")[2]


def test_the_same_command_goes_on_until_the_gateway_knows(far: Far) -> None:
    far.silent = {"gw2"}
    assert [far.run("revoke", "bob", "--yes")[0] for _ in range(2)] == [3, 3]
    assert far.run("revoke", "nobody", "--yes")[0] == 5
    far.silent = set()
    code, out, _ = far.run("revoke", "bob", "--yes")
    assert (code, out) == (0, "bob: revoked\n")
    assert far.keys["gw2"] == ["alice"] and far.untold == {}
    assert far.run("revoke", "bob", "--yes")[0] == 5, "all know it: there is no such key"


def test_sync_tells_what_was_missed_and_names_who_is_silent_still(far: Far) -> None:
    far.silent = {"gw1", "gw2"}
    assert far.run("suspend", "alice")[0] == 3 and far.run("revoke", "bob", "--yes")[0] == 3
    assert far.untold == dict.fromkeys(("gw1", "gw2"), ("alice", "bob"))
    far.silent = {"gw2"}
    code, _, err = far.run("sync")
    assert code == 3 and "on gw2: what changed of alice, bob" in err and "gw1" not in err
    far.silent = set()
    code, out, _ = far.run("sync", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == ["gw1", "gw2"]
    assert far.untold == {} and far.keys["gw2"] == ["alice"]


def test_a_new_key_is_shown_though_a_gateway_is_silent(far: Far) -> None:
    far.silent = {"gw2"}
    code, out, _ = far.run("add", "carol")
    assert code == 3 and out.startswith("sk-")


def test_what_is_killed_before_others_were_told_is_not_lost(far: Far) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    far.meanwhile = interrupt
    assert far.run("revoke", "bob", "--yes")[0] == 130
    assert far.untold == dict.fromkeys(("gw1", "gw2"), ("bob",))
    far.meanwhile = lambda: None
    assert far.run("sync")[0] == 0 and far.keys["gw2"] == ["alice"]


def test_of_two_changes_at_once_the_later_is_the_last_that_is_told(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that sends first holds the other up, which then reads the keys of both."""
    go_on, sends = threading.Event(), threading.Event()
    asked: List[Path] = []

    def lock(folder: Path, patience_s: float) -> ContextManager[bool]:
        asked.append(folder)
        return lock_within(folder, patience_s)

    monkeypatch.setattr("hfship.commands.gateway_hosts.lock_within", lock)

    def wait() -> None:
        far.meanwhile = lambda: None
        sends.set()
        assert go_on.wait(60)

    far.meanwhile = wait
    threads = [
        threading.Thread(target=far.run, args=("revoke", name, "--yes"))
        for name in ("bob", "alice")
    ]
    threads[0].start()
    assert sends.wait(60)
    threads[1].start()
    deadline = time.monotonic() + 60
    while len(asked) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    go_on.set()
    for thread in threads:
        thread.join()
    assert far.keys == {"gw1": [], "gw2": []} and far.untold == {}


def test_a_change_that_comes_while_others_are_told_is_still_to_be_told(far: Far) -> None:
    """By a command that was killed right after it."""
    folder = gateway_folder(far.folder)

    def change() -> None:
        far.meanwhile = lambda: None
        with FolderLock(far.folder):
            note_untold(far.folder, ["gw1", "gw2"], ["alice"])
            write_keys(folder, without_key(read_keys(folder), "alice"))

    far.meanwhile = change
    far.run("sync")
    assert far.untold == {"gw1": ("alice",), "gw2": ("alice",)}
    assert far.run("sync")[0] == 0
    assert far.untold == {} and far.keys == {"gw1": ["bob"], "gw2": ["bob"]}


def test_without_a_way_to_a_gateway_the_change_counts_here_and_is_remembered(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFSHIP_MODELS_FILE", "")
    code, _, err = far.run("revoke", "bob", "--yes")
    assert code == 3 and "no models file says how gw1 is reached" in err
    assert "HFSHIP_MODELS_FILE=FILE hfship key sync" in err
    assert [key.name for key in read_keys(gateway_folder(far.folder))] == ["alice"]
    assert set(far.untold) == {"gw1", "gw2"}


def test_a_host_that_left_the_models_file_is_named(far: Far) -> None:
    write_record(far.folder, SiteRecord(gateways=("gw1", "gone")))
    code, _, err = far.run("revoke", "bob", "--yes")
    assert code == 3 and "has no host gone any more" in err
    assert "name gone there again, then: hfship key sync" in err
    assert far.untold == {"gone": ("bob",)}


def test_the_watchdog_of_the_control_host_tells_it_by_itself(far: Far, tmp_path: Path) -> None:
    far.silent = {"gw2"}
    far.run("revoke", "bob", "--yes")
    file = read_models_file(tmp_path / "models.toml", models_schema(), ())
    settings = SimpleNamespace(deploy_dir=far.folder)
    err = io.StringIO()
    reporter = Reporter("plain", 0, io.StringIO(), err)
    context: Any = SimpleNamespace(settings=settings, file=file, reporter=reporter)
    watchdog = guard.Guard(context)
    watchdog._tell("")
    assert far.untold == {"gw2": ("bob",)} and not err.getvalue()
    far.silent = set()
    watchdog._tell("")
    assert far.untold == {} and far.keys["gw2"] == ["alice"]
    assert "gw2: its gateway knows the keys again" in err.getvalue()


def test_the_next_step_is_that_of_the_fault() -> None:
    failures: Dict[str, HfshipError] = {
        "a": NetworkError("a does not answer", "", "ssh a true"),
        "b": UsageError("b is full", "", "look at the disk of b"),
    }
    with pytest.raises(IncompleteError) as caught:
        require_told(failures, {"a": ("k",), "b": ("k", "l")})
    assert caught.value.what == "not known yet at the gateway on a, b: what changed of k, l"
    assert caught.value.next_step == "look at the disk of b"
    require_told({}, {"a": ("k",)})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": "x"}',
        '{"format": "hfship-untold/1"}',
        '{"format": "hfship-untold/2", "hosts": {}}',
    ],
)
def test_a_broken_memory_is_told(text: str, far: Far) -> None:
    note_untold(far.folder, ["gw1"], ["bob"])
    (far.folder / "_site" / UNTOLD_FILE).write_text(text)
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_untold(far.folder)


def test_what_is_untold_is_remembered_by_host(tmp_path: Path) -> None:
    """For this user alone, each key once, in the order in which they changed."""
    assert read_untold(tmp_path) == {}
    forget_untold(tmp_path, ["gw1"])
    assert not (tmp_path / "_site").exists(), "there is nothing to write"
    note_untold(tmp_path, ["gw1", "gw2"], ["bob", "ann"])
    note_untold(tmp_path, iter(["gw2"]), iter(["zoe", "bob"]))
    expected = {"gw1": ("bob", "ann"), "gw2": ("bob", "ann", "zoe")}
    assert read_untold(tmp_path) == expected
    path = tmp_path / "_site" / UNTOLD_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert json.loads(text)["format"] == "hfship-untold/1" and text.endswith("}\n")
    assert text.index('"format"') < text.index('"hosts"') and "\n " in text
    forget_untold(tmp_path, ["gw3"])
    assert path.read_text() == text
    forget_untold(tmp_path, ["gw2", "gw3"])
    assert read_untold(tmp_path) == {"gw1": ("bob", "ann")}


def test_the_folder_of_the_site_is_ours_alone(tmp_path: Path) -> None:
    note_untold(tmp_path, ["gw1"], ["bob"])
    assert not (tmp_path / "_site").stat().st_mode & 0o022
    shutil.rmtree(tmp_path / "_site")
    (tmp_path / "_site").mkdir()
    (tmp_path / "_site").chmod(0o777)
    with pytest.raises(HfshipError):
        note_untold(tmp_path, ["gw1"], ["bob"])
    assert list((tmp_path / "_site").iterdir()) == []


@pytest.mark.parametrize("hosts", ["[]", "3", "null", '"x"', '{"a": 3}'])
def test_hosts_that_are_none_are_told(hosts: str, tmp_path: Path) -> None:
    note_untold(tmp_path, ["gw1"], ["bob"])
    path = tmp_path / "_site" / UNTOLD_FILE
    path.write_text(f'{{"format": "hfship-untold/1", "hosts": {hosts}}}')
    with pytest.raises(IntegrityError) as told:
        read_untold(tmp_path)
    assert told.value.next_step == f"move {path} away, then: hfship key sync"
