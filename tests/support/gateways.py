"""A gateway as hfship configures it, run by a real HAProxy as a plain program, before engines that play vLLM."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from hfship.site.gateway import CONFIG_FILE, config_text
from hfship.site.maps import key_maps, map_path, map_text, model_maps
from hfship.site.terms import (
    ADMIN_SOCKET,
    PAGE_SOCKET,
    AccessKey,
    Gateway,
    GatewayModel,
    HaproxyVersion,
)
from support import components

VERSIONS: Dict[str, HaproxyVersion] = {"haproxy-2.6": (2, 6), "haproxy-3.4": (3, 4)}


def another_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def key_named(name: str, **rights: Any) -> AccessKey:
    """A key whose secret is sk-NAME."""
    return AccessKey(name, hashlib.sha256(f"sk-{name}".encode()).hexdigest(), **rights)


class Reply(NamedTuple):
    """What the gateway answered."""

    status: int
    body: bytes
    headers: Dict[str, str]

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error, "" for none."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(self.json["error"]["code"])
        return ""


@dataclass
class RunningGateway:
    """HAProxy before some models."""

    program: Path
    folder: Path
    gateway: Gateway
    keys: List[AccessKey]
    process: Optional[subprocess.Popen[bytes]] = None
    upstream: Mapping[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.gateway.bind.rpartition(":")[2])

    def write(self, generation: str = "first") -> None:
        """Write its files."""
        (self.folder / "run").mkdir(parents=True, exist_ok=True)
        (self.folder / "maps").mkdir(exist_ok=True)
        (self.folder / CONFIG_FILE).write_text(config_text(self.gateway, generation))
        models = self.gateway.models
        upstream = {one.name: f"sk-of-{one.name}" for one in models}
        for name, entries in {
            **model_maps(models, upstream),
            **key_maps(models, self.keys),
        }.items():
            (self.folder / map_path(name)).write_text(map_text(entries))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.write()
        argv = [str(self.program), "-W", "-db", "-f", str(self.folder / CONFIG_FILE)]
        log = open(self.folder / "log", "ab")
        self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        for _ in range(200):
            with contextlib.suppress(OSError):
                if self.ask("GET", "/health", key="").status == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text()[-3000:])

    def reload(self) -> None:
        """Have it read its configuration again."""
        assert self.process
        self.process.send_signal(signal.SIGUSR2)

    def end(self) -> None:
        """End it."""
        if self.process:
            self.process.kill()
            self.process.wait()
            for line in subprocess.run(
                ["pgrep", "-f", f"^{self.program} .*{self.folder}"], capture_output=True, text=True
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    subprocess.run(["kill", "-9", line], check=False)

    def log(self) -> List[Dict[str, Any]]:
        """The lines of its access log."""
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def last_of(self, model: str) -> Dict[str, Any]:
        """The newest line of the access log, once it is of a model; HAProxy writes it when the answer
        has gone out."""
        deadline = time.monotonic() + 5
        while self.log()[-1:] == [] or self.log()[-1]["model"] != model:
            assert time.monotonic() < deadline, self.log()[-1:]
            time.sleep(0.02)
        return self.log()[-1]

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        key: str = "bob",
        headers: Optional[Mapping[str, str]] = None,
        timeout: float = 20,
        chunks: Sequence[bytes] = (),
    ) -> Reply:
        """One request, with the key sk-KEY; `body` is JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = {"Content-Type": "application/json"}
        if key:
            sent["Authorization"] = f"Bearer sk-{key}"
        sent.update(headers or {})
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if chunks:
                    connection.request(method, path, iter(chunks), sent, encode_chunked=True)
                else:
                    connection.request(method, path, data, sent)
            response = connection.getresponse()
            return Reply(
                response.status, response.read(), {k.lower(): v for k, v in response.getheaders()}
            )
        finally:
            connection.close()

    def chat(self, model: str, key: str = "bob", **more: Any) -> Reply:
        """One small chat."""
        timeout = more.pop("timeout", 20)
        body = {"messages": [{"role": "user", "content": "hi"}], "model": model, **more}
        return self.ask("POST", "/v1/chat/completions", body, key, timeout=timeout)

    def raw(self, request: bytes, timeout: float = 5) -> bytes:
        """What comes back for bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(request)
            answer = b""
            with contextlib.suppress(OSError):
                while True:
                    piece = connection.recv(65536)
                    if not piece:
                        break
                    answer += piece
            return answer


def make_gateway(
    component: str,
    folder: Path,
    models: Sequence[GatewayModel],
    keys: Sequence[AccessKey],
    port: int,
    **more: Any,
) -> RunningGateway:
    """A gateway of that version of HAProxy, not started yet; its metrics are at another port."""
    program = components.require(component)
    gateway = Gateway(
        tuple(models),
        VERSIONS[component],
        bind=f"127.0.0.1:{port}",
        metrics_bind=f"127.0.0.1:{another_port()}",
        admin_socket=str(folder / ADMIN_SOCKET),
        page_socket=str(folder / PAGE_SOCKET),
    )
    return RunningGateway(Path(str(program)), folder, replace(gateway, **more), list(keys))
