#!/usr/bin/env python3
"""Two network namespaces joined by a slow line:

    python3 benchmarks/slow_link.py DELAY_MS MBIT_PER_S LOSS

Kernels without netem cannot delay packets, so a process does: it holds one TUN device in each
namespace and passes every packet on after the delay, at the given rate and with the given share
lost. Namespaces `hfship-a` (10.77.0.1) and `hfship-b` (10.77.0.2) exist while it runs. Needs root.
Prints "ready".
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Deque, Dict, Iterator, NoReturn, Tuple

ENDS = {"hfship-a": "10.77.0.1", "hfship-b": "10.77.0.2"}
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN_NO_PI = 0x1001
QUEUE_S = 0.3  # a router with more than this waiting drops
BURST = 64  # packets read from one side before the other has its turn

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Run the block in a network namespace; threads and processes started in it stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if _libc.setns(there, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter namespace {namespace}")
        yield
    finally:
        _libc.setns(home, 0)
        os.close(there)
        os.close(home)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def open_end(namespace: str, address: str) -> int:
    """A TUN device in a fresh namespace; returns its descriptor."""
    subprocess.run(["ip", "netns", "del", namespace], check=False, stderr=subprocess.DEVNULL)
    ip("netns", "add", namespace)
    with inside(namespace):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14x", b"line0", IFF_TUN_NO_PI))
        ip("address", "add", f"{address}/24", "dev", "line0")
        ip("link", "set", "line0", "up")
        ip("link", "set", "lo", "up")
    return device


class Direction:
    """Packets on their way to one end: (time of arrival, packet), in order."""

    def __init__(self, target: int, delay_s: float, bytes_per_s: float, loss: float) -> None:
        self.target, self._delay, self._rate, self._loss = target, delay_s, bytes_per_s, loss
        self._free_at = 0.0
        self.waiting: Deque[Tuple[float, bytes]] = deque()

    def send(self, packet: bytes, now: float) -> None:
        """Accept a packet, unless it is lost or the queue is full."""
        start = max(now, self._free_at)
        if start - now > QUEUE_S or random.random() < self._loss:
            return
        self._free_at = start + len(packet) / self._rate
        self.waiting.append((self._free_at + self._delay, packet))

    def deliver(self, now: float) -> None:
        while self.waiting and self.waiting[0][0] <= now:
            with contextlib.suppress(OSError):
                os.write(self.target, self.waiting.popleft()[1])


def forward(ends: Tuple[int, int], delay_s: float, bytes_per_s: float, loss: float) -> NoReturn:
    """Pass packets both ways for ever."""
    away: Dict[int, Direction] = {
        ends[0]: Direction(ends[1], delay_s, bytes_per_s, loss),
        ends[1]: Direction(ends[0], delay_s, bytes_per_s, loss),
    }
    selector = selectors.DefaultSelector()
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    while True:
        due = min(
            (line.waiting[0][0] for line in away.values() if line.waiting),
            default=time.monotonic() + 1,
        )
        for key, _ in selector.select(max(0.0, due - time.monotonic())):
            for _ in range(BURST):
                try:
                    packet = os.read(key.fd, 65536)
                except BlockingIOError:
                    break
                away[key.fd].send(packet, time.monotonic())
        for line in away.values():
            line.deliver(time.monotonic())


def main() -> None:
    """Set up, forward until a signal comes, clean up."""
    delay_ms, mbit, loss = (float(word) for word in sys.argv[1:4])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        ends = [open_end(name, address) for name, address in ENDS.items()]
        print("ready", flush=True)
        forward((ends[0], ends[1]), delay_ms / 1000, mbit * 125_000, loss)
    finally:
        for name in ENDS:
            if Path(f"/run/netns/{name}").exists():
                ip("netns", "del", name)


if __name__ == "__main__":
    main()
