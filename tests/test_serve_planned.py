"""What a host looks at before it starts what its control host planned: what changed since the plan is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.errors import HostError, NotFoundError
from hfship.commands import serve_planned
from hfship.serve.terms import Gpu, Host, Plan

PLAN = Plan(name="m", gpus=("GPU-1", "GPU-2"), port=8000, image="vllm:1", image_id="sha256:1")


def other(**fields: Any) -> Plan:
    return Plan(**{"name": "n", "port": 8001, **fields})


HALF, TOO_MUCH = {"gpu_memory_utilization": 0.4}, {"gpu_memory_utilization": 0.7}
# The GPUs that are here now, what else runs here: what is said; "": nothing.
SINCE: Dict[str, Tuple[List[str], List[Plan], Dict[str, Any], str]] = {
    "as planned": (["GPU-1", "GPU-2"], [], {}, ""),
    "one is gone": (["GPU-1"], [], {}, "m: GPU-2 is not here any more"),
    "the driver is gone": ([], [], {}, "m: GPU-1 is not here any more"),
    "another one came": (["GPU-1", "GPU-3"], [], {}, "m: GPU-2 is not here any more"),
    "given away": (["GPU-1", "GPU-2"], [other(gpus=("GPU-2",))], {}, "GPU-2 has another owner, n"),
    "shared": (["GPU-1", "GPU-2"], [other(gpus=("GPU-2",), **HALF)], HALF, ""),
    "shared too far": (["GPU-1", "GPU-2"], [other(gpus=("GPU-1",), **HALF)], TOO_MUCH, "GPU-1 has another owner"),
    "the port is taken": (["GPU-1", "GPU-2"], [other(port=8000)], {}, "m: n has port 8000 here"),
    "behind the gateway": (["GPU-1", "GPU-2"], [other(port=8000, network="net")], {}, ""),
    "on the CPU": ([], [], {"gpus": ()}, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", SINCE)
def test_what_changed_since_the_plan_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, others, changed, said = SINCE[case]
    gpus = tuple(Gpu(number, uuid, "H200", 1) for number, uuid in enumerate(here))
    monkeypatch.setattr(serve_planned, "read_host", lambda _: Host(gpus))
    plan = Plan(**{**vars(PLAN), **changed})
    if not said:
        serve_planned.require_free(plan, others)
        return
    with pytest.raises(HostError) as caught:
        serve_planned.require_free(plan, others)
    assert said in caught.value.what and "from the control host again" in caught.value.next_step


def test_the_very_image_of_the_plan_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_planned, "inspect_image", lambda _: {"Id": "sha256:1"})
    serve_planned.require_image(PLAN)
    monkeypatch.setattr(serve_planned, "inspect_image", lambda _: {"Id": "sha256:2"})
    with pytest.raises(HostError, match="vllm:1 is another image here"):
        serve_planned.require_image(PLAN)


def test_a_model_that_is_gone_is_to_be_brought(tmp_path: Path) -> None:
    plan = Plan(name="m", model_dir=str(tmp_path / "m"))
    with pytest.raises(NotFoundError) as caught:
        serve_planned.prove_model(SimpleNamespace(), plan)  # type: ignore[arg-type]
    assert "hfship unpack m --hosts" in caught.value.next_step
