# SPDX-License-Identifier: Apache-2.0
"""Serving one model, as far as was asked for: find it, plan, write the files, start, wait.

Promises: two calls at a time do not choose the same port and GPUs; Ctrl-C while a model loads ends
the wait alone.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Mapping, Optional, Tuple

from hfship.archive.files import find_archives
from hfship.base.errors import (
    HostError,
    IntegrityError,
    Interrupted,
    NotFoundError,
    command_line,
    meant_step,
    nearest,
)
from hfship.base.files import remove_if_empty
from hfship.base.locks import FolderLock
from hfship.base.manifest import Manifest, make_manifest, read_manifest
from hfship.base.processes import Aside
from hfship.base.report import Reporter
from hfship.base.text import shorten
from hfship.base.values import replace
from hfship.commands.admission import require_servable, site_policy
from hfship.commands.approving import approve_served
from hfship.commands.names import (
    archive_names,
    archive_word,
    find_folder,
    model_names,
    readable_deployments,
    served_folder,
)
from hfship.commands.record import recorder_of
from hfship.commands.restore import NamedModel, Restore, restore_model
from hfship.commands.serve_check import Preflight
from hfship.commands.serve_options import options_for
from hfship.commands.serve_results import (
    PlannedModel,
    ServedModel,
    Sizing,
    WrittenDeployment,
    plan_summary,
)
from hfship.serve.cards import assumed_gpus
from hfship.serve.clients import with_clients
from hfship.serve.deployments import Deployment, read_key, write_deployment
from hfship.serve.docker import read_log, require_docker, would_restart
from hfship.serve.images import choose_device
from hfship.serve.measured import (
    Measured,
    as_measured,
    fits,
    informed_plan,
    measured_after,
    read_measured,
    write_measured,
)
from hfship.serve.model_folder import read_facts
from hfship.serve.mounts import (
    Adapter,
    folder_mounts,
    read_adapter,
    refuse_host_paths,
    require_mount,
)
from hfship.serve.parallel import kind_of, sizing
from hfship.serve.preflight import as_derived, remembered
from hfship.serve.proof import (
    TrustedFolder,
    prove_content,
    read_proven,
    refuse_changed,
    trust_folder,
    unproven,
)
from hfship.serve.start import LOG_LINES, start, wait_until_it_answers
from hfship.serve.survey import (
    Claims,
    Purpose,
    Request,
    decide,
    free_host,
    is_running,
    read_machine,
    survey,
)
from hfship.serve.terms import Host, Plan, ServeOptions
from hfship.site.placement import place_of
from hfship.site.rolling import drained
from hfship.site.spread import pinned
from hfship.site.store import gateway_folder

if TYPE_CHECKING:
    import argparse

    from hfship.base.report import Result
    from hfship.commands.context import Context
    from hfship.serve.choices import Choice
    from hfship.serve.explain import Line
    from hfship.serve.start import Started


def serve_model(context: Context, word: str) -> Result:
    """Serve one model, NAME or DIR, as far as was asked for."""
    engine: Optional[Aside[None]] = None
    if purpose_of(context.args) is Purpose.START:
        engine = Aside(require_docker)
    request = read_request(context, word)
    if context.together:
        request = pinned(request, context.together)
    if request.purpose is Purpose.SHOW:
        return show_plan(context, request)
    if engine:
        engine.result()
    preflight = Preflight(context)
    prove(context, request, preflight)
    result = start_model(context, request, preflight)
    while result is None:  # what vLLM derived is remembered, and the plan follows it
        result = start_model(context, request, Preflight(context))
    return result


def start_model(context: Context, request: Request, preflight: Preflight) -> Optional[Result]:
    """Plan, write the files, start, wait. None where another plan may live than that which died."""
    deploy_dir = context.settings.deploy_dir
    with contextlib.ExitStack() as stack:
        stack.callback(remove_if_empty, deploy_dir, not deploy_dir.exists())
        # Two at a time would choose the same port and GPUs.
        stack.enter_context(FolderLock(deploy_dir))
        before = kept_wishes(context, request.name)
        deployment = write_plan(context, request, preflight)
        if request.purpose is Purpose.WRITE:
            return WrittenDeployment(deployment)
        with forgotten_on_failure(context, deployment, before):
            restarts = start_replica(context, deployment)

    note_served(context, request)
    preflight.start_beside(deployment)
    try:
        with forgotten_on_failure(context, deployment, before):
            result = wait_for(context, request, deployment, restarts)
    except HostError:
        if preflight.died():
            context.reporter.info(f"{request.name} starts again with what vLLM derives")
            return None
        raise
    preflight.answered()
    return result


def note_served(context: Context, request: Request) -> None:
    """Note in the model's log of custody that it was started here."""
    folder = request.model.folder
    manifest = read_manifest(folder)
    if manifest:
        details = {"deployment": request.name}
        recorder_of(context).note_in_folder(folder, "served", manifest, details)


def start_replica(context: Context, deployment: Deployment) -> int:
    """Start a deployment; one behind a gateway is let go of by its clients first, if it has to
    restart. The number of restarts before."""
    if not deployment.plan.network or not would_restart(deployment):
        return start(deployment)

    name = deployment.plan.name
    context.reporter.info(f"{name}: waiting until its requests are answered")
    with drained(gateway_folder(context.settings.deploy_dir), name, context.reporter) as idle:
        if not idle:
            context.reporter.warn(f"{name}: requests that took too long were cut off")
        return start(deployment)


def read_request(context: Context, word: str) -> Request:
    """What is to be served, and how: the folder is found or unpacked, its facts are read."""
    args, reporter = context.args, context.reporter
    folder = find_served_model(context, word)
    name = make_manifest(args.name or folder.name, ()).name  # refuses what cannot be a name
    options = options_for(context, name)
    manifest = read_manifest(folder)
    facts = with_clients(read_facts(folder, options.allow_changed), folder, options)
    adapters = read_adapters(options, name, reporter)
    trusted = trusted_as_needed(context, folder, manifest, options)
    policy = site_policy(context)
    require_servable(folder, manifest, options, policy, reporter)
    approve_served(folder, manifest, policy)
    served_names = options.served_names
    if not served_names:
        # Clients know the model by its name here or by its name on the Hub.
        served_names = (name,)
        if manifest and manifest.source:
            served_names = (name, manifest.source.repo)

    options = replace(options, served_names=(*served_names, *options.aliases))
    place = place_of(context.file, name)
    network = place.network if place else None
    return Request(
        name,
        trusted,
        facts,
        options,
        purpose_of(args),
        adapters,
        network,
    )


def trusted_as_needed(
    context: Context, folder: Path, manifest: Optional[Manifest], options: ServeOptions
) -> TrustedFolder:
    """The model as far as it is trusted. What --plan shows can be planned while files still arrive:
    then it is only said what a start will refuse."""
    key = Path(options.key) if options.key else None
    try:
        return trust_folder(
            folder,
            manifest,
            options.allow_changed,
            key,
            context.reporter,
        )
    except IntegrityError as exc:
        if manifest is not None or purpose_of(context.args) is not Purpose.SHOW:
            raise
        first, *_ = exc.why.splitlines()
        context.reporter.warn(f"{exc.what}, so it will not start: {first}")
        return TrustedFolder(folder)


def read_adapters(options: ServeOptions, name: str, reporter: Reporter) -> Tuple[Adapter, ...]:
    """The adapters that are to be served with a model; what is wrong with files is said at once.

    An adapter is as much of the model as its weights: what hfship brought must be whole, and with a
    key signed. Raises UsageError, NotFoundError, HostError, IntegrityError.
    """
    for folder in options.mounts:
        require_mount(folder)
    refuse_host_paths(options.extra_args, folder_mounts(options.mounts), name)
    key = Path(options.key) if options.key else None
    adapters = []
    for text in options.lora:
        adapter = read_adapter(text)
        manifest = read_manifest(adapter.folder)
        trusted = trust_folder(adapter.folder, manifest, (), key, reporter)
        refuse_changed(trusted)
        adapters.append(adapter)
    return tuple(adapters)


def purpose_of(args: argparse.Namespace) -> Purpose:
    """How far the operator wants to go."""
    if args.plan:
        return Purpose.SHOW
    if args.write_only:
        return Purpose.WRITE
    return Purpose.START


def find_served_model(context: Context, name: str) -> Path:
    """The folder of the model NAME, or DIR itself; unpacked first when only the archive is there.

    Raises NotFoundError, with --plan also for a model that would have to be unpacked.
    """
    settings = context.settings
    folder = find_folder(name, [settings.site_models_dir, settings.models_dir])
    folder = folder or served_folder(name, settings)
    if folder:
        return folder

    archive_dirs = [settings.transfer_dir, settings.package_dir]
    archives = find_archives(archive_word(name, archive_dirs), archive_dirs)
    if not archives:
        looked = [settings.site_models_dir, settings.models_dir, *archive_dirs]
        places = "\n".join(str(place) for place in looked)
        known = [*model_names(looked[:2]), *archive_names(archive_dirs)]
        raise NotFoundError(
            f"no such model: {name}{nearest(name, known)}",
            f"looked for {name} and {name}.tar.zst in:\n{places}",
            meant_step(name, known, f"put {name}.tar.zst into {settings.transfer_dir}"),
        )

    path = archives[0].place
    if context.args.plan:
        step = command_line("hfship", "unpack", path)
        raise NotFoundError(f"{name} is not unpacked yet", f"there is {path}", step)

    key = Path(context.args.key) if context.args.key else None
    how = Restore(settings.site_models_dir, key=key, policy=site_policy(context))
    restored = restore_model(NamedModel(name, tuple(archives)), how, context.reporter)
    return restored.done.folder


def look_around(context: Context, request: Request) -> Tuple[Host, Optional[Plan]]:
    """(the machine to plan for, the plan so far): this one as it is now, or an assumed one."""
    reporter = context.reporter
    machine = read_machine(request.options.image, request.purpose, reporter)
    beside: List[Plan] = []
    if context.together:
        beside = context.together.beside(request.name)
    if context.args.assume_gpus:
        gpus = assumed_gpus(context.args.assume_gpus)
        host = replace(machine.host, gpus=gpus)
        return free_host(host, Claims(running=tuple(beside)), frozenset()), None
    deployments = readable_deployments(context, reporter.warn)
    host, previous = survey(machine, deployments, request.name, request.options, beside)
    if previous and context.args.reset:
        previous = without_wishes(previous)
    return host, previous


def without_wishes(plan: Plan) -> Plan:
    """A plan so far, for --reset: port and GPUs that were asked for are not kept either.

    >>> without_wishes(Plan(port=9000, gpus=("GPU-1",), wishes={"port": 9000})).port
    0
    """
    if "port" in plan.wishes:
        plan = replace(plan, port=0)
    if "gpus" in plan.wishes:
        plan = replace(plan, gpus=())
    return plan


def prove(context: Context, request: Request, preflight: Preflight) -> None:
    """Read what nobody proved since it was last touched.

    That can take an hour: what else refuses the model is said before, and by the image beside it.
    Raises IntegrityError, and as decide.
    """
    deployment = context.settings.deploy_dir / request.name
    unread = unproven(request.model, read_proven(deployment))
    if not unread:
        return

    quiet = replace(context, reporter=Reporter("none", -1))
    host, previous = look_around(quiet, request)
    plan = decide(request, host, previous, quiet.reporter)
    if request.purpose is Purpose.START:
        preflight.begin(plan)
    prove_content(request.model, unread, deployment, context.reporter)


def show_plan(context: Context, request: Request) -> Result:
    """--plan: works without docker and GPU, and then says what would be needed."""
    reporter = context.reporter
    host, previous = look_around(context, request)
    try:
        choose_device(request.options, host)
    except HostError as exc:
        if request.options.device == "gpu":
            raise
        reporter.warn(f"{exc.what} ({exc.why}); --assume-gpus 2xH100 plans for another machine")
        return Sizing(request.name, request.facts, sizing(request.facts, request.options))

    plan, measured = decide_informed(context, request, host, previous)
    known = remembered(plan)
    if known:
        plan = as_derived(plan, known)
    warn_of(plan, reporter)
    others = what_else(request, host, plan)
    changed = changes_of(context, plan)
    plan = as_measured(plan, measured, request.facts)
    lines: List[Line] = []
    if context.args.explain and plan.gpus:
        lines = explained(request, host, plan, measured)
    return PlannedModel(
        request.facts,
        plan,
        measured,
        others,
        tuple(lines),
        tuple(changed),
    )


def decide_informed(
    context: Context, request: Request, host: Host, previous: Optional[Plan]
) -> Tuple[Plan, Measured]:
    """(the plan, with what vLLM measured of one like it; that, nothing where there was none)."""
    plan = decide(request, host, previous, context.reporter)
    measured = read_measured(context.settings.deploy_dir / request.name)
    if not fits(measured, plan):
        return plan, Measured()

    runs = request.name in host.running
    return informed_plan(plan, measured, request.facts, runs), measured


def what_else(request: Request, host: Host, plan: Plan) -> Tuple[Choice, ...]:
    """What the images that are here would give otherwise."""
    from hfship.serve.choices import choices, images_told

    options = replace(request.options, device=plan.device)
    images = images_told(plan, host)
    others = choices(
        request.name,
        request.facts,
        host,
        images,
        options,
        plan.gpus,
    )
    return tuple(others)


def explained(request: Request, host: Host, plan: Plan, measured: Measured) -> List[Line]:
    """How a plan comes about; what was measured of one like it counts."""
    from hfship.serve.explain import explanation

    kind = kind_of([gpu for gpu in host.gpus if gpu.uuid in plan.gpus])
    known = measured if measured.at else None
    return explanation(request.facts, plan, kind, known)


def write_plan(context: Context, request: Request, preflight: Preflight) -> Deployment:
    """Plan for this machine, and write the deployment's files. Called under the lock."""
    reporter = context.reporter
    host, previous = look_around(context, request)
    plan, measured = decide_informed(context, request, host, previous)
    if request.purpose is Purpose.START:
        plan = preflight.settle(plan)
    deploy_dir = context.settings.deploy_dir
    place = place_of(context.file, request.name)
    shared_key = ""
    if place and place.first != request.name:
        shared_key = read_key(deploy_dir / place.first, reporter)
    if request.purpose is Purpose.START:
        say_what_restarts(context, plan)
    deployment = write_deployment(deploy_dir / request.name, plan, reporter, shared_key)
    warn_of(plan, reporter)
    shown = as_measured(plan, measured, request.facts)
    reporter.info(plan_summary(shown, measured))
    return deployment


def say_what_restarts(context: Context, plan: Plan) -> None:
    """Say that a container which runs is about to be made anew, and why, before it is."""
    changed = changes_of(context, plan)
    if changed and is_running(plan.name):
        reasons = shorten(changed)
        context.reporter.warn(f"{plan.name} runs and is made anew, for it changes: {reasons}")


def changes_of(context: Context, plan: Plan) -> List[str]:
    """What a plan changes of its deployment; nothing where there is none."""
    from hfship.serve.changes import changes

    for deployment in readable_deployments(context):
        if deployment.plan.name == plan.name:
            return changes(deployment.plan, plan)
    return []


def kept_wishes(context: Context, name: str) -> Mapping[str, Any]:
    """The options that are remembered of NAME until now."""
    for deployment in readable_deployments(context):
        if deployment.plan.name == name:
            return deployment.plan.wishes
    return {}


@contextlib.contextmanager
def forgotten_on_failure(
    context: Context, deployment: Deployment, before: Mapping[str, Any]
) -> Iterator[None]:
    """Remember the options as they were before, where this host refuses to start with the new ones:
    the next serve must not fail for the same reason."""
    try:
        yield
    except HostError:
        if dict(before) != dict(deployment.plan.wishes):
            kept = replace(deployment.plan, wishes=before)
            write_deployment(deployment.folder, kept, context.reporter)
            context.reporter.info(f"{kept.name}: the options of this call are not kept")
        raise


def keep_measured(deployment: Deployment, started: Optional[Started]) -> Measured:
    """Write down what vLLM measured as it started, and which task an answer proved; of a start that
    failed (None) what its log tells of the context that fits."""
    folder = deployment.folder
    log = started.log if started else read_log(deployment.plan.name, LOG_LINES).text
    before = read_measured(folder)
    measured = measured_after(deployment.plan, before, log, started)
    if measured.at and measured != before:
        write_measured(folder, measured)
    return measured


def warn_of(plan: Plan, reporter: Reporter) -> None:
    """Say what will not work as one may expect."""
    for warning in plan.warnings:
        reporter.warn(f"{plan.name}: {warning}")


def wait_for(context: Context, request: Request, deployment: Deployment, restarts: int) -> Result:
    """Wait until the model answers. Ctrl-C ends the wait, not the deployment."""
    name = request.name
    try:
        started = wait_until_it_answers(deployment, restarts, context.reporter)
        measured = keep_measured(deployment, started)
        if started.answer.note:
            context.reporter.warn(f"{name}: {started.answer.note}")
        context.reporter.then("status", name)
        return ServedModel(deployment, request.facts, started, measured)
    except HostError:
        keep_measured(deployment, None)
        raise
    except KeyboardInterrupt as exc:
        raise Interrupted(
            f"interrupted: {name} goes on loading",
            "its container runs on without hfship",
            f"hfship logs {name} -f    # how far it is\n"
            f"hfship serve {name}     # waits again\n"
            f"hfship stop {name}",
        ) from exc
