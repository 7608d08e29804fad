"""doctor --offline: what unpack and serve need, on machines that lack one thing each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from conftest import PYZ, Program, free_port
from hfship.base.errors import DiskError, HostError
from hfship.base.listeners import Listener, listeners, listening_sockets
from hfship.base.manifest import Source, make_manifest, write_manifest
from hfship.base.report import Reporter
from hfship.ops.doctor_gateway import probe_certificate, probe_monitoring
from hfship.ops.doctor_site import (
    SiteFolder,
    fetched_times,
    is_synchronised,
    ports_text,
    probe_clock,
    probe_folder,
)
from hfship.ops.probe import Diagnosis, Finding, ProbeWarning, local_probe
from hfship.serve.holders import container_in, parse_compute_apps
from hfship.serve.terms import Plan
from support import components
from test_serve import Site


@pytest.fixture
def site(pyz: Program, tmp_path: Path, model: Path) -> Site:
    made = Site(pyz, tmp_path, model)
    for folder in ("deploy", "transfer"):
        (pyz.home / folder).mkdir()
    return made


def findings(site: Site, play: str = "", code: int = 0, **env: str) -> Dict[str, Dict[str, Any]]:
    """check -> finding; of several images the last."""
    path = f"{site.bin}:{os.environ['PATH']}"
    done = site("doctor", "--offline", "--json", play=play, code=code, env={"PATH": path, **env})
    return {finding["check"]: finding for finding in json.loads(done.stdout)}


UUID = "GPU-00000000-0000-4000-8000-00000000000"

# What differs from a machine where all is well: (play, environment) -> exit code, check, state, words, next
MACHINES: Dict[str, Any] = {
    "well": ("", {}, 0, "gpu", "ok", "2 x NVIDIA H200, 150.8 GB, compute capability 9.0", ""),
    "engine": ("", {}, 0, "docker", "ok", "engine 28.5.2; ", ""),
    "compose": ("", {}, 0, "compose", "ok", "plugin 5.0.1", ""),
    "image": (
        "", {}, 0, "image", "ok", "vllm/vllm-openai:v0.8.3: vLLM 0.8.3, CUDA 13.0.1", "",
    ),
    "runtime": ("", {}, 0, "runtime", "ok", "sees 2 GPUs by the NVIDIA runtime", ""),
    "memory": ("", {}, 0, "gpu 1", "ok", "0 B of 150.8 GB in use", ""),
    "ports": ("", {}, 0, "ports", "ok", "the next deployment gets 8", ""),
    "no daemon": ("down", {}, 9, "docker", "fail", "daemon is not running", "systemctl start"),
    "no access": ("denied", {}, 9, "docker", "fail", "may not talk to docker", "usermod"),
    "no compose": ("no-compose", {}, 9, "compose", "fail", "no compose plugin", "docker-compose"),
    "no image": ("", {"FAKE_IMAGES": ""}, 9, "image", "fail", "no vLLM image", "docker load"),
    "no runtime": (
        "no-runtime", {}, 9, "runtime", "fail", "no GPU comes into a container: docker has no NVIDIA",
        "nvidia-ctk runtime configure",
    ),
    "only CDI": ("cdi", {}, 0, "runtime", "warn", "by CDI alone", "nvidia-ctk runtime configure"),
    "no GPU": ("", {"HFSHIP_STUB_GPUS": "none"}, 9, "gpu", "fail", "No devices were found", "nvid"),
    "broken driver": (
        "", {"HFSHIP_STUB_GPUS": "broken"}, 9, "gpu", "fail", "communicate with the NVIDIA driver",
        "nvidia-smi",
    ),
    "held": (
        "", {"HFSHIP_STUB_GPU_USED": "0,90000", "HFSHIP_STUB_GPU_APPS": f"{UUID}1, 1, /x/python3, 89000;"},
        0, "gpu 1", "warn", "python3 (process 1), 93.3 GB", "kill 1",
    ),
    "held by nobody": (
        "", {"HFSHIP_STUB_GPU_USED": "90000"}, 0, "gpu 0", "warn", "by no process that can be seen",
        "nvidia-smi, as root",
    ),
}  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
def test_what_stops_serve_is_named(machine: str, site: Site) -> None:
    play, env, code, check, state, words, step = MACHINES[machine]
    found = findings(site, play, code, **env)
    assert found[check]["state"] == state and words in found[check]["note"], found
    assert step in found[check]["next"] and bool(step) == bool(found[check]["next"])
    others = [one for one in found.values() if one["state"] == "fail" and one["check"] != check]
    assert not others, "one cause is told once"


def test_the_table_ends_with_a_count(site: Site) -> None:
    path = {"PATH": f"{site.bin}:{os.environ['PATH']}"}
    lines = site("doctor", "--offline", env=path).stdout.splitlines()
    assert lines[-1] == "no problem, no warning" and not [x for x in lines if "next" in x[:5]]
    lines = site("doctor", "--offline", play="cdi", env=path).stdout.splitlines()
    assert lines[-1] == "no problem, 1 warning" and lines[-2].startswith("next  runtime: ")


def test_a_connected_doctor_does_not_speak_of_docker(pyz: Program) -> None:
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    said = pyz("doctor", env=env, code=8).stdout
    assert "rsync" in said and "docker" not in said and "nvidia" not in said.lower()


def test_a_driver_that_is_older_than_the_image(site: Site) -> None:
    old = (
        (Path(__file__).parent / "stubs/nvidia-smi").read_text().replace("580.159.04", "550.54.14")
    )
    (site.bin / "nvidia-smi").write_text(old)
    image = findings(site)["image"]
    assert image["state"] == "warn" and "needs driver 580; here is 550.54.14" in image["note"]


# ---- folders


def folder(path: Path, is_written: bool = True) -> SiteFolder:
    return SiteFolder("models", path, "HFSHIP_SITE_MODELS_DIR", is_written)


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    assert "is made when it is needed" in probe_folder(folder(tmp_path / "a/b"))
    assert " free on " in probe_folder(folder(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="is no folder"):
        probe_folder(folder(tmp_path / "file"))


# ---- clock


def test_a_clock_before_what_was_fetched_is_wrong() -> None:
    now = 1769832306.0  # 2026-01-31T04:05:06Z
    assert probe_clock(now, []).startswith("2026-01-31 04:05:06 UTC, ")
    assert probe_clock(now, [("m", "2026-01-31T04:05:30.123Z")])  # within a minute
    with pytest.raises(ProbeWarning, match="too early: b was fetched at 2027-01-01T00:00:00Z"):
        probe_clock(now, [("a", "2026-06-01T00:00:00Z"), ("b", "2027-01-01T00:00:00Z")])
    assert is_synchronised() in (True, False)


def test_when_models_were_fetched_is_read_from_their_manifests(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    source = Source(
        "https://hub", "o/a", "main", "o/a", "1" * 40, fetched_at="2026-01-31T04:05:06Z"
    )
    write_manifest(tmp_path / "a", make_manifest("a", (), source))
    assert fetched_times(tmp_path) == [("a", "2026-01-31T04:05:06Z")]
    assert fetched_times(tmp_path / "nowhere") == []


# ---- ports


def test_who_listens_is_found(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        found = listeners()[port]
        assert found.pid == os.getpid() and "(process " in found.text()
    assert port not in listeners() and Listener(1).text() == "a process of another user"


@pytest.mark.parametrize("text", ["", "x", "0: 1 2 0A", "0: zz:zz 0 0A 0 0 0 0 0 5", "\n\n"])
def test_any_table_of_sockets_is_read(text: str) -> None:
    assert listening_sockets(text) == {}


# What is behind a gateway has no port of this machine.
PLANS = [
    Plan(name="m", port=8000),
    Plan(name="n", port=8002),
    Plan(name="behind", port=0, network="hfship"),
]

# what listens -> words; those of a warning begin with !
PORTS: Dict[str, Any] = {
    "nothing": ([], "gets 8001; taken: 8000 m, 8002 n"),
    "docker's own": ([Listener(8000, 5, "docker-proxy"), Listener(8002)], "gets 8001; taken: 80"),
    "another": ([Listener(8001, 7, "nginx")], "gets 8003; taken: 8000 m, 8002 n, 8001 nginx (pro"),
    "elsewhere": ([Listener(22, 7, "sshd")], "gets 8001; taken: 8000 m, 8002 n"),
    "in the way": ([Listener(8002, 7, "nginx")], "!8002 of n is held by nginx (process 7)"),
}


@pytest.mark.parametrize("case", PORTS)
def test_ports(case: str) -> None:
    listening, words = PORTS[case]
    by_port = {one.port: one for one in listening}
    if words.startswith("!"):
        with pytest.raises(ProbeWarning) as raised:
            ports_text(PLANS, by_port)
        assert raised.value.text == words[1:] and "serve n --port" in raised.value.next_step
    else:
        assert words in ports_text(PLANS, by_port)


# ---- who holds memory


@pytest.mark.parametrize(
    "line, told",
    [
        ("GPU-1, 77, /opt/a, b/python3, 1024", ["python3 (process 77), 1.1 GB"]),
        ("GPU-1, 77, python3, [N/A]", ["python3 (process 77)"]),
        ("No running processes found", []),
        ("GPU-1, x, python3, 1", []),
        ("", []),
    ],
)
def test_lines_of_nvidia_smi(line: str, told: List[str]) -> None:
    assert [holder.text() for holder in parse_compute_apps(line)] == told


@pytest.mark.parametrize(
    "cgroup, known",
    [
        ("0::/system.slice/docker-{id}.scope", True),
        ("5:cpu:/docker/{id}\n1:name=systemd:/docker/{id}", True),
        ("0::/kubepods/pod1/{id}", True),
        ("0::/user.slice", False),
        ("", False),
    ],
)
def test_the_container_of_a_process(cgroup: str, known: bool) -> None:
    container = "0123456789abcdef" * 4
    assert container_in(cgroup.format(id=container)) == (container if known else "")


# ---- probes


def test_a_probe_of_this_machine_blames_no_network() -> None:
    def slow() -> str:
        time.sleep(5)
        return ""

    silent = local_probe("x", slow, 0.05).run(Reporter("none"))
    assert (silent.state, silent.exit_code) == ("fail", 9) and "network" not in silent.next

    def broken() -> str:
        raise PermissionError(13, "Permission denied")

    assert local_probe("x", broken).run(Reporter("none")).exit_code == 9


def test_a_diagnosis_counts_and_has_the_first_exit_code() -> None:
    failed = [
        local_probe("a", lambda: (_ for _ in ()).throw(HostError("no", "", "do"))).run(
            Reporter("none")
        ),
        Finding("b", "warn", "slow"),
        Finding("c", "warn", "slow"),
        Finding("d", "ok", "fine"),
    ]
    diagnosis = Diagnosis(failed)
    assert diagnosis.text().splitlines()[-2:] == ["next  a: do", "1 problem, 2 warnings"]
    assert diagnosis.exit_code == 9 and diagnosis.json()[1]["note"] == "slow"


# ---- a real engine


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[List[Dict[str, Any]]]:
    """What doctor --offline finds beside a real docker with a vLLM image and stub GPUs."""
    components.require("vllm-image")
    home = tmp_path_factory.mktemp("site")
    argv = components.with_docker_argv([sys.executable, PYZ, "doctor", "--offline", "--json"])
    env = {**os.environ, "HOME": str(home), "HFSHIP_STUB_GPUS": "2x L40S 46068"}
    env["HFSHIP_COMPONENTS"] = str(components.HOME)
    env.update({f"HFSHIP_{name}_DIR": str(home / name) for name in ("DEPLOY", "TRANSFER")})
    env["HFSHIP_SITE_MODELS_DIR"] = str(home / "models")
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    yield json.loads(done.stdout)


@pytest.mark.alone
@pytest.mark.real
@pytest.mark.parametrize(
    "check, words",
    [
        ("docker", "engine "),
        ("compose", "plugin "),
        ("gpu", "2 x NVIDIA L40S"),
        ("image", "vllm/vllm-openai"),
        ("runtime", "a container sees 2 GPUs by the NVIDIA runtime"),
    ],
)
def test_a_real_docker(check: str, words: str, real: List[Dict[str, Any]]) -> None:
    found = [finding for finding in real if finding["check"] == check]  # of images one each
    assert any(one["state"] == "ok" and words in one["note"] for one in found), found


CERTIFICATES = [(90, "", "is good for 90 days"), (10, "warn", "ends in 10 days")]


@pytest.mark.parametrize("days, state, said", CERTIFICATES)
def test_the_end_of_the_gateways_certificate(
    days: int, state: str, said: str, tmp_path: Path
) -> None:
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=site"]
    files = ["-keyout", tmp_path / "key", "-out", tmp_path / "tls.pem"]
    subprocess.run([*new, "-days", str(days), *files], check=True, capture_output=True)
    finding = local_probe("certificate", partial(probe_certificate, tmp_path)).run(Reporter("none"))
    assert finding.state == (state or "ok") and said in finding.text, finding


def image_rows(*names: str) -> str:
    """A listing of docker's images."""
    pairs = [name.split(":") for name in names]
    return "\n".join(json.dumps({"Repository": name, "Tag": tag}) for name, tag in pairs)


MONITORING = [
    (("prom/prometheus:v3.1", "grafana/grafana:11.4"), "ok", "prometheus:v3.1, grafana"),
    (("prom/prometheus:v3.1",), "warn", "no Grafana"),
    (("grafana/grafana:11.4",), "fail", "no image of Prometheus"),
]


@pytest.mark.parametrize("names, state, said", MONITORING)
def test_the_images_of_monitoring(names: Any, state: str, said: str) -> None:
    work = partial(probe_monitoring, image_rows(*names))
    finding = local_probe("monitoring", work).run(Reporter("none"))
    assert finding.state == state and said in finding.text, finding
