"""Certificates and proxies for tests and benchmarks."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Union


class Certificate(NamedTuple):
    """PEM files: a certificate, its key, and both in one."""

    cert: Path
    key: Path
    both: Path


def make_certificate(
    folder: Path,
    subject: str = "/CN=localhost",
    names: str = "IP:127.0.0.1",
    days: int = 30,
    openssl: Optional[str] = shutil.which("openssl"),
) -> Certificate:
    """A self-signed certificate of `names` (of this machine), made in `folder`. Needs no configuration of openssl."""
    made, config = (
        Certificate(*(folder / f"{name}.pem" for name in Certificate._fields)),
        folder / "openssl.cnf",
    )
    config.write_text("[req]\ndistinguished_name = name\n[name]\n")
    command = [
        str(openssl),
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        str(days),
        "-subj",
        subject,
    ]
    command += ["-config", str(config), "-addext", f"subjectAltName={names}"]
    subprocess.run(
        [*command, "-keyout", made.key, "-out", made.cert], check=True, capture_output=True
    )
    made.both.write_bytes(made.key.read_bytes() + made.cert.read_bytes())
    return made


class Proxy:
    """A TCP proxy on a port of loopback. Subclasses say where a connection goes, and may cut it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._listener.close()

    def far_end(self, near: socket.socket) -> Optional[socket.socket]:
        """The other end for a new connection; None to end it."""
        raise NotImplementedError

    def lets_pass(self, size: int) -> bool:
        """Whether the next piece of a connection may go through; if not, it is cut."""
        return True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(
                    target=self._serve, args=(self._listener.accept()[0],), daemon=True
                ).start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            far = self.far_end(near)
            if far:
                threading.Thread(target=self._pass_on, args=(near, far), daemon=True).start()
                self._pass_on(far, near)
        near.close()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (piece := source.recv(1 << 16)) and self.lets_pass(len(piece)):
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class CutLine(Proxy):
    """Goes to one port, and closes every connection once `cut_at` bytes have passed in all."""

    def __init__(self, port: int) -> None:
        self._target, self._lock = port, threading.Lock()
        self.cut_at: Optional[int] = None
        self.passed = 0
        super().__init__()

    def far_end(self, near: socket.socket) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._target))

    def lets_pass(self, size: int) -> bool:
        with self._lock:
            self.passed += size
            return self.cut_at is None or self.passed <= self.cut_at


class ConnectProxy(Proxy):
    """Knows CONNECT only; `asked` holds the heads of the requests."""

    def __init__(self) -> None:
        self.asked: List[bytes] = []
        super().__init__()

    def far_end(self, near: socket.socket) -> Optional[socket.socket]:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = near.recv(4096)
            if not piece:
                return None
            head += piece
        self.asked.append(head)
        host, _, port = head.split()[1].decode().rpartition(":")
        far = socket.create_connection((host.strip("[]"), int(port)))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        return far


class RawServer:
    """Answers each request on loopback with the bytes that `answer` makes of its head, and closes the connection.

    `answer` gives bytes, or an iterable of bytes that are sent one after the other as long as somebody listens.
    """

    def __init__(self, answer: Callable[[str], Union[bytes, Iterable[bytes]]]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.heads: List[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError), near:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = near.recv(1 << 16)
                if not piece:
                    return
                head += piece
            text = head.decode("latin-1")
            self.heads.append(text)
            answer = self._answer(text)
            for piece in [answer] if isinstance(answer, bytes) else answer:
                near.sendall(piece)


def answer(
    body: bytes = b"", status: str = "200 OK", length: Optional[int] = None, **headers: str
) -> bytes:
    """An HTTP answer. Headers are given as Python names: Content_Type."""
    named = {"Content_Length": str(len(body) if length is None else length), **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items()]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode("latin-1") + body
