"""Proxies: one parser for all their spellings, a login that is shown nowhere, and what their refusals mean."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Optional

import pytest

from conftest import Program, program
from hfship.base.errors import UsageError
from hfship.base.proxies import Proxies, login_error, parse_proxy, tells_no_login
from hfship.base.redaction import redact
from hfship.ops.jobs import new_record
from support.folders import same_files
from support.hub import FaultHub
from support.network import RawServer, answer

# spelling -> URL without login, user, password; None: the error names the variable
SPELLINGS: Dict[str, Any] = {
    "http://proxy:3128": ("http://proxy:3128", "", ""),
    "proxy:3128": ("http://proxy:3128", "", ""),
    "proxy": ("http://proxy:80", "", ""),
    "//proxy:3128": ("http://proxy:3128", "", ""),
    "HTTP://Proxy.Site:3128/": ("http://Proxy.Site:3128", "", ""),
    "https://proxy": ("https://proxy:443", "", ""),
    "  http://proxy:3128\r\n": ("http://proxy:3128", "", ""),
    "http://[::1]:3128": ("http://[::1]:3128", "", ""),
    "[fd00::1]:3128": ("http://[fd00::1]:3128", "", ""),
    "http://proxy:3128/path": ("http://proxy:3128", "", ""),
    "http://bob:pw12@proxy:3128": ("http://proxy:3128", "bob", "pw12"),
    "bob:pw12@proxy": ("http://proxy:80", "bob", "pw12"),
    "bob:pw12@proxy:3128": ("http://proxy:3128", "bob", "pw12"),
    "TOKEN12345@proxy": ("http://proxy:80", "TOKEN12345", ""),
    "http://TOKEN12345@proxy:3128": ("http://proxy:3128", "TOKEN12345", ""),
    "http://:pw12@proxy": ("http://proxy:80", "", "pw12"),
    "http://bob:p/w12@proxy:3128": ("http://proxy:3128", "bob", "p/w12"),
    "bob:/pw12/@proxy:3128": ("http://proxy:3128", "bob", "/pw12/"),
    "http://bob:p@ss:w12@proxy:3128": ("http://proxy:3128", "bob", "p@ss:w12"),
    "http://bob:p%40s%2Fs12@proxy:3128": ("http://proxy:3128", "bob", "p@s/s12"),
    "http://bob:p?w#12@proxy:3128": ("http://proxy:3128", "bob", "p?w#12"),
    "bob:p://w12@proxy:3128": ("http://proxy:3128", "bob", "p://w12"),
    "http://bob:pässwört@proxy": ("http://proxy:80", "bob", "pässwört"),
    "http://dom%5Cbob:密码密码@proxy": ("http://proxy:80", "dom\\bob", "密码密码"),
    "socks5://proxy:1080": None,
    "socks5h://bob:hunter22@proxy:1080": None,
    "ftp://proxy": None,
    "bob:hunter22": None,
    "http://proxy:hunter22": None,
    "http://proxy:99999": None,
    "http://proxy:0": None,
    "http://": None,
    "http:/proxy:3128": None,
    "http:proxy:3128": None,
    '"http://proxy:3128"': None,
    "http://TOKEN12345%40proxy:3128": None,
    "http://bob:hunter22@": None,
    "a b:3128": None,
    "http://[::1:3128": None,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_a_proxy(spelling: str) -> None:
    expected = SPELLINGS[spelling]
    if expected is None:
        with pytest.raises(UsageError) as refused:
            parse_proxy("HTTPS_PROXY", spelling)
        text = refused.value.text()
        assert "HTTPS_PROXY names no proxy" in text and "next" in text
        assert "hunter22" not in text and "TOKEN12345" not in text
        return
    proxy = parse_proxy("HTTPS_PROXY", spelling)
    assert (proxy.url, proxy.user, proxy.password) == expected
    assert not proxy.password or proxy.password not in repr(proxy) + proxy.url
    children = Proxies({"HTTPS_PROXY": spelling}).for_children()
    again = parse_proxy("https_proxy", children["https_proxy"])
    assert (again.url, again.user, again.password) == expected, "as other programs are told"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_login_of_a_proxy_is_in_no_record(spelling: str) -> None:
    record = json.dumps(asdict(new_record("f", ["fetch", "x"], False, {"HTTPS_PROXY": spelling})))
    expected = SPELLINGS[spelling]
    if expected is None or expected[1:] != ("", ""):
        assert not tells_no_login("HTTPS_PROXY", spelling)
        assert '"needs": ["HTTPS_PROXY"]' in record and '"env": {}' in record
    else:
        assert json.dumps(spelling) in record, "and one without a login is kept"


def test_variables_with_tokens_are_in_no_record() -> None:
    names = ("HF_HUB_TOKEN", "HF_HUB_API_KEY", "HF_HUB_SECRET", "HUGGINGFACE_TOKEN", "HF_TOKEN")
    env = dict.fromkeys(names, "hunter22")
    record = new_record("f", ["fetch", "x"], False, {**env, "HF_HUB_CACHE": "/c"})
    assert "hunter22" not in json.dumps(asdict(record)) and record.env == {"HF_HUB_CACHE": "/c"}


# environment -> what is asked for -> the variable that names its proxy, "" for none
CHOICES: Dict[str, Any] = {
    "by scheme": ({"http_proxy": "a", "https_proxy": "b"}, "https://hub", "https_proxy"),
    "upper case": ({"HTTPS_PROXY": "b"}, "https://hub", "HTTPS_PROXY"),
    "lower case wins": ({"HTTPS_PROXY": "b", "https_proxy": "c"}, "https://hub", "https_proxy"),
    "empty is none": ({"HTTPS_PROXY": "b", "https_proxy": ""}, "https://hub", ""),
    "blank is none": ({"https_proxy": " "}, "https://hub", ""),
    "for all": ({"ALL_PROXY": "b"}, "http://hub", "ALL_PROXY"),
    "of a CGI's client": ({"HTTP_PROXY": "b", "REQUEST_METHOD": "GET"}, "http://hub", ""),
    "no_proxy, name": ({"all_proxy": "b", "no_proxy": "x,hub"}, "http://hub", ""),
    "no_proxy, domain": ({"all_proxy": "b", "NO_PROXY": ".site"}, "http://a.hub.site", ""),
    "no_proxy, part of a name": ({"all_proxy": "b", "no_proxy": "ub"}, "http://hub", "all_proxy"),
    "no_proxy, star": ({"all_proxy": "b", "no_proxy": "*"}, "http://hub", ""),
    "no_proxy, port": ({"all_proxy": "b", "no_proxy": "hub:81"}, "http://hub", "all_proxy"),
    "no_proxy, network": ({"all_proxy": "b", "no_proxy": "10.0.0.0/8"}, "http://10.1.1.1", ""),
    "no_proxy, blanks": ({"all_proxy": "b", "no_proxy": "a , hub b"}, "http://hub", ""),
    "no_proxy, IPv6": ({"all_proxy": "b", "no_proxy": "::1"}, "http://[::1]:80/x", ""),
    "a wrong one not needed": ({"http_proxy": "socks5://x", "https_proxy": "b"}, "https://h", "https_proxy"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_which_proxy_is_asked(name: str) -> None:
    env, url, variable = CHOICES[name]
    proxy = Proxies(env).of(url)
    assert (proxy.variable if proxy else "") == variable


# environment -> what may be shown nowhere: the login as it was written, as a client sends it, and a
# password alone if it is long enough to be nothing else
SECRETS: Dict[str, Any] = {
    "no proxy": ({}, set()),
    "no login": ({"http_proxy": "proxy:3128"}, set()),
    "a login after a proxy without one": (
        {"http_proxy": "proxy:3128", "https_proxy": "http://bob:hunter22@proxy:3128"},
        {"http://bob:hunter22@proxy:3128", "bob:hunter22", "hunter22", "Basic Ym9iOmh1bnRlcjIy"},
    ),
    "a login before a proxy without one": (
        {"http_proxy": "bob:hunter22@proxy:3128", "all_proxy": "proxy:3128"},
        {"bob:hunter22@proxy:3128", "bob:hunter22", "hunter22", "Basic Ym9iOmh1bnRlcjIy"},
    ),
    "a token": (
        {"https_proxy": "TOKEN12345@proxy"},
        {"TOKEN12345@proxy", "TOKEN12345", "Basic VE9LRU4xMjM0NTo="},
    ),
    "a quoted password": (
        {"HTTPS_PROXY": "bob:p%40ssw0rd@proxy"},
        {"bob:p%40ssw0rd@proxy", "bob:p%40ssw0rd", "p@ssw0rd", "Basic Ym9iOnBAc3N3MHJk"},
    ),
    "a short password": ({"http_proxy": "bob:pw12@p"}, {"bob:pw12@p", "bob:pw12"}),
    "of another kind, with blanks": (
        {"all_proxy": " socks5://bob:hunter22@p:1 "},
        {"socks5://bob:hunter22@p:1", "bob:hunter22"},
    ),
    "no address": ({"http_proxy": "http://proxy:hunter22"}, {"http://proxy:hunter22"}),
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_is_shown_nowhere_of_proxies(name: str) -> None:
    env, secrets = SECRETS[name]
    assert set(Proxies(env).secrets) - {""} == secrets


REDACTED = [
    "https://TOKEN12345@hub/x",
    "http://bob:hunter22/x@proxy:3128",
    "x http://bob:hunter22@proxy y",
    "socks5://TOKEN12345@proxy",
]
KEPT = [
    "https://huggingface.co/org/m@v1",
    "http://host:8080/org/m@v1",
    "ssh://me@host",
    "bob@host:/data",
    "a:b@c",
]


@pytest.mark.parametrize("text", REDACTED + KEPT)
def test_logins_in_addresses_are_redacted_and_nothing_else(text: str) -> None:
    shown = redact(text)
    assert (shown == text) == (text in KEPT), shown
    assert "TOKEN12345" not in shown and "hunter22" not in shown


@pytest.mark.parametrize(
    "proxy, offered, words",
    [
        ("bob:hunter22@p:1", "", "it refuses the one in https_proxy"),
        ("p:1", "Basic realm=x", "https_proxy has none"),
        ("p:1", "NTLM", "it takes NTLM"),
        ("p:1", "Negotiate, NTLM", "it takes Negotiate, NTLM"),
        (None, "", "no variable names a proxy"),
    ],
)
def test_what_a_407_means(proxy: Optional[str], offered: str, words: str) -> None:
    error = login_error(parse_proxy("https_proxy", proxy) if proxy else None, offered)
    assert words in error.why and "USER:PASSWORD" in error.next_step and error.code == 4
    assert "hunter22" not in error.text()


# -- for real

SPELLED = ["http://{login}@{at}", "{login}@{at}", "http://{login}@{at}/", " {login}@{at}"]


@pytest.mark.parametrize("login", ["bob:hunter22", "TOKEN12345", "bob:hunter/22"])
@pytest.mark.parametrize("spelling", SPELLED)
def test_a_proxy_that_wants_another_login_is_asked_once(
    spelling: str, login: str, tmp_path: Path
) -> None:
    """The error is 4, at once, and the login is in no output, log or record."""
    hfship = program("source", tmp_path / "home")

    def refuse(_: str) -> bytes:
        return answer(b"who?", "407 Proxy Authentication Required", Proxy_Authenticate="Basic")

    with RawServer(refuse) as proxy:
        value = spelling.format(login=login, at=proxy.url[len("http://") :])
        for scheme in ("http", "https"):
            done = hfship(
                "fetch", "org/tiny", "--endpoint", f"{scheme}://hub.invalid", "-o", tmp_path,
                "-v", "--json", env={"ALL_PROXY": value}, code=4, timeout=30,
            )  # fmt: skip
            assert "wants a login" in done.stdout and "ALL_PROXY" in done.stdout
            assert_hidden(done.stdout + done.stderr, hfship, login)
    assert len(proxy.heads) == 2 and all("Proxy-Authorization: Basic" in h for h in proxy.heads)


def assert_hidden(text: str, hfship: Program, login: str) -> None:
    texts = [text]
    for folder, _, names in os.walk(hfship.home):
        texts += [(Path(folder) / name).read_text(errors="replace") for name in names]
    for secret in [*re.split("[:]", login)[-1:], login]:
        assert not any(secret in text for text in texts), secret


def test_a_proxy_without_scheme_is_used_and_logged_in_to(
    hub: FaultHub, published: Path, tmp_path: Path
) -> None:
    hfship = program("source", tmp_path / "home")
    hub.faults.direct = True
    at = hub.url[len("http://") :]
    hfship(
        "fetch", "org/tiny", "--endpoint", "http://hub.invalid", "-o", tmp_path,
        env={"http_proxy": f"bob:hunter/22@{at}"},
    )  # fmt: skip
    assert same_files(published, tmp_path / "tiny")
    for _, _, headers in hub.traffic.requests:
        assert headers["Proxy-Authorization"] == "Basic Ym9iOmh1bnRlci8yMg=="
    assert_hidden("", hfship, "bob:hunter/22")


@pytest.mark.parametrize("value", ["socks5://p:1080", "http://p:hunter22", "p:0"])
def test_a_proxy_that_cannot_be_used_is_named_by_its_variable(value: str, tmp_path: Path) -> None:
    hfship = program("source", tmp_path / "home")
    done = hfship(
        "fetch", "org/tiny", "--endpoint", "http://hub.invalid", "-o", tmp_path,
        env={"http_proxy": value}, code=2, timeout=30,
    )  # fmt: skip
    assert "http_proxy names no proxy" in done.stderr and "hunter22" not in done.stderr


def test_a_proxy_that_forbids_a_host_says_so_at_once(tmp_path: Path) -> None:
    hfship = program("source", tmp_path / "home")
    with RawServer(lambda _: answer(b"no", "403 Forbidden")) as proxy:
        done = hfship(
            "fetch", "org/tiny", "--endpoint", "https://hub.invalid", "-o", tmp_path,
            env={"https_proxy": proxy.url}, code=8, timeout=30,
        )  # fmt: skip
    assert "does not let us to hub.invalid" in done.stderr and len(proxy.heads) == 1


def test_doctor_names_a_proxy_that_wants_a_login(tmp_path: Path) -> None:
    hfship = program("source", tmp_path / "home")
    with RawServer(lambda _: answer(b"", "407 Proxy Authentication Required")) as proxy:
        done = hfship(
            "doctor", "--endpoint", "https://hub.invalid", code=4, timeout=60,
            env={"https_proxy": f"bob:hunter/22@{proxy.url[7:]}"},
        )  # fmt: skip
    assert "wants a login" in done.stdout
    assert_hidden(done.stdout + done.stderr, hfship, "bob:hunter/22")
