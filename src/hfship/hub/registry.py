# SPDX-License-Identifier: Apache-2.0
"""One registry of images, as seen by the rest of the program.

Owns the login (anonymous tokens, Basic, tokens for a user), manifests by tag or digest, and what
the answers of a registry mean. Promises: a token goes to its registry and nowhere else, also when a
blob is redirected to a CDN; a manifest is what its digest says; one GET for each manifest, because
Docker Hub counts these (and neither HEAD nor blobs).
Never: writes to disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, TypeVar

from hfship.base.errors import AuthError, HfshipError, NetworkError, NotFoundError, nearest
from hfship.base.reading import parse_json
from hfship.base.text import human_seconds, printable, short_seconds, shorten
from hfship.base.values import dataclass
from hfship.hub.answers import is_basic, rate_limit_wait
from hfship.hub.protocol import MAX_REDIRECTS, REDIRECTS, origin, redirect_target
from hfship.hub.registry_login import known_cas
from hfship.hub.registry_protocol import (
    ACCEPT,
    DOCKER_HUB,
    LARGEST_MANIFEST,
    Challenge,
    ImageReference,
    blob_url,
    digest_of,
    endpoint_of,
    is_local,
    manifest_url,
    mismatch,
    parse_challenge,
    read_tags,
    tags_url,
)
from hfship.hub.retry import RetryableError
from hfship.hub.transport import LONGEST_HOLD_S, Transport, limited_body, pieces

if TYPE_CHECKING:
    from hfship.base.manifest import Source
    from hfship.base.report import Reporter
    from hfship.hub.gate import ParentProxy
    from hfship.hub.registry_login import RegistryLogin

Found = TypeVar("Found")
SHOWN_TAGS = 10
_LIMIT = re.compile(r"\s*([0-9]{1,9})\s*(?:;\s*w=([0-9]{1,9}))?")


class RegistryAuthorization:
    """What logs in at one registry: it is called for each request.

    The header goes to the registry's own origin alone, the login itself to whoever gives its
    tokens, too.
    """

    def __init__(self, endpoint: str, login: Optional[RegistryLogin]) -> None:
        self._origin = origin(endpoint)
        self.login = login
        self.header = ""
        self.realm = ""  # the address of tokens, without its query

    @property
    def secrets(self) -> List[str]:
        """What is shown nowhere, whoever says it."""
        if self.login is None:
            return []
        return self.login.secrets

    def __call__(self, request: Any) -> Any:
        """Set the header of a request."""
        request.headers.pop("Authorization", None)
        header = ""
        if request.url.partition("?")[0] == self.realm:
            if self.login:
                header = self.login.basic
        elif origin(request.url) == self._origin:
            header = self.header
        if header:
            request.headers["Authorization"] = header
        return request

    def use_password(self) -> bool:
        """Log in with the user and the password. False when there is none, or it was refused."""
        if self.login is None or self.header == self.login.basic:
            return False
        self.header = self.login.basic
        return bool(self.header)

    def is_of(self, url: str) -> bool:
        """Is it an address of the registry itself?"""
        return origin(url) == self._origin


@dataclass(frozen=True)
class FetchedManifest:
    """The body of an index or a manifest, its digest, and what the registry calls it."""

    body: bytes
    digest: str
    media_type: str


class RegistryClient(Transport):
    """Talks to one registry, about one repository: tokens are for a repository."""

    address_hint = "the name of the registry"

    def __init__(
        self,
        reference: ImageReference,
        endpoint: str,
        login: Optional[RegistryLogin],
        reporter: Reporter,
        stop: threading.Event,
        connections: int = 8,
        mirrors: Sequence[str] = (),
    ) -> None:
        self.reference = reference
        self._mirrors = tuple(mirrors)  # endpoints that are asked before, without a login
        self.digests: Dict[str, str] = {}  # of files that are not called by theirs
        self._lock = threading.Lock()
        authorization = RegistryAuthorization(endpoint, login)
        cas = tuple(known_cas(reference.registry, os.environ))
        super().__init__(endpoint, authorization, reporter, stop, connections, cas)

    def forked(self, proxy: ParentProxy) -> Transport:
        """As the transport's; a token that it renews is its own."""
        twin = super().forked(proxy)
        vars(twin)["_lock"] = threading.Lock()  # another thread may have held it when we forked
        return twin

    def file_url(self, source: Source, path: str) -> str:
        """Blobs are called by their digest, whichever host sends them."""
        digest = self.digests.get(path)
        if digest is None:
            _, _, name = path.rpartition("/")
            digest = f"sha256:{name}"
        return blob_url(source.endpoint, self.reference.path, digest)

    def refusal(self, status: int, _: Mapping[str, str], body: str, __: Source) -> HfshipError:
        """What an error answer means; the registry's own words are shown."""
        error = self.meaning(status, body, f"a layer of {self.reference.name}")
        if status == 404:  # it has the manifest that names the layer
            registry = self.reference.registry
            error.next_step = f"tell who runs {registry}, or have the image pushed there again"
        return error

    # -- login

    def _log_in(self, url: str, refused: Any) -> bool:
        """Get what a 401 asks for. True when another try is worth it."""
        authorization = self._authorization
        if not authorization.is_of(url):
            return False
        header = refused.headers.get("WWW-Authenticate", "")
        challenge = parse_challenge(header)
        if challenge is None:
            return is_basic(header) and bool(authorization.use_password())

        with self._lock:
            sent = refused.request.headers.get("Authorization", "")
            if sent == authorization.header:  # else another thread got a new one meanwhile
                authorization.header = f"Bearer {self._token(challenge)}"
        return True

    def _token(self, challenge: Challenge) -> str:
        """A token for what the challenge names. Raises AuthError, NetworkError, RetryableError."""
        realm = challenge.realm
        if self.endpoint.startswith("https:") and not realm.startswith("https:"):
            host = origin(realm)[1]
            what = f"{self.reference.registry} wants a login over plain http, at {host}"
            raise AuthError(what, "a password would be seen on the way", "tell its administrators")
        authorization = self._authorization
        authorization.realm = realm.partition("?")[0]
        login = authorization.login
        if login and login.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": login.identity_token,
                "service": challenge.service,
                "scope": challenge.scope,
                "client_id": "hfship",
            }
            response = self._send(realm, {}, "POST", form)
        else:
            response = self._send(challenge.token_url(), {})
        with response:
            self.retry_status(response, realm)
            body = limited_body(response, realm)
        if response.status_code != 200:
            raise self._no_token(response.status_code, realm, body)
        token = _token_in(body)
        if not token:
            host = origin(realm)[1]
            what = f"{host} gives no token for {self.reference.registry}"
            raise NetworkError(what, "its answer has none", "check the proxy")
        hide = getattr(self.reporter, "hide", None)
        if hide:  # a forked reader has no texts of its own to hide it in
            hide(token)
        return token

    def _no_token(self, status: int, realm: str, body: str) -> HfshipError:
        login = self._authorization.login
        host = origin(realm)[1]
        why = f"HTTP {status} {error_words(body)}".strip()
        if login is None:
            return self.meaning(status, body, self.reference.name)
        what = f"{host} refuses the login of {login.source} for {self.reference.registry}"
        return AuthError(what, why, _login_step(self.reference.registry))

    # -- manifests

    def retry_status(self, response: Any, url: str, holds: bool = True) -> None:
        """As the transport's; a pull limit that is used up for hours ends the run at once."""
        if response.status_code == 429:
            limit = pull_limit(response.headers)
            wait_s = rate_limit_wait(response.headers)
            is_long = wait_s is None or wait_s > LONGEST_HOLD_S
            if limit and is_long:
                body = limited_body(response, url)
                response.close()
                raise self._limited(limit, wait_s, error_words(body))
        super().retry_status(response, url, holds)

    def _limited(self, limit: PullLimit, wait_s: Optional[float], words: str) -> NetworkError:
        registry = self.reference.registry
        again = "run the same command again later; what arrived is kept"
        if wait_s is not None:
            again = f"run the same command again in {short_seconds(wait_s)}; what arrived is kept"
        if self._authorization.login is None:
            again = f"{_login_step(registry)}: who logs in may pull more\nor {again}"
        what = f"{registry} lets us pull no more: {limit.text()}"
        return NetworkError(what, f"HTTP 429 {words}".strip(), again)

    def head_digest(self, wanted: str) -> str:
        """The digest of what a tag means now, by a HEAD, which no registry counts; "" where it does
        not say."""
        url = manifest_url(self.endpoint, self.reference.path, wanted)
        with contextlib.suppress(RetryableError):
            response = self.request("HEAD", url, {"Accept": ACCEPT})
            response.close()
            if response.status_code == 200:
                digest: str = response.headers.get("Docker-Content-Digest", "")
                return digest
        return ""

    def manifest(self, wanted: str) -> FetchedManifest:
        """The index or manifest of a tag or digest, proven by its digest.

        Raises NotFoundError, AuthError, NetworkError, IntegrityError.
        """
        path = self.reference.path
        found = self._from_mirror(
            lambda endpoint: self._manifest_once(manifest_url(endpoint, path, wanted), wanted)
        )
        if found:
            return found
        url = manifest_url(self.endpoint, path, wanted)
        return self.patiently(lambda: self._manifest_once(url, wanted))

    def _from_mirror(self, ask: Callable[[str], Found]) -> Optional[Found]:
        """What the first mirror that has it answers; None where none does."""
        for mirror in self._mirrors:
            try:
                return ask(mirror)
            except (HfshipError, RetryableError) as exc:
                words = exc.what if isinstance(exc, HfshipError) else str(exc)
                self.reporter.detail(f"{mirror} does not help: {words}")
        return None

    def _manifest_once(self, url: str, wanted: str) -> FetchedManifest:
        response = self.get(url, {"Accept": ACCEPT})
        with response:
            self.retry_status(response, url)
            if response.status_code != 200:
                body = limited_body(response, url)
                error = self.meaning(response.status_code, body, self.reference.name)
                if response.status_code == 404:
                    error.next_step = self._other_tags(wanted) or error.next_step
                raise error
            content = bounded_content(response, LARGEST_MANIFEST, self.reference.name)
        found = digest_of(content)
        said = response.headers.get("Docker-Content-Digest", found)
        if wanted.startswith("sha256:"):
            said = wanted
        if found != said:
            raise mismatch(self.reference.name, "manifest", found, printable(said[:100]))
        limit = pull_limit(response.headers)
        if limit:
            self.reporter.detail(f"{self.reference.registry}: {limit.text()}")
        kind = response.headers.get("Content-Type", "")
        return FetchedManifest(content, found, kind)

    def _other_tags(self, wanted: str) -> str:
        """What to do about a tag or digest that is not there: the tags that are; "" where the
        registry names none."""
        url = tags_url(self.endpoint, self.reference.path)
        with contextlib.suppress(HfshipError, RetryableError):
            tags = read_tags(self.exchange(url).body)
            if tags:
                newest_first = tags[::-1]  # they come sorted by their letters
                shown = shorten(newest_first, SHOWN_TAGS)
                return f"check the tag{nearest(wanted, tags)}\nit has {shown}"
        return ""

    def blob(self, digest: str, size: int, most: int) -> bytes:
        """A small blob in memory, proven. Raises as `manifest`."""
        name = self.reference.name
        if size > most:
            step = "tell who made the image"
            raise NotFoundError(f"{name} has a configuration of {size} bytes", "", step)
        path = self.reference.path
        content = self._from_mirror(
            lambda endpoint: self._proven_blob(blob_url(endpoint, path, digest), digest, most)
        )
        if content is not None:
            return content
        url = blob_url(self.endpoint, path, digest)
        return self.patiently(lambda: self._proven_blob(url, digest, most))

    def _proven_blob(self, url: str, digest: str, most: int) -> bytes:
        content = self._blob_once(url, most)
        found = digest_of(content)
        if found != digest:
            raise mismatch(self.reference.name, "configuration", found, digest)
        return content

    def _blob_once(self, url: str, most: int) -> bytes:
        with self.following(url) as response:
            self.retry_status(response, url)
            status = response.status_code
            if status != 200 and not self._authorization.is_of(response.url):
                # A CDN speaks of its address, not of our login: another one may do.
                raise RetryableError(f"{origin(response.url)[1]} answered {status}")
            if status != 200:
                body = limited_body(response, url)
                raise self.meaning(status, body, self.reference.name)
            return bounded_content(response, most, self.reference.name)

    def following(self, url: str) -> Any:
        """The answer to a GET through redirects, whose targets get no token."""
        for _ in range(MAX_REDIRECTS):
            response = self.get(url, {})
            if response.status_code not in REDIRECTS:
                return response
            response.close()
            url = redirect_target(url, response.headers.get("Location", ""), self.endpoint)
        what = f"{self.reference.registry} redirects in a circle"
        raise NetworkError(what, "", f"check {self.address_hint}")

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] = MappingProxyType({}),
        make: Callable[[], Any] = lambda: None,
    ) -> Any:
        """One request of any method, logged in when that is asked for; `make` gives the body, once
        for each try. Raises as `get`."""
        self.gate.wait()
        response = self._send(url, headers, method, make())
        if response.status_code != 401 or not self._log_in(url, response):
            return response
        response.close()
        return self._send(url, headers, method, make())

    # -- what answers mean

    def meaning(self, status: int, body: str, what: str) -> HfshipError:
        """The error for an answer that is no success; `what` was asked for."""
        reference = self.reference
        registry = reference.registry
        login = self._authorization.login
        why = f"HTTP {status} {error_words(body)}".strip()
        if status in (401, 403):
            if login:
                said = f"{registry} refuses {login.source} for {what}"
                return AuthError(said, why, _login_step(registry))
            hint = "it is private, or not there: registries say the same of both"
            step = f"check the spelling, or log in: {_login_step(registry)}"
            return AuthError(f"{registry} wants a login for {what}", f"{why}\n{hint}", step)
        if status == 404:
            step = "check the name and the tag"
            return NotFoundError(f"{registry} does not have {what}", why, step)
        step = "run the same command again later"
        return NetworkError(f"{registry} answers with an error for {what}", why, step)


# -- single answers


@dataclass(frozen=True)
class PullLimit:
    """What a registry says of how often one may pull: `limit` in `window_s` seconds, `left` of
    them."""

    limit: int
    left: int
    window_s: int

    def text(self) -> str:
        """
        >>> PullLimit(100, 7, 21600).text()
        '7 of 100 pulls left (in 6 h 00 min)'
        """
        window = human_seconds(self.window_s)
        pulls = f"{self.left} of {self.limit}"
        return f"{pulls} pulls left (in {window})"


def pull_limit(headers: Mapping[str, str]) -> Optional[PullLimit]:
    """The limit that Docker Hub's headers tell: `ratelimit-limit: 100;w=21600` and
    `ratelimit-remaining: 7;w=21600`; None without them.

    >>> pull_limit({"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "7;w=21600"})
    PullLimit(limit=100, left=7, window_s=21600)
    """
    limit = _LIMIT.match(headers.get("ratelimit-limit", ""))
    left = _LIMIT.match(headers.get("ratelimit-remaining", ""))
    if not limit or not left:
        return None
    window_s = limit[2] or 0
    most = int(limit[1])
    pulls = int(left[1])
    return PullLimit(most, pulls, int(window_s))


def error_words(body: str) -> str:
    """The code and the message of a registry's error (distribution-spec, "Error Codes"); "" for
    what is none.

    >>> error_words('{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}')
    'MANIFEST_UNKNOWN: manifest unknown'
    """
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, AttributeError):
        value = parse_json(body)
        if "errors" not in value:
            return printable(str(value.get("details") or value.get("message") or "")[:300])
        first = value["errors"][0]
        return printable(f"{first.get('code', '')}: {first.get('message', '')}"[:300])
    return ""


def _token_in(body: str) -> str:
    """The token of an answer; "" where there is none that a header can hold."""
    with contextlib.suppress(ValueError, AttributeError):
        value = parse_json(body)
        token = value.get("token") or value.get("access_token") or ""
        if isinstance(token, str) and re.fullmatch(r"[!-~]{1,32768}", token):
            return token
    return ""


def _login_step(registry: str) -> str:
    if registry == DOCKER_HUB:
        return "docker login, or --registry-user USER --registry-password-file FILE"
    return f"docker login {registry}, or --registry-user USER --registry-password-file FILE"


def bounded_content(response: Any, most: int, name: str) -> bytes:
    """The body of an answer. Raises NetworkError beyond `most` bytes."""
    found: List[bytes] = []
    size = 0
    for piece in pieces(response):
        size += len(piece)
        if size > most:
            what = f"the registry's answer for {name} is too large"
            raise NetworkError(what, f"more than {most} bytes", "name another tag")
        found.append(piece)
    return b"".join(found)


# -- where it is


def registry_endpoint(
    reference: ImageReference, plain_http: bool, login: Optional[RegistryLogin], reporter: Reporter
) -> str:
    """The address of a registry's API. One of this machine may speak plain http, as docker lets it;
    any other only where that was asked for."""
    registry = reference.registry
    if plain_http or not is_local(registry):
        return endpoint_of(registry, plain_http)

    encrypted = endpoint_of(registry, plain_http=False)
    client = RegistryClient(reference, encrypted, login, reporter, threading.Event(), 1)
    try:
        client._send(f"{encrypted}/v2/", {}).close()
    except NetworkError as exc:
        if "does not speak https" in exc.what:
            return endpoint_of(registry, plain_http=True)
        raise
    except RetryableError:  # the first request will say so
        pass
    return encrypted
