# SPDX-License-Identifier: Apache-2.0
"""When the image's vLLM is asked whether it takes a plan, so that nobody waits for it.

the model is proven first      beside that, but for a model whose own code would run
the deployment runs now        before it is replaced: it goes on serving meanwhile
else                           beside the start of the container; a refusal stops that at once
asked before, with this plan   never
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Optional

from hfship.base.errors import HfshipError
from hfship.serve.deployments import read_deployment
from hfship.serve.docker import COMPOSE_TIMEOUT_S, compose, docker
from hfship.serve.files import compose_text
from hfship.serve.preflight import (
    CHECK_TIMEOUT_S,
    Check,
    Running,
    as_derived,
    refusal,
    remember,
    remembered,
    run_check,
)
from hfship.serve.survey import is_running

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.serve.deployments import Deployment
    from hfship.serve.terms import Plan


class Preflight:
    """The check of one `serve`."""

    def __init__(self, context: Context) -> None:
        self._deploy_dir = context.settings.deploy_dir
        self._reporter = context.reporter
        self._is_off = bool(context.args.no_preflight)
        self._early: Optional[Running] = None  # beside the proof of the model
        self._late: Optional[Running] = None  # beside the start
        self._due: Optional[Plan] = None  # is to be checked beside the start

    def begin(self, plan: Plan) -> None:
        """Check a plan beside the proof of the model. Own code is not run before it is proven."""
        if self._is_off or plan.trust_remote_code or remembered(plan):
            return
        self._early = Running(plan, beside=False)

    def settle(self, plan: Plan) -> Plan:
        """The plan as vLLM derives it, as far as is known before a start. Raises HostError."""
        if self._is_off or self._is_written(plan):
            return plan
        check = remembered(plan) or self._early_result(plan)
        if check is None and is_running(plan.name):
            self._reporter.info(f"{plan.name} goes on serving while its image checks the new plan")
            with self._reporter.clock(f"{plan.name}: asking the image", CHECK_TIMEOUT_S):
                check = run_check(plan)
        if check is None:
            self._due = plan
            return plan
        return self._judged(plan, check)

    def _is_written(self, plan: Plan) -> bool:
        """Whether the deployment has this plan already, so that nothing is started anew."""
        folder = self._deploy_dir / plan.name
        with contextlib.suppress(HfshipError):  # told when it is written
            deployment = read_deployment(folder, self._reporter)
            if deployment:
                return compose_text(deployment.plan) == compose_text(plan)
        return False

    def _early_result(self, plan: Plan) -> Optional[Check]:
        """What came of the check beside the proof, if it was of this plan."""
        if self._early and compose_text(self._early.plan) == compose_text(plan):
            with self._reporter.clock(f"{plan.name}: asking the image", CHECK_TIMEOUT_S):
                return self._early.result()
        return None

    def _judged(self, plan: Plan, check: Check) -> Plan:
        if check.refused:
            raise refusal(plan, check)
        if check.finished:
            self._reporter.detail(f"{plan.name}: vLLM {check.version} takes the plan")
            remember(plan, check)
        return as_derived(plan, check)

    def start_beside(self, deployment: Deployment) -> None:
        """Check what could not be checked before, while the container starts."""
        if self._due is None:
            return

        def stop() -> None:
            docker(compose(deployment, "stop"), "stop what vLLM refuses", COMPOSE_TIMEOUT_S)

        self._late = Running(self._due, beside=True, if_refused=stop)

    def answered(self) -> None:
        """The model answered: no check could prove more. Raises DiskError, HostError."""
        if self._due is None or self._late is None:
            return
        self._late.forget()
        check = self._late.so_far()
        if check is None or not check.finished:
            check = Check(finished=True)
        remember(self._due, check)

    def died(self) -> bool:
        """The container died: whether another plan, which vLLM derived, may live.

        Raises HostError where the check knows why it died.
        """
        if self._due is None or self._late is None:
            return False
        check = self._late.result()
        plan = self._judged(self._due, check)
        return plan.max_model_len != self._due.max_model_len
