"""Time from `hfship serve` to the first answer, beside plain `docker compose up` of the same file.

    python3 benchmarks/serve.py [ROUNDS] [vllm|at-once]

A real Docker engine and vLLM's CPU build (tests/support/components.py install docker vllm-image),
or `at-once` an engine that plays vLLM and needs a second (install docker site-images), which
leaves what hfship itself takes. In turns:
compose   `docker compose up -d`, and a client that asks every 0.1 s for one token
serve     `hfship serve` of a model that was served here before
first     the same with nothing remembered: folder proven, plan checked by the image
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from support import components  # noqa: E402
from support.make_model import make_model  # noqa: E402

PYZ = ROOT / "dist/hfship.pyz"
NAME = "tiny"
ASK_S = 0.1  # between two questions of the plain client
# Of the kind of engine: its image, and the component that brings it.
IMAGES = {
    "vllm": (components.VLLM_IMAGE, "vllm-image"),
    "at-once": (components.ENGINE_IMAGE, "site-images"),
}


class Box:
    """hfship and docker in folders of their own, beside the engine."""

    def __init__(self, work: Path, image: str) -> None:
        self.work = work
        self.image = image
        folders = {
            "HFSHIP_SITE_MODELS_DIR": "site",
            "HFSHIP_DEPLOY_DIR": "deploy",
            "HFSHIP_LOG_DIR": "logs",
            "HOME": "home",
        }
        self.env = {**os.environ, **{name: str(work / path) for name, path in folders.items()}}
        make_model(work / "site" / NAME)

    def run(self, *argv: str) -> None:
        """Run a program that must succeed."""
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}")

    def hfship(self, *words: str) -> None:
        """Run hfship."""
        self.run(sys.executable, str(PYZ), *words, "--quiet")

    def forget(self) -> None:
        """Remove all that hfship remembers."""
        self.run("rm", "-rf", str(self.work / "deploy"), str(self.work / "home"))

    def remove(self) -> None:
        """Remove the container and its volume, which keeps what vLLM compiled."""
        self.run("docker", "rm", "-f", "-v", f"vllm_{NAME}")
        self.run("docker", "volume", "prune", "-a", "-f")

    def by_serve(self) -> float:
        """Seconds of `hfship serve`, which ends when the model answered."""
        started = time.monotonic()
        self.hfship("serve", NAME, "--image", self.image)
        return time.monotonic() - started

    def by_compose(self) -> float:
        """Seconds of `docker compose up -d` until one token is answered."""
        folder = self.work / "deploy" / NAME
        started = time.monotonic()
        self.run("docker", "compose", "-f", str(folder / "docker-compose.yml"), "up", "-d")
        while not self.answers(folder):
            time.sleep(ASK_S)
        return time.monotonic() - started

    def answers(self, folder: Path) -> bool:
        """Whether the model writes one token."""
        port = re.search(r':(\d+):8000"', (folder / "docker-compose.yml").read_text())
        key = re.search("VLLM_API_KEY=(.*)", (folder / ".env").read_text())
        assert port and key
        body = {"model": NAME, "prompt": "Hello", "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key[1]}", "Content-Type": "application/json"}
        url = f"http://127.0.0.1:{port[1]}/v1/completions"
        question = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(question, timeout=60) as answer:
                return bool(json.load(answer)["choices"])
        except (OSError, urllib.error.URLError):
            return False


def main(rounds: int, kind: str) -> None:
    """Measure in turns, print each round and the medians."""
    times: Dict[str, List[float]] = {"compose": [], "serve": [], "first": []}
    with tempfile.TemporaryDirectory() as name:
        image, _ = IMAGES[kind]
        box = Box(Path(name), image)
        for number in range(rounds):
            box.forget()
            times["first"].append(box.by_serve())
            box.remove()
            times["compose"].append(box.by_compose())
            box.remove()
            times["serve"].append(box.by_serve())
            box.remove()
            row = "  ".join(f"{kind} {took[-1]:5.1f} s" for kind, took in times.items())
            print(f"round {number + 1}: {row}  load {os.getloadavg()[0]:.1f}", flush=True)

    plain = times["compose"]
    for way, took in times.items():
        middle = statistics.median(took)
        more = statistics.median(one - beside for one, beside in zip(took, plain))
        ratio = middle / statistics.median(plain)
        print(f"{way:8} {middle:5.1f} s  {ratio:4.2f}x  {more:+.1f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--beside-docker"]:
        main(int(sys.argv[2]), sys.argv[3])
    else:
        rounds = sys.argv[1] if sys.argv[1:] else "3"
        engine = sys.argv[2] if sys.argv[2:] else "vllm"
        _, component = IMAGES[engine]
        components.require(component)
        script = str(Path(__file__).resolve())
        words = [sys.executable, script, "--beside-docker", rounds, engine]
        argv = components.with_docker_argv(words)
        sys.exit(subprocess.call(argv, env={**os.environ, "HFSHIP_STUB_GPUS": "none"}))
