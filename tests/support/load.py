"""Streams and single requests against an OpenAI API on loopback, and how they fared, as one line of JSON.

    python3 load.py PORT MODEL COUNT TOKENS [SECONDS|-]     the key is in $API_KEY

COUNT streams of TOKENS tokens at once; with SECONDS also a small request every 50 ms for so long, with - until stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional


class Outcome(NamedTuple):
    """What became of one request: sent `at`, by perf_counter of all processes; `first` are seconds to the first byte."""

    at: float
    status: int
    whole: bool
    first: Optional[float]
    seconds: float
    by: str
    wrong: str = ""


async def ask(port: int, model: str, tokens: int, key: str) -> Outcome:
    """One chat; a stream of `tokens`, or for 0 a whole answer."""
    body: Dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "model": model}
    if tokens:
        body.update(stream=True, max_tokens=tokens)
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    started, status, first, text = time.perf_counter(), 0, None, b""
    wrong = ""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + data)
        line = await reader.readline()
        status = int(line.split()[1]) if line else 0
        while line:
            line = await reader.readline()
            if first is None and line[:1] in (b"d", b"{"):
                first = time.perf_counter() - started
            text += line
        writer.close()
    except OSError as exc:
        wrong = repr(exc)
    seconds = time.perf_counter() - started
    by = text.partition(b'"id": "')[2].partition(b'"')[0].decode()
    whole = status == 200 and ((b"[DONE]" in text) if tokens else bool(by))
    return Outcome(
        started,
        status,
        whole,
        first,
        seconds,
        by,
        wrong or text[-200:].decode(errors="replace") * (not whole),
    )


async def singles(port: int, model: str, key: str, until: asyncio.Future[Any]) -> List[Outcome]:
    """A small request every 50 ms, each waited for by itself."""
    tasks = []
    while not until.done():
        tasks.append(asyncio.create_task(ask(port, model, 0, key)))
        await asyncio.sleep(0.05)
    return list(await asyncio.gather(*tasks))


def summary(outcomes: List[Outcome]) -> Dict[str, Any]:
    """How requests fared."""
    whole = [one for one in outcomes if one.whole]
    firsts = sorted(one.first for one in whole if one.first is not None)
    by: Dict[str, int] = {}
    for one in whole:
        by[one.by] = by.get(one.by, 0) + 1
    return {
        "sent": len(outcomes),
        "whole": len(whole),
        "statuses": sorted({one.status for one in outcomes}),
        "first_ms": round(statistics.median(firsts) * 1000, 1) if firsts else None,
        "slowest_s": round(max((one.seconds for one in outcomes), default=0), 2),
        "by": by,
        "last_broken_at": max((one.at for one in outcomes if not one.whole), default=0),
        "wrong": [one.wrong for one in outcomes if not one.whole][:3],
    }


def end_of(seconds: str) -> asyncio.Future[Any]:
    """What is done when no more small requests are sent."""
    if seconds == "-":
        return asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    return asyncio.ensure_future(asyncio.sleep(float(seconds)))


async def main(port: int, model: str, count: int, tokens: int, seconds: str) -> None:
    """Print how they fared."""
    key = os.environ.get("API_KEY", "")
    streams = asyncio.gather(*[ask(port, model, tokens, key) for _ in range(count)])
    small = []
    if seconds:
        small = await singles(port, model, key, end_of(seconds))
    print(json.dumps({"streams": summary(list(await streams)), "small": summary(small)}))


if __name__ == "__main__":
    words = sys.argv[1:]
    asyncio.run(
        main(
            int(words[0]),
            words[1],
            int(words[2]),
            int(words[3]),
            "".join(words[4:5]),
        )
    )
