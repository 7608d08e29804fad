"""Keys of the gateway as an operator makes them: applied at once to a real HAProxy, kept, and never written down."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest

from conftest import Program, free_port, program
from hfship.base.errors import HostError, IntegrityError, UsageError
from hfship.site.admin import GatewayDownError, generation, key_uses, replace_maps, server_states
from hfship.site.keys import (
    apply_keys,
    changed,
    digest_of,
    keep_keys,
    require_known_models,
    usage_of,
    with_rights,
)
from hfship.site.maps import key_maps, map_path, map_text
from hfship.site.store import gateway_text, read_gateway, read_keys, write_keys, write_rights
from hfship.site.terms import AccessKey, Gateway, GatewayModel, Replica
from support.engine import Engine, start_engine
from support.gateways import VERSIONS, RunningGateway, make_gateway


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    started = start_engine(free_port(), "big")
    yield started
    started.kill()


class Site:
    """hfship beside a gateway that it set up."""

    def __init__(self, hfship: Program, gateway: RunningGateway) -> None:
        self.hfship, self.gateway = hfship, gateway

    def key(self, *words: Any, **options: Any) -> str:
        return str(self.hfship("key", *words, **options).stdout).strip()

    def ask(self, secret: str) -> int:
        body = {"model": "big", "messages": []}
        headers = {"Authorization": f"Bearer {secret}"}
        return self.gateway.ask("POST", "/v1/completions", body, key="", headers=headers).status


@pytest.fixture(params=list(VERSIONS))
def site(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Site]:
    home = Path(
        tempfile.mkdtemp(prefix="hfship-")
    )  # short: HAProxy's path to a socket has 97 bytes
    hfship = program("source", home)
    folder = hfship.home / "deploy" / "_gateway"
    replica = Replica("big", f"127.0.0.1:{engine.port}")
    models = [
        GatewayModel("big", ("big",), (replica,)),
        GatewayModel("llama", ("llama",), (replica,)),
    ]
    gateway = make_gateway(request.param, folder, models, [], free_port())
    gateway.write()
    (folder / "gateway.json").write_text(gateway_text(gateway.gateway))
    try:
        gateway.start()
        yield Site(hfship, gateway)
    finally:
        gateway.end()
        shutil.rmtree(home)


def test_a_key_from_its_making_to_its_end(site: Site) -> None:
    """Each change holds for the next request, without a reload, and after a restart."""
    secret = site.key(
        "add", "alice", "--models", "big", "--rate", "60/min", "--streams", "4", "--expires", "90d"
    )
    assert len(secret) > 40 and "\n" not in secret
    assert site.ask(secret) == 200
    for action, status in (("suspend", 403), ("resume", 200)):
        site.key(action, "alice")
        assert site.ask(secret) == status, action
    site.gateway.end()
    site.gateway.process = None
    site.gateway.keys = list(read_keys(site.gateway.folder))  # what a restart reads
    site.gateway.start()
    assert site.ask(secret) == 200
    other = site.key("add", "bob")
    assert site.ask(other) == 200
    site.key("revoke", "alice", "--yes")
    assert (site.ask(secret), site.ask(other)) == (401, 200)
    everything = "".join(path.read_text() for path in site.hfship.home.rglob("*") if path.is_file())
    assert secret not in everything and digest_of(other) in everything


def test_a_key_is_shown_once_and_only_its_digest_is_kept(site: Site) -> None:
    row = json.loads(site.key("add", "alice", "--json"))
    assert row["schema"] == "hfship-key/1" and row["models"] == ["*"]
    path = site.gateway.folder / "keys.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (kept,) = json.loads(path.read_text())["keys"]
    assert kept["sha256"] == digest_of(row["key"])
    listed = site.hfship("key", "list", "--json", "-v")
    assert row["key"] not in listed.stdout + listed.stderr
    maps = site.gateway.folder / "maps"
    assert {stat.S_IMODE((maps / f"{name}.map").stat().st_mode) for name in ("keys", "rights")} == {
        0o600
    }


def test_no_request_fails_while_keys_change(site: Site) -> None:
    """A map is replaced as a whole: at no moment a key that stays is missing."""
    secret = site.key("add", "alice")
    done: List[int] = []
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            done.append(site.ask(secret))

    threads = [threading.Thread(target=go_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    folder = site.gateway.folder
    for number in range(10):
        more = tuple(AccessKey(f"k{n}", f"{n:064x}") for n in range(number * 200))
        assert keep_keys(folder, (*read_keys(folder)[:1], *more))
    over.set()
    for thread in threads:
        thread.join()
    assert len(done) > 10 and set(done) == {200}
    assert len(read_keys(folder)) == 1801


def test_what_a_key_does_is_told(site: Site) -> None:
    secret = site.key("add", "alice", "--rate", "2/min")
    assert [site.ask(secret) for _ in range(3)] == [200, 200, 429]
    (row,) = json.loads(site.key("list", "--json"))
    assert (row["running"], row["last_minute"], row["state"]) == (0, 2, "active")
    (use,) = key_uses(site.gateway.folder)
    assert (use.name, use.accepted) == ("alice", 2)
    used = usage_of((site.gateway.folder / "log").read_text().splitlines())["alice"]
    assert (used.requests, used.refused, used.failed) == (
        2,
        1,
        0,
    ) and used.bytes_in > 0 < used.bytes_out
    assert abs(used.last - time.time()) < 60


def test_the_runtime_socket_tells_the_replicas(site: Site) -> None:
    folder = site.gateway.folder
    assert generation(folder) == "first"
    states = {(one.backend, one.name): one.state for one in server_states(folder)}
    assert states == {("be_big", "big"): "UP", ("be_llama", "big"): "UP"}
    with pytest.raises(HostError) as caught:
        replace_maps(folder, {"nothing": {}})
    assert "maps/nothing.map" in caught.value.text()


WRONG = [
    (["add"], 2, "no key is named"),
    (["add", "a", "b"], 2, "one key at a time"),
    (["add", "a b"], 2, "cannot be the name of a key"),
    (["add", "a", "--models", "bigg"], 2, "no model is called bigg; did you mean big?"),
    (["add", "a", "--models", ","], 2, "names no model"),
    (["add", "a", "--rate", "0/min"], 2, "is not a rate"),
    (["add", "a", "--expires", "soon"], 2, "is not when a key ends"),
    (["add", "a", "--streams", "0"], 2, "positive number"),
    (["add", "alice"], 2, "there is a key alice already"),
    (["revoke", "alicia", "--yes"], 5, "there is no key alicia; did you mean alice?"),
    (["revoke", "alice"], 2, "no terminal to ask on"),
    (["suspend", "alice", "nobody"], 5, "there is no key nobody"),
    (["frobnicate"], 2, "invalid choice"),
]


def test_what_is_wrong_changes_nothing(tmp_path: Path, engine: Engine) -> None:
    hfship = program("source", tmp_path / "home")
    folder = hfship.home / "deploy" / "_gateway"
    gateway = make_gateway("haproxy-2.6", folder, [GatewayModel("big", ("big",), ())], [], 1)
    first = hfship("key", "add", "alice")
    assert "no gateway runs here now" in first.stderr
    (folder / "gateway.json").write_text(gateway_text(gateway.gateway))
    before = (folder / "keys.json").read_bytes()
    for words, code, said in WRONG:
        done = hfship("key", *words, code=code)
        assert said in done.stderr, words
    assert (folder / "keys.json").read_bytes() == before
    assert [key.suspended for key in read_keys(folder)] == [False]


BROKEN = ["", "{}", "[]", '{"format": "hfship-keys/2", "keys": []}', '{"format": "hfship-keys/1", "keys": [{"name": "a", "sha256": "x"}]}',
          '{"format": "hfship-keys/1", "keys": [{"name": "a b", "sha256": "%s"}]}' % ("a" * 64),
          '{"format": "hfship-keys/1", "keys": [{"name": "a", "sha256": "%s", "rate": "9"}]}' % ("a" * 64)]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_store_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "_gateway"
    write_keys(folder, [AccessKey("a", "a" * 64, rate=6)])
    assert read_keys(folder) == (AccessKey("a", "a" * 64, rate=6),)
    (folder / "keys.json").write_text(text)
    with pytest.raises((IntegrityError, HostError)):
        read_keys(folder)


def test_a_store_of_another_user_is_not_believed(tmp_path: Path) -> None:
    folder = tmp_path / "_gateway"
    write_keys(folder, [AccessKey("a", "a" * 64)])
    os.chmod(folder / "keys.json", 0o666)
    with pytest.raises(HostError):
        read_keys(folder)


def test_a_gateway_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "_gateway"
    write_keys(folder, [])
    models = [
        GatewayModel(
            "m",
            ("m", "org/m"),
            (Replica("m", "h:1"), Replica("m.2", "h:2", True)),
            "prefix",
            "on-demand",
        )
    ]
    made = make_gateway("haproxy-2.6", folder, models, [], 1, max_body=5)
    (folder / "gateway.json").write_text(gateway_text(made.gateway))
    assert read_gateway(folder) == made.gateway
    with pytest.raises(GatewayDownError):
        generation(folder)


def test_a_models_file_says_all_rights_anew() -> None:
    keys = [
        AccessKey("a", "1" * 64, rate=5, streams=2, created="then"),
        AccessKey("b", "2" * 64),
        AccessKey("d", "3" * 64),
    ]
    (first, second, third) = with_rights(keys, {"a": {"rate": 9}, "c": {}, "d": {"rate": 7}})
    assert third.rate == 7
    assert (first.rate, first.streams, first.created, first.sha256) == (9, 0, "then", "1" * 64)
    assert second is keys[1]
    assert with_rights(changed(keys, "a", suspended=True), {"a": {}})[0].suspended


@pytest.mark.parametrize("known", [("m", "n"), ()])
def test_models_that_nobody_has_are_told_with_those_that_are_there(known: Tuple[str, ...]) -> None:
    models = [GatewayModel(name, (name, f"org/{name}"), ()) for name in known]
    require_known_models(["*", *known, *(f"org/{name}" for name in known)], models)
    with pytest.raises(UsageError, match="no model is called x") as caught:
        require_known_models(["*", "x"], models)
    assert caught.value.why == "behind the gateway are: " + (", ".join(known) or "none")


@pytest.mark.parametrize(
    ("there", "runs", "kept"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_keys_are_kept_and_applied_where_a_gateway_runs(
    there: bool, runs: bool, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_maps(_: Path, maps: Any) -> None:
        told.append(maps)
        if not runs:
            raise GatewayDownError("down", "", "")

    told: List[Any] = []
    monkeypatch.setattr("hfship.site.keys.replace_maps", replace_maps)
    folder = tmp_path / "_gateway"
    folder.mkdir(mode=0o700)
    model = GatewayModel("m", ("m",), (Replica("m", "h:1"),))
    if there:
        (folder / "gateway.json").write_text(gateway_text(Gateway((model,), (3, 4))))
    keys = (AccessKey("bob", "5e" * 32, ("m",)),)
    assert keep_keys(folder, keys) == kept and read_keys(folder) == keys
    maps = key_maps((model,), keys)
    assert told == ([maps] if there else [])
    texts = {name: map_text(entries) for name, entries in maps.items() if there}
    assert {name: (folder / map_path(name)).read_text() for name in texts} == texts
    assert apply_keys(folder) == kept and read_keys(folder) == keys


def test_a_key_that_the_models_file_lists_gets_no_more_than_that(tmp_path: Path) -> None:
    """`key add` comes after `serve`, which says so: until the next `serve` nobody else would know."""
    hfship = program("source", tmp_path)
    folder = hfship.home / "deploy/_gateway"
    folder.mkdir(parents=True, mode=0o750)
    write_rights(folder, {"alice": {"models": ("big",), "rate": 6}, "ops": {"ops": True}})
    assert hfship("key", "add", "alice").stdout.startswith("sk-")
    hfship("key", "add", "ops")
    hfship("key", "add", "bob", "--rate", "9/min")
    alice, ops, bob = read_keys(folder)
    assert (alice.models, alice.rate) == (("big",), 6) and ops.ops
    assert (bob.models, bob.rate, bob.ops) == (("*",), 9, False)
    hfship("key", "revoke", "alice", "-y")
    hfship("key", "add", "alice", "--models", "small")
    alice = read_keys(folder)[-1]
    assert (alice.models, alice.rate) == (("small",), 6)
