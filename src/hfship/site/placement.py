# SPDX-License-Identifier: Apache-2.0
"""Which deployments a models file means: the replicas of each model, and what each of them gets.

Pure. Promises: the first replica has the name that the model had without replicas, and its GPUs, so
that more of them leave it alone; a GPU is given to one replica.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from hfship.base.settings import ListedModel, ModelsFile
from hfship.base.values import dataclass, replace
from hfship.serve.files import container_name
from hfship.serve.terms import CONTAINER_PORT, Plan
from hfship.site.settings import Copies, copies_of
from hfship.site.terms import ALWAYS, ON_DEMAND, SITE_NETWORK, GatewayModel, Replica


@dataclass(frozen=True)
class Place:
    """Where a deployment stands in a site: on which network, and whose key it has, too."""

    network: str
    first: str


def copies(model: ListedModel) -> Tuple[ListedModel, ...]:
    """The deployments of a model, each as a listed model of its own.

    >>> model = ListedModel("m", "o/m", serve={"gpus": [0, 1]}, copies={"replicas": 2})
    >>> [(one.deployment, one.serve["gpus"]) for one in copies(model)]
    [('m', [0]), ('m.2', [1])]
    """
    names = copies_of(model).deployments(model.deployment)
    if len(names) == 1:
        return (model,)
    return tuple(_copy(model, name, number, len(names)) for number, name in enumerate(names))


def deployments_of(
    file: ModelsFile, models: Sequence[ListedModel], named: Sequence[str]
) -> List[ListedModel]:
    """The deployments of some models of a file. One on demand is meant only where it is named."""
    if "gateway" not in file.tables:
        return list(models)
    found: List[ListedModel] = []
    for model in models:
        if named or copies_of(model).mode == ALWAYS:
            found += copies(model)
    return found


def _copy(model: ListedModel, name: str, number: int, count: int) -> ListedModel:
    serve: Dict[str, Any] = {**model.serve, "name": name}
    serve.setdefault("served_model_name", _usual_names(model))
    gpus = model.serve.get("gpus")
    if gpus and gpus != ["all"]:
        each = len(gpus) // count
        serve["gpus"] = gpus[number * each : (number + 1) * each]
    return replace(model, serve=serve)


def _usual_names(model: ListedModel) -> List[str]:
    """What clients call a model without other names; replicas have those of the first."""
    repo = model.repo.partition("@")[0]
    return list(dict.fromkeys(filter(None, [model.deployment, repo])))


def place_of(file: Optional[ModelsFile], deployment: str) -> Optional[Place]:
    """Where a deployment stands in the site of a models file; None where the file does not list it.
    Without a gateway its network is ""."""
    if file is None:
        return None
    network = ""
    if "gateway" in file.tables:
        network = SITE_NETWORK
    for model in file.models:
        if deployment in copies_of(model).deployments(model.deployment):
            return Place(network, model.deployment)
    return None


def gateway_models(file: ModelsFile, plans: Mapping[str, Plan]) -> Tuple[GatewayModel, ...]:
    """The models that the gateway stands before: those that were served, and those on demand, which
    may sleep."""
    models = []
    for listed in file.models:
        wanted = copies_of(listed)
        names = wanted.deployments(listed.deployment)
        served = [name for name in names if name in plans]
        if wanted.mode == ON_DEMAND:
            served = list(names)
        if served:
            models.append(_gateway_model(listed, wanted, served, plans))

    return tuple(models)


def _gateway_model(
    listed: ListedModel, wanted: Copies, served: Sequence[str], plans: Mapping[str, Plan]
) -> GatewayModel:
    name = listed.deployment
    standby = wanted.deployments(name)[wanted.replicas :]
    replicas = []
    for one in served:
        address = f"{container_name(one)}:{CONTAINER_PORT}"
        replicas.append(Replica(one, address, one in standby))
    names = _usual_names(listed)
    if served[0] in plans:
        plan = plans[served[0]]
        # Adapters are names of their own, in the rights of their model.
        adapters = [text.partition("=")[0] for text in plan.lora]
        names = [*plan.served_names, *adapters]
    unique = dict.fromkeys(names)
    return GatewayModel(
        name=name,
        names=tuple(unique),
        replicas=tuple(replicas),
        affinity=wanted.affinity,
        mode=wanted.mode,
    )
