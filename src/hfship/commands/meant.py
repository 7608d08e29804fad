# SPDX-License-Identifier: Apache-2.0
"""What people type who know other programs, and the words for it here. Pure.

Promises: the command that is proposed is the one that was typed, with the right words in it; a
value that may be secret is never repeated.
"""

from __future__ import annotations

import re
from typing import Dict, List, Mapping, Optional, Sequence

from hfship.base.errors import UsageError, command_line
from hfship.base.values import dataclass
from hfship.ops.jobs import public_words


@dataclass(frozen=True)
class Meant:
    """What stands for an option that is not known: another one, or none (""). `why` says it in
    words; `value` tells whether the option that was typed has a value, `keeps` whether the other
    one takes it."""

    instead: str
    why: str = ""
    value: bool = True
    keeps: bool = True


def _flag(instead: str, why: str = "") -> Meant:
    """What stands for an option without a value."""
    return Meant(instead, why, value=False, keeps=False)


_OUT = Meant("--output", "NAME/ or NAME.tar.zst appears in that folder")
_WORKERS = Meant("--jobs")
_RESUMES = _flag("", "every run goes on where the last one stopped")

# For all commands that have the option which is meant; then for single ones.
FOR_ALL: Mapping[str, Meant] = {
    "--out": _OUT,
    "--output-dir": _OUT,
    "--outdir": _OUT,
    "--dest": _OUT,
    "--target": _OUT,
    "--directory": _OUT,
    "-d": _OUT,
    "-C": _OUT,
    "--max-workers": _WORKERS,
    "--workers": _WORKERS,
    "--threads": _WORKERS,
    "--num-workers": _WORKERS,
    "-T": _WORKERS,
    "--resume": _RESUMES,
    "--resume-download": _RESUMES,
    "--continue": _RESUMES,
    "-c": _RESUMES,
    "--debug": _flag("--verbose"),
    "--silent": _flag("--quiet"),
    "--detach": _flag("--background"),
    "--overwrite": _flag("--force"),
    "--no-progress": _flag("--progress=none"),
    "--no-color": _flag("--color=never"),
    "--output-format": Meant("--json", keeps=False),
    "--format": Meant("--json", keeps=False),
}
FOR_ONE: Mapping[str, Mapping[str, Meant]] = {
    "fetch": {
        "--local-dir": Meant("--output", "NAME/ appears in that folder; --name NAME renames it"),
        "--cache-dir": Meant("--output", "NAME/ appears in that folder"),
        "--token": Meant(
            "--token-file=FILE", "a command line can be read by everybody", keeps=False
        ),
        "--allow-patterns": Meant("--include"),
        "--ignore-patterns": Meant("--exclude"),
        "--branch": Meant("--revision"),
        "--tag": Meant("--revision"),
        "--commit": Meant("--revision"),
        "--force-download": _flag("--repair", "what is there and right is not sent again"),
        "--limit": Meant("--limit-rate"),
        "--bwlimit": Meant("--limit-rate"),
        "--type": Meant("--repo-type"),
        "--local-dir-use-symlinks": Meant("", "a model folder holds plain files", keeps=False),
    },
    "pack": {
        "--compress": _flag("--profile=smallest", "--profile store packs without"),
        "--compression-level": Meant("--level"),
        "--no-compress": _flag("--profile=store"),
        "--volume-size": Meant("--split"),
        "--size": Meant("--split"),
    },
    "push": {
        "--dry-run": _flag("", "push asks for room first, and sends only what is not there yet"),
        "--limit-rate": Meant("--bwlimit"),
        "-P": _RESUMES,
    },
    "serve": {
        "--dry-run": _flag("--plan"),
        "--tp": Meant("--tensor-parallel-size"),
        "--tensor-parallel": Meant("--tensor-parallel-size"),
        "--gpu": Meant("--gpus"),
        "--num-gpus": Meant("--tensor-parallel-size"),
        "--ctx": Meant("--max-model-len"),
        "--context-length": Meant("--max-model-len"),
        "--max-len": Meant("--max-model-len"),
        "--gpu-util": Meant("--gpu-memory-utilization"),
        "--model-name": Meant("--served-model-name"),
        "--listen": Meant("--host"),
        "--bind": Meant("--host"),
        "--api-key": Meant("", "the key is made once and lies in the deployment's .env"),
        "--cpu": _flag("--device=cpu"),
    },
    "clean": {"--force": _flag("--yes")},
    "mirror": {
        "--token": Meant(
            "--token-file=FILE", "a command line can be read by everybody", keeps=False
        ),
        "--bind": Meant("--host"),
        "--listen": Meant("--host"),
    },
}
# Commands of other programs, and the words here.
COMMANDS_MEANT: Mapping[str, str] = {
    "download": "fetch",
    "pull": "fetch",
    "get": "fetch",
    "snapshot-download": "fetch",
    "ls": "list",
    "images": "list images",
    "ps": "status",
    "top": "watch",
    "jobs": "watch",
    "tail": "logs",
    "log": "logs",
    "up": "serve",
    "start": "serve",
    "run": "serve",
    "deploy": "serve",
    "down": "stop",
    "kill": "stop",
    "rm": "clean",
    "cp": "push",
    "upload": "push",
    "rsync": "push",
    "send": "push",
    "tar": "pack",
    "compress": "pack",
    "extract": "unpack",
    "untar": "unpack",
    "import": "unpack",
    "check": "verify",
    "plan": "serve --plan",
    "config": "models",
    "man": "help",
}


def command_meant(words: Sequence[str]) -> Optional[UsageError]:
    """The error for a command of another program, None for a word that is none.

    >>> print(command_meant(["download", "Qwen/Qwen3-8B"]).text())
    hfship: there is no command download; it is called fetch here
      next  hfship fetch Qwen/Qwen3-8B
    """
    meant = COMMANDS_MEANT.get(words[0])
    if meant is None:
        return None
    what = f"there is no command {words[0]}; it is called {meant} here"
    ours = [*meant.split(), *words[1:]]
    replaced = _all_replaced(ours)
    return UsageError(what, "", _proposed(replaced))


def option_meant(words: Sequence[str], option: str, known: Sequence[str]) -> Optional[UsageError]:
    """The error for an option that the command of `words` does not know, and another program has;
    None where nobody can tell. `known` are the options of the command.

    >>> known = ["--jobs", "-j", "--output"]
    >>> print(option_meant(["fetch", "a/b", "--max-workers", "8"], "--max-workers", known).text())
    hfship: fetch does not know --max-workers; it is called --jobs here
      next  hfship fetch a/b --jobs 8
    """
    command = words[0]
    meant = _meaning(command, option)
    if meant is None:
        return None
    name = meant.instead.partition("=")[0]
    if name and name not in known:
        return None
    called = "leave it out"
    if meant.instead:
        called = f"it is called {meant.instead.replace('=', ' ')} here"
    what = f"{command} does not know {option}; {called}"
    return UsageError(what, meant.why, _proposed(_all_replaced(words)))


def _meaning(command: str, option: str) -> Optional[Meant]:
    own_rows = FOR_ONE.get(command, {})
    if option in own_rows:
        return own_rows[option]
    return FOR_ALL.get(option)


def _all_replaced(words: Sequence[str]) -> List[str]:
    """The words with every option of another program replaced."""
    new = list(words)
    for word in words[1:]:
        if word == "--":
            break
        option = word.partition("=")[0]
        meant = _meaning(words[0], option)
        if meant:
            new = _replaced(new, option, meant)
    return new


def _replaced(words: Sequence[str], option: str, meant: Meant) -> List[str]:
    """The words with the option that is meant; those behind `--` stay."""
    new: List[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            return [*new, word, *left]
        name, has_value, value = word.partition("=")
        if name != option:
            new.append(word)
            continue
        values = [value]
        if not has_value:
            values = left[:1] if meant.value else []
            del left[: len(values)]
        if meant.instead:
            new += meant.instead.split("=")
        if meant.keeps:
            new += values
    return new


def _proposed(words: Sequence[str]) -> str:
    """A command to type; only its beginning where a value may be secret."""
    public = public_words(words)
    if public == tuple(words):
        return command_line("hfship", *words)
    return f"hfship {words[0]} --help"


def file_meant(repos: Sequence[str]) -> Dict[str, List[str]]:
    """What `fetch REPO FILE...` means, as hf has it: the files of each repository; {} where no
    word looks like a file.

    >>> file_meant(["Qwen/Qwen3-8B", "config.json", "*.safetensors"])
    {'Qwen/Qwen3-8B': ['config.json', '*.safetensors']}
    >>> file_meant(["Qwen/Qwen3-8B", "org/other"])
    {}
    """
    first, *others = repos
    files = [word for word in others if _A_FILE.search(word)]
    if not files:
        return {}
    return {first: files}


_A_FILE = re.compile(
    r"\.(json|safetensors|gguf|bin|pt|pth|txt|md|model|py|onnx|jinja|tiktoken|h5|msgpack"
    r"|yaml|yml|zip|parquet|csv|jsonl|pdf|tar|gz)$|[*?\[]",
    re.IGNORECASE,
)
