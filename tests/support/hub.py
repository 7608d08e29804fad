"""A Hub on loopback that can misbehave: hfship's own mirror, with every trap of the real Hub as a switch.

The Hub answers at 127.0.0.1 and sends large files to a CDN at `localhost` on the same port, so that they are different
origins, as huggingface.co and its CDN are. The CDN refuses requests that carry a token.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import struct
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hfship.base.report import Reporter
from hfship.hub.protocol import RemoteFile
from hfship.ops.catalogue import RepoCatalogue
from hfship.ops.mirror import HubHandler, MirrorServer
from hfship.ops.mirror_repo import MirrorRepo


@dataclass
class Faults:
    """Switches; everything off is a well-behaved Hub. Byte positions count within a file."""

    token: Optional[str] = None  # the only token that is valid
    token_dies_at: Optional[int] = (
        None  # after this many bytes the token is refused, until `token` is another one
    )
    gated: bool = False  # bytes need the token, the tree does not
    private: bool = False  # everything needs the token
    direct: bool = False  # no CDN: the Hub sends the bytes itself, as mirrors do
    cdn: str = ""  # send large files there: the base URL of another server over the same folder
    xet: Dict[str, str] = field(
        default_factory=dict
    )  # path -> Xet hash of a file that is in the store ...
    xet_store: str = ""  # ... at this address, which hf_xet understands
    expires_s: float = 3600.0  # life of a signed URL
    together: Optional[threading.Barrier] = None  # the CDN's first answers wait for each other
    refuse_signed_once: bool = False  # 403 to the first request of each file on the CDN
    ignore_range: bool = False  # 200 and the whole file, whatever was asked
    wrong_content_range: int = 0  # this many answers tell of another range than was asked for
    gzip: int = 0  # this many answers claim a compressed body
    needs_range: bool = False  # 400 to a request for a whole file, as the CDN does above 50 GB
    reset: bool = False  # a cut connection is reset instead of closed
    cut_at: Optional[int] = (
        None  # close the connection when a body reaches this byte of the file ...
    )
    cut_times: int = 1  # ... this many times
    stall_at: Optional[int] = None  # send nothing more from this byte on, once
    flip_at: Optional[int] = None  # damage this byte of every large file ...
    flip_times: int = 1  # ... this many times
    rate_bps: Optional[float] = None  # bytes a second over all connections together
    slow_connections: int = 0  # this many connections, the first ones, ...
    slow_bps: float = 100_000  # ... get only this many bytes a second each
    most_connections: int = 0  # while more bodies than this are on their way, all of them crawl
    missing: str = ""  # the end of a path that this server does not have
    too_many: int = 0  # answer 429 to this many requests ...
    too_many_headers: Dict[str, str] = field(default_factory=dict)  # ... with these headers
    unavailable: int = 0  # answer 503 with an HTML page to this many requests
    renamed_from: Optional[str] = None  # an old id that redirects (307) to org/tiny
    html: bool = False  # every API answer is a login page
    evil_path: Optional[str] = None  # an extra entry in the tree ...
    evil_size: int = 1  # ... of this size
    other_first: int = 0  # this many answers of the CDN are of another object than the later ones
    if_range: str = (
        "works"  # on the CDN; "ignored": the range comes anyhow, "refused": always the whole file
    )
    etags_vary: bool = False  # the CDN's servers have an ETag each for the same object
    moved: bool = False  # the redirect announces another commit than the listing
    tree_page: int = 1000
    clock_ahead_s: float = 0.0  # the server's clock, as its Date header tells it
    answer: Optional[Tuple[str, Tuple[int, Dict[str, str], str]]] = (
        None  # part of a path, and what it is answered
    )


@dataclass
class Traffic:
    """What the Hub saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    body_bytes: int = 0  # bytes of file content sent
    requests: List[Tuple[str, str, Dict[str, str]]] = field(
        default_factory=list
    )  # (method, path, headers)
    connections: int = 0
    bodies: int = 0  # on their way now
    most_bodies: int = 0
    refused_signed: Set[str] = field(default_factory=set)  # files that the CDN was asked for

    def paths(self, part: str) -> List[str]:
        return [path for _, path, _ in self.requests if part in path]


class FaultHandler(HubHandler):
    """The mirror's handler with the switches built in."""

    server: FaultServer
    slow = False
    other = False

    def serve(self) -> None:
        with self.server.traffic.lock:
            self.server.traffic.connections += 1
            self.slow = self.server.traffic.connections <= self.server.faults.slow_connections
        super().serve()

    def date(self) -> str:
        return formatdate(time.time() + self.server.faults.clock_ahead_s, usegmt=True)

    @property
    def target(self) -> str:
        """The path and the query."""
        return self.request.line.split(" ")[1]

    def route(self, path: str) -> None:
        faults, traffic = self.server.faults, self.server.traffic
        with traffic.lock:
            sent = self.request.fields.as_sent()
            traffic.requests.append((self.request.method, self.target, sent))
            too_many, faults.too_many = faults.too_many > 0, max(0, faults.too_many - 1)
            unavailable, faults.unavailable = faults.unavailable > 0, max(0, faults.unavailable - 1)
        if too_many:
            self.send_page(429, "slow down", faults.too_many_headers)
        elif unavailable:
            self.send_page(503, "<html>try later</html>")
        elif "/xet-read-token/" in path:
            said = {"X-Xet-Cas-Url": faults.xet_store, "X-Xet-Access-Token": "x"}
            self.send_json(
                200, {}, {**said, "X-Xet-Token-Expiration": str(int(time.time()) + 3600)}
            )
        elif path.startswith("/cdn/"):
            self.route_cdn(path)
        elif faults.html and path.startswith("/api/"):
            self.send_page(200, "<html>please log in</html>")
        elif faults.renamed_from and faults.renamed_from in path:
            self.send_page(
                307, "moved", {"Location": self.target.replace(faults.renamed_from, "org/tiny")}
            )
        elif faults.answer and faults.answer[0] in path:
            status, headers, body = faults.answer[1]
            self.send_page(status, body, headers)
        elif self.token_refused(path):
            pass
        elif faults.missing and path.endswith(faults.missing):
            self.send_error_code(404, "EntryNotFound", "Entry not found")
        else:
            super().route(path)

    def token_refused(self, path: str) -> bool:
        """Answer 401 as the Hub does when the token is missing or wrong."""
        faults, given = self.server.faults, self.request.fields.get("Authorization")
        dead = (
            faults.token_dies_at is not None
            and self.server.traffic.body_bytes > faults.token_dies_at
        )
        if given and (dead or given != f"Bearer {faults.token}"):
            self.send_error_code(401, "", "Invalid credentials in Authorization header")
            return True
        needs_token = faults.private or (
            faults.gated and ("/resolve/" in path or "auth-check" in path)
        )
        if needs_token and not given:
            if faults.private:
                self.send_json(401, {"error": "Invalid username or password."})
            else:
                self.send_error_code(401, "GatedRepo", "Access to model org/tiny is restricted.")
            return True
        return False

    def encoded(self, value: Any) -> bytes:
        if isinstance(value, dict) and "siblings" in value:
            value["gated"] = "manual" if self.server.faults.gated else False
        if isinstance(value, list) and value and self.server.faults.evil_path:
            entry = {
                "type": "file",
                "oid": "0" * 40,
                "size": self.server.faults.evil_size,
                "path": self.server.faults.evil_path,
            }
            value = [*value, entry]
        return super().encoded(value)

    def send_page(self, status: int, text: str, headers: Optional[Dict[str, str]] = None) -> None:
        self.send_head(status, len(text), {"Content-Type": "text/html", **(headers or {})})
        self.send_body(text.encode())

    # -- bytes

    def send_content(self, repo: MirrorRepo, file: RemoteFile) -> None:
        """Redirect as the Hub does: 302 to the signed CDN for LFS files, 307 to the cache for small ones."""
        faults = self.server.faults
        if faults.direct:
            super().send_content(repo, file)
            return
        commit = "f" * 40 if faults.moved else repo.commit
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{file.etag}"'}
        query = f"Expires={time.time() + faults.expires_s:.3f}&Signature=secretsignature"
        port = self.server.server_address[1]
        host = f"http://localhost:{port}" if file.sha256 else ""
        where = f"{host}/cdn/{repo.repo}/{quote(file.path)}?{query}"
        if faults.cdn and file.sha256:
            where = f"{faults.cdn}/{repo.repo}/{quote(file.path)}?{query}"
        if file.path in faults.xet:
            token = f"{self.base_url()}/api/models/{repo.repo}/xet-read-token/{repo.commit}"
            headers.update(
                {"X-Xet-Hash": faults.xet[file.path], "Link": f'<{token}>; rel="xet-auth"'}
            )
        headers.update({"Location": where, "X-Linked-Size": str(file.size)})
        self.send_page(302 if file.sha256 else 307, "Found. Redirecting", headers)

    def route_cdn(self, url_path: str) -> None:
        faults, traffic = self.server.faults, self.server.traffic
        org, name, path = url_path[len("/cdn/") :].split("/", 2)
        repo = self.server.catalogue.find("model", f"{org}/{name}")
        assert repo is not None
        file = repo.files[unquote(path)]
        expires = float(parse_qs(self.request.query)["Expires"][0])
        fields = self.request.fields
        on_cdn = self.request.host.startswith("localhost")
        if on_cdn and "Authorization" in fields:
            self.send_page(400, "Only one auth mechanism allowed")
            return
        if faults.together and len(traffic.paths("/cdn/")) <= faults.together.parties:
            faults.together.wait(60)
        with traffic.lock:
            first = url_path not in traffic.refused_signed
            traffic.refused_signed.add(url_path)
        if on_cdn and (time.time() > expires or (faults.refuse_signed_once and first)):
            self.send_page(403, "Request has expired")
            return
        if faults.needs_range and "Range" not in fields:
            self.send_page(400, "The requested file is too large")
            return
        self.other = bool(file.sha256) and self.still("other_first")
        if faults.if_range == "refused" and "If-Range" in fields:
            self.request = self.request.without_field("Range")
        if faults.if_range != "works":
            self.request = self.request.without_field("If-Range")
        etag = '"' + ("y" if self.other else "x") * 64 + '"' if file.sha256 else f'"{file.etag}"'
        if faults.etags_vary:
            etag = f'"{len(traffic.requests)}"'
        self.send_bytes(repo, file, etag, {} if on_cdn else {"X-Repo-Commit": repo.commit})

    def send_bytes(self, repo: MirrorRepo, file: RemoteFile, etag: str, headers: Any) -> None:
        self.size = file.size
        if self.server.faults.ignore_range:
            self.request = self.request.without_field("Range")
        super().send_bytes(repo, file, etag, headers)

    def send_head(self, status: int, length: int, headers: Any) -> None:
        headers = dict(headers)
        if status == 206 and self.still("wrong_content_range"):
            headers["Content-Range"] = "bytes 0-0/1"
        if status == 206 and self.still("gzip"):
            headers["Content-Encoding"] = "gzip"
        super().send_head(status, length, headers)

    def send_proven(
        self, repo: MirrorRepo, file: RemoteFile, fd: int, start: int, stop: int
    ) -> None:
        """Bytes [start, stop), with the faults that happen on the way."""
        faults, traffic = self.server.faults, self.server.traffic
        with traffic.lock:
            traffic.bodies += 1
            traffic.most_bodies = max(traffic.most_bodies, traffic.bodies)
        try:
            self.send_pieces(fd, start, stop, faults)
        finally:
            with traffic.lock:
                traffic.bodies -= 1

    def send_pieces(self, fd: int, start: int, stop: int, faults: Faults) -> None:
        step = (
            16 << 10 if faults.rate_bps else 64 << 10
        )  # a killed client's piece counts as sent, one per connection
        while start < stop:
            piece = bytearray(os.pread(fd, min(step, stop - start), start))
            if self.at(faults.cut_at, start, len(piece), "cut_times"):
                piece = piece[: (faults.cut_at or 0) - start]
                stop = start + len(piece)
                self.close_connection = True
                if faults.reset:  # a close without lingering sends RST
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    self.connection.close()
                    return
            if self.at(faults.stall_at, start, len(piece), "stall_at"):
                self.server.stopping.wait(60)
                self.close_connection = True
                return
            if self.size > 100_000 and self.at(faults.flip_at, start, len(piece), "flip_times"):
                piece[(faults.flip_at or 0) - start] ^= 1
            if self.other:
                piece[0] ^= 1
            self.pace(len(piece))
            self.write(piece)
            with self.server.traffic.lock:
                self.server.traffic.body_bytes += len(piece)
            start += len(piece)

    def still(self, counter: str) -> bool:
        """Is this fault still to happen? Counts down."""
        with self.server.traffic.lock:
            left = getattr(self.server.faults, counter)
            setattr(self.server.faults, counter, left - 1)
            return bool(left > 0)

    def at(self, position: Optional[int], start: int, length: int, counter: str) -> bool:
        """Does this piece hold the position, and is the fault still to happen?"""
        if position is None or not start <= position < start + length:
            return False
        if counter == "stall_at":
            self.server.faults.stall_at = None
            return True
        return self.still(counter)

    def pace(self, count: int) -> None:
        """All connections together send at most `rate_bps`; slow ones and crowds get less."""
        faults = self.server.faults
        crowded = faults.most_connections and self.server.traffic.bodies > faults.most_connections
        if self.slow or crowded:
            time.sleep(count / faults.slow_bps)
        rate = faults.rate_bps
        if not rate:
            return
        with self.server.traffic.lock:
            now = time.monotonic()
            self.server.next_free = max(now, self.server.next_free) + count / rate
            wait = self.server.next_free - now
        time.sleep(wait)


class FaultServer(MirrorServer):
    """The Hub, with its switches and its log."""

    faults: Faults
    traffic: Traffic
    stopping: threading.Event
    next_free = 0.0

    @property
    def tree_page(self) -> int:
        return self.faults.tree_page

    @tree_page.setter
    def tree_page(self, _: int) -> None:
        pass


class FaultHub:
    """Context manager: a FaultServer in a thread over a folder of repositories ORG/NAME."""

    def __init__(
        self, root: Path, certificate: Optional[Path] = None, host: str = "127.0.0.1"
    ) -> None:
        self.root, self.certificate, self.host = root, certificate, host
        root.mkdir(parents=True, exist_ok=True)
        self.faults = Faults()
        self.traffic = Traffic()

    def add(self, folder: Path, repo: str = "org/tiny") -> Path:
        """Publish a copy of a model folder."""
        target = self.root / repo
        shutil.copytree(folder, target)
        return target

    @property
    def url(self) -> str:
        return self.server.url.replace("http:", "https:") if self.certificate else self.server.url

    def forget(self) -> None:
        """Start counting traffic anew."""
        self.traffic = self.server.traffic = Traffic()

    def __enter__(self) -> FaultHub:
        reporter = Reporter(progress="none", verbosity=-1)
        # As it is published: the Hub looks into no weights.
        catalogue = RepoCatalogue(self.root, judge=lambda *_: ())
        self.server = FaultServer.__new__(FaultServer)
        self.server.faults, self.server.traffic = self.faults, self.traffic
        self.server.stopping = threading.Event()
        FaultServer.__init__(self.server, (self.host, 0), catalogue, reporter, FaultHandler)
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stopping.set()
        self.server.shutdown()
        self.server.server_close()


def path_of(url: str) -> str:
    """The path of a request line."""
    return urlsplit(url).path
