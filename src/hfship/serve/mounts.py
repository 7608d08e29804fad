# SPDX-License-Identifier: Apache-2.0
"""What a container is given beside the model: a chat template, LoRA adapters, folders of the host.

Owns where the container sees them, the arguments of vLLM that name them, and the paths of the host
in what the operator passes on to vLLM.
Promises: all is given read-only. A path that the container would not see is refused, with the
option that shows it to it. Never: asks docker.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from hfship.base.errors import HostError, NotFoundError, UsageError, command_line
from hfship.base.values import dataclass
from hfship.serve.model_folder import read_json

if TYPE_CHECKING:
    from hfship.serve.terms import Plan

# Where the container finds what it is given.
TEMPLATE_PATH = "/hfship/chat_template.jinja"
ADAPTERS_PATH = "/adapters"
MOUNTS_PATH = "/mnt"

# What vLLM takes for --max-lora-rank: config/lora.py of 0.8.3 and 0.33.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_LORA_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
# What would show the container more than files of a model: the host, or a way to rule it.
_NEVER_MOUNTED = frozenset({"/", "/dev", "/proc", "/run", "/sys", "/var/run"})
# Words of arguments that may be paths; those that a container has itself, and may write to.
_PATH = re.compile(r"[^\s\"'=,{}\[\]]*/[^\s\"'=,{}\[\]]*")
_SCRATCH = frozenset({"/tmp", "/dev/null", "/dev/shm", "/root/.cache"})


# -- adapters


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its name in the API, its folder here, and its rank."""

    name: str
    folder: Path
    rank: int


def adapter_parts(text: str) -> Tuple[str, str]:
    """(name, folder) of an adapter, NAME=DIR. Raises UsageError.

    >>> adapter_parts("sql=/data/lora/sql")
    ('sql', '/data/lora/sql')
    """
    name, _, folder = text.partition("=")
    good_name = _ADAPTER_NAME.match(name)
    if not good_name or not folder:
        what = f"{text!r} is no adapter"
        why = "names have letters, digits and . _ -"
        step = "write it like --lora NAME=DIR"
        raise UsageError(what, why, step)

    return name, folder


def read_adapter(text: str) -> Adapter:
    """The adapter in a folder. Raises NotFoundError, HostError where vLLM would not load it."""
    name, place = adapter_parts(text)
    folder = Path(place)
    config = read_json(folder, "adapter_config.json")
    if not config:
        what = f"{folder} is no LoRA adapter"
        why = "it has no adapter_config.json"
        step = "name the folder of a LoRA adapter: --lora NAME=DIR"
        raise NotFoundError(what, why, step)

    files = [folder / weights for weights in _LORA_WEIGHTS]
    if not any(file.is_file() for file in files):
        what = f"{folder} is not whole"
        why = f"it has no {_LORA_WEIGHTS[0]}"
        raise NotFoundError(what, why, "bring the adapter again")

    problem = _adapter_problem(config)
    if problem:
        what = f"vLLM cannot load the adapter {name}"
        step = "make a plain LoRA adapter of it, or merge it into the model"
        raise HostError(what, problem, step)

    rank = adapter_rank(config)
    return Adapter(name, folder, rank)


def _adapter_problem(config: Mapping[str, Any]) -> str:
    """What vLLM does not load, in adapter_config.json; "" for nothing (lora/peft_helper.py)."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        return f"it is of type {kind}, not LORA"
    if config.get("use_dora"):
        return "it is a DoRA adapter"
    rank = adapter_rank(config)
    most = LORA_RANKS[-1]
    if not 0 < rank <= most:
        return f"its rank is {config.get('r')}, and vLLM has room for 1 to {most}"
    return ""


def adapter_rank(config: Mapping[str, Any]) -> int:
    """The rank of an adapter: the largest of its modules; 0 where it tells none.

    >>> adapter_rank({"r": 8, "rank_pattern": {"q_proj": 32}})
    32
    """
    found = [config.get("r")]
    patterns = config.get("rank_pattern")
    if isinstance(patterns, dict):
        found += patterns.values()

    ranks = [0]
    for rank in found:
        if isinstance(rank, int):
            ranks.append(rank)
    return max(ranks)


def rank_limit(adapters: Sequence[Adapter]) -> int:
    """The --max-lora-rank that holds all adapters, 0 for none.

    >>> rank_limit([Adapter("a", Path("/a"), 24)])
    32
    """
    if not adapters:
        return 0
    needed = max(adapter.rank for adapter in adapters)
    enough = [rank for rank in LORA_RANKS if rank >= needed]
    return min(enough)


# -- files and folders of the host


class Mount(NamedTuple):
    """A file or folder of the host, and where the container sees it, read-only."""

    host: str
    container: str


def mounts_of(plan: Plan) -> List[Mount]:
    """All that a container is given beside the model."""
    mounts = []
    if plan.chat_template:
        template = Mount(plan.chat_template, TEMPLATE_PATH)
        mounts.append(template)
    for text in plan.lora:
        name, folder = adapter_parts(text)
        adapter = Mount(folder, f"{ADAPTERS_PATH}/{name}")
        mounts.append(adapter)

    return mounts + folder_mounts(plan.mounts)


def folder_mounts(folders: Sequence[str]) -> List[Mount]:
    """Where the container sees the folders of --mount: under their names, or their names and a
    number where two have one name.

    >>> [mount.container for mount in folder_mounts(["/data/media", "/other/media"])]
    ['/mnt/media', '/mnt/media-2']
    """
    mounts: List[Mount] = []
    taken: Dict[str, int] = {}
    for folder in folders:
        last = os.path.basename(folder)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", last)
        count = taken.get(name, 0) + 1
        taken[name] = count
        if count > 1:
            name = f"{name}-{count}"
        mount = Mount(folder, f"{MOUNTS_PATH}/{name}")
        mounts.append(mount)

    return mounts


def mount_volumes(plan: Plan) -> List[Dict[str, Any]]:
    """The mounts as docker-compose.yml has them."""
    return [volume_of(mount) for mount in mounts_of(plan)]


def volume_of(mount: Mount) -> Dict[str, Any]:
    """A mount as docker-compose.yml has it."""
    return {
        "type": "bind",
        "source": mount.host,
        "target": mount.container,
        "read_only": True,
        "bind": {"create_host_path": False},
    }


def require_mount(folder: str) -> None:
    """Raise NotFoundError where no folder is, UsageError for one that tells too much."""
    real = os.path.realpath(folder)
    if not os.path.isdir(real):
        what = f"there is no folder {folder}"
        raise NotFoundError(what, "", "name a folder with --mount")

    if real in _NEVER_MOUNTED:
        what = f"{folder} is not given to a container"
        why = "a container that sees it rules the host, or reads all of it"
        raise UsageError(what, why, "name a smaller folder")


def refuse_host_paths(arguments: Sequence[str], mounts: Sequence[Mount], name: str) -> None:
    """Refuse arguments for vLLM that name files of this host which the container does not see.

    Raises UsageError, with the option that gives them to it.
    """
    own = [f"/models/{name}", *(mount.container for mount in mounts)]
    flag = ""
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument.partition("=")[0].replace("_", "-")
        for path in _host_paths(argument):
            if any(_is_below(path, place) for place in own):
                continue
            if seen_as(path, mounts) == path:
                raise _host_path_error(flag, path, name)


def _is_below(path: str, place: str) -> bool:
    if path == place:
        return True
    return path.startswith(f"{place}/")


def _host_paths(argument: str) -> Iterator[str]:
    """The paths in an argument that lead to something here: absolute, or from this folder."""
    for path in _PATH.findall(argument):
        if path in _SCRATCH or not path.strip("/"):
            continue
        here = os.path.expanduser(path)
        if os.path.exists(here):
            yield path


def _host_path_error(flag: str, path: str, name: str) -> UsageError:
    full = os.path.abspath(os.path.expanduser(path))
    folder = full
    if not os.path.isdir(full):
        folder = os.path.dirname(full)

    step = command_line("hfship", "serve", name, "--mount", folder) + " -- ... with the full path"
    if flag == "--chat-template":
        step = command_line("hfship", "serve", name, "--chat-template", full)
    elif flag == "--lora-modules":
        step = command_line("hfship", "serve", name, "--lora", f"NAME={full}")

    why = "it is a file of this machine, and the container has files of its own"
    return UsageError(f"vLLM would not find {path}", why, step)


def seen_as(text: str, mounts: Sequence[Mount]) -> str:
    """An argument with the folders of the host as the container sees them.

    >>> seen_as('--config=/data/a/x.yaml', [Mount("/data/a", "/mnt/a")])
    '--config=/mnt/a/x.yaml'
    """
    for mount in mounts:
        whole = re.escape(mount.host)
        pattern = rf"(?<![\w./-]){whole}(?=/|$|[\s\"',}}\]])"
        text = re.sub(pattern, mount.container, text)
    return text


def rights_to_read(roots: Sequence[str]) -> Tuple[str, ...]:
    """The right of root that a container needs to read these files and folders: without it root
    reads only what is its own, or open to all. None where that is enough."""
    for root in roots:
        for path in _all_below(root):
            with contextlib.suppress(OSError):
                if not _root_reads(os.stat(path)):
                    return ("DAC_OVERRIDE",)
    return ()


def _all_below(root: str) -> Iterator[str]:
    yield root
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            yield os.path.join(folder, name)


def _root_reads(status: os.stat_result) -> bool:
    """
    >>> _root_reads(os.stat_result([0o100640, 0, 0, 1, 1000, 0, 0, 0, 0, 0]))
    True
    >>> _root_reads(os.stat_result([0o100640, 0, 0, 1, 1000, 1000, 0, 0, 0, 0]))
    False
    """
    wanted = 0o4
    if stat.S_ISDIR(status.st_mode):
        wanted = 0o5
    granted = status.st_mode
    if status.st_uid == 0:
        granted >>= 6
    elif status.st_gid == 0:
        granted >>= 3
    return granted & wanted == wanted


# -- the arguments


def mount_arguments(plan: Plan) -> Mapping[str, Sequence[str]]:
    """Flags of `vllm serve` and their values, for what the container is given."""
    arguments: Dict[str, Sequence[str]] = {}
    if plan.chat_template:
        arguments["--chat-template"] = [TEMPLATE_PATH]
    if not plan.lora:
        return arguments

    modules = []
    for text in plan.lora:
        name, _ = adapter_parts(text)
        modules.append(f"{name}={ADAPTERS_PATH}/{name}")
    arguments["--enable-lora"] = []
    arguments["--max-lora-rank"] = [str(plan.max_lora_rank)]
    arguments["--lora-modules"] = modules
    return arguments


def passed_on(plan: Plan) -> List[str]:
    """What the operator gives after `--`, with paths as the container sees them."""
    mounts = mounts_of(plan)
    return [seen_as(argument, mounts) for argument in plan.extra_args]
