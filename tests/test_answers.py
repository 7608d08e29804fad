# SPDX-License-Identifier: Apache-2.0
"""What answers and faults of the network mean; test_hub_client.py has the rules of a Hub's errors."""

from __future__ import annotations

from email.utils import formatdate
from typing import Any, Dict, List, Optional, Type

import pytest

from hfship.base.errors import AuthError, HfshipError, NetworkError, NotFoundError
from hfship.base.imagefacts import KIND
from hfship.base.manifest import Source
from hfship.base.settings import Token
from hfship.base.values import replace
from hfship.hub import answers as room
from hfship.hub.answers import (
    LONGEST_HEADER,
    LONGEST_REASON,
    ca_variable,
    hub_error,
    is_basic,
    no_file_error,
    not_a_hub,
    rate_limit_wait,
    refused_signature,
    root_cause,
    sent_on,
    tls_error,
)

NOW = 1_800_000_000.0
SOURCE = Source("https://hub", "org/m", "main", "org/m", "a" * 40)


# -- waits

PAD = "x" * LONGEST_HEADER
# headers -> seconds
WAITS: List[Any] = [
    ({}, None),
    ({"Retry-After": " 7 "}, 7.0),
    ({"Retry-After": "0"}, 0.0),
    ({"Retry-After": "soon"}, None),
    ({"Retry-After": ""}, None),
    ({"Retry-After": formatdate(NOW + 30, usegmt=True)}, 30.0),
    ({"Retry-After": formatdate(NOW - 30, usegmt=True)}, 0.0),
    ({"Retry-After": "Fri, 99 Jan 2027 08:00:00 GMT"}, None),
    ({"Retry-After": PAD + formatdate(NOW + 30, usegmt=True)}, None),
    ({"RateLimit": '"api";r=0;t=55'}, 56.0),
    ({"RateLimit": '"api" ; r=00 ; t=55', "Retry-After": "7"}, 56.0),
    ({"RateLimit": '"api";r=10;t=55', "Retry-After": "7"}, 7.0),
    ({"RateLimit": '"api";r=1;t=55'}, None),
    ({"RateLimit": f'"api";r=0;t={"9" * 50}', "Retry-After": "7"}, 7.0),
    ({"RateLimit": PAD + '"api";r=0;t=55'}, None),
]


@pytest.mark.parametrize(("headers", "wait_s"), WAITS, ids=str)
def test_how_long_a_server_wants_us_to_wait(
    headers: Dict[str, str], wait_s: Optional[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.time, "time", lambda: NOW)
    assert rate_limit_wait(headers) == wait_s


@pytest.mark.parametrize(
    ("challenge", "basic"),
    [
        ("Basic", True),
        ('Bearer realm="x", basic realm="y"', True),
        ('Bearer realm="basic"', False),
        ("Basics", False),
        (PAD + ", Basic", False),
    ],
)
def test_who_asks_for_a_user_and_a_password(challenge: str, basic: bool) -> None:
    assert is_basic(challenge) == basic


# -- reasons


class Wrapped(Exception):
    """As urllib3 wraps: in `reason`, or as its first argument."""

    def __init__(self, *args: Any, reason: Any = None) -> None:
        super().__init__(*args)
        self.reason = reason


REASONS: List[Any] = [
    (OSError("refused"), "refused"),
    (Wrapped("outer", reason=OSError("inner")), "inner"),
    (Wrapped(OSError("inner"), "more"), "inner"),
    (Wrapped("x", reason=Wrapped(Wrapped("y", reason=OSError("inner")))), "inner"),
    (Wrapped("words", reason="text"), "words"),
    (OSError(), "OSError"),
    (Wrapped(OSError()), "OSError"),
    (OSError("<conn object at 0x7f>: refused: it"), "refused: it"),
    (OSError("HTTPSConnectionPool(host='h', port=1): refused"), "refused"),
    (OSError("in between <x>: no"), "in between <x>: no"),
    (OSError("a\x1b[2Jb"), "a?[2Jb"),
    (OSError("https://h/x?token=secret no"), "https://h/x?*** no"),
    (OSError("x" * (LONGEST_REASON + 1)), "x" * LONGEST_REASON),
]


@pytest.mark.parametrize(("fault", "reason"), REASONS, ids=lambda value: str(value)[:30])
def test_the_innermost_reason_is_told(fault: Exception, reason: str) -> None:
    assert root_cause(fault) == reason


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, ""),
        ({"SSL_CERT_FILE": "/c"}, "SSL_CERT_FILE"),
        ({"SSL_CERT_FILE": "/c", "CURL_CA_BUNDLE": "/b"}, "CURL_CA_BUNDLE"),
        ({"CURL_CA_BUNDLE": "/b", "REQUESTS_CA_BUNDLE": "/a"}, "REQUESTS_CA_BUNDLE"),
        ({"REQUESTS_CA_BUNDLE": "", "SSL_CERT_FILE": "/c"}, "SSL_CERT_FILE"),
    ],
)
def test_which_bundle_of_certificates_is_in_use(env: Dict[str, str], name: str) -> None:
    assert ca_variable(env) == name
    error = tls_error("https://h/x", OSError("unknown CA"), env)
    assert (error.what, error.why) == ("TLS to h failed", "unknown CA")
    step = "set SSL_CERT_FILE to your site's CA bundle"
    if name:
        step = f"{name} is in use: add your site's CA to {env[name]}"
    assert error.next_step == f"{step}; check the clock"


def test_an_answer_in_plain_text_is_no_fault_of_certificates() -> None:
    error = tls_error("https://h:80/x", OSError("[SSL: WRONG_VERSION_NUMBER] x"), {})
    assert error.what == "h does not speak https" and "http://" in error.next_step


# -- who refuses

IMAGE = Source("https://r.example", "r.example/org/m", "1", "r.example/org/m", "", repo_type=KIND)


@pytest.mark.parametrize(
    ("status", "source", "error", "step"),
    [
        (401, SOURCE, AuthError, "hfship fetch org/m --endpoint https://cdn:8443"),
        (403, SOURCE, AuthError, "hfship fetch org/m --endpoint https://cdn:8443"),
        (404, SOURCE, NotFoundError, "hfship fetch org/m --endpoint https://cdn:8443"),
        (
            403,
            IMAGE,
            AuthError,
            "check whether a proxy or firewall blocks cdn, or ask who runs r.example",
        ),
    ],
)
def test_where_an_endpoint_sends_on(
    status: int, source: Source, error: Type[HfshipError], step: str
) -> None:
    found = sent_on(status, "https://me:pw@cdn:8443/x?sig=1", "a file", source)
    assert type(found) is error and found.next_step == step
    assert found.what == f"{source.endpoint} sends on to cdn, which gets no token"
    assert found.why == f"cdn answers {status} for a file"


@pytest.mark.parametrize(
    ("status", "error", "what", "step"),
    [
        (
            404,
            NotFoundError,
            "cdn, to which hub leads, does not have w",
            "tell the owner of org/m, or of hub",
        ),
        (410, NotFoundError, "cdn, to which hub leads, does not have w", "tell the owner"),
        (401, AuthError, "cdn refuses the address that hub signed for w", "check the clock"),
        (403, AuthError, "cdn refuses the address that hub signed for w", "check the clock"),
        (400, NetworkError, "cdn answers 400 for w", "check the clock"),
    ],
)
def test_an_address_that_was_signed_anew_and_brings_nothing(
    status: int, error: Type[HfshipError], what: str, step: str
) -> None:
    found = refused_signature(status, "https://cdn/x", "w", SOURCE)
    assert type(found) is error and found.what == what and found.next_step.startswith(step)
    assert found.why == f"HTTP {status}, and again with an address that was signed anew"
    if step == "check the clock":
        assert found.next_step.endswith("blocks cdn: hfship doctor org/m --endpoint https://hub")
        of_image = refused_signature(status, "https://cdn/x", "w", IMAGE)
        assert of_image.next_step.endswith("blocks cdn")


def test_pages_where_none_should_be() -> None:
    error = no_file_error("https://h/x", "w", "text/html\x1b", 2048)
    assert error.what == "h sends text/html? instead of w" and "2.0 kB" in error.why
    error = not_a_hub("https://h", "x" * 999)
    assert error.what == "https://h does not answer like a Hub"
    assert error.why == "x" * LONGEST_HEADER and "HF_ENDPOINT" in error.next_step


def test_a_name_without_an_organisation_is_told() -> None:
    source = Source("https://hub", "m", "main", "m", "")
    error = hub_error(404, {"X-Error-Code": "RepoNotFound"}, "", source, None)
    assert "most models are called ORG/m: add the ORG" in error.next_step
    assert "if it is private, set HF_TOKEN" in error.next_step
    error = hub_error(404, {"X-Error-Code": "RepoNotFound"}, "", SOURCE, None)
    assert "add the ORG" not in error.next_step


def test_headers_are_shown_as_far_as_they_go() -> None:
    headers = {"X-Error-Message": "m" * 999, "X-Error-Code": "c\x1b", "X-Request-Id": "r" * 999}
    error = hub_error(500, headers, "", SOURCE, None)
    shown = f"HTTP 500 c? {'m' * LONGEST_HEADER} (request {'r' * LONGEST_HEADER})"
    assert error.why == shown


A_COMMIT = "c" * 40
ASKED_OF = Source("https://hub", "org/m", "v1", "org/m", "")
SHOWN = Token("secret", "env X")
# code, status, message, changes of what was asked for, token -> (what, why, next)
MEANINGS: Dict[str, Any] = {
    "a commit that went": (
        ("RevisionNotFound", 404, "", {"revision": A_COMMIT}, None),
        f"org/m does not have the commit {A_COMMIT} any more, or never had it",
        "who rewrites a branch (force-push) takes its old commits away; HTTP 404 RevisionNotFound",
        "fetch what is there now: hfship fetch org/m --endpoint https://hub",
    ),
    "a commit that went, by words": (
        ("", 404, "Invalid rev id", {"revision": A_COMMIT}, None),
        f"org/m does not have the commit {A_COMMIT} any more, or never had it",
        "who rewrites a branch (force-push) takes its old commits away; HTTP 404  Invalid rev id",
        "fetch what is there now: hfship fetch org/m --endpoint https://hub",
    ),
    "a commit that goes meanwhile": (
        ("RevisionNotFound", 404, "", {"commit": A_COMMIT}, None),
        "commit cccccccccccc of org/m has gone while it was fetched",
        "somebody rewrote v1 (force-push) or removed the repository; HTTP 404 RevisionNotFound",
        "run the same command again: v1 is looked up anew",
    ),
    "no token for what is gated": (
        ("GatedRepo", 403, "", {}, None),
        "org/m is gated",
        "no token was given; HTTP 403 GatedRepo",
        "accept the terms at https://hub/org/m, then set HF_TOKEN to a token that may read gated"
        " repositories",
    ),
    "a token without access": (
        ("GatedRepo", 403, "", {}, SHOWN),
        "org/m is gated",
        "the token (env X) has no access; HTTP 403 GatedRepo",
        "accept the terms at https://hub/org/m, then set HF_TOKEN to a token that may read gated"
        " repositories",
    ),
    "not there, or hidden": (
        ("", 401, "", {}, None),
        "org/m was not found on https://hub",
        "HTTP 401",
        "check the spelling; if it is private, set HF_TOKEN",
    ),
    "not there, with a token": (
        ("RepoNotFound", 404, "no", {}, SHOWN),
        "org/m was not found on https://hub",
        "HTTP 404 RepoNotFound no",
        "check the spelling",
    ),
    "without its organisation": (
        ("", 404, "", {"repo": "m"}, SHOWN),
        "m was not found on https://hub",
        "HTTP 404",
        "check the spelling; most models are called ORG/m: add the ORG",
    ),
    "an image": (
        ("RevisionNotFound", 404, "", {"revision": A_COMMIT, "repo_type": "image"}, None),
        f"org/m does not have the commit {A_COMMIT} any more, or never had it",
        "who rewrites a branch (force-push) takes its old commits away; HTTP 404 RevisionNotFound",
        f"fetch what is there now: hfship fetch docker://org/m:{A_COMMIT}",
    ),
    "a refused token": (
        ("", 401, "Invalid credentials", {}, SHOWN),
        "the Hub refuses the token from env X",
        "HTTP 401  Invalid credentials",
        "put a valid token there, or remove it for public repositories",
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_an_answer_means_is_told_with_what_to_do(name: str) -> None:
    (code, status, message, changes, token), what, why, step = MEANINGS[name]
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    error = hub_error(status, headers, "", replace(ASKED_OF, **changes), token)
    assert (error.what, error.why, error.next_step) == (what, why, step)
