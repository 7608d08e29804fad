#!/usr/bin/env python3
"""The main job end to end on this machine: python3 tests/demo.py dist/hfship.pyz [--size-mb N] [--keep]

A small model of real shape is made, offered by a local Hub (`hfship mirror`), then fetched, packed, verified, unpacked
and served as an operator would do it. Only the standard library is needed. Where docker and a vLLM image are present
the model is served for real and completes a sentence; elsewhere the plan is shown and said what was not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import List, Tuple

from support.make_model import make_model

NAME = "tiny-qwen2"
REPO = f"hfship-demo/{NAME}"


class Demo:
    """One run in a folder of its own; `steps` collects what the table at the end shows."""

    def __init__(self, pyz: Path, root: Path) -> None:
        self.pyz, self.root = pyz, root
        self.steps: List[Tuple[str, str, float]] = []
        folders = {
            "MODELS": "models",
            "PACKAGE": "transfer_package",
            "TRANSFER": "transfer_package",
        }
        folders.update({"SITE_MODELS": "site/models", "DEPLOY": "site/deploy", "LOG": "logs"})
        self.env = {
            **os.environ,
            **{f"HFSHIP_{key}_DIR": str(root / path) for key, path in folders.items()},
        }

    def run(self, *args: str, code: int = 0) -> str:
        """Run hfship and show the command as an operator would type it; returns its stdout."""
        print(f"\n$ hfship {' '.join(args)}", flush=True)
        done = subprocess.run(
            [sys.executable, str(self.pyz), *args], env=self.env, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout, end="", flush=True)
        if done.returncode != code:
            raise SystemExit(f"demo: hfship {args[0]} ended with {done.returncode}")
        return done.stdout

    def step(self, name: str, size: str, *args: str) -> str:
        """A timed step of the table."""
        began = time.monotonic()
        said = self.run(*args)
        self.steps.append((name, size, time.monotonic() - began))
        return said

    def main_job(self, size_mb: float) -> None:
        """Hub -> model folder -> archive -> model folder on the other side -> service."""
        began = time.monotonic()
        make_model(self.root / "hub" / REPO, size_mb=size_mb, shards=3)
        self.steps.append(("make model", folder_size(self.root / "hub"), time.monotonic() - began))
        mirror, url = self.start_mirror()
        try:
            self.env["HF_ENDPOINT"] = url
            self.step("fetch", folder_size(self.root / "hub"), "fetch", REPO)
        finally:
            mirror.terminate()
            mirror.wait()
        model = self.root / "models" / NAME
        self.step("pack", folder_size(model), "pack", NAME)
        archive = next((self.root / "transfer_package").glob(f"{NAME}.tar.zst"))
        self.step("verify", megabytes(archive.stat().st_size), "verify", str(archive))
        self.step("unpack", megabytes(archive.stat().st_size), "unpack", str(archive))
        self.serve()

    def start_mirror(self) -> Tuple[subprocess.Popen[str], str]:
        """The local Hub in the background, and its URL."""
        command = [
            sys.executable,
            str(self.pyz),
            "mirror",
            str(self.root / "hub"),
            "--port",
            "0",
            "-q",
        ]
        process = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        print(f"$ hfship mirror {self.root / 'hub'}\n{line}", end="")
        return process, next(word for word in line.split() if word.startswith("http")).rstrip(":")

    def serve(self) -> None:
        """For real where docker and a vLLM image are there; else the plan."""
        reason = cannot_serve()
        if reason:
            self.step("serve --plan", "-", "serve", NAME, "--plan", "--assume-gpus", "1x24GB")
            print(f"\nnot run: docker compose up and a completion, because {reason}")
            return
        began = time.monotonic()
        self.run("serve", NAME, "--max-model-len", "256")
        try:
            print(
                f"\nprompt: hello\nanswer: {self.complete()!r}   (an untrained model: the answer is noise)"
            )
            self.steps.append(("serve, completion", "-", time.monotonic() - began))
            self.run("status", NAME)
        finally:
            self.run("stop", NAME)

    def complete(self) -> str:
        """Ask the served model for a few tokens, with the key that serve put into .env."""
        deployment = self.root / "site" / "deploy" / NAME
        port = json.loads((deployment / "plan.json").read_text())["port"]
        keys = dict(
            line.split("=", 1)
            for line in (deployment / ".env").read_text().splitlines()
            if "=" in line
        )
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": "Bearer " + keys["VLLM_API_KEY"].strip("'\""),
            },
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])

    def table(self) -> str:
        """Steps with sizes and times."""
        lines = [f"{'step':<18} {'size':>10} {'seconds':>8}"]
        return "\n".join(
            lines + [f"{name:<18} {size:>10} {seconds:8.1f}" for name, size, seconds in self.steps]
        )


def cannot_serve() -> str:
    """Why a model cannot be served on this machine; "" when it can."""
    if not shutil.which("docker"):
        return "docker is not installed"
    listing = subprocess.run(
        ["docker", "images", "--format", "{{.Repository}}"], capture_output=True, text=True
    )
    if listing.returncode:
        return "the docker engine does not answer"
    if not any("vllm" in name for name in listing.stdout.split()):
        return "docker has no vLLM image"
    return ""


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def folder_size(folder: Path) -> str:
    return megabytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pyz", type=Path)
    parser.add_argument("--size-mb", type=float, default=40)
    parser.add_argument("--keep", action="store_true", help="leave the folder of the run behind")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="hfship-demo-"))
    try:
        demo = Demo(args.pyz.resolve(), root)
        demo.main_job(args.size_mb)
        print(f"\n{demo.table()}")
    finally:
        if args.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
