# SPDX-License-Identifier: Apache-2.0
"""What each version of vLLM knows: options, architectures, quantisation methods, parsers, routes.

Owns how vllm_table.json is read, which build_vllm_table.py makes from vLLM's wheels (its format is
told there). Not every version was looked at: of one between two of the list it is known what both
have. Versions before and after the list are taken for its first and last.
Never: asks an image.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Tuple

from hfship.base.pyz import own_entry
from hfship.serve.terms import NEWEST, Version

FLAGS, ARCHITECTURES, QUANTIZATIONS = "flags", "architectures", "quantizations"
TOOL_PARSERS, REASONING_PARSERS, ROUTES = "tool_parsers", "reasoning_parsers", "routes"

_ENTRY = "hfship/serve/vllm_table.json"
_OLDEST: Version = (0, 0, 0)


# Since then vLLM puts another head on a model that it knows.
CONVERTS_SINCE: Version = (0, 10, 0)
_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForTextEncoding",
    "EmbeddingModel",
    "ForRewardModeling",
    "RewardModel",
)
_BASES = ("ForCausalLM", "ForConditionalGeneration", "Model")


def parse_version(text: str) -> Optional[Version]:
    """The version in an image tag or in what `vllm --version` prints.

    >>> [parse_version(text) for text in ("v0.8.3", "0.32.0+cpu", "v0.11.0rc2-cu129", "latest")]
    [(0, 8, 3), (0, 32, 0), (0, 11, 0), None]
    """
    match = re.search(r"(?:^|[^\d.])v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})(?!\d)", text, re.ASCII)
    if not match:
        return None

    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def version_text(version: Version) -> str:
    """The version for people."""
    if version == NEWEST:
        return "unknown"
    return ".".join(map(str, version))


class Interval(NamedTuple):
    """The first and the last version of the list that have something; open ends have all before
    and after the list."""

    first: Version
    last: Version

    def text(self) -> str:
        """For people.

        >>> Interval((0, 10, 0), NEWEST).text(), Interval((0, 0, 0), (0, 12, 0)).text()
        ('from 0.10.0 on', 'up to 0.12.0')
        """
        first = version_text(self.first)
        if self.last == NEWEST:
            return f"from {first} on"

        last = version_text(self.last)
        if self.first == _OLDEST:
            return f"up to {last}"
        return f"from {first} to {last}"


@lru_cache(maxsize=None)
def _table() -> Mapping[str, Any]:
    value: Mapping[str, Any] = json.loads(own_entry(_ENTRY))
    return value


@lru_cache(maxsize=None)
def _of_kind(kind: str) -> Mapping[str, Tuple[Interval, ...]]:
    """The intervals of all names of a kind."""
    found: Dict[str, List[Interval]] = {}
    table = _table()
    for text, names in table[kind].items():
        first, _, last = text.partition("..")
        since = parse_version(first) or _OLDEST
        until = parse_version(last) or NEWEST
        interval = Interval(since, until)
        for name in names:
            intervals = found.setdefault(name, [])
            intervals.append(interval)

    return {name: tuple(intervals) for name, intervals in found.items()}


@lru_cache(maxsize=None)
def versions() -> Tuple[Version, ...]:
    """The versions that were looked at."""
    found = []
    table = _table()
    for text in table["versions"]:
        version = parse_version(text)
        if version:
            found.append(version)
    return tuple(found)


def intervals_of(kind: str, name: str) -> Tuple[Interval, ...]:
    """The versions that know a name of a kind; none where no version does.

    >>> [interval.text() for interval in intervals_of(FLAGS, "--task")]
    ['up to 0.12.0']
    """
    return _of_kind(kind).get(name, ())


def knows(version: Version, kind: str, name: str) -> bool:
    """Whether this vLLM surely knows a name of a kind; a class of models also as one that it makes
    of another.

    >>> knows((0, 8, 3), FLAGS, "--task"), knows(NEWEST, FLAGS, "--task")
    (True, False)
    >>> knows((0, 32, 0), ARCHITECTURES, "Qwen2ForSequenceClassification")
    True
    """
    if any(first <= version <= last for first, last in intervals_of(kind, name)):
        return True
    if kind != ARCHITECTURES or version < CONVERTS_SINCE:
        return False
    return any(knows(version, kind, base) for base in bases_of(name))


def bases_of(architecture: str) -> Tuple[str, ...]:
    """The classes of which vLLM makes one with another head: a classifier of a model that writes.

    (vllm/model_executor/models/registry.py: _normalize_arch; vllm/config/model.py:
    _SUFFIX_TO_DEFAULTS.)

    >>> bases_of("Qwen2ForSequenceClassification")
    ('Qwen2ForCausalLM', 'Qwen2ForConditionalGeneration', 'Qwen2Model')
    """
    for suffix in _HEADS:
        if architecture.endswith(suffix):
            stem = architecture[: -len(suffix)]
            return tuple(stem + base for base in _BASES)
    return ()


@lru_cache(maxsize=None)
def all_known(version: Version, kind: str) -> FrozenSet[str]:
    """The names of a kind that this vLLM knows."""
    known = set()
    for name in _of_kind(kind):
        if knows(version, kind, name):
            known.add(name)
    return frozenset(known)
