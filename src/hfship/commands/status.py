# SPDX-License-Identifier: Apache-2.0
"""`hfship status`, `stop`, `restart` and `logs`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Union

from hfship.base.errors import Exit, HostError, NotFoundError, as_typed, command_line
from hfship.base.settings import home_path
from hfship.base.values import dataclass, replace
from hfship.commands.names import job_or_deployment, named_deployment
from hfship.commands.options import (
    hosts_arguments,
    line_count,
    means_hosts,
    past_time,
    positive_number,
    some_seconds,
)
from hfship.commands.results import confirm, print_results
from hfship.commands.runs import no_name_given

if TYPE_CHECKING:
    from hfship.base.errors import HfshipError
    from hfship.base.report import Reporter
    from hfship.commands.context import Context
    from hfship.ops.jobs import Job
    from hfship.serve.deployments import Deployment
    from hfship.serve.start import Started
    from hfship.serve.status import DeploymentStatus


def status_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship status`."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="deployments (default: all)")
    add(
        "--hang-after",
        type=positive_number,
        default=60,
        metavar="SECONDS",
        help="without an answer and a step, until an engine counts as hung (default: %(default)s)",
    )
    site = "all that is behind the gateway on one screen: replicas, requests, tokens, keys in use"
    add("--site", action="store_true", help=site)
    add(
        "--repair",
        action="store_true",
        help="restart what is dead or proven hung, seldom and at most five times a day",
    )
    add(
        "--grace",
        type=positive_number,
        default=120,
        metavar="SECONDS",
        help="with --repair: leave alone what was started within this time (default: %(default)s)",
    )
    add(
        "--every",
        type=some_seconds,
        metavar="SECONDS",
        help="with --repair: go on and look so often; clients leave what hangs within 10 s",
    )
    add(
        "--install",
        action="store_true",
        help="with --repair: a systemd unit that does it from boot on; printed, or with --yes made",
    )
    add("-y", "--yes", action="store_true", help="with --install: do not ask")
    form = "prometheus: metrics of deployments, jobs and disks; exits with 0 (default: %(default)s)"
    add("--format", choices=("text", "prometheus"), default="text", help=form)
    output = "with --format prometheus: replace FILE, for node exporter's textfile collector"
    add("-o", "--output", type=home_path, metavar="FILE", help=output)
    hosts_arguments(parser, "ask")


def stop_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship stop`."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="deployments, or jobs that watch shows")
    add("--remove", action="store_true", help="also remove container, compile cache, files and key")
    idle = "stop each when its last request is answered, after ten minutes at the latest"
    add("--when-idle", action="store_true", help=idle)
    add("-y", "--yes", action="store_true", help="with --remove: do not ask")


def logs_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship logs`."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="deployment, or job")
    add("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    add(
        "-n",
        "--tail",
        type=line_count,
        default="all",
        metavar="N",
        help="only the last N lines (default: all; of a job, those of its last run)",
    )
    since = "from a time on: 2h, 7d, 2026-01-31T04:05 (UTC); of a job, all runs since then"
    add("--since", type=past_time, metavar="TIME", help=since)


_STATE_EXIT = {
    "healthy": Exit.OK,
    "loading": Exit.INCOMPLETE,
    "stalled": Exit.INCOMPLETE,
    "degraded": Exit.INCOMPLETE,
    "stopped": Exit.HOST,  # where it is asked for by name; of all it is no fault
    "down": Exit.HOST,
    "hung": Exit.HOST,
    "unknown": Exit.HOST,
}


def cmd_status(context: Context) -> Exit:
    """The state of deployments, each proven by a real request.

    Without docker it is unknown, and said so.
    """
    from hfship.serve.status import status_text

    if context.args.format != "text" or context.args.output:
        from hfship.commands.status_formats import print_metrics

        return print_metrics(context, read_statuses)
    if means_hosts(context.args):
        from hfship.commands.hosts import HostRows, status_of_hosts
        from hfship.commands.repairing_hosts import repair_hosts

        def code_of(found: List[DeploymentStatus]) -> Exit:
            return exit_of(found, bool(context.args.names))

        def repair(rows: HostRows, silent: List[str]) -> Exit:
            return repair_hosts(context, rows, silent)

        return status_of_hosts(context, code_of, repair)
    if context.args.site:
        from hfship.commands.site import show_site

        return show_site(context)
    if context.args.install:
        from hfship.commands.repairing import install_repair

        return install_repair(context)
    if context.args.every:
        from hfship.commands.guard import keep_watch

        return keep_watch(context)
    statuses = read_statuses(context)
    if statuses or context.args.json:
        text = status_text(statuses, context.reporter.width)
        context.reporter.result_of(text, [status.json() for status in statuses])
    else:
        context.reporter.info(f"no deployments in {context.settings.deploy_dir}")

    return exit_of(statuses, by_name=bool(context.args.names))


def exit_of(statuses: Sequence[DeploymentStatus], by_name: bool) -> Exit:
    """The gravest of the states, as an exit code.

    What was stopped on purpose counts only where it was asked for `by_name`.
    """
    codes = [Exit.OK]
    for status in statuses:
        if by_name or status.state != "stopped":
            codes.append(_STATE_EXIT[status.state])
    return max(codes)


def read_statuses(context: Context) -> List[DeploymentStatus]:
    """The state of the deployments that are named, or of all.

    Of a model that a models file lists, too, when it was not served yet. Raises NotFoundError.
    """
    from hfship.serve.deployments import list_deployments, look_at_deployment
    from hfship.serve.files import PLAN_FILE
    from hfship.serve.status import deployment_status, not_served_status, unknown_status
    from hfship.serve.terms import Plan

    deploy_dir = context.settings.deploy_dir
    deployments: List[Deployment] = []
    unreadable: Dict[str, HfshipError] = {}
    not_served: List[str] = []
    if not context.args.names:
        deployments, unreadable = list_deployments(deploy_dir, context.reporter, look_at_deployment)
    for name in context.args.names:
        if context.listed and not (deploy_dir / name / PLAN_FILE).exists():
            not_served.append(name)
        else:
            deployments.append(named_deployment(context, name, look_at_deployment))

    problem = ""
    if deployments:
        problem = docker_problem(context.reporter)
    statuses = []
    for deployment in deployments:
        if problem:
            statuses.append(unknown_status(deployment.plan, problem))
            continue
        limit_s = context.args.hang_after
        with context.reporter.clock(f"asking {deployment.plan.name}", limit_s):
            status = deployment_status(deployment, limit_s)
        if context.args.repair:
            from hfship.commands.repairing import repaired

            status = repaired(context, deployment, status)
        statuses.append(_with_repairs(deployment, status))

    for name in not_served:
        statuses.append(not_served_status(name))

    for name, error in unreadable.items():
        statuses.append(unknown_status(Plan(name=name), error.what))

    return statuses


def _with_repairs(deployment: Deployment, status: DeploymentStatus) -> DeploymentStatus:
    """The status with what was repaired lately, which says that all is not well."""
    if (
        status.repair
        or status.state == "stopped"
        or not (deployment.folder / "repairs.log").exists()
    ):
        return status
    from hfship.serve.watchdog import read_repairs, repairs_note

    notes = [status.note, repairs_note(read_repairs(deployment.folder), time.time())]
    return replace(status, note="; ".join(note for note in notes if note))


def docker_problem(reporter: Reporter) -> str:
    """Why docker cannot be asked, "" when it can; said in full at once."""
    from hfship.serve.docker import require_docker

    try:
        require_docker()
    except HostError as exc:
        reporter.error(exc)
        return exc.what

    return ""


@dataclass(frozen=True)
class Stopped:
    """A job or deployment that was stopped."""

    name: str
    state: str  # stopped, removed
    what: str  # for people

    def text(self) -> str:
        """What was done, and what stays."""
        return self.what

    def json(self) -> Dict[str, Any]:
        """docs/json.md: stop."""
        return {"name": self.name, "state": self.state}


def cmd_stop(context: Context) -> Exit:
    """Stop jobs and deployments. The files of both stay, but with --remove those of deployments."""
    from hfship.serve.deployments import Deployment
    from hfship.serve.docker import require_docker

    args = context.args
    found = [job_or_deployment(context, name) for name in args.names]
    deployments = [each for each in found if isinstance(each, Deployment)]
    if deployments:
        require_docker()
    if args.remove and not args.yes:
        folders = [str(each.folder) for each in deployments]
        what = ", ".join(folders) or "nothing"
        question = f"remove {what} with key and compile cache? The model stays."
        confirm(question, context.reporter)

    print_results(context, (_stop_slowly(each, context) for each in found))
    if not args.remove:
        _say_how_to_start(deployments, context.reporter)
    return Exit.OK


def _say_how_to_start(deployments: Sequence[Deployment], reporter: Reporter) -> None:
    names = [deployment.plan.name for deployment in deployments]
    if names:
        step = as_typed(command_line("hfship", "restart", *names))
        reporter.info(f"  next  {step}")


def _stop_slowly(running: Union[Job, Deployment], context: Context) -> Stopped:
    """`stop`, with a clock: vLLM may take a minute to end."""
    from hfship.ops.jobs import STOP_STEPS, Job
    from hfship.serve.docker import COMPOSE_TIMEOUT_S

    if isinstance(running, Job):
        name = running.record.name
        limit_s = sum(patience_s for _, patience_s in STOP_STEPS)
    else:
        name, limit_s = running.plan.name, COMPOSE_TIMEOUT_S
        if context.args.when_idle:
            _await_idle(running, context)
    with context.reporter.clock(f"stopping {name}", limit_s):
        return stop(running, context.args.remove)


def _await_idle(deployment: Deployment, context: Context) -> None:
    from hfship.serve.engine import wait_until_idle
    from hfship.site.rolling import DRAIN_S

    name = deployment.plan.name
    with context.reporter.clock(f"{name}: waiting until its requests are answered", DRAIN_S):
        if not wait_until_idle(deployment.plan, DRAIN_S):
            context.reporter.warn(f"{name}: requests that took too long were cut off")


def stop(running: Union[Job, Deployment], remove: bool) -> Stopped:
    """Stop a job or a deployment, and with `remove` delete the folder of a deployment."""
    from hfship.ops.background import stop_job
    from hfship.ops.jobs import Job
    from hfship.serve.stop import stop_deployment

    if isinstance(running, Job):
        return Stopped(running.record.name, "stopped", stop_job(running))

    name = running.plan.name
    stop_deployment(running, remove)
    if remove:
        return Stopped(name, "removed", f"removed {name}; {running.folder} is gone")

    return Stopped(name, "stopped", f"stopped {name}; {running.folder} stays")


def cmd_logs(context: Context) -> Exit:
    """The log of a job or of a deployment."""
    from hfship.ops.joblog import follow_log
    from hfship.ops.jobs import Job
    from hfship.serve.deployments import look_at_deployment
    from hfship.serve.docker import inspect_container, require_docker, stream_logs

    args = context.args
    if not args.name:
        raise no_name_given("logs", context)
    found = job_or_deployment(context, args.name, look_at_deployment)
    if isinstance(found, Job):
        follow_log(found, args.follow, args.tail, args.since, context.reporter)
        return Exit.OK

    require_docker()
    name = found.plan.name
    if inspect_container(name) is None:
        show_last_log(context, found)
        return Exit.OK
    return stream_logs(name, args.follow, args.tail, args.since, context.reporter)


def show_last_log(context: Context, deployment: Deployment) -> None:
    """What was kept of the log of a container that is gone. Raises NotFoundError."""
    from hfship.serve.stop import read_last_log, read_stopped

    name = deployment.plan.name
    stopped = read_stopped(deployment.folder)
    lines = read_last_log(deployment.folder).splitlines()
    if not lines:
        raise NotFoundError(f"{name} has no container, and no log", "", f"hfship serve {name}")
    if context.args.tail != "all":
        lines = lines[-int(context.args.tail) or len(lines) :]
    context.reporter.info(f"{name} has no container: {stopped or 'it is gone'}; its last log:")
    for line in lines:
        context.reporter.result(line)


def restart_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship restart`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="deployments")


def cmd_restart(context: Context) -> Exit:
    """Start deployments again as they are, and wait until they answer."""
    from hfship.serve.docker import require_docker

    found = [named_deployment(context, name) for name in context.args.names]
    require_docker()
    print_results(context, (restart(context, deployment) for deployment in found))
    return Exit.OK


@dataclass(frozen=True)
class Restarted:
    """A deployment that was started again, and answers."""

    name: str
    url: str
    started: Started

    def text(self) -> str:
        """Where it answers, and how long it took."""
        return f"{self.name} answers at {self.url} ({self.started.phases_text() or 'at once'})"

    def json(self) -> Dict[str, Any]:
        """docs/json.md: restart."""
        answer = self.started.answer
        return {
            "name": self.name,
            "state": "healthy",
            "url": self.url,
            "task": answer.task,
            "latency_s": round(answer.seconds, 3),
            "start_s": self.started.seconds or None,
        }


def restart(context: Context, deployment: Deployment) -> Restarted:
    """Start a deployment again as its files say; one that was stopped, too. Raises HostError,
    IncompleteError when it does not answer in time."""
    from hfship.serve.start import restart_deployment, wait_until_it_answers

    restarts = restart_deployment(deployment, context.reporter)
    started = wait_until_it_answers(deployment, restarts, context.reporter)
    return Restarted(deployment.plan.name, deployment.plan.url, started)
