"""serve, status, stop and logs as an operator types them, on machines that stub programs play."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from conftest import PYZ, Program

HERE = Path(__file__).parent
STUB_SMI = HERE / "stubs" / "nvidia-smi"


class Site:
    """A machine with a fake docker and stub GPUs, and one model `m` in its models folder."""

    def __init__(self, hfship: Program, folder: Path, model: Path) -> None:
        self.hfship, self.bin, self.state = hfship, folder / "bin", folder / "state"
        self.deploy, self.models = hfship.home / "deploy", hfship.home / "site"
        for made in (self.bin, self.state, self.models):
            made.mkdir(parents=True)
        (self.models / "m").symlink_to(model)
        self.program("docker", f'exec "{sys.executable}" "{HERE / "stubs" / "fake-docker"}" "$@"')
        self.program("nvidia-smi", f'exec "{sys.executable}" "{STUB_SMI}" "$@"')

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def __call__(self, *args: Any, play: str = "", code: int = 0, env: Optional[Dict[str, str]] = None) -> Any:
        settings = {"PATH": str(self.bin), "FAKE_STATE": str(self.state), "FAKE_DOCKER": play, **(env or {})}
        return self.hfship(*args, env=settings, code=code)

    def calls(self) -> List[List[str]]:
        path = self.state / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def text(self, name: str) -> str:
        return (self.deploy / "m" / name).read_text()


@pytest.fixture
def site(hfship: Program, tmp_path: Path, model: Path) -> Iterator[Site]:
    made = Site(hfship, tmp_path, model)
    yield made
    if (made.state / "up").exists():
        made("stop", "m")


def test_serve_waits_for_a_real_answer_and_says_how_to_ask(site: Site) -> None:
    done = site("serve", "m", "--env", "A=$b")
    assert "m answers at http://127.0.0.1:8" in done.stdout and "1234 tokens, as vLLM measured" in done.stdout
    key = next(line[13:] for line in site.text(".env").splitlines() if line.startswith("VLLM_API_KEY="))
    said = (
        done.stdout + done.stderr + site.text("plan.json") + site.text("docker-compose.yml") + json.dumps(site.calls())
    )
    assert len(key) > 30 and key not in said
    assert stat.S_IMODE((site.deploy / "m" / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((site.deploy / "m").stat().st_mode) == 0o700
    # the command that it recommends works
    example = next(line[11:] for line in done.stdout.splitlines() if line.startswith("  try "))
    answer = subprocess.run(["sh", "-c", example], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"]


def test_serve_unpacks_when_only_the_archive_is_there(site: Site, model: Path) -> None:
    site.hfship("pack", model, "-o", site.hfship.home / "transfer")
    plan = site("serve", "tiny", "--plan", code=5)
    assert "not unpacked yet" in plan.stderr and "hfship unpack" in plan.stderr.replace(f"python3 {PYZ}", "hfship")
    site("serve", "tiny", "--write-only")
    assert (site.models / "tiny" / "config.json").is_file() and (site.deploy / "tiny" / "plan.json").is_file()


def test_second_serve_changes_nothing(site: Site) -> None:
    first = json.loads(site("serve", "m", "--json").stdout)[0]
    files = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (site.deploy / "m").iterdir()}
    second = json.loads(site("serve", "m", "--json").stdout)[0]
    assert files == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (site.deploy / "m").iterdir()}
    assert first["url"] == second["url"] and first["state"] == second["state"] == "healthy"
    assert first["image"] == "vllm/vllm-openai:v0.27.1" and first["gpus"] == [
        "GPU-00000000-0000-4000-8000-000000000000"
    ]


def test_status_proves_each_deployment_and_stop_keeps_the_files(site: Site) -> None:
    site("serve", "m")
    row = json.loads(site("status", "--json").stdout)[0]
    assert row["state"] == "healthy" and row["answer"] >= 0 and row["restarts"] == 0
    assert "healthy" in site("status", "m").stdout
    assert "line" not in site("logs", "m", "--tail", "5").stdout
    site("stop", "m")
    assert sorted(p.name for p in (site.deploy / "m").iterdir()) == [".env", "docker-compose.yml", "plan.json"]
    assert "down" in site("status", code=9).stdout
    key = site.text(".env").splitlines()[1]
    site("serve", "m")
    assert site.text(".env").splitlines()[1] == key


@pytest.mark.parametrize(
    "play, said", [("down", "the docker daemon is not running"), ("no-compose", "no compose plugin")]
)
def test_status_without_docker_says_so(site: Site, play: str, said: str) -> None:
    site("serve", "m", "--write-only")
    done = site("status", "--json", play=play, code=9)
    row = json.loads(done.stdout)[0]
    assert (row["name"], row["state"]) == ("m", "unknown") and said in row["note"] and said in done.stderr
    assert "unknown" in site("status", "m", play=play, code=9).stdout


def test_full_disk_of_docker_is_refused_before_the_start(site: Site, small_disk: Callable[..., Path]) -> None:
    done = site("serve", "m", code=7, env={"FAKE_ROOT": str(small_disk(4))})
    assert "cannot start m" in done.stderr and "docker system df" in done.stderr
    assert not (site.state / "up").exists()


@pytest.mark.parametrize(
    "play, code, said",
    [
        ("down", 9, ["docker daemon is not running", "systemctl start docker"]),
        ("denied", 9, ["may not talk to docker", "usermod -aG docker"]),
        ("no-compose", 9, ["no compose plugin", "install docker-compose-plugin"]),
        ("no-runtime", 9, ["no NVIDIA runtime", "nvidia-container-toolkit"]),
        ("exits", 9, ["does not know --no-such-flag", "exit code 2", "INFO one"]),
        ("restarts", 9, ["it restarted", "GPU ran out of memory", "--tensor-parallel-size"]),
        ("killed", 9, ["the machine ran out of memory"]),
        ("kv", 9, ["hfship serve m --max-model-len 24576"]),
        ("unknown", 9, ["RuntimeError: something new", "line 25", "hfship logs m"]),
        ("wrong-key", 9, ["refuses requests", "Unauthorized"]),
        ("no-model", 9, ["does not exist"]),
        ("hangs", 3, ["does not answer after 2.0 s (loading weights, 45 %)", "goes on loading"]),
    ],
)
def test_every_failure_has_its_cause_and_next_step(site: Site, play: str, code: int, said: List[str]) -> None:
    done = site("serve", "m", "--timeout", "2", play=play, code=code)
    for text in said:
        assert text in done.stderr.replace(f"python3 {PYZ}", "hfship")
    assert "\n  next  " in done.stderr
    if play == "unknown":
        assert "line 10\n" not in done.stderr  # the last 30 lines only
    if play in ("exits", "restarts"):
        assert "stop" in [call[5] for call in site.calls() if call[0] == "compose" and len(call) > 5]


def test_missing_programs(site: Site) -> None:
    (site.bin / "docker").unlink()
    assert "install docker" in site("serve", "m", code=9).stderr
    site.program("docker", f'exec "{sys.executable}" "{HERE / "stubs" / "fake-docker"}" "$@"')
    (site.bin / "nvidia-smi").unlink()
    done = site("serve", "m", code=9)
    assert "no GPU" in done.stderr and "nvidia-smi was not found" in done.stderr and "--device cpu" in done.stderr


@pytest.mark.parametrize(
    "arguments, env, said",
    [
        ([], {"FAKE_IMAGES": "redis:7"}, ["no vLLM image for the GPU", "docker load"]),
        (["--image", "vllm/vllm-openai:v9.9.9"], {}, ["docker has no image", "v0.27.1"]),
        ([], {"HFSHIP_STUB_GPUS": "none"}, ["No devices were found"]),
        ([], {"HFSHIP_STUB_GPUS": "broken"}, ["couldn't communicate with the NVIDIA driver"]),
        ([], {"HFSHIP_STUB_GPU_USED": "140000,140000"}, ["no GPU is free", "in use"]),
        (["--tensor-parallel-size", "3"], {"HFSHIP_STUB_GPUS": "3x H200 143771"}, ["--tensor-parallel-size 3", "what works"]),
        (["--gpus", "5"], {}, ["names no GPU"]),
        (["--", "--enable-reasoning"], {}, ["vLLM 0.27.1 does not know --enable-reasoning"]),
        (["--max-model-len", "999999"], {}, ["tokens of context"]),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(site: Site, arguments: List[str], env: Dict[str, str], said: List[str]) -> None:
    done = site("serve", "m", *arguments, code=2 if "--gpus" in arguments else 9, env=env)
    for text in said:
        assert text in done.stderr
    assert not (site.deploy / "m").exists() and not (site.state / "up").exists()


def test_taken_port_is_named(site: Site) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = site("serve", "m", "--port", port, code=9)
    assert f"port {port} is taken" in done.stderr and "--port 8" in done.stderr


def test_model_that_is_nowhere_names_where_it_looked(site: Site) -> None:
    done = site("serve", "nope", code=5)
    assert str(site.models) in done.stderr and "nope.tar.zst" in done.stderr
    for command in ("status", "stop", "logs"):
        assert "no such deployment" in site(command, "nope", code=5).stderr
    assert "no deployments" in site("status").stderr


def test_cpu_image_without_gpu_serves_on_the_cpu(site: Site) -> None:
    env = {"FAKE_IMAGES": "vllm/vllm-openai:v0.32.0-cpu", "HFSHIP_STUB_GPUS": "none"}
    done = site("serve", "m", env=env)
    assert "serving on the CPU" in done.stderr
    assert "VLLM_CPU_KVCACHE_SPACE=" in site.text(".env") and "nvidia" not in site.text("docker-compose.yml")


def test_image_without_a_version_in_its_tag_is_asked(site: Site) -> None:
    site("serve", "m", "--write-only", env={"FAKE_IMAGES": "vllm/vllm-openai:latest"})
    assert json.loads(site.text("plan.json"))["version"] == [0, 31, 0]
    assert ["up", "-d"] not in [call[5:] for call in site.calls()]


def test_plan_needs_neither_docker_nor_gpu(site: Site) -> None:
    for name in ("docker", "nvidia-smi"):
        (site.bin / name).unlink()
    sized = site("serve", "m", "--plan")
    assert "TP=1" in sized.stdout and "no GPU" in sized.stderr
    planned = json.loads(site("serve", "m", "--plan", "--assume-gpus", "2x80GB", "--json").stdout)[0]
    assert planned["plan"]["tensor_parallel_size"] == 1 and planned["arguments"][0] == "/models/m"
    assert "context" in site("serve", "m", "--plan", "--device", "cpu").stdout
    assert "H100" in site("serve", "m", "--plan", "--assume-gpus", "2xH100").stdout
    assert not site.deploy.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--assume-gpus", "2x80GB"],
        ["--env", "VLLM_API_KEY=x"],
        ["--gpu-memory-utilization", "1.5"],
        ["--max-model-len", "0"],
        ["--port", "70000"],
        ["--name", "../x"],
        ["--host", "localhost"],
        ["--shm-size", "lots"],
        ["--", "--api-key", "sk-0123456789"],
        ["other", "--port", "8000"],
    ],
)
def test_wrong_usage(site: Site, arguments: List[str]) -> None:
    site("serve", "m", *arguments, code=2)
