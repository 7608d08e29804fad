"""The gateway: what it lets through, whither, and what it answers; by real HAProxy, oldest and newest."""

from __future__ import annotations

import concurrent.futures as futures
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from conftest import free_port
from hfship.site.admin import generation, key_uses, replace_maps, server_states
from hfship.site.gateway import STEERING, body_limit
from hfship.site.maps import key_maps
from hfship.site.rolling import bring_back, end_requests, send_elsewhere, take_out
from hfship.site.store import gateway_text
from hfship.site.terms import PREFIX, GatewayModel, Replica
from support import components, h2
from support.engine import Engine, start_engine
from support.gateways import VERSIONS, RunningGateway, key_named, make_gateway
from support.h2 import Text
from support.inside import LOAD, fared

KEYS = [
    key_named("bob"),
    key_named("alice", models=("big",)),
    key_named("slow", rate=6),
    key_named("patient", rate=6),
    key_named("narrow", streams=2),
    key_named("old", expires=1),
    key_named("late", expires=int(time.time()) + 86400),
    key_named("paused", suspended=True),
]


@pytest.fixture(scope="module")
def engines() -> Iterator[Dict[str, Engine]]:
    started: Dict[str, Engine] = {}
    try:
        for name in ("big", "big.2", "llama", "llama.2"):
            started[name] = start_engine(free_port(), name)
        yield started
    finally:
        for engine in started.values():
            engine.kill()


def models_of(engines: Dict[str, Engine]) -> List[GatewayModel]:
    def replica(name: str, standby: bool = False) -> Replica:
        return Replica(name, f"127.0.0.1:{engines[name].port}", standby)

    big = GatewayModel("big", ("big", "org/Big"), (replica("big"), replica("big.2", True)))
    llama = GatewayModel("llama", ("llama", "chat"), (replica("llama"), replica("llama.2")), PREFIX)
    return [big, llama]


@pytest.fixture(scope="module", params=list(VERSIONS))
def gateway(request: pytest.FixtureRequest, engines: Dict[str, Engine]) -> Iterator[RunningGateway]:
    folder = Path(tempfile.mkdtemp(prefix="hfship-"))
    made = make_gateway(request.param, folder, models_of(engines), KEYS, free_port())
    try:
        made.start()
        yield made
    finally:
        made.end()


# -- whither


@pytest.mark.parametrize(
    "name, engine", [("big", "big"), ("org/Big", "big"), ("llama", "llama"), ("chat", "llama")]
)
def test_the_model_of_the_body_decides(gateway: RunningGateway, name: str, engine: str) -> None:
    assert gateway.chat(name).json["id"].partition(".")[0] == engine


@pytest.mark.parametrize("path", ["/big/v1/chat/completions", "/llama/v1/audio/transcriptions"])
def test_the_model_of_the_path_decides(gateway: RunningGateway, path: str) -> None:
    """Whatever the body says, and however large it is."""
    reply = gateway.ask("POST", path, b"x" * 6_000_000, headers={"Content-Type": "audio/wav"})
    assert reply.json["id"].partition(".")[0] == path.split("/")[1]


def test_the_engine_gets_its_own_key_and_none_of_the_clients(
    gateway: RunningGateway, engines: Dict[str, Engine]
) -> None:
    sent = {"x-api-key": "sk-bob", "Cookie": "a=b", "Upgrade": "h2c", "Connection": "upgrade"}
    sent.update(dict.fromkeys(STEERING, "1"))
    body = {"messages": [], "model": "big"}
    assert (
        gateway.ask("POST", "/v1/messages?api_key=sk-bob", body, key="", headers=sent).status == 200
    )
    last = engines["big"].seen()[-1]
    assert last["headers"]["authorization"] == "Bearer sk-of-big"
    assert "sk-bob" not in str(last) and last["path"] == "/v1/messages"
    assert not {"x-api-key", "cookie", "upgrade", *STEERING} & set(last["headers"])


def test_one_start_of_a_prompt_goes_to_one_replica(gateway: RunningGateway) -> None:
    for letter in "abcd":
        said = {
            gateway.ask(
                "POST", "/v1/completions", {"prompt": letter * 2000, "model": "llama"}
            ).json["id"]
            for _ in range(5)
        }
        assert len(said) == 1, letter


# -- who

WHO: List[Tuple[str, int, str]] = [
    ("bob", 200, ""),
    ("late", 200, ""),
    ("", 401, "invalid_api_key"),
    ("nobody", 401, "invalid_api_key"),
    ("old", 401, "expired_api_key"),
    ("paused", 403, "suspended_api_key"),
]


@pytest.mark.parametrize("key, status, code", WHO)
def test_who_gets_in(gateway: RunningGateway, key: str, status: int, code: str) -> None:
    reply = gateway.chat("big", key)
    assert (reply.status, reply.code) == (status, code)


def test_a_right_is_to_a_model_by_any_of_its_names(gateway: RunningGateway) -> None:
    assert gateway.chat("org/Big", "alice").status == 200
    for name in ("llama", "chat", "nothing"):
        reply = gateway.chat(name, "alice")
        assert (reply.status, reply.code) == (404, "model_not_found"), name
    assert gateway.ask("POST", "/llama/v1/completions", {}, "alice").code == "model_not_found"


def test_a_key_sees_its_models_only(gateway: RunningGateway) -> None:
    def seen(key: str) -> List[str]:
        return [one["id"] for one in gateway.ask("GET", "/v1/models", key=key).json["data"]]

    assert seen("alice") == ["big", "org/Big"]
    assert seen("bob") == ["big", "org/Big", "llama", "chat"]
    for path in ("/v1/models/org/Big", "/v1/models/org%2FBig"):
        assert gateway.ask("GET", path, key="alice").json["id"] == "org/Big"
    assert gateway.ask("GET", "/v1/models/llama", key="alice").code == "model_not_found"
    assert gateway.ask("GET", "/v1/models/llama", key="bob").json["object"] == "model"


def test_only_accepted_requests_count_against_the_rate(gateway: RunningGateway) -> None:
    assert [gateway.chat("nothing", "slow").status for _ in range(8)] == [404] * 8
    assert [gateway.chat("big", "slow").status for _ in range(8)] == [200] * 6 + [429] * 2
    refused = gateway.chat("big", "slow")
    assert refused.code == "rate_limit_exceeded" and int(refused.headers["retry-after"]) == 11
    assert "6 requests a minute" in refused.json["error"]["message"]
    assert gateway.chat("big", "bob").status == 200


def test_bodies_that_come_late_do_not_pass_the_rate(gateway: RunningGateway) -> None:
    """All heads are there before the first body: each was within the rate when it was read."""
    body = json.dumps({"model": "big", "messages": []}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "Authorization: Bearer sk-patient\r\nConnection: close\r\n\r\n"
    with contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(9):
            connection = socket.create_connection(("127.0.0.1", gateway.port), 20)
            waiting.append(stack.enter_context(connection))
            connection.sendall(head.encode() + body[:5])
        deadline = time.monotonic() + 20
        while {use.name: use.running for use in key_uses(gateway.folder)}.get("patient") != 9:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        statuses = []
        for connection in waiting:
            connection.sendall(body[5:])
            statuses.append(int(connection.makefile("rb").readline().split()[1]))
    assert statuses == [200] * 6 + [429] * 3


def test_a_key_has_so_many_requests_at_a_time(gateway: RunningGateway) -> None:
    with futures.ThreadPoolExecutor(5) as pool:
        running = [
            pool.submit(gateway.chat, "big", "narrow", stream=True, max_tokens=100)
            for _ in range(5)
        ]
        replies = [one.result() for one in running]
    statuses = sorted(reply.status for reply in replies)
    assert statuses == [200, 200, 429, 429, 429]
    refused = next(reply for reply in replies if reply.status == 429)
    assert (refused.code, refused.headers["retry-after"]) == ("concurrency_limit_exceeded", "2")
    assert gateway.chat("big", "narrow").status == 200  # they have ended


# -- what does not get through

CHAT = b'{"model":"big","messages":[]}'
CLOSED: List[Tuple[str, str, Any, int, str]] = [
    *[
        ("POST", path, CHAT, 404, "unknown_url")
        for path in (
            "/invocations", "/pause", "/resume", "/sleep", "/wake_up", "/tokenize", "/detokenize", "/pooling",
            "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc", "/reset_prefix_cache",
            "/start_profile", "/v1/chat/completions/../../invocations", "/v1/%63hat/completions",
            "//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/", "/v1/chat/completions;x=1",
            "/V1/chat/completions", "/v1/chat%2fcompletions", "/big/v1/../invocations", "/big//v1/chat/completions",
            "/big/v1/invocations", "/big/pause", "/v1/v1/chat/completions/x", "/big%2fv1/chat/completions", "/",
        )
    ],
    ("POST", "/./v1/chat/completions", CHAT, 404, "model_not_found"),
    ("POST", "/%2e/v1/chat/completions", CHAT, 404, "model_not_found"),
    ("GET", "/metrics", None, 404, "unknown_url"),
    ("GET", "/version", None, 404, "unknown_url"),
    ("GET", "/docs", None, 404, "unknown_url"),
    ("GET", "/openapi.json", None, 404, "unknown_url"),
    ("GET", "/v1/chat/completions", None, 405, "method_not_allowed"),
    ("DELETE", "/v1/chat/completions", None, 405, "method_not_allowed"),
    ("PUT", "/v1/completions", CHAT, 405, "method_not_allowed"),
    ("PATCH", "/big/v1/completions", CHAT, 405, "method_not_allowed"),
    ("OPTIONS", "/v1/completions", None, 405, "method_not_allowed"),
    ("TRACE", "/v1/completions", None, 405, "method_not_allowed"),
    ("POST", "/v1/models", CHAT, 405, "method_not_allowed"),
    ("POST", "/v1/audio/transcriptions", CHAT, 400, "model_in_path_required"),
    ("POST", "/v1/completions", b"hello", 400, "missing_model"),
    ("POST", "/v1/completions", b"", 400, "missing_model"),
    ("POST", "/v1/completions", b'{"messages":[]}', 400, "missing_model"),
    ("POST", "/v1/completions", b'["model"]', 400, "missing_model"),
    ("POST", "/v1/completions", b'{"model":5}', 404, "model_not_found"),
    ("POST", "/v1/completions", b'{"model":""}', 404, "model_not_found"),
    ("POST", "/v1/completions", b'{"model":"be_big"}', 404, "model_not_found"),
    ("POST", "/v1/completions", b'{"model":"BIG"}', 404, "model_not_found"),
    ("POST", "/nothing/v1/completions", CHAT, 404, "model_not_found"),
]  # fmt: skip


@pytest.mark.parametrize(
    "method, path, body, status, code",
    CLOSED,
    ids=[f"{m} {p} {b!r}"[:70] for m, p, b, _, _ in CLOSED],
)
def test_what_is_closed(
    gateway: RunningGateway,
    engines: Dict[str, Engine],
    method: str,
    path: str,
    body: Any,
    status: int,
    code: str,
) -> None:
    before = sum(len(engine.seen()) for engine in engines.values())
    reply = gateway.ask(method, path, body)
    assert (reply.status, reply.code) == (status, code)
    assert reply.json["error"]["message"] and reply.headers["content-type"] == "application/json"
    assert sum(len(engine.seen()) for engine in engines.values()) == before


def test_a_body_that_names_two_models_gives_no_right_to_the_second(
    gateway: RunningGateway, engines: Dict[str, Engine]
) -> None:
    """HAProxy reads the first, Python the last: the request reaches the engine of the first alone, which knows no other."""
    before = len(engines["llama"].seen()) + len(engines["llama.2"].seen())
    first_allowed = b'{"model":"big","model":"llama"}'
    assert gateway.ask("POST", "/v1/completions", first_allowed, "alice").json["id"] == "big"
    assert engines["big"].seen()[-1]["model"] == "llama"
    for body in (b'{"model":"llama","model":"big"}', b'{"mode\\u006c":"big","model":"llama"}'):
        assert gateway.ask("POST", "/v1/completions", body, "alice").code == "model_not_found"
    assert len(engines["llama"].seen()) + len(engines["llama.2"].seen()) == before


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-alice\r\n"
INNER = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
SMUGGLED = {
    "two lengths": HEAD + b"Content-Length: 0\r\nContent-Length: 29\r\n\r\n" + INNER,
    "length and chunks": HEAD
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + INNER,
    "chunks, spelled oddly": HEAD
    + b"Content-Length: 4\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"
    + INNER,
    "a space before the colon": HEAD
    + b"Transfer-Encoding : chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    + INNER,
    "a folded header": HEAD
    + b"X: y\r\n Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n"
    + INNER,
    "a line feed in a header": HEAD
    + b"X: y\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n"
    + INNER,
    "the rest of a body": HEAD + b"Content-Length: 15\r\n\r\n" + b'{"model":"big"}' + INNER,
    "a chunk size that overflows": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n"
    + INNER,
    "an absolute address": b"POST http://x/invocations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-alice\r\nContent-Length: 15\r\n\r\n"
    + b'{"model":"big"}',
    "HTTP/0.9": b"GET /metrics\r\n\r\n",
    "HTTP/2 without TLS": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("form", SMUGGLED)
def test_nothing_is_smuggled(
    gateway: RunningGateway, engines: Dict[str, Engine], form: str
) -> None:
    gateway.raw(SMUGGLED[form], timeout=1)
    for engine in engines.values():
        assert {one["path"] for one in engine.seen()} <= {
            "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/v1/audio/transcriptions",
        }  # fmt: skip


CHAT_2 = (("content-length", str(len(CHAT))),)
# HTTP/2, which clients speak behind TLS, and here without: what differs from a request to
# /v1/completions with a right; and what is answered ("": it is no request).
SECOND_VERSION: List[Tuple[str, Dict[str, Text], Sequence[Tuple[Text, Text]], str]] = [
    ("a path of another kind", {":path": "/invocations"}, CHAT_2, "unknown_url"),
    ("all paths", {":path": "*"}, CHAT_2, "unknown_url"),
    ("no key", {"authorization": ""}, CHAT_2, "invalid_api_key"),
    ("another's model", {":path": "/llama/v1/completions"}, CHAT_2, "model_not_found"),
    ("a tunnel", {":method": "CONNECT"}, CHAT_2, ""),
    ("no slash", {":path": "v1/completions"}, CHAT_2, ""),
    ("a line in a path", {":path": "/v1/completions HTTP/1.1\r\nX: y\r\n\r\nPOST /pause"}, CHAT_2, ""),
    ("a line in a method", {":method": "POST /pause HTTP/1.1\r\nX: y\r\n\r\nPOST"}, CHAT_2, ""),
    ("a line in a value", {"x": "y\r\ntransfer-encoding: chunked"}, CHAT_2, ""),
    ("a line in a name", {"x: y\r\nz": "y"}, CHAT_2, ""),
    ("NUL in a path", {":path": "/v1/completions\0"}, CHAT_2, ""),
    ("chunks", {"transfer-encoding": "chunked"}, (), ""),
    ("two lengths", {}, (*CHAT_2, ("content-length", "0")), ""),
    ("a length too small", {}, (("content-length", "5"),), ""),
    ("two paths", {}, (*CHAT_2, (":path", "/pause")), ""),
    ("an upload of unknown size", {":path": "/big/v1/audio/transcriptions"}, (), "length_required"),
    ("a body of unknown size", {":path": "/big/v1/completions"}, (), "length_required"),
]  # fmt: skip


@pytest.mark.parametrize(
    "changed, more, code",
    [row[1:] for row in SECOND_VERSION],
    ids=[row[0] for row in SECOND_VERSION],
)
def test_http_2_opens_nothing_that_http_1_does_not(
    gateway: RunningGateway,
    engines: Dict[str, Engine],
    changed: Dict[str, Text],
    more: Sequence[Tuple[Text, Text]],
    code: str,
) -> None:
    headers: Dict[str, Text] = {
        ":method": "POST",
        ":scheme": "http",
        ":authority": "x",
        ":path": "/v1/completions",
        "authorization": "Bearer sk-alice",
        **changed,
    }
    before = sum(len(engine.seen()) for engine in engines.values())
    answer = h2.ask(gateway.port, [*headers.items(), *more], CHAT)
    assert answer.refused is not bool(code)
    if code:
        assert json.loads(answer.body)["error"]["code"] == code
    assert sum(len(engine.seen()) for engine in engines.values()) == before


@pytest.mark.parametrize(
    "path, more", [("/v1/completions", ()), ("/big/v1/completions", CHAT_2)], ids=["body", "path"]
)
def test_http_2_is_answered(
    gateway: RunningGateway, path: str, more: Sequence[Tuple[Text, Text]]
) -> None:
    headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", path)]
    answer = h2.ask(gateway.port, [*headers, ("authorization", "Bearer sk-alice"), *more], CHAT)
    assert json.loads(answer.body)["id"] == "big"


def test_what_is_too_large(gateway: RunningGateway) -> None:
    """Messages before the model, as OpenAI's client sends them."""
    limit = body_limit(gateway.gateway)
    start, end = b'{"messages":"', b'","model":"big"}'
    fits = start + b"x" * (limit - len(start) - len(end)) + end
    assert gateway.ask("POST", "/v1/completions", fits).status == 200
    assert gateway.ask("POST", "/v1/completions", fits[:-1] + b" }").code == "request_too_large"
    pieces = [fits[at : at + 1000] for at in range(0, len(fits), 1000)]
    assert gateway.ask("POST", "/v1/completions", chunks=pieces).status == 200
    for more in (b" ", b" " * 70_000, b" " * 5_000_000):
        reply = gateway.ask("POST", "/v1/completions", chunks=[*pieces, more])
        assert (reply.status, reply.code) == (413, "request_too_large"), len(more)
    reply = gateway.ask("POST", "/big/v1/completions", chunks=[b"x" * 1000])
    assert (reply.status, reply.code) == (411, "length_required")
    reply = gateway.ask("POST", "/big/v1/completions", headers={"Content-Length": "70000000"})
    assert (reply.status, reply.code) == (413, "request_too_large")
    assert gateway.ask("GET", "/v1/models", headers={"X": "y" * 31_000}).status == 431


def test_the_log_has_no_keys_and_no_prompts(gateway: RunningGateway) -> None:
    body = {"messages": [{"role": "user", "content": "my secret"}], "model": "secret"}
    gateway.ask("POST", "/v1/chat/completions?key=sk-bob", body, "nobody-secret")
    gateway.ask("POST", "/v1/secret", body, headers={"User-Agent": "secret"})
    gateway.raw(b"secret\r\n\r\n")
    gateway.chat("llama", "alice")
    gateway.chat("big", "alice")
    last = gateway.last_of("be_big")
    assert (last["key"], last["status"]) == ("alice", 200)
    assert (last["route"], last["server"]) == ("/v1/chat/completions", "big")
    text = (gateway.folder / "log").read_text()
    assert "secret" not in text and "sk-" not in text


def test_metrics_are_not_for_clients(gateway: RunningGateway) -> None:
    import urllib.request

    with urllib.request.urlopen(
        f"http://{gateway.gateway.metrics_bind}/metrics", timeout=5
    ) as response:
        text = response.read().decode()
    assert 'haproxy_server_status{proxy="be_big",server="big",state="UP"} 1' in text


# -- while it changes, and when an engine fails


class Failing:
    """A gateway of its own before engines that a test may kill."""

    def __init__(self, component: str, count: int, standby: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hfship-"))  # short, for the path of a socket
        self.engines = [start_engine(free_port(), f"e{number}", 0.03) for number in range(count)]
        replicas = [
            Replica(one.name, f"127.0.0.1:{one.port}", standby and number > 0)
            for number, one in enumerate(self.engines)
        ]
        models = [GatewayModel("m", ("m",), tuple(replicas))]
        self.gateway = make_gateway(component, self.folder, models, [key_named("bob")], free_port())

    def __enter__(self) -> Failing:
        self.gateway.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gateway.end()
        for engine in self.engines:
            engine.go_on()
            engine.kill()
        shutil.rmtree(self.folder)

    def load(self, count: int, tokens: int) -> subprocess.Popen[str]:
        """Streams, and small requests until its stdin is closed, as `fared` does."""
        words = [self.gateway.port, "m", count, tokens, "-"]
        argv = [sys.executable, str(LOAD), *map(str, words)]
        env = {**os.environ, "API_KEY": "sk-bob"}
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, env=env, stdin=pipe, stdout=pipe, text=True)

    def await_requests(self, count: int, *names: str) -> None:
        """Wait until HAProxy, as it runs now, has given these engines so many together."""
        deadline = time.monotonic() + 60
        while self._given(names) < count:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _given(self, names: Sequence[str]) -> int:
        return sum(one.requests for one in server_states(self.folder) if one.name in names)


@pytest.mark.parametrize("component", list(VERSIONS))
def test_no_stream_is_lost_by_ten_reloads_and_changes_of_keys(component: str) -> None:
    with Failing(component, 2, False) as failing:
        load = failing.load(200, 200)
        failing.await_requests(200, "e0", "e1")
        for number in range(10):
            time.sleep(0.4)
            keys = [key_named("bob"), key_named(f"k{number}")]
            failing.gateway.keys = keys
            failing.gateway.write(f"g{number}")
            replace_maps(failing.folder, key_maps(failing.gateway.gateway.models, keys))
            failing.gateway.reload()
            while generation(failing.folder) != f"g{number}":
                time.sleep(0.05)
        failing.await_requests(25, "e0", "e1")
        outcome = fared(load)
        assert generation(failing.folder) == "g9"
    assert outcome["streams"]["whole"] == 200, outcome
    assert outcome["small"]["whole"] == outcome["small"]["sent"] > 20, outcome


@pytest.mark.parametrize("component", list(VERSIONS))
def test_a_dead_engine_costs_no_new_request(component: str) -> None:
    with Failing(component, 2, True) as failing:
        load = failing.load(0, 0)
        failing.await_requests(20, "e0")
        failing.engines[0].kill()
        killed_at = time.perf_counter()
        failing.await_requests(20, "e1")
        outcome = fared(load)["small"]
    # What the engine had taken when it died ends with an error, as no prompt runs twice.
    assert outcome["last_broken_at"] < killed_at and outcome["whole"] >= 38, outcome
    assert set(outcome["by"]) == {"e0", "e1"}, outcome
    assert outcome["slowest_s"] < 10, outcome  # 1 s of it is HAProxy's before it tries again


@pytest.mark.parametrize("component", list(VERSIONS))
def test_no_prompt_runs_twice(component: str) -> None:
    """An engine that dies with a prompt in its hands: its client hears 502, and nobody else gets it."""
    with Failing(component, 2, False) as failing:
        for engine in failing.engines:
            engine.stop()
        with futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(failing.gateway.chat, "m", marker="once")
            time.sleep(0.7)
            first = next(one for one in failing.engines if connections_to(one.port))
            other = next(one for one in failing.engines if one is not first)
            first.kill()
            other.go_on()
            reply = asked.result()
        assert (reply.status, reply.code) == (502, "bad_gateway")
        assert other.seen() == []


def connections_to(port: int) -> bool:
    """Whether somebody is connected there, but for checks: with bytes that were not read."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and int(fields[4].partition(":")[2], 16) > 150:
            return True
    return False


@pytest.mark.parametrize("component", list(VERSIONS))
def test_a_hung_engine_is_left_in_time_and_its_clients_hear_of_it(component: str) -> None:
    """What the watchdog does: maintenance, an error for those who wait, a restart, back."""
    with Failing(component, 2, True) as failing:
        os.chmod(failing.folder, 0o700)
        (failing.folder / "gateway.json").write_text(gateway_text(failing.gateway.gateway))
        with futures.ThreadPoolExecutor(4) as pool:
            failing.engines[0].stop()
            waiting = [pool.submit(failing.gateway.chat, "m") for _ in range(3)]
            time.sleep(0.5)
            assert take_out(failing.folder, "e0")
            for one in waiting:  # an error, or from 3.x on a connection that is closed
                with contextlib.suppress(http.client.RemoteDisconnected):
                    assert one.result(5).status in (502, 503)
        assert failing.gateway.chat("m").json["id"] == "e1"
        failing.engines[0].go_on()
        assert not take_out(failing.folder, "nobody")
        bring_back(failing.folder, "e0")
        for _ in range(100):
            if failing.gateway.chat("m").json["id"] == "e0":
                break
            time.sleep(0.1)
        assert failing.gateway.chat("m").json["id"] == "e0"


@pytest.mark.parametrize("component", list(VERSIONS))
def test_a_hung_engine_that_is_ended_leaves_an_error_to_its_clients(component: str) -> None:
    """What a repair does: no new requests, the end of the engine, and then of what waits still."""
    with Failing(component, 2, True) as failing:
        (failing.folder / "gateway.json").write_text(gateway_text(failing.gateway.gateway))
        with futures.ThreadPoolExecutor(4) as pool:
            failing.engines[0].stop()
            waiting = [pool.submit(failing.gateway.chat, "m") for _ in range(3)]
            time.sleep(0.5)
            assert send_elsewhere(failing.folder, "e0")
            failing.engines[0].kill()
            replies = [one.result(10) for one in waiting]
            assert end_requests(failing.folder, "e0")
        assert [(one.status, one.code) for one in replies] == [(502, "bad_gateway")] * 3
        assert failing.gateway.chat("m").json["id"] == "e1"
        assert not end_requests(failing.folder, "nobody")


@pytest.mark.parametrize("component", list(VERSIONS))
def test_a_replica_that_comes_back_before_it_listens_costs_no_request(component: str) -> None:
    """HAProxy takes it as up until its first check, as when docker gives it an address again."""
    with Failing(component, 2, False) as failing:
        (failing.folder / "gateway.json").write_text(gateway_text(failing.gateway.gateway))
        assert send_elsewhere(failing.folder, "e0")
        failing.engines[0].kill()
        bring_back(failing.folder, "e0")
        with futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(failing.gateway.chat, "m") for _ in range(16)]
            replies = [one.result(10) for one in asked]
        assert [one.json.get("id") for one in replies] == ["e1"] * 16


@pytest.mark.parametrize("component", list(VERSIONS))
def test_without_a_watchdog_a_silent_engine_is_left_within_ten_seconds(component: str) -> None:
    with Failing(component, 2, True) as failing:
        failing.engines[0].stop()
        started = time.monotonic()
        states: Dict[str, str] = {}
        while time.monotonic() < started + 10 and states.get("e0") != "DOWN":
            time.sleep(0.2)
            states = {one.name: one.state for one in server_states(failing.folder)}
        assert states["e0"] == "DOWN"
        assert failing.gateway.chat("m").json["id"] == "e1"


@pytest.mark.parametrize("component", list(VERSIONS))
def test_without_any_replica_clients_hear_when_to_come_back(component: str) -> None:
    with Failing(component, 1, False) as failing:
        failing.engines[0].kill()
        reply = failing.gateway.chat("m")
        assert (reply.status, reply.code) == (503, "model_unavailable")
        assert reply.headers["retry-after"] == "10"


# -- the client that everybody has

CLIENT = """
import os, sys, openai
port = sys.argv[1]
def client(key, path=""):
    return openai.OpenAI(api_key="sk-" + key, base_url=f"http://127.0.0.1:{port}{path}/v1", max_retries=0)
bob = client("bob")
hello = [{"role": "user", "content": "hello"}]
assert [one.id for one in bob.models.list()] == ["big", "org/Big", "llama", "chat"]
assert bob.models.retrieve("org/Big").id == "org/Big"
assert bob.chat.completions.create(model="big", messages=hello).choices[0].message.content == "hi"
words = [piece.choices[0].delta.content for piece in bob.chat.completions.create(model="chat", messages=hello, stream=True, max_tokens=7)]
assert words == [f"t{n} " for n in range(7)], words
tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"model": {"type": "string"}}}}}
called = bob.chat.completions.create(model="big", messages=hello, tools=[tool]).choices[0].message.tool_calls
assert called[0].function.name == "weather"
assert bob.embeddings.create(model="llama", input="x", encoding_format="float").data[0].embedding == [0.5, 0.25]
assert client("bob", "/big").chat.completions.create(model="big", messages=hello).choices
def refusal(kind, work):
    try:
        work()
    except kind as exc:
        return exc.status_code, exc.code
    raise SystemExit(f"no {kind}")
assert refusal(openai.AuthenticationError, lambda: client("nobody").models.list()) == (401, "invalid_api_key")
assert refusal(openai.PermissionDeniedError, lambda: client("paused").models.list()) == (403, "suspended_api_key")
assert refusal(openai.NotFoundError, lambda: client("alice").chat.completions.create(model="llama", messages=hello)) == (404, "model_not_found")
large = [{"role": "user", "content": "x" * 5_000_000}]
assert refusal(openai.APIStatusError, lambda: bob.chat.completions.create(model="big", messages=large)) == (413, "request_too_large")
for _ in range(9):
    try:
        client("slow").chat.completions.create(model="big", messages=hello)
    except openai.RateLimitError as exc:
        assert exc.code == "rate_limit_exceeded" and exc.response.headers["retry-after"] == "11"
        break
else:
    raise SystemExit("no limit")
"""


def test_openais_own_client_works_and_understands_refusals(gateway: RunningGateway) -> None:
    python = components.require("openai")
    done = subprocess.run(
        [str(python), "-c", CLIENT, str(gateway.port)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
