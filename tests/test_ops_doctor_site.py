# SPDX-License-Identifier: Apache-2.0
"""Each probe of the offline side on values; test_doctor_site.py has machines."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import pytest

from hfship.base.errors import DiskError, HfshipError, HostError
from hfship.base.listeners import Listener
from hfship.base.manifest import Source, make_manifest, write_manifest
from hfship.base.processes import Completed
from hfship.base.report import Reporter
from hfship.ops import doctor_site as room
from hfship.ops.doctor_site import (
    CLOCK_SLACK_S,
    LITTLE_IMAGE_ROOM,
    MUCH_MEMORY,
    SiteDoctor,
    SiteFolder,
    fetched_times,
    gpus_text,
    is_synchronised,
    ports_text,
    probe_clock,
    probe_compose,
    probe_engine,
    probe_folder,
    probe_image,
    probe_memory,
    probe_runtime,
    site_findings,
    site_folders,
    try_gpus,
)
from hfship.ops.probe import Finding, ProbeWarning
from hfship.serve.holders import Holder
from hfship.serve.terms import Gpu, Image

GIB = 1 << 30
GPU = Gpu(0, "GPU-a", "NVIDIA H100", 80 * GIB, 0, (9, 0), "535.1")
QUIET = Reporter("none", -1)


def asked(call: Any) -> Any:
    """What a probe tells: "ok", "warn" or "fail", its text, why and the step."""
    try:
        return ("ok", call(), "", "")
    except ProbeWarning as exc:
        return ("warn", exc.text, "", exc.next_step)
    except HfshipError as exc:
        return ("fail", exc.what, exc.why, exc.next_step)


# -- folders


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user who may write into these folders alone, with 7 bytes of room."""

    def become(*writable: Path) -> None:
        def access(path: Any, mode: int) -> bool:
            assert mode == os.W_OK | os.X_OK
            return Path(path) in writable

        monkeypatch.setattr(room.os, "access", access)

    monkeypatch.setenv("USER", "ann")
    monkeypatch.setattr(room, "free_bytes", lambda _: 7)
    monkeypatch.setattr(room, "probe_disk", lambda path: f"disk of {path}")
    return become


@pytest.mark.parametrize("written", [True, False])
def test_a_folder_is_there_and_may_be_written(written: bool, as_user: Any, tmp_path: Path) -> None:
    there, gone = tmp_path / "there", tmp_path / "gone/far"
    there.mkdir()
    (tmp_path / "file").touch()

    def probe(path: Path) -> Any:
        return asked(lambda: probe_folder(SiteFolder("models", path, "MODELS", written)))

    as_user(there, tmp_path)
    assert probe(there) == ("ok", f"disk of {there}", "", "")
    made = f"{gone} is not there yet, and is made when it is needed; 7 B free"
    assert probe(gone) == ("ok", made, "", "")
    no_folder = f"{tmp_path}/file is no folder"
    assert probe(tmp_path / "file") == ("fail", no_folder, "", "export MODELS=DIR")
    as_user()
    refused = f"{there} may not be written to by ann; 7 B free"
    own = f"sudo chown ann {there}   or export MODELS=DIR"
    wanted = ("fail", refused, "", own) if written else ("ok", refused, "", "")
    assert probe(there) == wanted
    what = f"{gone} is not there, and {tmp_path} may not be written to"
    make = f"sudo install -d -o ann {gone}   or export MODELS=DIR"
    assert probe(gone) == ("fail", what, "", make)


def test_who_has_no_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USER", raising=False)
    assert room._user() == str(os.geteuid())


def settings_of(folder: Path) -> Any:
    return SimpleNamespace(
        transfer_dir=folder / "t", site_models_dir=folder / "m", deploy_dir=folder / "d"
    )


def test_the_folders_of_the_offline_side(tmp_path: Path) -> None:
    assert site_folders(settings_of(tmp_path)) == [
        SiteFolder("packages", tmp_path / "t", "HFSHIP_TRANSFER_DIR", False),
        SiteFolder("models", tmp_path / "m", "HFSHIP_SITE_MODELS_DIR", True),
        SiteFolder("deployments", tmp_path / "d", "HFSHIP_DEPLOY_DIR", True),
    ]


def test_folders_and_clock_come_before_what_builds_on_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: List[Any] = []
    docker = Finding("docker", "ok", "x")
    monkeypatch.setattr(room, "probe_folder", lambda folder: f"probed {folder.name}")
    monkeypatch.setattr(room, "fetched_times", lambda path: [(str(path), "then")])
    monkeypatch.setattr(
        room, "probe_clock", lambda now, fetched: seen.append((now, fetched)) or "t"
    )
    monkeypatch.setattr(SiteDoctor, "findings", lambda _: iter([docker]))
    found = list(site_findings(settings_of(tmp_path), QUIET))
    names = ["packages", "models", "deployments"]
    assert found == [
        *(Finding(name, "ok", f"probed {name}") for name in names),
        Finding("clock", "ok", "t"),
        docker,
    ]
    ((now, fetched),) = seen
    assert abs(now - time.time()) < 1000 and fetched == [(f"{tmp_path}/m", "then")]


# -- the clock

NOW = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


@pytest.mark.parametrize(
    ("fetched", "state", "text"),
    [
        ([], "ok", "2027-01-15 08:00:00 UTC, synchronised"),
        ([("a", "2027-01-15T08:01:00")], "ok", "2027-01-15 08:00:00 UTC, synchronised"),
        (
            [("a", "2027-01-15T08:01:01"), ("b", "2028-01-01T00:00:00")],
            "warn",
            "2027-01-15 08:00:00 UTC is too early: b was fetched at 2028-01-01T00:00:00",
        ),
    ],
)
def test_the_clock_is_not_before_what_was_fetched(
    fetched: Any, state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CLOCK_SLACK_S == 60
    monkeypatch.setattr(room, "is_synchronised", lambda: True)
    found = asked(lambda: probe_clock(NOW, fetched))
    assert found[:2] == (state, text) and ("timedatectl" in found[3]) == (state == "warn")
    monkeypatch.setattr(room, "is_synchronised", lambda: False)
    assert probe_clock(NOW, []) == "2027-01-15 08:00:00 UTC, kept by nothing"


@pytest.mark.parametrize(("answer", "kept"), [(0, True), (4, True), (5, False), (-1, False)])
def test_whether_something_keeps_the_clock(
    answer: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: List[int] = []

    def adjtimex(timex: Any) -> int:
        sizes.append(len(timex))
        assert bytes(timex) == bytes(len(timex)), "modes is 0: only read"
        return answer

    monkeypatch.setattr(room, "libc", lambda: SimpleNamespace(adjtimex=adjtimex))
    assert is_synchronised() == kept and sizes[0] >= 208
    monkeypatch.setattr(room, "libc", lambda: None)
    assert not is_synchronised()


def test_when_models_were_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("https://hub", "o/m", "main", "o/m", "a" * 40, fetched_at="2026-01-01T00:00:00")
    for name, of in (("b", source), ("a", source), ("c", None), ("d", source)):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, make_manifest(name, [], of))
    (tmp_path / "empty").mkdir()
    (tmp_path / "d/.hfship/manifest.json").write_text("{")
    when = "2026-01-01T00:00:00"
    assert fetched_times(tmp_path) == [("a", when), ("b", when)]
    monkeypatch.setattr(room, "MOST_MANIFESTS", 1)
    assert fetched_times(tmp_path) == [("a", when)]
    assert fetched_times(tmp_path / "gone") == []


# -- docker


class Docker:
    """What `docker` answers, by its first words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
        self.answers = answers
        monkeypatch.setattr(room, "docker", self)
        monkeypatch.setattr(room.shutil, "which", lambda name: f"/bin/{name}")

    def __call__(self, arguments: Any, doing: str, limit_s: float) -> str:
        """A line."""
        assert 0 < limit_s < room.DOCKER_PROBE_S and doing
        answer = self.answers[arguments[0]]
        if isinstance(answer, Exception):
            raise answer
        return f" {answer}\n"


@pytest.mark.parametrize(
    ("version", "root", "free", "state", "text"),
    [
        ("28.5.2", True, LITTLE_IMAGE_ROOM, "ok", "engine 28.5.2; 32.2 GB free for images in "),
        ("20.10.5", True, LITTLE_IMAGE_ROOM, "ok", "engine 20.10.5; 32.2 GB free for images in "),
        ("20.9", True, LITTLE_IMAGE_ROOM, "warn", "engine 20.9; 32.2 GB free for images in "),
        ("28.5", True, LITTLE_IMAGE_ROOM - 1, "warn", "engine 28.5; 32.2 GB free for images in "),
        ("28.5", False, 1, "ok", "engine 28.5"),
    ],
)
def test_the_engine_of_docker_and_its_room(
    version: str,
    root: bool,
    free: int,
    state: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path if root else tmp_path / "of another machine"
    Docker(monkeypatch, version=version, info=str(folder))
    monkeypatch.setattr(room, "free_bytes", lambda path: {folder: free}[path])
    found = asked(probe_engine)
    where = str(folder) if root else ""
    old = "; older than 20.10" if version == "20.9" else ""
    assert found[:2] == (state, f"{text}{where}{old}")
    if state == "warn":
        assert ("update docker" if old else "docker image prune") in found[3]


def test_a_docker_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "which", lambda _: None)
    assert asked(probe_engine)[:2] == ("fail", "docker is not installed")


@pytest.mark.parametrize(
    ("what", "why"), [("cannot use docker: it is off", ""), ("it is off", "its own words")]
)
def test_a_cause_that_is_known_is_told_alone(
    what: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Docker(monkeypatch, version=HostError(what, "its own words", "start it"))
    assert asked(probe_engine) == ("fail", what, why, "start it")


@pytest.mark.parametrize(
    ("version", "state", "text"),
    [("2.0.0", "ok", "plugin 2.0.0"), ("1.29", "warn", "plugin 1.29 is older than 2.0")],
)
def test_the_compose_plugin(
    version: str, state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Docker(monkeypatch, compose=version)
    assert asked(probe_compose)[:2] == (state, text)


# -- GPUs and images


def test_gpus_of_a_kind_are_counted_together() -> None:
    other = Gpu(2, "GPU-c", "NVIDIA L4", 24 * GIB, 0, (8, 9), "535.1")
    assert gpus_text([GPU, other, GPU]) == (
        "2 x NVIDIA H100, 85.9 GB, compute capability 9.0; "
        "1 x NVIDIA L4, 25.8 GB, compute capability 8.9; driver 535.1"
    )
    assert gpus_text([Gpu(0, "a", "b", 1)]).endswith("driver unknown")


@pytest.mark.parametrize(
    ("image", "state", "text"),
    [
        (Image("a:1"), "ok", "a:1: an unknown vLLM"),
        (Image("a:1", version=(0, 11, 0), cuda="12.8"), "ok", "a:1: vLLM 0.11.0, CUDA 12.8"),
        (
            Image("a:1", version=(0, 11, 0), cuda="13.0", cpu=True),
            "ok",
            "a:1: vLLM 0.11.0, for the CPU",
        ),
        (
            Image("a:1", version=(0, 11, 0), cuda="13.0"),
            "warn",
            "a:1: vLLM 0.11.0, CUDA 13.0, which needs driver 580; here is 535.1, 570.2",
        ),
    ],
)
def test_an_image_and_the_driver_that_it_needs(
    image: Image, state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "read_image", lambda given: {Image("x"): image}[given])
    drivers = ["570.2", "535.1", "", "580.0", "570.2"]
    gpus = [Gpu(0, "a", "b", 1, driver=driver) for driver in drivers]
    found = asked(lambda: probe_image(Image("x"), gpus))
    assert found[:2] == (state, text) and bool(found[3]) == (state == "warn")
    assert asked(lambda: probe_image(Image("x"), []))[0] == "ok"


BOTH, CDI = ["--gpus", "all"], ["--device", "nvidia.com/gpu=all"]


@pytest.mark.parametrize(
    ("refused", "state", "text"),
    [
        ({}, "ok", "a container sees 2 GPUs by the NVIDIA runtime"),
        ({"--gpus": "odd"}, "warn", "a container sees 2 GPUs by CDI alone: odd"),
        ({"--gpus": "odd", "--device": "x"}, "fail", "no GPU comes into a container: odd"),
    ],
)
def test_how_gpus_come_into_a_container(
    refused: Dict[str, str], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image("a:1")

    def attempt(given: Image, options: List[str], count: int) -> str:
        assert given is image and count == 2 and options in (BOTH, CDI)
        return refused.get(options[0], "")

    monkeypatch.setattr(room, "try_gpus", attempt)
    monkeypatch.setattr(room, "explain", lambda said, _: ("", "") if said == "odd" else None)
    found = asked(lambda: probe_runtime(image, 2))
    assert found[:2] == (state, text)
    assert (
        found[3]
        == {
            "ok": "",
            "warn": "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker",
            "fail": "docker run --gpus all",
        }[state]
    )
    monkeypatch.setattr(room, "explain", lambda *_: ("known", "do it"))
    if state == "fail":
        told = ("fail", "no GPU comes into a container: known", "", "do it")
        assert asked(lambda: probe_runtime(image, 2)) == told


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (Completed(0, "GPU 0: a\nGPU 1: b\n", ""), ""),
        (Completed(0, "GPU 0: a\n", ""), "it sees 1 of 2 GPUs"),
        (Completed(0, "a GPU 0: a\n", ""), "it sees 0 of 2 GPUs"),
        (Completed(1, "GPU 0: a\nGPU 1: b\n", "no\n"), "no\nGPU 0: a\nGPU 1: b"),
        (Completed(125, "", ""), "docker run ended with 125"),
        (Completed(1, "", "x" + "y" * 300), "y" * 300),
        (HostError("what", "why", ""), "why"),
    ],
)
def test_what_a_container_sees(done: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: List[Any] = []

    def run(argv: List[str], timeout_s: float) -> Completed:
        ran.append(argv)
        assert 0 < timeout_s < room.TRIAL_S
        if isinstance(done, Exception):
            raise done
        return done

    monkeypatch.setattr(room, "run_program", run)
    assert try_gpus(Image("a:1", "sha256:1"), BOTH, 2) == said
    assert try_gpus(Image("a:1"), BOTH, 2) == said
    run_words = "docker run --rm --network none --pull never --gpus all --entrypoint nvidia-smi"
    assert [" ".join(argv) for argv in ran] == [f"{run_words} sha256:1 -L", f"{run_words} a:1 -L"]


OURS = Holder("GPU-a", 7, "python3", GIB, "hfship-m-vllm-1")
CONTAINED = Holder("GPU-a", 8, "python3", GIB, "other")
STRANGE = Holder("GPU-a", 9, "train.py", 0)


@pytest.mark.parametrize(
    ("gpu", "holders", "state", "text", "step"),
    [
        ({}, [], "ok", "", ""),
        ({"used": MUCH_MEMORY - 1}, [], "ok", "", ""),
        (
            {"used": MUCH_MEMORY},
            [],
            "warn",
            "by no process that can be seen",
            "nvidia-smi, as root",
        ),
        ({"used": GIB}, [OURS], "ok", "the container hfship-m-vllm-1, 1.1 GB", ""),
        (
            {},
            [OURS, CONTAINED],
            "warn",
            "hfship-m-vllm-1, 1.1 GB; the container other",
            "docker stop other",
        ),
        ({}, [STRANGE], "warn", "train.py (process 9)", "stop what is not needed: kill 9"),
        ({"mig": True}, [STRANGE], "warn", "MIG is enabled", "nvidia-smi -mig 0"),
    ],
    ids=str,
)
def test_who_holds_the_memory_of_a_gpu(
    gpu: Dict[str, Any], holders: List[Holder], state: str, text: str, step: str
) -> None:
    values = {**vars(GPU), **gpu}
    found = asked(lambda: probe_memory(Gpu(**values), holders, ["hfship-m-vllm-1"]))
    assert found[0] == state and text in found[1] and step in found[3]
    assert " of 85.9 GB in use" in found[1] and bool(found[3]) == bool(step)


# -- ports


def plans(**ports: int) -> Any:
    return [SimpleNamespace(name=name, port=port) for name, port in ports.items()]


OTHER = Listener(8000, 7, "nginx")


@pytest.mark.parametrize(
    ("ports", "listening", "state", "text"),
    [
        ({}, [], "ok", "the next deployment gets 8000"),
        ({"m": 8000, "n": 0}, [], "ok", "the next deployment gets 8001; taken: 8000 m"),
        ({"n": 8001, "m": 8000}, [], "ok", "gets 8002; taken: 8000 m, 8001 n"),
        ({"m": 8000}, [Listener(8000)], "ok", "gets 8001; taken: 8000 m"),
        ({"m": 8000}, [Listener(8000, 7, "docker-proxy")], "ok", "gets 8001; taken: 8000 m"),
        ({"m": 8000}, [OTHER], "warn", "8000 of m is held by nginx (process 7)"),
        ({}, [OTHER], "ok", "gets 8001; taken: 8000 nginx (process 7)"),
        ({}, [Listener(22, 7, "sshd"), Listener(9000, 7, "x")], "ok", "gets 8000"),
        ({"m": 8001}, [OTHER], "ok", "gets 8002; taken: 8001 m, 8000 nginx (process 7)"),
    ],
    ids=str,
)
def test_which_port_is_free(
    ports: Dict[str, int], listening: List[Listener], state: str, text: str
) -> None:
    found = asked(lambda: ports_text(plans(**ports), {one.port: one for one in listening}))
    assert found[0] == state and found[1].endswith(text)
    assert found[3] == ("stop it, or: hfship serve m --port ANOTHER" if state == "warn" else "")


# -- one after the other


class Machine:
    """A site whose probes answer what is written here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **fields: Any) -> None:
        values: Dict[str, Any] = {
            "probe_engine": lambda: "engine",
            "probe_compose": lambda: "plugin",
            "list_images": lambda wanted: (Image("a:1"), Image("b:1"))[: 2 if wanted == "" else 0],
            "read_host": lambda _: SimpleNamespace(gpus=(GPU,), gpu_problem=""),
            "probe_image": lambda image, gpus: f"{image.reference} {len(gpus)}",
            "probe_runtime": lambda image, count: f"{image.reference} sees {count}",
            "gateway_findings": lambda *_: iter([Finding("gateway", "ok", "g")]),
            "read_holders": lambda _: (OURS, Holder("GPU-b", 1, "x", 1)),
            "container_names": dict,
            "listeners": dict,
            "list_deployments": lambda *_: ([SimpleNamespace(plan=plans(m=8000)[0])], []),
            **fields,
        }
        driver = values.pop("nvidia-smi", "/bin/nvidia-smi")
        for name, value in values.items():
            monkeypatch.setattr(room, name, value)
        monkeypatch.setattr(room.shutil, "which", lambda _: driver)
        self.doctor = SiteDoctor(settings_of(tmp_path), QUIET)

    def found(self) -> Dict[str, Any]:
        """Check and what it told; images one after the other."""
        told: Dict[str, Any] = {}
        for one in self.doctor.findings():
            told.setdefault(one.check, []).append((one.state, one.text))
        return told


def failing(*_: Any) -> Any:
    raise HostError("it is off", "", "")


def test_what_is_found_on_a_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(room, "container_name", lambda name: f"hfship-{name}-vllm-1")
    found = Machine(monkeypatch, tmp_path).found()
    assert found.pop("gpu 0")[0][1].endswith("in use: the container hfship-m-vllm-1, 1.1 GB")
    assert found == {
        "docker": [("ok", "engine")],
        "compose": [("ok", "plugin")],
        "gpu": [("ok", gpus_text([GPU]))],
        "image": [("ok", "a:1 1"), ("ok", "b:1 1")],
        "runtime": [("ok", "a:1 sees 1")],
        "gateway": [("ok", "g")],
        "ports": [("ok", "the next deployment gets 8001; taken: 8000 m")],
    }


def test_where_docker_does_not_answer_its_images_are_not_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch, tmp_path, probe_engine=failing, list_deployments=failing)
    found = machine.found()
    assert list(found) == ["docker", "gpu", "gpu 0", "ports"]
    assert found["docker"] == [("fail", "it is off")]
    assert found["ports"] == [("ok", "the next deployment gets 8000")]


@pytest.mark.parametrize(
    ("fields", "check", "told"),
    [
        ({"list_images": lambda _: ()}, "image", [("fail", "docker has no vLLM image")]),
        (
            {"nvidia-smi": None},
            "gpu",
            [("warn", "no NVIDIA driver here; models can be served on the CPU")],
        ),
        (
            {"read_host": lambda _: SimpleNamespace(gpus=(), gpu_problem="odd")},
            "gpu",
            [("fail", "odd")],
        ),
    ],
)
def test_what_is_not_there_is_told_once(
    fields: Dict[str, Any],
    check: str,
    told: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    found = Machine(monkeypatch, tmp_path, **fields).found()
    assert found[check] == told and "runtime" not in found
    assert ("gpu 0" in found) == (check == "image")


def test_only_so_many_images_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = tuple(Image(f"i:{number}") for number in range(room.MOST_IMAGES + 1))
    found = Machine(monkeypatch, tmp_path, list_images=lambda _: images).found()
    assert len(found["image"]) == room.MOST_IMAGES


def test_memory_is_told_though_nobody_can_be_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = Machine(monkeypatch, tmp_path, read_holders=failing).found()
    assert found["gpu 0"] == [("ok", "0 B of 85.9 GB in use")]


def test_a_folder_that_is_no_folder_is_a_fault_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError):
        probe_folder(SiteFolder("models", tmp_path / "file", "X", True))
