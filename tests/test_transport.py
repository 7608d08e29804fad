# SPDX-License-Identifier: Apache-2.0
"""Single requests and their faults, with answers that are written here; test_hub_client.py and
test_hostile_hub.py have servers."""

from __future__ import annotations

from http.client import HTTPException
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Type

import pytest
from urllib3 import exceptions as of_urllib3

from hfship.base.errors import AuthError, HfshipError, NetworkError
from hfship.hub import transport as room
from hfship.hub.gate import HoldMessage, LineMessage, ParentProxy
from hfship.hub.protocol import MAX_REDIRECTS
from hfship.hub.registry_login import RegistryLogin
from hfship.hub.retry import API_RETRY, RetryableError, SourceFaltered
from hfship.hub.transport import (
    LONGEST_HOLD_S,
    MAX_HEAD,
    ApiAnswer,
    _proxy_error,
    limited_body,
    pieces,
)
from support.scripted import Scripted, ScriptedRegistry

URL = "https://r.example/v2/x"
OK: Scripted = (200, {"A": "b"}, b"text")


# -- redirects, and patience


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("https://r.example/new", "https://r.example/new"),
        ("/new", "https://r.example/new"),
        ("new", "https://r.example/v2/new"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(status: int, location: str, url: str) -> None:
    asked = ScriptedRegistry((status, {"Location": location}, b""), OK)
    answer = asked.client._ask(URL)
    assert (answer.status, answer.body, answer.url) == (200, "text", url)
    assert answer.headers["A"] == "b" and [one for _, one, _ in asked.sent] == [URL, url]


def test_a_redirect_to_nowhere_is_a_circle() -> None:
    asked = ScriptedRegistry(*[(307, {}, b"")] * MAX_REDIRECTS)
    with pytest.raises(NetworkError) as told:
        asked.client._ask(URL)
    assert told.value.what == "https://r.example redirects in a circle"
    assert told.value.next_step == "check the name of the registry"
    assert [url for _, url, _ in asked.sent] == [URL] * MAX_REDIRECTS


def test_what_is_no_redirect_is_an_answer() -> None:
    for status in (304, 404, 418):
        assert ScriptedRegistry((status, {}, b"x")).client._ask(URL).status == status


@pytest.mark.parametrize(
    ("failures", "wait_s", "in_detail"),
    [(1, 0.5, True), (1, 1.0, True), (1, 1.5, False), (2, 0.5, False)],
)
def test_a_first_short_wait_is_a_detail(failures: int, wait_s: float, in_detail: bool) -> None:
    asked = ScriptedRegistry()
    asked.reporter.adjust("plain", 0)
    retry = API_RETRY
    for _ in range(failures):
        retry = retry.after_failure()
    asked.client._report_retry(RetryableError("it is off"), retry, wait_s)
    said = asked.err.getvalue()
    assert ("it is off; trying again in" in said) != in_detail
    assert in_detail or f"({failures} of {API_RETRY.attempts - 1})" in said


# -- single requests


def test_an_answer_closes_its_connection() -> None:
    asked = ScriptedRegistry(OK, (503, {}, b"later"))
    assert asked.client.exchange(URL) == ApiAnswer(200, asked_headers(asked), "text", URL)
    with pytest.raises(RetryableError):
        asked.client.exchange(URL)
    assert asked.session.unread == 0


def asked_headers(asked: ScriptedRegistry) -> Any:
    return asked.session._given[0].headers


def test_nothing_is_sent_while_the_run_ends() -> None:
    asked = ScriptedRegistry(OK)
    asked.stop.set()
    with pytest.raises(KeyboardInterrupt):
        asked.client.get(URL, {})
    assert not asked.sent


def test_a_proxy_that_wants_a_login_is_told() -> None:
    asked = ScriptedRegistry((407, {"Proxy-Authenticate": "NTLM"}, b"no"))
    with pytest.raises(AuthError, match="proxy") as told:
        asked.client.get(URL, {})
    assert asked.session.unread == 0
    assert "NTLM" in f"{told.value.what} {told.value.why} {told.value.next_step}"


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
def test_a_head_is_not_too_large(more: int, fits: bool) -> None:
    asked = ScriptedRegistry((200, {}, b"text"))
    plain = asked.client.get(URL, {})
    size = sum(len(name) + len(value) for name, value in plain.headers.items())
    headers = {f"X-{number:02}": "y" * 8000 for number in range(8)}
    left = MAX_HEAD - size - sum(len(name) + len(value) for name, value in headers.items())
    headers["Z"] = "z" * (left - 1 + more)
    asked = ScriptedRegistry((200, headers, b"text"))
    if fits:
        assert asked.client.get(URL, {}).status_code == 200
        return
    with pytest.raises(NetworkError, match="r.example sends 65.5 kB of headers"):
        asked.client.get(URL, {})
    assert asked.session.unread == 0


FAULTS: List[Any] = [
    (of_urllib3.SSLError("unknown CA"), NetworkError, "TLS to r.example failed"),
    (of_urllib3.TimeoutError("slow"), SourceFaltered, "r.example: slow"),
    (of_urllib3.ProtocolError("cut"), RetryableError, "r.example: cut"),
    (ValueError("no address"), RetryableError, "r.example: no address"),
    (
        of_urllib3.ProxyError("off", OSError("x")),
        RetryableError,
        "the proxy does not bring us to r",
    ),
    (OSError("no such file"), NetworkError, "the CA bundle cannot be read"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), FAULTS, ids=lambda value: str(value)[:30])
def test_what_a_fault_of_the_network_means(
    fault: Exception, kind: Type[Exception], words: str
) -> None:
    with pytest.raises(kind) as told:
        ScriptedRegistry(fault).client.get(URL, {})
    assert type(told.value) is kind
    what = told.value.what if isinstance(told.value, HfshipError) else str(told.value)
    assert what.startswith(words) and told.value.__cause__ is fault


@pytest.mark.parametrize(
    ("reason", "kind", "words"),
    [
        ("Tunnel connection failed: 403 Forbidden", NetworkError, "does not let us to h"),
        ("Tunnel connection failed: 407 x", AuthError, "proxy"),
        ("Tunnel connection failed: 429 x", RetryableError, "does not bring us to h: Tunnel"),
        ("Tunnel connection failed: 503 x", RetryableError, "does not bring us to h: Tunnel"),
        ("refused", RetryableError, "the proxy does not bring us to h: refused"),
    ],
)
def test_why_a_proxy_did_not_bring_us_to_a_host(
    reason: str, kind: Type[Exception], words: str
) -> None:
    found = _proxy_error(OSError(reason), None, "h")
    assert isinstance(found, kind)
    what = found.what if isinstance(found, HfshipError) else str(found)
    assert words in what
    if kind is NetworkError:
        assert isinstance(found, NetworkError)
        assert found.next_step == "have h allowed there, or name it in no_proxy"


def test_a_proxy_is_named_by_its_address_and_its_variable() -> None:
    proxy: Any = SimpleNamespace(address="http://p:3128", variable="https_proxy")
    found = _proxy_error(OSError("refused"), proxy, "h")
    assert str(found) == "the proxy http://p:3128 (https_proxy) does not bring us to h: refused"


# -- bodies


class Raw:
    """A body in pieces; the last may be a fault."""

    def __init__(self, *found: Any) -> None:
        self.found = list(found)
        self._fp = SimpleNamespace(fp=None)

    def read1(self, most: int, decode_content: bool) -> bytes:
        """The next piece."""
        assert most > 0 and decode_content
        piece = self.found.pop(0) if self.found else b""
        if isinstance(piece, Exception):
            raise piece
        assert isinstance(piece, bytes)
        return piece


def response(*found: Any) -> Any:
    return SimpleNamespace(raw=Raw(*found), url=URL)


@pytest.mark.parametrize(
    "fault",
    [
        of_urllib3.IncompleteRead(1, 2),
        HTTPException("odd"),
        OSError("cut"),
        ValueError("x"),
        AttributeError("y"),
    ],
    ids=repr,
)
def test_a_body_that_breaks_off_may_be_asked_for_again(fault: Exception) -> None:
    assert list(pieces(response(b"a", b"b"))) == [b"a", b"b"]
    found = pieces(response(b"a", fault))
    assert next(found) == b"a"
    with pytest.raises(RetryableError, match="^r.example: "):
        next(found)


def test_a_body_is_a_text_of_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: List[Any] = []
    monkeypatch.setattr(room, "limit_reads", lambda raw, until: limits.append((raw, until)))
    monkeypatch.setattr(room.time, "monotonic", lambda: 50.0)
    monkeypatch.setattr(room, "MAX_API_BYTES", 4)
    whole = response(b"a\xff", b"bc")
    assert limited_body(whole, URL) == "a\ufffdbc"
    assert limits == [(whole.raw._fp, 50.0 + room.API_ANSWER_S)]
    with pytest.raises(NetworkError) as told:
        limited_body(response(b"ab", b"cde"), URL)
    assert told.value.what == "the answer of r.example is too large to be a Hub's"
    assert told.value.why == "5 B"


# -- waits


@pytest.mark.parametrize(
    ("status", "asked_s", "held"),
    [
        *((status, None, None) for status in (408, 425, 500, 502, 503, 504)),
        (503, 7.0, None),
        (429, 7.0, 7.0),
        (429, LONGEST_HOLD_S, LONGEST_HOLD_S),
        (429, None, "as after five failures"),
        (500, 7.0, None),
    ],
)
def test_what_may_pass(
    status: int, asked_s: Optional[float], held: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: Dict[str, str] = {"Retry-After": f"{asked_s:.0f}"} if asked_s is not None else {}
    asked = ScriptedRegistry((status, headers, b"x"))
    holds: List[Any] = []
    monkeypatch.setattr(
        asked.client.gate, "hold", lambda seconds, why: holds.append((seconds, why))
    )
    monkeypatch.setattr(room, "backoff", lambda failures: {5: "as after five failures"}[failures])
    with pytest.raises(RetryableError) as told:
        asked.client.exchange(URL)
    assert told.value.wait_s == (asked_s if status in (429, 503) else None)
    why = "r.example answered 429 (too many requests)"
    assert holds == ([(held, why)] if held else []) and asked.session.unread == 0


def test_a_wait_that_is_too_long_ends_the_run() -> None:
    asked = ScriptedRegistry((503, {"Retry-After": f"{LONGEST_HOLD_S + 1:.0f}"}, b"x"))
    with pytest.raises(NetworkError) as told:
        asked.client.exchange(URL)
    assert told.value.what == "r.example takes no requests for 10m01s"
    assert told.value.why == "r.example answered 503" and "again in 10m01s" in told.value.next_step


# -- forks


def test_a_forked_reader_speaks_through_its_parent() -> None:
    asked = ScriptedRegistry(OK)
    sent: List[Any] = []
    twin = asked.client.forked(ParentProxy(sent.append))
    assert twin.get(URL, {}).status_code == 200 and twin.reporter is twin.gate
    twin.reporter.info("a line")
    twin.gate.hold(7.0, "why")
    assert [type(one) for one in sent] == [LineMessage, HoldMessage]
    held: List[Any] = []
    asked.client.gate.hold = lambda *words: held.append(words)  # type: ignore[method-assign]
    asked.client.receive(HoldMessage(7.0, "why"))
    asked.client.receive(LineMessage("a line", is_detail=False))
    asked.client.receive(LineMessage("a detail", is_detail=True))
    assert held == [(7.0, "why")] and "a line" in asked.err.getvalue()
    asked.reporter.adjust("plain", 0)
    asked.client.receive(LineMessage("another detail", is_detail=True))
    assert "a detail" in asked.err.getvalue() and "another" not in asked.err.getvalue()


def test_forks_share_no_connection_and_parse_no_certificates() -> None:
    asked = ScriptedRegistry()
    done: List[str] = []

    def missing() -> None:
        done.append("read")
        raise FileNotFoundError

    session: Any = SimpleNamespace(close=lambda: done.append("close"), read_cas=missing)
    asked.client._session = session
    asked.client.prepare_forks()
    assert done == ["close", "read"]


def test_secrets_of_the_login_are_shown_nowhere() -> None:
    asked = ScriptedRegistry(login=RegistryLogin("u", "pass word", "", "f"))
    asked.reporter.info("it is pass word")
    assert "pass word" not in asked.err.getvalue()
    assert asked.client.authorization == "" and asked.client.proxies is asked.client._proxies
