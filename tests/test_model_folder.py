"""What a folder says of its model beside config.json, and what of a folder is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import pytest

from hfship.base.errors import DiskError, HostError, IntegrityError
from hfship.base.manifest import FileEntry
from hfship.serve import model_folder
from hfship.serve.model_folder import (
    changed_error,
    read_config,
    read_facts,
    read_json,
    shortened_length,
    weight_bytes,
    weight_files,
)
from test_facts import CONFIGS, make_folder

QUANTIZED = {"quantization": {"quant_algo": "NVFP4"}}


def write(folder: Path, files: Dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


# Files beside those of a plain model: what the facts say then.
BESIDE: Dict[str, Any] = {
    "plain": ({}, {"embeds": False, "tiktoken": False, "pickled": False, "chat_template": True}),
    "sentence-transformers": (
        {"modules.json": [], "1_Pooling/config.json": {}},
        {"embeds": True},
    ),
    "a length that it is cut to": (
        {"sentence_bert_config.json": {"max_seq_length": 512}},
        {"max_length": 512},
    ),
    "the words of gpt-oss": ({"o200k_base.tiktoken": {}}, {"tiktoken": True}),
    "no template": ({"tokenizer_config.json": {}}, {"chat_template": False}),
    "a template in a file": (
        {"tokenizer_config.json": {}, "chat_template.jinja": "x"},
        {"chat_template": True},
    ),
    "templates in a folder": (
        {"tokenizer_config.json": {}, "additional_chat_templates/x.jinja": "x"},
        {"chat_template": True},
    ),
    "ModelOpt's": ({"hf_quant_config.json": QUANTIZED}, {"quantization.method": "nvfp4"}),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_lies_beside_the_config_counts(case: str, tmp_path: Path) -> None:
    files, expected = BESIDE[case]
    folder = make_folder(tmp_path / "m")
    write(folder, files)
    facts = read_facts(folder)
    for name, value in expected.items():
        found: Any = facts
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name


def test_the_configs_own_quantisation_wins_over_modelopts(tmp_path: Path) -> None:
    own = {"quant_method": "awq"}
    write(
        tmp_path, {"config.json": {"quantization_config": own}, "hf_quant_config.json": QUANTIZED}
    )
    assert read_config(tmp_path)["quantization_config"] == own
    write(tmp_path, {"config.json": {"a": 1}})
    assert read_config(tmp_path) == {"a": 1, "quantization_config": QUANTIZED}
    (tmp_path / "hf_quant_config.json").unlink()
    assert read_config(tmp_path) == {"a": 1}


def test_numbers_that_no_model_has_are_refused(tmp_path: Path) -> None:
    config = {**CONFIGS["Qwen3-8B"], "num_hidden_layers": 10**9}
    with pytest.raises(IntegrityError, match="config.json cannot be right") as caught:
        read_facts(make_folder(tmp_path / "m", config))
    assert caught.value.why.startswith("layers: 1000000000")


@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_an_adapter_beside_a_model_does_not_matter(name: str, tmp_path: Path) -> None:
    write(tmp_path, {"adapter_config.json": {}})
    with pytest.raises(HostError, match="cannot be served"):
        model_folder.require_model(tmp_path)
    write(tmp_path, {name: {}})
    model_folder.require_model(tmp_path)


def test_a_disk_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(model_folder, "read_below", fail)
    with pytest.raises(DiskError, match="config.json"):
        read_json(tmp_path, "config.json")
    monkeypatch.setattr(model_folder, "stat_below", fail)
    with pytest.raises(DiskError, match="a.txt"):
        model_folder._require_whole_file(tmp_path, FileEntry("a.txt", 1, "0" * 64), False)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["pytorch_model-2.bin", "pytorch_model-1.bin", "x.pt"], ["pytorch_model-1.bin", "pytorch_model-2.bin"]),
        (["consolidated.01.pt", "consolidated.00.pt"], ["consolidated.00.pt", "consolidated.01.pt"]),
    ],
)  # fmt: skip
def test_pickles_are_taken_where_there_is_nothing_else(
    names: List[str], expected: List[str], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"12345")
    found = weight_files(tmp_path)
    assert [path.name for path in found] == expected
    assert weight_bytes(found) == {"pickle": 5 * len(expected)}


@pytest.mark.parametrize(
    "paths, what, why, step",
    [
        (["config.json"], "config.json is changed", "odd", "--allow-changed config.json"),
        (
            ["a.json", "b.json"],
            "a.json is changed",
            "a.json, b.json: odd",
            "--allow-changed a.json --allow-changed b.json",
        ),
        (["a.json", "m.safetensors"], "m.safetensors is damaged", "a.json, m.safetensors: odd", ""),
    ],
)
def test_what_a_site_may_change_is_told_with_the_way_to_say_so(
    paths: List[str], what: str, why: str, step: str
) -> None:
    entries = [FileEntry(path, 1, "0" * 64) for path in paths]
    error = changed_error(Path("/m"), entries, "odd")
    assert (error.what, error.why) == (f"/m/{what}", why)
    assert step in error.next_step and "hfship verify /m" in error.next_step
    assert ("--allow-changed" in error.next_step) == bool(step)


@pytest.mark.parametrize(
    "config, length",
    [
        ({"model_type": "bert"}, 128),
        ({"model_type": "bert", "position_embedding_type": "rotary"}, 8192),
        ({"model_type": "other", "position_embedding_type": "absolute"}, 128),
        ({"model_type": "other"}, 8192),
    ],
)
def test_the_tokenizer_limits_what_has_absolute_positions(
    config: Dict[str, Any], length: int, tmp_path: Path
) -> None:
    write(tmp_path, {"tokenizer_config.json": {"model_max_length": 128}})
    assert shortened_length(tmp_path, config, 8192) == length
