# SPDX-License-Identifier: Apache-2.0
"""`serve` in what it calls, in which order, and what it refuses before anything is done."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple

import pytest

from hfship.base.errors import Exit, UsageError
from hfship.commands import serve
from hfship.commands.parser import parse_words

# what is typed -> what is done, in order; words of bundles bring two models each
DONE: List[Tuple[str, List[Any]]] = [
    ("m", [("serve", "m")]),
    ("m n", [("together", ["m", "n"]), ("serve", "m!"), ("serve", "n!")]),
    ("b.bundle.json", ["bring b", ("together", ["b1", "b2"]), ("serve", "b1!"), ("serve", "b2!")]),
    (
        "m b.bundle.json",
        ["bring b", ("together", ["m", "b1", "b2"]), *(("serve", f"{n}!") for n in ("m", "b1", "b2"))],
    ),
    ("m --instead-of day", ["room", ("serve", "m")]),
    ("m --rollback", ["back m ", ("serve", "m")]),
    (
        "m n --rollback=abc1234",
        ["back m abc1234", "back n abc1234", ("together", ["m", "n"]), ("serve", "m!"), ("serve", "n!")],
    ),
    ("--planned m --planned n", [("planned", "m"), ("planned", "n")]),
    ("--gateway", ["gateway"]),
]  # fmt: skip


def context_of(typed: str) -> Any:
    args, _ = parse_words(["serve", *typed.split()])
    return SimpleNamespace(args=args)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> List[Any]:
    """What was done, in order."""
    did: List[Any] = []

    def note(*words: Any) -> Any:
        did.append(words if len(words) > 1 else words[0])
        return words

    def bring(context: Any, word: str) -> Any:
        note(f"bring {word[0]}")
        return [(context, f"{word[0]}{number}") for number in (1, 2)]

    def together(pairs: Any) -> Any:
        note("together", [word for _, word in pairs])
        return [(context, f"{word}!") for context, word in pairs]

    def print_results(_: Any, results: Any) -> None:
        assert all(result in did for result in results)

    patched: Dict[str, Any] = {
        "bundles.is_bundle": lambda word: word.endswith(".bundle.json"),
        "serve_bundle.bring_bundle": bring,
        "serve_model.serve_model": lambda _, word: note("serve", word),
        "serve_host.pairs_together": together,
        "serve_planned.serve_planned": lambda _, name: note("planned", name),
        "gateway_hosts.serve_gateway": lambda _: note("gateway"),
        "swap.make_room": lambda _: note("room"),
        "rollback.roll_back": lambda word, version, _: note(f"back {word} {version}"),
        "serve.print_results": print_results,
    }
    for name, fake in patched.items():
        monkeypatch.setattr(f"hfship.commands.{name}", fake)
    return did


@pytest.mark.parametrize(("typed", "calls"), DONE)
def test_what_is_done_follows_from_what_is_typed(
    typed: str, calls: List[Any], done: List[Any]
) -> None:
    assert serve.cmd_serve(context_of(typed)) is Exit.OK
    assert done == calls


@pytest.mark.parametrize("typed", ["m --shm-size much", "m --explain"])
def test_what_is_wrong_is_refused_before_anything_is_done(typed: str, done: List[Any]) -> None:
    with pytest.raises(UsageError):
        serve.cmd_serve(context_of(typed))
    assert done == []


TOGETHER: List[Tuple[str, Optional[str]]] = [
    ("m --explain", "--explain is for planning"),
    ("m --explain --plan", None),
    ("m --assume-gpus 2xH100", "--assume-gpus is for planning"),
    ("m --assume-gpus 2xH100 --plan", None),
    ("m --rollback --plan", "--rollback is no plan"),
    ("m n --port 1", "are for one model"),
    ("m n --name x", "are for one model"),
    ("m n --served-model-name x", "are for one model"),
    ("m --port 1 --name x --served-model-name x", None),
    ("m n --plan", None),
]


@pytest.mark.parametrize(("typed", "said"), TOGETHER)
def test_options_that_make_no_sense_together(typed: str, said: Optional[str]) -> None:
    args, _ = parse_words(["serve", *typed.split()])
    if said is None:
        serve.require_sensible(args)
        return
    with pytest.raises(UsageError, match=said):
        serve.require_sensible(args)


@pytest.mark.parametrize(
    ("version", "step"),
    [("", "hfship serve m n --rollback"), ("v1", "hfship serve m n --rollback v1")],
)
def test_the_next_step_of_a_rollback_is_the_one_that_was_typed(version: str, step: str) -> None:
    args = argparse.Namespace(names=["m", "n"], rollback=version)
    assert serve._rollback_command(args) == step
