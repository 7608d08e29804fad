# SPDX-License-Identifier: Apache-2.0
"""Registries of images, as commands name them and log in there."""

from __future__ import annotations

import argparse
import os
import platform
from typing import TYPE_CHECKING, Any, Optional

from hfship.base.imagefacts import PLATFORM
from hfship.base.settings import home_path, load_settings
from hfship.commands.options import option_type

if TYPE_CHECKING:
    import threading

    from hfship.commands.context import Context
    from hfship.hub.registry import RegistryClient
    from hfship.hub.registry_login import RegistryLogin
    from hfship.hub.registry_protocol import ImageReference

# What Python calls machines, and what images call them.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}


def image_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of fetch that are for images and registries."""
    group = parser.add_argument_group("images, docker://[REGISTRY/]NAME[:TAG][@DIGEST]")
    add = group.add_argument
    add(
        "--platform",
        type=option_type(str, lambda text: bool(PLATFORM.match(text)), "like linux/amd64"),
        metavar="OS/ARCH",
        help="of the machine that will run the image (default: like this one)",
    )
    registry_arguments(group)


def registry_arguments(group: Any) -> None:
    """The arguments for whoever talks to a registry."""
    add = group.add_argument
    add("--registry-user", metavar="USER", help="log in (default: what docker login keeps)")
    add(
        "--registry-password-file",
        type=home_path,
        metavar="FILE",
        help="file with the password or token of that user",
    )
    add("--plain-http", action="store_true", help="the registry speaks no TLS")


def this_platform() -> str:
    """What images for this machine are built for."""
    machine = platform.machine()
    architecture = ARCHITECTURES.get(machine, machine)
    return f"linux/{architecture}"


def registry_client(
    reference: ImageReference, context: Context, stop: threading.Event, connections: int
) -> RegistryClient:
    """A client for the registry of an image, with the login that was given or that docker keeps.

    Raises UsageError, NetworkError.
    """
    from hfship.hub.registry import RegistryClient, registry_endpoint

    reporter = context.reporter
    login = registry_login(reference, context)
    endpoint = registry_endpoint(reference, context.args.plain_http, login, reporter)
    named = getattr(context.args, "mirror", ())  # push has none
    mirrors = [load_settings({}, url).endpoint for url in named]
    return RegistryClient(
        reference,
        endpoint,
        login,
        reporter,
        stop,
        connections,
        mirrors,
    )


def registry_login(reference: ImageReference, context: Context) -> Optional[RegistryLogin]:
    """The login of --registry-user, else that of docker's and podman's files."""
    from hfship.hub.registry_login import find_login, given_login

    args = context.args
    if args.registry_user:
        return given_login(args.registry_user, args.registry_password_file)
    return find_login(reference.registry, reference.repository, os.environ, context.reporter.warn)
