"""What a host looks at before it starts what its control host planned: what changed since the plan is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Tuple

import pytest

from hfship.base.errors import HostError, NotFoundError
from hfship.commands import serve_planned
from hfship.serve.deployments import Deployment
from hfship.serve.messages import Answer
from hfship.serve.start import Started
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
    "a port beside one behind the gateway": (
        ["GPU-1", "GPU-2"],
        [other(port=8000, network="net"), other(port=8000), other(port=8001)],
        {},
        "m: n has port 8000 here",
    ),
    "no port at all": (["GPU-1", "GPU-2"], [other(port=0)], {"port": 0}, ""),
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
    serve_planned.require_image(Plan(**{**vars(PLAN), "image_id": ""}))  # nobody knows which


@pytest.mark.parametrize("unread", [[], ["weights"]])
@pytest.mark.parametrize("key", ["", "/keys/kim.pem"])
def test_a_model_is_proven_as_far_as_nobody_did(
    unread: List[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "m-folder"
    model.mkdir()
    did: List[Any] = []

    def trust_folder(folder: Path, manifest: str, allow: bool, own: Any, _: Any) -> str:
        did.append((folder, manifest, allow, own))
        return "trusted"

    def unproven(trusted: str, proven: Path) -> List[str]:
        assert (trusted, proven) == ("trusted", tmp_path / "deploy/m")
        return unread

    monkeypatch.setattr(serve_planned, "read_manifest", lambda _: "manifest")
    monkeypatch.setattr(serve_planned, "trust_folder", trust_folder)
    monkeypatch.setattr(serve_planned, "read_proven", lambda folder: folder)
    monkeypatch.setattr(serve_planned, "unproven", unproven)
    monkeypatch.setattr(serve_planned, "prove_content", lambda *words: did.append(words[:3]))
    settings = SimpleNamespace(deploy_dir=tmp_path / "deploy")
    context: Any = SimpleNamespace(settings=settings, reporter=None)
    plan = Plan(name="m", model_dir=str(model), key=key, allow_changed=True)
    serve_planned.prove_model(context, plan)
    proven = [("trusted", unread, tmp_path / "deploy/m")] if unread else []
    assert did == [(model, "manifest", True, Path(key) if key else None), *proven]


class Start:
    """A host whose control host planned m, and what was done there, in order."""

    def __init__(self, folder: Path, plan: Plan, restarts: bool = False) -> None:
        self.folder, self.plan, self.restarts = folder, plan, restarts
        self.did: List[Any] = []
        self.before = [other(), Plan(name="m", port=7000), Plan(name="o")]

    def note(self, *words: Any) -> None:
        self.did.append(words if len(words) > 1 else words[0])

    def write(self, folder: Path, plan: Plan, _: Any, key: str) -> Any:
        self.note("write", folder, plan.cap_add, key)
        return Deployment(folder, plan, key)

    def read(self, folder: Path, _: Any) -> Any:
        assert folder.parent == self.folder / "_site/planned"
        return Deployment(folder, self.plan, "sk-1") if folder.name == "m" else None

    def start(self, _: Any) -> int:
        self.note("start")
        return 7

    def wait(self, _: Any, restarts: int, __: Any) -> Started:
        assert restarts == 7
        self.note("answers")
        return Started(Answer(200, "ok"), 3.0)

    def run(self, monkeypatch: pytest.MonkeyPatch, name: str = "m") -> Any:
        patched: Dict[str, Any] = {
            "read_deployment": self.read,
            "require_docker": lambda: self.note("docker"),
            "require_image": lambda plan: self.note("image", plan.name),
            "prove_model": lambda _, plan: self.note("prove", plan.name),
            "rights_to_read": lambda paths: self.note("rights", *paths) or ("DAC_READ_SEARCH",),
            "mounts_of": lambda _: [SimpleNamespace(host="/lora")],
            "require_free": lambda _, others: self.note("free", [one.name for one in others]),
            "readable_deployments": lambda _: [
                Deployment(self.folder, one, "") for one in self.before
            ],
            "running_among": {"n", "m"}.intersection,
            "write_deployment": self.write,
            "would_restart": lambda _: self.restarts,
            "wait_until_idle": lambda plan, patience_s: self.note("idle", plan.port, patience_s),
            "start": self.start,
            "wait_until_it_answers": self.wait,
        }
        for word, fake in patched.items():
            monkeypatch.setattr(serve_planned, word, fake)
        reporter = SimpleNamespace(clock=lambda *_: contextlib.nullcontext())
        settings = SimpleNamespace(deploy_dir=self.folder)
        context: Any = SimpleNamespace(settings=settings, reporter=reporter)
        return serve_planned.serve_planned(context, name)


def test_a_start_is_proven_then_written_then_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Start(tmp_path, PLAN)
    result = started.run(monkeypatch)
    assert started.did == [
        "docker",
        ("image", "m"),
        ("prove", "m"),
        ("rights", PLAN.model_dir, "/lora"),
        ("free", ["n"]),
        ("write", tmp_path / "m", ("DAC_READ_SEARCH",), "sk-1"),
        "start",
        "answers",
    ]
    assert result.text() == "m answers at http://127.0.0.1:8000/v1"
    value = result.json()
    assert (value["schema"], value["name"], value["state"]) == ("hfship-planned/1", "m", "healthy")
    assert (value["url"], value["start_s"]) == ("http://127.0.0.1:8000/v1", 3.0)


@pytest.mark.parametrize(("known", "port"), [(True, 7000), (False, 8000)])
def test_requests_are_answered_before_it_restarts_where_it_is_now(
    known: bool, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Start(tmp_path, PLAN, restarts=True)
    if not known:
        started.before = []
    started.run(monkeypatch)
    assert started.did[-3:] == [("idle", port, serve_planned.DRAIN_S), "start", "answers"]


def test_a_member_behind_the_head_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {"nodes": ("10.0.0.1", "10.0.0.2"), "node_rank": 1}
    result = Start(tmp_path, Plan(**{**vars(PLAN), **nodes})).run(monkeypatch)
    assert result.started is None and result.text() == "m was started, and answers at 10.0.0.1"
    assert (result.json()["state"], result.json()["start_s"]) == ("started", None)


def test_what_nobody_planned_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Start(tmp_path, PLAN)
    with pytest.raises(NotFoundError, match="nothing is planned here for n"):
        started.run(monkeypatch, "n")
    assert started.did == []


def test_a_model_that_is_gone_is_to_be_brought(tmp_path: Path) -> None:
    plan = Plan(name="m", model_dir=str(tmp_path / "m"))
    with pytest.raises(NotFoundError) as caught:
        serve_planned.prove_model(SimpleNamespace(), plan)  # type: ignore[arg-type]
    assert "hfship unpack m --hosts" in caught.value.next_step
