# SPDX-License-Identifier: Apache-2.0
"""Ranges of a file from the Hub into its place on disk.

Owns where the bytes of a file are (the Hub redirects to a signed address that expires), and the
readers: forked processes that ask for a range and write it into the work file, with the messages
between them and the process that decides (OpenRange, FetchSmall, ReadRange, CloseRange and their
answers).
Promises: ranges of two different objects are never mixed under one address; a byte is counted only
after it was written. A reader never decides, waits or reports: whoever sends it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sys
import termios
import threading
import time
from http.client import HTTPException
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Iterator,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Union,
)
from urllib.parse import urlsplit

from hfship.base.errors import (
    DiskError,
    HfshipError,
    HostError,
    IntegrityError,
    NetworkError,
)
from hfship.base.files import CHANGED_UNDERNEATH, disk_error, filesystem_of, pwrite_all
from hfship.base.text import human_seconds, printable
from hfship.base.values import dataclass, field, replace
from hfship.base.workers import Workers, default_jobs
from hfship.hub.answers import (
    no_file_error,
    refused_signature,
    root_cause,
    sent_on,
)
from hfship.hub.gate import ParentProxy
from hfship.hub.partial import Finished, finish_small
from hfship.hub.protocol import (
    MAX_CHANGES,
    MAX_REDIRECTS,
    READ_TIMEOUT_S,
    REDIRECTS,
    URL_RENEWAL_S,
    is_signed,
    origin,
    redirect_target,
    strong_etag,
    url_expiry,
)
from hfship.hub.ranges import MOST_READERS, READ_SIZE, REPORT_S, Trickle, check_range_answer
from hfship.hub.retry import ObjectChanged, RetryableError, SourceFaltered
from hfship.hub.session import limit_reads
from hfship.hub.transport import limited_body, pieces

if TYPE_CHECKING:
    from hfship.hub.partial import Transfer
    from hfship.hub.transport import Transport

SENT = (200, 206)  # the statuses of an answer that carries bytes of the file
LONGEST_VALUE = 100  # characters of a header that are shown
MOST_REFUSALS = 2  # of a file in a row, each at an address that was asked for just before


@dataclass(frozen=True)
class Address:
    """Where the bytes of a file are, as far as is known."""

    url: Optional[str] = field(default=None, repr=False)  # signed: whoever has it may read the file
    renew_at: float = float("inf")  # Unix time until which `url` can be used
    etag: str = ""  # of the object there
    etag_of: str = ""  # the URL, without its signature, that `etag` was seen at
    changes: int = 0  # how often another ETag came than the one before
    refusals: int = 0  # in a row: a new address did not bring the file either
    serves: bool = False  # bytes came from `url`

    @property
    def usable(self) -> bool:
        return self.url is not None and time.time() < self.renew_at

    @property
    def is_for_all(self) -> bool:
        """May all readers ask there, before it has answered one? Not where the Hub itself is asked
        once more for each, and not after a refusal: then one tries the next address."""
        return self.usable and is_signed(self.url or "") and not self.refusals

    def forgotten(self) -> Address:
        """The same, to be resolved again before the next request."""
        return replace(self, url=None, serves=False)


UNKNOWN = Address()


class FileAddress:
    """Asks for ranges of one file: at the Hub's resolve address first, then at the (signed) address
    that it redirects to, until that expires or is refused.

    All ranges share that address: the Hub's quota counts resolves, not ranges. `endpoint` is the
    Hub or a mirror of it; a mirror that does not have the file is no reason to give up.
    """

    def __init__(
        self, client: Transport, transfer: Transfer, endpoint: str, known: Address = UNKNOWN
    ) -> None:
        self._client = client
        self._transfer = transfer
        self._source = replace(transfer.source, endpoint=endpoint)
        self.known = known

    def open(self, start: int, stop: int) -> Any:
        """The response to a request for [start, stop), with its body unread.

        Raises RetryableError or HfshipError.
        """
        return self.ask(start, stop, follow=True)

    def ask(self, start: int, stop: int, follow: bool) -> Any:
        """The same; but unless redirects are to be followed to their end, None as soon as `known`
        is an address that others can ask, too."""
        if not self.known.usable:
            self.forget()
        url = self.known.url or self._client.file_url(self._source, self.path)
        for _ in range(MAX_REDIRECTS):
            response = self._get(url, start, stop)
            if response.status_code in SENT:
                self._came_from(url)
                return response
            url = self._redirected(response, url)
            if self.known.is_for_all and not follow:
                return None

        raise NetworkError(
            f"{self.path} is redirected in a circle",
            "",
            "check HF_ENDPOINT",
        )

    def forget(self) -> None:
        """Resolve again before the next request."""
        self.known = self.known.forgotten()

    def locate(self) -> str:
        """The URL that another program can fetch the file from, for as long as it is signed."""
        self.open(0, 1).close()
        return self.known.url or ""

    @property
    def path(self) -> str:
        """The path of the file."""
        return self._transfer.remote.path

    @property
    def _is_hub(self) -> bool:
        """Is it the Hub, not a mirror of it?"""
        return self._source.endpoint == self._client.endpoint

    def _get(self, url: str, start: int, stop: int) -> Any:
        etag = self._etag_at(url)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if etag:
            # RFC 9110 §13.1.5: send all of another object rather than a part of it
            headers["If-Range"] = etag

        response = self._client.get(url, headers)
        try:
            self._client.retry_status(response, url, holds=self._is_hub)
        except RetryableError as exc:
            if self._is_hub or exc.wait_s is None:
                raise
            raise SourceFaltered(str(exc)) from exc  # no need to wait: there is the Hub
        if response.status_code in SENT:
            self._check_is_file(response, url)
            self._check_same_object(response, url, etag)
        return response

    def _check_is_file(self, response: Any, url: str) -> None:
        """Raise for a page in the place of the file: of a login, of a proxy."""
        remote = self._transfer.remote
        kind = response.headers.get("Content-Type", "")
        length = response.headers.get("Content-Length", str(remote.size))
        if response.status_code != 200 or "html" not in kind.lower():
            return
        if remote.path.lower().endswith((".html", ".htm")) and length == str(remote.size):
            return

        response.close()
        error = no_file_error(url, remote.path, kind, remote.size)
        self._refused(error, error.what)

    def _refused(self, error: HfshipError, reason: str) -> NoReturn:
        """The file did not come from a new address. That may pass once: then it has a reason, and
        no error yet."""
        self.known = replace(self.known.forgotten(), refusals=self.known.refusals + 1)
        if self.known.refusals >= MOST_REFUSALS:
            raise error
        raise RetryableError(reason)

    def _etag_at(self, url: str) -> str:
        """The ETag that the next answer from `url` must have; "" where any may come."""
        if self.known.changes >= MAX_CHANGES:
            return ""
        if self.known.etag_of != unsigned(url):
            return ""
        return self.known.etag

    def _check_same_object(self, response: Any, url: str, expected: str) -> None:
        """Ranges of two objects must not be mixed: the hash of the file would tell, but only at its
        end. `expected` is the ETag of If-Range, or ""."""
        etag = strong_etag(response.headers.get("ETag", ""))
        if not etag:
            return

        self.known = replace(self.known, etag=etag, etag_of=unsigned(url))
        if not expected:
            return

        host = origin(url)[1]
        if etag != expected:
            self.known = replace(self.known.forgotten(), changes=self.known.changes + 1)
            response.close()
            raise ObjectChanged(f"{host} has another file there than before")

        if response.status_code == 200:
            # Ask without If-Range from now on. The whole file that comes now is not wanted: other
            # connections are fetching ranges of it.
            self.known = replace(self.known, changes=MAX_CHANGES)
            response.close()
            raise RetryableError(f"{host} does not understand If-Range")

    def _redirected(self, response: Any, url: str) -> str:
        """Where an answer from `url`, which brings no bytes, leads. Raises what it means when it
        leads nowhere."""
        if self.known.serves:
            self.forget()
            response.close()
            raise RetryableError(f"{origin(url)[1]} answered {response.status_code}")
        if response.status_code not in REDIRECTS:
            self._raise_refusal(response, url)

        self._check_unchanged(response.headers)
        location = response.headers.get("Location", "")
        target = redirect_target(url, location, self._source.endpoint)
        self._found(target)
        response.pass_over()
        return target

    def _came_from(self, url: str) -> None:
        """Bytes of the file come from `url`."""
        if url != self.known.url:
            self._found(url)
        self.known = replace(self.known, refusals=0, serves=True)

    def _found(self, url: str) -> None:
        """The file should be at `url`, for as long as the signature in it says."""
        now = time.time()
        expires = url_expiry(url, now)
        renew_at = float("inf")
        life = ""
        if expires is not None:
            life_s = expires - now
            renew_at = expires - min(URL_RENEWAL_S, life_s / 10)
            life = f", for {human_seconds(life_s)}"

        self.known = replace(self.known, url=url, renew_at=renew_at)
        host = urlsplit(url).netloc
        self._client.reporter.detail(f"{self.path}: comes from {host}{life}")

    def _raise_refusal(self, response: Any, url: str) -> NoReturn:
        """A new address does not bring the file. What the Hub itself says is final (HfshipError);
        where a signature is refused, another one may help, once."""
        self.known = self.known.forgotten()
        status = response.status_code
        path = self.path
        reason = f"{origin(url)[1]} answered {status}"
        if origin(url) == origin(self._source.endpoint):
            try:
                body = limited_body(response, url)
            finally:
                response.close()
            error = self._client.refusal(status, response.headers, body, self._source)
            if status in (401, 403, 404):
                raise error
            self._refused(error, reason)

        response.close()
        if not is_signed(url) and status in (401, 403, 404):
            raise sent_on(status, url, path, self._source)
        self._refused(refused_signature(status, url, path, self._source), reason)

    def _check_unchanged(self, headers: Mapping[str, str]) -> None:
        """A redirect names size, hash and commit of what it leads to: they must be those of the
        listing. Proxies put other sums there, which say nothing: the bytes are hashed in any case.
        Raises IntegrityError."""
        remote = self._transfer.remote
        commit = self._transfer.source.commit
        listed = {
            "X-Linked-Size": str(remote.size),
            "X-Linked-Etag": remote.etag,
            "X-Repo-Commit": commit,
        }
        for name, expected in listed.items():
            value = headers.get(name, expected).replace("W/", "").strip('"')
            is_other_sum = name != "X-Linked-Size" and len(value) != len(expected)
            if value == expected or is_other_sum:
                continue
            value = printable(value[:LONGEST_VALUE])
            mirror = self._source.endpoint
            hub = self._client.endpoint
            raise IntegrityError(
                f"{remote.path} at {mirror} is not what {hub} listed",
                f"{name} is {value}, the listing of commit {commit[:12]} says {expected}",
                "run the same command again; if it stays so, the mirror is out of date",
            )


def unsigned(url: str) -> str:
    """The URL without its query, where the signature is.

    >>> unsigned("https://cdn/a/b?Expires=1&Signature=x")
    'https://cdn/a/b'
    """
    return url.partition("?")[0]


class SharedAddress:
    """Where a file is, shared by all its readers. While that is not known one of them asks the Hub
    and the others wait for its answer."""

    def __init__(self) -> None:
        self.known = Address()
        self._asking = threading.Lock()
        self._learning = threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Address]:
        """The address to open the file with. What is found out meanwhile goes to `learn`."""
        if not self.known.usable:
            with self._asking:
                if not self.known.usable:
                    yield self.known
                    return
        yield self.known

    @property
    def host(self) -> str:
        """Where the file comes from; "the Hub" while that is not known."""
        return origin(self.known.url or "")[1] or "the Hub"

    def learn(self, given: Address, found: Address) -> None:
        """A reader was given one address and came back with the other. Raises ObjectChanged where
        it found another object than others did meanwhile."""
        with self._learning:
            known = self.known
            if is_other_object(known, given, found):
                self.known = replace(found.forgotten(), changes=known.changes + 1)
                host = origin(found.url or "")[1]
                raise ObjectChanged(f"{host} has another file there than before")
            if known.serves and known != given and not found.serves:
                return  # what it refused to this reader it sends to others
            if found != given:
                self.known = found

    def forget(self) -> None:
        """Resolve again before the next request."""
        self.known = self.known.forgotten()


def is_other_object(known: Address, given: Address, found: Address) -> bool:
    """Did a reader find another ETag than others did after it was `given` what to ask for?"""
    if known.etag == given.etag or known.changes >= MAX_CHANGES:
        return False
    if found.etag in (given.etag, known.etag):
        return False
    return found.etag_of == known.etag_of


def is_range(response: Any, start: int, stop: int, size: int) -> bool:
    """check_range_answer, with the host in its reasons."""
    try:
        return check_range_answer(response.status_code, response.headers, start, stop, size)
    except RetryableError as exc:
        host = origin(response.url)[1]
        raise RetryableError(f"{host}: {exc}") from exc


def read_body(response: Any, size: int) -> bytes:
    """The body of an answer that has `size` bytes. Raises RetryableError for one that has more or
    fewer, or that hardly comes."""
    host = origin(response.url)[1]
    trickle = Trickle()
    began = time.monotonic()
    found = []
    came = 0
    for piece in pieces(response):
        now = time.monotonic()
        found.append(piece)
        came += len(piece)
        if came > size:
            break
        if trickle.is_all_that_comes(len(piece), now - began):
            raise SourceFaltered(f"{host} hardly sends anything")
        began = now

    if came != size:
        raise RetryableError(f"{host} sent {came} bytes of {size}")
    return b"".join(found)


# -- messages to a reader, and its answers. Tuples, because they cross a pipe thousands of times.


class OpenRange(NamedTuple):
    """Ask for [start, stop) of a file. `file` and `endpoint` are numbers, by their order in the
    download. The answer is Opened."""

    file: int
    endpoint: int
    known: Address
    start: int
    stop: int
    follow: bool = False  # wherever it leads; else the answer may be that it leads elsewhere


class Opened(NamedTuple):
    """What came of OpenRange. Where `error` is None the body follows: exactly the range, or the
    whole file when it is not `ranged`."""

    known: Address  # where the file is, as far as is known now
    ranged: bool = True
    error: Union[None, HfshipError, RetryableError] = None
    moved: bool = False  # nothing follows yet: it is there that the file is to be asked for


class FetchSmall(NamedTuple):
    """Ask for all of a small file, make its work file, write what comes of it within REPORT_S, and
    if that is all close the range, and prove and `finish` the file: one message instead of three,
    and all that thousands of files cost in as many processes as there are. The answer is
    Fetched."""

    asked: OpenRange
    finish: bool = False


class Fetched(NamedTuple):
    """What came of FetchSmall. The range is still open, unless all of it is `written`. Such a file
    that is not `finished` is not what the Hub lists, or finishing it was not asked for."""

    opened: Opened
    written: Optional[Written] = None
    finished: Optional[Finished] = None


class ReadRange(NamedTuple):
    """Write what comes, up to byte `stop` of the file, or for REPORT_S. The answer is Written."""

    stop: int


class Written(NamedTuple):
    """Every byte before `position` is written, and so many more came that wait to be read. `broken`
    is what ended the connection, if it did."""

    position: int
    broken: Optional[RetryableError] = None
    waiting: int = 0


class CloseRange(NamedTuple):
    """Done with the range. `keep` the connection, whose answer was read to its end."""

    keep: bool


Message = Union[OpenRange, FetchSmall, ReadRange, CloseRange]


class RangeReader(threading.local):  # the threads of a process have a state each
    """What a forked process does for one connection: ask for a range, and write what comes into
    the work file.

    Forked, because only one thread of a Python at a time can take a TLS record: on 16 cores eight
    threads of one process brought less than half of what eight processes bring.
    """

    def __init__(
        self,
        client: Transport,
        transfers: Sequence[Transfer],
        endpoints: Sequence[str],
        journaled: bool,
    ) -> None:
        self._client = client
        self._transfers = transfers
        self._endpoints = endpoints
        self._journaled = journaled
        self._buffer: Optional[memoryview] = None
        self._response: Any = None
        self._body: Optional[DirectBody] = None  # of the response
        self._fd = -1
        self._position = 0  # in the file: the next byte to come
        self._end = 0  # in the file: where the body of the response ends

    def answer(self, send: Callable[[Any], None], message: Message) -> Any:
        """Do what a message asks; what there is to report meanwhile is sent to the parent."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(READ_SIZE))
            with_details = self._client.reporter.verbosity > 0
            self._client = self._client.forked(ParentProxy(send, with_details))
        if isinstance(message, OpenRange):
            return self._open(message)
        if isinstance(message, ReadRange):
            return self._read(self._buffer, message.stop)
        if isinstance(message, FetchSmall):
            return self._fetch_small(self._buffer, message.asked, message.finish)

        return self._close(message.keep)

    def _open(self, asked: OpenRange) -> Opened:
        start = asked.start
        stop = asked.stop
        transfer = self._transfers[asked.file]
        endpoint = self._endpoints[asked.endpoint]
        size = transfer.remote.size
        self._transfer = transfer
        address = FileAddress(self._client, transfer, endpoint, asked.known)
        try:
            response = address.ask(start, stop, asked.follow)
            if response is None:
                return Opened(address.known, moved=True)
            self._response = response
            ranged = is_range(response, start, stop, size)
        except (RetryableError, HfshipError) as exc:
            return Opened(address.known, error=exc)
        except ValueError as exc:  # an address that is none
            return Opened(address.known, error=RetryableError(printable(str(exc))))

        self._position = start
        self._end = size
        if ranged:
            self._end = stop
        self._body = direct_body(response)
        return Opened(address.known, ranged)

    def _fetch_small(self, buffer: memoryview, asked: OpenRange, finish: bool) -> Fetched:
        opened = self._open(asked)
        if opened.error or not opened.ranged:
            return Fetched(opened)

        self._open_file(os.O_RDWR | os.O_CREAT)
        written = self._read(buffer, asked.stop)
        if written.position < asked.stop:
            return Fetched(opened, written)

        finished = None
        if finish:
            finished = finish_small(self._transfer, self._fd, self._journaled)
        self._close(keep=True)
        return Fetched(opened, written, finished)

    def _read(self, buffer: memoryview, stop: int) -> Written:
        """The inner http.client response reads straight into our buffer, several times faster than
        urllib3's stream(); it reports a connection closed early as a plain end, so we count."""
        until = time.monotonic() + REPORT_S
        host = origin(self._response.url)[1]
        while self._position < stop and time.monotonic() < until:
            room = buffer[: stop - self._position]
            try:
                count = self._receive(room)
            except TimeoutError as exc:
                stalled = SourceFaltered(f"{host} sends nothing more: {exc}")
                return Written(self._position, stalled)
            except (OSError, HTTPException, ValueError, AttributeError) as exc:
                return self._broken(f"the connection to {host} broke: {root_cause(exc)}")
            if not count:
                left = self._end - self._position
                return self._broken(f"the connection to {host} ended {left} bytes early")
            self._write(buffer[:count])

        waiting = 0
        if self._body and self._position < self._end:  # else the connection may be closed
            waiting = self._body.waiting
        return Written(self._position, waiting=waiting)

    def _receive(self, room: memoryview) -> int:
        """Fill `room` with what comes, for about REPORT_S."""
        inner = self._response.raw._fp
        if not inner.chunked:
            count: int = inner.readinto(room)
            return count

        # What is between chunks has no length: it may not go on for ever.
        limit_reads(inner, time.monotonic() + 2 * READ_TIMEOUT_S)
        piece = inner.read1(len(room))
        room[: len(piece)] = piece
        return len(piece)

    def _broken(self, reason: str) -> Written:
        return Written(self._position, RetryableError(reason))

    def _write(self, piece: memoryview) -> None:
        if self._fd < 0:
            self._open_file(os.O_WRONLY)
        try:
            pwrite_all(self._fd, piece, self._position)
        except OSError as exc:
            raise self._disk_error(exc) from exc

        self._position += len(piece)

    def _open_file(self, flags: int) -> None:
        try:
            self._fd = self._transfer.open_work_file(flags)
        except OSError as exc:
            raise self._disk_error(exc) from exc

    def _disk_error(self, exc: OSError) -> DiskError:
        step = ""
        if exc.errno not in CHANGED_UNDERNEATH:
            step = "free space, then run the same command again: what arrived is kept"
        return disk_error(exc, "write", self._transfer.work_file, step)

    def _close(self, keep: bool) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._response is None:
            return
        if keep:
            self._response.raw.release_conn()
        else:
            self._response.close()

        self._response = None


class DirectBody:
    """The body of an answer as the C function of its connection reads it: a buffer and three Python
    functions are in between, for each TLS record, 60,000 in a GB.

    Takes the place of that buffer in the answer, and gives first what is in it. The buffer would
    wait until all is there that is asked for, however slowly it comes; this waits for REPORT_S.
    """

    def __init__(self, buffered: Any, connection: Any) -> None:
        self._buffered = buffered
        self._connection = connection
        self._receive = connection.recv_into
        tls = getattr(connection, "_sslobj", None)
        if tls is not None:
            self._receive = functools.partial(tls.read, READ_SIZE)
        buffered.raw.readinto = lambda _: None  # nothing more comes into the buffer
        self._is_buffered = True  # maybe

    def readinto(self, room: memoryview) -> int:
        """Fill `room`, or as much of it as comes in REPORT_S. 0 at the end of the connection."""
        receive, size = self._receive, len(room)
        filled = self._from_buffer(room)
        until = time.monotonic() + REPORT_S
        while filled < size:
            count = receive(room[filled:])
            filled += count
            if not count or time.monotonic() > until:
                break
        return filled

    def _from_buffer(self, room: memoryview) -> int:
        if not self._is_buffered:
            return 0
        found = self._buffered.read1(len(room))
        self._is_buffered = bool(found)
        room[: len(found)] = found
        return len(found)

    @property
    def waiting(self) -> int:
        """Bytes that came and wait in the kernel."""
        count = fcntl.ioctl(self._connection.fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder)

    def flush(self) -> None:
        """The answer asks for it before it closes."""

    def close(self) -> None:
        """The answer does so when all of it was read."""
        self._buffered.close()


def direct_body(response: Any) -> Optional[DirectBody]:
    """Have the body of an answer read directly. None for one without a body, and for chunks, which
    have lines in between."""
    inner = response.raw._fp
    connection = getattr(getattr(inner.fp, "raw", None), "_sock", None)
    if connection is None or inner.chunked:
        return None
    inner.fp = DirectBody(inner.fp, connection)
    return inner.fp  # type: ignore[no-any-return]


class Readers:
    """The forked readers of a download, by number. A thread that uses one has it for itself.

    The methods raise KeyboardInterrupt when a reader is gone because the run is being stopped.
    """

    def __init__(
        self,
        client: Transport,
        transfers: Sequence[Transfer],
        endpoints: Sequence[str],
        count: int,
        stop: threading.Event,
    ) -> None:
        self._stop = stop
        journaled = filesystem_of(transfers[0].folder).journaled
        reader = RangeReader(client, transfers, endpoints, journaled)
        processes = min(MOST_READERS, default_jobs())
        self._workers = Workers(count, reader.answer, client.receive, processes)

    def __enter__(self) -> Readers:
        self._workers.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._workers.__exit__(*exc_info)

    def open(self, number: int, message: OpenRange) -> Opened:
        """Have reader `number` ask for a range."""
        opened: Opened = self._call(number, message)
        return opened

    def fetch_small(self, number: int, message: OpenRange, finish: bool) -> Fetched:
        """Have it bring a small file, or as much of it as comes in REPORT_S, and `finish` it when
        all of it is there and right."""
        fetched: Fetched = self._call(number, FetchSmall(message, finish))
        return fetched

    def read(self, number: int, stop: int) -> Written:
        """Have it write what comes up to byte `stop`, or as much of that as comes in REPORT_S."""
        written: Written = self._call(number, ReadRange(stop))
        return written

    def close(self, number: int, keep: bool) -> None:
        """Have it end the request; `keep` its connection for the next one."""
        self._call(number, CloseRange(keep))

    def _call(self, number: int, message: Message) -> Any:
        try:
            return self._workers.call(number, message)
        except HostError as exc:
            if self._stop.is_set():
                raise KeyboardInterrupt from exc
            raise
