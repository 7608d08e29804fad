"""A delivery on a machine that had neither model nor image: a real registry's protocol, a real Docker engine, and an update.

The image is small: Debian's Python and a program called vllm that answers with what lies in the model's folder, so that the
answer says which version is served.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

from conftest import Program, program
from support import archives as a
from support import components
from support.inside import Inside, docker_inside
from support.registry import FaultRegistry, layer_of, make_image, noise
from test_restore import COMMITS
from test_update import write_commit

pytestmark = pytest.mark.real  # not alone: its docker has a data root of its own

SSH_PORT = 2222
REFERENCE = "vllm/vllm-openai-cpu:v0.32.0"
STANDARD = Path("/usr/lib/python3.11")
UNUSED = ("test", "idlelib", "lib2to3", "ensurepip", "tkinter", "turtledemo", "__pycache__")
# Takes the place of vLLM: health, models, and a completion that is the text of a file of the model.
ENGINE = b"""#!/usr/bin/python3
import http.server, json, os, sys

folder = next(word for word in sys.argv[1:] if word.startswith("/models/"))


class Api(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]:
            return self.answer(401, {"error": "Unauthorized"})
        text = open(folder + "/README.md").read()
        choice = {"text": text, "message": {"role": "assistant", "content": text}}
        self.answer(200, {"choices": [choice], "model": asked["model"]})

    def answer(self, code, value):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


http.server.ThreadingHTTPServer(("", 8000), Api).serve_forever()
"""
ASK = """
import json, sys, urllib.request
key = [line for line in open(sys.argv[1]) if line.startswith("VLLM_API_KEY=")][0].split("=", 1)[1].strip()
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()
head = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[2] + "/chat/completions", body, head)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
"""
# What is run beside a fresh engine; $H is hfship.
SCRIPT = """
set -e
$H verify {first}/m.bundle.json
for seconds in 0.3 0.6 1.2 2.4 120; do
  timeout -s KILL $seconds $H unpack --all {first} && break
  echo "killed after $seconds"
done
$H serve {first}/m.bundle.json --no-preflight --json > serve.json
url=$({python} -c 'import json; print(json.load(open("serve.json"))[0]["url"])')
{python} ask.py {deploy}/m/.env $url > one.txt
$H unpack --all {second} > update.txt
$H serve m --no-preflight 2> again.txt
{python} ask.py {deploy}/m/.env $url > two.txt
$H serve m --no-preflight --rollback
{python} ask.py {deploy}/m/.env $url > three.txt
$H serve m --no-preflight --rollback newest
{python} ask.py {deploy}/m/.env $url > four.txt
$H stop m
"""


def libraries(program: Path) -> Dict[str, bytes]:
    """The libraries that a program loads, by their path."""
    said = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    return {path[1:]: Path(path).read_bytes() for path in re.findall(r"(/\S+) \(0x", said)}


def stand_in() -> Any:
    """An image of two layers: Python, and what is called vllm."""
    python = Path("/usr/bin/python3").resolve()
    files = {"usr/bin/python3": python.read_bytes(), **libraries(python)}
    for path in [*STANDARD.rglob("*.py"), *STANDARD.glob("lib-dynload/*.so")]:
        if not set(UNUSED) & set(path.parts):
            files[str(path)[1:]] = path.read_bytes()
    layers = [layer_of(files), layer_of({"usr/bin/vllm": ENGINE})]
    return make_image(layers, command=["/usr/bin/vllm"])


def delivery(hfship: Program, root: Path, model: Path, number: int, *words: object) -> Path:
    """The medium of a version of the model."""
    folder = hfship.home / "models/m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    (folder / "README.md").write_text(f"version {number}")
    write_commit(folder, number)
    hfship("pack", "m", "-o", root / f"medium{number}", *words)
    return root / f"medium{number}"


def test_a_delivery_is_served_updated_and_rolled_back(tmp_path: Path, made_model: Path) -> None:
    components.require("docker")
    hfship = program("pyz", tmp_path / "home")
    with FaultRegistry() as registry:
        registry.add(stand_in(), "vllm/vllm-openai-cpu", "v0.32.0")
        hfship("fetch", f"docker://{registry.host}/{REFERENCE}", "--platform", "linux/amd64")
    first = delivery(hfship, tmp_path, made_model, 0, "--with-image", "--split", "2300k")
    second = delivery(hfship, tmp_path, made_model, 1, "--since", first / "m.tar.zst.0001")
    assert (second / "m.delta.tar.zst").stat().st_size < 100_000
    (tmp_path / "ask.py").write_text(ASK)
    far = program("pyz", tmp_path / "far")
    values = {"first": first, "second": second, "deploy": far.home / "deploy"}
    script = SCRIPT.format(python=sys.executable, **values).replace("$H", " ".join(far.argv))
    env = far.env(
        {
            "HFSHIP_DOCKER_DATA": str(tmp_path / "data"),
            "HFSHIP_COMPONENTS": str(components.HOME),
            "HFSHIP_STUB_GPUS": "none",
        }
    )
    done = subprocess.run(
        components.with_docker_argv(["sh", "-c", script]),
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed after 0.3" in done.stdout
    said = [(tmp_path / f"{name}.txt").read_text().strip() for name in ("one", "two", "three")]
    assert said == ["version 0", "version 1", "version 0"]
    assert (tmp_path / "four.txt").read_text().strip() == "version 1"
    assert f"commit {COMMITS[0][:7]} -> {COMMITS[1][:7]}" in (tmp_path / "update.txt").read_text()
    assert "made anew" in (tmp_path / "again.txt").read_text()
    assert sorted(os.listdir(far.home / "site")) == ["m", f"m~{COMMITS[0][:12]}"]
    assert a.tree(far.home / "site/m")["README.md"] == b"version 1"


def start_sshd(inside: Inside, folder: Path) -> None:
    """A real sshd beside the engine, into which the `ssh` of this side has the key."""
    near = folder / "near"
    near.mkdir(parents=True)
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(key, check=True)
    (folder / "known").write_text(f"[127.0.0.1]:{SSH_PORT} {(folder / 'host.pub').read_text()}")
    kept = {name: inside.env[name] for name in ("PATH", "DOCKER_HOST", "DOCKER_CONFIG")}
    variables = " ".join(f'"{name}={value}"' for name, value in kept.items())
    (folder / "config").write_text(
        f"Port {SSH_PORT}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
        f"UsePAM no\nStrictModes no\nPidFile {folder}/pid\n"
        f"AuthorizedKeysFile {folder}/user.pub\nSetEnv {variables}\n"
    )
    options = f"-o UserKnownHostsFile={folder}/known -i {folder}/user"
    (near / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh {options} "$@"\n')
    (near / "ssh").chmod(0o755)
    inside.env["PATH"] = f"{near}:{inside.env['PATH']}"
    Path("/run/sshd").mkdir(exist_ok=True)
    inside.run(["/usr/sbin/sshd", "-f", folder / "config"], check=True)


def told(component: Any, name: str) -> List[str]:
    """What a bill says of an image under a name."""
    return [row["value"] for row in component["properties"] if row["name"] == name]


def test_sync_brings_the_layers_of_an_image_that_docker_there_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components.require("docker")
    monkeypatch.setenv("HFSHIP_DOCKER_DATA", str(tmp_path / "data"))
    hfship = program("pyz", tmp_path / "home")
    base = layer_of({"weights": noise(3_000_000, 1)})
    with FaultRegistry() as registry:
        for tag in ("1", "2"):
            image = make_image([base, layer_of({"tag": tag.encode()})])
            registry.add(image, "site/app", tag)
            hfship("fetch", f"docker://{registry.host}/site/app:{tag}", "--platform", "linux/amd64")
    far = tmp_path / "far"
    with docker_inside(hfship, tmp_path) as inside:
        start_sshd(inside, tmp_path / "sshd")
        try:
            to = ["--port", SSH_PORT, "--no-fetch", "--json", f"root@127.0.0.1:{far}"]
            rows = json.loads(inside("sync", "app_1", *to).stdout)
            assert rows[0]["action"] == "whole" and rows[0]["bytes"] > 3_000_000
            loaded = json.loads(inside("unpack", "--all", far, "--json").stdout)
            assert [row["layers_sent"] for row in loaded] == [2]

            rows = json.loads(inside("sync", "app_2", *to).stdout)
            assert rows[0]["action"] == "delta" and rows[0]["bytes"] < 100_000
            loaded = json.loads(inside("unpack", "--all", far, "--json").stdout)
            assert {row["name"]: row["layers_sent"] for row in loaded} == {"app_1": 0, "app_2": 1}
            said = inside("sync", "app_1", "app_2", *to).stdout
            assert [row["action"] for row in json.loads(said)] == ["there", "there"]

            # The bill of an image that docker alone has is of the image that came.
            fetched = json.loads(inside("bom", "app_2").stdout)["metadata"]["component"]
            shutil.rmtree(hfship.home / "models/app_2")
            held = json.loads(inside("bom", f"{registry.host}/site/app:2").stdout)
            (config, layers) = ("hfship:image-id", "hfship:diff-id")
            assert told(held["metadata"]["component"], config) == told(fetched, config)
            assert told(held["metadata"]["component"], layers) == told(fetched, layers) != []
        finally:
            os.kill(int((tmp_path / "sshd/pid").read_text()), signal.SIGTERM)
