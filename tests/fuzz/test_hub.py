"""What a Hub, a mirror, a CDN or a proxy may send, and what an environment may name: read or refused, soon."""

from __future__ import annotations

import json
import math
import time
from typing import Any, Callable, Dict, Mapping, Tuple, Type

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.conftest import fuzzed
from hfship.base.errors import IntegrityError, NetworkError, UsageError
from hfship.base.manifest import Source
from hfship.base.proxies import Proxies, login_error, parse_proxy, tells_no_login
from hfship.base.redaction import redact
from hfship.base.settings import checked_endpoint
from hfship.hub.answers import hub_error, rate_limit_wait, root_cause
from hfship.hub.client import Listing, _on_endpoint, _source_from_info
from hfship.hub.protocol import (
    header_number,
    is_signed,
    next_page,
    parse_repo,
    redirect_target,
    strong_etag,
    url_expiry,
)
from hfship.hub.ranges import check_range_answer
from hfship.hub.retry import RetryableError
from hfship.hub.verified import FileHasher

HUB = "http://hub/sub"
SOURCE = Source(HUB, "a/b", "main", "a/b", "c" * 40)
MUCH = 1 << 16  # characters; more is no header
NINES = "9" * 5000

# What no header, word of JSON or variable should be, and all may be.
WORDS = [
    "", " ", "\0", "\x1b[2J", "\r\n", "a\r\n b", "²", "٣", "\udcff", "é", "None", "null",
    "0", "-1", "-0", "+5", "1e999", "-1e999", "1_000", "0x10", "inf", "-inf", "nan", "1.5", ".5",
    NINES, f"-{NINES}", f"0.{NINES}", "9" * 16, "1" + "0" * 400,
    "<" * MUCH, ">" * MUCH, "<>" * (MUCH // 2), "=" * MUCH, "rel=" * (MUCH // 4), '"' * MUCH,
    "a" * MUCH, "[" * MUCH, "{" * MUCH, "%" * MUCH, "@" * MUCH, ":" * MUCH, "/" * MUCH, "," * MUCH,
    "&" * MUCH, "&a=1" * (MUCH // 4), "?" * MUCH, "#" * MUCH, "://" * (MUCH // 3), " " * MUCH,
    "http://[", "http://[::1", "http://h:99999", "http://h:" + NINES, "http://" + "a." * (MUCH // 2),
    "//", "///", "http:", "http:///", "https:///x", "javascript:x", "file:///etc/passwd", "../" * 5000,
    "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 99999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 GMT",
    f"Mon, {NINES} Jan 2020 00:00:00 GMT", f"Mon, 01 Jan 2020 00:00:00 +{NINES}", "1 " * 5000,
    "Mon, 01 Jan 2020 00:00:00 -9999", f"Mon, 01 Jan {NINES} {NINES}:{NINES}:{NINES} GMT",
    f'"api";r=0;t={NINES}', f'"api";r={NINES};t=5', '"api";r=-1;t=5', '"api";r=0;t=²', "Basic " * 9999,
    f"bytes {NINES}-{NINES}/{NINES}", "bytes -1--1/-1", "bytes ²-³/4", "bytes 0-9/*" + " " * MUCH,
]  # fmt: skip
HOSTILE = st.sampled_from([word for word in WORDS if len(word) < 500]) | st.text(max_size=200)


def soon(read: Callable[[], Any]) -> Any:
    """What `read` gives, which may not take long."""
    began = time.process_time()
    value = read()
    assert time.process_time() - began < 2, "it takes too long"
    return value


def refused(*errors: Type[BaseException]) -> Any:
    """Errors that a reader may answer with."""

    def run(read: Callable[[], Any]) -> Any:
        try:
            return soon(read)
        except errors as exc:
            if not isinstance(exc, UsageError):  # which repeats what was typed
                assert len(str(exc)) < 1000
            return None

    return run


# -- headers

# reader -> what it does with one header, and what it may raise
HEADER_READERS: Dict[str, Tuple[Callable[[str], Any], Tuple[Type[BaseException], ...]]] = {
    "Retry-After": (lambda text: rate_limit_wait({"Retry-After": text}), ()),
    "RateLimit": (lambda text: rate_limit_wait({"RateLimit": text}), ()),
    "Content-Range": (
        lambda text: check_range_answer(206, {"Content-Range": text}, 0, 10, 100),
        (RetryableError,),
    ),
    "Content-Length": (
        lambda text: check_range_answer(200, {"Content-Length": text}, 0, 10, 100),
        (RetryableError,),
    ),
    "Content-Encoding": (
        lambda text: check_range_answer(206, {"Content-Encoding": text}, 0, 10, 100),
        (RetryableError,),
    ),
    "Link": (next_page, (ValueError,)),
    "Link, on the endpoint": (lambda text: _on_endpoint(text, HUB), (ValueError,)),
    "Location": (lambda text: redirect_target(f"{HUB}/a", text, HUB), (NetworkError,)),
    "Location, from https": (
        lambda text: redirect_target("https://hub/a", text, "https://hub"),
        (NetworkError,),
    ),
    "ETag": (strong_etag, ()),
    "Proxy-Authenticate": (lambda text: login_error(None, text).text(), ()),
    "X-Error-Message": (
        lambda text: hub_error(404, {"X-Error-Message": text}, "", SOURCE, None).text(),
        (),
    ),
    "X-Error-Code": (
        lambda text: hub_error(401, {"X-Error-Code": text}, "", SOURCE, None).text(),
        (),
    ),
    "WWW-Authenticate": (
        lambda text: hub_error(401, {"WWW-Authenticate": text}, "", SOURCE, None).text(),
        (),
    ),
    "X-Request-Id": (
        lambda text: hub_error(500, {"X-Request-Id": text}, "", SOURCE, None).text(),
        (),
    ),
    "a number": (header_number, ()),
    "a reason": (lambda text: root_cause(OSError(text)), ()),
}


@pytest.mark.parametrize("reader", HEADER_READERS)
def test_table_of_headers(reader: str) -> None:
    for word in WORDS:
        read_header(reader, word)


@given(st.sampled_from(list(HEADER_READERS)), HOSTILE, HOSTILE)
@fuzzed(examples=400)
def test_any_header_is_read_or_refused(reader: str, first: str, second: str) -> None:
    read_header(reader, first + second)


def read_header(reader: str, text: str) -> None:
    read, errors = HEADER_READERS[reader]
    value = refused(*errors)(lambda: read(text))
    if isinstance(value, float):
        assert math.isfinite(value) and 0 <= value < 1e16
    if isinstance(value, str) and reader.startswith("X-"):
        assert len(value) < 1500 and "\x1b" not in value


# -- addresses

URL_READERS: Dict[str, Tuple[Callable[[str], Any], Tuple[Type[BaseException], ...]]] = {
    "endpoint": (checked_endpoint, (UsageError,)),
    "page": (parse_repo, (UsageError,)),
    "page of a hub": (lambda text: parse_repo(f"https://huggingface.co/{text}"), (UsageError,)),
    "signed": (lambda text: url_expiry(f"https://cdn/x?{text}", 0.0), ()),
    "Expires": (lambda text: url_expiry(f"https://cdn/x?Expires={text}", 0.0), ()),
    "X-Amz-Expires": (
        lambda text: url_expiry(f"https://cdn/x?X-Amz-Date=20231114T221320Z&X-Amz-Expires={text}", 0.0),
        (),
    ),
    "X-Amz-Date": (
        lambda text: url_expiry(f"https://cdn/x?X-Amz-Expires=5&X-Amz-Date={text}", 0.0),
        (),
    ),
    "signature": (lambda text: is_signed(f"https://cdn/x?{text}"), ()),
    "redacted": (redact, ()),
    "redacted login": (lambda text: redact(f"http://a:{text}@h"), ()),
}  # fmt: skip


@pytest.mark.parametrize("reader", URL_READERS)
def test_table_of_addresses(reader: str) -> None:
    read, errors = URL_READERS[reader]
    for word in WORDS:
        refused(*errors)(lambda word=word: read(word))


@given(st.sampled_from(list(URL_READERS)), HOSTILE, HOSTILE)
@fuzzed(examples=300)
def test_any_address_is_read_or_refused(reader: str, first: str, second: str) -> None:
    read, errors = URL_READERS[reader]
    value = refused(*errors)(lambda: read(first + second))
    assert not isinstance(value, float) or math.isfinite(value)


# -- answers of the API

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["file", "directory"]) | JSON,
        "path": st.just("w") | JSON,
        "rfilename": st.just("w") | JSON,
        "size": st.integers(0, 9) | JSON,
        "oid": st.just("a" * 40) | JSON,
        "blobId": st.just("a" * 40) | JSON,
        "xetHash": st.just("a" * 64) | JSON,
        "lfs": JSON | st.fixed_dictionaries({"oid": st.just("b" * 64) | JSON, "size": st.integers() | JSON}),
    },
)  # fmt: skip
UNUSABLE = (ValueError, KeyError, TypeError, AttributeError, IntegrityError)


@given(st.lists(ENTRIES | JSON, max_size=4) | JSON)
@fuzzed(examples=400)
def test_any_page_of_a_tree_is_read_or_refused(page: Any) -> None:
    def read() -> Any:
        listing = Listing(SOURCE)
        listing.add(page)
        return listing.files()

    for file in refused(*UNUSABLE)(read) or []:
        assert file.etag and type(file.size) is int and 0 <= file.size < 1 << 61
        assert ".." not in file.path.split("/") and not file.path.startswith("/")


ROWS: Dict[str, Mapping[str, Any]] = {
    "a pointer only": {"path": "w", "size": 1, "oid": "a" * 40, "xetHash": "x"},
    "an lfs without hash": {"path": "w", "size": 1, "oid": "a" * 40, "lfs": {"size": 5}},
    "no hash": {"path": "w", "size": 1},
    "siblings without blobs": {"rfilename": "w"},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_file_without_a_hash_of_its_content_is_unproven(name: str) -> None:
    listing = Listing(SOURCE)
    listing.add([ROWS[name]])
    (file,) = listing.files
    assert (file.path, file.etag) == ("w", "")
    assert not FileHasher(file).matches(), "nothing proves it, not even that it is empty"


@given(
    st.dictionaries(
        st.sampled_from(["sha", "id", "gated", "cardData", "tags"]), st.just("c" * 40) | JSON
    )
    | JSON
)
@fuzzed(examples=300)
def test_any_description_of_a_repository_is_read_or_refused(info: Any) -> None:
    source = refused(NetworkError)(lambda: _source_from_info(SOURCE, info))
    for value in vars(source).values() if source else ():
        assert len(str(value)) < 300 and str(value).isprintable()


@given(JSON)
@fuzzed(examples=150)
def test_any_body_of_an_error_is_shown_in_short(value: Any) -> None:
    for body in (json.dumps(value), json.dumps({"error": value}), json.dumps({"errors": [value]})):
        text = soon(lambda body=body: hub_error(500, {}, body, SOURCE, None).text())
        assert len(text) < 1000 and "\x1b" not in text


@pytest.mark.parametrize("word", ["[", '{"error":', '{"errors":[', "[[],", "9", "1e5,", '"'])
def test_bodies_that_are_large_and_nothing(word: str) -> None:
    body = word * (20_000_000 // len(word))
    text = soon(lambda: hub_error(500, {}, body, SOURCE, None).text())
    assert len(text) < 500


# -- proxies

LOGINS = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), min_size=1, max_size=12)
PLACES = st.sampled_from(["http_proxy", "HTTPS_PROXY", "all_proxy"])


@given(PLACES, HOSTILE, HOSTILE)
@fuzzed(examples=200)
def test_any_proxy_variable_is_read_or_refused(variable: str, first: str, second: str) -> None:
    value = first + second
    error = refused(UsageError)(lambda: parse_proxy(variable, value))
    assert error is None or error.url.isprintable()
    proxies = Proxies({variable: value, "no_proxy": value})
    refused(UsageError)(lambda: proxies.of("https://hub"))
    soon(lambda: (proxies.secrets, proxies.for_children()))


@given(st.sampled_from(["", "http://", "//", "https://", "socks5://"]), LOGINS, LOGINS)
@fuzzed(examples=200)
def test_a_login_is_never_told(scheme: str, user: str, password: str) -> None:
    """Whatever it consists of; and other programs get the same one."""
    secret = f"{password}SECRET"
    value = f"{scheme}{user}:{secret}@proxy:3128"
    assert not tells_no_login("http_proxy", value)
    try:
        proxy = parse_proxy("http_proxy", value)
    except UsageError as exc:
        assert "SECRET" not in exc.text()
        return
    assert "SECRET" not in f"{proxy!r} {proxy.url} {login_error(proxy).text()}"
    assert proxy.headers and proxy.host == "proxy"
    again = parse_proxy("http_proxy", Proxies({"http_proxy": value}).for_children()["http_proxy"])
    assert (again.user, again.password) == (proxy.user, proxy.password)
