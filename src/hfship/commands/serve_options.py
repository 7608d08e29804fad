# SPDX-License-Identifier: Apache-2.0
"""The options of a deployment: as asked for now, or when it was served before, or the defaults.

Promises: a second `serve` without options changes nothing. What was asked for is kept in plan.json
(`wishes`), by dest of the options; --reset forgets it.
"""

from __future__ import annotations

import json
import shlex
from collections import ChainMap
from typing import TYPE_CHECKING, Any, Dict, List, Mapping

from hfship.base.settings import known_fields, parse_size
from hfship.base.values import replace
from hfship.commands.names import readable_deployments
from hfship.commands.parser import file_options
from hfship.serve.terms import ServeOptions

if TYPE_CHECKING:
    import argparse

    from hfship.commands.context import Context


def options_for(context: Context, name: str) -> ServeOptions:
    """The options for NAME: as asked for now, or when it was served before, or the defaults."""
    actions = file_options("serve")
    former = former_options(context, name, actions)
    if former:
        words: List[str] = []
        for dest, value in former.items():
            words += option_words(actions[dest], value)
        said = " ".join(shlex.quote(word) for word in words)
        kept = f"options kept from the last serve: {said} (--reset forgets them)"
        context.reporter.info(f"{name}: {kept}")

    asked = {}
    for dest, value in context.asked.items():
        if dest in actions and dest != "name":
            asked[dest] = value

    values = ChainMap(asked, former, vars(context.args))
    options = serve_options(values)
    as_text = json.dumps({**former, **asked})
    return replace(options, wishes=json.loads(as_text))  # as plan.json will have them


def serve_options(values: Mapping[str, Any]) -> ServeOptions:
    """The options in the values of arguments. Raises UsageError."""
    if values["shm_size"]:
        parse_size(values["shm_size"])
    env = {}
    for item in values["env"]:
        variable, _, value = item.partition("=")
        env[variable] = value

    gpus = []
    if values["gpus"] != "all":
        gpus = [gpu for gpu in values["gpus"].split(",") if gpu]
    return ServeOptions(**known_fields(ServeOptions, {**values, "env": env, "gpus": gpus}))


def former_options(
    context: Context, name: str, actions: Mapping[str, argparse.Action]
) -> Dict[str, Any]:
    """What NAME was served with, by dest, as far as it is not asked for anew; {} after --reset.

    A models file that lists the model says all anew. plan.json may have been edited: what is not of
    the type of the option is left out.
    """
    before: Mapping[str, Any] = {}
    for deployment in readable_deployments(context):
        if deployment.plan.name == name:
            before = deployment.plan.wishes

    if context.listed or context.args.reset:
        return {}

    kept = {}
    for dest, value in before.items():
        if dest not in actions or dest in context.asked:
            continue
        usual = getattr(context.args, dest)
        if isinstance(value, type(usual)):
            kept[dest] = value

    return kept


def option_words(action: argparse.Action, value: Any) -> List[str]:
    """An option and its value as words of a command line; of variables, which may be secret, dots.

    >>> import argparse
    >>> gpus = argparse.Action(["--gpus"], "gpus")
    >>> option_words(gpus, "0,1")
    ['--gpus', '0,1']
    """
    option = next(name for name in action.option_strings if name.startswith("--"))
    if value is True:
        return [option]
    if value is False:
        return []

    items = value if isinstance(value, list) else [value]
    words = []
    for item in items:
        shown = str(item)
        if action.metavar == "K=V":
            shown = item.partition("=")[0] + "=..."
        words += [option, shown]

    return words
