"""Which deployments a models file means, and what the gateway stands before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import pytest

from hfship.base.settings import ListedModel, ModelsFile
from hfship.serve.terms import Plan
from hfship.site.placement import Place, copies, deployments_of, gateway_models, place_of
from hfship.site.terms import Replica


def file_of(*models: ListedModel, **tables: Any) -> ModelsFile:
    return ModelsFile(Path("m.toml"), {}, models, ListedModel(""), tables=tables)


GPUS = [
    ([0, 1], {"replicas": 2}, [[0], [1]]),
    ([0, 1, 2, 3], {"replicas": 2}, [[0, 1], [2, 3]]),
    ([0, 1, 2], {"replicas": 1, "standby": 1}, [[0], [1]]),
    (["all"], {"replicas": 2}, [["all"], ["all"]]),
    ([0, 1], {}, [[0, 1]]),
]


@pytest.mark.parametrize("gpus, wanted, shares", GPUS)
def test_a_gpu_goes_to_one_replica(gpus: List[Any], wanted: Any, shares: List[Any]) -> None:
    model = ListedModel("m", "o/m@v1", serve={"gpus": gpus}, copies=wanted)
    found = copies(model)
    assert [one.serve["gpus"] for one in found] == shares
    assert [one.deployment for one in found] == ["m", "m.2", "m.3"][: len(found)]
    if len(found) > 1:
        assert {tuple(one.serve["served_model_name"]) for one in found} == {("m", "o/m")}


def test_where_a_deployment_stands() -> None:
    model = ListedModel("m", copies={"replicas": 2})
    file = file_of(model, gateway={})
    assert place_of(file, "m.2") == Place("hfship", "m")
    assert place_of(file, "m.3") is None and place_of(None, "m") is None
    assert place_of(file_of(ListedModel("m")), "m") == Place("", "m")


def test_one_on_demand_is_meant_where_it_is_named() -> None:
    night = ListedModel("night", copies={"mode": "on-demand"})
    file = file_of(ListedModel("day"), night, gateway={})
    assert [one.name for one in deployments_of(file, file.models, [])] == ["day"]
    assert [one.name for one in deployments_of(file, (night,), ["night"])] == ["night"]
    plain = file_of(night)
    assert [one.name for one in deployments_of(plain, plain.models, [])] == ["night"]


def test_what_the_gateway_stands_before() -> None:
    served = ListedModel("m", copies={"replicas": 1, "standby": 1, "affinity": "prefix"})
    night = ListedModel("night", "o/night", copies={"mode": "on-demand"})
    file = file_of(served, night, ListedModel("never"), gateway={})
    plans = {
        name: Plan(name=name, served_names=("m", "o/m", "chat"), lora=("tone=/a",))
        for name in ("m", "m.2")
    }
    first, second = gateway_models(file, plans)
    assert first.names == ("m", "o/m", "chat", "tone") and first.affinity == "prefix"
    assert first.replicas == (Replica("m", "vllm_m:8000"), Replica("m.2", "vllm_m.2:8000", True))
    assert (second.names, second.mode) == (("night", "o/night"), "on-demand")
    [alone] = gateway_models(file_of(served, gateway={}), {"m": plans["m"]})
    assert [one.name for one in alone.replicas] == ["m"] and alone.names == first.names
