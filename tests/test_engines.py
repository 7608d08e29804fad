# SPDX-License-Identifier: Apache-2.0
"""What engines are asked, and how what they say is read; test_images.py has programs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import pytest

from hfship.base.errors import DiskError, HostError, IntegrityError
from hfship.base.imagefacts import ImageFacts
from hfship.base.processes import Completed
from hfship.hub.registry_protocol import parse_reference
from hfship.serve import engines as room
from hfship.serve.engines import (
    UNPACKED_RATIO,
    EngineState,
    HeldImage,
    UnusedImage,
    ask,
    docker_state,
    engine_state,
    facts_in,
    held_image,
    images_of_docker,
    layers_there,
    load_command,
    longest_start,
    podman_state,
    read_images,
    remove_image,
    require_fitting,
    require_loaded,
    unused_images,
)

CONFIG, MANIFEST, INDEX, OTHER = (f"sha256:{digit * 64}" for digit in "1234")
LAYERS = ("sha256:a", "sha256:b", "sha256:c")
FACTS = ImageFacts("docker.io/org/app:1", INDEX, MANIFEST, CONFIG, LAYERS, "linux/amd64")
CLASSIC = EngineState("docker", "28.5", "amd64")
CONTAINERD = EngineState("docker", "28.5", "amd64", containerd=True)
PODMAN = EngineState("podman", "5.0", "amd64")
CTR = EngineState("ctr", "1.7", "amd64", containerd=True)
HELD = HeldImage(CONFIG, LAYERS)


def inspected(image_id: str = CONFIG, layers: Any = LAYERS, **fields: Any) -> str:
    return json.dumps([{"Id": image_id, "RootFS": {"Layers": list(layers)}, **fields}])


class Programs:
    """Programs that answer what is in the table, and fail for what is not."""

    def __init__(self, answers: Dict[str, str]) -> None:
        self.answers = answers
        self.asked: List[str] = []

    def __call__(self, argv: List[str], timeout_s: Optional[float] = None) -> Completed:
        """A program that is over in time."""
        assert timeout_s == room.ENGINE_TIMEOUT_S
        line = " ".join(argv)
        self.asked.append(line)
        if line in self.answers:
            return Completed(0, self.answers[line], "")
        return Completed(1, "out", "err")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    def answering_to(answers: Dict[str, str]) -> Programs:
        made = Programs(answers)
        monkeypatch.setattr(room, "run_program", made)
        return made

    return answering_to


# -- what is asked


@pytest.mark.parametrize(
    ("argv", "out", "err", "why", "step"),
    [
        (["docker", "info", "--format", "x"], "out", " err\n", "docker says: err", "docker info"),
        (["ctr", "version"], " out\n", " \n", "ctr says: out", "ctr version"),
        (["docker", "image", "ls", "-q"], "", "e\x1b[2J", "docker says: e?[2J", "docker image ls"),
        (
            ["docker", "image", "rm", "x"],
            "",
            "e" * 1001,
            "docker says: " + "e" * 1000,
            "docker image rm",
        ),
    ],
)
def test_what_an_engine_says_is_told(
    argv: List[str], out: str, err: str, why: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "run_program", lambda *_, **__: Completed(1, out, err))
    with pytest.raises(HostError) as told:
        ask(argv, "do it")
    assert told.value.what == "cannot do it" and told.value.why == why
    assert told.value.next_step == f"try it by hand: {step}"
    monkeypatch.setattr(room, "run_program", lambda *_, **__: Completed(0, out, err))
    assert ask(argv, "do it") == out


INFO = {
    "ServerVersion": "28.5.2",
    "Architecture": "aarch64",
    "DockerRootDir": "/var/lib/docker",
    "DriverStatus": [["Backing Filesystem", "extfs"]],
}


def test_which_engine_is_asked_what(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    podman = {
        "host": {"arch": "arm64"},
        "store": {"graphRoot": "/g"},
        "version": {"Version": "5.0"},
    }
    programs(
        {
            "docker info --format {{json .}}": json.dumps(INFO),
            "podman info --format json": json.dumps(podman),
            "ctr version": "Client:\n  Version:  1.6\n\nServer:\n  Version:  1.7.2\n  Revision: x\n",
        }
    )
    assert engine_state("docker") == EngineState("docker", "28.5.2", "arm64", "/var/lib/docker")
    assert engine_state("podman") == EngineState("podman", "5.0", "arm64", "/g")
    for machine, architecture in (("x86_64", "amd64"), ("riscv64", "riscv64")):
        monkeypatch.setattr(
            room.os, "uname", lambda machine=machine: SimpleNamespace(machine=machine)
        )
        assert engine_state("ctr") == EngineState("ctr", "1.7.2", architecture, containerd=True)
    programs({"ctr version": "nothing"})
    assert engine_state("ctr").version == ""


@pytest.mark.parametrize(
    ("host", "folder"),
    [
        ("", "/var/lib/docker"),
        ("unix:///run/d.sock", "/var/lib/docker"),
        ("ssh://h", ""),
        ("tcp://h", ""),
    ],
)
def test_room_is_looked_at_only_on_this_machine(
    host: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    assert docker_state(json.dumps(INFO)).folder == folder


def test_docker_has_containerds_store_where_it_says_so() -> None:
    status = [["driver-type", "io.containerd.snapshotter.v1"]]
    assert docker_state(json.dumps({**INFO, "DriverStatus": status})).containerd
    assert not docker_state(json.dumps(INFO)).containerd
    assert docker_state("{}") == EngineState("docker", "", "", "")
    assert podman_state('{"host": null}') == EngineState("podman", "", "", "")


@pytest.mark.parametrize("text", ["", "[]", "x" * 300])
def test_what_is_no_answer_is_told(text: str) -> None:
    for read, what in ((docker_state, "docker info"), (podman_state, "podman info")):
        with pytest.raises(HostError) as told:
            read(text)
        assert told.value.what == f"{what} gives no answer that can be read"
        assert told.value.why == text[:200] and told.value.next_step == f"try {what}"


def test_an_engine_that_says_why_it_does_not_answer() -> None:
    with pytest.raises(HostError) as told:
        docker_state('{"ServerErrors": ["no\\u001b[2J"]}')
    assert (told.value.what, told.value.why) == ("docker does not answer", "no?[2J")


@pytest.mark.parametrize(
    ("state", "whole"), [(CLASSIC, False), (CONTAINERD, True), (PODMAN, True), (CTR, True)], ids=str
)
def test_only_dockers_classic_store_does_without_layers_that_it_has(
    state: EngineState, whole: bool, programs: Any
) -> None:
    programs({LIST: "sha256:x", "docker image inspect sha256:x": inspected(OTHER, LAYERS[:2])})
    assert state.keeps_whole == whole
    assert layers_there(state, FACTS) == (0 if whole else 2)


# -- what fits


@pytest.mark.parametrize(
    ("platform", "here", "force", "fits"),
    [
        ("linux/amd64", "amd64", False, True),
        ("linux/arm64/v8", "arm64", False, True),
        ("linux/amd64", "", False, True),
        ("linux/amd64", "arm64", False, False),
        ("linux/amd64", "arm64", True, True),
    ],
)
def test_an_image_is_for_this_machine_or_insisted_on(
    platform: str, here: str, force: bool, fits: bool
) -> None:
    facts = ImageFacts("docker.io/org/app:1", INDEX, MANIFEST, CONFIG, LAYERS, platform)
    state = EngineState("docker", "28.5", here)
    if fits:
        require_fitting(state, facts, 1 << 60, force)
        return
    with pytest.raises(HostError) as told:
        require_fitting(state, facts, 1 << 60, force)
    assert told.value.what == "org/app:1 is for linux/amd64, this machine is arm64"
    assert "--platform linux/arm64" in told.value.next_step


@pytest.mark.parametrize(("more", "fits"), [(0, True), (-1, False)])
def test_room_is_for_what_comes_and_what_is_made_of_it(
    more: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: List[Path] = []
    size = 1000
    needed = int(size * (1 + UNPACKED_RATIO))

    def free(folder: Path) -> int:
        looked.append(folder)
        return needed + more

    monkeypatch.setattr(room, "free_bytes", free)
    state = EngineState("docker", "28.5", "amd64", str(tmp_path))
    if fits:
        require_fitting(state, FACTS, size, force=False)
    else:
        with pytest.raises(DiskError, match=f"docker has no room for org/app:1: {tmp_path}"):
            require_fitting(state, FACTS, size, force=True)
    gone = EngineState("docker", "28.5", "amd64", str(tmp_path / "gone"))
    require_fitting(gone, FACTS, size, force=False)
    assert looked == [tmp_path]


# -- what is there


@pytest.mark.parametrize(
    ("held", "is_it"),
    [
        (HELD, True),
        (HeldImage(MANIFEST, LAYERS), True),
        (HeldImage(INDEX, ()), True),
        (HeldImage(OTHER, LAYERS), False),
        (HeldImage(OTHER, ()), False),
        (HeldImage(CONFIG, LAYERS[:2]), False),
    ],
)
def test_an_image_is_known_by_its_layers_and_its_id(held: HeldImage, is_it: bool) -> None:
    assert held.is_image(FACTS) == is_it


def test_images_are_read_as_engines_tell_them() -> None:
    digests = ["org/app@sha256:1", "sha256:2"]
    (image,) = read_images(inspected("ab", RepoDigests=digests))
    assert image == HeldImage("sha256:ab", LAYERS, ("sha256:1", "sha256:2"))
    for text in ("", "{}", "[]", '["a"]', '[{"Id": "a"}]', '[{"Id": "a", "RootFS": null}]'):
        assert read_images(text) == ()
    (image,) = read_images(json.dumps([7, {}, *json.loads(inspected(RepoDigests=None))]))
    assert image == HELD


def test_an_image_is_asked_for_by_its_name(programs: Any) -> None:
    name = FACTS.reference
    for state in (CLASSIC, PODMAN):
        programs({f"{state.name} image inspect {name}": inspected()})
        assert held_image(state, name) == HELD
        programs({f"{state.name} image inspect {name}": "nothing"})
        assert held_image(state, name) is None
        programs({})
        assert held_image(state, name) is None


CTR_LIST = f"""REF                 TYPE   DIGEST  SIZE   PLATFORMS
docker.io/org/app:12 x     {OTHER} 1 MiB  linux/amd64
docker.io/org/app:1
docker.io/org/app:1 x      {INDEX} 1 MiB  linux/amd64
"""


def test_ctr_tells_a_digest(programs: Any) -> None:
    line = f"ctr images ls name=={FACTS.reference}"
    programs({line: CTR_LIST})
    assert held_image(CTR, FACTS.reference) == HeldImage(INDEX, ())
    programs({line: f"{FACTS.reference} x {INDEX}\n"})
    assert held_image(CTR, FACTS.reference) is None, "the first line is a head"
    programs({})
    with pytest.raises(HostError, match="cannot ask containerd for its images"):
        held_image(CTR, FACTS.reference)


LIST = "docker image ls -aq --no-trunc"


def test_all_images_of_docker_are_looked_at_once_each(programs: Any) -> None:
    asked = programs({LIST: "b a\nb\n", "docker image inspect b a": inspected()})
    assert images_of_docker() == (HELD,) and len(asked.asked) == 2
    asked = programs({LIST: "\n"})
    assert images_of_docker() == () and asked.asked == [LIST]


@pytest.mark.parametrize(
    ("chains", "count"),
    [
        ([("a", "b", "x")], 2),
        ([("a", "b", "c", "d")], 3),
        ([("a", "x", "c")], 1),
        ([("b", "c")], 0),
        ([("a", "b"), ("a",), ()], 2),
        ([("a",), ("a", "b", "c")], 3),
        ([], 0),
    ],
)
def test_how_many_layers_are_there_from_the_first_on(chains: Any, count: int) -> None:
    assert longest_start(chains, ["a", "b", "c"]) == count


ROW: Dict[str, Any] = {
    "Id": CONFIG,
    "Os": "linux",
    "Architecture": "arm64",
    "Variant": "v8",
    "RepoDigests": [f"org/other@{OTHER}", f"org/app@{INDEX}"],
    "RootFS": {"Layers": list(LAYERS)},
}


@pytest.mark.parametrize(
    ("fields", "digest", "platform"),
    [
        ({}, INDEX, "linux/arm64/v8"),
        ({"Variant": ""}, INDEX, "linux/arm64"),
        ({"RepoDigests": None}, "", "linux/arm64/v8"),
        ({"RepoDigests": [f"org/other@{OTHER}"]}, "", "linux/arm64/v8"),
    ],
)
def test_what_docker_knows_of_an_image(fields: Dict[str, Any], digest: str, platform: str) -> None:
    found = facts_in({**ROW, **fields}, parse_reference("docker://org/app:1"))
    assert found == ImageFacts("docker.io/org/app:1", digest, "", CONFIG, LAYERS, platform)


# -- what nobody uses


def test_images_that_no_container_uses(programs: Any) -> None:
    containers = "docker container inspect --format {{.Image}} c1 c2"
    looked = {
        "docker image ls -q --no-trunc": "sha256:used\nsha256:a\nsha256:a\nsha256:b\n",
        "docker ps -aq --no-trunc": "c1\nc2\n",
        containers: "sha256:used\n",
        "docker image inspect sha256:a": '[{"RepoTags": ["x:1", "y:\\u001b1"], "Size": 7}]',
        "docker image inspect sha256:b": '[{"RepoTags": []}]',
    }
    programs(looked)
    unused = [UnusedImage("sha256:a", "x:1, y:?1", 7), UnusedImage("sha256:b", "sha256:b", 0)]
    assert unused_images() == unused
    long = "sha256:" + "c" * 64
    asked = programs(
        {
            "docker image ls -q --no-trunc": long,
            "docker ps -aq --no-trunc": "",
            f"docker image inspect {long}": "[{}]",
        }
    )
    assert unused_images() == [UnusedImage(long, "sha256:cccccccccccc", 0)]
    assert containers not in asked.asked


def test_an_image_is_removed_with_all_its_names(programs: Any) -> None:
    asked = programs({"docker image rm -f sha256:a": ""})
    remove_image("sha256:a")
    assert len(asked.asked) == 1
    with pytest.raises(HostError, match="cannot remove an image of docker"):
        remove_image("sha256:b")


# -- what was loaded


@pytest.mark.parametrize(
    ("state", "command"),
    [(CLASSIC, "docker load -q"), (PODMAN, "podman load -q"), (CTR, "ctr images import -")],
    ids=str,
)
def test_how_an_engine_takes_an_image(state: EngineState, command: str) -> None:
    assert " ".join(load_command(state)) == command


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({f"docker image inspect {FACTS.reference}": inspected()}, ""),
        ({"docker image inspect org/app:1": inspected()}, ""),
        ({}, "docker has no org/app:1 although it took it"),
        (
            {f"docker image inspect {FACTS.reference}": inspected(OTHER)},
            "docker has another image as org/app:1 than it was sent",
        ),
    ],
)
def test_what_is_there_then_is_proven(answers: Dict[str, str], error: str, programs: Any) -> None:
    programs(answers)
    if not error:
        assert require_loaded(CLASSIC, FACTS) == HELD
        return
    with pytest.raises(IntegrityError) as told:
        require_loaded(CLASSIC, FACTS)
    assert told.value.what == error
    if "another" in error:
        assert told.value.why == f"it has {OTHER}, sent was {CONFIG}"


def test_ctr_is_asked_by_the_full_name_alone(programs: Any) -> None:
    asked = programs({f"ctr images ls name=={FACTS.reference}": "REF\n"})
    with pytest.raises(IntegrityError, match="ctr has no org/app:1"):
        require_loaded(CTR, FACTS)
    assert len(asked.asked) == 1
