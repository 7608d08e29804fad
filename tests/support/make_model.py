#!/usr/bin/env python3
"""Make a model of real shape from nothing: small, deterministic, and served by a real vLLM.

    python3 tests/support/make_model.py OUT [--size-mb N] [--kind qwen2|llama] [--dtype F16|F32|BF16] [--shards N] [--seed S]

The weights are noise with the spread of trained ones, N(0, 0.02²), so they compress as real ones do. Their bytes are made in
planes: the high bytes of the floats (sign, exponent, first bits of the mantissa) follow the Gaussian, the rest is uniform.
Random bytes through a 256-entry table make such a plane at the speed of memory. F16 by default: the CPU build of vLLM serves it
everywhere, while bf16 needs matrix instructions that some virtual machines announce and do not have.
"""

import argparse
import hashlib
import json
import math
import random
import struct
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

SIGMA = 0.02
CHUNK = 1 << 20  # values made at a time
HEAD_DIM = 64
KV_HEADS = 2  # as the small Qwen2 have; splits over two GPUs
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED_WORDS = ["the", "model", "hello", "ship"]  # with a space before: a few real merges
BYTES_OF = {"F16": 2, "BF16": 2, "F32": 4}
TORCH_NAME = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
# What stands on a qwen2 in place of the head that makes tokens: architecture, labels.
HEADS = {
    "": ("Qwen2ForCausalLM", 0),
    "embedding": ("Qwen2ForCausalLM", 0),  # sentence-transformers pools what the layers make
    "rerank": ("Qwen2ForSequenceClassification", 1),
    "classify": ("Qwen2ForSequenceClassification", 3),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
README = """---
license: apache-2.0
pipeline_tag: text-generation
---

# {title}

A randomly initialised {kind} model of {parameters:,} parameters for tests. It talks nonsense.
"""


class Tensor(NamedTuple):
    """One tensor of the checkpoint. `constant` fills it (norms); None means Gaussian noise."""

    name: str
    shape: Tuple[int, ...]
    constant: Optional[float] = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Shape(NamedTuple):
    """The dimensions of a decoder-only transformer."""

    kind: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int

    @property
    def heads(self) -> int:
        """Attention heads; KV_HEADS keys and values serve them all."""
        return self.hidden // HEAD_DIM


# ---- shape ------------------------------------------------------------------------------------------------------------


def shape_for(size_bytes: int, dtype: str, kind: str, vocab: int) -> Shape:
    """Dimensions whose checkpoint comes close to `size_bytes`; never below the smallest that vLLM serves."""
    parameters = size_bytes // BYTES_OF[dtype]
    layers = 2 if parameters < 8e6 else 4 if parameters < 32e6 else 8 if parameters < 500e6 else 16
    hidden = max(128, round(math.sqrt(parameters / (12 * layers)) / 128) * 128)
    rest = parameters - 2 * vocab * hidden - layers * 2 * hidden * (hidden + KV_HEADS * HEAD_DIM)
    intermediate = max(128, round(rest / (layers * 3 * hidden) / 64) * 64)
    return Shape(kind, vocab, hidden, intermediate, layers)


def tensors(shape: Shape) -> List[Tensor]:
    """Every tensor in the order in which Transformers writes them."""
    hidden, kv = shape.hidden, KV_HEADS * HEAD_DIM
    result = [Tensor("model.embed_tokens.weight", (shape.vocab, hidden))]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        result += [
            Tensor(at + f"self_attn.{p}_proj.weight", (n, hidden))
            for p, n in (("q", hidden), ("k", kv), ("v", kv))
        ]
        if shape.kind == "qwen2":
            result += [
                Tensor(at + f"self_attn.{p}_proj.bias", (n,))
                for p, n in (("q", hidden), ("k", kv), ("v", kv))
            ]
        result += [
            Tensor(at + "self_attn.o_proj.weight", (hidden, hidden)),
            Tensor(at + "mlp.gate_proj.weight", (shape.intermediate, hidden)),
            Tensor(at + "mlp.up_proj.weight", (shape.intermediate, hidden)),
            Tensor(at + "mlp.down_proj.weight", (hidden, shape.intermediate)),
            Tensor(at + "input_layernorm.weight", (hidden,), 1.0),
            Tensor(at + "post_attention_layernorm.weight", (hidden,), 1.0),
        ]
    return result + [
        Tensor("model.norm.weight", (hidden,), 1.0),
        Tensor("lm_head.weight", (shape.vocab, hidden)),
    ]


def config(shape: Shape, dtype: str) -> Dict[str, Any]:
    """config.json as Transformers writes it for this architecture."""
    common: Dict[str, Any] = {
        "architectures": [ARCHITECTURES[shape.kind]],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": SIGMA,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "model_type": shape.kind,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": TORCH_NAME[dtype],
        "transformers_version": "4.57.0",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if shape.kind == "llama":
        return dict(common, attention_bias=False, mlp_bias=False, head_dim=HEAD_DIM)
    return dict(common, use_sliding_window=False)


# ---- weights ----------------------------------------------------------------------------------------------------------


def below(x: float) -> float:
    """Share of N(0, SIGMA²) below x."""
    return 0.5 * (1 + math.erf(x / (SIGMA * math.sqrt(2))))


def value_of(high: int, dtype: str) -> float:
    """The float whose high byte is `high` and whose other bytes are zero."""
    raw = bytes([high])
    if dtype == "F16":
        return float(struct.unpack(">e", raw + b"\0")[0])
    return float(struct.unpack(">f", raw + b"\0\0\0")[0])


def high_byte_table(dtype: str) -> bytes:
    """256 high bytes, each as often as the Gaussian has it: a uniform random byte indexes it.

    >>> table = high_byte_table("F16")
    >>> len(table), sum(byte < 0x80 for byte in table)
    (256, 128)
    """
    last = 0x7B if dtype == "F16" else 0x7E  # above lie infinities
    edges = [value_of(high, dtype) for high in range(last + 1)]
    shares = [2 * (below(top) - below(bottom)) for bottom, top in zip(edges, edges[1:])]
    exact = [share * 128 for share in shares]
    counts = [int(part) for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda high: counts[high] - exact[high])
    for high in by_rest[: 128 - sum(counts)]:
        counts[high] += 1
    positive = bytes(high for high, count in enumerate(counts) for _ in range(count))
    return positive + bytes(high | 0x80 for high in positive)


def noise(tensor: Tensor, dtype: str, seed: int) -> Iterator[bytes]:
    """Little-endian bytes of a Gaussian tensor, in chunks; a function of seed, name and shape only."""
    source = random.Random(f"{seed}/{tensor.name}/{tensor.shape}")
    table, width = high_byte_table(dtype), BYTES_OF[dtype]
    for start in range(0, tensor.size, CHUNK):
        count = min(CHUNK, tensor.size - start)
        chunk = bytearray(source.getrandbits(8 * width * count).to_bytes(width * count, "little"))
        chunk[width - 1 :: width] = chunk[width - 1 :: width].translate(table)
        yield bytes(chunk)


def one_value(value: float, dtype: str) -> bytes:
    """One float in `dtype`, little-endian."""
    if dtype == "F16":
        return struct.pack("<e", value)
    return struct.pack("<f", value)[-BYTES_OF[dtype] :]


def tensor_bytes(tensor: Tensor, dtype: str, seed: int) -> Iterator[bytes]:
    """The content of any tensor."""
    if tensor.constant is None:
        return noise(tensor, dtype, seed)
    return iter([one_value(tensor.constant, dtype) * tensor.size])


# ---- files ------------------------------------------------------------------------------------------------------------


def safetensors_header(content: Sequence[Tensor], dtype: str) -> bytes:
    """Length and JSON of a safetensors file, padded to 8 bytes."""
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in content:
        end = offset + tensor.size * BYTES_OF[dtype]
        header[tensor.name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shards_of(content: Sequence[Tensor], shards: int) -> List[List[Tensor]]:
    """Tensors in `shards` runs of about equal size, none empty."""
    total, done = sum(tensor.size for tensor in content), 0
    result: List[List[Tensor]] = [[] for _ in range(shards)]
    for position, tensor in enumerate(content):
        left = len(content) - position
        empty = [number for number, shard in enumerate(result) if not shard]
        wanted = min(shards - 1, done * shards // total)
        result[empty[0] if empty and left <= len(empty) else wanted].append(tensor)
        done += tensor.size
    return [shard for shard in result if shard]


def write_json(target: Path, content: Any) -> None:
    """JSON as Transformers writes it."""
    target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(out: Path, content: Sequence[Tensor], dtype: str, shards: int, seed: int) -> None:
    """model.safetensors, or numbered shards and their index."""
    parts = shards_of(content, shards)
    weight_map: Dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = (
            "model.safetensors"
            if len(parts) == 1
            else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        )
        weight_map.update((tensor.name, name) for tensor in part)
        with open(out / name, "wb") as shard:
            shard.write(safetensors_header(part, dtype))
            for tensor in part:
                shard.writelines(tensor_bytes(tensor, dtype, seed))
    if len(parts) > 1:
        total = sum(tensor.size for tensor in content)
        metadata = {"total_parameters": total, "total_size": total * BYTES_OF[dtype]}
        write_json(
            out / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map}
        )


def byte_alphabet() -> List[str]:
    """The 256 characters that byte-level BPE writes bytes as: printable ones stand for themselves.

    >>> alphabet = byte_alphabet()
    >>> alphabet[ord("a")], alphabet[ord(" ")], len(set(alphabet))
    ('a', 'Ġ', 256)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    names = {byte: chr(byte) for byte in printable}
    names.update({byte: chr(256 + number) for number, byte in enumerate(others)})
    return [names[byte] for byte in range(256)]


def merges() -> List[Tuple[str, str]]:
    """Merges that build " WORD" of MERGED_WORDS letter by letter."""
    pairs: Dict[Tuple[str, str], None] = {}
    for word in MERGED_WORDS:
        built = "Ġ"
        for letter in word:
            pairs[(built, letter)] = None
            built += letter
    return list(pairs)


def vocabulary() -> Dict[str, int]:
    """Token -> id: specials, bytes, merged tokens."""
    words = SPECIAL_TOKENS + byte_alphabet() + [left + right for left, right in merges()]
    return {word: number for number, word in enumerate(words)}


def tokenizer() -> Dict[str, Any]:
    """tokenizer.json: byte-level BPE."""
    vocab = vocabulary()
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "fuse_unk": False,
    }
    model.update({"end_of_word_suffix": None, "byte_fallback": False, "ignore_merges": False})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(flags, id=vocab[token], content=token) for token in SPECIAL_TOKENS],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": dict(model, vocab=vocab, merges=[list(pair) for pair in merges()]),
    }


def write_texts(out: Path, shape: Shape, dtype: str, parameters: int) -> None:
    """Everything but the weights."""
    special = {
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
    }
    write_json(out / "config.json", config(shape, dtype))
    write_json(
        out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    )
    write_json(out / "tokenizer.json", tokenizer())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    write_json(
        out / "tokenizer_config.json", dict(settings, **special, chat_template=CHAT_TEMPLATE)
    )
    write_json(out / "special_tokens_map.json", special)
    readme = README.format(title=out.name, kind=shape.kind, parameters=parameters)
    (out / "README.md").write_text(readme, encoding="utf-8")


def with_head(content: Sequence[Tensor], shape: Shape, head: str) -> List[Tensor]:
    """The tensors with another head in place of lm_head, for a model that writes no text."""
    _, labels = HEADS[head]
    if not labels:
        return list(content)
    kept = [tensor for tensor in content if tensor.name != "lm_head.weight"]
    return [*kept, Tensor("score.weight", (labels, shape.hidden))]


def write_head(out: Path, head: str) -> None:
    """What says in the files that a model has another head."""
    architecture, labels = HEADS[head]
    path = out / "config.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    value["architectures"] = [architecture]
    if labels:
        value["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
        value["label2id"] = {label: int(number) for number, label in value["id2label"].items()}
    write_json(path, value)
    if head == "embedding":
        package = "sentence_transformers.models"
        kinds = (("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"))
        modules = [
            {"idx": int(name), "name": name, "path": folder, "type": f"{package}.{kind}"}
            for name, folder, kind in kinds
        ]
        write_json(out / "modules.json", modules)
        (out / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": value["hidden_size"], "pooling_mode_lasttoken": True}
        write_json(out / "1_Pooling/config.json", pooling)


def make_model(
    out: Path,
    size_mb: float = 1,
    kind: str = "qwen2",
    dtype: str = "F16",
    shards: int = 2,
    seed: int = 0,
    head: str = "",
) -> Dict[str, str]:
    """Write a model into folder `out`; returns {relative path: sha256}. Same arguments and folder name, same bytes."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    vocab = -(-len(vocabulary()) // 64) * 64
    shape = shape_for(int(size_mb * 1e6), dtype, kind, vocab)
    content = with_head(tensors(shape), shape, head)
    write_weights(out, content, dtype, shards, seed)
    write_texts(out, shape, dtype, sum(tensor.size for tensor in content))
    if head:
        write_head(out, head)
    return {path.name: sha256(path) for path in sorted(out.iterdir()) if path.is_file()}


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def main(args: Optional[Sequence[str]] = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--size-mb", type=float, default=1, help="millions of bytes of weights, about"
    )
    parser.add_argument("--kind", choices=sorted(ARCHITECTURES), default="qwen2")
    parser.add_argument("--dtype", choices=sorted(BYTES_OF), default="F16")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head", choices=sorted(HEADS), default="")
    chosen = parser.parse_args(args)
    for name, digest in make_model(**vars(chosen)).items():
        print(digest, name, sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
