# SPDX-License-Identifier: Apache-2.0
"""When the image's vLLM is asked, and what its answer does to a start; test_preflight.py has a docker
that plays one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional

import pytest

from hfship.base.errors import HostError
from hfship.commands import serve_check
from hfship.commands.serve_check import Preflight
from hfship.serve.deployments import Deployment
from hfship.serve.preflight import Check, as_derived
from hfship.serve.terms import Plan

PLAN = Plan(name="m", image="vllm:1", port=8000, max_model_len=4096)
OTHER = Plan(name="m", image="vllm:1", port=8001, max_model_len=4096)
PASSED = Check(version="0.32.0", finished=True)
REFUSED = Check(refused="too long", finished=True)
SHORTER = Check(max_model_len=2048, finished=True)
UNKNOWN = Check()


class Image:
    """What vLLM says when it is asked, and what was asked, remembered and stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.says = PASSED
        self.done = True  # what goes on beside other work has ended
        self.known: Optional[Check] = None
        self.runs = False
        self.written: Optional[Plan] = None
        self.error: Optional[HostError] = None
        self.log: List[Any] = []
        self.said: List[str] = []

    def running(
        self, plan: Plan, beside: bool, if_refused: Optional[Callable[[], None]] = None
    ) -> Any:
        self.log.append("ask beside the start" if beside else "ask beside the proof")
        if self.says.refused and if_refused:
            if_refused()
        return SimpleNamespace(
            plan=plan,
            result=lambda: self.says,
            so_far=lambda: self.says if self.done else None,
            forget=lambda: self.log.append("forget"),
        )

    def run_check(self, plan: Plan) -> Check:
        self.log.append("ask")
        return self.says

    def read(self, folder: Path, _: Any) -> Optional[Deployment]:
        assert folder == self.folder / "m"
        if self.error:
            raise self.error
        return Deployment(folder, self.written, "") if self.written else None

    def docker(self, words: List[str], about: str, timeout_s: float) -> None:
        assert timeout_s == serve_check.COMPOSE_TIMEOUT_S
        self.log.append(f"docker {words[-1]}")

    def preflight(self, off: bool = False) -> Preflight:
        reporter = SimpleNamespace(
            info=self.said.append,
            detail=self.said.append,
            clock=lambda *_: contextlib.nullcontext(),
        )
        settings = SimpleNamespace(deploy_dir=self.folder)
        args = SimpleNamespace(no_preflight=off)
        context: Any = SimpleNamespace(args=args, settings=settings, reporter=reporter)
        return Preflight(context)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    made = Image(tmp_path)

    def remember(plan: Plan, check: Check) -> None:
        made.log.append(("remember", plan.port, check))

    patched: Dict[str, Any] = {
        "Running": made.running,
        "run_check": made.run_check,
        "remembered": lambda _: made.known,
        "remember": remember,
        "is_running": lambda name: made.runs and name == "m",
        "read_deployment": made.read,
        "docker": made.docker,
    }
    for name, fake in patched.items():
        monkeypatch.setattr(serve_check, name, fake)
    return made


KEPT = ("remember", 8000, PASSED)


def test_a_plan_is_asked_about_beside_the_proof(image: Image) -> None:
    check = image.preflight()
    check.begin(PLAN)
    assert check.settle(PLAN) == as_derived(PLAN, PASSED)
    assert image.log == ["ask beside the proof", KEPT]
    assert image.said == ["m: vLLM 0.32.0 takes the plan"]
    check.start_beside(Deployment(image.folder, PLAN, ""))
    check.answered()
    assert image.log == ["ask beside the proof", KEPT] and not check.died()


@pytest.mark.parametrize("why", ["off", "known", "own code"])
def test_nobody_is_asked_beside_the_proof(why: str, image: Image) -> None:
    """Own code of a model is not run before it is proven."""
    plan = Plan(name="m", trust_remote_code=True) if why == "own code" else PLAN
    image.known = PASSED if why == "known" else None
    image.preflight(off=why == "off").begin(plan)
    assert image.log == []


@pytest.mark.parametrize("why", ["off", "written"])
def test_a_plan_that_starts_nothing_anew_is_not_asked_about(why: str, image: Image) -> None:
    image.says = image.known = REFUSED
    image.runs = True
    image.written = PLAN if why == "written" else None
    assert image.preflight(off=why == "off").settle(PLAN) is PLAN
    assert image.log == []


def test_what_passed_before_is_known(image: Image) -> None:
    image.known, image.written, image.runs = SHORTER, OTHER, True
    assert image.preflight().settle(PLAN).max_model_len == 2048
    assert [one for one in image.log if one == "ask"] == []


def test_a_check_of_another_plan_tells_nothing(image: Image) -> None:
    check = image.preflight()
    check.begin(OTHER)
    assert check.settle(PLAN) is PLAN
    assert image.log == ["ask beside the proof"], "it is asked about beside the start"


def test_a_deployment_that_cannot_be_read_is_told_when_it_is_written(image: Image) -> None:
    image.error = HostError("not ours", "", "")
    assert image.preflight().settle(PLAN) is PLAN


def test_what_serves_goes_on_while_the_new_plan_is_asked_about(image: Image) -> None:
    image.runs = True
    check = image.preflight()
    assert check.settle(PLAN) == as_derived(PLAN, PASSED)
    assert image.log == ["ask", KEPT]
    assert image.said[0] == "m goes on serving while its image checks the new plan"
    image.says = REFUSED
    with pytest.raises(HostError, match="would not serve m"):
        image.preflight().settle(PLAN)


def test_what_is_not_known_in_the_end_is_not_remembered(image: Image) -> None:
    image.runs, image.says = True, UNKNOWN
    assert image.preflight().settle(PLAN) == PLAN
    assert image.log == ["ask"] and len(image.said) == 1


def started(image: Image) -> Preflight:
    """A check that goes on beside the start of a container."""
    check = image.preflight()
    assert check.settle(PLAN) is PLAN
    check.start_beside(Deployment(image.folder, PLAN, ""))
    return check


def test_a_refusal_beside_the_start_stops_the_container(image: Image) -> None:
    image.says = REFUSED
    check = started(image)
    assert image.log == ["ask beside the start", "docker stop"]
    with pytest.raises(HostError, match="would not serve m"):
        check.died()


@pytest.mark.parametrize(("says", "lives"), [(SHORTER, True), (PASSED, False), (UNKNOWN, False)])
def test_what_died_may_live_by_a_plan_that_vllm_derived(
    says: Check, lives: bool, image: Image
) -> None:
    image.says = says
    assert started(image).died() is lives


@pytest.mark.parametrize(
    ("says", "done", "kept"),
    [
        (SHORTER, True, SHORTER),
        (UNKNOWN, True, Check(finished=True)),
        (SHORTER, False, Check(finished=True)),
    ],
)
def test_an_answer_of_the_model_is_proof_enough(
    says: Check, done: bool, kept: Check, image: Image
) -> None:
    image.says, image.done = says, done
    started(image).answered()
    assert image.log == ["ask beside the start", "forget", ("remember", 8000, kept)]
