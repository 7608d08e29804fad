"""The page of a site at its socket: what is answered, how often the site is read, and who is told no."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest

from hfship.base.errors import HostError
from hfship.base.report import Reporter
from hfship.base.values import replace
from hfship.ops import site_page as room
from hfship.ops.site_page import PageServer, site_page
from hfship.site.terms import PAGE_SOCKET
from test_site_page import VIEW


class Look:
    """Reads the site, and counts how often."""

    def __init__(self) -> None:
        self.count = 0
        self.failure: Any = None

    def __call__(self) -> Any:
        self.count += 1
        if self.failure:
            raise self.failure
        return VIEW


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a gateway, with a path that is longer than that of a socket may be."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "x" * 100)
        (folder / PAGE_SOCKET).parent.mkdir(parents=True)
        yield folder


@pytest.fixture
def look() -> Look:
    return Look()


@pytest.fixture
def served(folder: Path, look: Look) -> Iterator[PageServer]:
    with PageServer(folder, look, Reporter("none", -1)) as server:
        server.way = os.open(folder, os.O_PATH)  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        os.close(server.way)  # type: ignore[attr-defined]


def ask(server: PageServer, path: str = "/ops", **fields: str) -> Tuple[int, Dict[str, str], bytes]:
    """(status, headers, body) of a GET, or of another method."""
    method = fields.pop("method", "GET")
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(f"/proc/self/fd/{server.way}/{PAGE_SOCKET}")  # type: ignore[attr-defined]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        while True:
            piece = connection.recv(1 << 16)
            if not piece:
                break
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *rows = head.decode().split("\r\n")
    headers = dict(row.lower().split(": ", 1) for row in rows)
    return int(status.split()[1]), headers, body


def test_browsers_get_a_page_and_programs_json(served: PageServer) -> None:
    status, headers, body = ask(served, Accept="text/html")
    assert (status, headers["refresh"], headers["cache-control"]) == (200, "5", "no-store")
    assert headers["content-type"].startswith("text/html") and b"Models of this site" in body
    assert int(headers["content-length"]) == len(body)
    status, headers, body = ask(served, Accept="*/*")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == json.loads(json.dumps(VIEW.json()))
    assert headers["cache-control"] == "no-store" and "refresh" not in headers


def test_what_is_not_the_page_is_not_found(served: PageServer, look: Look) -> None:
    for path, method in (("/", "GET"), ("/ops/x", "GET"), ("/ops", "DELETE")):
        status, _, body = ask(served, path, method=method)
        assert status in (404, 405, 501), (path, method)
        assert json.loads(body)["error"]["message"]
    assert look.count == 0
    status, _, body = ask(served, method="HEAD")
    assert (status, body) == (200, b"")


def test_a_site_that_cannot_be_read_is_told(served: PageServer, look: Look) -> None:
    look.failure = HostError("no gateway answers", "why", "")
    status, _, body = ask(served)
    assert (status, json.loads(body)) == (500, {"error": {"message": "no gateway answers"}})


def test_however_many_look_the_site_is_read_once_in_a_while(
    served: PageServer, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    first = served.view()
    clock[0] += room.FRESH_S
    assert served.view() == first and look.count == 1
    clock[0] += 0.1
    served.view()
    assert look.count == 2


def test_one_page_is_served_for_a_site(served: PageServer, folder: Path, look: Look) -> None:
    with pytest.raises(HostError, match="served already"):
        PageServer(folder, look, Reporter("none", -1))


def test_the_socket_of_one_that_is_gone_is_replaced(folder: Path, look: Look) -> None:
    for _ in range(2):  # the first one leaves its socket
        PageServer(folder, look, Reporter("none", -1)).server_close()
        assert (folder / PAGE_SOCKET).is_socket()


def test_a_page_has_a_table_for_what_there_is_alone() -> None:
    text = site_page(VIEW, "now")
    assert "<h2>Replicas</h2>" in text and "<th>" in text and "<td>" in text
    assert "<h2>Keys in use</h2><p>alice" in text
    assert "<h2>To look at</h2><ul><li>" in text and "now: " in text
    bare = site_page(replace(VIEW, replicas=(), gpus=(), troubles=(), alerts=()), "now")
    for title in ("Replicas", "GPUs", "To look at", "Alerts of Prometheus"):
        assert title not in bare and title in text
