# SPDX-License-Identifier: Apache-2.0
"""What lies in the folder of the gateway: all texts, from a Gateway, its keys and its certificate.

Pure. Promises: the folder is enough: `docker network create --internal hfship` once, then
`docker compose up -d` there runs it without hfship.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Dict, List, Mapping, Tuple

from hfship.base.values import dataclass, field, replace
from hfship.serve.files import yaml_lines
from hfship.site.gateway import CONFIG_FILE, config_text
from hfship.site.maps import MAPS_FOLDER, Maps, map_path, map_text
from hfship.site.settings import GatewaySettings
from hfship.site.store import GATEWAY_FILE, gateway_text
from hfship.site.terms import (
    CERTIFICATE_FILE,
    INSIDE,
    PLAIN_PORT,
    SITE_NETWORK,
    TLS_PORT,
    Gateway,
    HaproxyVersion,
)

CONTAINER = "hfship_gateway"
PROJECT = "hfship_gateway"  # those of models have a - after hfship
COMPOSE_FILE = "docker-compose.yml"
RUN_FOLDER = "run"
DOCKER_DNS = "127.0.0.11:53"


@dataclass(frozen=True)
class GatewayFiles:
    """The files of a gateway by their path in its folder; `secret` ones get the mode 0600.

    `live` maps may change while HAProxy runs; all else that it reads takes a reload, and has
    `generation`; what is in `compose` takes a new container.
    """

    plain: Mapping[str, str]
    secret: Mapping[str, str] = field(repr=False)
    generation: str = ""

    @property
    def compose(self) -> str:
        """The text of the compose file."""
        return self.plain[COMPOSE_FILE]

    @property
    def read_by_haproxy(self) -> Mapping[str, str]:
        """What `haproxy -c` has to see."""
        files = {**self.plain, **self.secret}
        return {
            name: text
            for name, text in files.items()
            if name.startswith(MAPS_FOLDER) or name in (CONFIG_FILE, CERTIFICATE_FILE)
        }


def gateway_of(
    settings: GatewaySettings, models: Tuple[Any, ...], version: HaproxyVersion
) -> Gateway:
    """The gateway that a models file asks for, in its container."""
    gateway = Gateway(
        models=models,
        version=version,
        resolver=DOCKER_DNS,
        max_body=settings.max_body,
        max_upload=settings.max_upload,
        timeout_s=settings.timeout,
    )
    if not settings.tls_cert:
        return gateway
    return replace(gateway, tls_bind=f":{TLS_PORT}", https_port=settings.published_port)


def gateway_files(
    gateway: Gateway,
    settings: GatewaySettings,
    image: str,
    owner: str,
    certificate: str,
    model_maps: Maps,
    key_maps: Maps,
) -> GatewayFiles:
    """All files. `owner` is UID:GID of who writes them, as which HAProxy runs; `certificate` the
    text for tls.pem, "" without TLS."""
    maps = {map_path(name): map_text(entries) for name, entries in model_maps.items()}
    generation = _digest(config_text(gateway), certificate, *maps.values())
    secret = {**maps}
    for name, entries in key_maps.items():
        secret[map_path(name)] = map_text(entries)
    if certificate:
        secret[CERTIFICATE_FILE] = certificate

    plain = {
        GATEWAY_FILE: gateway_text(gateway),
        CONFIG_FILE: config_text(gateway, generation),
        COMPOSE_FILE: compose_text(settings, image, owner),
    }

    return GatewayFiles(plain, secret, generation)


def _digest(*texts: str) -> str:
    """A short name for some texts, of which one may be secret.

    >>> len(_digest("a", "b"))
    16
    """
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def compose_text(settings: GatewaySettings, image: str, owner: str) -> str:
    """The text of docker-compose.yml."""
    head = "# Written by hfship; `hfship serve --models FILE` writes it again."
    lines = [head, *yaml_lines(compose_value(settings, image, owner))]
    return "\n".join(lines) + "\n"


def compose_value(settings: GatewaySettings, image: str, owner: str) -> Mapping[str, Any]:
    """What docker-compose.yml says."""
    service: Dict[str, Any] = {
        "container_name": CONTAINER,
        "image": image,
        "pull_policy": "never",
        "entrypoint": ["haproxy"],
        "command": ["-W", "-db", "-f", f"{INSIDE}/{CONFIG_FILE}"],
        "user": owner,
        "ports": _ports(settings),
        "networks": ["default", SITE_NETWORK],
        "volumes": [
            _bind(".", INSIDE, True),
            _bind(f"./{RUN_FOLDER}", f"{INSIDE}/{RUN_FOLDER}", False),
        ],
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        # Ends when the last answer is out, or is killed after that time.
        "stop_signal": "SIGUSR1",
        "stop_grace_period": "60s",
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "10"}},
        "labels": {"hfship.site": "gateway"},
    }
    return {
        "name": PROJECT,
        "services": {"gateway": service},
        "networks": {SITE_NETWORK: {"external": True}},
    }


def _bind(source: str, target: str, read_only: bool) -> Mapping[str, Any]:
    return {
        "type": "bind",
        "source": source,
        "target": target,
        "read_only": read_only,
        "bind": {"create_host_path": False},
    }


def _ports(settings: GatewaySettings) -> List[str]:
    host = settings.host
    if ":" in host:  # IPv6
        host = f"[{host}]"

    if not settings.tls_cert:
        return [f"{host}:{settings.published_port}:{PLAIN_PORT}"]

    ports = [f"{host}:{settings.published_port}:{TLS_PORT}"]
    if settings.http_port:
        ports.append(f"{host}:{settings.http_port}:{PLAIN_PORT}")

    return ports
