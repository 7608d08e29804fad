# SPDX-License-Identifier: Apache-2.0
"""`hfship serve --planned NAME`: on a host of a site, what its control host planned.

The plan lies in DEPLOY_DIR/_site/planned/NAME, as the files of a deployment do. What only this host
can know is looked at here, before anything is touched: that the model is whole and proven, that
docker has the very image, and that the GPUs are here and nobody else's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, AbstractSet, Any, Dict, List, Optional, Sequence

from hfship.base.errors import HostError, NotFoundError
from hfship.base.locks import FolderLock
from hfship.base.manifest import read_manifest
from hfship.base.values import dataclass, replace
from hfship.commands.names import readable_deployments
from hfship.serve.deployments import read_deployment, write_deployment
from hfship.serve.docker import (
    inspect_image,
    read_host,
    require_docker,
    running_among,
    would_restart,
)
from hfship.serve.engine import wait_until_idle
from hfship.serve.mounts import mounts_of, rights_to_read
from hfship.serve.proof import prove_content, read_proven, trust_folder, unproven
from hfship.serve.start import Started, start, wait_until_it_answers
from hfship.site.record import SITE_FOLDER
from hfship.site.rolling import DRAIN_S

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.serve.deployments import Deployment
    from hfship.serve.terms import Plan

PLANNED_FOLDER = f"{SITE_FOLDER}/planned"


@dataclass(frozen=True)
class PlannedStart:
    """A deployment that was started as planned; `started` is None for a member of a group that
    answers at another host."""

    deployment: Deployment
    started: Optional[Started]

    def text(self) -> str:
        """Where it answers."""
        plan = self.deployment.plan
        if self.started is None:
            return f"{plan.name} was started, and answers at {plan.nodes[0]}"
        return f"{plan.name} answers at {plan.url}"

    def json(self) -> Dict[str, Any]:
        """docs/json.md: serve."""
        plan = self.deployment.plan
        seconds = self.started.seconds if self.started else 0.0
        return {
            "schema": "hfship-planned/1",
            "name": plan.name,
            "state": "healthy" if self.started else "started",
            "url": plan.url,
            "start_s": seconds or None,
        }


def serve_planned(context: Context, name: str) -> PlannedStart:
    """Serve as planned. Raises HfshipError."""
    deploy_dir = context.settings.deploy_dir
    planned = read_deployment(deploy_dir / PLANNED_FOLDER / name, context.reporter)
    if planned is None:
        step = "hfship serve on the control host"
        raise NotFoundError(f"nothing is planned here for {name}", "", step)
    require_docker()
    plan = planned.plan
    require_image(plan)
    prove_model(context, plan)
    rights = rights_to_read([plan.model_dir, *(mount.host for mount in mounts_of(plan))])
    plan = replace(plan, cap_add=rights)
    with FolderLock(deploy_dir):
        require_free(plan, running_beside(context, name))
        before = plan_before(context, name)
        deployment = write_deployment(deploy_dir / name, plan, context.reporter, planned.key)
        if would_restart(deployment):  # the gateways send nothing here any more
            with context.reporter.clock(f"{name}: waiting for its requests", DRAIN_S):
                wait_until_idle(before or plan, DRAIN_S)
        restarts = start(deployment)
    if plan.node_rank:
        return PlannedStart(deployment, None)
    started = wait_until_it_answers(deployment, restarts, context.reporter)
    return PlannedStart(deployment, started)


def require_image(plan: Plan) -> None:
    """Raise HostError unless docker has the very image that was planned with."""
    found = str(inspect_image(plan.image)["Id"])
    if plan.image_id and found != plan.image_id:
        why = f"planned with {plan.image_id}, here it is {found}"
        raise HostError(f"{plan.image} is another image here", why, "bring the same to all hosts")


def prove_model(context: Context, plan: Plan) -> None:
    """Have the content of the model proven, if nobody did since it was last touched."""
    folder = Path(plan.model_dir)
    if not folder.is_dir():
        step = f"on the control host: hfship unpack {folder.name} --hosts"
        raise NotFoundError(f"{folder} is not here", "", step)
    key = Path(plan.key) if plan.key else None
    trusted = trust_folder(
        folder,
        read_manifest(folder),
        plan.allow_changed,
        key,
        context.reporter,
    )
    deployment = context.settings.deploy_dir / plan.name
    unread = unproven(trusted, read_proven(deployment))
    if unread:
        prove_content(trusted, unread, deployment, context.reporter)


def plan_before(context: Context, name: str) -> Optional[Plan]:
    """The plan of a deployment so far: where it answers until it restarts."""
    for one in readable_deployments(context):
        if one.plan.name == name:
            return one.plan
    return None


def running_beside(context: Context, name: str) -> List[Plan]:
    """The plans of the other deployments whose containers run."""
    plans = {one.plan.name: one.plan for one in readable_deployments(context)}
    plans.pop(name, None)
    running = running_among(plans)
    return [plan for other, plan in plans.items() if other in running]


def require_free(plan: Plan, others: Sequence[Plan]) -> None:
    """Raise HostError where a GPU is not here any more, or has another owner by now."""
    trouble = ""
    if plan.gpus:
        here = {gpu.uuid for gpu in read_host(()).gpus}
        trouble = gpu_trouble(plan, here, others)
    for other in others:
        if not plan.port or other.network:
            continue
        if other.port == plan.port:
            trouble = f"{other.name} has port {plan.port} here"
    if trouble:
        what = f"{plan.name}: {trouble}"
        step = "serve from the control host again: it plans anew"
        raise HostError(what, "", step)


def gpu_trouble(plan: Plan, here: AbstractSet[str], others: Sequence[Plan]) -> str:
    """Why the GPUs of a plan cannot be had on a host that has those that are `here`; "" where they
    can.

    >>> from hfship.serve.terms import Plan
    >>> plan = Plan(name="m", gpus=("GPU-1",))
    >>> gpu_trouble(plan, {"GPU-2"}, []), gpu_trouble(plan, {"GPU-1"}, [Plan(gpus=("GPU-1",))])
    ('GPU-1 is not here any more', 'GPU-1 has another owner')
    """
    for uuid in plan.gpus:
        if uuid not in here:
            return f"{uuid} is not here any more"
        holders = [one for one in others if uuid in one.gpus]
        share = sum(one.gpu_memory_utilization for one in holders)
        wanted = share + plan.gpu_memory_utilization
        if holders and wanted > 1:
            names = ", ".join(one.name for one in holders)
            text = f"{uuid} has another owner"
            if names:
                text += f", {names}"
            return text
    return ""
