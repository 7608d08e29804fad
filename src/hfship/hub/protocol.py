# SPDX-License-Identifier: Apache-2.0
"""The Hub's HTTP protocol. Pure.

Owns what a request to the Hub looks like and what an answer brings: addresses of the API and of the
bytes of a file, the entries and pages of a file tree, redirects, signed URLs and their end.
Promises: a redirect never leads from https to http; a number in a header is a number that a clock
or a disk can have, or none; no text made here shows a password or the signature of a URL.
Never: touches a socket or a disk, sleeps, or looks at the clock where the time can be given.
Sources: huggingface_hub 2.4 and hub-docs; the Hub's OpenAPI leaves most of this out.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple
from urllib.parse import parse_qsl, quote, unquote, urljoin, urlsplit, urlunsplit

from hfship.base.card import Card
from hfship.base.errors import NetworkError, UsageError, command_line
from hfship.base.imagefacts import KIND, familiar
from hfship.base.manifest import _COMMIT, _REPO_ID, _SHA256
from hfship.base.redaction import redact
from hfship.base.settings import DEFAULT_ENDPOINT
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.base.manifest import Source

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 15.0  # no byte for this long is a stall
MAX_REDIRECTS = 20
MAX_CHANGES = 2  # of an object under one address; then its ETags differ from server to server
MAX_API_BYTES = 64 << 20  # one page of a tree: about 300 bytes per file, at most 1,000 files
URL_RENEWAL_S = 120.0  # a signed URL is renewed when it has less than this left
REDIRECTS = frozenset({301, 302, 303, 307, 308})

LONGEST_LINK = 8 << 10  # characters of a Link header; a cursor has some hundred
LONGEST_PATH = 4096  # PATH_MAX of limits.h
LARGEST_FILE = 1 << 60  # bytes; no filesystem has larger ones
SIGNATURES = frozenset({"signature", "x-amz-signature", "x-goog-signature", "sig"})

HUB_HOSTS = ("huggingface.co", "hf.co")
# Pages that look like the Hub's, of sites which have no such API.
NO_HUBS = ("modelscope.cn", "modelscope.ai", "github.com", "gitlab.com", "kaggle.com")
DEFAULT_PORTS = {"https": 443, "http": 80}

# A page of the Hub: .../ORG/NAME, .../datasets/ORG/NAME, .../ORG/NAME/tree/REVISION/FOLDER,
# .../ORG/NAME/blob/REVISION/FILE
_PAGE = re.compile(
    r"""
    /(?:models/)?
    (?P<type>datasets/|spaces/)?
    (?P<repo>[^/@]+(?:/(?!(?:tree|blob|resolve|raw)/)[^/@]+)?)
    (?:
        /(?P<kind>tree|blob|resolve|raw)
        /(?P<revision>refs/[^/]+/[^/]+|[^/]+)
        (?:/(?P<path>.+?))?
    )?
    /?$
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it.

    `size` is in bytes. LFS and Xet files have a `sha256`; for the others `git_sha1` is the git
    blob id. Some proxies of the Hub tell neither: nothing would prove such a file.
    """

    path: str
    size: int
    git_sha1: str
    sha256: Optional[str] = None

    @property
    def etag(self) -> str:
        """What huggingface_hub records for it: the SHA-256, or the git blob id of small files; ""
        where there is no hash."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    source: Source
    files: Tuple[RemoteFile, ...]
    card: Card = Card()

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


# -- what an operator types, and what is proposed to type


def parse_repo(text: str, endpoint: str = DEFAULT_ENDPOINT) -> Tuple[str, Optional[str]]:
    """(repository, revision) of "ORG/NAME[@REV]" or of an address copied from a browser.

    Raises UsageError for anything else.

    >>> parse_repo("Qwen/Qwen3-8B@refs/pr/1")
    ('Qwen/Qwen3-8B', 'refs/pr/1')
    >>> parse_repo("https://huggingface.co/Qwen/Qwen3-8B/tree/main")
    ('Qwen/Qwen3-8B', 'main')
    """
    if text.startswith(("http://", "https://")):
        return _parse_page(text, endpoint)

    name = re.sub(r"^hf://(models/)?", "", text)
    repo, _, revision = name.partition("@")
    repo = repo.rstrip("/")
    if not _REPO_ID.match(repo):
        raise UsageError(
            f"{text!r} is not a repository",
            "",
            "give it as ORG/NAME or ORG/NAME@REVISION, for example Qwen/Qwen3-8B",
        )

    return repo, revision or None


def _parse_page(url: str, endpoint: str) -> Tuple[str, Optional[str]]:
    """(repository, revision) of a page of the Hub.

    Raises UsageError, with the command to type, for a page that says more than that: another Hub,
    a dataset, one file.
    """
    page = _page_parts(url)
    repo = page.get("repo", "")
    host = origin(url)[1]
    if is_no_hub(host):
        names = re.match("/(?:models/)?([^/]+/[^/]+)", urlsplit(url).path)
        raise no_hub(host, names[1] if names else "")
    if not _REPO_ID.match(repo):
        raise UsageError(
            f"{redact(url)} is not the page of a repository",
            "",
            "give the repository as ORG/NAME",
        )

    revision = page.get("revision")
    flags = _endpoint_flags(url, endpoint) + _page_flags(page)
    if not flags:
        return repo, revision
    if revision:
        repo += f"@{revision}"
    what = f"{redact(url)} is more than the name of a repository"
    raise UsageError(what, "", command_line("hfship", "fetch", repo, *flags))


def _page_parts(url: str) -> Dict[str, str]:
    """What a page is of, by the groups of _PAGE. A quoted slash is part of a name: the branch
    feature/x has the page tree/feature%2Fx."""
    try:
        page = _PAGE.match(urlsplit(url).path)
        origin(url)
    except ValueError as exc:  # a port or an IPv6 address that is none
        raise UsageError(f"{redact(url)} is no address", str(exc), "give it as ORG/NAME") from exc
    if not page:
        return {}
    return {name: unquote(text) for name, text in page.groupdict().items() if text}


def is_no_hub(host: str) -> bool:
    """Is it the host of a site that is known to have no Hub API?

    >>> is_no_hub("www.modelscope.cn"), is_no_hub("huggingface.co")
    (True, False)
    """
    return any(host == one or host.endswith(f".{one}") for one in NO_HUBS)


def no_hub(host: str, repo: str = "") -> UsageError:
    """The error for a page or an endpoint there."""
    if not _REPO_ID.match(repo):
        repo = "ORG/NAME"
    step = command_line("hfship", "fetch", repo)
    return UsageError(
        f"{host} has no Hub API",
        "hfship fetches from huggingface.co and what speaks as it does",
        f"{step} (if huggingface.co has it, too)",
    )


def _endpoint_flags(url: str, endpoint: str) -> List[str]:
    """The flags of fetch that ask the Hub which has the page `url`; none for the Hub in use."""
    scheme, host, _ = origin(url)
    _, own_host, _ = origin(endpoint)
    if host == own_host or host in HUB_HOSTS:
        return []
    # A user and a password stay out of what is printed.
    _, _, host_and_port = urlsplit(url).netloc.rpartition("@")
    return ["--endpoint", f"{scheme}://{host_and_port}"]


def _page_flags(page: Mapping[str, str]) -> List[str]:
    """The flags of fetch that ask for no more than a page shows."""
    flags: List[str] = []
    if "type" in page:
        repo_type = page["type"].rstrip("/").rstrip("s")
        flags += ["--repo-type", repo_type]
    if "path" in page:
        pattern = page["path"]
        if page["kind"] == "tree":  # a folder
            pattern += "/"
        flags += ["--include", pattern]

    return flags


def image_word(source: Source, revision: str) -> str:
    """What an operator types for an image, at a tag or a digest."""
    joint = "@" if revision.startswith("sha256:") else ":"
    return f"docker://{familiar(source.repo)}{joint}{revision}"


def fetch_command(source: Source, revision: str, folder: Path, *flags: str) -> str:
    """The command that brings a repository at a revision into `folder`."""
    if source.repo_type == KIND:
        words = [*flags, image_word(source, revision), "-o", str(folder.parent)]
        usual = f"{source.repo.rpartition('/')[2]}_{revision}"
        if folder.name != usual:
            words += ["--name", folder.name]
        return command_line("hfship", "fetch", *words)
    repo = source.repo
    if revision != "main":
        repo += f"@{revision}"
    words = [*flags, repo, "-o", str(folder.parent)]
    if folder.name != source.repo.rpartition("/")[2]:
        words += ["--name", folder.name]
    if source.repo_type != "model":
        words += ["--repo-type", source.repo_type]
    if source.endpoint != DEFAULT_ENDPOINT:
        words += ["--endpoint", source.endpoint]
    return command_line("hfship", "fetch", *words)


# -- addresses


def api_url(endpoint: str, repo_type: str, repo: str, *parts: str) -> str:
    """A URL below the Hub's API.

    Every part is quoted, '/' included, so `refs/pr/1` stays one segment.

    >>> api_url("https://hub", "dataset", "a/b", "tree", "refs/pr/1")
    'https://hub/api/datasets/a/b/tree/refs%2Fpr%2F1'
    """
    url = f"{endpoint}/api/{repo_type}s/{repo}"
    for part in parts:
        quoted = quote(part, safe="")
        url += "/" + quoted
    return url


def resolve_url(source: Source, path: str) -> str:
    """Where the bytes of a file are asked for."""
    repo = source.resolved_repo
    if source.repo_type != "model":
        repo = f"{source.repo_type}s/{repo}"
    return f"{source.endpoint}/{repo}/resolve/{source.commit}/{quote(path)}"


@lru_cache(maxsize=64)
def origin(url: str) -> Tuple[str, str, int]:
    """(scheme, host, port) of a URL. Raises ValueError for a port that is none.

    >>> origin("https://Hub.example/x")
    ('https', 'hub.example', 443)
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
    return parts.scheme, host, port


def redirect_target(url: str, location: str, endpoint: str) -> str:
    """The absolute URL that a redirect of `url` leads to.

    Raises NetworkError when it leads to no address, or from https to http.

    >>> redirect_target("http://host/hub/a/b/resolve/x", "/api/resolve-cache/y", "http://host/hub")
    'http://host/hub/api/resolve-cache/y'
    """
    step = "check HF_ENDPOINT and the proxy"
    try:
        target = urljoin(url, location)
        if location.startswith("/") and origin(url) == origin(endpoint):
            target = below_endpoint(target, endpoint)
        scheme, host, _ = origin(target)
        if scheme not in DEFAULT_PORTS or not host:
            raise ValueError(f"{scheme}: is neither http nor https")
        if not re.fullmatch(r"[^\s\x00-\x1f]+", target):
            raise ValueError("it has blanks in it")
    except ValueError as exc:
        raise NetworkError(
            "the Hub redirects to what is no address",
            str(exc)[:100],
            step,
        ) from exc

    if url.startswith("https://") and not target.startswith("https://"):
        what = "the Hub redirects from https to an unencrypted address"
        raise NetworkError(what, f"{origin(url)[1]} -> {host}", step)

    return target


def below_endpoint(url: str, endpoint: str) -> str:
    """An address of the endpoint's host, with the path below which the endpoint is.

    A Hub behind a proxy that gives it a path of its own does not know of that path. One that does
    names addresses with at least the first folder of it in common.

    >>> below_endpoint("http://host/api/x", "http://host/hub")
    'http://host/hub/api/x'
    >>> below_endpoint("http://host/repository/b/x", "http://host/repository/hub")
    'http://host/repository/b/x'
    """
    base = urlsplit(endpoint).path
    parts = urlsplit(url)
    if not base or parts.netloc != urlsplit(endpoint).netloc:
        return url
    first = base.split("/")[1]
    if parts.path.split("/")[1:2] == [first]:
        return url
    return urlunsplit(parts._replace(path=base + parts.path))


def is_signed(url: str) -> bool:
    """Does the query of a URL hold a signature?

    >>> is_signed("https://cdn/x?Expires=1&Signature=y"), is_signed("https://hub/x?download=true")
    (True, False)
    """
    return any(name in SIGNATURES for name in _query(url))


def header_number(text: str) -> Optional[float]:
    """A number of a header or a query as RFC 9110 writes them, or with a fraction; None for what
    is none that a clock or a disk can have.

    >>> header_number("3600"), header_number("17.25"), header_number("inf"), header_number("9" * 20)
    (3600.0, 17.25, None, None)
    """
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", text):
        return float(text)
    return None


def strong_etag(header: str) -> str:
    """An ETag that names one object and can be sent back; "" where there is none.

    >>> strong_etag('"abc"'), strong_etag('W/"abc"'), strong_etag("a b")
    ('"abc"', '', '')
    """
    if header.startswith("W/") or not re.fullmatch(r"[!-~]{1,500}", header):
        return ""
    return header


def url_expiry(url: str, now: float) -> Optional[float]:
    """Unix time at which a signed URL stops working; None when it does not say.

    CloudFront writes `Expires`, S3 `X-Amz-Date` and `X-Amz-Expires`; a lone `X-Amz-Expires` counts
    from `now` (Unix time). In a form that we do not know: when the URL has ended, a 403 says so.

    >>> url_expiry("https://cdn/x?Expires=1700000000&Signature=y", 0.0)
    1700000000.0
    >>> url_expiry("https://s3/x?X-Amz-Date=20231114T221320Z&X-Amz-Expires=60", 0.0)
    1700000060.0
    """
    query = _query(url)
    if "expires" in query:
        return header_number(query["expires"])
    life_s = header_number(query.get("x-amz-expires", ""))
    if life_s is None:
        return None

    signed_at = now
    if "x-amz-date" in query:
        try:
            date = datetime.strptime(query["x-amz-date"], "%Y%m%dT%H%M%SZ")
        except ValueError:
            return None
        signed_at = date.replace(tzinfo=timezone.utc).timestamp()
    return signed_at + life_s


def _query(url: str) -> Dict[str, str]:
    """The last value of each name in the query of a URL, names in lower case."""
    try:
        pairs = parse_qsl(urlsplit(url).query, max_num_fields=100)
    except ValueError:  # too many
        return {}
    return {name.lower(): value for name, value in pairs}


# -- the file tree


def next_page(link_header: str) -> Optional[str]:
    """The rel="next" URL of a Link header (RFC 8288); other relations may share the header.

    >>> next_page('<https://h/auth>; rel="xet-auth", <https://h/t?cursor=A>; rel="next"')
    'https://h/t?cursor=A'

    Raises ValueError for one that is longer than any has reason to be.
    """
    if len(link_header) > LONGEST_LINK:
        raise ValueError(f"it sends a Link header of {len(link_header)} characters")
    for target, parameters in re.findall(r"<([^<>]*)>([^<]*)", link_header):
        if re.search(r'rel="?([^";,]* )?next\b', parameters):
            return str(target)
    return None


def repo_file(item: Mapping[str, Any]) -> RemoteFile:
    """One entry of a tree answer, or of the `siblings` of a repository asked for with blobs=true;
    without hash and size where the entry has no hash of the content.

    In a tree the SHA-256 is `lfs.oid` (in `siblings` it is `lfs.sha256`), and the entry's own `oid`
    is then only the hash of the LFS pointer. A proxy may pass on the `xetHash` of such a file and
    leave the rest out. The path is as the Hub gives it: who wants the file checks it. Raises
    ValueError, KeyError, TypeError or AttributeError for an entry of another form.
    """
    path = entry_path(item)
    lfs = item.get("lfs") or {}
    sha256 = lfs.get("oid", lfs.get("sha256"))
    git_sha1 = item.get("oid", item.get("blobId")) or ""
    if item.get("xetHash", lfs) and not sha256:
        git_sha1 = ""  # it is that of the pointer
    if not sha256 and not git_sha1:
        return RemoteFile(path, 0, "")

    size: Any = lfs.get("size", item.get("size"))
    usable = type(size) is int and 0 <= size <= LARGEST_FILE and _are_hashes(sha256, git_sha1)
    if not usable:
        raise ValueError(f"unusable entry for {path!r:.100}")

    return RemoteFile(
        path=path,
        size=size,
        git_sha1=git_sha1,
        sha256=sha256,
    )


def entry_path(item: Mapping[str, Any]) -> str:
    """The path of an entry, which `siblings` call rfilename. Raises KeyError, ValueError."""
    path = item.get("path") or item["rfilename"]
    if type(path) is not str or len(path) > LONGEST_PATH:
        raise ValueError(f"unusable path {path!r:.100}")
    return path


def _are_hashes(sha256: Any, git_sha1: Any) -> bool:
    if git_sha1 and not _COMMIT.match(git_sha1):
        return False
    return not sha256 or bool(_SHA256.match(sha256))


def git_blob_sha1(size: int) -> Any:
    """A hash object that gives the git blob id once fed with the `size` bytes of the file."""
    return hashlib.sha1(b"blob %d\0" % size)
