# SPDX-License-Identifier: Apache-2.0
"""One registry, with answers that are written here: who gets which login, what is asked again, and
what each answer means. Whole programs against a server are in test_registry.py."""

from __future__ import annotations

import io
import json
from typing import Any, Dict, List, Optional, Tuple, Type

import pytest

from hfship.base.errors import (
    AuthError,
    HfshipError,
    IntegrityError,
    NetworkError,
    NotFoundError,
)
from hfship.base.imagefacts import KIND
from hfship.base.manifest import Source
from hfship.base.report import Reporter
from hfship.hub import registry as room
from hfship.hub.gate import ParentProxy
from hfship.hub.protocol import MAX_REDIRECTS
from hfship.hub.registry import (
    FetchedManifest,
    PullLimit,
    RegistryAuthorization,
    RegistryClient,
    bounded_content,
    error_words,
    pull_limit,
    registry_endpoint,
)
from hfship.hub.registry_login import RegistryLogin
from hfship.hub.registry_protocol import ACCEPT, digest_of, parse_reference
from hfship.hub.retry import API_RETRY, RetryableError
from hfship.hub.transport import LONGEST_HOLD_S
from support.scripted import NoWait, Scripted, ScriptedRegistry

HOST = ScriptedRegistry.url
REALM = "https://auth.example/token"
TAG = f"{HOST}/v2/org/app/manifests/1"
BODY = b'{"mediaType": "x"}'
SUM = digest_of(BODY)
BLOB = f"{HOST}/v2/org/app/blobs/{SUM}"
PASSWORD = RegistryLogin("ann", "pass word", "", "config.json")
BASIC = "Basic YW5uOnBhc3Mgd29yZA=="  # ann:pass word
IDENTITY = RegistryLogin("", "", "identity", "docker-credential-x")

OK: Scripted = (200, {"Content-Type": "a/b", "Docker-Content-Digest": SUM}, BODY)
CHALLENGE = f'Bearer realm="{REALM}",service="r",scope="repository:org/app:pull"'
ASKED = f"{REALM}?service=r&scope=repository%3Aorg%2Fapp%3Apull"
WANTS_TOKEN: Scripted = (401, {"WWW-Authenticate": CHALLENGE}, b"")
WANTS_BASIC: Scripted = (401, {"WWW-Authenticate": 'Basic realm="r"'}, b"")
TOKEN: Scripted = (200, {}, b'{"token": "token-number-1"}')
BEARER = "Bearer token-number-1"
LIMITS = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600"}


def words(code: str, message: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": message}]}).encode()


def failing(status: int, **headers: str) -> Scripted:
    return (status, headers, words("CODE", "said so"))


# -- who gets which login


@pytest.mark.parametrize(
    ("url", "login", "header"),
    [
        ("https://r.example/v2/", PASSWORD, BEARER),
        ("https://r.example:443/v2/", PASSWORD, BEARER),
        ("http://r.example/v2/", PASSWORD, None),
        ("https://cdn.example/v2/", PASSWORD, None),
        (f"{REALM}?service=r", PASSWORD, BASIC),
        (REALM, PASSWORD, BASIC),
        (REALM, None, None),
        (REALM, IDENTITY, None),
        (f"{REALM}/more", PASSWORD, None),
    ],
)
def test_a_header_goes_to_the_registry_and_the_login_to_who_gives_its_tokens(
    url: str, login: Optional[RegistryLogin], header: Optional[str]
) -> None:
    authorization = RegistryAuthorization(HOST, login)
    authorization.header, authorization.realm = BEARER, REALM
    request = type("Request", (), {"url": url, "headers": {"Authorization": "of who called"}})()
    assert authorization(request) is request
    assert request.headers.get("Authorization") == header


@pytest.mark.parametrize(
    ("login", "uses"),
    [(PASSWORD, [True, False]), (IDENTITY, [False, False]), (None, [False, False])],
)
def test_a_password_is_tried_once(login: Optional[RegistryLogin], uses: List[bool]) -> None:
    authorization = RegistryAuthorization(HOST, login)
    assert [authorization.use_password(), authorization.use_password()] == uses


def test_what_is_secret_of_a_login() -> None:
    assert RegistryAuthorization(HOST, None).secrets == []
    assert RegistryAuthorization(HOST, PASSWORD).secrets == ["pass word", BASIC[6:]]
    assert RegistryAuthorization(HOST, IDENTITY).secrets == ["identity"]


FORM = {
    "grant_type": "refresh_token",
    "refresh_token": "identity",
    "service": "r",
    "scope": "repository:org/app:pull",
    "client_id": "hfship",
}
# login -> how a token is asked for: method, address, Authorization, form
TOKENS: Dict[str, Any] = {
    "nobody": (None, ("GET", ASKED, ""), None),
    "a password": (PASSWORD, ("GET", ASKED, BASIC), None),
    "an identity token": (IDENTITY, ("POST", REALM, ""), FORM),
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_is_asked_for_and_used(name: str) -> None:
    login, token_request, form = TOKENS[name]
    asked = ScriptedRegistry(WANTS_TOKEN, TOKEN, OK, login=login)
    assert asked.client.manifest("1") == FetchedManifest(BODY, SUM, "a/b")
    assert asked.sent == [("GET", TAG, ""), token_request, ("GET", TAG, BEARER)]
    assert asked.session.sent[1].body == form
    asked.reporter.info("token-number-1 pass word identity")
    for secret in ("number-1", *(login.secrets if login else [])):
        assert secret not in asked.err.getvalue()


def test_each_request_of_any_method_logs_in_and_has_its_body_anew() -> None:
    asked = ScriptedRegistry(WANTS_TOKEN, TOKEN, (201, {}, b""))
    bodies = iter([b"first", b"second"])
    answer = asked.client.request("PUT", TAG, {"A": "b"}, lambda: next(bodies))
    assert answer.status_code == 201 and next(bodies, None) is None
    (first, _, last) = asked.session.sent
    assert (first.method, first.body, last.method, last.body) == ("PUT", b"first", "PUT", b"second")
    assert first.headers["A"] == last.headers["A"] == "b" and last.login == BEARER


def test_what_succeeds_needs_no_login() -> None:
    asked = ScriptedRegistry((200, {"WWW-Authenticate": CHALLENGE}, BODY))
    assert asked.client.request("GET", TAG).status_code == 200


def test_a_run_that_is_being_stopped_sends_nothing() -> None:
    asked = ScriptedRegistry(OK)
    asked.stop.set()
    with pytest.raises(KeyboardInterrupt):
        asked.client.request("GET", TAG)
    assert not asked.sent


def test_a_token_that_another_thread_got_meanwhile_is_used() -> None:
    asked = ScriptedRegistry(WANTS_TOKEN, OK)
    send = asked.session.request

    def renewed(*given: Any) -> Any:
        answer = send(*given)
        asked.client._authorization.header = "Bearer newer"
        return answer

    asked.session.request = renewed  # type: ignore[method-assign]
    asked.client.manifest("1")
    assert [login for _, _, login in asked.sent] == ["", "Bearer newer"]


@pytest.mark.parametrize(
    ("answers", "login", "sent"),
    [
        ([WANTS_BASIC, OK], PASSWORD, ["", BASIC]),
        ([WANTS_BASIC, WANTS_BASIC], PASSWORD, ["", BASIC]),
        ([WANTS_BASIC], None, [""]),
        ([(401, {"WWW-Authenticate": "Negotiate"}, b"")], PASSWORD, [""]),
        ([(401, {}, b"")], PASSWORD, [""]),
    ],
)
def test_a_password_is_shown_where_that_is_asked_for(
    answers: List[Scripted], login: Optional[RegistryLogin], sent: List[str]
) -> None:
    asked = ScriptedRegistry(*answers, login=login)
    response = asked.client.get(TAG, {})
    assert [login for _, _, login in asked.sent] == sent
    assert response.status_code == (200 if OK in answers else 401)


def test_another_host_is_not_logged_in_at() -> None:
    asked = ScriptedRegistry(WANTS_TOKEN, login=PASSWORD)
    assert asked.client.get("https://cdn.example/x", {}).status_code == 401
    assert len(asked.sent) == 1


@pytest.mark.parametrize(
    ("endpoint", "refused"), [(HOST, True), ("http://r.example", False)], ids=["https", "http"]
)
def test_no_password_goes_over_plain_http_for_a_registry_that_speaks_https(
    endpoint: str, refused: bool
) -> None:
    challenge = CHALLENGE.replace("https:", "http:")
    wants: Scripted = (401, {"WWW-Authenticate": challenge}, b"")
    asked = ScriptedRegistry(wants, TOKEN, OK, login=PASSWORD, endpoint=endpoint)
    if not refused:
        assert asked.client.manifest("1").body == BODY
        return
    with pytest.raises(AuthError, match="r.example wants a login over plain http, at auth.example"):
        asked.client.manifest("1")
    assert len(asked.sent) == 1


# answer of who gives the tokens -> the token that is in it
GIVEN = {
    b'{"token": "token-number-1"}': BEARER,
    b'{"access_token": "token-number-1"}': BEARER,
    b'{"token": "", "access_token": "token-number-1"}': BEARER,
    b'{"token": "' + b"t" * 32768 + b'"}': "Bearer " + "t" * 32768,
    b'{"token": "' + b"t" * 32769 + b'"}': "",
    b'{"token": "a b"}': "",
    b'{"token": "a\\nb"}': "",
    b'{"token": 1}': "",
    b"{}": "",
    b"[]": "",
    b"<html>": "",
}


@pytest.mark.parametrize("body", GIVEN, ids=lambda body: body[:30].decode())
def test_what_a_token_is(body: bytes) -> None:
    asked = ScriptedRegistry(WANTS_TOKEN, (200, {}, body), OK)
    if GIVEN[body]:
        asked.client.manifest("1")
        assert asked.sent[-1][2] == GIVEN[body]
        return
    with pytest.raises(NetworkError, match="auth.example gives no token for r.example"):
        asked.client.manifest("1")


@pytest.mark.parametrize(
    ("status", "login", "error", "what"),
    [
        (401, None, AuthError, "r.example wants a login for r.example/org/app:1"),
        (404, None, NotFoundError, "r.example does not have r.example/org/app:1"),
        (401, PASSWORD, AuthError, "auth.example refuses the login of config.json for r.example"),
        (400, IDENTITY, AuthError, "auth.example refuses the login of docker-credential-x for"),
    ],
)
def test_a_login_that_brings_no_token_is_told(
    status: int, login: Optional[RegistryLogin], error: Type[HfshipError], what: str
) -> None:
    asked = ScriptedRegistry(WANTS_TOKEN, failing(status), login=login)
    with pytest.raises(error) as told:
        asked.client.manifest("1")
    assert told.value.what.startswith(what) and f"HTTP {status} CODE: said so" in told.value.why
    if login:
        assert told.value.next_step.startswith("docker login r.example, or --registry-user")


def test_who_gives_tokens_may_falter() -> None:
    asked = ScriptedRegistry(
        WANTS_TOKEN, failing(503, **{"Retry-After": "7"}), WANTS_TOKEN, TOKEN, OK
    )
    assert asked.client.manifest("1").body == BODY
    assert asked.stop.waits == [7.0] and "auth.example answered 503" in asked.err.getvalue()


# -- waits, and the limit of pulls


# (status, headers) -> what is asked to wait, or the error that ends the run
WAITS: List[Tuple[int, Dict[str, str], Any]] = [
    (200, {}, "goes on"),
    (404, {}, "goes on"),
    (503, {}, None),
    (503, {**LIMITS, "Retry-After": "9999"}, "r.example takes no requests for 2h46m"),
    (429, {}, None),
    (429, {"Retry-After": "7"}, 7.0),
    (429, {**LIMITS, "Retry-After": "7"}, 7.0),
    (429, {**LIMITS, "Retry-After": f"{LONGEST_HOLD_S:.0f}"}, LONGEST_HOLD_S),
    (429, {**LIMITS, "Retry-After": f"{LONGEST_HOLD_S + 1:.0f}"}, "r.example lets us pull no more"),
    (429, LIMITS, "r.example lets us pull no more: 0 of 100 pulls left (in 6 h 00 min)"),
    (429, {"Retry-After": "9999"}, "r.example takes no requests for 2h46m"),
]


@pytest.mark.parametrize(("status", "headers", "wanted"), WAITS, ids=str)
def test_what_may_pass_is_asked_again_and_a_limit_of_hours_ends_the_run(
    status: int, headers: Dict[str, str], wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ScriptedRegistry(failing(status, **headers))
    held: List[float] = []
    monkeypatch.setattr(asked.client.gate, "hold", lambda seconds, _: held.append(seconds))
    response = asked.client._send(TAG, {})
    if wanted == "goes on":
        asked.client.retry_status(response, TAG)
        return
    with pytest.raises((RetryableError, NetworkError)) as told:
        asked.client.retry_status(response, TAG)
    error = told.value
    if isinstance(error, RetryableError):
        assert error.wait_s == wanted and str(error) == f"r.example answered {status}"
        assert bool(held) == (status == 429)
    else:
        assert error.what.startswith(wanted) and not held
    if isinstance(error, NetworkError) and "lets us pull" in error.what:
        assert error.why == "HTTP 429 CODE: said so"


def test_who_holds_nobody_up_leaves_the_gate_open(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ScriptedRegistry(failing(429))
    monkeypatch.setattr(asked.client.gate, "hold", pytest.fail)
    with pytest.raises(RetryableError):
        asked.client.retry_status(asked.client._send(TAG, {}), TAG, holds=False)


@pytest.mark.parametrize(
    ("login", "wait", "step"),
    [
        (PASSWORD, "", "run the same command again later; what arrived is kept"),
        (PASSWORD, "9999", "run the same command again in 2h46m; what arrived is kept"),
        (None, "9999", "docker login r.example, or --registry-user USER"),
    ],
)
def test_who_has_no_login_may_get_one_where_no_more_is_pulled(
    login: Optional[RegistryLogin], wait: str, step: str
) -> None:
    headers = {**LIMITS, **({"Retry-After": wait} if wait else {})}
    asked = ScriptedRegistry(failing(429, **headers), login=login)
    with pytest.raises(NetworkError) as told:
        asked.client.manifest("1")
    assert told.value.next_step.startswith(step)
    assert "run the same command again" in told.value.next_step


# headers -> the limit
LIMITED: List[Tuple[Dict[str, str], Optional[PullLimit]]] = [
    (LIMITS, PullLimit(100, 0, 21600)),
    ({"ratelimit-limit": "x100", "ratelimit-remaining": "7"}, None),
    ({"ratelimit-limit": "100", "ratelimit-remaining": "7"}, PullLimit(100, 7, 0)),
    ({"ratelimit-limit": " 100 ; w=60", "ratelimit-remaining": "7"}, PullLimit(100, 7, 60)),
    ({"ratelimit-limit": "100;w=60"}, None),
    ({"ratelimit-remaining": "7"}, None),
    ({"ratelimit-limit": "many", "ratelimit-remaining": "7"}, None),
    ({}, None),
]


@pytest.mark.parametrize(("headers", "limit"), LIMITED, ids=str)
def test_a_limit_of_pulls(headers: Dict[str, str], limit: Optional[PullLimit]) -> None:
    assert pull_limit(headers) == limit


# -- manifests


@pytest.mark.parametrize(
    ("wanted", "said", "right"),
    [
        ("1", SUM, True),
        ("1", None, True),
        ("1", "sha256:" + "1" * 64, False),
        (SUM, "sha256:" + "1" * 64, True),
        ("sha256:" + "1" * 64, SUM, False),
    ],
)
def test_a_manifest_is_what_its_digest_says(wanted: str, said: Optional[str], right: bool) -> None:
    headers = {"Docker-Content-Digest": said} if said else {}
    asked = ScriptedRegistry((200, headers, BODY))
    if right:
        assert asked.client.manifest(wanted) == FetchedManifest(BODY, SUM, "")
    else:
        with pytest.raises(IntegrityError, match="another manifest of r.example/org/app:1"):
            asked.client.manifest(wanted)
    (sent,) = asked.session.sent
    assert sent.headers["Accept"] == ACCEPT and sent.url == TAG[:-1] + wanted


def test_a_manifest_comes_after_faults_that_pass() -> None:
    asked = ScriptedRegistry(failing(503, **{"Retry-After": "7"}), failing(500), OK)
    assert asked.client.manifest("1").body == BODY
    asked_s, own_s = asked.stop.waits
    assert asked_s == 7.0 and own_s <= 1.0
    assert f"(1 of {API_RETRY.attempts - 1})" in asked.err.getvalue()


@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_patience_has_an_end(what: str) -> None:
    asked = ScriptedRegistry(*[failing(503)] * API_RETRY.attempts)
    with pytest.raises(NetworkError, match=f"{HOST} cannot be reached") as told:
        ask(asked, what)
    assert len(asked.stop.waits) == API_RETRY.attempts - 1
    assert "check the network, the proxy and the name of the registry" in told.value.next_step


@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_who_is_to_stop_asks_no_more(what: str) -> None:
    asked = ScriptedRegistry(failing(503))
    hold = asked.session.request

    def stopping(*given: Any) -> Any:
        asked.stop.set()
        return hold(*given)

    asked.session.request = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ask(asked, what)


def ask(asked: ScriptedRegistry, what: str) -> Any:
    if what == "blob":
        return asked.client.blob(SUM, len(BODY), 1000)
    return asked.client.manifest("1")


MIRROR = "https://mirror.example"


@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_mirrors_are_asked_first_without_a_login(what: str) -> None:
    other = "https://other.example"
    gone: Scripted = failing(500)
    asked = ScriptedRegistry(WANTS_TOKEN, OK, login=PASSWORD, mirrors=[MIRROR, other])
    found = ask(asked, what)
    assert found == (BODY if what == "blob" else FetchedManifest(BODY, SUM, "a/b"))
    assert [(url.split("/v2/")[0], login) for _, url, login in asked.sent] == [
        (MIRROR, ""),
        (other, ""),
    ]
    assert f"{MIRROR} does not help: " in asked.err.getvalue()
    asked = ScriptedRegistry(gone, (200, {}, b"other"), OK, mirrors=[MIRROR, other])
    if what == "blob":
        ask(asked, what)
        assert asked.sent[-1][1] == BLOB and f"{other} does not help" in asked.err.getvalue()
    else:
        assert asked.client.manifest("1").body == b"other"


def test_how_many_pulls_are_left_is_a_detail() -> None:
    asked = ScriptedRegistry((200, {**LIMITS, "ratelimit-remaining": "76"}, BODY))
    asked.client.manifest("1")
    assert "r.example: 76 of 100 pulls left" in asked.err.getvalue()
    asked = ScriptedRegistry(OK)
    asked.client.manifest("1")
    assert "pulls left" not in asked.err.getvalue()


def test_a_manifest_is_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LARGEST_MANIFEST", len(BODY))
    assert ScriptedRegistry(OK).client.manifest("1").body == BODY
    monkeypatch.setattr(room, "LARGEST_MANIFEST", len(BODY) - 1)
    with pytest.raises(NetworkError, match="answer for r.example/org/app:1 is too large"):
        ScriptedRegistry(OK).client.manifest("1")


TAGS = json.dumps({"tags": [f"v{number}" for number in range(10, 30)]}).encode()


@pytest.mark.parametrize(
    ("listed", "step"),
    [
        ((200, {}, b'{"tags": ["1.0", "2.0"]}'), "check the tag\nit has 2.0, 1.0"),
        ((200, {}, b'{"tags": []}'), "check the name and the tag"),
        (failing(404), "check the name and the tag"),
        (failing(503), "check the name and the tag"),
        ((200, {}, TAGS), "check the tag\nit has v29, v28, v27, v26, v25, v24, v23, v22, v21, v20"),
    ],
)
def test_a_tag_that_is_not_there_is_told_with_those_that_are(listed: Scripted, step: str) -> None:
    asked = ScriptedRegistry(failing(404), listed)
    with pytest.raises(NotFoundError) as told:
        asked.client.manifest("1")
    assert told.value.next_step.startswith(step)
    assert asked.sent[1][:2] == ("GET", f"{HOST}/v2/org/app/tags/list")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((200, {"Docker-Content-Digest": SUM}, b""), SUM),
        ((200, {}, b""), ""),
        ((404, {"Docker-Content-Digest": SUM}, b""), ""),
        (ValueError("cut off"), ""),
    ],
)
def test_what_a_tag_means_now_is_asked_by_a_head(answer: Scripted, found: str) -> None:
    asked = ScriptedRegistry(answer)
    assert asked.client.head_digest("1") == found
    (sent,) = asked.session.sent
    assert (sent.method, sent.url, sent.headers["Accept"]) == ("HEAD", TAG, ACCEPT)


def test_an_answer_that_nobody_reads_holds_no_connection() -> None:
    asked = ScriptedRegistry(failing(404))
    asked.client.head_digest("1")
    assert asked.session.unread == 0
    asked = ScriptedRegistry(failing(307, Location="/a"), failing(307, Location="/b"), OK)
    asked.client.following(BLOB)
    assert asked.session.unread == 1
    asked = ScriptedRegistry((401, {"WWW-Authenticate": CHALLENGE}, b"no"), TOKEN, OK)
    asked.client.request("GET", TAG)
    assert asked.session.unread == 1
    asked = ScriptedRegistry((429, {**LIMITS, "Transfer-Encoding": "x"}, b"words"))
    with pytest.raises(NetworkError):
        asked.client.retry_status(asked.client._send(TAG, {}), TAG)
    assert asked.session.unread == 0


# -- blobs


def test_a_blob_is_followed_to_a_cdn_which_gets_no_token() -> None:
    away: Scripted = (307, {"Location": "https://cdn.example/x?sig=1"}, b"")
    asked = ScriptedRegistry(WANTS_TOKEN, TOKEN, away, OK)
    assert asked.client.blob(SUM, len(BODY), len(BODY)) == BODY
    assert asked.sent[2:] == [("GET", BLOB, BEARER), ("GET", "https://cdn.example/x?sig=1", "")]


def test_redirects_in_a_circle_end() -> None:
    asked = ScriptedRegistry(*[(307, {}, b"")] * MAX_REDIRECTS)
    with pytest.raises(NetworkError, match="r.example redirects in a circle") as told:
        asked.client.following(BLOB)
    assert {url for _, url, _ in asked.sent} == {BLOB} and len(asked.sent) == MAX_REDIRECTS
    assert told.value.next_step == "check the name of the registry"


def test_what_a_cdn_refuses_is_asked_again_and_what_the_registry_refuses_is_not() -> None:
    away: Scripted = (307, {"Location": "https://cdn.example/x"}, b"")
    asked = ScriptedRegistry(away, failing(403), OK)
    assert asked.client.blob(SUM, len(BODY), 1000) == BODY and len(asked.stop.waits) == 1
    with pytest.raises(AuthError, match="wants a login"):
        ScriptedRegistry(failing(403)).client.blob(SUM, len(BODY), 1000)


def test_a_blob_is_proven_and_small() -> None:
    with pytest.raises(IntegrityError, match="another configuration of r.example/org/app:1"):
        ScriptedRegistry((200, {}, b"other")).client.blob(SUM, len(BODY), 1000)
    asked = ScriptedRegistry()
    with pytest.raises(NotFoundError, match=f"has a configuration of {len(BODY)} bytes"):
        asked.client.blob(SUM, len(BODY), len(BODY) - 1)
    assert not asked.sent
    with pytest.raises(NetworkError, match="is too large"):
        ScriptedRegistry(OK).client.blob(SUM, 1, len(BODY) - 1)


def test_a_body_is_bounded() -> None:
    response = ScriptedRegistry(OK).client._send(TAG, {})
    assert bounded_content(response, len(BODY), "x") == BODY
    with pytest.raises(NetworkError) as told:
        bounded_content(ScriptedRegistry(OK).client._send(TAG, {}), len(BODY) - 1, "x")
    assert told.value.why == f"more than {len(BODY) - 1} bytes"


# -- what answers mean

LOGIN_STEP = "docker login r.example, or --registry-user USER --registry-password-file FILE"


@pytest.mark.parametrize(
    ("status", "login", "error", "what", "step"),
    [
        (401, None, AuthError, "wants a login for it", f"log in: {LOGIN_STEP}"),
        (403, None, AuthError, "wants a login for it", f"log in: {LOGIN_STEP}"),
        (401, PASSWORD, AuthError, "refuses config.json for it", LOGIN_STEP),
        (403, PASSWORD, AuthError, "refuses config.json for it", LOGIN_STEP),
        (404, None, NotFoundError, "does not have it", "check the name and the tag"),
        (418, PASSWORD, NetworkError, "answers with an error for it", "again later"),
    ],
)
def test_what_an_answer_means(
    status: int,
    login: Optional[RegistryLogin],
    error: Type[HfshipError],
    what: str,
    step: str,
) -> None:
    body = words("DENIED", "no").decode()
    found = ScriptedRegistry(login=login).client.meaning(status, body, "it")
    assert type(found) is error and found.what == f"r.example {what}"
    assert found.why.startswith(f"HTTP {status} DENIED: no") and found.next_step.endswith(step)


def test_docker_hub_is_logged_in_at_without_its_name() -> None:
    reference = parse_reference("docker://busybox")
    endpoint = "https://registry-1.docker.io"
    client = RegistryClient(reference, endpoint, PASSWORD, Reporter("none", -1), NoWait())
    step = client.meaning(401, "", "it").next_step
    assert step.startswith("docker login, or --registry-user")


SOURCE = Source(HOST, "r.example/org/app", "1", "r.example/org/app", "", repo_type=KIND)


def test_a_layer_that_is_missing_is_who_runs_the_registrys_to_mend() -> None:
    client = ScriptedRegistry().client
    missing = client.refusal(404, {}, "", SOURCE)
    assert missing.next_step.startswith("tell who runs r.example")
    assert missing.what == "r.example does not have a layer of r.example/org/app:1"
    assert client.refusal(401, {}, "", SOURCE).next_step.startswith("check the spelling")


@pytest.mark.parametrize(
    ("path", "digest"),
    [("model.safetensors", "sha256:abc"), ("blobs/sha256/0123", "sha256:0123")],
)
def test_where_a_file_is(path: str, digest: str) -> None:
    client = ScriptedRegistry().client
    client.digests["model.safetensors"] = "sha256:abc"
    assert client.file_url(SOURCE, path) == f"{HOST}/v2/org/app/blobs/{digest}"


# body of an error -> what is shown of it
SAID = {
    '{"errors": [{"code": "A", "message": "b"}, {"code": "C"}]}': "A: b",
    '{"errors": [{"code": "A"}]}': "A:",
    '{"errors": [{"message": "b"}]}': ": b",
    '{"errors": []}': "",
    '{"errors": 7}': "",
    '{"errors": ["a"]}': "",
    '{"details": "d", "message": "m"}': "d",
    '{"message": "m"}': "m",
    '{"message": "a\\u001b[2Jb"}': "a?[2Jb",
    '{"errors": [{"code": "A", "message": "a\\u001b[2Jb"}]}': "A: a?[2Jb",
    json.dumps({"message": "m" * 301}): "m" * 300,
    json.dumps({"errors": [{"code": "A", "message": "m" * 300}]}): "A: " + "m" * 297,
    "{}": "",
    "[1]": "",
    "7": "",
    "<html>": "",
}


@pytest.mark.parametrize("body", SAID, ids=lambda body: body[:40])
def test_a_registrys_own_words(body: str) -> None:
    assert error_words(body) == SAID[body]


# -- forks, and where it is


def test_a_forked_client_has_a_lock_and_a_reporter_of_its_own() -> None:
    asked = ScriptedRegistry(WANTS_TOKEN, TOKEN, OK)
    lines: List[Any] = []
    with asked.client._lock:  # another thread of the parent renews its token
        twin = asked.client.forked(ParentProxy(lines.append))
        assert twin is not asked.client and twin.get(TAG, {}).status_code == 200
    assert twin.reporter is not asked.reporter


@pytest.mark.parametrize(
    ("name", "plain_http", "fault", "endpoint"),
    [
        ("r.example", False, None, "https://r.example"),
        ("r.example", True, None, "http://r.example"),
        ("docker.io", False, None, "https://registry-1.docker.io"),
        ("localhost:5000", True, None, "http://localhost:5000"),
        ("localhost:5000", False, "answers", "https://localhost:5000"),
        ("localhost:5000", False, RetryableError("later"), "https://localhost:5000"),
        (
            "localhost:5000",
            False,
            NetworkError("localhost does not speak https", "", ""),
            "http://localhost:5000",
        ),
        ("localhost:5000", False, NetworkError("TLS failed", "", ""), ""),
    ],
)
def test_only_a_registry_of_this_machine_is_tried_over_plain_http(
    name: str, plain_http: bool, fault: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: List[str] = []

    def send(_: Any, url: str, __: Any) -> Any:
        tried.append(url)
        if isinstance(fault, Exception):
            raise fault
        return io.StringIO()

    monkeypatch.setattr(RegistryClient, "_send", send)
    reference = parse_reference(f"docker://{name}/org/app:1")

    def ask() -> str:
        return registry_endpoint(reference, plain_http, None, Reporter("none", -1))

    if endpoint:
        assert ask() == endpoint
    else:
        with pytest.raises(NetworkError, match="TLS failed"):
            ask()
    assert tried == (["https://localhost:5000/v2/"] if fault else [])
