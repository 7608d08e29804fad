# SPDX-License-Identifier: Apache-2.0
"""Doctor: the Hub and the way to it.

Owns the probes of the network in the order in which each needs those before it: proxy, name, TLS,
Hub, clock, token, repository, speed; then mirrors, compared with the Hub.
Never: writes to disk, or shows a token.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple

from hfship.base.errors import AuthError, HostError, NetworkError, NotFoundError
from hfship.base.proxies import Proxies
from hfship.base.reading import parse_json
from hfship.base.report import Reporter
from hfship.base.settings import find_token, load_settings
from hfship.base.text import counted, human_bytes, printable, shorten
from hfship.hub.answers import ca_variable, not_a_hub, tls_error
from hfship.hub.client import HubClient
from hfship.hub.partial import Transfer
from hfship.hub.protocol import api_url, origin
from hfship.hub.reader import FileAddress
from hfship.hub.session import carried_cas
from hfship.hub.transport import ApiAnswer, pieces
from hfship.hub.verified import VerifiedLog
from hfship.ops.certificate import (
    Certificate,
    Route,
    context_of,
    credulous_context,
    describe,
)
from hfship.ops.probe import PROBE_TIMEOUT_S, Finding, Probe, ProbeWarning

if TYPE_CHECKING:
    from hfship.base.proxies import Proxy
    from hfship.base.settings import Settings, Token
    from hfship.hub.protocol import Snapshot

LONG_PROBE_S = 2 * PROBE_TIMEOUT_S  # of several requests, or of a measurement
PROBE_BYTES = 8 << 20
PROBE_REPO = "openai-community/gpt2"  # public, small, and on every mirror
CLOCK_WARN_S = 60
CLOCK_FAIL_S = 900  # S3 takes no request that is off by more than 15 minutes
RENEWAL_DAYS = 14  # a certificate that ends sooner should have been renewed
CONNECTIONS = 2  # kept by the client
LONGEST_NAME = 100  # characters


class HubDoctor:
    """Probes of one Hub, each built on those before it.

    `repo` is the (repository, revision) to try; None takes PROBE_REPO, which a Hub may lack.
    """

    def __init__(
        self,
        settings: Settings,
        repo: Optional[Tuple[str, Optional[str]]],
        mirrors: Sequence[str],
        reporter: Reporter,
    ) -> None:
        self._settings = settings
        self._endpoint = settings.endpoint
        self._scheme, self._host, self._port = origin(settings.endpoint)
        self._mirrors = mirrors
        self._reporter = reporter
        self._named = repo is not None
        self._repo, self._revision = repo or (PROBE_REPO, None)
        # What a probe finds and later ones need.
        self._proxy: Optional[Proxy] = None
        self._token: Optional[Token] = None
        self._client: HubClient
        self._answer: ApiAnswer  # to the question for the revision
        self._snapshot: Optional[Snapshot] = None

    def findings(self) -> Iterator[Finding]:
        """What the probes find; none of the Hub after one without which they make no sense."""
        for probe in self._hub_probes():
            found = probe.run(self._reporter)
            yield found
            if found.state == "fail" and probe.required:
                break  # a mirror may still be reached

        for url in self._mirrors:
            work = partial(self._probe_mirror, url)
            yield Probe(f"mirror {url}", work, LONG_PROBE_S).run(self._reporter)

    def _hub_probes(self) -> List[Probe]:
        return [
            Probe("proxy", self._probe_proxy, required=True),
            Probe("dns", self._probe_dns, required=True),
            Probe("tls", self._probe_tls, required=True),
            Probe("hub", self._probe_hub, required=True),
            Probe("clock", self._probe_clock),
            Probe("token", self._probe_token),
            Probe("repository", self._probe_repository, LONG_PROBE_S),
            Probe("speed", self._probe_speed, LONG_PROBE_S),
        ]

    # -- the way to the Hub

    def _probe_proxy(self) -> str:
        """Does the proxy, if one is set, take connections?"""
        proxy = Proxies(os.environ).of(self._endpoint)
        if not proxy:
            return "none"

        self._proxy = proxy
        with socket.create_connection((proxy.host, proxy.port), PROBE_TIMEOUT_S):
            return f"{proxy.address} takes connections"

    def _probe_dns(self) -> str:
        """The addresses of the Hub's host."""
        if self._proxy:
            return "left to the proxy"

        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as exc:
            why = exc.strerror or str(exc)
            step = (
                "without a network: that is so on the far side; hfship doctor --offline."
                " Else check /etc/resolv.conf"
            )
            raise NetworkError(f"{self._host} has no address", why, step) from exc

        addresses = sorted({str(address[0]) for *_, address in found})
        return f"{self._host} is {shorten(addresses, 2)}"

    def _probe_tls(self) -> str:
        """Who vouches for the Hub.

        It is a public CA, or one that only this site's bundle has: then TLS ends on the way.
        """
        if self._scheme != "https":
            text = "not encrypted: a token can be read on the way"
            raise ProbeWarning(text, "use https, or no token")

        public = carried_cas()
        variable = ca_variable(os.environ)
        bundle = os.environ[variable] if variable else public
        certificate = self._believed_certificate(bundle, variable)
        days = certificate.days_left(time.time())
        text = f"signed by {certificate.issuer}, for {days:.0f} more days"
        if days < RENEWAL_DAYS:
            raise ProbeWarning(text, "the owner of the Hub must renew it")

        try:
            self._certificate(context_of(public))
        except ssl.SSLCertVerificationError as exc:
            text += f"; no public CA: an own Hub, or a proxy that opens TLS ({variable})"
            raise ProbeWarning(text, "right if your site does so") from exc

        return text

    def _believed_certificate(self, bundle: str, variable: str) -> Certificate:
        """The Hub's certificate. Raises NetworkError if the bundle does not vouch for it.

        `variable` is what names the bundle; "" if none does.
        """
        try:
            return self._certificate(context_of(bundle))
        except ssl.SSLCertVerificationError as exc:
            unbelieved = self._certificate(credulous_context())
            text = f"{describe(unbelieved.der, PROBE_TIMEOUT_S)}: {exc.verify_message}"
            step = tls_error(self._endpoint, exc, os.environ).next_step
            raise NetworkError(text, "", step) from exc
        except FileNotFoundError as exc:
            what = "the CA bundle cannot be read"
            raise NetworkError(what, bundle, f"correct {variable}") from exc

    def _certificate(self, context: ssl.SSLContext) -> Certificate:
        route = Route(self._host, self._port, self._proxy)
        return route.certificate(context, PROBE_TIMEOUT_S)

    # -- the Hub

    def _probe_hub(self) -> str:
        """How fast the Hub answers the first question of a fetch."""
        self._token = find_token(os.environ)
        self._client = self._client_of(self._settings)
        answer, milliseconds = self._ask_for_revision(self._client)
        is_json = answer.body.startswith("{")
        is_error = "X-Error-Code" in answer.headers
        if not is_json and not is_error:
            kind = answer.headers.get("Content-Type", "nothing")
            raise not_a_hub(self._endpoint, f"it sends {kind}")

        self._answer = answer
        return f"{self._endpoint} answers in {milliseconds:.0f} ms"

    def _client_of(self, settings: Settings) -> HubClient:
        never_stopped = threading.Event()
        return HubClient(
            settings,
            self._token,
            Reporter("none", -1),  # what it would say is what probes find
            stop=never_stopped,
            connections=CONNECTIONS,
        )

    def _ask_for_revision(self, client: HubClient) -> Tuple[ApiAnswer, float]:
        """A Hub's answer to the question for the revision, and after how many milliseconds."""
        revision = self._revision or "main"
        url = api_url(client.endpoint, "model", self._repo, "revision", revision)
        began = time.monotonic()
        answer = client.exchange(url)
        return answer, 1000 * (time.monotonic() - began)

    def _probe_clock(self) -> str:
        """How far our clock is from the Hub's."""
        date = self._answer.headers.get("Date", "")
        try:
            ahead_s = time.time() - parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError, IndexError, OverflowError) as exc:
            raise ProbeWarning("the Hub does not tell the time") from exc

        off_s = abs(ahead_s)
        side = "ahead" if ahead_s > 0 else "behind"
        text = f"{off_s:.0f} s {side}"
        step = "set the clock: timedatectl, chronyc"
        if off_s > CLOCK_FAIL_S:
            raise HostError(f"the clock is {text}", "", step)
        if off_s > CLOCK_WARN_S:
            raise ProbeWarning(text, step)

        return text

    def _probe_token(self) -> str:
        """Whose token it is, where it comes from and what it may do."""
        if not self._token:
            return "none: enough for public repositories"

        source = self._token.source
        answer = self._client.exchange(f"{self._endpoint}/api/whoami-v2")
        if answer.status in (401, 403):
            step = f"put a valid token into {source}, or remove it"
            raise AuthError("the Hub refuses the token", f"from {source}", step)
        if answer.status != 200:
            return f"from {source}; this Hub has no accounts"

        owner = parse_json(answer.body)
        if not isinstance(owner, dict):
            raise ProbeWarning(f"from {source}; this Hub does not say whose it is")

        name = printable(str(owner.get("name")))[:LONGEST_NAME]
        text = f"of {name}, from {source}"
        role = _role_of(owner)
        if role:
            text += f", may {role}"
        return text

    # -- a repository

    def _probe_repository(self) -> str:
        """May it be read, and how large is it?"""
        try:
            snapshot = self._client.snapshot(self._repo, self._revision)
        except (NotFoundError, AuthError) as exc:
            if self._named:
                raise
            raise ProbeWarning(f"no {PROBE_REPO} here to try", "hfship doctor ORG/NAME") from exc

        self._snapshot = snapshot
        source = snapshot.source
        gate = "gated, access granted; " if source.gated else ""
        files = counted(len(snapshot.files), "file")
        size = human_bytes(snapshot.size)
        commit = source.commit[:12]
        return f"{source.resolved_repo}: {gate}{files}, {size}, commit {commit}"

    def _probe_speed(self) -> str:
        """How fast one connection brings a file."""
        if not self._snapshot or not self._snapshot.files:
            raise ProbeWarning("not measured", "hfship doctor ORG/NAME")
        host, speed = _measure(self._client, self._snapshot)
        return f"{human_bytes(speed)}/s over one connection from {host}"

    def _probe_mirror(self, url: str) -> str:
        """How fast a mirror answers and sends, and whether it has the Hub's commit."""
        client = self._client_of(load_settings({}, url))
        _, milliseconds = self._ask_for_revision(client)
        snapshot = client.snapshot(self._repo, self._revision)
        _, speed = _measure(client, snapshot)
        text = f"{milliseconds:.0f} ms, {human_bytes(speed)}/s"
        hub_snapshot = self._snapshot or snapshot  # without it there is none to compare
        commit = snapshot.source.commit
        hub_commit = hub_snapshot.source.commit
        if commit == hub_commit:
            return f"{text}, commit {commit[:12]}"

        text += f"; commit {commit[:12]}, the Hub has {hub_commit[:12]}"
        raise ProbeWarning(text, "what it has is older: fetch asks the Hub for the rest")


def _role_of(owner: Dict[str, Any]) -> str:
    """What the answer of /api/whoami-v2 says of the token's role; "" when it does not."""
    found: Any = owner
    for key in ("auth", "accessToken", "role"):
        if not isinstance(found, dict):
            return ""
        found = found.get(key)
    return printable(str(found or ""))[:LONGEST_NAME]


def _measure(client: HubClient, snapshot: Snapshot) -> Tuple[str, float]:
    """The host that sends the largest file of a repository, and its bytes per second."""
    file = max(snapshot.files, key=lambda file: file.size)
    nowhere = Path()  # nothing is written
    transfer = Transfer(file, snapshot.source, nowhere, VerifiedLog(nowhere))
    address = FileAddress(client, transfer, client.endpoint)
    began = time.monotonic()
    count = 0
    with address.open(0, min(file.size, PROBE_BYTES)) as response:
        for piece in pieces(response):
            count += len(piece)
            if time.monotonic() - began > PROBE_TIMEOUT_S:
                break
        seconds = time.monotonic() - began
        return origin(response.url)[1], count / seconds
