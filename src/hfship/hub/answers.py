# SPDX-License-Identifier: Apache-2.0
"""What answers of the Hub mean that are no success. Pure.

Owns how long an answer asks us to wait, what an error answer means for the operator, and the
innermost reason of a failed connection.
Promises: whatever stands in a header or a body, it is read within bounds, and no text made here
shows a password or the signature of a URL.
Never: touches a socket or a disk, sleeps, or retries.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, Mapping, Optional, Tuple, Type
from urllib.parse import urlsplit

from hfship.base.errors import AuthError, HfshipError, NetworkError, NotFoundError, command_line
from hfship.base.imagefacts import KIND
from hfship.base.manifest import _COMMIT
from hfship.base.reading import parse_json
from hfship.base.redaction import redact
from hfship.base.settings import DEFAULT_ENDPOINT
from hfship.base.text import human_bytes, printable
from hfship.base.values import dataclass
from hfship.hub.protocol import header_number, image_word, origin

if TYPE_CHECKING:
    from hfship.base.manifest import Source
    from hfship.base.settings import Token

RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_HEADER = 200  # characters that are looked at of a header that says how long or why
LONGEST_REASON = 1000  # of the text of an exception, in which a server's words may stand
# The variables that name a bundle of certificates, the first one set wins. The first two are
# those of requests, as huggingface_hub read them.
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")

_QUOTA = re.compile(r'"\w+"\s*;\s*r=(?P<left>[0-9]+)\s*;\s*t=(?P<seconds>[0-9]+)')


def rate_limit_wait(headers: Mapping[str, str]) -> Optional[float]:
    """Seconds that a 429 or 503 asks us to wait; None when it does not say.

    `RateLimit` (draft-ietf-httpapi-ratelimit-headers: r is what is left, t the seconds until it is
    renewed) counts when its quota is used up, else `Retry-After`: seconds or a date.

    >>> rate_limit_wait({"RateLimit": '"resolvers";r=0;t=55'})
    56.0
    >>> rate_limit_wait({"Retry-After": "7"})
    7.0
    """
    quota = _QUOTA.search(headers.get("RateLimit", "")[:LONGEST_HEADER])
    if quota and not quota["left"].strip("0"):
        seconds = header_number(quota["seconds"])
        if seconds is not None:
            return seconds + 1  # they are whole seconds, cut off
    retry_after = headers.get("Retry-After", "").strip()
    seconds = header_number(retry_after)
    if seconds is None:
        seconds = _seconds_until(retry_after)
    return seconds


def _seconds_until(date: str) -> Optional[float]:
    """Seconds from now until a date of HTTP, 0 for the past; None for what is no date."""
    from email.utils import parsedate_to_datetime  # 4 ms that most commands need not spend

    try:
        return max(0.0, parsedate_to_datetime(date[:LONGEST_HEADER]).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def is_basic(challenge: str) -> bool:
    """Does a WWW-Authenticate ask for a user and a password?

    >>> is_basic('Basic realm="Artifactory Realm"'), is_basic('Bearer realm="x"'), is_basic("")
    (True, False, False)
    """
    return bool(re.search(r"(?i)(^|,)\s*basic\b", challenge[:LONGEST_HEADER]))


@dataclass(frozen=True)
class ErrorMeaning:
    """What an error answer means for the operator.

    The texts are templates with fields of `hub_error`.
    """

    error: Type[HfshipError]
    what: str
    step: str
    why: str = "{answer}"


_GATED = ErrorMeaning(
    AuthError,
    "{repo} is gated",
    "accept the terms at {page}, then set HF_TOKEN to a token that may read gated repositories",
    why="{access}; {answer}",
)
_TOKEN_REFUSED = ErrorMeaning(
    AuthError,
    "the Hub refuses the token from {token}",
    "put a valid token there, or remove it for public repositories",
)
_DISABLED = ErrorMeaning(AuthError, "{repo} is disabled by the Hub", "see {page}")
_NO_REVISION = ErrorMeaning(
    NotFoundError,
    "{repo} has no revision {revision!r}",
    "see the branches and tags at {page}/tree/main",
)
_NO_COMMIT = ErrorMeaning(
    NotFoundError,
    "{repo} does not have the commit {revision} any more, or never had it",
    "fetch what is there now: {fetch}",
    why="who rewrites a branch (force-push) takes its old commits away; {answer}",
)
_COMMIT_GONE = ErrorMeaning(
    NotFoundError,
    "commit {commit} of {repo} has gone while it was fetched",
    "run the same command again: {revision} is looked up anew",
    why="somebody rewrote {revision} (force-push) or removed the repository; {answer}",
)
_WANTS_LOGIN = ErrorMeaning(
    AuthError,
    "{endpoint} wants a user and a password that are right",
    "write into ~/.netrc (chmod 600): machine {host} login USER password PASSWORD",
    why="what ~/.netrc says for {host} is shown to it, if there is anything; {answer}",
)
_NO_HUB = ErrorMeaning(
    NotFoundError, "no Hub answers at {endpoint}", "check --endpoint and HF_ENDPOINT"
)
_NO_FILE = ErrorMeaning(
    NotFoundError,
    "a file is missing in {repo}",
    "run the same command again: the listing is made anew",
)
# The Hub answers the same for a repository that it does not have and for one that it hides.
_NO_REPOSITORY = ErrorMeaning(
    NotFoundError, "{repo} was not found on {endpoint}", "check the spelling{private_hint}"
)
_FORBIDDEN = ErrorMeaning(
    AuthError, "access to {repo} is forbidden", "check what the token may read"
)
_OTHER_ERROR = ErrorMeaning(
    NetworkError,
    "the Hub answered with an error for {repo}",
    "run the same command again later",
)


@dataclass(frozen=True)
class ErrorRule:
    """Which error answers have a meaning: those for which all that is given here is true."""

    meaning: ErrorMeaning
    statuses: Tuple[int, ...] = ()  # () is any
    code: str = ""  # X-Error-Code; "" is any
    words: str = ""  # in the message, in lower case
    commit_known: Optional[bool] = None  # is the commit known? None is either

    def matches(self, status: int, code: str, message: str, commit_known: bool) -> bool:
        """Is this the rule of such an answer?"""
        if self.statuses and status not in self.statuses:
            return False
        if self.code and code != self.code:
            return False
        if self.commit_known not in (None, commit_known):
            return False
        return self.words in message.lower()


# What we read out of an answer, beside the Hub's own codes.
COMMIT_NOT_FOUND = "CommitNotFound"
LOGIN_WANTED = "LoginWanted"

# The first rule that matches decides. A Hub says more by its code than by its status.
ERROR_RULES = (
    ErrorRule(_NO_COMMIT, code=COMMIT_NOT_FOUND),
    ErrorRule(_WANTS_LOGIN, code=LOGIN_WANTED),
    ErrorRule(_GATED, code="GatedRepo"),
    ErrorRule(_NO_HUB, code="EntryNotFound", commit_known=False),
    ErrorRule(_NO_FILE, code="EntryNotFound"),
    ErrorRule(_COMMIT_GONE, code="RevisionNotFound", commit_known=True),
    ErrorRule(_NO_REVISION, code="RevisionNotFound"),
    ErrorRule(_GATED, statuses=(401, 403), words="restricted"),
    ErrorRule(_TOKEN_REFUSED, statuses=(401,), words="credentials"),
    ErrorRule(_DISABLED, statuses=(403,), words="disabled"),
    ErrorRule(_COMMIT_GONE, statuses=(404,), words="rev", commit_known=True),
    ErrorRule(_NO_REVISION, statuses=(404,), words="rev"),
    ErrorRule(_NO_REPOSITORY, statuses=(401, 404)),
    ErrorRule(_FORBIDDEN, statuses=(403,)),
    ErrorRule(_OTHER_ERROR),
)


def hub_error(
    status: int, headers: Mapping[str, str], body: str, source: Source, token: Optional[Token]
) -> HfshipError:
    """What an error answer of the Hub means for the operator, by ERROR_RULES.

    `source` is what was asked for; its commit is "" while that is not known.
    """
    message = _shown(headers.get("X-Error-Message", "")) or _body_message(body)
    code = _code_of(status, headers, message, source)
    fields = {
        "answer": _answer_text(status, headers, message),
        "repo": source.repo,
        "page": f"{source.endpoint}/{source.repo}",
        "endpoint": source.endpoint,
        "host": origin(source.endpoint)[1],
        "revision": source.revision,
        "commit": source.commit[:12],
        "fetch": endpoint_command(source, source.endpoint),
        "token": "the request",
        "access": "no token was given",
        "private_hint": "; if it is private, set HF_TOKEN",
    }
    if token:
        fields["token"] = token.source
        fields["access"] = f"the token ({token.source}) has no access"
        fields["private_hint"] = ""

    if "/" not in source.repo:
        fields["private_hint"] += f"; most models are called ORG/{source.repo}: add the ORG"

    commit_known = bool(source.commit)
    meaning = next(
        rule.meaning for rule in ERROR_RULES if rule.matches(status, code, message, commit_known)
    )
    return meaning.error(
        meaning.what.format(**fields),
        meaning.why.format(**fields),
        meaning.step.format(**fields),
    )


def _code_of(status: int, headers: Mapping[str, str], message: str, source: Source) -> str:
    """X-Error-Code, or what else says as much."""
    code = _shown(headers.get("X-Error-Code", ""))
    no_revision = code == "RevisionNotFound"
    if status == 404 and not code:
        no_revision = "rev" in message.lower()
    if no_revision and _COMMIT.match(source.revision):
        return COMMIT_NOT_FOUND
    if status == 401 and not code and is_basic(headers.get("WWW-Authenticate", "")):
        return LOGIN_WANTED
    return code


def _answer_text(status: int, headers: Mapping[str, str], message: str) -> str:
    """The answer for the `why` of an error: `HTTP 404 RepoNotFound Not found (request 1-2)`"""
    code = _shown(headers.get("X-Error-Code", ""))
    answer = f"HTTP {status} {code} {message}".strip()
    request = headers.get("X-Request-Id") or headers.get("X-Amz-Cf-Id")
    if request:
        answer += f" (request {_shown(request)})"
    return answer


def _shown(text: str) -> str:
    """A text of somebody else as it may stand in an error."""
    return printable(text[:LONGEST_HEADER])


def _body_message(body: str) -> str:
    """The message of a JSON error body in any of the Hub's forms; nothing of an HTML page."""
    try:
        value = parse_json(body)
    except ValueError:
        return ""

    if not isinstance(value, dict):
        return ""

    message = value.get("error_description") or value.get("error") or value.get("errors") or ""
    if isinstance(message, list) and message:
        message = message[0]
        if isinstance(message, dict):
            message = message.get("message", "")

    return _shown(str(message))


def endpoint_command(source: Source, endpoint: str, verb: str = "fetch") -> str:
    """The command that fetches what there is now of a repository, from `endpoint`; or looks at
    it."""
    if source.repo_type == KIND:
        return command_line("hfship", "fetch", image_word(source, source.revision))
    words = [source.repo]
    if source.repo_type != "model" and verb == "fetch":
        words += ["--repo-type", source.repo_type]
    if endpoint != DEFAULT_ENDPOINT:
        words += ["--endpoint", endpoint]
    return command_line("hfship", verb, *words)


def sent_on(status: int, url: str, what: str, source: Source) -> HfshipError:
    """The error for an endpoint that redirects to another host, which refuses us: it gets no
    token, whoever it is. `what` is what was asked for."""
    scheme, host, _ = origin(url)
    _, _, host_and_port = urlsplit(url).netloc.rpartition("@")
    error: Type[HfshipError] = AuthError
    if status == 404:
        error = NotFoundError
    step = endpoint_command(source, f"{scheme}://{host_and_port}")
    if source.repo_type == KIND:  # a registry keeps its layers there, and nothing else
        registry = origin(source.endpoint)[1]
        step = f"check whether a proxy or firewall blocks {host}, or ask who runs {registry}"
    return error(
        f"{source.endpoint} sends on to {host}, which gets no token",
        f"{host} answers {status} for {what}",
        step,
    )


def refused_signature(status: int, url: str, path: str, source: Source) -> HfshipError:
    """The error for an address that does not bring a file although the Hub has just signed it."""
    host = origin(url)[1]
    hub = origin(source.endpoint)[1]
    why = f"HTTP {status}, and again with an address that was signed anew"
    if status in (404, 410):
        step = f"tell the owner of {source.repo}, or of {hub}"
        return NotFoundError(f"{host}, to which {hub} leads, does not have {path}", why, step)

    step = f"check the clock, and whether a proxy or firewall blocks {host}"
    if source.repo_type != KIND:
        step += f": {endpoint_command(source, source.endpoint, 'doctor')}"
    if status in (401, 403):
        return AuthError(f"{host} refuses the address that {hub} signed for {path}", why, step)
    return NetworkError(f"{host} answers {status} for {path}", why, step)


def no_file_error(url: str, path: str, kind: str, size: int) -> NetworkError:
    """The error for a page where a file should be."""
    host = origin(url)[1]
    return NetworkError(
        f"{host} sends {_shown(kind)} instead of {path}",
        f"it is no part of the {human_bytes(size)} of the file",
        "check the proxy and HF_ENDPOINT: a login page may stand in between",
    )


def not_a_hub(endpoint: str, why: str) -> NetworkError:
    """The error for an answer that no Hub gives."""
    return NetworkError(
        f"{endpoint} does not answer like a Hub",
        _shown(why),
        "check HF_ENDPOINT; a proxy or login page may stand in between",
    )


def tls_error(url: str, exc: Exception, env: Mapping[str, str]) -> NetworkError:
    """A failed TLS handshake, with the variable that decides which certificates are believed."""
    host, reason = origin(url)[1], root_cause(exc)
    if "WRONG_VERSION_NUMBER" in reason:  # OpenSSL's words for an answer in plain text
        return NetworkError(
            f"{host} does not speak https",
            reason,
            "write http:// in the address, or correct its port",
        )

    variable = ca_variable(env)
    if variable:
        step = f"{variable} is in use: add your site's CA to {env[variable]}"
    else:
        step = "set SSL_CERT_FILE to your site's CA bundle"

    return NetworkError(f"TLS to {host} failed", reason, f"{step}; check the clock")


def ca_variable(env: Mapping[str, str]) -> str:
    """The variable that names the bundle of certificates in use; "" when none does."""
    for name in CA_VARIABLES:
        if env.get(name):
            return name
    return ""


def root_cause(exc: BaseException) -> str:
    """The innermost reason of a chain of wrapped network errors, without URLs."""
    innermost = exc
    wrapped = _wrapped_in(exc)
    while isinstance(wrapped, BaseException):
        innermost = wrapped
        wrapped = _wrapped_in(innermost)

    # urllib3 begins with a repr: "<...HTTPSConnection object at 0x7f...>: ", "...Pool(host=...): "
    text = re.sub(r"^(<[^>]*>|\w+\(host=[^)]*\)): ", "", str(innermost)[:LONGEST_REASON])
    return redact(printable(text)) or type(innermost).__name__


def _wrapped_in(exc: BaseException) -> Any:
    """What urllib3 wraps in an exception: its `reason`, else its first argument."""
    reason = getattr(exc, "reason", None)
    if reason:
        return reason
    return exc.args[0] if exc.args else None
