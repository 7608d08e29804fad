# SPDX-License-Identifier: Apache-2.0
"""What may stand in a models file: keys, made from the options of the commands.

Promises: an option that a command gains is a key of models files without another line of code, and
what a file says is read as the command line is.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence

from hfship.base.imagefacts import PLATFORM
from hfship.base.manifest import make_manifest
from hfship.base.modelsfile import Key, read_models_file
from hfship.base.settings import FOLDERS, home_path
from hfship.commands.context import DEFAULT_OPTIONS, MODEL_OPTIONS
from hfship.commands.options import gpu_list, port_number, positive_number, share_of_one
from hfship.commands.parser import file_options
from hfship.commands.sitekeys import copy_keys, site_keys, site_mistakes

if TYPE_CHECKING:
    from hfship.base.settings import ListedModel, ModelsFile
    from hfship.commands.context import Command

# How JSON names the kind of the values that a type of argparse reads; else they are strings.
KINDS: Mapping[Callable[[str], Any], str] = {
    positive_number: "integer",
    port_number: "integer",
    int: "integer",
    share_of_one: "number",
}
# Options of `serve` for one model, that cannot be said of all.
ONE_MODEL_KEYS = ("name", "port", "aliases", "served_model_name")


def key_name(action: argparse.Action) -> str:
    """The key of an option: its name, in the plural where its dest is (--alias, aliases)."""
    name = action.option_strings[0][2:].replace("-", "_")
    if action.dest.startswith(name):
        return action.dest
    return name


def option_key(action: argparse.Action) -> Key:
    """What a models file may say for an option; argparse's own conversion reads it."""
    about = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    convert: Callable[[str], Any] = str
    if callable(action.type):
        convert = action.type

    def read_variables(items: Mapping[str, Any]) -> List[Any]:
        values = texts(items.values())
        return [convert(f"{name}={value}") for name, value in zip(items, values)]

    if action.nargs == 0:
        return Key("boolean", about)
    if action.dest == "name":
        return Key("string", about, lambda name: make_manifest(name, ()).name)
    if action.metavar == "K=V":
        return Key("object", about, read_variables)
    if isinstance(action.default, list):
        return Key("array", about, lambda items: [convert(word) for word in texts(items)])
    if convert is gpu_list:
        return Key("array", about, lambda items: convert(",".join(texts(items))))

    kind = KINDS.get(convert, "string")
    return Key(kind, about, lambda value: convert(str(value)), tuple(action.choices or ()))


def texts(items: Iterable[Any]) -> List[str]:
    """Texts and whole numbers as texts. Raises ValueError for anything else."""
    items = list(items)
    if not all(isinstance(item, (str, int)) for item in items):
        shown = json.dumps(items, default=str)[:40]
        raise ValueError(f"expects texts or whole numbers, not {shown}")
    return [str(item) for item in items]


def models_schema() -> Key:
    """What may stand in a models file."""
    from hfship.commands.policykeys import policy_key
    from hfship.hub.protocol import parse_repo

    serve = {key_name(action): option_key(action) for action in file_options("serve").values()}
    serve_all = {name: key for name, key in serve.items() if name not in ONE_MODEL_KEYS}
    of_each = _keys_of(MODEL_OPTIONS)
    model = {
        "repo": Key("string", "ORG/NAME on the Hub", parse_repo),
        "name": serve["name"],
        **of_each,
        **copy_keys(),
        "serve": Key("object", "how it is served", inside=serve),
    }
    folders = {
        name: Key("string", f"folder; wins over it: {variable}")
        for name, (variable, _) in FOLDERS.items()
    }
    defaults = {
        "endpoint": Key("string", "Hub or mirror; wins over it: HF_ENDPOINT"),
        **folders,
        **_keys_of(DEFAULT_OPTIONS),
        **of_each,
        "image": serve["image"],
        "serve": Key("object", "how models are served", inside=serve_all),
    }
    top = {
        "defaults": Key("object", "for all models", inside=defaults),
        "model": Key("tables", "a model", inside=model),
        "image": image_key(),
        "policy": policy_key(),
        **site_keys(),
    }
    return Key("object", "models file of hfship", inside=top)


def _platform(text: str) -> str:
    """A platform as images name it. Raises ValueError."""
    if not PLATFORM.match(text):
        raise ValueError(f"{text!r:.50} is not like linux/amd64")
    return text


def image_key() -> Key:
    """[[image]]: container images that cross with the models."""
    from hfship.hub.registry_protocol import parse_reference

    about = "docker://[REGISTRY/]NAME:TAG, fetched and packed with the models"
    inside = {
        "reference": Key("string", about, parse_reference),
        "platform": Key("string", "of the machine that will run it: linux/amd64", _platform),
    }
    return Key("tables", "a container image", inside=inside)


def _keys_of(options: Mapping[str, Sequence[str]]) -> Dict[str, Key]:
    """The keys of some options, by command."""
    keys = {}
    for command, dests in options.items():
        actions = file_options(command)
        for dest in dests:
            action = actions[dest]
            keys[key_name(action)] = option_key(action)
    return keys


def models_file(args: argparse.Namespace) -> Optional[ModelsFile]:
    """The file of --models or HFSHIP_MODELS_FILE. Raises UsageError, NotFoundError."""
    path = getattr(args, "models_file", None) or os.environ.get("HFSHIP_MODELS_FILE")
    if not path:
        return None
    return read_models_file(home_path(path), models_schema(), (site_mistakes,))


def file_arguments(command: Command, model: ListedModel) -> Dict[str, Any]:
    """What a models file says of a model, as arguments of the command."""
    if command.name == "serve":
        said = model.serve
    elif command.name in MODEL_OPTIONS:
        said = model.wishes
    else:
        return {}

    arguments = {}
    for action in file_options(command.name).values():
        name = key_name(action)
        if name in said:
            arguments[action.dest] = option_key(action).read(said[name])

    return arguments
