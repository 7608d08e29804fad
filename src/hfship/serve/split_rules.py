# SPDX-License-Identifier: Apache-2.0
"""How a model may be spread over GPUs: vLLM's rules.

Owns what a split is, and which splits vLLM refuses: tensor parallelism divides heads, channels and
vocabulary, a pipeline the layers, data parallelism has whole copies that share the experts, and
expert parallelism gives each GPU whole experts. Pure.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from hfship.serve.state_cache import divide_up

if TYPE_CHECKING:
    from hfship.serve.facts import ModelFacts

LEAST_BLOCK = 32  # channels; no kernel takes finer FP8 blocks
VOCABULARY_STEP = 64  # vLLM pads the vocabulary to a multiple of this

# Classes without pipeline parallelism in vLLM 0.32: those of its registry without supports_pp.
_WITHOUT_STAGES = re.compile(
    r"Bert|Roberta|\A(Aria|CLIP|EmbeddingGemma|Fire|Gemma3n|Gemma3TextModel|Gte|HrmText|IQuestLoop"
    r"|Idefics3|Jina|NemotronParse|OpenAIPrivacy|PaddleOCRVL|Phi4MM|Siglip|SmolVLM|Voyage|Whisper)"
)


class Split(NamedTuple):
    """Sizes of tensor, pipeline and data parallelism, and whether experts stay whole."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    whole_experts: bool = False

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return self.tp * self.pp * self.dp

    @property
    def cuts_of_experts(self) -> int:
        """Into how many parts each expert is cut: copies share them, too."""
        if self.whole_experts:
            return 1
        return self.tp * self.dp

    @property
    def flags(self) -> str:
        """As `hfship serve` takes it.

        >>> Split(2, 3).flags, Split(dp=4).flags
        ('--tensor-parallel-size 2 --pipeline-parallel-size 3', \
'--tensor-parallel-size 1 --data-parallel-size 4')
        """
        words = [f"--tensor-parallel-size {self.tp}"]
        if self.pp > 1:
            words.append(f"--pipeline-parallel-size {self.pp}")
        if self.dp > 1:
            words.append(f"--data-parallel-size {self.dp}")

        return " ".join(words)

    def __str__(self) -> str:
        """
        >>> str(Split(2)), str(Split(1, 3)), str(Split(2, 1, 4))
        ('TP=2', 'TP=1 PP=3', 'TP=2 DP=4')
        """
        words = [f"TP={self.tp}"]
        if self.pp > 1:
            words.append(f"PP={self.pp}")
        if self.dp > 1:
            words.append(f"DP={self.dp}")

        return " ".join(words)


def split_problem(facts: ModelFacts, split: Split) -> str:
    """Why vLLM cannot split the model so, "" when it can: its divisibility rules."""
    return _stages_problem(facts, split) or _rank_problem(facts, split)


def _rank_problem(facts: ModelFacts, split: Split) -> str:
    tp = split.tp
    if split.tp * split.dp == 1:
        return ""
    return (
        _heads_problem(facts, tp)
        or _states_problem(facts, tp)
        or _vision_problem(facts, tp)
        or _vocabulary_problem(facts, tp)
        or _mlp_problem(facts, split)
        or _kv_rows_problem(facts, tp)
    )


def _stages_problem(facts: ModelFacts, split: Split) -> str:
    """Each stage of a pipeline has at least a layer."""
    if split.pp == 1:
        return ""
    if _WITHOUT_STAGES.search(facts.architecture):
        return f"vLLM runs {facts.architecture} without pipeline parallelism only"
    if split.pp > facts.layers:
        return f"{facts.layers} layers are fewer than {split.pp} stages"
    return ""


def _heads_problem(facts: ModelFacts, tp: int) -> str:
    if facts.heads % tp:
        return f"{facts.heads} attention heads are not divisible by {tp}"
    if facts.mla_dim or not facts.kv_heads:
        return ""
    # KV heads are divided among the GPUs, or, where there are fewer, replicated evenly.
    if facts.kv_heads % tp and tp % facts.kv_heads:
        return f"{facts.kv_heads} KV heads cannot be spread over {tp} GPUs"

    return ""


def _states_problem(facts: ModelFacts, tp: int) -> str:
    """Heads of states are divided like others; groups of Mamba 2 too, unless there is only one.

    (vllm/model_executor/layers/mamba/mamba_mixer2.py.)
    """
    for heads in facts.state.heads:
        if heads % tp:
            return f"{heads} heads of states are not divisible by {tp}"
    groups = facts.state.groups
    if groups > 1 and groups % tp:
        return f"{groups} groups of Mamba are not divisible by {tp}"
    return ""


def _vision_problem(facts: ModelFacts, tp: int) -> str:
    if facts.vision_heads % tp:
        return f"{facts.vision_heads} heads of the vision encoder are not divisible by {tp}"
    if facts.vision_intermediate % tp:
        channels = f"the vision encoder's {facts.vision_intermediate} channels"
        return f"{channels} are not divisible by {tp}"

    return ""


def _vocabulary_problem(facts: ModelFacts, tp: int) -> str:
    steps = divide_up(facts.vocab, VOCABULARY_STEP)
    padded = steps * VOCABULARY_STEP
    if padded % tp:
        return f"a vocabulary of {facts.vocab} does not divide by {tp}"
    return ""


def _mlp_problem(facts: ModelFacts, split: Split) -> str:
    """Channels of the MLP are divided among the GPUs, and no quantisation scale may be cut."""
    plain, of_experts = facts.intermediate, facts.moe_intermediate
    if facts.experts and not of_experts:  # Mixtral: all layers are experts
        plain, of_experts = 0, facts.intermediate
    return _channels_problem(facts, plain, split.tp, finer=False) or _channels_problem(
        facts, of_experts, split.cuts_of_experts, finer=True
    )


def _channels_problem(facts: ModelFacts, channels: int, parts: int, finer: bool) -> str:
    if channels % parts:
        return f"the MLP's {channels} channels are not divisible by {parts}"
    if parts == 1:
        return ""
    per_gpu = channels // parts
    cut = _cut_scales(facts, per_gpu)
    if not cut or (finer and _can_be_finer(facts, per_gpu)):
        return ""

    return f"the MLP's {channels} channels over {parts} GPUs cut through {cut}"


def _cut_scales(facts: ModelFacts, channels: int) -> str:
    """The quantisation scales that a GPU with so many channels would hold in part."""
    quant = facts.quantization
    if quant is None:
        return ""
    if any(channels % block for block in quant.block):
        return f"the {max(quant.block)}-wide FP8 blocks"
    if quant.method == "mxfp4":  # its kernels pad
        return ""
    if quant.group and channels % quant.group:
        return f"{quant.method}'s groups of {quant.group}"

    return ""


def _can_be_finer(facts: ModelFacts, channels: int) -> bool:
    """Whether the scales of experts are made finer as they are loaded, so that no split cuts them.

    (vllm/model_executor/layers/fused_moe/oracle/fp8.py: refine_fp8_moe_block_shape.)
    """
    if not facts.finer_blocks or facts.quantization is None:
        return False
    step = math.gcd(channels, facts.hidden)
    for block in facts.quantization.block:
        step = math.gcd(step, block)
    return bool(facts.quantization.block) and step >= LEAST_BLOCK


def _kv_rows_problem(facts: ModelFacts, tp: int) -> str:
    """FP8 blocks may not be cut by the rows of the K and V projections of one GPU either."""
    quant = facts.quantization
    if quant is None or not quant.block:
        return ""
    if facts.mla_dim or facts.finer_blocks:
        return ""

    width = quant.block[0]
    rows = kv_heads_per_gpu(facts.kv_heads, tp) * facts.head_dim
    if rows % width:
        return f"{rows} rows of KV heads per GPU cut through the {width}-wide FP8 blocks"

    return ""


def kv_heads_per_gpu(kv_heads: int, tp: int) -> int:
    """KV heads beyond the number of GPUs are divided, fewer are replicated."""
    if not kv_heads:
        return 0
    return max(1, kv_heads // tp)
