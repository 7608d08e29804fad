# SPDX-License-Identifier: Apache-2.0
"""Blobs and manifests into a registry.

Owns the upload (OCI distribution-spec 1.1, "Pushing blobs"): what is there is not sent; a blob goes
in chunks, each of which the registry confirms, and a run after a kill goes on behind the last one;
where a registry takes no chunks, in one PUT. Promises: the registry proves each blob by its digest,
and the manifest, which comes last, is read back. Never: changes the folder, but for its notes of
uploads under way in `.hfship/push/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence, Tuple
from urllib.parse import quote, urljoin

from hfship.base.below import opened_below
from hfship.base.errors import HfshipError, IntegrityError, NetworkError
from hfship.base.files import CHUNK, WORK_DIR, disk_errors, pread_exactly, write_below
from hfship.base.reading import parse_json, read_below
from hfship.base.values import dataclass
from hfship.hub.protocol import origin
from hfship.hub.registry_protocol import blob_url, manifest_url
from hfship.hub.retry import Retry, RetryableError
from hfship.hub.transport import limited_body

if TYPE_CHECKING:
    from hfship.base.progress import Stage
    from hfship.hub.registry import RegistryClient

PUSH_DIR = f"{WORK_DIR}/push"
CHUNK_SIZE = 32 << 20  # bytes of a PATCH
PUSH_RETRY = Retry(attempts=8)
NO_CHUNKS = (400, 404, 405, 411, 413, 416, 501)  # a PATCH that a registry does not take
_LONGEST_NOTE = 16 << 10


@dataclass(frozen=True)
class Stretch:
    """Part of a blob: bytes that are known, or `size` bytes of a file below the folder."""

    size: int
    content: bytes = b""
    path: str = ""


@dataclass(frozen=True)
class Blob:
    """A blob to push: its digest, and what it is made of."""

    digest: str
    size: int
    stretches: Tuple[Stretch, ...]

    def read(self, folder: Path, offset: int, size: int) -> bytes:
        """Bytes of it from an offset on; fewer only at its end. Raises DiskError."""
        starts = [0]
        for stretch in self.stretches:
            starts.append(starts[-1] + stretch.size)
        found = bytearray()
        number = bisect_right(starts, offset) - 1
        while number < len(self.stretches) and len(found) < size:
            at = offset + len(found) - starts[number]
            stretch = self.stretches[number]
            count = min(size - len(found), stretch.size - at)
            found += read_stretch(folder, stretch, at, count)
            number += 1
        return bytes(found)


def read_stretch(folder: Path, stretch: Stretch, offset: int, size: int) -> bytes:
    """Bytes of a stretch. Raises DiskError; IntegrityError for a file that became shorter."""
    if not stretch.path:
        return stretch.content[offset : offset + size]
    with disk_errors("read", folder / stretch.path), opened_below(folder, stretch.path) as fd:
        content = pread_exactly(fd, size, offset)
    if len(content) < size:
        raise _changed(folder / stretch.path)
    return content


def _changed(path: Path) -> IntegrityError:
    what = f"{path} is not what its manifest says"
    return IntegrityError(what, "", f"hfship verify {path.parent}")


def known_blob(content: bytes) -> Blob:
    """A blob of bytes in memory."""
    size = len(content)
    digest = hashlib.sha256(content).hexdigest()
    whole = Stretch(size, content)
    return Blob(f"sha256:{digest}", size, (whole,))


def file_blob(path: str, size: int, sha256: str) -> Blob:
    """A blob that is a file."""
    return Blob(f"sha256:{sha256}", size, (Stretch(size, path=path),))


def hashed_blob(folder: Path, stretches: Sequence[Stretch], count: Callable[[int], None]) -> Blob:
    """A blob of stretches, whose digest is computed; `count` is called with the bytes read."""
    digest = hashlib.sha256()
    size = 0
    for stretch in stretches:
        for at in range(0, stretch.size, CHUNK):
            piece = read_stretch(folder, stretch, at, min(CHUNK, stretch.size - at))
            digest.update(piece)
            count(len(piece))
        size += stretch.size
    return Blob(f"sha256:{digest.hexdigest()}", size, tuple(stretches))


@dataclass
class Body:
    """What is sent of a blob in one PUT: it has a length, and is read in pieces."""

    blob: Blob
    folder: Path
    count: Callable[[int], None]
    position: int = 0

    def __len__(self) -> int:
        return self.blob.size

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        wanted = CHUNK
        if size > 0:
            wanted = min(size, CHUNK)
        piece = self.blob.read(self.folder, self.position, wanted)
        self.position += len(piece)
        self.count(len(piece))
        return piece


class BlobPush:
    """Sends blobs of a folder to a repository, one at a time."""

    _counted: int  # bytes of the blob under way that the stage has as done
    _sent: int  # bytes of it that went out, also those that did for nothing
    _confirmed: int  # bytes of it that the registry had, at the most

    def __init__(
        self, client: RegistryClient, folder: Path, stage: Stage, stop: threading.Event
    ) -> None:
        self.client = client
        self.folder = folder
        self.stage = stage
        self.stop = stop

    def push(self, blob: Blob) -> int:
        """Have the registry hold a blob; the bytes that were sent. Raises NetworkError, AuthError,
        IntegrityError for a file that is not what its manifest says, DiskError."""
        retry = PUSH_RETRY
        self._counted = self._sent = self._confirmed = 0
        while True:
            before = self._confirmed
            try:
                if self._is_there(blob):
                    self._count_to(blob.size)
                else:
                    self._send(blob)
                self._forget(blob)
                return self._sent
            except RetryableError as exc:
                retry = retry.after_failure(progress=self._confirmed > before)
                if retry.exhausted:
                    host = self.client.reference.registry
                    step = "run the same command again: what is there is not sent again"
                    raise NetworkError(
                        f"{host} does not take {blob.digest}", str(exc), step
                    ) from exc
                # A run that is being stopped ends at the gate of the next request.
                self.stop.wait(retry.wait_s(exc.wait_s))

    def _count_to(self, position: int) -> None:
        """Show so much of the blob as done: less than before where a try was for nothing."""
        self.stage.add(position - self._counted)
        self._counted = position

    def _count_sent(self, count: int) -> None:
        self._count_to(self._counted + count)
        self._sent += count

    def _is_there(self, blob: Blob) -> bool:
        url = blob_url(self.client.endpoint, self.client.reference.path, blob.digest)
        with self.client.request("HEAD", url) as response:
            self.client.retry_status(response, url)
            status: int = response.status_code
        return status == 200

    def _send(self, blob: Blob) -> None:
        """Send what the registry does not have of a blob."""
        if blob.size <= CHUNK_SIZE:
            self._send_whole(blob)
            return
        location, at = self._location(blob)
        self._count_to(at)
        while at < blob.size:
            piece = blob.read(self.folder, at, CHUNK_SIZE)
            location = self._send_chunk(location, at, piece)
            if not location:
                self._send_whole(blob)
                return
            at += len(piece)
            self._count_sent(len(piece))
            self._confirmed = max(self._confirmed, at)
            self._note(blob, location)
        self._finish(blob, location, {}, lambda: b"")

    def _send_whole(self, blob: Blob) -> None:
        """Send a blob in one PUT."""

        def body() -> Body:
            self._count_to(0)
            return Body(blob, self.folder, self._count_sent)

        headers = {"Content-Type": "application/octet-stream"}
        self._finish(blob, self._begin(), headers, body)

    def _send_chunk(self, location: str, at: int, piece: bytes) -> str:
        """Where the upload goes on behind a chunk; "" where a registry takes none."""
        last = at + len(piece) - 1
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{at}-{last}",
        }
        with self.client.request("PATCH", location, headers, lambda: piece) as response:
            if response.status_code in NO_CHUNKS:
                return ""
            self._require(response, (202,), location)
            following: str = response.headers.get("Location", location)
        return urljoin(location, following)

    def _location(self, blob: Blob) -> Tuple[str, int]:
        """Where an upload goes on, and from which byte: one of an earlier run, or a new one."""
        noted = self._noted(blob)
        if not noted:
            return self._begin(), 0
        with self.client.request("GET", noted) as response:
            self.client.retry_status(response, noted)
            status = response.status_code
            found = _received(response.headers.get("Range", ""))
            location = urljoin(noted, response.headers.get("Location", noted))
        if status == 204 and 0 < found <= blob.size:
            return location, found
        return self._begin(), 0

    def _begin(self) -> str:
        """Where a new upload goes on."""
        client = self.client
        path = client.reference.path
        url = f"{client.endpoint}/v2/{path}/blobs/uploads/"
        with client.request("POST", url, {}, lambda: b"") as response:
            self._require(response, (202,), url)
            location: str = response.headers.get("Location", "")
        return urljoin(url, location)

    def _finish(
        self, blob: Blob, location: str, headers: Mapping[str, str], make: Callable[[], Any]
    ) -> None:
        joint = "&" if "?" in location else "?"
        url = f"{location}{joint}digest={quote(blob.digest, safe='')}"
        with self.client.request("PUT", url, headers, make) as response:
            if response.status_code == 400:
                body = limited_body(response, url)
                if "DIGEST" in body:
                    raise _changed(self.folder / blob.stretches[-1].path)
            self._require(response, (201,), url)

    def _require(self, response: Any, wanted: Sequence[int], url: str) -> None:
        """Raise what an answer means that is not one of those that are wanted."""
        status = response.status_code
        if status in wanted:
            return
        self.client.retry_status(response, url)
        name = self.client.reference.name
        body = limited_body(response, url)
        what = f"a push to {name}"
        raise self.client.meaning(status, body, what)

    # -- notes for a run after a kill

    def _note_path(self, blob: Blob) -> str:
        client = self.client
        where = f"{client.endpoint}/{client.reference.path}"
        what = f"{where} {blob.digest}"
        name = hashlib.sha1(what.encode())
        return f"{PUSH_DIR}/{name.hexdigest()}.json"

    def _note(self, blob: Blob, location: str) -> None:
        with contextlib.suppress(HfshipError):  # a folder that we may only read
            text = json.dumps({"location": location})
            write_below(self.folder, self._note_path(blob), text, durable=False)

    def _noted(self, blob: Blob) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            text = read_below(self.folder, self._note_path(blob), _LONGEST_NOTE)
            location = parse_json(text)["location"]
            if isinstance(location, str) and origin(location) == origin(self.client.endpoint):
                return location
        return ""

    def _forget(self, blob: Blob) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.folder / self._note_path(blob))
        with contextlib.suppress(OSError):
            os.rmdir(self.folder / PUSH_DIR)


def _received(header: str) -> int:
    """Bytes that a registry has of an upload, by its Range header.

    >>> _received("0-99"), _received("bytes=0-99"), _received("")
    (100, 100, 0)
    """
    _, _, last = header.partition("-")
    if not last.isdigit():
        return 0
    return int(last) + 1


def put_manifest(client: RegistryClient, text: bytes, media_type: str) -> str:
    """Put a manifest under the tag of the client's reference, and read it back; its digest.

    Raises NetworkError, AuthError, IntegrityError for a registry that keeps another one.
    """
    digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
    client.patiently(lambda: _put_once(client, text, media_type))
    kept: str = client.head_digest(client.reference.wanted)
    if kept and kept != digest:
        what = f"{client.reference.registry} keeps another manifest than was sent"
        raise IntegrityError(what, f"it has {kept}, sent was {digest}", "push it again")
    return digest


def _put_once(client: RegistryClient, text: bytes, media_type: str) -> None:
    url = manifest_url(client.endpoint, client.reference.path, client.reference.wanted)
    headers = {"Content-Type": media_type}
    with client.request("PUT", url, headers, lambda: text) as response:
        client.retry_status(response, url)
        if response.status_code not in (200, 201):
            body = limited_body(response, url)
            raise client.meaning(response.status_code, body, f"a push to {client.reference.name}")
