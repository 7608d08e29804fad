# SPDX-License-Identifier: Apache-2.0
"""Which files of a repository are wanted. Pure.

Owns the patterns of --include and --exclude, and what is left out beside safetensors.

Promises: weights are left out only where vLLM has the same ones as safetensors; where names and
sizes leave a doubt, they are fetched. What is no weight, and no export of the model for another
program, is never left out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from glob import escape
from typing import (
    TYPE_CHECKING,
    Dict,
    FrozenSet,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from hfship.base.content import check_relative_path

if TYPE_CHECKING:
    from hfship.hub.protocol import RemoteFile

# As transformers names weights: NAME[.VARIANT][-SHARD].FORMAT, in older versions
# NAME[-SHARD][.VARIANT].FORMAT (utils/hub.py, modeling_utils._add_variant), with an index
# NAME.FORMAT.index[.VARIANT].json.
_WEIGHTS = re.compile(
    r"""
    (?P<name>(?:pytorch_|tf_|flax_|rust_)?model)
    (?P<variant>\.\w+?)??
    (?:-(?P<number>\d{5,6})-of-(?P<total>\d{5,6}))?
    (?P<older_variant>\.\w+?)??
    \.(?P<format>safetensors|bin|h5|msgpack|ot)
    (?P<index>\.index(?P<variant_of_index>\.\w+)?\.json)?
    \Z
    """,
    re.VERBOSE,
)
_CONSOLIDATED = re.compile(r"consolidated[.-]")  # the weights once more, as their authors keep them
# Exports for runtimes that vLLM does not have, as their tools name them: optimum, exporters.
_EXPORTED_FILES = ("*model*.onnx", "*model*.onnx[._]data*", "*.tflite")
# Folders beside the weights that hold exports; vLLM itself passes over original/
# (LoadConfig.ignore_patterns).
_EXPORT_FOLDERS = frozenset({"onnx", "openvino", "coreml", "original"})

_UNTOLD_BELOW = 1 << 20  # bytes; of less than that headers are the most, so sizes tell nothing
_LARGEST_RATIO = 2.5  # of other weights to safetensors; float32 beside bfloat16 has 2


def select_files(
    files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str]
) -> List[RemoteFile]:
    """The files that match one of `include` (all when empty) and none of `exclude`.

    Patterns are fnmatch on the whole path, as in `hf download`: `*` also crosses '/', and `dir/`
    means `dir/*`.

    >>> from hfship.hub.protocol import RemoteFile
    >>> files = [RemoteFile(p, 1, "") for p in ("a.json", "onnx/a.onnx")]
    >>> [f.path for f in select_files(files, [], ["onnx/"])]
    ['a.json']
    """
    selected = []
    for file in files:
        included = not include or _matches(file.path, include)
        if included and not _matches(file.path, exclude):
            selected.append(file)
    return selected


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Does a path match one of the patterns?"""
    for pattern in patterns:
        if pattern.endswith("/"):
            pattern += "*"
        if fnmatchcase(path, pattern):
            return True
    return False


# -- names that cannot be files of a model


def refusal_of(path: str) -> str:
    """Why a name of the Hub is refused, for people; "" when it is not.

    >>> refusal_of("a/b"), refusal_of("a\\tb")
    ('', "unsafe path 'a\\\\tb'")
    """
    try:
        check_relative_path(path)
    except ValueError as exc:
        return str(exc)
    return ""


def is_usable_path(path: str) -> bool:
    """Whether a name of the Hub can be a file of a model."""
    return not refusal_of(path)


def pattern_of(path: str) -> str:
    """A pattern for --exclude that matches a refused path and can be typed: its folder, where
    nothing in that can be used.

    >>> pattern_of("a\\tb[1].txt"), pattern_of(".hfship/lock")
    ('a?b[[]1].txt', '.hfship/')
    """
    folder, slash, _ = path.partition("/")
    if slash and not is_usable_path(f"{folder}/a"):
        path = f"{folder}/"
    typed = [one if one.isprintable() else "\0" for one in path]
    return escape("".join(typed)).replace("\0", "?")


# -- what is left out beside safetensors


def without_duplicates(files: Sequence[RemoteFile]) -> List[RemoteFile]:
    """The files less weights that lie beside them as safetensors, too, and less exports.

    >>> from hfship.hub.protocol import RemoteFile
    >>> names = ["model.safetensors", "pytorch_model.bin", "tower/pytorch_model.bin", "original/x"]
    >>> [f.path for f in without_duplicates([RemoteFile(n, 1, "") for n in names])]
    ['model.safetensors', 'tower/pytorch_model.bin']
    """
    listing = _Listing(files)
    return [file for file in files if not listing.has_twin(file.path)]


class _Group(NamedTuple):
    """Files that are one set of weights together: all shards of a format and variant."""

    folder: str
    name: str
    variant: str
    format: str

    @property
    def twin(self) -> _Group:
        """The safetensors that hold the same."""
        return self._replace(name="model", format="safetensors")


class _Weights(NamedTuple):
    """What the path of a file of weights, or of their index, tells."""

    group: _Group
    shard: Tuple[int, int] = (1, 1)  # its number, and how many there are
    is_index: bool = False


def _weights_at(path: str) -> Optional[_Weights]:
    """What a path tells of weights; None where it is none of transformers' names.

    >>> _weights_at("a/pytorch_model.fp16-00001-of-00002.bin").group
    _Group(folder='a', name='pytorch_model', variant='.fp16', format='bin')
    """
    folder, _, name = path.rpartition("/")
    if _CONSOLIDATED.match(name):
        return _Weights(_Group(folder, "consolidated", "", ""))

    match = _WEIGHTS.match(name)
    if match is None:
        return None
    variant = match["variant"] or match["older_variant"] or match["variant_of_index"] or ""
    group = _Group(folder, match["name"], variant, match["format"])
    shard = (1, 1)
    if match["number"]:
        shard = (int(match["number"]), int(match["total"]))
    return _Weights(group, shard, bool(match["index"]))


class _Listing:
    """The files of a repository by the sets of weights that they are."""

    def __init__(self, files: Sequence[RemoteFile]) -> None:
        self._paths: Set[str] = {file.path for file in files}
        self._sizes: Dict[_Group, int] = defaultdict(int)
        shards: Dict[_Group, Set[Tuple[int, int]]] = defaultdict(set)
        for file in files:
            weights = _weights_at(file.path)
            if weights is None or weights.is_index:
                continue
            self._sizes[weights.group] += file.size
            shards[weights.group].add(weights.shard)

        whole = [group for group, found in shards.items() if _are_whole(found)]
        self._whole: FrozenSet[_Group] = frozenset(whole)

    def has_twin(self, path: str) -> bool:
        """Whether vLLM reads safetensors instead of a file, or never reads it."""
        weights = _weights_at(path)
        if weights and self._covers(weights.group):
            return True
        if path.endswith(".bin") and not self._is_of_runtime(path):
            return False  # whoever publishes it so may read it from there

        folder, _, name = path.rpartition("/")
        in_export = self._is_in_export(folder)
        if _matches(name, _EXPORTED_FILES):
            return self._has_safetensors(folder) or in_export
        return in_export

    def _has_safetensors(self, folder: str) -> bool:
        return _Group(folder, "model", "", "safetensors") in self._whole

    def _covers(self, group: _Group) -> bool:
        """Whether the safetensors of its folder have all of a set of other weights."""
        twin = group.twin
        if group == twin or twin not in self._whole:
            return False

        size = self._sizes[group]
        most = _LARGEST_RATIO * self._sizes[twin]
        return size < _UNTOLD_BELOW or size <= most

    def _is_of_runtime(self, path: str) -> bool:
        """Whether a .bin belongs to OpenVINO, which has an .xml beside it, or to Core ML."""
        beside = path[: -len(".bin")] + ".xml"
        return beside in self._paths or ".mlpackage/" in path

    def _is_in_export(self, folder: str) -> bool:
        """Whether it is, or lies in, a folder of exports of the safetensors beside that."""
        while folder:
            parent, _, name = folder.rpartition("/")
            if name in _EXPORT_FOLDERS and self._has_safetensors(parent):
                return True
            folder = parent
        return False


def _are_whole(shards: Set[Tuple[int, int]]) -> bool:
    """Whether these are all shards of a series.

    >>> _are_whole({(1, 2), (2, 2)}), _are_whole({(2, 2)})
    (True, False)
    """
    found = Counter(total for number, total in shards if 1 <= number <= total)
    return any(count == total for total, count in found.items())
