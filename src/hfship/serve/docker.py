# SPDX-License-Identifier: Apache-2.0
"""Docker: every word exchanged with it, and with nvidia-smi.

Promises: what docker answers when it fails is translated where the message is known.
Never: pulls an image; puts a key on a command line.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import re
import subprocess
import time
from functools import lru_cache
from typing import (
    TYPE_CHECKING,
    Any,
    FrozenSet,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)
from urllib.parse import urlsplit

from hfship.base.errors import Exit, HostError
from hfship.base.processes import Aside, Completed, run_program, started
from hfship.base.pyz import own_entry
from hfship.base.text import utc
from hfship.base.values import dataclass, replace
from hfship.serve.files import COMPOSE_FILE, container_name, project_name
from hfship.serve.gpus import NVIDIA_SMI_FIELDS, parse_nvidia_smi, slice_memory, with_slices
from hfship.serve.image_notes import SAYS, note, noted
from hfship.serve.images import image_called, image_that_says, parse_images
from hfship.serve.messages import Container, explain
from hfship.serve.terms import CONTAINER_PORT, IMAGE_SAYS, Host

if TYPE_CHECKING:
    from hfship.base.report import Reporter
    from hfship.serve.deployments import Deployment
    from hfship.serve.terms import Image, Plan

LEAST_ENGINE = (20, 10)  # what compose v2 and device requests for GPUs need
DOCKER_TIMEOUT_S = 60.0
COMPOSE_TIMEOUT_S = 600.0
VERSION_TIMEOUT_S = 120.0  # its layers may lie on a slow disk
IN_IMAGE = "hfship/serve/in_image.py"
STATUS_TIMEOUT_S = 10.0  # a deployment that takes longer for one token is not healthy
MESSAGE_END = 1000  # characters of what docker says that are shown
MODEL_SHARE_OF_RAM = 0.85  # the rest is for all else that runs
_COMPOSE_PROGRESS = re.compile(r"^ *(?:Network|Volume|Container) \S+ +\w+\n?", re.MULTILINE)


def docker(
    arguments: Sequence[str], doing: str, timeout_s: float = DOCKER_TIMEOUT_S, name: str = "MODEL"
) -> str:
    """The output of a docker command. `doing` is what it is for, `name` the model it is about.

    Raises HostError, with the cause where the message is known.
    """
    done = run_program(["docker", *arguments], timeout_s=timeout_s)
    if not done.code:
        return done.out
    raise failure_of(done, arguments, doing, name)


def failure_of(
    done: Completed, arguments: Sequence[str], doing: str, name: str = "MODEL"
) -> HostError:
    """The error for a docker command that failed; the arguments are as of docker()."""
    words = " ".join(arguments[:3])
    shown = f"docker {words} ..."

    what = f"cannot {doing}"
    cause, next_step = explain(done.err + done.out, name)
    if cause:
        what += f": {cause}"

    why = f"{shown} ended with {done.code}"
    message = done.err.strip() or done.out.strip()
    message = _COMPOSE_PROGRESS.sub("", message).strip()
    if message:
        end = message[-MESSAGE_END:]
        why = f"docker says: {end}"

    if not next_step:
        next_step = f"run {shown} by hand"
    return HostError(what, why, next_step)


@dataclass(frozen=True)
class EngineInfo:
    """What docker says of its engine and client: "" and False where it says nothing.

    `devices` are those that it has by CDI alone; none where it has NVIDIA's runtime, which does
    all.
    """

    version: str = ""
    root: str = ""
    devices: FrozenSet[str] = frozenset()
    has_compose: bool = False


def parse_info(text: str) -> EngineInfo:
    """The answer of `docker info`. It lists plugins from 19.03 on, devices from 28.2 on.

    >>> parse_info('{"ServerVersion": "28.5", "DockerRootDir": "/d", "ServerErrors": null}').root
    '/d'
    """
    try:
        info = json.loads(text)
    except ValueError:
        info = None
    if not isinstance(info, dict):
        return EngineInfo()

    version = ""
    if not info.get("ServerErrors"):
        version = _text_in(info, "ServerVersion")
    return EngineInfo(
        version,
        root=_text_in(info, "DockerRootDir"),
        devices=_devices_in(info),
        has_compose="compose" in _plugins_in(info),
    )


def _text_in(info: Mapping[str, Any], name: str) -> str:
    return str(info.get(name) or "")


def _devices_in(info: Mapping[str, Any]) -> FrozenSet[str]:
    if "nvidia" in (info.get("Runtimes") or {}):
        return frozenset()
    rows = info.get("DiscoveredDevices") or ()
    return frozenset(_text_in(row, "ID") for row in rows)


def _plugins_in(info: Mapping[str, Any]) -> FrozenSet[str]:
    """The plugins of the client that work."""
    client = info.get("ClientInfo") or {}
    rows = client.get("Plugins") or ()
    return frozenset(_text_in(row, "Name") for row in rows if not row.get("Err"))


def engine_info() -> EngineInfo:
    """What docker says of itself. That stays as it is, so it is asked once. Raises HostError."""
    return _asked_info(os.environ.get("PATH", ""), os.environ.get("DOCKER_HOST", ""))


@lru_cache(maxsize=None)
def _asked_info(_path: str, _engine: str) -> EngineInfo:
    """Remembered for the client that is found, and the engine that it is to ask."""
    return parse_info(docker(["info", "--format", "{{json .}}"], "use docker"))


def require_docker() -> None:
    """Raise HostError unless engine and compose plugin answer, now."""
    _asked_info.cache_clear()
    info = engine_info()
    if not info.version:  # clients before 23 end with 0 although nobody answers
        docker(["version", "--format", "{{.Server.Version}}"], "use docker")
    if info.has_compose:
        return
    try:
        docker(["compose", "version", "--short"], "use docker compose")
    except HostError as exc:
        raise _without_compose(info.version, exc) from exc


def _without_compose(version: str, error: HostError) -> HostError:
    """The error of a docker without compose: of one too old for the plugin, that it is."""
    if not version or version_numbers(version) >= LEAST_ENGINE:
        return error
    what = f"docker {version} is older than its compose plugin"
    step = "update docker to 20.10 or later, with docker-compose-plugin"
    return HostError(what, error.why, step)


def version_numbers(version: str) -> Tuple[int, ...]:
    """The first two numbers of a version.

    >>> version_numbers("v28.5.2+dfsg"), version_numbers("") < (1,)
    ((28, 5), True)
    """
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def list_images(wanted: str) -> Tuple[Image, ...]:
    """The vLLM images that docker has, and the one that is wanted, whatever it is called.

    Raises HostError when docker does not answer.
    """
    listing = docker(["image", "ls", "--no-trunc", "--format", "{{json .}}"], "list images")
    images = parse_images(listing)
    if not wanted:
        return images

    for image in images:
        if wanted in (image.reference, image.id):
            return images

    try:
        found = inspect_image(wanted)
    except HostError:  # it is not there
        return images

    image_id = str(found["Id"])
    return (*images, image_called(wanted, image_id))


def inspect_image(reference: str) -> Mapping[str, Any]:
    """What docker knows of an image. Raises HostError."""
    doing = f"look at the image {reference}"
    answer = docker(["image", "inspect", reference], doing)
    found: List[Mapping[str, Any]] = json.loads(answer)
    return found[0]


def read_image(image: Image, may_ask: bool = True) -> Image:
    """The image with what docker knows of it. Raises HostError.

    Where the tag tells no version, the image itself is asked, once: that takes a second. `may_ask`
    is False for those who have no second.
    """
    reference = image.reference
    found = inspect_image(reference)
    config = found.get("Config") or {}
    environment = config.get("Env") or []
    cuda = ""
    for item in environment:
        variable, _, value = item.partition("=")
        if variable == "CUDA_VERSION":
            cuda = value

    image_id = str(found["Id"])
    image = replace(image, id=image_id, cuda=cuda)
    if image.version is not None or not may_ask:
        return image
    says = noted(image.id).get(SAYS)
    if not isinstance(says, str):
        says = ask_image(reference)
        if IMAGE_SAYS in says:
            note(image.id, SAYS, says)
    return image_that_says(image, says)


def ask_image(reference: str) -> str:
    """What an image says of itself, "" where it says nothing."""
    program = own_entry(IN_IMAGE).decode("utf-8")
    cut_off = ["--rm", "--network", "none", "--pull", "never", "--cap-drop", "ALL"]
    ask = ["run", *cut_off, "--entrypoint", "python3", reference, "-c", program, "about"]
    with contextlib.suppress(HostError):  # then the plan says that the version is unknown
        return docker(ask, "ask the image for its version", VERSION_TIMEOUT_S)
    return ""


def cdi_devices() -> FrozenSet[str]:
    """The devices that docker has by CDI alone, none where it does not say."""
    with contextlib.suppress(HostError):
        return engine_info().devices
    return frozenset()


def read_host_and_containers(wanted: str) -> Tuple[Host, FrozenSet[str]]:
    """(what this machine offers, the names of the containers that run), asked for at the same time.

    Raises HostError when docker does not answer.
    """
    images = Aside(lambda: list_images(wanted))
    containers = Aside(running_containers)
    devices = Aside(cdi_devices)
    host = read_host(())  # nvidia-smi can take seconds
    whole = replace(host, images=images.result(), cdi=devices.result())
    return whole, containers.result()


def read_host(images: Tuple[Image, ...]) -> Host:
    """What this machine offers.

    Of RAM, a share of all there is: what is free now would change a plan that runs.
    """
    all_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = int(all_memory * MODEL_SHARE_OF_RAM)
    argv = [
        "nvidia-smi",
        f"--query-gpu={NVIDIA_SMI_FIELDS}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = run_program(argv, timeout_s=DOCKER_TIMEOUT_S)
    except HostError as exc:
        return Host((), images, memory, gpu_problem=exc.why)

    gpus = parse_nvidia_smi(done.out)
    if any(gpu.mig for gpu in gpus):
        gpus = with_slices(gpus, ask_nvidia_smi("-L"), slice_memory(ask_nvidia_smi("-q", "-x")))
    said = (done.out + done.err).strip()
    problem = said[:500] or "nothing"
    return Host(gpus, images, memory, gpu_problem=f"nvidia-smi says: {problem}")


def ask_nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi says, "" when it says nothing."""
    with contextlib.suppress(HostError):
        return run_program(["nvidia-smi", *arguments], timeout_s=DOCKER_TIMEOUT_S).out
    return ""


def compose(deployment: Deployment, *arguments: str) -> List[str]:
    """The docker arguments of a compose command.

    The project is named here, too: COMPOSE_PROJECT_NAME in the operator's environment would win
    over the name in the file.
    """
    project = project_name(deployment.plan.name)
    path = deployment.folder / COMPOSE_FILE
    return ["compose", "-p", project, "-f", str(path), *arguments]


def would_restart(deployment: Deployment) -> bool:
    """Whether `docker compose up` would end the container that runs, to start another. Raises
    HostError.

    Its own hash of a service cannot be compared: of `compose config --hash` it is another one than
    in the label of a container as soon as there is an env_file.
    """
    trial = compose(deployment, "--dry-run", "up", "-d")
    done = run_program(["docker", *trial], timeout_s=DOCKER_TIMEOUT_S)
    if done.code:  # a compose that knows no trial
        return inspect_container(deployment.plan.name) is not None
    return "Recreate" in done.out + done.err


def log_arguments(name: str, tail: str) -> List[str]:
    """The docker arguments for the last lines ("all" or a number) of a deployment's container.

    By the name of the container: files of others need not be read for it.
    """
    return ["logs", "--tail", tail, container_name(name)]


@dataclass(frozen=True)
class LogTail:
    """The end of a container's log, and when its last line came (seconds since the epoch, 0: no
    line)."""

    text: str = ""
    last_at: float = 0.0


def read_log(name: str, lines: int, since: float = 0.0) -> LogTail:
    """The last lines of a deployment's container; none when docker has none.

    `since`: none that came before (seconds since the epoch); 0: all.
    """
    arguments = ["logs", "--timestamps", "--tail", str(lines), container_name(name)]
    if since:
        arguments[1:1] = ["--since", f"{since:.3f}"]
    try:
        done = run_program(["docker", *arguments], timeout_s=DOCKER_TIMEOUT_S)
    except HostError:
        return LogTail()
    if done.code:
        return LogTail()
    return parse_log(done.out, done.err)


def parse_log(*streams: str) -> LogTail:
    """The log in what `docker logs --timestamps` says on its two streams, in the order of time.

    >>> tail = parse_log("1970-01-01T00:00:09.5Z b\\n", "1970-01-01T00:00:01.5Z a\\n")
    >>> tail.text, tail.last_at
    ('a\\nb\\n', 9.0)
    """
    rows = []
    for stream in streams:
        # Not splitlines: a bar that is drawn anew in its place (tqdm) is one line with \\r in it.
        for line in stream.rstrip("\n").split("\n"):
            at, _, text = line.partition(" ")
            if text or at:
                rows.append((at, text))

    rows.sort(key=lambda row: row[0])  # stable: lines of one instant stay as they came
    last_at = 0.0
    with contextlib.suppress(ValueError, IndexError):
        moment = time.strptime(rows[-1][0][:19], "%Y-%m-%dT%H:%M:%S")
        last_at = float(calendar.timegm(moment))
    return LogTail("".join(f"{text}\n" for _, text in rows), last_at)


def log_tail(deployment: Deployment, lines: int) -> str:
    """The last lines of the container's log; "" when docker has none."""
    return read_log(deployment.plan.name, lines).text


def cpu_percent(name: str) -> float:
    """How busy the container of a deployment is, in percent of one core; 0 where docker does not
    say."""
    ask = ["stats", "--no-stream", "--format", "{{.CPUPerc}}", container_name(name)]
    with contextlib.suppress(HostError, ValueError):
        return float(docker(ask, "ask how busy it is").strip().rstrip("%"))
    return 0.0


def lost_its_gpu(name: str) -> bool:
    """Whether a container has lost the GPU that it was given, as after `systemctl daemon-reload`.

    (nvidia-container-toolkit#48: "Failed to initialize NVML: Unknown Error".) An image without
    nvidia-smi tells nothing.
    """
    ask = ["docker", "exec", container_name(name), "nvidia-smi", "-L"]
    with contextlib.suppress(HostError):
        done = run_program(ask, timeout_s=DOCKER_TIMEOUT_S)
        return done.code != 0 and "Failed to initialize NVML" in done.out + done.err
    return False


def stream_logs(
    name: str, follow: bool, tail: str, since: Optional[float], reporter: Reporter
) -> Exit:
    """Copy the container's log, all of it or `since` a time (seconds since the epoch), to stdout,
    redacted, until it ends or the operator stops it."""
    argv = ["docker", *log_arguments(name, tail)]
    if since is not None:
        argv[2:2] = ["--since", utc(since)]
    if follow:
        argv.insert(2, "--follow")
    with started(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            for line in process.stdout or ():
                reporter.result(line.decode("utf-8", "replace").rstrip("\n"))
        except KeyboardInterrupt:
            return Exit.OK  # the way out of --follow
        finally:
            process.terminate()

    if process.returncode > 0:
        return Exit.HOST

    return Exit.OK


def api_address(plan: Plan) -> Tuple[str, int]:
    """Where this machine reaches the API of a deployment: (host, port).

    Behind a gateway that is on docker's own network; ("", 0) while no container has an address
    there.
    """
    if not plan.network:
        address = urlsplit(plan.url)
        return address.hostname or "", address.port or 0

    arguments = ["container", "inspect", container_name(plan.name)]
    try:
        found = json.loads(docker(arguments, "find the container"))[0]
    except HostError:
        return "", 0
    settings = found.get("NetworkSettings", {})
    networks = settings.get("Networks", {})
    network = networks.get(plan.network, {})
    host = network.get("IPAddress", "")
    if not host:
        return "", 0
    return host, CONTAINER_PORT


def direct(plan: Plan) -> Plan:
    """The plan with the address at which this machine reaches its API now, which is then not looked
    up each time."""
    host, port = api_address(plan)
    return replace(plan, network="", bind=host, port=port)


def running_among(names: Iterable[str]) -> FrozenSet[str]:
    """Of these deployments those whose container runs. Raises HostError."""
    containers = {container_name(name): name for name in names}
    if not containers:
        return frozenset()
    running = running_containers()
    return frozenset(name for container, name in containers.items() if container in running)


def running_containers() -> FrozenSet[str]:
    """The names of all containers that run. Raises HostError."""
    ask = ["container", "ls", "--filter", "status=running", "--format", "{{.Names}}"]
    listed = docker(ask, "list containers")
    return frozenset(listed.split())


def inspect_container(name: str) -> Optional[Container]:
    """The container of a deployment, None when there is none. Raises HostError."""
    arguments = ["container", "inspect", container_name(name)]
    done = run_program(["docker", *arguments], timeout_s=DOCKER_TIMEOUT_S)
    if done.code:
        if "no such container" in done.err.lower():
            return None
        raise failure_of(done, arguments, "inspect the container")

    found = json.loads(done.out)[0]
    state = found["State"]
    started = time.strptime(state["StartedAt"][:19], "%Y-%m-%dT%H:%M:%S")  # UTC
    return Container(
        id=found["Id"],
        status=state["Status"],
        exit_code=state["ExitCode"],
        oom_killed=bool(state.get("OOMKilled")),
        restarts=found["RestartCount"],
        started_at=calendar.timegm(started),
        image_id=found["Image"],
    )
