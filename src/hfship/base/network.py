# SPDX-License-Identifier: Apache-2.0
"""Addresses and ports of this machine."""

from __future__ import annotations

import errno
import socket

from hfship.base.errors import HostError


def family_of(address: str) -> socket.AddressFamily:
    """The family of an IP address in text: IPv6 when it has a colon."""
    if ":" in address:
        return socket.AF_INET6
    return socket.AF_INET


def port_is_free(bind: str, port: int) -> bool:
    """Whether a server could listen there now. Raises HostError for an address of another
    machine."""
    with socket.socket(family_of(bind), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise HostError(
                f"cannot listen on {bind}",
                str(exc),
                "give an address of this machine as --host",
            ) from exc

    return True
