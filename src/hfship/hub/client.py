# SPDX-License-Identifier: Apache-2.0
"""Calls of the Hub's API.

Owns one Hub as seen by the rest of the program: a repository with its files at one commit.
Promises: a listing with unsafe or doubled names is refused. Never: writes to disk.
"""

from __future__ import annotations

import os
import threading
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Set,
    Tuple,
    Union,
)
from urllib.parse import urljoin, urlsplit, urlunsplit

from hfship.base.card import Card, card_of
from hfship.base.errors import HfshipError, IntegrityError, NotFoundError
from hfship.base.manifest import _COMMIT, Source, check_source
from hfship.base.reading import parse_json
from hfship.base.text import printable
from hfship.base.values import replace
from hfship.hub.answers import hub_error, not_a_hub, sent_on
from hfship.hub.protocol import (
    RemoteFile,
    Snapshot,
    api_url,
    below_endpoint,
    entry_path,
    is_no_hub,
    next_page,
    no_hub,
    origin,
    repo_file,
    resolve_url,
)
from hfship.hub.session import Authorization
from hfship.hub.transport import ApiAnswer, Transport

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.base.settings import Settings, Token

LICENSE_TAG = "license:"
LONGEST_WORD = 200  # characters of a license, or of the name of a repository
MAX_FILES = 500_000  # of a repository; the Hub advises against more than 100,000
IDLE_PAGES = 3  # of a tree, in a row, that bring nothing new: the list goes in a circle


class HubClient(Transport):
    """Talks to one Hub."""

    def __init__(
        self,
        settings: Settings,
        token: Optional[Token],
        reporter: Reporter,
        stop: threading.Event,
        connections: int = 8,
    ) -> None:
        self.token = token
        authorization = Authorization(token, settings.endpoint, os.environ)
        super().__init__(settings.endpoint, authorization, reporter, stop, connections)

    def file_url(self, source: Source, path: str) -> str:
        """The Hub redirects from there to a signed address."""
        return resolve_url(source, path)

    def refusal(
        self, status: int, headers: Mapping[str, str], body: str, source: Source
    ) -> HfshipError:
        """What the Hub says of a file, in its own codes."""
        return hub_error(status, headers, body, source, self.token)

    def snapshot(self, repo: str, revision: Optional[str], repo_type: str = "model") -> Snapshot:
        """The repository at `revision`, with every file.

        The revision is a branch, a tag, a short or full commit, or None for the default branch.
        Raises NotFoundError, AuthError, NetworkError, IntegrityError (a listing with unsafe names).
        """
        asked = Source(
            endpoint=self.endpoint,
            repo=repo,
            revision=revision or "main",
            resolved_repo=repo,
            commit="",
            repo_type=repo_type,
        )
        info, _ = self._json(self._url_of(asked, "revision", asked.revision), asked)
        source = _source_from_info(asked, info)
        if source.gated:
            self._check_access(source)
        if source.resolved_repo != repo:
            self.reporter.info(f"{repo} is now {source.resolved_repo}")
        files = self._tree(source)
        return Snapshot(source, tuple(files), _card_from_info(source, info))

    def _url_of(self, source: Source, *parts: str) -> str:
        """A URL of the API below a repository."""
        repo = source.resolved_repo
        return api_url(self.endpoint, source.repo_type, repo, *parts)

    def _json(self, url: str, asked: Source) -> Tuple[Any, Mapping[str, str]]:
        """The JSON answer of an API URL, and its headers.

        Raises the HfshipError that an error answer means, NetworkError for what is no JSON.
        """
        answer = self._ask(url)
        if answer.status != 200:
            raise self._error(answer, asked)

        try:
            return parse_json(answer.body), answer.headers
        except ValueError as exc:
            host = origin(self.endpoint)[1]
            if is_no_hub(host):
                raise no_hub(host, asked.repo) from exc
            kind = answer.headers.get("Content-Type", "nothing")
            path = urlsplit(url).path
            why = f"{path} answered {kind}, not JSON that can be used"
            raise not_a_hub(self.endpoint, why) from exc

    def _error(self, answer: ApiAnswer, asked: Source) -> HfshipError:
        """What an error answer means. Another host than the Hub's was asked without a token."""
        status = answer.status
        host = origin(self.endpoint)[1]
        if is_no_hub(host):
            return no_hub(host, asked.repo)
        is_elsewhere = bool(answer.url) and origin(answer.url) != origin(self.endpoint)
        if is_elsewhere and (status in (401, 403) or (status == 404 and self.token)):
            return sent_on(status, answer.url, asked.repo, asked)
        return hub_error(status, answer.headers, answer.body, asked, self.token)

    # -- parts of a snapshot

    def _check_access(self, source: Source) -> None:
        """Fail in a second, not after the plan, when a gated repository may not be read.

        Mirrors without the probe answer 404 for a repository that they just listed: then the
        download itself finds out.
        """
        answer = self._ask(self._url_of(source, "auth-check"))
        if answer.status in (401, 403):
            headers = dict(answer.headers)
            headers["X-Error-Code"] = "GatedRepo"
            raise self._error(replace(answer, headers=headers), source)

    def _tree(self, source: Source) -> List[RemoteFile]:
        """Every file of the commit, under the names that the Hub gives. Raises IntegrityError for
        entries of another form."""
        listing = Listing(source)
        try:
            for page in self._tree_pages(source):
                listing.add(page)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise IntegrityError(
                f"the listing of {source.repo} at {origin(source.endpoint)[1]} cannot be used",
                printable(str(exc)),
                f"tell the owner of {source.repo}",
            ) from exc

        return listing.files

    def _tree_pages(self, source: Source) -> Iterator[Any]:
        """The pages of the file tree, as the Hub sends them.

        Proxies that have no tree know the files of a repository by its `siblings`.
        """
        tree = self._url_of(source, "tree", source.commit)
        url: Optional[str] = f"{tree}?recursive=true&expand=false"
        seen: Set[str] = set()  # a mirror may link its last page to itself
        while url and url not in seen:
            seen.add(url)
            try:
                page, headers = self._json(url, source)
            except NotFoundError as exc:
                if len(seen) > 1:
                    raise
                yield self._siblings(source, exc)
                return
            yield page
            url = next_page(headers.get("Link", ""))
            if url:
                url = _on_endpoint(url, self.endpoint)

    def _siblings(self, source: Source, no_tree: NotFoundError) -> Any:
        """The files of a commit from the answer that describes it. Raises `no_tree` where there
        are none either."""
        url = self._url_of(source, "revision", source.commit)
        info, _ = self._json(f"{url}?blobs=true", source)
        if not isinstance(info, dict) or "siblings" not in info:
            raise no_tree
        return info["siblings"]


class Listing:
    """The files of a repository as they come, page by page.

    Its methods raise ValueError, KeyError, TypeError or AttributeError for what no Hub sends:
    entries of another form, lists that never end or go in a circle.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.files: List[RemoteFile] = []
        self._paths: Set[str] = set()  # of folders, too
        self._idle = 0  # pages in a row that brought nothing new

    def add(self, page: List[Mapping[str, Any]]) -> None:
        """Take the entries of a page."""
        before = len(self._paths)
        for item in page:
            self._take(item)

        if len(self._paths) > MAX_FILES:
            raise ValueError(f"it has more than {MAX_FILES} entries")
        self._idle += 1
        if len(self._paths) > before:
            self._idle = 0
        if self._idle >= IDLE_PAGES:
            raise ValueError("it never ends: its pages bring nothing new any more")

    def _take(self, item: Mapping[str, Any]) -> None:
        path = entry_path(item)
        self._paths.add(path)
        if item.get("type", "file") != "file":
            return

        self.files.append(repo_file(item))


def _source_from_info(asked: Source, info: Any) -> Source:
    """The source with its commit, from the answer of /revision.

    Raises NetworkError for an answer that is not one.
    """
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str) or not _COMMIT.match(commit):
        raise not_a_hub(asked.endpoint, "no commit in its answer")

    repo = info.get("id") or asked.repo
    if type(repo) is not str or len(repo) > LONGEST_WORD:
        raise not_a_hub(asked.endpoint, "its answer is about no repository")

    source = replace(
        asked,
        resolved_repo=repo,
        commit=commit,
        license=_license_in(info),
        gated=_gate_in(info),
    )
    try:
        check_source(source)
    except ValueError as exc:
        raise not_a_hub(asked.endpoint, str(exc)[:LONGEST_WORD]) from exc

    return source


def _card_from_info(source: Source, info: Dict[str, Any]) -> Card:
    """What the card says beside the license, which the source has; and that the terms of a gated
    repository were accepted: it was read."""
    card = replace(card_of(info.get("cardData")), license="")
    if source.gated:
        card = replace(card, terms="accepted")
    return card


def _license_in(info: Dict[str, Any]) -> Optional[str]:
    """The license that the card of a repository names, else its tags; None when neither does."""
    card = info.get("cardData")
    if isinstance(card, dict) and card.get("license"):
        return printable(str(card["license"])[:LONGEST_WORD])

    tags = info.get("tags")
    if not isinstance(tags, list):
        return None

    for tag in map(str, tags):
        if not tag.startswith(LICENSE_TAG):
            continue
        name = tag[len(LICENSE_TAG) :]
        if name:
            return printable(name[:LONGEST_WORD])

    return None


def _gate_in(info: Dict[str, Any]) -> Union[bool, str]:
    """How access to a repository is granted ("auto", "manual"); False when all may read it."""
    gated = info.get("gated")
    if isinstance(gated, str):
        return printable(gated[:LONGEST_WORD])
    return bool(gated)


def _on_endpoint(url: str, endpoint: str) -> str:
    """The URL of a further page at the endpoint that we were given.

    Mirrors copy the Hub's absolute `Link` addresses: only their path counts.

    >>> _on_endpoint("https://huggingface.co/api/models/a/b/tree/x?cursor=1", "http://mirror:8090")
    'http://mirror:8090/api/models/a/b/tree/x?cursor=1'
    >>> _on_endpoint("https://huggingface.co/api/models/a/b/tree/x?cursor=1", "http://host/hub")
    'http://host/hub/api/models/a/b/tree/x?cursor=1'
    """
    link = urlsplit(urljoin(endpoint + "/", url))
    base = urlsplit(endpoint)
    here = urlunsplit((base.scheme, base.netloc, link.path, link.query, ""))
    return below_endpoint(here, endpoint)
