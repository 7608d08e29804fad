# SPDX-License-Identifier: Apache-2.0
"""The models of one `serve` planned together: what is asked, and where it is told."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any, Dict, FrozenSet, List

import pytest

from hfship.base.errors import HostError, UsageError
from hfship.base.values import replace
from hfship.commands import serve_host
from hfship.commands.context import Context
from hfship.serve.survey import Purpose
from hfship.serve.terms import Gpu, Host, Plan

HOST = Host((Gpu(0, "GPU-1", "H200", 143771),))


def context_of(**args: Any) -> Any:
    given = {"plan": False, "json": False, "assume_gpus": "", **args}
    said: List[str] = []
    reporter: Any = SimpleNamespace(
        info=lambda text: said.append(f"info {text}"),
        result=lambda text: said.append(f"result {text}"),
        said=said,
    )
    settings: Any = None
    return Context(argparse.Namespace(**given), settings, reporter)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "info TABLE"),
        ({"plan": True}, "result TABLE"),
        ({"plan": True, "json": True}, "info TABLE"),
        ({"json": True}, "info TABLE"),
    ],
)
def test_the_table_is_a_result_of_a_plan_and_news_before_a_start(
    args: Dict[str, Any], said: str
) -> None:
    context = context_of(**args)
    together: Any = SimpleNamespace(text=lambda: "TABLE")
    serve_host.tell(context, together)
    assert context.reporter.said == [said]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with the deployments a and b, of which b runs; notes what was placed."""
    made = SimpleNamespace(answers=True, fails=False, plans={"x": 1}, placed=[], asked=[])

    def read_request(context: Any, word: str) -> Any:
        assert context.args.plan is True
        made.asked.append(word)
        if word == "broken":
            raise UsageError("broken", "", "")
        return SimpleNamespace(name=word)

    def read_machine(*_: Any) -> Any:
        if made.fails:
            raise HostError("no nvidia-smi", "", "")
        return SimpleNamespace(host=HOST, docker_answers=made.answers)

    def place(wishes: Any, hosts: Any, facts: Any, *_: Any) -> Any:
        made.placed.append(([wish.name for wish in wishes], facts[""]))
        return SimpleNamespace(plans=made.plans)

    def running(before: Dict[str, Plan]) -> FrozenSet[str]:
        return frozenset(before) & {"b"}

    patched: Dict[str, Any] = {
        "read_request": read_request,
        "read_machine": read_machine,
        "place": place,
        "running_among": running,
        "readable_deployments": lambda _: [
            SimpleNamespace(plan=Plan(name=name)) for name in ("a", "b")
        ],
        "place_of": lambda _, name: SimpleNamespace(first=f"{name}-1") if name == "n" else None,
        "Wish": lambda request, name: SimpleNamespace(request=request, name=name),
    }
    for name, value in patched.items():
        monkeypatch.setattr(f"hfship.commands.serve_host.{name}", value)
    return made


def together(*words: str, **args: Any) -> Any:
    context = context_of(**args)
    return serve_host.together_of([(context, word) for word in words])


def test_all_models_that_can_be_read_are_placed_on_this_machine(machine: Any) -> None:
    assert together("m", "broken", "n").plans == {"x": 1}
    assert machine.asked == ["m", "broken", "n"]
    ((names, facts),) = machine.placed
    assert names == ["m", "n-1"]
    assert facts.offer == HOST and [plan.name for plan in facts.plans] == ["a", "b"]
    assert facts.running == frozenset({"b"})


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["m"], {}),
        (["m", "broken"], {}),
        (["m", "n"], {"fails": True}),
        (["m", "n"], {"plans": {}}),
    ],
)
def test_one_model_or_no_machine_needs_no_table(
    words: List[str], changes: Dict[str, Any], machine: Any
) -> None:
    vars(machine).update(changes)
    assert together(*words) is None


def test_a_docker_that_is_silent_runs_nothing(machine: Any) -> None:
    machine.answers = False
    together("m", "n")
    assert machine.placed[0][1].running == frozenset()


def test_on_a_machine_that_is_assumed_nothing_runs(machine: Any) -> None:
    together("m", "n", assume_gpus="2xH100")
    facts = machine.placed[0][1]
    assert len(facts.offer.gpus) == 2 and facts.plans == () and facts.running == frozenset()
    assert replace(facts.offer, gpus=HOST.gpus) == HOST


# -- the runs and pairs of one command


@pytest.mark.parametrize("there", [True, False])
def test_all_runs_know_the_plans_of_all(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be planned they are as they were."""
    table: Any = SimpleNamespace(text=lambda: "TABLE") if there else None
    asked: List[Any] = []

    def together_of(words: Any) -> Any:
        asked.append([word for _, word in words])
        return table

    monkeypatch.setattr(serve_host, "together_of", together_of)
    runs = {"a": context_of(names=["a", "b"]), "c": context_of(names=["c"])}
    found = serve_host.planned_together(runs)
    pairs = [(runs["a"], "x"), (runs["c"], "y")]
    both = serve_host.pairs_together(pairs)
    assert asked == [["a", "b", "c"], ["x", "y"]]
    assert [run.together for run in found.values()] == [table, table] and list(found) == ["a", "c"]
    assert [(run.together, word) for run, word in both] == [(table, "x"), (table, "y")]
    said = ["info TABLE", "info TABLE"] if there else []
    assert runs["a"].reporter.said == said and runs["c"].reporter.said == []
    if not there:
        assert found == runs and both == pairs


def test_each_is_decided_for_this_machine_without_a_word(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def place(wishes: Any, hosts: Any, facts: Any, plan_of: Any, in_use: Any) -> Any:
        [here] = hosts
        assert here.local and list(facts) == [here.name]
        request = SimpleNamespace(options="options")
        assert in_use(request, 8001) == ("ports", "options", 8001)
        *words, quiet = plan_of(request, "left", None)
        quiet.info("said to nobody")
        assert words == [request, "left", None]
        return SimpleNamespace(plans={"x": 1})

    def read_request(context: Any, word: str) -> Any:
        context.reporter.info("said to nobody")
        return SimpleNamespace(name=word)

    def read_machine(image: str, purpose: Purpose, quiet: Any) -> Any:
        assert (image, purpose) == ("", Purpose.SHOW)
        quiet.info("said to nobody")
        return SimpleNamespace(host=HOST, docker_answers=True)

    monkeypatch.setattr(serve_host, "place", place)
    monkeypatch.setattr(serve_host, "read_request", read_request)
    monkeypatch.setattr(serve_host, "read_machine", read_machine)
    monkeypatch.setattr(serve_host, "ports_in_use", lambda *words: ("ports", *words))
    monkeypatch.setattr(serve_host, "decide", lambda *words: words)
    context = context_of()
    assert serve_host.together_of([(context, "m"), (context, "n")]) is not None
    assert "".join(capsys.readouterr()) == "" and context.reporter.said == []


def test_the_machine_is_that_of_the_first_model(machine: Any) -> None:
    assumed = context_of(assume_gpus="2xH100")
    for contexts, running in (
        ([assumed, context_of()], frozenset()),
        ([context_of(), assumed], frozenset({"b"})),
    ):
        serve_host.together_of(list(zip(contexts, ("m", "n"))))
        assert machine.placed[-1][1].running == running
