# SPDX-License-Identifier: Apache-2.0
"""Requests to one endpoint, a Hub or a registry, and what their faults mean.

Owns single requests whose faults are sorted into those that may pass and those that end the run,
and the patience with API requests. Safe to share between threads, and handed on to forked readers.
Promises: every request passes the gate; an answer is read within bounds of size and time.
Never: writes to disk; knows what an endpoint has.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import threading
import time
from functools import partial
from http.client import HTTPException
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    TypeVar,
    cast,
)

from hfship.base.errors import HfshipError, NetworkError
from hfship.base.files import CHUNK
from hfship.base.proxies import Proxies, login_error
from hfship.base.redaction import redact
from hfship.base.text import human_bytes, human_seconds, short_seconds
from hfship.base.values import dataclass
from hfship.hub.answers import RETRY_STATUS, rate_limit_wait, root_cause, tls_error
from hfship.hub.gate import Gate, HoldMessage
from hfship.hub.protocol import (
    MAX_API_BYTES,
    MAX_REDIRECTS,
    REDIRECTS,
    origin,
    redirect_target,
)
from hfship.hub.retry import API_RETRY, Retry, RetryableError, SourceFaltered, backoff
from hfship.hub.session import HubSession, import_urllib3, limit_reads

if TYPE_CHECKING:
    from hfship.base.manifest import Source
    from hfship.base.proxies import Proxy
    from hfship.base.report import Reporter
    from hfship.hub.gate import ParentProxy, ProxyMessage

Found = TypeVar("Found")

# A 429 that does not say for how long holds as long as a fifth failure would: up to 8 s.
FAILURES_OF_A_429 = 5
LONGEST_HOLD_S = 600.0  # a server that wants us to wait longer ends the run
API_ANSWER_S = 120.0  # for the body of an answer, however slowly it comes
MAX_HEAD = 64 << 10  # characters in the headers of an answer; a signed Location has 2,000


@dataclass(frozen=True)
class ApiAnswer:
    """A whole answer of the Hub's API."""

    status: int
    headers: Mapping[str, str]
    body: str
    url: str = ""  # where it came from


class Transport:
    """Talks to one endpoint. What it has, and what its answers mean, a subclass knows.

    `authorization` sets the `Authorization` of each request, and answers the challenge of a 401.
    """

    address_hint = "HF_ENDPOINT"  # what an operator checks when the endpoint is not reached

    def __init__(
        self,
        endpoint: str,
        authorization: Any,
        reporter: Reporter,
        stop: threading.Event,
        connections: int = 8,
        more_cas: Iterable[str] = (),
    ) -> None:
        self.endpoint = endpoint
        self.reporter = reporter
        self.gate = Gate(reporter, stop)
        self._stop = stop
        self._authorization = authorization
        self._session = HubSession(authorization, connections, os.environ, more_cas)
        self._errors = import_urllib3().exceptions
        self._proxies = Proxies(os.environ)
        for secret in (*self._proxies.secrets, *authorization.secrets):
            reporter.hide(secret)

    @property
    def authorization(self) -> str:
        """The Authorization that the endpoint gets, and nobody else; "" for none."""
        header: str = self._authorization.header
        return header

    @property
    def proxies(self) -> Proxies:
        """The proxies that lead to it."""
        return self._proxies

    def file_url(self, source: Source, path: str) -> str:
        """Where the bytes of a file are asked for."""
        raise NotImplementedError

    def refusal(
        self, status: int, headers: Mapping[str, str], body: str, source: Source
    ) -> HfshipError:
        """What an error answer to a request for a file means."""
        raise NotImplementedError

    # -- processes

    def prepare_forks(self) -> None:
        """Make ready what forked processes inherit.

        Idle connections are closed, because nobody may share them; the CA bundle is parsed once for
        all.
        """
        self._session.close()
        with contextlib.suppress(OSError):  # a bundle that is not there: a request will say so
            self._session.read_cas()

    def forked(self, proxy: ParentProxy) -> Transport:
        """The same client in a forked process, with its parent's reporter and gate."""
        twin = copy.copy(self)
        # What a forked client uses of a reporter and a gate is what the proxy has.
        twin.reporter = cast("Reporter", proxy)
        twin.gate = cast("Gate", proxy)
        return twin

    def receive(self, message: ProxyMessage) -> None:
        """Do, in the parent, what a forked client sent through its proxy."""
        if isinstance(message, HoldMessage):
            self.gate.hold(message.seconds, message.reason)
        elif message.is_detail:
            self.reporter.detail(message.text)
        else:
            self.reporter.info(message.text)

    # -- single requests

    def get(self, url: str, headers: Mapping[str, str]) -> Any:
        """One GET without redirects, body not yet read.

        Raises RetryableError for faults of the network, NetworkError for what will not pass (TLS,
        a CA bundle that cannot be read), AuthError for a proxy that wants a login, and
        KeyboardInterrupt when the run is being stopped.
        """
        self.gate.wait()
        response = self._send(url, headers)
        if response.status_code == 401 and self._log_in(url, response):
            response.close()
            response = self._send(url, headers)

        if response.status_code == 407:
            response.close()
            offered = response.headers.get("Proxy-Authenticate", "")
            raise login_error(self._proxies.of(url), offered)

        _check_head(response, url)
        return response

    def _log_in(self, url: str, refused: Any) -> bool:
        """A 401, `refused`, came from `url`. Is it worth asking again?"""
        challenge = refused.headers.get("WWW-Authenticate", "")
        answers: bool = self._authorization.answers(url, challenge)
        return answers

    def _send(
        self, url: str, headers: Mapping[str, str], method: str = "GET", data: Any = None
    ) -> Any:
        host = origin(url)[1]
        errors = self._errors
        proxy = self._proxies.of(url)
        try:
            return self._session.request(method, url, headers, data, proxy)
        except errors.SSLError as exc:
            raise tls_error(url, exc, os.environ) from exc
        except errors.ProxyError as exc:
            raise _proxy_error(exc, proxy, host) from exc
        except errors.TimeoutError as exc:
            raise SourceFaltered(f"{host}: {root_cause(exc)}") from exc
        except (errors.HTTPError, ValueError) as exc:
            raise RetryableError(f"{host}: {root_cause(exc)}") from exc
        except OSError as exc:  # of the bundle of CAs: all others come as one of urllib3's
            step = "correct REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE or SSL_CERT_FILE, whichever is set"
            raise NetworkError("the CA bundle cannot be read", redact(str(exc)), step) from exc

    def retry_status(self, response: Any, url: str, holds: bool = True) -> None:
        """Raise RetryableError when the status says that the same request may succeed later, and
        NetworkError when that is too late.

        A 429 also closes the gate, unless it `holds` nobody up but who asked: who asks on only
        makes it longer.
        """
        status = response.status_code
        if status not in RETRY_STATUS:
            return

        wait_s = None
        if status in (429, 503):
            wait_s = rate_limit_wait(response.headers)
        response.close()
        reason = f"{origin(url)[1]} answered {status}"
        if wait_s is not None and wait_s > LONGEST_HOLD_S:
            wait = short_seconds(wait_s)
            step = f"run the same command again in {wait}; what arrived is kept"
            raise NetworkError(f"{origin(url)[1]} takes no requests for {wait}", reason, step)
        if status == 429 and holds:
            hold_s = wait_s
            if hold_s is None:
                hold_s = backoff(FAILURES_OF_A_429)
            self.gate.hold(hold_s, f"{reason} (too many requests)")

        raise RetryableError(reason, wait_s)

    def exchange(self, url: str) -> ApiAnswer:
        """One API request with its whole body. Raises RetryableError for faults that may pass."""
        response = self.get(url, {})
        with response:
            self.retry_status(response, url)
            return ApiAnswer(
                status=response.status_code,
                headers=response.headers,
                body=limited_body(response, url),
                url=url,
            )

    # -- patient requests

    def _ask(self, url: str) -> ApiAnswer:
        """GET an API URL through redirects (renamed repositories) and passing faults."""
        for _ in range(MAX_REDIRECTS):
            answer = self.patiently(partial(self.exchange, url))
            if answer.status not in REDIRECTS:
                return answer
            location = answer.headers.get("Location", "")
            url = redirect_target(url, location, self.endpoint)

        raise NetworkError(
            f"{self.endpoint} redirects in a circle",
            "",
            f"check {self.address_hint}",
        )

    def patiently(self, ask: Callable[[], Found]) -> Found:
        """What `ask` brings, which is called again while its faults may pass. Each call passes the
        gate, where a run ends that is being stopped."""
        retry = API_RETRY
        while True:
            try:
                return ask()
            except RetryableError as exc:
                retry = retry.after_failure()
                if retry.exhausted:
                    raise self._unreachable(exc) from exc
                wait_s = retry.wait_s(exc.wait_s)
                self._report_retry(exc, retry, wait_s)
                self._stop.wait(wait_s)

    def _unreachable(self, fault: RetryableError) -> NetworkError:
        what = f"check the network, the proxy and {self.address_hint}"
        step = f"{what}, then run the same command again"
        return NetworkError(f"{self.endpoint} cannot be reached", str(fault), step)

    def _report_retry(self, fault: RetryableError, retry: Retry, wait_s: float) -> None:
        """Say that a request is tried again. One failure with a short wait is a detail."""
        count = f"{retry.failures} of {retry.attempts - 1}"
        text = f"{fault}; trying again in {human_seconds(wait_s)} ({count})"
        if retry.failures > 1 or wait_s > 1:
            self.reporter.info(text)
        else:
            self.reporter.detail(text)


def _check_head(response: Any, url: str) -> None:
    """Raise NetworkError for an answer with more headers than any has reason to send."""
    size = sum(len(name) + len(value) for name, value in response.headers.items())
    if size <= MAX_HEAD:
        return
    response.close()
    raise NetworkError(
        f"{origin(url)[1]} sends {human_bytes(size)} of headers",
        "no Hub does",
        "check HF_ENDPOINT and the proxy",
    )


def _proxy_error(exc: Exception, proxy: Optional[Proxy], host: str) -> Exception:
    """What it means that a proxy did not bring us to a host."""
    reason = root_cause(exc)
    address = "the proxy"
    if proxy:
        address = f"the proxy {proxy.address} ({proxy.variable})"
    refused = re.search(r"Tunnel connection failed: (4\d\d)", reason)  # of http.client
    if refused and refused[1] == "407":
        return login_error(proxy)
    if refused and int(refused[1]) not in RETRY_STATUS:
        step = f"have {host} allowed there, or name it in no_proxy"
        return NetworkError(f"{address} does not let us to {host}", reason, step)
    return RetryableError(f"{address} does not bring us to {host}: {reason}")


def pieces(response: Any) -> Iterator[bytes]:
    """The body of a response as it comes, decoded, each piece when it is there.

    Not by iter_content: that waits until a piece is full, and takes a chunk of negative size for
    one without end. Raises RetryableError when the connection breaks.
    """
    from urllib3.exceptions import HTTPError

    try:
        while True:
            piece = response.raw.read1(CHUNK, decode_content=True)
            if not piece:
                return
            yield piece
    except (HTTPError, HTTPException, OSError, ValueError, AttributeError) as exc:
        raise RetryableError(f"{origin(response.url)[1]}: {root_cause(exc)}") from exc


def limited_body(response: Any, url: str) -> str:
    """The text of an API answer. Raises NetworkError beyond MAX_API_BYTES, RetryableError when it
    is not there in API_ANSWER_S."""
    found = []
    size = 0
    until = time.monotonic() + API_ANSWER_S
    limit_reads(response.raw._fp, until)
    for piece in pieces(response):
        size += len(piece)
        if size > MAX_API_BYTES:
            host = origin(url)[1]
            what = f"the answer of {host} is too large to be a Hub's"
            raise NetworkError(what, human_bytes(size), "check HF_ENDPOINT")
        found.append(piece)

    return b"".join(found).decode("utf-8", "replace")
