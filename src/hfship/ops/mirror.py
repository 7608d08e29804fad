# SPDX-License-Identifier: Apache-2.0
"""The mirror: a folder of models as a private, read-only Hub.

Owns the serving side of the Hub's API, so that `HF_ENDPOINT=http://HOST:PORT hf download ORG/NAME`,
transformers and vLLM work inside the site. The folder holds NAME/ or ORG/NAME/ with plain files,
and the same below datasets/ and spaces/ where no manifest says what they are; several folders of
one repository are its revisions. Promises: what a manifest calls ORG/NAME at a commit is served
under that name and commit, or not at all; a file leaves only as it was proven. Never: lets anything
outside of the listed files be read; writes.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import threading
import time
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    List,
    Mapping,
    Optional,
    Tuple,
    Type,
)
from urllib.parse import parse_qs, unquote

from hfship import __version__
from hfship.base.errors import UsageError
from hfship.base.eventlog import open_log
from hfship.base.files import write_all
from hfship.base.redaction import redact
from hfship.ops.http_request import BadRequest, parse_byte_range
from hfship.ops.http_server import BODY_SIZE, CLIENT_GONE, Connection, HttpServer
from hfship.ops.hub_api import (
    API_FOLDERS,
    PAGE,
    WHO_AM_I,
    asked_paths,
    overview_row,
    parse_question,
    repo_info,
    repo_page,
    repo_refs,
    tree_entries,
    tree_page,
)
from hfship.ops.mirror_page import login_page, overview_page
from hfship.ops.mirror_repo import ChangedError
from hfship.ops.page import HEADERS, wants_page

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.base.settings import Token
    from hfship.hub.protocol import RemoteFile
    from hfship.ops.catalogue import RepoCatalogue
    from hfship.ops.hub_api import Page, Question
    from hfship.ops.mirror_repo import MirrorRepo

_TAIL = 64 << 10  # bytes at the end of a file that wait until it is known to be the same still
_MOST_QUOTED = 200  # characters of a request in an answer
_MOST_REASONS = 3
LOGIN = 'Basic realm="token as password", charset="UTF-8"'  # RFC 7617: what browsers ask for


def token_in(authorization: str) -> bytes:
    """The token in a header: what programs send as Bearer, and browsers as the password of Basic,
    whatever the user name; b"" where there is none.

    >>> token_in("Bearer hf_1"), token_in("Basic bWU6aGZfMQ=="), token_in("Basic ?")
    (b'hf_1', b'hf_1', b'')
    """
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.encode("latin-1")
    if scheme.lower() != "basic":
        return b""
    try:
        login = base64.b64decode(value.encode("latin-1"), validate=True)
    except ValueError:
        return b""
    return login.partition(b":")[2]


def _last_part(repo_id: str) -> str:
    return repo_id.lower().rpartition("/")[2]


class HubHandler(Connection):
    """The connection of a Hub client.

    Subclasses (the test Hub) override the small steps to misbehave.
    """

    server: MirrorServer

    def answer(self) -> None:
        """Answer, whatever happens."""
        try:
            self.route(self.request.path)
        except CLIENT_GONE:
            raise
        except OSError as exc:  # a file that vanished or cannot be read must not end the mirror
            self.close_connection = True
            self.server.reporter.warn(f"{self.request.path[:_MOST_QUOTED]}: {exc.strerror}")
            if not self.status:
                message = "the file cannot be read; the mirror's log says why"
                self.send_error_code(500, "InternalError", message)

    def refuse(self, error: BadRequest) -> None:
        """Answer what is no request, or no request for us."""
        headers = {}
        if error.status == 503:
            headers["Retry-After"] = "1"
        self.send_error_code(error.status, "BadRequest", error.why, headers)

    def over(self) -> None:
        """Write the access log."""
        self.server.log_access(self.access_line())

    def access_line(self) -> str:
        """The request in the combined format of web servers.

        No token is in it, and no byte that a terminal obeys.
        """
        fields = self.request.fields
        request = self._loggable(self.request.line)
        referer = self._loggable(fields.get("Referer", "-"))
        agent = self._loggable(fields.get("User-Agent", "-"))
        now = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime())
        client = f"{self.client_address[0]} - - [{now}]"
        return f'{client} "{request}" {self.status} {self.sent} "{referer}" "{agent}"'

    def _loggable(self, text: str) -> str:
        secret_values = []
        if self.server.token:
            secret_values.append(self.server.token.value)
        redacted = redact(text, secret_values)
        return re.sub(r'[^ -~]|["\\]', "?", redacted)

    # ---- finding what is asked for

    def refused(self) -> bool:
        """Whether the token is missing or wrong; the 401 is then sent.

        It has the Hub's own words, so that clients say theirs; a browser gets a page, and asks for
        the token itself.
        """
        token = self.server.token
        if token is None:
            return False

        given = self.request.fields.get("Authorization")
        if secrets.compare_digest(token_in(given), token.value.encode()):
            return False

        if wants_page(self.request.fields.get("Accept")):
            page = login_page(self.base_url())
            self.send_encoded(401, page.encode(), {**HEADERS, "WWW-Authenticate": LOGIN})
            return True

        code, message = "RepoNotFound", "Invalid username or password."
        if given:
            code, message = "", "Invalid credentials in Authorization header"
        self.send_error_code(401, code, message, {"WWW-Authenticate": "Bearer"})
        return True

    def route(self, path: str) -> None:
        """Answer a request for a path, which is still quoted."""
        # Segments are unquoted one by one: a revision may hold an encoded '/'.
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/health":
            self.send_json(200, {"hfship": __version__})
        elif self.refused():
            pass
        elif self.request.method not in ("GET", "HEAD") and "paths-info" not in parts:
            message = "This mirror is read-only: nothing can be uploaded or changed here"
            self.send_error_code(403, "ReadOnly", message)
        elif parts[0] == "api" and parts[1:2] and parts[1] in API_FOLDERS:
            self.route_api(parts[1:])
        elif "resolve" in parts[1:]:
            self.route_file(parts)
        elif path == "/":
            self.send_overview()
        else:
            self.send_error_code(404, "EntryNotFound", "no such page")

    def route_api(self, parts: List[str]) -> None:
        """/api/whoami-v2 and /api/models[/ID[/VERB[/REV[/PATH...]]]]."""
        folder, *rest = parts
        query = self._query()
        if folder == "whoami-v2":
            self.send_json(200, WHO_AM_I)
        elif rest:
            question = parse_question(rest)
            repo = self.find(question.repo_id, folder[:-1], question.revision)
            if repo:
                self.answer_question(question, repo, query)
        else:
            repos = self.server.catalogue.repos()
            with self.server.making:
                page = repo_page(repos, folder[:-1], query)
                body = self.encoded(page.rows)
            self.send_encoded(200, body, self._link_of(page))

    def _query(self) -> Mapping[str, str]:
        """The query of the request; of a repeated name the last value."""
        return {key: values[-1] for key, values in parse_qs(self.request.query).items()}

    def answer_question(
        self, question: Question, repo: MirrorRepo, query: Mapping[str, str]
    ) -> None:
        """Answer what is asked about a repository."""
        if question.verb == "tree":
            self.send_tree(repo, question.path, query)
        elif question.verb == "paths-info":
            self.send_paths_info(repo)
        elif question.verb == "refs":
            commits = self.server.catalogue.branches(repo)
            self.send_json(200, repo_refs(commits))
        elif question.verb == "treesize":
            self.send_json(200, {"path": "/", "size": repo.size})
        elif question.verb == "auth-check":
            self.send_json(200, {})
        else:
            with self.server.making:
                body = self.encoded(repo_info(repo))
            self.send_encoded(200, body)

    def find(self, repo_id: str, repo_type: str, revision: str) -> Optional[MirrorRepo]:
        """The repository asked for; None when a 404 was sent that says what is not there."""
        catalogue = self.server.catalogue
        repo = catalogue.find(repo_type, repo_id, revision)
        if repo:
            return repo
        if catalogue.find(repo_type, repo_id):
            message = f"Invalid rev id: {revision[:_MOST_QUOTED]}"
            self.send_error_code(404, "RevisionNotFound", message)
            return None

        if not catalogue.is_complete:
            message = "The mirror is still looking through its folder; ask again in a while"
            self.send_error_code(503, "NotYet", message, {"Retry-After": "10"})
            return None

        name = _last_part(repo_id)
        reasons = ["Repository not found"]
        for left_out, why in catalogue.left_out.items():
            if _last_part(left_out) == name:
                reasons.append(why)

        message = "; ".join(reasons[: 1 + _MOST_REASONS])
        self.send_error_code(404, "RepoNotFound", message)
        return None

    # ---- answers

    def send_overview(self) -> None:
        """What the mirror serves and what it does not: a page for browsers, JSON for programs."""
        catalogue = self.server.catalogue
        repos = catalogue.repos()
        left_out = catalogue.left_out
        if wants_page(self.request.fields.get("Accept")):
            wants_token = self.server.token is not None
            with self.server.making:
                page = overview_page(
                    self.base_url(), repos, left_out, wants_token, catalogue.is_complete
                )
            self.send_encoded(200, page.encode(), HEADERS)
            return

        rows = [overview_row(repo) for repo in repos]
        names = [repo.repo for repo in repos]
        overview = {
            "hfship": __version__,
            "repos": names,
            "left_out": left_out,
            "models": rows,
        }
        self.send_json(200, overview, {"Vary": "Accept"})

    def send_tree(self, repo: MirrorRepo, below: str, query: Mapping[str, str]) -> None:
        """One page of the tree; the cursor is the position of the next entry."""
        with self.server.making:
            page = tree_page(repo, below, query, self.server.tree_page)
            body = b""
            if page:
                body = self.encoded(page.rows)

        if page:
            self.send_encoded(200, body, self._link_of(page))
        else:
            message = f"{below[:_MOST_QUOTED]} does not exist on this revision"
            self.send_error_code(404, "EntryNotFound", message)

    def send_paths_info(self, repo: MirrorRepo) -> None:
        """What is known of the paths that a POST asks for."""
        size = BODY_SIZE if self.request.is_chunked else self.request.body_length
        with self.memory_for(size):
            body = self.read_body()
            with self.server.making:
                wanted = asked_paths(body, self.request.fields.get("Content-Type"))
                answer = self.encoded(tree_entries(repo, wanted))

        self.send_encoded(200, answer)

    def _link_of(self, page: Page) -> Mapping[str, str]:
        """The header that leads to the next page."""
        if not page.next_query:
            return {}
        address = f"{self.base_url()}{self.request.path}?{page.next_query}"
        return {"Link": f'<{address}>; rel="next"'}

    def base_url(self) -> str:
        """This mirror as its client reaches it, maybe through a proxy that ends TLS, and below a
        path of it."""
        host = self.request.host
        if not re.fullmatch(r"[\w.:\[\]-]+", host, re.ASCII):
            return self.server.url

        own_scheme = self.server.url.partition("://")[0]
        scheme = self.request.fields.get("X-Forwarded-Proto")
        if scheme not in ("http", "https"):
            scheme = own_scheme
        prefix = self.request.fields.get("X-Forwarded-Prefix").rstrip("/")
        if not re.fullmatch(r"(/[\w.~%-]+)*", prefix, re.ASCII):
            prefix = ""

        return f"{scheme}://{host}{prefix}"

    def route_file(self, parts: List[str]) -> None:
        """[datasets/|spaces/]ID/resolve/REV/PATH"""
        repo_type = "model"
        if parts[0] in ("datasets", "spaces"):
            repo_type = parts.pop(0)[:-1]
        at = parts.index("resolve")
        revision, *path = parts[at + 1 :] or [""]
        repo = self.find("/".join(parts[:at]), repo_type, revision)
        if repo is None:
            return

        file = repo.files.get("/".join(path))
        if file:
            self.send_content(repo, file)
        else:
            commit = {"X-Repo-Commit": repo.commit}
            self.send_error_code(404, "EntryNotFound", "Entry not found", commit)

    def send_content(self, repo: MirrorRepo, file: RemoteFile) -> None:
        """The bytes of a file, or the range asked for, by sendfile."""
        etag = f'"{file.etag}"'
        headers = {
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(file.size),
            "X-Linked-Etag": etag,
        }
        self.send_bytes(repo, file, etag, headers)

    def send_bytes(
        self, repo: MirrorRepo, file: RemoteFile, etag: str, headers: Mapping[str, str]
    ) -> None:
        """Answer GET or HEAD for a file, with ranges."""
        wanted = self.request.fields.get("Range")
        if self.request.fields.get("If-Range", etag) != etag:
            wanted = ""
        try:
            with repo.opened(file.path) as fd:
                self.send_range(repo, file, fd, wanted, {"ETag": etag, **headers})
        except ChangedError as exc:
            self.server.catalogue.withdraw(repo, str(exc))
            if self.status:  # the client must not take what it got for the whole
                self.close_connection = True
                return
            message = f"{exc}; the mirror looks at it again"
            self.send_error_code(503, "Changed", message, {"Retry-After": "2"})

    def send_range(
        self, repo: MirrorRepo, file: RemoteFile, fd: int, wanted: str, headers: Mapping[str, str]
    ) -> None:
        """What a Range header asks for of an open file. Raises ChangedError."""
        try:
            span = parse_byte_range(wanted, file.size)
        except ValueError:
            self.send_head(416, 0, {"Content-Range": f"bytes */{file.size}", **headers})
            return

        of_file = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            **headers,
        }
        start, stop = 0, file.size
        if span:
            start, stop = span
            of_file["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
            self.send_head(206, stop - start, of_file)
        else:
            self.send_head(200, file.size, of_file)

        if self.request.method != "HEAD" and stop > start:
            self.send_proven(repo, file, fd, start, stop)

    def send_proven(
        self, repo: MirrorRepo, file: RemoteFile, fd: int, start: int, stop: int
    ) -> None:
        """Bytes [start, stop) of an open file, the last of them only if it is the same still.

        So a client that gets all of them gets what was proven, or fetches again. Raises
        ChangedError.
        """
        middle = max(start, stop - _TAIL)
        self.send_file(fd, start, middle)
        tail = os.pread(fd, stop - middle, middle)
        repo.require_proven(file.path, fd)
        self.send_body(tail)

    def encoded(self, value: object) -> bytes:
        """A value as JSON."""
        return json.dumps(value).encode()

    def send_json(
        self, status: int, value: object, headers: Optional[Mapping[str, str]] = None
    ) -> None:
        """A whole answer in JSON."""
        self.send_encoded(status, self.encoded(value), headers)

    def send_encoded(
        self, status: int, body: bytes, headers: Optional[Mapping[str, str]] = None
    ) -> None:
        """A whole answer in JSON that was made already. Raises BadRequest."""
        kind = {"Content-Type": "application/json; charset=utf-8"}
        with self.memory_for(len(body)):
            self.send_head(status, len(body), {**kind, **(headers or {})})
            self.send_body(body)

    def send_error_code(
        self, status: int, code: str, message: str, headers: Optional[Mapping[str, str]] = None
    ) -> None:
        """An error in the Hub's form."""
        named = {
            "X-Error-Code": code,
            "X-Error-Message": message,
        }
        if headers:
            named.update(headers)
        self.send_json(status, {"error": message}, named)


class MirrorServer(HttpServer):
    """The mirror.

    `token`: what every client must send; `tls`: an ssl.SSLContext. Raises HostError when it cannot
    listen at `address`, which is (host, port).
    """

    def __init__(
        self,
        address: Tuple[str, int],
        catalogue: RepoCatalogue,
        reporter: Reporter,
        handler: Type[HubHandler] = HubHandler,
        tree_page: int = PAGE,
        token: Optional[Token] = None,
        tls: Any = None,
        access_log: Optional[Path] = None,
    ) -> None:
        self.catalogue = catalogue
        self.tree_page = tree_page
        self.token = token
        self.making = threading.Lock()  # of long answers: one at a time needs the memory for it
        self._access_log = access_log
        self._log_is_lost = False  # and that was said
        super().__init__(address, handler, reporter, tls)

    def log_access(self, line: str) -> None:
        """Write a line to the access log, or to the details where there is none.

        The file is opened for each line, so that logrotate may take it away.
        """
        path = self._access_log
        if path is None:
            self.reporter.detail(line)
            return

        try:
            fd = open_log(path)
            try:
                write_all(fd, f"{line}\n".encode("ascii"))
            finally:
                os.close(fd)
        except OSError as exc:  # no reason to fail a client, nor to say so for each of them
            if not self._log_is_lost:
                self.reporter.warn(f"cannot write {path}: {exc.strerror}")
            self._log_is_lost = True
        else:
            self._log_is_lost = False


def load_tls(certificate: Path, key: Optional[Path]) -> Any:
    """The TLS side of a server. Raises UsageError for files that do not fit."""
    import ssl  # costs 10 ms that other commands need not spend

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=lambda: b"")  # never ask at a terminal
    except (OSError, ValueError) as exc:
        step = (
            "give --tls-cert the PEM file of the certificate and its chain, "
            "--tls-key that of its key, no password"
        )
        raise UsageError(f"TLS cannot use {certificate}", str(exc), step) from exc

    return context
