# SPDX-License-Identifier: Apache-2.0
"""What the mirror answers to a request, with a catalogue that is played and no network; test_mirror.py
has clients."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import pytest

from hfship import __version__
from hfship.base.below import identity_of
from hfship.base.errors import UsageError
from hfship.base.manifest import Source
from hfship.base.settings import Token
from hfship.hub.protocol import RemoteFile
from hfship.ops import mirror as room
from hfship.ops.http_request import BadRequest, Fields, Request
from hfship.ops.mirror import HubHandler, MirrorServer, load_tls, token_in
from hfship.ops.mirror_repo import MirrorRepo

CONTENT = bytes(range(200))


class Catalogue:
    """Of one repository, or of none; notes what is withdrawn."""

    def __init__(self, folder: Path) -> None:
        path = folder / "w"
        path.write_bytes(CONTENT)
        source = Source("", "org/m", "main", "org/m", "c" * 40)
        files = {
            "w": RemoteFile("w", 200, "1" * 40, "2" * 64),
            "a b": RemoteFile("a b", 0, "3" * 40),
        }
        identities = {"w": identity_of(path.stat())}
        self.repo = MirrorRepo(source, folder, files, identities)
        self.asked: List[Tuple[str, ...]] = []
        self.withdrawn: List[str] = []
        self.left_out: Dict[str, str] = {}
        self.is_complete = True

    def find(self, repo_type: str, repo: str, revision: str = "main") -> Optional[MirrorRepo]:
        self.asked.append((repo_type, repo, revision))
        known = (repo_type, repo, revision) in (("model", "org/m", "main"), ("model", "m", "a/b"))
        return self.repo if known else None

    def repos(self) -> List[MirrorRepo]:
        return [self.repo]

    def branches(self, repo: MirrorRepo) -> Mapping[str, str]:
        return {"main": repo.commit}

    def withdraw(self, repo: MirrorRepo, why: str) -> None:
        assert repo is self.repo
        self.withdrawn.append(why)


class Played(HubHandler):
    """A handler that keeps its answer; between two writes something may happen."""

    def __init__(self, catalogue: Any, **server: Any) -> None:
        self.server = SimpleNamespace(  # type: ignore[assignment]
            **{
                "catalogue": catalogue,
                "token": None,
                "making": threading.Lock(),
                "tree_page": 1000,
                "url": "http://mirror:8090",
                "reporter": SimpleNamespace(warn=lambda text: self.warned.append(text)),
                "log_access": lambda line: self.logged.append(line),
                **server,
            }
        )
        self.close_connection = False
        self.client_address = ("10.0.0.7", 1)
        self.status, self.sent = 0, 0
        self.headers: Dict[str, str] = {}
        self.body = b""
        self.memory: List[int] = []
        self.warned: List[str] = []
        self.logged: List[str] = []
        self.posted = b""
        self.meanwhile: Any = lambda: None

    def ask(self, target: str, method: str = "GET", **fields: str) -> Tuple[int, Any]:
        """The status, and the body as JSON where it is."""
        path, _, query = target.partition("?")
        lines = {name.lower().replace("_", "-"): (name, value) for name, value in fields.items()}
        host = fields.get("Host", "h:80")
        self.request = Request(method, path, query, 1, host, Fields(lines))
        self.status, self.sent, self.body, self.headers = 0, 0, b"", {}
        self.answer()
        with contextlib.suppress(ValueError):
            return self.status, json.loads(self.body)
        return self.status, self.body

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers, self.length = status, dict(headers), length

    def send_body(self, body: bytes) -> None:
        self.body += body

    def send_file(self, fd: int, start: int, stop: int) -> None:
        self.body += os.pread(fd, stop - start, start)
        self.meanwhile()

    @contextlib.contextmanager
    def memory_for(self, size: int) -> Iterator[None]:
        self.memory.append(size)
        yield

    def read_body(self) -> bytes:
        return self.posted


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path)


@pytest.fixture
def mirror(catalogue: Catalogue) -> Played:
    return Played(catalogue)


KIND = "application/json; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "method", "status", "said"),
    [
        ("/health", "GET", 200, {"hfship": __version__}),
        ("/health", "POST", 200, {"hfship": __version__}),
        ("/api/whoami-v2", "GET", 200, room.WHO_AM_I),
        ("/api/models/org/m/treesize/main", "GET", 200, {"path": "/", "size": 200}),
        ("/api/models/org/m/auth-check", "GET", 200, {}),
        ("/api/models/m/auth-check/a%2Fb", "GET", 200, {}),
        ("/api/models/org/m/refs", "GET", 200, room.repo_refs({"main": "c" * 40})),
        ("/api/none", "GET", 404, {"error": "no such page"}),
        ("/api", "GET", 404, {"error": "no such page"}),
        ("/x", "GET", 404, {"error": "no such page"}),
        ("/resolve", "GET", 404, {"error": "no such page"}),
        ("/api/models/org/m/tree/main/none", "GET", 404, {"error": "none does not exist on this revision"}),
        ("/api/models/org/m/tree/v9", "GET", 404, None),
        ("/org/m", "PUT", 403, {"error": "This mirror is read-only: nothing can be uploaded or changed here"}),
        ("/api/datasets", "GET", 200, []),
    ],
)  # fmt: skip
def test_what_a_path_is_answered_with(
    path: str, method: str, status: int, said: Any, mirror: Played
) -> None:
    found, body = mirror.ask(path, method)
    assert found == status and (said is None or body == json.loads(json.dumps(said)))
    assert mirror.headers["Content-Type"] == KIND
    assert mirror.length == len(mirror.body) and mirror.memory[-1] == mirror.length
    if status >= 400 and said:
        assert mirror.headers["X-Error-Message"] == said["error"]
    assert not mirror.server.making.locked()


def test_information_of_a_repository(mirror: Played, catalogue: Catalogue) -> None:
    for path in ("", "/revision/main"):
        status, info = mirror.ask(f"/api/models/org/m{path}")
        assert status == 200 and info == json.loads(json.dumps(room.repo_info(catalogue.repo)))
    assert catalogue.asked == [("model", "org/m", "main")] * 2
    status, rows = mirror.ask("/api/models?search=m&search=none")
    assert (status, rows) == (200, []), "the last value counts"
    _, rows = mirror.ask("/api/models?search=M")
    assert [row["id"] for row in rows] == ["org/m"]


def test_pages_lead_to_the_next_one(mirror: Played) -> None:
    mirror.server.tree_page = 1
    status, rows = mirror.ask("/api/models/org/m/tree/main?x=1")
    assert status == 200 and [row["path"] for row in rows] == ["a b"]
    place = "http://h:80/api/models/org/m/tree/main?x=1&cursor=1&limit=1"
    assert mirror.headers["Link"] == f'<{place}>; rel="next"'
    _, rows = mirror.ask("/api/models/org/m/tree/main?cursor=1&limit=1")
    assert [row["path"] for row in rows] == ["w"] and "Link" not in mirror.headers


@pytest.mark.parametrize(
    ("host", "fields", "base"),
    [
        ("h:80", {}, "http://h:80"),
        ("[::1]:80", {}, "http://[::1]:80"),
        ("", {}, "http://mirror:8090"),
        ("a b", {}, "http://mirror:8090"),
        ("h", {"X_Forwarded_Proto": "https"}, "https://h"),
        ("h", {"X_Forwarded_Proto": "ftp"}, "http://h"),
        ("h", {"X_Forwarded_Prefix": "/hub/"}, "http://h/hub"),
        ("h", {"X_Forwarded_Prefix": "hub"}, "http://h"),
    ],
)
def test_the_mirror_as_its_client_reaches_it(
    host: str, fields: Dict[str, str], base: str, mirror: Played
) -> None:
    mirror.ask("/health", Host=host, **fields)
    assert mirror.base_url() == base


def test_paths_that_are_asked_for(mirror: Played) -> None:
    mirror.posted = b'{"paths": ["w", "none"]}'
    kind = {"Content_Type": "application/json"}
    status, rows = mirror.ask(
        "/api/models/org/m/paths-info/main", "POST", Content_Length="24", **kind
    )
    assert status == 200 and [row["path"] for row in rows] == ["w"]
    assert mirror.memory == [24, mirror.length]
    mirror.memory.clear()
    mirror.ask("/api/models/org/m/paths-info/main", "POST", Transfer_Encoding="chunked")
    assert mirror.memory[0] == room.BODY_SIZE


# -- what is not there


@pytest.mark.parametrize(
    ("path", "complete", "status", "code", "message"),
    [
        ("/api/models/org/m/revision/v9", True, 404, "RevisionNotFound", "Invalid rev id: v9"),
        (f"/org/m/resolve/{'x' * 300}/w", True, 404, "RevisionNotFound", f"Invalid rev id: {'x' * 200}"),
        ("/api/models/org/m/revision/v9", False, 404, "RevisionNotFound", "Invalid rev id: v9"),
        ("/api/models/org/none", True, 404, "RepoNotFound", "Repository not found"),
        ("/api/models/org/none", False, 503, "NotYet", "ask again in a while"),
        ("/api/datasets/org/m", True, 404, "RepoNotFound", "Repository not found"),
        ("/spaces/org/m/resolve/main/w", True, 404, "RepoNotFound", "Repository not found"),
        ("/org/m/resolve/main/none", True, 404, "EntryNotFound", "Entry not found"),
        ("/org/m/resolve/main", True, 404, "EntryNotFound", "Entry not found"),
        ("/org/m/resolve", True, 404, "RevisionNotFound", "Invalid rev id: "),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_the_hubs_words(
    path: str,
    complete: bool,
    status: int,
    code: str,
    message: str,
    mirror: Played,
    catalogue: Catalogue,
) -> None:
    catalogue.is_complete = complete
    assert mirror.ask(path)[0] == status
    assert mirror.headers["X-Error-Code"] == code and message in mirror.headers["X-Error-Message"]
    assert ("Retry-After" in mirror.headers) == (status == 503)
    commit = mirror.headers.get("X-Repo-Commit")
    assert commit == ("c" * 40 if code == "EntryNotFound" else None)


def test_why_a_model_is_not_served_is_said(mirror: Played, catalogue: Catalogue) -> None:
    catalogue.left_out = {f"o{number}/Lost": f"why {number}" for number in range(5)}
    catalogue.left_out["other"] = "another"
    mirror.ask("/api/models/org/lost")
    said = mirror.headers["X-Error-Message"]
    assert said == "Repository not found; why 0; why 1; why 2"


# -- who may ask


TOKEN = Token("hf_secret", "file")
BASIC = "Basic " + base64.b64encode(b"me:hf_secret").decode()


@pytest.mark.parametrize(
    ("given", "accept", "status", "code", "login"),
    [
        ("Bearer hf_secret", "", 200, None, None),
        ("bearer hf_secret", "", 200, None, None),
        (BASIC, "", 200, None, None),
        ("", "", 401, "RepoNotFound", "Bearer"),
        ("Bearer wrong", "", 401, "", "Bearer"),
        ("hf_secret", "", 401, "", "Bearer"),
        ("Basic aGZfc2VjcmV0", "", 401, "", "Bearer"),
        ("", "text/html", 401, None, room.LOGIN),
    ],
)
def test_a_token_lets_in(
    given: str, accept: str, status: int, code: Any, login: Any, catalogue: Catalogue
) -> None:
    mirror = Played(catalogue, token=TOKEN)
    fields = {"Authorization": given} if given else {}
    found, _ = mirror.ask("/api/models", Accept=accept, **fields)
    assert found == status and mirror.headers.get("X-Error-Code") == code
    assert mirror.headers.get("WWW-Authenticate") == login
    assert mirror.ask("/health")[0] == 200, "anybody may ask whether it is there"
    if accept:
        mirror.ask("/", Accept=accept)
        assert mirror.headers["Content-Type"].startswith("text/html") and mirror.body


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer a b", b"a b"),
        ("Bearer \xe9", b"\xe9"),
        ("Basic " + base64.b64encode(b"u:p:q").decode(), b"p:q"),
        ("Basic bWU=", b""),
        ("Basic \xe9", b""),
        ("Digest x", b""),
        ("", b""),
    ],
)
def test_the_token_in_a_header(header: str, token: bytes) -> None:
    assert token_in(header) == token


# -- the list at the root


def test_the_list_for_programs_and_for_people(mirror: Played, catalogue: Catalogue) -> None:
    catalogue.left_out = {"x": "why"}
    status, said = mirror.ask("/")
    assert status == 200 and mirror.headers["Vary"] == "Accept"
    assert said == {
        "hfship": __version__,
        "repos": ["org/m"],
        "left_out": {"x": "why"},
        "models": [room.overview_row(catalogue.repo)],
    }
    status, page = mirror.ask("/", Accept="text/html")
    assert status == 200 and mirror.headers["Content-Type"].startswith("text/html")
    assert b"org/m" in page and b"why" in page and b"http://h:80" in page


# -- files


OF_FILE = {
    "ETag": f'"{"2" * 64}"',
    "X-Repo-Commit": "c" * 40,
    "X-Linked-Size": "200",
    "X-Linked-Etag": f'"{"2" * 64}"',
}


@pytest.mark.parametrize("tail", [64 << 10, 30])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("fields", "status", "start", "stop"),
    [
        ({}, 200, 0, 200),
        ({"Range": "bytes=10-19"}, 206, 10, 20),
        ({"Range": "bytes=190-"}, 206, 190, 200),
        ({"Range": "bytes=200-"}, 416, 0, 0),
        ({"Range": "bytes=1-2", "If_Range": OF_FILE["ETag"]}, 206, 1, 3),
        ({"Range": "bytes=1-2", "If_Range": '"other"'}, 200, 0, 200),
    ],
)
def test_bytes_of_a_file(
    fields: Dict[str, str],
    status: int,
    start: int,
    stop: int,
    method: str,
    tail: int,
    mirror: Played,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "_TAIL", tail)
    found, _ = mirror.ask("/org/m/resolve/main/w", method, **fields)
    assert found == status
    assert mirror.body == (CONTENT[start:stop] if method == "GET" else b"")
    expected = dict(OF_FILE)
    if status == 416:
        expected["Content-Range"] = "bytes */200"
    else:
        expected.update({"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"})
    if status == 206:
        expected["Content-Range"] = f"bytes {start}-{stop - 1}/200"
    assert mirror.headers == expected and mirror.length == stop - start


def test_a_file_that_changed_is_withdrawn(
    mirror: Played, catalogue: Catalogue, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(b"other")
    status, said = mirror.ask("/org/m/resolve/main/w")
    assert status == 503 and mirror.headers["Retry-After"] == "2"
    assert said == {"error": "w has changed; the mirror looks at it again"}
    assert mirror.headers["X-Error-Code"] == "Changed"
    assert catalogue.withdrawn == ["w has changed"] and not mirror.close_connection


def test_a_file_that_changes_on_the_way_loses_its_end(
    mirror: Played, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_TAIL", 30)
    mirror.meanwhile = lambda: os.utime(tmp_path / "w", (1, 1))
    status, body = mirror.ask("/org/m/resolve/main/w")
    assert status == 200 and mirror.close_connection
    assert mirror.body == CONTENT[:170] and catalogue.withdrawn == ["w has changed"]
    assert body == CONTENT[:170]


def test_a_file_that_cannot_be_read_ends_no_mirror(
    mirror: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(Played, "send_file", fail)
    mirror.ask("/org/m/resolve/main/w")
    assert mirror.status == 200 and mirror.close_connection, "it was begun"
    assert mirror.warned == ["/org/m/resolve/main/w: input/output error"]
    monkeypatch.setattr(Played, "send_bytes", fail)
    mirror.close_connection = False
    status, said = mirror.ask("/org/m/resolve/main/w")
    assert status == 500 and mirror.headers["X-Error-Code"] == "InternalError"
    assert "cannot be read" in said["error"] and mirror.close_connection


def test_a_client_that_is_gone_is_no_fault(mirror: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(Played, "send_bytes", gone)
    with pytest.raises(ConnectionResetError):
        mirror.ask("/org/m/resolve/main/w")
    assert mirror.warned == []


@pytest.mark.parametrize(("status", "retry"), [(503, "1"), (400, None)])
def test_what_is_no_request_is_refused_in_the_same_form(
    status: int, retry: Any, mirror: Played
) -> None:
    mirror.refuse(BadRequest(status, "why"))
    assert (mirror.status, mirror.headers.get("Retry-After")) == (status, retry)
    assert mirror.headers["X-Error-Code"] == "BadRequest" and b"why" in mirror.body


# -- the log


def test_a_line_of_the_access_log_has_no_token(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.time, "gmtime", lambda: (2026, 1, 2, 3, 4, 5, 0, 0, 0))
    mirror = Played(catalogue, token=Token("open-sesame", "file"))
    mirror.ask(
        "/x?t=open-sesame&u=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        User_Agent='a"b\\\x1b',
        Referer="/r",
    )
    mirror.status, mirror.sent = 404, 7
    mirror.over()
    (line,) = mirror.logged
    head, request, result, referer, _, agent, _ = line.split('"')
    assert head == "10.0.0.7 - - [02/Jan/2026:03:04:05 +0000] " and result == " 404 7 "
    assert request.startswith("GET /x?t=") and request.endswith(" HTTP/1.1")
    assert "sesame" not in line and "abcdefgh" not in line
    assert (referer, agent) == ("/r", "a?b??")
    mirror.ask("/health")
    mirror.over()
    assert mirror.logged[1].endswith('"-" "-"')


def server_of(log: Any) -> Any:
    made: Any = MirrorServer.__new__(MirrorServer)
    said: List[Tuple[str, str]] = []
    made.reporter = SimpleNamespace(
        detail=lambda text: said.append(("detail", text)),
        warn=lambda text: said.append(("warn", text)),
    )
    made.said, made._access_log, made._log_is_lost = said, log, False
    return made


def test_a_log_that_cannot_be_written_is_said_once_each_time(tmp_path: Path) -> None:
    plain = server_of(None)
    plain.log_access("line")
    assert plain.said == [("detail", "line")]
    path = tmp_path / "logs/access"
    server = server_of(path)
    for _ in range(2):
        server.log_access("lost")
    assert server.said == [("warn", f"cannot write {path}: No such file or directory")]
    path.parent.mkdir()
    before = set(os.listdir("/proc/self/fd"))
    server.log_access("one")
    server.log_access("two")
    assert path.read_text() == "one\ntwo\n" and set(os.listdir("/proc/self/fd")) == before
    path.rename(tmp_path / "rotated")
    path.parent.rmdir()
    server.log_access("lost")
    assert len(server.said) == 2, "it was written meanwhile"


def test_files_of_tls_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nonsense")
    with pytest.raises(UsageError, match="TLS cannot use") as told:
        load_tls(tmp_path / "cert.pem", None)
    assert "--tls-cert" in told.value.next_step
