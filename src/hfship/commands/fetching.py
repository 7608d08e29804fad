# SPDX-License-Identifier: Apache-2.0
"""What fetching models and fetching images have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Sequence, Tuple

from hfship.base.errors import HfshipError, IntegrityError
from hfship.base.files import free_bytes, require_inodes, require_room
from hfship.base.settings import load_settings
from hfship.base.text import counted, human_bytes, human_seconds, table
from hfship.base.values import dataclass
from hfship.commands.admission import admit, code_rows, site_policy
from hfship.commands.record import recorder_of

if TYPE_CHECKING:
    import threading

    from hfship.base.manifest import Manifest
    from hfship.base.report import Reporter
    from hfship.commands.context import Context
    from hfship.hub.download_state import TransferSettings
    from hfship.hub.fetch import FetchPlan
    from hfship.hub.transport import Transport


def fetch_missing(
    client: Transport,
    plans: Sequence[FetchPlan],
    root: Path,
    stop: threading.Event,
    settings: TransferSettings,
    args: argparse.Namespace,
) -> Tuple[List[FetchPlan], int]:
    """Mend what can be mended here, and download the rest if there is room for it.

    Returns the plans less what was mended, and the bytes that came.
    """
    from hfship.hub.fetch import about_one_of, bytes_to_write, fetch_files, mend_plan

    mended = []
    for number, plan in enumerate(plans, 1):
        with about_one_of(client.reporter, plan.name, number, len(plans)):
            mended.append(mend_plan(client, plan, root, repair_only=args.repair))

    sizes = [transfer.remote.size for plan in mended for transfer in plan.transfers]
    needed = sum(bytes_to_write(plan) for plan in mended)
    largest = max(sizes, default=0)
    step = "choose another disk with -o"
    require_room(root, needed, largest, "fetch", step)
    files = sum(plan.new_inodes for plan in mended if plan.transfers)
    require_inodes(root, files, "fetch", step)
    came = fetch_files(client, mended, stop, settings, args.engine)
    return mended, came


def transfer_settings(args: argparse.Namespace) -> TransferSettings:
    """How to download. Raises UsageError for a mirror that is no address."""
    from hfship.hub.download_state import TransferSettings

    mirrors = [load_settings({}, url).endpoint for url in args.mirror]
    return TransferSettings(
        connections=args.jobs, limit_bps=args.limit_rate, mirrors=tuple(mirrors)
    )


def report_speed(came: int, seconds: float, reporter: Reporter) -> None:
    """Say how fast `came` bytes, of all models together, were fetched; a bar has said it."""
    amount = human_bytes(came)
    rate = came / seconds
    speed = human_bytes(rate)
    took = human_seconds(seconds)
    said = f"fetched {amount} in {took} ({speed}/s)"
    if reporter.draws_bars:
        reporter.log("info", said)
    else:
        reporter.info(said)


def show_fetch_plans(plans: Sequence[FetchPlan], context: Context) -> None:
    """Print what --dry-run found: a table for each repository, or with --json a row for each file
    of all."""
    reporter = context.reporter
    if context.args.json:
        reporter.result_json([row for plan in plans for row in planned_files(plan)])
        return

    for plan in plans:
        source = plan.snapshot.source
        reporter.result(f"{source.resolved_repo} at {source.commit} -> {plan.folder}")
        rows = []
        for file in plan.wanted:
            state = "here" if file.path in plan.present else "missing"
            rows.append([file.path, human_bytes(file.size), state])
        reporter.result(table(rows, ["file", "size", "state"]))
        missing = sum(transfer.remote.size for transfer in plan.transfers)
        count = f"{len(plan.transfers)} of {counted(len(plan.wanted), 'file')} to fetch"
        free = human_bytes(free_bytes(plan.folder))
        reporter.result(f"{count}, {human_bytes(missing)}; {free} free")


def planned_files(plan: FetchPlan) -> List[Dict[str, Any]]:
    """The rows of hfship-fetch/1, --dry-run, of docs/json.md."""
    return [
        {
            "name": plan.name,
            "path": file.path,
            "size": file.size,
            "etag": file.etag,
            "present": file.path in plan.present,
        }
        for file in plan.wanted
    ]


@dataclass(frozen=True)
class FetchedModel:
    """A model that is complete and proven."""

    name: str
    repo: str  # as asked for
    commit: str
    folder: Path
    files: int
    size: int  # bytes
    fetched_files: int
    proof: str  # how it is known that the files are right
    manifest: Manifest

    def text(self) -> str:
        """`FOLDER: 3 files, 1.2 GB, commit 0123456789ab; every file verified`"""
        files = counted(self.files, "file")
        content = f"{files}, {human_bytes(self.size)}, commit {self.commit[:12]}"
        return f"{self.folder}: {content}; {self.proof}{self.manifest.partial_text}"

    def json(self) -> Dict[str, Any]:
        """hfship-fetch/1 of docs/json.md."""
        return {
            "name": self.name,
            "repo": self.repo,
            "commit": self.commit,
            "folder": str(self.folder),
            "files": self.files,
            "bytes": self.size,
            "fetched_files": self.fetched_files,
            "left_out": list(self.manifest.left_out_paths),
            "partial": list(self.manifest.partial),
            "license": self.manifest.licence,
            "code_files": code_rows(self.manifest),
        }


def finish_model(plan: FetchPlan, context: Context) -> FetchedModel:
    """Write the manifest of a complete model, if the policy takes what is in it. Raises
    IntegrityError."""
    from hfship.hub.fetch import finish_fetch

    policy = site_policy(context)

    def accept(folder: Path, manifest: Manifest) -> Manifest:
        return admit(folder, manifest, policy, context.reporter)

    manifest = finish_fetch(plan, accept=accept)
    if plan.transfers:
        source = plan.snapshot.source
        details = {
            "endpoint": source.endpoint,
            "repo": source.resolved_repo,
            "commit": source.commit,
            "files": len(manifest.files),
            "proof": "SHA-256 or git blob id of the Hub, of what was written",
        }
        recorder_of(context).note_in_folder(plan.folder, "fetched", manifest, details)
    proof = "verified earlier, nothing to fetch"
    if plan.transfers or context.args.verify:
        proof = "every file verified"
    source = plan.snapshot.source
    return FetchedModel(
        name=plan.name,
        repo=source.repo,
        commit=source.commit,
        folder=plan.folder,
        files=len(manifest.files),
        size=manifest.size,
        fetched_files=len(plan.transfers),
        proof=proof,
        manifest=manifest,
    )


def bring(
    client: Transport, plan: FetchPlan, root: Path, stop: threading.Event, context: Context
) -> None:
    """Bring what is missing of a plan; with --verify raise what is wrong with it."""
    import time

    from hfship.hub.fetch import missing_or_wrong

    args = context.args
    if args.verify:
        raise_worst(missing_or_wrong(plan))
        return
    began = time.monotonic()
    settings = transfer_settings(args)
    _, came = fetch_missing(client, [plan], root, stop, settings, args)
    if came:
        seconds = time.monotonic() - began
        report_speed(came, seconds, context.reporter)


def raise_worst(errors: Sequence[HfshipError]) -> None:
    """Raise the error that counts: wrong bytes are worse than none. Does nothing for none."""
    for error in errors:
        if isinstance(error, IntegrityError):
            raise error
    for error in errors:
        raise error
