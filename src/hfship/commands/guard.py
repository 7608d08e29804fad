# SPDX-License-Identifier: Apache-2.0
"""`hfship status --repair --every SECONDS`: the watchdog that goes on.

What it does about a deployment is what `--repair` does, a minute after the last time, or as soon as
it is suspected to hang. Before that, where another replica answers, clients are sent there: QUICK_S
without an answer and without a step are enough to let go of an engine, but not to end it. One that
was only slow gets its requests back as soon as it answers.

On a control host it tells gateways of other hosts what they did not hear of keys (site/untold.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Callable, Dict, Tuple

from hfship.base.errors import Exit, HfshipError, UsageError
from hfship.base.locks import FolderLock
from hfship.base.values import replace
from hfship.commands.repairing import repaired
from hfship.serve.deployments import list_deployments
from hfship.serve.docker import direct
from hfship.serve.engine import read_health
from hfship.serve.status import ask_and_watch, deployment_status
from hfship.site.rolling import take_out
from hfship.site.silence import Silences, has_other, read_looks
from hfship.site.store import gateway_folder, read_gateway
from hfship.site.terms import GATEWAY_FOLDER
from hfship.site.untold import read_untold
from hfship.site.usage import keep_usage

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.serve.deployments import Deployment
    from hfship.site.terms import Gateway

SUSPECT_S = 2.0  # busy without a step, until the engine itself is asked
QUICK_S = 4.0  # without an answer and without a step, until its clients are sent elsewhere
LOOK_TIMEOUT_S = 1.0
PROVE_EVERY_S = 60.0  # by a real request to each
COUNT_EVERY_S = 3600.0  # what keys were used for
TELL_EVERY_S = 5.0  # gateways of other hosts that did not know a change of keys
READ_EVERY_S = 10.0  # what is deployed, and where it is reached


def keep_watch(context: Context) -> Exit:
    """Look after deployments until interrupted. What goes wrong at a look is told, and the next
    look comes all the same."""
    args, reporter = context.args, context.reporter
    if not args.repair:
        raise UsageError("--every needs --repair", "", "hfship status --repair --every 1")

    reporter.info(f"looking after deployments every {args.every:g} s until Ctrl-C")
    guard = Guard(context)
    while True:
        began = time.monotonic()
        try:
            guard.look(began)
        except HfshipError as exc:
            reporter.error(exc)
        time.sleep(max(0.1, began + args.every - time.monotonic()))


class Guard:
    """The deployments that are looked after, and what is being proven of them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._folder = gateway_folder(context.settings.deploy_dir)
        self._deployments: Dict[str, Deployment] = {}
        self._reached: Dict[str, Deployment] = {}  # the same, with the address in their plans
        self._read_at = -READ_EVERY_S
        self._counted_at = time.monotonic()
        self._told_at = time.monotonic() - TELL_EVERY_S
        self._silences = Silences()
        self._threads: Dict[Tuple[str, str], threading.Thread] = {}
        self._proven_at: Dict[str, float] = {}

    def look(self, now: float) -> None:
        """Look once. Raises HfshipError."""
        read_again_at = self._read_at + READ_EVERY_S
        if now >= read_again_at:
            self._read()
            self._read_at = now
        gateway = read_gateway(self._folder)
        if gateway:
            self._look_at_replicas(gateway, now)
            if now >= self._counted_at + COUNT_EVERY_S:
                self._counted_at = now
                self._start(self._count, GATEWAY_FOLDER)
            if now >= self._told_at + TELL_EVERY_S:
                self._told_at = now
                self._start(self._tell, GATEWAY_FOLDER)
        for name in self._deployments:
            proven_at = self._proven_at.get(name, now - PROVE_EVERY_S)
            if now >= proven_at + PROVE_EVERY_S:
                self._prove(name, now)

    def _read(self) -> None:
        context = self._context
        found, _ = list_deployments(context.settings.deploy_dir, context.reporter)
        if context.args.names:
            found = [one for one in found if one.plan.name in context.args.names]
        self._deployments = {one.plan.name: one for one in found}
        self._reached = {name: _reached(one) for name, one in self._deployments.items()}

    def _look_at_replicas(self, gateway: Gateway, now: float) -> None:
        names = [one.name for model in gateway.models for one in model.replicas]
        plans = {name: self._reached[name].plan for name in names if name in self._reached}
        looks, states = read_looks(self._folder, plans, LOOK_TIMEOUT_S)
        for name, look in looks.items():
            if self._silences.silent_s(name, look, now) < SUSPECT_S:
                continue
            if has_other(gateway, states, name):
                self._start(self._let_go, name)
            else:
                self._prove(name, now)

    def _prove(self, name: str, now: float) -> None:
        """Have it proven what a deployment does, and repaired."""
        self._proven_at[name] = now
        self._start(self._repair, name)

    def _start(self, work: Callable[[str], None], name: str) -> None:
        """Do some work about a deployment beside all else, unless it goes on still. Nobody waits
        for its end: Ctrl-C is heard at once."""
        about = (work.__name__, name)
        running = self._threads.get(about)
        if running is None or not running.is_alive():
            thread = threading.Thread(
                target=work,
                args=(name,),
                daemon=True,
            )
            self._threads[about] = thread
            thread.start()

    def _let_go(self, name: str) -> None:
        try:
            gone = _is_silent(self._reached[name]) and take_out(self._folder, name)
        except HfshipError as exc:
            self._context.reporter.error(exc)
            return
        if gone:
            said = "neither answers nor does a step: its clients are sent elsewhere"
            self._context.reporter.warn(f"{name} {said}")
            self._prove(name, time.monotonic())

    def _count(self, _: str) -> None:
        """Keep what keys were used for, before docker forgets it."""
        with contextlib.suppress(HfshipError), FolderLock(self._context.settings.deploy_dir):
            keep_usage(self._folder)

    def _tell(self, _: str) -> None:
        """Have gateways of other hosts know the keys that were changed while they were silent."""
        context = self._context
        if context.file is None:
            return
        from hfship.commands.gateway_hosts import send_keys

        with contextlib.suppress(HfshipError):  # the next time
            untold = read_untold(context.settings.deploy_dir)
            if untold:
                failures = send_keys(context, untold)
                for host in set(untold).difference(failures):
                    context.reporter.info(f"{host}: its gateway knows the keys again")

    def _repair(self, name: str) -> None:
        context, deployment = self._context, self._deployments[name]
        try:
            status = deployment_status(deployment, context.args.hang_after)
            repaired(context, deployment, status)
        except HfshipError as exc:
            context.reporter.error(exc)


def _reached(deployment: Deployment) -> Deployment:
    return replace(deployment, plan=direct(deployment.plan))


def _is_silent(deployment: Deployment) -> bool:
    health = read_health(deployment.plan, LOOK_TIMEOUT_S)
    if not health.status and not health.silent:  # nothing listens: it loads, or has ended
        return False
    _, still_s = ask_and_watch(deployment, QUICK_S, health)
    return still_s >= QUICK_S
