"""What vLLM measured: read from its log, kept beside the plan, and used by the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hfship.serve.files import plan_text
from hfship.serve.measured import (
    MEASURED_FILE,
    Measured,
    as_measured,
    basis_of,
    informed_plan,
    measured_after,
    measured_in,
    measured_text,
    read_measured,
    write_measured,
)
from hfship.serve.messages import Answer
from hfship.serve.start import Started
from test_facts import facts_of
from test_plan import plan

GIB = 1 << 30
PLAN = replace(plan("Llama-3.1-70B", "4x80GB"), name="m", image_id="sha256:1")
FACTS = facts_of("Llama-3.1-70B")
# As vLLM 0.32 writes them.
LOG = """\
INFO [default_loader.py:502] Loading weights took 11.02 seconds
INFO [gpu_model_runner.py:5150] Model loading took 35.25 GiB memory and 12.345678 seconds
INFO [gpu_worker.py:760] Available KV cache memory: 33.5 GiB
INFO [kv_cache_utils.py:2328] GPU KV cache size: 437,120 tokens, Maximum concurrency for 131,072 tokens per request: 3.33x
"""
STARTED = Started(
    Answer(200, "", 0.4, made=True, task="chat", route="/v1/chat/completions"),
    61.0,
    {"loading weights": 61.0},
)


def test_the_log_tells_what_was_measured() -> None:
    found = measured_in(LOG)
    assert (found.kv_tokens, found.kv_bytes, found.load_s) == (437_120, int(33.5 * GIB), 12.345678)
    assert found.weight_bytes == int(35.25 * GIB)
    old = "INFO Model loading took 14.99 GB and 3.2 seconds\nGPU KV cache size: 1,234 tokens"
    assert (measured_in(old).load_s, measured_in(old).kv_tokens) == (3.2, 1234)
    assert measured_in("INFO Loading weights took 2.50 seconds").load_s == 2.5
    assert measured_in("nothing of all that") == Measured()


def kept() -> Measured:
    return measured_after(PLAN, Measured(), LOG, STARTED)


def test_what_was_measured_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir(mode=0o750)
    assert read_measured(folder) == Measured()
    measured = kept()
    write_measured(folder, measured)
    assert read_measured(folder) == measured
    assert read_measured(folder).task == "chat" and read_measured(folder).start_s == 61.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "hfship-measured/2"}',
        '{"format": "hfship-measured/1", "kv_tokens": "x"}',
        "\xff",
    ],
)
def test_what_cannot_be_read_is_nothing_measured(text: str, tmp_path: Path) -> None:
    (tmp_path / MEASURED_FILE).write_text(text)
    assert read_measured(tmp_path) == Measured()


def test_a_second_look_at_the_same_writes_nothing_new() -> None:
    first = kept()
    again = Started(replace(STARTED.answer, seconds=0.1))
    assert measured_after(PLAN, first, LOG, again) == first
    assert measured_after(PLAN, first, "", again) == first  # the log has turned over


ASKED = {"wishes": {"max_model_len": 8192}, "max_model_len": 8192}
# Fields of the plan, what was measured, whether it runs: the context of the next plan.
NEXT = [
    ({"max_model_len": 8192}, {"kv_tokens": 20_000}, False, 19_456),
    ({"max_model_len": 8192}, {"kv_tokens": 10**9}, False, FACTS.max_length),
    ({"max_model_len": 8192}, {"kv_tokens": 20_000}, True, 8192),
    ({"max_model_len": 8192}, {"kv_tokens": 4000}, False, 8192),
    ({"max_model_len": 8192}, {"fits_length": 4000}, True, 4000),
    (ASKED, {"kv_tokens": 20_000}, False, 8192),
    (ASKED, {"fits_length": 4000}, False, 8192),
    ({"max_model_len": 0}, {"kv_tokens": 20_000}, False, 0),
]


@pytest.mark.parametrize("fields, found, is_running, length", NEXT)
def test_the_next_plan_goes_by_what_was_measured(
    fields: dict, found: dict, is_running: bool, length: int
) -> None:
    planned = replace(PLAN, **fields)
    measured = Measured(at="2026-11-29T00:00:00Z", basis=basis_of(planned), **found)
    assert informed_plan(planned, measured, FACTS, is_running).max_model_len == length


@pytest.mark.parametrize(
    "other",
    [
        {"image_id": "sha256:2"},
        {"gpu_memory_utilization": 0.5},
        {"gpu_names": ("GPU 0 (T4, 16.0 GB)",)},
    ],
)
def test_of_another_image_or_machine_nothing_is_taken(other: dict) -> None:
    planned = replace(PLAN, max_model_len=8192)
    measured = Measured(basis=basis_of(planned), kv_tokens=20_000)
    assert informed_plan(replace(planned, **other), measured, FACTS, False).max_model_len == 8192


def test_the_cache_and_what_it_holds_are_those_of_vllm() -> None:
    measured = kept()
    assert measured.concurrency == 3.33
    found = as_measured(PLAN, measured, FACTS)
    assert (found.kv_bytes, found.concurrency) == (int(33.5 * GIB), 3.3)
    shorter = replace(PLAN, max_model_len=65_536)
    assert as_measured(shorter, measured, FACTS).concurrency == 6.7
    mixed = replace(FACTS, window_layers=10, full_layers=FACTS.layers - 10)
    assert as_measured(shorter, measured, mixed).concurrency == PLAN.concurrency
    assert as_measured(replace(PLAN, data_parallel_size=2), measured, FACTS).concurrency == 6.7
    assert as_measured(PLAN, Measured(), FACTS) == PLAN


def test_a_start_that_failed_tells_for_how_many_requests_there_are_states() -> None:
    log = "ValueError: max_num_seqs (400) exceeds available Mamba cache blocks (327). Each"
    planned = replace(PLAN, max_num_seqs=400)
    found = measured_after(planned, Measured(), log, None)
    again = informed_plan(planned, found, FACTS, is_running=False)
    assert again.max_num_seqs == 327
    assert informed_plan(replace(planned, max_num_seqs=0), found, FACTS, False).max_num_seqs == 327
    started = measured_after(again, found, LOG, STARTED)
    assert informed_plan(planned, started, FACTS, is_running=True).max_num_seqs == 327
    asked = replace(planned, wishes={"max_num_seqs": 400})
    assert informed_plan(asked, found, FACTS, is_running=False).max_num_seqs == 400


def test_windows_are_not_in_proportion() -> None:
    planned = replace(PLAN, max_model_len=8192)
    measured = Measured(basis=basis_of(planned), kv_tokens=20_000)
    mixed = replace(FACTS, window_layers=10, full_layers=FACTS.layers - 10)
    assert informed_plan(planned, measured, mixed, False).max_model_len == 8192


def test_a_start_that_failed_tells_the_context_that_fits() -> None:
    log = "ValueError: ... the estimated maximum model length is 24576. Try increasing"
    found = measured_after(PLAN, Measured(), log, None)
    assert found.fits_length == 24576 and found.at
    assert not measured_after(PLAN, Measured(), "CUDA out of memory", None).at
    assert informed_plan(PLAN, found, FACTS, False).max_model_len == 24576
    # One that then started forgets nothing of it: it would fail again.
    started = measured_after(replace(PLAN, max_model_len=24576), found, LOG, STARTED)
    assert started.fits_length == 24576


def test_people_read_what_was_measured() -> None:
    text = measured_text(replace(kept(), at="2026-11-29T08:00:00Z"))
    assert (
        text
        == "437120 tokens, 36.0 GB of KV cache, 37.8 GB of weights, started in 1:01 (vLLM, 2026-11-29)"
    )
    assert measured_text(Measured()) == "" and "measured" not in plan_text(PLAN)


# -- what is kept of a start, field by field


BASE = replace(PLAN, wishes={}, max_model_len=4096, max_num_seqs=64)
KNOWN = Measured(
    basis=basis_of(BASE),
    at="then",
    max_model_len=4096,
    kv_tokens=9000,
    kv_bytes=7,
    concurrency=2.2,
    weight_bytes=8,
    load_s=3.0,
    start_s=50.0,
    phases={"loading": 40.0},
    task="score",
    route="/score",
)
ANSWER = Answer(200, "", made=True, task="chat", route="/v1/chat")


@pytest.mark.parametrize(
    "log, seconds, phases, changes",
    [
        ("", 0.0, {}, {}),
        ("", 61.0, {"x": 61.0}, {"start_s": 61.0, "phases": {"x": 61.0}}),
        (
            LOG,
            0.0,
            {},
            {
                "kv_tokens": 437_120,
                "kv_bytes": int(33.5 * GIB),
                "concurrency": 3.33,
                "weight_bytes": int(35.25 * GIB),
                "load_s": 12.345678,
            },
        ),
    ],
)
def test_what_the_log_has_lost_is_known_from_before(
    log: str, seconds: float, phases: dict, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.serve.measured.utc", lambda: "now")
    after = measured_after(BASE, KNOWN, log, Started(ANSWER, seconds, phases))
    assert after == replace(KNOWN, at="now", task="chat", route="/v1/chat", **changes)
    other = replace(BASE, image_id="sha256:2")
    fresh = measured_after(other, KNOWN, log, Started(ANSWER, seconds, phases))
    assert fresh.basis == basis_of(other) and fresh.kv_tokens == changes.get("kv_tokens", 0)
    assert (fresh.start_s, fresh.phases, fresh.max_model_len) == (seconds, phases, 4096)
    assert measured_after(BASE, after, log, Started(ANSWER, seconds, phases)) is after


@pytest.mark.parametrize(
    "planned, measured, wishes, most",
    [
        (64, 20, {}, 20),
        (10, 20, {}, 10),
        (0, 20, {}, 20),
        (64, 0, {}, 64),
        (64, 20, {"max_num_seqs": 64}, 64),
        (64, 20, {"max_model_len": 4096}, 20),
    ],
)
def test_requests_at_a_time_are_those_that_have_states(
    planned: int, measured: int, wishes: dict, most: int
) -> None:
    asked = replace(BASE, max_num_seqs=planned, wishes=wishes)
    found = replace(KNOWN, basis=basis_of(asked), fits_states=measured)
    assert informed_plan(asked, found, FACTS, is_running=True).max_num_seqs == most
    assert informed_plan(asked, replace(found, basis={}), FACTS, True) is asked


@pytest.mark.parametrize(
    "length, fits_length, tokens, running, wishes, found",
    [
        (4096, 0, 9000, False, {}, 8192),
        (4096, 0, 9000, True, {}, 4096),
        (4096, 2048, 9000, False, {}, 2048),
        (4096, 8192, 9000, False, {}, 4096),
        (4096, 0, 4000, False, {}, 4096),
        (4096, 0, 10**9, False, {}, 131_072),
        (4096, 2048, 9000, False, {"max_model_len": 4096}, 4096),
        (0, 2048, 9000, False, {}, 0),
    ],
)
def test_a_context_is_the_one_that_fits(
    length: int, fits_length: int, tokens: int, running: bool, wishes: dict, found: int
) -> None:
    asked = replace(
        BASE,
        max_model_len=length,
        wishes=wishes,
        warnings=("context shortened to 1", "another"),
    )
    known = replace(KNOWN, basis=basis_of(asked), fits_length=fits_length, kv_tokens=tokens)
    informed = informed_plan(asked, known, FACTS, running)
    assert informed.max_model_len == found
    if found == length:
        assert informed.warnings == asked.warnings
        return
    said = f"context of {found} of 131072 tokens: what vLLM measured"
    assert informed.warnings == (("another", said) if found < 131_072 else ("another",))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ""),
        ({"kv_tokens": 9, "at": "2026-01-02T03"}, "9 tokens (vLLM, 2026-01-02)"),
        (
            {"kv_bytes": 2000, "weight_bytes": 3000, "start_s": 61.0},
            "2.0 kB of KV cache, 3.0 kB of weights, started in 1:01 (vLLM, )",
        ),
    ],
)
def test_what_is_said_of_each_number(changes: dict, said: str) -> None:
    assert measured_text(replace(Measured(), **changes)) == said


def test_the_basis_has_the_kinds_of_gpus_and_what_was_asked_for() -> None:
    names = ("GPU 1 (B, 2 GB)", "GPU 0 (A, 2 GB)", "other")
    found = basis_of(replace(BASE, gpu_names=names, wishes={"max_num_seqs": 5}))
    assert found["gpus"] == ["(A, 2 GB)", "(B, 2 GB)", "other"]
    assert found["max_num_seqs"] == 5 and basis_of(BASE)["max_num_seqs"] == 0
    assert not [value for value in found.values() if isinstance(value, tuple)]
