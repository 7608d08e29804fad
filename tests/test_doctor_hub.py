# SPDX-License-Identifier: Apache-2.0
"""What each probe of the way to a Hub says, from answers made by hand; test_doctor.py has real Hubs."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Union

import pytest

from hfship.base.errors import AuthError, HfshipError, HostError, NetworkError, NotFoundError
from hfship.base.manifest import Source
from hfship.base.report import Reporter
from hfship.base.settings import Token, load_settings
from hfship.base.values import replace
from hfship.hub.protocol import RemoteFile, Snapshot
from hfship.hub.transport import ApiAnswer
from hfship.ops import doctor_hub
from hfship.ops.doctor_hub import HubDoctor
from hfship.ops.probe import Finding, ProbeWarning

NOW = 1_700_000_000.0
COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
SOURCE = Source("https://hub", "org/m", "main", "org/m", COMMIT)
SNAPSHOT = Snapshot(SOURCE, (RemoteFile("a", 500, "e"), RemoteFile("b", 1500, "e")))


def doctor(endpoint: str = "https://hub", repo: Any = ("org/m", None), **known: Any) -> Any:
    settings = load_settings({}, endpoint)
    made = HubDoctor(settings, repo, ["https://mirror"], Reporter("none", -1))
    for name, value in known.items():
        setattr(made, f"_{name}", value)
    return made


def said(probe: Callable[..., str], *words: Any) -> str:
    """What a probe says: its text, `warn: TEXT | STEP`, or the error."""
    try:
        return probe(*words)
    except ProbeWarning as exc:
        return f"warn: {exc.text} | {exc.next_step}"
    except HfshipError as exc:
        return f"{type(exc).__name__}: {exc.what} | {exc.why} | {exc.next_step}"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfship.ops.doctor_hub.time.time", lambda: NOW)


@pytest.mark.parametrize(
    ("ahead_s", "expected"),
    [
        (0, "0 s behind"),
        (60, "60 s ahead"),
        (-60, "60 s behind"),
        (61, "warn: 61 s ahead | set the clock: timedatectl, chronyc"),
        (-900, "warn: 900 s behind | set the clock: timedatectl, chronyc"),
        (901, "HostError: the clock is 901 s ahead |  | set the clock: timedatectl, chronyc"),
        (None, "warn: the Hub does not tell the time | "),
    ],
)
def test_the_clock_is_compared_with_the_hubs(ahead_s: Optional[int], expected: str) -> None:
    date = "" if ahead_s is None else formatdate(NOW - ahead_s, usegmt=True)
    answer = ApiAnswer(200, {"Date": date}, "{}")
    assert said(doctor(answer=answer)._probe_clock) == expected


TOKEN = Token("hf_x", "file /t")


@pytest.mark.parametrize(
    ("token", "status", "body", "expected"),
    [
        (None, 0, "", "none: enough for public repositories"),
        (TOKEN, 401, "", "AuthError: the Hub refuses the token | from file /t"),
        (TOKEN, 403, "", "AuthError: the Hub refuses the token | from file /t"),
        (TOKEN, 404, "", "from file /t; this Hub has no accounts"),
        (TOKEN, 200, "[]", "warn: from file /t; this Hub does not say whose it is | "),
        (TOKEN, 200, '{"name": "me"}', "of me, from file /t"),
        (
            TOKEN,
            200,
            '{"name": "me", "auth": {"accessToken": {"role": "read"}}}',
            "of me, from file /t, may read",
        ),
        (TOKEN, 200, '{"name": "me", "auth": "x"}', "of me, from file /t"),
        (TOKEN, 200, f'{{"name": "{"n" * 200}"}}', f"of {'n' * 100}, from file /t"),
    ],
)
def test_whose_token_it_is(token: Any, status: int, body: str, expected: str) -> None:
    def exchange(url: str) -> ApiAnswer:
        assert url == "https://hub/api/whoami-v2"
        return ApiAnswer(status, {}, body)

    found = said(doctor(token=token, client=SimpleNamespace(exchange=exchange))._probe_token)
    assert found.startswith(expected)
    if status in (401, 403):
        assert found.endswith("| put a valid token into file /t, or remove it")
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("repo", "answer", "expected"),
    [
        (("org/m", None), SNAPSHOT, f"org/m: 2 files, 2.0 kB, commit {COMMIT[:12]}"),
        (
            ("org/m", "v1"),
            replace(SNAPSHOT, source=replace(SOURCE, gated=True)),
            f"org/m: gated, access granted; 2 files, 2.0 kB, commit {COMMIT[:12]}",
        ),
        (("org/m", None), NotFoundError("no such", "", ""), "NotFoundError: no such |  | "),
        (("org/m", None), AuthError("gated", "", ""), "AuthError: gated |  | "),
        (
            None,
            NotFoundError("no such", "", ""),
            "warn: no openai-community/gpt2 here to try | hfship doctor ORG/NAME",
        ),
        (None, NetworkError("gone", "", ""), "NetworkError: gone |  | "),
    ],
)
def test_whether_a_repository_may_be_read(
    repo: Any, answer: Union[Snapshot, HfshipError], expected: str
) -> None:
    def snapshot(name: str, revision: Any) -> Snapshot:
        assert (name, revision) == (repo or ("openai-community/gpt2", None))
        if isinstance(answer, HfshipError):
            raise answer
        return answer

    made = doctor(repo=repo, client=SimpleNamespace(snapshot=snapshot))
    assert said(made._probe_repository) == expected
    assert made._snapshot is (answer if isinstance(answer, Snapshot) else None)


@pytest.mark.parametrize("snapshot", [None, replace(SNAPSHOT, files=())])
def test_without_files_no_speed_is_measured(snapshot: Any) -> None:
    expected = "warn: not measured | hfship doctor ORG/NAME"
    assert said(doctor(snapshot=snapshot)._probe_speed) == expected


def test_the_speed_is_that_of_the_largest_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Address:
        def __init__(self, client: Any, transfer: Any, endpoint: str) -> None:
            assert (transfer.remote.path, endpoint) == ("b", "https://hub")

        def open(self, start: int, stop: int) -> Any:
            assert (start, stop) == (0, 1500)
            return self

        def __enter__(self) -> Any:
            return SimpleNamespace(url="https://cdn/x")

        def __exit__(self, *_: object) -> None:
            return None

    times = iter([0.0, 0.1, 0.2, 0.5])
    monkeypatch.setattr("hfship.ops.doctor_hub.time.monotonic", lambda: next(times))
    monkeypatch.setattr("hfship.ops.doctor_hub.FileAddress", Address)
    monkeypatch.setattr("hfship.ops.doctor_hub.pieces", lambda _: [bytes(700), bytes(800)])
    client = SimpleNamespace(endpoint="https://hub")
    made = doctor(client=client, snapshot=SNAPSHOT)
    assert made._probe_speed() == "3.0 kB/s over one connection from cdn"


@pytest.mark.parametrize(
    ("hub_commit", "expected"),
    [
        (COMMIT, f"7 ms, 3.0 kB/s, commit {COMMIT[:12]}"),
        (None, f"7 ms, 3.0 kB/s, commit {COMMIT[:12]}"),
        (
            OTHER,
            f"warn: 7 ms, 3.0 kB/s; commit {COMMIT[:12]}, the Hub has {OTHER[:12]}"
            " | what it has is older: fetch asks the Hub for the rest",
        ),
    ],
)
def test_a_mirror_is_compared_with_the_hub(
    hub_commit: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = SimpleNamespace(snapshot=lambda *_: SNAPSHOT)
    made = doctor(
        client_of=lambda settings: client if settings.endpoint == "https://mirror" else None,
        ask_for_revision=lambda _: (None, 7.0),
    )
    if hub_commit:
        made._snapshot = replace(SNAPSHOT, source=replace(SOURCE, commit=hub_commit))
    monkeypatch.setattr("hfship.ops.doctor_hub._measure", lambda *_: ("h", 3000.0))
    assert said(made._probe_mirror, "https://mirror") == expected


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ("{}", {}, "https://hub answers in 7 ms"),
        ("", {"X-Error-Code": "RepoNotFound"}, "https://hub answers in 7 ms"),
        ("<html>", {"Content-Type": "text/html"}, "it sends text/html"),
        ("", {}, "it sends nothing"),
    ],
)
def test_what_answers_is_a_hub(
    body: str, headers: Dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.ops.doctor_hub.find_token", lambda _: TOKEN)
    answer = ApiAnswer(200, headers, body)
    made = doctor(client_of=lambda _: "client", ask_for_revision=lambda _: (answer, 7.0))
    assert expected in said(made._probe_hub)
    assert made._token is TOKEN and made._client == "client"
    if "answers" in expected:
        assert made._answer is answer


def test_the_first_question_is_that_of_a_fetch() -> None:
    asked: List[str] = []
    client = SimpleNamespace(endpoint="https://hub", exchange=asked.append)
    for revision in (None, "v1"):
        doctor(repo=("org/m", revision))._ask_for_revision(client)
    assert asked == [f"https://hub/api/models/org/m/revision/{one}" for one in ("main", "v1")]


@pytest.mark.parametrize(
    ("proxy", "found", "expected"),
    [
        ("p", [], "left to the proxy"),
        (None, ["10.0.0.2", "10.0.0.1", "10.0.0.1"], "hub is 10.0.0.1, 10.0.0.2"),
        (None, None, "NetworkError: hub has no address | unknown |"),
    ],
)
def test_the_address_of_the_hub(
    proxy: Any, found: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(host: str, port: int, type: int) -> List[Any]:
        assert (host, port) == ("hub", 443)
        if found is None:
            raise socket.gaierror(-2, "unknown")
        return [(0, 0, 0, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert said(doctor(proxy=proxy)._probe_dns).startswith(expected)


@pytest.mark.parametrize(
    ("days", "public", "expected"),
    [
        (90, True, "signed by CA, for 90 more days"),
        (14, True, "signed by CA, for 14 more days"),
        (13, True, "warn: signed by CA, for 13 more days | the owner of the Hub must renew it"),
        (
            90,
            False,
            "warn: signed by CA, for 90 more days; no public CA: an own Hub, or a proxy that opens"
            " TLS (SSL_CERT_FILE) | right if your site does so",
        ),
    ],
)
def test_who_vouches_for_the_hub(
    days: int, public: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def certificate(bundle: str) -> Any:
        if bundle != "/site.pem" and not public:
            raise ssl.SSLCertVerificationError("unknown")
        return SimpleNamespace(issuer="CA", days_left=lambda now: days if now == NOW else 0)

    monkeypatch.setenv("SSL_CERT_FILE", "/site.pem")
    monkeypatch.setattr("hfship.ops.doctor_hub.ca_variable", lambda _: "SSL_CERT_FILE")
    monkeypatch.setattr("hfship.ops.doctor_hub.context_of", lambda bundle: bundle)
    assert said(doctor(certificate=certificate)._probe_tls) == expected
    plain = said(doctor("http://hub")._probe_tls)
    assert plain == "warn: not encrypted: a token can be read on the way | use https, or no token"


@pytest.mark.parametrize(
    ("states", "seen"),
    [
        (["ok"] * 8, 8),
        (["fail"], 1),
        (["ok", "ok", "ok", "fail"], 4),
        (["ok", "ok", "ok", "ok", "fail", "fail", "fail", "fail"], 8),  # these need not be well
        (["warn", "ok", "warn"] + ["ok"] * 5, 8),
    ],
)
def test_probes_end_where_they_make_no_sense_but_mirrors_are_asked(
    states: List[str], seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([*states, "ok"])
    monkeypatch.setattr(
        doctor_hub.Probe, "run", lambda probe, _: Finding(probe.check, next(left), "")
    )
    names = [found.check for found in doctor().findings()]
    known = ["proxy", "dns", "tls", "hub", "clock", "token", "repository", "speed"]
    assert names == [*known[:seen], "mirror https://mirror"]
    assert HostError("x", "", "").code == 9


@pytest.mark.parametrize(
    ("proxy", "answers", "expected"),
    [
        (None, True, "none"),
        ("http://me:secret@10.0.0.9:3128", True, "10.0.0.9:3128 takes connections"),
        ("http://10.0.0.9:3128", False, "refused"),
    ],
)
def test_a_proxy_takes_connections(
    proxy: Any, answers: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: List[Any] = []

    @contextlib.contextmanager
    def connect(address: Any, timeout: float) -> Any:
        called.append((address, timeout))
        if not answers:
            raise ConnectionRefusedError("refused")
        yield
        called.append("closed")

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setattr(socket, "create_connection", connect)
    made = doctor()
    if answers:
        assert made._probe_proxy() == expected
    else:
        with pytest.raises(ConnectionRefusedError):
            made._probe_proxy()
    place = (("10.0.0.9", 3128), doctor_hub.PROBE_TIMEOUT_S)
    assert called == ([] if not proxy else [place, "closed"] if answers else [place])
    assert bool(made._proxy) == bool(proxy)


def test_a_certificate_that_is_not_believed_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ssl.SSLCertVerificationError("unknown")
    refused.verify_message = "self-signed certificate"
    believed: Any = SimpleNamespace(der=b"der")

    def certificate(context: Any) -> Any:
        if context == "credulous":
            return believed
        if context == "context of /none.pem":
            raise FileNotFoundError(2, "no such file")
        if context == "context of /site.pem":
            return "certificate"
        raise refused

    monkeypatch.setattr(doctor_hub, "context_of", lambda bundle: f"context of {bundle}")
    monkeypatch.setattr(doctor_hub, "credulous_context", lambda: "credulous")
    monkeypatch.setattr(doctor_hub, "describe", lambda der, s: f"{der!r} in {s:.0f} s")
    made = doctor(certificate=certificate)
    assert made._believed_certificate("/site.pem", "SSL_CERT_FILE") == "certificate"
    found = said(made._believed_certificate, "/other.pem", "")
    assert found.startswith("NetworkError: b'der' in 5 s: self-signed certificate |  | ")
    assert found.endswith(doctor_hub.tls_error("https://hub", refused, os.environ).next_step)
    expected = "NetworkError: the CA bundle cannot be read | /none.pem | correct SSL_CERT_FILE"
    assert said(made._believed_certificate, "/none.pem", "SSL_CERT_FILE") == expected


def test_the_certificate_is_asked_for_by_the_way_that_a_fetch_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Way:
        def __init__(self, *way: Any) -> None:
            self.way = way

        def certificate(self, *asked: Any) -> Any:
            return (*self.way, *asked)

    monkeypatch.setattr(doctor_hub, "Route", Way)
    found = doctor("https://hub:8443", proxy="proxy")._certificate("context")
    assert found == ("hub", 8443, "proxy", "context", doctor_hub.PROBE_TIMEOUT_S)


@pytest.mark.parametrize(
    ("owner", "role"),
    [
        ({"auth": {"accessToken": {"role": "write"}}}, "write"),
        ({"auth": {"accessToken": {"role": "r" * 200}}}, "r" * 100),
        ({"auth": {"accessToken": {"role": None}}}, ""),
        ({"auth": {"accessToken": {}}}, ""),
        ({"auth": {"accessToken": "x"}}, ""),
        ({"auth": None}, ""),
        ({}, ""),
    ],
)
def test_what_a_token_may_do(owner: Any, role: str) -> None:
    assert doctor_hub._role_of(owner) == role


def test_probes_have_the_time_that_they_need() -> None:
    probes = {probe.check: probe for probe in doctor()._hub_probes()}
    assert [name for name, probe in probes.items() if probe.required] == [
        "proxy",
        "dns",
        "tls",
        "hub",
    ]
    slow = [name for name, probe in probes.items() if probe.limit_s > doctor_hub.PROBE_TIMEOUT_S]
    assert slow == ["repository", "speed"]


def test_the_client_of_a_probe_says_nothing_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    made: List[Any] = []
    monkeypatch.setattr(doctor_hub, "HubClient", lambda *given, **more: made.append((given, more)))
    settings = load_settings({}, "https://mirror")
    doctor(token=TOKEN)._client_of(settings)
    (((where, token, reporter), more),) = made
    assert (where, token) == (settings, TOKEN)
    assert (reporter.verbosity, more["connections"]) == (-1, doctor_hub.CONNECTIONS)
    assert not more["stop"].is_set()


def test_a_measurement_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Address:
        def __init__(self, *_: Any) -> None:
            pass

        @contextlib.contextmanager
        def open(self, start: int, stop: int) -> Any:
            assert (start, stop) == (0, doctor_hub.PROBE_BYTES)
            yield SimpleNamespace(url="https://cdn/x")

    times = iter([0.0, 2.0, 5.0, 5.1, 5.5])
    monkeypatch.setattr("hfship.ops.doctor_hub.time.monotonic", lambda: next(times))
    monkeypatch.setattr("hfship.ops.doctor_hub.FileAddress", Address)
    monkeypatch.setattr("hfship.ops.doctor_hub.pieces", lambda _: [bytes(110)] * 9)
    huge = replace(SNAPSHOT, files=(RemoteFile("w", 1 << 40, "e"),))
    client: Any = SimpleNamespace(endpoint="https://hub")
    assert doctor_hub._measure(client, huge) == ("cdn", 60.0)
