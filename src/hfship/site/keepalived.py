# SPDX-License-Identifier: Apache-2.0
"""One address for the gateways of several hosts: what keepalived (VRRP version 3) is told.

Owns keepalived.conf and check-gateway.sh beside the files of a gateway. Pure: the same values give
the same bytes. The first host that is named has the address while its gateway answers; the others
take it within a second, without multicast, which many networks drop. It goes back only when the one
that has it fails: a gateway that comes and goes must not move clients each time.
"""

from __future__ import annotations

import hashlib
from ipaddress import ip_interface
from typing import NamedTuple, Sequence

CONFIG_FILE, CHECK_FILE = "keepalived.conf", "check-gateway.sh"
FIRST_PRIORITY = 200
ADVERT_S = 0.3  # a host that is gone is noticed after three of them and a bit


class GatewayHost(NamedTuple):
    """A host with a gateway: its address for the others, and the interface that has it."""

    name: str
    address: str
    interface: str


def router_id(address: str) -> int:
    """The number of the virtual router, of 1 to 255: the same on all hosts, and another one for
    another address on the same wire.

    >>> router_id("10.0.0.100/24") == router_id("10.0.0.100/24")
    True
    """
    return hashlib.sha256(address.encode()).digest()[0] % 255 + 1


def keepalived_text(address: str, hosts: Sequence[GatewayHost], own: int, check: str) -> str:
    """keepalived.conf of the host with the number `own`; `check` is the path of the script."""
    host = hosts[own]
    peers = [other.address for other in hosts if other != host]
    lines = [
        "# Written by hfship; `hfship serve --models FILE` writes it again.",
        "global_defs {",
        f"    router_id {host.name}",
        "    enable_script_security",
        "    script_user root",
        "    vrrp_version 3",
        "}",
        "vrrp_script gateway {",
        f'    script "/bin/sh {check}"',
        "    interval 1",
        "    timeout 2",
        "    fall 2",
        "    rise 2",
        "}",
        "vrrp_instance gateway {",
        "    state BACKUP",
        "    nopreempt",
        f"    interface {host.interface}",
        f"    virtual_router_id {router_id(address)}",
        f"    priority {FIRST_PRIORITY - own}",
        f"    advert_int {ADVERT_S}",
        f"    unicast_src_ip {host.address}",
        "    unicast_peer {",
        *(f"        {peer}" for peer in peers),
        "    }",
        "    virtual_ipaddress {",
        f"        {ip_interface(address)}",
        "    }",
        "    track_script {",
        "        gateway",
        "    }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def check_text(port: int, tls: bool) -> str:
    """check-gateway.sh: whether the gateway of this host answers."""
    scheme = "https" if tls else "http"
    program = (
        "import ssl, urllib.request as u;"
        " c = ssl._create_unverified_context();"
        " u.build_opener(u.ProxyHandler({}), u.HTTPSHandler(context=c))"
        f".open('{scheme}://127.0.0.1:{port}/health', timeout=1)"
    )
    return f'#!/bin/sh\n# Written by hfship.\nexec python3 -c "{program}" 2>/dev/null\n'
