# SPDX-License-Identifier: Apache-2.0
"""Doctor: the offline side.

Owns the probes of what `unpack` and `serve` need: the folders, docker and its images, GPUs in a
container, who holds their memory, ports, the clock. Each builds on those before it, so that one
cause is told once. Never: pulls, starts or stops anything but a container that ends at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from hfship.base.errors import DiskError, HfshipError, HostError, command_line
from hfship.base.files import existing_ancestor, free_bytes
from hfship.base.listeners import listeners
from hfship.base.manifest import MANIFEST_PATH, read_manifest
from hfship.base.processes import libc, run_program
from hfship.base.report import Reporter
from hfship.base.text import GIB, counted, human_bytes, shorten
from hfship.ops.doctor import probe_disk
from hfship.ops.doctor_gateway import gateway_findings
from hfship.ops.probe import Finding, ProbeWarning, local_probe
from hfship.serve.deployments import list_deployments
from hfship.serve.docker import (
    LEAST_ENGINE,
    docker,
    list_images,
    read_host,
    read_image,
    version_numbers,
)
from hfship.serve.files import container_name
from hfship.serve.holders import container_names, held_text, read_holders, strangers
from hfship.serve.images import capability_text
from hfship.serve.messages import explain
from hfship.serve.plan import PORTS
from hfship.serve.vllm import LEAST_DRIVER, cuda_of
from hfship.serve.vllm_table import version_text

if TYPE_CHECKING:
    from hfship.base.listeners import Listener
    from hfship.base.settings import Settings
    from hfship.serve.holders import Holder
    from hfship.serve.terms import Gpu, Image, Plan

DOCKER_PROBE_S = 15.0
TRIAL_S = 90.0  # the first container of a large image takes long on a slow disk
MOST_IMAGES = 8  # that are looked at, the newest of the list
LEAST_COMPOSE = (2, 0)
LITTLE_IMAGE_ROOM = 30 * GIB  # docker load writes a vLLM image of 20 GB, and needs some to unpack
MUCH_MEMORY = GIB  # of a GPU that is in use: less is what every process with a context has
MOST_MANIFESTS = 50
CLOCK_SLACK_S = 60.0
_TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronised
_TIMEX_SIZE = 512  # bytes; struct timex has 208
_PROXIES = ("docker-proxy", "rootlesskit", "slirp4netns")  # docker's own, for published ports


class SiteFolder(NamedTuple):
    """A folder of the offline side: what it is for, and whether something is written there."""

    name: str
    path: Path
    variable: str
    is_written: bool


def site_folders(settings: Settings) -> List[SiteFolder]:
    """In the order in which a model passes through them."""
    return [
        SiteFolder("packages", settings.transfer_dir, "HFSHIP_TRANSFER_DIR", False),
        SiteFolder("models", settings.site_models_dir, "HFSHIP_SITE_MODELS_DIR", True),
        SiteFolder("deployments", settings.deploy_dir, "HFSHIP_DEPLOY_DIR", True),
    ]


def site_findings(settings: Settings, reporter: Reporter) -> Iterator[Finding]:
    """What the probes of the offline side find."""
    folders = site_folders(settings)
    clock = local_probe("clock", partial(_clock, folders))
    running = []
    for folder in folders:
        look = partial(probe_folder, folder)
        of_folder = local_probe(folder.name, look)
        running.append(of_folder.start())

    running.append(clock.start())
    doctor = SiteDoctor(settings, reporter)
    found = list(doctor.findings())
    for probe in running:
        yield probe.result(reporter)
    yield from found


# ---- folders and clock


def probe_folder(folder: SiteFolder) -> str:
    """Is it there, may we write there, and how much room has it? Raises DiskError, ProbeWarning."""
    path = folder.path
    if os.path.exists(path):
        return _probe_existing(folder)

    parent = existing_ancestor(path)
    if os.access(parent, os.W_OK | os.X_OK):
        return f"{path} is not there yet, and is made when it is needed; {_room(parent)}"
    make = command_line("sudo", "install", "-d", "-o", _user(), path)
    raise DiskError(
        f"{path} is not there, and {parent} may not be written to",
        "",
        f"{make}   or export {folder.variable}=DIR",
    )


def _probe_existing(folder: SiteFolder) -> str:
    path = folder.path
    if not path.is_dir():
        raise DiskError(f"{path} is no folder", "", f"export {folder.variable}=DIR")
    if os.access(path, os.W_OK | os.X_OK):
        return probe_disk(path)

    user = _user()
    room = _room(path)
    text = f"{path} may not be written to by {user}; {room}"
    if not folder.is_written:  # packages are read there
        return text

    own = command_line("sudo", "chown", user, path)
    raise DiskError(
        text,
        "",
        f"{own}   or export {folder.variable}=DIR",
    )


def _room(path: Path) -> str:
    free = free_bytes(path)
    amount = human_bytes(free)
    return f"{amount} free"


def _user() -> str:
    return os.environ.get("USER") or str(os.geteuid())


def _clock(folders: Sequence[SiteFolder]) -> str:
    fetched: List[Tuple[str, str]] = []
    for folder in folders:
        if folder.name == "models":
            fetched = fetched_times(folder.path)
    now = time.time()
    return probe_clock(now, fetched)


def probe_clock(now: float, fetched: Sequence[Tuple[str, str]]) -> str:
    """The time, and whether something keeps it. `fetched`: (model, time in ISO 8601) of the
    connected side, which cannot be still to come. Raises ProbeWarning."""
    in_utc = time.gmtime(now)
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", in_utc)
    soon = time.gmtime(now + CLOCK_SLACK_S)
    latest = time.strftime("%Y-%m-%dT%H:%M:%S", soon)
    for model, when in sorted(fetched, key=_time_of, reverse=True):
        if when > latest:
            text = f"{told} is too early: {model} was fetched at {when}"
            step = "set the clock: timedatectl set-time, chronyc, or from the BIOS"
            raise ProbeWarning(text, step)

    if is_synchronised():
        return f"{told}, synchronised"
    return f"{told}, kept by nothing"


def _time_of(fetched: Tuple[str, str]) -> str:
    _, when = fetched
    return when


def is_synchronised() -> bool:
    """Does the kernel say that something keeps the clock (adjtimex(2))? Nothing is changed."""
    c_library = libc()
    if c_library is None:
        return False
    import ctypes  # a Python that has no ctypes has no libc()

    timex = ctypes.create_string_buffer(_TIMEX_SIZE)  # modes = 0: only read
    return int(c_library.adjtimex(timex)) not in (_TIME_ERROR, -1)


def fetched_times(models: Path) -> List[Tuple[str, str]]:
    """(name, when it was fetched) of models that are here."""
    found: List[Tuple[str, str]] = []
    with contextlib.suppress(OSError):
        for folder in sorted(models.iterdir())[:MOST_MANIFESTS]:
            if not (folder / MANIFEST_PATH).is_file():
                continue
            with contextlib.suppress(HfshipError, OSError):
                manifest = read_manifest(folder)
                if manifest and manifest.source:
                    found.append((folder.name, manifest.source.fetched_at))
    return found


# ---- docker, images, GPUs


class SiteDoctor:
    """Probes of docker and of what it has, each built on those before it."""

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        self._settings = settings
        self._reporter = reporter
        self._images: Tuple[Image, ...] = ()
        self._gpus: Tuple[Gpu, ...] = ()
        self._plans: List[Plan] = []

    def findings(self) -> Iterator[Finding]:
        """What they find; nothing of images where docker does not answer."""
        with contextlib.suppress(HfshipError):
            deployments, _ = list_deployments(self._settings.deploy_dir, Reporter("none", -1))
            self._plans = [deployment.plan for deployment in deployments]

        engine = local_probe("docker", probe_engine, DOCKER_PROBE_S).run(self._reporter)
        yield engine
        answers = engine.state != "fail"
        if answers:
            yield local_probe("compose", probe_compose, DOCKER_PROBE_S).run(self._reporter)
        yield local_probe("gpu", self._probe_gpus, DOCKER_PROBE_S).run(self._reporter)
        if answers:
            yield from self._of_images()
            yield from gateway_findings(self._settings, self._reporter)
        yield from self._of_memory()
        yield local_probe("ports", self._probe_ports).run(self._reporter)

    def _of_images(self) -> Iterator[Finding]:
        listing = local_probe("image", self._probe_images, DOCKER_PROBE_S).run(self._reporter)
        if listing.state != "ok":
            yield listing
        for image in self._images:
            work = partial(probe_image, image, self._gpus)
            yield local_probe("image", work, TRIAL_S).run(self._reporter)
        if self._gpus and self._images:
            work = partial(probe_runtime, self._images[0], len(self._gpus))
            yield local_probe("runtime", work, TRIAL_S).run(self._reporter)

    def _probe_images(self) -> str:
        """Which vLLM images docker has. Raises HostError where there is none."""
        self._images = list_images("")[:MOST_IMAGES]
        if self._images:
            return counted(len(self._images), "vLLM image")
        step = "docker load -i IMAGE.tar, of an image that was saved where there is a network"
        raise HostError("docker has no vLLM image", "", step)

    def _probe_gpus(self) -> str:
        """Which GPUs there are, and their driver. Raises HostError, ProbeWarning."""
        if not shutil.which("nvidia-smi"):
            step = "install the NVIDIA driver, or: hfship serve NAME --device cpu"
            raise ProbeWarning("no NVIDIA driver here; models can be served on the CPU", step)

        host = read_host(())
        self._gpus = host.gpus
        if not host.gpus:
            cause, step = explain(host.gpu_problem, "MODEL")
            raise HostError(cause or host.gpu_problem, "", step or "run nvidia-smi by hand")
        return gpus_text(host.gpus)

    def _of_memory(self) -> Iterator[Finding]:
        """What each GPU has in use, and who holds it."""
        if not self._gpus:
            return
        holders: Tuple[Holder, ...] = ()
        with contextlib.suppress(HostError):
            holders = read_holders(container_names())
        ours = [container_name(plan.name) for plan in self._plans]
        for gpu in self._gpus:
            of_gpu = [holder for holder in holders if holder.gpu == gpu.uuid]
            yield local_probe(
                f"gpu {gpu.index}", partial(probe_memory, gpu, of_gpu, ours)
            ).examine()

    def _probe_ports(self) -> str:
        return ports_text(self._plans, listeners())


def probe_engine() -> str:
    """Docker's engine, and the room where it keeps images. Raises HostError, ProbeWarning."""
    if not shutil.which("docker"):
        raise HostError("docker is not installed", "", "install docker with its compose plugin")

    version = _ask(["version", "--format", "{{.Server.Version}}"], "use docker")
    text = f"engine {version}"
    root = _ask(["info", "--format", "{{.DockerRootDir}}"], "look at docker")
    free = 0
    if os.path.isdir(root):  # not one of another machine
        free = free_bytes(Path(root))
        text += f"; {human_bytes(free)} free for images in {root}"
    if version_numbers(version) < LEAST_ENGINE:
        raise ProbeWarning(f"{text}; older than 20.10", "update docker")
    if 0 < free < LITTLE_IMAGE_ROOM:
        raise ProbeWarning(text, "docker image prune, or a larger disk: a vLLM image needs 20 GB")
    return text


def _ask(arguments: Sequence[str], doing: str) -> str:
    """What docker answers in a line. Raises HostError; where the cause is known, with that alone:
    docker's own words do not fit into a table."""
    try:
        return docker(arguments, doing, DOCKER_PROBE_S / 2).strip()
    except HostError as exc:
        why = exc.why
        if exc.what.startswith(f"cannot {doing}: "):
            why = ""
        raise HostError(exc.what, why, exc.next_step) from exc


def probe_compose() -> str:
    """The compose plugin. Raises HostError, ProbeWarning."""
    version = _ask(["compose", "version", "--short"], "use docker compose")
    if version_numbers(version) < LEAST_COMPOSE:
        raise ProbeWarning(f"plugin {version} is older than 2.0", "install docker-compose-v2")
    return f"plugin {version}"


def gpus_text(gpus: Sequence[Gpu]) -> str:
    """The GPUs of a machine in a line, those of a kind together."""
    kinds: Dict[str, int] = {}
    for gpu in gpus:
        memory = human_bytes(gpu.total)
        capability = capability_text(gpu.capability)
        kind = f"{gpu.name}, {memory}, compute capability {capability}"
        known = kinds.get(kind, 0)
        kinds[kind] = known + 1

    texts = [f"{count} x {kind}" for kind, count in kinds.items()]
    driver = gpus[0].driver or "unknown"
    texts.append(f"driver {driver}")
    return "; ".join(texts)


def probe_image(image: Image, gpus: Sequence[Gpu]) -> str:
    """The versions in an image, and whether the driver is new enough. Raises ProbeWarning,
    HostError."""
    found = read_image(image)
    version = "an unknown vLLM"
    if found.version:
        version = f"vLLM {version_text(found.version)}"
    text = f"{found.reference}: {version}"
    if found.cpu:
        return f"{text}, for the CPU"
    if found.cuda:
        text += f", CUDA {found.cuda}"
    least = LEAST_DRIVER.get(cuda_of(found)[0], 0)
    drivers = {
        gpu.driver for gpu in gpus if gpu.driver and version_numbers(gpu.driver)[:1] < (least,)
    }
    if drivers:
        text += f", which needs driver {least}; here is {', '.join(sorted(drivers))}"
        raise ProbeWarning(text, "update the driver, or load an image of an older CUDA")
    return text


def probe_runtime(image: Image, count: int) -> str:
    """Do the GPUs come into a container, by the NVIDIA runtime or by CDI (Container Device
    Interface)? `serve` asks for the runtime. Raises HostError, ProbeWarning."""
    refused = try_gpus(image, ["--gpus", "all"], count)
    if not refused:
        return f"a container sees {counted(count, 'GPU')} by the NVIDIA runtime"

    cause, step = explain(refused, "MODEL")
    cause = cause or refused
    if not try_gpus(image, ["--device", "nvidia.com/gpu=all"], count):
        text = f"a container sees {counted(count, 'GPU')} by CDI alone: {cause}"
        step = "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
        raise ProbeWarning(text, step)
    raise HostError(f"no GPU comes into a container: {cause}", "", step or "docker run --gpus all")


def try_gpus(image: Image, options: Sequence[str], count: int) -> str:
    """Run nvidia-smi in a container of an image; "" when it sees so many GPUs, else what is said
    instead."""
    argv = ["docker", "run", "--rm", "--network", "none", "--pull", "never", *options]
    argv += ["--entrypoint", "nvidia-smi", image.id or image.reference, "-L"]
    try:
        done = run_program(argv, timeout_s=TRIAL_S / 2)
    except HostError as exc:
        return exc.why
    seen = len(re.findall(r"(?m)^GPU \d+:", done.out))
    if done.code == 0 and seen == count:
        return ""
    said = (done.err + done.out).strip()
    if done.code == 0:
        return f"it sees {seen} of {counted(count, 'GPU')}"
    return said[-300:] or f"docker run ended with {done.code}"


def probe_memory(gpu: Gpu, holders: Sequence[Holder], ours: Sequence[str]) -> str:
    """How much memory of a GPU is in use, and by whom. Raises ProbeWarning."""
    text = f"{human_bytes(gpu.used)} of {human_bytes(gpu.total)} in use"
    if gpu.mig:
        step = "nvidia-smi -mig 0 (as root, with the GPU idle): serve takes whole GPUs"
        raise ProbeWarning(f"{text}; MIG is enabled", step)
    foreign = strangers(holders, ours)
    if foreign:
        step = f"stop what is not needed: {_how_to_stop(foreign[0])}"
        raise ProbeWarning(f"{text}: {held_text(holders, gpu.used)}", step)
    if holders:
        return f"{text}: {held_text(holders, gpu.used)}"
    if gpu.used < MUCH_MEMORY:  # what the driver itself has
        return text
    raise ProbeWarning(
        f"{text}: {held_text((), gpu.used)}", "nvidia-smi, as root, names the process"
    )


def _how_to_stop(holder: Holder) -> str:
    if holder.container:
        return f"docker stop {holder.container}"
    return f"kill {holder.pid}"


def ports_text(plans: Sequence[Plan], listening: Mapping[int, Listener]) -> str:
    """Which ports deployments have, and what else listens where they would. Raises
    ProbeWarning."""
    names = {plan.port: plan.name for plan in plans if plan.port}
    taken: List[str] = []
    for port, name in sorted(names.items()):
        holder = listening.get(port)
        if holder and _is_foreign(holder):
            text = f"{port} of {name} is held by {holder.text()}"
            raise ProbeWarning(text, f"stop it, or: hfship serve {name} --port ANOTHER")
        taken.append(f"{port} {name}")

    others = {port: holder for port, holder in listening.items() if port in PORTS}
    for port in sorted(others.keys() - names.keys()):
        taken.append(f"{port} {others[port].text()}")

    in_use = {*listening, *names}
    free = min(set(PORTS) - in_use)
    text = f"the next deployment gets {free}"
    if taken:
        text += f"; taken: {shorten(taken)}"
    return text


def _is_foreign(holder: Listener) -> bool:
    """Is it another program than docker's own? What we may not see may be docker's."""
    return bool(holder.program) and holder.program not in _PROXIES
