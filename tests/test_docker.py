"""Words with docker and nvidia-smi: what is asked, and what their answers mean. Both are played."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence

import pytest

from hfship.base.errors import Exit, HostError
from hfship.base.processes import Completed
from hfship.base.text import GIB
from hfship.serve import docker
from hfship.serve.deployments import Deployment
from hfship.serve.docker import EngineInfo, LogTail
from hfship.serve.terms import CONTAINER_PORT, Gpu, Image, Plan

IMAGE_LS = "docker image ls --no-trunc --format {{json .}}"
INFO = "docker info --format {{json .}}"
VLLM = {"Repository": "vllm/vllm-openai", "Tag": "v0.9.2", "ID": "sha256:1"}
CARDS = "0, GPU-0, NVIDIA H100, 81920, 0, 9.0, 580.1, "


class Programs:
    """Answers by the words of a command; where none is known, it fails."""

    def __init__(self) -> None:
        self.answers: Dict[str, Any] = {}
        self.asked: List[str] = []

    def run(self, argv: Sequence[str], timeout_s: Optional[float] = None) -> Completed:
        assert timeout_s, "a docker that hangs must not hold us up"
        words = " ".join(argv)
        self.asked.append(words)
        for known, answer in self.answers.items():
            if words.startswith(known):
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, Completed):
                    return answer
                return Completed(0, answer if isinstance(answer, str) else json.dumps(answer), "")
        return Completed(1, "", "Error: it is not there\n")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    programs = Programs()
    monkeypatch.setattr(docker, "run_program", programs.run)
    docker._asked_info.cache_clear()
    yield programs
    docker._asked_info.cache_clear()


NO_DOCKER = HostError("docker is not installed", "no docker", "install it")


# -- failures


@pytest.mark.parametrize(
    "out, err, why",
    [
        ("", " bad \n", "docker says: bad"),
        ("on stdout", "", "docker says: on stdout"),
        ("", "", "docker compose -p m ... ended with 7"),
        ("", "Container vllm_m  Creating\nbad", "docker says: bad"),
        ("", "x" * 1500, "docker says: " + "x" * 1000),
    ],
)
def test_what_docker_says_when_it_fails_is_told(
    out: str, err: str, why: str, said: Programs
) -> None:
    said.answers["docker compose"] = Completed(7, out, err)
    with pytest.raises(HostError) as caught:
        docker.docker(["compose", "-p", "m", "up", "-d"], "start m")
    assert (caught.value.what, caught.value.why) == ("cannot start m", why)
    assert caught.value.next_step == "run docker compose -p m ... by hand"


def test_a_known_failure_has_its_cause_and_step_and_the_name_of_the_model(said: Programs) -> None:
    err = "Ports are not available: bind: address already in use"
    said.answers["docker compose"] = Completed(1, "", err)
    with pytest.raises(HostError, match="cannot start m: .*") as caught:
        docker.docker(["compose", "up"], "start m", name="m")
    assert "hfship serve m --port" in caught.value.next_step


# -- the engine


def test_docker_says_what_it_is_once(said: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = [{"Name": "compose"}, {"Name": "buildx", "Err": "broken"}]
    said.answers[INFO] = {
        "ServerVersion": "28.5.2",
        "DockerRootDir": "/d",
        "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}],
        "ClientInfo": {"Plugins": plugins},
    }
    expected = EngineInfo("28.5.2", "/d", frozenset({"nvidia.com/gpu=0"}), True)
    assert docker.engine_info() == docker.engine_info() == expected
    assert said.asked == [INFO]
    assert docker.cdi_devices() == expected.devices
    docker.require_docker()
    assert said.asked == [INFO, INFO], "whether it answers now is asked now"
    for variable in ("PATH", "DOCKER_HOST"):  # another client, or another engine
        monkeypatch.setenv(variable, "/elsewhere")
        docker.engine_info()
    assert said.asked == [INFO] * 4


@pytest.mark.parametrize(
    "text, expected",
    [
        ("no json", EngineInfo()),
        ("[]", EngineInfo()),
        ('{"ServerVersion": "28", "ServerErrors": ["denied"]}', EngineInfo()),
        ('{"ServerVersion": null, "Runtimes": null, "ClientInfo": null}', EngineInfo()),
        (
            '{"Runtimes": {"nvidia": {}}, "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]}',
            EngineInfo(),
        ),
        (
            '{"ClientInfo": {"Plugins": [{"Name": "compose", "Err": "no"}]}}',
            EngineInfo(),
        ),
    ],
)
def test_of_what_docker_does_not_say_nothing_is_known(text: str, expected: EngineInfo) -> None:
    assert docker.parse_info(text) == expected


def test_devices_of_a_docker_that_does_not_answer_are_none(said: Programs) -> None:
    said.answers[INFO] = NO_DOCKER
    assert docker.cdi_devices() == frozenset()


VERSION = "docker version --format {{.Server.Version}}"
COMPOSE = "docker compose version --short"


@pytest.mark.parametrize(
    "version, answers, error",
    [
        ("28.5", {COMPOSE: "2.40\n"}, ""),
        ("", {VERSION: "28.5\n", COMPOSE: "2.40\n"}, ""),
        ("", {COMPOSE: "2.40\n"}, "cannot use docker"),  # an old client: nobody answers it
        ("28.5", {}, "cannot use docker compose"),
        ("20.10.24", {}, "cannot use docker compose"),
        ("19.03.1", {}, "docker 19.03.1 is older than its compose plugin"),
    ],
)
def test_engine_and_compose_are_required(
    version: str, answers: Dict[str, str], error: str, said: Programs
) -> None:
    said.answers = {INFO: {"ServerVersion": version}, **answers}
    if not error:
        docker.require_docker()
        return
    with pytest.raises(HostError) as caught:
        docker.require_docker()
    assert caught.value.what == error


# -- images


@pytest.mark.parametrize(
    "wanted, references",
    [
        ("", ["vllm/vllm-openai:v0.9.2"]),
        ("vllm/vllm-openai:v0.9.2", ["vllm/vllm-openai:v0.9.2"]),
        ("sha256:1", ["vllm/vllm-openai:v0.9.2"]),
        ("ours/it:1", ["vllm/vllm-openai:v0.9.2", "ours/it:1"]),
        ("ours/gone:1", ["vllm/vllm-openai:v0.9.2"]),
    ],
)
def test_an_image_that_is_wanted_is_listed_whatever_it_is_called(
    wanted: str, references: List[str], said: Programs
) -> None:
    other = {"Repository": "busybox", "Tag": "1", "ID": "sha256:2"}
    listed = f"WARNING: odd\n{json.dumps(other)}\n{json.dumps(VLLM)}\n"
    said.answers = {IMAGE_LS: listed, "docker image inspect ours/it:1": [{"Id": "sha256:3"}]}
    found = docker.list_images(wanted)
    assert [image.reference for image in found] == references
    assert [image.id for image in found] == ["sha256:1", "sha256:3"][: len(found)]
    inspected = [words for words in said.asked if "inspect" in words]
    assert len(inspected) == wanted.startswith("ours/"), "only what is not listed is looked at"


def test_an_image_tells_its_id_and_cuda(said: Programs) -> None:
    variables = ["PATH=/bin", "CUDA_VERSION=12.8.1", "XCUDA_VERSION=1"]
    said.answers["docker image inspect x"] = [{"Id": "sha256:1", "Config": {"Env": variables}}]
    image = docker.read_image(Image("x", version=(0, 9, 2)))
    assert (image.id, image.cuda, image.version) == ("sha256:1", "12.8.1", (0, 9, 2))
    said.answers["docker image inspect x"] = [{"Id": "sha256:1", "Config": None}]
    image = docker.read_image(Image("x"), may_ask=False)
    assert (image.cuda, image.version) == ("", None)
    assert not [words for words in said.asked if "docker run" in words]


def test_an_image_is_asked_without_network_or_rights(said: Programs) -> None:
    said.answers["docker run"] = "hfship-preflight {}"
    assert docker.ask_image("x/vllm:1") == "hfship-preflight {}"
    (words,) = said.asked
    expected = "docker run --rm --network none --pull never --cap-drop ALL --entrypoint python3 x/vllm:1 -c "
    assert words.startswith(expected) and words.endswith(" about")
    said.answers["docker run"] = Completed(1, "", "no python3")
    assert docker.ask_image("x/vllm:1") == ""


# -- the machine


def test_a_machine_has_its_images_containers_devices_and_gpus(said: Programs) -> None:
    said.answers = {
        IMAGE_LS: json.dumps(VLLM),
        "docker container ls --filter status=running": "vllm_a\nother\n",
        INFO: {"ServerVersion": "28", "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]},
        "nvidia-smi --query-gpu": CARDS + "Disabled\n",
    }
    host, containers = docker.read_host_and_containers("")
    assert containers == {"vllm_a", "other"}
    assert [image.id for image in host.images] == ["sha256:1"]
    assert host.cdi == {"nvidia.com/gpu=0"}
    assert host.gpus == (
        Gpu(0, "GPU-0", "NVIDIA H100", 80 * GIB, capability=(9, 0), driver="580.1"),
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host.memory == int(total * 0.85)
    assert len([words for words in said.asked if "nvidia-smi" in words]) == 1


def test_slices_are_asked_for_where_a_gpu_is_divided(said: Programs) -> None:
    said.answers = {
        "nvidia-smi --query-gpu": CARDS + "Enabled\n",
        "nvidia-smi -L": "GPU 0: H (UUID: GPU-0)\n  MIG 1g.10gb     Device  0: (UUID: MIG-1)\n",
        "nvidia-smi -q -x": HostError("no", "", ""),
    }
    assert [gpu.uuid for gpu in docker.read_host(()).gpus] == ["GPU-0", "MIG-1"]


@pytest.mark.parametrize(
    "answer, problem",
    [
        (
            HostError("nvidia-smi is missing", "there is no nvidia-smi", ""),
            "there is no nvidia-smi",
        ),
        (Completed(9, "no driver\n", ""), "nvidia-smi says: no driver"),
        (Completed(9, "", "no NVML\n"), "nvidia-smi says: no NVML"),
        (Completed(0, "", ""), "nvidia-smi says: nothing"),
        (Completed(9, "x" * 600, ""), "nvidia-smi says: " + "x" * 500),
    ],
)
def test_why_there_is_no_gpu_is_kept(answer: Any, problem: str, said: Programs) -> None:
    said.answers["nvidia-smi"] = answer
    host = docker.read_host((Image("x"),))
    assert (host.gpus, host.gpu_problem) == ((), problem)
    assert host.images == (Image("x"),) and host.memory > 0


# -- containers


def test_commands_of_compose_name_the_project_and_the_file() -> None:
    deployment = Deployment(Path("/d/m"), Plan(name="m"), "")
    words = docker.compose(deployment, "up", "-d")
    assert words == ["compose", "-p", "hfship-m", "-f", "/d/m/docker-compose.yml", "up", "-d"]


INSPECTED = {
    "Id": "c1",
    "Image": "sha256:1",
    "RestartCount": 0,
    "State": {"Status": "running", "ExitCode": 0, "StartedAt": "2026-01-02T03:04:05Z"},
}


@pytest.mark.parametrize(
    "trial, inspected, ends",
    [
        (Completed(0, "", "Container vllm_m  Recreate\n"), [INSPECTED], True),
        (Completed(0, "Container vllm_m  Recreate\n", ""), [INSPECTED], True),
        (Completed(0, "", "Container vllm_m  Running\n"), [INSPECTED], False),
        (Completed(1, "", "unknown flag: --dry-run"), [INSPECTED], True),
        (Completed(1, "", "unknown flag"), Completed(1, "", "No such container: vllm_m"), False),
    ],
)
def test_whether_a_start_would_end_what_runs(
    trial: Completed, inspected: Any, ends: bool, said: Programs
) -> None:
    deployment = Deployment(Path("/d/m"), Plan(name="m"), "")
    said.answers = {"docker compose": trial, "docker container inspect vllm_m": inspected}
    assert docker.would_restart(deployment) == ends
    assert said.asked[0].endswith("docker-compose.yml --dry-run up -d")


@pytest.mark.parametrize(
    "answer, percent", [("12.50%\n", 12.5), ("--\n", 0.0), (Completed(1, "", "gone"), 0.0)]
)
def test_how_busy_a_container_is(answer: Any, percent: float, said: Programs) -> None:
    said.answers["docker stats --no-stream --format {{.CPUPerc}} vllm_m"] = answer
    assert docker.cpu_percent("m") == percent


@pytest.mark.parametrize(
    "answer, lost",
    [
        (Completed(255, "", "Failed to initialize NVML: Unknown Error"), True),
        (Completed(255, "Failed to initialize NVML: Unknown Error", ""), True),
        (Completed(0, "Failed to initialize NVML", ""), False),
        (Completed(127, "", "nvidia-smi: not found"), False),
        (HostError("docker did not answer", "", ""), False),
    ],
)
def test_a_gpu_that_a_container_lost(answer: Any, lost: bool, said: Programs) -> None:
    said.answers["docker exec vllm_m nvidia-smi -L"] = answer
    assert docker.lost_its_gpu("m") == lost


def test_of_some_deployments_those_that_run(said: Programs) -> None:
    said.answers["docker container ls"] = "vllm_a\nvllm_c\n"
    assert docker.running_among(["a", "b"]) == {"a"}
    said.asked.clear()
    assert docker.running_among([]) == frozenset() and not said.asked


# -- logs

LOGGED = Completed(0, "2026-01-02T03:04:05.1Z out\n", "2026-01-02T03:04:05.0Z err\n")


@pytest.mark.parametrize(
    "since, words",
    [
        (0.0, "docker logs --timestamps --tail 9 vllm_m"),
        (5.5, "docker logs --since 5.500 --timestamps --tail 9 vllm_m"),
    ],
)
def test_the_end_of_a_log_is_in_the_order_of_time(since: float, words: str, said: Programs) -> None:
    said.answers["docker logs"] = LOGGED
    tail = docker.read_log("m", 9, since)
    assert tail == LogTail("err\nout\n", 1767323045.0) and said.asked == [words]
    assert docker.log_tail(Deployment(Path("/d/m"), Plan(name="m"), ""), 9) == tail.text


@pytest.mark.parametrize("answer", [Completed(1, "2026-01-02T03:04:05Z x", "no"), NO_DOCKER])
def test_a_log_that_is_not_there_is_empty(answer: Any, said: Programs) -> None:
    said.answers["docker logs"] = answer
    assert docker.read_log("m", 9) == LogTail()


class Logs:
    """A `docker logs` that says two lines, and ends as it is told to."""

    def __init__(self, code: int, broken: bool = False) -> None:
        self.returncode, self.terminated = code, False
        self.broken = broken

    @property
    def stdout(self) -> Iterator[bytes]:
        yield b"one\n"
        if self.broken:
            raise KeyboardInterrupt
        yield b"tw\xff\n"

    def terminate(self) -> None:
        self.terminated = True

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "code, broken, exit_code, lines",
    [
        (0, False, Exit.OK, ["one", "tw\ufffd"]),
        (1, False, Exit.HOST, ["one", "tw\ufffd"]),
        (-15, False, Exit.OK, ["one", "tw\ufffd"]),
        (1, True, Exit.OK, ["one"]),  # Ctrl-C is the way out
    ],
)
def test_a_log_is_copied_until_it_ends_or_somebody_stops_it(
    code: int, broken: bool, exit_code: Exit, lines: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = Logs(code, broken)
    asked: List[Sequence[str]] = []

    def started(argv: Sequence[str], stdout: int, stderr: int) -> Logs:
        assert (stdout, stderr) == (subprocess.PIPE, subprocess.STDOUT), "vLLM logs to both"
        asked.append(argv)
        return logs

    monkeypatch.setattr(docker, "started", started)
    results: List[str] = []
    reporter: Any = SimpleNamespace(result=results.append)
    assert docker.stream_logs("m", True, "all", 60.0, reporter) == exit_code
    assert results == lines and logs.terminated
    assert asked[0][:3] == ["docker", "logs", "--follow"]
    assert asked[0][3:5] == ["--since", "1970-01-01T00:01:00Z"]
    assert asked[0][5:] == ["--tail", "all", "vllm_m"]
    docker.stream_logs("m", False, "9", None, reporter)
    assert asked[1] == ["docker", "logs", "--tail", "9", "vllm_m"]


# -- where the API is


def networks(**addresses: str) -> Any:
    rows = {name: {"IPAddress": address} for name, address in addresses.items()}
    return [{"NetworkSettings": {"Networks": rows}}]


@pytest.mark.parametrize(
    "plan, answer, address",
    [
        (Plan(name="m", bind="127.0.0.1", port=8001), None, ("127.0.0.1", 8001)),
        (Plan(name="m", bind="::1", port=8001), None, ("::1", 8001)),
        (
            Plan(name="m", network="n"),
            networks(x="1.1.1.1", n="172.18.0.2"),
            ("172.18.0.2", CONTAINER_PORT),
        ),
        (Plan(name="m", network="n"), networks(x="1.1.1.1"), ("", 0)),
        (Plan(name="m", network="n"), networks(n=""), ("", 0)),
        (Plan(name="m", network="n"), [{}], ("", 0)),
        (Plan(name="m", network="n"), Completed(1, "", "no such container"), ("", 0)),
    ],
)
def test_where_this_machine_reaches_the_api(
    plan: Plan, answer: Any, address: Any, said: Programs
) -> None:
    if answer is not None:
        said.answers["docker container inspect vllm_m"] = answer
    assert docker.api_address(plan) == address
    assert bool(said.asked) == bool(plan.network)
    direct = docker.direct(plan)
    assert (direct.network, direct.bind, direct.port) == ("", *address)
    assert replace(direct, network=plan.network, bind=plan.bind, port=plan.port) == plan


def test_nothing_of_a_log_that_a_bar_draws_is_lost() -> None:
    """A bar that is drawn anew in its place is one line."""
    tail = docker.parse_log("1970-01-01T00:00:09Z 1%\r2%\n", "")
    assert tail == LogTail("1%\r2%\n", 9.0)
    assert docker.parse_log("odd line\n") == LogTail("line\n", 0.0)
    assert docker.parse_log("", "") == LogTail()
