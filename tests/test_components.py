"""The real components are what they claim to be: each is started once and asked who it is."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import List

import pytest

from support import components, make_model

STUB = str(components.STUB_NVIDIA_SMI)


def output(command: List[str], **environ: str) -> str:
    """stdout of a program that must succeed."""
    env = dict(os.environ, **environ)
    return subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    ).stdout


@pytest.mark.real
@pytest.mark.parametrize("name", list(components.COMPONENTS))
def test_component_is_installed(name: str) -> None:
    assert components.require(name).exists()


@pytest.mark.real
def test_hf_is_the_official_client() -> None:
    assert components.HF_VERSION in output([str(components.require("hf")), "version"])


@pytest.mark.real
def test_minilm_has_real_weights() -> None:
    model = components.require("minilm")
    assert json.loads((model / "config.json").read_text())["hidden_size"] == 384
    assert (model / "model.safetensors").stat().st_size > 80e6


@pytest.mark.real
@pytest.mark.parametrize(
    "name, version", [("chroot-bullseye", "Python 3.9."), ("chroot-forky", "Python 3.14.")]
)
def test_chroot_runs_its_own_python_without_a_network(
    name: str, version: str, tmp_path: Path
) -> None:
    components.require(name)
    script = "python3 -V; tail -n +2 /proc/net/route; touch /forgotten; echo bound > /data/answer"
    said = output([*components.chroot_argv(name, {str(tmp_path): "/data"}), "sh", "-c", script])
    assert said.startswith(version) and said.count("\n") == 1, "a second line would be a route out"
    assert (tmp_path / "answer").read_text() == "bound\n"
    assert not (components.HOME / name / "root/forgotten").exists()
    assert name not in Path("/proc/mounts").read_text()


@pytest.mark.real
@pytest.mark.alone
def test_with_docker_is_an_air_gapped_engine_with_compose() -> None:
    components.require("docker")
    script = "docker version -f '{{.Server.Version}}'; docker compose version --short; ip route show default; exit 7"
    done = subprocess.run(
        components.with_docker_argv(["sh", "-c", script]),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    engine, compose = done.stdout.splitlines()  # a third line would be a route out
    assert engine.startswith("28.") and compose.startswith("2.") and done.returncode == 7


@pytest.mark.real
@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_with_docker_leaves_no_daemon_behind(number: signal.Signals, tmp_path: Path) -> None:
    components.require("docker")
    note = tmp_path / "socket"
    command = components.with_docker_argv(
        ["sh", "-c", f"echo $DOCKER_HOST > {note}; exec sleep 60"]
    )
    box = subprocess.Popen(command, start_new_session=True)
    try:
        wait_until(lambda: note.exists() and note.read_text().endswith("\n"))
        socket = note.read_text().strip()
        assert engines(socket)
        box.send_signal(number)
        box.wait(60)
        wait_until(lambda: not engines(socket))
    finally:
        box.terminate()
        box.wait(60)


def engines(socket: str) -> List[str]:
    """Command lines of processes that name a docker socket: its engine."""
    lines = subprocess.run(
        ["ps", "-ww", "-eo", "args"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    return [line for line in lines if f"-H {socket}" in line]


def wait_until(condition, timeout_s: float = 60) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.real
@pytest.mark.alone
def test_vllm_image_sees_the_gpus_it_was_given() -> None:
    components.require("vllm-image")
    run = "docker run --rm --pull never --network none --entrypoint sh"
    script = f"{run} --gpus all {components.VLLM_IMAGE} -c 'ls -d /dev/nvidia*; nvidia-smi -L'"
    said = output(
        components.with_docker_argv(["sh", "-c", script]), HFSHIP_STUB_GPUS="3x L40S 46068"
    )
    assert said.splitlines()[:3] == ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2"]
    assert (
        said.splitlines()[3].startswith("GPU 0: NVIDIA L40S (UUID: GPU-") and said.count("\n") == 6
    )


@pytest.mark.parametrize(
    "gpus, arguments, expected",
    [
        (
            "",
            "name,memory.total,compute_cap --format=csv,noheader,nounits",
            "NVIDIA H200, 143771, 9.0\n" * 2,
        ),
        ("1x L40S 46068", "index,memory.free --format=csv,noheader", "0, 45453 MiB\n"),
        ("1x X 1000 12.1", "compute_cap --format=csv,noheader", "12.1\n"),
    ],
)
def test_stub_nvidia_smi_answers_queries(gpus: str, arguments: str, expected: str) -> None:
    command = [sys.executable, STUB, *f"--query-gpu={arguments}".split()]
    assert output(command, HFSHIP_STUB_GPUS=gpus) == expected


def test_pythons_are_each_of_another_minor_version() -> None:
    minors = [tuple(map(int, i.version.split(".")[:2])) for i in components.pythons()]
    assert (
        minors
        and minors == sorted(set(minors))
        and all((3, 8) <= minor <= (3, 14) for minor in minors)
    )


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_made_model_is_deterministic(kind: str, dtype: str, tmp_path: Path) -> None:
    first, second = (
        make_model.make_model(tmp_path / name / "m", 1, kind, dtype) for name in ("a", "b")
    )
    assert first == second
    assert first != make_model.make_model(tmp_path / "c/m", 1, kind, dtype, seed=1)


@pytest.mark.parametrize("size_mb, shards", [(1, 1), (1, 3), (20, 2), (30, 5)])
def test_made_model_has_consistent_safetensors(size_mb: float, shards: int, tmp_path: Path) -> None:
    make_model.make_model(tmp_path, size_mb, shards=shards)
    files = sorted(tmp_path.glob("*.safetensors"))
    headers = {path.name: header(path) for path in files}
    assert len(files) == shards
    total = sum(path.stat().st_size for path in files)
    assert total == pytest.approx(size_mb * 1e6, rel=0.25)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shards > 1)
    if shards > 1:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map == {
            tensor: name for name, tensors in headers.items() for tensor in tensors
        }


def header(path: Path) -> List[str]:
    """Tensor names of a safetensors file, whose offsets must be gapless, fit the shapes and end with the file."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(size))
    del table["__metadata__"]
    position = 0
    for entry in table.values():
        begin, end = entry["data_offsets"]
        count = 1
        for dimension in entry["shape"]:
            count *= dimension
        assert begin == position and end - begin == count * make_model.BYTES_OF[entry["dtype"]]
        position = end
    assert 8 + size + position == path.stat().st_size
    return list(table)
