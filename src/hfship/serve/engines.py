# SPDX-License-Identifier: Apache-2.0
"""Engines that hold container images: docker, podman and containerd's ctr.

Owns what each is asked and how its answers are read: what machine it is for, where it keeps its
images and how much room is there, whether it has an image, and the command that loads one from a
pipe. Promises: an image counts as there only by the digests of its layers and of itself.
Never: pulls an image.

The image ID is the digest of the configuration in docker's classic store and in podman's, that of
the manifest or of the index in containerd's; the layers are called by their diff IDs in all.
"""

from __future__ import annotations

import json
import os
import re
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from hfship.base.errors import DiskError, HostError, IntegrityError
from hfship.base.files import free_bytes
from hfship.base.imagefacts import ImageFacts, familiar
from hfship.base.processes import run_program
from hfship.base.text import human_bytes, printable
from hfship.base.values import dataclass

if TYPE_CHECKING:
    from hfship.hub.registry_protocol import ImageReference

ENGINES = ("docker", "podman", "ctr")
ENGINE_TIMEOUT_S = 60.0
_SHOWN = 1000  # characters of what an engine says
# What engines call machines, and what images call them.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
# An image of layers that are compressed takes this much when it is unpacked.
UNPACKED_RATIO = 2.5


@dataclass(frozen=True)
class EngineState:
    """What an engine is: its version, the architecture of its machine, the folder of its images
    ("": on another machine), and whether it has containerd's store."""

    name: str
    version: str
    architecture: str
    folder: str = ""
    containerd: bool = False

    @property
    def keeps_whole(self) -> bool:
        """Does it need every layer, also those that it has? Only docker's classic store looks for a
        layer by its chain of diff IDs before it reads it."""
        return self.name != "docker" or self.containerd


@dataclass(frozen=True)
class HeldImage:
    """An image as an engine holds it."""

    id: str
    diff_ids: Tuple[str, ...]
    digests: Tuple[str, ...] = ()  # of repositories, as docker's containerd store keeps them

    def is_image(self, facts: ImageFacts) -> bool:
        """Is it this image?"""
        if self.diff_ids and self.diff_ids != facts.diff_ids:
            return False
        return self.id in facts.digests


def ask(argv: Sequence[str], doing: str) -> str:
    """The output of an engine's command. Raises HostError with what it says."""
    done = run_program(argv, timeout_s=ENGINE_TIMEOUT_S)
    if not done.code:
        return done.out
    said = done.err.strip() or done.out.strip()
    end = printable(said[-_SHOWN:])
    words = takewhile(lambda word: not word.startswith("-"), argv[:3])
    step = f"try it by hand: {' '.join(words)}"
    raise HostError(f"cannot {doing}", f"{argv[0]} says: {end}", step)


# -- what it is


def engine_state(name: str) -> EngineState:
    """What an engine is. Raises HostError for one that is not there or does not answer."""
    if name == "docker":
        return docker_state(ask(["docker", "info", "--format", "{{json .}}"], "use docker"))
    if name == "podman":
        return podman_state(ask(["podman", "info", "--format", "json"], "use podman"))
    version = ask(["ctr", "version"], "use containerd by ctr")
    found = re.search(r"Server:\s+Version:\s+(\S+)", version)
    machine = os.uname().machine
    return EngineState(
        name="ctr",
        version=found[1] if found else "",
        architecture=_ARCHITECTURES.get(machine, machine),
        containerd=True,
    )


def docker_state(text: str) -> EngineState:
    """Of `docker info --format '{{json .}}'`. Raises HostError for another answer.

    >>> docker_state('{"ServerVersion": "28.5.2", "Architecture": "x86_64"}').architecture
    'amd64'
    """
    value = _parsed(text, "docker info")
    if value.get("ServerErrors"):
        raise HostError("docker does not answer", printable(str(value["ServerErrors"][0])), "")
    status = value.get("DriverStatus") or []
    machine = str(value.get("Architecture", ""))
    host = os.environ.get("DOCKER_HOST", "")
    is_here = not host or host.startswith("unix:")
    folder = str(value.get("DockerRootDir", ""))
    return EngineState(
        name="docker",
        version=str(value.get("ServerVersion", "")),
        architecture=_ARCHITECTURES.get(machine, machine),
        folder=folder if is_here else "",
        containerd=any("containerd" in str(row) for row in status),
    )


def podman_state(text: str) -> EngineState:
    """Of `podman info --format json`."""
    value = _parsed(text, "podman info")
    host = value.get("host") or {}
    store = value.get("store") or {}
    version = value.get("version") or {}
    return EngineState(
        name="podman",
        version=str(version.get("Version", "")),
        architecture=str(host.get("arch", "")),
        folder=str(store.get("graphRoot", "")),
    )


def _parsed(text: str, what: str) -> Dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise HostError(f"{what} gives no answer that can be read", text[:200], f"try {what}")
    return value


def require_fitting(state: EngineState, facts: ImageFacts, size: int, force: bool) -> None:
    """Refuse an image for another machine, unless `force` insists, and one for which there is no
    room. `size` are the bytes that would be sent. Raises HostError, DiskError."""
    _, _, architecture = facts.platform.partition("/")
    wanted = architecture.partition("/")[0]
    here = state.architecture
    differs = bool(here) and wanted != here
    if differs and not force:
        raise HostError(
            f"{facts.name} is for {facts.platform}, this machine is {here}",
            "a container of it could not start",
            f"fetch it with --platform linux/{here}, or insist with --force",
        )
    _require_room(state, facts, size)


def _require_room(state: EngineState, facts: ImageFacts, size: int) -> None:
    """docker and podman keep what comes beside what they make of it, until it is loaded. Raises
    DiskError."""
    if not state.folder or not Path(state.folder).is_dir():
        return
    needed = int(size * (1 + UNPACKED_RATIO))
    free = free_bytes(Path(state.folder))
    if free < needed:
        raise DiskError(
            f"{state.name} has no room for {facts.name}: {state.folder} has"
            f" {human_bytes(free)} free, about {human_bytes(needed)} needed",
            f"it keeps the {human_bytes(size)} that come beside the layers that it unpacks",
            f"free space there; {state.name} image prune removes images without a name",
        )


# -- what it has


def held_image(state: EngineState, reference: str) -> Optional[HeldImage]:
    """The image of a name, or an ID; None where there is none. `reference` is a full one."""
    if state.name == "ctr":
        return _held_by_ctr(reference)
    argv = [state.name, "image", "inspect", reference]
    done = run_program(argv, timeout_s=ENGINE_TIMEOUT_S)
    if done.code:
        return None
    return read_inspect(done.out)


def read_inspect(text: str) -> Optional[HeldImage]:
    """Of `docker|podman image inspect`; None for another answer.

    >>> read_inspect('[{"Id": "abc", "RootFS": {"Layers": ["sha256:1"]}}]').id
    'sha256:abc'
    """
    found = read_images(text)
    if not found:
        return None
    return found[0]


def read_images(inspected: str) -> Tuple[HeldImage, ...]:
    """All images of an answer of `docker|podman image inspect` that can be read.

    >>> [image.id for image in read_images('[{"Id": "a", "RootFS": {"Layers": []}}, {}]')]
    ['sha256:a']
    """
    try:
        rows = json.loads(inspected)
    except ValueError:
        return ()
    if not isinstance(rows, list):
        return ()
    images = [_image_in(row) for row in rows]
    return tuple(image for image in images if image)


def _image_in(row: Any) -> Optional[HeldImage]:
    try:
        image_id = str(row["Id"])
        layers = tuple(map(str, row["RootFS"]["Layers"]))
        digests = tuple(str(one).rpartition("@")[2] for one in row.get("RepoDigests") or ())
    except (KeyError, TypeError):
        return None
    if not image_id.startswith("sha256:"):  # podman
        image_id = f"sha256:{image_id}"
    return HeldImage(image_id, layers, digests)


def facts_in(row: Mapping[str, Any], reference: ImageReference) -> ImageFacts:
    """What docker knows of an image that it has; digests of a registry are "" where it came as a
    file into a classic store. Raises ValueError, KeyError, TypeError for another answer.

    >>> from hfship.hub.registry_protocol import parse_reference
    >>> row = {"Id": "sha256:1", "Os": "linux", "Architecture": "amd64", "RootFS": {"Layers": []}}
    >>> facts_in(row, parse_reference("docker://busybox")).digest
    ''
    """
    digests: Dict[str, str] = {}
    for told in row.get("RepoDigests") or ():
        repository, _, digest = str(told).rpartition("@")
        digests[repository] = digest
    digest = digests.get(familiar(reference.repository), "")
    platform = f"{row['Os']}/{row['Architecture']}"
    if row.get("Variant"):
        platform += f"/{row['Variant']}"
    layers = row["RootFS"]["Layers"]
    return ImageFacts(
        reference=reference.local_reference,
        digest=digest,
        manifest_digest="",
        config_digest=str(row["Id"]),
        diff_ids=tuple(map(str, layers)),
        platform=platform,
    )


def _held_by_ctr(reference: str) -> Optional[HeldImage]:
    """ctr tells the digest alone, of the manifest or the index."""
    listing = ask(["ctr", "images", "ls", f"name=={reference}"], "ask containerd for its images")
    for line in listing.splitlines()[1:]:
        words = line.split()
        if len(words) > 2 and words[0] == reference:
            return HeldImage(words[2], ())
    return None


def layers_there(state: EngineState, facts: ImageFacts) -> int:
    """How many of the first layers docker's classic store has, of whatever image: it looks for a
    layer by the chain of all below it, and reads it only if it is not there."""
    if state.keeps_whole:
        return 0
    chains = [image.diff_ids for image in images_of_docker()]
    return longest_start(chains, facts.diff_ids)


def images_of_docker() -> Tuple[HeldImage, ...]:
    """All that docker has, also what has no name. Raises HostError."""
    listing = ask(["docker", "image", "ls", "-aq", "--no-trunc"], "list the images of docker")
    ids = list(dict.fromkeys(listing.split()))
    if not ids:
        return ()
    done = run_program(["docker", "image", "inspect", *ids[:500]], timeout_s=ENGINE_TIMEOUT_S)
    return read_images(done.out)


def longest_start(chains: Iterable[Sequence[str]], diff_ids: Sequence[str]) -> int:
    """How many of `diff_ids`, from the first on, one of the chains of layers has in this order.

    >>> longest_start([("a", "b", "x"), ()], ["a", "b", "c"])
    2
    """
    longest = 0
    for chain in chains:
        count = 0
        for ours, theirs in zip(diff_ids, chain):
            if ours != theirs:
                break
            count += 1
        longest = max(longest, count)
    return longest


@dataclass(frozen=True)
class UnusedImage:
    """An image of docker that no container uses, also none that is stopped; its bytes, as far as
    docker tells."""

    id: str
    name: str
    size: int


def unused_images() -> List[UnusedImage]:
    """Those of docker. Raises HostError."""
    ids = ask(["docker", "image", "ls", "-q", "--no-trunc"], "list the images of docker").split()
    containers = ask(["docker", "ps", "-aq", "--no-trunc"], "list the containers of docker").split()
    used = set()
    if containers:
        looked = ["docker", "container", "inspect", "--format", "{{.Image}}", *containers]
        used = set(ask(looked, "look at the containers of docker").split())
    found = []
    for image_id in dict.fromkeys(ids):
        if image_id not in used:
            found.append(_unused(image_id))
    return found


def _unused(image_id: str) -> UnusedImage:
    row = json.loads(ask(["docker", "image", "inspect", image_id], "look at an image"))[0]
    names = row.get("RepoTags") or [image_id[:19]]
    size = row.get("Size") or 0
    return UnusedImage(image_id, printable(", ".join(names)), int(size))


def remove_image(image_id: str) -> None:
    """Remove an image of docker, with all its names. Raises HostError."""
    ask(["docker", "image", "rm", "-f", image_id], "remove an image of docker")


# -- how it takes one


def load_command(state: EngineState) -> List[str]:
    """What reads an archive of an image on its stdin."""
    if state.name == "ctr":
        return ["ctr", "images", "import", "-"]
    return [state.name, "load", "-q"]


def require_loaded(state: EngineState, facts: ImageFacts) -> HeldImage:
    """Prove what an engine has, by the diff IDs and the image ID. Raises IntegrityError."""
    held = held_image(state, facts.reference)
    if held is None and state.name != "ctr":
        held = held_image(state, facts.name)
    if held is None:
        what = f"{state.name} has no {facts.name} although it took it"
        raise IntegrityError(what, "", f"look at what is there: {state.name} images")
    if held.is_image(facts):
        return held
    raise IntegrityError(
        f"{state.name} has another image as {facts.name} than it was sent",
        f"it has {held.id}, sent was {facts.config_digest}",
        "run the same command again",
    )
