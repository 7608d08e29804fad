# SPDX-License-Identifier: Apache-2.0
"""The mirror's connections: who gets in, how long each may take, and how an answer leaves.

Owns the limits of a server that anybody in the site may connect to. Each connection has a thread
of its own; beyond MOST_CONNECTIONS, and beyond half of them for one client, who comes is told so
(503). Who sends nothing, or sends slowly, or does not take what was asked for, is let go.

Promises: a client costs at most one thread, two descriptors and the memory that was taken from the
allowance; what is no request gets an answer that says so. Never: knows what is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import resource
import select
import socket
import sys
import threading
import time
from collections import Counter, deque
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from ssl import SSLError, SSLSocket
from typing import TYPE_CHECKING, Any, Deque, Iterator, Mapping, Optional, Set, Tuple, Type, Union

from hfship import __version__
from hfship.base.errors import HostError
from hfship.base.network import family_of
from hfship.ops.http_request import BadRequest, Fields, Request, RequestReader

if TYPE_CHECKING:
    from hfship.base.report import Reporter

MOST_CONNECTIONS = 2048
MOST_MEMORY = 128 << 20  # bytes of all bodies and answers that are not files
BODY_SIZE = 1 << 20  # bytes of a body at most
IDLE_S = 60.0  # without a request on an open connection ...
CROWDED_IDLE_S = 5.0  # ... and while there are many
HEAD_S = 20.0  # for a whole head, or a TLS handshake
BODY_S = 60.0
STALL_S = 60.0  # without taking a byte of an answer
SLOWEST_BPS = 1 << 10  # that a client takes of an answer that is longer on its way than STALL_S
LINGER_S = 2.0
BACK_OFF_S = 0.1
_RESERVED_FILES = 32  # descriptors that are not those of clients
_MOST_LEAVING = 8
_SMALL = 4 << 10  # bytes of an answer that needs no allowance, as errors are
_PIECE = 128 << 10  # bytes of a file that pass through memory, where sendfile cannot be used

# The client has gone, or might as well have.
CLIENT_GONE = (ConnectionError, TimeoutError, socket.timeout, SSLError)
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EOVERFLOW)
_NEIGHBOUR = ("-", 0)  # who comes through the path of a socket has no address
_NO_REQUEST = Request("-", "-", "", 1, "", Fields({}))  # one that could not be read


class Allowance:
    """So much of something for all clients, and half of it for one of them. Safe to share.

    Who has none of it gets what he asks for even if that is more, as long as the others leave it.

    >>> rooms = Allowance(4)
    >>> [rooms.take("a"), rooms.take("a"), rooms.take("a"), rooms.take("b")]
    [True, True, False, True]
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()
        self._total = 0

    @property
    def is_scarce(self) -> bool:
        """Is more than half of it taken?"""
        return self._total > self._most // 2

    def take(self, client: str, amount: int = 1) -> bool:
        """Take some for a client; whether there was enough."""
        with self._lock:
            own = self._taken[client]
            own_most = max(1, self._most // 2)
            if own and own + amount > own_most:
                return False
            if self._total and self._total + amount > self._most:
                return False
            self._taken[client] += amount
            self._total += amount
            return True

    def give_back(self, client: str, amount: int = 1) -> None:
        """Give back what a client took."""
        with self._lock:
            self._total -= amount
            self._taken[client] -= amount
            if not self._taken[client]:
                del self._taken[client]


def client_of(address: str) -> str:
    """Who counts as one client: an address; of IPv6 the network, in which it may choose any.

    >>> client_of("10.0.0.7"), client_of("2001:db8::7"), client_of("::ffff:10.0.0.7")
    ('10.0.0.7', '2001:db8::/64', '10.0.0.7')
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))


def most_connections() -> int:
    """How many this process may have: each client needs a descriptor, and one of a file."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(2, min(MOST_CONNECTIONS, (soft - _RESERVED_FILES) // 2))


def head_of_answer(status: int, headers: Mapping[str, str]) -> bytes:
    """Status line and headers of an answer. A value may quote what a client sent."""
    phrase = ""
    with contextlib.suppress(ValueError):  # a status that only the tests know
        phrase = HTTPStatus(status).phrase

    lines = [f"HTTP/1.1 {status} {phrase}"]
    for name, value in headers.items():
        harmless = re.sub("[^ -~]", "?", value)
        lines.append(f"{name}: {harmless}")

    return "\r\n".join([*lines, "", ""]).encode("ascii")


def short_answer(status: int, message: str, *, retry_after_s: int = 0) -> bytes:
    """A whole answer in JSON, for who is not let in: `message` has no quotes in it."""
    body = f'{{"error": "{message}"}}'.encode("ascii")
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "X-Error-Message": message,
        "Connection": "close",
    }
    if retry_after_s:
        headers["Retry-After"] = str(retry_after_s)
    return head_of_answer(status, headers) + body


class Connection:
    """The connection of one client: its requests, one after the other, and their answers.

    Subclasses answer, and refuse what is no request.
    """

    def __init__(
        self, connection: socket.socket, client_address: Tuple[str, int], server: HttpServer
    ) -> None:
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.client_address = client_address
        self.client = client_of(client_address[0])
        self.server = server
        self.request = _NO_REQUEST
        self.status = 0  # of the answer; 0 while none was begun
        self.sent = 0  # bytes of its body
        self.close_connection = False  # after this answer
        self._reader = RequestReader(self._receive)
        self._body_is_read = False
        self._deadline = 0.0  # by which what is read must be here
        self._begun = 0.0  # when the answer was ...
        self._written = 0  # ... and what went out since

    def answer(self) -> None:
        """Answer `self.request`. May raise BadRequest, CLIENT_GONE."""
        raise NotImplementedError

    def refuse(self, error: BadRequest) -> None:
        """Answer what is not to be answered."""
        raise NotImplementedError

    def over(self) -> None:
        """Called when an answer is over, also where it came to none."""

    # ---- requests

    def serve(self) -> None:
        """Answer one request after the other until there are no more. Raises CLIENT_GONE."""
        while not self.close_connection and self._request_comes():
            self._serve_one()
        self._linger()

    def _request_comes(self) -> bool:
        """Wait for the next request; False when none came in the time that there is."""
        if self._reader.has_more:
            return True

        waiting = select.poll()
        waiting.register(self.connection, select.POLLIN)
        began = time.monotonic()
        while not self.server.closing:
            if isinstance(self.connection, SSLSocket) and self.connection.pending():
                return True
            if waiting.poll(CROWDED_IDLE_S * 1000):
                return True
            waited = time.monotonic() - began
            if waited > IDLE_S or self.server.connections.is_scarce:
                break

        self.close_connection = True
        return False

    def _serve_one(self) -> None:
        self.request = _NO_REQUEST
        self.status = 0
        self.sent = 0
        self._body_is_read = False
        try:
            self._read_and_answer()
        except CLIENT_GONE:
            self.close_connection = True
        finally:
            self.server.answering.discard(self)
            if self.request is not _NO_REQUEST or self.status:
                self.over()

    def _read_and_answer(self) -> None:
        try:
            self._deadline = time.monotonic() + HEAD_S
            request = self._reader.head()
            if request is None:
                self.close_connection = True
                return
            self.request = request
            self.server.answering.add(self)
            self.answer()
        except BadRequest as exc:
            self.close_connection = True
            if not self.status:
                self.refuse(exc)

    def read_body(self) -> bytes:
        """The body of the request, before its answer is begun. Raises BadRequest, CLIENT_GONE."""
        request = self.request
        if not request.has_body:
            return b""
        if request.fields.get("Expect").lower() == "100-continue" and request.minor:
            self._start_clock()
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._deadline = time.monotonic() + BODY_S
        body = self._reader.body(request, BODY_SIZE)
        self._body_is_read = True
        return body

    def _receive(self, most: int) -> bytes:
        left = self._deadline - time.monotonic()
        try:
            if left > 0:
                self.connection.settimeout(left)
                return self.connection.recv(most)
        except socket.timeout:
            pass
        raise BadRequest(408, "the request took too long")

    @contextlib.contextmanager
    def memory_for(self, size: int) -> Iterator[None]:
        """Room for a body or an answer of `size` bytes. Raises BadRequest when there is none."""
        if size <= _SMALL:
            yield
            return

        if not self.server.memory.take(self.client, size):
            raise BadRequest(503, "too much is asked for at once")
        try:
            yield
        finally:
            self.server.memory.give_back(self.client, size)

    # ---- answers

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        """Status line and headers of an answer with a body of `length` bytes."""
        unread = self.request.has_body and not self._body_is_read
        self.close_connection |= unread or self.request.is_last or self.server.closing
        self.status = status
        self._start_clock()
        every = {"Server": f"hfship/{__version__}", "Date": self.date()}
        if self.close_connection:
            every["Connection"] = "close"
        head = head_of_answer(status, {**every, **headers, "Content-Length": str(length)})
        self.write(head, body_follows=length > 0 and self.request.method != "HEAD")

    def date(self) -> str:
        """Now, as HTTP writes it."""
        return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())

    def send_body(self, body: bytes) -> None:
        """The body of an answer that lies in memory."""
        if self.request.method != "HEAD":
            self.write(body)
            self.sent += len(body)

    def write(self, data: bytes, body_follows: bool = False) -> None:
        """Send bytes; with `body_follows` in one packet with those that come next.

        Raises CLIENT_GONE, also when the client takes them too slowly.
        """
        flags = 0
        if body_follows and not isinstance(self.connection, SSLSocket):
            flags = socket.MSG_MORE

        rest = memoryview(data)
        self.connection.settimeout(STALL_S)
        while rest:
            count = self.connection.send(rest[:_PIECE], flags)
            rest = rest[count:]
            self._count(count)

    def send_file(self, fd: int, start: int, stop: int) -> None:
        """Bytes [start, stop) of a file, as part of the body: by sendfile where that can be used.

        Raises OSError, and CLIENT_GONE, also when the client takes them too slowly.
        """
        position = start
        if not isinstance(self.connection, SSLSocket):
            position = self._sendfile(fd, start, stop)
        while position < stop:
            piece = os.pread(fd, min(_PIECE, stop - position), position)
            if not piece:  # the file became shorter: the client counts bytes
                self.close_connection = True
                return
            self.write(piece)
            self.sent += len(piece)
            position += len(piece)

    def _sendfile(self, fd: int, start: int, stop: int) -> int:
        """Send by sendfile; the position up to which that went."""
        position = start
        writable = select.poll()
        writable.register(self.connection, select.POLLOUT)
        self.connection.settimeout(STALL_S)
        while position < stop:
            try:
                count = os.sendfile(self.connection.fileno(), fd, position, stop - position)
            except BlockingIOError:
                if not writable.poll(STALL_S * 1000):
                    raise TimeoutError("the client takes nothing") from None
                continue
            except OSError as exc:
                if exc.errno not in _NO_SENDFILE:
                    raise
                break
            if count == 0:
                break
            position += count
            self.sent += count
            self._count(count)

        return position

    def _start_clock(self) -> None:
        self._begun = time.monotonic()
        self._written = 0

    def _count(self, count: int) -> None:
        """Count what was sent. Raises TimeoutError for a client that would take for ever."""
        self._written += count
        elapsed = time.monotonic() - self._begun
        if elapsed > STALL_S and self._written < elapsed * SLOWEST_BPS:
            raise TimeoutError("the client takes too little")

    def _linger(self) -> None:
        """Let the client read the last answer: RFC 9112, section 9.6.

        A connection that is closed with something unread on it is reset, and what the client has
        not read yet is lost.
        """
        with contextlib.suppress(*CLIENT_GONE, OSError):
            self.connection.shutdown(socket.SHUT_WR)
            until = time.monotonic() + LINGER_S
            while time.monotonic() < until:
                self.connection.settimeout(LINGER_S)
                if not self.connection.recv(_PIECE):
                    return


class HttpServer(ThreadingMixIn, TCPServer):
    """A server of HTTP/1.1, with a thread for each connection.

    `tls`: an ssl.SSLContext. Raises HostError when it cannot listen at `address`, which is
    (host, port), or the path of a socket.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024  # several hundred clients may connect in the same instant

    def __init__(
        self,
        address: Union[Tuple[str, int], str],
        handler: Type[Connection],
        reporter: Reporter,
        tls: Any = None,
    ) -> None:
        self.reporter = reporter
        self.tls = tls
        self.closing = False
        self.connections = Allowance(most_connections())
        self.memory = Allowance(MOST_MEMORY)
        self.answering: Set[Connection] = set()
        self._handler = handler
        self._leaving: Deque[Tuple[float, socket.socket]] = deque()  # and when they are closed
        self._spare: Optional[int] = None
        place = address
        self.address_family = socket.AF_UNIX
        if not isinstance(address, str):
            place = f"{address[0]}:{address[1]}"
            self.address_family = family_of(address[0])
        try:
            super().__init__(address, handler)  # type: ignore[arg-type]
        # The last two for what cannot be the name of a host.
        except (OSError, TypeError, UnicodeError) as exc:
            what = f"cannot listen on {place}"
            why = getattr(exc, "strerror", "") or str(exc)
            step = "choose another --port, or stop what listens there (ss -ltnp)"
            raise HostError(what, why, step) from exc
        self._keep_a_spare()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        name = str(host)
        if ":" in name:
            name = f"[{name}]"
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{name}:{port}"

    # ---- who gets in

    def get_request(self) -> Tuple[socket.socket, Any]:
        """The next connection. Raises OSError."""
        try:
            connection, client = super().get_request()
            return connection, client or _NEIGHBOUR
        except OSError as exc:
            if exc.errno in _SCARCE:
                self._answer_with_the_spare()
                time.sleep(BACK_OFF_S)  # the connection still waits: without it this would spin
            raise

    def _keep_a_spare(self) -> None:
        """Hold a descriptor for the day when there are none."""
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _answer_with_the_spare(self) -> None:
        if self._spare is None:
            self._keep_a_spare()
            return

        os.close(self._spare)
        self._spare = None
        with contextlib.suppress(OSError):
            client, _ = self.socket.accept()
            self._say_busy(client)
            client.close()
        self._keep_a_spare()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or turn it away."""
        client = client_of(client_address[0])
        if not self.connections.take(client):
            self._turn_away(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # can't start new thread
            self.connections.give_back(client)
            self._turn_away(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.give_back(client_of(client_address[0]))

    def _turn_away(self, request: socket.socket) -> None:
        """Tell a client that there are too many, and close its connection when it has read that."""
        self._say_busy(request)
        self._leaving.append((time.monotonic() + LINGER_S, request))
        if len(self._leaving) > _MOST_LEAVING:
            _, first = self._leaving.popleft()
            first.close()

    def _say_busy(self, request: socket.socket) -> None:
        with contextlib.suppress(OSError):
            request.setblocking(False)
            if not self.tls:  # who waits for a handshake would take it for a fault
                answer = short_answer(503, "too many connections", retry_after_s=5)
                request.send(answer)
            request.shutdown(socket.SHUT_WR)
            request.recv(_PIECE)  # a close with something unread would reset the connection

    def service_actions(self) -> None:
        """Called again and again while the server runs: close what was turned away."""
        now = time.monotonic()
        while self._leaving and self._leaving[0][0] < now:
            _, request = self._leaving.popleft()
            request.close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection: a slow TLS handshake holds up nobody else."""
        if self.tls:
            request.settimeout(HEAD_S)
            first = request.recv(1, socket.MSG_PEEK)
            if first != b"\x16":  # a handshake begins with that: RFC 8446, section 5.1
                request.sendall(short_answer(400, "this port speaks https"))
                request.recv(_PIECE)  # a close with something unread would reset the connection
                return
            request = self.tls.wrap_socket(request, server_side=True)
        with request:
            self._handler(request, client_address, self).serve()

    # ---- its end

    def drain(self, limit_s: float) -> None:
        """Take no new connection, and let the answers on their way finish for at most `limit_s`."""
        self.closing = True
        self.shutdown()
        self.server_close()
        if self.answering:
            count = len(self.answering)
            self.reporter.info(
                f"stopping when {count} answers are sent; Ctrl-C again stops at once"
            )

        until = time.monotonic() + limit_s
        while self.answering and time.monotonic() < until:
            time.sleep(0.05)

    def server_close(self) -> None:
        """Stop listening."""
        super().server_close()
        for _, request in self._leaving:
            request.close()
        self._leaving.clear()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A fault of one connection ends that connection only."""
        exc = sys.exc_info()[1]
        client = client_address[0]
        kind = type(exc).__name__
        message = f"{client}: {kind}: {exc}"
        if isinstance(exc, OSError):  # a client that hangs up is no fault
            self.reporter.detail(message)
        else:
            self.reporter.warn(message)
