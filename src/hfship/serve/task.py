# SPDX-License-Identifier: Apache-2.0
"""What a model is for, and the smallest request that proves that it does it.

Owns the table of tasks (route, body, what an answer of it holds), and which of them the name of an
architecture speaks for. The image has the last word: its /openapi.json lists the routes that it
opened for this model, and what it refuses is not the model's task.
Promises: pure; a request is of one token, of a few words, or of a tenth of a second of silence.

Routes and bodies: vllm/entrypoints of 0.8.3 to 0.33, in the table of serve/vllm_table.json.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Sequence, Tuple

from hfship.base.values import dataclass

# Statuses by which a server says that it does not do this: no such route or method, a body that is
# not for this model (400, 422), not implemented.
REFUSALS = frozenset({400, 404, 405, 415, 422, 501})
UNKNOWN = "unknown"  # the task of a model that no request of ours is for

_WORDS = "Hello"
_BOUNDARY = "hfship-7f4a1c"
_SILENCE_S = 0.5  # Whisper pads to 30 s; less than 0.1 s is refused by some
_SAMPLE_RATE = 16000


@dataclass(frozen=True)
class Task:
    """One kind of work: its routes, of which an image has one or more, and the body of a request
    without `model`. `field` is the field of the answer that holds what the model made."""

    name: str
    routes: Tuple[str, ...]
    body: Mapping[str, Any]
    field: str
    is_upload: bool = False  # a file, as multipart/form-data


TASKS: Tuple[Task, ...] = (
    Task(
        "chat",
        ("/v1/chat/completions",),
        {"messages": [{"role": "user", "content": _WORDS}], "max_tokens": 1, "temperature": 0},
        "choices",
    ),
    Task(
        "completion",
        ("/v1/completions",),
        {"prompt": _WORDS, "max_tokens": 1, "temperature": 0},
        "choices",
    ),
    Task("embedding", ("/v1/embeddings",), {"input": _WORDS}, "data"),
    Task(
        "rerank",
        ("/v1/rerank", "/rerank"),
        {"query": _WORDS, "documents": ["Hello world", "Goodbye"]},
        "results",
    ),
    Task(
        "score",
        ("/v1/score", "/score"),
        {"text_1": _WORDS, "text_2": "Hello world"},
        "data",
    ),
    Task("classify", ("/classify",), {"input": _WORDS}, "data"),
    Task("reward", ("/pooling",), {"input": _WORDS}, "data"),
    Task("transcription", ("/v1/audio/transcriptions",), {}, "text", is_upload=True),
)
_BY_NAME = {task.name: task for task in TASKS}

# Names of architectures, as the registry of vLLM has them -> tasks, the likeliest first.
_BY_ARCHITECTURE: Tuple[Tuple[str, Tuple[str, ...]], ...] = (
    (r"RewardModel$|ForTokenClassification$|PRM$", ("reward", "classify")),
    (r"ForSequenceClassification$", ("rerank", "score", "classify", "reward")),
    (r"ForRanking$|Reranker", ("rerank", "score")),
    (r"ColBERT|ColPali|ColQwen|ForRetrieval$|Splade", ("embedding", "reward", "rerank", "score")),
    (r"Whisper|SpeechSeq2Seq|ForASR|ASRFor|ASRModel|Parakeet", ("transcription", "chat")),
    (r"^(Clip|CLIP|Siglip|SigLIP)|EmbeddingModel$|ForMaskedLM$", ("embedding", "reward")),
    (r"ForCausalLM|LMHeadModel|ForConditionalGeneration|ChatModel", ("chat", "completion")),
    # BertModel, XLMRobertaModel, MistralModel: an encoder without a head.
    (r"Model$", ("embedding", "reward", "chat", "completion")),
)


def likely_tasks(architecture: str, embeds: bool, chat_template: bool) -> List[str]:
    """The tasks that the name of an architecture speaks for, the likeliest first; [] for a name
    that tells nothing.

    >>> likely_tasks("Qwen3ForCausalLM", embeds=False, chat_template=True)
    ['chat', 'completion']
    >>> likely_tasks("XLMRobertaForSequenceClassification", False, False)[:2]
    ['rerank', 'score']
    """
    found: Sequence[str] = ()
    for pattern, names in _BY_ARCHITECTURE:
        if re.search(pattern, architecture):
            found = names
            break

    tasks = list(found)
    if embeds:  # sentence-transformers: whatever the architecture, vectors come out
        others = [name for name in tasks if name not in ("chat", "completion")]
        tasks = ["embedding", *others]
    if not chat_template and "chat" in tasks and "completion" in tasks:
        tasks.remove("chat")
        behind = tasks.index("completion") + 1
        tasks.insert(behind, "chat")
    return list(dict.fromkeys(tasks))


def tasks_to_try(likely: Sequence[str], routes: Optional[FrozenSet[str]]) -> List[Tuple[Task, str]]:
    """(task, route) in the order in which they are tried: the likely tasks first, then the others,
    of the routes that the image lists. Where it lists none (None), all routes of the likely tasks;
    of all where nothing is likely.

    >>> [route for _, route in tasks_to_try(["rerank"], frozenset({"/classify", "/rerank"}))]
    ['/rerank', '/classify']
    """
    names = list(likely)
    if routes is not None or not likely:
        names += [task.name for task in TASKS]
    found = []
    for name in dict.fromkeys(names):
        task = _BY_NAME[name]
        for route in task.routes:
            if routes is None or route in routes:
                found.append((task, route))
                if routes is not None:
                    break  # an image that has two routes for a task answers on both alike

    return found


def parse_routes(text: str) -> Optional[FrozenSet[str]]:
    """The paths that take a POST, of an OpenAPI document; None for something else.

    >>> sorted(parse_routes('{"paths": {"/score": {"post": {}}, "/health": {"get": {}}}}'))
    ['/score']
    """
    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
        document = json.loads(text)
        found = []
        for path, methods in document["paths"].items():
            if "post" in methods:
                found.append(path)
        return frozenset(found)
    return None


def parse_models(text: str) -> List[str]:
    """The names in the answer of /v1/models; [] for something else.

    >>> parse_models('{"object": "list", "data": [{"id": "m"}]}')
    ['m']
    """
    found = []
    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
        listing = json.loads(text)
        for row in listing["data"]:
            name = str(row["id"])
            found.append(name)
    return found


def request_of(task: Task, model: str) -> Tuple[str, bytes]:
    """(content type, body) of the smallest request for a task."""
    if task.is_upload:
        return _upload(model)
    body: Dict[str, Any] = {"model": model, **task.body}
    return "application/json", json.dumps(body).encode("utf-8")


def _upload(model: str) -> Tuple[str, bytes]:
    """A form with the name of the model and a file of sound."""
    named = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
    file = (
        f"--{_BOUNDARY}\r\n"
        'Content-Disposition: form-data; name="file"; filename="silence.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    end = f"\r\n--{_BOUNDARY}--\r\n"
    body = named.encode()
    body += file.encode()
    body += silent_wav()
    body += end.encode()
    return f"multipart/form-data; boundary={_BOUNDARY}", body


def silent_wav(seconds: float = _SILENCE_S) -> bytes:
    """Silence as a WAV file: mono, 16 bits, 16 kHz (RIFF: a header of 44 bytes, then samples).

    >>> silent_wav(0.5)[:4], len(silent_wav(0.5))
    (b'RIFF', 16044)
    """
    data = bytes(2 * int(_SAMPLE_RATE * seconds))
    mono, bits = 1, 16
    form = struct.pack("<HHIIHH", 1, mono, _SAMPLE_RATE, _SAMPLE_RATE * 2, 2, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def proves(task: Task, text: str) -> bool:
    """Whether an answer holds what a model made. Of silence there is nothing to write: any text.

    >>> rerank = TASKS[3]
    >>> proves(rerank, '{"results": [{"index": 0}]}'), proves(rerank, '{"results": []}')
    (True, False)
    """
    with contextlib.suppress(ValueError, AttributeError):
        value = json.loads(text)
        made = value.get(task.field)
        if isinstance(made, str):
            return True
        return bool(made)
    return False


def task_named(name: str) -> Optional[Task]:
    """The task with a name, None for one that is not in the table."""
    return _BY_NAME.get(name)
