# SPDX-License-Identifier: Apache-2.0
"""`hfship key` where no gateway runs: what is kept, shown and told; test_keys.py has gateways."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import pytest

from hfship.base.report import Reporter
from hfship.commands.key import KeyRow, usage_values
from hfship.commands.run import guarded, run_line
from hfship.site.admin import KeyUse
from hfship.site.keys import KeyUsage
from hfship.site.store import gateway_folder, gateway_text, read_keys, write_files, write_rights
from hfship.site.terms import AccessKey, Gateway, GatewayModel, Replica

Run = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a gateway with the models m and n."""
    monkeypatch.setenv("HFSHIP_DEPLOY_DIR", str(tmp_path))
    monkeypatch.setenv("HFSHIP_MODELS_FILE", "")
    made = gateway_folder(tmp_path)
    made.mkdir(mode=0o700)
    models = tuple(GatewayModel(name, (name,), (Replica(name, "x:1"),)) for name in ("m", "n"))
    write_files(made, {"gateway.json": gateway_text(Gateway(models, (3, 2)))}, 0o600)
    return made


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs `key WORDS`; the exit code, stdout and stderr."""

    def run_words(*words: str) -> Tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        reporter = Reporter("plain", 0, out, err, as_json="--json" in words)
        code, _ = guarded(reporter, lambda: run_line(["key", *words], reporter))
        return code, out.getvalue(), err.getvalue()

    return run_words


def rows_of(run: Run, *words: str) -> List[Dict[str, Any]]:
    rows: List[Dict[str, Any]] = json.loads(run("list", "--json", *words)[1])
    return rows


def test_a_key_is_shown_once_and_its_digest_is_kept(run: Run, folder: Path) -> None:
    code, out, err = run("add", "alice", "--models", "m", "--rate", "60/min", "--streams", "2")
    secret = out.strip()
    assert code == 0 and secret.startswith("sk-") and secret not in err
    assert "no gateway runs here now; its next start has that" in err
    (key,) = read_keys(folder)
    assert (key.name, key.models, key.rate, key.streams) == ("alice", ("m",), 60, 2)
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest() and key.created
    value = json.loads(run("add", "bob", "--ops", "--json")[1])
    assert value["key"].startswith("sk-") and value["ops"] is True and value["models"] == ["*"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["add"], 2, "nothing to add"),
        (["revoke", "--yes"], 2, "nothing to revoke"),
        (["add", "x", "y"], 2, "one key at a time"),
        (["add", "x", "--models", "z"], 2, "z"),
        (["add", "alice"], 2, "alice"),
        (["suspend", "alice", "nobody"], 5, "nobody"),
        (["revoke", "alice"], 2, "revoke alice? No key can be restored."),
        (["list", "nobody"], 5, "nobody"),
    ],
)
def test_what_is_wrong_changes_nothing(
    words: List[str], code: int, said: str, run: Run, folder: Path
) -> None:
    run("add", "alice")
    before = read_keys(folder)
    ended, out, err = run(*words)
    assert ended == code and said in err and out == ""
    assert read_keys(folder) == before


def test_keys_are_suspended_resumed_and_revoked_together(run: Run, folder: Path) -> None:
    for name in ("a", "b", "c"):
        run("add", name)
    assert run("suspend", "a", "b")[1] == "a, b: suspended\n"
    assert [row["state"] for row in rows_of(run)] == ["suspended", "suspended", "active"]
    assert json.loads(run("resume", "b", "--json")[1])[0]["state"] == "active"
    assert [row["name"] for row in rows_of(run, "c", "b")] == ["c", "b"]
    assert run("revoke", "a", "c", "--yes")[1] == "a, c: revoked\n"
    assert [key.name for key in read_keys(folder)] == ["b"]
    run("revoke", "b", "--yes")
    assert "there are no keys" in run("list")[2]
    assert rows_of(run) == []


def test_rights_come_from_the_models_file_and_what_is_asked_for_wins(
    run: Run, folder: Path
) -> None:
    write_rights(folder, {"alice": {"models": ["m"], "rate": 6, "streams": 3}})
    run("add", "alice", "--rate", "9/min")
    (key,) = read_keys(folder)
    assert (key.models, key.rate, key.streams) == (("m",), 9, 3)


def test_what_runs_and_what_was_used_is_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("add", "alice")
    run("add", "bob")
    monkeypatch.setattr("hfship.site.admin.key_uses", lambda _: [KeyUse("alice", 1, 2, 3)])
    used = KeyUsage(5, 6, 7, 8000, 9000, 10.04, 1700000000)
    ledger = SimpleNamespace(since="2026-01-31T04:05:06Z", keys={"alice": used})
    monkeypatch.setattr("hfship.site.usage.keep_usage", lambda _: ledger)
    alice, bob = rows_of(run, "--usage")
    assert (alice["running"], alice["last_minute"]) == (1, 2) and "running" not in bob
    told = {name: alice[name] for name in usage_values(used)}
    assert told == {
        "requests": 5,
        "refused": 6,
        "failed": 7,
        "bytes_in": 8000,
        "bytes_out": 9000,
        "seconds": 10.0,
        "last": "2023-11-14T22:13:20Z",
    }
    assert bob["requests"] == 0 and bob["last"] is None
    _, out, err = run("list", "--usage")
    assert "usage of 1 key since 2026-01-31 04:05" in err
    cells = [" ".join(line.split()) for line in out.splitlines()]
    assert any(
        "8.0 kB" in line and "9.0 kB" in line and "2023-11-14 22:13" in line for line in cells
    )


@pytest.mark.parametrize(
    ("fields", "now", "state"),
    [
        ({}, 5, "active"),
        ({"expires": 6}, 5, "active"),
        ({"expires": 5}, 5, "expired"),
        ({"expires": 4}, 5, "expired"),
        ({"expires": 4, "suspended": True}, 5, "suspended"),
    ],
)
def test_the_state_of_a_key(fields: Dict[str, Any], now: float, state: str) -> None:
    row = KeyRow(AccessKey("a", "5e", **fields), now, {}, {})
    assert row.state == state == row.json()["state"] == row.cells()["state"]


def test_a_key_as_a_row_of_a_table() -> None:
    used = usage_values(KeyUsage(5, 6, 7, 8000, 9000, 90.0, 1700000000))
    key = AccessKey("a", "5e", ("m", "n"), rate=6, streams=2, expires=1700000000)
    assert KeyRow(key, 1.0, {"running": 3, "last_minute": 4}, used).cells() == {
        "name": "a",
        "state": "active",
        "models": "m, n",
        "rate": "6/min",
        "streams": "2",
        "expires": "2023-11-14",
        "running": "3",
        "last_minute": "4",
        "requests": "5",
        "refused": "6",
        "failed": "7",
        "in": "8.0 kB",
        "out": "9.0 kB",
        "time": "1 min 30 s",
        "last": "2023-11-14 22:13",
    }
    plain = KeyRow(AccessKey("b", "5e"), 1.0, {}, usage_values(None)).cells()
    words = ("models", "rate", "streams", "expires", "requests", "last")
    assert [plain[word] for word in words] == ["all", "-", "-", "never", "0", "-"]
    assert "requests" not in KeyRow(AccessKey("b", "5e"), 1.0, {}, {}).cells()


def test_sync_says_that_no_other_host_has_a_gateway(run: Run) -> None:
    code, out, err = run("sync")
    assert (code, out) == (0, "no other host has a gateway\n")
    assert "no gateway runs here now" in err
