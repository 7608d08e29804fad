# SPDX-License-Identifier: Apache-2.0
"""What a host of a site says of itself: read here, told as JSON, and read back by the control host.

Owns hfship-facts/1, the answer of `hfship doctor --facts` (docs/json.md). Promises: nothing secret
is in it; reading changes nothing, and what docker cannot say is left out, with the reason in
`docker_problem` and what mends it in `docker_next`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import socket
import struct
import time
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Sequence

from hfship.base.errors import HfshipError, HostError, IntegrityError
from hfship.base.files import existing_ancestor, free_bytes, sha256_file
from hfship.base.manifest import MANIFEST_PATH
from hfship.base.network import port_is_free
from hfship.base.report import Reporter
from hfship.base.settings import Settings, typed_fields
from hfship.base.values import asdict, replace
from hfship.serve.deployments import list_deployments, look_at_deployment
from hfship.serve.docker import docker, read_image, require_docker
from hfship.serve.files import parse_plan, plan_text
from hfship.serve.plan import PORTS
from hfship.serve.survey import Purpose, read_machine
from hfship.serve.terms import Gpu, Host, Image
from hfship.site.hosts import HostFacts, Interface

FACTS_FORMAT = "hfship-facts/1"
DRAINED_FILE = "_site/drained"  # in the folder of deployments: nothing is to be placed here
_SIOCGIFADDR = 0x8915  # of netdevice(7): the IPv4 address of an interface
_CONTAINERS = '{{.Label "hfship.name"}}\t{{.State}}\t{{.Status}}'


def own_facts(settings: Settings) -> Dict[str, Any]:
    """What this host says of itself, as JSON carries it."""
    quiet = Reporter("none", -1)
    machine = read_machine("", Purpose.SHOW, quiet)
    deployments, _ = list_deployments(settings.deploy_dir, quiet, look_at_deployment)
    states = container_states()
    plans = [one.plan for one in deployments]
    taken = frozenset(port for port in PORTS if not port_is_free("0.0.0.0", port))
    images = [read_image(image, may_ask=False) for image in machine.host.images]
    offer = replace(machine.host, taken_ports=taken, images=tuple(images))
    engine = docker_there()
    return {
        "schema": FACTS_FORMAT,
        "host": os.uname().nodename,
        "offer": _json_of(offer),
        "plans": [json.loads(plan_text(plan)) for plan in plans],
        "running": sorted(name for name, state in states.items() if state in _UP),
        "healthy": sorted(name for name, state in states.items() if state == "healthy"),
        "models": known_models([settings.site_models_dir, settings.models_dir]),
        "interfaces": [asdict(one) for one in interfaces()],
        "infiniband": infiniband(Path("/sys/class/infiniband")),
        "docker": engine.version,
        "docker_problem": engine.problem,
        "docker_next": engine.next_step,
        "architecture": platform.machine(),
        "time": time.time(),
        "free": free_bytes(existing_ancestor(settings.deploy_dir)),
        "drained": (settings.deploy_dir / DRAINED_FILE).exists(),
    }


def _json_of(offer: Host) -> Dict[str, Any]:
    value = asdict(offer)
    value["taken_ports"] = sorted(offer.taken_ports)
    value["cdi"] = sorted(offer.cdi)
    value["running"] = sorted(offer.running)
    return value


# States of a container that holds its GPUs: `docker ps` with the word of its health check.
_UP = ("running", "starting", "healthy", "unhealthy", "restarting", "paused")


def container_states() -> Dict[str, str]:
    """The state of each deployment's container: its health where it has one, else what docker says;
    {} where docker does not answer."""
    with contextlib.suppress(HostError):
        listed = docker(["ps", "-a", "--format", _CONTAINERS], "list containers")
        return parse_states(listed)
    return {}


def parse_states(listed: str) -> Dict[str, str]:
    r"""The states in what `docker ps` lists: a name, the state, and words with the health.

    >>> parse_states("m\trunning\tUp 2 hours (healthy)\nn\texited\tExited (0)\n\trunning\tUp\n")
    {'m': 'healthy', 'n': 'exited'}
    """
    states = {}
    for line in listed.splitlines():
        name, _, rest = line.partition("\t")
        state, _, status = rest.partition("\t")
        for word in ("unhealthy", "healthy", "starting"):
            if f"({word})" in status or f"health: {word}" in status:
                state = word
                break
        if name:
            states[name] = state
    return states


class DockerThere(NamedTuple):
    """How docker is here. `problem` says why no model can be served by it, "" when it can."""

    problem: str = ""
    next_step: str = ""
    version: str = ""  # of the engine; "": none answers


def docker_there() -> DockerThere:
    """Ask docker how it is: engine and compose, as a start will need them."""
    version = ""
    try:
        said = docker(["version", "--format", "{{.Server.Version}}"], "use docker")
        version = said.strip()
        require_docker()
    except HostError as exc:
        problem = f"{exc.what} ({exc.why})"
        return DockerThere(problem, exc.next_step, version)
    return DockerThere(version=version)


def known_models(folders: Sequence[Path]) -> Dict[str, str]:
    """The models that are here as hfship brought them: the name, and the SHA-256 of the manifest,
    in which there is that of each file."""
    models: Dict[str, str] = {}
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in sorted(folder.iterdir()):
                if path.name in models:
                    continue
                manifest = path / MANIFEST_PATH
                if manifest.is_file():
                    models[path.name] = sha256_file(manifest)
    return models


def interfaces() -> List[Interface]:
    """The network interfaces with an IPv4 address, but for loopback and docker's own."""
    found = []
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as any_socket:
        for _, name in socket.if_nameindex():
            if name == "lo" or name.startswith(("docker", "br-", "veth")):
                continue
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                address = socket.inet_ntoa(answer[20:24])
                found.append(Interface(name, address, _speed_of(name)))
    return found


def _speed_of(name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(0, int(Path(f"/sys/class/net/{name}/speed").read_text()))
    return 0


def infiniband(folder: Path) -> List[str]:
    """The host channel adapters that have an active port, by name."""
    found = []
    with contextlib.suppress(OSError):
        for adapter in sorted(folder.iterdir()):
            states = []
            for path in adapter.glob("ports/*/state"):
                states.append(path.read_text())
            if any("ACTIVE" in state for state in states):
                found.append(adapter.name)
    return found


# -- read back


def facts_of(name: str, value: Mapping[str, Any], now: float, lease: str = "") -> HostFacts:
    """The facts of the host `name` in what it told at `now` of our clock. Raises IntegrityError."""
    try:
        if value["schema"] != FACTS_FORMAT:
            raise ValueError(f"its schema is {value['schema']!r}")
        plans = [parse_plan(json.dumps(one), name) for one in value["plans"]]
        known = typed_fields(HostFacts(name), _plain(value))
        return HostFacts(
            **{
                **known,
                "name": name,
                "problem": str(value["docker_problem"]),
                "next_step": str(value["docker_next"]),
                "offer": _offer_of(value["offer"]),
                "plans": tuple(plans),
                "running": _names(value["running"]),
                "healthy": _names(value["healthy"]),
                "models": {str(k): str(v) for k, v in value["models"].items()},
                "interfaces": tuple(_interface_of(one) for one in value["interfaces"]),
                "infiniband": tuple(map(str, value["infiniband"])),
                "clock_offset_s": float(value["time"]) - now,
                "lease": lease,
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError, HfshipError) as exc:
        why = f"{type(exc).__name__}: {exc}"
        step = f"have the same hfship.pyz on {name} as here"
        raise IntegrityError(f"{name} tells facts that are none", why, step) from exc


_PLAIN = ("docker", "architecture", "free", "drained")


def _plain(value: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: value[name] for name in _PLAIN}


def _names(value: Sequence[Any]) -> FrozenSet[str]:
    return frozenset(map(str, value))


def _interface_of(value: Mapping[str, Any]) -> Interface:
    return Interface(**typed_fields(Interface("", ""), value))


def _offer_of(value: Mapping[str, Any]) -> Host:
    gpus = [_gpu_of(one) for one in value["gpus"]]
    images = [_image_of(one) for one in value["images"]]
    return Host(
        tuple(gpus),
        tuple(images),
        int(value["memory"]),
        frozenset(map(int, value["taken_ports"])),
        str(value["gpu_problem"]),
        _names(value["cdi"]),
    )


def _gpu_of(value: Mapping[str, Any]) -> Gpu:
    return Gpu(**typed_fields(Gpu(0, "", "", 0), value))


def _image_of(value: Mapping[str, Any]) -> Image:
    version = value["version"]
    others = {name: one for name, one in value.items() if name != "version"}
    image = Image(**typed_fields(Image(""), others))
    if version is None:
        return image
    first, second, third = version
    return replace(image, version=(int(first), int(second), int(third)))
