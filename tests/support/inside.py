"""A Docker engine in a network namespace of its own that stays up between commands, and hfship beside it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator

from conftest import Program
from support import components

LOAD = Path(__file__).with_name("load.py")


class Inside:
    """What runs there: programs by `run`, hfship by calling it."""

    def __init__(self, pid: int, hfship: Program) -> None:
        self.pid, self.hfship = pid, hfship
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        self.env = dict(pair.decode().split("=", 1) for pair in pairs if b"=" in pair)
        hfship.run = self.run

    def argv(self, argv: Any) -> list:
        """A command as it is run there."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", *map(str, argv)]

    def run(self, argv: Any, env: Any = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program there."""
        kept = {name: self.env[name] for name in ("PATH", "DOCKER_HOST", "DOCKER_CONFIG")}
        return subprocess.run(self.argv(argv), env={**(env or self.env), **kept}, **options)

    def __call__(self, *words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """hfship there."""
        return self.hfship(*words, **options)

    def start(self, *words: Any, **options: Any) -> subprocess.Popen[str]:
        """hfship there, at work."""
        argv = self.argv([*self.hfship.argv, *words])
        kept = {name: self.env[name] for name in ("PATH", "DOCKER_HOST", "DOCKER_CONFIG")}
        return subprocess.Popen(argv, env={**self.hfship.env(None), **kept}, text=True, **options)

    def docker(self, *words: str) -> str:
        """The output of docker."""
        done = self.run(["docker", *words], capture_output=True, text=True)
        return done.stdout + done.stderr

    def start_load(self, *words: Any, key: str) -> subprocess.Popen[str]:
        """load.py, at work."""
        env = {**self.env, "API_KEY": key}
        return subprocess.Popen(
            self.argv([sys.executable, LOAD, *words]), env=env, stdout=subprocess.PIPE, text=True
        )

    def load(self, *words: Any, key: str) -> Dict[str, Any]:
        """What load.py says."""
        return fared(self.start_load(*words, key=key))

    def curl(self, *words: str) -> str:
        """The output of curl."""
        return self.run(["curl", "-sk", "-m", "20", *words], capture_output=True, text=True).stdout


def fared(load: subprocess.Popen[str]) -> Dict[str, Any]:
    """What a load says at its end."""
    said, _ = load.communicate(timeout=120)
    value: Dict[str, Any] = json.loads(said)
    return value


@contextlib.contextmanager
def docker_inside(hfship: Program, run: Path) -> Iterator[Inside]:
    """An engine, for as long as it is needed; `run` is a folder for its notes."""
    components.require("docker")
    note = run / "pid"
    script = f"echo $$ > {note}.new && mv {note}.new {note} && exec sleep 3600"
    engine = subprocess.Popen(components.with_docker_argv(["sh", "-c", script]))
    try:
        for _ in range(1800):
            if note.exists() or engine.poll() is not None:
                break
            time.sleep(0.1)
        yield Inside(int(note.read_text()), hfship)
    finally:
        engine.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            engine.wait(60)
        os.path.exists(note) and note.unlink()
