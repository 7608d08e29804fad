"""Answers that a test wrote in place of a network, for a Transport: what it asks is noted, and what
it gets are real answers of http.client and urllib3."""

from __future__ import annotations

import io
import threading
from http.client import HTTPResponse
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from hfship.base.report import Reporter
from hfship.hub.registry import RegistryClient
from hfship.hub.registry_login import RegistryLogin
from hfship.hub.registry_protocol import parse_reference
from hfship.hub.session import Answer, Request, import_urllib3

# Status, headers, body; or what is raised instead.
Scripted = Union[Tuple[int, Mapping[str, str], bytes], Exception]


class Sent(NamedTuple):
    """A request, with the headers that went out."""

    method: str
    url: str
    headers: Dict[str, str]
    body: Any

    @property
    def login(self) -> str:
        """Its Authorization; "" for none."""
        return self.headers.get("Authorization", "")


class Wire:
    """A connection on which an answer lies."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, _: str) -> io.BytesIO:
        """The answer as http.client reads it."""
        return io.BytesIO(self._content)


def answer(method: str, status: int, headers: Mapping[str, str], body: bytes) -> Any:
    """An answer as urllib3 gives it, body unread."""
    lines = [f"HTTP/1.1 {status} Said"]
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        lines.append(f"{name}: {value}")
    head = "\r\n".join(lines) + "\r\n\r\n"
    read = HTTPResponse(Wire(head.encode("latin-1") + body), method=method)  # type: ignore[arg-type]
    read.begin()
    return import_urllib3().HTTPResponse(
        read,
        headers=dict(read.headers),
        status=status,
        preload_content=False,
        decode_content=False,
        original_response=read,
        request_method=method,
    )


class ScriptedSession:
    """Stands for the HubSession of a Transport: the answers come in their order, and there have to
    be enough."""

    def __init__(self, authorize: Callable[[Request], Any], answers: List[Scripted]) -> None:
        self._authorize = authorize
        self.answers = answers
        self.sent: List[Sent] = []
        self._given: List[Answer] = []

    @property
    def unread(self) -> int:
        """Answers that hold their connection still."""
        return sum(not one.raw.closed for one in self._given)

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: Any = None,
        proxy: Optional[Any] = None,
    ) -> Answer:
        """The next answer."""
        request = Request(url, dict(headers))
        self._authorize(request)
        body = data
        if hasattr(data, "read"):
            body = b"".join(iter(data.read, b""))
        self.sent.append(Sent(method, url, request.headers, body))
        assert self.answers, f"one request too many: {method} {url}"
        scripted = self.answers.pop(0)
        if isinstance(scripted, Exception):
            raise scripted
        self._given.append(Answer(request, answer(method, *scripted)))
        return self._given[-1]


class NoWait(threading.Event):
    """The end of a run, for which nobody waits: how long somebody would have is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: List[float] = []

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Whether the run ends, at once."""
        if timeout:
            self.waits.append(timeout)
        return self.is_set()


class ScriptedRegistry:
    """A client of the registry r.example for org/app:1, what it says, and what it sent."""

    url = "https://r.example"

    def __init__(
        self,
        *answers: Scripted,
        login: Optional[RegistryLogin] = None,
        mirrors: Sequence[str] = (),
        endpoint: str = url,
    ) -> None:
        self.err = io.StringIO()
        self.stop = NoWait()
        self.reporter = Reporter("plain", 1, err=self.err)
        reference = parse_reference("docker://r.example/org/app:1")
        self.client = RegistryClient(
            reference, endpoint, login, self.reporter, self.stop, mirrors=mirrors
        )
        self.session = ScriptedSession(self.client._authorization, list(answers))
        self.client._session = self.session  # type: ignore[assignment]

    @property
    def sent(self) -> List[Tuple[str, str, str]]:
        """Method, address and Authorization of each request."""
        return [(one.method, one.url, one.login) for one in self.session.sent]
