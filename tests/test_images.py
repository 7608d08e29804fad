"""Images across the gap: pack, delta by layer, and unpack into docker, podman and containerd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import pytest

from conftest import Program, missing, program
from hfship.base.errors import HostError
from hfship.serve.engines import (
    EngineState,
    ask,
    docker_state,
    longest_start,
    read_images,
    read_inspect,
)
from support import components
from support.registry import FaultRegistry, Image, layer_of, make_image, noise, small_image

TINI = Path("/usr/bin/tini-static")  # a program without libraries, to run
MB = 1_000_000


class Carried(NamedTuple):
    """Image folders of two versions that share their first layer, and their archives."""

    host: str
    first: Image
    second: Image
    folder: Path  # app_1, app_2
    archive: Path  # of app_1
    delta: Path  # of app_2 since app_1
    arm: Path  # an archive of app_1 for another machine


@pytest.fixture(scope="session")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """Fetched from a registry on loopback, and packed."""
    root = tmp_path_factory.mktemp("carried")
    hfship = program("source", root / "home")
    content = TINI.read_bytes() if TINI.exists() else b"nothing to run"
    base = layer_of({"bin/tini": content, "noise": noise(3 * MB)})
    command = ["/bin/tini", "--version"]
    first, second = (
        make_image([base, layer_of({"etc/hello": text})], command=command)
        for text in (b"one", b"two")
    )
    with FaultRegistry() as registry:
        registry.add_index({"amd64": first, "arm64": small_image(architecture="arm64")})
        registry.add(second, tag="2")
        references = [f"docker://{registry.host}/org/app:{tag}" for tag in (1, 2)]
        hfship("fetch", *references, "-o", root / "images", "--platform", "linux/amd64")
        hfship("fetch", references[0], "-o", root / "arm", "--platform", "linux/arm64")
        host = registry.host
    hfship("pack", root / "images/app_1", "-o", root / "packed")
    hfship("pack", root / "images/app_2", "-o", root / "packed", "--since", root / "images/app_1")
    hfship("pack", root / "arm/app_1", "-o", root / "packed-arm")
    packed = root / "packed"
    return Carried(
        host,
        first,
        second,
        root / "images",
        packed / "app_1.tar.zst",
        packed / "app_2.delta.tar.zst",
        root / "packed-arm/app_1.tar.zst",
    )


# ---- what is packed


def test_layers_are_stored_and_a_delta_has_the_new_ones_alone(carried: Carried) -> None:
    size = sum(map(len, carried.first.blobs.values()))
    assert size < carried.archive.stat().st_size < size + 50_000
    assert carried.delta.stat().st_size < 50_000


@pytest.mark.parametrize("options", [[], ["--split", "2300k"]])
def test_an_archive_of_an_image_is_proven_cut_and_restored_like_any_other(
    options: List[str], carried: Carried, tmp_path: Path
) -> None:
    hfship = program("source", tmp_path / "home")
    hfship("pack", carried.folder / "app_1", "-o", tmp_path, *options)
    (archive,) = tmp_path.glob("app_1.tar.zst" + (".0001" if options else ""))
    hfship("verify", archive)
    hfship("unpack", archive, "-o", tmp_path / "far")
    ours = {p.name: p.read_bytes() for p in (tmp_path / "far/app_1").rglob("*") if p.is_file()}
    theirs = {p.name: p.read_bytes() for p in (carried.folder / "app_1").rglob("*") if p.is_file()}
    assert {name: ours[name] for name in theirs if name in ours and len(name) == 64} == {
        name: content for name, content in theirs.items() if len(name) == 64
    }
    hfship("verify", tmp_path / "far/app_1")


# ---- a docker that is played

STUB = """#!/usr/bin/env python3
import json, os, sys, time
state = os.environ["STUB"]
def read(name):
    path = os.path.join(state, name)
    return open(path).read() if os.path.exists(path) else ""
words = sys.argv[1:]
if words[:1] == ["info"]:
    print(read("info")); sys.exit(0)
if words[:2] == ["image", "ls"]:
    print(read("ids")); sys.exit(0)
if words[:2] == ["image", "inspect"]:
    found = read("loaded") if words[2] != "sha256:old" else read("old")
    print(found); sys.exit(0 if found else 1)
if words[:1] == ["ps"]:
    print(read("containers")); sys.exit(0)
if words[:2] == ["container", "inspect"]:
    print("sha256:used"); sys.exit(0)
if words[:2] == ["image", "rm"]:
    open(os.path.join(state, "removed"), "a").write(words[-1]); sys.exit(0)
if words[:1] == ["load"]:
    open(os.path.join(state, "started"), "w").close()
    with open(os.path.join(state, "tar"), "wb") as out:
        while True:
            piece = sys.stdin.buffer.read(1 << 16)
            if not piece:
                break
            out.write(piece)
            time.sleep(float(read("slow") or 0))
            if read("full"):
                print("write /layer.tar: no space left on device", file=sys.stderr); sys.exit(1)
    if read("said"):
        print(read("said"), file=sys.stderr); sys.exit(1)
    content = open(os.path.join(state, "tar"), "rb").read()
    if content[-1024:] != bytes(1024):
        print("unexpected EOF"); sys.exit(1)
    open(os.path.join(state, "loaded"), "w").write(read("then"))
"""


class PlayedDocker:
    """Answers of a docker, as files; `tar` is what it was sent."""

    def __init__(self, folder: Path, image: Image) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/docker").write_text(STUB)
        (folder / "bin/docker").chmod(0o755)
        root = folder / "root"
        root.mkdir()
        info = {"ServerVersion": "28", "Architecture": "x86_64", "DockerRootDir": str(root)}
        self.set("info", json.dumps(info))
        self.set("then", inspected(image))

    def set(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @property
    def env(self) -> Dict[str, str]:
        return {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "STUB": str(self.folder)}

    @property
    def members(self) -> List[str]:
        with tarfile.open(self.folder / "tar") as tar:
            return tar.getnames()


def inspected(image: Image, image_id: str = "") -> str:
    row = {"Id": image_id or image.config, "RootFS": {"Layers": image.diff_ids}}
    return json.dumps([row])


@pytest.fixture
def docker(tmp_path: Path, carried: Carried) -> PlayedDocker:
    return PlayedDocker(tmp_path / "docker", carried.first)


@pytest.fixture
def hfship(tmp_path: Path) -> Program:
    return program("source", tmp_path / "home")


def test_what_docker_gets_is_a_tar_with_all_blobs_and_no_more(
    hfship: Program, docker: PlayedDocker, carried: Carried
) -> None:
    (row,) = json.loads(hfship("unpack", carried.archive, "--json", env=docker.env).stdout)
    assert row["state"] == "loaded" and row["image_id"] == carried.first.config
    names = {name.rpartition("/")[2] for name in docker.members}
    blobs = {name[7:] for name in (*carried.first.blobs, carried.first.digest)}
    assert blobs | {"manifest.json", "index.json", "oci-layout"} <= names
    assert len(names) == len(blobs) + 4, "and the index"
    again = json.loads(hfship("unpack", carried.archive, "--json", env=docker.env).stdout)
    assert again[0]["state"] == "already there"


def test_layers_that_docker_has_are_not_sent(
    hfship: Program, docker: PlayedDocker, carried: Carried
) -> None:
    docker.set("ids", "sha256:old")
    docker.set("old", inspected(carried.first))
    docker.set("then", inspected(carried.second))
    (row,) = json.loads(hfship("unpack", carried.delta, "--json", env=docker.env).stdout)
    assert row["layers_sent"] == 1 and row["bytes_sent"] < 50_000
    assert not any(carried.first.layers[0][7:] in name for name in docker.members)


def test_a_delta_takes_the_other_layers_from_a_folder(
    hfship: Program, docker: PlayedDocker, carried: Carried
) -> None:
    docker.set("then", inspected(carried.second))
    hfship("unpack", carried.delta, "--base", carried.folder / "app_1", env=docker.env)
    assert any(carried.first.layers[0][7:] in name for name in docker.members)


# name -> (answers of docker, archive, more words, exit code, words of the message)
BAD: Dict[str, Tuple[Dict[str, str], str, List[str], int, str]] = {
    "another image then": (
        {"then": '[{"Id": "sha256:1", "RootFS": {"Layers": ["x"]}}]'},
        "archive",
        [],
        6,
        "another image",
    ),
    "no image then": ({"then": ""}, "archive", [], 6, "although it took it"),
    "full on the way": ({"full": "1"}, "archive", [], 7, "no space left on device"),
    "zstd and an old docker": (
        {"said": "Error processing tar file(exit status 1): archive/tar: invalid tar header"},
        "archive",
        [],
        9,
        "update docker, if it is older than 23",
    ),
    "another machine": ({}, "arm", [], 9, "is for linux/arm64, this machine is amd64"),
    "no answer": ({"info": ""}, "archive", [], 9, "no answer that can be read"),
    "errors": (
        {"info": '{"ServerErrors": ["Cannot connect"]}'},
        "archive",
        [],
        9,
        "Cannot connect",
    ),
    "delta alone": ({}, "delta", [], 5, "--base DIR"),
    "no base": ({}, "delta", ["--base", "."], 5, "has no manifest"),
}


@pytest.mark.parametrize("name", BAD)
def test_unpack_refuses(
    name: str, hfship: Program, docker: PlayedDocker, carried: Carried, tmp_path: Path
) -> None:
    answers, archive, words, code, said = BAD[name]
    for file, text in answers.items():
        docker.set(file, text)
    place = getattr(carried, archive)
    done = hfship("unpack", place, *words, env=docker.env, code=code, cwd=tmp_path)
    assert said in done.stderr


def test_room_is_asked_for_before_the_load(
    hfship: Program, docker: PlayedDocker, carried: Carried, small_disk: Any
) -> None:
    info = json.loads((docker.folder / "info").read_text())
    info["DockerRootDir"] = str(small_disk(4))
    docker.set("info", json.dumps(info))
    done = hfship("unpack", carried.archive, env=docker.env, code=7)
    assert "has no room" in done.stderr and not (docker.folder / "started").exists()


def test_what_is_advised_to_try_by_hand_is_a_whole_command(tmp_path: Path) -> None:
    with pytest.raises(HostError) as found:
        ask(["false", "info", "--format", "{{json .}}"], "use docker")
    assert found.value.next_step == "try it by hand: false info"


def test_without_an_engine_it_is_said(hfship: Program, carried: Carried, tmp_path: Path) -> None:
    done = hfship("unpack", carried.archive, env={"PATH": str(tmp_path)}, code=9)
    assert "docker is not installed" in done.stderr


def test_a_damaged_archive_loads_nothing(
    hfship: Program, docker: PlayedDocker, carried: Carried, tmp_path: Path
) -> None:
    bad = tmp_path / "app_1.tar.zst"
    content = bytearray(carried.archive.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    done = hfship("unpack", bad, env=docker.env, code=6)
    assert "damaged" in done.stderr and not (docker.folder / "loaded").exists()


def test_a_cut_pipe_loads_nothing(hfship: Program, docker: PlayedDocker, carried: Carried) -> None:
    content = carried.archive.read_bytes()
    process = hfship.start("unpack", "-", env=docker.env, stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.buffer.write(content[: len(content) // 2])
    _, said = process.communicate()
    assert process.returncode == 3 and "ended too early" in said
    assert not (docker.folder / "loaded").exists()
    whole = subprocess.run(
        [*hfship.argv, "unpack", "-"], input=content, env=hfship.env(docker.env), check=False
    )
    assert whole.returncode == 0 and (docker.folder / "loaded").exists()


def test_what_a_scanner_refuses_is_not_loaded(
    hfship: Program, docker: PlayedDocker, carried: Carried, tmp_path: Path
) -> None:
    """The scanners of the site see the files of an image before an engine does."""
    site = tmp_path / "far"
    env = {**docker.env, "HFSHIP_SITE_MODELS_DIR": str(site), "HFSHIP_POLICY_CUSTODY": "true"}
    refuse = {**env, "HFSHIP_POLICY_SCAN": "test ! -e {}/oci-layout"}
    done = hfship("unpack", carried.archive, env=refuse, code=6)
    assert f"{site}/.hfship-scan/app_1: test refuses it" in done.stderr
    assert not (docker.folder / "loaded").exists() and not (site / ".hfship-scan").exists()
    with carried.archive.open("rb") as stream:
        piped = [*hfship.argv, "unpack", "-"]
        code = subprocess.run(piped, stdin=stream, env=hfship.env(refuse), check=False).returncode
    assert code == 2
    hfship("unpack", carried.archive, env={**env, "HFSHIP_POLICY_SCAN": "test -e {}/oci-layout"})
    assert (docker.folder / "loaded").exists() and not (site / ".hfship-scan").exists()
    log = carried.archive.with_name(f"{carried.archive.name}.custody.jsonl").read_text()
    assert '"event":"scanned"' in log and '"exit":0' in log


def test_an_archive_is_consumed_only_once_its_image_is_loaded(
    hfship: Program, docker: PlayedDocker, carried: Carried, tmp_path: Path
) -> None:
    """Not by the scanners' own unpacking, which comes first."""
    archive = tmp_path / "app_1.tar.zst"
    shutil.copy(carried.archive, archive)
    env = {**docker.env, "HFSHIP_SITE_MODELS_DIR": str(tmp_path / "far")}
    command = ("unpack", archive, "--consume")
    hfship(*command, env={**env, "HFSHIP_POLICY_SCAN": "false {}"}, code=6)
    assert archive.exists() and not (docker.folder / "loaded").exists()
    seen = f"sh -c 'test -e {archive} && test -e $0/oci-layout' {{}}"
    hfship(*command, env={**env, "HFSHIP_POLICY_SCAN": seen})
    assert (docker.folder / "loaded").exists() and not archive.exists()


def test_a_killed_unpack_loads_nothing_and_runs_again(
    hfship: Program, docker: PlayedDocker, carried: Carried
) -> None:
    docker.set("slow", "0.05")
    process = hfship.start("unpack", carried.archive, env=docker.env)
    until = time.monotonic() + 30
    while not (docker.folder / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.3)
    assert not (docker.folder / "loaded").exists()
    docker.set("slow", "0")
    hfship("unpack", carried.archive, env=docker.env)


# ---- what goes


def test_clean_removes_images_that_were_fetched(hfship: Program, carried: Carried) -> None:
    models = hfship.home / "models"
    shutil.copytree(carried.folder / "app_1", models / "app_1")
    (models / "tiny").mkdir()
    (models / "tiny/config.json").write_text("{}")
    shown = json.loads(hfship("clean", "--images", "--dry-run", "--json").stdout)
    assert [row["where"] for row in shown["leftovers"]] == [str(models / "app_1")]
    assert hfship("clean", "--images", code=2).stderr and (models / "app_1").exists()
    assert "removed 1 image" in hfship("clean", "--images", "--yes").stdout
    assert not (models / "app_1").exists() and (models / "tiny").exists()


def test_clean_removes_images_of_docker_that_nothing_uses(
    hfship: Program, docker: PlayedDocker
) -> None:
    docker.set("ids", "sha256:used\nsha256:old")
    docker.set("containers", "c1")
    docker.set("old", '[{"Id": "sha256:old", "RepoTags": ["a:1"], "Size": 7}]')
    done = hfship("clean", "--images", "docker", "--yes", "--json", env=docker.env)
    assert json.loads(done.stdout)["freed"] == 7
    assert (docker.folder / "removed").read_text() == "sha256:old"


# ---- what engines answer


def test_answers_of_engines_that_are_none() -> None:
    assert read_inspect("") is None and read_inspect("[]") is None and read_inspect("{}") is None
    assert read_images("no json") == read_images('[{"RootFS": null}]') == ()
    assert longest_start([], ["a"]) == longest_start([()], ["a"]) == 0
    state = docker_state('{"DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]}')
    assert state.containerd and state.keeps_whole
    assert not EngineState("docker", "28", "amd64").keeps_whole
    assert EngineState("podman", "4", "amd64").keeps_whole


# ---- real engines

STORES = {
    "classic": "{}",
    "containerd": '{"features": {"containerd-snapshotter": true}}',
}
# What is run beside a fresh docker; $H is hfship.
SCRIPT = """
set -e
$H unpack {archive} --json > first.json
docker run --rm --network none {host}/org/app:1 > run.txt
$H unpack {archive} --json > again.json
$H unpack {delta} --base {folder}/app_1 --json > second.json
docker run --rm --network none {host}/org/app:2 >> run.txt
docker save {host}/org/app:2 -o saved.tar
cat {archive} | $H unpack - --json > piped.json
docker image inspect {host}/org/app:1 {host}/org/app:2 > inspect.json
if $H unpack {arm}; then exit 1; fi
docker image rm -f {host}/org/app:1 {host}/org/app:2 > removed.txt
export CONTAINERD_ADDRESS=$(ls -t /tmp/with-docker-*/exec/containerd/containerd.sock | head -1)
$H unpack {archive} --engine ctr --json > ctr.json
$H unpack {archive} --engine ctr --json > ctr-again.json
"""


@pytest.mark.alone
@pytest.mark.parametrize("store", STORES)
def test_docker_and_containerd_load_run_and_prove_it(
    store: str, carried: Carried, tmp_path: Path
) -> None:
    components.require("docker")
    if not TINI.exists():
        missing(str(TINI))
    hfship = program("pyz", tmp_path / "home")
    values = {name: str(value) for name, value in carried._asdict().items()}
    script = SCRIPT.format(**values).replace("$H", " ".join(hfship.argv))
    env = hfship.env(
        {
            "HFSHIP_DOCKER_DATA": str(tmp_path / "data"),
            "HFSHIP_DOCKER_SETTINGS": STORES[store],
            "HFSHIP_COMPONENTS": str(components.HOME),
        }
    )
    done = subprocess.run(
        components.with_docker_argv(["sh", "-c", script]),
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert (tmp_path / "run.txt").read_text().count("tini version") == 2
    statuses = [said[name][0]["state"] for name in ("first", "again", "second", "piped")]
    assert statuses == ["loaded", "already there", "loaded", "already there"]
    layers = [row["RootFS"]["Layers"] for row in said["inspect"]]
    assert layers == [carried.first.diff_ids, carried.second.diff_ids]
    ids = [row["Id"] for row in said["inspect"]]
    if store == "classic":
        assert ids == [carried.first.config, carried.second.config]
        assert said["second"][0]["layers_sent"] == 1
    else:
        assert ids[1] == carried.second.digest
        assert said["second"][0]["layers_sent"] == 2
    assert said["ctr"][0]["state"] == "loaded" and said["ctr-again"][0]["state"] != "loaded"


# The first image is larger than the disk of docker, which can be known before; the second unpacks to a thousand times
# its size, which cannot.
NO_ROOM_SCRIPT = """
set +e
for name in large bomb; do
    $H unpack {folder}/app_$name.tar.zst 2> $name.err; echo $? > $name.code
    docker image ls -aq > $name.images
done
ls -A {data}/tmp > tmp
du -s {data} > used
"""


@pytest.mark.alone
def test_docker_without_room_loads_nothing(tmp_path: Path, small_disk: Any) -> None:
    components.require("docker")
    data = small_disk(90)
    hfship = program("pyz", tmp_path / "home")
    images = {
        "large": make_image([layer_of({"noise": noise(30 * MB)})]),
        "bomb": make_image([layer_of({"first": noise(MB)}), layer_of({"zeros": bytes(150 * MB)})]),
    }
    with FaultRegistry() as registry:
        for tag, image in images.items():
            registry.add(image, tag=tag)
            hfship("fetch", f"docker://{registry.host}/org/app:{tag}", "-o", tmp_path)
            hfship("pack", tmp_path / f"app_{tag}", "-o", tmp_path)
    script = NO_ROOM_SCRIPT.format(folder=tmp_path, data=data).replace("$H", " ".join(hfship.argv))
    settings = {"HFSHIP_DOCKER_DATA": str(data), "HFSHIP_COMPONENTS": str(components.HOME)}
    done = subprocess.run(
        components.with_docker_argv(["sh", "-c", script]),
        cwd=tmp_path,
        env=hfship.env(settings),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in images:
        assert (tmp_path / f"{name}.code").read_text() == "7\n"
        assert (tmp_path / f"{name}.images").read_text() == ""
    assert "docker has no room for" in (tmp_path / "large.err").read_text()
    assert f"free space for {data}" in (tmp_path / "bomb.err").read_text()
    assert (tmp_path / "tmp").read_text() == ""
    kilobytes = int((tmp_path / "used").read_text().split()[0])
    assert kilobytes < 1000, "what docker keeps of no image"


def test_podman_loads_it(carried: Carried, tmp_path: Path) -> None:
    if not shutil.which("podman"):
        missing("podman")
    hfship = program("pyz", tmp_path / "home")
    storage = tmp_path / "storage.conf"
    storage.write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{tmp_path}/graph"\nrunroot = "{tmp_path}/run"\n'
    )
    env = {"CONTAINERS_STORAGE_CONF": str(storage)}
    command = ("unpack", carried.archive, "--engine", "podman", "--json")
    (row,) = json.loads(hfship(*command, env=env).stdout)
    assert row["state"] == "loaded" and row["image_id"] == carried.first.config
    (row,) = json.loads(hfship(*command, env=env).stdout)
    assert row["state"] == "already there"
