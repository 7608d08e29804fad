"""The gateway beside a straight connection, and beside vllm-router: latency, streams, memory.

    python3 benchmarks/all.py gateway             in the one table
    python3 benchmarks/gateway.py [--own-core] [VLLM-ROUTER]

One engine that plays vLLM; medians of some rounds, each direct, through a HAProxy that only passes
on, and through ours, in turns. First bytes of 200 streams at once, a small request by itself, and
the memory of the gateway (VmHWM).

The bare HAProxy is the floor: what ours takes beyond it is what keys, rights, limits and the model
of the body cost. Client, HAProxy and engine are a process each, so with fewer than three cores to
themselves a burst through any proxy takes a core away from those that are measured directly, too.
With --own-core client and engine share one core in every row, and what is between them has another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from measure import OURS, Row, Scale, full, table  # noqa: E402

from conftest import free_port  # noqa: E402
from hfship.site.gateway import CONFIG_FILE  # noqa: E402
from hfship.site.terms import GatewayModel, Replica  # noqa: E402
from support import components  # noqa: E402
from support.engine import start_engine  # noqa: E402
from support.gateways import VERSIONS, key_named, make_gateway  # noqa: E402

BARE = "bare HAProxy"  # what only passes on
BARE_CONFIG = """
global
    maxconn 4000
    nbthread 2
defaults
    mode http
    option http-no-delay
    option http-server-close
    timeout connect 1s
    timeout client 3600s
    timeout server 3600s
frontend all
    bind 127.0.0.1:{port}
    default_backend engine
backend engine
    server m 127.0.0.1:{engine}
"""
FIRST_BYTE = "first byte of 200 streams"
REQUEST = "small request"
LOAD = ROOT / "tests/support/load.py"
ONE = """
import http.client, json, os, statistics, sys, time
body = json.dumps({"messages": [], "model": "m"})
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["API_KEY"]}
connection, times = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1])), []
for _ in range(400):
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, headers)
    connection.getresponse().read()
    times.append(time.perf_counter() - started)
print(statistics.median(times) * 1000)
"""


def streams(port: int) -> Dict[str, Any]:
    """How 200 streams of 40 tokens fared."""
    argv = [sys.executable, str(LOAD), str(port), "m", "200", "40"]
    done = subprocess.run(
        argv, env={**os.environ, "API_KEY": "sk-bob"}, capture_output=True, text=True, check=True
    )
    found: Dict[str, Any] = json.loads(done.stdout)["streams"]
    assert found["whole"] == 200, found
    return found


def one(port: int) -> float:
    """Milliseconds of a small request, over a connection that is kept."""
    argv = [sys.executable, "-c", ONE, str(port)]
    done = subprocess.run(
        argv, env={**os.environ, "API_KEY": "sk-bob"}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def processes(word: str) -> Iterator[Path]:
    """The processes whose command line has the word, in /proc."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word in (entry / "cmdline").read_text() and int(entry.name) != os.getpid():
                yield entry


def memory(word: str) -> int:
    """Bytes at most of the largest process whose command line has the word."""
    most = 0
    for entry in processes(word):
        with contextlib.suppress(OSError, TypeError):
            status = (entry / "status").read_text()
            most = max(most, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024)  # type: ignore[index]
    return most


def move(word: str, core: int) -> None:
    """Have the processes whose command line has the word run on one core."""
    for entry in processes(word):
        for thread in (entry / "task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def rounds_of(ports: Mapping[str, int], count: int) -> List[Dict[Tuple[str, str], float]]:
    """What some rounds found, each by every way in turns: milliseconds, by row and way."""
    found = []
    for _ in range(count):
        taken = {}
        for way, port in ports.items():
            taken[FIRST_BYTE, way] = streams(port)["first_ms"]
        for way, port in ports.items():
            taken[REQUEST, way] = one(port)
        found.append(taken)
    return found


def rows_of_gateway(
    name: str, rounds: List[Dict[Tuple[str, str], float]], held: Mapping[str, int]
) -> Iterator[Row]:
    """The rows of a gateway: seconds, as medians; the memory of each way, where it is known."""
    for row, way in rounds[0]:
        middle = statistics.median(taken[row, way] for taken in rounds) / 1000
        memory_of = held.get(way, 0) if row == FIRST_BYTE else 0
        yield Row(f"{row}, {name}", way, middle, memory=memory_of)


@contextlib.contextmanager
def bare(component: str, folder: Path, engine: int) -> Iterator[int]:
    """A HAProxy that only passes on to the engine; its port."""
    port = free_port()
    config = folder / "bare.cfg"
    config.write_text(BARE_CONFIG.format(port=port, engine=engine))
    argv = [str(components.require(component)), "-db", "-f", str(config)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            await_port(port)
            yield port
        finally:
            process.kill()


def await_port(port: int) -> None:
    """Wait until somebody listens there."""
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nobody listens on {port}")


def rows(work: Path, scale: Scale, router: str = "", own_core: bool = False) -> Iterator[Row]:
    """The rows of each HAProxy that is there, and of vllm-router, whose program is `router`."""
    count = 1 if scale.is_small else 5
    cores = sorted(os.sched_getaffinity(0))
    if own_core:
        os.sched_setaffinity(0, {cores[0]})
    engine = start_engine(free_port(), "m", 0.05)
    try:
        for component in VERSIONS:
            if not components.path(component):
                yield Row("gateway", component, said="left out: it is not here")
                continue
            folder = work / component
            folder.mkdir()
            models = [GatewayModel("m", ("m",), (Replica("m", f"127.0.0.1:{engine.port}"),))]
            gateway = make_gateway(component, folder, models, [key_named("bob")], free_port())
            gateway.start()
            with bare(component, folder, engine.port) as port:
                ports = {"no gateway": engine.port, BARE: port, OURS: gateway.port}
                names = {BARE: str(folder / "bare.cfg"), OURS: str(folder / CONFIG_FILE)}
                for word in names.values():
                    if own_core:
                        move(word, cores[1])
                found = rounds_of(ports, count)
                held = {way: memory(word) for way, word in names.items()}
            gateway.end()
            yield from rows_of_gateway(component, found, held)
        if router:
            yield from rows_of_router(router, engine.port, count)
    finally:
        engine.kill()


def rows_of_router(router: str, engine: int, count: int) -> List[Row]:
    """The rows of vllm-router."""
    port = str(free_port())
    words = ["--host", "127.0.0.1", "--port", port, "--worker-urls", f"http://127.0.0.1:{engine}"]
    process = subprocess.Popen(
        [router, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(8)
    found = rounds_of({"no gateway": engine, "vllm-router": int(port)}, count)
    held = {"vllm-router": memory(f"--port\0{port}")}
    process.kill()
    return list(rows_of_gateway("vllm-router", found, held))


def main() -> None:
    """Print a row for each gateway."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("router", nargs="?", default="", help="the program of vllm-router")
    parser.add_argument("--own-core", action="store_true", help="one for what is between")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hfship-") as folder:
        print(table(rows(Path(folder), full(0), args.router, args.own_core)))


if __name__ == "__main__":
    main()
