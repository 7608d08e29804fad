# SPDX-License-Identifier: Apache-2.0
"""The certificate that a server shows, seen directly or through an HTTP proxy.

Owns the way to a server for doctor: Route; and what is read from its certificate.
Never: sends a request to the server.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from http.client import HTTPSConnection
from typing import Any, Dict, Mapping, Optional

from hfship.base.errors import HostError
from hfship.base.processes import run_program
from hfship.base.proxies import Proxy, login_error
from hfship.base.values import dataclass


@dataclass(frozen=True)
class Certificate:
    """A server's certificate.

    `fields` is what ssl.getpeercert() gives: empty unless the certificate is believed. `der` is the
    whole of it, believed or not.
    """

    fields: Mapping[str, Any]
    der: bytes

    @property
    def issuer(self) -> str:
        """The organisation that signed it, or its common name; of a believed certificate."""
        names: Dict[str, str] = {}
        for attributes in self.fields["issuer"]:
            names.update(attributes)
        return names.get("organizationName") or names.get("commonName") or "nobody"

    def days_left(self, now: float) -> float:
        """Days from `now` (Unix time) to its end; of a believed certificate."""
        end = ssl.cert_time_to_seconds(self.fields["notAfter"])
        return (end - now) / 86400


@dataclass(frozen=True)
class Route:
    """The way to a server: straight, or through an HTTP proxy."""

    host: str
    port: int
    proxy: Optional[Proxy] = None

    def certificate(self, context: ssl.SSLContext, timeout_s: float) -> Certificate:
        """The certificate of the server.

        Raises OSError: ssl.SSLCertVerificationError when the context does not believe it; and
        ProxyLoginError.
        """
        connection = self._connection(context, timeout_s)
        with contextlib.closing(connection):
            self._connect(connection)
            fields = connection.sock.getpeercert()
            der = connection.sock.getpeercert(binary_form=True)
        return Certificate(fields or {}, der or b"")

    def _connect(self, connection: HTTPSConnection) -> None:
        try:
            connection.connect()
        except OSError as exc:
            if "Tunnel connection failed: 407" in str(exc):  # http.client has no other sign
                raise login_error(self.proxy) from exc
            raise

    def _connection(self, context: ssl.SSLContext, timeout_s: float) -> HTTPSConnection:
        if self.proxy is None:
            return HTTPSConnection(self.host, self.port, timeout=timeout_s, context=context)
        host = self.proxy.host
        port = self.proxy.port
        connection = HTTPSConnection(host, port, timeout=timeout_s, context=context)
        connection.set_tunnel(self.host, self.port, self.proxy.headers)
        return connection


def context_of(bundle: str) -> ssl.SSLContext:
    """A context that believes the CAs of a bundle: a file, or a folder. Raises OSError."""
    if os.path.isdir(bundle):
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def credulous_context() -> ssl.SSLContext:
    """A context that believes everyone: to look at a certificate, never to send anything."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def describe(der: bytes, timeout_s: float) -> str:
    """Who signed a certificate that is not believed, and until when, as openssl says it."""
    argv = ["openssl", "x509", "-inform", "der", "-noout", "-issuer", "-enddate"]
    try:
        done = run_program(argv, der, timeout_s=timeout_s)
    except HostError:  # openssl is not there
        return "the certificate is not believed"
    return done.out.replace("\n", " ").strip()
