"""A member of a group that plays vLLM over several hosts: the head answers when all have met, and hangs when one is lost.

    vllm serve MODEL --nnodes N --node-rank R --master-addr A --master-port P [--headless] --host H --port P

As vLLM's own processes do: members wait for each other at the address of the head; without the others the head neither answers
nor ends, and one that has lost the head ends with an error.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Dict, List

MEET_S = 60.0


def options(words: List[str]) -> Dict[str, str]:
    """The flags of a command line with their values."""
    pairs = zip(words, [*words[1:], ""])
    return {word: value for word, value in pairs if word.startswith("--")}


def lead(told: Dict[str, str]) -> None:
    """Wait for the others, answer, and stand still when one of them is gone."""
    with socket.create_server((told["--master-addr"], int(told["--master-port"]))) as meeting:
        others = [meeting.accept()[0] for _ in range(int(told["--nnodes"]) - 1)]
    engine = [
        "python3",
        "/usr/local/bin/engine.py",
        told["--port"],
        "group",
        "0.05",
        told["--host"],
    ]
    answering = subprocess.Popen(engine)
    signal.signal(signal.SIGTERM, lambda *_: (answering.kill(), sys.exit(0)))
    for other in others:
        other.recv(1)
    answering.send_signal(signal.SIGSTOP)
    signal.pause()


def follow(told: Dict[str, str]) -> None:
    """Join the head, and end when it is gone."""
    deadline = time.monotonic() + MEET_S
    while True:
        try:
            head = socket.create_connection((told["--master-addr"], int(told["--master-port"])), 2)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
            continue
        head.settimeout(None)
        head.recv(1)
        sys.exit("the head is gone")


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        print("0.32.0")
        sys.exit()
    told = options(sys.argv)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if "--headless" in told:
        follow(told)
    lead(told)
