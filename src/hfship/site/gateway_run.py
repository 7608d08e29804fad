# SPDX-License-Identifier: Apache-2.0
"""The gateway's container: its image, the check of its files, start and reload.

Promises: what `haproxy -c` refuses is not applied, nor half of it: the files that run stay as they
are. A reload loses no request: the old process ends when its last answer is out, the new one has
the listening sockets. A second time nothing is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from enum import Enum
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

from hfship.base.errors import HostError, UsageError, command_line
from hfship.base.files import disk_errors
from hfship.base.processes import program_lines, run_program
from hfship.base.reading import LIST_SIZE, read_small
from hfship.base.values import dataclass
from hfship.serve.deployments import make_own_folder, read_own
from hfship.serve.docker import COMPOSE_TIMEOUT_S, docker
from hfship.site.admin import GatewayDownError, generation, replace_maps
from hfship.site.gateway import CONFIG_FILE, LARGE_BUFFERS, OLDEST
from hfship.site.gateway_files import COMPOSE_FILE, CONTAINER, PROJECT, RUN_FOLDER, GatewayFiles
from hfship.site.maps import Maps
from hfship.site.store import write_files
from hfship.site.terms import INSIDE, SITE_NETWORK, HaproxyVersion

CHECK_FOLDER = "next"  # in the folder of the gateway: what is checked before it counts
READY_S = 20.0
_POLL_S = 0.1
_BRING_IMAGE = (
    "hfship fetch docker://haproxy:3.4     # on the connected side\n"
    "docker load -i FILE     # here; then the same command again"
)


class Applied(Enum):
    """What applying the files of a gateway took."""

    NOTHING = "runs as it is"
    KEYS = "its keys were replaced"
    RELOAD = "was reloaded"
    START = "was started"


@dataclass(frozen=True)
class HaproxyImage:
    """An image with HAProxy."""

    reference: str
    version: HaproxyVersion


# -- the image


def find_image(wanted: str) -> HaproxyImage:
    """The image that is wanted, or the newest with HAProxy that docker has. Raises HostError."""
    reference = wanted
    if not wanted:
        listing = docker(["image", "ls", "--format", "{{json .}}"], "list images")
        found = haproxy_images(listing)
        if not found:
            what = "docker has no image of HAProxy, which the gateway is"
            raise HostError(what, "", _BRING_IMAGE)
        reference = found[0]
    asked = ["run", "--rm", "--network", "none", "--pull", "never", "--entrypoint", "haproxy"]
    answer = docker([*asked, reference, "-v"], f"ask {reference} for its version")
    version = haproxy_version(answer)
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        what = f"{reference} is too old for the gateway"
        raise HostError(what, f"it says {answer.strip()[:80]}; {oldest} is needed", _BRING_IMAGE)
    return HaproxyImage(reference, version)


def haproxy_images(listing: str) -> List[str]:
    """The images of HAProxy in `docker image ls --format '{{json .}}'`, the newest tag first.

    >>> rows = [{"Repository": "haproxy", "Tag": tag} for tag in ("2.8", "3.4-alpine", "<none>")]
    >>> haproxy_images("\\n".join(map(json.dumps, rows)))
    ['haproxy:3.4-alpine', 'haproxy:2.8']
    """
    found = []
    for line in listing.splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        last = row["Repository"].rpartition("/")[2]
        if re.match(r"haproxy(-alpine|-debian|-ubuntu)?\Z", last) and row["Tag"] != "<none>":
            found.append((tag_version(row["Tag"]), f"{row['Repository']}:{row['Tag']}"))
    return [name for _, name in sorted(found, reverse=True)]


def tag_version(tag: str) -> Tuple[int, ...]:
    """The version that a tag tells, to compare by.

    >>> tag_version("3.4.7-alpine"), tag_version("latest")
    ((3, 4, 7), ())
    """
    match = re.match(r"v?(\d+(?:\.\d+)*)", tag)
    if match is None:
        return ()
    return tuple(int(part) for part in match[1].split("."))


def haproxy_version(text: str) -> HaproxyVersion:
    """The version in what `haproxy -v` says. Raises HostError.

    >>> haproxy_version("HAProxy version 3.4.7-1 2026/10/14 - https://haproxy.org/")
    (3, 4)
    """
    match = re.search(r"version (\d+)\.(\d+)", text)
    if match is None:
        raise HostError("this is not an image of HAProxy", text.strip()[:200], _BRING_IMAGE)
    return int(match[1]), int(match[2])


def image_warning(image: HaproxyImage) -> str:
    """What is better in a newer one, "" for the newest."""
    if image.version >= LARGE_BUFFERS:
        return ""
    return f"{image.reference} is older than HAProxy 3.4, which reads larger bodies in less memory"


# -- the certificate


def read_certificate(cert: str, key: str) -> str:
    """The text for tls.pem: certificate, chain, key. Raises UsageError for what no client would
    take: another key, an expired one."""
    if not cert:
        return ""
    import ssl

    step = "mend tls_cert and tls_key in the models file"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key or None, password="")
        text = read_small(Path(cert)).decode()
        if key:
            text = text.rstrip("\n") + "\n" + read_small(Path(key)).decode()
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise UsageError(f"cannot use the certificate {cert}", str(exc), step) from exc

    left = days_left(cert)
    if left is not None and left <= 0:
        why = f"it ended {-left:.0f} days ago: no client would take it"
        raise UsageError(
            f"the certificate {cert} has expired", why, "renew it, then run this again"
        )

    return text


def days_left(cert: str) -> Optional[float]:
    """Days until a certificate ends; None where openssl is missing."""
    import ssl

    argv = ["openssl", "x509", "-in", cert, "-noout", "-enddate"]
    with contextlib.suppress(HostError, ValueError):
        done = run_program(argv, timeout_s=10)
        _, _, moment = done.out.strip().partition("=")
        left_s = ssl.cert_time_to_seconds(moment) - time.time()
        return left_s / 86400
    return None


# -- files and container


def require_network() -> None:
    """Make docker's network of the site, which leads nowhere else, if it is missing."""
    with contextlib.suppress(HostError):
        docker(["network", "inspect", SITE_NETWORK], "look at the network")
        return

    docker(["network", "create", "--internal", SITE_NETWORK], f"make the network {SITE_NETWORK}")


def owner() -> str:
    """UID:GID of who writes the files, as which HAProxy reads them."""
    return f"{os.geteuid()}:{os.getegid()}"


def check_files(folder: Path, files: GatewayFiles, image: str) -> None:
    """Have HAProxy check the files before they count. Raises HostError with what it refuses."""
    make_own_folder(folder)
    place = folder / CHECK_FOLDER
    try:
        write_files(folder, _below(CHECK_FOLDER, files.read_by_haproxy), 0o600)
        mount = f"type=bind,source={place},target={INSIDE},readonly"
        argv = ["docker", "run", "--rm", "--network", "none", "--pull", "never", "--user", owner()]
        argv += ["--mount", mount, "--entrypoint", "haproxy", image]
        done = run_program([*argv, "-c", "-f", f"{INSIDE}/{CONFIG_FILE}"], timeout_s=60)
    finally:
        with disk_errors("remove", place):
            shutil.rmtree(place, ignore_errors=True)
    if done.code:
        said = alerts_of(done.err + done.out)
        step = "mend the models file; what runs was left as it is"
        raise HostError("HAProxy refuses the configuration", said, step)


def _below(folder: str, texts: Mapping[str, str]) -> Dict[str, str]:
    return {f"{folder}/{name}": text for name, text in texts.items()}


def alerts_of(text: str) -> str:
    """What HAProxy complains of, without its notices.

    >>> alerts_of("[NOTICE] (1) : path\\n[ALERT] (1) : config : no\\n")
    '[ALERT] (1) : config : no'
    """
    lines = [line for line in text.splitlines() if line and not line.startswith("[NOTICE]")]
    return "\n".join(lines)[-1500:]


def apply_files(folder: Path, files: GatewayFiles, live: Maps) -> Applied:
    """Put the files, which are checked, in place, and have HAProxy run by them. `live` are the maps
    of the keys. Raises HostError; then the files are as they were before."""
    before = _texts(folder, [*files.secret, *files.plain])
    changed = write_files(folder, files.secret, 0o600) + write_files(folder, files.plain, 0o644)
    try:
        return _run_by(folder, files, live, bool(changed))
    except HostError:
        for name, text in before.items():
            write_files(folder, {name: text}, 0o600 if name in files.secret else 0o644)
        raise


def _texts(folder: Path, names: List[str]) -> Dict[str, str]:
    """The files of the gateway that are there."""
    texts = {}
    for name in names:
        place, _, own = name.rpartition("/")
        content = read_own(folder / place, own, LIST_SIZE)
        if content is not None:
            texts[name] = content.decode("utf-8", "replace")

    return texts


def _run_by(folder: Path, files: GatewayFiles, live: Maps, changed: bool) -> Applied:
    """Have HAProxy run by the files that are there now."""
    running = _generation(folder)
    _make_run_folder(folder)
    container = _container_id()
    up = ["compose", "-p", PROJECT, "-f", str(folder / COMPOSE_FILE), "up", "-d"]
    docker(up, "start the gateway", COMPOSE_TIMEOUT_S)
    if not container or container != _container_id():
        _await(folder, files.generation)
        return Applied.START
    if running != files.generation:
        docker(["kill", "--signal", "USR2", CONTAINER], "reload the gateway")
        _await(folder, files.generation)
        return Applied.RELOAD
    if changed:
        replace_maps(folder, live)
        return Applied.KEYS

    return Applied.NOTHING


def _generation(folder: Path) -> str:
    try:
        return generation(folder)
    except GatewayDownError:
        return ""


def _make_run_folder(folder: Path) -> None:
    with disk_errors("write", folder / RUN_FOLDER):
        (folder / RUN_FOLDER).mkdir(mode=0o700, exist_ok=True)


def _container_id() -> str:
    with contextlib.suppress(HostError):
        found = docker(
            ["container", "inspect", "-f", "{{.Id}} {{.State.Status}}", CONTAINER], "look"
        )
        name, _, status = found.strip().partition(" ")
        if status == "running":
            return name
    return ""


def _await(folder: Path, wanted: str) -> None:
    """Wait until HAProxy runs by the configuration that is wanted. Raises HostError."""
    deadline = time.monotonic() + READY_S
    while _generation(folder) != wanted:
        if time.monotonic() > deadline:
            with contextlib.suppress(HostError):
                lines = list(program_lines(["docker", "logs", "--tail", "30", CONTAINER]))
            said = alerts_of("\n".join(line for line in lines if not line.startswith("{")))
            step = command_line("docker", "logs", CONTAINER)
            raise HostError("the gateway does not take its configuration", said, step)
        time.sleep(_POLL_S)


def access_log(since: str = "") -> Iterator[str]:
    """The lines of the access log, each after docker's time of it, as far back as docker keeps
    it, or from one of these times on; none where there is no container. Raises HostError."""
    words = ["--timestamps"]
    if since:
        words += ["--since", since]
    return program_lines(["docker", "logs", *words, CONTAINER])
