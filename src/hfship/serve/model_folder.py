# SPDX-License-Identifier: Apache-2.0
"""The folder of a model to serve: whether it is whole, and the facts that its files tell.

Reads config.json, the headers of the weights, and the settings of tokenizer and quantisation.
Promises: a file that is missing or cut short is named before docker or a GPU is touched.
Never: loads a tensor, runs a model's own code, asks a network.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import AbstractSet, Any, Dict, List, Mapping, Sequence

from hfship.base.below import kind_of, stat_below
from hfship.base.content import check_relative_path
from hfship.base.errors import HostError, IntegrityError, NotFoundError, command_line
from hfship.base.files import disk_error
from hfship.base.manifest import (
    BRING_AGAIN,
    FileEntry,
    read_manifest,
    require_finished,
)
from hfship.base.reading import parse_json, read_below
from hfship.base.safetensors import read_tensor_bytes
from hfship.base.text import shorten
from hfship.base.values import replace
from hfship.base.weights import missing_shards
from hfship.serve.config_values import number_in, table_in, word_in
from hfship.serve.facts import ModelFacts, facts_from_config, unbelievable
from hfship.serve.mistral import (
    PARAMS,
    config_from_params,
    has_own_layout,
    is_consolidated,
    needs_own_tokenizer,
)

CONFIG = "config.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
JSON_SIZE = 1 << 26  # bytes; the largest index that is published has 15 MB

WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?$")

# Folders that hold something else than a model that vLLM can serve: file -> what it is.
_NOT_SERVABLE = {
    "model_index.json": "is a diffusers pipeline",
    "adapter_config.json": "is a LoRA adapter, not a whole model",
}
# Of these transformers 4 takes it for granted that positions are absolute.
_ABSOLUTE_BY_ITSELF = ("bert", "roberta", "xlm-roberta", "camembert")
_CHAT_TEMPLATES = frozenset(
    {"chat_template.jinja", "chat_template.json", "additional_chat_templates"}
)


def read_facts(folder: Path, allow_changed: Sequence[str] = ()) -> ModelFacts:
    """The facts of the model in `folder`; `allow_changed` names files that may be edited.

    Raises NotFoundError (no model), IntegrityError (a file is missing or damaged), HostError
    (nothing that vLLM serves), DiskError.
    """
    require_model(folder)
    require_complete(folder, allow_changed)
    names = {path.name for path in folder.iterdir()}
    weights = weight_files(folder)
    config = read_config(folder)
    facts = facts_from_config(config, weight_bytes(weights))
    problem = unbelievable(facts)
    if problem:
        raise IntegrityError(f"{folder / CONFIG} cannot be right", problem, BRING_AGAIN)
    own_tokenizer = needs_own_tokenizer(names)
    return replace(
        facts,
        chat_template=has_chat_template(folder, names) or own_tokenizer,
        own_layout=has_own_layout(names),
        own_tokenizer=own_tokenizer,
        embeds=is_embedding_model(names),
        pickled=_is_pickle(weights[0]),
        tiktoken="o200k_base.tiktoken" in names,
        max_length=shortened_length(folder, config, facts.max_length),
    )


def require_model(folder: Path) -> None:
    """Raise NotFoundError where no folder is, HostError for one of something else than a model."""
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}", "", BRING_AGAIN)
    if (folder / CONFIG).exists() or (folder / PARAMS).exists():
        return

    for name, what_it_is in _NOT_SERVABLE.items():
        if (folder / name).exists():
            what = f"{folder} cannot be served"
            why = f"it {what_it_is}"
            step = "serve the base model it belongs to"
            raise HostError(what, why, step)


def require_complete(folder: Path, allow_changed: Sequence[str] = ()) -> None:
    """Refuse a folder that is not whole: every file of the manifest must be there in its full size.

    Cheap, and catches an unpack that was cut short. A site may change the files that it names,
    weights never. Raises IntegrityError, HostError.
    """
    _refuse_links(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        require_finished(folder)
    else:
        for entry in manifest.files:
            _require_whole_file(folder, entry, entry.path in allow_changed)
        if manifest.partial:
            why = f"its index names, and it does not have: {shorten(manifest.partial)}"
            raise IntegrityError(f"{folder} is partial", why, BRING_AGAIN)


def _require_whole_file(folder: Path, entry: FileEntry, may_differ: bool) -> None:
    path = folder / entry.path
    try:
        status = stat_below(folder, entry.path)
    except FileNotFoundError as exc:
        verify = command_line("hfship", "verify", folder)
        raise IntegrityError(f"{path} is missing", "the manifest lists it", verify) from exc
    except OSError as exc:  # a link on the way
        raise disk_error(exc, "read", path) from exc

    if not stat.S_ISREG(status.st_mode):
        why = f"{entry.path} is {kind_of(status.st_mode)}"
        raise IntegrityError(f"{folder} cannot be served", why, BRING_AGAIN)
    size = status.st_size
    if size == entry.size or (may_differ and not WEIGHTS.search(entry.path)):
        return

    raise changed_error(folder, [entry], f"it has {size} bytes instead of {entry.size}")


def changed_error(folder: Path, entries: Sequence[FileEntry], why: str) -> IntegrityError:
    """The error for files that are not as the manifest lists them; a site may change some."""
    verify = command_line("hfship", "verify", folder)
    paths = [entry.path for entry in entries]
    weights = [path for path in paths if WEIGHTS.search(path)]
    if weights:
        what = f"{folder / weights[0]} is damaged"
        step = verify
    else:
        what = f"{folder / paths[0]} is changed"
        insist = ["hfship", "serve", folder]
        for path in paths:
            insist += ["--allow-changed", path]
        step = f"if you edited it: {command_line(*insist)}\nif not: {verify}"
    if len(paths) > 1:
        why = f"{shorten(paths)}: {why}"
    return IntegrityError(what, why, step)


def _refuse_links(folder: Path) -> None:
    """Refuse links below the folder: what they lead to, the container may not see, which has this
    folder alone, and the manifest does not list."""
    for root, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            path = Path(root, name)
            if path.is_symlink():
                raise _link_error(folder, path)


def _link_error(folder: Path, link: Path) -> HostError:
    why = "and links are not followed"
    whole = os.path.realpath(folder) + "/"
    if not os.path.realpath(link).startswith(whole):
        why = "which the container cannot see"
    name = link.relative_to(folder)
    target = os.readlink(link)
    copy = command_line("cp", "-rL", folder)
    return HostError(
        f"{folder} cannot be served",
        f"{name} is a link to {target}, {why}",
        f"{copy} NEW-FOLDER, then serve that",
    )


def weight_files(folder: Path) -> List[Path]:
    """The weight files that vLLM loads: safetensors, or pickles where there are none. At least one.

    With an index, only what it names: repositories also carry copies in other layouts
    (consolidated*.safetensors), which count where there is nothing else. Raises IntegrityError,
    NotFoundError, HostError.
    """
    index = table_in(read_json(folder, WEIGHTS_INDEX), "weight_map")
    if index:
        wanted = {str(name) for name in index.values()}
        why_wanted = "the index names it"
    else:
        names = {path.name for path in folder.glob("*.safetensors")}
        wanted = {name for name in names if not is_consolidated(name)}
        if has_own_layout({path.name for path in folder.iterdir()}):
            wanted = names
        why_wanted = "the other shards of the series are there"

    for name in [*missing_shards(folder, wanted), *sorted(wanted)]:
        _require_weight_file(folder, name, why_wanted)

    if wanted:
        return [folder / name for name in sorted(wanted)]

    return _pickle_files(folder)


def _require_weight_file(folder: Path, name: str, why_wanted: str) -> None:
    try:
        check_relative_path(name)
    except ValueError as exc:
        what = f"{folder / WEIGHTS_INDEX} is not valid"
        raise IntegrityError(what, str(exc), BRING_AGAIN) from exc

    path = folder / name
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", why_wanted, BRING_AGAIN)


def _pickle_files(folder: Path) -> List[Path]:
    """The pickles that vLLM loads where there is no safetensors file."""
    pickles = sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("*.pt"))
    if pickles:
        return pickles
    if any(folder.glob("*.gguf")):
        step = "fetch the repository that has safetensors"
        raise HostError(f"{folder} cannot be served", "it has GGUF weights only", step)
    raise NotFoundError(f"{folder} is not a model", "it has no *.safetensors", BRING_AGAIN)


def _is_pickle(path: Path) -> bool:
    return path.suffix != ".safetensors"


def weight_bytes(paths: Sequence[Path]) -> Mapping[str, int]:
    """Bytes per dtype of all weight files. Pickles are not looked into: their dtype is "pickle"."""
    totals: Dict[str, int] = {}
    for path in paths:
        if _is_pickle(paths[0]):
            found: Mapping[str, int] = {"pickle": path.stat().st_size}
        else:
            found = read_tensor_bytes(path)
        for dtype, size in found.items():
            totals[dtype] = totals.get(dtype, 0) + size

    return totals


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json, with the quantisation that ModelOpt writes beside it; params.json where a model
    is in Mistral's own layout. Raises NotFoundError."""
    if has_own_layout({path.name for path in folder.iterdir()}):
        return config_from_params(read_json(folder, PARAMS))
    config = read_json(folder, CONFIG)
    if not config:
        why = "it has no config.json"
        if (folder / CONFIG).exists():
            why = "its config.json is empty"
        raise NotFoundError(f"{folder} is not a model", why, BRING_AGAIN)
    modelopt = read_json(folder, "hf_quant_config.json")
    if modelopt and not config.get("quantization_config"):
        return {**config, "quantization_config": modelopt}

    return config


def has_chat_template(folder: Path, names: AbstractSet[str]) -> bool:
    """Whether the model brings a chat template: among its files, or in the tokenizer's settings."""
    if _CHAT_TEMPLATES & names:
        return True
    return "chat_template" in read_json(folder, "tokenizer_config.json")


def is_embedding_model(names: AbstractSet[str]) -> bool:
    """Whether the files are those of sentence-transformers, which ends in a pooling layer.

    >>> is_embedding_model({"config.json", "modules.json", "1_Pooling"})
    True
    """
    return "modules.json" in names and any("Pooling" in name for name in names)


def shortened_length(folder: Path, config: Mapping[str, Any], max_length: int) -> int:
    """The context in tokens, at most what sentence-transformers cuts to, or where positions are
    absolute the tokenizer: these are vLLM's limits, too.

    (vllm/transformers_utils/config.py: get_sentence_transformer_tokenizer_config;
    vllm/config/model.py: _get_and_verify_max_len.)
    """
    cut = number_in(read_json(folder, "sentence_bert_config.json"), "max_seq_length")
    if not cut and _has_absolute_positions(config):
        cut = number_in(read_json(folder, "tokenizer_config.json"), "model_max_length")
    if cut:
        return min(cut, max_length)

    return max_length


def _has_absolute_positions(config: Mapping[str, Any]) -> bool:
    """Whether an encoder counts positions from the beginning, as far as its config tells."""
    kind = config.get("position_embedding_type")
    if kind is None:
        return word_in(config.get("model_type")) in _ABSOLUTE_BY_ITSELF
    return word_in(kind) == "absolute"


def read_json(folder: Path, name: str) -> Mapping[str, Any]:
    """The JSON table in a file of a model, {} when there is no file.

    Raises IntegrityError, DiskError.
    """
    path = folder / name
    try:
        value = parse_json(read_below(folder, name, JSON_SIZE))
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    except ValueError as exc:
        raise IntegrityError(f"{path} is not JSON", str(exc), BRING_AGAIN) from exc

    if not isinstance(value, dict):
        raise IntegrityError(f"{path} is not a JSON table", "", BRING_AGAIN)

    return value
