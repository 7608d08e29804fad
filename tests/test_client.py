# SPDX-License-Identifier: Apache-2.0
"""Calls of the Hub's API, with answers that are written here: what of a repository is taken, and
what each strange answer means. Whole programs against a Hub are in test_fetch.py."""

from __future__ import annotations

import io
import json
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import pytest

from hfship.base.card import Card
from hfship.base.errors import (
    AuthError,
    HfshipError,
    IntegrityError,
    NetworkError,
    NotFoundError,
    UsageError,
)
from hfship.base.manifest import Source
from hfship.base.report import Reporter
from hfship.base.settings import Token, load_settings
from hfship.hub import client as room
from hfship.hub.client import IDLE_PAGES, LONGEST_WORD, HubClient, Listing
from hfship.hub.protocol import LARGEST_FILE, LONGEST_PATH, RemoteFile, next_page, repo_file
from hfship.hub.registry import RegistryClient
from hfship.hub.registry_protocol import parse_reference
from support.scripted import NoWait, Scripted, ScriptedSession

HUB = "https://hub.site"
COMMIT = "c" * 40
SHA1, SHA256 = "a" * 40, "b" * 64
API = f"{HUB}/api/models/org/m"
REVISION, TREE = f"{API}/revision/main", f"{API}/tree/{COMMIT}?recursive=true&expand=false"
INFO = {"sha": COMMIT, "id": "org/m"}
ENTRY = {"type": "file", "path": "a", "size": 3, "oid": SHA1}
FILE = RemoteFile("a", 3, SHA1)
SOURCE = Source(HUB, "org/m", "main", "org/m", COMMIT)


def said(value: Any, status: int = 200, **headers: str) -> Scripted:
    return (status, headers, json.dumps(value).encode())


class Asked:
    """A client of a Hub, and the answers that it gets."""

    def __init__(self, *answers: Scripted, token: str = "", endpoint: str = HUB) -> None:
        self.err = io.StringIO()
        reporter = Reporter("plain", 1, err=self.err)
        settings = load_settings({"HOME": "/none"}, endpoint)
        shown = Token(token, "env X") if token else None
        self.client = HubClient(settings, shown, reporter, NoWait())
        self.session = ScriptedSession(self.client._authorization, list(answers))
        self.client._session = self.session  # type: ignore[assignment]

    @property
    def urls(self) -> List[str]:
        """What was asked for."""
        return [one.url for one in self.session.sent]


def test_a_repository_is_its_commit_with_every_file() -> None:
    pages = [[ENTRY, {"type": "directory", "path": "d"}], [{**ENTRY, "path": "d/b"}]]
    link = '<https://huggingface.co/api/models/org/m/tree/x?cursor=1>; rel="next"'
    asked = Asked(said(INFO), said(pages[0], Link=link), said(pages[1]), token="hf_x")
    snapshot = asked.client.snapshot("org/m", None)
    assert snapshot.source == SOURCE and snapshot.card == Card()
    assert snapshot.files == (FILE, RemoteFile("d/b", 3, SHA1))
    assert asked.urls == [REVISION, TREE, f"{API}/tree/x?cursor=1"]
    assert {one.login for one in asked.session.sent} == {"Bearer hf_x"}
    assert asked.err.getvalue() == "" and not asked.session.answers


def test_another_kind_of_repository_has_another_address() -> None:
    asked = Asked(said({**INFO, "id": "org/new"}), said([]))
    snapshot = asked.client.snapshot("org/m", "v1", "dataset")
    assert (snapshot.source.revision, snapshot.source.repo_type) == ("v1", "dataset")
    assert asked.urls[0] == f"{HUB}/api/datasets/org/m/revision/v1"
    assert asked.urls[1].startswith(f"{HUB}/api/datasets/org/new/tree/{COMMIT}?")
    assert asked.err.getvalue().endswith("org/m is now org/new\n")
    assert asked.client.file_url(snapshot.source, "x y").endswith(f"/resolve/{COMMIT}/x%20y")


GATED = {**INFO, "gated": "manual", "cardData": {"license": "llama3", "license_name": "l"}}


def test_of_a_gated_repository_the_terms_were_accepted_if_it_can_be_read() -> None:
    for probe in (said({}), said({}, 404)):
        asked = Asked(said(GATED), probe, said([ENTRY]))
        snapshot = asked.client.snapshot("org/m", None)
        assert asked.urls == [REVISION, f"{API}/auth-check", TREE]
        assert (snapshot.source.gated, snapshot.source.license) == ("manual", "llama3")
        assert snapshot.card == Card(license_name="l", terms="accepted")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_that_may_not_be_read_is_told_at_once(status: int) -> None:
    asked = Asked(said(GATED), said({}, status, **{"X-Request-Id": "r-1"}))
    with pytest.raises(AuthError, match="is gated") as caught:
        asked.client.snapshot("org/m", None)
    assert "r-1" in caught.value.why


@pytest.mark.parametrize(
    "info",
    [
        [],
        {},
        {"id": "org/m"},
        {**INFO, "sha": None},
        {**INFO, "sha": 7},
        {**INFO, "sha": "main"},
        {**INFO, "id": ["org/m"]},
        {**INFO, "id": "o" * (LONGEST_WORD + 1)},
        {**INFO, "id": "org/m/x"},
        {**INFO, "id": "-x/../y"},
    ],
    ids=str,
)
def test_what_describes_no_repository_is_no_hub(info: Any) -> None:
    asked = Asked(said(info))
    with pytest.raises(NetworkError, match="does not answer like a Hub") as caught:
        asked.client.snapshot("org/m", None)
    assert caught.value.why and len(asked.urls) == 1
    commit = info.get("sha") if isinstance(info, dict) else None
    assert (caught.value.why == "no commit in its answer") == (commit != COMMIT)


def test_a_repository_without_a_name_is_what_was_asked_for() -> None:
    for name in (None, ""):
        asked = Asked(said({**INFO, "id": name}), said([]))
        assert asked.client.snapshot("org/m", None).source.resolved_repo == "org/m"


@pytest.mark.parametrize(
    "info, found",
    [
        ({"cardData": {"license": "mit"}, "tags": ["license:other"]}, "mit"),
        ({"cardData": {"license": ["mit", "x"]}}, "['mit', 'x']"),
        ({"cardData": {"license": "a\nb\x1b"}}, "a | b?"),
        ({"cardData": {"license": "x" * 300}}, "x" * LONGEST_WORD),
        ({"cardData": {"license": ""}, "tags": ["x", "license:mit", "license:b"]}, "mit"),
        ({"cardData": [], "tags": ["license:", "license:" + "y" * 300]}, "y" * LONGEST_WORD),
        ({"tags": [7, "mylicense:mit", "license:a\nb"]}, "a | b"),
        ({"tags": "license:mit"}, None),
        ({"tags": ["mit"]}, None),
        ({}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_which_licence_a_repository_names(info: Dict[str, Any], found: Optional[str]) -> None:
    asked = Asked(said({**INFO, **info}), said([]))
    assert asked.client.snapshot("org/m", None).source.license == found


@pytest.mark.parametrize(
    "gated, found",
    [
        ("auto", "auto"),
        ("a\nb", "a | b"),
        ("x" * 300, "x" * LONGEST_WORD),
        (True, True),
        (False, False),
        (None, False),
        ("", ""),
        ([], False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_how_a_repository_is_gated(gated: Any, found: Union[bool, str]) -> None:
    answers = [said({**INFO, "gated": gated}), *([said({})] if found else []), said([])]
    source = Asked(*answers).client.snapshot("org/m", None).source
    assert source.gated == found and type(source.gated) is type(found)


# -- what an error answer means


def refused(*answers: Scripted, **options: str) -> HfshipError:
    with pytest.raises(HfshipError) as caught:
        Asked(*answers, **options).client.snapshot("org/m", None)
    return caught.value


ELSEWHERE = said({}, 307, Location="https://other.site/x")


@pytest.mark.parametrize(
    "status, token, kind, what",
    [
        (401, "", AuthError, "sends on to other.site"),
        (403, "", AuthError, "sends on to other.site"),
        (404, "hf_x", NotFoundError, "sends on to other.site"),
        (404, "", NotFoundError, "was not found"),
        (410, "hf_x", NetworkError, "answered with an error"),
    ],
)
def test_another_host_was_asked_without_a_token(
    status: int, token: str, kind: Any, what: str
) -> None:
    code = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    error = refused(ELSEWHERE, said({}, status, **code), token=token)
    assert type(error) is kind and what in error.what


def test_what_is_no_json_is_told_with_its_place() -> None:
    page: Scripted = (200, {"Content-Type": "text/html"}, b"<html>")
    error = refused(page)
    assert type(error) is NetworkError
    assert (
        error.why == "/api/models/org/m/revision/main answered text/html, not JSON that can be used"
    )
    assert "answered nothing, not JSON" in refused((200, {}, b"<html>")).why
    for answer in (page, said({}, 404)):
        error = refused(answer, endpoint="https://www.modelscope.cn")
        assert type(error) is UsageError and "has no Hub API" in error.what
        assert "org/m" in error.next_step


# -- the list of files


@pytest.mark.parametrize(
    "answers, files",
    [
        ([said({}, 404), said({"siblings": [{"rfilename": "a", "size": 3, "blobId": SHA1}]})], 1),
        ([said({}, 404), said({"siblings": []})], 0),
    ],
)
def test_a_proxy_without_a_tree_names_the_siblings(answers: Sequence[Scripted], files: int) -> None:
    asked = Asked(said(INFO), *answers)
    assert len(asked.client.snapshot("org/m", None).files) == files
    assert asked.urls[1:] == [TREE, f"{API}/revision/{COMMIT}?blobs=true"]


@pytest.mark.parametrize("info", [{}, [], "siblings"])
def test_without_siblings_it_is_the_tree_that_is_missing(info: Any) -> None:
    missing = said({}, 404, **{"X-Error-Code": "EntryNotFound"})
    error = refused(said(INFO), missing, said(info))
    assert type(error) is NotFoundError and "a file is missing" in error.what


def test_a_page_that_is_missing_is_no_tree_without_pages() -> None:
    link = f'<{API}/tree/x>; rel="next"'
    asked = Asked(said(INFO), said([ENTRY], Link=link), said({}, 404))
    with pytest.raises(NotFoundError):
        asked.client.snapshot("org/m", None)
    assert len(asked.urls) == 3


def test_a_page_that_links_to_itself_is_the_last() -> None:
    asked = Asked(said(INFO), said([ENTRY], Link=f'<{TREE}>; rel="next"'))
    assert asked.client.snapshot("org/m", None).files == (FILE,)


@pytest.mark.parametrize(
    "page, why",
    [
        ({}, None),
        ([7], "'int' object has no attribute 'get'"),
        ([{}], "rfilename"),
        ([{"path": 7}], "unusable path 7"),
        ([{**ENTRY, "size": -1}], "unusable entry for 'a'"),
        (7, "'int' object is not iterable"),
    ],
    ids=str,
)
def test_a_listing_of_another_form_cannot_be_used(page: Any, why: Optional[str]) -> None:
    asked = Asked(said(INFO), said(page))
    if why is None:
        assert asked.client.snapshot("org/m", None).files == ()
        return
    with pytest.raises(IntegrityError) as caught:
        asked.client.snapshot("org/m", None)
    assert caught.value.what == "the listing of org/m at hub.site cannot be used"
    assert why in caught.value.why and caught.value.next_step == "tell the owner of org/m"


def test_a_list_that_brings_nothing_new_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Listing(SOURCE)
    folders = [[{"type": "directory", "path": str(number)}] for number in range(3)]
    for page in [
        folders[0],
        *[[]] * (IDLE_PAGES - 1),
        folders[1],
        *[folders[0]] * (IDLE_PAGES - 1),
    ]:
        listing.add(page)
    with pytest.raises(ValueError, match="it never ends"):
        listing.add(folders[1])
    monkeypatch.setattr(room, "MAX_FILES", 2)
    listing = Listing(SOURCE)
    for page in folders[:2]:
        listing.add(page)
    with pytest.raises(ValueError, match="it has more than 2 entries"):
        listing.add(folders[2])
    assert listing.files == []


@pytest.mark.parametrize(
    "changes, file",
    [
        ({}, FILE),
        ({"lfs": None}, FILE),
        ({"lfs": {"oid": SHA256, "size": 9}}, RemoteFile("a", 9, SHA1, SHA256)),
        ({"lfs": {"sha256": SHA256}}, RemoteFile("a", 3, SHA1, SHA256)),
        ({"lfs": {"size": 9}}, RemoteFile("a", 0, "")),
        ({"xetHash": "x"}, RemoteFile("a", 0, "")),
        ({"xetHash": "", "lfs": {"size": 9}}, RemoteFile("a", 9, SHA1)),
        ({"oid": None}, RemoteFile("a", 0, "")),
        ({"oid": None, "blobId": SHA1}, RemoteFile("a", 0, "")),
        ({"oid": "", "lfs": {"oid": SHA256}}, RemoteFile("a", 3, "", SHA256)),
        ({"size": 0}, RemoteFile("a", 0, SHA1)),
        ({"size": LARGEST_FILE}, RemoteFile("a", LARGEST_FILE, SHA1)),
        ({"path": "p" * LONGEST_PATH}, RemoteFile("p" * LONGEST_PATH, 3, SHA1)),
        ({"path": "", "rfilename": "b"}, RemoteFile("b", 3, SHA1)),
        ({"size": LARGEST_FILE + 1}, None),
        ({"size": -1}, None),
        ({"size": True}, None),
        ({"size": None}, None),
        ({"size": "3"}, None),
        ({"oid": "x"}, None),
        ({"lfs": {"oid": "x"}}, None),
        ({"lfs": {"oid": SHA1}}, None),
        ({"path": "p" * (LONGEST_PATH + 1)}, None),
        ({"path": ["a"]}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_an_entry_says_of_its_file(
    changes: Mapping[str, Any], file: Optional[RemoteFile]
) -> None:
    entry = {**ENTRY, **changes}
    if file is not None:
        assert repo_file(entry) == file
        return
    with pytest.raises(ValueError, match="unusable"):
        repo_file(entry)


def test_an_entry_of_siblings_has_other_names() -> None:
    entry = {"rfilename": "a", "size": 3, "blobId": SHA1}
    assert repo_file(entry) == FILE
    entry = {**entry, "lfs": {"sha256": SHA256, "size": 9}}
    assert repo_file(entry) == RemoteFile("a", 9, SHA1, SHA256)


@pytest.mark.parametrize(
    "header, url",
    [
        ("", None),
        ('<https://h/x?a=1>; rel="next"', "https://h/x?a=1"),
        ("</x>; rel=next", "/x"),
        ('</a>; rel="prev", </b>; rel="next"', "/b"),
        ('</a>; rel="next", </b>; rel="prev"', "/a"),
        ('</a>; title="x"; rel="last next"', "/a"),
        ('</a>; rel="nextish"', None),
        ("</a>", None),
    ],
)
def test_which_page_comes_next(header: str, url: Optional[str]) -> None:
    assert next_page(header) == url
    with pytest.raises(ValueError, match="it sends a Link header of 100000 characters"):
        next_page("x" * 100_000)


@pytest.mark.parametrize("asked, kept", [((), 8), ((3,), 3)])
def test_as_many_connections_are_kept_as_are_asked_for(asked: Any, kept: int) -> None:
    """Without a word as many as huggingface_hub has workers; and two for what comes between."""
    settings, reporter, stop = load_settings({"HOME": "/none"}, HUB), Reporter("none"), NoWait()
    reference = parse_reference("docker://r.example/org/app:1")
    for client in (
        HubClient(settings, None, reporter, stop, *asked),
        RegistryClient(reference, "https://r.example", None, reporter, stop, *asked),
    ):
        assert client._session._kept == kept + 2
