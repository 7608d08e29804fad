"""Asking an engine: a small server plays one of each kind."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from hfship.serve import status as status_room
from hfship.serve.deployments import Deployment
from hfship.serve.engine import (
    Heartbeat,
    ask_model,
    likely_of,
    missing_names,
    parse_heartbeat,
    read_health,
    read_heartbeat,
    wait_until_idle,
)
from hfship.serve.messages import Answer, Container
from hfship.serve.status import ask_and_watch, deployment_state, read_vitals
from hfship.serve.terms import Plan

KEY = "sk-1"
MADE: Dict[str, Any] = {
    "/v1/chat/completions": {"choices": [{"message": {}}]},
    "/v1/completions": {"choices": [{"text": "a"}]},
    "/v1/embeddings": {"data": [{"embedding": [1.0]}]},
    "/v1/rerank": {"results": [{"index": 0}]},
    "/rerank": {"results": [{"index": 0}]},
    "/score": {"data": [{"score": 1.0}]},
    "/classify": {"data": [{"label": "x"}]},
    "/pooling": {"data": [{"data": [1.0]}]},
    "/v1/audio/transcriptions": {"text": ""},
}


class Engine:
    """A server that has some routes; `lists` them in /openapi.json or does not."""

    def __init__(self, routes: List[str], lists: bool = True, models: str = "m") -> None:
        self.routes, self.lists, self.models = routes, lists, models
        self.health = 200
        self.refuses: Dict[str, Tuple[int, str]] = {}  # route -> status, text
        self.delay_s = 0.0  # of a real answer
        self.steps: Callable[[], str] = lambda: ""
        self.asked: List[str] = []
        self.sent: List[Tuple[str, bytes]] = []  # Content-Type and body of each that was asked
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def say(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self) -> None:
                self.say(*engine.get(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                engine.asked.append(self.path)
                engine.sent.append((self.headers["Content-Type"], body))
                is_ours = self.headers["Authorization"] == f"Bearer {KEY}"
                status, text = engine.post(self.path) if is_ours else (401, "Unauthorized")
                try:
                    self.say(status, text)
                except OSError:
                    pass  # who asked has gone

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def get(self, path: str) -> Tuple[int, str]:
        if path == "/health":
            return self.health, ""
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": self.models}]})
        if path == "/metrics" and self.steps():
            return 200, self.steps()
        if path == "/openapi.json" and self.lists:
            return 200, json.dumps({"paths": {route: {"post": {}} for route in self.routes}})
        return 404, ""

    def post(self, path: str) -> Tuple[int, str]:
        time.sleep(self.delay_s)
        if path in self.refuses:
            return self.refuses[path]
        if path in self.routes and path in MADE:
            return 200, json.dumps(MADE[path])
        return 404, '{"detail":"Not Found"}'

    def deployment(self, folder: Path, *tasks: str, key: str = KEY) -> Deployment:
        plan = Plan(name="m", port=self.server.server_port, served_names=("m",), tasks=tasks)
        return Deployment(folder, plan, key)


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    made: List[Engine] = []

    def make(*args: Any, **options: Any) -> Engine:
        made.append(Engine(*args, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.server.shutdown()
        engine.server.server_close()


# Routes, whether they are listed, tasks that are likely: the task that is proven.
PROVEN = [
    (["/v1/chat/completions", "/v1/completions"], True, ("chat", "completion"), "chat"),
    (["/v1/completions"], False, ("chat", "completion"), "completion"),
    (["/v1/embeddings", "/pooling"], True, ("embedding",), "embedding"),
    (["/v1/embeddings", "/pooling"], True, ("chat", "completion"), "embedding"),
    (["/rerank", "/classify"], False, ("rerank", "score"), "rerank"),
    (["/classify", "/pooling"], True, ("rerank", "score", "classify"), "classify"),
    (["/pooling"], True, ("reward", "classify"), "reward"),
    (["/v1/audio/transcriptions"], True, ("transcription", "chat"), "transcription"),
    (["/score"], True, (), "score"),
    ([], True, ("chat",), "unknown"),
    (["/of/its/own"], True, (), "unknown"),
]


@pytest.mark.parametrize("routes, lists, tasks, proven", PROVEN)
def test_a_model_is_asked_what_it_is_for(
    engines: Any, tmp_path: Path, routes: List[str], lists: bool, tasks: Any, proven: str
) -> None:
    answer = ask_model(engines(routes, lists).deployment(tmp_path, *tasks), 5)
    assert (answer.works, answer.task) == (True, proven)
    assert ("of no task that hfship knows" in answer.note) == (proven == "unknown")


def test_what_was_proven_before_is_asked_first(engines: Any, tmp_path: Path) -> None:
    engine = engines(["/v1/rerank", "/classify"])
    ask_model(engine.deployment(tmp_path, "rerank"), 5, "classify")
    assert engine.asked == ["/classify"]


def test_a_chat_that_is_refused_is_said(engines: Any, tmp_path: Path) -> None:
    engine = engines(["/v1/chat/completions", "/v1/completions"])
    engine.refuses["/v1/chat/completions"] = (400, "no chat template")
    answer = ask_model(engine.deployment(tmp_path, "chat", "completion"), 5)
    assert answer.works and answer.task == "completion" and "no chat template" in answer.note


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_what_is_no_refusal_ends_the_asking(engines: Any, tmp_path: Path, status: int) -> None:
    engine = engines(["/v1/chat/completions", "/v1/completions"])
    engine.refuses["/v1/chat/completions"] = (status, "no")
    answer = ask_model(engine.deployment(tmp_path, "chat", "completion"), 5)
    assert (answer.status, answer.works) == (status, False) and len(engine.asked) == 1


def test_another_model_on_our_port_is_not_ours(engines: Any, tmp_path: Path) -> None:
    engine = engines([], models="theirs")
    assert not ask_model(engine.deployment(tmp_path, "chat"), 5).works


def test_a_wrong_key_is_no_proof(engines: Any, tmp_path: Path) -> None:
    engine = engines(["/v1/completions"])
    assert ask_model(engine.deployment(tmp_path, "completion", key="sk-2"), 5).status == 401


def test_what_is_sent_is_json_and_what_is_answered_has_its_route_and_time(
    engines: Any, tmp_path: Path
) -> None:
    engine = engines(["/v1/completions"])
    answer = ask_model(engine.deployment(tmp_path, "completion"), 5)
    ((kind, body),) = engine.sent
    assert kind == "application/json" and json.loads(body)["model"] == "m"
    assert answer.route == "/v1/completions" and 0 <= answer.seconds < 60


@pytest.mark.parametrize(
    "tasks, embeds, likely",
    [
        (("rerank", "score"), True, ["rerank", "score"]),
        ((), True, ["embedding"]),
        ((), False, []),
    ],
)
def test_what_a_plan_is_likely_for(tasks: Any, embeds: bool, likely: List[str]) -> None:
    assert likely_of(Plan(name="m", tasks=tasks, embeds=embeds)) == likely


def test_the_first_refusal_is_what_is_told_of_a_model_of_a_known_task(
    engines: Any, tmp_path: Path
) -> None:
    engine = engines(["/v1/chat/completions", "/v1/completions"])
    engine.refuses = {"/v1/chat/completions": (400, "no chat"), "/v1/completions": (400, "no more")}
    answer = ask_model(engine.deployment(tmp_path, "chat", "completion"), 5)
    assert (answer.works, answer.task, answer.text) == (False, "chat", "no chat")
    assert not answer.made


def test_a_model_of_no_task_that_is_asked_is_there_by_health_and_its_name(
    engines: Any, tmp_path: Path
) -> None:
    engine = engines(["/v1/completions"])
    engine.refuses["/v1/completions"] = (400, "not for this model")
    answer = ask_model(engine.deployment(tmp_path), 5)
    assert (answer.works, answer.task, answer.route) == (True, "unknown", "/v1/models")
    engine.models = "theirs"
    answer = ask_model(engine.deployment(tmp_path), 5)
    assert (answer.works, answer.status, answer.text) == (False, 400, "not for this model")
    engine.health = 503
    answer = ask_model(engine.deployment(tmp_path), 5)
    assert (answer.works, answer.status, answer.task) == (False, 503, "unknown")


def test_a_chat_that_nobody_expects_is_refused_without_a_word(engines: Any, tmp_path: Path) -> None:
    engine = engines(["/v1/chat/completions", "/v1/completions"])
    engine.refuses["/v1/chat/completions"] = (400, "no chat template")
    answer = ask_model(engine.deployment(tmp_path, "completion"), 5)
    assert answer.works and not answer.note


def test_an_api_that_lists_nothing_lacks_no_name(engines: Any, tmp_path: Path) -> None:
    engine = engines([])
    engine.get = lambda _: (200, '{"data": []}')
    assert missing_names(engine.deployment(tmp_path)) == ()
    engine.get = lambda _: (401, '{"data": [{"id": "theirs"}]}')
    assert missing_names(engine.deployment(tmp_path)) == ()


def test_no_address_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.serve.engine.api_address", lambda _: ("", 0))
    answer = read_health(Plan(name="m", network="n"))
    assert (answer.status, answer.text) == (0, "its container has no address")


def test_nobody_there_is_no_answer(tmp_path: Path) -> None:
    answer = read_health(Plan(name="m", port=1))
    assert (answer.status, answer.silent) == (0, False)


# -- the heart


def beats(steps: float, running: float = 1) -> str:
    return (
        f'vllm:iteration_tokens_total_count{{engine="0",model_name="m"}} {steps}\n'
        f'vllm:iteration_tokens_total_sum{{engine="0",model_name="m"}} {10 * steps}\n'
        f'vllm:num_requests_running{{engine="0",model_name="m"}} {running}\n'
    )


def test_the_heart_of_several_engines_is_one() -> None:
    two = beats(3) + beats(4).replace('engine="0"', 'engine="1"')
    assert parse_heartbeat(two) == Heartbeat(7.0, 70.0, 2.0)


@pytest.mark.parametrize("text", ["", "# HELP", "vllm:num_requests_running 1.0\n", "\x00" * 99])
def test_what_has_no_counter_has_no_heart(text: str) -> None:
    assert parse_heartbeat(text) is None


def test_the_heart_tells_requests_tokens_and_the_fullest_cache() -> None:
    text = beats(3, running=2)
    for engine, cache in ((0, 0.25), (1, 0.75)):
        label = f'{{engine="{engine}"}}'
        text += f"vllm:num_requests_waiting{label} 4\n"
        text += f"vllm:generation_tokens_total{label} 100\n"
        text += f"vllm:kv_cache_usage_perc{label} {cache}\n"
    assert parse_heartbeat(text) == Heartbeat(3, 30, running=2, waiting=8, made=200, kv=0.75)
    older = beats(3) + "vllm:gpu_cache_usage_perc{} 0.5\n"
    assert parse_heartbeat(older) == Heartbeat(3, 30, running=1, kv=0.5)


# What /metrics says, poll by poll (running, waiting; None: nothing): whether the engine is idle, and
# after how many polls that is known.
IDLE = {
    "twice": ([(0, 0), (0, 0)], True, 2),
    "runs at first": ([(1, 0), (0, 0), (0, 0)], True, 3),
    "waits at first": ([(0, 2), (0, 0), (0, 0)], True, 3),
    "as many run as wait": ([(2, 2), (0, 0), (0, 0)], True, 3),
    "one comes in between": ([(0, 0), (1, 0), (0, 0), (0, 0)], True, 4),
    "tells nothing": ([None], True, 1),
    "never": ([(1, 0)] * 6, False, 5),
}


@pytest.mark.parametrize("case", IDLE)
def test_idle_is_who_has_no_request_twice_in_a_row(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls, is_idle, asked = IDLE[case]
    clock = [1000.0]
    left = list(polls)

    def read(plan: Plan) -> Any:
        beat = left.pop(0)
        return beat and Heartbeat(1, 1, running=beat[0], waiting=beat[1])

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("hfship.serve.engine.read_heartbeat", read)
    monkeypatch.setattr("hfship.serve.engine.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("hfship.serve.engine.time.sleep", sleep)
    assert wait_until_idle(Plan(name="m"), patience_s=4.0) == is_idle
    assert len(polls) - len(left) == asked


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tenths of seconds for seconds."""
    monkeypatch.setattr(status_room, "STATUS_TIMEOUT_S", 0.3)
    monkeypatch.setattr(status_room, "LOOK_EVERY_S", 0.1)


RUNNING = Container("1", "running", started_at=1.0)
# Does the engine step? Has it a counter? How long an answer takes: the state.
HEARTS = [
    ("flat", 9.0, "hung"),
    ("moving", 9.0, "degraded"),
    ("none", 9.0, "degraded"),  # --disable-log-stats: nothing is proven
    ("flat", 0.0, "healthy"),
    ("flat", 0.5, "healthy"),  # slow, but it answers
]


@pytest.mark.parametrize("heart, delay_s, state", HEARTS)
def test_hung_is_what_neither_answers_nor_steps(
    engines: Any, tmp_path: Path, quick: None, heart: str, delay_s: float, state: str
) -> None:
    engine = engines(["/v1/completions"])
    engine.delay_s = delay_s
    count = iter(range(1000))
    engine.steps = {
        "flat": lambda: beats(5),
        "moving": lambda: beats(next(count)),
        "none": lambda: "",
    }[heart]
    deployment = engine.deployment(tmp_path, "completion")
    vitals = read_vitals(deployment, RUNNING, hang_s=1.0)
    assert deployment_state(RUNNING, vitals, 1.0) == state, vitals


def test_a_process_that_stands_still_is_hung(tmp_path: Path, quick: None) -> None:
    """As after SIGSTOP: the kernel takes the connection, nobody answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        plan = Plan(name="m", port=listener.getsockname()[1], served_names=("m",))
        mute = Answer(0, "", silent=True)
        plan = replace(plan, tasks=("completion",))
        answer, still_s = ask_and_watch(Deployment(tmp_path, plan, KEY), 0.5, mute)
        assert answer.silent and still_s >= 0.5
        assert read_heartbeat(plan, 0.1) is None
        answer = read_health(plan, 0.1)
        assert answer.silent and 0.1 <= answer.seconds < 60


def test_of_another_operators_deployment_nothing_is_asked(engines: Any, tmp_path: Path) -> None:
    engine = engines(["/v1/completions"])
    theirs = replace(engine.deployment(tmp_path, "completion"), key="", owner="ann")
    vitals = read_vitals(theirs, RUNNING, 1.0)
    assert deployment_state(RUNNING, vitals) == "healthy" and not engine.asked
    assert "only ann has its key" in vitals.answer.note


def test_a_dead_engine_is_degraded(engines: Any, tmp_path: Path) -> None:
    engine = engines(["/v1/completions"])
    engine.health = 503
    vitals = read_vitals(engine.deployment(tmp_path, "completion"), RUNNING, 1.0)
    assert deployment_state(RUNNING, vitals) == "degraded" and not engine.asked


def test_names_that_the_api_lacks_are_told(engines: Any, tmp_path: Path) -> None:
    """The plan has a name that the container, which is older, does not serve."""
    deployment = engines(["/v1/completions"]).deployment(tmp_path, "completion")
    assert read_vitals(deployment, RUNNING, 1.0).lacks == ()
    renamed = replace(deployment, plan=replace(deployment.plan, served_names=("m", "org/m")))
    vitals = read_vitals(renamed, RUNNING, 1.0)
    assert vitals.lacks == ("org/m",)
    assert "does not know the name org/m" in "; ".join(
        status_room.troubles_of(renamed, RUNNING, vitals, "healthy")
    )
