# SPDX-License-Identifier: Apache-2.0
"""`hfship clean --jobs`: records and logs of jobs that have ended."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

from hfship.base.errors import Exit, as_typed
from hfship.base.files import disk_errors
from hfship.base.text import counted, human_bytes, shorten
from hfship.commands.results import confirm, leftover_row, show_leftovers

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.commands.context import Context
    from hfship.ops.jobs import Job


def clean_jobs(context: Context) -> Exit:
    """Show which go, ask, remove; those that can be resumed stay. Raises UsageError, DiskError."""
    args, reporter, folder = context.args, context.reporter, context.settings.log_dir
    going, waiting = _ended_jobs(folder, args.older_than)
    row = _row(folder, going)
    rows = [each for each in (row, _row(folder, waiting, "can be resumed")) if each["files"]]
    if not args.json:
        _say_kept(waiting, context)
        show_leftovers(rows, row["bytes"], context)

    removed, freed = _ask_and_remove(context, going, row["bytes"])
    if args.json:
        result = {
            "leftovers": rows,
            "bytes": row["bytes"],
            "removed": removed,
            "freed": freed,
        }
        reporter.result_json(result)
    elif removed:
        reporter.result(f"removed {counted(removed, 'job')}, freed {human_bytes(freed)}")
    return Exit.OK


def _ended_jobs(folder: Path, older_than_s: float) -> Tuple[List[Job], List[Job]]:
    """Our jobs in the log folder that ended at least so long ago: (those that may go, those that
    can be resumed)."""
    from hfship.ops.jobs import our_ended_jobs

    latest = time.time() - older_than_s
    going: List[Job] = []
    waiting: List[Job] = []
    for job in our_ended_jobs(folder):
        if job.record.updated_at > latest:
            continue
        if job.resumable:
            waiting.append(job)
        else:
            going.append(job)

    return going, waiting


def _row(folder: Path, jobs: Sequence[Job], kept: str = "") -> Dict[str, Any]:
    """A row of the table, and of --json, for the records and logs of jobs."""
    from hfship.ops.jobs import job_files

    files = [path for job in jobs for path in job_files(job)]
    size = 0
    for path in files:
        with contextlib.suppress(OSError):
            size += path.stat().st_size

    what = "records and logs of jobs"
    return leftover_row(str(folder), what, len(files), size, [str(path) for path in files], kept)


def _say_kept(waiting: Sequence[Job], context: Context) -> None:
    if not waiting:
        return
    names = shorten([job.record.name for job in waiting])
    step = as_typed("hfship watch --resume-all")
    context.reporter.info(f"kept: {names}: {step} goes on with what ran in the background")


def _ask_and_remove(context: Context, jobs: Sequence[Job], size: int) -> Tuple[int, int]:
    """(how many jobs went, bytes), when the operator says yes. Raises UsageError, DiskError."""
    from hfship.ops.jobs import remove_job

    if not jobs or context.args.dry_run:
        return 0, 0
    if not context.args.yes:
        question = f"remove {counted(len(jobs), 'job')} and free {human_bytes(size)}?"
        confirm(question, context.reporter)

    removed = 0
    for job in jobs:
        # Another run expires it too, or has taken its name.
        with disk_errors("remove", job.log), contextlib.suppress(FileNotFoundError, ValueError):
            removed += remove_job(job)
    return removed, size
