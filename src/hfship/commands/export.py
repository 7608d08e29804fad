# SPDX-License-Identifier: Apache-2.0
"""`hfship export`: files of the site for programs that the site has already."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hfship.base.errors import Exit, UsageError
from hfship.base.files import atomic_write, make_dir
from hfship.base.pyz import own_file
from hfship.base.settings import home_path
from hfship.base.text import counted

if TYPE_CHECKING:
    from hfship.commands.context import Context

KINDS = ("monitoring", "schedule", "kubernetes")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hfship export`."""
    add = parser.add_argument
    add(
        "kind",
        type=export_kind,
        choices=KINDS,
        help="for Prometheus and Grafana; timers of systemd; manifests of Kubernetes",
    )
    # Without a type: argparse would hand it its own mark for what is not given.
    add("folder", metavar="DIR", nargs="?", help="where the files go")
    add("--output", "-o", metavar="DIR", help="the same, as an option")
    add(
        "--models",
        dest="models_file",
        metavar="FILE",
        help="models file that counts (default: HFSHIP_MODELS_FILE)",
    )
    address = "of Prometheus, for Grafana (default: %(default)s)"
    add("--prometheus", default="http://localhost:9090", metavar="URL", help=address)
    _cluster_arguments(parser)


def _cluster_arguments(parser: argparse.ArgumentParser) -> None:
    from hfship.site.terms import LOCAL, VOLUMES

    add = parser.add_argument_group("kubernetes").add_argument
    add("--assume-gpus", metavar="8xH100", help="GPUs of a node (default: those of this machine)")
    add("--namespace", default="models", metavar="NAME", help="(default: %(default)s)")
    add(
        "--registry",
        default="",
        metavar="HOST[:PORT]",
        help="the site's own, from which the nodes pull images",
    )
    add(
        "--model-volume",
        choices=VOLUMES,
        default=LOCAL,
        help="models on disks of the nodes, or as images of the registry (default: %(default)s)",
    )
    add("--service-monitor", action="store_true", help="one for each model, for Prometheus")


def export_kind(text: str) -> str:
    """What is exported. Raises ArgumentTypeError, for Swarm with the reason."""
    if text in ("swarm", "docker-swarm"):
        raise argparse.ArgumentTypeError(
            "Docker Swarm cannot run these models: its stack files have no GPUs (docker stack"
            " refuses deploy.resources.reservations.devices, docker/cli#3051);"
            " hfship serve --models FILE works on several [[host]]s, or export kubernetes"
        )
    return text


def export_folder(context: Context) -> Path:
    """Where the files go. Raises UsageError."""
    args = context.args
    folder = args.output or args.folder
    if not folder:
        what = "no folder is given for the files"
        step = f"hfship export {args.kind} DIR"
        raise UsageError(what, "", step)
    return home_path(folder).absolute()


def cmd_export(context: Context) -> Exit:
    """Write the files, and say what to do with them."""
    if context.args.kind == "schedule":
        return export_schedule(context)
    if context.args.kind == "kubernetes":
        from hfship.commands.export_kubernetes import export_kubernetes

        return export_kubernetes(context, export_folder(context))
    from hfship.site.monitoring import export_texts
    from hfship.site.monitoring_run import write_export
    from hfship.site.settings import MonitoringSettings, monitoring_settings
    from hfship.site.store import gateway_folder, read_gateway

    args, reporter = context.args, context.reporter
    gateway = read_gateway(gateway_folder(context.settings.deploy_dir))
    if gateway is None:
        what = f"there is no gateway in {context.settings.deploy_dir}"
        step = "hfship serve --models FILE     # with [gateway] in it"
        raise UsageError(what, "what is watched is behind it", step)
    settings = MonitoringSettings()
    if context.file:
        settings = monitoring_settings(context.file) or settings

    folder = export_folder(context)
    written = write_export(folder, export_texts(settings, gateway.models, args.prometheus))
    count = counted(len(written), "file")
    text = f"wrote {count} to {folder}; prometheus/ is for Prometheus, grafana/ for provisioning"
    reporter.result_of(text, {"folder": str(folder), "files": sorted(written)})

    return Exit.OK


def export_schedule(context: Context) -> Exit:
    """Write a timer and a service of systemd for each [[schedule]]."""
    import sys

    from hfship.site.settings import schedules
    from hfship.site.timers import timer_texts

    reporter = context.reporter
    found = schedules(context.file) if context.file else ()
    if not found or context.file is None:
        what = "there is no [[schedule]] to export"
        step = "hfship export schedule DIR --models FILE     # that has some"
        raise UsageError(what, "", step)
    folder = export_folder(context)
    argv = [sys.executable, str(own_file())]
    texts = timer_texts(found, argv, str(context.file.path.absolute()))
    make_dir(folder)
    for name, text in texts.items():
        atomic_write(folder / name, text)
    timers = " ".join(name for name in texts if name.endswith(".timer"))
    files = counted(len(texts), "file")
    text = f"wrote {files} to {folder}\n  then   systemctl enable --now {timers}"
    reporter.result_of(text, {"folder": str(folder), "files": sorted(texts)})
    return Exit.OK
