# SPDX-License-Identifier: Apache-2.0
"""`hfship fetch`: its arguments, the order of its steps and its results."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Iterator, List, Optional, Sequence

from hfship.base.errors import HfshipError, IntegrityError, UsageError, command_line
from hfship.base.manifest import REPO_TYPES, make_manifest
from hfship.base.report import FailedResult
from hfship.base.settings import (
    find_token,
    home_path,
    parse_rate,
    read_token_file,
)
from hfship.base.values import replace
from hfship.commands.admission import accepted_plans, site_policy
from hfship.commands.fetch_image import fetch_images, is_image
from hfship.commands.fetching import (
    fetch_missing,
    finish_model,
    report_speed,
    show_fetch_plans,
    transfer_settings,
)
from hfship.commands.names import repo_named, word_for
from hfship.commands.options import option_type
from hfship.commands.registries import image_arguments
from hfship.commands.results import print_results, summarize_failures

if TYPE_CHECKING:
    from hfship.base.errors import Exit
    from hfship.base.report import Reporter, Result
    from hfship.base.settings import Token
    from hfship.commands.context import Context
    from hfship.hub.fetch import FetchPlan, FetchRequest


def fetch_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of fetch."""
    from hfship.hub.ranges import MAX_CONNECTIONS

    most = 2 * MAX_CONNECTIONS
    add = parser.add_argument
    add("repos", nargs="*", metavar="REPO[@REV]", help="ORG/NAME, at a branch, tag or commit")
    add(
        "-o",
        "--output",
        metavar="DIR",
        help="where NAME/ appears (default: HFSHIP_MODELS_DIR, ~/models)",
    )
    add("--name", help="name of the model folder (default: the last part of REPO)")
    add("--revision", help="revision for REPOs that name none (default: the default branch)")
    add(
        "--repo-type",
        choices=REPO_TYPES,
        default="model",
        help="kind of REPO (default: %(default)s)",
    )
    add(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="fetch only these files; repeatable",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave these files out; repeatable",
    )
    add("--endpoint", metavar="URL", help="Hub or mirror (default: HF_ENDPOINT or huggingface.co)")
    add(
        "--token-file", metavar="FILE", help="file with the Hub token (default: HF_TOKEN, ~/.cache)"
    )
    add(
        "-j",
        "--jobs",
        type=option_type(int, lambda count: 1 <= count <= most, f"from 1 to {most}"),
        metavar="N",
        help="connections (default: as many as bring more)",
    )
    add(
        "--limit-rate", type=parse_rate, metavar="RATE", help="bytes per second, like 20M or 20MB/s"
    )
    add(
        "--mirror",
        action="append",
        default=[],
        metavar="URL",
        help="ask it before the Hub; repeatable",
    )
    add("--all-files", action="store_true", help="also weights in formats that vLLM does not read")
    add("--verify", action="store_true", help="hash what is there and fetch nothing")
    add("--repair", action="store_true", help="hash what is there and fetch only what is wrong")
    add(
        "--engine",
        choices=("own", "aria2"),
        default="own",
        help="aria2: leave the transfer to aria2c",
    )
    add("--dry-run", action="store_true", help="show what would be fetched")
    image_arguments(parser)


def cmd_fetch(context: Context) -> Exit:
    """Fetch models, and images: by kind, if there are both."""
    images = [word for word in context.args.repos if is_image(word)]
    models = [word for word in context.args.repos if not is_image(word)]
    if not images:
        return fetch_models(context)
    if not models:
        return fetch_images(context)

    from hfship.commands.runs import run_list
    from hfship.commands.table import COMMANDS

    runs = {}
    for kind, words in (("models", models), ("images", images)):
        values = {**vars(context.args), "repos": words}
        runs[kind] = replace(context, args=argparse.Namespace(**values))
    command = next(row for row in COMMANDS if row.name == "fetch")
    return run_list(command, runs, context.reporter)


def fetch_models(context: Context) -> Exit:
    """Plan every repository, check the room, then bring all their files through one pool of
    connections."""
    from hfship.hub.client import HubClient
    from hfship.hub.fetch import missing_or_wrong, plan_all

    args, reporter = context.args, context.reporter
    args.repos = [repo_named(text, context.settings, reporter) for text in args.repos]
    requests = fetch_requests(args, context.settings.endpoint)
    token = fetch_token(args, reporter)
    settings = transfer_settings(args)
    policy = site_policy(context)
    stop = threading.Event()
    client = HubClient(context.settings, token, reporter, stop, settings.most_connections)
    root = context.settings.models_dir
    if args.output:
        root = home_path(args.output)
    with contextlib.ExitStack() as locks:
        plans, failures = plan_all(client, requests, root, locks, stop, args.dry_run)
        plans, refused = accepted_plans(plans, policy)
        failures += refused
        began = time.monotonic()
        came = 0
        complete = plans
        if args.dry_run:
            show_fetch_plans(plans, context)
        elif args.verify:
            for plan in plans:
                failures += missing_or_wrong(plan)
            complete = [plan for plan in plans if not plan.transfers]
        else:
            complete, came = fetch_missing(client, plans, root, stop, settings, args)
        seconds = time.monotonic() - began
        if not args.dry_run:
            failures = report_fetch(complete, failures, context)
        if came:
            report_speed(came, seconds, reporter)

    return summarize_failures(failures, len(requests), reporter)


# -- what was asked for


def fetch_token(args: argparse.Namespace, reporter: Reporter) -> Optional[Token]:
    """The token of --token-file, else that of the environment. Raises UsageError."""
    if args.token_file:
        return read_token_file(home_path(args.token_file))
    return find_token(os.environ, reporter.warn)


def fetch_requests(args: argparse.Namespace, endpoint: str) -> List[FetchRequest]:
    """The repositories asked for, with the names of their folders. Raises UsageError when names
    collide."""
    _require_no_files(args.repos)
    requests = [fetch_request(text, args, endpoint) for text in args.repos]
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        step = "fetch them one by one with --name"
        raise UsageError("two repositories would go into the same folder", ", ".join(names), step)
    return requests


def _require_no_files(repos: Sequence[str]) -> None:
    """Raise UsageError for `fetch REPO FILE`, which is how hf names single files."""
    if len(repos) < 2:
        return
    from hfship.commands.meant import file_meant

    for repo, files in file_meant(repos).items():
        included = [word for name in files for word in ("--include", name)]
        step = command_line("hfship", "fetch", repo, *included)
        what = f"{files[0]} looks like a file of {repo}, and not like a repository"
        raise UsageError(what, "single files are chosen with --include", step)


def fetch_request(text: str, args: argparse.Namespace, endpoint: str) -> FetchRequest:
    """One repository as it was typed: REPO, REPO@REV or an address. Raises UsageError."""
    from hfship.hub.fetch import FetchRequest
    from hfship.hub.protocol import parse_repo

    repo, revision = parse_repo(text, endpoint)
    revision = revision or args.revision
    name = args.name or repo.rpartition("/")[2]
    make_manifest(name, ())  # refuses what cannot be a folder name
    if revision and not revision.isprintable():  # bytes that are no UTF-8, say
        raise UsageError(f"{revision!r} is not a revision", "", "give a branch, tag or commit")

    return FetchRequest(
        repo=repo,
        revision=revision,
        name=name,
        repo_type=args.repo_type,
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        all_files=args.all_files,
        rehash=args.verify or args.repair,
    )


# -- results


def report_fetch(
    plans: Sequence[FetchPlan], failures: Sequence[HfshipError], context: Context
) -> List[HfshipError]:
    """Write the manifests of complete models and print what is there now.

    Returns the failures, with those of models that the policy refuses for what is in them.
    """
    refused: List[HfshipError] = []

    def results() -> Iterator[Result]:
        for plan in plans:
            try:
                fetched = finish_model(plan, context)
            except IntegrityError as exc:
                refused.append(exc)
                continue
            settings = context.settings
            places = [settings.models_dir, settings.site_models_dir]
            context.reporter.then("pack", word_for(plan.folder, places))
            yield fetched
        for failure in [*failures, *refused]:
            yield FailedResult(failure)

    print_results(context, results())
    return [*failures, *refused]
