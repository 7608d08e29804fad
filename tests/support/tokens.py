"""What a registry with `auth: token` needs beside it: a service that signs its tokens, and a CDN for its blobs."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List
from urllib.parse import parse_qs, urlsplit

from support.network import Certificate

ISSUER, SERVICE = "tests", "registry.test"
LEEWAY_S = (
    60  # docker-registry takes a token for so long after its end (registry/auth/token/token.go)
)


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


class _Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.server.owner
        owner.headers.append(dict(self.headers))
        status, headers, body = owner.answer(self.path, self.headers.get("Range", ""))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Service)


class _Side:
    """A server on loopback, with the headers of all that asked it."""

    def __init__(self) -> None:
        self.headers: List[Dict[str, str]] = []
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Any:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class TokenService(_Side):
    """Signs tokens (RS256, with the chain in `x5c`) that the registry takes for `life_s` seconds. Its clock is behind
    by what the registry allows, or they would live for a minute at least."""

    def __init__(self, certificate: Certificate, life_s: float) -> None:
        super().__init__()
        self._certificate = certificate
        self.life_s = life_s
        self.tokens: List[str] = []

    @property
    def settings(self) -> str:
        """For the configuration of the registry."""
        return (
            f"auth: {{token: {{realm: '{self.url}/token', service: {SERVICE}, issuer: {ISSUER},"
            f" rootcertbundle: {self._certificate.cert}}}}}"
        )

    def answer(self, target: str, _: str) -> Any:
        asked = parse_qs(urlsplit(target).query)
        access = []
        for scope in asked.get("scope", []):
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        token = self._signed(access)
        self.tokens.append(token)
        body = {"token": token, "expires_in": int(self.life_s)}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    def _signed(self, access: List[Dict[str, Any]]) -> str:
        pem = self._certificate.cert.read_text()
        found = re.search("-----BEGIN CERTIFICATE-----(.*?)-----END", pem, re.S)
        assert found
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": "",
            "aud": SERVICE,
            "exp": int(time.time() + self.life_s - LEEWAY_S),
            "nbf": now - 3600,
            "iat": now - 3600,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        head = {"typ": "JWT", "alg": "RS256", "x5c": ["".join(found[1].split())]}
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (head, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", str(self._certificate.key)]
        done = subprocess.run(command, input=signed.encode(), stdout=subprocess.PIPE, check=True)
        return f"{signed}.{_base64url(done.stdout)}"


class SigningCdn(_Side):
    """Serves the files below a folder, and refuses every second range, as where a signature has ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._ranges = 0

    def answer(self, target: str, wanted: str) -> Any:
        path = self._folder / urlsplit(target).path.lstrip("/")
        content = path.read_bytes()
        if not wanted:
            return 200, {}, content
        self._ranges += 1
        if self._ranges % 2 == 0:
            return 403, {}, b""
        first, last = (int(end) for end in wanted[len("bytes=") :].split("-"))
        told = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return 206, told, content[first : last + 1]
