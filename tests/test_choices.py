"""Which image, split and length would do: what is told where, and what only the operator decides."""

from __future__ import annotations

from typing import Any, List, Tuple

import pytest

from hfship.serve.cards import assumed_gpus
from hfship.serve.choices import Choice, choices, images_told
from hfship.serve.terms import Host, Image, Plan, ServeOptions
from test_facts import facts_of

OURS = Image("ours/vllm:1", "sha256:1", (0, 32, 0), cuda="13.0.1")


def told(machine: str, image: Image = OURS, name: str = "Qwen3-8B", **options: Any) -> List[Choice]:
    wanted = ServeOptions(device="gpu", **options)
    return choices("m", facts_of(name), Host(assumed_gpus(machine)), [image], wanted)


@pytest.mark.parametrize(
    "device, expected", [("gpu", ["plan", "unknown", "new", "old"]), ("cpu", ["plan", "cpu"])]
)
def test_images_for_the_device_are_told_the_newest_first(device: str, expected: List[str]) -> None:
    images = (
        Image("old", "sha256:2", (0, 9, 0)),
        Image("cpu", "sha256:3", (0, 32, 0), cpu=True),
        Image("new", "sha256:4", (0, 32, 0)),
        Image("unknown", "sha256:5"),  # as one from the main branch
        Image("plan", "sha256:6", (0, 10, 0), cpu=device == "cpu"),
    )
    plan = Plan(image="plan", image_id="sha256:6", version=(0, 10, 0), device=device)
    found = images_told(plan, Host(images=images))
    assert [image.reference for image in found] == expected
    assert (found[0].id, found[0].version) == ("sha256:6", (0, 10, 0))


def test_where_no_gpu_may_be_used_there_is_no_choice() -> None:
    assert choices("m", facts_of("Qwen3-8B"), Host(), [OURS], ServeOptions(device="gpu")) == []


def test_an_image_that_these_gpus_are_too_old_for_is_told_why() -> None:
    (choice,) = told("1xV100")
    assert choice.group == "does not run" and "compute capability 7.5" in choice.why


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ["1", "2", "4"]),
        ({"tensor_parallel_size": 2}, ["2"]),
        ({"pipeline_parallel_size": 2}, ["1x2", "2x2"]),
    ],
)
def test_what_was_asked_for_is_told_alone(options: Any, expected: List[str]) -> None:
    found = told("4xH100", **options)
    assert [one.split for one in found if one.group == "runs"]
    sizes: List[Tuple[int, int]] = []
    for one in found:
        tensor = next((n for n in (4, 2) if f"--tensor-parallel-size {n}" in one.flags), 1)
        stages = 2 if "--pipeline-parallel-size 2" in one.flags else 1
        sizes.append((tensor, stages))
    assert sorted(sizes) == [
        (int(text.partition("x")[0]), int(text.partition("x")[2] or 1)) for text in expected
    ]


@pytest.mark.parametrize("options, pipelines", [({}, 1), ({"tensor_parallel_size": 1}, 0)])
def test_three_gpus_that_heads_do_not_divide_make_a_pipeline(options: Any, pipelines: int) -> None:
    found = told("3xH100", **options)
    assert len([one for one in found if "--pipeline-parallel-size 3" in one.flags]) == pipelines


def test_a_length_that_is_asked_for_is_what_must_fit() -> None:
    (short,) = told("1xH100", max_model_len=2048)
    (usual,) = told("1xH100")
    assert (short.group, short.length) == ("runs", 2048)
    assert short.need < usual.need, "of a shorter request less must be there"
    assert usual.need > facts_of("Qwen3-8B").weight_bytes


def test_with_a_narrow_cache_the_length_is_that_which_fits_then() -> None:
    (choice,) = told("1x21200MB")
    assert f"--max-model-len {choice.length}" in choice.flags and choice.length > 0
    assert "--kv-cache-dtype fp8" in choice.flags
    (refused,) = told("1x21200MB", kv_cache_dtype="bfloat16")
    assert refused.group == "does not run"


def test_where_less_fits_the_flag_for_it_is_told() -> None:
    (choice,) = told("1x24GB")
    assert choice.group == "runs with less" and "fp8" not in choice.flags
    assert f"--max-model-len {choice.length}" in choice.flags


def test_nothing_fits_on_a_small_card_and_it_is_told_what_it_has() -> None:
    (choice,) = told("1x8GB")
    assert choice.group == "does not run" and "for it" in choice.why
