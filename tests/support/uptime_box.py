#!/usr/bin/env python3
"""What test_uptime.py sees, run beside a Docker engine: models of four tasks served, one of them hung, killed and repaired.

with-docker uptime_box.py HFSHIP.pyz WORK     prints what was found as JSON, the rest goes to stderr
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_model import make_model  # noqa: E402

HANG_S = "10"
# Half a start of vLLM each time; clients, demo and README show it.
NO_PREFLIGHT = "--no-preflight"
POOLING = ("embedding", "rerank", "classify")


class Box:
    """hfship and docker in the box, with folders of its own."""

    def __init__(self, pyz: str, work: Path) -> None:
        self.pyz, self.work = pyz, work
        folders = {
            "HFSHIP_SITE_MODELS_DIR": "site",
            "HFSHIP_DEPLOY_DIR": "deploy",
            "HFSHIP_TRANSFER_DIR": "transfer",
            "HFSHIP_LOG_DIR": "logs",
            "HOME": "home",
        }
        self.env = {**os.environ, **{name: str(work / path) for name, path in folders.items()}}

    def __call__(self, *words: str) -> Tuple[int, Any]:
        """(exit code, the first row of the result)."""
        code, found = self.rows(*words)
        if isinstance(found, list):
            found = found[0]
        return code, found

    def rows(self, *words: str) -> Tuple[int, Any]:
        """(exit code, the whole result)."""
        argv = [sys.executable, self.pyz, *words, "--json"]
        done = subprocess.run(
            argv, env=self.env, stdout=subprocess.PIPE, text=True, timeout=900, check=False
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else {}

    def processes(self, name: str) -> List[int]:
        """The processes of a deployment's container."""
        listed = subprocess.run(
            ["docker", "top", f"vllm_{name}", "-eo", "pid,args"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows = (line.split(None, 1) for line in listed.stdout.splitlines()[1:])
        return [int(pid) for pid, words in rows if "EngineCore" in words]


def seen_of_pooling(box: Box) -> Dict[str, Any]:
    """The models that pool: planned and started together, asked for their state, stopped."""
    listed = ""
    for head in POOLING:
        make_model(box.work / "site" / head, head=head)
        listed += f'[[model]]\nrepo = "site/{head}"\n[model.serve]\nmax_num_seqs = 4\n'
    models = box.work / "models.toml"
    models.write_text(listed)
    found: Dict[str, Any] = {"serve": box.rows("serve", "--models", str(models), NO_PREFLIGHT)}
    found["status"] = box.rows("status")
    for head in POOLING:
        box("stop", head, "--remove", "--yes")
    return found


def seen_of_trouble(box: Box) -> Dict[str, Any]:
    """A model that writes: hung, repaired, killed, repaired, stopped."""
    make_model(box.work / "site" / "chat")
    found: Dict[str, Any] = {"serve": box("serve", "chat", "--max-num-seqs", "4", NO_PREFLIGHT)}
    found["measured"] = json.loads((box.work / "deploy/chat/measured.json").read_text())
    for pid in box.processes("chat"):
        os.kill(pid, signal.SIGSTOP)
    found["hung"] = box("status", "--hang-after", HANG_S)
    found["repair"] = box("status", "--repair", "--hang-after", HANG_S, "--grace", "1")
    found["again"] = box("serve", "chat")
    subprocess.run(["docker", "kill", "vllm_chat"], stdout=subprocess.DEVNULL, check=True)
    found["killed"] = box("status", "chat")
    log = box.work / "deploy/chat/repairs.log"
    old = re.sub(r"(?m)^\d{4}-", "2020-", log.read_text())  # as if it were long ago
    log.write_text(old)
    found["repair again"] = box("status", "--repair")
    box("stop", "chat")
    found["stopped"] = box("status", "--repair")
    found["restart"] = box("restart", "chat")
    found["repairs"] = log.read_text()
    box("stop", "chat", "--remove", "--yes")
    return found


def main(pyz: str, work: str) -> None:
    """Do it all, and print what was seen."""
    box = Box(pyz, Path(work))
    for folder in ("site", "home"):
        (box.work / folder).mkdir(parents=True, exist_ok=True)
    print(json.dumps({"trouble": seen_of_trouble(box), "pooling": seen_of_pooling(box)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
