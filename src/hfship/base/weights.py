# SPDX-License-Identifier: Apache-2.0
"""Files of weights: which ones belong together, and which of them are missing.

Owns how an index is read, NAME.FORMAT.index.json, whose `weight_map` names for each tensor the file
that holds it; and the numbers of a series, NAME-00001-of-00003.safetensors. Never: reads weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import AbstractSet, Dict, Iterable, List, Set, Tuple

from hfship.base.content import check_relative_path
from hfship.base.errors import IntegrityError
from hfship.base.files import disk_error
from hfship.base.manifest import BRING_AGAIN
from hfship.base.reading import LIST_SIZE, parse_json, read_small

# The index that vLLM goes by; weights have others, too, where they are there in other formats.
WEIGHTS_INDEX = "model.safetensors.index.json"
INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")
_MOST_MISSING = 10_000  # names that a few hostile ones can ask for
_FILE = re.compile(r"\.(safetensors|gguf|pth)$|(^|/)pytorch_model[^/]*\.bin$")

# At most 9,999 of a series: a name decides how many are listed.
_SHARD = re.compile(r"-\d{5}-of-0(\d{4})\.safetensors$")


def whole_series(names: Iterable[str]) -> Set[str]:
    """All shards of the series that `names` belong to, whether they are there or not.

    >>> sorted(whole_series(["model-00002-of-00002.safetensors"]))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    whole = set(names)
    for name in list(whole):
        match = _SHARD.search(name)
        if not match:
            continue
        series = name[: match.start()]
        total = int(match[1])
        for index in range(total):
            number = index + 1
            shard = f"{series}-{number:05d}-of-{total:05d}.safetensors"
            whole.add(shard)

    return whole


def shards_named(folder: Path, index: str) -> Set[str]:
    """The files of weights that an index of a model folder names, as paths below the folder.

    Raises IntegrityError for an index that is none or names what cannot be a file of the model,
    DiskError.
    """
    path = folder / index
    prefix = index[: index.rfind("/") + 1]
    shards = set()
    try:
        content = read_small(path, LIST_SIZE)
        value = parse_json(content)
        names = value["weight_map"].values()
        for name in names:
            shard = f"{prefix}{name}"
            check_relative_path(shard)
            shards.add(shard)
    except OSError as exc:
        raise disk_error(exc, "read", path) from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        why = f"it names no files of weights ({type(exc).__name__}: {exc})"
        raise IntegrityError(f"{path} is damaged", why, BRING_AGAIN) from exc

    return shards


def missing_shards(folder: Path, paths: AbstractSet[str]) -> List[str]:
    """The files of weights that belong to others, or to an index, of a folder with these `paths`
    and that are not among them, sorted.

    An index of which nothing is there tells of another format, where the folder of the index has
    weights; but not the one that vLLM goes by. Raises as shards_named.
    """
    missing = _missing_of_series(paths)
    for index in paths:
        if not INDEX.search(index):
            continue
        shards = shards_named(folder, index)
        absent = shards - paths
        if absent == shards and _tells_of_another_format(index, paths):
            continue
        missing |= absent

    return sorted(missing)


def missing_of_those(kept: AbstractSet[str], dropped: Iterable[str]) -> List[str]:
    """Of the files that were dropped from a model, the numbered weights that belong to what was
    kept, by their series or by an index in their folder, sorted.

    >>> shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    >>> missing_of_those({shards[0], "config.json"}, [shards[2], "x-00001-of-00001.safetensors"])
    ['model-00003-of-00003.safetensors']
    >>> missing_of_those({"model.safetensors.index.json"}, shards[:1]) == shards[:1]
    True
    """
    series = whole_series(kept)
    indexed = {index.rpartition("/")[0] for index in kept if INDEX.search(index)}
    return sorted(
        path
        for path in dropped
        if path in series or (_SHARD.search(path) and path.rpartition("/")[0] in indexed)
    )


def _missing_of_series(paths: AbstractSet[str]) -> Set[str]:
    """The shards that belong to others by their numbers and are not among `paths`; when there are
    too many, not all of them."""
    series: Dict[Tuple[str, int], Set[str]] = {}
    for path in paths:
        match = _SHARD.search(path)
        if match:
            key = (path[: match.start()], int(match[1]))
            series.setdefault(key, set()).add(path)

    missing: Set[str] = set()
    for (_, total), shards in series.items():
        if len(shards) < total and len(missing) < _MOST_MISSING:
            missing |= whole_series([min(shards)]) - paths
    return missing


def _tells_of_another_format(index: str, paths: AbstractSet[str]) -> bool:
    folder, _, name = index.rpartition("/")
    if name == WEIGHTS_INDEX:
        return False
    return any(path.rpartition("/")[0] == folder and _FILE.search(path) for path in paths)
