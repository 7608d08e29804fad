"""serve, status, stop and logs as an operator types them, on machines that stub programs play."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from conftest import PYZ, Program, free_port
from hfship.base.locks import FolderLock
from hfship.commands.parser import parse_words
from hfship.commands.serve_options import serve_options
from hfship.serve.status import DeploymentStatus, status_text
from hfship.serve.terms import ServeOptions
from test_signatures import make_key

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

    def __call__(
        self,
        *args: Any,
        play: str = "",
        code: int = 0,
        env: Optional[Dict[str, str]] = None,
        **options: Any,
    ) -> Any:
        settings = {
            "PATH": str(self.bin),
            "FAKE_STATE": str(self.state),
            "FAKE_DOCKER": play,
            **(env or {}),
        }
        return self.hfship(*args, env=settings, code=code, **options)

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


OPTIONS: Dict[str, Dict[str, Any]] = {
    "--host 0.0.0.0": {"bind": "0.0.0.0"},
    "--port 8001": {"port": 8001},
    "--timeout 60": {"ready_timeout_s": 60},
    "--shm-size 16gb": {"shm_size": "16gb"},
    "--image vllm:1": {"image": "vllm:1"},
    "--device cpu": {"device": "cpu"},
    "--gpus 0,1": {"gpus": ("0", "1")},
    "--gpus all": {},
    "--gpu-memory-utilization 0.5": {"gpu_memory_utilization": 0.5},
    "--tensor-parallel-size 2": {"tensor_parallel_size": 2},
    "-tp 2": {"tensor_parallel_size": 2},
    "--max-model-len 4096": {"max_model_len": 4096},
    "--max-num-seqs 8": {"max_num_seqs": 8},
    "--dtype float16": {"dtype": "float16"},
    "--kv-cache-dtype fp8": {"kv_cache_dtype": "fp8"},
    "--trust-remote-code": {"trust_remote_code": True},
    "--no-tools": {"no_tools": True},
    "--chat-template /k/x.jinja": {"chat_template": "/k/x.jinja"},
    "--lora a=/k/a --lora b=/k/b": {"lora": ("a=/k/a", "b=/k/b")},
    "--mount /k/a --mount /k/b": {"mounts": ("/k/a", "/k/b")},
    "--served-model-name a --served-model-name b": {"served_names": ("a", "b")},
    "--alias a --alias b": {"aliases": ("a", "b")},
    "--allow-changed a --allow-changed b": {"allow_changed": ("a", "b")},
    "--key /k/pub.pem": {"key": "/k/pub.pem"},
    "--env A=1 --env B=2=3": {"env": {"A": "1", "B": "2=3"}},
    "--extra-arg=--x --extra-arg=y": {"extra_args": ("--x", "y")},
}


@pytest.mark.parametrize("words", OPTIONS)
def test_an_option_is_what_the_plan_is_made_of(words: str) -> None:
    args, _ = parse_words(["serve", "m", *words.split()])
    assert serve_options(vars(args)) == ServeOptions(**OPTIONS[words])


def test_serve_waits_for_a_real_answer_and_says_how_to_ask(site: Site) -> None:
    done = site("serve", "m", "--env", "A=$b")
    assert (
        "m answers at http://127.0.0.1:8" in done.stdout
        and "1234 tokens, as vLLM measured" in done.stdout
    )
    key = next(
        line[13:] for line in site.text(".env").splitlines() if line.startswith("VLLM_API_KEY=")
    )
    said = (
        done.stdout
        + done.stderr
        + site.text("plan.json")
        + site.text("docker-compose.yml")
        + json.dumps(site.calls())
    )
    assert len(key) > 30 and key not in said
    assert stat.S_IMODE((site.deploy / "m" / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((site.deploy / "m").stat().st_mode) == 0o750
    # the command that it recommends works
    example = next(line[11:] for line in done.stdout.splitlines() if line.startswith("  try "))
    answer = subprocess.run(["sh", "-c", example], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"]


def test_serve_unpacks_when_only_the_archive_is_there(site: Site, model: Path) -> None:
    site.hfship("pack", model, "-o", site.hfship.home / "transfer")
    plan = site("serve", "tiny", "--plan", code=5)
    assert "not unpacked yet" in plan.stderr and "hfship unpack" in plan.stderr.replace(
        f"python3 {PYZ}", "hfship"
    )
    site("serve", "tiny", "--write-only")
    assert (site.models / "tiny" / "config.json").is_file() and (
        site.deploy / "tiny" / "plan.json"
    ).is_file()


def test_serve_unpacks_as_unpack_does(site: Site, model: Path) -> None:
    transfer = site.hfship.home / "transfer"
    site.hfship("pack", model, "-o", transfer)
    (transfer / "tiny.tar.zst.sig").write_text(
        "kept, so that `verify --key` finds it beside the model"
    )
    site("serve", "tiny", "--write-only")
    assert (site.models / "tiny/.hfship/model.sig").read_text().startswith("kept")
    with tarfile.open(transfer / "theirs.tar.zst", "w") as archive:  # of another program
        archive.add(model, "theirs")
    site("serve", "theirs", "--write-only")
    assert (site.models / "theirs/config.json").read_bytes() == (model / "config.json").read_bytes()


def test_second_serve_changes_nothing(site: Site) -> None:
    first = json.loads(site("serve", "m", "--json").stdout)[0]
    files = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (site.deploy / "m").iterdir()}
    second = json.loads(site("serve", "m", "--json").stdout)[0]
    assert files == {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (site.deploy / "m").iterdir()
    }
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
    assert (row["task"], row["phase"]) == ("chat", "")
    site("stop", "m")
    assert sorted(p.name for p in (site.deploy / "m").iterdir()) == [
        ".env",
        "docker-compose.yml",
        "last.log",
        "measured.json",
        "plan.json",
        "stopped.json",
    ]
    # What was stopped on purpose is no fault, but where it is asked for.
    assert "stopped" in site("status").stdout
    assert "m: stopped 20" in site("status", "m", code=9).stdout
    last = site("logs", "m", "--tail", "1")
    assert last.stdout.startswith("Uvicorn running") and "its last log" in last.stderr
    key = site.text(".env").splitlines()[1]
    site("serve", "m")
    assert not (site.deploy / "m" / "stopped.json").exists()
    assert site.text(".env").splitlines()[1] == key


@pytest.mark.parametrize(
    "play, said",
    [("down", "the docker daemon is not running"), ("no-compose", "no compose plugin")],
)
def test_status_without_docker_says_so(site: Site, play: str, said: str) -> None:
    site("serve", "m", "--write-only")
    done = site("status", "--json", play=play, code=9)
    row = json.loads(done.stdout)[0]
    assert (
        (row["name"], row["state"]) == ("m", "unknown")
        and said in row["note"]
        and said in done.stderr
    )
    assert "unknown" in site("status", "m", play=play, code=9).stdout


def test_full_disk_of_docker_is_refused_before_the_start(
    site: Site, small_disk: Callable[..., Path]
) -> None:
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
def test_every_failure_has_its_cause_and_next_step(
    site: Site, play: str, code: int, said: List[str]
) -> None:
    done = site("serve", "m", "--timeout", "2", play=play, code=code)
    for text in said:
        assert text in done.stderr.replace(f"python3 {PYZ}", "hfship")
    assert "\n  next  " in done.stderr
    if play == "unknown":
        assert "line 10\n" not in done.stderr  # the last 30 lines only
    if play in ("exits", "restarts"):
        assert "stop" in [
            call[5] for call in site.calls() if call[0] == "compose" and len(call) > 5
        ]


def test_missing_programs(site: Site) -> None:
    (site.bin / "docker").unlink()
    assert "install docker" in site("serve", "m", code=9).stderr
    site.program("docker", f'exec "{sys.executable}" "{HERE / "stubs" / "fake-docker"}" "$@"')
    (site.bin / "nvidia-smi").unlink()
    done = site("serve", "m", code=9)
    assert (
        "no GPU" in done.stderr
        and "nvidia-smi was not found" in done.stderr
        and "--device cpu" in done.stderr
    )


@pytest.mark.parametrize(
    "arguments, env, said",
    [
        ([], {"FAKE_IMAGES": "redis:7"}, ["no vLLM image for the GPU", "unpack vllm-openai"]),
        (["--image", "vllm/vllm-openai:v9.9.9"], {}, ["docker has no image", "v0.27.1"]),
        ([], {"HFSHIP_STUB_GPUS": "none"}, ["No devices were found"]),
        ([], {"HFSHIP_STUB_GPUS": "broken"}, ["couldn't communicate with the NVIDIA driver"]),
        ([], {"HFSHIP_STUB_GPU_USED": "140000,140000"}, ["no GPU is free", "in use"]),
        (["--tensor-parallel-size", "3"], {"HFSHIP_STUB_GPUS": "3x H200 143771"}, ["--tensor-parallel-size 3", "what works"]),
        (["--gpus", "5"], {}, ["names no GPU"]),
        (["--max-model-len", "999999"], {}, ["tokens of context"]),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(
    site: Site, arguments: List[str], env: Dict[str, str], said: List[str]
) -> None:
    done = site("serve", "m", *arguments, code=2 if "--gpus" in arguments else 9, env=env)
    for text in said:
        assert text in done.stderr
    assert not (site.deploy / "m").exists() and not (site.state / "up").exists()


def test_a_flag_that_the_image_does_not_know_is_said_and_passed_on(site: Site) -> None:
    done = site("serve", "m", "--write-only", "--", "--enable-reasoning")
    assert "vLLM 0.27.1 does not know --enable-reasoning" in done.stderr
    assert '"--enable-reasoning"' in site.text("docker-compose.yml")


@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_taken_port_is_named(site: Site, plan: List[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = site("serve", "m", "--port", port, *plan, code=9)
    assert f"port {port} is taken" in done.stderr and "--port 8" in done.stderr
    assert not site.deploy.exists()  # not even a lock
    site.deploy.mkdir()
    site("serve", "m", "--gpus", "7", *plan, code=2)
    assert not list(site.deploy.iterdir())


def test_model_that_is_nowhere_names_where_it_looked(site: Site) -> None:
    done = site("serve", "nope", code=5)
    assert str(site.models) in done.stderr and "nope.tar.zst" in done.stderr
    for command in ("status", "stop", "logs"):
        assert "no such" in site(command, "nope", code=5).stderr
    assert "no deployments" in site("status").stderr
    site("serve", "m", "--name", "chat", "--write-only")
    for command in ("status", "stop", "logs"):
        said = site(command, "cht", code=5).stderr.replace(f"python3 {PYZ}", "hfship")
        assert "did you mean chat?" in said and f"next  hfship {command} chat" in said


def test_cpu_image_without_gpu_serves_on_the_cpu(site: Site) -> None:
    env = {"FAKE_IMAGES": "vllm/vllm-openai:v0.32.0-cpu", "HFSHIP_STUB_GPUS": "none"}
    done = site("serve", "m", env=env)
    assert "serving on the CPU" in done.stderr
    assert "VLLM_CPU_KVCACHE_SPACE=" in site.text(".env") and "nvidia" not in site.text(
        "docker-compose.yml"
    )


def test_image_without_a_version_in_its_tag_is_asked(site: Site) -> None:
    site("serve", "m", "--write-only", env={"FAKE_IMAGES": "vllm/vllm-openai:latest"})
    assert json.loads(site.text("plan.json"))["version"] == [0, 31, 0]
    assert ["up", "-d"] not in [call[5:] for call in site.calls()]


def test_what_is_written_one_after_the_other_gets_gpus_of_its_own(site: Site) -> None:
    for name in ("one", "two"):
        site("serve", "m", "--name", name, "--write-only")
    first, second = (
        json.loads((site.deploy / name / "plan.json").read_text())["gpus"]
        for name in ("one", "two")
    )
    assert first and second and not set(first) & set(second)


def test_an_image_of_any_name_is_taken_when_docker_has_it(site: Site) -> None:
    site("serve", "m", "--image", "registry.corp:5000/ai/inference:1.2")
    plan = json.loads(site.text("plan.json"))
    assert plan["image"] == "registry.corp:5000/ai/inference:1.2" and plan["version"] == [0, 31, 0]


@pytest.mark.parametrize(
    "file, content", [("plan.json", b"{"), (".env", b"\xff"), ("plan.json", b'{"port": "x"}')]
)
def test_a_damaged_deployment_does_not_block_the_others(
    file: str, content: bytes, site: Site
) -> None:
    site("serve", "m")
    (site.deploy / "bad").mkdir()
    for name in ("plan.json", ".env"):
        (site.deploy / "bad" / name).write_bytes((site.deploy / "m" / name).read_bytes())
    if content.startswith(b'{"'):
        content = json.dumps({**json.loads(site.text("plan.json")), **json.loads(content)}).encode()
    (site.deploy / "bad" / file).write_bytes(content)
    rows = json.loads(site("status", "--json", code=9).stdout)
    assert [(row["name"], row["state"]) for row in rows] == [("m", "healthy"), ("bad", "unknown")]
    assert f"bad/{file}" in rows[1]["note"]
    assert f"bad/{file}" in site("serve", "m").stderr
    assert "healthy" in site("status", "m").stdout


def test_an_image_that_is_not_there_is_not_taken(site: Site) -> None:
    assert "docker has no image x/y:1" in site("serve", "m", "--image", "x/y:1", code=9).stderr


def test_plan_needs_neither_docker_nor_gpu(site: Site) -> None:
    for name in ("docker", "nvidia-smi"):
        (site.bin / name).unlink()
    sized = site("serve", "m", "--plan")
    assert "TP=1" in sized.stdout and "no GPU" in sized.stderr
    planned = json.loads(site("serve", "m", "--plan", "--assume-gpus", "2x80GB", "--json").stdout)[
        0
    ]
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
        ["--plan", "--port", "99999"],
        ["--plan", "--dtype", "foo"],
        ["--plan", "--kv-cache-dtype", "foo"],
        ["--plan", "--gpus", "first"],
        ["--", "--api-key", "sk-0123456789"],
        ["other", "--port", "8000"],
    ],
)
def test_wrong_usage(site: Site, arguments: List[str]) -> None:
    site("serve", "m", *arguments, code=2)


# -- what a deployment was asked for, and what a site may change


def plan_of(site: Site, name: str = "m") -> Dict[str, Any]:
    return json.loads((site.deploy / name / "plan.json").read_text())


def test_a_second_serve_keeps_what_was_asked_for(site: Site) -> None:
    port = free_port()
    first = f"--host 0.0.0.0 --port {port} --max-model-len 512 --env A=b --gpus 1 --alias x".split()
    site("serve", "m", "--write-only", *first, "--", "--enforce-eager")
    before = plan_of(site)
    again = site("serve", "m", "--write-only")
    assert plan_of(site) == before and before["served_names"][-1] == "x"
    assert (
        "m: options kept from the last serve: " in again.stderr and f"--port {port}" in again.stderr
    )
    assert "--env A=... " in again.stderr  # the value may be secret
    site("serve", "m", "--write-only", "--max-model-len", "1024")
    now = plan_of(site)
    assert (now["bind"], now["port"], now["max_model_len"], now["extra_args"]) == (
        "0.0.0.0",
        port,
        1024,
        ["--enforce-eager"],
    )
    said = site("serve", "m", "--write-only", "--reset").stderr
    now = plan_of(site)
    assert (now["bind"], now["extra_args"], now["wishes"]) == (
        "127.0.0.1",
        [],
        {},
    ) and "as asked" not in said


def test_a_port_that_one_of_two_models_had_is_kept(site: Site, model: Path) -> None:
    port = free_port()
    (site.models / "other").symlink_to(model)
    site("serve", "m", "--write-only", "--port", str(port), "--gpus", "0")
    site("serve", "m", "other", "--write-only", "--gpu-memory-utilization", "0.4")
    assert plan_of(site)["port"] == port != plan_of(site, "other")["port"]


def test_wishes_that_somebody_edited_are_taken_if_they_can_be(site: Site) -> None:
    site("serve", "m", "--write-only", "--max-model-len", "512")
    path = site.deploy / "m" / "plan.json"
    wishes = {"max_model_len": 256, "port": "x", "env": 1, "plan": True, "nonsense": 1}
    path.write_text(json.dumps({**plan_of(site), "wishes": wishes}))
    assert (
        "options kept from the last serve: --max-model-len 256 ("
        in site("serve", "m", "--write-only").stderr
    )


def test_a_models_file_says_all_anew(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(
        '[[model]]\nname = "m"\n[model.serve]\nname = "chat"\nport = 8200\nmax_model_len = 512\n'
    )
    site("serve", "--models", path, "--write-only", "--max-num-seqs", "4")
    assert [plan_of(site, "chat")[k] for k in ("port", "max_model_len", "max_num_seqs")] == [
        8200,
        512,
        4,
    ]
    path.write_text('[[model]]\nname = "m"\n[model.serve]\nname = "chat"\nport = 8200\n')
    site("serve", "--models", path, "--write-only")
    assert [plan_of(site, "chat")[k] for k in ("port", "max_num_seqs")] == [8200, 0]
    assert plan_of(site, "chat")["max_model_len"] != 512
    path.write_text(path.read_text() + '[[model]]\nname = "later"\n')
    done = site("status", "--models", path, code=9)
    assert (
        "later  down" in done.stdout
        and "not served yet" in done.stdout
        and "chat   down" in done.stdout
    )


def test_what_was_asked_for_beats_what_a_file_says_of_all_models(
    site: Site, tmp_path: Path
) -> None:
    path = tmp_path / "models.toml"
    path.write_text("[defaults.serve]\nmax_model_len = 1024\nmax_num_seqs = 4\n")
    env = {"HFSHIP_MODELS_FILE": str(path)}
    site("serve", "m", "--write-only", "--max-model-len", "512", env=env)
    site("serve", "m", "--write-only", env=env)
    assert (plan_of(site)["max_model_len"], plan_of(site)["max_num_seqs"]) == (512, 4)


@pytest.fixture
def editable(site: Site, model: Path) -> Path:
    """The model `e`, with a manifest and a folder of its own."""
    site.hfship("pack", model, "-o", site.hfship.home / "transfer", "--name", "e")
    site.hfship("unpack", "e")
    return site.models / "e"


def test_a_site_may_change_a_config_that_it_names(site: Site, editable: Path) -> None:
    config = editable / "config.json"
    config.write_text(config.read_text() + "\n")
    refused = site("serve", "e", "--write-only", code=6).stderr.replace(f"python3 {PYZ}", "hfship")
    assert (
        "config.json is changed" in refused
        and f"hfship serve {editable} --allow-changed config.json" in refused
    )
    site("serve", "e", "--write-only", "--allow-changed", "config.json")
    assert "--allow-changed config.json" in site("serve", "e", "--write-only").stderr


def test_weights_are_never_allowed_to_change(site: Site, editable: Path) -> None:
    weights = next(editable.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    refused = site("serve", "e", "--write-only", "--allow-changed", weights.name, code=6).stderr
    assert f"{weights.name} is damaged" in refused and "--allow-changed" not in refused


def test_what_is_not_as_listed_is_refused_and_who_signed_is_said(
    site: Site, model: Path, tmp_path: Path
) -> None:
    """The whole way: a key, a file beside the listed ones, an edit that keeps size and time."""
    (site.bin / "openssl").symlink_to(str(shutil.which("openssl")))
    private, public = make_key(tmp_path / "ours")
    _, other_key = make_key(tmp_path / "theirs")
    transfer = site.hfship.home / "transfer"
    site.hfship("pack", model, "-o", transfer, "--name", "e", "--sign", private)
    signed = site("serve", "e", "--write-only", "--key", public)
    assert "signed   by " in signed.stderr and "9 files verified" in signed.stderr
    assert len(plan_of(site, "e")["signed_by"]) == 64
    # Both are kept: the key, and what was proven.
    env = {"HFSHIP_KEY": str(other_key)}
    again = site("serve", "e", "--write-only", env=env)
    assert "signed   by " in again.stderr and "verified" not in again.stderr
    other = site("serve", "e", "--write-only", "--reset", env=env, code=6)
    assert "was not made with this key" in other.stderr

    folder = site.models / "e"
    (folder / "NOTES.txt").write_text("x")
    assert "NOTES.txt" in site("serve", "e", "--write-only", code=6).stderr
    (folder / "NOTES.txt").unlink()
    config = folder / "config.json"
    before = config.stat()
    config.write_text(config.read_text().replace(" ", "\t", 1))
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "config.json is changed" in site("serve", "e", "--write-only", code=6).stderr
    insisting = site("serve", "e", "--write-only", "--allow-changed", "config.json").stderr
    assert "not proven, as --allow-changed says: config.json" in insisting


def test_write_only_needs_no_docker(site: Site) -> None:
    (site.bin / "docker").unlink()
    assert "or name one with --image" in site("serve", "m", "--write-only", code=9).stderr
    site("serve", "m", "--write-only", "--image", "vllm/vllm-openai:v0.27.1")
    assert 'image: "vllm/vllm-openai:v0.27.1"' in site.text("docker-compose.yml")


def test_write_only_takes_an_image_that_is_still_to_come(site: Site) -> None:
    done = site("serve", "m", "--write-only", "--image", "vllm/vllm-openai:v9.9.9")
    assert (
        "docker has no image vllm/vllm-openai:v9.9.9" in done.stderr
        and "not loaded here" in done.stderr
    )
    assert 'image: "vllm/vllm-openai:v9.9.9"' in site.text("docker-compose.yml")


# -- ending


def test_remove_takes_the_whole_deployment_after_a_yes(site: Site) -> None:
    site("serve", "m")
    assert "--yes" in site("stop", "m", "--remove", code=2).stderr and (site.deploy / "m").exists()
    done = json.loads(site("stop", "m", "--remove", "--yes", "--json").stdout)
    assert (
        done == [{"schema": "hfship-stop/1", "name": "m", "state": "removed"}]
        and not (site.deploy / "m").exists()
    )
    assert site.calls()[-1][5:] == ["down", "--volumes"] and (site.models / "m").exists()
    assert not list(site.deploy.iterdir())


@pytest.mark.parametrize("answer, code", [("y\n", 0), ("\n", 2), ("no\n", 2)])
def test_remove_asks_on_a_terminal(site: Site, answer: str, code: int) -> None:
    site("serve", "m", "--write-only")
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    env = {"PATH": str(site.bin), "FAKE_STATE": str(site.state)}
    done = site.hfship("stop", "m", "--remove", env=env, code=code, stdin=theirs)
    assert "[y/N]" in done.stderr and (site.deploy / "m").exists() == bool(code)
    os.close(ours), os.close(theirs)


def test_ctrl_c_says_that_the_container_goes_on(site: Site) -> None:
    env = {"PATH": str(site.bin), "FAKE_STATE": str(site.state), "FAKE_DOCKER": "hangs"}
    process = site.hfship.start("serve", "m", env=env)
    said = ""
    while "loading weights" not in said:
        line = process.stderr.readline() if process.stderr else ""
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1].replace(f"python3 {PYZ}", "hfship")
    assert process.returncode == 130
    assert "m goes on loading" in said and "hfship logs m -f" in said and "hfship stop m" in said


@pytest.mark.parametrize(
    "width, there, gone", [(80, ["name", "state", "url"], ["image"]), (300, ["image", "gpus"], [])]
)
def test_status_fits_the_terminal(width: int, there: List[str], gone: List[str]) -> None:
    name = "a-model-with-a-rather-long-name"
    rows = [DeploymentStatus(
        name, "down", "vllm_x", "vllm/vllm-openai:v0.27.1", "http://127.0.0.1:8000/v1", 8000,
        ("GPU-00000000-0000",), uptime=3700, answer=0.2, note="no container",
    )]  # fmt: skip
    table = status_text(rows, width).splitlines()
    assert max(map(len, table)) <= width and table[-1] == f"{name}: no container"
    assert all(word in table[0] for word in there) and not any(word in table[0] for word in gone)


# -- staying up


def test_options_of_a_start_that_failed_are_not_remembered(site: Site) -> None:
    site("serve", "m", "--max-model-len", "512")
    said = site("serve", "m", "--alias", "x", "--", "--no-such-flag", play="exits", code=9).stderr
    assert "the options of this call are not kept" in said
    again = site("serve", "m", "--write-only").stderr
    assert "--max-model-len 512 (" in again and "--no-such-flag" not in again
    assert plan_of(site)["extra_args"] == [] and "x" not in plan_of(site)["served_names"]


def test_what_runs_is_made_anew_only_after_a_word(site: Site) -> None:
    site("serve", "m")
    assert "is made anew" not in site("serve", "m").stderr
    said = site("serve", "m", "--max-model-len", "512", "--env", "A=secret").stderr
    assert "m runs and is made anew, for it changes: --max-model-len " in said
    assert "variables A" in said and "secret" not in said


def test_a_start_that_says_nothing_is_stalled(site: Site) -> None:
    done = site("serve", "m", "--timeout", "2", play="stalled", code=3)
    assert "m is stalled: nothing new in its log for 11 min" in done.stderr
    assert "the disk or the network file system hangs" in done.stderr
    assert "try  dd if=/" in done.stderr
    row = json.loads(site("status", "m", "--json", play="stalled", code=3).stdout)[0]
    assert (row["state"], row["phase"]) == ("stalled", "loading weights, 45 %")
    # Beyond its time to load it is restarted.
    site("serve", "m", "--timeout", "1", "--write-only", play="stalled")
    row = json.loads(site("status", "--repair", "--json", play="stalled", code=3).stdout)[0]
    assert row["repair"] == "restart" and " restart stalled: loading" in site.text("repairs.log")


def test_reset_forgets_the_port_and_gpus_that_were_asked_for(site: Site) -> None:
    port = str(free_port())
    site("serve", "m", "--write-only", "--port", port, "--gpus", "1")
    assert plan_of(site)["port"] == int(port) and plan_of(site)["gpus"][0].endswith("1")
    site("serve", "m", "--write-only", "--reset")
    assert plan_of(site)["port"] != int(port) and plan_of(site)["gpus"][0].endswith("0")


def test_repair_waits_for_another_hfship(site: Site) -> None:
    site("serve", "m")
    (site.state / "up").unlink()  # somebody removed the container
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with FolderLock(site.deploy):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    threading.Timer(1.5, done.set).start()
    row = json.loads(site("status", "--repair", "--json", code=3).stdout)[0]
    other.join()
    assert (row["state"], row["repair"]) == ("loading", "start"), row["note"]


def test_repair_starts_what_is_dead_and_leaves_what_was_stopped(site: Site) -> None:
    site("serve", "m")
    (site.state / "up").unlink()  # somebody removed the container
    os.kill(int((site.state / "pid").read_text()), signal.SIGKILL)
    assert "no container" in site("status", "m", code=9).stdout
    row = json.loads(site("status", "--repair", "--json", code=3).stdout)[0]
    assert (row["state"], row["repair"]) == ("loading", "start") and "down" in row["note"]
    assert " start down: no container" in site.text("repairs.log")
    site("serve", "m")
    assert "1 repair in a day" in site("status", "m").stdout
    (site.state / "up").unlink()
    assert "next attempt in" in site("status", "--repair", code=9).stderr
    site("serve", "m")
    site("stop", "m")
    calls = len(site.calls())
    assert "stopped" in site("status", "--repair").stdout
    assert not [call for call in site.calls()[calls:] if "up" in call]


def test_the_timer_is_printed(site: Site) -> None:
    said = site("status", "--repair", "--install").stdout
    assert "OnUnitInactiveSec=1min" in said and "status --repair --quiet" in said
    assert f"HFSHIP_DEPLOY_DIR={site.deploy}" in said and "\n* * * * * " in said
    assert "--install needs --repair" in site("status", "--install", code=2).stderr


def test_restart_waits_until_it_answers(site: Site) -> None:
    site("serve", "m")
    assert "m answers at http://" in site("restart", "m").stdout
    assert ["restart", "vllm_m"] in site.calls()
    site("stop", "m")
    row = json.loads(site("restart", "m", "--json").stdout)[0]
    assert (row["state"], row["task"]) == ("healthy", "chat")
    assert "no such" in site("restart", "nope", code=5).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="root, to give a folder to another user")
@pytest.mark.parametrize(
    "mode, known", [(0o750, True), (0o770, True), (0o700, True), (0o757, False)]
)
def test_the_deployment_of_another_user_is_shown_without_its_key(
    site: Site, mode: int, known: bool
) -> None:
    site("serve", "m")
    key = site.text(".env").splitlines()[1]
    folder = site.deploy / "m"
    for path in (folder, *folder.iterdir()):
        os.chown(path, 4242, os.getegid())
    folder.chmod(mode)
    done = site("status", "--json", code=0 if known else 9)
    row = json.loads(done.stdout)[0]
    assert row["state"] == ("healthy" if known else "unknown")
    assert ("only user 4242 has its key" in row["note"]) == known
    assert key.partition("=")[2] not in done.stdout + done.stderr
    if known:
        assert "Uvicorn running" in site("logs", "m").stdout
    # It is looked at, and not touched.
    assert "belongs to user 4242" in site("stop", "m", code=9).stderr
    assert "made anew" not in site("serve", "m", code=9).stderr
    site("serve", "m", "--name", "n", "--write-only")  # and it blocks no other
    for path in (folder, *folder.iterdir()):
        os.chown(path, 0, 0)
    folder.chmod(0o750)
