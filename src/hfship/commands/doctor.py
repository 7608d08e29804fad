# SPDX-License-Identifier: Apache-2.0
"""`hfship doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, List, Optional, Tuple

from hfship.base.errors import Exit, UsageError
from hfship.base.settings import truthy
from hfship.commands.options import hosts_arguments, means_hosts

if TYPE_CHECKING:
    from hfship.commands.context import Context
    from hfship.ops.probe import Finding


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of doctor."""
    add = parser.add_argument
    add(
        "repo",
        nargs="?",
        metavar="REPO[@REV]",
        help="prove access to it, and measure with its files",
    )
    add("--endpoint", metavar="URL", help="Hub or mirror (default: HF_ENDPOINT or huggingface.co)")
    add(
        "--mirror",
        action="append",
        default=[],
        metavar="URL",
        help="compare it with the Hub; repeatable",
    )
    offline = "look at the offline side: folders, docker, GPUs, ports (also: HF_HUB_OFFLINE)"
    add("--offline", action="store_true", help=offline)
    facts = "print as JSON what a control host asks of this host: GPUs, images, models, deployments"
    add("--facts", action="store_true", help=facts)
    add("--models", dest="models_file", metavar="FILE", help="models file with the hosts")
    hosts_arguments(parser, "look at the offline side")


def cmd_doctor(context: Context) -> Exit:
    """Look at this side: the network and this machine, or what the offline side needs."""
    from hfship.ops.probe import Diagnosis

    if context.args.facts:
        from hfship.site.facts import own_facts

        context.reporter.result_json(own_facts(context.settings))
        return Exit.OK
    if means_hosts(context.args):
        from hfship.commands.hosts import diagnose_hosts

        return diagnose_hosts(context)
    offline = context.args.offline or truthy(os.environ.get("HF_HUB_OFFLINE"))
    look = _offline_findings if offline else _connected_findings
    diagnosis = Diagnosis(look(context))
    context.reporter.result_of(diagnosis.text(), diagnosis.json())
    return diagnosis.exit_code


def _connected_findings(context: Context) -> List[Finding]:
    """Probe the network in order, and at the same time this machine."""
    from hfship.hub.protocol import parse_repo
    from hfship.ops.doctor import disk_probes, program_probes, python_probe

    repo = None
    if context.args.repo:
        repo = parse_repo(context.args.repo)
    settings = context.settings
    folders = list(dict.fromkeys([settings.models_dir, settings.package_dir]))
    probes = [
        python_probe(False),
        *disk_probes(folders),
        *program_probes(False),
    ]
    running = [probe.start() for probe in probes]
    findings = _probe_hub(context, repo)
    return findings + [probe.result(context.reporter) for probe in running]


def _offline_findings(context: Context) -> List[Finding]:
    """Look at what unpack and serve need. Raises UsageError for what needs a network."""
    from hfship.ops.doctor import program_probes, python_probe
    from hfship.ops.doctor_site import site_findings

    if context.args.repo:
        step = "leave out --offline and HF_HUB_OFFLINE, or the repository"
        raise UsageError("a repository is proven over the network alone", "", step)
    probes = [python_probe(True), *program_probes(True)]
    running = [probe.start() for probe in probes]
    on_site = list(site_findings(context.settings, context.reporter))
    findings = [probe.result(context.reporter) for probe in running]
    python, *programs = findings
    return [python, *on_site, *programs]


def _probe_hub(context: Context, repo: Optional[Tuple[str, Optional[str]]]) -> List[Finding]:
    """What the probes of the network find; nothing on a Python that is too old for it."""
    from hfship.hub.session import OLDEST_PYTHON

    if sys.version_info < OLDEST_PYTHON:
        return []

    from hfship.ops.doctor_hub import HubDoctor

    doctor = HubDoctor(context.settings, repo, context.args.mirror, context.reporter)
    return list(doctor.findings())
