"""A docker that has no engine: it plays one of several machines (FAKE_DOCKER), so that tests can see every refusal.

It keeps its container in $FAKE_STATE: `compose up` starts an HTTP server that answers like vLLM, `down` ends it.
Everything it is asked is appended to $FAKE_STATE/calls.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List

STATE = Path(os.environ["FAKE_STATE"])
PLAY = os.environ.get("FAKE_DOCKER", "")
IMAGES = os.environ.get("FAKE_IMAGES", "vllm/vllm-openai:v0.27.1,vllm/vllm-openai:v0.8.3").split(",")

LOGS = {
    "": "Starting to load model\nGPU KV cache size: 1,234 tokens\nUvicorn running on http://0.0.0.0:8000\n",
    "exits": "INFO one\nvllm: error: unrecognized arguments: --no-such-flag\n",
    "restarts": "INFO one\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n",
    "killed": "INFO one\n",
    "unknown": "".join(f"line {i}\n" for i in range(50)) + "RuntimeError: something new\n",
    "kv": "ValueError: To serve at least one request ... the estimated maximum model length is 24576.\n",
    "hangs": "Starting to load model\nLoading safetensors checkpoint shards:  45% Completed | 13/29\n",
}
FAILURES = {
    "down": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
    "denied": "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
}


def say(text: str, code: int = 0) -> int:
    (sys.stderr if code else sys.stdout).write(text + "\n")
    return code


def image_id(name: str) -> str:
    return "sha256:" + name.encode().hex()[:64].ljust(64, "0")


def container() -> Dict[str, object]:
    state: Dict[str, object] = {"Status": "running", "ExitCode": 0, "StartedAt": "2026-01-01T00:00:00.5Z"}
    restarts = 0
    if PLAY in ("exits", "unknown", "kv"):
        state.update(Status="exited", ExitCode=2)
    if PLAY == "killed":
        state.update(Status="exited", ExitCode=137, OOMKilled=True)
    if PLAY == "restarts":
        state.update(Status="restarting", ExitCode=1)
        restarts = 3
    image = image_id(json.loads((STATE / "up").read_text())["image"])
    return {"Id": "c1", "Image": image, "State": state, "RestartCount": restarts, "Name": "/vllm_m"}


def up(compose: Path) -> int:
    if PLAY == "no-runtime":
        return say('Error response from daemon: could not select device driver "nvidia" with capabilities: [[gpu]]', 1)
    text = compose.read_text()
    port = int(re.search(r":(\d+):8000\"", text).group(1))  # type: ignore[union-attr]
    image = re.search(r'image: "(.*)"', text).group(1)  # type: ignore[union-attr]
    if not (STATE / "up").exists() and PLAY in ("", "wrong-key", "no-model"):
        key = re.search(r"VLLM_API_KEY=(.*)", (compose.parent / ".env").read_text()).group(1)  # type: ignore[union-attr]
        api = [sys.executable, __file__, "--api", str(port), key]
        server = subprocess.Popen(api, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        (STATE / "pid").write_text(str(server.pid))
    (STATE / "up").write_text(json.dumps({"image": image}))
    return 0


def down() -> int:
    if (STATE / "pid").exists():
        os.kill(int((STATE / "pid").read_text()), signal.SIGKILL)
        (STATE / "pid").unlink()
    (STATE / "up").unlink()
    return 0


def serve_api(port: int, key: str) -> None:
    """Answers like vLLM, after loading for a moment."""

    class Api(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, value = 200, {"choices": [{"text": " world"}], "model": body["model"]}
            if self.headers["Authorization"] != f"Bearer {key}" or PLAY == "wrong-key":
                status, value = 401, {"error": "Unauthorized"}
            if PLAY == "no-model":
                status, value = 404, {"error": f"The model {body['model']} does not exist."}
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    time.sleep(1)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Api).serve_forever()


def main(args: List[str]) -> int:
    if args[:1] == ["--api"]:
        serve_api(int(args[1]), args[2])
    with (STATE / "calls").open("a") as calls:
        calls.write(json.dumps(args) + "\n")
    if PLAY in FAILURES:
        return say(FAILURES[PLAY], 1)
    if args[0] == "version":
        return say("28.5.2")
    if args[:2] == ["image", "ls"]:
        rows = [(*name.rsplit(":", 1), image_id(name)) for name in filter(None, IMAGES)]
        return say("\n".join(json.dumps({"Repository": r, "Tag": t, "ID": i}) for r, t, i in rows))
    if args[:2] == ["image", "inspect"]:
        return say(json.dumps([{"Id": image_id(args[2]), "Config": {"Env": ["CUDA_VERSION=13.0.1"]}}]))
    if args[0] == "run":
        return say("0.31.0")
    if args[:2] == ["container", "inspect"]:
        if not (STATE / "up").exists():
            return say(f"Error response from daemon: No such container: {args[2]}", 1)
        return say(json.dumps([container()]))
    if args[0] == "compose":
        if PLAY == "no-compose":
            return say("docker: 'compose' is not a docker command.\nSee 'docker --help'", 1)
        if args[1] == "version":
            return say("5.0.1")
        action = args[5]
        if action == "up":
            return up(Path(args[4]))
        if action == "down":
            return down()
        if action == "logs":
            return say(LOGS.get(PLAY, LOGS[""]).rstrip("\n"))
        return 0
    return say(f"fake docker does not know {args}", 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
