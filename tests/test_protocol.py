# SPDX-License-Identifier: Apache-2.0
"""The Hub's protocol, in values: addresses, what is proposed to type, and what headers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from hfship.base.errors import NetworkError, UsageError
from hfship.base.manifest import Source
from hfship.base.settings import DEFAULT_ENDPOINT
from hfship.base.values import replace
from hfship.hub.protocol import (
    NO_HUBS,
    SIGNATURES,
    RemoteFile,
    Snapshot,
    api_url,
    below_endpoint,
    fetch_command,
    git_blob_sha1,
    header_number,
    image_word,
    is_no_hub,
    is_signed,
    no_hub,
    origin,
    parse_repo,
    redirect_target,
    resolve_url,
    strong_etag,
    url_expiry,
)

SOURCE = Source(DEFAULT_ENDPOINT, "org/m", "main", "org/new", "c" * 40)


def test_a_file_is_known_by_its_hash() -> None:
    small, large = RemoteFile("a", 3, "b" * 40), RemoteFile("b", 5, "b" * 40, "a" * 64)
    assert (small.etag, large.etag, RemoteFile("c", 1, "").etag) == ("b" * 40, "a" * 64, "")
    assert Snapshot(SOURCE, (small, large)).size == 8
    hasher = git_blob_sha1(2)
    hasher.update(b"a\n")
    assert hasher.hexdigest() == "78981922613b2afb6025042ff6bd878ac1994e85"  # git hash-object


@pytest.mark.parametrize(
    "word, found",
    [
        ("org/m", ("org/m", None)),
        ("org/m/", ("org/m", None)),
        ("org/m@", ("org/m", None)),
        ("org/m@refs/pr/1", ("org/m", "refs/pr/1")),
        ("hf://org/m@v1", ("org/m", "v1")),
        ("hf://models/org/m", ("org/m", None)),
        ("gpt2", ("gpt2", None)),
        ("org/m/x", None),
        ("hf://datasets/org/m", None),
        ("", None),
        ("ftp://hub/org/m", None),
    ],
)
def test_what_is_a_repository(word: str, found: Any) -> None:
    if found:
        assert parse_repo(word) == found
        return
    with pytest.raises(UsageError, match="is not a repository") as caught:
        parse_repo(word)
    assert caught.value.next_step.startswith("give it as ORG/NAME or ORG/NAME@REVISION")


@pytest.mark.parametrize("site", NO_HUBS)
def test_sites_without_the_api_are_known(site: str) -> None:
    assert is_no_hub(site) and is_no_hub(f"www.{site}") and not is_no_hub(f"my{site}")
    error = no_hub(site, "org/m")
    assert error.what == f"{site} has no Hub API" and error.why.startswith("hfship fetches from")
    assert error.next_step == "hfship fetch org/m (if huggingface.co has it, too)"
    assert "hfship fetch ORG/NAME (" in no_hub(site, "a b").next_step


@pytest.mark.parametrize(
    "changes, revision, folder, command",
    [
        ({}, "main", "/d/m", "hfship fetch --repair org/m -o /d"),
        ({}, "v1", "/d/m", "hfship fetch --repair org/m@v1 -o /d"),
        ({}, "main", "/d/x", "hfship fetch --repair org/m -o /d --name x"),
        ({"repo": "gpt2"}, "main", "/d/gpt2", "hfship fetch --repair gpt2 -o /d"),
        (
            {"repo_type": "dataset", "endpoint": "https://hub"},
            "main",
            "/d/m",
            "hfship fetch --repair org/m -o /d --repo-type dataset --endpoint https://hub",
        ),
        (
            {"repo_type": "image", "repo": "docker.io/vllm/vllm-openai"},
            "v1",
            "/d/vllm-openai_v1",
            "hfship fetch --repair docker://vllm/vllm-openai:v1 -o /d",
        ),
        (
            {"repo_type": "image", "repo": "quay.io/a/b"},
            "sha256:" + "0" * 64,
            "/d/x",
            f"hfship fetch --repair docker://quay.io/a/b@sha256:{'0' * 64} -o /d --name x",
        ),
    ],
)
def test_the_command_that_brings_a_repository(
    changes: Dict[str, str], revision: str, folder: str, command: str
) -> None:
    source = replace(SOURCE, **changes)
    assert fetch_command(source, revision, Path(folder), "--repair") == command
    if source.repo_type == "image":
        assert image_word(source, revision) in command


def test_addresses_of_the_hub() -> None:
    assert (
        api_url("https://h/x", "model", "a/b", "t", "r/1") == "https://h/x/api/models/a/b/t/r%2F1"
    )
    assert resolve_url(SOURCE, "d/x y") == f"{DEFAULT_ENDPOINT}/org/new/resolve/{'c' * 40}/d/x%20y"
    dataset = replace(SOURCE, repo_type="dataset", endpoint="https://h")
    assert resolve_url(dataset, "x") == f"https://h/datasets/org/new/resolve/{'c' * 40}/x"
    for url, found in {
        "https://Hub/x": ("https", "hub", 443),
        "http://hub:8080": ("http", "hub", 8080),
        "http://hub": ("http", "hub", 80),
        "ftp://hub": ("ftp", "hub", 0),
        "x": ("", "", 0),
    }.items():
        assert origin(url) == found


@pytest.mark.parametrize(
    "url, location, endpoint, target",
    [
        ("https://h/a", "https://cdn/x?s=1", "https://h", "https://cdn/x?s=1"),
        ("https://h/a/b", "c", "https://h", "https://h/a/c"),
        ("https://h/a/b", "/c", "https://h", "https://h/c"),
        ("https://h/hub/a", "/c", "https://h/hub", "https://h/hub/c"),
        ("https://h/hub/a", "/hub/c", "https://h/hub", "https://h/hub/c"),
        ("https://cdn/hub/a", "/c", "https://h/hub", "https://cdn/c"),
        ("https://h/hub/a", "https://h/c", "https://h/hub", "https://h/c"),
        ("http://h/a", "https://h/b", "http://h", "https://h/b"),
        ("http://h/a", "http://h/b", "http://h", "http://h/b"),
        ("https://h/a", "http://h/b", "https://h", "an unencrypted address"),
        ("https://h/a", "ftp://h/b", "https://h", "what is no address"),
        ("https://h/a", "https://:443/b", "https://h", "what is no address"),
        ("https://h/a", "https://h:x/b", "https://h", "what is no address"),
        ("https://h/a", "https://h/b c", "https://h", "what is no address"),
    ],
)
def test_where_a_redirect_leads(url: str, location: str, endpoint: str, target: str) -> None:
    if "://" in target:
        assert redirect_target(url, location, endpoint) == target
        return
    with pytest.raises(NetworkError, match=target) as caught:
        redirect_target(url, location, endpoint)
    assert caught.value.next_step == "check HF_ENDPOINT and the proxy" and caught.value.why
    if "unencrypted" in target:
        assert caught.value.why == "h -> h"


@pytest.mark.parametrize(
    "url, endpoint, found",
    [
        ("http://h/x", "http://h", "http://h/x"),
        ("http://h/x", "http://other/hub", "http://h/x"),
        ("http://h/x", "http://h/hub", "http://h/hub/x"),
        ("http://h/hub/x", "http://h/hub", "http://h/hub/x"),
        ("http://h/hub2/x", "http://h/hub", "http://h/hub/hub2/x"),
        ("http://h/r/b/x", "http://h/r/hub", "http://h/r/b/x"),
    ],
)
def test_an_address_below_an_endpoint(url: str, endpoint: str, found: str) -> None:
    assert below_endpoint(url, endpoint) == found


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_what_is_signed(name: str) -> None:
    assert is_signed(f"https://cdn/x?a=1&{name.title()}=y")
    assert not is_signed(f"https://cdn/x?my{name}=y") and not is_signed(f"https://cdn/{name}=1")
    assert not is_signed("https://cdn/x?" + "&".join(["a=1"] * 200 + [f"{name}=1"]))


@pytest.mark.parametrize(
    "query, expires",
    [
        ("Expires=1700000000&X-Amz-Expires=5", 1700000000.0),
        ("expires=soon", None),
        ("X-Amz-Expires=60", 1060.0),
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=60", 1700000060.0),
        ("X-Amz-Date=yesterday&X-Amz-Expires=60", None),
        ("X-Amz-Date=20231114T221320Z", None),
        ("X-Amz-Expires=x", None),
        ("", None),
    ],
)
def test_how_long_a_signature_holds(query: str, expires: Optional[float]) -> None:
    assert url_expiry(f"https://cdn/x?{query}", 1000.0) == expires


@pytest.mark.parametrize(
    "text, number",
    [
        ("0", 0.0),
        ("17.25", 17.25),
        ("9" * 15, 999999999999999.0),
        ("1." + "0" * 9, 1.0),
        ("9" * 16, None),
        ("1." + "0" * 10, None),
        ("1.", None),
        ("-1", None),
        (" 1", None),
        ("1e3", None),
        ("", None),
    ],
)
def test_numbers_of_headers(text: str, number: Optional[float]) -> None:
    assert header_number(text) == number


def test_etags_that_name_one_object() -> None:
    named: List[str] = ['"abc"', "abc", "x" * 500]
    assert [strong_etag(text) for text in named] == named
    for text in ('W/"abc"', "a b", "", "x" * 501, '"\xe9"'):
        assert strong_etag(text) == ""
