# SPDX-License-Identifier: Apache-2.0
"""The runs of a command: one, or one for each model of a models file.

Promises: what the command line gives wins over the models file, that over the defaults. A list
goes on after the failure of one, and ends with one summary and one JSON list of results.
"""

from __future__ import annotations

import argparse
from collections import ChainMap
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence, Tuple

from hfship.base.errors import (
    Exit,
    HfshipError,
    Interrupted,
    UsageError,
    command_line,
    error_row,
)
from hfship.base.values import replace
from hfship.commands.results import error_of, exit_of_list, summarize_list
from hfship.commands.table import examples_of

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.base.settings import ListedModel, ModelsFile
    from hfship.commands.context import Command, Context

# Options that mean one model, by their dest.
ONE_MODEL_OPTIONS = {
    "name": "--name",
    "port": "--port",
    "served_names": "--served-model-name",
    "aliases": "--alias",
}
# Commands that do something sensible when no model is named, or say themselves what is missing.
WITHOUT_NAMES = ("pack", "push", "status")
# Those that carry images, too, which a models file names.
WITH_IMAGES = ("fetch", "pack", "push", "verify", "unpack")


def runs_of(command: Command, context: Context, file: ModelsFile) -> Dict[str, Context]:
    """One run of the command for each model that the file lists, and one for other words, by name.

    Words that the file does not know are refused where the command line named the file, and
    handed on as they are where HFSHIP_MODELS_FILE did.
    """
    from hfship.base.modelsfile import chosen_models

    words = getattr(context.args, command.models)
    chosen: Sequence[ListedModel]
    others: List[str] = []
    if context.args.models_file:
        chosen = chosen_models(file, words)
    else:
        meant = [(word, file.called(word)) for word in words]
        chosen = [model for _, model in meant if model]
        others = [word for word, model in meant if model is None]

    runs = _runs_of_models(command, context, chosen)
    if not words:
        runs.update(_runs_of_images(command, context, file))
    if others or not chosen:
        rest = _run_of(command, context, file.others, others)
        runs.update({", ".join(others): rest})
    return runs


def _runs_of_models(
    command: Command, context: Context, models: Sequence[ListedModel]
) -> Dict[str, Context]:
    """A run for each model, for `serve` and `stop` for each of its replicas; `status` looks at all
    of them in one."""
    if command.name in ("serve", "status", "stop") and context.file:
        from hfship.site.placement import deployments_of

        models = deployments_of(context.file, models, getattr(context.args, command.models))
    if command.name == "status" and models:
        deployments = [model.deployment for model in models]
        return {"status": _run_of(command, context, models[0], deployments)}
    runs = {}
    for model in models:
        name = model.name
        if command.name in ("serve", "stop"):
            name = model.deployment
        words = [_word_for(command, model)]
        runs[name] = _run_of(command, context, model, words)
    return runs


def _runs_of_images(command: Command, context: Context, file: ModelsFile) -> Dict[str, Context]:
    """A run for each [[image]], and for those that gateway and monitoring are made of, for commands
    that carry archives."""
    runs: Dict[str, Context] = {}
    if command.name not in WITH_IMAGES:
        return runs
    from hfship.hub.registry_protocol import SCHEME, parse_reference
    from hfship.site.settings import site_images, site_lacks

    tables = list(file.tables.get("image", ()))
    tables += [{"reference": SCHEME + name} for name in site_images(file)]
    for table in tables:
        reference = parse_reference(table["reference"])
        name = reference.folder_name
        word = name
        if command.name == "fetch":
            word = reference.url
        values = {**vars(context.args), command.models: [word]}
        if "platform" in values:
            values["platform"] = values["platform"] or table.get("platform")
        runs.setdefault(name, replace(context, args=argparse.Namespace(**values)))
    if command.name in ("fetch", "pack"):
        for key in site_lacks(file):
            why = "so its image does not travel with the rest: name the one that the site shall run"
            context.reporter.warn(f"{file.path} has no {key}, {why}")
    return runs


def _word_for(command: Command, model: ListedModel) -> str:
    """The word that means a model to a command."""
    if command.name == "fetch":
        return model.repo
    if command.name in ("stop", "restart"):
        return model.deployment
    return model.name


def _run_of(command: Command, context: Context, model: ListedModel, words: List[str]) -> Context:
    """The run for a model with these words, with what the file and the command line say."""
    from hfship.commands.modelskeys import file_arguments

    from_model: Dict[str, Any] = {}
    if command.name == "fetch" and model.name:
        from_model["name"] = model.name

    asked = {**from_model, **file_arguments(command, model), **context.asked}
    values = ChainMap({command.models: words}, asked, vars(context.args))
    args = argparse.Namespace(**values)
    if not model.name:  # what an earlier serve asked for beats what a file says of all models
        return replace(context, args=args, listed=False)

    return replace(context, args=args, asked=asked, listed=True)


def run_models(command: Command, context: Context) -> Exit:
    """Run the command: once, or for each model of a models file.

    Raises UsageError where there is nothing to do, or an option that means one of many models.
    """
    file = context.file
    if file and command.name == "serve" and "host" in file.tables and not _is_told(context):
        from hfship.commands.serve_hosts import serve_on_hosts

        # Also where HFSHIP_MODELS_FILE names it: what it does not list has no place on its hosts.
        named = argparse.Namespace(**{**vars(context.args), "models_file": str(file.path)})
        context = replace(context, args=named)
        return serve_on_hosts(context, runs_of(command, context, file))
    if file and command.name == "serve" and "gateway" in file.tables:
        from hfship.commands.serve_site import serve_site

        return serve_site(context, lambda: _run_all(command, context))
    return _run_all(command, context)


def _is_told(context: Context) -> bool:
    """Whether `serve` does here what a control host planned."""
    return bool(context.args.planned or context.args.gateway)


def _run_all(command: Command, context: Context) -> Exit:
    file = context.file
    runs = {"": context}
    if file and command.models and not _takes_a_medium(command, context):
        runs = runs_of(command, context, file)
    if len(runs) == 1:
        (only,) = runs.values()
        _require_names(command, only)
        return command.run(only)

    wrong = [option for dest, option in ONE_MODEL_OPTIONS.items() if dest in context.asked]
    if wrong and file:
        what = f"{wrong[0]} is for one model, not for {len(runs)}"
        raise UsageError(what, "", f"name one of: {', '.join(runs)}; or say it in {file.path}")

    if command.name == "serve":
        from hfship.commands.serve_host import planned_together

        runs = planned_together(runs)
    return run_list(command, runs, context.reporter)


def _takes_a_medium(command: Command, context: Context) -> bool:
    """Whether a command is for all that lies on a medium, whatever a models file lists."""
    return command.name == "unpack" and bool(context.args.all)


def _require_names(command: Command, run: Context) -> None:
    """Raise UsageError where a command that needs a name has none."""
    if _takes_a_medium(command, run):
        return
    if not command.models or command.name in WITHOUT_NAMES or getattr(run.args, command.models):
        return
    if getattr(run.args, "planned", []) or getattr(run.args, "gateway", False):
        return
    raise no_name_given(command.name, run)


def no_name_given(command: str, context: Context) -> UsageError:
    """The error of a command that needs a name and has none: what there is for it, and what to
    type."""
    from hfship.commands.listing import choices_for, choices_text

    choices = choices_for(command, context)
    if choices is None:  # what it takes is elsewhere
        why, step = "no name is given", examples_of(command)[0]
    elif choices:
        why = f"no name is given; there is:\n{choices_text(choices)}"
        step = _typed_for(command, choices[0].word)
    else:
        why = "no name is given, and nothing is here for it"
        step = "hfship list     # where it looks, and what there is"
    what = f"nothing to {command}"
    if command == "logs":
        what = "no log is chosen"
    return UsageError(what, why, f"{step}\nhfship {command} --help     # shows more")


def _typed_for(command: str, word: str) -> str:
    """What to type for one of the choices."""
    line = command_line("hfship", command, word)
    if command == "push":
        line += " [USER@]HOST:DIR"
    return line


def run_list(command: Command, runs: Mapping[str, Context], reporter: Reporter) -> Exit:
    """Run a command for each of a list; then one summary, and one JSON list of results."""
    codes: List[Exit] = []
    rows: List[Tuple[str, str]] = []
    with reporter.gather_results() as gathered:
        for number, (name, context) in enumerate(runs.items(), 1):
            reporter.run.forget_failure()
            with reporter.about(name, number, len(runs)):
                code = _run_one(command, name, context, gathered)
            why = ""
            if code != Exit.OK:
                why = code.name.lower().replace("_", " ")
            if why and reporter.run.failure:
                why = reporter.run.failure.what
            codes.append(code)
            rows.append((name, why))

    summarize_list(command.name, rows, reporter, always=True)
    return exit_of_list(codes)


def _run_one(command: Command, name: str, context: Context, gathered: List[Dict[str, Any]]) -> Exit:
    """Run a command for one of a list; its error is reported. Only Ctrl-C ends the list."""
    try:
        return command.run(context)
    except (HfshipError, OSError, KeyboardInterrupt) as exc:
        error = error_of(exc)
        gathered.append({"name": name, **error_row(error)})
        if isinstance(error, Interrupted):
            raise
        context.reporter.error(error)
        return error.code
