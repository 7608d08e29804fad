# SPDX-License-Identifier: Apache-2.0
"""`hfship status --format prometheus`: to stdout, or to a file that is replaced whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Sequence

from hfship.base.errors import Exit, UsageError
from hfship.base.files import atomic_write

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.serve.status import DeploymentStatus

PUBLIC = 0o644  # node exporter reads it as a user of its own


def require_format(context: Context) -> None:
    """Raise UsageError for options that do not go together."""
    args = context.args
    if args.output and args.format != "prometheus":
        step = "hfship status --format prometheus -o FILE.prom"
        raise UsageError("-o is for --format prometheus", "", step)
    if args.json and args.format == "prometheus":
        what = "--json and --format prometheus are two formats"
        raise UsageError(what, "", "give one of them")


def print_metrics(
    context: Context, read_statuses: Callable[[Context], Sequence[DeploymentStatus]]
) -> Exit:
    """Print what Prometheus reads. The states are in it, so the exit code tells of none.

    Raises UsageError, DiskError, and what `read_statuses` does.
    """
    from hfship.ops.jobs import read_jobs
    from hfship.ops.metrics import Hardware, metrics_text, read_disks
    from hfship.serve.xid import read_xids
    from hfship.site.readings import certificate_days
    from hfship.site.store import gateway_folder

    require_format(context)
    statuses = read_statuses(context)
    settings = context.settings
    jobs = read_jobs([settings.log_dir])
    days = certificate_days(gateway_folder(settings.deploy_dir))
    text = metrics_text(statuses, jobs, read_disks(settings), Hardware(days, read_xids()))
    if context.args.output:
        atomic_write(context.args.output, text, PUBLIC, durable=False)
    else:
        context.reporter.show(text)
    return Exit.OK
