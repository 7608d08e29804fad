# SPDX-License-Identifier: Apache-2.0
"""`hfship watch`: show jobs, resume them, or print how to resume them after a reboot."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import TYPE_CHECKING, List

from hfship.base.errors import Exit, NotFoundError
from hfship.base.progress import PLAIN_INTERVAL_S
from hfship.base.pyz import own_file
from hfship.base.report import FailedResult
from hfship.base.text import counted, shorten
from hfship.commands.names import log_folders
from hfship.commands.options import some_seconds
from hfship.commands.results import print_results

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.ops.jobs import Job


def watch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `watch`."""
    add = parser.add_argument
    only = "only these jobs (default: all, also those of others in /home)"
    add("jobs", nargs="*", metavar="JOB", help=only)
    also = "also the jobs of this log folder; repeatable"
    add("--also", action="append", default=[], metavar="DIR", help=also)
    site = "the site behind the gateway instead: models, replicas, GPUs, requests, keys, alerts"
    add("--site", action="store_true", help=site)
    page = "with --site: serve it as a page at /ops of the gateway, for keys with the right ops"
    add("--page", action="store_true", help=page)
    older = "also older ones that ended well (default: the last few; --json has all)"
    add("--all", action="store_true", help=older)
    add("--once", action="store_true", help="show them as they are now; --json alone does too")
    looks = "between two looks; with --json: a line each, while jobs run"
    add("--interval", type=some_seconds, metavar="SECONDS", help=looks)
    resume = "go on with background jobs that a reboot or a kill interrupted"
    add("--resume-all", action="store_true", help=resume)
    install = "resume jobs after each reboot: ask, and install a systemd unit; or print it for you"
    add("--install", action="store_true", help=install)
    add("-y", "--yes", action="store_true", help="with --install: do not ask")


def cmd_watch(context: Context) -> Exit:
    """Show jobs, or resume them."""
    if context.args.page:
        from hfship.commands.site import serve_page

        return serve_page(context)
    if context.args.site:
        from hfship.commands.site import watch_site

        return watch_site(context)
    if context.args.install:
        return install(context)
    if context.args.resume_all:
        return resume_all(context)
    return show_jobs(context)


def install(context: Context) -> Exit:
    """Have jobs resumed after a reboot, or print how."""
    from hfship.commands.installing import install_or_print
    from hfship.ops.service import Service

    argv = [sys.executable, str(own_file()), "watch", "--resume-all"]
    argv += ["--log-dir", str(context.settings.log_dir)]
    service = Service("hfship-resume", "Resume interrupted hfship jobs", tuple(argv), stays=False)
    return install_or_print(context, service)


def resume_all(context: Context) -> Exit:
    """Resume what was interrupted in the background, and say what came of it."""
    from hfship.ops.background import resume_jobs
    from hfship.ops.jobs import read_jobs

    jobs = read_jobs([context.settings.log_dir], context.reporter.warn)
    results = print_results(context, resume_jobs(jobs, context.reporter))
    failed = sum(isinstance(result, FailedResult) for result in results)
    if not results:
        context.reporter.info("nothing to resume")
    elif failed:
        context.reporter.info(f"resumed {len(results) - failed} of {counted(len(results), 'job')}")

    if failed:
        return Exit.INCOMPLETE
    return Exit.OK


def show_jobs(context: Context) -> Exit:
    """Show jobs once, or until nobody looks. Raises NotFoundError."""
    from hfship.ops.jobs import RECORD_INTERVAL_S
    from hfship.ops.watch import job_row, watch_in_lines, watch_lines, watch_on_screen

    args, reporter = context.args, context.reporter
    _require_known(context)
    with_older = args.all or bool(args.jobs)

    def jobs() -> List[Job]:
        return _chosen_jobs(context)

    if args.json and not args.interval:
        reporter.result_json([job_row(job) for job in jobs()])
    elif args.once:
        width = shutil.get_terminal_size((200, 24)).columns
        height = 1000
        lines = watch_lines(jobs(), time.time(), width, height, with_older)
        reporter.show("".join(line + "\n" for line in lines))
    elif reporter.out.isatty() and not args.json:
        watch_on_screen(jobs, args.interval or RECORD_INTERVAL_S, with_older, reporter)
    else:
        watch_in_lines(jobs, args.interval or PLAIN_INTERVAL_S, with_older, args.json, reporter)

    return Exit.OK


def _chosen_jobs(context: Context) -> List[Job]:
    """The jobs that are named, all without names."""
    from hfship.ops.jobs import read_jobs
    from hfship.ops.watch import by_need

    found = by_need(read_jobs(log_folders(context)))
    if not context.args.jobs:
        return found
    return [job for job in found if job.label in context.args.jobs]


def _require_known(context: Context) -> None:
    """Warn of files that are no records. Raises NotFoundError for a name that no job has."""
    from hfship.ops.jobs import read_jobs

    known = [job.label for job in read_jobs(log_folders(context), context.reporter.warn)]
    for name in context.args.jobs:
        if name not in known:
            why = f"jobs: {shorten(known) or 'none'}"
            raise NotFoundError(f"no such job: {name}", why, "hfship watch --once")
