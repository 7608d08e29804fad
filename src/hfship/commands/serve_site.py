# SPDX-License-Identifier: Apache-2.0
"""`hfship serve --models FILE` with a [gateway]: the models, then what stands before them.

Promises: whatever is wrong with the gateway (its image, its certificate, a name) is said before a
model is touched; a model that fails keeps no other from its clients.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Callable, Dict, List, Mapping, Tuple

from hfship.base.errors import Exit, HfshipError, HostError, as_typed
from hfship.base.locks import FolderLock, host_name
from hfship.commands.results import exit_of_list
from hfship.commands.sitekeys import api_names
from hfship.serve.deployments import list_deployments
from hfship.serve.docker import COMPOSE_TIMEOUT_S, require_docker, running_among
from hfship.serve.terms import Plan
from hfship.site.changes import gateway_changes, key_changes
from hfship.site.gateway import gateway_warnings
from hfship.site.gateway_files import gateway_files, gateway_of
from hfship.site.gateway_run import (
    HaproxyImage,
    apply_files,
    check_files,
    find_image,
    owner,
    read_certificate,
    require_network,
)
from hfship.site.keys import with_rights
from hfship.site.maps import key_maps, model_maps
from hfship.site.monitoring_run import set_up_monitoring
from hfship.site.placement import gateway_models
from hfship.site.settings import (
    GatewaySettings,
    copies_of,
    gateway_settings,
    key_rights,
    monitoring_settings,
)
from hfship.site.store import (
    gateway_folder,
    read_gateway,
    read_keys,
    write_keys,
    write_rights,
)
from hfship.site.terms import ON_DEMAND
from hfship.site.usage import keep_usage

if TYPE_CHECKING:
    from hfship.base.settings import ModelsFile
    from hfship.commands.context import Context
    from hfship.site.terms import GatewayModel

NO_KEY = "none"  # in the place of the key of a model that was never served


def serve_site(context: Context, serve_models: Callable[[], Exit]) -> Exit:
    """Serve the models by `serve_models`, and set up the gateway."""
    args = context.args
    settings = context.file and gateway_settings(context.file)
    if not settings or args.write_only:
        return serve_models()
    if args.plan:
        code = serve_models()
        tell_plan(context, settings)
        return code

    require_docker()
    certificate = read_certificate(settings.tls_cert, settings.tls_key)
    image = find_image(settings.image)
    require_network()
    code = Exit.OK
    failure = None
    try:
        code = serve_models()
    except HfshipError as exc:
        failure = exc
    set_up_gateway(context, settings, image, certificate)
    if failure:
        raise failure
    return exit_of_list([code])


def set_up_gateway(
    context: Context, settings: GatewaySettings, image: HaproxyImage, certificate: str
) -> None:
    """Have the gateway stand before the models as they are now."""
    assert context.file
    deploy_dir = context.settings.deploy_dir
    with FolderLock(deploy_dir):
        deployments, _ = list_deployments(deploy_dir, context.reporter)
    plans = {one.plan.name: one.plan for one in deployments}
    models = gateway_models(context.file, plans)
    upstream = _upstream(models, {one.plan.name: one.key for one in deployments})
    put_gateway(
        context,
        settings,
        image,
        certificate,
        models,
        upstream,
    )


def put_gateway(
    context: Context,
    settings: GatewaySettings,
    image: HaproxyImage,
    certificate: str,
    models: Tuple[GatewayModel, ...],
    upstream: Mapping[str, str],
) -> None:
    """Have the gateway of this host stand before models, wherever they are. `upstream` are the API
    keys of their vLLM, by model."""
    assert context.file
    reporter = context.reporter
    deploy_dir = context.settings.deploy_dir
    folder = gateway_folder(deploy_dir)
    with FolderLock(deploy_dir):
        gateway = gateway_of(settings, models, image.version)
        rights = key_rights(context.file, time.time())
        keys = with_rights(read_keys(folder), rights)
        live = key_maps(models, keys)
        files = gateway_files(
            gateway,
            settings,
            image.reference,
            owner(),
            certificate,
            model_maps(models, upstream),
            live,
        )
        with reporter.clock("gateway: starting"):
            check_files(folder, files, image.reference)
            write_keys(folder, keys)
            write_rights(folder, rights)
            keep_usage(folder)  # the log goes with a container that is made anew
            done = apply_files(folder, files, live)

    watched = monitoring_settings(context.file)
    if watched:
        try:
            with reporter.clock("monitoring: starting", COMPOSE_TIMEOUT_S):
                said = set_up_monitoring(deploy_dir, watched, models)
            reporter.info(said)
        except HostError as exc:  # the models and their clients do without
            reporter.warn(f"{exc.what}; {exc.why}; {exc.next_step}")
    for warning in gateway_warnings(gateway):
        reporter.warn(warning)

    _tell_missing_keys(context, context.file, [key.name for key in keys])
    reporter.info(f"the gateway {done.value}: {address_of(settings)}")


def tell_plan(context: Context, settings: GatewaySettings) -> None:
    """Say what would become of the replicas, the gateway and its keys. Where docker does not
    answer, or the gateway cannot be, that is said, too."""
    assert context.file
    folder = gateway_folder(context.settings.deploy_dir)
    deployments, _ = list_deployments(context.settings.deploy_dir, context.reporter)
    plans = {one.plan.name: one.plan for one in deployments}
    states = _replica_states(context.file, plans)
    rights = key_rights(context.file, time.time())
    before = read_keys(folder)
    keys = key_changes(before, with_rights(before, rights), rights)
    lines = [f"site at {address_of(settings)}", *_under("replicas", states)]
    try:
        image = find_image(settings.image)
        read_certificate(settings.tls_cert, settings.tls_key)
        known = {**_to_come(context.file), **plans}
        models = gateway_models(context.file, known)
        gateway = gateway_of(settings, models, image.version)
        found = gateway_changes(read_gateway(folder), gateway)
        said = "changes:" if found else "stays as it is"
        lines += _under("gateway", {image.reference: said})
        lines += [f"      {change}" for change in found]
    except HfshipError as exc:
        lines += _under("gateway", {f"cannot be: {exc.what}": exc.why})
    lines += _under("keys", dict.fromkeys(keys, ""))
    text = "\n".join(lines)
    if context.args.json:
        context.reporter.info(text)
    else:
        context.reporter.result(text)


def _under(title: str, rows: Mapping[str, str]) -> List[str]:
    if not rows:
        return [f"  {title}: as they are"]
    wide = max(map(len, rows))
    return [f"  {title}", *(f"    {name:<{wide}}  {said}".rstrip() for name, said in rows.items())]


def _replica_states(file: ModelsFile, plans: Mapping[str, Plan]) -> Dict[str, str]:
    """How each replica is now, before what its plan changes."""
    running = running_among(plans)
    states = {}
    for model in file.models:
        wanted = copies_of(model)
        names = wanted.deployments(model.deployment)
        for number, name in enumerate(names):
            state = "new"
            if name in plans:
                state = "runs" if name in running else "does not run"
            if number >= wanted.replicas:
                state += ", standby"
            if wanted.mode == ON_DEMAND:
                state += ", on demand"
            states[name] = state
    return states


def _to_come(file: ModelsFile) -> Dict[str, Plan]:
    """Stand-ins for the plans of replicas that were never served: their names."""
    found = {}
    for model in file.models:
        plan = Plan(served_names=tuple(api_names(model)))
        found.update(dict.fromkeys(copies_of(model).deployments(model.deployment), plan))
    return found


def _upstream(models: tuple[GatewayModel, ...], keys: Mapping[str, str]) -> Dict[str, str]:
    """The API key of each model's vLLM."""
    found = {}
    for model in models:
        known = [keys[one.name] for one in model.replicas if one.name in keys]
        found[model.name] = known[0] if known else NO_KEY
    return found


def _tell_missing_keys(context: Context, file: ModelsFile, names: list[str]) -> None:
    for table in file.tables.get("key", ()):
        if table["name"] not in names:
            name = table["name"]
            step = as_typed(f"hfship key add {name}")
            context.reporter.warn(f"there is no key {name} yet: {step}")
    if not names:
        context.reporter.info(as_typed("nobody has a key yet: hfship key add NAME"))


def address_of(settings: GatewaySettings) -> str:
    """Where clients find the models."""
    scheme = "http"
    if settings.tls_cert:
        scheme = "https"
    host = settings.host
    if settings.address:  # which moves between the gateways
        host, _, _ = settings.address.partition("/")
    if host in ("0.0.0.0", "::"):
        host = host_name()
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}:{settings.published_port}/v1"
