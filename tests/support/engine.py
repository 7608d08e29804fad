"""An engine with the face of vLLM: health, chat as a whole and as a stream, embeddings, forms, metrics. It counts what reaches it.

    python3 engine.py PORT NAME [SECONDS-PER-TOKEN]

Its answers say who gave them (`id`), and /__seen what came: paths, headers, bodies. It runs as a program of its own, so
that a test can kill it or stop it (SIGSTOP) as an engine dies or hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List

NAME, PAUSE_S = "", 0.02
SEEN: List[Dict[str, Any]] = []
RUNNING = 0
TOKENS = 0


def answer(
    writer: asyncio.StreamWriter, code: int, value: Any, kind: str = "application/json"
) -> None:
    """Write a whole answer."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"HTTP/1.1 {code} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


async def read_body(reader: asyncio.StreamReader, headers: Dict[str, str]) -> bytes:
    """The body of a request, of a known length or in chunks."""
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    body = b""
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        body += await reader.readexactly(size)
        await reader.readline()
        if not size:
            return body


async def stream(writer: asyncio.StreamWriter, count: int) -> None:
    """A stream of `count` tokens in server-sent events."""
    global RUNNING, TOKENS
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    RUNNING += 1
    try:
        for number in range(count):
            choice = {"index": 0, "delta": {"content": f"t{number} "}, "finish_reason": None}
            event = {
                "id": NAME,
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [choice],
            }
            piece = b"data: " + json.dumps(event).encode() + b"\n\n"
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            TOKENS += 1
            await asyncio.sleep(PAUSE_S)
        end = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))
    finally:
        RUNNING -= 1


def metrics() -> bytes:
    """The metrics that rules and dashboards ask for, as vLLM 0.32 names them."""
    model = f'model_name="{NAME}",engine="0"'
    return f"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{model}}} {RUNNING}
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{{model}}} 0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{{model}}} 0.25
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{{model}}} {TOKENS}
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_sum{{{model}}} {TOKENS}
vllm:iteration_tokens_total_count{{{model}}} {TOKENS}
""".encode()


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {
                k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if ": " in line)
            }
            body = await read_body(reader, headers)
            if path == "/health":
                answer(writer, 200, b"")
            elif path == "/metrics":
                answer(writer, 200, metrics(), "text/plain")
            elif path == "/__seen":
                answer(writer, 200, SEEN)
            else:
                await serve(writer, method, path, headers, body)
            await writer.drain()
            if headers.get("connection", "").lower() == "close":
                break
    writer.close()


async def serve(
    writer: asyncio.StreamWriter, method: str, path: str, headers: Dict[str, str], body: bytes
) -> None:
    """Answer what a client asked."""
    asked: Dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        asked = json.loads(body)
    SEEN.append(
        {
            "method": method,
            "path": path,
            "headers": headers,
            "size": len(body),
            "model": asked.get("model"),
        }
    )
    if asked.get("stream"):
        return await stream(writer, int(asked.get("max_tokens") or 10))
    if path == "/v1/embeddings":
        row = {"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}
        return answer(
            writer,
            200,
            {
                "object": "list",
                "model": "m",
                "data": [row],
                "usage": {"prompt_tokens": 1, "total_tokens": 1},
            },
        )
    message: Dict[str, Any] = {"role": "assistant", "content": "hi"}
    if asked.get("tools"):
        call = {"name": asked["tools"][0]["function"]["name"], "arguments": "{}"}
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": call}],
        }
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    answer(
        writer,
        200,
        {
            "id": NAME,
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        },
    )
    return None


async def main(port: int, host: str) -> None:
    """Serve for ever."""
    server = await asyncio.start_server(handle, host, port, limit=2**26, backlog=1024)
    async with server:
        await server.serve_forever()


@dataclass
class Engine:
    """A running engine."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def seen(self) -> List[Dict[str, Any]]:
        """The requests that reached it, but for questions after its health."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/__seen", timeout=5) as response:
            found: List[Dict[str, Any]] = json.load(response)
        return found

    def stop(self) -> None:
        """Make it hang."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End a hang."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


def start_engine(port: int, name: str, pause_s: float = 0.02) -> Engine:
    """Start an engine, and wait until it answers."""
    argv = [sys.executable, str(Path(__file__)), str(port), name, str(pause_s)]
    engine = Engine(name, port, subprocess.Popen(argv))
    for _ in range(200):
        with contextlib.suppress(OSError):
            engine.seen()
            return engine
        time.sleep(0.05)
    engine.kill()
    raise RuntimeError(f"{name} does not answer on {port}")


if __name__ == "__main__":
    NAME = sys.argv[2]
    if len(sys.argv) > 3:
        PAUSE_S = float(sys.argv[3])
    HOST = sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1"
    asyncio.run(main(int(sys.argv[1]), HOST))
