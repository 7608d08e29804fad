# SPDX-License-Identifier: Apache-2.0
"""Sessions with the Hub: connections, the certificates they believe, and how we log in.

Owns urllib3 as the program uses it: sessions are made here and nowhere else.
Promises: `Authorization` goes to the Hub's own origin and nowhere else; one TLS context serves all
connections; the head of an answer comes within HEAD_S or not at all; nothing is written to disk.
Never: follows a redirect, or tries again.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import sys
import threading
import time
import types
from functools import lru_cache
from http.client import HTTPResponse
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
)
from urllib.parse import urlencode

from hfship import __version__
from hfship.base.errors import HostError, command_line
from hfship.base.files import write_all
from hfship.base.pyz import own_entry
from hfship.hub.answers import ca_variable, is_basic
from hfship.hub.protocol import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, origin

if TYPE_CHECKING:
    from hfship.base.proxies import Proxy
    from hfship.base.settings import Token


OLDEST_PYTHON = (3, 10)  # for urllib3
NEWEST_PYTHON_MINOR = 20  # looked for on PATH
KEPT_HOSTS = 8  # whose connections are kept: the Hub, its CDNs, mirrors
HEAD_S = 30.0  # seconds for the status and the headers of an answer
MOST_PASSED_OVER = 16 << 10  # bytes of a body that nobody wants; a redirect's has 1,000
# A line this short needs no more than this on its way: 1 GB/s of one connection at 0.5 ms. Left
# alone, the kernel takes up to 32 MB for a reader that is slower than its line, and a kill, or a
# connection that is closed for another, loses what waits there.
SHORT_LINE_US = 500  # microseconds to the other end and back
SHORT_LINE_WINDOW = 256 << 10  # bytes; the kernel takes twice as much
TCP_INFO_RTT = 68  # where tcpi_rtt is in struct tcp_info, 4 bytes (linux/tcp.h)
NETRC_FILES: Tuple[str, ...] = ("~/.netrc", "~/_netrc")


def with_newer_python() -> str:
    """This command line for the newest Python on PATH, or the advice to install one."""
    oldest_minor = OLDEST_PYTHON[1]
    newest_first = range(NEWEST_PYTHON_MINOR, oldest_minor - 1, -1)
    for minor in newest_first:
        python = f"python3.{minor}"
        if shutil.which(python):
            return command_line(python, *sys.argv)
    return "run it with a newer python3; none is on PATH"


def import_urllib3() -> Any:
    """urllib3, imported only where the network is used.

    Raises HostError on a Python that is too old for it, and where it is not there.
    """
    if sys.version_info < OLDEST_PYTHON:
        major, minor = sys.version_info[:2]
        what = "fetch needs Python 3.10 or newer"
        raise HostError(what, f"this is Python {major}.{minor}", with_newer_python())

    _carry_certificates()
    try:
        import urllib3
    except ImportError as exc:
        step = "run the built hfship.pyz, which carries it"
        raise HostError("urllib3 is not importable", str(exc), step) from exc

    return urllib3


def _carry_certificates() -> None:
    """Inside the pyz, give certifi's bundle to us from memory.

    certifi itself would write it to a temporary file, which a kill leaves behind.
    """
    try:
        bundle = own_entry("vendor/certifi/cacert.pem")
    except OSError:
        return  # from source, certifi is installed with a file of its own

    if "certifi" in sys.modules or not hasattr(os, "memfd_create"):
        return

    fd = os.memfd_create("cacert.pem")
    write_all(fd, bundle)
    path = f"/proc/self/fd/{fd}"
    certifi = types.ModuleType("certifi")
    vars(certifi)["where"] = lambda: path
    sys.modules["certifi"] = certifi


# -- who we are


class Login(NamedTuple):
    """A user and the password."""

    user: str
    password: str


def netrc_login(host: str, env: Mapping[str, str]) -> Optional[Login]:
    """The login for a host in the file that curl and git read; None where there is none."""
    import netrc

    files = NETRC_FILES
    if env.get("NETRC"):
        files = (env["NETRC"],)
    for name in files:
        path = os.path.expanduser(name)
        if not os.path.isfile(path):
            continue
        try:
            found = netrc.netrc(path).authenticators(host)
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return Login(found[0] or found[1] or "", found[2])

    return None


class Authorization:
    """What logs in at the Hub, and at no other origin: it is called for each request.

    The token, if there is one. The login of ~/.netrc only after the endpoint asked for one: those
    who use git have their Hub's in it, which its API does not take.
    """

    def __init__(self, token: Optional[Token], endpoint: str, env: Mapping[str, str]) -> None:
        self._origin = origin(endpoint)
        self._token = token
        self.login = netrc_login(self._origin[1], env)
        self.header = ""
        if token:
            self.header = f"Bearer {token.value}"

    @property
    def secrets(self) -> Iterator[str]:
        """What is shown nowhere, whoever says it."""
        if self._token:
            yield self._token.value
        if self.login:
            yield self.login.password

    def __call__(self, request: Request) -> Request:
        """Set the header of a request."""
        request.headers.pop("Authorization", None)
        if self.header and origin(request.url) == self._origin:
            request.headers["Authorization"] = self.header
        return request

    def answers(self, url: str, challenge: str) -> bool:
        """A 401 came from `url` with this WWW-Authenticate. Is it worth asking again, with a login
        that was not tried yet?"""
        if self.login is None or origin(url) != self._origin:
            return False
        if self.header.startswith("Basic "):
            return False
        if not is_basic(challenge) and (challenge or self._token):
            return False

        name_and_password = f"{self.login.user}:{self.login.password}"
        encoded = base64.b64encode(name_and_password.encode()).decode()
        self.header = f"Basic {encoded}"
        return True


# -- connections


class PromptResponse(HTTPResponse):
    """An answer whose head has to be there in HEAD_S, however its bytes are spread.

    The timeout of a socket is for each byte: a head of one byte in ten seconds would take weeks.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        limit_reads(self, time.monotonic() + HEAD_S)

    def begin(self) -> None:
        """Read the head."""
        super().begin()
        limit_reads(self, None)


def limit_reads(response: Any, until: Optional[float]) -> None:
    """Let an http.client response raise TimeoutError where it would read from its connection after
    `until` (monotonic time in seconds); None lifts that."""
    raw = getattr(response.fp, "raw", None)
    if raw is None:  # an answer without a body, closed
        return

    vars(raw).pop("readinto", None)
    if until is None:
        return

    read = raw.readinto
    end = until

    def readinto(buffer: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError("the answer takes too long")
        return read(buffer)

    raw.readinto = readinto


def round_trip_us(connection: socket.socket) -> int:
    """Microseconds to the other end and back, as the kernel measured them; 0 where it does not
    tell."""
    if not hasattr(socket, "TCP_INFO"):
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_RTT + 4)
    return int.from_bytes(info[TCP_INFO_RTT:], sys.byteorder)


def bound_window(connection: socket.socket) -> socket.socket:
    """Let a connection over a short line, which was just opened, hold SHORT_LINE_WINDOW bytes at
    most that nobody has read. Over a longer one the kernel finds out how much is needed."""
    with contextlib.suppress(OSError):
        if 0 < round_trip_us(connection) <= SHORT_LINE_US:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SHORT_LINE_WINDOW)
    return connection


# -- what is sent, and what comes


class Request:
    """What is sent, as an authorization sees it before that, and may change it."""

    __slots__ = ("headers", "url")

    def __init__(self, url: str, headers: Dict[str, str]) -> None:
        self.url = url
        self.headers = headers


class Answer:
    """An answer whose head has come. Its body is unread in `raw`, a response of urllib3."""

    __slots__ = ("headers", "raw", "request", "status_code", "url")

    def __init__(self, request: Request, raw: Any) -> None:
        self.request = request
        self.url = request.url
        self.raw = raw
        self.status_code: int = raw.status
        self.headers: Mapping[str, str] = raw.headers

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, unless the whole body was read: then it is kept already."""
        self.raw.close()
        self.raw.release_conn()

    def pass_over(self) -> None:
        """Keep the connection for the next request, if little of the body is left to read: a new
        one to the Hub takes three round trips, and each small file is asked for there."""
        left = self.raw.length_remaining
        if left is not None and left <= MOST_PASSED_OVER:
            limit_reads(self.raw._fp, time.monotonic() + HEAD_S)
            self.raw.drain_conn()
        self.close()


class HubSession:
    """Kept-alive connections to the Hub and to wherever it leads: urllib3's, with one TLS context
    for all.

    `authorize` sets the `Authorization` of each request. Left alone, each connection would parse
    the bundle of CAs anew: 15 ms of CPU and 2 MB. Safe to share between threads.
    """

    def __init__(
        self,
        authorize: Callable[[Request], Any],
        connections: int,
        env: Mapping[str, str],
        more_cas: Iterable[str] = (),
    ) -> None:
        self._urllib3 = import_urllib3()
        self._authorize = authorize
        self._kept = connections + 2  # to each host
        self._bundle = ca_bundle(env)
        self._more_cas = tuple(more_cas)
        self._lock = threading.Lock()
        self._managers: Dict[Tuple[str, bool], Any] = {}  # by proxy and whether TLS is spoken
        self._context: Any = None
        self._timeout = self._urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        self._headers = {
            "User-Agent": f"hfship/{__version__}",
            "Accept-Encoding": "identity",  # ranges count bytes as they are stored
            "Accept": "*/*",
        }

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: Any = None,
        proxy: Optional[Proxy] = None,
    ) -> Answer:
        """One request, through a proxy if one is given. `data` is a form, bytes or what has a
        length and is read.

        Raises OSError when the CAs cannot be read, ValueError for an address that is none, and
        what urllib3 raises.
        """
        request = Request(url, {**self._headers, **headers})
        self._authorize(request)
        if isinstance(data, dict):
            data = urlencode(data)
            request.headers["Content-Type"] = "application/x-www-form-urlencoded"
        if data is not None and not isinstance(data, (bytes, str)):
            request.headers["Content-Length"] = str(len(data))
        raw = self._manager(url, proxy).urlopen(
            method,
            url,
            body=data,
            headers=request.headers,
            timeout=self._timeout,
            retries=False,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            decode_content=False,
        )
        return Answer(request, raw)

    def close(self) -> None:
        """Close all idle connections."""
        for manager in self._managers.values():
            manager.clear()

    def read_cas(self) -> Any:
        """The TLS context of all connections, with the CAs to believe. Raises OSError."""
        with self._lock:
            if self._context is None:
                self._context = tls_context(self._bundle, self._more_cas)
            return self._context

    def _manager(self, url: str, proxy: Optional[Proxy]) -> Any:
        """What has the connections for an address."""
        is_secure = url[:6].lower() == "https:"
        key = (proxy.url if proxy else "", is_secure)
        found = self._managers.get(key)
        if found is None:
            found = self._new_manager(is_secure, proxy)
            found = self._managers.setdefault(key, found)
        return found

    def _new_manager(self, is_secure: bool, proxy: Optional[Proxy]) -> Any:
        options: Dict[str, Any] = {"num_pools": KEPT_HOSTS, "maxsize": self._kept}
        if is_secure:
            options["ssl_context"] = self.read_cas()
            options["cert_reqs"] = "CERT_REQUIRED"
        if proxy is None:
            manager = self._urllib3.PoolManager(**options)
        else:
            if proxy.scheme == "https":
                options["proxy_ssl_context"] = self.read_cas()
            options["proxy_headers"] = proxy.headers
            manager = self._urllib3.ProxyManager(proxy.url, **options)
        manager.pool_classes_by_scheme = prompt_pools()
        return manager


@lru_cache(maxsize=None)
def prompt_pools() -> Dict[str, Any]:
    """urllib3's pools of connections, whose answers are PromptResponses."""
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Plain(HTTPConnectionPool.ConnectionCls):  # type: ignore[misc]
        """A connection whose answers are PromptResponses."""

        response_class = PromptResponse

        def _new_conn(self) -> socket.socket:
            return bound_window(super()._new_conn())

    class Encrypted(HTTPSConnectionPool.ConnectionCls):  # type: ignore[misc]
        """The same with TLS."""

        response_class = PromptResponse

        def _new_conn(self) -> socket.socket:
            return bound_window(super()._new_conn())

    return {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": Plain}),
        "https": type("EncryptedPool", (HTTPSConnectionPool,), {"ConnectionCls": Encrypted}),
    }


def tls_context(bundle: str, more_cas: Iterable[str]) -> Any:
    """A TLS context that believes the CAs in a file or a folder, and in more files. Raises
    OSError."""
    import ssl  # not every Python on an offline machine has it

    if os.path.isdir(bundle):
        made = ssl.create_default_context(capath=bundle)
    else:
        made = ssl.create_default_context(cafile=bundle)
    for path in more_cas:
        made.load_verify_locations(cafile=path)
    return made


def ca_bundle(env: Mapping[str, str]) -> str:
    """The CAs that `env` names, or those that we carry."""
    variable = ca_variable(env)
    if variable:
        return env[variable]
    return carried_cas()


def carried_cas() -> str:
    """The file of the public CAs that we carry. Raises HostError."""
    import_urllib3()
    import certifi

    return str(certifi.where())
