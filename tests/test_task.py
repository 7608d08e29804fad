"""Which requests a model is asked, and what counts as an answer."""

from __future__ import annotations

import io
import json
import wave
from typing import FrozenSet, List, Optional

import pytest

from hfship.serve.task import (
    TASKS,
    likely_tasks,
    parse_models,
    parse_routes,
    proves,
    request_of,
    silent_wav,
    tasks_to_try,
)
from hfship.serve.vllm_table import ARCHITECTURES, all_known, versions

# Architecture, sentence-transformers' files, chat template: the first tasks.
LIKELY = [
    ("Qwen3ForCausalLM", False, True, ["chat", "completion"]),
    ("Qwen3ForCausalLM", False, False, ["completion", "chat"]),
    ("Qwen3ForCausalLM", True, True, ["embedding"]),  # Qwen3-Embedding
    ("GPT2LMHeadModel", False, False, ["completion", "chat"]),
    ("InternVLChatModel", False, True, ["chat", "completion"]),
    ("Qwen2_5_VLForConditionalGeneration", False, True, ["chat", "completion"]),
    ("BertModel", False, False, ["embedding", "reward"]),
    ("XLMRobertaModel", True, False, ["embedding", "reward"]),
    ("XLMRobertaForSequenceClassification", False, False, ["rerank", "score", "classify"]),
    ("Qwen2ForSequenceClassification", False, True, ["rerank", "score", "classify"]),
    ("BertForTokenClassification", False, False, ["reward", "classify"]),
    ("InternLM2ForRewardModel", False, False, ["reward", "classify"]),
    ("Qwen2ForProcessRewardModel", False, False, ["reward", "classify"]),
    ("WhisperForConditionalGeneration", False, False, ["transcription", "chat"]),
    ("JinaVLForRanking", False, False, ["rerank", "score"]),
    ("HF_ColBERT", False, False, ["embedding", "reward", "rerank"]),
    ("Terratorch", False, False, []),
]


@pytest.mark.parametrize("architecture, embeds, template, first", LIKELY)
def test_the_architecture_speaks_for_tasks(
    architecture: str, embeds: bool, template: bool, first: List[str]
) -> None:
    assert likely_tasks(architecture, embeds, template)[: len(first)] == first


def test_most_architectures_of_the_newest_vllm_speak_for_a_task() -> None:
    known = all_known(versions()[-1], ARCHITECTURES)
    mute = {name for name in known if not likely_tasks(name, embeds=False, chat_template=True)}
    assert len(mute) < len(known) / 4, sorted(mute)  # these are asked for all that the image opens


ROUTES = [
    # An image that lists its routes has the last word, also for a name that says something else.
    (["chat", "completion"], {"/v1/embeddings", "/pooling"}, ["/v1/embeddings", "/pooling"]),
    (["rerank", "score"], {"/rerank", "/v1/rerank", "/score"}, ["/v1/rerank", "/score"]),
    (["rerank", "score"], {"/classify", "/pooling"}, ["/classify", "/pooling"]),
    (["rerank"], None, ["/v1/rerank", "/rerank"]),
    (["chat"], set(), []),
]


@pytest.mark.parametrize("likely, routes, tried", ROUTES)
def test_routes_that_are_tried(
    likely: List[str], routes: Optional[FrozenSet[str]], tried: List[str]
) -> None:
    known = None if routes is None else frozenset(routes)
    assert [route for _, route in tasks_to_try(likely, known)] == tried


def test_where_nothing_is_known_all_is_tried() -> None:
    assert len(tasks_to_try([], None)) == sum(len(task.routes) for task in TASKS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"paths": 1}', '{"paths": {"/a": 1}}', "\x00"])
def test_what_is_no_list_of_routes_is_none(text: str) -> None:
    assert parse_routes(text) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": 1}', '{"data": [1]}', '{"data": [{}]}'])
def test_what_is_no_list_of_models_is_empty(text: str) -> None:
    assert parse_models(text) == []


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_request_names_the_model_and_an_answer_proves(task) -> None:  # type: ignore[no-untyped-def]
    kind, body = request_of(task, "org/m")
    if task.is_upload:
        assert kind.startswith("multipart/form-data; boundary=") and b"org/m" in body
        assert kind.partition("boundary=")[2].encode() in body
    else:
        assert kind == "application/json" and json.loads(body)["model"] == "org/m"
    for text in ("", "[]", "{}", json.dumps({task.field: []}), json.dumps({"error": "no"})):
        assert not proves(task, text)
    made = "" if task.is_upload else [{"index": 0}]
    assert proves(task, json.dumps({task.field: made}))


def test_silence_is_a_sound_file() -> None:
    with wave.open(io.BytesIO(silent_wav(0.5))) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 16000)
        assert sound.getnframes() == 8000 and not any(sound.readframes(8000))
