# SPDX-License-Identifier: Apache-2.0
"""The page of a site: what `status --site` shows, for browsers, read-only.

It listens at a socket in the gateway's folder, which nobody but the gateway reaches, and that lets
in whose key has the right `ops` (site/gateway). Promises: however many look, the site is read once
in FRESH_S. Never: changes anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Callable, List, Mapping, Sequence, Tuple

from hfship.base.errors import HfshipError, HostError
from hfship.base.files import disk_errors
from hfship.ops.http_request import BadRequest
from hfship.ops.http_server import Connection, HttpServer
from hfship.ops.page import HEADERS, as_text, page_text, wants_page
from hfship.site.overview import COLUMNS
from hfship.site.readings import GPU_COLUMNS
from hfship.site.terms import PAGE_ROUTE, PAGE_SOCKET

if TYPE_CHECKING:
    from pathlib import Path

    from hfship.base.report import Reporter
    from hfship.site.overview import SiteView

FRESH_S = 2.0
REFRESH_S = 5  # after which a browser asks again


def site_page(view: SiteView, now: str) -> str:
    """The whole page."""
    replicas = [row.cells() for row in view.replicas]
    parts = _table("Replicas", replicas, COLUMNS)
    parts += _table("GPUs", [gpu.cells() for gpu in view.gpus], GPU_COLUMNS)
    parts += [f"<h2>Keys in use</h2><p>{as_text(view.keys_text)}</p>"]
    parts += _list("To look at", view.troubles)
    parts += _list("Alerts of Prometheus", view.alerts)
    return page_text("Models of this site", f"{now}: {view.headline}", parts)


def _table(title: str, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> List[str]:
    if not rows:
        return []
    lines = [f'<h2>{title}</h2><div class="wide"><table>', _row("th", columns)]
    lines += [_row("td", [row[column] for column in columns]) for row in rows]
    return [*lines, "</table></div>"]


def _row(tag: str, cells: Sequence[str]) -> str:
    inside = "".join(f"<{tag}>{as_text(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inside}</tr>"


def _list(title: str, lines: Sequence[str]) -> List[str]:
    if not lines:
        return []
    items = "".join(f"<li>{as_text(line)}</li>" for line in lines)
    return [f"<h2>{title}</h2><ul>{items}</ul>"]


class PageHandler(Connection):
    """The connection of the gateway."""

    server: PageServer

    def answer(self) -> None:
        """Answer a GET of the page, which programs get as JSON."""
        request = self.request
        if request.path != PAGE_ROUTE or request.method not in ("GET", "HEAD"):
            self.refuse(BadRequest(404, "no such page"))
            return
        try:
            view, now = self.server.view()
        except HfshipError as exc:
            self.refuse(BadRequest(500, exc.what))
            return
        if wants_page(request.fields.get("Accept")):
            page = site_page(view, now)
            headers = {**HEADERS, "Refresh": str(REFRESH_S)}
            self._send(200, page, headers)
        else:
            self._send_json(200, view.json())

    def refuse(self, error: BadRequest) -> None:
        """Answer what is no request for us."""
        self._send_json(error.status, {"error": {"message": error.why}})

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value) + "\n", {"Content-Type": "application/json"})

    def _send(self, status: int, text: str, headers: Mapping[str, str]) -> None:
        body = text.encode()
        self.send_head(status, len(body), {**headers, "Cache-Control": "no-store"})
        self.send_body(body)


class PageServer(HttpServer):
    """Serves the page at the socket in a gateway's folder. Raises HostError, DiskError."""

    def __init__(self, folder: Path, look: Callable[[], SiteView], reporter: Reporter) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._seen: Tuple[float, SiteView, str] = (0.0, None, "")  # type: ignore[assignment]
        _make_way(folder)
        # A path to a socket has 107 bytes at most; through the folder it is always short.
        with disk_errors("open", folder):
            fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            address = f"/proc/self/fd/{fd}/{PAGE_SOCKET}"
            super().__init__(address, PageHandler, reporter)
        finally:
            os.close(fd)

    def view(self) -> Tuple[SiteView, str]:
        """The site as it was a moment ago, and when that was. Raises HfshipError."""
        with self._lock:
            at, view, when = self._seen
            if not when or time.monotonic() > at + FRESH_S:
                view = self._look()
                when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
                self._seen = (time.monotonic(), view, when)
            return view, when


def _make_way(folder: Path) -> None:
    """Remove the socket of a server that is gone. Raises HostError where one still answers."""
    path = folder / PAGE_SOCKET
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    address = f"/proc/self/fd/{fd}/{PAGE_SOCKET}"
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe, contextlib.suppress(
            OSError
        ):
            probe.connect(address)
            raise HostError("the page of this site is served already", str(path), "")
        with disk_errors("remove", path), contextlib.suppress(FileNotFoundError):
            path.unlink()
    finally:
        os.close(fd)
