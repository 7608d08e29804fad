"""Registries of images for tests: images made of bytes, a small registry with faults, and the real docker-registry."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

OCI = "application/vnd.oci.image"
MANIFEST, INDEX, CONFIG = f"{OCI}.manifest.v1+json", f"{OCI}.index.v1+json", f"{OCI}.config.v1+json"


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def layer_of(files: Dict[str, bytes]) -> bytes:
    """A tar of files; one that is named like a program can be run."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "little")


def zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(content)


COMPRESSION = {
    "gzip": ("+gzip", lambda content: gzip.compress(content, 1, mtime=0)),
    "zstd": ("+zstd", zstd),
    "plain": ("", bytes),
}


class Image(NamedTuple):
    """Blobs by digest, the manifest, and what is known of it."""

    blobs: Dict[str, bytes]
    manifest: bytes
    layers: List[str]
    config: str
    diff_ids: List[str]

    @property
    def digest(self) -> str:
        return digest(self.manifest)


def make_image(
    layers: Sequence[bytes],
    compression: str = "gzip",
    architecture: str = "amd64",
    labels: Optional[Dict[str, str]] = None,
    command: Sequence[str] = ("/hello",),
    config: bytes = b"",
) -> Image:
    """An image of these tars, with a config of its own or one that fits."""
    suffix, compress = COMPRESSION[compression]
    packed = [compress(layer) for layer in layers]
    diff_ids = [digest(layer) for layer in layers]
    config = config or dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": list(command), "Labels": labels or {}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": f"layer {number}"} for number in range(len(layers))],
        }
    )
    described = [
        {"mediaType": f"{OCI}.layer.v1.tar{suffix}", "digest": digest(blob), "size": len(blob)}
        for blob in packed
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest(config), "size": len(config)},
        "layers": described,
    }
    blobs = {digest(blob): blob for blob in (config, *packed)}
    return Image(blobs, dumps(manifest), [digest(b) for b in packed], digest(config), diff_ids)


def small_image(size: int = 200_000, seed: int = 0, **options: Any) -> Image:
    """Two layers: one of noise, one with a text."""
    base = layer_of({"noise": noise(size, seed)})
    top = layer_of({"etc/hello": b"hello from the top layer\n"})
    return make_image([base, top], **options)


def make_index(images: Dict[str, Image], attestation: bool = True) -> bytes:
    """An index of images by architecture, with an attestation as buildx adds it."""
    entries = [
        {
            "mediaType": MANIFEST,
            "digest": image.digest,
            "size": len(image.manifest),
            "platform": {"os": "linux", "architecture": architecture},
        }
        for architecture, image in images.items()
    ]
    if attestation:
        entries.append(
            {
                "mediaType": MANIFEST,
                "digest": "sha256:" + "0" * 64,
                "size": 2,
                "platform": {"os": "unknown", "architecture": "unknown"},
            }
        )
    return dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})


# ---- a small registry with faults


class Faults:
    """Switches of a FaultRegistry; numbers count down."""

    def __init__(self) -> None:
        self.user = ""  # USER:PASSWORD that a token, or with `basic` the registry, asks for
        self.basic = False
        self.tokens = False  # hand out tokens, anonymous where there is no `user`
        self.token_uses = 0  # requests that a token is good for; 0: all
        self.cdn = False  # redirect blobs to another port ...
        self.cdn_refuses = 0  # ... which answers 403 so often, as where a signature has ended
        self.ignore_range = False
        self.flip = ""  # digest of a blob that comes with a flipped byte ...
        self.flip_times = 0  # ... so often
        self.cut = 0  # blob answers that end early
        self.wrong_digest = False  # manifests come with another Docker-Content-Digest
        self.limit: Dict[str, str] = {}  # headers of a 429 for manifests
        self.too_many = 0  # answers of 429 without words
        self.missing: List[str] = []  # digests that are not there
        self.answer: Optional[Tuple[int, Dict[str, str], bytes]] = None  # for every manifest
        self.rate_bps = 0.0  # of all blobs together
        self.refuse_chunks = False  # PATCH of an upload gives 405
        self.upload_s = 0.0  # seconds that a chunk takes
        self.lose_upload = 0  # uploads that are cut after half of the body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultRegistryServer

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, headers: Dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, **headers: str) -> None:
        body = dumps({"errors": [{"code": code, "message": message}]})
        self._send(status, {"Content-Type": "application/json", **headers}, body)

    def do_GET(self) -> None:
        registry = self.server.registry
        with registry.lock:
            sent = self.headers.get("Authorization", "")
            registry.requests.append((self.command, self.path, sent))
        path = self.path.partition("?")[0]
        if path == "/token":
            self._token(sent)
        elif self.server.is_cdn and registry.faults.cdn_refuses > 0:
            registry.faults.cdn_refuses -= 1
            self._send(403, {}, b"<Error/>")
        elif self.server.is_cdn:
            self._blob(path.rpartition("/")[2])
        elif self._admitted(sent):
            self._route(path)

    do_HEAD = do_GET

    def _token(self, sent: str) -> None:
        faults = self.server.registry.faults
        wanted = "Basic " + base64.b64encode(faults.user.encode()).decode()
        if faults.user and sent != wanted:
            self._error(401, "UNAUTHORIZED", "incorrect username or password")
            return
        token = f"token{len(self.server.registry.tokens)}"
        self.server.registry.tokens[token] = faults.token_uses or 10**9
        self._send(200, {}, dumps({"token": token, "expires_in": 300}))

    def _admitted(self, sent: str) -> bool:
        registry = self.server.registry
        faults = registry.faults
        if faults.basic:
            wanted = "Basic " + base64.b64encode(faults.user.encode()).decode()
            if sent != wanted:
                self._error(401, "UNAUTHORIZED", "no", **{"WWW-Authenticate": 'Basic realm="r"'})
                return False
        if faults.tokens:
            token = sent[len("Bearer ") :]
            with registry.lock:
                left = registry.tokens.get(token, 0)
                registry.tokens[token] = left - 1
            if left <= 0:
                realm = f'Bearer realm="{registry.url}/token",service="r",scope="repository:a:pull"'
                self._error(401, "UNAUTHORIZED", "no token", **{"WWW-Authenticate": realm})
                return False
        return True

    def _route(self, path: str) -> None:
        registry = self.server.registry
        manifest = re.fullmatch("/v2/(.+)/manifests/(.+)", path)
        blob = re.fullmatch("/v2/(.+)/blobs/(sha256:[0-9a-f]{64})", path)
        listed = re.fullmatch("/v2/(.+)/tags/list", path)
        upload = re.fullmatch("/v2/.+/blobs/uploads/(u[0-9]+)", path)
        if upload and upload[1] in registry.uploads:
            end = len(registry.uploads[upload[1]]) - 1
            self._send(204, {"Location": self.path, "Range": f"0-{end}"})
        elif path == "/v2/":
            self._send(200, {})
        elif manifest:
            self._manifest(manifest[1], manifest[2])
        elif listed:
            tags = [tag for name, tag in registry.manifests if name == listed[1] and ":" not in tag]
            if tags:
                self._send(200, {}, dumps({"name": listed[1], "tags": tags}))
            else:
                self._error(404, "NAME_UNKNOWN", "repository name not known to registry")
        elif not blob:
            self._error(404, "NAME_UNKNOWN", "no such thing")
        elif registry.faults.cdn and self.command == "GET":
            self._send(307, {"Location": f"{registry.cdn_url}/cdn/{blob[2]}?Expires=99999999999"})
        else:
            self._blob(blob[2])

    def _manifest(self, name: str, wanted: str) -> None:
        registry = self.server.registry
        faults = registry.faults
        if faults.answer:
            self._send(*faults.answer)
            return
        if faults.limit:
            self._error(
                429, "TOOMANYREQUESTS", "You have reached your pull rate limit.", **faults.limit
            )
            return
        if faults.too_many > 0:
            faults.too_many -= 1
            self._send(429, {"Retry-After": "0"})
            return
        content = registry.manifests.get((name, wanted))
        if content is None:
            known = any(one == name for one, _ in registry.manifests)
            code = "MANIFEST_UNKNOWN" if known else "NAME_UNKNOWN"
            self._error(404, code, "manifest unknown")
            return
        said = "sha256:" + "1" * 64 if faults.wrong_digest else digest(content)
        kind = json.loads(content).get("mediaType", MANIFEST)
        limits = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600"}
        self._send(200, {"Content-Type": kind, "Docker-Content-Digest": said, **limits}, content)

    def _blob(self, wanted: str) -> None:
        registry = self.server.registry
        faults = registry.faults
        content = registry.blobs.get(wanted)
        if content is None or wanted in faults.missing:
            self._error(404, "BLOB_UNKNOWN", "blob unknown to registry")
            return
        if faults.flip == wanted and faults.flip_times > 0:
            faults.flip_times -= 1
            flipped = bytearray(content)
            flipped[len(flipped) // 2] ^= 1
            content = bytes(flipped)
        status, headers = 200, {"Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        body = content
        if asked and not faults.ignore_range:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            status, body = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if faults.cut > 0 and len(body) > 1:
            faults.cut -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        with registry.lock:
            registry.sending += 1
        try:
            self._send_blob(body)
        finally:
            with registry.lock:
                registry.sending -= 1

    def _send_blob(self, body: bytes) -> None:
        registry = self.server.registry
        for start in range(0, len(body), 1 << 16):
            piece = body[start : start + (1 << 16)]
            try:
                self.wfile.write(piece)
            except OSError:  # whoever asked is gone, and is sent nothing more
                self.close_connection = True
                return
            with registry.lock:
                registry.blob_bytes += len(piece)
            if registry.faults.rate_bps:
                time.sleep(len(piece) / registry.faults.rate_bps)

    # -- pushes

    def do_POST(self) -> None:
        self._upload("POST")

    def do_PATCH(self) -> None:
        self._upload("PATCH")

    def do_PUT(self) -> None:
        self._upload("PUT")

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            found = []
            while True:
                size = int(self.rfile.readline().split(b";")[0], 16)
                found.append(self.rfile.read(size))
                self.rfile.readline()
                if not size:
                    return b"".join(found)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _upload(self, method: str) -> None:
        registry = self.server.registry
        faults = registry.faults
        sent = self.headers.get("Authorization", "")
        with registry.lock:
            registry.requests.append((method, self.path, sent))
        body = self._body()
        path, _, query = self.path.partition("?")
        if path == "/token":
            self._token(sent)
            return
        if not self._admitted(sent):
            return
        start = re.fullmatch("/v2/(.+)/blobs/uploads/", path)
        going_on = re.fullmatch("/v2/(.+)/blobs/uploads/(u[0-9]+)", path)
        manifest = re.fullmatch("/v2/(.+)/manifests/(.+)", path)
        if start and method == "POST":
            name = f"u{len(registry.uploads)}"
            registry.uploads[name] = b""
            self._send(202, {"Location": f"/v2/{start[1]}/blobs/uploads/{name}?state=1"})
        elif going_on and method == "PATCH" and faults.refuse_chunks:
            self._error(405, "UNSUPPORTED", "no chunks here")
        elif going_on and method == "PATCH":
            if faults.lose_upload > 0:
                faults.lose_upload -= 1
                self.close_connection = True
                self.connection.close()
                return
            time.sleep(faults.upload_s)
            registry.uploads[going_on[2]] += body
            registry.pushed_bytes += len(body)
            end = len(registry.uploads[going_on[2]]) - 1
            self._send(202, {"Location": self.path, "Range": f"0-{end}"})
        elif going_on and method == "PUT":
            content = registry.uploads.pop(going_on[2]) + body
            registry.pushed_bytes += len(body)
            wanted = re.search("digest=(sha256(?::|%3A)[0-9a-f]{64})", query)
            assert wanted
            if digest(content) != wanted[1].replace("%3A", ":"):
                self._error(400, "DIGEST_INVALID", "provided digest did not match")
                return
            registry.blobs[digest(content)] = content
            self._send(201, {"Docker-Content-Digest": digest(content)})
        elif manifest and method == "PUT":
            registry.manifests[manifest[1], manifest[2]] = body
            registry.manifests[manifest[1], digest(body)] = body
            self._send(201, {"Docker-Content-Digest": digest(body)})
        else:
            self._error(404, "UNSUPPORTED", "no such thing")


class FaultRegistryServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, registry: FaultRegistry, is_cdn: bool) -> None:
        self.registry, self.is_cdn = registry, is_cdn
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: Any) -> None:
        pass


class FaultRegistry:
    """A registry of images on loopback, and a CDN on another port."""

    def __init__(self) -> None:
        self.blobs: Dict[str, bytes] = {}
        self.manifests: Dict[Tuple[str, str], bytes] = {}
        self.uploads: Dict[str, bytes] = {}
        self.tokens: Dict[str, int] = {}
        self.faults = Faults()
        self.requests: List[Tuple[str, str, str]] = []  # method, target, Authorization
        self.blob_bytes = 0  # sent so far
        self.sending = 0  # blobs under way
        self.pushed_bytes = 0
        self.lock = threading.Lock()
        self._servers = [FaultRegistryServer(self, is_cdn) for is_cdn in (False, True)]

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._servers[0].server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def cdn_url(self) -> str:
        return f"http://localhost:{self._servers[1].server_port}"

    def settled(self) -> int:
        """The bytes of blobs that were sent, when no more are under way to a client that is gone."""
        end = time.monotonic() + 60
        while self.sending:
            assert time.monotonic() < end, "blobs are still sent"
            time.sleep(0.01)
        return self.blob_bytes

    def add(self, image: Image, name: str = "org/app", tag: str = "1") -> None:
        self.blobs.update(image.blobs)
        for wanted in (tag, image.digest):
            self.manifests[name, wanted] = image.manifest

    def add_index(self, images: Dict[str, Image], name: str = "org/app", tag: str = "1") -> bytes:
        index = make_index(images)
        for image in images.values():
            self.add(image, name, image.digest)
        for wanted in (tag, digest(index)):
            self.manifests[name, wanted] = index
        return index

    def count(self, method: str, part: str) -> int:
        return sum(one == method and part in target for one, target, _ in self.requests)

    def __enter__(self) -> FaultRegistry:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


# ---- the real one


class RealRegistry(NamedTuple):
    """docker-registry while it runs."""

    host: str
    certificate: Optional[Path]
    user: str

    def request(
        self, method: str, target: str, body: bytes = b"", kind: str = ""
    ) -> Tuple[int, Any, bytes]:
        """One plain request, as curl would send it."""
        connection: http.client.HTTPConnection
        if self.certificate:
            import ssl

            context = ssl.create_default_context(cafile=str(self.certificate))
            connection = http.client.HTTPSConnection(self.host, context=context, timeout=60)
        else:
            connection = http.client.HTTPConnection(self.host, timeout=60)
        headers = {"Content-Type": kind or "application/octet-stream"}
        if self.user:
            headers["Authorization"] = "Basic " + base64.b64encode(self.user.encode()).decode()
        target = target.replace(f"https://{self.host}", "").replace(f"http://{self.host}", "")
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.headers, content

    def add(self, image: Image, name: str = "org/app", tag: str = "1") -> None:
        """Fill it by plain PUTs: other programs compress the layers anew."""
        for wanted, content in image.blobs.items():
            _, headers, _ = self.request("POST", f"/v2/{name}/blobs/uploads/")
            place = headers["Location"]
            joint = "&" if "?" in place else "?"
            status, _, said = self.request("PUT", f"{place}{joint}digest={wanted}", content)
            assert status == 201, said
        for wanted in (tag, image.digest):
            self.put_manifest(image.manifest, name, wanted)

    def put_manifest(self, content: bytes, name: str, wanted: str) -> None:
        kind = json.loads(content)["mediaType"]
        status, _, said = self.request("PUT", f"/v2/{name}/manifests/{wanted}", content, kind)
        assert status == 201, said


@contextlib.contextmanager
def real_registry(
    folder: Path,
    port: int,
    certificate: Any = None,
    user: str = "",
    more: Sequence[str] = (),
    access_log: bool = False,
) -> Iterator[RealRegistry]:
    """docker-registry on a port of loopback: behind TLS with a certificate, and Basic with USER:PASSWORD. `more` are
    further lines of its configuration; its log is FOLDER/log, with what was asked of it if `access_log` says so."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        "version: 0.1",
        f"log: {{level: warn, accesslog: {{disabled: {json.dumps(not access_log)}}}}}",
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}, delete: {{enabled: true}}}}",
        f"http: {{addr: '127.0.0.1:{port}'",
    ]
    if certificate:
        settings[-1] += f", tls: {{certificate: {certificate.cert}, key: {certificate.key}}}"
    settings[-1] += "}"
    if user:
        name, _, password = user.partition(":")
        hashed = subprocess.run(
            ["htpasswd", "-Bbn", name, password], check=True, capture_output=True, text=True
        ).stdout
        (folder / "htpasswd").write_text(hashed)
        settings.append(f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}")
    (folder / "config.yml").write_text("\n".join([*settings, *more]) + "\n")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(shutil.which("docker-registry")), "serve", str(folder / "config.yml")],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            found = RealRegistry(
                f"localhost:{port}", certificate.cert if certificate else None, user
            )
            for _ in range(100):
                with contextlib.suppress(OSError):
                    found.request("GET", "/v2/")
                    break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield found
        finally:
            process.terminate()
            process.wait(10)


if __name__ == "__main__":
    sys.exit("a library for tests")
