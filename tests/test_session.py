# SPDX-License-Identifier: Apache-2.0
"""Sessions: heads of answers that do not come, of which test_hostile_hub.py has servers, how much
may wait in the kernel, who is shown a login, and what urllib3 is asked for."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from hfship import __version__
from hfship.base.errors import HostError
from hfship.base.settings import Token
from hfship.hub import session
from hfship.hub.protocol import CONNECT_TIMEOUT_S, READ_TIMEOUT_S
from hfship.hub.session import (
    Answer,
    Authorization,
    HubSession,
    Login,
    PromptResponse,
    Request,
    bound_window,
    ca_bundle,
    carried_cas,
    limit_reads,
    netrc_login,
    tls_context,
    with_newer_python,
)

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"


@pytest.fixture
def wire() -> Iterator[Tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = [100.0]
    monkeypatch.setattr("hfship.hub.session.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("late_s", "comes"), [(0.0, True), (1.0, False)])
def test_a_head_has_to_come_in_time(late_s: float, comes: bool, wire: Any, clock: Any) -> None:
    ours, theirs = wire
    theirs.sendall(HEAD)
    answer = PromptResponse(ours)
    clock[0] += session.HEAD_S + late_s
    if comes:
        answer.begin()
        assert answer.status == 200
    else:
        with pytest.raises(TimeoutError, match="takes too long"):
            answer.begin()


def test_a_body_may_take_longer(wire: Any, clock: Any) -> None:
    ours, theirs = wire
    theirs.sendall(HEAD)
    answer = PromptResponse(ours)
    answer.begin()
    clock[0] += 10 * session.HEAD_S
    theirs.sendall(b"body")
    assert answer.read() == b"body"


def test_a_limit_is_lifted_and_an_answer_without_a_body_has_none(wire: Any, clock: Any) -> None:
    ours, theirs = wire
    theirs.sendall(HEAD)
    answer = PromptResponse(ours)
    limit_reads(answer, clock[0] - 1)
    with pytest.raises(TimeoutError):
        answer.fp.read(1)
    limit_reads(answer, None)
    assert answer.fp.read(1) == b"H"
    answer.close()
    limit_reads(answer, clock[0])


# -- how much may wait in the kernel


class Flood(BaseHTTPRequestHandler):
    """Sends more than anybody reads."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 20))


@pytest.fixture
def flood() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Flood) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        thread.join()


def test_over_a_short_line_little_waits_for_a_slow_reader(flood: str) -> None:
    """Left alone, the kernel takes megabytes, which a kill loses."""
    opened = HubSession(lambda request: request, 1, {})
    with opened.request("GET", flood, {}) as answer:
        wire = answer.raw._fp.fp.raw._sock
        for _ in range(64):  # as a reader takes more, the kernel makes more room
            assert answer.raw.read(1 << 20)
        assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * session.SHORT_LINE_WINDOW


@pytest.mark.parametrize(
    ("microseconds", "bounded"), [(0, False), (30, True), (500, True), (501, False)]
)
def test_over_a_long_line_the_kernel_takes_what_it_can(
    microseconds: int, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfship.hub.session.round_trip_us", lambda _: microseconds)
    with socket.socket() as wire:
        before = wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        bound_window(wire)
        after = wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert (after != before) == bounded


# -- who we are


def authorization(
    token: str = "", endpoint: str = "https://hub.site/below", **env: str
) -> Authorization:
    """What logs in at a Hub, with a token if there is one."""
    return Authorization(Token(token, "env X") if token else None, endpoint, env)


NETRC = "machine hub.site login me password geheim\nmachine other login you password yours\n"
BASIC = "Basic " + base64.b64encode(b"me:geheim").decode()


@pytest.fixture
def netrc(tmp_path: Path) -> Dict[str, str]:
    """An environment that names a netrc."""
    path = tmp_path / "netrc"
    path.write_text(NETRC)
    path.chmod(0o600)
    return {"NETRC": str(path)}


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://hub.site/x", True),
        ("https://HUB.site:443/x", True),
        ("https://hub.site:8443/x", False),
        ("http://hub.site/x", False),
        ("https://cdn.hub.site/x", False),
    ],
)
def test_a_token_is_shown_to_the_origin_of_the_hub_alone(url: str, shown: bool) -> None:
    """And what a caller set goes nowhere."""
    for token, header in (("hf_x", "Bearer hf_x"), ("", "")):
        request = Request(url, {"Authorization": "stale", "Range": "bytes=0-1"})
        assert authorization(token)(request) is request
        expected = {"Authorization": header} if shown and header else {}
        assert request.headers == {"Range": "bytes=0-1", **expected}


@pytest.mark.parametrize(
    "token, url, challenge, answered",
    [
        ("", "https://hub.site/x", 'Basic realm="x"', True),
        ("", "https://hub.site/x", "", True),
        ("", "https://hub.site/x", "Bearer", False),
        ("hf_x", "https://hub.site/x", 'Basic realm="x"', True),
        ("hf_x", "https://hub.site/x", "", False),
        ("hf_x", "https://hub.site/x", "Bearer", False),
        ("", "https://cdn.site/x", "Basic", False),
        ("", "http://hub.site/x", "Basic", False),
    ],
)
def test_a_login_is_shown_when_it_is_asked_for_and_once(
    token: str, url: str, challenge: str, answered: bool, netrc: Dict[str, str]
) -> None:
    login = authorization(token, **netrc)
    before = login.header
    assert login.answers(url, challenge) is answered
    assert login.header == (BASIC if answered else before)
    assert not login.answers(url, challenge)
    if answered:
        request = Request(url, {})
        login(request)
        assert request.headers == {"Authorization": BASIC}


def test_without_a_login_there_is_nothing_to_answer(netrc: Dict[str, str]) -> None:
    other = authorization("", endpoint="https://third", **netrc)
    assert other.login is None and not other.answers("https://third/x", "Basic")


@pytest.mark.parametrize("token", ["", "hf_x"])
def test_what_logs_in_is_secret(token: str, netrc: Dict[str, str]) -> None:
    known = [token] if token else []
    assert list(authorization(token, **netrc).secrets) == [*known, "geheim"]
    assert list(authorization(token, NETRC="/none").secrets) == known


def test_the_first_netrc_with_a_login_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, netrc: Dict[str, str]
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    monkeypatch.setattr(session, "NETRC_FILES", (str(first), str(second), str(third)))
    third.write_text(NETRC)
    for broken in ("machine", "machine hub.site login me\n", "machine other password x\n", "\xff"):
        second.write_bytes(broken.encode("latin-1"))
        assert netrc_login("hub.site", {"NETRC": ""}) == Login("me", "geheim")
    first.write_text("machine hub.site account acc password pw\n")
    assert netrc_login("hub.site", {}) == Login("acc", "pw")
    assert netrc_login("hub.site", netrc) == Login("me", "geheim")
    first.write_text("default login any password all\n")
    assert netrc_login("hub.site", {}) == Login("any", "all")
    assert netrc_login("hub.site", {"NETRC": str(tmp_path / "none")}) is None


# -- what is sent


class Manager:
    """Notes what urllib3 is asked for."""

    def __init__(self) -> None:
        self.asked: List[Any] = []
        self.cleared = 0

    def urlopen(self, method: str, url: str, **options: Any) -> Any:
        self.asked.append((method, url, options))
        return SimpleNamespace(status=201, headers={"X": "y"})

    def clear(self) -> None:
        self.cleared += 1


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    "data, body, more",
    [
        (None, None, {}),
        ({"a": "b c", "d": "1"}, "a=b+c&d=1", {"Content-Type": FORM}),
        (b"bytes", b"bytes", {}),
        ("text", "text", {}),
        ([1, 2, 3], [1, 2, 3], {"Content-Length": "3"}),
    ],
)
def test_what_a_request_sends(
    data: Any, body: Any, more: Dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager()
    monkeypatch.setattr(HubSession, "_new_manager", lambda *_: manager)
    seen: List[Request] = []
    opened = HubSession(seen.append, 1, {})
    answer = opened.request("POST", "https://hub/x", {"Accept": "text/html", "Range": "r"}, data)
    ((method, url, options),) = manager.asked
    assert (method, url, seen[0].url) == ("POST", "https://hub/x", "https://hub/x")
    assert options.pop("headers") == {
        "User-Agent": f"hfship/{__version__}",
        "Accept-Encoding": "identity",
        "Accept": "text/html",
        "Range": "r",
        **more,
    }
    timeout = options.pop("timeout")
    assert (timeout.connect_timeout, timeout.read_timeout) == (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
    assert options.pop("body") == body
    assert set(options.values()) == {False} and sorted(options) == [
        "assert_same_host",
        "decode_content",
        "preload_content",
        "redirect",
        "retries",
    ]
    assert (answer.url, answer.status_code, answer.headers) == ("https://hub/x", 201, {"X": "y"})
    assert answer.request is seen[0]
    opened.request("GET", "https://hub/y", {})
    assert manager.asked[1][2]["headers"]["Accept"] == "*/*"
    opened.close()
    assert manager.cleared == 1


PROXY = SimpleNamespace(url="http://proxy:3128", scheme="http", headers={"Proxy-X": "y"})
TLS_PROXY = SimpleNamespace(url="https://proxy:3129", scheme="https", headers={})


def test_connections_are_kept_by_proxy_and_whether_they_are_encrypted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: List[Any] = []
    contexts: List[Any] = []

    def of_kind(name: str) -> Any:
        def make(*arguments: Any, **options: Any) -> Any:
            made.append((name, arguments, options))
            return SimpleNamespace(clear=lambda: None)

        return make

    def context(bundle: str, more: Any) -> str:
        contexts.append((bundle, more))
        return "CONTEXT"

    monkeypatch.setattr(session, "tls_context", context)
    opened = HubSession(lambda request: request, 6, {"REQUESTS_CA_BUNDLE": "/ca"}, iter(["/more"]))
    opened._urllib3 = SimpleNamespace(PoolManager=of_kind("pool"), ProxyManager=of_kind("proxy"))
    managers = [
        opened._manager(url, proxy)  # type: ignore[arg-type]
        for url in ("http://a/x", "https://a/x", "HTTPS://b/y")
        for proxy in (None, PROXY, TLS_PROXY)
    ]
    assert managers[3:6] == managers[6:] and len(made) == 6
    assert contexts == [("/ca", ("/more",))]  # one for all
    kept = {"num_pools": 8, "maxsize": 8}
    secure = {"ssl_context": "CONTEXT", "cert_reqs": "CERT_REQUIRED"}
    to_proxy, to_tls_proxy = ("http://proxy:3128",), ("https://proxy:3129",)
    over_tls = {"proxy_ssl_context": "CONTEXT"}
    assert made == [
        ("pool", (), kept),
        ("proxy", to_proxy, {**kept, "proxy_headers": {"Proxy-X": "y"}}),
        ("proxy", to_tls_proxy, {**kept, **over_tls, "proxy_headers": {}}),
        ("pool", (), {**kept, **secure}),
        ("proxy", to_proxy, {**kept, **secure, "proxy_headers": {"Proxy-X": "y"}}),
        ("proxy", to_tls_proxy, {**kept, **secure, **over_tls, "proxy_headers": {}}),
    ]
    for manager in managers:
        pools = manager.pool_classes_by_scheme
        for scheme in ("http", "https"):
            assert pools[scheme].ConnectionCls.response_class is PromptResponse


@pytest.mark.parametrize("left, kept", [(0, True), (16 << 10, True), (16385, False), (None, False)])
def test_a_connection_is_kept_where_little_is_left_to_read(left: Any, kept: bool) -> None:
    done: List[str] = []
    raw = SimpleNamespace(
        status=302,
        headers={},
        length_remaining=left,
        _fp=SimpleNamespace(fp=SimpleNamespace()),
        drain_conn=lambda: done.append("drain"),
        close=lambda: done.append("close"),
        release_conn=lambda: done.append("release"),
    )
    Answer(Request("https://hub/x", {}), raw).pass_over()
    assert done == [*(["drain"] if kept else []), "close", "release"]
    done.clear()
    with Answer(Request("https://hub/x", {}), raw) as answer:
        assert answer.raw is raw
    assert done == ["close", "release"]


def test_what_is_passed_over_has_to_come_in_time(clock: Any) -> None:
    class Raw:
        """What is below the stream of an answer."""

        def readinto(self, buffer: bytes) -> int:
            return len(buffer)

    raw = Raw()
    fp = SimpleNamespace(fp=SimpleNamespace(raw=raw))
    calls = SimpleNamespace(
        status=302,
        headers={},
        length_remaining=1,
        _fp=fp,
        close=lambda: None,
        release_conn=lambda: None,
    )

    def drain() -> None:
        clock[0] += session.HEAD_S
        assert raw.readinto(b"x") == 1
        clock[0] += 1
        with pytest.raises(TimeoutError):
            raw.readinto(b"x")

    calls.drain_conn = drain
    Answer(Request("https://hub/x", {}), calls).pass_over()


# -- what is needed for it


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_authorities_lie_in_a_file_or_a_folder(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    made = SimpleNamespace(load_verify_locations=lambda cafile: asked.append(cafile))

    def create(**options: Any) -> Any:
        asked.append(options)
        return made

    monkeypatch.setattr(ssl, "create_default_context", create)
    bundle = str(tmp_path if is_folder else tmp_path / "x")
    assert tls_context(bundle, ["/a", "/b"]) is made
    assert asked == [{"capath" if is_folder else "cafile": bundle}, "/a", "/b"]


def test_which_authorities_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ca_bundle({"REQUESTS_CA_BUNDLE": "/of/site"}) == "/of/site"
    assert ca_bundle({}) == carried_cas() != ""


def test_an_old_python_is_told_which_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"python3.12", "python3.11", "python3.9"}
    monkeypatch.setattr(sys, "argv", ["hfship.pyz", "fetch", "org/a b"])
    monkeypatch.setattr(session.shutil, "which", lambda name: name if name in there else None)
    assert with_newer_python() == "python3.12 hfship.pyz fetch 'org/a b'"
    for newest, oldest in (("python3.20", "python3.12"), ("python3.10", "python3.9")):
        there.clear()
        there.update({newest, oldest})
        assert with_newer_python().startswith(newest)
    there.clear()
    there.update({"python3.21", "python3.9", "python3"})
    assert with_newer_python() == "run it with a newer python3; none is on PATH"
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(HostError, match=r"Python 3.10 or newer") as caught:
        session.import_urllib3()
    assert caught.value.why == "this is Python 3.9"
    assert caught.value.next_step.startswith("run it with a newer python3")
    monkeypatch.setattr(sys, "version_info", (3, 10, 0, "final", 0))
    assert session.import_urllib3().__name__ == "urllib3"
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(HostError, match="urllib3 is not importable") as caught:
        session.import_urllib3()
    assert "urllib3" in caught.value.why and "hfship.pyz" in caught.value.next_step


def test_carried_certificates_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a pyz that has them, and nobody loaded certifi before."""
    asked: List[str] = []

    def entry(name: str) -> bytes:
        asked.append(name)
        return b"CERTIFICATES"

    loaded = SimpleNamespace(where=lambda: "/of/the/system")
    monkeypatch.setitem(sys.modules, "certifi", loaded)
    monkeypatch.setattr(session, "own_entry", entry)
    assert carried_cas() == "/of/the/system"
    monkeypatch.delitem(sys.modules, "certifi")
    path = carried_cas()
    assert re.fullmatch(r"/proc/self/fd/\d+", path) and set(asked) == {"vendor/certifi/cacert.pem"}
    assert Path(path).read_bytes() == b"CERTIFICATES"
    assert not os.get_inheritable(int(path.rpartition("/")[2]))
    os.close(int(path.rpartition("/")[2]))
    monkeypatch.delitem(sys.modules, "certifi")
    monkeypatch.delattr(os, "memfd_create")
    assert os.path.isfile(carried_cas()) and "/proc/" not in carried_cas()


def test_where_the_kernel_tells_no_round_trip_nothing_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: List[int] = []

    def sockopt(_level: int, _name: int, size: int) -> bytes:
        asked.append(size)
        return bytes(68) + (1 << 20).to_bytes(4, sys.byteorder)

    told = SimpleNamespace(getsockopt=sockopt)
    assert session.round_trip_us(told) == 1 << 20  # type: ignore[arg-type]
    assert asked == [72]
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire = socket.create_connection(server.getsockname())
    with wire:
        assert 0 < session.round_trip_us(wire) < 10_000_000
        monkeypatch.delattr(socket, "TCP_INFO")
        assert session.round_trip_us(wire) == 0
    closed = socket.socket()
    closed.close()
    assert bound_window(closed) is closed
